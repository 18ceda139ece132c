"""Sensitivity files: what is written is read back, llama.cpp's tools read them, and files that lie are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ggufmoe.errors import GGUFError, InputError
from ggufmoe.gguf.float_arrays import read_arrays, write_arrays
from ggufmoe.gguf.header import read_header
from ggufmoe.quant.importances import Imatrix
from ggufmoe.sizing.sensitivity_file import EmbeddingSensitivity, Floats, MatrixSensitivity, Sensitivity

EXPERTS, PLAIN = "blk.0.ffn_down_exps.weight", "blk.0.attn_q.weight"


def drawn(*shape: int) -> Floats:
    return np.random.default_rng(len(shape)).gamma(1.0, 30.0, shape).astype(np.float32)


def example() -> Sensitivity:
    return Sensitivity(
        architecture="llama",
        source="my-mixtral",
        n_tokens=64,
        seed=2**40,
        datasets=("text.txt",),
        chunk_size=16,
        matrices={
            EXPERTS: MatrixSensitivity(drawn(3, 8), np.array([60, 4, 0], np.float32), drawn(3, 5)),
            PLAIN: MatrixSensitivity(drawn(1, 4), np.array([64], np.float32), drawn(1, 6)),
        },
        embedding=EmbeddingSensitivity(drawn(4), np.array([60, 4, 0], np.float32)),
    )


def rewritten(path: Path, change: str, value: Floats | None) -> Path:
    """The file with one array changed, or left out."""
    header = read_header(path)
    arrays = read_arrays(path, header)
    del arrays[change]
    if value is not None:
        arrays[change] = value
    write_arrays(path, "the test's file", header.metadata, arrays)
    return path


def saved(directory: Path) -> Path:
    example().save(directory / "s.gguf")
    return directory / "s.gguf"


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    written, read = example(), Sensitivity.load(saved(tmp_path))
    assert (read.architecture, read.source, read.datasets) == ("llama", "my-mixtral", ("text.txt",))
    assert (read.n_tokens, read.seed, read.chunk_size) == (64, 2**40, 16)
    assert read.matrices.keys() == written.matrices.keys()
    for name, matrix in written.matrices.items():
        for field, array in vars(matrix).items():
            np.testing.assert_array_equal(getattr(read.matrices[name], field), array, strict=True)
    np.testing.assert_array_equal(read.embedding.grad_sum2, written.embedding.grad_sum2, strict=True)
    np.testing.assert_array_equal(read.embedding.row_counts, written.embedding.row_counts, strict=True)


def test_a_file_is_an_importance_matrix_too(tmp_path: Path) -> None:
    imatrix = Imatrix.load(saved(tmp_path))
    assert imatrix.names == {EXPERTS, PLAIN}
    assert (imatrix.chunk_count, imatrix.chunk_size, imatrix.datasets) == (4, 16, ("text.txt",))
    weights = imatrix.weights(PLAIN, 1, 4)
    assert weights is not None
    np.testing.assert_array_equal(weights, example().matrices[PLAIN].in_sum2 / np.float32(64))
    assert imatrix.coverage == {EXPERTS: (2,)}


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        (f"{PLAIN}.in_sum2", None, InputError, "blk.0.attn_q.weight.in_sum2 is missing"),
        ("token_embd.weight.row_counts", None, InputError, "row_counts is missing"),
        (f"{EXPERTS}.grad_sum2", np.ones(7, np.float32), GGUFError, "7 gradients"),
        (f"{PLAIN}.counts", np.array([-1], np.float32), GGUFError, "negative"),
        (f"{PLAIN}.grad_sum2", np.array([np.nan], np.float32), GGUFError, "NaN"),
    ],
)
def test_what_is_missing_or_impossible_is_refused(
    tmp_path: Path, name: str, value: Floats | None, error: type[InputError], message: str
) -> None:
    with pytest.raises(error, match=message):
        Sensitivity.load(rewritten(saved(tmp_path), name, value))


def test_another_gguf_file_is_refused(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.gguf", "the test's file", {}, {"a": np.ones(2, np.float32)})
    with pytest.raises(InputError, match="no sensitivity"):
        Sensitivity.load(tmp_path / "a.gguf")
