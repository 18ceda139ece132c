"""A fitted router: its report is what the merged model does, whatever computes it, and it is the same each time."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.checkpoint.source import TextScore
from ggufmoe.convert import plan_convert
from ggufmoe.errors import Cancelled, RecipeError
from ggufmoe.gguf.header import read_header
from ggufmoe.merge import forward, logistic, router_fit, router_steps
from ggufmoe.merge.forward import ForwardPass
from ggufmoe.merge.merged import MergedModel, open_recipe
from ggufmoe.merge.router_steps import RowsPass, lessons
from ggufmoe.merge.router_texts import RouterText
from ggufmoe.weights.dtypes import read_f32
from ggufmoe.work import Progress
from tests.tiny import make_checkpoint, stored_bits, write_shards
from tests.tiny_tokenizers import CORPUS

WORDS = ("one", "two", "three", "four", "five", "six")
SHAPE: dict[str, Any] = {"arch": "mistral", "n_layer": 2, "n_embd": 64, "n_ff": 128, "tokenizer": "spm"}


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """How good the rows are is not asked here."""
    monkeypatch.setattr(logistic, "PENALTIES", (1e-3, 1e-5))
    monkeypatch.setattr(logistic, "_MAX_STEPS", 20)
    monkeypatch.setattr(router_steps, "DEFAULT_STEPS", 2)


def make_expert(directory: Path, base: Path, seed: int) -> None:
    """A model with the base's weights but for its MLPs, which are another draw."""
    make_checkpoint(directory, **SHAPE, seed=seed)
    with open_checkpoint(base) as ours, open_checkpoint(directory) as theirs:
        tensors = {name: (theirs if ".mlp." in name else ours).tensors[name] for name in ours.tensors}
        read = {name: read_f32(one) if len(one.shape) == 2 else read_f32(one, 0, 1)[0] for name, one in tensors.items()}
    write_shards(directory, {name: ("BF16", stored_bits(values, "BF16")) for name, values in read.items()}, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two experts that differ from it in their MLPs alone, a third that differs altogether, and three files."""
    place = tmp_path_factory.mktemp("fit")
    make_checkpoint(place / "base", **SHAPE, seed=1)
    for seed, name in ((2, "sums"), (3, "poems")):
        make_expert(place / name, place / "base", seed)
    make_checkpoint(place / "stranger", **SHAPE, seed=4)
    for number, name in enumerate(("base", "sums", "poems")):
        lines = [f"{word} {CORPUS[4 * number + i % 4]}" for i, word in enumerate(WORDS)]
        content = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (place / f"{name}.jsonl").write_text(content, encoding="utf-8")
    return place


def write_recipe(folder: Path, *names: str, texts: dict[str, Any] | None = None, **fields: Any) -> Path:
    prompts = fields.pop("prompts", True)
    experts: list[dict[str, Any]] = []
    for name in names:
        expert = {"source_model": name, "texts": (texts or {}).get(name, f"{name}.jsonl")}
        experts.append(expert | ({"positive_prompts": [f"about {name}"]} if prompts else {}))
    path = folder / "fit.yaml"
    recipe = {"base_model": "base", "gate_mode": "fitted", "experts": experts, **fields}
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@contextlib.contextmanager
def fitted(path: Path, **options: Any) -> Iterator[MergedModel]:
    model = open_recipe(path)
    try:
        model.prepare(**options)
        yield model
    finally:
        model.close()


def rows_of(model: MergedModel) -> Any:
    return np.stack([read_f32(model.tensors[f"model.layers.{i}.block_sparse_moe.gate.weight"]) for i in range(2)])


def scores_of(model: MergedModel) -> tuple[TextScore, ...]:
    assert model.router_report is not None
    return model.router_report.scores


def loss_of(model: Any, texts: list[RouterText]) -> float:
    """The mean loss of a model on texts, from all of its logits."""
    logits = ForwardPass(model).logits([text.tokens for text in texts]).astype(np.float64)
    likelihoods = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    places = [(start + i - 1, text.tokens[i]) for start, text in _starts(texts) for i in text.scored]
    return -float(np.mean([likelihoods[place] for place in places]))


def _starts(texts: list[RouterText]) -> Iterator[tuple[int, RouterText]]:
    start = 0
    for text in texts:
        yield start, text
        start += len(text.tokens)


@pytest.mark.parametrize(
    ("names", "n_used"), [(("base", "sums", "poems"), 2), (("sums", "poems"), 2), (("sums", "poems"), 1)]
)
def test_the_report_tells_what_the_models_do(folder: Path, names: tuple[str, ...], n_used: int) -> None:
    """Losses are those of the merged model, the dense models and equal weights, each computed on its own."""
    path = write_recipe(folder, *names, experts_per_token=n_used)
    with fitted(path) as model:
        for score in scores_of(model):
            texts = [text for text in model.texts if text.held_out and text.file == score.file]
            assert score.n_scored_tokens == sum(len(text.scored) for text in texts)
            assert score.losses["fitted"] == pytest.approx(loss_of(model, texts), rel=1e-4)
            for expert, name in enumerate(names):
                with open_checkpoint(folder / name) as dense:
                    assert score.losses[f"expert {expert}"] == pytest.approx(loss_of(dense, texts), rel=1e-4)
            with open_checkpoint(folder / "base") as dense:
                assert score.losses["base"] == pytest.approx(loss_of(dense, texts), rel=1e-4)


def test_equal_weights_and_hidden_rows_are_those_of_such_models(folder: Path) -> None:
    with fitted(write_recipe(folder, "sums", "poems", dtype="float32")) as model:
        scores, texts = scores_of(model), [text for text in model.texts if text.held_out]
        hidden = open_recipe(
            write_recipe(folder, "sums", "poems", dtype="float32", gate_mode="hidden", texts={"sums": [], "poems": []})
        )
        hidden.prepare()
        for score in scores:
            mine = [text for text in texts if text.file == score.file]
            assert score.losses["hidden"] == pytest.approx(loss_of(hidden, mine), rel=1e-4)
        for router in model._routers:
            router.fill(np.zeros((2, 64), dtype=np.float32))
        for score in scores:
            mine = [text for text in texts if text.file == score.file]
            assert score.losses["uniform"] == pytest.approx(loss_of(model, mine), rel=1e-4)
        hidden.close()


def test_without_prompts_nothing_is_compared_with_hidden(folder: Path) -> None:
    with fitted(write_recipe(folder, "sums", "poems", prompts=False)) as model:
        assert all("hidden" not in score.losses for score in scores_of(model))


def test_texts_go_to_their_experts(folder: Path) -> None:
    """Random experts gain nothing from a router; what it learned shows in the tokens of texts that it has seen."""
    with fitted(write_recipe(folder, "base", "sums", "poems")) as model:
        states = [
            state.router_input
            for state in ForwardPass(model).layers([text.tokens for text in model.texts if not text.held_out])
        ]
        labels = np.concatenate([[text.expert] * len(text.tokens) for text in model.texts if not text.held_out])
        for state, rows in zip(states, rows_of(model), strict=True):
            assert ((state @ rows.T).argmax(axis=1) == labels).mean() > 0.5
        for score in scores_of(model):
            assert 0 < score.own_weight <= 1
            assert 0 <= score.own_first <= 1
            assert score.n_fitted_tokens > 20


def test_rows_are_the_same_on_every_run_and_with_every_number_of_threads(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "TILE_BYTES", 40 * 4 * 64)
    path = write_recipe(folder, "base", "sums", "poems")
    found = []
    for threads in (1, 1, 3):
        with fitted(path, threads=threads) as model:
            found.append(rows_of(model))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])
    with fitted(write_recipe(folder, "base", "sums", "poems", seed=1)) as model:
        assert not np.array_equal(found[0], rows_of(model))


def test_both_roads_give_the_same_file(folder: Path, tmp_path: Path) -> None:
    path = write_recipe(folder, "base", "sums")
    report = tmp_path / "report.json"
    ggufmoe.convert(path, tmp_path / "straight.gguf", "F32", router_report=report)
    ggufmoe.merge(path, tmp_path / "merged")
    ggufmoe.convert(tmp_path / "merged", tmp_path / "around.gguf", "F32")
    assert (tmp_path / "straight.gguf").read_bytes() == (tmp_path / "around.gguf").read_bytes()
    assert read_header(tmp_path / "straight.gguf").get("ggufmoe.gate_mode") == "fitted"
    told = json.loads(report.read_text())
    assert [score["file"] for score in told["scores"]] == ["base.jsonl", "sums.jsonl"]
    assert set(told["scores"][0]["losses"]) == {"base", "expert 0", "expert 1", "uniform", "hidden", "fitted"}
    assert told["attention_distances"] == [0.0, 0.0]


def test_tokens_before_those_of_an_answer_count_more() -> None:
    texts = [RouterText(0, "a", (1, 5, 6, 7, 8), (3, 4), False), RouterText(1, "b", (1, 5, 6), (1, 2), True)]
    np.testing.assert_array_equal(router_fit._Places.of(texts).counts, [1, 1, 3, 3, 1, 3, 3, 1])


def test_progress_counts_layers_and_a_fit_can_be_stopped(folder: Path) -> None:
    path = write_recipe(folder, "base", "sums")
    seen: list[Progress] = []
    with fitted(path, on_progress=seen.append):
        assert [step.item for step in seen] == ["layer 1 of 2", "layer 2 of 2", "step 1 of 2", "step 2 of 2"]
        assert seen[-1].done == seen[-1].total
    stop = threading.Event()
    whole = fitted(path, on_progress=lambda step: stop.set(), cancel=stop)
    with pytest.raises(Cancelled, match="stopped while computing the router"), whole:
        pass


def test_steps_are_kept_where_held_out_texts_come_nearer(folder: Path) -> None:
    """Where they do is asked of rows from two runs, by the distances of held-out texts that are computed here."""
    found = {}
    for n_steps in (0, 6):
        with fitted(write_recipe(folder, "base", "sums", "poems", router_steps=n_steps, dtype="float32")) as model:
            mixture = RowsPass(model, rows_of(model))
            held_out = lessons(mixture, [text for text in model.texts if text.held_out])
            found[n_steps] = rows_of(model), mixture.distance(held_out)[0]
    kept = not np.array_equal(found[0][0], found[6][0])
    assert found[6][1] < found[0][1] if kept else found[6][1] == found[0][1]


def test_what_goes_wrong_is_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "ggufmoe")
    path = write_recipe(folder, "stranger", "sums", texts={"stranger": "poems.jsonl"})
    with fitted(path) as model:
        assert model.router_report is not None
        far, none = model.router_report.attention_distances
        worse = [score for score in scores_of(model) if score.is_worse_than_uniform]
    assert 1 < far < 2
    assert none == 0
    assert "the base is no expert" in caplog.text
    assert "expert 0: its attention differs from the base's by 1" in caplog.text
    assert caplog.text.count("is worse than equal weights") == len(worse)


def test_texts_elsewhere_are_refused_unless_allowed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "other.jsonl").write_text((folder / "base.jsonl").read_text(), encoding="utf-8")
    path = write_recipe(folder, "base", "sums", texts={"base": str(tmp_path / "other.jsonl")})
    with pytest.raises(RecipeError, match=r"texts: .*other.jsonl lies outside .*--allow-outside-files"):
        open_recipe(path)
    open_recipe(path, allow_outside_files=True).close()


def test_a_missing_file_is_refused_before_anything_is_computed(folder: Path) -> None:
    path = write_recipe(folder, "base", "sums", texts={"base": "nowhere.jsonl"})
    with pytest.raises(RecipeError, match=r"nowhere.jsonl: the texts cannot be read"):
        plan_convert(path, folder / "m.gguf", "F32")


@pytest.mark.parametrize("name", ["first", "first.gguf"])
def test_a_router_that_was_fitted_once_is_taken(folder: Path, tmp_path: Path, name: str) -> None:
    """From a checkpoint or a GGUF file: the same model, but for what it says about its making."""
    path = write_recipe(folder, "base", "sums")
    make = ggufmoe.merge if name == "first" else ggufmoe.convert
    result = make(path, tmp_path / name)
    with fitted(path) as model:
        rows = rows_of(model)
    again = write_recipe(folder, "base", "sums", router=str(tmp_path / name), texts={"base": [], "sums": []})
    content = yaml.safe_load(again.read_text())
    del content["gate_mode"]
    again.write_text(yaml.safe_dump(content), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"router: .* lies outside of"):
        open_recipe(again)
    taken = open_recipe(again, allow_outside_files=True)
    taken.prepare()
    np.testing.assert_array_equal(rows_of(taken), rows)
    assert taken.router_report is not None
    assert result.router_report is not None
    assert taken.router_report.gate_mode == "router"
    assert taken.router_report.condition_numbers == result.router_report.condition_numbers
    taken.close()


def test_a_router_that_does_not_fit_is_refused(folder: Path, tmp_path: Path) -> None:
    ggufmoe.convert(write_recipe(folder, "base", "sums", "poems"), folder / "three.gguf", "F32", force=True)
    ggufmoe.convert(folder / "base", folder / "dense.gguf", "F32", force=True)
    (folder / "broken.gguf").write_bytes(b"GGUF")
    for router, message in (
        (
            "three.gguf",
            r"has a router for 2 layers of 3 experts and 64 columns; the recipe makes 2 layers of 2 experts",
        ),
        ("dense.gguf", "is no mixture of experts, so it has no router"),
        ("base", "is no mixture of experts, so it has no router"),
        ("broken.gguf", r"fit.yaml: .*broken.gguf"),
        ("nowhere", r"fit.yaml: .*nowhere"),
    ):
        path = write_recipe(folder, "base", "sums", router=router, texts={"base": [], "sums": []})
        path.write_text(path.read_text().replace("gate_mode: fitted\n", ""), encoding="utf-8")
        with pytest.raises(RecipeError, match=message):
            open_recipe(path)
