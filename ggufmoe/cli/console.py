"""What verbs print on: a console for tables and notes, as wide as the terminal and plain where there is none, and a
line that tells how far something is."""

from __future__ import annotations

import os
import re
import shutil
import sys
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console

_UNLIMITED = 10_000
_PADDING = re.compile(r"[ \t]+(?=\n)")


def make_console(stream: TextIO | None = None, *, markup: bool = False) -> Console:
    """For ``stream``, or stdout. What goes to a file or a pipe is not wrapped, unless COLUMNS says how wide it may be,
    and its lines do not end with spaces."""
    from rich.console import Console

    stream = sys.stdout if stream is None else stream
    if stream.isatty():
        return Console(file=stream, highlight=False, emoji=False, markup=markup)
    width = None if os.environ.get("COLUMNS") else _UNLIMITED
    return Console(file=cast(TextIO, _Trimmed(stream)), highlight=False, emoji=False, markup=markup, width=width)


class StatusLine:
    """One line of a terminal that is written over again and again; nothing is shown anywhere else."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._on_terminal = stream.isatty()
        self._width = 0

    def show(self, text: str) -> None:
        """Put ``text`` in the place of what stands there, as far as it fits."""
        if self._on_terminal:
            text = text[: shutil.get_terminal_size().columns - 1]
            self._write("\r" + text.ljust(self._width))
            self._width = len(text)

    def clear(self) -> None:
        """Leave the line empty, and the cursor at its beginning."""
        if self._width:
            self._write("\r" + " " * self._width + "\r")
            self._width = 0

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class _Trimmed:
    """A stream without the spaces that fill up the cells of a table."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(_PADDING.sub("", text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
