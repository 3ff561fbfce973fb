"""Vector registers for the CPU kernels: loops that numba cannot express, emitted as LLVM code one vector at a time.

numba turns a loop over an array into vector instructions, but a value that outlives one iteration stays in memory. The
states of a scan should stay in registers over many tokens. Functions decorated with `emitted` build such loops inside
numba's kernels; a Python list of vectors that such a function unrolls becomes registers. LLVM splits vectors that are
too long for the machine's registers, so the number of lanes affects speed only.
"""
# llvmlite has no types:
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils, types
from numba.extending import intrinsic

LANES = 16 if get_host_cpu_features().get("avx512f") else 8

_VECTOR, _INTEGERS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
_INDEX = ir.IntType(64)
# numba gives instructions without flags those of its kernels; with reassociation, (t + c) - c would become t.
_FLAGS = ("contract", "arcp")


class Vector:
    """LANES fp32 numbers. A Python number as the other operand stands for a vector of that number."""

    def __init__(self, builder: ir.IRBuilder, value: Any) -> None:
        self.builder = builder
        self.value = ir.Constant(_VECTOR, [float(value)] * LANES) if isinstance(value, int | float) else value

    def like(self, other: "Vector | float") -> "Vector":
        return other if isinstance(other, Vector) else Vector(self.builder, other)

    def _with(self, other: "Vector | float", operation: Callable[..., Any]) -> "Vector":
        return Vector(self.builder, operation(self.value, self.like(other).value, flags=_FLAGS))

    def __add__(self, other: "Vector | float") -> "Vector":
        return self._with(other, self.builder.fadd)

    def __sub__(self, other: "Vector | float") -> "Vector":
        return self._with(other, self.builder.fsub)

    def __mul__(self, other: "Vector | float") -> "Vector":
        return self._with(other, self.builder.fmul)

    def __truediv__(self, other: "Vector | float") -> "Vector":
        return self._with(other, self.builder.fdiv)

    def below(self, other: "Vector | float", then: "Vector | float", otherwise: "Vector | float") -> "Vector":
        """In each lane: `then` if self < other, else `otherwise` (also for NaN)."""
        b = self.builder
        smaller = b.fcmp_ordered("<", self.value, self.like(other).value, flags=_FLAGS)
        return Vector(b, b.select(smaller, self.like(then).value, self.like(otherwise).value))

    def fma(self, factor: "Vector", addend: "Vector | float") -> "Vector":
        """self * factor + addend. The product is not rounded, not even if it is also used elsewhere."""
        kind = ir.FunctionType(_VECTOR, [_VECTOR] * 3)
        operation = cgutils.get_or_insert_function(self.builder.module, kind, f"llvm.fmuladd.v{LANES}f32")
        return Vector(self.builder, self.builder.call(operation, [self.value, factor.value, self.like(addend).value]))

    def shuffle(self, other: "Vector", lanes: list[int]) -> "Vector":
        """Select `lanes` from the concatenation of both vectors."""
        return Vector(self.builder, self.builder.shuffle_vector(self.value, other.value, ir.Constant(_INTEGERS, lanes)))


def _spread(builder: ir.IRBuilder, number: Any) -> Any:
    """A vector with the number in every lane."""
    undefined = ir.Constant(ir.VectorType(number.type, LANES), ir.Undefined)
    one = builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, one, ir.Constant(_INTEGERS, [0] * LANES))


class Index:
    """An integer that counts tokens, states or fp32 numbers."""

    def __init__(self, builder: ir.IRBuilder, value: Any) -> None:
        self.builder = builder
        self.value = ir.Constant(_INDEX, value) if isinstance(value, int) else value

    def like(self, other: "Index | int") -> "Index":
        return other if isinstance(other, Index) else Index(self.builder, other)

    def __add__(self, other: "Index | int") -> "Index":
        return Index(self.builder, self.builder.add(self.value, self.like(other).value))

    def __sub__(self, other: "Index | int") -> "Index":
        return Index(self.builder, self.builder.sub(self.value, self.like(other).value))

    def __mul__(self, other: "Index | int") -> "Index":
        return Index(self.builder, self.builder.mul(self.value, self.like(other).value))


