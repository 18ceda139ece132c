"""Another router in a GGUF file: rows as a recipe's, all else as it was, and each refusal."""

from __future__ import annotations

import json
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggufmoe
from ggufmoe.errors import (
    ArchitectureError,
    Cancelled,
    EngineError,
    GGUFError,
    ModelLoadError,
    OptionError,
    OutputExistsError,
    RecipeError,
)
from ggufmoe.files import partial_path
from ggufmoe.gguf.header import GGUFValue, read_header
from ggufmoe.gguf.stored_rows import OpenModel
from ggufmoe.gguf.types import ValueType
from ggufmoe.merge import logistic, router_steps
from ggufmoe.work import Progress
from tests.export.gguf_models import load, store
from tests.merge.test_router_fit import SHAPE, WORDS, make_expert, write_recipe
from tests.tiny import make_checkpoint
from tests.tiny_tokenizers import CORPUS

NAMES = ("base", "sums", "poems")


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """How good the rows are is not asked here."""
    monkeypatch.setattr(logistic, "PENALTIES", (1e-3, 1e-5))
    monkeypatch.setattr(logistic, "_MAX_STEPS", 20)
    monkeypatch.setattr(router_steps, "DEFAULT_STEPS", 2)


def write_texts(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        lines = [f"{word} {CORPUS[4 * number + i % 4]}" for i, word in enumerate(WORDS)]
        content = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (folder / f"{name}.jsonl").write_text(content, encoding="utf-8")


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two experts, texts of each, and their mixture with a guessed router: m.gguf."""
    place = tmp_path_factory.mktemp("refit")
    make_checkpoint(place / "base", **SHAPE, seed=1, chat_template=TEMPLATE)
    for seed, name in ((2, "sums"), (3, "poems")):
        make_expert(place / name, place / "base", seed)
    write_texts(place, *NAMES)
    talk = [{"role": "user", "content": CORPUS[1]}, {"role": "assistant", "content": CORPUS[2]}]
    talks = [json.dumps({"messages": [*talk, {"role": "user", "content": word}]}) + "\n" for word in "abcdef"]
    (place / "talks.jsonl").write_text("".join(talks), encoding="utf-8")
    recipe = write_recipe(place, *NAMES, dtype="float32", gate_mode="hidden", texts={name: [] for name in NAMES})
    ggufmoe.convert(recipe, place / "m.gguf", "F32")
    ggufmoe.convert(recipe, place / "m-Q4_K_M.gguf", "Q4_K_M")
    return place


def files(folder: Path, *names: str) -> list[Path]:
    return [folder / f"{name}.jsonl" for name in names or NAMES]


def stored(path: Path) -> dict[str, bytes]:
    with OpenModel(path) as model:
        return {name: rows.read(0, rows.n_rows).tobytes() for name, rows in model.tensors.items()}


def routers(path: Path) -> Any:
    found = stored(path)
    return np.stack([np.frombuffer(found[f"blk.{i}.ffn_gate_inp.weight"], np.float32) for i in range(2)])


@pytest.mark.parametrize("last", ["poems", "talks"])
def test_rows_are_those_that_a_recipe_of_the_same_texts_gets(folder: Path, tmp_path: Path, last: str) -> None:
    """The forward pass reads the file as the merge reads its checkpoints: rows of queries and keys in their order."""
    recipe = write_recipe(folder, *NAMES, dtype="float32", prompts=False, texts={"poems": f"{last}.jsonl"})
    made = ggufmoe.convert(recipe, tmp_path / "fitted.gguf", "F32")
    again = ggufmoe.refit(folder / "m.gguf", tmp_path / "refit.gguf", files(folder, "base", "sums", last))
    np.testing.assert_allclose(
        routers(tmp_path / "refit.gguf"), routers(tmp_path / "fitted.gguf"), rtol=1e-5, atol=1e-6
    )
    assert made.router_report is not None
    assert again.router_report is not None
    assert len(again.router_report.scores) == 3
    for ours, theirs in zip(again.router_report.scores, made.router_report.scores, strict=True):
        assert (ours.file, ours.n_fitted_tokens, ours.n_scored_tokens) == (
            theirs.file,
            theirs.n_fitted_tokens,
            theirs.n_scored_tokens,
        )
        assert ours.losses["fitted"] == pytest.approx(theirs.losses["fitted"], rel=1e-5)
        assert "base" not in ours.losses
        assert ours.losses["before"] != ours.losses["fitted"]


def test_all_but_the_routers_stays_as_it_was(folder: Path, tmp_path: Path) -> None:
    source, output = folder / "m-Q4_K_M.gguf", tmp_path / "out.gguf"
    before = source.read_bytes()
    result = ggufmoe.refit(source, output, files(folder), text_tokens=200, seed=3)
    assert source.read_bytes() == before
    old, new = stored(source), stored(output)
    assert list(old) == list(new)
    assert [name for name in old if old[name] != new[name]] == [f"blk.{i}.ffn_gate_inp.weight" for i in range(2)]
    was, now = read_header(source), read_header(output)
    assert [tensor.type for tensor in was.tensors] == [tensor.type for tensor in now.tensors]
    told = {key: now.get(key) for key, value in now.metadata.items() if was.metadata.get(key) != value}
    assert told.pop("ggufmoe.gate_mode") == "fitted"
    record = json.loads(told.pop("ggufmoe.refit"))
    assert told == {}
    assert record.keys() == {"version", "texts", "text_tokens", "seed", "sha256"}
    assert record["texts"] == [["base.jsonl"], ["sums.jsonl"], ["poems.jsonl"]]
    assert (record["text_tokens"], record["seed"]) == (200, 3)
    assert result.router_report is not None
    assert result.router_report.gate_mode == "fitted"
    with ggufmoe.Engine(output, ggufmoe.ContextOptions(n_ctx=64), ggufmoe.OffloadOptions(n_gpu_layers=0)) as engine:
        assert len(engine.logits([1, 5, 9])) == 3


def test_experts_are_found_by_name_and_by_number(folder: Path, tmp_path: Path) -> None:
    model, (base, sums, poems) = folder / "m.gguf", files(folder)
    ggufmoe.refit(model, tmp_path / "order.gguf", [base, [sums, folder / "talks.jsonl"], poems])
    both: list[str | Path] = [sums, folder / "talks.jsonl"]
    by_name: dict[str, str | list[str | Path]] = {"poems": [poems], "sums": both, "base": str(base)}
    ggufmoe.refit(model, tmp_path / "name.gguf", by_name)
    by_number: dict[int, list[str | Path]] = {2: [poems], 1: both, 0: [base]}
    ggufmoe.refit(model, tmp_path / "number.gguf", by_number)
    assert (tmp_path / "order.gguf").read_bytes() == (tmp_path / "name.gguf").read_bytes()
    assert (tmp_path / "order.gguf").read_bytes() == (tmp_path / "number.gguf").read_bytes()


@pytest.mark.parametrize("as_directory", [False, True])
def test_a_router_is_taken_from_another_model(folder: Path, tmp_path: Path, as_directory: bool) -> None:
    """There and back again: the router of the first file makes the second one's equal to it."""
    ggufmoe.refit(folder / "m.gguf", tmp_path / "fitted.gguf", files(folder))
    router = folder / "m.gguf"
    if as_directory:
        recipe = write_recipe(folder, *NAMES, dtype="float32", gate_mode="hidden", texts={name: [] for name in NAMES})
        ggufmoe.merge(recipe, router := tmp_path / "merged")
    result = ggufmoe.refit(tmp_path / "fitted.gguf", tmp_path / "back.gguf", router=router)
    assert stored(tmp_path / "back.gguf") == stored(folder / "m.gguf")
    header = read_header(tmp_path / "back.gguf")
    assert header.get("ggufmoe.gate_mode") == "router"
    assert json.loads(header.get("ggufmoe.refit"))["router"] == router.name
    assert result.router_report is not None
    assert result.router_report.scores == ()


def test_a_split_model_is_one(folder: Path, tmp_path: Path) -> None:
    ggufmoe.quantize(folder / "m.gguf", tmp_path / "s.gguf", "COPY", split_max_size="100K")
    parts = sorted(tmp_path.glob("s-*.gguf"))
    assert len(parts) > 2
    ggufmoe.refit(parts[1], tmp_path / "one.gguf", files(folder))
    result = ggufmoe.refit(folder / "m.gguf", tmp_path / "t.gguf", files(folder), split_max_size="100K")
    assert len(result.paths) == len(parts)
    assert stored(result.paths[0]) == stored(tmp_path / "one.gguf")
    assert stored(tmp_path / "one.gguf") != stored(folder / "m.gguf")


def test_progress_counts_layers_and_then_bytes_and_a_stop_leaves_no_file(folder: Path, tmp_path: Path) -> None:
    seen: list[Progress] = []
    ggufmoe.refit(folder / "m.gguf", tmp_path / "whole.gguf", files(folder), on_progress=seen.append)
    assert [step.item for step in seen if step.phase == "router"] == [
        *("layer 1 of 2", "layer 2 of 2", "step 1 of 2", "step 2 of 2")
    ]
    assert seen[-1].phase == "write"
    stop = threading.Event()
    with pytest.raises(Cancelled, match="stopped while computing the router"):
        ggufmoe.refit(
            folder / "m.gguf", tmp_path / "out.gguf", files(folder), on_progress=lambda _: stop.set(), cancel=stop
        )
    assert [path.name for path in tmp_path.glob("out*")] == []


def test_a_copy_that_was_interrupted_is_not_called_complete_and_is_continued(folder: Path, tmp_path: Path) -> None:
    stop = threading.Event()

    def stop_at_first_byte(step: Progress) -> None:
        if step.phase == "write":
            stop.set()

    output = tmp_path / "out.gguf"
    with pytest.raises(Cancelled):
        ggufmoe.refit(folder / "m.gguf", output, files(folder), on_progress=stop_at_first_byte, cancel=stop)
    assert not output.exists()
    assert partial_path(output).exists()
    with pytest.raises(GGUFError):
        read_header(partial_path(output))
    ggufmoe.refit(folder / "m.gguf", output, files(folder), resume=True)
    ggufmoe.refit(folder / "m.gguf", tmp_path / "whole.gguf", files(folder))
    assert output.read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_nothing_is_replaced_unless_asked_and_no_input_ever(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.gguf"
    output.write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match="exists already"):
        ggufmoe.refit(folder / "m.gguf", output, files(folder))
    assert output.read_bytes() == b"mine"
    ggufmoe.refit(folder / "m.gguf", output, files(folder), force=True)
    for read in (output, tmp_path / "one.jsonl"):
        (tmp_path / "one.jsonl").write_bytes(files(folder)[0].read_bytes())
        before = read.read_bytes()
        with pytest.raises(OutputExistsError, match="which is read"):
            ggufmoe.refit(output, read, [tmp_path / "one.jsonl", *files(folder)[1:]], force=True)
        assert read.read_bytes() == before


def test_what_goes_wrong_is_a_warning(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "ggufmoe")
    result = ggufmoe.refit(folder / "m.gguf", tmp_path / "with.gguf", files(folder))
    assert result.router_report is not None
    scores = result.router_report.scores
    worse = replace(scores[0], losses={"fitted": 2.0, "before": 2.001, "uniform": 1.998})
    assert worse.is_worse_than_uniform
    assert not worse.is_worse_than("before")
    assert not worse.is_worse_than("none")
    for other, said in (("uniform", "is worse than equal weights"), ("before", "is worse than the router that the")):
        assert caplog.text.count(said) == sum(score.is_worse_than(other) for score in scores)
    assert "the base is no expert" not in caplog.text
    assert "the base's texts are narrow" not in caplog.text
    narrow = tmp_path / "narrow.jsonl"
    narrow.write_text("".join(json.dumps({"text": "la " * n}) + "\n" for n in range(2, 12)), encoding="utf-8")
    ggufmoe.refit(folder / "m.gguf", tmp_path / "narrow.gguf", [narrow, *files(folder)[1:]])
    assert caplog.text.count("the base's texts are narrow") == 1
    recipe = write_recipe(folder, "sums", "poems", gate_mode="hidden", texts={"sums": [], "poems": []})
    ggufmoe.convert(recipe, tmp_path / "two.gguf", "F32")
    ggufmoe.refit(tmp_path / "two.gguf", tmp_path / "without.gguf", files(folder, "sums", "poems"))
    assert "the base is no expert" in caplog.text


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        (
            ["base.jsonl"],
            {},
            OptionError,
            r"1 file of texts for 3 experts \(0 base, 1 sums, 2 poems\): give one for each",
        ),
        ({"math": "base.jsonl"}, {}, OptionError, "no expert is called 'math'; there are 0 base, 1 sums, 2 poems"),
        ({"3": "base.jsonl"}, {}, OptionError, "no expert is called '3'"),
        ({"base": "base.jsonl", 2: []}, {}, OptionError, "no texts for sums, poems: a router is fitted on texts of"),
        ([], {}, OptionError, "give texts of each expert, or a router to take"),
        (["base.jsonl"], {"router": "m.gguf"}, OptionError, "a router that is taken is not fitted"),
        ([], {"router": "two.gguf"}, RecipeError, "2 layers of 2 experts .*; the model has 2 layers of 3 experts"),
        ([], {"router": "no.gguf"}, GGUFError, "no.gguf: cannot be read"),
        ([], {"router": "m.gguf", "router_report": "r.json"}, OptionError, "a router that is taken is not fitted"),
        (["base.jsonl", "no.txt", "sums.jsonl"], {}, RecipeError, "no.txt: the texts cannot be read"),
        (["base.jsonl"] * 3, {"text_tokens": 9}, OptionError, "--text-tokens must be between 64 and 1048576, not 9"),
    ],
)
def test_what_does_not_fit_is_refused(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    texts: Any,
    options: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    monkeypatch.chdir(folder)
    if not Path("two.gguf").exists():
        recipe = write_recipe(folder, "sums", "poems", gate_mode="hidden", texts={"sums": [], "poems": []})
        ggufmoe.convert(recipe, "two.gguf", "F32")
    with pytest.raises(error, match=message):
        ggufmoe.refit("m.gguf", tmp_path / "out.gguf", texts, **options)
    assert list(tmp_path.iterdir()) == []


def test_one_text_is_no_list_of_files(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="expected a list of files, or a dict"):
        ggufmoe.refit(folder / "m.gguf", tmp_path / "out.gguf", "base.jsonl")


@pytest.mark.parametrize(
    ("name", "message"),
    [("dense", "is no mixture of experts, so it has no router"), ("biased", "routes tokens as well")],
)
def test_models_whose_router_cannot_be_replaced(folder: Path, tmp_path: Path, name: str, message: str) -> None:
    model = tmp_path / f"{name}.gguf"
    if name == "dense":
        ggufmoe.convert(folder / "base", model, "F32")
    else:
        metadata, tensors = load(folder / "m.gguf")
        tensors["blk.0.exp_probs_b.bias"] = tensors["blk.0.attn_norm.weight"]
        store(model, metadata, tensors)
    for texts, router in ((files(folder), None), ([], folder / "m.gguf")):
        with pytest.raises(ArchitectureError, match=message):
            ggufmoe.refit(model, tmp_path / "out.gguf", texts, router=router)


def test_the_files_own_vocabulary_and_template_are_used(folder: Path, tmp_path: Path) -> None:
    """A file without a chat template takes no messages, one whose tokenizer is unknown no texts."""
    metadata, tensors = load(folder / "m.gguf")
    plain = {key: value for key, value in metadata.items() if key != "tokenizer.chat_template"}
    store(tmp_path / "plain.gguf", plain, tensors)
    with pytest.raises(RecipeError, match=r"talks.jsonl:\d+: the model has no chat template"):
        ggufmoe.refit(tmp_path / "plain.gguf", tmp_path / "out.gguf", files(folder, "base", "sums", "talks"))
    strange = {**metadata, "tokenizer.ggml.model": GGUFValue(ValueType.STRING, "strange", None)}
    store(tmp_path / "strange.gguf", strange, tensors)
    with pytest.raises(ModelLoadError, match=r"strange.gguf: llama.cpp cannot read its vocabulary: "):
        ggufmoe.refit(tmp_path / "strange.gguf", tmp_path / "out.gguf", files(folder))
    none = {**metadata, "tokenizer.ggml.model": GGUFValue(ValueType.STRING, "no_vocab", None)}
    store(tmp_path / "none.gguf", none, tensors)
    with pytest.raises(EngineError, match=r"none.gguf: the file has no tokenizer"):
        ggufmoe.refit(tmp_path / "none.gguf", tmp_path / "out.gguf", files(folder))
