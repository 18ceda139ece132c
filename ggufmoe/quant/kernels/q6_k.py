"""Q6_K: 16 blocks of 16 weights with 6 bits each and signed 8-bit scales; 210 bytes."""

from __future__ import annotations

from ggufmoe.quant.kernels.lanes import Index, Lanes, Rows, Value
from ggufmoe.quant.kernels.packing import join_bytes
from ggufmoe.quant.kernels.searches import ZERO_GROUP, Symmetric, SymmetricSearch
from ggufmoe.quant.kernels.superblocks import WEIGHTS, largest_magnitude, symmetric_levels
from ggufmoe.quant.kernels.tiles import Tiles

_BLOCK = 16
_N_BLOCKS = 16
_N_MAX = 32
_HIGH_WORD = 32
_SCALE_WORD = 48
_WORDS = 52


def quantize(k: Tiles, x: Rows, importance: Rows | None) -> None:
    """Write the superblock of each lane."""
    words, scales, levels = k.int_rows(_WORDS), k.float_rows(_N_BLOCKS), k.int_rows(WEIGHTS)
    search = SymmetricSearch(k, Symmetric(_BLOCK, _N_MAX))
    with k.loop(_N_BLOCKS) as j:
        weights = None if importance is None else importance.at(j * _BLOCK)
        fit = search.fit(x.at(j * _BLOCK), weights)
        scales[j] = fit.scale
        fit.store_levels(levels.at(j * _BLOCK))
    extreme, top = largest_magnitude(k, scales, _N_BLOCKS)
    zero = top < ZERO_GROUP
    inverse = -128.0 / extreme
    d_bits = k.where(zero, 0, k.half_bits(1.0 / inverse))
    quantized = [k.where(zero, 0, k.smaller(k.nearest_int(inverse * scales[j]), 127)) for j in range(_N_BLOCKS)]
    for word in range(4):
        words[_SCALE_WORD + word] = join_bytes([level & 0xFF for level in quantized[4 * word : 4 * word + 4]])
    steps = k.float_rows(_N_BLOCKS)
    d = k.from_half_bits(d_bits)
    for number, level in enumerate(quantized):
        steps[number] = d * level.sign_extended(8).to_float()
    with k.loop(_N_BLOCKS) as j:
        symmetric_levels(k, x.at(j * _BLOCK), steps[j], _BLOCK, _N_MAX, levels.at(j * _BLOCK))
    with k.loop(2) as half:
        _pack(k, half, levels.at(half * (WEIGHTS // 2)), zero, words)
    k.store_words(0, words.first(_WORDS))
    k.store_half(4 * _WORDS, d_bits)


def _pack(k: Lanes, half: Index, levels: Rows, zero: Value, words: Rows) -> None:
    low, high = words.at(half * 16), words.at(half * 8 + _HIGH_WORD)
    for word in range(8):
        quarters = [[k.where(zero, 0, levels[32 * q + 4 * word + i]) for i in range(4)] for q in range(4)]
        for side in (0, 1):
            pairs = zip(quarters[side], quarters[side + 2], strict=True)
            low[8 * side + word] = join_bytes([(first & 0xF) | ((second & 0xF) << 4) for first, second in pairs])
        bits = [
            a >> 4 | ((b >> 4) << 2) | ((c >> 4) << 4) | ((d >> 4) << 6) for a, b, c, d in zip(*quarters, strict=True)
        ]
        high[word] = join_bytes(bits)
