"""Events reach their reader in order; it is woken when there is something to read, and not more often than it helps."""

from __future__ import annotations

import threading
import time

import pytest

from ggufmoe.runtime import inbox
from ggufmoe.runtime.events import Event, Token
from ggufmoe.runtime.inbox import Inbox
from tests.remote.workers import PATIENT_S, wait_until


def event(number: int) -> Token:
    return Token("", number)


def test_events_are_taken_in_order_and_once() -> None:
    box = Inbox()
    for number in range(3):
        box.put(event(number))
    assert len(box) == 3
    assert box.take() == [event(0), event(1), event(2)]
    assert (box.take(), len(box)) == ([], 0)


def test_nobody_waits_for_what_is_there() -> None:
    box = Inbox()
    box.put(event(0))
    began = time.monotonic()
    box.wait(PATIENT_S)
    assert time.monotonic() - began < PATIENT_S / 2
    assert box.take() == [event(0)]


def test_a_wait_ends_when_its_time_has_passed() -> None:
    box = Inbox()
    began = time.monotonic()
    box.wait(0.05)
    assert 0.05 <= time.monotonic() - began < PATIENT_S
    assert (box.take(), box._reader_waits) == ([], False)


class Reader(threading.Thread):
    """Waits once, for very long."""

    def __init__(self, box: Inbox) -> None:
        super().__init__(daemon=True)
        self._box = box
        self.start()
        wait_until(lambda: box._reader_waits)

    def run(self) -> None:
        self._box.wait(PATIENT_S)

    def has_left(self) -> bool:
        self.join(PATIENT_S / 2)
        return not self.is_alive()


def test_an_event_or_a_call_wakes_who_waits() -> None:
    box = Inbox()
    reader = Reader(box)
    box.put(event(0))
    assert reader.has_left()
    box.take()
    reader = Reader(box)
    box.wake()
    assert reader.has_left()


def test_who_has_just_been_woken_is_left_alone_until_there_is_much(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox, "_WAKE_S", 1000.0)
    box = Inbox()
    box._woken_at = time.perf_counter()
    reader = Reader(box)
    for number in range(inbox._MANY_EVENTS - 1):
        box.put(event(number))
    assert box._reader_waits
    box.put(event(inbox._MANY_EVENTS - 1))
    assert reader.has_left()
    assert len(box.take()) == inbox._MANY_EVENTS


def test_nothing_is_lost_between_two_threads() -> None:
    box, n = Inbox(), 20_000

    def write() -> None:
        for number in range(n):
            box.put(event(number))
        box.wake()

    writer = threading.Thread(target=write)
    writer.start()
    read: list[Event] = []
    began = time.monotonic()
    while len(read) < n and time.monotonic() - began < PATIENT_S / 2:
        box.wait(PATIENT_S)
        read += box.take()
    writer.join()
    assert read == [event(number) for number in range(n)]
