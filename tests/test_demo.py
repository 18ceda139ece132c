"""The embedded models: they answer rightly in every type, by every road and with one expert, and their router tells
arithmetic from the rest."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.demo import APART, APART_EXPERTS, DIRECTORY, NAME, RECIPE, questions, write_apart
from ggufmoe.runtime.events import Token
from ggufmoe.runtime.messages import Message
from ggufmoe.weights.dtypes import read_f32
from tests.remote.workers import start_worker
from tests.stories import ONE_THREAD

ROOT = Path(__file__).resolve().parents[1]
GREEDY = ggufmoe.SamplingOptions(temperature=0, n_predict=64)
MATH = 1
TYPES = ("F32", "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M")


@cache
def data() -> ModuleType:
    """``scripts/demo_data.py``, which the models were trained by."""
    spec = importlib.util.spec_from_file_location("demo_data", ROOT / "scripts" / "demo_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``mixture(quant)`` is the recipe's GGUF file, made once for each type."""
    directory = tmp_path_factory.mktemp("demo")

    def made(quant: str) -> Path:
        path = directory / f"{quant}.gguf"
        if not path.exists():
            ggufmoe.convert(RECIPE, path, quant)
        return path

    return made


def answers(engine: ggufmoe.Engine, asked: list[Any]) -> Iterator[tuple[Any, str]]:
    """Each question with what the model says to it, asked alone."""
    chat = ggufmoe.Chat(engine, sampling=GREEDY)
    for question in asked:
        chat.reset()
        yield question, "".join(event.text for event in chat.send(question.text)).strip()


def n_right(path: Path, asked: list[Any], offload: ggufmoe.OffloadOptions | None = None) -> int:
    with ggufmoe.Engine(path, ONE_THREAD, offload) as engine:
        return sum(said == question.answer for question, said in answers(engine, asked))


@cache
def everything() -> tuple[Any, ...]:
    """All questions there are, for training and held out."""
    return (*data().everyday(), *data().arithmetic())


def held_out(kind: str, n: int) -> list[Any]:
    return random.Random(7).sample([one for one in everything() if one.held_out and one.kind == kind], n)


def test_the_demo_asks_what_was_never_trained_on() -> None:
    expected = [(one.kind, one.text, one.answer) for one in data().demo_questions()]
    assert [(one.kind, one.text, one.answer) for one in questions()] == expected
    assert all(one.held_out for one in data().demo_questions())


def test_the_second_act_asks_what_was_never_trained_on_and_fits_on_what_was() -> None:
    expected = [(one.kind, one.text, one.answer) for one in data().apart_questions()]
    assert [(one.kind, one.text, one.answer) for one in questions(APART)] == expected
    assert all(one.held_out for one in data().apart_questions())
    for expert, asked in data().apart_texts().items():
        lines = (APART / f"{expert}.jsonl").read_text(encoding="utf-8").splitlines()
        said = [[message["content"] for message in json.loads(line)["messages"]] for line in lines]
        assert said == [[one.text, one.answer] for one in asked]
        assert not any(one.held_out for one in asked)


def test_experts_that_never_met_have_the_bases_attention(tmp_path: Path) -> None:
    recipe = write_apart(tmp_path / "apart")
    assert recipe.read_bytes() == (APART / "recipe.yaml").read_bytes()
    base = tensors_of(DIRECTORY / "base")
    assert tensors_of(tmp_path / "apart" / "base").keys() == base.keys()
    for name in APART_EXPERTS[1:]:
        own = tensors_of(tmp_path / "apart" / name)
        changed = {tensor for tensor in base if base[tensor] != own[tensor]}
        assert len(changed) == 9
        assert all(re.search(r"layers\.[123]\.mlp\.", tensor) for tensor in changed)


def tensors_of(checkpoint: Path) -> dict[str, bytes]:
    with open_checkpoint(checkpoint) as model:
        return {name: read_f32(tensor).tobytes() for name, tensor in model.tensors.items()}


def test_no_held_out_question_is_one_of_training() -> None:
    trained = {one.text for one in everything() if not one.held_out}
    asked = {one.text for one in everything() if one.held_out}
    assert len(asked) > 8000
    assert not trained & asked


@pytest.mark.parametrize("quant", TYPES)
def test_it_answers_rightly_in_every_type(mixture: Callable[[str], Path], quant: str) -> None:
    assert n_right(mixture(quant), list(questions())) == len(questions())


