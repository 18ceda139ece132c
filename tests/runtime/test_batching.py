"""Several answers in one batch: the same texts as alone, and what each answer was promised holds beside others."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ggufmoe import ContextFullError, ContextOptions, DecodeError, Engine, EngineError, OptionError, SamplingOptions
from ggufmoe.gguf import layer_memory
from ggufmoe.options import AUTO_PARALLEL, ChatContextOptions, ServeContextOptions
from ggufmoe.runtime import batching
from ggufmoe.runtime.events import Event, Finished, Token
from ggufmoe.runtime.generation import Generation
from ggufmoe.runtime.kvcache import KVCache, SavedState, common_prefix
from ggufmoe.runtime.nativethread import Cancellation, NativeThread, SharedCancellation
from ggufmoe.runtime.sampling import Sampler
from ggufmoe.runtime.slots import Slots, TextPart
from tests.engines import local_engine
from tests.runtime.test_engine import CountingFlag, last_of, text_of
from tests.runtime.test_threads import is_refused, status_of_fork

GREEDY = SamplingOptions(temperature=0.0, logit_bias=("2-inf",))
"""The likeliest tokens; </s> ends no answer."""
FORTY = replace(GREEDY, n_predict=40)
FOR_EVER = replace(GREEDY, n_predict=-1)
EXACT: dict[str, Any] = {"cache_type_k": "f32", "cache_type_v": "f32", "flash_attn": "off"}
"""Flash attention sums in the order of the cells, which is another one after cells were freed and used again, and
rounding to 16 bits makes such last bits large enough to change a likeliest token."""
FOUR = ContextOptions(n_ctx=1024, n_threads=1, n_parallel=4, **EXACT)
ALONE = replace(FOUR, n_parallel=1)


def words(n: int, step: int = 1) -> list[int]:
    """A prompt of BOS and ``n`` words of the mixing model, whose ids begin at 259."""
    return [1, *(259 + (i * step + i // 7) % 30 for i in range(n))]


PROMPTS = [words(n, step) for step, n in enumerate((3, 40, 17, 90, 5, 60, 2, 33), 1)]


@pytest.fixture(scope="module")
def alone(mixing_path: Path) -> Iterator[Engine]:
    with Engine(mixing_path, ALONE) as engine:
        yield engine


@pytest.fixture
def engine(mixing_path: Path) -> Iterator[Engine]:
    with Engine(mixing_path, FOUR) as engine:
        yield engine


def answers(engine: Engine, prompts: Sequence[Sequence[int]], settings: SamplingOptions = FORTY) -> list[list[Event]]:
    """The events of all answers, asked for at the same time and in this order."""
    with stopped(engine), ThreadPoolExecutor(len(prompts)) as pool:
        asked = []
        for number, prompt in enumerate(prompts, 1):
            asked.append(pool.submit(lambda events: list(events), engine.generate(prompt, settings)))
            while len(scheduler_of(engine)._waiting) < number:
                threading.Event().wait(0.001)
        release(engine)
        return [one.result() for one in asked]


def scheduler_of(engine: Engine) -> Any:
    return local_engine(engine)._scheduler


@contextmanager
def stopped(engine: Engine) -> Iterator[None]:
    """Keep the native thread busy until ``release``."""
    gate, begun = threading.Event(), threading.Event()
    engine.__dict__["gate"] = gate

    def hold() -> None:
        begun.set()
        gate.wait()

    holding = threading.Thread(target=local_engine(engine)._native.call, args=(hold,))
    holding.start()
    begun.wait()
    try:
        yield
    finally:
        gate.set()
        holding.join()


def release(engine: Engine) -> None:
    engine.__dict__["gate"].set()


def texts(found: Sequence[Sequence[Event]]) -> list[list[int]]:
    return [[event.token_id for event in events if isinstance(event, Token)] for events in found]


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[int]]]:
    """The number of tokens that each text has in each batch."""
    batches: list[list[int]] = []
    decode = Slots.decode

    def record(slots: Slots, parts: Sequence[TextPart]) -> int:
        batches.append([len(part.tokens) for part in parts])
        return decode(slots, parts)

    with monkeypatch.context() as patch:
        patch.setattr(Slots, "decode", record)
        yield batches


# ---- the same texts


@pytest.mark.parametrize("n_parallel", [2, 8])
def test_answers_are_the_same_alone_and_beside_seven_others(
    mixing_path: Path, alone: Engine, n_parallel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [list(alone.generate(prompt, FORTY)) for prompt in PROMPTS]
    with Engine(mixing_path, replace(FOUR, n_parallel=n_parallel)) as engine, recorded(monkeypatch) as batches:
        found = answers(engine, PROMPTS)
    assert texts(found) == texts(expected)
    assert max(map(len, batches)) == n_parallel
    ends = [events[-1] for events in found]
    assert [end.reason for end in ends if isinstance(end, Finished)] == ["length"] * 8
    counts = [(end.timing.prompt_tokens, end.timing.generated_tokens) for end in ends if isinstance(end, Finished)]
    assert counts == [(len(prompt), 40) for prompt in PROMPTS]


def test_tasks_get_the_same_answers_as_threads(
    mixing_path: Path, alone: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def read(engine: Engine, prompt: Sequence[int]) -> list[Event]:
        return [event async for event in engine.generate_async(prompt, FORTY)]

    async def read_all(engine: Engine) -> list[list[Event]]:
        with stopped(engine):
            tasks = [asyncio.create_task(read(engine, prompt)) for prompt in PROMPTS]
            while len(scheduler_of(engine)._waiting) < len(PROMPTS):
                await asyncio.sleep(0.001)
            release(engine)
        return [await task for task in tasks]

    with Engine(mixing_path, replace(FOUR, n_parallel=8)) as engine, recorded(monkeypatch) as batches:
        found = asyncio.run(read_all(engine))
    assert texts(found) == texts([list(alone.generate(prompt, FORTY)) for prompt in PROMPTS])
    assert max(map(len, batches)) == 8


def test_a_seed_logprobs_and_a_grammar_are_those_of_each_answer(engine: Engine, alone: Engine) -> None:
    settings = [
        replace(FORTY, temperature=1.0, seed=5, logprobs=2, logit_bias=()),
        replace(FORTY, grammar='root ::= " w1" " w2" root', logprobs=0),
        SamplingOptions(temperature=0.0, n_predict=9, logprobs=1),
        replace(FORTY, repeat_penalty=1.5),
    ]
    prompts = PROMPTS[: len(settings)]
    expected = [list(alone.generate(*pair)) for pair in zip(prompts, settings, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda pair: list(engine.generate(*pair)), zip(prompts, settings, strict=True)))
    assert texts(found) == texts(expected)
    for ours, theirs in zip(itertools.chain(*found), itertools.chain(*expected), strict=True):
        if isinstance(ours, Token) and isinstance(theirs, Token):
            # ggml sums other numbers of rows in another order, and attention sums in 16 bits
            assert ours.logprob == pytest.approx(theirs.logprob, abs=0.1)
            assert [token for token, _ in ours.alternatives[:1]] == [token for token, _ in theirs.alternatives[:1]]


def test_a_stop_string_ends_one_answer_only(engine: Engine, alone: Engine) -> None:
    whole = text_of(alone.generate(PROMPTS[0], FORTY))
    stop = whole[20:30]
    beside = engine.generate(PROMPTS[1], FORTY)
    next(beside)
    assert text_of(engine.generate(PROMPTS[0], FORTY, stop=stop)) == whole[: whole.index(stop)]
    assert len(list(beside)) == 40


# ---- who is computed when


def test_a_long_prompt_stops_no_stream(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with recorded(monkeypatch) as batches, ThreadPoolExecutor(1) as pool:
        stream = engine.generate(PROMPTS[0], replace(GREEDY, n_predict=300))
        next(stream)
        reading = pool.submit(lambda: len(list(stream)))
        assert len(list(engine.generate(words(700, 5), replace(GREEDY, n_predict=1)))) == 2
        assert reading.result() == 300
    with_prompt = [batch for batch in batches if max(batch) > 1 and batch[0] == 1]
    assert len(with_prompt) > 1, "the prompt came in parts, each beside a token of the stream"
    assert all(sum(batch) <= 512 for batch in batches)


def test_who_asked_first_is_served_first(mixing_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    placed: list[int] = []
    place = Slots.place

    def record(slots: Slots, owner: object, ticket: int, text: Sequence[int]) -> Any:
        placed.append(len(text))
        return place(slots, owner, ticket, text)

    monkeypatch.setattr(Slots, "place", record)
    with Engine(mixing_path, replace(FOUR, n_parallel=2)) as engine:
        answers(engine, PROMPTS, replace(GREEDY, n_predict=5))
    assert placed == [len(prompt) for prompt in PROMPTS]


def test_streams_that_nobody_reads_hold_up_nobody(engine: Engine, alone: Engine) -> None:
    forgotten = [engine.generate(prompt, FOR_EVER) for prompt in PROMPTS[:5]]
    for stream in forgotten:
        next(stream)
    expected = text_of(alone.generate(PROMPTS[5], FORTY))
    assert [text_of(engine.generate(PROMPTS[5], FORTY)) for _ in range(2)] == [expected] * 2
    longer = texts([list(itertools.islice(forgotten[0], 99))])
    assert longer == texts([list(itertools.islice(alone.generate(PROMPTS[0], FOR_EVER), 1, 100))])


def test_streams_read_in_turn_in_one_thread(mixing_path: Path, alone: Engine) -> None:
    with Engine(mixing_path, replace(FOUR, n_parallel=2)) as engine:
        streams = [engine.generate(prompt, replace(GREEDY, n_predict=70)) for prompt in PROMPTS[:3]]
        found = list(zip(*streams, strict=True))
    expected = [list(alone.generate(prompt, replace(GREEDY, n_predict=70))) for prompt in PROMPTS[:3]]
    assert texts(list(zip(*found, strict=True))) == texts(expected)


# ---- turns: what is computed step by step, whatever the threads do


class Steps:
    """Computes the steps of an engine one by one, when the test asks for them, and reads answers in between."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.local = local_engine(engine)
        self.scheduler = scheduler_of(engine)
        self.jobs: list[Any] = []
        self.submit = self.local._native.submit
        monkeypatch.setattr(self.local._native, "submit", self._submit)
        # so each step is a job of its own
        monkeypatch.setattr(NativeThread, "has_waiting_jobs", True)

    def _submit(self, job: Any) -> None:
        if isinstance(job, batching._Step):
            self.jobs.append(job)
        else:
            self.submit(job)

    def ask(self, prompt: Sequence[int], settings: SamplingOptions) -> Asked:
        asked: list[Generation] = []
        init = Generation.__init__

        def remember(generation: Generation, *given: Any, **named: Any) -> None:
            init(generation, *given, **named)
            asked.append(generation)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Generation, "__init__", remember)
            events = self.local.generate(prompt, settings)
            patch.setattr(Generation, "read", lambda generation: iter(()))
            assert list(events) == []
        return Asked(asked[0])

    def run(self) -> bool:
        """Compute a step; false if there is nothing to compute."""
        if not self.jobs:
            return False
        job = self.jobs.pop()
        self.local._native.call(job.run)
        return True


