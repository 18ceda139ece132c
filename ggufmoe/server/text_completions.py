"""``/v1/completions``: texts or tokens to continue, and their continuations in OpenAI's objects."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from ggufmoe.options import SamplingOptions
from ggufmoe.runtime.enginelike import EngineLike
from ggufmoe.runtime.events import Finished, Timing, Token
from ggufmoe.runtime.generation import logprob_of
from ggufmoe.server.answers import (
    AnswerEvent,
    Completion,
    Echo,
    Spelling,
    Start,
    finish_reason,
    timings_of,
    told_number,
    usage_of,
)
from ggufmoe.server.apierror import ApiError, invalid
from ggufmoe.server.asked import CompletionRequest
from ggufmoe.server.chat_completions import EXACT_CHARS, check_room, with_seeds
from ggufmoe.server.modelhost import ServedModel
from ggufmoe.server.told_routing import check_routing, told_routing
from ggufmoe.work import CancelFlag

_DEFAULT_TOKENS = 16
"""Of OpenAI's completions, where ``max_tokens`` is not given."""


def text_completion(
    served: ServedModel, asked: CompletionRequest, model: str, cancel: CancelFlag | None = None
) -> Completion:
    """The completion that ``asked`` asks for; tokenizes its prompts. Raises ApiError and errors of ggufmoe.

    Clients know the model as ``model``. Raises Cancelled when ``cancel`` is set meanwhile.
    """
    engine = served.engine
    check_routing(engine, asked.routing_kind)
    n_predict = _DEFAULT_TOKENS if asked.max_tokens is None else asked.max_tokens
    sampling = asked.sampling(asked.logprobs, n_predict)
    prompts = [checked_tokens(engine, prompt, "prompt", cancel) for prompt in asked.prompt]
    return _TextCompletion(engine, asked, model, prompts, sampling)


def checked_tokens(
    engine: EngineLike,
    text: str | list[int],
    param: str,
    cancel: CancelFlag | None,
    *,
    parse_special: bool = True,
    may_cut: bool = True,
) -> list[int]:
    """The tokens of ``text``, which is the field ``param`` of a request. Raises ApiError if they cannot be computed.

    ``may_cut``: whether a text that is too long is cut, where the server does that.
    """
    if isinstance(text, str):
        must_fit = len(text) > EXACT_CHARS and not (may_cut and engine.overflow != "error")
        tokens = engine.tokenize(text, parse_special=parse_special, must_fit=must_fit, cancel=cancel)
    else:
        tokens = text
        if wrong := [token for token in tokens if token >= engine.n_vocab]:
            raise invalid(f"the model has {engine.n_vocab} tokens and none with the id {wrong[0]}", param)
    if not tokens:
        raise invalid("the prompt is empty: there is nothing to continue", param)
    check_room(engine, len(tokens), param, may_cut=may_cut)
    return tokens


