"""Errors in the shape of OpenAI's interface: a status, and a message, type, parameter and code in the body."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from ggufmoe.errors import (
    Cancelled,
    ContextFullError,
    EngineError,
    GgufmoeError,
    InputError,
    OptionError,
    TemplateError,
    one_line,
)

_logger = logging.getLogger("ggufmoe")
_MAX_MESSAGE_CHARS = 2000


class ApiError(Exception):
    """A request that is refused, or that failed: its HTTP status and what the client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = one_line(message, _MAX_MESSAGE_CHARS)
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """The kind of error, as OpenAI names it."""
        if self.status == 429:
            return "rate_limit_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def to_dict(self) -> dict[str, Any]:
        """The body of the response."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole response."""
        return JSONResponse(self.to_dict(), self.status, headers=self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """A request that cannot be followed: status 400."""
    return ApiError(400, message, param=param, code=code)


def unavailable(reason: str, retry_after_s: int = 5) -> ApiError:
    """A model that cannot answer now: status 503."""
    return ApiError(503, reason, code="model_unavailable", headers={"Retry-After": str(retry_after_s)})


def api_error_of(error: Exception) -> ApiError:
    """What a client is told of ``error``; one that nobody foresaw is logged, and the client learns only its class."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TemplateError):
        return invalid(str(error), "messages")
    if isinstance(error, ContextFullError):
        return invalid(str(error), code="context_length_exceeded")
    if isinstance(error, InputError | OptionError):
        return invalid(str(error))
    if isinstance(error, Cancelled):
        return unavailable("the computing was stopped")
    if isinstance(error, EngineError):
        return unavailable(str(error))
    if isinstance(error, MemoryError):
        return unavailable("there is not enough memory for this request at the moment")
    if not isinstance(error, GgufmoeError):
        _logger.error("a request failed: %s", one_line(error), exc_info=error)
    return ApiError(500, f"the server failed: {type(error).__name__}", code="internal_error")
