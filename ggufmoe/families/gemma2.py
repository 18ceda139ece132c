"""Gemma 2: Gemma 3 without norms of queries and keys, with capped logits, and a window in every second layer.

Source: ``Gemma2Model`` of ``conversion/gemma.py`` and ``src/models/gemma2.cpp`` at the pinned llama.cpp; defaults from
transformers' configuration_gemma2.py, 5.24.
"""

from __future__ import annotations

from ggufmoe.families.config_reader import ConfigReader
from ggufmoe.families.family import ConfigKey, Family, HyperParameter, Kind, Refusal, SkippedTensors
from ggufmoe.families.gemma3 import (
    ATTENTION_CAP,
    DEFAULTS,
    FINAL_CAP,
    KINDS,
    NORMS,
    REFUSALS,
    SCALAR,
    check_scalar,
    stated_pattern,
    windowed,
)
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.families.standard import (
    OUTPUT,
    attention,
    common_parameters,
    decoder,
    feed_forward,
    head_dim,
    kinds_of_layers,
    norms_around_zero,
    number_of,
    stated_window,
)
from ggufmoe.gguf.upstream import MODEL_ARCH, Keys
from ggufmoe.gguf.values import f32, u32

_has_window = windowed(lambda config: 2)
_TENSORS = decoder(*NORMS, *attention(), *feed_forward())


def _check(reader: ConfigReader, config: ModelConfig) -> None:
    kinds_of_layers(reader, config, *KINDS)
    check_scalar(reader, config, 46)
    if config.sliding_window is None or not any(_has_window(config, layer) for layer in range(config.n_layer)):
        raise reader.error("sliding_window", "the window of some layers, which llama.cpp's gemma2 graph always has")
    for key in (ATTENTION_CAP, FINAL_CAP):
        if reader.raw.get(key, 1) is None or config.number(key) <= 0:
            raise reader.error(key, "a number above 0, because llama.cpp's gemma2 graph always caps")
    if config.rope_theta != 1e4 or config.rope_scaling.kind != "none":
        key = "rope_theta" if "rope_theta" in reader.raw else reader.rope_key
        raise reader.error(key, "a base of 10000 without scaling, which llama.cpp takes for gemma2")


FAMILY = Family(
    architectures=("Gemma2ForCausalLM",),
    model_types=("gemma2",),
    arch=MODEL_ARCH.GEMMA2,
    # the embedding is the output: llama.cpp has no other
    tensors=norms_around_zero(rule for rule in _TENSORS if rule is not OUTPUT),
    hyper_parameters=(
        *(one for one in common_parameters(head_size=head_dim) if one.key != Keys.Rope.FREQ_BASE),
        HyperParameter(Keys.LLM.ATTN_LOGIT_SOFTCAPPING, f32, number_of(ATTENTION_CAP)),
        HyperParameter(Keys.LLM.FINAL_LOGIT_SOFTCAPPING, f32, number_of(FINAL_CAP)),
        HyperParameter(Keys.Attention.SLIDING_WINDOW, u32, lambda config: config.sliding_window),
        stated_pattern(_has_window, 2),
    ),
    defaults={**DEFAULTS, "vocab_size": 256000, "max_position_embeddings": 8192, "rope_theta": 1e4},
    keys=(
        ConfigKey(SCALAR, Kind.NUMBER, 256),
        ConfigKey(ATTENTION_CAP, Kind.NUMBER, 50.0),
        ConfigKey(FINAL_CAP, Kind.NUMBER, 30.0),
    ),
    refusals=(
        *REFUSALS,
        Refusal("tie_word_embeddings", (True,), "true: llama.cpp's gemma2 graph takes the embedding for the output"),
    ),
    check=_check,
    sliding_window=stated_window,
    skipped=(SkippedTensors(lambda config, name: name == "lm_head.weight", "llama.cpp takes the embedding for it"),),
    arithmetic=None,
)
