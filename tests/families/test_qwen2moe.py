"""Qwen2-MoE: biases, a shared expert with a gate, and experts whose weights are not rescaled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ggufmoe
from ggufmoe.families import qwen2moe
from ggufmoe.gguf.header import read_header
from tests.families.agreement import check_computes, check_layouts, check_other_routing_is_wrong, check_quantized
from tests.families.tiny_family import config_json, make_checkpoint

TIED = {"tie_word_embeddings": True}
"""The file has the embedding as its output too: llama.cpp's graph needs one."""


def config(**keys: Any) -> dict[str, Any]:
    own = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "norm_topk_prob": False}
    return config_json("Qwen2MoeForCausalLM", "qwen2_moe", **{**own, "shared_expert_intermediate_size": 768, **keys})


@pytest.mark.parametrize(
    "keys", [{"norm_topk_prob": ..., **TIED}, {"norm_topk_prob": True, "num_experts_per_tok": 4, "qkv_bias": False}]
)
def test_llama_cpp_computes_the_same(tmp_path: Path, keys: dict[str, Any]) -> None:
    check_computes(make_checkpoint(tmp_path / "model", config(**keys)), tmp_path)


@pytest.mark.parametrize("file_type", ["Q4_K_M", "IQ4_XS"])
def test_quantized_as_by_llama_cpp(tmp_path: Path, file_type: str) -> None:
    check_quantized(make_checkpoint(tmp_path / "model", config()), tmp_path, file_type)


def test_both_layouts_give_one_file(tmp_path: Path) -> None:
    check_layouts(config(), ("classic", "fused"), tmp_path)


@pytest.mark.parametrize("biases", [True, False])
def test_names_and_keys(tmp_path: Path, biases: bool) -> None:
    ggufmoe.convert(make_checkpoint(tmp_path / "model", config(qkv_bias=biases)), tmp_path / "model.gguf", "F32")
    header = read_header(tmp_path / "model.gguf")
    keys = ("feed_forward", "expert_feed_forward", "expert_shared_feed_forward")
    assert [header.get(f"qwen2moe.{key}_length") for key in keys] == [512, 256, 768]
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    # two dimensions, as the converter leaves it
    assert shapes["blk.1.ffn_gate_inp_shexp.weight"] == (1, 256)
    assert [f"blk.1.attn_{letter}.bias" in shapes for letter in "qkvo"] == [biases] * 3 + [False]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"norm_topk_prob": True}, "norm_topk_prob is True, expected false: llama.cpp's qwen2moe graph never rescales"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2, expected 1"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\], expected no layers"),
        ({"head_dim": 32}, "head_dim is 32, expected hidden_size / num_attention_heads"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    ],
)
def test_what_the_graph_cannot_compute_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ggufmoe.CheckpointError, match=message):
        make_checkpoint(tmp_path, config(**keys))


def test_rescaled_weights_would_be_computed_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why ``norm_topk_prob: true``, which mergekit writes, is refused."""
    check_other_routing_is_wrong(qwen2moe.FAMILY, make_checkpoint(tmp_path / "model", config()), tmp_path, monkeypatch)
