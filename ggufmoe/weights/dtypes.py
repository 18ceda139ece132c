"""Converts rows of source weights from BF16, F16 or F32 to float32, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.native import quantizing
from ggufmoe.weights.source_tensor import Dtype, SourceTensor


def widen(raw: NDArray[Any], dtype: Dtype, out: NDArray[np.float32]) -> None:
    """Convert ``raw``, whose numpy dtype is ``dtype.numpy``, exactly into ``out``, float32 of the same shape.

    Both arrays must be C-contiguous.
    """
    if dtype is Dtype.BF16:
        quantizing.bf16_to_f32(raw, out)
    elif dtype is Dtype.F16:
        quantizing.f16_to_f32(raw, out)
    else:
        out[...] = raw


def narrow(values: NDArray[np.float32], dtype: Dtype, out: NDArray[Any]) -> None:
    """Round float32 ``values`` to the nearest ``dtype`` (ties to even) into ``out``, ``dtype.numpy`` of the same shape.

    Both arrays must be C-contiguous.
    """
    if dtype is Dtype.BF16:
        quantizing.f32_to_bf16(values, out)
    elif dtype is Dtype.F16:
        quantizing.f32_to_f16(values, out)
    else:
        out[...] = values


def read_f32(tensor: SourceTensor, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
    """Read rows [start, stop) of a tensor, by default all, into a new float32 array (rows, n_cols).

    For small tensors (norms, routers) and for a layer of a forward pass; the conversion reads tiles instead.
    """
    stop = row_count(tensor.shape) if stop is None else stop
    raw = np.empty((stop - start, tensor.shape[-1]), tensor.dtype.numpy)
    tensor.read_rows(start, stop, raw)
    if tensor.dtype is Dtype.F32:
        return raw
    out = np.empty(raw.shape, np.float32)
    widen(raw, tensor.dtype, out)
    return out


def row_count(shape: tuple[int, ...]) -> int:
    """The number of rows of a tensor: the product of all dimensions but the last, 1 for a 1-D tensor."""
    n_rows = 1
    for size in shape[:-1]:
        n_rows *= size
    return n_rows
