"""From the bytes of tokens to text that may be shown: whole characters, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


def stop_strings(given: str | Sequence[str]) -> tuple[str, ...]:
    """One text is one stop string, not its letters."""
    return (given,) if isinstance(given, str) else tuple(given)


class TextStream:
    """Decodes UTF-8 as it comes in and watches for stop strings, which may span tokens."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._bytes = b""
        self._stop = tuple(word for word in stop if word)
        self._held = ""
        self.stopped = False
        """Whether a stop string has come; nothing more is given out then."""

    def push(self, piece: bytes) -> str:
        """Take a token's bytes, give the text that is certain by now (often that token's, sometimes none)."""
        text = self._decoded(piece)
        return self._release(text) if self._stop else text

    def flush(self) -> str:
        """What is held back at the end; bytes that never became a character give U+FFFD."""
        text = self._release(self._decoded(b"", final=True))
        held, self._held = self._held, ""
        return text + ("" if self.stopped else held)

    def _decoded(self, piece: bytes, *, final: bool = False) -> str:
        # what codecs.getincrementaldecoder does in several calls of Python
        data = self._bytes + piece
        text, n_used = codecs.utf_8_decode(data, "replace", final)
        self._bytes = data[n_used:]
        return text

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        ends = [found for word in self._stop if (found := text.find(word)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        n_held = max((_overlap(text, word) for word in self._stop), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _overlap(text: str, word: str) -> int:
    """Length of the longest end of ``text`` with which ``word`` begins."""
    return next(n for n in range(min(len(text), len(word) - 1), -1, -1) if text.endswith(word[:n]))
