"""Mixtral with biases on queries, keys and values: what recipes over Qwen2 and Qwen2.5 become, as GGUF files alone.

llama.cpp's ``llama`` graph adds the biases where a file has them. transformers' Mixtral has none, so the names below
are ours and no checkpoint has them. Source: ``conversion/llama.py``, which reorders the rows of these biases with those
of the weights, and ``src/models/llama.cpp`` at the pinned llama.cpp.
"""

from __future__ import annotations

from dataclasses import replace

from ggufmoe.families.family import MergeTarget, StoredLayout, TokenizerRules
from ggufmoe.families.mixtral import EXPERTS, merged_config
from ggufmoe.families.mixtral import FAMILY as MIXTRAL
from ggufmoe.families.qwen2 import FAMILY as QWEN2
from ggufmoe.families.standard import NORMS, attention, decoder

FAMILY = replace(
    MIXTRAL,
    architectures=("MixtralWithBiasesForCausalLM",),
    model_types=("mixtral_with_biases",),
    tensors=decoder(*NORMS, *attention(rope_order=True, biases="qkv"), *EXPERTS),
    layouts=(StoredLayout("classic"),),
    merge=MergeTarget(
        "Mixtral with biases",
        (QWEN2.architecture,),
        merged_config,
        only_gguf="transformers' Mixtral has no biases on queries, keys and values and would drop those of the base, "
        "and llama.cpp computes its Qwen2-MoE differently",
    ),
    # the tokenizer is a Qwen2's, which the converter writes without LlamaModel.set_vocab
    tokenizer=TokenizerRules(),
)
