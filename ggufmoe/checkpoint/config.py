"""Reads config.json of a checkpoint, whether transformers 4 or 5 wrote it, into a ``ModelConfig``.

Missing keys get the defaults of transformers' own configuration classes (models/{llama,mistral,mixtral}/
configuration_*.py, 5.12). Settings that a GGUF file of these families cannot express and that change every answer are
refused here, by name; what llama.cpp computes a little differently is told when the file is planned.
"""

from __future__ import annotations

import itertools
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ggufmoe.checkpoint.jsonfile import read_object
from ggufmoe.checkpoint.source import ModelConfig, RopeScaling
from ggufmoe.errors import ArchitectureError, CheckpointError
from ggufmoe.files import what_instead
from ggufmoe.options.limits import MAX_EXPERTS, MAX_LAYERS

_LOG = logging.getLogger("ggufmoe")

ARCHITECTURES = {"mixtral": "MixtralForCausalLM", "mistral": "MistralForCausalLM", "llama": "LlamaForCausalLM"}
"""Supported model types to their architectures."""

_ALIASES = {"LLaMAForCausalLM": "LlamaForCausalLM"} | {
    name.replace("ForCausalLM", "Model"): name for name in ARCHITECTURES.values()
}
"""Old spellings, and the classes of models saved without their head, which lack at most lm_head.weight."""
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "LlamaForCausalLM": {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1e4},
    "MistralForCausalLM": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "sliding_window": 4096,
    },
    "MixtralForCausalLM": {
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
}
_MAX_SIZE = 2**31 - 1
_MAX_FOLDERS = 1000
"""How many subfolders of a directory without config.json are searched for one, to name it in the message."""

_ORIGINAL = "original_max_position_embeddings"
_ROPE_KEYS = {
    "none": (frozenset[str](), frozenset[str]()),
    "linear": (frozenset({"factor"}), frozenset({_ORIGINAL})),
    "dynamic": (frozenset({"factor"}), frozenset({_ORIGINAL})),
    "yarn": (
        frozenset({"factor", _ORIGINAL}),
        frozenset({"attention_factor", "attn_factor", "beta_fast", "beta_slow"})
        | frozenset({"extrapolation_factor", "mscale", "mscale_all_dim", "truncate"}),
    ),
    "llama3": (frozenset({"factor", "low_freq_factor", "high_freq_factor", _ORIGINAL}), frozenset[str]()),
}
"""Kind of rope scaling to its required and its optional parameters."""
_ROPE_NOTES = frozenset({"finetuned"})
"""Parameters that describe the origin of a model and do not affect the computation."""
_MAY_BE_ZERO = frozenset({"extrapolation_factor", "mscale", "mscale_all_dim", "truncate"})


