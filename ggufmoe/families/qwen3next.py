"""Qwen3-Next: Qwen2-MoE in which most layers have linear attention, and a gate on the output of the others.

A layer of linear attention (gated delta net) keeps a state of fixed size in place of keys and values. Source:
``conversion/qwen.py`` and ``src/models/qwen3next.cpp`` at the pinned llama.cpp; defaults from transformers'
configuration_qwen3_next.py, 5.24.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ggufmoe.families.config_reader import ConfigReader
from ggufmoe.families.family import (
    BIAS,
    ConfigKey,
    Family,
    HyperParameter,
    Shape,
    SkippedTensors,
    StoredLayout,
    TensorRule,
)
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.standard import (
    attention,
    common_parameters,
    decoder,
    dense_layers,
    experts,
    fused_experts,
    head_dim,
    kinds_of_layers,
    matrix,
    n_embd,
    no_bias,
    norms_around_zero,
    only_silu,
    query_width,
    rotated_pairs,
    rotated_width,
    shared_experts,
    size_of,
    unexpressed,
    unrescaled_weights,
    vector,
)
from ggufmoe.gguf.layer_memory import RECURRENT_LAYERS
from ggufmoe.gguf.upstream import MODEL_ARCH, MODEL_TENSOR, Keys
from ggufmoe.gguf.values import booleans, u32
from ggufmoe.weights.source_tensor import SourceTensor
from ggufmoe.weights.views import Changed, PickedRows, Reshaped

EXPERT_WIDTH, SHARED_WIDTH = "moe_intermediate_size", "shared_expert_intermediate_size"
KERNEL, KEY_DIM, VALUE_DIM = "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"
KEY_HEADS, VALUE_HEADS = "linear_num_key_heads", "linear_num_value_heads"
INTERVAL = "full_attention_interval"
_LINEAR = "linear_attention"
LINEAR_MODULE = "model.layers.{layer}.linear_attn."


def is_linear(config: ModelConfig, layer: int) -> bool:
    """A ``TensorRule.where``: the layers with linear attention."""
    kinds: Sequence[str] | None = config.raw.get("layer_types")
    return (layer + 1) % config.size(INTERVAL) != 0 if kinds is None else kinds[layer] == _LINEAR


def is_full(config: ModelConfig, layer: int) -> bool:
    """A ``TensorRule.where``: the layers with full attention."""
    return not is_linear(config, layer)


def linear_width(config: ModelConfig) -> int:
    """The width of all heads of values of linear attention, and of their gates."""
    return config.size(VALUE_DIM) * config.size(VALUE_HEADS)


def mixed_width(config: ModelConfig) -> int:
    """The width of queries, keys and values of linear attention together."""
    return 2 * config.size(KEY_DIM) * config.size(KEY_HEADS) + linear_width(config)


def _kernel_shape(config: ModelConfig) -> Shape:
    return mixed_width(config), 1, config.size(KERNEL)


def one_kernel_each(source: SourceTensor, config: ModelConfig) -> SourceTensor:
    """A ``TensorRule.transform``: the kernels of the convolution without the dimension of its one input channel."""
    return Reshaped(source, (source.shape[0], source.shape[-1]))


def decay(source: SourceTensor, config: ModelConfig) -> SourceTensor:
    """A ``TensorRule.transform``: -exp of a logarithm, rounded correctly, which torch's exp is in 99 of 100 values."""
    return Changed(source, lambda values: -np.exp(values.astype(np.float64)).astype(np.float32))


def _ordered(config: ModelConfig) -> list[NDArray[np.int64]]:
    """Which rows of ``in_proj_qkvz`` are queries, keys, values and gates; they are stored by heads of keys."""
    n_keys, n_values = config.size(KEY_DIM), linear_width(config) // config.size(KEY_HEADS)
    ends = np.cumsum([0, n_keys, n_keys, n_values, n_values])
    heads = np.arange(ends[-1] * config.size(KEY_HEADS)).reshape(-1, ends[-1])
    return [heads[:, first:last].reshape(-1) for first, last in pairwise(ends)]


