"""The writer: executes an export plan on all cores, into partial files that get their names only when they are whole.

Workers take tiles in order and write each at its place; the calling thread reports progress, flushes and keeps the
journal. Whatever stops a run (an error, a cancellation, a crash) leaves partial files and a journal to go on from, and
never a file that looks finished. The order of work does not change a byte.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ggufmoe.errors import Cancelled, GGUFError, NoSpaceError, OutputError, ResumeError
from ggufmoe.export.plan import ExportPlan, PlannedFile
from ggufmoe.export.rows import stored_type
from ggufmoe.files import check_not_input, check_output_file, partial_path, sync_directory
from ggufmoe.gguf.header import read_header
from ggufmoe.quant.kernels import QuantizerName
from ggufmoe.sizes import file_size
from ggufmoe.work import CancelFlag, OnProgress, Progress, is_set, thread_count
from ggufmoe.writing.formats import prepare_kernels
from ggufmoe.writing.journal import Journal, fingerprint
from ggufmoe.writing.pagecache import PassingFiles
from ggufmoe.writing.tiles import ImportanceCache, Tile, TileMaker, tiles

_LOG = logging.getLogger("ggufmoe")

FLUSH_INTERVAL_S = 5.0
"""How often finished tiles are flushed to disk and journalled: what a crash can cost."""

_PROGRESS_INTERVAL_S = 0.1
_RELEASE_INTERVAL_S = 1.0
_READERS = 2
"""Workers beyond the cores that compute: while they wait for the disk, none of the cores does."""


class OutputFile(Protocol):
    """A file that is written by position, from several threads at once."""

    def write_at(self, offset: int, data: memoryview) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class WriteOptions:
    """How a plan is executed; none of this changes the bytes."""

    threads: int | None = None
    quantizer: QuantizerName = "auto"
    cache: bool = True
    """Whether compiled kernels are loaded from the user's cache folder and kept there."""
    resume: bool = False
    force: bool = False
    on_progress: OnProgress | None = None
    cancel: CancelFlag | None = None
    prepare: Callable[[], None] | None = None
    """Called when everything is checked and nothing is written yet: what takes long and cannot be streamed."""
    reads_back: Callable[[PlannedFile, Path], bool] | None = None
    """Whether a written file reads as planned; by default, as a GGUF file."""
    flush_interval_s: float = FLUSH_INTERVAL_S
    open_output: Callable[[Path, int, bool], OutputFile] | None = None
    """Opens a partial file: its path, its size, and whether to keep what is in it. By default, a file on disk."""


@dataclass(frozen=True)
class WriteReport:
    """What a run did; a resumed one counts only its own work."""

    paths: tuple[Path, ...]
    bytes_read: int
    bytes_written: int
    seconds: float


def write_plan(plan: ExportPlan, options: WriteOptions) -> WriteReport:
    """Write the files of a plan; they appear under their names, all of them, when they are complete and checked.

    Raises OutputExistsError, OutputError, NoSpaceError or ResumeError before anything is written, NonFiniteError or
    NoSpaceError on the way, Cancelled when asked to stop.
    """
    started = time.monotonic()
    journal = Journal(journal_path(plan.output), fingerprint(plan))
    finished = _finished_tiles(plan, journal) if options.resume else None
    check_output(plan, force=options.force, resume=finished is not None)
    check_space(plan, resume=finished is not None)
    if finished is None and any(partial_path(file.path).exists() for file in plan.files):
        _LOG.warning("starting %s afresh, over what an interrupted run left; --resume goes on with that", plan.output)
    prepare_kernels(plan, options.quantizer, cache=options.cache)
    if options.prepare is not None:
        options.prepare()
    with _output_errors(plan):
        run = _Run(plan, options, journal, finished)
        run.execute()
        _finish(plan, journal, options.reads_back or reads_back_as_gguf)
    return WriteReport(
        tuple(file.path for file in plan.files), run.bytes_read, run.bytes_written, time.monotonic() - started
    )


def journal_path(output: Path) -> Path:
    """Where the journal of an output is."""
    return output.with_name(output.name + ".partial.journal")


def check_output(plan: ExportPlan, *, force: bool, resume: bool) -> None:
    """Refuse an output that is an input, is there already, or cannot be there.

    A resumed run may have given some of its files their names already: those are its own.
    """
    for file in plan.files:
        for path in (file.path, partial_path(file.path), journal_path(plan.output)):
            check_not_input(path, plan.input_paths)
        check_output_file(file.path, replace=force or (resume and _is_complete(file, file.path)))


def _is_complete(file: PlannedFile, path: Path) -> bool:
    """Whether a file has the size and the header that are planned."""
    try:
        with open(path, "rb") as opened:
            return path.stat().st_size == file.n_bytes and opened.read(len(file.header)) == file.header
    except OSError:
        return False


