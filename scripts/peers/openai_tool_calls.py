"""Calls of OpenAI's client with tools: calls that may come, must come and may not come, and their results."""

from __future__ import annotations

import json
from typing import Any

import openai
import pydantic
from openai_asking import CITY, Asking, call, content_of, expect, refused, same

ASK_TOOL: list[Any] = [{"role": "user", "content": "Is it warm in Oslo? Use the tool."}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather of a city.", "parameters": CITY},
}
CLOCK: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {"type": "object", "properties": {"utc": {"type": "boolean"}}, "required": ["utc"]},
    },
}
NAMED = {"type": "function", "function": {"name": "weather"}}
_TOOLS: dict[str, Any] = {"tools": [WEATHER, CLOCK], "max_tokens": 200}


class Place(pydantic.BaseModel):
    """Where it may be warm."""

    model_config = pydantic.ConfigDict(extra="forbid")

    by_the_sea: bool


def _check_call(found: Any, names: tuple[str, ...]) -> None:
    same(found.type, "function", "type")
    expect(found.id, "a call without an id")
    expect(found.function.name in names, f"a call of {found.function.name!r}")
    expect(isinstance(json.loads(found.function.arguments), dict), "arguments are no object")


def _result(call_id: str, content: Any = "12 degrees, rain") -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": content}


def _called(*calls: tuple[str, str, str], content: str | None = None) -> dict[str, Any]:
    made = [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for call_id, name, arguments in calls
    ]
    return {"role": "assistant", "content": content, "tool_calls": made}


@call("tools", "auto: a text or calls")
def _(ask: Asking) -> None:
    choice = ask.chat(ASK_TOOL, **_TOOLS, tool_choice="auto").choices[0]
    for found in choice.message.tool_calls or ():
        _check_call(found, ("weather", "clock"))
    expect(choice.message.content or choice.message.tool_calls, "neither a text nor a call")
    same(choice.finish_reason == "tool_calls", bool(choice.message.tool_calls), "tool_calls and finish_reason")


@call("tools", "the prompt shows the tools")
def _(ask: Asking) -> None:
    n_with, n_without = (
        ask.chat(ASK_TOOL, max_tokens=1, **tools).usage.prompt_tokens for tools in ({"tools": [WEATHER]}, {})
    )
    expect(n_with > n_without + 20, f"{n_with} tokens with a tool, {n_without} without")


@call("tools", "none: a text")
def _(ask: Asking) -> None:
    choice = ask.chat(ASK_TOOL, **{**_TOOLS, "max_tokens": 16}, tool_choice="none").choices[0]
    expect(not choice.message.tool_calls and choice.message.content, "no text")


@call("tools", "required: a call, finish_reason tool_calls")
def _(ask: Asking) -> None:
    choice = ask.chat(ASK_TOOL, **_TOOLS, tool_choice="required").choices[0]
    expect(choice.message.tool_calls, f"no call: {choice.message.content!r}")
    for found in choice.message.tool_calls:
        _check_call(found, ("weather", "clock"))
    same(choice.finish_reason, "tool_calls", "finish_reason")


@call("tools", "a named one is called, with arguments of its schema")
def _(ask: Asking) -> None:
    choice = ask.chat(ASK_TOOL, **_TOOLS, tool_choice=NAMED).choices[0]
    (found,) = choice.message.tool_calls
    _check_call(found, ("weather",))
    arguments = json.loads(found.function.arguments)
    expect(arguments["city"] in ("Oslo", "Bern") and arguments["warm"] in (True, False), str(arguments))
    # the reference says nothing of the reason; OpenAI gives "stop" for a named call, and others "tool_calls"
    expect(choice.finish_reason in ("stop", "tool_calls"), f"finish_reason {choice.finish_reason}")


@call("tools", "a name that no tool has is refused")
def _(ask: Asking) -> None:
    with refused(400):
        ask.chat(ASK_TOOL, **_TOOLS, tool_choice={"type": "function", "function": {"name": "nothing"}})


@call("tools", "required without tools is refused")
def _(ask: Asking) -> None:
    with refused(400):
        ask.chat(ASK_TOOL, tool_choice="required")


@call("tools", "allowed_tools", may_refuse=True)
def _(ask: Asking) -> None:
    only = {"mode": "required", "tools": [{"type": "function", "function": {"name": "clock"}}]}
    choice = ask.chat(ASK_TOOL, **_TOOLS, tool_choice={"type": "allowed_tools", "allowed_tools": only}).choices[0]
    _check_call(choice.message.tool_calls[0], ("clock",))


