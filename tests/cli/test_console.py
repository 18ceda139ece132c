"""What is printed to people: harmless, and wrapped at words."""

from __future__ import annotations

import io
import re
import sys

import pytest

from ggufmoe.cli.console import StatusLine, make_console, note, without_controls

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


def test_a_status_line_is_harmless() -> None:
    screen = Screen()
    StatusLine(screen).show("x\x1bcy\rz")
    assert screen.getvalue() == "\rx\ufffdcy z"
