"""A picture of routing as SVG: each token in the colour of the expert that leads, below it a bar for each layer.

The colour is the stronger the more the expert leads, in the mean of all layers; below the bars stands its share in
percent. The picture brings its own paper, light or dark as the reader's system is, and its text is text.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from ggufmoe.routing.palette import hex_colour, lead
from ggufmoe.routing.trace import Floats, RoutingTrace, visible
from ggufmoe.sizes import counted

WIDTH, MARGIN = 860, 28
MOST_NAMES = 12
"""Experts that are named and coloured in the heading; of more, those with the largest shares."""
FONT, ADVANCE = 17, 10.2
"""Size of the tokens' letters, and the width that each is given whatever font there is."""
CHIP, BAR, MOST_BARS = 27, 3.5, 8
"""Height of a token and of one layer's bar; of models with more layers, neighbours share one."""
_OTHERS = "#9aa3ad"
WORD_GAP, PIECE_GAP = 9, 2
LINE_GAP = 20

STYLE = """
svg.routing { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.paper { fill: #ffffff; stroke: #d0d7de; }
text { fill: #1f2328; }
.soft { fill: #59636e; }
.plain { font-family: system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; }
@media (prefers-color-scheme: dark) {
  .paper { fill: #0d1117; stroke: #3d444d; }
  text { fill: #f0f6fc; }
  .soft { fill: #9198a1; }
}
"""


@dataclass(frozen=True)
class TokenChip:
    """One token: its text, the weights of the experts, and the gap before it."""

    text: str
    mean: Floats
    """(n_expert,)."""
    layers: Floats
    """Of each bar: (n_bar, n_expert)."""
    gap: float
    is_generated: bool
    breaks_line: bool

    @property
    def width(self) -> float:
        """In the picture's units."""
        wide = sum(2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in self.text)
        return max(wide * ADVANCE + 6, 2 * ADVANCE)


def _chips(trace: RoutingTrace) -> Iterator[TokenChip]:
    """The tokens of a trace; a space in front of one becomes a gap."""
    weights = trace.expert_shares
    groups = np.array_split(np.arange(trace.n_layer), min(trace.n_layer, MOST_BARS))
    for i, text in enumerate(trace.texts):
        shown = visible(text.strip("\n")) or "⏎"
        begins_word = shown.startswith(" ") or i == 0 or trace.texts[i - 1].startswith("<")
        yield TokenChip(
            text=shown.strip() or "␣",
            mean=weights[i].mean(axis=0),
            layers=np.stack([weights[i, group].mean(axis=0) for group in groups]),
            gap=WORD_GAP if begins_word else PIECE_GAP,
            is_generated=i >= trace.n_prompt,
            breaks_line=text.endswith("\n"),
        )


