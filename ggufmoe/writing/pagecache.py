"""What a conversion leaves in the system's page cache.

Files that fit stay: whoever makes several types of one checkpoint, or loads what was just written, reads them from
memory. Inputs that would push out everything else, themselves included before they are read again, are given back as
they are read; that costs nothing that reclaiming them would not.
"""

from __future__ import annotations

import contextlib
import os
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
        """Give back what has been read so far; nothing happens where the system has no such call."""
        if not hasattr(os, "posix_fadvise"):
            return
        for path in self._paths:
            with contextlib.suppress(OSError), path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_bytes() -> int | None:
    """Memory of the machine; None where the system does not tell (Windows)."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
