"""The web application: which path does what. Every response that is an error has OpenAI's shape."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ggufmoe.errors import GgufmoeError
from ggufmoe.options import ServerOptions
from ggufmoe.server.answers import Completion
from ggufmoe.server.apierror import ApiError, api_error_of
from ggufmoe.server.asked import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingsRequest,
    SamplingFields,
    TokenizeRequest,
)
from ggufmoe.server.asked_responses import ResponsesRequest
from ggufmoe.server.bodies import read_object, validated
from ggufmoe.server.chat_completions import chat_completion
from ggufmoe.server.embeddings import embeddings
from ggufmoe.server.guard import Guard
from ggufmoe.server.metrics import Metrics
from ggufmoe.server.modelhost import ModelHost
from ggufmoe.server.page_files import page_routes
from ggufmoe.server.replies import Admission, CompletionReply, ObjectReply, RequestLimits
from ggufmoe.server.responses import response
from ggufmoe.server.text_completions import text_completion

_logger = logging.getLogger("ggufmoe")


def web_app(host: ModelHost, model: str, options: ServerOptions, keys: tuple[str, ...] = ()) -> ASGIApp:
    """The application that serves what ``host`` holds to clients, who know it as ``model``."""
    endpoints = _Endpoints(host, model, options)
    guard = Middleware(Guard, keys=keys, hosts=(options.host, *options.allowed_host), origins=options.cors_origin)
    cors = Middleware(
        CORSMiddleware, allow_origins=options.cors_origin, allow_methods=["GET", "POST"], allow_headers=["*"]
    )
    app = Starlette(
        routes=[
            *page_routes(),
            Route("/health", endpoints.health),
            Route("/metrics", endpoints.metrics_text),
            Route("/v1/models", endpoints.models),
            Route("/v1/models/{name:path}", endpoints.one_model),
            Route("/v1/chat/completions", endpoints.chat_completions, methods=["POST"]),
            Route("/v1/completions", endpoints.completions, methods=["POST"]),
            Route("/v1/responses", endpoints.responses, methods=["POST"]),
            Route("/v1/embeddings", endpoints.embeddings, methods=["POST"]),
            Route("/tokenize", endpoints.tokenize, methods=["POST"]),
            Route("/detokenize", endpoints.detokenize, methods=["POST"]),
        ],
        middleware=[*([cors] if options.cors_origin else []), guard],
        exception_handlers={HTTPException: _http_error, **dict.fromkeys((ApiError, GgufmoeError, Exception), _failed)},
    )
    app.router.redirect_slashes = False
    paths = frozenset(route.path for route in app.routes if isinstance(route, Route))
    return _Counted(app, endpoints.metrics, paths)


async def _failed(request: Request, error: Exception) -> Response:
    del request
    return api_error_of(error).response()


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for this class"
    what = {404: "there is nothing at", 405: f"{request.method} is not for"}.get(error.status_code, error.detail)
    return ApiError(error.status_code, f"{what} {request.url.path}", headers=error.headers).response()


class _Counted:
    """ASGI middleware that counts requests by path and status, and ends those that failed."""

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.count_request(path, message["status"])
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception as error:  # starlette passes on what it has answered already
            _logger.debug("a request failed", exc_info=error)


class _Endpoints:
    """What each path does."""

    def __init__(self, host: ModelHost, model: str, options: ServerOptions) -> None:
        self._host = host
        self._model = model
        self._options = options
        self._admission = Admission(options.queue)
        self._created = int(time.time())
        self.metrics = Metrics()

    async def health(self, request: Request) -> Response:
        del request
        status, body = self._host.health()
        return JSONResponse(body, status)

    async def metrics_text(self, request: Request) -> Response:
        del request
        is_loaded = self._host.health()[0] == 200
        text = self.metrics.text(self._admission.n_under_way, self._host.n_reloads, is_loaded=is_loaded)
        return PlainTextResponse(text, media_type="text/plain; version=0.0.4")

    async def models(self, request: Request) -> Response:
        del request
        return JSONResponse({"object": "list", "data": [self._described()]})

    async def one_model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._described())

    def _described(self) -> dict[str, Any]:
        model = {"id": self._model, "object": "model", "created": self._created, "owned_by": "ggufmoe"}
        try:
            served = self._host.served()
        except ApiError:  # the name is known while the model is being loaded
            return model
        engine = served.engine
        meta: dict[str, Any] = {"n_ctx": engine.n_ctx, "n_ctx_train": engine.n_ctx_train, "n_vocab": engine.n_vocab}
        meta["placement"] = engine.placement.plan.summary()
        return model | {"meta": meta | ({} if served.routing is None else {"routing": served.routing})}

    def _check_model(self, name: str | None) -> None:
        if name not in (None, "", self._model):
            message = f"the model {name!r} does not exist; this server has {self._model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    async def chat_completions(self, request: Request) -> CompletionReply:
        asked = validated(ChatCompletionRequest, await read_object(request))
        return self._reply(asked, asked.n, partial(chat_completion, asked=asked, model=self._model))

    async def completions(self, request: Request) -> CompletionReply:
        asked = validated(CompletionRequest, await read_object(request))
        n_answers = asked.n * len(asked.prompt)
        return self._reply(asked, n_answers, partial(text_completion, asked=asked, model=self._model))

    async def responses(self, request: Request) -> CompletionReply:
        asked = validated(ResponsesRequest, await read_object(request))
        return self._reply(asked, 1, partial(response, asked=asked, model=self._model))

    def _reply(self, asked: SamplingFields, n_answers: int, make: Callable[..., Completion]) -> CompletionReply:
        asked.check()
        self._check_model(asked.model)
        served = self._host.served()
        return CompletionReply(
            lambda cancel: make(served, cancel=cancel),
            self._limits(n_answers),
            stream=asked.stream,
            on_end=lambda completion: self.metrics.count_answers(completion.timings()),
            on_error=lambda error: self._host.check(served.engine, error),
        )

    def _limits(self, n_places: int) -> RequestLimits:
        return RequestLimits(self._admission, n_places, self._options.timeout)

    async def embeddings(self, request: Request) -> ObjectReply:
        asked = validated(EmbeddingsRequest, await read_object(request))
        self._check_model(asked.model)
        engine = self._host.served().engine
        return ObjectReply(
            lambda cancel: embeddings(engine, asked, self._model, cancel),
            self._limits(1),
            lambda error: self._host.check(engine, error),
        )

    async def tokenize(self, request: Request) -> Response:
        asked = validated(TokenizeRequest, await read_object(request))
        engine = self._host.served().engine

        def found() -> list[Any]:
            tokens = engine.tokenize(asked.content, add_bos=asked.add_special, parse_special=asked.parse_special)
            if not asked.with_pieces:
                return tokens
            return [{"id": token, "piece": _shown(engine.piece(token, special=True))} for token in tokens]

        return JSONResponse({"tokens": await asyncio.to_thread(found)})

    async def detokenize(self, request: Request) -> Response:
        asked = validated(DetokenizeRequest, await read_object(request))
        engine = self._host.served().engine
        data = await asyncio.to_thread(engine.detokenize, asked.tokens, special=True)
        return JSONResponse({"content": data.decode("utf-8", "replace")})


def _shown(piece: bytes) -> str | list[int]:
    """The text of a token; its bytes where they are no text by themselves."""
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)
