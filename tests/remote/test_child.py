"""An engine on workers: the same answers, placements as planned, and errors instead of aborts and hangs."""

from __future__ import annotations

import _thread
import asyncio
import contextlib
import gc
import inspect
import itertools
import logging
import operator
import os
import pydoc
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

import ggufmoe
from ggufmoe import (
    Cancelled,
    ContextFullError,
    ContextOptions,
    Engine,
    EngineError,
    GGUFError,
    InputError,
    OffloadOptions,
    OptionError,
    RoutedToken,
    RoutingTracer,
    WorkerError,
    WorkerLostError,
    trace_routing,
)
from ggufmoe.gguf.header import read_header
from ggufmoe.remote.child import ChildEngine
from ggufmoe.remote.host import EngineHost
from ggufmoe.remote.link import EngineLink
from ggufmoe.remote.places import find_places
from ggufmoe.remote.requests import Request, StreamRequest
from ggufmoe.remote.worker import Worker
from ggufmoe.runtime.events import Event, Finished, Token
from ggufmoe.runtime.local import LocalEngine
from ggufmoe.work import Progress
from tests.engines import child_engine, local_engine
from tests.remote.workers import (
    PATIENT_S,
    is_running,
    never_answer,
    pause,
    paused,
    pretender,
    start_worker,
    talk_garbage,
    wait_until,
)
from tests.stories import GREEDY, ONE_THREAD

ROOT = Path(__file__).parents[2]
SMALL = ContextOptions(n_ctx=300, n_threads=1)
TEXT = "the model reads a number and writes"
TWELVE = replace(GREEDY, n_predict=12)
FOR_EVER = replace(GREEDY, n_predict=-1)
MIB = 2**20


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("child") / "m.gguf"
    ggufmoe.convert(tiny_checkpoint(n_layer=4, n_ff=2048), path, quant="Q4_K_M", threads=1)
    return path


@pytest.fixture(scope="module")
def workers() -> Iterator[tuple[Worker, Worker]]:
    with start_worker() as first, start_worker() as second:
        yield first, second


@pytest.fixture(scope="module")
def busy_worker() -> Iterator[Worker]:
    """The worker of ``remote_story``."""
    with start_worker() as served:
        yield served


@pytest.fixture(scope="module")
def remote_story(story_path: Path, busy_worker: Worker) -> Iterator[Engine]:
    """An engine for all tests that harm neither it nor its worker."""
    with Engine(story_path, ONE_THREAD, OffloadOptions(rpc=busy_worker.endpoint)) as engine:
        yield engine


@pytest.fixture(scope="module")
def lent_workers() -> Iterator[list[Worker]]:
    """The workers that ``worker`` has started; only the last one may still run."""
    lent: list[Worker] = []
    yield lent
    for served in lent:
        served.close()


@pytest.fixture
def worker(lent_workers: list[Worker]) -> Worker:
    """One that a test may harm: that of the test before, if it still runs, once it serves nobody."""
    if not lent_workers or not is_running(lent_workers[-1].pid):
        lent_workers.append(start_worker())
    wait_until(lambda: serves_nobody(lent_workers[-1]))
    return lent_workers[-1]


def serves_nobody(worker: Worker) -> bool:
    try:
        find_places(OffloadOptions(rpc=worker.endpoint))
    except WorkerError:
        return False
    return True


@pytest.fixture
def impatient(story_path: Path, worker: Worker) -> Iterator[Engine]:
    """An engine that is expected to give its worker up soon."""
    with Engine(story_path, ONE_THREAD, OffloadOptions(rpc=worker.endpoint, rpc_timeout=0.5)) as engine:
        yield engine


PAUSE_S = 2.0
"""Longer than ``patient`` waits for a token, and far shorter than it waits for a prompt."""


@pytest.fixture
def patient(story_path: Path, worker: Worker) -> Iterator[Engine]:
    """An engine that must not give up a worker that pauses for ``PAUSE_S`` while it computes a prompt."""
    with Engine(story_path, ONE_THREAD, OffloadOptions(rpc=worker.endpoint, rpc_timeout=1.0)) as engine:
        yield engine


def go_on_later(worker: Worker, delay_s: float) -> threading.Timer:
    """Lets a paused worker go on after this time."""
    timer = threading.Timer(delay_s, os.kill, (worker.pid, signal.SIGCONT))
    timer.start()
    return timer


def tokens(events: Iterator[Event]) -> list[int]:
    return [event.token_id for event in events if isinstance(event, Token)]


def answer(engine: Engine) -> list[int]:
    return tokens(engine.generate(engine.tokenize(TEXT), TWELVE))


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def cpu_s(worker: Worker) -> float:
    times = psutil.Process(worker.pid).cpu_times()
    return float(times.user + times.system)


# ---- placement


@pytest.fixture(scope="module")
def on_cpu(model: Path) -> list[int]:
    with Engine(model, SMALL, OffloadOptions(device="none", load_mode="none")) as engine:
        return answer(engine)


