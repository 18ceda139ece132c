"""The sensitivity of models: from every kind of source, resumed, and each refusal."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import ggufmoe
from ggufmoe.errors import (
    ArchitectureError,
    Cancelled,
    CheckpointError,
    InputError,
    NonFiniteError,
    NoSpaceError,
    OptionError,
    OutputExistsError,
    ResumeError,
)
from ggufmoe.files import partial_path
from ggufmoe.quant.importances import Imatrix
from ggufmoe.sizing.sensitivity_file import Sensitivity
from ggufmoe.work import Progress
from tests.families import test_phi3
from tests.families.tiny_family import make_checkpoint
from tests.tiny import Tiny, stored_tensors, write_safetensors
from tests.tiny import make_checkpoint as make_tiny
from tests.tiny_tokenizers import CORPUS

TEXT = " ".join(CORPUS * 12)
SHORT: dict[str, Any] = {"n_tokens": 512, "n_ctx": 128}
SMALL: dict[str, Any] = {"n_embd": 64, "n_ff": 96, "n_head": 4}
CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A mixture as a checkpoint and as a file, and what was measured of the checkpoint."""
    place = tmp_path_factory.mktemp("sensitivity")
    make_tiny(place / "model", n_expert=3, dtype="F32", chat_template=CHAT, **SMALL)
    ggufmoe.convert(place / "model", place / "m.gguf", "F32")
    (place / "text.txt").write_text(TEXT, encoding="utf-8")
    ggufmoe.sensitivity(place / "model", place / "s.gguf", text_file=place / "text.txt", **SHORT)
    return place


def same(ours: Path, theirs: Path, rtol: float = 1e-3) -> None:
    """Rows whose gradient is nearly zero are compared with the mean of their matrix."""
    a, b = Sensitivity.load(ours), Sensitivity.load(theirs)
    assert (a.matrices.keys(), a.n_tokens, a.architecture) == (b.matrices.keys(), b.n_tokens, b.architecture)
    for name, one in a.matrices.items():
        for field, array in vars(one).items():
            other = getattr(b.matrices[name], field)
            np.testing.assert_allclose(array, other, rtol=rtol, atol=1e-6 * other.mean(), err_msg=f"{name} {field}")
    np.testing.assert_allclose(a.embedding.grad_sum2, b.embedding.grad_sum2, rtol=rtol)
    np.testing.assert_array_equal(a.embedding.row_counts, b.embedding.row_counts)


def test_every_matrix_of_the_file_is_measured(folder: Path) -> None:
    from ggufmoe.gguf.header import read_header

    found = Sensitivity.load(folder / "s.gguf")
    shapes = {tensor.name: tensor.plain_shape for tensor in read_header(folder / "m.gguf").tensors}
    matrices = {name for name, shape in shapes.items() if len(shape) > 1}
    assert found.matrices.keys() == matrices - {"token_embd.weight"}
    for name, one in found.matrices.items():
        n_expert = 3 if name.endswith("_exps.weight") else 1
        assert one.in_sum2.shape == (n_expert, shapes[name][-1])
        assert one.grad_sum2.shape == (n_expert, shapes[name][-2])
        assert one.counts.sum() == 512 * (2 if n_expert > 1 else 1)
    assert found.embedding.row_counts.sum() == found.n_tokens == 512
    assert (found.architecture, found.source, found.chunk_size) == ("llama", "model", 128)


def test_a_file_gives_what_its_checkpoint_gives(folder: Path, tmp_path: Path) -> None:
    """Rows of queries and keys are in another order in the file, and so are their gradients."""
    ggufmoe.sensitivity(folder / "m.gguf", tmp_path / "s.gguf", text_file=folder / "text.txt", **SHORT)
    same(tmp_path / "s.gguf", folder / "s.gguf")


