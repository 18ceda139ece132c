"""Both expert layouts as one set of classic names, and everything that does not fit reported at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.checkpoint.safetensors import DTYPE_BITS
from ggufmoe.errors import CheckpointError, TensorMismatchError
from ggufmoe.weights.source_tensor import Dtype, SourceTensor
from tests import tiny
from tests.tiny import Tiny

MOE = "model.layers.{}.block_sparse_moe"


def stored_as(directory: Path, spec: Tiny, rename: Callable[[str], str]) -> Path:
    """A checkpoint whose tensors have other names in the file."""
    tiny.make_checkpoint(directory, **vars(spec))
    tensors = {rename(name): value for name, value in tiny.stored_tensors(spec).items()}
    tiny.write_safetensors(directory / "model.safetensors", tensors)
    return directory


def changed(directory: Path, spec: Tiny, change: Callable[[dict[str, tuple[str, NDArray[Any]]]], object]) -> Path:
    """A checkpoint whose file holds other tensors than it should."""
    tiny.make_checkpoint(directory, **vars(spec))
    tensors = tiny.stored_tensors(spec)
    change(tensors)
    tiny.write_safetensors(directory / "model.safetensors", tensors)
    return directory


def whole(tensor: SourceTensor) -> NDArray[Any]:
    shape = tensor.shape if len(tensor.shape) == 2 else (1, *tensor.shape)
    out = np.empty(shape, tensor.dtype.numpy)
    tensor.read_rows(0, shape[0], out)
    return out.reshape(tensor.shape)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize(
    "fields",
    [
        {"layout": "classic", "n_expert": 3},
        {"layout": "fused", "n_expert": 3},
        {"layout": "fused", "n_expert": 8, "tie": True, "n_embd": 288, "n_head": 6, "n_head_kv": 3, "n_ff": 320},
        {"layout": "classic", "max_shard_bytes": 300_000},
        {"layout": "fused", "max_shard_bytes": 300_000},
        {"arch": "mistral"},
        {"arch": "llama", "head_dim": 32, "tie": True},
    ],
)
def test_every_layout_gives_the_classic_tensors(fields: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    spec = Tiny(**fields, dtype=dtype, tokenizer=None)
    expected = tiny.classic_weights(spec)
    with open_checkpoint(tiny.make_checkpoint(tmp_path, **vars(spec))) as model:
        assert set(model.tensors) == set(expected)
        for name, tensor in model.tensors.items():
            assert (tensor.name, tensor.shape) == (name, expected[name].shape)
            assert tensor.dtype is Dtype(dtype)
            np.testing.assert_array_equal(whole(tensor), expected[name])
        assert model.config.tie_embeddings == spec.tie


@pytest.mark.parametrize(
    ("layout", "replacements"),
    [
        ("classic", [("block_sparse_moe", "mlp")]),
        ("classic", [("block_sparse_moe", "mlp"), ("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")]),
        ("fused", [("mlp", "block_sparse_moe")]),
    ],
)
def test_other_spellings_that_transformers_reads(
    layout: str, replacements: list[tuple[str, str]], tmp_path: Path
) -> None:
    def rename(name: str) -> str:
        for old, new in replacements:
            name = name.replace(old, new)
        return name

    spec = Tiny(layout=layout)
    expected = tiny.classic_weights(spec)
    with open_checkpoint(stored_as(tmp_path, spec, rename)) as model:
        assert {name: tensor.shape for name, tensor in model.tensors.items()} == {
            name: data.shape for name, data in expected.items()
        }
        for expert in range(2):
            for part in ("w1", "w2", "w3"):
                name = f"{MOE.format(1)}.experts.{expert}.{part}.weight"
                np.testing.assert_array_equal(whole(model.tensors[name]), expected[name])


def _per_layer(name: str) -> str:
    return re.sub(r"(layers\.\d+\.)", r"\1_orig_mod.", name)


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name.removeprefix("model."),
        lambda name: "module." + name,
        lambda name: "module." + name.removeprefix("model."),
        lambda name: "_orig_mod." + name,
        lambda name: "module._orig_mod." + name,
        lambda name: "base_model.model." + name,
        lambda name: "model." + name,
        lambda name: "my.wrapper." + name,
        _per_layer,
        lambda name: "_fsdp_wrapped_module." + _per_layer(name).replace("_orig_mod", "_checkpoint_wrapped_module"),
    ],
)
@pytest.mark.parametrize("fields", [{"arch": "llama"}, {"layout": "fused"}, {"arch": "mistral", "tie": True}])
def test_what_wrappers_put_into_names_is_left_out(
    rename: Callable[[str], str], fields: dict[str, Any], tmp_path: Path
) -> None:
    spec = Tiny(**fields)
    expected = tiny.classic_weights(spec)
    with open_checkpoint(stored_as(tmp_path, spec, rename)) as model:
        assert set(model.tensors) == set(expected)
        for name, tensor in model.tensors.items():
            np.testing.assert_array_equal(whole(tensor), expected[name])


def test_names_that_become_the_same_are_an_error(tmp_path: Path) -> None:
    def add(tensors: dict[str, tuple[str, NDArray[Any]]]) -> None:
        tensors["_orig_mod.model.norm.weight"] = tensors["model.norm.weight"]

    message = r"holds model\.norm\.weight twice: as model\.norm\.weight and as _orig_mod\.model\.norm\.weight"
    with pytest.raises(TensorMismatchError, match=message):
        open_checkpoint(changed(tmp_path, Tiny(), add))


def test_prefixes_of_two_models_are_left_alone(tmp_path: Path) -> None:
    def add(tensors: dict[str, tuple[str, NDArray[Any]]]) -> None:
        tensors["teacher.model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]

    with pytest.raises(TensorMismatchError, match=r"left over: teacher\.model\.embed_tokens\.weight$"):
        open_checkpoint(changed(tmp_path, Tiny(), add))


def test_rows_are_read_from_the_middle(tmp_path: Path) -> None:
    spec = Tiny(layout="fused")
    name = f"{MOE.format(1)}.experts.1.w3.weight"
    expected = tiny.classic_weights(spec)[name]
    with open_checkpoint(tiny.make_checkpoint(tmp_path, layout="fused")) as model:
        out = np.empty((7, 256), np.uint16)
        model.tensors[name].read_rows(100, 107, out)
        np.testing.assert_array_equal(out, expected[100:107])
        model.tensors[name].read_rows(5, 5, np.empty((0, 256), np.uint16))


def test_a_wrong_buffer_is_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with open_checkpoint(tiny.make_checkpoint(tmp_path)) as model:
        tensor = model.tensors["lm_head.weight"]
        for start, stop in ((-1, 1), (2, 1), (0, 401)):
            with pytest.raises(ValueError, match="are not in a tensor of shape"):
                tensor.read_rows(start, stop, np.empty((1, 256), np.uint16))
        for out in (
            np.empty((2, 256), np.uint16),
            np.empty((1, 256), np.float32),
            np.empty((1, 512), np.uint16)[:, ::2],
        ):
            with pytest.raises(ValueError, match="out must be contiguous"):
                tensor.read_rows(0, 1, out)


@pytest.mark.parametrize(("layout", "other"), [("classic", "fused"), ("fused", "classic")])
def test_a_mixture_of_layouts_is_an_error_that_names_one_of_each(layout: str, other: str, tmp_path: Path) -> None:
    def mix(tensors: dict[str, tuple[str, NDArray[Any]]]) -> None:
        theirs = tiny.stored_tensors(Tiny(layout=other))
        for name in [name for name in tensors if name.startswith("model.layers.1.")]:
            del tensors[name]
        tensors.update({name: value for name, value in theirs.items() if name.startswith("model.layers.1.")})

    with pytest.raises(TensorMismatchError, match="in more than one layout") as caught:
        open_checkpoint(changed(tmp_path, Tiny(layout=layout), mix))
    assert "model.layers.0." in str(caught.value)
    assert "model.layers.1." in str(caught.value)


def test_everything_wrong_is_reported_at_once(tmp_path: Path) -> None:
    def spoil(tensors: dict[str, tuple[str, NDArray[Any]]]) -> None:
        del tensors["model.norm.weight"]
        del tensors[f"{MOE.format(0)}.experts.1.w2.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = ("BF16", np.zeros(256, np.uint16))
        tensors["model.layers.2.input_layernorm.weight"] = ("BF16", np.zeros(256, np.uint16))
        tensors["model.embed_tokens.weight"] = ("BF16", np.zeros((399, 256), np.uint16))

    with pytest.raises(TensorMismatchError) as caught:
        open_checkpoint(changed(tmp_path / "spoilt", Tiny(), spoil))
    assert str(caught.value) == (
        f"{tmp_path / 'spoilt'} does not hold the tensors of its config.json; "
        "missing: model.layers.0.block_sparse_moe.experts.1.w2.weight, model.norm.weight; "
        "left over: model.layers.0.self_attn.q_proj.bias, model.layers.2.input_layernorm.weight; "
        "wrongly shaped: model.embed_tokens.weight is [399, 256], by config.json it should be [400, 256]"
    )


def test_a_long_report_stays_one_line(tmp_path: Path) -> None:
    directory = tiny.make_checkpoint(tmp_path, n_layer=8, n_expert=8, n_embd=32, n_ff=32)
    tiny.write_safetensors(directory / "model.safetensors", {"a\n" * 5000: ("F32", np.zeros(1, np.float32))})
    with pytest.raises(TensorMismatchError, match=r"and \d+ more") as caught:
        open_checkpoint(directory)
    assert len(str(caught.value)) < 2000
    assert "\n" not in str(caught.value)


def test_a_config_of_absurd_size_is_answered_soon(tmp_path: Path) -> None:
    directory = tiny.make_checkpoint(tmp_path / "absurd", config={"num_hidden_layers": 512, "num_local_experts": 512})
    with pytest.raises(
        TensorMismatchError, match=r"holds 29 tensors, but a model of its config\.json has at least 790019"
    ):
        open_checkpoint(directory)


def test_a_dense_model_in_place_of_a_mixture(tmp_path: Path) -> None:
    directory = tiny.make_checkpoint(tmp_path, arch="mistral")
    tiny.make_checkpoint(tmp_path / "moe")
    (tmp_path / "moe" / "config.json").replace(directory / "config.json")
    with pytest.raises(TensorMismatchError, match=r"missing: .*block_sparse_moe.gate.weight.*left over: .*gate_proj"):
        open_checkpoint(directory)


def test_rotary_buffers_of_old_checkpoints_are_ignored(tmp_path: Path) -> None:
    buffer = ("F32", np.zeros(32, np.float32))
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    with open_checkpoint(changed(tmp_path, Tiny(), lambda tensors: tensors.update({name: buffer}))) as model:
        assert name not in model.tensors


def test_an_output_that_is_there_although_tied_is_kept(tmp_path: Path) -> None:
    head = ("BF16", np.full((400, 256), 7, np.uint16))
    spec = Tiny(tie=True)
    with open_checkpoint(changed(tmp_path, spec, lambda tensors: tensors.update({"lm_head.weight": head}))) as model:
        assert not model.config.tie_embeddings
        np.testing.assert_array_equal(whole(model.tensors["lm_head.weight"]), head[1])


def test_an_output_that_is_missing_although_untied_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TensorMismatchError, match=r"missing: lm_head\.weight"):
        open_checkpoint(changed(tmp_path, Tiny(), lambda tensors: tensors.pop("lm_head.weight")))


def test_weights_of_other_types_are_an_error_that_names_them(tmp_path: Path) -> None:
    eight_bit = ("F8_E4M3", np.zeros((400, 256), np.uint8))
    with pytest.raises(CheckpointError, match=r"not BF16, F16 or F32: lm_head\.weight \(F8_E4M3\); use the model's"):
        open_checkpoint(changed(tmp_path, Tiny(), lambda tensors: tensors.update({"lm_head.weight": eight_bit})))


def _quantized(suffixes: dict[str, str]) -> Callable[[dict[str, tuple[str, NDArray[Any]]]], None]:
    """Puts tensors with these suffixes and dtypes in the place of each projection."""

    def change(tensors: dict[str, tuple[str, NDArray[Any]]]) -> None:
        for name in [name for name in tensors if "_proj.weight" in name]:
            del tensors[name]
            for suffix, dtype in suffixes.items():
                tensors[name.removesuffix(".weight") + suffix] = (dtype, np.zeros(4, WIDTHS[DTYPE_BITS[dtype]]))

    return change


WIDTHS = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


@pytest.mark.parametrize(
    ("suffixes", "message"),
    [
        ({".qweight": "I32", ".qzeros": "I32", ".scales": "F16", ".g_idx": "I32"}, "is quantized with GPTQ .*g_idx"),
        ({".qweight": "I32", ".qzeros": "I32", ".scales": "F16"}, "is quantized with GPTQ or AWQ .*qweight"),
        ({".weight": "U8", ".weight.absmax": "U8", ".weight.quant_map": "F32"}, "by bitsandbytes to 4 bits"),
        ({".weight": "I8", ".SCB": "F32", ".weight_format": "U8"}, "by bitsandbytes to 8 bits"),
        ({".weight": "F8_E4M3", ".weight_scale_inv": "F32"}, "is quantized to FP8 .*weight_scale_inv"),
        ({".weight": "I8", ".weight_scale": "BF16"}, "is quantized to FP8 or 8 bits"),
        ({".weight_packed": "I32", ".weight_scale": "BF16", ".weight_shape": "I64"}, "llm-compressor"),
        ({".weight": "U32", ".scales": "BF16", ".biases": "BF16"}, "is quantized by MLX"),
        ({".qweight": "I8", ".weight_scales": "F16"}, "is quantized by EETQ to 8 bits"),
        ({".q_weight": "I32", ".q_scale": "I32", ".q_groups": "I16", ".q_invperm": "I16"}, "is quantized with EXL2"),
        ({".trellis": "I16", ".suh": "F16", ".svh": "F16"}, "is quantized with EXL3"),
        ({".codes": "I8", ".codebooks": "F16", ".scales": "F16"}, "is quantized with AQLM"),
        ({".Qidxs": "I64", ".SU": "F16", ".SV": "F16"}, "is quantized with QuIP#"),
        ({".indices": "I32", ".centroids.weight": "F16"}, "is quantized with VPTQ"),
        ({".dense_weights": "I64", ".row_offsets": "I32"}, "is quantized with SpQR"),
        ({".weight": "I8", ".dequant_scale": "F32"}, "is quantized by SmoothQuant"),
        ({".base_layer.weight": "BF16", ".lora_A.default.weight": "F32"}, r"holds an adapter .*; load it with peft"),
        ({".modules_to_save.default.weight": "BF16"}, r"holds an adapter"),
    ],
)
def test_what_made_the_tensors_is_told_before_any_is_missing(
    suffixes: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(changed(tmp_path, Tiny(arch="llama"), _quantized(suffixes)))
    assert "missing" not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("suffixes", "message"),
    [
        (
            {".weight": "I8", ".novel_scale": "F32"},
            r"\.weight has the dtype I8\); use the model's unquantized .*left over",
        ),
        ({".novel_codes": "U8", ".novel_scale": "F32"}, r"\.novel_codes has the dtype U8\); .*missing: "),
    ],
)
def test_weights_of_an_unknown_tool_are_known_by_their_dtypes(
    suffixes: dict[str, str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(TensorMismatchError, match=f"is quantized, by a tool that is not known here .*{message}"):
        open_checkpoint(changed(tmp_path, Tiny(arch="llama"), _quantized(suffixes)))


def test_weights_of_64_bits_can_be_saved_again(tmp_path: Path) -> None:
    wide = ("F64", np.zeros((400, 256), np.float64))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight \(F64\); save it again with transformers in float32"):
        open_checkpoint(changed(tmp_path, Tiny(), lambda tensors: tensors.update({"lm_head.weight": wide})))


@pytest.mark.parametrize("stated", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"bits": 4}, ["fp8"]])
def test_a_quantization_that_only_the_config_knows_is_ignored_aloud(
    stated: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method = stated.get("quant_method", "unknown") if isinstance(stated, dict) else "unknown"
    with open_checkpoint(tiny.make_checkpoint(tmp_path, config={"quantization_config": stated})) as model:
        assert len(model.tensors) == 29
    assert f"has a quantization_config ({method}), but its weights are not quantized" in caplog.text


def test_a_quantization_of_the_config_explains_what_is_wrong_with_the_weights(tmp_path: Path) -> None:
    spec = Tiny(config={"quantization_config": {"quant_method": "gptq"}})
    integers = ("I32", np.zeros((400, 32), np.int32))
    for name, message in (("lm_head.weight", r"lm_head\.weight is \[400, 32\]"), ("lm_head.odd", "left over")):
        with pytest.raises(CheckpointError, match=rf"quantized already \('gptq'\); use the original one .*{message}"):
            open_checkpoint(changed(tmp_path, spec, lambda tensors, name=name: tensors.update({name: integers})))  # type: ignore[misc]


def test_dtypes_may_differ_between_tensors(tmp_path: Path) -> None:
    norm = ("F32", np.full(256, 1.5, np.float32))
    with open_checkpoint(
        changed(tmp_path, Tiny(), lambda tensors: tensors.update({"model.norm.weight": norm}))
    ) as model:
        assert model.tensors["model.norm.weight"].dtype is Dtype.F32
        np.testing.assert_array_equal(whole(model.tensors["model.norm.weight"]), norm[1])
