"""IQ4_XS: 8 blocks of 32 weights with 4 bits each on uneven levels, signed 6-bit scales; 136 bytes."""

from __future__ import annotations

from ggufmoe.quant.kernels.iq4 import BLOCK, Search, squares
from ggufmoe.quant.kernels.lanes import Lanes, Rows, Value
from ggufmoe.quant.kernels.packing import join_bytes, pack_nibbles
from ggufmoe.quant.kernels.superblocks import (
    WEIGHTS,
    largest_magnitude,
    spread_importance,
    sum_of_squares,
)
from ggufmoe.quant.kernels.tiles import Tiles

_N_BLOCKS = 8
_HEADER_WORDS = 2
_WORDS = 34


def quantize(k: Tiles, x: Rows, importance: Rows | None) -> None:
    """Write the superblock of each lane."""
    search, words, inverses = Search(k), k.int_rows(_WORDS), k.float_rows(_N_BLOCKS)
    d, quantized = _scales(k, search, x, importance)
    for number, level in enumerate(quantized):
        step = d * level.to_float()
        inverses[number] = k.where(step.differs(0.0), 1.0 / step, 0.0)
    stored = [level + 32 for level in quantized]
    high = k.i32(0)
    for number, level in enumerate(stored):
        high = high | ((level >> 4) << (2 * number))
    words[0] = k.half_bits(d) | (high << 16)
    words[1] = join_bytes([(stored[j] & 0xF) | ((stored[j + 1] & 0xF) << 4) for j in range(0, _N_BLOCKS, 2)])
    with k.loop(_N_BLOCKS) as j:
        block, nibbles = x.at(j * BLOCK), words.at(j * 4 + _HEADER_WORDS)
        levels = [search.nearest.index(inverses[j] * block[i]) for i in range(BLOCK)]
        for i, word in enumerate(pack_nibbles(levels)):
            nibbles[i] = word
    k.store_words(0, words.first(_WORDS))


def _scales(k: Lanes, search: Search, x: Rows, importance: Rows | None) -> tuple[Value, list[Value]]:
    scales, weights = k.float_rows(_N_BLOCKS), k.float_rows(BLOCK)
    energy = None if importance is None else sum_of_squares(k, x, WEIGHTS) * (2.0 / WEIGHTS)
    with k.loop(_N_BLOCKS) as j:
        block = x.at(j * BLOCK)
        if importance is None or energy is None:
            squares(block, weights)
        else:
            spread_importance(k, block, importance.at(j * BLOCK), energy, weights, BLOCK)
        scales[j] = search.scale(block, weights)
    extreme, _ = largest_magnitude(k, scales, _N_BLOCKS)
    d = -extreme / 32.0
    inverse = k.where(d.differs(0.0), 1.0 / d, 0.0)
    return d, [k.clamp(k.nearest_int(inverse * scales[j]), -32, 31) for j in range(_N_BLOCKS)]
