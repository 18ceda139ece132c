"""The watch over silent workers: what is a sign of life, and what is none."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from ggufmoe.remote.host import step_patience
from ggufmoe.remote.watch import Patience, ThreadClock, WorkerWatch
from tests.remote.workers import PATIENT_S

LIMIT = Patience(5.0, "the limit")
TICK_S = 1.0


class Watched:
    """A watch whose ticks the test counts, with one thread that waits for llama.cpp."""

    def __init__(self) -> None:
        self.patience: Patience | None = LIMIT
        self.n_done = 0
        self.watch = WorkerWatch(lambda: (self.n_done,), lambda: self.patience, tick_s=TICK_S)
        self.watch.look(TICK_S)  # the first look has nothing to compare with

    def is_given_up(self, n_ticks: int = 8, between: Callable[[], None] = lambda: None) -> bool:
        """Whether one of the next looks finds that the silence is too long; ``between`` is called before each."""
        with self.watch.waiting():
            for _ in range(n_ticks):
                between()
                if self.watch.look(TICK_S) is not None:
                    return True
        return False


@pytest.fixture
def watched() -> Watched:
    return Watched()


def in_thread(work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_a_silence_that_exceeds_the_limit(watched: Watched) -> None:
    with watched.watch.waiting():
        assert [watched.watch.look(TICK_S) for _ in range(5)] == [None] * 5
        assert watched.watch.look(TICK_S) == (6.0, LIMIT)


def test_waiting_for_the_silence() -> None:
    watch = WorkerWatch(lambda: (0,), lambda: Patience(0.1, "short"), tick_s=0.01)
    found: list[tuple[float, Patience]] = []
    thread = threading.Thread(target=lambda: found.append(watch.wait_for_silence()), daemon=True)
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()  # nobody waits for llama.cpp
    with watch.waiting():
        thread.join(PATIENT_S)
    ((seconds, patience),) = found
    assert (seconds > 0.1, patience.name) == (True, "short")


def test_nobody_waits(watched: Watched) -> None:
    assert [watched.watch.look(TICK_S) for _ in range(20)] == [None] * 20


def test_nothing_is_computed(watched: Watched) -> None:
    watched.patience = None
    assert not watched.is_given_up()


def test_what_takes_its_time_has_it(watched: Watched) -> None:
    watched.patience = Patience(10 * LIMIT.seconds, "ten times the limit")
    assert not watched.is_given_up(50)
    assert watched.is_given_up(51)


def test_a_silence_begins_anew_after_a_sign_of_life(watched: Watched) -> None:
    assert not watched.is_given_up(5)
    watched.n_done += 1
    assert not watched.is_given_up(6)
    assert watched.is_given_up(1)


def test_a_tick_that_took_long_tells_little(watched: Watched) -> None:
    with watched.watch.waiting():
        assert watched.watch.look(1000.0) is None  # counts as two ticks
        assert watched.watch.look(1000.0) is None
        assert watched.watch.look(1000.0) == (6.0, LIMIT)


def test_progress_is_a_sign_of_life(watched: Watched) -> None:
    def advance() -> None:
        watched.n_done += 1

    assert not watched.is_given_up(20, advance)


class Follower(threading.Thread):
    """A thread that is followed, and does ``work`` whenever it is told to."""

    def __init__(self, watch: WorkerWatch, work: Callable[[], None]) -> None:
        super().__init__(daemon=True)
        self._watch = watch
        self._work = work
        self._told, self._done, self.has_begun = threading.Semaphore(0), threading.Semaphore(0), threading.Event()
        self._ends = False
        self.start()
        assert self.has_begun.wait(PATIENT_S)
        time.sleep(0.1)  # until it waits: what it uses before would count as work

    def run(self) -> None:
        self._watch.follow_this_thread()
        self.has_begun.set()
        while self._told.acquire() and not self._ends:
            self._work()
            self._done.release()

    def tell(self) -> None:
        self._told.release()
        assert self._done.acquire(timeout=PATIENT_S)

    def end(self) -> None:
        self._ends = True
        self._told.release()
        self.join()


@pytest.fixture
def follow(watched: Watched) -> Iterator[Callable[[Callable[[], None]], Follower]]:
    with ExitStack() as ends:

        def start(work: Callable[[], None]) -> Follower:
            follower = Follower(watched.watch, work)
            ends.callback(follower.end)
            return follower

        yield start


def compute_a_little() -> None:
    sum(range(20_000))


def test_the_thread_that_computes_is_followed(watched: Watched, follow: Callable[..., Follower]) -> None:
    assert not watched.is_given_up(10, follow(compute_a_little).tell)


def test_other_threads_are_not(watched: Watched, follow: Callable[..., Follower]) -> None:
    follow(compute_a_little)
    assert watched.is_given_up(10, compute_a_little)


def test_a_followed_thread_that_ends(watched: Watched, follow: Callable[..., Follower]) -> None:
    follow(compute_a_little).end()
    assert watched.is_given_up(10)


@pytest.fixture
def only_process_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on systems that tell the processor time of a whole process alone."""
    monkeypatch.delattr(time, "pthread_getcpuclockid", raising=False)


@pytest.mark.usefixtures("only_process_time")
@pytest.mark.parametrize("n_waiting", [1, 24])
def test_waiting_threads_use_a_little_of_the_process_time(n_waiting: int) -> None:
    clock = ThreadClock()
    used = time.process_time()
    in_thread(compute_a_little)
    used = time.process_time() - used
    # in a tick so long that the little there was is less than what waiting threads may use
    assert not clock.has_worked(2 * used / (0.02 * (1 + n_waiting)), n_waiting)


@pytest.mark.usefixtures("only_process_time")
def test_computing_shows_in_the_process_time(watched: Watched) -> None:
    watched.watch.follow_this_thread()
    assert not watched.is_given_up(6, lambda: in_thread(compute_for_a_twentieth_of_a_tick))


def compute_for_a_twentieth_of_a_tick() -> None:
    end = time.thread_time() + 0.05 * TICK_S
    while time.thread_time() < end:
        pass


@pytest.mark.usefixtures("only_process_time")
def test_a_silence_where_the_system_tells_only_of_the_process(watched: Watched) -> None:
    watched.watch.follow_this_thread()
    assert watched.is_given_up()


@pytest.mark.parametrize(
    ("n_tokens", "limit"),
    [
        (1, Patience(2.0, "--rpc-timeout 2")),
        (4, Patience(8.0, "4 times --rpc-timeout 2")),
        (10, Patience(20.0, "ten times --rpc-timeout 2")),
        (512, Patience(20.0, "ten times --rpc-timeout 2")),
        (0, Patience(20.0, "ten times --rpc-timeout 2")),
    ],
)
def test_a_batch_may_take_as_long_as_its_tokens_one_by_one(n_tokens: int, limit: Patience) -> None:
    assert step_patience(n_tokens, 2.0) == limit
