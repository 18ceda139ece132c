"""The one thread in which an engine's native code runs, and the queue in front of it.

Owns the order of jobs, the flag by which llama.cpp is stopped inside a computation, and the end. What the jobs do is
said elsewhere.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Generic, Protocol, TypeVar

from ggufmoe.errors import EngineError
from ggufmoe.work import CancelFlag, checked_flag

T = TypeVar("T")
_POLL_S = 0.2
"""Windows notices Ctrl-C only between waits."""
WATCH_S = 0.05
"""So often who waits for something that can be stopped looks whether it is to be."""
LEAVE_S = 0.25
"""So long who has stopped something waits for llama.cpp to leave it, which it does between two operations; one of a
large prompt takes a second on few cores. It is left to itself then."""


class Turn:
    """What may be stopped, by ``NativeThread.abort`` or a caller's flag: one answer, or one series of computations."""

    def __init__(self, cancel: CancelFlag | None = None) -> None:
        self.cancelled = False
        self._cancel = checked_flag(cancel)

    def is_stopped(self) -> bool:
        """Whether it is to end; the flag alone does not reach llama.cpp before somebody asks the native thread."""
        return self.cancelled or (self._cancel is not None and self._cancel.is_set())


class Job(Protocol):
    """Something to be done in the native thread. ``run`` raises nothing; ``fail`` is called in its stead at the end."""

    turn: Turn

    def run(self) -> None: ...

    def fail(self, error: EngineError) -> None: ...


class NativeThread:
    """Runs jobs one after another, in the order in which they came, until ``close``; then ``last``, once.

    ``abort_flag`` is a buffer whose first byte, once it is set, makes llama.cpp leave a computation.
    """

    def __init__(self, name: str, abort_flag: ctypes.Array[ctypes.c_char], last: Callable[[], None]) -> None:
        self.name = name
        self.closed = False
        self._abort_flag = abort_flag
        self._lock = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._running: Turn | None = None
        self._last: Callable[[], None] | None = last
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._work, name="ggufmoe-native", daemon=True)
        self._thread.start()
        _living().add(self)

    @property
    def is_busy(self) -> bool:
        """Whether a job runs now."""
        return self._running is not None

    def submit(self, job: Job) -> None:
        """Queue a job. Raises EngineError once closed."""
        with self._lock:
            self._check_usable()
            self._jobs.append(job)
            self._lock.notify()

    def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the native thread when its turn comes, and give what it gives or raise what it raises.

        Raises EngineError in the native thread itself, where it could only wait for itself.
        """
        call = self._submitted(function, Turn())
        with self._aborting(call):
            while not call.done.wait(_POLL_S):
                self.ask(call.turn)
        return call.result()

    def call_until_stopped(self, function: Callable[[], T | None], turn: Turn) -> T | None:
        """The same for what may be stopped: None soon after ``turn`` is.

        ``function`` may still be in llama.cpp then, and whoever comes next waits for it; or it waited for its turn and
        will not be called.
        """
        self.ask(turn)
        call = self._submitted(lambda: None if turn.cancelled else function(), turn)
        leave_at = math.inf
        with self._aborting(call):
            while not call.done.wait(WATCH_S):
                if self.ask(turn):
                    leave_at = min(leave_at, time.monotonic() + LEAVE_S)
                if time.monotonic() >= leave_at:
                    return None
        return call.result()

    def ask(self, turn: Turn) -> bool:
        """Whether ``turn`` is stopped. Aborts it then, and what runs if that is: its own reader may be elsewhere."""
        for asked in (turn, self._running):
            if asked is not None and not asked.cancelled and asked.is_stopped():
                self.abort(asked)
        return turn.cancelled

    def _submitted(self, function: Callable[[], T], turn: Turn) -> _Call[T]:
        self.check_outside()
        call = _Call(function, turn)
        self.submit(call)
        return call

    @contextmanager
    def _aborting(self, call: _Call[T]) -> Iterator[None]:
        try:
            yield
        except BaseException:  # Ctrl-C: nobody will want the result
            self.abort(call.turn)
            raise

    def check_outside(self) -> None:
        """Raise EngineError in the native thread, which would wait for itself."""
        if threading.current_thread() is self._thread:
            raise EngineError(f"{self.name}: an engine cannot be used from inside its own callbacks")

    def abort(self, turn: Turn) -> None:
        """Stop what belongs to ``turn``, inside a computation as well."""
        with self._lock:
            turn.cancelled = True
            if self._running is turn:
                self._abort_flag[0] = b"\x01"

    def close(self) -> None:
        """Stop what runs, fail what waits, and wait until all has ended. May be called again, and in any thread."""
        with self._lock:
            self.closed = True
            self._abort_flag[0] = b"\x01"
            self._lock.notify()
        if os.getpid() == self._process and threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_usable(self) -> None:
        if self.closed:
            raise EngineError(f"the engine of {self.name} has been closed")
        if os.getpid() != self._process:
            raise EngineError(f"{self.name}: loaded before this process was forked; load it again in here")

    def _work(self) -> None:
        while (job := self._next()) is not None:
            job.run()
            del job  # what it refers to must not live until the next one comes
        error = EngineError(f"the engine of {self.name} has been closed")
        for waiting in self._jobs:
            waiting.fail(error)
        self._jobs.clear()
        last, self._last = self._last, None
        if last is not None:
            last()

    def _next(self) -> Job | None:
        with self._lock:
            self._running = None
            while not self._jobs and not self.closed:
                self._lock.wait()
            if self.closed:
                return None
            job = self._jobs.popleft()
            self._running = job.turn
            self._abort_flag[0] = b"\x01" if job.turn.cancelled else b"\x00"
            return job


class _Call(Generic[T]):
    """A function to be run in the native thread, and what came of it."""

    def __init__(self, function: Callable[[], T], turn: Turn) -> None:
        self.turn = turn
        self.done = threading.Event()
        self._function: Callable[[], T] | None = function
        self._result: T
        self._error: BaseException | None = None

    def run(self) -> None:
        assert self._function is not None, "a call runs once"
        try:
            self._result = self._function()
        except BaseException as error:  # it belongs to the thread that waits
            self._error = error
        self._function = None
        self.done.set()

    def fail(self, error: EngineError) -> None:
        self._error, self._function = error, None
        self.done.set()

    def result(self) -> T:
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self._result


@cache
def _living() -> weakref.WeakSet[NativeThread]:
    """The threads that have not ended; native code that still runs when the interpreter goes would crash it."""
    living: weakref.WeakSet[NativeThread] = weakref.WeakSet()

    def end() -> None:
        for thread in list(living):
            with contextlib.suppress(RuntimeError):
                thread.close()

    atexit.register(end)
    return living
