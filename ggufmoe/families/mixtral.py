"""Mixtral: Mistral whose feed-forward part is a router and a stack of experts.

Source: ``conversion/llama.py`` at the pinned llama.cpp; defaults from transformers' configuration_mixtral.py, 5.12.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ggufmoe.families.family import MergeTarget, StoredLayout
from ggufmoe.families.llama import ATTENTION, LLAMA_KEYS
from ggufmoe.families.llama import FAMILY as LLAMA
from ggufmoe.families.mistral import FAMILY as MISTRAL
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.standard import GATE_UP_DOWN, common_parameters, decoder, experts, fused_experts

_MODULE, _WORDS = "block_sparse_moe", ("w1", "w3", "w2")
EXPERTS = experts(module=_MODULE, words=_WORDS)


def _one_by_one(module: str, words: tuple[str, str, str]) -> StoredLayout:
    """One tensor for each matrix of an expert, in a module and words that some versions of transformers write."""
    stored = experts(module=module, words=words)
    return StoredLayout("classic", {rule.hf: other.hf for rule, other in zip(EXPERTS, stored, strict=True)})


def merged_config(base: ModelConfig, n_expert: int, n_expert_used: int) -> dict[str, Any]:
    """A ``MergeTarget.config``: the number of experts, and of those used for a token."""
    return {"num_local_experts": n_expert, "num_experts_per_tok": n_expert_used}


FAMILY = replace(
    MISTRAL,
    architectures=("MixtralForCausalLM",),
    model_types=("mixtral",),
    tensors=decoder(*ATTENTION, *EXPERTS),
    hyper_parameters=(*common_parameters(), *LLAMA_KEYS),
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    aliases={"num_local_experts": ("num_experts",)},
    layouts=(
        _one_by_one(_MODULE, _WORDS),
        _one_by_one("mlp", _WORDS),
        _one_by_one(_MODULE, GATE_UP_DOWN),
        _one_by_one("mlp", GATE_UP_DOWN),
        fused_experts("fused", _MODULE, EXPERTS),
        fused_experts("fused", _MODULE, EXPERTS, stored=_MODULE),
    ),
    stored_values={},
    # a DeepSeek mixture without a shared expert, as mergekit makes it, computes the same
    merge=MergeTarget(
        "Mixtral", (LLAMA.architecture, MISTRAL.architecture), merged_config, also_called=("DeepSeek MoE",)
    ),
)
