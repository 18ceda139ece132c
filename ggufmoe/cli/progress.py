"""Progress of a long job on stderr: one rich bar on a terminal, a line now and then elsewhere.

Owns the drawing only; it is fed with ``Progress`` reports that count bytes.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from ggufmoe.sizes import file_size
from ggufmoe.work import Progress

if TYPE_CHECKING:
    from rich.progress import TaskID

_LINE_INTERVAL_S = 5.0


class ProgressDisplay(Protocol):
    """Shows steps between ``__enter__`` and ``__exit__``."""

    def __enter__(self) -> ProgressDisplay: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...
    def update(self, step: Progress) -> None: ...


def progress_display(what: str, *, quiet: bool = False, stream: TextIO | None = None) -> ProgressDisplay:
    """The display that suits ``stream`` (stderr by default): a bar, plain lines, or nothing at all."""
    stream = sys.stderr if stream is None else stream
    if quiet:
        return NoProgress()
    return BarProgress(what, stream) if stream.isatty() else LineProgress(what, stream)


class NoProgress:
    """Shows nothing."""

    def __enter__(self) -> NoProgress:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to do."""

    def update(self, step: Progress) -> None:
        """Show nothing."""


class LineProgress:
    """A line every few seconds, for logs and pipes."""

    def __init__(self, what: str, stream: TextIO) -> None:
        self._what = what
        self._stream = stream
        self._started = self._shown = time.monotonic()
        self._phase = ""
        self._first_bytes = 0.0

    def __enter__(self) -> LineProgress:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is left to do."""

    def update(self, step: Progress) -> None:
        """Print a line if the last one is old."""
        now = time.monotonic()
        if step.phase != self._phase:
            self._phase, self._first_bytes, self._started = step.phase, step.done, now
        if now - self._shown < _LINE_INTERVAL_S:
            return
        self._shown = now
        speed = (step.done - self._first_bytes) / max(now - self._started, 1e-9)
        left = f"{(step.total - step.done) / speed:.0f} s left" if speed > 0 else "time left unknown"
        share = step.done / max(step.total, 1)
        print(
            f"{_title(self._what, step.phase)}: {share:.0%}, {file_size(speed)}/s, {left}, {step.item}",
            file=self._stream,
            flush=True,
        )


class BarProgress:
    """One bar with percent, MB/s, time left and the current tensor."""

    def __init__(self, what: str, stream: TextIO) -> None:
        self._what = what
        self._bar = _make_bar(stream)
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> BarProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the bar as it is and the cursor below it."""
        self._bar.stop()

    def update(self, step: Progress) -> None:
        """Move the bar of the step's phase; each phase has one."""
        if step.phase not in self._tasks:
            title = _title(self._what, step.phase)
            self._tasks[step.phase] = self._bar.add_task(title, total=None, tensor="")
        task = self._tasks[step.phase]
        self._bar.update(task, completed=step.done, total=step.total, tensor=step.item)


def _title(what: str, phase: str) -> str:
    """What a phase is called: writing is the job itself."""
    return what if phase == "write" else phase


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
