"""The one thread in which an engine's native code runs, and the queue of jobs in front of it.

Owns the order of jobs, the flag by which llama.cpp is aborted inside a computation, the end of the thread, and what
becomes of its jobs when llama.cpp gives up in one of them: then the thread never returns. What the jobs compute is said
in ``local`` and ``generation``.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import itertools
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Generic, Protocol, TypeVar

from ggufmoe.errors import EngineError, EngineLostError, one_line
from ggufmoe.native.aborts import abort_watch
from ggufmoe.work import CancelFlag, checked_flag

T = TypeVar("T")
_WAIT_S = 0.2
"""Length of one wait: Windows notices Ctrl-C only between waits."""
WATCH_S = 0.05
"""A waiting thread checks this often whether its computation has been cancelled."""
TEXT_STACK_BYTES = 2**30
"""Stack of a thread that tokenizes: address space, of which memory is used as far as llama.cpp recurses."""
LEAVE_S = 0.25
"""A caller that has cancelled waits this long for llama.cpp to return, and then leaves without. llama.cpp checks the
abort flag between two operations, and one operation of a large prompt takes a second on few cores."""
_numbers = itertools.count()
_start_lock = threading.Lock()
"""Held while a thread is started: the size of the next thread's stack is a setting of the whole process."""


class Cancellation:
    """Whether one answer, or one series of computations, is to be cancelled: by the caller's flag or by ``abort``."""

    def __init__(self, flag: CancelFlag | None = None) -> None:
        self.aborted = False
        """Set by ``NativeThread.abort``, which also reaches a computation inside llama.cpp."""
        self._flag = checked_flag(flag)

    def is_requested(self) -> bool:
        """Whether the caller's flag is set or ``abort`` was called."""
        return self.aborted or (self._flag is not None and self._flag.is_set())

    def stops_with(self, other: Cancellation) -> bool:
        """Whether the computation of this one is to stop, now that ``other`` is aborted."""
        return other is self


class SharedCancellation(Cancellation):
    """Of one computation for several answers: it is to be cancelled when all of ``members`` are."""

    def __init__(self) -> None:
        super().__init__()
        self.members: tuple[Cancellation, ...] = ()

    def is_requested(self) -> bool:
        """Whether ``abort`` was called, or all members are requested."""
        return self.aborted or (bool(self.members) and all(member.is_requested() for member in self.members))

    def stops_with(self, other: Cancellation) -> bool:
        """Whether ``other`` is this one, or a member of which all are aborted."""
        members = self.members
        return other is self or (other in members and all(member.aborted for member in members))


class Job(Protocol):
    """Work for the native thread. ``run`` raises nothing; when the thread ends first, ``fail`` is called instead."""

    @property
    def cancellation(self) -> Cancellation: ...

    def run(self) -> None: ...

    def fail(self, error: EngineError) -> None: ...


