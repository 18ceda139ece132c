"""Many callers, streams and engines at once; stopping at any moment; and the end."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from ggufmoe import Cancelled, ContextOptions, Engine, EngineError, SamplingOptions
from ggufmoe.errors import InputError
from ggufmoe.runtime.events import Event, Finished, Token
from ggufmoe.runtime.nativethread import Cancellation, NativeThread
from ggufmoe.work import Progress
from tests.engines import local_engine
from tests.runtime.test_engine import CountingFlag, last_of, text_of
from tests.stories import GREEDY, ONE_THREAD

SHORT = replace(GREEDY, n_predict=6)


@pytest.fixture(scope="module")
def mixing(mixing_path: Path) -> Iterator[Engine]:
    with Engine(mixing_path, ONE_THREAD) as engine:
        yield engine


# ---- several callers


def test_eight_threads_get_the_answers_that_one_gets(mixing: Engine) -> None:
    prompts = [mixing.tokenize(f" w{i % 5} w{i % 7} w{i % 3}") for i in range(100)]

    def answer(prompt: list[int]) -> str:
        return text_of(mixing.generate(prompt, SHORT))

    one_by_one = [answer(prompt) for prompt in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(answer, prompts)) == one_by_one


def test_two_streams_read_token_by_token_in_one_thread(mixing: Engine) -> None:
    long = replace(GREEDY, n_predict=150)
    prompts = [mixing.tokenize(" w1 w2 w3"), mixing.tokenize(" w9 w8")]
    alone = [list(mixing.generate(prompt, long))[:-1] for prompt in prompts]
    one, other = (mixing.generate(prompt, long) for prompt in prompts)
    both = list(zip(one, other, strict=True))[:-1]
    assert [[event for event, _ in both], [event for _, event in both]] == alone


def test_a_stream_that_nobody_reads_holds_up_nobody(story: Engine) -> None:
    forgotten = story.generate(story.tokenize(" on"), replace(GREEDY, n_predict=-1))
    next(forgotten)
    for _ in range(3):
        assert text_of(story.generate(story.tokenize(" once"), GREEDY)) == " upon a time"
    del forgotten


def test_a_stream_may_be_read_in_another_thread(story: Engine) -> None:
    events = story.generate(story.tokenize(" once"), GREEDY)
    next(events)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: text_of(events)).result() == " a time"


def test_tokenizing_does_not_wait_for_a_prompt(story_path: Path) -> None:
    with Engine(story_path, ContextOptions(n_ctx=16384, n_batch=16384, n_threads=1)) as engine:
        prompt = engine.tokenize(" once" * 16000)
        events = engine.generate(prompt, GREEDY)
        reader = threading.Thread(target=lambda: list(events), daemon=True)
        reader.start()
        assert engine.tokenize(" once", add_bos=False) == [prompt[-1]]
        assert reader.is_alive()
        engine.cancel()
        reader.join(60)
        assert not reader.is_alive()


def test_two_engines_at_once(story_path: Path, mixing: Engine) -> None:
    prompt = mixing.tokenize(" w1 w2")
    expected = text_of(mixing.generate(prompt, SHORT))
    with Engine(story_path, ONE_THREAD) as other, ThreadPoolExecutor(2) as pool:
        asked = other.tokenize(" once")
        mine = [pool.submit(lambda: text_of(mixing.generate(prompt, SHORT))) for _ in range(20)]
        theirs = [pool.submit(lambda: text_of(other.generate(asked, GREEDY))) for _ in range(20)]
        assert {future.result() for future in mine} == {expected}
        assert {future.result() for future in theirs} == {" upon a time"}


def test_an_engine_is_not_used_from_inside_its_own_callbacks(story: Engine) -> None:
    failures: list[str] = []

    def look(token: Token) -> Token:
        for use in (story.forget, lambda: list(story.generate([1], GREEDY))):
            try:
                use()
            except EngineError as error:
                failures.append(str(error))
        return token

    with story.observed(lambda *_: False, on_token=look):
        list(story.generate(story.tokenize(" cut"), GREEDY))
    assert len(failures) == 2
    assert all("inside its own callbacks" in failure for failure in failures)


def test_events_and_options_can_be_pickled(story: Engine) -> None:
    events = list(story.generate(story.tokenize(" once"), replace(GREEDY, logprobs=2)))
    assert pickle.loads(pickle.dumps(events)) == events


# ---- async


def test_the_async_twin_gives_the_same_events(story: Engine) -> None:
    async def read() -> list[Event]:
        return [event async for event in story.generate_async(story.tokenize(" on"), GREEDY)]

    expected = list(story.generate(story.tokenize(" on"), GREEDY))
    assert asyncio.run(read())[:-1] == expected[:-1]


def test_errors_come_through_the_async_twin(story: Engine) -> None:
    async def read() -> None:
        async for _ in story.generate_async([]):
            pass

    with pytest.raises(InputError, match="the prompt is empty"):
        asyncio.run(read())


def test_a_cancelled_task_frees_the_engine(story: Engine) -> None:
    async def read() -> None:
        async for _ in story.generate_async(story.tokenize(" on"), replace(GREEDY, n_predict=-1)):
            await asyncio.sleep(3600)

    async def leave() -> None:
        task = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(leave())
    assert text_of(story.generate(story.tokenize(" once"), GREEDY)) == " upon a time"


# ---- stopping


def test_progress_of_loading(story_path: Path) -> None:
    reports: list[Progress] = []
    Engine(story_path, ONE_THREAD, on_progress=reports.append).close()
    parts = [report.done for report in reports]
    assert parts == sorted(parts)
    assert reports[-1] == Progress("load", 1.0, 1.0, "parts", story_path.name)


@pytest.mark.parametrize("n_questions", [0, 1, 2, 3])
def test_loading_stops_when_the_flag_is_set(story_path: Path, n_questions: int) -> None:
    with pytest.raises(Cancelled, match="loading was stopped"):
        Engine(story_path, ONE_THREAD, cancel=CountingFlag(n_questions))


def test_what_on_progress_raises_ends_the_loading(story_path: Path) -> None:
    def fail(progress: Progress) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Engine(story_path, ONE_THREAD, on_progress=fail)


def test_a_flag_that_is_set_while_waiting_for_others(story_path: Path) -> None:
    with Engine(story_path, ContextOptions(n_ctx=16384, n_batch=16384, n_threads=1)) as engine:
        busy = engine.generate(engine.tokenize(" once" * 16000), GREEDY)
        reader = threading.Thread(target=lambda: list(busy), daemon=True)
        reader.start()
        flag = threading.Event()
        threading.Timer(0.05, flag.set).start()
        waiting = engine.generate(engine.tokenize(" once"), GREEDY, cancel=flag)
        last = last_of(waiting)
        engine.cancel()
        reader.join(60)
        assert last.reason in ("cancelled", "stop")  # the long prompt may have ended before
        assert text_of(engine.generate(engine.tokenize(" once"), GREEDY)) == " upon a time"


def test_prefill_can_be_stopped_and_serves_the_next_answer(story: Engine) -> None:
    prompt = story.tokenize(" once upon")
    story.forget()
    with pytest.raises(Cancelled):
        story.prefill(prompt, cancel=CountingFlag(0))
    assert story.prefill(prompt) == 3
    assert story.prefill(prompt) == 1
    assert last_of(story.generate([*prompt, prompt[-1]], GREEDY)).timing.cached_tokens == 3


def test_a_cancelled_answer_does_not_wait_for_a_text_that_is_tokenized(story: Engine) -> None:
    flag, release = threading.Event(), threading.Event()
    with ThreadPoolExecutor(2) as pool:
        busy = pool.submit(local_engine(story)._texts.call, release.wait)
        answer = pool.submit(lambda: last_of(story.generate([1], GREEDY, cancel=flag)))
        flag.set()
        try:
            assert answer.result(20).reason == "cancelled"
            assert not busy.done()
        finally:
            release.set()


@pytest.mark.parametrize(("end", "error"), [(Engine.cancel, Cancelled), (Engine.close, EngineError)])
def test_cancel_and_close_end_tokenizing(
    story_path: Path, end: Callable[[Engine], None], error: type[Exception]
) -> None:
    engine = Engine(story_path, ONE_THREAD)
    texts = local_engine(engine)._texts
    with ThreadPoolExecutor(1) as pool:
        tokenizing = pool.submit(engine.tokenize, "<s>" * 3_000_000, parse_special=True)
        while not texts.is_busy:
            time.sleep(0.01)
        started = time.process_time()
        end(engine)
        with pytest.raises(error):
            tokenizing.result(60)
        engine.close()
    assert time.process_time() - started < 10  # minutes for the whole text


def test_who_uses_the_vocabulary_holds_up_nobody_but_close(story_path: Path) -> None:
    engine = Engine(story_path, ONE_THREAD)
    release, used = threading.Event(), threading.Event()

    def use() -> None:  # as the thread for texts does while llama.cpp tokenizes
        with local_engine(engine)._vocabulary.in_use():
            used.set()
            release.wait()

    with ThreadPoolExecutor(2) as pool:
        using = pool.submit(use)
        try:
            assert used.wait(20)
            drawing = pool.submit(lambda: last_of(engine.generate(engine.tokenize(" once"), GREEDY)).reason)
            assert drawing.result(20) == "stop"
            assert not pool.submit(engine.ends_text, 1).result(20)
            closing = pool.submit(engine.close)
            time.sleep(0.5)
            assert not closing.done()
        finally:
            release.set()
        using.result(20)
        closing.result(20)
    with pytest.raises(EngineError, match="closed"):
        _ = engine.bos_token


# ---- closing


def test_closing_from_another_thread_ends_a_stream(story_path: Path) -> None:
    engine = Engine(story_path, ContextOptions(n_ctx=16384, n_batch=16384, n_threads=1))
    events = engine.generate(engine.tokenize(" once" * 16000), GREEDY)
    closer = threading.Timer(0.05, engine.close)
    closer.start()

    def read_on() -> None:
        while True:  # the prompt may have been computed before
            list(events)
            list(engine.generate(engine.tokenize(" on"), GREEDY))

    with pytest.raises(EngineError, match="closed"):
        read_on()
    closer.join()


def test_an_engine_that_is_dropped_ends_its_thread(story_path: Path) -> None:
    def threads() -> int:
        return sum(thread.name == "ggufmoe-native" for thread in threading.enumerate())

    before = threads()
    engine = Engine(story_path, ONE_THREAD)
    events = engine.generate(engine.tokenize(" on"), GREEDY)
    del engine
    gc.collect()
    assert len([event.text for event in events]) == 257  # a stream keeps its engine
    del events
    gc.collect()
    assert threads() == before


def test_fifty_rounds_of_loading_leave_no_memory_behind(story_path: Path) -> None:
    process = psutil.Process()

    def rounds(n: int) -> int:
        for _ in range(n):
            engine = Engine(story_path, ONE_THREAD)
            next(engine.generate(engine.tokenize(" on"), GREEDY))
            engine.close()
        gc.collect()
        return int(process.memory_info().rss)

    first = rounds(10)
    # the model and its cache take 2 MB in each round; what is freed may stay with the allocator
    assert rounds(40) - first < 24 << 20


@pytest.mark.parametrize("tail", ["", "engine.close()", "del engine"])
def test_the_interpreter_ends_while_an_answer_is_computed(story_path: Path, tail: str) -> None:
    code = (
        "import sys; from ggufmoe import Engine, ContextOptions, SamplingOptions\n"
        f"engine = Engine({str(story_path)!r}, ContextOptions(n_threads=1))\n"
        "events = engine.generate(engine.tokenize(' on'), SamplingOptions(temperature=0, n_predict=-1))\n"
        f"next(events)\n{tail}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


# ---- conversations in turn


def test_conversations_that_take_turns_are_not_computed_again(mixing: Engine) -> None:
    mixing.forget()
    opening = " w1 w2 w3 w4 w5 w6 w7 w8" * 4
    talks = [mixing.tokenize(opening + f" w{i}" * 30) for i in (10, 11, 12)]
    alone = [mixing.logits(talk)[-1].argmax() for talk in talks]
    mixing.forget()
    first = [last_of(mixing.generate(talk, SHORT)).timing.cached_tokens for talk in talks]
    assert first == [0, 33, 33]  # BOS and the opening that they share
    again = [list(mixing.generate(talk, replace(SHORT, n_predict=1))) for talk in talks]
    assert [events[0].token_id for events in again if isinstance(events[0], Token)] == alone
    cached = [events[-1].timing.cached_tokens for events in again if isinstance(events[-1], Finished)]
    assert cached == [len(talk) - 1 for talk in talks]


def test_without_memory_for_them_they_are(mixing_path: Path) -> None:
    with Engine(mixing_path, ContextOptions(n_threads=1, cache_ram=0)) as engine:
        talks = [engine.tokenize(f" w{i}" * 40) for i in (1, 2)]
        cached = [last_of(engine.generate(talk, SHORT)).timing.cached_tokens for talk in (*talks, *talks)]
    assert cached == [0, 1, 1, 1]


# ---- logprobs


def test_logprobs_are_those_of_the_logits(mixing: Engine) -> None:
    prompt = mixing.tokenize(" w1 w2 w3")
    events = list(mixing.generate(prompt, SamplingOptions(seed=3, temperature=1.5, n_predict=5, logprobs=3)))
    tokens = [event for event in events if isinstance(event, Token)]
    logits = mixing.logits([*prompt, *(token.token_id for token in tokens)])[len(prompt) - 1 : -1].astype(np.float64)
    expected = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    assert len(tokens) == 5
    for row, token in zip(expected, tokens, strict=True):
        assert token.logprob == pytest.approx(row[token.token_id], abs=1e-2)
        assert [i for i, _ in token.alternatives] == list(np.argsort(-row, kind="stable")[:3])
        assert [p for _, p in token.alternatives] == pytest.approx(sorted(row)[:-4:-1], abs=1e-2)


def test_the_reader_is_not_far_behind(story: Engine) -> None:
    start = time.perf_counter()
    events = list(story.generate(story.tokenize(" on"), GREEDY))
    assert all(event.elapsed_s <= time.perf_counter() - start for event in events if isinstance(event, Token))


def test_an_interpreter_that_ends_while_tokens_are_drawn(story_path: Path) -> None:
    program = (
        "import contextlib, sys, threading, time\n"
        "from ggufmoe import Engine, EngineError, SamplingOptions\n"
        "def read():\n"
        "    with contextlib.suppress(EngineError):  # it may still hear that the engine has been closed\n"
        "        list(events)\n"
        "engine = Engine(sys.argv[1])\n"
        "events = engine.generate(engine.tokenize(' once'), SamplingOptions(n_predict=-1, grammar='root ::= [^x]*'))\n"
        "threading.Thread(target=read, daemon=True).start()\n"
        "time.sleep(0.05)\n"
    )
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", program, str(story_path)], capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")


def test_threads_that_start_at_once_leave_the_stack_size_of_others_as_it_was() -> None:
    def start_both() -> None:
        native = NativeThread("m.gguf", ctypes.create_string_buffer(1), lambda: None)
        texts = native.companion()
        texts.close()
        native.close()

    before = threading.stack_size(2**20)
    try:
        with ThreadPoolExecutor(4) as pool:
            for _ in range(40):
                for done in [pool.submit(start_both) for _ in range(4)]:
                    done.result()
        assert threading.stack_size(2**20) == 2**20
    finally:
        threading.stack_size(before)


def test_at_the_end_of_the_interpreter_the_newest_thread_is_closed_first() -> None:
    program = (
        "import ctypes\n"
        "from ggufmoe.runtime.nativethread import NativeThread\n"
        "close = NativeThread.close\n"
        "NativeThread.close = lambda thread: (print(thread.name), close(thread))\n"
        "threads = [NativeThread(str(i), ctypes.create_string_buffer(1), lambda: None) for i in range(20)]\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=True)
    assert done.stdout.split() == [str(i) for i in reversed(range(20))]


def test_closing_waits_for_a_computation_though_the_companion_is_lost() -> None:
    native = NativeThread("m.gguf", ctypes.create_string_buffer(1), lambda: None)
    texts = native.companion()
    release, begun = threading.Event(), threading.Event()

    def compute() -> bool:
        begun.set()
        return release.wait()

    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(native.call, compute)
        assert begun.wait(20)
        texts.lose("no such text")
        texts.close()
        closing = pool.submit(native.close)
        time.sleep(0.5)
        is_waiting = not closing.done()
        release.set()
        assert running.result(20)
        closing.result(20)
    assert is_waiting


def status_of_fork(locks: list[Any], use: Callable[[], bool]) -> int:
    """The exit status of a process that is forked while another thread holds ``locks``: 0 if ``use`` is true there."""
    is_held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with ExitStack() as stack:
            for lock in locks:
                stack.enter_context(lock)
            is_held.set()
            release.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    is_held.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, from Python 3.12 on
        pid = os.fork()
    if not pid:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)  # ends a process that waits
        passed = False
        try:
            passed = use()
        finally:
            os._exit(0 if passed else 1)
    try:
        return os.waitpid(pid, 0)[1]
    finally:
        release.set()
        holder.join()


def is_refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except EngineError as error:
        return "forked" in str(error)
    return False


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_forked_while_the_lock_is_held_does_not_wait_for_it() -> None:
    thread = NativeThread("m.gguf", ctypes.create_string_buffer(1), lambda: None)

    def use() -> bool:
        refused = is_refused(lambda: thread.call(lambda: None))
        thread.abort(Cancellation())
        thread.close()
        return refused and thread.closed

    try:
        assert status_of_fork([thread._lock], use) == 0
    finally:
        thread.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_does_not_wait_for_the_locks_of_an_engine(story: Engine) -> None:
    runner, known = local_engine(story), (story.bos_token, story.eos_token, story.adds_bos)

    def use() -> bool:
        story.cancel()
        calls = (lambda: story.ends_text(1), lambda: story.tokenize("a"), lambda: story.prefill([1]))
        return (story.bos_token, story.eos_token, story.adds_bos) == known and all(map(is_refused, calls))

    assert status_of_fork([runner._vocabulary._lock, runner._cancellations_lock], use) == 0
