"""The layout of a checkpoint that is to be written: which tensor stands where in which safetensors shard.

Owns names, shard boundaries and headers of both Mixtral layouts. It plans and never touches a disk: whoever writes
GGUF files writes these too, since both are headers followed by tensors at known offsets.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

from ggufmoe.checkpoint.source import Dtype, ModelSource, SourceTensor

Layout = Literal["classic", "fused"]

_HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class PlacedTensor:
    """One tensor of a shard: ``parts`` one after another are its rows. ``offset`` counts from the end of the header."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    offset: int
    n_bytes: int
    parts: tuple[SourceTensor, ...]


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name, the bytes before the tensors, and the tensors."""

    name: str
    header: bytes
    tensors: tuple[PlacedTensor, ...]

    @property
    def n_bytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(tensor.n_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class CheckpointLayout:
    """Every shard of a checkpoint, and the index that goes with more than one."""

    shards: tuple[Shard, ...]

    @property
    def index(self) -> dict[str, Any] | None:
        """The content of ``model.safetensors.index.json``; None for a single file."""
        if len(self.shards) == 1:
            return None
        total = sum(tensor.n_bytes for shard in self.shards for tensor in shard.tensors)
        weight_map = {tensor.name: shard.name for shard in self.shards for tensor in shard.tensors}
        return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def plan_checkpoint(model: ModelSource, *, layout: Layout = "classic", max_shard_bytes: int) -> CheckpointLayout:
    """Lay out a Mixtral's tensors in shards of at most ``max_shard_bytes`` (a larger tensor gets a shard of its own).

    ``classic`` has one tensor per expert projection and is read by every tool; ``fused`` is how transformers 5 and
    mergekit stack them.
    """
    stored = list(_fused(model) if layout == "fused" else _classic(model))
    groups = _grouped(stored, max_shard_bytes)
    names = (
        ["model.safetensors"]
        if len(groups) == 1
        else [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    )
    return CheckpointLayout(tuple(_shard(name, group) for name, group in zip(names, groups, strict=True)))


_Stored = tuple[str, tuple[int, ...], tuple[SourceTensor, ...]]


def _classic(model: ModelSource) -> Iterator[_Stored]:
    for name, tensor in model.tensors.items():
        yield name, tensor.shape, (tensor,)


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


def _grouped(stored: Sequence[_Stored], max_shard_bytes: int) -> list[list[_Stored]]:
    groups: list[list[_Stored]] = [[]]
    size = 0
    for item in stored:
        n_bytes = prod(item[1]) * item[2][0].dtype.n_bytes
        if groups[-1] and size + n_bytes > max_shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(item)
        size += n_bytes
    return groups


def _shard(name: str, group: Sequence[_Stored]) -> Shard:
    tensors: list[PlacedTensor] = []
    offset = 0
    for tensor_name, shape, parts in group:
        n_bytes = prod(shape) * parts[0].dtype.n_bytes
        tensors.append(PlacedTensor(tensor_name, parts[0].dtype, shape, offset, n_bytes, parts))
        offset += n_bytes
    return Shard(name, _header(tensors), tuple(tensors))


def _header(tensors: Sequence[PlacedTensor]) -> bytes:
    content: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for tensor in tensors:
        offsets = [tensor.offset, tensor.offset + tensor.n_bytes]
        content[tensor.name] = {"dtype": tensor.dtype.value, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text
