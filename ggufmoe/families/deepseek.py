"""DeepSeek v1 (DeepSeek-MoE), and the DeepSeek mixtures that mergekit writes: Llama with experts and shared experts.

llama.cpp's deepseek graph never rescales the weights of the chosen experts. Where a configuration asks for that
(``norm_topk_prob``, as in all of mergekit's), its granitemoe graph computes the model, or its llama graph where there
are no shared experts. Source: ``DeepseekModel`` of ``conversion/deepseek.py``, ``src/models/deepseek.cpp``,
``granite-moe.cpp`` and ``llama.cpp`` at the pinned llama.cpp; defaults and arithmetic from configuration_deepseek.py
and modeling_deepseek.py of deepseek-ai/deepseek-moe-16b-base, as transformers has no class for the family.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ggufmoe.families.config_reader import ConfigReader
from ggufmoe.families.deepseek_v2 import (
    DENSE_LAYERS,
    EXPERT_WIDTH,
    EXPERTS_EVERYWHERE,
    HAS_EXPERTS,
    N_SHARED,
    shared_width,
)
from ggufmoe.families.family import (
    ConfigKey,
    Family,
    HyperParameter,
    Kind,
    Refusal,
    TokenizerRules,
    Variant,
    no_tensors,
)
from ggufmoe.families.llama import ATTENTION, LLAMA_KEYS, REFUSALS
from ggufmoe.families.llama import FAMILY as LLAMA
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.rope_keys import unexpressed_rope
from ggufmoe.families.standard import (
    common_parameters,
    decoder,
    every_expert_is_used,
    experts,
    feed_forward,
    heads_of_whole_width,
    layers_before,
    not_rescaled,
    shared_experts,
    size_of,
)
from ggufmoe.gguf.upstream import MODEL_ARCH, Keys
from ggufmoe.gguf.values import f32, text, u32

_EXPERTS = experts(size_of(EXPERT_WIDTH), where=HAS_EXPERTS)
_SHARED = shared_experts(shared_width, where=HAS_EXPERTS)


def _check(reader: ConfigReader, config: ModelConfig) -> None:
    heads_of_whole_width(reader, config)
    if config.size(N_SHARED) == 0:
        raise reader.error(N_SHARED, "1 or more: llama.cpp's deepseek graph has a shared expert in every layer")
    if config.rope_scaling.kind != "none":
        raise reader.error("rope_scaling", "null, which the converter takes for this family")


def _check_rescaled(reader: ConfigReader, config: ModelConfig) -> None:
    heads_of_whole_width(reader, config)
    if config.size(DENSE_LAYERS):
        raise reader.error(
            DENSE_LAYERS,
            "0: of llama.cpp's graphs for this family the one that has dense layers never rescales the weights of the "
            "chosen experts (norm_topk_prob)",
        )


def _of_experts(parameters: Iterable[HyperParameter]) -> tuple[HyperParameter, ...]:
    """The same with the width of an expert for that of a dense layer, as graphs without dense layers have it."""
    return tuple(
        replace(one, value=size_of(EXPERT_WIDTH)) if one.key == Keys.LLM.FEED_FORWARD_LENGTH else one
        for one in parameters
    )


def _shares(reader: ConfigReader) -> bool:
    return reader.value(N_SHARED) not in (None, 0)


def _rescales(reader: ConfigReader) -> bool:
    return reader.flag("norm_topk_prob")


def _is_mergekits(reader: ConfigReader) -> bool:
    """Whether the weights are rescaled; with dense layers only where that matters, which is refused."""
    return _rescales(reader) and not (reader.value(DENSE_LAYERS) and every_expert_is_used(reader))


_RESCALED = Family(
    architectures=("DeepseekRescaledForCausalLM",),
    model_types=(),
    arch=MODEL_ARCH.GRANITE_MOE,
    tensors=decoder(*ATTENTION, *_EXPERTS, *_SHARED),
    hyper_parameters=(
        *_of_experts(common_parameters()),
        *LLAMA_KEYS,
        # the only one of Granite's factors that llama.cpp does not take for one where it is missing
        HyperParameter(Keys.LLM.LOGIT_SCALE, f32, lambda config: 1.0),
        HyperParameter(Keys.LLM.EXPERT_SHARED_FEED_FORWARD_LENGTH, u32, shared_width),
    ),
    defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        EXPERT_WIDTH: 1407,
    },
    aliases={"num_local_experts": ("n_routed_experts",)},
    keys=(ConfigKey(EXPERT_WIDTH), ConfigKey(N_SHARED, Kind.COUNT, 0), ConfigKey(DENSE_LAYERS, Kind.COUNT, 0)),
    refusals=(
        *REFUSALS,
        Refusal("scoring_func", ("softmax", None), "'softmax', by which llama.cpp scores experts of this family"),
        EXPERTS_EVERYWHERE,
    ),
    check=_check_rescaled,
    computed=LLAMA.computed,
    unexpressed=unexpressed_rope,
    tokenizer=LLAMA.tokenizer,
)
_UNSHARED = replace(
    _RESCALED,
    architectures=("DeepseekUnsharedForCausalLM",),
    arch=MODEL_ARCH.LLAMA,
    tensors=decoder(*ATTENTION, *_EXPERTS),
    hyper_parameters=(*_of_experts(common_parameters()), *LLAMA_KEYS),
)
FAMILY = replace(
    _RESCALED,
    architectures=("DeepseekForCausalLM",),
    model_types=("deepseek",),
    arch=MODEL_ARCH.DEEPSEEK,
    tensors=decoder(*ATTENTION, *feed_forward(where=layers_before(DENSE_LAYERS)), *_EXPERTS, *_SHARED),
    hyper_parameters=(
        *common_parameters(),
        *LLAMA_KEYS,
        HyperParameter(Keys.Rope.SCALING_TYPE, text, lambda config: "none"),
        HyperParameter(Keys.LLM.LEADING_DENSE_BLOCK_COUNT, u32, size_of(DENSE_LAYERS)),
        HyperParameter(Keys.LLM.EXPERT_FEED_FORWARD_LENGTH, u32, size_of(EXPERT_WIDTH)),
        HyperParameter(Keys.LLM.EXPERT_WEIGHTS_SCALE, f32, lambda config: 1.0),
        HyperParameter(Keys.LLM.EXPERT_SHARED_COUNT, u32, size_of(N_SHARED)),
    ),
    check=_check,
    computed=no_tensors,
    arithmetic=not_rescaled,
    tokenizer=TokenizerRules(),
    variants=(
        Variant(lambda reader: not _shares(reader) and (_rescales(reader) or every_expert_is_used(reader)), _UNSHARED),
        Variant(_is_mergekits, _RESCALED),
    ),
)