def limited(model: Path, endpoint: str) -> OffloadOptions:
    """Leaves room for the dense parts and the experts of two layers."""
    offload = OffloadOptions(rpc=endpoint, load_mode="none", fit="off", cpu_moe=True)
    with Engine(model, SMALL, offload) as engine:
        needed = engine.placement.plan.shares[0].n_bytes
        experts = sum(tensor.n_bytes for tensor in engine.header.tensors if "_exps" in tensor.name) / 4
    (place,), _ = find_places(OffloadOptions(rpc=endpoint))
    target = (place.free_bytes - needed - int(2.3 * experts)) // MIB
    return OffloadOptions(rpc=endpoint, load_mode="none", fit_target=target)


def offload_of(case: str, model: Path, first: str, second: str) -> OffloadOptions:
    if case == "fit":
        return limited(model, first)
    cases: dict[str, dict[str, Any]] = {
        "all": {"rpc": first},
        "cpu_moe": {"rpc": first, "cpu_moe": True},
        "n_cpu_moe": {"rpc": first, "n_cpu_moe": 3},
        "override": {"rpc": first, "n_gpu_layers": 2, "override_tensor": (r"blk\.[01]\.ffn_.*=RPC0,attn_q=CPU",)},
        "split": {"rpc": f"{first},{second}", "tensor_split": "3,2"},
        "second": {"rpc": f"{first},{second}", "device": "RPC1"},
    }
    return OffloadOptions(load_mode="none", fit="off", **cases[case])


def test_a_prompt_on_disk_is_read_by_another_child(story_path: Path, busy_worker: Worker, tmp_path: Path) -> None:
    context = replace(ONE_THREAD, prompt_cache=tmp_path / "prompts")
    for n_computed in (150, 1):
        with Engine(story_path, context, OffloadOptions(rpc=busy_worker.endpoint)) as engine:
            assert engine.prefill([1] + [259] * 149) == n_computed


@pytest.mark.parametrize("case", ["all", "cpu_moe", "n_cpu_moe", "override", "split", "second", "fit"])
def test_workers_hold_what_was_planned_and_answer_alike(
    case: str, model: Path, workers: tuple[Worker, Worker], on_cpu: list[int]
) -> None:
    first, second = workers
    offload = offload_of(case, model, first.endpoint, second.endpoint)
    with Engine(model, SMALL, offload) as engine:
        assert child_engine(engine)
        assert answer(engine) == on_cpu
        placement = engine.placement
    assert placement.differences == ()
    plan, report = placement.plan, placement.report
    planned = {buffer.name: buffer.n_bytes for share in plan.shares for buffer in share.buffers}
    assert planned == pytest.approx(dict(report.weight_bytes), rel=0.01, abs=0.006 * MIB)
    held = {name for name in report.weight_bytes if name.startswith("RPC")}
    expected = {"second": {second.endpoint}, "split": {first.endpoint, second.endpoint}}.get(case, {first.endpoint})
    assert held == {f"RPC0[{endpoint}]" for endpoint in expected}
    expert_layers = {"cpu_moe": (), "n_cpu_moe": (3,), "override": (0, 1, 3), "fit": (2, 3)}
    if case in expert_layers:
        assert plan.shares[0].expert_layers == expert_layers[case]
    if case == "split":
        assert [share.layers for share in plan.shares[:2]] == [(0, 1, 2), (3, 4)]


def test_the_workers_did_the_work(model: Path, workers: tuple[Worker, Worker]) -> None:
    before = [cpu_s(worker) for worker in workers]
    rpc = ",".join(worker.endpoint for worker in workers)
    with Engine(model, SMALL, OffloadOptions(rpc=rpc, fit="off", tensor_split="1,1")) as engine:
        engine.logits(engine.tokenize(TEXT * 10))
    assert all(cpu_s(worker) > earlier for worker, earlier in zip(workers, before, strict=True))


def test_a_wrong_option_is_the_same_error_as_without_workers(model: Path, workers: tuple[Worker, Worker]) -> None:
    offload = OffloadOptions(rpc=workers[0].endpoint, override_tensor=("ffn_upp_exps=CPU",))
    with pytest.raises(OptionError, match=r"matches no tensor; near names: .*ffn_up_exps"):
        Engine(model, SMALL, offload)
    with pytest.raises(OptionError, match="--device RPC7: there is no such device; there is RPC0"):
        Engine(model, SMALL, OffloadOptions(rpc=workers[0].endpoint, device="RPC7"))
    with pytest.raises(GGUFError, match=r"no-such\.gguf"):
        Engine("no-such.gguf", SMALL, OffloadOptions(rpc=workers[0].endpoint))


# ---- the same engine


def public(of: type) -> set[str]:
    return {name for name in dir(of) if not name.startswith("_")}


