"""What a thread does with a row: where rows lie, its lanes of them, the table, and the norm.

G threads of a row, V lanes of a vector. `member` is the number of a thread among the G of its row.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import math as mlir_math

from pallas_qk._cache_axes import Slots
from pallas_qk._fp8 import Divisor
from pallas_qk._mosaic_gpu.emit import (
    ACCESS_BYTES,
    Int,
    Pointer,
    Reciprocal,
    Value,
    butterfly,
    constant,
    divisor_of,
    f32,
    is_signed,
    nan_like,
    narrow,
    ptx,
    quotient,
    reciprocal_of,
    select,
    when,
    widen,
)
from pallas_qk._options import Options, next_power_of_2, tree_order
from pallas_qk._rows import Inputs, Place


class Layout(NamedTuple):
    """Which lanes of a row a thread of its group holds: base + column of the thread + 0 … V-1, for every base."""

    threads: int  # G
    lanes: int  # V
    bases: tuple[int, ...]
    bits: tuple[int, ...]  # bit of the column that each bit of the thread's `member` stands for
    partners: bool  # whether RoPE partners lie in one thread, at bases R/2 apart

    @property
    def reach(self) -> int:
        """Lanes from a base to the end of the last thread's vector."""
        return sum(1 << bit for bit in self.bits) + self.lanes


class Vector(NamedTuple):
    """Consecutive lanes of a row that a thread reads or writes at once."""

    column: Int
    base: int
    lanes: int
    exists: Int | None = None  # false where the vector repeats another thread's; None: it never does

    def load(self, row: Pointer) -> list[Int]:
        return (row + self.column + self.base).load(self.lanes)

    def store(self, row: Pointer, words: list[Int]) -> None:
        (row + self.column + self.base).store(words)


def vector(column: Int, base: int, lanes: int, reach: int, head_dim: int) -> Vector:
    """The vector of a thread at base + column; past the end of the row, the row's last.

    Threads past the end redo the last vector and store the same bits, so stores need no mask.
    """
    if base + reach <= head_dim:
        return Vector(column, base, lanes)
    return Vector(column.minimum(head_dim - lanes - base), base, lanes, column < head_dim - base)


def frequencies_of_pairs(vectors: list[Vector], layout: Layout, rotary_dim: int) -> Iterator[tuple[Int | None, Int]]:
    """Where the rotation "pairs" rotates a vector (None: everywhere), and its first frequency, of those that it may."""
    for v, base in zip(vectors, layout.bases, strict=True):
        if base < rotary_dim:
            lane = v.column + base
            where = None if base + layout.reach <= rotary_dim else lane < rotary_dim
            (frequency,) = select(where, [lane >> 1], [constant(0)])
            yield where, frequency


