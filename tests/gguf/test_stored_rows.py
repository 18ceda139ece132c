"""Rows of GGUF tensors as they are stored: their bytes, their matrices, their files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ggufmoe.errors import GGUFError
from ggufmoe.gguf.stored_rows import OpenModel
from ggufmoe.gguf.types import GGMLType
from tests.gguf_files import mixtral_metadata, stored, write_shards, write_weights

STACK = np.random.default_rng(0).normal(0, 1, (3, 4, 64)).astype(np.float32)
ARRAYS = {
    "stack.weight": (GGMLType.Q8_0, STACK),
    "matrix.weight": (GGMLType.BF16, STACK[0]),
    "norm.weight": (GGMLType.F32, STACK[0, 0]),
    "one.weight": (GGMLType.F16, STACK[:1, :1]),
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_weights(tmp_path / "m.gguf", mixtral_metadata(2, 1), ARRAYS)


@pytest.mark.parametrize("name", ARRAYS)
def test_rows_are_the_bytes_of_the_file(path: Path, name: str) -> None:
    kind, values = ARRAYS[name]
    with OpenModel(path) as model:
        rows = model.tensors[name]
        assert (rows.name, rows.type, rows.shape) == (name, kind, values.shape)
        assert (rows.n_rows, rows.n_cols) == (values.size // values.shape[-1], values.shape[-1])
        assert rows.read(0, rows.n_rows).tobytes() == stored(kind, values)
        assert rows.n_bytes == len(stored(kind, values)) == rows.n_rows * rows.row_bytes
        assert rows.read(rows.n_rows - 1, rows.n_rows).tobytes() == stored(kind, values)[-rows.row_bytes :]


def test_a_stack_is_cut_into_its_matrices(path: Path) -> None:
    with OpenModel(path) as model:
        parts = model.tensors["stack.weight"].matrices()
        assert [part.shape for part in parts] == [(4, 64)] * 3
        assert [part.read(0, 4).tobytes() for part in parts] == [stored(GGMLType.Q8_0, expert) for expert in STACK]
        (matrix,) = model.tensors["matrix.weight"].matrices()
        assert matrix == model.tensors["matrix.weight"]
        (one,) = model.tensors["one.weight"].matrices()
        assert (one.shape, one.begin) == ((64,), model.tensors["one.weight"].begin)


def test_tiles_cover_all_rows_once(path: Path) -> None:
    with OpenModel(path) as model:
        rows = model.tensors["stack.weight"]
        assert list(rows.tiles(5 * 64)) == [(0, 5), (5, 10), (10, 12)]
        assert list(rows.tiles(1)) == [(row, row + 1) for row in range(12)]


def test_what_does_not_fit_is_refused(path: Path) -> None:
    with OpenModel(path) as model:
        rows = model.tensors["matrix.weight"]
        with pytest.raises(ValueError, match="rows 3 to 5 are not in a tensor of shape"):
            rows.read(3, 5)
        with pytest.raises(ValueError, match="out must be contiguous and of 128 bytes"):
            rows.read_rows(0, 1, np.empty(127, np.uint8))


def test_a_split_model_is_opened_through_any_of_its_files(tmp_path: Path) -> None:
    names = list(ARRAYS)
    halves = [{name: ARRAYS[name] for name in part} for part in (names[:2], names[2:])]
    paths = write_shards(tmp_path, mixtral_metadata(2, 1), halves)
    with OpenModel(paths[1]) as model:
        assert model.header.paths == tuple(paths)
        for name, (kind, values) in ARRAYS.items():
            assert model.tensors[name].read(0, model.tensors[name].n_rows).tobytes() == stored(kind, values)
    rows = model.tensors["norm.weight"]
    model.close()
    with pytest.raises(ValueError, match="closed"):
        rows.read(0, 1)


def test_a_file_that_became_shorter_is_an_error(path: Path) -> None:
    with OpenModel(path) as model:
        rows = model.tensors["stack.weight"]
        with path.open("r+b") as file:
            file.truncate(rows.begin + 10)
        with pytest.raises(GGUFError, match="became shorter"):
            rows.read(0, 1)
