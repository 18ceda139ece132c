"""The same streams for ``async for``: an iterator that blocks is read in a thread of its own.

Nothing is computed here and nothing is known of engines; whatever gives events can be read this way.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator

from ggufmoe.runtime.events import Event
from ggufmoe.work import CancelFlag

_MAX_WAITING_EVENTS = 32


async def read_async(
    start: Callable[[CancelFlag], Iterator[Event]], cancel: CancelFlag | None = None
) -> AsyncIterator[Event]:
    """The events of ``start(flag)``; the flag is set when ``cancel`` is, or when nobody reads any longer.

    What ``start`` or the iterator raises is raised here. At the end, also by ``aclose`` or a cancelled task, the
    iterator has been closed.
    """
    pump = _Pump(start, cancel, asyncio.get_running_loop())
    try:
        while (events := await pump.take()) is not None:
            for event in events:
                yield event
    finally:
        await pump.stop()


class _Pump:
    """A thread that reads events and hands them to a loop, a few at a time."""

    def __init__(
        self,
        start: Callable[[CancelFlag], Iterator[Event]],
        cancel: CancelFlag | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._start = start
        self._cancel = cancel
        self._loop = loop
        self._lock = threading.Condition()
        self._events: deque[Event] = deque()
        self._arrived = asyncio.Event()
        self._stopped = False
        self._ended = False
        self._error: BaseException | None = None
        threading.Thread(target=self._work, name="ggufmoe-async", daemon=True).start()

    def is_set(self) -> bool:
        """Whether the reader has gone, or wants to stop."""
        return self._stopped or (self._cancel is not None and self._cancel.is_set())

    async def take(self) -> list[Event] | None:
        """The events that are there, at least one; None at the end."""
        while True:
            with self._lock:
                self._arrived.clear()
                taken = list(self._events)
                self._events.clear()
                self._lock.notify()
                if not taken and self._ended:
                    if self._error is not None:
                        raise self._error
                    return None
            if taken:
                return taken
            await self._arrived.wait()

    async def stop(self) -> None:
        """Have the iterator closed, and wait for that; a task that is cancelled once more does not wait."""
        with self._lock:
            self._stopped = True
            self._lock.notify()
        while not self._ended:
            self._arrived.clear()
            if not self._ended:  # it may have come to its end in between
                await self._arrived.wait()

    def _work(self) -> None:
        try:
            with contextlib.ExitStack() as stack:
                events = self._start(self)
                if hasattr(events, "close"):
                    stack.callback(events.close)
                for event in events:
                    if not self._hand_over(event):
                        break
        except BaseException as error:  # it belongs to the task that reads
            self._error = error
        with self._lock:
            self._ended = True
        self._wake()

    def _hand_over(self, event: Event) -> bool:
        with self._lock:
            while len(self._events) >= _MAX_WAITING_EVENTS and not self._stopped:
                self._lock.wait()
            self._events.append(event)
            is_first = len(self._events) == 1
        if is_first:
            self._wake()
        return not self._stopped

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(self._arrived.set)
