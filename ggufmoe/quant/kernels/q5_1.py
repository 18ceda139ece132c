"""Q5_1: one block of 32 weights with 5 bits each above a minimum, the fifth bits apart; 24 bytes."""

from __future__ import annotations

from ggufmoe.quant.kernels.lanes import Rows
from ggufmoe.quant.kernels.legacy import affine_block
from ggufmoe.quant.kernels.packing import pack_fifth_bits, pack_nibbles
from ggufmoe.quant.kernels.tiles import Tiles


def quantize(k: Tiles, x: Rows, importance: Rows | None) -> None:
    """Write the block of each lane."""
    d, low, levels = affine_block(k, x, importance, 31)
    header = k.half_bits(d) | (k.half_bits(low) << 16)
    k.store_words(0, [header, pack_fifth_bits(levels), *pack_nibbles([level & 0xF for level in levels])])
