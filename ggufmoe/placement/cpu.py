"""The physical cores of this machine, for the number of threads that compute a model.

Two threads of one core share its vector units, so more threads only wait for each other (llama.cpp's tools count the
same way).
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from pathlib import Path

_TOPOLOGY = Path("/sys/devices/system/cpu")


def default_threads() -> int:
    """Number of physical cores that this process may use; at least 1."""
    if sys.platform == "darwin":
        return _sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu") or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        allowed = os.sched_getaffinity(0)
        return physical_cores(allowed, _TOPOLOGY) or len(allowed)
    if sys.platform == "win32":
        import psutil

        return psutil.cpu_count(logical=False) or os.cpu_count() or 1
    logical = os.cpu_count() or 1
    return logical if logical <= 4 else logical // 2


def physical_cores(allowed: Iterable[int], topology: Path) -> int:
    """Number of physical cores among the logical CPUs ``allowed``, by Linux's sysfs at ``topology``; 0 if unknown."""
    cores = set()
    for cpu in allowed:
        try:
            cores.add((topology / f"cpu{cpu}" / "topology" / "thread_siblings_list").read_text().strip())
        except OSError:
            return 0
    return len(cores)


def _sysctl(name: str) -> int:
    value, size = ctypes.c_int32(0), ctypes.c_size_t(4)
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), ctypes.byref(value), ctypes.byref(size), None, 0)
    return 0 if failed else value.value
