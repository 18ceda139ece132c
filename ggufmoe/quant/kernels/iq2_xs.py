"""IQ2_XS: 16 blocks of 16 weights in groups of 8 on a grid of 512 points, 7 signs each, 4-bit scales; 74 bytes."""

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
from ggufmoe.quant.kernels.packing import pack_scale_nibbles
from ggufmoe.quant.kernels.searches import ZERO_GROUP
from ggufmoe.quant.kernels.superblocks import WEIGHTS, spread_importance, sum_of_squares
from ggufmoe.quant.kernels.tiles import Tiles

FORM = GridForm("IQ2_XS", n_shells=2, block=16, top=5, step=0.1, n_steps=9, renewed=Renewed.OFF_GRID)
_BLOCK = FORM.block
_N_BLOCKS = WEIGHTS // _BLOCK


def quantize(k: Tiles, x: Rows, importance: Rows | None) -> None:
    """Write the superblock of each lane. Raises ValueError without importances, as ggml aborts."""
    if importance is None:
        raise ValueError("IQ2_XS needs importances")
    search, words, scales = ScaleSearch(k, FORM), k.int_rows(_N_BLOCKS), k.float_rows(_N_BLOCKS)
    weights, magnitudes = k.float_rows(_BLOCK), k.float_rows(_BLOCK)
    squares = sum_of_squares(k, x, WEIGHTS)
    k.mark_overflow(~(squares < float("inf")))
    with k.loop(_N_BLOCKS) as j:
        block = x.at(j * _BLOCK)
        spread_importance(k, block, importance.at(j * _BLOCK), squares * (1.0 / WEIGHTS), weights, _BLOCK)
        signs = even_signs(k, block, weights, magnitudes, _BLOCK)
        top = largest_of(k, magnitudes, _BLOCK)
        active = ~(top < ZERO_GROUP)
        fit = search.fit(magnitudes, weights, top, top / float(FORM.top), active)
        scales[j] = k.where(active, k.magnitude(fit.scale), 0.0)
        inverted = k.where(fit.scale < 0.0, k.i32(0x7F), 0)
        first, second = (fit.points[g] | ((signs[g] ^ inverted) << 9) for g in range(2))
        words[j] = k.where(active, first | (second << 16), 0)
    d, some, levels = scale_levels(k, scales, _N_BLOCKS)
    k.store_half(0, k.where(some, k.half_bits(d), 0))
    k.store_words(2, [*(k.where(some, word, 0) for word in words.first(_N_BLOCKS)), *pack_scale_nibbles(levels)])
