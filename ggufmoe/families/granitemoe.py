"""Granite-MoE, with shared experts or without: Granite with a router and experts in every layer.

Source: ``conversion/granite.py`` and ``src/models/granite-moe.cpp`` at the pinned llama.cpp; defaults from
transformers' configuration_granitemoe.py and configuration_granitemoeshared.py, 5.24. Checkpoints hold gate and up of
all experts in one tensor and call it ``input_linear``; transformers 5 has other names for it in memory.

Recipes over Llama and Mistral with a shared expert become one, with factors of a Llama: the graph computes what
mergekit's DeepSeek mixture means (``norm_topk_prob``, a shared expert without a gate), and llama.cpp's deepseek graph
does not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ggufmoe.families.family import (
    ConfigKey,
    FusedTensor,
    HyperParameter,
    Kind,
    MergeTarget,
    SharedExperts,
    StoredLayout,
)
from ggufmoe.families.granite import FAMILY as GRANITE
from ggufmoe.families.llama import ATTENTION
from ggufmoe.families.llama import FAMILY as LLAMA
from ggufmoe.families.mistral import FAMILY as MISTRAL
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.standard import decoder, experts, narrow_heads, shared_experts, size_of, stated_window
from ggufmoe.gguf.upstream import MODEL_ARCH, Keys
from ggufmoe.gguf.values import u32

_SHARED_WIDTH = "shared_intermediate_size"
_WITH_SHARED = "GraniteMoeSharedForCausalLM"
_MODULE, _SHARED_MODULE = "model.layers.{layer}.block_sparse_moe", "model.layers.{layer}.shared_mlp"
EXPERTS = experts(module="block_sparse_moe")
SHARED = shared_experts(
    size_of(_SHARED_WIDTH), where=lambda config, _: config.size(_SHARED_WIDTH) > 0, module="shared_mlp"
)


def _layout(name: str, router: str, gate_up: str, down: str) -> StoredLayout:
    """Names in the module of the experts; shared experts have one name in all versions."""
    stored_router, *matrices = (rule.hf for rule in EXPERTS)
    shared_gate, shared_up, shared_down = (rule.hf for rule in SHARED)
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


def merged_config(base: ModelConfig, n_expert: int, n_expert_used: int) -> dict[str, Any]:
    """A ``MergeTarget.config``: Granite's factors are those that a Llama has, one and the root of the head size."""
    return {
        "architectures": [_WITH_SHARED],
        "model_type": "granitemoeshared",
        "num_local_experts": n_expert,
        "num_experts_per_tok": n_expert_used,
        _SHARED_WIDTH: base.n_ff,
        "attention_multiplier": base.head_dim**-0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


FAMILY = replace(
    GRANITE,
    architectures=("GraniteMoeForCausalLM", _WITH_SHARED),
    model_types=("granitemoe", "granitemoeshared"),
    arch=MODEL_ARCH.GRANITE_MOE,
    tensors=decoder(*ATTENTION, *EXPERTS, *SHARED),
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
    # of a mixture of Mistral models; Granite has none
    sliding_window=stated_window,
    merge=MergeTarget(
        "DeepSeek MoE",
        (LLAMA.architecture, MISTRAL.architecture),
        merged_config,
        also_called=("Granite MoE",),
        shared=SharedExperts.PLAIN,
        obstacle=narrow_heads,
    ),
)
