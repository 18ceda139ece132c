"""The search for the grid point of each group of weights, and for a block's scale, of the IQ2 and IQ3 formats.

Follows ``quantize_row_iq*_impl`` and ``iq*_find_best_neighbour`` in ``ggml/src/ggml-quants.c``. Levels, sums and scales
are computed with one block in each lane. The lists of neighbours differ from lane to lane, so the groups of the lanes
are searched one after another, with the neighbours of one group in the lanes of a vector.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from functools import cache, partial
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from ggufmoe.quant.kernels.grids import Grid, Neighbours, grid, neighbours, undominated
from ggufmoe.quant.kernels.lanes import F32, I32, I64, Index, Lanes, Rows, Value
from ggufmoe.quant.kernels.superblocks import largest

_OFF_GRID = -1 << 31
_SAFE_FRACTION = 0.49999  # of a level; what is nearer to the next one has its list of neighbours unabridged
_MORE_BITS = 5
_TOO_FAR = float(np.finfo(np.float32).max)
"""ggml finds no neighbour at this distance, and ends the process if there is none."""


class Renewed(Enum):
    """The groups of a block that are searched again with the best scale."""

    OFF_GRID = auto()
    ALL_IF_ONE_IS_OFF_GRID = auto()
    ALL = auto()


@dataclass(frozen=True)
class GridForm:
    """The grid of a format, and the inverse scales that are tried: (top + i * step) / largest weight, |i| <= n_steps.

    ``n_shells``: how many of the least distances count as neighbours; ``renewed``: which groups are searched again
    with the best scale.
    """

    name: str
    n_shells: int
    block: int
    top: int
    step: float
    n_steps: int
    renewed: Renewed

    @property
    def grid(self) -> Grid:
        """The grid points."""
        return grid(self.name)

    @property
    def n_groups(self) -> int:
        """Groups of weights in a block."""
        return self.block // self.grid.group

    @property
    def slots(self) -> int:
        """A power of two above all levels: the places of a weight in a table."""
        return 8 if self.grid.n_levels > 4 else 4

    def numerators(self) -> list[np.float32]:
        """``2*kMaxQ-1+is*step`` for each step, in C's float arithmetic."""
        f32 = np.float32
        return [f32(self.top) + f32(i) * f32(self.step) for i in range(-self.n_steps, self.n_steps + 1)]


@dataclass(frozen=True)
class ListTable:
    """The lists of neighbours as a kernel reads them.

    ``heads`` (of each code; its second half is for codes whose list must not be abridged): the word of a code on the
    grid; else the number of its first chunk, and how many more follow. ``words`` (n_chunks, chunk) are the neighbours.
    A word has four bits for each weight, the first lowest: its level, and above it, off the grid only, which of the
    weights that share a table it is: tables have a place for each lane, and ``slots`` of them for a weight.
    """

    heads: NDArray[np.int64]
    words: NDArray[np.int64]


@cache
def _table(form: GridForm, chunk: int) -> ListTable:
    whole, abridged = neighbours(form.name, form.n_shells), undominated(form.name, form.n_shells)
    same = np.diff(abridged.starts) == np.diff(whole.starts)
    usual = chunked(form, abridged, chunk)
    others = chunked(form, whole.selected(~same[whole.codes]), chunk)
    other_heads = np.where(same, usual.heads, others.heads + (len(usual.words) << _MORE_BITS))
    return ListTable(np.concatenate([usual.heads, other_heads]), np.concatenate([usual.words, others.words]))