def _queries_keys_values(source: SourceTensor, config: ModelConfig) -> SourceTensor:
    return PickedRows(source, np.concatenate(_ordered(config)[:3]))


def _gates(source: SourceTensor, config: ModelConfig) -> SourceTensor:
    return PickedRows(source, _ordered(config)[3])


def gated_attention() -> tuple[TensorRule, ...]:
    """Full attention: each head of queries is followed by the gate of its output."""
    doubled = matrix(lambda config: 2 * query_width(config), n_embd)
    return tuple(
        replace(rule, where=is_full, shape=doubled if rule.tensor is MODEL_TENSOR.ATTN_Q else rule.shape)
        for rule in attention(qk_norm=head_dim)
    )


def linear_attention(*projections: TensorRule) -> tuple[TensorRule, ...]:
    """Linear attention, with the rules of its ``projections`` of the input."""
    n_heads = vector(size_of(VALUE_HEADS))
    rules = (
        *projections,
        TensorRule(MODEL_TENSOR.SSM_CONV1D, f"{LINEAR_MODULE}conv1d.weight", _kernel_shape, transform=one_kernel_each),
        TensorRule(MODEL_TENSOR.SSM_DT, f"{LINEAR_MODULE}dt_bias", n_heads, suffix=BIAS),
        TensorRule(MODEL_TENSOR.SSM_A, f"{LINEAR_MODULE}A_log", n_heads, suffix="", transform=decay),
        TensorRule(MODEL_TENSOR.SSM_NORM, f"{LINEAR_MODULE}norm.weight", vector(size_of(VALUE_DIM))),
        TensorRule(MODEL_TENSOR.SSM_OUT, f"{LINEAR_MODULE}out_proj.weight", matrix(n_embd, linear_width)),
    )
    return tuple(replace(rule, where=is_linear) for rule in rules)


EXPERTS = experts(size_of(EXPERT_WIDTH))
EXPERT_LAYER = (
    *EXPERTS,
    *shared_experts(size_of(SHARED_WIDTH), module="mlp.shared_expert", gate="mlp.shared_expert_gate"),
)
"""The feed-forward part of a layer."""


def hybrid_decoder(linear: tuple[TensorRule, ...], feed_forward: tuple[TensorRule, ...]) -> tuple[TensorRule, ...]:
    """All tensors of a model with this linear attention; all norms but that of linear attention are around 0."""
    norms = (
        TensorRule(MODEL_TENSOR.ATTN_NORM, "model.layers.{layer}.input_layernorm.weight", vector(n_embd)),
        TensorRule(MODEL_TENSOR.ATTN_POST_NORM, "model.layers.{layer}.post_attention_layernorm.weight", vector(n_embd)),
    )
    return norms_around_zero(decoder(*norms, *gated_attention(), *linear, *feed_forward), but=MODEL_TENSOR.SSM_NORM)


def _projections() -> tuple[TensorRule, ...]:
    name, shape = f"{LINEAR_MODULE}in_proj_qkvz.weight", matrix(lambda c: mixed_width(c) + linear_width(c), n_embd)
    steps = matrix(lambda config: 2 * config.size(VALUE_HEADS), n_embd)
    return (
        TensorRule(MODEL_TENSOR.ATTN_QKV, name, shape, transform=_queries_keys_values),
        TensorRule(MODEL_TENSOR.ATTN_GATE, name, shape, transform=_gates),
        TensorRule(MODEL_TENSOR.SSM_BETA_ALPHA, f"{LINEAR_MODULE}in_proj_ba.weight", steps),
    )


