"""Iterators that block, read with ``async for``: what is closed when, and by whom."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest

from ggufmoe.runtime.asyncstream import pumped, read_async
from ggufmoe.runtime.events import Event, Token
from ggufmoe.work import CancelFlag


class Slow:
    """Gives tokens for ever; takes its time to be closed."""

    def __init__(self) -> None:
        self.is_closed = False

    def start(self, flag: CancelFlag) -> Iterator[Event]:
        try:
            while not flag.is_set():
                yield Token("a", 1)
        finally:
            time.sleep(0.1)
            self.is_closed = True


@pytest.mark.parametrize("n_read", [1, 3])
def test_aclose_returns_when_the_iterator_is_closed(n_read: int) -> None:
    slow = Slow()

    async def leave() -> None:
        events = read_async(slow.start)
        for _ in range(n_read):
            await anext(events)
        await events.aclose()  # type: ignore[attr-defined]
        assert slow.is_closed

    asyncio.run(leave())


def test_a_cancelled_task_has_closed_the_iterator() -> None:
    slow = Slow()

    async def read() -> None:
        async for _ in read_async(slow.start):
            pass

    async def leave() -> None:
        task = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert slow.is_closed

    asyncio.run(leave())


def test_an_error_at_the_end_is_raised() -> None:
    def start(_: CancelFlag) -> Iterator[Event]:
        yield Token("a", 1)
        raise ValueError("at the end")

    async def read() -> None:
        async for _ in read_async(start):
            pass

    with pytest.raises(ValueError, match="at the end"):
        asyncio.run(read())


def test_events_that_came_meanwhile_are_taken_at_once() -> None:
    all_given = threading.Event()

    def start(flag: CancelFlag) -> Iterator[Event]:
        del flag
        for number in range(5):
            yield Token(str(number), 1)
        all_given.set()

    async def read() -> list[list[Event]]:
        found = []
        async with pumped(start) as pump:
            await asyncio.to_thread(all_given.wait)
            while (events := await pump.take()) is not None:
                found.append(events)
        return found

    found = asyncio.run(read())
    assert "".join(event.text for events in found for event in events) == "01234"
    assert len(found) == 1


def test_a_reader_that_waits_long_is_told_that_nothing_came() -> None:
    go_on = threading.Event()

    def start(flag: CancelFlag) -> Iterator[Event]:
        del flag
        go_on.wait()
        yield Token("a", 1)

    async def read() -> None:
        async with pumped(start) as pump:
            assert await pump.take(0.01) == []
            go_on.set()
            assert await pump.take() == [Token("a", 1)]
            assert await pump.take(100) is None

    asyncio.run(read())
