"""Inputs leave the page cache only where they could not stay in it."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from ggufmoe.writing import pagecache
from ggufmoe.writing.pagecache import PassingFiles


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the system is told to give back: (inode, advice)."""
    told: list[tuple[int, int]] = []

    def advise(descriptor: int, offset: int, length: int, advice: int) -> None:
        assert (offset, length) == (0, 0)
        told.append((os.fstat(descriptor).st_ino, advice))

    monkeypatch.setattr(pagecache, "sys", SimpleNamespace(platform="linux"))
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


@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_nothing_is_given_back_on_a_system_without_the_call(
    system: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, released: list[tuple[int, int]]
) -> None:
    (tmp_path / "a").touch()
    files = PassingFiles([tmp_path / "a"], 501)
    monkeypatch.setattr(pagecache, "sys", SimpleNamespace(platform=system))
    files.release()
    assert released == []
