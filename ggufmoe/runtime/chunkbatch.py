"""Several texts in one batch: the native batch, and for chunks which are computed together, and their logits.

Source of the chunks: the arrangement of ``tools/perplexity/perplexity.cpp`` of llama.cpp at the pinned commit,
so that the same products are computed in the same order.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


def batches(n_chunks: int, n_tokens: int, n_seq: int, n_batch: int) -> Iterator[tuple[range, int, int]]:
    """The batches for ``n_chunks`` chunks of ``n_tokens``: the numbers of the chunks in it, first and end position.

    ``n_seq`` chunks are computed together. A chunk of more than ``n_batch`` tokens takes several batches.
    """
    for begin in range(0, n_chunks, n_seq):
        group = range(begin, min(begin + n_seq, n_chunks))
        for position in range(0, n_tokens, n_batch):
            yield group, position, min(position + n_batch, n_tokens)


class TokenBatch:
    """A ``llama_batch`` of tokens with their positions in the sequences that they belong to.

    Logits are computed where ``wanted`` is not 0. All arrays have one element for each token.
    """

    def __init__(
        self,
        api: Any,
        *,
        tokens: NDArray[np.int32],
        positions: NDArray[np.int32],
        sequences: NDArray[np.int32],
        wanted: NDArray[np.int8],
    ) -> None:
        n_tokens = len(tokens)
        n_ids = np.ones(n_tokens, np.int32)
        pointers = np.arange(n_tokens, dtype=np.uintp) * np.uintp(sequences.itemsize) + np.uintp(sequences.ctypes.data)
        self._api = api
        self.n_tokens = n_tokens
        self._alive = (tokens, positions, sequences, wanted, n_ids, pointers)
        self.native = api.llama_batch(
            n_tokens=n_tokens,
            token=_pointer(tokens, ctypes.c_int32),
            pos=_pointer(positions, ctypes.c_int32),
            n_seq_id=_pointer(n_ids, ctypes.c_int32),
            seq_id=_pointer(pointers, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(wanted, ctypes.c_int8),
        )

    def decode(self, context: Any) -> int:
        """Run ``llama_decode`` on the batch and return its status code; 0 is success."""
        return int(self._api.llama_decode(context, self.native))


class StepBatch:
    """A ``llama_batch`` whose memory is used for one batch after another: nothing is made between two tokens.

    It holds up to ``capacity`` tokens: ``add`` them, then ``decode``, which leaves it empty.
    """

    def __init__(self, api: Any, capacity: int) -> None:
        self._api = api
        self._tokens, self._positions, self._sequences = (np.zeros(capacity, np.int32) for _ in range(3))
        self._wanted: NDArray[np.int8] = np.zeros(capacity, np.int8)
        n_ids, place = np.ones(capacity, np.int32), self._sequences.ctypes.data
        pointers = np.arange(capacity, dtype=np.uintp) * np.uintp(self._sequences.itemsize) + np.uintp(place)
        self._alive = (n_ids, pointers)
        self._native = api.llama_batch(
            n_tokens=0,
            token=_pointer(self._tokens, ctypes.c_int32),
            pos=_pointer(self._positions, ctypes.c_int32),
            n_seq_id=_pointer(n_ids, ctypes.c_int32),
            seq_id=_pointer(pointers, ctypes.POINTER(ctypes.c_int32)),
            logits=_pointer(self._wanted, ctypes.c_int8),
        )

    def __len__(self) -> int:
        return int(self._native.n_tokens)

    @property
    def wanted(self) -> NDArray[np.int8]:
        """For each token, whether logits are computed after it: 0 or 1."""
        return np.array(self._wanted[: len(self)])

    def add(self, tokens: Sequence[int], position: int, sequence: int, *, wants_logits: bool) -> None:
        """Add ``tokens`` of ``sequence``, the first at ``position``; logits are computed after the last if wanted."""
        begin, n = len(self), len(tokens)
        end = begin + n
        if n == 1:  # the token of an answer: slices take several times as long
            self._tokens[begin], self._positions[begin], self._sequences[begin] = tokens[0], position, sequence
        else:
            self._tokens[begin:end] = tokens
            self._positions[begin:end] = range(position, position + n)
            self._sequences[begin:end] = sequence
            self._wanted[begin:end] = 0
        self._wanted[end - 1] = wants_logits
        self._native.n_tokens = end

    def decode(self, context: Any) -> int:
        """Run ``llama_decode`` on the batch and return its status code; 0 is success."""
        status = int(self._api.llama_decode(context, self._native))
        self._native.n_tokens = 0
        return status


class SideBySide(TokenBatch):
    """A batch in which each of ``pieces`` continues a sequence of its own at position ``begin``.

    Logits are wanted from position ``first`` on.
    """

    def __init__(self, api: Any, pieces: Sequence[Sequence[int]], begin: int, first: int) -> None:
        positions = np.concatenate([np.arange(begin, begin + len(piece), dtype=np.int32) for piece in pieces])
        self.begin = begin
        super().__init__(
            api,
            tokens=np.concatenate([np.asarray(piece, np.int32) for piece in pieces]),
            positions=positions,
            sequences=np.repeat(np.arange(len(pieces), dtype=np.int32), [len(piece) for piece in pieces]),
            wanted=(positions >= first).astype(np.int8),
        )


def _pointer(array: NDArray[Any], type: Any) -> Any:
    return array.ctypes.data_as(ctypes.POINTER(type))


@dataclass(frozen=True)
class ComputedPart:
    """The batch that was computed last: positions ``begin`` to ``end`` of the chunks ``group``."""

    group: range
    begin: int
    end: int
    first: int
    """Logits were computed from this position on."""
    rows: Callable[[int, int], NDArray[np.float32]]
    """``rows(at, n)`` gives ``n`` rows of logits; the rows of the chunks stand one after another."""

    @property
    def scored(self) -> range:
        """Positions of this batch that have logits."""
        return range(max(self.begin, self.first), max(self.end, self.first))

    def logits(self, chunk: int) -> NDArray[np.float32]:
        """The logits of chunk number ``chunk``: float32, (positions in ``scored``, n_vocab).

        Raises EngineError once something else has been computed.
        """
        n = len(self.scored)
        return self.rows(self.group.index(chunk) * n, n)
