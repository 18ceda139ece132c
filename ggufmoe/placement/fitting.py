"""How many layers, and whose experts, go to the GPUs: as asked for, or as many as fit their memory.

Source of the order in which experts and layers are moved to the CPU: fit.cpp of llama.cpp at commit 0c1e57098.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ggufmoe.options import ALL_LAYERS
from ggufmoe.placement.rules import PlacementRules, device_of_layer

_MIB = 2**20


@dataclass(frozen=True)
class LayerChoice:
    """How layers are distributed: the last ``n_gpu_layers`` over the GPUs, in the proportions of ``split``.

    The experts of the first ``n_moved`` layers stay with the CPU, where no explicit override says otherwise.
    ``fitted``: something differs from what was asked for; ``failed``: nothing was found that fits.
    """

    n_gpu_layers: int
    split: tuple[float, ...]
    n_moved: int
    fitted: bool
    failed: bool = False


def choose_layers(rules: PlacementRules) -> LayerChoice:
    """The distribution of layers that the options ask for, or the first one that fits where they leave it open."""
    offload, n_all = rules.offload, rules.footprint.n_layer + 1
    layers_given = offload.n_gpu_layers >= 0 or offload.n_gpu_layers == ALL_LAYERS
    experts_given = offload.cpu_moe or offload.n_cpu_moe is not None
    n_gpu_layers = min(offload.n_gpu_layers, n_all) if offload.n_gpu_layers >= 0 else n_all
    asked = LayerChoice(n_gpu_layers, _split(rules), 0, fitted=False)
    if not rules.devices or offload.fit == "off" or offload.split_mode in ("row", "tensor"):
        return asked
    if layers_given and (experts_given or not rules.footprint.n_expert):
        return asked
    return _fit(rules, asked, layers_given=layers_given, experts_given=experts_given)


def _split(rules: PlacementRules) -> tuple[float, ...]:
    """Proportions of layers for each device: those given, else as the free memory is."""
    devices, shares = rules.devices, rules.offload.split_shares
    if shares is not None:
        return (*shares, *[0.0] * (len(devices) - len(shares)))[: len(devices)]
    free = tuple(float(device.free_bytes or rules.host.free_bytes) for device in devices)
    return free if any(free) else (1.0,) * len(devices)


def _fit(rules: PlacementRules, asked: LayerChoice, *, layers_given: bool, experts_given: bool) -> LayerChoice:
    """The first of these that fits: fewer experts on the GPUs layer by layer, then fewer layers."""
    can_move = bool(rules.footprint.n_expert) and not experts_given
    most_moved = rules.footprint.n_layer if can_move else 0
    candidates = [(asked.n_gpu_layers, n_moved) for n_moved in range(most_moved + 1)]
    if not layers_given:
        candidates += [(n, most_moved) for n in range(asked.n_gpu_layers - 1, -1, -1)]
    costs = _Costs(rules)
    for n_gpu_layers, n_moved in candidates:
        splits = [asked.split]
        if len(rules.devices) > 1 and rules.offload.split_shares is None:
            splits.append(costs.filled(n_gpu_layers, n_moved))
        for split in splits:
            if split and costs.fits(n_gpu_layers, n_moved, split):
                found = LayerChoice(n_gpu_layers, split, n_moved, fitted=False)
                return replace(found, fitted=found != asked)
    return replace(asked, n_moved=most_moved, fitted=bool(most_moved), failed=True)


class _Costs:
    """Bytes of each layer, and bytes that each GPU has for layers."""

    def __init__(self, rules: PlacementRules) -> None:
        footprint = rules.footprint
        n_all = footprint.n_layer + 1
        self._dense = [*footprint.kv_layers, 0] if rules.offload.kv_offload else [0] * n_all
        self._experts = [0] * n_all
        fixed = dict.fromkeys((device.buffer for device in rules.devices), 0)
        for tensor in footprint.tensors:
            buffer = rules.explicit_buffer(tensor)
            if buffer is not None:
                fixed[buffer] = fixed.get(buffer, 0) + tensor.n_bytes
            elif tensor.layer is not None and tensor.layer >= 0:
                (self._experts if tensor.is_expert else self._dense)[tensor.layer] += tensor.n_bytes
        reserved = rules.offload.fit_target * _MIB + footprint.compute_bytes
        self._budgets = [device.free_bytes - reserved - fixed[device.buffer] for device in rules.devices]
        # llama.cpp copies the experts of a large batch to the GPU that computes their layer
        self._copied = 2 * max((tensor.n_bytes for tensor in footprint.tensors if tensor.is_expert), default=0)

    def _layers(self, n_gpu_layers: int, n_moved: int) -> list[int]:
        first = len(self._dense) - n_gpu_layers
        return [
            self._dense[layer] + (0 if layer < n_moved else self._experts[layer])
            for layer in range(first, len(self._dense))
        ]

    def _budget(self, device: int, n_moved: int) -> int:
        return self._budgets[device] - (self._copied if n_moved else 0)

    def fits(self, n_gpu_layers: int, n_moved: int, split: tuple[float, ...]) -> bool:
        """Whether every device has room for its layers."""
        used = [0] * len(self._budgets)
        for layer, n_bytes in enumerate(self._layers(n_gpu_layers, n_moved)):
            used[device_of_layer(layer, n_gpu_layers, split)] += n_bytes
        return all(n <= self._budget(device, n_moved) for device, n in enumerate(used) if n)

    def filled(self, n_gpu_layers: int, n_moved: int) -> tuple[float, ...]:
        """Numbers of layers when each device takes as many as it can; empty where not all layers find room."""
        layers = self._layers(n_gpu_layers, n_moved)
        counts, position = [], 0
        for device in range(len(self._budgets)):
            start, left = position, self._budget(device, n_moved)
            while position < len(layers) and layers[position] <= left:
                left -= layers[position]
                position += 1
            counts.append(float(position - start))
        return tuple(counts) if position == len(layers) and any(counts) else ()
