"""Granite 3: Llama with factors for embeddings, attention, residuals and logits.

Source: ``conversion/granite.py`` and ``src/models/granite.cpp`` at the pinned llama.cpp; defaults from transformers'
configuration_granite.py, 5.24.
"""

from __future__ import annotations

from dataclasses import replace

from ggufmoe.families.config_reader import ConfigReader
from ggufmoe.families.family import Arithmetic, ConfigKey, HyperParameter, Kind, TokenizerRules
from ggufmoe.families.llama import FAMILY as LLAMA
from ggufmoe.families.llama import LLAMA_KEYS
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.standard import common_parameters, heads_of_whole_width, number_of
from ggufmoe.gguf.upstream import MODEL_ARCH, Keys
from ggufmoe.gguf.values import f32

_SCALES = {
    "attention_multiplier": Keys.Attention.SCALE,
    "embedding_multiplier": Keys.LLM.EMBEDDING_SCALE,
    "residual_multiplier": Keys.LLM.RESIDUAL_SCALE,
    "logits_scaling": Keys.LLM.LOGIT_SCALE,
}
"""Keys of the configuration to those of a GGUF file, in the converter's order."""


def _arithmetic(config: ModelConfig) -> Arithmetic:
    return Arithmetic(
        embedding_scale=config.number("embedding_multiplier"),
        attention_scale=config.number("attention_multiplier"),
        residual_scale=config.number("residual_multiplier"),
        logit_scale=config.number("logits_scaling"),
    )


def _check(reader: ConfigReader, config: ModelConfig) -> None:
    heads_of_whole_width(reader, config)
    for key in _SCALES:
        if config.number(key) == 0:
            raise reader.error(key, "another number than 0, which llama.cpp takes for no factor")


FAMILY = replace(
    LLAMA,
    architectures=("GraniteForCausalLM",),
    model_types=("granite",),
    arch=MODEL_ARCH.GRANITE,
    # the converter writes no size of a head for this family
    hyper_parameters=(
        *common_parameters(head_size=lambda config: None),
        *LLAMA_KEYS,
        *(HyperParameter(written, f32, number_of(key)) for key, written in _SCALES.items()),
    ),
    keys=tuple(ConfigKey(key, Kind.NUMBER, 1.0) for key in _SCALES),
    check=_check,
    arithmetic=_arithmetic,
    stored_values=None,  # its factors are no whole numbers
    tokenizer=TokenizerRules(as_llama=True, pre_tokenizer="refact"),
)
