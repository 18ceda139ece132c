"""DeepSeek-V2 and V2-Lite: latent attention, leading dense layers, and shared experts beside the chosen ones.

Source: ``conversion/deepseek.py`` and ``src/models/deepseek2.cpp`` at the pinned llama.cpp; defaults from transformers'
configuration_deepseek_v2.py, 5.23. Keys and values of all heads are projections (``kv_b_proj``) of one latent vector of
a token. llama.cpp caches that vector and has the projection of keys transposed, head by head, apart from that of
values.
"""

from __future__ import annotations

import numpy as np

from ggufmoe.families.config_reader import ConfigReader
from ggufmoe.families.family import ConfigKey, Family, HyperParameter, Kind, Refusal, StoredLayout, TensorRule
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.rope_keys import yarn_attention_scale
from ggufmoe.families.standard import (
    NORMS,
    common_parameters,
    decoder,
    experts,
    feed_forward,
    fused_experts,
    layers_before,
    layers_from,
    matrix,
    n_embd,
    n_vocab,
    no_bias,
    number_of,
    only_silu,
    shared_experts,
    size_of,
    unexpressed,
    vector,
)
from ggufmoe.gguf.upstream import MODEL_ARCH, MODEL_TENSOR, ExpertGatingFuncType, Keys
from ggufmoe.gguf.values import boolean, f32, u32
from ggufmoe.weights.source_tensor import SourceTensor
from ggufmoe.weights.views import PickedRows, Transposed

DENSE_LAYERS, N_SHARED, EXPERT_WIDTH = "first_k_dense_replace", "n_shared_experts", "moe_intermediate_size"
_KEY, _ROTATED, _VALUE = "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
_QUERY_RANK, _RANK = "q_lora_rank", "kv_lora_rank"
WEIGHT_SCALE, RESCALED, _SCORING = "routed_scaling_factor", "norm_topk_prob", "scoring_func"
_GATINGS = {
    "softmax": ExpertGatingFuncType.SOFTMAX.value,
    "sigmoid": ExpertGatingFuncType.SIGMOID.value,
}
"""Router scoring functions to llama.cpp's numbers."""
_ATTENTION = "model.layers.{layer}.self_attn."


def _query_width(config: ModelConfig) -> int:
    return config.n_head * (config.size(_KEY) + config.size(_ROTATED))


def _expanded_width(config: ModelConfig) -> int:
    """Rows of the projection from the latent vector to keys, without their rotated part, and values of all heads."""
    return config.n_head * (config.size(_KEY) + config.size(_VALUE))


def _latent_and_rotated(config: ModelConfig) -> int:
    return config.size(_RANK) + config.size(_ROTATED)


def _has_query_rank(config: ModelConfig, layer: int = 0) -> bool:
    return config.values[_QUERY_RANK] is not None


def _rows_of_heads(source: SourceTensor, config: ModelConfig, first: int, n_rows: int) -> SourceTensor:
    """Rows ``first`` to ``first + n_rows`` of each head of ``kv_b_proj``: (n_head, n_rows, kv_lora_rank)."""
    heads = np.arange(config.n_head)[:, None] * (config.size(_KEY) + config.size(_VALUE))
    picked = (heads + first + np.arange(n_rows)).reshape(-1)
    return PickedRows(source, picked, (config.n_head, n_rows, source.shape[-1]))


def _keys_transposed(source: SourceTensor, config: ModelConfig) -> SourceTensor:
    """The projection of keys, (n_head, kv_lora_rank, qk_nope_head_dim)."""
    return Transposed(_rows_of_heads(source, config, 0, config.size(_KEY)))


def _values(source: SourceTensor, config: ModelConfig) -> SourceTensor:
    """The projection of values, (n_head, v_head_dim, kv_lora_rank)."""
    return _rows_of_heads(source, config, config.size(_KEY), config.size(_VALUE))


