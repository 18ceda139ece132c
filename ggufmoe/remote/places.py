"""Where a model could go: the devices of this machine together with those that remote workers offer."""

from __future__ import annotations

from ggufmoe.options import OffloadOptions
from ggufmoe.placement.devices import find_machine
from ggufmoe.placement.offload import Host, Place
from ggufmoe.remote.rpc import find_workers


def find_places(offload: OffloadOptions) -> tuple[tuple[Place, ...], Host]:
    """The devices that a model could be planned onto: this machine's, and those of the workers of ``offload.rpc``.

    Workers are asked and not registered, so llama.cpp has no part in it. Raises what ``find_machine`` and
    ``find_workers`` raise.
    """
    remote = tuple(device.place for device in find_workers(offload.workers)) if offload.workers else ()
    names = {place.name for place in remote}
    local = offload.device
    if local is not None:
        local = ",".join(name for name in local.split(",") if name not in names) or "none"
    machine = find_machine(local)
    return remote + machine.places, machine.host
