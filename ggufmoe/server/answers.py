"""Answers under way: several read side by side, the spelling of their tokens, and their numbers for clients."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from ggufmoe.runtime.asyncstream import EventPump, pumped
from ggufmoe.runtime.events import ChatEvent, Finished, Timing, Token
from ggufmoe.server.apierror import ApiError
from ggufmoe.work import CancelFlag

_MAX_UNREAD_BATCHES = 4
_FIRST_PAUSE_S, _PAUSE_S = 2.0, 10.0
"""After so many seconds without an event of an answer its reader is told: before the first one, and later."""


@dataclass(frozen=True)
class Echo:
    """The prompt as a part of an answer: its text, and its tokens where their probabilities are wanted."""

    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class JoinedTokens(Token):
    """Several tokens that came together, of which only the text is wanted. Its id is that of the last."""

    n_tokens: int = 1


AnswerEvent = ChatEvent | Echo
Start = Callable[[CancelFlag], Iterator[AnswerEvent]]
"""Begins an answer, in a thread of its own; blocks until its first event has come."""


class Completion(Protocol):
    """What a request asks for: answers, and the objects in which they are sent."""

    starts: Sequence[Start]
    has_named_events: bool
    """Whether each object of a stream has a type that names its event; such a stream ends with its last object."""

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        ...

    def chunks(self, index: int, event: AnswerEvent) -> list[dict[str, Any]]:
        """What a stream holds for an event of answer ``index``; must be called with every event."""
        ...

    def closing(self) -> list[dict[str, Any]]:
        """What a stream ends with."""
        ...

    def whole(self) -> dict[str, Any]:
        """The response that is no stream, once all events were passed to ``chunks``."""
        ...

    def failed(self, error: ApiError) -> dict[str, Any]:
        """What a stream ends with after ``error``."""
        ...

    def timings(self) -> list[Timing]:
        """Numbers of the answers that have ended."""
        ...


Batch = tuple[int, Sequence[AnswerEvent]]
"""Events of one answer that came together, after its number; none where nothing has come for a while."""


@asynccontextmanager
async def begun(
    make: Callable[[CancelFlag], Completion],
) -> AsyncIterator[tuple[Completion, AsyncGenerator[Batch, None]]]:
    """The completion that ``make`` gives, and the events of its answers as they come; leaving the block ends them all.

    ``make`` is called in a thread, with a flag that is set when nobody wants its result any more. An answer that is
    alone is read in the same thread: its first token does not wait for another one.
    """

    def work(cancel: CancelFlag) -> Iterator[Any]:
        completion = make(cancel)
        yield completion
        if len(completion.starts) == 1:
            yield from completion.starts[0](cancel)

    async with pumped(work) as pump:
        completion, *first = await pump.take() or []
        alone = len(completion.starts) == 1
        batches = _alone(first, pump) if alone else _side_by_side(completion.starts)
        async with aclosing(batches):
            yield completion, batches


async def _alone(first: Sequence[AnswerEvent], pump: EventPump[AnswerEvent]) -> AsyncGenerator[Batch, None]:
    if first:
        yield 0, _joined(first)
    async for events in _with_pauses(pump, _PAUSE_S if first else _FIRST_PAUSE_S):
        yield 0, events


async def _with_pauses(
    pump: EventPump[AnswerEvent], wait_s: float = _FIRST_PAUSE_S
) -> AsyncGenerator[Sequence[AnswerEvent], None]:
    while (events := await pump.take(wait_s)) is not None:
        wait_s = _PAUSE_S
        yield _joined(events)


def told_number(event: AnswerEvent) -> dict[str, int]:
    """What a chunk tells of the number of its tokens: nothing where it has one."""
    return {"n_tokens": event.n_tokens} if isinstance(event, JoinedTokens) else {}


def _joined(events: Sequence[AnswerEvent]) -> Sequence[AnswerEvent]:
    """``events`` with neighbouring tokens joined, where each tells its text alone: sending costs more than a token."""
    joined: list[AnswerEvent] = []
    plain: list[Token] = []
    for event in (*events, None):
        if type(event) is Token and event.logprob is None:
            plain.append(event)
            continue
        if len(plain) > 1:
            text = "".join(token.text for token in plain)
            joined.append(JoinedTokens(text, plain[-1].token_id, elapsed_s=plain[-1].elapsed_s, n_tokens=len(plain)))
        else:
            joined += plain
        plain = []
        if event is not None:
            joined.append(event)
    return joined


async def _side_by_side(starts: Sequence[Start]) -> AsyncGenerator[Batch, None]:
    arrived: asyncio.Queue[Batch | Exception | None] = asyncio.Queue(_MAX_UNREAD_BATCHES)

    async def read(index: int, start: Start) -> None:
        try:
            async with pumped(start) as pump:
                async for events in _with_pauses(pump):
                    await arrived.put((index, events))
        except Exception as error:
            await arrived.put(error)
        else:
            await arrived.put(None)

    readers = [asyncio.create_task(read(index, start)) for index, start in enumerate(starts)]
    n_open = len(readers)
    try:
        while n_open:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                n_open -= 1
            else:
                yield item
    finally:
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)


class Spelling:
    """The bytes of tokens. They are asked for where answers are read, so that nothing waits in the event loop."""

    def __init__(self, piece: Callable[[int], bytes]) -> None:
        self._piece = piece
        self._known: dict[int, bytes] = {}

    def learn(self, tokens: Iterable[Token]) -> None:
        """Ask for the bytes of tokens and of their alternatives."""
        for token in tokens:
            for token_id in (token.token_id, *(other for other, _ in token.alternatives)):
                if token_id not in self._known:
                    self._known[token_id] = self._piece(token_id)

    def learning(self, events: Iterator[AnswerEvent]) -> Iterator[AnswerEvent]:
        """Yield ``events`` once their tokens are known."""
        for event in events:
            if isinstance(event, Token):
                self.learn([event])
            elif isinstance(event, Echo):
                self.learn(event.tokens)
            yield event

    def bytes_of(self, token_id: int) -> bytes:
        """The bytes of a token that was learnt."""
        return self._known[token_id]

    def text_of(self, token_id: int) -> str:
        """The same as text; bytes that are no UTF-8 by themselves are replaced."""
        return self._known[token_id].decode("utf-8", "replace")

    def probabilities(self, token: Token) -> dict[str, Any]:
        """The probabilities of a token that was learnt, and of its alternatives, in OpenAI's shape."""

        def spelt(token_id: int, logprob: float | None) -> dict[str, Any]:
            return {"token": self.text_of(token_id), "logprob": logprob, "bytes": list(self.bytes_of(token_id))}

        others = [spelt(token_id, logprob) for token_id, logprob in token.alternatives]
        return spelt(token.token_id, token.logprob) | {"top_logprobs": others}


