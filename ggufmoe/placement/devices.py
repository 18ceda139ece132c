"""The devices that a model can be placed on, as ggml reports them, with the handles that libllama is given.

Which part of a model goes to which device is planned in ``offload``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ggufmoe.errors import EngineError, EngineMissingError, OptionError
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import backends
from ggufmoe.native.wording import RPC_BACKEND
from ggufmoe.placement.offload_plan import HostMemory, Place

_GPU_TYPES = (backends.DeviceType.GPU, backends.DeviceType.IGPU)


@dataclass(frozen=True)
class DeviceTable:
    """Devices that layers can go to, the CPU's memory, and ggml's handles of devices and of buffers by name."""

    places: tuple[Place, ...]
    host: HostMemory
    descriptions: Mapping[str, str]
    device_handles: Mapping[str, int]
    buffer_handles: Mapping[str, int]


def find_devices(named: str | None = None, *, remote: bool = False) -> DeviceTable:
    """The GPUs of this machine, or the devices in ``named`` (separated by commas, as for ``--device``).

    Devices of workers that were registered in this process are used only with ``remote``, or when they are named:
    a request to a worker that has gone would never return. Raises OptionError for an unknown device,
    EngineMissingError without llama-cpp-python.
    """
    registered = backends.devices()
    cpu = next((device for device in registered if device.type is backends.DeviceType.CPU), None)
    if cpu is None:
        raise EngineError("llama.cpp has no CPU backend here; install llama-cpp-python as vendor/README.md describes")
    used = [device for device in registered if device.type in _GPU_TYPES]
    used = _default(used, remote=remote) if named is None else _named(named, used)
    facts = {device.name: backends.device_facts(device) for device in (cpu, *used)}
    return DeviceTable(
        places=tuple(_place(device.name, facts[device.name]) for device in used),
        host=HostMemory(
            free_bytes=facts[cpu.name].free_bytes,
            total_bytes=facts[cpu.name].total_bytes,
            repacked=repacked_types(),
            name=facts[cpu.name].buffer.name,
            alignment=facts[cpu.name].buffer.alignment,
        ),
        descriptions={name: fact.description for name, fact in facts.items()},
        device_handles={device.name: device.handle for device in used},
        buffer_handles={b.name: b.handle for fact in facts.values() for b in (fact.buffer, fact.host_buffer) if b},
    )


def this_host() -> HostMemory:
    """The CPU's memory of this machine and the types that its backend rearranges; empty without an engine."""
    try:
        return find_devices("none").host
    except EngineMissingError:
        return HostMemory()


def _named(named: str, gpus: list[backends.Device]) -> list[backends.Device]:
    wanted = [] if named == "none" else named.split(",")
    there = [device.name for device in gpus]
    for name in wanted:
        if name not in there:
            raise OptionError(
                f"--device {name}: there is no such device; there is {', '.join(there) or 'only the CPU'}"
            )
    return [device for device in gpus if device.name in wanted]


def _default(gpus: list[backends.Device], *, remote: bool) -> list[backends.Device]:
    """The devices that llama.cpp would choose: workers first, an integrated GPU only if there is no other GPU here."""
    workers = [device for device in gpus if device.backend == RPC_BACKEND and remote]
    local = [device for device in gpus if device.backend != RPC_BACKEND]
    discrete = [device for device in local if device.type is backends.DeviceType.GPU]
    return workers + (discrete or local[:1])


def _place(name: str, facts: backends.DeviceFacts) -> Place:
    return Place(
        name=name,
        buffer=facts.buffer.name,
        free_bytes=facts.free_bytes,
        total_bytes=facts.total_bytes,
        host_buffer=facts.host_buffer.name if facts.host_buffer else None,
        maps_files=facts.maps_files,
        supports_mmap=facts.supports_mmap,
        alignment=facts.buffer.alignment,
    )


def repacked_types() -> dict[GGMLType, int]:
    """Types that ggml's CPU backend rearranges on this CPU, with the number of rows that it interleaves.

    Follows ``ggml_repack_get_optimal_repack_type`` in ggml-cpu/repack.cpp (commit 0c1e57098).
    """
    found: dict[GGMLType, int] = {}
    if backends.has_broken_amx():
        return found
    if backends.cpu_has("NEON") and backends.cpu_has("DOTPROD"):
        fours = (GGMLType.Q4_0, GGMLType.IQ4_NL, GGMLType.MXFP4, GGMLType.Q8_0, GGMLType.Q1_0)
        found |= dict.fromkeys(fours, 4) | dict.fromkeys((GGMLType.Q4_K, GGMLType.Q5_K, GGMLType.Q6_K), 8)
    if backends.cpu_has("AVX2"):
        found |= dict.fromkeys((GGMLType.Q4_0, GGMLType.Q4_K, GGMLType.IQ4_NL, GGMLType.MXFP4), 8)
    if backends.cpu_has("AVX512"):
        found |= {GGMLType.Q2_K: 8}
    return found
