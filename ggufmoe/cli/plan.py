"""``ggufmoe plan``: which device would hold which part of a model, for real devices or imagined ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Annotated

import typer

from ggufmoe.cli.console import make_console
from ggufmoe.cli.params import ModelName, with_options
from ggufmoe.cli.progress import ProgressLine
from ggufmoe.cli.type_table import show_type_advice
from ggufmoe.cli.wanted_model import found_file
from ggufmoe.gguf.model import ModelHeader, read_model_header
from ggufmoe.gguf.names import EXPERTS_PATTERN, experts_pattern
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.placement.devices import this_host
from ggufmoe.placement.offload import plan_offload
from ggufmoe.placement.offload_plan import BufferOverride, DeviceShare, HostMemory, OffloadPlan, Place
from ggufmoe.remote.places import find_places
from ggufmoe.sizes import memory_size, parse_size

_NARROW_COLUMNS = 76


@with_options(ContextOptions, OffloadOptions)
def plan_command(
    model: ModelName,
    context: ContextOptions,
    offload: OffloadOptions,
    vram: Annotated[
        list[str] | None,
        typer.Option(
            "--vram", help="Plan for a GPU with this much memory, for example 8G; repeatable.", metavar="SIZE"
        ),
    ] = None,
    ram: Annotated[str | None, typer.Option("--ram", help="Plan for this much main memory.", metavar="SIZE")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Show which device would hold which part of a model, and how much memory it takes, before anything is loaded.

    Of a checkpoint, a recipe or a name on the hub (org/name) it shows which file types, or GGUF files, fit this
    machine, with their size, the context that remains and the speed; > marks the one that -q auto takes. A GGUF file
    on the hub (org/name:Q4_K_M) is planned by its header.

    Without --vram the devices of this machine are used. The GPUs of --vram are named GPU0, GPU1 and so on.
    """
    if vram and offload.rpc:
        raise typer.BadParameter("--vram replaces all devices: leave out --rpc, and add a --vram for each worker")
    sizes = [_memory(size, "--vram") for size in vram or ()]
    ram_bytes = None if ram is None else _memory(ram, "--ram")
    path = found_file(model)
    with ProgressLine("plan", phase="plan", waiting="looking at devices"):
        header = _hub_header(model) if path is None else read_model_header(path)
        devices, host = _devices(sizes, offload)
        if ram_bytes is not None:
            host = HostMemory(ram_bytes, ram_bytes, host.repacked, host.name, host.alignment)
        if header is not None:
            plan = plan_offload(header, context, offload, devices, host)
    if header is None:
        show_type_advice(model, devices, host, context, offload, as_json=as_json)
        return
    if as_json:
        typer.echo(json.dumps(plan.to_dict()))
    else:
        _show(plan)


def _hub_header(model: str) -> ModelHeader | None:
    """The header of a GGUF file of the hub, if ``model`` names one by its quant or file."""
    from ggufmoe.store.wanted import hub_name

    name = hub_name(model)
    if name is None or not (name.quant or name.file):
        return None
    from ggufmoe.hub.hub_gguf import read_hub_header
    from ggufmoe.hub.hub_models import find_gguf

    return read_hub_header(find_gguf(name))


def _devices(imagined: Sequence[int], offload: OffloadOptions) -> tuple[tuple[Place, ...], HostMemory]:
    if not imagined:
        return find_places(offload)
    places = tuple(
        Place(f"GPU{index}", f"GPU{index}", n_bytes, n_bytes, host_buffer="GPU_Host")
        for index, n_bytes in enumerate(imagined)
    )
    return places, this_host()


def _memory(size: str, flag: str) -> int:
    """Bytes of ``8G``, ``7.5G`` or ``512M`` in powers of 1024, as memory is sold."""
    n_bytes = parse_size(size, 1024)
    if not n_bytes:
        raise typer.BadParameter(f"{flag}: {size!r} is not a size; give for example 8G or 512M")
    if n_bytes < 2**20:
        raise typer.BadParameter(f"{flag}: {size} is less than one MiB; give for example 8G or 512M")
    return n_bytes


