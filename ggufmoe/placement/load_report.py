"""Where a loaded model is: libllama's own report of a load, summed up and compared with the plan."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from ggufmoe.native.wording import (
    SIZE_STEP_BYTES,
    Content,
    buffer_size,
    mapped_buffer,
    offloaded_layers,
    overridden_tensor,
)
from ggufmoe.placement.devices import DeviceTable
from ggufmoe.placement.offload_plan import DeviceShare, OffloadPlan

_MIB = 2**20
_MAX_KV_LINES = 3
"""libllama logs a device's full KV cache, that of sliding windows and recurrent states in a line each."""


@dataclass(frozen=True)
class LoadReport:
    """What libllama logged: bytes by buffer (to 0.01 MiB), buffers of overridden tensors, number of layers on GPUs.

    ``kv_bytes`` holds keys, values and recurrent states.
    """

    weight_bytes: Mapping[str, int]
    kv_bytes: Mapping[str, int]
    compute_bytes: Mapping[str, int]
    overridden: Mapping[str, str]
    n_layers_offloaded: int | None


@dataclass(frozen=True)
class Placement:
    """Where a loaded model is: the plan, libllama's report, and a line with both numbers for each difference."""

    plan: OffloadPlan
    report: LoadReport
    differences: tuple[str, ...]


def placement_of(plan: OffloadPlan, lines: Iterable[str], machine: DeviceTable) -> Placement:
    """Where libllama has put a model, by the log ``lines`` of its load, compared with the plan."""
    report = read_report(lines)
    buffers = {place.name: place.buffer for place in machine.places}
    return Placement(plan, report, tuple(_differences(plan, report, buffers)) if plan.is_exact else ())


def read_report(lines: Iterable[str]) -> LoadReport:
    """Sum up the log lines of a load; lines that match none of ``PLACEMENT_LINES`` do not count."""
    kept: dict[str, int] = {}
    sizes: dict[Content, dict[str, int]] = {"model": {}, "KV": kept, "RS": kept, "compute": {}}
    overridden: dict[str, str] = {}
    n_offloaded: int | None = None
    for line in lines:
        if (buffer := buffer_size(line)) is not None:
            of_content = sizes[buffer.content]
            of_content[buffer.name] = of_content.get(buffer.name, 0) + buffer.n_bytes
        elif (moved := overridden_tensor(line)) is not None:
            overridden[moved[0]] = moved[1]
        elif (n_layers := offloaded_layers(line)) is not None:
            n_offloaded = n_layers
    return LoadReport(sizes["model"], kept, sizes["compute"], overridden, n_offloaded)


def _differences(plan: OffloadPlan, report: LoadReport, buffers: Mapping[str, str]) -> Iterator[str]:
    n_planned = sum(override.n_tensors for override in plan.overrides)
    if n_planned != len(report.overridden):
        yield f"{n_planned} tensors were to be overridden, libllama did so with {len(report.overridden)}"
    if report.n_layers_offloaded not in (None, plan.n_gpu_layers):
        yield f"{plan.n_gpu_layers} layers were to be offloaded, libllama did so with {report.n_layers_offloaded}"
    gpu_buffers = {name for share in plan.shares[:-1] for name in _names(buffers[share.device])}
    for share in plan.shares:
        mine = _names(buffers[share.device]) if share.device in buffers else None
        for what, planned, reported in _sums(share, report, mine, gpu_buffers, is_kv_exact=plan.is_kv_exact):
            n_lines = _MAX_KV_LINES + len(share.buffers)
            if abs(planned - reported) > 0.01 * reported + n_lines * SIZE_STEP_BYTES:
                numbers = f"planned {planned / _MIB:.2f} MiB, libllama says {reported / _MIB:.2f} MiB"
                yield f"{share.device}: {what}: {numbers}"


def _names(buffer: str) -> set[str]:
    return {buffer, mapped_buffer(buffer)}


def _sums(
    share: DeviceShare, report: LoadReport, mine: set[str] | None, gpu_buffers: set[str], *, is_kv_exact: bool
) -> Iterator[tuple[str, int, int]]:
    """Planned and reported bytes of weights and of the KV cache. Buffers that belong to no GPU count for the CPU."""
    compared = [("weights", share.weight_bytes, report.weight_bytes)]
    if is_kv_exact:
        compared.append(("KV cache", share.kv_bytes, report.kv_bytes))
    for what, planned, reported in compared:
        names = set(reported) - gpu_buffers if mine is None else mine & set(reported)
        yield what, planned, sum(reported[name] for name in names)
