"""The op as a Pallas GPU kernel on the Triton backend.

T num_tokens, Hq num_q_heads, Hkv num_kv_heads, D head_dim, R rotary_dim, B rows of a program.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_qk import _reference
from pallas_qk._config import (
    Options,
    Spec,
    Target,
    TritonForward,
    chunk_lanes,
    next_power_of_2,
    rotation_fuses_y2,
    too_many_rows,
    tree_order,
    triton_forward,
)
from pallas_qk._operands import Inputs, Outputs, output_types, spec_of

FORWARD_NAME = "pallas_qk_triton_forward"


def unsupported(spec: Spec, target: Target) -> str | None:
    """Why this implementation can't run `spec` on `target`; None if it can."""
    if target.compute_capability < (8, 0):
        major, minor = target.compute_capability
        return f"it needs compute capability 8.0 or later (packed 16-bit conversions), got {major}.{minor}"
    return too_many_rows(spec, margin=2**20)  # the backward looks a step ahead: up to some 10^5 rows


def forward(
    inputs: Inputs, *, options: Options, config: TritonForward | None = None, interpret: bool = False
) -> Outputs:
    """The contract of `_reference.forward`. `interpret` runs the kernel in plain XLA, without inline assembly."""
    spec, types = spec_of(inputs, options), output_types(inputs, options)
    if spec.num_tokens == 0:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), types)
    if config is None:
        config = triton_forward(spec, gate_copied=options.gate == "copied")
    q_programs = pl.cdiv(spec.num_tokens * spec.num_q_heads, config.rows_per_program)
    k_programs = pl.cdiv(spec.num_tokens * spec.num_kv_heads, config.rows_per_program)
    dtype = inputs.q.dtype
    kernel = functools.partial(
        _forward_kernel,
        q_programs=q_programs,
        k_programs=k_programs,
        spec=spec,
        options=options,
        config=config,
        arithmetic=_plain_arithmetic(dtype) if interpret else _ptx_arithmetic(dtype, rotation_fuses_y2(options, dtype)),
    )
    (outputs,) = pl.pallas_call(
        kernel,
        grid=(q_programs + k_programs,),
        out_shape=(jax.tree.map(lambda x: output(x.shape, x.dtype), types),),
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name=FORWARD_NAME,
    )(inputs._replace(q=inputs.q.reshape(q_shape(spec, options))))
    return outputs


def output(shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """The type of a kernel's output. shard_map asks how it varies over a mesh; a kernel is one device's code."""
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=jax.sharding.ManualAxisType())


class _Heads(NamedTuple):
    """Where rows (token, head) of D lanes lie in an array (T, places, …, D)."""

    ref: Any
    first: int = 0  # place of head 0
    step: int = 1  # places from a head to the next
    part: tuple[int, ...] = ()  # of a place

    def at(self, token, head, column):
        place = head if (self.first, self.step) == (0, 1) else self.first + self.step * head
        return token, place, *self.part, column


def q_shape(spec: Spec, options: Options) -> tuple[int, ...]:
    """The shape in which a kernel takes q and writes its gradient: each place holds D lanes, or q and gate."""
    gates = () if options.gate is None else (2,)
    if options.packed is None:
        return spec.num_tokens, spec.num_q_heads, *gates, spec.head_dim
    return spec.num_tokens, math.prod(gates) * spec.num_q_heads + 2 * spec.num_kv_heads, spec.head_dim


def heads_of(q_ref, k_ref, spec: Spec, options: Options) -> Outputs:
    """Where q, k, v and gate lie in the arrays that the op reads, or their gradients in those that it writes."""
    if options.packed is None:
        if options.gate is None:
            return Outputs(_Heads(q_ref), _Heads(k_ref))
        return Outputs(_Heads(q_ref, part=(0,)), _Heads(k_ref), gate=_Heads(q_ref, part=(1,)))
    step = 1 if options.gate is None else 2
    first_k = step * spec.num_q_heads
    gate = None if options.gate is None else _Heads(q_ref, 1, step)
    k, v = _Heads(q_ref, first_k), _Heads(q_ref, first_k + spec.num_kv_heads)
    return Outputs(_Heads(q_ref, 0, step), k, v, gate)


