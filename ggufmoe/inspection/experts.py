"""Similarity of a model's experts: cosines between their weights, layer by layer, from a sample of rows.

Experts of a merge that come from one base are nearly the same; experts that were trained together are not. A few rows
are read at a time, the same ones of every expert, so memory does not grow with the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import InputError
from ggufmoe.gguf.names import expert_matrix, is_expert_stack, legacy_experts
from ggufmoe.gguf.stored_rows import GGUFRows, OpenModel
from ggufmoe.native.quantizing import can_widen, widened
from ggufmoe.work import CancelFlag, OnProgress, Work

SAMPLED_ROWS = 256
"""Of each expert's matrix, spread evenly over it."""
_BLOCK_ROWS = 8
_TILE_WEIGHTS = 2**21

Cosines = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class MatrixSimilarity:
    """One kind of matrix in one layer. ``kind``: gate, up, down, gate_up, or router, which has a row for each expert.

    ``cosines``: (n_expert, n_expert), symmetric with a diagonal of ones; NaN where an expert's weights are all zero.
    ``n_rows`` of the ``of_rows`` rows of each expert were compared.
    """

    layer: int
    kind: str
    cosines: Cosines
    n_rows: int
    of_rows: int

    @property
    def pairs(self) -> Cosines:
        """The cosine of each pair of experts, once."""
        pairs: Cosines = self.cosines[np.triu_indices(len(self.cosines), 1)]
        return pairs


@dataclass(frozen=True, eq=False)
class ExpertSimilarity:
    """The similarity of experts in all matrices of a model, by layer and kind; ``mean`` excludes the routers."""

    n_expert: int
    matrices: tuple[MatrixSimilarity, ...]

    @property
    def mean(self) -> Cosines:
        """Mean of the cosines over layers and kinds without routers: (n_expert, n_expert)."""
        own = [matrix.cosines for matrix in self.matrices if matrix.kind != "router"]
        mean: Cosines = np.mean(own, axis=0)
        return mean

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of matrices that were compared, the router last."""
        return tuple(dict.fromkeys(matrix.kind for matrix in sorted(self.matrices, key=_place)))

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have experts."""
        return tuple(sorted({matrix.layer for matrix in self.matrices}))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: every cosine, rounded to eight digits."""
        return {
            "n_expert": self.n_expert,
            "mean": _rounded(self.mean),
            "matrices": [
                {
                    "layer": matrix.layer,
                    "kind": matrix.kind,
                    "rows": matrix.n_rows,
                    "of_rows": matrix.of_rows,
                    "cosines": _rounded(matrix.cosines),
                }
                for matrix in self.matrices
            ],
        }


def compare_experts(
    path: Path,
    *,
    n_rows: int = SAMPLED_ROWS,
    n_threads: int | None = None,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
) -> ExpertSimilarity:
    """Cosines between the experts of a GGUF file, from ``n_rows`` rows of each matrix (all of them where it has fewer).

    Raises InputError for a model without stacked experts, GGUFError where the file cannot be read, Cancelled when
    ``cancel`` is set meanwhile.
    """
    with OpenModel(path) as files:
        stacks = [rows for rows in files.tensors.values() if _is_comparable(rows)]
        if not any(is_expert_stack(stack.name) for stack in stacks):
            old = legacy_experts(files.tensors)
            hint = "its experts stand in tensors of their own; stack them with `ggufmoe quantize -q COPY`"
            raise InputError(f"{path}: {hint if old else 'a dense model: it has no experts to compare'}")
        n_bytes = sum(len(_sampled_rows(stack, n_rows)) * stack.shape[0] * stack.row_bytes for stack in stacks)
        stopped = "comparing experts was stopped"
        work = Work("compare experts", n_bytes, stopped=stopped, on_progress=on_progress, cancel=cancel)
        matrices = work.map(lambda stack: _similarity(stack, n_rows, work), stacks, n_threads)
    return ExpertSimilarity(len(matrices[0].cosines), tuple(sorted(matrices, key=_place)))


def _is_comparable(rows: GGUFRows) -> bool:
    matrix, n_dims = expert_matrix(rows.name), len(rows.shape)
    return matrix is not None and n_dims == (2 if matrix.kind == "router" else 3) and can_widen(rows.type)


def _place(matrix: MatrixSimilarity) -> tuple[int, int]:
    return matrix.layer, ("gate", "gate_up", "up", "down", "router").index(matrix.kind)


def _sampled_rows(stack: GGUFRows, n_rows: int) -> list[int]:
    """The rows of one expert that are compared: blocks of neighbours, spread evenly over the matrix."""
    n_all = stack.n_rows // stack.shape[0]
    if n_all <= n_rows:
        return list(range(n_all))
    n_blocks = max(1, n_rows // _BLOCK_ROWS)
    size = min(_BLOCK_ROWS, n_rows)
    starts = (i * (n_all - size) // max(1, n_blocks - 1) for i in range(n_blocks))
    return sorted({row for start in starts for row in range(start, start + size)})


def _similarity(stack: GGUFRows, n_rows: int, work: Work) -> MatrixSimilarity:
    n_expert, rows = stack.shape[0], _sampled_rows(stack, n_rows)
    n_all = stack.n_rows // n_expert
    gram = np.zeros((n_expert, n_expert))
    for start, stop in _runs(rows, max(1, _TILE_WEIGHTS // (n_expert * stack.n_cols))):
        work.check()
        raw = [stack.read(expert * n_all + start, expert * n_all + stop) for expert in range(n_expert)]
        values = np.stack([widened(stack.type, part, stack.n_cols).reshape(-1) for part in raw])
        gram += values @ values.T
        work.advance(sum(part.nbytes for part in raw), stack.name)
    matrix = expert_matrix(stack.name)
    assert matrix is not None, "only such tensors are compared"
    return MatrixSimilarity(matrix.layer, matrix.kind, _cosines(gram), len(rows), n_all)


def _runs(rows: list[int], longest: int) -> Iterable[tuple[int, int]]:
    """Ranges [start, stop) of consecutive row numbers, of at most ``longest`` rows."""
    start = previous = rows[0]
    for row in rows[1:]:
        if row != previous + 1 or row - start >= longest:
            yield start, previous + 1
            start = row
        previous = row
    yield start, previous + 1


def _cosines(gram: Cosines) -> Cosines:
    lengths = np.sqrt(np.diag(gram))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines: Cosines = np.clip(gram / np.outer(lengths, lengths), -1, 1)
    return cosines


def _rounded(values: Cosines) -> list[list[float | None]]:
    return [[None if value != value else round(float(value), 8) for value in row] for row in values]
