"""Who may use the server: the hosts that requests may name, the web pages that may send them, and keys."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import socket
from collections.abc import Collection, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ggufmoe.errors import InputError, OptionError
from ggufmoe.options import ServerOptions
from ggufmoe.server.apierror import ApiError
from ggufmoe.server.page_files import PAGE_PATHS

OPEN_PATHS = frozenset({"/health"}) | PAGE_PATHS
"""What is told without a key: the page asks for one itself."""
MAX_HEADER_BYTES = 32 * 1024
_MAX_KEY_FILE_BYTES = 1 << 20


def read_keys(options: ServerOptions) -> tuple[str, ...]:
    """The keys of which each request must have one; none where everyone may ask. Raises InputError, OptionError."""
    if options.api_key is not None:
        return (options.api_key.strip(),)
    if options.api_key_file is None:
        return ()
    path: Path = options.api_key_file
    try:
        with open(path, encoding="utf-8") as file:
            lines = file.read(_MAX_KEY_FILE_BYTES).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: the file of --api-key-file cannot be read: {error}") from error
    keys = tuple(key for line in lines if (key := line.strip()))
    if not keys:
        raise OptionError(f"{path}: the file of --api-key-file holds no key")
    return keys


def check_exposure(options: ServerOptions, addresses: Sequence[str], keys: Sequence[str]) -> None:
    """Raise OptionError where others could reach the server without a key and nobody has said so."""
    exposed = [address for address in addresses if not ipaddress.ip_address(address.partition("%")[0]).is_loopback]
    if exposed and not keys and not options.no_api_key:
        raise OptionError(
            f"--host {options.host}: other machines can reach {exposed[0]}; give --api-key-file FILE, "
            "--api-key KEY, or --no-api-key to let them all in"
        )


class Guard:
    """ASGI middleware that refuses what may not use the server, before anything of it is read.

    Without a key, a request must name this machine (``Host``): a web page of another name that has made its name lead
    here (DNS rebinding) is refused. A request that a web page sends (``Origin``) must come from this server's own
    address or from one of ``origins``. Keys are compared in constant time.
    """

    def __init__(
        self, app: ASGIApp, *, keys: Collection[str], hosts: Collection[str], origins: Collection[str]
    ) -> None:
        self._app = app
        self._keys = [_digest(key) for key in keys]
        name = socket.gethostname().lower()
        self._hosts = {"localhost", name, f"{name}.local", *(host.lower() for host in hosts)}
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass an allowed request on."""
        if scope["type"] == "http":
            try:
                if sum(len(name) + len(value) for name, value in scope["headers"]) > MAX_HEADER_BYTES:
                    raise ApiError(431, f"the headers have more than {MAX_HEADER_BYTES} bytes, which is the limit")
                self._check(Headers(scope=scope), scope["path"])
            except ApiError as error:
                await error.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, headers: Headers, path: str) -> None:
        host = headers.get("host", "")
        if not self._keys and not self._is_here(host):
            raise ApiError(403, "the request names a host that is not this one; see --allowed-host", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins and urlsplit(origin).netloc.lower() != host.lower():
            raise ApiError(
                403, "web pages of this origin may not use the server; see --cors-origin", code="wrong_origin"
            )
        if self._keys and path not in OPEN_PATHS:
            kind, _, given = headers.get("authorization", "").partition(" ")
            found = _digest(given.strip()) if kind.lower() == "bearer" else b""
            if not sum(hmac.compare_digest(found, key) for key in self._keys):  # looks at all of them
                message = "the API key is wrong" if given else "an API key is needed: Authorization: Bearer KEY"
                raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _is_here(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").lower()
        except ValueError:
            return False
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name.partition("%")[0])
        except ValueError:
            return False
        return True  # an address in figures is nobody's name: no page of another host can have it


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
