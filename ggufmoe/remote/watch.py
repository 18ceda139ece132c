"""The watch over workers: how long they have given no sign of life while llama.cpp waits for them.

Owns the clocks and the counting. What the signs of life are, how long a silence may be and what follows from one is the
host's decision.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

TICK_S = 1.0
"""Time between two looks at the signs of life, at most."""
_IDLE_LOAD = 0.02
"""Share of a core that a waiting thread may use: it looks around 20 times a second and needs a quarter of this."""


@dataclass(frozen=True)
class Patience:
    """The longest silence that is allowed now, and the name of this limit for the error."""

    seconds: float
    name: str


class WorkerWatch:
    """Measures how long ``signs`` stays the same while threads wait and the followed thread uses no processor time.

    ``signs`` gives numbers that change with every sign of life. ``patience`` is asked for the limit at this moment;
    None while nothing is computed. The signs are looked at once in ``tick_s``.
    """

    def __init__(
        self,
        signs: Callable[[], tuple[int, ...]],
        patience: Callable[[], Patience | None],
        *,
        tick_s: float = TICK_S,
    ) -> None:
        self._signs = signs
        self._patience = patience
        self._tick_s = tick_s
        self._clock: ThreadClock | None = None
        self._waiting: set[object] = set()
        self._silent_s = 0.0
        self._last_signs: tuple[int, ...] | None = None

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """While the block runs, its thread waits for llama.cpp; without any such thread there is no silence."""
        key = object()
        self._waiting.add(key)
        try:
            yield
        finally:
            self._waiting.remove(key)

    def follow_this_thread(self) -> None:
        """From now on, processor time that the calling thread uses is a sign of life."""
        self._clock = ThreadClock()

    def wait_for_silence(self) -> tuple[float, Patience]:
        """Return when a silence exceeds its limit: its length in seconds, and the limit."""
        began = time.monotonic()
        while True:
            time.sleep(self._tick_s)
            now = time.monotonic()
            if (silence := self.look(now - began)) is not None:
                return silence
            began = now

    def look(self, took_s: float) -> tuple[float, Patience] | None:
        """Look at the signs of life, ``took_s`` after the last time; the silence and its limit once it exceeds that."""
        # asked before the signs: the silence of a batch that ends now must not be held against a shorter limit
        patience, n_waiting = self._patience(), len(self._waiting)
        before, self._last_signs = self._last_signs, self._signs()
        is_computing = self._clock is not None and self._clock.has_worked(took_s, n_waiting)
        if is_computing or self._last_signs != before or not n_waiting or patience is None:
            self._silent_s = 0.0
            return None
        # a tick that took much longer (a machine asleep, or very busy) says nothing about the workers
        self._silent_s += min(took_s, 2 * self._tick_s)
        return (self._silent_s, patience) if self._silent_s > patience.seconds else None


class ThreadClock:
    """Processor time of the thread that makes it; of the whole process where the system does not tell (macOS, Windows).

    The thread alone uses no time while it waits for a worker. In the process, threads that wait use a little.
    """

    def __init__(self) -> None:
        self._seconds: Callable[[], float] = time.process_time
        self._is_of_process = True
        if sys.platform != "win32" and hasattr(time, "pthread_getcpuclockid"):
            with contextlib.suppress(OSError):
                time.clock_gettime(clock := time.pthread_getcpuclockid(threading.get_ident()))
                self._seconds, self._is_of_process = functools.partial(time.clock_gettime, clock), False
        self._before = self._seconds()

    def has_worked(self, took_s: float, n_waiting: int) -> bool:
        """Whether anything was computed since the last call, ``took_s`` ago, while ``n_waiting`` threads waited."""
        try:
            before, self._before = self._before, self._seconds()
        except OSError:  # the thread has ended
            return False
        return self._before - before > (_IDLE_LOAD * (1 + n_waiting) * took_s if self._is_of_process else 0)
