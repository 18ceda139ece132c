"""The searches for a block's scale that ggml's formats share, one block per lane.

Each follows a routine of ``ggml/src/ggml-quants.c`` at the pinned commit, operation by operation; only what cannot
change a result differs: levels are kept as floats, candidates are tried side by side, and the winning levels are
computed again from the winning scale instead of being stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ggufmoe.quant.kernels.lanes import Lanes, Rows, Value

ZERO_GROUP = 1e-15  # GROUP_MAX_EPS
_NARROWEST_SPAN = 1e-36  # below it nmax / span overflows, and nearest_int leaves its range


@dataclass(frozen=True)
class Affine:
    """Parameters of ``make_qkx2_quants`` and ``make_qkx3_quants`` (the same arithmetic where weights are given)."""

    n: int
    n_max: int
    r_min: float
    r_delta: float
    n_step: int
    absolute_error: bool = False

    def numerators(self) -> list[np.float32]:
        """``rmin + rdelta*is + nmax`` for each step, in C's float arithmetic."""
        f32 = np.float32
        return [
            f32(f32(f32(self.r_min) + f32(self.r_delta) * f32(i)) + f32(self.n_max)) for i in range(self.n_step + 1)
        ]


@dataclass(frozen=True)
class AffineFit:
    """``x ~ scale * level - minimum``; ``inverse`` and ``low`` give the search's own levels (``affine_level``)."""

    scale: Value
    minimum: Value
    inverse: Value
    low: Value


def affine_level(k: Lanes, x: Value, inverse: Value, low: Value, n_max: int) -> Value:
    """``MAX(0, MIN(nmax, nearest_int(iscale*(x - min))))`` as a float.

    Only unbounded kernels wrap around as ggml does where |iscale*(x - min)| is 2^22 or more.
    """
    scaled = inverse * (x - low)
    if k.unbounded:
        return k.clamp(k.nearest_int(scaled), 0, n_max).to_float()
    return k.limited(k.round_even(scaled), float(n_max))


class AffineSearch:
    """``make_qkx2_quants`` for several blocks of ``form.n`` weights per lane.

    The candidates of one block depend on each other, because each better minimum moves the next candidate's span.
    So two halves of the blocks run half a candidate apart: while the divisions of one half wait for their operands
    the sums of the other keep the arithmetic units busy.
    """

    def __init__(self, k: Lanes, form: Affine) -> None:
        self.k, self.form = k, form
        numerators = form.numerators()
        self.numerators = k.constants([*numerators, numerators[-1]])  # the lagging half aims once too often

    def fit(self, blocks: Sequence[tuple[Rows, Rows]]) -> list[AffineFit]:
        """Find the best scale and minimum of each (weights, importances); marks lanes odd whose span is degenerate."""
        searched = [_AffineBlock(self.k, self.form, x, weights) for x, weights in blocks]
        leading, lagging = searched[::2], searched[1::2]
        first = self.numerators[self.k.index(0)]
        for block in searched:
            block.aim(first)
        self._add_moments(lagging)
        with self.k.loop(self.form.n_step + 1) as step:
            following = self.numerators[step + 1]
            for block in lagging:
                block.draw_line()
            self._add_moments(leading)
            for block in leading:
                block.draw_line()
            self._add_errors(lagging)
            for block in lagging:
                block.take_if_better()
                block.aim(following)
            self._add_errors(leading)
            for block in leading:
                block.take_if_better()
                block.aim(following)
            self._add_moments(lagging)
        return [block.result() for block in searched]

    def _add_moments(self, blocks: Sequence[_AffineBlock]) -> None:
        for block in blocks:
            block.moments = [self.k.f32(0.0)] * 3
        for i in range(self.form.n):
            for block in blocks:
                block.add_moments(i)
        for block in blocks:
            block.keep_moments()

    def _add_errors(self, blocks: Sequence[_AffineBlock]) -> None:
        for i in range(self.form.n):
            for block in blocks:
                block.add_error(i)


