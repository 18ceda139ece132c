"""A Hugging Face Hub on 127.0.0.1: the interface that huggingface_hub calls, with the faults of networks on request.

It serves directories as models, small files itself and tensor files, as the hub does, by redirects to signed addresses
of a second server that end after a while. It counts every byte of a body that it sends. Tests and benchmarks import it;
by hand:

    python scripts/hub_server.py org/name=DIRECTORY ... [--port N] [--mbit RATE] [--latency SECONDS] [--resets P] ...
    HF_ENDPOINT=http://127.0.0.1:PORT HF_HUB_DISABLE_XET=1 ggufmoe convert org/name

GET /counts of it says what was sent of each file.

The answers have the status, headers and JSON of huggingface.co's, of which recordings are in ``tests/hub/fixtures``.
They differ in this: nothing is said of Xet, so that huggingface_hub takes the address that any client can use; the ETag
of a large file that is no GGUF file is not its SHA-256; and a repository that is not there is RepoNotFound for those
without a token too (huggingface_hub understands the real answer, 401 without a code, of addresses with https alone).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

COMMIT = "1" * 40
LARGE_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pth")
"""Files that are elsewhere, as those in git-lfs are."""
_PIECE_BYTES = 1 << 17
_MOST_PIECE_BYTES = 1 << 20
_PIECE_S = 0.001
"""A piece takes about so long on a fast line, which then costs this machine less."""
_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
_RESOLVE_CACHE = "api/resolve-cache/models/"
_DATE = "2026-01-01T00:00:00.000Z"
_JSON = {"Content-Type": "application/json; charset=utf-8"}
_TEXT = {"Content-Type": "text/plain; charset=utf-8"}


@dataclass
class Faults:
    """What goes wrong with bodies of large files; each probability is that of one answer. Changed at any time."""

    latency: float = 0.0
    """Seconds before every answer."""
    mbit: float = 0.0
    """The rate of all connections together, in Mbit/s; 0 for no limit."""
    resets: float = 0.0
    """Probability of a connection that is reset after a random part of the body."""
    truncations: float = 0.0
    """Probability of a connection that ends in order, but too early."""
    wrong_ranges: float = 0.0
    """Probability of a Content-Range, and a body, that are not what was asked for."""
    busy: float = 0.0
    """Probability of status 503."""
    limited: float = 0.0
    """Probability of status 429, with Retry-After."""
    hub_limited: float = 0.0
    """Probability of status 429 of the hub itself, whose RateLimit header says how many seconds to wait."""
    retry_after: int = 1
    stall_after: float = float("inf")
    """Bytes of large files after which every connection waits, without an end, until this is larger."""
    lifetime: float = 3600.0
    """Seconds for which a signed address is valid."""
    seed: int = 0


@dataclass
class Model:
    """One repository: its files, and who may read it."""

    directory: Path
    commit: str = COMMIT
    revisions: Mapping[str, str] = field(default_factory=dict)
    """Further branches and tags to commits; all have the same files."""
    is_gated: bool = False
    """Whether its files, though not its description, are for those alone who have a token."""
    tokens: Sequence[str] | None = None
    """The tokens that may read it where it is gated; None for all."""


@dataclass
class Sent:
    """One answer of a large file: its range, and how many bytes of it were handed to the system."""

    name: str
    begin: int
    end: int
    n_bytes: int
    n_resets: int
    """How often the counts had been reset when it began."""


class HubServer:
    """The hub while a ``with`` block runs. ``models`` maps ids to models or their directories."""

    def __init__(self, models: Mapping[str, Model | Path], faults: Faults | None = None, port: int = 0) -> None:
        self.models = {name: Model(one) if isinstance(one, Path) else one for name, one in models.items()}
        self.faults = faults or Faults()
        self.fetched: list[str] = []
        """Names of the files whose bodies were asked for, in order."""
        self.sent: list[Sent] = []
        self.sent_bytes = 0
        """Bytes of large files that were sent."""
        self.n_broken = 0
        """Answers of large files of which sent bytes may not have come: resets, and ranges that were not asked for."""
        self.statuses: Counter[int] = Counter()
        self.authorizations: list[tuple[str, str | None]] = []
        """The path and the Authorization header of each request to the second server."""
        self.lock = threading.Lock()
        self.epoch = 0
        self.n_resets = 0
        self.is_closed = False
        self.random = random.Random(self.faults.seed)
        self.bucket = _Bucket(self)
        self._hub = _Server(_HubHandler, self, port)
        self._storage = _Server(_StorageHandler, self, 0)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._hub.server_port}"

    @property
    def storage_url(self) -> str:
        return f"http://127.0.0.1:{self._storage.server_port}"

    def counts(self) -> dict[str, Any]:
        """What was sent so far, for ``/counts``."""
        with self.lock:
            by_name: Counter[str] = Counter()
            for one in self.sent:
                by_name[one.name] += one.n_bytes
            return {
                "bytes": dict(by_name),
                "requests": len(self.sent),
                "broken": self.n_broken,
                "statuses": dict(self.statuses),
                "processor_seconds": time.process_time(),
            }

    def reset_counts(self) -> None:
        with self.lock:
            self.sent.clear()
            self.sent_bytes = 0
            self.n_resets += 1
            self.fetched.clear()
            self.statuses.clear()

    def close_connections(self) -> None:
        """Close all connections to large files, as servers do with those that are idle."""
        self._storage.close_connections()
        self.wait_for_no_connections()

    def wait_for_no_connections(self) -> None:
        """Return when no connection to large files is open."""
        while self._storage.n_connections:
            time.sleep(0.005)

    def end_addresses(self) -> None:
        """Let all signed addresses end that were given out so far."""
        self.epoch += 1

    def signature(self, file: Path, expires: float) -> str:
        """What makes an address valid until ``expires``."""
        return hashlib.sha256(f"{file.resolve().as_posix()} {expires:.3f} {self.epoch}".encode()).hexdigest()[:32]

    def happens(self, probability: float) -> bool:
        """Draw whether a fault happens."""
        with self.lock:
            return self.random.random() < probability

    def __enter__(self) -> HubServer:
        for server in (self._hub, self._storage):
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_closed = True
        for server in (self._hub, self._storage):
            server.shutdown()
            server.close_connections()
            server.server_close()


class _Bucket:
    """Holds all connections together to one rate."""

    def __init__(self, hub: HubServer) -> None:
        self._hub = hub
        self._lock = threading.Lock()
        self._free_at = 0.0

    @property
    def piece_bytes(self) -> int:
        """What is sent at once."""
        mbit = self._hub.faults.mbit
        return max(_PIECE_BYTES, min(_MOST_PIECE_BYTES, int(mbit * 1e6 / 8 * _PIECE_S))) if mbit else _MOST_PIECE_BYTES

    def take(self, n_bytes: int) -> None:
        """Return when so many bytes may be sent."""
        rate = self._hub.faults.mbit * 1e6 / 8
        if not rate:
            return
        with self._lock:
            self._free_at = max(self._free_at, time.monotonic() - 0.01) + n_bytes / rate
            wait = self._free_at - time.monotonic()
        if wait > 0:
            time.sleep(wait)


class _Server(ThreadingHTTPServer):
    """A server whose threads end with it, though clients keep their connections."""

    daemon_threads = False
    request_queue_size = 64

    def __init__(self, handler: type[BaseHTTPRequestHandler], hub: HubServer, port: int) -> None:
        super().__init__(("127.0.0.1", port), handler)
        self.hub = hub
        self._connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    @property
    def n_connections(self) -> int:
        return len(self._connections)

    def shutdown_request(self, request: Any) -> None:
        self._connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self._connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are no news."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        self._begin(with_body=False)

    def do_GET(self) -> None:
        self._begin(with_body=True)

    @property
    def hub(self) -> HubServer:
        return self.server.hub

    def _begin(self, *, with_body: bool) -> None:
        if self.hub.faults.latency:
            time.sleep(self.hub.faults.latency)
        self.answer(with_body=with_body)

    def answer(self, *, with_body: bool) -> None:
        raise NotImplementedError

    def send(self, status: int, headers: Mapping[str, str], body: bytes = b"", *, with_body: bool = True) -> None:
        """One whole answer."""
        with self.hub.lock:
            self.hub.statuses[status] += 1
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Not on the terminal of the tests."""


