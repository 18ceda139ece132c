"""Qwen3-Next: layers of linear attention among those of full attention, reordered, offset and computed tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.checkpoint.config import parse_config
from ggufmoe.families.qwen3next import is_linear
from ggufmoe.gguf.header import read_header
from tests.families.agreement import check_layouts, check_quantized, llama_cpp_logits, stored_and_written
from tests.families.tiny_family import add_tensors, config_json, make_checkpoint

LINEAR = "model.layers.0.linear_attn."
N_KEY, N_KEY_HEADS, N_VALUE_HEADS = 64, 2, 4


OWN = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "head_dim": 64,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": N_KEY,
    "linear_value_head_dim": N_KEY,
    "linear_num_key_heads": N_KEY_HEADS,
    "linear_num_value_heads": N_VALUE_HEADS,
}


def config(**keys: Any) -> dict[str, Any]:
    return config_json("Qwen3NextForCausalLM", "qwen3_next", **{**OWN, **keys})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen3next") / "model", config())


def test_one_is_added_to_all_norms_but_that_of_linear_attention(checkpoint: Path) -> None:
    stored, written = stored_and_written(checkpoint)
    for name, hf in {
        "blk.0.attn_norm": "model.layers.0.input_layernorm",
        "blk.0.post_attention_norm": "model.layers.0.post_attention_layernorm",
        "blk.1.attn_q_norm": "model.layers.1.self_attn.q_norm",
        "blk.1.attn_k_norm": "model.layers.1.self_attn.k_norm",
        "output_norm": "model.norm",
    }.items():
        assert np.array_equal(written[f"{name}.weight"], stored[f"{hf}.weight"] + np.float32(1))
    assert np.array_equal(written["blk.0.ssm_norm.weight"], stored[f"{LINEAR}norm.weight"])


def test_projections_are_ordered_by_their_use(checkpoint: Path) -> None:
    """In the checkpoint each head of keys is followed by the values and gates that go with it."""
    stored, written = stored_and_written(checkpoint)
    heads = stored[f"{LINEAR}in_proj_qkvz.weight"].reshape(N_KEY_HEADS, -1, 256)
    n_values = N_KEY * N_VALUE_HEADS // N_KEY_HEADS
    parts = np.split(heads, [N_KEY, 2 * N_KEY, 2 * N_KEY + n_values], axis=1)
    queries, keys, values, gates = (part.reshape(-1, 256) for part in parts)
    assert np.array_equal(written["blk.0.attn_qkv.weight"], np.concatenate([queries, keys, values]))
    assert np.array_equal(written["blk.0.attn_gate.weight"], gates)
    assert np.array_equal(written["blk.0.ssm_ba.weight"], stored[f"{LINEAR}in_proj_ba.weight"])


def test_small_tensors_of_linear_attention(checkpoint: Path) -> None:
    stored, written = stored_and_written(checkpoint)
    assert np.array_equal(written["blk.0.ssm_conv1d.weight"], stored[f"{LINEAR}conv1d.weight"][:, 0])
    assert np.array_equal(written["blk.0.ssm_dt.bias"], stored[f"{LINEAR}dt_bias"])
    exact = -np.exp(stored[f"{LINEAR}A_log"].astype(np.float64))
    assert np.array_equal(written["blk.0.ssm_a"], exact.astype(np.float32))


def test_each_layer_has_the_tensors_of_its_kind(checkpoint: Path) -> None:
    shapes = {name: values.shape for name, values in stored_and_written(checkpoint)[1].items()}
    linear = ("attn_qkv.weight", "attn_gate.weight", "ssm_ba.weight", "ssm_a", "ssm_out.weight", "ssm_norm.weight")
    full = ("attn_q.weight", "attn_k.weight", "attn_v.weight", "attn_output.weight", "attn_q_norm.weight")
    for layer, has, lacks in ((0, linear, full), (1, full, linear)):
        assert all(f"blk.{layer}.{name}" in shapes for name in has)
        assert not any(f"blk.{layer}.{name}" in shapes for name in lacks)
    assert shapes["blk.1.attn_q.weight"] == (2 * 4 * 64, 256)
    assert shapes["blk.1.attn_output.weight"] == (256, 4 * 64)


def test_keys(checkpoint: Path, tmp_path: Path) -> None:
    ggufmoe.convert(checkpoint, tmp_path / "model.gguf", "F32")
    header = read_header(tmp_path / "model.gguf")
    ssm = {
        key: header.get(f"qwen3next.ssm.{key}")
        for key in ("conv_kernel", "state_size", "group_count", "time_step_rank", "inner_size")
    }
    assert ssm == {"conv_kernel": 4, "state_size": 64, "group_count": 2, "time_step_rank": 4, "inner_size": 256}
    assert header.get("qwen3next.attention.recurrent_layers") == [True, False]
    assert header.get("qwen3next.full_attention_interval") == 4
    assert header.get("qwen3next.rope.dimension_count") == 16
    assert header.get("qwen3next.attention.key_length") == 64
    logits = llama_cpp_logits(tmp_path / "model.gguf")
    assert np.isfinite(logits).all()
    assert logits.std() > 0


def test_every_fourth_layer_is_full_where_no_list_says_so() -> None:
    read = parse_config(Path("config.json"), config(layer_types=..., num_hidden_layers=8))
    assert [layer for layer in range(8) if not is_linear(read, layer)] == [3, 7]


@pytest.mark.parametrize("file_type", ["Q4_K_M", "IQ4_XS"])
def test_quantized_as_by_llama_cpp(checkpoint: Path, tmp_path: Path, file_type: str) -> None:
    check_quantized(checkpoint, tmp_path, file_type)


def test_both_layouts_give_one_file(tmp_path: Path) -> None:
    check_layouts(config(num_hidden_layers=1, layer_types=["linear_attention"]), ("classic", "fused"), tmp_path)


def test_layers_that_predict_further_tokens_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = make_checkpoint(tmp_path, config(num_hidden_layers=1, layer_types=["full_attention"]))
    add_tensors(directory, "mtp.fc.weight")
    with open_checkpoint(directory) as model:
        assert not any(name.startswith("mtp") for name in model.tensors)
    assert "leaves out 1 tensor: they predict further tokens (MTP), which answers do not need" in caplog.text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob is False, expected true: llama.cpp's qwen3next graph always"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2, expected 1"),
        ({"mlp_only_layers": [0]}, r"mlp_only_layers is \[0\], expected no layers"),
        ({"attention_bias": True}, "attention_bias is True, expected false"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"layer_types": ["linear_attention"]}, "layer_types is .*, expected a list with a kind for each of 2 layers"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types is .*, expected no other kinds than"),
        ({"linear_value_head_dim": 32}, r"linear_value_head_dim is 32, expected linear_key_head_dim \(64\)"),
        ({"linear_num_value_heads": 3}, r"linear_num_value_heads is 3, expected a multiple of linear_num_key_heads"),
        ({"partial_rotary_factor": 0.21}, "partial_rotary_factor is 0.21, expected an even number of rotated values"),
    ],
)
def test_what_the_graph_cannot_compute_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ggufmoe.CheckpointError, match=message):
        make_checkpoint(tmp_path, config(**keys))
