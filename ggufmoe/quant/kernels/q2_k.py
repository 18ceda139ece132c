"""Q2_K: 16 blocks of 16 weights with 2 bits each, 4-bit scales and minima; 84 bytes."""

from __future__ import annotations

from ggufmoe.quant.kernels.lanes import Lanes, Rows, Value
from ggufmoe.quant.kernels.packing import join_bytes, pack_pairs_of_bits
from ggufmoe.quant.kernels.searches import Affine, positive_fits
from ggufmoe.quant.kernels.superblocks import (
    WEIGHTS,
    Fits,
    Importance,
    affine_levels,
    fit_blocks,
    largest,
    sum_of_squares,
)
from ggufmoe.quant.kernels.tiles import Tiles

_BLOCK = 16
_N_BLOCKS = 16
_SCALE_WORDS = 4
_WORDS = 21
_PLAIN = Affine(_BLOCK, 3, -0.5, 0.1, 15, absolute_error=True)
_WEIGHTED = Affine(_BLOCK, 3, -0.9, 0.05, 36)


def quantize(k: Tiles, x: Rows, importance: Rows | None) -> None:
    """Write the superblock of each lane."""
    words, step, offset = k.int_rows(_WORDS), k.float_rows(_N_BLOCKS), k.float_rows(_N_BLOCKS)
    if importance is None:
        fits = fit_blocks(k, x, _PLAIN, _plain_weights)
        (d, scales), (d_min, minima) = (_plain_scales(k, rows) for rows in (fits.scale, fits.minimum))
    else:
        energy = sum_of_squares(k, x, WEIGHTS) / WEIGHTS
        fits = fit_blocks(k, x, _WEIGHTED, Importance(importance, energy))
        (d, scales), (d_min, minima) = positive_fits(k, (fits.scale, fits.minimum), fits.weight, _N_BLOCKS, 15)
    d_bits, min_bits = k.half_bits(d), k.half_bits(d_min)
    packed = [(scale | (minimum << 4)) & 0xFF for scale, minimum in zip(scales, minima, strict=True)]
    for word in range(_SCALE_WORDS):
        words[word] = join_bytes(packed[4 * word : 4 * word + 4])
    words[_WORDS - 1] = d_bits | (min_bits << 16)
    d, d_min = k.from_half_bits(d_bits), k.from_half_bits(min_bits)
    for j, byte in enumerate(packed):
        step[j], offset[j] = d * (byte & 0xF).to_float(), d_min * (byte >> 4).to_float()
    _store_levels(k, x, fits, (step, offset), words)
    k.store_words(0, words.first(_WORDS))


def _store_levels(k: Lanes, x: Rows, fits: Fits, scales: tuple[Rows, Rows], words: Rows) -> None:
    step, offset = scales
    levels = k.int_rows(WEIGHTS // 2)
    with k.loop(2) as half:
        with k.loop(_N_BLOCKS // 2) as j:
            block = half * (_N_BLOCKS // 2) + j
            rows = x.at(block * _BLOCK)
            affine_levels(k, rows, step[block], offset[block], fits, block, levels.at(j * _BLOCK))
        pack_pairs_of_bits(levels, words.at(half * 8 + _SCALE_WORDS))


def _plain_weights(k: Lanes, x: Rows, weights: Rows, n: int) -> None:
    for i in range(n):
        weights[i] = k.magnitude(x[i])


def _plain_scales(k: Lanes, rows: Rows) -> tuple[Value, list[Value]]:
    top = largest(k, rows, _N_BLOCKS)
    some = top > 0.0
    inverse = 15.0 / top
    return k.where(some, top / 15.0, 0.0), [
        k.where(some, k.nearest_int(inverse * rows[j]), 0) for j in range(_N_BLOCKS)
    ]
