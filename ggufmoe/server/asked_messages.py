"""The messages and tools of a chat request: OpenAI's objects, and the conversation they stand for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from ggufmoe.runtime.messages import Message, Role, Tool, ToolCall

_TEXT_PARTS = {"text": "text", "refusal": "refusal"}


def joined_text(content: Any, keys: Mapping[str, str]) -> Any:
    """The text of a content, which is a text or a list of parts; ``keys`` tell where a part of each type has its text.

    Raises ValueError for parts other than text.
    """
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in keys:
            known = next(iter(keys))
            raise ValueError(f"a part must be of type {known} (images, audio and files are not read); found {kind!r}")
        text = part.get(keys[kind])
        if not isinstance(text, str):
            raise ValueError(f"a part of type {kind} needs a text under {keys[kind]!r}")
        texts.append(text)
    return "\n".join(texts)


class AskedObject(BaseModel):
    """A part of a request: fields that are not named are errors, and nothing is converted."""

    model_config = ConfigDict(extra="forbid", strict=True)


class AskedCallFunction(AskedObject):
    """What an earlier call of the model named."""

    name: str = Field(min_length=1)
    arguments: str


class AskedCall(AskedObject):
    """A call of a tool in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: AskedCallFunction
    index: int | None = None


class AskedMessage(AskedObject):
    """One message; ``developer`` is another word for ``system``."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str | None, BeforeValidator(lambda content: joined_text(content, _TEXT_PARTS))] = None
    name: str | None = None
    tool_calls: list[AskedCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None

    @model_validator(mode="after")
    def _has_content(self) -> AskedMessage:
        says_else = self.role == "assistant" and (self.tool_calls or self.refusal or self.reasoning_content)
        if self.content is None and not says_else:
            raise ValueError(f"a message of the role {self.role} needs content")
        if self.role == "tool" and self.tool_call_id is None:
            raise ValueError("a message of the role tool needs tool_call_id, the id of the call whose result it is")
        return self

    def to_message(self) -> Message:
        """The message of the conversation."""
        role: Role = "system" if self.role == "developer" else self.role
        calls = tuple(ToolCall(call.function.name, call.function.arguments, call.id) for call in self.tool_calls or ())
        content = self.content if self.content is not None else self.refusal or ""
        return Message(role, content, self.reasoning_content or "", calls, self.tool_call_id or "", self.name or "")


class AskedFunction(AskedObject):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,128}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class AskedTool(AskedObject):
    """A tool that the model may call."""

    type: Literal["function"]
    function: AskedFunction

    def to_tool(self) -> Tool:
        """The tool of the conversation."""
        parameters = self.function.parameters or {"type": "object", "properties": {}}
        return Tool(self.function.name, self.function.description or "", parameters)


class NamedFunction(AskedObject):
    """The function that must be called."""

    name: str


class NamedTool(AskedObject):
    """A ``tool_choice`` that names the tool."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchemaFormat(AskedObject):
    """The schema of a ``response_format``."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(AskedObject):
    """What the answer must be: a text, any JSON object, or JSON that a schema accepts."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    """Of ``json_object``: a schema beside it, as llama-server takes it."""

    @property
    def schema_text(self) -> str | None:
        """The JSON schema that holds the answer, None for a text. Raises ValueError where it is missing."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return json.dumps(self.schema_ or {"type": "object"})
        if self.json_schema is None:
            raise ValueError("response_format of type json_schema needs json_schema.schema")
        return json.dumps(self.json_schema.schema_)


def conversation_of(messages: list[AskedMessage]) -> list[Message]:
    """The conversation; a tool's message gets the name of the tool whose call it answers."""
    names: Mapping[str, str] = {
        call.id: call.function.name for message in messages for call in message.tool_calls or ()
    }
    found = []
    for message in messages:
        if message.role == "tool" and message.name is None:
            message = message.model_copy(update={"name": names.get(message.tool_call_id or "", "")})
        found.append(message.to_message())
    return found
