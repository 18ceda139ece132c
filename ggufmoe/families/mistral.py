"""Mistral: Llama with a sliding window, which llama.cpp does not apply.

Source: ``conversion/llama.py`` at the pinned llama.cpp; defaults from transformers' configuration_mistral.py, 5.12.
"""

from __future__ import annotations

from dataclasses import replace

from ggufmoe.families.llama import FAMILY as LLAMA
from ggufmoe.families.standard import stated_window

FAMILY = replace(
    LLAMA,
    architectures=("MistralForCausalLM",),
    model_types=("mistral",),
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "sliding_window": 4096,
    },
    sliding_window=stated_window,
)
