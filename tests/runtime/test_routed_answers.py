"""Answers that tell the experts of their tokens: what they tell is what a trace finds, also beside other answers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ggufmoe
from ggufmoe import (
    ContextOptions,
    Engine,
    EngineError,
    InputError,
    OffloadOptions,
    RoutedToken,
    SamplingOptions,
    trace_routing,
)
from ggufmoe.runtime.events import Event, Finished, Token
from tests.architecture_files import write_architecture
from tests.runtime.test_batching import recorded, release, scheduler_of, stopped, words

EXACT = ContextOptions(
    n_ctx=512, n_batch=48, n_ubatch=20, n_threads=1, flash_attn="off", cache_type_k="f32", cache_type_v="f32"
)
GREEDY = SamplingOptions(temperature=0, n_predict=8, logit_bias=("2-inf",))
TEXT = "the model reads a number and writes the sum of two numbers "


@pytest.fixture(scope="module")
def path(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("routed") / "m.gguf"
    checkpoint = tiny_checkpoint(dtype="F32", n_embd=64, n_ff=64, n_layer=3, n_expert=4, n_expert_used=2)
    ggufmoe.convert(checkpoint, path, quant="F32", threads=1)
    return path


@pytest.fixture(params=[1, 4])
def engine(path: Path, request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(path, replace(EXACT, n_parallel=request.param)) as engine:
        yield engine


def check(path: Path, prompt: Sequence[int], events: Sequence[Event]) -> None:
    """``events`` of an answer to ``prompt`` tell for each token what a trace tells of the token before it."""
    *tokens, last = events
    assert isinstance(last, Finished)
    assert len(tokens) == 8
    with Engine(path, EXACT, OffloadOptions(load_mode="none", device="none")) as alone:
        trace = trace_routing(alone, prompt, generate=8, sampling=GREEDY)
    assert [token.token_id for token in tokens if isinstance(token, RoutedToken)] == list(trace.token_ids[-8:])
    layers = [token.layers for token in tokens if isinstance(token, RoutedToken)]
    rows = slice(len(prompt) - 1, -1)
    found = [[[expert for expert, _ in layer] for layer in of_token] for of_token in layers]
    np.testing.assert_array_equal(found, trace.chosen[rows])
    weights = [[[weight for _, weight in layer] for layer in of_token] for of_token in layers]
    np.testing.assert_allclose(weights, trace.weights[rows], atol=1e-4)
    shares = [token.expert_weights for token in tokens if isinstance(token, RoutedToken)]
    np.testing.assert_allclose(shares, trace.mean_weights()[rows], atol=1e-4)


def test_a_token_tells_of_the_step_that_it_was_drawn_in(engine: Engine, path: Path) -> None:
    prompt = engine.tokenize(TEXT * 4)
    assert len(prompt) > EXACT.n_batch
    check(path, prompt, list(engine.generate(prompt, GREEDY, routing=True)))
    assert all(type(event) in (Token, Finished) for event in engine.generate(prompt, GREEDY))


def test_the_first_one_keeps_the_texts_that_are_computed(engine: Engine) -> None:
    prompt = engine.tokenize(TEXT)
    begun = engine.generate(engine.tokenize("two numbers"), replace(GREEDY, n_predict=100))
    first = next(begun)
    assert isinstance(list(engine.generate(prompt, GREEDY))[-1], Finished)
    last = list(engine.generate(prompt, GREEDY, routing=True))[-1]
    assert isinstance(last, Finished)
    assert last.timing.cached_tokens == len(prompt) - 1
    alone = list(engine.generate(engine.tokenize("two numbers"), replace(GREEDY, n_predict=100)))
    assert [first, *begun][:-1] == alone[:-1]


def side_by_side(
    engine: Engine, prompts: Sequence[Sequence[int]], *, silent: Collection[int] = ()
) -> list[list[Event]]:
    """The answers to all prompts, asked for at the same time; those with the numbers ``silent`` tell no routing."""
    list(engine.generate([1], replace(GREEDY, n_predict=1), routing=True))
    with stopped(engine), ThreadPoolExecutor(len(prompts)) as pool:
        asked = []
        for number, prompt in enumerate(prompts):
            asked.append(pool.submit(list, engine.generate(prompt, GREEDY, routing=number not in silent)))
            while len(scheduler_of(engine)._waiting) <= number:
                pass
        release(engine)
        return [one.result() for one in asked]


def test_some_tell_beside_others_that_do_not(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(path, replace(EXACT, n_parallel=4)) as engine, recorded(monkeypatch) as batches:
        prompts = [engine.tokenize(TEXT * n)[: 60 - 9 * n] for n in range(1, 6)]
        found = side_by_side(engine, prompts, silent=[2])
    assert max(map(len, batches)) == 4
    assert any(len(batch) > 1 and max(batch) > 1 for batch in batches)
    assert all(type(event) in (Token, Finished) for event in found.pop(2))
    del prompts[2]
    for prompt, events in zip(prompts, found, strict=True):
        check(path, prompt, events)


def test_models_with_a_state_are_computed_in_other_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_architecture(tmp_path / "m.gguf", "lfm2moe")
    options, offload = replace(EXACT, n_parallel=2), OffloadOptions(load_mode="none", device="none")
    with Engine(path, options, offload) as engine, recorded(monkeypatch) as batches:
        prompts = [words(7), words(18, 3)]
        found = side_by_side(engine, prompts)
    assert any(len(batch) > 1 and min(batch) != max(batch) for batch in batches)
    for prompt, events in zip(prompts, found, strict=True):
        check(path, prompt, events)


def test_the_first_one_can_be_cancelled_before_it_begins(engine: Engine) -> None:
    flag = threading.Event()
    flag.set()
    (end,) = engine.generate(engine.tokenize(TEXT), GREEDY, routing=True, cancel=flag)
    assert isinstance(end, Finished)
    assert end.reason == "cancelled"
    assert isinstance(next(iter(engine.generate([1], GREEDY, routing=True))), RoutedToken)


def test_what_cannot_be_told_is_an_error(engine: Engine, story: Engine) -> None:
    with pytest.raises(InputError, match="a dense model: it has no experts"):
        story.generate([1], GREEDY, routing=True)
    prompt = engine.tokenize(TEXT)
    events = engine.generate(prompt, replace(GREEDY, n_predict=100), routing=True)
    next(events)
    with engine.observed(lambda tensor, ask: False):
        with pytest.raises(EngineError, match="is being observed"):
            engine.generate(prompt, GREEDY, routing=True)
        with pytest.raises(EngineError, match="is being observed"):
            list(events)
    assert isinstance(next(iter(engine.generate(prompt, GREEDY, routing=True))), RoutedToken)