def _forward_kernel(
    inputs: Inputs,
    outputs: Outputs,
    *,
    q_programs: int,
    k_programs: int,
    spec: Spec,
    options: Options,
    config: TritonForward,
    arithmetic: "_Arithmetic",
):
    """One program: B consecutive rows (token, head) of q, or of k, and what is copied beside them: gates, or v.

    RoPE partners lie at the same place of two tiles, so in one thread: no shuffle for the rotation, no shared memory,
    no barrier. Every load is issued before the first store. H200, bf16, T = 16384, 16/2 heads: 135.6 us where
    a copy takes 133.2.
    """
    num_rows_per_program, head_dim = config.rows_per_program, spec.head_dim
    layout = _LAYOUTS[config.layout](num_rows_per_program, head_dim, options.rotary_dim)

    def norm_and_rope(block, num_heads, source, weight_ref, out_ref, beside, beside_out_ref):
        def rows(lanes):
            return _rows(block, num_rows_per_program, spec.num_tokens, num_heads, lanes)

        in_tiles, xs = [], []
        copied = None
        if beside_out_ref is not None:
            # One tile over the whole row, 16 bytes a thread in every layout. First, so that its bytes are on the way
            # while the rest waits for addresses.
            lanes = next_power_of_2(head_dim)
            copied_columns = _iota((num_rows_per_program, lanes), 1)
            token, head, in_rows = rows(lanes)
            in_copied = _and(in_rows, None if lanes == head_dim else copied_columns < head_dim)
            copied = _load(beside.ref, beside.at(token, head, copied_columns), in_copied)
        for columns, exists in zip(layout.columns, layout.exists, strict=True):
            token, head, in_rows = rows(columns.shape[1])
            in_tiles.append(_and(in_rows, exists))
            xs.append(_load(source.ref, source.at(token, head, columns), in_tiles[-1]))
        token, _, in_rows = rows(1)
        table_rows = _table_rows(inputs.positions, token, in_rows, inputs.cos_sin_cache.shape[0], options)
        angles = [
            _cos_and_sin(inputs.cos_sin_cache, table_rows, f, layout.rotated, options) for f in layout.frequencies
        ]
        if beside_out_ref is not None:
            token, head, _ = rows(lanes)
            _store(beside_out_ref, (token, head, copied_columns), copied, in_copied)
        # Weights come from L1. Loaded after a store that might alias them, they keep ptxas from sinking that store, and
        # with it the loads before it, below the reduction.
        weights = [_load(weight_ref, (c,), e) for c, e in zip(layout.columns, layout.exists, strict=True)]

        xs = [x.astype(jnp.float32) for x in xs]
        total = _tree_sum(dict(zip(layout.offsets, xs, strict=False)), layout.bits, head_dim, arithmetic.fma)
        inv_rms = lax.rsqrt(arithmetic.mean_plus_eps(total, head_dim, options.eps))
        weights = [arithmetic.effective_weight(w, options.norm_beta) for w in weights]
        ys = [x * inv_rms * w for x, w in zip(xs, weights, strict=True)]
        angles = [(cos.astype(jnp.float32), sin.astype(jnp.float32), is_past) for cos, sin, is_past in angles]
        # NaN in cos alone spoils both halves of the pair.
        angles = [(cos if is_past is None else jnp.where(is_past, jnp.nan, cos), sin) for cos, sin, is_past in angles]
        ys = layout.rotate(ys, angles, arithmetic)
        for columns, y, in_tile in zip(layout.columns, ys, in_tiles, strict=False):
            token, head, _ = rows(columns.shape[1])
            _store(out_ref, (token, head, columns), arithmetic.narrow(y), in_tile)

    program = pl.program_id(0)
    is_k, group = interleaved(program, q_programs, k_programs)
    heads = heads_of(inputs.q, inputs.k, spec, options)

    @pl.when(is_k)
    def _():
        norm_and_rope(group, spec.num_kv_heads, heads.k, inputs.k_weight, outputs.k, heads.v, outputs.v)

    @pl.when(jnp.logical_not(is_k))
    def _():
        block = program - jnp.minimum(group, k_programs)
        norm_and_rope(block, spec.num_q_heads, heads.q, inputs.q_weight, outputs.q, heads.gate, outputs.gate)


