"""Conversations, one JSON object a line, as tokens of a model, and which of these are answers."""

from __future__ import annotations

import json
from collections.abc import Iterator

from ggufmoe.engine import Engine
from ggufmoe.errors import InputError, TemplateError, one_line
from ggufmoe.options import EvaluationOptions
from ggufmoe.runtime.chatformat import ChatFormat
from ggufmoe.sizes import counted
from ggufmoe.templates.conversations import Conversation, answer_places, conversation_of

TokenizedConversation = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens, and the places of those of the assistant's messages."""


def tokenized_conversations(engine: Engine, content: str, options: EvaluationOptions) -> list[TokenizedConversation]:
    """The first ``options.chunks`` conversations of ``content``, or all, rendered by the model's chat template.

    Raises InputError, with the number of the line, for one that is no object with ``messages``, has no answer, or is
    longer than ``options.n_ctx`` tokens, and TemplateError.
    """
    spoken = ChatFormat(engine)

    def rendered(said: Conversation, ask: bool) -> list[int]:
        text = spoken.template.render(said, add_generation_prompt=ask)
        begins = bool(bos := engine.token_text(engine.bos_token)) and text.startswith(bos)
        return engine.tokenize(text, add_bos=not begins, parse_special=True)

    found: list[TokenizedConversation] = []
    for number, messages in _conversations(content):
        if len(found) == options.chunks:
            break
        try:
            tokens, places = answer_places(messages, rendered)
        except TemplateError as error:
            raise TemplateError(f"line {number}: {error}") from error
        if not places:
            raise InputError(f"line {number}: no message of the assistant, so there is nothing to score")
        if len(tokens) > options.n_ctx:
            raise InputError(
                f"line {number}: {counted(len(tokens), 'token')}, more than {options.n_ctx}: "
                "allow longer conversations (--ctx-size, n_ctx)"
            )
        found.append((tokens, places))
    if not found:
        raise InputError("the text has no conversations: one JSON object with messages a line is expected")
    return found


def _conversations(content: str) -> Iterator[tuple[int, Conversation]]:
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number}: not JSON: {one_line(error)}") from error
        messages = conversation_of(value.get("messages") if isinstance(value, dict) else None)
        if messages is None:
            raise InputError(
                f"line {number}: expected an object with messages, a list of objects with role and content as text"
            )
        yield number, messages
