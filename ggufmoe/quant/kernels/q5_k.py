"""Q5_K: 8 blocks of 32 weights with 5 bits each, the fifth bits apart; 176 bytes."""

from __future__ import annotations

from ggufmoe.quant.kernels.lanes import Index, Lanes, Rows
from ggufmoe.quant.kernels.packing import join_bytes
from ggufmoe.quant.kernels.searches import Affine
from ggufmoe.quant.kernels.six_bit import BLOCK, HEADER_WORDS, quantize_superblock
from ggufmoe.quant.kernels.tiles import Tiles

_SEARCH = Affine(BLOCK, 31, -0.5, 0.1, 15)
_PAIR_WORDS = 8
_WORDS = HEADER_WORDS + 5 * _PAIR_WORDS


def quantize(k: Tiles, x: Rows, importance: Rows | None) -> None:
    """Write the superblock of each lane."""
    words, levels = k.int_rows(_WORDS), k.int_rows(2 * BLOCK)
    superblock = quantize_superblock(k, x, importance, _SEARCH, words)
    high = words.at(HEADER_WORDS)
    for word in range(_PAIR_WORDS):
        high[word] = k.i32(0)
    with k.loop(4) as turn:
        superblock.pair(turn, levels)
        _pack(k, turn, levels, high, words.at(turn * _PAIR_WORDS + (HEADER_WORDS + _PAIR_WORDS)))
    k.store_words(0, words.first(_WORDS))


def _pack(k: Lanes, turn: Index, levels: Rows, high: Rows, low: Rows) -> None:
    for word in range(_PAIR_WORDS):
        pairs = [(levels[i], levels[BLOCK + i]) for i in range(4 * word, 4 * word + 4)]
        low[word] = join_bytes([(first & 0xF) | ((second & 0xF) << 4) for first, second in pairs])
        fifth_bits = join_bytes([(first >> 4) | ((second >> 4) << 1) for first, second in pairs])
        high[word] = high[word] | fifth_bits.shifted_left(turn * 2)
