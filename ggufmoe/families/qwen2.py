"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values.

Source: ``conversion/qwen.py`` and ``src/models/qwen2.cpp`` at the pinned llama.cpp; defaults from transformers'
configuration_qwen2.py, 5.23.
"""

from __future__ import annotations

from ggufmoe.families.config_reader import ConfigReader
from ggufmoe.families.family import Family
from ggufmoe.families.standard import (
    NORMS,
    attention,
    common_parameters,
    decoder,
    feed_forward,
    heads_of_whole_width,
    only_silu,
    unexpressed,
    window_note,
)
from ggufmoe.gguf.upstream import MODEL_ARCH

DEFAULTS = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "sliding_window": 4096,
}


def switched_window(reader: ConfigReader) -> int | None:
    """A ``Family.sliding_window``: the one that the configuration states, where ``use_sliding_window`` is true."""
    return reader.optional_size("sliding_window") if reader.flag("use_sliding_window") else None


FAMILY = Family(
    architectures=("Qwen2ForCausalLM",),
    model_types=("qwen2",),
    arch=MODEL_ARCH.QWEN2,
    tensors=decoder(*NORMS, *attention(biases="qkv"), *feed_forward()),
    hyper_parameters=common_parameters(),
    defaults=DEFAULTS,
    refusals=(only_silu(),),
    check=heads_of_whole_width,
    sliding_window=switched_window,
    own_keys=window_note,
    unexpressed=unexpressed,
    stored_values={},
)
