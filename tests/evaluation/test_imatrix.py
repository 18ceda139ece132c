"""Importance matrices equal the sums of an independent forward pass in numpy; what they hold is told."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import ggufmoe
from ggufmoe import ContextOptions, Engine, ImatrixResult, LayerCoverage
from ggufmoe.checkpoint.opening import open_checkpoint
from ggufmoe.errors import Cancelled, EngineError, InputError, OptionError, OutputError, OutputExistsError
from ggufmoe.evaluation.activations import ActivationSums
from ggufmoe.gguf.header import read_header
from ggufmoe.merge.forward import ForwardPass
from ggufmoe.quant.importances import Imatrix
from ggufmoe.weights.dtypes import read_f32
from ggufmoe.work import Progress

EXACT: dict[str, Any] = {"n_threads": 1, "flash_attn": "off", "cache_type_k": "f32", "cache_type_v": "f32"}
TEXT = "the model reads a number and writes the sum of two numbers " * 6
N_CTX, N_EXPERT, N_USED = 32, 4, 2

Make = Callable[..., Path]
Numbers = NDArray[np.floating]


@pytest.fixture(scope="module")
def mixtral(tiny_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its F32 file."""
    checkpoint = tiny_checkpoint(dtype="F32", n_embd=64, n_ff=64, n_expert=N_EXPERT, n_expert_used=N_USED)
    path = tmp_path_factory.mktemp("imatrix") / "m.gguf"
    ggufmoe.convert(checkpoint, path, quant="F32", threads=1)
    return checkpoint, path


def expected(checkpoint: Path, chunks: list[list[int]]) -> dict[str, tuple[Numbers, Numbers]]:
    """Sums of squares and counts of the experts of each layer, from the checkpoint in numpy."""
    out = {}
    with open_checkpoint(checkpoint) as model:

        def weight(name: str) -> Numbers:
            tensor = model.tensors[name]
            return read_f32(tensor, 0, tensor.shape[0])

        for layer, state in enumerate(ForwardPass(model, threads=1).layers(chunks)):
            x, moe = state.router_input, f"model.layers.{layer}.block_sparse_moe"
            chosen = np.argsort(-(x @ weight(f"{moe}.gate.weight").T), axis=-1)[:, :N_USED]
            given = [x[(chosen == expert).any(axis=1)] for expert in range(N_EXPERT)]
            counts = np.array([len(rows) for rows in given], np.float32)
            out[f"blk.{layer}.ffn_gate_inp.weight"] = ((x**2).sum(axis=0)[None], np.array([len(x)], np.float32))
            for name in ("ffn_gate_exps", "ffn_up_exps"):
                out[f"blk.{layer}.{name}.weight"] = (np.stack([(rows**2).sum(axis=0) for rows in given]), counts)
            inner = []
            for expert, rows in enumerate(given):
                gate, up = (rows @ weight(f"{moe}.experts.{expert}.{w}.weight").T for w in ("w1", "w3"))
                inner.append(((gate / (1 + np.exp(-gate)) * up) ** 2).sum(axis=0))
            out[f"blk.{layer}.ffn_down_exps.weight"] = (np.stack(inner), counts)
    return out


def stored(imatrix: Imatrix, name: str, n_expert: int, n_cols: int) -> Numbers:
    weights = imatrix.weights(name, n_expert, n_cols)
    assert weights is not None
    return weights


def cut(path: Path) -> list[list[int]]:
    with Engine(path, ContextOptions(n_ctx=512, **EXACT)) as engine:
        tokens, bos = engine.tokenize(TEXT), engine.bos_token
    assert bos is not None
    return [[bos, *tokens[i + 1 : i + N_CTX]] for i in range(0, len(tokens) - N_CTX + 1, N_CTX)]


@pytest.mark.parametrize(("n_batch", "n_ubatch"), [(2048, 512), (64, 32), (16, 16)])
def test_sums_equal_the_same_model_in_numpy(
    mixtral: tuple[Path, Path], tmp_path: Path, n_batch: int, n_ubatch: int
) -> None:
    checkpoint, path = mixtral
    output = tmp_path / "imatrix.gguf"
    result = ggufmoe.imatrix(path, output, TEXT, n_ctx=N_CTX, n_batch=n_batch, n_ubatch=n_ubatch, **EXACT)
    chunks = cut(path)
    assert (result.n_chunks, result.total_chunks, result.is_complete) == (len(chunks), len(chunks), True)
    written = Imatrix.load(output)
    assert result.n_entries == len(written.entries) == 2 * 8
    assert (written.chunk_count, written.chunk_size, written.datasets) == (len(chunks), N_CTX, ())
    for name, (sums, counts) in expected(checkpoint, chunks).items():
        np.testing.assert_array_equal(written.entries[name].counts, counts)
        means = np.where(counts[:, None] > 0, sums / np.maximum(counts[:, None], 1), 1)
        np.testing.assert_allclose(stored(written, name, *sums.shape), means, rtol=1e-3, atol=1e-9)
    q, k = (stored(written, f"blk.0.attn_{x}.weight", 1, 64) for x in "qk")
    np.testing.assert_array_equal(q, k)
    assert [row.tokens for row in result.coverage] == [
        tuple(written.entries[f"blk.{layer}.ffn_down_exps.weight"].counts.astype(int)) for layer in range(2)
    ]


