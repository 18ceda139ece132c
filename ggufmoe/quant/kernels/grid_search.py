"""The search for the grid point of each group of weights, and for a block's scale, of the IQ2 and IQ3 formats.

Follows ``quantize_row_iq*_impl`` and ``iq*_find_best_neighbour`` in ``ggml/src/ggml-quants.c``. Levels, sums and scales
are computed in lanes, a block in each. The lists of neighbours differ from lane to lane; so a lane's groups are taken
one after another there, and what fills the vector is the neighbours of one group (or of the same group in two lanes).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from ggufmoe.quant.kernels.grids import Grid, Neighbours, grid, neighbours, undominated
from ggufmoe.quant.kernels.lanes import F32, I8, I32, I64, Index, Lanes, Rows, Value
from ggufmoe.quant.kernels.superblocks import largest

OFF_GRID = -1 << 31
_POINT_SHIFT = 16
_SAFE_FRACTION = 0.49999  # of a level; what is nearer to the next one has its list of neighbours unabridged
_MORE_BITS = 5
_PAIR_CHUNK = 8


class Renewed(Enum):
    """Which groups of a block are searched again with the best scale."""

    OFF_GRID = auto()
    ALL_IF_ONE_IS_OFF_GRID = auto()
    ALL = auto()


@dataclass(frozen=True)
class GridForm:
    """A format's grid, and the scales that are tried: (top + i * step) / the largest weight, |i| <= n_steps.

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
    def level_bits(self) -> int:
        """Bits of one weight's level in a word."""
        return _POINT_SHIFT // self.grid.group

    def numerators(self) -> list[np.float32]:
        """``2*kMaxQ-1+is*step`` for each step, in C's float arithmetic."""
        f32 = np.float32
        return [f32(self.top) + f32(i) * f32(self.step) for i in range(-self.n_steps, self.n_steps + 1)]


@dataclass(frozen=True)
class _Table:
    """The lists of neighbours as a kernel reads them, in chunks whose number is a code's head.

    ``heads`` has the number of a code's first chunk, and in the low bits how many more follow; its second half is for
    codes whose list must not be abridged. ``words`` (n_chunks, chunk): a point's levels, its number, and whether the
    code of the list is off the grid. ``points`` are the numbers alone.
    """

    heads: NDArray[np.int64]
    words: NDArray[np.int64]
    points: NDArray[np.int64]


@cache
def _table(form: GridForm, chunk: int) -> _Table:
    whole, abridged = neighbours(form.name, form.n_shells), undominated(form.name, form.n_shells)
    same = np.diff(abridged.starts) == np.diff(whole.starts)
    usual = _chunked(form, abridged, chunk)
    others = _chunked(form, whole.selected(~same[whole.codes]), chunk)
    other_heads = np.where(same, usual.heads, others.heads + (len(usual.words) << _MORE_BITS))
    return _Table(
        np.concatenate([usual.heads, other_heads]),
        np.concatenate([usual.words, others.words]),
        np.concatenate([usual.points, others.points]),
    )


