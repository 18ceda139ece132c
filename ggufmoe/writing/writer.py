"""The writer: executes a plan on all cores, into partial files that get their names only when they are complete.

Workers take tiles in order and write each at its offset; the calling thread reports progress, flushes and keeps the
journal. An error, a cancellation or a crash leaves partial files and a journal, from which a later run can go on, and
never a file that looks finished. Neither the order of the work nor the number of threads changes a byte.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ggufmoe.errors import Cancelled, OutputError, ResumeError
from ggufmoe.files import check_parent, partial_path
from ggufmoe.quant.kernels import QuantizerName
from ggufmoe.weights.byte_ranges import ByteRange, byte_ranges
from ggufmoe.work import CancelFlag, OnProgress, Progress, is_set, thread_count
from ggufmoe.writing.formats import prepare_kernels
from ggufmoe.writing.journal import Journal, fingerprint
from ggufmoe.writing.lock import output_lock
from ggufmoe.writing.pagecache import PassingFiles
from ggufmoe.writing.place import (
    OutputFile,
    PartialFile,
    check_output,
    check_space,
    check_written,
    give_names,
    is_complete,
    journal_path,
    output_errors,
)
from ggufmoe.writing.plan import WritePlan
from ggufmoe.writing.tiling import ImportanceCache, Tile, TileMaker, tiles

_LOG = logging.getLogger("ggufmoe")

FLUSH_INTERVAL_S = 5.0
"""How often finished tiles are flushed to disk and journalled: what a crash can cost."""

_PROGRESS_INTERVAL_S = 0.1
_RELEASE_INTERVAL_S = 1.0
_READERS = 2
"""Workers beyond the cores that compute: while they wait for the disk, none of the cores does."""


class Prefetcher(Protocol):
    """What fetches the bytes of tiles before they are read."""

    def running(
        self, schedule: Iterable[tuple[int, Iterable[ByteRange]]], stopped: Callable[[], bool]
    ) -> AbstractContextManager[None]:
        """Fetch ahead while the block runs: what each tile, by its number, reads; in their order."""

    def item(self, number: int) -> AbstractContextManager[None]:
        """The block reads the tile of that number."""


@dataclass(frozen=True)
class WriteOptions:
    """How a plan is executed; no option changes the bytes."""

    threads: int | None = None
    quantizer: QuantizerName = "auto"
    cache: bool = True
    """Whether compiled kernels are loaded from the user's cache folder and kept there."""
    resume: bool = False
    force: bool = False
    on_progress: OnProgress | None = None
    cancel: CancelFlag | None = None
    prepare: Callable[[], None] | None = None
    """Called when all is checked and nothing is written yet; computes what must be known before rows are read."""
    keep_journal: bool = False
    """Leave the journal of the finished files there, for a caller that has more to do before the output is complete."""
    flush_interval_s: float = FLUSH_INTERVAL_S
    read_ahead: Prefetcher | None = None
    """Reads what comes over the network before the tiles need it."""
    open_output: Callable[[Path, int, bool], OutputFile] | None = None
    """Opens a partial file: its path, its size, and whether to keep what is in it. By default, a file on disk."""


@dataclass(frozen=True)
class WriteReport:
    """The files that were written, and what it cost; a resumed run counts only its own work."""

    paths: tuple[Path, ...]
    bytes_read: int
    bytes_written: int
    seconds: float


def write_plan(plan: WritePlan, options: WriteOptions) -> WriteReport:
    """Write the files of a plan. All of them appear under their names together, when they are complete and checked.

    Raises OutputExistsError, OutputError, NoSpaceError or ResumeError before anything is written, NonFiniteError or
    NoSpaceError while writing, Cancelled when ``options.cancel`` is set.
    """
    check_parent(plan.output)
    with output_lock(plan.output):
        return _write_locked(plan, options)


def _write_locked(plan: WritePlan, options: WriteOptions) -> WriteReport:
    started = time.monotonic()
    journal = Journal(journal_path(plan.output), fingerprint(plan), plan.commits)
    finished = _finished_tiles(plan, journal) if options.resume else None
    check_output(plan, force=options.force, resume=finished is not None)
    check_space(plan, resume=finished is not None)
    if finished is None and any(partial_path(file.path).exists() for file in plan.files):
        _LOG.warning("starting %s afresh, over what an interrupted run left; --resume goes on with that", plan.output)
    prepare_kernels(plan, options.quantizer, cache=options.cache)
    if options.prepare is not None:
        options.prepare()
    with output_errors(plan):
        run = _Run(plan, options, journal, finished)
        run.execute()
        try:
            check_written(plan)
        except OutputError:
            journal.remove()  # going on would give the same file
            raise
        give_names(plan)
        if not options.keep_journal:
            journal.remove()
    return WriteReport(
        tuple(file.path for file in plan.files), run.bytes_read, run.bytes_written, time.monotonic() - started
    )


