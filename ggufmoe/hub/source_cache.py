"""Bytes of files of the hub on this disk, so that what is read twice is fetched once.

They lie in a private file that has no name (on Windows one that the system deletes), so that nothing of it is left
however the process ends. It holds what is read first and fits; a byte is as good as any other, because each of them is
read once more.
"""

from __future__ import annotations

import bisect
import logging
import tempfile
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from ggufmoe.sizes import file_size
from ggufmoe.weights.byte_ranges import ByteRange, ByteReader

_LOG = logging.getLogger("ggufmoe")


@dataclass(frozen=True, slots=True, order=True)
class _KeptRun:
    """Bytes [begin, end) of a file of the hub; ``place`` is where they begin in the private file."""

    begin: int
    end: int
    place: int = 0


@dataclass(frozen=True, slots=True)
class KeptPart:
    """A part [begin, end) of what is wanted of a file: kept at ``place``, or not at all where that is None."""

    begin: int
    end: int
    place: int | None


class SourceCache:
    """A private file for at most ``max_bytes`` of ``ranges``, which are read again; safe for several threads."""

    def __init__(self, directory: Path, max_bytes: int, ranges: Iterable[ByteRange]) -> None:
        """``directory`` is on the disk that is used; the file is made when something is kept."""
        self.n_bytes = 0
        self._directory, self._max_bytes = directory, max_bytes
        self._lock = threading.Lock()
        self._file: BinaryIO | None = None
        self._kept: dict[ByteReader, list[_KeptRun]] = {}
        self._wanted = {file: [_KeptRun(*run) for run in runs] for file, runs in joined(ranges).items()}

    def parts(self, file: ByteReader, begin: int, end: int) -> list[KeptPart]:
        """The bytes [begin, end) in parts, in their order: those that are kept, and those that are not."""
        with self._lock:
            return list(_split(self._kept.get(file, []), begin, end))

    def read_into(self, place: int, buffer: memoryview) -> None:
        """Fill ``buffer`` from what is kept at ``place``. Raises OSError where the disk does not give it."""
        assert self._file is not None, "something is kept"
        done = 0
        with self._lock:
            self._file.seek(place)
            while done < len(buffer):
                n_bytes = cast("int", self._file.readinto(buffer[done:]))  # type: ignore[attr-defined]
                if not n_bytes:
                    raise OSError(f"what is kept of the source in {self._directory} has become shorter")
                done += n_bytes

    def keep(self, file: ByteReader, begin: int, data: memoryview) -> None:
        """Keep bytes of ``file`` from ``begin`` on: those that are wanted, not kept yet, and still fit."""
        with self._lock:
            for first, last in list(self._useful(file, begin, begin + len(data))):
                last = min(last, first + self._max_bytes - self.n_bytes)
                if first < last and not self._write(data[first - begin : last - begin]):
                    return
                if first < last:
                    bisect.insort(self._kept.setdefault(file, []), _KeptRun(first, last, self.n_bytes))
                    self.n_bytes += last - first

    def close(self) -> None:
        """Delete the file; nothing is kept any more."""
        with self._lock:
            self._max_bytes = self.n_bytes = 0
            self._kept.clear()
            if self._file is not None:
                self._file.close()

    def _useful(self, file: ByteReader, begin: int, end: int) -> Iterator[tuple[int, int]]:
        for part in _split(self._kept.get(file, []), begin, end):
            if part.place is not None:
                continue
            for wanted in _split(self._wanted.get(file, []), part.begin, part.end):
                if wanted.place is not None:
                    yield wanted.begin, wanted.end

    def _write(self, data: memoryview) -> bool:
        """Append to the file. A disk that refuses it is a warning, and nothing more is kept."""
        try:
            if self._file is None:
                file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115 (close() closes it)
                self._file = cast("BinaryIO", file)
            self._file.seek(self.n_bytes)
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            self._max_bytes = self.n_bytes
            _LOG.warning(
                "no more of the source than %s is kept in %s: %s",
                *(file_size(self.n_bytes), self._directory, error.strerror or error),
            )
            return False
        return True


def joined(ranges: Iterable[ByteRange]) -> dict[ByteReader, list[tuple[int, int]]]:
    """By file the different bytes of ``ranges`` as runs [begin, end) in ascending order, none beside the next."""
    found: dict[ByteReader, list[tuple[int, int]]] = {}
    for one in sorted(ranges, key=lambda one: one.begin):
        runs = found.setdefault(one.file, [])
        if one.begin >= one.end:
            continue
        if runs and one.begin <= runs[-1][1]:
            runs[-1] = runs[-1][0], max(runs[-1][1], one.end)
        else:
            runs.append((one.begin, one.end))
    return found


def _split(runs: list[_KeptRun], begin: int, end: int) -> Iterator[KeptPart]:
    """[begin, end) in parts that are each within one of ``runs`` or between them."""
    place = max(0, bisect.bisect_right(runs, begin, key=lambda run: run.begin) - 1)
    for run in runs[place:]:
        if run.begin >= end or begin >= end:
            break
        if run.end <= begin:
            continue
        if run.begin > begin:
            yield KeptPart(begin, run.begin, None)
            begin = run.begin
        stop = min(run.end, end)
        yield KeptPart(begin, stop, run.place + begin - run.begin)
        begin = stop
    if begin < end:
        yield KeptPart(begin, end, None)
