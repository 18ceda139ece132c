"""Grammars for answers: GBNF, given by the caller or made from a JSON schema, checked before llama.cpp reads it.

llama.cpp prints errors in a grammar to stderr, never returns from a repetition whose limits are in the wrong order, and
lets brackets nest until the stack overflows. So the text is parsed here first, by the rules of llama.cpp's
src/llama-grammar.cpp (commit 0c1e57098).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ggufmoe.errors import InputError
from ggufmoe.files import decode_text
from ggufmoe.native import library as native
from ggufmoe.options import SamplingOptions

MAX_GRAMMAR_CHARS = 256 * 1024
_MAX_DEPTH = 500
_MAX_RULES = 5000
_MAX_REPEATED = 2000
"""MAX_REPETITION_THRESHOLD of llama-grammar.cpp."""
_MAX_SCHEMA_COUNT = 400
"""llama.cpp turns a count in a schema into brackets that are nested as deep."""
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength")

_TEXT_CLASS = r'[^"\\\x7F\x00-\x1F]'
"""Characters that stand for themselves in a string of JSON, as a class of GBNF."""

_NAME = re.compile(r"[A-Za-z0-9-]+")
_SPACE = re.compile(r"(?:[ \t]|#[^\r\n]*)*")
_SPACE_AND_LINES = re.compile(r"(?:[ \t\r\n]|#[^\r\n]*)*")
_CHARACTER = r'(?:\\(?:x[0-9A-Fa-f]{2}|u[0-9A-Fa-f]{4}|U[0-9A-Fa-f]{8}|[trn\\"\[\]-])|[^\\%s])'
_LITERAL = re.compile('"(' + _CHARACTER % '"' + '*)"')
_CLASS = re.compile(r"\[\^?(" + _CHARACTER % r"\]" + r"*)\]")
_TOKEN = re.compile(r"!?<\[\d{1,9}\]>")
_REPEAT = re.compile(r"[*+?]|\{[ \t]*(\d{1,9})[ \t]*(?:(,)[ \t]*(\d{1,9})?[ \t]*)?\}")


def grammar_of(options: SamplingOptions) -> str | None:
    """The grammar that ``options`` asks for, in GBNF. Raises InputError for one that cannot be used."""
    grammar, schema = options.grammar, options.json_schema
    if options.grammar_file is not None:
        grammar = _read(options.grammar_file)
    if options.json_schema_file is not None:
        schema = _read(options.json_schema_file)
    if schema is not None:
        grammar = gbnf_of_schema(schema)
    if grammar is not None:
        check_grammar(grammar)
    return grammar


def _read(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(4 * MAX_GRAMMAR_CHARS + 1)
        if len(data) > 4 * MAX_GRAMMAR_CHARS:
            raise InputError(f"{path}: has more than {MAX_GRAMMAR_CHARS} characters")
        return decode_text(data)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


# ---- JSON schemas


def gbnf_of_schema(schema: str) -> str:
    """The GBNF grammar of a JSON schema, made by llama-cpp-python. Raises InputError, and EngineMissingError."""
    if len(schema) > MAX_GRAMMAR_CHARS:
        raise InputError(f"the JSON schema has more than {MAX_GRAMMAR_CHARS} characters")
    try:
        content = json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise InputError(f"the JSON schema is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InputError('a JSON schema must be an object, such as {"type": "object"}')
    for key, value in _pairs(content):
        _check_pair(key, value)
    native.require_bindings("a JSON schema")
    try:
        return _converted(content)
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError, RecursionError) as error:
        kind = "" if isinstance(error, AssertionError) else f"{type(error).__name__}: "
        raise InputError(f"the JSON schema cannot be followed: {kind}{error}") from error


def _converted(schema: dict[str, Any]) -> str:
    """The grammar of a JSON schema, by llama-cpp-python's converter with five faults mended.

    Its strings let control characters through, which JSON forbids; its ``.`` and negated classes in a pattern let
    quotation marks through, which end the string; a backslash in a constant is not escaped; of two definitions in
    different places whose last names are equal, it uses one for both; and definitions beside a ``$ref`` are not found.
    """
    from llama_cpp import llama_grammar

    class Converter(llama_grammar.SchemaConverter):  # type: ignore[misc]
        def _format_literal(self, literal: str) -> str:
            escaped = re.sub(r'[\\"]', r"\\\g<0>", literal).replace("\n", r"\n").replace("\r", r"\r")
            return f'"{escaped}"'

        def _visit_pattern(self, pattern: str, name: str) -> Any:
            harmless = re.sub(r"\\.|\[\^", lambda found: found[0].replace("[^", _TEXT_CLASS[:-1]), pattern)
            return super()._visit_pattern(harmless, name)

        def _resolve_ref(self, ref: str) -> str:
            if ref not in names:
                names[ref] = f"json-ref-{len(names)}"
                self._add_rule(names[ref], self.visit(self._refs[ref], f"{names[ref]}-is"))
            return names[ref]

    names: dict[str, str] = {}
    converter = Converter(prop_order={}, allow_fetch=False, dotall=False, raw_pattern=False)
    converter._refs = {value: _found(schema, value) for key, value in _pairs(schema) if key == "$ref"}
    converter.visit(schema, "")
    rules = converter._rules
    if "char" in rules:
        rules["char"] = rules["char"].replace(r'[^"\\]', _TEXT_CLASS)
    if "dot" in rules:
        rules["dot"] = _TEXT_CLASS
    return str(converter.format_grammar())


def _found(schema: Any, ref: str) -> Any:
    """The part of ``schema`` that ``ref`` (#/...) names. Raises LookupError, or ValueError for a place in a list."""
    for part in ref[2:].split("/"):
        part = part.replace("~1", "/").replace("~0", "~")
        schema = schema[int(part)] if isinstance(schema, list) else schema[part]
    return schema


def _pairs(content: Any) -> Iterator[tuple[str, Any]]:
    left = [content]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            yield from item.items()
            left.extend(item.values())
        elif isinstance(item, list):
            left.extend(item)


def _check_pair(key: str, value: Any) -> None:
    if key in _COUNTS and not (type(value) is int and 0 <= value <= _MAX_SCHEMA_COUNT):
        raise InputError(f"the JSON schema's {key} must be a number from 0 to {_MAX_SCHEMA_COUNT}, not {value!r}")
    if key == "pattern" and isinstance(value, str):
        numbers = [int(number) for number in re.findall(r"(?<=[{,])\d{1,18}", value)]
        if len(value) > 1000 or any(number > _MAX_SCHEMA_COUNT for number in numbers):
            raise InputError(f"the JSON schema's pattern is too long, or repeats more than {_MAX_SCHEMA_COUNT} times")
    if key == "$ref" and not (isinstance(value, str) and value.startswith("#/")):
        raise InputError(f"the JSON schema refers to {value!r}: only what is in the schema itself can be read (#/...)")


# ---- GBNF


def check_grammar(text: str) -> None:
    """Raise InputError, with the line, for a grammar that llama.cpp would refuse, or that would crash it."""
    if len(text) > MAX_GRAMMAR_CHARS:
        raise InputError(f"the grammar has more than {MAX_GRAMMAR_CHARS} characters")
    _Grammar(text).check()


class _Grammar:
    """A parser of GBNF that keeps only the names of rules and their sizes."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._defined: set[str] = set()
        self._used: dict[str, int] = {}
        self._n_made = 0
        """Rules that llama.cpp makes for brackets and repetitions."""

    def check(self) -> None:
        if "\0" in self._text or any("\ud800" <= char <= "\udfff" for char in self._text):
            self._fail("characters with the code 0 and halves of a surrogate pair cannot be in it")
        self._skip(_SPACE_AND_LINES)
        while self._at < len(self._text):
            self._rule()
        for name, at in self._used.items():
            if name not in self._defined:
                self._at = at
                self._fail(f"there is no rule {name!r}")
        if "root" not in self._defined:
            self._fail("there is no rule 'root', with which all text begins")

    def _rule(self) -> None:
        name = self._match(_NAME) or self._fail("a rule's name is expected")
        self._skip(_SPACE)
        if not self._text.startswith("::=", self._at):
            self._fail(f"::= is expected after {name[0]!r}")
        self._at += 3
        self._skip(_SPACE_AND_LINES)
        self._defined.add(name[0])
        if self._n_symbols() > _MAX_RULES:
            self._fail(f"it has more than {_MAX_RULES} rules")
        self._alternates()
        if self._at < len(self._text) and self._text[self._at] not in "\r\n":
            self._fail(f"{self._text[self._at]!r} is not expected here")
        self._skip(_SPACE_AND_LINES)

    def _n_symbols(self) -> int:
        return len(self._defined | self._used.keys()) + self._n_made

    def _alternates(self) -> None:
        opened: list[int] = []
        n_repeated: int | None = None
        while self._at < len(self._text):
            space = _SPACE_AND_LINES if opened else _SPACE
            sign = self._text[self._at]
            if sign == "(":
                opened.append(self._n_symbols())
                if len(opened) > _MAX_DEPTH:
                    self._fail(f"brackets are more than {_MAX_DEPTH} deep")
                self._n_made += 1
                self._at, n_repeated, space = self._at + 1, None, _SPACE_AND_LINES
            elif sign == ")" and opened:
                n_repeated = max(1, self._n_symbols() - opened.pop())
                self._at += 1
                space = _SPACE_AND_LINES if opened else _SPACE
            elif sign == "|":
                self._at, n_repeated, space = self._at + 1, None, _SPACE_AND_LINES
            elif sign in "*+?{":
                n_repeated = self._repetition(n_repeated)
            elif (item := self._item()) is not None:
                n_repeated = 1 if item else None
            else:
                break
            self._skip(space)
        if opened:
            self._fail("a bracket is not closed")

    def _item(self) -> bool | None:
        """Read one symbol. True, or False if the symbol matches no character; None if there is no symbol."""
        at = self._at
        if self._match(_TOKEN) or self._text[at] == ".":
            self._at += self._at == at
            return True
        for pattern in (_LITERAL, _CLASS):
            if (found := self._match(pattern)) is not None:
                return bool(found[1])
        if (found := self._match(_NAME)) is not None:
            self._used.setdefault(found[0], at)
            return True
        if self._text[at] in '"[':
            self._fail(f"what begins with {self._text[at]} is not closed, or holds an unknown escape")
        if self._text[at] in "<!":
            self._fail("a token is written <[123]> or !<[123]>")
        return None

    def _repetition(self, n_repeated: int | None) -> int:
        found = self._match(_REPEAT) or self._fail("{ must be followed by N}, N,} or N,M}")
        if n_repeated is None:
            self._fail(f"there is nothing before {found[0]!r} that could be repeated")
        low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(found[0], (0, 0))
        if found[1] is not None:
            low = int(found[1])
            high = low if found[2] is None else int(found[3]) if found[3] is not None else None
        if high is not None and high < low:
            self._fail(f"{found[0]}: the second number is less than the first")
        if high is not None and high > _MAX_REPEATED:
            high = None
        total = high or low or 1
        if low > _MAX_REPEATED or n_repeated * total > _MAX_REPEATED:
            self._fail(f"{found[0]}: llama.cpp repeats at most {_MAX_REPEATED} rules")
        self._n_made += 1 if high is None else high - low
        return n_repeated * total

    def _match(self, pattern: re.Pattern[str]) -> re.Match[str] | None:
        found = pattern.match(self._text, self._at)
        if found is not None:
            self._at = found.end()
        return found

    def _skip(self, space: re.Pattern[str]) -> None:
        self._match(space)

    def _fail(self, what: str) -> NoReturn:
        line = self._text.count("\n", 0, self._at) + 1
        raise InputError(f"the grammar's line {line}: {what}")
