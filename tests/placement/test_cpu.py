"""How many threads are used by default."""

from __future__ import annotations

import os
from pathlib import Path

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
