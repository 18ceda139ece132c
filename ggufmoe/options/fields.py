"""Option fields: the dataclass field that is also a command-line option, and the checks of every option's value.

Each field carries its flags, help and bounds in its metadata; ``cli/params.py`` builds parameters from them."""

from __future__ import annotations

import difflib
import numbers
import os
from collections.abc import Callable, Mapping
from dataclasses import Field, field, fields
from functools import cache
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from ggufmoe.errors import OptionError
from ggufmoe.files import possible_path
from ggufmoe.options.limits import MAX_INT32


def option(
    default: Any,
    *flags: str,
    help: str,
    metavar: str | None = None,
    parse: Callable[[str], Any] | None = None,
    panel: str | None = None,
    between: tuple[float, float] | None = None,
) -> Any:
    """A dataclass field that is also a command-line option; without flags it exists only in the API.

    ``parse`` turns what was typed into the field's value where the annotation alone does not say how; it raises
    OptionError. ``panel`` is the section of the help that lists the flag, by default that of its class. ``between`` is
    the least and the largest number that ``check_values`` accepts.
    """
    metadata: Mapping[str, Any] = {
        "flags": flags,
        "help": help,
        "metavar": metavar,
        "parse": parse,
        "panel": panel,
        "between": between,
    }
    return field(default=default, metadata=metadata)


def option_named(groups: type | tuple[type, ...], name: str, *, without: tuple[str, ...] = ()) -> Field[Any]:
    """The option of one class or several that a flag or field is called ``name``, dashes left out or not.

    ``without`` are names of fields that do not count. Raises OptionError that names a similar option.
    """
    names: dict[str, Field[Any]] = {}
    for group in groups if isinstance(groups, tuple) else (groups,):
        for one in fields(group):
            flags = one.metadata["flags"]
            for called in (*flags, *((one.name,) if flags else ())):
                if one.name not in without:
                    names[_plain(called)] = one
    if _plain(name) not in names:
        near = difflib.get_close_matches(_plain(name), names, n=1)
        raise OptionError(f"there is no option {name}" + (f"; did you mean {near[0]}?" if near else ""))
    return names[_plain(name)]


def _plain(name: str) -> str:
    return name.split("/")[0].strip().lstrip("-").replace("_", "-").lower()


OptionsT = TypeVar("OptionsT")


def options_of(
    kind: type[OptionsT], options: OptionsT | None, keywords: Mapping[str, object] = MappingProxyType({})
) -> OptionsT:
    """The options of a public function, given as one object or as keywords; the defaults where neither is given.

    Raises OptionError where both are given and for a keyword that is no field of ``kind``; TypeError where ``options``
    is no ``kind``, for example a dict.
    """
    if options is not None and keywords:
        found = ", ".join(keywords)
        raise OptionError(f"give options={kind.__name__}(...) or single options by name, not both: found {found} too")
    names = [spec.name for spec in fields(kind)]  # type: ignore[arg-type]
    for name in keywords:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
            raise OptionError(f"{kind.__name__} has no option {name!r}; {hint}")
    if options is not None and not isinstance(options, kind):
        raise TypeError(f"expected {kind.__name__}(...), not {options!r}")
    return kind(**keywords) if options is None else options


def check(condition: bool, message: str) -> None:
    """Raise OptionError with ``message`` unless ``condition`` holds."""
    if not condition:
        raise OptionError(message)


def bounds(kind: type, name: str) -> tuple[float, float]:
    """The least and the largest number that the field ``name`` of the dataclass ``kind`` may hold."""
    between: tuple[float, float] = next(spec for spec in fields(kind) if spec.name == name).metadata["between"]
    return between


_HELD: Mapping[Any, tuple[Any, str]] = {
    bool: (bool, "True or False"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "a text"),
    Path: ((str, os.PathLike), "a path"),
    tuple: ((tuple, list), "a tuple of texts"),
}
"""By annotation: the Python types that a field accepts (numpy's numbers too), and what a message calls them."""


def check_values(options: Any) -> None:
    """Raise OptionError unless every field holds what its annotation says and every number lies within its bounds.

    Paths given as text become ``Path``, with ``~`` expanded, and lists become tuples.
    """
    kinds, words = _kinds(options.__class__), _words(options.__class__)
    for spec in fields(options):
        value, between = getattr(options, spec.name), spec.metadata.get("between")
        if spec.name in kinds:
            annotation, may_be_none = kinds[spec.name]
            held, called = _HELD[annotation]
            # a bool is an int, but no number that anybody means
            fits = isinstance(value, held) and (annotation is bool or not isinstance(value, bool))
            if annotation is tuple:
                fits = fits and all(isinstance(text, str) for text in value)
            check(fits or (value is None and may_be_none), f"{spec.name} must be {called}, not {value!r}")
            if value is not None and annotation in (Path, tuple):
                object.__setattr__(options, spec.name, possible_path(value) if annotation is Path else tuple(value))
        name = max(spec.metadata.get("flags", ()), key=len, default=spec.name)
        if between is not None and value is not None:
            low, high = between
            wanted = f"at least {low}" if high == MAX_INT32 and value < low else f"between {low} and {high}"
            check(low <= value <= high, f"{name} must be {wanted}, not {value}")
        if spec.name in words:
            check(value in words[spec.name], f"{name} must be one of {', '.join(words[spec.name])}, not {value}")


@cache
def _kinds(kind: type) -> dict[str, tuple[Any, bool]]:
    """Per field that is no Literal: the type in its annotation, and whether the annotation allows None."""
    parts = {name: _parts(hint) for name, hint in get_type_hints(kind).items()}
    return {name: (part[0], type(None) in part) for name, part in parts.items() if part[0] in _HELD}


def _parts(hint: Any) -> tuple[Any, ...]:
    """``(int, NoneType)`` of ``int | None``, ``(tuple,)`` of ``tuple[str, ...]``."""
    origin = get_origin(hint)
    return get_args(hint) if origin in (Union, UnionType) else (origin or hint,)


@cache
def _words(kind: type) -> dict[str, tuple[str, ...]]:
    """Per Literal field: the words that it accepts."""
    return {name: get_args(hint) for name, hint in get_type_hints(kind).items() if get_origin(hint) is Literal}
