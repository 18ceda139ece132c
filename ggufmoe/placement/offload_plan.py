"""Where the parts of a model go, as data: devices, what each of them gets, and the plan as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ggufmoe.gguf.types import GGMLType
from ggufmoe.native.wording import CPU_BACKEND, is_repack_buffer


@dataclass(frozen=True)
class Place:
    """A device that can compute layers: its name, the name of its buffer, its memory in bytes.

    ``host_buffer`` names the main memory that the device can read by itself, if there is such. ``maps_files``: it reads
    weights in a mapped file without a copy. ``alignment`` of tensors in its buffer, in bytes.
    """

    name: str
    buffer: str
    free_bytes: int
    total_bytes: int
    host_buffer: str | None = None
    maps_files: bool = False
    supports_mmap: bool = True
    alignment: int = 128


@dataclass(frozen=True)
class HostMemory:
    """The CPU's memory in bytes; 0 where it is not known.

    ``repacked`` maps each type whose weights the CPU's backend rearranges to the number of rows that it interleaves.
    """

    free_bytes: int = 0
    total_bytes: int = 0
    repacked: Mapping[GGMLType, int] = field(default_factory=dict)
    name: str = CPU_BACKEND
    alignment: int = 32


@dataclass(frozen=True)
class BufferOverride:
    """Tensors that go elsewhere than their layer: a regular expression of their names, the buffer, their number."""

    pattern: str
    buffer: str
    n_tensors: int


@dataclass(frozen=True)
class BufferShare:
    """Bytes of weights in one buffer; ``is_mapped``: a range of the file rather than memory of its own."""

    name: str
    n_bytes: int
    is_mapped: bool


@dataclass(frozen=True)
class DeviceShare:
    """What one device gets. ``compute_bytes`` is an estimate; ``kv_bytes`` counts recurrent states too.

    ``layers`` are numbered from 0, the output follows the last layer; ``expert_layers`` are those whose experts the
    device holds.
    """

    device: str
    free_bytes: int
    total_bytes: int
    buffers: tuple[BufferShare, ...]
    kv_bytes: int
    compute_bytes: int
    layers: tuple[int, ...]
    expert_layers: tuple[int, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights in all buffers of the device."""
        return sum(buffer.n_bytes for buffer in self.buffers)

    @property
    def repacked_bytes(self) -> int:
        """Bytes of weights that the CPU's backend has rearranged."""
        return sum(buffer.n_bytes for buffer in self.buffers if is_repack_buffer(buffer.name))

    @property
    def n_bytes(self) -> int:
        """Bytes of weights, KV cache and compute buffers together."""
        return self.weight_bytes + self.kv_bytes + self.compute_bytes


@dataclass(frozen=True)
class OffloadPlan:
    """What each device gets, and the settings of libllama that bring it there; the CPU's share is the last.

    ``tensor_split`` has a number for each GPU. Of the ``overrides``, the first whose pattern matches a tensor counts.
    ``fitted``: something was chosen so that the model fits. ``is_exact``: the plan can be compared with libllama's
    report, which is not so where rows or tensors are split over several GPUs. ``is_kv_exact``: so can its KV cache,
    which is not so for architectures with a cache of their own.
    """

    shares: tuple[DeviceShare, ...]
    n_layer: int
    n_gpu_layers: int
    tensor_split: tuple[float, ...]
    overrides: tuple[BufferOverride, ...]
    n_ctx: int
    n_expert: int
    n_expert_used: int
    uses_mmap: bool
    fitted: bool
    is_exact: bool
    is_kv_exact: bool
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def host(self) -> DeviceShare:
        """The CPU's share."""
        return self.shares[-1]

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain values, for JSON; sums of each device included."""
        plan = asdict(self)
        for entry, share in zip(plan["shares"], self.shares, strict=True):
            entry |= {"weight_bytes": share.weight_bytes, "total_needed_bytes": share.n_bytes}
        return plan

    def summary(self) -> dict[str, Any]:
        """Bytes and numbers of layers of each device, for JSON; the output counts as no layer."""
        return {
            "devices": [
                {
                    "name": share.device,
                    "weight_bytes": share.weight_bytes,
                    "kv_bytes": share.kv_bytes,
                    "compute_bytes": share.compute_bytes,
                    "layers": sum(layer < self.n_layer for layer in share.layers),
                    "expert_layers": len(share.expert_layers),
                }
                for share in self.shares
            ],
            "n_layer": self.n_layer,
            "n_gpu_layers": self.n_gpu_layers,
        }
