"""What the cache holds after it was shifted, broken off or computed again, and when that can be stopped."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggufmoe import Cancelled, ContextOptions, DecodeError, Engine, EngineError
from ggufmoe.native.graph_tensors import tensor_name, tensor_shape
from ggufmoe.native.log import NativeLog
from ggufmoe.native.spinning import SpinLimit
from ggufmoe.runtime.kvcache import KVCache, SavedState, SavedStates, _CacheCheckpoint
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


# ---- copies


def saved_state(text: int, n_bytes: int, *checkpoint_bytes: int) -> SavedState:
    points = [_CacheCheckpoint(n, np.empty(size, np.uint8)) for n, size in enumerate(checkpoint_bytes)]
    return SavedState((text,), np.empty(n_bytes, np.uint8), checkpoints=tuple(points))


def test_a_copy_that_is_larger_than_all_may_be_leaves_the_others() -> None:
    saved = SavedStates(100)
    for text in (1, 2, 3):
        saved.add(saved_state(text, 20))
    saved.add(saved_state(4, 60, *[10] * 8))
    assert saved.n_bytes == 60
    saved.add(saved_state(5, 60))
    assert saved.n_bytes == 100, "the oldest has gone"


class WindowedLlama:
    """llama.cpp as far as copies of a cache of one windowed layer go; the state has one byte for each position."""

    def __init__(self, window: int, *, is_chunked: bool) -> None:
        self._window, self._is_chunked = window, is_chunked
        self.positions: list[int] = []

    def _written(self) -> bytes:
        """As ``is_masked_swa`` of llama-hparams.h judges by the newest position."""
        newest = max(self.positions)
        begin = newest // self._window * self._window if self._is_chunked else newest - self._window + 1
        return bytes(position for position in self.positions if position >= begin)

    def llama_state_seq_get_size(self, *_: object) -> int:
        return len(self._written())

    def llama_state_seq_get_data(self, _context: object, room: Any, size: int, _sequence: int) -> int:
        ctypes.memmove(room, self._written(), size)
        return size

    def llama_state_seq_set_data(self, _context: object, data: Any, size: int, _sequence: int) -> int:
        self.positions = list(ctypes.string_at(data, size))
        return size

    def llama_memory_seq_rm(self, _memory: object, _sequence: int, begin: int, _end: int) -> bool:
        self.positions = [position for position in self.positions if position < begin]
        return True

    def llama_memory_clear(self, *_: object) -> None:
        self.positions = []

    def llama_memory_seq_pos_min(self, *_: object) -> int:
        return min(self.positions, default=-1)

    def llama_memory_seq_pos_max(self, *_: object) -> int:
        return max(self.positions, default=-1)

    def __getattr__(self, name: str) -> Callable[..., int]:
        assert name in ("llama_get_memory", "llama_n_ctx_seq", "llama_n_batch", "llama_n_ubatch", "llama_batch_get_one")
        return lambda *_: 64


@pytest.mark.parametrize(("is_chunked", "first", "n_back"), [(True, 16, 0), (True, 16, 2), (False, 14, 0)])
def test_a_copy_knows_which_tokens_windowed_layers_hold(is_chunked: bool, first: int, n_back: int) -> None:
    api = WindowedLlama(8, is_chunked=is_chunked)
    flag, log = ctypes.create_string_buffer(2), NativeLog()
    kv = KVCache(
        api,
        None,
        n_vocab=1,
        log=log,
        path=Path("a.gguf"),
        saved=SavedStates(100),
        abort_flag=flag,
        computed_by="cpu",
        spin_limit=SpinLimit(),
        window=8,
        is_chunked=is_chunked,
    )
    kv.tokens, api.positions = list(range(22)), list(range(22))
    state = kv.state()
    kv.restore(state)
    assert state.first == min(api.positions) == first
    assert kv.reuse([*range(21 - n_back), 99]) == 21 - n_back
    api.positions, kv.tokens = list(range(8, 22)), list(range(22))
    assert kv.reuse([*range(12), 99]) == (12 if is_chunked else 0), "the tokens before the chunk are not needed"


# ---- what can be stopped


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


def test_logits_whose_beginning_is_not_computed_again_are_not_given(
    mixing_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(mixing_path, replace(SMALL, n_batch=8)) as engine:
        ids = engine.tokenize(" w1" * 20)
        parts = engine.logits_by_batch(ids)
        next(parts)
        engine.prefill(engine.tokenize(" w2"))
        monkeypatch.setattr(local_engine(engine)._loaded.cache, "compute", lambda tokens: False)  # as after an abort
        with pytest.raises(DecodeError, match="cancelled"):
            next(parts)


@pytest.mark.parametrize("computed_by", ["gpu", "worker"])
def test_logits_are_not_computed_once_aborted(mixing_path: Path, computed_by: str) -> None:
    with Engine(mixing_path, SMALL) as engine:

        def aborted(kv: KVCache) -> tuple[bool, int]:
            kv._computed_by = computed_by  # type: ignore[assignment]
            kv._abort_flag[0] = b"\x01"
            before = kv.n_returned
            return kv.compute_all_logits([1, 2]), kv.n_returned - before

        assert in_cache(engine, aborted) == (False, 0)
