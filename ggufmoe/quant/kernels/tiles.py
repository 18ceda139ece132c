"""Loads and stores the blocks of a kernel: a tile has one block per lane and is transposed while loading and storing.

Defines the kinds of source, the signature of the native function and the addresses of each lane's block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

from llvmlite import ir

from ggufmoe.quant.kernels.lanes import F32, I8, I32, I64, POINTER, Lanes, Rows, Value

_I16 = ir.IntType(16)
_ARGUMENTS = (POINTER, POINTER, I64, I64, POINTER, POINTER, POINTER, POINTER)


class Source(Enum):
    """The dtype of source weights: element size in bytes, and the numpy name of the dtype that holds the bits."""

    F32 = (4, "float32")
    F16 = (2, "float16")
    BF16 = (2, "uint16")

    def __init__(self, item_bytes: int, dtype: str) -> None:
        self.item_bytes = item_bytes
        self.dtype = dtype


@dataclass(frozen=True)
class Geometry:
    """The input and output of a kernel: weights and bytes of a block, source dtype, whether with importances.

    ``unbounded``: whether it computes blocks of any magnitude (see ``Lanes``).
    """

    block_size: int
    block_bytes: int
    source: Source
    weighted: bool
    unbounded: bool = False


class Tiles(Lanes):
    """A kernel over all blocks.

    The native function is ``int64 quantize(src, dst, n_blocks, blocks_per_row, importance, row_energy, odd, scratch)``:
    ``odd`` gets a 1 for each block that the kernel does not make, and the result is not 0 if there is one.
    ``row_energy`` holds one float per row, for formats that ask for it.
    """

    def __init__(self, geometry: Geometry, width: int, permutes: bool, looks_up: bool) -> None:
        super().__init__(width, permutes, looks_up, _ARGUMENTS, unbounded=geometry.unbounded)
        self.geometry = geometry
        self._blocks: list[Any] = []
        self._columns: list[Any] = []
        self._rows: list[Any] = []

    @contextmanager
    def tiles(self) -> Iterator[tuple[Rows, Rows | None]]:
        """The outermost loop: yields the weights (and importances) of ``width`` blocks, transposed into rows."""
        size = self.geometry.block_size
        weights = self.float_rows(size)
        importances = self.float_rows(size) if self.geometry.weighted else None
        odd_total = self.b.alloca(I64)
        self.b.store(ir.Constant(I64, 0), odd_total)
        with self.repeat(self.function.args[2], self.width) as first:
            self.odd.set(self.false())
            self._place_lanes(first)
            self._load(weights, self.function.args[0], self._blocks, self.geometry.source)
            if importances is not None:
                self._load(importances, self.function.args[4], self._columns, Source.F32)
            yield weights, importances
            with self.when(self.any(self.odd.get())):
                self._store_odd(odd_total)
        self.b.ret(self.b.load(odd_total, typ=I64))

    def _place_lanes(self, first: Any) -> None:
        b, n_blocks, per_row = self.b, self.function.args[2], self.function.args[3]
        block, row = first, b.udiv(first, per_row)
        column = b.sub(first, b.mul(row, per_row))
        self._blocks, self._rows, self._columns = [block], [row], [column]
        for lane in range(1, self.width):
            following = b.add(first, ir.Constant(I64, lane))
            # lanes beyond the end repeat the last block: they write the same bytes to the same place
            exists = b.icmp_signed("<", following, n_blocks)
            block = b.select(exists, following, block)
            next_column = b.add(column, ir.Constant(I64, 1))
            wraps = b.icmp_signed("==", next_column, per_row)
            next_column = b.select(wraps, ir.Constant(I64, 0), next_column)
            row = b.select(b.and_(exists, wraps), b.add(row, ir.Constant(I64, 1)), row)
            column = b.select(exists, next_column, column)
            self._blocks.append(block)
            self._rows.append(row)
            self._columns.append(column)

    def row_energies(self) -> Value:
        """The ``row_energy`` argument of each lane's row."""
        vector = ir.Constant(self.floats, ir.Undefined)
        for lane, row in enumerate(self._rows):
            address = self.b.gep(self.function.args[5], [row], source_etype=F32)
            vector = self.b.insert_element(vector, self.b.load(address, typ=F32), ir.Constant(I32, lane))
        return Value(self, vector)

    def _load(self, rows: Rows, base: Any, blocks: list[Any], source: Source) -> None:
        size, item = self.geometry.block_size, source.item_bytes
        starts = [
            self.b.gep(base, [self.b.mul(block, ir.Constant(I64, size * item))], source_etype=I8) for block in blocks
        ]
        with self.loop(size // self.width) as chunk:
            offset = (chunk * (self.width * item)).ir
            vectors = [self._widened(self.b.gep(start, [offset], source_etype=I8), source) for start in starts]
            for i, vector in enumerate(self._transposed(vectors)):
                rows[chunk * self.width + i] = Value(self, vector)

    def write_row_energies(self) -> None:
        """A kernel of its own, without ``tiles``: each lane computes the mean square of a row and writes it to ``dst``.

        The squares are added in order, as ggml does before it quantizes the blocks of a row.
        """
        b, (src, dst, n_rows, per_row) = self.b, self.function.args[:4]
        item = self.geometry.source.item_bytes
        block_bytes = ir.Constant(I64, self.geometry.block_size * item)
        with self.repeat(n_rows, self.width) as first:
            self._place_lanes(first)
            row_bytes = b.mul(per_row, block_bytes)
            starts = [b.gep(src, [b.mul(row, row_bytes)], source_etype=I8) for row in self._blocks]
            total = self.variable(self.f32(0.0))
            with self.repeat(per_row, 1) as block:
                for part in range(0, self.geometry.block_size, self.width):
                    offset = b.add(b.mul(block, block_bytes), ir.Constant(I64, part * item))
                    vectors = [
                        self._widened(b.gep(start, [offset], source_etype=I8), self.geometry.source) for start in starts
                    ]
                    for vector in self._transposed(vectors):
                        total.set(total.get() + Value(self, vector) * Value(self, vector))
            n_weights = b.sitofp(b.mul(per_row, ir.Constant(I64, self.geometry.block_size)), F32)
            means = total.get() / self.splat(n_weights)
            for lane, row in enumerate(self._blocks):
                b.store(b.extract_element(means.ir, ir.Constant(I32, lane)), b.gep(dst, [row], source_etype=F32))
        b.ret(ir.Constant(I64, 0))

    def convert_floats(self, result: Source) -> None:
        """A kernel of its own, without ``tiles``: converts ``n_blocks`` numbers from ``src`` to ``dst``.

        ``n_blocks`` is a multiple of the geometry's ``block_size``. The results are those of ``gguf.floats``.
        """
        b, (src, dst, count) = self.b, self.function.args[:3]
        source = self.geometry.source
        with self.repeat(count, self.geometry.block_size) as first:
            for part in range(0, self.geometry.block_size, self.width):
                place = b.add(first, ir.Constant(I64, part))
                load, store = (
                    b.gep(base, [b.mul(place, ir.Constant(I64, kind.item_bytes))], source_etype=I8)
                    for base, kind in ((src, source), (dst, result))
                )
                value = Value(self, self._widened(load, source))
                if source is Source.F16:
                    value = self.made_quiet(value)
                if result is Source.F32:
                    b.store(value.ir, store, align=1)
                    continue
                bits = self.rounded_half_bits(value) if result is Source.F16 else self.bfloat_bits(value)
                b.store(b.trunc(bits.ir, ir.VectorType(_I16, self.width)), store, align=1)
        b.ret(ir.Constant(I64, 0))

    def _widened(self, address: Any, source: Source) -> Any:
        if source is Source.F32:
            return self.b.load(address, typ=self.floats, align=1)
        narrow = self.b.load(address, typ=ir.VectorType(_I16, self.width), align=1)
        wide = Value(self, self.b.zext(narrow, self.ints))
        return ((wide << 16).as_float_bits() if source is Source.BF16 else self.from_half_bits(wide)).ir

    def _transposed(self, vectors: list[Any]) -> list[Any]:
        width = self.width
        orders = [
            ir.Constant(self.ints, [half + i // 2 + (width if i % 2 else 0) for i in range(width)])
            for half in (0, width // 2)
        ]
        for _ in range(width.bit_length() - 1):
            vectors = [
                self.b.shuffle_vector(vectors[i // 2], vectors[i // 2 + width // 2], orders[i % 2])
                for i in range(width)
            ]
        return vectors

    def store_words(self, byte_offset: int, words: Sequence[Value]) -> None:
        """Write the 32-bit words of each lane, one after another, at ``byte_offset`` of its block."""
        undefined = ir.Constant(self.ints, ir.Undefined)
        for first in range(0, len(words), self.width):
            vectors = [word.ir for word in words[first : first + self.width]]
            order = ir.Constant(ir.VectorType(I32, len(vectors)), list(range(len(vectors))))
            padding = [undefined] * (self.width - len(vectors))
            for lane, vector in enumerate(self._transposed(vectors + padding)):
                part = self.b.shuffle_vector(vector, vector, order) if padding else vector
                self.b.store(part, self._output(lane, byte_offset + 4 * first), align=1)

    def store_half(self, byte_offset: int, bits: Value) -> None:
        """Write the low 16 bits of each lane at ``byte_offset`` of its block."""
        narrow = self.b.trunc(bits.ir, ir.VectorType(_I16, self.width))
        for lane in range(self.width):
            self.b.store(
                self.b.extract_element(narrow, ir.Constant(I32, lane)), self._output(lane, byte_offset), align=1
            )

    def _output(self, lane: int, byte_offset: int) -> Any:
        start = self.b.mul(self._blocks[lane], ir.Constant(I64, self.geometry.block_bytes))
        position = self.b.add(start, ir.Constant(I64, byte_offset))
        return self.b.gep(self.function.args[1], [position], source_etype=I8)

    def _store_odd(self, total: Any) -> None:
        self.b.store(ir.Constant(I64, 1), total)
        flags = self.b.zext(self.odd.get().ir, ir.VectorType(I8, self.width))
        for lane, block in enumerate(self._blocks):
            address = self.b.gep(self.function.args[6], [block], source_etype=I8)
            self.b.store(self.b.extract_element(flags, ir.Constant(I32, lane)), address)
