"""Reading a blocking iterator of events with ``async for``: a thread reads it and passes events to the event loop.

It works for any iterator of events, and knows nothing of engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Generic, TypeVar

from ggufmoe.work import CancelFlag

EventT = TypeVar("EventT")

_MAX_WAITING_EVENTS = 32


async def read_async(
    start: Callable[[CancelFlag], Iterator[EventT]], cancel: CancelFlag | None = None
) -> AsyncIterator[EventT]:
    """The events of the iterator ``start(flag)``. The flag is set when ``cancel`` is, and when this one is closed.

    Exceptions of ``start`` and of the iterator are raised here. When this ends, also by ``aclose`` or because the task
    was cancelled, that iterator has been closed.
    """
    async with pumped(start, cancel) as pump:
        while (events := await pump.take()) is not None:
            for event in events:
                yield event


@contextlib.asynccontextmanager
async def pumped(
    start: Callable[[CancelFlag], Iterator[EventT]], cancel: CancelFlag | None = None
) -> AsyncIterator[EventPump[EventT]]:
    """The same as a pump, whose ``take`` gives all events at once that have come. It stops at the block's end."""
    pump = EventPump(start, cancel, asyncio.get_running_loop())
    try:
        yield pump
    finally:
        await pump.stop()


async def call_async(function: Callable[[CancelFlag], EventT], cancel: CancelFlag | None = None) -> EventT:
    """What ``function(flag)`` gives, called in a thread of its own. The flag is set as for ``read_async``."""
    async with contextlib.aclosing(read_async(lambda flag: iter([function(flag)]), cancel)) as found:  # type: ignore[type-var]
        return await anext(found)


class EventPump(Generic[EventT]):
    """A thread that reads events, and a queue of a few events from it to the event loop."""

    def __init__(
        self,
        start: Callable[[CancelFlag], Iterator[EventT]],
        cancel: CancelFlag | None,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self._start = start
        self._cancel = cancel
        self._loop = loop
        self._lock = threading.Condition()
        self._events: deque[EventT] = deque()
        self._arrived = asyncio.Event()
        self._stopped = False
        self._ended = False
        self._error: BaseException | None = None
        threading.Thread(target=self._work, name="ggufmoe-async", daemon=True).start()

    def is_set(self) -> bool:
        """Whether the computation should end: the reader has stopped, or the caller's flag is set.

        This makes the pump a ``CancelFlag``; ``start`` is called with it.
        """
        return self._stopped or (self._cancel is not None and self._cancel.is_set())

    async def take(self, wait_s: float | None = None) -> list[EventT] | None:
        """All events that have arrived; an empty list if none came in ``wait_s`` seconds, None after the last.

        Raises the exception of the iterator.
        """
        until_s = math.inf if wait_s is None else self._loop.time() + wait_s
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
            if taken or self._loop.time() >= until_s:
                return taken
            alarm = None if wait_s is None else self._loop.call_at(until_s, self._arrived.set)
            try:
                await self._arrived.wait()
            finally:
                if alarm is not None:
                    alarm.cancel()

    async def stop(self) -> None:
        """Have the thread close the iterator, and wait for that; a task that is cancelled again does not wait."""
        with self._lock:
            self._stopped = True
            self._lock.notify()
        while not self._ended:
            self._arrived.clear()
            if not self._ended:  # the thread may have ended since the first check
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
        except BaseException as error:  # raised in the task that reads
            self._error = error
        with self._lock:
            self._ended = True
        self._wake()

    def _hand_over(self, event: EventT) -> bool:
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
