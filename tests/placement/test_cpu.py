"""How many threads are used by default."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from ggufmoe.placement import cpu as cores_module
from ggufmoe.placement.cpu import default_threads, physical_cores


def test_hyperthreads_of_one_core_count_once(tmp_path: Path) -> None:
    for cpu, siblings in enumerate(["0,2", "1,3", "0,2", "1,3"]):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(siblings + "\n")
    assert physical_cores(range(4), tmp_path) == 2
    assert physical_cores([1, 3], tmp_path) == 1


def test_where_the_system_does_not_tell(tmp_path: Path) -> None:
    assert physical_cores(range(4), tmp_path) == 0


def test_this_machine() -> None:
    assert 1 <= default_threads() <= (os.cpu_count() or 1)


@pytest.mark.parametrize(("told", "expected"), [(6, 6), (None, 12)])
def test_windows_tells_its_cores(told: int | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def cores(*, logical: bool) -> int | None:
        assert not logical
        return told

    monkeypatch.setattr(cores_module, "sys", SimpleNamespace(platform="win32"))
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 12)
    monkeypatch.setattr(psutil, "cpu_count", cores)
    assert default_threads() == expected
