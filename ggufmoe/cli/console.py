"""Output of all verbs: a console for tables and notes, as wide as the terminal and plain text elsewhere, a status
line that is redrawn, and foreign text made safe to print.

Text from files, models and templates may hold escape sequences, which would set the clipboard, the title or the state
of a terminal. All that a verb prints goes through ``make_console``, ``note``, ``printable`` or ``without_controls``.
"""

from __future__ import annotations

import codecs
import io
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, cast

from ggufmoe.cli.wordwrap import char_cells
from ggufmoe.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.measure import Measurement
    from rich.segment import Segment

_UNLIMITED = 10_000
_MAX_INPUT_CHARS = 64 << 20
"""Above any context; a device such as /dev/zero has no end."""
_LINES = 25
_TYPED_CELLS = 8
_WORD = re.compile(r"\s*\S+")
_PADDING = re.compile(r"[ \t]+(?=\n)")
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but tab and newline, and those that turn the direction of the text around them."""


def make_console(stream: TextIO | None = None, *, markup: bool = False) -> Console:
    """A console for ``stream`` (default: stdout).

    In a file or a pipe lines are not wrapped, unless COLUMNS limits their width, and do not end with spaces.
    """
    from rich.console import Console

    stream = sys.stdout if stream is None else stream
    on_terminal = stream.isatty()
    # rich itself gives 80 columns to a dumb terminal unless it is told a height too, and takes COLUMNS=0 for a width
    columns = terminal_columns(stream) if on_terminal else _columns_given() or _UNLIMITED
    file = stream if on_terminal else cast(TextIO, _Trimmed(stream))
    console = Console(file=file, highlight=False, emoji=False, markup=markup, width=columns, height=_LINES)
    console.push_render_hook(cast(Any, _CleaningHook()))
    return console


def piped_text() -> str:
    """All of stdin without the line break at its end. Raises InputError for more than any prompt has."""
    text = _piped_stream().read(_MAX_INPUT_CHARS + 1)
    if len(text) > _MAX_INPUT_CHARS:
        raise InputError(f"stdin goes on after {_MAX_INPUT_CHARS >> 20} Mi characters, which is no prompt")
    return text.rstrip("\r\n")


def piped_lines() -> Iterator[str]:
    """The lines of stdin. Raises InputError for a line that is longer than any message."""
    stream = _piped_stream()
    # what a host program puts in the place of stdin may be nothing but an iterator
    is_stream = hasattr(stream, "readline")
    for line in iter(lambda: stream.readline(_MAX_INPUT_CHARS + 1), "") if is_stream else stream:
        if len(line) > _MAX_INPUT_CHARS:
            raise InputError(f"a line of stdin goes on after {_MAX_INPUT_CHARS >> 20} Mi characters: no message does")
        yield line


def _piped_stream() -> TextIO:
    """stdin, read as UTF-16 where it begins with the mark of that, as what Windows PowerShell saves does.

    Waits for the first bytes.
    """
    stream = sys.stdin
    peek = getattr(getattr(stream, "buffer", None), "peek", None)
    if peek is not None and not stream.isatty() and peek(2)[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        cast(io.TextIOWrapper, stream).reconfigure(encoding="utf-16", errors="replace")
    return stream


def note(line: str, indent: int = 0) -> None:
    """Print a line on stderr without control characters.

    A terminal gets it wrapped at words; the lines after the first begin with ``indent`` spaces.
    """
    line = without_controls(line)
    if sys.stderr.isatty():
        line = wrapped(line, terminal_columns(sys.stderr), indent)
    print(line, file=sys.stderr, flush=True)


def wrapped(text: str, columns: int, indent: int = 0) -> str:
    """``text`` broken between words into lines of at most ``columns`` cells; those after the first are indented.

    Only a word that is longer than a line makes a longer line.
    """
    lines = []
    for part in text.split("\n"):
        line = ""
        for word in _WORD.findall(part.expandtabs()):
            if line.strip() and cell_width(line + word) > columns:
                lines.append(line)
                line, word = " " * indent, word.lstrip()
            line += word
        lines.append(line)
    return "\n".join(lines)


@contextmanager
def held_warnings() -> Iterator[None]:
    """Hold the library's warnings back until the block ends, where they would break up a table on the terminal."""
    held: list[logging.LogRecord] = []

    def hold(record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        held.append(record)
        return False

    handlers = logging.getLogger("ggufmoe").handlers[:] if sys.stdout.isatty() and sys.stderr.isatty() else []
    for handler in handlers:
        handler.addFilter(hold)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(hold)
        for record in held:
            logging.getLogger(record.name).handle(record)


class StatusLine:
    """One line of a terminal that is redrawn; nothing is written to a stream that is no terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._on_terminal = stream.isatty()
        self._width = 0

    def show(self, text: str) -> None:
        """Replace the line by ``text``, cut to the width of the terminal."""
        if self._on_terminal:
            text = cut_to_cells(printable(text, len(text)), terminal_columns(self._stream) - 1)
            width = cell_width(text)
            self._write("\r" + text + " " * (self._width - width))
            self._width = width

    def clear(self) -> None:
        """Erase the line, and the ^C that a terminal may have written behind it; put the cursor at its beginning."""
        if self._width:
            n_cells = max(self._width, min(self._width + _TYPED_CELLS, terminal_columns(self._stream) - 1))
            self._write("\r" + " " * n_cells + "\r")
            self._width = 0

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def terminal_columns(stream: TextIO) -> int:
    """Width of the terminal that ``stream`` writes to; COLUMNS overrides it, and 80 stands for an unknown one."""
    if given := _columns_given():
        return given
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError, AttributeError):
        return 80


def _columns_given() -> int | None:
    """COLUMNS of the environment, if it is a width: some programs set it to 0."""
    given = os.environ.get("COLUMNS", "")
    return int(given) or None if re.fullmatch("[0-9]{1,5}", given) else None


def cell_width(text: str) -> int:
    """Cells of a terminal that a line of text takes."""
    return sum(map(char_cells, text))


def cut_to_cells(text: str, n_cells: int) -> str:
    """The beginning of ``text`` that fits into ``n_cells``."""
    while text and cell_width(text) > n_cells:
        text = text[:-1]
    return text


def printable(text: str, limit: int = 200) -> str:
    """``text`` in one line of at most ``limit`` characters, without control characters and what cannot be encoded."""
    plain = "".join(char if char.isprintable() else " " if char.isspace() else "\ufffd" for char in text[: limit + 1])
    return plain if len(plain) <= limit else plain[: limit - 1] + "…"


def without_controls(text: str) -> str:
    """``text`` with its lines, but without what would change the state of a terminal or turn text around."""
    return _CONTROLS.sub(lambda found: "" if found[0] == "\r" else "\ufffd", text)


class _CleaningHook:
    """Takes the control characters out of all that a console of rich prints, but not those that rich itself writes."""

    def process_renderables(self, renderables: list[RenderableType]) -> list[RenderableType]:
        return [_Cleaned(renderable) for renderable in renderables]


class _Cleaned:
    def __init__(self, renderable: RenderableType) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        from rich.segment import Segment

        for segment in console.render(self._renderable, options):
            yield segment if segment.control else Segment(without_controls(segment.text), segment.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        from rich.measure import Measurement

        return Measurement.get(console, options, self._renderable)


class _Trimmed:
    """A stream that drops the spaces at the end of lines, with which the cells of a table are padded."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(_PADDING.sub("", text))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
