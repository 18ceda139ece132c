"""One self-contained HTML page of routing traces: no request leaves it, and without scripts it still shows everything.

Colours follow the system's light or dark setting. What colours say is also said by the expert's number after each
token and by tables. All text that comes from a model or a prompt is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files

import numpy as np

from ggufmoe.routing.palette import expert_colour, lead
from ggufmoe.routing.report import summary_lines
from ggufmoe.routing.statistics import LabelledShares, Numbers, Summary, favourites, summarize
from ggufmoe.routing.trace import Floats, RoutingTrace, visible
from ggufmoe.sizes import counted

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def routing_page(
    model: str,
    texts: Sequence[tuple[str, RoutingTrace]],
    *,
    shares: LabelledShares | None = None,
    capacity_factor: float = 1.0,
) -> str:
    """The page for one or more (title, trace) of one model, below a comparison of labels where there is one."""
    one = texts[0][1]
    body = [f"<h1>Routing in {escape(visible(model))}</h1>", _intro(one), _legend(one.n_expert)]
    body += [] if shares is None else [_comparison(shares)]
    body += [_section(i, title, trace, capacity_factor) for i, (title, trace) in enumerate(texts)]
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            f'<head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Routing in {escape(visible(model))}</title>",
            f"<style>{_resource('page.css')}</style></head>",
            "<body><main>",
            *body,
            "</main>",
            f'<script type="application/json" id="routing-data">{_data([trace for _, trace in texts])}</script>',
            f"<script>{_resource('page.js')}</script>",
            "</body></html>",
            "",
        ]
    )


def _resource(name: str) -> str:
    return (files("ggufmoe.routing") / name).read_text(encoding="utf-8")


def _data(traces: Sequence[RoutingTrace]) -> str:
    """Weights in thousandths, text by token by layer by expert."""
    content = {
        "colours": [expert_colour(e) for e in range(traces[0].n_expert)],
        "layers": traces[0].layers,
        "texts": [np.round(trace.expert_weights * 1000).astype(int).tolist() for trace in traces],
    }
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _intro(trace: RoutingTrace) -> str:
    runs = (
        "All of them run on every token, so what differs is how much each one counts."
        if trace.every_expert_runs
        else f"{trace.n_expert_used} of them run on each token."
    )
    reading = "The small number is the expert that counted most for a token; generated text is underlined with dots."
    size = f"{counted(trace.n_expert, 'expert')} in {counted(trace.n_layer, 'layer')}"
    return f'<p class="note">{size}. {runs} {reading}</p>'


def _legend(n_expert: int) -> str:
    items = "".join(
        f'<li><span class="swatch" style="{_tint(e, 1)}" aria-hidden="true"></span> expert {e}</li>'
        for e in range(n_expert)
    )
    return f'<ul class="legend" aria-label="Colours of the experts">{items}</ul>'


def _section(number: int, title: str, trace: RoutingTrace, capacity_factor: float) -> str:
    summary = summarize(trace, capacity_factor)
    return "\n".join(
        [
            f'<section data-number="{number}" aria-labelledby="title-{number}">',
            f'<h2 id="title-{number}">{escape(visible(title))}</h2>',
            _layer_choice(number, trace),
            _tokens(trace),
            '<div class="detail" hidden>Point at a token, or reach it with Tab and the arrow keys.</div>',
            _heat_map(trace, summary),
            _numbers(trace, summary),
            _liked(trace),
            _all_weights(trace),
            "</section>",
        ]
    )


def _layer_choice(number: int, trace: RoutingTrace) -> str:
    options = "".join(f'<option value="{row}">layer {layer}</option>' for row, layer in enumerate(trace.layers))
    return (
        f'<p class="controls" hidden><label for="layer-{number}">Colour by</label> '
        f'<select id="layer-{number}"><option value="mean">mean of all layers</option>{options}</select></p>'
    )


def _tokens(trace: RoutingTrace) -> str:
    weights = trace.mean_weights()
    spans = (_token(trace, i, weights[i]) for i in range(trace.n_token))
    return f'<p class="tokens">{"".join(spans)}</p>'


def _token(trace: RoutingTrace, i: int, weights: Floats) -> str:
    top = int(weights.argmax())
    shown = escape(visible(trace.texts[i]))
    numbers = ", ".join(f"expert {e}: {100 * w:.1f} %" for e, w in enumerate(weights))
    kind = "t generated" if i >= trace.n_prompt else "t"
    return (
        f'<span class="{kind}" data-e="{top}" data-text="{shown}" title="{numbers}" tabindex="{-1 if i else 0}" '
        f'style="{_tint(top, _alpha(float(weights[top]), trace.n_expert))}">{shown}</span>'
        + ("<br>" if trace.texts[i].endswith("\n") else "")
    )


def _heat_map(trace: RoutingTrace, summary: Summary) -> str:
    what = "weight" if trace.every_expert_runs else "choices"
    rows = [*zip(map(str, trace.layers), summary.share, strict=True), ("mean", summary.mean_share)]
    return _share_table(f"Share of {what} by layer and expert", "layer", rows)


def _comparison(shares: LabelledShares) -> str:
    what = "weight" if shares.by_weight else "choices"
    names = [f"{label} ({counted(n, 'token')})" for label, n in zip(shares.labels, shares.n_tokens, strict=True)]
    layer = shares.most_telling_layer
    there = shares.by_layer[:, shares.layers.index(layer)]
    return (
        '<section aria-labelledby="comparison"><h2 id="comparison">By label</h2>'
        + _share_table(f"Share of {what}, mean of all layers", "label", zip(names, shares.mean, strict=True))
        + _share_table(f"In layer {layer}, where labels differ most", "label", zip(names, there, strict=True))
        + "</section>"
    )


def _share_table(caption: str, corner: str, rows: Iterable[tuple[str, Numbers]]) -> str:
    listed = list(rows)
    n_expert = len(listed[0][1])
    head = "".join(f'<th scope="col">expert {e}</th>' for e in range(n_expert))
    body = "".join(
        f'<tr><th scope="row">{escape(visible(name))}</th>'
        + "".join(_cell(expert, float(value)) for expert, value in enumerate(values))
        + "</tr>"
        for name, values in listed
    )
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>'
        f'<thead><tr><th scope="col">{corner}</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cell(expert: int, value: float) -> str:
    return f'<td style="{_tint(expert, 0.6 * value)}">{100 * value:.1f} %</td>'


def _numbers(trace: RoutingTrace, summary: Summary) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in summary_lines(trace, summary))
    return f"<dl>{items}</dl>"


def _liked(trace: RoutingTrace) -> str:
    rows = "".join(
        f'<tr><th scope="row">expert {e}</th><td class="text">{_liked_by(trace, e)}</td></tr>'
        for e in range(trace.n_expert)
    )
    return (
        '<div class="scroll"><table><caption>Tokens that each expert likes most</caption>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _liked_by(trace: RoutingTrace, expert: int) -> str:
    found = (f"“{escape(visible(one.text))}” {100 * one.weight:.0f} %" for one in favourites(trace, expert))
    return ", ".join(found) or "none"


def _all_weights(trace: RoutingTrace) -> str:
    weights = trace.mean_weights()
    head = "".join(f'<th scope="col">expert {e}</th>' for e in range(trace.n_expert))
    body = "".join(
        f'<tr><td>{i + 1}</td><th scope="row" class="text">{escape(visible(text))}</th>'
        + "".join(f"<td>{100 * w:.1f} %</td>" for w in weights[i])
        + "</tr>"
        for i, text in enumerate(trace.texts)
    )
    return (
        "<details><summary>All tokens as a table</summary>"
        '<div class="scroll"><table><caption>Weight of each expert, mean of all layers</caption>'
        f'<thead><tr><th scope="col">position</th><th scope="col">token</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></details>"
    )


def _alpha(weight: float, n_expert: int) -> float:
    return 0.12 + 0.43 * math.sqrt(lead(weight, n_expert))


def _tint(expert: int, alpha: float) -> str:
    """The expert's colour and how much of it, which the style sheet weakens on dark paper."""
    red, green, blue = expert_colour(expert)
    return f"--c:{red} {green} {blue};--a:{alpha:.3f}"
