"""``ggufmoe rm``: deletes stored models."""

from __future__ import annotations

from typing import Annotated

import typer

from ggufmoe.cli.console import note
from ggufmoe.cli.params import stored_names
from ggufmoe.sizes import file_size
from ggufmoe.store.model_store import ModelStore


def rm_command(
    names: Annotated[
        list[str],
        typer.Argument(help="Names of stored models.", metavar="NAME...", autocompletion=stored_names),
    ],
) -> None:
    """Delete stored models, finished or not, with their records."""
    store = ModelStore()
    unfinished = {model.name: model for model in store.unfinished()}
    models = [unfinished[name] if name in unfinished and not store.find(name) else store.named(name) for name in names]
    for model in models:
        note(f"deleted {model.name}, {file_size(store.remove(model))}")
