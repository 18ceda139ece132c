"""The tokens of a vocabulary by id: texts, types and scores, as many as the embedding has rows."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from pathlib import Path

from ggufmoe.checkpoint.tokenizer_files import AddedToken
from ggufmoe.errors import TokenizerError
from ggufmoe.gguf import upstream

_LOG = logging.getLogger("ggufmoe")

SPACE = "\u2581"
"""The character that stands for a space in vocabularies of sentencepiece."""

MAX_TOKEN_CHARS = 1024
"""Longer tokens are refused, to bound the time of checks that split a token at every position."""

UNUSED_SCORE = -10000.0
ADDED_SCORE = -1000.0


class TokenType(IntEnum):
    """Kinds of tokens, numbered as in ``tokenizer.ggml.token_type``."""

    NORMAL = upstream.TokenType.NORMAL
    UNKNOWN = upstream.TokenType.UNKNOWN
    CONTROL = upstream.TokenType.CONTROL
    USER_DEFINED = upstream.TokenType.USER_DEFINED
    UNUSED = upstream.TokenType.UNUSED
    BYTE = upstream.TokenType.BYTE


@dataclass(frozen=True)
class Vocabulary:
    """A vocabulary as llama.cpp describes it: one text and one type for each row of the embedding."""

    model: str
    """``llama`` (sentencepiece's BPE) or ``gpt2`` (BPE with merges)."""
    pre: str
    tokens: tuple[str, ...]
    types: tuple[TokenType, ...]
    scores: tuple[float, ...] | None = None
    merges: tuple[str, ...] = ()
    add_space_prefix: bool | None = None
    """None if llama.cpp's default is right and the tokenizer's configuration does not state it."""
    adds_bos_by_default: bool = False
    """Whether llama.cpp adds BOS before every text if no key says otherwise."""
    fallback_ids: dict[str, int] = field(default_factory=dict)
    """Ids of bos and eos in the tokenizer model, used if no configuration states them."""

    def id_of(self, text: str) -> int | None:
        """The id of the token with this text, or None."""
        return self.tokens.index(text) if text in self.tokens else None


class TokenRows:
    """A vocabulary that is being filled: ``n_vocab`` rows, all of them padding at first."""

    def __init__(self, n_vocab: int, path: Path) -> None:
        self._path = path
        self.texts = [f"[PAD{row}]" for row in range(n_vocab)]
        self.types = [TokenType.UNUSED] * n_vocab
        self.scores = [UNUSED_SCORE] * n_vocab
        self._named: set[int] = set()
        self._dropped: set[str] = set()

    def has(self, id: int) -> bool:
        """Whether the row ``id`` holds a token."""
        return id in self._named

    def put(self, id: int, text: str, type: TokenType, score: float = 0.0) -> None:
        """Set one row. Raises TokenizerError if the embedding has no such row or a GGUF file cannot hold the text."""
        if not 0 <= id < len(self.texts):
            raise TokenizerError(
                f"{self._path}: token {text[:40]!r} has id {id}, but the embedding has only {len(self.texts)} rows; "
                "the tokenizer belongs to another model"
            )
        if len(text) > MAX_TOKEN_CHARS or "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
            raise TokenizerError(
                f"{self._path}: token {id} ({text[:40]!r}) cannot be stored in a GGUF file: "
                f"it holds NUL or half a surrogate pair, or is longer than {MAX_TOKEN_CHARS} characters"
            )
        self.texts[id], self.types[id], self.scores[id] = text, type, score
        self._named.add(id)

    def without_gaps(self, listed: Sequence[AddedToken], others: Iterable[AddedToken] = ()) -> list[AddedToken]:
        """Added tokens of tokenizer.json and tokenizer_config.json with the ids that Hugging Face's library gives them.

        That library numbers added tokens one after another behind the vocabulary, whatever ids the files state, and a
        token of the vocabulary keeps its id there. Where the stated ids leave a gap, or are second ones, they are not
        the ids that the model was trained with, and a warning names the tokens. The ids of ``others`` are not given
        again. Call this after the tokens of the vocabulary have been put.
        """
        first = max(self._named, default=-1) + 1
        behind = sorted((token for token in listed if token.id >= first), key=lambda token: token.id)
        taken = {token.id for token in others if token.id >= first}
        ids = {token.id for token in behind} | taken
        has_gap = ids != set(range(first, first + len(ids)))
        known = {self.texts[row]: row for row in self._named}
        contents = dict.fromkeys(token.content for token in behind)
        if not has_gap and known.keys().isdisjoint(contents):
            return list(listed)
        free = (number for number in itertools.count(first) if number not in taken)
        given = {content: known[content] if content in known else next(free) for content in contents}
        moved = [
            f"{token.content[:40]!r} is {given[token.content]}, not {token.id}"
            for token in {token.content: token for token in behind}.values()
            if token.id != given[token.content]
        ]
        if moved:
            what = "leave a gap; it is closed" if has_gap else "are second ones; the first count"
            _LOG.warning(
                "%s: the ids of added tokens %s, as Hugging Face's tokenizers library does: %s",
                *(self._path, what, ", ".join(moved)),
            )
        return [replace(token, id=given.get(token.content, token.id)) for token in listed]

    def has_row_for(self, token: AddedToken) -> bool:
        """Whether the embedding has a row for an added token. A token past its end is named in a warning, once.

        Fine-tunes often have such a ``[PAD]``, which transformers and llama.cpp's converter take.
        """
        if token.id < len(self.texts):
            return True
        if token.content not in self._dropped:
            self._dropped.add(token.content)
            _LOG.warning(
                "%s: token %r has id %d, past the %d rows of the embedding; it is left out",
                *(self._path, token.content[:40], token.id, len(self.texts)),
            )
        return False

    def put_added(self, token: AddedToken, score: float = ADDED_SCORE) -> None:
        """Set the row of an added token: a control token if it is or looks special, else a user-defined one."""
        if not self.has_row_for(token):
            return
        if token.strips:
            _LOG.warning(
                "%s: token %r strips spaces or matches whole words only; llama.cpp does not support that, "
                "so ids beside it may differ",
                self._path,
                token.content,
            )
        if token.special or looks_special(token.content):
            self.put(token.id, token.content, TokenType.CONTROL, score)
        else:
            self.put(token.id, token.content.replace(SPACE, " "), TokenType.USER_DEFINED, score)

    def put_all_added(self, tokens: Iterable[AddedToken]) -> None:
        """Set the rows of all added tokens. Raises TokenizerError if an id has another token already."""
        for token in self.without_gaps(list(tokens)):
            if self.has(token.id) and self.texts[token.id] != token.content:
                raise TokenizerError(
                    f"{self._path}: token {token.id} is {self.texts[token.id][:40]!r} and also added as "
                    f"{token.content[:40]!r}; the files of the tokenizer do not belong together"
                )
            self.put_added(token)

    def check_unique(self) -> None:
        """Raise TokenizerError if two rows have the same text, because llama.cpp aborts on such a file."""
        seen: dict[str, int] = {}
        for row, text in enumerate(self.texts):
            if text in seen:
                raise TokenizerError(
                    f"{self._path}: tokens {seen[text]} and {row} are both {text[:40]!r}; "
                    "correct added_tokens_decoder in tokenizer_config.json or added_tokens.json"
                )
            seen[text] = row


def looks_special(text: str) -> bool:
    """Whether llama.cpp's converter treats a token of this text as special although it is not marked so."""
    brackets = (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">"))
    return text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]") or any(
        text.startswith(left) and text.endswith(right) for left, right in brackets
    )


def require_bytes(texts: Iterable[str], path: Path) -> None:
    """Raise TokenizerError unless all byte tokens ``<0x00>`` to ``<0xFF>`` exist, because llama.cpp aborts without."""
    missing = {f"<0x{byte:02X}>" for byte in range(256)}.difference(texts)
    if missing:
        raise TokenizerError(
            f"{path}: {len(missing)} of the 256 byte tokens are missing ({min(missing)} first); "
            "llama.cpp needs them to encode characters that the vocabulary lacks"
        )
