"""Qwen3: a norm over each head of queries and keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import ggufmoe
from ggufmoe.gguf.header import read_header
from tests.families.agreement import check_computes, check_quantized
from tests.families.tiny_family import config_json, make_checkpoint


def model(directory: Path, **keys: Any) -> Path:
    return make_checkpoint(directory, config_json("Qwen3ForCausalLM", "qwen3", **{"head_dim": 32, **keys}))


@pytest.mark.parametrize("keys", [{}, {"tie_word_embeddings": True}, {"head_dim": ...}])
def test_llama_cpp_computes_the_same(tmp_path: Path, keys: dict[str, Any]) -> None:
    check_computes(model(tmp_path / "model", **keys), tmp_path)


@pytest.mark.parametrize("file_type", ["Q4_K_M", "IQ4_XS"])
def test_quantized_as_by_llama_cpp(tmp_path: Path, file_type: str) -> None:
    check_quantized(model(tmp_path / "model", head_dim=64), tmp_path, file_type)


def test_names_and_keys(tmp_path: Path) -> None:
    ggufmoe.convert(model(tmp_path / "model", head_dim=...), tmp_path / "model.gguf", "BF16")
    header = read_header(tmp_path / "model.gguf")
    # the head size that transformers takes where the configuration states none
    assert [header.get(f"qwen3.attention.{key}_length") for key in ("key", "value")] == [128, 128]
    assert {t.name: t.type.name for t in header.tensors if "blk.0.attn_q" in t.name} == {
        "blk.0.attn_q.weight": "BF16",
        "blk.0.attn_q_norm.weight": "F32",
    }


def test_biases_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ggufmoe.CheckpointError, match="attention_bias is True, expected false"):
        model(tmp_path, attention_bias=True)
