"""A conversation with a model, without state: messages become a prompt, an answer becomes text, reasoning and calls.

``Chat`` is a history over it. Knows nothing of native code and of terminals.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ggufmoe.errors import OptionError
from ggufmoe.gguf.special_texts import ENDS_BY_TEXT, special_literals
from ggufmoe.gguf.upstream import Keys
from ggufmoe.options import SamplingOptions, TemplateOptions
from ggufmoe.runtime.answer_reader import AnswerReader
from ggufmoe.runtime.answer_syntax import syntax_of
from ggufmoe.runtime.enginelike import EngineLike
from ggufmoe.runtime.events import ChatEvent, Event, Finished, Reasoning, ToolCallArguments, ToolCallBegun
from ggufmoe.runtime.messages import Message, Tool, ToolCall
from ggufmoe.runtime.textstream import stop_strings
from ggufmoe.templates.jinja_template import ChatTemplate, find_template, template_missing
from ggufmoe.work import CancelFlag

_logger = logging.getLogger("ggufmoe")
_THINKING_NAMES = ("enable_thinking", "thinking")
"""The variables that switch reasoning on and off: Qwen's and most, DeepSeek's and Granite's."""

OF_CONVERSATION = frozenset({"messages", "tools", "add_generation_prompt"})
"""Variables of a template that ``ChatFormat.render`` gives, so that none of them can be set."""


@dataclass(frozen=True)
class ChatPrompt:
    """What an answer continues, and what is needed to read that answer."""

    tokens: tuple[int, ...]
    in_reasoning: bool = False
    """Whether the prompt has begun the model's reasoning."""
    tools: tuple[Tool, ...] = ()


class ChatFormat:
    """How the model in ``engine`` is spoken to: its chat template, and how its answers are written.

    ``template`` is a ChatTemplate, or a name or file as for ``find_template``; None is the model's own template.
    Several threads may use one object; ``engine`` may be replaced by another one of the same model. Raises
    TemplateError when there is no template, or it cannot be used.
    """

    def __init__(self, engine: EngineLike, template: ChatTemplate | str | None = None) -> None:
        self.engine = engine
        self.template = template if isinstance(template, ChatTemplate) else _template(engine, template)
        self.syntax = syntax_of(self.template)
        """How answers are written."""
        marks = (engine.tokenize(mark, add_bos=False, parse_special=True) for mark in self.syntax.marks)
        self.shown = frozenset(tokens[0] for tokens in marks if len(tokens) == 1)
        """The tokens that mark reasoning and calls, for ``Engine.generate``: control tokens have no text without it."""

    def variables_of(self, options: TemplateOptions) -> dict[str, Any]:
        """The template's variables that ``options`` set. Raises OptionError for one that the template never reads, or
        that the conversation gives (``OF_CONVERSATION``)."""
        known, found = self.template.variables, dict(options.variables)
        if options.think != "auto":
            names = [name for name in _THINKING_NAMES if name in known]
            self._check(bool(names), "--think", f"none of {', '.join(_THINKING_NAMES)}")
            found |= dict.fromkeys(names, options.think == "on")
        if options.reasoning_effort != "auto":
            self._check("reasoning_effort" in known, "--reasoning-effort", "no variable reasoning_effort")
            found["reasoning_effort"] = options.reasoning_effort
        for name in options.variables:
            if name in OF_CONVERSATION:
                raise OptionError(f"--template-var {name} cannot be set: each conversation gives it")
            self._check(name in known, f"--template-var {name}", f"no variable {name}")
        return found

    def _check(self, is_read: bool, flag: str, what: str) -> None:
        if not is_read:
            raise OptionError(f"{flag} has no effect on this model: its {self.template.name} reads {what}")

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        variables: Mapping[str, Any] | None = None,
        *,
        must_fit: bool = False,
        cancel: CancelFlag | None = None,
    ) -> ChatPrompt:
        """The prompt for ``messages``, with exactly one BOS where the model wants one.

        ``must_fit`` and ``cancel`` are those of ``Engine.tokenize``. Raises TemplateError when the template refuses the
        conversation or fails.
        """
        turns = [self._turn(message) for message in messages]
        given: dict[str, Any] = {"tools": [tool.to_template() for tool in tools]} if tools else {}
        text = self.template.render(turns, **given, **(variables or {}))
        begins = bool(bos := self.engine.token_text(self.engine.bos_token)) and text.startswith(bos)
        tokens = self.engine.tokenize(text, add_bos=not begins, parse_special=True, must_fit=must_fit, cancel=cancel)
        return ChatPrompt(tuple(tokens), text.rstrip().endswith(self.syntax.reasoning.opens), tuple(tools))

    def _turn(self, message: Message) -> dict[str, Any]:
        if self.syntax.is_harmony and message.tool_calls and message.content and message.reasoning:
            # gpt-oss's template writes the text before a call as analysis, and refuses a message with both
            message = replace(message, content="", reasoning=f"{message.reasoning}\n\n{message.content}")
        return message.to_template(arguments_as_text=self.syntax.arguments_as_text)

    def generate(
        self,
        prompt: ChatPrompt,
        sampling: SamplingOptions | None = None,
        *,
        stop: str | Sequence[str] = (),
        cancel: CancelFlag | None = None,
        n_keep: int | None = None,
        routing: bool = False,
    ) -> Iterator[ChatEvent]:
        """Answer ``prompt``: what ``parse`` makes of ``Engine.generate``, whose arguments these are."""
        stops = (*self.template.stop, *stop_strings(stop))
        events = self.engine.generate(
            prompt.tokens, sampling, stop=stops, cancel=cancel, n_keep=n_keep, shown=self.shown, routing=routing
        )
        return self.parse(events, prompt)

    def parse(self, events: Iterator[Event], prompt: ChatPrompt) -> Iterator[ChatEvent]:
        """The events of an answer to ``prompt``, with reasoning and tool calls taken out of their text.

        Every event of the engine is among them, a Token for each new token; a Token has no text where it was a mark, or
        where its text could become one. Reasoning, ToolCallBegun and ToolCallArguments come in between. ``events`` are
        those of ``Engine.generate`` with ``shown``; they are closed when this ends.
        """
        reader = AnswerReader(self.syntax, in_reasoning=prompt.in_reasoning, tools=prompt.tools)
        try:
            for event in events:
                parts = reader.push(event.text)
                if isinstance(event, Finished):
                    parts += reader.finish()
                text = "".join(part for part in parts if isinstance(part, str))
                first = next((n for n, part in enumerate(parts) if isinstance(part, str)), 0)
                before = parts if isinstance(event, Finished) else parts[:first]
                yield from (part for part in before if not isinstance(part, str))
                yield event if event.text == text else replace(event, text=text)
                yield from (part for part in parts[len(before) :] if not isinstance(part, str))
        finally:
            if isinstance(events, Generator):
                events.close()


