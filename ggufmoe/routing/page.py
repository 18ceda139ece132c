"""One self-contained HTML page of routing traces: no request leaves it, and without scripts it still shows everything.

Colours follow the system's light or dark setting. What colours say is also said below each token, by the expert's
number or, of two experts, by a bar parted between them, and by tables. Of many experts the leading ones are shown, the
others are summed up or folded away. All text that comes from a model or a prompt is escaped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from typing import Any

import numpy as np

from ggufmoe.routing.palette import expert_colour, lead
from ggufmoe.routing.picture import MOST_BARS, STYLE, WIDTH, inline_picture, named_shares
from ggufmoe.routing.report import summary_lines
from ggufmoe.routing.statistics import LabelledShares, Numbers, Summary, favourites, summarize
from ggufmoe.routing.trace import Floats, RoutingTrace, visible
from ggufmoe.sizes import counted

_MOST_SHOWN = 12
"""Experts with a column or a name; of more, those with the largest shares, and the sum of the others."""
_MOST_DENSE = 16
"""With more experts the script's data hold only the weights that are not zero."""
_MOST_DRAWN = 600
"""Tokens in a picture: more would make a page that browsers scroll slowly."""
_PAIR_WIDTH = 600
_MOST_UNBROKEN = 24
"""Characters that stay in one line."""

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def routing_page(
    model: str,
    texts: Sequence[tuple[str, RoutingTrace]],
    *,
    shares: LabelledShares | None = None,
    capacity_factor: float = 1.0,
    facts: Sequence[tuple[str, str]] = (),
) -> str:
    """The page for one or more (title, trace) of one model, below a comparison of labels where there is one.

    ``facts`` (name, text) say more about the model's experts. Two titles that are compared stand side by side.
    """
    one, is_pair = texts[0][1], shares is not None and len(texts) == 2
    width = _PAIR_WIDTH if is_pair else WIDTH
    sections = [_section(i, title, trace, capacity_factor, width) for i, (title, trace) in enumerate(texts)]
    body = [f"<h1>Routing in {escape(visible(model))}</h1>", _intro(one, facts), _legend(one)]
    body += [] if shares is None else [_comparison(shares, one)]
    body += ['<div class="pair">', *sections, "</div>"] if is_pair else sections
    kinds = " ".join(["two"] * (one.n_expert == 2) + ["wide"] * is_pair + ["many"] * (one.n_expert > 10))
    # the number below a token has room for its digits
    digits = f' style="--digits:{len(str(one.n_expert - 1))}"' if one.n_expert > 10 else ""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en">',
            f'<head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Routing in {escape(visible(model))}</title>",
            f"<style>{_resource('page.css')}{STYLE}</style></head>",
            f'<body class="{kinds}"{digits}><main>',
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
    """Shares in thousandths, text by token by layer by expert; of many experts [expert, share, expert, share, ...]."""
    one = traces[0]
    content = {
        "colours": [expert_colour(e) for e in range(one.n_expert)],
        "names": [visible(one.name(e)) for e in range(one.n_expert)],
        "layers": one.layers,
        "sparse": one.n_expert > _MOST_DENSE,
        "texts": [_thousandths(trace) for trace in traces],
    }
    return json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")


def _thousandths(trace: RoutingTrace) -> Any:
    shares = np.round(trace.expert_shares * 1000).astype(int)
    if trace.n_expert <= _MOST_DENSE:
        return shares.tolist()
    return [
        [[int(number) for expert in np.flatnonzero(row) for number in (expert, row[expert])] for row in layers]
        for layers in shares
    ]


def _intro(trace: RoutingTrace, facts: Sequence[tuple[str, str]]) -> str:
    runs = (
        "All of them run on every token, so what differs is how much each one counts."
        if trace.every_expert_runs
        else f"{trace.n_expert_used} of them run on each token."
    )
    if trace.n_expert == 2:
        left, right = (escape(visible(trace.name(expert))) for expert in (0, 1))
        reading = f"The bar below each token is parted as its weight is: {left} on the left, {right} on the right."
    else:
        reading = "The small number below a token is the expert that counted most."
    size = f"{counted(trace.n_expert, 'expert')} in {counted(trace.n_layer, 'layer')}"
    more = "".join(f"{escape(name.capitalize())}: {escape(text)}. " for name, text in facts)
    return f'<p class="note">{size}. {runs} {more}{reading} Generated text is underlined with dots.</p>'


