"""Wrapping of text that comes in pieces."""

from __future__ import annotations

import random

import pytest

from ggufmoe.cli.wordwrap import WordWrap

PROSE = "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness."


def wrapped(text: str, columns: int, *, seed: int = 0) -> str:
    """``text`` through a wrap of ``columns`` cells, in pieces of random lengths."""
    wrap, pieces, rest = WordWrap(lambda: columns), random.Random(seed), text
    out = ""
    while rest:
        n = pieces.randint(1, 7)
        out += wrap.push(rest[:n])
        rest = rest[n:]
    return out + wrap.flush()


@pytest.mark.parametrize("columns", [20, 33, 60])
@pytest.mark.parametrize("seed", range(5))
def test_lines_end_between_words(columns: int, seed: int) -> None:
    lines = wrapped(PROSE, columns, seed=seed).split("\n")
    assert " ".join(lines) == PROSE
    assert all(len(line) <= columns for line in lines)
    firsts = [line.split()[0] for line in lines[1:]]
    assert all(len(line) + 1 + len(first) > columns for line, first in zip(lines, firsts, strict=False))


@pytest.mark.parametrize("text", ["one\n\n  two\n", "a  b\tc ", " x", "\n", "", "word"])
def test_what_fits_stays_as_it_is(text: str) -> None:
    assert wrapped(text, 40) == text


def test_a_word_is_held_back_until_it_is_whole() -> None:
    wrap = WordWrap(lambda: 10)
    assert [wrap.push(piece) for piece in ("one", " two thr", "ee", " ")] == ["", "one two", "", "\nthree"]


def test_a_word_longer_than_a_line_is_left_to_the_terminal() -> None:
    assert wrapped("a " + "x" * 25 + " bcd ef", 10) == "a\n" + "x" * 25 + " bcd\nef"


def test_wide_characters_take_two_cells_and_may_be_broken_anywhere() -> None:
    assert wrapped("日本語の文章 ok", 7) == "日本語\nの文章\nok"
    assert wrapped("abc日本", 5) == "abc日\n本"


def test_what_is_joined_to_a_character_stays_with_it() -> None:
    family = "\U0001f469\u200d\U0001f4bb"
    assert wrapped(f"abc {family} {family}", 8) == f"abc {family}\n{family}"
    assert wrapped("cafe\u0301 e\u0301te\u0301", 8) == "cafe\u0301 e\u0301te\u0301"


def test_program_text_between_fences_is_not_broken() -> None:
    code = "```python\nprint('a long line that no terminal would show whole')\n```\n"
    assert wrapped(code + PROSE, 30) == code + wrapped(PROSE, 30)


def test_the_width_of_the_moment_counts() -> None:
    columns = 40
    wrap = WordWrap(lambda: columns)
    first = wrap.push("one two three four ")
    columns = 10
    assert first + wrap.push("five six ") == "one two three four\nfive six"
