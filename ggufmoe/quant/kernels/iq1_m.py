"""IQ1_M: 16 blocks of 16 weights of 3 levels in groups of 8 on a grid of 2048 points, 3-bit scales; 56 bytes."""

from __future__ import annotations

from dataclasses import dataclass

from ggufmoe.quant.kernels.iq1 import (
    DELTA,
    GROUP,
    Best,
    Ordered,
    PointSearch,
    level_value,
    levels_of,
    mark_unsafe,
    renewed_scale,
    scale_level,
    sort,
    splits,
)
from ggufmoe.quant.kernels.lanes import Index, Lanes, Rows, Value
from ggufmoe.quant.kernels.packing import join_bytes
from ggufmoe.quant.kernels.superblocks import WEIGHTS, largest, largest_magnitude, spread_importance, sum_of_squares
from ggufmoe.quant.kernels.tiles import Tiles

_BLOCK = 16
_N_BLOCKS = WEIGHTS // _BLOCK
_ZERO_BLOCK = 1e-7  # GROUP_MAX_EPS_IQ1_M
_WAY_SHIFT = 12
"""The bits of a split's code above its position: 0 to 3; bit 0 moves the second half down, bit 1 the first."""


def quantize(k: Tiles, x: Rows, importance: Rows | None) -> None:
    """Write the superblock of each lane."""
    weigh = _Weights(k, x, importance)
    search, split = PointSearch(k, _BLOCK), _BlockSplit(k)
    scales, ways = k.float_rows(_N_BLOCKS), k.int_rows(_N_BLOCKS)
    words, numbers = k.int_rows(2 * _N_BLOCKS), k.int_rows(2 * _N_BLOCKS)
    with k.loop(_N_BLOCKS) as j:
        block, weights = x.at(j * _BLOCK), weigh.block(j)
        _, top = largest_magnitude(k, block, _BLOCK)
        active = ~(top < _ZERO_BLOCK)
        mark_unsafe(k, block, weights, _BLOCK, active)
        best = split.search(block, weights, top)
        code, scale = best.where.get(), best.scale.get()
        found, mirrored = code > -1, scale < 0.0
        active, code = active & found, k.where(found, code, 0)
        levels = levels_of(k, block, _BLOCK, split.ordered, code, mirrored)
        way, scale = code >> _WAY_SHIFT, k.magnitude(scale)
        way = k.where(mirrored, k.i32(3) - way, way)
        for half, moved in enumerate(_moved(k, way)):
            search.moved[half] = moved
        points = search.find(block, weights, levels, scale)
        scale = renewed_scale(k, block, weights, points, search.moved, scale)
        if k.unbounded:
            k.mark_overflow(active & search.failed[0].differs(0))
        k.mark_overflow(active & scale.differs(scale))
        scales[j], ways[j] = k.where(active, scale, 0.0), k.where(active, way, 0)
        for half, point in enumerate(points):
            words.at(j * 2)[half] = k.where(active, point, 0)
            numbers.at(j * 2)[half] = k.where(active, search.number(point), 0)
    _store(k, x, weigh, _Found(scales, ways, words, numbers))


class _Weights:
    """Computes the importance of each weight of a block."""

    def __init__(self, k: Lanes, x: Rows, importance: Rows | None) -> None:
        self.k, self.x, self.importance = k, x, importance
        self.rows = k.float_rows(_BLOCK)
        squares = sum_of_squares(k, x, WEIGHTS)
        k.mark_overflow(~(squares < float("inf")))
        self.energy = squares * 2.0 / WEIGHTS

    def block(self, j: Index) -> Rows:
        """The rows for block ``j``, valid until the next call."""
        block = self.x.at(j * _BLOCK)
        if self.importance is None:
            for i in range(_BLOCK):
                self.rows[i] = block[i] * block[i]
        else:
            spread_importance(self.k, block, self.importance.at(j * _BLOCK), self.energy, self.rows, _BLOCK)
        return self.rows


@dataclass(frozen=True)
class _Found:
    """For each block its scale, which halves are moved down, and the words and numbers of its two grid points."""

    scales: Rows
    ways: Rows
    words: Rows
    numbers: Rows


def _moved(k: Lanes, way: Value) -> list[Value]:
    """The offset of the level values of each half."""
    return [k.where((way & bit).equals(0), k.f32(DELTA), -DELTA) for bit in (2, 1)]