class Array:
    """A contiguous fp32 array, indexed as if flat: array[index] is the LANES numbers from the index on."""

    def __init__(self, builder: ir.IRBuilder, pointer: Any) -> None:
        self.builder, self.pointer = builder, pointer

    def _at(self, index: Index) -> Any:
        return self.builder.gep(self.pointer, [index.value])

    def _vector_at(self, index: Index) -> Any:
        return self.builder.bitcast(self._at(index), _VECTOR.as_pointer())

    def __getitem__(self, index: Index) -> Vector:
        return Vector(self.builder, self.builder.load(self._vector_at(index), align=4))

    def __setitem__(self, index: Index, vector: Vector) -> None:
        self.builder.store(vector.value, self._vector_at(index), align=4)

    def load(self, index: Index, count: Index) -> Vector:
        """Load the first `count` numbers, followed by zeros; reads nothing else."""
        b = self.builder
        with b.if_else(self._is_full(count)) as (all_lanes, some_lanes):
            with all_lanes:
                full, full_block = self[index].value, b.block
            with some_lanes:
                pointer, mask, align = self._vector_at(index), self._mask(count), ir.Constant(ir.IntType(32), 4)
                kind = ir.FunctionType(_VECTOR, [pointer.type, align.type, mask.type, _VECTOR])
                operation = cgutils.get_or_insert_function(b.module, kind, f"llvm.masked.load.v{LANES}f32.p0")
                some, some_block = b.call(operation, [pointer, align, mask, Vector(b, 0).value]), b.block
        either = b.phi(_VECTOR)
        either.add_incoming(full, full_block)
        either.add_incoming(some, some_block)
        return Vector(b, either)

    def store(self, index: Index, vector: Vector, count: Index) -> None:
        """Store the first `count` numbers of the vector; writes nothing else."""
        b = self.builder
        with b.if_else(self._is_full(count)) as (all_lanes, some_lanes):
            with all_lanes:
                self[index] = vector
            with some_lanes:
                pointer, mask, align = self._vector_at(index), self._mask(count), ir.Constant(ir.IntType(32), 4)
                kind = ir.FunctionType(ir.VoidType(), [_VECTOR, pointer.type, align.type, mask.type])
                operation = cgutils.get_or_insert_function(b.module, kind, f"llvm.masked.store.v{LANES}f32.p0")
                b.call(operation, [vector.value, pointer, align, mask])

    def _is_full(self, count: Index) -> Any:
        return self.builder.icmp_signed(">=", count.value, ir.Constant(_INDEX, LANES))

    def _mask(self, count: Index) -> Any:
        lanes = ir.Constant(ir.VectorType(_INDEX, LANES), list(range(LANES)))
        return self.builder.icmp_signed("<", lanes, _spread(self.builder, count.value))

    def fetch(self, index: Index, *, to_write: bool = False) -> None:
        """Prefetch these numbers into the cache. They need not exist."""
        b, flag = self.builder, ir.IntType(32)
        pointer = b.bitcast(self._at(index), ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, flag, flag, flag])
        prefetch = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
        b.call(prefetch, [pointer, *(ir.Constant(flag, value) for value in (int(to_write), 3, 1))])

    def spread(self, index: Index) -> Vector:
        """One number in every lane."""
        return Vector(self.builder, _spread(self.builder, self.builder.load(self._at(index))))


class Variable:
    """A vector that changes in a loop. LLVM turns its slot into a register."""

    def __init__(self, vector: Vector) -> None:
        self.builder, self.slot = vector.builder, cgutils.alloca_once(vector.builder, _VECTOR)
        self.set(vector)

    def get(self) -> Vector:
        return Vector(self.builder, self.builder.load(self.slot))

    def set(self, vector: Vector) -> None:
        self.builder.store(vector.value, self.slot)


class Code:
    """The point in the code at which an `emitted` function emits."""

    def __init__(self, builder: ir.IRBuilder) -> None:
        self.builder = builder

    def vector(self, number: float) -> Vector:
        return Vector(self.builder, number)

    def index(self, number: int) -> Index:
        return Index(self.builder, number)

    def either(self, condition: Index) -> Any:
        """A context that yields two contexts: the code for a condition that is not 0, and the code for 0."""
        return self.builder.if_else(self.builder.icmp_signed("!=", condition.value, self.index(0).value))

    @contextmanager
    def loop(self, first: Index | int, last: Index | int, step: int = 1) -> Iterator[Index]:
        first, last = self.index(0).like(first), self.index(0).like(last)
        with cgutils.for_range_slice(self.builder, first.value, last.value, self.index(step).value, intp=_INDEX) as (
            counter,
            _,
        ):
            yield Index(self.builder, counter)

    def in_groups(self, count: Index, size: int, emit: Callable[[list[Index]], None]) -> None:
        """Emit loops over the numbers below `count`: over groups of `size`, a power of two, then over the rest, one at
        a time. `emit` receives the numbers of one iteration.
        """
        grouped = Index(self.builder, self.builder.and_(count.value, self.index(-size).value))
        with self.loop(0, grouped, size) as first:
            emit([first + i for i in range(size)])
        with self.loop(grouped, count) as number:
            emit([number])


