"""Files: paths as users give them, reading by position from several threads, replacing a file only when its successor
is complete, and checking whether an output can be written where it is wanted.

Renaming, deleting, sizing and flushing go through here, because the systems differ in them.

Positional reads go straight into the caller's buffer. Against a memory map they leave nothing of the file in the
process's resident memory, a file that shrinks is an error and not SIGBUS, and they are not slower. The callers know
what the bytes mean.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Union

from ggufmoe.errors import InputError, OutputError, OutputExistsError

StrPath = Union[str, "os.PathLike[str]"]
"""A path as public functions take it."""


def user_path(path: StrPath) -> Path:
    """``path`` with a leading ``~`` replaced by the home directory. Raises InputError where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: there is no such home directory") from error


def possible_path(path: StrPath) -> Path:
    """``user_path(path)``. Raises InputError also for a text that can be no path: with NUL, or too long."""
    expanded = user_path(path)
    try:
        os.lstat(expanded)
    except ValueError as error:  # NUL, or half a surrogate pair
        shown = f"{os.fspath(path)!r:.100}"
        raise InputError(f"{shown} is no path: it holds a character that no file name may have") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise InputError(f"{os.fspath(path)!r:.100}... is too long for a path") from error
    return expanded


def decode_text(data: bytes) -> str:
    """Text as editors save it: UTF-8 with or without a byte order mark, or UTF-16 with one; the mark is left out.

    Raises UnicodeDecodeError, a ValueError.
    """
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and len(data) > 2:
        return data.decode("utf-16")
    return data.decode("utf-8-sig")


_FOREIGN = (
    (
        b"version https://git-lfs.github.com/spec/",
        "a git-lfs pointer in the place of the file; run `git lfs pull` in its repository, or download the file itself",
    ),
    (b"<!doctype html", "an HTML page that was saved in the place of the file; download the file itself"),
    (b"<html", "an HTML page that was saved in the place of the file; download the file itself"),
    (b"gguf", "a GGUF file"),
    (b"pk\x03\x04", "a zip archive, as PyTorch's pickles are"),
    (b"\x1f\x8b", "a gzip archive; unpack it"),
)


def what_instead(path: Path) -> str | None:
    """What is at ``path`` instead of the expected file, and what to do; None if nothing can be said.

    Knows links to nothing, git-lfs pointers, pages that were saved instead of files, and archives.
    """
    if path.is_symlink() and not path.exists():
        return f"a link to {os.readlink(path)}, which does not exist; fetch the file again"
    try:
        with path.open("rb") as file:
            head = file.read(256).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    except OSError:
        return None
    return next((what for beginning, what in _FOREIGN if head.startswith(beginning)), None)


class PositionalFile:
    """A file that is read by position; whatever goes wrong with it is raised as ``error``.

    It is open only while it is read: a checkpoint may have more shards than a process may have open files (256 on
    macOS). That it is still the file it was is checked at each reading, which takes some 10 microseconds.
    """

    def __init__(self, path: Path, error: type[InputError]) -> None:
        self.path = path
        self._error = error
        self._closed = False
        self._identity: tuple[int, ...] | None = None
        with self.opened() as file:
            self.n_bytes = os.fstat(file.fileno()).st_size

    @contextlib.contextmanager
    def opened(self) -> Iterator[FileIO]:
        """The open file, without a buffer; ``error`` if it is another one than before, or cannot be read."""
        if self._closed:
            raise ValueError(f"{self.path} has been closed")
        try:
            with open(self.path, "rb", buffering=0) as file:
                status = os.fstat(file.fileno())
                identity = (status.st_size, status.st_mtime_ns)  # inodes are not stable on every network file system
                if self._identity not in (None, identity):
                    raise self._error(self._changed(status.st_size))
                self._identity = identity
                yield file
        except OSError as reason:
            raise self._error(f"{self.path} {_unreadable(self.path, reason)}") from reason

    def _changed(self, n_bytes: int) -> str:
        if n_bytes < self.n_bytes:
            return f"{self.path} became shorter than its header says; fetch it again"
        return f"{self.path} has been changed or replaced since its header was read; start again"

    def read_into(self, begin: int, buffer: memoryview) -> None:
        """Fill ``buffer`` (bytes, contiguous) from byte ``begin`` on; safe from several threads at once.

        Raises the file's error if it ends before that, or is not the file any more whose header was read.
        """
        done = 0
        with self.opened() as file:
            file.seek(begin)
            while done < len(buffer):
                count = file.readinto(buffer[done:])
                if not count:
                    raise self._error(f"{self.path} became shorter than its header says; fetch it again")
                done += count

    def close(self) -> None:
        """No more reading after this; a second call does nothing."""
        self._closed = True