def interleaved(program, q_programs: int, k_programs: int):
    """Whether a program takes k rows, and how many before it do, up to `k_programs`.

    Every period-th does, so that k rows are spread evenly among q rows (0.4 to 1.4 us of 139, backward 3 of 182).
    """
    period = (q_programs + k_programs) // k_programs
    group = _div(program, period)
    return (_rem(program, period) == period - 1) & (group < k_programs), group


def _rows(block, num_rows_per_program: int, num_tokens: int, num_heads: int, lanes: int):
    """Token, head and mask (None: every row exists) of a program's rows, over a tile (B, lanes).

    Where B divides the heads the token is one scalar, whose table row is then one address.
    """
    first, row = block * num_rows_per_program, _iota((num_rows_per_program, lanes), 0)
    mask = None if num_tokens * num_heads % num_rows_per_program == 0 else first + row < num_tokens * num_heads
    if num_heads % num_rows_per_program == 0:
        return _div(first, num_heads), _rem(first, num_heads) + row, mask
    return _div(first + row, num_heads), _rem(first + row, num_heads), mask


def _table_rows(positions_ref, token, in_rows, max_position: int, options: Options):
    """The table row of each token, and whether its position is past the table: one pair per row of positions.

    Without positions the table has a row for each token and nothing is past it (None).
    """
    if positions_ref is None:
        return [(token if in_rows is None else jnp.minimum(token, max_position - 1), None)]
    axes = (0,) if options.mrope_section is None else (0, 1, 2)
    mask = in_rows if jnp.ndim(token) else None
    return [_reference.table_rows(_load(positions_ref, (axis, token), mask), max_position) for axis in axes]


def _cos_and_sin(cache_ref, table_rows, frequency, rotated, options: Options):
    """cos, sin and whether they are past the table, over a tile of frequencies (B, lanes)."""
    row, is_past = table_rows[0]
    row = jnp.broadcast_to(row, frequency.shape)
    if is_past is not None:
        is_past = jnp.broadcast_to(is_past, frequency.shape)
    if options.mrope_section is not None:
        for axis in (1, 2):
            reads = _reference.mrope_mask(frequency, axis, options.mrope_section, options.mrope_layout)
            axis_row, axis_is_past = (jnp.broadcast_to(a, frequency.shape) for a in table_rows[axis])
            row, is_past = jnp.where(reads, axis_row, row), jnp.where(reads, axis_is_past, is_past)
    half = options.rotary_dim // 2
    return _load(cache_ref, (row, frequency), rotated), _load(cache_ref, (row, half + frequency), rotated), is_past


class _Layout(NamedTuple):
    """How a program's rows are cut into tiles (B, lanes)."""

    columns: list[jax.Array]  # column of x at each place of each tile; the first len(offsets) tiles make up the row
    exists: list[jax.Array | None]  # which places of each tile exist; None: all
    offsets: list[int]  # lane at the first place of each tile that is summed and stored
    bits: list[int]  # bit of the lane index that each axis of a tile stands for, as axes of two, major to minor
    frequencies: list[jax.Array]  # column of cos for each tile of angles
    rotated: jax.Array | None  # which places of a tile of angles exist; None: all
    rotate: Callable  # (normalised tiles, angles, arithmetic) -> the tiles to store