def check_space(plan: ExportPlan, *, resume: bool) -> None:
    """Refuse a plan that does not fit on the disk; what a partial file holds already counts as there."""
    parent = plan.output.parent
    held = sum(_allocated(partial_path(file.path)) for file in plan.files)
    held += sum(_allocated(file.path) for file in plan.files if resume and _is_complete(file, file.path))
    needed, free = plan.n_bytes, shutil.disk_usage(parent).free + held
    if needed > free:
        raise NoSpaceError(
            f"{plan.output} needs {file_size(needed)}, {parent} has {file_size(free)} free; make room, or choose "
            "another place"
        )


def _allocated(path: Path) -> int:
    try:
        status = path.lstat()
    except OSError:
        return 0
    return int(getattr(status, "st_blocks", status.st_size // 512)) * 512


def _finished_tiles(plan: ExportPlan, journal: Journal) -> set[int] | None:
    """What an earlier run has done; None where there is nothing to go on from."""
    finished = journal.read()
    if finished is None:
        _LOG.info("nothing to resume for %s, starting afresh", plan.output)
        return None
    for file in plan.files:
        partial = partial_path(file.path)
        if not partial.exists() and not _is_complete(file, file.path):
            _LOG.warning("%s has a journal but %s is gone, starting afresh", plan.output, partial)
            return None
        if partial.exists() and (partial.is_symlink() or partial.stat().st_size != file.n_bytes):
            raise ResumeError(f"{partial} is not of the planned size; leave out --resume to start over")
    return finished


@contextlib.contextmanager
def _output_errors(plan: ExportPlan) -> Iterator[None]:
    """The operating system's errors of writing as ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            free = shutil.disk_usage(plan.output.parent).free
            raise NoSpaceError(
                f"the disk became full while writing {plan.output}: {file_size(plan.n_bytes)} are needed in all, "
                f"{file_size(free)} are free; make room and go on with --resume"
            ) from error
        if error.errno == errno.EFBIG:
            raise OutputError(
                f"{plan.output.parent} cannot hold a file of this size; write smaller ones with --split-max-size"
            ) from error
        raise OutputError(f"{plan.output} cannot be written: {error.strerror or error}") from error


class PartialFile:
    """An ``OutputFile`` on disk, of its full size from the start."""

    def __init__(self, path: Path, n_bytes: int, keep: bool) -> None:
        if not keep:
            path.unlink(missing_ok=True)
        flags = os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        self._descriptor = os.open(path, flags | (0 if keep else os.O_CREAT | os.O_EXCL), 0o666)
        self._lock = threading.Lock()
        os.ftruncate(self._descriptor, n_bytes)

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write all of ``data`` (bytes) at ``offset``."""
        while data:
            count = self._write_some(offset, data)
            offset, data = offset + count, data[count:]

    def _write_some(self, offset: int, data: memoryview) -> int:
        if sys.platform == "win32":  # it has no pwrite: one writer at a time
            with self._lock:
                os.lseek(self._descriptor, offset, os.SEEK_SET)
                return os.write(self._descriptor, data)
        return os.pwrite(self._descriptor, data, offset)

    def sync(self) -> None:
        """Return when everything written so far is on disk."""
        getattr(os, "fdatasync", os.fsync)(self._descriptor)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass
class _Done:
    """What the workers have done, guarded by a lock of the run."""

    unflushed: list[Tile] = field(default_factory=list)
    n_bytes: int = 0
    tensor: str = ""
    error: BaseException | None = None
    running: int = 0


class _Run:
    """One execution of a plan."""

    def __init__(self, plan: ExportPlan, options: WriteOptions, journal: Journal, finished: set[int] | None) -> None:
        self.bytes_read = self.bytes_written = 0
        self._plan = plan
        self._options = options
        self._journal = journal
        self._resumed = finished is not None
        self._finished = finished or set()
        self._files: dict[int, OutputFile] = {}
        self._queue = self._open_tiles()
        self._queue_lock = threading.Lock()
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._done = _Done()
        self._n_threads = thread_count(options.threads)
        self._cores = threading.Semaphore(self._n_threads)
        self._importance = ImportanceCache(plan.imatrix, self._n_threads + _READERS)
        self._passing = PassingFiles(plan.input_paths, plan.n_bytes + sum(p.stat().st_size for p in plan.input_paths))
        self._total_bytes = sum(len(f.header) + sum(t.n_bytes for t in f.tensors) for f in plan.files)

    def _open_tiles(self) -> Iterator[Tile]:
        return (tile for tile in tiles(self._plan) if tile.number not in self._finished)

    def execute(self) -> None:
        """Write every tile that is not yet there; on return, all of them are on disk and journalled."""
        try:
            self._open_files()
            self._write_tiles()
            self._write_headers()
        finally:
            for file in self._files.values():
                file.close()
            self._journal.close()

    def _open_files(self) -> None:
        self._journal.go_on() if self._resumed else self._journal.begin()
        open_output = self._options.open_output or PartialFile
        for number, file in enumerate(self._plan.files):
            partial = partial_path(file.path)
            if self._resumed and not partial.exists():
                continue  # complete, and renamed, before the earlier run ended
            self._files[number] = open_output(partial, file.n_bytes, self._resumed)
        self._done.n_bytes = sum(tile.n_bytes for tile in tiles(self._plan) if tile.number in self._finished)

    def _write_tiles(self) -> None:
        workers = [threading.Thread(target=self._worker, daemon=True) for _ in range(self._n_threads + _READERS)]
        self._done.running = len(workers)
        for worker in workers:
            worker.start()
        try:
            self._attend()
        except BaseException:
            self._stop.set()
            self._join(workers)
            raise
        self._join(workers)
        if self._done.error is not None:
            raise self._done.error
        if self._cancelled():
            raise Cancelled(f"stopped while writing {self._plan.output}; go on with --resume")

    def _join(self, workers: Sequence[threading.Thread]) -> None:
        for worker in workers:
            worker.join()
        try:
            self._flush()
        except OSError as error:
            self._done.error = self._done.error or error

    def _write_headers(self) -> None:
        """Last of all, so that no partial file can be taken for a model."""
        for number, file in self._files.items():
            file.write_at(0, memoryview(self._plan.files[number].header))
            file.sync()
        self._done.n_bytes = self._total_bytes
        self._report()

    def _cancelled(self) -> bool:
        return is_set(self._options.cancel)

    def _worker(self) -> None:
        try:
            maker = TileMaker(self._plan, self._importance, self._options.quantizer, cache=self._options.cache)
            while not self._stop.is_set() and not self._cancelled() and (tile := self._next()) is not None:
                self._write(tile, maker)
        except BaseException as error:  # the calling thread raises it
            with self._changed:
                self._done.error = self._done.error or error
            self._stop.set()
        finally:
            with self._changed:
                self._done.running -= 1
                self._changed.notify()

    def _next(self) -> Tile | None:
        with self._queue_lock:
            return next(self._queue, None)

    def _write(self, tile: Tile, maker: TileMaker) -> None:
        rows = maker.read(tile)
        with self._cores:
            data = maker.make(tile, rows)
        self._files[tile.file].write_at(tile.offset, data)
        stored = stored_type(tile.tensor.parts[tile.part])
        n_read = (tile.stop - tile.start) * stored.row_bytes(tile.tensor.n_cols)
        with self._changed:
            self._done.unflushed.append(tile)
            self._done.n_bytes += len(data)
            self._done.tensor = tile.tensor.name
            self.bytes_read += n_read
            self.bytes_written += len(data)

    def _attend(self) -> None:
        """Report and flush until no worker is left."""
        flushed = released = time.monotonic()
        while True:
            with self._changed:
                if self._done.running:
                    self._changed.wait(_PROGRESS_INTERVAL_S)
                if not self._done.running:
                    return
            self._report()
            if time.monotonic() - flushed >= self._options.flush_interval_s:
                self._flush()
                flushed = time.monotonic()
            if time.monotonic() - released >= _RELEASE_INTERVAL_S:
                self._passing.release()
                released = time.monotonic()

    def _flush(self) -> None:
        with self._changed:
            written, self._done.unflushed = self._done.unflushed, []
        for number in {tile.file for tile in written}:
            self._files[number].sync()
        self._journal.add(tile.number for tile in written)

    def _report(self) -> None:
        if self._options.on_progress is not None:
            with self._changed:
                progress = Progress("write", self._done.n_bytes, self._total_bytes, "bytes", self._done.tensor)
            self._options.on_progress(progress)


def _finish(plan: ExportPlan, journal: Journal, reads_back: Callable[[PlannedFile, Path], bool]) -> None:
    """Check every partial file and give all of them their names; the journal goes last."""
    waiting = [file for file in plan.files if partial_path(file.path).exists()]
    for file in waiting:
        partial = partial_path(file.path)
        if not (reads_back(file, partial) and _is_complete(file, partial)):
            journal.remove()
            raise OutputError(
                f"{partial_path(file.path)} reads back differently from what was written; the disk may be failing"
            )
    for file in waiting:
        os.replace(partial_path(file.path), file.path)
    sync_directory(plan.output.parent)
    journal.remove()


def reads_back_as_gguf(file: PlannedFile, path: Path) -> bool:
    """Whether the header at ``path``, read as anyone would, is the planned one."""
    try:
        header = read_header(path)
    except GGUFError:
        return False
    found = [(t.name, t.type, t.shape, header.data_offset + t.offset, t.n_bytes) for t in header.tensors]
    return found == [(t.name, t.type, t.shape, t.offset, t.n_bytes) for t in file.tensors]
