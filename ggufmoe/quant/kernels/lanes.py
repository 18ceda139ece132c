"""A small staged language for quantization kernels: every value is a vector, and each lane works on a block of its own.

ggml's quantizers are scalar loops whose float sums must stay in order, so one block cannot be vectorized without
changing its bytes. Sixteen blocks side by side can: each lane does the operations of the scalar code, in its order.
Python loops unroll, ``loop`` is a loop of the machine. Nothing here is contracted, reassociated or rounded otherwise
than written. Owns values, loops, scratch rows, the transposing loads and stores; ``machine`` makes native code of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import Any

import numpy as np
from llvmlite import ir

_F32, _I1, _I8, _I16, _I32, _I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_POINTER = ir.PointerType()
_ROUNDING_MAGIC = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer, ties to even, in the low mantissa bits
Number = int | float | np.float32


class Source(Enum):
    """How the weights come: element size in bytes and numpy's name for the bits."""

    F32 = (4, "float32")
    F16 = (2, "float16")
    BF16 = (2, "uint16")

    def __init__(self, item_bytes: int, dtype: str) -> None:
        self.item_bytes = item_bytes
        self.dtype = dtype


class Value:
    """One float, integer or truth value per lane."""

    __slots__ = ("ir", "k")

    def __init__(self, k: Lanes, value: Any) -> None:
        self.k, self.ir = k, value

    @property
    def is_float(self) -> bool:
        """Whether the lanes hold floats (otherwise integers or truth values)."""
        return isinstance(self.ir.type.element, ir.FloatType)

    def _binary(self, other: Value | Number, if_float: str, if_int: str, swap: bool = False) -> Value:
        right = self.k.like(self, other).ir
        left = self.ir
        if swap:
            left, right = right, left
        return Value(self.k, getattr(self.k.b, if_float if self.is_float else if_int)(left, right))

    def _compare(self, operator: str, other: Value | Number) -> Value:
        b, right = self.k.b, self.k.like(self, other).ir
        if not self.is_float:
            return Value(self.k, b.icmp_signed(operator, self.ir, right))
        compare = b.fcmp_unordered if operator == "!=" else b.fcmp_ordered
        return Value(self.k, compare(operator, self.ir, right))

    def __add__(self, other: Value | Number) -> Value:
        return self._binary(other, "fadd", "add")

    def __sub__(self, other: Value | Number) -> Value:
        return self._binary(other, "fsub", "sub")

    def __rsub__(self, other: Number) -> Value:
        return self._binary(other, "fsub", "sub", swap=True)

    def __mul__(self, other: Value | Number) -> Value:
        return self._binary(other, "fmul", "mul")

    def __truediv__(self, other: Value | Number) -> Value:
        return self._binary(other, "fdiv", "sdiv")

    def __rtruediv__(self, other: Number) -> Value:
        return self._binary(other, "fdiv", "sdiv", swap=True)

    def __neg__(self) -> Value:
        return Value(self.k, self.k.b.fneg(self.ir))

    def __and__(self, other: Value | int) -> Value:
        return self._binary(other, "", "and_")

    def __or__(self, other: Value | int) -> Value:
        return self._binary(other, "", "or_")

    def __lshift__(self, bits: int) -> Value:
        return self._binary(bits, "", "shl")

    def __rshift__(self, bits: int) -> Value:
        """Shift in zeros."""
        return self._binary(bits, "", "lshr")

    def shifted_left(self, bits: Index) -> Value:
        """Shift by a count that is known only while running."""
        count = self.k.b.trunc(bits.ir, _I32)
        return Value(self.k, self.k.b.shl(self.ir, self.k.splat(count).ir))

    def sign_extended(self, bits: int) -> Value:
        """The low ``bits`` as a signed integer."""
        shift = self.k.i32(32 - bits).ir
        return Value(self.k, self.k.b.ashr(self.k.b.shl(self.ir, shift), shift))

    def __invert__(self) -> Value:
        return Value(self.k, self.k.b.not_(self.ir))

    def __lt__(self, other: Value | Number) -> Value:
        return self._compare("<", other)

    def __gt__(self, other: Value | Number) -> Value:
        return self._compare(">", other)

    def differs(self, other: Value | Number) -> Value:
        """C's ``!=``: true for NaN."""
        return self._compare("!=", other)

    def equals(self, other: Value | Number) -> Value:
        """C's ``==``: false for NaN."""
        return self._compare("==", other)

    def bits(self) -> Value:
        """The bits of floats, as integers."""
        return Value(self.k, self.k.b.bitcast(self.ir, self.k.ints))

    def as_float_bits(self) -> Value:
        """Integers read as the bits of floats."""
        return Value(self.k, self.k.b.bitcast(self.ir, self.k.floats))

    def to_float(self) -> Value:
        """Signed integers as floats."""
        return Value(self.k, self.k.b.sitofp(self.ir, self.k.floats))

    def to_int(self) -> Value:
        """Floats that are small integers already, as integers."""
        return Value(self.k, self.k.b.fptosi(self.ir, self.k.ints))


