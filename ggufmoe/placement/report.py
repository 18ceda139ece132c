"""A plan carried out: libllama's parameters made of it, and libllama's own report held against it.

Owns the arrays that libllama is pointed at and the reading of its log. Planning is ``offload``'s, loading the engine's.
"""

from __future__ import annotations

import ctypes
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ggufmoe.native import backends
from ggufmoe.options import OffloadOptions
from ggufmoe.options.limits import MAX_DEVICES
from ggufmoe.placement.devices import Machine
from ggufmoe.placement.offload import DeviceShare, OffloadPlan, chosen_devices

REPORT_LINES = re.compile(r"buffer size = |buffer type overridden to |: offloaded \d+/\d+ layers")
"""The lines of libllama's log that tell where things went."""

_logger = logging.getLogger("ggufmoe")
_LOAD_MODES = {"auto": -1, "none": 0, "mmap": 1, "mlock": 2, "mmap+mlock": 3, "dio": 4}
_SPLIT_MODES = {"none": 0, "layer": 1, "row": 2, "tensor": 3}
_KV_INT = 0
_MIB = 2**20
_LOG_STEP_BYTES = 0.005 * _MIB
"""libllama prints MiB with two decimals."""
_BUFFER = re.compile(r": +(?P<name>\S+) +(?P<what>model|KV|compute) buffer size = +(?P<mib>[\d.]+) MiB")
_OVERRIDDEN = re.compile(r"tensor (\S+) .*buffer type overridden to (\S+)")
_OFFLOADED = re.compile(r": offloaded (\d+)/(\d+) layers")


@dataclass(frozen=True)
class LoadReport:
    """What libllama said: bytes by buffer (to a hundredth of a MiB), tensors overridden, layers offloaded."""

    weight_bytes: Mapping[str, int]
    kv_bytes: Mapping[str, int]
    compute_bytes: Mapping[str, int]
    overridden: Mapping[str, str]
    n_layers_offloaded: int | None


@dataclass(frozen=True)
class Placement:
    """Where a loaded model is: the plan, what libllama reported, and how the two differ (both numbers in each line)."""

    plan: OffloadPlan
    report: LoadReport
    differences: tuple[str, ...]


class _TensorOverride(ctypes.Structure):
    """``struct llama_model_tensor_buft_override`` (llama.h)."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


def device_list(handles: Collection[int]) -> ctypes.Array[ctypes.c_void_p]:
    """The ``devices`` of ``llama_model_params``: handles of devices, ended by NULL."""
    return (ctypes.c_void_p * (len(handles) + 1))(*handles, None)


def set_parameters(
    api: Any, parameters: Any, machine: Machine, plan: OffloadPlan, offload: OffloadOptions, n_expert_used_key: str
) -> tuple[Any, ...]:
    """Fill ``llama_model_params`` in; gives what must live until the model is loaded.

    A list of devices is always passed: without one llama.cpp takes every device that was ever registered in this
    process, remote ones included.
    """
    places = chosen_devices(offload, machine.places)
    devices = device_list([machine.device_handles[place.name] for place in places])
    split = (ctypes.c_float * MAX_DEVICES)(*plan.tensor_split)
    pairs = [_TensorOverride(item.pattern.encode(), machine.buffer_handles[item.buffer]) for item in plan.overrides]
    overrides = (_TensorOverride * (len(pairs) + 1))(*pairs, _TensorOverride())
    parameters.devices = ctypes.addressof(devices)
    parameters.n_gpu_layers = plan.n_gpu_layers
    parameters.split_mode = _SPLIT_MODES[offload.split_mode]
    parameters.load_mode = _LOAD_MODES[offload.load_mode]
    parameters.use_extra_bufts = offload.repack and not _avoids_amx()
    parameters.no_host = offload.no_host
    parameters.main_gpu = offload.main_gpu if offload.split_mode == "row" else 0
    if plan.tensor_split:
        parameters.tensor_split = split
    if pairs:
        parameters.tensor_buft_overrides = ctypes.addressof(overrides)
    alive: tuple[Any, ...] = (devices, split, overrides)
    if offload.n_expert_used is not None:
        values = (api.llama_model_kv_override * 2)()
        values[0].tag, values[0].key = _KV_INT, n_expert_used_key.encode()
        values[0].value.val_i64 = offload.n_expert_used
        parameters.kv_overrides = values
        alive += (values,)
    return alive


def _avoids_amx() -> bool:
    """Whether extra buffers stay unused because their AMX code would crash; which is logged."""
    if not backends.has_broken_amx():
        return False
    _logger.warning(
        "this engine was compiled with AMX, whose code in llama.cpp crashes (llama.cpp#20824): weights are used as "
        "with --no-repack, which is slower; compile the engine again as vendor/README.md says"
    )
    return True


def placement_of(plan: OffloadPlan, lines: Iterable[str], machine: Machine) -> Placement:
    """Read libllama's log of a load and compare it with the plan."""
    report = read_report(lines)
    buffers = {place.name: place.buffer for place in machine.places}
    return Placement(plan, report, tuple(_differences(plan, report, buffers)) if plan.is_exact else ())


def read_report(lines: Iterable[str]) -> LoadReport:
    """Sum up the lines that match ``REPORT_LINES``."""
    sizes: dict[str, dict[str, int]] = {"model": {}, "KV": {}, "compute": {}}
    overridden: dict[str, str] = {}
    n_layers: int | None = None
    for line in lines:
        if match := _BUFFER.search(line):
            of = sizes[match["what"]]
            of[match["name"]] = of.get(match["name"], 0) + round(float(match["mib"]) * _MIB)
        elif match := _OVERRIDDEN.search(line):
            overridden[match[1]] = match[2]
        elif match := _OFFLOADED.search(line):
            n_layers = int(match[1])
    return LoadReport(sizes["model"], sizes["KV"], sizes["compute"], overridden, n_layers)


def _differences(plan: OffloadPlan, report: LoadReport, buffers: Mapping[str, str]) -> Iterator[str]:
    n_planned = sum(override.n_tensors for override in plan.overrides)
    if n_planned != len(report.overridden):
        yield f"{n_planned} tensors were to be overridden, libllama did so with {len(report.overridden)}"
    if report.n_layers_offloaded not in (None, plan.n_gpu_layers):
        yield f"{plan.n_gpu_layers} layers were to be offloaded, libllama did so with {report.n_layers_offloaded}"
    gpu_buffers = {name for share in plan.shares[:-1] for name in _names(buffers[share.device])}
    for share in plan.shares:
        mine = _names(buffers[share.device]) if share.device in buffers else None
        for what, planned, reported in _sums(share, report, mine, gpu_buffers):
            n_lines = 1 + len(share.buffers)
            if abs(planned - reported) > 0.01 * reported + n_lines * _LOG_STEP_BYTES:
                numbers = f"planned {planned / _MIB:.2f} MiB, libllama says {reported / _MIB:.2f} MiB"
                yield f"{share.device}: {what}: {numbers}"


def _names(buffer: str) -> set[str]:
    return {buffer, f"{buffer}_Mapped"}


def _sums(
    share: DeviceShare, report: LoadReport, mine: set[str] | None, gpu_buffers: set[str]
) -> Iterator[tuple[str, int, int]]:
    """Weights and KV cache: planned and reported bytes. All buffers that are no GPU's belong to the CPU."""
    for what, planned, reported in (
        ("weights", share.weight_bytes, report.weight_bytes),
        ("KV cache", share.kv_bytes, report.kv_bytes),
    ):
        names = set(reported) - gpu_buffers if mine is None else mine & set(reported)
        yield what, planned, sum(reported[name] for name in names)
