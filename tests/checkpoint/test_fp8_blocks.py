"""Weights of 8-bit floats with a scale for each block: their values, every range of rows, and what is refused."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import ggufmoe
from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.checkpoint.fp8_blocks import E4M3_VALUES, BlockScaledRows, scales_shape
from ggufmoe.errors import CheckpointError, TensorMismatchError
from ggufmoe.gguf.header import read_header
from ggufmoe.weights.dtypes import read_f32
from tests import tiny
from tests.families.agreement import check_quantized

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
ROWS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {"weights": {"type": "float", "num_bits": 8, "strategy": "channel", "block_structure": None}}
    },
}
Stored = dict[str, tuple[str, NDArray[Any]]]


@pytest.mark.parametrize(
    ("code", "value"),
    [(0x00, 0.0), (0x01, 2.0**-9), (0x07, 7 * 2.0**-9), (0x08, 2.0**-6), (0x38, 1.0), (0x39, 1.125), (0x7E, 448.0)],
)
def test_what_a_byte_means(code: int, value: float) -> None:
    assert E4M3_VALUES[code] == value
    assert E4M3_VALUES[code | 0x80] == -value
    assert np.signbit(E4M3_VALUES[code | 0x80])


def test_there_are_two_bytes_that_are_no_number() -> None:
    assert np.flatnonzero(np.isnan(E4M3_VALUES)).tolist() == [0x7F, 0xFF]
    assert (np.diff(E4M3_VALUES[:0x7F]) > 0).all()


def in_blocks(stored: Stored, scale_dtype: str = "F32", block: tuple[int, int] = (128, 128)) -> Stored:
    """The tensors with bytes and scales in place of every projection, and of every expert's matrix."""
    changed: Stored = {}
    for name, (dtype, data) in stored.items():
        if data.ndim < 2 or not any(part in name for part in ("_proj", ".experts.")):
            changed[name] = dtype, data
            continue
        chance = np.random.default_rng(len(changed))
        codes = chance.integers(0, 0x7F, data.shape, np.uint8) | chance.integers(0, 2, data.shape, np.uint8) << 7
        scales = chance.uniform(1e-4, 1e-3, scales_shape(data.shape, block)).astype(np.float32)
        changed[name] = "F8_E4M3", codes
        changed[f"{name}_scale_inv"] = scale_dtype, tiny.stored_bits(scales, scale_dtype)
    return changed


def quantized(directory: Path, *, stated: Any = FP8, scale_dtype: str = "F32", change: Any = None, **spec: Any) -> Path:
    """A tiny Llama, or what ``spec`` says, of 8-bit floats; ``change`` is applied to its stored tensors."""
    wanted = tiny.Tiny(**{"arch": "llama", "config": {"quantization_config": stated}, **spec})
    tiny.make_checkpoint(directory, **vars(wanted))
    tensors = in_blocks(tiny.stored_tensors(wanted), scale_dtype)
    if change is not None:
        change(tensors)
    tiny.write_shards(directory, tensors, None)
    return directory


