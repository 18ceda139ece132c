"""Shared by the K formats: superblocks of 256 weights in blocks of 16 or 32, whose scales are quantized as well.

Searches all blocks of a superblock, and rounds weights to their final levels.
The arithmetic is that of the ``quantize_row_*_K`` routines in ``ggml/src/ggml-quants.c``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ggufmoe.quant.kernels.lanes import Index, Lanes, Rows, Value
from ggufmoe.quant.kernels.searches import Affine, AffineSearch, affine_level

WEIGHTS = 256
ABREAST = 2
PlainWeights = Callable[[Lanes, Rows, Rows, int], None]


@dataclass(frozen=True)
class Importance:
    """Importances of the weights, and the sigma^2 that spreads them."""

    rows: Rows
    energy: Value


@dataclass(frozen=True)
class Fits:
    """The result of the search for each block, and the sum of its weights' importances (if there are any)."""

    form: Affine
    scale: Rows
    minimum: Rows
    inverse: Rows
    low: Rows
    weight: Rows


def fit_blocks(k: Lanes, x: Rows, form: Affine, weigh: PlainWeights | Importance) -> Fits:
    """Search every block of the superblock, with weights computed from x or from importances."""
    n_blocks = WEIGHTS // form.n
    fits = Fits(form, *(k.float_rows(n_blocks) for _ in range(5)))
    search, weights = AffineSearch(k, form), [k.float_rows(form.n) for _ in range(ABREAST)]
    with k.loop(n_blocks // ABREAST) as turn:
        numbers = [turn * ABREAST + i for i in range(ABREAST)]
        blocks = [x.at(j * form.n) for j in numbers]
        for j, block, rows in zip(numbers, blocks, weights, strict=True):
            if isinstance(weigh, Importance):
                fits.weight[j] = spread_importance(k, block, weigh.rows.at(j * form.n), weigh.energy, rows, form.n)
            else:
                weigh(k, block, rows, form.n)
        for j, fit in zip(numbers, search.fit(list(zip(blocks, weights, strict=True))), strict=True):
            fits.scale[j], fits.minimum[j] = fit.scale, fit.minimum
            fits.inverse[j], fits.low[j] = fit.inverse, fit.low
    return fits


def spread_importance(k: Lanes, x: Rows, importance: Rows, energy: Value, weights: Rows, n: int) -> Value:
    """Write ``weight = qw * sqrtf(sigma2 + x*x)`` and return the sum of the weights."""
    total = k.f32(0.0)
    for i in range(n):
        weights[i] = importance[i] * k.square_root(energy + x[i] * x[i])
        total = total + weights[i]
    return total


def sum_of_squares(k: Lanes, x: Rows, n: int) -> Value:
    """The sum of the squares of ``n`` rows, added in order."""
    total = k.variable(k.f32(0.0))
    step = min(n, 32)
    with k.loop(n // step) as turn:
        part = x.at(turn * step)
        for i in range(step):
            total.set(total.get() + part[i] * part[i])
    return total.get()


def affine_levels(k: Lanes, x: Rows, step: Value, offset: Value, fits: Fits, block: Index, levels: Rows) -> None:
    """Round a block's weights to ``(x + offset) / step``; where the step is 0 the search's levels stay."""
    form, inverse, low = fits.form, fits.inverse[block], fits.low[block]
    for i in range(form.n):
        levels[i] = k.clamp(k.nearest_int((x[i] + offset) / step), 0, form.n_max)
    unset = step.equals(0.0)
    with k.when(k.any(unset)):
        for i in range(form.n):
            kept = affine_level(k, x[i], inverse, low, form.n_max).to_int()
            levels[i] = k.where(unset, kept, levels[i])


def symmetric_levels(k: Lanes, x: Rows, step: Value, n: int, n_max: int, levels: Rows) -> None:
    """Round a block's weights to ``x / step + nmax``; where the step is 0 the levels stay as they are."""
    unset = step.equals(0.0)
    for i in range(n):
        level = k.clamp(k.nearest_int(x[i] / step), -n_max, n_max - 1) + n_max
        levels[i] = k.where(unset, levels[i], level)


def largest(k: Lanes, rows: Rows, n: int) -> Value:
    """The largest of ``n`` rows, at least 0; NaN is ignored."""
    top = k.f32(0.0)
    for j in range(n):
        top = k.larger(rows[j], top)
    return top


def largest_magnitude(k: Lanes, values: Rows, n: int) -> tuple[Value, Value]:
    """The value of largest magnitude (the first of equal ones) and its magnitude; 0 if all values are 0."""
    top = extreme = k.f32(0.0)
    for j in range(n):
        magnitude = k.magnitude(values[j])
        extreme = k.where(magnitude > top, values[j], extreme)
        top = k.larger(magnitude, top)
    return extreme, top
