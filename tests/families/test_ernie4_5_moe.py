"""ERNIE-4.5-MoE: experts chosen with a bias of two dimensions, shared experts, and dense layers before them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.gguf.header import read_header
from tests import tiny
from tests.families.agreement import check_layouts, check_quantized
from tests.families.tiny_family import config_json, make_checkpoint


def config(**keys: Any) -> dict[str, Any]:
    own = {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 256, "moe_num_shared_experts": 1}
    return config_json("Ernie4_5_MoeForCausalLM", "ernie4_5_moe", **{**own, **keys})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("ernie") / "model", config())


def test_names_shapes_and_keys(checkpoint: Path, tmp_path: Path) -> None:
    ggufmoe.convert(checkpoint, tmp_path / "model.gguf", "BF16")
    header = read_header(tmp_path / "model.gguf")
    found = {tensor.name: (tensor.type.name, tensor.shape) for tensor in header.tensors}
    # two dimensions, as the converter leaves them
    assert found["blk.1.exp_probs_b.bias"] == ("F32", (1, 4))
    assert found["blk.1.ffn_up_shexp.weight"] == ("BF16", (256, 256))
    assert [f"blk.{layer}.ffn_up.weight" in found for layer in range(2)] == [True, False]
    keys = ("interleave_moe_layer_step", "leading_dense_block_count", "expert_shared_count")
    assert [header.get(f"ernie4_5-moe.{key}") for key in keys] == [1, 1, 1]
    lengths = [header.get(f"ernie4_5-moe.{part}feed_forward_length") for part in ("", "expert_", "expert_shared_")]
    assert lengths == [512, 256, 256]


def test_no_shared_experts(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", config(moe_num_shared_experts=0))
    ggufmoe.convert(model, tmp_path / "model.gguf", "BF16")
    header = read_header(tmp_path / "model.gguf")
    assert [tensor.name for tensor in header.tensors if "shexp" in tensor.name] == []
    assert header.get("ernie4_5-moe.expert_shared_count") == 0
    assert header.get("ernie4_5-moe.expert_shared_feed_forward_length") is None


@pytest.mark.parametrize("file_type", ["Q4_K_M", "IQ4_XS"])
def test_quantized_as_by_llama_cpp(checkpoint: Path, tmp_path: Path, file_type: str) -> None:
    check_quantized(checkpoint, tmp_path, file_type)


def test_both_layouts_give_one_file(tmp_path: Path) -> None:
    check_layouts(config(), ("classic", "fused"), tmp_path)


def test_layers_of_multi_token_prediction_are_left_out(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_checkpoint(tmp_path, config())
    stored = {"model.mtp_emb_norm.0.weight": ("BF16", np.zeros(256, np.uint16))}
    tiny.write_safetensors(tmp_path / "model-mtp.safetensors", stored)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / "model-mtp.safetensors").rename(tmp_path / "model-00002-of-00002.safetensors")
    with caplog.at_level(logging.WARNING), open_checkpoint(tmp_path) as model, open_checkpoint(checkpoint) as whole:
        assert model.tensors.keys() == whole.tensors.keys()
    assert "leaves out 1 tensor: they predict further tokens" in caplog.text


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"use_bias": True}, "use_bias is True, expected false"),
        ({"moe_layer_interval": 2}, "moe_layer_interval is 2, expected 1"),
        ({"moe_layer_end_index": 0}, "moe_layer_end_index is 0, expected -1 or the last layer"),
        ({"moe_layer_start_index": [1, 2]}, r"moe_layer_start_index is \[1, 2\], expected a whole number"),
        ({"moe_norm_min": 0.5}, "moe_norm_min is 0.5, expected at most"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    ],
)
def test_what_the_graph_cannot_compute_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ggufmoe.CheckpointError, match=message):
        make_checkpoint(tmp_path, config(**keys))
