"""A small staged language for quantization kernels: every value is a vector, and each lane processes its own block.

ggml's quantizers are scalar loops whose float sums must stay in order, so one block cannot be vectorized without
changing its bytes. Sixteen blocks side by side can: each lane does the operations of the scalar code, in its order.
Python loops unroll, ``loop`` generates a loop. Operations are not contracted, reassociated or rounded differently.
Defines values, loops and scratch rows; ``tiles`` loads and stores blocks, ``machine`` makes native code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

F32, _I1, I8, I32, I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (1, 8, 32, 64))
POINTER = ir.PointerType()
_ROUNDING_MAGIC = 12582912.0  # 1.5 * 2^23: adding it leaves the nearest integer, ties to even, in the low mantissa bits
Number = int | float | np.float32


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

    def __xor__(self, other: Value | int) -> Value:
        return self._binary(other, "", "xor")

    def __lshift__(self, bits: int) -> Value:
        return self._binary(bits, "", "shl")

    def __rshift__(self, bits: int) -> Value:
        """Shift in zeros."""
        return self._binary(bits, "", "lshr")

    def shifted_left(self, bits: Index) -> Value:
        """Shift left by a count that the generated code computes."""
        count = self.k.b.trunc(bits.ir, I32)
        return Value(self.k, self.k.b.shl(self.ir, self.k.splat(count).ir))

    def sign_extended(self, bits: int) -> Value:
        """The low ``bits`` bits as a signed integer."""
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
        """Integers reinterpreted as the bits of floats."""
        return Value(self.k, self.k.b.bitcast(self.ir, self.k.floats))

    def to_float(self) -> Value:
        """Signed integers as floats."""
        return Value(self.k, self.k.b.sitofp(self.ir, self.k.floats))

    def to_int(self) -> Value:
        """Floats below 2^31, without their fraction, as integers.

        In unbounded kernels larger ones and NaN become 0, the low byte of what a C compiler's cast gives on x86-64.
        """
        k, value = self.k, self
        if k.unbounded:
            value = k.where(k.magnitude(self) < 2.0**31, self, 0.0)
        return Value(k, k.b.fptosi(value.ir, k.ints))


@dataclass(frozen=True)
class Index:
    """A scalar loop counter of the generated code."""

    k: Lanes
    ir: Any

    def __mul__(self, factor: int) -> Index:
        return Index(self.k, self.k.b.mul(self.ir, ir.Constant(I64, factor)))

    def __add__(self, offset: int | Index) -> Index:
        other = ir.Constant(I64, offset) if isinstance(offset, int) else offset.ir
        return Index(self.k, self.k.b.add(self.ir, other))


@dataclass(frozen=True)
class Rows:
    """A column of vectors in scratch memory: one row per weight (or scale, or word), one lane per block."""

    k: Lanes
    base: Any
    type: Any

    def at(self, offset: int | Index) -> Rows:
        """The same memory from row ``offset`` on; nothing is copied."""
        return Rows(self.k, self._address(offset), self.type)

    def __getitem__(self, i: int | Index) -> Value:
        return Value(self.k, self.k.b.load(self._address(i), typ=self.type, align=4 * self.k.width))

    def __setitem__(self, i: int | Index, value: Value) -> None:
        self.k.b.store(value.ir, self._address(i), align=4 * self.k.width)

    def first(self, count: int) -> list[Value]:
        """The first ``count`` rows."""
        return [self[i] for i in range(count)]

    def element(self, i: int | Index, lane: Index) -> Any:
        """The address of the number in row ``i`` and lane ``lane``, for scalar loads and stores."""
        row = ir.Constant(I64, i) if isinstance(i, int) else i.ir
        position = self.k.b.add(self.k.b.mul(row, ir.Constant(I64, self.k.width)), lane.ir)
        return self.k.b.gep(self.base, [position], inbounds=True, source_etype=self.type.element)

    def _address(self, i: int | Index) -> Any:
        position = ir.Constant(I64, i) if isinstance(i, int) else i.ir
        return self.k.b.gep(self.base, [position], inbounds=True, source_etype=self.type)


class Variable:
    """A value that machine loops may change."""

    def __init__(self, k: Lanes, start: Value) -> None:
        self.k, self.type = k, start.ir.type
        with k.b.goto_entry_block():
            self.slot = k.b.alloca(self.type)
        self.set(start)

    def get(self) -> Value:
        """The current value."""
        return Value(self.k, self.k.b.load(self.slot, typ=self.type))

    def set(self, value: Value) -> None:
        """Assign ``value``."""
        self.k.b.store(value.ir, self.slot)


class Lanes:
    """One native function while it is being written; its last argument is the address of its scratch memory.

    ``unbounded``: whether it computes blocks of any magnitude, with ggml's results where its arithmetic leaves the
    usual range, or marks such blocks odd, which makes the others faster.
    """

    def __init__(
        self, width: int, permutes: bool, looks_up: bool, arguments: Sequence[Any], *, unbounded: bool = False
    ) -> None:
        self.width, self.permutes, self.looks_up, self.unbounded = width, permutes, looks_up, unbounded
        self.floats, self.ints, self.truths = (ir.VectorType(t, width) for t in (F32, I32, _I1))
        self.module = ir.Module("kernel")
        self.function = ir.Function(self.module, ir.FunctionType(I64, arguments), "quantize")
        # spilled vectors go to the stack; unaligned, every access would touch two cache lines
        self.function.attributes.add("nounwind")
        self.function.attributes.alignstack = 4 * width
        for argument in self.function.args:
            if argument.type == POINTER:
                argument.add_attribute("noalias")
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.scratch_bytes = 0
        self._constants: dict[tuple[str, str], ir.Constant] = {}
        self.odd = self.variable(self.false())
        self._tables = 0

    # values

    def like(self, pattern: Value, other: Value | Number) -> Value:
        """``other`` as it stands, or a constant of ``pattern``'s type in every lane."""
        if isinstance(other, Value):
            return other
        if pattern.is_float:
            return self.f32(other)
        return self._constant(pattern.ir.type, int(other))

    def f32(self, number: Number) -> Value:
        """A float constant, rounded to float32, in every lane."""
        return self._constant(self.floats, float(np.float32(number)))

    def i32(self, number: int) -> Value:
        """An integer constant in every lane."""
        return self._constant(self.ints, number)

    def false(self) -> Value:
        """A truth value that is false in every lane."""
        return self._constant(self.truths, 0)

    def _constant(self, type: ir.VectorType, number: float) -> Value:
        """``number`` in every lane; of the constants of a kernel, which are few and used often, each is made once."""
        key = (str(type), repr(number))  # as texts, 0.0 and -0.0 are two
        if key not in self._constants:
            self._constants[key] = ir.Constant(type, number)
        return Value(self, self._constants[key])

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
        """``clamp(value, 0, high)`` of floats without NaN, compared as integers to keep the multipliers' ports free."""
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
        """ggml's ``nearest_int``, with the same results out of range and for NaN."""
        return ((value + _ROUNDING_MAGIC).bits() & 0x7FFFFF) - 0x400000

    def half_bits(self, value: Value) -> Value:
        """The 16 bits of the nearest float16, ties to even, by the operations of ``GGML_FP32_TO_FP16``.

        NaN has its sign bit set, as what x86-64 makes of 0/0; 64-bit ARM leaves it clear.
        """
        return self.where(self._is_nan(value), self.i32(0xFE00), self.rounded_half_bits(value))

    def rounded_half_bits(self, value: Value) -> Value:
        """``GGML_FP32_TO_FP16``, which keeps the sign of NaN."""
        base = (self.magnitude(value) * 2.0**112) * 2.0**-110
        bias = (value.bits() << 1) & -0x1000000
        # the exponents compared are below 2^31 once shifted right, so a signed comparison serves
        bias = self.where((bias >> 1) < (0x71000000 >> 1), self.i32(0x71000000), bias)
        bits = (((bias >> 1) + 0x07800000).as_float_bits() + base).bits()
        nonsign = ((bits >> 13) & 0x7C00) + (bits & 0xFFF)
        return ((value.bits() >> 16) & 0x8000) | self.where(self._is_nan(value), self.i32(0x7E00), nonsign)

    def _is_nan(self, value: Value) -> Value:
        return (value.bits() & 0x7FFFFFFF) > 0x7F800000

    def bfloat_bits(self, value: Value) -> Value:
        """The 16 bits of the nearest bfloat16, ties to even; NaN is made quiet, as by ``GGML_FP32_TO_BF16``."""
        bits = value.bits()
        high = bits >> 16
        return self.where(self._is_nan(value), high | 64, (bits + (high & 1) + 0x7FFF) >> 16)

    def made_quiet(self, value: Value) -> Value:
        """The value itself; NaN with its sign and payload, and the bit that makes it quiet."""
        bits = value.bits()
        return self.where(self._is_nan(value), bits | 0x400000, bits).as_float_bits()

    def from_half_bits(self, half: Value) -> Value:
        """float16 bits, widened exactly."""
        bits = (half & 0x7FFF) << 13
        finite = (bits.as_float_bits() * 2.0**112).bits()
        widened = self.where((half & 0x7C00).equals(0x7C00), bits | 0x7F800000, finite)
        return (widened | ((half & 0x8000) << 16)).as_float_bits()

    def index(self, number: int) -> Index:
        """A constant counter."""
        return Index(self, ir.Constant(I64, number))

    def variable(self, start: Value) -> Variable:
        """A variable that loops of the generated code may change, with a start value."""
        return Variable(self, start)

    def any(self, condition: Value) -> Any:
        """Whether any lane is true, as a scalar condition for ``when``."""
        mask = self.b.bitcast(condition.ir, ir.IntType(self.width))
        return self.b.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0))

    def mark_odd(self, condition: Value) -> None:
        """Mark the blocks of these lanes, so that an unbounded kernel quantizes their rows; it marks none itself."""
        if not self.unbounded:
            self.mark_overflow(condition)

    def mark_overflow(self, condition: Value) -> None:
        """Mark the blocks of these lanes, which only ggml can quantize, if it does not end the process."""
        self.odd.set(self.odd.get() | condition)

    def permute(self, table: Sequence[float], index: Value) -> Value:
        """``table[index & 31]`` of 32 floats; only if ``permutes``: the machine has the instruction."""
        low, high = (
            ir.Constant(self.floats, [float(np.float32(x)) for x in half]) for half in (table[:16], table[16:])
        )
        function = self._declared("llvm.x86.avx512.vpermi2var.ps.512", [self.floats, self.ints, self.floats])
        return Value(self, self.b.call(function, [low, index.ir, high]))

    def chosen(self, table: Value, index: Value) -> Value:
        """``table[index % width]`` of one float per lane; only if ``looks_up``: the machine has the instruction."""
        name = "llvm.x86.avx512.permvar.sf.512" if self.width == 16 else "llvm.x86.avx2.permps"
        function = self._declared(name, [self.floats, self.ints])
        return Value(self, self.b.call(function, [table.ir, index.ir]))

    # control

    @contextmanager
    def loop(self, count: int) -> Iterator[Index]:
        """A loop of the generated code whose body runs ``count`` >= 1 times; yields the counter."""
        with self.repeat(ir.Constant(I64, count), 1) as index:
            yield Index(self, index)

    @contextmanager
    def repeat(self, end: Any, step: int) -> Iterator[Any]:
        """A loop over 0, step, 2*step... below a scalar ``end`` that runs at least once; yields the scalar counter."""
        before = self.b.block
        body, after = self.function.append_basic_block("body"), self.function.append_basic_block("after")
        self.b.branch(body)
        self.b.position_at_end(body)
        counter = self.b.phi(I64)
        counter.add_incoming(ir.Constant(I64, 0), before)
        yield counter
        following = self.b.add(counter, ir.Constant(I64, step))
        counter.add_incoming(following, self.b.block)
        self.b.cbranch(self.b.icmp_signed("<", following, end), body, after)
        self.b.position_at_end(after)

    @contextmanager
    def when(self, truth: Any) -> Iterator[None]:
        """Run the body only if a scalar condition is true."""
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
        offset = ir.Constant(I64, self.scratch_bytes)
        self.scratch_bytes += 4 * self.width * count
        return Rows(self, self.b.gep(self.function.args[-1], [offset], inbounds=True, source_etype=I8), kind)

    def constants(self, numbers: Sequence[Number]) -> Constants:
        """A table of floats from which loops read single entries, the same in every lane."""
        self._tables += 1
        kind = ir.ArrayType(F32, len(numbers))
        table = ir.GlobalVariable(self.module, kind, f"table{self._tables}")
        table.initializer = ir.Constant(kind, [float(np.float32(number)) for number in numbers])
        table.global_constant, table.linkage = True, "internal"
        return Constants(self, table)

    def words_table(self, words: NDArray[np.int64]) -> Any:
        """The address of a read-only table of 32-bit words within the code, aligned to a cache line."""
        self._tables += 1
        data = words.astype("<i4").tobytes()
        kind = ir.ArrayType(I8, len(data))
        table = ir.GlobalVariable(self.module, kind, f"table{self._tables}")
        table.initializer, table.align = ir.Constant(kind, bytearray(data)), 64
        table.global_constant, table.linkage = True, "internal"
        return table

    def gathered(self, table: Any, index: Value) -> Value:
        """``table[index]`` of a ``words_table``, loaded lane by lane."""
        found = ir.Constant(self.ints, ir.Undefined)
        for lane in range(self.width):
            place = self.b.zext(self.b.extract_element(index.ir, ir.Constant(I32, lane)), I64)
            word = self.b.load(self.b.gep(table, [place], inbounds=True, source_etype=I32), typ=I32)
            found = self.b.insert_element(found, word, ir.Constant(I32, lane))
        return Value(self, found)

    def splat(self, scalar: Any) -> Value:
        """A scalar, in every lane."""
        kind = ir.VectorType(scalar.type, self.width)
        vector = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
        return Value(self, self.b.shuffle_vector(vector, vector, ir.Constant(ir.VectorType(I32, self.width), None)))


@dataclass(frozen=True)
class Constants:
    """A table of floats; ``table[i]`` is its entry i in every lane."""

    k: Lanes
    address: Any

    def __getitem__(self, i: Index) -> Value:
        pointer = self.k.b.gep(self.address, [i.ir], inbounds=True, source_etype=F32)
        return self.k.splat(self.k.b.load(pointer, typ=F32))
