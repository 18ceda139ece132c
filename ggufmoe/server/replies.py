"""Computing a completion and sending it: as one JSON object or as a stream of events (SSE).

Owns how many answers may be under way, and the ends of a request: its client leaves, its time is over, it fails.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import Receive, Scope, Send

from ggufmoe.runtime.asyncstream import call_async
from ggufmoe.server.answers import Batch, Completion, begun
from ggufmoe.server.apierror import ApiError, api_error_of
from ggufmoe.work import CancelFlag

_COMMENT = b": waiting\n\n"
"""Sent while nothing comes, so that nobody takes the stream for dead. Before it or the first token, an error has a
status."""
_RETRY_S = 5
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Admission:
    """How many answers may wait or be under way."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.n_under_way = 0

    @contextmanager
    def places(self, n: int) -> Iterator[None]:
        """Hold ``n`` places within the block. Raises ApiError: 429 where none are free, 400 where they never are."""
        if n > self._limit:
            raise ApiError(400, f"{n} answers are asked for, and the server takes on {self._limit} at most", param="n")
        if self.n_under_way + n > self._limit:
            message = f"{self.n_under_way} answers are waiting or under way, and the limit is {self._limit}: try later"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": str(_RETRY_S)})
        self.n_under_way += n
        try:
            yield
        finally:
            self.n_under_way -= n


@dataclass(frozen=True)
class RequestLimits:
    """What a request may take: its time, and places among the answers that wait or are under way."""

    admission: Admission
    n_places: int
    timeout_s: float


class ComputedReply(ABC):
    """An ASGI response that is computed: it ends when its client leaves or its time is over.

    ``on_error`` gets each error.
    """

    def __init__(self, limits: RequestLimits, on_error: Callable[[Exception], None]) -> None:
        self._limits = limits
        self._on_error = on_error
        self._has_begun = False
        """Whether the response has a status."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request whose body has been read."""
        timeout_s = self._limits.timeout_s
        try:
            with self._limits.admission.places(self._limits.n_places):
                await unless_left(receive, self._answer(scope, receive, send), timeout_s)
        except Exception as error:
            self._on_error(error)
            if isinstance(error, asyncio.TimeoutError):
                error = ApiError(504, f"the request was not answered within {timeout_s:g} s (--timeout)")
            told = api_error_of(error)
            if not self._has_begun:
                await told.response()(scope, receive, send)
            elif (end := self._end_after(told)) is not None:
                await send({"type": "http.response.body", "body": end, "more_body": False})
            else:
                raise

    @abstractmethod
    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Compute and send the response."""

    def _end_after(self, error: ApiError) -> bytes | None:
        """What a response that has begun ends with after ``error``; None if nothing can be said any more."""
        del error
        return None


class ObjectReply(ComputedReply):
    """The JSON object that ``work`` gives.

    It is called in a thread of its own, with a flag that is set when nobody wants its result any more.
    """

    def __init__(
        self, work: Callable[[CancelFlag], dict[str, Any]], limits: RequestLimits, on_error: Callable[[Exception], None]
    ) -> None:
        super().__init__(limits, on_error)
        self._work = work

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = await call_async(self._work)  # long work must not keep the threads that others need to begin
        self._has_begun = True
        await JSONResponse(found)(scope, receive, send)


class CompletionReply(ComputedReply):
    """A completion that ``make`` makes, as one object or a stream.

    ``make`` is called in a thread, with a flag that is set when nobody wants its result any more. ``on_end`` gets the
    completion when it has been computed.
    """

    def __init__(
        self,
        make: Callable[[CancelFlag], Completion],
        limits: RequestLimits,
        *,
        stream: bool,
        on_end: Callable[[Completion], None],
        on_error: Callable[[Exception], None],
    ) -> None:
        super().__init__(limits, on_error)
        self._make = make
        self._stream = stream
        self._on_end = on_end
        self._completion: Completion | None = None

    def _end_after(self, error: ApiError) -> bytes | None:
        if not self._stream or self._completion is None:
            return None
        return _event(self._completion.failed(error), is_named=self._completion.has_named_events)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with begun(self._make) as (completion, batches):
            self._completion = completion
            if self._stream:
                await self._send_stream(completion, batches, send)
                return
            async for index, events in batches:
                for event in events:
                    completion.chunks(index, event)
        self._on_end(completion)
        self._has_begun = True
        await JSONResponse(completion.whole())(scope, receive, send)

    async def _send_stream(self, completion: Completion, batches: AsyncGenerator[Batch, None], send: Send) -> None:
        objects, event_of = completion.opening(), partial(_event, is_named=completion.has_named_events)
        async for index, events in batches:
            if not events:
                await self._send_part(_COMMENT, send)
                continue
            for event in events:
                objects += completion.chunks(index, event)
            if objects:
                await self._send_part(b"".join(map(event_of, objects)), send)
            objects = []
        self._on_end(completion)
        end = b"" if completion.has_named_events else b"data: [DONE]\n\n"
        await self._send_part(b"".join(map(event_of, completion.closing())) + end, send, is_last=True)

    async def _send_part(self, part: bytes, send: Send, *, is_last: bool = False) -> None:
        if not self._has_begun:
            self._has_begun = True
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        await send({"type": "http.response.body", "body": part, "more_body": not is_last})


_encoded = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _event(content: dict[str, Any], *, is_named: bool) -> bytes:
    head = f"event: {content['type']}\n" if is_named else ""
    return f"{head}data: {_encoded(content)}\n\n".encode()


async def unless_left(receive: Receive, work: Awaitable[None], timeout_s: float) -> None:
    """Do ``work`` to its end, or until the client leaves.

    Raises what it raises, and TimeoutError after ``timeout_s``.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        done, _ = await asyncio.wait({working, leaving}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            working.result()
        elif not done:
            raise asyncio.TimeoutError
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
