"""Changes one key of a TOML file that people write by hand; comments, order and layout of everything else stay.

For flat files: keys, and tables of keys. What was changed is read back, and a file that is written in another way
(inline tables, tables of dotted keys) is left to its author. ``tomlkit`` 0.15 is not used: it puts a new key between a
table and the comment above that table, and ends new lines of a file with CRLF in LF.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Value = str | bool | int | float | Sequence[str]
Path = tuple[str, ...]
"""The names of tables, then that of a key."""

_LINE = re.compile(r"[^\n]*\n|[^\n]+")


class LayoutError(ValueError):
    """The text is TOML, but the key is written in a way that is not changed here."""


def with_value(text: str, path: Path, value: Value) -> str:
    """``text`` in which the key at ``path`` has ``value``; a new key comes last in its table, a new table last of all.

    Raises ValueError for a text that is not TOML, LayoutError where the key is in an inline table or the like.
    """
    expected = tomllib.loads(text)
    _put(expected, path, list(value) if isinstance(value, (list, tuple)) else value)
    lines, literal = _LINE.findall(text), toml_literal(value)
    end = "\r\n" if "\r\n" in text else "\n"
    found = [one for one in _statements(lines) if one.path == path and not one.is_table]
    if found:
        first = found[0]
        statement = "".join(lines[first.begin : first.end])
        lines[first.begin : first.end] = [f"{_key_text(statement)}= {literal}{_comment(statement)}{end}"]
    else:
        _insert(lines, path, f"{_key(path[-1])} = {literal}{end}", end)
    return _checked("".join(lines), expected)


def without_value(text: str, path: Path) -> str:
    """``text`` without the key, or the table with all of its keys, at ``path``; the same errors as ``with_value``."""
    expected = tomllib.loads(text)
    _take(expected, path)
    lines = _LINE.findall(text)
    for one in reversed([one for one in _statements(lines) if one.path[: len(path)] == path]):
        del lines[one.begin : one.end]
    return _checked("".join(lines), expected)


def toml_literal(value: Value) -> str:
    """A value as TOML writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, str):  # JSON's escapes are some of TOML's
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return f"[{', '.join(map(toml_literal, value))}]"


@dataclass(frozen=True)
class _Statement:
    """The lines from ``begin`` to before ``end`` that set the key at ``path``, or begin the table of that name."""

    begin: int
    end: int
    path: Path
    is_table: bool


def _statements(lines: Sequence[str]) -> Iterator[_Statement]:
    """The statements of a file that is TOML; comments and empty lines are none."""
    table: Path = ()
    begin = 0
    while begin < len(lines):
        end, content = _statement_at(lines, begin)
        if content:
            path, is_table = _path_of(content), lines[begin].lstrip().startswith("[")
            table = path if is_table else table
            yield _Statement(begin, end, path if is_table else table + path, is_table)
        begin = end


def _statement_at(lines: Sequence[str], begin: int) -> tuple[int, dict[str, Any]]:
    """Where the statement at a line ends, and what it says: the fewest lines that are TOML by themselves."""
    for end in range(begin + 1, len(lines) + 1):
        try:
            return end, tomllib.loads("".join(lines[begin:end]))
        except tomllib.TOMLDecodeError:
            continue
    raise LayoutError


def _path_of(content: Mapping[str, Any]) -> Path:
    path: Path = ()
    inner: Any = content
    while isinstance(inner, dict) and len(inner) == 1:
        ((name, inner),) = inner.items()
        path += (name,)
    return path


def _insert(lines: list[str], path: Path, line: str, end: str) -> None:
    if lines and not lines[-1].endswith("\n"):
        lines[-1] += end
    table, statements = path[:-1], list(_statements(lines))
    own = [one for one in statements if (one.path if one.is_table else one.path[:-1]) == table]
    if own:
        lines.insert(own[-1].end, line)
    elif table:
        lines += [end] * bool(lines) + [f"[{'.'.join(map(_key, table))}]{end}", line]
    elif any(one.is_table for one in statements):
        lines[:0] = [line, end]
    else:
        lines.append(line)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else toml_literal(name)


def _key_text(statement: str) -> str:
    """What stands before the equals sign."""
    for sign in re.finditer("=", statement):
        if _is_toml(f"{statement[: sign.start()]}= 0"):
            return statement[: sign.start()]
    raise LayoutError


def _comment(statement: str) -> str:
    """The comment at the end of a statement of one line, with the spaces before it."""
    line = statement.rstrip("\r\n")
    if "\n" in line:
        return ""
    meant = tomllib.loads(statement)
    for sign in re.finditer(r"[ \t]*#", line):
        if _is_toml(line[: sign.start()]) and tomllib.loads(line[: sign.start()]) == meant:
            return line[sign.start() :]
    return ""


def _is_toml(text: str) -> bool:
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return False
    return True


def _put(content: dict[str, Any], path: Path, value: Any) -> None:
    for name in path[:-1]:
        content = content.setdefault(name, {})
        if not isinstance(content, dict):
            raise LayoutError
    content[path[-1]] = value


def _take(content: dict[str, Any], path: Path) -> None:
    above = [content]
    for name in path[:-1]:
        above.append(above[-1][name])
    del above[-1][path[-1]]


def _checked(text: str, expected: Mapping[str, Any]) -> str:
    """``text``, if it says what is expected; a table that has lost its last key may be there or not."""
    try:
        is_right = _filled(tomllib.loads(text)) == _filled(expected)
    except tomllib.TOMLDecodeError:
        is_right = False
    if not is_right:
        raise LayoutError
    return text


def _filled(content: Mapping[str, Any]) -> dict[str, Any]:
    """``content`` without tables that hold nothing."""
    inner = {name: _filled(value) if isinstance(value, dict) else value for name, value in content.items()}
    return {name: value for name, value in inner.items() if value != {}}
