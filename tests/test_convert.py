"""The convert half as a whole: the promises about bytes, layouts, options and what reads what."""

from __future__ import annotations

import json
import math
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ggufmoe
from ggufmoe.convert import plan_convert
from ggufmoe.errors import (
    CheckpointError,
    ImatrixError,
    NoSpaceError,
    OptionError,
    OutputError,
    OutputExistsError,
    RecipeError,
    TensorMismatchError,
)
from ggufmoe.gguf.header import read_header
from ggufmoe.gguf.manifest import read_manifest, verify
from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant import importances as imatrix
from ggufmoe.quant.filetypes import FileType
from ggufmoe.quant.policy import TypePolicy
from ggufmoe.work import Progress
from ggufmoe.writing.journal import fingerprint
from ggufmoe.writing.lock import output_lock
from tests.quant.llama_quantize import quantize, read_tensors
from tests.tiny import Tiny, make_checkpoint, stored_tensors, write_safetensors

Make = Callable[..., Path]


@dataclass(frozen=True)
class Case:
    """A source and a file type to make of it."""

    file_type: str
    dtype: str = "BF16"
    arch: str = "mixtral"
    n_expert: int = 2
    tie: bool = False
    n_embd: int = 256
    n_ff: int = 256

    def checkpoint(self, make: Make) -> Path:
        sizes = {"n_expert": self.n_expert, "n_layer": 1, "n_embd": self.n_embd, "n_ff": self.n_ff}
        return make(arch=self.arch, tie=self.tie, dtype=self.dtype, **sizes)


