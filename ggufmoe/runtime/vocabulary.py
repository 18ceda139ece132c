"""The vocabulary of a loaded model: text to tokens and back.

It needs no context, and llama.cpp only reads it, so several threads may use it at once: text is tokenized while a long
prompt is computed and tokens are drawn. Only ``close`` waits for its users. Its methods call llama.cpp in the thread of
the caller: an engine calls them in a thread of its own, in which llama.cpp may give up.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from operator import index
from pathlib import Path
from typing import Any

from ggufmoe.errors import ContextFullError, EngineError, InputError
from ggufmoe.runtime.textpieces import PIECE_CHARS, Piece, SafeBorders, SpecialToken, pieces, special_ends

_NONE = 0
"""LLAMA_VOCAB_TYPE_NONE."""
_SENTENCEPIECE = 1
"""LLAMA_VOCAB_TYPE_SPM."""
_BYTE_PAIRS = 2
"""LLAMA_VOCAB_TYPE_BPE."""
_USER_DEFINED = 1 << 4
"""LLAMA_TOKEN_ATTR_USER_DEFINED: looked for in a text even where special tokens are not."""
_SPECIAL = 1 << 0 | 1 << 3 | _USER_DEFINED
"""LLAMA_TOKEN_ATTR_UNKNOWN, CONTROL and USER_DEFINED."""
_STRIPS_LEFT, _STRIPS_RIGHT = 1 << 7, 1 << 8
"""LLAMA_TOKEN_ATTR_LSTRIP and RSTRIP."""
_STACK_BYTES_PER_CHAR = 512
"""``std::regex`` of GCC takes about 340."""
_USUAL_STACK_BYTES = 8 * 2**20
_LINE = re.compile(r"[^\n]*\s*")
"""A line, with the white space up to the first letter of the next one."""
_BYTE_CHARS = frozenset(map(chr, (*range(33, 127), *range(161, 173), *range(174, 324))))
"""The characters that stand for the 256 bytes in a byte-pair vocabulary (``bytes_to_unicode`` of GPT-2)."""
_SPACES = (" ", "\u2581")
"""SentencePiece writes a space as U+2581."""


class LoadedVocabulary:
    """The vocabulary of ``model`` (a ``llama_model *``), loaded from ``path``; usable until ``close``.

    ``ends`` is the file's ``EOS_TOKEN_IDS``: tokens that end a text besides those that llama.cpp knows.
    """

    def __init__(self, api: Any, model: Any, path: Path, ends: object = ()) -> None:
        self._api = api
        self._path = path
        self._lock = threading.Condition()
        self._users: list[int] = []
        """The threads that are inside ``in_use``, each as often as it is."""
        self._drawn: dict[int, tuple[bytes, bool]] = {}
        self._ends = frozenset(end for end in (ends if isinstance(ends, list) else ()) if type(end) is int)
        self.handle: Any = api.llama_model_get_vocab(model)
        """The ``llama_vocab *``; None after ``close``."""
        self.n_tokens: int = api.llama_vocab_n_tokens(self.handle)
        bos, eos = int(api.llama_vocab_bos(self.handle)), int(api.llama_vocab_eos(self.handle))
        self._bos = None if bos < 0 else bos
        self._eos = None if eos < 0 else eos
        self._adds_bos = self._bos is not None and bool(api.llama_vocab_get_add_bos(self.handle))

    def close(self) -> None:
        """Call this before the model is freed. Waits for calls that are running; later ones raise EngineError."""
        with self._lock:
            self._lock.wait_for(lambda: not self._users)
            self.handle = None

    def end_uses(self) -> None:
        """Count the calling thread as a user no more, because llama.cpp has given up in it."""
        thread = threading.get_ident()
        with self._lock:
            self._users = [user for user in self._users if user != thread]
            self._lock.notify_all()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While the block runs, ``handle`` stays valid: ``close`` waits. Raises EngineError once closed."""
        thread = threading.get_ident()
        with self._lock:
            self._check_open()
            self._users.append(thread)
        try:
            yield
        finally:
            with self._lock:
                self._users.remove(thread)
                self._lock.notify_all()

    @property
    def bos_token(self) -> int | None:
        self._check_open()
        return self._bos

    @property
    def eos_token(self) -> int | None:
        self._check_open()
        return self._eos

    @property
    def adds_bos(self) -> bool:
        self._check_open()
        return self._adds_bos

    def token_text(self, token: int | None) -> str:
        """A token as the vocabulary spells it (``<s>``); empty for None."""
        if token is None:
            return ""
        with self.in_use():
            self._check_tokenizer()
            self.check_tokens([token])
            return self._text(token)

    def tokenize(
        self,
        text: str,
        *,
        add_bos: bool,
        parse_special: bool,
        n_ctx: int | None = None,
        stack_bytes: int = 0,
        check: Callable[[], None] = lambda: None,
    ) -> list[int]:
        """Token ids of ``text``, as ``Engine.tokenize`` describes them.

        With ``n_ctx``, raises ContextFullError once it is certain that a context of so many tokens cannot hold them.
        ``stack_bytes`` is the stack of the calling thread, 0 for the usual one: InputError for a line that llama.cpp
        might need more for. ``check`` is called between the pieces of a long text; what it raises ends the work.
        """
        if not isinstance(text, str):
            raise TypeError(f"expected a text (str), not {text!r}")
        # on text that is not UTF-8 llama.cpp would abort the process
        text = text.encode("utf-8", "replace").decode()
        with self.in_use():
            self._check_tokenizer()
            begin = self.bos_token if add_bos and self.adds_bos else None
            self._check_spellable(text)
            if n_ctx is not None and len(text) >= n_ctx:
                _check_room(self._least_tokens(text), n_ctx)
            cut = self._cut(text, parse_special, check) if len(text) > PIECE_CHARS else iter([Piece(text, False)])
        tokens = [] if begin is None else [begin]
        for piece in cut:
            check()
            with self.in_use():  # between two pieces it may be closed
                self._check_lines(piece.text, stack_bytes or _USUAL_STACK_BYTES)
                found = self._tokens_of(piece.text, parse_special)
                tokens += found[self._n_prefix(piece.text[0], parse_special) :] if piece.is_inside else found
            if n_ctx is not None and piece.text != text:
                _check_room(len(tokens), n_ctx)
        return tokens

    def _least_tokens(self, text: str) -> int:
        """A lower bound for the number of tokens of ``text``, without tokenizing it; 0 where there is none."""
        kind = self._api.llama_vocab_type(self.handle)
        if kind not in (_SENTENCEPIECE, _BYTE_PAIRS):
            return 0  # one token may stand for a long word
        if kind == _BYTE_PAIRS and not _BYTE_CHARS.issubset(self._texts):
            return 0  # bytes without a token are left out
        if kind == _BYTE_PAIRS or any(special.strips_left or special.strips_right for special in self._specials):
            text = "".join(text.split())  # white space may be left out
        return len(text.encode()) // self._longest_bytes

    @cached_property
    def _longest_bytes(self) -> int:
        """Bytes of text that one token stands for at most."""
        return max(1, *(len(text.replace(*_SPACES).encode()) for text in self._texts))

    def _cut(self, text: str, parse_special: bool, check: Callable[[], None]) -> Iterator[Piece]:
        """The pieces of a long text."""
        if not self._has_plain_specials:
            return iter([Piece(text, False)])
        there = [special for special in self._specials if special.text in text]
        found = [special for special in there if parse_special or special.text in self._user_defined]
        borders = None if self._borders is None else self._borders.pattern(text, there)
        return pieces(text, borders, special_ends(text, found, check))

    def _check_lines(self, text: str, stack_bytes: int) -> None:
        """Raise InputError for a line so long that it could exhaust the stack, which would end the process.

        Most byte-pair vocabularies are split into words by ``std::regex``, which recurses for each character of a match
        (``unicode_regex_split_stl`` of unicode.cpp, commit 0c1e57098). No match goes on behind the end of a line.
        """
        most = stack_bytes // _STACK_BYTES_PER_CHAR
        if len(text) <= most or self._api.llama_vocab_type(self.handle) != _BYTE_PAIRS:
            return
        longest = max(len(line[0]) for line in _LINE.finditer(text))
        if longest > most:
            raise InputError(
                f"a line of {longest} characters is more than llama.cpp's tokenizer can take here, which are {most}: "
                "break the text into lines"
            )

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
    def _attributes(self) -> list[int]:
        """``llama_token_attr`` of every token."""
        return [self._api.llama_vocab_get_attr(self.handle, token) for token in range(self.n_tokens)]

    @cached_property
    def _specials(self) -> list[SpecialToken]:
        """The tokens that llama.cpp looks for in a text before all others."""
        return [
            SpecialToken(text, bool(kind & _STRIPS_LEFT), bool(kind & _STRIPS_RIGHT))
            for text, kind in zip(self._texts, self._attributes, strict=True)
            if kind & _SPECIAL and text
        ]

    @cached_property
    def _user_defined(self) -> frozenset[str]:
        """Those that it looks for even where special tokens are text."""
        return frozenset(text for text, kind in zip(self._texts, self._attributes, strict=True) if kind & _USER_DEFINED)

    @cached_property
    def _has_plain_specials(self) -> bool:
        """Whether all special tokens are UTF-8. Others could end within a character."""
        return not any("\ufffd" in special.text for special in self._specials)

    @cached_property
    def _borders(self) -> SafeBorders | None:
        """Where ordinary text may be cut. Only SentencePiece's tokenizer of llama.cpp takes quadratic time for it."""
        if self._api.llama_vocab_type(self.handle) != _SENTENCEPIECE:
            return None
        return SafeBorders(self._texts)

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token; those of a control token are empty unless ``special``."""
        room = 64
        with self.in_use():
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
        with self._lock:  # a caller may be interrupted here, and would stay among the users
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


def _check_room(n_tokens: int, n_ctx: int) -> None:
    """Raise ContextFullError for a text of at least ``n_tokens``, if a context leaves no room for a single token."""
    if n_tokens >= n_ctx:
        raise ContextFullError(
            f"the text has at least {n_tokens} tokens and the context holds {n_ctx}: "
            "shorten it, or ask for more with --ctx-size"
        )
