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

from ggufmoe.errors import NonFiniteError
from ggufmoe.gguf.types import GGMLType
from ggufmoe.native import quantizing
from ggufmoe.quant.importances import Imatrix
from ggufmoe.quant.kernels import QuantizerName, quantize_rows
from ggufmoe.writing.plan import PLAIN_DTYPES, Part, PlannedTensor, WritePlan

TILE_WEIGHTS = 1 << 19
"""Weights of a tile, unless a single row is longer: 1 MiB of bfloat16.

Measured from 2^17 to 2^20 on one thread: 2.90, 2.84, 2.81 and 2.88 ns a weight with reading and writing. The
interpreter's lock is held about 25 us for a tile, which on many cores speaks for the larger of the middle ones.
"""

_INFINITY = {GGMLType.BF16: 0x7F80, GGMLType.F16: 0x7C00, GGMLType.F32: 0x7F800000}
"""Bits of infinity: a number whose bits without the sign are not below is infinite or NaN."""


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
        rows_before = sum(part.n_rows for part in self.tensor.parts[: self.part]) + self.start
        return self.tensor.offset + rows_before * self.tensor.type.row_bytes(self.tensor.n_cols)

    @property
    def n_bytes(self) -> int:
        """Bytes that the tile has in the file."""
        return (self.stop - self.start) * self.tensor.type.row_bytes(self.tensor.n_cols)


def tiles(plan: WritePlan) -> Iterator[Tile]:
    """Every tile of a plan, in the order of the files; the same plan gives the same numbers."""
    number = 0
    for file, planned in enumerate(plan.files):
        for tensor in planned.tensors:
            step = tile_rows(tensor)
            for index, part in enumerate(tensor.parts):
                for start in range(0, part.n_rows, step):
                    yield Tile(number, file, tensor, index, start, min(start + step, part.n_rows))
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

    def __init__(
        self,
        plan: WritePlan,
        importance: ImportanceCache,
        quantizer: QuantizerName = "auto",
        *,
        cache: bool = True,
    ) -> None:
        raw = wide = made = 0
        for tensor in plan.tensors:
            n_rows, n_cols = min(tile_rows(tensor), tensor.n_rows), tensor.n_cols
            stored = {part.type for part in tensor.parts}
            raw = max(raw, *(n_rows * kind.row_bytes(n_cols) for kind in stored))
            made = max(made, n_rows * tensor.type.row_bytes(n_cols))
            if any(kind.is_quantized for kind in stored - {tensor.type}):
                wide = max(wide, n_rows * n_cols)
        self._raw, self._made = np.empty(raw, np.uint8), np.empty(made, np.uint8)
        self._wide = np.empty(wide, np.float32)
        self._importance = importance
        self._quantizer, self._cache = quantizer, cache

    def read(self, tile: Tile) -> NDArray[Any]:
        """The rows of the tile as they are stored, valid until the next call."""
        part = tile.tensor.parts[tile.part]
        n_rows, row_bytes = tile.stop - tile.start, part.type.row_bytes(tile.tensor.n_cols)
        rows = self._raw[: n_rows * row_bytes].view(PLAIN_DTYPES.get(part.type, np.uint8)).reshape(n_rows, -1)
        part.rows.read_rows(tile.start, tile.stop, rows)
        return rows

    def make(self, tile: Tile, rows: NDArray[Any]) -> memoryview:
        """The bytes of the tile, made of what ``read`` gave for it; valid until the next call.

        Raises NonFiniteError, naming the tensor of the file, the one of the source and its row, if a weight is NaN or
        infinite or too large for the type.
        """
        part = tile.tensor.parts[tile.part]
        stored = part.type
        row = _first_damaged(rows, stored)
        if row is not None:
            raise NonFiniteError(f"{_place(tile, part, row)} is NaN or infinite; the source is damaged, fetch it again")
        if stored is tile.tensor.type:
            return rows.data.cast("B")
        made = self._made[: tile.n_bytes].reshape(len(rows), -1)
        if stored.is_quantized:
            rows = self._dequantized(rows, stored, tile.tensor.n_cols)
        importance = self._importance.row(tile)
        quantize_rows(tile.tensor.type, rows, made, importance, self._quantizer, cache=self._cache)
        self._check_made(tile, part, made)
        return made.data.cast("B")

    def _dequantized(self, raw: NDArray[np.uint8], stored: GGMLType, n_cols: int) -> NDArray[np.float32]:
        wide = self._wide[: len(raw) * n_cols].reshape(len(raw), n_cols)
        quantizing.dequantize_rows(stored, raw, wide)
        return wide

    def _check_made(self, tile: Tile, part: Part, made: NDArray[np.uint8]) -> None:
        made_type = tile.tensor.type
        row = _first_damaged(made.view(PLAIN_DTYPES.get(made_type, np.uint8)), made_type)
        if row is not None:
            some = f", or one of the next {len(made) - row - 1}," if made_type.is_quantized else ""
            raise NonFiniteError(
                f"{_place(tile, part, row)}{some} has weights too large for {made_type.name}; give the tensor another "
                "type with --tensor-type"
            )


def _first_damaged(rows: NDArray[Any], type: GGMLType) -> int | None:
    """The first row that holds NaN or infinity, or of a quantized type the first of all if any does; None if none."""
    if type not in _INFINITY:
        return None if quantizing.validate_rows(type, rows.view(np.uint8)) else 0
    infinity, n_bits = _INFINITY[type], rows.itemsize * 8
    unsigned = rows.view(f"u{rows.itemsize}")
    # read as signed numbers the positive ones, read as unsigned the negative ones are in the order of their size
    if int(unsigned.max()) < infinity | 1 << n_bits - 1 and int(rows.view(f"i{rows.itemsize}").max()) < infinity:
        return None
    largest = (unsigned & ((1 << n_bits - 1) - 1)).max(axis=1)
    return int(np.flatnonzero(largest >= infinity)[0])


def _place(tile: Tile, part: Part, row: int) -> str:
    """Where a row of a tile comes from, in words."""
    return f"{tile.tensor.name}: row {part.source_row(tile.start + row)} of {part.name}"
