"""Messages of a conversation, the tools that a model may call, and its calls; and how chat templates see them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]


@dataclass(frozen=True)
class ToolCall:
    """A call that the model asks for: the tool's name and its arguments, an object as JSON text."""

    name: str
    arguments: str
    id: str = ""

    def to_template(self, *, as_text: bool) -> dict[str, Any]:
        """The call as chat templates expect it; ``as_text``: with the arguments as text, where a template wants that.

        Arguments that are no JSON object stay text: a model may have been cut off within them.
        """
        arguments: Any = self.arguments
        if not as_text:
            try:
                value = json.loads(self.arguments or "{}")
            except (ValueError, RecursionError):
                value = None
            arguments = value if isinstance(value, dict) else arguments
        call = {"type": "function", "function": {"name": self.name, "arguments": arguments}}
        return {"id": self.id, **call} if self.id else call


@dataclass(frozen=True)
class Tool:
    """A tool that the model may call; ``parameters`` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})

    def to_template(self) -> dict[str, Any]:
        """The tool as chat templates expect it."""
        function = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": function}


@dataclass(frozen=True)
class Message:
    """One message of a conversation."""

    role: Role
    content: str
    reasoning: str = ""
    """What an assistant thought before ``content``. Each template decides whether the model sees it again."""
    tool_calls: tuple[ToolCall, ...] = ()
    """The calls that an assistant's message asks for."""
    tool_call_id: str = ""
    """The call whose result a tool's message is."""
    name: str = ""
    """The tool whose result it is."""

    def to_template(self, *, arguments_as_text: bool = False) -> dict[str, Any]:
        """The message as chat templates expect it, without fields that are empty."""
        message: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [call.to_template(as_text=arguments_as_text) for call in self.tool_calls]
        named = {"tool_call_id": self.tool_call_id, "name": self.name}
        return message | {key: value for key, value in named.items() if value}
