"""Long texts in pieces that have the tokens of the whole text, so that tokenizing takes linear time and can be stopped.

llama.cpp's time is quadratic in the number of special tokens that a text spells out: it counts its list of parts from
the beginning for each of them. With SentencePiece it also copies all tokens that it has so far for every character that
is in no token of the vocabulary. Source: ``tokenizer_st_partition`` and ``resegment`` of llama-vocab.cpp (commit
0c1e57098).
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

PIECE_CHARS = 4096
"""A piece has so many characters, or more where the text cannot be cut."""
_SPACES = (" ", "\u2581")
"""SentencePiece writes a space as U+2581."""
_WHITE_SPACE = " \t\n\v\f\r"
"""The white space that a special token may take with it: ``isspace`` in C."""


@dataclass(frozen=True)
class SpecialToken:
    """A token that llama.cpp looks for before all others, and whether it takes the white space beside it."""

    text: str
    strips_left: bool = False
    strips_right: bool = False


@dataclass(frozen=True)
class Piece:
    """A part of a text."""

    text: str
    is_inside: bool
    """Whether ordinary text comes directly before it; otherwise it begins the text or follows a special token."""


class SafeBorders:
    """Where ordinary text can be cut: before characters that join no other.

    ``texts`` are the tokens as the vocabulary spells them, the special ones among them.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        joining: set[str] = set().union(*(text[1:] for text in texts))
        self._is_known = bool(joining)
        self._joining = joining.union(_SPACES)
        """Characters that are in a token behind its first place."""

    def pattern(self, text: str, specials: Iterable[SpecialToken]) -> re.Pattern[str] | None:
        """Matches at the borders of ``text``; None if there are none. ``specials`` are the special tokens in it."""
        there = list(specials)
        is_stripping = any(special.strips_left or special.strips_right for special in there)
        joining = self._joining.union(special.text[:1] for special in there)
        alone = [char for char in set(text) - joining if not (is_stripping and char.isspace())]
        if not alone or not self._is_known:
            return None
        # llama.cpp puts a space of its own behind a special token, and none in front of one
        no_border = "".join(special.text[-1:] for special in there) + (_WHITE_SPACE if is_stripping else "")
        behind = f"(?<![{re.escape(no_border)}])" if no_border else ""
        return re.compile(f"{behind}[{re.escape(''.join(alone))}]")


def special_ends(text: str, specials: Sequence[SpecialToken], check: Callable[[], None]) -> list[int]:
    """The ends of the special tokens that llama.cpp finds in ``text``, with the white space that they take; ascending.

    It looks for the longest token first (in bytes), from left to right in what is left of the text. Empty where two
    tokens of one length may overlap, because which of them it prefers depends on its C++ library. ``check`` is called
    often; what it raises ends the search.
    """
    if not _have_known_order(specials):
        return []
    ends: list[int] = []
    taken = bytearray(len(text))
    for special in sorted(specials, key=lambda special: -len(special.text.encode())):
        at = text.find(special.text)
        while at >= 0:
            check()
            end = at + len(special.text)
            clash = taken.rfind(1, at, end)
            if clash >= 0:
                at = text.find(special.text, clash + 1)
                continue
            while special.strips_left and at > 0 and not taken[at - 1] and text[at - 1] in _WHITE_SPACE:
                at -= 1
            while special.strips_right and end < len(text) and not taken[end] and text[end] in _WHITE_SPACE:
                end += 1
            taken[at:end] = bytes((1,)) * (end - at)
            ends.append(end)
            at = text.find(special.text, end)
    return sorted(ends)


def _have_known_order(specials: Sequence[SpecialToken]) -> bool:
    """Whether no two tokens of one length can overlap in a text."""
    owners: dict[tuple[int, str], set[str]] = {}
    for special in specials:
        n_bytes = len(special.text.encode())
        for n in range(1, len(special.text)):
            owners.setdefault((n_bytes, special.text[:n]), set()).add(special.text)
    return not any(
        owners.get((len(special.text.encode()), special.text[-n:]), set()) - {special.text}
        for special in specials
        for n in range(1, len(special.text))
    )


def pieces(text: str, borders: re.Pattern[str] | None, ends: Sequence[int]) -> Iterator[Piece]:
    """``text`` cut at matches of ``borders`` and at ``ends`` of special tokens."""
    begin, border, is_inside = 0, -1, False
    while begin < len(text):
        least = begin + PIECE_CHARS
        if border < least:
            found = None if borders is None else borders.search(text, least)
            border = len(text) if found is None else found.start()
        nth = bisect_left(ends, least)
        end = ends[nth] if nth < len(ends) else len(text)
        cut = min(border, end)
        yield Piece(text[begin:cut], is_inside)
        begin, is_inside = cut, cut != end