_EXPANSION = f"{_ATTENTION}kv_b_proj.weight", matrix(_expanded_width, size_of(_RANK))
LATENT_ATTENTION = (
    TensorRule(
        MODEL_TENSOR.ATTN_Q,
        f"{_ATTENTION}q_proj.weight",
        matrix(_query_width, n_embd),
        where=lambda config, _: not _has_query_rank(config),
    ),
    TensorRule(
        MODEL_TENSOR.ATTN_Q_A,
        f"{_ATTENTION}q_a_proj.weight",
        matrix(size_of(_QUERY_RANK), n_embd),
        where=_has_query_rank,
    ),
    TensorRule(
        MODEL_TENSOR.ATTN_Q_A_NORM,
        f"{_ATTENTION}q_a_layernorm.weight",
        vector(size_of(_QUERY_RANK)),
        where=_has_query_rank,
    ),
    TensorRule(
        MODEL_TENSOR.ATTN_Q_B,
        f"{_ATTENTION}q_b_proj.weight",
        matrix(_query_width, size_of(_QUERY_RANK)),
        where=_has_query_rank,
    ),
    TensorRule(
        MODEL_TENSOR.ATTN_KV_A_MQA, f"{_ATTENTION}kv_a_proj_with_mqa.weight", matrix(_latent_and_rotated, n_embd)
    ),
    TensorRule(MODEL_TENSOR.ATTN_KV_A_NORM, f"{_ATTENTION}kv_a_layernorm.weight", vector(size_of(_RANK))),
    TensorRule(MODEL_TENSOR.ATTN_K_B, *_EXPANSION, transform=_keys_transposed),
    TensorRule(MODEL_TENSOR.ATTN_V_B, *_EXPANSION, transform=_values),
    TensorRule(
        MODEL_TENSOR.ATTN_OUT,
        f"{_ATTENTION}o_proj.weight",
        matrix(n_embd, lambda config: config.n_head * config.size(_VALUE)),
    ),
)
HAS_EXPERTS = layers_from(DENSE_LAYERS)
_EXPERTS = experts(size_of(EXPERT_WIDTH), where=HAS_EXPERTS)
STORED_LAYOUTS = (StoredLayout("classic"), fused_experts("fused", "mlp", _EXPERTS))


def shared_width(config: ModelConfig) -> int:
    """The width of all shared experts of a layer, which are stored as one."""
    return config.size(N_SHARED) * config.size(EXPERT_WIDTH)


FEED_FORWARD = (
    *feed_forward(where=layers_before(DENSE_LAYERS)),
    *_EXPERTS,
    *shared_experts(shared_width, where=HAS_EXPERTS),
)


def _taken_for_lite(config: ModelConfig) -> bool:
    """Whether llama.cpp takes a model for V2-Lite, or one like it, and expects queries without a latent vector."""
    return config.n_layer in (26, 27) or (config.n_layer == 48 and config.n_vocab == 128256)


def _query_rank(config: ModelConfig) -> int | None:
    """llama.cpp wants the key in all models but those that it takes for V2-Lite; with 0 it expects what they have. The
    converter writes no 0, and llama.cpp does not load the file then."""
    if not _has_query_rank(config):
        return None if _taken_for_lite(config) else 0
    return config.size(_QUERY_RANK)


def _yarn_log_multiplier(config: ModelConfig) -> float | None:
    """llama.cpp divides it by 0.1 again, and scales the products of queries and keys as transformers does."""
    scaling = config.rope_scaling
    return 0.1 * scaling.parameters["mscale_all_dim"] if scaling.kind == "yarn" else None


GROUPS = (
    HyperParameter(Keys.LLM.EXPERT_GROUP_COUNT, u32, lambda config: config.values["n_group"]),
    HyperParameter(Keys.LLM.EXPERT_GROUP_USED_COUNT, u32, lambda config: config.values["topk_group"]),
)
ROUTING = (
    HyperParameter(Keys.LLM.EXPERT_FEED_FORWARD_LENGTH, u32, size_of(EXPERT_WIDTH)),
    HyperParameter(Keys.LLM.EXPERT_SHARED_COUNT, u32, size_of(N_SHARED)),
    HyperParameter(Keys.LLM.LEADING_DENSE_BLOCK_COUNT, u32, size_of(DENSE_LAYERS)),
    HyperParameter(Keys.LLM.EXPERT_WEIGHTS_SCALE, f32, number_of(WEIGHT_SCALE)),
)

ROUTING_KEYS = (
    ConfigKey(EXPERT_WIDTH),
    ConfigKey(N_SHARED, Kind.COUNT),
    ConfigKey(DENSE_LAYERS, Kind.COUNT, 0),
    ConfigKey("n_group", default=None),
    ConfigKey("topk_group", default=None),
    ConfigKey(WEIGHT_SCALE, Kind.NUMBER),
    ConfigKey(RESCALED, Kind.FLAG, False),
)


def check_routing(reader: ConfigReader, config: ModelConfig, graph: str) -> None:
    """Refuse numbers of shared experts and of groups that llama.cpp's ``graph`` does not compute, or not load."""
    if config.size(N_SHARED) == 0:
        raise reader.error(N_SHARED, f"1 or more: llama.cpp's {graph} graph has shared experts beside the others")
    if config.number(WEIGHT_SCALE) == 0:
        raise reader.error(WEIGHT_SCALE, "another number than 0, which llama.cpp takes for no factor")
    n_group, n_used = config.values["n_group"] or 1, config.values["topk_group"] or 1
    if config.n_expert % n_group or config.n_expert < 2 * n_group:
        raise reader.error("n_group", f"a divisor of the {config.n_expert} experts, with 2 or more in a group")
    if n_group > 1 and n_used >= n_group:
        raise reader.error("topk_group", f"less than n_group {n_group}, as llama.cpp does (1 and 1: no groups)")


