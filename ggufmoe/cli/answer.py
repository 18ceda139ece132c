"""How an answer is written while it comes: its text on stdout, and the model's reasoning beside it."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator

from ggufmoe.cli.console import StatusLine, make_console, note, without_controls
from ggufmoe.cli.wordwrap import WordWrap
from ggufmoe.runtime.events import ChatEvent, Finished, Reasoning, ToolCallBegun

_DIM, _NOT_DIM = "\x1b[2m", "\x1b[22m"
_STATUS_S = 0.5


def write_answer(events: Iterator[ChatEvent], before: str = "", *, show_reasoning: bool | None = None) -> Finished:
    """Write ``before`` and the text of ``events`` to stdout as it comes, and end the line; return the last event.

    A terminal gets the text wrapped at words and without control characters, and reasoning dimmed in front of it
    (between two headings where it cannot be dimmed); a file or a pipe gets the text as the model wrote it.
    ``show_reasoning`` False leaves reasoning out; True has it written to stderr where stdout is no terminal.
    """
    writer = _Writer(show_reasoning)
    last: ChatEvent | None = None
    try:
        if before:
            writer.write(before)
        for event in events:
            if isinstance(event, Reasoning):
                writer.write_reasoning(event.reasoning)
            elif event.text:
                writer.write(event.text)
            if isinstance(event, ToolCallBegun):
                writer.tools.append(event.name)
            last = event
    finally:  # an error is printed on a line of its own
        writer.end(has_events=last is not None)
    assert isinstance(last, Finished), "events end with Finished"
    return last


class _Writer:
    """Writes the parts of one answer."""

    def __init__(self, show_reasoning: bool | None) -> None:
        self._on_terminal = sys.stdout.isatty()
        self._shows = self._on_terminal if show_reasoning is None else show_reasoning
        self._wrap = self._new_wrap()
        self._status = StatusLine(sys.stderr)
        self._thinks_since = 0.0
        self._status_at = 0.0
        self._in_reasoning = False
        self._begin = self._end = ""
        self._has_ended_line = False
        self.tools: list[str] = []
        """Names of the tools that the model called, although it was given none."""

    def _new_wrap(self) -> WordWrap | None:
        return WordWrap(lambda: shutil.get_terminal_size().columns) if self._on_terminal else None

    def write(self, text: str) -> None:
        """Write a part of the answer's text."""
        self._status.clear()
        self._thinks_since = 0.0
        self._end_reasoning("\n\n")
        self._put(text)
        self._has_ended_line = text.endswith("\n")

    def write_reasoning(self, text: str) -> None:
        """Write a part of the reasoning, or say on a terminal how long it takes."""
        if not self._shows:
            now = time.monotonic()
            self._thinks_since = self._thinks_since or now
            if now >= self._status_at + _STATUS_S:
                self._status.show(f"thinking, {now - self._thinks_since:.0f} s")
                self._status_at = now
        elif self._on_terminal:
            if not self._in_reasoning:
                console = make_console()
                is_plain = console.is_dumb_terminal or console.legacy_windows
                self._begin, self._end = ("[reasoning]\n", "\n[answer]") if is_plain else (_DIM, _NOT_DIM)
                sys.stdout.write(self._begin)
                self._in_reasoning = True
            self._put(text)
        else:
            sys.stderr.write(without_controls(text) if sys.stderr.isatty() else text)
            sys.stderr.flush()
            self._in_reasoning = True

    def _put(self, text: str) -> None:
        sys.stdout.write(text if self._wrap is None else self._wrap.push(without_controls(text)))
        sys.stdout.flush()

    def _end_reasoning(self, gap: str) -> None:
        """End reasoning that was written; on a terminal ``gap`` comes between it and the answer."""
        if not self._in_reasoning:
            return
        self._in_reasoning = False
        if self._wrap is None:
            sys.stderr.write("\n")
            sys.stderr.flush()
        else:
            end = self._end if gap else self._end.removesuffix("\n[answer]")
            sys.stdout.write(self._wrap.flush() + end + gap)
            self._wrap = self._new_wrap()

    def end(self, *, has_events: bool) -> None:
        """Write what was held back, and end the line."""
        self._status.clear()
        self._end_reasoning("")
        held = self._wrap.flush() if self._wrap else ""
        if has_events or held:
            sys.stdout.write(held if self._has_ended_line else held + "\n")
            sys.stdout.flush()
        for name in self.tools:
            note(f"(the model asks for the tool {name}, which it was not given)")
