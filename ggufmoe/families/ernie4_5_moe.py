"""ERNIE-4.5-MoE: experts and shared ones after some dense layers, chosen with a bias.

Source: ``conversion/ernie.py`` and ``src/models/ernie4-5-moe.cpp`` at the pinned llama.cpp; defaults from transformers'
configuration_ernie4_5_moe.py, 5.23. The width of the shared experts is the configuration's; the converter divides
``intermediate_size`` by the number of key-value heads, which gives the same for the published models.
"""

from __future__ import annotations

import re
from dataclasses import replace

from ggufmoe.families.config_reader import ConfigReader
from ggufmoe.families.family import (
    BIAS,
    ConfigKey,
    Family,
    HyperParameter,
    Kind,
    Refusal,
    Shape,
    SkippedTensors,
    StoredLayout,
    TensorRule,
    TokenizerRules,
)
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.standard import (
    NORMS,
    WHY_FURTHER_TOKENS_ARE_SKIPPED,
    attention,
    common_parameters,
    decoder,
    experts,
    feed_forward,
    fused_experts,
    layers_before,
    layers_from,
    no_bias,
    only_silu,
    shared_experts,
    size_of,
    unexpressed,
)
from ggufmoe.gguf.upstream import MODEL_ARCH, MODEL_TENSOR, Keys
from ggufmoe.gguf.values import u32

_EXPERT_WIDTH, _N_SHARED = "moe_intermediate_size", "moe_num_shared_experts"
_FIRST, _LAST, _INTERVAL, _NORM_MIN = (
    f"moe_{word}" for word in ("layer_start_index", "layer_end_index", "layer_interval", "norm_min")
)
_LEAST_SUM = 6.103515625e-5
"""What llama.cpp divides the chosen weights by where their sum is less."""
_MTP = re.compile(r"model\.mtp_(block|emb_norm|hidden_norm|linear_proj)\.")
_MLP = "model.layers.{layer}.mlp."
_HAS_EXPERTS = layers_from(_FIRST)
_EXPERTS = experts(size_of(_EXPERT_WIDTH), where=_HAS_EXPERTS)


def _shared_width(config: ModelConfig) -> int:
    return config.size(_N_SHARED) * config.size(_EXPERT_WIDTH)


def _has_shared(config: ModelConfig, layer: int) -> bool:
    return config.size(_N_SHARED) > 0 and _HAS_EXPERTS(config, layer)


def _one_row(config: ModelConfig) -> Shape:
    return 1, config.n_expert


_CHOICE_BIAS = TensorRule(
    MODEL_TENSOR.FFN_EXP_PROBS_B,
    f"{_MLP}moe_statics.e_score_correction_bias",
    _one_row,
    suffix=BIAS,
    where=_HAS_EXPERTS,
)
_FUSED = fused_experts("fused", "mlp", _EXPERTS)


def _check(reader: ConfigReader, config: ModelConfig) -> None:
    last = reader.value(_LAST)
    if last is not None and (type(last) is not int or -1 != last < config.n_layer - 1):
        raise reader.error(_LAST, "-1 or the last layer: llama.cpp's graph has experts in all layers after the first")
    if config.number(_NORM_MIN) > _LEAST_SUM:
        raise reader.error(_NORM_MIN, f"at most {_LEAST_SUM}, which llama.cpp computes with")


FAMILY = Family(
    architectures=("Ernie4_5_MoeForCausalLM",),
    model_types=("ernie4_5_moe",),
    arch=MODEL_ARCH.ERNIE4_5_MOE,
    tensors=decoder(
        *NORMS,
        *attention(),
        *feed_forward(where=layers_before(_FIRST)),
        *_EXPERTS,
        _CHOICE_BIAS,
        *shared_experts(_shared_width, where=_has_shared),
    ),
    hyper_parameters=(
        *common_parameters(),
        HyperParameter(Keys.LLM.INTERLEAVE_MOE_LAYER_STEP, u32, size_of(_INTERVAL)),
        HyperParameter(Keys.LLM.LEADING_DENSE_BLOCK_COUNT, u32, size_of(_FIRST)),
        HyperParameter(Keys.LLM.EXPERT_FEED_FORWARD_LENGTH, u32, size_of(_EXPERT_WIDTH)),
        HyperParameter(Keys.LLM.EXPERT_SHARED_COUNT, u32, size_of(_N_SHARED)),
        HyperParameter(Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH, u32, lambda config: _shared_width(config) or None),
    ),
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5e5,
        "tie_word_embeddings": True,
        "num_local_experts": 64,
        "num_experts_per_tok": 6,
        _EXPERT_WIDTH: 1536,
        _N_SHARED: 2,
        _FIRST: 1,
        _INTERVAL: 1,
        _NORM_MIN: 1e-12,
    },
    aliases={"num_local_experts": ("moe_num_experts", "num_experts"), "num_experts_per_tok": ("moe_k",)},
    keys=(
        ConfigKey(_EXPERT_WIDTH),
        ConfigKey(_N_SHARED, Kind.COUNT),
        ConfigKey(_FIRST, Kind.COUNT),
        ConfigKey(_INTERVAL),
        ConfigKey(_NORM_MIN, Kind.NUMBER),
    ),
    refusals=(
        only_silu(),
        no_bias("use_bias"),
        Refusal(_INTERVAL, (1,), "1: llama.cpp needs experts in every layer after the first ones"),
    ),
    check=_check,
    layouts=(
        StoredLayout("classic"),
        replace(
            _FUSED,
            renamed={**_FUSED.renamed, _CHOICE_BIAS.hf: f"{_MLP}gate.moe_statics.e_score_correction_bias"},
        ),
    ),
    skipped=(
        SkippedTensors(
            lambda config, name: _MTP.match(name) is not None,
            WHY_FURTHER_TOKENS_ARE_SKIPPED,
        ),
    ),
    unexpressed=unexpressed,
    arithmetic=None,
    tokenizer=TokenizerRules(as_llama=True),
)