def test_convert_takes_the_file_and_the_output_is_counted_if_asked(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    _, path = mixtral
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    output = tmp_path / "imatrix.gguf"
    ggufmoe.imatrix(path, output, text_file=text, n_ctx=N_CTX, process_output=True, **EXACT)
    written = Imatrix.load(output)
    assert written.datasets == (str(text),)
    assert "output.weight" in written.entries
    header = read_header(output)
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    assert shapes["blk.0.attn_q.weight.in_sum2"] == (64,)
    assert shapes["blk.0.attn_q.weight.counts"] == (1,)
    assert shapes["blk.0.ffn_up_exps.weight.in_sum2"] == (N_EXPERT, 64)
    assert shapes["blk.0.ffn_up_exps.weight.counts"] == (N_EXPERT, 1)
    for name, imatrix in (("with", output), ("without", None)):
        ggufmoe.quantize(path, tmp_path / f"{name}.gguf", "Q4_0", imatrix=imatrix, threads=1)
    assert (tmp_path / "with.gguf").read_bytes() != (tmp_path / "without.gguf").read_bytes()


def test_who_cancels_gets_whole_chunks(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    _, path = mixtral
    cancel = threading.Event()

    def stop(step: Progress) -> None:
        if step.phase == "load":
            return
        assert isinstance(step.result, ImatrixResult)
        assert (step.phase, step.done, step.unit) == ("chunks", step.result.n_chunks, "chunks")
        if step.done == 2:
            cancel.set()

    output = tmp_path / "part.gguf"
    result = ggufmoe.imatrix(path, output, TEXT, n_ctx=N_CTX, n_batch=32, cancel=cancel, on_progress=stop, **EXACT)
    assert (result.n_chunks, result.is_complete) == (2, False)
    written = Imatrix.load(output)
    assert written.chunk_count == 2
    assert {float(entry.counts.max()) for name, entry in written.entries.items() if "attn" in name} == {64.0}
    with pytest.raises(Cancelled, match="loading was stopped"):
        ggufmoe.imatrix(path, tmp_path / "none.gguf", TEXT, n_ctx=N_CTX, cancel=cancel, **EXACT)
    assert not (tmp_path / "none.gguf").exists()


def test_what_another_process_wrote_meanwhile_is_kept(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    _, path = mixtral
    output = tmp_path / "imatrix.gguf"

    def write_meanwhile(step: Progress) -> None:
        output.write_text("of another process")

    with pytest.raises(OutputExistsError, match=r"was made by another process meanwhile; the result of this one is in"):
        ggufmoe.imatrix(path, output, TEXT, n_ctx=N_CTX, on_progress=write_meanwhile, **EXACT)
    assert output.read_text() == "of another process"
    (ours,) = tmp_path.glob("imatrix-*.gguf")
    assert Imatrix.load(ours).chunk_count > 0


def test_what_cannot_be_is_refused_before_the_model_is_loaded(mixtral: tuple[Path, Path], tmp_path: Path) -> None:
    _, path = mixtral
    there = tmp_path / "there.gguf"
    there.write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match="exists already"):
        ggufmoe.imatrix(path, there, TEXT)
    with pytest.raises(OutputError, match="is a directory"):
        ggufmoe.imatrix(path, tmp_path, TEXT, force=True)
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    for source in (path, text):
        before = source.read_bytes()
        with pytest.raises(OutputExistsError, match="which is read"):
            ggufmoe.imatrix(path, source, text_file=text, force=True)
        assert source.read_bytes() == before
    with pytest.raises(OutputError, match="is not a directory; make it first"):
        ggufmoe.imatrix(path, tmp_path / "nowhere" / "x.gguf", TEXT)
    with pytest.raises(InputError, match="two chunks of 512 need 1024"):
        ggufmoe.imatrix(path, tmp_path / "x.gguf", TEXT)
    with pytest.raises(OptionError, match="ImatrixOptions has no option 'dataset'"):
        ggufmoe.imatrix(path, tmp_path / "x.gguf", TEXT, dataset="x")  # type: ignore[call-arg]
    assert there.read_bytes() == b"mine"
    assert set(tmp_path.iterdir()) == {text, there}


def test_thin_coverage_is_told() -> None:
    rows = (LayerCoverage(0, (900, 0, 511)), LayerCoverage(1, (600, 600, 600)))
    result = ImatrixResult(Path("x"), 512, 3, 3, 6, rows, 1.0)
    assert (rows[0].unreached, rows[0].low) == ((1,), (2,))
    unreached, low = result.warnings
    assert unreached.startswith("no token reached experts (layer 0: 1): they are quantized as if without")
    assert low.startswith("fewer than 512 tokens reached experts (layer 0: 2); more text")
    assert result.to_dict()["coverage"][1] == {"layer": 1, "tokens": [600, 600, 600]}
    assert ImatrixResult(Path("x"), 512, 3, 3, 6, rows[1:], 1.0).warnings == ()
    many = ImatrixResult(Path("x"), 512, 3, 3, 6, (LayerCoverage(2, (0,) * 250 + (900,) * 6),), 1.0)
    assert many.warnings[0].startswith("no token reached experts (layer 2: 0, 1, 2, 3, 4, 5, 6, 7 and 242 more): they")


def test_numbers_that_are_none_are_refused() -> None:
    sums = ActivationSums(lambda: None)
    sums._pending["blk.0.attn_q.weight"] = (np.array([[1.0, np.nan]]), np.array([1.0]))
    with pytest.raises(EngineError, match=r"the inputs of blk\.0\.attn_q\.weight are NaN or infinite"):
        sums.commit()
