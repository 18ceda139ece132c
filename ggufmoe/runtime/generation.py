"""One answer: computed in the native thread, alone or by a ``BatchScheduler``, ahead of its reader.

The answer runs ahead of its reader by a few tokens, so that neither waits for the other. A reader that falls behind
does not hold the engine: the answer is suspended, others are computed, and it continues when its reader returns.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import EngineError
from ggufmoe.runtime.events import Event, Finished, FinishReason, RoutedToken, Timing, Token
from ggufmoe.runtime.inbox import Inbox
from ggufmoe.runtime.kvcache import KVCache
from ggufmoe.runtime.loading import LoadedModel
from ggufmoe.runtime.nativethread import LEAVE_S, WATCH_S, Cancellation, NativeThread
from ggufmoe.runtime.overflow import Overflow
from ggufmoe.runtime.sampling import Sampler, Sampling
from ggufmoe.runtime.textstream import TextStream
from ggufmoe.work import CancelFlag

MAX_AHEAD_TOKENS = 32
"""An answer this many tokens ahead of its reader is suspended."""
_RESUME_TOKENS = 16
"""A suspended answer goes on at once if fewer tokens than this are still unread."""

_KEEP_EVERY_TOKENS = 64
"""After the first token and each time this many more, what was computed is kept on disk, if that is worth it."""

_State = Literal["idle", "queued", "running", "ended"]


@dataclass(frozen=True)
class GenerationRequest:
    """What to continue, and how. ``prompt`` fits the context."""

    prompt: tuple[int, ...]
    settings: Sampling
    stop: tuple[str, ...]
    cancel: CancelFlag | None
    overflow: Overflow
    shown: frozenset[int] = frozenset()
    """Control tokens that are part of the text."""
    routing: bool = False
    """Whether each token is to be a ``RoutedToken``."""


class Generation:
    """The answer to ``request``. It takes over ``sampler``; ``close`` it, or read it to its end.

    ``submit`` queues it, so that the native thread continues it: by ``run`` alone, or with other answers, in order of
    their ``ticket``.
    """

    def __init__(
        self,
        native: NativeThread,
        loaded: LoadedModel,
        request: GenerationRequest,
        sampler: Sampler,
        *,
        submit: Callable[[Generation], None] | None = None,
        ticket: int = 0,
    ) -> None:
        self.cancellation = Cancellation(request.cancel)
        self.ticket = ticket
        self.n_computed = 0
        """Tokens of the text that were computed when it was last counted."""
        self._submit: Callable[[Generation], None] = submit or native.submit
        self._native = native
        self._loaded = loaded
        self._request = request
        self._sampler = sampler
        self._text = TextStream(request.stop)
        self._tokens = list(request.prompt)
        self._watch = _Stopwatch()
        self._inbox = Inbox()
        # reentrant: a collection of garbage while the native thread holds it may close this generation's reader
        self._lock = threading.RLock()
        self._state: _State = "idle"
        self._error: BaseException | None = None

    # ---- called by the reader

    def read(self) -> Iterator[Event]:
        """The events, the last one a ``Finished``. Closing the iterator ends the computing.

        Raises EngineError once the engine is closed, and the exception that ended the computing.
        """
        n_given = 0
        try:
            while True:
                for event in self._wait_for_events():
                    self._native.check_usable()
                    if self._native.abort_if_requested(self.cancellation) and not _is_cancelled(event):
                        event = self._cut_short()
                    if isinstance(event, Token):
                        n_given += 1
                        yield event
                    else:
                        if _is_cancelled(event):  # it counts the tokens that its reader got
                            event = replace(event, timing=replace(event.timing, generated_tokens=n_given))
                        yield event
                        return
        finally:
            self.close()

    def close(self) -> None:
        """Stop computing, if that has not ended, and free the sampler. Does nothing in a forked process."""
        if self._native.is_forked:
            return
        self._native.abort(self.cancellation)
        with self._lock:
            if self._state != "running":
                self._end()

    def _wait_for_events(self) -> list[Event]:
        """All unread events, at least one; submits the answer to the native thread when it is idle."""
        self._native.check_not_native_thread()
        self._native.check_not_forked()  # nobody computes the answer there, and its locks may be held for ever
        leave_at = math.inf
        while True:
            # read before the events: the native thread puts the last event in before it sets these
            error, state = self._error, self._state
            is_cancelled = self._native.abort_if_requested(self.cancellation)
            events = self._inbox.take()
            with self._lock:
                if self._state == "idle" and not is_cancelled:
                    self._submit(self)
                    self._state = "queued"
            if events:
                return events
            if error is not None:
                raise error
            if is_cancelled:
                leave_at = min(leave_at, time.monotonic() + LEAVE_S)
                if state != "running" or time.monotonic() >= leave_at:
                    self.close()
                    return [self._cancelled()]
            self._inbox.wait(WATCH_S)

    def _cut_short(self) -> Finished:
        """The last event for a reader that cancelled before it got all tokens that were computed."""
        self.close()
        leave_at = time.monotonic() + LEAVE_S
        while self._state == "running" and time.monotonic() < leave_at:
            self._inbox.take()
            self._inbox.wait(WATCH_S)
        return replace(self._cancelled(), text="")

    # ---- called in the native thread

    def run(self) -> None:
        """Continue the answer until it ends or is ``MAX_AHEAD_TOKENS`` ahead of its reader."""
        if not self.enter():
            return
        try:
            reason = self._advance()
        except BaseException as error:  # it belongs to the reader
            self.fail(error)
            return
        if reason is None:
            self.suspend()
        else:
            self.finish(reason)
            self._loaded.cache.keep_text()

    def enter(self) -> bool:
        """Call before computing; false if the answer has ended meanwhile."""
        with self._lock:
            if self._state == "ended":
                return False
            self._state = "running"
            return True

    def finish(self, reason: FinishReason) -> None:
        """End: the reader gets a ``Finished``."""
        self._inbox.put(self._finished(reason))
        self._stop(None)

    def fail(self, error: BaseException) -> None:
        """End with ``error``, which the reader gets: no more is computed."""
        self._stop(error)

    def wait_for_turn(self) -> None:
        """Back to the queue: what the answer needs is used by others."""
        with self._lock:
            if self.cancellation.aborted:
                self._end()
            else:
                self._state = "queued"
        self._inbox.wake()

    def suspend(self) -> None:
        """Stop computing until the reader asks for more."""
        with self._lock:
            if self.cancellation.aborted:
                self._end()
            else:  # the reader may have caught up in the meantime
                self._state = "queued" if len(self._inbox) < _RESUME_TOKENS else "idle"
            continues = self._state == "queued"
        self._inbox.wake()
        if continues:
            try:
                self._submit(self)
            except EngineError as error:
                self._stop(error)

    def _stop(self, error: BaseException | None) -> None:
        with self._lock:
            self._error = error
            self._end()
        self._inbox.wake()

    def _end(self) -> None:
        self._state = "ended"
        self._sampler.close()

    def _advance(self) -> FinishReason | None:
        """Compute tokens; the reason when the answer has ended, None when it is far enough ahead."""
        cache = self._loaded.slots.idle()  # in a context that was made since, another answer may use the latest one
        with cache.tapped(self.wants_routing):
            if not self._prepare(cache):
                return "cancelled"
            while not self.is_ahead:
                reason = self._limit(cache) or self._next_token(cache)
                if reason is not None:
                    return reason
        return None

    def _prepare(self, cache: KVCache) -> bool:
        """Have the cache hold all tokens that come before the next step; False if that was cancelled."""
        if self._watch.generated_tokens:
            n = cache.reuse(self._tokens)
            return cache.compute(self._tokens[n:-1])
        with self._watch.prompt():
            self._watch.cached_tokens = self._watch.prompt_tokens = n = cache.reuse(self._tokens)
            done = cache.compute_prompt(self._tokens[n:])
            cache.synchronize()
        self._watch.prompt_tokens = max(n, len(cache.tokens))
        return done

    @property
    def is_ahead(self) -> bool:
        """Whether the reader has to catch up before more is computed."""
        return len(self._inbox) >= MAX_AHEAD_TOKENS

    def _limit(self, cache: KVCache) -> FinishReason | None:
        """Why no further token may be computed, if that is so."""
        if self._watch.generated_tokens == self._request.settings.n_predict:
            return "length"
        if self.cancellation.is_requested():
            return "cancelled"
        # the newest token is not in the cache yet
        if not self._watch.generated_tokens or len(cache.tokens) < cache.n_ctx:
            return None
        if not self._makes_room(cache, lambda n: cache.reuse(self._tokens)):
            return "context"
        return None if cache.compute(self._tokens[len(cache.tokens) : -1]) else "cancelled"

    def _makes_room(self, cache: KVCache, keep: Callable[[int], int]) -> bool:
        """Drop tokens from a full context as ``overflow`` says; false if it says not to.

        Where ``cache`` cannot drop them, ``keep`` is called with the number of tokens before them.
        """
        if self._request.overflow.policy == "error":
            return False
        n_tokens = len(self._tokens)
        begin, n = self._request.overflow.cut(n_tokens, cache.n_ctx)
        del self._tokens[begin : begin + n]
        if len(cache.tokens) < n_tokens - 1 or not cache.drop(begin, n):
            keep(begin)
        return True

    def _next_token(self, cache: KVCache) -> FinishReason | None:
        """Compute the newest token and draw the one after it."""
        start = time.perf_counter()
        if self._watch.generated_tokens:
            if not cache.compute(self._tokens[-1:]):
                return "cancelled"
            self._watch.evaluated_tokens += 1
        return self._draw(cache, start)

    def _draw(self, cache: KVCache, start: float) -> FinishReason | None:
        """Draw a token from the newest logits of ``cache``, whose computing began at ``start``."""
        watch, loaded = self._watch, self._loaded
        token = self._sampler.sample(cache)
        piece, ends = loaded.vocabulary.drawn(token)
        now = time.perf_counter()
        watch.generation_s += now - start
        if ends:
            return "stop"
        if token in self._request.shown:
            piece = loaded.vocabulary.piece(token, special=True)
        watch.generated_tokens += 1
        self._tokens.append(token)
        logprob, alternatives = self._logprobs(cache, token)
        event = Token(self._text.push(piece), token, logprob, alternatives, now - watch.began_at)
        if self.wants_routing:
            event = RoutedToken.of(event, cache.routing(), loaded.n_expert)
        self._inbox.put(event if loaded.on_token is None else loaded.on_token(event))
        if watch.generated_tokens % _KEEP_EVERY_TOKENS == 1:  # after the first: the reader need not wait for it
            cache.keep_text()
        return "stop" if self._text.stopped else None

    def _logprobs(self, cache: KVCache, token: int) -> tuple[float | None, tuple[tuple[int, float], ...]]:
        """The token's logprob and the ``settings.logprobs`` likeliest tokens with theirs; None and () if not wanted."""
        n = self._request.settings.logprobs
        if n is None:
            return None, ()
        return logprob_of(token, cache.last_logits(), n)

    # ---- called in the native thread by a scheduler, between ``enter`` and one of the ways out

    @property
    def tokens(self) -> Sequence[int]:
        """The text: prompt and answer, without what was dropped from a full context."""
        return self._tokens

    @property
    def is_in_prompt(self) -> bool:
        """Whether no token has been drawn yet."""
        return not self._watch.generated_tokens

    @property
    def wants_routing(self) -> bool:
        """Whether the steps in which tokens are drawn must be ``tapped``."""
        return self._request.routing

    @property
    def has_ended(self) -> bool:
        """Whether no more will be computed."""
        return self._state == "ended"

    def begin(self, n_cached: int) -> None:
        """Say that ``n_cached`` tokens of the text need not be computed. Counts for the first time only."""
        if not self._watch.began_at:
            self._watch.began_at = time.perf_counter()
            self._watch.cached_tokens = self._watch.prompt_tokens = n_cached

    def skip(self, cache: KVCache, n_computed: int) -> None:
        """Say that only ``n_computed`` of the tokens in ``cache`` were computed for this answer, or held when it began.

        The others come from another answer.
        """
        if not self._watch.generated_tokens:
            self._watch.cached_tokens += max(0, len(cache.tokens) - n_computed)
            self._watch.prompt_tokens = max(self._watch.prompt_tokens, len(cache.tokens))

    def end_of(self, cache: KVCache) -> FinishReason | None:
        """Why no further token may be computed, if that is so; drops tokens from a full context."""
        if self.cancellation.is_requested():
            if not self._watch.generated_tokens:  # a batch that was aborted may have come further than was counted
                self._watch.prompt_tokens = max(self._watch.prompt_tokens, len(cache.tokens))
            return "cancelled"
        if not self._watch.generated_tokens:
            return None
        if self._watch.generated_tokens == self._request.settings.n_predict:
            return "length"
        # the newest token is not in the cache yet
        if len(self._tokens) <= cache.n_ctx:
            return None
        return None if self._makes_room(cache, cache.keep) else "context"

    def count(self, cache: KVCache, n_tokens: int, seconds: float) -> None:
        """Count a step in which the newest ``n_tokens`` of ``cache`` were computed.

        Computing tokens again after another answer had their cells counts for nothing.
        """
        watch = self._watch
        self.n_computed = n_held = len(cache.tokens)
        if not watch.generated_tokens:
            watch.prompt_s += seconds
            watch.prompt_tokens = max(watch.prompt_tokens, n_held)
        elif n_held == len(self._tokens):
            watch.generation_s += seconds / n_tokens
            watch.evaluated_tokens += 1

    def draw(self, cache: KVCache) -> FinishReason | None:
        """Draw the next token from the logits of ``cache``; why the answer ends there, if it does."""
        if self._watch.generated_tokens == self._request.settings.n_predict:
            return "length"
        return self._draw(cache, time.perf_counter())

    # ---- the last event

    def _cancelled(self) -> Finished:
        """The last event of an answer that was cancelled and closed."""
        if self._state != "running" and self._watch.began_at:
            return self._finished("cancelled")
        return Finished("", "cancelled", self._watch.timing(), self._request.settings.seed)

    def _finished(self, reason: FinishReason) -> Finished:
        return Finished(self._text.flush(), reason, self._watch.timing(), self._request.settings.seed)


