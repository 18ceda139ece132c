"""Qwen3.5-MoE and Qwen3.5: heads of values in llama.cpp's order, sections of rope, a language model in a larger one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.gguf.header import read_header
from tests.families.agreement import check_layouts, check_quantized, llama_cpp_logits, stored_and_written
from tests.families.test_qwen3next import OWN
from tests.families.tiny_family import add_tensors, config_json, make_checkpoint

LINEAR = "model.layers.0.linear_attn."
N_HEAD, MIXED = 64, 2 * 2 * 64
"""Values of a head, and rows of all queries and keys."""
ORDER = [0, 2, 1, 3]
"""Two heads of keys, each with two of values: llama.cpp takes the first of both, then the second."""


def config(**keys: Any) -> dict[str, Any]:
    return config_json("Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", **{**OWN, "intermediate_size": ..., **keys})


def dense(**keys: Any) -> dict[str, Any]:
    own = {key: value for key, value in OWN.items() if "expert" not in key and "moe" not in key}
    return config_json("Qwen3_5ForCausalLM", "qwen3_5_text", **{**own, **keys})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("qwen35moe") / "model", config())


def test_heads_of_values_are_ordered_by_repetition(checkpoint: Path) -> None:
    stored, written = stored_and_written(checkpoint)

    def ordered(name: str) -> Any:
        values = stored[f"{LINEAR}{name}"]
        return values.reshape(4, -1, *values.shape[1:])[ORDER].reshape(values.shape)

    assert np.array_equal(written["blk.0.attn_gate.weight"], ordered("in_proj_z.weight"))
    assert np.array_equal(written["blk.0.ssm_alpha.weight"], ordered("in_proj_a.weight"))
    assert np.array_equal(written["blk.0.ssm_beta.weight"], ordered("in_proj_b.weight"))
    assert np.array_equal(written["blk.0.ssm_dt.bias"], ordered("dt_bias"))
    exact = -np.exp(ordered("A_log").astype(np.float64))
    assert np.array_equal(written["blk.0.ssm_a"], exact.astype(np.float32))
    columns = stored[f"{LINEAR}out_proj.weight"].reshape(256, 4, N_HEAD)[:, ORDER].reshape(256, 256)
    assert np.array_equal(written["blk.0.ssm_out.weight"], columns)


@pytest.mark.parametrize(("name", "hf"), [("attn_qkv", "in_proj_qkv"), ("ssm_conv1d", "conv1d")])
def test_queries_and_keys_stay_where_they_are(checkpoint: Path, name: str, hf: str) -> None:
    stored, written = stored_and_written(checkpoint)
    rows, found = stored[f"{LINEAR}{hf}.weight"].squeeze(), written[f"blk.0.{name}.weight"]
    assert np.array_equal(found[:MIXED], rows[:MIXED])
    values = rows[MIXED:].reshape(4, N_HEAD, -1)
    assert np.array_equal(found[MIXED:].reshape(values.shape), values[ORDER])


def test_keys(checkpoint: Path, tmp_path: Path) -> None:
    ggufmoe.convert(checkpoint, tmp_path / "model.gguf", "F32")
    header = read_header(tmp_path / "model.gguf")
    assert header.get("qwen35moe.rope.dimension_sections") == [11, 11, 10, 0]
    assert header.get("qwen35moe.attention.recurrent_layers") == [True, False]
    assert header.get("qwen35moe.feed_forward_length") is None
    logits = llama_cpp_logits(tmp_path / "model.gguf")
    assert np.isfinite(logits).all()
    assert logits.std() > 0


def test_a_model_without_experts(tmp_path: Path) -> None:
    ggufmoe.convert(make_checkpoint(tmp_path, dense()), tmp_path / "model.gguf", "F32")
    header = read_header(tmp_path / "model.gguf")
    assert header.get("qwen35.feed_forward_length") == 512
    assert header.get("qwen35.rope.dimension_sections") == [11, 11, 10, 0]
    assert not [key for key in header.metadata if "expert" in key]
    assert {"blk.0.ffn_gate.weight", "blk.1.ffn_down.weight"} <= {tensor.name for tensor in header.tensors}
    assert llama_cpp_logits(tmp_path / "model.gguf").std() > 0


@pytest.mark.parametrize(("keys", "file_type"), [(config(), "Q4_K_M"), (config(), "IQ4_XS"), (dense(), "Q4_K_M")])
def test_quantized_as_by_llama_cpp(tmp_path: Path, keys: dict[str, Any], file_type: str) -> None:
    check_quantized(make_checkpoint(tmp_path / "model", keys), tmp_path, file_type)


def test_both_layouts_give_one_file(tmp_path: Path) -> None:
    check_layouts(config(num_hidden_layers=1, layer_types=["linear_attention"]), ("classic", "fused"), tmp_path)


def test_the_language_model_of_a_larger_one(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The configuration is nested, names have a prefix, and tensors that read images or predict tokens are left out."""
    directory = make_checkpoint(tmp_path / "model", config())
    (shard,) = directory.glob("*.safetensors")
    n_bytes, written = int.from_bytes(shard.read_bytes()[:8], "little"), shard.read_bytes()
    header = written[8 : 8 + n_bytes].replace(b'"model.', b'"model.language_model.')
    shard.write_bytes(len(header).to_bytes(8, "little") + header + written[8 + n_bytes :])
    add_tensors(directory, "model.visual.blocks.0.attn.qkv.weight", "model.visual.merger.norm.bias", "mtp.norm.weight")
    outer = {"architectures": ["Qwen3_5MoeForConditionalGeneration"], "model_type": "qwen3_5_moe"}
    (directory / "config.json").write_text(json.dumps({**outer, "text_config": config()}), encoding="utf-8")
    for source, name in ((directory, "larger"), (checkpoint, "plain")):
        ggufmoe.convert(source, tmp_path / f"{name}.gguf", "BF16")
    assert (tmp_path / "larger.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()
    assert "leaves out 1 tensor: they predict further tokens" in caplog.text
    assert "leaves out 2 tensors: they read images, and only the language model is converted" in caplog.text


@pytest.mark.parametrize("sections", [[3, 3, 2], [1, 1, 1], [11, 11, 10, 0]])
def test_sections_of_rope(tmp_path: Path, sections: list[int]) -> None:
    """Eight pairs of a head are rotated."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections, "mrope_interleaved": True}
    with open_checkpoint(make_checkpoint(tmp_path, config(rope_parameters=rope))) as model:
        assert model.config.raw["rope_parameters"]["mrope_section"] == sections


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"attention_bias": True}, "attention_bias is True, expected false"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"linear_num_value_heads": 3}, r"linear_num_value_heads is 3, expected a multiple of linear_num_key_heads"),
        ({"rope_parameters": {"mrope_section": [8, 8]}}, "expected mrope_section of three whole numbers"),
        ({"rope_parameters": {"mrope_section": [4, 2, 2]}}, "expected mrope_section in which every rotated pair has"),
        ({"rope_parameters": {"mrope_section": [0, 0, 0]}}, "expected mrope_section in which every rotated pair has"),
    ],
)
def test_what_the_graph_cannot_compute_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ggufmoe.CheckpointError, match=message):
        make_checkpoint(tmp_path, config(**keys))
