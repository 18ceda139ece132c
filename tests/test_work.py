"""Long calls: progress that adds up, cancelling that stops every thread, and one meaning of "all cores"."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from concurrent.futures._base import DoneAndNotDoneFutures
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ggufmoe import work
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.convert import convert
from ggufmoe.errors import Cancelled, GGUFError
from ggufmoe.gguf.manifest import make_manifest
from ggufmoe.inspection.diff import diff_models
from ggufmoe.inspection.experts import compare_experts
from ggufmoe.merge import forward
from ggufmoe.merge.forward import ForwardPass, LayerState
from ggufmoe.work import Progress, Work, checked_flag, is_set, memory_bytes, thread_count, usable_cores
from ggufmoe.writing import writer

Make = Callable[..., Path]


def test_results_come_in_the_order_of_the_items() -> None:
    assert Work("x", 0).map(lambda number: number * number, range(50), 4) == [n * n for n in range(50)]
    assert Work("x", 0).map(str, [], 4) == []


def test_progress_adds_up_and_is_told_by_one_thread_at_a_time() -> None:
    steps: list[Progress] = []
    inside = threading.Lock()

    def report(step: Progress) -> None:
        assert inside.acquire(blocking=False), "two threads report at once"
        steps.append(step)
        inside.release()

    call = Work("count", 60, "parts", on_progress=report)
    call.map(lambda number: call.advance(3, str(number)), range(20), 8)
    assert [step.done for step in steps] == list(range(3, 61, 3))
    assert {(step.phase, step.total, step.unit) for step in steps} == {("count", 60, "parts")}
    assert {step.item for step in steps} == {str(number) for number in range(20)}


def test_an_error_stops_the_other_threads_and_is_the_one_that_is_raised() -> None:
    call = Work("x", 0)
    begun: list[int] = []
    waiting = threading.Event()

    def fail_in_the_second(number: int) -> None:
        begun.append(number)
        if number == 1:
            waiting.wait(10)
            raise GGUFError("the second")
        waiting.set()
        while True:  # ends only because of the error
            call.check()

    with pytest.raises(GGUFError, match="the second"):
        call.map(fail_in_the_second, range(100), 2)
    assert sorted(begun) == [0, 1]


def test_the_caller_waits_in_short_pieces_between_which_windows_delivers_ctrl_c(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pauses: list[float | None] = []

    def recorded(pending: set[Future[int]], timeout: float | None, until: str) -> DoneAndNotDoneFutures[int]:
        pauses.append(timeout)
        return wait(pending, timeout, until)

    monkeypatch.setattr(work, "_WAIT_S", 0.001)
    monkeypatch.setattr(work, "wait", recorded)
    late = threading.Timer(0.05, (released := threading.Event()).set)
    late.start()
    assert Work("x", 0).map(lambda number: released.wait(60) and number, [7, 8], 2) == [7, 8]
    assert len(pauses) > 1
    assert set(pauses) == {0.001}


@pytest.mark.parametrize("threads", [1, 3])
def test_a_cancelled_call_stops_with_its_own_message(threads: int) -> None:
    cancel = threading.Event()
    call = Work("x", 0, stopped="counting was stopped", cancel=cancel)

    def count(number: int) -> None:
        call.check()
        if number == 5:
            cancel.set()

    with pytest.raises(Cancelled, match="counting was stopped"):
        call.map(count, range(1000), threads)


def test_flags() -> None:
    cancel = threading.Event()
    assert not is_set(None)
    assert not is_set(cancel)
    cancel.set()
    assert is_set(cancel)
    assert checked_flag(cancel) is cancel
    assert checked_flag(None) is None
    with pytest.raises(TypeError, match="cancel must be a flag"):
        checked_flag(True)  # type: ignore[arg-type]


def test_threads_are_those_asked_for_or_one_for_each_core() -> None:
    assert thread_count(7) == 7
    assert thread_count(None) == usable_cores() >= 1


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many threads each pool has that is opened during the test."""
    sizes: list[int] = []

    class Recorded(ThreadPoolExecutor):
        def __init__(self, max_workers: int) -> None:
            sizes.append(max_workers)
            super().__init__(max_workers)

    monkeypatch.setattr(work, "ThreadPoolExecutor", Recorded)
    return sizes


@pytest.mark.parametrize("n_cores", [1, 3])
def test_all_cores_are_those_of_the_affinity_everywhere(
    tiny_checkpoint: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pools: list[int], n_cores: int
) -> None:
    """A process that is bound to one core (``taskset -c 0``) hashes, compares and merges with one thread."""
    source = tiny_checkpoint(arch="mistral", n_layer=2)
    paths = [tmp_path / name for name in ("a.gguf", "b.gguf")]
    for path, quant in zip(paths, ("F16", "Q8_0"), strict=True):
        convert(tiny_checkpoint(n_layer=2), path, quant)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(n_cores)), raising=False)
    monkeypatch.setattr(forward, "TILE_BYTES", 32 * 4 * 256)
    for job in (
        lambda: make_manifest(paths),
        lambda: diff_models(*paths),
        lambda: compare_experts(paths[0]),
        lambda: list(hidden_states(source)),
    ):
        pools.clear()
        job()
        assert set(pools) == ({n_cores} if n_cores > 1 else set())
    threads = workers_of_a_conversion(source, tmp_path / "c.gguf", monkeypatch)
    assert threads == n_cores + writer._READERS


def hidden_states(source: Path) -> Iterator[LayerState]:
    with open_checkpoint(source) as model:
        yield from ForwardPass(model).layers([[1, 2, 3]])


def workers_of_a_conversion(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    started: list[threading.Thread] = []

    class Recorded(threading.Thread):
        def start(self) -> None:
            started.append(self)
            super().start()

    monkeypatch.setattr(threading, "Thread", Recorded)
    convert(source, output, "F16")
    return len(started)


def test_a_manifest_is_made_by_as_many_threads_as_were_asked_for(
    tiny_checkpoint: Make, tmp_path: Path, pools: list[int]
) -> None:
    for threads in (1, 5):
        convert(tiny_checkpoint(), tmp_path / "a.gguf", "F16", threads=threads, manifest=True, force=True)
    assert pools == [5]


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_the_memory_of_this_machine(system: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linux and psutil, which tells it on the other systems, agree."""
    here = memory_bytes()
    assert 2**28 < here < 2**50
    monkeypatch.setattr(work, "sys", SimpleNamespace(platform=system))
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert memory_bytes() == psutil.virtual_memory().total == here
