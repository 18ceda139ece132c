"""A picture of a routing trace through matplotlib: layers by experts, and experts by tokens."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from ggufmoe.errors import OptionError
from ggufmoe.files import replacing
from ggufmoe.routing.statistics import share
from ggufmoe.routing.trace import RoutingTrace, visible

_MOST_LABELS = 120


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
    height = min(20.0, max(4.0, 2 + 0.22 * max(trace.n_layer, trace.n_expert)))
    return Figure(figsize=(width, height), layout="constrained")


def _draw_shares(axes: Any, trace: RoutingTrace, title: str) -> None:
    shares = share(trace)
    image = axes.imshow(
        shares, vmin=0, vmax=max(2 / trace.n_expert, float(shares.max())), aspect="auto", cmap="cividis"
    )
    axes.set(title=title, xlabel="expert", ylabel="layer")
    axes.set_xticks(range(trace.n_expert))
    axes.set_yticks(range(trace.n_layer), labels=[str(layer) for layer in trace.layers])
    axes.figure.colorbar(image, ax=axes)


def _draw_tokens(axes: Any, trace: RoutingTrace, layer: int | None, title: str) -> None:
    image = axes.imshow(trace.mean_weights(layer).T, vmin=0, vmax=1, aspect="auto", cmap="cividis")
    axes.set(title=title, ylabel="expert")
    axes.set_yticks(range(trace.n_expert))
    if trace.n_token <= _MOST_LABELS:
        axes.set_xticks(range(trace.n_token), labels=[visible(text) for text in trace.texts], rotation=90, fontsize=8)
        for label in axes.get_xticklabels():
            label.set_parse_math(False)
    if trace.n_prompt < trace.n_token:
        axes.axvline(trace.n_prompt - 0.5, color="white", linestyle=":")
    axes.figure.colorbar(image, ax=axes)
