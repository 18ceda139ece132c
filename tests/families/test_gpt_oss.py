"""gpt-oss: biased experts whose gate and up rows alternate, in floating point and in MXFP4, which is copied."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.checkpoint.config import parse_config
from ggufmoe.checkpoint.layouts import unread
from ggufmoe.gguf.header import read_header
from ggufmoe.gguf.stored_rows import OpenModel
from ggufmoe.gguf.types import GGMLType
from ggufmoe.weights.dtypes import read_f32
from tests import tiny
from tests.families.agreement import assert_close, check_quantized, llama_cpp_logits
from tests.families.tiny_family import config_json, make_checkpoint, weights

Stored = dict[str, tuple[str, NDArray[Any]]]
EXPERTS = "model.layers.{}.mlp.experts.{}"
CODES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
"""What four bits mean (OCP Microscaling Formats, E2M1)."""


def config(**keys: Any) -> dict[str, Any]:
    own = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 64, "sliding_window": 4}
    return config_json("GptOssForCausalLM", "gpt_oss", **{**own, "intermediate_size": 256, **keys})


def mxfp4_tensors() -> Stored:
    """A checkpoint whose experts are random codes and scales."""
    random = np.random.default_rng(0)
    floats = weights(config(), layout="fused")
    kept = [name for name in floats if ".experts." not in name or name.endswith("_bias")]
    tensors = {name: ("BF16", floats[name]) for name in kept}
    for layer in range(2):
        for name, n_rows in (("gate_up_proj", 512), ("down_proj", 256)):
            codes = random.integers(256, size=(4, n_rows, 8, 16), dtype=np.uint8)
            tensors[EXPERTS.format(layer, f"{name}_blocks")] = ("U8", codes)
            scales = random.integers(118, 122, size=(4, n_rows, 8), dtype=np.uint8)
            tensors[EXPERTS.format(layer, f"{name}_scales")] = ("U8", scales)
    return tensors


def decoded(tensors: Stored, layer: int, name: str) -> NDArray[np.float32]:
    """The values of a stack of MXFP4 (n_expert, rows, columns): two codes in a byte, the lower half first."""
    codes, scales = (tensors[EXPERTS.format(layer, f"{name}_{end}")][1] for end in ("blocks", "scales"))
    values = np.stack([CODES[codes & 15], CODES[codes >> 4]], -1).reshape(*codes.shape[:-1], 32)
    scaled: NDArray[np.float32] = values * np.exp2(scales.astype(np.float32) - 127)[..., None]
    return scaled.reshape(*codes.shape[:2], -1)


def write(directory: Path, tensors: Stored, **keys: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tiny.write_safetensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(config(**keys)), encoding="utf-8")
    tiny.write_tokenizer(directory, "spm", None)
    return directory


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("floats") / "model", config(), layout="fused")


@pytest.fixture(scope="module")
def mxfp4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    method = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return write(tmp_path_factory.mktemp("mxfp4") / "model", mxfp4_tensors(), quantization_config=method)


def test_names_shapes_and_keys(floats: Path, tmp_path: Path) -> None:
    ggufmoe.convert(floats, tmp_path / "model.gguf", "BF16")
    header = read_header(tmp_path / "model.gguf")
    found = {tensor.name: (tensor.type.name, tensor.shape) for tensor in header.tensors}
    assert found["blk.1.ffn_gate_exps.bias"] == found["blk.1.ffn_up_exps.bias"] == ("F32", (4, 256))
    assert found["blk.1.ffn_gate_inp.bias"] == found["blk.1.attn_sinks.weight"] == ("F32", (4,))
    assert found["blk.1.ffn_gate_exps.weight"] == ("BF16", (4, 256, 256))
    assert "blk.1.post_attention_norm.weight" in found
    keys = ("attention.sliding_window", "expert_feed_forward_length", "attention.key_length")
    assert [header.get(f"gpt-oss.{key}") for key in keys] == [4, 256, 64]


def test_a_silent_configuration_has_the_rope_of_transformers(tmp_path: Path) -> None:
    silent = make_checkpoint(tmp_path / "model", config(rope_theta=...), layout="fused")
    ggufmoe.convert(silent, tmp_path / "model.gguf", "BF16")
    header = read_header(tmp_path / "model.gguf")
    keys = ("freq_base", "scaling.type", "scaling.factor", "scaling.original_context_length")
    assert [header.get(f"gpt-oss.rope.{key}") for key in keys] == [150000.0, "yarn", 32.0, 4096]


@pytest.mark.parametrize("file_type", ["Q4_K_M", "IQ4_XS"])
def test_quantized_as_by_llama_cpp(floats: Path, tmp_path: Path, file_type: str) -> None:
    check_quantized(floats, tmp_path, file_type)


def test_mxfp4_beside_other_types_as_by_llama_cpp(mxfp4: Path, tmp_path: Path) -> None:
    check_quantized(mxfp4, tmp_path, "MXFP4_MOE")


def test_blocks_hold_the_values_of_codes_and_scales(mxfp4: Path, tmp_path: Path) -> None:
    gate_up = decoded(mxfp4_tensors(), 1, "gate_up_proj")
    ggufmoe.convert(mxfp4, tmp_path / "model.gguf", "F32")
    with OpenModel(tmp_path / "model.gguf") as gguf:
        for name, expected in (("gate", gate_up[:, ::2]), ("up", gate_up[:, 1::2])):
            rows = gguf.tensors[f"blk.1.ffn_{name}_exps.weight"]
            assert rows.type is GGMLType.MXFP4
            values = quants.dequantize(rows.read(0, rows.n_rows), GGMLQuantizationType.MXFP4)
            np.testing.assert_array_equal(values.reshape(expected.shape), expected)
    with open_checkpoint(mxfp4) as model:
        up = read_f32(model.tensors[EXPERTS.format(1, "3.up_proj.weight")])
        np.testing.assert_array_equal(up, gate_up[3, 1::2])


def test_both_layouts_compute_the_same(mxfp4: Path, tmp_path: Path) -> None:
    """The values of the blocks in floating point, transposed, give the logits of the blocks."""
    tensors = mxfp4_tensors()
    for layer in range(2):
        for name in ("gate_up_proj", "down_proj"):
            values = decoded(tensors, layer, name).swapaxes(1, 2)
            tensors[EXPERTS.format(layer, name)] = ("BF16", tiny.stored_bits(np.ascontiguousarray(values), "BF16"))
            del tensors[EXPERTS.format(layer, f"{name}_blocks")], tensors[EXPERTS.format(layer, f"{name}_scales")]
    ggufmoe.convert(write(tmp_path / "plain", tensors), tmp_path / "plain.gguf", "F32")
    ggufmoe.convert(mxfp4, tmp_path / "mxfp4.gguf", "F32")
    ggufmoe.quantize(tmp_path / "mxfp4.gguf", tmp_path / "wide.gguf", "F32", allow_requantize=True)
    assert_close(llama_cpp_logits(tmp_path / "wide.gguf"), llama_cpp_logits(tmp_path / "plain.gguf"))


def test_files_of_plain_numbers_keep_the_blocks(mxfp4: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ggufmoe.convert(mxfp4, tmp_path / "model.gguf", "F16")
    header = read_header(tmp_path / "model.gguf")
    types = {tensor.name: tensor.type.name for tensor in header.tensors}
    assert (types["blk.0.ffn_down_exps.weight"], types["blk.0.attn_q.weight"]) == ("MXFP4", "F16")
    assert header.get("general.file_type") == 38
    assert "quantization_config" not in caplog.text


def test_blocks_are_not_quantized_twice(mxfp4: Path, tmp_path: Path) -> None:
    message = "_exps.weight is quantized already .MXFP4., making it Q4_K loses twice; keep it with -q MXFP4_MOE or"
    with pytest.raises(ggufmoe.OptionError, match=message):
        ggufmoe.convert(mxfp4, tmp_path / "model.gguf", "Q4_K_M")
    ggufmoe.convert(mxfp4, tmp_path / "model.gguf", "Q4_K_M", tensor_types=("_exps=mxfp4",))
    types = {tensor.name: tensor.type.name for tensor in read_header(tmp_path / "model.gguf").tensors}
    assert (types["blk.0.ffn_down_exps.weight"], types["blk.0.attn_q.weight"]) == ("MXFP4", "Q4_K")


def test_what_is_missing_beside_blocks_is_named(tmp_path: Path) -> None:
    """Blocks that are read are not taken for those of a tool whose weights are not."""
    missing = EXPERTS.format(1, "down_proj_scales")
    rest = {name: tensor for name, tensor in mxfp4_tensors().items() if name != missing}
    with pytest.raises(ggufmoe.CheckpointError, match=f"tensors of its config.json; missing: {missing}$"):
        open_checkpoint(write(tmp_path, rest))


@pytest.mark.parametrize(
    ("dtype", "shape", "message"),
    [
        ("I8", (4, 256, 8), r"down_proj_scales \(I8\)"),
        ("U8", (4, 256, 9), r"wrongly shaped: .*down_proj_scales is \[4, 256, 9\], .* should be \[4, 256, 8\]"),
    ],
)
def test_scales_that_do_not_belong_to_the_codes(
    tmp_path: Path, dtype: str, shape: tuple[int, ...], message: str
) -> None:
    scales = {EXPERTS.format(0, "down_proj_scales"): (dtype, np.zeros(shape, np.uint8))}
    with pytest.raises(ggufmoe.CheckpointError, match=message):
        open_checkpoint(write(tmp_path, mxfp4_tensors() | scales))


def test_names_that_the_hub_takes_for_quantized_are_read() -> None:
    """The hub's index is asked before any weight is downloaded."""
    read = [name for name in mxfp4_tensors() if name.endswith(("_blocks", "_scales"))]
    assert unread(parse_config(Path("config.json"), config()), [*read, "lm_head.qweight"]) == ["lm_head.qweight"]


def test_mxfp4_of_another_family_is_refused(tmp_path: Path) -> None:
    keys = {"architectures": ["Qwen3MoeForCausalLM"], "moe_intermediate_size": 256, "norm_topk_prob": True}
    with pytest.raises(ggufmoe.CheckpointError, match="is quantized to MXFP4"):
        open_checkpoint(write(tmp_path, mxfp4_tensors(), **keys))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sliding_window": None}, "sliding_window is None, expected a number of tokens"),
        ({"layer_types": ["full_attention"] * 2}, "layer_types is .*expected sliding_attention and full_attention"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True, expected false: llama.cpp's gpt-oss graph"),
        ({"attention_bias": False}, "attention_bias is False, expected true"),
        ({"swiglu_limit": 10.0}, "swiglu_limit is 10.0, expected 7"),
        ({"swiglu_alpha": 1.0}, "swiglu_alpha is 1.0, expected 1.702"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
    ],
)
def test_what_the_graph_cannot_compute_is_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ggufmoe.CheckpointError, match=message):
        make_checkpoint(tmp_path, config(**keys), layout="fused")
