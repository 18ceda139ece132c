"""How the answers of a model are written: where its reasoning and its tool calls begin and end.

Told from its chat template: by the messages that the template writes for a probe, which is how the model was trained
to write them, and where the template writes none, by marks in its source.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ggufmoe.errors import TemplateError
from ggufmoe.runtime.messages import Message, Tool, ToolCall
from ggufmoe.templates.jinja_template import ChatTemplate

Words = tuple[str | None, ...]
"""Words in their order, with white space between them or not; None stands for any text up to the next word."""
CallStyle = Literal["json", "named", "tagged", "python"]
"""json: an object with name and arguments, alone or in a list; named: the name, then the arguments as JSON; tagged: the
name, then each argument between marks; python: a list of calls as Python writes them."""


@dataclass(frozen=True)
class Tags:
    """The marks around a part of an answer."""

    opens: str
    closes: str


@dataclass(frozen=True)
class ToolSyntax:
    """How tool calls are written."""

    style: CallStyle
    opening: Words = ()
    """What comes before each call; nothing where a call is told from text by its JSON alone."""
    section: Words = ()
    """What comes once before the first call."""
    ends: tuple[str, ...] = ()
    """Words behind a call, between calls and after the last."""
    name_is_key: bool = False
    """json: whether the object is ``{NAME: ARGUMENTS}``."""
    argument_opening: tuple[str, ...] = ()
    """tagged: what comes before the name of each argument."""
    name_ends: tuple[str, ...] = ()
    """tagged: what comes after the tool's name."""
    key_end: str = ""
    """tagged: what comes between an argument's name and its value; attributes may come before it."""
    value_end: str = ""
    """tagged: what comes after its value."""

    @property
    def begins(self) -> tuple[str, ...]:
        """The words of which each begins a call where it stands in an answer."""
        return tuple(dict.fromkeys(word for words in (self.section, self.opening) for word in words[:1] if word))


@dataclass(frozen=True)
class AnswerSyntax:
    """How a model writes its answers."""

    reasoning: Tags
    tools: ToolSyntax | None
    text: Tags | None = None
    """What may stand around the text."""
    is_harmony: bool = False
    """Whether they are written in the channels of gpt-oss (``openai/harmony``)."""
    arguments_as_text: bool = False
    """Whether the template wants the arguments of earlier calls as text, not as an object."""

    @property
    def marks(self) -> tuple[str, ...]:
        """All words that a model may have as control tokens, which must be part of the text to be seen."""
        if self.is_harmony:
            return HARMONY_MARKS
        tags = (self.reasoning, self.text) if self.text else (self.reasoning,)
        marks = dict.fromkeys(mark for pair in tags for mark in (pair.opens, pair.closes))
        if self.tools is not None:
            tools = self.tools
            marks |= dict.fromkeys(word for word in (*tools.section, *tools.opening) if word)
            marks |= dict.fromkeys((*tools.ends, *tools.argument_opening, *tools.name_ends))
            marks |= dict.fromkeys((tools.key_end, tools.value_end))
        return tuple(mark for mark in marks if mark)


HARMONY_MARKS = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")
_THINK = Tags("<think>", "</think>")
_RESPONSE = Tags("<response>", "</response>")
"""Of Granite 3.3, which is asked for it by the system message of its template."""
_KNOWN_TAGS = (
    _THINK,
    Tags("[THINK]", "[/THINK]"),
    Tags("<|START_THINKING|>", "<|END_THINKING|>"),
    Tags("<|inner_prefix|>", "<|inner_suffix|>"),
    Tags("<|channel>thought", "<channel|>"),
    Tags("Here are my reasoning steps:", "[BEGIN FINAL RESPONSE]"),
)
_LFM2 = ToolSyntax("python", ("<|tool_call_start|>",), ends=("<|tool_call_end|>",))
_KIMI = ToolSyntax(
    "named",
    opening=("<|tool_call_begin|>", "functions."),
    section=("<|tool_calls_section_begin|>",),
    ends=("<|tool_call_end|>", "<|tool_calls_section_end|>"),
)
_DEEPSEEK = ToolSyntax(
    "named",
    opening=("<\uff5ctool\u2581call\u2581begin\uff5c>", "function", "<\uff5ctool\u2581sep\uff5c>"),
    section=("<\uff5ctool\u2581calls\u2581begin\uff5c>",),
    ends=("```", "<\uff5ctool\u2581call\u2581end\uff5c>", "<\uff5ctool\u2581calls\u2581end\uff5c>"),
)
_MARKED_CALLS = (
    ("<|tool_list_start|>", _LFM2),
    ("<|tool_call_start|>", _LFM2),
    ("<|tool_calls_section_begin|>", _KIMI),
    ("<\uff5ctool\u2581calls\u2581begin\uff5c>", _DEEPSEEK),
    ("<tool_call>", ToolSyntax("json", ("<tool_call>",), ends=("</tool_call>",))),
    ("<|tool_call|>", ToolSyntax("json", ("<|tool_call|>",))),
    ("[TOOL_CALLS]", ToolSyntax("json", ("[TOOL_CALLS]",))),
)
"""By a mark in the source of a template that writes no calls: how the models with such templates call tools."""