class _AffineBlock:
    """One block's search: the best candidate so far and the current one."""

    def __init__(self, k: Lanes, form: Affine, x: Rows, weights: Rows) -> None:
        self.k, self.form, self.x, self.weights = k, form, x, weights
        self.levels = k.float_rows(form.n)
        self._measure()
        span = self.high - self.low
        self.flat = self.high.equals(self.low)
        k.mark_odd(~(self.flat | (span > _NARROWEST_SPAN)))
        self.least_span = span * 1e-4
        inverse = float(form.n_max) / span
        self.scale, self.minimum = 1.0 / inverse, self.low
        self.error = k.f32(0.0)
        for i in range(form.n):
            self.levels[i] = affine_level(k, x[i], inverse, self.low, form.n_max)
            self.add_error(i)
        self.best = [k.variable(value) for value in (self.error, self.scale, self.low, inverse, self.low)]
        self.inverse, self.base = k.variable(inverse), k.variable(self.low)
        self.moments = [k.f32(0.0)] * 3
        self.kept = [k.variable(moment) for moment in self.moments]

    def _measure(self) -> None:
        k, x, weights = self.k, self.x, self.weights
        low = high = x[0]
        self.sum_w = weights[0]
        self.sum_x = self.sum_w * x[0]
        for i in range(1, self.form.n):
            low, high = k.smaller(x[i], low), k.larger(x[i], high)
            self.sum_w = self.sum_w + weights[i]
            self.sum_x = self.sum_x + weights[i] * x[i]
        self.low, self.high = k.where(low > 0.0, 0.0, low), high

    def aim(self, numerator: Value) -> None:
        """Begin a candidate: its inverse scale over the span above the best minimum so far."""
        k, base = self.k, self.best[2].get()
        span = self.high - base
        k.mark_odd(~(self.flat | ((span > self.least_span) & (span < float("inf")))))
        self.base.set(base)
        self.inverse.set(numerator / span)

    def add_moments(self, i: int) -> None:
        """Level of weight ``i`` and its share in the sums of weighted levels, their squares and products with x."""
        x = self.x[i]
        level = affine_level(self.k, x, self.inverse.get(), self.base.get(), self.form.n_max)
        self.levels[i] = level
        weighted = self.weights[i] * level
        shares = weighted, weighted * level, weighted * x
        self.moments = [moment + share for moment, share in zip(self.moments, shares, strict=True)]

    def keep_moments(self) -> None:
        """Store the sums for the next iteration of the loop."""
        for variable, moment in zip(self.kept, self.moments, strict=True):
            variable.set(moment)

    def draw_line(self) -> None:
        """Scale and minimum by least squares, the minimum at most 0."""
        k = self.k
        sum_l, sum_l2, sum_xl = (moment.get() for moment in self.kept)
        determinant = self.sum_w * sum_l2 - sum_l * sum_l
        low = (sum_l2 * self.sum_x - sum_l * sum_xl) / determinant
        above = low > 0.0
        # with the minimum held at zero the scale is sum_xl / sum_l2: one division serves both cases
        numerator = k.where(above, sum_xl, self.sum_w * sum_xl - self.sum_x * sum_l)
        self.scale = numerator / k.where(above, sum_l2, determinant)
        self.minimum = k.where(above, 0.0, low)
        self.valid = determinant > 0.0
        self.error = k.f32(0.0)

    def add_error(self, i: int) -> None:
        """Add the term of weight ``i`` to the candidate's error."""
        difference = self.scale * self.levels[i] + self.minimum - self.x[i]
        loss = self.k.magnitude(difference) if self.form.absolute_error else difference * difference
        self.error = self.error + self.weights[i] * loss

    def take_if_better(self) -> None:
        """Make the candidate the best where its error is smaller."""
        better = self.valid & (self.error < self.best[0].get())
        candidate = self.error, self.scale, self.minimum, self.inverse.get(), self.base.get()
        for variable, value in zip(self.best, candidate, strict=True):
            variable.set(self.k.where(better, value, variable.get()))

    def result(self) -> AffineFit:
        """The best candidate; for a constant block only the minimum is used."""
        k, flat = self.k, self.flat
        _, scale, minimum, inverse, base = (variable.get() for variable in self.best)
        return AffineFit(
            k.where(flat, 0.0, scale), -k.where(flat, self.low, minimum), k.where(flat, 0.0, inverse), base
        )


