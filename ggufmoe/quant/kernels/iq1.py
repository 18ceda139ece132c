"""Shared by IQ1_S and IQ1_M: the best split of a block's sorted weights into three levels, and the search of the grid.

Follows ``quantize_row_iq1_s_impl`` and ``quantize_row_iq1_m_impl`` in ``ggml/src/ggml-quants.c``. The value of a level
is -1, 0 or 1, moved up or down by an eighth; the direction is chosen for each block (IQ1_S) or half block (IQ1_M).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from llvmlite import ir

from ggufmoe.quant.kernels.grid_search import GridForm, GroupSearch, ListTable, Renewed, chunked
from ggufmoe.quant.kernels.grids import neighbours
from ggufmoe.quant.kernels.lanes import F32, I32, I64, Index, Lanes, Rows, Value

GROUP = 8
DELTA = 0.125
_UNSAFE = 1e34
"""Weight times the square of a value, above which distances might overflow; ggml ends the process there."""


def form(block: int) -> GridForm:
    """The form of the grid for blocks of ``block`` weights; no scales are tried."""
    return GridForm("IQ1", n_shells=3, block=block, top=0, step=0.0, n_steps=0, renewed=Renewed.OFF_GRID)


@dataclass(frozen=True)
class Ordered:
    """The weights of one block in ascending order (stable): values, importances, and indices in the block.

    ``x`` and ``places`` have one row more than the block: infinity, and the number of weights.
    """

    x: Rows
    weights: Rows
    places: Rows

    @classmethod
    def scratch(cls, k: Lanes, n: int) -> Ordered:
        """Scratch rows for a block of ``n`` weights."""
        return cls(k.float_rows(n + 1), k.float_rows(n), k.int_rows(n + 1))


def sort(k: Lanes, x: Rows, weights: Rows, n: int, ordered: Ordered) -> None:
    """Sort a block by Batcher's odd-even merging (1968), the same comparisons in every lane."""
    columns = [[x[i], weights[i], k.i32(i)] for i in range(n)]
    for low, high in _comparisons(n):
        first, second = columns[low], columns[high]
        swapped = (first[0] > second[0]) | (first[0].equals(second[0]) & (first[2] > second[2]))
        pairs = list(zip(first, second, strict=True))
        columns[low] = [k.where(swapped, b, a) for a, b in pairs]
        columns[high] = [k.where(swapped, a, b) for a, b in pairs]
    for i, (value, weight, place) in enumerate(columns):
        ordered.x[i], ordered.weights[i], ordered.places[i] = value, weight, place
    ordered.x[n], ordered.places[n] = k.f32(float("inf")), k.i32(n)


def _comparisons(n: int) -> Iterator[tuple[int, int]]:
    """The pairs (low, high) that a sorting network compares in this order to sort ``n`` = 2^m items."""
    part = 1
    while part < n:
        step = part
        while step:
            for first in range(step % part, n - step, 2 * step):
                for i in range(min(step, n - first - step)):
                    if (first + i) // (2 * part) == (first + i + step) // (2 * part):
                        yield first + i, first + i + step
            step //= 2
        part *= 2


class Best:
    """The best split so far: its scale, its score, and a code of its position."""

    def __init__(self, k: Lanes, scale: Value) -> None:
        self.k = k
        self.scale, self.where = k.variable(scale), k.variable(k.i32(-1))
        self.score = k.variable(k.f32(-float(np.finfo(np.float32).max)))

    def consider(self, candidates: Sequence[tuple[Value, Value, Value]]) -> None:
        """Replace the best split by each better candidate (sum of products with x, sum of squares, code) in turn.

        Divides only if a candidate is better than the current best, which is rare.
        """
        k, some = self.k, self.k.false()
        for sum_qx, sum_q2, _ in candidates:
            some = some | self._is_better(sum_qx, sum_q2)
        with k.when(k.any(some)):
            for sum_qx, sum_q2, code in candidates:
                better, scale = self._is_better(sum_qx, sum_q2), sum_qx / sum_q2
                for variable, value in ((self.scale, scale), (self.score, scale * sum_qx), (self.where, code)):
                    variable.set(k.where(better, value, variable.get()))

    def _is_better(self, sum_qx: Value, sum_q2: Value) -> Value:
        return (sum_q2 > 0.0) & (sum_qx * sum_qx > self.score.get() * sum_q2)


@contextmanager
def splits(k: Lanes, n: int) -> Iterator[tuple[Index, Index, Value]]:
    """A machine loop over all 0 <= first <= second <= n, in this order; gives both, and a code of 12 bits of them."""
    with k.repeat(ir.Constant(I64, n + 1), 1) as outer:
        first = Index(k, outer)
        with k.repeat(k.b.sub(ir.Constant(I64, n + 1), outer), 1) as inner:
            second = first + Index(k, inner)
            code = k.b.trunc((first + second * 64).ir, I32)
            yield first, second, k.splat(code)


