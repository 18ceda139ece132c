"""Files of a reference's log-probabilities, in the format of llama-perplexity's ``--kl-divergence-base``.

The magic word, three int32 (tokens of a chunk, of the vocabulary, chunks), the tokens, and for each scored position the
scale and the least log-probability as float32, followed by one uint16 for each token of the vocabulary. Source:
``tools/perplexity/perplexity.cpp`` of llama.cpp at the pinned commit.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import InputError
from ggufmoe.files import PositionalFile

_MAGIC = b"_logits_"
_HEAD_WORDS = 4
"""uint16 words before those of a row: two float32."""
_MAX_RANGE = np.float32(16)
"""Logits are clamped to this far below the largest; probabilities up to exp(-16) count as 0."""
_STEPS = np.float32(65535)
Floats = NDArray[np.float32]


class RoundedRows:
    """Log-probabilities in 65536 levels over the range of each row."""

    def __init__(self, levels: NDArray[np.uint16], scale: Floats, least: Floats) -> None:
        """``levels`` (rows, n_vocab) uint16; ``scale`` and ``least`` (rows, 1) float32."""
        self.levels, self.scale, self.least = levels, scale, least

    @classmethod
    def of(cls, logits: Floats) -> RoundedRows:
        """Round rows of logits (rows, n_vocab)."""
        highest = logits.max(axis=1, keepdims=True)
        lowest = np.maximum(logits.min(axis=1, keepdims=True), highest - _MAX_RANGE)
        total = np.exp(logits - highest).sum(axis=1, keepdims=True, dtype=np.float64)
        least = lowest - highest - np.log(total).astype(np.float32)
        scale = (highest - lowest) / _STEPS
        inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
        levels = np.rint(np.maximum(logits - lowest, 0) * inverse).astype(np.uint16)
        return cls(levels, scale, least)

    @property
    def log_p(self) -> Floats:
        """The log-probabilities, (rows, n_vocab) float32."""
        log_p: Floats = self.levels * self.scale + self.least
        return log_p

    @property
    def probabilities(self) -> Floats:
        """The probabilities, (rows, n_vocab) float32; 0 where they are least."""
        log_p = self.log_p
        return np.where(log_p > -_MAX_RANGE, np.exp(log_p), np.float32(0))

    def words(self) -> NDArray[np.uint16]:
        """The rows as the file stores them, (rows, words) uint16."""
        n_rows, n_vocab = self.levels.shape
        words = np.zeros((n_rows, _row_words(n_vocab)), "<u2")
        words[:, :_HEAD_WORDS] = np.hstack([self.scale, self.least]).astype("<f4").view("<u2")
        words[:, _HEAD_WORDS : _HEAD_WORDS + n_vocab] = self.levels
        return words


def _row_words(n_vocab: int) -> int:
    return 2 * ((n_vocab + 1) // 2) + _HEAD_WORDS


def write_head(file: BinaryIO, chunks: Sequence[Sequence[int]], n_vocab: int) -> None:
    """Write all that stands before the rows, which follow in the order of chunks and positions."""
    file.write(_MAGIC + np.array([len(chunks[0]), n_vocab, len(chunks)], "<i4").tobytes())
    file.write(np.array(chunks, "<i4").tobytes())


class LogitsFile:
    """A file that is open for reading. Raises InputError if it is none, or cut short."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = PositionalFile(path, InputError)
        head = self._words(0, 20)
        if head[:8] != _MAGIC:
            raise InputError(f"{path}: holds no log-probabilities; give another name, or delete it")
        numbers: list[int] = np.frombuffer(head[8:], "<i4").tolist()
        self.n_ctx, self.n_vocab, self.n_chunks = numbers
        self._rows_at = 20 + 4 * self.n_ctx * self.n_chunks
        expected = self._rows_at + self.n_chunks * self._chunk_rows * self._row_bytes
        n_bytes = os.stat(path).st_size
        if min(self.n_ctx, self.n_vocab, self.n_chunks) < 1 or n_bytes != expected:
            raise InputError(f"{path}: has {n_bytes:,} bytes, expected {expected:,}; delete it to make it again")

    @property
    def _chunk_rows(self) -> int:
        """Scored positions of a chunk."""
        return self.n_ctx - 1 - self.n_ctx // 2

    @property
    def _row_bytes(self) -> int:
        return 2 * _row_words(self.n_vocab)

    def check(self, chunks: Sequence[Sequence[int]], *, begins: int) -> None:
        """Raise InputError unless the file is of these chunks; their first ``begins`` tokens may differ.

        llama-perplexity stores the text's tokens, in whose place it computes with BOS.
        """
        stored = np.frombuffer(self._words(20, self._rows_at - 20), "<i4").reshape(self.n_chunks, self.n_ctx)
        wanted = np.array(chunks, np.int32)
        if stored.shape[1] != wanted.shape[1] or len(stored) < len(wanted):
            raise InputError(
                f"{self.path}: has {self.n_chunks} chunks of {self.n_ctx} tokens, expected {len(chunks)} of "
                f"{wanted.shape[1]}; give the same text and options, or another file"
            )
        if (stored[: len(wanted), begins:] != wanted[:, begins:]).any():
            raise InputError(f"{self.path}: is of another text or vocabulary; give another file")

    def rows(self, chunk: int, start: int, stop: int) -> RoundedRows:
        """Scored positions [start, stop) of a chunk, counted from its first scored one."""
        at = self._rows_at + (chunk * self._chunk_rows + start) * self._row_bytes
        raw = np.frombuffer(self._words(at, (stop - start) * self._row_bytes), "<u2").reshape(stop - start, -1)
        heads = np.ascontiguousarray(raw[:, :_HEAD_WORDS]).view("<f4")
        return RoundedRows(raw[:, _HEAD_WORDS : _HEAD_WORDS + self.n_vocab], heads[:, :1], heads[:, 1:])

    def _words(self, offset: int, n_bytes: int) -> bytes:
        buffer = bytearray(n_bytes)
        self._file.read_into(offset, memoryview(buffer))
        return bytes(buffer)