def _unreadable(path: Path, reason: OSError) -> str:
    instead = what_instead(path) if path.is_symlink() else None
    return f"is {instead}" if instead else f"cannot be read: {reason.strerror}"


def allowed_name(name: str) -> str:
    """A file name that is made up, as this system allows it: Windows forbids some characters and names of devices."""
    if sys.platform != "win32":
        return name
    name = _FORBIDDEN_CHARACTERS.sub("_", name)
    return f"_{name}" if _DEVICE_NAME.match(name) else name


_FORBIDDEN_CHARACTERS = re.compile(r'[\x00-\x1f<>:"/\\|?*]')
_DEVICE_NAME = re.compile(r"(con|prn|aux|nul|com[1-9¹²³]|lpt[1-9¹²³]) *(\.|$)", re.IGNORECASE)
"""Windows takes such a name for the device, in every folder and with every suffix."""


def partial_path(path: Path) -> Path:
    """Where a file or directory is written before it is complete: ``NAME.partial`` beside it.

    Raises OutputError for a path without a name, such as ``/``.
    """
    if not path.name:
        raise OutputError(f"{path} is a directory; give the name of a file")
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def replacing(path: Path, what: str) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of ``path`` when the block ends and all of it is on disk.

    It is ``NAME.PID-RANDOM.partial`` beside ``path`` until then, so blocks for one path do not disturb each other: the
    last that ends wins. A symbolic link stays, and the file that it leads to is replaced. If the block raises, ``path``
    stays as it was. Raises OutputError, which names ``what`` ("the manifest"), where the system refuses to write.
    """
    path = followed(path)
    unique = f"{path.name[:_SHOWN_CHARS]}.{os.getpid()}-{secrets.token_hex(4)}"
    partial = partial_path(path).with_name(f"{unique}.partial")
    try:
        file = partial.open("xb")
        try:
            with file:
                yield file
                file.flush()
                sync(file.fileno())
            move(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                delete(partial)
            raise
        sync_directory(path.parent)
    except OSError as error:
        raise OutputError(f"{path}: {what} cannot be written: {error.strerror or error}") from error


_SHOWN_CHARS = 40
"""Of a file's name in that of its partial file: a name may be as long as the system allows."""


def sync(descriptor: int) -> None:
    """Return when all that was written to an open file is on its disk. Raises OSError.

    On macOS fsync leaves the data in the disk's own cache, which a power cut empties; F_FULLFSYNC empties it. File
    systems that lack it, as those of network drives, are asked for what they have.
    """
    if sys.platform == "darwin":
        import fcntl

        with contextlib.suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
            return
    os.fsync(descriptor)


_NO_DIRECTORY_SYNC = {errno.EINVAL, errno.EBADF, errno.ENOTSUP}
"""What file systems answer that cannot flush a directory, as those of some network drives."""


def sync_directory(path: Path) -> None:
    """Return when the names in a directory are on disk. Raises OSError.

    Does nothing on Windows, for a directory that may be written but not read, and on file systems that cannot be asked
    for it.
    """
    if sys.platform == "win32":
        return
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        return
    try:
        sync(descriptor)
    except OSError as error:
        if error.errno not in _NO_DIRECTORY_SYNC:
            raise
    finally:
        os.close(descriptor)


