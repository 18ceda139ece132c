"""What the cache holds after it was shifted, broken off or computed again, and when that can be stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ggufmoe import Cancelled, ContextOptions, DecodeError, Engine, EngineError
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


class Stalled:
    """The next computing of several tokens waits, once ``is_armed``, until its engine has heard of the flag."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.flag = threading.Event()
        self.is_armed = False
        self._engine = engine
        self._compute = local_engine(engine)._loaded.cache.compute
        monkeypatch.setattr(local_engine(engine)._loaded.cache, "compute", self.compute)

    def compute(self, tokens: Sequence[int]) -> bool:
        if not self.is_armed or len(tokens) < 2:
            return self._compute(tokens)
        time.sleep(0.2)  # a reader that still has tokens to read would see the flag by itself
        self.flag.set()
        wait_until(lambda: local_engine(self._engine)._loaded.abort_flag[0] == b"\x01")
        return False


def test_cancelling_while_an_answer_is_computed_again(mixing_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(mixing_path, replace(SMALL, n_ctx=1024)) as engine:
        stalled = Stalled(engine, monkeypatch)
        events = engine.generate(engine.tokenize(" w1" * 30), LONG, cancel=stalled.flag)
        next(events)
        list(engine.generate(engine.tokenize(" w2" * 30), replace(GREEDY, n_predict=1)))
        stalled.is_armed = True
        assert last_of(events).reason == "cancelled"


@pytest.mark.parametrize("n_before", [0, 3])
def test_who_stops_does_not_wait_for_a_long_operation(
    mixing_path: Path, monkeypatch: pytest.MonkeyPatch, n_before: int
) -> None:
    with Engine(mixing_path, replace(SMALL, n_ctx=1024)) as engine:
        compute, flag, left = local_engine(engine)._loaded.cache.compute, threading.Event(), threading.Event()
        calls = 0

        def take_long(tokens: Sequence[int]) -> bool:
            nonlocal calls
            calls += 1
            if calls != 1 + n_before:
                return compute(tokens)
            flag.set()
            assert left.wait(PATIENT_S)
            return compute(tokens)

        monkeypatch.setattr(local_engine(engine)._loaded.cache, "compute", take_long)
        prompt = engine.tokenize(" w1" * 30)
        last = last_of(engine.generate(prompt, LONG, cancel=flag))
        assert (last.reason, left.is_set()) == ("cancelled", False)
        assert last.timing.prompt_tokens == (len(prompt) if n_before else 0)
        left.set()
        assert last_of(engine.generate(prompt, replace(GREEDY, n_predict=4))).reason == "length"


def stopped(call: Callable[[], object]) -> object:
    """What a call gives that is stopped, or what it raises."""
    try:
        return call()
    except (Cancelled, DecodeError) as error:
        return type(error)


STOPPABLE = pytest.mark.parametrize(
    ("method", "call", "outcome"),
    [
        ("compute", lambda engine, ids, flag: engine.prefill(ids, cancel=flag), Cancelled),
        ("compute_all_logits", lambda engine, ids, flag: engine.prefill(ids, cancel=flag, every_row=True), Cancelled),
        ("compute", lambda engine, ids, flag: engine.evaluate(ids, cancel=flag), None),
        ("compute_chunks", lambda engine, ids, flag: list(engine.compute_chunks([ids], 0, cancel=flag)), []),
        ("compute_all_logits", lambda engine, ids, flag: engine.logits(ids), DecodeError),
    ],
    ids=["prefill", "every row", "evaluate", "chunks", "logits"],
)


@STOPPABLE
@pytest.mark.parametrize("by_flag", [True, False])
def test_a_call_that_is_stopped_does_not_wait_for_a_long_operation(
    engine: Engine,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    call: Callable[..., object],
    outcome: object,
    by_flag: bool,
) -> None:
    flag, left = threading.Event(), threading.Event()
    original = getattr(local_engine(engine)._loaded.cache, method)

    def take_long(*arguments: object) -> object:
        if by_flag and outcome is not DecodeError:  # logits takes none
            flag.set()
        else:
            engine.cancel()
        left.wait(PATIENT_S)
        return original(*arguments)

    ids = engine.tokenize(" w1" * 30)
    began = time.monotonic()
    with monkeypatch.context() as patched:
        patched.setattr(local_engine(engine)._loaded.cache, method, take_long)
        assert stopped(lambda: call(engine, ids, flag)) == outcome
        assert time.monotonic() - began < PATIENT_S / 2
    left.set()
    assert engine.prefill(ids) == len(ids)
    assert last_of(engine.generate(ids, GREEDY)).reason == "length"


@STOPPABLE
def test_a_call_that_is_stopped_before_its_turn_does_nothing(
    engine: Engine, method: str, call: Callable[..., object], outcome: object
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


def test_a_flag_is_noticed_by_whoever_waits(mixing_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(mixing_path, replace(SMALL, n_ctx=1024)) as engine:
        flag, started, compute = threading.Event(), threading.Event(), local_engine(engine)._loaded.cache.compute
        events = engine.generate(engine.tokenize(" w1" * 30), LONG, cancel=flag)
        next(events)
        list(engine.generate(engine.tokenize(" w2" * 30), replace(GREEDY, n_predict=1)))

        def compute_again(tokens: Sequence[int]) -> bool:
            if len(tokens) > 1 and not started.is_set():
                flag.set()
                started.set()
                wait_until(lambda: local_engine(engine)._loaded.abort_flag[0] == b"\x01")
            return compute(tokens)

        monkeypatch.setattr(local_engine(engine)._loaded.cache, "compute", compute_again)
        while not started.wait(0.1):  # the answer is computed again, and its reader does something else
            next(events)
        assert engine.prefill(engine.tokenize(" w3" * 30)) > 0
        assert last_of(events).reason == "cancelled"


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
    with Engine(mixing_path, replace(SMALL, overflow="shift")) as engine:
        stalled = Stalled(engine, monkeypatch)

        def cannot_shift(*_: int) -> bool:
            stalled.is_armed = True
            return False

        monkeypatch.setattr(local_engine(engine)._loaded.cache, "drop", cannot_shift)
        assert last_of(engine.generate(engine.tokenize(" w1"), LONG, cancel=stalled.flag)).reason == "cancelled"