_ASK = Message("user", "ggufmoe asks")
_TEXT, _THOUGHT = "ggufmoeSays", "ggufmoeThinks"
_NAME, _KEY, _OTHER_KEY, _VALUE, _OTHER_VALUE = "probe_tool", "probe_key", "other_key", "one v", "two v"
_IDS = ("probe0001", "probe0002")
"""As long as those of Mistral, whose templates check that."""
_TOOL = Tool(
    _NAME,
    "A probe.",
    {"type": "object", "properties": {key: {"type": "string", "description": "x"} for key in (_KEY, _OTHER_KEY)}},
)
_CALL = ToolCall(_NAME, json.dumps({_KEY: _VALUE, _OTHER_KEY: _OTHER_VALUE}), _IDS[0])
_ARGUMENTS = re.compile(rf'\{{\s*"{_KEY}"\s*:\s*"{_VALUE}"\s*,\s*"{_OTHER_KEY}"\s*:\s*"{_OTHER_VALUE}"\s*\}}')
_WORD = re.compile(r"<[^<>\s]*>?|\[[^\[\]\s]*\]|[^\s<\[]+|\[")
_MARK = re.compile(r"<[^<>\s]+>?|\[[^\[\]\s]+\]")
_MAX_CALL_CHARS = 4096
_CUT_MARK = re.compile(r"[<\[][^<>\[\]\s]*$")


def syntax_of(template: ChatTemplate) -> AnswerSyntax:
    """How the model of ``template`` writes its answers; ``<think>`` and no tools where the template does not tell."""
    if "<|channel|>" in template.source and "<|message|>" in template.source:
        return AnswerSyntax(_THINK, None, is_harmony=True)
    tags = _reasoning_tags(template)
    tools, as_text = _tool_syntax(template, tags)
    text = _RESPONSE if _RESPONSE.opens in template.source and _RESPONSE.closes in template.source else None
    return AnswerSyntax(tags, tools, text, arguments_as_text=as_text)


def _written(template: ChatTemplate, answer: Message, *, tools: Sequence[Tool] = (), as_text: bool = False) -> str:
    """What the template makes of ``answer``, the last message; empty where it refuses or fails."""
    messages = [message.to_template(arguments_as_text=as_text) for message in (_ASK, answer)]
    given: dict[str, Any] = {"tools": [tool.to_template() for tool in tools]} if tools else {}
    try:
        return template.render(messages, add_generation_prompt=False, **given)
    except TemplateError:
        return ""


# ---- reasoning


def _reasoning_tags(template: ChatTemplate) -> Tags:
    source = template.source
    for tags in _KNOWN_TAGS:
        if tags.opens in source and tags.closes in source:
            return tags
    before, thought, behind = _written(template, Message("assistant", _TEXT, _THOUGHT)).partition(_THOUGHT)
    opens, closes = _MARK.findall(before), _MARK.findall(behind.partition(_TEXT)[0])
    if thought and opens and closes and before.rstrip().endswith(opens[-1]) and opens[-1] not in _around(template):
        return Tags(opens[-1], closes[0])
    return _THINK


def _around(template: ChatTemplate) -> str:
    """What the template writes around a message: the mark before the probe's question, and all behind it."""
    try:
        before, _, behind = template.render([_ASK.to_template()], add_generation_prompt=False).partition(_ASK.content)
    except TemplateError:
        return ""
    return "".join(_MARK.findall(before)[-1:]) + behind


# ---- tool calls


def _tool_syntax(template: ChatTemplate, tags: Tags) -> tuple[ToolSyntax | None, bool]:
    """How calls are written, None where that is not known; and whether the template wants their arguments as text."""
    said = _written(template, Message("assistant", _TEXT), tools=[_TOOL])
    around = _around(template)
    for as_text in (False, True) if said else ():
        asked = Message("assistant", "", tool_calls=(_CALL,))
        one = _beyond(said, _written(template, asked, tools=[_TOOL], as_text=as_text))
        if tags.closes in one.partition(_NAME)[0]:
            one = one.partition(tags.closes)[2]
        if _NAME not in one or "{'" in one:  # refused, left out, or written as Python writes a dict
            continue
        asked = replace(asked, tool_calls=(_CALL, replace(_CALL, id=_IDS[1])))
        two = _beyond(said, _written(template, asked, tools=[_TOOL], as_text=as_text))
        found = _json_style(one) or _named_style(one, two) or _python_style(one) or _tagged_style(one, two)
        if found is not None and any(mark in around for mark in found.begins):
            found = None  # what stands around every message begins no call
        if found is not None and "<|python_tag|>" in template.source:
            found = replace(found, section=("<|python_tag|>",))
        return found, as_text
    return next((syntax for mark, syntax in _MARKED_CALLS if mark in template.source), None), False


