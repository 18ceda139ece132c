"""Shared by Q4_0, Q4_1, Q5_0 and Q5_1: one scale (and minimum) for 32 weights, searched only with importances.

Follows ``quantize_row_q4_0_ref``, ``quantize_row_q4_0_impl`` and their siblings in ``ggml/src/ggml-quants.c``.
"""

from __future__ import annotations

from ggufmoe.quant.kernels.lanes import Lanes, Rows, Value
from ggufmoe.quant.kernels.searches import (
    Affine,
    AffineSearch,
    Symmetric,
    SymmetricSearch,
    affine_level,
    extreme_weight,
)
from ggufmoe.quant.kernels.superblocks import spread_importance
from ggufmoe.quant.kernels.tiles import Tiles

BLOCK = 32


def symmetric_block(k: Tiles, x: Rows, importance: Rows | None, n_max: int) -> tuple[Value, list[Value]]:
    """Scale and levels (integers) of ``x ~ d * (level - nmax)``."""
    if importance is None:
        extreme, _ = extreme_weight(k, x, BLOCK)
        d = extreme / -float(n_max)
        inverse = inverse_or_odd(k, d)
        levels = [(x[i] * inverse + (n_max + 0.5)).to_int() for i in range(BLOCK)]
        return d, [k.smaller(level, 2 * n_max - 1) for level in levels]
    rows = k.int_rows(BLOCK)
    fit = SymmetricSearch(k, Symmetric(BLOCK, n_max)).fit(x, _weights(k, x, importance))
    fit.store_levels(rows)
    return fit.scale, [rows[i] for i in range(BLOCK)]


def affine_block(k: Tiles, x: Rows, importance: Rows | None, n_max: int) -> tuple[Value, Value, list[Value]]:
    """Scale, minimum and levels (integers) of ``x ~ d * level + minimum``."""
    if importance is None:
        low = high = x[0]
        for i in range(1, BLOCK):
            low, high = k.smaller(x[i], low), k.larger(x[i], high)
        d = (high - low) / float(n_max)
        inverse = inverse_or_odd(k, d)
        levels = [((x[i] - low) * inverse + 0.5).to_int() for i in range(BLOCK)]
        return d, low, [k.smaller(level, n_max) for level in levels]
    search = AffineSearch(k, Affine(BLOCK, n_max, -0.9, 0.05, 36))
    (fit,) = search.fit([(x, _weights(k, x, importance))])
    levels = [affine_level(k, x[i], fit.inverse, fit.low, n_max).to_int() for i in range(BLOCK)]
    return fit.scale, -fit.minimum, levels


def inverse_or_odd(k: Lanes, d: Value) -> Value:
    """``d ? 1/d : 0``; marks lanes odd whose scale or its inverse is not finite."""
    inverse = k.where(d.differs(0.0), 1.0 / d, 0.0)
    infinity = float("inf")
    k.mark_odd(~((k.magnitude(inverse) < infinity) & (k.magnitude(d) < infinity)))
    return inverse


def _weights(k: Tiles, x: Rows, importance: Rows) -> Rows:
    weights = k.float_rows(BLOCK)
    spread_importance(k, x, importance, k.row_energies(), weights, BLOCK)
    return weights