@dataclass(frozen=True)
class Symmetric:
    """Parameters of ``make_qx_quants`` (with ``rmse_type`` 1) and ``make_q3_quants``."""

    n: int
    n_max: int


@dataclass(frozen=True)
class SymmetricFit:
    """``x ~ scale * (level - nmax)``."""

    k: Lanes
    form: Symmetric
    x: Rows
    scale: Value
    inverse: Value
    zero: Value

    def store_levels(self, levels: Rows) -> None:
        """The search's own levels, as integers: 0 for a block of zeros."""
        k, n_max = self.k, self.form.n_max
        for i in range(self.form.n):
            level = symmetric_level(k, self.inverse * self.x[i], n_max).to_int() + n_max
            levels[i] = k.where(self.zero, 0, level)


def symmetric_level(k: Lanes, scaled: Value, n_max: int) -> Value:
    """``MAX(-nmax, MIN(nmax-1, nearest_int(scaled)))`` as a float, where |scaled| < 2^22."""
    return k.clamp(k.round_even(scaled), -float(n_max), float(n_max - 1))


def extreme_weight(k: Lanes, x: Rows, n: int) -> tuple[Value, Value]:
    """The weight of largest magnitude (the first of them), and which lanes hold only zeros or next to it."""
    top = extreme = k.f32(0.0)
    for i in range(n):
        magnitude = k.magnitude(x[i])
        extreme = k.where(magnitude > top, x[i], extreme)
        top = k.larger(magnitude, top)
    return extreme, top < ZERO_GROUP


