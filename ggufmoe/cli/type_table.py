"""The table of file types that ``plan`` prints for a model that is no file yet."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ggufmoe.cli.console import make_console, note, printable
from ggufmoe.cli.progress import ProgressLine
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.placement.footprint import DEFAULT_MAX_CTX
from ggufmoe.placement.offload_plan import HostMemory, Place
from ggufmoe.sizes import file_size, memory_size

if TYPE_CHECKING:
    from ggufmoe.store.type_advice import TypeAdvice

_NARROW_COLUMNS = 64


def show_type_advice(
    model: str,
    devices: Sequence[Place],
    host: HostMemory,
    context: ContextOptions,
    offload: OffloadOptions,
    *,
    as_json: bool,
) -> None:
    """Print which file types of a model fit: a table, or one JSON object."""
    from ggufmoe.placement.memory_speed import MeasuredSpeeds
    from ggufmoe.store.model_advice import model_advice
    from ggufmoe.store.type_advice import Machine

    with ProgressLine(printable(model, 60), phase="plan", waiting="reading headers, measuring"):
        speeds = MeasuredSpeeds()
        machine = Machine(tuple(devices), host, speeds)
        found = model_advice(model, machine, context, offload)
    advice = found.types
    if as_json:
        about = {"model": model, "usable_bytes": machine.usable_bytes, "read_file": found.read_file}
        print(json.dumps({**about, "types": [one.to_dict() for one in advice]}))
        return
    from rich import box
    from rich.table import Table

    console = make_console()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("  type", no_wrap=True)
    is_narrow = console.width < _NARROW_COLUMNS
    headings = ("file", "bits") + (() if is_narrow else ("GPU", "memory")) + ("context", "tokens/s")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for one in advice:
        speed = _speeds(one) if one.fits else "-"
        places = (
            () if is_narrow else (memory_size(one.gpu_bytes) if one.gpu_bytes else "-", memory_size(one.memory_bytes))
        )
        table.add_row(
            f"{'>' if one.is_taken else ' '} {one.file_type}",
            file_size(one.n_bytes),
            f"{one.bits_per_weight:.2f}",
            *places,
            f"{one.n_ctx}" if one.fits else "too large",
            speed,
        )
    console.print(table)
    console.print()
    taken = next((one.file_type for one in advice if one.is_taken), None)
    gpu = " and as much on the GPUs as fits" if devices else ""
    by_default = {None: f"of at most {DEFAULT_MAX_CTX} tokens", 0: "as the model was trained with"}
    full = by_default.get(context.n_ctx, f"of {context.n_ctx} tokens")
    console.print(
        f"for {memory_size(machine.usable_bytes)} of this machine's memory{gpu}; tokens/s: from an empty to a full "
        f"context {full}, by what this machine was measured to compute"
    )
    if speeds.is_disturbed:
        note("other programs kept this machine busy while it was measured: a calm one is faster, and is measured again")
    if found.read_file and len(advice) > 1:
        note(f"the header of {printable(found.read_file)} was read; the others are taken to differ as their sizes do")
    if taken is None:
        note("no file type fits")
    else:
        console.print(f"> is what -q auto takes: ggufmoe chat {printable(model)} -q {taken}", soft_wrap=True)


def _speeds(one: TypeAdvice) -> str:
    """Tokens a second in an empty and a full context, or that the CPU computes no layer."""
    if one.tokens_per_s is None or one.tokens_per_s_full is None:
        return "GPU"
    shown = [f"{n:.1f}" if n < 9.95 else f"{n:.0f}" for n in (one.tokens_per_s, one.tokens_per_s_full)]
    return shown[0] if shown[0] == shown[1] else "-".join(shown)