class _TextCompletion:
    """The continuations that one request asks for, as chunks and as a whole."""

    has_named_events = False

    def __init__(
        self,
        engine: EngineLike,
        asked: CompletionRequest,
        model: str,
        prompts: Sequence[list[int]],
        sampling: SamplingOptions,
    ) -> None:
        self._engine = engine
        self._asked = asked
        self._spelling = Spelling(engine.piece)
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        chosen = with_seeds(sampling, asked.n)
        self.starts: Sequence[Start] = [
            partial(self._begin, text, tokens, one)
            for text, tokens in zip(asked.prompt, prompts, strict=True)
            for one in chosen
        ]
        self._texts: list[list[str]] = [[] for _ in self.starts]
        self._tokens: list[list[tuple[Token, int]]] = [[] for _ in self.starts]
        """Tokens whose probabilities are wanted, and where each begins in the text."""
        self._n_chars = [0] * len(self.starts)
        self._routing = [told_routing(asked.routing_kind, self._spelling) for _ in self.starts]
        self._last: list[Finished | None] = [None] * len(self.starts)

    def _begin(
        self, asked: str | list[int], prompt: list[int], sampling: SamplingOptions, cancel: CancelFlag
    ) -> Iterator[AnswerEvent]:
        events = self._events(asked, prompt, sampling, cancel)
        is_spelt = self._asked.logprobs is not None or self._asked.routing_kind is not None
        return self._spelling.learning(events) if is_spelt else events

    def _events(
        self, asked: str | list[int], prompt: list[int], sampling: SamplingOptions, cancel: CancelFlag
    ) -> Iterator[AnswerEvent]:
        if self._asked.echo:
            text = self._engine.detokenize(prompt).decode("utf-8", "replace")
            # without the space that the vocabulary may have put before it
            text = asked if isinstance(asked, str) else text
            tokens = (
                () if sampling.logprobs is None else tuple(_scored(self._engine, prompt, sampling.logprobs, cancel))
            )
            yield Echo(text, tokens)
        if sampling.n_predict == 0:
            yield Finished("", "length", Timing(len(prompt), 0, 0.0, 0, 0, 0.0), 0)
        else:
            tells = self._asked.routing_kind is not None
            yield from self._engine.generate(prompt, sampling, stop=self._asked.stop, cancel=cancel, routing=tells)

    def opening(self) -> list[dict[str, Any]]:
        return []

    def chunks(self, index: int, event: AnswerEvent) -> list[dict[str, Any]]:
        new: list[tuple[Token, int]] = []
        if self._asked.logprobs is not None:
            for token in event.tokens if isinstance(event, Echo) else (event,) if isinstance(event, Token) else ():
                new.append((token, self._n_chars[index]))
                self._n_chars[index] += len(self._spelling.text_of(token.token_id))
        self._tokens[index] += new
        text = event.text
        self._texts[index].append(text)
        if (routing := self._routing[index]) is not None:
            routing.push(event)
        made = [self._chunk(index, text, new) | told_number(event)] if text or new else []
        if isinstance(event, Finished):
            self._last[index] = event
            made = [self._chunk(index, text, new, finish_reason(event)) | {"timings": timings_of(event.timing)}]
        if routing is not None and made:
            made[0]["choices"][0]["routing"] = routing.unsent()
        return made

    def closing(self) -> list[dict[str, Any]]:
        return [{**self._head, "choices": [], "usage": self._usage()}] if self._asked.includes_usage else []

    def whole(self) -> dict[str, Any]:
        choices = [
            self._choice(n, "".join(texts), self._tokens[n], finish_reason(last))
            | ({} if routing is None else {"routing": routing.entries})
            for n, (texts, last, routing) in enumerate(zip(self._texts, self._last, self._routing, strict=True))
            if last is not None
        ]
        whole = {**self._head, "choices": choices, "usage": self._usage()}
        timings = self.timings()
        return whole | ({"timings": timings_of(timings[0])} if len(timings) == 1 else {})

    def failed(self, error: ApiError) -> dict[str, Any]:
        return error.to_dict()

    def timings(self) -> list[Timing]:
        return [last.timing for last in self._last if last is not None]

    def _usage(self) -> dict[str, Any]:
        return usage_of(self.timings(), self._asked.n)

    def _chunk(
        self, index: int, text: str, tokens: Sequence[tuple[Token, int]], reason: str | None = None
    ) -> dict[str, Any]:
        chunk = {**self._head, "choices": [self._choice(index, text, tokens, reason)]}
        return chunk | ({"usage": None} if self._asked.includes_usage else {})

    def _choice(self, index: int, text: str, tokens: Sequence[tuple[Token, int]], reason: str | None) -> dict[str, Any]:
        logprobs = None if self._asked.logprobs is None else self._logprobs(tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[tuple[Token, int]]) -> dict[str, Any]:
        spelt = self._spelling.text_of
        likeliest = [
            None if token.logprob is None else {spelt(other): logprob for other, logprob in token.alternatives}
            for token, _ in tokens
        ]
        return {
            "tokens": [spelt(token.token_id) for token, _ in tokens],
            "token_logprobs": [token.logprob for token, _ in tokens],
            "top_logprobs": likeliest if self._asked.logprobs else None,
            "text_offset": [offset for _, offset in tokens],
        }


def _scored(engine: EngineLike, prompt: list[int], n_best: int, cancel: CancelFlag) -> Iterator[Token]:
    """The tokens of ``prompt`` with their probabilities; the first one has none."""
    yield Token("", prompt[0])
    at = 1
    for rows in engine.logits_by_batch(prompt, cancel=cancel):
        for row in rows[: len(prompt) - at]:
            yield Token("", prompt[at], *logprob_of(prompt[at], row, n_best))
            at += 1
