"""Safetensors headers: one case for each way in which a file can break the specification, in literal bytes."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggufmoe.checkpoint import safetensors
from ggufmoe.checkpoint.safetensors import MAX_HEADER_BYTES, TensorFile, read_header
from ggufmoe.errors import SafetensorsError
from tests import tiny

GOLDEN = (
    b"\x48\x00\x00\x00\x00\x00\x00\x00"
    b'{"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}'
    b',"b":{"dtype":"BF16","shape":[0],"data_offsets":[8,8]}}'
)


def file_of(path: Path, header: object, data: bytes = b"") -> Path:
    """A file with this header, as JSON or as the bytes that are given."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def tensor(dtype: Any = "F32", shape: Any = (2,), begin: Any = 0, end: Any = 8) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_header_is_read_to_the_letter(tmp_path: Path) -> None:
    text = GOLDEN[8:]
    path = tmp_path / "golden.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(8))
    header = read_header(path)
    a, b = header.entries["a"], header.entries["b"]
    assert (a.dtype, a.shape, a.begin, a.end) == ("F32", (1, 2), 8 + len(text), 16 + len(text))
    assert (b.dtype, b.shape, b.begin, b.end) == ("BF16", (0,), 16 + len(text), 16 + len(text))
    assert header.metadata == {}
    assert header.file_bytes == 16 + len(text)


def test_metadata_padding_and_scalars_are_allowed(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "scalar": tensor(shape=[], end=4), "half": tensor("F4", [4], 4, 6)}
    path = file_of(tmp_path / "x", json.dumps(header).encode() + b"   ", bytes(6))
    assert read_header(path).metadata == {"format": "pt"}
    assert read_header(path).entries["scalar"].shape == ()


def test_the_reference_implementation_agrees(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.standard_normal((3, i + 1)).astype(np.float32) for i in range(5)}
    save_file(arrays, tmp_path / "theirs.safetensors")
    header = read_header(tmp_path / "theirs.safetensors")
    content = (tmp_path / "theirs.safetensors").read_bytes()
    for name, array in arrays.items():
        entry = header.entries[name]
        assert entry.shape == array.shape
        assert content[entry.begin : entry.end] == array.tobytes()
    tiny.write_safetensors(tmp_path / "ours.safetensors", {name: ("F32", array) for name, array in arrays.items()})
    assert all((load_file(tmp_path / "ours.safetensors")[name] == arrays[name]).all() for name in arrays)