def _chunked(form: GridForm, lists: Neighbours, chunk: int) -> _Table:
    grid = form.grid
    counts = -(-np.diff(lists.starts) // chunk)
    firsts = np.concatenate([[0], np.cumsum(counts)])
    # places that are left over repeat the list's first entry: it is never better than itself
    filled = counts > 0
    first_points = lists.points[lists.starts[:-1][filled]]
    points = np.repeat(np.repeat(first_points, counts[filled]), chunk).reshape(-1, chunk)
    points[firsts[lists.codes] + lists.positions // chunk, lists.positions % chunk] = lists.points
    codes = np.repeat(np.arange(len(counts)), counts)[:, np.newaxis]
    words = (grid.levels << (form.level_bits * np.arange(grid.group))).sum(axis=1)[points] | (points << _POINT_SHIFT)
    words += np.where(grid.codes[points] == codes, 0, OFF_GRID)
    return _Table((firsts[:-1] << _MORE_BITS) | np.maximum(counts - 1, 0), words, points)


class GroupSearch:
    """Grid points for the groups of a block of each lane, for several scales."""

    def __init__(self, k: Lanes, form: GridForm, n_scales: int) -> None:
        self.k, self.form, points = k, form, form.grid
        self.n_codes, self.group = points.n_codes, points.group
        self.highest, self.places = float(points.n_levels - 1), points.place_values
        self.codes, self.found = (k.int_rows(n_scales * form.n_groups) for _ in range(2))
        self.scales = k.float_rows(n_scales)

    def encode(self, x: Rows, at: Index, inverse: Value, scale: Value, *, far: bool) -> None:
        """Round a block's weights with scale number ``at``; ``far`` where they may be out of range of rounding."""
        k, half = self.k, inverse * 0.5
        self.scales[at] = scale
        codes = self.codes.at(at * self.form.n_groups)
        for group in range(self.form.n_groups):
            code, worst = k.f32(0.0), k.f32(0.0)
            for i, place in enumerate(self.places):
                # 0.5f*(id*x-1): halving is exact, before the subtraction as well as after it
                position = half * x[group * self.group + i] - 0.5
                rounded = k.round_even(position)
                worst = k.larger(k.magnitude(rounded - position), worst)
                if far:
                    worst = k.where(k.magnitude(position) < 1e6, worst, 1.0)
                    rounded = k.nearest_int(position).to_float()
                code = code + k.clamp(rounded, 0.0, self.highest) * float(place)
            codes[group] = code.to_int() + k.where(worst < _SAFE_FRACTION, k.i32(0), self.n_codes)

    def search(self, x: Rows, weights: Rows, n_scales: int) -> None:
        """Find the words of the grid points for all encoded groups."""
        raise NotImplementedError

    def _code(self, row: Index, lane: Index) -> Any:
        code = self.k.b.load(self.codes.element(row, lane), typ=I32)
        return self.k.b.zext(code, I64)

    def _more(self, head: Any) -> Any:
        return self.k.b.and_(head, ir.Constant(I32, (1 << _MORE_BITS) - 1))

    def _least(self, errors: Any, places: int) -> tuple[Any, list[Any]]:
        """The least of each ``places`` errors, in all of them, and the place of the first that equals it."""
        b, n = self.k.b, errors.type.count
        least, distance = errors, places // 2
        while distance:
            order = ir.Constant(ir.VectorType(I32, n), [place ^ distance for place in range(n)])
            other = b.shuffle_vector(least, least, order)
            least = b.select(b.fcmp_ordered("<", least, other), least, other)
            distance //= 2
        mask = b.zext(b.bitcast(b.fcmp_ordered("==", errors, least), ir.IntType(n)), I32)
        # where all errors are NaN, in lanes whose result is not used, the last place is taken
        mask = b.or_(mask, ir.Constant(I32, sum(1 << place for place in range(places - 1, n, places))))
        found = []
        for first in range(0, n, places):
            place = b.cttz(b.lshr(mask, ir.Constant(I32, first)), ir.Constant(ir.IntType(1), 1))
            found.append(b.zext(place, I64))
        return least, found


class PairSearch(GroupSearch):
    """Groups of 4 weights, which have few neighbours: with 16 lanes two lanes' groups share a vector.

    A chunk of 8 neighbours has 2 * level + 1 of the first two and of the other two weights, as the upper halves of
    floats, and the words: 96 bytes. The tables of IQ3_S take 0.8 MB, those of IQ3_XXS 0.6 MB, most of it for codes
    that hardly occur.
    """

    def __init__(self, k: Lanes, form: GridForm, n_scales: int) -> None:
        super().__init__(k, form, n_scales)
        table = _table(form, _PAIR_CHUNK)
        halves = (2 * form.grid.levels[table.points] + 1).astype(np.float32).view(np.uint32).astype(np.int64) >> 16
        planes = [halves[..., 0] | (halves[..., 1] << 16), halves[..., 2] | (halves[..., 3] << 16), table.words]
        self.heads, self.chunks = k.words_table(table.heads), k.words_table(np.stack(planes, axis=1))
        self.chunk_bytes = ir.Constant(I64, 4 * _PAIR_CHUNK * len(planes))
        self.abreast = max(1, k.width // _PAIR_CHUNK)
        self.floats, self.ints = (ir.VectorType(kind, _PAIR_CHUNK * self.abreast) for kind in (F32, I32))

    def search(self, x: Rows, weights: Rows, n_scales: int) -> None:
        """Find the words of the grid points for all encoded groups."""
        k, n_groups = self.k, self.form.n_groups
        with k.loop(k.width // self.abreast) as turn:
            lane = turn * self.abreast
            with k.loop(n_groups) as group:
                first = group * self.group
                terms = [(self._spread(x, first + i, lane), self._spread(weights, first + i, lane)) for i in range(4)]
                with k.loop(n_scales) as at:
                    self._search_one(terms, self._spread(self.scales, at, lane), at * n_groups + group, lane)

    def _spread(self, rows: Rows, i: Index, lane: Index) -> Any:
        b = self.k.b
        few = b.load(rows.element(i, lane), typ=ir.VectorType(F32, self.abreast), align=4)
        order = [place // _PAIR_CHUNK for place in range(self.floats.count)]
        return b.shuffle_vector(few, few, ir.Constant(self.ints, order))

    def _search_one(self, terms: list[tuple[Any, Any]], scale: Any, row: Index, lane: Index) -> None:
        b = self.k.b
        lanes = [lane + j for j in range(self.abreast)]
        heads, chunks = [], []
        for one in lanes:
            address = b.gep(self.heads, [self._code(row, one)], inbounds=True, source_etype=I32)
            heads.append(b.load(address, typ=I32))
            number = b.zext(b.lshr(heads[-1], ir.Constant(I32, _MORE_BITS)), I64)
            chunks.append(b.gep(self.chunks, [b.mul(number, self.chunk_bytes)], inbounds=True, source_etype=I8))
        outputs = [self.found.element(row, one) for one in lanes]
        least, words = self._nearest(terms, scale, chunks)
        for word, output in zip(words, outputs, strict=True):
            b.store(word, output)
        counts = [self._more(head) for head in heads]
        longest = counts[0]
        for count in counts[1:]:
            longest = b.select(b.icmp_unsigned(">", count, longest), count, longest)
        with self.k.when(b.icmp_unsigned("!=", longest, ir.Constant(I32, 0))):
            with b.goto_entry_block():
                slot = b.alloca(self.floats)
            b.store(least, slot)
            with self.k.repeat(b.zext(longest, I64), 1) as turn:
                # a list that has fewer chunks sees its last one again, to no effect
                following = b.add(b.trunc(turn, I32), ir.Constant(I32, 1))
                addresses = []
                for count, chunk in zip(counts, chunks, strict=True):
                    number = b.zext(b.select(b.icmp_unsigned("<", following, count), following, count), I64)
                    addresses.append(b.gep(chunk, [b.mul(number, self.chunk_bytes)], inbounds=True, source_etype=I8))
                self._improve(slot, self._nearest(terms, scale, addresses), outputs)

    def _improve(self, slot: Any, tried: tuple[Any, list[Any]], outputs: list[Any]) -> None:
        b, (errors, words), best = self.k.b, tried, self.k.b.load(slot, typ=self.floats)
        better = b.fcmp_ordered("<", errors, best)
        b.store(b.select(better, errors, best), slot)
        for j, (word, output) in enumerate(zip(words, outputs, strict=True)):
            is_better = b.extract_element(better, ir.Constant(I32, j * _PAIR_CHUNK))
            b.store(b.select(is_better, word, b.load(output, typ=I32)), output)

    def _nearest(self, terms: list[tuple[Any, Any]], scale: Any, chunks: list[Any]) -> tuple[Any, list[Any]]:
        """The least weighted squared distance within each chunk, in all its places, and the word that has it.

        Distances are ``weight*diff*diff``, added in order.
        """
        b, total = self.k.b, None
        high, shift = (ir.Constant(self.ints, [bits] * self.ints.count) for bits in (-1 << 16, 16))
        for i in (0, 2):
            pair = self._plane(chunks, i // 2)
            for (x, weight), bits in zip(terms[i : i + 2], (b.shl(pair, shift), b.and_(pair, high)), strict=True):
                difference = b.fsub(b.fmul(scale, b.bitcast(bits, self.floats)), x)
                share = b.fmul(b.fmul(weight, difference), difference)
                total = share if total is None else b.fadd(total, share)
        least, places = self._least(total, _PAIR_CHUNK)
        words = []
        for chunk, place in zip(chunks, places, strict=True):
            plane = b.gep(chunk, [ir.Constant(I64, 2 * 4 * _PAIR_CHUNK)], inbounds=True, source_etype=I8)
            words.append(b.load(b.gep(plane, [place], inbounds=True, source_etype=I32), typ=I32))
        return least, words

    def _plane(self, chunks: list[Any], plane: int) -> Any:
        b, offset = self.k.b, ir.Constant(I64, 4 * _PAIR_CHUNK * plane)
        kind = ir.VectorType(I32, _PAIR_CHUNK)
        parts = [b.load(b.gep(chunk, [offset], source_etype=I8), typ=kind, align=32) for chunk in chunks]
        if len(parts) == 1:
            return parts[0]
        return b.shuffle_vector(*parts, ir.Constant(self.ints, list(range(self.ints.count))))


class LongSearch(GroupSearch):
    """Groups of 8 weights of 3 levels: one lane's group at a time, as many neighbours at once as there are lanes.

    A chunk is the words alone. Where the machine can permute, each weight's shares in the distance are computed for
    its levels and looked up; elsewhere for each neighbour. The tables of IQ2_XXS take 1.3 MB, of IQ2_XS 1.7 MB and of
    IQ2_S 0.6 MB; most of it is for codes that hardly occur.
    """

    def __init__(self, k: Lanes, form: GridForm, n_scales: int) -> None:
        super().__init__(k, form, n_scales)
        table = _table(form, k.width)
        # a code on the grid has its word in the place of a head
        first = table.words[table.heads >> _MORE_BITS, 0]
        heads = np.where(first < 0, table.heads | OFF_GRID, first)
        self.heads, self.chunks = k.words_table(heads), k.words_table(table.words)

    def search(self, x: Rows, weights: Rows, n_scales: int) -> None:
        """Find the words of the grid points for all encoded groups."""
        k, n_groups = self.k, self.form.n_groups
        with k.loop(k.width) as lane, k.loop(n_groups) as group:
            first = group * self.group
            terms = [(self._spread(x, first + i, lane), self._spread(weights, first + i, lane)) for i in range(8)]
            with k.loop(n_scales) as at:
                self._search_one(terms, at, at * n_groups + group, lane)

    def _spread(self, rows: Rows, i: Index, lane: Index) -> Value:
        return self.k.splat(self.k.b.load(rows.element(i, lane), typ=F32))

    def _search_one(self, terms: list[tuple[Value, Value]], at: Index, row: Index, lane: Index) -> None:
        k, b = self.k, self.k.b
        head = b.load(b.gep(self.heads, [self._code(row, lane)], inbounds=True, source_etype=I32), typ=I32)
        output = self.found.element(row, lane)
        b.store(head, output)
        with k.when(b.icmp_signed("<", head, ir.Constant(I32, 0))):
            scale = self._spread(self.scales, at, lane)
            look_up = self._shares(terms, scale) if k.permutes else None
            number = b.lshr(b.and_(head, ir.Constant(I32, ~OFF_GRID)), ir.Constant(I32, _MORE_BITS))
            first = b.mul(b.zext(number, I64), ir.Constant(I64, 4 * k.width))
            end = b.add(b.zext(self._more(head), I64), ir.Constant(I64, 1))
            least = k.variable(k.f32(float(np.finfo(np.float32).max)))
            with k.repeat(end, 1) as turn:
                offset = b.add(first, b.mul(turn, ir.Constant(I64, 4 * k.width)))
                chunk = b.gep(self.chunks, [offset], inbounds=True, source_etype=I8)
                words = Value(k, b.load(chunk, typ=k.ints, align=4 * k.width))
                errors = self._looked_up(look_up, words) if look_up else self._errors(terms, scale, words)
                tried, (place,) = self._least(errors.ir, k.width)
                best = least.get()
                better = b.fcmp_ordered("<", tried, best.ir)
                least.set(Value(k, b.select(better, tried, best.ir)))
                word = b.load(b.gep(chunk, [place], inbounds=True, source_etype=I32), typ=I32)
                is_better = b.extract_element(better, ir.Constant(I32, 0))
                b.store(b.select(is_better, word, b.load(output, typ=I32)), output)

    def _share(self, term: tuple[Value, Value], scaled: Value) -> Value:
        """``weight*diff*diff``."""
        x, weight = term
        difference = scaled - x
        return weight * difference * difference

    def _shares(self, terms: list[tuple[Value, Value]], scale: Value) -> list[Value]:
        """Tables of 16: the first for the levels of two weights, the others for one weight's in their low two bits."""
        k = self.k
        low, high = (
            Value(k, ir.Constant(k.floats, [2.0 * (place >> shift & 3) + 1 for place in range(16)])) for shift in (0, 2)
        )
        scaled = scale * low
        shares = [self._share(term, scaled) for term in terms]
        return [shares[0] + self._share(terms[1], scale * high), *shares[2:]]

    def _looked_up(self, tables: list[Value], words: Value) -> Value:
        total = self.k.chosen(tables[0], words)
        for i, table in enumerate(tables[1:], 2):
            total = total + self.k.chosen(table, words >> (2 * i))
        return total

    def _errors(self, terms: list[tuple[Value, Value]], scale: Value, words: Value) -> Value:
        total = None
        for i, term in enumerate(terms):
            value = ((((words >> (2 * i)) & 3) << 1) | 1).to_float()
            share = self._share(term, scale * value)
            total = share if total is None else total + share
        assert total is not None
        return total


@dataclass(frozen=True)
class GridFit:
    """A block's scale and the words of its grid points, group by group."""

    scale: Value
    words: Rows


class ScaleSearch:
    """A block's best scale, with the grid points that belong to it."""

    def __init__(self, k: Lanes, form: GridForm) -> None:
        self.k, self.form = k, form
        numerators = form.numerators()
        self.numerators, self.n_scales = k.constants(numerators), len(numerators)
        self.groups = (PairSearch if form.grid.group == 4 else LongSearch)(k, form, self.n_scales)
        self.roots, self.products = k.float_rows(form.block), k.float_rows(form.block)
        self.words = k.int_rows(form.n_groups)

    def fit(self, x: Rows, weights: Rows, base: Value, first: Value, active: Value) -> GridFit:
        """The best scale of weights without signs in the lanes that are active.

        The scales tried are ``base`` over a numerator of the form; ``first`` stays if none of them is of use. Lanes in
        which ggml's arithmetic leaves the range of floats, or of its rounding, are marked odd.
        """
        k, form, groups = self.k, self.form, self.groups
        extent = self._prepare(x, weights, base, active)
        with k.loop(self.n_scales) as at:
            inverse = self.numerators[at] / base
            groups.encode(x, at, inverse, 1.0 / inverse, far=False)
        groups.search(x, self.roots, self.n_scales)
        scale = self._best(weights, first)
        again = scale > 0.0
        if form.renewed is not Renewed.ALL:
            again = again & self._some_off_grid()
        k.mark_odd(active & again & ~(scale < extent * 4.0))
        groups.encode(x, k.index(0), 1.0 / scale, scale, far=True)
        groups.search(x, self.roots, 1)
        for j in range(form.n_groups):
            renewed = again & (self.words[j] < 0) if form.renewed is Renewed.OFF_GRID else again
            self.words[j] = k.where(renewed, groups.found[j], self.words[j])
        sum_qx, sum_q2 = self._sums(weights, self.words)
        scale = k.where(again & (sum_q2 > 0.0), sum_qx / sum_q2, scale)
        k.mark_odd(active & scale.differs(scale))
        return GridFit(scale, self.words)

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
            # where no scale is good all levels stay 0, which is point 0 of each grid; IQ3_S searches them again
            self.words[j] = k.i32(OFF_GRID if self.form.renewed is Renewed.ALL_IF_ONE_IS_OFF_GRID else 0)
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
        group, bits = self.form.grid.group, self.form.level_bits
        for j in range(self.form.n_groups):
            word = words[j]
            for i in range(group):
                value = self._value(word >> (bits * i))
                number = j * group + i
                sum_qx = sum_qx + self.products[number] * value
                sum_q2 = sum_q2 + weights[number] * value * value
        return sum_qx, sum_q2

    def _value(self, word: Value) -> Value:
        """2 * level + 1 of the level in the lowest bits."""
        n = 1 << self.form.level_bits
        if self.k.permutes:
            return self.k.permute([2.0 * (i % n) + 1 for i in range(32)], word)
        return (((word & (n - 1)) << 1) | 1).to_float()


def point_number(word: Value, bits: int) -> Value:
    """The number of a found grid point."""
    return (word >> _POINT_SHIFT) & ((1 << bits) - 1)


def free_signs(k: Lanes, x: Rows, magnitudes: Rows, n: int) -> Value:
    """Write the magnitudes of ``n`` <= 32 weights; gives a bit for each that is negative."""
    word = k.i32(0)
    for i in range(n):
        negative = x[i] < 0.0
        magnitudes[i] = k.where(negative, -x[i], x[i])
        word = word | k.where(negative, k.i32(_bit(i)), 0)
    return word


def even_signs(k: Lanes, x: Rows, weights: Rows, magnitudes: Rows, n: int) -> list[Value]:
    """Magnitudes of ``n`` weights with an even number of signs in each 8; gives 7 bits for each 8.

    Where the number is odd, the weight that counts least changes its sign, and its magnitude is negative then.
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
