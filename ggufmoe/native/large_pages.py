"""Large pages for the memory in which llama.cpp holds weights and KV caches, so that the processor finds it faster.

Each token reads all weights of a dense model. In pages of 4 KiB the processor looks up where every one of them lies;
in pages of 2 MiB it looks up 512 times fewer. Many Linux systems give large pages only where a program asks for them
(``madvise`` in ``/sys/kernel/mm/transparent_hugepage/enabled``), and llama.cpp does not ask. Weights that are read out
of the mapped file itself are not anonymous memory, and stay as they are. Other systems: nothing is done.
"""

from __future__ import annotations

import ctypes
import sys
import time
from pathlib import Path

from ggufmoe.native.library import c_library

_MAPS = Path("/proc/self/maps")
_MIN_BYTES = 32 << 20
"""Smaller mappings gain nothing that can be measured, and stacks of threads are among them."""
_PAGE_BYTES = 2 << 20
"""A large page of x86-64, and of other processors with small pages of 4 KiB."""
_COLLAPSE_S = 0.5
"""Memory that has been used already is copied into large pages for so long at most; the kernel does the rest later."""
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25
"""``asm-generic/mman-common.h`` of Linux; a kernel that does not know one refuses it, which changes nothing."""

Ranges = frozenset[tuple[int, int]]
"""Addresses of mappings: begin and end."""


def large_mappings() -> Ranges:
    """This process's writable mappings of anonymous memory, from 32 MiB on; none where the system is not Linux."""
    if not sys.platform.startswith("linux"):
        return frozenset()
    try:
        lines = _MAPS.read_text(errors="replace").splitlines()
    except OSError:
        return frozenset()
    found = set()
    for line in lines:
        # address perms offset dev inode [pathname]; the heap and stacks have a name in brackets
        fields = line.split(maxsplit=5)
        if len(fields) != 5 or fields[1] != "rw-p" or fields[4] != "0":
            continue
        begin, end = (int(address, 16) for address in fields[0].split("-"))
        if end - begin >= _MIN_BYTES:
            found.add((begin, end))
    return frozenset(found)


def ask_for_large_pages(before: Ranges, *, is_used: bool = False) -> int:
    """Ask for large pages in the ``large_mappings`` that were not there ``before``; returns their number.

    What is written later then comes in large pages at once. With ``is_used`` the memory has been written already, and
    is copied into large pages, for half a second at most.
    """
    new = sorted(large_mappings() - before)
    until = time.monotonic() + _COLLAPSE_S
    for begin, end in new:
        _advise(begin, end - begin, _MADV_HUGEPAGE)
        # page by page: at one that was never written the kernel refuses, and leaves those behind it
        pages = range(-(-begin // _PAGE_BYTES) * _PAGE_BYTES, end - _PAGE_BYTES + 1, _PAGE_BYTES)
        for page in pages if is_used else ():
            if time.monotonic() >= until:
                break
            _advise(page, _PAGE_BYTES, _MADV_COLLAPSE)
    return len(new)


def _advise(begin: int, n_bytes: int, advice: int) -> None:
    # int madvise(void *addr, size_t length, int advice): refusals do no harm
    madvise = c_library().madvise
    madvise(ctypes.c_void_p(begin), ctypes.c_size_t(n_bytes), ctypes.c_int(advice))
