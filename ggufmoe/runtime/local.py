"""``LocalEngine``: one loaded model whose llama.cpp runs in this process.

Owns which computations follow from each call and what may be called from where. Native handles are ``loading``'s, the
order of computations ``nativethread``'s, an answer ``generation``'s. What llama.cpp logs goes to ``logging``
(``ggufmoe.llama``). ``ggufmoe.Engine`` describes the methods.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
import time
import weakref
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import index
from pathlib import Path
from typing import Any, Concatenate

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import Cancelled, ContextFullError, DecodeError, EngineError, InputError
from ggufmoe.files import StrPath, possible_path, user_path
from ggufmoe.gguf.header import Header
from ggufmoe.gguf.hyper import Hyper
from ggufmoe.options import ContextOptions, OffloadOptions, OverflowPolicy, SamplingOptions, options_of
from ggufmoe.placement.footprint import answers_at_once, one_by_one_reason
from ggufmoe.placement.load_report import Placement
from ggufmoe.runtime.batching import BatchScheduler
from ggufmoe.runtime.bindings import native_api, native_log
from ggufmoe.runtime.chunkbatch import ComputedPart, SideBySide, batches
from ggufmoe.runtime.enginelike import P, ResultT, TensorObserver, TokenFilter, described
from ggufmoe.runtime.events import NO_TIMING, Event, Finished
from ggufmoe.runtime.generation import Generation, GenerationRequest
from ggufmoe.runtime.kvcache import SavedState
from ggufmoe.runtime.loading import LoadCallback, LoadedModel, LoadRequest, checked_model
from ggufmoe.runtime.nativethread import Cancellation, NativeThread
from ggufmoe.runtime.overflow import Overflow
from ggufmoe.runtime.sampling import Sampler, resolve
from ggufmoe.runtime.session import SessionFacts, read_session, write_session
from ggufmoe.runtime.textstream import stop_strings
from ggufmoe.work import CancelFlag, OnProgress, is_set

_logger = logging.getLogger("ggufmoe")
_LOGITS_BATCH = 512
"""Rows of logits that are computed and copied at once."""
_EMBEDDING_TURN_S = 0.2
"""Texts are embedded for so long before answers under way have their turn. One of them may have to give up its slot for
that, which costs two copies of its text."""


@dataclass(frozen=True)
class Activity:
    """What the native thread does at this moment, for a watch over it."""

    is_busy: bool
    """Whether llama.cpp, or the code around it, runs."""
    given_tokens: int
    """Tokens of the batch that llama.cpp was given last; 0 if there is no context."""
    n_batches: int
    """Batches from which llama.cpp has returned."""


@described
class LocalEngine:
    """The model in the GGUF file at ``path``, loaded when this returns; use ``close`` to give its memory back.

    All native code that computes runs in one thread: callers take turns, first come, first served. What needs the
    vocabulary alone runs in a second one, so that tokenizing waits for no computation.

    ``before_load`` is called in that thread, right before llama.cpp begins to load. Raises what ``Engine`` raises.
    """

    def __init__(
        self,
        path: StrPath,
        context: ContextOptions,
        offload: OffloadOptions,
        *,
        on_progress: OnProgress | None = None,
        cancel: CancelFlag | None = None,
        before_load: Callable[[], None] = lambda: None,
    ) -> None:
        self._offload_options = offload
        self._model = model = checked_model(possible_path(path))
        self.path: Path = model.paths[0]
        self._context_options = context = self._settled(context)
        self.header: Header = model.shards[0].header
        self._cancellations: weakref.WeakSet[Cancellation] = weakref.WeakSet()
        self._cancellations_lock = threading.Lock()
        # the callback sees the engine's end through this, so that it does not keep the engine alive
        stopped = threading.Event()
        callback = LoadCallback(
            on_progress, lambda: stopped.is_set() or (cancel is not None and cancel.is_set()), self.path.name
        )
        self._api = native_api()
        self._loaded = LoadedModel(self._api, native_log(), LoadRequest(model, context, offload))
        loaded = self._loaded
        self._native = NativeThread(
            str(self.path), loaded.abort_flag, loaded.free, lambda message: loaded.release_locks()
        )
        self._texts = self._native.companion()
        self._scheduler = BatchScheduler(self._native, loaded)
        self._tickets = itertools.count()
        try:
            self._native.call(before_load)
            self._native.call(partial(self._loaded.load, callback))
        except BaseException:
            stopped.set()
            self.close()
            raise
        self._vocabulary = self._loaded.vocabulary
        self.placement: Placement = self._loaded.placement
        self.n_ctx: int = self._loaded.cache.n_ctx
        self.n_vocab: int = self._vocabulary.n_tokens
        self.n_ctx_train: int = self._loaded.n_ctx_train

    def _settled(self, options: ContextOptions) -> ContextOptions:
        """``options`` with the number of answers that are computed at once, where it was left open."""
        n_parallel = answers_at_once(options, self._model.memory)
        if not options.n_parallel and n_parallel == 1:
            reason = one_by_one_reason(self._model.memory) or f"--batch-size is {options.n_batch}"
            _logger.warning("%s: answers are computed one after another: %s", self.path, reason)
        return replace(options, n_parallel=n_parallel)

    # ---- the model

    @property
    def n_expert_used(self) -> int:
        return self._offload_options.n_expert_used or Hyper.of(self.header.metadata).n_expert_used

    @property
    def bos_token(self) -> int | None:
        return self._vocabulary.bos_token

    @property
    def eos_token(self) -> int | None:
        return self._vocabulary.eos_token

    @property
    def adds_bos(self) -> bool:
        return self._vocabulary.adds_bos

    @property
    def overflow(self) -> OverflowPolicy:
        return self._context_options.overflow_policy

    @property
    def cached_tokens(self) -> tuple[int, ...]:
        return tuple(self._loaded.cache.tokens)

    def token_text(self, token: int | None) -> str:
        return "" if token is None else self._texts.call(partial(self._vocabulary.token_text, token))

    # ---- text and tokens

    def tokenize(
        self,
        text: str,
        *,
        add_bos: bool = True,
        parse_special: bool = False,
        must_fit: bool = False,
        cancel: CancelFlag | None = None,
    ) -> list[int]:
        cancellation, texts = self._remember(Cancellation(cancel)), self._texts
        n_ctx = self.n_ctx if must_fit else None

        def check() -> None:
            if cancellation.is_requested():
                texts.check_usable()
                raise Cancelled("tokenizing was stopped")

        tokenize = partial(self._vocabulary.tokenize, text, add_bos=add_bos, parse_special=parse_special)
        tokenize = partial(tokenize, n_ctx=n_ctx, stack_bytes=texts.stack_bytes, check=check)
        found = texts.call_until_cancelled(tokenize, cancellation)
        if found is None:
            texts.check_usable()
            raise Cancelled("tokenizing was stopped")
        return found

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return self._texts.call(partial(self._vocabulary.piece, token, special=special))

    def ends_text(self, token: int) -> bool:
        self._native.check_not_forked()
        return self._vocabulary.ends_text(token)

    def detokenize(self, tokens: Sequence[int], *, special: bool = False) -> bytes:
        return self._texts.call(lambda: b"".join(self._vocabulary.piece(token, special=special) for token in tokens))

    # ---- generation

    def generate(
        self,
        prompt: Sequence[int],
        sampling: SamplingOptions | None = None,
        *,
        stop: str | Sequence[str] = (),
        cancel: CancelFlag | None = None,
        n_keep: int | None = None,
        shown: Collection[int] = (),
        routing: bool = False,
    ) -> Iterator[Event]:
        tokens = self._checked_prompt(prompt)
        n_keep = self._context_options.n_keep if n_keep is None else n_keep
        begins_with_bos = tokens[0] == self.bos_token
        overflow = Overflow(
            self._context_options.overflow_policy, len(tokens) if n_keep < 0 else max(n_keep, int(begins_with_bos))
        )
        tokens = overflow.fitted(tokens, self.n_ctx)
        settings = resolve(options_of(SamplingOptions, sampling), self.header.get)
        if routing and not self._loaded.tells_routing:
            telling = self._remember(Cancellation(cancel))
            if not self._native.call_until_cancelled(self._loaded.tell_routing, telling):
                return iter([Finished("", "cancelled", NO_TIMING, settings.seed)])
        # made now, so that an error in a grammar is raised here and not when the first token is asked for
        make = partial(Sampler, self._api, self._vocabulary, settings, tokens)
        sampler = self._texts.call_until_cancelled(make, self._remember(Cancellation(cancel)))
        request = GenerationRequest(
            tuple(tokens), settings, stop_strings(stop), cancel, overflow, frozenset(shown), routing
        )
        if sampler is None:
            self._texts.check_usable()
            return iter([Finished("", "cancelled", NO_TIMING, settings.seed)])
        return self._read(request, sampler)

    def _read(self, request: GenerationRequest, sampler: Sampler) -> Iterator[Event]:
        submit = self._scheduler.submit if self._context_options.n_parallel > 1 else None
        ticket = next(self._tickets)
        generation = Generation(self._native, self._loaded, request, sampler, submit=submit, ticket=ticket)
        self._remember(generation.cancellation)
        yield from generation.read()

    def _checked_prompt(self, prompt: Sequence[int]) -> list[int]:
        self._vocabulary.check_tokens(prompt)
        tokens = [index(token) for token in prompt]
        if not tokens:
            raise InputError("the prompt is empty: there is nothing to continue")
        return tokens

    def _check_fits(self, tokens: Sequence[int]) -> None:
        if len(tokens) >= self.n_ctx:
            raise ContextFullError(
                f"the prompt has {len(tokens)} tokens and the context holds {self.n_ctx}: "
                "shorten it, or ask for more with --ctx-size"
            )

    def cancel(self) -> None:
        if self._native.is_forked:  # nothing runs here, and the lock may stay held
            return
        with self._cancellations_lock:
            cancellations = list(self._cancellations)
        for cancellation in cancellations:
            self._native.abort(cancellation)

    def _remember(self, cancellation: Cancellation) -> Cancellation:
        """Let ``cancel`` reach ``cancellation`` as long as it is held. Raises EngineError in a forked process."""
        self._native.check_not_forked()
        with self._cancellations_lock:
            self._cancellations.add(cancellation)
        return cancellation

    # ---- the cache

    def forget(self) -> None:
        def forget() -> None:
            self._loaded.cache.empty_all()
            self._loaded.cache.saved.clear()

        self._native.call(forget)

    def prefill(self, prompt: Sequence[int], *, cancel: CancelFlag | None = None, every_row: bool = False) -> int:
        tokens = self._checked_prompt(prompt)
        self._check_fits(tokens)
        compute = self._compute_prompt_rows if every_row else self._compute_prompt
        n = self._native.call_until_cancelled(partial(compute, tokens), self._remember(Cancellation(cancel)))
        if n is None:
            raise Cancelled("computing the prompt was stopped")
        return n

    def _compute_prompt(self, tokens: list[int]) -> int | None:
        kv = self._loaded.slots.idle()
        n_reused = kv.reuse(tokens)
        if not kv.compute_prompt(tokens[n_reused:]):
            return None
        kv.synchronize()
        kv.check_finite(kv.last_logits())
        kv.keep_text()
        return len(tokens) - n_reused

    def _compute_prompt_rows(self, tokens: list[int]) -> int | None:
        """Compute all of ``tokens`` anew, with logits after each."""
        kv = self._loaded.slots.idle()
        kv.clear()
        size = min(_LOGITS_BATCH, kv.n_batch)
        for begin in range(0, len(tokens), size):
            part = tokens[begin : begin + size]
            if not kv.compute_all_logits(part):
                return None
            kv.check_finite(kv.logits(len(part)))
        return len(tokens)

    def evaluate(
        self, tokens: Sequence[int], *, one_by_one: bool = False, cancel: CancelFlag | None = None
    ) -> float | None:
        self._vocabulary.check_tokens(tokens)
        ids = [index(token) for token in tokens]
        parts = [[i] for i in ids] if one_by_one else [ids]
        cancellation = self._remember(Cancellation(cancel))

        def timed() -> float | None:
            kv = self._loaded.slots.idle()
            start = time.perf_counter()
            done = all(not cancellation.aborted and kv.compute(part) for part in parts)
            kv.synchronize()
            seconds = time.perf_counter() - start
            if not done:
                return None
            if ids:
                kv.check_finite(kv.last_logits())
            return seconds

        return self._native.call_until_cancelled(timed, cancellation)

    # ---- logits

    def logits(self, tokens: Sequence[int], *, cancel: CancelFlag | None = None) -> NDArray[np.float32]:
        ids = self._checked_prompt(tokens)
        self._check_fits(ids)
        parts = self._logits_by_batch(ids, cancel)
        rows = np.empty((len(tokens), self.n_vocab), np.float32)
        done = 0
        for part in parts:
            rows[done : done + len(part)] = part
            done += len(part)
        return rows

    def logits_by_batch(
        self, tokens: Sequence[int], *, cancel: CancelFlag | None = None
    ) -> Iterator[NDArray[np.float32]]:
        ids = self._checked_prompt(tokens)
        self._check_fits(ids)
        return self._logits_by_batch(ids, cancel)

    def _logits_by_batch(self, ids: list[int], cancel: CancelFlag | None) -> Iterator[NDArray[np.float32]]:
        cancellation = self._remember(Cancellation(cancel))
        size = min(_LOGITS_BATCH, self._context_options.n_batch, self.n_ctx)
        for begin in range(0, len(ids), size):
            rows = self._native.call_until_cancelled(partial(self._logits_of, ids, begin, size), cancellation)
            if rows is None:
                if is_set(cancel):
                    raise Cancelled("computing logits was stopped")
                raise DecodeError("computing logits was cancelled from another thread")
            yield rows

    def _logits_of(self, ids: list[int], begin: int, size: int) -> NDArray[np.float32] | None:
        kv = self._loaded.slots.idle()
        chunk = ids[begin : begin + size]
        if begin == 0:
            kv.clear()
        # another caller may have used the cache in between
        elif kv.tokens != ids[:begin] and not kv.compute(ids[kv.reuse(ids[: begin + 1]) : begin]):
            return None
        if not kv.compute_all_logits(chunk):
            return None
        rows = kv.logits(len(chunk))
        kv.check_finite(rows)
        return np.array(rows)

    def embed(self, texts: Sequence[str | Sequence[int]], *, cancel: CancelFlag | None = None) -> NDArray[np.float32]:
        if isinstance(texts, str):
            raise InputError("embed takes a list of texts, not a single one")
        tokens = [
            self._checked_prompt(self.tokenize(text, must_fit=True, cancel=cancel) if isinstance(text, str) else text)
            for text in texts
        ]
        for ids in tokens:
            self._check_fits(ids)
        cancellation = self._remember(Cancellation(cancel))
        rows = np.empty((len(tokens), self._loaded.n_embd), np.float32)
        n_done = 0
        while n_done < len(tokens):
            found = self._native.call_until_cancelled(partial(self._embeddings_of, tokens[n_done:]), cancellation)
            if found is None:
                raise Cancelled("computing embeddings was stopped")
            rows[n_done : n_done + len(found)] = found
            n_done += len(found)
        return rows

    def _embeddings_of(self, texts: Sequence[list[int]]) -> list[NDArray[np.float32]] | None:
        """Embeddings of the first of ``texts``, as many as fit one turn; None if that was aborted."""
        kv = self._loaded.slots.idle(keeps_latest=True)
        kv.set_aside()
        began, rows = time.perf_counter(), []
        for ids in texts:
            mean = kv.mean_embedding(ids, self._loaded.n_embd, min(_LOGITS_BATCH, kv.n_batch))
            if mean is None:
                return None
            rows.append(mean / (np.linalg.norm(mean) or 1))
            if time.perf_counter() - began > _EMBEDDING_TURN_S:
                break
        return rows

    def compute_chunks(
        self, chunks: Sequence[Sequence[int]], first: int, *, cancel: CancelFlag | None = None
    ) -> Generator[ComputedPart, None, None]:
        n_tokens = max(map(len, chunks), default=0)
        if n_tokens > self.n_ctx:
            raise ContextFullError(f"a chunk has {n_tokens} tokens and the context holds {self.n_ctx}")
        for chunk in chunks:
            self._vocabulary.check_tokens(chunk)
        return self._chunk_parts(chunks, n_tokens, first, cancel)

    def _chunk_parts(
        self, chunks: Sequence[Sequence[int]], n_tokens: int, first: int, cancel: CancelFlag | None
    ) -> Generator[ComputedPart, None, None]:
        cancellation, n_batch = self._remember(Cancellation(cancel)), self._loaded.cache.n_batch
        n_seq = min(self._context_options.n_seq_max, max(1, n_batch // max(n_tokens, 1)))
        rows = partial(self._chunk_rows, cancellation)
        try:
            for group, begin, end in batches(len(chunks), n_tokens, n_seq, n_batch):
                batch = SideBySide(self._api, [chunks[i][begin:end] for i in group], begin, first)
                compute = partial(self._loaded.cache.compute_chunks, batch, cancellation)
                if not self._native.call_until_cancelled(compute, cancellation):
                    return
                yield ComputedPart(group, begin, end, first, rows)
        finally:
            # a caller that cancelled does not wait for this; the cache empties itself for the next one
            if not self._native.closed and not cancellation.aborted:
                self.forget()

    def _chunk_rows(self, owner: Cancellation, at: int, n: int) -> NDArray[np.float32]:
        def copied() -> NDArray[np.float32]:
            kv = self._loaded.cache
            kv.check_chunks(owner)
            if not n:
                return np.empty((0, self.n_vocab), np.float32)
            rows = kv.logits(at + n)[at:]
            kv.check_finite(rows)
            return np.array(rows)

        return self._native.call(copied)

    # ---- the context

    def set_context(self, options: ContextOptions) -> None:
        options = self._settled(options)
        self._native.call(lambda: self._loaded.set_context(options))
        self._context_options = options
        self.n_ctx = self._loaded.cache.n_ctx

    @contextmanager
    def observed(self, observer: TensorObserver, *, on_token: TokenFilter | None = None) -> Iterator[None]:
        self._native.call(lambda: self._observe(observer, on_token))
        try:
            yield
        finally:
            if not self._native.closed:
                self._native.call(lambda: self._observe(None, None))

    def _observe(self, observer: TensorObserver | None, on_token: TokenFilter | None) -> None:
        if observer is not None and self._loaded.observer is not None:
            raise EngineError("the graph of this engine is being observed already")
        self._loaded.on_token = None
        self._loaded.observe(observer)
        self._loaded.on_token = on_token

    # ---- sessions

    def save_session(self, path: StrPath, tokens: Sequence[int] | None = None, note: str = "") -> int:
        ids = None if tokens is None else self._checked_prompt(tokens)
        if ids is not None:
            self._check_fits(ids)
        state = self._native.call(lambda: self._session_state(ids))
        write_session(user_path(path), state, self._session_facts(), note)
        return len(state.tokens)

    def _session_state(self, ids: list[int] | None) -> SavedState:
        kv = self._loaded.slots.idle()
        if ids is not None and not kv.compute_prompt(ids[kv.reuse(ids) :]):
            raise EngineError("saving the session was cancelled from another thread")
        if not kv.tokens:
            raise EngineError(f"{self.path}: nothing has been computed yet that could be kept")
        return kv.state()

    def load_session(self, path: StrPath) -> tuple[tuple[int, ...], str]:
        state, note = read_session(user_path(path), self._session_facts(), self.n_ctx)
        self._vocabulary.check_tokens(state.tokens)

        def restore() -> None:
            kv = self._loaded.slots.idle()
            kv.set_aside()
            kv.restore(state)

        self._native.call(restore)
        return state.tokens, note

    def _session_facts(self) -> SessionFacts:
        return SessionFacts.of(self._model, self._context_options, self._offload_options)

    # ---- functions of the caller

    def apply(
        self, function: Callable[Concatenate[LocalEngine, P], ResultT], *arguments: P.args, **keywords: P.kwargs
    ) -> ResultT:
        return function(self, *arguments, **keywords)

    def iterate(
        self, function: Callable[..., Iterator[ResultT]], *arguments: Any, cancel: CancelFlag | None = None
    ) -> Iterator[ResultT]:
        return function(self, *arguments, cancel=cancel)

    # ---- for a watch over the native thread

    @property
    def activity(self) -> Activity:
        """What the native thread does now. May be asked from any thread, and does not wait."""
        given_tokens = n_batches = 0
        with contextlib.suppress(EngineError):
            cache = self._loaded.cache
            given_tokens, n_batches = cache.given_tokens, cache.n_returned
        return Activity(self._native.is_busy, given_tokens, n_batches)

    def wait_until_free(self) -> None:
        """Wait until every earlier call has left llama.cpp, cancelled ones too. Raises EngineError once closed."""
        self._native.call(lambda: None)

    # ---- the end

    @property
    def closed(self) -> bool:
        return self._native.closed

    def close(self) -> None:
        for name in ("_texts", "_native"):
            thread: NativeThread | None = getattr(self, name, None)
            if thread is not None:
                thread.close()

    def __del__(self) -> None:
        self.close()
