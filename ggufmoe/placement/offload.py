"""Where a model's weights, its KV cache and its buffers go: planned from the header alone, before anything is loaded.

A pure function of header, options and devices. It follows the rules by which libllama places tensors (``load_tensors``
in llama-model.cpp, ``llama-kv-cache.cpp``, ``arg.cpp`` and ``fit.cpp`` at commit 0c1e57098), so that what it predicts
can be compared with what libllama reports. Asking devices, loading and printing belong to others.
"""

from __future__ import annotations

import difflib
import re
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from typing import Any

from ggufmoe.errors import OptionError
from ggufmoe.gguf.header import padded
from ggufmoe.gguf.hyper import largest
from ggufmoe.gguf.model import ModelHeader
from ggufmoe.gguf.names import EXPERTS_PATTERN, experts_pattern
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native.wording import CPU_BACKEND, is_repack_buffer, mapped_buffer, repack_buffer
from ggufmoe.options import ALL_LAYERS, AUTO_LAYERS, ContextOptions, OffloadOptions
from ggufmoe.placement.footprint import Footprint, WeightTensor
from ggufmoe.sizes import all_experts_run, counted, memory_size

_MIB = 2**20
_ROWS_ON_GPU = {"F32", "F16", "BF16", "I32", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}
"""Types of which GPU backends can take single rows, as the embedding needs; the others stay in plain memory."""


@dataclass(frozen=True)
class Place:
    """A device that layers can go to. ``host_buffer`` names the main memory that it can read by itself, if any.

    ``maps_files``: weights of a mapped file need no copy for it. ``alignment``: of tensors in its buffer, in bytes.
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
    """The CPU's memory; ``repacked`` gives the types that its backend rearranges, each with the rows it takes at once.

    Zero bytes mean that the memory is not known.
    """

    free_bytes: int = 0
    total_bytes: int = 0
    repacked: Mapping[GGMLType, int] = field(default_factory=dict)
    name: str = CPU_BACKEND
    alignment: int = 32


@dataclass(frozen=True)
class BufferOverride:
    """Tensors that go elsewhere than their layer: a pattern of their names, the buffer, and how many they are."""

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
    """What one device gets. ``compute_bytes`` is an estimate, the other two are exact for plain transformers.

    ``layers`` counts from 0, and the number of layers stands for the output; ``expert_layers`` are those whose experts
    it holds.
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
        """Weights in all of its buffers."""
        return sum(buffer.n_bytes for buffer in self.buffers)

    @property
    def n_bytes(self) -> int:
        """All that it needs."""
        return self.weight_bytes + self.kv_bytes + self.compute_bytes