@pytest.mark.parametrize(
    ("kind", "least"), [("everyday", 36), ("sum", 39), ("difference", 37), ("comparison", 30), ("equation", 39)]
)
def test_held_out_questions(mixture: Callable[[str], Path], kind: str, least: int) -> None:
    assert n_right(mixture("Q8_0"), held_out(kind, 40)) >= least


def test_the_merged_checkpoint_gives_the_same_file(mixture: Callable[[str], Path], tmp_path: Path) -> None:
    ggufmoe.merge(RECIPE, tmp_path / "merged")
    ggufmoe.convert(tmp_path / "merged", tmp_path / "merged.gguf", "Q8_0")
    assert (tmp_path / "merged.gguf").read_bytes() == mixture("Q8_0").read_bytes()


def test_one_expert_for_each_token_is_enough_for_most(mixture: Callable[[str], Path]) -> None:
    asked = [one for kind in ("everyday", "sum") for one in held_out(kind, 20)]
    assert n_right(mixture("Q8_0"), asked, ggufmoe.OffloadOptions(n_expert_used=1)) >= 30


def test_a_worker_answers_rightly_too(mixture: Callable[[str], Path]) -> None:
    with start_worker() as worker:
        offload = ggufmoe.OffloadOptions(rpc=worker.endpoint, n_cpu_moe=2)
        with ggufmoe.Engine(mixture("Q4_K_M"), ONE_THREAD, offload) as engine:
            assert [said for _, said in answers(engine, list(questions()))] == [one.answer for one in questions()]
            assert engine.placement.report.weight_bytes[f"RPC0[{worker.endpoint}]"] > 0


def test_it_remembers_what_was_said(mixture: Callable[[str], Path]) -> None:
    with ggufmoe.Engine(mixture("Q4_K_M")) as engine:
        chat = ggufmoe.Chat(engine, sampling=GREEDY)
        for said in ("My name is Clara.", "What is my name?"):
            answer = "".join(event.text for event in chat.send(said))
    assert answer == "Your name is Clara."


def test_arithmetic_goes_to_the_math_expert(mixture: Callable[[str], Path]) -> None:
    with ggufmoe.Engine(mixture("F32"), ONE_THREAD) as engine:
        shares = {kind: _math_share(engine, held_out(kind, 8)) for kind in ("everyday", "sum", "equation")}
    assert shares["sum"] > shares["everyday"] + 0.15
    assert shares["equation"] > shares["everyday"] + 0.15


def _math_share(engine: ggufmoe.Engine, asked: list[Any]) -> float:
    """Mean weight of the math expert over layers and tokens of question and answer."""
    chat = ggufmoe.Chat(engine)
    total = n_token = 0.0
    for question in asked:
        prompt = chat.prompt((Message("user", question.text), Message("assistant", question.answer)))
        weights = ggufmoe.trace_routing(engine, prompt).probabilities[:, :, MATH].mean(axis=1)
        total, n_token = total + float(weights.sum()), n_token + len(weights)
    return total / n_token


def test_every_answer_streams_as_tokens(mixture: Callable[[str], Path]) -> None:
    with ggufmoe.Engine(mixture("Q4_K_M")) as engine:
        events = list(ggufmoe.Chat(engine, sampling=GREEDY).send("What is 12 + 30?"))
    assert sum(isinstance(event, Token) for event in events) > 10
    assert "".join(event.text for event in events).endswith("so 42")


def test_both_models_fit_a_small_repository() -> None:
    checkpoints = [DIRECTORY / name / "model.safetensors" for name in ("base", "math")]
    assert sum(path.stat().st_size for path in checkpoints) < 16e6
    assert sum(path.stat().st_size for path in APART.iterdir()) < 8e6


def test_the_model_card_names_what_it_must() -> None:
    card = (DIRECTORY / "README.md").read_text(encoding="utf-8")
    assert re.search(r"^license: apache-2.0$", card, re.MULTILINE)
    for heading in ("Data", "Training", "Accuracy", "Limits"):
        assert f"\n## {heading}\n" in card
    for script in re.findall(r"scripts/\w+\.py", card):
        assert (ROOT / script).is_file()


def test_the_file_knows_its_recipe(mixture: Callable[[str], Path]) -> None:
    with ggufmoe.Engine(mixture("Q8_0"), ONE_THREAD) as engine:
        assert engine.metadata("general.name") == NAME
