"""Qwen2 and Qwen2.5: biases on queries, keys and values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.gguf.header import read_header
from tests.families.agreement import check_computes, check_quantized
from tests.families.tiny_family import config_json, make_checkpoint


def model(directory: Path, **keys: Any) -> Path:
    return make_checkpoint(directory, config_json("Qwen2ForCausalLM", "qwen2", **keys))


@pytest.mark.parametrize("keys", [{}, {"tie_word_embeddings": True}])
def test_llama_cpp_computes_the_same(tmp_path: Path, keys: dict[str, Any]) -> None:
    check_computes(model(tmp_path / "model", **keys), tmp_path)


@pytest.mark.parametrize("file_type", ["Q4_K_M", "IQ4_XS"])
def test_quantized_as_by_llama_cpp(tmp_path: Path, file_type: str) -> None:
    check_quantized(model(tmp_path / "model"), tmp_path, file_type)


def test_names_and_keys(tmp_path: Path) -> None:
    ggufmoe.convert(model(tmp_path / "model"), tmp_path / "model.gguf", "F32")
    header = read_header(tmp_path / "model.gguf")
    assert header.get("general.architecture") == "qwen2"
    assert [header.get(f"qwen2.attention.{key}") for key in ("head_count_kv", "key_length")] == [2, None]
    assert {t.name for t in header.tensors if t.name.startswith("blk.0.attn_")} == {
        "blk.0.attn_norm.weight",
        "blk.0.attn_output.weight",
        *(f"blk.0.attn_{letter}.{kind}" for letter in "qkv" for kind in ("weight", "bias")),
    }


def test_the_window_counts_only_where_it_is_switched_on(tmp_path: Path) -> None:
    for switched, expected in ((False, None), (True, 64)):
        directory = model(tmp_path / str(switched), sliding_window=64, use_sliding_window=switched)
        with open_checkpoint(directory) as opened:
            assert opened.config.sliding_window == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"head_dim": 32}, "head_dim is 32, expected hidden_size / num_attention_heads"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "one kind of attention in all layers"),
    ],
)
def test_what_the_graph_cannot_compute_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ggufmoe.CheckpointError, match=message):
        model(tmp_path, **keys)


def test_factors_of_llama_3_are_refused(tmp_path: Path) -> None:
    """llama.cpp's graph reads no table of them, so that the positions of another model would be computed."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    with pytest.raises(ggufmoe.CheckpointError, match="qwen2 graph does not take the factors of rope type llama3"):
        model(tmp_path, rope_scaling={**scaling, "original_max_position_embeddings": 512})
