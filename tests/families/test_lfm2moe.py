"""LFM2-MoE: layers that convolve among layers that attend, and experts chosen with a bias after dense layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.checkpoint.layouts import plain_names
from ggufmoe.gguf.header import read_header
from ggufmoe.merge.forward import ForwardPass
from tests.families.agreement import check_layouts, check_quantized
from tests.families.tiny_family import config_json, make_checkpoint

KINDS = ["conv", "full_attention", "conv"]


def config(**keys: Any) -> dict[str, Any]:
    own = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "num_dense_layers": 1}
    layers = {"num_hidden_layers": 3, "layer_types": KINDS, "conv_L_cache": 3, "norm_eps": 1e-5}
    return config_json("Lfm2MoeForCausalLM", "lfm2_moe", **{**own, **layers, "rms_norm_eps": ..., **keys})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("lfm2") / "model", config())


def test_names_shapes_and_keys(checkpoint: Path, tmp_path: Path) -> None:
    ggufmoe.convert(checkpoint, tmp_path / "model.gguf", "BF16")
    header = read_header(tmp_path / "model.gguf")
    found = {tensor.name: (tensor.type.name, tensor.shape) for tensor in header.tensors}
    assert found["blk.0.shortconv.conv.weight"] == ("F32", (256, 3))
    assert found["blk.0.shortconv.in_proj.weight"] == ("BF16", (768, 256))
    assert found["blk.1.attn_q_norm.weight"] == ("F32", (64,))
    assert found["blk.2.exp_probs_b.bias"] == ("F32", (4,))
    assert "output_norm.weight" not in found
    assert found["token_embd_norm.weight"] == ("F32", (256,))
    assert [f"blk.{layer}.attn_q.weight" in found for layer in range(3)] == [False, True, False]
    assert [f"blk.{layer}.ffn_up.weight" in found for layer in range(3)] == [True, False, False]
    assert header.get("lfm2moe.attention.head_count_kv") == [0, 2, 0]
    keys = ("leading_dense_block_count", "expert_gating_func", "shortconv.l_cache", "expert_feed_forward_length")
    assert [header.get(f"lfm2moe.{key}") for key in keys] == [1, 2, 3, 256]


@pytest.mark.parametrize("file_type", ["Q4_K_M", "IQ4_XS"])
def test_quantized_as_by_llama_cpp(checkpoint: Path, tmp_path: Path, file_type: str) -> None:
    check_quantized(checkpoint, tmp_path, file_type)


def test_both_layouts_give_one_file(tmp_path: Path) -> None:
    check_layouts(config(), ("classic", "fused"), tmp_path)


def test_names_of_a_model_without_its_head() -> None:
    names = ("embed_tokens.weight", "embedding_norm.weight", "layers.0.conv.conv.weight")
    assert plain_names(names) == {name: f"model.{name}" for name in names}


def test_hidden_states_are_not_computed(checkpoint: Path) -> None:
    with (
        open_checkpoint(checkpoint) as model,
        pytest.raises(ggufmoe.CheckpointError, match="hidden states of Lfm2MoeForCausalLM cannot be computed"),
    ):
        ForwardPass(model)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layer_types": ...}, "has no layer_types"),
        ({"layer_types": ["conv", "full_attention"]}, "expected a list with a kind for each of 3 layers"),
        (
            {"layer_types": ["conv", "sliding_attention", "conv"]},
            "expected layers of both kinds, conv and full_attention",
        ),
        ({"layer_types": ["conv"] * 3}, "expected layers of both kinds, conv and full_attention"),
        ({"conv_bias": True}, "conv_bias is True, expected false"),
        ({"conv_L_cache": 1}, "conv_L_cache is 1, expected a number from 2"),
        ({"head_dim": 32}, "head_dim is 32, expected hidden_size / num_attention_heads"),
        ({"use_expert_bias": False}, "use_expert_bias is False, expected true"),
        ({"norm_topk_prob": False}, "norm_topk_prob is False, expected true"),
        ({"routed_scaling_factor": 2.5}, "routed_scaling_factor is 2.5, expected 1"),
    ],
)
def test_what_the_graph_cannot_compute_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ggufmoe.CheckpointError, match=message):
        make_checkpoint(tmp_path, config(**keys))
