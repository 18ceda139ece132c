"""What ``perplexity`` and ``imatrix`` share: chunks as they are done, and what Ctrl-C leaves."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Protocol, TextIO, TypeVar

from ggufmoe.cli.console import StatusLine
from ggufmoe.cli.terminal import interruptible
from ggufmoe.errors import Cancelled
from ggufmoe.work import CancelFlag

_LINE_INTERVAL_S = 5.0


class ChunkStep(Protocol):
    """A result that grows chunk by chunk."""

    @property
    def n_chunks(self) -> int: ...
    @property
    def total_chunks(self) -> int: ...
    @property
    def is_complete(self) -> bool: ...


StepT = TypeVar("StepT", bound=ChunkStep)


def last_shown(
    what: str,
    start: Callable[[CancelFlag], Iterator[StepT]],
    words: Callable[[StepT], str],
    *,
    at_once: int,
    quiet: bool,
) -> StepT:
    """Run ``start(cancel)`` to its end and show each step on stderr; gives the last one.

    ``at_once`` chunks are computed together, and come one after another when that is done. Ctrl-C ends it after what is
    done. Raises Cancelled if nothing is.
    """
    last = None
    display = _Display(what, sys.stderr, at_once=at_once, quiet=quiet)
    try:
        for last in interruptible(start):
            display.update(last, words(last))
    finally:
        display.close()
    if last is None:
        raise Cancelled("stopped before the first chunk was done")
    return last


def check_complete(step: ChunkStep) -> None:
    """Raise Cancelled if the run was stopped; its result has been printed by then."""
    if not step.is_complete:
        raise Cancelled(f"stopped after {step.n_chunks} of {step.total_chunks} chunks; the result is of these")


class _Display:
    """One line that is written over on a terminal, a line now and then elsewhere."""

    def __init__(self, what: str, stream: TextIO, *, at_once: int, quiet: bool) -> None:
        self._what, self._stream, self._at_once, self._quiet = what, stream, at_once, quiet
        self._on_terminal = stream.isatty()
        self._line = StatusLine(stream)
        self._started = time.monotonic()
        self._shown = -_LINE_INTERVAL_S  # the first step is shown at once: it tells how long the rest will take

    def update(self, step: ChunkStep, words: str) -> None:
        """Show how far it is."""
        now = time.monotonic()
        if self._quiet or not (self._on_terminal or now - self._shown > _LINE_INTERVAL_S):
            return
        self._shown = now
        n_computed = min(-(-step.n_chunks // self._at_once) * self._at_once, step.total_chunks)
        left = (step.total_chunks - n_computed) * (now - self._started) / n_computed
        line = f"{self._what}: chunk {step.n_chunks} of {step.total_chunks}, {words}, {left:.0f} s left"
        if self._on_terminal:
            self._line.show(line)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Leave the terminal's line empty."""
        self._line.clear()
