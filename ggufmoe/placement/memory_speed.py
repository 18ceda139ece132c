"""How fast this machine computes with stored weights, which limits how many tokens a second its CPU generates.

Measured with the engine, for each type of weights a fraction of a second, and kept in the user's cache folder for later
runs with the load of the machine: what was measured on a busy machine is measured again on a calmer one. Without an
engine it is the speed of the memory alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ggufmoe.errors import OutputError
from ggufmoe.files import replacing
from ggufmoe.folders import cache_directory
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import product_speed
from ggufmoe.native.library import engine_version, has_engine
from ggufmoe.placement.cpu import default_threads
from ggufmoe.placement.devices import repacked_types
from ggufmoe.work import usable_cores

_BYTES = 256 << 20
"""More than the caches of processors hold."""
_TIMES = 4
_MOST_THREADS = 16
_KEPT_S = 30 * 86400.0
_CALM = 0.3
"""Load of each core up to which a measurement counts as undisturbed."""
_MEMORY, _STEP = "memory", "step"


class Speeds(Protocol):
    """How fast a machine computes with weights."""

    def bytes_per_s(self, type: GGMLType) -> float:
        """Bytes of weights of a type that are multiplied by a vector in a second."""

    @property
    def step_s(self) -> float:
        """Seconds for a step of the graph beside its weights."""


@dataclass(frozen=True)
class SameSpeed:
    """One speed for all types, without a cost of steps."""

    rate: float
    """Bytes a second."""
    step_s: float = 0.0

    def bytes_per_s(self, type: GGMLType) -> float:
        """The one speed."""
        return self.rate


class MeasuredSpeeds:
    """The speeds of this machine; what is asked for is measured, or taken from the cache.

    ``cache`` is the folder of the cache, by default the user's.
    """

    def __init__(self, cache: Path | None = None) -> None:
        folder = cache or cache_directory()
        self._path = None if folder is None else folder / "speeds.json"
        self._has_engine = has_engine()
        engine = engine_version().llama_cpp_commit if self._has_engine else "no engine"
        self._machine = f"{platform.node()} {platform.machine()} {usable_cores()} {engine}"
        self._found: dict[str, float] = {}
        self.is_disturbed = False
        """Whether a speed that was asked for was measured while other programs kept the cores busy."""

    def bytes_per_s(self, type: GGMLType) -> float:
        """Bytes of weights of a type that are multiplied by a vector in a second."""
        if not self._has_engine:
            return self._speed(_MEMORY, measure_memory)
        is_repacked = type in repacked_types()
        return self._speed(
            type.name, lambda: product_speed.product_bytes_per_s(type, default_threads(), repacked=is_repacked)
        )

    @property
    def step_s(self) -> float:
        """Seconds for a step of the graph beside its weights; 0 without an engine."""
        return 1 / self._speed(_STEP, lambda: 1 / product_speed.step_s(default_threads())) if self._has_engine else 0.0

    def _speed(self, name: str, measure: Callable[[], float]) -> float:
        if name not in self._found:
            self._found[name] = self._kept_or_measured(name, measure)
        return self._found[name]

    def _kept_or_measured(self, name: str, measure: Callable[[], float]) -> float:
        kept, load = self._kept(), _load()
        known = kept.get(name)
        if known is not None and known["load"] <= max(_CALM, load):
            self.is_disturbed |= known["load"] > _CALM
            return float(known["speed"])
        self.is_disturbed |= load > _CALM
        measured = {"speed": measure(), "load": load, "time": time.time()}
        if known is not None and known["speed"] > measured["speed"]:  # calmer by the average, and yet disturbed
            measured["speed"] = known["speed"]
        self._keep({**kept, name: measured})
        return float(measured["speed"])

    def _kept(self) -> dict[str, dict[str, float]]:
        try:
            content: Any = json.loads(self._path.read_bytes()) if self._path is not None else {}
            if content.get("machine") != self._machine:
                return {}
            kept = {
                str(name): {key: float(one[key]) for key in ("speed", "load", "time")}
                for name, one in content["speeds"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return {}
        now = time.time()
        return {name: one for name, one in kept.items() if one["speed"] > 0 and 0 <= now - one["time"] < _KEPT_S}

    def _keep(self, speeds: dict[str, dict[str, float]]) -> None:
        if self._path is None:
            return
        with contextlib.suppress(OSError, OutputError):  # then it is measured again
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self._path, "the speeds of this machine") as file:
                file.write(json.dumps({"machine": self._machine, "speeds": speeds}, indent=1).encode())


def _load() -> float:
    """Threads that ran or waited for a core, for each core, as the mean of the last minute; 0 where nothing tells."""
    if sys.platform == "win32":
        return 0.0
    try:
        return os.getloadavg()[0] / usable_cores()
    except OSError:
        return 0.0


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
