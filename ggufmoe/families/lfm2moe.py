"""LFM2-MoE: short convolutions in most layers and attention in the others, and experts after some dense layers.

A convolution keeps its last few inputs in place of keys and values. Experts are scored by sigmoids and chosen with a
bias. llama.cpp calls the final norm ``token_embd_norm``. Source: ``conversion/lfm2.py``, ``src/models/lfm2.cpp`` and
``src/models/lfm2moe.cpp`` at the pinned llama.cpp; defaults from transformers' configuration_lfm2_moe.py, 5.23.
"""

from __future__ import annotations

from dataclasses import replace

from ggufmoe.families.config_reader import ConfigReader
from ggufmoe.families.family import (
    ConfigKey,
    Family,
    HyperParameter,
    Kind,
    Refusal,
    Shape,
    StoredLayout,
    TensorRule,
    TokenizerRules,
)
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.qwen3next import one_kernel_each
from ggufmoe.families.standard import (
    EMBEDDING,
    OUTPUT,
    attention,
    choice_bias,
    common_parameters,
    experts,
    feed_forward,
    fused_experts,
    head_dim,
    layers_before,
    layers_from,
    matrix,
    n_embd,
    n_vocab,
    no_bias,
    size_of,
    unexpressed,
    vector,
)
from ggufmoe.gguf.upstream import MODEL_ARCH, MODEL_TENSOR, ExpertGatingFuncType, Keys
from ggufmoe.gguf.values import i32s, u32

_EXPERT_WIDTH, _DENSE_LAYERS = "moe_intermediate_size", "num_dense_layers"
_KERNEL, _LAYER_TYPES = "conv_L_cache", "layer_types"
_ATTENTION, _CONVOLUTION = "full_attention", "conv"
_LAYER = "model.layers.{layer}."
_MODULE, _WORDS = "feed_forward", ("w1", "w3", "w2")
_EXPERTS = experts(size_of(_EXPERT_WIDTH), where=layers_from(_DENSE_LAYERS), module=_MODULE, words=_WORDS)
_NAMES = {"o_proj": "out_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm"}


def _attends(config: ModelConfig, layer: int) -> bool:
    return bool(config.raw[_LAYER_TYPES][layer] == _ATTENTION)


def _convolves(config: ModelConfig, layer: int) -> bool:
    return not _attends(config, layer)


def _renamed(rule: TensorRule) -> TensorRule:
    module, word, weight = rule.hf.rsplit(".", 2)
    return replace(rule, hf=f"{module}.{_NAMES.get(word, word)}.{weight}", where=_attends)


def _kernels(config: ModelConfig) -> Shape:
    return config.n_embd, 1, config.size(_KERNEL)


def _heads_of_layers(config: ModelConfig) -> list[int]:
    """Heads of keys and values of each layer; llama.cpp knows a convolution by having none."""
    return [config.n_head_kv if _attends(config, layer) else 0 for layer in range(config.n_layer)]


def _common() -> tuple[HyperParameter, ...]:
    return tuple(
        HyperParameter(one.key, i32s, _heads_of_layers) if one.key == Keys.Attention.HEAD_COUNT_KV else one
        for one in common_parameters()
    )


def _check(reader: ConfigReader, config: ModelConfig) -> None:
    kinds = reader.value(_LAYER_TYPES)
    if kinds is None:
        raise reader.missing(_LAYER_TYPES)
    if not isinstance(kinds, list) or len(kinds) != config.n_layer:
        raise reader.error(_LAYER_TYPES, f"a list with a kind for each of {config.n_layer} layers")
    if set(map(str, kinds)) != {_ATTENTION, _CONVOLUTION}:
        raise reader.error(_LAYER_TYPES, f"layers of both kinds, {_CONVOLUTION} and {_ATTENTION}, and no other")
    if config.n_head * config.head_dim != config.n_embd:
        raise reader.error("head_dim", "hidden_size / num_attention_heads, which llama.cpp takes for this family")
    if config.size(_KERNEL) < 2:
        raise reader.error(_KERNEL, "a number from 2")


