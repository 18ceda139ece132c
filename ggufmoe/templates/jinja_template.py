"""Chat templates: finding the one for a model, and rendering messages to the text of a prompt.

A template comes from the GGUF file, from another file or from the few that are built in; it runs in ``sandbox``.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ggufmoe.errors import OptionError, TemplateError
from ggufmoe.files import decode_text, user_path, what_instead
from ggufmoe.gguf.header import Header
from ggufmoe.gguf.key_tables import template_name
from ggufmoe.gguf.upstream import Keys
from ggufmoe.templates.budget import Limits
from ggufmoe.templates.sandbox import MAX_TEMPLATE_CHARS, Program

TemplateMessage = Mapping[str, Any]
"""A message as a template sees it: ``role``, ``content`` and others."""

TEMPLATE_KEY: str = Keys.Tokenizer.CHAT_TEMPLATE
_PROBE = "ggufmoeSystemProbe"
_ALWAYS_GIVEN: Mapping[str, Any] = {"tools": None, "documents": None}
"""Variables that transformers gives to every template, whether or not the caller names them."""
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
"""Names under which templates look for the reasoning of a message, the usual one first."""


@dataclass(frozen=True)
class _Builtin:
    source: str
    stop: tuple[str, ...] = ()
    """Stop strings that end a turn, for models whose vocabulary does not mark them as ends of generation."""


_CHATML = """
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{{ '' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{{ '' -}}
{%- endif -%}
"""
_LLAMA3 = """
{{- bos_token -}}
{%- for message in messages -%}
<|start_header_id|>{{ message.role }}<|end_header_id|>

{{ message.content | trim }}<|eot_id|>
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start_header_id|>assistant<|end_header_id|>

{{ '' -}}
{%- endif -%}
"""
# llama.cpp's tokenizer itself adds the space before the first [INST] and after each </s>
_MISTRAL = """
{{- bos_token -}}
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('user and assistant must take turns, and user begins') }}
{%- endif -%}
{%- if message.role == 'user' -%}
{{ '[INST] ' + message.content + ' [/INST]' }}
{%- else -%}
{{ ' ' + message.content + eos_token }}
{%- endif -%}
{%- endfor -%}
"""
BUILTIN = {
    "chatml": _Builtin(_CHATML, ("<|im_end|>",)),
    "llama3": _Builtin(_LLAMA3, ("<|eot_id|>",)),
    "mistral": _Builtin(_MISTRAL),
}


class ChatTemplate:
    """A compiled template for a model whose special tokens are spelt ``bos``, ``eos``, ``unk`` and ``pad``.

    An empty text stands for a token that the model does not have. A byte order mark before the template is ignored.
    Raises TemplateError when ``source`` is too long or not a template.
    """

    def __init__(
        self,
        source: str,
        *,
        name: str = "chat template",
        bos: str = "",
        eos: str = "",
        unk: str = "<unk>",
        pad: str = "<pad>",
        stop: Sequence[str] = (),
        limits: Limits | None = None,
    ) -> None:
        self.source = source = source.removeprefix("\ufeff")
        self.name = name
        self.stop = tuple(stop)
        self._tokens = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": pad}
        self._program = Program(source, name, limits)
        self._lock = threading.Lock()

    def render(
        self, messages: Sequence[TemplateMessage], *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """The text of the prompt for ``messages`` (``role``, ``content`` and others), up to the next answer.

        If the template ignores or refuses a system message, its text is put before that of the first user message.
        ``variables`` are passed to the template (``tools`` and others that it knows). A template that loops over tools
        without asking whether there are any gets an empty list. Raises TemplateError when the template refuses the
        conversation, fails, or exceeds its limits.
        """
        turns = [dict(message) for message in messages]
        if turns and turns[0].get("role") == "system" and not self.takes_system:
            turns = fold_system(turns)
        return self._render(turns, {"add_generation_prompt": add_generation_prompt, **self._no_tools, **variables})

    def render_strictly(self, messages: Sequence[TemplateMessage], **variables: Any) -> str:
        """The text that ``apply_chat_template`` of transformers makes of ``messages``; raises where that raises."""
        return self._render([dict(message) for message in messages], variables)

    def _render(self, turns: list[dict[str, Any]], variables: Mapping[str, Any]) -> str:
        turns = [_as_transformers_gives_it(turn) for turn in turns]
        size = len(str(turns)) + len(str(variables))
        with self._lock:
            return self._program.run({**self._tokens, **_ALWAYS_GIVEN, "messages": turns, **variables}, size)

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that the template reads and does not always set itself; those that every template gets among them."""
        return self._program.variables

    @cached_property
    def _no_tools(self) -> Mapping[str, Any]:
        """What a template that fails without tools gets in their place."""
        turns = [{"role": "user", "content": _PROBE}]
        try:
            self._render(turns, {"add_generation_prompt": True})
        except TemplateError:
            try:
                self._render(turns, {"add_generation_prompt": True, "tools": []})
            except TemplateError:
                return {}
            return {"tools": []}
        return {}

    @cached_property
    def takes_system(self) -> bool:
        """Whether a system message appears in the prompt: some templates raise for one, others leave it out."""
        turns = [{"role": "system", "content": _PROBE}, {"role": "user", "content": "hello"}]
        try:
            return _PROBE in self._render(turns, {"add_generation_prompt": True, **self._no_tools})
        except TemplateError:
            return False


