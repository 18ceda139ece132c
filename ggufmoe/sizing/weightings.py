"""How much an error in each weight of a stored tensor matters: products of a factor of its row and one of its column.

Derived from a ``Sensitivity``. An output that is the token embedding counts in both roles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import InputError
from ggufmoe.gguf.names import OUTPUT, TOKEN_EMBEDDING
from ggufmoe.sizing.sensitivity_file import MatrixSensitivity, Sensitivity


@dataclass(frozen=True, eq=False)
class Weighting:
    """The predicted divergence of an error E of a matrix is the sum of ``rows[i] * columns[j] * E[i, j] ** 2``.

    In nats a token; half, and the share of tokens that reach the matrix, are in ``rows``.
    """

    rows: NDArray[np.float64]
    """(rows,) float64"""
    columns: NDArray[np.float32]
    """(columns,) float32"""


def weightings(
    sensitivity: Sensitivity, name: str, shape: Sequence[int], *, is_tied: bool
) -> tuple[tuple[Weighting, ...], ...]:
    """The weightings of each matrix of a tensor, whose sum counts; ``shape`` is in numpy's order.

    ``is_tied`` says whether the token embedding is the output as well. An expert that no token reached gets the mean of
    the others and the share of a single token. Raises InputError if the sensitivity has nothing for the tensor, or is
    of another model.
    """
    n_rows, n_cols = (int(size) for size in shape[-2:])
    n_matrices = int(np.prod(shape[:-2], dtype=np.int64))
    if name == TOKEN_EMBEDDING:
        stored, counts = sensitivity.embedding.grad_sum2, sensitivity.embedding.row_counts
        if counts.shape != (n_rows,) or stored.shape != (n_cols,):
            raise _other_model(name, (len(counts), len(stored)), (n_rows, n_cols))
        n = float(sensitivity.n_tokens)
        lookup = Weighting(0.5 * counts.astype(np.float64) / n, (stored / np.float32(n)).astype(np.float32))
        return ((lookup, *_products(sensitivity, OUTPUT, 1, n_rows, n_cols)[0]) if is_tied else (lookup,),)
    return _products(sensitivity, name, n_matrices, n_rows, n_cols)


def _products(
    sensitivity: Sensitivity, name: str, n_matrices: int, n_rows: int, n_cols: int
) -> tuple[tuple[Weighting, ...], ...]:
    """The weighting of each matrix that multiplies."""
    matrix = sensitivity.matrices.get(name)
    if matrix is None:
        raise InputError(
            f"the sensitivity has nothing for {name}; make it from this very model, or give the tensor a type with "
            "--tensor-type"
        )
    found = (len(matrix.counts), matrix.grad_sum2.shape[-1], matrix.in_sum2.shape[-1])
    if found != (n_matrices, n_rows, n_cols):
        raise _other_model(name, found, (n_matrices, n_rows, n_cols))
    gradients, inputs, share = _means(matrix, sensitivity.n_tokens)
    return tuple((Weighting(0.5 * share[i] * gradients[i], inputs[i].astype(np.float32)),) for i in range(n_matrices))


def _means(
    matrix: MatrixSensitivity, n_tokens: int
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean squared gradients (n, rows) and inputs (n, columns) of a token, and the share of tokens of each matrix."""
    counts = matrix.counts.astype(np.float64)
    reached = counts > 0
    divisors = np.maximum(counts, 1)[:, None]
    gradients, inputs = (sums.astype(np.float64) / divisors for sums in (matrix.grad_sum2, matrix.in_sum2))
    if reached.any():
        gradients[~reached], inputs[~reached] = gradients[reached].mean(axis=0), inputs[reached].mean(axis=0)
    return gradients, inputs, np.maximum(counts, 1) / n_tokens


def _other_model(name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> InputError:
    return InputError(
        f"the sensitivity has {name} as {' x '.join(map(str, found))}, expected {' x '.join(map(str, expected))}; "
        "make it from this very model"
    )
