"""The record of a stored model: a small JSON file beside it, which says where the model came from.

A record that cannot be read, or that has another shape, counts as absent: the folder belongs to the user.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ggufmoe.files import replacing
from ggufmoe.version import __version__

_VERSION = 1
_MAX_BYTES = 1 << 24


@dataclass(frozen=True)
class StoredFile:
    """One file of a stored model: its name in the folder, its size, and the SHA-256 of its content (hexadecimal)."""

    name: str
    n_bytes: int
    sha256: str


@dataclass(frozen=True)
class InputState:
    """A file on this machine that a model was made from, as it was then; ``mtime_ns`` is when it was changed."""

    path: str
    n_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, path: Path) -> InputState:
        """The state of a file now. Raises OSError."""
        status = path.stat()
        return cls(str(path.resolve()), status.st_size, status.st_mtime_ns)

    @property
    def is_current(self) -> bool:
        """Whether the file is still as it was."""
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_size, status.st_mtime_ns) == (self.n_bytes, self.mtime_ns)


@dataclass(frozen=True)
class ModelRecord:
    """Where a stored model came from. Without ``files`` it is a claim: the model is still to be made."""

    source: str
    """A directory, a recipe, a hub id, or a file of a repository on the hub."""
    file_type: str
    requests: tuple[str, ...]
    """What was asked for when this model was the answer, for example ``org/name -q Q4_K_M``."""
    files: tuple[StoredFile, ...] = ()
    commits: Mapping[str, str] = field(default_factory=dict)
    """The commit of each model of the hub that was read, by its name."""
    inputs: tuple[InputState, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the conversion."""
    made: str = ""
    """When the model was complete, in ISO 8601."""
    ggufmoe: str = __version__

    @property
    def is_current(self) -> bool:
        """Whether the files on this machine that the model was made from are unchanged."""
        return all(one.is_current for one in self.inputs)

    def to_dict(self) -> dict[str, Any]:
        """The record as plain values for JSON."""
        return {"version": _VERSION, **asdict(self)}

    def write(self, path: Path) -> None:
        """Write the record to ``path``, whole or not at all. Raises OutputError."""
        with replacing(path, "the record of a model") as file:
            file.write((json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n").encode())


def now() -> str:
    """The time in ISO 8601, to the second, in UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def read_record(path: Path) -> ModelRecord | None:
    """The record at ``path``; None if there is none that can be read."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            return None
        found = json.loads(path.read_bytes())
        return ModelRecord(
            source=_text(found["source"]),
            file_type=_text(found["file_type"]),
            requests=tuple(map(_text, found["requests"])),
            files=tuple(StoredFile(_text(f["name"]), int(f["n_bytes"]), _text(f["sha256"])) for f in found["files"]),
            commits={_text(name): _text(commit) for name, commit in found["commits"].items()},
            inputs=tuple(_input(one) for one in found["inputs"]),
            options=dict(found["options"]),
            made=_text(found["made"]),
            ggufmoe=_text(found["ggufmoe"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("expected a text")
    return value


def _input(found: Mapping[str, Any]) -> InputState:
    return InputState(_text(found["path"]), int(found["n_bytes"]), int(found["mtime_ns"]))


def input_states(paths: Iterable[Path], *, outside: Sequence[Path] = ()) -> tuple[InputState, ...]:
    """The states of files now, without those below the folders ``outside`` and those that cannot be read."""
    states = []
    for path in paths:
        try:
            state = InputState.of(path)
        except OSError:
            continue
        if not any(folder in Path(state.path).parents for folder in outside):
            states.append(state)
    return tuple(states)
