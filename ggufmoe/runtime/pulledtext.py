"""Text that comes in pieces, read as if it were all there.

The methods of ``PulledText`` are generators: they yield where more text is needed, and are resumed when it has come. A
reader of a format calls them with ``yield from`` and is written as if nothing were cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from typing import TypeVar

from ggufmoe.runtime.textstream import overlap

ResultT = TypeVar("ResultT")
Pull = Generator[None, None, ResultT]
"""A step of reading that may have to wait, and its result."""


class PulledText:
    """What has come and was not read yet. ``ended`` is set when no more comes: no method waits from then on."""

    def __init__(self) -> None:
        self.ended = False
        self._text = ""
        self._recorded: str | None = None

    def add(self, text: str) -> None:
        """Add what came."""
        self._text += text

    def record(self) -> None:
        """Remember all that is read from here on, for ``recorded``."""
        self._recorded = ""

    def recorded(self) -> str:
        """What was read since ``record``; ends the recording."""
        recorded, self._recorded = self._recorded or "", None
        return recorded

    def put_back(self, text: str) -> None:
        """Have ``text`` read again."""
        self._text = text + self._text

    def read(self, n: int | None = None) -> str:
        """The next ``n`` characters, or all that have come."""
        n = len(self._text) if n is None else n
        taken, self._text = self._text[:n], self._text[n:]
        if self._recorded is not None:
            self._recorded += taken
        return taken

    def skip_space(self) -> Pull[None]:
        """Read the white space that comes next."""
        while True:
            self.read(len(self._text) - len(self._text.lstrip()))
            if self._text or self.ended:
                return
            yield

    def take(self, *words: str) -> Pull[str]:
        """Read the longest of ``words`` that comes next; empty if none does."""
        while True:
            may_come = any(len(word) > len(self._text) and word.startswith(self._text) for word in words)
            if self.ended or not may_come:
                found = max((word for word in words if self._text.startswith(word)), key=len, default="")
                return self.read(len(found))
            yield

    def starts(self, char: str) -> Pull[bool]:
        """Whether ``char`` comes next; nothing is read."""
        while not self._text and not self.ended:
            yield
        return self._text.startswith(char)

    def until(self, words: tuple[str, ...], put: Callable[[str], object], *, keep: bool = False) -> Pull[str]:
        """Pass text on to ``put`` until one of ``words`` comes; that word, which is read too unless ``keep``.

        Empty where the text ends before one comes: then all of it was passed on.
        """
        while True:
            found = [(at, word) for word in words if (at := self._text.find(word)) >= 0]
            if found:
                at, word = min(found, key=lambda one: (one[0], -len(one[1])))
                if at:
                    put(self.read(at))
                return word if keep else self.read(len(word))
            n_held = 0 if self.ended else max(overlap(self._text, word) for word in words)
            if len(self._text) > n_held:
                put(self.read(len(self._text) - n_held))
            if self.ended:
                return ""
            yield

    def matching(self, pattern: re.Pattern[str]) -> Pull[str]:
        """Read the characters that come next as long as ``pattern`` matches them one by one."""
        read = ""
        while True:
            n = next((n for n, char in enumerate(self._text) if not pattern.fullmatch(char)), len(self._text))
            is_whole = n < len(self._text)
            read += self.read(n)
            if is_whole or self.ended:
                return read
            yield

    def json_value(self, put: Callable[[str], object]) -> Pull[bool]:
        """Pass the JSON value that comes next on to ``put`` as it comes; False where the text ends within it.

        Only brackets and quotation marks are looked at: whether it is right JSON inside them is not checked.
        """
        depth, in_text, escaped = 0, False, False
        while True:
            for n, char in enumerate(self._text):
                ends_before = ends_behind = False
                if in_text:
                    in_text = escaped or char != '"'
                    escaped = char == "\\" and not escaped
                    ends_behind = not in_text and not depth
                elif char == '"':
                    in_text = True
                elif char in "[{":
                    depth += 1
                elif char in "]}":
                    depth -= 1
                    ends_before, ends_behind = depth < 0, depth == 0
                else:
                    ends_before = not depth and (char.isspace() or char in ",<")
                if ends_before or ends_behind:
                    put(self.read(n if ends_before else n + 1))
                    return True
            if self._text:
                put(self.read())
            if self.ended:
                return False
            yield
