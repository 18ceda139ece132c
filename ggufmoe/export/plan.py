"""The plan of an export: every file, tensor, type, offset and size, known before the first weight is read.

Planning reads headers only. A plan is frozen data that can be printed; ``writer`` executes it, and the same plan gives
the same bytes. Tensors stand in the order in which llama-quantize writes them: those outside the layers first, then
layer by layer, by name.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ggufmoe.checkpoint.source import ModelSource
from ggufmoe.errors import OptionError
from ggufmoe.export.arch import ModelTensor, family_of
from ggufmoe.export.metadata import imatrix_metadata, model_metadata
from ggufmoe.export.rows import Part
from ggufmoe.export.vocab import tokenizer_metadata
from ggufmoe.gguf.encoding import encode_header
from ggufmoe.gguf.header import TensorInfo, Value
from ggufmoe.gguf.names import OUTPUT, llama_quantize_order
from ggufmoe.gguf.types import GGMLType, ValueType
from ggufmoe.quant.filetypes import IGNORES_IMATRIX
from ggufmoe.quant.importances import Imatrix
from ggufmoe.quant.mixes import TOKEN_EMBEDDINGS
from ggufmoe.quant.policy import ModelShape, TensorShape, TypePolicy, choose_types
from ggufmoe.sizes import counted

_LOG = logging.getLogger("ggufmoe")

ALIGNMENT = 32
"""Bytes to which every tensor is aligned in its file (``GGUF_DEFAULT_ALIGNMENT``)."""

_MAX_FILES = 99_999


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a file; ``parts`` one after another are its rows."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    offset: int
    """Bytes from the beginning of the file."""
    n_bytes: int
    parts: tuple[Part, ...]
    weighted: bool = False
    """Whether the plan's importance matrix has weights for it."""

    @property
    def n_weights(self) -> int:
        """Weights of the tensor."""
        return math.prod(self.shape)

    @property
    def n_cols(self) -> int:
        """Weights of a row."""
        return self.shape[-1]


@dataclass(frozen=True)
class PlannedFile:
    """One file: the bytes before the tensors, and the tensors. The gaps between tensors are zeros."""

    path: Path
    header: bytes = field(repr=False)
    tensors: tuple[PlannedTensor, ...]
    n_bytes: int


@dataclass(frozen=True)
class TypeTotal:
    """How much of a model has one type."""

    n_tensors: int
    n_weights: int
    n_bytes: int


