"""Qwen3.5 and Qwen3.6 without experts, the language model alone: Qwen3.5-MoE with one feed-forward part in each layer.

Source: ``conversion/qwen.py`` and ``src/models/qwen35.cpp`` at the pinned llama.cpp; defaults from transformers'
configuration_qwen3_5.py, 5.24.
"""

from __future__ import annotations

from dataclasses import replace

from ggufmoe.families.family import StoredLayout
from ggufmoe.families.qwen3next import DEFAULTS, KEYS, hybrid_decoder, hybrid_parameters
from ggufmoe.families.qwen35moe import FAMILY as QWEN35_MOE
from ggufmoe.families.qwen35moe import LINEAR, SECTIONS
from ggufmoe.families.standard import common_parameters, feed_forward, head_dim
from ggufmoe.gguf.upstream import MODEL_ARCH

FAMILY = replace(
    QWEN35_MOE,
    architectures=("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),
    model_types=("qwen3_5", "qwen3_5_text"),
    arch=MODEL_ARCH.QWEN35,
    tensors=hybrid_decoder(LINEAR, feed_forward()),
    hyper_parameters=hybrid_parameters(*common_parameters(head_size=head_dim), SECTIONS),
    defaults={**DEFAULTS, "intermediate_size": 12288, "num_key_value_heads": 4},
    aliases={},
    keys=KEYS,
    layouts=(StoredLayout("classic"),),
)
