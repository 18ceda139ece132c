"""Inputs leave the page cache only where they could not stay in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ggufmoe.writing import pagecache
from ggufmoe.writing.pagecache import PassingFiles, memory_bytes


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the system is told to give back: (inode, advice)."""
    told: list[tuple[int, int]] = []

    def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert (offset, length) == (0, 0)
        told.append((os.fstat(descriptor).st_ino, advice))

    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_DONTNEED", 4, raising=False)
    monkeypatch.setattr(pagecache, "memory_bytes", lambda: 1000)
    return told


def test_what_fits_stays_and_what_does_not_is_given_back(tmp_path: Path, released: list[tuple[int, int]]) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path in paths:
        path.touch()
    PassingFiles(paths, 500).release()
    assert released == []
    PassingFiles([*paths, tmp_path / "gone"], 501).release()
    assert released == [(path.stat().st_ino, 4) for path in paths]


def test_a_system_that_cannot_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    PassingFiles([tmp_path / "gone"], 1 << 60).release()
    monkeypatch.delattr(os, "sysconf", raising=False)
    assert memory_bytes() is None


def test_this_machine_has_memory() -> None:
    memory = memory_bytes()
    assert memory is None or memory > 1 << 28
