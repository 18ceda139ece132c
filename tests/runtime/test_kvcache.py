"""What the cache holds after it was shifted, broken off or computed again, and when that can be stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ggufmoe import Cancelled, ContextOptions, DecodeError, Engine, EngineError
from ggufmoe.native.graph_tensors import tensor_name, tensor_shape
from ggufmoe.runtime.kvcache import KVCache
from tests.engines import local_engine
from tests.remote.workers import PATIENT_S, wait_until
from tests.runtime.test_engine import last_of
from tests.stories import GREEDY, ONE_THREAD

SMALL = ContextOptions(n_ctx=256, n_threads=1, cache_ram=0)
LONG = replace(GREEDY, n_predict=-1)


@pytest.fixture
def engine(mixing_path: Path) -> Iterator[Engine]:
    with Engine(mixing_path, ONE_THREAD) as engine:
        yield engine


def in_cache(engine: Engine, work: Callable[[KVCache], object]) -> object:
    return local_engine(engine)._native.call(lambda: work(local_engine(engine)._loaded.cache))


def shifted(engine: Engine) -> list[int]:
    """Twelve tokens in the cache, without the second to the fifth; their keys have not been turned yet."""
    tokens = engine.tokenize(" w1 w2 w3 w4 w5 w6 w7 w8 w9 w10 w11")
    engine.prefill(tokens)
    assert in_cache(engine, lambda kv: kv.drop(1, 4))
    return [tokens[0], *tokens[5:]]


def test_a_shift_that_is_not_done_yet_is_not_kept(engine: Engine, tmp_path: Path) -> None:
    rest = shifted(engine)
    with pytest.raises(EngineError, match="cannot be kept before the next token"):
        engine.save_session(tmp_path / "x")
    in_cache(engine, KVCache.set_aside)
    assert not local_engine(engine)._loaded.cache.saved.n_bytes
    assert engine.evaluate([rest[-1]])
    assert engine.save_session(tmp_path / "x") == len(rest) + 1


def test_a_shift_that_is_broken_off_leaves_nothing(engine: Engine) -> None:
    rest = shifted(engine)

    def broken_off(kv: KVCache) -> bool:
        local_engine(engine)._loaded.abort_flag[0] = b"\x01"
        return kv.compute(rest[-1:])

    assert not in_cache(engine, broken_off)
    assert engine.cached_tokens == ()
    expected = engine.logits(rest)[-1]
    engine.forget()
    assert np.array_equal(engine.logits(rest)[-1], expected)


class SlowGraph:
    """Observes graphs: once ``is_armed``, sets ``flag`` in the next one of several tokens, whose nodes then take long.

    llama.cpp leaves that graph before its last node only if another thread has aborted it meanwhile.
    """

    def __init__(self) -> None:
        self.flag, self.started = threading.Event(), threading.Event()
        self.is_armed = False
        self.nodes: list[bytes] = []
        """The nodes that were computed after ``flag`` was set."""

    def __call__(self, tensor: int, ask: bool) -> bool:
        name = tensor_name(tensor)
        if not self.is_armed or (not self.nodes and tensor_shape(tensor)[2] < 2):
            return False
        if ask:
            self.is_armed = name not in self.nodes[:1]  # with its first node another graph begins
            return self.is_armed
        if not self.nodes:
            time.sleep(0.2)  # a reader that still has tokens to read would see the flag by itself
            self.flag.set()
            self.started.set()
        self.nodes.append(name)
        time.sleep(0.25)
        return True


def test_cancelling_while_an_answer_is_computed_again(mixing_path: Path) -> None:
    slow = SlowGraph()
    with Engine(mixing_path, replace(SMALL, n_ctx=1024)) as engine, engine.observed(slow):
        events = engine.generate(engine.tokenize(" w1" * 30), LONG, cancel=slow.flag)
        next(events)
        list(engine.generate(engine.tokenize(" w2" * 30), replace(GREEDY, n_predict=1)))
        slow.is_armed = True
        assert last_of(events).reason == "cancelled"
    assert slow.nodes
    assert b"result_output" not in slow.nodes


class HeldGraph:
    """Observes graphs: calls ``stop`` in the one after ``n_before`` others, and holds that up until ``left`` is set."""

    def __init__(self, stop: Callable[[], object], n_before: int = 0) -> None:
        self.left = threading.Event()
        self.gave_up = False
        self._stop, self._n_before = stop, n_before

    def __call__(self, tensor: int, ask: bool) -> bool:
        if not ask:
            self._stop()
            self.gave_up = not self.left.wait(PATIENT_S)
            return True
        if tensor_name(tensor) != b"embd":  # the first node of a graph
            return False
        self._n_before -= 1
        return self._n_before == -1


@pytest.mark.parametrize("n_before", [0, 3])
def test_who_stops_does_not_wait_for_a_long_operation(mixing_path: Path, n_before: int) -> None:
    flag = threading.Event()
    held = HeldGraph(flag.set, n_before)
    with Engine(mixing_path, replace(SMALL, n_ctx=1024)) as engine, engine.observed(held):
        prompt = engine.tokenize(" w1" * 30)
        last = last_of(engine.generate(prompt, LONG, cancel=flag))
        assert (last.reason, held.gave_up) == ("cancelled", False)
        assert last.timing.prompt_tokens == (len(prompt) if n_before else 0)
        held.left.set()
        assert last_of(engine.generate(prompt, replace(GREEDY, n_predict=4))).reason == "length"


def stopped(call: Callable[[], object]) -> object:
    """What a call gives that is stopped, or what it raises."""
    try:
        return call()
    except (Cancelled, DecodeError) as error:
        return type(error)


STOPPABLE = pytest.mark.parametrize(
    ("call", "outcome"),
    [
        (lambda engine, ids, flag: engine.prefill(ids, cancel=flag), Cancelled),
        (lambda engine, ids, flag: engine.prefill(ids, cancel=flag, every_row=True), Cancelled),
        (lambda engine, ids, flag: engine.evaluate(ids, cancel=flag), None),
        (lambda engine, ids, flag: list(engine.compute_chunks([ids], 0, cancel=flag)), []),
        (lambda engine, ids, flag: engine.logits(ids), DecodeError),
    ],
    ids=["prefill", "every row", "evaluate", "chunks", "logits"],
)


@STOPPABLE
@pytest.mark.parametrize("by_flag", [True, False])
def test_a_call_that_is_stopped_does_not_wait_for_a_long_operation(
    engine: Engine, call: Callable[..., object], outcome: object, by_flag: bool
) -> None:
    flag = threading.Event()
    held = HeldGraph(flag.set if by_flag and outcome is not DecodeError else engine.cancel)  # logits takes no flag
    ids = engine.tokenize(" w1" * 30)
    with engine.observed(held):
        assert stopped(lambda: call(engine, ids, flag)) == outcome
        assert not held.gave_up
        held.left.set()
        assert engine.prefill(ids) == len(ids)
        assert last_of(engine.generate(ids, GREEDY)).reason == "length"


@STOPPABLE
def test_a_call_that_is_stopped_before_its_turn_does_nothing(
    engine: Engine, call: Callable[..., object], outcome: object
) -> None:
    engine.prefill(kept := engine.tokenize(" w2" * 30))
    going_on = threading.Event()
    first = threading.Thread(target=in_cache, args=(engine, lambda _: going_on.wait(PATIENT_S)))
    first.start()
    flag, results = threading.Event(), []
    ids = engine.tokenize(" w1" * 30)
    second = threading.Thread(target=lambda: results.append(stopped(lambda: call(engine, ids, flag))))
    second.start()
    wait_until(lambda: bool(local_engine(engine)._native._jobs))
    flag.set()
    engine.cancel()
    second.join(PATIENT_S)
    going_on.set()
    first.join(PATIENT_S)
    assert results == [outcome]
    assert local_engine(engine)._native.call(lambda: engine.cached_tokens) == tuple(kept)


def test_a_flag_is_noticed_by_whoever_waits(mixing_path: Path) -> None:
    slow = SlowGraph()
    with Engine(mixing_path, replace(SMALL, n_ctx=1024)) as engine, engine.observed(slow):
        events = engine.generate(engine.tokenize(" w1" * 30), LONG, cancel=slow.flag)
        next(events)
        list(engine.generate(engine.tokenize(" w2" * 30), replace(GREEDY, n_predict=1)))
        slow.is_armed = True
        while not slow.started.wait(0.1):  # the answer is computed again, and its reader does something else
            next(events)
        assert engine.prefill(engine.tokenize(" w3" * 30)) > 0
        assert last_of(events).reason == "cancelled"
    assert b"result_output" not in slow.nodes


def test_garbage_that_is_collected_while_an_answer_ends_closes_its_reader(engine: Engine) -> None:
    events = engine.generate(engine.tokenize(" w1"), LONG)
    next(events)
    generation = events.gi_yieldfrom.gi_frame.f_locals["self"]  # type: ignore[attr-defined]
    closed = threading.Event()

    def collect() -> None:
        with generation._lock:  # as the native thread holds it in the end
            generation.close()
        closed.set()

    threading.Thread(target=collect, daemon=True).start()
    assert closed.wait(PATIENT_S)


def test_cancelling_while_room_is_made(mixing_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowGraph()
    with Engine(mixing_path, replace(SMALL, overflow="shift")) as engine, engine.observed(slow):

        def cannot_shift(*_: int) -> bool:
            slow.is_armed = True
            return False

        monkeypatch.setattr(local_engine(engine)._loaded.cache, "drop", cannot_shift)
        assert last_of(engine.generate(engine.tokenize(" w1"), LONG, cancel=slow.flag)).reason == "cancelled"
    assert slow.nodes
    assert b"result_output" not in slow.nodes
