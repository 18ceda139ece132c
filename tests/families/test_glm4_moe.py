"""GLM-4.5: experts chosen as in DeepSeek-V3, half rotated heads, and layers that predict further tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.checkpoint.config import parse_config
from ggufmoe.checkpoint.layouts import pieces
from ggufmoe.families import glm4_moe
from ggufmoe.gguf.header import read_header
from ggufmoe.merge.forward import ForwardPass
from tests import tiny
from tests.families.agreement import check_computes, check_layouts, check_quantized
from tests.families.tiny_family import config_json, make_checkpoint, weights
from tests.tiny_tokenizers import special_ids


def config(**keys: Any) -> dict[str, Any]:
    own = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 256, "intermediate_size": 256}
    return config_json("Glm4MoeForCausalLM", "glm4_moe", **{**own, "routed_scaling_factor": 1.5, **keys})


class Everything:
    """What a checkpoint holds that has all tensors that may be missing."""

    def __contains__(self, name: object) -> bool:
        return True


@pytest.fixture(scope="module")
def with_further(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of two layers whose checkpoint has a third one, for multi-token prediction."""
    directory = make_checkpoint(tmp_path_factory.mktemp("glm") / "model", config())
    stored = {name: ("BF16", data) for name, data in weights(config()).items()}
    family = glm4_moe.FAMILY
    for piece in pieces(parse_config(Path("config.json"), config()), family.layouts[0], Everything()):
        values = tiny.random_values(1, piece.name, piece.shape)
        stored.setdefault(piece.name, ("BF16", tiny.stored_bits(values, "BF16")))
    tiny.write_shards(directory, stored, None)
    return directory


def test_llama_cpp_computes_the_same(tmp_path: Path) -> None:
    keys = {"attention_bias": True, "use_qk_norm": True, "tie_word_embeddings": True, "norm_topk_prob": False}
    check_computes(make_checkpoint(tmp_path / "model", config(**keys)), tmp_path)


@pytest.mark.parametrize("file_type", ["Q4_K_M", "IQ4_XS"])
def test_quantized_as_by_llama_cpp(with_further: Path, tmp_path: Path, file_type: str) -> None:
    check_quantized(with_further, tmp_path, file_type)


def test_both_layouts_give_one_file(tmp_path: Path) -> None:
    check_layouts(config(num_hidden_layers=1, first_k_dense_replace=0), ("classic", "fused"), tmp_path)


