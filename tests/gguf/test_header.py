"""Headers: literal bytes, agreement with gguf-py, and a refusal for each way in which a file can be wrong."""

from __future__ import annotations

import ctypes
import math
import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ggufmoe.errors import GGUFError
from ggufmoe.gguf import header as ggufheader
from ggufmoe.gguf.encoding import encode_header
from ggufmoe.gguf.header import GGUFValue, TensorInfo, padded, read_header
from ggufmoe.gguf.model import read_model_header, shard_paths
from ggufmoe.gguf.names import legacy_experts
from ggufmoe.gguf.types import GGMLType, ValueType
from ggufmoe.native import library as native

U8, U16, U32, I32, F32 = ValueType.UINT8, ValueType.UINT16, ValueType.UINT32, ValueType.INT32, ValueType.FLOAT32
BOOL, STRING, ARRAY = ValueType.BOOL, ValueType.STRING, ValueType.ARRAY
REMAINING_TYPES = [member for member in ValueType if member is not ARRAY]


def string(raw: bytes | str) -> bytes:
    raw = raw.encode() if isinstance(raw, str) else raw
    return struct.pack("<Q", len(raw)) + raw


def kv(key: bytes | str, type: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<i", type) + payload


def array(item_type: int, count: int, payload: bytes = b"") -> bytes:
    return struct.pack("<iQ", item_type, count) + payload


def tensor(name: bytes | str = "a", ne: Sequence[int] = (8,), type: int = 0, offset: int = 0) -> bytes:
    dims = b"".join(struct.pack("<q", dim) for dim in ne)
    return string(name) + struct.pack("<I", len(ne)) + dims + struct.pack("<iQ", type, offset)


def gguf_bytes(
    kvs: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    *,
    data: bytes = b"",
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_kv: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(kvs) if n_kv is None else n_kv)
    head = magic + struct.pack("<Iqq", version, *counts) + b"".join(kvs) + b"".join(tensors)
    return head + bytes(padded(len(head), alignment) - len(head)) + data


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write_file(content: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return write_file


def test_literal_bytes_are_read(write: Callable[[bytes], Path]) -> None:
    raw = bytes.fromhex(
        "47475546 03000000 0100000000000000 0200000000000000"
        "0100000000000000 78 04000000 2a000000"
        "0100000000000000 79 09000000 08000000 0200000000000000 0200000000000000 6869 0100000000000000 ff"
        "0100000000000000 77 02000000 2000000000000000 0200000000000000 08000000 0000000000000000"
    )
    raw += bytes(padded(len(raw), 32) - len(raw)) + bytes(68)
    header = read_header(write(raw))
    assert header.metadata == {"x": GGUFValue(U32, 42), "y": GGUFValue(ARRAY, ["hi", "\udcff"], STRING)}
    assert header.tensors == (TensorInfo("w", GGMLType.Q8_0, (2, 32), 0, 68),)
    assert (header.version, header.alignment, header.data_offset, header.file_bytes) == (3, 32, 128, 196)
    assert (header.get("x"), header.get("z"), header.get("z", 7), header.data_bytes) == (42, None, 7, 68)
    assert header.tensors[0].n_elements == 64
    assert encode_header(header.metadata, header.tensors) == raw[:128]


NUMBERS: dict[ValueType, list[Any]] = {
    ValueType.UINT8: [0, 255],
    ValueType.INT8: [-128, 127],
    ValueType.UINT16: [0, 65535],
    ValueType.INT16: [-(2**15), 2**15 - 1],
    ValueType.UINT32: [0, 2**32 - 1],
    ValueType.INT32: [-(2**31), 2**31 - 1],
    ValueType.FLOAT32: [0.5, float("-inf")],
    ValueType.BOOL: [True, False],
    ValueType.UINT64: [0, 2**64 - 1],
    ValueType.INT64: [-(2**63), 2**63 - 1],
    ValueType.FLOAT64: [0.1, -1e300],
    ValueType.STRING: ["", "▁déjà vu 🙂\0\n"],
}


def _content() -> tuple[dict[str, GGUFValue], list[tuple[str, np.ndarray[Any, Any], GGMLType]]]:
    metadata = {"general.architecture": GGUFValue(STRING, "llama")}
    metadata |= {f"one.{kind.name}": GGUFValue(kind, values[1]) for kind, values in NUMBERS.items()}
    metadata |= {f"all.{kind.name}": GGUFValue(ARRAY, values, kind) for kind, values in NUMBERS.items()}
    arrays: list[tuple[str, np.ndarray[Any, Any], GGMLType]] = [
        ("norm.weight", np.arange(9, dtype=np.float32), GGMLType.F32),
        ("matrix.weight", np.arange(21, dtype=np.float16).reshape(3, 7), GGMLType.F16),
        ("experts.weight", np.arange(4 * 2 * 68, dtype=np.uint8).reshape(2, 4, 68), GGMLType.Q8_0),
        ("four.weight", np.arange(16, dtype=np.int32).reshape(2, 1, 4, 2), GGMLType.I32),
    ]
    return metadata, arrays


def _write_with_gguf_py(path: Path, alignment: int | None) -> None:
    metadata, arrays = _content()
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in list(metadata.items())[1:]:
        subtype = None if value.item_type is None else gguf.GGUFValueType(value.item_type)
        writer.add_key_value(key, value.value, gguf.GGUFValueType(value.type), sub_type=subtype)
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for name, data, kind in arrays:
        raw = gguf.GGMLQuantizationType(kind.id) if kind is GGMLType.Q8_0 else None
        writer.add_tensor(name, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("alignment", [None, 8, 64])
def test_bytes_and_values_equal_gguf_py(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "gguf-py.gguf"
    _write_with_gguf_py(path, alignment)
    header, reader = read_header(path), gguf.GGUFReader(path)
    assert encode_header(header.metadata, header.tensors, header.alignment) == path.read_bytes()[: header.data_offset]
    assert (header.data_offset, header.alignment) == (reader.data_offset, alignment or 32)
    theirs = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(header.metadata) == list(theirs)
    for key, value in header.metadata.items():
        assert np.array_equal(np.array(value.value), np.array(theirs[key].contents())), key
        assert [kind for kind in (value.type, value.item_type) if kind is not None] == list(theirs[key].types)[:2]
    assert len(header.tensors) == len(reader.tensors)
    for ours, their in zip(header.tensors, reader.tensors, strict=True):
        assert (ours.name, ours.shape) == (their.name, tuple(reversed(their.shape.tolist())))
        assert (ours.type.id, ours.n_bytes) == (their.tensor_type, their.n_bytes)
        assert header.data_offset + ours.offset == their.data_offset


def test_type_table_equals_ggml() -> None:
    lib = native.library()
    for kind in GGMLType:
        assert (lib.ggml_blck_size(kind.id), lib.ggml_type_size(kind.id)) == (kind.block_size, kind.block_bytes)
        assert GGMLType.from_id(kind.id) is kind
    # ggml's tables end at GGML_TYPE_COUNT; block 0 marks the types that it has removed
    count = max(kind.id for kind in GGMLType) + 1
    removed = {number for number in range(count) if lib.ggml_blck_size(number) == 0}
    assert removed == set(range(count)) - {kind.id for kind in GGMLType}


def test_types_know_their_sizes() -> None:
    assert GGMLType.Q4_K.row_bytes(512) == 288
    assert (GGMLType.Q4_K.is_quantized, GGMLType.BF16.is_quantized) == (True, False)
    with pytest.raises(ValueError, match="not a multiple of Q4_K's block of 256"):
        GGMLType.Q4_K.row_bytes(288)
    with pytest.raises(ValueError, match="4 is not a tensor type"):
        GGMLType.from_id(4)


@pytest.mark.parametrize("version", [2, 3])
def test_header_without_tensors_or_keys(write: Callable[[bytes], Path], version: int) -> None:
    header = read_header(write(gguf_bytes(version=version)))
    assert (header.version, header.metadata, header.tensors, header.data_bytes) == (version, {}, (), 0)


GOOD_KEY = kv("k", U32, struct.pack("<I", 1))
BIG = 2**63 - 1
HUGE = struct.pack("<Q", 2**63)

WRONG = {
    "empty file": (b"", "is empty"),
    "magic": (gguf_bytes(magic=b"FUGG"), "starts with b'FUGG'.*not a GGUF"),
    "safetensors": (b'\x50\0\0\0\0\0\0\0{"a":1}', "not a GGUF"),
    "version 0": (gguf_bytes(version=0), "version 0"),
    "version 1": (gguf_bytes(version=1), "version 1"),
    "version 4": (gguf_bytes(version=4), "version 4, expected 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">Iqq", 3, 0, 0), "big-endian"),
    "cut in the version": (b"GGUF\x03\0", "the version needs 4 bytes"),
    "cut in the counts": (gguf_bytes()[:12], "the number of tensors needs 8 bytes"),
    "negative tensors": (gguf_bytes(n_tensors=-1), "claims -1 tensors"),
    "absurd tensors": (gguf_bytes(n_tensors=BIG), f"claims {BIG} tensors"),
    "negative keys": (gguf_bytes(n_kv=-1), "claims -1 metadata keys"),
    "absurd keys": (gguf_bytes(n_kv=2**40), "claims 1099511627776 metadata keys"),
    "key beyond the file": (gguf_bytes([kv(b"k" * 50, U8, b"\1")])[:60], "metadata key 0 needs 50 bytes"),
    "huge key": (gguf_bytes([b"\xff" * 8 + bytes(32)], n_kv=1), "metadata key 0 is 18446744073709551615 bytes long"),
    "key over the format's limit": (gguf_bytes([kv(b"k" * 65536, U8, b"\1")]), "65536 bytes long, expected 1 to 65535"),
    "empty key": (gguf_bytes([kv("", U32, b"\1\0\0\0")]), "metadata key 0 is 0 bytes long"),
    "key not UTF-8": (gguf_bytes([kv(b"k\xff", U8, b"\1")]), "metadata key 0 is not UTF-8"),
    "key with NUL": (gguf_bytes([kv("k\0l", U8, b"\1")]), "NUL"),
    "key twice": (gguf_bytes([GOOD_KEY, GOOD_KEY]), "'k' appears twice"),
    "value type": (gguf_bytes([kv("k", 13, b"\1")], data=bytes(32)), "'k' has type 13, expected 0 to 12"),
    "negative value type": (gguf_bytes([kv("k", -1, b"\1")]), "'k' has type -1"),
    "value cut": (gguf_bytes([GOOD_KEY])[:39], "the value of 'k' needs 4 bytes"),
    "string too long": (gguf_bytes([kv("k", STRING, HUGE)], data=bytes(64)), f"'k' needs {2**63} bytes"),
    "bool 2": (gguf_bytes([kv("k", BOOL, b"\2")]), "'k' is a bool other than 0 and 1"),
    "bool array": (gguf_bytes([kv("k", ARRAY, array(BOOL, 3, b"\0\1\xff"))]), "'k' is a bool other"),
    "array item type": (gguf_bytes([kv("k", ARRAY, array(77, 1, b"\0"))]), "'k' has type 77"),
    "nested array": (gguf_bytes([kv("k", ARRAY, array(ARRAY, 1, array(U8, 1, b"\0")))]), "array of arrays"),
    "array of 2^63": (gguf_bytes([kv("k", ARRAY, array(U8, 2**63))]), f"'k' claims {2**63} items"),
    "array wraps": (gguf_bytes([kv("k", ARRAY, array(ValueType.UINT64, 2**61 + 1))]), "claims"),
    "strings of 2^60": (gguf_bytes([kv("k", ARRAY, array(STRING, 2**60))]), "claims"),
    "string in an array": (
        gguf_bytes([kv("k", ARRAY, array(STRING, 1, struct.pack("<Q", 999)))], data=bytes(32)),
        "'k' needs 1007 bytes",
    ),
    "alignment 0": (gguf_bytes([kv("general.alignment", U32, bytes(4))]), "alignment is 0, expected a power of two"),
    "alignment 13": (gguf_bytes([kv("general.alignment", U32, b"\x0d\0\0\0")]), "alignment is 13"),
    "alignment type": (gguf_bytes([kv("general.alignment", I32, b"\x20\0\0\0")]), "is INT32, expected UINT32"),
    "alignment beyond the file": (
        gguf_bytes([kv("general.alignment", U32, b"\0\0\0\x80")], [tensor()], data=bytes(32)),
        "'a' ends at byte",
    ),
    "tensor name of 64": (gguf_bytes([], [tensor("n" * 64)]), "tensor 0 is 64 bytes long, expected 1 to 63"),
    "tensor name empty": (gguf_bytes([], [tensor("")]), "tensor 0 is 0 bytes long"),
    "tensor name not UTF-8": (gguf_bytes([], [tensor(b"\xc3")]), "tensor 0 is not UTF-8"),
    "tensor name with NUL": (gguf_bytes([], [tensor("a\0b")]), "NUL"),
    "tensor twice": (
        gguf_bytes([], [tensor(), tensor(offset=32)], data=bytes(64)),
        "'a' appears twice",
    ),
    "0 dimensions": (gguf_bytes([], [tensor(ne=())], data=bytes(32)), "'a' has 0 dimensions, expected 1 to 4"),
    "5 dimensions": (gguf_bytes([], [tensor(ne=(1,) * 5)]), "'a' has 5 dimensions"),
    "2^32-1 dimensions": (
        gguf_bytes([], [string("a") + b"\xff" * 4], n_tensors=1, data=bytes(64)),
        "4294967295 dimensions",
    ),
    "negative dimension": (gguf_bytes([], [tensor(ne=(8, -1))]), r"dimensions \[8, -1\], each must be at least 1"),
    "zero dimension": (gguf_bytes([], [tensor(ne=(8, 0))]), r"dimensions \[8, 0\], each must be at least 1"),
    "zero columns": (gguf_bytes([], [tensor(ne=(0, 8))]), "each must be at least 1"),
    "too many weights": (gguf_bytes([], [tensor(ne=(2**32, 2**32))]), "too large"),
    "too many bytes": (gguf_bytes([], [tensor(ne=(2**31, 2**31), type=27)]), "too large"),
    "padding wraps": (gguf_bytes([], [tensor(ne=(4, 2**30 - 1, 2**30 + 1))]), "too large"),
    "sum wraps": (
        gguf_bytes([], [tensor("a", (BIG - 63,), 24), tensor("b", (BIG - 63,), 24, offset=BIG - 63)]),
        "too large together",
    ),
    "sum too large": (gguf_bytes([], [tensor("a", (BIG,), 24)]), "too large together"),
    "unknown type": (gguf_bytes([], [tensor(type=43)]), "type 43, unknown"),
    "negative type": (gguf_bytes([], [tensor(type=-1)]), "type -1, unknown"),
    "removed type": (gguf_bytes([], [tensor(ne=(32,), type=4)]), "type Q4_2, which ggml has removed"),
    "removed type 36": (gguf_bytes([], [tensor(ne=(32,), type=36)]), "IQ4_NL_4_4"),
    "half a block": (gguf_bytes([], [tensor(ne=(288,), type=12)]), "288 columns, not a multiple of Q4_K's block"),
    "offset unaligned": (gguf_bytes([], [tensor(offset=7)], data=bytes(64)), "not aligned to 32 bytes: offset 7"),
    "offset huge": (gguf_bytes([], [tensor(offset=2**64 - 32)]), "leaves a hole before it"),
    "overlap": (gguf_bytes([], [tensor(ne=(16,)), tensor("b")], data=bytes(128)), "'b' overlaps the one before it"),
    "hole": (gguf_bytes([], [tensor(), tensor("b", offset=64)], data=bytes(128)), "'b' leaves a hole"),
    "wrong order": (gguf_bytes([], [tensor(offset=32), tensor("b")], data=bytes(64)), "'a' leaves a hole"),
    "cut tensor info": (gguf_bytes([], [tensor(ne=(8, 1))])[:60], "tensor 'a' needs 8 bytes"),
    "cut data": (
        gguf_bytes([], [tensor(), tensor("b", offset=32)], data=bytes(63)),
        "'b' ends at byte 160, but the file has 159; it is truncated",
    ),
    "no data": (gguf_bytes([], [tensor()]), "'a' ends at byte"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused(write: Callable[[bytes], Path], case: str) -> None:
    content, message = WRONG[case]
    path = write(content)
    with pytest.raises(GGUFError, match=message) as caught:
        read_header(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


class _InitParams(ctypes.Structure):
    # struct gguf_init_params { bool no_alloc; struct ggml_context ** ctx; }
    _fields_ = (("no_alloc", ctypes.c_bool), ("ctx", ctypes.c_void_p))


def llama_cpp_reads(path: Path) -> bool:
    """Whether llama.cpp's own reader takes the header."""
    lib = native.library()
    # struct gguf_context * gguf_init_from_file(const char * fname, struct gguf_init_params params)
    init, free = lib.gguf_init_from_file, lib.gguf_free
    init.restype, init.argtypes = ctypes.c_void_p, (ctypes.c_char_p, _InitParams)
    free.restype, free.argtypes = None, (ctypes.c_void_p,)
    context = init(str(path).encode(), _InitParams(True, None))
    if context:
        free(context)
    return bool(context)


STRICTER = {
    "key over the format's limit",
    "key not UTF-8",
    "key with NUL",
    "bool 2",
    "bool array",
    "tensor name empty",
    "tensor name not UTF-8",
    "tensor name with NUL",
    "0 dimensions",
    "zero dimension",
    "zero columns",
    "sum wraps",
    "sum too large",
    # these are refused there when the weights are loaded, not with the header
    "cut data",
    "no data",
}


def test_refusals_are_those_of_llama_cpp_and_a_few_more(write: Callable[[bytes], Path]) -> None:
    assert {case for case, (content, _) in WRONG.items() if llama_cpp_reads(write(content))} == STRICTER


def test_every_cut_of_a_header_is_refused(write: Callable[[bytes], Path]) -> None:
    whole = gguf_bytes([GOOD_KEY, kv("s", STRING, string("text"))], [tensor(), tensor("b", (4, 4), offset=32)])
    whole += bytes(96)
    assert len(read_header(write(whole)).tensors) == 2
    for length in range(len(whole) - 1):
        with pytest.raises(GGUFError):
            read_header(write(whole[:length]))


def test_padding_of_the_last_tensor_may_be_missing_and_more_is_counted(write: Callable[[bytes], Path]) -> None:
    content = gguf_bytes([], [tensor(ne=(3,))], data=bytes(12))
    assert read_header(write(content)).trailing_bytes == 0
    assert read_header(write(content + bytes(20))).trailing_bytes == 0
    assert read_header(write(content + bytes(20) + b"garbage")).trailing_bytes == 7


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("m.gguf", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-lfs pointer"),
        ("m.gguf", b"<!DOCTYPE html>\n<html></html>", "is an HTML page that was saved in the place of the file"),
        ("m.gguf.gz", b"\x1f\x8b\x08\x00", "is a gzip archive; unpack it"),
        ("recipe.yaml", b"base_model: x\n", r"is a merge recipe; .*`ggufmoe convert .*recipe.yaml -o recipe.gguf`"),
        ("m.gguf", b"abcd", r"starts with b'abcd', expected b'GGUF'; this is not a GGUF file"),
    ],
)
def test_what_a_file_is_instead_is_told(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(GGUFError, match=message):
        read_header(tmp_path / name)


def test_what_a_path_may_mean_instead_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        GGUFError, match=r"model of the hub make a file first: `ggufmoe convert org/name -o name\.gguf`"
    ):
        read_header(Path("org/name"))
    Path("link.gguf").symlink_to("gone.gguf")
    with pytest.raises(GGUFError, match=r"it is a link to gone\.gguf, which does not exist"):
        read_header(Path("link.gguf"))
    Path("model").mkdir()
    with pytest.raises(GGUFError, match=r"is a directory; give a \.gguf file$"):
        read_header(Path("model"))
    Path("model/config.json").touch()
    with pytest.raises(GGUFError, match=r"make a \.gguf file of it first: `ggufmoe convert model -o model\.gguf`"):
        read_header(Path("model"))
    Path("model/a.gguf").touch()
    with pytest.raises(GGUFError, match=r"is a directory; give a \.gguf file, for example model/a\.gguf"):
        read_header(Path("model"))


def test_a_path_that_is_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(GGUFError, match="is a directory"):
        read_header(tmp_path)
    with pytest.raises(GGUFError, match="cannot be read: No such file"):
        read_header(tmp_path / "absent.gguf")


def test_a_device_is_refused() -> None:
    with pytest.raises(GGUFError, match=r"not a regular file|cannot be read"):
        read_header(Path(os.devnull))


def test_large_vocabularies_are_read_across_buffers(write: Callable[[bytes], Path]) -> None:
    tokens = [f"▁token{number}" for number in range(150_000)]
    metadata = {
        "tokenizer.ggml.tokens": GGUFValue(ARRAY, tokens, STRING),
        "tokenizer.ggml.scores": GGUFValue(ARRAY, [float(-n) for n in range(150_000)], F32),
        "tokenizer.ggml.token_type": GGUFValue(ARRAY, [1] * 150_000, I32),
    }
    path = write(encode_header(metadata, []))
    assert path.stat().st_size > 8 * ggufheader._FIRST_READ_BYTES
    assert read_header(path).metadata == metadata


def test_memory_is_bounded_by_limits_not_by_the_file(tmp_path: Path) -> None:
    path = tmp_path / "sparse.gguf"
    too_long = struct.pack("<Q", ggufheader.MAX_HEADER_BYTES + 1)
    too_many = array(U8, ggufheader.MAX_ARRAY_ITEMS + 1)
    for content, message in (
        (kv("k", STRING, too_long), "makes the header larger than"),
        (kv("k", ARRAY, too_many), "brings its arrays over"),
    ):
        path.write_bytes(gguf_bytes([content]))
        os.truncate(path, 2 * ggufheader.MAX_HEADER_BYTES)
        started = time.process_time()
        with pytest.raises(GGUFError, match=message):
            read_header(path)
        assert time.process_time() - started < 1


def test_a_file_that_shrinks_while_it_is_read(write: Callable[[bytes], Path]) -> None:
    path = write(gguf_bytes([GOOD_KEY]))
    with path.open("rb", buffering=0) as file:
        cursor = ggufheader._Cursor(file, path, path.stat().st_size + 100)
        with pytest.raises(GGUFError, match="shrank while it was read"):
            cursor.take(path.stat().st_size + 1, "it")


ENCODE_WRONG: list[tuple[dict[str, GGUFValue], list[TensorInfo], int, str]] = [
    ({"k": GGUFValue(U8, 256)}, [], 32, "'k' cannot be written as UINT8"),
    ({"k": GGUFValue(U32, "text")}, [], 32, "'k' cannot be written as UINT32"),
    ({"k": GGUFValue(STRING, 3)}, [], 32, "'k' cannot be written as STRING"),
    ({"k": GGUFValue(BOOL, 2)}, [], 32, "'k' cannot be written as BOOL"),
    ({"k": GGUFValue(ARRAY, [1])}, [], 32, "an array needs an item type"),
    ({"k": GGUFValue(ARRAY, [[1]], ARRAY)}, [], 32, "an array needs an item type"),
    ({"": GGUFValue(U8, 1)}, [], 32, "the name '' has 0 bytes"),
    ({"\ud800": GGUFValue(U8, 1)}, [], 32, "is not UTF-8"),
    ({"k": GGUFValue(STRING, "\ud800")}, [], 32, "'k' cannot be written as STRING"),
    ({}, [TensorInfo("n" * 64, GGMLType.F32, (8,), 0, 32)], 32, "has 64 bytes, expected 1 to 63"),
    ({}, [TensorInfo("a", GGMLType.F32, (8,), 32, 32)], 32, "leaves a hole"),
    ({}, [TensorInfo("a", GGMLType.F32, (8,), 0, 31)], 32, "has 31 bytes, expected 32"),
    ({}, [TensorInfo("a", GGMLType.F32, (0,), 0, 0)], 32, "dimensions"),
    ({}, [TensorInfo("a", GGMLType.F32, (1,) * 5, 0, 4)], 32, "dimensions"),
    ({}, [TensorInfo("a", GGMLType.Q4_K, (100,), 0, 4)], 32, "not a multiple of Q4_K's block"),
    ({}, [TensorInfo("a", GGMLType.F32, (8,), 0, 32), TensorInfo("a", GGMLType.F32, (8,), 32, 32)], 32, "twice"),
    ({}, [], 64, "general.alignment says 32"),
    ({"general.alignment": GGUFValue(U32, 13)}, [], 13, "expected a power of two"),
]


@pytest.mark.parametrize(("metadata", "tensors", "alignment", "message"), ENCODE_WRONG)
def test_nothing_unreadable_is_encoded(
    metadata: dict[str, GGUFValue], tensors: list[TensorInfo], alignment: int, message: str
) -> None:
    with pytest.raises(GGUFError, match=message):
        encode_header(metadata, tensors, alignment)


def test_tokens_of_any_bytes_survive(write: Callable[[bytes], Path]) -> None:
    tokens = [bytes([byte]) for byte in range(256)] + [b"\xed\xa0\x80", b"\xf0\x9f\x99", b"\0\0"]
    content = gguf_bytes([kv("t", ARRAY, array(STRING, len(tokens), b"".join(map(string, tokens))))])
    header = read_header(write(content))
    assert encode_header(header.metadata, ()) == content
    assert [token.encode("utf-8", "surrogateescape") for token in header.get("t")] == tokens


def test_a_signalling_nan_stays_a_nan(write: Callable[[bytes], Path]) -> None:
    header = read_header(write(gguf_bytes([kv("k", F32, bytes.fromhex("ffffa4ff"))])))
    assert math.isnan(header.get("k"))
    again = read_header(write(encode_header(header.metadata, ())))
    assert math.isnan(again.get("k"))


_SCALARS = {
    kind: st.integers(int(values[0]), int(values[1]))
    for kind, values in NUMBERS.items()
    if kind not in (F32, ValueType.FLOAT64, BOOL, STRING)
} | {
    F32: st.floats(width=32, allow_nan=False),
    ValueType.FLOAT64: st.floats(allow_nan=False),
    BOOL: st.booleans(),
    STRING: st.binary(max_size=20).map(lambda raw: raw.decode("utf-8", "surrogateescape")),
}


def _value_of(kind: ValueType) -> st.SearchStrategy[GGUFValue]:
    items = _SCALARS[kind]
    return items.map(lambda item: GGUFValue(kind, item)) | st.lists(items, max_size=5).map(
        lambda listed: GGUFValue(ARRAY, listed, kind)
    )


_KEYS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
_METADATA = st.dictionaries(_KEYS, st.sampled_from(REMAINING_TYPES).flatmap(_value_of), max_size=6)
_SHAPES = st.lists(st.integers(1, 3), min_size=1, max_size=4)
_TENSORS = st.dictionaries(_KEYS, st.tuples(st.sampled_from(list(GGMLType)), _SHAPES), max_size=4)
_QUICK = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def _laid_out(shapes: Mapping[str, tuple[GGMLType, list[int]]]) -> list[TensorInfo]:
    tensors, offset = [], 0
    for name, (kind, dims) in shapes.items():
        shape = (*dims[:-1], dims[-1] * kind.block_size)
        n_bytes = int(np.prod(dims)) * kind.block_bytes
        tensors.append(TensorInfo(name, kind, shape, offset, n_bytes))
        offset = padded(offset + n_bytes, 32)
    return tensors


@_QUICK
@given(metadata=_METADATA, shapes=_TENSORS)
def test_what_is_encoded_is_read_back(
    write: Callable[[bytes], Path], metadata: dict[str, GGUFValue], shapes: dict[str, tuple[GGMLType, list[int]]]
) -> None:
    metadata.pop("general.alignment", None)
    tensors = _laid_out(shapes)
    content = encode_header(metadata, tensors)
    size = sum(padded(tensor.n_bytes, 32) for tensor in tensors)
    header = read_header(write(content + bytes(size)))
    assert (dict(header.metadata), list(header.tensors)) == (metadata, tensors)
    assert (len(content) % 32, header.trailing_bytes) == (0, 0)


@_QUICK
@given(data=st.data())
def test_mutated_headers_are_read_or_refused(write: Callable[[bytes], Path], data: st.DataObject) -> None:
    metadata, _ = _content()
    content = bytearray(encode_header(metadata, _laid_out({"a": (GGMLType.Q8_0, [2, 1]), "b": (GGMLType.F32, [3])})))
    content += bytes(128)
    for position, byte in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)))):
        content[position] = byte
    path = write(bytes(content))
    try:
        header = read_header(path)
    except GGUFError:
        return
    assert header.data_offset + header.data_bytes <= header.file_bytes == len(content)
    assert llama_cpp_reads(path)


def _write_shards(
    directory: Path, count: int, changes: Mapping[int, Mapping[str, GGUFValue]] | None = None
) -> list[Path]:
    paths = []
    for number in range(count):
        metadata = {"general.architecture": GGUFValue(STRING, "llama")} if number == 0 else {}
        metadata |= {
            "split.no": GGUFValue(U16, number),
            "split.count": GGUFValue(U16, count),
            "split.tensors.count": GGUFValue(I32, count),
        }
        metadata |= (changes or {}).get(number, {})
        info = TensorInfo(f"t{number}", GGMLType.F32, (8,), 0, 32)
        paths.append(directory / f"model-{number + 1:05d}-of-{count:05d}.gguf")
        paths[-1].write_bytes(encode_header(metadata, [info]) + bytes(32))
    return paths


def test_shards_are_found_from_any_of_them(tmp_path: Path) -> None:
    paths = _write_shards(tmp_path, 3)
    for path in paths:
        assert shard_paths(path) == tuple(paths)
        model = read_model_header(path)
        assert model.paths == tuple(paths)
        assert [info.name for info in model.tensors] == ["t0", "t1", "t2"]
        assert (model.get("general.architecture"), model.metadata["split.no"].value) == ("llama", 0)
        assert model.file_bytes == sum(file.stat().st_size for file in paths)


def test_a_single_file_is_one_shard(write: Callable[[bytes], Path]) -> None:
    for kvs in ([], [kv("split.count", U16, struct.pack("<H", 1))]):
        path = write(gguf_bytes(kvs, [tensor()], data=bytes(32)))
        assert shard_paths(path) == (path,)
        assert [info.name for info in read_model_header(path).tensors] == ["a"]


def test_missing_shards_are_named(tmp_path: Path) -> None:
    paths = _write_shards(tmp_path, 7)
    for path in paths[1:6]:
        path.unlink()
    with pytest.raises(GGUFError, match=r"5 of 7 shards are missing: model-00002-of-00007.gguf.* and 1 more"):
        shard_paths(paths[0])


def test_a_renamed_shard_is_refused(tmp_path: Path) -> None:
    first = _write_shards(tmp_path, 2)[0].rename(tmp_path / "other.gguf")
    with pytest.raises(GGUFError, match=r"shard 1 of 2, so its name must end in -00001-of-00002\.gguf"):
        read_model_header(first)


SHARDS_WRONG: dict[str, tuple[Mapping[int, Mapping[str, GGUFValue]], str]] = {
    "number": ({1: {"split.no": GGUFValue(U16, 0)}}, "split.no is 0, expected 1"),
    "count": ({1: {"split.count": GGUFValue(U16, 4)}}, "split.count is 4, expected 2"),
    "type": ({0: {"split.count": GGUFValue(U32, 2)}}, "split.count is UINT32, expected UINT16"),
    "tensors": ({0: {"split.tensors.count": GGUFValue(I32, 9)}}, "split.tensors.count is 9, but the shards hold 2"),
}


@pytest.mark.parametrize("case", SHARDS_WRONG)
def test_contradicting_shards_are_refused(tmp_path: Path, case: str) -> None:
    changes, message = SHARDS_WRONG[case]
    paths = _write_shards(tmp_path, 2, changes)
    with pytest.raises(GGUFError, match=message):
        read_model_header(paths[0])


def test_shards_without_a_number_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model-00001-of-00002.gguf"
    path.write_bytes(encode_header({"split.count": GGUFValue(U16, 2)}, []))
    with pytest.raises(GGUFError, match=r"split\.no is missing"):
        read_model_header(path)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    paths = _write_shards(tmp_path, 2)
    second = read_header(paths[1])
    again = replace(second.tensors[0], name="t0")
    paths[1].write_bytes(encode_header(second.metadata, [again]) + bytes(32))
    with pytest.raises(GGUFError, match=r"tensor 't0' is in model-00001-of-00002\.gguf as well"):
        read_model_header(paths[0])


def test_legacy_experts_are_recognised() -> None:
    names = ["blk.0.ffn_gate.1.weight", "blk.0.ffn_gate_inp.weight", "blk.11.ffn_down.0.weight", "blk.0.ffn_up.weight"]
    assert legacy_experts(names) == (names[0], names[2])
