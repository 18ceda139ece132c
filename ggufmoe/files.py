"""Files whose bytes are read by position, from any number of threads at once.

Positional reads go straight into the caller's buffer. Against a memory map they leave nothing of the file in the
process's resident memory, a file that shrinks is an error and not SIGBUS, and they are not slower. What the bytes mean
is said by whoever opened the file.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

from ggufmoe.errors import InputError


class PositionalFile:
    """An open file of known size; whatever goes wrong with it is raised as ``error``."""

    def __init__(self, path: Path, error: type[InputError]) -> None:
        self.path = path
        self._error = error
        self._lock = threading.Lock()
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - owned by this object, closed by close()
            self.n_bytes = os.fstat(self._file.fileno()).st_size
        except OSError as reason:
            raise error(f"{path} cannot be read: {reason.strerror}") from reason

    def read_into(self, begin: int, buffer: memoryview) -> None:
        """Fill ``buffer`` (bytes, contiguous) from byte ``begin`` on; the file's error if it ends before."""
        done = 0
        while done < len(buffer):
            try:
                count = self._read_at(begin + done, buffer[done:])
            except OSError as reason:
                raise self._error(f"{self.path} cannot be read: {reason.strerror}") from reason
            if count == 0:
                raise self._error(f"{self.path} became shorter than its header says; fetch it again")
            done += count

    def _read_at(self, position: int, buffer: memoryview) -> int:
        if sys.platform == "win32":  # it has no preadv: one reader at a time
            with self._lock:
                self._file.seek(position)
                return self._file.readinto(buffer) or 0
        return os.preadv(self._file.fileno(), [buffer], position)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()
