"""Conversions between float32, float16 and bfloat16, by numpy: what every other routine of them has to give.

The results are ggml's on x86-64, on every machine: to nearest, ties to even, denormals kept, NaN made quiet. Source:
``ggml_compute_fp32_to_fp16``, ``ggml_compute_fp16_to_fp32`` and ``ggml_compute_fp32_to_bf16`` of ggml-impl.h (commit
0c1e57098). ``quant.kernels.conversions`` does the same faster.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FLOAT_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(np.uint16))
"""float32, float16, and uint16 with bfloat16 bits."""
_CHUNK = 1 << 16
"""Numbers that are rounded to bfloat16 at a time: half a megabyte of intermediate results."""


def convert_floats(src: NDArray[Any], dst: NDArray[Any]) -> None:
    """Convert ``src`` into ``dst``; both of FLOAT_DTYPES, contiguous, and with as many numbers.

    float16 and bfloat16 become float32 exactly; between the two they go through float32. Raises ValueError for other
    arrays.
    """
    check_floats(src, dst)
    source, target = src.reshape(-1), dst.reshape(-1)
    if src.dtype == dst.dtype:
        target[...] = source
    elif np.float32 in (src.dtype, dst.dtype):
        _convert(source, target)
    else:
        for start in range(0, source.size, _CHUNK):
            part = source[start : start + _CHUNK]
            wide = np.empty(part.size, np.float32)
            _convert(part, wide)
            _convert(wide, target[start : start + _CHUNK])


def check_floats(src: NDArray[Any], dst: NDArray[Any]) -> None:
    """Raise ValueError if ``convert_floats`` cannot convert ``src`` into ``dst``."""
    for name, array in (("src", src), ("dst", dst)):
        if array.dtype not in FLOAT_DTYPES or not array.flags.c_contiguous:
            raise ValueError(
                f"{name} is {array.dtype} with strides {array.strides}, expected a C-contiguous array of float32, "
                "float16, or uint16 with bfloat16 bits"
            )
    if src.size != dst.size:
        raise ValueError(f"dst has {dst.size} numbers, expected {src.size} as src")


def _convert(src: NDArray[Any], dst: NDArray[Any]) -> None:
    """Convert between float32 and one of the others."""
    if src.dtype == np.uint16:
        bits = dst.view(np.uint32)
        bits[...] = src
        bits <<= 16
    elif dst.dtype == np.uint16:
        for start in range(0, src.size, _CHUNK):
            dst[start : start + _CHUNK] = _bfloat16(src[start : start + _CHUNK].view(np.uint32))
    else:
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            dst[...] = src
        nan = np.isnan(dst)
        if nan.any():
            _make_quiet(src, dst, nan)


def _bfloat16(bits: NDArray[np.uint32]) -> NDArray[Any]:
    high = bits >> 16
    rounded = high & 1
    rounded += 0x7FFF
    rounded += bits
    rounded >>= 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    if nan.any():
        rounded[nan] = high[nan] | 64
    return rounded


def _make_quiet(src: NDArray[Any], dst: NDArray[Any], nan: NDArray[np.bool_]) -> None:
    """Set the bits of NaN: float32 keeps sign and payload, float16 the sign. numpy's depend on the machine."""
    if dst.dtype == np.float32:
        half = src.view(np.uint16)[nan].astype(np.uint32)
        dst.view(np.uint32)[nan] = (half & 0x8000) << 16 | 0x7FC00000 | (half & 0x3FF) << 13
    else:
        sign = src.view(np.uint32)[nan] >> 16 & 0x8000
        dst.view(np.uint16)[nan] = sign | 0x7E00
