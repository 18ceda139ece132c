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
}


class Dtype(Enum):
    """Storage types of source weights. BF16 rows are arrays of uint16 bits, because numpy has no bfloat16."""

    BF16 = "BF16"
    F16 = "F16"
    F32 = "F32"

    @property
    def numpy(self) -> np.dtype[Any]:
        """The numpy dtype in which rows of this type are stored: uint16, float16 or float32."""
        return _NUMPY[self.value]

    @property
    def ggml_type(self) -> GGMLType:
        """The GGUF tensor type of the same name, which stores weights of this dtype unchanged."""
        return GGMLType[self.value]

    @property
    def n_bytes(self) -> int:
        """Bytes per weight."""
        return int(self.numpy.itemsize)


class SourceTensor(Protocol):
    """One tensor of a model, read by rows. A row is the last dimension; a 1-D tensor is a single row."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> Dtype: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out``, shape (stop - start, n_cols) and dtype ``self.dtype.numpy``, with rows [start, stop).

        Safe to call from several threads at once.
        """
