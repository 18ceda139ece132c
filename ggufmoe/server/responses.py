"""``/v1/responses``: an answer as a list of items, whole or as typed events. Nothing is stored."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ggufmoe.errors import TemplateError
from ggufmoe.runtime.events import Finished, Reasoning, Timing, Token, ToolCallArguments, ToolCallBegun
from ggufmoe.server.answers import AnswerEvent, Completion, JoinedTokens, Start, timings_of, usage_of
from ggufmoe.server.apierror import ApiError, invalid
from ggufmoe.server.asked_responses import LOGPROBS, ResponsesRequest
from ggufmoe.server.chat_completions import ChatAnswers, chat_answers
from ggufmoe.server.modelhost import ServedModel
from ggufmoe.server.told_routing import told_routing
from ggufmoe.work import CancelFlag

ItemKind = Literal["reasoning", "message", "function_call"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]
Chunk = dict[str, Any]
_Change = tuple[str, dict[str, Any]]

_PARAMS = {
    "messages": "input",
    "response_format": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
}
"""Names of a chat request's fields in this one."""
_ID_PREFIXES = {"reasoning": "rs", "message": "msg", "function_call": "fc"}
_TEXT_EVENTS: dict[ItemKind, str] = {
    "reasoning": "response.reasoning_text",
    "message": "response.output_text",
    "function_call": "response.function_call_arguments",
}
"""Beginnings of the kinds of events about the text of an item."""


def response(served: ServedModel, asked: ResponsesRequest, model: str, cancel: CancelFlag | None = None) -> Completion:
    """The response that ``asked`` asks for; renders the prompt. Raises ApiError and errors of ggufmoe.

    Clients know the model as ``model``. Raises Cancelled when ``cancel`` is set meanwhile.
    """
    try:
        chat = asked.to_chat()
        return _Response(asked, model, chat_answers(served, chat, cancel))
    except ApiError as error:
        error.param = _PARAMS.get(error.param or "", error.param)
        raise
    except TemplateError as error:
        raise invalid(str(error), "input") from error


@dataclass
class _OutputItem:
    """One item of the output, as far as it has come."""

    kind: ItemKind
    index: int
    """Its place in the output."""
    name: str = ""
    parts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    status: ItemStatus = "in_progress"

    def __post_init__(self) -> None:
        self.id = f"{_ID_PREFIXES[self.kind]}_{uuid.uuid4().hex}"
        self.call_id = f"call_{uuid.uuid4().hex[:24]}"

    @property
    def text(self) -> str:
        return "".join(self.parts)

    @property
    def place(self) -> dict[str, Any]:
        """What events about the text of the item have to name it."""
        place = {"item_id": self.id, "output_index": self.index}
        return place if self.kind == "function_call" else place | {"content_index": 0}

    def part(self) -> dict[str, Any]:
        """The one part of the content of a message or of reasoning."""
        if self.kind == "reasoning":
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": list(self.logprobs)}

    def to_dict(self) -> dict[str, Any]:
        head: dict[str, Any] = {"id": self.id, "type": self.kind, "status": self.status}
        if self.kind == "function_call":
            return head | {"call_id": self.call_id, "name": self.name, "arguments": self.text}
        content = [self.part()] if self.parts or self.status != "in_progress" else []
        if self.kind == "reasoning":
            return head | {"summary": [], "content": content}
        return head | {"role": "assistant", "content": content}


