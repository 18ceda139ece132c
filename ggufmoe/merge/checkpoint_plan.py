"""The plan of a checkpoint that is to be written: which tensor stands where in which safetensors shard, and the index.

Owns shard boundaries and headers; names in a fused layout are those of the model's family.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from ggufmoe.checkpoint.safetensors import read_header
from ggufmoe.checkpoint.source import ModelSource
from ggufmoe.errors import OptionError, SafetensorsError
from ggufmoe.families import family_of
from ggufmoe.families.family import EXPERT, StoredLayout, numbered
from ggufmoe.weights.dtypes import row_count
from ggufmoe.weights.source_tensor import SourceTensor
from ggufmoe.writing.plan import Part, PlannedFile, PlannedTensor, WritePlan, plan_file, split_tensors

Layout = Literal["classic", "fused"]

CHECKPOINT_NAME = "model.safetensors"
"""The file of a checkpoint that has one, and what the journal of any is called after."""
_HEADER_ALIGNMENT = 8


def plan_checkpoint(model: ModelSource, directory: Path, layout: Layout, max_shard_bytes: int) -> WritePlan:
    """Plan the safetensors files of a merged model in ``directory``, of at most ``max_shard_bytes`` of tensors each.

    A larger tensor gets a shard of its own. ``classic`` is read by every tool and has, in nearly all families, one
    tensor per expert projection; ``fused`` is how transformers 5 and mergekit stack them.
    """
    stored = _stored_as(model, layout)
    tensors = []
    for name, shape, sources in stored:
        parts = tuple(Part(source, source.dtype.ggml_type) for source in sources)
        tensors.append(PlannedTensor(name, parts[0].type, shape, parts))
    groups = split_tensors(tensors, max_shard_bytes)
    names = (
        [CHECKPOINT_NAME]
        if len(groups) == 1
        else [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    )
    files = tuple(plan_file(directory / name, group, _header) for name, group in zip(names, groups, strict=True))
    return WritePlan(
        directory / CHECKPOINT_NAME,
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


def _stored_as(model: ModelSource, layout: Layout) -> Iterator[_Stored]:
    """The tensors of the checkpoint. Raises OptionError if the family has no such layout."""
    family = family_of(model.config)
    found = next((one for one in family.layouts if one.name == layout), None)
    if found is None:
        raise OptionError(f"a {family.architecture} has no layout {layout!r}; leave --layout out")
    if not found.fused:
        return ((name, one.shape, (one,)) for name, one in model.tensors.items())
    return _fused(model, found)


def _fused(model: ModelSource, layout: StoredLayout) -> Iterator[_Stored]:
    """The tensors that the layout stores as they are, then per layer those that it renames, and those that it fuses."""
    config, family = model.config, family_of(model.config)
    parts = {part for fused in layout.fused for part in fused.parts}
    changed = {
        rule.name(layer, expert)
        for rule, layer, expert in family.instances(config)
        if rule.hf in parts or rule.hf in layout.renamed
    }
    for name, tensor in model.tensors.items():
        if name not in changed:
            yield name, tensor.shape, (tensor,)
    for layer in range(config.n_layer):
        for old, new in layout.renamed.items():
            tensor = model.tensors[numbered(old, layer)]
            yield numbered(new, layer), tensor.shape, (tensor,)
        for fused in layout.fused:
            is_run_of_rows = not fused.transposed and not fused.interleaved
            assert is_run_of_rows, f"{fused.stored} cannot be written part after part"
            stack = (config.n_expert,) if EXPERT in fused.parts[0] else ()
            experts = range(*stack or (1,))
            rows = [model.tensors[numbered(part, layer, expert)] for expert in experts for part in fused.parts]
            n_rows = sum(row_count(one.shape) for one in rows) // len(experts)
            yield numbered(fused.stored, layer), (*stack, n_rows, rows[0].shape[-1]), tuple(rows)


def _header(tensors: Sequence[PlannedTensor]) -> bytes:
    """The header of a safetensors file; the dtypes of weights (BF16, F16, F32) have the names that ggml gives them."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for tensor in tensors:
        offsets = [tensor.offset, tensor.offset + tensor.n_bytes]
        content[tensor.name] = {"dtype": tensor.type.name, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
