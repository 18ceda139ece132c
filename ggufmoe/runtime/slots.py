"""The sequences of one context: which answer has which, where a prompt is placed, what gives way when cells are full.

All sequences share the cells of one KV cache. A beginning that two texts have in common is computed once and its cells
are used by both. Everything here runs in the engine's native thread, except ``latest``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ggufmoe.runtime.chunkbatch import StepBatch
from ggufmoe.runtime.kvcache import WORTH_KEEPING_TOKENS, ContextState, KVCache

_TURN_TOKENS = 16
"""Tokens that an answer draws before others may take its place again."""

_STEP_TOKENS = 256
"""llama.cpp's attention passes over cells in steps of so many."""


@dataclass(eq=False)
class Slot:
    """A sequence, and the answer that is computed in it."""

    cache: KVCache
    sequence: int
    owner: object | None = None
    ticket: int = 0
    """When the answer was asked for, among all answers."""
    used: int = 0
    """When the slot was taken or left the last time, among all slots."""
    drawn_tokens: int = 0
    """Tokens that the answer has drawn since it got the slot."""
    has_lost: bool = False
    """Whether tokens of the answer, computed before it got the slot, have to be computed again."""

    @property
    def may_yield(self) -> bool:
        """Whether the answer may lose the slot, and its cells, to one that was asked for first.

        What it has to compute again it must not lose again before it has come on: answers that take turns could
        otherwise compute their prompts for ever.
        """
        return not self.has_lost or self.drawn_tokens >= _TURN_TOKENS


@dataclass(frozen=True)
class TextPart:
    """Tokens that continue the text of ``slot``; logits are computed after the last one if ``wants_logits``."""

    slot: Slot
    tokens: Sequence[int]
    wants_logits: bool


