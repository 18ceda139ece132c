"""The lock of an output: two writers of one output would share its partial file, and one would spoil the other's.

The lock is the operating system's, on ``NAME.partial.lock``: it ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ggufmoe.errors import OutputError

_LOG = logging.getLogger("ggufmoe")
_MAX_BYTES = 1000
_LOCKED_BYTE = 2**30
"""Where Windows locks: far behind what the file says, because nobody else can read a locked byte there."""
_UNSUPPORTED = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def lock_path(output: Path) -> Path:
    """Path of the lock of an output."""
    return output.with_name(output.name + ".partial.lock")


@contextlib.contextmanager
def output_lock(output: Path, *, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock of ``output`` while the block runs.

    If another process or thread holds it, ``wait`` is called with the holder's name until it is free; it pauses for a
    moment, and may raise. Without ``wait`` OutputError is raised, which names the other writer; it is raised as well
    where no lock file can be made. A file system without locks (some network drives) is written without one.
    """
    path = lock_path(output)
    try:
        descriptor = _open_locked(output, path, wait)
    except OSError as error:
        raise OutputError(f"{output} cannot be written: {path.name}: {error.strerror or error}") from error
    try:
        yield
    finally:
        if sys.platform == "win32":  # it deletes no open file
            os.close(descriptor)
            with contextlib.suppress(OSError):
                path.unlink()
        else:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(descriptor)


def _open_locked(output: Path, path: Path, wait: Callable[[str], None] | None) -> int:
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_BINARY", "O_NOFOLLOW", "O_CLOEXEC"):
        flags |= getattr(os, name, 0)
    while True:
        descriptor = os.open(path, flags, 0o666)
        try:
            if not _try_lock(descriptor):
                owner = _owner(descriptor)
                if wait is None:
                    raise OutputError(f"{output} is being written by {owner}; wait for it, or choose another name")
                wait(owner)
            # its last owner may have deleted the file between the two calls
            elif sys.platform == "win32" or _is_at(descriptor, path):
                with contextlib.suppress(OSError):  # on a full disk the lock holds, and says not whose it is
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, json.dumps({"pid": os.getpid(), "host": platform.node()}).encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Whether the lock could be taken; True as well where the file system has no locks."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(descriptor, _LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            os.lseek(descriptor, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            _LOG.debug("no lock for an output: %s", error.strerror)
            return True
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.lstat())
    except FileNotFoundError:
        return False


def _owner(descriptor: int) -> str:
    """Who holds the lock, in words."""
    try:
        os.lseek(descriptor, 0, os.SEEK_SET)
        told = json.loads(os.read(descriptor, _MAX_BYTES))
        pid, host = int(told["pid"]), str(told["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
    return f"process {pid}" if host == platform.node() else f"process {pid} on {host}"
