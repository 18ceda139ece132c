"""Progress of a long job on stderr: a bar or a line that is redrawn on a terminal, a line now and then elsewhere.

Owns the drawing only; it is fed with the ``Progress`` reports of the library.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from ggufmoe.cli.console import StatusLine
from ggufmoe.sizes import file_size
from ggufmoe.work import Progress

if TYPE_CHECKING:
    from rich.progress import TaskID

_LINE_INTERVAL_S = 5.0


class ProgressDisplay(Protocol):
    """Shows reports between ``__enter__`` and ``__exit__``."""

    def __enter__(self) -> ProgressDisplay: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def update(self, progress: Progress) -> None: ...


def progress_display(
    what: str, *, phase: str = "write", quiet: bool = False, stream: TextIO | None = None
) -> ProgressDisplay:
    """The display of work on bytes that suits ``stream`` (stderr by default): bars, plain lines, or nothing.

    ``phase`` is the one that is shown as ``what``; others are shown under their own names.
    """
    stream = sys.stderr if stream is None else stream
    if quiet:
        return NoProgress()
    titles = {phase: what}
    return BarProgress(titles, stream) if stream.isatty() else LineProgress(titles, stream)


def chunk_display(what: str, describe: Callable[[Any], str], *, at_once: int, quiet: bool) -> ProgressDisplay:
    """The display of an evaluation on stderr; ``describe`` puts the result so far into words.

    ``at_once`` chunks are computed together, and are reported one after another when that is done.
    """
    return NoProgress() if quiet else ChunkProgress(what, describe, sys.stderr, at_once=at_once)


class NoProgress:
    """Shows nothing."""

    def __enter__(self) -> NoProgress:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to do."""

    def update(self, progress: Progress) -> None:
        """Show nothing."""


class LineProgress:
    """A line every few seconds, for logs and pipes."""

    def __init__(self, titles: Mapping[str, str], stream: TextIO) -> None:
        self._titles = titles
        self._stream = stream
        self._started = self._shown = time.monotonic()
        self._phase = ""
        self._first_bytes = 0.0

    def __enter__(self) -> LineProgress:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to do."""

    def update(self, progress: Progress) -> None:
        """Print a line if the last one is old."""
        now = time.monotonic()
        if progress.phase != self._phase:
            self._phase, self._first_bytes, self._started = progress.phase, progress.done, now
        if now - self._shown < _LINE_INTERVAL_S:
            return
        self._shown = now
        speed = (progress.done - self._first_bytes) / max(now - self._started, 1e-9)
        left = f"{(progress.total - progress.done) / speed:.0f} s left" if speed > 0 else "time left unknown"
        share = progress.done / max(progress.total, 1)
        title = self._titles.get(progress.phase, progress.phase)
        print(f"{title}: {share:.0%}, {file_size(speed)}/s, {left}, {progress.item}", file=self._stream, flush=True)


class BarProgress:
    """One bar with percent, MB/s, time left and the current tensor."""

    def __init__(self, titles: Mapping[str, str], stream: TextIO) -> None:
        self._titles = titles
        self._bar = _make_bar(stream)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> BarProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar as it is and the cursor below it."""
        self._bar.stop()

    def update(self, progress: Progress) -> None:
        """Move the bar of the phase; each phase has one."""
        if progress.phase not in self._tasks:
            title = self._titles.get(progress.phase, progress.phase)
            self._tasks[progress.phase] = self._bar.add_task(title, total=None, tensor="")
        task = self._tasks[progress.phase]
        self._bar.update(task, completed=progress.done, total=progress.total, tensor=progress.item)


class ChunkProgress:
    """The chunks of an evaluation: one line that is redrawn on a terminal, a line now and then elsewhere."""

    def __init__(self, what: str, describe: Callable[[Any], str], stream: TextIO, *, at_once: int) -> None:
        self._what, self._describe, self._stream, self._at_once = what, describe, stream, at_once
        self._on_terminal = stream.isatty()
        self._line = StatusLine(stream)
        self._started = time.monotonic()
        self._shown = -_LINE_INTERVAL_S  # the first report is shown at once: it tells how long the rest will take

    def __enter__(self) -> ChunkProgress:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the terminal's line empty."""
        self._line.clear()

    def update(self, progress: Progress) -> None:
        """Show how many chunks are done, what the result is so far and how long the others will take."""
        now = time.monotonic()
        if progress.phase == "load":
            self._started = now
            self._line.show(f"loading {progress.item}: {progress.done / progress.total:.0%}")
            return
        if not (self._on_terminal or now - self._shown > _LINE_INTERVAL_S):
            return
        self._shown = now
        done, total = int(progress.done), int(progress.total)
        n_computed = min(-(-done // self._at_once) * self._at_once, total)
        left = (total - n_computed) * (now - self._started) / n_computed
        line = f"{self._what}: chunk {done} of {total}, {self._describe(progress.result)}, {left:.0f} s left"
        if self._on_terminal:
            self._line.show(line)
        else:
            print(line, file=self._stream, flush=True)


def _make_bar(stream: TextIO) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.progress import TransferSpeedColumn as SpeedColumn

    return Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        SpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tensor]}"),
        console=Console(file=stream),
    )