def expected(stored: Stored, name: str, block: int = 128) -> NDArray[np.float32]:
    """Every value times the scale of its block, in float32, by whole arrays as the converter computes it."""
    codes, (dtype, bits) = stored[name][1], stored[f"{name}_scale_inv"]
    scales = (bits.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else bits
    spread = scales.repeat(block, -2).repeat(block, -1)[..., : codes.shape[-2], : codes.shape[-1]]
    out: NDArray[np.float32] = E4M3_VALUES[codes] * spread
    return out


@pytest.mark.parametrize("scale_dtype", ["F32", "BF16"])
def test_values_of_a_checkpoint(tmp_path: Path, scale_dtype: str) -> None:
    sizes: dict[str, Any] = {"n_embd": 288, "n_head": 6, "n_head_kv": 6, "n_ff": 400}
    directory = quantized(tmp_path / "model", scale_dtype=scale_dtype, **sizes)
    stored = in_blocks(tiny.stored_tensors(tiny.Tiny(arch="llama", **sizes)), scale_dtype)
    with open_checkpoint(directory) as model:
        for name in ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.k_proj.weight"):
            whole = expected(stored, name)
            tensor = model.tensors[name]
            assert tensor.shape == whole.shape
            np.testing.assert_array_equal(read_f32(tensor), whole)
            for start, stop in ((0, 0), (0, 1), (127, 129), (100, 288), (287, 288)):
                np.testing.assert_array_equal(read_f32(tensor, start, stop), whole[start:stop])
        embedding = model.tensors["model.embed_tokens.weight"]
        assert embedding.dtype.value == "BF16"


def test_a_scale_for_each_row(tmp_path: Path) -> None:
    """As compressed-tensors stores them; ``weight_scale`` is the name of the scales then."""
    shapes: dict[str, tuple[int, ...]] = {}

    def by_rows(tensors: Stored) -> None:
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            del tensors[name]
            weights = name.removesuffix("_scale_inv")
            shapes[weights] = tensors[weights][1].shape
            scales = np.random.default_rng(len(shapes)).uniform(1e-4, 1e-3, (shapes[weights][0], 1))
            tensors[f"{weights}_scale"] = "BF16", tiny.stored_bits(scales.astype(np.float32), "BF16")
        stored.update(tensors)

    stored: Stored = {}
    with open_checkpoint(quantized(tmp_path / "model", stated=ROWS, change=by_rows)) as model:
        for name in shapes:
            scales = (stored[f"{name}_scale"][1].astype(np.uint32) << 16).view(np.float32)
            np.testing.assert_array_equal(read_f32(model.tensors[name]), E4M3_VALUES[stored[name][1]] * scales)
            np.testing.assert_array_equal(
                read_f32(model.tensors[name], 3, 5)[1], read_f32(model.tensors[name], 4, 5)[0]
            )


def test_blocks_begin_again_with_every_matrix_of_a_stack(tmp_path: Path) -> None:
    stored = in_blocks({"a_proj": ("BF16", np.zeros((3, 200, 130), np.uint16))})
    tiny.write_safetensors(tmp_path / "model.safetensors", stored)
    from ggufmoe.checkpoint.layouts import StoredRows
    from ggufmoe.checkpoint.safetensors import TensorFile
    from ggufmoe.weights.source_tensor import Dtype

    file = TensorFile(tmp_path / "model.safetensors")
    begins = {name: entry.begin for name, entry in file.header.entries.items()}
    scales = StoredRows("scales", Dtype.F32, (3, 2, 2), file, begins["a_proj_scale_inv"])
    rows = BlockScaledRows("a_proj", (3, 200, 130), file, begins["a_proj"], scales, (128, 128))
    whole = expected(stored, "a_proj").reshape(600, 130)
    for start, stop in ((0, 600), (199, 201), (150, 450), (400, 401)):
        np.testing.assert_array_equal(read_f32(rows, start, stop), whole[start:stop])
    file.close()


def test_both_layouts_give_one_file(tmp_path: Path) -> None:
    """An expert's matrix is a part of a stack of 8-bit floats, or a tensor by itself."""
    classic, fused = tiny.Tiny(), tiny.Tiny(layout="fused")
    whole = in_blocks(tiny.stored_tensors(fused))

    def split(tensors: Stored) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            place, _, leaf = name.replace(".block_sparse_moe.", ".mlp.").partition(".experts.")
            expert, word, rest = leaf.split(".")
            stack = f"{place}.experts.{'down_proj' if word == 'w2' else 'gate_up_proj'}{rest.removeprefix('weight')}"
            data = whole[stack][1][int(expert)]
            half = len(data) // 2
            part = data if word == "w2" else data[:half] if word == "w1" else data[half:]
            tensors[name] = tensors[name][0], np.ascontiguousarray(part)
        tensors |= {name: found for name, found in whole.items() if ".self_attn." in name}

    files = []
    for name, spec, change in (("classic", classic, split), ("fused", fused, None)):
        directory = quantized(tmp_path / name / "model", change=change, arch=spec.arch, layout=spec.layout)
        ggufmoe.convert(directory, tmp_path / f"{name}.gguf", "BF16")
        files.append((tmp_path / f"{name}.gguf").read_bytes())
    assert files[0] == files[1]


def test_quantized_as_llama_cpp_quantizes_the_float32_file(tmp_path: Path) -> None:
    directory = quantized(tmp_path / "model")
    check_quantized(directory, tmp_path, "Q4_K_M", lossless="F32")
    types = {tensor.type.name for tensor in read_header(tmp_path / "lossless.gguf").tensors}
    assert types == {"F32"}


def test_it_is_said_and_not_warned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ggufmoe"), open_checkpoint(quantized(tmp_path / "model")):
        pass
    assert "14 tensors of 8-bit floats are read with the scales of their blocks" in caplog.text
    assert "quantization_config" not in caplog.text


def test_a_quantization_that_only_the_config_knows_is_ignored_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_checkpoint(tiny.make_checkpoint(tmp_path / "model", config={"quantization_config": FP8})):
        pass
    assert "has a quantization_config (fp8), but its weights are not quantized" in caplog.text


NAME = "model.layers.0.mlp.up_proj.weight"
SCALES = f"{NAME}_scale_inv"


def _with(name: str, dtype: str, shape: tuple[int, ...]) -> Callable[[Stored], None]:
    width = {"F8_E4M3": np.uint8, "F8_E5M2": np.uint8, "BF16": np.uint16, "F32": np.uint32}[dtype]
    return lambda tensors: tensors.update({name: (dtype, np.zeros(shape, width))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(SCALES), f"has 8-bit floats without their scales: {NAME}; fetch it again"),
        (lambda tensors: tensors.pop("lm_head.weight"), "the tensors of its config.json; missing: lm_head"),
        (lambda tensors: tensors.pop(NAME), f"holds {SCALES}, but no {NAME}"),
        (_with(NAME, "BF16", (512, 256)), f"{NAME} has scales and is BF16 of shape .* expected a matrix of F8_E4M3"),
        (_with(NAME, "F8_E5M2", (512, 256)), f"{NAME} has scales and is F8_E5M2"),
        (_with(NAME, "F8_E4M3", (512, 128)), rf"{SCALES} is \[4, 2\], by the blocks of 128 x 128 .* \[4, 1\]"),
        (_with(SCALES, "F32", (4, 4)), rf"{SCALES} is \[4, 4\], by the blocks of 128 x 128 .* should be \[4, 2\]"),
        (_with(SCALES, "F8_E4M3", (4, 2)), rf"not BF16, F16 or F32: {SCALES} \(F8_E4M3\)"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(tmp_path: Path, change: Callable[[Stored], None], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(quantized(tmp_path / "model", change=change))
    assert "quantized already" not in str(caught.value)


def test_a_wrong_shape_is_told_of_the_weights(tmp_path: Path) -> None:
    def narrow(tensors: Stored) -> None:
        _with(NAME, "F8_E4M3", (512, 128))(tensors)
        _with(SCALES, "F32", (4, 1))(tensors)

    with pytest.raises(TensorMismatchError, match=rf"{NAME} is \[512, 128\], by config.json it should be \[512, 256\]"):
        open_checkpoint(quantized(tmp_path / "model", change=narrow))


@pytest.mark.parametrize(
    "stated",
    [
        None,
        {**FP8, "weight_block_size": None},
        {**FP8, "weight_block_size": [128]},
        {**FP8, "weight_block_size": [128, 0]},
        {**FP8, "fmt": "e5m2"},
        {"quant_method": "compressed-tensors"},
        {**ROWS, "format": "int-quantized"},
        {**ROWS, "config_groups": {**ROWS["config_groups"], "group_1": {}}},
    ],
)
def test_scales_without_the_size_of_blocks_are_refused(tmp_path: Path, stated: Any) -> None:
    directory = quantized(tmp_path / "model", stated=stated)
    with pytest.raises(CheckpointError, match=r"is quantized to FP8 .*_scale_inv\); a config.json whose .*_block_size"):
        open_checkpoint(directory)
    assert json.loads((directory / "config.json").read_text())["quantization_config"] == stated
