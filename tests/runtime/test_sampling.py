"""Which sampling settings hold."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest

from ggufmoe import OptionError, SamplingOptions
from ggufmoe.options import MAX_SEED
from ggufmoe.runtime.sampling import Sampling, resolve


def settings(options: SamplingOptions, **metadata: Any) -> Sampling:
    return resolve(options, lambda key: metadata.get(key.removeprefix("general.sampling.")))


def test_the_defaults() -> None:
    assert settings(SamplingOptions(seed=1)) == Sampling(
        temperature=0.7, top_k=50, top_p=0.95, min_p=0.0, repeat_penalty=1.0, repeat_last_n=64, seed=1, n_predict=256
    )


def test_the_models_values_come_before_the_defaults_and_after_the_callers() -> None:
    own = {"temp": 1.25, "top_k": 7, "top_p": 0.5, "min_p": 0.25, "penalty_repeat": 1.5, "penalty_last_n": 32}
    assert settings(SamplingOptions(seed=1, n_predict=3), **own) == Sampling(1.25, 7, 0.5, 0.25, 1.5, 32, 1, 3)
    asked = SamplingOptions(temperature=0, top_k=1, top_p=1, min_p=0, repeat_penalty=2, seed=9)
    assert settings(asked, **own) == Sampling(0.0, 1, 1.0, 0.0, 2.0, 32, 9, 256)


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e9, "hot", True, [1]])
def test_a_senseless_value_of_the_model_is_left_aside(value: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="ggufmoe"):
        assert settings(SamplingOptions(), temp=value).temperature == 0.7
    assert "general.sampling.temp" in caplog.text


@pytest.mark.parametrize(("name", "value"), [("top_k", 1.5), ("penalty_last_n", 2**31 - 1)])
def test_numbers_that_would_be_cut_or_exhaust_the_memory_are_left_aside(
    name: str, value: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="ggufmoe"):
        assert settings(SamplingOptions(seed=1), **{name: value}) == settings(SamplingOptions(seed=1))
    assert f"general.sampling.{name} is {value}" in caplog.text


def test_without_a_seed_one_is_drawn() -> None:
    drawn = {settings(SamplingOptions(seed=seed)).seed for seed in (None, -1, None, -1)}
    assert len(drawn) == 4
    assert all(0 <= seed <= MAX_SEED for seed in drawn)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 1.5},
        {"min_p": -0.5},
        {"repeat_penalty": 0.0},
        {"seed": -2},
        {"seed": 2**32 - 1},
        {"n_predict": -2},
    ],
)
def test_impossible_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"not {next(iter(wrong.values()))}"):
        SamplingOptions(**wrong)
