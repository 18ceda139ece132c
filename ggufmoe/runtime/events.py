"""The events of an answer: a ``Token`` for each new token, then one ``Finished``.

In a conversation, events for reasoning and tool calls come between them. Joining the ``text`` of all events gives the
answer. Events are plain data that can be pickled; terminal, server and
library all use them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Literal

if TYPE_CHECKING:
    from ggufmoe.native.router_tap import TokenRouting

FinishReason = Literal["stop", "length", "context", "cancelled"]
"""stop: the model ended its answer, or a stop string came; length: ``n_predict`` tokens; context: no room is left;
cancelled: the caller asked to stop."""


@dataclass(frozen=True)
class Timing:
    """Token counts and times of one answer.

    ``cached_tokens`` of the ``prompt_tokens`` were in the KV cache already; of a prompt that was cancelled, only tokens
    that were computed count. Computing the prompt also gives the first of the ``generated_tokens``, so
    ``evaluated_tokens``, those computed one by one within ``generation_s``, may be one fewer. Not counted is the time
    spent waiting for the reader or for other callers, and restoring the cache after another answer.
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


NO_TIMING = Timing(0, 0, 0.0, 0, 0, 0.0)
"""Of an answer that was cancelled before its prompt was complete."""


def _rate(n_tokens: int, seconds: float) -> float:
    return n_tokens / seconds if seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Token:
    """One new token.

    ``text`` may be empty: the bytes of one character may come in several tokens, and text that could become a stop
    string is held back.
    """

    text: str
    token_id: int
    logprob: float | None = None
    """Natural logarithm of the token's probability before any sampling, if ``SamplingOptions.logprobs`` is set."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """(token id, logprob) of the ``SamplingOptions.logprobs`` likeliest tokens at this place, the likeliest first."""
    elapsed_s: float = field(default=0.0, compare=False)
    """Seconds since the computing of this answer began."""


@dataclass(frozen=True)
class RoutedToken(Token):
    """A new token, and which experts were at work in the step whose logits it was drawn from.

    That is the step whose input was the token before it: for the first token of an answer, the last one of the prompt.
    """

    expert_weights: tuple[float, ...] = ()
    """Share of each expert in the weight of all that ran, mean over the layers; sums to one."""
    layers: tuple[tuple[tuple[int, float], ...], ...] = ()
    """For each layer with experts, those that ran, the likeliest first, with what their outputs were multiplied by."""

    @classmethod
    def of(cls, token: Token, routing: TokenRouting, n_expert: int) -> RoutedToken:
        """``token`` with the routing of its step in a model with ``n_expert`` experts."""
        layers = tuple(
            tuple(zip(chosen, weights, strict=True))
            for chosen, weights in zip(routing.chosen.tolist(), routing.weights.tolist(), strict=True)
        )
        shares = [0.0] * n_expert
        for layer in layers:
            total = sum(weight for _, weight in layer) or 1.0
            for expert, weight in layer:
                shares[expert] += weight / total / len(layers)
        return cls(
            token.text, token.token_id, token.logprob, token.alternatives, token.elapsed_s, tuple(shares), layers
        )


@dataclass(frozen=True)
class Finished:
    """The end of an answer: text that was still held back, the reason, times, and the seed that repeats the answer."""

    text: str
    reason: FinishReason
    timing: Timing
    seed: int


Event = Token | Finished


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A part of what a model thinks before it answers. It comes beside the Token events, whose ``text`` lacks it."""

    reasoning: str
    text: ClassVar[str] = ""
    """The part of the answer in this event: none."""


@dataclass(frozen=True, slots=True)
class ToolCallBegun:
    """The model begins to call a tool; ``index`` counts the calls of one answer from 0."""

    index: int
    name: str
    text: ClassVar[str] = ""


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """A part of the arguments of call ``index``; together they are a JSON object, unless the answer was cut off."""

    index: int
    arguments: str
    text: ClassVar[str] = ""


ChatEvent = Token | Reasoning | ToolCallBegun | ToolCallArguments | Finished
"""What an answer to a conversation consists of."""