def message_of(events: Iterable[ChatEvent]) -> Message:
    """The assistant's message that ``events`` make up; its calls have no ids."""
    events = tuple(events)
    calls: list[ToolCall] = []
    for event in events:
        if isinstance(event, ToolCallBegun):
            calls.append(ToolCall(event.name, ""))
        elif isinstance(event, ToolCallArguments):
            calls[event.index] = replace(calls[event.index], arguments=calls[event.index].arguments + event.arguments)
    content = "".join(event.text for event in events).rstrip()
    reasoning = "".join(event.reasoning for event in events if isinstance(event, Reasoning))
    return Message("assistant", content, reasoning, tuple(calls))


def _template(engine: EngineLike, choice: str | None) -> ChatTemplate:
    bos, eos = engine.token_text(engine.bos_token), engine.token_text(engine.eos_token)
    pad = _stated_token(engine, Keys.Tokenizer.PAD_ID, None)
    # llama.cpp takes token 0 of a sentencepiece vocabulary as the unknown one
    default_unk = 0 if engine.header.get(Keys.Tokenizer.MODEL) == "llama" else None
    unk = _stated_token(engine, Keys.Tokenizer.UNK_ID, default_unk)
    template = find_template(choice, engine.header, bos=bos, eos=eos, unk=unk, pad=pad)
    if template is None:
        raise template_missing(engine.header, str(engine.path))
    template.stop += _foreign_ends(engine, template, warn=choice is not None)
    return template


def _foreign_ends(engine: EngineLike, template: ChatTemplate, *, warn: bool) -> tuple[str, ...]:
    """Ends of a turn that the template writes and the vocabulary has no token for: to be watched for as text."""
    foreign = [
        literal
        for literal in special_literals(template.source)
        if len(engine.tokenize(literal, add_bos=False, parse_special=True)) != 1
    ]
    if foreign and warn:
        _logger.warning(
            "%s: %s writes %s, which the model does not have as tokens: it reads them in pieces, as text",
            *(engine.path, template.name, ", ".join(foreign)),
        )
    return tuple(literal for literal in foreign if literal in ENDS_BY_TEXT and literal not in template.stop)


def _stated_token(engine: EngineLike, key: str, default: int | None) -> str:
    """The text of the token whose id stands under a key of the header; empty where there is no such token."""
    token = engine.header.get(key, default)
    return engine.token_text(token) if type(token) is int and 0 <= token < engine.n_vocab else ""
