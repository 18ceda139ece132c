"""IQ2_XXS: 8 blocks of 32 weights in groups of 8 on a grid of 256 points, 7 signs each, 4-bit scales; 66 bytes."""

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
from ggufmoe.quant.kernels.searches import ZERO_GROUP, positive_fits
from ggufmoe.quant.kernels.superblocks import WEIGHTS, spread_importance, sum_of_squares
from ggufmoe.quant.kernels.tiles import Tiles

FORM = GridForm("IQ2_XXS", n_shells=2, block=32, top=5, step=0.1, n_steps=6, renewed=Renewed.ALL)
_BLOCK = FORM.block
_N_BLOCKS = WEIGHTS // _BLOCK
_N_MAX = 3  # kMaxQ


def quantize(k: Tiles, x: Rows, importance: Rows | None) -> None:
    """Write the superblock of each lane. Raises ValueError without importances, as ggml aborts."""
    if importance is None:
        raise ValueError("IQ2_XXS needs importances")
    search, words, scales = ScaleSearch(k, FORM), k.int_rows(2 * _N_BLOCKS), k.float_rows(_N_BLOCKS)
    weights, magnitudes = k.float_rows(_BLOCK), k.float_rows(_BLOCK)
    squares = sum_of_squares(k, x, WEIGHTS)
    k.mark_overflow(~(squares < float("inf")))
    with k.loop(_N_BLOCKS) as j:
        block = x.at(j * _BLOCK)
        spread_importance(k, block, importance.at(j * _BLOCK), squares * (1.0 / WEIGHTS), weights, _BLOCK)
        signs = even_signs(k, block, weights, magnitudes, _BLOCK)
        top = largest_of(k, magnitudes, _BLOCK)
        ((first, _),) = positive_fits(k, (magnitudes,), weights, _BLOCK, _N_MAX + 1)
        base = first * float(_N_MAX)
        active = ~(top < ZERO_GROUP) & ~((base < 0.0) | base.equals(0.0))
        fit = search.fit(magnitudes, weights, base, first, active)
        scales[j] = k.where(active, k.magnitude(fit.scale), 0.0)
        inverted = k.where(fit.scale < 0.0, k.i32(0x7F), 0)
        word = k.i32(0)
        for i, seven in enumerate(signs):
            word = word | ((seven ^ inverted) << (7 * i))
        numbers = fit.points
        words[j * 2], words[j * 2 + 1] = k.where(active, join_bytes(numbers), 0), k.where(active, word, 0)
    d, some, levels = scale_levels(k, scales, _N_BLOCKS)
    for i, level in enumerate(levels):
        words[2 * i + 1] = words[2 * i + 1] | (level << 28)
    k.store_half(0, k.where(some, k.half_bits(d), 0))
    k.store_words(2, [k.where(some, word, 0) for word in words.first(2 * _N_BLOCKS)])
