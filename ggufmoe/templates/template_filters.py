"""Jinja's filters and tests for chat templates, each within the budget of a rendering.

Those that only pass values on are Jinja's own, counted; those that can make much of little check the size first. What
is left out (``urlize``) is refused when a template uses it, not when it is read.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from typing import Any

import jinja2
import jinja2.exceptions
from jinja2 import filters as jinja
from jinja2 import nodes

from ggufmoe.templates.budget import Meter, OverBudget

Filter = Callable[..., Any]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ITERATING = _words(
    "count d default dictsort first groupby items last length list map max min random reject rejectattr reverse select "
    "selectattr sort unique"
)
_OF_TEXT = dict.fromkeys(
    _words("abs capitalize e escape filesizeformat float int lower safe string title trim upper wordcount"), 1
) | {"truncate": 2, "forceescape": 6, "urlencode": 12, "xmlattr": 8}
"""Filters of texts, with how many characters they make of one at most."""
_SLOW = frozenset({"pprint", "striptags", "wordwrap"})
"""Filters of texts whose time may grow with the square of the length."""
_MAX_SLOW_CHARS = 32_768
_MAX_INDENT = 64
_MAX_DIGITS = 64


def budgeted_filters(environment: Any) -> dict[str, Filter]:
    """Every filter of Jinja by name, counted by ``environment.meter``, which may be another one at each rendering."""
    own = _Filters(environment)
    written = {name: getattr(own, name) for name in vars(_Filters) if not name.startswith("_")}
    found: dict[str, Filter] = {}
    for name, function in {**environment.filters, **written}.items():
        if name in written or name in _ITERATING:
            found[name] = own._counted(function)
        elif name in _OF_TEXT:
            found[name] = own._of_text(function, _OF_TEXT[name])
        elif name in _SLOW:
            found[name] = own._of_text(function, 4, max_chars=_MAX_SLOW_CHARS)
        else:
            found[name] = functools.partial(_refused, name)
    return found


def budgeted_tests(environment: Any) -> dict[str, Filter]:
    """Every test of Jinja by name, counted like a filter."""
    own = _Filters(environment)
    return {name: own._counted(function) for name, function in environment.tests.items()}


def _refused(name: str, *_: object, **__: object) -> None:
    raise jinja2.exceptions.SecurityError(f"the filter {name} is not available to chat templates")


def _is_context(value: Any) -> bool:
    return isinstance(value, jinja2.Environment | jinja2.runtime.Context | nodes.EvalContext)


class _Filters:
    """Filters that check sizes before they make something; named as Jinja names them."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment

    @property
    def _meter(self) -> Meter:
        meter: Meter = self._environment.meter
        return meter

    def _counted(self, function: Filter) -> Filter:
        """``function`` with its call and its result counted."""

        @functools.wraps(function)
        def counted(*args: Any, **kwargs: Any) -> Any:
            self._meter.step()
            result = function(*args, **kwargs)
            self._meter.charge(result)
            return result

        return counted

    def _of_text(self, function: Filter, growth: int, max_chars: int | None = None) -> Filter:
        """``function`` of texts, refused where its result, ``growth`` times its arguments, is over the budget."""
        counted = self._counted(function)

        @functools.wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            given = [arg for arg in (*args, *kwargs.values()) if not _is_context(arg)]
            n_chars = self._meter.check_text(*given)
            self._meter.check(growth * n_chars)
            if max_chars is not None and n_chars > max_chars:
                raise OverBudget(f"a filter for up to {max_chars} characters on {n_chars}")
            return counted(*args, **kwargs)

        return checked

    def join(self, values: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
        items = [item if attribute is None else self._environment.getitem(item, attribute) for item in values]
        self._meter.check(len(items) * self._meter.check_text(separator) + self._meter.check_text(*items))
        return str(separator).join(str(item) for item in items)

    def replace(self, value: Any, old: str, new: str, count: int = -1) -> str:
        self._meter.check_text(value, old, new)
        text = str(value)
        self._meter.check_replace(text, old, new)
        return text.replace(str(old), str(new), -1 if count is None else count)

    def tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | str | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As transformers does it: plain JSON, without escaping HTML."""
        if (len(indent) if isinstance(indent, str) else indent or 0) > _MAX_INDENT:
            raise OverBudget(f"an indent of more than {_MAX_INDENT}")
        # escapes make a character into six at most; what indents add is counted piece by piece
        self._meter.check(8 * self._meter.check_text(value))
        self._meter.check_text(separators)
        encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
        pieces = []
        for piece in encoder.iterencode(value):
            self._meter.charge_chars(len(piece))
            pieces.append(piece)
        return "".join(pieces)

    def indent(self, value: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        self._meter.check_text(value, width)
        lines = f"{value}\n".splitlines()
        padding = width if isinstance(width, str) else " " * max(0, min(width, _MAX_INDENT + 1))
        if len(padding) > _MAX_INDENT:
            raise OverBudget(f"an indent of more than {_MAX_INDENT}")
        self._meter.check(len(lines) * (len(padding) + 1) + len(str(value)))
        rest = [padding + line if line or blank else line for line in lines[1:]]
        return "\n".join([padding + lines[0] if first else lines[0], *rest])

    def attr(self, value: Any, name: str) -> Any:
        """The attribute alone, never an item; what the sandbox keeps away is an error."""
        found = getattr(value, str(name), self)
        if found is self:
            return self._environment.undefined(obj=value, name=name)
        if not self._environment.is_safe_attribute(value, str(name), found):
            raise jinja2.exceptions.SecurityError(f"access to attribute {name!r:.60} is unsafe")
        return self._environment.getattr(value, str(name))

    def batch(self, value: Iterable[Any], linecount: int, fill_with: Any = None) -> list[list[Any]]:
        self._meter.check(linecount if fill_with is not None else 0)
        return list(jinja.do_batch(value, linecount, fill_with))

    def slice(self, value: Any, slices: int, fill_with: Any = None) -> list[list[Any]]:
        self._meter.check(slices)
        return list(jinja.sync_do_slice(value, slices, fill_with))

    def sum(self, values: Iterable[Any], attribute: str | int | None = None, start: Any = 0) -> Any:
        if isinstance(start, str):
            raise TypeError("sum() cannot add texts; use join")
        total = start
        for item in values:
            one = item if attribute is None else self._environment.getitem(item, attribute)
            total = self._environment.call_binop(None, "+", total, one)
        return total

    def center(self, value: Any, width: int = 80) -> str:
        self._meter.check_text(value)
        self._meter.check(width)
        return str(value).center(width)

    def format(self, value: Any, *args: Any, **kwargs: Any) -> str:
        if args and kwargs:
            raise TypeError("positional and keyword arguments at the same time")
        self._meter.check_text(value)
        self._meter.check_format(str(value), kwargs or args)
        return str(str(value) % (kwargs or args))

    def round(self, value: Any, precision: int = 0, method: Any = "common") -> Any:
        if abs(precision) > _MAX_DIGITS:
            raise OverBudget(f"more than {_MAX_DIGITS} digits")
        return jinja.do_round(value, precision, method)
