"""Which file types of a model fit this machine, with what context and at what speed, and which one to take.

Works on headers, those of files and those that conversions would write; ``model_advice`` gets them. Sizes are exact,
memory is that of ``placement``, and speeds follow from what the engine was measured to do with weights of each type: a
token reads every weight that it uses once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ggufmoe.errors import EngineMissingError, InputError
from ggufmoe.gguf.hyper import largest
from ggufmoe.gguf.model import ModelHeader
from ggufmoe.gguf.types import GGMLType
from ggufmoe.options import ContextOptions, OffloadOptions
from ggufmoe.placement.devices import find_devices
from ggufmoe.placement.footprint import Footprint
from ggufmoe.placement.memory_speed import MeasuredSpeeds, Speeds
from ggufmoe.placement.offload import plan_offload
from ggufmoe.placement.offload_plan import HostMemory, OffloadPlan, Place
from ggufmoe.store.wanted import planned_model
from ggufmoe.work import memory_bytes

if TYPE_CHECKING:
    from ggufmoe.writing.plan import WritePlan

_CONTEXTS = (1 << 20, 1 << 18, 1 << 17, 1 << 16, 1 << 15, 1 << 14, 1 << 13, 1 << 12, 1 << 11)
_USABLE_SHARE = 0.8
"""Of the main memory: the rest is the system's and that of other programs."""
_LEAST_BITS, _MOST_BITS = 2.5, 9.0
"""Bits per weight: fewer cost much of the model, and those above Q8_0 gain next to nothing."""
_DENSE_STEPS, _MOE_STEPS = 20, 30
"""Steps of llama.cpp's graph in a layer, about: of Llama and of Mixtral."""
_KV_TYPE = GGMLType.F16
_LOADED_COST = 1.4
"""Time of a token in a loaded model over that of its products by themselves; docs/models.md has the measurement."""
_WANTED_CONTEXT = 8192
_WANTED_TOKENS_PER_S = 8.0
"""About as fast as people read."""


@dataclass(frozen=True)
class Machine:
    """What a model is placed on: GPUs, main memory, and how fast its CPU computes with weights."""

    devices: tuple[Place, ...]
    host: HostMemory
    speeds: Speeds

    @property
    def usable_bytes(self) -> int:
        """Main memory that a model may take."""
        return int(_USABLE_SHARE * (self.host.total_bytes or memory_bytes()))


@dataclass(frozen=True)
class TypeAdvice:
    """One file type of a model on one machine. ``tokens_per_s`` is None where the CPU computes no layer."""

    file_type: str
    n_bytes: int
    bits_per_weight: float
    n_ctx: int
    """The longest context that fits: what the model was trained for, a power of two from 2048, or what is asked for; 0
    if none does."""
    gpu_bytes: int
    memory_bytes: int
    """Main memory with the context that is asked for, or 4096 tokens."""
    tokens_per_s: float | None
    """In an empty context."""
    tokens_per_s_full: float | None
    """When the context that is asked for, or 4096 tokens, is full."""
    is_taken: bool = False

    @property
    def fits(self) -> bool:
        """Whether the model can be used."""
        return self.n_ctx > 0

    def to_dict(self) -> dict[str, Any]:
        """The advice as plain values for JSON."""
        return {**asdict(self), "fits": self.fits}


def advise_types(
    plans: Mapping[str, WritePlan],
    machine: Machine,
    context: ContextOptions | None = None,
    offload: OffloadOptions | None = None,
) -> tuple[TypeAdvice, ...]:
    """What each of ``plans``, by file type from the best to the smallest, means for this machine.

    Taken is the best type that fits with 8192 tokens of context (or those that the model was trained for, or that are
    asked for) and generates at least 8 tokens a second; else the fastest that fits.
    """
    return advise_models({name: planned_model(plan) for name, plan in plans.items()}, machine, context, offload)


def advise_models(
    models: Mapping[str, ModelHeader],
    machine: Machine,
    context: ContextOptions | None = None,
    offload: OffloadOptions | None = None,
) -> tuple[TypeAdvice, ...]:
    """``advise_types`` for files, by their types.

    Of types beyond 2.5 to 9 bits per weight one is taken only where none between them fits.
    """
    context, offload = context or ContextOptions(), offload or OffloadOptions()
    found = [_advice(name, model, machine, context, offload) for name, model in models.items()]
    usual = [one for one in found if _LEAST_BITS <= one.bits_per_weight <= _MOST_BITS]
    taken = _taken(usual, context) or _taken(found, context)
    return tuple(replace(one, is_taken=one is taken) for one in found)


def take_type(advice: Iterable[TypeAdvice], what: str) -> str:
    """The type that is taken. Raises InputError if none fits."""
    for one in advice:
        if one.is_taken:
            return one.file_type
    raise InputError(f"{what} does not fit this machine's memory in any file type; `ggufmoe plan` shows the sizes")


