"""config.json of transformers 4 and 5, its defaults, and what is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from ggufmoe.checkpoint.config import parse_config, read_config
from ggufmoe.errors import ArchitectureError, CheckpointError
from ggufmoe.families.model_config import ModelConfig, RopeScaling
from tests.tiny import ARCHITECTURES, Tiny, config_json

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def config_of(fields: dict[str, Any] | None = None, **keys: Any) -> ModelConfig:
    """The config of a tiny model with these keys put in; ``...`` takes a key out."""
    return parse_config(Path("model/config.json"), config_json(Tiny(config=keys, **(fields or {}))))


def test_the_styles_of_transformers_4_and_5_are_the_same() -> None:
    fields = {"rope_theta": 1e6, "rope_scaling": LLAMA3, "arch": "llama"}
    four = config_of({**fields, "config_style": 4})
    five = config_of({**fields, "config_style": 5})
    assert four.rope_theta == five.rope_theta == 1e6
    assert four.rope_scaling == five.rope_scaling
    assert five.rope_scaling.kind == "llama3"
    assert five.rope_scaling.parameters["original_max_position_embeddings"] == 8192
    assert {**vars(four), "raw": None} == {**vars(five), "raw": None}


def test_a_mixtral_is_read_whole() -> None:
    config = config_of({"n_expert": 4, "n_expert_used": 3, "tie": True, "head_dim": 48})
    raw = config.raw
    assert config == ModelConfig(
        architecture="MixtralForCausalLM",
        n_layer=2,
        n_embd=256,
        n_ff=512,
        n_head=4,
        n_head_kv=2,
        head_dim=48,
        n_vocab=400,
        n_ctx=2048,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        rope_scaling=RopeScaling(),
        tie_embeddings=True,
        n_expert=4,
        n_expert_used=3,
        bos_token_id=1,
        eos_token_id=2,
        sliding_window=None,
        raw=raw,
    )


def test_missing_keys_get_the_defaults_of_transformers() -> None:
    optional = (
        "num_key_value_heads max_position_embeddings rms_norm_eps rope_theta sliding_window tie_word_embeddings "
        "hidden_act bos_token_id eos_token_id num_local_experts num_experts_per_tok rope_scaling"
    )
    absent = dict.fromkeys(optional.split(), ...)
    llama = config_of({"arch": "llama"}, **absent)
    assert (llama.n_head_kv, llama.n_ctx, llama.rms_norm_eps, llama.rope_theta) == (4, 2048, 1e-6, 1e4)
    assert (llama.sliding_window, llama.tie_embeddings, llama.n_expert) == (None, False, 0)
    assert (llama.bos_token_id, llama.eos_token_id) == (None, None)
    mistral = config_of({"arch": "mistral", "n_head": 8}, **absent)
    assert (mistral.n_head_kv, mistral.n_ctx, mistral.rms_norm_eps, mistral.rope_theta) == (8, 131072, 1e-6, 1e4)
    assert mistral.sliding_window == 4096
    mixtral = config_of({"n_head": 8}, **absent)
    assert (mixtral.n_head_kv, mixtral.n_ctx, mixtral.rms_norm_eps, mixtral.rope_theta) == (8, 131072, 1e-5, 1e6)
    assert (mixtral.n_expert, mixtral.n_expert_used, mixtral.sliding_window) == (8, 2, None)


def test_null_is_as_good_as_absent() -> None:
    config = config_of({"arch": "mistral"}, num_key_value_heads=None, head_dim=None, sliding_window=None)
    assert (config.n_head_kv, config.head_dim, config.sliding_window) == (4, 64, None)


def test_only_mistral_and_mixtral_have_a_sliding_window() -> None:
    windows = {arch: config_of({"arch": arch}, sliding_window=64).sliding_window for arch in ARCHITECTURES}
    assert windows == {"mistral": 64, "mixtral": 64, "llama": None}


def test_the_architecture_may_be_known_by_its_model_type() -> None:
    assert config_of(architectures=...).architecture == "MixtralForCausalLM"
    assert config_of(architectures=[], model_type="llama").architecture == "LlamaForCausalLM"
    assert config_of(architectures=["LLaMAForCausalLM"]).architecture == "LlamaForCausalLM"
    for family in ("Llama", "Mistral", "Mixtral"):
        assert config_of(architectures=[f"{family}Model"]).architecture == f"{family}ForCausalLM"


@pytest.mark.parametrize("named", ["FalconForCausalLM", "T5ForConditionalGeneration", 7])
def test_an_unknown_architecture_is_named_and_the_known_ones_listed(named: object) -> None:
    with pytest.raises(ArchitectureError, match=rf"{named!r} is not supported; supported are ") as caught:
        config_of(architectures=[named])
    for known in ("MixtralForCausalLM", "MistralForCausalLM", "LlamaForCausalLM"):
        assert known in str(caught.value)
    assert "did you mean" not in str(caught.value)
    with pytest.raises(ArchitectureError, match="names no architecture"):
        config_of(architectures=..., model_type="falcon")


def test_the_nearest_supported_architecture_is_offered() -> None:
    with pytest.raises(ArchitectureError, match=r"did you mean (\w+ or )?MixtralForCausalLM"):
        config_of(architectures=["MixtrallForCausalLM"])


@pytest.mark.parametrize(
    ("given", "kind", "parameters"),
    [
        (None, "none", {}),
        ({"rope_type": "default"}, "none", {}),
        ({"type": "linear", "factor": 2}, "linear", {"factor": 2.0, "original_max_position_embeddings": 2048.0}),
        ({"rope_type": "linear", "type": "linear", "factor": 4.0}, "linear", {"factor": 4.0}),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 16}, "yarn", {"factor": 4.0, "beta_fast": 16.0}),
        ({"type": "dynamic", "factor": 4}, "dynamic", {"factor": 4.0}),
        ({"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 512}, "dynamic", {"factor": 2.0}),
        ({"rope_type": "yarn", "factor": 4.0, "attn_factor": 1.5}, "yarn", {"attn_factor": 1.5}),
        ({"rope_type": "yarn", "factor": 4.0, "extrapolation_factor": 0}, "yarn", {"extrapolation_factor": 0.0}),
        ({"rope_type": "yarn", "factor": 4.0, "mscale": 1, "mscale_all_dim": 0.5}, "yarn", {"mscale_all_dim": 0.5}),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": False}, "yarn", {"truncate": 0.0}),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 512}, "yarn", {"factor": 4.0}),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "attention_factor": None},
            "yarn",
            {"factor": 4.0, "original_max_position_embeddings": 512.0},
        ),
    ],
)
def test_rope_scaling(given: dict[str, Any] | None, kind: str, parameters: dict[str, float]) -> None:
    scaling = config_of(rope_scaling=given).rope_scaling
    assert scaling.kind == kind
    assert parameters.items() <= scaling.parameters.items()


@pytest.mark.parametrize(
    "given",
    [
        {"type": "yarn", "factor": 16.0, "original_max_position_embeddings": 128},
        {"type": "linear", "factor": 2.0},
        {"type": "dynamic", "factor": 2.0},
        LLAMA3,
        {"type": "default"},
    ],
)
def test_rope_parameters_that_only_annotate_change_nothing(
    given: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    assert (
        config_of(rope_scaling={**given, "finetuned": True}).rope_scaling == config_of(rope_scaling=given).rope_scaling
    )
    assert caplog.text == ""


def test_rope_parameters_that_nobody_knows_are_ignored_aloud(caplog: pytest.LogCaptureFixture) -> None:
    scaling = config_of(rope_scaling={"type": "linear", "factor": 2.0, "beta_fast": 32, "alpha\n": 1e3}).rope_scaling
    assert "beta_fast" not in scaling.parameters
    assert r"rope_scaling has 'alpha\n', 'beta_fast', which is not a parameter of rope type linear" in caplog.text


def test_the_original_context_may_stand_beside_the_rope_parameters() -> None:
    yarn = config_of(rope_scaling={"type": "yarn", "factor": 4.0}, original_max_position_embeddings=512).rope_scaling
    assert yarn.parameters["original_max_position_embeddings"] == 512
    without = {name: value for name, value in LLAMA3.items() if name != "original_max_position_embeddings"}
    llama3 = config_of(rope_scaling=without, original_max_position_embeddings=8192).rope_scaling
    assert llama3.parameters["original_max_position_embeddings"] == 8192


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rope_type": "longrope", "factor": 2}, "rope type 'longrope' is not supported"),
        ({"rope_type": ["x"]}, "rope type"),
        ("linear", "rope_scaling is 'linear', expected an object or null"),
        ({"rope_type": "linear"}, "rope_scaling.factor is None"),
        ({"rope_type": "linear", "factor": "2"}, "rope_scaling.factor is '2'"),
        ({"rope_type": "linear", "factor": float("nan")}, "rope_scaling.factor is nan"),
        ({"rope_type": "linear", "factor": 0}, "rope_scaling.factor is 0"),
        ({**LLAMA3, "high_freq_factor": ...}, "rope_scaling.high_freq_factor"),
        ({"rope_type": "yarn", "factor": 2, "mscale": -1.0}, "rope_scaling.mscale is -1.0, expected a number above 0"),
        ({"rope_type": "yarn", "factor": 2, "truncate": "no"}, "rope_scaling.truncate is 'no'"),
        ({"rope_type": "yarn", "factor": 2, "attention_factor": 0}, "rope_scaling.attention_factor is 0"),
        ({"rope_type": "dynamic"}, "rope_scaling.factor is None"),
        ({"rope_type": "dynamic", "factor": 2, "short_factor": [1.0]}, "has 'short_factor', which is not supported"),
        ({"full_attention": {"rope_theta": 1e4}}, "has 'full_attention', which is not supported"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_theta": "big"}, "rope_theta is 'big'"),
        ({"rope_type": "linear", "factor": 10**400}, "rope_scaling.factor is 100"),
    ],
)
def test_rope_that_cannot_be_expressed_is_refused(given: Any, message: str) -> None:
    if isinstance(given, dict):
        given = {name: value for name, value in given.items() if value is not ...}
    with pytest.raises(CheckpointError, match=message):
        config_of(rope_scaling=given)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", ..., "has no hidden_size"),
        ("hidden_size", "256", "hidden_size is '256', expected a whole number from 1"),
        ("hidden_size", 0, "hidden_size is 0"),
        ("hidden_size", 256.0, "hidden_size is 256.0"),
        ("hidden_size", True, "hidden_size is True"),
        ("hidden_size", 2**40, "hidden_size is 1099511627776"),
        ("num_hidden_layers", 10**6, "num_hidden_layers is 1000000, expected a whole number from 1 to 512"),
        ("num_attention_heads", 3, "hidden_size 256 is not a multiple of num_attention_heads 3"),
        ("num_key_value_heads", 3, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ("head_dim", 7, "head_dim 7 is odd"),
        ("num_local_experts", 1025, "num_local_experts is 1025"),
        ("num_experts_per_tok", 3, "num_experts_per_tok is 3, expected a whole number from 1 to 2"),
        ("rms_norm_eps", float("inf"), "rms_norm_eps is inf, expected a number above 0"),
        ("rms_norm_eps", 10**400, "rms_norm_eps is 1000000000"),
        ("rope_theta", -1, "rope_theta is -1"),
        ("rope_theta", 10**400, "rope_theta is 10000.*, expected a number above 0 that fits in 32 bits"),
        ("rope_theta", 1e39, r"rope_theta is 1e\+39, expected a number above 0 that fits in 32 bits"),
        ("tie_word_embeddings", "yes", "tie_word_embeddings is 'yes', expected true or false"),
        ("eos_token_id", "</s>", "eos_token_id is '</s>', expected a token id"),
        ("hidden_act", "gelu", "hidden_act is 'gelu', expected 'silu'"),
        ("attention_bias", True, "attention_bias is True, expected false: biases are not supported"),
        ("layer_types", ["full_attention", "sliding_attention"], "one kind of attention in all layers"),
    ],
)
def test_values_are_checked(key: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        config_of(**{key: value})
    assert "model/config.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_experts_may_go_by_their_other_name() -> None:
    assert config_of(num_local_experts=..., num_experts=6).n_expert == 6


def test_several_end_tokens_and_ones_outside_the_vocabulary(caplog: pytest.LogCaptureFixture) -> None:
    assert config_of(eos_token_id=[5, 6]).eos_token_id == 5
    assert config_of(eos_token_id=[]).eos_token_id is None
    with caplog.at_level(logging.WARNING, "ggufmoe"):
        assert config_of(bos_token_id=-1).bos_token_id is None
    assert "bos_token_id -1 is not in the vocabulary of 400 tokens" in caplog.text


def test_files_that_are_not_a_config(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    for content, message in (
        (b"[]", "holds a JSON list"),
        (b" \n", "is empty; fetch it again"),
        (b"{", "is not JSON"),
        (b"\xff\xfe", "is not JSON"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=message):
            read_config(tmp_path)
    path.write_bytes(b'{"a":' * 50_000)
    with pytest.raises(CheckpointError, match="is not JSON"):
        read_config(tmp_path)
    path.write_bytes(b" " * (64 * 1024 * 1024 + 1))
    with pytest.raises(CheckpointError, match="is larger than"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("params.json", "in Mistral's own format"),
        ("adapter_config.json", "is an adapter"),
        ("x.gguf", "holds GGUF files"),
        ("README.md", "has no config.json, so it is not a Hugging Face checkpoint"),
    ],
)
def test_directories_without_a_config(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_text(json.dumps({}))
    with pytest.raises(CheckpointError, match=message):
        read_config(tmp_path)
