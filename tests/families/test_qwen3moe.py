"""Qwen3-MoE: norms of queries and keys, and experts in every layer; recipes over Qwen3 become one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import ggufmoe
from ggufmoe.families import qwen3moe
from ggufmoe.gguf.header import read_header
from tests.families.agreement import (
    check_computes,
    check_identical_experts,
    check_layouts,
    check_other_routing_is_wrong,
    check_quantized,
)
from tests.families.tiny_family import config_json, make_checkpoint


def config(**keys: Any) -> dict[str, Any]:
    own = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": True}
    return config_json("Qwen3MoeForCausalLM", "qwen3_moe", **{**own, "head_dim": 32, **keys})


@pytest.mark.parametrize("keys", [{}, {"norm_topk_prob": False, "num_experts_per_tok": 4}])
def test_llama_cpp_computes_the_same(tmp_path: Path, keys: dict[str, Any]) -> None:
    check_computes(make_checkpoint(tmp_path / "model", config(**keys)), tmp_path)


@pytest.mark.parametrize("file_type", ["Q4_K_M", "IQ4_XS"])
def test_quantized_as_by_llama_cpp(tmp_path: Path, file_type: str) -> None:
    check_quantized(make_checkpoint(tmp_path / "model", config(head_dim=64)), tmp_path, file_type)


def test_both_layouts_give_one_file(tmp_path: Path) -> None:
    check_layouts(config(), ("classic", "fused"), tmp_path)


@pytest.mark.parametrize("spelling", ["num_experts", "num_local_experts"])
def test_keys(tmp_path: Path, spelling: str) -> None:
    keys = {**config(num_experts=...), spelling: 4}
    ggufmoe.convert(make_checkpoint(tmp_path / "model", keys), tmp_path / "model.gguf", "F32")
    header = read_header(tmp_path / "model.gguf")
    assert [header.get(f"qwen3moe.{key}") for key in ("expert_count", "expert_used_count")] == [4, 2]
    assert [header.get(f"qwen3moe.{key}_length") for key in ("feed_forward", "expert_feed_forward")] == [512, 256]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"norm_topk_prob": False},
            "norm_topk_prob is False, expected true: llama.cpp's qwen3moe graph always rescales",
        ),
        ({"norm_topk_prob": ...}, "norm_topk_prob is None, expected true"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2, expected 1"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\], expected no layers"),
        ({"attention_bias": True}, "biases are not supported"),
    ],
)
def test_what_the_graph_cannot_compute_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ggufmoe.CheckpointError, match=message):
        make_checkpoint(tmp_path, config(**keys))


def test_weights_that_are_not_rescaled_would_be_computed_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why ``norm_topk_prob: false`` is refused."""
    check_other_routing_is_wrong(qwen3moe.FAMILY, make_checkpoint(tmp_path / "model", config()), tmp_path, monkeypatch)


def test_a_recipe_over_qwen3_becomes_one(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", config_json("Qwen3ForCausalLM", "qwen3", head_dim=32))
    merged = check_identical_experts(base, tmp_path, "Qwen3MoeForCausalLM")
    written = json.loads((merged / "config.json").read_text(encoding="utf-8"))
    assert (written["model_type"], written["num_experts"], written["norm_topk_prob"]) == ("qwen3_moe", 2, True)
    assert written["moe_intermediate_size"] == 512


def test_a_recipe_over_qwen3_does_not_become_a_mixtral(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base", config_json("Qwen3ForCausalLM", "qwen3"))
    place, others = r"recipe\.yaml:4: architecture", "it can become Qwen3 MoE"
    with pytest.raises(ggufmoe.RecipeError, match=f"{place}: a Qwen3ForCausalLM does not become a 'mixtral'; {others}"):
        check_identical_experts(base, tmp_path, "MixtralForCausalLM", architecture="mixtral")
