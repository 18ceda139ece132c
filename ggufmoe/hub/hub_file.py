"""One file of a model on the hub at a fixed commit, of which ranges are read; nothing of it is stored.

huggingface_hub says where the file is: a signed address that ends after a while and is then asked for again. Whatever a
network does (timeouts, resets, answers that are too short or of other bytes, servers that are busy) is tried again,
going on where it stopped. A file that changes is an error.
"""

from __future__ import annotations

import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ggufmoe.errors import Cancelled, HubError, one_line
from ggufmoe.hub.hub_http import RangeAnswer, RangeClient, headers_for, request_errors
from ggufmoe.hub.source_cache import SourceCache
from ggufmoe.sizes import counted

TRIES = 8
"""Requests in a row that bring nothing before the file is given up: about a minute and a half."""
_LONGEST_PAUSE_S = 30.0
_LONGEST_RETRY_AFTER_S = 300.0
_POLL_S = 0.1

_USED_UP = re.compile(r"\br\s*=\s*0\s*;\s*t\s*=\s*(\d{1,9})", re.ASCII)
"""In the header RateLimit: no request is left for so many seconds."""
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
_BUSY = frozenset((408, 425, 429, 500, 502, 503, 504))
_REFUSED = frozenset((401, 403, 404, 410))
"""Answers of a signed address that has ended."""


class Line:
    """What all connections of one conversion share: how much came over them, pauses, and whether to stop."""

    def __init__(self, first_pause_s: float = 0.5) -> None:
        """``first_pause_s`` is the pause after a failed request; it doubles with each further one."""
        self.n_bytes = 0
        """Bytes of files that were received, those that were received again included."""
        self.stopped: Callable[[], bool] = lambda: False
        """Whether the conversion is stopping; asked often by all that wait."""
        self.client = RangeClient(self.received)
        self.cache: SourceCache | None = None
        """Where what comes is kept for the second time that it is read."""
        self._first_pause_s = first_pause_s
        self._lock = threading.Lock()
        self._quiet_until = 0.0

    def received(self, n_bytes: int) -> None:
        """Count bytes. Raises Cancelled if the conversion is stopping."""
        with self._lock:
            self.n_bytes += n_bytes
        self.check()

    def check(self) -> None:
        """Raise Cancelled if the conversion is stopping."""
        if self.stopped():
            raise Cancelled("stopped while reading from the hub")

    def be_quiet(self, seconds: float) -> None:
        """Begin no request, on any connection, for so long: the hub has asked for it."""
        with self._lock:
            self._quiet_until = max(self._quiet_until, time.monotonic() + min(seconds, _LONGEST_RETRY_AFTER_S))

    def wait_until_allowed(self) -> None:
        """Return when a request may begin. Raises Cancelled if the conversion is stopping."""
        self._wait_until(self._quiet_until)

    def pause(self, n_failed: int) -> None:
        """Wait after ``n_failed`` requests in a row have failed. Raises Cancelled if the conversion is stopping."""
        seconds = min(_LONGEST_PAUSE_S, self._first_pause_s * 2.0 ** (n_failed - 1))
        self._wait_until(time.monotonic() + seconds * random.uniform(0.75, 1.25))

    def _wait_until(self, moment: float) -> None:
        while (left := moment - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, _POLL_S))
        self.check()


@dataclass(frozen=True)
class Location:
    """Where a file's bytes are at the moment, and what identifies its content."""

    url: str
    etag: str | None
    n_bytes: int
    is_signed: bool
    """Whether the hub refers to another place, by an address that ends."""


class Store(Protocol):
    """What may have bytes of a file already."""

    def take(self, file: HubFile, begin: int, buffer: memoryview) -> bool:
        """Fill ``buffer`` from byte ``begin`` on, or return False."""


class _Failed(Exception):
    """A request that may succeed when it is made again after a pause."""


class _Ended(_Failed):
    """A request to an address that has ended; there is a new one."""


