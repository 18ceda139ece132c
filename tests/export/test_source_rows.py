"""Rows in another order, from a GGUF file, and what is refused of them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ggufmoe.errors import GGUFError
from ggufmoe.export.gguf_source import GGUFSource
from ggufmoe.export.model_tensors import source_part
from ggufmoe.export.requantize import plan_requantize
from ggufmoe.gguf.model import read_model_header
from ggufmoe.gguf.types import GGMLType
from ggufmoe.weights.source_tensor import Dtype
from ggufmoe.weights.views import Computed, RopeOrdered
from tests.quant.llama_quantize import Specimen, write_model


@dataclass
class Numbered:
    """A source whose rows hold their own number; it counts how often it is read."""

    name: str = "q"
    dtype: Dtype = Dtype.F32
    shape: tuple[int, ...] = (48, 3)
    reads: int = 0

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        self.reads += 1
        out[...] = np.arange(start, stop, dtype=np.float32)[:, None]


@pytest.mark.parametrize(("start", "stop"), [(0, 48), (3, 5), (2, 8), (5, 30), (8, 24), (7, 9), (0, 1), (47, 48)])
def test_heads_are_interleaved_wherever_a_range_begins(start: int, stop: int) -> None:
    source = Numbered()
    rows = RopeOrdered(source, 8)
    out = np.empty((stop - start, 3), np.float32)
    rows.read_rows(start, stop, out)
    order = np.arange(48).reshape(6, 2, 4).swapaxes(1, 2).reshape(-1)
    assert out[:, 0].tolist() == order[start:stop].tolist()
    assert [rows.source_row(row) for row in range(48)] == order.tolist()
    assert source.reads <= 5


def test_the_stored_type_is_known_of_every_kind_of_part(tmp_path: Path) -> None:
    assert source_part(Computed("x", [1.0])).type is GGMLType.F32
    assert source_part(Numbered(dtype=Dtype.BF16)).type is GGMLType.BF16
    with contextlib.closing(GGUFSource(write_model(tmp_path / "m.gguf", Specimen()))) as source:
        plan = plan_requantize(source, tmp_path / "out.gguf", None)
    stack = next(tensor for tensor in plan.tensors if tensor.name == "blk.0.ffn_up_exps.weight")
    assert [(part.type, part.n_rows) for part in stack.parts] == [(GGMLType.BF16, 256)] * 2


def test_a_part_tells_which_row_of_the_source_a_row_is() -> None:
    source = Numbered()
    assert [source_part(source).source_row(row) for row in range(6)] == list(range(6))
    assert [source_part(RopeOrdered(source, 4)).source_row(row) for row in range(6)] == [0, 2, 1, 3, 4, 6]


def test_rows_of_a_gguf_file_are_its_bytes_or_refused(tmp_path: Path) -> None:
    specimen = Specimen()
    path = write_model(tmp_path / "m.gguf", specimen, specimen.weights())
    source = GGUFSource(path)
    part = next(tensor for tensor in source.tensors if tensor.name == "blk.0.ffn_up_exps.weight").parts[1]
    out = np.empty((2, 256), np.uint16)
    part.read_rows(3, 5, out)
    wanted = specimen.weights()["blk.0.ffn_up_exps.weight"][1, 3:5].view(np.uint32) >> 16
    assert (out == wanted).all()
    part.read_rows(5, 5, out[:0])
    with pytest.raises(ValueError, match="rows 255 to 257"):
        part.read_rows(255, 257, out)
    with pytest.raises(ValueError, match="of 1024 bytes"):
        part.read_rows(0, 2, out.view(np.uint8)[:, :8].copy())
    with path.open("r+b") as file:
        file.truncate(part.begin + 10)
    with pytest.raises(GGUFError, match="became shorter"):
        part.read_rows(0, 2, out)
    source.close()


def test_a_file_that_vanishes_after_its_header_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "m.gguf", Specimen())
    header = read_model_header(path)
    path.unlink()
    monkeypatch.setattr("ggufmoe.gguf.stored_rows.read_model_header", lambda path: header)
    with pytest.raises(GGUFError, match="cannot be read: No such file"):
        GGUFSource(path)