def test_inputs_are_those_of_llama_cpp(folder: Path, tmp_path: Path) -> None:
    text = TEXT[:1000]  # chunks are taken from all of a text, by llama.cpp from its beginning
    ggufmoe.imatrix(folder / "m.gguf", tmp_path / "i.gguf", text, n_ctx=128, chunks=4)
    ggufmoe.sensitivity(folder / "m.gguf", tmp_path / "s.gguf", text, imatrix_out=tmp_path / "o.gguf", **SHORT)
    theirs, ours, alone = (Imatrix.load(tmp_path / name) for name in ("i.gguf", "s.gguf", "o.gguf"))
    assert alone.names == theirs.names == ours.names - {"output.weight"}
    for name in theirs.names:
        n_expert, n_cols = len(theirs.entries[name].counts), theirs.entries[name].n_values
        mine, other = (one.weights(name, n_expert, n_cols // n_expert) for one in (ours, theirs))
        assert mine is not None
        assert other is not None
        np.testing.assert_allclose(mine, other, rtol=2e-3)
        np.testing.assert_array_equal(ours.entries[name].counts, theirs.entries[name].counts)
    ggufmoe.quantize(folder / "m.gguf", tmp_path / "q.gguf", "Q4_0", imatrix=tmp_path / "s.gguf")


def test_a_recipe_is_measured_as_what_it_becomes(tmp_path: Path) -> None:
    for number in range(2):
        make_tiny(tmp_path / str(number), arch="llama", dtype="F32", seed=number, **SMALL)
    recipe = {"base_model": "0", "gate_mode": "random", "dtype": "float32"}
    experts = [{"source_model": str(number), "positive_prompts": [f"{number}"]} for number in range(2)]
    (tmp_path / "r.yaml").write_text(json.dumps({**recipe, "experts": experts}))
    ggufmoe.merge(tmp_path / "r.yaml", tmp_path / "merged")
    ggufmoe.sensitivity(tmp_path / "r.yaml", tmp_path / "a.gguf", TEXT, **SHORT)
    ggufmoe.sensitivity(tmp_path / "merged", tmp_path / "b.gguf", TEXT, **SHORT)
    same(tmp_path / "a.gguf", tmp_path / "b.gguf", rtol=1e-6)


def test_conversations_are_rendered_by_the_models_template(folder: Path, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": CORPUS[0]}
    talks: list[Any] = [{"messages": [{"role": "user", "content": line}, answer]} for line in CORPUS]
    talks += [{"text": f"{number} {line}"} for number, line in enumerate(CORPUS * 3)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, talks)), encoding="utf-8")
    result = ggufmoe.sensitivity(folder / "model", tmp_path / "s.gguf", text_file=tmp_path / "t.jsonl", **SHORT)
    assert result.n_sequences > 4
    assert 0 < result.n_tokens <= 512
    found = Sensitivity.load(tmp_path / "s.gguf")
    assert found.datasets == (str(tmp_path / "t.jsonl"),)
    assert found.embedding.row_counts[1] == result.n_sequences  # each begins with BOS
    with pytest.raises(InputError, match=r"its texts have .* tokens together, 20000 are needed"):
        ggufmoe.sensitivity(folder / "model", tmp_path / "n.gguf", text_file=tmp_path / "t.jsonl", n_tokens=20000)


def test_the_result_does_not_depend_on_threads(folder: Path, tmp_path: Path) -> None:
    for threads in (1, 3):
        ggufmoe.sensitivity(folder / "model", tmp_path / f"{threads}.gguf", TEXT, threads=threads, **SHORT)
    assert (tmp_path / "1.gguf").read_bytes() == (tmp_path / "3.gguf").read_bytes()


@pytest.mark.parametrize("n_reports", [2, 4, 5])
def test_an_interrupted_run_goes_on_where_it_stopped(folder: Path, tmp_path: Path, n_reports: int) -> None:
    """After the first layer forward, after the output, and after a layer backward."""
    stop, seen, output = threading.Event(), [], tmp_path / "s.gguf"

    def on_progress(report: Progress) -> None:
        seen.append(report)
        if len(seen) == n_reports:
            stop.set()

    def run(**keywords: Any) -> None:
        ggufmoe.sensitivity(folder / "model", output, text_file=folder / "text.txt", **{**SHORT, **keywords})

    with pytest.raises(Cancelled, match="--resume"):
        run(on_progress=on_progress, cancel=stop)
    states = {path.name for path in partial_path(output).iterdir()}
    with pytest.raises(OutputExistsError, match=r"s\.gguf\.partial is there .* --resume .* --force"):
        run()
    with pytest.raises(ResumeError, match="another model, text or seed"):
        run(resume=True, seed=1)
    assert {path.name for path in partial_path(output).iterdir()} == states
    again: list[Progress] = []
    run(resume=True, on_progress=again.append)
    assert output.read_bytes() == (folder / "s.gguf").read_bytes()
    assert not partial_path(output).exists()
    assert again[0].done >= seen[-1].done
    assert again[-1].done == again[-1].total == seen[-1].total


def test_a_state_that_is_not_whole_is_refused(folder: Path, tmp_path: Path) -> None:
    stop, output = threading.Event(), tmp_path / "s.gguf"
    with pytest.raises(Cancelled):
        ggufmoe.sensitivity(folder / "model", output, TEXT, on_progress=lambda _: stop.set(), cancel=stop, **SHORT)
    state = partial_path(output) / "hidden-0.npy"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.raises(ResumeError, match=r"hidden-0\.npy cannot be read; begin again with --force"):
        ggufmoe.sensitivity(folder / "model", output, TEXT, resume=True, **SHORT)


def test_states_that_the_disk_cannot_hold_are_not_begun(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 512 tokens of 64 numbers, before two layers and after them, and two that are being replaced
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 512 * 64 * 4 - 1))
    with pytest.raises(NoSpaceError, match="take fewer tokens"):
        ggufmoe.sensitivity(folder / "model", tmp_path / "s.gguf", TEXT, **SHORT)
    assert list(tmp_path.iterdir()) == []