class HubFile:
    """A ``ByteReader`` of one file of a repository at a commit."""

    def __init__(self, repo_id: str, name: str, commit: str, line: Line) -> None:
        """Asks the hub where the file is. Raises HubError, and huggingface_hub's own errors for what is refused."""
        self.path = Path(repo_id, name)
        self.store: Store | None = None
        self._repo_id, self._name, self._commit = repo_id, name, commit
        self._line = line
        self._lock = threading.Lock()
        self._location = self._located()
        self._served_etag: str | None = None

    @property
    def n_bytes(self) -> int:
        """The size of the file."""
        return self._location.n_bytes

    @property
    def etag(self) -> str | None:
        """What the hub calls the content: mostly its SHA-256."""
        return self._location.etag

    def read_into(self, begin: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from byte ``begin`` on; safe from several threads at once.

        Raises HubError if the hub does not give the bytes or the file has changed, Cancelled if the conversion stops.
        """
        if self.store is None or not self.store.take(self, begin, buffer):
            self.fetch_into(begin, buffer)

    def fetch_into(self, begin: int, buffer: memoryview) -> None:
        """``read_into`` over the network, or from what is kept of the file."""
        if begin + len(buffer) > self.n_bytes:
            raise HubError(f"{self.path} has {self.n_bytes} bytes, its header says more; it is damaged on the hub")
        cache = self._line.cache
        if cache is None:
            self._receive(begin, buffer)
            return
        for part in cache.parts(self, begin, begin + len(buffer)):
            piece = buffer[part.begin - begin : part.end - begin]
            if part.place is None:
                self._receive(part.begin, piece)
                cache.keep(self, part.begin, piece)
            else:
                cache.read_into(part.place, piece)

    def _receive(self, begin: int, buffer: memoryview) -> None:
        """``read_into``, always over the network."""
        failures: tuple[type[Exception], ...] = (_Failed, *request_errors())
        done = n_failed = 0
        while done < len(buffer):
            before = done
            location = self._location
            try:
                self._line.wait_until_allowed()
                headers = headers_for(location.url)
                with self._line.client.asked_for(location.url, headers, begin + done, begin + len(buffer)) as answer:
                    self._check(answer, location, begin + done, begin + len(buffer))
                    while done < len(buffer) and (n_bytes := answer.read_into(buffer[done:])):
                        done += n_bytes
                    if done < len(buffer):
                        raise _Failed(f"the answer ended {counted(len(buffer) - done, 'byte')} too early")
            except failures as error:
                n_failed = 1 if done > before else n_failed + 1
                self._give_up_after(n_failed, error)
                if not isinstance(error, _Ended):
                    self._line.pause(n_failed)

    def close(self) -> None:
        """Close the connections of the line that nobody uses; a later read opens new ones."""
        self._line.client.close_idle()

    def _give_up_after(self, n_failed: int, error: Exception) -> None:
        if n_failed >= TRIES:
            raise HubError(
                f"{self.path} cannot be read from the hub, {TRIES} times in a row ({one_line(error)}); check the "
                "connection and go on with --resume"
            ) from error

    def _check(self, answer: RangeAnswer, location: Location, begin: int, end: int) -> None:
        """Raise unless the answer is that range of this file."""
        if answer.status in _BUSY:
            self._line.be_quiet(seconds_to_wait(answer.headers))
            raise _Failed(f"the hub answers with status {answer.status}")
        if answer.status in _REFUSED and location.is_signed:
            self._renew(location)
            raise _Ended(f"its address has ended (status {answer.status})")
        if answer.status == 416:
            raise self._changed("it is shorter now")
        if answer.status == 200 and (begin, end) == (0, self.n_bytes):
            return
        if answer.status != 206:
            raise HubError(
                f"{self.path}: the hub answers a request for a range with status {answer.status}; --keep-source "
                "fetches whole files"
            )
        found = _CONTENT_RANGE.fullmatch(answer.headers.get("content-range", ""))
        if found is not None and found[3] not in ("*", str(self.n_bytes)):
            raise self._changed(f"it has {found[3]} bytes now, not {self.n_bytes}")
        if found is None or (int(found[1]), int(found[2])) != (begin, end - 1):
            raise _Failed(
                f"the answer has the range {answer.headers.get('content-range')!r:.60}, not what was asked for"
            )
        etag = answer.headers.get("etag", "").removeprefix("W/").strip('"') or None
        with self._lock:
            self._served_etag, before = etag, self._served_etag
        if before is not None and etag is not None and before != etag:
            self._renew(location)  # another server may have another word for the same content; the hub knows

    def _renew(self, old: Location) -> None:
        """Ask the hub again where the file is, unless another thread has. HubError if it is not the same file now."""
        from huggingface_hub.errors import HfHubHTTPError

        with self._lock:
            if self._location is not old:
                return
            try:
                new = self._located()
            except HfHubHTTPError as error:
                raise HubError(f"{self.path}: the hub does not give it any more ({one_line(error)})") from error
            if (new.etag, new.n_bytes) != (old.etag, old.n_bytes):
                raise self._changed("its content is another one")
            self._location = new

    def _changed(self, how: str) -> HubError:
        return HubError(f"{self.path} has changed on the hub while it was read: {how}; start again without --resume")

    def _located(self) -> Location:
        """Where the file is, by the hub. Raises HubError, and huggingface_hub's own errors for what is refused."""
        from huggingface_hub import get_hf_file_metadata, hf_hub_url
        from huggingface_hub.errors import HfHubHTTPError

        url = hf_hub_url(self._repo_id, self._name, revision=self._commit)
        n_failed = 0
        while True:
            try:
                self._line.wait_until_allowed()
                found = get_hf_file_metadata(url)
                break
            except HfHubHTTPError as error:
                if error.response is None or error.response.status_code not in _BUSY:
                    raise
                self._line.be_quiet(seconds_to_wait(error.response.headers))
                failure: Exception = error
            except request_errors() as error:
                failure = error
            n_failed += 1
            self._give_up_after(n_failed, failure)
            self._line.pause(n_failed)
        if found.size is None:
            raise HubError(f"{self.path}: the hub does not say how long it is; --keep-source fetches whole files")
        return Location(found.location, found.etag, found.size, is_signed=found.location != url)


def seconds_to_wait(headers: Mapping[str, str]) -> float:
    """Seconds after which a busy hub wants to be asked again, by its answer's ``headers``; 0 if they do not say.

    The storage says it with ``Retry-After`` (a date counts as nothing said), the hub with ``RateLimit``.
    """
    said = {name.lower(): value for name, value in headers.items()}
    after = said.get("retry-after", "")
    used_up = _USED_UP.search(said.get("ratelimit", ""))
    return max(float(after) if after.isdecimal() else 0.0, float(used_up[1]) if used_up else 0.0)
