"""Downloads a GGUF model of the hub: over several connections, resumed after an interruption, and checked by its hash.

The bytes come by ``hub.hub_file``, which copes with networks; what is on disk is noted in a journal beside the partial
file.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from ggufmoe.errors import HubError, NoSpaceError, OutputError, ResumeError
from ggufmoe.files import delete, move, partial_path, sync_directory
from ggufmoe.hub.hub_errors import explained, hub_failures
from ggufmoe.hub.hub_file import HubFile, Line
from ggufmoe.hub.hub_models import HubEntry, HubGGUF
from ggufmoe.sizes import file_size
from ggufmoe.work import CancelFlag, OnProgress, Work, is_set
from ggufmoe.writing.journal import Journal
from ggufmoe.writing.place import PartialFile, journal_path

CHUNK_BYTES = 2 << 20
"""What is asked for, and journalled, at once. After a kill a chunk of each connection is fetched again."""
CONNECTIONS = 8
_FLUSH_INTERVAL_S = 1.0


def download(
    model: HubGGUF,
    targets: Sequence[Path],
    *,
    on_progress: OnProgress | None = None,
    cancel: CancelFlag | None = None,
) -> tuple[str, ...]:
    """Write the files of a model to ``targets``, each under its name when it is complete; returns their SHA-256.

    What an interrupted run has written is kept, if the file on the hub is still the same. Reports the phases
    "download" and "hash". Raises HubError, NoSpaceError before and while it writes, OutputError and Cancelled.
    """
    _check_space(model, targets)
    line = Line()
    line.stopped = lambda: is_set(cancel)
    work = Work("download", model.n_bytes, stopped="stopped", on_progress=on_progress, cancel=cancel)
    for entry, target in zip(model.entries, targets, strict=True):
        if target.is_file() and target.stat().st_size == entry.n_bytes:
            work.advance(entry.n_bytes, entry.name)
        else:
            _fetch(model, entry, target, line, work)
    hashes = hash_files(targets, on_progress=on_progress, cancel=cancel)
    for entry, target, found in zip(model.entries, targets, hashes, strict=True):
        if entry.sha256 not in (None, found):
            delete(target)
            raise HubError(
                f"{model.repo_id}/{entry.name} came with the hash {found[:12]}, the hub says {entry.sha256[:12]}; it "
                "was deleted: download it again"
            )
    return hashes


def hash_files(
    paths: Sequence[Path], *, on_progress: OnProgress | None = None, cancel: CancelFlag | None = None
) -> tuple[str, ...]:
    """The SHA-256 of each file, hexadecimal."""
    sizes = [path.stat().st_size for path in paths]
    work = Work("hash", sum(sizes), on_progress=on_progress, cancel=cancel)
    hashes = []
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb", buffering=0) as file:
            while piece := file.read(CHUNK_BYTES):
                digest.update(piece)
                work.check()
                work.advance(len(piece), path.name)
        hashes.append(digest.hexdigest())
    return tuple(hashes)


def _check_space(model: HubGGUF, targets: Sequence[Path]) -> None:
    parent = targets[0].parent
    held = sum(_on_disk(path) for target in targets for path in (target, partial_path(target)))
    free = shutil.disk_usage(parent).free + held
    if model.n_bytes > free:
        raise NoSpaceError(
            f"{model.name} needs {file_size(model.n_bytes)}, {parent} has {file_size(free)} free; make room, or take a "
            "smaller file type"
        )


def _on_disk(path: Path) -> int:
    try:
        status = path.stat()
    except OSError:
        return 0
    return int(getattr(status, "st_blocks", status.st_size // 512)) * 512


def _fetch(model: HubGGUF, entry: HubEntry, target: Path, line: Line, work: Work) -> None:
    try:
        source = HubFile(model.repo_id, entry.name, model.commit, line)
    except hub_failures() as error:
        raise explained(f"{model.repo_id}/{entry.name}", model.repo_id, error) from error
    if source.n_bytes != entry.n_bytes:
        raise HubError(f"{model.repo_id}/{entry.name} has changed on the hub meanwhile; start again")
    partial = partial_path(target)
    journal = Journal(journal_path(target), f"{source.path.as_posix()} {source.n_bytes} {source.etag} {CHUNK_BYTES}")
    finished = _finished(journal, partial, source.n_bytes)
    try:
        file = PartialFile(partial, source.n_bytes, keep=finished is not None)
        try:
            journal.begin() if finished is None else journal.go_on()
            _Transfer(source, file, journal, work).run(finished or set())
        finally:
            journal.close()
            file.close()
            source.close()
        move(partial, target)
        sync_directory(target.parent)
        journal.remove()
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise NoSpaceError(f"{target.parent} became full; make room, and go on with --resume") from error
        raise OutputError(f"{target} cannot be written: {error.strerror or error}") from error


def _finished(journal: Journal, partial: Path, n_bytes: int) -> set[int] | None:
    """The chunks that an earlier run has written; None where there is nothing to go on with."""
    try:
        finished = journal.read()
    except ResumeError:  # another file has this name on the hub now
        return None
    is_there = partial.is_file() and partial.stat().st_size == n_bytes
    return finished if is_there else None


class _Transfer:
    """Fetches the chunks of one file that are missing, and journals those that are on disk."""

    def __init__(self, source: HubFile, file: PartialFile, journal: Journal, work: Work) -> None:
        self._source, self._file, self._journal, self._work = source, file, journal, work
        self._lock = threading.Lock()
        self._written: list[int] = []
        self._flushed_s = time.monotonic()

    def run(self, finished: set[int]) -> None:
        """Return when all chunks are on disk; ``finished`` are there already."""
        n_chunks = -(-self._source.n_bytes // CHUNK_BYTES)
        there = sum(self._size(chunk) for chunk in finished)
        if there:
            self._work.advance(there, self._source.path.name)
        try:
            self._work.map(self._fetch, [chunk for chunk in range(n_chunks) if chunk not in finished], CONNECTIONS)
        finally:
            self._flush()

    def _size(self, chunk: int) -> int:
        return min(CHUNK_BYTES, self._source.n_bytes - chunk * CHUNK_BYTES)

    def _fetch(self, chunk: int) -> None:
        self._work.check()
        data = memoryview(bytearray(self._size(chunk)))
        self._source.fetch_into(chunk * CHUNK_BYTES, data)
        self._file.write_at(chunk * CHUNK_BYTES, data)
        with self._lock:
            self._written.append(chunk)
            is_time = time.monotonic() - self._flushed_s >= _FLUSH_INTERVAL_S
            if is_time:
                self._flushed_s = time.monotonic()
        if is_time:
            self._flush()
        self._work.advance(len(data), self._source.path.name)

    def _flush(self) -> None:
        with self._lock:
            written, self._written = self._written, []
            if written:
                self._file.sync()
                self._journal.add(written)
