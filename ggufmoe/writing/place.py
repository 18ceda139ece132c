"""The place of the output: checks before anything is written, partial files, and the names of complete files.

A file is written as ``NAME.partial`` and gets its name only when it is complete and its header reads back as planned.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ggufmoe.errors import NoSpaceError, OutputError
from ggufmoe.files import check_not_input, check_output_file, delete, move, partial_path, set_size, sync, sync_directory
from ggufmoe.sizes import file_size
from ggufmoe.writing.plan import PlannedFile, WritePlan


class OutputFile(Protocol):
    """A file that several threads write at once, each at a position of its own."""

    def write_at(self, offset: int, data: memoryview) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


class PartialFile:
    """An ``OutputFile`` on disk that has its full size from the start; ``keep`` opens one that an earlier run left.

    What the system refuses is raised as OSError with the file's name.
    """

    def __init__(self, path: Path, n_bytes: int, keep: bool) -> None:
        if not keep:
            delete(path)
        self._path = path
        self._descriptor = self._opened(0 if keep else os.O_CREAT | os.O_EXCL)
        self._idle: list[int] = []
        try:
            with self._named_errors():
                set_size(self._descriptor, n_bytes)
        except OSError:
            self.close()
            raise

    def _opened(self, flags: int) -> int:
        flags |= os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        return os.open(self._path, flags, 0o666)

    def write_at(self, offset: int, data: memoryview) -> None:
        """Write all of ``data`` (bytes) at ``offset``; safe to call from several threads at once."""
        with self._named_errors():
            while data:
                count = self._write_some(offset, data)
                if not count:
                    raise OSError(errno.EIO, "the disk takes no more bytes and gives no reason")
                offset, data = offset + count, data[count:]

    def _write_some(self, offset: int, data: memoryview) -> int:
        if sys.platform != "win32":
            return os.pwrite(self._descriptor, data, offset)
        # without pwrite, each thread that writes has a descriptor with a position of its own
        try:
            descriptor = self._idle.pop()
        except IndexError:
            descriptor = self._opened(0)
        try:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.write(descriptor, data)
        finally:
            self._idle.append(descriptor)

    def sync(self) -> None:
        """Return when all that was written before the call, by whatever descriptor, is on disk."""
        with self._named_errors():
            sync(self._descriptor)

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = str(self._path)
            raise

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        while self._idle:
            os.close(self._idle.pop())


def journal_path(output: Path) -> Path:
    """Path of the journal of an output."""
    return output.with_name(output.name + ".partial.journal")


def router_path(output: Path) -> Path:
    """Where the computed router of a recipe is kept until its output is complete, beside the journal."""
    return output.with_name(output.name + ".partial.router")


def check_output(plan: WritePlan, *, force: bool, resume: bool) -> None:
    """Raise OutputError if a file of the plan cannot be written, OutputExistsError if it exists or is an input.

    With ``resume``, files that the interrupted run has completed and named may exist.
    """
    for file in plan.files:
        for path in (file.path, partial_path(file.path), journal_path(plan.output)):
            check_not_input(path, plan.input_paths)
        check_output_file(file.path, replace=force or (resume and is_complete(file, file.path)))


def is_complete(file: PlannedFile, path: Path) -> bool:
    """Whether the file at ``path`` has the size and the header that are planned."""
    try:
        with open(path, "rb") as opened:
            return path.stat().st_size == file.n_bytes and opened.read(len(file.header)) == file.header
    except OSError:
        return False


def check_space(plan: WritePlan, *, resume: bool) -> None:
    """Raise NoSpaceError if the plan does not fit on the disk; space that its partial files hold already is counted."""
    parent = plan.output.parent
    held = sum(_allocated(partial_path(file.path)) for file in plan.files)
    held += sum(_allocated(file.path) for file in plan.files if resume and is_complete(file, file.path))
    kept = 0 if resume or plan.network is None else plan.network.kept_bytes
    needed, free = plan.n_bytes, shutil.disk_usage(parent).free + held
    if needed + kept > free:
        more = f" and {file_size(kept)} for --source-cache" if kept else ""
        raise NoSpaceError(
            f"{plan.output} needs {file_size(needed)}{more}, {parent} has {file_size(free)} free; make room, or choose "
            "another place"
        )


def _allocated(path: Path) -> int:
    try:
        status = path.lstat()
    except OSError:
        return 0
    return int(getattr(status, "st_blocks", status.st_size // 512)) * 512


@contextlib.contextmanager
def output_errors(plan: WritePlan) -> Iterator[None]:
    """Raise what the operating system refuses while a plan is written as NoSpaceError or OutputError."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)):
            free = shutil.disk_usage(plan.output.parent).free
            raise NoSpaceError(
                f"the disk became full while writing {plan.output}: {file_size(plan.n_bytes)} are needed in all, "
                f"{file_size(free)} are free; make room and go on with --resume"
            ) from error
        if error.errno == errno.EFBIG or getattr(error, "winerror", None) == _FILE_TOO_LARGE:
            raise OutputError(
                f"{plan.output.parent} cannot hold a file of this size; write smaller ones with {plan.split_option}"
            ) from error
        where = f"{Path(error.filename).name}: " if isinstance(error.filename, str) else ""
        raise OutputError(f"{plan.output} cannot be written: {where}{error.strerror or error}") from error


_FILE_TOO_LARGE = 223
"""Windows's number for it, which is not among those that become EFBIG."""


def check_written(plan: WritePlan) -> None:
    """Raise OutputError if a partial file does not read back as planned."""
    for file in plan.files:
        partial = partial_path(file.path)
        if partial.exists() and not (plan.reads_back(file, partial) and is_complete(file, partial)):
            raise OutputError(f"{partial} reads back differently from what was written; the disk may be failing")


def give_names(plan: WritePlan) -> None:
    """Give every partial file its name; those that an interrupted run has named already keep it."""
    for file in plan.files:
        if partial_path(file.path).exists():
            move(partial_path(file.path), file.path)
    sync_directory(plan.output.parent)
