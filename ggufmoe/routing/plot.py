"""A picture of a routing trace through matplotlib: layers by experts, and experts by tokens.

Each expert has its colour of the palette, the stronger the larger its share; of many the leading ones are drawn.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.errors import OptionError
from ggufmoe.files import replacing
from ggufmoe.routing.palette import expert_colour
from ggufmoe.routing.statistics import share
from ggufmoe.routing.trace import RoutingTrace, visible

_MOST_LABELS = 120
_MOST_EXPERTS = 32
_MOST_NUMBERS = 72
"""Cells of a table that have their number written in them."""


def write_picture(path: str | os.PathLike[str], title: str, trace: RoutingTrace, layer: int | None = None) -> None:
    """Write a PNG of the trace; tokens show the weights of ``layer``, or of the mean of all.

    Raises OptionError without matplotlib, OutputError where the file cannot be written.
    """
    figure = _figure(trace)
    heat, tokens = figure.subplots(1, 2, width_ratios=(1, 3))
    what = "weight" if trace.every_expert_runs else "choices"
    _draw_shares(heat, trace, f"Share of {what}")
    where = "mean of all layers" if layer is None else f"layer {layer}"
    _draw_tokens(tokens, trace, layer, f"Weight for each token, {where}")
    figure.suptitle(visible(title), parse_math=False)
    with warnings.catch_warnings(), replacing(Path(path), "the picture") as file:
        # a token in a script that the font lacks is drawn as a box
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        figure.savefig(file, format="png", dpi=144)


def _figure(trace: RoutingTrace) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OptionError("pictures need matplotlib: pip install 'ggufmoe[plot]'") from error
    width = min(40.0, max(9.0, 5 + 0.17 * trace.n_token))
    height = min(20.0, max(4.0, 2 + 0.22 * max(trace.n_layer, min(trace.n_expert, _MOST_EXPERTS))))
    return Figure(figsize=(width, height), layout="constrained")


def _draw_shares(axes: Any, trace: RoutingTrace, title: str) -> None:
    shown = trace.leading_experts(_MOST_EXPERTS)
    shares = share(trace)[:, list(shown)]
    axes.imshow(_tinted(shares, shown, max(2 / trace.n_expert, float(shares.max()))), aspect="auto")
    axes.set(title=title, ylabel="layer")
    names = [visible(trace.name(expert)).removeprefix("expert ") for expert in shown]
    axes.set_xticks(range(len(shown)), labels=names, rotation=90, fontsize=10 if len(shown) <= 12 else 6)
    axes.set_yticks(range(trace.n_layer), labels=[str(layer) for layer in trace.layers])
    if shares.size <= _MOST_NUMBERS:
        for row, column in np.ndindex(shares.shape):
            axes.text(column, row, f"{100 * shares[row, column]:.0f} %", ha="center", va="center", fontsize=8)
    _as_text(axes.get_xticklabels())


def _draw_tokens(axes: Any, trace: RoutingTrace, layer: int | None, title: str) -> None:
    shown = trace.leading_experts(_MOST_EXPERTS)
    weights = trace.mean_weights(layer)[:, list(shown)]
    most = 1.0 if trace.n_expert == 2 else max(2 / trace.n_expert, float(weights.max(initial=0)))
    axes.imshow(_tinted(weights, shown, most).swapaxes(0, 1), aspect="auto")
    axes.set(title=title)
    axes.set_yticks(range(len(shown)), labels=[visible(trace.name(expert)) for expert in shown])
    _as_text(axes.get_yticklabels())
    if trace.n_token <= _MOST_LABELS:
        axes.set_xticks(range(trace.n_token), labels=[visible(text) for text in trace.texts], rotation=90, fontsize=8)
        _as_text(axes.get_xticklabels())
    if trace.n_prompt < trace.n_token:
        axes.axvline(trace.n_prompt - 0.5, color="black", linestyle=":")


def _tinted(values: NDArray[np.floating], experts: Sequence[int], most: float) -> NDArray[np.float64]:
    """The experts' colours on white, at their strongest where a value is ``most``: (rows, experts, 3), from 0 to 1."""
    colours = np.array([expert_colour(expert) for expert in experts]) / 255
    strength = np.clip(values.astype(np.float64) / most, 0, 1)[..., None]
    tinted: NDArray[np.float64] = 1 + (colours - 1) * strength
    return tinted


def _as_text(labels: Iterable[Any]) -> None:
    """Have ``$`` drawn as it is; matplotlib would read formulas."""
    for label in labels:
        label.set_parse_math(False)
