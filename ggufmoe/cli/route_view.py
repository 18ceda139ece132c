"""The terminal's view of a routing trace: coloured text, heat maps, summary.

Marks repeat what the colours say, so that the view is readable in pipes, with NO_COLOR and without seeing colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import TextIO

from rich.style import Style
from rich.text import Text

from ggufmoe.cli.console import make_console
from ggufmoe.routing.palette import expert_colour, lead
from ggufmoe.routing.report import summary_lines
from ggufmoe.routing.statistics import LabelledShares, Numbers, Summary, favourites
from ggufmoe.routing.trace import RoutingTrace, visible
from ggufmoe.sizes import counted

_SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
_SHADES = " ░▒▓█"
_ASCII_SHADES = " .:+#"
_CELL = 8


class RouteView:
    """Writes a trace to a stream: in colour on a terminal that shows colours, as wide as the terminal."""

    def __init__(self, stream: TextIO) -> None:
        self._console = make_console(stream)
        self._ascii = self._console.options.ascii_only

    def model(self, name: str, trace: RoutingTrace) -> None:
        """Write the first lines: the model's experts and the legend."""
        runs = (
            "all run on every token, so their weights are shown"
            if trace.every_expert_runs
            else f"{trace.n_expert_used} of them run on each token"
        )
        size = f"{counted(trace.n_expert, 'expert')} in {counted(trace.n_layer, 'layer')}"
        self._print(f"{visible(name)}: {size}; {runs}")
        legend = Text("after each token stands the expert that counted most: ")
        for expert in range(trace.n_expert):
            legend.append(f" {expert} {self._mark(expert)} ", _tint(expert, 1.0))
            legend.append(" ")
        self._console.print(legend)

    def text(self, trace: RoutingTrace, layer: int | None, title: str = "Text") -> None:
        """Write the tokens, each coloured and marked by the expert with the highest weight."""
        where = "mean of all layers" if layer is None else f"layer {layer}"
        self._title(f"{visible(title)}, {where}")
        line, column = Text(), 0
        for unit, ends_line in self._units(trace, layer):
            # a token is not parted from its mark
            if column and column + unit.cell_len > self._console.width:
                line.append("\n")
                column = 0
            line.append_text(unit)
            column += unit.cell_len
            if ends_line:
                line.append("\n")
                column = 0
        self._console.print(line, soft_wrap=True)
        if trace.n_prompt < trace.n_token:
            self._print(
                f"({counted(trace.n_token - trace.n_prompt, 'token')} after {'>>' if self._ascii else '»'} generated)"
            )

    def _units(self, trace: RoutingTrace, layer: int | None) -> Iterator[tuple[Text, bool]]:
        """Each token with its mark, and whether the line ends after it."""
        weights = trace.mean_weights(layer)
        for i, text in enumerate(trace.texts):
            unit = Text((" >> " if self._ascii else " » ") if i == trace.n_prompt else "")
            expert = int(weights[i].argmax())
            unit.append(visible(text), _tint(expert, lead(float(weights[i, expert]), trace.n_expert)))
            unit.append(self._mark(expert))
            yield unit, text.endswith("\n")

    def summary(self, trace: RoutingTrace, summary: Summary, layer: int | None) -> None:
        """Write the heat map, the numbers, and the tokens that each expert gets most."""
        what = "weight" if trace.every_expert_runs else "choices"
        self._title(f"Share of {what} by layer and expert, %")
        rows = [*zip(map(str, trace.layers), summary.share, strict=True), ("mean", summary.mean_share)]
        self._heat("layer", rows)
        self._title("Summary")
        for name, value in summary_lines(trace, summary):
            self._print(f"{name + ':':<21} {value}")
        self._title("Tokens that each expert likes most")
        for expert in range(trace.n_expert):
            liked = favourites(trace, expert, layer=layer)
            words = ", ".join(f"{_word(one.text)} {100 * one.weight:.0f}%" for one in liked)
            self._print(f"expert {expert}: {words or 'none'}")

    def comparison(self, shares: LabelledShares) -> None:
        """Write the share of every expert by label: the mean over all layers, and where labels differ most."""
        what = "weight" if shares.by_weight else "choices"
        names = [f"{visible(label)} ({n})" for label, n in zip(shares.labels, shares.n_tokens, strict=True)]
        self._title(f"Share of {what} by label (tokens) and expert, mean of all layers, %")
        self._heat("label", zip(names, shares.mean, strict=True))
        layer = shares.most_telling_layer
        self._title(f"The same in layer {layer}, where labels differ most")
        self._heat("label", zip(names, shares.by_layer[:, shares.layers.index(layer)], strict=True))

    def _heat(self, corner: str, rows: Iterable[tuple[str, Numbers]]) -> None:
        """Write a table of shares, split into several tables on a narrow terminal."""
        listed = list(rows)
        n_expert = len(listed[0][1])
        width = self._console.width
        label = min(max(len(corner), *(len(name) for name, _ in listed)), max(8, width - _CELL - 1))
        step = max(1, (width - label - 1) // _CELL)
        for start in range(0, n_expert, step):
            experts = range(start, min(start + step, n_expert))
            self._print(f"{corner:>{label}} " + "".join(f"{expert:>{_CELL - 2}}  " for expert in experts))
            for name, values in listed:
                line = Text(f"{name[:label]:>{label}} ", no_wrap=True)
                for expert in experts:
                    self._cell(line, expert, float(values[expert]), n_expert)
                self._console.print(line)

    def _cell(self, line: Text, expert: int, value: float, n_expert: int) -> None:
        # half of the scale is the even part
        step = min(4, int(value * n_expert / 2 * 4 + 0.5))
        shade = (_ASCII_SHADES if self._ascii else _SHADES)[step]
        line.append(f"{100 * value:{_CELL - 2}.1f}")
        line.append(shade, Style(color=_hex(expert, 1.0)))
        line.append(" ")

    def _mark(self, expert: int) -> str:
        return f"[{expert}]" if self._ascii else str(expert).translate(_SUPERSCRIPTS)

    def _title(self, title: str) -> None:
        self._print(f"\n{title}")

    def _print(self, text: str) -> None:
        self._console.print(text)


def _word(text: str) -> str:
    """A token as an item of a list: quoted where it could be mistaken for a separator."""
    shown = visible(text).strip()
    return shown if any(map(str.isalnum, shown)) else f"'{shown or text}'"


def _tint(expert: int, strength: float) -> Style:
    return Style(color="#000000", bgcolor=_hex(expert, 0.3 + 0.7 * math.sqrt(strength)))


def _hex(expert: int, strength: float) -> str:
    """The expert's colour, the paler the smaller its ``strength`` (0 to 1)."""
    channels = (round(235 + (channel - 235) * strength) for channel in expert_colour(expert))
    return "#" + "".join(f"{channel:02x}" for channel in channels)
