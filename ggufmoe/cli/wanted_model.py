"""The file that a MODEL of the command line stands for, made or downloaded first where it is not there yet.

Says beforehand what that costs, asks where it is much, and shows the progress. All of it goes to stderr.
"""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ggufmoe.cli.console import note, printable
from ggufmoe.cli.conversion import network_times
from ggufmoe.cli.jobs import run_job
from ggufmoe.cli.progress import ProgressLine, duration, progress_display
from ggufmoe.files import possible_path
from ggufmoe.options import ModelOptions, PromptOptions
from ggufmoe.sizes import file_size

if TYPE_CHECKING:
    from ggufmoe.store.model_store import ModelStore
    from ggufmoe.store.wanted import ModelPlan

AUTO_QUANT = "auto"
LARGE_BYTES = 4_000_000_000
"""A terminal is asked before so much is written or comes over the network."""
_TIMED_BYTES = 100_000_000
"""Above it the time is told that so much takes over the network."""


def model_file(model: str, wanted: ModelOptions, *, quiet: bool = False, asking: PromptOptions | None = None) -> Path:
    """The GGUF file to load for a MODEL. Raises the errors of ``ggufmoe.obtain``, and typer.Abort after a "no".

    With ``asking``, the options of a conversation, TemplateError is raised before a model is made that cannot hold one.
    """
    path = possible_path(model)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return path  # nothing of the store is imported for it
    from ggufmoe.store.model_store import ModelStore
    from ggufmoe.store.wanted import locate, plan_model, request_of

    store = ModelStore()
    found = locate(model, wanted.quant, store)
    if found is not None:
        return found
    quant = wanted.quant
    if quant is not None and quant.lower() == AUTO_QUANT:
        quant = automatic_type(model, quiet=quiet)
    with ProgressLine(printable(model, 60), phase="plan", waiting="reading headers", quiet=quiet):
        plan = replace(plan_model(model, quant, store), request=request_of(model, wanted.quant) or "")
        if asking is not None:
            _check_template(model, plan, asking)
    if not quiet:
        note(_costs(model, plan, store))
    is_large = max(plan.written_bytes, plan.network_bytes) >= LARGE_BYTES
    if is_large and not wanted.yes and sys.stdin.isatty() and sys.stderr.isatty():
        typer.confirm("Go on?", default=True, abort=True, err=True)
    return _made(plan, store, quiet=quiet)


def _check_template(model: str, plan: ModelPlan, asking: PromptOptions) -> None:
    from ggufmoe.store.wanted import header_of
    from ggufmoe.templates.jinja_template import find_template, template_missing

    header = header_of(plan).shards[0].header
    if find_template(asking.chat_template, header) is None:
        raise template_missing(header, printable(model))


def automatic_type(model: str, *, quiet: bool = False) -> str:
    """The file type of a model that suits this machine. Raises InputError if none fits."""
    from ggufmoe.store.model_advice import choose_type

    with ProgressLine(printable(model, 60), phase="plan", waiting="looking at file types", quiet=quiet):
        return choose_type(model)


def found_file(model: str) -> Path | None:
    """The GGUF file of a MODEL that is there already; None for one that would have to be made or downloaded."""
    path = possible_path(model)
    if path.suffix.lower() == ".gguf" and path.is_file():
        return path
    from ggufmoe.store.model_store import ModelStore
    from ggufmoe.store.wanted import locate

    return locate(model, None, ModelStore(), by_request=False)


def _made(plan: ModelPlan, store: ModelStore, *, quiet: bool) -> Path:
    from ggufmoe.store.obtain import make_model

    if plan.hub_model is None:
        display = progress_display(f"convert {plan.quant}", quiet=quiet)
    else:
        display = progress_display(f"download {plan.name}", phase="download", quiet=quiet)
    began = time.monotonic()
    path = run_job(lambda show, cancel: make_model(plan, store, on_progress=show, cancel=cancel), display)
    if not quiet:
        note(f"stored as {path.stem}, {duration(time.monotonic() - began)}; `ggufmoe list` shows what is stored")
    return path


def _costs(model: str, plan: ModelPlan, store: ModelStore) -> str:
    """What is going to be read and written, in one line."""
    doing = f"downloads {printable(plan.source)}"
    if plan.hub_model is None:
        doing = f"converts {printable(model)} to {plan.file_type}"
    parts = []
    if plan.network_bytes:
        times = f" ({network_times(plan.network_bytes)})" if plan.network_bytes >= _TIMED_BYTES else ""
        parts.append(f"{file_size(plan.network_bytes)} over the network{times}")
    elif plan.read_bytes:
        parts.append(f"reads {file_size(plan.read_bytes)}")
    parts.append(f"writes {file_size(plan.written_bytes)} to {store.directory} ({_free(store.directory)} free)")
    return f"{doing}: {', '.join(parts)}"


def _free(directory: Path) -> str:
    """What the disk of a folder has free; of the first folder above it that exists."""
    there = next(path for path in (directory, *directory.parents) if path.is_dir())
    return file_size(shutil.disk_usage(there).free)
