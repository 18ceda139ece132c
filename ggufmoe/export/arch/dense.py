"""Llama and Mistral, and what every family of llama.cpp's ``llama`` architecture has in common.

Source: ``conversion/llama.py`` and ``TextModel.set_gguf_parameters`` of ``conversion/base.py`` at the pinned llama.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from ggufmoe.checkpoint.source import ModelConfig, ModelSource, RopeScaling
from ggufmoe.export.arch import ModelTensor
from ggufmoe.export.model_keys import f32, text, u32
from ggufmoe.export.source_rows import Computed, RopeOrdered
from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.own_keys import SLIDING_WINDOW
from ggufmoe.gguf.upstream import LLAMA, Keys

NAME = LLAMA
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


def tensors(source: ModelSource) -> Iterator[ModelTensor]:
    """Every tensor of a dense model."""
    yield from outer_tensors(source)
    for layer in range(source.config.n_layer):
        yield from attention_tensors(source, layer)
        for name, projection in (("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")):
            yield plain(source, f"blk.{layer}.ffn_{name}.weight", f"model.layers.{layer}.mlp.{projection}.weight")


def hyper_parameters(config: ModelConfig) -> dict[str, GGUFValue]:
    """The ``llama.*`` keys of a dense model; transformers always knows a head size here, so it is always written."""
    return llama_parameters(config, with_head_size=True)


def plain(source: ModelSource, name: str, source_name: str) -> ModelTensor:
    """A tensor that is one of the source's, as it is."""
    tensor = source.tensors[source_name]
    return ModelTensor(name, tensor.shape, (tensor,))


def outer_tensors(source: ModelSource) -> Iterator[ModelTensor]:
    """Embedding, output (unless it is the embedding), last norm, and the rotary factors of Llama 3."""
    yield plain(source, "token_embd.weight", "model.embed_tokens.weight")
    yield plain(source, "output_norm.weight", "model.norm.weight")
    if "lm_head.weight" in source.tensors:
        yield plain(source, "output.weight", "lm_head.weight")
    if source.config.rope_scaling.kind == "llama3":
        factors = llama3_rope_factors(source.config)
        yield ModelTensor("rope_freqs.weight", (len(factors),), (Computed("rope_freqs.weight", factors),))


def attention_tensors(source: ModelSource, layer: int) -> Iterator[ModelTensor]:
    """Attention and both norms of one layer; rows of q and k in rotary order."""
    block, stem, config = f"blk.{layer}", f"model.layers.{layer}", source.config
    yield plain(source, f"{block}.attn_norm.weight", f"{stem}.input_layernorm.weight")
    yield plain(source, f"{block}.ffn_norm.weight", f"{stem}.post_attention_layernorm.weight")
    for letter in "qk":
        tensor = source.tensors[f"{stem}.self_attn.{letter}_proj.weight"]
        rows = RopeOrdered(tensor, config.head_dim)
        yield ModelTensor(f"{block}.attn_{letter}.weight", tensor.shape, (rows,))
    yield plain(source, f"{block}.attn_v.weight", f"{stem}.self_attn.v_proj.weight")
    yield plain(source, f"{block}.attn_output.weight", f"{stem}.self_attn.o_proj.weight")


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


def llama_parameters(config: ModelConfig, *, with_head_size: bool) -> dict[str, GGUFValue]:
    """The ``llama.*`` keys in the converter's order, and the sliding window that llama.cpp does not apply."""
    keys: dict[str, GGUFValue | None] = {
        Keys.LLM.BLOCK_COUNT: u32(config.n_layer),
        Keys.LLM.CONTEXT_LENGTH: u32(config.n_ctx),
        Keys.LLM.EMBEDDING_LENGTH: u32(config.n_embd),
        Keys.LLM.FEED_FORWARD_LENGTH: u32(config.n_ff),
        Keys.Attention.HEAD_COUNT: u32(config.n_head),
        Keys.Attention.HEAD_COUNT_KV: u32(config.n_head_kv),
        **_rope_scaling_keys(config.rope_scaling),
        Keys.Rope.FREQ_BASE: f32(config.rope_theta),
        Keys.Attention.LAYERNORM_RMS_EPS: f32(config.rms_norm_eps),
        Keys.LLM.EXPERT_COUNT: u32(config.n_expert) if config.n_expert else None,
        Keys.LLM.EXPERT_USED_COUNT: u32(config.n_expert_used) if config.n_expert else None,
        Keys.Attention.KEY_LENGTH: u32(config.head_dim) if with_head_size else None,
        Keys.Attention.VALUE_LENGTH: u32(config.head_dim) if with_head_size else None,
        Keys.LLM.VOCAB_SIZE: u32(config.n_vocab),
        Keys.Rope.DIMENSION_COUNT: u32(config.head_dim),
    }
    window = unapplied_window(config)
    ours = {} if window is None else {SLIDING_WINDOW: u32(window)}
    return {key.format(arch=NAME): value for key, value in keys.items() if value is not None} | ours


_YARN_KEYS = {
    "extrapolation_factor": Keys.Rope.SCALING_YARN_EXT_FACTOR,
    "attn_factor": Keys.Rope.SCALING_YARN_ATTN_FACTOR,
    "attention_factor": Keys.Rope.SCALING_YARN_ATTN_FACTOR,
    "beta_fast": Keys.Rope.SCALING_YARN_BETA_FAST,
    "beta_slow": Keys.Rope.SCALING_YARN_BETA_SLOW,
}
"""Parameters of YaRN to the keys of the converter. llama.cpp's ``llama`` architecture reads none of these keys."""

_YARN_DEFAULTS = {"extrapolation_factor": 1.0, "attn_factor": 1.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": 1.0}
"""What llama.cpp computes with whatever a file says."""


def _rope_scaling_keys(scaling: RopeScaling) -> dict[str, GGUFValue]:
    if scaling.kind not in ("linear", "yarn"):
        return {}
    given: Mapping[str, float] = scaling.parameters
    keys = {Keys.Rope.SCALING_TYPE: text(scaling.kind), Keys.Rope.SCALING_FACTOR: f32(given["factor"])}
    if scaling.kind == "yarn":
        keys[Keys.Rope.SCALING_ORIG_CTX_LEN] = u32(int(given["original_max_position_embeddings"]))
        keys |= {ours: f32(given[theirs]) for theirs, ours in _YARN_KEYS.items() if theirs in given}
        default = _yarn_scale(given["factor"], 1.0)
        if (scale := yarn_attention_scale(given)) != default:
            keys[Keys.Rope.SCALING_ATTN_FACTOR] = f32(scale / default)
    return keys


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


def unexpressed(config: ModelConfig) -> Iterator[str]:
    """What of the model's configuration llama.cpp leaves out for this architecture, a clause each."""
    scaling, n_ctx = config.rope_scaling, config.n_ctx
    if (window := unapplied_window(config)) is not None:
        yield (
            f"each token attends to the last {window} tokens only (sliding_window), and llama.cpp has no such window "
            f"for this architecture: past position {window} the answers are another model's, so keep the context "
            f"at {window} tokens (--ctx-size)"
        )
    code = config.raw.get("auto_map")
    if isinstance(code, dict) and "AutoModelForCausalLM" in code:
        yield f"its own modelling code (auto_map) is not run; it is converted as a plain {config.architecture}"
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


def unapplied_window(config: ModelConfig) -> int | None:
    """The sliding window where it is shorter than the context; None where it changes nothing."""
    window = config.sliding_window
    return window if window is not None and window < config.n_ctx else None
