"""How rows are cut into tiles, and where tiles lie in memory, on Pallas Triton.

T num_tokens, Hq num_q_heads, Hkv num_kv_heads, D head_dim, R rotary_dim, B rows of a program.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_qk._options import Spec, chunk_lanes, next_power_of_2
from pallas_qk._rows import Place, Rows, sources_of


def output(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """The type of a kernel's output. shard_map asks how it varies over a mesh; a kernel is one device's code."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType())


class RowIndex(NamedTuple):
    """Where rows (token, head) of D lanes lie in an array of `array_shape`."""

    ref: Any
    first: int = 0  # index of head 0 on the second axis
    step: int = 1  # from a head to the next
    part: tuple[int, ...] = ()  # index on the third axis, where there is one

    def at(self, token, head, column):
        index = head if (self.first, self.step) == (0, 1) else self.first + self.step * head
        return token, index, *self.part, column


def array_shape(rows: Mapping[str, Rows], array: str, spec: Spec) -> tuple[int, ...]:
    """The shape in which a kernel takes an array that holds rows, (T, rows, D) or (T, heads, rows of a head, D)."""
    source = sources_of(rows)[array]
    if source.heads is None:
        return spec.num_tokens, source.token // spec.head_dim, spec.head_dim
    rows_of_head = (len(source.kinds),) if len(source.kinds) > 1 else ()
    return spec.num_tokens, source.token // source.head, *rows_of_head, spec.head_dim


def rows_in(ref, rows: Mapping[str, Rows], place: Place, spec: Spec) -> RowIndex:
    """Where rows of a source lie in `ref`, of the shape `array_shape`."""
    first, step = place.first // spec.head_dim, place.head // spec.head_dim
    source = sources_of(rows)[place.array]
    if source.heads is None:
        return RowIndex(ref, first, step)
    return RowIndex(ref, part=(first,) if len(source.kinds) > 1 else ())


def spread_k(program, q_programs: int, k_programs: int):
    """Whether a program takes k rows, and how many before it do, up to `k_programs`.

    Every period-th does, so that k rows are spread evenly among q rows (0.4 to 1.4 us of 139, backward 3 of 182).
    """
    period = (q_programs + k_programs) // k_programs
    group = div(program, period)
    return (rem(program, period) == period - 1) & (group < k_programs), group


def rows_of_program(block, num_rows_per_program: int, num_tokens: int, num_heads: int, lanes: int):
    """Token, head and mask (None: every row exists) of a program's rows, over a tile (B, lanes).

    Where B divides the heads the token is one scalar, whose table row is then one address.
    """
    first, row = block * num_rows_per_program, iota((num_rows_per_program, lanes), 0)
    mask = None if num_tokens * num_heads % num_rows_per_program == 0 else first + row < num_tokens * num_heads
    if num_heads % num_rows_per_program == 0:
        return div(first, num_heads), rem(first, num_heads) + row, mask
    return div(first + row, num_heads), rem(first + row, num_heads), mask


class Layout(NamedTuple):
    """How a program's rows are cut into tiles (B, lanes)."""

    columns: list[jax.Array]  # column of x at each place of each tile; the first len(offsets) tiles make up the row
    exists: list[jax.Array | None]  # which places of each tile exist; None: all
    offsets: list[int]  # lane at the first place of each tile that is summed and stored
    bits: list[int]  # bit of the lane index that each axis of a tile stands for, as axes of two, major to minor
    frequencies: list[jax.Array]  # column of cos for each tile of angles
    rotated: jax.Array | None  # which places of a tile of angles exist; None: all
    rotate: Callable  # (normalised tiles, angles, arithmetic) -> the tiles to store


def _chunks(num_rows: int, head_dim: int, rotary_dim: int) -> Layout:
    """D/C tiles of C lanes; chunk j and chunk j + R/2/C are partners."""
    lanes = chunk_lanes(head_dim, rotary_dim)
    pairs = rotary_dim // 2 // lanes
    offsets = list(range(0, head_dim, lanes))
    lane = iota((num_rows, lanes), 1)
    columns = [offset + lane for offset in offsets]

    def rotate(ys, angles, arithmetic):
        rotated = [arithmetic.rotate(ys[j], ys[j + pairs], cos, sin) for j, (cos, sin) in enumerate(angles)]
        return [*(o1 for o1, _ in rotated), *(o2 for _, o2 in rotated), *ys[2 * pairs :]]

    bits = list(range(lanes.bit_length() - 2, -1, -1))
    return Layout(columns, [None] * len(columns), offsets, bits, columns[:pairs], None, rotate)