@dataclass(frozen=True)
class Index:
    """A scalar counter of a machine loop."""

    k: Lanes
    ir: Any

    def __mul__(self, factor: int) -> Index:
        return Index(self.k, self.k.b.mul(self.ir, ir.Constant(_I64, factor)))

    def __add__(self, offset: int | Index) -> Index:
        other = ir.Constant(_I64, offset) if isinstance(offset, int) else offset.ir
        return Index(self.k, self.k.b.add(self.ir, other))


@dataclass(frozen=True)
class Rows:
    """A column of vectors in scratch memory: one row per weight (or scale, or word), one lane per block."""

    k: Lanes
    base: Any
    type: Any

    def at(self, offset: int | Index) -> Rows:
        """The rows from ``offset`` on."""
        return Rows(self.k, self._address(offset), self.type)

    def __getitem__(self, i: int | Index) -> Value:
        return Value(self.k, self.k.b.load(self._address(i), typ=self.type, align=4 * self.k.width))

    def __setitem__(self, i: int | Index, value: Value) -> None:
        self.k.b.store(value.ir, self._address(i), align=4 * self.k.width)

    def first(self, count: int) -> list[Value]:
        """The first ``count`` rows."""
        return [self[i] for i in range(count)]

    def _address(self, i: int | Index) -> Any:
        position = ir.Constant(_I64, i) if isinstance(i, int) else i.ir
        return self.k.b.gep(self.base, [position], inbounds=True, source_etype=self.type)


class Variable:
    """A value that machine loops may change."""

    def __init__(self, k: Lanes, start: Value) -> None:
        self.k, self.type = k, start.ir.type
        with k.b.goto_entry_block():
            self.slot = k.b.alloca(self.type)
        self.set(start)

    def get(self) -> Value:
        """What it holds now."""
        return Value(self.k, self.k.b.load(self.slot, typ=self.type))

    def set(self, value: Value) -> None:
        """Make it hold ``value``."""
        self.k.b.store(value.ir, self.slot)


@dataclass(frozen=True)
class Geometry:
    """What a kernel reads and writes: weights and bytes of one block, the source's kind, whether importances come."""

    block_size: int
    block_bytes: int
    source: Source
    weighted: bool


