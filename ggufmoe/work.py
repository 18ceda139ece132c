"""Long calls: their progress, their cancelling, and work over many bytes; cores and memory of the machine.

Every public function that can take long has the same two arguments: ``on_progress``, called with a ``Progress``, and
``cancel``, a ``CancelFlag``.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from ggufmoe.errors import Cancelled

Unit = Literal["bytes", "tokens", "chunks", "layers", "parts", "runs"]
"""What ``Progress`` counts."""


class CancelFlag(Protocol):
    """What can ask a long call to stop, for example a ``threading.Event``."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True)
class Progress:
    """One report of a long call: ``done`` of ``total`` units of ``phase`` are finished.

    ``phase`` is one word for the kind of work ("load", "router", "write", "hash", "chunks"); ``item`` names what is
    being worked on, for example a tensor; ``result`` is what is known so far, where partial results exist.
    """

    phase: str
    done: float
    total: float
    unit: Unit
    item: str = ""
    result: object = None


OnProgress = Callable[[Progress], None]

_WAIT_S = 0.1

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Work:
    """Progress and cancelling of one long call, shared by all threads that work on it.

    ``phase``, ``total`` and ``unit`` are those of its ``Progress`` reports; ``stopped`` is the message of Cancelled.
    """

    def __init__(
        self,
        phase: str,
        total: float,
        unit: Unit = "bytes",
        *,
        stopped: str = "stopped",
        on_progress: OnProgress | None = None,
        cancel: CancelFlag | None = None,
    ) -> None:
        self._phase, self._total, self._unit = phase, total, unit
        self._stopped = stopped
        self._on_progress = on_progress
        self._cancel = cancel
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        self._done: float = 0

    def is_stopping(self) -> bool:
        """Whether ``check`` raises."""
        return self._failure is not None or is_set(self._cancel)

    def check(self) -> None:
        """Raise Cancelled if ``cancel`` is set, or if another thread of ``map`` has failed."""
        if self.is_stopping():
            raise Cancelled(self._stopped)

    def advance(self, amount: float, item: str) -> None:
        """Add ``amount`` finished units and report them with the name of the finished ``item``. Thread-safe.

        ``on_progress`` is never called by two threads at once.
        """
        with self._lock:
            self._done += amount
            if self._on_progress is not None:
                self._on_progress(Progress(self._phase, self._done, self._total, self._unit, item))

    def map(
        self, function: Callable[[ItemT], ResultT], items: Sequence[ItemT], threads: int | None = None
    ) -> list[ResultT]:
        """Call ``function`` with every item on several threads; return the results in the order of the items.

        ``threads`` is None for all usable cores. Items are begun in their order: with the largest first, no thread is
        left alone with a large one at the end. ``function`` calls ``check`` often. Raises what ``function`` raises;
        no item is begun after that, and the other threads stop at their next ``check``.
        """
        n_threads = min(thread_count(threads), len(items))
        if n_threads < 2:
            return [function(item) for item in items]
        with ThreadPoolExecutor(n_threads) as pool:
            futures = [pool.submit(self._begin, function, item) for item in items]
            try:
                pending = {*futures}
                while pending:
                    # Windows delivers Ctrl-C only between two waits
                    ended, pending = wait(pending, _WAIT_S, FIRST_EXCEPTION)
                    for future in ended:
                        future.result()
                return [future.result() for future in futures]
            except BaseException as error:
                cause = self._fail(error)
                pool.shutdown(wait=False, cancel_futures=True)
                if isinstance(error, Cancelled) and error is not cause:  # a thread that stopped for another's error
                    raise cause from None
                raise

    def _begin(self, function: Callable[[ItemT], ResultT], item: ItemT) -> ResultT:
        """Call ``function`` in a thread of ``map``, which takes no further item once one has failed."""
        self.check()
        try:
            return function(item)
        except BaseException as error:
            self._fail(error)
            raise

    def _fail(self, error: BaseException) -> BaseException:
        """Let every ``check`` raise from now on. Return the first error that did so."""
        with self._lock:
            self._failure = self._failure or error
            return self._failure


def is_set(cancel: CancelFlag | None) -> bool:
    """Whether a flag that may be absent is set."""
    return cancel is not None and cancel.is_set()


def checked_flag(flag: CancelFlag | None) -> CancelFlag | None:
    """Return ``flag``. Raise TypeError if it has no ``is_set``."""
    if flag is not None and not callable(getattr(flag, "is_set", None)):
        raise TypeError(f"cancel must be a flag such as threading.Event(), not {flag!r}")
    return flag


def thread_count(threads: int | None) -> int:
    """Number of threads for work that computes: as many as asked for, or one for each usable core."""
    return threads or usable_cores()


def usable_cores() -> int:
    """Number of logical cores that this process may run on (its affinity where the system has one); at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int:
    """Physical memory of this machine; 0 if the system does not tell."""
    if sys.platform != "linux":
        import psutil

        return psutil.virtual_memory().total
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0
