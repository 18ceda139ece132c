"""Granite and Granite-MoE: factors of embeddings, attention, residuals and logits, and shared experts."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggufmoe
from ggufmoe.gguf.header import read_header
from tests.families.agreement import (
    check_computes,
    check_layouts,
    check_quantized,
    forward_logits,
)
from tests.families.tiny_family import config_json, make_checkpoint

SCALES = {
    "attention_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 6.0,
}
SHARED = {"shared_intermediate_size": 768}


def dense(**keys: Any) -> dict[str, Any]:
    return config_json("GraniteForCausalLM", "granite", **{**SCALES, **keys})


def mixture(**keys: Any) -> dict[str, Any]:
    name = "GraniteMoeSharedForCausalLM" if SHARED.keys() <= keys.keys() else "GraniteMoeForCausalLM"
    own = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return config_json(name, "granitemoe", **{**SCALES, **own, **keys})


@pytest.mark.parametrize(
    "config",
    [
        dense(),
        dense(tie_word_embeddings=True, **dict.fromkeys(SCALES, ...)),
        mixture(),
        mixture(**SHARED, tie_word_embeddings=True),
    ],
)
def test_llama_cpp_computes_the_same(tmp_path: Path, config: dict[str, Any]) -> None:
    check_computes(make_checkpoint(tmp_path / "model", config), tmp_path)


@pytest.mark.parametrize("key", SCALES)
def test_every_factor_matters(tmp_path: Path, key: str) -> None:
    """Without this the comparison above would not notice a factor that neither side applies."""
    scaled, plain = (make_checkpoint(tmp_path / str(n), dense(**keys)) for n, keys in enumerate([{}, {key: 1.0}]))
    ours, others = forward_logits(scaled), forward_logits(plain)
    assert np.abs(ours - others).max() > 1e-2 * (ours.max() - ours.min())


@pytest.mark.parametrize("file_type", ["Q4_K_M", "IQ4_XS"])
@pytest.mark.parametrize("config", [dense(), mixture(**SHARED)], ids=["dense", "mixture"])
def test_quantized_as_by_llama_cpp(tmp_path: Path, config: dict[str, Any], file_type: str) -> None:
    check_quantized(make_checkpoint(tmp_path / "model", config), tmp_path, file_type)


@pytest.mark.parametrize("config", [mixture(), mixture(**SHARED)], ids=["plain", "shared"])
def test_both_layouts_give_one_file(tmp_path: Path, config: dict[str, Any]) -> None:
    check_layouts(config, ("classic", "fused"), tmp_path)


def test_keys_of_the_factors(tmp_path: Path) -> None:
    ggufmoe.convert(make_checkpoint(tmp_path / "model", mixture(**SHARED)), tmp_path / "model.gguf", "F32")
    header = read_header(tmp_path / "model.gguf")
    written = [header.get(f"granitemoe.{key}_scale") for key in ("embedding", "residual", "logit")]
    expected = [3.0, 0.22, 6.0, 0.3]
    assert [*written, header.get("granitemoe.attention.scale")] == [
        struct.unpack("<f", struct.pack("<f", one))[0] for one in expected
    ]
    assert header.get("granitemoe.expert_shared_feed_forward_length") == 768
    assert header.get("granitemoe.attention.key_length") is None


def test_no_key_of_shared_experts_where_there_are_none(tmp_path: Path) -> None:
    ggufmoe.convert(make_checkpoint(tmp_path / "model", mixture()), tmp_path / "model.gguf", "F32")
    header = read_header(tmp_path / "model.gguf")
    assert header.get("granitemoe.expert_shared_feed_forward_length") is None
    assert [tensor.name for tensor in header.tensors if "shexp" in tensor.name] == []


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        *(({key: 0.0}, f"{key} is 0.0, expected another number than 0") for key in SCALES),
        ({"head_dim": 32}, "head_dim is 32, expected hidden_size / num_attention_heads"),
        ({"attention_bias": True}, "attention_bias is True, expected false"),
        ({"mlp_bias": True}, "mlp_bias is True, expected false"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    ],
)
def test_what_the_graph_cannot_compute_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    for config in (dense, mixture):
        with pytest.raises(ggufmoe.CheckpointError, match=message):
            make_checkpoint(tmp_path, config(**keys))
