"""Reading a blocking iterator of events with ``async for``: a thread reads it and passes events to the event loop.

It works for any iterator of events, and knows nothing of engines.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import ClassVar, Generic, TypeVar

from ggufmoe.work import CancelFlag

EventT = TypeVar("EventT")

_MAX_WAITING_EVENTS = 32
_GATHER_S = 0.002
"""What comes within this time of an event is passed on with it: waking an event loop costs more than a small event."""
_AT_ONCE_EVENTS = 4
"""So many events at the beginning of a stream are not delayed: the time to the first token is what people wait for."""


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
        self._gathering = _Gathering.of(loop)
        self._n_read = 0
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
        self._n_read += 1
        if self._n_read <= _AT_ONCE_EVENTS:
            self._wake()
        elif is_first:
            self._gathering.wake_soon(self._arrived)
        return not self._stopped

    def _wake(self) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            self._loop.call_soon_threadsafe(self._arrived.set)


class _Gathering:
    """Wakes the readers of all streams in one event loop together, ``_GATHER_S`` after the first of their events."""

    _of_loops: ClassVar[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Gathering]] = weakref.WeakKeyDictionary()

    @classmethod
    def of(cls, loop: asyncio.AbstractEventLoop) -> _Gathering:
        """The one of ``loop``; called in the loop."""
        return cls._of_loops.setdefault(loop, cls(loop))

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._lock = threading.Lock()
        self._waiting: list[asyncio.Event] = []

    def wake_soon(self, reader: asyncio.Event) -> None:
        """Set ``reader`` in the loop. May be called from any thread."""
        with self._lock:
            self._waiting.append(reader)
            if len(self._waiting) > 1:
                return
        loop = self._loop()
        if loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(loop.call_later, _GATHER_S, self._wake)

    def _wake(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        for reader in waiting:
            reader.set()