def _is_cancelled(event: Event) -> bool:
    return isinstance(event, Finished) and event.reason == "cancelled"


@dataclass
class _Stopwatch:
    """Counts and times one generation, without the time that its reader takes."""

    prompt_tokens: int = 0
    """Tokens of the prompt that are known to be computed, or were in the cache."""
    cached_tokens: int = 0
    prompt_s: float = 0.0
    generated_tokens: int = 0
    evaluated_tokens: int = 0
    generation_s: float = 0.0
    began_at: float = 0.0

    @contextmanager
    def prompt(self) -> Iterator[None]:
        self.began_at = time.perf_counter()
        yield
        self.prompt_s = time.perf_counter() - self.began_at

    def timing(self) -> Timing:
        return Timing(
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            prompt_s=self.prompt_s,
            generated_tokens=self.generated_tokens,
            evaluated_tokens=self.evaluated_tokens,
            generation_s=self.generation_s,
        )


def logprob_of(token: int, logits: NDArray[np.float32], n_best: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The natural logarithm of the probability of ``token``, and the ``n_best`` likeliest tokens with theirs.

    ``logits`` has shape (n_vocab,).
    """
    scores = logits.astype(np.float64)
    scores -= scores.max()
    scores -= np.log(np.exp(scores).sum())
    best = np.argsort(-scores, kind="stable")[:n_best] if n_best else ()
    return float(scores[token]), tuple((int(i), float(scores[i])) for i in best)