@dataclass(frozen=True)
class OffloadPlan:
    """Where everything goes, and the settings of libllama that bring it there; the CPU's share is the last.

    ``tensor_split`` has a number for each GPU (empty without any), ``overrides`` are in the order in which the first
    match wins. ``fitted``: some of it was chosen so that it fits. ``is_exact``: the prediction can be held against
    libllama's report; it cannot where rows or tensors are cut over several GPUs.
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


def plan_offload(
    model: ModelHeader, context: ContextOptions, offload: OffloadOptions, devices: Sequence[Place], host: HostMemory
) -> OffloadPlan:
    """Plan a model onto ``devices``, of which ``offload.device`` and ``offload.main_gpu`` may leave some out.

    With ``offload.fit``, what was not given explicitly is chosen: dense parts and KV cache of as many layers as fit go
    to the GPUs first, then experts as far as memory goes, those of the first layers staying with the CPU.

    Raises OptionError for devices, buffers and layers that are not there, for patterns that match no tensor, and for
    expert options that the model cannot follow.
    """
    facts = Footprint(model, context, offload)
    chosen = chosen_devices(offload, devices)
    setting = _Setting(facts, offload, chosen, host)
    choice = _choose(setting)
    return _plan(setting, choice)


def chosen_devices(offload: OffloadOptions, devices: Sequence[Place]) -> tuple[Place, ...]:
    """The devices that ``--device``, ``--split-mode none`` and ``--main-gpu`` leave. Raises OptionError."""
    chosen = tuple(devices)
    if offload.device is not None:
        names = [] if offload.device == "none" else offload.device.split(",")
        chosen = tuple(_named(name, devices) for name in names)
    if offload.split_mode == "none" and chosen:
        if offload.main_gpu >= len(chosen):
            raise OptionError(f"--main-gpu {offload.main_gpu}: there are {len(chosen)} devices, counted from 0")
        chosen = (chosen[offload.main_gpu],)
    if offload.split_mode == "tensor" and not chosen:
        raise OptionError("--split-mode tensor needs a GPU, and there is none")
    shares = offload.split_shares
    if shares is not None and chosen and (len(shares) > len(chosen) or not any(shares)):
        raise OptionError(f"--tensor-split {offload.tensor_split}: {len(shares)} shares for {len(chosen)} devices")
    return chosen


def _named(name: str, devices: Sequence[Place]) -> Place:
    for device in devices:
        if device.name == name:
            return device
    raise OptionError(f"--device {name}: there is no such device; there is {_listed(d.name for d in devices)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


@dataclass(frozen=True)
class _Choice:
    """``n_moved``: experts of so many first layers stay with the CPU, where no explicit override says otherwise."""

    n_gpu_layers: int
    split: tuple[float, ...]
    n_moved: int
    fitted: bool
    failed: bool = False


class _Setting:
    """Model, options and devices together: the questions that have one answer whatever is chosen."""

    def __init__(self, facts: Footprint, offload: OffloadOptions, devices: tuple[Place, ...], host: HostMemory) -> None:
        self.facts = facts
        self.offload = offload
        self.devices = devices
        self.host = host
        self.uses_mmap = offload.load_mode in ("mmap", "mmap+mlock") or (
            offload.load_mode == "auto" and all(device.supports_mmap for device in devices)
        )
        pinned = next((device.host_buffer for device in devices if device.host_buffer), None)
        self.pinned = None if offload.no_host or self.uses_mmap else pinned
        self.skips_repack = not offload.repack or (pinned is not None and not offload.no_host)
        self.patterns = self._patterns()

    def _patterns(self) -> tuple[tuple[re.Pattern[str], str], ...]:
        pairs = [(pattern, buffer, f"-ot {pattern}={buffer}") for pattern, buffer in self.offload.overrides]
        if self.offload.cpu_moe:
            pairs.append((EXPERTS_PATTERN, self.host.name, "--cpu-moe"))
        if self.offload.n_cpu_moe:
            pattern = experts_pattern(range(min(self.offload.n_cpu_moe, self.facts.n_layer)))
            pairs.append((pattern, self.host.name, f"--n-cpu-moe {self.offload.n_cpu_moe}"))
        buffers = {device.name: device.buffer for device in self.devices}
        named = [(pattern, buffers.get(buffer, buffer), flag) for pattern, buffer, flag in pairs]
        return tuple((self._checked(pattern, buffer, flag), buffer) for pattern, buffer, flag in named)

    def _checked(self, pattern: str, buffer: str, flag: str) -> re.Pattern[str]:
        where = f"{self.facts.model.paths[0]}: {flag}"
        if buffer not in self.buffers:
            raise OptionError(f"{where}: there is no buffer {buffer}; there is {_listed(self.buffers)}")
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise OptionError(f"{where}: not a regular expression: {error}") from error
        if any(compiled.search(name) for name in self.facts.names):
            return compiled
        if pattern not in dict(self.offload.overrides):
            raise OptionError(f"{where}: the model has no experts to keep in the CPU's memory")
        near = difflib.get_close_matches(pattern.replace("\\", ""), set(self.facts.names), n=3, cutoff=0.3)
        raise OptionError(f"{where}: matches no tensor; near names: {_listed(near)}")

    @property
    def buffers(self) -> tuple[str, ...]:
        """Names of the buffers that an override may name."""
        names = [self.host.name, *(device.buffer for device in self.devices)]
        return tuple(dict.fromkeys([*names, *(device.host_buffer for device in self.devices if device.host_buffer)]))

    def explicit(self, tensor: WeightTensor) -> str | None:
        """The buffer that an explicit override names for a tensor."""
        return next((buffer for pattern, buffer in self.patterns if pattern.search(tensor.name)), None)

    def host_buffer(self, tensor: WeightTensor) -> str:
        """The buffer in main memory that libllama takes for a tensor."""
        if self.pinned and (tensor.layer != -1 or tensor.type.name in _ROWS_ON_GPU):
            return self.pinned
        rows = self.host.repacked.get(tensor.type, 0)
        if tensor.is_product and rows and tensor.shape[-2] % rows == 0 and not self.skips_repack:
            return repack_buffer(self.host.name)
        return self.host.name


def _choose(setting: _Setting) -> _Choice:
    offload, n_all = setting.offload, setting.facts.n_layer + 1
    given = offload.n_gpu_layers
    n_gpu_layers = min(given, n_all) if given >= 0 else n_all
    split = _default_split(setting)
    plain = _Choice(n_gpu_layers, split, 0, fitted=False)
    if not setting.devices or offload.fit == "off" or offload.split_mode in ("row", "tensor"):
        return plain
    experts_given = offload.cpu_moe or offload.n_cpu_moe is not None
    if (given >= 0 or given == ALL_LAYERS) and (experts_given or not setting.facts.n_expert):
        return plain
    return _fit(setting, plain, layers_given=given >= 0 or given == ALL_LAYERS, experts_given=experts_given)


def _default_split(setting: _Setting) -> tuple[float, ...]:
    devices, shares = setting.devices, setting.offload.split_shares
    if shares is not None:
        return (*shares, *[0.0] * (len(devices) - len(shares)))[: len(devices)]
    free = tuple(float(device.free_bytes or setting.host.free_bytes) for device in devices)
    return free if any(free) else (1.0,) * len(devices)


def _fit(setting: _Setting, plain: _Choice, *, layers_given: bool, experts_given: bool) -> _Choice:
    """The first of these that fits: fewer experts on the GPUs layer by layer, then fewer layers."""
    can_move = bool(setting.facts.n_expert) and not experts_given
    most_moved = setting.facts.n_layer if can_move else 0
    candidates = [(plain.n_gpu_layers, n_moved) for n_moved in range(most_moved + 1)]
    if not layers_given:
        candidates += [(n, most_moved) for n in range(plain.n_gpu_layers - 1, -1, -1)]
    costs = _Costs(setting)
    for n_gpu_layers, n_moved in candidates:
        splits = [plain.split]
        if len(setting.devices) > 1 and setting.offload.split_shares is None:
            splits.append(costs.filled(n_gpu_layers, n_moved))
        for split in splits:
            if split and costs.fits(n_gpu_layers, n_moved, split):
                return _Choice(n_gpu_layers, split, n_moved, fitted=(n_gpu_layers, n_moved, split) != _key(plain))
    return replace(plain, n_moved=most_moved, fitted=bool(most_moved), failed=True)


def _key(choice: _Choice) -> tuple[int, int, tuple[float, ...]]:
    return choice.n_gpu_layers, choice.n_moved, choice.split


class _Costs:
    """Bytes of each layer, and of what explicit overrides put on each device."""

    def __init__(self, setting: _Setting) -> None:
        facts = setting.facts
        self._setting = setting
        self._dense = [*facts.kv_layers, 0] if setting.offload.kv_offload else [0] * (facts.n_layer + 1)
        self._experts = [0] * (facts.n_layer + 1)
        fixed = dict.fromkeys((device.buffer for device in setting.devices), 0)
        # llama.cpp copies the experts of a large batch to the GPU that computes their layer
        largest = max((tensor.n_bytes for tensor in facts.tensors if tensor.is_expert), default=0)
        for tensor in facts.tensors:
            buffer = setting.explicit(tensor)
            if buffer is not None:
                fixed[buffer] = fixed.get(buffer, 0) + tensor.n_bytes
            elif tensor.layer is not None and tensor.layer >= 0:
                (self._experts if tensor.is_expert else self._dense)[tensor.layer] += tensor.n_bytes
        target = setting.offload.fit_target * _MIB
        self._budgets = [
            device.free_bytes - target - facts.compute_bytes - fixed[device.buffer] for device in setting.devices
        ]
        self._copied = 2 * largest

    def _layers(self, n_gpu_layers: int, n_moved: int) -> list[int]:
        first = len(self._dense) - n_gpu_layers
        return [
            self._dense[layer] + (0 if layer < n_moved else self._experts[layer])
            for layer in range(first, len(self._dense))
        ]

    def _budget(self, device: int, n_moved: int) -> int:
        return self._budgets[device] - (self._copied if n_moved else 0)

    def fits(self, n_gpu_layers: int, n_moved: int, split: tuple[float, ...]) -> bool:
        used = [0] * len(self._budgets)
        for layer, n_bytes in enumerate(self._layers(n_gpu_layers, n_moved)):
            used[_device_of(layer, n_gpu_layers, split)] += n_bytes
        return all(n <= self._budget(device, n_moved) for device, n in enumerate(used) if n)

    def filled(self, n_gpu_layers: int, n_moved: int) -> tuple[float, ...]:
        """Layers for each device when each takes as many as it can; empty where not all find room."""
        layers = self._layers(n_gpu_layers, n_moved)
        counts, position = [], 0
        for device in range(len(self._budgets)):
            start, left = position, self._budget(device, n_moved)
            while position < len(layers) and layers[position] <= left:
                left -= layers[position]
                position += 1
            counts.append(float(position - start))
        return tuple(counts) if position == len(layers) and any(counts) else ()


def _device_of(position: int, n_gpu_layers: int, split: Sequence[float]) -> int:
    """The device of the ``position``-th offloaded layer, in libllama's arithmetic (float, so that edges agree)."""
    sums = list(accumulate(map(_float32, split), lambda a, b: _float32(a + b)))
    place = _float32(position / n_gpu_layers)
    ends = (_float32(total / sums[-1]) for total in sums)
    return next((device for device, end in enumerate(ends) if end > place), len(sums) - 1)


