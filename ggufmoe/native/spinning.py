"""How the threads that compute a graph wait for each other: their spinning, shortened while the machine is busy.

llama.cpp's threads spin for some 3 ms at every barrier before they sleep, and a graph has hundreds of barriers: beside
another program that computes, a thread that waits burns the time that the thread it waits for needs, and generation
falls to a tenth or less. ``SpinLimit`` shortens spinning once the kernel has reported that the threads that compute
wait for a processor: on an idle machine nothing changes, and no environment variable is read or set. Short spinning
makes threads sleep and wake, and so wait, by itself: to see whether the machine is still busy, spinning is given back
for one look from time to time.

The portable engine (``scripts/engine_wheel``) has a function for it. Other engines compute with libgomp on Linux, which
spins 3000 times shorter whenever it manages more threads than there are processors (``gomp_throttled_spin_count_var``,
libgomp/config/linux/wait.h of GCC): a second, sleeping team of threads brings that about. Elsewhere ``SpinLimit`` does
nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Callable

from ggufmoe.native import library as native

_LOOK_S = 0.2
"""Seconds between two looks at how long threads waited for a processor."""
_BUSY = 0.4
"""A busy machine: the threads that compute waited together for this part of the time that has passed.

Measured with two threads on two cores: below 0.2 on an idle machine, mostly below 0.16 beside programs of the lowest
priority, and 0.1 to 0.25 in a server whose clients run on the same machine: there long spinning is faster. 0.8 to 1.1
beside one busy loop or two.
"""
_BUSY_LOOKS = 2
"""Looks in a row that must find the machine busy: short spinning halves the speed of a machine that is not.

One is enough where it was busy before."""
_SHORT_S, _MAX_SHORT_S = 5.0, 10.0
"""Seconds of short spinning once the machine was found busy; doubled, up to the last, while it stays busy.

The look that follows takes 2 % of ten seconds; a machine that is idle again is noticed within them."""
_MAX_TEAM = 64
"""A larger machine is a server, and often a container on one that may have fewer threads than it has processors."""
_LOOKS_AT_SAME_THREADS = 10
"""A list of all threads takes as long as many looks at two of them."""
_TASKS = "/proc/self/task"
"""A directory for each thread of this process."""
_logger = logging.getLogger("ggufmoe")


class SpinLimit:
    """Shortens the spinning of llama.cpp's threads while ``look``, called between computations, finds the machine busy.

    ``run_delay_s`` and ``clock_s`` are the kernel's account of waiting and the time, both in seconds. ``close`` it.
    """

    def __init__(
        self,
        run_delay_s: Callable[[], float | None] | None = None,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run_delay_s = run_delay_s or _RunDelay()
        self._clock_s = clock_s
        self._shorten = _way_to_shorten()
        self._looked_s = -math.inf
        self._waited_s: float | None = None
        self._n_busy = 0
        """Looks in a row that found the machine busy."""
        self._short_s = _SHORT_S
        self._short_until_s = -math.inf
        self._shortened: _SleepingTeam | _PoolLimit | None = None

    @property
    def is_short(self) -> bool:
        """Whether spinning is shortened now."""
        return self._shortened is not None

    def look(self) -> None:
        """Called by the thread that runs llama.cpp, between two computations: shorten spinning, or give it back."""
        if self._shorten is None:
            return
        now = self._clock_s()
        if self._shortened is not None:
            if now < self._short_until_s:
                return
            self.close()
            self._n_busy = _BUSY_LOOKS - 1
            self._looked_s, self._waited_s = now, self._run_delay_s()
        elapsed_s = now - self._looked_s
        if elapsed_s < _LOOK_S:
            return
        before_s, waited_s = self._waited_s, self._run_delay_s()
        self._looked_s, self._waited_s = now, waited_s
        if before_s is None or waited_s is None or waited_s - before_s <= _BUSY * elapsed_s:
            self._n_busy, self._short_s = 0, _SHORT_S
            return
        self._n_busy += 1
        if self._n_busy < _BUSY_LOOKS:
            return
        self._n_busy = 0
        try:
            self._shortened = self._shorten()
        except RuntimeError as error:
            _logger.debug("waiting threads spin as long as libgomp wants: %s", error)
            self._shorten = None
        self._short_until_s = now + self._short_s
        self._short_s = min(2 * self._short_s, _MAX_SHORT_S)

    def close(self) -> None:
        """Give spinning back."""
        if self._shortened is not None:
            self._shortened.end()
            self._shortened = None


def _way_to_shorten() -> Callable[[], _SleepingTeam | _PoolLimit] | None:
    if hasattr(native.library(), "ggufmoe_shorten_spins"):
        return _PoolLimit
    libgomp = loaded_libgomp()
    return None if libgomp is None else lambda: _SleepingTeam(libgomp)


class _PoolLimit:
    """A wish that the threads of the portable engine's pools spin shortly; they do while there is one."""

    def __init__(self) -> None:
        # void ggufmoe_shorten_spins(int change) (vendor/portable.patch)
        native.library().ggufmoe_shorten_spins(1)

    def end(self) -> None:
        """Take the wish back."""
        native.library().ggufmoe_shorten_spins(-1)