def set_size(descriptor: int, n_bytes: int) -> None:
    """Give an open file its size; what is new reads as zeros, none of which is written. Raises OSError."""
    if sys.platform != "win32":
        os.ftruncate(descriptor, n_bytes)
        return
    import ctypes
    import msvcrt

    # os.ftruncate calls _chsize_s there, which writes every zero of the new part
    # BOOL SetFileInformationByHandle(HANDLE file, FILE_INFO_BY_HANDLE_CLASS kind, LPVOID value, DWORD n_bytes)
    kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
    handle, end = ctypes.c_void_p(msvcrt.get_osfhandle(descriptor)), ctypes.c_int64(n_bytes)
    if not kernel32.SetFileInformationByHandle(handle, _FILE_END, ctypes.byref(end), ctypes.sizeof(end)):
        raise ctypes.WinError(ctypes.get_last_error())


_FILE_END = 6
"""FileEndOfFileInfo: the value is a LARGE_INTEGER."""


def move(source: Path, target: Path) -> None:
    """Rename a file or directory; a file that is at ``target`` is replaced in the same step.

    Raises OSError; on Windows, where a file that another program has open is neither renamed nor replaced, after 2 s.
    """
    _until_released(lambda: os.replace(source, target), f"{source.name} or {target.name}")


def delete(path: Path) -> None:
    """Delete a file, if there is one. Raises OSError; on Windows as ``move`` does."""
    _until_released(lambda: path.unlink(missing_ok=True), path.name)


def delete_directory(path: Path) -> None:
    """Delete a directory with all that is in it. Raises OSError; on Windows as ``move`` does."""
    _until_released(lambda: shutil.rmtree(path), f"a file in {path.name}")


_RELEASE_S = 2.0
_FIRST_PAUSE_S = 0.01
_IN_USE = {5, 32, 33}
"""ERROR_ACCESS_DENIED, ERROR_SHARING_VIOLATION, ERROR_LOCK_VIOLATION."""


def _until_released(change: Callable[[], None], names: str) -> None:
    """Call ``change``; on Windows again for 2 s, while another program has the file open that it renames or deletes.

    Scanners and indexers open every new file there for some milliseconds.
    """
    if sys.platform != "win32":
        change()
        return
    pause_s, ends = _FIRST_PAUSE_S, time.monotonic() + _RELEASE_S
    while True:
        try:
            change()
            return
        except PermissionError as error:
            if error.winerror not in _IN_USE:
                raise
            if time.monotonic() >= ends:
                reason = (
                    f"{error.strerror}, for {_RELEASE_S:.0f} s now: another program (a virus scanner, or one that uses "
                    f"it) has {names} open, or it is write-protected"
                )
                raise PermissionError(error.errno, reason, error.filename, error.winerror, error.filename2) from error
        time.sleep(pause_s)
        pause_s *= 2


def check_output_file(path: Path, inputs: Iterable[Path] = (), *, replace: bool) -> None:
    """Raise OutputError if a file cannot be written at ``path``.

    Raises OutputExistsError if ``path`` is one of ``inputs``, under whatever name, or exists and must not be replaced.
    """
    check_not_input(path, inputs)
    check_parent(path)
    if path.is_dir():
        raise OutputError(f"{path} is a directory; give the name of a file")
    if path.exists() and not path.is_file():
        raise OutputError(f"{path} is a device or a pipe; give the name of a file")
    if path.exists() and not replace:
        raise OutputExistsError(f"{path} exists already; choose another name, or replace it with --force")


def followed(path: Path) -> Path:
    """The path that a symbolic link leads to; any other path unchanged. OutputError for links that lead in a circle."""
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    if target.is_symlink():
        raise OutputError(f"{path} is a symbolic link that leads in a circle; choose another name, or delete it")
    return target


def check_parent(path: Path) -> None:
    """Raise OutputError unless ``path`` can be made in its directory."""
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} is not a directory; make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise OutputError(f"{path.parent} may not be written to; choose another place")


def check_not_input(path: Path, inputs: Iterable[Path]) -> None:
    """Raise OutputExistsError if ``path`` is one of ``inputs``: the same file, through any link."""
    for given in inputs:
        with contextlib.suppress(OSError):
            if path.samefile(given):
                raise OutputExistsError(f"{path} is {given}, which is read; choose another output")