def _float32(number: float) -> float:
    return float(struct.unpack("f", struct.pack("f", number))[0])


@dataclass(frozen=True)
class _Placed:
    tensor: WeightTensor
    buffer: str


class _Placing:
    """Every tensor's buffer, for one choice."""

    def __init__(self, setting: _Setting, choice: _Choice) -> None:
        self.setting = setting
        self.choice = choice
        n_all = setting.facts.n_layer + 1
        first = n_all - choice.n_gpu_layers
        self.devices: list[int | None] = [None] * n_all
        if setting.devices:
            for layer in range(first, n_all):
                self.devices[layer] = _device_of(layer - first, choice.n_gpu_layers, choice.split)
        self.moved = range(max(first, 0), choice.n_moved)
        self.tensors = tuple(dict.fromkeys(self._placed()))

    def _placed(self) -> Iterator[_Placed]:
        for tensor in self.setting.facts.tensors:
            if tensor.layer is None:
                for device in dict.fromkeys(self.devices[:-1]):
                    yield _Placed(tensor, self._buffer(tensor, device))
            else:
                yield _Placed(tensor, self._buffer(tensor, None if tensor.layer < 0 else self.devices[tensor.layer]))

    def _buffer(self, tensor: WeightTensor, device: int | None) -> str:
        setting = self.setting
        explicit = setting.explicit(tensor)
        if explicit is None and tensor.is_expert and tensor.layer in self.moved:
            explicit = setting.host.name
        if explicit == setting.host.name or (explicit is None and device is None):
            return setting.host_buffer(tensor)
        if explicit is not None:
            pinned = [device.host_buffer for device in setting.devices]
            return setting.host.name if setting.uses_mmap and explicit in pinned else explicit
        assert device is not None, "without a device the host's buffer is taken"
        return setting.devices[device].buffer

    def overrides(self) -> tuple[BufferOverride, ...]:
        """The explicit ones first, then the experts that were moved; each with the tensors that it is the first for."""
        setting = self.setting
        patterns = list(setting.patterns)
        if self.moved:
            patterns.append((re.compile(experts_pattern(self.moved)), setting.host.name))
        counts = [0] * len(patterns)
        for name in dict.fromkeys(setting.facts.names):
            hit = next((index for index, (pattern, _) in enumerate(patterns) if pattern.search(name)), None)
            if hit is not None:
                counts[hit] += 1
        return tuple(
            BufferOverride(pattern.pattern, buffer, count)
            for (pattern, buffer), count in zip(patterns, counts, strict=True)
        )

    def buffer_shares(self, names: Sequence[str], *, can_map: bool, alignment: int) -> tuple[BufferShare, ...]:
        """What lies in the buffers ``names``, of which the first is mapped if anything is."""
        shares = []
        for name in names:
            tensors = _once(placed.tensor for placed in self.tensors if placed.buffer == name)
            if tensors:
                is_mapped = can_map and self.setting.uses_mmap and name == names[0]
                n_bytes = _mapped_bytes(tensors) if is_mapped else sum(padded(t.n_bytes, alignment) for t in tensors)
                shares.append(BufferShare(mapped_buffer(name) if is_mapped else name, n_bytes, is_mapped))
        return tuple(shares)


