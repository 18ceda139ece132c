"""Phi-3: fused matrices, and LongRoPE's tables of factors."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.export.model_tensors import model_tensors
from ggufmoe.gguf.header import read_header
from tests import tiny
from tests.families.agreement import assert_close, check_quantized, forward_logits, llama_cpp_logits, stored_and_written
from tests.families.tiny_family import config_json, make_checkpoint

LONG, SHORT = [2.0 + i for i in range(32)], [1.0 + i / 10 for i in range(32)]


def config(**keys: Any) -> dict[str, Any]:
    return config_json("Phi3ForCausalLM", "phi3", **keys)


def long_rope(kind: str = "longrope", **keys: Any) -> dict[str, Any]:
    """The configuration of a model of 2048 tokens that began with 512."""
    rope = {"type": kind, "long_factor": LONG, "short_factor": SHORT, **keys}
    return config(original_max_position_embeddings=512, rope_scaling=rope)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("fused") / "model", config())


def as_llama(checkpoint: Path, directory: Path) -> Path:
    """A Llama with the same weights, its matrices taken apart."""
    stored, _ = stored_and_written(checkpoint)
    tensors: dict[str, Any] = {}
    for name, values in stored.items():
        module = name.rpartition(".")[0].removesuffix("qkv_proj").removesuffix("gate_up_proj")
        if name.endswith("qkv_proj.weight"):
            parts = zip("qkv", np.split(values, [256, 384]), strict=True)
            tensors |= {f"{module}{letter}_proj.weight": part for letter, part in parts}
        elif name.endswith("gate_up_proj.weight"):
            parts = zip(("gate", "up"), np.split(values, 2), strict=True)
            tensors |= {f"{module}{word}_proj.weight": part for word, part in parts}
        else:
            tensors[name] = values
    directory.mkdir()
    tiny.write_safetensors(directory / "model.safetensors", {name: ("F32", part) for name, part in tensors.items()})
    (directory / "config.json").write_text(json.dumps(config_json("LlamaForCausalLM", "llama")), encoding="utf-8")
    return directory


def test_llama_cpp_computes_what_a_llama_of_its_parts_computes(checkpoint: Path, tmp_path: Path) -> None:
    ggufmoe.convert(checkpoint, tmp_path / "model.gguf", "F32")
    assert_close(llama_cpp_logits(tmp_path / "model.gguf"), forward_logits(as_llama(checkpoint, tmp_path / "llama")))


@pytest.mark.parametrize("file_type", ["Q4_K_M", "IQ4_XS"])
def test_quantized_as_by_llama_cpp(checkpoint: Path, tmp_path: Path, file_type: str) -> None:
    check_quantized(checkpoint, tmp_path, file_type)


def test_llama_cpp_loads_a_file_that_is_called_phi3_without_its_tokens(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    named = tmp_path / "My-Phi-3-and-phi3"
    shutil.copytree(checkpoint, named)
    ggufmoe.convert(named, tmp_path / "model.gguf", "F32")
    assert read_header(tmp_path / "model.gguf").get("general.name") == "My-Phi 3-and-phi 3"
    assert llama_cpp_logits(tmp_path / "model.gguf").std() > 0
    assert "llama.cpp takes a name with phi3 for Phi-3's, and loads none without its tokens" in caplog.text


@pytest.mark.parametrize("kind", ["longrope", "su", "yarn"])
def test_long_rope(tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    directory = make_checkpoint(tmp_path, long_rope(kind))
    _, written = stored_and_written(directory)
    assert written["rope_factors_long.weight"].tolist() == np.array(LONG, np.float32).tolist()
    assert written["rope_factors_short.weight"].tolist() == np.array(SHORT, np.float32).tolist()
    ggufmoe.convert(directory, tmp_path / "model.gguf", "F32")
    header = read_header(tmp_path / "model.gguf")
    scale = header.get("phi3.rope.scaling.attn_factor")
    assert scale == np.float32(math.sqrt(1 + math.log(2048 / 512) / math.log(512)))
    assert header.get("phi3.rope.scaling.original_context_length") == 512
    assert header.get("phi3.rope.scaling.type") is None
    assert "in every context of more than 512 tokens (--ctx-size), transformers only for texts that are" in caplog.text


@pytest.mark.parametrize(("keys", "expected"), [({"attention_factor": 1.25}, 1.25), ({"factor": 1.0}, 1.0)])
def test_a_stated_factor_of_attention(tmp_path: Path, keys: dict[str, Any], expected: float) -> None:
    ggufmoe.convert(make_checkpoint(tmp_path, long_rope(**keys)), tmp_path / "model.gguf", "F32")
    assert read_header(tmp_path / "model.gguf").get("phi3.rope.scaling.attn_factor") == expected


def test_keys_without_long_rope(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    directory = make_checkpoint(tmp_path, config(sliding_window=1000, partial_rotary_factor=0.75))
    with open_checkpoint(directory) as model:
        assert not [tensor.name for tensor in model_tensors(model) if "rope" in tensor.name]
    ggufmoe.convert(directory, tmp_path / "model.gguf", "F32")
    header = read_header(tmp_path / "model.gguf")
    keys = ("attention.sliding_window", "rope.dimension_count", "rope.scaling.original_context_length")
    assert [header.get(f"phi3.{key}") for key in keys] == [1000, 48, 4096]
    assert header.get("phi3.rope.scaling.attn_factor") is None
    assert "each token attends to the last 1000 tokens only" in caplog.text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (long_rope(long_factor=LONG[:16]), "rope_scaling is .*, expected a long_factor of 32 numbers above 0"),
        (long_rope(short_factor=[0, *SHORT[1:]]), "rope_scaling is .*, expected a short_factor of 32 numbers above 0"),
        (long_rope(attention_factor="big"), "rope_scaling is .*, expected attention_factor above 0"),
        (long_rope() | {"original_max_position_embeddings": 1}, "original_max_.* is 1, expected 2 or more: LongRoPE"),
        (config(rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling is .*, expected rope without scaling"),
        (config(head_dim=32), "head_dim is 32, expected hidden_size / num_attention_heads"),
        (config(hidden_act="gelu"), "hidden_act is 'gelu', expected 'silu'"),
        (config(attention_bias=True), "attention_bias is True, expected false"),
        (config(partial_rotary_factor=0.4), "partial_rotary_factor is 0.4, expected an even number"),
    ],
)
def test_what_the_graph_cannot_compute_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ggufmoe.CheckpointError, match=message):
        make_checkpoint(tmp_path, keys)
