"""Steps of a fitted router: the gradient is the slope of a distance, and steps go down it, text by text in turn."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest

from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.errors import Cancelled
from ggufmoe.merge import router_steps
from ggufmoe.merge.forward import Floats, ForwardPass
from ggufmoe.merge.router_steps import Lesson, RowsPass, default_steps, draws, lessons, stepped
from ggufmoe.merge.router_texts import RouterText
from ggufmoe.work import Work
from tests.tiny import make_checkpoint

TEXTS = [
    RouterText(0, "a", (1, 17, 40, 99, 12), (3, 4), held_out=False),
    RouterText(1, "b", (1, 55, 3), (1, 2), held_out=False),
    RouterText(1, "c", (1, 8, 21, 7, 60), (2, 3, 4), held_out=False),
    RouterText(2, "b", (1, 30, 31), (1, 2), held_out=False),
]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RowsPass]:
    """A mixture of three experts, two for each token, with rows so long that small steps choose no others."""
    path = make_checkpoint(tmp_path_factory.mktemp("steps") / "model", n_expert=3, n_embd=64, n_ff=96, n_head=4)
    with open_checkpoint(path) as model:
        n_layer = model.config.n_layer
        yield RowsPass(model, random(n_layer, 3, 64) * np.float32(0.2), threads=1)


def random(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def distance(mixture: RowsPass, rows: Floats, taught: list[Lesson]) -> float:
    mixture.rows = rows
    return mixture.distance(taught)[0]


def test_the_gradient_is_the_slope_of_the_distance(mixture: RowsPass) -> None:
    rows, taught = mixture.rows.copy(), lessons(mixture, TEXTS)
    mixture.differentiate(taught)
    gradient, step = mixture.gradient.copy(), np.float32(3e-3)
    direction = gradient / np.sqrt(np.mean(gradient**2))
    ahead, behind = (distance(mixture, rows + side * direction, taught) for side in (step, -step))
    slope = float((gradient * direction).sum(dtype=np.float64))
    assert (ahead - behind) / (2 * float(step)) == pytest.approx(slope, rel=0.05)
    mixture.rows = rows


def test_the_distance_is_the_mean_over_files_of_softened_divergences(mixture: RowsPass) -> None:
    """Of logits that are computed elsewhere: of the mixture, and of one in which a text has one expert."""
    taught = lessons(mixture, TEXTS)
    apart: dict[tuple[int, str], list[float]] = {}
    for lesson in taught:
        text = lesson.text
        ours, own = (_softened(mixture, text, expert) for expert in (None, text.expert))
        places = [place - 1 for place in text.scored]
        apart.setdefault((text.expert, text.file), []).extend(4 * (np.exp(own) * (own - ours)).sum(axis=1)[places])
    expected = np.mean([np.mean(values) for values in apart.values()])
    assert distance(mixture, mixture.rows, taught) == pytest.approx(expected, rel=0.01)


def _softened(mixture: RowsPass, text: RouterText, expert: int | None) -> Any:
    """The logarithms of the likelihoods of each next token, at a temperature of 2."""

    class One(ForwardPass):
        def router_logits(self, layer: int, normed: Floats) -> Floats:
            alone = np.where(np.arange(3) == expert, 99, 0).astype(np.float32)
            return mixture.router_logits(layer, normed) if expert is None else np.tile(alone, (len(normed), 1))

    logits = One(Model(mixture)).logits([text.tokens]).astype(np.float64) / 2
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


class Model:
    def __init__(self, mixture: RowsPass) -> None:
        self.config, self.tensors = mixture._config, mixture._tensors


def test_steps_go_down_the_distance(mixture: RowsPass) -> None:
    rows, taught, done = mixture.rows.copy(), lessons(mixture, TEXTS), list[int]()
    moved = stepped(mixture, taught, n_steps=8, seed=0, on_step=done.append)
    assert done == [*range(1, 9)]
    assert distance(mixture, moved, taught) < 0.99 * distance(mixture, rows, taught)
    mixture.rows = rows


def test_texts_of_a_step_are_as_many_of_each_file_and_come_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_steps, "STEP_TOKENS", 12)
    texts = [RouterText(0, "a", (1, i, i), (1, 2), held_out=False) for i in range(4)]
    texts += [RouterText(1, "a", (1, *[i] * 9), (1, 2), held_out=False) for i in range(2)]
    drawn = list(islice(draws(texts, seed=0), 4))
    assert [[texts[i].expert for i in step] for step in drawn] == [[0, 0, 1]] * 4
    for place, n_texts in (([0, 1], 4), ([2], 2)):
        order = [step[i] for step in drawn for i in place]
        assert len({*order[:n_texts]}) == len({*order[n_texts : 2 * n_texts]}) == n_texts
    assert list(islice(draws(texts, seed=0), 4)) == drawn
    assert list(islice(draws(texts, seed=1), 4)) != drawn


def test_a_step_can_be_stopped(mixture: RowsPass) -> None:
    stop, taught = threading.Event(), lessons(mixture, TEXTS)
    stop.set()
    mixture.work, kept = Work("router", 1, cancel=stop), mixture.work
    with pytest.raises(Cancelled):
        stepped(mixture, taught, n_steps=1, seed=0)
    mixture.work = kept


def test_large_models_take_no_steps_unless_asked(mixture: RowsPass, monkeypatch: pytest.MonkeyPatch) -> None:
    assert default_steps(Model(mixture)) == router_steps.DEFAULT_STEPS
    monkeypatch.setattr(router_steps, "_MANY_WEIGHTS", 1000)
    assert default_steps(Model(mixture)) == 0