def _halves(num_rows: int, head_dim: int, rotary_dim: int) -> Layout:
    """Two tiles of D/2 lanes whose equal places are R/2 apart, for powers of two R/2 and D/R.

    16 bytes a lane, half the accesses of the chunks and a third fewer shuffles; the rotation is computed on all
    lanes and selected.
    """
    half = rotary_dim // 2
    lane = iota((num_rows, head_dim // 2), 1)
    # lax.div and lax.rem: Python's // and % lose contiguity and make every access 2 bytes wide.
    first = div(lane, half) * rotary_dim + rem(lane, half)
    rotated = lane < half

    def rotate(ys, angles, arithmetic):
        ((cos, sin),) = angles
        return [jnp.where(rotated, o, y) for o, y in zip(arithmetic.rotate(*ys, cos, sin), ys, strict=True)]

    bits = [bit for bit in range(head_dim.bit_length() - 2, -1, -1) if 1 << bit != half]
    return Layout([first, first + half], [None, None], [0, half], bits, [lane], rotated, rotate)


def _row(num_rows: int, head_dim: int, rotary_dim: int) -> Layout:
    """One tile of the whole row, and the partners loaded once more: any D and R, a second of compile time."""
    half, lanes = rotary_dim // 2, next_power_of_2(head_dim)
    lane = iota((num_rows, lanes), 1)
    is_first, rotated = lane < half, lane < rotary_dim
    partner = jnp.where(is_first, lane + half, lane - half)
    frequency = jnp.where(is_first, lane, lane - half)

    def rotate(ys, angles, arithmetic):
        (cos, sin), (own, other) = angles[0], ys
        o1, o2 = arithmetic.rotate(jnp.where(is_first, own, other), jnp.where(is_first, other, own), cos, sin)
        return [jnp.where(is_first, o1, jnp.where(rotated, o2, own))]

    bits = list(range(lanes.bit_length() - 2, -1, -1))
    return Layout([lane, partner], [lane < head_dim, rotated], [0], bits, [frequency], rotated, rotate)


def _pairs(num_rows: int, head_dim: int, rotary_dim: int) -> Layout:
    """One tile of the whole row, for the rotation "pairs": a thread holds both lanes of a pair."""
    half, lanes = rotary_dim // 2, next_power_of_2(head_dim)
    lane, frequency = iota((num_rows, lanes), 1), iota((num_rows, lanes // 2), 1)

    def rotate(ys, angles, arithmetic):
        ((cos, sin),), (y,) = angles, ys
        first, second = arithmetic.rotate(*pair_of(y.reshape(num_rows, lanes // 2, 2)), cos, sin)
        shape = num_rows, lanes // 2, 2
        first, second = (jnp.broadcast_to(x[:, :, None], shape) for x in (first, second))
        rotated = jnp.where(iota(shape, 2) == 0, first, second).reshape(num_rows, lanes)
        return [jnp.where(lane < rotary_dim, rotated, y)]

    bits = list(range(lanes.bit_length() - 2, -1, -1))
    return Layout([lane], [lane < head_dim], [0], bits, [frequency], frequency < half, rotate)


def _whole(num_rows: int, head_dim: int, rotary_dim: int) -> Layout:
    """One tile of the whole row, which is not rotated."""
    del rotary_dim
    lanes = next_power_of_2(head_dim)
    lane = iota((num_rows, lanes), 1)
    bits = list(range(lanes.bit_length() - 2, -1, -1))
    return Layout([lane], [lane < head_dim], [0], bits, [], None, lambda ys, *_: ys)


LAYOUTS = {"chunks": _chunks, "halves": _halves, "row": _row, "pairs": _pairs, "whole": _whole}


def pair_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two places of a tile's last axis.

    A thread holds both, and what selects and adds them is gone from the compiled code: integers, for -0.0 + 0.0 is 0.0.
    """
    words = lax.bitcast_convert_type(x, jnp.int32)
    places = (jnp.where(iota(x.shape, x.ndim - 1) == place, words, 0) for place in (0, 1))
    first, second = (
        lax.bitcast_convert_type(jnp.sum(words, axis=-1, dtype=jnp.int32), jnp.float32) for words in places
    )
    return first, second


def load(ref, index, mask=None, other=None):
    """Where the mask is not set: `other`, or 0."""
    if mask is None:
        return plt.load(_at(ref, index))
    return plt.load(_at(ref, index), mask=mask, other=jnp.zeros((), ref.dtype) if other is None else other)


def store(ref, index, value, mask=None):
    plt.store(_at(ref, index), value, mask=mask)


def _at(ref, index):
    # Interpret mode wants every index to be an array.
    return ref.at[tuple(jnp.int32(i) if isinstance(i, int) else i for i in index)]


def both(a, b):
    """The conjunction of two masks, where None lets everything through."""
    return b if a is None else a if b is None else a & b


def iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def div(a: jax.Array, n: int) -> jax.Array:
    return lax.div(a, jnp.full(a.shape, n, jnp.int32))


def rem(a: jax.Array, n: int) -> jax.Array:
    return lax.rem(a, jnp.full(a.shape, n, jnp.int32))
