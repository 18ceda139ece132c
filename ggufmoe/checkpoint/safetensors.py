"""Safetensors files: checks their headers against the specification and reads their bytes by position.

The specification is the README of huggingface/safetensors ("Format"). The reader of the ``safetensors`` library checks
every header of a file on this machine first. It gives no offsets and names no tensor in its errors, so the header is
parsed here as well, with the same checks. ``shards`` finds the files of a checkpoint, ``layouts`` maps tensors to those
of the model.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import SafetensorError, safe_open

from ggufmoe.errors import SafetensorsError, one_line
from ggufmoe.files import PositionalFile, what_instead
from ggufmoe.weights.byte_ranges import ByteReader

MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation."""

DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
"""Every dtype of the format to its bits per value; ``layouts`` checks which of them weights may have."""

_FIRST_BYTES = 1 << 16
"""What is read first of a file that is not on this machine; most headers end within."""
_MAX_DIMENSION = 2**63 - 1
_KEYS = frozenset(("dtype", "shape", "data_offsets"))


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor as the header describes it; ``begin`` and ``end`` are byte positions in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """The checked header of one safetensors file."""

    path: Path
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    file_bytes: int


def read_header(path: Path) -> SafetensorsHeader:
    """Read and check the header of a safetensors file, without reading tensor data.

    Raises SafetensorsError for a file that cannot be read or breaks the specification.
    """
    try:
        with open(path, "rb") as file:
            return _checked_header(path, file, os.fstat(file.fileno()).st_size)
    except OSError as error:
        raise SafetensorsError(f"{path} cannot be read: {error.strerror}") from error


def _checked_header(path: Path, file: BinaryIO, file_bytes: int) -> SafetensorsHeader:
    refusal = _refusal(path)
    try:
        header = _parse_header(path, file, file_bytes)
    except SafetensorsError as error:
        if (instead := what_instead(path)) is None:
            raise
        raise SafetensorsError(f"{path} is {instead}") from error
    if refusal:
        raise SafetensorsError(f"{path} is refused by the safetensors library: {refusal}; fetch it again")
    return header


def _refusal(path: Path) -> str:
    """The reason why the safetensors library refuses a file, of which it reads the header; empty if it opens it."""
    try:
        with safe_open(path, framework="numpy"):
            return ""
    except (SafetensorError, OSError) as error:
        return one_line(error)


def _parse_header(path: Path, file: BinaryIO, file_bytes: int) -> SafetensorsHeader:
    text, data_begin = _header_text(path, file, file_bytes)
    table = _json_object(path, text)
    metadata = _metadata(path, table.pop("__metadata__", {}))
    entries = {name: _entry(path, name, value, data_begin) for name, value in table.items()}
    _check_coverage(path, entries, data_begin, file_bytes)
    return SafetensorsHeader(path, entries, metadata, file_bytes)


def _header_text(path: Path, file: BinaryIO, file_bytes: int) -> tuple[bytes, int]:
    length_field = file.read(8)
    if len(length_field) < 8:
        raise SafetensorsError(f"{path} has {file_bytes} bytes, too few for a safetensors file; fetch it again")
    length = int.from_bytes(length_field, "little")
    if length > MAX_HEADER_BYTES:
        raise SafetensorsError(f"{path} claims a header of {length} bytes, more than {MAX_HEADER_BYTES}")
    if 8 + length > file_bytes:
        raise SafetensorsError(f"{path} is cut off: its header has {length} bytes, the file {file_bytes}")
    text = file.read(length)
    if len(text) < length:
        raise SafetensorsError(f"{path} became shorter while it was read")
    if not text.startswith(b"{"):
        raise SafetensorsError(f"{path} is not a safetensors file: its header does not begin with '{{'")
    return text, 8 + length


def _json_object(path: Path, text: bytes) -> dict[str, Any]:
    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise SafetensorsError(f"{path}: the header names {twice!r:.100} twice")
        return table

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=without_duplicates)
    except (ValueError, RecursionError) as error:
        raise SafetensorsError(f"{path}: the header is not UTF-8 JSON: {one_line(error)}") from error
    assert isinstance(value, dict)
    return value


