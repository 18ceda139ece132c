"""Q4_1: one block of 32 weights with 4 bits each above a minimum; 20 bytes."""

from __future__ import annotations

from ggufmoe.quant.kernels.lanes import Rows
from ggufmoe.quant.kernels.legacy import affine_block
from ggufmoe.quant.kernels.packing import pack_nibbles
from ggufmoe.quant.kernels.tiles import Tiles


def quantize(k: Tiles, x: Rows, importance: Rows | None) -> None:
    """Write the block of each lane."""
    d, low, levels = affine_block(k, x, importance, 15)
    k.store_words(0, [k.half_bits(d) | (k.half_bits(low) << 16), *pack_nibbles(levels)])
