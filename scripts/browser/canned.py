"""A server with the real page and the real guard over answers that a test has written down."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ggufmoe.server.guard import Guard
from ggufmoe.server.page_files import page_routes

META: dict[str, Any] = {"n_ctx": 512, "n_ctx_train": 512, "n_vocab": 32000}
TIMINGS = {"predicted_n": 7, "predicted_per_second": 81.25, "prompt_n": 5, "cache_n": 2}
WAIT_S = 20

Step = dict[str, Any] | threading.Event
"""A delta that is sent, or an event that is waited for."""


def said(*texts: str) -> list[Step]:
    """Deltas of content."""
    return [{"content": text} for text in texts]


@dataclass
class Answer:
    """What the server does with one request."""

    steps: Iterable[Step] = ()
    error: dict[str, Any] | None = None
    """Sent after the steps, as the last event; instead of everything where ``status`` is not 200."""
    status: int = 200
    breaks_off: bool = False
    left: threading.Event = field(default_factory=threading.Event)
    """Set when the client leaves before the end."""


@dataclass
class Canned:
    """Answers in their order; ``asked`` collects the bodies of requests."""

    answers: deque[Answer] = field(default_factory=deque)
    meta: dict[str, Any] | None = field(default_factory=lambda: dict(META))
    """None: the model is being loaded."""
    name: str = "talker"
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def will_say(self, *answers: Answer | str) -> None:
        """Add answers; a text is one in a single piece."""
        self.answers.extend(Answer(said(one)) if isinstance(one, str) else one for one in answers)

    async def models(self, request: Request) -> Response:
        del request
        model = {"id": self.name, "object": "model", "created": 1, "owned_by": "ggufmoe"}
        return JSONResponse({"object": "list", "data": [model | ({"meta": self.meta} if self.meta else {})]})

    async def health(self, request: Request) -> Response:
        del request
        if self.meta is not None:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "loading", "reason": "the model is being loaded", "progress": 0.5}, 503)

    async def chat(self, request: Request) -> Response:
        self.asked.append(await request.json())
        answer = self.answers.popleft()
        if answer.status != 200:
            return JSONResponse({"error": answer.error}, answer.status)
        return StreamingResponse(_events(answer), media_type="text/event-stream")


async def _events(answer: Answer) -> AsyncIterator[str]:
    is_over = False
    try:
        for step in answer.steps:
            if isinstance(step, threading.Event):
                while not step.is_set():  # a client that leaves ends the sleep
                    await asyncio.sleep(0.01)
            else:
                yield _event(step)
        is_over = True
        if answer.breaks_off:
            return
        if answer.error is not None:
            yield f"data: {json.dumps({'error': answer.error})}\n\n"
            return
        yield _event({}, reason="stop", timings=TIMINGS)
        yield f"data: {json.dumps({'choices': [], 'usage': {'total_tokens': 12}})}\n\n: comment\n\ndata: [DONE]\n\n"
    finally:
        if not is_over:
            answer.left.set()


def _event(step: dict[str, Any], *, reason: str | None = None, **more: Any) -> str:
    delta = {name: value for name, value in step.items() if name != "routing"}
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    choice |= {"routing": step["routing"]} if "routing" in step else {}
    return f"data: {json.dumps({'choices': [choice], **more})}\n\n"


@contextmanager
def serving(canned: Canned, *keys: str) -> Iterator[Canned]:
    """Serve within the block, to those who have one of ``keys`` where there are any."""
    app = Starlette(
        routes=[
            *page_routes(),
            Route("/v1/models", canned.models),
            Route("/health", canned.health),
            Route("/v1/chat/completions", canned.chat, methods=["POST"]),
        ],
        middleware=[Middleware(Guard, keys=keys, hosts=(), origins=())],
    )
    listener = socket.create_server(("127.0.0.1", 0))
    canned.url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
    config = uvicorn.Config(
        app, ws="none", lifespan="off", log_config=None, log_level="critical", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield canned
    finally:
        server.should_exit = True
        thread.join()
