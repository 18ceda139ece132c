"""Makes metadata values of GGUF from values of Python, one function for each type that is written."""

from __future__ import annotations

from collections.abc import Iterable

from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.types import ValueType


def text(value: str) -> GGUFValue:
    """A STRING metadata value."""
    return GGUFValue(ValueType.STRING, value, None)


def u32(value: int) -> GGUFValue:
    """A UINT32 metadata value."""
    return GGUFValue(ValueType.UINT32, value, None)


def u64(value: int) -> GGUFValue:
    """A UINT64 metadata value."""
    return GGUFValue(ValueType.UINT64, value, None)


def f32(value: float) -> GGUFValue:
    """A FLOAT32 metadata value."""
    return GGUFValue(ValueType.FLOAT32, float(value), None)


def boolean(value: bool) -> GGUFValue:
    """A BOOL metadata value."""
    return GGUFValue(ValueType.BOOL, value, None)


def booleans(values: Iterable[bool]) -> GGUFValue:
    """An array of BOOL values as a metadata value."""
    return GGUFValue(ValueType.ARRAY, list(values), ValueType.BOOL)


def i32s(values: Iterable[int]) -> GGUFValue:
    """An array of INT32 values as a metadata value."""
    return GGUFValue(ValueType.ARRAY, list(values), ValueType.INT32)


def texts(values: Iterable[str]) -> GGUFValue:
    """An array of strings as a metadata value."""
    return GGUFValue(ValueType.ARRAY, list(values), ValueType.STRING)
