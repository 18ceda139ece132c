"""Where a model's weights, its KV cache and its buffers go: planned from the header alone, before anything is loaded.

A pure function of header, options and devices. It follows the rules by which libllama places tensors (``rules``), so
that the plan can be compared with what libllama reports after loading. Devices are found in ``devices``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from ggufmoe.gguf.header import padded
from ggufmoe.gguf.model import ModelHeader
from ggufmoe.gguf.names import experts_pattern
from ggufmoe.native.wording import mapped_buffer, repack_buffer
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.placement.advice import notes_of, warnings_of
from ggufmoe.placement.fitting import LayerChoice, choose_layers
from ggufmoe.placement.footprint import Footprint, WeightTensor
from ggufmoe.placement.offload_plan import BufferOverride, BufferShare, DeviceShare, HostMemory, OffloadPlan, Place
from ggufmoe.placement.rules import PlacementRules, chosen_devices, device_of_layer


def plan_offload(
    model: ModelHeader, context: ContextOptions, offload: OffloadOptions, devices: Sequence[Place], host: HostMemory
) -> OffloadPlan:
    """Plan where the parts of a model go on ``devices``; ``offload`` may exclude some of these.

    With ``offload.fit``, numbers that are not given explicitly are chosen: as many layers as fit go to the GPUs with
    their dense parts and KV cache, then as many experts as fit; those of the first layers stay with the CPU.

    Raises OptionError for devices, buffers and layers that do not exist, for patterns that match no tensor, and for
    expert options that do not suit the model.
    """
    rules = PlacementRules(Footprint(model, context, offload), offload, chosen_devices(offload, devices), host)
    choice = choose_layers(rules)
    placing, footprint = _Placing(rules, choice), rules.footprint
    plan = OffloadPlan(
        shares=(*(placing.gpu_share(index) for index in range(len(rules.devices))), placing.host_share()),
        n_layer=footprint.n_layer,
        n_gpu_layers=choice.n_gpu_layers,
        tensor_split=choice.split,
        overrides=placing.overrides(),
        n_ctx=footprint.n_ctx,
        n_expert=footprint.n_expert,
        n_expert_used=footprint.n_expert_used,
        uses_mmap=rules.uses_mmap,
        fitted=choice.fitted,
        is_exact=offload.split_mode in ("none", "layer"),
        is_kv_exact=model.memory.is_exact,
    )
    return replace(plan, warnings=tuple(warnings_of(plan, rules, choice)), notes=tuple(notes_of(plan, rules)))


@dataclass(frozen=True)
class _Placed:
    tensor: WeightTensor
    buffer: str


class _Placing:
    """The buffer of every tensor for one distribution of layers, and what each device gets by it."""

    def __init__(self, rules: PlacementRules, choice: LayerChoice) -> None:
        self._rules = rules
        self._footprint = rules.footprint
        n_all = rules.footprint.n_layer + 1
        first = n_all - choice.n_gpu_layers
        self._devices: list[int | None] = [None] * n_all
        """The device of each layer, the output last; None for the CPU."""
        if rules.devices:
            for layer in range(first, n_all):
                self._devices[layer] = device_of_layer(layer - first, choice.n_gpu_layers, choice.split)
        self._moved = range(max(first, 0), choice.n_moved)
        """Offloaded layers whose experts stay with the CPU."""
        self._tensors = tuple(dict.fromkeys(self._placed()))

    def _placed(self) -> Iterator[_Placed]:
        for tensor in self._footprint.tensors:
            if tensor.layer is None:
                for device in dict.fromkeys(self._devices[:-1]):
                    yield _Placed(tensor, self._buffer(tensor, device))
            else:
                device = None if tensor.layer < 0 else self._devices[tensor.layer]
                yield _Placed(tensor, self._buffer(tensor, device))

    def _buffer(self, tensor: WeightTensor, device: int | None) -> str:
        rules = self._rules
        explicit = rules.explicit_buffer(tensor)
        if explicit is None and tensor.is_expert and tensor.layer in self._moved:
            explicit = rules.host.name
        if explicit == rules.host.name or (explicit is None and device is None):
            return rules.host_buffer(tensor)
        if explicit is not None:
            return rules.host.name if rules.uses_mmap and explicit in rules.host_buffers else explicit
        assert device is not None, "without a device the host's buffer is taken"
        return rules.devices[device].buffer

    def overrides(self) -> tuple[BufferOverride, ...]:
        """Explicit overrides first, then the experts that were moved; each with the number of tensors it moves."""
        patterns = list(self._rules.patterns)
        if self._moved:
            patterns.append((re.compile(experts_pattern(self._moved)), self._rules.host.name))
        counts = [0] * len(patterns)
        for name in dict.fromkeys(self._footprint.names):
            hit = next((index for index, (pattern, _) in enumerate(patterns) if pattern.search(name)), None)
            if hit is not None:
                counts[hit] += 1
        pairs = zip(patterns, counts, strict=True)
        return tuple(BufferOverride(pattern.pattern, buffer, count) for (pattern, buffer), count in pairs)

    def gpu_share(self, index: int) -> DeviceShare:
        """What the device with this index gets."""
        device = self._rules.devices[index]
        layers = tuple(layer for layer, where in enumerate(self._devices) if where == index)
        buffers = self._buffer_shares([device.buffer], can_map=device.maps_files, alignment=device.alignment)
        return DeviceShare(
            device=device.name,
            free_bytes=device.free_bytes,
            total_bytes=device.total_bytes,
            buffers=buffers,
            kv_bytes=self._kv_bytes(layers) if self._rules.offload.kv_offload else 0,
            compute_bytes=self._footprint.compute_bytes + self._copied_bytes(layers) if buffers or layers else 0,
            layers=layers,
            expert_layers=self._expert_layers({device.buffer}),
        )

    def host_share(self) -> DeviceShare:
        """What the CPU gets."""
        rules, footprint = self._rules, self._footprint
        layers = tuple(layer for layer, where in enumerate(self._devices) if where is None)
        names = [rules.host.name, repack_buffer(rules.host.name), *rules.host_buffers]
        expert_layers = self._expert_layers(set(names))
        return DeviceShare(
            device=rules.host.name,
            free_bytes=rules.host.free_bytes,
            total_bytes=rules.host.total_bytes,
            buffers=self._buffer_shares(names, can_map=True, alignment=rules.host.alignment),
            kv_bytes=self._kv_bytes(layers if rules.offload.kv_offload else range(footprint.n_layer)),
            compute_bytes=footprint.compute_bytes if layers or expert_layers else footprint.host_compute_bytes,
            layers=layers,
            expert_layers=expert_layers,
        )

    def _buffer_shares(self, names: Sequence[str], *, can_map: bool, alignment: int) -> tuple[BufferShare, ...]:
        """Weights in the buffers ``names``, of which the first is mapped if anything is."""
        shares = []
        for name in names:
            # within a buffer, tied weights are shared
            by_name = {placed.tensor.name: placed.tensor for placed in self._tensors if placed.buffer == name}
            tensors = list(by_name.values())
            if tensors:
                is_mapped = can_map and self._rules.uses_mmap and name == names[0]
                n_bytes = _mapped_bytes(tensors) if is_mapped else sum(padded(t.n_bytes, alignment) for t in tensors)
                shares.append(BufferShare(mapped_buffer(name) if is_mapped else name, n_bytes, is_mapped))
        return tuple(shares)

    def _copied_bytes(self, layers: Sequence[int]) -> int:
        """Room on a GPU for experts in the CPU's memory that it computes for large batches: two tensors."""
        on_gpu = {device.buffer for device in self._rules.devices}
        experts = [placed for placed in self._tensors if placed.tensor.is_expert and placed.tensor.layer in layers]
        return 2 * max((placed.tensor.n_bytes for placed in experts if placed.buffer not in on_gpu), default=0)

    def _kv_bytes(self, layers: Iterable[int]) -> int:
        by_layer = self._footprint.kv_layers
        return sum(by_layer[layer] for layer in layers if layer < len(by_layer))

    def _expert_layers(self, buffers: set[str]) -> tuple[int, ...]:
        experts = (placed for placed in self._tensors if placed.tensor.is_expert and placed.buffer in buffers)
        return tuple(sorted({placed.tensor.layer for placed in experts if placed.tensor.layer is not None}))


def _mapped_bytes(tensors: Sequence[WeightTensor]) -> int:
    """Bytes from the first to the last of the tensors in each file, which is what libllama maps."""
    total = 0
    for shard in {tensor.shard for tensor in tensors}:
        here = [tensor for tensor in tensors if tensor.shard == shard]
        total += max(t.offset + t.n_bytes for t in here) - min(t.offset for t in here)
    return total
