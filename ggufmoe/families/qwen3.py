"""Qwen3: Llama with a norm over each head of queries and keys.

Source: ``conversion/qwen.py`` and ``src/models/qwen3.cpp`` at the pinned llama.cpp; defaults from transformers'
configuration_qwen3.py, 5.23.
"""

from __future__ import annotations

from ggufmoe.families.family import Family
from ggufmoe.families.qwen2 import DEFAULTS, switched_window
from ggufmoe.families.standard import (
    NORMS,
    attention,
    common_parameters,
    decoder,
    feed_forward,
    head_dim,
    no_bias,
    one_kind_of_layers,
    only_silu,
    unexpressed,
    window_note,
)
from ggufmoe.gguf.upstream import MODEL_ARCH

ATTENTION = (*NORMS, *attention(qk_norm=head_dim))

FAMILY = Family(
    architectures=("Qwen3ForCausalLM",),
    model_types=("qwen3",),
    arch=MODEL_ARCH.QWEN3,
    tensors=decoder(*ATTENTION, *feed_forward()),
    hyper_parameters=common_parameters(head_size=head_dim),
    defaults={**DEFAULTS, "head_dim": 128},
    refusals=(only_silu(), no_bias("attention_bias")),
    check=one_kind_of_layers,
    sliding_window=switched_window,
    own_keys=window_note,
    unexpressed=unexpressed,
    stored_values={},
)
