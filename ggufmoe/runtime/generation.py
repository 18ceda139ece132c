"""One answer in the making: computed in the native thread, ahead of whoever reads it.

The answer runs ahead of its reader by a few tokens, so that neither waits for the other. A reader who falls behind does
not hold the engine: the answer is put aside, others are served, and it goes on when its reader comes back.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ggufmoe.errors import EngineError
from ggufmoe.runtime.events import Event, Finished, FinishReason, Timing, Token
from ggufmoe.runtime.inbox import Inbox
from ggufmoe.runtime.kvcache import KVCache
from ggufmoe.runtime.loading import LoadedModel
from ggufmoe.runtime.nativethread import LEAVE_S, WATCH_S, NativeThread, Turn
from ggufmoe.runtime.overflow import Overflow
from ggufmoe.runtime.sampling import Sampler, Sampling
from ggufmoe.runtime.textstream import TextStream
from ggufmoe.work import CancelFlag

MAX_AHEAD_TOKENS = 32
"""An answer that is so far ahead of its reader is put aside."""
_RESUME_TOKENS = 16

_State = Literal["idle", "queued", "running", "ended"]


@dataclass(frozen=True)
class Request:
    """What is to be continued, and how. ``prompt`` fits the context."""

    prompt: tuple[int, ...]
    settings: Sampling
    stop: tuple[str, ...]
    cancel: CancelFlag | None
    overflow: Overflow


class Generation:
    """An answer to ``request``. ``sampler`` becomes its own; ``close`` it, or read it to its end."""

    def __init__(self, native: NativeThread, loaded: LoadedModel, request: Request, sampler: Sampler) -> None:
        self.turn = Turn(request.cancel)
        self._native = native
        self._loaded = loaded
        self._request = request
        self._sampler = sampler
        self._n_logprobs = request.settings.logprobs
        self._text = TextStream(request.stop)
        self._tokens = list(request.prompt)
        self._clock = _Clock(prompt_tokens=len(self._tokens))
        self._inbox = Inbox()
        # reentrant: a collection of garbage while the native thread holds it may close this generation's reader
        self._lock = threading.RLock()
        self._state: _State = "idle"
        self._error: BaseException | None = None

    # ---- for the reader

    def read(self) -> Iterator[Event]:
        """The events, the last a ``Finished``. Closing the iterator ends the computing.

        Raises EngineError once the engine is closed, and what went wrong while computing.
        """
        n_given = 0
        try:
            while True:
                for event in self._take():
                    if self._native.closed:
                        raise EngineError(f"the engine of {self._native.name} has been closed")
                    if self._native.ask(self.turn) and not _is_cancelled(event):
                        event = self._cut_short()
                    if isinstance(event, Token):
                        n_given += 1
                        yield event
                    else:
                        yield _counted(event, n_given)
                        return
        finally:
            self.close()

    def close(self) -> None:
        """Stop computing, if that has not ended, and let go of what it needs."""
        self._native.abort(self.turn)
        with self._lock:
            if self._state != "running":
                self._end()

    def _take(self) -> list[Event]:
        """All events that are there, at least one."""
        self._native.check_outside()
        leave_at = math.inf
        while True:
            # before the events: whoever ends an answer has handed them over by then
            error, state = self._error, self._state
            is_stopped = self._native.ask(self.turn)
            events = self._inbox.take()
            with self._lock:
                if self._state == "idle" and not is_stopped:
                    self._submit()
            if events:
                return events
            if error is not None:
                raise error
            if is_stopped:
                leave_at = min(leave_at, time.monotonic() + LEAVE_S)
                if state != "running" or time.monotonic() >= leave_at:
                    self.close()
                    return [self._cancelled()]
            self._inbox.wait(WATCH_S)

    def _submit(self) -> None:
        self._native.submit(self)
        self._state = "queued"

    def _cut_short(self) -> Finished:
        """The end for a reader who has stopped and has not been given all that was computed."""
        self.close()
        leave_at = time.monotonic() + LEAVE_S
        while self._state == "running" and time.monotonic() < leave_at:
            self._inbox.take()
            self._inbox.wait(WATCH_S)
        return replace(self._cancelled(), text="")

    # ---- in the native thread

    def run(self) -> None:
        """Go on with the answer until it ends or is far ahead of its reader."""
        with self._lock:
            if self._state == "ended":
                return
            self._state = "running"
        try:
            reason = self._advance()
        except BaseException as error:  # it belongs to the reader
            self._stop(error)
            return
        if reason is None:
            self._pause()
        else:
            self._inbox.put(self._finished(reason))
            self._stop(None)

    def fail(self, error: EngineError) -> None:
        """The engine is closed before the answer's turn has come."""
        self._stop(error)

    def _pause(self) -> None:
        with self._lock:
            if self.turn.cancelled:
                self._end()
            else:  # the reader may have come by in the meantime
                self._state = "queued" if len(self._inbox) < _RESUME_TOKENS else "idle"
            goes_on = self._state == "queued"
        self._inbox.wake()
        if goes_on:
            try:
                self._native.submit(self)
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
        """Compute tokens; the reason if the answer ends, None if it is far ahead."""
        if not self._prepare(self._loaded.cache):
            return "cancelled"
        while len(self._inbox) < MAX_AHEAD_TOKENS:
            reason = self._limit() or self._next()
            if reason is not None:
                return reason
        return None

    def _prepare(self, cache: KVCache) -> bool:
        """Have the cache hold all tokens but those to be computed next; False if cancelled."""
        if self._clock.generated_tokens:
            n = cache.reuse(self._tokens)
            return cache.feed(self._tokens[n:-1])
        with self._clock.prompt():
            self._clock.cached_tokens = n = cache.reuse(self._tokens)
            done = cache.feed(self._tokens[n:])
            cache.synchronize()
        if not done:
            self._clock.prompt_tokens = max(n, len(cache.tokens))
        return done

    def _limit(self) -> FinishReason | None:
        if self._clock.generated_tokens == self._request.settings.n_predict:
            return "length"
        if self.turn.is_stopped():
            return "cancelled"
        cache = self._loaded.cache
        # the newest token is not in the cache yet
        if self._clock.generated_tokens and len(cache.tokens) >= cache.n_ctx:
            return self._make_room(cache)
        return None

    def _make_room(self, cache: KVCache) -> FinishReason | None:
        if self._request.overflow.policy == "error":
            return "context"
        begin, n = self._request.overflow.cut(len(self._tokens), cache.n_ctx)
        del self._tokens[begin : begin + n]
        if cache.drop(begin, n):
            return None
        n = cache.reuse(self._tokens)
        return None if cache.feed(self._tokens[n:-1]) else "cancelled"

    def _next(self) -> FinishReason | None:
        """Compute the newest token and draw the one after it."""
        clock, loaded = self._clock, self._loaded
        start = time.perf_counter()
        if clock.generated_tokens:
            if not loaded.cache.feed(self._tokens[-1:]):
                return "cancelled"
            clock.evaluated_tokens += 1
        token = self._sampler.sample(loaded.cache)
        piece, ends = loaded.vocabulary.drawn(token)
        now = time.perf_counter()
        clock.generation_s += now - start
        if ends:
            return "stop"
        clock.generated_tokens += 1
        self._tokens.append(token)
        logprob, alternatives = (None, ()) if self._n_logprobs is None else self._logprobs(token, self._n_logprobs)
        event = Token(self._text.push(piece), token, logprob, alternatives, now - clock.began_at)
        self._inbox.put(event if loaded.on_token is None else loaded.on_token(event))
        return "stop" if self._text.stopped else None

    def _logprobs(self, token: int, n: int) -> tuple[float, tuple[tuple[int, float], ...]]:
        """The token's, and the ``n`` likeliest ones with theirs."""
        logits = self._loaded.cache.last_logits().astype(np.float64)
        logits -= logits.max()
        logits -= np.log(np.exp(logits).sum())
        best = np.argsort(-logits, kind="stable")[:n] if n else ()
        return float(logits[token]), tuple((int(i), float(logits[i])) for i in best)

    def _cancelled(self) -> Finished:
        """The end for a reader who has stopped, and closed it."""
        if self._state != "running" and self._clock.began_at:
            return self._finished("cancelled")
        timing = self._clock.timing()
        if not timing.generated_tokens:  # it was not begun, or how far it has come is not known before it is left
            timing = replace(timing, prompt_tokens=timing.cached_tokens)
        return Finished("", "cancelled", timing, self._request.settings.seed)

    def _finished(self, reason: FinishReason) -> Finished:
        return Finished(self._text.flush(), reason, self._clock.timing(), self._request.settings.seed)


def _is_cancelled(event: Event) -> bool:
    return isinstance(event, Finished) and event.reason == "cancelled"


def _counted(last: Finished, n_given: int) -> Finished:
    """An answer that was stopped has as many tokens as were given out."""
    return replace(last, timing=replace(last.timing, generated_tokens=n_given)) if _is_cancelled(last) else last


@dataclass
class _Clock:
    """Counts and times one generation, without the time that its reader takes."""

    prompt_tokens: int
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