def copied_vectors(layout: Layout, member: Int, head_dim: int, dtype: jnp.dtype) -> list[Vector]:
    """Vectors as wide as an access can be, whatever the layout."""
    lanes = math.gcd(ACCESS_BYTES // dtype.itemsize, head_dim)
    reach, column = layout.threads * lanes, member * lanes
    return [vector(column, base, lanes, reach, head_dim) for base in range(0, head_dim, reach)]


def pieces(lanes: list[Value], size: int) -> list[list[Value]]:
    return [lanes[first : first + size] for first in range(0, len(lanes), size)]


def spread_k(index: Int, q_count: int, k_count: int) -> tuple[Int, Int]:
    """Whether a program or warp takes k rows, and how many before it do, up to `k_count`.

    Every period-th does, so that k rows are spread evenly among q rows.
    """
    if not k_count:
        return constant(0, 1), constant(0)
    period = (q_count + k_count) // k_count
    group = index // period
    return (index % period).equals(period - 1) & (group < k_count), group


class RowsIn(NamedTuple):
    """Rows (token, head) of one kind in an array."""

    array: Pointer
    place: Place
    num_heads: int

    def row(self, row: Int) -> Pointer:
        start = self.array + self.offset(row)
        return start + self.place.first if self.place.first else start

    def offset(self, row: Int) -> Int:
        """Elements from the first row to this one."""
        offset = row.resized(64) * self.place.head
        gap = self.place.token - self.num_heads * self.place.head  # from a token's last head to the next token's first
        if not gap:
            return offset
        return offset + (row // self.num_heads).resized(64) * gap


class Slot(NamedTuple):
    """Where a token lies in a cache."""

    exists: Int  # whether its slot, and the layer, lie in the cache
    number: Int  # 0 where they don't
    layer: Int | None

    @classmethod
    def of(cls, token: Int, slots: Pointer, layer: Pointer | None, places: Slots) -> "Slot":
        """Compared as `Table.row` compares positions: no address outside the cache is formed."""
        slot = (slots + token.resized(64)).load_integer()
        exists, of_layer = slot < _limit(slot, places.capacity), None
        if layer is not None:
            of_layer = layer.load_integer()
            exists = exists & (of_layer < _limit(of_layer, places.num_layers))
            (of_layer,) = select(exists, [of_layer.resized(32)], [constant(0)])
        (number,) = select(exists, [slot.resized(32)], [constant(0)])
        return cls(exists, number, of_layer)

    def offset(self, places: Slots) -> Int:
        """Elements from the start of the cache to head 0."""
        offset = self.number.resized(64) * places.place
        gap = places.block - places.block_size * places.place  # from a block's last place to the next block's first
        if gap:
            offset = offset + (self.number // places.block_size).resized(64) * gap
        return offset if self.layer is None else offset + self.layer.resized(64) * places.layer


class Destination(NamedTuple):
    """Where a row is written."""

    start: Pointer
    exists: Int | None = None  # None: it always is
    divisor: Divisor | Reciprocal | None = None  # of codes of 8 bits

    @classmethod
    def of(
        cls,
        array: Pointer,
        place: Place,
        num_heads: int,
        row: Int,
        slot: Slot | None,
        inputs: Inputs,
        *,
        cast_first: bool,
    ) -> "Destination":
        if place.slots is None:
            return cls(RowsIn(array, place, num_heads).row(row))
        assert slot is not None
        offset, head, divisor = slot.offset(place.slots), row % num_heads, None
        start = array + (offset + head.resized(64) * place.head)
        if place.scale is not None:
            scale = getattr(inputs, place.scale.array)
            if place.scale.per_head:
                scale = scale + head.resized(64)
                scale = scale + place.scale.first if place.scale.first else scale
            (word,) = scale.load(1)
            divisor = divisor_of(word) if cast_first else reciprocal_of(word)
        return cls(start + place.first if place.first else start, slot.exists, divisor)

    def store(self, vectors: list[Vector], words: list[list[Int]], dtype: jnp.dtype, *, cast_first: bool) -> None:
        """Each vector's words of `dtype`, cast to the array's. See `MosaicForward.cast_first`."""

        def cast(of_vector: list[Int]) -> list[Int]:
            if dtype == self.start.dtype:
                return of_vector
            lanes = widen(of_vector, dtype)
            if self.divisor is not None:
                lanes = [quotient(lane, self.divisor) for lane in lanes]
            return narrow(lanes, self.start.dtype)

        if cast_first:
            words = [cast(of_vector) for of_vector in words]
        with contextlib.nullcontext() if self.exists is None else when(self.exists):
            for v, of_vector in zip(vectors, words, strict=True):
                v.store(self.start, of_vector if cast_first else cast(of_vector))


def _limit(value: Int, size: int) -> int:
    """What an integer below is at least 0 and below `size`, compared without its sign."""
    return min(size, 2 ** (value.width - 1) - 1)


@dataclasses.dataclass(frozen=True)
class Table:
    """cos_sin_cache (max_position, R) as one thread reads it, for a token's one or three positions."""

    cache: Pointer  # no method but `positions_of` is called where there is none
    positions: Pointer | None  # None: the row of a token is its own
    max_position: int
    num_tokens: int
    options: Options

    def positions_of(self, token: Int) -> list[Int]:
        """A token's positions, one for each row of `positions`; without positions, the token itself.

        None where nothing is rotated.
        """
        if self.options.rotation is None:
            return []
        if self.positions is None:
            return [token]
        first = self.positions + token.resized(64)
        return [(first + axis * self.num_tokens).load_integer() for axis in range(self.options.num_axes)]

    def row(self, position: Int) -> Pointer:
        """A position's row of the table; row 0 stands for a position outside.

        Compared in the given integer type, so that 2^32 + 3 is not 3; no address outside the table is formed.
        """
        row = position
        if self.positions is not None:
            inside = position < _limit(position, self.max_position)  # unsigned: a negative position is a large one
            (row,) = select(inside, [position.resized(32)], [constant(0)])
        return self.cache.row(row, self.options.rotary_dim)

    def load(self, rows: list[Pointer], frequency: Int, lanes: int) -> list[tuple[list[Int], list[Int]]]:
        """The words of cos and sin of consecutive frequencies, for each of the token's positions."""
        half = self.options.rotary_dim // 2
        return [((row + frequency).load(lanes), (row + frequency + half).load(lanes)) for row in rows]

    def spoiled(self, words: list[Int], position: Int) -> list[Int]:
        """The words of cos, or NaN where the position is past the table."""
        if self.positions is None:
            return words
        limit = _limit(position, self.max_position)
        is_past = position.is_at_least(limit, signed=is_signed(self.positions.dtype))
        return select(is_past, [nan_like(word, self.cache.dtype) for word in words], words)

    def angles(self, positions: list[Int], loaded, frequency: Int) -> tuple[list[Value], list[Value]]:
        """float32 cos and sin of consecutive frequencies; NaN in cos, which spoils both halves, past the table."""
        axes = []
        for position, (cos, sin) in zip(positions, loaded, strict=True):
            cos = self.spoiled(cos, position)
            axes.append((widen(cos, self.cache.dtype), widen(sin, self.cache.dtype)))
        (cos, sin), *others = axes
        for axis, (other_cos, other_sin) in enumerate(others, start=1):
            for lane, reads in enumerate(mrope_reads(frequency, axis, len(cos), self.options)):
                other = [other_cos[lane], other_sin[lane]]
                cos[lane], sin[lane] = select(reads, other, [cos[lane], sin[lane]])
        return cos, sin


def mrope_reads(frequency: Int, axis: int, lanes: int, options: Options) -> Iterator[Int]:
    """Whether each of up to `lanes` consecutive frequencies reads positions row `axis`; those left out never do."""
    section = options.mrope_section or (0, 0, 0)
    if options.mrope_layout == "sectioned":
        first, size = sum(section[:axis]), section[axis]  # a frequency below the first is a large unsigned difference
        return (frequency + (lane - first) < size for lane in range(min(lanes, first + size)))
    # Interleaved: frequency j reads row `axis` if j % 3 == axis and j < 3 * section[axis].
    remainder, limit = frequency % 3, 3 * section[axis]
    return (remainder.equals((axis - lane) % 3) & (frequency < limit - lane) for lane in range(min(lanes, limit)))


def sum_of_squares(xs: list[list[Value]], vectors: list[Vector], layout: Layout, member: Int, head_dim: int) -> Value:
    """The sum of squares over the row, in the order of `tree_order`, in every thread of the row's group.

    Squares are never -0.0, so lanes that D lacks, which would add 0.0, are left out.
    """
    own, order = len(layout.bases), tree_order(next_power_of_2(head_dim))
    lanes: dict[int, Value] = {}
    for v, x in zip(vectors[:own], xs[:own], strict=True):
        lanes |= {v.base + i: select(v.exists, [value], [f32(0.0)])[0] for i, value in enumerate(x)}
    if order[0] == 0:
        sums, order = _sums_of_pairs(lanes, layout, member), order[1:]
    else:
        sums = {lane: arith.mulf(x, x) for lane, x in lanes.items()}
    for bit in order:
        step = 1 << bit
        if bit in layout.bits:
            distance = 1 << layout.bits.index(bit)
            sums = {lane: arith.addf(s, butterfly(s, distance)) for lane, s in sums.items()}
        else:
            sums = {
                lane: arith.addf(s, sums[lane + step]) if lane + step in sums else s
                for lane, s in sums.items()
                if not lane & step
            }
    return sums[0]


def _sums_of_pairs(lanes: dict[int, Value], layout: Layout, member: Int) -> dict[int, Value]:
    """x0² + x1² of neighbouring lanes: one product, and the other fused onto it, as in the serving kernel.

    Products of 16-bit lanes are exact above 2^-133, so the form shows in float32 alone, and in squares below that.
    """
    if 0 not in layout.bits:
        return {lane: _sum_of_pair(x, lanes.get(lane + 1)) for lane, x in lanes.items() if not lane & 1}
    distance = 1 << layout.bits.index(0)
    is_second = (member & distance).equals(distance)
    sums = {}
    for lane, x in lanes.items():
        other = butterfly(x, distance)
        (first,), (second,) = select(is_second, [other], [x]), select(is_second, [x], [other])
        sums[lane] = _sum_of_pair(first, second)
    return sums


def _sum_of_pair(first: Value, second: Value | None) -> Value:
    return arith.mulf(first, first) if second is None else mlir_math.fma(first, first, arith.mulf(second, second))


def inv_rms(sum_of_squares: Value, head_dim: int, eps: float) -> Value:
    """The instructions of the serving kernel: one fused multiply-add with the approximate reciprocal of D."""
    code = "{ .reg .f32 t; rcp.approx.ftz.f32 t, $2; fma.rn.f32 t, $1, t, $3; rsqrt.approx.ftz.f32 $0, t; }"
    return ptx(code, "=f,f,f,f", sum_of_squares.type, sum_of_squares, f32(head_dim), f32(eps))


def effective_weights(words: list[Int], dtype: jnp.dtype, norm_beta: float) -> list[Value]:
    """The float32 lanes of `words` plus norm_beta.

    Adding 0.0 stays, to two lanes per instruction: it makes a weight of -0.0 positive, as in the serving kernel.
    """
    if norm_beta or words[0].width < 8 * 2 * dtype.itemsize or dtype == jnp.float32:
        return [arith.addf(lane, f32(norm_beta)) for lane in widen(words, dtype)]
    name = {"bfloat16": "bf16x2", "float16": "f16x2"}[dtype.name]
    code = f"{{ .reg .b32 zero; mov.b32 zero, 0; add.rn.{name} $0, $1, zero; }}"
    return widen([Int(ptx(code, "=r,r", word.value.type, word.value)) for word in words], dtype)


def rotate(first, second, cos, sin, fuses_y2: bool) -> tuple[list[Value], list[Value]]:
    """One product of each sum is rounded and the other fused, as in the serving kernel."""
    lanes = list(zip(first, second, cos, sin, strict=True))
    return (
        [mlir_math.fma(a, c, arith.negf(arith.mulf(b, s))) for a, b, c, s in lanes],
        [
            mlir_math.fma(b, c, arith.mulf(a, s)) if fuses_y2 else mlir_math.fma(a, s, arith.mulf(b, c))
            for a, b, c, s in lanes
        ],
    )
