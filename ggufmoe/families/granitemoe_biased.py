"""Granite-MoE with biases on queries, keys and values: recipes over Qwen2 with a shared expert, as GGUF files alone.

llama.cpp's ``granitemoe`` graph adds the biases where a file has them. transformers' Granite-MoE has none, so the names
below are ours and no checkpoint has them. Source: ``src/models/granite-moe.cpp`` at the pinned llama.cpp.
"""

from __future__ import annotations

from dataclasses import replace

from ggufmoe.families.family import MergeTarget, SharedExperts, StoredLayout, TokenizerRules
from ggufmoe.families.granitemoe import EXPERTS, SHARED, merged_config
from ggufmoe.families.granitemoe import FAMILY as GRANITE_MOE
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.qwen2 import FAMILY as QWEN2
from ggufmoe.families.standard import NORMS, attention, decoder

_ARCHITECTURE, _MODEL_TYPE = "GraniteMoeWithBiasesForCausalLM", "granitemoe_with_biases"


def _merged_config(base: ModelConfig, n_expert: int, n_expert_used: int) -> dict[str, object]:
    config = merged_config(base, n_expert, n_expert_used)
    return {**config, "architectures": [_ARCHITECTURE], "model_type": _MODEL_TYPE}


FAMILY = replace(
    GRANITE_MOE,
    architectures=(_ARCHITECTURE,),
    model_types=(_MODEL_TYPE,),
    tensors=decoder(*NORMS, *attention(rope_order=True, biases="qkv"), *EXPERTS, *SHARED),
    layouts=(StoredLayout("classic"),),
    merge=MergeTarget(
        "DeepSeek MoE with biases",
        (QWEN2.architecture,),
        _merged_config,
        also_called=("Granite MoE with biases",),
        shared=SharedExperts.PLAIN,
        only_gguf="transformers' Granite-MoE has no biases on queries, keys and values and would drop the base's",
    ),
    # the tokenizer is a Qwen2's, which the converter writes without LlamaModel.set_vocab
    tokenizer=TokenizerRules(),
)
