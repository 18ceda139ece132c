"""``llama_model_params`` for a plan: its fields, and the arrays that they point at."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Collection
from typing import Any

from ggufmoe.native import backends
from ggufmoe.options import OffloadOptions
from ggufmoe.options.limits import MAX_DEVICES
from ggufmoe.placement.devices import DeviceTable
from ggufmoe.placement.offload_plan import OffloadPlan
from ggufmoe.placement.rules import chosen_devices

_logger = logging.getLogger("ggufmoe")
_LOAD_MODES = {"auto": -1, "none": 0, "mmap": 1, "mlock": 2, "mmap+mlock": 3, "dio": 4}
_SPLIT_MODES = {"none": 0, "layer": 1, "row": 2, "tensor": 3}
_KV_INT = 0


class _TensorOverride(ctypes.Structure):
    """``struct llama_model_tensor_buft_override`` (llama.h)."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p))


def device_list(handles: Collection[int]) -> ctypes.Array[ctypes.c_void_p]:
    """The array for ``llama_model_params.devices``: handles of devices, terminated by NULL."""
    return (ctypes.c_void_p * (len(handles) + 1))(*handles, None)


def set_parameters(
    api: Any, parameters: Any, machine: DeviceTable, plan: OffloadPlan, offload: OffloadOptions, n_expert_used_key: str
) -> tuple[Any, ...]:
    """Fill in ``llama_model_params``; returns the arrays that it points at, to be kept until the model is loaded.

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
    """Whether the CPU's extra buffers must stay unused because their AMX code would crash. Logs a warning if so."""
    if not backends.has_broken_amx():
        return False
    _logger.warning(
        "this engine was compiled with AMX, whose code in llama.cpp crashes (llama.cpp#20824): weights are used as "
        "with --no-repack, which is slower; compile the engine again as vendor/README.md says"
    )
    return True
