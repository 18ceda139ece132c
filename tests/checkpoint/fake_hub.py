"""A Hugging Face Hub on 127.0.0.1: one public model, one gated, all else unknown. It records what is asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "1" * 40


class FakeHub(ThreadingHTTPServer):
    """Serves the files of ``directory`` as the model ``org/tiny`` and answers for ``org/gated`` as the hub does."""

    daemon_threads = True

    def __init__(self, directory: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.directory = directory
        self.fetched: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(directory: Path) -> Iterator[FakeHub]:
    """A hub that serves ``directory`` while the block runs."""
    with FakeHub(directory) as hub:
        thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if "org/gated" in path:
            self._send(403, b"{}", with_body, {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif "org/tiny" not in path:
            self._send(401, b"{}", with_body, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Not found"})
        elif path.startswith("/api/models/org/tiny"):
            self._send_listing(path, with_body)
        else:
            self._send_file(path, with_body)

    def _send_listing(self, path: str, with_body: bool) -> None:
        files = sorted(file for file in self.server.directory.iterdir() if file.is_file())
        listing: Any = {
            "id": "org/tiny",
            "sha": COMMIT,
            "siblings": [{"rfilename": file.name} for file in files],
        }
        if "/tree/" in path:
            listing = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _etag(file)} for file in files
            ]
        elif "/revision/" in path and not path.endswith(("/main", "/v2", COMMIT)):
            self._send(404, b"{}", with_body, {"X-Error-Code": "RevisionNotFound"})
            return
        self._send(200, json.dumps(listing).encode(), with_body, {"Content-Type": "application/json"})

    def _send_file(self, path: str, with_body: bool) -> None:
        file = self.server.directory / path.split("/")[-1]
        if with_body:
            self.server.fetched.append(file.name)
        self._send(200, file.read_bytes(), with_body, {"ETag": f'"{_etag(file)}"', "X-Repo-Commit": COMMIT})

    def _send(self, status: int, body: bytes, with_body: bool, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Not on the terminal of the tests."""


def _etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
