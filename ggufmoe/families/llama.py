"""Llama, and what every family of llama.cpp's ``llama`` architecture has in common.

Source: ``conversion/llama.py`` at the pinned llama.cpp; defaults from transformers' configuration_llama.py, 5.12.
"""

from __future__ import annotations

from ggufmoe.families.family import Family, HyperParameter, TokenizerRules
from ggufmoe.families.rope_keys import llama3_rope_table
from ggufmoe.families.standard import (
    NORMS,
    attention,
    common_parameters,
    decoder,
    feed_forward,
    head_dim,
    n_vocab,
    no_bias,
    one_kind_of_layers,
    only_silu,
    unexpressed,
    window_note,
)
from ggufmoe.gguf.upstream import MODEL_ARCH, Keys
from ggufmoe.gguf.values import u32

ATTENTION = (*NORMS, *attention(rope_order=True))

LLAMA_KEYS = (
    HyperParameter(Keys.LLM.VOCAB_SIZE, u32, n_vocab),
    HyperParameter(Keys.Rope.DIMENSION_COUNT, u32, head_dim),
)
"""The keys that ``LlamaModel.set_gguf_parameters`` adds."""

REFUSALS = (only_silu(), no_bias("attention_bias"), no_bias("mlp_bias"))

FAMILY = Family(
    architectures=("LlamaForCausalLM", "LLaMAForCausalLM"),
    model_types=("llama",),
    arch=MODEL_ARCH.LLAMA,
    tensors=decoder(*ATTENTION, *feed_forward()),
    # transformers always knows the size of a head of a dense model
    hyper_parameters=(*common_parameters(head_size=head_dim), *LLAMA_KEYS),
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
    refusals=REFUSALS,
    check=one_kind_of_layers,
    computed=llama3_rope_table,
    own_keys=window_note,
    unexpressed=unexpressed,
    stored_values={},
    tokenizer=TokenizerRules(as_llama=True),
)
