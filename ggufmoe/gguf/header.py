"""The header of a GGUF file: its value and tensor types, and a reader that trusts nothing.

Owns the facts of the format (GGUF version 3 and ggml's tensor types), the check of headers, their bytes for writers,
and how the files of a split model belong together. Tensor bytes belong to the writer, the runtime and the tools that
ask for them by offset.
"""

from __future__ import annotations

import io
import math
import re
import stat
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

from ggufmoe.errors import GGUFError


class ValueType(IntEnum):
    """Types of GGUF metadata values, numbered as in the format."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


class GGMLType(Enum):
    """ggml's tensor types: number in the file, weights per block, bytes per block.

    Source: ``ggml/include/ggml.h`` and the type traits in ``ggml/src/ggml.c`` at the pinned commit; the tests compare
    every row with ``ggml_blck_size`` and ``ggml_type_size``.
    """

    F32 = (0, 1, 4)
    F16 = (1, 1, 2)
    Q4_0 = (2, 32, 18)
    Q4_1 = (3, 32, 20)
    Q5_0 = (6, 32, 22)
    Q5_1 = (7, 32, 24)
    Q8_0 = (8, 32, 34)
    Q8_1 = (9, 32, 36)
    Q2_K = (10, 256, 84)
    Q3_K = (11, 256, 110)
    Q4_K = (12, 256, 144)
    Q5_K = (13, 256, 176)
    Q6_K = (14, 256, 210)
    Q8_K = (15, 256, 292)
    IQ2_XXS = (16, 256, 66)
    IQ2_XS = (17, 256, 74)
    IQ3_XXS = (18, 256, 98)
    IQ1_S = (19, 256, 50)
    IQ4_NL = (20, 32, 18)
    IQ3_S = (21, 256, 110)
    IQ2_S = (22, 256, 82)
    IQ4_XS = (23, 256, 136)
    I8 = (24, 1, 1)
    I16 = (25, 1, 2)
    I32 = (26, 1, 4)
    I64 = (27, 1, 8)
    F64 = (28, 1, 8)
    IQ1_M = (29, 256, 56)
    BF16 = (30, 1, 2)
    TQ1_0 = (34, 256, 54)
    TQ2_0 = (35, 256, 66)
    MXFP4 = (39, 32, 17)
    NVFP4 = (40, 64, 36)
    Q1_0 = (41, 128, 18)
    Q2_0 = (42, 64, 18)

    def __init__(self, id: int, block_size: int, block_bytes: int) -> None:
        self.id = id
        self.block_size = block_size
        self.block_bytes = block_bytes

    @property
    def is_quantized(self) -> bool:
        """Whether several weights share one block (everything but plain numbers)."""
        return self.block_size > 1

    def row_bytes(self, n_cols: int) -> int:
        """Bytes of one row of ``n_cols`` weights; ``n_cols`` must be a multiple of the block size."""
        if n_cols % self.block_size:
            raise ValueError(f"{n_cols} columns are not a multiple of {self.name}'s block of {self.block_size}")
        return n_cols // self.block_size * self.block_bytes

    @classmethod
    def from_id(cls, id: int) -> GGMLType:
        """The type with this number in GGUF files; ValueError if ggml has none (or has removed it)."""
        member = _TYPES_BY_ID.get(id)
        if member is None:
            raise ValueError(f"{id} is not a tensor type of this ggml")
        return member


_TYPES_BY_ID = {member.id: member for member in GGMLType}
_REMOVED_TYPES = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8"} | {
    36: "IQ4_NL_4_4",
    37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
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
_CODES = {
    ValueType.UINT8: "B",
    ValueType.INT8: "b",
    ValueType.UINT16: "H",
    ValueType.INT16: "h",
    ValueType.UINT32: "I",
    ValueType.INT32: "i",
    ValueType.FLOAT32: "f",
    ValueType.BOOL: "B",
    ValueType.UINT64: "Q",
    ValueType.INT64: "q",
    ValueType.FLOAT64: "d",
}
_ITEM_BYTES = {kind: struct.calcsize("<" + code) for kind, code in _CODES.items()}
_MIN_KV_BYTES = 8 + 1 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class Value:
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


@dataclass(frozen=True)
class Header:
    """All that a GGUF file says before its tensor bytes, checked: see ``read_header``."""

    version: int
    metadata: Mapping[str, Value]
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
        """Bytes from the first tensor's beginning to the last one's end."""
        return self.tensors[-1].offset + self.tensors[-1].n_bytes if self.tensors else 0

    @property
    def trailing_bytes(self) -> int:
        """Bytes behind the last tensor and its padding, which nothing in the header accounts for."""
        return max(0, self.file_bytes - padded(self.data_offset + self.data_bytes, self.alignment))


def padded(size: int, alignment: int) -> int:
    """``size`` rounded up to a multiple of ``alignment``."""
    return -(-size // alignment) * alignment


def read_header(path: Path) -> Header:
    """Read and check the header of one GGUF file (version 2 or 3, little-endian).

    Reads no tensor bytes and at most MAX_HEADER_BYTES. Refuses with GGUFError all that llama.cpp's ``gguf.cpp`` and
    model loader refuse (commit 0c1e57098), and besides: zero dimensions, tensors without dimensions or name, bools
    other than 0 and 1, keys beyond the format's 65535 bytes, keys and names that are not UTF-8. Bytes behind the last
    tensor are allowed, as in llama.cpp; ``Header.trailing_bytes`` counts them.
    """
    path = Path(path)
    try:
        size = _regular_file_bytes(path)
        with path.open("rb", buffering=0) as file:
            return _read(_Cursor(file, path, size))
    except OSError as error:
        raise GGUFError(f"{path}: cannot be read: {error.strerror or error}") from error


def _regular_file_bytes(path: Path) -> int:
    status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        is_checkpoint = (path / "config.json").is_file()
        way_out = "make a .gguf file of it with `ggufmoe convert`" if is_checkpoint else "give a .gguf file"
        raise GGUFError(f"{path}: is a directory; {way_out}")
    if not stat.S_ISREG(status.st_mode):
        raise GGUFError(f"{path}: is not a regular file; give a .gguf file")
    if not status.st_size:
        raise GGUFError(f"{path}: is empty; give a .gguf file")
    return status.st_size


class _Cursor:
    """Bytes of a header from front to back; every length is checked against the file before it is believed."""

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
        """Have the next ``n_bytes`` in the buffer, or say that ``what`` lies beyond the file's end."""
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
    alignment = _alignment(str(cursor.path), metadata)
    tensors = _read_tensors(cursor, n_tensors)
    data_offset = padded(cursor.position, alignment) if tensors else cursor.position
    header = Header(version, metadata, tensors, alignment, data_offset, cursor.file_bytes)
    _check_layout(str(cursor.path), tensors, alignment)
    _check_data(cursor, header)
    return header


