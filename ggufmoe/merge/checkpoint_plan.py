"""The plan of a checkpoint that is to be written: which tensor stands where in which safetensors shard, and the index.

Owns names, shard boundaries and headers of both Mixtral layouts.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from ggufmoe.checkpoint.safetensors import read_header
from ggufmoe.checkpoint.source import ModelSource, SourceTensor
from ggufmoe.errors import SafetensorsError
from ggufmoe.writing.plan import Part, PlannedFile, PlannedTensor, WritePlan, plan_file, split_tensors

Layout = Literal["classic", "fused"]

_HEADER_ALIGNMENT = 8


def plan_checkpoint(model: ModelSource, directory: Path, layout: Layout, max_shard_bytes: int) -> WritePlan:
    """Plan the safetensors files of a Mixtral in ``directory``, of at most ``max_shard_bytes`` of tensors each.

    A larger tensor gets a shard of its own. ``classic`` has one tensor per expert projection and is read by every tool;
    ``fused`` is how transformers 5 and mergekit stack them.
    """
    stored = _fused(model) if layout == "fused" else ((name, one.shape, (one,)) for name, one in model.tensors.items())
    tensors = []
    for name, shape, sources in stored:
        parts = tuple(Part(source, source.dtype.ggml_type) for source in sources)
        tensors.append(PlannedTensor(name, parts[0].type, shape, parts))
    groups = split_tensors(tensors, max_shard_bytes)
    names = (
        ["model.safetensors"]
        if len(groups) == 1
        else [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    )
    files = tuple(plan_file(directory / name, group, _header) for name, group in zip(names, groups, strict=True))
    return WritePlan(
        directory / "model.safetensors",
        files,
        model.input_paths,
        "safetensors",
        reads_back_as_safetensors,
        split_option="--max-shard-size",
    )


def checkpoint_index(plan: WritePlan) -> dict[str, Any] | None:
    """The content of ``model.safetensors.index.json``; None for a single file, which needs no index."""
    if len(plan.files) == 1:
        return None
    weight_map = {tensor.name: file.path.name for file in plan.files for tensor in file.tensors}
    total = sum(tensor.n_bytes for tensor in plan.tensors)
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def reads_back_as_safetensors(file: PlannedFile, path: Path) -> bool:
    """Whether the header of the safetensors file at ``path`` is the planned one."""
    try:
        header = read_header(path)
    except SafetensorsError:
        return False
    found = {name: (entry.dtype, entry.shape, entry.begin) for name, entry in header.entries.items()}
    return found == {tensor.name: (tensor.type.name, tensor.shape, tensor.offset) for tensor in file.tensors}


_Stored = tuple[str, tuple[int, ...], tuple[SourceTensor, ...]]
"""A tensor of the checkpoint: name, shape, and the tensors of the model that follow one another in it."""


def _fused(model: ModelSource) -> Iterator[_Stored]:
    """Per layer the router, gate rows above up rows for each expert, and the down projections."""
    config = model.config
    for name, tensor in model.tensors.items():
        if ".block_sparse_moe." not in name:
            yield name, tensor.shape, (tensor,)
    for layer in range(config.n_layer):
        stem = f"model.layers.{layer}.block_sparse_moe."
        router = model.tensors[stem + "gate.weight"]
        experts = [f"{stem}experts.{expert}." for expert in range(config.n_expert)]
        gate_up = tuple(model.tensors[f"{e}{part}.weight"] for e in experts for part in ("w1", "w3"))
        down = tuple(model.tensors[f"{e}w2.weight"] for e in experts)
        fused = f"model.layers.{layer}.mlp."
        yield fused + "gate.weight", router.shape, (router,)
        yield fused + "experts.gate_up_proj", (config.n_expert, 2 * config.n_ff, config.n_embd), gate_up
        yield fused + "experts.down_proj", (config.n_expert, config.n_embd, config.n_ff), down


def _header(tensors: Sequence[PlannedTensor]) -> bytes:
    """The header of a safetensors file; the dtypes of weights (BF16, F16, F32) have the names that ggml gives them."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for tensor in tensors:
        offsets = [tensor.offset, tensor.offset + tensor.n_bytes]
        content[tensor.name] = {"dtype": tensor.type.name, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
