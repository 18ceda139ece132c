"""A queue of events from the thread that computes to the thread that reads.

It is made for little cost between two tokens, when no core is idle and the weights have displaced everything else from
the processor's caches: it uses ``deque`` and ``SimpleQueue``, which are in C, and wakes the reader only while it waits.
``threading.Condition`` costs ten times as much.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from queue import Empty, SimpleQueue

from ggufmoe.runtime.events import Event

_WAKE_S = 1 / 30
"""Shortest time between two wakings of a waiting reader: two frames of a screen. Each takes a core from computing: on
two cores, one for each token of 16 ms costs some 2 percent of the tokens."""
_MANY_EVENTS = 16
"""So many unread events wake the reader at once."""


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
        """Add an event. A reader that was woken just before is not woken again: its wait ends soon anyway."""
        self._events.append(event)
        if self._reader_waits and (
            len(self._events) >= _MANY_EVENTS or time.perf_counter() - self._woken_at >= _WAKE_S
        ):
            self.wake()

    def wake(self) -> None:
        """End the reader's ``wait``, whether there are events or not."""
        if self._reader_waits:
            self._reader_waits = False
            self._woken_at = time.perf_counter()
            self._signals.put(None)

    def take(self) -> list[Event]:
        """All unread events, perhaps none."""
        events, taken = self._events, []
        while events:
            taken.append(events.popleft())
        return taken

    def wait(self, seconds: float) -> None:
        """Wait until there are events, ``wake`` is called, or ``seconds`` have passed."""
        self._reader_waits = True
        if not self._events:  # one may have come before _reader_waits was set
            with contextlib.suppress(Empty):
                self._signals.get(timeout=seconds)
        self._reader_waits = False
