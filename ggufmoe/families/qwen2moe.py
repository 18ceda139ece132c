"""Qwen2-MoE: Qwen2 whose feed-forward part is a router, a stack of experts, and a shared expert with a gate of its own.

Source: ``conversion/qwen.py`` and ``src/models/qwen2moe.cpp`` at the pinned llama.cpp; defaults from transformers'
configuration_qwen2_moe.py, 5.24.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ggufmoe.families.family import (
    BIAS,
    ConfigKey,
    HyperParameter,
    Kind,
    MergeTarget,
    SharedExperts,
    StoredLayout,
)
from ggufmoe.families.llama import FAMILY as LLAMA
from ggufmoe.families.mistral import FAMILY as MISTRAL
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.qwen2 import FAMILY as QWEN2
from ggufmoe.families.standard import (
    NORMS,
    attention,
    common_parameters,
    decoder,
    dense_layers,
    experts,
    fused_experts,
    narrow_heads,
    not_rescaled,
    rescaled_weights,
    shared_experts,
    size_of,
)
from ggufmoe.gguf.upstream import MODEL_ARCH, Keys
from ggufmoe.gguf.values import u32

_EXPERT_WIDTH, _SHARED_WIDTH, _BIAS = "moe_intermediate_size", "shared_expert_intermediate_size", "qkv_bias"
_EXPERTS = experts(size_of(_EXPERT_WIDTH))
_ATTENTION = tuple(
    replace(rule, where=lambda config, _: config.flag(_BIAS)) if rule.suffix == BIAS else rule
    for rule in attention(biases="qkv")
)


_REFUSAL = rescaled_weights("qwen2moe")
_RESCALED = replace(
    _REFUSAL,
    expected=f"{_REFUSAL.expected}; a merge can be made anew from its recipe, without prompts for the shared expert",
)


def _merged_config(base: ModelConfig, n_expert: int, n_expert_used: int) -> dict[str, Any]:
    return {
        "num_experts": n_expert,
        "num_experts_per_tok": n_expert_used,
        _EXPERT_WIDTH: base.n_ff,
        _SHARED_WIDTH: base.n_ff,
        _BIAS: base.architecture == QWEN2.architecture,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _obstacle(base: ModelConfig, n_expert: int, n_expert_used: int) -> str:
    if n_expert_used < n_expert:
        return (
            "the weights of the chosen experts are to add up to one, and llama.cpp's qwen2moe graph does not rescale "
            "them, so that it would answer as another model; take the prompts of the shared expert away (it is then "
            f"added as it is), or set experts_per_token to {n_expert}, all experts"
        )
    if base.rope_scaling.kind == "llama3":
        return "llama.cpp's qwen2moe graph does not take the factors of rope type llama3"
    return narrow_heads(base, n_expert, n_expert_used)


FAMILY = replace(
    QWEN2,
    architectures=("Qwen2MoeForCausalLM",),
    model_types=("qwen2_moe",),
    arch=MODEL_ARCH.QWEN2MOE,
    tensors=decoder(
        *NORMS,
        *_ATTENTION,
        *_EXPERTS,
        *shared_experts(size_of(_SHARED_WIDTH), module="mlp.shared_expert", gate="mlp.shared_expert_gate"),
    ),
    hyper_parameters=(
        *common_parameters(),
        HyperParameter(Keys.LLM.EXPERT_FEED_FORWARD_LENGTH, u32, size_of(_EXPERT_WIDTH)),
        HyperParameter(Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH, u32, size_of(_SHARED_WIDTH)),
    ),
    defaults={
        **QWEN2.defaults,
        "num_key_value_heads": 16,
        "num_local_experts": 60,
        "num_experts_per_tok": 4,
        _EXPERT_WIDTH: 1408,
        _SHARED_WIDTH: 5632,
    },
    aliases={"num_local_experts": ("num_experts",)},
    keys=(ConfigKey(_EXPERT_WIDTH), ConfigKey(_SHARED_WIDTH), ConfigKey(_BIAS, Kind.FLAG, True)),
    refusals=(
        *QWEN2.refusals,
        _RESCALED,
        *dense_layers("qwen2moe"),
    ),
    layouts=(StoredLayout("classic"), fused_experts("fused", "mlp", _EXPERTS)),
    arithmetic=not_rescaled,
    stored_values=None,
    own_output=True,
    merge=MergeTarget(
        "Qwen MoE",
        (QWEN2.architecture, LLAMA.architecture, MISTRAL.architecture),
        _merged_config,
        also_called=("Qwen2 MoE",),
        shared=SharedExperts.GATED,
        obstacle=_obstacle,
    ),
)