class Slots:
    """The slots of one context; ``caches`` has the KV cache of each sequence, which have ``shared`` in common."""

    def __init__(self, api: Any, caches: Sequence[KVCache], shared: ContextState) -> None:
        self._shared = shared
        self._batch = StepBatch(api, caches[0].n_batch)
        self._slots = [Slot(cache, sequence) for sequence, cache in enumerate(caches)]
        self._n_uses = 0
        self.latest: KVCache = caches[0]
        """The cache that was used last."""
        shared.give_way = self._give_way

    @property
    def caches(self) -> list[KVCache]:
        """The cache of each slot, in the order in which they were used."""
        return [slot.cache for slot in sorted(self._slots, key=lambda slot: slot.used)]

    def __len__(self) -> int:
        return len(self._slots)

    def has(self, slot: Slot, owner: object) -> bool:
        """Whether ``slot`` is one of these and still belongs to ``owner``."""
        return slot.owner is owner and slot in self._slots

    # ---- placing

    def idle(self, *, keeps_latest: bool = False) -> KVCache:
        """A cache that no answer uses: the one used last, if it is idle. Without one, the newest answer loses its slot.

        With ``keeps_latest`` it is the one that was unused for longest, for a text that nothing will continue.

        That answer finds its tokens changed by whoever uses the cache, and is placed again.
        """
        slots = [slot for slot in self._slots if slot.owner is None]
        if not slots:
            newest = max(self._slots, key=_first_to_yield)
            newest.cache.set_aside()
            newest.owner = None
            slots = [newest]
        preferred = [slot for slot in slots if slot.cache is self.latest and not keeps_latest]
        return self._used((preferred or [_longest_unused(slots)])[0]).cache

    def place(self, owner: object, ticket: int, text: Sequence[int]) -> tuple[Slot, int]:
        """A slot for ``owner``, and the tokens of ``text`` that it holds already. One of the slots must be idle.

        Takes the slot whose text is the longest beginning of ``text``. Where that text goes on otherwise or is being
        continued, its beginning is copied to the slot that was unused for longest. What the slot held is set aside.

        Raises EngineError if the text was set aside and other texts have the cells that it needs.
        """
        wanted = text[:-1]
        n_common = {slot: slot.cache.n_held(wanted) for slot in self._slots}
        idle = [slot for slot in self._slots if slot.owner is None]
        source = max(self._slots, key=lambda slot: n_common[slot])
        whole = [slot for slot in idle if len(slot.cache.tokens) - n_common[slot] < WORTH_KEEPING_TOKENS]
        slot = max(whole, key=lambda slot: (n_common[slot], -slot.used), default=_longest_unused(idle))
        if n_common[source] >= n_common[slot] + WORTH_KEEPING_TOKENS:
            slot = _longest_unused([one for one in idle if one is not source] or idle)
            if slot is not source:
                if len(slot.cache.tokens) - n_common[slot] >= WORTH_KEEPING_TOKENS:
                    slot.cache.set_aside()
                slot.cache.copy_beginning(source.cache, n_common[source])
        # before its cache asks for cells: an owner takes none of another answer
        slot.owner, slot.ticket, slot.drawn_tokens, slot.has_lost = owner, ticket, 0, False
        try:
            n_held = slot.cache.reuse(text)
        except BaseException:
            slot.owner = None
            raise
        self._used(slot)
        if not any(other.owner for other in self._slots if other is not slot):  # nobody waits for the copies
            self._clear_idle(_STEP_TOKENS - 1 - (len(text) - 1) % _STEP_TOKENS)
        return slot, n_held

    def source(self, slot: Slot, wanted: Sequence[int]) -> tuple[KVCache, int]:
        """The cache that has the longest beginning of ``wanted`` by now, and its length.

        That of ``slot``, which has nothing else, unless another one has much more.
        """
        held = {other.cache: other.cache.n_held(wanted) for other in self._slots if other is not slot}
        n_own = len(slot.cache.tokens)
        best = max(held, key=lambda cache: held[cache], default=None)
        if best is None or held[best] < n_own + WORTH_KEEPING_TOKENS:
            return slot.cache, n_own
        return best, held[best]

    def release(self, slot: Slot) -> None:
        """The answer of ``slot`` has ended or waits; its text stays until the slot or its cells are needed."""
        slot.owner = None
        self._used(slot)
        self._clear_idle(_STEP_TOKENS)

    def _used(self, slot: Slot) -> Slot:
        self._n_uses += 1
        slot.used = self._n_uses
        self.latest = slot.cache
        return slot

    # ---- room

    def free_idle(self, asking: KVCache | None = None) -> bool:
        """Set the text of the idle slot that was unused for longest aside; False if no idle slot has a text."""
        held = [slot for slot in self._slots if not slot.owner and slot.cache.tokens and slot.cache is not asking]
        if not held:
            return False
        cache = _longest_unused(held).cache
        cache.set_aside()
        cache.empty()
        return True

    def copy_ahead(self) -> None:
        """Copy a short text that was used last, while nothing is computed: the next prompt need not wait for the copy.

        The text stays where it is, for a prompt that continues it.
        """
        cache = self.latest
        if len(self._slots) > 1 and len(cache.tokens) <= _STEP_TOKENS and self._may_copy(cache):
            cache.set_aside()

    def _may_copy(self, cache: KVCache) -> bool:
        """Whether as many copies of its text as there are slots would take no more than half of the memory."""
        return cache.state_bytes() * 2 * len(self._slots) <= cache.saved.max_bytes

    def _clear_idle(self, n_allowed: int) -> None:
        """Set texts of idle slots aside while they have more cells than ``n_allowed``.

        Attention passes over all cells that are in use, and takes longer for each step that answers do not need.
        The text that was used last stays, and each one of which as many copies as slots would take half of the memory.
        """
        if self._shared.shift_pending:  # no copies can be made
            return

        def own_cells(slot: Slot) -> int:
            return len(slot.cache.tokens) - slot.cache.n_shared(self._shared.caches)

        while sum(own_cells(slot) for slot in self._slots if not slot.owner) > n_allowed:
            cache = _longest_unused([slot for slot in self._slots if not slot.owner and own_cells(slot)]).cache
            if cache is self.latest or not self._may_copy(cache):
                return
            cache.set_aside()
            cache.empty()

    def _give_way(self, asking: KVCache) -> bool:
        """Free cells for ``asking``. An answer takes none of another answer; other calls do, of the newest first."""
        if self.free_idle(asking):
            return True
        if any(slot.owner for slot in self._slots if slot.cache is asking):
            return False
        held = [slot for slot in self._slots if slot.cache.tokens and slot.cache is not asking]
        if not held:
            return False
        newest = max(held, key=_first_to_yield)
        newest.owner = None
        newest.cache.set_aside()
        newest.cache.empty()
        return True

    def has_room(self, n_tokens: int) -> bool:
        """Whether there may be cells for ``n_tokens`` more; false is certain."""
        return self._shared.has_room(n_tokens)

    def set_aside(self) -> None:
        """Copy all texts to the host's memory, as far as there is room."""
        for slot in self._slots:
            slot.cache.set_aside()

    def drop_chunks(self) -> None:
        """Empty the context if it holds chunks."""
        if self._shared.chunks_of is not None:
            self.latest.empty_all()

    # ---- computing

    def decode(self, parts: Sequence[TextPart]) -> int:
        """Compute ``parts`` in one batch; llama.cpp's status, 0 for success.

        Then the ``row`` of each cache is that of its last token. After a failure each cache says what it holds.
        """
        rows = []
        for part in parts:
            position = len(part.slot.cache.tokens)
            self._batch.add(part.tokens, position, part.slot.sequence, wants_logits=part.wants_logits)
            rows.append(len(self._batch) - 1)
        sizes = [len(part.tokens) for part in parts]
        wanted = self._batch.wanted if self.latest.is_tapped else None
        self.latest.begin_batch(len(self._batch), sizes, wanted)
        status = self._batch.decode(self.latest.context)
        self._shared.n_returned += 1
        for part, row in zip(parts, rows, strict=True):
            if status:
                part.slot.cache.take_rest(part.tokens, status)
            else:
                part.slot.cache.tokens += part.tokens
                part.slot.cache.row = row
        if not status:
            self._shared.shift_pending = False
        return status


def _first_to_yield(slot: Slot) -> tuple[bool, int]:
    return slot.may_yield, slot.ticket


def _longest_unused(slots: Sequence[Slot]) -> Slot:
    """The empty slot, or the one that was used the longest time ago."""
    return min(slots, key=lambda slot: (bool(slot.cache.tokens), slot.used))