class _HubHandler(_Handler):
    """The hub itself: information, lists of files, small files, and redirects to large ones."""

    def answer(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path).strip("/")
        if path == "counts":
            self.send(200, _JSON, json.dumps(self.hub.counts()).encode())
            return
        if self.hub.faults.hub_limited and self.hub.happens(self.hub.faults.hub_limited):
            self.send(429, self._rate_limit(0, self.hub.faults.retry_after), b"Too Many Requests", with_body=with_body)
            return
        repo_id = next((name for name in self.hub.models if f"{name}/" in f"{path}/"), None)
        if repo_id is None:
            self._refuse(404, "Repository not found", "RepoNotFound", with_body=with_body)
            return
        model = self.hub.models[repo_id]
        before, rest = path[: path.index(repo_id)], path[path.index(repo_id) + len(repo_id) :].strip("/")
        if before == _RESOLVE_CACHE:
            self._send_small(model, *rest.split("/", 1), with_body=with_body)
            return
        kind, revision, name = [*rest.split("/", 2), "", ""][:3]
        revision = revision or "main"
        commits = {"main": model.commit, model.commit: model.commit, **model.revisions}
        if revision not in commits and revision not in commits.values():
            self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound", with_body=with_body)
        elif kind == "resolve":
            self._resolve(repo_id, commits.get(revision, revision), name, with_body=with_body)
        elif kind == "tree":
            self._send_json(self._tree(model.directory, name), with_body=with_body)
        else:
            self._send_json(self._information(repo_id, commits.get(revision, revision)), with_body=with_body)

    def _rate_limit(self, n_left: int, seconds: int) -> dict[str, str]:
        kind, limit = ("api", 500) if self.path.startswith("/api/models/") else ("resolvers", 3000)
        policy = f'"fixed window";"{kind}";q={limit};w=300'
        return {"RateLimit": f'"{kind}";r={n_left};t={seconds}', "RateLimit-Policy": policy}

    def _send_json(self, answer: Any, *, with_body: bool) -> None:
        headers = {**_JSON, **self._rate_limit(499, 300)}
        self.send(200, headers, json.dumps(answer).encode(), with_body=with_body)

    def _refuse(
        self, status: int, message: str, code: str, *, with_body: bool, headers: Mapping[str, str] | None = None
    ) -> None:
        is_json = self.path.startswith("/api/models/")
        body = json.dumps({"error": message}) if is_json else message
        said = {"X-Error-Code": code, "X-Error-Message": message, **(_JSON if is_json else _TEXT), **(headers or {})}
        self.send(status, {**said, **self._rate_limit(2999, 300)}, body.encode(), with_body=with_body)

    def _information(self, repo_id: str, commit: str) -> dict[str, Any]:
        model = self.hub.models[repo_id]
        with_blobs = "blobs" in parse_qs(urlsplit(self.path).query)
        entries = [_tree_entry(model.directory, file) for file in _files(model.directory)]
        return {
            "_id": hashlib.sha256(repo_id.encode()).hexdigest()[:24],
            "id": repo_id,
            "modelId": repo_id,
            "author": repo_id.partition("/")[0],
            "sha": commit,
            "lastModified": _DATE,
            "createdAt": _DATE,
            "private": False,
            "gated": "manual" if model.is_gated else False,
            "disabled": False,
            "tags": [],
            "siblings": [_sibling(entry, with_blobs=with_blobs) for entry in entries],
            "usedStorage": sum(entry["size"] for entry in entries),
            "downloads": 0,
            "likes": 0,
        }

    def _tree(self, directory: Path, folder: str) -> list[dict[str, Any]]:
        """The files and folders of ``folder``; with ``recursive`` those below it too."""
        is_recursive = parse_qs(urlsplit(self.path).query).get("recursive", ["false"])[0].lower() == "true"
        found = (directory / folder).rglob("*") if is_recursive else (directory / folder).glob("*")
        return [_tree_entry(directory, path) for path in sorted(found)]

    def _resolve(self, repo_id: str, commit: str, name: str, *, with_body: bool) -> None:
        model = self.hub.models[repo_id]
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        restricted = f"Access to model {repo_id} is restricted"
        if model.is_gated and not token:
            said = f"{restricted}. You must have access to it and be authenticated to access it. Please log in."
            asked = {"WWW-Authenticate": 'Bearer realm="Authentication required", charset="UTF-8"'}
            self._refuse(401, said, "GatedRepo", headers=asked, with_body=with_body)
            return
        if model.is_gated and model.tokens is not None and token not in model.tokens:
            page = f"{self.hub.url}/{repo_id}"
            said = f"{restricted} and you are not in the authorized list. Visit {page} to ask for access."
            self._refuse(403, said, "GatedRepo", with_body=with_body)
            return
        file = model.directory / name
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if file not in _files(model.directory):
            self._refuse(404, "Entry not found", "EntryNotFound", headers=headers, with_body=with_body)
            return
        etag = etag_of(file)
        headers |= {"X-Linked-Etag": f'"{etag}"', **_TEXT, **_disposition(file), **self._rate_limit(2999, 300)}
        if not name.endswith(LARGE_SUFFIXES):
            asked_for = quote(urlsplit(self.path).path, safe="")
            cached = f"/{quote(f'{_RESOLVE_CACHE}{repo_id}/{commit}/{name}')}"
            self._redirect(307, f"{cached}?{asked_for}=&etag=%22{etag}%22", headers, with_body=with_body)
            return
        expires = time.time() + self.hub.faults.lifetime
        query = f"Expires={expires:.3f}&Signature={self.hub.signature(file, expires)}"
        address = f"{self.hub.storage_url}{quote(file.resolve().as_posix())}?{query}"
        headers |= {"X-Linked-Size": str(file.stat().st_size), "Cache-Control": "no-store"}
        self._redirect(302, address, headers, with_body=with_body)

    def _redirect(self, status: int, address: str, headers: Mapping[str, str], *, with_body: bool) -> None:
        words = {302: "Found", 307: "Temporary Redirect"}[status]
        body = f"{words}. Redirecting to {address}".encode()
        self.send(status, {**headers, "Location": address}, body, with_body=with_body)

    def _send_small(self, model: Model, commit: str, name: str, *, with_body: bool) -> None:
        """A file that is in git, from where ``_resolve`` has redirected to."""
        file = model.directory / name
        if with_body:
            self.hub.fetched.append(name)
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes", "ETag": f'"{etag_of(file)}"'}
        self.send(200, {**headers, **_TEXT, **_disposition(file)}, file.read_bytes(), with_body=with_body)