def _as_transformers_gives_it(message: dict[str, Any]) -> dict[str, Any]:
    """``message`` without fields that hold None, its reasoning under all names that templates read.

    Source: ``apply_chat_template`` and ``_alias_reasoning_fields`` of transformers 5.23.
    """
    given = {name: value for name, value in message.items() if value is not None}
    reasoning = next((given[name] for name in _REASONING_FIELDS if name in given), None)
    return given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning}


def fold_system(messages: Sequence[TemplateMessage]) -> list[dict[str, Any]]:
    """``messages`` with the text of the leading system message put before that of the first user message."""
    system, *turns = (dict(message) for message in messages)
    for turn in turns:
        if turn["role"] == "user":
            turn["content"] = f"{system['content']}\n\n{turn['content']}"
            return turns
    return [{"role": "user", "content": system["content"]}, *turns]


def find_template(
    choice: str | None,
    header: Header,
    *,
    bos: str = "",
    eos: str = "",
    unk: str = "",
    pad: str = "",
    limits: Limits | None = None,
) -> ChatTemplate | None:
    """The template that ``choice`` names; with None the file's main template, or None if it has none.

    ``choice`` is the name of a template in the file, the name of a built-in one, or the path of a file with one. The
    other texts are the model's special tokens. Raises OptionError when ``choice`` is none of these, TemplateError when
    the template cannot be used.
    """
    stored = stored_templates(header)
    make = partial(ChatTemplate, bos=bos, eos=eos, unk=unk, pad=pad, limits=limits)
    if choice is None:
        return make(stored["default"]) if "default" in stored else None
    if choice in stored:
        return make(stored[choice], name=f"chat template {choice}")
    if (key := template_name(choice)) in stored and not os.path.isfile(choice):
        return make(stored[key], name=f"chat template {key}")
    if choice in BUILTIN:
        return make(BUILTIN[choice].source, name=f"chat template {choice}", stop=BUILTIN[choice].stop)
    return make(_read(user_path(choice), stored), name=choice)


def template_missing(header: Header, model: str) -> TemplateError:
    """What to raise where ``find_template`` finds none and one is needed: which there are, and the ways out."""
    named = sorted(stored_templates(header))
    which = f"has chat templates for some uses only ({', '.join(named)})" if named else "has no chat template"
    return TemplateError(
        f"{model}: the model {which}: name one with --chat-template NAME|FILE, or continue plain text with 'run --raw'"
    )


def stored_templates(header: Header) -> dict[str, str]:
    """The templates in a GGUF file, by name; the main one is called ``default``."""
    prefix = TEMPLATE_KEY + "."
    found = {
        "default" if key == TEMPLATE_KEY else key[len(prefix) :]: value.value
        for key, value in header.metadata.items()
        if key == TEMPLATE_KEY or key.startswith(prefix)
    }
    return {name: source for name, source in found.items() if isinstance(source, str) and source}


def _read(path: Path, stored: Mapping[str, str]) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(4 * MAX_TEMPLATE_CHARS + 1)
        if (instead := what_instead(path)) is not None:
            raise TemplateError(f"{path}: is {instead}")
        if len(data) > 4 * MAX_TEMPLATE_CHARS:
            raise TemplateError(f"{path}: more than {MAX_TEMPLATE_CHARS} characters, which no chat template needs")
        return decode_text(data)
    except UnicodeDecodeError as error:
        raise TemplateError(f"{path}: not a text file in UTF-8") from error
    except OSError as error:
        names = ", ".join(sorted({*stored, *BUILTIN}))
        raise OptionError(f"{path}: neither a template's name ({names}) nor a file that can be read") from error
