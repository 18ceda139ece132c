"""Tool calls that the server makes possible or certain: a grammar for a call that must come, words for models whose
template knows no tools, and prompts that ask for the answer at once.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ggufmoe.runtime.answer_syntax import AnswerSyntax, ToolSyntax
from ggufmoe.runtime.chatformat import ChatFormat, ChatPrompt
from ggufmoe.runtime.messages import Message, Tool

_HOW = (
    "You can call these tools. To call one, answer with nothing but a JSON object that has its name and its arguments, "
    'such as {"name": "...", "arguments": {...}}. The result comes in the next message.'
)


def with_bare_calls(chat_format: ChatFormat) -> ChatFormat:
    """``chat_format``, but a call in an answer is a JSON object with name and arguments, without marks around it."""
    changed = copy.copy(chat_format)
    changed.syntax = AnswerSyntax(chat_format.syntax.reasoning, ToolSyntax("json"))
    return changed


def knows_tools(chat_format: ChatFormat) -> bool:
    """Whether the model's template shows tools to it, and the way in which it writes calls is known."""
    is_known = chat_format.syntax.tools is not None or chat_format.syntax.is_harmony
    return is_known and "tools" in chat_format.template.variables


def in_words(messages: Sequence[Message], tools: Sequence[Tool]) -> list[Message]:
    """``messages`` for a template that knows no tools: these in the system message, calls and results as text."""
    listed = "\n".join(json.dumps(tool.to_template()["function"], ensure_ascii=False) for tool in tools)
    told = f"{_HOW}\n\n{listed}"
    plain = [_plain(message) for message in messages]
    if not tools:
        return plain
    if plain and plain[0].role == "system":
        return [replace(plain[0], content=f"{plain[0].content}\n\n{told}"), *plain[1:]]
    return [Message("system", told), *plain]


def _plain(message: Message) -> Message:
    if message.role == "tool":
        return Message("user", f"Result of {message.name or 'the tool'}: {message.content}")
    if message.tool_calls:
        calls = [f'{{"name": {json.dumps(call.name)}, "arguments": {call.arguments}}}' for call in message.tool_calls]
        return replace(message, content="\n".join([message.content, *calls]).strip(), tool_calls=())
    return message


def schema_of_call(tools: Sequence[Tool]) -> str:
    """The JSON schema of a call of one of ``tools``, as ``with_bare_calls`` reads it."""
    places = [f"#/$defs/tool{n}" for n in range(len(tools))]
    calls = [
        {
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": {"$ref": place}},
            "required": ["name", "arguments"],
        }
        for tool, place in zip(tools, places, strict=True)
    ]
    parts = {
        f"tool{n}": _moved({"type": "object", **tool.parameters}, place)
        for n, (tool, place) in enumerate(zip(tools, places, strict=True))
    }
    return json.dumps({"$defs": parts, **(calls[0] if len(calls) == 1 else {"anyOf": calls})})


def _moved(schema: Any, place: str) -> Any:
    """``schema`` with its references to itself changed to those that hold where it stands at ``place``."""
    if isinstance(schema, Mapping):
        return {
            key: place + value[1:]
            if key == "$ref" and isinstance(value, str) and value[:1] == "#"
            else _moved(value, place)
            for key, value in schema.items()
        }
    return [_moved(item, place) for item in schema] if isinstance(schema, list) else schema


def answering_at_once(chat_format: ChatFormat, prompt: ChatPrompt) -> ChatPrompt:
    """``prompt``, behind which the answer itself begins: reasoning that the prompt has begun is closed.

    For an answer that a grammar holds, which lets no mark of reasoning through.
    """
    if chat_format.syntax.is_harmony:
        text = "<|channel|>final<|message|>"
    elif prompt.in_reasoning:
        text = f"\n{chat_format.syntax.reasoning.closes}\n\n"
    else:
        return prompt
    tokens = chat_format.engine.tokenize(text, add_bos=False, parse_special=True)
    return replace(prompt, tokens=(*prompt.tokens, *tokens), in_reasoning=False)