def test_a_weight_that_is_no_number_is_an_error(tmp_path: Path) -> None:
    spec = Tiny(arch="llama", dtype="F32", n_layer=1, **SMALL)
    make_tiny(tmp_path / "model", **vars(spec))
    tensors = stored_tensors(spec)
    tensors["model.layers.0.mlp.down_proj.weight"][1][3, 4] = np.nan
    write_safetensors(tmp_path / "model" / "model.safetensors", tensors)
    with pytest.raises(NonFiniteError, match="layer 0 gives values that are NaN or infinite"):
        ggufmoe.sensitivity(tmp_path / "model", tmp_path / "s.gguf", TEXT, **SHORT)


def test_at_least_the_tokens_that_are_asked_for_are_used(folder: Path, tmp_path: Path) -> None:
    result = ggufmoe.sensitivity(folder / "model", tmp_path / "s.gguf", TEXT, n_tokens=513, n_ctx=128)
    assert (result.n_tokens, result.n_sequences) == (640, 5)


def test_force_begins_again(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "s.gguf"
    partial_path(output).mkdir()
    ggufmoe.sensitivity(folder / "model", output, text_file=folder / "text.txt", force=True, **SHORT)
    assert output.read_bytes() == (folder / "s.gguf").read_bytes()
    with pytest.raises(OutputExistsError, match="exists already"):
        ggufmoe.sensitivity(folder / "model", output, TEXT, **SHORT)


def test_the_seed_decides_the_targets(folder: Path, tmp_path: Path) -> None:
    ggufmoe.sensitivity(folder / "model", tmp_path / "s.gguf", text_file=folder / "text.txt", seed=1, **SHORT)
    ours, theirs = (Sensitivity.load(path) for path in (tmp_path / "s.gguf", folder / "s.gguf"))
    assert (ours.seed, theirs.seed) == (1, 0)
    for name, one in ours.matrices.items():
        np.testing.assert_array_equal(one.in_sum2, theirs.matrices[name].in_sum2)
        assert not np.array_equal(one.grad_sum2, theirs.matrices[name].grad_sum2)


def test_experts_that_the_text_hardly_reached_are_named(folder: Path, tmp_path: Path) -> None:
    result = ggufmoe.sensitivity(folder / "model", tmp_path / "s.gguf", TEXT, **SHORT)
    assert len(result.coverage) == 2
    assert all("fewer than 512 tokens reached experts" in warning for warning in result.warnings)
    assert result.warnings
    assert result.to_dict()["warnings"] == list(result.warnings)


@pytest.mark.parametrize(
    ("given", "keywords", "error", "message"),
    [
        (TEXT[:300], {}, InputError, r"the text has \d+ tokens, and 4 sequences of 128 need 512: take a longer text"),
        (None, {}, OptionError, "give either text, the text itself, or text_file"),
        (TEXT, {"n_tokens": 100}, OptionError, "--tokens must be between 512 and"),
        (TEXT, {"allow_outside_files": True}, OptionError, "is no recipe"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    folder: Path, tmp_path: Path, given: str | None, keywords: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        ggufmoe.sensitivity(folder / "model", tmp_path / "s.gguf", given, **{**SHORT, **keywords})
    assert list(tmp_path.iterdir()) == []


def test_a_family_whose_gradients_are_not_computed_is_refused(folder: Path, tmp_path: Path) -> None:
    make_checkpoint(tmp_path / "phi", test_phi3.config())
    with pytest.raises(CheckpointError, match=r"hidden states of Phi3ForCausalLM cannot be computed$"):
        ggufmoe.sensitivity(tmp_path / "phi", tmp_path / "s.gguf", TEXT, **SHORT)
    ggufmoe.convert(tmp_path / "phi", tmp_path / "phi.gguf", "F32")
    with pytest.raises(ArchitectureError, match="states of phi3 files cannot be computed"):
        ggufmoe.sensitivity(tmp_path / "phi.gguf", tmp_path / "s.gguf", TEXT, **SHORT)


def test_an_input_is_not_written_over(folder: Path) -> None:
    for keywords in ({"output": folder / "m.gguf"}, {"output": folder / "n.gguf", "imatrix_out": folder / "text.txt"}):
        with pytest.raises(OutputExistsError, match="which is read"):
            ggufmoe.sensitivity(folder / "m.gguf", text_file=folder / "text.txt", force=True, **{**SHORT, **keywords})
