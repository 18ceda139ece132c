"""Runs chat templates from untrusted files within a budget.

A template is a program. Jinja's sandbox keeps it away from Python's internals; this module adds limits on steps,
characters and time. Loops, calls, filters and every operation that makes text or lists are counted before memory is
allocated. It needs no thread and no signal, so it works in any thread and on any system.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import string
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from ggufmoe.errors import TemplateError, one_line

MAX_TEMPLATE_CHARS = 100_000

_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    NameError,  # jinja2 writes a number that is too large as the name ``inf``
    RuntimeError,  # RecursionError among them
    SyntaxError,
    TypeError,
    ValueError,
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_STR_METHODS = _words(
    "capitalize casefold count endswith find format index isalnum isalpha isascii isdecimal isdigit islower isnumeric "
    "isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace rfind rindex rpartition "
    "rsplit rstrip split splitlines startswith strip swapcase title upper"
)
_METHODS: dict[type, frozenset[str]] = {
    str: _STR_METHODS,
    dict: frozenset({"get", "items", "keys", "values"}),
    list: frozenset({"count", "index"}),
    tuple: frozenset({"count", "index"}),
    int: frozenset(),
    float: frozenset({"is_integer"}),
    bytes: frozenset(),
}
_ITERATING_FILTERS = _words(
    "count d default dictsort first groupby items last length list map max min reject rejectattr reverse select "
    "selectattr sort unique"
)
_TEXT_FILTERS = _words("abs capitalize e escape float int lower safe string title trim upper")
_CONTAINERS = (list, tuple, dict)
_WIDE_FORMAT = re.compile(r"\d{4}|\*")


class _OverBudget(jinja2.TemplateRuntimeError):
    """The template exceeded its budget."""


class _Refused(jinja2.TemplateRuntimeError):
    """The template called ``raise_exception``."""


@dataclass(frozen=True)
class Limits:
    """The budget of one rendering. A chat of a thousand messages needs less than a tenth of it.

    ``chars`` counts the characters of all texts and the elements of all lists that are made during the rendering.
    """

    steps: int = 300_000
    seconds: float = 5.0
    chars: int = 8_000_000
    chars_per_input_char: int = 32


class _Meter:
    """What is left of the budget of one rendering."""

    def __init__(self, limits: Limits, input_chars: int) -> None:
        self._limits = limits
        self._steps = limits.steps
        self._chars = limits.chars + limits.chars_per_input_char * input_chars
        self._deadline = time.monotonic() + limits.seconds
        # by id; each container is kept, so that its id stays its own
        self._measured: dict[int, tuple[Any, int, bool]] = {}

    def step(self) -> None:
        self._steps -= 1
        if self._steps < 0:
            raise _OverBudget(f"more than {self._limits.steps} steps")
        if time.monotonic() > self._deadline:
            raise _OverBudget(f"more than {self._limits.seconds:g} s")

    def check(self, n_chars: int) -> None:
        """Raise _OverBudget if ``n_chars`` exceed what is left; called before something of this size is made."""
        if n_chars > self._chars:
            raise _OverBudget("too much text")

    def charge_chars(self, n_chars: int) -> None:
        self.check(n_chars)
        self._chars -= n_chars

    def charge(self, value: Any) -> None:
        """Count a new text or container. Parts that a container shares count each time that they occur."""
        if isinstance(value, str):
            self.charge_chars(len(value))
        elif isinstance(value, _CONTAINERS):
            self.measure(value)
            self.charge_chars(1 + len(value))

    def check_text(self, *values: Any) -> int:
        """Characters that ``values`` have as text. Raises _OverBudget for too many, and for values without a text."""
        total = 0
        for value in values:
            size, has_text = self.measure(value)
            if not has_text:
                raise _OverBudget(f"a {type(value).__name__} has no text")
            total += size
        self.check(total)
        return total

    def measure(self, value: Any) -> tuple[int, bool]:
        """A lower bound for the length of ``value`` as text, and whether it may be converted to text.

        The size of a container is computed once, from its parts: lists of lists that share parts can stand for more
        text than any computer can compare or print.
        """
        if isinstance(value, str):
            return len(value), True
        if isinstance(value, int):
            return value.bit_length() // 3 + 5, True
        if not isinstance(value, _CONTAINERS):
            return 25, value is None or isinstance(value, float | range | jinja2.Undefined)
        known = self._measured.get(id(value))
        if known is None:
            known = self._measured[id(value)] = (value, *self._measure_parts(value))
        return known[1:]

    def _measure_parts(self, container: Any) -> tuple[int, bool]:
        self.step()
        parts = [*container, *container.values()] if isinstance(container, dict) else container
        sizes = [self.measure(part) for part in parts]
        total = 2 + sum(size + 4 for size, _ in sizes)
        self.check(total)
        return total, all(has_text for _, has_text in sizes)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks the assistant's part for training; here the tag is ignored and its content kept."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance attribute)

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Metered(NodeTransformer):
    """Adds counting to a template's syntax tree, for operations that call no method of the environment."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (named by jinja2)
        tick = _call("tick", nodes.Const(_weight(node)))
        node = self._inner(node)
        if node.test is not None:
            node.test = nodes.And(tick, node.test)
        node.body.insert(0, nodes.ExprStmt(tick))
        return node

    def _visit_callable(self, node: Any) -> nodes.Node:
        tick = nodes.ExprStmt(_call("tick", nodes.Const(_weight(node))))
        node = self._inner(node)
        node.body.insert(0, tick)
        return node  # type: ignore[no-any-return]

    visit_Macro = visit_CallBlock = visit_Block = _visit_callable  # noqa: N815

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        return _call("joined", *self._inner(node).nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:  # noqa: N802
        node = self._inner(node)
        return _call("passed", node) if isinstance(node.arg, nodes.Slice) else node

    def _visit_literal(self, node: Any) -> nodes.Node:
        node = self._inner(node)
        return node if getattr(node, "ctx", "load") == "store" else _call("passed", node)

    visit_List = visit_Tuple = visit_Dict = _visit_literal  # noqa: N815

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        node = self._inner(node)
        node.expr = _call("passed", node.expr)
        return node

    def _inner(self, node: Any) -> Any:
        return self.generic_visit(node)


def _call(method: str, *arguments: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(arguments), [], None, None)


def _weight(node: nodes.Node) -> int:
    """What one run of ``node`` may add to memory by itself: the characters of its literal text, and its nodes."""
    everything = list(node.find_all(nodes.Node))
    return len(everything) + sum(len(n.data) for n in everything if isinstance(n, nodes.TemplateData))


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja as Hugging Face sets it up for chat templates, within the budget of ``meter``."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _GenerationTag],
            optimized=False,  # the optimizer runs filters while compiling, outside of any budget
            finalize=_finalize,
            cache_size=0,
        )
        self.meter = _Meter(Limits(), 0)
        own = {"join": self._join, "replace": self._replace, "tojson": self._tojson, "indent": self._indent}
        kept = {name: self.filters[name] for name in _ITERATING_FILTERS | _TEXT_FILTERS}
        self.filters = {name: self._metered(name, function) for name, function in (kept | own).items()}
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {name: self._metered(name, function) for name, function in tests.items()}
        self.globals = {
            "range": jinja2.sandbox.safe_range,
            "dict": dict,
            "namespace": self.globals["namespace"],
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def metered_template(self, source: str) -> jinja2.Template:
        tree = self.parse(source)
        _Metered().visit(tree)
        # the nodes that were added have no line and no environment yet
        tree.set_environment(self)
        tree.set_lineno(1)
        return self.from_string(tree)

    # ---- called by the nodes that _Metered puts in

    def tick(self, n_chars: int) -> bool:
        self.meter.charge_chars(n_chars)
        return True

    def joined(self, *values: Any) -> str:
        self.meter.check_text(*values)
        return "".join(str(value) for value in values)

    def passed(self, value: Any) -> Any:
        """``value`` itself. Calls from a template go through ``call``, which counts the value."""
        return value

    # ---- called by jinja2

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        self.meter.step()
        for arg in (*args, *kwargs.values()):
            self.meter.measure(arg)
        owner = getattr(function, "__self__", None)
        if isinstance(owner, str):
            self._check_method(owner, function.__name__, args)
        result = super().call(context, function, *args, **kwargs)
        self.meter.charge(result)
        return result

    def _check_method(self, text: str, method: str, args: tuple[Any, ...]) -> None:
        if method == "replace" and len(args) >= 2:
            self._check_replace(text, args[0], args[1])
        elif method == "join" and args and isinstance(args[0], list | tuple):
            self.meter.check(len(text) * len(args[0]) + self.meter.check_text(*args[0]))
        elif method == "join":
            raise _OverBudget("join takes a list")

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        for type_, methods in _METHODS.items():
            if isinstance(obj, type_):
                return attr in methods
        return super().is_safe_attribute(obj, attr, value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self.meter.step()
        {"+": self._check_add, "*": self._check_multiply, "**": self._check_power, "%": self._check_format}[operator](
            left, right
        )
        result = super().call_binop(context, operator, left, right)
        self.meter.charge(result)
        return result

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def checked(*args: Any, **kwargs: Any) -> str:
            fields = list(string.Formatter().parse(value.__self__))
            if any(spec and ("{" in spec or _WIDE_FORMAT.search(spec)) for _, _, spec, _ in fields):
                raise _OverBudget("a format with a wide field")
            self.meter.check(len(value.__self__) + len(fields) * self.meter.check_text(*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return checked

    # ---- checks of a size before the value is made

    def _check_add(self, left: Any, right: Any) -> None:
        if isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            self.meter.check(len(left) + len(right))

    def _check_multiply(self, left: Any, right: Any) -> None:
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, str | list | tuple) and isinstance(times, int):
                self.meter.check(len(sequence) * times)
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 4096:
            raise _OverBudget("numbers of more than 4096 bits")

    def _check_power(self, left: Any, right: Any) -> None:
        if abs(left) > 2**32 or abs(right) > 64:
            raise _OverBudget("a power of large numbers")

    def _check_format(self, left: Any, right: Any) -> None:
        if isinstance(left, str):
            if _WIDE_FORMAT.search(left):
                raise _OverBudget("a format with a wide field")
            self.meter.check(len(left) + left.count("%") * self.meter.check_text(right))

    def _check_replace(self, text: str, old: Any, new: Any) -> None:
        self.meter.check(len(text) + (text.count(str(old)) if old else len(text) + 1) * self.meter.check_text(new))

    # ---- filters

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self.meter.step()
            if name in _TEXT_FILTERS:
                self.meter.check_text(*(arg for arg in args if not _is_context(arg)))
            result = function(*args, **kwargs)
            self.meter.charge(result)
            return result

        return metered

    def _join(self, values: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
        items = [item if attribute is None else self.getitem(item, attribute) for item in values]
        self.meter.check(len(items) * self.meter.check_text(separator) + self.meter.check_text(*items))
        return str(separator).join(str(item) for item in items)

    def _replace(self, value: Any, old: str, new: str, count: int = -1) -> str:
        self.meter.check_text(value, old, new)
        text = str(value)
        self._check_replace(text, old, new)
        return text.replace(str(old), str(new), count)

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """As transformers does it: plain JSON, without escaping HTML."""
        if indent is not None and not 0 <= indent <= 16:
            raise _OverBudget("an indent of more than 16")
        # escapes and indents make a character into some dozen at most, at a depth that recursion allows
        self.meter.check(16 * self.meter.check_text(value))
        self.meter.check_text(separators)
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def _indent(self, value: Any, width: int = 4, first: bool = False, blank: bool = False) -> str:
        self.meter.check_text(value)
        lines = str(value).splitlines() or [""]
        if not 0 <= width <= 64:
            raise _OverBudget("an indent of more than 64")
        self.meter.check(len(lines) * (width + 1) + len(str(value)))
        padding = " " * width
        rest = [padding + line if line or blank else line for line in lines[1:]]
        return "\n".join([padding + lines[0] if first else lines[0], *rest])


def _is_context(value: Any) -> bool:
    return isinstance(value, jinja2.Environment | jinja2.runtime.Context | nodes.EvalContext)


# jinja2 does not run a function that takes the context on constants while compiling
@jinja2.pass_context
def _finalize(context: jinja2.runtime.Context, value: Any) -> Any:
    meter = context.environment.meter  # type: ignore[attr-defined]
    meter.step()
    meter.charge_chars(meter.check_text(value))
    return value


def _raise_exception(message: str) -> None:
    raise _Refused(message)


def _strftime_now(format: str) -> str:
    if len(format) > 200 or re.search(r"%[^a-zA-Z%]", format):
        raise _OverBudget("an unusual date format")
    return datetime.datetime.now().strftime(format)


class Program:
    """A compiled template. Raises TemplateError when it is too long or not a template."""

    def __init__(self, source: str, name: str, limits: Limits | None = None) -> None:
        self._name = name
        self._limits = limits or Limits()
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(f"{name}: {len(source)} characters; a template may have {MAX_TEMPLATE_CHARS}")
        self._environment = _Environment()
        try:
            self._template = self._environment.metered_template(source)
        except _FAILURES as error:
            raise TemplateError(f"{name}: not a template that can be used: {one_line(error, 300)}") from error

    def run(self, variables: Mapping[str, Any], input_chars: int) -> str:
        """Render the template with ``variables``. Two threads must not call this at once.

        ``input_chars`` is the number of characters in ``variables``; the budget grows with it. Raises TemplateError.
        """
        meter = self._environment.meter = _Meter(self._limits, input_chars)
        parts: list[str] = []
        try:
            for part in self._template.generate(variables):
                meter.charge_chars(len(part))
                parts.append(part)
        except _Refused as error:
            raise TemplateError(f"{self._name}: refuses this conversation: {one_line(error, 300)}") from error
        except _OverBudget as error:
            raise TemplateError(
                f"{self._name}: stopped, it does more than a chat needs: {one_line(error, 300)}"
            ) from error
        except _FAILURES as error:
            raise TemplateError(f"{self._name}: failed: {one_line(error, 300)}") from error
        return "".join(parts)
