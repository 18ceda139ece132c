"""How long this machine's CPU takes for a weight of each type when it generates: a table, kept in the cache folder.

Whoever chooses types by their speed reads it; ``evaluation.speed_of_types`` measures it.
"""

from __future__ import annotations

import contextlib
import json
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


@dataclass(frozen=True)
class TypeSpeeds:
    """Seconds that a weight of each type takes for one token, with all cores, and the machine that they hold for."""

    machine: str
    seconds: Mapping[GGMLType, float] = field(default_factory=dict)

    def missing(self, types: Iterable[GGMLType]) -> tuple[GGMLType, ...]:
        """The types that are not in the table, each once."""
        return tuple(kind for kind in dict.fromkeys(types) if kind not in self.seconds)

    def of(self, kind: GGMLType) -> float:
        """Seconds for a weight of a type; one that was not measured takes as long for a byte as Q8_0."""
        if kind in self.seconds:
            return self.seconds[kind]
        return self.seconds[GGMLType.Q8_0] / _bytes_of(GGMLType.Q8_0) * _bytes_of(kind)

    def to_dict(self) -> dict[str, Any]:
        """The table as plain values for JSON: milliseconds for a token and a billion weights, by type."""
        return {
            "machine": self.machine,
            "ms_per_billion": {k.name: round(s * 1e12, 4) for k, s in self.seconds.items()},
        }


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
        by_type = {GGMLType[name]: float(ms) / 1e12 for name, ms in found["ms_per_billion"].items()}
        is_ours = found["machine"] == machine and all(seconds > 0 for seconds in by_type.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return TypeSpeeds(machine)
    return TypeSpeeds(machine, by_type if is_ours else {})


def save_speeds(speeds: TypeSpeeds, folder: Path | None = None) -> None:
    """Keep a table for later runs; where the folder cannot be written it is measured again."""
    path = table_path(folder)
    if path is not None:
        with contextlib.suppress(OSError, OutputError):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, "the speeds of types") as file:
                file.write(json.dumps(speeds.to_dict(), indent=1).encode() + b"\n")
