"""The interface of one tensor of a model that is read by rows, and the dtypes in which weights are stored."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ggufmoe.gguf.types import GGMLType

_NUMPY: Mapping[str, np.dtype[Any]] = {
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "MXFP4": np.dtype(np.uint8),
}


class Dtype(Enum):
    """Storage types of source weights. BF16 rows are arrays of uint16 bits, because numpy has no bfloat16; rows of
    MXFP4, which a checkpoint has quantized, are the bytes of ggml's blocks."""

    BF16 = "BF16"
    F16 = "F16"
    F32 = "F32"
    MXFP4 = "MXFP4"

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype in which rows of this type are read: uint16, float16, float32, or uint8 for blocks."""
        return _NUMPY[self.value]

    @property
    def ggml_type(self) -> GGMLType:
        """The GGUF tensor type of the same name, which stores weights of this dtype unchanged."""
        return GGMLType[self.value]

    def row_bytes(self, n_cols: int) -> int:
        """Bytes of a row of ``n_cols`` weights."""
        return self.ggml_type.row_bytes(n_cols)

    def empty_rows(self, n_rows: int, n_cols: int) -> NDArray[Any]:
        """A new array for ``SourceTensor.read_rows``: (n_rows, n_cols), or (n_rows, bytes) for blocks."""
        return np.empty((n_rows, self.row_bytes(n_cols) // self.numpy.itemsize), self.numpy)


class SourceTensor(Protocol):
    """One tensor of a model, read by rows. A row is the last dimension; a 1-D tensor is a single row."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> Dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out``, which is like ``self.dtype.empty_rows(stop - start, n_cols)``, with rows [start, stop).

        Safe to call from several threads at once.
        """
