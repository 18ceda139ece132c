"""The KV cache of one context: which tokens it holds, how it is cut, filled and set aside.

Everything here runs in the engine's native thread. A conversation that has to make room for another one is kept in main
memory, within a limit, so that coming back to it costs a copy and no computing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import ContextFullError, DecodeError, EngineError
from ggufmoe.native import library as native
from ggufmoe.native.log import NativeLog
from ggufmoe.runtime.chunkbatch import SideBySide

ComputedBy = Literal["cpu", "gpu", "worker"]
"""Where a model's layers are: with the CPU alone, on GPUs of this machine, or on a worker too."""

_SEQUENCE = 0
_ABORTED = 2
_NO_ROOM = 1
_WORTH_KEEPING_TOKENS = 16
"""A text of which fewer tokens would be lost is computed again rather than copied."""
_WORTH_KEEPING_PART = 8
"""The same for less than an eighth of it: an answer that is given again must not cost a copy of the conversation."""


@dataclass(frozen=True)
class SavedState:
    """A text, and what llama.cpp keeps of it."""

    tokens: tuple[int, ...]
    data: NDArray[np.uint8]


class SavedStates:
    """Texts set aside, the one used last at the end; at most ``max_bytes`` of them."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._states: list[SavedState] = []

    @property
    def n_bytes(self) -> int:
        return sum(state.data.nbytes for state in self._states)

    def add(self, state: SavedState) -> None:
        """Keep a text; the oldest ones go, and those that it begins like and goes on from."""
        self._states = [old for old in self._states if common_prefix(old.tokens, state.tokens) < len(old.tokens)]
        self._states.append(state)
        while self.n_bytes > self.max_bytes:
            self._states.pop(0)

    def best(self, tokens: Sequence[int]) -> SavedState | None:
        """The text that shares the longest beginning with ``tokens``."""
        return max(self._states, key=lambda state: common_prefix(state.tokens, tokens), default=None)

    def take(self, state: SavedState) -> None:
        """It is in the cache again: forget the copy."""
        self._states = [other for other in self._states if other is not state]

    def clear(self) -> None:
        self._states = []


class KVCache:
    """The cache of ``context`` (a ``llama_context *``), which must outlive it, and computing with it.

    llama.cpp looks at the ``abort_flag`` only where the CPU computes, and comes back from a batch before a worker has
    computed it, so prompts are given to GPUs and workers in smaller parts.
    """

    def __init__(
        self,
        api: Any,
        context: Any,
        n_vocab: int,
        log: NativeLog,
        path: Path,
        saved: SavedStates,
        abort_flag: ctypes.Array[ctypes.c_char],
        computed_by: ComputedBy,
    ) -> None:
        self._api = api
        self._abort_flag = abort_flag
        self._computed_by = computed_by
        self.context = context
        self._n_vocab = n_vocab
        self._log = log
        self._path = path
        self._memory = api.llama_get_memory(context)
        self.saved = saved
        self.tokens: list[int] = []
        """The tokens whose keys and values are there."""
        self.n_ctx: int = api.llama_n_ctx_seq(context)
        """Tokens that a text may have, each of several side by side."""
        self.n_batch: int = api.llama_n_batch(context)
        self._step: int = self.n_batch if computed_by == "cpu" else min(self.n_batch, api.llama_n_ubatch(context))
        """Tokens of a prompt that llama.cpp is given at once."""
        self.given_tokens = 0
        """Tokens of the batch that llama.cpp was given, and may still be computing; 0 once it does something else."""
        self.n_returned = 0
        """How often llama.cpp has come back from a batch."""
        self._shift_pending = False
        """Whether tokens have moved up whose keys llama.cpp will only turn when it computes the next ones."""
        self._chunks_of: object = None
        """Whose chunks it holds, if it does not hold ``tokens``."""
        # as a number: a pointer object, and what it points to, would be made anew for each token
        prototype = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
        self._row_at = prototype(("llama_get_logits_ith", native.library()))
        self._row: NDArray[np.float32] = np.empty(0, np.float32)
        self._row_address = 0
        self._one = (ctypes.c_int32 * 1)()
        self._one_batch = api.llama_batch_get_one(self._one, 1)

    def clear(self) -> None:
        """Empty it, and forget what was set aside."""
        self._empty()
        self.saved.clear()

    def _empty(self) -> None:
        self._api.llama_memory_clear(self._memory, False)
        self.tokens = []
        self._chunks_of = None
        self._shift_pending = False

    # ---- reuse

    def reuse(self, prompt: Sequence[int]) -> int:
        """Make the cache hold as much of the beginning of ``prompt`` as there is, and nothing else; how much that is.

        The last token of the prompt is left out: its logits are not kept, so it is always computed.
        """
        self._leave_token()
        self._leave_chunks()
        wanted = prompt[:-1]
        n = common_prefix(self.tokens, wanted)
        better = self._better(wanted, n)
        lost = len(self.tokens) - n
        if lost >= _WORTH_KEEPING_TOKENS and (better or lost * _WORTH_KEEPING_PART >= len(self.tokens)):
            self.set_aside()
        return self._cut(n) if better is None else self._bring_back(better, wanted)

    def _better(self, wanted: Sequence[int], n: int) -> SavedState | None:
        best = self.saved.best(wanted)
        if best is None or common_prefix(best.tokens, wanted) < n + _WORTH_KEEPING_TOKENS:
            return None
        return best

    def set_aside(self) -> None:
        """Keep a copy of what is in the cache, if it is not larger than all that may be kept."""
        if (
            self.tokens
            and not self._shift_pending
            and self._api.llama_state_seq_get_size(self.context, _SEQUENCE) <= self.saved.max_bytes
        ):
            self.saved.add(self.state())

    def _bring_back(self, state: SavedState, wanted: Sequence[int]) -> int:
        self.saved.take(state)
        self.restore(state)
        return self._cut(common_prefix(self.tokens, wanted))

    def _cut(self, n: int) -> int:
        """Keep the first ``n`` tokens; how many those are, 0 where a model cannot go back by part of a text."""
        if n < len(self.tokens) and not self._api.llama_memory_seq_rm(self._memory, _SEQUENCE, n, -1):
            self._api.llama_memory_clear(self._memory, False)
            n = 0
        self.tokens = self.tokens[:n]
        return n

    def state(self) -> SavedState:
        """A copy of what llama.cpp keeps of the tokens."""
        self._leave_token()
        if self._shift_pending:
            raise EngineError(
                f"{self._path}: the context has just been shifted and cannot be kept before the next token"
            )
        size = self._api.llama_state_seq_get_size(self.context, _SEQUENCE)
        data = np.empty(size, np.uint8)
        n = self._api.llama_state_seq_get_data(self.context, _bytes_at(data), size, _SEQUENCE)
        if n != size:
            raise EngineError(f"{self._path}: llama.cpp gave {n} of {size} bytes of its cache")
        return SavedState(tuple(self.tokens), data)

    def restore(self, state: SavedState) -> None:
        """Put a copy in the place of what is there. Raises EngineError, with the cache empty, if it does not fit."""
        self._leave_token()
        self._empty()
        mark = self._log.mark()
        n = self._api.llama_state_seq_set_data(self.context, _bytes_at(state.data), state.data.nbytes, _SEQUENCE)
        there = self._api.llama_memory_seq_pos_max(self._memory, _SEQUENCE) + 1
        if n != state.data.nbytes or there != len(state.tokens):
            self._api.llama_memory_clear(self._memory, False)
            raise EngineError(f"{self._path}: llama.cpp does not take the state: {self._log.cause_since(mark)}")
        self.tokens = list(state.tokens)

    # ---- computing

    def feed(self, tokens: Sequence[int]) -> bool:
        """Compute ``tokens`` after what is there; False if that was aborted. Raises ContextFullError, DecodeError."""
        self._leave_chunks()
        if len(tokens) == 1:
            self._one[0] = tokens[0]
            return self._decode(self._one_batch, tokens)
        for begin in range(0, len(tokens), self._step):
            part = tokens[begin : begin + self._step]
            ids = (ctypes.c_int32 * len(part))(*part)
            is_stopped = self._computed_by != "cpu" and self._abort_flag[0] != b"\x00"
            if is_stopped or not self._decode(self._api.llama_batch_get_one(ids, len(part)), part):
                return False
            if self._computed_by == "worker":
                self.synchronize()
        return True

    def synchronize(self) -> None:
        """Wait until what was fed is computed: GPUs and workers are still at it when llama.cpp comes back."""
        self._api.llama_synchronize(self.context)

    def rows(self, tokens: Sequence[int]) -> bool:
        """``feed`` with logits on every row, for at most ``n_batch`` tokens."""
        self._leave_chunks()
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        wanted = (ctypes.c_int8 * len(tokens))(*[1] * len(tokens))
        batch = self._api.llama_batch_get_one(ids, len(tokens))
        batch.logits = ctypes.cast(wanted, ctypes.POINTER(ctypes.c_int8))
        return self._decode(batch, tokens)

    # ---- texts that know nothing of each other

    def compute_chunks(self, batch: SideBySide, owner: object) -> bool:
        """Compute the next part of several texts of ``owner``; False if that was aborted. Raises DecodeError.

        What was there is lost. Raises EngineError if something else has been computed since the part before.
        """
        if batch.begin == 0:
            self._empty()
            self._chunks_of = owner
        self.check_chunks(owner)
        mark = self._log.mark()
        self._give(batch.n_tokens)
        status = batch.decode(self.context)
        self.n_returned += 1
        if status not in (0, _ABORTED):
            raise self._failed(status, mark)
        return status == 0

    def check_chunks(self, owner: object) -> None:
        """Raise EngineError unless what was computed last are chunks of ``owner``."""
        if self._chunks_of is not owner:
            raise EngineError(f"{self._path}: another caller has had a turn between two parts of these chunks")

    def _leave_chunks(self) -> None:
        if self._chunks_of is not None:
            self._empty()

    # ---- what came of it

    def logits(self, n_rows: int) -> NDArray[np.float32]:
        """Those of the ``n_rows`` rows that were computed last and asked for, (n_rows, n_vocab): a view, gone with the
        next call."""
        pointer = self._api.llama_get_logits(self.context)
        view: NDArray[np.float32] = np.ctypeslib.as_array(pointer, (n_rows, self._n_vocab))
        return view

    def last_logits(self) -> NDArray[np.float32]:
        """Those after the newest token, (n_vocab,): a view, gone with the next call."""
        address = self._row_at(self.context, -1)
        if address != self._row_address:  # it is made once, as long as llama.cpp's buffer stays where it is
            array: Any = (ctypes.c_float * self._n_vocab).from_address(address)
            self._row = np.frombuffer(array, np.float32)
            self._row_address = address
        return self._row

    def _decode(self, batch: Any, tokens: Sequence[int]) -> bool:
        mark = self._log.mark()
        self._give(len(tokens))
        status = self._api.llama_decode(self.context, batch)
        self.n_returned += 1
        if status == 0:
            self.tokens += tokens
            self._shift_pending = False
            return True
        if self._shift_pending:  # broken off part-way, it would be done twice to some keys
            self._empty()
        n_kept = self._api.llama_memory_seq_pos_max(self._memory, _SEQUENCE) + 1
        self.tokens = [*self.tokens, *tokens][:n_kept]
        if status == _ABORTED:
            return False
        if status == _NO_ROOM:
            raise ContextFullError(f"the context of {self.n_ctx} tokens is full; ask for more with --ctx-size")
        raise self._failed(status, mark)

    def _give(self, n_tokens: int) -> None:
        if self.given_tokens > n_tokens:  # else waiting for those would be taken for waiting for these
            self.synchronize()
        self.given_tokens = 0 if self._shift_pending else n_tokens

    def _leave_token(self) -> None:
        """Something else begins; a prompt may still be computed meanwhile."""
        if self.given_tokens == 1:
            self.given_tokens = 0

    def _failed(self, status: int, mark: int) -> DecodeError:
        return DecodeError(f"{self._path}: llama.cpp failed to compute ({status}): {self._log.cause_since(mark)}")

    def drop(self, begin: int, n: int) -> bool:
        """Take ``n`` tokens out of the middle; those after them move up. False where the model's cache cannot."""
        self._leave_token()
        if not self._api.llama_memory_can_shift(self._memory):
            return False
        end = begin + n
        if not self._api.llama_memory_seq_rm(self._memory, _SEQUENCE, begin, end):
            return False
        self._api.llama_memory_seq_add(self._memory, _SEQUENCE, end, -1, -n)
        self.tokens = self.tokens[:begin] + self.tokens[end:]
        self._shift_pending = True
        return True


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two texts have in common at their beginning."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _bytes_at(data: NDArray[np.uint8]) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
