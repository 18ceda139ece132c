"""The report of a router as text: how far apart the experts' rows are, where prompts go, what fitting gained."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TextIO

from ggufmoe.cli.console import make_console, printable

if TYPE_CHECKING:
    from ggufmoe.checkpoint.source import PromptPreference, RouterReport, TextScore

_SHOWN_LAYERS = 8
_SHOWN_PROMPTS = 100
_SHOWN_EXPERTS = 64
"""Above these numbers of rows and columns a table is no longer read, and takes long to lay out."""
_LEAST_PROMPT = 24
"""Columns below which a prompt says too little: then only its favourite expert is shown beside it."""
_FRAME = 3
"""Columns of the frame and the spaces around each cell."""


def print_router(report: RouterReport, stream: TextIO | None = None) -> None:
    """Print the report as tables on ``stream`` (default: stderr)."""
    console = make_console(sys.stderr if stream is None else stream)
    console.print(f"Router rows ({report.gate_mode})")
    console.print(_layers(report))
    if report.preferences:
        console.print("Where the base model would send each prompt")
        console.print(_prompts(report.preferences[:_SHOWN_PROMPTS], console.width))
        if (n_more := len(report.preferences) - _SHOWN_PROMPTS) > 0:
            console.print(f"and {n_more} more; --router-report FILE writes all")
    if report.scores:
        console.print("Loss on held-out texts")
        console.print(_scores(report.scores))
    if report.degenerate_layers:
        what = "texts" if report.scores else "prompts"
        where = f"{len(report.degenerate_layers)} of {len(report.condition_numbers)} layers"
        console.print(f"In {where} the experts' rows are nearly alike; {what} that differ more would help.")


def _layers(report: RouterReport) -> object:
    from rich.table import Table

    table = Table()
    for title in ("layer", "most alike", "condition"):
        table.add_column(title, justify="right", no_wrap=True)
    n_layer = len(report.condition_numbers)
    step = max(1, -(-n_layer // _SHOWN_LAYERS))
    for layer in sorted({*range(0, n_layer, step), n_layer - 1}):
        cosines = report.cosines[layer]
        closest = max(
            (cosines[i][j] for i in range(len(cosines)) for j in range(i)), default=0.0
        )  # one expert has no other to be like
        mark = " !" if layer in report.degenerate_layers else ""
        table.add_row(str(layer), f"{closest:+.3f}", _condition(report.condition_numbers[layer]) + mark)
    return table


def _condition(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.0e}".replace("+", "")


def _prompts(preferences: tuple[PromptPreference, ...], width: int) -> object:
    """The table of prompts: every expert's share where there is room for it, else the largest one."""
    from rich.table import Table
    from rich.text import Text

    titles = [f"to {expert}" for expert in range(len(preferences[0].mean_weights))]
    rows = [[f"{weight:.0%}" for weight in preference.mean_weights] for preference in preferences]
    if len(titles) > _SHOWN_EXPERTS or _room(width, titles, rows) < _LEAST_PROMPT:
        titles, rows = ["goes to"], [[_favourite(preference)] for preference in preferences]
    table = Table()
    table.add_column("for", no_wrap=True)
    table.add_column("prompt", overflow="ellipsis", no_wrap=True, max_width=max(_room(width, titles, rows), 1))
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for preference, cells in zip(preferences, rows, strict=True):
        sign = "+" if preference.positive else "−"
        # Text, because what is in brackets belongs to the prompt
        table.add_row(f"{sign}{preference.expert}", Text(printable(preference.prompt, len(preference.prompt))), *cells)
    return table


def _scores(scores: tuple[TextScore, ...]) -> object:
    """A row for each file: the loss by what computes it, and how much of the fitted weight its own expert gets."""
    from rich.table import Table
    from rich.text import Text

    table = Table()
    table.add_column("for", no_wrap=True)
    table.add_column("texts", overflow="ellipsis", no_wrap=True)
    compared = [name for name in ("base", "before", "uniform", "hidden", "fitted") if name in scores[0].losses]
    for title in ("its expert", *compared, "own weight", "own first"):
        table.add_column(title, justify="right", min_width=max(map(len, title.split())))
    for score in scores:
        losses = [score.losses[name] for name in (f"expert {score.expert}", *compared)]
        mark = " !" if score.is_worse_than_uniform else ""
        cells = [*(f"{loss:.3f}" for loss in losses), f"{score.own_weight:.0%}", f"{score.own_first:.0%}"]
        cells[len(compared)] += mark
        table.add_row(str(score.expert), Text(printable(score.file, len(score.file))), *cells)
    return table


def _room(width: int, titles: list[str], rows: list[list[str]]) -> int:
    """Number of columns that are left for the prompt."""
    shares = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    return width - len("for") - sum(shares) - _FRAME * (len(shares) + 2) - 1


def _favourite(preference: PromptPreference) -> str:
    weights = preference.mean_weights
    best = max(range(len(weights)), key=weights.__getitem__)
    return f"{best} ({weights[best]:.0%})"