class NativeThread:
    """Runs jobs one after another, in the order of ``submit``, until ``close``; then calls ``at_end`` once.

    ``abort_flag`` is a buffer; when its first byte is not zero, llama.cpp aborts the computation that runs.
    ``at_loss`` is called instead of ``at_end``, with what llama.cpp said, when it has given up; it must not call it.
    ``has_team`` tells whether ggml computes for this thread with threads of its own. ``stack_bytes`` is the stack that
    it should have; 0 is the system's default.
    """

    def __init__(
        self,
        name: str,
        abort_flag: ctypes.Array[ctypes.c_char],
        at_end: Callable[[], None],
        at_loss: Callable[[str], None] = lambda message: None,
        *,
        has_team: bool = True,
        stack_bytes: int = 0,
    ) -> None:
        self.name = name
        self.closed = False
        self._abort_flag = abort_flag
        self._lock = threading.Condition()
        self._jobs: deque[Job] = deque()
        self._running: Cancellation | None = None
        self._running_job: Job | None = None
        self._loss = ""
        self._is_lost_here = False
        """Whether llama.cpp has given up in this thread or in one that it leads, and not in its companion."""
        self._at_loss = at_loss
        self._has_team = has_team
        self._at_end: Callable[[], None] | None = at_end
        self._process = os.getpid()
        kind = "native" if has_team else "text"
        self._thread = threading.Thread(target=self._work, name=f"ggufmoe-{kind}", daemon=True)
        self.stack_bytes = _start(self._thread, stack_bytes)
        """The stack that it has; 0 is the system's default."""
        _open_threads()[next(_numbers)] = self

    def companion(self) -> NativeThread:
        """A second thread, for short calls about the same model. When llama.cpp gives up there, this one is lost too.

        A job that runs in this one then goes on, and no other begins. Close the second thread before this one, whose
        ``at_end`` frees the model.
        """
        at_loss = partial(self._lose, fails_running=False)
        flag = ctypes.create_string_buffer(1)
        return NativeThread(self.name, flag, lambda: None, at_loss, has_team=False, stack_bytes=TEXT_STACK_BYTES)

    @property
    def is_busy(self) -> bool:
        """Whether a job runs now."""
        return self._running is not None

    @property
    def has_waiting_jobs(self) -> bool:
        """Whether a job waits for the one that runs now."""
        return bool(self._jobs)

    @property
    def is_lost(self) -> bool:
        """Whether llama.cpp has given up in this thread or in its companion."""
        return bool(self._loss)

    def submit(self, job: Job) -> None:
        """Queue a job. Raises EngineError once closed, and in a process that was forked afterwards.

        Raises EngineLostError once llama.cpp has given up.
        """
        self.check_not_forked()
        with self._lock:
            self.check_usable()
            self._jobs.append(job)
            self._lock.notify()

    def check_usable(self) -> None:
        """Raise EngineError once closed, EngineLostError once llama.cpp has given up."""
        if self.closed:
            raise self._closed_error()
        if self._loss:
            raise self._lost_error()

    def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the native thread after all earlier jobs; return its result or raise its exception.

        Raises EngineError in the native thread itself, which would wait for itself.
        """
        queued = self._queue(function, Cancellation())
        with self._aborted_on_error(queued):
            while not queued.done.wait(_WAIT_S):
                self.abort_if_requested(queued.cancellation)
        return queued.result()

    def call_until_cancelled(self, function: Callable[[], T | None], cancellation: Cancellation) -> T | None:
        """Run ``function`` like ``call``, but return None within ``LEAVE_S`` once ``cancellation`` is requested.

        Then ``function`` may still be inside llama.cpp, and the next job waits for it; or its turn had not come, and it
        will not be called.
        """
        self.abort_if_requested(cancellation)
        queued = self._queue(lambda: None if cancellation.aborted else function(), cancellation)
        leave_at = math.inf
        with self._aborted_on_error(queued):
            while not queued.done.wait(WATCH_S):
                if self.abort_if_requested(cancellation):
                    leave_at = min(leave_at, time.monotonic() + LEAVE_S)
                if time.monotonic() >= leave_at:
                    return None
        return queued.result()

    def abort_if_requested(self, cancellation: Cancellation) -> bool:
        """Abort ``cancellation``, and the running job, each if it is requested; return whether the former is aborted.

        A caller's flag by itself does not reach llama.cpp: some thread has to call this. The reader of the job that
        runs may be busy elsewhere, so every waiting thread looks after that job too.
        """
        for candidate in (cancellation, self._running):
            if candidate is not None and not candidate.aborted and candidate.is_requested():
                self.abort(candidate)
        return cancellation.aborted

    def abort(self, cancellation: Cancellation) -> None:
        """Stop the job of ``cancellation``: before it begins, or inside a computation of llama.cpp."""
        if self.is_forked:
            cancellation.aborted = True
            return
        with self._lock:
            cancellation.aborted = True
            if self._running is not None and self._running.stops_with(cancellation):
                self._abort_flag[0] = b"\x01"

    @property
    def is_current(self) -> bool:
        """Whether this is called in the native thread."""
        return threading.current_thread() is self._thread

    def check_not_native_thread(self) -> None:
        """Raise EngineError when called in the native thread, which must not wait for itself."""
        if self.is_current:
            raise EngineError(f"{self.name}: an engine cannot be used from inside its own callbacks")

    def close(self) -> None:
        """Abort the running job, fail the queued ones and wait for the thread's end.

        May be called again, and from any thread. A thread in which llama.cpp has given up is left behind.
        """
        if self.is_forked:
            self.closed = True
            return
        with self._lock:
            self.closed = True
            if self._running is not None:
                self._running.aborted = True
            self._abort_flag[0] = b"\x01"
            self._lock.notify()
        if self.is_current:
            return
        while self._thread.is_alive() and not self._is_lost_here:  # llama.cpp may give up meanwhile
            self._thread.join(_WAIT_S)

    @property
    def is_forked(self) -> bool:
        """Whether this process was forked from that of the thread: it lacks the thread, and locks may stay held."""
        return os.getpid() != self._process

    def check_not_forked(self) -> None:
        """Raise EngineError in a process that was forked after the thread was started."""
        if self.is_forked:
            raise EngineError(f"{self.name}: loaded before this process was forked; load it again in here")

    def _queue(self, function: Callable[[], T], cancellation: Cancellation) -> _QueuedCall[T]:
        self.check_not_native_thread()
        queued = _QueuedCall(function, cancellation)
        self.submit(queued)
        return queued

    @contextmanager
    def _aborted_on_error(self, queued: _QueuedCall[T]) -> Iterator[None]:
        try:
            yield
        except BaseException:  # Ctrl-C: nobody will use the result
            self.abort(queued.cancellation)
            raise

    def _lost_error(self) -> EngineLostError:
        return EngineLostError(
            f"{self.name}: llama.cpp has given up: {self._loss}; this engine is lost, load the model again"
        )

    def lose(self, message: str) -> None:
        """Fail all jobs, now and later, because llama.cpp has given up in this thread, or in one that it leads.

        Nothing is freed. Called by the thread in which that happened, which will do nothing else.
        """
        self._lose(message, fails_running=True)

    def _lose(self, message: str, *, fails_running: bool) -> None:
        with self._lock:
            self._is_lost_here = self._is_lost_here or fails_running
            if self._loss:
                return
            self._loss = one_line(message, None) or "it gave no reason"
            failed = list(self._jobs)
            self._jobs.clear()
            if fails_running and self._running_job is not None:
                failed.insert(0, self._running_job)
                self._running = self._running_job = None
        self._at_loss(self._loss)
        for job in failed:
            job.fail(self._lost_error())

    def _closed_error(self) -> EngineError:
        return EngineError(f"the engine of {self.name} has been closed")

    def _work(self) -> None:
        with abort_watch().computing(self.lose, lambda: self._has_team and self.is_busy):
            self._work_until_closed()

    def _work_until_closed(self) -> None:
        while (job := self._next_job()) is not None:
            job.run()
            del job  # what it refers to must not live until the next one comes
        for waiting in self._jobs:
            waiting.fail(self._closed_error())
        self._jobs.clear()
        at_end, self._at_end = self._at_end, None
        if at_end is not None and not self._loss:
            at_end()

    def _next_job(self) -> Job | None:
        with self._lock:
            self._running = self._running_job = None
            while not self._jobs and not self.closed:
                self._lock.wait()
            if self.closed:
                return None
            job = self._jobs.popleft()
            self._running, self._running_job = job.cancellation, job
            self._abort_flag[0] = b"\x01" if job.cancellation.aborted else b"\x00"
            return job


def _start(thread: threading.Thread, stack_bytes: int) -> int:
    """Start ``thread`` with as large a stack as the system gives; return its size, 0 for the default."""
    with _start_lock:
        for size in (stack_bytes, stack_bytes // 16) if stack_bytes else ():
            with contextlib.suppress(ValueError, RuntimeError):  # not a size for this system, or not so much memory
                before = threading.stack_size(size)  # without an argument it would set the size to 0
                try:
                    thread.start()
                finally:
                    threading.stack_size(before)
                return size
        thread.start()
        return 0


class _QueuedCall(Generic[T]):
    """A function that the native thread will run, and its result or exception."""

    def __init__(self, function: Callable[[], T], cancellation: Cancellation) -> None:
        self.cancellation = cancellation
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
def _open_threads() -> weakref.WeakValueDictionary[int, NativeThread]:
    """The native threads of this process in the order of their start, by number.

    All are closed at the interpreter's end, as native code would crash after it; the newest first, so that a companion
    has ended before the model is freed.
    """
    threads: weakref.WeakValueDictionary[int, NativeThread] = weakref.WeakValueDictionary()

    def close_all() -> None:
        for _, thread in sorted(threads.items(), reverse=True):
            with contextlib.suppress(RuntimeError):
                thread.close()

    atexit.register(close_all)
    return threads