@pytest.mark.parametrize("kind", [LocalEngine, ChildEngine, Engine])
def test_help_says_what_every_member_is_for(kind: type) -> None:
    for name in public(kind):
        assert len(pydoc.getdoc(getattr(kind, name)).split()) > 3, name


def test_both_engines_take_every_call_of_the_public_one() -> None:
    only_public = {"embed_async", "generate_async", "metadata"}  # made of the others
    only_local = {"activity", "wait_until_free"}  # for the child's side of a ChildEngine
    attributes = {"path", "header", "placement", "n_ctx", "n_vocab", "n_ctx_train"}  # set by their constructors
    assert public(LocalEngine) - only_local == public(Engine) - only_public - attributes
    assert public(ChildEngine) == public(LocalEngine) - only_local
    for name in public(ChildEngine) - {"apply"}:  # whose function takes another engine each
        of_public, *others = (getattr(of, name) for of in (Engine, LocalEngine, ChildEngine))
        if callable(of_public):
            for other in others:
                assert inspect.signature(other).parameters == inspect.signature(of_public).parameters, name


def test_another_context_and_what_is_not_computed_there(model: Path, workers: tuple[Worker, Worker]) -> None:
    with Engine(model, SMALL, OffloadOptions(rpc=workers[0].endpoint)) as engine:
        engine.set_context(replace(SMALL, n_ctx=512))
        assert engine.n_ctx == 512
        assert engine.evaluate([1, 2, 3], one_by_one=True)
        assert engine.cached_tokens == (1, 2, 3)
        with pytest.raises(EngineError, match="leave out --rpc"):
            engine.compute_chunks([[1, 2]], 0)


def test_evaluations_are_those_of_this_machine(model: Path, workers: tuple[Worker, Worker], tmp_path: Path) -> None:
    text, options = "the model reads a number and writes " * 40, dict[str, Any](n_ctx=32, chunks=3, n_threads=1)
    offload = OffloadOptions(rpc=workers[0].endpoint)
    here, there = (ggufmoe.perplexity(model, text, offload=placed, **options) for placed in (None, offload))
    assert there.n_chunks == here.n_chunks == 3
    assert there.value == pytest.approx(here.value, rel=5e-3)  # other kernels compute there
    local, remote = tmp_path / "local.gguf", tmp_path / "remote.gguf"
    for path, placed in ((local, None), (remote, offload)):
        assert ggufmoe.imatrix(model, path, text, offload=placed, **options).n_chunks == 3
    sums = [read_header(path) for path in (local, remote)]
    assert [tensor.name for tensor in sums[0].tensors] == [tensor.name for tensor in sums[1].tensors]
    with pytest.raises(OptionError, match="leave out --rpc"):
        ggufmoe.kl_divergence(model, model, text, offload=offload, **options)


def test_text_and_tokens(model: Path, workers: tuple[Worker, Worker]) -> None:
    with (
        Engine(model, SMALL, OffloadOptions(device="none")) as plain,
        Engine(model, SMALL, OffloadOptions(rpc=workers[0].endpoint)) as engine,
    ):
        prompt = engine.tokenize(TEXT)
        assert prompt == plain.tokenize(TEXT)
        assert engine.detokenize(prompt) == plain.detokenize(prompt)
        assert engine.piece(prompt[1]) == plain.piece(prompt[1])
        for name in ("n_ctx", "n_vocab", "n_ctx_train", "bos_token", "eos_token", "adds_bos", "path", "cached_tokens"):
            assert getattr(engine, name) == getattr(plain, name), name
        assert engine.metadata("general.architecture") == "llama"
        assert engine.token_text(engine.bos_token) == plain.token_text(plain.bos_token)
        assert engine.ends_text(engine.eos_token or 0)
        assert engine.logits(prompt) == pytest.approx(plain.logits(prompt), abs=0.05)
        assert engine.cached_tokens == tuple(prompt)
        parts = list(engine.logits_by_batch(prompt))
        assert np.concatenate(parts).shape == (len(prompt), engine.n_vocab)
        engine.forget()
        assert engine.cached_tokens == ()


def test_control_tokens_are_shown_where_that_is_asked(remote_story: Engine) -> None:
    only_bos = replace(GREEDY, n_predict=2, logit_bias=("1+1000",))
    for shown, text in (((), ""), ({1}, "<s><s>")):
        events = remote_story.generate(remote_story.tokenize("on"), only_bos, shown=shown)
        assert "".join(event.text for event in events) == text


def test_a_stream_has_all_its_events_and_its_timing(remote_story: Engine, story: Engine) -> None:
    prompt = story.tokenize(" once", parse_special=True)
    ours, theirs = (list(engine.generate(prompt, GREEDY)) for engine in (story, remote_story))
    assert [event.text for event in ours] == [event.text for event in theirs]
    assert isinstance(theirs[-1], Finished)
    assert theirs[-1].reason == "stop"
    assert theirs[-1].timing.prompt_tokens == len(prompt)
    long = list(remote_story.generate(remote_story.tokenize(" on"), replace(GREEDY, n_predict=200)))
    assert len(long) == 201


