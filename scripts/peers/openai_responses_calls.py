"""Calls of ``/v1/responses``: texts, items, instructions, events, tools and schemas."""

from __future__ import annotations

import json
from typing import Any

import pydantic
from openai_asking import CITY, Asking, call, checked, expect, refused, same

ASKED = "Tell me something about the sea."
CLOCK: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": CITY,
    "strict": True,
}


class Weather(pydantic.BaseModel):
    """What a parsed response holds."""

    model_config = pydantic.ConfigDict(extra="forbid")

    warm: bool


def _respond(ask: Asking, given: Any = ASKED, **fields: Any) -> Any:
    asked = {"temperature": 0, "max_output_tokens": 16, "store": False, **fields}
    return checked(ask.client.responses.create(model=ask.model, input=given, **asked))


def _text(answer: Any) -> str:
    message = next(item for item in answer.output if item.type == "message")
    same((message.role, message.content[0].type), ("assistant", "output_text"), "role and type")
    expect(answer.output_text, "output_text is empty")
    return str(answer.output_text)


@call("responses", "a text")
def _(ask: Asking) -> None:
    answer = _respond(ask)
    same((answer.object, answer.model), ("response", ask.model), "object and model")
    expect(answer.id and answer.error is None, "no id, or an error")
    expect(answer.status in ("completed", "incomplete"), f"status {answer.status}")
    _text(answer)


@call("responses", "the usage adds up")
def _(ask: Asking) -> None:
    usage = _respond(ask).usage
    same(usage.total_tokens, usage.input_tokens + usage.output_tokens, "total_tokens")


@call("responses", "max_output_tokens: incomplete, with the reason")
def _(ask: Asking) -> None:
    answer = _respond(ask, max_output_tokens=16)
    same((answer.status, answer.incomplete_details.reason), ("incomplete", "max_output_tokens"), "end")


@call("responses", "messages as input say what the text says")
def _(ask: Asking) -> None:
    same(_text(_respond(ask, [{"role": "user", "content": ASKED}])), _text(_respond(ask)), "text")


@call("responses", "parts of input, and an earlier answer")
def _(ask: Asking) -> None:
    talk = [
        {"role": "user", "content": [{"type": "input_text", "text": ASKED}]},
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "status": "completed",
            "content": [{"type": "output_text", "text": "It is deep.", "annotations": []}],
        },
        {"role": "user", "content": "How deep?"},
    ]
    expect(_respond(ask, talk).usage.input_tokens > _respond(ask).usage.input_tokens, "the input has not grown")


@call("responses", "output that is sent back as input")
def _(ask: Asking) -> None:
    first = _respond(ask)
    talk = [{"role": "user", "content": ASKED}, *first.output, {"role": "user", "content": "And then?"}]
    _text(_respond(ask, talk))


@call("responses", "instructions are a system message")
def _(ask: Asking) -> None:
    expect(
        _respond(ask, instructions="Answer like a sailor.").usage.input_tokens > _respond(ask).usage.input_tokens,
        "the input has not grown",
    )


@call("responses", "a stream: its events in their order")
def _(ask: Asking) -> None:
    asked: dict[str, Any] = {"temperature": 0, "max_output_tokens": 16, "store": False}
    events = [
        checked(event) for event in ask.client.responses.create(model=ask.model, input=ASKED, stream=True, **asked)
    ]
    kinds = [event.type.removeprefix("response.") for event in events]
    once = list(dict.fromkeys(kinds))
    wanted = ["created", "in_progress", "output_item.added", "content_part.added", "output_text.delta"]
    same(once[: len(wanted)], wanted, "first events")
    same(once[-4:-1], ["output_text.done", "content_part.done", "output_item.done"], "last events")
    expect(kinds[-1] in ("completed", "incomplete"), kinds[-1])
    numbers = [event.sequence_number for event in events]
    same(numbers, list(range(numbers[0], numbers[0] + len(numbers))), "sequence numbers")
    last: Any = events[-1]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    same(text.strip(), last.response.output_text.strip(), "text")
    same(text.strip(), _text(_respond(ask)).strip(), "text without a stream")