class _StorageHandler(_Handler):
    """Where large files are: ranges of them, for those who have a signed address that has not ended."""

    def answer(self, *, with_body: bool) -> None:
        parts = urlsplit(self.path)
        file, query = Path(unquote(parts.path)), parse_qs(parts.query)
        expires = float(query.get("Expires", ["0"])[0])
        with self.hub.lock:
            self.hub.authorizations.append((file.name, self.headers.get("Authorization")))
        faults = self.hub.faults
        if expires < time.time() or query.get("Signature") != [self.hub.signature(file, expires)]:
            self.send(403, {}, b"<Error>AccessDenied</Error>")
        elif self.hub.happens(faults.busy):
            self.send(503, {}, b"busy")
        elif self.hub.happens(faults.limited):
            self.send(429, {"Retry-After": str(faults.retry_after)}, b"slow down")
        else:
            self._send_range(file, with_body=with_body)

    def _send_range(self, file: Path, *, with_body: bool) -> None:
        size = file.stat().st_size
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        begin, end = (int(asked[1]), min(int(asked[2]) + 1, size)) if asked else (0, size)
        if begin >= end:
            self.send(416, {"Content-Range": f"bytes */{size}"})
            return
        if asked and begin and self.hub.happens(self.hub.faults.wrong_ranges):
            begin, end = begin - 1, end - 1
            self._count_broken()
        status = 206 if asked else 200
        with self.hub.lock:
            self.hub.statuses[status] += 1
            self.hub.fetched.append(file.name)
        self.send_response(status)
        self.send_header("Content-Length", str(end - begin))
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", f'"{_storage_etag(file)}"')
        if asked:
            self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
        self.end_headers()
        if with_body:
            self._send_body(file, begin, end)

    def _count_broken(self) -> None:
        with self.hub.lock:
            self.hub.n_broken += 1

    def _send_body(self, file: Path, begin: int, end: int) -> None:
        stop, is_reset = end, self.hub.happens(self.hub.faults.resets)
        if is_reset or self.hub.happens(self.hub.faults.truncations):
            with self.hub.lock:
                stop = begin + self.hub.random.randrange(end - begin)
        with self.hub.lock:
            sent = Sent(file.name, begin, end, 0, self.hub.n_resets)
            self.hub.sent.append(sent)
        with file.open("rb") as opened:
            position = begin
            while position < stop:
                n_bytes = min(self.hub.bucket.piece_bytes, stop - position)
                self.hub.bucket.take(n_bytes)
                while self.hub.sent_bytes + n_bytes > self.hub.faults.stall_after and not self.hub.is_closed:
                    time.sleep(0.01)
                with self.hub.lock:  # before the client can have it
                    sent.n_bytes += n_bytes
                    self.hub.sent_bytes += n_bytes if sent.n_resets == self.hub.n_resets else 0
                self.connection.sendfile(opened, position, n_bytes)
                position += n_bytes
        if stop < end:
            self.close_connection = True
        if is_reset:
            self._count_broken()
            # a socket that lingers for no time sends RST in place of FIN
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def etag_of(file: Path) -> str:
    """A word for the content of a file, which changes with it: the id of its git blob, as on the hub.

    Of a large file it is 64 hexadecimal digits: of a GGUF file its SHA-256, as on the hub, of others what is quicker.
    """
    status = file.stat()
    if not file.name.endswith(LARGE_SUFFIXES):
        return _blob_id(file.read_bytes())
    if file.suffix == ".gguf":
        return _sha256(file, status.st_size, status.st_mtime_ns)
    return hashlib.sha256(f"{file.name} {status.st_size} {status.st_mtime_ns}".encode()).hexdigest()


