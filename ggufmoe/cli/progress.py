"""Progress of a long job: one line at the bottom of a terminal, redrawn in place and erased at the end.

Every verb shows its progress here. Nothing is written where stderr is not a terminal. The line never gets longer than
the terminal is wide: what does not fit whole is left out, the least important first.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from ggufmoe.cli.console import StatusLine, cell_width, printable, terminal_columns
from ggufmoe.sizes import file_size
from ggufmoe.work import Progress

_REDRAW_S = 0.5
_MIN_INTERVAL_S = 0.1
"""Reports of one phase that come faster are not drawn."""
_MIN_ELAPSED_S, _MIN_SHARE, _LONG_ELAPSED_S = 2.0, 0.02, 15.0
"""Time left is estimated after the first of these and this share of the work, or after the last of these."""


def progress_display(
    what: str, *, phase: str = "write", quiet: bool = False, stream: TextIO | None = None
) -> ProgressLine:
    """A progress display: a context manager that draws each ``Progress`` report passed to ``update``.

    It draws on ``stream``, stderr by default; with ``quiet`` it draws nothing. The main phase ``phase`` is shown as
    ``what``, other phases under their own names.
    """
    return ProgressLine(what, stream, phase=phase, quiet=quiet)


def chunk_display(what: str, describe: Callable[[Any], str], *, at_once: int, quiet: bool) -> ProgressLine:
    """The display of an evaluation on stderr; ``describe`` puts the result so far into words.

    ``at_once`` chunks are computed together, and are reported one after another when that is done.
    """
    return ProgressLine(what, phase="chunks", quiet=quiet, describe=describe, at_once=at_once)


class ProgressLine:
    """Shows reports between ``__enter__`` and ``__exit__``; the line appears at once, before the first report.

    A thread redraws it twice a second, so that seconds pass while nothing is reported; without ``ticking`` it is drawn
    in ``update`` only. ``waiting`` says what is done while nothing is reported. Log records of the library take the
    place of the line, which is drawn again below them.
    """

    def __init__(
        self,
        what: str,
        stream: TextIO | None = None,
        *,
        phase: str,
        quiet: bool = False,
        describe: Callable[[Any], str] | None = None,
        at_once: int = 1,
        waiting: str = "preparing",
        ticking: bool = True,
    ) -> None:
        self._waiting = waiting
        self._what, self._main_phase, self._describe, self._at_once = what, phase, describe, at_once
        self._stream = sys.stderr if stream is None else stream
        self._is_shown = self._stream.isatty() and not quiet
        self._ticking = ticking
        self._line = StatusLine(self._stream)
        self._lock = threading.RLock()
        self._ended = threading.Event()
        self._ticker: threading.Thread | None = None
        self._progress: Progress | None = None
        self._waiting_since = self._drawn = time.monotonic()
        self._pace = Pace(0, self._waiting_since)

    def __enter__(self) -> ProgressLine:
        if not self._is_shown:
            return self
        self._waiting_since = time.monotonic()
        self._draw()
        for handler in logging.getLogger("ggufmoe").handlers:
            handler.addFilter(self._make_room)
        if self._ticking:
            self._ticker = threading.Thread(target=self._tick, name="ggufmoe-progress", daemon=True)
            self._ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Erase the line."""
        self._ended.set()
        if self._ticker is not None:
            self._ticker.join()
        for handler in logging.getLogger("ggufmoe").handlers:
            handler.removeFilter(self._make_room)
        self._line.clear()

    def update(self, progress: Progress) -> None:
        """Show this report from now on."""
        if not self._is_shown:
            return
        with self._lock:
            now, last = time.monotonic(), self._progress
            done = progress.done
            if progress.unit == "chunks":
                done = min(-(-done // self._at_once) * self._at_once, progress.total)
            if last is None or progress.phase != last.phase:
                # bytes may be there already from an interrupted run; all else begins when the phase before has ended
                is_resumed = progress.unit == "bytes"
                self._pace = Pace(done, now) if is_resumed else Pace(0, self._waiting_since)
            self._pace.report(done, progress.total, now)
            self._progress, self._waiting_since = progress, now
            is_news = last is None or progress.phase != last.phase or progress.done >= progress.total
            if is_news or not self._ticking or now - self._drawn >= _MIN_INTERVAL_S:
                self._draw()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Erase the line within the block, so that other output can use its place."""
        with self._lock:
            self._line.clear()
            yield

    def _tick(self) -> None:
        while not self._ended.wait(_REDRAW_S):
            self._draw()

    def _make_room(self, record: logging.LogRecord) -> bool:
        del record
        with self.hidden():
            return True

    def _draw(self) -> None:
        with self._lock:
            self._drawn = time.monotonic()
            self._line.show(self._text(terminal_columns(self._stream) - 1, self._drawn))

    def _text(self, columns: int, now: float) -> str:
        progress = self._progress
        if progress is None or progress.done >= progress.total:
            is_over = progress is not None and progress.phase == self._main_phase
            return self._waiting_text("finishing" if is_over else self._waiting, columns, now)
        if progress.phase == self._main_phase:
            what = self._what
        else:
            what = f"loading {progress.item}" if progress.phase == "load" else progress.phase
        left = self._pace.left_s(now)
        facts = [] if left is None else [f"{duration(left)} left"]
        if progress.unit == "bytes" and left is not None:
            facts.append(f"{file_size(self._pace.units_per_s or 0)}/s".rjust(9))
        if progress.unit in ("chunks", "runs"):
            total = f"{progress.total:.0f}"
            counter = f"{progress.done:{len(total)}.0f}/{total}"
            if self._describe is not None and progress.result is not None:
                facts.append(self._describe(progress.result))
        else:
            counter = f"{progress.done / progress.total:4.0%}"
        if progress.phase != "load" and progress.item:
            facts.append(progress.item)
        return progress_text(what, progress.done / progress.total, [counter, *facts], columns, self._stream)

    def _waiting_text(self, doing: str, columns: int, now: float) -> str:
        waited_s = now - self._waiting_since
        seconds = f", {duration(waited_s)}" if waited_s >= 1 else ""
        doing = f"{doing and ': '}{doing}{seconds}"
        return printable(self._what, max(8, columns - len(doing))) + doing


class Pace:
    """Speed and time left of one phase, of which ``done`` units were there at ``now`` (monotonic seconds)."""

    def __init__(self, done: float, now: float) -> None:
        self._first_done, self._begun = done, now
        self._done, self._total, self._reported = done, done, now

    def report(self, done: float, total: float, now: float) -> None:
        """Note that ``done`` of ``total`` units are finished."""
        self._done, self._total, self._reported = done, total, now

    @property
    def units_per_s(self) -> float | None:
        """Mean speed between the beginning and the last report; None if nothing was done."""
        elapsed_s = self._reported - self._begun
        return (self._done - self._first_done) / elapsed_s if elapsed_s > 0 and self._done > self._first_done else None

    def left_s(self, now: float) -> float | None:
        """Seconds until the end as the mean speed has it; None as long as too little is done to say."""
        speed, elapsed_s = self.units_per_s, self._reported - self._begun
        share = (self._done - self._first_done) / max(self._total - self._first_done, 1e-9)
        is_known = elapsed_s >= _MIN_ELAPSED_S and (share >= _MIN_SHARE or elapsed_s >= _LONG_ELAPSED_S)
        if speed is None or not is_known:
            return None
        return max(0.0, (self._total - self._done) / speed - (now - self._reported))


def duration(seconds: float) -> str:
    """``12 s``, ``3 min``, ``2 h 05 min``."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


def progress_text(what: str, share: float, facts: Sequence[str], columns: int, stream: TextIO) -> str:
    """``what``, a bar that is full at a ``share`` of 1, and as many ``facts`` as fit whole, in at most ``columns``.

    The first fact is always there; where the bar does not fit it is left out, and then ``what`` is cut.
    """
    width = 8 if columns < 70 else 16 if columns < 100 else 24
    line = f"{what} {_bar(share, width, stream)} {facts[0]}"
    if cell_width(line) > columns:
        line = f"{printable(what, max(8, columns - len(facts[0]) - 1))} {facts[0]}"
    for fact in facts[1:]:
        longer = f"{line}  {printable(fact, len(fact))}"
        if cell_width(longer) > columns:
            break
        line = longer
    return line


def _bar(share: float, width: int, stream: TextIO) -> str:
    full = min(width, int(share * width + 1e-9))
    try:
        "█░".encode(getattr(stream, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return "#" * full + "." * (width - full)
    return "█" * full + "░" * (width - full)
