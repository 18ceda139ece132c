"""Long calls: how they report progress, how they are cancelled, which cores they use, and work over many bytes.

Every public function that can take long has the same two arguments: ``on_progress``, called with a ``Progress``, and
``cancel``, a ``CancelFlag``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

Unit = Literal["bytes", "tokens", "chunks", "layers", "parts"]
"""What ``Progress`` counts."""


class CancelFlag(Protocol):
    """What can ask a long call to stop, for example a ``threading.Event``."""

    def is_set(self) -> bool: ...


@dataclass(frozen=True)
class Progress:
    """One report of a long call: ``done`` of ``total`` units of ``phase`` are finished.

    ``phase`` is one word for the kind of work ("load", "router", "write", "hash", "chunks"); ``item`` names what is
    being worked on, for example a tensor; ``result`` is what is known so far, where partial results exist.
    """

    phase: str
    done: float
    total: float
    unit: Unit
    item: str = ""
    result: object = None


OnProgress = Callable[[Progress], None]


def checked_flag(flag: CancelFlag | None) -> CancelFlag | None:
    """Return ``flag``. Raise TypeError if it has no ``is_set``."""
    if flag is not None and not callable(getattr(flag, "is_set", None)):
        raise TypeError(f"cancel must be a flag such as threading.Event(), not {flag!r}")
    return flag


def usable_cores() -> int:
    """Number of logical cores that this process may run on (its affinity where the system has one); at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
