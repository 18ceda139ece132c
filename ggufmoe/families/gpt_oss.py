"""gpt-oss: experts with biases in every layer, attention sinks, and a sliding window in every other layer.

Source: ``conversion/gpt_oss.py`` and ``src/models/openai-moe.cpp`` at the pinned llama.cpp; defaults from transformers'
configuration_gpt_oss.py, 5.23. Rows of gate and up alternate. The official checkpoints have experts in MXFP4, which are
copied; transformers saves them in floating point, each matrix transposed. Every matrix of an expert has a name of its
own in a model source, which no checkpoint has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from ggufmoe.families.config_reader import ConfigReader
from ggufmoe.families.family import (
    BIAS,
    Family,
    FusedTensor,
    HyperParameter,
    Refusal,
    Shape,
    StoredLayout,
    TensorRule,
)
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.standard import (
    NORMS,
    attention,
    common_parameters,
    decoder,
    experts,
    head_dim,
    n_expert,
    n_ff,
    only_silu,
    own_output,
    stated_window,
    unexpressed_code_and_rope,
    vector,
)
from ggufmoe.gguf.upstream import MODEL_ARCH, MODEL_TENSOR, Keys
from ggufmoe.gguf.values import u32
from ggufmoe.weights.source_tensor import SourceTensor
from ggufmoe.weights.views import PickedColumns

_MLP = "model.layers.{layer}.mlp."
_ROUTER, *_MATRICES = experts()
_GATE, _UP, _DOWN = (rule.hf for rule in _MATRICES)


def _every_second(first: int) -> Callable[[SourceTensor, ModelConfig], SourceTensor]:
    return lambda source, config: PickedColumns(source, np.arange(first, 2 * config.n_ff, 2))


def _gate_up_biases(config: ModelConfig) -> Shape:
    return (config.n_expert, 2 * config.n_ff)


def _down_biases(config: ModelConfig) -> Shape:
    return (config.n_expert, config.n_embd)


def _check(reader: ConfigReader, config: ModelConfig) -> None:
    if config.sliding_window is None:
        raise reader.error("sliding_window", "a number of tokens: llama.cpp's gpt-oss graph has a window")
    kinds = reader.value("layer_types")
    expected = [("sliding_attention", "full_attention")[layer % 2] for layer in range(config.n_layer)]
    if kinds is not None and kinds != expected:
        raise reader.error("layer_types", "sliding_attention and full_attention in turn, as llama.cpp computes them")


FAMILY = Family(
    architectures=("GptOssForCausalLM",),
    model_types=("gpt_oss",),
    arch=MODEL_ARCH.GPT_OSS,
    tensors=decoder(
        NORMS[0],
        replace(NORMS[1], tensor=MODEL_TENSOR.ATTN_POST_NORM),
        *attention(biases="qkvo"),
        TensorRule(
            MODEL_TENSOR.ATTN_SINKS, "model.layers.{layer}.self_attn.sinks", vector(lambda config: config.n_head)
        ),
        replace(_ROUTER, hf=f"{_MLP}router.weight"),
        TensorRule(MODEL_TENSOR.FFN_GATE_INP, f"{_MLP}router.bias", vector(n_expert), suffix=BIAS),
        *_MATRICES,
        *(
            TensorRule(tensor, f"{_MLP}experts.{name}_proj_bias", shape, suffix=BIAS, transform=transform)
            for tensor, name, shape, transform in (
                (MODEL_TENSOR.FFN_GATE_EXP, "gate_up", _gate_up_biases, _every_second(0)),
                (MODEL_TENSOR.FFN_UP_EXP, "gate_up", _gate_up_biases, _every_second(1)),
            )
        ),
        TensorRule(MODEL_TENSOR.FFN_DOWN_EXP, f"{_MLP}experts.down_proj_bias", _down_biases, suffix=BIAS),
    ),
    hyper_parameters=(
        *common_parameters(head_size=head_dim),
        HyperParameter(Keys.Attention.SLIDING_WINDOW, u32, lambda config: config.sliding_window),
        HyperParameter(Keys.LLM.EXPERT_FEED_FORWARD_LENGTH, u32, n_ff),
    ),
    defaults={
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "head_dim": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "sliding_window": 128,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1.5e5,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
    },
    aliases={"num_local_experts": ("num_experts",)},
    refusals=(
        only_silu(),
        own_output("gpt-oss"),
        Refusal("attention_bias", (True, None), "true: llama.cpp's gpt-oss graph needs biases"),
        Refusal("swiglu_alpha", (1.702, None), "1.702, which llama.cpp computes whatever the file says"),
        Refusal("swiglu_limit", (7.0, 7, None), "7, which llama.cpp computes whatever the file says"),
    ),
    check=_check,
    sliding_window=stated_window,
    layouts=(
        StoredLayout(
            "fused",
            fused=(
                FusedTensor(f"{_MLP}experts.gate_up_proj", (_GATE, _UP), transposed=True, interleaved=True),
                FusedTensor(f"{_MLP}experts.down_proj", (_DOWN,), transposed=True),
            ),
        ),
        StoredLayout(
            "mxfp4",
            fused=(
                FusedTensor(
                    f"{_MLP}experts.gate_up_proj_blocks",
                    (_GATE, _UP),
                    interleaved=True,
                    scales=f"{_MLP}experts.gate_up_proj_scales",
                ),
                FusedTensor(f"{_MLP}experts.down_proj_blocks", (_DOWN,), scales=f"{_MLP}experts.down_proj_scales"),
            ),
            quant_method="mxfp4",
        ),
    ),
    unexpressed=unexpressed_code_and_rope,
    arithmetic=None,
)
