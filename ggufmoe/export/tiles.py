"""Tiles: the unit of work of the writer, a few rows of one source tensor, and how one becomes bytes of the file.

A tile never crosses from one expert to the next, so it has one importance row and one source. Nothing here knows files
or threads; memory is one set of buffers for each worker.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggufmoe import native
from ggufmoe.checkpoint.dtypes import row_count, widen
from ggufmoe.checkpoint.source import Dtype, SourceTensor
from ggufmoe.errors import NonFiniteError
from ggufmoe.export.arch import ggml_type
from ggufmoe.export.plan import ExportPlan, PlannedTensor
from ggufmoe.export.rows import RopeOrdered
from ggufmoe.ggufheader import GGMLType
from ggufmoe.quant.imatrix import Imatrix
from ggufmoe.quant.kernels import quantize_rows

TILE_WEIGHTS = 1 << 18
"""Weights of a tile (1 MiB as float32, which fits a core's cache), unless a single row is longer."""

_EXPONENT_MASK: dict[Dtype, tuple[int, int]] = {
    Dtype.BF16: (0x7FFF, 0x7F80),
    Dtype.F16: (0x7FFF, 0x7C00),
    Dtype.F32: (0x7FFFFFFF, 0x7F800000),
}
"""Bits without the sign, and infinity: whatever is not below it is infinite or NaN."""


@dataclass(frozen=True)
class Tile:
    """Rows [start, stop) of one part of a planned tensor; ``number`` counts through the whole plan."""

    number: int
    file: int
    tensor: PlannedTensor
    part: int
    start: int
    stop: int

    @property
    def offset(self) -> int:
        """Where the tile's bytes begin in its file."""
        rows_before = sum(row_count(part.shape) for part in self.tensor.parts[: self.part]) + self.start
        return self.tensor.offset + rows_before * self.tensor.type.row_bytes(self.tensor.n_cols)

    @property
    def n_bytes(self) -> int:
        """Bytes that the tile has in the file."""
        return (self.stop - self.start) * self.tensor.type.row_bytes(self.tensor.n_cols)


def tiles(plan: ExportPlan) -> Iterator[Tile]:
    """Every tile of a plan, in the order of the files; the same plan gives the same numbers."""
    number = 0
    for file, planned in enumerate(plan.files):
        for tensor in planned.tensors:
            step = tile_rows(tensor)
            for index, part in enumerate(tensor.parts):
                n_rows = row_count(part.shape)
                for start in range(0, n_rows, step):
                    yield Tile(number, file, tensor, index, start, min(start + step, n_rows))
                    number += 1


def tile_rows(tensor: PlannedTensor) -> int:
    """Rows in a tile of this tensor, the last one of a part excepted."""
    return max(1, TILE_WEIGHTS // tensor.n_cols)


class ImportanceCache:
    """Importance rows of the tensors that are being written, read once each; for all workers together."""

    def __init__(self, imatrix: Imatrix | None, capacity: int) -> None:
        self._imatrix = imatrix
        self._capacity = capacity
        self._lock = threading.Lock()
        self._weights: OrderedDict[str, NDArray[np.float32]] = OrderedDict()

    def row(self, tile: Tile) -> NDArray[np.float32] | None:
        """The importance of each column for this tile, (n_cols,) float32; None where there is none."""
        if self._imatrix is None or not tile.tensor.weighted:
            return None
        name = tile.tensor.name
        with self._lock:
            if name not in self._weights:
                n_expert = math.prod(tile.tensor.shape[:-2])
                weights = self._imatrix.weights(name, n_expert, tile.tensor.n_cols)
                assert weights is not None, "the plan marks only tensors that have weights"
                self._weights[name] = weights
                while len(self._weights) > self._capacity:
                    self._weights.popitem(last=False)
            row: NDArray[np.float32] = self._weights[name][tile.part]
            return row


class TileMaker:
    """Makes the bytes of one tile after another in buffers of its own; one for each worker."""

    def __init__(self, plan: ExportPlan, importance: ImportanceCache) -> None:
        n_weights = max((min(tile_rows(t), math.prod(t.shape[:-1])) * t.n_cols for t in plan.tensors), default=0)
        self._raw = np.empty(n_weights * 4, np.uint8)
        self._bits = np.empty(n_weights * 4, np.uint8)
        self._wide = np.empty(n_weights, np.float32)
        self._made = np.empty(n_weights * 4, np.uint8)
        self._importance = importance

    def make(self, tile: Tile) -> memoryview:
        """The bytes of the tile, valid until the next call.

        Raises NonFiniteError, naming the tensor of the file, the one of the source and its row, if a weight is NaN or
        infinite or too large for the type.
        """
        part = tile.tensor.parts[tile.part]
        raw = self._read(tile, part)
        row = self._first_non_finite(raw, part.dtype)
        if row is not None:
            raise NonFiniteError(f"{_place(tile, part, row)} is NaN or infinite; the source is damaged, fetch it again")
        if ggml_type(part.dtype) is tile.tensor.type:
            return raw.data.cast("B")
        made = self._quantize(tile, part, raw)
        self._check_made(tile, part, made)
        return made.data.cast("B")

    def _read(self, tile: Tile, part: SourceTensor) -> NDArray[Any]:
        shape = (tile.stop - tile.start, tile.tensor.n_cols)
        n_bytes = shape[0] * shape[1] * part.dtype.n_bytes
        raw = self._raw[:n_bytes].view(part.dtype.numpy).reshape(shape)
        part.read_rows(tile.start, tile.stop, raw)
        return raw

    def _first_non_finite(self, raw: NDArray[Any], dtype: Dtype) -> int | None:
        """The first row, counted in ``raw``, with a weight that is NaN or infinite; None if there is none."""
        mask, infinity = _EXPONENT_MASK[dtype]
        unsigned = np.dtype(f"u{dtype.n_bytes}")
        bits = self._bits[: raw.nbytes].view(unsigned).reshape(raw.shape)
        np.bitwise_and(raw.view(unsigned), unsigned.type(mask), out=bits)
        if int(bits.max()) < infinity:
            return None
        return int(np.flatnonzero((bits >= infinity).any(axis=1))[0])

    def _quantize(self, tile: Tile, part: SourceTensor, raw: NDArray[Any]) -> NDArray[np.uint8]:
        if part.dtype is Dtype.F32:
            rows: NDArray[np.float32] = raw
        else:
            rows = self._wide[: raw.size].reshape(raw.shape)
            widen(raw, part.dtype, rows)
        made = self._made[: tile.n_bytes].reshape(len(rows), -1)
        quantize_rows(tile.tensor.type, rows, made, self._importance.row(tile))
        return made

    def _check_made(self, tile: Tile, part: SourceTensor, made: NDArray[np.uint8]) -> None:
        made_type = tile.tensor.type
        if made_type in (GGMLType.F16, GGMLType.BF16):
            row = self._first_non_finite(made.view(Dtype[made_type.name].numpy), Dtype[made_type.name])
        else:
            row = None if native.validate_rows(made_type, made) else 0
        if row is not None:
            raise NonFiniteError(
                f"{_place(tile, part, row)}, or one of the next {len(made) - row - 1}, has weights too large for "
                f"{made_type.name}; give the tensor another type with --tensor-type"
            )


def _place(tile: Tile, part: SourceTensor, row: int) -> str:
    """Where a row of a tile comes from, in words."""
    row += tile.start
    source_row = part.source_row(row) if isinstance(part, RopeOrdered) else row
    return f"{tile.tensor.name}: row {source_row} of {part.name}"
