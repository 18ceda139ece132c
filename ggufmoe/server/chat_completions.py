"""``/v1/chat/completions``: what a request asks the model, and its answers in OpenAI's objects."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from ggufmoe.errors import OptionError
from ggufmoe.options import MAX_SEED, SamplingOptions, TemplateOptions
from ggufmoe.runtime.chatformat import OF_CONVERSATION, ChatFormat
from ggufmoe.runtime.enginelike import EngineLike
from ggufmoe.runtime.events import Finished, Reasoning, Timing, Token, ToolCallArguments, ToolCallBegun
from ggufmoe.server.answers import (
    AnswerEvent,
    Completion,
    Spelling,
    Start,
    finish_reason,
    timings_of,
    told_number,
    usage_of,
)
from ggufmoe.server.apierror import ApiError, invalid
from ggufmoe.server.asked import ChatCompletionRequest
from ggufmoe.server.asked_messages import NamedTool, conversation_of
from ggufmoe.server.modelhost import ServedModel
from ggufmoe.server.told_routing import ToldRouting, check_routing, told_routing
from ggufmoe.server.toolcalls import answering_at_once, in_words, knows_tools, schema_of_call, with_bare_calls
from ggufmoe.work import CancelFlag

EXACT_CHARS = 1 << 18
"""Longer texts are not tokenized to their end when they certainly do not fit the context."""


@dataclass(frozen=True)
class ChatAnswers:
    """The answers to a conversation, ready to be computed."""

    spelling: Spelling
    """Of the tokens of answers that tell probabilities or routing."""
    starts: Sequence[Start]


def chat_completion(
    served: ServedModel, asked: ChatCompletionRequest, model: str, cancel: CancelFlag | None = None
) -> Completion:
    """The completion that ``asked`` asks for; renders the prompt. Raises what ``chat_answers`` raises.

    Clients know the model as ``model``.
    """
    return _ChatCompletion(asked, model, chat_answers(served, asked, cancel))


def chat_answers(served: ServedModel, asked: ChatCompletionRequest, cancel: CancelFlag | None = None) -> ChatAnswers:
    """The answers that ``asked`` asks for; renders the prompt. Raises ApiError and errors of ggufmoe.

    Raises Cancelled when ``cancel`` is set meanwhile.
    """
    chat_format, messages = served.chat(), conversation_of(asked.messages)
    check_routing(served.engine, asked.routing_kind)
    tools = [] if asked.tool_choice == "none" else [tool.to_tool() for tool in asked.tools]
    must_call = asked.tool_choice == "required" or isinstance(asked.tool_choice, NamedTool)
    schema = asked.schema_text
    if must_call and schema is not None:
        raise invalid("a call that must come contradicts response_format", "response_format")
    shown, is_known = tools, knows_tools(chat_format)
    if not is_known and (tools or any(message.tool_calls or message.role == "tool" for message in messages)):
        messages, shown = in_words(messages, tools), []
    reader = with_bare_calls(chat_format) if tools and (must_call or not is_known) else chat_format
    if isinstance(asked.tool_choice, NamedTool):
        tools = [tool for tool in tools if tool.name == asked.tool_choice.function.name]
    if must_call:
        schema = schema_of_call(tools)
    sampling = asked.sampling((asked.top_logprobs or 0) if asked.logprobs else None, asked.n_predict, schema)
    engine = chat_format.engine
    must_fit = engine.overflow == "error" and sum(len(message.content) for message in messages) > EXACT_CHARS
    prompt = chat_format.render(messages, shown, _variables(chat_format, asked), must_fit=must_fit, cancel=cancel)
    if schema is not None or sampling.grammar is not None or sampling.json_schema is not None:
        prompt = answering_at_once(chat_format, prompt)
    check_room(engine, len(prompt.tokens), "messages")
    prompt = replace(prompt, tools=tuple(tools))
    spelling = Spelling(engine.piece)

    def begin(chosen: SamplingOptions, cancel: CancelFlag) -> Iterator[AnswerEvent]:
        tells = asked.routing_kind is not None
        events = reader.generate(prompt, chosen, stop=asked.stop, cancel=cancel, routing=tells)
        return spelling.learning(events) if asked.logprobs or tells else events

    return ChatAnswers(spelling, [partial(begin, chosen) for chosen in with_seeds(sampling, asked.n)])


def _variables(chat_format: ChatFormat, asked: ChatCompletionRequest) -> dict[str, Any]:
    known = chat_format.template.variables
    for name in asked.chat_template_kwargs:
        if name not in known:
            raise invalid(f"the model's chat template reads no variable {name!r}", "chat_template_kwargs")
        if name in OF_CONVERSATION:
            raise invalid(f"{name!r} cannot be set: each conversation gives it", "chat_template_kwargs")
    effort = asked.reasoning_effort or "auto"
    options = TemplateOptions(think="off") if effort == "none" else TemplateOptions(reasoning_effort=effort)
    try:
        return {**chat_format.variables_of(options), **asked.chat_template_kwargs}
    except OptionError as error:
        raise invalid(f"reasoning_effort{str(error)[str(error).index(' ') :]}", "reasoning_effort") from error


def check_room(engine: EngineLike, n_tokens: int, param: str, *, may_cut: bool = True) -> None:
    """Raise ApiError for a prompt of ``n_tokens`` that leaves no room for an answer and may not be cut."""
    if n_tokens >= engine.n_ctx and not (may_cut and engine.overflow != "error"):
        message = f"the prompt has {n_tokens} tokens and the context holds {engine.n_ctx}: shorten it"
        raise invalid(message, param, "context_length_exceeded")


def with_seeds(sampling: SamplingOptions, n: int) -> list[SamplingOptions]:
    """The sampling of ``n`` answers: a seed that is given grows by one each time, so that they can differ."""
    seed = sampling.seed
    if seed is None or seed < 0:
        return [sampling] * n
    return [replace(sampling, seed=(seed + i) % (MAX_SEED + 1)) for i in range(n)]


@dataclass
class _ChatChoice:
    """One answer, as far as it has come."""

    one_call: bool
    routing: ToldRouting | None
    content: list[str] = field(default_factory=list)
    reasoning: list[str] = field(default_factory=list)
    calls: list[dict[str, Any]] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    last: Finished | None = None

    def deltas(self, event: AnswerEvent) -> list[dict[str, Any]]:
        """What ``event`` adds to the message, at most one part of each kind."""
        if isinstance(event, Finished):
            self.last = event
        if isinstance(event, Reasoning):
            self.reasoning.append(event.reasoning)
            return [{"reasoning_content": event.reasoning}]
        if isinstance(event, ToolCallBegun | ToolCallArguments):
            return self._call(event)
        if not event.text:
            return []
        text = event.text
        self.content.append(text)
        return [{"content": text}]

    def _call(self, event: ToolCallBegun | ToolCallArguments) -> list[dict[str, Any]]:
        if self.one_call and event.index:
            return []
        if isinstance(event, ToolCallBegun):
            call_id, function = f"call_{uuid.uuid4().hex[:24]}", {"name": event.name, "arguments": ""}
            self.calls.append({"id": call_id, "type": "function", "function": dict(function)})
            return [{"tool_calls": [{"index": event.index, "id": call_id, "type": "function", "function": function}]}]
        self.calls[event.index]["function"]["arguments"] += event.arguments
        return [{"tool_calls": [{"index": event.index, "function": {"arguments": event.arguments}}]}]

    def message(self) -> dict[str, Any]:
        content = "".join(self.content)
        # a model writes a line's end before a call: it is no part of what is said
        content = content.rstrip() if self.calls else content
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content or (None if self.calls else ""),
            "refusal": None,
        }
        if self.reasoning:
            message["reasoning_content"] = "".join(self.reasoning)
        return message | ({"tool_calls": self.calls} if self.calls else {})

    def finish_reason(self) -> str | None:
        return None if self.last is None else finish_reason(self.last, has_calls=bool(self.calls))


class _ChatCompletion:
    """The answers to one chat request, as chunks and as a whole."""

    has_named_events = False

    def __init__(self, asked: ChatCompletionRequest, model: str, answers: ChatAnswers) -> None:
        self._asked = asked
        self._spelling = answers.spelling
        self.starts = answers.starts
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        if "service_tier" in asked.model_fields_set:
            self._head["service_tier"] = "default"
        self._choices = [
            _ChatChoice(not asked.parallel_tool_calls, told_routing(asked.routing_kind, self._spelling))
            for _ in self.starts
        ]

    def opening(self) -> list[dict[str, Any]]:
        return [self._chunk(n, {"role": "assistant", "content": ""}) for n in range(len(self._choices))]

    def chunks(self, index: int, event: AnswerEvent) -> list[dict[str, Any]]:
        choice = self._choices[index]
        deltas = choice.deltas(event)
        logprobs = None
        if self._asked.logprobs and isinstance(event, Token):
            entry = self._spelling.probabilities(event)
            choice.logprobs.append(entry)
            logprobs, deltas = {"content": [entry], "refusal": None}, deltas or [{"content": ""}]
        made = [self._chunk(index, delta, logprobs=logprobs) | told_number(event) for delta in deltas]
        if isinstance(event, Finished):
            chunk = self._chunk(index, {}, reason=choice.finish_reason())
            made.append(chunk | {"timings": timings_of(event.timing)})
        if choice.routing is not None:
            choice.routing.push(event)
            if made:
                made[0]["choices"][0]["routing"] = choice.routing.unsent()
        return made

    def closing(self) -> list[dict[str, Any]]:
        if not self._asked.includes_usage:
            return []
        return [{**self._head, "object": "chat.completion.chunk", "choices": [], "usage": self._usage()}]

    def whole(self) -> dict[str, Any]:
        choices = [
            {
                "index": n,
                "message": choice.message(),
                "logprobs": {"content": choice.logprobs, "refusal": None} if self._asked.logprobs else None,
                "finish_reason": choice.finish_reason(),
                **({} if choice.routing is None else {"routing": choice.routing.entries}),
            }
            for n, choice in enumerate(self._choices)
        ]
        whole = {**self._head, "object": "chat.completion", "choices": choices, "usage": self._usage()}
        timings = self.timings()
        return whole | ({"timings": timings_of(timings[0])} if len(timings) == 1 else {})

    def failed(self, error: ApiError) -> dict[str, Any]:
        return error.to_dict()

    def timings(self) -> list[Timing]:
        return [choice.last.timing for choice in self._choices if choice.last is not None]

    def _usage(self) -> dict[str, Any]:
        return usage_of(self.timings(), len(self._choices))

    def _chunk(
        self, index: int, delta: dict[str, Any], *, reason: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
        return chunk | ({"usage": None} if self._asked.includes_usage else {})