def test_layers_of_further_tokens_are_the_last_block(
    with_further: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """llama.cpp does not load them, and the plan of a load knows it."""
    check_computes(with_further, tmp_path)
    assert "not placed as planned" not in caplog.text
    header = read_header(tmp_path / "f32.gguf")
    assert [header.get(f"glm4moe.{key}") for key in ("block_count", "nextn_predict_layers")] == [3, 1]
    further = {tensor.name for tensor in header.tensors if tensor.name.startswith("blk.2.")}
    words = ("eh_proj", "enorm", "hnorm", "embed_tokens", "shared_head_head", "shared_head_norm")
    assert {f"blk.2.nextn.{word}.weight" for word in words} < further
    assert {"blk.2.ffn_gate_exps.weight", "blk.2.exp_probs_b.bias", "blk.2.attn_q.weight"} < further


def test_a_checkpoint_may_lack_them(tmp_path: Path) -> None:
    """As transformers saves one, which keeps the key. llama.cpp loads the file."""
    check_computes(make_checkpoint(tmp_path / "model", config()), tmp_path)
    header = read_header(tmp_path / "f32.gguf")
    assert header.get("glm4moe.block_count") == 3
    assert not any(tensor.name.startswith("blk.2.") for tensor in header.tensors)


def test_a_part_of_such_a_layer_is_not_enough(with_further: Path, tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", config())
    norm = {"model.layers.2.input_layernorm.weight": np.zeros(256, np.uint16)}
    stored = {name: ("BF16", data) for name, data in (weights(config()) | norm).items()}
    tiny.write_shards(directory, stored, None)
    with pytest.raises(ggufmoe.CheckpointError, match=r"missing: model\.layers\.2\.self_attn"):
        ggufmoe.convert(directory, tmp_path / "model.gguf", "F32")
    del stored["model.layers.2.input_layernorm.weight"]
    stored["model.layers.2.enorm.weight"] = "BF16", np.zeros(256, np.uint16)
    tiny.write_shards(directory, stored, None)
    with pytest.raises(ggufmoe.CheckpointError, match=r"left over: model\.layers\.2\.enorm"):
        ggufmoe.convert(directory, tmp_path / "model.gguf", "F32")


def test_special_tokens_are_fixed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever the tokenizer's files say; of the two that they add to a text llama.cpp adds one."""
    first = special_ids("glm")[0]
    keys = config(vocab_size=first + 5, eos_token_id=[first + 1, first + 3, first + 4])
    directory = make_checkpoint(tmp_path / "model", keys)
    (directory / "tokenizer.model").unlink()
    tiny.write_tokenizer(directory, "glm", None)
    ggufmoe.convert(directory, tmp_path / "model.gguf", "F32")
    header = read_header(tmp_path / "model.gguf")
    roles = {role: header.get(f"tokenizer.ggml.{role}_token_id") for role in ("bos", "eos", "eot", "eom", "unknown")}
    assert roles == {"bos": first, "eos": first + 1, "eot": first + 3, "eom": first + 4, "unknown": first + 1}
    assert header.get("tokenizer.ggml.pre") == "glm4"
    assert header.get("tokenizer.ggml.add_bos_token") is True
    assert "adds [gMASK] and <sop> before a text, and llama.cpp the first alone" in caplog.text


def test_keys(tmp_path: Path) -> None:
    keys = config(num_nextn_predict_layers=..., num_mtp_layers=0, head_dim=32, partial_rotary_factor=0.25)
    ggufmoe.convert(make_checkpoint(tmp_path / "model", keys), tmp_path / "model.gguf", "F32")
    header = read_header(tmp_path / "model.gguf")
    expected = {
        "block_count": 2,
        "nextn_predict_layers": 0,
        "rope.dimension_count": 8,
        "attention.key_length": 32,
        "expert_gating_func": 2,
        "expert_weights_norm": True,
        "expert_shared_count": 1,
        "leading_dense_block_count": 1,
    }
    assert {key: header.get(f"glm4moe.{key}") for key in expected} == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"n_shared_experts": 0}, "n_shared_experts is 0, expected 1 or more: llama.cpp's glm4moe graph"),
        ({"scoring_func": "softmax"}, "scoring_func is 'softmax', expected 'sigmoid'"),
        ({"topk_method": "greedy"}, "topk_method is 'greedy', expected 'noaux_tc'"),
        ({"n_group": 2, "topk_group": 2}, "topk_group is 2, expected less than n_group 2"),
        ({"routed_scaling_factor": 0.0}, "routed_scaling_factor is 0.0, expected another number than 0"),
        ({"partial_rotary_factor": 0.02}, "partial_rotary_factor is 0.02, expected an even number of rotated values"),
        ({"num_nextn_predict_layers": 10**9}, "1000000002 layers with those of multi-token prediction, .* up to 512"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    ],
)
def test_what_the_graph_cannot_compute_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ggufmoe.CheckpointError, match=message):
        make_checkpoint(tmp_path, config(**keys))


def test_hidden_states_with_groups_are_not_computed(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "model", config(n_group=2, topk_group=1))
    assert json.loads((directory / "config.json").read_text(encoding="utf-8"))["n_group"] == 2
    with (
        open_checkpoint(directory) as model,
        pytest.raises(ggufmoe.CheckpointError, match="cannot be computed with groups of experts"),
    ):
        ForwardPass(model)
