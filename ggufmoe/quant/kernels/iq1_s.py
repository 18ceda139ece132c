"""IQ1_S: 8 blocks of 32 weights of 3 levels in groups of 8 on a grid of 2048 points, 3-bit scales; 50 bytes."""

from __future__ import annotations

from ggufmoe.quant.kernels.iq1 import (
    DELTA,
    GROUP,
    Best,
    Ordered,
    PointSearch,
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

_BLOCK = 32
_N_BLOCKS = WEIGHTS // _BLOCK
_N_GROUPS = _BLOCK // GROUP
_ZERO_BLOCK = 1e-12  # GROUP_MAX_EPS_IQ1_S
_MOVED_DOWN = 1 << 12
"""The bit of a split's code above the 12 bits of its position."""


def quantize(k: Tiles, x: Rows, importance: Rows | None) -> None:
    """Write the superblock of each lane. Raises ValueError without importances, as ggml aborts."""
    if importance is None:
        raise ValueError("IQ1_S needs importances")
    search, split = PointSearch(k, _BLOCK), _Split(k)
    scales, weights = k.float_rows(_N_BLOCKS), k.float_rows(_BLOCK)
    points, high = k.int_rows(_N_BLOCKS), k.int_rows(_N_BLOCKS)
    squares = sum_of_squares(k, x, WEIGHTS)
    energy = squares * 2.0 / WEIGHTS
    k.mark_overflow(~(squares < float("inf")))
    with k.loop(_N_BLOCKS) as j:
        block = x.at(j * _BLOCK)
        spread_importance(k, block, importance.at(j * _BLOCK), energy, weights, _BLOCK)
        _, top = largest_magnitude(k, block, _BLOCK)
        active = ~(top < _ZERO_BLOCK)
        mark_unsafe(k, block, weights, _BLOCK, active)
        best = split.search(block, weights, top)
        found, code, scale = best.where.get() > -1, best.where.get(), best.scale.get()
        active, mirrored = active & found, scale < 0.0
        where = k.where(found, code & (_MOVED_DOWN - 1), 0)
        levels = levels_of(k, block, _BLOCK, split.ordered, where, mirrored)
        down, scale = (code & _MOVED_DOWN).differs(0) ^ mirrored, k.magnitude(scale)
        moved = k.where(down, k.f32(-DELTA), DELTA)
        for group in range(_N_GROUPS):
            search.moved[group] = moved
        words = search.find(block, weights, levels, scale)
        scale = renewed_scale(k, block, weights, words, search.moved, scale)
        if k.unbounded:
            k.mark_overflow(active & search.failed[0].differs(0))
        k.mark_overflow(active & scale.differs(scale))
        scales[j] = k.where(active, scale, 0.0)
        numbers = [search.number(word) for word in words]
        points[j] = k.where(active, join_bytes([number & 0xFF for number in numbers]), 0)
        bits = k.where(down, k.i32(8 << 12), 0)
        for group, number in enumerate(numbers):
            bits = bits | ((number >> 8) << (3 * group))
        high[j] = k.where(active, bits, 0)
    _store(k, scales, points, high)


def _store(k: Tiles, scales: Rows, points: Rows, high: Rows) -> None:
    step = largest(k, scales, _N_BLOCKS) / 15.0
    some, inverse = step.differs(0.0), 1.0 / step
    halves = []
    for j in range(_N_BLOCKS):
        bits = high[j]
        level = scale_level(k, inverse, scales[j])
        # without any scale the shifts are not written either
        halves.append(k.where(some, bits | (level << 12), bits & 0xFFF))
    k.store_half(0, k.where(some, k.half_bits(step * 1.125), 0))
    pairs = [halves[j] | (halves[j + 1] << 16) for j in range(0, _N_BLOCKS, 2)]
    k.store_words(2, [*points.first(_N_BLOCKS), *pairs])


class _Split:
    """Finds the best of all splits of a block into three levels, moved up or down."""

    def __init__(self, k: Lanes) -> None:
        self.k, n = k, _BLOCK + 1
        self.ordered = Ordered.scratch(k, _BLOCK)
        self.sums_x, self.sums_w = k.float_rows(n), k.float_rows(n)
        # shares of the lowest level by the first border, and of the highest by the second: moved up, moved down
        self.low_x, self.low_w, self.high_x, self.high_w = ([k.float_rows(n) for _ in range(2)] for _ in range(4))

    def search(self, x: Rows, weights: Rows, top: Value) -> Best:
        """Find the best split; its scale may be negative, its code has the position and the direction of the offset."""
        k = self.k
        sort(k, x, weights, _BLOCK, self.ordered)
        self._add_up()
        best = Best(k, top)
        with splits(k, _BLOCK) as (first, second, code):
            up, down = self._sums(first, second)
            best.consider([(*up, code), (*down, code | _MOVED_DOWN)])
        return best

    def _sums(self, first: Index, second: Index) -> list[tuple[Value, Value]]:
        """The sum of products with x and the sum of squares of a split, with levels moved up, and moved down."""
        middle_x = (self.sums_x[second] - self.sums_x[first]) * DELTA
        middle_w = (self.sums_w[second] - self.sums_w[first]) * DELTA * DELTA
        return [
            (
                self.low_x[way][first] + middle + self.high_x[way][second],
                self.low_w[way][first] + middle_w + self.high_w[way][second],
            )
            for way, middle in enumerate((middle_x, -middle_x))
        ]

    def _add_up(self) -> None:
        k = self.k
        sum_x = sum_w = k.f32(0.0)
        self.sums_x[0], self.sums_w[0] = sum_x, sum_w
        for j in range(_BLOCK):
            weight = self.ordered.weights[j]
            sum_x, sum_w = sum_x + weight * self.ordered.x[j], sum_w + weight
            self.sums_x[j + 1], self.sums_w[j + 1] = sum_x, sum_w
        with k.loop(_BLOCK + 1) as border:
            below_x, below_w = self.sums_x[border], self.sums_w[border]
            for way, moved in enumerate((DELTA, -DELTA)):
                low, high = moved - 1.0, moved + 1.0
                self.low_x[way][border], self.low_w[way][border] = below_x * low, below_w * low * low
                self.high_x[way][border] = (sum_x - below_x) * high
                self.high_w[way][border] = (sum_w - below_w) * high * high
