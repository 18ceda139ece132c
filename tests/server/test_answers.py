"""Events of several answers on their way to clients: what is joined, and that every stream gets all of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

from ggufmoe.runtime.asyncstream import read_async
from ggufmoe.runtime.events import NO_TIMING, Finished, Reasoning, RoutedToken, Timing, Token
from ggufmoe.server.answers import AnswerEvent, JoinedTokens, Start, begun, told_number
from ggufmoe.server.apierror import ApiError
from ggufmoe.work import CancelFlag


class Silent:
    """A completion that sends nothing."""

    has_named_events = False

    def __init__(self, starts: Sequence[Start]) -> None:
        self.starts = starts

    def opening(self) -> list[dict[str, Any]]:
        return []

    def chunks(self, index: int, event: AnswerEvent) -> list[dict[str, Any]]:
        del index, event
        return []

    def closing(self) -> list[dict[str, Any]]:
        return []

    def whole(self) -> dict[str, Any]:
        return {}

    def failed(self, error: ApiError) -> dict[str, Any]:
        return error.to_dict()

    def timings(self) -> list[Timing]:
        return []


def batches_of(events: list[AnswerEvent]) -> list[AnswerEvent]:
    """What the reader of an answer gets that gives ``events`` at once."""

    def start(cancel: CancelFlag) -> Iterator[AnswerEvent]:
        del cancel
        yield from events

    async def read() -> list[AnswerEvent]:
        async with begun(lambda cancel: Silent([start])) as (_, batches):
            return [event async for index, batch in batches if index == 0 for event in batch]

    return asyncio.run(read())


def test_neighbouring_tokens_become_one() -> None:
    end = Finished("", "stop", NO_TIMING, 0)
    found = batches_of([*(Token(str(n), n) for n in range(100)), Reasoning("hm"), Token("a", 1), Token("b", 2), end])
    assert len(found) < 60
    tokens = found[: found.index(Reasoning("hm"))]
    assert sum(event.n_tokens if isinstance(event, JoinedTokens) else 1 for event in tokens) == 100
    assert "".join(event.text for event in found) == "".join(map(str, range(100))) + "ab"
    assert found[-1] is end
    last = found[-2]
    assert isinstance(last, Token)
    assert last.token_id == 2
    assert told_number(JoinedTokens("ab", 2, n_tokens=2)) == {"n_tokens": 2}
    assert told_number(end) == told_number(Token("a", 1)) == {}


def test_tokens_that_tell_more_than_text_stay_single() -> None:
    scored = [Token("a", n, -0.5, ((n, -0.5),)) for n in range(20)]
    routed = [RoutedToken("a", n, expert_weights=(1.0,)) for n in range(20)]
    assert batches_of([*scored, *routed]) == [*scored, *routed]


def test_streams_that_come_together_each_get_all_of_their_own() -> None:
    def start(first: int) -> Iterator[int]:
        yield from range(first, first + 200)

    async def read(first: int) -> list[int]:
        return [number async for number in read_async(lambda cancel: start(first))]

    async def read_all() -> list[list[int]]:
        return await asyncio.gather(*(read(1000 * n) for n in range(8)))

    for _ in range(2):  # each in an event loop of its own
        assert asyncio.run(read_all()) == [list(range(1000 * n, 1000 * n + 200)) for n in range(8)]
