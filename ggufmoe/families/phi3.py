"""Phi-3, Phi-3.5 and Phi-4: Llama with queries, keys and values in one matrix, gate and up in another, and LongRoPE.

LongRoPE divides the frequencies of rope by one table of factors in short texts and by another in long ones. Source:
``conversion/phi.py`` and ``src/models/phi3.cpp`` at the pinned llama.cpp; defaults from transformers'
configuration_phi3.py, and LongRoPE from ``_compute_longrope_parameters`` of modeling_rope_utils.py, 5.24.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ggufmoe.families.config_reader import ConfigReader, is_float32
from ggufmoe.families.family import ConfigKey, Family, HyperParameter, TensorRule
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.standard import (
    NORMS,
    attention,
    common_parameters,
    decoder,
    feed_forward,
    heads_of_whole_width,
    key_width,
    matrix,
    n_embd,
    no_bias,
    only_silu,
    query_width,
    rotated_pairs,
    rotated_width,
    size_of,
    stated_window,
    unexpressed,
    window_note,
)
from ggufmoe.gguf.upstream import MODEL_ARCH, MODEL_TENSOR, Keys
from ggufmoe.gguf.values import f32, u32

_ORIGINAL = "original_max_position_embeddings"
_LONG, _SHORT = "long_factor", "short_factor"
_LONG_ROPE = ("longrope", "su", "yarn")
"""Names of LongRoPE: those after the first are older."""


def _is_long_rope(stated: Mapping[str, Any]) -> bool:
    return stated.get("rope_type", stated.get("type")) in _LONG_ROPE


def _common_rope(stated: Mapping[str, Any]) -> Mapping[str, Any]:
    common = {name: stated.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    return common if _is_long_rope(stated) else stated


def _attention_factor(config: ModelConfig) -> float | None:
    """What cosines and sines are multiplied with; None where rope is not LongRoPE."""
    stated = config.stated_rope
    if not _is_long_rope(stated):
        return None
    if stated.get("attention_factor") is not None:
        return float(stated["attention_factor"])
    factor = stated.get("factor")
    factor = config.n_ctx / config.size(_ORIGINAL) if factor is None else factor
    return math.sqrt(1 + math.log(factor) / math.log(config.size(_ORIGINAL))) if factor > 1 else 1.0


def _factors(config: ModelConfig) -> Iterator[tuple[Any, Sequence[float]]]:
    stated = config.stated_rope
    if _is_long_rope(stated):
        yield MODEL_TENSOR.ROPE_FACTORS_LONG, stated[_LONG]
        yield MODEL_TENSOR.ROPE_FACTORS_SHORT, stated[_SHORT]


def _check(reader: ConfigReader, config: ModelConfig) -> None:
    heads_of_whole_width(reader, config)
    rotated_pairs(reader, config)
    if config.rope_scaling.kind != "none":
        raise reader.error(reader.rope_key, "rope without scaling or LongRoPE, the only ones of llama.cpp's phi3 graph")
    stated, n_pairs = config.stated_rope, rotated_width(config) // 2
    if not _is_long_rope(stated):
        return
    for name in (_LONG, _SHORT):
        factors = stated.get(name)
        if not isinstance(factors, list) or len(factors) != n_pairs or not all(map(_is_positive, factors)):
            raise reader.error(reader.rope_key, f"a {name} of {n_pairs} numbers above 0")
    if config.size(_ORIGINAL) < 2:
        raise reader.error(_ORIGINAL, "2 or more: LongRoPE divides by its logarithm")
    for name in ("attention_factor", "factor"):
        if stated.get(name) is not None and not _is_positive(stated[name]):
            raise reader.error(reader.rope_key, f"{name} above 0")


def _is_positive(value: Any) -> bool:
    return is_float32(value) and bool(value > 0)


def _unexpressed(config: ModelConfig) -> Iterator[str]:
    yield from unexpressed(config)
    if _is_long_rope(config.stated_rope):
        original = config.size(_ORIGINAL)
        yield (
            f"llama.cpp takes the rope factors of long texts in every context of more than {original} tokens "
            "(--ctx-size), transformers only for texts that are longer"
        )


def _mixed_width(config: ModelConfig) -> int:
    return query_width(config) + 2 * key_width(config)


_ATTENTION = (
    TensorRule(MODEL_TENSOR.ATTN_QKV, "model.layers.{layer}.self_attn.qkv_proj.weight", matrix(_mixed_width, n_embd)),
    *(rule for rule in attention() if rule.tensor is MODEL_TENSOR.ATTN_OUT),
)
_FEED_FORWARD = (
    TensorRule(
        MODEL_TENSOR.FFN_UP,
        "model.layers.{layer}.mlp.gate_up_proj.weight",
        matrix(lambda config: 2 * config.n_ff, n_embd),
    ),
    *(rule for rule in feed_forward() if rule.tensor is MODEL_TENSOR.FFN_DOWN),
)

FAMILY = Family(
    architectures=("Phi3ForCausalLM",),
    model_types=("phi3",),
    arch=MODEL_ARCH.PHI3,
    tensors=decoder(*NORMS, *_ATTENTION, *_FEED_FORWARD),
    hyper_parameters=(
        # the converter writes neither the size of a head nor a type of scaling
        *common_parameters(head_size=lambda config: None),
        HyperParameter(Keys.Rope.SCALING_ORIG_CTX_LEN, u32, size_of(_ORIGINAL)),
        HyperParameter(Keys.Rope.DIMENSION_COUNT, u32, rotated_width),
        HyperParameter(Keys.Attention.SLIDING_WINDOW, u32, lambda config: config.sliding_window or 0),
        HyperParameter(Keys.Rope.SCALING_ATTN_FACTOR, f32, _attention_factor),
    ),
    defaults={"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e4},
    keys=(ConfigKey(_ORIGINAL, default=4096),),
    refusals=(only_silu(), no_bias("attention_bias")),
    check=_check,
    sliding_window=stated_window,
    rotary_fraction=1.0,
    common_rope=_common_rope,
    computed=_factors,
    own_keys=window_note,
    unexpressed=_unexpressed,
    arithmetic=None,
)
