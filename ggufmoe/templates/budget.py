"""The budget of one rendering of a chat template: steps, characters and time, counted before memory is taken.

Sizes of values are measured here; ``sandbox`` and ``template_filters`` say how much each operation is charged.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import jinja2

CONTAINERS = (list, tuple, dict)
WIDE_FORMAT = re.compile(r"\d{4}|\*")
"""A width of four digits, or one that an argument gives, in ``%`` and ``str.format``."""


class OverBudget(jinja2.TemplateRuntimeError):
    """The template exceeded its budget."""


@dataclass(frozen=True)
class Limits:
    """The budget of one rendering. A chat of a thousand messages needs less than a tenth of it.

    ``chars`` counts the characters of all texts and the elements of all lists that are made during the rendering.
    """

    steps: int = 300_000
    seconds: float = 5.0
    chars: int = 8_000_000
    chars_per_input_char: int = 32


class Meter:
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
            raise OverBudget(f"more than {self._limits.steps} steps")
        if time.monotonic() > self._deadline:
            raise OverBudget(f"more than {self._limits.seconds:g} s")

    def check(self, n_chars: int) -> None:
        """Raise OverBudget if ``n_chars`` exceed what is left; called before something of this size is made."""
        if n_chars > self._chars:
            raise OverBudget("too much text")

    def charge_chars(self, n_chars: int) -> None:
        self.check(n_chars)
        self._chars -= n_chars

    def charge(self, value: Any) -> None:
        """Count a new text or container. Parts that a container shares count each time that they occur."""
        if isinstance(value, str | bytes):
            self.charge_chars(len(value))
        elif isinstance(value, CONTAINERS):
            self.measure(value)
            self.charge_chars(1 + len(value))

    def check_text(self, *values: Any) -> int:
        """Characters that ``values`` have as text. Raises OverBudget for too many, and for values without a text."""
        total = 0
        for value in values:
            size, has_text = self.measure(value)
            if not has_text:
                raise OverBudget(f"a {type(value).__name__} has no text")
            total += size
        self.check(total)
        return total

    def check_replace(self, text: str, old: Any, new: Any) -> None:
        """``check`` for ``text`` with each ``old`` replaced by ``new``."""
        self.check(len(text) + (text.count(str(old)) if old else len(text) + 1) * self.check_text(new))

    def check_format(self, text: str, values: Any) -> None:
        """Raise OverBudget if ``text % values`` could be longer than the characters left, or has a wide field."""
        if WIDE_FORMAT.search(text):
            raise OverBudget("a format with a wide field")
        self.check(len(text) + text.count("%") * self.check_text(values))

    def measure(self, value: Any) -> tuple[int, bool]:
        """A lower bound for the length of ``value`` as text, and whether it may be converted to text.

        The size of a container is computed once, from its parts: lists of lists that share parts can stand for more
        text than any computer can compare or print.
        """
        if isinstance(value, str):
            return len(value), True
        if isinstance(value, bytes):
            return 4 * len(value) + 3, True
        if isinstance(value, int):
            return value.bit_length() // 3 + 5, True
        if not isinstance(value, CONTAINERS):
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
