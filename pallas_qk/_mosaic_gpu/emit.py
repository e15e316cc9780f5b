"""What the kernels' code is made of: integers, words of lanes, pointers, and the few instructions that MLIR lacks.

Lanes travel between registers and memory as words: 32 bits with one or two lanes, or 16 bits with a single lane.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf, vector

from pallas_qk._fp8 import PTX_MINUS_RECIPROCAL, PTX_PAIRS, PTX_RECIPROCAL, Divisor, ptx_quotient

WARP, WARPGROUP = 32, 128  # threads
ACCESS_BYTES = 16  # the widest load or store of a thread

Value = Any  # a float32 lane or a vector of the emitted code: the bindings' annotations differ between versions


class Int:
    """An unsigned integer of the emitted code, a word of lanes, or, of one bit, a condition."""

    def __init__(self, value: Value):
        self.value = value

    @property
    def width(self) -> int:
        return self.value.type.width

    def _by(self, operation, other: "Int | int") -> "Int":
        return Int(operation(self.value, other.value if isinstance(other, Int) else mgpu.c(other, self.value.type)))

    def __add__(self, other: "Int | int") -> "Int":
        return self._by(arith.addi, other)

    def __sub__(self, other: "Int | int") -> "Int":
        return self._by(arith.subi, other)

    def __mul__(self, other: "Int | int") -> "Int":
        return self._by(arith.muli, other)

    def __floordiv__(self, other: "Int | int") -> "Int":
        return self._by(arith.divui, other)

    def __mod__(self, other: "Int | int") -> "Int":
        return self._by(arith.remui, other)

    def __and__(self, other: "Int | int") -> "Int":
        return self._by(arith.andi, other)

    def __or__(self, other: "Int | int") -> "Int":
        return self._by(arith.ori, other)

    def __xor__(self, other: "Int | int") -> "Int":
        return self._by(arith.xori, other)

    def __lshift__(self, other: "Int | int") -> "Int":
        return self._by(arith.shli, other)

    def __rshift__(self, other: "Int | int") -> "Int":
        return self._by(arith.shrui, other)

    def __lt__(self, other: "Int | int") -> "Int":
        return self._by(_comparison("ult"), other)

    def equals(self, other: "Int | int") -> "Int":
        return self._by(_comparison("eq"), other)

    def is_at_least(self, other: "Int | int", *, signed: bool) -> "Int":
        return self._by(_comparison("sge" if signed else "uge"), other)

    def minimum(self, other: "Int | int") -> "Int":
        """The smaller of the two."""
        return self._by(arith.minui, other)

    def resized(self, width: int) -> "Int":
        """Zero-extended or cut to `width` bits."""
        if self.width == width:
            return self
        resize = arith.extui if self.width < width else arith.trunci
        return Int(resize(ir.IntegerType.get_signless(width), self.value))

    def as_float(self) -> Value:
        """The float32 of the same bits."""
        return arith.bitcast(ir.F32Type.get(), self.value)


def _comparison(predicate: str):
    def compare(a: Value, b: Value) -> Value:
        return arith.cmpi(getattr(arith.CmpIPredicate, predicate), a, b)

    return compare


def constant(value: int, width: int = 32) -> Int:
    return Int(mgpu.c(value, ir.IntegerType.get_signless(width)))


def f32(value: float) -> Value:
    return mgpu.c(float(value), ir.F32Type.get())


def bits_of(lane: Value) -> Int:
    """The bits of a float32 lane."""
    return Int(arith.bitcast(ir.IntegerType.get_signless(32), lane))


def thread_index() -> Int:
    return Int(mgpu.thread_idx())


def warp_index() -> Int:
    """Of the thread's program, broadcast within the warp, which tells the compiler that its threads never part ways.

    Without that knowledge ptxas writes every loop with shuffles twice and takes 87 registers instead of 80.
    """
    return Int(mgpu.warp_idx())


def when(condition: Int):
    """The context of what runs where the condition holds."""
    return mgpu.when(condition.value)


def select(where: Int | None, a: list, b: list) -> list:
    """Elements of `a` where `where` holds, of `b` elsewhere; None holds everywhere. Lists of Int, or of lanes."""
    if where is None:
        return a
    return [_select(where, x, y) for x, y in zip(a, b, strict=True)]


def _select(where: Int, a, b):
    if isinstance(a, Int):
        return Int(arith.select(where.value, a.value, b.value))
    return arith.select(where.value, a, b)


def ptx(code: str, constraints: str, kind: ir.Type, *args: Value) -> Value:
    return llvm.inline_asm(kind, list(args), code, constraints)


def keep_above(value: Int) -> None:
    """Keeps loads and stores in front of what follows; ptxas would sink some of them among the sums.

    It moves nothing across a pmevent, even one that a false predicate never lets happen (without it 192.8 us against
    188.8, backward, T = 16384, 16/2 heads, two rows per warp; a bar.warp.sync it sinks).
    """
    code = "{ .reg .pred p; setp.eq.u32 p, $0, -1; @p pmevent 1; }"
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [value.value], code, "r", has_side_effects=True)


def butterfly(lane: Value, distance: int) -> Value:
    """The lane that the thread whose index differs in one bit holds."""
    return mgpu.shfl_bfly(lane, distance)


def from_thread(word: Int, thread: Int) -> Int:
    """The word that a thread of the warp holds."""
    every, clamp = constant(-1), constant(WARP - 1)
    word32 = word.resized(32).value
    held = nvvm.shfl_sync(every.value, word32, thread.value, clamp.value, nvvm.ShflKind.idx)
    return Int(held).resized(word.width)


def loop(begin: Int, stop: Int, step: int, carried: list[Value], body) -> list[Value]:
    """What `body(index, carried)` leaves of `carried` after the last index."""
    for_op: Value = scf.ForOp  # the bindings' stubs know only its generated part
    loop_op = for_op(begin.value, stop.value, constant(step).value, carried)
    with ir.InsertionPoint(loop_op.body):
        scf.yield_(body(Int(loop_op.induction_variable), list(loop_op.inner_iter_args)))
    return list(loop_op.results)


# Words


def word_bits(lanes: int, dtype: jnp.dtype) -> int:
    """Bits of each word of consecutive lanes."""
    return 8 * min(4, lanes * dtype.itemsize)


def repeated(bits: int, lanes: int, dtype: jnp.dtype) -> Int:
    """The word with `bits` in each of its lanes."""
    width = word_bits(lanes, dtype)
    return constant(sum(bits << shift for shift in range(0, width, 8 * dtype.itemsize)), width)


def nan_like(word: Int, dtype: jnp.dtype) -> Int:
    """A word of NaN."""
    lane = {"float16": 0x7E00, "bfloat16": 0x7FC0, "float32": 0x7FC00000}[dtype.name]
    return constant(lane if dtype.itemsize * 8 == word.width else lane * 0x10001, word.width)


def widen(words: list[Int], dtype: jnp.dtype) -> list[Value]:
    """The float32 lanes of `words`."""
    lanes = []
    for word in words:
        is_pair = word.width == 8 * 2 * dtype.itemsize
        if dtype == jnp.float32:
            lanes.append(word.as_float())
        elif dtype == jnp.bfloat16:
            halves = [word.resized(32) << 16, *([word & -(1 << 16)] if is_pair else [])]
            lanes += [half.as_float() for half in halves]
        else:
            halves = [word.resized(16), *([(word >> 16).resized(16)] if is_pair else [])]
            f16, f32_type = ir.F16Type.get(), ir.F32Type.get()
            lanes += [arith.extf(f32_type, arith.bitcast(f16, half.value)) for half in halves]
    return lanes


def narrow(lanes: list[Value], dtype: jnp.dtype) -> list[Int]:
    """The words of float32 `lanes`, rounded to nearest even, two lanes per instruction; 8 bits saturate."""
    i16, i32 = (ir.IntegerType.get_signless(width) for width in (16, 32))
    if dtype == jnp.float32:
        return [bits_of(lane) for lane in lanes]
    if dtype.itemsize == 1:
        return _codes(lanes, PTX_PAIRS[dtype.name])
    name = {"bfloat16": "bf16", "float16": "f16"}[dtype.name]
    if len(lanes) == 1:
        return [Int(ptx(f"cvt.rn.{name}.f32 $0, $1;", "=h,f", i16, *lanes))]
    pairs = zip(lanes[::2], lanes[1::2], strict=True)
    return [Int(ptx(f"cvt.rn.{name}x2.f32 $0, $2, $1;", "=r,f,f", i32, low, high)) for low, high in pairs]


def _codes(lanes: list[Value], name: str) -> list[Int]:
    i16, i32 = (ir.IntegerType.get_signless(width) for width in (16, 32))
    convert = f"cvt.rn.satfinite.{name}.f32"
    if len(lanes) == 1:
        return [Int(ptx(f"{convert} $0, $2, $1;", "=h,f,f", i16, *lanes, f32(0.0))).resized(8)]
    if len(lanes) == 2:
        return [Int(ptx(f"{convert} $0, $2, $1;", "=h,f,f", i16, *lanes))]
    code = f"{{ .reg .b16 low, high; {convert} low, $2, $1; {convert} high, $4, $3; mov.b32 $0, {{low, high}}; }}"
    fours = (lanes[first : first + 4] for first in range(0, len(lanes), 4))
    return [Int(ptx(code, "=r,f,f,f,f", i32, *four)) for four in fours]


def divisor_of(scale: Int) -> Divisor:
    """From the bits of a float32 scale."""
    magnitude, minus_sign = scale & 0x7FFFFFFF, (scale ^ -(1 << 31)) & -(1 << 31)
    power = (constant(254) - (magnitude >> 23).minimum(253)) << 23  # 2^(127 - exponent), normal whatever the exponent
    is_special = (magnitude - 1).is_at_least(0x7F7FFFFF, signed=False)  # of zero that is the largest integer
    kind = f32(0.0).type
    minus_reciprocal = ptx("{ .reg .f32 s; neg.f32 s, $1; rcp.approx.f32 $0, s; }", "=f,f", kind, scale.as_float())
    divisor = ptx("mul.rn.f32 $0, $1, $2;", "=f,f,f", kind, magnitude.as_float(), power.as_float())
    minus_power = (power | minus_sign).as_float()
    minus_factor, divisor = select(is_special, [minus_reciprocal, f32(1.0)], [minus_power, divisor])
    return Divisor(minus_factor, divisor, ptx(PTX_MINUS_RECIPROCAL, "=f,f", kind, divisor))


class Reciprocal(NamedTuple):
    """Of a scale, in float64."""

    value: Value


def reciprocal_of(scale: Int) -> Reciprocal:
    """From the bits of a float32 scale."""
    return Reciprocal(ptx(PTX_RECIPROCAL, "=d,f", ir.F64Type.get(), scale.as_float()))


def quotient(lane: Value, by: Divisor | Reciprocal) -> Value:
    """The float32 nearest to lane / scale, where its code isn't 0 or the largest."""
    if isinstance(by, Reciprocal):
        product = "{ .reg .f64 x; cvt.f64.f32 x, $1; mul.rn.f64 x, x, $2; cvt.rn.f32.f64 $0, x; }"
        return ptx(product, "=f,f,d", lane.type, lane, by.value)
    code = ptx_quotient("$1", Divisor("$2", "$3", "$4"), "$0")
    return ptx(f"{{ .reg .f32 n, q, e; {code} }}", "=f,f,f,f,f", lane.type, lane, *by)


