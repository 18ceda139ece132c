"""The KV cache of one context: which tokens it holds, computing more of them, cutting it, copies of other texts.

Everything here runs in the engine's native thread. When another text takes the place of a conversation, a copy of the
conversation's cache is kept in main memory, within a limit; returning to it costs a copy and no computing. Which texts
are kept on disk is decided by ``promptcache``.

Not every model can go back to an earlier token: layers with a sliding window forget what is behind it, and recurrent
layers have only the state after the newest token. For these, checkpoints of such layers are taken at the ends of
prompts; where no checkpoint helps, the text is computed again.
"""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import ContextFullError, DecodeError, EngineError, one_line
from ggufmoe.native import library as native
from ggufmoe.native.log import NativeLog
from ggufmoe.native.router_tap import RouterTap, TokenRouting
from ggufmoe.native.spinning import SpinLimit
from ggufmoe.options.limits import MAX_INT32
from ggufmoe.runtime.chunkbatch import SideBySide, TokenBatch
from ggufmoe.runtime.nonfinite import not_finite_error

_logger = logging.getLogger("ggufmoe")

ComputedBy = Literal["cpu", "gpu", "worker"]
"""Where a model's layers are: all with the CPU, some on GPUs of this machine, or some on a worker."""

_logger = logging.getLogger("ggufmoe")
ABORTED = 2
NO_ROOM = 1
_PARTIAL_ONLY = 1
"""LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY of llama.h: the state of sliding windows and recurrent layers alone."""
_MAX_CHECKPOINTS = 8
_COMPARED = 256
"""Tokens of two texts that are compared at once."""
WORTH_KEEPING_TOKENS = 16
"""If fewer tokens than this would be lost, they are computed again rather than copied."""
_WORTH_KEEPING_PART = 8
"""Likewise if less than one part in so many would be lost: answering the last message again must not copy the cache."""


@dataclass(frozen=True)
class _CacheCheckpoint:
    """What layers that forget held after ``n_tokens`` of a text."""

    n_tokens: int
    data: NDArray[np.uint8]


@dataclass(frozen=True)
class SavedState:
    """A text, and llama.cpp's state of its KV cache.

    ``first``: the first token that all layers hold in ``data``; 0 but for models that forget, which have
    ``checkpoints``. ``n_exact``: tokens at the beginning that were computed after all tokens before them; the others
    were computed when the text still had tokens that have been dropped since.
    """

    tokens: tuple[int, ...]
    data: NDArray[np.uint8]
    first: int = 0
    checkpoints: tuple[_CacheCheckpoint, ...] = ()
    n_exact: int = MAX_INT32

    @property
    def n_bytes(self) -> int:
        return self.data.nbytes + sum(point.data.nbytes for point in self.checkpoints)

    @property
    def is_exact(self) -> bool:
        """Whether the state is that of computing ``tokens``."""
        return self.n_exact >= len(self.tokens)