def _show(plan: OffloadPlan) -> None:
    from rich import box
    from rich.table import Table

    console = make_console()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold", padding=(0, 1))
    table.add_column("device", overflow="fold")
    for heading in ("free", "weights", "KV", "compute", "in all"):
        table.add_column(heading, justify="right", no_wrap=True)
    narrow = console.width < _NARROW_COLUMNS
    for heading in () if narrow else ("layers", "experts of"):
        table.add_column(heading, overflow="fold")
    unit, n_unit_bytes = ("GiB", 2**30) if max(share.n_bytes for share in plan.shares) >= 2**30 else ("MiB", 2**20)
    for share in plan.shares:
        table.add_row(*_sizes(share, n_unit_bytes), *(() if narrow else _layers(share, plan.n_layer)))
    console.print(table)
    console.print()
    for share in plan.shares if narrow else ():
        layers, experts = _layers(share, plan.n_layer)
        console.print(f"{share.device}: layers {layers}, experts of {experts}".replace(" -", " none"))
    console.print(f"{unit}, for a context of {plan.n_ctx} tokens; compute is an estimate")
    for line in _lines(plan):
        console.print(line)
    for warning in plan.warnings:
        console.print(f"warning: {warning}", style="yellow")
    for note in plan.notes:
        console.print(f"note: {note}")


def _sizes(share: DeviceShare, n_unit_bytes: int) -> list[str]:
    weights, kv, compute, total = (
        f"{n_bytes / n_unit_bytes:.2f}"
        for n_bytes in (share.weight_bytes, share.kv_bytes, share.compute_bytes, share.n_bytes)
    )
    free = memory_size(share.free_bytes) if share.total_bytes else "?"
    return [share.device, free, weights, kv, f"~{compute}", total]


def _layers(share: DeviceShare, n_layer: int) -> list[str]:
    return [_ranges(share.layers, n_layer), _ranges(share.expert_layers, n_layer)]


def _lines(plan: OffloadPlan) -> Iterator[str]:
    for share in plan.shares:
        for buffer in share.buffers:
            kind = "a range of the file, mapped" if buffer.is_mapped else "in memory"
            yield f"{share.device}: {buffer.name} {buffer.n_bytes / 2**20:.2f} MiB, {kind}"
    if len(plan.shares) > 1:
        how = "chosen so that it fits" if plan.fitted else "as given, or all"
        split = ",".join(f"{part:.4g}" for part in plan.tensor_split)
        yield f"{plan.n_gpu_layers} of {plan.n_layer + 1} layers on the GPU ({how}): " + _flags(plan, split)


def _flags(plan: OffloadPlan, split: str) -> str:
    flags = [f"-ngl {plan.n_gpu_layers}"]
    if len(plan.tensor_split) > 1 and plan.n_gpu_layers:
        flags.append(f"-ts {split}")
    return " ".join(flags + [_override_flag(item, plan.n_layer) for item in plan.overrides])


def _override_flag(item: BufferOverride, n_layer: int) -> str:
    for n_first in range(1, n_layer + 1):
        if item.pattern == experts_pattern(range(n_first)):
            return f"-ncmoe {n_first}"
    return "-cmoe" if item.pattern == EXPERTS_PATTERN else f"-ot '{item.pattern}={item.buffer}'"


def _ranges(layers: Sequence[int], n_layer: int) -> str:
    """``0-3, 7, output``: runs of numbers in few characters."""
    runs: list[list[int]] = []
    for layer in sorted(layer for layer in layers if layer < n_layer):
        if runs and runs[-1][1] == layer - 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    shown = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    return ", ".join(shown + ["output"] * (n_layer in layers)) or "-"
