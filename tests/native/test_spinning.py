"""The spinning of llama.cpp's threads: shortened while the machine is busy, given back when it is not."""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from ggufmoe.native import library as native
from ggufmoe.native import spinning
from ggufmoe.native.spinning import SpinLimit, loaded_libgomp

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere spinning is not shortened")


class Machine:
    """A clock, and the seconds that threads have waited for a processor by then."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.waited_s = 3.0

    def passes(self, seconds: float, *, waiting: float = 0.0) -> None:
        self.now_s += seconds
        self.waited_s += waiting


def find_busy(machine: Machine, limit: SpinLimit) -> None:
    """Two looks that find the machine busy; spinning is shortened by the second."""
    for _ in range(2):
        assert not limit.is_short
        machine.passes(0.3, waiting=0.2)
        limit.look()


def limit_of(machine: Machine) -> SpinLimit:
    limit = SpinLimit(lambda: machine.waited_s, lambda: machine.now_s)
    limit.look()  # there is nothing to compare with yet
    return limit


def n_threads() -> int:
    return len(os.listdir("/proc/self/task"))


@pytest.fixture
def before() -> int:
    """The number of threads of this process, when those of earlier tests have ended."""
    counts = [0]
    deadline = time.monotonic() + 10
    while len(counts) < 20 or len(set(counts[-20:])) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
        counts.append(n_threads())
    return counts[-1]


def wait_for_threads(expected: int) -> None:
    deadline = time.monotonic() + 10
    while n_threads() != expected and time.monotonic() < deadline:
        time.sleep(0.01)
    assert n_threads() == expected


def is_portable() -> bool:
    """Whether the engine is that of scripts/engine_wheel, which has a function for this; else libgomp computes."""
    return hasattr(native.library(), "ggufmoe_spins")


def check_short(before: int) -> None:
    """The threads spin shortly. With libgomp that is so while there are a leader and a thread for each further core."""
    if is_portable():
        assert native.library().ggufmoe_spins() == 100
    else:
        assert loaded_libgomp() is not None
        wait_for_threads(before + len(os.sched_getaffinity(0)))


def check_long(before: int) -> None:
    """The threads spin as long as they did, and no thread is left of what shortened it."""
    if is_portable():
        assert native.library().ggufmoe_spins() == 300000
    wait_for_threads(before)


def test_a_busy_machine_shortens_spinning_until_it_is_calm(before: int) -> None:
    machine = Machine()
    limit = limit_of(machine)
    find_busy(machine, limit)
    assert limit.is_short
    check_short(before)
    machine.passes(4.0, waiting=4.0)
    limit.look()
    assert limit.is_short
    machine.passes(2.0, waiting=2.0)
    limit.look()
    assert not limit.is_short
    check_long(before)
    machine.passes(1.0)
    limit.look()
    assert not limit.is_short


def test_a_machine_that_stays_busy_is_looked_at_ever_more_seldom() -> None:
    machine = Machine()
    limit = limit_of(machine)
    machine.passes(0.3, waiting=0.2)
    limit.look()
    for seconds in (5.0, 10.0, 10.0):
        assert not limit.is_short
        machine.passes(0.3, waiting=0.2)
        limit.look()  # the second in a row, or the first after the machine was busy
        assert limit.is_short
        machine.passes(seconds - 0.01)
        limit.look()
        assert limit.is_short
        machine.passes(0.02)
        limit.look()
        assert not limit.is_short
    machine.passes(0.3)
    limit.look()
    find_busy(machine, limit)
    assert limit.is_short
    machine.passes(5.01)
    limit.look()
    assert not limit.is_short


def test_a_calm_machine_changes_nothing() -> None:
    machine = Machine()
    limit = limit_of(machine)
    for _ in range(20):
        machine.passes(0.5, waiting=0.1)
        limit.look()
        assert not limit.is_short


def test_a_moment_of_waiting_changes_nothing() -> None:
    machine = Machine()
    limit = limit_of(machine)
    for _ in range(20):
        machine.passes(0.3, waiting=0.3)
        limit.look()
        machine.passes(0.3, waiting=0.1)
        limit.look()
        assert not limit.is_short


def test_looks_that_follow_each_other_closely_cost_no_question() -> None:
    machine, asked = Machine(), []
    limit = SpinLimit(lambda: asked.append(1) or 0.0, lambda: machine.now_s)  # type: ignore[func-returns-value]
    for _ in range(50):
        machine.passes(0.001)
        limit.look()
    assert len(asked) == 1


def test_a_kernel_that_does_not_tell_changes_nothing() -> None:
    machine = Machine()
    limit = SpinLimit(lambda: None, lambda: machine.now_s)
    machine.passes(9.0)
    limit.look()
    assert not limit.is_short


def test_only_threads_that_compute_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server's threads of Python wait while llama.cpp computes, on a machine that does nothing else."""

    def waited(seconds: dict[int, int]) -> None:
        for thread_id, told in seconds.items():
            task = tmp_path / str(thread_id)
            task.mkdir(exist_ok=True)
            (task / "schedstat").write_text(f"1 {told * 10**9} 1\n")

    monkeypatch.setattr(spinning, "_TASKS", str(tmp_path))
    end = threading.Event()
    other = threading.Thread(target=end.wait)
    other.start()
    try:
        assert other.native_id is not None
        ours, of_the_team = threading.get_native_id(), 2**40
        waited({ours: 1, of_the_team: 2, other.native_id: 50})
        machine = Machine()
        limit = SpinLimit(clock_s=lambda: machine.now_s)
        limit.look()
        machine.passes(10.0)
        waited({ours: 2, of_the_team: 4, other.native_id: 90})
        limit.look()
        assert not limit.is_short
        for n in (2, 3):
            machine.passes(10.0)
            waited({ours: 2 * n, of_the_team: 3 * n + 1})
            limit.look()
        assert limit.is_short
        limit.close()
    finally:
        end.set()
        other.join()


def test_closing_gives_spinning_back(before: int) -> None:
    machine = Machine()
    limit = limit_of(machine)
    find_busy(machine, limit)
    limit.close()
    assert not limit.is_short
    check_long(before)


def test_spinning_stays_short_until_the_last_limit_gives_it_back(before: int) -> None:
    machine = Machine()
    first, second = limit_of(machine), limit_of(machine)
    for _ in range(2):
        machine.passes(1.0, waiting=1.0)
        first.look()
        second.look()
    first.close()
    assert second.is_short
    check_short(before)
    second.close()
    check_long(before)


def test_a_process_that_may_have_no_more_threads_goes_on_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine()
    limit = limit_of(machine)

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        find_busy(machine, limit)
    assert limit.is_short == is_portable()  # which needs no thread for it
    for _ in range(2):
        machine.passes(0.3, waiting=0.2)
        limit.look()
    assert limit.is_short == is_portable()
    limit.close()
