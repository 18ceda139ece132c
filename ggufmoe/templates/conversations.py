"""Conversations as files hold them, and which of their tokens are answers once a chat template has rendered them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Conversation = tuple[Mapping[str, Any], ...]
"""Messages with ``role`` and ``content``."""


def conversation_of(value: Any) -> Conversation | None:
    """The messages in ``value``, from JSON; None unless it is a list of objects with role and content as text."""
    said: list[Any] = value if isinstance(value, list) else []
    return tuple(said) if said and all(map(_is_message, said)) else None


def answer_places(
    messages: Conversation, rendered: Callable[[Conversation, bool], Sequence[int]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of ``messages``, and the places of those that an assistant's messages consist of, their ends included.

    ``rendered`` gives the tokens of messages as the chat template writes them, with the beginning of an answer after
    them if its second argument is True. The first token of all is never an answer.
    """
    tokens = tuple(rendered(messages, False))
    places: list[int] = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            begin = _n_shared(tokens, rendered(messages[:i], True)) if i else 1
            places += range(max(begin, 1), _n_shared(tokens, rendered(messages[: i + 1], False)))
    return tokens, tuple(places)


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _n_shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the beginning that two lists of tokens share."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