class _Drawing:
    """The picture while it grows downwards."""

    def __init__(self, names: Sequence[str], width: float = WIDTH) -> None:
        self._names = names
        self._width = width
        self._parts: list[str] = []
        self._y: float = MARGIN
        self._named: tuple[int, ...] = ()
        """The experts that have a colour of their own in the bars."""

    def heading(self, title: str, trace: RoutingTrace) -> None:
        """What is shown, and the experts' colours."""
        runs = "all run for every token" if trace.every_expert_runs else f"{trace.n_expert_used} run for each token"
        self._text(MARGIN, self._y + 12, title, size=18, style="plain", weight="600")
        note = f"{counted(trace.n_expert, 'expert')} in {counted(trace.n_layer, 'layer')}, {runs}"
        self._text(self._width - MARGIN, self._y + 12, note, size=14, style="plain soft", anchor="end")
        self._y += 36
        self.names(trace)

    def names(self, trace: RoutingTrace) -> None:
        """The experts' colours, folded at the margin."""
        x: float = MARGIN
        for expert in trace.leading_experts(MOST_NAMES):
            length = 21 + 7.6 * len(self._names[expert])
            if x > MARGIN and x + length > self._width - MARGIN:
                x = MARGIN
                self._y += 22
            self._parts.append(
                f'<rect x="{x}" y="{self._y - 11}" width="14" height="14" rx="4" fill="{hex_colour(expert)}"/>'
            )
            self._text(x + 21, self._y + 1, self._names[expert], size=14, style="plain")
            x += length + 26
        if trace.n_expert > MOST_NAMES:
            self._y += 22
            more = f"and {trace.n_expert - MOST_NAMES} more with smaller shares"
            self._text(MARGIN, self._y + 1, more, size=14, style="plain soft")
        self._y += 26

    def tokens(self, trace: RoutingTrace) -> None:
        """The text of one prompt, folded at the margin."""
        self._named = trace.leading_experts(MOST_NAMES)
        x: float = MARGIN
        n_bars = min(trace.n_layer, MOST_BARS)
        height = CHIP + 4 + n_bars * (BAR + 1) + 15
        for chip in _chips(trace):
            gap = chip.gap if x > MARGIN else 0
            if x + gap + chip.width > self._width - MARGIN:
                x, gap = MARGIN, 0
                self._y += height + LINE_GAP
            x += gap
            self._chip(x, chip)
            x += chip.width
            if chip.breaks_line:
                x = self._width
        self._y += height + LINE_GAP + 8

    def _chip(self, x: float, chip: TokenChip) -> None:
        expert = int(chip.mean.argmax())
        weight = float(chip.mean[expert])
        strength = 0.16 + 0.5 * lead(weight, len(chip.mean)) ** 0.5
        y, middle = self._y, x + chip.width / 2
        self._parts.append(
            f"<g><title>{escape(chip.text)}: {escape(named_shares(self._names, chip.mean))}</title>"
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{chip.width:.1f}" height="{CHIP}" rx="5" '
            f'fill="{hex_colour(expert)}" fill-opacity="{strength:.3f}"/>'
        )
        if chip.is_generated:
            self._parts.append(
                f'<rect x="{x + 3:.1f}" y="{y + CHIP - 5:.1f}" width="{chip.width - 6:.1f}" height="1.2" '
                'class="soft" fill-opacity="0.7"/>'
            )
        length = chip.width - 6 if len(chip.text) > 1 else 0
        self._text(middle, y + 18.5, chip.text, size=FONT, anchor="middle", length=length)
        self._bars(x, y + CHIP + 4, chip)
        below = y + CHIP + 4 + len(chip.layers) * (BAR + 1) + 11
        self._text(middle, below, f"{100 * weight:.0f}", size=10.5, style="plain soft", anchor="middle")
        self._parts.append("</g>")

    def _bars(self, x: float, y: float, chip: TokenChip) -> None:
        """One bar for each layer, parted by the weights of the experts; an expert's parts are one path.

        Of many experts those that are not named in the heading are one grey part.
        """
        paths: dict[int, str] = {}
        for row, weights in enumerate(chip.layers):
            left, top = x, y + row * (BAR + 1)
            for expert, weight in self._parted(weights):
                width = chip.width * float(weight)
                if width >= 0.05:
                    part = f"M{left:.1f} {top:.1f}h{width:.1f}v{BAR}h-{width:.1f}z"
                    paths[expert] = paths.get(expert, "") + part
                left += width
        for expert, path in paths.items():
            self._parts.append(f'<path d="{path}" fill="{_OTHERS if expert < 0 else hex_colour(expert)}"/>')

    def _parted(self, weights: Floats) -> Iterator[tuple[int, float]]:
        yield from ((expert, float(weights[expert])) for expert in self._named)
        if len(self._named) < len(weights):
            yield -1, 1 - float(weights[list(self._named)].sum())

    def _text(
        self,
        x: float,
        y: float,
        text: str,
        *,
        size: float,
        style: str = "",
        weight: str = "",
        anchor: str = "",
        length: float = 0,
    ) -> None:
        attributes = f'x="{x:.1f}" y="{y:.1f}" font-size="{size:g}"'
        attributes += f' class="{style}"' * bool(style) + f' font-weight="{weight}"' * bool(weight)
        attributes += f' text-anchor="{anchor}"' * bool(anchor)
        attributes += f' textLength="{length:.1f}" lengthAdjust="spacingAndGlyphs"' * bool(length)
        self._parts.append(f"<text {attributes}>{escape(text)}</text>")

    def element(self, label: str) -> str:
        """The picture without heading, paper and styles."""
        height = self._y - LINE_GAP + 6
        return "\n".join(
            [
                f'<svg class="routing" viewBox="0 0 {self._width:g} {height:.0f}" width="{self._width:g}" '
                f'height="{height:.0f}" role="img" aria-label="{escape(label)}">',
                *self._parts,
                "</svg>",
            ]
        )

    def svg(self, title: str, description: str) -> str:
        """The whole document."""
        height = self._y - LINE_GAP + 6
        paper = f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:.1f}" rx="12"/>'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" class="routing" viewBox="0 0 {WIDTH} {height:.0f}" '
                f'width="{WIDTH}" height="{height:.0f}" role="img" aria-labelledby="title description">',
                f'<title id="title">{escape(title)}</title>',
                f'<desc id="description">{escape(description)}</desc>',
                f"<style>{STYLE}</style>",
                paper,
                *self._parts,
                "</svg>",
                "",
            ]
        )


def named_shares(names: Sequence[str], weights: Floats, most: int = 8) -> str:
    """``everyday 38 %, math 62 %``; of more than ``most`` experts those with the largest shares, and the others."""
    order = np.argsort(-weights, kind="stable")[:most] if len(weights) > most else range(len(weights))
    parts = [f"{names[expert]} {100 * weights[expert]:.0f} %" for expert in order]
    rest = 1 - sum(float(weights[expert]) for expert in order)
    return ", ".join([*parts, f"others {100 * rest:.0f} %"] if len(weights) > most and rest > 0.005 else parts)


def routing_picture(title: str, traces: Sequence[RoutingTrace], names: Sequence[str] = ()) -> str:
    """The SVG document for traces of one model; ``names`` replace those of the experts."""
    names = names or [traces[0].name(expert) for expert in range(traces[0].n_expert)]
    drawing = _Drawing(names)
    drawing.heading(title, traces[0])
    for trace in traces:
        drawing.tokens(trace)
    lines = [f"{''.join(trace.texts)!r}: {named_shares(names, trace.mean_weights().mean(axis=0))}" for trace in traces]
    return drawing.svg(f"Routing in {title}", visible("Mean weight of each expert. " + "; ".join(lines)))


def inline_picture(trace: RoutingTrace, label: str, width: float = WIDTH) -> str:
    """The tokens of one trace as an ``<svg>`` element for an HTML page, which has STYLE among its styles."""
    drawing = _Drawing([trace.name(expert) for expert in range(trace.n_expert)], width)
    drawing.tokens(trace)
    return drawing.element(label)
