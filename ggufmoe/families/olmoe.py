"""OLMoE: experts in every layer, with norms over all heads of queries and of keys at once.

Source: ``conversion/olmo.py`` and ``src/models/olmoe.cpp`` at the pinned llama.cpp; defaults from transformers'
configuration_olmoe.py, 5.24. The converter writes a norm epsilon of 1e-5, which is transformers' default, whatever the
configuration says; here it is the configuration's.
"""

from __future__ import annotations

from ggufmoe.families.config_reader import ConfigReader
from ggufmoe.families.family import Family, Refusal, StoredLayout, TokenizerRules
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.standard import (
    NORMS,
    attention,
    common_parameters,
    decoder,
    experts,
    fused_experts,
    heads_of_whole_width,
    n_embd,
    no_bias,
    not_rescaled,
    only_silu,
    rescaled_weights,
    unexpressed,
)
from ggufmoe.gguf.upstream import MODEL_ARCH

_EXPERTS = experts()


def _check(reader: ConfigReader, config: ModelConfig) -> None:
    heads_of_whole_width(reader, config)
    if config.n_head_kv != config.n_head:
        raise reader.error("num_key_value_heads", "num_attention_heads: llama.cpp's olmoe graph has a norm that wide")


FAMILY = Family(
    architectures=("OlmoeForCausalLM",),
    model_types=("olmoe",),
    arch=MODEL_ARCH.OLMOE,
    tensors=decoder(*NORMS, *attention(qk_norm=n_embd), *_EXPERTS),
    hyper_parameters=common_parameters(),
    defaults={
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "num_local_experts": 64,
        "num_experts_per_tok": 8,
    },
    aliases={"num_local_experts": ("num_experts",)},
    refusals=(
        only_silu(),
        no_bias("attention_bias"),
        Refusal("clip_qkv", (None,), "null: llama.cpp's olmoe graph does not clip queries, keys and values"),
        rescaled_weights("olmoe"),
    ),
    check=_check,
    layouts=(StoredLayout("classic"), fused_experts("fused", "mlp", _EXPERTS)),
    unexpressed=unexpressed,
    arithmetic=not_rescaled,
    stored_values={},
    own_output=True,
    tokenizer=TokenizerRules(pre_tokenizer="olmo"),
)