def read_config(directory: Path) -> ModelConfig:
    """Read the hyper-parameters of a model from ``directory/config.json``.

    Raises ArchitectureError for a model family that is not supported, CheckpointError for a missing or invalid file.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise _no_config(directory)
    return parse_config(path, read_object(path))


def _no_config(directory: Path) -> CheckpointError:
    config = directory / "config.json"
    if config.is_symlink():
        return CheckpointError(f"{config} is {what_instead(config)}")
    cached = re.fullmatch(r"models--(.+?)--(.+)", directory.resolve().name)
    if cached and (directory / "snapshots").is_dir():
        return CheckpointError(
            f"{directory} is a model's folder in a Hugging Face cache; give its id, {cached[1]}/{cached[2]}, or one of "
            f"the folders in {directory / 'snapshots'}"
        )
    if (directory / "params.json").is_file():
        return CheckpointError(
            f"{directory} is in Mistral's own format (params.json); use the same model in Hugging Face's format"
        )
    if (directory / "adapter_config.json").is_file():
        return CheckpointError(f"{directory} is an adapter (LoRA), not a model; merge it into its base model first")
    if any(directory.glob("*.gguf")):
        return CheckpointError(
            f"{directory} holds GGUF files, which need no conversion; give one of them to run or chat"
        )
    deeper = sorted(path.parent for path in itertools.islice(directory.glob("*/config.json"), _MAX_FOLDERS))
    if deeper:
        return CheckpointError(f"{directory} has no config.json, but {deeper[0]} has one; give that folder")
    lacks = "; fetch it with the weights" if any(directory.glob("*.safetensors")) else ""
    return CheckpointError(f"{directory} has no config.json, so it is not a Hugging Face checkpoint{lacks}")


def quantization_method(raw: Mapping[str, Any]) -> str | None:
    """The quantization method that config.json states, or None; it may be left over from training."""
    stated = raw.get("quantization_config")
    if not stated:
        return None
    return str(stated.get("quant_method", "unknown")) if isinstance(stated, dict) else "unknown"


def parse_config(path: Path, raw: Mapping[str, Any]) -> ModelConfig:
    """The hyper-parameters in the content of config.json; ``path`` names the file in messages. Raises as above."""
    architecture = _architecture(path, raw)
    keys = _Keys(path, raw, _DEFAULTS[architecture])
    _refuse_inexpressible(keys)
    n_embd = keys.size("hidden_size")
    n_head = keys.size("num_attention_heads")
    n_vocab = keys.size("vocab_size")
    theta, scaling = _rope(keys)
    config = ModelConfig(
        architecture=architecture,
        n_layer=keys.size("num_hidden_layers", maximum=MAX_LAYERS),
        n_embd=n_embd,
        n_ff=keys.size("intermediate_size"),
        n_head=n_head,
        n_head_kv=keys.size("num_key_value_heads", default=n_head),
        head_dim=_head_dim(keys, n_embd, n_head),
        n_vocab=n_vocab,
        n_ctx=keys.size("max_position_embeddings"),
        rms_norm_eps=keys.positive("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=keys.flag("tie_word_embeddings"),
        **_experts(keys, architecture),
        bos_token_id=keys.token("bos_token_id", n_vocab),
        eos_token_id=keys.token("eos_token_id", n_vocab),
        sliding_window=None if architecture == "LlamaForCausalLM" else keys.optional_size("sliding_window"),
        raw=raw,
    )
    if config.n_head % config.n_head_kv:
        raise CheckpointError(
            f"{path}: num_attention_heads {config.n_head} is not a multiple of num_key_value_heads {config.n_head_kv}"
        )
    if config.head_dim % 2:
        raise CheckpointError(f"{path}: head_dim {config.head_dim} is odd, but rope rotates pairs of values")
    return config


class _Keys:
    """Typed access to the keys of a config; its errors name the file, the key and the expected value."""

    def __init__(self, path: Path, raw: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
        self.path = path
        self.raw = raw
        self._defaults = defaults

    def error(self, key: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {key} is {self.raw.get(key)!r:.100}, expected {expected}")

    def value(self, key: str) -> Any:
        return self.raw[key] if key in self.raw else self._defaults.get(key)

    def size(self, key: str, *, default: int | None = None, maximum: int = _MAX_SIZE) -> int:
        value = self.value(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self.path} has no {key}")
        if type(value) is not int or not 1 <= value <= maximum:
            raise self.error(key, f"a whole number from 1 to {maximum}")
        return value

    def optional_size(self, key: str) -> int | None:
        return None if self.value(key) is None else self.size(key)

    def positive(self, key: str) -> float:
        value = self.value(key)
        if not _is_finite(value) or value <= 0:
            raise self.error(key, "a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.value(key)
        if value not in (None, True, False):
            raise self.error(key, "true or false")
        return bool(value)

    def token(self, key: str, n_vocab: int) -> int | None:
        """A token id, the first of a list; None if it is absent or, with a warning, not in the vocabulary."""
        value = self.value(key)
        if isinstance(value, list) and value:
            value = value[0]
        if value is None:
            return None
        if type(value) is not int:
            raise self.error(key, "a token id")
        if not 0 <= value < n_vocab:
            _LOG.warning(
                "%s: %s %d is not in the vocabulary of %d tokens and is ignored", self.path, key, value, n_vocab
            )
            return None
        return value


def _is_finite(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _architecture(path: Path, raw: Mapping[str, Any]) -> str:
    named = raw.get("architectures")
    name = named[0] if isinstance(named, list) and named else ARCHITECTURES.get(str(raw.get("model_type")))
    supported = ", ".join(ARCHITECTURES.values())
    if name is None:
        raise ArchitectureError(f"{path} names no architecture; supported are {supported}")
    name = _ALIASES.get(name, name) if isinstance(name, str) else name
    if name not in ARCHITECTURES.values():
        raise ArchitectureError(f"{path}: the architecture {name!r:.100} is not supported; supported are {supported}")
    assert isinstance(name, str)
    return name


def _refuse_inexpressible(keys: _Keys) -> None:
    raw = keys.raw
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise keys.error("hidden_act", "'silu', the only activation that llama.cpp has for this family")
    for key in ("attention_bias", "mlp_bias"):
        if keys.flag(key):
            raise keys.error(key, "false: biases are not supported")
    kinds = raw.get("layer_types")
    if isinstance(kinds, list) and len(set(map(str, kinds))) > 1:
        raise keys.error("layer_types", "one kind of attention in all layers")


def _head_dim(keys: _Keys, n_embd: int, n_head: int) -> int:
    if keys.value("head_dim") is None and n_embd % n_head:
        raise CheckpointError(f"{keys.path}: hidden_size {n_embd} is not a multiple of num_attention_heads {n_head}")
    return keys.size("head_dim", default=n_embd // n_head)


def _experts(keys: _Keys, architecture: str) -> dict[str, int]:
    if architecture != "MixtralForCausalLM":
        return {}
    alias = "num_local_experts" not in keys.raw and "num_experts" in keys.raw
    n_expert = keys.size("num_experts" if alias else "num_local_experts", maximum=MAX_EXPERTS)
    return {"n_expert": n_expert, "n_expert_used": keys.size("num_experts_per_tok", maximum=n_expert)}


def _rope(keys: _Keys) -> tuple[float, RopeScaling]:
    """Read rope theta and scaling from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``."""
    key = "rope_parameters" if keys.raw.get("rope_parameters") is not None else "rope_scaling"
    given = keys.raw.get(key)
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise keys.error(key, "an object or null")
    parameters = {name: value for name, value in given.items() if value is not None}
    theta = parameters.pop("rope_theta", keys.value("rope_theta"))
    if not _is_finite(theta) or theta <= 0:
        raise CheckpointError(f"{keys.path}: rope_theta is {theta!r:.40}, expected a number above 0")
    kind = parameters.pop("rope_type", parameters.get("type", "default"))
    parameters.pop("type", None)
    _fill_in_rope(keys, kind, parameters)
    return float(theta), _scaling(keys, key, "none" if kind == "default" else kind, parameters)


def _fill_in_rope(keys: _Keys, kind: object, parameters: dict[str, Any]) -> None:
    """Add the original context and YaRN's factor to ``parameters`` if they are missing, derived as in transformers."""
    if kind in ("yarn", "llama3") and _ORIGINAL not in parameters and keys.raw.get(_ORIGINAL) is not None:
        parameters[_ORIGINAL] = keys.size(_ORIGINAL)
    if kind == "yarn" and "factor" not in parameters and _is_finite(parameters.get(_ORIGINAL)):
        parameters["factor"] = keys.size("max_position_embeddings") / max(parameters[_ORIGINAL], 1)
    if kind in ("yarn", "linear") and _ORIGINAL not in parameters:
        parameters[_ORIGINAL] = keys.size("max_position_embeddings")


