"""Reads config.json of a checkpoint, whether transformers 4 or 5 wrote it, into a ``ModelConfig``.

Each family says which keys it has, what transformers takes where they are absent, and which values a GGUF file cannot
express; these are refused here, by name. What llama.cpp computes a little differently is told when the file is planned.
"""

from __future__ import annotations

import itertools
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ggufmoe.checkpoint.jsonfile import read_object
from ggufmoe.errors import ArchitectureError, CheckpointError
from ggufmoe.families import family_named, supported
from ggufmoe.families.config_reader import POSITIVE, ConfigReader, is_float32
from ggufmoe.families.family import REQUIRED, ConfigKey, Family, Kind, Refusal, no_tensors
from ggufmoe.families.model_config import ModelConfig, RopeScaling
from ggufmoe.files import what_instead
from ggufmoe.options.limits import MAX_EXPERTS, MAX_LAYERS

_LOG = logging.getLogger("ggufmoe")

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
    for model in sorted(path for place in ("", "hub/") for path in directory.glob(f"{place}models--*--*")):
        repo_id = model.name.removeprefix("models--").replace("--", "/", 1)
        return CheckpointError(f"{directory} is a Hugging Face cache; give the id of a model in it, such as {repo_id}")
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
    family = _family(path, raw)
    if family.nested_config is not None and isinstance(inner := raw.get(family.nested_config), dict):
        raw = {**raw, **inner, "architectures": raw.get("architectures")}
    keys = ConfigReader(path, raw, family.defaults, family.aliases)
    family = next((variant.family for variant in family.variants if variant.holds(keys)), family)
    _refuse_inexpressible(keys, family.refusals)
    n_embd = keys.size("hidden_size")
    n_head = keys.size("num_attention_heads")
    n_vocab = keys.size("vocab_size")
    theta, scaling, rotary_fraction = _rope(keys, family)
    if scaling.kind == "llama3" and family.computed is no_tensors:
        raise CheckpointError(
            f"{path}: llama.cpp's {family.gguf_arch} graph does not take the factors of rope type llama3, and would "
            "answer as another model"
        )
    config = ModelConfig(
        architecture=family.architecture,
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
        **(_experts(keys) if family.has_experts else {}),
        bos_token_id=keys.token("bos_token_id", n_vocab),
        eos_token_id=keys.token("eos_token_id", n_vocab),
        sliding_window=family.sliding_window(keys),
        rotary_fraction=rotary_fraction,
        values=MappingProxyType(_values(keys, family.keys)),
        raw=raw,
    )
    _check(keys, config, family)
    return config


def _check(keys: ConfigReader, config: ModelConfig, family: Family) -> None:
    """Raise CheckpointError for values that contradict each other, or that llama.cpp does not take."""
    path = keys.path
    if config.n_head % config.n_head_kv:
        raise CheckpointError(
            f"{path}: num_attention_heads {config.n_head} is not a multiple of num_key_value_heads {config.n_head_kv}"
        )
    if config.head_dim % 2:
        raise CheckpointError(f"{path}: head_dim {config.head_dim} is odd, but rope rotates pairs of values")
    if family.check is not None:
        family.check(keys, config)
    if (n_blocks := family.n_blocks(config)) > MAX_LAYERS:
        raise CheckpointError(
            f"{path} has {n_blocks} layers with those of multi-token prediction, and llama.cpp takes up to {MAX_LAYERS}"
        )


def _family(path: Path, raw: Mapping[str, Any]) -> Family:
    named = raw.get("architectures")
    architecture = named[0] if isinstance(named, list) and named else None
    family = family_named(architecture, raw.get("model_type"))
    if family is not None:
        return family
    if architecture is None:
        raise ArchitectureError(f"{path} names no architecture; {supported(raw.get('model_type'))}")
    raise ArchitectureError(
        f"{path}: the architecture {architecture!r:.100} is not supported; {supported(architecture)}"
    )


def _values(reader: ConfigReader, keys: Iterable[ConfigKey]) -> Mapping[str, Any]:
    """The keys that only the family has, checked."""
    read: Mapping[Kind, Callable[[str], Any]] = {
        Kind.SIZE: reader.size,
        Kind.COUNT: lambda name: reader.size(name, minimum=0),
        Kind.NUMBER: reader.number,
        Kind.FLAG: reader.flag,
        Kind.TEXT: reader.text,
    }
    values: dict[str, Any] = {}
    for key in keys:
        if reader.value(key.name) is not None:
            values[key.name] = read[key.kind](key.name)
        elif key.default is REQUIRED:
            raise reader.missing(key.name)
        else:
            values[key.name] = key.default
    return values


