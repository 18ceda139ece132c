"""Which size of file runs in given memory: what the planner of placements counts beside the weights is subtracted."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ggufmoe.errors import EngineMissingError, OptionError
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.placement.devices import find_devices
from ggufmoe.placement.footprint import Footprint
from ggufmoe.sizes import memory_size
from ggufmoe.store.wanted import planned_model
from ggufmoe.work import memory_bytes
from ggufmoe.writing.plan import WritePlan

_USABLE_SHARE = 0.8
"""Of the main memory: the rest is the system's and that of other programs."""
_MIB = 2**20


@dataclass(frozen=True)
class MemorySums:
    """How given memory is divided, in bytes. ``compute_bytes`` is an estimate."""

    memory_bytes: int
    where: str
    """What memory it is, in words."""
    n_ctx: int
    kv_bytes: int
    compute_bytes: int

    @property
    def weight_bytes(self) -> int:
        """What is left for weights."""
        return self.memory_bytes - self.kv_bytes - self.compute_bytes

    def told(self) -> str:
        """The sums as one line."""
        return (
            f"{memory_size(self.memory_bytes)} of {self.where}: {memory_size(self.weight_bytes)} for weights, "
            f"{memory_size(self.kv_bytes)} KV cache ({self.n_ctx} tokens), about {memory_size(self.compute_bytes)} "
            "compute buffers"
        )

    def to_dict(self) -> dict[str, Any]:
        """The sums as plain values for JSON."""
        return {**asdict(self), "weight_bytes": self.weight_bytes}


def memory_sums(plan: WritePlan, n_bytes: int | None, n_ctx: int | None) -> MemorySums:
    """What a model needs beside its weights in ``n_bytes`` of memory, None for this machine's. The types of ``plan`` do
    not count.

    Weights are counted once, all of them, as if one device held them. Raises OptionError where nothing is left.
    """
    where = "memory"
    if n_bytes is None:
        n_bytes, where = this_memory()
    footprint = Footprint(planned_model(plan), ContextOptions(n_ctx=n_ctx), OffloadOptions())
    sums = MemorySums(n_bytes, where, footprint.n_ctx, sum(footprint.kv_layers), footprint.compute_bytes)
    if sums.weight_bytes <= 0:
        raise OptionError(
            f"{memory_size(n_bytes)} are less than the KV cache of {sums.n_ctx} tokens and the buffers take, "
            f"{memory_size(sums.kv_bytes + sums.compute_bytes)}; give more with --fit, or a shorter context with -c"
        )
    return sums


def this_memory() -> tuple[int, str]:
    """The memory of this machine for a model, and which it is: what its GPUs have free, or most of its main memory."""
    try:
        devices = find_devices().places
    except EngineMissingError:
        devices = ()
    left = OffloadOptions().fit_target * _MIB
    free = sum(max(device.free_bytes - left, 0) for device in devices)
    if free:
        return free, f"this machine's {'GPU' if len(devices) == 1 else 'GPUs'} ({memory_size(left)} of each left free)"
    return int(_USABLE_SHARE * memory_bytes()), f"this machine's memory ({_USABLE_SHARE:.0%} of it)"
