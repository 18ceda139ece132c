"""Shared by IQ4_NL and IQ4_XS: 4-bit levels that are not evenly spaced, and the search for the scale.

Follows ``quantize_row_iq4_nl_impl`` and ``best_index_int8`` in ``ggml/src/ggml-quants.c``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np

from ggufmoe.quant.kernels.lanes import Lanes, Rows, Value
from ggufmoe.quant.kernels.searches import ZERO_GROUP

BLOCK = 32
LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_N_TRY = 7
_BIN = 8  # narrower than any two neighbouring thresholds are apart
_LOWEST_BIN = -17
_BIN_MAGIC = 1.5 * 2.0**26  # adding it leaves the number of the bin in the low mantissa bits


@cache
def thresholds() -> tuple[float, ...]:
    """For each pair of neighbouring levels, the smallest float that ``best_index_int8`` rounds to the upper one."""
    return tuple(_threshold(low, high) for low, high in pairwise(LEVELS))


def _threshold(low: int, high: int) -> float:
    below, above = float(low), float(high)
    while True:
        middle = float(np.float32((below + above) / 2))
        if middle in (below, above):
            return above
        if np.float32(middle - low) < np.float32(high - middle):
            below = middle
        else:
            above = middle


class Nearest:
    """Finds the nearest of the sixteen levels: by a table of bins where the machine can permute, else by comparing."""

    def __init__(self, k: Lanes) -> None:
        self.k = k
        bins = [self._bin(number % 32) for number in range(32)]
        self.borders, self.below, self.above, self.first = (list(column) for column in zip(*bins, strict=True))

    @staticmethod
    def _bin(index: int) -> tuple[float, float, float, float]:
        number = index if index < 32 + _LOWEST_BIN else index - 32
        start = (number - 0.5) * _BIN
        inside = [border for border in thresholds() if start <= border <= start + _BIN]
        first = sum(1 for border in thresholds() if border < start)
        border = float(inside[0]) if inside else float("inf")
        return border, float(LEVELS[first]), float(LEVELS[min(first + 1, 15)]), float(first)

    def value(self, x: Value) -> Value:
        """The nearest level itself, as a float."""
        if not self.k.permutes:
            return self._chain(x, LEVELS)
        bin_number, upper = self._locate(x)
        k = self.k
        return k.where(upper, k.permute(self.above, bin_number), k.permute(self.below, bin_number))

    def index(self, x: Value) -> Value:
        """The number of the nearest level, 0 to 15."""
        if not self.k.permutes:
            return self._chain(x, range(16)).to_int()
        # NaN passes here and becomes the highest level in _locate, which is where ggml's bisection takes it
        bin_number, upper = self._locate(self.k.where(x < float(LEVELS[0]), float(LEVELS[0]), x))
        first = self.k.permute(self.first, bin_number).to_int()
        return self.k.where(upper, first + 1, first)

    def _locate(self, x: Value) -> tuple[Value, Value]:
        x = self.k.smaller(x, float(LEVELS[-1]))
        bin_number = (x + _BIN_MAGIC).bits()
        return bin_number, ~(x < self.k.permute(self.borders, bin_number))

    def _chain(self, x: Value, values: Sequence[int]) -> Value:
        found = self.k.f32(values[0])
        for border, value in zip(thresholds(), values[1:], strict=True):
            found = self.k.where(x < border, found, float(value))
        return found


class Search:
    """Finds the scale of a block; has no mutable state."""

    def __init__(self, k: Lanes) -> None:
        self.k, self.nearest = k, Nearest(k)
        self.numerators = k.constants([itry + LEVELS[0] for itry in range(-_N_TRY, _N_TRY + 1)])

    def scale(self, x: Rows, weights: Rows) -> Value:
        """The best of 16 candidates; 0 for a block of zeros."""
        k = self.k
        extreme = top = k.f32(0.0)
        for i in range(BLOCK):
            magnitude = k.magnitude(x[i])
            extreme = k.where(magnitude > top, x[i], extreme)
            top = k.larger(magnitude, top)
        sum_qx, sum_q2 = self._sums(x, weights, 1.0 / (-extreme / float(LEVELS[0])))
        first = k.where(sum_q2 > 0.0, sum_qx / sum_q2, 0.0)
        d, best = k.variable(first), k.variable(first * sum_qx)
        with k.loop(2 * _N_TRY + 1) as turn:
            sum_qx, sum_q2 = self._sums(x, weights, self.numerators[turn] / extreme)
            better = (sum_q2 > 0.0) & (sum_qx * sum_qx > best.get() * sum_q2)
            tried = sum_qx / sum_q2
            d.set(k.where(better, tried, d.get()))
            best.set(k.where(better, tried * sum_qx, best.get()))
        return k.where(top < ZERO_GROUP, 0.0, d.get())

    def _sums(self, x: Rows, weights: Rows, inverse: Value) -> tuple[Value, Value]:
        sum_qx = sum_q2 = self.k.f32(0.0)
        for i in range(BLOCK):
            value = self.nearest.value(inverse * x[i])
            weighted = weights[i] * value
            sum_qx = sum_qx + weighted * x[i]
            sum_q2 = sum_q2 + weighted * value
        return sum_qx, sum_q2


def squares(x: Rows, weights: Rows) -> None:
    """Weights without importances: ``x*x``."""
    for i in range(BLOCK):
        weights[i] = x[i] * x[i]
