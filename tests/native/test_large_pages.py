"""Large pages are asked for where memory is new, and nowhere else. Needs Linux."""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from pathlib import Path

import pytest

from ggufmoe.native.large_pages import ask_for_large_pages, large_mappings

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/maps of Linux")
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_BYTES = 40 << 20


def _flags_at(address: int) -> list[str]:
    """The flags of the mapping that holds ``address`` (``VmFlags`` of proc_pid_smaps(5))."""
    is_there = False
    for line in Path("/proc/self/smaps").read_text(errors="replace").splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            is_there = int(head[1], 16) <= address < int(head[2], 16)
        elif is_there and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("not mapped")


@pytest.mark.skipif(not _ENABLED.exists() or "[never]" in _ENABLED.read_text(), reason="no large pages here")
def test_only_memory_that_is_new_is_asked_for() -> None:
    before = large_mappings()
    made = mmap.mmap(-1, _BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    address = ctypes.addressof(ctypes.c_char.from_buffer(made))
    assert ask_for_large_pages(large_mappings()) == 0
    assert "hg" not in _flags_at(address)
    assert ask_for_large_pages(before) > 0
    assert "hg" in _flags_at(address)
