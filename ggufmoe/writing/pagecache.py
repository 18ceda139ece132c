"""What a conversion leaves in the system's page cache.

Files that fit stay there: a second conversion of the same checkpoint, or loading the new model, reads them from memory.
Inputs so large that they would push out all other files, and their own first parts before these are read again, are
removed from the cache while they are read; that costs no more than letting the system reclaim them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ggufmoe.work import memory_bytes

_SHARE = 0.5
"""Part of the machine's memory; files that are larger together do not stay in the cache."""


class PassingFiles:
    """Inputs that are read once; ``release`` removes them from the page cache if they are too large to stay.

    ``n_bytes`` is the size of all files that the run reads and writes.
    """

    def __init__(self, paths: Sequence[Path], n_bytes: int) -> None:
        memory = memory_bytes()
        self._paths = tuple(paths) if memory and n_bytes > _SHARE * memory else ()

    def release(self) -> None:
        """Remove what has been read so far from the page cache (on Linux; elsewhere nothing happens)."""
        if sys.platform != "linux":
            return
        for path in self._paths:
            with contextlib.suppress(OSError), path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