def _once(tensors: Iterable[WeightTensor]) -> list[WeightTensor]:
    """Without those that are there already under the same name: tied weights are shared within a buffer."""
    return list({tensor.name: tensor for tensor in tensors}.values())


def _mapped_bytes(tensors: Sequence[WeightTensor]) -> int:
    """From the first to the last byte of them, in each file."""
    total = 0
    for shard in {tensor.shard for tensor in tensors}:
        here = [tensor for tensor in tensors if tensor.shard == shard]
        total += max(t.offset + t.n_bytes for t in here) - min(t.offset for t in here)
    return total


def _plan(setting: _Setting, choice: _Choice) -> OffloadPlan:
    placing = _Placing(setting, choice)
    facts, offload = setting.facts, setting.offload
    shares = (*(_gpu_share(placing, index) for index in range(len(setting.devices))), _host_share(placing))
    plan = OffloadPlan(
        shares=shares,
        n_layer=facts.n_layer,
        n_gpu_layers=choice.n_gpu_layers,
        tensor_split=choice.split,
        overrides=placing.overrides(),
        n_ctx=facts.n_ctx,
        n_expert=facts.n_expert,
        n_expert_used=facts.n_expert_used,
        uses_mmap=setting.uses_mmap,
        fitted=choice.fitted,
        is_exact=offload.split_mode in ("none", "layer"),
    )
    return replace(plan, warnings=tuple(_warnings(plan, setting, choice)), notes=tuple(_notes(plan, setting)))


