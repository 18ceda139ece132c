"""Gemma 3, the language model alone: norms around each part, layers with a window among others, and GELU.

Layers with a window have a rotary base of their own, and rope is scaled in the others alone. Source: ``Gemma3Model`` of
``conversion/gemma.py`` and ``src/models/gemma3.cpp`` at the pinned llama.cpp; defaults from transformers'
configuration_gemma3.py, 5.24.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ggufmoe.families.config_reader import POSITIVE, ConfigReader, is_float32
from ggufmoe.families.family import ConfigKey, Family, HyperParameter, Kind, Refusal, SkippedTensors, TensorRule
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.rope_keys import unexpressed_rope
from ggufmoe.families.standard import (
    Where,
    attention,
    common_parameters,
    decoder,
    feed_forward,
    head_dim,
    kinds_of_layers,
    n_embd,
    no_bias,
    norms_around_zero,
    stated_window,
    vector,
)
from ggufmoe.gguf.upstream import MODEL_ARCH, MODEL_TENSOR, Keys
from ggufmoe.gguf.values import booleans, f32, u32

SCALAR = "query_pre_attn_scalar"
FINAL_CAP, ATTENTION_CAP = "final_logit_softcapping", "attn_logit_softcapping"
_PERIOD, _LOCAL_BASE = "sliding_window_pattern", "rope_local_base_freq"
KINDS = _SLIDING, _FULL = "sliding_attention", "full_attention"

NORMS = tuple(
    TensorRule(tensor, f"model.layers.{{layer}}.{name}_layernorm.weight", vector(n_embd))
    for tensor, name in (
        (MODEL_TENSOR.ATTN_NORM, "input"),
        (MODEL_TENSOR.ATTN_POST_NORM, "post_attention"),
        (MODEL_TENSOR.FFN_NORM, "pre_feedforward"),
        (MODEL_TENSOR.FFN_POST_NORM, "post_feedforward"),
    )
)

DEFAULTS = {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
REFUSALS = (
    Refusal(
        "hidden_activation", ("gelu_pytorch_tanh",), "'gelu_pytorch_tanh', the only activation of llama.cpp's graph"
    ),
    no_bias("attention_bias"),
    Refusal("use_bidirectional_attention", (False, None), "false: no token attends to those after it in llama.cpp"),
)


def windowed(period: Callable[[ModelConfig], int]) -> Where:
    """Which layers have a window: those of that kind; where kinds are not stated, all but each ``period``-th."""

    def has_window(config: ModelConfig, layer: int) -> bool:
        kinds = config.raw.get("layer_types")
        return (layer + 1) % period(config) != 0 if kinds is None else bool(kinds[layer] == _SLIDING)

    return has_window


def stated_pattern(has_window: Where, period: int) -> HyperParameter:
    """The key of the layers with a window, where they are others than all but each ``period``-th, which llama.cpp
    takes without it. The converter never writes it."""

    def pattern(config: ModelConfig) -> list[bool] | None:
        windows = [has_window(config, layer) for layer in range(config.n_layer)]
        taken = [(layer + 1) % period != 0 for layer in range(config.n_layer)]
        return windows if any(windows) and windows != taken else None

    return HyperParameter(Keys.Attention.SLIDING_WINDOW_PATTERN, booleans, pattern)


def check_scalar(reader: ConfigReader, config: ModelConfig, largest: int) -> None:
    """Refuse another scale of attention than llama.cpp takes: by heads of the model's width for ``largest`` layers."""
    expected = config.n_embd // config.n_head if config.n_layer == largest else config.head_dim
    if config.number(SCALAR) != expected:
        raise reader.error(SCALAR, f"{expected}, which llama.cpp takes for a model of {config.n_layer} layers")


_has_window = windowed(lambda config: config.size(_PERIOD))


def _any_window(config: ModelConfig) -> bool:
    return any(_has_window(config, layer) for layer in range(config.n_layer))


def _common_rope(stated: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parameters of layers without a window."""
    if _SLIDING not in stated and _FULL not in stated:
        return stated
    full = stated.get(_FULL)
    return full if isinstance(full, dict) else {}


def _local_base(config: ModelConfig) -> float:
    stated = (config.stated_rope.get(_SLIDING) or {}).get("rope_theta")
    base: float = config.number(_LOCAL_BASE) if stated is None else stated
    return base


def _check(reader: ConfigReader, config: ModelConfig) -> None:
    kinds_of_layers(reader, config, *KINDS)
    check_scalar(reader, config, 62)
    if _any_window(config) and config.sliding_window is None:
        raise reader.error("sliding_window", "the number of tokens in the window of some layers")
    nested = {kind: config.stated_rope.get(kind) for kind in KINDS}
    if any(not isinstance(rope, dict) for rope in nested.values() if rope is not None):
        raise reader.error(reader.rope_key, "an object for each kind of layers")
    local = nested[_SLIDING] or {}
    kinds = [local.get(key) for key in ("rope_type", "type")]
    if local.keys() - {"rope_type", "type", "rope_theta"} or any(kind not in (None, "default") for kind in kinds):
        raise reader.error(reader.rope_key, f"no scaling in {_SLIDING}, which llama.cpp's gemma3 graph does not have")
    base = _local_base(config)
    if not is_float32(base) or base <= 0:
        key = _LOCAL_BASE if local.get("rope_theta") is None else reader.rope_key
        raise reader.error(key, f"a rotary base of {_SLIDING} that is {POSITIVE}")
    if config.rope_scaling.kind not in ("none", "linear"):
        raise reader.error(reader.rope_key, f"linear scaling or none in {_FULL}, as in llama.cpp's gemma3 graph")


FAMILY = Family(
    architectures=("Gemma3ForConditionalGeneration", "Gemma3ForCausalLM"),
    model_types=("gemma3", "gemma3_text"),
    arch=MODEL_ARCH.GEMMA3,
    tensors=norms_around_zero(decoder(*NORMS, *attention(qk_norm=head_dim), *feed_forward())),
    hyper_parameters=(
        *common_parameters(head_size=head_dim),
        HyperParameter(Keys.Rope.FREQ_BASE_SWA, f32, _local_base),
        HyperParameter(Keys.LLM.FINAL_LOGIT_SOFTCAPPING, f32, lambda config: config.values[FINAL_CAP] or None),
        HyperParameter(
            Keys.Attention.SLIDING_WINDOW, u32, lambda config: config.sliding_window if _any_window(config) else None
        ),
        stated_pattern(_has_window, 6),
    ),
    defaults={**DEFAULTS, "vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6},
    nested_config="text_config",
    keys=(
        ConfigKey(SCALAR, Kind.NUMBER, 256),
        ConfigKey(FINAL_CAP, Kind.NUMBER, None),
        ConfigKey(_PERIOD, default=6),
        ConfigKey(_LOCAL_BASE, Kind.NUMBER, 10000.0),
    ),
    refusals=(*REFUSALS, Refusal(ATTENTION_CAP, (None,), "null: llama.cpp's gemma3 graph does not cap attention")),
    check=_check,
    sliding_window=stated_window,
    common_rope=_common_rope,
    skipped=(
        SkippedTensors(
            lambda config, name: name.removeprefix("model.").startswith(("vision_tower.", "multi_modal_projector.")),
            "they read images, and only the language model is converted",
        ),
    ),
    unexpressed=unexpressed_rope,
    arithmetic=None,
)
