"""OLMoE: norms over all heads of queries and keys, and experts whose weights are not rescaled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ggufmoe
from ggufmoe.families import olmoe
from ggufmoe.gguf.header import read_header
from tests.families.agreement import check_computes, check_layouts, check_other_routing_is_wrong, check_quantized
from tests.families.tiny_family import config_json, make_checkpoint

TIED = {"tie_word_embeddings": True}
"""The file has the embedding as its output too: llama.cpp's graph needs one."""


def config(**keys: Any) -> dict[str, Any]:
    own = {"num_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 4, "norm_topk_prob": False}
    return config_json("OlmoeForCausalLM", "olmoe", **{**own, **keys})


@pytest.mark.parametrize(
    "keys", [{"norm_topk_prob": ..., **TIED}, {"norm_topk_prob": True, "num_experts_per_tok": 4, "rms_norm_eps": 1e-2}]
)
def test_llama_cpp_computes_the_same(tmp_path: Path, keys: dict[str, Any]) -> None:
    check_computes(make_checkpoint(tmp_path / "model", config(**keys)), tmp_path)


@pytest.mark.parametrize("file_type", ["Q4_K_M", "IQ4_XS"])
def test_quantized_as_by_llama_cpp(tmp_path: Path, file_type: str) -> None:
    check_quantized(make_checkpoint(tmp_path / "model", config()), tmp_path, file_type)


def test_both_layouts_give_one_file(tmp_path: Path) -> None:
    check_layouts(config(), ("classic", "fused"), tmp_path)


def test_names_and_keys(tmp_path: Path) -> None:
    ggufmoe.convert(make_checkpoint(tmp_path / "model", config()), tmp_path / "model.gguf", "F32")
    header = read_header(tmp_path / "model.gguf")
    assert header.get("general.architecture") == "olmoe"
    keys = ("expert_count", "expert_used_count", "feed_forward_length", "expert_feed_forward_length")
    assert [header.get(f"olmoe.{key}") for key in keys] == [4, 2, 512, None]
    norms = {t.name: t.shape for t in header.tensors if t.name.startswith("blk.0.attn_") and "_norm" in t.name}
    assert norms == {f"blk.0.attn_{name}norm.weight": (256,) for name in ("", "q_", "k_")}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"norm_topk_prob": True}, "norm_topk_prob is True, expected false: llama.cpp's olmoe graph never rescales"),
        ({"clip_qkv": 8.0}, "clip_qkv is 8.0, expected null: llama.cpp's olmoe graph does not clip"),
        ({"num_key_value_heads": 2}, "num_key_value_heads is 2, expected num_attention_heads"),
        ({"head_dim": 32}, "head_dim is 32, expected hidden_size / num_attention_heads"),
        ({"attention_bias": True}, "biases are not supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    ],
)
def test_what_the_graph_cannot_compute_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ggufmoe.CheckpointError, match=message):
        make_checkpoint(tmp_path, config(**keys))


def test_rescaled_weights_would_be_computed_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why ``norm_topk_prob: true`` is refused."""
    check_other_routing_is_wrong(olmoe.FAMILY, make_checkpoint(tmp_path / "model", config()), tmp_path, monkeypatch)
