"""Output of all verbs: a console for tables and notes, as wide as the terminal and plain text elsewhere, a status
line that is redrawn, and text from files made safe to print."""

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
    """A console for ``stream`` (default: stdout).

    In a file or a pipe lines are not wrapped, unless COLUMNS limits their width, and do not end with spaces.
    """
    from rich.console import Console

    stream = sys.stdout if stream is None else stream
    if stream.isatty():
        return Console(file=stream, highlight=False, emoji=False, markup=markup)
    width = None if os.environ.get("COLUMNS") else _UNLIMITED
    return Console(file=cast(TextIO, _Trimmed(stream)), highlight=False, emoji=False, markup=markup, width=width)


class StatusLine:
    """One line of a terminal that is redrawn; nothing is written to a stream that is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._on_terminal = stream.isatty()
        self._width = 0

    def show(self, text: str) -> None:
        """Replace the line by ``text``, cut to the width of the terminal."""
        if self._on_terminal:
            text = text[: shutil.get_terminal_size().columns - 1]
            self._write("\r" + text.ljust(self._width))
            self._width = len(text)

    def clear(self) -> None:
        """Erase the line and put the cursor at its beginning."""
        if self._width:
            self._write("\r" + " " * self._width + "\r")
            self._width = 0

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def printable(text: str, limit: int = 200) -> str:
    """``text`` in one line of at most ``limit`` characters, without control characters and what cannot be encoded."""
    plain = "".join(char if char.isprintable() else " " if char.isspace() else "\ufffd" for char in text[: limit + 1])
    return plain if len(plain) <= limit else plain[: limit - 1] + "…"


class _Trimmed:
    """A stream that drops the spaces at the end of lines, with which the cells of a table are padded."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(_PADDING.sub("", text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