def finish_reason(last: Finished, *, has_calls: bool = False) -> str:
    """Why an answer ended, as OpenAI names it."""
    if last.reason in ("length", "context"):
        return "length"
    return "tool_calls" if has_calls else "stop"


def usage_of(timings: Sequence[Timing], n_same: int = 1) -> dict[str, Any]:
    """The numbers of tokens; each prompt counts once for its ``n_same`` answers."""
    prompts = [timings[begin : begin + n_same] for begin in range(0, len(timings), n_same)]
    n_prompt = sum(same[0].prompt_tokens for same in prompts)
    n_answer = sum(timing.generated_tokens for timing in timings)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_answer,
        "total_tokens": n_prompt + n_answer,
        "prompt_tokens_details": {"cached_tokens": sum(same[0].cached_tokens for same in prompts)},
    }


def timings_of(timing: Timing) -> dict[str, Any]:
    """Times of one answer, under the names of llama-server."""
    return {
        "cache_n": timing.cached_tokens,
        "prompt_n": timing.prompt_tokens - timing.cached_tokens,
        "prompt_ms": round(1000 * timing.prompt_s, 3),
        "prompt_per_second": round(timing.prompt_tokens_per_s, 3),
        "predicted_n": timing.generated_tokens,
        "predicted_ms": round(1000 * timing.generation_s, 3),
        "predicted_per_second": round(timing.generated_tokens_per_s, 3),
    }
