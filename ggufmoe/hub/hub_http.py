"""Requests for ranges of bytes through the HTTP library and the session of the installed huggingface_hub.

That is requests before its version 1, httpx in version 1 and httpx2 since 2. Proxies, certificates and further settings
are the session's own (``set_client_factory``, ``configure_http_backend``). httpx makes some four copies of each byte in
small pieces, more than a fast line leaves time for. So its connections are used directly for large ranges: the session
connects, and the bodies of further answers are received into the reader's memory.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast
from urllib.parse import SplitResult, urlsplit

_PIECE_BYTES = 1 << 16
"""What requests reads at once; of a connection that is reset it drops what it has of a piece."""
_DIRECT_BYTES = 1 << 20
"""Ranges that are shorter go through the session: they would not make up for a request more for each connection."""


@dataclass(frozen=True)
class RangeAnswer:
    """The status, headers (by names in lower case) and body of an answer; valid while its connection is open."""

    status: int
    headers: Mapping[str, str]
    read_into: Callable[[memoryview], int]
    """Puts the next bytes of the body at the beginning of a buffer; how many, 0 at the end of the body."""


class RangeClient:
    """Asks for ranges of files over connections that are kept for further requests; safe for several threads."""

    def __init__(self, received: Callable[[int], None]) -> None:
        """``received`` is called with the length of each piece of a body that has come."""
        self._received = received
        self._lock = threading.Lock()
        self._idle: dict[str, list[_TakenConnection]] = {}

    @contextmanager
    def asked_for(self, url: str, headers: Mapping[str, str], begin: int, end: int) -> Iterator[RangeAnswer]:
        """The answer to a request for the bytes [begin, end) at ``url``; leaving the block ends the transfer.

        Raises one of ``request_errors()``, also while the body is read.
        """
        wanted = {**headers, "Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
        connection = self._asked(url, headers, wanted) if end - begin >= _DIRECT_BYTES else None
        if connection is None:
            with _through_session(url, wanted) as (status, found, pieces):
                yield RangeAnswer(status, found, _BodyInPieces(pieces, self._received).read_into)
            return
        try:
            yield RangeAnswer(connection.status, connection.headers, connection.read_into)
        finally:
            if connection.n_left == 0 and connection.stays_open:
                with self._lock:
                    self._idle.setdefault(connection.origin, []).append(connection)
            else:
                connection.close()

    def close_idle(self) -> None:
        """Close the connections that no request uses at the moment."""
        with self._lock:
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def _asked(self, url: str, headers: Mapping[str, str], wanted: Mapping[str, str]) -> _TakenConnection | None:
        """A connection that the request was sent on and whose answer has begun; None if the session has to be asked."""
        place = urlsplit(url)
        while True:
            with self._lock:
                idle = self._idle.get(_origin(place), [])
                connection = idle.pop() if idle else None
            is_new = connection is None
            if connection is None and (connection := _connected(url, headers, self._received)) is None:
                return None
            try:
                connection.ask(place, wanted)
            except (OSError, http.client.HTTPException):
                connection.close()
                if is_new:
                    raise
                continue  # servers close connections that were idle for a while
            except BaseException:
                connection.close()
                raise
            if 300 <= connection.status < 400:
                connection.close()
                return None
            return connection


def _origin(place: SplitResult) -> str:
    return f"{place.scheme}://{place.netloc}"


def _connected(url: str, headers: Mapping[str, str], received: Callable[[int], None]) -> _TakenConnection | None:
    """A new connection of the session, taken out of its pool, to use directly; None where that cannot be done.

    The session asks for one byte. While that answer is not closed, httpx gives the connection to nobody else, and
    nothing further comes until it is asked for.
    """
    session = _session()
    if not callable(getattr(session, "stream", None)):
        return None  # requests reads in large pieces by itself
    library = importlib.import_module(type(session).__module__.partition(".")[0])
    with contextlib.suppress(library.ReadError, library.RemoteProtocolError), ExitStack() as stack:
        wanted = {**headers, "Range": "bytes=0-0", "Accept-Encoding": "identity"}
        answer = stack.enter_context(
            session.stream("GET", url, headers=wanted, timeout=_timeout_s(), follow_redirects=False)
        )
        stream = answer.extensions.get("network_stream")
        channel = None if stream is None else stream.get_extra_info("socket")
        is_plain = (answer.status_code, answer.http_version, answer.headers.get("content-length")) == (
            206,
            "HTTP/1.1",
            "1",
        )
        if not is_plain or not isinstance(channel, socket.socket) or not _is_direct(channel, urlsplit(url)):
            return None
        pieces = answer.iter_raw()
        stack.callback(pieces.close)  # httpx closes the answer with its iterator
        if len(next(pieces, b"")) != 1:
            return None
        received(1)
        channel.settimeout(_timeout_s())
        return _TakenConnection(channel, _origin(urlsplit(url)), stack.pop_all(), received)
    return None


def _is_direct(channel: socket.socket, place: SplitResult) -> bool:
    """Whether requests on it reach the server as they are: in TLS, or without a proxy in between."""
    if place.scheme == "https":
        return True
    try:
        addresses = socket.getaddrinfo(place.hostname, place.port or 80, type=socket.SOCK_STREAM)
    except OSError:  # only the proxy knows the name
        return False
    return channel.getpeername()[:2] in [address[:2] for *_, address in addresses]


class _TakenConnection:
    """HTTP/1.1 on an open socket: one request at a time, whose body goes straight into the reader's memory."""

    def __init__(self, channel: socket.socket, origin: str, owner: ExitStack, received: Callable[[int], None]) -> None:
        """``owner`` closes the socket."""
        self.origin = origin
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.n_left: int | None = None
        """Bytes of the body that were not read yet; None if the answer does not say how many it has."""
        self.stays_open = False
        self._channel, self._owner, self._received = channel, owner, received
        self._reader = cast("BinaryIO", channel.makefile("rb"))

    def ask(self, place: SplitResult, headers: Mapping[str, str]) -> None:
        """Send a request and read the head of its answer. Raises OSError or http.client's HTTPException."""
        target = f"{place.path or '/'}{'?' if place.query else ''}{place.query}"
        lines = [f"GET {target} HTTP/1.1", f"Host: {place.netloc}", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
        self._channel.sendall("\r\n".join(lines).encode("latin-1"))
        first = self._reader.readline(1 << 16).split(None, 2)
        if len(first) < 2 or not first[0].startswith(b"HTTP/1.1") or not first[1].isdigit():
            raise http.client.BadStatusLine(repr(first)[:80])
        self.status = int(first[1])
        found = http.client.parse_headers(self._reader)
        self.headers = {name.lower(): value for name, value in found.items()}
        length = self.headers.get("content-length", "")
        self.n_left = int(length) if length.isdecimal() and "transfer-encoding" not in self.headers else None
        self.stays_open = "close" not in self.headers.get("connection", "").lower()

    def read_into(self, buffer: memoryview) -> int:
        """The ``read_into`` of a RangeAnswer."""
        if self.n_left is None:
            raise http.client.HTTPException("the answer does not say how long it is")
        n_bytes = self._reader.readinto1(buffer[: self.n_left])  # type: ignore[attr-defined]
        self.n_left -= n_bytes
        if n_bytes == 0 and self.n_left:
            self.stays_open = False
        self._received(n_bytes)
        return int(n_bytes)

    def close(self) -> None:
        """Give up the connection."""
        with contextlib.suppress(OSError):
            self._reader.close()
        self._owner.close()


class _BodyInPieces:
    """A body that comes in pieces of the HTTP library's choice."""

    def __init__(self, pieces: Iterator[bytes], received: Callable[[int], None]) -> None:
        self._pieces, self._received = pieces, received
        self._rest = memoryview(b"")

    def read_into(self, buffer: memoryview) -> int:
        """The ``read_into`` of a RangeAnswer."""
        if not self._rest:
            self._rest = memoryview(next(self._pieces, b""))
            self._received(len(self._rest))
        n_bytes = min(len(self._rest), len(buffer))
        buffer[:n_bytes], self._rest = self._rest[:n_bytes], self._rest[n_bytes:]
        return n_bytes


@contextmanager
def _through_session(url: str, headers: Mapping[str, str]) -> Iterator[tuple[int, Mapping[str, str], Iterator[bytes]]]:
    """Status, headers and pieces of the body of an answer; redirects are followed."""
    session = _session()
    if callable(getattr(session, "stream", None)):  # httpx; of a session of requests it is a setting
        with session.stream("GET", url, headers=headers, timeout=_timeout_s(), follow_redirects=True) as answer:
            yield answer.status_code, _lower(answer.headers), answer.iter_raw()
    else:
        with session.get(url, headers=headers, timeout=_timeout_s(), stream=True) as answer:
            yield answer.status_code, _lower(answer.headers), answer.raw.stream(_PIECE_BYTES, decode_content=False)


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items()}


def _timeout_s() -> float:
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


def request_errors() -> tuple[type[Exception], ...]:
    """What is raised where a request fails: no connection, a reset, a timeout, a body cut short."""
    library = importlib.import_module(type(_session()).__module__.partition(".")[0])
    if library.__name__ == "requests":
        return (library.RequestException, importlib.import_module("urllib3.exceptions").HTTPError)
    return (library.HTTPError, library.StreamError, library.InvalidURL, OSError, http.client.HTTPException)


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
