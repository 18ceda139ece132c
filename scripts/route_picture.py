"""Draw where a model sends the tokens of some prompts, as an SVG picture for README.

usage: route_picture.py MODEL.gguf OUT.svg PROMPT [PROMPT ...] [--generate N] [--name WORD ...]

Each token has the colour of the expert that counted most, in the mean of all layers, and the stronger the more it led;
below it stands that expert's weight, and a bar for each layer shows how much every expert had there. The picture brings
its own paper, light or dark as the reader's system is, so that it can be read on any page; its text is text.
"""

from __future__ import annotations

import argparse
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from ggufmoe import ContextOptions, Engine, RoutingTrace, trace_routing
from ggufmoe.routing.palette import expert_colour, lead
from ggufmoe.routing.trace import Floats, visible

WIDTH, MARGIN = 860, 28
FONT, ADVANCE = 17, 10.2
"""Size of the tokens' letters, and the width that each is given whatever font there is."""
CHIP, BAR, MOST_BARS = 27, 3.5, 8
"""Height of a token and of one layer's bar; of models with more layers, neighbours share one."""
WORD_GAP, PIECE_GAP = 9, 2
LINE_GAP = 20

STYLE = """
svg { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
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
class Chip:
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


def chips(trace: RoutingTrace) -> Iterator[Chip]:
    """The tokens of a trace; a space in front of one becomes a gap."""
    weights = trace.expert_weights
    groups = np.array_split(np.arange(trace.n_layer), min(trace.n_layer, MOST_BARS))
    for i, text in enumerate(trace.texts):
        shown = visible(text.strip("\n")) or "⏎"
        begins_word = shown.startswith(" ") or i == 0 or trace.texts[i - 1].startswith("<")
        yield Chip(
            text=shown.strip() or "␣",
            mean=weights[i].mean(axis=0),
            layers=np.stack([weights[i, group].mean(axis=0) for group in groups]),
            gap=WORD_GAP if begins_word else PIECE_GAP,
            is_generated=i >= trace.n_prompt,
            breaks_line=text.endswith("\n"),
        )


class Drawing:
    """The picture while it grows downwards."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = names
        self._parts: list[str] = []
        self._y: float = MARGIN

    def heading(self, title: str, trace: RoutingTrace) -> None:
        """What is shown, and the experts' colours."""
        runs = "all run for every token" if trace.every_expert_runs else f"{trace.n_expert_used} run for each token"
        self._text(MARGIN, self._y + 12, title, size=18, style="plain", weight="600")
        note = f"{trace.n_expert} experts in {trace.n_layer} layers, {runs}"
        self._text(WIDTH - MARGIN, self._y + 12, note, size=14, style="plain soft", anchor="end")
        self._y += 36
        x: float = MARGIN
        for expert, name in enumerate(self._names):
            self._parts.append(f'<rect x="{x}" y="{self._y - 11}" width="14" height="14" rx="4" fill="{rgb(expert)}"/>')
            self._text(x + 21, self._y + 1, name, size=14, style="plain")
            x += 21 + 7.6 * len(name) + 26
        self._y += 26

    def tokens(self, trace: RoutingTrace) -> None:
        """The text of one prompt, folded at the margin."""
        x: float = MARGIN
        n_bars = min(trace.n_layer, MOST_BARS)
        height = CHIP + 4 + n_bars * (BAR + 1) + 15
        for chip in chips(trace):
            gap = chip.gap if x > MARGIN else 0
            if x + gap + chip.width > WIDTH - MARGIN:
                x, gap = MARGIN, 0
                self._y += height + LINE_GAP
            x += gap
            self._chip(x, chip)
            x += chip.width
            if chip.breaks_line:
                x = WIDTH
        self._y += height + LINE_GAP + 8

    def _chip(self, x: float, chip: Chip) -> None:
        expert = int(chip.mean.argmax())
        weight = float(chip.mean[expert])
        strength = 0.16 + 0.5 * lead(weight, len(chip.mean)) ** 0.5
        y, middle = self._y, x + chip.width / 2
        self._parts.append(
            f"<g><title>{escape(chip.text)}: {escape(shares(self._names, chip.mean))}</title>"
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{chip.width:.1f}" height="{CHIP}" rx="5" '
            f'fill="{rgb(expert)}" fill-opacity="{strength:.3f}"/>'
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

    def _bars(self, x: float, y: float, chip: Chip) -> None:
        """One bar for each layer, parted by the weights of the experts; an expert's parts are one path."""
        paths: dict[int, str] = {}
        for row, weights in enumerate(chip.layers):
            left, top = x, y + row * (BAR + 1)
            for expert, weight in enumerate(weights):
                width = chip.width * float(weight)
                if width >= 0.05:
                    part = f"M{left:.1f} {top:.1f}h{width:.1f}v{BAR}h-{width:.1f}z"
                    paths[expert] = paths.get(expert, "") + part
                left += width
        self._parts += (f'<path d="{path}" fill="{rgb(expert)}"/>' for expert, path in paths.items())

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

    def svg(self, title: str, description: str) -> str:
        """The whole document."""
        height = self._y - LINE_GAP + 6
        paper = f'<rect class="paper" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:.1f}" rx="12"/>'
        return "\n".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" '
                f'height="{height:.0f}" role="img" aria-labelledby="title description">',
                f'<title id="title">{escape(title)}</title>',
                f'<desc id="description">{escape(description)}</desc>',
                f"<style>{STYLE}</style>",
                paper,
                *self._parts,
                "</svg>",
                "",
            ]
        )


def rgb(expert: int) -> str:
    """An expert's colour as SVG writes it."""
    return "#" + "".join(f"{channel:02x}" for channel in expert_colour(expert))


def shares(names: Sequence[str], weights: Floats) -> str:
    """``everyday 38 %, math 62 %``."""
    return ", ".join(f"{name} {100 * weight:.0f} %" for name, weight in zip(names, weights, strict=True))


def picture(title: str, traces: Sequence[RoutingTrace], names: Sequence[str] = ()) -> str:
    """The SVG document for traces of one model; ``names`` say what the experts are."""
    names = names or [f"expert {expert}" for expert in range(traces[0].n_expert)]
    drawing = Drawing(names)
    drawing.heading(title, traces[0])
    for trace in traces:
        drawing.tokens(trace)
    lines = [f"{''.join(trace.texts)!r}: {shares(names, trace.mean_weights().mean(axis=0))}" for trace in traces]
    return drawing.svg(f"Routing in {title}", visible("Mean weight of each expert. " + "; ".join(lines)))


def main() -> None:
    """Trace, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument("--generate", type=int, default=0, metavar="N", help="go on with so many tokens")
    parser.add_argument("--name", action="append", default=[], help="what an expert is, the first one first")
    parser.add_argument("--title", help="instead of the file's name")
    arguments = parser.parse_args()
    with Engine(arguments.model, ContextOptions()) as engine:
        traces = [trace_routing(engine, prompt, generate=arguments.generate) for prompt in arguments.prompts]
    if arguments.name and len(arguments.name) != traces[0].n_expert:
        parser.error(f"--name: {len(arguments.name)} names for {traces[0].n_expert} experts")
    svg = picture(arguments.title or arguments.model.name, traces, arguments.name)
    arguments.out.write_text(svg, encoding="utf-8")
    print(f"{arguments.out}: {len(svg.encode()) / 1000:.1f} kB")


if __name__ == "__main__":
    main()
