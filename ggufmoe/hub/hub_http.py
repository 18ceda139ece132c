"""Requests for ranges of bytes through the HTTP library and the session of the installed huggingface_hub.

That is requests before its version 1, httpx in version 1 and httpx2 since 2. Proxies, certificates and further settings
are the session's own (``set_client_factory``, ``configure_http_backend``).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

_PIECE_BYTES = 1 << 18


@dataclass(frozen=True)
class RangeAnswer:
    """The status and headers of an answer, whose body comes in pieces; valid while its connection is open."""

    status: int
    headers: Mapping[str, str]
    pieces: Iterator[bytes]


@contextmanager
def asked_for(url: str, headers: Mapping[str, str], begin: int, end: int) -> Iterator[RangeAnswer]:
    """The answer to a request for the bytes [begin, end) at ``url``; leaving the block ends the transfer.

    Raises one of ``request_errors()``, also while the pieces are read.
    """
    from huggingface_hub import constants

    session = _session()
    wanted = {**headers, "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if callable(getattr(session, "stream", None)):  # httpx; of a session of requests it is a setting
        with session.stream("GET", url, headers=wanted, timeout=timeout, follow_redirects=True) as answer:
            yield RangeAnswer(answer.status_code, answer.headers, answer.iter_raw())
    else:
        with session.get(url, headers=wanted, timeout=timeout, stream=True) as answer:
            pieces = answer.raw.stream(_PIECE_BYTES, decode_content=False)
            yield RangeAnswer(answer.status_code, answer.headers, pieces)


def request_errors() -> tuple[type[Exception], ...]:
    """What the HTTP library raises where a request fails: no connection, a reset, a timeout, a body cut short."""
    library = importlib.import_module(type(_session()).__module__.partition(".")[0])
    if library.__name__ == "requests":
        return (library.RequestException, importlib.import_module("urllib3.exceptions").HTTPError)
    return (library.HTTPError, library.StreamError, library.InvalidURL)


def _session() -> Any:
    from huggingface_hub import utils

    return utils.get_session()  # type: ignore[attr-defined]


def headers_for(url: str) -> dict[str, str]:
    """The headers of a request to ``url``: with the user's token for the hub alone, not for where it refers to."""
    from huggingface_hub import constants, utils

    headers: dict[str, str] = utils.build_hf_headers()  # type: ignore[attr-defined]
    if urlsplit(url).netloc != urlsplit(constants.ENDPOINT).netloc:
        headers = {name: value for name, value in headers.items() if name.lower() != "authorization"}
    return headers
