"""IQ2_S: 16 blocks of 16 weights in groups of 8 on a grid of 1024 points, signs apart, 4-bit scales; 82 bytes."""

from __future__ import annotations

from ggufmoe.quant.kernels.grid_search import (
    GridForm,
    Renewed,
    ScaleSearch,
    free_signs,
    largest_of,
    scale_levels,
)
from ggufmoe.quant.kernels.lanes import Rows, Value
from ggufmoe.quant.kernels.packing import join_bytes, pack_scale_nibbles
from ggufmoe.quant.kernels.superblocks import WEIGHTS, spread_importance, sum_of_squares
from ggufmoe.quant.kernels.tiles import Tiles

FORM = GridForm("IQ2_S", n_shells=1, block=16, top=5, step=0.1, n_steps=9, renewed=Renewed.OFF_GRID)
_BLOCK = FORM.block
_N_BLOCKS = WEIGHTS // _BLOCK
_ZERO_BLOCK = 1e-8  # GROUP_MAX_EPS_IQ2_S


def quantize(k: Tiles, x: Rows, importance: Rows | None) -> None:
    """Write the superblock of each lane."""
    search, scales = ScaleSearch(k, FORM), k.float_rows(_N_BLOCKS)
    weights, magnitudes = k.float_rows(_BLOCK), k.float_rows(_BLOCK)
    pairs, signs = k.int_rows(_N_BLOCKS), k.int_rows(_N_BLOCKS)
    squares = sum_of_squares(k, x, WEIGHTS)
    energy = squares * (2.0 / WEIGHTS)
    k.mark_overflow(~(squares < float("inf")))
    with k.loop(_N_BLOCKS) as j:
        block = x.at(j * _BLOCK)
        if importance is None:
            for i in range(_BLOCK):
                weights[i] = energy * 0.25 + block[i] * block[i]
        else:
            spread_importance(k, block, importance.at(j * _BLOCK), energy, weights, _BLOCK)
        sign_bits = free_signs(k, block, magnitudes, _BLOCK)
        top = largest_of(k, magnitudes, _BLOCK)
        active = ~(top < _ZERO_BLOCK)
        fit = search.fit(magnitudes, weights, top, top / float(FORM.top), active)
        scales[j] = k.where(active, fit.scale, 0.0)
        signs[j] = k.where(active, sign_bits, 0)
        first, second = (fit.points[g] for g in range(2))
        pairs[j] = k.where(active, first | (second << 16), 0)
    d, some, levels = scale_levels(k, scales, _N_BLOCKS)
    k.store_half(0, k.where(some, k.half_bits(d * 0.9875), 0))
    k.store_words(2, [*_packed(pairs, signs), *pack_scale_nibbles(levels)])


def _packed(pairs: Rows, signs: Rows) -> list[Value]:
    """Bytes of the points' numbers, sign bytes, and the upper two bits of the numbers, as words."""
    low, sign_words, high = [], [], []
    for j in range(0, _N_BLOCKS, 2):
        numbers = [pair >> shift for pair in (pairs[j], pairs[j + 1]) for shift in (0, 16)]
        low.append(join_bytes([number & 0xFF for number in numbers]))
        sign_words.append(signs[j] | (signs[j + 1] << 16))
        bits = (numbers[0] >> 8) & 3
        for i in range(1, 4):
            bits = bits | (((numbers[i] >> 8) & 3) << (2 * i))
        high.append(bits)
    return [*low, *sign_words, join_bytes(high[:4]), join_bytes(high[4:])]