@call("tools", "a custom tool", may_refuse=True)
def _(ask: Asking) -> None:
    custom = {"type": "custom", "custom": {"name": "note"}}
    choice = ask.chat(ASK_TOOL, tools=[custom], tool_choice="required", max_tokens=100).choices[0]
    same(choice.message.tool_calls[0].type, "custom", "type")


@call("tools", "parallel_tool_calls=False: one call at most")
def _(ask: Asking) -> None:
    choice = ask.chat(ASK_TOOL, **_TOOLS, tool_choice="required", parallel_tool_calls=False).choices[0]
    same(len(choice.message.tool_calls), 1, "calls")


@call("tools", "a call in a stream")
def _(ask: Asking) -> None:
    chunks = ask.stream(ASK_TOOL, **_TOOLS, tool_choice=NAMED)
    parts = [part for chunk in chunks for choice in chunk.choices for part in choice.delta.tool_calls or ()]
    same({part.index for part in parts}, {0}, "indexes")
    expect(parts[0].id and parts[0].function.name == "weather", "the first part has no id or name")
    expect(not any(part.function.name for part in parts[1:]), "the name comes twice")
    arguments = json.loads("".join(part.function.arguments or "" for part in parts))
    expect(arguments["city"] in ("Oslo", "Bern"), str(arguments))


@call("tools", "the helper for streams gives the parsed arguments")
def _(ask: Asking) -> None:
    tool: Any = openai.pydantic_function_tool(Place, name="place")
    asked: dict[str, Any] = {"messages": ASK_TOOL, "tools": [tool], "tool_choice": "required"}
    with ask.client.chat.completions.stream(model=ask.model, temperature=0, max_tokens=200, **asked) as stream:
        message: Any = stream.get_final_completion().choices[0].message
    expect(isinstance(message.tool_calls[0].function.parsed_arguments, Place), "not parsed")


@call("tools", "parse() with a class of pydantic as a tool")
def _(ask: Asking) -> None:
    tool: Any = openai.pydantic_function_tool(Place, name="place")
    answer: Any = ask.client.chat.completions.parse(
        model=ask.model, messages=ASK_TOOL, tools=[tool], tool_choice="required", temperature=0, max_tokens=200
    )
    found = answer.choices[0].message.tool_calls[0].function
    expect(isinstance(found.parsed_arguments, Place), f"not parsed: {found.arguments!r}")


@call("tools", "a call, its result, and an answer")
def _(ask: Asking) -> None:
    message = ask.chat(ASK_TOOL, **_TOOLS, tool_choice=NAMED).choices[0].message
    (found,) = message.tool_calls
    told = [*ASK_TOOL, message.model_dump(exclude_none=True), _result(found.id)]
    content_of(ask.chat(told, tools=[WEATHER, CLOCK], tool_choice="none"))


@call("tools", "two calls at once and their results in the history")
def _(ask: Asking) -> None:
    calls = _called(("c1", "weather", '{"city": "Oslo", "warm": true}'), ("c2", "clock", '{"utc": true}'))
    told = [*ASK_TOOL, calls, _result("c1"), _result("c2", "noon")]
    content_of(ask.chat(told, tools=[WEATHER, CLOCK], tool_choice="none"))


@call("tools", "a result as parts, and text beside a call")
def _(ask: Asking) -> None:
    calls = _called(("c1", "clock", '{"utc": true}'), content="I look at the clock.")
    told = [*ASK_TOOL, calls, _result("c1", [{"type": "text", "text": "noon"}])]
    content_of(ask.chat(told, tools=[CLOCK], tool_choice="none"))


@call("tools", "calls in the history without tools in the request")
def _(ask: Asking) -> None:
    calls = _called(("c1", "clock", "{}"))
    content_of(ask.chat([*ASK_TOOL, calls, _result("c1", "noon")]))


@call("tools", "the deprecated functions", may_refuse=True)
def _(ask: Asking) -> None:
    asked: dict[str, Any] = {"functions": [CLOCK["function"]], "function_call": {"name": "clock"}}
    message = ask.chat(ASK_TOOL, max_tokens=100, **asked).choices[0].message
    same(message.function_call.name, "clock", "function_call.name")
