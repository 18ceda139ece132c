"""Traces equal an independent forward pass in numpy; what cannot be traced is refused; nothing is left behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import ggufmoe
from ggufmoe import (
    Cancelled,
    ContextOptions,
    Engine,
    Progress,
    RoutingOptions,
    RoutingTrace,
    RoutingTracer,
    SamplingOptions,
    trace_routing,
)
from ggufmoe.checkpoint.opening import open_checkpoint
from ggufmoe.errors import ContextFullError, EngineError, InputError, OptionError
from ggufmoe.merge.forward import ForwardPass
from ggufmoe.native import graph_tensors
from ggufmoe.routing import RoutedToken
from ggufmoe.routing.record import _Recorder
from ggufmoe.runtime.events import Finished
from ggufmoe.weights.dtypes import read_f32

EXACT = ContextOptions(
    n_ctx=512, n_batch=48, n_ubatch=20, n_threads=1, flash_attn="off", cache_type_k="f32", cache_type_v="f32"
)
GREEDY = SamplingOptions(temperature=0, n_predict=8)
TEXT = "the model reads a number and writes the sum of two numbers " * 3

Make = Callable[..., Path]
Numbers = NDArray[np.floating]


@pytest.fixture(scope="module")
def convert(tiny_checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    def make(**fields: object) -> tuple[Path, Path]:
        checkpoint = tiny_checkpoint(dtype="F32", n_embd=64, n_ff=64, n_layer=3, **fields)
        path = tmp_path_factory.mktemp("routing") / "m.gguf"
        ggufmoe.convert(checkpoint, path, quant="F32", threads=1)
        return checkpoint, path

    return make


@pytest.fixture(scope="module")
def engine(convert: Callable[..., tuple[Path, Path]]) -> Iterator[Engine]:
    with Engine(convert(n_expert=4, n_expert_used=2)[1], EXACT) as engine:
        yield engine


def reference(directory: Path, ids: list[int]) -> tuple[Numbers, NDArray[np.int64], Numbers]:
    """Probabilities, choices and weights of each token and layer, from the checkpoint in numpy."""
    with open_checkpoint(directory) as model:
        states = list(ForwardPass(model).layers([ids]))
        routers = [model.tensors[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(len(states))]
        rows = [read_f32(router, 0, router.shape[0]) for router in routers]
        n_used = model.config.n_expert_used
    logits = [state.router_input @ row.T for state, row in zip(states, rows, strict=True)]
    scores = np.exp(np.stack(logits, axis=1))
    probabilities = scores / scores.sum(axis=-1, keepdims=True)
    chosen = np.argsort(-probabilities, axis=-1, kind="stable")[..., :n_used]
    weights = np.take_along_axis(probabilities, chosen, axis=-1)
    return probabilities, chosen, weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(("n_expert", "n_used"), [(2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (8, 2)])
def test_a_trace_equals_the_same_model_in_numpy(
    convert: Callable[..., tuple[Path, Path]], n_expert: int, n_used: int
) -> None:
    directory, path = convert(n_expert=n_expert, n_expert_used=n_used)
    with Engine(path, EXACT) as engine:
        trace = trace_routing(engine, TEXT, generate=9)
        prompt = engine.tokenize(TEXT)
    assert len(prompt) > EXACT.n_batch
    assert list(trace.token_ids[: trace.n_prompt]) == prompt
    assert trace.n_token == len(prompt) + 9
    probabilities, chosen, weights = reference(directory, list(trace.token_ids))
    assert (trace.n_layer, trace.n_expert, trace.n_expert_used) == (3, n_expert, n_used)
    np.testing.assert_array_equal(trace.chosen, chosen)
    np.testing.assert_allclose(trace.weights, weights, atol=1e-4)
    np.testing.assert_allclose(trace.probabilities, probabilities, atol=1e-4)
    dtypes = [array.dtype.name for array in (trace.probabilities, trace.chosen, trace.weights)]
    assert dtypes == ["float32", "int32", "float32"]


def test_the_generated_tokens_are_those_of_a_generation(engine: Engine) -> None:
    prompt = engine.tokenize("the model")
    expected = [event.token_id for event in engine.generate(prompt, GREEDY) if not isinstance(event, Finished)]
    trace = trace_routing(engine, "the model", generate=8)
    assert list(trace.token_ids) == prompt + expected
    assert trace.n_prompt == len(prompt)


def test_token_ids_are_taken_as_they_are(engine: Engine) -> None:
    ids = engine.tokenize(TEXT, add_bos=False)[:5]
    assert list(trace_routing(engine, ids).token_ids) == ids


def test_texts_spell_special_tokens_and_lone_bytes(engine: Engine) -> None:
    trace = trace_routing(engine, "a😀")
    assert trace.texts[0] == engine.token_text(engine.bos_token)
    assert trace.texts[-4:] == ("<0xF0>", "<0x9F>", "<0x98>", "<0x80>")


def test_generation_ends_where_the_context_does(engine: Engine) -> None:
    trace = trace_routing(engine, TEXT, generate=10_000)
    assert trace.n_token <= engine.n_ctx - 1
    assert trace.n_token > trace.n_prompt


def test_afterwards_the_engine_runs_as_before(engine: Engine) -> None:
    prompt = engine.tokenize(TEXT)
    before = engine.logits(prompt)
    trace_routing(engine, "something else")
    assert engine.cached_tokens == ()
    np.testing.assert_array_equal(engine.logits(prompt), before)


def test_a_dense_model_is_refused(tiny_checkpoint: Make, tmp_path: Path) -> None:
    path = tmp_path / "dense.gguf"
    ggufmoe.convert(tiny_checkpoint(arch="llama", n_embd=64, n_ff=64), path, quant="F16")
    with Engine(path, EXACT) as engine:
        with pytest.raises(InputError, match="a dense model: it has no experts"):
            trace_routing(engine, "x")
        with pytest.raises(InputError, match="a dense model"):
            RoutingTracer(engine)


def test_what_does_not_fit_is_refused(engine: Engine) -> None:
    with pytest.raises(ContextFullError):
        trace_routing(engine, [5] * engine.n_ctx)
    with pytest.raises(InputError, match="0 or more, not -1"):
        trace_routing(engine, "x", generate=-1)
    with pytest.raises(InputError, match="is empty"):
        trace_routing(engine, [])


def test_progress_is_reported_and_the_options_may_be_an_object(engine: Engine) -> None:
    steps: list[Progress] = []
    trace = trace_routing(engine, TEXT, options=RoutingOptions(generate=3), on_progress=steps.append)
    n = trace.n_token
    generated = [("generate", 1.0, 3.0), ("generate", 2.0, 3.0), ("generate", 3.0, 3.0)]
    assert [(step.phase, step.done, step.total) for step in steps] == [*generated, ("route", 0, n), ("route", n, n)]
    assert {step.unit for step in steps} == {"tokens"}


@pytest.mark.parametrize("phase", ["", "generate", "route"])
def test_tracing_is_cancelled_in_each_phase(engine: Engine, phase: str) -> None:
    flag = threading.Event()

    def stop(step: Progress) -> None:
        if step.phase == phase:
            flag.set()

    if not phase:
        flag.set()
    with pytest.raises(Cancelled, match="stopped"):
        trace_routing(engine, TEXT, generate=20, on_progress=stop, cancel=flag)
    assert trace_routing(engine, "x").n_token  # nothing observes the engine any more


def test_an_error_of_the_progress_callback_ends_the_tracing(engine: Engine) -> None:
    def fail(step: Progress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        trace_routing(engine, TEXT, generate=20, on_progress=fail)
    assert trace_routing(engine, "x").n_token


def test_a_part_of_a_trace(engine: Engine) -> None:
    trace = trace_routing(engine, TEXT, generate=4)
    part = trace.part(2)
    assert part.token_ids == trace.token_ids[2:]
    assert part.n_prompt == trace.n_prompt - 2
    np.testing.assert_array_equal(part.weights, trace.weights[2:])
    assert trace.part(0, 3).n_prompt == 3
    assert trace.part(trace.n_prompt + 1).n_prompt == 0


def test_layers_are_named_by_their_numbers(engine: Engine) -> None:
    trace = trace_routing(engine, "x")
    np.testing.assert_allclose(trace.mean_weights(2), trace.expert_weights[:, 2], rtol=1e-6)
    np.testing.assert_allclose(trace.mean_weights(), trace.expert_weights.mean(axis=1), rtol=1e-6)
    with pytest.raises(OptionError, match="layer 3 has no experts: there are layers 0 to 2"):
        trace.mean_weights(3)
    gaps = replace(trace, layers=(0, 2, 5))
    with pytest.raises(OptionError, match="0 to 5 with gaps"):
        gaps.row_of(1)


# ---- while generating


def test_a_tracer_tells_the_step_that_each_token_came_from(engine: Engine) -> None:
    prompt = engine.tokenize(TEXT)
    with RoutingTracer(engine) as tracer:
        events = list(tracer.follow(engine.generate(prompt, GREEDY)))
        assert tracer.latest().shape == (3, 4)
    tokens = [event for event in events if isinstance(event, RoutedToken)]
    assert len(tokens) == len(events) - 1 == 8
    assert isinstance(events[-1], Finished)
    trace = trace_routing(engine, prompt, generate=8)
    assert [token.token_id for token in tokens] == list(trace.token_ids[len(prompt) :])
    expected = trace.mean_weights()[len(prompt) - 1 : -1]
    np.testing.assert_allclose([token.expert_weights for token in tokens], expected, atol=1e-4)


def test_a_closed_tracer_leaves_the_engine(engine: Engine) -> None:
    tracer = RoutingTracer(engine)
    with pytest.raises(EngineError, match="no token has been computed yet"):
        tracer.latest()
    with pytest.raises(EngineError, match="is being observed already"):
        RoutingTracer(engine)
    tracer.close()
    tracer.close()
    with RoutingTracer(engine):
        pass


def test_closing_the_engine_first_does_no_harm(convert: Callable[..., tuple[Path, Path]]) -> None:
    engine = Engine(convert(n_expert=2)[1], EXACT)
    with RoutingTracer(engine):
        engine.close()
    with pytest.raises(EngineError, match="has been closed"):
        engine.tokenize("x")


def test_an_unfinished_generation_goes_on_when_the_tracer_comes(engine: Engine) -> None:
    alone = list(engine.generate(engine.tokenize(TEXT), GREEDY))
    events = engine.generate(engine.tokenize(TEXT), GREEDY)
    first = next(events)
    with RoutingTracer(engine):
        assert [first, *events][:-1] == alone[:-1]


# ---- the observer


class Interrupted(_Recorder):
    """A recorder during which Ctrl-C is pressed."""

    def _take(self, kind: str, layer: int, values: Numbers) -> None:
        raise KeyboardInterrupt


def test_a_failure_inside_the_callback_stops_computing_and_is_raised_after_it(engine: Engine) -> None:
    seen = 0

    def stop() -> None:
        nonlocal seen
        seen += 1
        engine.cancel()

    recorder = Interrupted(keep_all=True, stop=stop)
    with pytest.raises(KeyboardInterrupt), engine.observed(recorder), recorder.checked():
        list(engine.logits_by_batch(engine.tokenize(TEXT)))
    assert seen == 1
    assert trace_routing(engine, "x").n_layer == 3


def test_values_of_views_are_read_row_by_row(engine: Engine) -> None:
    shapes: dict[bytes, set[tuple[int, ...]]] = {}

    def look(tensor: int, ask: bool) -> bool:
        name = graph_tensors.tensor_name(tensor)
        if name.startswith((b"ffn_moe_topk", b"ffn_moe_argsort")) and not ask:
            shapes.setdefault(name, set()).add(graph_tensors.tensor_values(tensor).shape)
        return name.startswith((b"ffn_moe_topk", b"ffn_moe_argsort"))

    with engine.observed(look):
        engine.logits(engine.tokenize(TEXT)[:9])
    assert shapes[b"ffn_moe_topk-1"] == {(1, 1, 9, 2)}
    assert shapes[b"ffn_moe_argsort-1"] == {(1, 1, 9, 4)}


def test_types_that_are_not_numbers_of_a_router_are_refused(engine: Engine) -> None:
    failures: list[str] = []

    def look(tensor: int, ask: bool) -> bool:
        if not ask:
            return True
        try:
            graph_tensors.tensor_values(tensor)
        except ValueError as error:
            failures.append(str(error))
        return False

    half = ContextOptions(n_ctx=256, n_threads=1, flash_attn="off", cache_type_k="f16", cache_type_v="f16")
    with Engine(engine.path, half) as other, other.observed(look):
        other.logits([5, 6])
    assert any("neither F32 nor I32" in failure for failure in failures)


def test_probabilities_of_a_softmax_over_the_chosen(engine: Engine) -> None:
    recorder = _Recorder(keep_all=True, stop=engine.cancel)
    recorder._take("probs", 0, np.array([[1.0, 2.0, 0.0]], np.float32))
    recorder._take("topk", 0, np.array([[1, 0]], np.int32))
    recorder._take("weights", 0, np.array([[[2.0], [1.0]]], np.float32))
    recorder._take("weights_softmax", 0, np.array([[[0.7], [0.3]]], np.float32))
    recorder._take("probs", 0, np.empty((0, 3), np.float32))
    probabilities, chosen, weights = recorder.routing(0)
    np.testing.assert_allclose(probabilities, [np.exp([1, 2, 0]) / np.exp([1, 2, 0]).sum()], rtol=1e-6)
    np.testing.assert_array_equal(chosen, [[1, 0]])
    np.testing.assert_allclose(weights, [[0.7, 0.3]])


def test_the_trace_is_public(engine: Engine) -> None:
    assert isinstance(trace_routing(engine, "x"), RoutingTrace)