def _legend(trace: RoutingTrace) -> str:
    if trace.n_expert == 2:
        ends = [f"<b>{escape(visible(trace.name(expert)))}</b>" for expert in (0, 1)]
        colours = ";".join(f"--c{expert}:{_rgb(expert)}" for expert in (0, 1))
        scale = f'<p class="ends" aria-hidden="true">{ends[0]}<i style="{colours}"></i>{ends[1]}</p>'
    else:
        scale = ""
    items = "".join(
        f'<li><span class="swatch" style="{_tint(e, 1)}" aria-hidden="true"></span> {_name(trace, e)}</li>'
        for e in trace.leading_experts(_MOST_SHOWN)
    )
    n_more = trace.n_expert - _MOST_SHOWN
    more = f"<li>and {n_more} more with smaller shares</li>" if n_more > 0 else ""
    return f'{scale}<ul class="legend" aria-label="Colours of the experts">{items}{more}</ul>'


def _name(trace: RoutingTrace, expert: int) -> str:
    """The expert's name, and its number where that is not part of it."""
    name = visible(trace.name(expert))
    return escape(name if name.startswith("expert ") or trace.n_expert == 2 else f"{expert} {name}")


def _section(number: int, title: str, trace: RoutingTrace, capacity_factor: float, width: float) -> str:
    summary = summarize(trace, capacity_factor)
    return "\n".join(
        [
            f'<section data-number="{number}" aria-labelledby="title-{number}">',
            f'<h2 id="title-{number}">{escape(visible(title))}</h2>',
            _layer_choice(number, trace),
            _tokens(trace),
            '<div class="detail" hidden>Point at a token, or reach it with Tab and the arrow keys.</div>',
            _drawn(trace, width),
            _heat_map(trace, summary),
            _numbers(trace, summary),
            _liked(trace),
            _all_weights(trace),
            "</section>",
        ]
    )


def _drawn(trace: RoutingTrace, width: float) -> str:
    first = trace.part(0, min(trace.n_token, _MOST_DRAWN))
    n_bar = min(trace.n_layer, MOST_BARS)
    each = "layer" if n_bar == trace.n_layer else "group of neighbouring layers"
    what = f"Each token with a bar for each {each}, parted between the experts; below it the leading share in percent"
    left_out = "" if first.n_token == trace.n_token else f" (the first {first.n_token} of {trace.n_token} tokens)"
    picture = inline_picture(first, "Tokens by layers: the table of all tokens below has the same numbers", width)
    return f'<figure><figcaption>{what}{left_out}</figcaption><div class="scroll">{picture}</div></figure>'


def _layer_choice(number: int, trace: RoutingTrace) -> str:
    options = "".join(f'<option value="{row}">layer {layer}</option>' for row, layer in enumerate(trace.layers))
    return (
        f'<p class="controls" hidden><label for="layer-{number}">Colour by</label> '
        f'<select id="layer-{number}"><option value="mean">mean of all layers</option>{options}</select></p>'
    )


def _tokens(trace: RoutingTrace) -> str:
    weights = trace.mean_weights()
    words = ("".join(_token(trace, i, weights[i]) for i in range(start, stop)) for start, stop in _words(trace.texts))
    return f'<p class="tokens">{"".join(f"<span class=word>{word}</span>" for word in words)}</p>'


