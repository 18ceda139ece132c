"""GLM-4.5, 4.6 and 4.7, and the Airs: experts chosen as in DeepSeek-V3, and layers that predict further tokens.

Source: ``conversion/glm.py``, ``_set_vocab_glm`` of ``conversion/base.py`` and ``src/models/glm4-moe.cpp`` at the
pinned llama.cpp; defaults from transformers' configuration_glm4_moe.py, 5.23. Layers of multi-token prediction follow
the others under the next numbers; llama.cpp loads them where it is asked to, transformers neither runs nor saves them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ggufmoe.errors import CheckpointError
from ggufmoe.families.config_reader import ConfigReader
from ggufmoe.families.deepseek_v2 import (
    DENSE_LAYERS,
    EXPERT_WIDTH,
    FEED_FORWARD,
    GROUPS,
    HAS_EXPERTS,
    N_SHARED,
    RESCALED,
    ROUTING,
    ROUTING_KEYS,
    STORED_LAYOUTS,
    WEIGHT_SCALE,
    check_routing,
)
from ggufmoe.families.family import (
    BIAS,
    Arithmetic,
    ConfigKey,
    Family,
    HyperParameter,
    Kind,
    Refusal,
    Routing,
    Scoring,
    TensorRule,
    TokenizerRules,
    always,
)
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.standard import (
    NORMS,
    attention,
    choice_bias,
    common_parameters,
    decoder,
    head_dim,
    matrix,
    n_embd,
    n_vocab,
    only_silu,
    rotated_pairs,
    rotated_width,
    size_of,
    unexpressed,
    vector,
)
from ggufmoe.gguf.upstream import MODEL_ARCH, MODEL_TENSOR, ExpertGatingFuncType, Keys
from ggufmoe.gguf.values import boolean, u32

_FURTHER, _BIAS, _HEAD_NORMS = "num_nextn_predict_layers", "attention_bias", "use_qk_norm"


def _n_blocks(config: ModelConfig) -> int:
    return config.n_layer + config.size(_FURTHER)


def _is_further(config: ModelConfig, layer: int) -> bool:
    return layer >= config.n_layer


def _further(tensor: Any, name: str, shape: Any, *, optional: Any = None) -> TensorRule:
    """A tensor that only layers of multi-token prediction have."""
    rule = TensorRule(tensor, f"model.layers.{{layer}}.{name}.weight", shape, where=_is_further)
    return rule if optional is None else replace(rule, optional=optional)


_ATTENTION = tuple(
    replace(rule, where=lambda config, _: config.flag(_BIAS))
    if rule.suffix == BIAS
    else replace(rule, where=lambda config, _: config.flag(_HEAD_NORMS))
    if rule.tensor in (MODEL_TENSOR.ATTN_Q_NORM, MODEL_TENSOR.ATTN_K_NORM)
    else rule
    for rule in attention(biases="qkv", qk_norm=head_dim)
)
_PREDICTION = (
    _further(MODEL_TENSOR.NEXTN_EH_PROJ, "eh_proj", matrix(n_embd, lambda config: 2 * config.n_embd)),
    _further(MODEL_TENSOR.NEXTN_ENORM, "enorm", vector(n_embd)),
    _further(MODEL_TENSOR.NEXTN_HNORM, "hnorm", vector(n_embd)),
    _further(MODEL_TENSOR.NEXTN_EMBED_TOKENS, "embed_tokens", matrix(n_vocab, n_embd), optional=always),
    _further(MODEL_TENSOR.NEXTN_SHARED_HEAD_HEAD, "shared_head.head", matrix(n_vocab, n_embd), optional=always),
    _further(MODEL_TENSOR.NEXTN_SHARED_HEAD_NORM, "shared_head.norm", vector(n_embd), optional=always),
)


def _check(reader: ConfigReader, config: ModelConfig) -> None:
    check_routing(reader, config, "glm4moe")
    rotated_pairs(reader, config)


def _arithmetic(config: ModelConfig) -> Arithmetic:
    if (config.values["n_group"] or 1) > 1:
        raise CheckpointError("hidden states cannot be computed with groups of experts (n_group)")
    scale, rescaled = config.number(WEIGHT_SCALE), config.flag(RESCALED)
    return Arithmetic(routing=Routing(Scoring.SIGMOID, normalized=rescaled, scale=scale))


FAMILY = Family(
    architectures=("Glm4MoeForCausalLM",),
    model_types=("glm4_moe",),
    arch=MODEL_ARCH.GLM4_MOE,
    tensors=decoder(
        NORMS[0],
        *_ATTENTION,
        replace(NORMS[1], tensor=MODEL_TENSOR.ATTN_POST_NORM),
        *FEED_FORWARD,
        choice_bias(where=HAS_EXPERTS),
        *_PREDICTION,
    ),
    hyper_parameters=(
        *common_parameters(),
        *GROUPS,
        HyperParameter(Keys.LLM.BLOCK_COUNT, u32, _n_blocks),
        HyperParameter(Keys.Rope.DIMENSION_COUNT, u32, rotated_width),
        *ROUTING,
        HyperParameter(Keys.LLM.EXPERT_GATING_FUNC, u32, lambda config: ExpertGatingFuncType.SIGMOID.value),
        HyperParameter(Keys.LLM.EXPERT_WEIGHTS_NORM, boolean, lambda config: config.flag(RESCALED)),
        HyperParameter(Keys.LLM.NEXTN_PREDICT_LAYERS, u32, size_of(_FURTHER)),
    ),
    defaults={
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "num_key_value_heads": 8,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        EXPERT_WIDTH: 1408,
        N_SHARED: 1,
        DENSE_LAYERS: 1,
        "n_group": 1,
        "topk_group": 1,
        WEIGHT_SCALE: 1.0,
        RESCALED: True,
        _FURTHER: 1,
    },
    aliases={"num_local_experts": ("n_routed_experts", "num_experts"), _FURTHER: ("num_mtp_layers",)},
    keys=(
        *ROUTING_KEYS,
        ConfigKey(_FURTHER, Kind.COUNT, 0),
        ConfigKey(_BIAS, Kind.FLAG, False),
        ConfigKey(_HEAD_NORMS, Kind.FLAG, False),
    ),
    refusals=(
        only_silu(),
        Refusal("scoring_func", ("sigmoid", None), "'sigmoid', which GLM-4.5 scores experts by"),
        Refusal("topk_method", ("noaux_tc", None), "'noaux_tc', the way in which GLM-4.5 chooses experts"),
    ),
    check=_check,
    rotary_fraction=0.5,
    layouts=STORED_LAYOUTS,
    n_blocks=_n_blocks,
    may_lack_blocks=True,
    unexpressed=unexpressed,
    arithmetic=_arithmetic,
    tokenizer=TokenizerRules(
        special_tokens={"bos": "[gMASK]", "eot": "<|user|>", "unk": "<|endoftext|>", "eom": "<|observation|>"},
        pre_tokenizer="glm4",
    ),
)
