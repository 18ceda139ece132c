"""``ggufmoe list``: the stored models."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer

from ggufmoe.cli.console import make_console, note
from ggufmoe.cli.progress import duration
from ggufmoe.sizes import counted, file_size
from ggufmoe.store.model_store import ModelStore, StoredModel, UnfinishedModel

_NARROW_COLUMNS = 64
_SIZE_AND_USE = 30
"""Columns of size and use, with what separates them: a source folds into what is left beside the names."""
_LEAST_SOURCE = 12
_DAY_S = 86400


def list_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show the models that were converted or downloaded into the store.

    The store is the folder `models` in $GGUFMOE_HOME or in the user's data folder. Its files may be moved and deleted
    by hand, and GGUF files that are put there are listed too.
    """
    store = ModelStore()
    models, unfinished = store.models(), store.unfinished()
    if as_json:
        found = {"models": list(map(_as_dict, models)), "unfinished": list(map(_as_dict, unfinished))}
        print(json.dumps({"directory": str(store.directory), **found}, ensure_ascii=False))
        return
    if not models and not unfinished:
        note(f"no models in {store.directory} yet; `ggufmoe chat org/name` gets one")
        return
    _show(models, unfinished)
    n_bytes = sum(model.n_bytes for model in models) + sum(left.n_bytes for left in unfinished)
    begun = f" and {len(unfinished)} unfinished" if unfinished else ""
    note(f"{counted(len(models), 'model')}{begun}, {file_size(n_bytes)} in {store.directory}")


def _as_dict(model: StoredModel | UnfinishedModel) -> dict[str, object]:
    record = model.record
    return {
        "name": model.name,
        "files": [str(path) for path in model.paths],
        "bytes": model.n_bytes,
        "source": record and record.source,
        "file_type": record and record.file_type,
    }


def _show(models: list[StoredModel], unfinished: list[UnfinishedModel]) -> None:
    from rich import box
    from rich.table import Table

    console = make_console()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1))
    is_narrow = console.width < _NARROW_COLUMNS
    longest = max(len(name) for name in [*(one.name for one in models), *(left.name for left in unfinished)])
    table.add_column("name", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    if not is_narrow:
        table.add_column("used", overflow="fold")
        table.add_column(
            "source", overflow="fold", max_width=max(_LEAST_SOURCE, console.width - longest - _SIZE_AND_USE)
        )
    for model in models:
        source = model.record.source if model.record else "put there by hand"
        table.add_row(model.name, file_size(model.n_bytes), *(() if is_narrow else (_ago(model.used_s), source)))
    for left in unfinished:
        source = f"unfinished: {left.record.source}" if left.record else "unfinished"
        table.add_row(left.name, file_size(left.n_bytes), *(() if is_narrow else ("", source)))
    console.print(table)


def _ago(then_s: float) -> str:
    """How long ago that was, in words."""
    seconds = max(0.0, time.time() - then_s)
    return f"{duration(seconds)} ago" if seconds < _DAY_S else f"{counted(int(seconds / _DAY_S), 'day')} ago"