# Memory


def is_signed(dtype: jnp.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.signedinteger)


@dataclasses.dataclass(frozen=True)
class Pointer:
    """An element of a global array. Offsets are counted in elements, in 64 bits where a row number enters."""

    address: Value
    dtype: jnp.dtype

    @classmethod
    def to(cls, ref: Value, dtype: jnp.dtype) -> "Pointer":
        # The address space makes ld.global and st.global of what would be generic accesses.
        return cls(llvm.addrspacecast(llvm.PointerType.get(1), mgpu.memref_ptr(ref)), dtype)

    def __add__(self, elements: "int | Int") -> "Pointer":
        index = constant(elements, 64) if isinstance(elements, int) else elements
        element = ir.IntegerType.get_signless(8 * self.dtype.itemsize)
        return Pointer(mgpu.getelementptr(self.address, [index.value], element), self.dtype)

    def row(self, index: Int, lanes: int) -> "Pointer":
        """The first of a row's `lanes`, in an array of such rows."""
        return self + index.resized(64) * lanes

    def load(self, lanes: int) -> list[Int]:
        """The words of consecutive lanes, up to 16 bytes per access."""
        words = []
        for address, kind, count in self._accesses(lanes):
            value = llvm.load(kind, address)
            words += [Int(_extract(value, i)) for i in range(count)] if count > 1 else [Int(value)]
        return words

    def store(self, words: list[Int]) -> None:
        lanes = len(words) * words[0].width // (8 * self.dtype.itemsize)
        for address, kind, count in self._accesses(lanes):
            piece, words = [word.value for word in words[:count]], words[count:]
            llvm.store(vector.from_elements(kind, piece) if count > 1 else piece[0], address)

    def _accesses(self, lanes: int):
        """(address, type, words) of the accesses that make up consecutive lanes."""
        num_bytes = lanes * self.dtype.itemsize
        word = ir.IntegerType.get_signless(8 * min(4, num_bytes))
        num_words = num_bytes * 8 // word.width
        count = min(num_words, 8 * ACCESS_BYTES // word.width)
        kind = word if count == 1 else ir.VectorType.get((count,), word)
        return [(mgpu.getelementptr(self.address, [first], word), kind, count) for first in range(0, num_words, count)]

    def load_integer(self) -> Int:
        """The integer, of 32 or 64 bits."""
        value = Int(llvm.load(ir.IntegerType.get_signless(8 * self.dtype.itemsize), self.address))
        if value.width >= 32:
            return value
        extend = arith.extsi if is_signed(self.dtype) else arith.extui
        return Int(extend(ir.IntegerType.get_signless(32), value.value))


def _extract(value: Value, index: int) -> Value:
    return vector.extract(value, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([index]))
