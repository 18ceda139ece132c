"""Collects the sums of squared inputs of every weight matrix, per expert, while llama.cpp computes a text.

The inputs are read in place and squared in single precision; the sums over a text are in double precision.
Source: ``tools/imatrix/imatrix.cpp`` of llama.cpp at the pinned commit, which sums in single precision throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.engine import Engine
from ggufmoe.errors import EngineError
from ggufmoe.gguf.names import OUTPUT, layer_of
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import graph_tensors
from ggufmoe.native.graph_tensors import Operation
from ggufmoe.native.wording import weight_of_copy
from ggufmoe.runtime.observer import Observer
from ggufmoe.work import CancelFlag

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

_MIN_ROWS = 16
"""llama-imatrix ignores matrix products with fewer rows; products of experts are counted whatever their size."""


class ActivationSums(Observer):
    """Observes the matrix products of a graph; ``commit`` adds what was observed to the sums, ``drop`` discards it."""

    def __init__(self, stop: Callable[[], None], *, process_output: bool = False) -> None:
        super().__init__(stop)
        self._process_output = process_output
        self._pending: dict[str, tuple[Doubles, Doubles]] = {}
        self._sums: dict[str, tuple[Doubles, Doubles]] = {}

    @property
    def entries(self) -> Mapping[str, tuple[Doubles, Doubles]]:
        """Name of the weight to sums (n, n_columns) and token counts (n,), float64; n is 1 or the number of experts."""
        return self._sums

    def wants(self, tensor: int) -> bool:
        operation = graph_tensors.tensor_operation(tensor)
        if operation == Operation.MUL_MAT_ID:
            return True
        if operation != Operation.MUL_MAT:
            return False
        weights, inputs = graph_tensors.tensor_sources(tensor)[:2]
        if graph_tensors.tensor_shape(inputs)[2] < _MIN_ROWS or not graph_tensors.tensor_type_is(inputs, GGMLType.F32):
            return False
        name = _weight_name(weights)
        return layer_of(name) is not None or (self._process_output and name == OUTPUT)

    def take(self, tensor: int) -> None:
        weights, inputs, *chosen = graph_tensors.tensor_sources(tensor)
        shape = graph_tensors.tensor_shape(weights)
        values = graph_tensors.tensor_values(inputs, copy=False)
        if graph_tensors.tensor_operation(tensor) == Operation.MUL_MAT_ID:
            experts = graph_tensors.tensor_values(chosen[0])[0, 0]
            seen = _by_expert(values[0], experts, shape[1])
        else:
            seen = _by_matrix(values, shape[:2])
        _add(self._pending, _weight_name(weights), seen)

    def commit(self) -> None:
        """Add the observed values to the sums. Raises EngineError if one of them is NaN or infinite."""
        for name, seen in self._pending.items():
            if not np.isfinite(seen[0]).all():
                raise EngineError(f"the inputs of {name} are NaN or infinite: the model cannot compute this text")
            _add(self._sums, name, seen)
        self._pending.clear()

    def drop(self) -> None:
        """Discard the values observed since the last ``commit``."""
        self._pending.clear()


def collect(
    engine: Engine, chunks: Sequence[Sequence[int]], sums: ActivationSums, cancel: CancelFlag | None = None
) -> Iterator[int]:
    """Compute ``chunks`` and add their activations to ``sums``; yield the number of completed chunks after each step.

    An incomplete chunk is not counted. Ends early when ``cancel`` is set. Overwrites the engine's KV cache. Raises
    DecodeError for a model that computes NaN, also where no observed matrix comes after the one that is broken.
    """
    n_tokens = max(map(len, chunks), default=0)
    with engine.observed(sums), sums.checked():
        # with logits on all rows, the last layer computes all rows as well
        for part in engine.compute_chunks(chunks, 0, cancel=cancel):
            sums.check()
            for number in part.group:
                part.logits(number)  # raises DecodeError for rows that are NaN
            if part.end == n_tokens:
                sums.commit()
                yield part.group.stop
    # llama.cpp may compute a cancelled part to its end, so values are dropped after the observer is removed
    sums.drop()


def _weight_name(tensor: int) -> str:
    return weight_of_copy(graph_tensors.tensor_name(tensor).decode("utf-8", "replace"))


def _by_expert(inputs: Floats, experts: NDArray[np.int32], n_expert: int) -> tuple[Doubles, Doubles]:
    """Sums of squares and token counts of each expert.

    ``inputs`` is (tokens, 1 or n_used, columns), ``experts`` (tokens, n_used).
    """
    n_inputs, n_columns = inputs.shape[1:]
    rows = inputs.reshape(-1, n_columns)
    at = np.arange(len(experts))[:, None] * n_inputs + np.arange(experts.shape[1]) % n_inputs
    sums, counts = np.zeros((n_expert, n_columns)), np.zeros(n_expert)
    for expert in np.unique(experts):
        given = rows[at[experts == expert]]
        # einsum does not use BLAS, whose threads would wait for those of llama.cpp
        sums[expert] = np.einsum("rc,rc->c", given, given)
        counts[expert] = len(given)
    return sums, counts


def _by_matrix(inputs: Floats, n_matrices: tuple[int, ...]) -> tuple[Doubles, Doubles]:
    """Sums of squares and the token count of a plain matrix or a stack of matrices, which has one count.

    ``inputs`` is (n3, n2, rows, columns); the matrices are broadcast over the first two dimensions.
    """
    squares = np.einsum("abrc,abrc->abc", inputs, inputs)
    outer, inner = n_matrices
    sums = np.zeros((outer, inner, inputs.shape[3]))
    for i, j in np.ndindex(squares.shape[:2]):
        sums[i % outer, j % inner] += squares[i, j]
    count = np.array([inputs[..., 0].size // (outer * inner)], np.float64)
    return sums.reshape(1, -1), count


def _add(sums: dict[str, Any], name: str, seen: tuple[Doubles, Doubles]) -> None:
    if name in sums:
        for total, part in zip(sums[name], seen, strict=True):
            total += part
    else:
        sums[name] = seen
