"""Q8_0: one block of 32 weights with 8 bits each; 34 bytes. ggml ignores importances for this format."""

from __future__ import annotations

from ggufmoe.quant.kernels.lanes import Rows
from ggufmoe.quant.kernels.legacy import BLOCK, inverse_or_odd
from ggufmoe.quant.kernels.packing import join_bytes
from ggufmoe.quant.kernels.tiles import Tiles


def quantize(k: Tiles, x: Rows, importance: Rows | None) -> None:
    """Write the block of each lane."""
    top = k.f32(0.0)
    for i in range(BLOCK):
        top = k.larger(top, k.magnitude(x[i]))
    d = top / 127.0
    inverse = inverse_or_odd(k, d)
    levels = [k.round_away(x[i] * inverse).to_int() & 0xFF for i in range(BLOCK)]
    k.store_half(0, k.half_bits(d))
    k.store_words(2, [join_bytes(levels[i : i + 4]) for i in range(0, BLOCK, 4)])
