"""ggml's own quantizers, dequantizers and conversions between float types, on numpy arrays.

The layout of every array is checked, and arrays are kept alive over the call. The quantizers of ``quant.kernels`` are
faster; these are what their bytes are compared with, and what is used where they differ.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import EngineMissingError
from ggufmoe.gguf.floats import convert_floats
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native.library import has_engine, library

_VOID = ctypes.c_void_p
_I64 = ctypes.c_int64
_SIZE = ctypes.c_size_t
_PLAIN = {
    GGMLType.F32: np.float32,
    GGMLType.F64: np.float64,
    GGMLType.I8: np.int8,
    GGMLType.I16: np.int16,
    GGMLType.I32: np.int32,
    GGMLType.I64: np.int64,
}
"""Types that numpy reads by itself."""
_ONLY_IN_MEMORY = frozenset({GGMLType.Q8_1, GGMLType.Q8_K})
"""Quantized types that no file has, and that ggml does not convert back."""
READ_BY_GGML_ALONE = frozenset({GGMLType.Q1_0, GGMLType.Q2_0})
"""Types that the ``gguf`` package cannot dequantize: ``dequantize_rows`` needs an engine for them."""


def _address(array: NDArray[Any], dtype: type | None = None) -> int:
    if not array.flags.c_contiguous or (dtype is not None and array.dtype != dtype):
        raise ValueError(f"expected a C-contiguous array of {dtype}, got {array.dtype} with strides {array.strides}")
    return array.ctypes.data


def quantize_chunk(
    type: GGMLType, src: NDArray[np.float32], dst: NDArray[np.uint8], imatrix: NDArray[np.float32] | None = None
) -> None:
    """ggml's own quantizer: ``src`` (rows, n_cols) float32 into ``dst`` (rows, row_bytes) uint8.

    ``imatrix`` is one importance per column, shape (n_cols,). ggml aborts the process when a type needs one and gets
    none: ask ``requires_imatrix`` first.
    """
    n_rows, n_cols = src.shape
    if dst.shape != (n_rows, type.row_bytes(n_cols)):
        raise ValueError(f"{type.name}: dst has shape {dst.shape}, expected {(n_rows, type.row_bytes(n_cols))}")
    if imatrix is not None and imatrix.shape != (n_cols,):
        raise ValueError(f"{type.name}: imatrix has shape {imatrix.shape}, expected {(n_cols,)}")
    weights = None if imatrix is None else _address(imatrix, np.float32)
    library().ggml_quantize_chunk(
        type.id, _address(src, np.float32), _address(dst, np.uint8), 0, n_rows, n_cols, weights
    )


def requires_imatrix(type: GGMLType) -> bool:
    """Whether ggml aborts the process when it quantizes to this type without an importance matrix."""
    return bool(library().ggml_quantize_requires_imatrix(type.id))


def validate_rows(type: GGMLType, data: NDArray[np.uint8]) -> bool:
    """Whether stored rows pass ggml's check: no scale is NaN or infinite. ``gguf.block_scales`` does the same."""
    return bool(library().ggml_validate_row_data(type.id, _address(data, np.uint8), data.nbytes))


class _TypeTraits(ctypes.Structure):
    """``struct ggml_type_traits`` (ggml.h) at the pinned commit."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", _I64),
        ("blck_size_interleave", _I64),
        ("type_size", _SIZE),
        ("is_quantized", ctypes.c_bool),
        ("to_float", _VOID),
        ("from_float_ref", _VOID),
    )


@cache
def _to_float(type: GGMLType) -> Any:
    """ggml's dequantizer for a type, ``void (*)(const void * x, float * y, int64_t k)``."""
    traits = _TypeTraits.from_address(library().ggml_get_type_traits(type.id))
    if (traits.blck_size, traits.type_size) != (type.block_size, type.block_bytes):
        raise EngineMissingError(f"this llama-cpp-python describes {type.name} otherwise; install the pinned version")
    return ctypes.CFUNCTYPE(None, _VOID, _VOID, _I64)(traits.to_float)