def chunked(form: GridForm, lists: Neighbours, chunk: int) -> ListTable:
    grid = form.grid
    order = np.arange(grid.group)
    levels = (grid.levels << (4 * order)).sum(axis=1)
    places = ((order * form.slots % chunk) << (4 * order)).sum()
    counts = -(-np.diff(lists.starts) // chunk)
    counts[grid.codes] = 0
    firsts = np.concatenate([[0], np.cumsum(counts)])
    kept = lists.selected(counts[lists.codes] > 0)
    # places that are left over repeat the list's first entry: it is never better than itself
    first_points = kept.points[kept.starts[:-1][counts > 0]]
    points = np.repeat(np.repeat(first_points, counts[counts > 0]), chunk).reshape(-1, chunk)
    points[firsts[kept.codes] + kept.positions // chunk, kept.positions % chunk] = kept.points
    heads = (firsts[:-1] << _MORE_BITS) | np.maximum(counts - 1, 0) | _OFF_GRID
    heads[grid.codes] = levels
    return ListTable(heads, levels[points] | places | _OFF_GRID)


class GroupSearch:
    """Finds the nearest grid points for the groups of one block per lane, for several scales.

    The lists of neighbours are tables in the code: with 16 lanes 0.4 MB for IQ3_S and IQ3_XXS, 0.5 MB for IQ2_S, 1.4 MB
    for IQ2_XS and 1.0 MB for IQ2_XXS, most of it for rare codes. If the machine has table look-ups in registers, the
    terms of the distance are computed once for each level of a weight, and not for each neighbour.
    """

    def __init__(self, k: Lanes, form: GridForm, n_scales: int) -> None:
        self.k, self.form, points = k, form, form.grid
        self.n_codes, self.group = points.n_codes, points.group
        self.highest, self.places = float(points.n_levels - 1), points.place_values
        self.codes, self.found = (k.int_rows(n_scales * form.n_groups) for _ in range(2))
        self.scales, self.failed = k.float_rows(n_scales), k.int_rows(1)
        self.per_table = k.width // form.slots if k.looks_up else 1
        table = self._table()
        self.heads, self.chunks = k.words_table(table.heads), k.words_table(table.words)

    def _table(self) -> ListTable:
        """The lists of neighbours that are searched."""
        return _table(self.form, self.k.width)

    def _values(self) -> Value:
        """The values of the levels in the order of a table's places."""
        values = [2.0 * (place % self.form.slots) + 1 for place in range(self.k.width)]
        return Value(self.k, ir.Constant(self.k.floats, values))

    def _value(self, words: Value, i: int) -> Value:
        """The value of the level of weight ``i``."""
        return point_value(self.k, self.form, words, i)

    def encode(self, x: Rows, at: Index, inverse: Value, scale: Value, *, far: bool) -> None:
        """Round a block's weights with scale number ``at``; ``far``: whether they may exceed the range of rounding."""
        k, half = self.k, inverse * 0.5
        self.scales[at] = scale
        codes = self.codes.at(at * self.form.n_groups)
        for group in range(self.form.n_groups):
            code, worst = k.f32(0.0), k.f32(0.0)
            for i, place in enumerate(self.places):
                # 0.5f*(id*x-1): halving is exact, before the subtraction as well as after it
                position = half * x[group * self.group + i] - 0.5
                if k.unbounded:  # unless a product overflows
                    position = (inverse * x[group * self.group + i] - 1.0) * 0.5
                rounded = k.round_even(position)
                worst = k.larger(k.magnitude(rounded - position), worst)
                if far or k.unbounded:
                    worst = k.where(k.magnitude(position) < 1e6, worst, 1.0)
                    rounded = k.nearest_int(position).to_float()
                code = code + k.clamp(rounded, 0.0, self.highest) * float(place)
            whole = ~k.false() if k.unbounded else ~(worst < _SAFE_FRACTION)
            codes[group] = code.to_int() + k.where(whole, k.i32(self.n_codes), 0)

    def search(self, x: Rows, weights: Rows, n_scales: int) -> None:
        """Find the word of the nearest grid point for each encoded group.

        In unbounded kernels ``failed`` is 1 in lanes with a group for which all distances overflow.
        """
        k, b, n_groups = self.k, self.k.b, self.form.n_groups
        if k.unbounded:
            self.failed[0] = k.i32(0)
        with k.loop(k.width) as lane, k.loop(n_groups) as group:
            self._begin(group, lane)
            numbers = [group * self.group + i for i in range(0, self.group, self.per_table)]
            terms = [_Term(*(self._spread(rows, i, lane, self.per_table) for rows in (x, weights))) for i in numbers]
            with k.loop(n_scales) as at:
                row = at * n_groups + group
                code = b.zext(b.load(self.codes.element(row, lane), typ=I32), I64)
                head = b.load(b.gep(self.heads, [code], inbounds=True, source_etype=I32), typ=I32)
                output = self.found.element(row, lane)
                b.store(head, output)
                with k.when(b.icmp_signed("<", head, ir.Constant(I32, 0))):
                    self._search_list(terms, at, lane, head, output)

    def _begin(self, group: Index, lane: Index) -> None:
        """Hook for subclasses, called before the search of a group."""

    def _spread(self, rows: Rows, i: Index, lane: Index, count: int) -> Value:
        """A vector with the numbers of ``count`` rows in one lane, each repeated in an equal share of the places."""
        b, n = self.k.b, self.k.width
        few = ir.Constant(ir.VectorType(F32, count), ir.Undefined)
        for j in range(count):
            few = b.insert_element(few, b.load(rows.element(i + j, lane), typ=F32), ir.Constant(I32, j))
        order = ir.Constant(self.k.ints, [place * count // n for place in range(n)])
        return Value(self.k, b.shuffle_vector(few, few, order))

    def _search_list(self, terms: list[_Term], at: Index, lane: Index, head: Any, output: Any) -> None:
        k, b, scale = self.k, self.k.b, self._spread(self.scales, at, lane, 1)
        if k.looks_up:
            scaled = scale * self._values()
            errors = partial(self._looked_up, [term.share(scaled) for term in terms])
        else:
            errors = partial(self._computed, terms, scale)
        number = b.lshr(b.and_(head, ir.Constant(I32, ~_OFF_GRID)), ir.Constant(I32, _MORE_BITS))
        first = b.gep(self.chunks, [b.zext(number, I64)], inbounds=True, source_etype=k.ints)
        least, word = self._nearest(errors, first)
        best = k.variable(least)
        b.store(word, output)
        n_more = b.and_(head, ir.Constant(I32, (1 << _MORE_BITS) - 1))
        some_more = b.icmp_unsigned("!=", n_more, ir.Constant(I32, 0))
        with k.when(some_more), k.repeat(b.zext(n_more, I64), 1) as turn:
            following = b.add(turn, ir.Constant(I64, 1))
            chunk = b.gep(first, [following], inbounds=True, source_etype=k.ints)
            least, word = self._nearest(errors, chunk)
            better = least < best.get()
            best.set(k.where(better, least, best.get()))
            is_better = b.extract_element(better.ir, ir.Constant(I32, 0))
            b.store(b.select(is_better, word, b.load(output, typ=I32)), output)
        if k.unbounded:
            is_near = b.extract_element((best.get() < _TOO_FAR).ir, ir.Constant(I32, 0))
            failed = self.failed.element(0, lane)
            b.store(b.select(is_near, b.load(failed, typ=I32), ir.Constant(I32, 1)), failed)

    def _looked_up(self, tables: list[Value], words: Value) -> Value:
        """The distances of neighbours: sums of ``weight*diff*diff`` in order, with the terms from tables."""
        total = self.k.chosen(tables[0], words)
        for i in range(1, self.group):
            total = total + self.k.chosen(tables[i // self.per_table], words >> (4 * i))
        return total

    def _computed(self, terms: list[_Term], scale: Value, words: Value) -> Value:
        total = self.k.f32(0.0)
        for i, term in enumerate(terms):
            total = total + term.share(scale * self._value(words, i))
        return total

    def _nearest(self, errors: Callable[[Value], Value], chunk: Any) -> tuple[Value, Any]:
        """The least distance of a chunk's neighbours, in all lanes, and the word of the first neighbour with it."""
        k, b, n = self.k, self.k.b, self.k.width
        found = errors(Value(k, b.load(chunk, typ=k.ints, align=4 * n)))
        if k.unbounded:
            found = k.smaller(found, _TOO_FAR)
        least, distance = found, n // 2
        while distance:
            order = ir.Constant(k.ints, [place ^ distance for place in range(n)])
            least = k.smaller(least, Value(k, b.shuffle_vector(least.ir, least.ir, order)))
            distance //= 2
        mask = b.zext(b.bitcast(found.equals(least).ir, ir.IntType(n)), I32)
        # where all are NaN, in lanes whose result is not used, the last is taken
        mask = b.or_(mask, ir.Constant(I32, 1 << (n - 1)))
        place = b.zext(b.cttz(mask, ir.Constant(ir.IntType(1), 1)), I64)
        return least, b.load(b.gep(chunk, [place], inbounds=True, source_etype=I32), typ=I32)


@dataclass(frozen=True)
class _Term:
    """The magnitude of one or several weights, and the square root of their importance."""

    x: Value
    weight: Value

    def share(self, scaled: Value) -> Value:
        """``weight*diff*diff``."""
        difference = scaled - self.x
        return self.weight * difference * difference


def point_value(k: Lanes, form: GridForm, words: Value, i: int) -> Value:
    """The value 2 * level + 1 of weight ``i`` of a group's grid point."""
    levels, mask = words >> (4 * i), form.slots - 1
    if k.permutes:
        return k.permute([2.0 * (place & mask) + 1 for place in range(32)], levels)
    return (((levels & mask) << 1) | 1).to_float()


@dataclass(frozen=True)
class GridFit:
    """The scale of a block, and the number of the grid point of each group."""

    scale: Value
    points: list[Value]


class ScaleSearch:
    """Finds the best scale of a block and its grid points."""

    def __init__(self, k: Lanes, form: GridForm) -> None:
        self.k, self.form = k, form
        numerators = form.numerators()
        self.numerators, self.n_scales = k.constants(numerators), len(numerators)
        self.groups = GroupSearch(k, form, self.n_scales)
        self.roots, self.products = k.float_rows(form.block), k.float_rows(form.block)
        self.words = k.int_rows(form.n_groups)
        numbers = np.zeros(form.grid.n_codes, np.int64)
        numbers[form.grid.codes] = np.arange(len(form.grid.codes))
        self.numbers = k.words_table(numbers)

    def fit(self, x: Rows, weights: Rows, base: Value, first: Value, active: Value) -> GridFit:
        """Find the best scale for the magnitudes ``x`` of weights, in the lanes that are ``active``.

        The scales that are tried are ``base`` divided by a numerator of the form; ``first`` is the result if none of
        them is usable. Marks lanes in which ggml's arithmetic exceeds the range of floats or of its rounding.
        """
        k, form, groups = self.k, self.form, self.groups
        extent = self._prepare(x, weights, base, active)
        with k.loop(self.n_scales) as at:
            inverse = self.numerators[at] / base
            groups.encode(x, at, inverse, 1.0 / inverse, far=False)
        groups.search(x, self.roots, self.n_scales)
        if k.unbounded:
            k.mark_overflow(active & groups.failed[0].differs(0))
        scale = self._best(weights, first)
        again = scale > 0.0
        if form.renewed is not Renewed.ALL:
            again = again & self._some_off_grid()
        k.mark_odd(active & again & ~(scale < extent * 4.0))
        groups.encode(x, k.index(0), 1.0 / scale, scale, far=True)
        groups.search(x, self.roots, 1)
        if k.unbounded:
            k.mark_overflow(active & again & groups.failed[0].differs(0))
        for j in range(form.n_groups):
            renewed = again & (self.words[j] < 0) if form.renewed is Renewed.OFF_GRID else again
            self.words[j] = k.where(renewed, groups.found[j], self.words[j])
        sum_qx, sum_q2 = self._sums(weights, self.words)
        scale = k.where(again & (sum_q2 > 0.0), sum_qx / sum_q2, scale)
        k.mark_overflow(active & scale.differs(scale))
        return GridFit(scale, [self._point_number(self.words[j]) for j in range(form.n_groups)])

    def _prepare(self, x: Rows, weights: Rows, base: Value, active: Value) -> Value:
        k = self.k
        total, extent = k.f32(0.0), base
        for i in range(self.form.block):
            self.roots[i] = k.square_root(weights[i])
            self.products[i] = weights[i] * x[i]
            total, extent = total + self.roots[i], k.larger(k.magnitude(x[i]), extent)
        k.mark_odd(active & ~((total * extent * extent < 1e34) & (base > 1e-30) & (extent < base * 1e5)))
        return extent

    def _some_off_grid(self) -> Value:
        word = self.words[0]
        for j in range(1, self.form.n_groups):
            word = word | self.words[j]
        return word < 0

    def _best(self, weights: Rows, first: Value) -> Value:
        k, found, n_groups = self.k, self.groups.found, self.form.n_groups
        for j in range(n_groups):
            # if no scale is usable all levels stay 0, which is point 0 of each grid; IQ3_S searches them again
            self.words[j] = k.i32(_OFF_GRID if self.form.renewed is Renewed.ALL_IF_ONE_IS_OFF_GRID else 0)
        scale, best = k.variable(first), k.variable(k.f32(0.0))
        with k.loop(self.n_scales) as at:
            words = found.at(at * n_groups)
            sum_qx, sum_q2 = self._sums(weights, words)
            better = (sum_q2 > 0.0) & (sum_qx * sum_qx > best.get() * sum_q2)
            tried = sum_qx / sum_q2
            scale.set(k.where(better, tried, scale.get()))
            best.set(k.where(better, tried * sum_qx, best.get()))
            for j in range(n_groups):
                self.words[j] = k.where(better, words[j], self.words[j])
        return scale.get()

    def _sums(self, weights: Rows, words: Rows) -> tuple[Value, Value]:
        sum_qx = sum_q2 = self.k.f32(0.0)
        group = self.form.grid.group
        for j in range(self.form.n_groups):
            word = words[j]
            for i in range(group):
                value = point_value(self.k, self.form, word, i)
                number = j * group + i
                sum_qx = sum_qx + self.products[number] * value
                sum_q2 = sum_q2 + weights[number] * value * value
        return sum_qx, sum_q2

    def _point_number(self, word: Value) -> Value:
        code = word & (self.form.slots - 1)
        for i, place in enumerate(self.groups.places[1:], 1):
            level = (word >> (4 * i)) & (self.form.slots - 1)
            code = code + level * place
        return self.k.gathered(self.numbers, code)


def free_signs(k: Lanes, x: Rows, magnitudes: Rows, n: int) -> Value:
    """Write the magnitudes of ``n`` <= 32 weights; returns a word with a bit for each negative weight."""
    word = k.i32(0)
    for i in range(n):
        negative = x[i] < 0.0
        magnitudes[i] = k.where(negative, -x[i], x[i])
        word = word | k.where(negative, k.i32(_bit(i)), 0)
    return word


def even_signs(k: Lanes, x: Rows, weights: Rows, magnitudes: Rows, n: int) -> list[Value]:
    """Write the magnitudes of ``n`` weights with an even number of signs in each 8; returns 7 sign bits for each 8.

    If the number of signs is odd, the least important weight changes its sign, so that its magnitude is negative.
    """
    found = []
    for first in range(0, n, 8):
        word, odd = k.i32(0), k.i32(0)
        least, place = weights[first] * x[first] * x[first], k.i32(0)
        for i in range(8):
            value = x[first + i]
            negative = k.where(value < 0.0, k.i32(1), 0)
            word, odd = word | (negative << i), odd + negative
            cost = weights[first + i] * value * value
            place = k.where(cost < least, k.i32(i), place)
            least = k.smaller(cost, least)
        for i in range(8):
            value = x[first + i]
            flipped = (odd & 1).equals(1) & place.equals(i)
            magnitude = k.magnitude(value)
            magnitudes[first + i] = k.where(flipped, -magnitude, magnitude)
            word = k.where(flipped & (value < 0.0), word & ~(1 << i), k.where(flipped, word | (1 << i), word))
        found.append(word & 0x7F)
    return found


def largest_of(k: Lanes, rows: Rows, n: int) -> Value:
    """The largest of ``n`` rows, which may be negative."""
    top = rows[0]
    for i in range(1, n):
        top = k.larger(rows[i], top)
    return top


def scale_levels(k: Lanes, scales: Rows, n: int) -> tuple[Value, Value, list[Value]]:
    """A 31st of the largest scale, whether that is not 0, and the 4-bit level of each scale."""
    step = largest(k, scales, n) / 31.0
    some, inverse = step.differs(0.0), 1.0 / step
    levels = [k.where(some, k.clamp(k.nearest_int((inverse * scales[i] - 1.0) * 0.5), 0, 15), 0) for i in range(n)]
    return step, some, levels


def _bit(i: int) -> int:
    return 1 << i if i < 31 else -1 << 31