class Lanes:
    """One kernel while it is being written.

    The native function is ``int64 quantize(src, dst, n_blocks, blocks_per_row, importance, row_energy, odd, scratch)``:
    ``odd`` gets a 1 for each block that the kernel leaves to ggml, and the result is not 0 if there is one.
    ``row_energy`` holds one float per row, for formats that ask for it.
    """

    def __init__(self, geometry: Geometry, width: int, permutes: bool) -> None:
        self.geometry, self.width, self.permutes = geometry, width, permutes
        self.floats, self.ints, self.truths = (ir.VectorType(t, width) for t in (_F32, _I32, _I1))
        self.module = ir.Module("kernel")
        signature = ir.FunctionType(_I64, [_POINTER, _POINTER, _I64, _I64, _POINTER, _POINTER, _POINTER, _POINTER])
        self.function = ir.Function(self.module, signature, "quantize")
        # what does not fit in registers goes to the stack; unaligned, every access would touch two cache lines
        self.function.attributes.add("nounwind")
        self.function.attributes.alignstack = 4 * width
        for argument in self.function.args:
            if argument.type == _POINTER:
                argument.add_attribute("noalias")
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.scratch_bytes = 0
        self._blocks: list[Any] = []
        self._columns: list[Any] = []
        self._rows: list[Any] = []
        self._odd: Variable | None = None
        self._tables = 0

    # values

    def like(self, pattern: Value, other: Value | Number) -> Value:
        """``other`` as it stands, or a constant of ``pattern``'s type in every lane."""
        if isinstance(other, Value):
            return other
        if pattern.is_float:
            return self.f32(other)
        return Value(self, ir.Constant(pattern.ir.type, [int(other)] * self.width))

    def f32(self, number: Number) -> Value:
        """A float constant, rounded to float32, in every lane."""
        return Value(self, ir.Constant(self.floats, [float(np.float32(number))] * self.width))

    def i32(self, number: int) -> Value:
        """An integer constant in every lane."""
        return Value(self, ir.Constant(self.ints, [number] * self.width))

    def false(self) -> Value:
        """No lane."""
        return Value(self, ir.Constant(self.truths, [0] * self.width))

    def where(self, condition: Value, then: Value | Number, otherwise: Value | Number) -> Value:
        """C's ``condition ? then : otherwise``, lane by lane; at least one of the two is a Value."""
        pattern = then if isinstance(then, Value) else otherwise
        assert isinstance(pattern, Value)
        return Value(self, self.b.select(condition.ir, self.like(pattern, then).ir, self.like(pattern, otherwise).ir))

    def smaller(self, a: Value, b: Value | Number) -> Value:
        """C's ``a < b ? a : b``."""
        return self.where(a < b, a, b)

    def larger(self, a: Value, b: Value | Number) -> Value:
        """C's ``a > b ? a : b``."""
        return self.where(a > b, a, b)

    def clamp(self, value: Value, low: Number, high: Number) -> Value:
        """``MAX(low, MIN(high, value))``."""
        return self.larger(self.smaller(value, high), low)

    def limited(self, value: Value, high: float) -> Value:
        """``clamp(value, 0, high)`` of floats, compared as integers: other ports than the multipliers'. No NaN."""
        below = self._integers("smin", value.bits(), self.f32(high).bits())
        return self._integers("smax", below, self.i32(0)).as_float_bits()

    def _integers(self, name: str, a: Value, b: Value) -> Value:
        function = self._declared(f"llvm.{name}.v{self.width}i32", [self.ints, self.ints])
        return Value(self, self.b.call(function, [a.ir, b.ir]))

    def _unary(self, name: str, value: Value) -> Value:
        function = self._declared(f"llvm.{name}.v{self.width}f32", [self.floats])
        return Value(self, self.b.call(function, [value.ir]))

    def _declared(self, name: str, arguments: list[Any]) -> Any:
        known = self.module.globals.get(name)
        return known or ir.Function(self.module, ir.FunctionType(arguments[0], arguments), name)

    def magnitude(self, value: Value) -> Value:
        """``fabsf``."""
        return self._unary("fabs", value)

    def square_root(self, value: Value) -> Value:
        """``sqrtf``, correctly rounded."""
        return self._unary("sqrt", value)

    def round_even(self, value: Value) -> Value:
        """The nearest integer as a float, ties to even: ``nearest_int`` where |value| < 2^22."""
        return self._unary("roundeven", value)

    def round_away(self, value: Value) -> Value:
        """``roundf``: the nearest integer as a float, ties away from zero."""
        return self._unary("round", value)

    def nearest_int(self, value: Value) -> Value:
        """ggml's ``nearest_int``, with what its trick gives out of range and for NaN."""
        return ((value + _ROUNDING_MAGIC).bits() & 0x7FFFFF) - 0x400000

    def half_bits(self, value: Value) -> Value:
        """The 16 bits of the nearest float16, ties to even, by the operations of ``GGML_FP32_TO_FP16``."""
        base = (self.magnitude(value) * 2.0**112) * 2.0**-110
        doubled = value.bits() << 1
        bias = doubled & -0x1000000
        # the exponents compared are below 2^31 once shifted right, so a signed comparison serves
        bias = self.where((bias >> 1) < (0x71000000 >> 1), self.i32(0x71000000), bias)
        bits = (((bias >> 1) + 0x07800000).as_float_bits() + base).bits()
        nonsign = ((bits >> 13) & 0x7C00) + (bits & 0xFFF)
        is_nan = (doubled >> 1) > (0xFF000000 >> 1)
        return ((value.bits() >> 16) & 0x8000) | self.where(is_nan, self.i32(0x7E00), nonsign)

    def from_half_bits(self, half: Value) -> Value:
        """float16 bits, widened exactly."""
        bits = (half & 0x7FFF) << 13
        finite = (bits.as_float_bits() * 2.0**112).bits()
        widened = self.where((half & 0x7C00).equals(0x7C00), bits | 0x7F800000, finite)
        return (widened | ((half & 0x8000) << 16)).as_float_bits()

    def index(self, number: int) -> Index:
        """A counter that stands still."""
        return Index(self, ir.Constant(_I64, number))

    def variable(self, start: Value) -> Variable:
        """A value that machine loops may change."""
        return Variable(self, start)

    def any(self, condition: Value) -> Any:
        """A scalar truth for ``when``: some lane is true."""
        mask = self.b.bitcast(condition.ir, ir.IntType(self.width))
        return self.b.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0))

    def mark_odd(self, condition: Value) -> None:
        """Leave the blocks of these lanes to ggml."""
        assert self._odd is not None
        self._odd.set(self._odd.get() | condition)

    def permute(self, table: Sequence[float], index: Value) -> Value:
        """``table[index & 31]`` of 32 floats; only where ``permutes`` says that the machine has the instruction."""
        low, high = (
            ir.Constant(self.floats, [float(np.float32(x)) for x in half]) for half in (table[:16], table[16:])
        )
        function = self._declared("llvm.x86.avx512.vpermi2var.ps.512", [self.floats, self.ints, self.floats])
        return Value(self, self.b.call(function, [low, index.ir, high]))

    # control

    @contextmanager
    def loop(self, count: int) -> Iterator[Index]:
        """A machine loop: the body is written once and runs ``count`` times, ``count`` >= 1."""
        with self._loop(ir.Constant(_I64, count), 1) as index:
            yield Index(self, index)

    @contextmanager
    def _loop(self, end: Any, step: int) -> Iterator[Any]:
        before = self.b.block
        body, after = self.function.append_basic_block("body"), self.function.append_basic_block("after")
        self.b.branch(body)
        self.b.position_at_end(body)
        counter = self.b.phi(_I64)
        counter.add_incoming(ir.Constant(_I64, 0), before)
        yield counter
        following = self.b.add(counter, ir.Constant(_I64, step))
        counter.add_incoming(following, self.b.block)
        self.b.cbranch(self.b.icmp_signed("<", following, end), body, after)
        self.b.position_at_end(after)

    @contextmanager
    def when(self, truth: Any) -> Iterator[None]:
        """Run the body only if a scalar truth holds."""
        with self.b.if_then(truth, likely=False):
            yield

    # memory

    def float_rows(self, count: int) -> Rows:
        """Scratch for ``count`` float vectors."""
        return self._scratch(count, self.floats)

    def int_rows(self, count: int) -> Rows:
        """Scratch for ``count`` integer vectors."""
        return self._scratch(count, self.ints)

    def _scratch(self, count: int, kind: Any) -> Rows:
        offset = ir.Constant(_I64, self.scratch_bytes)
        self.scratch_bytes += 4 * self.width * count
        return Rows(self, self.b.gep(self.function.args[7], [offset], inbounds=True, source_etype=_I8), kind)

    def constants(self, numbers: Sequence[Number]) -> Constants:
        """A table of floats that machine loops read one by one, the same in every lane."""
        self._tables += 1
        kind = ir.ArrayType(_F32, len(numbers))
        table = ir.GlobalVariable(self.module, kind, f"table{self._tables}")
        table.initializer = ir.Constant(kind, [float(np.float32(number)) for number in numbers])
        table.global_constant, table.linkage = True, "internal"
        return Constants(self, table)

    def splat(self, scalar: Any) -> Value:
        """One scalar in every lane."""
        kind = ir.VectorType(scalar.type, self.width)
        vector = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(_I32, 0))
        return Value(self, self.b.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(_I32, self.width), None)))

    @contextmanager
    def tiles(self) -> Iterator[tuple[Rows, Rows | None]]:
        """The outermost loop: each turn has ``width`` blocks, weights (and importances) transposed into rows."""
        size = self.geometry.block_size
        weights = self.float_rows(size)
        importances = self.float_rows(size) if self.geometry.weighted else None
        odd_total = self.b.alloca(_I64)
        self.b.store(ir.Constant(_I64, 0), odd_total)
        self._odd = Variable(self, self.false())
        with self._loop(self.function.args[2], self.width) as first:
            self._odd.set(self.false())
            self._place_lanes(first)
            self._load(weights, self.function.args[0], self._blocks, self.geometry.source)
            if importances is not None:
                self._load(importances, self.function.args[4], self._columns, Source.F32)
            yield weights, importances
            with self.when(self.any(self._odd.get())):
                self._store_odd(odd_total)
        self.b.ret(self.b.load(odd_total, typ=_I64))

    def _place_lanes(self, first: Any) -> None:
        b, n_blocks, per_row = self.b, self.function.args[2], self.function.args[3]
        block, row = first, b.udiv(first, per_row)
        column = b.sub(first, b.mul(row, per_row))
        self._blocks, self._rows, self._columns = [block], [row], [column]
        for lane in range(1, self.width):
            following = b.add(first, ir.Constant(_I64, lane))
            # lanes beyond the end repeat the last block: they write the same bytes to the same place
            exists = b.icmp_signed("<", following, n_blocks)
            block = b.select(exists, following, block)
            next_column = b.add(column, ir.Constant(_I64, 1))
            wraps = b.icmp_signed("==", next_column, per_row)
            next_column = b.select(wraps, ir.Constant(_I64, 0), next_column)
            row = b.select(b.and_(exists, wraps), b.add(row, ir.Constant(_I64, 1)), row)
            column = b.select(exists, next_column, column)
            self._blocks.append(block)
            self._rows.append(row)
            self._columns.append(column)

    def row_energies(self) -> Value:
        """The ``row_energy`` argument of each lane's row."""
        vector = ir.Constant(self.floats, ir.Undefined)
        for lane, row in enumerate(self._rows):
            address = self.b.gep(self.function.args[5], [row], source_etype=_F32)
            vector = self.b.insert_element(vector, self.b.load(address, typ=_F32), ir.Constant(_I32, lane))
        return Value(self, vector)

    def _load(self, rows: Rows, base: Any, blocks: list[Any], source: Source) -> None:
        size, item = self.geometry.block_size, source.item_bytes
        starts = [
            self.b.gep(base, [self.b.mul(block, ir.Constant(_I64, size * item))], source_etype=_I8) for block in blocks
        ]
        with self.loop(size // self.width) as chunk:
            offset = (chunk * (self.width * item)).ir
            vectors = [self._widened(self.b.gep(start, [offset], source_etype=_I8), source) for start in starts]
            for i, vector in enumerate(self._transposed(vectors)):
                rows[chunk * self.width + i] = Value(self, vector)

    def write_row_energies(self) -> None:
        """A whole kernel instead of ``tiles``: each lane has a row and writes its mean square to ``dst``.

        The squares are added in order, as ggml does it before it looks at a row's blocks.
        """
        b, (src, dst, n_rows, per_row) = self.b, self.function.args[:4]
        item = self.geometry.source.item_bytes
        block_bytes = ir.Constant(_I64, self.geometry.block_size * item)
        with self._loop(n_rows, self.width) as first:
            self._place_lanes(first)
            row_bytes = b.mul(per_row, block_bytes)
            starts = [b.gep(src, [b.mul(row, row_bytes)], source_etype=_I8) for row in self._blocks]
            total = self.variable(self.f32(0.0))
            with self._loop(per_row, 1) as block:
                for part in range(0, self.geometry.block_size, self.width):
                    offset = b.add(b.mul(block, block_bytes), ir.Constant(_I64, part * item))
                    vectors = [
                        self._widened(b.gep(start, [offset], source_etype=_I8), self.geometry.source)
                        for start in starts
                    ]
                    for vector in self._transposed(vectors):
                        total.set(total.get() + Value(self, vector) * Value(self, vector))
            n_weights = b.sitofp(b.mul(per_row, ir.Constant(_I64, self.geometry.block_size)), _F32)
            means = total.get() / self.splat(n_weights)
            for lane, row in enumerate(self._blocks):
                b.store(b.extract_element(means.ir, ir.Constant(_I32, lane)), b.gep(dst, [row], source_etype=_F32))
        b.ret(ir.Constant(_I64, 0))

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
            order = ir.Constant(ir.VectorType(_I32, len(vectors)), list(range(len(vectors))))
            padding = [undefined] * (self.width - len(vectors))
            for lane, vector in enumerate(self._transposed(vectors + padding)):
                part = self.b.shuffle_vector(vector, vector, order) if padding else vector
                self.b.store(part, self._output(lane, byte_offset + 4 * first), align=1)

    def store_half(self, byte_offset: int, bits: Value) -> None:
        """Write the low 16 bits of each lane at ``byte_offset`` of its block."""
        narrow = self.b.trunc(bits.ir, ir.VectorType(_I16, self.width))
        for lane in range(self.width):
            self.b.store(
                self.b.extract_element(narrow, ir.Constant(_I32, lane)), self._output(lane, byte_offset), align=1
            )

    def _output(self, lane: int, byte_offset: int) -> Any:
        start = self.b.mul(self._blocks[lane], ir.Constant(_I64, self.geometry.block_bytes))
        position = self.b.add(start, ir.Constant(_I64, byte_offset))
        return self.b.gep(self.function.args[1], [position], source_etype=_I8)

    def _store_odd(self, total: Any) -> None:
        assert self._odd is not None
        self.b.store(ir.Constant(_I64, 1), total)
        flags = self.b.zext(self._odd.get().ir, ir.VectorType(_I8, self.width))
        for lane, block in enumerate(self._blocks):
            address = self.b.gep(self.function.args[6], [block], source_etype=_I8)
            self.b.store(self.b.extract_element(flags, ir.Constant(_I32, lane)), address)


@dataclass(frozen=True)
class Constants:
    """A table of floats; ``table[i]`` is its entry i in every lane."""

    k: Lanes
    address: Any

    def __getitem__(self, i: Index) -> Value:
        pointer = self.k.b.gep(self.address, [i.ir], inbounds=True, source_etype=_F32)
        return self.k.splat(self.k.b.load(pointer, typ=_F32))
