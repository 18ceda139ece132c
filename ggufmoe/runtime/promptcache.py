"""Texts kept on disk, so that a prompt or a conversation need not be computed again by another process.

Owns a directory of session files (``session``): which texts are worth a file, which one begins a prompt, and which are
deleted when all are larger than they may be. There is no index file and no lock: names say for which model and options
a file is, several processes may write and delete files at any time, and a file that is damaged or gone is none.

``kvcache`` asks and copies in the native thread. Files are read there too; they are written by a thread that lives as
long as there is something to write.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import ContextFullError, InputError, OutputError
from ggufmoe.files import delete
from ggufmoe.gguf.model import ModelHeader
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.runtime.kvcache import WORTH_KEEPING_TOKENS, KeptTexts, SavedState
from ggufmoe.runtime.session import SessionFacts, read_session, read_session_tokens, write_session

MIN_TOKENS = 128
"""Shorter texts are computed again."""
_WORTH_KEEPING_PART = 8
"""A text is written when more than one part in so many is new, and read when as much of it is used. So writing a text
that grows costs at most so many times its final size."""
_MAX_WAITING_BYTES = 512 << 20
"""Copies that wait to be written; beyond that texts are not copied, but for a single one."""
_LEFT_BEHIND_S = 3600
"""A file that nobody has written to for so long was left behind by a process that was killed."""
_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}\.prompt")
_PARTIAL_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{16}\.prompt\.\d+-[0-9a-f]+\.partial")
_logger = logging.getLogger("ggufmoe")

TokenArray = NDArray[np.int32]


@dataclass(frozen=True)
class PromptKind:
    """Which texts an engine can use: those of the same model and options."""

    facts: SessionFacts
    flash_attn: str
    """Without flash attention llama.cpp keeps values in another order."""
    n_seq_max: int
    n_ctx: int
    """Texts have fewer tokens."""
    n_vocab: int
    whole_only: bool
    """Whether a text cannot be cut, because layers have a sliding window or a recurrent state."""

    @property
    def prefix(self) -> str:
        """How the names of their files begin."""
        key = repr((self.facts, self.flash_attn, self.n_seq_max))
        return hashlib.sha256(key.encode()).hexdigest()[:16] + "-"


def open_prompt_cache(
    model: ModelHeader, context: ContextOptions, offload: OffloadOptions, *, n_ctx: int, n_vocab: int
) -> KeptTexts:
    """The texts in the directory of ``context``; one that keeps nothing without a directory or if it cannot be used."""
    directory = context.prompt_cache
    if directory is None:
        return KeptTexts()
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        # llama.cpp trusts the states that it is given
        if os.name == "posix" and directory.stat().st_mode & stat.S_IWOTH:
            raise PermissionError(0, "every user may write there; make a directory of your own")
    except OSError as error:
        _logger.warning("%s: prompts are not kept: %s", directory, error.strerror)
        return KeptTexts()
    kind = PromptKind(
        SessionFacts.of(model, context, offload),
        context.flash_attn,
        context.n_seq_max,
        n_ctx,
        n_vocab,
        whole_only=bool(model.memory.n_windowed or model.memory.n_recurrent),
    )
    return PromptCache(directory.absolute(), context.prompt_cache_size << 20, kind)


@dataclass(frozen=True, eq=False)
class _Copy:
    """A text to be written, and the name of its file."""

    name: str
    text: TokenArray
    state: SavedState


class PromptCache(KeptTexts):
    """The texts of ``kind`` in ``directory``, all files of which may have ``max_bytes``."""

    is_open = True

    def __init__(self, directory: Path, max_bytes: int, kind: PromptKind) -> None:
        self._directory = directory
        self._max_bytes = max_bytes
        self._kind = kind
        self._prefix = kind.prefix
        self._texts: dict[str, TokenArray] = {}
        """By name of their file."""
        self._ignored: set[str] = set()
        """Names of files that cannot be used."""
        self._changed = threading.Condition()
        """Held for moments: the following belongs to two threads."""
        self._waiting: deque[_Copy] = deque()
        """The first one is being written, if there is a thread."""
        self._thread: threading.Thread | None = None
        self._has_failed = False

    # ---- called in the native thread

    def wants(self, tokens: Sequence[int], n_bytes: Callable[[], int]) -> bool:
        """Whether enough of ``tokens`` is new and there is room to copy it. What is not new has been used just now."""
        n = len(tokens)
        if n < MIN_TOKENS or self._has_failed:
            return False
        text = np.array(tokens, np.int32)
        with self._changed:
            waiting = [(self._n_usable(copy.text, text), copy.state.data.nbytes) for copy in self._waiting]
        self._refresh()
        name, n_there = self._best(text)
        if name is not None:
            self._touch(name)
        n_new = n - max(n_there, *(n_usable for n_usable, _ in waiting), 0)
        if n_new < WORTH_KEEPING_TOKENS or n_new * _WORTH_KEEPING_PART < n:
            return False
        size, waiting_bytes = n_bytes(), sum(size for _, size in waiting)
        return size <= self._max_bytes and (not waiting or waiting_bytes + size <= _MAX_WAITING_BYTES)

    def keep(self, state: SavedState) -> None:
        """Have ``state`` written; beginnings of it that are still waiting are left out."""
        text = np.array(state.tokens, np.int32)
        copy = _Copy(self._name(text), text, replace(state, checkpoints=()))
        with self._changed:
            if self._has_writer():
                begun = [self._waiting.popleft()] if self._waiting else []
                left = [other for other in self._waiting if not self._is_replaced(other.text, text)]
                self._waiting = deque([*begun, *left, copy])
                return
        self._write(copy)

    def longest(self, wanted: Sequence[int], at_least: int) -> SavedState | None:
        if at_least > len(wanted):
            return None
        text = np.array(wanted, np.int32)
        self._refresh()
        while True:
            name, n = self._best(text)
            if name is None or n < at_least:
                return None
            state = self._read(name)
            if state is not None:
                return state

    def reject(self, state: SavedState) -> None:
        self._ignore(self._name(np.array(state.tokens, np.int32)), "llama.cpp does not take the state")

    def flush(self) -> None:
        with self._changed:
            while self._thread is not None:
                self._changed.wait()

    # ---- files

    def _name(self, text: TokenArray) -> str:
        return f"{self._prefix}{hashlib.sha256(text.astype('<i4').tobytes()).hexdigest()[:16]}.prompt"

    def _refresh(self) -> None:
        """Learn of files that have come and gone."""
        try:
            names = {name for name in os.listdir(self._directory) if name.startswith(self._prefix) and _is_text(name)}
        except OSError as error:
            _logger.debug("%s: cannot be read: %s", self._directory, error.strerror)
            names = set()
        with self._changed:
            self._texts = {name: text for name, text in self._texts.items() if name in names}
            self._ignored &= names
            new = names - self._texts.keys() - self._ignored
        for name in new:
            try:
                text = read_session_tokens(self._directory / name, self._kind.facts, self._kind.n_ctx)
            except (InputError, ContextFullError) as error:
                self._ignore(name, str(error))
            else:
                with self._changed:
                    self._texts[name] = text

    def _read(self, name: str) -> SavedState | None:
        """The text in a file; None if it cannot be used."""
        try:
            state, _ = read_session(self._directory / name, self._kind.facts, self._kind.n_ctx)
        except (InputError, ContextFullError, MemoryError) as error:
            self._ignore(name, str(error))
            return None
        text = np.array(state.tokens, np.int32)
        if self._name(text) != name or not 0 <= text.min() <= text.max() < self._kind.n_vocab:
            self._ignore(name, f"{name}: the text is another one than its name says")
            return None
        self._touch(name)
        return replace(state, first=len(state.tokens)) if self._kind.whole_only else state

    def _ignore(self, name: str, why: str) -> None:
        _logger.debug("a kept prompt is ignored: %s", why)
        with self._changed:
            self._texts.pop(name, None)
            self._ignored.add(name)

    def _touch(self, name: str) -> None:
        with contextlib.suppress(OSError):
            os.utime(self._directory / name)

    # ---- comparing

    def _best(self, text: TokenArray) -> tuple[str | None, int]:
        """The text that can be used for most of ``text``, the shortest of several, and for how many tokens."""
        with self._changed:
            found = [(self._n_usable(other, text), -len(other), name) for name, other in self._texts.items()]
        n, _, name = max(found, default=(0, 0, ""))
        return (name, n) if n else (None, 0)

    def _n_usable(self, other: TokenArray, text: TokenArray) -> int:
        """Tokens at the beginning of ``text`` for which ``other`` is read; 0 if too few of its tokens are used."""
        n = _common(other, text)
        if self._kind.whole_only:
            return n if n == len(other) else 0
        return n if n * _WORTH_KEEPING_PART >= len(other) else 0

    def _is_replaced(self, old: TokenArray, new: TokenArray) -> bool:
        """Whether ``new`` would be read for all of ``old``."""
        return self._n_usable(new, old) == len(old)

    # ---- writing

    def _has_writer(self) -> bool:
        """Start the thread that writes, unless there is one; false when the interpreter ends and starts none."""
        if self._thread is None:
            thread = threading.Thread(target=self._write_waiting, name="ggufmoe-prompts", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                return False
            self._thread = thread
        return True

    def _write_waiting(self) -> None:
        while True:
            with self._changed:
                if self._has_failed:
                    self._waiting.clear()
                if not self._waiting:
                    self._thread = None
                    self._changed.notify_all()
                    return
                copy = self._waiting[0]
            try:
                self._write(copy)
            except BaseException:  # whatever it is, nobody may wait for this thread
                with self._changed:
                    self._waiting.clear()
                    self._thread, self._has_failed = None, True
                    self._changed.notify_all()
                raise
            with self._changed:
                self._waiting.popleft()
            del copy

    def _write(self, copy: _Copy) -> None:
        """Write a text, and delete its beginnings and as many old texts as exceed the limit."""
        with self._changed:
            replaced = {name for name, old in self._texts.items() if self._is_replaced(old, copy.text)}
        try:
            self._make_room(copy.state.data.nbytes + copy.text.nbytes, replaced | {copy.name})
            write_session(self._directory / copy.name, copy.state, self._kind.facts, "", is_private=True)
            self._delete(replaced - {copy.name})
            self._make_room(0, set())
        except (OutputError, OSError, MemoryError) as error:
            self._has_failed = True
            _logger.warning("%s: no more prompts are kept: %s", self._directory, error)
            return
        with self._changed:
            self._ignored.discard(copy.name)
            self._texts[copy.name] = copy.text

    def _make_room(self, n_bytes: int, replaced: set[str]) -> None:
        """Delete the texts that were not used for longest, until ``n_bytes`` more fit; ``replaced`` will be gone."""
        there = []
        with os.scandir(self._directory) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    found = entry.stat(follow_symlinks=False)
                    if _is_text(entry.name):
                        there.append((found.st_mtime_ns, found.st_size, entry.name))
                    elif _PARTIAL_NAME.fullmatch(entry.name) and time.time() - found.st_mtime > _LEFT_BEHIND_S:
                        self._delete([entry.name])
        excess = n_bytes + sum(size for _, size, name in there if name not in replaced) - self._max_bytes
        for _, size, name in sorted(there):
            if excess <= 0:
                return
            if name not in replaced:
                self._delete([name])
                excess -= size

    def _delete(self, names: Iterable[str]) -> None:
        for name in names:
            with contextlib.suppress(OSError):  # another process has deleted it, or has it open
                delete(self._directory / name)
            with self._changed:
                self._texts.pop(name, None)


def _is_text(name: str) -> bool:
    return _NAME.fullmatch(name) is not None


def _common(a: TokenArray, b: TokenArray) -> int:
    """Length of the longest common prefix."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n
