"""What will be written: every file with its header, tensors, offsets and sizes, and where the rows of each tensor are.

A plan is frozen data that can be printed. It is the same for every file format whose offsets are known before the
first tensor byte is read: ``export`` plans GGUF files, ``merge`` safetensors files, and ``writer`` writes both. The
same plan gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ggufmoe.gguf.header import padded
from ggufmoe.gguf.types import GGMLType
from ggufmoe.quant.chosen_mix import ChosenMix
from ggufmoe.quant.importances import Imatrix

PLAIN_DTYPES: Mapping[GGMLType, np.dtype[Any]] = {
    GGMLType.BF16: np.dtype(np.uint16),
    GGMLType.F16: np.dtype(np.float16),
    GGMLType.F32: np.dtype(np.float32),
}
"""The arrays in which rows of plain numbers are read (BF16 as its bits); rows of other types are read as bytes."""


class RowReader(Protocol):
    """One tensor of a source, read by rows. A row is the last dimension; a 1-D tensor is a single row."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...

    def read_rows(self, start: int, stop: int, out: NDArray[Any]) -> None:
        """Fill ``out``, a C-contiguous array of ``stop - start`` rows, with rows [start, stop) as they are stored.

        Safe to call from several threads at once.
        """


@dataclass(frozen=True)
class Part:
    """One run of rows of a planned tensor: all rows of one source tensor, stored as ``type``."""

    rows: RowReader
    type: GGMLType
    source_row: Callable[[int], int] = field(default=int, repr=False)
    """The row of the source's tensor that is read as a row of ``rows``; another one where rows are reordered."""

    @property
    def name(self) -> str:
        """The tensor's name in the source."""
        return self.rows.name

    @property
    def n_rows(self) -> int:
        """Number of rows: the product of all dimensions but the last; 1 for a 1-D tensor."""
        return math.prod(self.rows.shape[:-1])


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of a file; ``parts`` one after another are its rows."""

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    weighted: bool = False
    """Whether the plan's importance matrix has weights for it."""
    unfit_type: GGMLType | None = None
    """The type that was asked for, where its blocks do not fit the rows and ``type`` was taken in its place."""
    offset: int = 0
    """Bytes from the beginning of the file; until ``plan_file`` has placed the tensor, of no meaning."""

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensor, without what aligns the next one."""
        return self.n_rows * self.type.row_bytes(self.n_cols)

    @property
    def n_weights(self) -> int:
        """Weights of the tensor."""
        return math.prod(self.shape)

    @property
    def n_cols(self) -> int:
        """Weights of a row."""
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        """Number of rows: the product of all dimensions but the last; 1 for a 1-D tensor."""
        return math.prod(self.shape[:-1])


@dataclass(frozen=True)
class PlannedFile:
    """One file: the bytes before the tensors, and the tensors. The gaps between tensors are zeros."""

    path: Path
    header: bytes = field(repr=False)
    tensors: tuple[PlannedTensor, ...]
    n_bytes: int


class Origin(Protocol):
    """A model that is read over the network."""

    @property
    def source(self) -> str:
        """How the user has named it."""

    @property
    def commit(self) -> str:
        """The revision that is read, which never changes."""

    @property
    def identity(self) -> tuple[str, ...]:
        """What the bytes of the model depend on."""


@dataclass(frozen=True)
class NetworkReads:
    """What comes over the network for a plan."""

    write_bytes: int
    """Headers, and the bytes of the tensors that are written."""
    router_bytes: int
    """What the router of a recipe reads before."""
    twice_bytes: int
    """What of it is among the bytes that are written."""
    cache_bytes: int
    """What may be kept on this disk of the bytes that are read twice (--source-cache)."""
    file_bytes: int
    """Size of the files that are read by ranges, which would be stored with --keep-source."""
    cached_bytes: int = 0
    """Size of the files that are in the hub's cache already, and are read from there."""

    @property
    def kept_bytes(self) -> int:
        """What is kept on this disk of the bytes that are read twice."""
        return min(self.twice_bytes, self.cache_bytes)

    @property
    def n_bytes(self) -> int:
        """All that is fetched, if nothing has to be fetched again."""
        return self.write_bytes + self.router_bytes - self.kept_bytes

    def to_dict(self) -> dict[str, int]:
        """The numbers as plain values for JSON."""
        return {**vars(self), "kept_bytes": self.kept_bytes, "total_bytes": self.n_bytes}