def _storage_etag(file: Path) -> str:
    """The ETag where the large file is, which on the hub is another one than X-Linked-Etag."""
    return hashlib.sha256(f"stored {etag_of(file)}".encode()).hexdigest()


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _disposition(file: Path) -> dict[str, str]:
    return {"Content-Disposition": f"inline; filename*=UTF-8''{quote(file.name)}; filename=\"{quote(file.name)}\";"}


@functools.cache
def _sha256(file: Path, n_bytes: int, mtime_ns: int) -> str:
    del n_bytes, mtime_ns  # another content has others
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while piece := opened.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def _tree_entry(directory: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(directory).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": _blob_id(name.encode()), "size": 0, "path": name}
    size, etag = path.stat().st_size, etag_of(path)
    if not path.name.endswith(LARGE_SUFFIXES):
        return {"type": "file", "oid": etag, "size": size, "path": name}
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{etag}\nsize {size}\n".encode()
    lfs = {"oid": etag, "size": size, "pointerSize": len(pointer)}
    return {"type": "file", "oid": _blob_id(pointer), "size": size, "lfs": lfs, "path": name}


def _sibling(entry: dict[str, Any], *, with_blobs: bool) -> dict[str, Any]:
    """A file as the information about a model has it; with its size and hash where they are asked for."""
    if not with_blobs:
        return {"rfilename": entry["path"]}
    sibling = {"rfilename": entry["path"], "size": entry["size"], "blobId": entry["oid"]}
    if "lfs" in entry:
        lfs = entry["lfs"]
        sibling["lfs"] = {"sha256": lfs["oid"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
    return sibling


@contextlib.contextmanager
def serving(directory: Path, faults: Faults | None = None) -> Iterator[HubServer]:
    """A hub with ``directory`` as the model org/tiny (revisions main and v2), and, for a token, as org/gated."""
    models = {
        "org/tiny": Model(directory, revisions={"v2": COMMIT}),
        "org/gated": Model(directory, is_gated=True),
    }
    with HubServer(models, faults) as hub:
        yield hub


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="ORG/NAME=DIRECTORY")
    parser.add_argument("--port", type=int, default=0)
    for one in fields(Faults):
        assert isinstance(one.default, (int, float)), "every fault is a number"
        parser.add_argument(f"--{one.name.replace('_', '-')}", type=type(one.default), default=one.default)
    given = vars(parser.parse_args(argv))
    models = {name: Path(path).resolve() for name, _, path in (one.partition("=") for one in given.pop("models"))}
    port = given.pop("port")
    with HubServer(models, Faults(**given), port) as hub:
        print(f"HF_ENDPOINT={hub.url}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
