"""``ggufmoe show``: where a stored model came from."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from ggufmoe.cli.console import printable
from ggufmoe.cli.params import StoredName
from ggufmoe.sizes import file_size
from ggufmoe.store.model_store import ModelStore, StoredModel


def show_command(
    name: StoredName,
    as_json: Annotated[bool, typer.Option("--json", help="Print the model's record as one JSON object.")] = False,
) -> None:
    """Show the record of a stored model: its files, where it came from, and when it was made.

    What is in the file itself is shown by `ggufmoe inspect`.
    """
    model = ModelStore().named(name)
    if as_json:
        record = {} if model.record is None else model.record.to_dict()
        print(json.dumps({"name": model.name, "paths": [str(path) for path in model.paths], **record}))
        return
    for label, value in _facts(model):
        print(f"{label:10}  {printable(value, 2000)}")


def _facts(model: StoredModel) -> list[tuple[str, str]]:
    facts = [("file", str(path)) for path in model.paths] + [("size", file_size(model.n_bytes))]
    record = model.record
    if record is None:
        return [*facts, ("source", "unknown: the file was put there by hand, or changed")]
    facts += [("type", record.file_type)] if record.file_type else []
    facts += [("source", record.source)]
    facts += [("commit", f"{name} {commit}") for name, commit in record.commits.items()]
    facts += [("asked for", request) for request in record.requests]
    facts += [("sha256", file.sha256) for file in record.files]
    return [*facts, ("made", f"{record.made} by ggufmoe {record.ggufmoe}")]
