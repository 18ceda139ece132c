"""How long this machine's CPU takes for a weight of each type when it generates: a table, kept in the cache folder.

Whoever chooses types by their speed reads it; ``evaluation.speed_of_types`` measures it.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ggufmoe.errors import OutputError
from ggufmoe.files import replacing
from ggufmoe.folders import cache_directory
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import backends
from ggufmoe.native.library import engine_version
from ggufmoe.work import usable_cores

CACHED_BYTES, MEMORY_BYTES = 6 << 20, 64 << 20
"""Bytes of matrices that caches keep between two tokens, and that they do not."""


@dataclass(frozen=True)
class TypeSpeeds:
    """Seconds that a weight of each type takes for one token, with all cores, and the machine that they hold for."""

    machine: str
    seconds: Mapping[GGMLType, float] = field(default_factory=dict)
    """In models of MEMORY_BYTES."""
    cached_seconds: Mapping[GGMLType, float] = field(default_factory=dict)
    """In models of CACHED_BYTES."""

    def missing(self, types: Iterable[GGMLType]) -> tuple[GGMLType, ...]:
        """The types that the table lacks in one of the sizes, each once."""
        return tuple(
            kind for kind in dict.fromkeys(types) if kind not in self.seconds or kind not in self.cached_seconds
        )

    def of(self, kind: GGMLType, n_weights: int) -> float:
        """Seconds for a weight of a type in a model with ``n_weights`` in its matrices.

        Between the two sizes the seconds follow the logarithm of the model's bytes. A type that was not measured takes
        as long for a byte as Q8_0.
        """
        if kind not in self.seconds:
            return self.of(GGMLType.Q8_0, n_weights) / _bytes_of(GGMLType.Q8_0) * _bytes_of(kind)
        n_bytes = min(max(n_weights * _bytes_of(kind), CACHED_BYTES), MEMORY_BYTES)
        share = math.log(n_bytes / CACHED_BYTES) / math.log(MEMORY_BYTES / CACHED_BYTES)
        return share * self.seconds[kind] + (1 - share) * self.cached_seconds[kind]

    def to_dict(self) -> dict[str, Any]:
        """The table as plain values for JSON: milliseconds for a token and a billion weights, by type, in models that
        are read from memory and in models that caches hold."""
        return {
            "machine": self.machine,
            "ms_per_billion": _milliseconds(self.seconds),
            "ms_per_billion_in_caches": _milliseconds(self.cached_seconds),
        }


def _milliseconds(seconds: Mapping[GGMLType, float]) -> dict[str, float]:
    return {kind.name: round(each * 1e12, 4) for kind, each in seconds.items()}


def _seconds(milliseconds: Mapping[str, float]) -> dict[GGMLType, float]:
    """The values of a table that was kept. Raises ValueError if one is not above 0."""
    found = {GGMLType[name]: float(ms) / 1e12 for name, ms in milliseconds.items()}
    if not all(seconds > 0 for seconds in found.values()):
        raise ValueError("a type takes time")
    return found


def _bytes_of(kind: GGMLType) -> float:
    return kind.block_bytes / kind.block_size


def this_cpu() -> str:
    """The CPU's name, the usable cores and the engine's version, which a table holds for. EngineMissingError without
    an engine."""
    cpu = next((one for one in backends.devices() if one.type is backends.DeviceType.CPU), None)
    name = "unknown CPU" if cpu is None else backends.device_facts(cpu).description or cpu.name
    engine = engine_version()
    commit = engine.llama_cpp_commit.partition("-")[0]
    return f"{name}, {usable_cores()} cores, llama-cpp-python {engine.package} (llama.cpp {commit})"


def table_path(folder: Path | None = None) -> Path | None:
    """The file of the table in ``folder``, by default the user's cache folder; None without one."""
    where = folder or cache_directory()
    return None if where is None else where / "type-speeds.json"


def load_speeds(folder: Path | None = None) -> TypeSpeeds:
    """What was measured on this machine with this engine; empty if nothing was, or the file cannot be read."""
    machine, path = this_cpu(), table_path(folder)
    if path is None:
        return TypeSpeeds(machine)
    try:
        found = json.loads(path.read_bytes())
        speeds = TypeSpeeds(
            found["machine"], _seconds(found["ms_per_billion"]), _seconds(found["ms_per_billion_in_caches"])
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return TypeSpeeds(machine)
    return speeds if speeds.machine == machine else TypeSpeeds(machine)


def save_speeds(speeds: TypeSpeeds, folder: Path | None = None) -> None:
    """Keep a table for later runs; where the folder cannot be written it is measured again."""
    path = table_path(folder)
    if path is not None:
        with contextlib.suppress(OSError, OutputError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, "the speeds of types") as file:
                file.write(json.dumps(speeds.to_dict(), indent=1).encode() + b"\n")