def test_a_prompt_is_timed_until_the_worker_has_computed_it(patient: Engine, worker: Worker) -> None:
    prompt = patient.tokenize(" once" * 100)
    patient.prefill(prompt)  # the second time llama.cpp does not wait for answers before it comes back
    patient.forget()
    pause(worker.pid)
    going_on = go_on_later(worker, 0.5)
    *_, last = patient.generate(prompt, TWELVE)
    going_on.join()
    assert isinstance(last, Finished)
    assert last.timing.prompt_s > 0.4
    assert last.timing.generation_s < last.timing.prompt_s


def test_errors_come_as_they_are(remote_story: Engine) -> None:
    with pytest.raises(InputError, match="the prompt is empty"):
        remote_story.generate([])
    with pytest.raises(InputError, match="99999 is not a token"):
        remote_story.piece(99999)
    with pytest.raises(ContextFullError, match="the context holds 512"):
        remote_story.generate([5] * 600)
    with pytest.raises(TypeError):
        remote_story.tokenize()  # type: ignore[call-arg]
    assert remote_story.tokenize(" once")


def test_what_cannot_go_to_the_other_process_is_an_error(remote_story: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def lonely(_: Engine) -> int:
        return 1

    with pytest.raises(EngineError, match="an argument of apply cannot be sent to another process"):
        remote_story.apply(lambda _: 1)
    lonely.__module__, lonely.__qualname__ = "__main__", "lonely"
    monkeypatch.setattr(sys.modules["__main__"], "lonely", lonely, raising=False)
    with pytest.raises(EngineError, match=r"an argument of apply cannot be made in another process: .*lonely"):
        remote_story.apply(lonely)
    with pytest.raises(EngineError, match="what apply gives cannot be sent to another process"):
        remote_story.apply(operator.attrgetter("_runner"))
    assert remote_story.apply(operator.attrgetter("n_ctx")) == remote_story.n_ctx


def is_public(engine: Engine) -> bool:
    return type(engine) is Engine and len(engine.tokenize(" once")) == 2


def yields_is_public(engine: Engine, *, cancel: object) -> Iterator[bool]:
    yield is_public(engine)


def test_functions_get_a_public_engine_wherever_they_run(remote_story: Engine, story: Engine) -> None:
    for engine in (story, remote_story):
        assert engine.apply(is_public)
        assert list(engine.iterate(yields_is_public)) == [True]
        assert engine.tokenize(" once")  # the engine that the function got did not close this one


def leave(_: Engine) -> int:
    sys.exit(3)


def leave_after_one(_: Engine, *, cancel: object) -> Iterator[int]:
    yield 1
    raise KeyboardInterrupt


def test_functions_that_want_to_leave_the_other_process(remote_story: Engine) -> None:
    with pytest.raises(EngineError, match="SystemExit: 3"):
        remote_story.apply(leave)
    with pytest.raises(EngineError, match="KeyboardInterrupt"):
        list(remote_story.iterate(leave_after_one))
    assert remote_story.tokenize(" once")


def test_a_message_that_cannot_be_read_ends_the_engine(impatient: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EngineLink, "_deliver", lambda *_: 1 / 0)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with pytest.raises(EngineError, match="has ended"):
        impatient.tokenize(" once")


def test_cancelling_with_a_flag_or_from_another_thread(remote_story: Engine) -> None:
    prompt = remote_story.tokenize(" on")
    flag = threading.Event()
    seen = []
    for event in remote_story.generate(prompt, FOR_EVER, cancel=flag):
        seen.append(event)
        if len(seen) == 3:
            flag.set()
    assert isinstance(seen[-1], Finished)
    assert seen[-1].reason == "cancelled"
    events = remote_story.generate(prompt, FOR_EVER)
    next(events)
    remote_story.cancel()
    last = list(events)[-1]
    assert isinstance(last, Finished)
    assert last.reason in ("cancelled", "context")
    assert remote_story.tokenize(" once")


@dataclass(frozen=True)
class WaitForFlag(Request[bool], method="wait_for_flag"):
    def run(self, engine: LocalEngine, cancel: Any) -> bool:
        seen_flags.append(cancel.wait(PATIENT_S))
        return seen_flags[-1]


@dataclass(frozen=True)
class StreamAfterFlag(StreamRequest[int], method="stream_after_flag"):
    def run(self, engine: LocalEngine, cancel: Any) -> Iterator[int]:
        seen_flags.append(cancel.wait(PATIENT_S))
        return iter(range(3))


seen_flags: list[bool] = []
"""In the child: whether the flag was set, of each of the requests above that has ended."""


def flags_and_streams(_: Engine) -> tuple[list[bool], list[int]]:
    """In the child: ``seen_flags``, and the streams that its host knows."""
    hosts = [found for found in gc.get_objects() if type(found) is EngineHost]
    return list(seen_flags), [number for host in hosts for number in host._streams]


@pytest.mark.parametrize("kind", ["request", "stream"])
def test_an_interrupted_caller_stops_the_request(remote_story: Engine, kind: str) -> None:
    link = child_engine(remote_story)._link
    before, streams = remote_story.apply(flags_and_streams)
    timer = threading.Timer(0.2, _thread.interrupt_main)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        link.ask(WaitForFlag()) if kind == "request" else link.stream(StreamAfterFlag())
    timer.join()
    assert link._inboxes == {}
    wait_until(lambda: len(remote_story.apply(flags_and_streams)[0]) > len(before))
    wait_until(lambda: remote_story.apply(flags_and_streams) == ([*before, True], streams))


def test_logits_can_be_cancelled_by_the_flag_of_the_request(remote_story: Engine) -> None:
    flag = threading.Event()
    flag.set()
    tokens = remote_story.tokenize(" once")
    with pytest.raises(Cancelled, match="computing logits was stopped"):
        remote_story.logits(tokens, cancel=flag)
    with pytest.raises(Cancelled, match="computing logits was stopped"):
        list(remote_story.logits_by_batch(tokens, cancel=flag))
    with pytest.raises(Cancelled, match="tokenizing was stopped"):
        remote_story.tokenize(" once", cancel=flag)
    with pytest.raises(ContextFullError, match="the text has at least"):
        remote_story.tokenize(" once" * 100_000, must_fit=True)
    with pytest.raises(Cancelled, match="stopped"):
        remote_story.prefill(tokens, cancel=flag)
    assert remote_story.logits(tokens).shape == (len(tokens), remote_story.n_vocab)


def test_relative_paths_are_those_of_this_process(
    remote_story: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    prompt = remote_story.tokenize(" once")
    Path("grammar").write_text('root ::= " upon"')
    Path("schema").write_text('{"type": "boolean"}')
    only = replace(GREEDY, grammar_file=Path("grammar"), n_predict=1)
    assert "".join(event.text for event in remote_story.generate(prompt, only)) == " upon"
    assert list(remote_story.generate(prompt, replace(GREEDY, json_schema_file=Path("schema"), n_predict=1)))
    remote_story.prefill(prompt)
    assert remote_story.save_session("session") == len(prompt)
    assert (tmp_path / "session").is_file()
    assert remote_story.load_session("session") == (tuple(prompt), "")


def test_a_flag_set_before_the_start(remote_story: Engine) -> None:
    flag = threading.Event()
    flag.set()
    (only,) = remote_story.generate(remote_story.tokenize(" on"), FOR_EVER, cancel=flag)
    assert isinstance(only, Finished)
    assert only.reason == "cancelled"


def test_loading_is_reported_and_can_be_stopped(story_path: Path, workers: tuple[Worker, Worker]) -> None:
    offload = OffloadOptions(rpc=workers[0].endpoint)
    before, reports, flag = children(), list[Progress](), threading.Event()
    with Engine(story_path, ONE_THREAD, offload, on_progress=reports.append):
        parts = [report.done for report in reports]
        assert parts == sorted(parts)
        assert reports[-1] == Progress("load", 1.0, 1.0, "parts", story_path.name)
    flag.set()
    with pytest.raises(Cancelled, match="loading was stopped"):
        Engine(story_path, ONE_THREAD, offload, cancel=flag)
    assert children() == before


def test_a_prompt_can_be_computed_before_it_is_asked(remote_story: Engine, tmp_path: Path) -> None:
    prompt = remote_story.tokenize(" once upon a")
    remote_story.forget()
    assert remote_story.prefill(prompt) == len(prompt)
    assert remote_story.save_session(tmp_path / "session") == len(prompt)
    flag = threading.Event()
    flag.set()
    remote_story.forget()
    with pytest.raises(Cancelled):
        remote_story.prefill(prompt, cancel=flag)
    assert remote_story.load_session(tmp_path / "session") == (tuple(prompt), "")
    finished = list(remote_story.generate(prompt, GREEDY))[-1]
    assert isinstance(finished, Finished)
    assert finished.timing.cached_tokens == len(prompt) - 1


def test_a_stream_for_async(remote_story: Engine) -> None:
    async def read() -> list[Event]:
        return [event async for event in remote_story.generate_async(remote_story.tokenize(" once"), GREEDY)]

    assert "".join(event.text for event in asyncio.run(read())) == " upon a time"


def test_an_unfinished_stream_makes_way_for_the_next(remote_story: Engine) -> None:
    prompt = remote_story.tokenize(" on")
    for _ in range(3):
        events = remote_story.generate(prompt, FOR_EVER)
        next(events)
        del events
    abandoned = remote_story.generate(prompt, FOR_EVER)
    del abandoned
    assert len(tokens(remote_story.generate(prompt, TWELVE))) == 12


def test_answers_are_computed_in_one_batch(mixing_path: Path, worker: Worker) -> None:
    prompts = [[1, *range(259 + number, 259 + n)] for number, n in enumerate((3, 8, 20, 12, 25, 6, 16, 28))]
    offload = OffloadOptions(rpc=worker.endpoint)
    settings = replace(GREEDY, n_predict=40, logit_bias=("2-inf",))
    with Engine(mixing_path, replace(SMALL, n_parallel=8), offload) as engine:
        streams = [engine.generate(prompt, settings) for prompt in prompts]
        found = list(zip(*streams, strict=True))
        n_batches = engine.apply(n_computed_batches)
    with Engine(mixing_path, SMALL) as engine:
        alone = [list(engine.generate(prompt, settings)) for prompt in prompts]
    assert [[event.text for event in events] for events in zip(*found, strict=True)] == [
        [event.text for event in events] for events in alone
    ]
    assert n_batches < 8 * 40 / 2


def n_computed_batches(engine: Engine) -> int:
    return local_engine(engine).activity.n_batches


def test_many_threads_ask_one_engine(remote_story: Engine) -> None:
    found: list[list[int]] = []
    threads = [threading.Thread(target=lambda: found.append(remote_story.tokenize(" once upon"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [remote_story.tokenize(" once upon")] * 8


def test_routing_is_traced_where_it_is_computed(model: Path, workers: tuple[Worker, Worker]) -> None:
    with Engine(model, SMALL, OffloadOptions(device="none")) as plain:
        expected = trace_routing(plain, TEXT, generate=3)
        expected_rows = plain.embed([TEXT, [1, 2]])
    with Engine(model, SMALL, OffloadOptions(rpc=workers[0].endpoint)) as engine:
        steps: list[Progress] = []
        found = trace_routing(engine, TEXT, generate=3, on_progress=steps.append)
        assert [step.phase for step in steps] == [*["generate"] * 3, "route", "route"]
        with pytest.raises(EngineError, match="RoutingTracer needs an engine without --rpc"):
            RoutingTracer(engine)
        told = next(iter(engine.generate(found.token_ids[: found.n_prompt], GREEDY, routing=True)))
        rows = engine.embed([TEXT, [1, 2]])
    assert isinstance(told, RoutedToken)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(rows, expected_rows, atol=0.02)
    assert told.expert_weights == pytest.approx(found.mean_weights()[found.n_prompt - 1], abs=1e-3)
    assert (found.token_ids, found.texts) == (expected.token_ids, expected.texts)
    assert found.probabilities == pytest.approx(expected.probabilities, abs=0.02)
    assert (found.chosen == expected.chosen).all()


def test_what_the_child_logs_is_logged_here(
    story_path: Path, workers: tuple[Worker, Worker], caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO, "ggufmoe"),
        Engine(story_path, ONE_THREAD, OffloadOptions(rpc=workers[0].endpoint)),
    ):
        pass
    assert any("model buffer size" in record.message and record.name == "ggufmoe.llama" for record in caplog.records)


# ---- workers that fail


@pytest.mark.parametrize(
    ("behave", "message"), [(never_answer, "does not answer within 0.5 s"), (talk_garbage, "no worker of llama.cpp")]
)
def test_what_is_no_worker_is_an_error_within_seconds(
    behave: Callable[..., object], message: str, story_path: Path
) -> None:
    started = time.monotonic()
    with pretender(behave) as endpoint, pytest.raises(WorkerError, match=message):
        Engine(story_path, ONE_THREAD, OffloadOptions(rpc=endpoint, rpc_timeout=0.5))
    assert time.monotonic() - started < PATIENT_S


def test_a_busy_worker_is_an_error_within_seconds(remote_story: Engine, busy_worker: Worker) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerError, match="busy with another client"):
        Engine(remote_story.path, ONE_THREAD, OffloadOptions(rpc=busy_worker.endpoint, rpc_timeout=0.5))
    assert time.monotonic() - started < PATIENT_S
    assert remote_story.tokenize(" once")


def test_a_worker_that_dies_in_the_middle_of_an_answer(impatient: Engine, worker: Worker) -> None:
    events = impatient.generate(impatient.tokenize(" on"), FOR_EVER)
    next(events)
    started = time.monotonic()
    os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(WorkerLostError, match=rf"a worker was lost while it was in use.*{worker.endpoint}: cannot be"):
        list(events)
    assert time.monotonic() - started < PATIENT_S
    with pytest.raises(WorkerLostError, match="lost while it was in use"):
        impatient.tokenize(" once")
    with pytest.raises(WorkerLostError):
        impatient.generate([5])
    impatient.cancel()
    impatient.close()


def test_a_worker_that_hangs_in_the_middle_of_an_answer(impatient: Engine, worker: Worker) -> None:
    events = impatient.generate(impatient.tokenize(" on"), FOR_EVER)
    next(events)
    started = time.monotonic()
    with (
        paused(worker.pid),
        pytest.raises(WorkerLostError, match=r"no sign of life for \d+\.\d s \(--rpc-timeout 0\.5\): the wo"),
    ):
        list(events)
    assert time.monotonic() - started < PATIENT_S


def test_many_who_wait_do_not_keep_a_worker_that_hangs(impatient: Engine, worker: Worker) -> None:
    prompt = impatient.tokenize(" on")
    streams = [impatient.generate(prompt, FOR_EVER) for _ in range(24)]
    for stream in streams:
        next(stream)
    lost = list[str]()

    def read(stream: Iterator[Event]) -> None:
        try:
            list(stream)
        except WorkerLostError as error:
            lost.append(str(error))

    readers = [threading.Thread(target=read, args=(stream,)) for stream in streams]
    started = time.monotonic()
    with paused(worker.pid):
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(3 * PATIENT_S)
    assert time.monotonic() - started < PATIENT_S
    assert len(lost) == 24


def test_asking_for_something_else_does_not_keep_a_worker_that_hangs(impatient: Engine, worker: Worker) -> None:
    events = impatient.generate(impatient.tokenize(" on"), FOR_EVER)
    next(events)
    ended = threading.Event()

    def ask() -> None:
        with contextlib.suppress(WorkerLostError):
            while not ended.wait(0.3):
                impatient.tokenize(" once")

    asking = threading.Thread(target=ask)
    started = time.monotonic()
    with paused(worker.pid):
        asking.start()
        with pytest.raises(WorkerLostError):
            list(events)
    assert time.monotonic() - started < PATIENT_S
    ended.set()
    asking.join()


def test_stopping_again_and_again_does_not_keep_a_worker_that_hangs(impatient: Engine, worker: Worker) -> None:
    prompt = impatient.tokenize(" on")
    next(impatient.generate(prompt, FOR_EVER))
    started = time.monotonic()

    def ask_and_stop() -> None:
        while time.monotonic() - started < PATIENT_S:
            flag = threading.Event()
            threading.Timer(0.5, flag.set).start()
            list(impatient.generate(prompt, FOR_EVER, cancel=flag))

    with paused(worker.pid), pytest.raises(WorkerLostError):
        ask_and_stop()


def test_a_prompt_has_ten_times_as_long_as_a_token(patient: Engine, worker: Worker) -> None:
    prompt = patient.tokenize(" once" * 400)
    pause(worker.pid)  # as one that computes for long
    going_on = go_on_later(worker, PAUSE_S)
    assert patient.prefill(prompt) == len(prompt)
    going_on.join()


def test_the_last_token_of_a_prompt_does_not_shorten_its_time(story_path: Path, worker: Worker) -> None:
    context = ContextOptions(n_ctx=512, n_batch=128, n_ubatch=128, n_threads=1)
    with Engine(story_path, context, OffloadOptions(rpc=worker.endpoint, rpc_timeout=1)) as engine:
        prompt = engine.tokenize(" on" * 400)[:129]
        engine.prefill(prompt)
        engine.forget()
        pause(worker.pid)
        going_on = go_on_later(worker, PAUSE_S)
        assert engine.prefill(prompt) == 129
        going_on.join()


def watched_steps(engine: Engine, *, cancel: object) -> Iterator[int]:
    with engine.observed(lambda *_: False):
        yield from itertools.count()


def test_a_worker_that_hangs_while_a_stream_is_closed(story_path: Path, worker: Worker) -> None:
    with Engine(story_path, ONE_THREAD, OffloadOptions(rpc=worker.endpoint, rpc_timeout=0.3)) as engine:
        steps = engine.iterate(watched_steps)
        assert next(steps) == 0
        started = time.monotonic()
        with paused(worker.pid):
            steps.close()  # type: ignore[attr-defined]
            with pytest.raises(WorkerLostError, match=r"no sign of life for 3\.\d s \(ten times --rpc-timeout 0\.3\)"):
                engine.logits(engine.tokenize(" once"))
        assert time.monotonic() - started < PATIENT_S


def test_a_slow_reader_is_no_lost_worker(patient: Engine) -> None:
    events = patient.generate(patient.tokenize(" on"), replace(GREEDY, n_predict=60))
    next(events)
    time.sleep(PAUSE_S)
    assert len(tokens(events)) == 59


def has_nothing_to_do(engine: Engine) -> bool:
    return not local_engine(engine).activity.is_busy


def test_a_prompt_that_was_stopped_may_still_take_its_time(patient: Engine, worker: Worker) -> None:
    events = patient.generate(patient.tokenize(" on"), replace(GREEDY, n_predict=120))
    next(events)
    flag = threading.Event()
    long = patient.tokenize(" once" * 400)
    wait_until(lambda: patient.apply(has_nothing_to_do))  # the answer is as far ahead as it may be
    stopping = threading.Timer(0.3, flag.set)
    with paused(worker.pid):  # as one that computes for long
        stopping.start()
        with pytest.raises(Cancelled):
            patient.prefill(long, cancel=flag)
        go_on_later(worker, PAUSE_S)
        assert len(tokens(events)) == 119


def test_an_engine_whose_worker_hangs_can_be_closed(impatient: Engine, worker: Worker) -> None:
    before = children()
    with paused(worker.pid):
        started = time.monotonic()
        impatient.close()
        assert time.monotonic() - started < PATIENT_S
    assert len(before - children()) == 1


# ---- processes


def test_closing_ends_the_process_and_frees_the_worker(story_path: Path, workers: tuple[Worker, Worker]) -> None:
    before = children()
    for _ in range(2):
        engine = Engine(story_path, ONE_THREAD, OffloadOptions(rpc=workers[0].endpoint))
        assert len(children() - before) == 1
        events = engine.generate(engine.tokenize(" on"), FOR_EVER)
        next(events)
        engine.close()
        engine.close()
        assert children() == before
        with pytest.raises(EngineError, match="has been closed"):
            engine.tokenize("a")
        with pytest.raises(EngineError, match="has been closed"):
            list(events)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_leaves_the_engine_to_its_parent(remote_story: Engine) -> None:
    events = remote_story.generate(remote_story.tokenize(" on"), FOR_EVER)
    next(events)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads, from Python 3.12 on
        pid = os.fork()
    if not pid:
        said = []
        try:
            for ask in (lambda: remote_story.tokenize(" once"), lambda: next(events)):
                with contextlib.suppress(EngineError):
                    try:
                        ask()
                    except EngineError as error:
                        said.append(str(error))
            events.close()  # type: ignore[attr-defined]
            remote_story.close()
        finally:
            os._exit(0 if ["forked" in words for words in said] == [True, True] else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert isinstance(next(events), Token)
    events.close()  # type: ignore[attr-defined]
    assert remote_story.tokenize(" once")


def test_an_engine_that_is_forgotten_leaves_no_process(story_path: Path, workers: tuple[Worker, Worker]) -> None:
    before = children()
    engine = Engine(story_path, ONE_THREAD, OffloadOptions(rpc=workers[0].endpoint))
    del engine
    assert children() == before


def test_a_child_that_dies_of_something_else(story_path: Path, workers: tuple[Worker, Worker]) -> None:
    before = children()
    with Engine(story_path, ONE_THREAD, OffloadOptions(rpc=workers[0].endpoint)) as engine:
        (pid,) = children() - before
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_running(pid))
        with pytest.raises(EngineError, match=r"the process that computes has ended: .*signal 9") as caught:
            engine.tokenize("a")
    assert not isinstance(caught.value, WorkerError)


SCRIPT = """
import sys, time
print("started", flush=True)
import ggufmoe
engine = ggufmoe.Engine(sys.argv[1], offload=ggufmoe.OffloadOptions(rpc=sys.argv[2]))
import psutil
print(psutil.Process().children()[0].pid, flush=True)
time.sleep(600)
"""
"""Without a guard around it: starting the child must not run it again."""


def test_the_child_ends_when_its_parent_is_killed(
    story_path: Path, workers: tuple[Worker, Worker], tmp_path: Path
) -> None:
    (tmp_path / "script.py").write_text(SCRIPT, encoding="utf-8")
    command = [sys.executable, str(tmp_path / "script.py"), str(story_path), workers[0].endpoint]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "started\n"
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
    wait_until(lambda: not is_running(pid))


FROZEN = """
import sys
sys.frozen, sys.executable = True, sys.argv.pop(1)
from ggufmoe.remote import freeze_support
PREPARE
import ggufmoe
try:
    with ggufmoe.Engine(sys.argv[1], offload=ggufmoe.OffloadOptions(rpc=sys.argv[2])) as engine:
        print("tokens", engine.tokenize(" once"))
except ggufmoe.EngineError as error:
    print(error)
"""
"""What a frozen app looks like from inside: the executable is the app itself, which begins with the main script."""


@pytest.mark.parametrize(
    ("prepare", "printed"),
    [("freeze_support()", "tokens [1, "), ("", "a frozen app that uses workers must call")],
)
def test_a_frozen_app_is_started_again_as_the_child(
    prepare: str, printed: str, story_path: Path, workers: tuple[Worker, Worker], tmp_path: Path
) -> None:
    script, app = tmp_path / "main.py", tmp_path / "app"
    script.write_text(FROZEN.replace("PREPARE", prepare), encoding="utf-8")
    app.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{script}" "$0" "$@"\n', encoding="utf-8")
    app.chmod(0o755)
    command = [str(app), str(story_path), workers[0].endpoint]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.stdout.startswith(printed), done.stdout + done.stderr
