"""Converts rows of source weights to float32, whatever they are stored as, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.checkpoint.source import Dtype, SourceTensor
from ggufmoe.native import quantizing


def widen(raw: NDArray[Any], dtype: Dtype, out: NDArray[np.float32]) -> None:
    """Widen ``raw`` (stored as ``dtype``: uint16 bits, float16 or float32) exactly into ``out``, same shape, float32.

    Both arrays must be C-contiguous.
    """
    if dtype is Dtype.BF16:
        quantizing.bf16_to_f32(raw, out)
    elif dtype is Dtype.F16:
        quantizing.f16_to_f32(raw, out)
    else:
        out[...] = raw


def narrow(values: NDArray[np.float32], dtype: Dtype, out: NDArray[Any]) -> None:
    """Round float32 ``values`` to ``dtype`` (nearest, ties to even) into ``out``, same shape, ``dtype.numpy``.

    Both arrays must be C-contiguous.
    """
    if dtype is Dtype.BF16:
        quantizing.f32_to_bf16(values, out)
    elif dtype is Dtype.F16:
        quantizing.f32_to_f16(values, out)
    else:
        out[...] = values


def read_f32(tensor: SourceTensor, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
    """Rows [start, stop) of a tensor as a fresh float32 array (rows, n_cols); all rows by default.

    For what is small or needed as a whole (norms, routers, a layer of a forward pass); conversion reads by tiles.
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
    """Rows of a tensor: the product of all dimensions but the last, 1 for a 1-D tensor."""
    n_rows = 1
    for size in shape[:-1]:
        n_rows *= size
    return n_rows