class Asked:
    """An answer, and its reader, which reads when the test says so."""

    def __init__(self, generation: Generation) -> None:
        self.generation = generation
        self.events: list[Event] = []
        self.n_suspended = 0
        """How many steps ago the answer was suspended."""
        self.read()

    @property
    def has_ended(self) -> bool:
        return self.generation._state == "ended"

    @property
    def token_ids(self) -> list[int]:
        return [event.token_id for event in self.events if isinstance(event, Token)]

    def read(self) -> None:
        """Read all that is there, and ask for more."""
        self.events += self.generation._inbox.take()
        if self.generation._state == "idle":
            self.generation._state = "queued"
            self.generation._submit(self.generation)

    def read_late(self, n_steps: int) -> None:
        """Read only after the answer has been suspended for ``n_steps``."""
        self.n_suspended += 1 if self.generation._state == "idle" else -self.n_suspended
        if self.n_suspended >= n_steps or self.has_ended:
            self.read()


SMALL_STEPS = replace(FOUR, n_batch=32, n_ubatch=32, cache_ram=0)


@pytest.mark.parametrize(("n_parallel", "n_ctx"), [(2, 2048), (3, 512)], ids=["slots", "cells"])
def test_answers_that_come_back_do_not_starve_a_newer_one(
    mixing_path: Path, monkeypatch: pytest.MonkeyPatch, n_parallel: int, n_ctx: int
) -> None:
    options = replace(SMALL_STEPS, n_parallel=n_parallel, n_ctx=n_ctx, overflow="shift")
    with Engine(mixing_path, options) as engine:
        steps = Steps(engine, monkeypatch)
        older = [steps.ask(words(100, step), FOR_EVER) for step in (1, 2)]
        newer = steps.ask(words(300, 3), FORTY)
        for _ in range(1000):
            if newer.has_ended:
                break
            for asked in older:
                asked.read_late(2)
            newer.read()
            steps.run()
        newer.read()
        assert len(newer.token_ids) == 40
        assert all(len(asked.token_ids) > 40 for asked in older)


