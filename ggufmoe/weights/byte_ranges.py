"""Where the bytes of rows are: in files on this machine, or in files on the hub of which ranges are read.

Every row that is read ends in a ``ByteReader``. A source tensor that tells its byte ranges can be read ahead of time;
one that does not is read when it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable


class ByteReader(Protocol):
    """A file whose bytes are read by position."""

    @property
    def path(self) -> Path:
        """What messages call the file."""

    @property
    def n_bytes(self) -> int: ...

    def read_into(self, begin: int, buffer: memoryview) -> None:
        """Fill ``buffer`` (bytes, contiguous) from byte ``begin`` on; safe from several threads at once."""

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class ByteRange:
    """The bytes [begin, end) of a file."""

    file: ByteReader
    begin: int
    end: int


@runtime_checkable
class Located(Protocol):
    """A tensor read by rows that tells which bytes it reads for them."""

    def byte_ranges(self, start: int, stop: int) -> Iterator[ByteRange]:
        """What ``read_rows`` reads for the rows [start, stop)."""


def byte_ranges(rows: object, start: int, stop: int) -> Iterator[ByteRange]:
    """The bytes that ``rows.read_rows`` reads for the rows [start, stop); none if ``rows`` does not tell."""
    if isinstance(rows, Located):
        yield from rows.byte_ranges(start, stop)
