"""Bodies of requests: read within limits, parsed as JSON, and validated. Faults are an ApiError with their place."""

from __future__ import annotations

import asyncio
import difflib
import json
import re
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from ggufmoe.server.apierror import ApiError, invalid

MAX_BODY_BYTES = 8 << 20
_MAX_DROPPED_BYTES = 64 << 20
"""Of a body that is too large, so much is read before the connection is closed: a client that still sends would not see
the response."""
_MAX_DEPTH = 100
_BODY_S = 60.0
"""A body must be complete after so many seconds."""
_SHOWN_CHARS = 80

ModelT = TypeVar("ModelT", bound=BaseModel)


async def read_object(request: Request) -> dict[str, Any]:
    """The JSON object in the body of ``request``.

    Raises ApiError: 400 for what is no JSON object, nests too deep or holds halves of surrogate pairs, 408 for a body
    that does not come, 413 for one of more than MAX_BODY_BYTES.
    """
    try:
        body = await asyncio.wait_for(_read(request), _BODY_S)
    except asyncio.TimeoutError as error:
        raise ApiError(408, f"the body was not complete after {_BODY_S:.0f} s") from error
    except ClientDisconnect as error:
        raise ApiError(400, "the client left before its request was complete") from error
    return parsed_object(body)


async def _read(request: Request) -> bytes:
    body, n_bytes = bytearray(), 0
    async for part in request.stream():
        n_bytes += len(part)
        if n_bytes <= MAX_BODY_BYTES:
            body += part
        elif n_bytes > _MAX_DROPPED_BYTES:
            break
    if n_bytes > MAX_BODY_BYTES:
        message = f"the body has more than {MAX_BODY_BYTES} bytes, which is the limit"
        raise ApiError(413, message, headers={"Connection": "close"})
    return bytes(body)


def parsed_object(body: bytes) -> dict[str, Any]:
    """The JSON object that ``body`` holds. Raises ApiError."""
    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise invalid("the body is not UTF-8") from error
    except RecursionError as error:
        raise invalid(f"the body nests deeper than {_MAX_DEPTH} levels") from error
    except ValueError as error:
        raise invalid(f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object")
    _check_content(value)
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _check_content(value: dict[str, Any]) -> None:
    """Raise ApiError for nesting beyond _MAX_DEPTH and for texts that are no Unicode."""
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                try:
                    item.encode()
                except UnicodeEncodeError as error:
                    raise invalid("a text in the body holds half of a surrogate pair") from error
            elif isinstance(item, dict):
                below.extend(item)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
        if not below:
            return
        level = below
    raise invalid(f"the body nests deeper than {_MAX_DEPTH} levels")


def validated(kind: type[ModelT], body: dict[str, Any]) -> ModelT:
    """``body`` as a request of ``kind``. Raises ApiError that names the field; null stands for a field left out."""
    try:
        return kind.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        errors = error.errors(include_url=False)
        first = max(errors, key=lambda found: len(found["loc"]))
        param = _place(first["loc"], body, is_missing=first["type"] == "missing")
        if first["type"] == "missing":
            raise invalid(f"missing required parameter: {param!r}", param, "missing_required_parameter") from error
        if first["type"] == "extra_forbidden":
            raise unknown_field(param, kind.model_fields) from error
        shown = repr(first["input"])
        shown = shown if len(shown) <= _SHOWN_CHARS else shown[:_SHOWN_CHARS] + "..."
        # a field that may be of several kinds has a reason of each
        same = [found["msg"] for found in errors if _place(found["loc"], body, is_missing=False) == param]
        reason = ", or ".join(dict.fromkeys(message.removeprefix("Value error, ") for message in same))
        reason = reason.replace(", or Input should be", ", or")
        reason = re.sub(r"valid dictionary( or instance of \w+)?", "valid object", reason)
        raise invalid(f"{param}: {reason}, not {shown}", param, "invalid_value") from error


def unknown_field(name: str, known: Any) -> ApiError:
    """The error for a field that the server does not know or cannot honour."""
    near = difflib.get_close_matches(name, list(known), n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return invalid(f"this server does not know the parameter {name!r}{hint}", name, "unknown_parameter")


def _place(loc: tuple[int | str, ...], body: Any, *, is_missing: bool) -> str:
    """``messages[1].content`` of ('messages', 1, 'content'), without pydantic's names for parts of a union."""
    place, value = "", body
    for n, part in enumerate(loc):
        is_there = part in value if isinstance(value, dict) else isinstance(value, list) and isinstance(part, int)
        if is_there or (is_missing and n == len(loc) - 1):
            place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else part
            value = value[part] if is_there else None
    return place
