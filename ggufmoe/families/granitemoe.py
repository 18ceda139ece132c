"""Granite-MoE, with shared experts or without: Granite with a router and experts in every layer.

Source: ``conversion/granite.py`` and ``src/models/granite-moe.cpp`` at the pinned llama.cpp; defaults from
transformers' configuration_granitemoe.py and configuration_granitemoeshared.py, 5.24. Checkpoints hold gate and up of
all experts in one tensor and call it ``input_linear``; transformers 5 has other names for it in memory.
"""

from __future__ import annotations

from dataclasses import replace

from ggufmoe.families.family import ConfigKey, FusedTensor, HyperParameter, Kind, StoredLayout
from ggufmoe.families.granite import FAMILY as GRANITE
from ggufmoe.families.llama import ATTENTION
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.standard import decoder, experts, shared_experts, size_of
from ggufmoe.gguf.upstream import MODEL_ARCH, Keys
from ggufmoe.gguf.values import u32

_SHARED_WIDTH = "shared_intermediate_size"
_MODULE, _SHARED_MODULE = "model.layers.{layer}.block_sparse_moe", "model.layers.{layer}.shared_mlp"
_EXPERTS = experts(module="block_sparse_moe")
_SHARED = shared_experts(
    size_of(_SHARED_WIDTH), where=lambda config, _: config.size(_SHARED_WIDTH) > 0, module="shared_mlp"
)


def _layout(name: str, router: str, gate_up: str, down: str) -> StoredLayout:
    """Names in the module of the experts; shared experts have one name in all versions."""
    stored_router, *matrices = (rule.hf for rule in _EXPERTS)
    shared_gate, shared_up, shared_down = (rule.hf for rule in _SHARED)
    return StoredLayout(
        name,
        {stored_router: f"{_MODULE}.{router}.weight", shared_down: f"{_SHARED_MODULE}.output_linear.weight"},
        (
            FusedTensor(f"{_MODULE}.{gate_up}", tuple(matrices[:2])),
            FusedTensor(f"{_MODULE}.{down}", tuple(matrices[2:])),
            FusedTensor(f"{_SHARED_MODULE}.input_linear.weight", (shared_gate, shared_up)),
        ),
    )


def _shared_width(config: ModelConfig) -> int | None:
    return config.size(_SHARED_WIDTH) or None


FAMILY = replace(
    GRANITE,
    architectures=("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
    model_types=("granitemoe", "granitemoeshared"),
    arch=MODEL_ARCH.GRANITE_MOE,
    tensors=decoder(*ATTENTION, *_EXPERTS, *_SHARED),
    hyper_parameters=(
        *GRANITE.hyper_parameters,
        HyperParameter(Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH, u32, _shared_width),
    ),
    defaults={**GRANITE.defaults, "num_local_experts": 8, "num_experts_per_tok": 2},
    keys=(*GRANITE.keys, ConfigKey(_SHARED_WIDTH, Kind.COUNT, 0)),
    layouts=(
        _layout("classic", "router.layer", "input_linear.weight", "output_linear.weight"),
        _layout("fused", "router", "experts.gate_up_proj", "experts.down_proj"),
    ),
)
