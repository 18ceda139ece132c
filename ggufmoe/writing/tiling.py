"""Tiles: the writer's units of work, each a few rows of one part of a tensor, and the conversion of a tile's rows.

A tile never crosses from one expert to the next, so it has one row of importances and one source. This module knows
neither files nor threads; memory is one set of buffers for each worker.
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
from ggufmoe.gguf.block_scales import finite_rows
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
"""Bits of infinity: a number whose bits, without the sign, are not less than these is infinite or NaN."""


@dataclass(frozen=True)
class Tile:
    """Rows [start, stop) of one part of a planned tensor; ``number`` counts through the whole plan."""

    number: int
    file: int
    """Index of the file in the plan."""
    tensor: PlannedTensor
    part: int
    """Index of the part in the tensor."""
    start: int
    stop: int

    @property
    def source(self) -> Part:
        """Where the rows come from."""
        return self.tensor.parts[self.part]

    @property
    def n_source_bytes(self) -> int:
        """Bytes that are read for the tile."""
        return (self.stop - self.start) * self.source.type.row_bytes(self.tensor.n_cols)

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
    """Every tile of a plan, in the order of the files; equal plans give equal tiles, numbers included."""
    number = 0
    for file, planned in enumerate(plan.files):
        for tensor in planned.tensors:
            step = tile_rows(tensor)
            for index, part in enumerate(tensor.parts):
                for start in range(0, part.n_rows, step):
                    yield Tile(number, file, tensor, index, start, min(start + step, part.n_rows))
                    number += 1


def tile_rows(tensor: PlannedTensor) -> int:
    """Rows of every tile of this tensor but the last one of each part."""
    return max(1, TILE_WEIGHTS // tensor.n_cols)


class ImportanceCache:
    """Importances of the tensors that are being written, each read once, for all workers; safe for several threads."""

    def __init__(self, imatrix: Imatrix | None, capacity: int) -> None:
        self._imatrix = imatrix
        self._capacity = capacity
        self._lock = threading.Lock()
        self._weights: OrderedDict[str, NDArray[np.float32]] = OrderedDict()

    def row(self, tile: Tile) -> NDArray[np.float32] | None:
        """The importance of each column for this tile, (n_cols,) float32; None if its tensor has no importances."""
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
    """Converts the rows of one tile after another, in buffers of its own: each worker has one.

    ``cache`` says whether compiled kernels are read from disk and kept there.
    """

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
        """The rows of the tile as the source stores them: (rows, n_cols) of plain numbers, else (rows, bytes) uint8.

        They are valid until the next call.
        """
        dtype = PLAIN_DTYPES.get(tile.source.type, np.uint8)
        rows = self._raw[: tile.n_source_bytes].view(dtype).reshape(tile.stop - tile.start, -1)
        tile.source.rows.read_rows(tile.start, tile.stop, rows)
        return rows

    def make(self, tile: Tile, rows: NDArray[Any]) -> memoryview:
        """The bytes of the tile in the type of its tensor, made from the rows that ``read`` returned for it.

        They are valid until the next call. Raises NonFiniteError if a weight is NaN, infinite or too large for the
        type; the message names the tensor of the file, the tensor of the source and the row.
        """
        stored = tile.source.type
        row = _first_damaged(rows, stored)
        if row is not None:
            raise NonFiniteError(f"{_name_of(tile, row)} is NaN or infinite; the source is damaged, fetch it again")
        if stored is tile.tensor.type:
            return rows.data.cast("B")
        made = self._made[: tile.n_bytes].reshape(len(rows), -1)
        if stored.is_quantized:
            wide = self._wide[: len(rows) * tile.tensor.n_cols].reshape(len(rows), -1)
            quantizing.dequantize_rows(stored, rows, wide)
            rows = wide
        importance = self._importance.row(tile)
        try:
            quantize_rows(tile.tensor.type, rows, made, importance, self._quantizer, cache=self._cache)
        except NonFiniteError as error:
            raise NonFiniteError(f"{_name_of(tile, 0)} and those after it: {error}") from error
        self._check_made(tile, made)
        return made.data.cast("B")

    def _check_made(self, tile: Tile, made: NDArray[np.uint8]) -> None:
        made_type = tile.tensor.type
        row = _first_damaged(made.view(PLAIN_DTYPES.get(made_type, np.uint8)), made_type)
        if row is not None:
            raise NonFiniteError(
                f"{_name_of(tile, row)} has weights too large for {made_type.name}; give the tensor another type with "
                "--tensor-type"
            )


def _first_damaged(rows: NDArray[Any], type: GGMLType) -> int | None:
    """The first row that holds NaN or infinity, None if there is none."""
    if type not in _INFINITY:
        finite = finite_rows(type, rows.view(np.uint8))
        return None if finite.all() else int(np.argmin(finite))
    infinity, n_bits = _INFINITY[type], rows.itemsize * 8
    unsigned = rows.view(f"u{rows.itemsize}")
    # as signed integers the positive floats are in order, as unsigned integers the negative ones
    if int(unsigned.max()) < infinity | 1 << n_bits - 1 and int(rows.view(f"i{rows.itemsize}").max()) < infinity:
        return None
    largest = (unsigned & ((1 << n_bits - 1) - 1)).max(axis=1)
    return int(np.flatnonzero(largest >= infinity)[0])


def _name_of(tile: Tile, row: int) -> str:
    """What messages call a row of a tile: tensor of the file, row and tensor of the source."""
    return f"{tile.tensor.name}: row {tile.source.source_row(tile.start + row)} of {tile.source.name}"
