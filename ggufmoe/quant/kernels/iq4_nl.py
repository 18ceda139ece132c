"""IQ4_NL: one block of 32 weights with 4 bits each on uneven levels; 18 bytes."""

from __future__ import annotations

from ggufmoe.quant.kernels.iq4 import BLOCK, Search, squares
from ggufmoe.quant.kernels.lanes import Rows
from ggufmoe.quant.kernels.packing import pack_nibbles
from ggufmoe.quant.kernels.superblocks import spread_importance, sum_of_squares
from ggufmoe.quant.kernels.tiles import Tiles


def quantize(k: Tiles, x: Rows, importance: Rows | None) -> None:
    """Write the block of each lane."""
    search, weights = Search(k), k.float_rows(BLOCK)
    if importance is None:
        squares(x, weights)
    else:
        energy = sum_of_squares(k, x, BLOCK) * (2.0 / BLOCK)
        spread_importance(k, x, importance, energy, weights, BLOCK)
    scale = search.scale(x, weights)
    inverse = k.where(scale.differs(0.0), 1.0 / scale, 0.0)
    k.store_half(0, k.half_bits(scale))
    k.store_words(2, pack_nibbles([search.nearest.index(inverse * x[i]) for i in range(BLOCK)]))
