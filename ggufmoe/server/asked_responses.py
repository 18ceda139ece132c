"""Requests for ``/v1/responses`` as clients send them, and the chat request that each stands for."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from ggufmoe.server.apierror import invalid
from ggufmoe.server.asked import ChatCompletionRequest, SamplingFields
from ggufmoe.server.asked_messages import (
    AskedCall,
    AskedCallFunction,
    AskedFunction,
    AskedMessage,
    AskedObject,
    AskedTool,
    JsonSchemaFormat,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    joined_text,
)

LOGPROBS = "message.output_text.logprobs"
_TEXT_PARTS = {"input_text": "text", "output_text": "text", "refusal": "refusal"}
Text = Annotated[str, BeforeValidator(lambda content: joined_text(content, _TEXT_PARTS))]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class _AskedItem(AskedObject):
    """One item of the input. What the server adds to items is taken back, and changes nothing."""

    id: str | None = None
    status: ItemStatus | None = None


class AskedInputMessage(_AskedItem):
    """A message of anyone; ``developer`` is another word for ``system``."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Text
    phase: Literal["commentary", "final_answer"] | None = None


class AskedFunctionCall(_AskedItem):
    """An earlier call of a tool."""

    type: Literal["function_call"]
    call_id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    arguments: str
    namespace: None = None
    caller: None = None
    async_: None = Field(default=None, alias="async")


class AskedFunctionOutput(_AskedItem):
    """The result of a call."""

    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1)
    output: Text


class _ReasoningPart(AskedObject):
    type: Literal["summary_text", "reasoning_text"]
    text: str


class AskedReasoning(_AskedItem):
    """What the model thought before an earlier answer or call."""

    type: Literal["reasoning"]
    summary: list[_ReasoningPart] = Field(default=[])
    content: list[_ReasoningPart] | None = None
    encrypted_content: None = None

    @property
    def text(self) -> str:
        """The thoughts, or their summary where they are not given."""
        return "\n".join(part.text for part in self.content or self.summary)


def _kind(item: Any) -> Any:
    given = item.get("type", "message") if isinstance(item, dict) else getattr(item, "type", None)
    return given if isinstance(given, str) else None


InputItem = Annotated[
    Annotated[AskedInputMessage, Tag("message")]
    | Annotated[AskedFunctionCall, Tag("function_call")]
    | Annotated[AskedFunctionOutput, Tag("function_call_output")]
    | Annotated[AskedReasoning, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="item_type",
        custom_error_message="an item must be a message, a function_call, a function_call_output or reasoning",
    ),
]


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class AskedResponseTool(AskedFunction):
    """A function that the model may call; other kinds of tools would run on the server, which has none."""

    type: Literal["function"]

    def to_chat(self) -> AskedTool:
        """The tool as chat requests have it."""
        return AskedTool(type="function", function=AskedFunction(**self.model_dump(exclude={"type"})))


class NamedResponseTool(AskedObject):
    """A ``tool_choice`` that names the tool."""

    type: Literal["function"]
    name: str

    def to_chat(self) -> NamedTool:
        """The choice as chat requests have it."""
        return NamedTool(type="function", function=NamedFunction(name=self.name))


class AskedTextFormat(AskedObject):
    """What the answer must be: a text, any JSON object, or JSON that a schema accepts."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    def to_chat(self) -> ResponseFormat:
        """The format as chat requests have it. Raises ApiError where the schema is missing."""
        if self.type != "json_schema":
            return ResponseFormat(type=self.type)
        if self.schema_ is None:
            raise invalid("text.format of type json_schema needs a schema", "text.format.schema")
        return ResponseFormat(type=self.type, json_schema=JsonSchemaFormat(schema=self.schema_))


class AskedTextConfig(AskedObject):
    """How the answer's text is to be."""

    format: AskedTextFormat = AskedTextFormat()
    verbosity: Literal["medium"] | None = None