@dataclass(frozen=True)
class ExportPlan:
    """What will be written, to the byte."""

    output: Path
    """The path that was asked for; with more than one file, their names are made from it."""
    files: tuple[PlannedFile, ...]
    input_paths: tuple[Path, ...]
    """Every file that is read."""
    file_type: str
    imatrix: Imatrix | None = None

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """The tensors of all files."""
        return tuple(tensor for file in self.files for tensor in file.tensors)

    @property
    def n_bytes(self) -> int:
        """Size of all files."""
        return sum(file.n_bytes for file in self.files)

    @property
    def n_weights(self) -> int:
        """Weights of the model."""
        return sum(tensor.n_weights for tensor in self.tensors)

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensor data per weight, headers not counted."""
        return sum(tensor.n_bytes for tensor in self.tensors) * 8 / self.n_weights

    @property
    def types(self) -> dict[str, TypeTotal]:
        """What each type amounts to, the largest first."""
        totals: dict[str, TypeTotal] = {}
        for tensor in self.tensors:
            old = totals.get(tensor.type.name, TypeTotal(0, 0, 0))
            totals[tensor.type.name] = TypeTotal(
                old.n_tensors + 1, old.n_weights + tensor.n_weights, old.n_bytes + tensor.n_bytes
            )
        return dict(sorted(totals.items(), key=lambda item: -item[1].n_bytes))

    def to_dict(self) -> dict[str, Any]:
        """The plan as what JSON can hold."""
        return {
            "file_type": self.file_type,
            "files": [_file_dict(file) for file in self.files],
            "total_bytes": self.n_bytes,
            "weights": self.n_weights,
            "bits_per_weight": round(self.bits_per_weight, 4),
            "types": {name: vars(total) for name, total in self.types.items()},
        }


def _file_dict(file: PlannedFile) -> dict[str, Any]:
    tensors = [
        {
            "name": tensor.name,
            "type": tensor.type.name,
            "shape": list(tensor.shape),
            "offset": tensor.offset,
            "bytes": tensor.n_bytes,
            "sources": [part.name for part in tensor.parts],
        }
        for tensor in file.tensors
    ]
    return {"path": str(file.path), "header_bytes": len(file.header), "bytes": file.n_bytes, "tensors": tensors}


def plan_export(
    source: ModelSource,
    output: Path,
    policy: TypePolicy,
    *,
    imatrix: Imatrix | None = None,
    split_max_bytes: int | None = None,
) -> ExportPlan:
    """Plan the GGUF file of a model, or its shards of at most ``split_max_bytes`` of tensors each.

    Reads the tokenizer's files and no weights. Raises ArchitectureError, TokenizerError, OptionError or ImatrixError:
    whatever can be known to fail.
    """
    family = family_of(source.config)
    tensors = sorted(family.tensors(source), key=lambda tensor: llama_quantize_order(tensor.name))
    weighted = fit_imatrix(imatrix, {tensor.name: tensor.shape for tensor in tensors})
    types = choose_types(_type_shapes(tensors), _model_shape(source, family.NAME), policy, weighted)
    warn_of_missing_importances(imatrix, types, weighted)
    tokenizer = tokenizer_metadata(source.tokenizer_dir, source.config, source.chat_template)
    metadata = model_metadata(source, tensors, policy.file_type, tokenizer)
    if imatrix:
        metadata |= imatrix_metadata(imatrix)
    placed = [place(t.name, t.shape, types[t.name], t.parts, weighted=t.name in (weighted or ())) for t in tensors]
    inputs = (*source.input_paths, *([imatrix.path] if imatrix else []))
    files = lay_out_files(output, metadata, placed, split_max_bytes)
    return ExportPlan(output, files, inputs, policy.file_type.name, imatrix)


def _type_shapes(tensors: Iterable[ModelTensor]) -> list[TensorShape]:
    return [TensorShape(tensor.name, tensor.shape, tensor.source_type) for tensor in tensors]


def _model_shape(source: ModelSource, architecture: str) -> ModelShape:
    config = source.config
    return ModelShape(config.n_layer, config.n_head, config.n_head_kv, config.n_expert, architecture)


def fit_imatrix(imatrix: Imatrix | None, shapes: Mapping[str, Sequence[int]]) -> frozenset[str] | None:
    """The tensors that the importance matrix has weights for, None without one; what it never saw is logged.

    Raises ImatrixError where it is of another model.
    """
    if imatrix is None:
        return None
    weighted = imatrix.fit(shapes)
    if coverage := imatrix.coverage:
        name, experts = next(iter(coverage.items()))
        _LOG.warning(
            "%s never saw some experts (%d tensors, for example expert %d of %s); all their columns count alike",
            imatrix.path, len(coverage), experts[0], name,
        )  # fmt: skip
    return weighted


def warn_of_missing_importances(
    imatrix: Imatrix | None, types: Mapping[str, GGMLType], weighted: Collection[str] | None
) -> None:
    """Log quantized matrices for which the importance matrix has nothing, as one of a smaller model.

    Embeddings and output are left out of most: llama-imatrix does not measure them unless it is asked to.
    """
    if imatrix is None or weighted is None:
        return
    unmeasured = {*TOKEN_EMBEDDINGS, OUTPUT, *weighted}
    missing = [
        name
        for name, kind in types.items()
        if kind.is_quantized and kind not in IGNORES_IMATRIX and name not in unmeasured
    ]
    if missing:
        _LOG.warning(
            "%s has nothing for %s (for example %s), quantized as without it",
            imatrix.path, counted(len(missing), "quantized tensor"), missing[0],
        )  # fmt: skip


def place(
    name: str, shape: tuple[int, ...], type: GGMLType, parts: tuple[Part, ...], *, weighted: bool
) -> PlannedTensor:
    """A tensor with its size; the offset follows when it is known which file it is in."""
    n_bytes = math.prod(shape[:-1]) * type.row_bytes(shape[-1])
    return PlannedTensor(name, type, shape, 0, n_bytes, parts, weighted)


def lay_out_files(
    output: Path, metadata: Mapping[str, Value], tensors: Sequence[PlannedTensor], split_max_bytes: int | None
) -> tuple[PlannedFile, ...]:
    """Distribute tensors over files and give each its offset; the metadata goes into the first.

    Shards are cut and marked as llama.cpp's gguf-split does: a shard takes tensors, in order, until the next one would
    take their padded sizes beyond the limit. If all fits into one file, it is not marked at all.
    """
    groups = _groups(tensors, split_max_bytes)
    if len(groups) > _MAX_FILES:
        raise OptionError(
            f"the split size makes {len(groups)} files, at most {_MAX_FILES} can be named; give a larger size"
        )
    files: list[PlannedFile] = []
    for number, group in enumerate(groups):
        keys = dict(metadata) if number == 0 else {}
        if len(groups) > 1:
            keys |= _split_keys(number, len(groups), len(tensors))
        files.append(_lay_out(_shard_path(output, number, len(groups)), keys, group))
    return tuple(files)


def _groups(tensors: Sequence[PlannedTensor], split_max_bytes: int | None) -> list[list[PlannedTensor]]:
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        n_bytes = _padded(tensor.n_bytes)
        if split_max_bytes is not None and groups[-1] and size + n_bytes > split_max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += n_bytes
    return groups


def _split_keys(number: int, n_files: int, n_tensors: int) -> dict[str, Value]:
    return {
        "split.no": Value(ValueType.UINT16, number, None),
        "split.count": Value(ValueType.UINT16, n_files, None),
        "split.tensors.count": Value(ValueType.INT32, n_tensors, None),
    }


def _shard_path(output: Path, number: int, n_files: int) -> Path:
    if n_files == 1:
        return output
    return output.with_name(f"{output.name.removesuffix('.gguf')}-{number + 1:05d}-of-{n_files:05d}.gguf")


def _lay_out(path: Path, metadata: Mapping[str, Value], tensors: Sequence[PlannedTensor]) -> PlannedFile:
    infos: list[TensorInfo] = []
    position = 0
    for tensor in tensors:
        infos.append(TensorInfo(tensor.name, tensor.type, tensor.shape, position, tensor.n_bytes))
        position += _padded(tensor.n_bytes)
    header = encode_header(metadata, infos, ALIGNMENT)
    placed = tuple(
        PlannedTensor(t.name, t.type, t.shape, len(header) + info.offset, t.n_bytes, t.parts, t.weighted)
        for t, info in zip(tensors, infos, strict=True)
    )
    return PlannedFile(path, header, placed, len(header) + position)


def _padded(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def parse_size(given: str) -> int:
    """Bytes of a size such as ``4G``, ``500M`` or ``64K`` (powers of 1000, as in llama.cpp's gguf-split).

    Raises OptionError for anything else.
    """
    found = re.fullmatch(r"\s*(\d{1,15})\s*([KMGT]?)B?\s*", given, re.IGNORECASE)
    n_bytes = int(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ") if found else 0
    if n_bytes < 1000:  # a few bytes: the letter was forgotten
        raise OptionError(f"{given!r} is not a size; give a number with K, M, G or T, for example 4G")
    return n_bytes