def _metadata(path: Path, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise SafetensorsError(f"{path}: __metadata__ must map strings to strings")
    return value


def _entry(path: Path, name: str, value: object, data_begin: int) -> TensorEntry:
    where = f"{path}: tensor {name!r:.100}"
    if not isinstance(value, dict) or value.keys() != _KEYS:
        raise SafetensorsError(f"{where} must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise SafetensorsError(f"{where} has the unknown dtype {dtype!r:.40}")
    if not isinstance(shape, list) or not all(_is_size(size) for size in shape):
        raise SafetensorsError(f"{where} has a shape that is not a list of non-negative integers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        raise SafetensorsError(f"{where} has data_offsets that are not two non-negative integers")
    begin, end = offsets
    if begin > end:
        raise SafetensorsError(f"{where} ends at {end}, before its beginning at {begin}")
    _check_bytes(where, dtype, shape, end - begin)
    return TensorEntry(name, dtype, tuple(shape), data_begin + begin, data_begin + end)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value <= _MAX_DIMENSION


def _check_bytes(where: str, dtype: str, shape: list[int], n_bytes: int) -> None:
    n_values = 0 if 0 in shape else 1
    for size in shape:
        n_values *= size
        if n_values > _MAX_DIMENSION:
            raise SafetensorsError(f"{where} has a shape whose product overflows 64 bits")
    if n_values * DTYPE_BITS[dtype] != n_bytes * 8:
        raise SafetensorsError(f"{where} has {n_bytes} bytes, which is not {n_values} values of {dtype}")


def _check_coverage(path: Path, entries: Mapping[str, TensorEntry], data_begin: int, file_bytes: int) -> None:
    position = data_begin
    for entry in sorted(entries.values(), key=lambda entry: (entry.begin, entry.end)):
        if entry.begin != position:
            what = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise SafetensorsError(f"{path}: tensor {entry.name!r:.100} {what}")
        position = entry.end
        if position > file_bytes:
            raise SafetensorsError(
                f"{path} is cut off: tensor {entry.name!r:.100} ends at byte {position}, the file at {file_bytes}; "
                "fetch it again"
            )
    if position < file_bytes:
        raise SafetensorsError(f"{path} has {file_bytes - position} bytes at its end that belong to no tensor")


class TensorFile:
    """A safetensors file with a checked header, on this machine or on the hub, whose bytes are read by position.

    Raises SafetensorsError for a file that cannot be read or breaks the specification.
    """

    def __init__(self, source: Path | ByteReader) -> None:
        """``source`` is a file's path, or the reader of a file that is elsewhere."""
        if isinstance(source, Path):
            local = PositionalFile(source, SafetensorsError)
            with local.opened() as file:
                self.header = _checked_header(source, file, local.n_bytes)
            self.bytes: ByteReader = local
        else:
            self.header = _parse_header(source.path, io.BytesIO(_beginning(source)), source.n_bytes)
            self.bytes = source

    @property
    def path(self) -> Path:
        """What messages call the file."""
        return self.bytes.path

    def read_into(self, begin: int, buffer: memoryview) -> None:
        """Fill ``buffer`` (bytes, contiguous) from byte ``begin`` on; safe from several threads at once."""
        self.bytes.read_into(begin, buffer)

    def close(self) -> None:
        """No more reading after this; a second call does nothing."""
        self.bytes.close()


def _beginning(source: ByteReader) -> bytes:
    """The first bytes of a file: its header, if that may be as long as it says."""
    head = bytearray(min(source.n_bytes, _FIRST_BYTES))
    source.read_into(0, memoryview(head))
    end = 8 + int.from_bytes(head[:8], "little")
    if len(head) < end <= min(source.n_bytes, 8 + MAX_HEADER_BYTES):
        begin = len(head)
        head.extend(bytes(end - begin))
        source.read_into(begin, memoryview(head)[begin:])
    return bytes(head)