def _gpu_share(placing: _Placing, index: int) -> DeviceShare:
    facts, device = placing.setting.facts, placing.setting.devices[index]
    layers = tuple(layer for layer, where in enumerate(placing.devices) if where == index)
    buffers = placing.buffer_shares([device.buffer], can_map=device.maps_files, alignment=device.alignment)
    copied = _copied_bytes(placing, layers)
    return DeviceShare(
        device=device.name,
        free_bytes=device.free_bytes,
        total_bytes=device.total_bytes,
        buffers=buffers,
        kv_bytes=_kv_bytes(placing, layers) if placing.setting.offload.kv_offload else 0,
        compute_bytes=facts.compute_bytes + copied if buffers or layers else 0,
        layers=layers,
        expert_layers=_expert_layers(placing, {device.buffer}),
    )


def _host_share(placing: _Placing) -> DeviceShare:
    setting, facts = placing.setting, placing.setting.facts
    layers = tuple(layer for layer, where in enumerate(placing.devices) if where is None)
    pinned = [device.host_buffer for device in setting.devices if device.host_buffer]
    names = [setting.host.name, repack_buffer(setting.host.name), *dict.fromkeys(pinned)]
    expert_layers = _expert_layers(placing, set(names))
    kv_layers = layers if setting.offload.kv_offload else range(facts.n_layer)
    return DeviceShare(
        device=setting.host.name,
        free_bytes=setting.host.free_bytes,
        total_bytes=setting.host.total_bytes,
        buffers=placing.buffer_shares(names, can_map=True, alignment=setting.host.alignment),
        kv_bytes=_kv_bytes(placing, kv_layers),
        compute_bytes=facts.compute_bytes if layers or expert_layers else facts.host_compute_bytes,
        layers=layers,
        expert_layers=expert_layers,
    )


def _copied_bytes(placing: _Placing, layers: Sequence[int]) -> int:
    """Room for experts of the CPU's memory that a GPU computes for large batches: two tensors of its layers."""
    on_gpu = {device.buffer for device in placing.setting.devices}
    away = [
        placed.tensor.n_bytes
        for placed in placing.tensors
        if placed.tensor.is_expert and placed.tensor.layer in layers and placed.buffer not in on_gpu
    ]
    return 2 * max(away, default=0)


