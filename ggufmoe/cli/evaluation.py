"""What ``perplexity`` and ``imatrix`` share: chunks as they are done, and what Ctrl-C leaves."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from typing import Protocol, TextIO, TypeVar

from ggufmoe.cli.console import StatusLine
from ggufmoe.cli.terminal import interrupt_sets
from ggufmoe.errors import Cancelled
from ggufmoe.work import CancelFlag, OnProgress, Progress

_LINE_INTERVAL_S = 5.0


class ChunkedResult(Protocol):
    """The result of an evaluation that may have been stopped after some of its chunks."""

    @property
    def n_chunks(self) -> int: ...
    @property
    def total_chunks(self) -> int: ...
    @property
    def is_complete(self) -> bool: ...


ResultT = TypeVar("ResultT", bound=ChunkedResult)


def run_evaluation(
    what: str,
    evaluate: Callable[[OnProgress, CancelFlag], ResultT],
    describe: Callable[[ResultT], str],
    *,
    at_once: int,
    quiet: bool,
) -> ResultT:
    """Run ``evaluate(on_progress, cancel)``, show its progress on stderr and return its result.

    ``at_once`` chunks are computed together, and are reported one after another when that is done. Ctrl-C ends it after
    the chunks that are done. Raises Cancelled if none is.
    """
    display = _Display(what, sys.stderr, at_once=at_once, quiet=quiet)
    cancel = threading.Event()

    def show(progress: Progress) -> None:
        result: ResultT = progress.result  # type: ignore[assignment]
        display.update(progress, describe(result))

    try:
        with interrupt_sets(cancel):
            return evaluate(show, cancel)
    finally:
        display.close()


def check_complete(result: ChunkedResult) -> None:
    """Raise Cancelled if the run was stopped; its result has been printed by then."""
    if not result.is_complete:
        raise Cancelled(f"stopped after {result.n_chunks} of {result.total_chunks} chunks; the result is of these")


class _Display:
    """One line that is written over on a terminal, a line now and then elsewhere."""

    def __init__(self, what: str, stream: TextIO, *, at_once: int, quiet: bool) -> None:
        self._what, self._stream, self._at_once, self._quiet = what, stream, at_once, quiet
        self._on_terminal = stream.isatty()
        self._line = StatusLine(stream)
        self._started = time.monotonic()
        self._shown = -_LINE_INTERVAL_S  # the first step is shown at once: it tells how long the rest will take

    def update(self, progress: Progress, words: str) -> None:
        """Show how many chunks are done, what the result is so far and how long the others will take."""
        now = time.monotonic()
        if self._quiet or not (self._on_terminal or now - self._shown > _LINE_INTERVAL_S):
            return
        self._shown = now
        done, total = int(progress.done), int(progress.total)
        n_computed = min(-(-done // self._at_once) * self._at_once, total)
        left = (total - n_computed) * (now - self._started) / n_computed
        line = f"{self._what}: chunk {done} of {total}, {words}, {left:.0f} s left"
        if self._on_terminal:
            self._line.show(line)
        else:
            self._stream.write(line + "\n")
            self._stream.flush()

    def close(self) -> None:
        """Leave the terminal's line empty."""
        self._line.clear()
