"""Tensors of the graphs that llama.cpp computes, by their addresses: name, shape, operation and values."""

from __future__ import annotations

import ctypes
from enum import IntEnum
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.gguf.types import GGMLType
from ggufmoe.native.library import library

_VOID = ctypes.c_void_p
_I64 = ctypes.c_int64
_SIZE = ctypes.c_size_t


class Tensor(ctypes.Structure):
    """``struct ggml_tensor`` (ggml.h) at the pinned commit: sizes and strides in bytes, the fastest dimension first."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", _VOID),
        ("ne", _I64 * 4),
        ("nb", _SIZE * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", _VOID * 10),
        ("view_src", _VOID),
        ("view_offs", _SIZE),
        ("data", _VOID),
        ("name", ctypes.c_char * 64),
        ("extra", _VOID),
        ("padding", ctypes.c_char * 8),
    )


class Operation(IntEnum):
    """The operations of ``enum ggml_op`` that multiply by weights."""

    MUL_MAT = 29
    """``src[0]`` times the rows of ``src[1]``."""
    MUL_MAT_ID = 30
    """The matrices of ``src[0]`` that ``src[2]`` names for each token, times the rows of ``src[1]``."""


@cache
def _get_name() -> Any:
    # const char * ggml_get_name(const struct ggml_tensor *); called for every node of a graph, so the interpreter's
    # lock is not given up for it
    return ctypes.PYFUNCTYPE(ctypes.c_char_p, _VOID)(("ggml_get_name", library()))


def tensor_name(tensor: int) -> bytes:
    """Name of the ``ggml_tensor`` at an address."""
    name: bytes = _get_name()(tensor)
    return name


def tensor_shape(tensor: int) -> tuple[int, ...]:
    """Shape of the ``ggml_tensor`` at an address: four dimensions, in numpy order."""
    return tuple(reversed(Tensor.from_address(tensor).ne))


def tensor_type_is(tensor: int, type: GGMLType) -> bool:
    """Whether the ``ggml_tensor`` at an address is of this type."""
    return bool(Tensor.from_address(tensor).type == type.id)


def tensor_operation(tensor: int) -> int:
    """Number of the operation that computes the ``ggml_tensor`` at an address; compare it with ``Operation``."""
    return int(Tensor.from_address(tensor).op)


def tensor_sources(tensor: int) -> tuple[int, ...]:
    """Addresses of the tensors that the ``ggml_tensor`` at an address is computed from."""
    sources = Tensor.from_address(tensor).src
    return tuple(source for source in sources if source)


def tensor_values(tensor: int, *, copy: bool = True) -> NDArray[Any]:
    """The values of a computed F32 or I32 ``ggml_tensor`` on any device: four dimensions, in numpy order.

    Gaps between the rows of a view are left out. Without ``copy`` the array of a tensor in main memory is that memory
    itself, which llama.cpp overwrites when it continues. Raises ValueError for other types.
    """
    head = Tensor.from_address(tensor)
    dtype = {GGMLType.F32.id: np.float32, GGMLType.I32.id: np.int32}.get(head.type)
    if dtype is None:
        raise ValueError(f"{tensor_name(tensor)!r} is of type {head.type}, neither F32 nor I32")
    shape, strides = tuple(reversed(head.ne)), tuple(reversed(head.nb))
    if 0 in shape:
        return np.empty(shape, dtype)
    n_bytes = library().ggml_nbytes(tensor)
    if not copy and head.buffer and library().ggml_backend_buffer_is_host(head.buffer):
        there = (ctypes.c_uint8 * n_bytes).from_address(head.data)
        seen: NDArray[Any] = np.ndarray(shape, dtype, there, 0, strides)
        return seen
    data = np.empty(n_bytes, np.uint8)
    library().ggml_backend_tensor_get(tensor, data.ctypes.data, 0, data.nbytes)
    values: NDArray[Any] = np.ndarray(shape, dtype, data, 0, strides).copy()
    return values