class _Response:
    """The answer to one request, as events and as a whole."""

    has_named_events = True

    def __init__(self, asked: ResponsesRequest, model: str, answers: ChatAnswers) -> None:
        self._asked = asked
        self._model = model
        self._spelling = answers.spelling
        self.starts: Sequence[Start] = answers.starts
        self._id = f"resp_{uuid.uuid4().hex}"
        self._created = int(time.time())
        self._items: list[_OutputItem] = []
        self._routing = told_routing(asked.routing_kind, self._spelling)
        self._held = ""
        """Space at the end of a message's text, which a call behind it would make superfluous."""
        self._logprobs: list[dict[str, Any]] = []
        """Probabilities of tokens whose text has not come."""
        self._last: Finished | None = None
        self._n_reasoning = self._n_undecided = 0
        """Tokens of reasoning, and those of which it is not known yet what they belong to."""
        self._n_events = 0

    # ---- events

    def opening(self) -> list[Chunk]:
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=self._object("in_progress")) for kind in kinds]

    def chunks(self, index: int, event: AnswerEvent) -> list[Chunk]:
        made = [self._event(kind, **fields) for kind, fields in self._changes(event)]
        if self._routing is not None:
            self._routing.push(event)
            if made:
                made[0]["routing"] = self._routing.unsent()
        return made

    def closing(self) -> list[Chunk]:
        return [self._event(f"response.{self._status}", response=self.whole())]

    def failed(self, error: ApiError) -> Chunk:
        told = {"code": error.code or error.type, "message": error.message}
        return self._event("response.failed", response=self._object("failed") | {"error": told})

    def _event(self, kind: str, **fields: Any) -> Chunk:
        self._n_events += 1
        return {"type": kind, "sequence_number": self._n_events - 1, **fields}

    # ---- items

    def _changes(self, event: AnswerEvent) -> Iterator[_Change]:
        """Take ``event``; the changes of the output, as kinds of events and their fields."""
        if isinstance(event, Token):
            self._n_undecided += event.n_tokens if isinstance(event, JoinedTokens) else 1
            if LOGPROBS in self._asked.include:
                self._logprobs.append(self._spelling.probabilities(event))
        if isinstance(event, Reasoning):
            self._n_reasoning += self._n_undecided
            self._n_undecided, self._logprobs = 0, []
            yield from self._add("reasoning", event.reasoning)
        elif isinstance(event, ToolCallBegun | ToolCallArguments):
            self._n_undecided, self._logprobs, self._held = 0, [], ""
            if event.index and not self._asked.parallel_tool_calls:
                return
            if isinstance(event, ToolCallBegun):
                yield from self._open("function_call", event.name)
            else:
                yield from self._add("function_call", event.arguments)
        else:
            yield from self._say(event.text)
        if isinstance(event, Finished):
            self._last = event
            yield from self._end()

    def _say(self, text: str) -> Iterator[_Change]:
        """Add ``text`` to the message, but for space at its end."""
        said = (self._held + text).rstrip()
        self._held = (self._held + text)[len(said) :]
        if said:
            self._n_undecided = 0
            yield from self._add("message", said)

    def _end(self) -> Iterator[_Change]:
        kinds = {item.kind for item in self._items}
        if "message" in kinds and self._held:
            yield from self._add("message", self._held)
        elif self._status == "completed" and not kinds & {"message", "function_call"}:
            yield from self._open("message")
        yield from self._close(self._status)

    def _add(self, kind: ItemKind, text: str) -> Iterator[_Change]:
        """Add ``text`` to the last item, if it is of this kind, or to a new one."""
        if not self._items or self._items[-1].kind != kind:
            yield from self._open(kind)
        item = self._items[-1]
        item.parts.append(text)
        fields = {**item.place, "delta": text}
        if kind == "message":
            fields["logprobs"], self._logprobs = self._logprobs, []
            item.logprobs += fields["logprobs"]
        yield f"{_TEXT_EVENTS[kind]}.delta", fields

    def _open(self, kind: ItemKind, name: str = "") -> Iterator[_Change]:
        yield from self._close("completed")
        item = _OutputItem(kind, len(self._items), name)
        self._items.append(item)
        yield "response.output_item.added", {"output_index": item.index, "item": item.to_dict()}
        if kind != "function_call":
            yield "response.content_part.added", {**item.place, "part": item.part()}

    def _close(self, status: ItemStatus) -> Iterator[_Change]:
        """End the last item, if there is one."""
        if not self._items:
            return
        item = self._items[-1]
        item.status = status
        done = f"{_TEXT_EVENTS[item.kind]}.done"
        if item.kind == "function_call":
            yield done, {**item.place, "name": item.name, "arguments": item.text}
        else:
            logprobs = {"logprobs": list(item.logprobs)} if item.kind == "message" else {}
            yield done, {**item.place, "text": item.text, **logprobs}
            yield "response.content_part.done", {**item.place, "part": item.part()}
        yield "response.output_item.done", {"output_index": item.index, "item": item.to_dict()}

    # ---- the whole

    @property
    def _status(self) -> Literal["completed", "incomplete"]:
        return "incomplete" if self._last is not None and self._last.reason in ("length", "context") else "completed"

    def whole(self) -> dict[str, Any]:
        more: dict[str, Any] = {} if self._last is None else {"timings": timings_of(self._last.timing)}
        more |= {} if self._routing is None else {"routing": self._routing.entries}
        return self._object(self._status) | {"completed_at": int(time.time()), "usage": self._usage()} | more

    def timings(self) -> list[Timing]:
        return [] if self._last is None else [self._last.timing]

    def _usage(self) -> dict[str, Any]:
        usage = usage_of(self.timings())
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": self._n_reasoning},
            "total_tokens": usage["total_tokens"],
        }

    def _object(self, status: str) -> dict[str, Any]:
        asked = self._asked
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self._model,
            "output": [item.to_dict() for item in self._items],
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort, "summary": None},
            "store": False,
            "background": False,
            "service_tier": "default",
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_logprobs": asked.top_logprobs or 0,
            "truncation": asked.truncation,
            "text": {"format": asked.text.format.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": asked.tool_choice if isinstance(asked.tool_choice, str) else asked.tool_choice.model_dump(),
            "tools": [tool.model_dump() for tool in asked.tools],
            "metadata": asked.metadata or {},
            "usage": None,
        }
