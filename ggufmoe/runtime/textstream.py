"""Text from the bytes of tokens: only whole characters, and nothing of a stop string."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


def stop_strings(given: str | Sequence[str]) -> tuple[str, ...]:
    """Stop strings as a tuple: a single string is one of them, not a sequence of characters."""
    return (given,) if isinstance(given, str) else tuple(given)


class TextStream:
    """Decodes UTF-8 token by token, and looks for stop strings, which may span tokens."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self._bytes = b""
        self._stop = tuple(word for word in stop if word)
        self._held = ""
        self.stopped = False
        """Whether a stop string was found; all later text is dropped."""

    def push(self, piece: bytes) -> str:
        """Add a token's bytes; the text that is certain by now, which may be empty or more than this token's."""
        text = self._decoded(piece)
        return self._release(text) if self._stop else text

    def flush(self) -> str:
        """The text that was still held back; bytes that are no whole character give U+FFFD."""
        text = self._release(self._decoded(b"", final=True))
        held, self._held = self._held, ""
        return text + ("" if self.stopped else held)

    def _decoded(self, piece: bytes, *, final: bool = False) -> str:
        # faster than codecs.getincrementaldecoder, which takes several Python calls
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
        n_held = max((overlap(text, word) for word in self._stop), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def overlap(text: str, word: str) -> int:
    """Length of the longest suffix of ``text`` that is a prefix of ``word``, but not all of it."""
    return next(n for n in range(min(len(text), len(word) - 1), -1, -1) if text.endswith(word[:n]))
