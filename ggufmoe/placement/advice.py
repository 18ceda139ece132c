"""What to tell the user about an offload plan: warnings, and notes with the flags that would change it."""

from __future__ import annotations

from collections.abc import Iterator

from ggufmoe.gguf.hyper import largest
from ggufmoe.options import AUTO_LAYERS
from ggufmoe.placement.fitting import LayerChoice
from ggufmoe.placement.footprint import Footprint, context_tokens
from ggufmoe.placement.offload_plan import OffloadPlan
from ggufmoe.placement.rules import PlacementRules
from ggufmoe.sizes import all_experts_run, counted, memory_size

_MIB = 2**20


def warnings_of(plan: OffloadPlan, rules: PlacementRules, choice: LayerChoice) -> Iterator[str]:
    """Warnings for the user: options that have no effect, lower the quality, or do not fit the memory."""
    footprint, offload = rules.footprint, rules.offload
    made_for = largest(footprint.hyper.n_expert_used)
    if plan.n_expert_used != made_for:
        effect = "faster, and the answers are worse" if plan.n_expert_used < made_for else "slower, and not as trained"
        yield f"{counted(plan.n_expert_used, 'expert')} for each token instead of {made_for}: {effect}"
    yield from context_warnings(footprint)
    about_gpus = {
        "-ngl": offload.n_gpu_layers not in (AUTO_LAYERS, 0),
        "-ts": offload.tensor_split is not None,
        "-mg": offload.main_gpu != 0,
    }
    if not rules.devices and any(about_gpus.values()):
        given = " and ".join(flag for flag, is_given in about_gpus.items() if is_given)
        yield f"{given} without effect: no GPU and no worker is used, the CPU computes all layers (see ggufmoe doctor)"
    if choice.failed:
        yield "it does not fit with the options given: try fewer layers on the GPU, or a smaller context"
    for share in plan.shares[:-1]:
        if not share.layers and not share.total_bytes and choice.fitted:
            yield f"{share.device} does not say how much memory it has: give it layers with -ngl"
        if share.n_bytes > share.free_bytes > 0:
            yield f"{share.device} has {memory_size(share.free_bytes)} free and would need {memory_size(share.n_bytes)}"


def context_warnings(footprint: Footprint) -> Iterator[str]:
    """Warnings about positions at which the model is not what it was trained to be."""
    context, n_trained, window = footprint.context, footprint.n_ctx_train, footprint.hyper.unapplied_window
    n_asked = (context.n_ctx or 0) // context.n_seq_max
    if n_asked > n_trained:
        yield f"a context of {n_asked} tokens is longer than the {n_trained} that the model was trained for"
    if window is not None and context_tokens(context, n_trained) > window * context.n_seq_max:
        yield (
            f"each token of the original model attends to the last {window} tokens only, and llama.cpp has no such "
            f"window for this one: past position {window} the answers are another model's; --ctx-size {window} ends "
            "there"
        )


def notes_of(plan: OffloadPlan, rules: PlacementRules) -> Iterator[str]:
    """Facts about a plan that help the user choose, with the flags that change it."""
    footprint, host = rules.footprint, plan.host
    if plan.n_expert:
        yield _expert_note(plan)
    if plan.fitted and rules.offload.fit_target:
        left = memory_size(rules.offload.fit_target * _MIB)
        yield f"{left} of each GPU are left free: --fit-target takes another number"
    if plan.uses_mmap and any(override.buffer == host.device for override in plan.overrides):
        yield "what is kept with the CPU lies in the mapped file: with memory to spare, -lm none makes it faster"
    is_short = 0 < host.total_bytes < host.n_bytes
    if is_short:
        yield f"the CPU's memory is {memory_size(host.total_bytes)}, and {memory_size(host.n_bytes)} are wanted of it"
    if host.repacked_bytes and plan.uses_mmap:
        way_out = "leave it out with --no-repack" if is_short else "--no-repack leaves it out"
        copy = f"{memory_size(host.repacked_bytes)} are a copy of weights, rearranged for this CPU"
        yield f"{copy} beside the mapped file: {way_out}"
    yield from _memory_notes(footprint)
    if not plan.is_exact:
        yield f"--split-mode {rules.offload.split_mode} cuts tensors: what each GPU gets is an estimate"


def _memory_notes(footprint: Footprint) -> Iterator[str]:
    memory, n_layer = footprint.model.memory, footprint.n_layer
    if not memory.is_exact:
        architecture = footprint.hyper.architecture
        yield f"the KV cache of {architecture} is not that of a plain transformer: its size is an upper estimate"
    if memory.n_windowed and footprint.saved_by_windows:
        saved = memory_size(footprint.saved_by_windows)
        yield (
            f"{memory.n_windowed} of {n_layer} layers keep only the last {memory.window} tokens and those being "
            f"computed: --swa-full keeps all, which takes {saved} more and lets any earlier part of a text be continued"
        )
    if memory.n_recurrent:
        size = memory_size(footprint.state_bytes)
        yield (
            f"{memory.n_recurrent} of {n_layer} layers keep a state of fixed size, {size} in all: a text can be "
            "continued at its end, and at the ends of earlier prompts"
        )


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
