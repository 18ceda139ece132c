"""IQ3_XXS: 8 blocks of 32 weights in groups of 4 on a grid of 256 points, 7 signs per 8, 4-bit scales; 98 bytes."""

from __future__ import annotations

from ggufmoe.quant.kernels.grid_search import (
    GridForm,
    Renewed,
    ScaleSearch,
    even_signs,
    largest_of,
    scale_levels,
)
from ggufmoe.quant.kernels.lanes import Rows
from ggufmoe.quant.kernels.packing import join_bytes
from ggufmoe.quant.kernels.superblocks import WEIGHTS, spread_importance, sum_of_squares
from ggufmoe.quant.kernels.tiles import Tiles

FORM = GridForm("IQ3_XXS", n_shells=2, block=32, top=15, step=0.2, n_steps=15, renewed=Renewed.OFF_GRID)
_BLOCK = FORM.block
_N_BLOCKS = WEIGHTS // _BLOCK
_ZERO_BLOCK = 1e-8  # GROUP_MAX_EPS_IQ3_XXS
_SIGN_WORD, _WORDS = 16, 24


def quantize(k: Tiles, x: Rows, importance: Rows | None) -> None:
    """Write the superblock of each lane."""
    search, words, scales = ScaleSearch(k, FORM), k.int_rows(_WORDS), k.float_rows(_N_BLOCKS)
    weights, magnitudes = k.float_rows(_BLOCK), k.float_rows(_BLOCK)
    squares = sum_of_squares(k, x, WEIGHTS)
    k.mark_overflow(~(squares < float("inf")))
    with k.loop(_N_BLOCKS) as j:
        block = x.at(j * _BLOCK)
        if importance is None:
            for i in range(_BLOCK):
                weights[i] = block[i] * block[i]
        else:
            spread_importance(k, block, importance.at(j * _BLOCK), squares * (2.0 / WEIGHTS), weights, _BLOCK)
        signs = even_signs(k, block, weights, magnitudes, _BLOCK)
        top = largest_of(k, magnitudes, _BLOCK)
        active = ~(top < _ZERO_BLOCK)
        fit = search.fit(magnitudes, weights, top, top / float(FORM.top), active)
        scales[j] = k.where(active, k.magnitude(fit.scale), 0.0)
        inverted = k.where(fit.scale < 0.0, k.i32(0x7F), 0)
        word = k.i32(0)
        for i, seven in enumerate(signs):
            word = word | ((seven ^ inverted) << (7 * i))
        words[j + _SIGN_WORD] = k.where(active, word, 0)
        numbers = [k.where(active, fit.points[g], 0) for g in range(FORM.n_groups)]
        for half in range(2):
            words[j * 2 + half] = join_bytes(numbers[4 * half : 4 * half + 4])
    d, some, levels = scale_levels(k, scales, _N_BLOCKS)
    for i, level in enumerate(levels):
        words[_SIGN_WORD + i] = words[_SIGN_WORD + i] | (level << 28)
    k.store_half(0, k.where(some, k.half_bits(d * 1.0125), 0))
    k.store_words(2, [k.where(some, word, 0) for word in words.first(_WORDS)])