BROKEN: dict[str, tuple[object, bytes, str]] = {
    "not an object": (b"[1, 2]  ", b"", "does not begin with '{'"),
    "leading space": (b" {}", b"", "does not begin with '{'"),
    "not JSON": (b"{'a': 1}", b"", "not UTF-8 JSON"),
    "not UTF-8": (b'{"\xff": 1}', b"", "not UTF-8 JSON"),
    "too deep": (b'{"a":' * 100_000, b"", "not UTF-8 JSON"),
    "duplicate": (b'{"a": 1, "a": 2}', b"", "names 'a' twice"),
    "metadata not an object": ({"__metadata__": 1}, b"", "__metadata__"),
    "metadata with numbers": ({"__metadata__": {"a": 1}}, b"", "__metadata__"),
    "tensor not an object": ({"a": 1}, b"", "exactly dtype, shape and data_offsets"),
    "missing key": ({"a": {"dtype": "F32", "shape": []}}, b"", "exactly dtype, shape and data_offsets"),
    "extra key": ({"a": {**tensor(), "x": 1}}, bytes(8), "exactly dtype, shape and data_offsets"),
    "unknown dtype": ({"a": tensor("F33")}, bytes(8), "unknown dtype 'F33'"),
    "a name of many lines": ({"a\n" * 1000: 1}, b"", "exactly dtype, shape and data_offsets"),
    "dtype not a string": ({"a": tensor(["F32"])}, bytes(8), "unknown dtype"),
    "shape not a list": ({"a": tensor(shape=2)}, bytes(8), "shape that is not a list"),
    "negative size": ({"a": tensor(shape=[-2, -1])}, bytes(8), "shape that is not a list"),
    "fractional size": ({"a": tensor(shape=[2.0])}, bytes(8), "shape that is not a list"),
    "boolean size": ({"a": tensor(shape=[True, 2])}, bytes(8), "shape that is not a list"),
    "size above 64 bits": ({"a": tensor(shape=[2**64])}, bytes(8), "shape that is not a list"),
    "product overflows": ({"a": tensor(shape=[2**32, 2**32])}, bytes(8), "overflows 64 bits"),
    "three offsets": ({"a": {**tensor(), "data_offsets": [0, 4, 8]}}, bytes(8), "two non-negative integers"),
    "negative offset": ({"a": tensor(begin=-8, end=0)}, bytes(8), "two non-negative integers"),
    "ends before it begins": ({"a": tensor(begin=8, end=0)}, bytes(8), "before its beginning"),
    "wrong length": ({"a": tensor(shape=[3])}, bytes(8), "8 bytes, which is not 3 values of F32"),
    "hole at the start": ({"a": tensor(begin=4, end=12)}, bytes(12), "leaves a hole"),
    "hole between": ({"a": tensor(), "b": tensor(begin=9, end=17)}, bytes(17), "'b' leaves a hole"),
    "overlap": ({"a": tensor(), "b": tensor(begin=4, end=12)}, bytes(12), "'b' overlaps"),
    "truncated": ({"a": tensor(), "b": tensor(begin=8, end=16)}, bytes(12), "cut off: tensor 'b'"),
    "bytes left over": ({"a": tensor()}, bytes(9), "1 bytes at its end that belong to no tensor"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header_is_one_line_that_names_the_file(case: str, tmp_path: Path) -> None:
    header, data, message = BROKEN[case]
    path = file_of(tmp_path / "broken.safetensors", header, data)
    with pytest.raises(SafetensorsError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_what_only_the_library_refuses_is_refused(tmp_path: Path) -> None:
    # half of a surrogate pair: no text, but Python's JSON takes it
    path = file_of(tmp_path / "x", b'{"\\ud800": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"x")
    with pytest.raises(SafetensorsError, match="refused by the safetensors library") as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "invalid JSON in header" in str(caught.value)
    assert "invalid JSON in header" in str(caught.value)
    with pytest.raises(SafetensorsError, match="refused by the safetensors library"):
        TensorFile(path)


def test_opening_a_large_file_takes_no_memory(tmp_path: Path) -> None:
    n_bytes = 2**31
    path = file_of(tmp_path / "large", {"a": tensor("U8", [n_bytes], 0, n_bytes)})
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + n_bytes)
    code = (
        "import sys\nfrom pathlib import Path\nimport psutil\n"
        "from ggufmoe.checkpoint.safetensors import TensorFile\n"
        "before = psutil.Process().memory_info().rss\n"
        "file = TensorFile(Path(sys.argv[1]))\n"
        "print(psutil.Process().memory_info().rss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16 * 2**20


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too few"),
        (b"\x02\0\0\0", "too few"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "claims a header of 100000001 bytes"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "claims a header"),
        (struct.pack("<Q", 3) + b"{}", "cut off: its header"),
    ],
)
def test_lengths_are_not_believed(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "short.safetensors"
    path.write_bytes(content)
    with pytest.raises(SafetensorsError, match=message):
        read_header(path)


def test_every_cut_of_a_file_is_an_error(tmp_path: Path) -> None:
    whole = file_of(tmp_path / "whole", {"a": tensor(), "b": tensor(begin=8, end=16)}, bytes(16)).read_bytes()
    path = tmp_path / "cut"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(SafetensorsError):
            read_header(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SafetensorsError, match="cannot be read: No such file"):
        read_header(tmp_path / "absent")
    with pytest.raises(SafetensorsError, match="cannot be read: No such file"):
        TensorFile(tmp_path / "absent")
    (tmp_path / "empty").touch()
    with pytest.raises(SafetensorsError, match="too few"):
        TensorFile(tmp_path / "empty")


def test_reads_from_many_threads(tmp_path: Path) -> None:
    data = np.arange(100_000, dtype=np.uint32)
    tiny.write_safetensors(tmp_path / "x", {"a": ("U32", data)})
    file = TensorFile(tmp_path / "x")
    begin = file.header.entries["a"].begin

    def total(start: int) -> int:
        out = np.empty(1000, np.uint32)
        file.read_into(begin + 4 * start, out.data.cast("B"))
        return int(out.sum())

    with ThreadPoolExecutor(8) as pool:
        totals = list(pool.map(total, range(0, 100_000, 1000)))
    assert totals == [int(data[i : i + 1000].sum()) for i in range(0, 100_000, 1000)]
    file.close()
    file.close()


def test_without_positional_reads_the_bytes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "preadv", raising=False)
    data = np.arange(64, dtype=np.uint8)
    tiny.write_safetensors(tmp_path / "x", {"a": ("U8", data)})
    file = TensorFile(tmp_path / "x")
    out = bytearray(32)
    file.read_into(file.header.entries["a"].begin + 16, memoryview(out))
    assert bytes(out) == data[16:48].tobytes()
    file.close()


def test_a_file_that_shrinks_or_is_closed_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x"
    tiny.write_safetensors(path, {"a": ("U8", np.zeros(64, np.uint8))})
    file = TensorFile(path)
    with open(path, "r+b") as writer:
        writer.truncate(file.header.entries["a"].begin + 10)
    with pytest.raises(SafetensorsError, match="became shorter"):
        file.read_into(file.header.entries["a"].begin, memoryview(bytearray(64)))
    file.close()
    with pytest.raises(ValueError, match="closed"):
        file.read_into(0, memoryview(bytearray(8)))


def test_a_file_that_was_replaced_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x"
    tiny.write_safetensors(path, {"a": ("U8", np.zeros(64, np.uint8))})
    file = TensorFile(path)
    os.utime(path, ns=(0, 7))
    with pytest.raises(SafetensorsError, match="has been changed or replaced since its header was read"):
        file.read_into(file.header.entries["a"].begin, memoryview(bytearray(64)))
    path.unlink()
    with pytest.raises(SafetensorsError, match="cannot be read: No such file"):
        file.read_into(0, memoryview(bytearray(8)))


def test_every_dtype_of_the_reference_is_known() -> None:
    from safetensors.numpy import _TYPES

    assert set(_TYPES) <= set(safetensors.DTYPE_BITS)