def check(reader: ConfigReader, config: ModelConfig) -> None:
    """A ``Family.check``: refuse heads and kinds of layers that llama.cpp's graph does not compute."""
    kinds_of_layers(reader, config, _LINEAR, "full_attention")
    if config.size(VALUE_DIM) != config.size(KEY_DIM):
        raise reader.error(VALUE_DIM, f"{KEY_DIM} ({config.size(KEY_DIM)}), because llama.cpp's graph has one width")
    if config.size(VALUE_HEADS) % config.size(KEY_HEADS):
        raise reader.error(VALUE_HEADS, f"a multiple of {KEY_HEADS} ({config.size(KEY_HEADS)})")
    rotated_pairs(reader, config)


EXPERT_PARAMETERS = (
    HyperParameter(Keys.LLM.EXPERT_FEED_FORWARD_LENGTH, u32, size_of(EXPERT_WIDTH)),
    HyperParameter(Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH, u32, size_of(SHARED_WIDTH)),
)


def hybrid_parameters(*common: HyperParameter) -> tuple[HyperParameter, ...]:
    """The keys of a model with linear attention, after those that it has in ``common`` with others."""
    return (
        *common,
        HyperParameter(Keys.SSM.CONV_KERNEL, u32, size_of(KERNEL)),
        HyperParameter(Keys.SSM.STATE_SIZE, u32, size_of(KEY_DIM)),
        HyperParameter(Keys.SSM.GROUP_COUNT, u32, size_of(KEY_HEADS)),
        HyperParameter(Keys.SSM.TIME_STEP_RANK, u32, size_of(VALUE_HEADS)),
        HyperParameter(Keys.SSM.INNER_SIZE, u32, linear_width),
        HyperParameter(RECURRENT_LAYERS, booleans, lambda c: [is_linear(c, layer) for layer in range(c.n_layer)]),
        HyperParameter(Keys.LLM.FULL_ATTENTION_INTERVAL, u32, size_of(INTERVAL)),
        HyperParameter(Keys.Rope.DIMENSION_COUNT, u32, rotated_width),
    )


WITHOUT_MTP = SkippedTensors(
    lambda config, name: name.startswith(("mtp.", "model.mtp.")),
    "they predict further tokens (MTP), which answers do not need",
)
KEYS = tuple(map(ConfigKey, (KERNEL, KEY_DIM, VALUE_DIM, KEY_HEADS, VALUE_HEADS, INTERVAL)))
EXPERT_KEYS = (ConfigKey(EXPERT_WIDTH), ConfigKey(SHARED_WIDTH))
DEFAULTS = {
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "head_dim": 256,
    EXPERT_WIDTH: 512,
    SHARED_WIDTH: 512,
    KERNEL: 4,
    KEY_DIM: 128,
    VALUE_DIM: 128,
    KEY_HEADS: 16,
    VALUE_HEADS: 32,
    INTERVAL: 4,
}

FAMILY = Family(
    architectures=("Qwen3NextForCausalLM",),
    model_types=("qwen3_next",),
    arch=MODEL_ARCH.QWEN3NEXT,
    tensors=hybrid_decoder(linear_attention(*_projections()), EXPERT_LAYER),
    hyper_parameters=hybrid_parameters(*common_parameters(head_size=head_dim), *EXPERT_PARAMETERS),
    defaults={
        **DEFAULTS,
        "intermediate_size": 5632,
        "num_local_experts": 512,
        "num_experts_per_tok": 10,
        "norm_topk_prob": True,
    },
    aliases={"num_local_experts": ("num_experts",)},
    keys=(*KEYS, *EXPERT_KEYS),
    refusals=(
        only_silu(),
        no_bias("attention_bias"),
        unrescaled_weights("qwen3next"),
        *dense_layers("qwen3next"),
    ),
    check=check,
    rotary_fraction=0.25,
    layouts=(StoredLayout("classic"), fused_experts("fused", "mlp", EXPERTS)),
    skipped=(WITHOUT_MTP,),
    unexpressed=unexpressed,
    arithmetic=None,
)
