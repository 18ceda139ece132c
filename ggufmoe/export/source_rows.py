"""Rows that differ from those of a checkpoint: reordered for rotary embeddings, or computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.checkpoint.source import Dtype, SourceTensor
from ggufmoe.writing.plan import Part


def source_part(tensor: SourceTensor) -> Part:
    """A tensor of a model source as a part of a planned tensor."""
    source_row = tensor.source_row if isinstance(tensor, RopeOrdered) else int
    return Part(tensor, tensor.dtype.ggml_type, source_row)


class RopeOrdered:
    """Rows of a query or key projection in llama.cpp's order; a ``SourceTensor``.

    transformers rotates row i of the first half of a head with row i of the second half, llama.cpp each row with the
    next: within a head, rows (i, half + i) become rows (2 i, 2 i + 1). Source: ``permute`` of ``conversion/llama.py``.
    """

    def __init__(self, source: SourceTensor, head_dim: int) -> None:
        self.name = source.name
        self.dtype = source.dtype
        self.shape = source.shape
        self._source = source
        self._head_dim = head_dim

    def source_row(self, row: int) -> int:
        """The row of the source that is read as ``row``."""
        head, place = divmod(row, self._head_dim)
        return head * self._head_dim + place % 2 * (self._head_dim // 2) + place // 2

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out`` (stop - start, n_cols) with rows [start, stop); safe from several threads at once."""
        head = self._head_dim
        first, last = min(stop, -(-start // head) * head), stop - stop % head
        if first < last:
            self._read_heads(first, last, out[first - start : last - start])
        for begin, end in ((start, first), (max(first, last), stop)):
            if begin < end:
                self._read_within_head(begin, end, out[begin - start : end - start])

    def _read_heads(self, start: int, stop: int, out: NDArray[Any]) -> None:
        rows: NDArray[Any] = np.empty(out.shape, out.dtype)
        self._source.read_rows(start, stop, rows)
        half, n_cols = self._head_dim // 2, out.shape[1]
        out.reshape(-1, half, 2, n_cols)[...] = rows.reshape(-1, 2, half, n_cols).swapaxes(1, 2)

    def _read_within_head(self, start: int, stop: int, out: NDArray[Any]) -> None:
        for first in (start, start + 1):
            n_rows = len(range(first, stop, 2))
            if n_rows == 0:
                continue
            begin = self.source_row(first)
            rows: NDArray[Any] = np.empty((n_rows, out.shape[1]), out.dtype)
            self._source.read_rows(begin, begin + n_rows, rows)
            out[first - start :: 2] = rows


class Computed:
    """A small float32 vector that is computed and not read; a ``SourceTensor`` of one row."""

    dtype = Dtype.F32

    def __init__(self, name: str, values: Sequence[float]) -> None:
        self.name = name
        self.shape = (len(values),)
        self._values = np.array(values, dtype=np.float32)

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out`` (1, n) with the vector."""
        out[...] = self._values[None][start:stop]