class _SleepingTeam:
    """As many OpenMP threads as there are processors, which do nothing. Ends with the Python thread that leads it.

    Raises RuntimeError where so many threads cannot be made: libgomp itself would end the process there.
    """

    def __init__(self, libgomp: ctypes.CDLL) -> None:
        self._libgomp = libgomp
        self._n_threads = int(libgomp.omp_get_num_procs())
        if self._n_threads > _MAX_TEAM:
            raise RuntimeError(f"{self._n_threads} processors")
        _check_threads_can_be_made(self._n_threads + 1)
        self._is_over = threading.Event()
        self._is_there = threading.Event()
        self._leader = threading.Thread(target=self._lead, name="ggufmoe-openmp", daemon=True)
        self._leader.start()
        self._is_there.wait()

    def _lead(self) -> None:
        # void GOMP_parallel (void (*fn) (void *), void *data, unsigned num_threads, unsigned flags)
        text = ctypes.create_string_buffer(1)
        strlen = ctypes.cast(ctypes.CDLL(None).strlen, ctypes.c_void_p)
        parallel = self._libgomp.GOMP_parallel
        parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
        parallel.restype = None
        try:
            parallel(strlen, ctypes.addressof(text), self._n_threads, 0)
        finally:
            self._is_there.set()
        self._is_over.wait()

    def end(self) -> None:
        """End the team's threads; returns when they are gone."""
        self._is_over.set()
        self._leader.join()


def _check_threads_can_be_made(number: int) -> None:
    """Make ``number`` threads and end them again. Raises RuntimeError if the system does not allow so many."""
    end = threading.Event()
    made: list[threading.Thread] = []
    try:
        for _ in range(number):
            made.append(threading.Thread(target=end.wait, name="ggufmoe-openmp-check", daemon=True))
            made[-1].start()
    finally:
        end.set()
        for thread in made:
            if thread.ident is not None:
                thread.join()


def loaded_libgomp() -> ctypes.CDLL | None:
    """The libgomp that is loaded in this process, if one is."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        found = ctypes.CDLL("libgomp.so.1", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None
    return found if hasattr(found, "GOMP_parallel") else None


class _RunDelay:
    """Asks the kernel how long the thread that asks and those of llama.cpp have waited for a processor.

    Second field of ``/proc/PID/task/TID/schedstat`` (Documentation/scheduler/sched-stats.rst of Linux). Other threads
    of Python do not count: those of a server wait for the threads that compute, which says nothing of other programs.
    """

    def __init__(self) -> None:
        self._waited_ns: dict[str, int | None] = {}
        """By the file of each thread, what it told last; None before the first time."""
        self._n_asked = 0
        self._total_ns = 0

    def __call__(self) -> float | None:
        """Seconds since the first call, of the threads that were there; None where the kernel does not tell."""
        if self._n_asked % _LOOKS_AT_SAME_THREADS == 0:
            self._waited_ns = {name: self._waited_ns.get(name) for name in _compute_threads()}
        self._n_asked += 1
        n_told = 0
        for name, before_ns in self._waited_ns.items():
            # a thread may have ended meanwhile
            with contextlib.suppress(OSError, ValueError, IndexError), open(name, "rb", buffering=0) as file:
                now_ns = int(file.read(64).split()[1])
                self._total_ns += 0 if before_ns is None else now_ns - before_ns
                self._waited_ns[name] = now_ns
                n_told += 1
        return self._total_ns / 1e9 if n_told else None


def _compute_threads() -> list[str]:
    """The files of the thread that calls this, and of those that Python does not know: llama.cpp's."""
    others = {str(thread.native_id) for thread in threading.enumerate()} - {str(threading.get_native_id())}
    try:
        tasks = os.listdir(_TASKS)
    except OSError:
        return []
    return [f"{_TASKS}/{task}/schedstat" for task in tasks if task not in others]
