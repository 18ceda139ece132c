"""GGUF to GGUF: whole files, headers included, equal to those of llama_model_quantize."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import ggufmoe
from ggufmoe.errors import (
    ArchitectureError,
    GGUFError,
    ImatrixError,
    NonFiniteError,
    OptionError,
    OutputExistsError,
    TensorMismatchError,
)
from ggufmoe.files import partial_path
from ggufmoe.gguf.header import GGUFValue, read_header
from ggufmoe.gguf.manifest import read_manifest, verify
from ggufmoe.gguf.model import read_model_header
from ggufmoe.gguf.types import GGMLType, ValueType
from ggufmoe.options import Quantizer
from ggufmoe.quant import importances as imatrix
from ggufmoe.quant.filetypes import FileType
from ggufmoe.quant.policy import TypePolicy
from ggufmoe.quantize import plan_quantize
from ggufmoe.work import Progress
from ggufmoe.writing.place import journal_path
from tests.export.gguf_models import Stored, load, store, unstacked
from tests.gguf_files import write_mixtral
from tests.quant.llama_quantize import Specimen, quantize, write_model

DENSE = Specimen(n_expert=0)


def made_by_llama(source: Path, file_type: str, **flags: bool) -> bytes:
    """What llama_model_quantize makes of a file."""
    output = source.with_name("theirs.gguf")
    outcome = quantize(source, TypePolicy(FileType.from_name(file_type)), None, output, **flags)
    assert outcome.ok, outcome.log[-300:]
    return output.read_bytes()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("llama.block_count", GGUFValue(ValueType.UINT32, 3), "is 3, expected 2, the number of layers"),
        ("llama.block_count", GGUFValue(ValueType.UINT32, 2**31), "expected 1 to 512 layers"),
        ("llama.expert_used_count", GGUFValue(ValueType.UINT32, 5), "expected 1 to 4, the number of experts"),
        ("llama.attention.layer_norm_rms_epsilon", GGUFValue(ValueType.FLOAT32, math.nan), "is nan, expected a small"),
        ("llama.rope.freq_base", GGUFValue(ValueType.FLOAT32, -1.0), "expected 1 to 1e\\+15"),
    ],
)
@pytest.mark.parametrize("quant", ["Q8_0", "COPY"])
def test_a_header_that_llama_cpp_cannot_take_is_refused_by_key(
    tmp_path: Path, key: str, value: GGUFValue, said: str, quant: str
) -> None:
    source, output = write_mixtral(tmp_path / "in.gguf", changes={key: value}), tmp_path / "out.gguf"
    for refusing in (ggufmoe.quantize, plan_quantize):
        with pytest.raises(GGUFError, match=f"in.gguf: {key}.*{said}.*; the file is corrupt"):
            refusing(source, output, quant, threads=1)
    assert list(tmp_path.iterdir()) == [source]


def model(path: Path, specimen: Specimen, seed: int = 0) -> Path:
    return write_model(path / "in.gguf", specimen, specimen.weights(seed))


@pytest.mark.parametrize(
    ("specimen", "file_type"),
    [
        (DENSE, "Q4_K_M"),
        (dataclasses.replace(DENSE, source=GGMLType.F32, tied=True), "Q4_0"),
        (dataclasses.replace(DENSE, n_embd=288, n_ff=320, n_head=3, n_head_kv=3, source=GGMLType.F16), "Q5_K_M"),
        (dataclasses.replace(DENSE, n_embd=48, n_ff=80), "Q4_K_S"),
        (Specimen(n_expert=2), "Q4_K_M"),
        (Specimen(n_expert=3, source=GGMLType.F16, n_layer=3), "Q3_K_L"),
        (Specimen(n_expert=4, tied=True, source=GGMLType.F32), "Q2_K"),
        (Specimen(n_expert=8, n_layer=2), "Q4_K_M"),
        (Specimen(n_expert=1), "Q6_K"),
        (Specimen(n_expert=8, source=GGMLType.F16), "IQ4_XS"),
        (Specimen(n_expert=2, n_embd=288, n_ff=288, tied=True), "IQ4_NL"),
        (Specimen(n_expert=2), "F16"),
        (Specimen(n_expert=2, source=GGMLType.F32), "BF16"),
        (Specimen(n_expert=2), "F32"),
        (Specimen(n_expert=2), "MXFP4_MOE"),
        (dataclasses.replace(DENSE, architecture="qwen2", n_layer=2), "Q4_K_M"),
        (dataclasses.replace(DENSE, architecture="qwen2", tied=True, n_layer=8), "Q3_K_M"),
        (dataclasses.replace(DENSE, architecture="phi3", n_head_kv=1), "IQ4_XS"),
    ],
    ids=str,
)
def test_the_file_is_the_one_that_llama_cpp_writes(tmp_path: Path, specimen: Specimen, file_type: str) -> None:
    source = model(tmp_path, specimen)
    ggufmoe.quantize(source, tmp_path / "out.gguf", file_type)
    assert (tmp_path / "out.gguf").read_bytes() == made_by_llama(source, file_type)


def test_every_key_is_carried_over_in_its_order(tmp_path: Path) -> None:
    metadata, tensors = load(model(tmp_path, DENSE))
    number = {"UINT8": 200, "INT8": -3, "UINT16": 60000, "INT16": -5, "UINT64": 2**63, "INT64": -(2**40)}
    more = {f"some.{name}": GGUFValue(ValueType[name], value) for name, value in number.items()}
    more |= {
        "general.file_type": GGUFValue(ValueType.UINT32, 32),
        "general.quantization_version": GGUFValue(ValueType.UINT32, 1),
        "some.float": GGUFValue(ValueType.FLOAT64, math.pi),
        "some.truth": GGUFValue(ValueType.BOOL, True),
        "some.truths": GGUFValue(ValueType.ARRAY, [True, False], ValueType.BOOL),
        "some.empty": GGUFValue(ValueType.ARRAY, [], ValueType.FLOAT32),
        "tokenizer.ggml.tokens": GGUFValue(ValueType.ARRAY, ["a", "\udcff\udcfe", "語", ""], ValueType.STRING),
        "tokenizer.ggml.scores": GGUFValue(ValueType.ARRAY, [0.0, -1.5, 3e-9, 7.0], ValueType.FLOAT32),
    }
    first = dict(list(metadata.items())[:1])
    source = store(tmp_path / "in.gguf", first | more | metadata, tensors)
    ggufmoe.quantize(source, tmp_path / "out.gguf", "Q8_0")
    assert (tmp_path / "out.gguf").read_bytes() == made_by_llama(source, "Q8_0")
    assert list(read_header(tmp_path / "out.gguf").metadata)[-2:] == [
        "general.quantization_version",
        "general.file_type",
    ]


def test_leading_dimensions_of_one_are_not_written(tmp_path: Path) -> None:
    metadata, tensors = load(model(tmp_path, DENSE))
    tensors["output_norm.weight"] = dataclasses.replace(tensors["output_norm.weight"], shape=(1, 256))
    tensors["blk.0.attn_q.weight"] = dataclasses.replace(tensors["blk.0.attn_q.weight"], shape=(1, 1, 256, 256))
    source = store(tmp_path / "in.gguf", metadata, tensors)
    ggufmoe.quantize(source, tmp_path / "out.gguf", "Q4_K_S")
    assert (tmp_path / "out.gguf").read_bytes() == made_by_llama(source, "Q4_K_S")


def test_another_alignment_becomes_the_usual_one(tmp_path: Path) -> None:
    metadata, tensors = load(model(tmp_path, DENSE))
    ggufmoe.quantize(tmp_path / "in.gguf", tmp_path / "plain.gguf", "Q8_0")
    aligned = {"general.alignment": GGUFValue(ValueType.UINT32, 128)}
    source = store(tmp_path / "aligned.gguf", metadata | aligned, tensors, alignment=128)
    ggufmoe.quantize(source, tmp_path / "out.gguf", "Q8_0")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "plain.gguf").read_bytes()


def test_an_importance_matrix_is_used_and_named_in_the_file(tmp_path: Path) -> None:
    specimen = Specimen(n_expert=3)
    source = model(tmp_path, specimen)
    importance = specimen.importance()
    entries = {name: (values, np.ones(len(values), np.float32)) for name, values in importance.items()}
    imatrix.save(tmp_path / "i.gguf", entries, ["text.txt"], chunk_count=4)
    result = ggufmoe.quantize(source, tmp_path / "out.gguf", "IQ2_XXS", imatrix=tmp_path / "i.gguf", threads=3)
    theirs = tmp_path / "theirs.gguf"
    assert quantize(source, TypePolicy(FileType.IQ2_XXS), importance, theirs).ok
    assert load(tmp_path / "out.gguf")[1] == load(theirs)[1]
    told = {key: value.value for key, value in load(tmp_path / "out.gguf")[0].items() if "imatrix" in key}
    assert told == {
        "quantize.imatrix.file": str(tmp_path / "i.gguf"),
        "quantize.imatrix.dataset": "text.txt",
        "quantize.imatrix.entries_count": len(entries),
        "quantize.imatrix.chunks_count": 4,
    }
    assert {report.weighted for report in result.quantizers} == {True}
    again = ggufmoe.quantize(
        tmp_path / "out.gguf", tmp_path / "b.gguf", "Q2_K", imatrix=tmp_path / "i.gguf", allow_requantize=True
    )
    keys = [key for key in load(again.paths[0])[0] if "imatrix" in key]
    assert keys == list(told)


@pytest.mark.parametrize(
    ("first", "second"), [("Q8_0", "Q4_K_M"), ("Q4_K_M", "Q8_0"), ("Q4_K_M", "Q5_K_S"), ("Q5_0", "F16")]
)
def test_requantizing_goes_through_ggml_s_own_floats(tmp_path: Path, first: str, second: str) -> None:
    source = tmp_path / "first.gguf"
    ggufmoe.quantize(model(tmp_path, Specimen(n_expert=2)), source, first)
    with pytest.raises(OptionError, match="--allow-requantize"):
        ggufmoe.quantize(source, tmp_path / "out.gguf", second)
    assert not quantize(source, TypePolicy(FileType.from_name(second)), None, tmp_path / "theirs.gguf").ok
    ggufmoe.quantize(source, tmp_path / "out.gguf", second, allow_requantize=True)
    assert (tmp_path / "out.gguf").read_bytes() == made_by_llama(source, second, allow_requantize=True)


@pytest.mark.parametrize(
    "file_type", ["Q2_K", "Q3_K_S", "Q6_K", "IQ4_NL", "IQ4_XS", "Q4_1", "TQ2_0", "MXFP4_MOE", "IQ3_S"]
)
def test_every_kind_of_block_can_be_widened(tmp_path: Path, file_type: str) -> None:
    source = tmp_path / "first.gguf"
    ggufmoe.quantize(model(tmp_path, DENSE), source, file_type)
    ggufmoe.quantize(source, tmp_path / "out.gguf", "F32", allow_requantize=True)
    assert (tmp_path / "out.gguf").read_bytes() == made_by_llama(source, "F32", allow_requantize=True)


def test_the_same_type_is_copied_without_asking(tmp_path: Path) -> None:
    source = model(tmp_path, Specimen(n_expert=2))
    ggufmoe.quantize(source, tmp_path / "first.gguf", "Q8_0")
    result = ggufmoe.quantize(tmp_path / "first.gguf", tmp_path / "second.gguf", "Q8_0")
    assert (tmp_path / "second.gguf").read_bytes() == (tmp_path / "first.gguf").read_bytes()
    assert result.quantizers == ()


def test_copy_changes_no_type(tmp_path: Path) -> None:
    source = tmp_path / "first.gguf"
    ggufmoe.quantize(model(tmp_path, Specimen(n_expert=2)), source, "Q4_K_M")
    result = ggufmoe.quantize(source, tmp_path / "out.gguf", "copy")
    assert (tmp_path / "out.gguf").read_bytes() == made_by_llama(source, "F32", only_copy=True)
    assert result.to_dict()["file_type"] == "COPY"


def test_shards_go_in_and_out(tmp_path: Path) -> None:
    source = model(tmp_path, Specimen(n_expert=4, n_layer=2))
    split = ggufmoe.quantize(source, tmp_path / "s.gguf", "COPY", split_max_size="300K")
    assert len(split.paths) > 3
    assert read_model_header(split.paths[2]).get("split.count") == len(split.paths)
    whole = made_by_llama(source, "Q4_K_M")
    ggufmoe.quantize(split.paths[0], tmp_path / "a.gguf", "Q4_K_M")
    ggufmoe.quantize(split.paths[2], tmp_path / "b.gguf", "Q4_K_M")
    joined = made_by_llama(split.paths[0], "Q4_K_M")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes() == joined == whole
    again = ggufmoe.quantize(split.paths[0], tmp_path / "t.gguf", "Q4_K_M", split_max_size="300K", manifest=True)
    assert len(again.paths) > 1
    ggufmoe.quantize(again.paths[0], tmp_path / "c.gguf", "COPY")
    assert (tmp_path / "c.gguf").read_bytes() == whole
    assert again.manifest is not None
    assert verify(again.paths, read_manifest(again.manifest)) == []


@pytest.mark.parametrize("n_expert", [2, 8])
@pytest.mark.parametrize("file_type", ["COPY", "Q4_K_M"])
def test_experts_that_stand_one_by_one_are_stacked(tmp_path: Path, n_expert: int, file_type: str) -> None:
    metadata, tensors = load(model(tmp_path, Specimen(n_expert=n_expert, n_layer=2)))
    legacy = store(tmp_path / "legacy.gguf", metadata, unstacked(tensors))
    ggufmoe.quantize(tmp_path / "in.gguf", tmp_path / "whole.gguf", file_type)
    ggufmoe.quantize(legacy, tmp_path / "mended.gguf", file_type)
    assert (tmp_path / "mended.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


def test_experts_of_different_types_can_be_made_one_type_but_not_copied(tmp_path: Path) -> None:
    metadata, tensors = load(model(tmp_path, Specimen(n_expert=2)))
    ggufmoe.quantize(tmp_path / "in.gguf", tmp_path / "q8.gguf", "Q8_0")
    mixed = unstacked(tensors) | {
        name: tensor for name, tensor in unstacked(load(tmp_path / "q8.gguf")[1]).items() if "ffn_up.1" in name
    }
    legacy = store(tmp_path / "legacy.gguf", metadata, mixed)
    with pytest.raises(OptionError, match="allow-requantize"):
        ggufmoe.quantize(legacy, tmp_path / "out.gguf", "COPY")
    ggufmoe.quantize(legacy, tmp_path / "out.gguf", "Q8_0")
    assert load(tmp_path / "out.gguf")[1] == load(tmp_path / "q8.gguf")[1]


def broken(directory: Path, **changes: Stored | None) -> Path:
    """A legacy file, its tensors changed, or left out where None is given."""
    metadata, tensors = load(model(directory, Specimen(n_expert=2)))
    legacy = {**unstacked(tensors), **changes}
    kept = {name: tensor for name, tensor in legacy.items() if tensor is not None}
    return store(directory / "broken.gguf", metadata, kept)


def test_experts_that_are_missing_misshapen_or_there_twice_are_refused(tmp_path: Path) -> None:
    gone = broken(tmp_path, **{"blk.0.ffn_up.1.weight": None})
    with pytest.raises(TensorMismatchError, match=r"needs 2 experts, found 1; missing: 1"):
        ggufmoe.quantize(gone, tmp_path / "out.gguf")
    small = Stored(GGMLType.F32, (1, 256), bytes(1024))
    with pytest.raises(TensorMismatchError, match="not of one shape"):
        ggufmoe.quantize(broken(tmp_path, **{"blk.0.ffn_up.1.weight": small}), tmp_path / "out.gguf")
    with pytest.raises(TensorMismatchError, match="one by one"):
        ggufmoe.quantize(broken(tmp_path, **{"blk.0.ffn_up_exps.weight": small}), tmp_path / "out.gguf")
    with pytest.raises(TensorMismatchError, match="found 3; missing: none"):
        ggufmoe.quantize(broken(tmp_path, **{"blk.0.ffn_up.2.weight": small}), tmp_path / "out.gguf")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"general.architecture": None}, GGUFError, "does not say its architecture"),
        ({"llama.block_count": None}, GGUFError, "block_count is missing"),
        ({"llama.block_count": GGUFValue(ValueType.STRING, "two")}, GGUFError, "expected a count"),
        (
            {
                "general.architecture": GGUFValue(ValueType.STRING, "falcon"),
                "falcon.block_count": GGUFValue(ValueType.UINT32, 1),
            },
            ArchitectureError,
            "rules of its own",
        ),
    ],
)  # fmt: skip
def test_files_that_are_no_models_are_refused(
    tmp_path: Path, changes: dict[str, GGUFValue | None], error: type[Exception], message: str
) -> None:
    metadata, tensors = load(model(tmp_path, DENSE))
    kept = {key: value for key, value in {**metadata, **changes}.items() if value is not None}
    with pytest.raises(error, match=message):
        ggufmoe.quantize(store(tmp_path / "odd.gguf", kept, tensors), tmp_path / "out.gguf")
    with pytest.raises(GGUFError, match="holds no tensors"):
        ggufmoe.quantize(store(tmp_path / "odd.gguf", metadata, {}), tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_heads_may_differ_from_layer_to_layer(tmp_path: Path) -> None:
    metadata, tensors = load(model(tmp_path, dataclasses.replace(DENSE, n_layer=2, n_head_kv=1)))
    heads = {"llama.attention.head_count_kv": GGUFValue(ValueType.ARRAY, [1, 4], ValueType.INT32)}
    source = store(tmp_path / "in.gguf", metadata | heads, tensors)
    ggufmoe.quantize(source, tmp_path / "out.gguf", "IQ4_NL")
    assert load(tmp_path / "out.gguf")[1]["blk.0.attn_v.weight"].type is GGMLType.Q5_K
    assert (tmp_path / "out.gguf").read_bytes() == made_by_llama(source, "IQ4_NL")


def test_integers_are_copied_and_never_quantized(tmp_path: Path) -> None:
    metadata, tensors = load(model(tmp_path, DENSE))
    routes = Stored(GGMLType.I32, (4, 256), np.arange(1024, dtype="<i4").tobytes())
    source = store(tmp_path / "in.gguf", metadata, tensors | {"blk.0.ffn_gate_tid2eid.weight": routes})
    ggufmoe.quantize(source, tmp_path / "out.gguf", "Q8_0")
    assert load(tmp_path / "out.gguf")[1]["blk.0.ffn_gate_tid2eid.weight"] == routes
    source = store(tmp_path / "odd.gguf", metadata, tensors | {"blk.0.attn_q.weight": routes})
    with pytest.raises(OptionError, match="I32, which cannot be made Q8_0"):
        ggufmoe.quantize(source, tmp_path / "b.gguf", "Q8_0", allow_requantize=True)


def test_damaged_weights_are_named(tmp_path: Path) -> None:
    metadata, tensors = load(model(tmp_path, DENSE))
    ffn = tensors["blk.0.ffn_up.weight"]
    spoiled = bytearray(ffn.data)
    spoiled[7 * 512 + 2 : 7 * 512 + 4] = b"\x80\xff"  # minus infinity in the eighth row
    tensors["blk.0.ffn_up.weight"] = dataclasses.replace(ffn, data=bytes(spoiled))
    with pytest.raises(NonFiniteError, match=r"blk\.0\.ffn_up\.weight: row 7 of"):
        ggufmoe.quantize(store(tmp_path / "in.gguf", metadata, tensors), tmp_path / "out.gguf")
    metadata, tensors = load(model(tmp_path, DENSE))
    ggufmoe.quantize(tmp_path / "in.gguf", tmp_path / "q8.gguf", "Q8_0")
    metadata, tensors = load(tmp_path / "q8.gguf")
    block = tensors["blk.0.ffn_up.weight"]
    tensors["blk.0.ffn_up.weight"] = dataclasses.replace(block, data=b"\x00\x7c" + block.data[2:])
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        ggufmoe.quantize(store(tmp_path / "q8.gguf", metadata, tensors), tmp_path / "out.gguf", "COPY")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "COPY", "pure": True, "tensor_types": ("x=q8_0",)}, "leave out --tensor-type, --pure"),
        ({"quant": "Q4_X"}, "unknown file type"),
        ({"threads": 0}, "--threads must be between 1 and 512, not 0"),
        ({"quantizer": "quick"}, "quantizer must be one of auto, fast, ggml"),
        ({"layers": 3}, "QuantizeOptions has no option 'layers'; there are quant, size, "),
        ({"split_max_size": "0"}, "not a size"),
        ({"quantizer": "fast", "quant": "TQ1_0"}, "TQ1_0: there is no fast quantizer"),
        ({"tensor_types": ("ffn_upp=q8_0",)}, "matches no tensor"),
    ],
)
def test_options_that_make_no_sense(tmp_path: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ggufmoe.quantize(model(tmp_path, DENSE), tmp_path / "out.gguf", **options)  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.gguf"]


def test_an_input_is_never_written_over(tmp_path: Path) -> None:
    source = model(tmp_path, DENSE)
    content = source.read_bytes()
    with pytest.raises(OutputExistsError, match="exists already"):
        ggufmoe.quantize(source, source)
    with pytest.raises(OutputExistsError, match="which is read"):
        ggufmoe.quantize(source, source, force=True)
    (tmp_path / "link.gguf").symlink_to(source)
    with pytest.raises(OutputExistsError, match="which is read"):
        ggufmoe.quantize(source, tmp_path / "link.gguf", force=True)
    assert source.read_bytes() == content


def test_a_missing_importance_matrix_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ImatrixError, match="IQ2_XS needs an importance matrix"):
        ggufmoe.quantize(model(tmp_path, DENSE), tmp_path / "out.gguf", "IQ2_XS")


def test_the_plan_is_what_is_written(tmp_path: Path) -> None:
    source = model(tmp_path, Specimen(n_expert=2))
    plan = plan_quantize(source, tmp_path / "out.gguf", "Q4_K_M", tensor_types=("ffn_up=q6_k",), pure=True)
    steps: list[Progress] = []
    result = ggufmoe.quantize(
        source, tmp_path / "out.gguf", "Q4_K_M", tensor_types=("ffn_up=q6_k",), pure=True, on_progress=steps.append
    )
    assert result.plan.to_dict() == plan.to_dict()
    assert plan.n_bytes == (tmp_path / "out.gguf").stat().st_size == result.n_bytes
    assert steps[-1].done == steps[-1].total
    assert result.bytes_read == sum(len(tensor.data) for tensor in load(source)[1].values())
    wanted = TypePolicy(FileType.Q4_K_M, (("ffn_up", GGMLType.Q6_K),), pure=True)
    assert quantize(source, wanted, None, tmp_path / "theirs.gguf").ok
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.parametrize("quantizer", ["auto", "fast", "ggml"])
def test_the_quantizer_does_not_change_a_byte_and_is_reported(tmp_path: Path, quantizer: Quantizer) -> None:
    source = model(tmp_path, Specimen(n_expert=2))
    result = ggufmoe.quantize(source, tmp_path / "out.gguf", "Q4_K_S", quantizer=quantizer)
    assert (tmp_path / "out.gguf").read_bytes() == made_by_llama(source, "Q4_K_S")
    told = result.to_dict()["quantizers"]
    assert {row["type"] for row in told} >= {"Q4_K", "Q6_K"}
    assert {row["source"] for row in told} == {"BF16"}
    if quantizer != "auto":  # which depends on what this process has done before
        assert {row["quantizer"] for row in told} == {quantizer}


KILLED = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from ggufmoe.export.gguf_source import GGUFSource
from ggufmoe.export.requantize import plan_requantize
from ggufmoe.writing.place import PartialFile
from ggufmoe.writing.writer import WriteOptions, write_plan
from ggufmoe.quant.policy import TypePolicy
from ggufmoe.quant.filetypes import FileType

class Slow(PartialFile):
    def write_at(self, offset, data):
        super().write_at(offset, data)
        time.sleep(0.05)

plan = plan_requantize(GGUFSource(Path(sys.argv[1])), Path(sys.argv[2]), TypePolicy(FileType.Q8_0))
write_plan(plan, WriteOptions(threads=1, flush_interval_s=0, open_output=Slow))
"""


def test_a_killed_run_is_resumed_to_the_same_file(tmp_path: Path) -> None:
    source, output = model(tmp_path, Specimen(n_expert=8, n_layer=3)), tmp_path / "out.gguf"
    script = KILLED.format(root=str(Path(__file__).parents[1]))
    process = subprocess.Popen([sys.executable, "-c", script, str(source), str(output)])
    deadline = time.monotonic() + 60
    journal = journal_path(output)
    while time.monotonic() < deadline and not (journal.exists() and journal.read_bytes().count(b"\n") > 3):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert partial_path(output).exists()
    assert not output.exists()
    result = ggufmoe.quantize(source, output, "Q8_0", resume=True)
    assert 0 < result.bytes_written < sum(tensor.n_bytes for tensor in result.plan.tensors)
    assert output.read_bytes() == made_by_llama(source, "Q8_0")