def _words(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """First token and end of each run of tokens that stay in one line: words, unless they are very long."""
    start, length = 0, 0
    for i, text in enumerate(texts):
        begins = text[:1].isspace() or texts[i - 1][-1:].isspace() or not text.isascii()
        if i > start and (begins or length + len(text) > _MOST_UNBROKEN):
            yield start, i
            start, length = i, 0
        length += len(text)
    if texts:
        yield start, len(texts)


def _token(trace: RoutingTrace, i: int, weights: Floats) -> str:
    top = int(weights.argmax())
    shown = escape(visible(trace.texts[i]))
    names = [visible(trace.name(expert)) for expert in range(trace.n_expert)]
    kind = "t generated" if i >= trace.n_prompt else "t"
    style = _tint(top, _alpha(float(weights[top]), trace.n_expert))
    style += f";--s:{100 * float(weights[0]):.1f}%;--c0:{_rgb(0)};--c1:{_rgb(1)}" if trace.n_expert == 2 else ""
    return (
        f'<span class="{kind}" data-i="{i}" data-e="{top}" data-text="{shown}" '
        f'title="{escape(_precise(names, weights))}" tabindex="{-1 if i else 0}" style="{style}">'
        f"{shown}</span>" + ("<br>" if trace.texts[i].endswith("\n") else "")
    )


def _precise(names: Sequence[str], weights: Floats) -> str:
    if len(names) > _MOST_SHOWN:
        return named_shares(names, weights)
    return ", ".join(f"{name}: {100 * weight:.1f} %" for name, weight in zip(names, weights, strict=True))


def _heat_map(trace: RoutingTrace, summary: Summary) -> str:
    what = "weight" if trace.every_expert_runs else "choices"
    rows = [*zip(map(str, trace.layers), summary.share, strict=True), ("mean", summary.mean_share)]
    caption = f"Share of {what} by layer and expert"
    table = _share_table(caption, "layer", rows, trace)
    if trace.n_expert <= _MOST_SHOWN:
        return table
    whole = _share_table(caption, "layer", rows, trace, range(trace.n_expert))
    return f"{table}<details><summary>All {trace.n_expert} experts</summary>{whole}</details>"


def _comparison(shares: LabelledShares, trace: RoutingTrace) -> str:
    what = "weight" if shares.by_weight else "choices"
    names = [f"{label} ({counted(n, 'token')})" for label, n in zip(shares.labels, shares.n_tokens, strict=True)]
    layer = shares.most_telling_layer
    there = shares.by_layer[:, shares.layers.index(layer)]
    shown = _furthest_apart(shares)
    return (
        '<section aria-labelledby="comparison"><h2 id="comparison">By label</h2>'
        + _share_table(
            f"Share of {what}, mean of all layers", "label", zip(names, shares.mean, strict=True), trace, shown
        )
        + _share_table(
            f"In layer {layer}, where labels differ most", "label", zip(names, there, strict=True), trace, shown
        )
        + "</section>"
    )


def _furthest_apart(shares: LabelledShares) -> list[int]:
    """The experts whose shares differ most between labels, in the order of their numbers."""
    apart = np.ptp(shares.mean, axis=0)
    return sorted(int(expert) for expert in np.argsort(-apart, kind="stable")[:_MOST_SHOWN])


def _share_table(
    caption: str,
    corner: str,
    rows: Iterable[tuple[str, Numbers]],
    trace: RoutingTrace,
    experts: Sequence[int] | None = None,
) -> str:
    """A table of shares; ``experts`` have columns (default: the leading ones), the others are summed up in one."""
    shown = list(trace.leading_experts(_MOST_SHOWN) if experts is None else experts)
    head = "".join(f'<th scope="col">{_name(trace, e)}</th>' for e in shown)
    head += '<th scope="col">others</th>' if len(shown) < trace.n_expert else ""
    body = "".join(
        f'<tr><th scope="row">{escape(visible(name))}</th>{_cells(values, shown)}</tr>' for name, values in rows
    )
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption>'
        f'<thead><tr><th scope="col">{corner}</th>{head}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def _cells(values: Numbers, shown: Sequence[int]) -> str:
    cells = "".join(
        f'<td style="{_tint(expert, 0.6 * _cell_strength(float(values[expert]), len(values)))}">'
        f"{100 * values[expert]:.1f} %</td>"
        for expert in shown
    )
    others = float(values.sum()) - sum(float(values[expert]) for expert in shown)
    return cells + (f"<td>{100 * abs(others):.1f} %</td>" if len(shown) < len(values) else "")


def _cell_strength(share: float, n_expert: int) -> float:
    """How strong a share is coloured: as large as it is, or of many experts full at eight times the even share."""
    return share if n_expert <= _MOST_SHOWN else min(1.0, share * n_expert / 8)


def _numbers(trace: RoutingTrace, summary: Summary) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in summary_lines(trace, summary))
    return f"<dl>{items}</dl>"


def _liked(trace: RoutingTrace) -> str:
    caption = "Tokens that each expert gets more than its average: its share, and the points above the average"
    rows = "".join(
        f'<tr><th scope="row">{_name(trace, e)}</th><td class="text">{_liked_by(trace, e)}</td></tr>'
        for e in trace.leading_experts(_MOST_SHOWN)
    )
    return f'<div class="scroll"><table class="words"><caption>{caption}</caption><tbody>{rows}</tbody></table></div>'


def _liked_by(trace: RoutingTrace, expert: int) -> str:
    found = (
        f"“{escape(visible(one.text))}” {100 * one.weight:.0f} % (+{100 * one.more:.0f})"
        for one in favourites(trace, expert)
    )
    return ", ".join(found) or "none"


def _all_weights(trace: RoutingTrace) -> str:
    weights, shown = trace.mean_weights(), trace.leading_experts(_MOST_SHOWN)
    head = "".join(f'<th scope="col">{_name(trace, e)}</th>' for e in shown)
    head += '<th scope="col">others</th>' if len(shown) < trace.n_expert else ""
    body = "".join(
        f'<tr><td>{i + 1}</td><th scope="row" class="text">{escape(visible(text))}</th>'
        + "".join(f"<td>{100 * weights[i, e]:.1f} %</td>" for e in shown)
        + (f"<td>{100 * abs(1 - weights[i, list(shown)].sum()):.1f} %</td>" if len(shown) < trace.n_expert else "")
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
    return f"--c:{_rgb(expert)};--a:{alpha:.3f}"


def _rgb(expert: int) -> str:
    return " ".join(map(str, expert_colour(expert)))
