"""Plans of any format: tensors over files, offsets, and a writer that knows no format."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ggufmoe.errors import OutputError
from ggufmoe.gguf.types import GGMLType
from ggufmoe.writing.place import PartialFile
from ggufmoe.writing.plan import Part, PlannedFile, PlannedTensor, WritePlan, plan_file, split_tensors
from ggufmoe.writing.writer import WriteOptions, write_plan


@dataclass(frozen=True)
class Numbers:
    """Float32 rows that count on from row to row."""

    name: str
    shape: tuple[int, ...]

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        n_cols = self.shape[-1]
        out[...] = np.arange(start * n_cols, stop * n_cols, dtype=np.float32).reshape(stop - start, n_cols)


def tensor(name: str, shape: tuple[int, ...], type: GGMLType = GGMLType.F32) -> PlannedTensor:
    return PlannedTensor(name, type, shape, (Part(Numbers(f"source.{name}", shape), GGMLType.F32),))


def test_a_file_takes_tensors_until_the_next_is_too_much() -> None:
    tensors = [tensor(name, (n,)) for name, n in (("a", 10), ("b", 10), ("c", 100), ("d", 1), ("e", 9))]

    def names(max_bytes: int | None, alignment: int = 1) -> list[str]:
        return ["".join(one.name for one in group) for group in split_tensors(tensors, max_bytes, alignment)]

    assert names(None) == ["abcde"]
    assert names(80) == ["ab", "c", "de"]
    assert names(80, alignment=64) == ["a", "b", "c", "d", "e"]
    assert names(1) == ["a", "b", "c", "d", "e"]


def text_header(tensors: Sequence[PlannedTensor]) -> bytes:
    """The header of a format that nobody else has."""
    return "".join(f"{one.name} {one.offset}\n" for one in tensors).encode() + b"\n"


def plan(directory: Path, readable: bool = True) -> WritePlan:
    def reads_back(file: PlannedFile, path: Path) -> bool:
        return readable and path.read_bytes().startswith(file.header)

    tensors = [tensor("a", (3, 5)), tensor("b", (2, 3), GGMLType.F16), tensor("c", (7,))]
    output = directory / "out.text"
    file = plan_file(output, tensors, text_header, alignment=16)
    return WritePlan(output, (file,), (), "text", reads_back, split_option="--smaller")


def test_tensors_follow_the_header_aligned() -> None:
    file = plan(Path()).files[0]
    assert file.header == b"a 0\nb 64\nc 80\n\n"
    assert [one.offset - len(file.header) for one in file.tensors] == [0, 64, 80]
    assert file.n_bytes == len(file.header) + 112


def test_the_writer_writes_a_format_that_it_does_not_know(tmp_path: Path) -> None:
    write_plan(plan(tmp_path), WriteOptions())
    written = (tmp_path / "out.text").read_bytes()
    header = b"a 0\nb 64\nc 80\n\n"
    content = [np.arange(15, dtype="<f4").tobytes(), bytes(4), np.arange(6, dtype="<f2").tobytes(), bytes(4)]
    assert written == header + b"".join(content) + np.arange(7, dtype="<f4").tobytes() + bytes(4)


def test_what_the_format_cannot_read_back_gets_no_name(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="reads back differently"):
        write_plan(plan(tmp_path, readable=False), WriteOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["out.text.partial"]


class TooLarge(PartialFile):
    def write_at(self, offset: int, data: memoryview) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))


def test_a_file_that_the_disk_cannot_hold_names_the_option_of_the_plan(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="write smaller ones with --smaller"):
        write_plan(plan(tmp_path), WriteOptions(open_output=TooLarge))