def levels_of(k: Lanes, x: Rows, n: int, ordered: Ordered, code: Value, mirrored: Value) -> list[Value]:
    """The level 0 to 2 of each weight for the split ``code``; in reverse in ``mirrored`` lanes."""
    borders, places, codes = k.float_rows(2), k.int_rows(2), k.int_rows(1)
    codes[0] = code
    with k.loop(k.width) as lane:
        packed = k.b.zext(k.b.load(codes.element(0, lane), typ=I32), I64)
        for i in range(2):
            number = k.b.and_(k.b.lshr(packed, ir.Constant(I64, 6 * i)), ir.Constant(I64, 63))
            for source, target, kind in ((ordered.x, borders, F32), (ordered.places, places, I32)):
                found = k.b.load(source.element(Index(k, number), lane), typ=kind)
                k.b.store(found, target.element(i, lane))
    levels = []
    for i in range(n):
        first, second = ((x[i] < borders[j]) | (x[i].equals(borders[j]) & (places[j] > i)) for j in range(2))
        level = k.where(first, k.i32(0), k.where(second, k.i32(1), 2))
        levels.append(k.where(mirrored, k.i32(2) - level, level))
    return levels


class PointSearch(GroupSearch):
    """Finds grid points for groups whose level values are moved by an offset per group, from complete neighbour lists.

    The lists take 0.8 MB.
    """

    def __init__(self, k: Lanes, block: int) -> None:
        super().__init__(k, form(block), 1)
        self.moved, self._moved = k.float_rows(self.form.n_groups), k.f32(0.0)
        numbers = np.zeros(self.n_codes, np.int64)
        numbers[self.form.grid.codes] = np.arange(len(self.form.grid.codes))
        self.numbers = k.words_table(numbers)

    def find(self, x: Rows, weights: Rows, levels: Sequence[Value], scale: Value) -> list[Value]:
        """Find the words of the grid points for a block's levels; the caller has written ``moved``."""
        self.scales[0] = scale
        for group in range(self.form.n_groups):
            code = self.k.i32(0)
            for i, place in enumerate(self.places):
                code = code + levels[group * GROUP + i] * place
            self.codes[group] = code
        self.search(x, weights, 1)
        return self.found.first(self.form.n_groups)

    def number(self, word: Value) -> Value:
        """The number of the grid point of a word."""
        code = word & 3
        for i, place in enumerate(self.places[1:], 1):
            code = code + ((word >> (4 * i)) & 3) * place
        return self.k.gathered(self.numbers, code)

    def _table(self) -> ListTable:
        return chunked(self.form, neighbours(self.form.name, self.form.n_shells), self.k.width)

    def _begin(self, group: Index, lane: Index) -> None:
        self._moved = self._spread(self.moved, group, lane, 1)

    def _values(self) -> Value:
        values = [place % 4 - 1.0 for place in range(self.k.width)]
        return Value(self.k, ir.Constant(self.k.floats, values)) + self._moved

    def _value(self, words: Value, i: int) -> Value:
        return level_value(words, i, self._moved)


def level_value(word: Value, i: int, moved: Value) -> Value:
    """The value of level ``i`` of a grid point."""
    return ((word >> (4 * i)) & 3).to_float() - 1.0 + moved


def mark_unsafe(k: Lanes, x: Rows, weights: Rows, n: int, active: Value) -> None:
    """Mark lanes odd in which distances from the grid might overflow; unbounded kernels mark those in which they do."""
    total, extent = k.f32(0.0), k.f32(0.0)
    for i in range(n):
        total, extent = total + weights[i], k.larger(k.magnitude(x[i]), extent)
    k.mark_odd(active & ~(total * extent * extent < _UNSAFE))


def scale_level(k: Lanes, inverse: Value, scale: Value) -> Value:
    """The 3-bit level of a block's scale."""
    return k.clamp(k.nearest_int((inverse * scale - 1.0) * 0.5), 0, 7)


def renewed_scale(k: Lanes, x: Rows, weights: Rows, words: list[Value], moved: Rows, scale: Value) -> Value:
    """The best scale for the grid points that were found, if one of them replaces levels off the grid."""
    sum_qx = sum_q2 = k.f32(0.0)
    off_grid = words[0]
    for word in words[1:]:
        off_grid = off_grid | word
    for group, word in enumerate(words):
        for i in range(GROUP):
            value, weight = level_value(word, i, moved[group]), weights[group * GROUP + i]
            sum_qx = sum_qx + weight * value * x[group * GROUP + i]
            sum_q2 = sum_q2 + weight * value * value
    return k.where((off_grid < 0) & (sum_qx > 0.0) & (sum_q2 > 0.0), sum_qx / sum_q2, scale)
