"""Whether stored weights are finite: the bytes of ggml's blocks that hold scales, and what they may not be.

Source: the structs of ``ggml-common.h`` and ``ggml_validate_row_data`` of ggml-quants.c (commit 0c1e57098), which a
test compares with this module. Needs no engine, and is as fast.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.gguf.types import GGMLType

_EXPONENT_F16 = 0x7C00
_FIRST = "Q1_0 Q2_0 Q4_0 Q5_0 Q8_0 IQ1_S IQ2_XXS IQ2_XS IQ2_S IQ3_XXS IQ3_S IQ4_NL IQ4_XS"
_F16_OFFSETS: dict[GGMLType, tuple[int, ...]] = {
    **{GGMLType[name]: (0,) for name in _FIRST.split()},
    **{GGMLType[name]: (0, 2) for name in ("Q4_1", "Q5_1", "Q4_K", "Q5_K")},
    GGMLType.Q2_K: (80, 82),
    GGMLType.Q3_K: (108,),
    GGMLType.Q6_K: (208,),
    GGMLType.TQ1_0: (52,),
    GGMLType.TQ2_0: (64,),
}
"""Where a block has its scale, and its minimum, as float16: offsets in bytes."""
_FLOATS = {
    GGMLType.F16: (np.uint16, _EXPONENT_F16),
    GGMLType.BF16: (np.uint16, 0x7F80),
    GGMLType.F32: (np.uint32, 0x7F800000),
}
"""Plain floats: how their bits are read, and the exponent of infinity and NaN."""
_INTEGERS = frozenset({GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64})
_IQ1_M_SCALES = 48
"""Offset of four 16-bit words, the upper four bits of which are together the block's scale as float16."""


def finite_rows(type: GGMLType, rows: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """For each row whether its scales, or its plain numbers, are finite. ``rows``: (rows, bytes) uint8, contiguous.

    Never for types that only exist in memory (Q8_1), as ggml says it too.
    """
    if type in _FLOATS:
        dtype, exponent = _FLOATS[type]
        return _none_has(rows.view(dtype), dtype(exponent))
    if type is GGMLType.F64:  # ggml reads it as float32, and so does who uses it
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(np.isfinite(rows.view(np.float64).astype(np.float32)).all(axis=1))
    if type in _INTEGERS or type is GGMLType.NVFP4:  # each value of NVFP4's scales is a number
        return np.ones(len(rows), np.bool_)
    blocks = rows.reshape(len(rows), -1, type.block_bytes)
    if type is GGMLType.MXFP4:
        return np.asarray((blocks[..., 0] != 0xFF).all(axis=1))
    if type is GGMLType.Q8_K:
        return _none_has(_read(blocks, 0, np.uint32), np.uint32(0x7F800000))
    if type is GGMLType.IQ1_M:
        # the exponent's five bits: four of the last word, and the uppermost of the word before; the sign is bit 15
        last, before = (_read(blocks, _IQ1_M_SCALES + 2 * word, np.uint16) for word in (3, 2))
        scale = (last & 0xF000) | (before >> 4 & 0x0F00)
        return _none_has(scale, np.uint16(_EXPONENT_F16))
    if type not in _F16_OFFSETS:
        return np.zeros(len(rows), np.bool_)
    finite = np.ones(len(rows), np.bool_)
    for offset in _F16_OFFSETS[type]:
        finite &= _none_has(_read(blocks, offset, np.uint16), np.uint16(_EXPONENT_F16))
    return finite


def _read(blocks: NDArray[np.uint8], offset: int, dtype: type[np.unsignedinteger[Any]]) -> NDArray[Any]:
    """The little-endian number at an offset of each block: (rows, blocks)."""
    field = blocks[..., offset : offset + np.dtype(dtype).itemsize]
    numbers: NDArray[Any] = np.ascontiguousarray(field).view(np.dtype(dtype).newbyteorder("<"))[..., 0]
    return numbers


def _none_has(bits: NDArray[Any], exponent: Any) -> NDArray[np.bool_]:
    return np.asarray(((bits & exponent) != exponent).all(axis=1))