class SavedStates:
    """Copies of texts that are not in the cache, least recently used first; at most ``max_bytes`` of them."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._states: list[SavedState] = []

    def __iter__(self) -> Iterator[SavedState]:
        return iter(self._states)

    @property
    def n_bytes(self) -> int:
        return sum(state.n_bytes for state in self._states)

    def add(self, state: SavedState) -> None:
        """Keep ``state`` and drop texts that are a prefix of it, then the oldest until all fit ``max_bytes``.

        Does nothing if ``state`` alone is larger than that.
        """
        if state.n_bytes > self.max_bytes:
            return
        self._states = [old for old in self._states if common_prefix(old.tokens, state.tokens) < len(old.tokens)]
        self._states.append(state)
        while self.n_bytes > self.max_bytes:
            self._states.pop(0)

    def best(self, n_usable: Callable[[SavedState], int]) -> SavedState | None:
        """The text of which most tokens can be used; ``n_usable`` counts them."""
        return max(self._states, key=n_usable, default=None)

    def remove(self, state: SavedState) -> None:
        """Drop the copy of a text, for example because it is in the cache again."""
        self._states = [other for other in self._states if other is not state]

    def clear(self) -> None:
        self._states = []


class KeptTexts:
    """Texts that are kept longer than the context. This class keeps none; ``PromptCache`` keeps them on disk."""

    is_open = False
    """Whether any are kept."""

    def wants(self, tokens: Sequence[int], n_bytes: Callable[[], int]) -> bool:
        """Whether ``keep`` is to be called with a copy of the text ``tokens``, of ``n_bytes()``."""
        return False

    def keep(self, state: SavedState) -> None:
        """Keep a copy of a text. Returns before it is written."""

    def longest(self, wanted: Sequence[int], at_least: int) -> SavedState | None:
        """A text that has the longest beginning of ``wanted``, ``at_least`` so many tokens of it; None without one."""
        return None

    def reject(self, state: SavedState) -> None:
        """Do not give ``state`` again, because llama.cpp does not take it."""

    def flush(self) -> None:
        """Return when all texts that were given to ``keep`` are written."""


class ContextState:
    """What the sequences of one context have in common: the batches that llama.cpp computes, and its cells."""

    def __init__(self) -> None:
        self.caches: list[KVCache] = []
        """One for each sequence."""
        self.given_tokens = 0
        """Tokens of the last batch, which llama.cpp may still be computing; 0 when it does something else."""
        self.n_returned = 0
        """Batches from which llama.cpp has returned."""
        self.shift_pending = False
        """Whether tokens have moved to new positions, and llama.cpp will rotate their keys with the next batch."""
        self.chunks_of: object = None
        """The owner of the chunks that the context holds instead of the texts of ``caches``, or None."""
        self.tap: RouterTap | None = None
        """Copies what routers choose, where the context was made for that."""
        self.give_way: Callable[[KVCache], bool] = lambda cache: False
        """Called when ``cache`` finds no free cell: frees cells of another sequence; False if there is none."""

    def has_room(self, n_tokens: int) -> bool:
        """Whether there may be cells for ``n_tokens`` more, beside other texts. False is certain, true is not."""
        n_ctx, n_held = self.caches[0].n_ctx, sum(len(cache.tokens) for cache in self.caches)
        if len(self.caches) == 1 or n_held + n_tokens <= n_ctx:
            return True
        # each cache counts without the cells that one before it has as well
        n_shared = (cache.n_shared(self.caches[:number]) for number, cache in enumerate(self.caches))
        return n_held - sum(n_shared) + n_tokens <= n_ctx


class KVCache:
    """The cache of one sequence of ``context`` (a ``llama_context *``, which must live longer), and computing with it.

    ``shared`` is the state of a context that has several sequences; their cells are in one cache (``kv_unified``).

    ``window``: tokens that the layers with a sliding window attend to, 0 without such layers. ``is_chunked``: whether
    the window begins at a multiple of its length instead of moving with each token. ``swa_full``: whether the cache
    keeps what is behind the window. ``is_recurrent``: whether some layers keep a state of the whole text.

    llama.cpp checks the ``abort_flag`` only where the CPU computes, and returns from a batch before a worker has
    computed it. So prompts are given to GPUs and workers in parts of one ubatch.
    """

    def __init__(
        self,
        api: Any,
        context: Any,
        *,
        n_vocab: int,
        log: NativeLog,
        path: Path,
        saved: SavedStates,
        abort_flag: ctypes.Array[ctypes.c_char],
        computed_by: ComputedBy,
        spin_limit: SpinLimit,
        window: int = 0,
        is_chunked: bool = False,
        swa_full: bool = False,
        is_recurrent: bool = False,
        sequence: int = 0,
        shared: ContextState | None = None,
        kept: KeptTexts | None = None,
    ) -> None:
        self._api = api
        self._sequence = sequence
        self._shared = shared or ContextState()
        self._shared.caches.append(self)
        self._spin_limit = spin_limit
        self._window = window
        self._is_chunked = is_chunked
        self._swa_full = swa_full
        self._is_recurrent = is_recurrent
        self._checkpoints: list[_CacheCheckpoint] = []
        self._abort_flag = abort_flag
        self._computed_by = computed_by
        self.context = context
        self._n_vocab = n_vocab
        self._log = log
        self._path = path
        self._memory = api.llama_get_memory(context)
        self.saved = saved
        self._kept = kept or KeptTexts()
        self._n_exact = MAX_INT32
        """As in ``SavedState``."""
        self.tokens: list[int] = []
        """The tokens whose keys and values the cache holds."""
        self.n_ctx: int = api.llama_n_ctx_seq(context)
        """Tokens that one text may have, also when several are computed side by side."""
        self.n_batch: int = api.llama_n_batch(context)
        self.n_ubatch: int = min(self.n_batch, api.llama_n_ubatch(context))
        """Tokens that llama.cpp computes at once, of one text or of several."""
        self._step: int = self.n_batch if computed_by == "cpu" else self.n_ubatch
        """Tokens of a prompt that are given to llama.cpp in one call."""
        self.row = -1
        """The place in the last batch of the token whose logits ``last_logits`` gives; -1: the last that has logits."""
        self._shares: dict[KVCache, int] = {}
        """Tokens at the beginning whose cells another cache has as well."""
        # Returns the address as a number: for a pointer ctypes would make new objects for each token. Where llama.cpp
        # waits for nothing it keeps Python's lock: a server's event loop would take it each time, and hold it long.
        prototype_of = ctypes.PYFUNCTYPE if computed_by == "cpu" else ctypes.CFUNCTYPE
        prototype = prototype_of(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32)
        self._row_at = prototype(("llama_get_logits_ith", native.library()))
        self._row: NDArray[np.float32] = np.empty(0, np.float32)
        self._row_address = 0
        self._one = (ctypes.c_int32 * 1)()
        self._one_batch = api.llama_batch_get_one(self._one, 1)

    @property
    def given_tokens(self) -> int:
        """Tokens of the last batch of the context; 0 when llama.cpp does something else."""
        return self._shared.given_tokens

    @property
    def n_returned(self) -> int:
        """Batches of the context from which llama.cpp has returned."""
        return self._shared.n_returned

    def clear(self) -> None:
        """Empty the cache and drop the copies of other texts."""
        self.empty()
        self.saved.clear()

    def empty(self) -> None:
        """Drop the text of this sequence. Chunks are dropped as a whole."""
        if len(self._shared.caches) == 1 or self._shared.chunks_of is not None:
            self.empty_all()
        else:
            self._api.llama_memory_seq_rm(self._memory, self._sequence, -1, -1)
            self._forget_text()

    def empty_all(self) -> None:
        """Drop the texts of all sequences of the context."""
        self._api.llama_memory_clear(self._memory, False)
        for cache in self._shared.caches:
            cache._forget_text()
        self._shared.chunks_of = None
        self._shared.shift_pending = False

    def _forget_text(self) -> None:
        self.tokens = []
        self._n_exact = MAX_INT32
        self._checkpoints = []
        self._share_at_most(0)

    # ---- reuse

    def reuse(self, prompt: Sequence[int]) -> int:
        """Keep the longest prefix of ``prompt`` that is in the cache, in a copy or on disk; drop all else.

        Returns its length. The last token of the prompt never counts: its logits are not kept, and it is computed.
        """
        self._end_token()
        self._drop_chunks()
        wanted = prompt[:-1]
        n = common_prefix(self.tokens, wanted)
        best = self.saved.best(lambda state: self._n_usable(state, wanted))
        n_best, n_better = self._n_usable(best, wanted) if best else 0, self._n_reachable(n) + WORTH_KEEPING_TOKENS
        kept = self._kept.longest(wanted, max(n_best + WORTH_KEEPING_TOKENS, n_better))
        better = kept or (best if n_best >= n_better else None)
        lost = len(self.tokens) - n
        if lost >= WORTH_KEEPING_TOKENS and (better or lost * _WORTH_KEEPING_PART >= len(self.tokens)):
            self.set_aside()
        if better is not None:
            self.saved.remove(better)
            try:
                self.restore(better)
            except EngineError:
                if kept is not None and self._shared.has_room(len(kept.tokens)):
                    self._kept.reject(kept)
                    return self.reuse(prompt)
                if len(self._shared.caches) > 1:  # other texts may hold the cells that it needs, and end
                    self.saved.add(better)
                raise
            n = common_prefix(self.tokens, wanted)
        return self._cut(n)

    def set_aside(self) -> None:
        """Copy the cache to ``saved``, unless the copy would be larger than all copies may be, or memory is short.

        The copy has as many of the newest checkpoints as fit beside its data.
        """
        if not self.tokens or self._shared.shift_pending:
            return
        if (copy := self._copy()) is not None:
            self.saved.add(copy)  # as the newest
            return
        if self.state_bytes() > self.saved.max_bytes:
            self.keep_text()
            return
        try:
            state = self.state()
        except (MemoryError, EngineError) as error:  # the text can be computed again
            _logger.warning("%s: no copy of a text of %d tokens: %s", self._path, len(self.tokens), one_line(error))
            return
        room = self.saved.max_bytes - state.data.nbytes
        self.saved.add(replace(state, checkpoints=_newest_within(state.checkpoints, room)))
        if self._is_wanted():
            self._kept.keep(state)

    def _copy(self) -> SavedState | None:
        """The copy of this text that ``saved`` has, if it is as exact as the text."""
        tokens = tuple(self.tokens)
        same = (state for state in self.saved if state.tokens == tokens and state.n_exact >= self._n_exact)
        return next(same, None)

    def n_held(self, text: Sequence[int]) -> int:
        """Tokens at the beginning of ``text`` that the cache holds and can keep without the rest of what it holds."""
        return self._n_reachable(common_prefix(self.tokens, text))

    def keep_text(self) -> None:
        """Have a copy of the text kept on disk, if it is to be kept at all and enough of it is new. Raises nothing."""
        if self.tokens and not self._shared.shift_pending:
            try:
                if self._is_wanted():
                    self._kept.keep(self.state())
            except (EngineError, MemoryError) as error:
                _logger.debug("%s: a text of %d tokens is not kept: %s", self._path, len(self.tokens), error)

    def _is_wanted(self) -> bool:
        return self._n_exact >= len(self.tokens) and self._kept.wants(self.tokens, self.state_bytes)

    def state_bytes(self) -> int:
        """Size of a copy of the text."""
        return int(self._api.llama_state_seq_get_size(self.context, self._sequence))

    def copy_beginning(self, source: KVCache, n: int) -> None:
        """Replace the text by the first ``n`` tokens of ``source``, which must be able to go back there.

        Both sequences then use the same cells. What layers that forget hold is copied instead: of ``source`` as it is,
        or its checkpoint there. The text is empty afterwards if llama.cpp does not take it.
        """
        point = source._checkpoint_needed_at(n)
        # the cells of a window are few, and those that several sequences have are not used again
        is_copied = point is not None or self._is_recurrent or bool(self._window and not self._swa_full)
        self.empty()
        if is_copied and self._shared.shift_pending:
            return
        self._api.llama_memory_seq_cp(self._memory, source._sequence, self._sequence, 0, n)
        self.tokens = source.tokens[:n]
        self._n_exact = source._n_exact if source._n_exact < n else MAX_INT32
        for other, n_common in {**source._shares, source: n}.items():
            self._shares[other] = other._shares[self] = min(n, n_common)
        self._checkpoints = [point for point in source._checkpoints if point.n_tokens <= n]
        if is_copied and not self._takes_partial(self._partial_state() if point is None else point.data, n):
            self.empty()

    def n_shared(self, others: Sequence[KVCache]) -> int:
        """Number of tokens whose cells one of ``others`` has as well."""
        return max((self._shares.get(other, 0) for other in others), default=0) if self._shares else 0

    def _share_at_most(self, n: int) -> None:
        """Note that this sequence has only the first ``n`` tokens of those whose cells others have as well."""
        for other, n_common in list(self._shares.items()):
            if n:
                self._shares[other] = other._shares[self] = min(n, n_common)
            else:
                del self._shares[other], other._shares[self]

    def keep(self, n: int) -> int:
        """Drop all but the first ``n`` tokens; the number that is left, fewer if the model cannot go back there."""
        self._end_token()
        return self._cut(min(n, len(self.tokens)))

    # ---- going back

    def _n_usable(self, state: SavedState, wanted: Sequence[int]) -> int:
        """Tokens of ``state`` at the beginning of ``wanted`` that need not be computed again."""
        n = common_prefix(state.tokens, wanted)
        return self._nearest(n, len(state.tokens), state.first, state.checkpoints)

    def _n_reachable(self, n: int) -> int:
        """The number of tokens, at most ``n``, that ``_cut`` can keep."""
        return self._nearest(n, len(self.tokens), self._first_held(), self._checkpoints)

    def _nearest(self, n: int, n_held: int, first: int, checkpoints: Iterable[_CacheCheckpoint]) -> int:
        """``n``, or the nearest number of tokens below it that a text of ``n_held`` tokens can be cut to."""
        if self._can_go_back(n, n_held, first):
            return n
        return max((point.n_tokens for point in checkpoints if point.n_tokens <= n), default=0)

    def _can_go_back(self, n: int, n_held: int, first: int) -> bool:
        """Whether a text of ``n_held`` tokens can be cut to ``n``, if all layers hold the tokens from ``first`` on."""
        if n in (0, n_held):
            return True
        return not self._is_recurrent and (not self._window or first <= self._attends_from(n))

    def _attends_from(self, position: int) -> int:
        """The first token that windowed layers attend to at ``position``; the token there is one of the window."""
        if self._is_chunked:
            return position // self._window * self._window
        return max(0, position - self._window + 1)

    def _first_held(self) -> int:
        if not self._forgets:
            return 0
        return max(int(self._api.llama_memory_seq_pos_min(self._memory, self._sequence)), 0)

    def _cut(self, n: int) -> int:
        """Keep the first ``n`` tokens, or fewer if the model cannot go back there; return how many."""
        n_kept = n
        if not self._can_go_back(n, len(self.tokens), self._first_held()):
            n_kept = self._n_reachable(n)
            point = self._checkpoint_needed_at(n_kept)
            if point is None or not self._takes_partial(point.data, n_kept):
                n_kept = 0
        elif n < len(self.tokens) and not self._api.llama_memory_seq_rm(self._memory, self._sequence, n, -1):
            n_kept = 0
        if not n_kept:
            self.empty()
        self.tokens = self.tokens[:n_kept]
        self._share_at_most(n_kept)
        if n_kept <= self._n_exact:
            self._n_exact = MAX_INT32
        self._checkpoints = [point for point in self._checkpoints if point.n_tokens <= n_kept]
        return n_kept

    def _checkpoint_needed_at(self, n: int) -> _CacheCheckpoint | None:
        """The checkpoint after ``n`` tokens; None where there is none, or the text can be cut there without it."""
        if self._can_go_back(n, len(self.tokens), self._first_held()):
            return None
        return next((point for point in self._checkpoints if point.n_tokens == n), None)

    def _takes_partial(self, data: NDArray[np.uint8], n: int) -> bool:
        """Go back to ``n`` tokens, where layers that forget held ``data``; false if llama.cpp does not take it."""
        where = self._sequence, _PARTIAL_ONLY
        n_read = self._api.llama_state_seq_set_data_ext(self.context, _bytes_at(data), data.nbytes, *where)
        # what forgets is now at n, and the other layers follow
        taken = n_read == data.nbytes and self._api.llama_memory_seq_rm(self._memory, self._sequence, n, -1)
        return bool(taken and self._api.llama_memory_seq_pos_max(self._memory, self._sequence) == n - 1)

    def _partial_state(self) -> NDArray[np.uint8]:
        """What layers that forget hold now; empty if llama.cpp does not give it."""
        size = self._api.llama_state_seq_get_size_ext(self.context, self._sequence, _PARTIAL_ONLY)
        data = np.empty(size, np.uint8)
        n = self._api.llama_state_seq_get_data_ext(self.context, _bytes_at(data), size, self._sequence, _PARTIAL_ONLY)
        return data[: size if n == size else 0]

    def take_checkpoint(self) -> None:
        """Keep what layers that forget hold now, and drop the oldest checkpoints until all fit ``saved.max_bytes``.

        The copies of other texts do not count: they fill that room sooner or later, and would leave no checkpoint.
        The text is also kept on disk: what is read from there cannot be cut to it later.
        """
        self.keep_text()
        if self._shared.shift_pending:  # the copy would have new positions and old keys
            return
        size = self._api.llama_state_seq_get_size_ext(self.context, self._sequence, _PARTIAL_ONLY)
        if size > self.saved.max_bytes or any(point.n_tokens == len(self.tokens) for point in self._checkpoints):
            return
        try:
            data = self._partial_state()
        except MemoryError:  # the text can be computed again
            return
        if data.nbytes:
            points = [*self._checkpoints, _CacheCheckpoint(len(self.tokens), data)][-_MAX_CHECKPOINTS:]
            self._checkpoints = list(_newest_within(points, self.saved.max_bytes))

    def state(self) -> SavedState:
        """A copy of the cache. Raises EngineError right after ``drop``, before the next token is computed."""
        self._end_token()
        if self._shared.shift_pending:
            raise EngineError(
                f"{self._path}: the context has just been shifted and cannot be kept before the next token"
            )
        size = self.state_bytes()
        data = np.empty(size, np.uint8)
        n = self._api.llama_state_seq_get_data(self.context, _bytes_at(data), size, self._sequence)
        if n != size:
            raise EngineError(f"{self._path}: llama.cpp gave {n} of {size} bytes of its cache")
        if self._sequence:  # llama.cpp writes its number and does not use it: the text may go to another sequence
            data[4:8] = 0
        first = self._first_held()
        if self._window and self.tokens:  # llama.cpp writes of windowed layers only what the newest token attends to
            first = max(first, self._attends_from(len(self.tokens) - 1))
        return SavedState(tuple(self.tokens), data, first, tuple(self._checkpoints), self._n_exact)

    def restore(self, state: SavedState) -> None:
        """Replace the cache by a copy. If llama.cpp does not take it, raises EngineError with the cache empty."""
        self._end_token()
        self.empty()
        mark = self._log.mark()
        while not (self._shared.has_room(len(state.tokens)) and self._takes(state)):
            self.empty()
            if self._shared.give_way(self):
                continue
            raise EngineError(f"{self._path}: llama.cpp does not take the state: {self._log.cause_since(mark)}")
        self.tokens = list(state.tokens)
        self._n_exact = state.n_exact
        self._checkpoints = list(state.checkpoints)

    def _takes(self, state: SavedState) -> bool:
        n = self._api.llama_state_seq_set_data(self.context, _bytes_at(state.data), state.data.nbytes, self._sequence)
        there = self._api.llama_memory_seq_pos_max(self._memory, self._sequence) + 1
        return bool(n == state.data.nbytes and there == len(state.tokens))

    # ---- computing

    def compute(self, tokens: Sequence[int]) -> bool:
        """Decode ``tokens`` after those in the cache; False if the engine's abort flag stopped that.

        After an abort ``self.tokens`` holds what was computed until then. Independent chunks in the cache are dropped
        first. Raises ContextFullError and DecodeError.
        """
        self._drop_chunks()
        if len(tokens) == 1 and not self._sequence:
            self._one[0] = tokens[0]
            return self._decode(self._one_batch, tokens)
        for begin in range(0, len(tokens), self._step):
            part = tokens[begin : begin + self._step]
            if self._is_stopped:
                return False
            batch, _alive = self._batch_of(part)
            if not self._decode(batch, part):
                return False
            if self._computed_by == "worker":
                self.synchronize()
        return True

    @property
    def _is_stopped(self) -> bool:
        """Whether the abort flag is set, where llama.cpp itself does not look at it: only its CPU backend does."""
        return self._computed_by != "cpu" and self._abort_flag[0] != b"\x00"

    def compute_prompt(self, tokens: Sequence[int]) -> bool:
        """``compute`` the end of a prompt; false if that was aborted.

        For models that forget, a checkpoint is taken before the last token: the next text may differ from there on.
        """
        if not self.needs_checkpoint():
            return self.compute(tokens)
        if not self.compute(tokens[:-1]):
            return False
        self.take_checkpoint()
        return self.compute(tokens[-1:])

    @property
    def _forgets(self) -> bool:
        """Whether some layers cannot go back to every earlier token."""
        return bool(self._window or self._is_recurrent)

    def needs_checkpoint(self) -> bool:
        """Whether ``take_checkpoint`` is to be called before the last token of the prompt that is to be computed.

        A cache that keeps what is behind the window goes back by itself, but not after it was copied: llama.cpp writes
        the window only. So it needs them as soon as there are copies, that is, texts that are exchanged or on disk.
        """
        if self._forgets and self._kept.is_open:
            return True
        if not self._forgets or not self.saved.max_bytes:
            return False
        keeps_all = self._swa_full and not self._is_recurrent and self._first_held() == 0
        return not keeps_all or self.saved.n_bytes > 0

    def synchronize(self) -> None:
        """Wait until all given tokens are computed: GPUs and workers may still compute when llama.cpp returns."""
        if self._computed_by != "cpu":
            self._api.llama_synchronize(self.context)

    def compute_all_logits(self, tokens: Sequence[int]) -> bool:
        """``compute`` at most ``n_batch`` tokens, with logits after each of them; False if that was aborted."""
        self._drop_chunks()
        if self._is_stopped:
            return False
        batch, _alive = self._batch_of(tokens, all_logits=True)
        return self._decode(batch, tokens)

    def _batch_of(self, tokens: Sequence[int], *, all_logits: bool = False) -> tuple[Any, object]:
        """A batch of ``tokens``, with logits after each or after the last, and what must live as long as the batch."""
        n, n_held = len(tokens), len(self.tokens)
        wanted = np.ones(n, np.int8)
        if self._sequence == 0:  # llama.cpp counts the positions itself, and wants the last logits
            ids = (ctypes.c_int32 * n)(*tokens)
            batch = self._api.llama_batch_get_one(ids, n)
            if all_logits:
                batch.logits = wanted.ctypes.data_as(ctypes.POINTER(ctypes.c_int8))
            return batch, (ids, wanted)
        wanted[:-1] = all_logits
        positions, sequences = np.arange(n_held, n_held + n, dtype=np.int32), np.full(n, self._sequence, np.int32)
        ints = np.array(tokens, np.int32)
        made = TokenBatch(self._api, tokens=ints, positions=positions, sequences=sequences, wanted=wanted)
        return made.native, made

    # ---- independent texts side by side

    def compute_chunks(self, batch: SideBySide, owner: object) -> bool:
        """Compute the next part of several texts of ``owner``; False if that was aborted. Raises DecodeError.

        The first part empties the cache. Raises EngineError if something else was computed since the part before.
        """
        if batch.begin == 0:
            self.empty_all()
            self._shared.chunks_of = owner
        self.check_chunks(owner)
        mark = self._log.mark()
        self.begin_batch(batch.n_tokens)
        status = batch.decode(self.context)
        self._shared.n_returned += 1
        if status not in (0, ABORTED):
            raise self.failed(status, mark)
        return status == 0

    def check_chunks(self, owner: object) -> None:
        """Raise EngineError unless the cache holds chunks of ``owner``."""
        if self._shared.chunks_of is not owner:
            raise EngineError(f"{self._path}: another caller has had a turn between two parts of these chunks")

    def _drop_chunks(self) -> None:
        if self._shared.chunks_of is not None:
            self.empty_all()

    # ---- logits

    def logits(self, n_rows: int) -> NDArray[np.float32]:
        """Logits of the last ``n_rows`` tokens that wanted them, (n_rows, n_vocab): a view until the next call."""
        pointer = self._api.llama_get_logits(self.context)
        view: NDArray[np.float32] = np.ctypeslib.as_array(pointer, (n_rows, self._n_vocab))
        return view

    def last_logits(self) -> NDArray[np.float32]:
        """Logits after the newest token of this text, (n_vocab,): a view, valid until the next call."""
        address = self._row_at(self.context, self.row)
        if address != self._row_address:  # the view is made again only when llama.cpp's buffer has moved
            array: Any = (ctypes.c_float * self._n_vocab).from_address(address)
            self._row = np.frombuffer(array, np.float32)
            self._row_address = address
        return self._row

    @contextmanager
    def tapped(self, is_wanted: bool) -> Iterator[None]:
        """Within the block, have batches keep for ``routing`` what routers choose; not if the graph is observed."""
        tap = self._shared.tap
        if tap is not None:
            tap.is_wanted = is_wanted
        try:
            yield
        finally:
            if tap is not None:
                tap.is_wanted = False

    def routing(self) -> TokenRouting:
        """Which experts the newest token of this text went to, if its batch was ``tapped``. Raises EngineError."""
        if self._shared.tap is None:
            raise EngineError(f"the graph of {self._path} is being observed, and routing cannot be told meanwhile")
        return self._shared.tap.routing(self.row)

    def mean_embedding(self, tokens: Sequence[int], n_embd: int, n_at_once: int) -> NDArray[np.float32] | None:
        """The mean over ``tokens`` of what the last norm gives, (n_embd,); None if that was aborted.

        Replaces the text of this sequence, which is empty afterwards. Raises ContextFullError and DecodeError.
        """
        self.empty()
        total = np.zeros(n_embd)
        self._api.llama_set_embeddings(self.context, True)
        try:
            for begin in range(0, len(tokens), n_at_once):
                part = tokens[begin : begin + n_at_once]
                if not self.compute_all_logits(part):
                    return None
                rows = np.ctypeslib.as_array(self._api.llama_get_embeddings(self.context), (len(part), n_embd))
                total += rows.sum(axis=0, dtype=np.float64)
        finally:
            self._api.llama_set_embeddings(self.context, False)
            self.empty()
        if not np.isfinite(total).all():
            raise not_finite_error(self._path)
        return (total / len(tokens)).astype(np.float32)

    def check_finite(self, logits: NDArray[np.float32]) -> None:
        """Raise DecodeError if logits, a row or any number of rows, are NaN or infinite.

        Minus infinity is allowed beside other values: models rule tokens out with it.
        """
        if logits.size:
            self.check_largest(float(logits.max()))

    def check_largest(self, logit: float) -> None:
        """Raise DecodeError if the largest logit after a token is NaN or infinite."""
        if not math.isfinite(logit):
            raise not_finite_error(self._path)

    def _decode(self, batch: Any, tokens: Sequence[int]) -> bool:
        mark = self._log.mark()
        self.begin_batch(len(tokens))
        status = self._api.llama_decode(self.context, batch)
        self._shared.n_returned += 1
        if status == 0:
            self.tokens += tokens
            self._shared.shift_pending = False
            self.row = -1
            return True
        if status == NO_ROOM and self._shared.give_way(self):
            return self._decode(batch, tokens)
        self.take_rest(tokens, status)
        if status == ABORTED:
            return False
        if status == NO_ROOM:
            raise ContextFullError(f"the context of {self.n_ctx} tokens is full; ask for more with --ctx-size")
        raise self.failed(status, mark)

    def take_rest(self, tokens: Sequence[int], status: int) -> None:
        """Find out how many of ``tokens`` are in the cache after a batch that ended with another ``status`` than 0."""
        # some keys may be rotated already, and would be rotated twice; a recurrent state may be ahead of its tokens
        if self._shared.shift_pending:
            self.empty_all()
        elif self._is_recurrent and status != NO_ROOM:
            self.empty()
        n_kept = self._api.llama_memory_seq_pos_max(self._memory, self._sequence) + 1
        self.tokens = [*self.tokens, *tokens][:n_kept]

    @property
    def is_tapped(self) -> bool:
        """Whether this is in a ``tapped`` block that has batches keep what routers choose."""
        return self._shared.tap is not None and self._shared.tap.is_wanted

    def begin_batch(self, n_tokens: int, sizes: Sequence[int] = (), wanted: NDArray[np.int8] | None = None) -> None:
        """Call before a batch of ``n_tokens``; of several texts, with their ``sizes``.

        ``wanted``, which tells which tokens get logits, is needed if this ``is_tapped``.
        """
        self._spin_limit.look()
        if self.given_tokens > n_tokens:  # so that a watch does not count the wait for those as one for these
            self.synchronize()
        self._shared.given_tokens = 0 if self._shared.shift_pending else n_tokens
        if self._shared.tap is not None:
            self._shared.tap.begin(sizes or (n_tokens,), self.n_ubatch, wanted)

    def _end_token(self) -> None:
        """Call when something other than computing a batch begins. A prompt may still be computed meanwhile.

        With several sequences each batch is waited for.
        """
        if self.given_tokens == 1 or len(self._shared.caches) > 1:
            self._shared.given_tokens = 0

    def failed(self, status: int, mark: int) -> DecodeError:
        """The error of a batch that ended with ``status``; its cause was logged since ``mark``."""
        return DecodeError(f"{self._path}: llama.cpp failed to compute ({status}): {self._log.cause_since(mark)}")

    def drop(self, begin: int, n: int) -> bool:
        """Drop ``n`` tokens from ``begin`` on; later ones move up. False if the model's cache cannot do that."""
        self._end_token()
        # a recurrent state would keep what is dropped
        if self._is_recurrent or not self._api.llama_memory_can_shift(self._memory):
            return False
        end, n_left = begin + n, len(self.tokens) - n
        # a window that reaches behind the gap needs the tokens before it
        reaches_back = len(self.tokens) - end < self._window - 1
        if reaches_back and self._first_held() > max(0, n_left - self._window + 1):
            return False
        if not self._api.llama_memory_seq_rm(self._memory, self._sequence, begin, end):
            return False
        for other, n_common in list(self._shares.items()):
            if n_common > end:  # these cells move for the other sequence as well
                other.set_aside()
                other._cut(end)
        self._api.llama_memory_seq_add(self._memory, self._sequence, end, -1, -n)
        self.tokens = self.tokens[:begin] + self.tokens[end:]
        self._share_at_most(begin)
        self._n_exact = min(self._n_exact, begin)
        self._checkpoints = []
        self._shared.shift_pending = True
        return True


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix of two texts."""
    end, begin = min(len(a), len(b)), 0
    # lists are compared many times faster than one token after another
    while begin < end and list(a[begin : begin + _COMPARED]) == list(b[begin : begin + _COMPARED]):
        begin += _COMPARED
    return next((i for i in range(begin, min(end, begin + _COMPARED)) if a[i] != b[i]), min(end, begin + _COMPARED))


def _newest_within(points: Sequence[_CacheCheckpoint], max_bytes: int) -> tuple[_CacheCheckpoint, ...]:
    """The checkpoints without the oldest, as many as fit."""
    totals = list(accumulate(point.data.nbytes for point in reversed(points)))
    n = sum(total <= max_bytes for total in totals)
    return tuple(points[len(points) - n :])


def _bytes_at(data: NDArray[np.uint8]) -> Any:
    return data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