def _refuse_inexpressible(reader: ConfigReader, refusals: Iterable[Refusal]) -> None:
    for refusal in refusals:
        value = reader.value(refusal.key)
        is_stated = value is not None or reader.spelling(refusal.key) in reader.raw
        # types are compared as well: 0 == False
        is_allowed = any(type(value) is type(one) and value == one for one in refusal.allowed)
        if is_stated and not is_allowed and not refusal.unless(reader):
            raise reader.error(refusal.key, refusal.expected)


def _head_dim(keys: ConfigReader, n_embd: int, n_head: int) -> int:
    if keys.value("head_dim") is None and n_embd % n_head:
        raise CheckpointError(f"{keys.path}: hidden_size {n_embd} is not a multiple of num_attention_heads {n_head}")
    return keys.size("head_dim", default=n_embd // n_head)


def _experts(reader: ConfigReader) -> dict[str, int]:
    n_expert = reader.size("num_local_experts", maximum=MAX_EXPERTS)
    return {"n_expert": n_expert, "n_expert_used": reader.size("num_experts_per_tok", maximum=n_expert)}


def _rope(keys: ConfigReader, family: Family) -> tuple[float, RopeScaling, float]:
    """Read rope theta, scaling and the rotated part of a head: from ``rope_parameters`` (transformers 5), or from
    ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor``.
    """
    key = keys.rope_key
    given = keys.raw.get(key)
    if given is None:
        given = family.defaults.get("rope_scaling", {})
    if not isinstance(given, dict):
        raise keys.error(key, "an object or null")
    stated = family.common_rope(given)
    parameters = {name: value for name, value in stated.items() if value is not None and name not in family.rope_notes}
    theta = parameters.pop("rope_theta", keys.value("rope_theta"))
    if not is_float32(theta) or theta <= 0:
        raise CheckpointError(f"{keys.path}: rope_theta is {theta!r:.40}, expected {POSITIVE}")
    kind = parameters.pop("rope_type", parameters.get("type", "default"))
    parameters.pop("type", None)
    _fill_in_rope(keys, kind, parameters)
    fraction = family.rotary_fraction
    part = parameters.pop("partial_rotary_factor", keys.value("partial_rotary_factor"))
    if part not in (None, 1) and (fraction is None or not is_float32(part) or not 0 < part < 1):
        raise CheckpointError(
            f"{keys.path}: {key} has 'partial_rotary_factor', which is not supported for rope type {kind}"
        )
    scaling = _scaling(keys, key, "none" if kind == "default" else kind, parameters)
    return float(theta), scaling, float(part if part is not None else 1.0 if fraction is None else fraction)


def _fill_in_rope(keys: ConfigReader, kind: object, parameters: dict[str, Any]) -> None:
    """Add the original context and YaRN's factor to ``parameters`` if they are missing, derived as in transformers."""
    if kind in ("yarn", "llama3") and _ORIGINAL not in parameters and keys.raw.get(_ORIGINAL) is not None:
        parameters[_ORIGINAL] = keys.size(_ORIGINAL)
    if kind == "yarn" and "factor" not in parameters and is_float32(parameters.get(_ORIGINAL)):
        parameters["factor"] = keys.size("max_position_embeddings") / max(parameters[_ORIGINAL], 1)
    if kind in ("yarn", "linear") and _ORIGINAL not in parameters:
        parameters[_ORIGINAL] = keys.size("max_position_embeddings")


def _scaling(keys: ConfigReader, key: str, kind: object, parameters: dict[str, Any]) -> RopeScaling:
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        supported = ", ".join("default" if name == "none" else name for name in _ROPE_KEYS)
        raise CheckpointError(f"{keys.path}: rope type {kind!r:.40} is not supported; supported are {supported}")
    required, optional = _ROPE_KEYS[kind]
    unknown = sorted(parameters.keys() - required - optional - _ROPE_NOTES)
    nested = [name for name in unknown if isinstance(parameters[name], (dict, list))]
    if nested:
        raise CheckpointError(f"{keys.path}: {key} has {nested[0]!r:.60}, which is not supported for rope type {kind}")
    if unknown:
        _LOG.warning(
            "%s: %s has %s, which is not a parameter of rope type %s (nor in transformers); ignored",
            *(keys.path, key, ", ".join(map("{!r:.60}".format, unknown)), kind),
        )
    known = {name: parameters.get(name) for name in sorted(required | parameters.keys() & optional)}
    for name, value in known.items():
        _check_rope_parameter(keys, f"{key}.{name}", name, value)
    return RopeScaling(kind, {name: float(value) for name, value in known.items() if value is not None})


def _check_rope_parameter(keys: ConfigReader, where: str, name: str, value: object) -> None:
    if name == "truncate" and isinstance(value, bool):
        return
    if not is_float32(value) or value < 0 or (value == 0 and name not in _MAY_BE_ZERO):  # type: ignore[operator]
        raise CheckpointError(f"{keys.path}: {where} is {value!r:.40}, expected {POSITIVE}")
