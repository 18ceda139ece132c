"""Another router in a GGUF file: rows as a recipe's, all else as it was, and each refusal."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import ggufmoe
from ggufmoe.errors import (
    ArchitectureError,
    Cancelled,
    GGUFError,
    OptionError,
    OutputExistsError,
    RecipeError,
    TensorMismatchError,
)
from ggufmoe.gguf.header import GGUFValue, read_header
from ggufmoe.gguf.stored_rows import OpenModel
from ggufmoe.gguf.types import ValueType
from ggufmoe.merge import logistic
from ggufmoe.work import Progress
from tests.merge.test_router_fit import SHAPE, make_expert, write_recipe
from tests.tiny import make_checkpoint
from tests.tiny_tokenizers import CORPUS

NAMES = ("base", "sums", "poems")


@pytest.fixture(autouse=True)
def fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """How good the rows are is not asked here."""
    monkeypatch.setattr(logistic, "PENALTIES", (1e-3, 1e-5))
    monkeypatch.setattr(logistic, "_MAX_STEPS", 20)


def write_texts(folder: Path, *names: str) -> None:
    for number, name in enumerate(names):
        lines = [f"{word} {CORPUS[4 * number + i % 4]}" for i, word in enumerate("one two three four five six".split())]
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
    recipe = write_recipe(place, *NAMES, dtype="float32", gate_mode="hidden", texts=dict.fromkeys(NAMES, []))
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
