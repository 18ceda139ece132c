"""What is kept on this disk of files of the hub: which bytes, how many, and what a full disk does."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from ggufmoe.hub.source_cache import KeptPart, SourceCache, joined
from ggufmoe.weights.byte_ranges import ByteRange

CONTENT = bytes(range(256)) * 4


class Elsewhere:
    """A file of which nothing is read here."""

    path, n_bytes = Path("m"), len(CONTENT)

    def read_into(self, begin: int, buffer: memoryview) -> None:
        raise AssertionError("nobody reads it")

    def close(self) -> None: ...


FILE = Elsewhere()


def cache_of(directory: Path, max_bytes: int, *wanted: tuple[int, int]) -> SourceCache:
    return SourceCache(directory, max_bytes, [ByteRange(FILE, *one) for one in wanted])


def keep(cache: SourceCache, begin: int, end: int) -> None:
    cache.keep(FILE, begin, memoryview(CONTENT)[begin:end])


def kept(cache: SourceCache) -> list[tuple[int, int]]:
    """What is kept, after its bytes were compared."""
    found = []
    for part in cache.parts(FILE, 0, len(CONTENT)):
        if part.place is not None:
            buffer = bytearray(part.end - part.begin)
            cache.read_into(part.place, memoryview(buffer))
            assert bytes(buffer) == CONTENT[part.begin : part.end]
            found.append((part.begin, part.end))
    return found


def test_only_what_is_read_again_is_kept_and_once(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 1000, (100, 200), (150, 300), (500, 600))
    keep(cache, 250, 550)
    keep(cache, 0, 1000)
    assert kept(cache) == [(100, 250), (250, 300), (500, 550), (550, 600)]
    assert cache.n_bytes == 300
    assert cache.parts(FILE, 240, 260) == [KeptPart(240, 250, 240), KeptPart(250, 260, 0)]
    assert cache.parts(FILE, 300, 400) == [KeptPart(300, 400, None)]
    assert list(tmp_path.iterdir()) == [], "the file has no name"
    cache.close()
    assert cache.parts(FILE, 100, 200) == [KeptPart(100, 200, None)]
    keep(cache, 100, 200)
    assert kept(cache) == []


def test_no_more_is_kept_than_fits(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, 250, (0, 1000))
    for begin in range(0, 1000, 100):
        keep(cache, begin, begin + 100)
    assert kept(cache) == [(0, 100), (100, 200), (200, 250)]
    cache.close()


def test_a_full_disk_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    cache = cache_of(tmp_path, 1000, (0, 1000))
    keep(cache, 0, 100)
    keep(cache, 100, 200)
    assert kept(cache) == []
    assert caplog.messages == [f"no more of the source than 0 B is kept in {tmp_path}: No space left on device"]


def test_ranges_are_joined() -> None:
    other = Elsewhere()
    ranges = [ByteRange(FILE, 10, 20), ByteRange(FILE, 5, 12), ByteRange(FILE, 20, 21), ByteRange(FILE, 30, 30)]
    assert joined([*ranges, ByteRange(other, 1, 2)]) == {FILE: [(5, 21)], other: [(1, 2)]}
