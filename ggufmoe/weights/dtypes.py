"""Reads rows of source weights as float32: some of them in turn, or single ones."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from ggufmoe.gguf.floats import convert_floats
from ggufmoe.native import quantizing
from ggufmoe.weights.source_tensor import Dtype, SourceTensor

_ROWS_AT_ONCE = 8


def read_f32(tensor: SourceTensor, start: int = 0, stop: int | None = None) -> NDArray[np.float32]:
    """Read rows [start, stop) of a tensor, by default all, into a new float32 array (rows, n_cols).

    For small tensors (norms, routers) and for a layer of a forward pass; the conversion reads tiles instead.
    """
    stop = row_count(tensor.shape) if stop is None else stop
    raw = tensor.dtype.empty_rows(stop - start, tensor.shape[-1])
    tensor.read_rows(start, stop, raw)
    if tensor.dtype is Dtype.F32:
        return raw
    out = np.empty((stop - start, tensor.shape[-1]), np.float32)
    if tensor.dtype.ggml_type.is_quantized:
        quantizing.dequantize_rows(tensor.dtype.ggml_type, raw, out)
    else:
        convert_floats(raw, out)
    return out


def read_single_rows(tensor: SourceTensor, rows: Sequence[int]) -> NDArray[np.float32]:
    """Read rows by their numbers, in any order, into a new float32 array (len(rows), n_cols).

    Several are read at once, because over a network each takes the time of the way there and back.
    """
    numbers, places = np.unique(np.asarray(rows, np.int64), return_inverse=True)
    out = np.empty((len(numbers), tensor.shape[-1]), np.float32)

    def read(place: int) -> None:
        out[place] = read_f32(tensor, int(numbers[place]), int(numbers[place]) + 1)[0]

    with ThreadPoolExecutor(_ROWS_AT_ONCE) as pool:
        list(pool.map(read, range(len(numbers))))
    return out[places]


def row_count(shape: tuple[int, ...]) -> int:
    """The number of rows of a tensor: the product of all dimensions but the last, 1 for a 1-D tensor."""
    n_rows = 1
    for size in shape[:-1]:
        n_rows *= size
    return n_rows