def emitted(function: Callable[..., None]) -> Any:
    """Decorate a function for use in numba's kernels: its body is what `function(code, *arguments)` emits. Kernels call
    it with one tuple; arrays in it arrive as `Array`, integers as `Index`, and each float as a `Vector` of it.
    """

    def typed(_, arguments):
        def generate(context, builder, signature, values):
            given = []
            for i, kind in enumerate(arguments):
                value = builder.extract_value(values[0], i)
                if isinstance(kind, types.Array):
                    given.append(Array(builder, context.make_array(kind)(context, builder, value).data))
                elif isinstance(kind, types.Float):
                    number = context.cast(builder, value, kind, types.float32)
                    given.append(Vector(builder, _spread(builder, number)))
                else:
                    given.append(Index(builder, context.cast(builder, value, kind, types.int64)))
            function(Code(builder), *given)
            return context.get_dummy_value()

        return types.void(arguments), generate

    return intrinsic(typed)


def exp2(t: Vector) -> Vector:
    """2^t to 2e-7 for t < 127, and 2^-126 for t < -126. The polynomial is exactly 1 at 0: a decay near one is
    multiplied over thousands of tokens, and a bias would add up.
    """
    t = t.below(-126, -126, t)
    rounded = t + _TO_INTEGER
    return _power(rounded, t - (rounded - _TO_INTEGER))


def exp2_of_product(s: Vector, a: Vector) -> Vector:
    """2^(s a) for products from -126 to 127; takes an eighth fewer instructions."""
    rounded = s.fma(a, _TO_INTEGER)
    return _power(rounded, s.fma(a, (rounded - _TO_INTEGER) * -1))


def exp2_of_product_or_least(s: Vector, a: Vector) -> Vector:
    """The bits of `exp2_of_product`, and 2^-126 for products below -126."""
    return (s * a).below(-126, 2.0**-126, exp2_of_product(s, a))


# Adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits, from where a shift moves it to the exponent.
_TO_INTEGER = 12582912


def _power(rounded: Vector, f: Vector) -> Vector:
    b = f.builder
    p = f * 1.3264727e-3 + 9.6715128e-3
    for coefficient in (5.5507337e-2, 2.4022242e-1, 6.9314698e-1, 1):
        p = p * f + coefficient
    exponent = b.shl(b.bitcast(rounded.value, _INTEGERS), ir.Constant(_INTEGERS, [23] * LANES))
    return Vector(b, b.bitcast(b.add(b.bitcast(p.value, _INTEGERS), exponent), _VECTOR))


def sigmoid(v: Vector) -> Vector:
    u = _decay(v)
    return v.below(0, u, 1) / (u + 1)


def softplus_and_slope(v: Vector) -> tuple[Vector, Vector]:
    """max(v, 0) + log(1 + e^-|v|), with the logarithm from a polynomial (relative error 3e-8), and its derivative, the
    sigmoid.
    """
    u = _decay(v)
    p = u * 5.23269324e-3 - 2.95052401e-2
    for coefficient in (
        7.82259678e-2, -1.36632473e-1, 1.91060079e-1, -2.48429827e-1, 3.33190969e-1, -4.99994931e-1, 9.99999970e-1
    ):  # fmt: skip
        p = p * u + coefficient
    return p * u + v.below(0, 0, v), v.below(0, u, 1) / (u + 1)


def _decay(v: Vector) -> Vector:
    """e^-|v|, which cannot overflow."""
    return exp2(v.below(0, v, v * -1) * math.log2(math.e))


def sums(vectors: list[Vector]) -> Vector:
    """The sum of the lanes of each vector; lane i holds the sum of vectors[i]."""
    even, odd = list(range(0, 2 * LANES, 2)), list(range(1, 2 * LANES, 2))
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [left.shuffle(right, even) + left.shuffle(right, odd) for left, right in pairs]
    return vectors[0]
