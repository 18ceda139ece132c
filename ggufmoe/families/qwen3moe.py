"""Qwen3-MoE: Qwen3 whose feed-forward part is a router and a stack of experts, in every layer.

Source: ``conversion/qwen.py`` and ``src/models/qwen3moe.cpp`` at the pinned llama.cpp; defaults from transformers'
configuration_qwen3_moe.py, 5.23.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ggufmoe.families.family import ConfigKey, HyperParameter, MergeTarget, StoredLayout
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.qwen2 import DEFAULTS
from ggufmoe.families.qwen3 import ATTENTION
from ggufmoe.families.qwen3 import FAMILY as QWEN3
from ggufmoe.families.standard import (
    common_parameters,
    decoder,
    dense_layers,
    experts,
    fused_experts,
    size_of,
    unrescaled_weights,
)
from ggufmoe.gguf.upstream import MODEL_ARCH, Keys
from ggufmoe.gguf.values import u32

_EXPERT_WIDTH = "moe_intermediate_size"
_EXPERTS = experts(size_of(_EXPERT_WIDTH))


def _merged_config(base: ModelConfig, n_expert: int, n_expert_used: int) -> dict[str, Any]:
    return {
        "num_experts": n_expert,
        "num_experts_per_tok": n_expert_used,
        _EXPERT_WIDTH: base.n_ff,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


FAMILY = replace(
    QWEN3,
    architectures=("Qwen3MoeForCausalLM",),
    model_types=("qwen3_moe",),
    arch=MODEL_ARCH.QWEN3MOE,
    tensors=decoder(*ATTENTION, *_EXPERTS),
    hyper_parameters=(
        *common_parameters(),
        HyperParameter(Keys.LLM.EXPERT_FEED_FORWARD_LENGTH, u32, size_of(_EXPERT_WIDTH)),
    ),
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 4,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        _EXPERT_WIDTH: 768,
        "norm_topk_prob": False,
    },
    aliases={"num_local_experts": ("num_experts",)},
    keys=(ConfigKey(_EXPERT_WIDTH),),
    refusals=(
        *QWEN3.refusals,
        unrescaled_weights("qwen3moe"),
        *dense_layers("qwen3moe"),
    ),
    layouts=(StoredLayout("classic"), fused_experts("fused", "mlp", _EXPERTS)),
    stored_values={_EXPERT_WIDTH: Keys.LLM.EXPERT_FEED_FORWARD_LENGTH},
    merge=MergeTarget("Qwen3 MoE", (QWEN3.architecture,), _merged_config),
)
