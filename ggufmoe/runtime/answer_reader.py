"""Reads an answer as it comes: which part is reasoning, which is text, and which tools are called with what.

A mark may be cut anywhere. What could become one is held back, and what looked like a call and was none is text.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ggufmoe.runtime.answer_syntax import AnswerSyntax, ToolSyntax
from ggufmoe.runtime.events import Reasoning, ToolCallArguments, ToolCallBegun
from ggufmoe.runtime.messages import Tool
from ggufmoe.runtime.pulledtext import Pull, PulledText

Part = str | Reasoning | ToolCallBegun | ToolCallArguments
"""A part of an answer; its text is a plain str."""

_NAME_CHAR = re.compile(r"[\w.\-/]")
_NAME = re.compile(r"[\w.\-/]+")
_NAME_KEYS, _ARGUMENT_KEYS = ("name", "tool_name", "function"), ("arguments", "parameters")
_OTHER_KEYS = ("id", "tool_call_id", "type")
_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.\-/]+)")
_BODY_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")
_HEADER_BEGINS = ("<|channel|>", "<|start|>", "<|constrain|>", "to=")


class AnswerReader:
    """Reads one answer; ``in_reasoning`` says that the prompt has begun its reasoning.

    Calls are looked for only when there are ``tools``: otherwise their marks are text.
    """

    def __init__(self, syntax: AnswerSyntax, *, in_reasoning: bool = False, tools: Sequence[Tool] = ()) -> None:
        self._syntax = syntax
        self._tools = {tool.name: tool for tool in tools}
        self._text = PulledText()
        self._parts: list[Part] = []
        self._n_calls = 0
        self._reading = self._channels() if syntax.is_harmony else self._tagged(in_reasoning)

    def push(self, text: str) -> list[Part]:
        """The parts that are certain by now, once ``text`` has come."""
        self._text.add(text)
        next(self._reading, None)
        parts = self._parts.copy()
        self._parts.clear()  # the list stays the same: its ``append`` is held by what reads
        return parts

    def finish(self) -> list[Part]:
        """The parts that were held back; the answer has ended."""
        self._text.ended = True
        return self.push("")

    # ---- marks around reasoning, then text and calls

    def _tagged(self, in_reasoning: bool) -> Pull[None]:
        text, think = self._text, self._syntax.reasoning
        yield from text.skip_space()
        mark = yield from text.take(think.opens, think.closes)
        if mark != think.closes and (mark or in_reasoning):
            thought = _Stripped(lambda part: self._parts.append(Reasoning(part)))
            yield from text.until((think.closes,), thought.put)
        yield from text.skip_space()
        if (tags := self._syntax.text) and (yield from text.take(tags.opens)):
            yield from text.until((tags.closes,), _Stripped(self._parts.append).put)
            yield from text.skip_space()
        tools = self._syntax.tools if self._tools else None
        if tools is not None and not tools.opening:
            yield from self._bare_call(tools)
        if tools is not None and tools.begins:
            yield from self._text_and_calls(tools)
        yield from self._plain()

    def _plain(self) -> Pull[None]:
        """Pass all text on, to the end."""
        while True:
            if rest := self._text.read():
                self._parts.append(rest)
            if self._text.ended:
                return
            yield

    def _text_and_calls(self, tools: ToolSyntax) -> Pull[None]:
        said = _Stripped(self._parts.append)
        while begin := (yield from self._text.until(tools.begins, said.put)):
            said.drop_space()
            while begin:
                self._text.record()
                if not (yield from self._call(tools, begin)):
                    said.put(begin + self._text.recorded())
                    break
                begin = yield from self._next_call(tools)
        said.flush()

    def _bare_call(self, tools: ToolSyntax) -> Pull[None]:
        """Read an answer that is a call without any mark; what is none is left to be read as text."""
        self._text.record()
        is_call = (yield from self._text.take("{")) and (yield from self._object(tools, self._tools))
        read = self._text.recorded()
        if not is_call:
            self._text.put_back(read)

    def _next_call(self, tools: ToolSyntax) -> Pull[str]:
        """Read what stands between two calls or after the last; the word that begins another one, or an empty text."""
        while True:
            yield from self._text.skip_space()
            word = yield from self._text.take(*tools.begins, *tools.ends)
            if not word or word in tools.begins:
                return word

    def _call(self, tools: ToolSyntax, begin: str) -> Pull[bool]:
        """Read a call, or a list of them, after its first word; False for what is none."""
        words = (*tools.section, *tools.opening) if begin in tools.section[:1] else tools.opening
        for word, following in zip(words[1:], (*words, None)[2:], strict=True):
            yield from self._text.skip_space()
            if word is None:
                yield from self._text.until((following or "{",), _ignore, keep=True)
            elif not (yield from self._text.take(word)) and word[0] in "<[" and begin not in tools.section[:1]:
                return False
        yield from self._text.skip_space()
        read = {"json": self._objects, "named": self._named, "tagged": self._marked, "python": self._python}
        return (yield from read[tools.style](tools))

    # ---- styles of calls

    def _objects(self, tools: ToolSyntax) -> Pull[bool]:
        in_list = yield from self._text.take("[")
        n_read = 0
        while True:
            yield from self._text.skip_space()
            if not (yield from self._text.take("{")):
                break
            if not (yield from self._object(tools)):
                return n_read > 0
            n_read += 1
            yield from self._text.skip_space()
            yield from self._text.take(",", ";")
        if in_list:
            yield from self._text.take("]")
        return n_read > 0

    def _object(
        self, tools: ToolSyntax, known: Mapping[str, Tool] | None = None, *, is_inner: bool = False
    ) -> Pull[bool]:
        """Read the object of a call after its brace; False, with nothing reported, for one that is none.

        ``known`` are the only names that are accepted; ``is_inner`` is an object under the key ``function`` of another.
        """
        call, mark = _Call(is_inner), ""
        while mark != "}":
            yield from self._text.skip_space()
            mark = yield from self._text.take("}", ",")
            if not mark and not (yield from self._member(tools, call, known)):
                break
        if call.is_begun and not call.has_arguments:
            self._argue("{}")
        return call.is_begun

    def _member(self, tools: ToolSyntax, call: _Call, known: Mapping[str, Tool] | None) -> Pull[bool]:
        """Read a key and its value; False for what belongs to no call."""
        text = self._text
        key = yield from self._json_text()
        yield from text.skip_space()
        if key is None or not (yield from text.take(":")):
            return False
        yield from text.skip_space()
        if tools.name_is_key:
            self._begin(key)
            call.is_begun = call.has_arguments = True
            yield from text.json_value(self._argue)
        elif key == "function" and not call.is_inner and (yield from text.take("{")):
            call.is_begun = call.has_arguments = yield from self._object(tools, known, is_inner=True)
        elif key in _NAME_KEYS:
            name = yield from self._json_text()
            if name is None or (known is not None and name not in known):
                return False
            self._begin(name)
            call.is_begun = True
            self._argue(call.held)
        elif key in _ARGUMENT_KEYS:
            yield from self._arguments(call)
        elif known is not None and key not in _OTHER_KEYS:
            return False
        else:
            yield from text.json_value(_ignore)
        return True

    def _arguments(self, call: _Call) -> Pull[None]:
        """Read the arguments, as they come where the call has begun; those that are a text are decoded first."""
        call.has_arguments = True
        is_text = yield from self._text.starts('"')
        parts: list[str] = []
        yield from self._text.json_value(self._argue if call.is_begun and not is_text else parts.append)
        held = "".join(parts)
        if is_text and (decoded := _decoded(held)) is not None:
            held = decoded
        if call.is_begun:
            self._argue(held)
        else:
            call.held = held

    def _json_text(self) -> Pull[str | None]:
        """Read a JSON text and decode it; None for what is none."""
        if not (yield from self._text.starts('"')):
            return None
        parts: list[str] = []
        yield from self._text.json_value(parts.append)
        return _decoded("".join(parts))

    def _named(self, tools: ToolSyntax) -> Pull[bool]:
        head: list[str] = []
        marks = (word for word in tools.ends if word[0] in "<[")  # not what may fence the arguments in
        yield from self._text.until(("{", *marks), head.append, keep=True)
        name = _NAME.match("".join(head).strip())
        if name is None:
            return False
        self._begin(name[0])
        if (yield from self._text.starts("{")):
            yield from self._text.json_value(self._argue)
        else:
            self._argue("{}")
        return True

    def _marked(self, tools: ToolSyntax) -> Pull[bool]:
        text = self._text
        name = yield from text.matching(_NAME_CHAR)
        if not name:
            return False
        self._begin(name)
        for word in tools.name_ends:
            yield from text.skip_space()
            yield from text.take(word)
        n_arguments = 0
        while True:
            yield from text.skip_space()
            if not (yield from text.take(tools.argument_opening[0])):
                break
            for word in tools.argument_opening[1:]:
                yield from text.skip_space()
                yield from text.take(word)
            head: list[str] = []
            value: list[str] = []
            yield from text.until((tools.key_end,), head.append)
            yield from text.until((tools.value_end,), value.append)
            if key := re.match(r'[^"\'<>\s]+', "".join(head).strip()):
                given = self._typed(name, key[0], "".join(value).removeprefix("\n").removesuffix("\n"))
                self._argue(f"{', ' if n_arguments else '{'}{json.dumps(key[0])}: {given}")
                n_arguments += 1
        self._argue("}" if n_arguments else "{}")
        return True

    def _typed(self, tool: str, key: str, written: str) -> str:
        """A value between marks as JSON: a text where the tool's schema says so, else JSON if it is that."""
        properties = self._tools[tool].parameters.get("properties") if tool in self._tools else None
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        if not (isinstance(schema, Mapping) and schema.get("type") == "string"):
            try:
                return _as_json(json.loads(written))
            except (ValueError, RecursionError):
                pass
        return _as_json(written)

    def _python(self, tools: ToolSyntax) -> Pull[bool]:
        parts: list[str] = []
        yield from self._text.until(tools.ends, parts.append, keep=True)
        calls = _python_calls("".join(parts).strip())
        for name, arguments in calls:
            self._begin(name)
            self._argue(arguments)
        return bool(calls)

    def _begin(self, name: str) -> None:
        self._parts.append(ToolCallBegun(self._n_calls, name))
        self._n_calls += 1

    def _argue(self, arguments: str) -> None:
        if arguments:
            self._parts.append(ToolCallArguments(self._n_calls - 1, arguments))

    # ---- the channels of gpt-oss

    def _channels(self) -> Pull[None]:
        """Read messages of ``<|channel|>CHANNEL to=RECIPIENT<|message|>BODY<|end|>``; the prompt began the first."""
        text, has_text = self._text, False
        yield from text.skip_space()
        head = [(yield from text.take(*_HEADER_BEGINS))]
        has_header = head != [""]
        while True:
            if has_header and not (yield from text.until(("<|message|>",), head.append)):
                return
            header, has_header = "".join(head), True
            channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
            if recipient and recipient[1] not in ("user", "assistant"):
                self._begin(recipient[1])
                put: Callable[[str], object] = self._argue
            elif channel and channel[1] == "analysis":
                put = _Stripped(lambda part: self._parts.append(Reasoning(part))).put
            else:
                if has_text:
                    self._parts.append("\n\n")
                has_text = True
                put = self._parts.append
            end = yield from text.until(_BODY_ENDS, put)
            head = [end]
            if not end:
                return


