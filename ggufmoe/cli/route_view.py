"""The terminal's view of a routing trace: coloured text, heat maps, summary.

Marks repeat what the colours say, so that the view is readable in pipes, with NO_COLOR and without seeing colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, zip_longest
from typing import TextIO

from rich.cells import chop_cells
from rich.style import Style
from rich.text import Text

from ggufmoe.cli.console import make_console, wrapped
from ggufmoe.routing.palette import hex_colour, lead
from ggufmoe.routing.report import summary_lines
from ggufmoe.routing.statistics import LabelledShares, Numbers, Summary, favourites
from ggufmoe.routing.trace import RoutingTrace, visible
from ggufmoe.sizes import counted

_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_SHADES = " ░▒▓█"
_ASCII_SHADES = " .:+#"
_BARS = "▁▂▃▄▅▆▇█"
_CELL = 8
_MOST_SHOWN = 16
_PAPER = (235, 235, 235)
_GAP = 4
"""Columns between two texts."""
_LEAST_WIDTH_OF_TWO = 100


class RouteView:
    """Writes a trace to a stream: in colour on a terminal that shows colours, as wide as the terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._console = make_console(stream)
        self._on_terminal = stream.isatty()
        self._ascii = self._console.options.ascii_only

    def model(self, name: str, trace: RoutingTrace, facts: Sequence[tuple[str, str]] = ()) -> None:
        """Write the first lines: the model's experts, more ``facts`` about them (name, text), and the legend."""
        runs = (
            "all run on every token, so their weights are shown"
            if trace.every_expert_runs
            else f"{trace.n_expert_used} of them run on each token"
        )
        size = f"{counted(trace.n_expert, 'expert')} in {counted(trace.n_layer, 'layer')}"
        self._print(f"{visible(name)}: {size}; {runs}")
        if facts:
            self._print("; ".join(f"{what}: {text}" for what, text in facts))
        if trace.n_expert == 2:
            self._console.print(self._scale(trace))
            return
        legend = Text("after each token stands the expert that counted most: ")
        for expert in trace.leading_experts(_MOST_SHOWN):
            legend.append(f" {_numbered(trace, expert)} {self._mark(expert)} ", _tint(expert, 1.0))
            legend.append(" ")
        if trace.n_expert > _MOST_SHOWN:
            legend.append(f"and {trace.n_expert - _MOST_SHOWN} more")
        self._console.print(legend)

    def _scale(self, trace: RoutingTrace) -> Text:
        """The legend of two experts: what the mark after a token says."""
        left, right = (visible(trace.name(expert)) for expert in (0, 1))
        if self._ascii:
            return Text(f"after each token stands how much of it is that of {right}, in percent; the rest: {left}")
        legend = Text("after each token: ")
        legend.append(f" {_BARS[0]} all {left} ", _tint(0, 1.0))
        legend.append(" ")
        legend.append(f" {_BARS[-1]} all {right} ", _tint(1, 1.0))
        return legend

    def text(self, trace: RoutingTrace, layer: int | None, title: str = "Text") -> None:
        """Write the tokens, each coloured and marked by the expert with the highest weight."""
        for line in self._text_lines(trace, layer, title, self._console.width):
            self._console.print(line, soft_wrap=True)

    def texts(self, texts: Sequence[tuple[str, RoutingTrace]], layer: int | None) -> None:
        """Write several (title, trace): beside each other on a wide terminal, else one below the other."""
        columns = (self._console.width + _GAP) // len(texts) - _GAP
        if not self._on_terminal or self._console.width < _LEAST_WIDTH_OF_TWO or len(texts) != 2:
            for title, trace in texts:
                self.text(trace, layer, title)
            return
        left, right = (self._text_lines(trace, layer, title, columns) for title, trace in texts)
        for one, other in zip_longest(left, right, fillvalue=Text()):
            gap = " " * (columns - one.cell_len + _GAP) if other else ""
            self._console.print(Text.assemble(one, gap, other), soft_wrap=True)

    def _text_lines(self, trace: RoutingTrace, layer: int | None, title: str, columns: int) -> list[Text]:
        """An empty line, the title, the tokens in lines of at most ``columns``, how many of them were generated."""
        where = "mean of all layers" if layer is None else f"layer {layer}"
        lines = [Text(), *map(Text, wrapped(f"{visible(title)}, {where}", columns).split("\n")), Text()]
        for units, ends_line in self._words(trace, layer):
            _append(lines, units, columns)
            if ends_line:
                lines.append(Text())
        if not lines[-1]:
            lines.pop()
        if trace.n_prompt < trace.n_token:
            generated = counted(trace.n_token - trace.n_prompt, "token")
            sign = ">>" if self._ascii else "»"
            lines.extend(map(Text, wrapped(f"({generated} after {sign} generated)", columns).split("\n")))
        return lines

    def _words(self, trace: RoutingTrace, layer: int | None) -> Iterator[tuple[list[Text], bool]]:
        """The tokens of each word with their marks, and whether the line ends after it."""
        word: list[Text] = []
        for i, (unit, ends_line) in enumerate(self._units(trace, layer)):
            if word and (i == trace.n_prompt or trace.texts[i][:1].isspace()):
                yield word, False
                word = []
            word.append(unit)
            if ends_line:
                yield word, True
                word = []
        yield word, False

    def _units(self, trace: RoutingTrace, layer: int | None) -> Iterator[tuple[Text, bool]]:
        """Each token with its mark, and whether the line ends after it."""
        weights = trace.mean_weights(layer)
        for i, text in enumerate(trace.texts):
            unit = Text((" >> " if self._ascii else " » ") if i == trace.n_prompt else "")
            expert = int(weights[i].argmax())
            unit.append(visible(text), _tint(expert, lead(float(weights[i, expert]), trace.n_expert)))
            unit.append(self._balance(float(weights[i, 1])) if trace.n_expert == 2 else self._mark(expert))
            yield unit, text.endswith("\n")

    def summary(self, trace: RoutingTrace, summary: Summary, layer: int | None) -> None:
        """Write the heat map, the numbers, and the tokens that each expert gets most."""
        what = "weight" if trace.every_expert_runs else "choices"
        self._title(f"Share of {what} by layer and expert, %")
        rows = [*zip(map(str, trace.layers), summary.share, strict=True), ("mean", summary.mean_share)]
        self._heat("layer", rows, trace)
        self._title("Summary")
        for name, value in summary_lines(trace, summary):
            self._print(f"{name + ':':<21} {value}", indent=22)
        self._title("Tokens that each expert gets more than its average: share, and points above the average")
        for expert in trace.leading_experts(_MOST_SHOWN):
            liked = favourites(trace, expert, layer=layer)
            words = ", ".join(f"{_word(one.text)} {100 * one.weight:.0f}% (+{100 * one.more:.0f})" for one in liked)
            self._print(f"{_numbered(trace, expert, 'expert ')}: {words or 'none'}", indent=2)

    def comparison(self, shares: LabelledShares, trace: RoutingTrace) -> None:
        """Write the share of every expert by label: the mean over all layers, and where labels differ most."""
        what = "weight" if shares.by_weight else "choices"
        names = [f"{visible(label)} ({n})" for label, n in zip(shares.labels, shares.n_tokens, strict=True)]
        self._title(f"Share of {what} by label (tokens) and expert, mean of all layers, %")
        self._heat("label", zip(names, shares.mean, strict=True), trace)
        layer = shares.most_telling_layer
        self._title(f"The same in layer {layer}, where labels differ most")
        self._heat("label", zip(names, shares.by_layer[:, shares.layers.index(layer)], strict=True), trace)

    def _heat(self, corner: str, rows: Iterable[tuple[str, Numbers]], trace: RoutingTrace) -> None:
        """Write a table of shares, split into several tables on a narrow terminal; of two experts as a scale.

        Of many experts those with the largest shares in ``trace`` have columns.
        """
        listed = list(rows)
        width = self._console.width
        label = min(max(len(corner), *(len(name) for name, _ in listed)), max(8, width - _CELL - 1))
        if trace.n_expert == 2:
            self._two_sided(corner, label, listed, trace)
            return
        step = max(1, (width - label - 1) // _CELL)
        shown = trace.leading_experts(_MOST_SHOWN)
        for start in range(0, len(shown), step):
            experts = shown[start : start + step]
            self._print(f"{corner:>{label}} " + "".join(f"{expert:>{_CELL - 2}}  " for expert in experts))
            for name, values in listed:
                line = Text(f"{name[:label]:>{label}} ", no_wrap=True)
                for expert in experts:
                    self._cell(line, expert, float(values[expert]), trace.n_expert)
                self._console.print(line)
        if len(shown) < trace.n_expert:
            self._strip(corner, label, listed, trace, shown)

    def _strip(
        self,
        corner: str,
        label: int,
        rows: list[tuple[str, Numbers]],
        trace: RoutingTrace,
        shown: Sequence[int],
    ) -> None:
        """Write the sum of the experts that have no column, and one character for each group of neighbouring experts.

        A character is as dark as the group's largest share; 4 times the even share is darkest.
        """
        n = trace.n_expert
        size = -(-n // max(8, min(n, self._console.width - label - _CELL - 2)))
        each = "a character for each" if size == 1 else f"a character for every {size}"
        self._print(f"(the {len(shown)} experts with the largest shares, of {n})")
        self._print(f"{corner:>{label}}  others  all, {each}")
        shades = _ASCII_SHADES if self._ascii else _SHADES
        for name, values in rows:
            others = 1 - sum(float(values[expert]) for expert in shown)
            steps = (float(values[start : start + size].max()) * n for start in range(0, n, size))
            strip = "".join(shades[min(4, math.ceil(step))] for step in steps)
            self._print(f"{name[:label]:>{label}} {100 * abs(others):{_CELL - 2}.1f}  {strip}")

    def _two_sided(self, corner: str, label: int, rows: list[tuple[str, Numbers]], trace: RoutingTrace) -> None:
        """Write each row as one bar that is parted between the two experts, with the share of either beside it."""
        bar = max(4, min(40, self._console.width - label - 15))
        left, right = (visible(trace.name(expert)) for expert in (0, 1))
        if len(left) + len(right) < bar + 12:
            self._print(f"{corner:>{label}}  {left:<{bar + 12 - len(right)}}{right}")
        else:
            self._print(f"left: {left}, right: {right}")
        full, empty = ("#", ".") if self._ascii else ("█", "░")
        for name, values in rows:
            n_left = round(bar * float(values[0]))
            line = Text(f"{name[:label]:>{label}} {100 * values[0]:5.1f} ", no_wrap=True)
            line.append(full * n_left, Style(color=hex_colour(0)))
            line.append(empty * (bar - n_left), Style(color=hex_colour(1)))
            line.append(f" {100 * values[1]:5.1f}")
            self._console.print(line)

    def _cell(self, line: Text, expert: int, value: float, n_expert: int) -> None:
        # half of the scale is the even part
        step = min(4, int(value * n_expert / 2 * 4 + 0.5))
        shade = (_ASCII_SHADES if self._ascii else _SHADES)[step]
        line.append(f"{100 * value:{_CELL - 2}.1f}")
        line.append(shade, Style(color=hex_colour(expert)))
        line.append(" ")

    def _balance(self, weight: float) -> str:
        """The mark of a token of which the second of two experts has ``weight``."""
        return f"[{100 * weight:.0f}]" if self._ascii else _BARS[min(7, int(weight * 8))]

    def _mark(self, expert: int) -> str:
        return f"[{expert}]" if self._ascii else str(expert).translate(_SUPERSCRIPTS)

    def _title(self, title: str) -> None:
        self._print(f"\n{title}")

    def _print(self, text: str, indent: int = 0) -> None:
        width = self._console.width
        self._console.print(wrapped(text, width, indent if 2 * indent < width else 2))


def _append(lines: list[Text], units: Sequence[Text], columns: int) -> None:
    """Append a word to the last line, or to a new one where it does not fit; break it only if it fills a line."""
    n_cells = sum(unit.cell_len for unit in units)
    if lines[-1] and n_cells <= columns < lines[-1].cell_len + n_cells:
        lines.append(Text())
    for unit in units:
        if lines[-1] and lines[-1].cell_len + unit.cell_len > columns:  # a token is not parted from its mark
            lines.append(Text())
        first, *rest = unit.divide(accumulate(map(len, chop_cells(unit.plain, columns)[:-1])))
        lines[-1].append_text(first)
        lines.extend(rest)


def _numbered(trace: RoutingTrace, expert: int, before: str = "") -> str:
    """The expert's number, and its name where it has one."""
    name = visible(trace.name(expert))
    return f"{before}{expert}" if name == f"expert {expert}" else name if trace.n_expert == 2 else f"{expert} {name}"


def _word(text: str) -> str:
    """A token as an item of a list: quoted where it could be mistaken for a separator."""
    shown = visible(text).strip()
    return shown if any(map(str.isalnum, shown)) else f"'{shown or text}'"


def _tint(expert: int, strength: float) -> Style:
    """Black on the expert's colour, which is the paler the smaller its ``strength`` (0 to 1)."""
    return Style(color="#000000", bgcolor=hex_colour(expert, 0.3 + 0.7 * math.sqrt(strength), _PAPER))
