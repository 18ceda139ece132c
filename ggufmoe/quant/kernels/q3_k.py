"""Q3_K: 16 blocks of 16 weights with 3 bits each, the third bits apart, and signed 6-bit scales; 110 bytes."""

from __future__ import annotations

from ggufmoe.quant.kernels.lanes import Lanes, Rows, Value
from ggufmoe.quant.kernels.packing import join_bytes, pack_pairs_of_bits
from ggufmoe.quant.kernels.searches import Symmetric, SymmetricSearch, refine_abreast
from ggufmoe.quant.kernels.superblocks import (
    WEIGHTS,
    largest_magnitude,
    spread_importance,
    sum_of_squares,
    symmetric_levels,
)
from ggufmoe.quant.kernels.tiles import Tiles

_BLOCK = 16
_N_BLOCKS = 16
_N_MAX = 4
_MASK_WORDS = 8
_SCALE_WORD = 24
_WORDS = 27
_ABREAST = 4


def quantize(k: Tiles, x: Rows, importance: Rows | None) -> None:
    """Write the superblock of each lane."""
    words, levels = k.int_rows(_WORDS), k.int_rows(WEIGHTS)
    if importance is None:
        d, quantized = _plain_scales(k, _plain_fits(k, x, levels))
    else:
        d, quantized = _weighted_scales(k, x, importance, levels)
    packed = _pack_scales(quantized)
    for word in range(3):
        words[_SCALE_WORD + word] = join_bytes(packed[4 * word : 4 * word + 4])
    d_bits = k.half_bits(d)
    steps = k.float_rows(_N_BLOCKS)
    d = k.from_half_bits(d_bits)
    for number in range(_N_BLOCKS):
        steps[number] = d * (_unpack_scale(packed, number) - 32).to_float()
    with k.loop(_N_BLOCKS) as j:
        symmetric_levels(k, x.at(j * _BLOCK), steps[j], _BLOCK, _N_MAX, levels.at(j * _BLOCK))
    _pack_levels(k, levels, words)
    k.store_words(0, words.first(_WORDS))
    k.store_half(4 * _WORDS, d_bits)


def _plain_fits(k: Lanes, x: Rows, levels: Rows) -> Rows:
    scales = k.float_rows(_N_BLOCKS)
    with k.loop(_N_BLOCKS // _ABREAST) as turn:
        numbers = [turn * _ABREAST + i for i in range(_ABREAST)]
        blocks = [(x.at(j * _BLOCK), levels.at(j * _BLOCK)) for j in numbers]
        for j, scale in zip(numbers, refine_abreast(k, blocks, Symmetric(_BLOCK, _N_MAX)), strict=True):
            scales[j] = scale
    return scales


def _plain_scales(k: Lanes, scales: Rows) -> tuple[Value, list[Value]]:
    extreme, _ = largest_magnitude(k, scales, _N_BLOCKS)
    some = extreme.differs(0.0)
    inverse = -32.0 / extreme
    quantized = [
        k.where(some, k.clamp(k.nearest_int(inverse * scales[j]).sign_extended(8), -32, 31) + 32, 0)
        for j in range(_N_BLOCKS)
    ]
    return k.where(some, 1.0 / inverse, 0.0), quantized


def _weighted_scales(k: Lanes, x: Rows, importance: Rows, levels: Rows) -> tuple[Value, list[Value]]:
    energy = sum_of_squares(k, x, WEIGHTS) * 2.0 / WEIGHTS
    scales, sums, weights = k.float_rows(_N_BLOCKS), k.float_rows(_N_BLOCKS), k.float_rows(_BLOCK)
    search = SymmetricSearch(k, Symmetric(_BLOCK, _N_MAX))
    with k.loop(_N_BLOCKS) as j:
        block = x.at(j * _BLOCK)
        sums[j] = spread_importance(k, block, importance.at(j * _BLOCK), energy, weights, _BLOCK)
        fit = search.fit(block, weights)
        scales[j] = fit.scale
        fit.store_levels(levels.at(j * _BLOCK))
    whole = SymmetricSearch(k, Symmetric(_N_BLOCKS, 32)).fit(scales, sums)
    quantized = k.int_rows(_N_BLOCKS)
    whole.store_levels(quantized)
    return whole.scale, [quantized[j] for j in range(_N_BLOCKS)]


def _pack_scales(quantized: list[Value]) -> list[Value]:
    low = [(quantized[j] & 0xF) | ((quantized[j + 8] & 0xF) << 4) for j in range(8)]
    for j in range(4):
        first, second, third, fourth = (quantized[j + 4 * i] >> 4 for i in range(4))
        low.append(first | (second << 2) | (third << 4) | (fourth << 6))
    return low


def _unpack_scale(packed: list[Value], j: int) -> Value:
    low = packed[j] & 0xF if j < 8 else packed[j - 8] >> 4
    return low | (((packed[8 + j % 4] >> (2 * (j // 4))) & 3) << 4)


def _pack_levels(k: Lanes, levels: Rows, words: Rows) -> None:
    for word in range(_MASK_WORDS):
        masks = []
        for i in range(4 * word, 4 * word + 4):
            mask = k.i32(0)
            for bit in range(8):
                level = levels[32 * bit + i]
                mask = mask | ((level >> 2) << bit)
                levels[32 * bit + i] = level & 3
            masks.append(mask)
        words[word] = join_bytes(masks)
    with k.loop(2) as half:
        pack_pairs_of_bits(levels.at(half * (WEIGHTS // 2)), words.at(half * 8 + _MASK_WORDS))
