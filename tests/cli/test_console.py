"""What is printed to people: harmless, and wrapped at words."""

from __future__ import annotations

import io
import logging
import re
import sys

import pytest

from ggufmoe.cli.console import (
    StatusLine,
    cut_to_cells,
    held_warnings,
    make_console,
    note,
    terminal_columns,
    without_controls,
    wrapped,
)

HOSTILE = "a\x1b]52;c;cm0=\x07b\rc\x1bcd\x9b2Je\u202ef\x00"


class Screen(io.StringIO):
    """A terminal."""

    def isatty(self) -> bool:
        return True


def noted(monkeypatch: pytest.MonkeyPatch, *lines: str, indent: int = 0) -> str:
    """What notes look like in a terminal of 20 columns."""
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "20")
    for line in lines:
        note(line, indent)
    return screen.getvalue()


def test_text_keeps_its_lines_and_all_visible_characters() -> None:
    text = "héllo\tworld\n日本 \U0001f469\u200d\U0001f4bb\n"
    assert without_controls(text) == text
    assert without_controls("one\r\ntwo") == "one\ntwo"


def test_no_control_character_is_left() -> None:
    assert without_controls(HOSTILE) == "a\ufffd]52;c;cm0=\ufffdbc\ufffdcd\ufffd2Je\ufffdf\ufffd"


def test_notes_are_wrapped_at_words_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = noted(monkeypatch, "/set [NAME]  one two three four", "x" * 30 + " y", indent=1)
    assert shown == "/set [NAME]  one two\n three four\n" + "x" * 30 + "\n y\n"


def test_text_is_wrapped_by_the_cells_that_it_takes() -> None:
    assert wrapped("日本 語 ab", 6) == "日本\n語 ab"
    assert wrapped("日本 語 ab", 7) == "日本 語\nab"
    assert wrapped("  a\tb llama-quantize\n\nc  ", 12, 2) == "  a     b\n  llama-quantize\n\nc"


def test_notes_in_a_pipe_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    note("one two three four five six")
    assert capsys.readouterr().err == "one two three four five six\n"


def test_a_note_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = noted(monkeypatch, HOSTILE)
    assert shown.startswith("a")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown)


@pytest.mark.parametrize("kind", [io.StringIO, Screen])
def test_tables_are_harmless_and_keep_their_colours(kind: type[io.StringIO], monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.table import Table
    from rich.text import Text

    monkeypatch.setenv("TERM", "xterm-256color")
    stream = kind()
    console = make_console(stream)
    table = Table(title=HOSTILE)
    table.add_column(HOSTILE)
    table.add_row(Text(HOSTILE, "red"))
    console.print(table)
    console.print(HOSTILE, style="bold", soft_wrap=True)
    written = stream.getvalue()
    coloured = re.findall("\x1b\\[[0-9;]*m", written)
    assert bool(coloured) == stream.isatty()
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", re.sub("\x1b\\[[0-9;]*m", "", written))


@pytest.mark.parametrize("term", ["dumb", "unknown", "xterm-256color"])
@pytest.mark.parametrize("columns", [40, 60, 120])
def test_every_terminal_has_its_own_width(term: str, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.setenv("COLUMNS", str(columns))
    screen = Screen()
    make_console(screen).print("word " * 99)
    lines = screen.getvalue().splitlines()
    assert columns - 5 < max(len(line.rstrip()) for line in lines) <= columns


@pytest.mark.parametrize("given", ["", "0", "-5", "x", "9" * 5000, "\u0664\u0662"])
def test_an_odd_width_is_no_width(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", given)
    for term in ("dumb", "xterm-256color"):
        monkeypatch.setenv("TERM", term)
        screen = Screen()
        assert make_console(screen).width == terminal_columns(screen) == 80
    line = StatusLine(screen)
    line.show("x" * 100)
    assert screen.getvalue() == "\r" + "x" * 79
    assert cut_to_cells("xyz", -1) == ""
    assert make_console(io.StringIO()).width == 10_000


def test_a_cleared_line_takes_along_what_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    for text, erased in (("busy", 12), ("x" * 15, 19), ("x" * 30, 19)):
        screen = Screen()
        line = StatusLine(screen)
        line.show(text)
        line.clear()
        assert screen.getvalue() == f"\r{text[:19]}\r{' ' * erased}\r"


def test_warnings_wait_until_a_table_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen()
    handler = logging.StreamHandler(screen)
    monkeypatch.setattr(logging.getLogger("ggufmoe"), "handlers", [handler])
    for streams in ((screen, screen), (screen, io.StringIO())):
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        with held_warnings():
            logging.getLogger("ggufmoe.x").warning("mind this")
            logging.getLogger("ggufmoe.x").info("not this")
            screen.write("row\n")
    assert screen.getvalue() == "row\nmind this\nmind this\nrow\n"
    assert handler.filters == []


def test_a_status_line_is_harmless() -> None:
    screen = Screen()
    StatusLine(screen).show("x\x1bcy\rz")
    assert screen.getvalue() == "\rx\ufffdcy z"
