"""Rows that differ from those of a checkpoint: in another order, picked, transposed, changed in value, or computed.

Each class is a ``SourceTensor`` over another one and holds no weights. Families choose among them for the transforms of
their tensors (``families.family.TensorRule.transform``), and checkpoints for layouts on disk.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.weights.byte_ranges import ByteRange, byte_ranges
from ggufmoe.weights.dtypes import read_f32, row_count
from ggufmoe.weights.source_tensor import Dtype, SourceTensor

_CHUNK_BYTES = 8 << 20
"""Bytes of source rows that a view holds at once where it has to read more than it gives."""

_MOST_READ = 4
"""How many rows may be read for each one that is wanted, rather than reading each by itself."""


class ReorderedRows(ABC):
    """A view whose rows are whole rows of its source, each from another place."""

    def __init__(self, source: SourceTensor, shape: tuple[int, ...]) -> None:
        self.name = source.name
        self.dtype = source.dtype
        self.shape = shape
        self._source = source

    @abstractmethod
    def source_row(self, row: int) -> int:
        """The row of the source that is read as ``row``."""

    @abstractmethod
    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out`` (stop - start, n_cols) with rows [start, stop); safe from several threads at once."""

    @abstractmethod
    def source_runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The runs of rows [first, last) of the source that ``read_rows`` reads."""

    def byte_ranges(self, start: int, stop: int) -> Iterator[ByteRange]:
        """What ``read_rows`` reads."""
        for first, last in self.source_runs(start, stop):
            yield from byte_ranges(self._source, first, last)


class RopeOrdered(ReorderedRows):
    """Rows of a query or key projection in llama.cpp's order.

    transformers rotates row i of the first half of a head with row i of the second half, llama.cpp each row with the
    next: within a head, rows (i, half + i) become rows (2 i, 2 i + 1). Source: ``permute`` of ``conversion/llama.py``.
    """

    def __init__(self, source: SourceTensor, head_dim: int) -> None:
        super().__init__(source, source.shape)
        self._head_dim = head_dim

    def source_row(self, row: int) -> int:
        """The row of the source that is read as ``row``."""
        head, place = divmod(row, self._head_dim)
        return head * self._head_dim + place % 2 * (self._head_dim // 2) + place // 2

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out`` (stop - start, n_cols) with rows [start, stop); safe from several threads at once."""
        first, last = self._whole_heads(start, stop)
        if first < last:
            self._read_heads(first, last, out[first - start : last - start])
        for begin, end in ((start, first), (max(first, last), stop)):
            if begin < end:
                self._read_within_head(begin, end, out[begin - start : end - start])

    def source_runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The runs of rows [first, last) of the source that ``read_rows`` reads."""
        first, last = self._whole_heads(start, stop)
        if first < last:
            yield first, last
        for begin, end in ((start, first), (max(first, last), stop)):
            for row in range(begin, min(begin + 2, end)):
                source_row = self.source_row(row)
                yield source_row, source_row + len(range(row, end, 2))

    def _whole_heads(self, start: int, stop: int) -> tuple[int, int]:
        """The rows of whole heads within [start, stop); from a multiple of the head's rows to the same or before."""
        head = self._head_dim
        return min(stop, -(-start // head) * head), stop - stop % head

    def _read_heads(self, start: int, stop: int, out: NDArray[Any]) -> None:
        rows: NDArray[Any] = np.empty(out.shape, out.dtype)
        self._source.read_rows(start, stop, rows)
        half, n_cols = self._head_dim // 2, out.shape[1]
        out.reshape(-1, half, 2, n_cols)[...] = rows.reshape(-1, 2, half, n_cols).swapaxes(1, 2)

    def _read_within_head(self, start: int, stop: int, out: NDArray[Any]) -> None:
        for first in range(start, min(start + 2, stop)):
            begin, n_rows = self.source_row(first), len(range(first, stop, 2))
            rows: NDArray[Any] = np.empty((n_rows, out.shape[1]), out.dtype)
            self._source.read_rows(begin, begin + n_rows, rows)
            out[first - start :: 2] = rows


class PickedRows(ReorderedRows):
    """Rows of a matrix, or of a stack of matrices seen as one, in the order of their numbers ``picked``."""

    def __init__(self, source: SourceTensor, picked: NDArray[np.int64], shape: tuple[int, ...] | None = None) -> None:
        super().__init__(source, (len(picked), source.shape[-1]) if shape is None else shape)
        assert row_count(self.shape) == len(picked), f"{self.name}: {len(picked)} rows do not fill {self.shape}"
        self._picked = picked

    def source_row(self, row: int) -> int:
        """The row of the source that is read as ``row``."""
        return int(self._picked[row])

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out`` (stop - start, n_cols) with rows [start, stop); safe from several threads at once."""
        done = 0
        for run in self._picked_runs(start, stop):
            first = int(run.min())
            raw: NDArray[Any] = np.empty((int(run.max()) + 1 - first, out.shape[1]), out.dtype)
            self._source.read_rows(first, first + len(raw), raw)
            out[done : done + len(run)] = raw[run - first]
            done += len(run)

    def source_runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The runs of rows [first, last) of the source that ``read_rows`` reads."""
        for run in self._picked_runs(start, stop):
            yield int(run.min()), int(run.max()) + 1

    def _picked_runs(self, start: int, stop: int) -> Iterator[NDArray[np.int64]]:
        """The numbers of the rows [start, stop) in pieces, of which each is read at once."""
        wanted, row_bytes = self._picked[start:stop], self.dtype.row_bytes(self.shape[-1])
        while len(wanted):
            # rows between wanted ones are read with them while they are few: one long read costs less than many
            left = wanted[: max(1, _CHUNK_BYTES // row_bytes)]
            spans = np.maximum.accumulate(left) - np.minimum.accumulate(left) + 1
            close = (spans <= _MOST_READ * np.arange(1, len(left) + 1)) & (spans * row_bytes <= _CHUNK_BYTES)
            close[0] = True
            n_rows = int(np.flatnonzero(close)[-1]) + 1
            yield left[:n_rows]
            wanted = wanted[n_rows:]


class SpacedRows(ReorderedRows):
    """The rows ``first``, ``first + step``, ... of a matrix, or of a stack of matrices seen as one."""

    def __init__(self, source: SourceTensor, shape: tuple[int, ...], *, first: int, step: int) -> None:
        super().__init__(source, shape)
        assert first + step * (row_count(shape) - 1) < row_count(source.shape), f"{source.name} is {source.shape}"
        self._first = first
        self._step = step

    def source_row(self, row: int) -> int:
        """The row of the source that is read as ``row``."""
        return self._first + self._step * row

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out`` (stop - start, n_cols) with rows [start, stop); safe from several threads at once."""
        if self._step == 1:
            self._source.read_rows(self._first + start, self._first + stop, out)
            return
        done = 0
        for first, last in self.source_runs(start, stop):
            raw: NDArray[Any] = np.empty((last - first, out.shape[1]), out.dtype)
            self._source.read_rows(first, last, raw)
            picked = raw[:: self._step]
            out[done : done + len(picked)] = picked
            done += len(picked)

    def source_runs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """The runs of rows [first, last) of the source that ``read_rows`` reads."""
        if self._step == 1:
            yield self._first + start, self._first + stop
            return
        n_at_once = max(1, _CHUNK_BYTES // (self._step * self.dtype.row_bytes(self.shape[-1])))
        for begin in range(start, stop, n_at_once):
            yield self.source_row(begin), self.source_row(min(begin + n_at_once, stop) - 1) + 1


class PickedColumns:
    """Columns of every row of its source, in the order of their numbers ``picked``."""

    def __init__(self, source: SourceTensor, picked: NDArray[np.int64]) -> None:
        self.name = source.name
        self.dtype = source.dtype
        self.shape = (*source.shape[:-1], len(picked))
        self._source = source
        self._picked = picked

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out`` (stop - start, n_cols) with rows [start, stop); safe from several threads at once."""
        raw: NDArray[Any] = np.empty((stop - start, self._source.shape[-1]), out.dtype)
        self._source.read_rows(start, stop, raw)
        out[...] = raw[:, self._picked]

    def byte_ranges(self, start: int, stop: int) -> Iterator[ByteRange]:
        """What ``read_rows`` reads."""
        return byte_ranges(self._source, start, stop)


class Transposed:
    """Every matrix of its source (..., n_rows, n_cols) transposed: (..., n_cols, n_rows).

    Each range of rows that is asked for reads the matrices that it touches whole, a chunk at a time.
    """

    def __init__(self, source: SourceTensor, shape: tuple[int, ...] | None = None) -> None:
        """``shape`` is the source's, where that has to be seen as a stack of matrices."""
        *stack, self._n_rows, self._n_cols = shape or source.shape
        assert prod(shape or source.shape) == prod(source.shape), f"{source.name} is {source.shape}, not {shape}"
        self.name = source.name
        self.dtype = source.dtype
        self.shape = (*stack, self._n_cols, self._n_rows)
        self._source = source

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out`` (stop - start, n_cols) with rows [start, stop); safe from several threads at once."""
        n_at_once = max(1, _CHUNK_BYTES // (self._n_cols * out.itemsize))
        while start < stop:
            matrix, column = divmod(start, self._n_cols)
            end = min(stop, (matrix + 1) * self._n_cols)
            here, out = out[: end - start], out[end - start :]
            for first in range(0, self._n_rows, n_at_once):
                last = min(first + n_at_once, self._n_rows)
                raw: NDArray[Any] = np.empty((last - first, self._n_cols), here.dtype)
                self._source.read_rows(matrix * self._n_rows + first, matrix * self._n_rows + last, raw)
                here[:, first:last] = raw[:, column : column + len(here)].T
            start = end

    def byte_ranges(self, start: int, stop: int) -> Iterator[ByteRange]:
        """What ``read_rows`` reads."""
        for matrix in range(start // self._n_cols, -(-stop // self._n_cols)):
            yield from byte_ranges(self._source, matrix * self._n_rows, (matrix + 1) * self._n_rows)


class Reshaped:
    """The same rows in other dimensions; the last one stays, but for a source of one column, which becomes one row."""

    def __init__(self, source: SourceTensor, shape: tuple[int, ...]) -> None:
        assert prod(shape) == prod(source.shape), f"{source.name} is {source.shape}, not {shape}"
        self.name = source.name
        self.dtype = source.dtype
        self.shape = shape
        self._source = source

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out`` (stop - start, n_cols) with rows [start, stop); safe from several threads at once."""
        width, n_cols = self._source.shape[-1], self.shape[-1]
        self._source.read_rows(start * n_cols // width, stop * n_cols // width, out.reshape(-1, width))

    def byte_ranges(self, start: int, stop: int) -> Iterator[ByteRange]:
        """What ``read_rows`` reads."""
        width, n_cols = self._source.shape[-1], self.shape[-1]
        return byte_ranges(self._source, start * n_cols // width, stop * n_cols // width)


class Changed:
    """Values computed from those of its source, one by one; for small tensors such as norms.

    They are computed in float32 and, of a source in F16, rounded to F16: torch computes so, and llama.cpp's converter
    with it, which turns BF16 into float32 before and leaves F16 as it is (``prepare_tensors``).
    """

    dtype = Dtype.F32

    def __init__(self, source: SourceTensor, change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> None:
        self.name = source.name
        self.shape = source.shape
        self._source = source
        self._change = change

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out`` (stop - start, n_cols) with rows [start, stop); safe from several threads at once."""
        changed = self._change(read_f32(self._source, start, stop))
        out[...] = changed.astype(np.float16) if self._source.dtype is Dtype.F16 else changed

    def byte_ranges(self, start: int, stop: int) -> Iterator[ByteRange]:
        """What ``read_rows`` reads."""
        return byte_ranges(self._source, start, stop)


class Computed:
    """A small float32 vector that is computed and not read."""

    dtype = Dtype.F32

    def __init__(self, name: str, values: Sequence[float]) -> None:
        self.name = name
        self.shape = (len(values),)
        self._values = np.array(values, dtype=np.float32)

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out`` (1, n) with the vector."""
        out[...] = self._values[None][start:stop]


def rope_ordered(source: SourceTensor, head_dim: int) -> SourceTensor:
    """A query or key projection, or its bias, in llama.cpp's rotary order (``RopeOrdered``)."""
    if len(source.shape) > 1:
        return RopeOrdered(source, head_dim)
    heads = np.arange(source.shape[0]).reshape(-1, 2, head_dim // 2)
    return PickedColumns(source, heads.swapaxes(1, 2).reshape(-1))