def _kv_bytes(placing: _Placing, layers: Iterable[int]) -> int:
    by_layer = placing.setting.facts.kv_layers
    return sum(by_layer[layer] for layer in layers if layer < len(by_layer))


def _expert_layers(placing: _Placing, buffers: set[str]) -> tuple[int, ...]:
    found = {placed.tensor.layer for placed in placing.tensors if placed.tensor.is_expert and placed.buffer in buffers}
    return tuple(sorted(layer for layer in found if layer is not None))


def _warnings(plan: OffloadPlan, setting: _Setting, choice: _Choice) -> Iterator[str]:
    facts, offload = setting.facts, setting.offload
    made_for = largest(facts.hyper.n_expert_used)
    if plan.n_expert_used != made_for:
        effect = "faster, and the answers are worse" if plan.n_expert_used < made_for else "slower, and not as trained"
        yield f"{counted(plan.n_expert_used, 'expert')} for each token instead of {made_for}: {effect}"
    n_trained, n_asked = facts.n_ctx_train, facts.context.n_ctx or 0
    if n_asked > n_trained * facts.context.n_seq_max:
        yield f"a context of {n_asked} tokens is longer than the {n_trained} that the model was trained for"
    about_gpus = {
        "-ngl": offload.n_gpu_layers not in (AUTO_LAYERS, 0),
        "-ts": offload.tensor_split is not None,
        "-mg": offload.main_gpu != 0,
    }
    if not setting.devices and any(about_gpus.values()):
        given = " and ".join(flag for flag, is_given in about_gpus.items() if is_given)
        yield f"{given} without effect: no GPU and no worker is used, the CPU computes all layers (see ggufmoe doctor)"
    if choice.failed:
        yield "it does not fit with the options given: try fewer layers on the GPU, or a smaller context"
    for share in plan.shares[:-1]:
        if not share.layers and not share.total_bytes and choice.fitted:
            yield f"{share.device} does not say how much memory it has: give it layers with -ngl"
        if share.n_bytes > share.free_bytes > 0:
            yield f"{share.device} has {memory_size(share.free_bytes)} free and would need {memory_size(share.n_bytes)}"


def _notes(plan: OffloadPlan, setting: _Setting) -> Iterator[str]:
    facts, host = setting.facts, plan.host
    if plan.n_expert:
        yield _expert_note(plan)
    if plan.fitted and setting.offload.fit_target:
        left = memory_size(setting.offload.fit_target * _MIB)
        yield f"{left} of each GPU are left free: --fit-target takes another number"
    if plan.uses_mmap and any(override.buffer == host.device for override in plan.overrides):
        yield "what is kept with the CPU lies in the mapped file: with memory to spare, -lm none makes it faster"
    repacked = sum(buffer.n_bytes for buffer in host.buffers if is_repack_buffer(buffer.name))
    is_short = 0 < host.total_bytes < host.n_bytes
    if is_short:
        yield f"the CPU's memory is {memory_size(host.total_bytes)}, and {memory_size(host.n_bytes)} are wanted of it"
    if repacked and plan.uses_mmap:
        way_out = "leave it out with --no-repack" if is_short else "--no-repack leaves it out"
        copy = f"{memory_size(repacked)} are a copy of weights, rearranged for this CPU"
        yield f"{copy} beside the mapped file: {way_out}"
    if not facts.hyper.has_plain_cache:
        architecture = facts.hyper.architecture
        yield f"the KV cache of {architecture} is not that of a plain transformer: its size is an upper estimate"
    if not plan.is_exact:
        yield f"--split-mode {setting.offload.split_mode} cuts tensors: what each GPU gets is an estimate"


def _expert_note(plan: OffloadPlan) -> str:
    if plan.n_expert_used == plan.n_expert:
        return (
            f"{all_experts_run(plan.n_expert)} for every token: keeping them in the CPU's memory "
            "saves memory of the GPU, but no arithmetic"
        )
    return (
        f"{plan.n_expert_used} of {plan.n_expert} experts run for every token: in the CPU's memory only "
        f"{plan.n_expert_used / plan.n_expert:.0%} of their bytes are read for it"
    )