def _scaling(keys: _Keys, key: str, kind: object, parameters: dict[str, Any]) -> RopeScaling:
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        supported = ", ".join("default" if name == "none" else name for name in _ROPE_KEYS)
        raise CheckpointError(f"{keys.path}: rope type {kind!r:.40} is not supported; supported are {supported}")
    rotary_part = parameters.pop("partial_rotary_factor", keys.value("partial_rotary_factor"))
    required, optional = _ROPE_KEYS[kind]
    unknown = sorted(parameters.keys() - required - optional - _ROPE_NOTES)
    nested = [name for name in unknown if isinstance(parameters[name], (dict, list))]
    if nested or rotary_part not in (None, 1):
        odd = nested[0] if nested else "partial_rotary_factor"
        raise CheckpointError(f"{keys.path}: {key} has {odd!r:.60}, which is not supported for rope type {kind}")
    if unknown:
        _LOG.warning(
            "%s: %s has %s, which is not a parameter of rope type %s (nor in transformers); ignored",
            *(keys.path, key, ", ".join(map("{!r:.60}".format, unknown)), kind),
        )
    known = {name: parameters.get(name) for name in sorted(required | parameters.keys() & optional)}
    for name, value in known.items():
        _check_rope_parameter(keys, f"{key}.{name}", name, value)
    return RopeScaling(kind, {name: float(value) for name, value in known.items() if value is not None})


def _check_rope_parameter(keys: _Keys, where: str, name: str, value: object) -> None:
    if name == "truncate" and isinstance(value, bool):
        return
    if not _is_finite(value) or value < 0 or (value == 0 and name not in _MAY_BE_ZERO):  # type: ignore[operator]
        raise CheckpointError(f"{keys.path}: {where} is {value!r:.40}, expected a number above 0")