def _store(k: Tiles, x: Rows, weigh: _Weights, found: _Found) -> None:
    step = largest(k, found.scales, _N_BLOCKS) / 15.0
    some, inverse = step.differs(0.0), 1.0 / step
    levels, high = k.int_rows(_N_BLOCKS), k.int_rows(_N_BLOCKS)
    sum_qx, sum_q2 = k.variable(k.f32(0.0)), k.variable(k.f32(0.0))
    with k.loop(_N_BLOCKS) as j:
        block, weights, way = x.at(j * _BLOCK), weigh.block(j), found.ways[j]
        level = scale_level(k, inverse, found.scales[j])
        factor = ((level << 1) | 1).to_float()
        levels[j] = level
        points = found.words.at(j * 2).first(2)
        numbers = found.numbers.at(j * 2).first(2)
        shifts = ((way & 2) << 2) | ((way & 1) << 7)
        high[j] = (numbers[0] >> 8) | ((numbers[1] >> 8) << 4) | k.where(some, shifts, 0)
        for half, (point, moved) in enumerate(zip(points, _moved(k, way), strict=True)):
            for i in range(GROUP):
                value, weight = level_value(point, i, moved) * factor, weights[half * GROUP + i]
                sum_qx.set(sum_qx.get() + weight * value * block[half * GROUP + i])
                sum_q2.set(sum_q2.get() + weight * value * value)
    best = k.where(sum_q2.get() > 0.0, sum_qx.get() / sum_q2.get(), step)
    scale_words = _scale_words(k, levels, k.half_bits(best * 1.1125), some)
    k.store_words(0, [*_low_bytes(found.numbers), *_bytes(high), *scale_words])


def _low_bytes(numbers: Rows) -> list[Value]:
    low = [number & 0xFF for number in numbers.first(2 * _N_BLOCKS)]
    return [join_bytes(low[i : i + 4]) for i in range(0, len(low), 4)]


def _bytes(rows: Rows) -> list[Value]:
    return [join_bytes(rows.first(_N_BLOCKS)[i : i + 4]) for i in range(0, _N_BLOCKS, 4)]


def _scale_words(k: Lanes, levels: Rows, d_bits: Value, some: Value) -> list[Value]:
    """Four scales in 12 bits of each of four halves, a quarter of the superblock's scale in the other four."""
    halves = []
    for i in range(4):
        half = ((d_bits >> (4 * i)) & 0xF) << 12
        for j in range(4):
            half = half | (levels[4 * i + j] << (3 * j))
        halves.append(k.where(some, half, 0))
    return [halves[0] | (halves[1] << 16), halves[2] | (halves[3] << 16)]


class _BlockSplit:
    """Finds the best of all splits of a block into three levels, each half moved up or down."""

    def __init__(self, k: Lanes) -> None:
        self.k, n = k, _BLOCK + 1
        self.ordered = Ordered.scratch(k, _BLOCK)
        self.sums_x, self.sums_w = ([k.float_rows(n) for _ in range(2)] for _ in range(2))
        # shares of the borders in the sums of squares, by half and by way: the first's with the total's, the second's
        self.firsts, self.seconds = ([[k.float_rows(n) for _ in range(2)] for _ in range(2)] for _ in range(2))

    def search(self, x: Rows, weights: Rows, top: Value) -> Best:
        """Find the best split; its scale may be negative, its code has position and halves moved down."""
        k = self.k
        sort(k, x, weights, _BLOCK, self.ordered)
        totals = self._add_up()
        best = Best(k, top)
        with splits(k, _BLOCK) as (first, second, code):
            sums = self._sums(totals, first, second)
            best.consider([(*pair, code | (way << _WAY_SHIFT)) for way, pair in enumerate(sums)])
        return best

    def _sums(self, totals: list[list[Value]], first: Index, second: Index) -> list[tuple[Value, Value]]:
        """The sum of products with x and the sum of squares of a split, for each of four combinations of offsets."""
        qx, q2 = [], []
        for half in range(2):
            borders = self.sums_x[half][first] + self.sums_x[half][second]
            qx.append([total - borders for total in totals[half]])
            q2.append([self.firsts[half][way][first] + self.seconds[half][way][second] for way in range(2)])
        return [(qx[0][a] + qx[1][b], q2[0][a] + q2[1][b]) for a in range(2) for b in range(2)]

    def _add_up(self) -> list[list[Value]]:
        """Fill the tables; gives each half's total of importance times weight times the highest level, by way."""
        k, ordered = self.k, self.ordered
        sums_x, sums_w = [k.f32(0.0)] * 2, [k.f32(0.0)] * 2
        for half in range(2):
            self.sums_x[half][0], self.sums_w[half][0] = sums_x[half], sums_w[half]
        for j in range(_BLOCK):
            weight, second = ordered.weights[j], ordered.places[j] > GROUP - 1
            share = weight * ordered.x[j]
            for half, inside in enumerate((~second, second)):
                sums_x[half] = k.where(inside, sums_x[half] + share, sums_x[half])
                sums_w[half] = k.where(inside, sums_w[half] + weight, sums_w[half])
                self.sums_x[half][j + 1], self.sums_w[half][j + 1] = sums_x[half], sums_w[half]
        ways = [(moved - 1.0, moved, moved + 1.0) for moved in (DELTA, -DELTA)]
        with k.loop(_BLOCK + 1) as border:
            for half in range(2):
                below = self.sums_w[half][border]
                for way, (low, middle, high) in enumerate(ways):
                    first = below * (low * low - middle * middle)
                    self.firsts[half][way][border] = sums_w[half] * high * high + first
                    self.seconds[half][way][border] = below * (middle * middle - high * high)
        return [[total * high for _, _, high in ways] for total in sums_x]
