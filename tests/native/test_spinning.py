"""The spinning of llama.cpp's threads: shortened while the machine is busy, given back when it is not."""

from __future__ import annotations

import os
import sys
import threading
import time

import pytest

from ggufmoe.native import library as native
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


def limit_of(machine: Machine) -> SpinLimit:
    return SpinLimit(lambda: machine.waited_s, lambda: machine.now_s)


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
    machine.passes(1.0, waiting=0.5)
    limit.look()
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
    for seconds in (5.0, 10.0, 20.0, 40.0, 40.0):
        machine.passes(0.3, waiting=0.2)
        limit.look()
        assert limit.is_short
        machine.passes(seconds - 0.01)
        limit.look()
        assert limit.is_short
        machine.passes(0.02)
        limit.look()
        assert not limit.is_short
    machine.passes(0.3)
    limit.look()
    machine.passes(0.3, waiting=0.2)
    limit.look()
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


def test_closing_gives_spinning_back(before: int) -> None:
    machine = Machine()
    limit = limit_of(machine)
    machine.passes(1.0, waiting=1.0)
    limit.look()
    limit.close()
    assert not limit.is_short
    check_long(before)


def test_spinning_stays_short_until_the_last_limit_gives_it_back(before: int) -> None:
    machine = Machine()
    first, second = limit_of(machine), limit_of(machine)
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

    machine.passes(1.0, waiting=0.5)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        limit.look()
    assert limit.is_short == is_portable()  # which needs no thread for it
    machine.passes(1.0, waiting=0.5)
    limit.look()
    assert limit.is_short == is_portable()
    limit.close()