def _check(reader: ConfigReader, config: ModelConfig) -> None:
    check_routing(reader, config, "deepseek2")
    if config.n_head_kv != config.n_head:
        raise reader.error("num_key_value_heads", "num_attention_heads: each head has keys and values of its own")
    if _has_query_rank(config) and _taken_for_lite(config):
        raise reader.error(
            _QUERY_RANK,
            "null: llama.cpp takes a model of 26 or 27 layers, or of 48 and 128256 tokens, for one without it and does "
            "not load it otherwise",
        )
    scaling = config.rope_scaling
    key = reader.rope_key
    if scaling.kind not in ("none", "yarn"):
        raise reader.error(key, "no scaling or yarn: llama.cpp's deepseek2 graph scales attention by no other")
    if scaling.kind == "yarn":
        scale, of_products = yarn_attention_scale(scaling.parameters), scaling.parameters.get("mscale_all_dim")
        if scale != 1 or not of_products:
            raise reader.error(
                key, "mscale and mscale_all_dim to be equal and above 0, as llama.cpp's deepseek2 graph takes them"
            )


EXPERTS_EVERYWHERE = Refusal(
    "moe_layer_freq", (1, None), "1: llama.cpp has experts in every layer after the dense ones"
)

FAMILY = Family(
    architectures=("DeepseekV2ForCausalLM",),
    model_types=("deepseek_v2",),
    arch=MODEL_ARCH.DEEPSEEK2,
    tensors=decoder(*NORMS, *LATENT_ATTENTION, *FEED_FORWARD),
    hyper_parameters=(
        # the factor of YaRN's cosines and sines is 1 in every model that is not refused
        *(one for one in common_parameters() if one.key != Keys.Rope.SCALING_ATTN_FACTOR),
        *GROUPS,
        HyperParameter(Keys.LLM.EXPERT_GATING_FUNC, u32, lambda config: _GATINGS.get(config.values[_SCORING])),
        *ROUTING,
        HyperParameter(Keys.LLM.VOCAB_SIZE, u32, n_vocab),
        # one head of keys and values: the latent vector and the rotated part that all heads share
        HyperParameter(Keys.Attention.HEAD_COUNT_KV, u32, lambda config: 1),
        HyperParameter(Keys.Attention.Q_LORA_RANK, u32, _query_rank),
        HyperParameter(Keys.Attention.KV_LORA_RANK, u32, size_of(_RANK)),
        HyperParameter(Keys.Attention.KEY_LENGTH, u32, _latent_and_rotated),
        HyperParameter(Keys.Attention.VALUE_LENGTH, u32, size_of(_RANK)),
        HyperParameter(Keys.Attention.KEY_LENGTH_MLA, u32, lambda config: config.size(_KEY) + config.size(_ROTATED)),
        HyperParameter(Keys.Attention.VALUE_LENGTH_MLA, u32, size_of(_VALUE)),
        HyperParameter(Keys.LLM.EXPERT_WEIGHTS_NORM, boolean, lambda config: config.flag(RESCALED) or None),
        HyperParameter(Keys.Rope.DIMENSION_COUNT, u32, size_of(_ROTATED)),
        HyperParameter(Keys.Rope.SCALING_YARN_LOG_MUL, f32, _yarn_log_multiplier),
    ),
    defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "num_local_experts": 64,
        _QUERY_RANK: 1536,
        _RANK: 512,
        _KEY: 128,
        _ROTATED: 64,
        _VALUE: 128,
        EXPERT_WIDTH: 1407,
        N_SHARED: 2,
        WEIGHT_SCALE: 1.0,
    },
    aliases={"num_local_experts": ("n_routed_experts", "num_experts"), "head_dim": (_ROTATED,)},
    keys=(
        *ROUTING_KEYS,
        ConfigKey(_QUERY_RANK, default=None),
        *map(ConfigKey, (_RANK, _KEY, _ROTATED, _VALUE)),
        ConfigKey(_SCORING, Kind.TEXT, None),
    ),
    refusals=(
        only_silu(),
        no_bias("attention_bias"),
        no_bias("mlp_bias"),
        EXPERTS_EVERYWHERE,
        Refusal(_SCORING, ("softmax", None), "'softmax', which DeepSeek-V2 scores experts by"),
        Refusal("topk_method", ("greedy", "group_limited_greedy", None), "'greedy' or 'group_limited_greedy'"),
        Refusal(
            "n_group",
            (1, None),
            "1: llama.cpp's deepseek2 graph chooses groups of experts by the sum of their two best scores, as "
            "DeepSeek-V3 does, and DeepSeek-V2 by their best one; it would answer as another model",
        ),
        Refusal(
            RESCALED,
            (False, None),
            "false: transformers rescales no weights of DeepSeek-V2's experts, and llama.cpp would",
        ),
    ),
    check=_check,
    layouts=STORED_LAYOUTS,
    unexpressed=unexpressed,
    arithmetic=None,
)
