"""IQ3_S: 8 blocks of 32 weights in groups of 4 on a grid of 512 points, signs apart, 4-bit scales; 110 bytes."""

from __future__ import annotations

from ggufmoe.quant.kernels.grid_search import (
    GridForm,
    Renewed,
    ScaleSearch,
    free_signs,
    largest_of,
    scale_levels,
)
from ggufmoe.quant.kernels.lanes import Rows
from ggufmoe.quant.kernels.packing import join_bytes, pack_scale_nibbles
from ggufmoe.quant.kernels.superblocks import WEIGHTS, spread_importance, sum_of_squares
from ggufmoe.quant.kernels.tiles import Tiles

FORM = GridForm("IQ3_S", n_shells=3, block=32, top=15, step=0.2, n_steps=9, renewed=Renewed.ALL_IF_ONE_IS_OFF_GRID)
_BLOCK = FORM.block
_N_BLOCKS = WEIGHTS // _BLOCK
_NINTH_BIT_WORD, _SIGN_WORD, _SCALE_WORD, _WORDS = 16, 18, 26, 27


def quantize(k: Tiles, x: Rows, importance: Rows | None) -> None:
    """Write the superblock of each lane."""
    search, words, scales = ScaleSearch(k, FORM), k.int_rows(_WORDS), k.float_rows(_N_BLOCKS)
    weights, magnitudes = k.float_rows(_BLOCK), k.float_rows(_BLOCK)
    ninth_bits, some = k.int_rows(_N_BLOCKS), k.int_rows(_N_BLOCKS)
    squares = sum_of_squares(k, x, WEIGHTS)
    k.mark_overflow(~(squares < float("inf")))
    with k.loop(_N_BLOCKS) as j:
        block = x.at(j * _BLOCK)
        if importance is None:
            for i in range(_BLOCK):
                weights[i] = block[i] * block[i]
        else:
            spread_importance(k, block, importance.at(j * _BLOCK), squares * (2.0 / WEIGHTS), weights, _BLOCK)
        words[j + _SIGN_WORD] = free_signs(k, block, magnitudes, _BLOCK)
        top = largest_of(k, magnitudes, _BLOCK)
        active = top.differs(0.0)
        fit = search.fit(magnitudes, weights, top, top / float(FORM.top), active)
        scales[j], some[j] = k.where(active, fit.scale, 0.0), k.where(active, k.i32(1), 0)
        numbers = fit.points
        for half in range(2):
            words[j * 2 + half] = join_bytes([number & 0xFF for number in numbers[4 * half : 4 * half + 4]])
        ninth = numbers[0] >> 8
        for g in range(1, FORM.n_groups):
            ninth = ninth | ((numbers[g] >> 8) << g)
        ninth_bits[j] = ninth
    _finish(k, words, scales, ninth_bits, some)


def _finish(k: Tiles, words: Rows, scales: Rows, ninth_bits: Rows, some: Rows) -> None:
    n_some = k.i32(0)
    for j in range(_N_BLOCKS):
        n_some = n_some + some[j]
    with k.when(k.any((n_some > 0) & (n_some < _N_BLOCKS))):
        _close_up(k, words, ninth_bits, some)
    d, any_scale, levels = scale_levels(k, scales, _N_BLOCKS)
    for half in range(2):
        words[_NINTH_BIT_WORD + half] = join_bytes(ninth_bits.at(4 * half).first(4))
    (words[_SCALE_WORD],) = pack_scale_nibbles(levels)
    k.store_half(0, k.where(any_scale, k.half_bits(d * 1.033), 0))
    k.store_words(2, [k.where(n_some > 0, word, 0) for word in words.first(_WORDS)])


def _close_up(k: Tiles, words: Rows, ninth_bits: Rows, some: Rows) -> None:
    """Move points and signs into the places of blocks of zeros before them, as ggml writes them; the last become 0."""
    places, n_before = [], k.i32(0)
    for j in range(_N_BLOCKS):
        places.append(k.where(some[j].differs(0), n_before, -1))
        ninth_bits[j] = k.where(some[j].differs(0), ninth_bits[j], 0)
        n_before = n_before + some[j]
    for place in range(_N_BLOCKS):
        for scale, offset in ((2, 0), (2, 1), (1, _SIGN_WORD)):
            moved = k.i32(0)
            for j in range(place, _N_BLOCKS):
                moved = k.where(places[j].equals(place), words[scale * j + offset], moved)
            words[scale * place + offset] = moved