class AskedReasoningConfig(AskedObject):
    """How much the model is to think."""

    effort: Literal["none", "low", "medium", "high"] | None = None
    summary: None = None
    generate_summary: None = None


class ResponseStreamOptions(AskedObject):
    """What a stream holds besides the answer: nothing."""

    include_obfuscation: Literal[False] = False


class ResponsesRequest(SamplingFields):
    """The body of ``/v1/responses``. Nothing is stored, whatever ``store`` says."""

    input: Annotated[list[InputItem], BeforeValidator(_as_items), Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    tools: list[AskedResponseTool] = Field(default=[], max_length=128)
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool = "auto"
    parallel_tool_calls: bool = True
    text: AskedTextConfig = AskedTextConfig()
    reasoning: AskedReasoningConfig = AskedReasoningConfig()
    include: list[Literal["message.output_text.logprobs"]] = Field(default=[])
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    chat_template_kwargs: dict[str, Any] = Field(default={})
    stream_options: ResponseStreamOptions | None = None
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    store: bool = False
    previous_response_id: str | None = None
    conversation: Any = None

    def check(self) -> None:
        """Raise ApiError for fields that are unknown or contradict each other."""
        super().check()
        for name in ("previous_response_id", "conversation"):
            if getattr(self, name) is not None:
                message = f"this server stores nothing, so there is no {name}: send the whole conversation as input"
                raise invalid(message, name, "unsupported_parameter")
        if self.top_logprobs is not None and LOGPROBS not in self.include:
            raise invalid(f"top_logprobs needs include: [{LOGPROBS!r}]", "top_logprobs")

    def to_chat(self) -> ChatCompletionRequest:
        """The chat request with this conversation, tools and ways to draw tokens. Raises ApiError."""
        choice = self.tool_choice
        drawn = {name: getattr(self, name) for name in SamplingFields.model_fields if name != "stream"}
        chat = ChatCompletionRequest(
            **drawn,
            **(self.model_extra or {}),
            messages=self._messages(),
            max_completion_tokens=self.max_output_tokens,
            logprobs=LOGPROBS in self.include,
            top_logprobs=self.top_logprobs,
            response_format=self.text.format.to_chat(),
            tools=[tool.to_chat() for tool in self.tools],
            tool_choice=choice if isinstance(choice, str) else choice.to_chat(),
            parallel_tool_calls=self.parallel_tool_calls,
            reasoning_effort=self.reasoning.effort,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        chat.check()
        return chat

    def _messages(self) -> list[AskedMessage]:
        """The conversation: reasoning, text and calls of the model that follow each other are one message."""
        found = [AskedMessage(role="system", content=self.instructions)] if self.instructions else []
        for item in self.input:
            if isinstance(item, AskedFunctionOutput):
                found.append(AskedMessage(role="tool", content=item.output, tool_call_id=item.call_id))
            elif isinstance(item, AskedInputMessage) and item.role != "assistant":
                found.append(AskedMessage(role=item.role, content=item.content))
            else:
                _add_to_answer(found, item)
        return found


def _add_to_answer(messages: list[AskedMessage], item: AskedInputMessage | AskedFunctionCall | AskedReasoning) -> None:
    """Add a part of an answer to the last message, if it is one of the model to which the part may belong."""
    last = messages[-1] if messages else None
    is_call = isinstance(item, AskedFunctionCall)
    if last is None or last.role != "assistant" or (not is_call and (last.content is not None or last.tool_calls)):
        last = AskedMessage.model_construct(role="assistant")  # it gets what it says below
        messages.append(last)
    if isinstance(item, AskedFunctionCall):
        function = AskedCallFunction(name=item.name, arguments=item.arguments)
        last.tool_calls = [*(last.tool_calls or ()), AskedCall(id=item.call_id, function=function)]
    elif isinstance(item, AskedReasoning):
        last.reasoning_content = "\n".join(filter(None, (last.reasoning_content, item.text)))
    else:
        last.content = item.content
