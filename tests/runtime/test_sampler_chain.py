"""Every sampling option through the real chain: what it leaves possible, and how likely."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ggufmoe import Engine, InputError, OptionError, SamplingOptions
from ggufmoe.runtime.events import Token
from tests.runtime.test_engine import text_of
from tests.scripted import Scripted
from tests.stories import ONE_THREAD

FACES = {" a": 20.0, " b": 19.5, " c": 19.0, " d": 17.0}
DICE = Scripted(
    {
        " throw": FACES,
        " loop": {" loop": 12.0, " b": 11.0},
        " x": {" y": 12.0, " b": 10.0},
        " y": {" x": 12.0, " b": 10.0},
    },
    pieces=[" e"],
)
OPEN = SamplingOptions(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, n_predict=1)
GREEDY = replace(OPEN, temperature=0.0)


@pytest.fixture(scope="module")
def dice(write_model: Callable[[Scripted], Path]) -> Iterator[Engine]:
    with Engine(write_model(DICE), ONE_THREAD) as engine:
        yield engine


def throws(engine: Engine, options: SamplingOptions, n: int = 60, prompt: str = " throw") -> Counter[str]:
    tokens = engine.tokenize(prompt)
    return Counter(text_of(engine.generate(tokens, replace(options, seed=seed))) for seed in range(n))


@pytest.mark.parametrize(
    ("change", "possible"),
    [
        ({}, " a b c d"),
        ({"top_k": 2}, " a b"),
        ({"top_p": 0.4}, " a"),
        ({"top_p": 0.75}, " a b"),
        ({"min_p": 0.3}, " a b c"),
        ({"temperature": 0.01}, " a"),
        ({"typical_p": 0.2}, " b"),  # its surprise is next to the mean
        ({"xtc_probability": 1.0, "xtc_threshold": 0.2}, " b c d"),  # the least of the likely ones stays
        ({"mirostat": 2, "mirostat_ent": 0.05, "mirostat_lr": 0.0}, " a"),
        ({"mirostat": 1, "mirostat_ent": 0.05, "mirostat_lr": 0.0}, " a"),
        ({"grammar": 'root ::= " d"'}, " d"),
    ],
)
def test_what_remains_possible(dice: Engine, change: dict[str, Any], possible: str) -> None:
    assert sorted(throws(dice, replace(OPEN, **change))) == [f" {face}" for face in possible.split()]


def test_biases(dice: Engine) -> None:
    a, d, e = (DICE.id(face) for face in (" a", " d", " e"))
    assert set(throws(dice, replace(GREEDY, logit_bias=(f"{d}+4",)), 1)) == {" d"}
    assert " a" not in throws(dice, replace(OPEN, logit_bias=(f"{a}-inf",)))
    assert set(throws(dice, replace(GREEDY, logit_bias=(f"{e}+100",)), 1)) == {" e"}
    with pytest.raises(InputError, match="is not a token"):
        dice.generate([1], replace(OPEN, logit_bias=("99999999+1",)))


@pytest.mark.parametrize(
    ("change", "prompt", "expected"),
    [
        ({}, " loop", " loop"),
        ({"repeat_penalty": 1.2}, " loop", " b"),
        ({"presence_penalty": 2.0}, " loop", " b"),
        ({"frequency_penalty": 0.4}, " loop", " loop"),
        ({"frequency_penalty": 0.4}, " loop loop loop", " b"),
        ({"presence_penalty": 2.0, "repeat_last_n": 0}, " loop", " loop"),
        ({"presence_penalty": 2.0, "repeat_last_n": 1}, " loop throw loop", " b"),
        ({"dry_multiplier": 2.0}, " x y x y x", " b"),
        ({"dry_multiplier": 2.0}, " x y", " x"),
        ({"dry_multiplier": 2.0, "dry_allowed_length": 9}, " x y x y x", " y"),
        ({"dry_multiplier": 2.0, "dry_penalty_last_n": 0}, " x y x y x", " y"),
        ({"dry_multiplier": 1.5}, " x y x y x", " b"),
        ({"dry_multiplier": 1.5, "dry_base": 1.0}, " x y x y x", " y"),
        ({"dry_multiplier": 2.0, "dry_sequence_breakers": (" y",)}, " x y x y x", " y"),
    ],
)
def test_penalties(dice: Engine, change: dict[str, Any], prompt: str, expected: str) -> None:
    assert set(throws(dice, replace(GREEDY, **change), 1, prompt)) == {expected}


def test_logprobs_are_of_the_model_and_not_of_the_sampling(dice: Engine) -> None:
    token, _ = dice.generate(dice.tokenize(" throw"), replace(GREEDY, logprobs=1, top_k=1))
    assert isinstance(token, Token)
    assert token.logprob == pytest.approx(token.alternatives[0][1])
    assert token.logprob == pytest.approx(-0.703, abs=0.02)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"logit_bias": ("5",)}, "token id and a signed number"),
        ({"logit_bias": ("x+1",)}, "token id and a signed number"),
        ({"grammar": 'root ::= "a"', "json_schema": "{}"}, "not several"),
        ({"mirostat": 3}, "mirostat"),
        ({"dry_base": 0.5}, "--dry-base"),
        ({"repeat_last_n": 2**30}, "--repeat-last-n"),
        ({"logprobs": -1}, "logprobs"),
        ({"xtc_probability": 2.0}, "--xtc-probability"),
    ],
)
def test_impossible_options(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(OptionError, match=why):
        SamplingOptions(**wrong)
