"""What happens when llama.cpp gives up: its message becomes an error of one engine, and the process goes on.

ggml calls ``abort`` where an assertion fails, and C++ ends the process where an exception has no handler. Both can be
told to call a function first, for the whole process. Ours tells the engine in whose computation it happened, and never
returns: that thread waits for ever, and what it holds is lost. Nothing is printed and no debugger is started, which
ggml would do by itself. Source: ``ggml_abort`` of ggml.c and ggml.cpp (commit 0c1e57098).
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

from ggufmoe.native import library as native
from ggufmoe.native.spinning import loaded_libgomp
from ggufmoe.native.wording import abort_message

OnAbort = Callable[[str], None]

_ABORT_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
"""typedef void (*ggml_abort_callback_t)(const char * error_message)"""
_TERMINATE_HANDLER = ctypes.CFUNCTYPE(None)
_SET_TERMINATE = ("ggufmoe_set_terminate", "_ZSt13set_terminatePFvvE")
"""``std::set_terminate`` of the portable engine, whose libraries have a C++ library each, or of a shared one."""
_EXCEPTION_TYPE = ("ggufmoe_current_exception_type", "__cxa_current_exception_type")
"""Likewise for the type of the exception that has no handler."""
_STATIC_SCHEDULE = 1
"""omp_sched_static"""
_FIRST_MARK = 2**20
"""Larger than any chunk size that a program asks OpenMP for."""


class AbortWatch:
    """Delivers aborts of llama.cpp to the engine whose computation caused them. One per process: ``abort_watch``."""

    def __init__(self) -> None:
        self.is_disabled = False
        """Set this before ``attach`` in a process that exists for one engine: it ends with the engine."""
        self._lock = threading.Lock()
        self._owners: dict[int, _Owner] = {}
        self._marks = itertools.count(_FIRST_MARK)
        self._kept: list[Any] = []
        self._told: set[int] = set()
        """Marks of the owners that have been told of an abort."""

    def attach(self) -> None:
        """Install handlers for ggml's aborts and unhandled C++ exceptions, for the rest of the process."""
        if self.is_disabled or self._kept:
            return
        library = native.library()
        on_abort = _ABORT_CALLBACK(lambda message: self._aborted((message or b"").decode("utf-8", "replace")))
        self._kept.append(on_abort)
        # ggml_abort_callback_t ggml_set_abort_callback(ggml_abort_callback_t callback)
        set_callback = _ABORT_SETTER(("ggml_set_abort_callback", library))
        set_callback(on_abort)
        name = next((name for name in _SET_TERMINATE if hasattr(library, name)), None)
        if name is not None:
            set_terminate = _TERMINATE_SETTER((name, library))
            on_terminate = _TERMINATE_HANDLER(lambda: self._terminated(library))
            self._kept.append(on_terminate)
            set_terminate(on_terminate)

    @contextmanager
    def computing(self, on_abort: OnAbort, is_busy: Callable[[], bool]) -> Iterator[None]:
        """While the block runs, report an abort in this thread, or in a thread that ggml started for it.

        ``on_abort`` is called in the thread that is lost, with what llama.cpp said; it may be called more than once,
        and must not wait. ``is_busy`` tells whether this thread computes at the moment.
        """
        owner = _Owner(on_abort, is_busy, next(self._marks))
        thread = threading.get_ident()
        with self._lock:
            self._owners[thread] = owner
        _mark_team(owner.mark)
        try:
            yield
        finally:
            with self._lock:
                del self._owners[thread]

    def _aborted(self, message: str) -> None:
        owners = self._owners_here()
        said = abort_message(message) or message
        if not owners:  # a thread of the app, which cannot be taken from it: the process ends, without a debugger
            os.write(2, f"llama.cpp ends this process: {said}\n".encode("utf-8", "replace"))
            return
        self._tell(owners, said)
        _wait_for_ever()

    def _terminated(self, library: ctypes.CDLL) -> None:
        owners = self._owners_here()
        said = f"a C++ exception without a handler ({_exception_name(library)})"
        if not owners:
            os.write(2, f"{said} ends this process\n".encode("utf-8", "replace"))
            return
        self._tell(owners, said)
        _wait_for_ever()

    def _tell(self, owners: Sequence[_Owner], said: str) -> None:
        with self._lock:
            self._told.update(owner.mark for owner in owners)
        for owner in owners:
            owner.on_abort(said)

    def _owners_here(self) -> list[_Owner]:
        """The owners to notify of an abort in this thread.

        That is its own owner; none for another Python thread; otherwise the one for which this thread of ggml computes.
        If that is unknown, all that compute; if none does, those that have been told before, whose threads fail one by
        one.
        """
        with self._lock:
            owners = dict(self._owners)
        own = owners.get(threading.get_ident())
        if own is not None:
            return [own]
        if _is_python_thread():
            return []
        mark = _team_mark()
        marked = [owner for owner in owners.values() if owner.mark == mark]
        busy = [owner for owner in owners.values() if owner.is_busy()]
        return marked or busy or [owner for owner in owners.values() if owner.mark in self._told]


