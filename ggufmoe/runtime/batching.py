"""Several answers computed in one batch: each step has one token of every answer, and a part of a prompt.

Owns which answers take part in a step and in which order. ``slots`` says where their tokens are, ``generation`` what
each of them draws and when it ends. Steps are made in one job of the native thread until another job waits, which then
has its turn between two steps.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Sequence

from ggufmoe.errors import ContextFullError, EngineError, own_copy
from ggufmoe.runtime.events import FinishReason
from ggufmoe.runtime.generation import Generation
from ggufmoe.runtime.kvcache import ABORTED, NO_ROOM, WORTH_KEEPING_TOKENS, KVCache, common_prefix
from ggufmoe.runtime.loading import LoadedModel
from ggufmoe.runtime.nativethread import NativeThread, SharedCancellation
from ggufmoe.runtime.slots import Slot, Slots, TextPart

_PROMPT_SHARE_S = 0.5
"""Longest time that a part of a prompt may take while other answers go on: their readers wait as long."""
_FIRST_SHARE_TOKENS = 128
"""The part of a prompt before it is known how fast prompts are computed."""
_SHARE_STEP_TOKENS = 16
_TILE_TOKENS = 64
"""llama.cpp's attention on the CPU takes a quarter to a third less time for a token in batches of so many or more
(``GGML_FA_TILE_Q`` of ``ggml-cpu/common.h``)."""


class BatchScheduler:
    """Computes all answers that are submitted, as many at once as the context has slots.

    The answer that was asked for first comes first: it gets the next slot, its prompt is computed before other
    prompts, and it keeps its cells when they do not suffice for all. An answer that is far ahead of its reader leaves
    its slot to others. When it comes back it takes the place of a newer one. One whose tokens were lost meanwhile, and
    are computed again, keeps its slot until it has drawn some more: so every answer makes progress.
    """

    def __init__(self, native: NativeThread, loaded: LoadedModel) -> None:
        self._native = native
        self._loaded = loaded
        self._lock = threading.Lock()
        self._waiting: list[Generation] = []
        self._active: dict[Generation, Slot] = {}
        self._is_queued = False
        """Whether the native thread has a step in its queue or computes one."""
        self._lacks_cells = False
        """Whether an answer waits for cells that older answers hold."""
        self._suspects: list[Generation] = []
        """Answers of a batch that llama.cpp failed to compute: each is computed alone to find out which one fails."""
        self._share = _FIRST_SHARE_TOKENS

    def submit(self, answer: Generation) -> None:
        """Continue ``answer`` until it ends or is far ahead of its reader. Raises what ``NativeThread.submit`` raises.

        May be called from any thread.
        """
        with self._lock:
            self._waiting.append(answer)
            is_queued, self._is_queued = self._is_queued, True
        if is_queued:
            return
        try:
            self._native.submit(_Step(self))
        except BaseException as error:
            with self._lock:  # others may have come meanwhile, and rely on this step
                stranded = [other for other in self._waiting if other is not answer]
                self._waiting, self._is_queued = [], False
            for other in stranded:
                other.fail(own_copy(error))
            raise

    # ---- called in the native thread

    def run(self, cancellation: SharedCancellation) -> None:
        """Compute steps until another job waits, and queue the next if an answer is left.

        ``cancellation`` gets the answers in the step.
        """
        try:
            slots = self._loaded.slots
            slots.drop_chunks()
            self._admit(slots)
            while self._active:
                for answer in list(self._active):
                    self._goes_on(answer, answer.end_of)
                is_done = self._step(slots, cancellation)
                # a job that was aborted computes nothing more
                if not is_done or self._waiting or self._native.has_waiting_jobs or cancellation.is_requested():
                    break
            if not (self._active or self._waiting or self._native.has_waiting_jobs):
                slots.copy_ahead()
        except BaseException as error:  # without a context, for example; it belongs to the readers
            self.fail(error)
            return
        with self._lock:
            self._is_queued = bool(self._active or self._waiting)
            goes_on = self._is_queued
        if goes_on:
            try:
                self._native.submit(_Step(self))
            except EngineError as error:
                self.fail(error)

    def fail(self, error: BaseException) -> None:
        """End all answers with ``error``."""
        with self._lock:
            answers = [*self._active, *self._waiting]
            for slot in self._active.values():
                slot.owner = None
            self._active, self._waiting, self._suspects, self._is_queued = {}, [], [], False
        for answer in answers:
            answer.fail(own_copy(error))

    def _admit(self, slots: Slots) -> None:
        for answer, slot in list(self._active.items()):
            if not slots.has(slot, answer):  # another call has taken the slot, or made a new context
                del self._active[answer]
                self._wait(answer)
        self._lacks_cells = self._lacks_cells and bool(self._active)
        # an observer is told of one token after another
        n_slots = 1 if self._loaded.observer is not None else len(slots)
        while (first := self._first_waiting()) is not None:
            newer = [answer for answer, slot in self._active.items() if answer.ticket > first.ticket and slot.may_yield]
            is_full = len(self._active) >= n_slots
            if not newer and self._active and (is_full or self._lacks_cells):
                return
            if is_full:
                newest = max(newer, key=_ticket)
                self._leave(newest)
                self._wait(newest)
            else:
                self._place(first, newer, slots)

    def _first_waiting(self) -> Generation | None:
        """The answer that was asked for first of those that wait and have not ended."""
        with self._lock:
            self._waiting = [answer for answer in self._waiting if not answer.has_ended]
            return min(self._waiting, key=_ticket, default=None)

    def _place(self, answer: Generation, newer: Sequence[Generation], slots: Slots) -> None:
        """Give ``answer`` a slot. Where others have the cells that it needs, the newest of ``newer`` gives way."""
        with self._lock:
            self._waiting.remove(answer)
        if not answer.enter():
            return
        try:
            slot, n_held = slots.place(answer, answer.ticket, answer.tokens)
        except BaseException as error:
            if not (isinstance(error, EngineError) and self._active):
                answer.fail(error)  # it belongs to the reader
                return
            self._wait(answer)
            if newer:
                self._set_aside(max(newer, key=_ticket))
            else:
                self._lacks_cells = True
            return
        slot.has_lost = n_held < answer.n_computed
        answer.begin(n_held)
        self._active[answer] = slot

    def _set_aside(self, answer: Generation) -> None:
        """Let ``answer`` wait, and free its cells."""
        cache = self._active[answer].cache
        cache.set_aside()
        cache.empty()
        self._leave(answer)
        self._wait(answer)

    def _wait(self, answer: Generation) -> None:
        answer.wait_for_turn()
        with self._lock:
            self._waiting.append(answer)

    def _leave(self, answer: Generation) -> None:
        """Take ``answer`` out of its slot, for a text that waits for one."""
        slot = self._active.pop(answer)
        self._loaded.slots.release(slot)
        self._lacks_cells = False

    def _goes_on(self, answer: Generation, end: Callable[[KVCache], FinishReason | None]) -> bool:
        """Call ``end`` with the cache of ``answer``; false if the answer ends with its reason, or with its error."""
        cache = self._active[answer].cache
        try:
            reason = end(cache)
        except BaseException as error:  # it belongs to the reader
            self._leave(answer)
            answer.fail(error)
            return False
        if reason is not None:
            self._leave(answer)
            answer.finish(reason)
            cache.keep_text()
        return reason is None

    # ---- one step

    def _step(self, slots: Slots, cancellation: SharedCancellation) -> bool:
        """Compute one batch; whether that went well."""
        self._suspects = [answer for answer in self._suspects if answer in self._active]
        answers = self._suspects[:1] or sorted(self._active, key=_ticket)
        # after this, aborting the last of them stops the batch; before it, they are seen to be aborted
        cancellation.members = tuple(answer.cancellation for answer in answers)
        parts = self._parts([answer for answer in answers if not answer.cancellation.is_requested()])
        if not parts:
            return False
        if not slots.has_room(sum(len(part.tokens) for part in parts.values())):
            self._make_room(slots)
            return False
        cancellation.members = tuple(answer.cancellation for answer in parts)
        mark = self._loaded.log.mark()
        began = time.perf_counter()
        tells = any(answer.wants_routing and part.wants_logits for answer, part in parts.items())
        with slots.latest.tapped(tells):
            status = slots.decode(list(parts.values()))
        if status == 0:
            slots.latest.synchronize()
            seconds = time.perf_counter() - began
            self._learn_share(parts.values(), seconds)
            self._suspects = self._suspects[1:]
            for answer, part in parts.items():
                self._draw(answer, part, seconds)
        elif status == NO_ROOM:
            self._make_room(slots)
        elif status != ABORTED:
            self._find_failing(list(parts), slots.latest.failed(status, mark))
        return status == 0

    def _parts(self, answers: Sequence[Generation]) -> dict[Generation, TextPart]:
        """What the next batch computes of each of ``answers``: its newest token, or the next part of a prompt.

        A prompt waits while an earlier one is computed that begins as it does.
        """
        slots = self._active
        left: dict[Generation, Sequence[int]] = {}
        for answer in answers:
            tokens = self._next_tokens(answer)
            if len(tokens) > 1:
                prompts = [other.tokens for other, others in left.items() if len(others) > 1]
                if self._waits_for_beginning(answer, prompts):
                    continue
                tokens = self._next_tokens(answer)
            left[answer] = tokens
        n_single = sum(len(tokens) == 1 for tokens in left.values())
        cache = self._loaded.cache
        room = cache.n_ubatch
        if n_single:
            tile = _TILE_TOKENS - n_single
            share = tile if self._share < tile <= 2 * self._share else self._share
            room = max(1, min(share, cache.n_ubatch - n_single))
        parts = {}
        for answer, tokens in left.items():
            taken = tokens if len(tokens) == 1 else tokens[:room]
            room -= len(taken) if len(tokens) > 1 else 0
            if taken:
                is_end = len(slots[answer].cache.tokens) + len(taken) == len(answer.tokens)
                parts[answer] = TextPart(slots[answer], taken, wants_logits=is_end)
        return parts

    def _waits_for_beginning(self, answer: Generation, prompts: Sequence[Sequence[int]]) -> bool:
        """Whether one of ``prompts`` will have much more of the text of ``answer`` than there is now.

        Otherwise takes the longest beginning from another answer that has one.
        """
        wanted, slot = answer.tokens[:-1], self._active[answer]
        source, n_held = self._loaded.slots.source(slot, wanted)
        if any(common_prefix(prompt, wanted) >= n_held + WORTH_KEEPING_TOKENS for prompt in prompts):
            return True
        if source is not slot.cache:
            n_before = len(slot.cache.tokens)
            slot.cache.copy_beginning(source, n_held)
            answer.skip(slot.cache, n_before)
        return False

    def _next_tokens(self, answer: Generation) -> Sequence[int]:
        """The tokens that are to be computed; for models that forget, the last one of a prompt comes by itself."""
        cache = self._active[answer].cache
        tokens = answer.tokens[len(cache.tokens) :]
        if not answer.is_in_prompt or not cache.needs_checkpoint():
            return tokens
        if len(tokens) == 1:
            cache.take_checkpoint()
        return tokens[:-1] or tokens

    def _learn_share(self, parts: Collection[TextPart], seconds: float) -> None:
        n_tokens = sum(len(part.tokens) for part in parts)
        if n_tokens >= _SHARE_STEP_TOKENS + len(parts):
            steps = int(n_tokens * _PROMPT_SHARE_S / max(seconds, 1e-6)) // _SHARE_STEP_TOKENS
            self._share = max(1, steps) * _SHARE_STEP_TOKENS

    def _draw(self, answer: Generation, part: TextPart, seconds: float) -> None:
        answer.count(part.slot.cache, len(part.tokens), seconds)
        if not part.wants_logits:
            return
        part.slot.drawn_tokens += 1
        if self._goes_on(answer, answer.draw) and answer.is_ahead:
            self._leave(answer)
            answer.suspend()

    def _make_room(self, slots: Slots) -> None:
        """Free cells of a text that is not computed now; without one, the answer that was asked for last waits.

        An answer that may not yield yet keeps its cells, unless it is the one that got its slot last.
        """
        if slots.free_idle():
            return
        last_placed = max(self._active, key=lambda answer: self._active[answer].used)
        yielding = [answer for answer, slot in self._active.items() if slot.may_yield or answer is last_placed]
        newest = max(yielding, key=_ticket)
        if len(self._active) > 1:
            self._set_aside(newest)
            self._lacks_cells = True
            return
        n_ctx = self._active[newest].cache.n_ctx
        self._leave(newest)
        newest.fail(ContextFullError(f"the context of {n_ctx} tokens is full; ask for more with --ctx-size"))

    def _find_failing(self, answers: list[Generation], error: EngineError) -> None:
        if len(answers) > 1:
            self._suspects = answers
            return
        self._leave(answers[0])
        answers[0].fail(error)


def _ticket(answer: Generation) -> int:
    return answer.ticket


class _Step:
    """One step of all answers, as a job of the native thread."""

    def __init__(self, scheduler: BatchScheduler) -> None:
        self.cancellation = SharedCancellation()
        self._scheduler = scheduler

    def run(self) -> None:
        self._scheduler.run(self.cancellation)

    def fail(self, error: EngineError) -> None:
        self._scheduler.fail(error)
