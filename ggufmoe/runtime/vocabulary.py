"""The vocabulary of a loaded model: text to tokens and back.

It needs no context and has a lock of its own, so text can be tokenized while a long prompt is computed.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any

from ggufmoe.errors import EngineError, InputError

_NONE = 0
"""LLAMA_VOCAB_TYPE_NONE."""
_SENTENCEPIECE = 1
"""LLAMA_VOCAB_TYPE_SPM."""
_SPECIAL = 1 << 0 | 1 << 3 | 1 << 4
"""LLAMA_TOKEN_ATTR_UNKNOWN, CONTROL and USER_DEFINED."""
_STRIPPING = 1 << 7 | 1 << 8
"""LLAMA_TOKEN_ATTR_LSTRIP and RSTRIP."""


PIECE_CHARS = 4096
"""Longer texts are tokenized in pieces of about so many characters, where that gives the same tokens."""
_SPACES = (" ", "\u2581")
"""SentencePiece writes a space as U+2581."""


class SafeBorders:
    """Where a text can be cut so that its parts have the tokens of the whole: before characters that join no other.

    llama.cpp's SentencePiece tokenizer copies all tokens that it has so far for every character that is in no token of
    the vocabulary, so its time is quadratic in their number (``resegment`` of llama-vocab.cpp, commit 0c1e57098).

    ``texts`` are the tokens as the vocabulary spells them, ``special`` those that are looked for first, and whether
    they take the white space beside them.
    """

    def __init__(self, texts: Iterable[str], special: Mapping[str, bool]) -> None:
        joining: set[str] = set().union(*(text[1:] for text in texts))
        self._is_known = bool(joining)
        self._joining = joining.union(_SPACES)
        """Characters that are in a token behind its first place."""
        self._special = special

    def pieces(self, text: str) -> list[str]:
        """The text in pieces, of about PIECE_CHARS or longer where there is no border."""
        there = [special for special in self._special if special in text]
        is_stripping = any(self._special[special] for special in there)
        joining = self._joining.union(special[:1] for special in there)
        alone = [char for char in set(text) - joining if not (is_stripping and char.isspace())]
        if not alone or not self._is_known:
            return [text]
        # llama.cpp puts a space of its own behind a special token, and none in front of one
        no_border = "".join(special[-1:] for special in there) + (" \t\n\v\f\r" if is_stripping else "")
        behind = f"(?<![{re.escape(no_border)}])" if no_border else ""
        border = re.compile(f"{behind}[{re.escape(''.join(alone))}]")
        cuts = [0]
        while (found := border.search(text, cuts[-1] + PIECE_CHARS)) is not None:
            cuts.append(found.start())
        return [text[begin:end] for begin, end in zip(cuts, [*cuts[1:], len(text)], strict=True)]


class LoadedVocabulary:
    """The vocabulary of ``model`` (a ``llama_model *``), loaded from ``path``; usable until ``close``.

    ``ends`` is the file's ``EOS_TOKEN_IDS``: tokens that end a text besides those that llama.cpp knows.
    """

    def __init__(self, api: Any, model: Any, path: Path, ends: object = ()) -> None:
        self._api = api
        self._path = path
        self._lock = threading.RLock()
        self._drawn: dict[int, tuple[bytes, bool]] = {}
        self._ends = frozenset(end for end in (ends if isinstance(ends, list) else ()) if type(end) is int)
        self.handle: Any = api.llama_model_get_vocab(model)
        """The ``llama_vocab *``; None after ``close``."""
        self.n_tokens: int = api.llama_vocab_n_tokens(self.handle)

    def close(self) -> None:
        """Call this before the model is freed. Waits for calls that are running; later ones raise EngineError."""
        with self._lock:
            self.handle = None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While the block runs, ``handle`` stays valid: ``close`` waits. Raises EngineError once closed."""
        with self._lock:
            self._check_open()
            yield

    @property
    def bos_token(self) -> int | None:
        return self._special(self._api.llama_vocab_bos)

    @property
    def eos_token(self) -> int | None:
        return self._special(self._api.llama_vocab_eos)

    @property
    def adds_bos(self) -> bool:
        with self._lock:
            return self.bos_token is not None and bool(self._api.llama_vocab_get_add_bos(self.handle))

    def _special(self, function: Any) -> int | None:
        with self._lock:
            self._check_open()
            token = int(function(self.handle))
        return None if token < 0 else token

    def token_text(self, token: int | None) -> str:
        """A token as the vocabulary spells it (``<s>``); empty for None."""
        if token is None:
            return ""
        with self._lock:
            self.check_tokens([token])
            return self._text(token)

    def tokenize(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        """Token ids of ``text``, as ``Engine.tokenize`` describes them."""
        if not isinstance(text, str):
            raise TypeError(f"expected a text (str), not {text!r}")
        # on text that is not UTF-8 llama.cpp would abort the process
        text = text.encode("utf-8", "replace").decode()
        with self._lock:
            self._check_tokenizer()
            begin = self.bos_token if add_bos and self.adds_bos else None
            tokens = [] if begin is None else [begin]
            self._check_spellable(text)
            pieces = self._borders.pieces(text) if len(text) > PIECE_CHARS else [text]
            for number, piece in enumerate(pieces):  # between two pieces Python notices Ctrl-C
                found = self._tokens_of(piece, parse_special)
                tokens += found[self._n_prefix(piece[0], parse_special) :] if number else found
        return tokens

    def _check_spellable(self, text: str) -> None:
        """Raise InputError for a character that has neither a token nor tokens of its bytes.

        llama.cpp's SentencePiece tokenizer would end the process: ``byte_to_token`` of llama-vocab.cpp looks up tokens
        of bytes that need not be there.
        """
        if self._spelled is None:
            return
        # a space is written in another way, and may be put before the text
        for char in sorted(set(text) - {_SPACES[0]} | {_SPACES[1]}):
            missing = (byte for byte in char.encode() if f"<0x{byte:02X}>" not in self._spelled)
            if char not in self._spelled and any(missing):
                raise InputError(f"{self._path}: the vocabulary has no token for {char!r}, nor for its bytes")

    @cached_property
    def _spelled(self) -> frozenset[str] | None:
        """All tokens of a SentencePiece vocabulary that lacks some bytes; None for others."""
        if self._api.llama_vocab_type(self.handle) != _SENTENCEPIECE:
            return None
        bytes_left = {f"<0x{byte:02X}>" for byte in range(256)}
        for token in range(self.n_tokens):  # nearly all vocabularies have them at the beginning
            bytes_left.discard(self._text(token))
            if not bytes_left:
                return None
        return frozenset(self._texts)

    def _tokens_of(self, text: str, parse_special: bool) -> list[int]:
        data = text.encode()
        room = len(data) + 8
        while True:
            buffer = (ctypes.c_int32 * room)()
            n = self._api.llama_tokenize(self.handle, data, len(data), buffer, room, False, parse_special)
            if n >= 0:
                return list(buffer[:n])
            room = -n

    def _n_prefix(self, char: str, parse_special: bool) -> int:
        """Tokens of the space that llama.cpp puts before a text, where it begins with a character that joins none."""
        once, twice = (len(self._tokens_of(char * n, parse_special)) for n in (1, 2))
        return 2 * once - twice

    @cached_property
    def _texts(self) -> list[str]:
        """Every token as the vocabulary spells it."""
        return [self._text(token) for token in range(self.n_tokens)]

    def _text(self, token: int) -> str:
        return bytes(self._api.llama_vocab_get_text(self.handle, token)).decode("utf-8", "replace")

    @cached_property
    def _borders(self) -> SafeBorders:
        """Where a long text may be cut. Only SentencePiece's tokenizer of llama.cpp takes quadratic time."""
        if self._api.llama_vocab_type(self.handle) != _SENTENCEPIECE:
            return SafeBorders((), {})
        texts = self._texts
        attributes = [self._api.llama_vocab_get_attr(self.handle, token) for token in range(self.n_tokens)]
        tokens = zip(texts, attributes, strict=True)
        return SafeBorders(texts, {text: bool(kind & _STRIPPING) for text, kind in tokens if kind & _SPECIAL})

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token; those of a control token are empty unless ``special``."""
        room = 64
        with self._lock:
            self._check_tokenizer()
            self.check_tokens([token])
            while True:
                buffer = ctypes.create_string_buffer(room)
                n = self._api.llama_token_to_piece(self.handle, token, buffer, room, 0, special)
                if n >= 0:
                    return buffer.raw[:n]
                room = -n

    def ends_text(self, token: int) -> bool:
        """Whether the model ends its text with this token (EOS, or an end of turn)."""
        with self._lock:
            self.check_tokens([token])
            return token in self._ends or bool(self._api.llama_vocab_is_eog(self.handle, token))

    def drawn(self, token: int) -> tuple[bytes, bool]:
        """``piece`` and ``ends_text`` of a generated token, from a cache after the first time."""
        known = self._drawn.get(token)
        if known is None:
            ends = self.ends_text(token)
            known = self._drawn[token] = (b"" if ends else self.piece(token), ends)
        return known

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raise InputError for an id outside the vocabulary, TypeError for anything that is not an integer."""
        self._check_open()
        if isinstance(tokens, (str, bytes)):
            raise TypeError("expected token ids, not text: engine.tokenize(text) gives those of a text")
        for token in tokens:
            if not 0 <= index(token) < self.n_tokens:
                raise InputError(f"{token} is not a token: this model has ids from 0 to {self.n_tokens - 1}")

    def _check_tokenizer(self) -> None:
        # without a tokenizer llama.cpp would abort the process
        self._check_open()
        if self._api.llama_vocab_type(self.handle) == _NONE:
            raise EngineError(f"{self._path}: the file has no tokenizer; convert it again with one")

    def _check_open(self) -> None:
        if not self.handle:
            raise EngineError(f"the engine of {self._path} has been closed")
