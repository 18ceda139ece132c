"""Wrapping of text that is still being written: lines of a terminal are broken between words, never within one."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable

_JOINER = "\u200d"
_TAB_CELLS = 8
_FENCE = "```"


class WordWrap:
    """Wraps text that comes in pieces to ``columns()`` cells, which is asked for every word.

    The last word of a piece is held back until it is known to be whole. A word that is longer than a line is left to
    the terminal. Scripts that write no spaces may be broken after any wide character. Lines between two fences of
    Markdown (```) are program text and are not broken.
    """

    def __init__(self, columns: Callable[[], int]) -> None:
        self._columns = columns
        self._column = 0
        self._spaces = ""
        self._word = ""
        self._line_begin = ""
        self._is_code = False

    def push(self, text: str) -> str:
        """What can be written after ``text`` was added."""
        out = []
        for char in text:
            if char == "\n":
                out.append(self._end_word() + "\n")
                self._is_code ^= self._line_begin.lstrip().startswith(_FENCE)
                self._column, self._spaces, self._line_begin = 0, "", ""
            elif char in " \t":
                out.append(self._end_word())
                self._spaces += char
            else:
                if self._word and _may_break(self._word[-1], char):
                    out.append(self._end_word())
                self._word += char
        return "".join(out)

    def flush(self) -> str:
        """What was still held back, spaces included."""
        word, spaces = self._end_word(), self._spaces
        self._spaces = ""
        return word + spaces

    def _end_word(self) -> str:
        if not self._word:
            return ""
        word, spaces, columns = self._word, self._spaces, max(1, self._columns())
        self._word = self._spaces = ""
        n_spaces = sum(_TAB_CELLS if char == "\t" else 1 for char in spaces)
        n_word = sum(map(char_cells, word))
        if self._column and self._column + n_spaces + n_word > columns and not self._is_code:
            self._column = n_word % columns
            return "\n" + word
        self._column += n_spaces + n_word
        if self._column > columns:  # the terminal has broken the line itself
            self._column %= columns
        if len(self._line_begin) < len(_FENCE):
            self._line_begin += spaces.lstrip() + word
        return spaces + word


def char_cells(char: str) -> int:
    """Cells of a terminal that a character takes."""
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in ("W", "F") else 1


def _may_break(before: str, after: str) -> bool:
    """Whether a line may be broken between two characters without a space between them: beside a wide one."""
    if before == _JOINER or char_cells(after) == 0:
        return False
    return char_cells(before) == 2 or char_cells(after) == 2
