"""Rows of the tensors of GGUF files as they are stored; for quantized types these are the bytes of their blocks.

Owns opening the files of a model and reading rows by position, from any number of threads. It is our own code, because
the reader of the ``gguf`` package maps whole files, which counts as memory of the process. Stored rows are converted to
float32 in ``native.quantizing``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import GGUFError
from ggufmoe.files import PositionalFile
from ggufmoe.gguf.header import without_leading_ones
from ggufmoe.gguf.model import ModelHeader, read_model_header
from ggufmoe.gguf.types import GGMLType

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class GGUFRows:
    """The rows of one tensor in an open file. The rows of a stack of matrices are those of its matrices in order.

    ``shape`` is in numpy's order. A 1-D tensor is a single row.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    file: PositionalFile
    begin: int
    """Bytes from the beginning of the file."""

    @property
    def n_cols(self) -> int:
        """Weights of a row."""
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        """Rows of all matrices together."""
        return math.prod(self.shape[:-1])

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.type.row_bytes(self.n_cols)

    @property
    def n_bytes(self) -> int:
        """Bytes of all rows."""
        return self.n_rows * self.row_bytes

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out``, contiguous and of the size that the rows have in the file, with the bytes of [start, stop).

        Safe to call from several threads at once. Raises GGUFError if the file cannot be read any more.
        """
        n_bytes = (stop - start) * self.row_bytes
        if not 0 <= start <= stop <= self.n_rows:
            raise ValueError(f"{self.name}: rows {start} to {stop} are not in a tensor of shape {self.shape}")
        if out.nbytes != n_bytes or not out.flags.c_contiguous:
            raise ValueError(f"{self.name}: out must be contiguous and of {n_bytes} bytes")
        if n_bytes:
            self.file.read_into(self.begin + start * self.row_bytes, out.data.cast("B"))

    def read(self, start: int, stop: int) -> Bytes:
        """The bytes of rows [start, stop) as a new array: uint8, (rows, row_bytes). Raises GGUFError."""
        out = np.empty((stop - start, self.row_bytes), np.uint8)
        self.read_rows(start, stop, out)
        return out

    def matrices(self) -> tuple[GGUFRows, ...]:
        """The matrices of a stack, for example of experts; for any other tensor, the tensor itself."""
        shape = without_leading_ones(self.shape)
        matrix = replace(self, shape=shape[-2:])
        n_matrices = math.prod(shape[:-2])
        return tuple(replace(matrix, begin=self.begin + i * matrix.n_bytes) for i in range(n_matrices))

    def tiles(self, n_weights: int) -> Iterator[tuple[int, int]]:
        """Ranges of rows of about ``n_weights`` each, from the first to the last."""
        step = max(1, n_weights // self.n_cols)
        for start in range(0, self.n_rows, step):
            yield start, min(start + step, self.n_rows)


class OpenModel:
    """The tensors of a model by name; its files stay open until ``close``, or the end of a ``with`` block.

    ``path`` is any file of the model. Raises GGUFError as ``read_model_header`` does.
    """

    def __init__(self, path: Path) -> None:
        self.header: ModelHeader = read_model_header(path)
        self.tensors: dict[str, GGUFRows] = {}
        self._files: list[PositionalFile] = []
        try:
            for shard in self.header.shards:
                file = PositionalFile(shard.path, GGUFError)
                self._files.append(file)
                for info in shard.header.tensors:
                    begin = shard.header.data_offset + info.offset
                    self.tensors[info.name] = GGUFRows(info.name, info.type, info.shape, file, begin)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the files; a second call does nothing."""
        for file in self._files:
            file.close()

    def __enter__(self) -> OpenModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
