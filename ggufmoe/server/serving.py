"""Running the server: its socket, the loading of the model beside it, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from typing import Any, cast

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ggufmoe.errors import OptionError
from ggufmoe.options import ServerOptions
from ggufmoe.server.guard import MAX_HEADER_BYTES, check_exposure, read_keys
from ggufmoe.server.modelhost import ModelHost
from ggufmoe.server.webapp import web_app
from ggufmoe.work import CancelFlag

GRACE_S = 10
"""Requests that are under way when the server is asked to end may go on for so long."""
_IDLE_S = 30
"""A connection without a request is closed after so long."""
_WATCH_S = 0.1
_SEND_BUFFER_BYTES = 64 * 1024


class _HeadWithBody:
    """A transport that sends the head of a response together with what follows: a system call costs more than both."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        """Send ``data``; a head that nothing follows in this turn of the event loop is sent then."""
        if data.startswith(b"HTTP/") and not self._head:
            self._head = data
            self._loop.call_soon(self._flush)
        else:
            data, self._head = self._head + data, b""
            self._transport.write(data)

    def close(self) -> None:
        """Send what was written, and close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        if self._head:
            data, self._head = self._head, b""
            self._transport.write(data)


class _Connection(H11Protocol):
    """A connection that is closed when it has been without a complete request for one to two times uvicorn's
    ``timeout_keep_alive``.

    uvicorn itself closes a connection only after a response, and would keep one with half a request for ever.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(cast(asyncio.Transport, _HeadWithBody(transport, self.loop)))
        self._seen: object = self
        self._look = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)

    def connection_lost(self, exc: Exception | None) -> None:
        self._look.cancel()
        super().connection_lost(exc)

    def _close_if_idle(self) -> None:
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self._seen is self.cycle:
            self.transport.close()
        else:
            self._seen = self.cycle
            self._look = self.loop.call_later(self.timeout_keep_alive, self._close_if_idle)


class _Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to its caller."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpServer:
    """The server for the model that ``host`` loads; clients know it as ``model``. Listens when this returns.

    Raises OptionError for an address that cannot be listened at, or that others reach without a key.
    """

    def __init__(
        self, host: ModelHost, model: str, options: ServerOptions, *, grace_s: float = GRACE_S, idle_s: float = _IDLE_S
    ) -> None:
        self._host = host
        keys = read_keys(options)
        self._socket = _listening(options, keys)
        address, self.port = self._socket.getsockname()[:2]
        self.url = f"http://[{address}]:{self.port}" if ":" in address else f"http://{address}:{self.port}"
        self._server = _Server(
            uvicorn.Config(
                web_app(host, model, options, keys),
                http=_Connection,
                ws="none",
                lifespan="off",
                loop="asyncio",
                log_config=None,
                log_level="critical",  # it would print a line for each client that sends rubbish
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_keep_alive=idle_s,  # type: ignore[arg-type]  # it takes fractions too
                timeout_graceful_shutdown=grace_s,  # type: ignore[arg-type]
            )
        )

    def run(self, stop: CancelFlag, on_loaded: Callable[[], None] = lambda: None) -> None:
        """Serve until ``stop`` is set; then running requests may go on for ``grace_s``, and new ones are refused.

        The model is loaded meanwhile; ``on_loaded`` is called in a thread when that is done. Closes ``host``. Raises
        what loading raises.
        """
        try:
            asyncio.run(self._run(stop, on_loaded))
        finally:
            self._socket.close()
            self._host.close()

    async def _run(self, stop: CancelFlag, on_loaded: Callable[[], None]) -> None:
        def load() -> None:
            self._host.load()
            on_loaded()

        serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        loading = asyncio.create_task(asyncio.to_thread(load))
        while not serving.done():
            if stop.is_set():
                self._host.stop_loading()
                self._server.should_exit = True
            if loading.done() and loading.exception() is not None:
                self._server.should_exit = True
            await asyncio.sleep(_WATCH_S)
        await serving
        await loading


def _listening(options: ServerOptions, keys: tuple[str, ...]) -> socket.socket:
    where = f"--host {options.host} --port {options.port}"
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise OptionError(f"--host {options.host}: not an address of this machine, nor a name of one") from error
    family, _, _, _, address = found[0]
    check_exposure(options, [str(address[0])], keys)
    try:
        listener = socket.create_server(address[:2], family=family, backlog=128)
        # connections inherit it; by default the system takes megabytes from an answer before a slow reader is noticed
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        return listener
    except OSError as error:
        raise OptionError(f"{where}: cannot listen there: {error.strerror or error}") from error
