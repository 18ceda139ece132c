"""The comparison of two GGUF files sees every kind of difference, and provenance is none."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gguf
import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "peers" / "files.py"
ONES = np.ones((4, 32), np.float32)


@pytest.fixture(scope="module")
def files() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peer_files", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(path: Path, change: Callable[[Any], None] = lambda writer: None, matrix: Any = ONES) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    change(writer)
    writer.add_tensor("a", matrix)
    writer.add_tensor("b", np.zeros(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_equal_files_and_provenance(files: ModuleType, tmp_path: Path) -> None:
    ours = write(tmp_path / "ours", lambda writer: writer.add_name("one"))
    theirs = write(tmp_path / "theirs", lambda writer: writer.add_license("other"))
    assert files.differences(ours, theirs) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda w: w.add_uint32("llama.context_length", 8), ["llama.context_length: only in theirs"]),
        (lambda w: w.add_file_type(1), ["general.file_type: only in theirs"]),
    ],
)
def test_metadata(files: ModuleType, tmp_path: Path, change: Any, said: list[str]) -> None:
    assert files.differences(write(tmp_path / "ours"), write(tmp_path / "theirs", change)) == said


def test_values(files: ModuleType, tmp_path: Path) -> None:
    def left(writer: Any) -> None:
        writer.add_float32("llama.x", 1.0)
        writer.add_array("tokens", ["a", "b"])
        writer.add_uint32("llama.y", 1)

    def right(writer: Any) -> None:
        writer.add_float32("llama.x", 2.0)
        writer.add_array("tokens", ["a", "c"])
        writer.add_uint64("llama.y", 1)

    assert files.differences(write(tmp_path / "ours", left), write(tmp_path / "theirs", right)) == [
        "llama.x: 1.0, theirs 2.0",
        "llama.y: type UINT32, theirs UINT64",
        "tokens: value 1 is 'b', theirs 'c'",
    ]
    assert files.differences(tmp_path / "ours", tmp_path / "theirs", ("llama.x", "llama.y", "tokens")) == []


def test_tensors(files: ModuleType, tmp_path: Path) -> None:
    other = ONES.copy()
    other[2, 3] = 1.5
    ours = write(tmp_path / "ours")
    assert files.differences(ours, write(tmp_path / "bytes", matrix=other)) == ["a: 1 of 512 bytes differ"]
    assert files.differences(ours, write(tmp_path / "shape", matrix=ONES.reshape(8, 16))) == [
        "a: shape [32, 4], theirs [16, 8]"
    ]
    assert files.differences(ours, write(tmp_path / "type", matrix=ONES.astype(np.float16))) == [
        "a: type F32, theirs F16"
    ]