@dataclass(frozen=True)
class TypeTotal:
    """How much of a model has one type."""

    n_tensors: int
    n_weights: int
    n_bytes: int


@dataclass(frozen=True)
class WritePlan:
    """What will be written, to the byte."""

    output: Path
    """The path that was asked for; with more than one file, their names are made from it."""
    files: tuple[PlannedFile, ...]
    input_paths: tuple[Path, ...]
    """Every file that is read."""
    file_type: str
    """What the files are called: a file type of GGUF ("Q4_K_M"), or "safetensors"."""
    reads_back: Callable[[PlannedFile, Path], bool] = field(repr=False)
    """Whether the header of the file at a path, read as any reader of the format reads it, is the planned one."""
    split_option: str = "--split-max-size"
    """The option that makes the files smaller, for the message about a file that the disk cannot hold."""
    imatrix: Imatrix | None = None
    mix: ChosenMix | None = None
    """The mix that was chosen for this model, where ``file_type`` is its name."""
    origins: tuple[Origin, ...] = ()
    """The models that are read over the network, whose files are not among ``input_paths``."""
    network: NetworkReads | None = None
    """What is read over the network, or from the hub's cache; None for models that are not from the hub."""

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """The tensors of all files."""
        return tuple(tensor for file in self.files for tensor in file.tensors)

    @property
    def fallbacks(self) -> tuple[PlannedTensor, ...]:
        """The tensors that have another type than was asked for, because of the length of their rows."""
        return tuple(tensor for tensor in self.tensors if tensor.unfit_type is not None)

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
            "fallbacks": {t.name: t.unfit_type.name for t in self.tensors if t.unfit_type is not None},
            "mix": None if self.mix is None else self.mix.to_dict(),
            "commits": self.commits,
            "network": None if self.network is None else self.network.to_dict(),
        }

    @property
    def commits(self) -> dict[str, str]:
        """The revision of each model that is read over the network, by the name that the user has given."""
        return {origin.source: origin.commit for origin in self.origins}


def split_tensors(
    tensors: Sequence[PlannedTensor], max_bytes: int | None, alignment: int = 1
) -> list[list[PlannedTensor]]:
    """The tensors of each file, in order, so that no file has more than ``max_bytes`` of them (None: one file).

    A tensor counts with what aligns the next one; one that is larger than ``max_bytes`` gets a file of its own.
    """
    groups: list[list[PlannedTensor]] = [[]]
    size = 0
    for tensor in tensors:
        n_bytes = padded(tensor.n_bytes, alignment)
        if max_bytes is not None and groups[-1] and size + n_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += n_bytes
    return groups


def plan_file(
    path: Path,
    tensors: Sequence[PlannedTensor],
    encode_header: Callable[[Sequence[PlannedTensor]], bytes],
    alignment: int = 1,
) -> PlannedFile:
    """A file of a header and tensors one after another, each beginning at a multiple of ``alignment`` bytes.

    ``encode_header`` makes the header of tensors whose offsets count from the end of the header.
    """
    placed: list[PlannedTensor] = []
    position = 0
    for tensor in tensors:
        placed.append(replace(tensor, offset=position))
        position += padded(tensor.n_bytes, alignment)
    header = encode_header(placed)
    in_file = tuple(replace(tensor, offset=len(header) + tensor.offset) for tensor in placed)
    return PlannedFile(path, header, in_file, len(header) + position)


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