def _finished_tiles(plan: WritePlan, journal: Journal) -> set[int] | None:
    """Numbers of the tiles that an interrupted run has written; None if it left nothing to go on from."""
    finished = journal.read()
    if finished is None:
        _LOG.info("nothing to resume for %s, starting afresh", plan.output)
        return None
    for file in plan.files:
        partial = partial_path(file.path)
        if not partial.exists() and not is_complete(file, file.path):
            _LOG.warning("%s has a journal but %s is gone, starting afresh", plan.output, partial)
            return None
        if partial.exists() and (partial.is_symlink() or partial.stat().st_size != file.n_bytes):
            raise ResumeError(f"{partial} is not of the planned size; leave out --resume to start over")
    return finished


@dataclass
class _Done:
    """What the workers have done so far, guarded by a lock of the run."""

    unflushed: list[Tile] = field(default_factory=list)
    n_bytes: int = 0
    tensor: str = ""
    error: BaseException | None = None
    running: int = 0


class _Run:
    """One execution of a plan."""

    def __init__(self, plan: WritePlan, options: WriteOptions, journal: Journal, finished: set[int] | None) -> None:
        self.bytes_read = self.bytes_written = 0
        self._plan = plan
        self._options = options
        self._journal = journal
        self._resumed = finished is not None
        self._finished = finished or set()
        self._files: dict[int, OutputFile] = {}
        self._queue = (tile for tile in tiles(plan) if tile.number not in self._finished)
        self._queue_lock = threading.Lock()
        self._stop = threading.Event()
        self._changed = threading.Condition()
        self._done = _Done()
        self._read_ahead = options.read_ahead
        self._n_threads = thread_count(options.threads)
        self._cores = threading.Semaphore(self._n_threads)
        self._importance = ImportanceCache(plan.imatrix, self._n_threads + _READERS)
        self._passing = PassingFiles(plan.input_paths, plan.n_bytes + sum(p.stat().st_size for p in plan.input_paths))
        self._total_bytes = sum(len(f.header) + sum(t.n_bytes for t in f.tensors) for f in plan.files)

    def execute(self) -> None:
        """Write every tile that is not written yet, then the headers. On return all of it is on disk and journalled."""
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
        self._report()
        with contextlib.ExitStack() as stack:
            if self._read_ahead is not None:
                left = (tile for tile in tiles(self._plan) if tile.number not in self._finished)
                schedule = ((tile.number, byte_ranges(tile.source.rows, tile.start, tile.stop)) for tile in left)
                stack.enter_context(self._read_ahead.running(schedule, self._is_stopping))
            self._run_workers()
        if self._done.error is not None:
            raise self._done.error
        if is_set(self._options.cancel):
            raise Cancelled(f"stopped while writing {self._plan.output}; go on with --resume")

    def _is_stopping(self) -> bool:
        return self._stop.is_set() or is_set(self._options.cancel)

    def _run_workers(self) -> None:
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

    def _join(self, workers: Sequence[threading.Thread]) -> None:
        for worker in workers:
            worker.join()
        try:
            self._flush()
        except OSError as error:
            self._done.error = self._done.error or error

    def _write_headers(self) -> None:
        """Write the headers, last of all: until then no partial file can be taken for a model."""
        for number, file in self._files.items():
            file.write_at(0, memoryview(self._plan.files[number].header))
            file.sync()
        self._done.n_bytes = self._total_bytes
        self._report()

    def _worker(self) -> None:
        try:
            maker = TileMaker(self._plan, self._importance, self._options.quantizer, cache=self._options.cache)
            while not self._is_stopping():
                with self._queue_lock:
                    tile = next(self._queue, None)
                if tile is None:
                    return
                self._write(tile, maker)
        except BaseException as error:  # the calling thread raises it
            if not (isinstance(error, Cancelled) and self._is_stopping()):
                with self._changed:
                    self._done.error = self._done.error or error
            self._stop.set()
        finally:
            with self._changed:
                self._done.running -= 1
                self._changed.notify()

    def _write(self, tile: Tile, maker: TileMaker) -> None:
        with contextlib.nullcontext() if self._read_ahead is None else self._read_ahead.item(tile.number):
            rows = maker.read(tile)
        with self._cores:
            data = maker.make(tile, rows)
        self._files[tile.file].write_at(tile.offset, data)
        with self._changed:
            self._done.unflushed.append(tile)
            self._done.n_bytes += len(data)
            self._done.tensor = tile.tensor.name
            self.bytes_read += tile.n_source_bytes
            self.bytes_written += len(data)

    def _attend(self) -> None:
        """Report progress and flush to disk until the last worker has ended."""
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