FAMILY = Family(
    architectures=("Lfm2MoeForCausalLM",),
    model_types=("lfm2_moe",),
    arch=MODEL_ARCH.LFM2MOE,
    tensors=(
        EMBEDDING,
        TensorRule(MODEL_TENSOR.ATTN_NORM, f"{_LAYER}operator_norm.weight", vector(n_embd)),
        TensorRule(MODEL_TENSOR.FFN_NORM, f"{_LAYER}ffn_norm.weight", vector(n_embd)),
        *map(_renamed, attention(qk_norm=head_dim)),
        TensorRule(
            MODEL_TENSOR.SHORTCONV_CONV,
            f"{_LAYER}conv.conv.weight",
            _kernels,
            where=_convolves,
            transform=one_kernel_each,
        ),
        TensorRule(
            MODEL_TENSOR.SHORTCONV_INPROJ,
            f"{_LAYER}conv.in_proj.weight",
            matrix(lambda config: 3 * config.n_embd, n_embd),
            where=_convolves,
        ),
        TensorRule(
            MODEL_TENSOR.SHORTCONV_OUTPROJ, f"{_LAYER}conv.out_proj.weight", matrix(n_embd, n_embd), where=_convolves
        ),
        *feed_forward(where=layers_before(_DENSE_LAYERS), module=_MODULE, words=_WORDS),
        *_EXPERTS,
        choice_bias(where=layers_from(_DENSE_LAYERS), name=f"{_MODULE}.expert_bias"),
        TensorRule(MODEL_TENSOR.TOKEN_EMBD_NORM, "model.embedding_norm.weight", vector(n_embd)),
        OUTPUT,
    ),
    hyper_parameters=(
        *_common(),
        HyperParameter(Keys.LLM.EXPERT_FEED_FORWARD_LENGTH, u32, size_of(_EXPERT_WIDTH)),
        HyperParameter(Keys.LLM.LEADING_DENSE_BLOCK_COUNT, u32, size_of(_DENSE_LAYERS)),
        HyperParameter(Keys.LLM.EXPERT_GATING_FUNC, u32, lambda _: ExpertGatingFuncType.SIGMOID.value),
        HyperParameter(Keys.LLM.VOCAB_SIZE, u32, n_vocab),
        HyperParameter(Keys.ShortConv.L_CACHE, u32, size_of(_KERNEL)),
    ),
    defaults={
        "intermediate_size": 7168,
        "num_key_value_heads": 8,
        "max_position_embeddings": 128_000,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "norm_topk_prob": True,
        _EXPERT_WIDTH: 1792,
        _DENSE_LAYERS: 2,
        _KERNEL: 3,
    },
    aliases={
        "num_local_experts": ("num_experts",),
        "rms_norm_eps": ("norm_eps",),
        "tie_word_embeddings": ("tie_embedding",),
    },
    keys=(ConfigKey(_EXPERT_WIDTH), ConfigKey(_DENSE_LAYERS, Kind.COUNT), ConfigKey(_KERNEL)),
    refusals=(
        no_bias("conv_bias"),
        Refusal("use_expert_bias", (True, None), "true: llama.cpp's lfm2moe graph needs the bias of expert choice"),
        Refusal("norm_topk_prob", (True,), "true: llama.cpp's lfm2moe graph always rescales experts' weights to one"),
        Refusal(
            "routed_scaling_factor", (1.0, 1, None), "1: llama.cpp's lfm2moe graph does not scale experts' weights"
        ),
    ),
    check=_check,
    layouts=(StoredLayout("classic"), fused_experts("fused", _MODULE, _EXPERTS, stored=_MODULE)),
    unexpressed=unexpressed,
    arithmetic=None,
    tokenizer=TokenizerRules(pre_tokenizer="lfm2"),
)