CASES = (
    Case("Q4_K_M"),
    Case("Q4_K_M", n_expert=8),
    Case("Q4_K_M", n_expert=3, n_embd=288, n_ff=288, tie=True),
    Case("Q5_K_M", dtype="F16", n_expert=4, tie=True),
    Case("Q6_K", dtype="F32", n_ff=512),
    Case("Q8_0", n_embd=288, n_ff=512),
    Case("Q4_0", dtype="F16"),
    Case("Q2_K", n_expert=3),
    Case("Q3_K_L", dtype="F32", n_expert=8),
    Case("IQ4_XS", n_embd=512),
    Case("IQ4_NL", dtype="F16", n_embd=288, n_ff=288),
    Case("F16"),
    Case("BF16", dtype="F32"),
    Case("F32", dtype="F16"),
    Case("MXFP4_MOE"),
    Case("TQ1_0"),
    Case("Q4_K_M", arch="mistral", tie=True),
    Case("Q5_1", arch="llama"),
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_tensor_is_what_llama_cpp_makes_of_the_lossless_file(
    tiny_checkpoint: Make, tmp_path: Path, case: Case
) -> None:
    source = case.checkpoint(tiny_checkpoint)
    ggufmoe.convert(source, tmp_path / "lossless.gguf", case.dtype)
    ggufmoe.convert(source, tmp_path / "ours.gguf", case.file_type)
    outcome = quantize(
        tmp_path / "lossless.gguf", TypePolicy(FileType.from_name(case.file_type)), output=tmp_path / "theirs.gguf"
    )
    assert outcome.ok, outcome.log[-300:]
    ours, theirs = read_tensors(tmp_path / "ours.gguf"), read_tensors(tmp_path / "theirs.gguf")
    assert list(ours) == list(theirs)
    assert [name for name in ours if ours[name] != theirs[name]] == []
    header, other = read_header(tmp_path / "ours.gguf"), read_header(tmp_path / "theirs.gguf")
    assert dict(header.metadata) == dict(other.metadata)


def importance(directory: Path, make: Make, **fields: object) -> Path:
    """An importance matrix with made-up values for every matrix of the checkpoint."""
    rng = np.random.default_rng(5)
    entries = {}
    for tensor in plan_convert(make(**fields), "x.gguf", "F32").tensors:
        if len(tensor.shape) > 1 and "ffn_gate_inp" not in tensor.name:
            n_expert = math.prod(tensor.shape[:-2])
            sums = rng.gamma(0.7, 2.0, (n_expert, tensor.n_cols)).astype(np.float32)
            entries[tensor.name] = (sums, np.full(n_expert, 3, np.float32))
    imatrix.save(directory / "i.gguf", entries, ["text.txt"], chunk_count=4)
    return directory / "i.gguf"


@pytest.mark.parametrize("file_type", ["IQ2_XXS", "Q4_K_S"])
def test_an_importance_matrix_is_used_for_each_expert_its_own(
    tiny_checkpoint: Make, tmp_path: Path, file_type: str
) -> None:
    fields = {"n_expert": 3, "n_layer": 1, "n_ff": 256}
    matrix = importance(tmp_path, tiny_checkpoint, **fields)
    source = tiny_checkpoint(**fields)
    ggufmoe.convert(source, tmp_path / "lossless.gguf", "BF16")
    ggufmoe.convert(source, tmp_path / "ours.gguf", file_type, imatrix=matrix, threads=3)
    loaded = imatrix.Imatrix.load(matrix)
    values = {}
    for tensor in read_header(tmp_path / "lossless.gguf").tensors:
        weights = loaded.weights(tensor.name, math.prod(tensor.shape[:-2]), tensor.shape[-1])
        if weights is not None:
            values[tensor.name] = weights
    policy = TypePolicy(FileType.from_name(file_type))
    outcome = quantize(tmp_path / "lossless.gguf", policy, values, tmp_path / "theirs.gguf")
    assert outcome.ok, outcome.log[-300:]
    assert read_tensors(tmp_path / "ours.gguf") == read_tensors(tmp_path / "theirs.gguf")
    header = read_header(tmp_path / "ours.gguf")
    assert header.get("quantize.imatrix.file") == str(matrix)[:127]
    assert header.get("quantize.imatrix.entries_count") == len(values)


def test_an_importance_matrix_of_another_model_is_refused(tiny_checkpoint: Make, tmp_path: Path) -> None:
    matrix = importance(tmp_path, tiny_checkpoint, n_expert=2)
    with pytest.raises(ImatrixError, match="expected 3 x"):
        ggufmoe.convert(tiny_checkpoint(n_expert=3), tmp_path / "a.gguf", "Q4_K_M", imatrix=matrix)


def test_experts_that_the_importance_matrix_never_saw_are_told(
    tiny_checkpoint: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    n_cols = {"blk.0.ffn_up_exps.weight": 256}
    counts = np.array([3, 0], np.float32)
    imatrix.save(tmp_path / "i.gguf", {name: (np.ones((2, n), np.float32), counts) for name, n in n_cols.items()})
    ggufmoe.convert(tiny_checkpoint(), tmp_path / "a.gguf", "Q4_0", imatrix=tmp_path / "i.gguf")
    assert "never saw some experts" in caplog.text


def test_an_importance_matrix_of_a_smaller_model_is_told(
    tiny_checkpoint: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    matrix = importance(tmp_path, tiny_checkpoint, n_layer=1)
    ggufmoe.convert(tiny_checkpoint(n_layer=1), tmp_path / "a.gguf", "Q4_0", imatrix=matrix)
    assert not caplog.records
    ggufmoe.convert(tiny_checkpoint(n_layer=2), tmp_path / "b.gguf", "Q4_0", imatrix=matrix)
    (record,) = caplog.records
    assert "has nothing for 7 quantized tensors (for example blk.1.attn_k.weight)" in record.getMessage()
    caplog.clear()
    ggufmoe.quantize(tmp_path / "b.gguf", tmp_path / "c.gguf", "Q4_0", imatrix=matrix)
    assert not caplog.records  # nothing changes
    ggufmoe.quantize(tmp_path / "b.gguf", tmp_path / "d.gguf", "Q4_1", imatrix=matrix, allow_requantize=True)
    assert "has nothing for 7 quantized tensors" in caplog.text


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("file_type", ["BF16", "Q4_K_M"])
def test_fused_and_classic_give_the_same_file(tiny_checkpoint: Make, tmp_path: Path, file_type: str, tie: bool) -> None:
    for layout, style in (("classic", 4), ("fused", 5)):
        source = tiny_checkpoint(layout=layout, n_expert=3, tie=tie, config_style=style)
        ggufmoe.convert(source, tmp_path / f"{layout}.gguf", file_type)
    assert (tmp_path / "classic.gguf").read_bytes() == (tmp_path / "fused.gguf").read_bytes()


def test_sharded_and_whole_checkpoints_give_the_same_file(tiny_checkpoint: Make, tmp_path: Path) -> None:
    ggufmoe.convert(tiny_checkpoint(), tmp_path / "a.gguf", "Q4_K_M")
    ggufmoe.convert(tiny_checkpoint(max_shard_bytes=500_000), tmp_path / "b.gguf", "Q4_K_M")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_shards_hold_the_tensors_and_the_metadata_of_the_whole(tiny_checkpoint: Make, tmp_path: Path) -> None:
    ggufmoe.convert(tiny_checkpoint(), tmp_path / "whole.gguf", "Q8_0")
    result = ggufmoe.convert(tiny_checkpoint(), tmp_path / "part.gguf", "Q8_0", split_max_size="500K")
    assert len(result.paths) > 2
    assert not (tmp_path / "part.gguf").exists()
    joined = [item for path in result.paths for item in read_tensors(path).items()]
    assert joined == list(read_tensors(tmp_path / "whole.gguf").items())
    first, *rest = [read_header(path) for path in result.paths]
    split = {key: value for key, value in first.metadata.items() if key.startswith("split.")}
    assert dict(first.metadata) == {**read_header(tmp_path / "whole.gguf").metadata, **split}
    for number, header in enumerate(rest, start=1):
        assert header.metadata.keys() == split.keys()
        assert header.get("split.no") == number
        assert header.get("split.count") == len(result.paths)
        assert header.get("split.tensors.count") == len(joined)


def test_llama_cpp_reads_the_shards_as_one_model(tiny_checkpoint: Make, tmp_path: Path) -> None:
    result = ggufmoe.convert(tiny_checkpoint(), tmp_path / "part.gguf", "BF16", split_max_size="1M")
    ggufmoe.convert(tiny_checkpoint(), tmp_path / "ours.gguf", "Q4_0")
    outcome = quantize(result.paths[0], TypePolicy(FileType.Q4_0), output=tmp_path / "theirs.gguf")
    assert outcome.ok, outcome.log[-300:]
    assert read_tensors(tmp_path / "ours.gguf") == read_tensors(tmp_path / "theirs.gguf")


def test_overrides_of_types(tiny_checkpoint: Make, tmp_path: Path) -> None:
    plan = plan_convert(
        tiny_checkpoint(),
        tmp_path / "a.gguf",
        "Q4_K_M",
        tensor_types=("ffn_up=q8_0", "attn_q=f16"),
        output_tensor_type="q5_0",
        token_embedding_type="Q4_1",
    )
    types = {tensor.name: tensor.type for tensor in plan.tensors}
    assert types["blk.1.ffn_up_exps.weight"] is GGMLType.Q8_0
    assert types["blk.0.attn_q.weight"] is GGMLType.F16
    assert types["output.weight"] is GGMLType.Q5_0
    assert types["token_embd.weight"] is GGMLType.Q4_1
    pure = plan_convert(tiny_checkpoint(), tmp_path / "a.gguf", "Q4_K_M", pure=True)
    assert {tensor.type for tensor in pure.tensors} == {GGMLType.Q4_K, GGMLType.F32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant": "Q4_KM"}, "did you mean"),
        ({"tensor_types": ("ffn_up",)}, "PATTERN=TYPE"),
        ({"output_tensor_type": "q9"}, "q9"),
        ({"split_max_size": "big"}, "not a size"),
        ({"threads": 0}, "--threads must be between 1 and 512, not 0"),
        ({"thread": 1}, "thread"),
    ],
)
def test_options_that_make_no_sense(
    tiny_checkpoint: Make, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        ggufmoe.convert(tiny_checkpoint(), tmp_path / "a.gguf", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_output_is_checked_before_the_source_is_opened(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_text("precious")
    with pytest.raises(OutputExistsError, match="--force"):
        ggufmoe.convert("no/such-model", tmp_path / "a.gguf")
    with pytest.raises(OutputError, match="no file name"):
        ggufmoe.convert("no/such-model", "/")


def test_the_attention_scale_of_yarn_reaches_the_logits(tmp_path: Path) -> None:
    """Scaling cosines and sines by a factor is scaling the products of queries and keys by its square."""
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    told = make_checkpoint(tmp_path / "a", arch="llama", dtype="F32", rope_scaling={**yarn, "attention_factor": 2.0})
    scaled = make_checkpoint(tmp_path / "b", arch="llama", dtype="F32", rope_scaling=yarn)
    ratio = (2.0 / (1 + 0.1 * math.log(4))) ** 2
    spec = Tiny(arch="llama", dtype="F32")
    tensors = {
        name: (dtype, data * np.float32(ratio if "q_proj" in name else 1))
        for name, (dtype, data) in stored_tensors(spec).items()
    }
    write_safetensors(scaled / "model.safetensors", tensors)
    logits = []
    for checkpoint in (told, scaled, make_checkpoint(tmp_path / "c", arch="llama", dtype="F32", rope_scaling=yarn)):
        output = tmp_path / f"{checkpoint.name}.gguf"
        ggufmoe.convert(checkpoint, output, "F32")
        with ggufmoe.Engine(output, ggufmoe.ContextOptions(n_ctx=256, n_threads=1, cache_type_k="f32")) as engine:
            logits.append(engine.logits([1, *range(20, 60)]))
    spread = float(np.ptp(logits[0]))
    assert np.abs(logits[0] - logits[1]).max() < 1e-3 * spread
    assert np.abs(logits[0] - logits[2]).max() > 1e-3 * spread


def test_a_recipe_is_told_from_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="recipe"):
        ggufmoe.convert(tmp_path / "recipe.yaml", tmp_path / "a.gguf")


def test_a_path_is_a_path_and_the_home_directory_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    make_checkpoint(tmp_path / "model", n_layer=1)
    for source in ("~/model", Path("~/model")):
        assert plan_convert(source, "~/m.gguf").output == tmp_path / "m.gguf"
    with pytest.raises(CheckpointError, match="does not exist"):  # and no repository of the hub
        plan_convert(Path("org/name"), "m.gguf")


def test_the_result_says_what_was_done(tiny_checkpoint: Make, tmp_path: Path) -> None:
    steps: list[Progress] = []
    result = ggufmoe.convert(tiny_checkpoint(), tmp_path / "a.gguf", "Q8_0", on_progress=steps.append)
    content = json.loads(json.dumps(result.to_dict()))
    assert content["total_bytes"] == result.n_bytes == (tmp_path / "a.gguf").stat().st_size
    assert content["files"] == [{"path": str(tmp_path / "a.gguf"), "bytes": result.n_bytes}]
    assert content["types"]["Q8_0"]["n_bytes"] + content["types"]["F32"]["n_bytes"] == content["bytes_written"]
    assert content["bytes_read"] == sum(math.prod(part.rows.shape) * 2 for t in result.plan.tensors for part in t.parts)
    assert content["manifest"] is None
    assert steps[-1].done == steps[-1].total


def test_a_manifest_fits_the_files_and_finds_a_changed_bit(tiny_checkpoint: Make, tmp_path: Path) -> None:
    result = ggufmoe.convert(tiny_checkpoint(), tmp_path / "a.gguf", "Q8_0", manifest=True, split_max_size="1M")
    assert result.manifest == tmp_path / "a.manifest.json"
    manifest = read_manifest(result.manifest)
    assert verify(result.paths, manifest) == []
    with open(result.paths[1], "r+b") as file:
        file.seek(-5, os.SEEK_END)
        byte = file.read(1)
        file.seek(-5, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    assert len(verify(result.paths, manifest)) == 1


def test_a_manifest_that_is_there_is_renewed_with_its_file(tiny_checkpoint: Make, tmp_path: Path) -> None:
    steps: list[Progress] = []
    ggufmoe.convert(tiny_checkpoint(), tmp_path / "a.gguf", "Q8_0", manifest=True, on_progress=steps.append)
    assert {step.phase for step in steps} == {"write", "hash"}
    result = ggufmoe.convert(tiny_checkpoint(), tmp_path / "a.gguf", "Q4_0", force=True)
    assert result.manifest is not None
    assert verify(result.paths, read_manifest(result.manifest)) == []


def hollow_checkpoint(directory: Path, make: Make, n_ff: int) -> Path:
    """A dense checkpoint of any size whose weights are one hole in a sparse file."""
    whole = make(arch="mistral", n_layer=1)
    directory.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (directory / name).write_bytes((whole / name).read_bytes())
    config = json.loads((whole / "config.json").read_text()) | {"intermediate_size": n_ff}
    (directory / "config.json").write_text(json.dumps(config))
    with open(whole / "model.safetensors", "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    end = 0
    for name, entry in header.items():
        if name != "__metadata__":
            entry["shape"] = [n_ff if size == 512 else size for size in entry["shape"]]
            entry["data_offsets"] = [end, end + 2 * math.prod(entry["shape"])]
            end = entry["data_offsets"][1]
    encoded = json.dumps(header).encode()
    with open(directory / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(8 + len(encoded) + end)
    return directory


def test_planning_reads_headers_only_and_a_full_disk_is_told_before_anything_is_written(
    tiny_checkpoint: Make, tmp_path: Path
) -> None:
    n_ff = 2**31 - 256  # 3.3 TB of weights, none of them on disk
    source = hollow_checkpoint(tmp_path / "hollow", tiny_checkpoint, n_ff)
    plan = plan_convert(source, tmp_path / "a.gguf", "F32")
    assert plan.n_bytes > 6 * 10**12
    with pytest.raises(NoSpaceError, match=r"needs 6\.[56]\d TB"):
        ggufmoe.convert(source, tmp_path / "a.gguf", "F32")
    assert [path.name for path in tmp_path.iterdir()] == ["hollow"]


def test_a_missing_tensor_is_told_before_anything_is_written(tiny_checkpoint: Make, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for path in tiny_checkpoint(n_layer=1).iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text()) | {"num_hidden_layers": 2}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(TensorMismatchError, match="missing"):
        ggufmoe.convert(source, tmp_path / "a.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# ---- the place of the output


def test_a_gguf_file_in_the_folder_of_its_source_is_an_output(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model")
    output = source / "model.gguf"
    ggufmoe.convert(source, output, "F16", manifest=True)
    ggufmoe.convert(source, output, "Q8_0", force=True)
    ggufmoe.convert(source, tmp_path / "beside.gguf", "Q8_0")
    assert output.read_bytes() == (tmp_path / "beside.gguf").read_bytes()
    with pytest.raises(OutputExistsError, match="which is read"):
        ggufmoe.convert(source, source / "config.json", "Q8_0", force=True)


def test_outputs_beside_the_source_do_not_change_what_a_run_goes_on_from(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "model")
    before = fingerprint(plan_convert(source, source / "m.gguf", "F32"))
    for name in ("m.gguf.partial", "m.gguf.partial.journal", "m.gguf.partial.lock", "other.gguf"):
        (source / name).write_bytes(b"written by a conversion")
    assert fingerprint(plan_convert(source, source / "m.gguf", "F32")) == before
    (source / "tokenizer.json").write_text("{}")
    assert fingerprint(plan_convert(source, source / "m.gguf", "F32")) != before


def test_a_link_is_written_through(tiny_checkpoint: Make, tmp_path: Path) -> None:
    disk = tmp_path / "big-disk"
    disk.mkdir()
    link, target = tmp_path / "model.gguf", disk / "model.gguf"
    link.symlink_to(target)
    ggufmoe.convert(tiny_checkpoint(), link, "F16")
    first = target.read_bytes()
    with pytest.raises(OutputExistsError):
        ggufmoe.convert(tiny_checkpoint(), link, "Q8_0")
    ggufmoe.convert(tiny_checkpoint(), link, "Q8_0", force=True)
    assert link.is_symlink()
    assert target.read_bytes() != first
    assert [path.name for path in disk.iterdir()] == ["model.gguf"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_regular_file_is_never_replaced(tiny_checkpoint: Make, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.gguf"
    os.mkfifo(pipe)
    for output in (pipe, Path(os.devnull)):
        with pytest.raises(OutputError, match="is a device or a pipe"):
            ggufmoe.convert(tiny_checkpoint(), output, "F16", force=True)
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert stat.S_ISCHR(Path(os.devnull).stat().st_mode)


def test_two_conversions_to_one_output_do_not_harm_each_other(tiny_checkpoint: Make, tmp_path: Path) -> None:
    output = tmp_path / "a.gguf"
    with output_lock(output), pytest.raises(OutputError, match=f"is being written by process {os.getpid()}"):
        ggufmoe.convert(tiny_checkpoint(), output, "F16")
    ggufmoe.convert(tiny_checkpoint(), output, "F16")
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]