def test_an_answer_that_comes_back_does_not_wait_for_a_long_prompt_that_is_kept(
    mixing_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(SMALL_STEPS, n_parallel=2, n_ctx=4096, cache_ram=64)
    with Engine(mixing_path, options) as engine, recorded(monkeypatch) as batches:
        steps = Steps(engine, monkeypatch)
        older = [steps.ask(words(100, step), FOR_EVER) for step in (1, 2)]
        newer = steps.ask(words(300, 3), replace(GREEDY, n_predict=5))
        for _ in range(1000):
            for asked in older:
                is_back = asked.n_suspended == 2
                asked.read_late(2)
                if is_back:
                    steps.run()
                    assert asked.generation in steps.scheduler._active
            newer.read()
            if newer.has_ended:
                break
            steps.run()
        newer.read()
    assert len(newer.token_ids) == 5
    computed = sum(n for batch in batches for n in batch if n > 1)
    assert computed < 101 + 101 + 301 + 32, "nothing was computed again"


@pytest.mark.parametrize("overflow", ["error", "shift"])
def test_slow_readers_of_more_answers_than_there_are_slots_get_them_all(
    mixing_path: Path, monkeypatch: pytest.MonkeyPatch, overflow: Any
) -> None:
    long = replace(GREEDY, n_predict=70)
    prompts = [words(n, step) for step, n in enumerate((60, 130, 90, 20, 150, 40), 1)]
    options = replace(SMALL_STEPS, n_parallel=3, n_ctx=256, overflow=overflow)
    with Engine(mixing_path, replace(options, n_parallel=1)) as alone:
        expected = [list(alone.generate(prompt, long)) for prompt in prompts]
    with Engine(mixing_path, options) as engine:
        steps = Steps(engine, monkeypatch)
        asked = [steps.ask(prompt, long) for prompt in prompts]
        for _ in range(3000):
            for number, one in enumerate(asked):
                one.read_late(number % 4)
            if not steps.run() and all(one.has_ended for one in asked):
                break
        for one in asked:
            one.read()
    assert [one.token_ids for one in asked] == texts(expected)


def test_a_prompt_that_gave_way_counts_as_far_as_it_was_computed(
    mixing_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Engine(mixing_path, replace(SMALL_STEPS, n_parallel=2, n_ctx=256)) as engine:
        steps = Steps(engine, monkeypatch)
        first, second = steps.ask(words(120), FOR_EVER), steps.ask(words(200, 3), FORTY)
        while not steps.scheduler._lacks_cells:
            first.read()
            assert steps.run()
        assert second.generation._state == "queued"
        steps.local._native.abort(second.generation.cancellation)
        end = second.generation._cancelled()
    assert end.reason == "cancelled"
    assert end.timing.cached_tokens == 0
    assert 0 < end.timing.prompt_tokens < 200


# ---- the cells


def test_idle_texts_leave_the_cells_and_come_back(engine: Engine) -> None:
    prompts = [words(150, step) for step in (1, 2, 3)]
    for prompt in prompts:
        last_of(engine.generate(prompt, FORTY))
    caches = local_engine(engine)._loaded.slots.caches
    assert sum(len(cache.tokens) for cache in caches) <= 256, "attention passes over all cells that are in use"
    again = last_of(engine.generate([*prompts[0], 260], FORTY))
    assert again.timing.cached_tokens >= len(prompts[0])


def test_a_common_beginning_is_computed_once(engine: Engine, alone: Engine) -> None:
    common = words(100)
    prompts = [[*common, *end] for end in (words(5, 2)[1:], words(9, 3)[1:], words(3, 4)[1:])]
    first = engine.generate(prompts[0], FOR_EVER)
    next(first)
    others = [list(engine.generate(prompt, FORTY)) for prompt in prompts[1:]]
    assert texts(others) == texts([list(alone.generate(prompt, FORTY)) for prompt in prompts[1:]])
    n_common = [common_prefix(prompts[0], prompt) for prompt in prompts[1:]]
    assert [end.timing.cached_tokens for *_, end in others if isinstance(end, Finished)] == n_common
    assert min(n_common) > 100
    again = last_of(engine.generate([*prompts[1], 260], FORTY))
    assert again.timing.cached_tokens == len(prompts[1]), "the text of another answer is where it was"


def test_a_beginning_of_prompts_that_come_together_is_computed_once(
    engine: Engine, alone: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = words(600)
    prompts = [common, [*common, 260, 261], common, [*common[:400], *words(90, 3)]]
    with recorded(monkeypatch) as batches:
        found = answers(engine, prompts)
    assert texts(found) == texts([list(alone.generate(prompt, FORTY)) for prompt in prompts])
    ends = [events[-1] for events in found]
    n_shared = common_prefix(prompts[3], common)
    timings = [end.timing for end in ends if isinstance(end, Finished)]
    assert [timing.cached_tokens for timing in timings] == [0, 601, 600, n_shared]
    assert [timing.prompt_tokens for timing in timings] == [len(prompt) for prompt in prompts]
    # each prompt has its own end, and each answer 39 tokens that are computed
    assert sum(map(sum, batches)) == 601 + 2 + 1 + len(prompts[3]) - n_shared + 4 * 39


@pytest.mark.parametrize("cache_ram", [0, 64])
def test_answers_that_need_more_cells_than_there_are_wait(mixing_path: Path, alone: Engine, cache_ram: int) -> None:
    prompts = [words(120, step) for step in (1, 2, 3)]
    long = replace(GREEDY, n_predict=60)
    with Engine(mixing_path, replace(FOUR, n_ctx=256, cache_ram=cache_ram)) as engine:
        found = answers(engine, prompts, long)
        assert texts(found) == texts([list(alone.generate(prompt, long)) for prompt in prompts])
        ends = [events[-1] for events in found]
        timings = [end.timing for end in ends if isinstance(end, Finished)]
        assert [timing.prompt_tokens for timing in timings] == [121] * 3
        assert [timing.evaluated_tokens for timing in timings] == [59] * 3, "what was computed again counts once"
        with pytest.raises(ContextFullError):
            engine.generate(words(256), long)


def test_without_memory_for_copies_texts_are_computed_again(
    mixing_path: Path, alone: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_memory(cache: KVCache) -> SavedState:
        raise MemoryError("no memory today")

    monkeypatch.setattr(KVCache, "state", no_memory)
    prompts = [words(120, step) for step in (1, 2, 3)]
    long = replace(GREEDY, n_predict=60)
    with Engine(mixing_path, replace(FOUR, n_ctx=256)) as engine:
        found = answers(engine, prompts, long)
    assert texts(found) == texts([list(alone.generate(prompt, long)) for prompt in prompts])
    assert "no memory today" in caplog.text


def test_a_shift_takes_cells_of_no_text_that_does_not_share_them(engine: Engine) -> None:
    slots = local_engine(engine)._loaded.slots

    def shift() -> list[list[int]]:
        a, b, c, d = (slot.cache for slot in slots._slots)
        a.compute(words(60))
        b.copy_beginning(a, 40)
        c.compute(words(50, 3))
        d.copy_beginning(c, 30)
        d.compute(words(9, 5))
        assert slots._shared.has_room(1024 - 61 - 51 - 10)
        assert not slots._shared.has_room(1024 - 61 - 51 - 9)
        assert a.drop(10, 15)
        found = [list(cache.tokens) for cache in (a, b, c, d)]
        # from token 10 on, the beginning of b is no longer that of a
        assert slots._shared.has_room(1024 - 46 - 15 - 51 - 10)
        assert not slots._shared.has_room(1024 - 46 - 15 - 51 - 9)
        assert b.compute([7])
        return found

    shifted, cut, *others = local_engine(engine)._native.call(shift)
    assert shifted == [*words(60)[:10], *words(60)[25:]]
    assert cut == words(60)[:25]
    assert others == [words(50, 3), [*words(50, 3)[:30], *words(9, 5)]]


def test_texts_that_are_set_aside_again_and_again_go_on(mixing_path: Path) -> None:
    prompts = [words(120, step) for step in (1, 2, 3)]
    long = replace(GREEDY, n_predict=100)
    with Engine(mixing_path, ALONE) as engine:
        expected = [list(engine.generate(prompt, long)) for prompt in prompts]
    with Engine(mixing_path, replace(FOUR, n_ctx=256, n_parallel=2)) as engine:
        streams = [engine.generate(prompt, long) for prompt in prompts]
        found = list(zip(*reversed(streams), strict=True))
    assert texts(list(zip(*found, strict=True))) == texts(expected[::-1])


@pytest.mark.parametrize(("overflow", "n_keep"), [("shift", 0), ("shift", 30), ("truncate-middle", 0)])
def test_a_text_may_fill_the_context_beside_others(mixing_path: Path, overflow: Any, n_keep: int) -> None:
    common = words(60)
    prompts = [common, [*common, 270], words(50, 3), words(400, 7)]
    options = replace(FOUR, n_ctx=256, overflow=overflow, n_keep=n_keep)
    long = replace(GREEDY, n_predict=230)
    with Engine(mixing_path, replace(options, n_parallel=1)) as engine:
        expected = []
        for prompt in prompts:
            engine.forget()
            expected.append(list(engine.generate(prompt, long)))
    with Engine(mixing_path, options) as engine:
        assert texts(answers(engine, prompts, long)) == texts(expected)


def test_a_full_context_ends_each_answer_by_itself(mixing_path: Path, alone: Engine) -> None:
    prompts = [words(n, step) for step, n in enumerate((200, 20, 240, 100), 1)]
    with Engine(mixing_path, replace(FOUR, n_ctx=256)) as engine:
        found = answers(engine, prompts, replace(GREEDY, n_predict=100))
    expected = [list(alone.generate(prompt, replace(GREEDY, n_predict=100)))[:-1] for prompt in prompts]
    for prompt, events, whole in zip(prompts, found, texts(expected), strict=True):
        end = events[-1]
        assert isinstance(end, Finished)
        n = min(100, 257 - len(prompt))
        assert (end.reason, texts([events])) == ("length" if n == 100 else "context", [whole[:n]])


# ---- other calls between the steps


def test_other_calls_come_between_and_change_no_answer(mixing_path: Path, tmp_path: Path) -> None:
    with Engine(mixing_path, ALONE) as alone, Engine(mixing_path, FOUR) as engine:
        _check_calls_between(alone, engine, tmp_path)


def _check_calls_between(alone: Engine, engine: Engine, tmp_path: Path) -> None:
    long = replace(GREEDY, n_predict=120)
    streams = [engine.generate(prompt, long) for prompt in PROMPTS[:4]]
    found: list[list[Event]] = [[next(stream)] for stream in streams]
    calls: list[Callable[[], object]] = [
        lambda: engine.prefill(words(30, 9)),
        lambda: engine.logits(words(900, 4)),
        engine.forget,
        lambda: list(engine.compute_chunks([words(20)], 10)),
        lambda: engine.set_context(replace(FOUR, n_ctx=2048)),
    ]
    for call in calls:
        call()
        for events, stream in zip(found, streams, strict=True):
            events += itertools.islice(stream, 20)
    found = [events + list(stream) for events, stream in zip(found, streams, strict=True)]
    assert texts(found) == texts([list(alone.generate(prompt, long)) for prompt in PROMPTS[:4]])
    last_of(engine.generate(PROMPTS[3], FORTY))
    n_kept = engine.save_session(tmp_path / "a.session")
    assert alone.load_session(tmp_path / "a.session")[0] == engine.cached_tokens
    assert n_kept == len(PROMPTS[3]) + 39
    assert engine.load_session(tmp_path / "a.session")[0] == alone.cached_tokens


def test_observers_see_one_answer_after_another(engine: Engine, alone: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with engine.observed(lambda tensor, ask: False), recorded(monkeypatch) as batches:
        found = answers(engine, PROMPTS[:3])
    assert texts(found) == texts([list(alone.generate(prompt, FORTY)) for prompt in PROMPTS[:3]])
    assert {len(batch) for batch in batches} == {1}


# ---- the end of one, and of all


def test_one_that_is_cancelled_leaves_the_others(engine: Engine, alone: Engine) -> None:
    with ThreadPoolExecutor(2) as pool:
        beside = pool.submit(lambda: list(engine.generate(PROMPTS[0], replace(GREEDY, n_predict=150))))
        ends = [last_of(engine.generate(PROMPTS[1], FOR_EVER, cancel=CountingFlag(n))) for n in (1, 5, 60)]
        streams = [engine.generate(prompt, FOR_EVER) for prompt in PROMPTS[2:4]]
        for stream in streams:
            next(stream)
            stream.close()  # type: ignore[attr-defined]
        found = beside.result()
    assert {end.reason for end in ends} == {"cancelled"}
    assert texts([found]) == texts([list(alone.generate(PROMPTS[0], replace(GREEDY, n_predict=150)))])
    assert text_of(engine.generate(PROMPTS[1], FORTY)) == text_of(alone.generate(PROMPTS[1], FORTY))


def test_cancel_ends_all(engine: Engine) -> None:
    streams = [engine.generate(prompt, FOR_EVER) for prompt in PROMPTS]
    for stream in streams:
        next(stream)
    engine.cancel()
    assert {last_of(stream).reason for stream in streams} == {"cancelled"}
    assert len(list(engine.generate(PROMPTS[0], FORTY))) == 41


def test_a_batch_is_aborted_with_the_last_of_its_answers() -> None:
    one, other, stranger = Cancellation(), Cancellation(), Cancellation()
    batch = SharedCancellation()
    assert not batch.is_requested()
    batch.members = (one, other)
    one.aborted = stranger.aborted = True
    assert not batch.stops_with(one)
    assert not batch.is_requested()
    other.aborted = True
    assert batch.stops_with(other)
    assert batch.is_requested()
    assert not batch.stops_with(stranger)


def test_an_answer_that_fails_fails_alone(engine: Engine, alone: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Slots.decode

    def fail(slots: Slots, parts: Sequence[TextPart]) -> int:
        return -3 if any(10 in part.tokens for part in parts) else decode(slots, parts)

    expected = [list(alone.generate(prompt, FORTY)) for prompt in PROMPTS]
    monkeypatch.setattr(Slots, "decode", fail)
    with ThreadPoolExecutor(5) as pool:
        failing = pool.submit(lambda: list(engine.generate([*words(54, 11), 10], FORTY)))
        found = answers(engine, PROMPTS[:4])
        with pytest.raises(DecodeError, match="failed to compute"):
            failing.result()
    assert texts(found) == texts(expected[:4])


def test_an_error_while_a_token_is_drawn_belongs_to_its_answer(
    engine: Engine, alone: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = Sampler.sample

    def fail(sampler: Sampler, cache: KVCache) -> int:
        if 10 in cache.tokens:
            raise MemoryError("no room for this one")
        return sample(sampler, cache)

    expected = [list(alone.generate(prompt, FORTY)) for prompt in PROMPTS[:3]]
    monkeypatch.setattr(Sampler, "sample", fail)
    with ThreadPoolExecutor(5) as pool:
        failing = pool.submit(lambda: list(engine.generate([*words(54, 11), 10, 11], FORTY)))
        assert texts(answers(engine, PROMPTS[:3])) == texts(expected)
        with pytest.raises(MemoryError, match="no room"):
            failing.result()


def test_who_leaves_does_not_wait_for_the_prompt_of_another(
    engine: Engine, alone: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode, flag, begun, goes_on = Slots.decode, threading.Event(), threading.Event(), threading.Event()

    def wait(slots: Slots, parts: Sequence[TextPart]) -> int:
        if len(parts) == 2:
            begun.set()
            goes_on.wait(60)
        return decode(slots, parts)

    monkeypatch.setattr(Slots, "decode", wait)
    with stopped(engine), ThreadPoolExecutor(2) as pool:
        leaving = pool.submit(lambda: last_of(engine.generate(PROMPTS[0], FOR_EVER, cancel=flag)))
        staying = pool.submit(lambda: list(engine.generate(words(300, 3), FORTY)))
        while len(scheduler_of(engine)._waiting) < 2:
            threading.Event().wait(0.001)
        release(engine)
        assert begun.wait(60)
        flag.set()
        assert leaving.result(60).reason == "cancelled"
        assert not staying.done()
        goes_on.set()
        assert texts([staying.result(60)]) == texts([list(alone.generate(words(300, 3), FORTY))])


def test_closing_ends_all_streams_with_an_error(mixing_path: Path) -> None:
    with Engine(mixing_path, FOUR) as engine:
        streams = [engine.generate(prompt, FOR_EVER) for prompt in PROMPTS]
        for stream in streams:
            next(stream)
    for stream in streams:
        with pytest.raises(EngineError, match="has been closed"):
            list(stream)


def test_all_tokens_of_a_batch_are_given_to_llama_cpp(engine: Engine) -> None:
    """A watch over workers allows a batch as much time as its tokens take."""
    given: list[int] = []
    decode = Slots.decode

    def look(slots: Slots, parts: Sequence[TextPart]) -> int:
        status = decode(slots, parts)
        given.append(local_engine(engine).activity.given_tokens - sum(len(part.tokens) for part in parts))
        return status

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Slots, "decode", look)
        answers(engine, PROMPTS[:4], replace(GREEDY, n_predict=5))
    assert set(given) == {0}


def test_each_answer_has_its_own_exception(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    cause = OSError("the cause")

    def fail(slots: Slots) -> None:
        raise DecodeError("nothing goes on") from cause

    streams = [engine.generate(prompt, FOR_EVER) for prompt in PROMPTS[:3]]
    for stream in streams:
        next(stream)
    monkeypatch.setattr(Slots, "drop_chunks", fail)
    errors: list[DecodeError] = []
    for stream in streams:
        with pytest.raises(DecodeError, match="nothing goes on") as raised:
            list(stream)
        errors.append(raised.value)
    assert len({id(error) for error in errors}) == 3
    assert {error.__cause__ for error in errors} == {cause}


# ---- what is refused


def test_a_server_computes_as_many_answers_at_once_as_the_model_allows(
    mixing_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    served = ServeContextOptions(n_ctx=256, n_threads=1)
    with Engine(mixing_path, served) as engine:
        assert len(local_engine(engine)._loaded.slots) == AUTO_PARALLEL == 4
        engine.set_context(replace(served, n_batch=3))
        assert len(local_engine(engine)._loaded.slots) == 3
    assert not caplog.records
    assert ContextOptions().n_parallel == ChatContextOptions().n_parallel == 1
    monkeypatch.setattr(layer_memory, "_OTHER_CACHES", {"llama"})
    with Engine(mixing_path, served) as engine:
        assert len(local_engine(engine)._loaded.slots) == 1
        assert len(list(engine.generate(PROMPTS[0], replace(GREEDY, n_predict=3)))) == 4
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "answers are computed one after another: llama.cpp has a cache of its own" in caplog.text
    with pytest.raises(OptionError, match=r"--parallel 4: llama\.cpp has a cache of its own for this architecture"):
        Engine(mixing_path, FOUR)


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(OptionError, match="n_parallel must be 1 where n_seq_max"):
        ContextOptions(n_parallel=2, n_seq_max=2)
    with pytest.raises(OptionError, match="--parallel 8 needs a --batch-size"):
        ContextOptions(n_parallel=8, n_batch=4)


def test_an_answer_begun_alone_leaves_the_cells_of_those_in_a_batch(engine: Engine, alone: Engine) -> None:
    long = replace(GREEDY, n_predict=100)
    engine.set_context(ALONE)
    first = engine.generate(PROMPTS[3], long)
    next(first)
    engine.set_context(FOUR)
    second = engine.generate(PROMPTS[0], long)
    events = [next(second)]
    assert text_of(first)
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(lambda: events.extend(second))
        try:
            reading.result(60)
        finally:
            engine.cancel()
    assert text_of(iter(events)) == text_of(alone.generate(PROMPTS[0], long))


def test_answers_of_a_batch_go_on_one_after_another(engine: Engine, alone: Engine) -> None:
    streams = [engine.generate(prompt, FORTY) for prompt in PROMPTS[:3]]
    found = [[next(stream)] for stream in streams]
    engine.set_context(ALONE)
    found = [events + list(stream) for events, stream in zip(found, streams, strict=True)]
    assert texts(found) == texts([list(alone.generate(prompt, FORTY)) for prompt in PROMPTS[:3]])


def test_an_engine_that_closes_while_a_step_is_queued_fails_all_who_wait(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = local_engine(engine)._native
    streams = [engine.generate(prompt, FOR_EVER) for prompt in PROMPTS[:2]]
    submit, is_submitted, goes_on = native.submit, threading.Event(), threading.Event()

    def submit_late(job: Any) -> None:
        is_submitted.set()
        goes_on.wait(60)
        submit(job)

    monkeypatch.setattr(native, "submit", submit_late)
    with ThreadPoolExecutor(2) as pool:
        reading = [pool.submit(next, streams[0])]
        is_submitted.wait(60)
        reading.append(pool.submit(next, streams[1]))
        while len(scheduler_of(engine)._waiting) < 2:
            threading.Event().wait(0.001)
        native.close()
        goes_on.set()
        for one in reading:
            with pytest.raises(EngineError, match="closed"):
                one.result(60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("context", [ALONE, FOUR], ids=["alone", "batched"])
def test_a_forked_process_is_told_and_does_not_wait(context: ContextOptions, mixing_path: Path) -> None:
    with Engine(mixing_path, context) as engine:
        stream = engine.generate(PROMPTS[0], FOR_EVER)
        next(stream)
        with stopped(engine):
            # the child reads what is computed already, however much that is; behind it, nobody computes
            status = status_of_fork([], lambda: is_refused(lambda: list(stream)))
            release(engine)
    assert status == 0


def test_a_short_text_is_copied_ahead_once_and_stays(mixing_path: Path) -> None:
    with Engine(mixing_path, FOUR) as engine:
        local = local_engine(engine)
        list(engine.generate(words(30, 1), replace(GREEDY, n_predict=8)))
        slots = local._loaded.slots

        def held_and_copied() -> tuple[list[int], list[tuple[int, ...]]]:
            slots.copy_ahead()
            slots.copy_ahead()
            return list(slots.latest.tokens), [state.tokens for state in slots.latest.saved]

        held, copied = local._native.call(held_and_copied)
        assert len(held) >= 30
        assert copied == [tuple(held)]
        again = list(engine.generate([*held, 3], replace(GREEDY, n_predict=1)))[-1]
        assert isinstance(again, Finished)
        assert again.timing.cached_tokens == len(held)
        # behind another text it comes from the copy
        list(engine.generate(words(40, 2), replace(GREEDY, n_predict=1)))
        again = list(engine.generate([*held, 3], replace(GREEDY, n_predict=1)))[-1]
        assert isinstance(again, Finished)
        assert again.timing.cached_tokens == len(held)
