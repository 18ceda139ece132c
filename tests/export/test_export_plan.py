"""The plan: offsets, order, shards, totals, all from headers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

from ggufmoe.checkpoint import open_checkpoint
from ggufmoe.errors import ImatrixError, OptionError
from ggufmoe.export.export_plan import plan_export
from ggufmoe.export.gguf_layout import lay_out_files
from ggufmoe.gguf.header import GGUFValue
from ggufmoe.gguf.types import GGMLType, ValueType
from ggufmoe.quant.filetypes import FileType
from ggufmoe.quant.policy import TypePolicy
from ggufmoe.writing.plan import PlannedTensor, WritePlan

Make = Callable[..., Path]


def planned(directory: Path, file_type: FileType = FileType.Q8_0, split: int | None = None) -> WritePlan:
    source = open_checkpoint(str(directory))
    try:
        return plan_export(source, Path("out.gguf"), TypePolicy(file_type), split_max_bytes=split)
    finally:
        source.close()


def test_tensors_follow_one_another_aligned(tiny_checkpoint: Make) -> None:
    plan = planned(tiny_checkpoint(n_embd=288, n_ff=288, n_expert=3))
    file = plan.files[0]
    assert file.tensors[0].offset == len(file.header)
    for before, after in pairwise(file.tensors):
        assert after.offset == -(-(before.offset + before.n_bytes) // 32) * 32
    last = file.tensors[-1]
    assert file.n_bytes == -(-(last.offset + last.n_bytes) // 32) * 32 == plan.n_bytes
    for tensor in file.tensors:
        assert tensor.n_bytes == tensor.n_weights // tensor.type.block_size * tensor.type.block_bytes


def test_tensors_stand_as_llama_quantize_writes_them(tiny_checkpoint: Make) -> None:
    names = [tensor.name for tensor in planned(tiny_checkpoint(n_layer=11)).tensors]
    assert names[:3] == ["output.weight", "output_norm.weight", "token_embd.weight"]
    layers = [int(name.split(".")[1]) for name in names[3:]]
    assert layers == sorted(layers)
    assert names[3:13] == sorted(names[3:13])


def test_the_same_source_gives_the_same_plan(tiny_checkpoint: Make) -> None:
    directory = tiny_checkpoint()
    assert planned(directory).to_dict() == planned(directory).to_dict()
    assert planned(directory).files[0].header == planned(directory).files[0].header


def test_a_plan_can_be_printed(tiny_checkpoint: Make) -> None:
    plan = planned(tiny_checkpoint(n_layer=1))
    content = json.loads(json.dumps(plan.to_dict()))
    assert content["total_bytes"] == plan.n_bytes
    assert content["weights"] == sum(math.prod(tensor["shape"]) for tensor in content["files"][0]["tensors"])
    assert content["types"]["Q8_0"]["n_tensors"] + content["types"]["F32"]["n_tensors"] == len(plan.tensors)
    stack = next(t for t in content["files"][0]["tensors"] if t["name"] == "blk.0.ffn_up_exps.weight")
    assert stack["type"] == "Q8_0"
    assert stack["sources"][1] == "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    assert 8.5 <= content["bits_per_weight"] < 8.7


def test_shards_hold_what_fits_and_are_marked_as_gguf_split_does(tiny_checkpoint: Make) -> None:
    whole = planned(tiny_checkpoint())
    plan = planned(tiny_checkpoint(), split=300_000)
    count = len(plan.files)
    assert [file.path.name for file in plan.files] == [f"out-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    assert [tensor.name for tensor in plan.tensors] == [tensor.name for tensor in whole.tensors]
    for file, after in pairwise(plan.files):
        size = sum(-(-tensor.n_bytes // 32) * 32 for tensor in file.tensors)
        assert size <= 300_000 or len(file.tensors) == 1
        assert size + -(-after.tensors[0].n_bytes // 32) * 32 > 300_000
    assert max(len(file.header) for file in plan.files[1:]) < len(plan.files[0].header)


def test_a_model_that_fits_into_one_shard_is_not_marked(tiny_checkpoint: Make) -> None:
    split, whole = planned(tiny_checkpoint(), split=10**9), planned(tiny_checkpoint())
    assert split.to_dict() == whole.to_dict()
    assert split.files[0].header == whole.files[0].header


def test_more_shards_than_names_are_refused() -> None:
    tensors = [PlannedTensor(f"blk.{i}.x.weight", GGMLType.F32, (8,), ()) for i in range(100_000)]
    with pytest.raises(OptionError, match="100000 files"):
        lay_out_files(Path("x.gguf"), {"general.type": GGUFValue(ValueType.STRING, "model")}, tensors, 1)


def test_a_type_that_needs_an_importance_matrix_is_refused_while_planning(tiny_checkpoint: Make) -> None:
    with pytest.raises(ImatrixError, match="--imatrix"):
        planned(tiny_checkpoint(), FileType.IQ2_XXS)
