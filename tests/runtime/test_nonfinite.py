"""A model that computes NaN is an error that names the model and the tensor, wherever logits are used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ggufmoe import ContextOptions, DecodeError, Engine, SamplingOptions, perplexity
from ggufmoe.runtime.nonfinite import not_finite_error
from tests.scripted import Scripted

FOLLOWS = {"a": "b", "b": "a"}
PROMPT = [1, 2, 260]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    n_vocab = len(Scripted(FOLLOWS).vocab)
    weights = np.ones((n_vocab, -(-n_vocab // 32) * 32), np.float32)
    weights[5, 7] = np.inf
    return Scripted(FOLLOWS, tensors={"output.weight": weights}).write(tmp_path / "broken.gguf")


@pytest.fixture
def broken(path: Path) -> Iterator[Engine]:
    with Engine(path, ContextOptions(n_ctx=256, n_threads=1)) as engine:
        yield engine


@pytest.mark.parametrize(
    "compute",
    [
        lambda engine: list(engine.generate(PROMPT, SamplingOptions(temperature=0.0))),
        lambda engine: list(engine.generate(PROMPT, SamplingOptions(temperature=1.0))),
        lambda engine: list(engine.generate(PROMPT, SamplingOptions(grammar='root ::= "a"'))),
        lambda engine: engine.prefill(PROMPT),
        lambda engine: engine.prefill(PROMPT, every_row=True),
        lambda engine: engine.evaluate(PROMPT),
        lambda engine: engine.logits(PROMPT),
    ],
)
def test_nan_is_an_error_of_every_computation(broken: Engine, compute: Callable[[Engine], object]) -> None:
    with pytest.raises(DecodeError, match=r"broken\.gguf: the model computes NaN .*: output\.weight holds NaN"):
        compute(broken)
    assert broken.tokenize("a")  # the engine is not lost


def test_nan_is_an_error_of_perplexity(path: Path, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("ab" * 600)
    with pytest.raises(DecodeError, match=r"output\.weight holds NaN"):
        perplexity(path, text_file=text, n_ctx=256, n_threads=1)


def test_without_such_a_weight_the_error_says_so(tmp_path: Path) -> None:
    good = Scripted(FOLLOWS).write(tmp_path / "good.gguf")
    assert "its weights are all finite" in str(not_finite_error(good))
    good.unlink()
    assert "cannot be searched" in str(not_finite_error(good))