@call("responses", "the client's own helper for streams, which parses")
def _(ask: Asking) -> None:
    asked: dict[str, Any] = {"temperature": 0, "max_output_tokens": 100}
    with ask.client.responses.stream(model=ask.model, input=ASKED, text_format=Weather, **asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    expect("response.output_text.delta" in kinds, str(kinds))
    expect(isinstance(final.output_parsed, Weather), f"parsed: {final.output_parsed!r}")


@call("responses", "an asynchronous stream")
def _(ask: Asking) -> None:
    asked: dict[str, Any] = {"temperature": 0, "max_output_tokens": 16, "store": False}

    async def use(client: Any) -> list[Any]:
        stream: Any = await client.responses.create(model=ask.model, input=ASKED, stream=True, **asked)
        return [event async for event in stream]

    text = "".join(event.delta for event in ask.run_async(use) if event.type == "response.output_text.delta")
    same(text.strip(), _text(_respond(ask)).strip(), "text")


@call("responses", "text.format json_schema")
def _(ask: Asking) -> None:
    form = {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}
    found = json.loads(_text(_respond(ask, text={"format": form}, max_output_tokens=100)))
    expect(found["city"] in ("Oslo", "Bern"), str(found))


@call("responses", "parse() into a class of pydantic")
def _(ask: Asking) -> None:
    answer = ask.client.responses.parse(
        model=ask.model, input=ASKED, text_format=Weather, temperature=0, max_output_tokens=100
    )
    expect(isinstance(answer.output_parsed, Weather), f"parsed: {answer.output_parsed!r}")


@call("responses", "a tool that must be called")
def _(ask: Asking) -> None:
    answer = _respond(ask, tools=[CLOCK], tool_choice="required", max_output_tokens=200)
    (found,) = [item for item in answer.output if item.type == "function_call"]
    same((found.name, answer.status), ("weather", "completed"), "name and status")
    expect(found.call_id and json.loads(found.arguments)["city"] in ("Oslo", "Bern"), found.arguments)


@call("responses", "a call in a stream")
def _(ask: Asking) -> None:
    choice: Any = {"type": "function", "name": "weather"}
    tools: Any = [CLOCK]
    stream = ask.client.responses.create(
        model=ask.model, input=ASKED, stream=True, tools=tools, tool_choice=choice, temperature=0, max_output_tokens=200
    )
    events: list[Any] = [checked(event) for event in stream]
    deltas = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    (done,) = [event for event in events if event.type == "response.function_call_arguments.done"]
    same(done.arguments, deltas, "arguments")


@call("responses", "a call, its output, and an answer")
def _(ask: Asking) -> None:
    asked = {"tools": [CLOCK], "max_output_tokens": 200}
    first = _respond(ask, tool_choice="required", **asked)
    (found,) = [item for item in first.output if item.type == "function_call"]
    output = {"type": "function_call_output", "call_id": found.call_id, "output": "12 degrees, rain"}
    talk = [{"role": "user", "content": ASKED}, *first.output, output]
    _text(_respond(ask, talk, tools=[CLOCK], tool_choice="none"))


@call("responses", "an earlier response goes on", may_refuse=True)
def _(ask: Asking) -> None:
    first = _respond(ask, store=True)
    again = _respond(ask, "And then?", previous_response_id=first.id)
    expect(again.usage.input_tokens > first.usage.input_tokens, "the input has not grown")


@call("responses", "a tool of OpenAI's own", may_refuse=True)
def _(ask: Asking) -> None:
    answer = _respond(ask, tools=[{"type": "web_search"}], tool_choice="required")
    expect(any(item.type == "web_search_call" for item in answer.output), "no search")


@call("responses", "an earlier response that nobody has")
def _(ask: Asking) -> None:
    with refused(400, 404):
        _respond(ask, previous_response_id="resp_none")


@call("responses", "an unknown model: 404")
def _(ask: Asking) -> None:
    with refused(404):
        ask.client.responses.create(model="no-such-model", input=ASKED, max_output_tokens=16)


@call("responses", "an input that is too long")
def _(ask: Asking) -> None:
    with refused(400) as found:
        _respond(ask, "very long " * 6000)
    same(found().get("code"), "context_length_exceeded", "code")
