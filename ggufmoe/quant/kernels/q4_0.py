"""Q4_0: one block of 32 weights with 4 bits each; 18 bytes."""

from __future__ import annotations

from ggufmoe.quant.kernels.lanes import Rows
from ggufmoe.quant.kernels.legacy import symmetric_block
from ggufmoe.quant.kernels.packing import pack_nibbles
from ggufmoe.quant.kernels.tiles import Tiles


def quantize(k: Tiles, x: Rows, importance: Rows | None) -> None:
    """Write the block of each lane."""
    d, levels = symmetric_block(k, x, importance, 8)
    k.store_half(0, k.half_bits(d))
    k.store_words(2, pack_nibbles(levels))
