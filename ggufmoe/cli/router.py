"""The router's report on a terminal: how far apart the experts' rows are, and where each prompt of the recipe goes."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from ggufmoe.merge.router import PromptPreference, RouterReport

_SHOWN_LAYERS = 8


def print_router(report: RouterReport, stream: TextIO | None = None) -> None:
    """Two small tables on ``stream`` (stderr by default)."""
    from rich.console import Console

    console = Console(file=sys.stderr if stream is None else stream, highlight=False)
    console.print(_layers(report))
    if report.preferences:
        console.print(_prompts(report.preferences))
    if report.degenerate_layers:
        where = f"{len(report.degenerate_layers)} of {len(report.condition_numbers)} layers"
        console.print(f"In {where} the experts' rows are nearly alike; prompts that differ more would help.")


def _layers(report: RouterReport) -> object:
    from rich.table import Table

    table = Table(title=f"Router rows ({report.gate_mode})", title_justify="left")
    table.add_column("layer", justify="right")
    table.add_column("most alike", justify="right")
    table.add_column("condition", justify="right")
    n_layer = len(report.condition_numbers)
    step = max(1, -(-n_layer // _SHOWN_LAYERS))
    for layer in sorted({*range(0, n_layer, step), n_layer - 1}):
        cosines = report.cosines[layer]
        closest = max(
            (cosines[i][j] for i in range(len(cosines)) for j in range(i)), default=0.0
        )  # one expert has no other to be like
        mark = " !" if layer in report.degenerate_layers else ""
        table.add_row(str(layer), f"{closest:+.3f}", f"{report.condition_numbers[layer]:.2f}{mark}")
    return table


def _prompts(preferences: tuple[PromptPreference, ...]) -> object:
    from rich.table import Table

    table = Table(title="Where the base model's states of each prompt would go", title_justify="left")
    table.add_column("for", no_wrap=True)
    table.add_column("prompt", overflow="ellipsis", no_wrap=True)
    for expert in range(len(preferences[0].mean_weights)):
        table.add_column(f"to {expert}", justify="right", no_wrap=True, min_width=4)
    for preference in preferences:
        sign = "+" if preference.positive else "−"
        shares = [f"{weight:.0%}" for weight in preference.mean_weights]
        table.add_row(f"{sign}{preference.expert}", preference.prompt, *shares)
    return table