@dataclass
class _Call:
    """How far the object of a call has been read."""

    is_inner: bool = False
    is_begun: bool = False
    has_arguments: bool = False
    held: str = ""
    """Arguments that came before the name."""


def _ignore(_: str) -> None:
    """Let a part go."""


def _decoded(written: str) -> str | None:
    """The content of a JSON text; None for what is none, or has half of a surrogate pair, which no UTF-8 can hold."""
    try:
        value = json.loads(written)
        str(value).encode()
    except ValueError:
        return None
    return value if isinstance(value, str) else None


def _as_json(value: object) -> str:
    """``value`` as JSON that UTF-8 can hold; raises ValueError or TypeError for what JSON does not have."""
    written = json.dumps(value, ensure_ascii=False, allow_nan=False)
    try:
        written.encode()
    except UnicodeEncodeError:
        return json.dumps(value)
    return written


def _python_calls(source: str) -> list[tuple[str, str]]:
    """Names and arguments, as JSON, of ``[name(key='value'), ...]``; none where it is anything else."""
    try:
        with warnings.catch_warnings():  # of escape sequences that Python does not know
            warnings.simplefilter("ignore")
            tree = ast.parse(source, mode="eval").body
        nodes = tree.elts if isinstance(tree, ast.List) else [tree]
        return [
            (ast.unparse(node.func), _as_json({str(word.arg): ast.literal_eval(word.value) for word in node.keywords}))
            for node in nodes
            if isinstance(node, ast.Call)
        ]
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return []


class _Stripped:
    """Passes text on to ``put`` without the white space around it: what comes last is held back."""

    def __init__(self, put: Callable[[str], object]) -> None:
        self._put = put
        self._space = ""
        self._is_begun = False

    def put(self, text: str) -> None:
        whole = self._space + text if self._is_begun else text.lstrip()
        shown = whole.rstrip()
        self._space = whole[len(shown) :]
        if shown:
            self._is_begun = True
            self._put(shown)

    def flush(self) -> None:
        """Pass the white space on that was held back."""
        if self._space:
            self._put(self._space)
        self._space = ""

    def drop_space(self) -> None:
        """Leave out the white space that was held back."""
        self._space = ""
