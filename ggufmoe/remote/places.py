"""The devices that a model can be planned onto: those of this machine and those that workers offer."""

from __future__ import annotations

from ggufmoe.options import OffloadOptions
from ggufmoe.placement.devices import find_devices
from ggufmoe.placement.offload_plan import HostMemory, Place
from ggufmoe.remote.rpc import answer_seconds, find_workers


def find_places(offload: OffloadOptions) -> tuple[tuple[Place, ...], HostMemory]:
    """Devices of the workers of ``offload.rpc`` and of this machine, and the memory of this machine's CPU.

    Workers are asked in Python and not registered with llama.cpp. Raises what ``find_devices`` and ``find_workers``
    raise.
    """
    found = find_workers(offload.workers, answer_seconds(offload)) if offload.workers else ()
    remote = tuple(device.place for device in found)
    names = {place.name for place in remote}
    local = offload.device
    if local is not None:
        local = ",".join(name for name in local.split(",") if name not in names) or "none"
    machine = find_devices(local)
    return remote + machine.places, machine.host
