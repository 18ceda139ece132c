"""The journal of a run of the writer: which tiles of the plan are on disk, so that an interrupted run can be resumed.

A small file of JSON lines beside the partial output. Its first line identifies the plan by a fingerprint of all that
the bytes depend on; each further line lists ranges of finished tiles, and is written only after their bytes have been
flushed to disk. A line that a crash has cut short is ignored.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ggufmoe.errors import OutputError, ResumeError
from ggufmoe.files import delete, sync
from ggufmoe.version import __version__
from ggufmoe.writing.plan import WritePlan
from ggufmoe.writing.tiling import TILE_WEIGHTS

_VERSION = 1
_MAX_BYTES = 1 << 28


def fingerprint(plan: WritePlan) -> str:
    """A hash of what determines the bytes: headers, inputs (path, size, time of change; on the hub commit, size and
    ETag), tile size, version."""
    identities = [
        [str(path.resolve()), (status := path.stat()).st_size, status.st_mtime_ns] for path in plan.input_paths
    ]
    about = [_VERSION, __version__, TILE_WEIGHTS, identities, str(plan.imatrix and plan.imatrix.path)]
    if plan.origins:
        about.append([origin.identity for origin in plan.origins])
    digest = hashlib.sha256(json.dumps(about).encode())
    for file in plan.files:
        digest.update(file.header)
    return digest.hexdigest()


class Journal:
    """The journal of one plan at one path. Not safe for several threads."""

    def __init__(self, path: Path, plan_fingerprint: str, commits: Mapping[str, str] | None = None) -> None:
        """``commits`` are those of the plan, for the reader of a later run."""
        self.path = path
        self._fingerprint = plan_fingerprint
        self._commits = dict(commits or {})
        self._descriptor: int | None = None

    def read(self) -> set[int] | None:
        """Numbers of the finished tiles; None if there is no journal. Raises ResumeError if it is of another plan."""
        lines = _lines(self.path)
        if not lines:
            return None
        if lines[0].get("plan") != self._fingerprint:
            raise ResumeError(
                f"{self.path} belongs to a run with other inputs or options; give the same ones, or leave out "
                "--resume to start over"
            )
        return {tile for line in lines[1:] for first, last in line.get("done", ()) for tile in range(first, last + 1)}

    def begin(self) -> None:
        """Start a new journal; an older one at its path is deleted."""
        delete(self.path)
        self._open(os.O_EXCL)
        commits = {"commits": self._commits} if self._commits else {}
        self._append({"plan": self._fingerprint, "ggufmoe": __version__, **commits})

    def go_on(self) -> None:
        """Open the journal that ``read`` has read, to append to it."""
        self._open(0)
        self._append_raw(b"\n")  # ends a line that a crash may have cut

    def _open(self, flags: int) -> None:
        flags |= os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        self._descriptor = os.open(self.path, flags, 0o666)

    def add(self, finished: Iterable[int]) -> None:
        """Record the numbers of tiles whose bytes are on disk."""
        ranges = _ranges(sorted(finished))
        if ranges:
            self._append({"done": ranges})

    def _append(self, content: dict[str, Any]) -> None:
        self._append_raw(json.dumps(content).encode() + b"\n")

    def _append_raw(self, line: bytes) -> None:
        assert self._descriptor is not None, "begin or go_on comes first"
        os.write(self._descriptor, line)
        sync(self._descriptor)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def remove(self) -> None:
        """Delete the journal: the output is complete."""
        self.close()
        delete(self.path)


def journalled_commits(path: Path) -> dict[str, str]:
    """The commit of each model of the hub, by its name, that the run of the journal at ``path`` has read.

    Empty if there is no journal.
    """
    lines = _lines(path)
    found = lines[0].get("commits") if lines else None
    return {str(name): str(commit) for name, commit in found.items()} if isinstance(found, dict) else {}


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        if not path.is_file() or path.stat().st_size > _MAX_BYTES:
            return []
        raw = path.read_bytes()
    except OSError as error:
        raise OutputError(f"{path} cannot be read: {error.strerror}; delete it to start over") from error
    lines: list[dict[str, Any]] = []
    for line in raw.split(b"\n")[:-1]:
        try:
            content = json.loads(line or b"{}")
        except ValueError:
            continue  # cut by a crash; what it said was done is done again
        lines.append(content if isinstance(content, dict) else {})
    return lines


def _ranges(numbers: Sequence[int]) -> list[list[int]]:
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges
