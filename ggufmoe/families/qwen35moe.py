"""Qwen3.5-MoE and Qwen3.6-MoE, the language model alone: Qwen3-Next with projections of its own in linear attention.

llama.cpp repeats heads of keys as a whole where transformers repeats each of them, so that heads of values are written
in another order; rope has sections for images. Source: ``_LinearAttentionVReorderBase`` of ``conversion/qwen.py`` and
``src/models/qwen35moe.cpp`` at the pinned llama.cpp; defaults from transformers' configuration_qwen3_5_moe.py, 5.24.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe.families.config_reader import ConfigReader
from ggufmoe.families.family import (
    HyperParameter,
    SkippedTensors,
    TensorRule,
    TokenizerRules,
)
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.qwen3next import (
    DEFAULTS,
    EXPERT_LAYER,
    EXPERT_PARAMETERS,
    EXPERT_WIDTH,
    KEY_HEADS,
    LINEAR_MODULE,
    VALUE_DIM,
    VALUE_HEADS,
    WITHOUT_MTP,
    check,
    decay,
    hybrid_decoder,
    hybrid_parameters,
    linear_attention,
    linear_width,
    mixed_width,
    one_kernel_each,
)
from ggufmoe.families.qwen3next import FAMILY as QWEN3_NEXT
from ggufmoe.families.standard import (
    common_parameters,
    head_dim,
    matrix,
    n_embd,
    no_bias,
    only_silu,
    rotated_width,
    size_of,
)
from ggufmoe.gguf.upstream import MODEL_ARCH, MODEL_TENSOR, Keys
from ggufmoe.gguf.values import i32s
from ggufmoe.weights.source_tensor import SourceTensor
from ggufmoe.weights.views import PickedColumns, PickedRows

_SECTIONS = "mrope_section"
_DEFAULT_SECTIONS = [11, 11, 10]


def _by_repetition(config: ModelConfig, width: int) -> NDArray[np.int64]:
    """Numbers of rows, ``width`` for each head of values: the first head of all heads of keys, then the second, ..."""
    heads = np.arange(config.size(VALUE_HEADS) * width).reshape(config.size(KEY_HEADS), -1, width)
    repeated: NDArray[np.int64] = heads.swapaxes(0, 1).reshape(-1)
    return repeated


def _mixed_order(config: ModelConfig) -> NDArray[np.int64]:
    """Numbers of rows of queries, keys and values together, of which values are reordered."""
    first = mixed_width(config) - linear_width(config)
    return np.concatenate([np.arange(first), first + _by_repetition(config, config.size(VALUE_DIM))])


def _mixed_rows(source: SourceTensor, config: ModelConfig) -> SourceTensor:
    return PickedRows(source, _mixed_order(config))


def _kernels(source: SourceTensor, config: ModelConfig) -> SourceTensor:
    return PickedRows(one_kernel_each(source, config), _mixed_order(config))


def _rows_of_heads(source: SourceTensor, config: ModelConfig) -> SourceTensor:
    return PickedRows(source, _by_repetition(config, config.size(VALUE_DIM)))


def _row_of_each_head(source: SourceTensor, config: ModelConfig) -> SourceTensor:
    return PickedRows(source, _by_repetition(config, 1))


def _columns_of_heads(source: SourceTensor, config: ModelConfig) -> SourceTensor:
    return PickedColumns(source, _by_repetition(config, config.size(VALUE_DIM)))


def _value_of_each_head(source: SourceTensor, config: ModelConfig) -> SourceTensor:
    return PickedColumns(source, _by_repetition(config, 1))


def _decay_of_each_head(source: SourceTensor, config: ModelConfig) -> SourceTensor:
    return decay(_value_of_each_head(source, config), config)


_REORDERED = {
    MODEL_TENSOR.SSM_CONV1D: _kernels,
    MODEL_TENSOR.SSM_DT: _value_of_each_head,
    MODEL_TENSOR.SSM_A: _decay_of_each_head,
    MODEL_TENSOR.SSM_OUT: _columns_of_heads,
}


def _linear_attention() -> tuple[TensorRule, ...]:
    mixed, gates = matrix(mixed_width, n_embd), matrix(linear_width, n_embd)
    steps = matrix(size_of(VALUE_HEADS), n_embd)
    rules = linear_attention(
        TensorRule(MODEL_TENSOR.ATTN_QKV, f"{LINEAR_MODULE}in_proj_qkv.weight", mixed, transform=_mixed_rows),
        TensorRule(MODEL_TENSOR.ATTN_GATE, f"{LINEAR_MODULE}in_proj_z.weight", gates, transform=_rows_of_heads),
        TensorRule(MODEL_TENSOR.SSM_BETA, f"{LINEAR_MODULE}in_proj_b.weight", steps, transform=_row_of_each_head),
        TensorRule(MODEL_TENSOR.SSM_ALPHA, f"{LINEAR_MODULE}in_proj_a.weight", steps, transform=_row_of_each_head),
    )
    return tuple(replace(rule, transform=_REORDERED.get(rule.tensor, rule.transform)) for rule in rules)


LINEAR = _linear_attention()


def _stated_sections(config: ModelConfig) -> Any:
    stated = config.stated_rope.get(_SECTIONS)
    return _DEFAULT_SECTIONS if stated is None else stated


def _sections(config: ModelConfig) -> list[int]:
    """How many rotated pairs turn with the time, the height and the width of a part of an image, and 0."""
    return [*_stated_sections(config), 0][:4]


SECTIONS = HyperParameter(Keys.Rope.DIMENSION_SECTIONS, i32s, _sections)


def _check(reader: ConfigReader, config: ModelConfig) -> None:
    check(reader, config)
    stated = _stated_sections(config)
    if not isinstance(stated, list) or len(stated) not in (3, 4) or any(type(one) is not int for one in stated):
        raise reader.error(reader.rope_key, f"{_SECTIONS} of three whole numbers")
    pairs = [pair % max(sum(stated), 1) for pair in range(rotated_width(config) // 2)]
    if min(stated) < 0 or any(pair >= 3 * stated[pair % 3] for pair in pairs):
        raise reader.error(
            reader.rope_key,
            f"{_SECTIONS} in which every rotated pair has its turn, such as {_DEFAULT_SECTIONS}: llama.cpp does not "
            "rotate the others",
        )


FAMILY = replace(
    QWEN3_NEXT,
    architectures=("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
    model_types=("qwen3_5_moe", "qwen3_5_moe_text"),
    arch=MODEL_ARCH.QWEN35MOE,
    tensors=hybrid_decoder(LINEAR, EXPERT_LAYER),
    hyper_parameters=hybrid_parameters(
        # no layer is dense, and transformers' configuration has no width for one
        *(
            replace(one, value=lambda config: config.raw.get("intermediate_size"))
            if one.key == Keys.LLM.FEED_FORWARD_LENGTH
            else one
            for one in common_parameters(head_size=head_dim)
        ),
        SECTIONS,
        *EXPERT_PARAMETERS,
    ),
    defaults={**DEFAULTS, "intermediate_size": 512, "num_local_experts": 256, "num_experts_per_tok": 8},
    aliases={"num_local_experts": ("num_experts",), "intermediate_size": (EXPERT_WIDTH,)},
    nested_config="text_config",
    refusals=(only_silu(), no_bias("attention_bias")),
    check=_check,
    rope_notes=frozenset({_SECTIONS, "mrope_interleaved"}),
    skipped=(
        WITHOUT_MTP,
        SkippedTensors(
            lambda config, name: name.startswith(("model.visual.", "visual.")),
            "they read images, and only the language model is converted",
        ),
    ),
    tokenizer=TokenizerRules(pre_tokenizer="qwen35"),
)