class SymmetricSearch:
    """``make_qx_quants``: the best of 19 scales, with three independent candidates computed at a time."""

    ABREAST = 3

    def __init__(self, k: Lanes, form: Symmetric) -> None:
        self.k, self.form = k, form
        f32 = np.float32
        steps = [-(f32(form.n_max) + f32(0.1) * f32(step)) for step in range(-9, 10) if step]
        self.numerators, self.n_steps = k.constants(steps), len(steps)

    def fit(self, x: Rows, weights: Rows | None) -> SymmetricFit:
        """The best scale of each lane's block; without weights each weight counts by its square."""
        k, form = self.k, self.form
        extreme, zero = extreme_weight(k, x, form.n)
        inverse = -float(form.n_max) / extreme
        ((sum_lx, sum_l2),) = self._sums(x, weights, [inverse])
        scale = k.where(sum_l2.differs(0.0), sum_lx / sum_l2, 0.0)
        best = [k.variable(value) for value in (scale, scale * sum_lx, inverse)]
        with k.loop(self.n_steps // self.ABREAST) as turn:
            tried = [self.numerators[turn * self.ABREAST + i] / extreme for i in range(self.ABREAST)]
            for inverse, (sum_lx, sum_l2) in zip(tried, self._sums(x, weights, tried), strict=True):
                better = (sum_l2 > 0.0) & (sum_lx * sum_lx > best[1].get() * sum_l2)
                scale = sum_lx / sum_l2
                for variable, value in zip(best, (scale, scale * sum_lx, inverse), strict=True):
                    variable.set(k.where(better, value, variable.get()))
        scale, _, inverse = (variable.get() for variable in best)
        return SymmetricFit(k, form, x, k.where(zero, 0.0, scale), inverse, zero)

    def _sums(self, x: Rows, weights: Rows | None, tried: list[Value]) -> list[tuple[Value, Value]]:
        k = self.k
        sums = [(k.f32(0.0), k.f32(0.0)) for _ in tried]
        for i in range(self.form.n):
            weight = x[i] * x[i] if weights is None else weights[i]
            weighted_x = weight * x[i]
            for c, inverse in enumerate(tried):
                level = symmetric_level(k, inverse * x[i], self.form.n_max)
                sum_lx, sum_l2 = sums[c]
                sums[c] = sum_lx + weighted_x * level, sum_l2 + weight * level * level
        return sums


def refine_abreast(k: Lanes, blocks: Sequence[tuple[Rows, Rows]], form: Symmetric) -> list[Value]:
    """``make_q3_quants``: scales of several blocks (weights, and rows for their integer levels).

    Each block is one long chain of dependent divisions, so several are solved in step.
    """
    solvers = [_Refinement(k, x, levels, form) for x, levels in blocks]
    changed = k.variable(~k.false())
    with k.loop(5), k.when(k.any(changed.get())):
        # a lane without a change in one sweep has none in the next: it needs no break of its own
        changed.set(k.false())
        for i in range(form.n):
            for solver in solvers:
                changed.set(changed.get() | solver.improve(i))
    return [solver.result() for solver in solvers]


class _Refinement:
    """One block of ``make_q3_quants``; its levels are floats in scratch until the end."""

    def __init__(self, k: Lanes, x: Rows, levels: Rows, form: Symmetric) -> None:
        self.k, self.x, self.levels, self.form = k, x, levels, form
        self.current = k.float_rows(form.n)
        extreme, self.zero = extreme_weight(k, x, form.n)
        inverse = -float(form.n_max) / extreme
        sum_lx = sum_l2 = k.f32(0.0)
        for i in range(form.n):
            level = symmetric_level(k, inverse * x[i], form.n_max)
            self.current[i] = level
            weight = x[i] * x[i]
            sum_lx = sum_lx + weight * x[i] * level
            sum_l2 = sum_l2 + weight * level * level
        self.sum_lx, self.sum_l2 = k.variable(sum_lx), k.variable(sum_l2)

    def improve(self, i: int) -> Value:
        """Move level ``i`` to its best value; returns the lanes in which it changed."""
        k, x, n_max = self.k, self.x[i], self.form.n_max
        sum_lx, sum_l2, level = self.sum_lx.get(), self.sum_l2.get(), self.current[i]
        weight = x * x
        weighted_x = weight * x
        rest_lx, rest_l2 = sum_lx - weighted_x * level, sum_l2 - weight * level * level
        moved = k.clamp(k.nearest_int(x * rest_l2 / rest_lx), -n_max, n_max - 1).to_float()
        new_lx, new_l2 = rest_lx + weighted_x * moved, rest_l2 + weight * moved * moved
        better = (rest_lx > 0.0) & moved.differs(level) & (new_l2 > 0.0)
        better = better & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
        self.current[i] = k.where(better, moved, level)
        self.sum_lx.set(k.where(better, new_lx, sum_lx))
        self.sum_l2.set(k.where(better, new_l2, sum_l2))
        return better

    def result(self) -> Value:
        """Store the levels and give the scale; zeros where all weights are."""
        k, sum_l2 = self.k, self.sum_l2.get()
        for i in range(self.form.n):
            self.levels[i] = k.where(self.zero, 0, self.current[i].to_int() + self.form.n_max)
        scale = k.where(sum_l2 > 0.0, self.sum_lx.get() / sum_l2, 0.0)
        return k.where(self.zero, 0.0, scale)


def positive_fits(
    k: Lanes, problems: tuple[Rows, ...], weights: Rows, n: int, n_max: int
) -> list[tuple[Value, list[Value]]]:
    """``make_qp_quants`` of each problem's ``n`` rows: its scale and its levels (integers, as uint8).

    The problems are independent and solved in step, because each is one long chain of dependent divisions.
    """
    solvers = [_Positive(k, rows, weights, n, n_max) for rows in problems]
    changed = k.variable(~k.false())
    with k.loop(5), k.when(k.any(changed.get())):
        # a lane without a change in one sweep has none in the next: it needs no break of its own
        changed.set(k.false())
        for i in range(n):
            for solver in solvers:
                changed.set(changed.get() | solver.improve(i))
    return [solver.result() for solver in solvers]


class _Positive:
    """One search for a positive scale over a column of values."""

    def __init__(self, k: Lanes, x: Rows, weights: Rows, n: int, n_max: int) -> None:
        self.k, self.x, self.weights, self.n, self.n_max = k, x, weights, n, n_max
        top = k.f32(0.0)
        for i in range(n):
            top = k.larger(top, x[i])
        self.zero = top < ZERO_GROUP
        inverse = self._coarse(top)
        self.levels = k.int_rows(n)
        sum_lx = sum_l2 = k.f32(0.0)
        for i in range(n):
            level = k.smaller(k.nearest_int(inverse * x[i]), n_max)
            self.levels[i] = level & 0xFF
            sum_lx = sum_lx + weights[i] * x[i] * level.to_float()
            sum_l2 = sum_l2 + weights[i] * level.to_float() * level.to_float()
        self.sum_lx, self.sum_l2 = k.variable(sum_lx), k.variable(sum_l2)

    def _coarse(self, top: Value) -> Value:
        k, f32 = self.k, np.float32
        inverse = float(self.n_max) / top
        scale = 1.0 / inverse
        best_error = k.f32(0.0)
        for i in range(self.n):
            level = (k.nearest_int(inverse * self.x[i]) & 0xFF).to_float()
            difference = self.x[i] - scale * level
            best_error = best_error + self.weights[i] * difference * difference
        best, best_inverse = k.variable(best_error), k.variable(inverse)
        steps = [f32(f32(0.1) * f32(i)) + f32(self.n_max) for i in range(-4, 5) if i]
        numerators = k.constants(steps)
        with k.loop(len(steps)) as turn:
            tried = numerators[turn] / top
            scale, error = 1.0 / tried, k.f32(0.0)
            for i in range(self.n):
                level = k.smaller(k.nearest_int(tried * self.x[i]), self.n_max).to_float()
                difference = self.x[i] - scale * level
                error = error + self.weights[i] * difference * difference
            better = error < best.get()
            best_inverse.set(k.where(better, tried, best_inverse.get()))
            best.set(k.where(better, error, best.get()))
        return best_inverse.get()

    def improve(self, i: int) -> Value:
        """Move level ``i`` to its best value; returns the lanes in which it changed."""
        k, x, weight = self.k, self.x[i], self.weights[i]
        sum_lx, sum_l2, level = self.sum_lx.get(), self.sum_l2.get(), self.levels[i]
        rest_lx = sum_lx - weight * x * level.to_float()
        rest_l2 = sum_l2 - weight * level.to_float() * level.to_float()
        moved = k.smaller(k.nearest_int(x * rest_l2 / rest_lx), self.n_max)
        new_lx = rest_lx + weight * x * moved.to_float()
        new_l2 = rest_l2 + weight * moved.to_float() * moved.to_float()
        better = (rest_lx > 0.0) & (rest_l2 > 0.0) & moved.differs(level)
        better = better & (new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2)
        self.levels[i] = k.where(better, moved & 0xFF, level)
        self.sum_lx.set(k.where(better, new_lx, sum_lx))
        self.sum_l2.set(k.where(better, new_l2, sum_l2))
        return better

    def result(self) -> tuple[Value, list[Value]]:
        """The scale and the levels; zeros where all values are."""
        k, sum_l2 = self.k, self.sum_l2.get()
        scale = k.where(sum_l2 > 0.0, self.sum_lx.get() / sum_l2, 0.0)
        levels = [k.where(self.zero, 0, self.levels[i]) for i in range(self.n)]
        return k.where(self.zero, 0.0, scale), levels
