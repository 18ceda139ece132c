"""Running long calls from the command line: showing their progress, and stopping them with Ctrl-C.

The one place that handles signals. A call that is asked to stop ends by itself and keeps what it has; a second Ctrl-C
interrupts it at once.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from ggufmoe.cli.progress import ProgressLine
from ggufmoe.work import CancelFlag, OnProgress, Progress

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def run_job(
    job: Callable[[OnProgress, CancelFlag], ResultT], display: ProgressLine, *, gentle: bool = False
) -> ResultT:
    """Return what ``job(on_progress, cancel)`` returns, and show its progress meanwhile.

    Ctrl-C and SIGTERM set ``cancel`` once the job has reported progress, or from the start with ``gentle``; before that
    they raise KeyboardInterrupt, because a job that has not begun has nothing to save.
    """
    interrupt = Interrupt(gentle=gentle)

    def show(progress: Progress) -> None:
        interrupt.be_gentle()
        display.update(progress)

    with interrupt.handled(), display:
        return job(show, interrupt)


def interruptible(start: Callable[[CancelFlag], Iterator[ItemT]]) -> Iterator[ItemT]:
    """The items of ``start(cancel)``, for example the events of an answer.

    The first Ctrl-C sets ``cancel``, after which the items end by themselves; another one raises KeyboardInterrupt.
    """
    interrupt = Interrupt(gentle=True)
    with interrupt.handled(signal.SIGINT):
        yield from start(interrupt)


class Interrupt:
    """A cancel flag that Ctrl-C sets. Until it is gentle, and once it is set, Ctrl-C raises KeyboardInterrupt."""

    def __init__(self, *, gentle: bool = False) -> None:
        self._gentle = gentle
        self._event = threading.Event()

    def is_set(self) -> bool:
        """Whether to stop."""
        return self._event.is_set()

    def be_gentle(self) -> None:
        """From now on the first Ctrl-C sets the flag and raises nothing."""
        self._gentle = True

    @contextlib.contextmanager
    def handled(self, *signals: signal.Signals) -> Iterator[None]:
        """Handle ``signals`` within the block; only the main thread can.

        By default these are SIGINT, SIGTERM and on Windows SIGBREAK, which Ctrl-Break sends.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = signals or (signal.SIGINT, signal.SIGTERM)
        if sys.platform == "win32" and not signals:
            numbers += (signal.SIGBREAK,)
        previous = {number: signal.signal(number, self._stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        if self._event.is_set() or not self._gentle:
            raise KeyboardInterrupt
        self._event.set()
