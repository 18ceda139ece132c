"""What a conversion leaves in the system's page cache.

Files that fit stay: whoever makes several types of one checkpoint, or loads what was just written, reads them from
memory. Inputs that would push out everything else, themselves included before they are read again, are given back as
they are read; that costs nothing that reclaiming them would not.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

_SHARE = 0.5
"""Of the machine's memory: files beyond this do not stay in the cache."""


class PassingFiles:
    """Inputs that are read once; ``release`` takes them out of the page cache if they are too large to stay."""

    def __init__(self, paths: Sequence[Path], n_bytes: int) -> None:
        memory = memory_bytes()
        self._paths = tuple(paths) if memory is not None and n_bytes > _SHARE * memory else ()

    def release(self) -> None:
        """Take what has been read so far out of the page cache (on Linux; elsewhere nothing happens)."""
        if sys.platform != "linux":
            return
        for path in self._paths:
            with contextlib.suppress(OSError), path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_bytes() -> int | None:
    """Physical memory of this machine; None on Windows and where the system does not tell."""
    if sys.platform == "win32":
        return None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