def can_dequantize(type: GGMLType) -> bool:
    """Whether this is a quantized type that ggml can convert to float32."""
    return type.is_quantized and type not in _ONLY_IN_MEMORY


def can_widen(type: GGMLType) -> bool:
    """Whether ``widened`` can convert this type to float32."""
    return type in _PLAIN or type in (GGMLType.F16, GGMLType.BF16) or can_dequantize(type)


def widened(type: GGMLType, stored: NDArray[np.uint8], n_cols: int) -> NDArray[np.float32]:
    """Rows as float32, (rows, n_cols); ``stored`` are their bytes in a GGUF file, uint8 (rows, row_bytes).

    Integers and F64 are rounded, and become infinite beyond the range of float32; other types are exact. Raises
    ValueError for a type that ``can_widen`` denies.
    """
    if type in _PLAIN:
        with np.errstate(over="ignore"):
            return stored.view(_PLAIN[type]).astype(np.float32, copy=False)
    rows = np.empty((len(stored), n_cols), np.float32)
    if type in (GGMLType.F16, GGMLType.BF16):
        convert_floats(stored.view(np.float16 if type is GGMLType.F16 else np.uint16), rows)
    else:
        dequantize_rows(type, stored, rows)
    return rows


def dequantize_rows(type: GGMLType, src: NDArray[np.uint8], dst: NDArray[np.float32]) -> None:
    """Dequantize ``src`` (rows, row_bytes) uint8 into ``dst`` (rows, n_cols) float32 by ggml's routine.

    Without an engine the ``gguf`` package's does the same. Raises ValueError for a type that ``can_dequantize`` denies,
    and EngineMissingError without an engine for one of READ_BY_GGML_ALONE.
    """
    n_rows, n_cols = dst.shape
    if src.shape != (n_rows, type.row_bytes(n_cols)):
        raise ValueError(f"{type.name}: src has shape {src.shape}, expected {(n_rows, type.row_bytes(n_cols))}")
    if not can_dequantize(type):
        raise ValueError(f"ggml cannot dequantize {type.name}")
    if type in READ_BY_GGML_ALONE or has_engine():
        _to_float(type)(_address(src, np.uint8), _address(dst, np.float32), dst.size)
        return
    from gguf import GGMLQuantizationType, quants

    with np.errstate(over="ignore"):
        dst[...] = quants.dequantize(src, GGMLQuantizationType(type.id)).reshape(dst.shape)


def bf16_to_f32(src: NDArray[np.uint16], dst: NDArray[np.float32]) -> None:
    """Widen bfloat16 bits exactly; same number of elements in both."""
    _convert("ggml_bf16_to_fp32_row", src, np.uint16, dst, np.float32)


def f16_to_f32(src: NDArray[np.float16], dst: NDArray[np.float32]) -> None:
    """Widen float16 exactly."""
    _convert("ggml_fp16_to_fp32_row", src, np.float16, dst, np.float32)


def f32_to_bf16(src: NDArray[np.float32], dst: NDArray[np.uint16]) -> None:
    """Round to bfloat16 bits as ``llama_model_quantize`` does (nearest, ties to even).

    ``ggml_fp32_to_bf16_row`` would make denormals zero on processors with AVX512-BF16.
    """
    _convert("ggml_fp32_to_bf16_row_ref", src, np.float32, dst, np.uint16)


def f32_to_f16(src: NDArray[np.float32], dst: NDArray[np.float16]) -> None:
    """Round to float16 as ggml does (nearest, ties to even)."""
    _convert("ggml_fp32_to_fp16_row", src, np.float32, dst, np.float16)


def _convert(function: str, src: NDArray[Any], src_dtype: type, dst: NDArray[Any], dst_dtype: type) -> None:
    if src.size != dst.size:
        raise ValueError(f"{function}: {src.size} elements do not fit {dst.size}")
    getattr(library(), function)(_address(src, src_dtype), _address(dst, dst_dtype), src.size)