def _beyond(said: str, called: str) -> str:
    """The part of ``called`` that stands in the place of the text of ``said``; nothing where it is long for a call."""
    begin = next((n for n, (a, b) in enumerate(zip(said, called, strict=False)) if a != b), min(len(said), len(called)))
    cut = _CUT_MARK.search(called, 0, begin)
    begin = cut.start() if cut else begin
    return called[begin:].removesuffix(said.partition(_TEXT)[2]) if len(called) - begin <= _MAX_CALL_CHARS else ""


def _words(text: str) -> list[str | None]:
    """The words of ``text``; the call's id, which is another one each time, is None."""
    first, *others = (_WORD.findall(part) for part in re.split("|".join(_IDS), text))
    return [*first, *(word for part in others for word in (None, *part))]


def _told(words: Sequence[str | None]) -> tuple[str, ...]:
    return tuple(word for word in words if word is not None)


def _common_end(one: Sequence[str | None], other: Sequence[str | None]) -> int:
    """How many words at the end of both are the same."""
    pairs = zip(reversed(one), reversed(other), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _json_style(one: str) -> ToolSyntax | None:
    name = one.find(_NAME)
    for begin in (n for n, char in enumerate(one[:name]) if char in "[{"):
        try:
            value, end = json.JSONDecoder().raw_decode(one, begin)
        except (ValueError, RecursionError):
            continue
        if end > name:
            entry: Any = value[0] if isinstance(value, list) else value
            is_key = isinstance(entry, Mapping) and _NAME in entry
            opening = tuple(_words(one[:begin]))
            is_usable = not opening or _MARK.match(opening[0] or "")
            return ToolSyntax("json", opening, ends=_told(_words(one[end:])), name_is_key=is_key) if is_usable else None
    return None


def _named_style(one: str, two: str) -> ToolSyntax | None:
    arguments = _ARGUMENTS.search(one)
    if arguments is None:
        return None
    last = _ARGUMENTS.search(two)
    between = two[last.end() :] if last else ""
    return _opened(ToolSyntax("named"), one, between, one[arguments.end() :])


def _python_style(one: str) -> ToolSyntax | None:
    before, called, behind = one.partition(f"[{_NAME}(")
    if not called:
        return None
    ends = _told(_words(behind.rpartition(")]")[2]))
    return ToolSyntax("python", tuple(_words(before)), ends=ends) if before.strip() and ends else None


def _tagged_style(one: str, two: str) -> ToolSyntax | None:
    """The style of ``OPENING name NAME_ENDS ARGUMENT_OPENING key KEY_END value VALUE_END ...``."""
    parts, behind = [], one
    for word in (_NAME, _KEY, _VALUE, _OTHER_KEY, _OTHER_VALUE):
        before, found, behind = behind.partition(word)
        if not found:
            return None
        parts.append(before)
    _, behind_name, behind_key, behind_value, _ = parts
    name_words, value_words = _words(behind_name), _words(behind_value)
    n = _common_end(name_words, value_words)
    mark = re.search(r"<[^<>\s]*>$", behind_key.rstrip())
    key_end = mark[0] if mark else behind_key.rstrip()[-1:]
    value_end = value_words[0] if len(value_words) > n else None
    if not n or not key_end or not value_end or _KEY in behind_value:
        return None
    syntax = ToolSyntax(
        "tagged",
        argument_opening=_told(name_words[-n:]),
        name_ends=_told(name_words[:-n]),
        key_end=key_end,
        value_end=value_end,
    )
    return _opened(syntax, one, two.partition(_OTHER_VALUE)[2], behind)


def _opened(syntax: ToolSyntax, one: str, between: str, behind: str) -> ToolSyntax | None:
    """``syntax`` with what opens and ends calls; None where no mark does.

    ``one`` is a call, ``between`` what stands between two calls and after that, ``behind`` what stands after one.
    """
    before, middle = _words(one.partition(_NAME)[0]), _words(between.partition(_NAME)[0])
    n = (_common_end(before, middle) if _NAME in between else 0) or len(before)
    opening, section = tuple(before[len(before) - n :]), tuple(before[: len(before) - n])
    first = (section or opening or ("",))[0]
    if not first or not _MARK.match(first):
        return None
    ends = _told((*middle[: len(middle) - n], *_words(behind)) if _NAME in between else _words(behind))
    return replace(syntax, opening=opening, section=section, ends=tuple(dict.fromkeys(ends)))
