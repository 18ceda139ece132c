"""DeepSeek v1, and the mixtures of that class that mergekit writes: three graphs of llama.cpp, by what is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ggufmoe
from ggufmoe.families import deepseek, supported
from ggufmoe.gguf.header import read_header
from tests.families.agreement import check_computes, check_other_routing_is_wrong, check_quantized
from tests.families.tiny_family import config_json, make_checkpoint

MERGEKITS = {"first_k_dense_replace": 0, "norm_topk_prob": True}


def config(**keys: Any) -> dict[str, Any]:
    own: dict[str, Any] = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 256,
    }
    own |= {"first_k_dense_replace": 1, "scoring_func": "softmax", "norm_topk_prob": False}
    return config_json("DeepseekForCausalLM", "deepseek", **{**own, **keys})


@pytest.mark.parametrize(
    ("keys", "arch"),
    [
        ({"n_shared_experts": 2}, "deepseek"),
        ({"norm_topk_prob": True, "num_experts_per_tok": 4, "tie_word_embeddings": True}, "deepseek"),
        (MERGEKITS, "granitemoe"),
        ({**MERGEKITS, "num_experts_per_tok": 4}, "granitemoe"),
        ({**MERGEKITS, "n_shared_experts": None}, "llama"),
        ({"first_k_dense_replace": 0, "n_shared_experts": 0, "num_experts_per_tok": 4}, "llama"),
    ],
)
def test_llama_cpp_computes_the_same(tmp_path: Path, keys: dict[str, Any], arch: str) -> None:
    check_computes(make_checkpoint(tmp_path / "model", config(**keys)), tmp_path)
    assert read_header(tmp_path / "f32.gguf").get("general.architecture") == arch


@pytest.mark.parametrize("keys", [{}, MERGEKITS], ids=["deepseek", "granitemoe"])
def test_quantized_as_by_llama_cpp(tmp_path: Path, keys: dict[str, Any]) -> None:
    check_quantized(make_checkpoint(tmp_path / "model", config(**keys)), tmp_path, "Q4_K_M")


def test_keys(tmp_path: Path) -> None:
    ggufmoe.convert(make_checkpoint(tmp_path / "model", config(n_shared_experts=2)), tmp_path / "model.gguf", "F32")
    header = read_header(tmp_path / "model.gguf")
    keys = ("expert_count", "expert_used_count", "expert_shared_count", "leading_dense_block_count")
    assert [header.get(f"deepseek.{key}") for key in keys] == [4, 2, 2, 1]
    assert [header.get(f"deepseek.{key}_length") for key in ("feed_forward", "expert_feed_forward")] == [512, 256]
    assert [header.get(f"deepseek.{key}") for key in ("expert_weights_scale", "rope.scaling.type")] == [1.0, "none"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({**MERGEKITS, "first_k_dense_replace": 1}, "first_k_dense_replace is 1, expected 0: .* never rescales"),
        ({"n_shared_experts": 0}, "n_shared_experts is 0, expected 1 or more: llama.cpp's deepseek graph"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid', expected 'softmax'"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2, expected 1"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling is .* expected null"),
        ({"head_dim": 32}, "head_dim is 32, expected hidden_size / num_attention_heads"),
        ({"attention_bias": True}, "biases are not supported"),
        ({"norm_topk_prob": "true"}, "norm_topk_prob is 'true', expected true or false"),
    ],
)
def test_what_no_graph_computes_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ggufmoe.CheckpointError, match=message):
        make_checkpoint(tmp_path, config(**keys))


def test_rescaled_weights_would_be_computed_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why mergekit's mixtures (``norm_topk_prob: true``) are not written for the graph of their own architecture."""
    checkpoint = make_checkpoint(tmp_path / "model", config(first_k_dense_replace=0))
    check_other_routing_is_wrong(deepseek.FAMILY, checkpoint, tmp_path, monkeypatch)


def test_only_the_class_itself_is_named_as_supported() -> None:
    assert "DeepseekForCausalLM" in supported()
    assert not [one for one in deepseek.FAMILY.variants if one.family.architecture in supported()]
