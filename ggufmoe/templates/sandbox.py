"""Runs chat templates from untrusted files within a budget.

A template is a program. Jinja's sandbox keeps it away from Python's internals; this module adds limits on steps,
characters and time. Loops, calls, filters and every operation that makes text or lists are counted before memory is
allocated. It needs no thread and no signal, so it works in any thread and on any system.
"""

from __future__ import annotations

import datetime
import re
import string
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.sandbox
from jinja2 import nodes
from jinja2.visitor import NodeTransformer

from ggufmoe.errors import TemplateError, one_line
from ggufmoe.templates.budget import WIDE_FORMAT, Limits, Meter, OverBudget
from ggufmoe.templates.template_filters import budgeted_filters, budgeted_tests

MAX_TEMPLATE_CHARS = 100_000

_FAILURES = (
    jinja2.TemplateError,
    ArithmeticError,
    AssertionError,  # of a filter's arguments
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


_SEQUENCES = (str, bytes, list, tuple)
_PADDING_METHODS = _words("center ljust rjust zfill")
_STR_METHODS = _PADDING_METHODS | _words(
    "capitalize casefold count encode endswith expandtabs find format format_map index isalnum isalpha isascii "
    "isdecimal isdigit isidentifier islower isnumeric isprintable isspace istitle isupper join lower lstrip partition "
    "removeprefix removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip "
    "swapcase title translate upper"
)
_NUMBER_ATTRIBUTES = _words("as_integer_ratio conjugate imag is_integer real")
_METHODS: dict[type, frozenset[str]] = {
    str: _STR_METHODS,
    dict: frozenset({"copy", "get", "items", "keys", "values"}),
    list: frozenset({"copy", "count", "index"}),
    tuple: frozenset({"count", "index", "grouper", "list"}),  # the last two are of the pairs that groupby makes
    int: _NUMBER_ATTRIBUTES | {"bit_count", "bit_length", "denominator", "numerator"},
    float: _NUMBER_ATTRIBUTES | {"hex"},
    bytes: frozenset({"decode"}),
}
_ENCODINGS = frozenset(("utf-8", "utf8", "ascii", "latin-1"))
"""Encodings whose time grows with the length of the text only."""
_DATE_FLAGS = "-_0^#"
_DATE_DIRECTIVE = re.compile(rf"%([{_DATE_FLAGS}]?)([EO]?[a-zA-Z%])")


class _Refused(jinja2.TemplateRuntimeError):
    """The template called ``raise_exception``."""


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
        self.meter = Meter(Limits(), 0)
        self.filters: dict[str, Any] = budgeted_filters(self)
        self.tests: dict[str, Any] = budgeted_tests(self)
        self.globals = {
            "range": jinja2.sandbox.safe_range,
            "dict": dict,
            **{name: self.globals[name] for name in ("namespace", "cycler", "joiner")},
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }

    def metered_template(self, tree: nodes.Template) -> jinja2.Template:
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
        if isinstance(owner, str | bytes):
            self._check_method(owner, function.__name__, (*args, *kwargs.values()))
        result = super().call(context, function, *args, **kwargs)
        self.meter.charge(result)
        return result

    def _check_method(self, text: Any, method: str, args: tuple[Any, ...]) -> None:
        if method in ("encode", "decode"):
            if args and str(args[0]).lower() not in _ENCODINGS:
                raise OverBudget(f"an encoding other than {', '.join(sorted(_ENCODINGS))}")
        elif method == "translate":
            self.meter.check((1 + len(text)) * self.meter.check_text(*args))
        elif method == "replace" and len(args) >= 2:
            self.meter.check_replace(text, args[0], args[1])
        elif method == "join" and args and isinstance(args[0], list | tuple):
            self.meter.check(len(text) * len(args[0]) + self.meter.check_text(*args[0]))
        elif method == "join":
            raise OverBudget("join takes a list")
        elif method in _PADDING_METHODS:
            width = max((arg for arg in args if isinstance(arg, int)), default=0)
            self.meter.check(width)
        elif method == "expandtabs":
            self.meter.check(len(text) + text.count("\t") * max((abs(arg) for arg in args), default=8))

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
            if any(spec and ("{" in spec or WIDE_FORMAT.search(spec)) for _, _, spec, _ in fields):
                raise OverBudget("a format with a wide field")
            self.meter.check(len(value.__self__) + len(fields) * self.meter.check_text(*args, *kwargs.values()))
            return wrapped(*args, **kwargs)

        return checked

    # ---- checks of a size before the value is made

    def _check_add(self, left: Any, right: Any) -> None:
        if isinstance(left, _SEQUENCES) and isinstance(right, _SEQUENCES):
            self.meter.check(len(left) + len(right))

    def _check_multiply(self, left: Any, right: Any) -> None:
        for sequence, times in ((left, right), (right, left)):
            if isinstance(sequence, _SEQUENCES) and isinstance(times, int):
                self.meter.check(len(sequence) * times)
        if isinstance(left, int) and isinstance(right, int) and left.bit_length() + right.bit_length() > 4096:
            raise OverBudget("numbers of more than 4096 bits")

    def _check_power(self, left: Any, right: Any) -> None:
        if abs(left) > 2**32 or abs(right) > 64:
            raise OverBudget("a power of large numbers")

    def _check_format(self, left: Any, right: Any) -> None:
        if isinstance(left, bytes):
            raise OverBudget("a format of bytes")
        if isinstance(left, str):
            self.meter.check_format(left, right)


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
    """The time in a format of ``strftime``; flags such as that of ``%-d`` have the same effect on every system."""
    if len(format) > 200 or "%" in _DATE_DIRECTIVE.sub("", format):
        raise OverBudget("an unusual date format")
    now = datetime.datetime.now()
    return _DATE_DIRECTIVE.sub(lambda directive: _part_of_time(now, directive[1], directive[2]), format)


def _part_of_time(now: datetime.datetime, flag: str, directive: str) -> str:
    part = now.strftime(f"%{directive}")
    if flag == "^":
        return part.upper()
    if flag in ("-", "_") and part.isdigit():
        bare = part.lstrip("0") or "0"
        return bare if flag == "-" else bare.rjust(len(part))
    return part


class Program:
    """A compiled template. ``variables`` are the names that it reads and does not always set.

    Raises TemplateError when it is too long or not a template.
    """

    def __init__(self, source: str, name: str, limits: Limits | None = None) -> None:
        self._name = name
        self._limits = limits or Limits()
        if len(source) > MAX_TEMPLATE_CHARS:
            raise TemplateError(f"{name}: {len(source)} characters; a template may have {MAX_TEMPLATE_CHARS}")
        self._environment = _Environment()
        try:
            tree = self._environment.parse(source)
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(tree)) - self._environment.globals.keys()
            self._template = self._environment.metered_template(tree)
        except _FAILURES as error:
            raise TemplateError(f"{name}: not a template that can be used: {one_line(error, 300)}") from error

    def run(self, variables: Mapping[str, Any], input_chars: int) -> str:
        """Render the template with ``variables``. Two threads must not call this at once.

        ``input_chars`` is the number of characters in ``variables``; the budget grows with it. Raises TemplateError.
        """
        meter = self._environment.meter = Meter(self._limits, input_chars)
        parts: list[str] = []
        try:
            for part in self._template.generate(variables):
                meter.charge_chars(len(part))
                parts.append(part)
        except _Refused as error:
            raise TemplateError(f"{self._name}: refuses this conversation: {one_line(error, 300)}") from error
        except OverBudget as error:
            raise TemplateError(
                f"{self._name}: stopped, it does more than a chat needs: {one_line(error, 300)}"
            ) from error
        except _FAILURES as error:
            raise TemplateError(f"{self._name}: failed: {one_line(error, 300)}") from error
        return "".join(parts)