def _read_version(cursor: _Cursor) -> int:
    magic = bytes(cursor.take(4, "the magic number"))
    if magic != MAGIC:
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


def _read_metadata(cursor: _Cursor, n_kv: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for index in range(n_kv):
        key = cursor.identifier(f"metadata key {index}", MAX_KEY_BYTES)
        if key in metadata:
            raise cursor.error(f"metadata key {key!r} appears twice; the file is corrupt")
        metadata[key] = _read_value(cursor, f"the value of {key!r}")
    return metadata


def _read_value(cursor: _Cursor, what: str) -> Value:
    kind = _read_value_type(cursor, what)
    if kind is ValueType.STRING:
        return Value(kind, cursor.string(what))
    if kind is ValueType.ARRAY:
        item_type = _read_value_type(cursor, what)
        if item_type is ValueType.ARRAY:
            raise cursor.error(f"{what} is an array of arrays, which GGUF readers do not support")
        return Value(kind, _read_array(cursor, item_type, what), item_type)
    return Value(kind, _read_numbers(cursor, kind, 1, what)[0])


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
        return list(struct.unpack(f"<{count}{_CODES[type]}", raw))
    if raw.strip(b"\0\1"):
        raise cursor.error(f"{what} is a bool other than 0 and 1; the file is corrupt")
    return [byte == 1 for byte in raw]


def _alignment(where: str, metadata: Mapping[str, Value]) -> int:
    value = metadata.get("general.alignment")
    if value is None:
        return DEFAULT_ALIGNMENT
    if value.type is not ValueType.UINT32:
        raise GGUFError(f"{where}: general.alignment is {value.type.name}, expected UINT32; the file is corrupt")
    alignment = int(value.value)
    if alignment < 1 or alignment & (alignment - 1):
        raise GGUFError(f"{where}: general.alignment is {alignment}, expected a power of two; the file is corrupt")
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
    n_bytes = _tensor_bytes(f"{cursor.path}: {what}", ne, kind)
    return TensorInfo(name, kind, tuple(reversed(ne)), cursor.number(_U64, what), n_bytes)


def _tensor_bytes(what: str, ne: Sequence[int], type: GGMLType) -> int:
    """Bytes of a tensor of these dimensions, if there can be one."""
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
    if number in _REMOVED_TYPES:
        raise cursor.error(f"{what} has type {_REMOVED_TYPES[number]}, which ggml has removed; get a newer file")
    if number not in _TYPES_BY_ID:
        raise cursor.error(f"{what} has type {number}, unknown to this ggml; the file is corrupt or newer")
    return _TYPES_BY_ID[number]


def _check_layout(where: str, tensors: Sequence[TensorInfo], alignment: int) -> None:
    """Each tensor begins where the one before it ends, padded: llama.cpp's rule, so nothing overlaps or is hidden."""
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


@dataclass(frozen=True)
class Shard:
    """One file of a model with its header."""

    path: Path
    header: Header


@dataclass(frozen=True)
class ModelHeader:
    """The headers of all files of one model; a model that is not split is a single shard."""

    shards: tuple[Shard, ...]

    @property
    def metadata(self) -> Mapping[str, Value]:
        """The model's metadata, which the first shard holds."""
        return self.shards[0].header.metadata

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Tensors of all shards; an offset counts within its own shard."""
        return tuple(tensor for shard in self.shards for tensor in shard.header.tensors)

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, the first one (which llama.cpp is given) in front."""
        return tuple(shard.path for shard in self.shards)

    @property
    def file_bytes(self) -> int:
        """Size of all files together."""
        return sum(shard.header.file_bytes for shard in self.shards)

    def get(self, key: str, default: Any = None) -> Any:
        """The plain value of a metadata key, or ``default`` where the model has none."""
        return self.shards[0].header.get(key, default)


_SHARD_NAME = re.compile(r"(?P<prefix>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
_LEGACY_EXPERT = re.compile(r"blk\.\d+\.ffn_(gate|up|down)\.\d+\.weight")


def shard_paths(path: Path) -> tuple[Path, ...]:
    """All files of the model that ``path`` is, or is one shard of, in order; a file that is not split stands alone.

    Raises GGUFError if the header cannot be read, contradicts the file's name, or files are missing.
    """
    return _shard_paths(Path(path), read_header(path))


def read_model_header(path: Path) -> ModelHeader:
    """Read the headers of all shards of a model, given any of them, as llama.cpp writes and checks them.

    Raises GGUFError as ``read_header`` does, and for missing or mistaken shards.
    """
    path = Path(path)
    given = read_header(path)
    paths = _shard_paths(path, given)
    if len(paths) == 1:
        return ModelHeader((Shard(path, given),))
    model = ModelHeader(tuple(Shard(file, given if file == path else read_header(file)) for file in paths))
    for number, shard in enumerate(model.shards):
        _check_shard(shard, number, len(paths))
    _check_shard_tensors(model)
    return model


def _shard_paths(path: Path, header: Header) -> tuple[Path, ...]:
    count = _uint16(path, header, "split.count", 1)
    if count <= 1:
        return (path,)
    number = _uint16(path, header, "split.no", None)
    name = _SHARD_NAME.fullmatch(path.name)
    if name is None or (int(name["number"]), int(name["count"])) != (number + 1, count):
        raise GGUFError(
            f"{path}: is shard {number + 1} of {count}, so its name must end in -{number + 1:05d}-of-{count:05d}.gguf; "
            "give it back its name"
        )
    paths = tuple(path.with_name(f"{name['prefix']}-{n:05d}-of-{count:05d}.gguf") for n in range(1, count + 1))
    missing = [file.name for file in paths if not file.is_file()]
    if missing:
        shown = ", ".join(missing[:4]) + (f" and {len(missing) - 4} more" if len(missing) > 4 else "")
        raise GGUFError(f"{path.parent}: {len(missing)} of {count} shards are missing: {shown}; download them as well")
    return paths


def _uint16(path: Path, header: Header, key: str, default: int | None) -> int:
    value = header.metadata.get(key)
    if value is None and default is not None:
        return default
    if value is None or value.type is not ValueType.UINT16:
        found = "missing" if value is None else value.type.name
        raise GGUFError(f"{path}: {key} is {found}, expected UINT16; this shard is corrupt")
    return int(value.value)


def _check_shard(shard: Shard, number: int, count: int) -> None:
    for key, expected in (("split.no", number), ("split.count", count)):
        found = _uint16(shard.path, shard.header, key, None)
        if found != expected:
            raise GGUFError(f"{shard.path}: {key} is {found}, expected {expected}; this shard is of another model")


def _check_shard_tensors(model: ModelHeader) -> None:
    first = model.shards[0]
    expected = first.header.get("split.tensors.count")
    if expected != len(model.tensors):
        raise GGUFError(
            f"{first.path}: split.tensors.count is {expected}, but the shards hold {len(model.tensors)} tensors; "
            "a shard is of another model"
        )
    home: dict[str, Path] = {}
    for shard in model.shards:
        for tensor in shard.header.tensors:
            if tensor.name in home:
                raise GGUFError(f"{shard.path}: tensor {tensor.name!r} is in {home[tensor.name].name} as well")
            home[tensor.name] = shard.path


NO_MODELS = {
    "imatrix": "an importance matrix, not a model; convert and quantize take it with --imatrix",
    "adapter": "an adapter (LoRA), not a model; it has to be merged into its model first",
    "mmproj": "the projector of a model for pictures or sound, not a model by itself",
}
"""What is in a file whose ``general.type`` is not ``model`` (gguf-py's GGUFType), and what it is for."""


def check_kind(model: ModelHeader) -> None:
    """Raise GGUFError if the file says that it is something else than a model."""
    kind = model.get("general.type")
    if isinstance(kind, str) and kind in NO_MODELS:
        raise GGUFError(f"{model.paths[0]}: {NO_MODELS[kind]}")


def legacy_expert_tensors(tensors: Iterable[TensorInfo]) -> tuple[str, ...]:
    """Names of tensors that hold one expert each, as Mixtral files had them before April 2024.

    Not empty means: a legacy file, which llama.cpp at the pinned commit no longer loads; make it again from the
    checkpoint.
    """
    return tuple(tensor.name for tensor in tensors if _LEGACY_EXPERT.fullmatch(tensor.name))


def encode_header(
    metadata: Mapping[str, Value], tensors: Sequence[TensorInfo], alignment: int = DEFAULT_ALIGNMENT
) -> bytes:
    """The bytes of a GGUF version 3 header, little-endian and padded, so that tensor data follows at once.

    Offsets must be as ``read_header`` demands them. An alignment other than 32 must stand in ``metadata`` as well.
    Raises GGUFError for what no reader would take.
    """
    stated = _alignment("new header", metadata)
    if stated != alignment:
        raise GGUFError(f"new header: general.alignment says {stated}, but tensors are aligned to {alignment}")
    _check_new_tensors(tensors, alignment)
    parts = [MAGIC, _U32.pack(VERSION), _I64.pack(len(tensors)), _I64.pack(len(metadata))]
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
        expected = _tensor_bytes(what, tuple(reversed(tensor.shape)), tensor.type)
        if tensor.n_bytes != expected:
            raise GGUFError(f"{what} has {tensor.n_bytes} bytes, expected {expected}")
    _check_layout("new header", tensors, alignment)


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


def _encode_value(key: str, value: Value) -> bytes:
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
    return struct.pack(f"<{len(items)}{_CODES[type]}", *items)


def _encode_tensor(tensor: TensorInfo) -> bytes:
    ne = b"".join(_I64.pack(dim) for dim in reversed(tensor.shape))
    name = _encode_name(tensor.name, MAX_TENSOR_NAME_BYTES)
    return name + _U32.pack(len(tensor.shape)) + ne + _I32.pack(tensor.type.id) + _U64.pack(tensor.offset)
