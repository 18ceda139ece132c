"""What a generation yields: a ``Token`` for each new token, then one ``Finished``.

Joining the ``text`` of all events gives the answer. These are plain data for every door (terminal, server, library) and
for other processes: they can be pickled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "context", "cancelled"]
"""stop: the model ended its answer, or a stop string came; length: ``n_predict`` tokens; context: no room is left;
cancelled: the caller asked to stop."""


@dataclass(frozen=True)
class Timing:
    """How long one answer took.

    ``cached_tokens`` of the ``prompt_tokens`` were in the KV cache already; of a prompt that was stopped, only what was
    computed counts. The first of the ``generated_tokens`` falls out of computing the prompt, so ``evaluated_tokens``,
    those computed one by one within ``generation_s``, may be one fewer. Time spent waiting for the reader or for other
    callers of the engine is not counted, nor what it took to come back to this answer after another one.
    """

    prompt_tokens: int
    cached_tokens: int
    prompt_s: float
    generated_tokens: int
    evaluated_tokens: int
    generation_s: float

    @property
    def prompt_tokens_per_s(self) -> float:
        """Prompt tokens computed (not reused) per second; 0.0 when there were none."""
        return _rate(self.prompt_tokens - self.cached_tokens, self.prompt_s)

    @property
    def generated_tokens_per_s(self) -> float:
        """Tokens computed one by one per second; 0.0 when there were none."""
        return _rate(self.evaluated_tokens, self.generation_s)


def _rate(n_tokens: int, seconds: float) -> float:
    return n_tokens / seconds if seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Token:
    """One new token. ``text`` may be empty: a character's bytes may be spread over tokens, and what could become a stop
    string is held back."""

    text: str
    token_id: int
    logprob: float | None = None
    """Natural logarithm of the probability that the model gave this token, before any sampling; if it was asked for."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """(token id, logprob) of the likeliest tokens at this place, the likeliest first; if they were asked for."""
    elapsed_s: float = field(default=0.0, compare=False)
    """Seconds since computing this answer began."""


@dataclass(frozen=True)
class Finished:
    """The end: text that was still held back, why it ended, how long it took and the seed that gives it again."""

    text: str
    reason: FinishReason
    timing: Timing
    seed: int


Event = Token | Finished
