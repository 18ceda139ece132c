"""The header of a GGUF file, which is read as untrusted input.

Owns the content of a header, the rules that it must follow and the limits of what is read. It is our own code, because
the reader of the ``gguf`` package hangs on an array length of 2^63 and accepts zero dimensions, overlapping tensors and
unaligned offsets. Headers are written by ``encoding``; the files of a split model are joined in ``model``; rows of
tensors are read by ``stored_rows``.
"""

from __future__ import annotations

import io
import math
import re
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ggufmoe.errors import GGUFError
from ggufmoe.files import possible_path, what_instead
from ggufmoe.gguf.types import REMOVED_TYPES, STRUCT_CODES, GGMLType, ValueType
from ggufmoe.gguf.upstream import DEFAULT_ALIGNMENT, Keys

MAGIC = b"GGUF"
MAX_TENSOR_NAME_BYTES = 63
"""ggml keeps names in 64 bytes, the closing zero included (GGML_MAX_NAME)."""
MAX_DIMS = 4
MAX_KEY_BYTES = 2**16 - 1
"""The format's own limit for metadata keys."""
MAX_HEADER_BYTES = 128 * 2**20
"""Real headers are below 20 MiB, with a vocabulary of 262,144 tokens and its merges."""
MAX_ARRAY_ITEMS = 2**23
"""Of all arrays of a file together: with MAX_HEADER_BYTES this bounds the memory that a hostile header can take."""
_INT64_MAX = 2**63 - 1
_FIRST_READ_BYTES = 256 * 2**10

_U32, _I32, _U64, _I64 = (struct.Struct(code) for code in ("<I", "<i", "<Q", "<q"))
_ITEM_BYTES = {kind: struct.calcsize("<" + code) for kind, code in STRUCT_CODES.items()}
_MIN_KV_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class GGUFValue:
    """One metadata value with the type that it has in the file.

    ``value`` is an int, float, bool or str, and for arrays a list of one of them, whose type is ``item_type``. Bytes
    that are not UTF-8 (tokens may hold any) are kept as Python's surrogate escapes, so writing gives the same bytes;
    only the bits of a NaN are not kept.
    """

    type: ValueType
    value: Any
    item_type: ValueType | None = None


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: ``shape`` in numpy's order (ggml's ``ne`` reversed), ``offset`` in bytes from the data's start."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    offset: int
    n_bytes: int

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def plain_shape(self) -> tuple[int, ...]:
        """``shape`` without leading ones, which ggml does not count."""
        return without_leading_ones(self.shape)


@dataclass(frozen=True)
class Header:
    """The checked content of a GGUF file before its tensor bytes; made by ``read_header``."""

    version: int
    metadata: Mapping[str, GGUFValue]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_offset: int
    file_bytes: int

    def get(self, key: str, default: Any = None) -> Any:
        """The plain value of a metadata key, or ``default`` where the file has none."""
        found = self.metadata.get(key)
        return default if found is None else found.value

    @property
    def data_bytes(self) -> int:
        """Bytes from the beginning of the first tensor to the end of the last one."""
        return self.tensors[-1].offset + self.tensors[-1].n_bytes if self.tensors else 0

    @property
    def trailing_bytes(self) -> int:
        """Bytes after the last tensor and its padding; the header does not account for them."""
        return max(0, self.file_bytes - padded(self.data_offset + self.data_bytes, self.alignment))


def without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """``shape`` without the dimensions of 1 at its beginning; the last dimension always stays."""
    n_ones = next((i for i, size in enumerate(shape[:-1]) if size != 1), len(shape) - 1)
    return shape[n_ones:]


