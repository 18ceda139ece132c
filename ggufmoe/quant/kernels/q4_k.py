"""Q4_K: 8 blocks of 32 weights with 4 bits each; 144 bytes."""

from __future__ import annotations

from ggufmoe.quant.kernels.lanes import Rows
from ggufmoe.quant.kernels.packing import join_bytes
from ggufmoe.quant.kernels.searches import Affine
from ggufmoe.quant.kernels.six_bit import BLOCK, HEADER_WORDS, quantize_superblock
from ggufmoe.quant.kernels.tiles import Tiles

_SEARCH = Affine(BLOCK, 15, -1.0, 0.1, 20)
_PAIR_WORDS = 8


def quantize(k: Tiles, x: Rows, importance: Rows | None) -> None:
    """Write the superblock of each lane."""
    words, levels = k.int_rows(HEADER_WORDS + 4 * _PAIR_WORDS), k.int_rows(2 * BLOCK)
    superblock = quantize_superblock(k, x, importance, _SEARCH, words)
    with k.loop(4) as turn:
        superblock.pair(turn, levels)
        nibbles = words.at(turn * _PAIR_WORDS + HEADER_WORDS)
        for word in range(_PAIR_WORDS):
            weights = range(4 * word, 4 * word + 4)
            nibbles[word] = join_bytes([levels[i] | (levels[BLOCK + i] << 4) for i in weights])
    k.store_words(0, words.first(HEADER_WORDS + 4 * _PAIR_WORDS))
