"""Encoding: the bytes of a GGUF header, which modules that write files put in front of the tensors.

Follows the rules that ``header`` checks when it reads.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from ggufmoe.errors import GGUFError
from ggufmoe.gguf.header import (
    MAGIC,
    MAX_KEY_BYTES,
    MAX_TENSOR_NAME_BYTES,
    GGUFValue,
    TensorInfo,
    alignment_of,
    check_layout,
    padded,
    tensor_bytes,
)
from ggufmoe.gguf.types import STRUCT_CODES, ValueType
from ggufmoe.gguf.upstream import DEFAULT_ALIGNMENT

_VERSION = 3
_U32, _I32, _U64, _I64 = (struct.Struct(code) for code in ("<I", "<i", "<Q", "<q"))


def encode_header(
    metadata: Mapping[str, GGUFValue], tensors: Sequence[TensorInfo], alignment: int = DEFAULT_ALIGNMENT
) -> bytes:
    """The bytes of a GGUF version 3 header, little-endian, padded so that the first tensor can follow.

    The offsets of ``tensors`` must be those that ``read_header`` accepts. An alignment other than 32 must stand in
    ``metadata`` as well. Raises GGUFError for content that no reader would accept.
    """
    stated = alignment_of("new header", metadata)
    if stated != alignment:
        raise GGUFError(f"new header: general.alignment says {stated}, but tensors are aligned to {alignment}")
    _check_new_tensors(tensors, alignment)
    parts = [MAGIC, _U32.pack(_VERSION), _I64.pack(len(tensors)), _I64.pack(len(metadata))]
    for key, value in metadata.items():
        parts += (_encode_name(key, MAX_KEY_BYTES), _encode_value(key, value))
    parts += map(_encode_tensor, tensors)
    header = b"".join(parts)
    return header + bytes(padded(len(header), alignment) - len(header))


def _check_new_tensors(tensors: Sequence[TensorInfo], alignment: int) -> None:
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise GGUFError("new header: a tensor's name appears twice")
    for tensor in tensors:
        what = f"new header: tensor {tensor.name!r}"
        expected = tensor_bytes(what, tuple(reversed(tensor.shape)), tensor.type)
        if tensor.n_bytes != expected:
            raise GGUFError(f"{what} has {tensor.n_bytes} bytes, expected {expected}")
    check_layout("new header", tensors, alignment)


def _encode_string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return _U64.pack(len(raw)) + raw


def _encode_name(name: str, max_bytes: int) -> bytes:
    try:
        length = len(name.encode())
    except UnicodeEncodeError as error:
        raise GGUFError(f"new header: the name {name[:80]!r} is not UTF-8") from error
    if not 0 < length <= max_bytes or "\0" in name:
        raise GGUFError(f"new header: the name {name[:80]!r} has {length} bytes, expected 1 to {max_bytes} without NUL")
    return _encode_string(name)


def _encode_value(key: str, value: GGUFValue) -> bytes:
    try:
        if value.type is not ValueType.ARRAY:
            return _I32.pack(value.type) + _encode_items(value.type, [value.value])
        if value.item_type in (None, ValueType.ARRAY):
            raise ValueError("an array needs an item type, and not an array's")
        start = _I32.pack(ValueType.ARRAY) + _I32.pack(value.item_type) + _U64.pack(len(value.value))
        return start + _encode_items(value.item_type, value.value)
    except (struct.error, ValueError, TypeError, AttributeError, OverflowError) as error:
        raise GGUFError(f"new header: {key!r} cannot be written as {value.type.name}: {error}") from error


def _encode_items(type: ValueType, items: Sequence[Any]) -> bytes:
    if type is ValueType.STRING:
        return b"".join(map(_encode_string, items))
    if type is ValueType.BOOL:
        if not all(item in (0, 1) for item in items):
            raise ValueError("a bool is True or False")
        return bytes(items)
    return struct.pack(f"<{len(items)}{STRUCT_CODES[type]}", *items)


def _encode_tensor(tensor: TensorInfo) -> bytes:
    ne = b"".join(_I64.pack(dim) for dim in reversed(tensor.shape))
    name = _encode_name(tensor.name, MAX_TENSOR_NAME_BYTES)
    return name + _U32.pack(len(tensor.shape)) + ne + _I32.pack(tensor.type.id) + _U64.pack(tensor.offset)
