"""Answers in the formats of known models, cut anywhere: what is reasoning, what is text, and which tools are called."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from ggufmoe.runtime.answer_reader import AnswerReader, Part
from ggufmoe.runtime.answer_syntax import AnswerSyntax, Tags, ToolSyntax
from ggufmoe.runtime.events import Reasoning, ToolCallArguments
from ggufmoe.runtime.messages import Tool

THINK = Tags("<think>", "</think>")
WEATHER = Tool("weather", parameters={"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}})
HERMES = ToolSyntax("json", ("<tool_call>",), ends=("</tool_call>",))
BARE = ToolSyntax("json", section=("<|python_tag|>",))
MISTRAL = ToolSyntax("json", ("[TOOL_CALLS]",))
MISTRAL_NAMED = ToolSyntax("named", ("[TOOL_CALLS]",))
KEYED = ToolSyntax("json", ("<|tools_prefix|>",), ends=("<|tools_suffix|>",), name_is_key=True)
DEEPSEEK = ToolSyntax(
    "named", ("<begin>", "function", "<sep>"), section=("<calls>",), ends=("```", "<end>", "</calls>")
)
WITH_ID = ToolSyntax("named", ("<begin>", None, "<name>"), section=("<calls>",), ends=("<end>", "</calls>"))
CODER = ToolSyntax(
    "tagged",
    ("<tool_call>", "<function="),
    ends=("</function>", "</tool_call>"),
    argument_opening=("<parameter=",),
    name_ends=(">",),
    key_end=">",
    value_end="</parameter>",
)
GLM = ToolSyntax(
    "tagged",
    ("<tool_call>",),
    ends=("</tool_call>",),
    argument_opening=("<arg_key>",),
    key_end="<arg_value>",
    value_end="</arg_value>",
)
LFM = ToolSyntax("python", ("<|tool_call_start|>",), ends=("<|tool_call_end|>",))


@dataclass(frozen=True)
class Read:
    """What was read of an answer."""

    text: str = ""
    reasoning: str = ""
    calls: tuple[tuple[str, str], ...] = ()


def put_together(parts: list[Part]) -> Read:
    text, reasoning = "", ""
    calls: list[tuple[str, str]] = []
    for part in parts:
        if isinstance(part, str):
            text += part
        elif isinstance(part, Reasoning):
            reasoning += part.reasoning
        elif isinstance(part, ToolCallArguments):
            name, arguments = calls[part.index]
            calls[part.index] = name, arguments + part.arguments
        else:
            assert part.index == len(calls)
            calls.append((part.name, ""))
    return Read(text, reasoning, tuple(calls))


def read(answer: str, tools: ToolSyntax | None = None, *, cuts: tuple[int, ...] = (), **given: Any) -> Read:
    """Read ``answer``, which comes in pieces that end at ``cuts``."""
    is_harmony = given.pop("is_harmony", False)
    syntax = AnswerSyntax(given.pop("tags", THINK), tools, given.pop("wrap", None), is_harmony=is_harmony)
    reader = AnswerReader(syntax, tools=given.pop("called", [WEATHER] if tools else []), **given)
    ends = (*cuts, len(answer))
    parts = [part for begin, end in zip((0, *cuts), ends, strict=True) for part in reader.push(answer[begin:end])]
    return put_together(parts + reader.finish())


def check(expected: Read, answer: str, tools: ToolSyntax | None = None, **given: Any) -> None:
    """``answer`` reads as ``expected`` whole, in two pieces however cut, and letter by letter."""
    assert read(answer, tools, **given) == expected
    for cuts in (*((n,) for n in range(1, len(answer))), tuple(range(1, len(answer)))):
        assert read(answer, tools, cuts=cuts, **given) == expected, f"cut at {cuts}"


# ---- reasoning


@pytest.mark.parametrize("answer", ["<think>\nHm.\n</think>\n\nYes.", " <think>Hm.</think>Yes."])
def test_reasoning_and_text(answer: str) -> None:
    check(Read("Yes.", "Hm."), answer)


def test_reasoning_that_the_prompt_began() -> None:
    check(Read("Yes.", "Hm."), "\nHm.\n</think>\n\nYes.", in_reasoning=True)
    check(Read("Yes.", "Hm."), "<think>\nHm.\n</think>\n\nYes.", in_reasoning=True)


def test_an_answer_that_stops_within_reasoning() -> None:
    check(Read("", "Hm. I'll </thin"), "<think>Hm. I'll </thin")
    check(Read("", "Hm."), "Hm.", in_reasoning=True)


def test_no_reasoning_at_all() -> None:
    check(Read("Yes."), "</think>Yes.")
    check(Read("Yes."), "</think>\n\nYes.", in_reasoning=True)
    check(Read("Yes. "), "Yes. ")
    check(Read("<thin"), "<thin")
    check(Read(""), "")


def test_marks_that_the_text_mentions_stay_text() -> None:
    code = "Use `<think>` and `</think>`: print('<think>')"
    check(Read(code), code)
    check(Read(code, "Hm."), f"<think>Hm.</think>{code}")


def test_other_marks() -> None:
    tags = Tags("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]")
    check(Read("Yes.", "Hm. [BEGIN]"), "Hm. [BEGIN]\n[BEGIN FINAL RESPONSE]\nYes.", tags=tags, in_reasoning=True)


def test_marks_around_the_text() -> None:
    response = Tags("<response>", "</response>")
    check(Read("Yes.", "Hm."), "<think>Hm.</think>\n<response>\nYes.\n</response>", wrap=response)
    check(Read("Yes. <response>", "Hm."), "<think>Hm.</think>Yes. <response>", wrap=response)
    call = f"<tool_call>{ROME_JSON}</tool_call>"
    check(Read("Yes.", "", (ROME,)), f"<response>Yes.</response>\n{call}", HERMES, wrap=response)


# ---- the channels of gpt-oss

FINAL = "<|start|>assistant<|channel|>final<|message|>Yes."


def test_channels() -> None:
    check(Read("Yes.", "Hm."), f"<|channel|>analysis<|message|>Hm.<|end|>{FINAL}", is_harmony=True)
    check(Read("Yes."), "<|channel|>final<|message|>Yes.", is_harmony=True)


def test_a_channel_that_stops_within_reasoning_or_a_header() -> None:
    check(Read("", "Hm. <|en"), "<|channel|>analysis<|message|>Hm. <|en", is_harmony=True)
    check(Read("", "Hm."), "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|cha", is_harmony=True)


def test_a_preamble_is_text() -> None:
    answer = f"<|channel|>commentary<|message|>I'll look.<|end|>{FINAL}"
    check(Read("I'll look.\n\nYes."), answer, is_harmony=True)


@pytest.mark.parametrize(
    "header",
    [
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>",
        " to=functions.weather<|channel|>commentary json<|message|>",
    ],
)
def test_a_call_in_a_channel(header: str) -> None:
    check(Read("", "", (("weather", '{"city": "Paris"}'),)), f'{header}{{"city": "Paris"}}<|call|>', is_harmony=True)


def test_text_without_any_channel() -> None:
    check(Read("Yes, plainly."), "Yes, plainly.", is_harmony=True)


# ---- tool calls

PARIS = ("weather", '{"city": "Paris", "days": 2}')
ROME = ("weather", '{"city": "Rome"}')
PARIS_JSON = '{"name": "weather", "arguments": {"city": "Paris", "days": 2}}'
ROME_JSON = '{"name": "weather", "arguments": {"city": "Rome"}}'
PARAMETERS = ROME_JSON.replace("arguments", "parameters")


@pytest.mark.parametrize(
    ("tools", "answer"),
    [
        (HERMES, f"<tool_call>\n{PARIS_JSON}\n</tool_call>\n<tool_call>\n{ROME_JSON}\n</tool_call>"),
        (HERMES, f"<tool_call>{PARIS_JSON}</tool_call><tool_call>{ROME_JSON}</tool_call>"),
        (MISTRAL, f"[TOOL_CALLS] [{PARIS_JSON}, {ROME_JSON}]"),
        (MISTRAL_NAMED, f"[TOOL_CALLS]weather[CALL_ID]1[ARGS]{PARIS[1]}[TOOL_CALLS]weather[ARGS]{ROME[1]}"),
        (KEYED, f'<|tools_prefix|>[{{"weather": {PARIS[1]}}}, {{"weather": {ROME[1]}}}]<|tools_suffix|>'),
        (
            DEEPSEEK,
            f"<calls><begin>function<sep>weather\n```json\n{PARIS[1]}\n```<end>\n"
            f"<begin>function<sep>weather\n```json\n{ROME[1]}\n```<end></calls>",
        ),
        (WITH_ID, f"<calls><begin>a1<name>weather<x>{PARIS[1]}<end><begin>a2<name>weather<x>{ROME[1]}<end></calls>"),
        (
            CODER,
            "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
            "</function>\n</tool_call>\n<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n"
            "</function>\n</tool_call>",
        ),
        (
            GLM,
            "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
            "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>weather\n<arg_key>city</arg_key>\n"
            "<arg_value>Rome</arg_value>\n</tool_call>",
        ),
        (LFM, "<|tool_call_start|>[weather(city='Paris', days=2), weather(city='Rome')]<|tool_call_end|>"),
    ],
    ids=lambda value: value.style if isinstance(value, ToolSyntax) else "",
)
def test_calls_of_every_style(tools: ToolSyntax, answer: str) -> None:
    check(Read("", "", (PARIS, ROME)), answer, tools)
    check(Read("I'll look.", "Hm.", (PARIS, ROME)), f"<think>Hm.</think>I'll look.\n\n{answer}\n", tools)


def test_without_tools_a_call_is_text() -> None:
    answer = f"<tool_call>\n{ROME_JSON}\n</tool_call>"
    check(Read(answer), answer, HERMES, called=[])


@pytest.mark.parametrize("answer", [ROME_JSON, PARAMETERS, f"<|python_tag|>{ROME_JSON}"])
def test_a_call_that_is_nothing_but_json(answer: str) -> None:
    check(Read("", "", (ROME,)), answer, BARE)


@pytest.mark.parametrize("answer", ['{"name": "Ada", "arguments": {}}', '{"answer": 42} ', "{ no json", "{", "{}"])
def test_json_that_is_no_call_stays_text(answer: str) -> None:
    check(Read(answer), answer, BARE)


@pytest.mark.parametrize(
    "answer", ["<tool_call> is a mark", "<tool_call>\n{}\n</tool_call>", "a <tool_cal", "<tool_call>{'name'", "x [ y"]
)
def test_what_looks_like_a_call_and_is_none_stays_text(answer: str) -> None:
    check(Read(answer), answer, HERMES)


def test_text_after_a_call() -> None:
    check(Read("Done.", "", (ROME,)), f"<tool_call>{ROME_JSON}</tool_call>\nDone.", HERMES)


def test_a_call_that_is_cut_off_has_the_arguments_that_came() -> None:
    answer = '<tool_call>{"name": "weather", "arguments": {"city": "Pa'
    check(Read("", "", (("weather", '{"city": "Pa'),)), answer, HERMES)


@pytest.mark.parametrize(
    ("written", "arguments"),
    [
        ('{"arguments": {"city": "Rome"}, "name": "weather"}', '{"city": "Rome"}'),
        ('{"name": "weather", "arguments": "{\\"city\\": \\"Rome\\"}"}', '{"city": "Rome"}'),
        ('{"type": "function", "function": {"name": "weather", "parameters": {"city": "Rome"}}}', '{"city": "Rome"}'),
        ('{"id": "a1", "name": "weather"}', "{}"),
        ('{"name": "weather", "arguments": {"a": "}\\" {", "b": [{}]}}', '{"a": "}\\" {", "b": [{}]}'),
    ],
)
def test_ways_to_write_an_object(written: str, arguments: str) -> None:
    check(Read("", "", (("weather", arguments),)), f"<tool_call>{written}</tool_call>", HERMES)


def test_objects_without_end_inside_each_other_are_no_call() -> None:
    answer = "<tool_call>" + '{"function": ' * 5000
    assert read(answer, HERMES) == Read(answer)
    assert read('<tool_call>{"a": ' + "[" * 50_000, HERMES).calls == ()


def test_arguments_come_as_they_are_written() -> None:
    reader = AnswerReader(AnswerSyntax(THINK, HERMES), tools=[WEATHER])
    assert put_together(reader.push('<tool_call>{"name": "weather", "arguments": {"ci')).calls == (("weather", '{"ci'),)
    assert reader.push('ty": "R') == [ToolCallArguments(0, 'ty": "R')]


def test_values_between_marks_have_the_types_of_the_schema() -> None:
    call = "<tool_call><function=weather><parameter=city>12</parameter><parameter=days>12</parameter>"
    calls = read(f"{call}<parameter=x>[1]</parameter><parameter=y>so</parameter></function></tool_call>", CODER).calls
    assert [json.loads(arguments) for _, arguments in calls] == [{"city": "12", "days": 12, "x": [1], "y": "so"}]
    check(Read("", "", (("weather", "{}"),)), "<tool_call><function=weather></function></tool_call>", CODER)


@pytest.mark.parametrize("source", ["[weather(", "weather", "[1]", "[weather(city=open('x'))]", "['\\d']", "[" * 9999])
def test_python_that_is_no_call_stays_text(source: str) -> None:
    answer = f"<|tool_call_start|>{source}<|tool_call_end|>"
    assert read(answer, LFM) == Read(answer)


@pytest.mark.parametrize("value", ["{1, 2}", "b'x'", "{(1, 2): 3}", "1e999", "...", "1j"])
def test_values_of_python_that_json_does_not_have_are_no_call(value: str) -> None:
    answer = f"<|tool_call_start|>[weather(city={value})]<|tool_call_end|>"
    assert read(answer, LFM) == Read(answer)


@pytest.mark.parametrize(
    ("tools", "answer", "expected"),
    [
        (LFM, r"<|tool_call_start|>[weather(city='\ud800')]<|tool_call_end|>", {"city": "\ud800"}),
        (CODER, "<tool_call><function=weather><parameter=days>NaN</parameter></function></tool_call>", {"days": "NaN"}),
        (CODER, r'<tool_call><function=weather><parameter=days>"\ud800"</parameter></function>', {"days": "\ud800"}),
    ],
)
def test_arguments_are_json_that_utf8_can_hold(tools: ToolSyntax, answer: str, expected: dict[str, str]) -> None:
    ((_, arguments),) = read(answer, tools).calls
    arguments.encode()
    assert json.loads(arguments, parse_constant=pytest.fail) == expected


def test_a_name_that_utf8_cannot_hold_is_none() -> None:
    answer = r'<tool_call>{"name": "\ud800"}</tool_call>'
    assert read(answer, HERMES) == Read(answer)
