"""Rope scaling in GGUF: its keys, and the table of factors that Llama 3 needs.

Source: ``TextModel.set_gguf_parameters`` of ``conversion/base.py`` and ``generate_extra_tensors`` of
``conversion/llama.py`` at the pinned llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ggufmoe.families.family import HyperParameter
from ggufmoe.families.model_config import ModelConfig
from ggufmoe.gguf.upstream import MODEL_TENSOR, Keys
from ggufmoe.gguf.values import f32, text, u32

_YARN_DEFAULTS = {"extrapolation_factor": 1.0, "attn_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": 1.0}
"""What llama.cpp computes with whatever a file says."""


def _kind(config: ModelConfig) -> str | None:
    kind = config.rope_scaling.kind
    return kind if kind in ("linear", "yarn") else None


def _factor(config: ModelConfig) -> float | None:
    return config.rope_scaling.parameters["factor"] if _kind(config) else None


def _original_context(config: ModelConfig) -> int | None:
    return int(config.rope_scaling.parameters["original_max_position_embeddings"]) if _is_yarn(config) else None


def _is_yarn(config: ModelConfig) -> bool:
    return config.rope_scaling.kind == "yarn"


def _yarn(*names: str) -> Callable[[ModelConfig], float | None]:
    """The first of these parameters of YaRN that is given."""

    def value(config: ModelConfig) -> float | None:
        given = config.rope_scaling.parameters if _is_yarn(config) else {}
        return next((given[name] for name in names if name in given), None)

    return value


def _attention_factor(config: ModelConfig) -> float | None:
    """The factor by which transformers' scale of YaRN differs from llama.cpp's; None where it is the same."""
    if not _is_yarn(config):
        return None
    given = config.rope_scaling.parameters
    default = _yarn_scale(given["factor"], 1.0)
    scale = yarn_attention_scale(given)
    return None if scale == default else scale / default


ROPE_SCALING = (
    HyperParameter(Keys.Rope.SCALING_TYPE, text, _kind),
    HyperParameter(Keys.Rope.SCALING_FACTOR, f32, _factor),
    HyperParameter(Keys.Rope.SCALING_ORIG_CTX_LEN, u32, _original_context),
    HyperParameter(Keys.Rope.SCALING_YARN_EXT_FACTOR, f32, _yarn("extrapolation_factor")),
    HyperParameter(Keys.Rope.SCALING_YARN_ATTN_FACTOR, f32, _yarn("attention_factor", "attn_factor")),
    HyperParameter(Keys.Rope.SCALING_YARN_BETA_FAST, f32, _yarn("beta_fast")),
    HyperParameter(Keys.Rope.SCALING_YARN_BETA_SLOW, f32, _yarn("beta_slow")),
    HyperParameter(Keys.Rope.SCALING_ATTN_FACTOR, f32, _attention_factor),
)
"""The keys of rope scaling. llama.cpp reads none of those that begin with yarn, and the last one is ours: the converter
does not write it, and llama.cpp multiplies YaRN's cosines and sines with it."""


def yarn_attention_scale(given: Mapping[str, float]) -> float:
    """What transformers multiplies YaRN's cosines and sines with (``_compute_yarn_parameters``, 5.24).

    llama.cpp multiplies them with the default, 0.1 ln(factor) + 1, and with its key ``rope.scaling.attn_factor``.
    """
    if "attention_factor" in given:
        return given["attention_factor"]
    above, below = given.get("mscale"), given.get("mscale_all_dim")
    if above and below:
        return _yarn_scale(given["factor"], above) / _yarn_scale(given["factor"], below)
    return _yarn_scale(given["factor"], 1.0)


def _yarn_scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def unexpressed_rope(config: ModelConfig) -> Iterator[str]:
    """What of a model's rope scaling llama.cpp leaves out, a clause each."""
    scaling, n_ctx = config.rope_scaling, config.n_ctx
    if scaling.kind == "dynamic":
        yield (
            f"its dynamic rope scaling begins past position {n_ctx}, and llama.cpp has none: "
            f"keep the context at {n_ctx} tokens"
        )
    if scaling.kind == "yarn":
        for name, default in _YARN_DEFAULTS.items():
            value = scaling.parameters.get(name, default)
            if value != default:
                shown, computed = (bool(value), True) if name == "truncate" else (f"{value:g}", f"{default:g}")
                yield f"{name} of its YaRN rope scaling is {shown}, and llama.cpp computes as if it were {computed}"


def llama3_rope_table(config: ModelConfig) -> Iterator[tuple[Any, Sequence[float]]]:
    """A ``Family.computed``: the rotary factors of a model with Llama 3's rope scaling."""
    if config.rope_scaling.kind == "llama3":
        yield MODEL_TENSOR.ROPE_FREQS, llama3_rope_factors(config)


def llama3_rope_factors(config: ModelConfig) -> list[float]:
    """What Llama 3 divides each rotary frequency by, (head_dim / 2,): 1 for short waves, ``factor`` for long ones.

    In single precision step by step, as the converter does it with torch, where a number divided by a tensor is that
    number times the tensor's reciprocal.
    """
    given, single = config.rope_scaling.parameters, np.float32
    factor, low = given.get("factor", 8.0), given.get("low_freq_factor", 1.0)
    high, context = given.get("high_freq_factor", 4.0), given.get("original_max_position_embeddings", 8192)
    factors: list[float] = []
    for i in range(0, config.head_dim, 2):
        exponent = float(single(i) / single(config.head_dim))
        frequency = single(1) / single(config.rope_theta**exponent)
        wavelength = single(1) / frequency * single(2 * math.pi)
        if wavelength < single(context / high):
            factors.append(1.0)
        elif wavelength > single(context / low):
            factors.append(factor)
        else:
            smooth = (single(1) / wavelength * single(context) - single(low)) / single(high - low)
            factors.append(float(single(1) / ((single(1) - smooth) / single(factor) + smooth)))
    return factors