def padded(size: int, alignment: int) -> int:
    """``size`` rounded up to a multiple of ``alignment``."""
    return -(-size // alignment) * alignment


def read_header(path: Path) -> Header:
    """Read and check the header of one GGUF file (version 2 or 3, little-endian).

    Reads no tensor bytes and at most MAX_HEADER_BYTES. Refuses with GGUFError all that llama.cpp's ``gguf.cpp`` and
    model loader refuse (commit 0c1e57098), and also: zero dimensions, tensors without dimensions or name, bools other
    than 0 and 1, keys longer than the format's 65535 bytes, keys and names that are not UTF-8. Bytes after the last
    tensor are allowed, as in llama.cpp; ``Header.trailing_bytes`` counts them.
    """
    path = possible_path(path)
    try:
        size = _regular_file_bytes(path)
        with path.open("rb", buffering=0) as file:
            return _read(_Cursor(file, path, size))
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read: {error.strerror or error}{_meant(path)}") from error


def parse_header(head: bytes, path: Path, file_bytes: int) -> Header:
    """The header of a file that need not exist, from its first bytes; ``path`` and ``file_bytes`` are the file's.

    ``head`` must hold all bytes before the first tensor. Raises GGUFError as ``read_header`` does.
    """
    return _read(_Cursor(cast(io.RawIOBase, io.BytesIO(head)), path, file_bytes))


def read_header_from(file: io.RawIOBase, path: Path, n_bytes: int) -> Header:
    """``read_header`` of a stream of ``n_bytes`` that messages call ``path``.

    Raises what ``file`` raises, and GGUFError.
    """
    return _read(_Cursor(file, path, n_bytes))


_HUB_ID = re.compile(r"[\w][\w.-]*/[\w.-]*\w", re.ASCII)


def _meant(path: Path) -> str:
    """What a path that cannot be read may be instead of a GGUF file, and how to make one; empty if nothing."""
    if path.is_symlink():
        return f"; it is {what_instead(path)}"
    if not path.exists() and path.suffix != ".gguf" and _HUB_ID.fullmatch(str(path)):
        return f"; for a model of the hub make a file first: `ggufmoe convert {path} -o {path.name}.gguf`"
    return ""


def _regular_file_bytes(path: Path) -> int:
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        inside = next(iter(sorted(path.glob("*.gguf"))), None)
        way_out = "give a .gguf file" if inside is None else f"give a .gguf file, for example {inside}"
        if (path / "config.json").is_file() and inside is None:
            output = f"{path.absolute().name}.gguf"
            way_out = f"make a .gguf file of it first: `ggufmoe convert {path} -o {output}`"
        raise GGUFError(f"{path}: is a directory; {way_out}")
    if not stat.S_ISREG(status.st_mode):
        raise GGUFError(f"{path}: is not a regular file; give a .gguf file")
    if not status.st_size:
        raise GGUFError(f"{path}: is empty; give a .gguf file")
    return status.st_size


class _Cursor:
    """Reads a header from front to back; every length is compared with the size of the file before it is used."""

    def __init__(self, file: io.RawIOBase | io.FileIO, path: Path, file_bytes: int) -> None:
        self.path = path
        self.file_bytes = file_bytes
        self.position = 0
        self.items_left = MAX_ARRAY_ITEMS
        self.buffer = bytearray()
        self._file = file

    def error(self, message: str) -> GGUFError:
        return GGUFError(f"{self.path}: {message}")

    @property
    def remaining(self) -> int:
        return self.file_bytes - self.position

    def require(self, n_bytes: int, what: str) -> None:
        """Have the next ``n_bytes`` in the buffer. Raises GGUFError if ``what`` would end after the end of the file."""
        if n_bytes > self.remaining:
            raise self.error(
                f"{what} needs {n_bytes} bytes at byte {self.position}, but {self.remaining} are left; "
                "the file is truncated or corrupt, download or make it again"
            )
        stop = self.position + n_bytes
        if stop > len(self.buffer):
            self._fill(stop, what)

    def _fill(self, stop: int, what: str) -> None:
        if stop > MAX_HEADER_BYTES:
            raise self.error(f"{what} makes the header larger than {MAX_HEADER_BYTES} bytes; the file is corrupt")
        goal = min(max(stop, 2 * len(self.buffer), _FIRST_READ_BYTES), self.file_bytes, MAX_HEADER_BYTES)
        while len(self.buffer) < goal:
            chunk = self._file.read(goal - len(self.buffer))
            if not chunk and len(self.buffer) >= stop:
                return
            if not chunk:
                raise self.error(f"the file shrank while it was read ({len(self.buffer)} bytes); is it being written?")
            self.buffer += chunk

    def number(self, layout: struct.Struct, what: str) -> int:
        self.require(layout.size, what)
        (number,) = layout.unpack_from(self.buffer, self.position)
        self.position += layout.size
        return int(number)

    def take(self, n_bytes: int, what: str) -> bytes:
        self.require(n_bytes, what)
        start, self.position = self.position, self.position + n_bytes
        return bytes(self.buffer[start : self.position])

    def string(self, what: str) -> str:
        return self.take(self.number(_U64, what), what).decode("utf-8", "surrogateescape")

    def identifier(self, what: str, max_bytes: int) -> str:
        """A key or a tensor's name: not empty, of limited length, proper UTF-8 without NUL."""
        length = self.number(_U64, what)
        if not 0 < length <= max_bytes:
            raise self.error(f"{what} is {length} bytes long, expected 1 to {max_bytes}; the file is corrupt")
        raw = self.take(length, what)
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise self.error(f"{what} is not UTF-8: {raw[:64]!r}; the file is corrupt") from error
        if "\0" in text:
            raise self.error(f"{what} holds a NUL byte: {raw[:64]!r}; the file is corrupt")
        return text


def _read(cursor: _Cursor) -> Header:
    version = _read_version(cursor)
    n_tensors = _read_count(cursor, "tensors", _MIN_TENSOR_BYTES)
    n_kv = _read_count(cursor, "metadata keys", _MIN_KV_BYTES)
    metadata = _read_metadata(cursor, n_kv)
    alignment = alignment_of(str(cursor.path), metadata)
    tensors = _read_tensors(cursor, n_tensors)
    data_offset = padded(cursor.position, alignment) if tensors else cursor.position
    header = Header(version, metadata, tensors, alignment, data_offset, cursor.file_bytes)
    check_layout(str(cursor.path), tensors, alignment)
    _check_data(cursor, header)
    return header


def _read_version(cursor: _Cursor) -> int:
    magic = bytes(cursor.take(4, "the magic number"))
    if magic != MAGIC:
        if cursor.path.suffix.lower() in (".yaml", ".yml"):
            output = cursor.path.with_suffix(".gguf").name
            raise cursor.error(
                f"is a merge recipe; make a file of it first: `ggufmoe convert {cursor.path} -o {output}`"
            )
        if (instead := what_instead(cursor.path)) is not None:
            raise cursor.error(f"is {instead}")
        raise cursor.error(f"starts with {magic!r}, expected {MAGIC!r}; this is not a GGUF file")
    version = cursor.number(_U32, "the version")
    if version and not version & 0xFFFF:
        raise cursor.error("is a big-endian GGUF; convert it with gguf-py's gguf_convert_endian.py or get another one")
    if version not in (2, 3):
        raise cursor.error(f"is GGUF version {version}, expected 2 or 3; get or make a current file")
    return version


def _read_count(cursor: _Cursor, what: str, min_bytes: int) -> int:
    count = cursor.number(_I64, f"the number of {what}")
    if not 0 <= count <= cursor.remaining // min_bytes:
        raise cursor.error(
            f"claims {count} {what}, impossible with {cursor.remaining} bytes left; the file is corrupt or truncated"
        )
    return count


def _read_metadata(cursor: _Cursor, n_kv: int) -> dict[str, GGUFValue]:
    metadata: dict[str, GGUFValue] = {}
    for index in range(n_kv):
        key = cursor.identifier(f"metadata key {index}", MAX_KEY_BYTES)
        if key in metadata:
            raise cursor.error(f"metadata key {key!r} appears twice; the file is corrupt")
        metadata[key] = _read_value(cursor, f"the value of {key!r}")
    return metadata


def _read_value(cursor: _Cursor, what: str) -> GGUFValue:
    kind = _read_value_type(cursor, what)
    if kind is ValueType.STRING:
        return GGUFValue(kind, cursor.string(what))
    if kind is ValueType.ARRAY:
        item_type = _read_value_type(cursor, what)
        if item_type is ValueType.ARRAY:
            raise cursor.error(f"{what} is an array of arrays, which GGUF readers do not support")
        return GGUFValue(kind, _read_array(cursor, item_type, what), item_type)
    return GGUFValue(kind, _read_numbers(cursor, kind, 1, what)[0])


def _read_value_type(cursor: _Cursor, what: str) -> ValueType:
    number = cursor.number(_I32, what)
    try:
        return ValueType(number)
    except ValueError as error:
        raise cursor.error(f"{what} has type {number}, expected 0 to {max(ValueType)}; the file is corrupt") from error


def _read_array(cursor: _Cursor, item_type: ValueType, what: str) -> list[Any]:
    count = cursor.number(_U64, what)
    if count * _ITEM_BYTES.get(item_type, _U64.size) > cursor.remaining:
        raise cursor.error(
            f"{what} claims {count} items, but {cursor.remaining} bytes are left; the file is corrupt or truncated"
        )
    cursor.items_left -= count
    if cursor.items_left < 0:
        raise cursor.error(f"{what} brings its arrays over {MAX_ARRAY_ITEMS} items together; the file is corrupt")
    if item_type is ValueType.STRING:
        return _read_strings(cursor, count, what)
    return _read_numbers(cursor, item_type, count, what)


def _read_strings(cursor: _Cursor, count: int, what: str) -> list[str]:
    strings: list[str] = []
    buffer, unpack = cursor.buffer, _U64.unpack_from
    for _ in range(count):
        start = cursor.position + _U64.size
        if start > len(buffer):
            cursor.require(_U64.size, what)
        stop = start + unpack(buffer, cursor.position)[0]
        if stop > len(buffer):
            cursor.require(stop - cursor.position, what)
        strings.append(buffer[start:stop].decode("utf-8", "surrogateescape"))
        cursor.position = stop
    return strings


def _read_numbers(cursor: _Cursor, type: ValueType, count: int, what: str) -> list[Any]:
    raw = cursor.take(count * _ITEM_BYTES[type], what)
    if type is not ValueType.BOOL:
        return list(struct.unpack(f"<{count}{STRUCT_CODES[type]}", raw))
    if raw.strip(b"\0\1"):
        raise cursor.error(f"{what} is a bool other than 0 and 1; the file is corrupt")
    return [byte == 1 for byte in raw]


def alignment_of(where: str, metadata: Mapping[str, GGUFValue]) -> int:
    """Bytes that tensors are aligned to, by ``general.alignment``. Raises GGUFError unless it is a power of two."""
    key = Keys.General.ALIGNMENT
    value = metadata.get(key)
    if value is None:
        return DEFAULT_ALIGNMENT
    if value.type is not ValueType.UINT32:
        raise GGUFError(f"{where}: {key} is {value.type.name}, expected UINT32; the file is corrupt")
    alignment = int(value.value)
    if alignment < 1 or alignment & (alignment - 1):
        raise GGUFError(f"{where}: {key} is {alignment}, expected a power of two; the file is corrupt")
    return alignment


def _read_tensors(cursor: _Cursor, n_tensors: int) -> tuple[TensorInfo, ...]:
    tensors: dict[str, TensorInfo] = {}
    for index in range(n_tensors):
        name = cursor.identifier(f"the name of tensor {index}", MAX_TENSOR_NAME_BYTES)
        if name in tensors:
            raise cursor.error(f"tensor {name!r} appears twice; the file is corrupt")
        tensors[name] = _read_tensor(cursor, name)
    return tuple(tensors.values())


def _read_tensor(cursor: _Cursor, name: str) -> TensorInfo:
    what = f"tensor {name!r}"
    n_dims = cursor.number(_U32, what)
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.error(f"{what} has {n_dims} dimensions, expected 1 to {MAX_DIMS}; the file is corrupt")
    ne = [cursor.number(_I64, what) for _ in range(n_dims)]
    kind = _read_tensor_type(cursor, what)
    n_bytes = tensor_bytes(f"{cursor.path}: {what}", ne, kind)
    return TensorInfo(name, kind, tuple(reversed(ne)), cursor.number(_U64, what), n_bytes)


def tensor_bytes(what: str, ne: Sequence[int], type: GGMLType) -> int:
    """Bytes of a tensor with these dimensions (ggml's order). Raises GGUFError where no such tensor can exist."""
    if not 1 <= len(ne) <= MAX_DIMS or min(ne) < 1:
        raise GGUFError(f"{what} has dimensions {list(ne)}, each must be at least 1; the file is corrupt")
    if ne[0] % type.block_size:
        raise GGUFError(
            f"{what} has {ne[0]} columns, not a multiple of {type.name}'s block of {type.block_size}; "
            "the file is corrupt"
        )
    n_bytes = math.prod(ne) // type.block_size * type.block_bytes
    if max(math.prod(ne), n_bytes) > _INT64_MAX:
        raise GGUFError(f"{what} has dimensions {list(ne)}, too large for any memory; the file is corrupt")
    return n_bytes


def _read_tensor_type(cursor: _Cursor, what: str) -> GGMLType:
    number = cursor.number(_I32, what)
    if number in REMOVED_TYPES:
        raise cursor.error(f"{what} has type {REMOVED_TYPES[number]}, which ggml has removed; get a newer file")
    try:
        return GGMLType.from_id(number)
    except ValueError as error:
        raise cursor.error(f"{what} has type {number}, unknown to this ggml; the file is corrupt or newer") from error


def check_layout(where: str, tensors: Sequence[TensorInfo], alignment: int) -> None:
    """Raise GGUFError unless each tensor begins where the padding of the one before it ends, as llama.cpp demands."""
    expected = 0
    for tensor in tensors:
        if tensor.offset != expected:
            kind = _layout_fault(tensor.offset, expected, alignment)
            raise GGUFError(
                f"{where}: tensor {tensor.name!r} {kind}: offset {tensor.offset}, expected {expected}; "
                "the file is corrupt"
            )
        expected = padded(expected + tensor.n_bytes, alignment)
        if expected > _INT64_MAX:
            raise GGUFError(f"{where}: tensors up to {tensor.name!r} are too large together; the file is corrupt")


def _layout_fault(offset: int, expected: int, alignment: int) -> str:
    if offset % alignment:
        return f"is not aligned to {alignment} bytes"
    return "overlaps the one before it" if offset < expected else "leaves a hole before it"


def _check_data(cursor: _Cursor, header: Header) -> None:
    for tensor in header.tensors:
        stop = header.data_offset + tensor.offset + tensor.n_bytes
        if stop > header.file_bytes:
            raise cursor.error(
                f"tensor {tensor.name!r} ends at byte {stop}, but the file has {header.file_bytes}; "
                "it is truncated, download or make it again"
            )