_ABORT_SETTER = ctypes.CFUNCTYPE(ctypes.c_void_p, _ABORT_CALLBACK)
_TERMINATE_SETTER = ctypes.CFUNCTYPE(ctypes.c_void_p, _TERMINATE_HANDLER)


@dataclass(frozen=True)
class _Owner:
    on_abort: OnAbort
    is_busy: Callable[[], bool]
    mark: int


@cache
def abort_watch() -> AbortWatch:
    """The watch of this process."""
    return AbortWatch()


def _is_python_thread() -> bool:
    """Whether Python started this thread. For others it keeps a stand-in once they have called a Python function."""
    found = next((thread for thread in threading.enumerate() if thread.ident == threading.get_ident()), None)
    return found is not None and not isinstance(found, threading._DummyThread)


@cache
def explain_bus_errors() -> object:
    """From now on, say in a line why reading a mapped file has ended the process: the system itself says nothing.

    For programs of our own, as it takes the process's handler of SIGBUS. Does nothing where there is no such signal.
    Gives the handler, which must live as long as the process; the cache of this function keeps it.
    """
    number = getattr(signal, "SIGBUS", None)
    if number is None:
        return None

    def end(_signal: int) -> None:
        os.write(2, b"error: a file became shorter, or its disk failed, while it was in use\n")
        os._exit(1)

    # the handler of Python's own signal module runs between two instructions of Python, to which nothing returns
    handler = _SIGNAL_HANDLER(end)
    _SIGNAL_SETTER(("signal", native.c_library()))(number, handler)
    return handler


_SIGNAL_HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
_SIGNAL_SETTER = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, _SIGNAL_HANDLER)


# ---- which engine the threads of ggml compute for
# The portable engine's have a number for it (vendor/portable.patch). An OpenMP team inherits the settings of the thread
# that leads it, so a setting that ggml does not use is the number: the chunk size of ``schedule(runtime)`` loops.


def _mark_team(mark: int) -> None:
    """Mark this thread, and the threads that ggml lets compute for it."""
    library, libgomp = native.library(), loaded_libgomp()
    if hasattr(library, "ggufmoe_set_mark"):
        library.ggufmoe_set_mark(ctypes.c_int(mark))
    elif libgomp is not None:
        libgomp.omp_set_schedule(ctypes.c_int(_STATIC_SCHEDULE), ctypes.c_int(mark))


def _team_mark() -> int:
    library, libgomp = native.library(), loaded_libgomp()
    kind, mark = ctypes.c_int(), ctypes.c_int()
    if hasattr(library, "ggufmoe_mark"):
        return int(library.ggufmoe_mark())
    if libgomp is not None:
        libgomp.omp_get_schedule(ctypes.byref(kind), ctypes.byref(mark))
    return mark.value


def _exception_name(library: ctypes.CDLL) -> str:
    """The mangled name of the exception's type: ``St12out_of_range``."""
    with contextlib.suppress(AttributeError, ValueError):
        # std::type_info * __cxa_current_exception_type(); the name is behind the pointer to its functions
        function = next((name for name in _EXCEPTION_TYPE if hasattr(library, name)), _EXCEPTION_TYPE[-1])
        found = ctypes.CFUNCTYPE(ctypes.c_void_p)((function, library))()
        if found:
            name = ctypes.c_char_p.from_address(found + ctypes.sizeof(ctypes.c_void_p)).value or b""
            return name.decode("utf-8", "replace")
    return "of an unknown type"


def _wait_for_ever() -> None:
    """Never returns, and needs the interpreter no more, which may end meanwhile."""
    if sys.platform == "win32":
        ctypes.WinDLL("kernel32").Sleep(ctypes.c_uint32(0xFFFFFFFF))
        return
    # a signal that is delivered to this thread would end the pause
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    while True:
        native.c_library().pause()
