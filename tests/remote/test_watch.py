"""The watch over silent workers: what is a sign of life, and what is none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ggufmoe.remote.watch import Patience, WorkerWatch

LIMIT_S = 0.5


class Watched:
    """A watch in a thread, and what it is told."""

    def __init__(self) -> None:
        self.limit_s: float | None = LIMIT_S
        self.n_done = 0
        self.silences: list[float] = []
        self.watch = WorkerWatch(lambda: (self.n_done,), self.patience, tick_s=0.05)
        self.thread = threading.Thread(target=self.wait, daemon=True)
        self.thread.start()

    def patience(self) -> Patience | None:
        return None if self.limit_s is None else Patience(self.limit_s, "the limit")

    def wait(self) -> None:
        self.silences.append(self.watch.wait_for_silence()[0])

    def is_given_up(self, within_s: float = 4 * LIMIT_S) -> bool:
        with self.watch.waiting():
            self.thread.join(within_s)
        return bool(self.silences)


@pytest.fixture
def watched() -> Iterator[Watched]:
    made = Watched()
    yield made
    made.limit_s = -1.0  # given up at once
    assert made.is_given_up(10)


@pytest.fixture
def in_background() -> Iterator[Callable[..., None]]:
    """Starts a function that is called until the end of the test, after ``first``, in one thread."""
    ended, threads = threading.Event(), list[threading.Thread]()

    def start(again: Callable[[], Any], first: Callable[[], None] = lambda: None) -> None:
        begun = threading.Event()

        def run() -> None:
            first()
            begun.set()
            while not ended.is_set():
                again()

        threads.append(threading.Thread(target=run, daemon=True))
        threads[-1].start()
        begun.wait()

    yield start
    ended.set()
    for thread in threads:
        thread.join()


def work() -> None:
    """A fifth of a core."""
    end = time.thread_time() + 0.002
    while time.thread_time() < end:
        pass
    time.sleep(0.008)


def look_around() -> None:
    time.sleep(0.05)


def test_silence_ends_the_process(watched: Watched) -> None:
    assert watched.is_given_up()
    assert LIMIT_S < watched.silences[0] < 3 * LIMIT_S


def test_nobody_waits(watched: Watched) -> None:
    time.sleep(3 * LIMIT_S)
    assert not watched.silences


def test_nothing_is_computed(watched: Watched) -> None:
    watched.limit_s = None
    assert not watched.is_given_up()


def test_what_takes_its_time_has_it(watched: Watched) -> None:
    watched.limit_s = 10 * LIMIT_S
    assert not watched.is_given_up()


def test_progress_is_a_sign_of_life(watched: Watched, in_background: Callable[..., None]) -> None:
    def advance() -> None:
        watched.n_done += 1
        time.sleep(0.3 * LIMIT_S)

    in_background(advance)
    assert not watched.is_given_up()


def test_the_thread_that_computes_is_followed(watched: Watched, in_background: Callable[..., None]) -> None:
    in_background(work, watched.watch.follow_this_thread)
    assert not watched.is_given_up()


def test_other_threads_are_not(watched: Watched, in_background: Callable[..., None]) -> None:
    goes_on = threading.Event()
    in_background(goes_on.wait, watched.watch.follow_this_thread)
    in_background(work)
    is_given_up = watched.is_given_up()
    goes_on.set()
    assert is_given_up


def test_a_followed_thread_that_ends(watched: Watched) -> None:
    thread = threading.Thread(target=watched.watch.follow_this_thread)
    thread.start()
    thread.join()
    assert watched.is_given_up()


@pytest.mark.parametrize("n_waiting", [1, 24])
def test_where_the_system_tells_only_of_the_process(
    watched: Watched, in_background: Callable[..., None], monkeypatch: pytest.MonkeyPatch, n_waiting: int
) -> None:
    monkeypatch.delattr(time, "pthread_getcpuclockid", raising=False)
    watched.watch.follow_this_thread()

    def wait() -> None:
        with watched.watch.waiting():
            look_around()

    for _ in range(n_waiting - 1):
        in_background(wait)
    assert watched.is_given_up()


def test_computing_where_the_system_tells_only_of_the_process(
    watched: Watched, in_background: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(time, "pthread_getcpuclockid", raising=False)
    watched.watch.follow_this_thread()
    in_background(work)
    assert not watched.is_given_up()