def _chunks(num_rows: int, head_dim: int, rotary_dim: int) -> _Layout:
    """D/C tiles of C lanes; chunk j and chunk j + R/2/C are partners."""
    lanes = chunk_lanes(head_dim, rotary_dim)
    pairs = rotary_dim // 2 // lanes
    offsets = list(range(0, head_dim, lanes))
    lane = _iota((num_rows, lanes), 1)
    columns = [offset + lane for offset in offsets]

    def rotate(ys, angles, arithmetic):
        rotated = [arithmetic.rotate(ys[j], ys[j + pairs], cos, sin) for j, (cos, sin) in enumerate(angles)]
        return [*(o1 for o1, _ in rotated), *(o2 for _, o2 in rotated), *ys[2 * pairs :]]

    bits = list(range(lanes.bit_length() - 2, -1, -1))
    return _Layout(columns, [None] * len(columns), offsets, bits, columns[:pairs], None, rotate)


def _halves(num_rows: int, head_dim: int, rotary_dim: int) -> _Layout:
    """Two tiles of D/2 lanes whose equal places are R/2 apart, for powers of two R/2 and D/R.

    16 bytes a lane, half the accesses of the chunks and a third fewer shuffles; the rotation is computed on all
    lanes and selected.
    """
    half = rotary_dim // 2
    lane = _iota((num_rows, head_dim // 2), 1)
    # lax.div and lax.rem: Python's // and % lose contiguity and make every access 2 bytes wide.
    first = _div(lane, half) * rotary_dim + _rem(lane, half)
    rotated = lane < half

    def rotate(ys, angles, arithmetic):
        ((cos, sin),) = angles
        return [jnp.where(rotated, o, y) for o, y in zip(arithmetic.rotate(*ys, cos, sin), ys, strict=True)]

    bits = [bit for bit in range(head_dim.bit_length() - 2, -1, -1) if 1 << bit != half]
    return _Layout([first, first + half], [None, None], [0, half], bits, [lane], rotated, rotate)


def _row(num_rows: int, head_dim: int, rotary_dim: int) -> _Layout:
    """One tile of the whole row, and the partners loaded once more: any D and R, a second of compile time."""
    half, lanes = rotary_dim // 2, next_power_of_2(head_dim)
    lane = _iota((num_rows, lanes), 1)
    is_first, rotated = lane < half, lane < rotary_dim
    partner = jnp.where(is_first, lane + half, lane - half)
    frequency = jnp.where(is_first, lane, lane - half)

    def rotate(ys, angles, arithmetic):
        (cos, sin), (own, other) = angles[0], ys
        o1, o2 = arithmetic.rotate(jnp.where(is_first, own, other), jnp.where(is_first, other, own), cos, sin)
        return [jnp.where(is_first, o1, jnp.where(rotated, o2, own))]

    bits = list(range(lanes.bit_length() - 2, -1, -1))
    return _Layout([lane, partner], [lane < head_dim, rotated], [0], bits, [frequency], rotated, rotate)


_LAYOUTS = {"chunks": _chunks, "halves": _halves, "row": _row}


def _tree_sum(xs: dict[int, jax.Array], bits: list[int], head_dim: int, fma: Callable) -> jax.Array:
    """(B, 1): the sum of squares over the lanes of tiles, by the lane at their first place, as `tree_order` says.

    A neighbouring pair is one product and a fused multiply-add onto it, as in the serving kernel. Products of 16-bit
    lanes are exact above 2^-133, so the form shows in float32 alone, and in squares below that.

    Squares are never -0.0, so lanes that D lacks, which would add 0.0, are left out.
    """
    num_rows, bits, order = next(iter(xs.values())).shape[0], list(bits), tree_order(next_power_of_2(head_dim))
    xs = {offset: x.reshape(num_rows, *(2,) * len(bits)) for offset, x in xs.items()}
    if order[0] != 0:
        tiles = {offset: x * x for offset, x in xs.items()}
    else:
        order = order[1:]
        if 0 in bits:
            assert bits.pop() == 0
            pairs: dict[int, tuple[jax.Array, jax.Array | None]] = {offset: _pair(x) for offset, x in xs.items()}
        else:
            pairs = {offset: (x, xs.get(offset + 1)) for offset, x in xs.items() if not offset & 1}
        tiles = {offset: a * a if b is None else fma(a, a, b * b) for offset, (a, b) in pairs.items()}
    for bit in order:
        if bit in bits:
            axis = bits.index(bit)
            del bits[axis]
            tiles = {offset: jnp.sum(tile, axis=1 + axis) for offset, tile in tiles.items()}
        else:
            step = 1 << bit
            tiles = {
                offset: tile + tiles[offset + step] if offset + step in tiles else tile
                for offset, tile in tiles.items()
                if not offset & step
            }
    return tiles[0][:, None]


def _pair(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The two places of a tile's last axis.

    A thread holds both, and what selects and adds them is gone from the compiled code: integers, for -0.0 + 0.0 is 0.0.
    """
    words = lax.bitcast_convert_type(x, jnp.int32)
    places = (jnp.where(_iota(x.shape, x.ndim - 1) == place, words, 0) for place in (0, 1))
    first, second = (
        lax.bitcast_convert_type(jnp.sum(words, axis=-1, dtype=jnp.int32), jnp.float32) for words in places
    )
    return first, second


class _Arithmetic(NamedTuple):
    """The steps whose rounding decides bits, in PTX or in plain jnp."""

    effective_weight: Callable  # (weight, norm_beta) -> float32
    mean_plus_eps: Callable  # (sum (B, 1), D, eps) -> mean + eps
    rotate: Callable  # (y1, y2, cos, sin) -> (o1, o2), after y1 and y2 are rounded to the activation dtype
    narrow: Callable  # float32 -> activation dtype
    fma: Callable  # a * b + c
    dot2: Callable  # a * b + c * d, or with negate a * b - c * d
    select: Callable  # (mask, a, b) -> a where the mask is set, else b


def _plain_arithmetic(dtype) -> _Arithmetic:
    def dot2(a, b, c, d, *, negate: bool = False):
        return a * b - c * d if negate else a * b + c * d

    def rotate(y1, y2, cos, sin):
        y1, y2 = _reference.round_trip(y1, dtype), _reference.round_trip(y2, dtype)
        return dot2(y1, cos, y2, sin, negate=True), dot2(y1, sin, y2, cos)

    return _Arithmetic(
        effective_weight=_reference.effective_weight,
        mean_plus_eps=lambda s, head_dim, eps: s / head_dim + eps,
        rotate=rotate,
        narrow=lambda y: y.astype(dtype),
        fma=lambda a, b, c: a * b + c,
        dot2=dot2,
        select=jnp.where,
    )


def _ptx_arithmetic(dtype, fuses_y2: bool = False) -> _Arithmetic:
    """The instructions that Triton emits for the serving kernel, which Pallas's lowering does not fuse by itself."""

    def effective_weight(weight, norm_beta):
        # Also 0.0 is added: it makes a weight of -0.0 positive, as in the serving kernel.
        return weight.astype(jnp.float32) + norm_beta

    def mean_plus_eps(s, head_dim, eps):
        # One fused multiply-add with the approximate reciprocal of D: 7 to 100 of 6 M elements where D is no power of
        # two.
        head_dim, eps = (jnp.full(s.shape, value, jnp.float32) for value in (head_dim, eps))
        code = "{ .reg .f32 r; rcp.approx.ftz.f32 r, $2; fma.rn.f32 $0, $1, r, $3; }"
        return _ptx(code, "=f,f,f,f", s.dtype, s, head_dim, eps)

    def fma(a, b, c):
        shape = jnp.broadcast_shapes(a.shape, b.shape, c.shape)
        args = [jnp.broadcast_to(x, shape) for x in (a, b, c)]
        return _ptx("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", jnp.float32, *args)

    def dot2(a, b, c, d, *, negate: bool = False):
        # a * b + c * d or a * b - c * d, the second product rounded, the first fused: with a float32 table other forms
        # differ in 64 to 662 of 33 M. The sign is PTX's, since Pallas lowers -x to 0 - x, which makes 0.0 of 0.0.
        sign = "neg.f32 t, t; " if negate else ""
        code = f"{{ .reg .f32 t; mul.rn.f32 t, $3, $4; {sign}fma.rn.f32 $0, $1, $2, t; }}"
        return _ptx(code, "=f,f,f,f,f", a.dtype, a, b, c, d)

    def rotate(y1, y2, cos, sin):
        y1, y2 = round_trip(y1), round_trip(y2)
        o2 = dot2(y2, cos, y1, sin) if fuses_y2 else dot2(y1, sin, y2, cos)
        return dot2(y1, cos, y2, sin, negate=True), o2

    def round_trip(y):
        if dtype == jnp.float32:
            return y
        return _ptx(f"{{ .reg .b32 t; {convert} t, $3, $2; {widen} }}", "=r,=r,r,r", y.dtype, y, pack=2)

    def narrow(y):
        return y if dtype == jnp.float32 else _ptx(f"{convert} $0, $2, $1;", "=r,r,r", dtype, y, pack=2)

    def select(mask, a, b):
        # 32 bits an instruction, and no predicate for each lane.
        bits = jnp.where(mask, -1, 0).astype({2: jnp.int16, 4: jnp.int32}[a.dtype.itemsize])
        return _ptx("lop3.b32 $0, $1, $2, $3, 0xca;", "=r,r,r,r", a.dtype, bits, a, b, pack=4 // a.dtype.itemsize)

    # Two lanes a conversion: a single F2F is a quarter-rate unit (146.6 against 140.2 us, T = 16384, 16/2 heads).
    convert, widen = {
        "bfloat16": ("cvt.rn.bf16x2.f32", "shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000;"),
        "float16": (
            "cvt.rn.f16x2.f32",
            ".reg .b16 low, high; mov.b32 {low, high}, t; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high;",
        ),
        "float32": ("", ""),
    }[str(dtype)]
    return _Arithmetic(effective_weight, mean_plus_eps, rotate, narrow, fma, dot2, select)


def _ptx(code: str, constraints: str, dtype, *args: jax.Array, pack: int = 1) -> jax.Array:
    """Inline assembly over tiles of one shape; `pack` elements a statement."""
    result = jax.ShapeDtypeStruct(args[0].shape, dtype)
    return plt.elementwise_inline_asm(
        code, args=list(args), constraints=constraints, pack=pack, result_shape_dtypes=[result]
    )[0]


def _load(ref, index, mask=None, other=None):
    """Where the mask is not set: `other`, or 0."""
    if mask is None:
        return plt.load(_at(ref, index))
    return plt.load(_at(ref, index), mask=mask, other=jnp.zeros((), ref.dtype) if other is None else other)


def _store(ref, index, value, mask=None):
    plt.store(_at(ref, index), value, mask=mask)


def _at(ref, index):
    # Interpret mode wants every index to be an array.
    return ref.at[tuple(jnp.int32(i) if isinstance(i, int) else i for i in index)]


def _and(a, b):
    """The conjunction of two masks, where None lets everything through."""
    return b if a is None else a if b is None else a & b


def _iota(shape: tuple[int, ...], axis: int) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, shape, axis)


def _div(a: jax.Array, n: int) -> jax.Array:
    return lax.div(a, jnp.full(a.shape, n, jnp.int32))


def _rem(a: jax.Array, n: int) -> jax.Array:
    return lax.rem(a, jnp.full(a.shape, n, jnp.int32))
