"""``ggufmoe prune``: deletes what the store no longer needs."""

from __future__ import annotations

from typing import Annotated

import typer

from ggufmoe.cli.console import note
from ggufmoe.cli.params import DryRun
from ggufmoe.errors import OutputError
from ggufmoe.sizes import counted, file_size
from ggufmoe.store.model_store import ModelStore


def _days(typed: str) -> float:
    try:
        days = float(typed)
    except ValueError:
        days = -1.0
    if not 0 <= days < float("inf"):
        raise typer.BadParameter(f"expected a number of days, not {typed!r}")
    return days


def prune_command(
    unused: Annotated[
        float | None,
        typer.Option(
            "--unused", help="Also delete models that were not used for so many days.", metavar="DAYS", parser=_days
        ),
    ] = None,
    dry_run: DryRun = False,
) -> None:
    """Delete what interrupted conversions and downloads have left in the store, and models that are not used.

    What another process makes at the moment is left alone.
    """
    store = ModelStore()
    freed, n_deleted = 0, 0
    for model in (*store.unfinished(), *(store.unused(unused) if unused is not None else ())):
        if dry_run:
            note(f"would delete {model.name}, {file_size(model.n_bytes)}")
            continue
        try:
            freed += store.remove(model)
        except OutputError as error:
            note(f"kept: {error}")
            continue
        n_deleted += 1
        note(f"deleted {model.name}, {file_size(model.n_bytes)}")
    if not dry_run:
        note(f"{counted(n_deleted, 'model')} deleted, {file_size(freed)} free again")
