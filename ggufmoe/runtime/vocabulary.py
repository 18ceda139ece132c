"""The vocabulary of a loaded model: text to tokens and back.

It needs no context and has a lock of its own, so text can be tokenized while a long prompt is computed.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import index
from pathlib import Path
from typing import Any

from ggufmoe.errors import EngineError, InputError

_NONE = 0
"""LLAMA_VOCAB_TYPE_NONE."""


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
            return bytes(self._api.llama_vocab_get_text(self.handle, token)).decode("utf-8", "replace")

    def tokenize(self, text: str, *, add_bos: bool, parse_special: bool) -> list[int]:
        """Token ids of ``text``, as ``Engine.tokenize`` describes them."""
        if not isinstance(text, str):
            raise TypeError(f"expected a text (str), not {text!r}")
        # on text that is not UTF-8 llama.cpp would abort the process
        data = text.encode("utf-8", "replace")
        room = len(data) + 8
        with self._lock:
            self._check_tokenizer()
            while True:
                buffer = (ctypes.c_int32 * room)()
                n = self._api.llama_tokenize(self.handle, data, len(data), buffer, room, False, parse_special)
                if n >= 0:
                    break
                room = -n
            begin = self.bos_token if add_bos and self.adds_bos else None
        return ([] if begin is None else [begin]) + list(buffer[:n])

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