def _taken(found: Sequence[TypeAdvice], context: ContextOptions) -> TypeAdvice | None:
    fitting = [one for one in found if one.fits]
    longest = max((one.n_ctx for one in fitting), default=0)
    wanted = min(context.n_ctx or _WANTED_CONTEXT, longest)
    for one in fitting:
        if one.n_ctx >= wanted and (one.tokens_per_s is None or one.tokens_per_s >= _WANTED_TOKENS_PER_S):
            return one
    speeds = [(one.tokens_per_s or float("inf"), one) for one in fitting if one.n_ctx >= wanted]
    return max(speeds, key=lambda pair: pair[0])[1] if speeds else None


def _advice(
    name: str, model: ModelHeader, machine: Machine, context: ContextOptions, offload: OffloadOptions
) -> TypeAdvice:
    placed = plan_offload(model, context, offload, machine.devices, machine.host)
    footprint = Footprint(model, context, offload)
    empty_s = _token_s(footprint, placed, machine.speeds)
    full_s = empty_s + _attention_s(footprint, placed, machine.speeds)
    return TypeAdvice(
        file_type=name,
        n_bytes=model.file_bytes,
        bits_per_weight=round(_bits_per_weight(model), 2),
        n_ctx=_longest_context(model, footprint.n_ctx_train, machine, context, offload),
        gpu_bytes=sum(share.n_bytes for share in placed.shares[:-1]),
        memory_bytes=_needed(model, placed),
        tokens_per_s=1 / empty_s if empty_s else None,
        tokens_per_s_full=1 / full_s if empty_s else None,
    )


def _bits_per_weight(model: ModelHeader) -> float:
    n_weights = sum(tensor.n_elements for tensor in model.tensors)
    return 8 * sum(tensor.n_bytes for tensor in model.tensors) / max(n_weights, 1)


def _longest_context(
    model: ModelHeader, n_trained: int, machine: Machine, context: ContextOptions, offload: OffloadOptions
) -> int:
    asked_for = (context.n_ctx or n_trained) // context.n_seq_max
    lengths = sorted({n_trained, asked_for, *(n for n in _CONTEXTS if n < n_trained)}, reverse=True)
    for n_ctx in lengths:
        asked = replace(context, n_ctx=n_ctx * context.n_seq_max)
        placed = plan_offload(model, asked, offload, machine.devices, machine.host)
        if _fits(model, placed, machine):
            return n_ctx
    return 0


def _fits(model: ModelHeader, placed: OffloadPlan, machine: Machine) -> bool:
    on_gpus = all(share.n_bytes <= share.free_bytes for share in placed.shares[:-1] if share.free_bytes)
    return on_gpus and _needed(model, placed) <= machine.usable_bytes


def _needed(model: ModelHeader, placed: OffloadPlan) -> int:
    """Bytes of main memory that the CPU's part takes for good.

    Weights are counted once: those that the CPU's backend rearranges lie in the mapped file as well, whose pages the
    system gives up when memory is short.
    """
    weights = sum(tensor.n_bytes for tensor in model.tensors) - sum(share.weight_bytes for share in placed.shares[:-1])
    return max(weights, 0) + placed.host.kv_bytes + placed.host.compute_bytes


def _token_s(footprint: Footprint, placed: OffloadPlan, speeds: Speeds) -> float:
    """Seconds that the CPU computes for a token in an empty context: of experts as many as are used; 0 for no layer."""
    host = placed.host
    read: dict[GGMLType, float] = {}
    for tensor in footprint.tensors:
        share = placed.n_expert_used / max(placed.n_expert, 1) if tensor.is_expert else 1.0
        if tensor.layer in (host.expert_layers if tensor.is_expert else host.layers):
            read[tensor.type] = read.get(tensor.type, 0.0) + share * tensor.n_bytes
    n_layers = len({*host.layers, *host.expert_layers} - {placed.n_layer})
    steps = n_layers * (_MOE_STEPS if placed.n_expert else _DENSE_STEPS)
    products_s = sum(n_bytes / speeds.bytes_per_s(kind) for kind, n_bytes in read.items())
    return _LOADED_COST * (products_s + steps * speeds.step_s)


def _attention_s(footprint: Footprint, placed: OffloadPlan, speeds: Speeds) -> float:
    """Seconds that the CPU needs for a token to attend to a full context: each head goes through keys and values."""
    if not placed.host.kv_bytes:
        return 0.0
    n_heads_of_kv = largest(footprint.hyper.n_head) / max(largest(footprint.hyper.n_head_kv), 1)
    return _LOADED_COST * placed.host.kv_bytes * n_heads_of_kv / speeds.bytes_per_s(_KV_TYPE)


def this_machine() -> Machine:
    """The devices of this machine; without llama.cpp its memory alone."""
    try:
        table = find_devices()
    except EngineMissingError:
        return Machine((), HostMemory(), MeasuredSpeeds())
    return Machine(table.places, table.host, MeasuredSpeeds())
