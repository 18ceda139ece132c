"""How fast this machine reads its main memory, which limits how many tokens a second its CPU generates.

Measured once, in a fraction of a second, and kept in the user's cache folder for later runs.
"""

from __future__ import annotations

import contextlib
import json
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ggufmoe.errors import OutputError
from ggufmoe.files import replacing
from ggufmoe.folders import cache_directory
from ggufmoe.work import usable_cores

_BYTES = 256 << 20
"""More than the caches of processors hold."""
_TIMES = 4
_MOST_THREADS = 16
_KEPT_S = 30 * 86400.0


def memory_bytes_per_s(cache: Path | None = None) -> float:
    """Bytes of main memory that all usable cores together read in a second; from the cache if it was measured lately.

    ``cache`` is the folder of the cache, by default the user's.
    """
    folder = cache or cache_directory()
    path = None if folder is None else folder / "memory-speed.json"
    machine = f"{platform.node()} {platform.machine()} {usable_cores()}"
    if path is not None and (kept := _kept(path, machine)) is not None:
        return kept
    measured = measure_memory()
    if path is not None:
        with contextlib.suppress(OSError, OutputError):  # then it is measured again
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, "the speed of the memory") as file:
                file.write(json.dumps({"machine": machine, "bytes_per_s": measured}).encode())
    return measured


def _kept(path: Path, machine: str) -> float | None:
    try:
        if time.time() - path.stat().st_mtime > _KEPT_S:
            return None
        found = json.loads(path.read_bytes())
        value = float(found["bytes_per_s"])
        return value if found["machine"] == machine and value > 0 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measure_memory(n_bytes: int = _BYTES) -> float:
    """Bytes a second at which all usable cores together read memory: the best of a few passes over ``n_bytes``."""
    import numpy as np

    n_threads = min(usable_cores(), _MOST_THREADS)
    parts = [np.ones(n_bytes // n_threads // 8, np.int64) for _ in range(n_threads)]
    best = 0.0
    with ThreadPoolExecutor(n_threads) as pool:
        for _ in range(_TIMES):
            began = time.perf_counter()
            list(pool.map(np.max, parts))  # numpy computes without the interpreter's lock
            best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - began))
    return best
