"""Events on their way from the thread that makes them to the one that reads them.

Between two tokens no core is idle and the weights have pushed everything else out of the processor's caches, so this is
made of C's deque and queue, and a reader is woken only while it waits: ``threading.Condition`` costs ten times as much.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from queue import Empty, SimpleQueue

from ggufmoe.runtime.events import Event

_WAKE_S = 1 / 60
"""A waiting reader is woken at most so often, which is as often as screens change, unless there is much to read: woken
for each token of a small model, it would take a core from the next one."""
_MUCH = 8


class Inbox:
    """Events in order, from one thread to one reader."""

    def __init__(self) -> None:
        self._events: deque[Event] = deque()
        self._signals: SimpleQueue[None] = SimpleQueue()
        self._reader_waits = False
        self._woken_at = 0.0

    def __len__(self) -> int:
        return len(self._events)

    def put(self, event: Event) -> None:
        """Hand over an event. A reader who has just been woken finds it with the next one, or when its wait ends."""
        self._events.append(event)
        if self._reader_waits and (len(self._events) >= _MUCH or time.perf_counter() - self._woken_at >= _WAKE_S):
            self.wake()

    def wake(self) -> None:
        """Have the reader look again, whether there are events or not."""
        if self._reader_waits:
            self._reader_waits = False
            self._woken_at = time.perf_counter()
            self._signals.put(None)

    def take(self) -> list[Event]:
        """All events that are there, perhaps none."""
        events, taken = self._events, []
        while events:
            taken.append(events.popleft())
        return taken

    def wait(self, seconds: float) -> None:
        """Until an event is there, or ``wake`` is called, or that time has passed."""
        self._reader_waits = True
        if not self._events:  # one may have come before it was known that anybody waits
            with contextlib.suppress(Empty):
                self._signals.get(timeout=seconds)
        self._reader_waits = False
