"""Options that take lists of values, so that one command tries every combination, as llama-bench's do.

A list field is derived from a field of an option object: flags, help and what a value may be are said there. Values
stand between commas, or the flag is given again; numbers may be ranges (``1-8``, ``128-512+128``, ``1-16*2``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import Field, field, fields
from itertools import product
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from ggufmoe.errors import OptionError

Values = tuple[str, ...]
"""What was typed for a list field."""
OptionsT = TypeVar("OptionsT")
_RANGE = re.compile(r"(-?\d{1,9})(?:-(\d{1,9})(?:([+*])(\d{1,9}))?)?")
_MAX_RANGE = 1000


def listed(kind: type, name: str, *flags: str, help: str | None = None, negated: bool = False) -> Any:
    """A dataclass field annotated ``Values`` that takes lists of values of the field ``name`` of the options ``kind``.

    A field that is true or false takes 0 and 1. ``flags`` and ``help`` replace those of the field; with ``negated`` 1
    stands for False.
    """
    spec, hint = _field(kind, name), get_type_hints(kind)[name]
    text, metavar = help or spec.metadata["help"], spec.metadata["metavar"] or "WORD"
    if get_origin(hint) is Literal:
        text += f" One of {', '.join(get_args(hint))}."
    elif hint is bool:
        text, metavar = f"{text} 0 or 1.", "0|1"
    elif get_origin(hint) is tuple:
        text, metavar = f"{text} Separate those of one run by semicolons.", f"{metavar};..."
    elif str in get_args(hint):
        text, metavar = f"{text} Separate those of one run by slashes.", metavar.split(",")[0] + "/..."
    if spec.default not in (None, ()) and "[default" not in text:
        default = int(spec.default is not negated) if hint is bool else spec.default
        text += f" [default: {default}]"
    given = flags or tuple(flag.split("/")[0] for flag in spec.metadata["flags"] if not flag.startswith(" /"))
    metadata = {
        **spec.metadata,
        "flags": given,
        "help": text,
        "metavar": f"{metavar},...",
        "parse": None,
        "between": None,
        "of": kind,
        "negated": negated,
    }
    return field(default=(), metadata=metadata)


def single(kind: type, name: str) -> Any:
    """A dataclass field that is the field ``name`` of the options ``kind``: one value for all combinations."""
    spec = _field(kind, name)
    return field(default=spec.default, metadata={**spec.metadata, "of": kind})


def combinations(options: Any, kind: type[OptionsT]) -> tuple[OptionsT, ...]:
    """One ``kind`` object for each combination of the listed values; the first field varies slowest.

    Fields of ``options`` that do not belong to ``kind`` are ignored. Raises OptionError for a value that ``kind`` does
    not accept.
    """
    mine = [spec for spec in fields(options) if spec.metadata.get("of") is kind]
    values = [_values(spec, kind, getattr(options, spec.name)) for spec in mine]
    names = [spec.name for spec in mine]
    return tuple(kind(**dict(zip(names, chosen, strict=True))) for chosen in product(*values))


def numbers(given: Values) -> list[int]:
    """Numbers and ranges: ``512``, ``1-4``, ``128-512+128``, ``1-16*2``."""
    return [number for word in _words(given) for number in _range(word)]


def _field(kind: type, name: str) -> Field[Any]:
    return next(spec for spec in fields(kind) if spec.name == name)


def _words(given: Values) -> list[str]:
    return [word for text in given for word in text.split(",")]


def _values(spec: Field[Any], kind: type, given: Any) -> Sequence[Any]:
    target, hint = _field(kind, spec.name), get_type_hints(kind)[spec.name]
    if "negated" not in spec.metadata:
        return [given]
    if not given:
        return [target.default]
    words = _words(given)
    if target.metadata["parse"] is not None:
        return [target.metadata["parse"](word) for word in words]
    if hint is bool:
        if not set(words) <= {"0", "1"}:
            raise OptionError(f"{max(spec.metadata['flags'], key=len)}: expected 0 or 1, not {','.join(words)}")
        return [(word == "1") is not spec.metadata["negated"] for word in words]
    if hint is int or int in get_args(hint):
        return numbers(given)
    if get_origin(hint) is tuple:
        return [tuple(word.split(";")) for word in words]
    return words if get_origin(hint) is Literal else [word.replace("/", ",") for word in words]


def _range(word: str) -> Iterator[int]:
    found = _RANGE.fullmatch(word)
    if found is None:
        raise OptionError(f"expected numbers such as 512 or 1,2,4 or a range such as 1-8*2, not {word!r}")
    number, last = int(found[1]), int(found[2] or found[1])
    multiplies, step = found[3] == "*", int(found[4] or 1)
    if (number * step if multiplies else number + step) <= number or (last - number) // step > _MAX_RANGE:
        raise OptionError(f"{word!r} is no range that comes to an end soon")
    if number > last:
        raise OptionError(f"{word!r} is an empty range: the smaller number comes first")
    while number <= last:
        yield number
        number = number * step if multiplies else number + step
