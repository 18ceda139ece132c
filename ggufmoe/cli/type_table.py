"""The table of file types that ``plan`` prints for a model that is no file yet."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ggufmoe.cli.console import make_console, note, printable
from ggufmoe.cli.progress import ProgressLine
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.placement.offload_plan import HostMemory, Place
from ggufmoe.sizes import file_size, memory_size

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
    from ggufmoe.placement.memory_speed import memory_bytes_per_s
    from ggufmoe.store.model_advice import model_advice
    from ggufmoe.store.type_advice import Machine

    with ProgressLine(printable(model, 60), phase="plan", waiting="reading headers"):
        machine = Machine(tuple(devices), host, memory_bytes_per_s())
        found = model_advice(model, machine, context, offload)
    advice = found.types
    if as_json:
        about = {"memory_bytes_per_s": machine.memory_bytes_per_s, "usable_bytes": machine.usable_bytes}
        print(
            json.dumps(
                {"model": model, **about, "types": [one.to_dict() for one in advice], "read_file": found.read_file}
            )
        )
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
        speed = "-" if not one.fits else "GPU" if one.tokens_per_s is None else f"{one.tokens_per_s:.1f}"
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
    console.print(
        f"for {memory_size(machine.usable_bytes)} of this machine's memory{gpu}; tokens/s: what reading the weights "
        f"at {machine.memory_bytes_per_s / 1e9:.1f} GB/s allows"
    )
    if found.read_file and len(advice) > 1:
        note(f"the header of {printable(found.read_file)} was read; the others are taken to differ as their sizes do")
    if taken is None:
        note("no file type fits")
    else:
        console.print(f"> is what -q auto takes: ggufmoe chat {printable(model)} -q {taken}")
