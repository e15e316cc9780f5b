"""The op as a Pallas GPU kernel on the Mosaic GPU backend.

T num_tokens, Hq num_q_heads, Hkv num_kv_heads, D head_dim, R rotary_dim, G threads of a row, V lanes of a vector.

The kernel is written per thread, as one `inline_mgpu` body: G threads of a warp own a row (token, head), keep it in
registers and sum it with lane shuffles. That fixes what array code leaves to the compiler: width and address space of
every access, order of the sum, form of every rounding. Pallas's interpret mode can't run such a body;
`tests/mosaic_interpreter.py` runs the emitted code instead.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxlib.mlir.dialects import math as mlir_math

from pallas_qk._config import (
    MosaicForward,
    Options,
    Spec,
    Target,
    chunk_lanes,
    mosaic_forward,
    next_power_of_2,
    rotation_fuses_y2,
    too_many_rows,
    tree_order,
)
from pallas_qk._operands import Inputs, Outputs, output_types, spec_of

FORWARD_NAME = "pallas_qk_mosaic_gpu_forward"

_WARP, _WARPGROUP = 32, 128  # threads
_ACCESS_BYTES = 16  # the widest load or store of a thread
_GRID_AXIS, _WARPGROUP_AXIS = "pallas_qk_program", "pallas_qk_warpgroup"  # must differ from the axes of a user's mesh

Value = Any  # of the emitted code: the bindings' annotations differ between versions


def unsupported(spec: Spec, target: Target) -> str | None:
    """Why this implementation can't run `spec` on `target`; None if it can.

    The kernels need no wgmma, TMA, cluster or shared memory. So they run on capability 12.x, which has less of these.
    What Mosaic GPU puts around a kernel needs 9.0.
    """
    if target.compute_capability < (9, 0):
        major, minor = target.compute_capability
        return f"it needs compute capability 9.0 or later (Mosaic GPU), got {major}.{minor}"
    return too_many_rows(spec, margin=2**16)


def forward(inputs: Inputs, *, options: Options, config: MosaicForward | None = None) -> Outputs:
    """The contract of `_reference.forward`."""
    spec, types = spec_of(inputs, options), output_types(inputs, options)
    if spec.num_tokens == 0:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), types)
    if config is None:
        config = mosaic_forward(spec, gate_copied=options.gate == "copied")
    layout = _layout(config, spec.head_dim, options.rotary_dim, inputs.q.dtype)
    rows_per_program = _WARPGROUP // layout.threads
    q_programs = pl.cdiv(spec.num_tokens * spec.num_q_heads, rows_per_program)
    k_programs = pl.cdiv(spec.num_tokens * spec.num_kv_heads, rows_per_program)
    thread = functools.partial(
        _forward_thread,
        rows_per_program=rows_per_program,
        programs=(q_programs, k_programs),
        max_position=inputs.cos_sin_cache.shape[0],
        spec=spec,
        options=options,
        config=config,
        layout=layout,
    )
    return _launch(FORWARD_NAME, thread, inputs, types, num_programs=q_programs + k_programs, num_warpgroups=1)


def _launch(
    name: str,
    thread: Callable[[Value, Any, Any], None],
    inputs,
    outputs,
    *,
    num_programs: int,
    num_warpgroups: int,
):
    """Runs `thread(program, inputs, outputs)` in every thread of every program.

    `inputs` are arrays, `outputs` types, in any containers; a thread sees a `_Pointer` in the place of each.
    """
    arrays, inputs_tree = jax.tree.flatten(inputs)
    types, outputs_tree = jax.tree.flatten(outputs)

    def kernel(*refs):
        dtypes = [ref.dtype for ref in refs]

        def body(launch_context, program, *refs):
            del launch_context
            pointers = [_Pointer.to(ref, dtype) for ref, dtype in zip(refs, dtypes, strict=True)]
            read, written = pointers[: len(arrays)], pointers[len(arrays) :]
            thread(
                program.registers.item(),
                jax.tree.unflatten(inputs_tree, read),
                jax.tree.unflatten(outputs_tree, written),
            )

        arg_types = (plgpu.Layout.WG_SPLAT(()), *(plgpu.RefType() for _ in refs))
        plgpu.inline_mgpu(arg_types=arg_types)(body)(lax.axis_index(_GRID_AXIS), *refs)

    results = plgpu.kernel(
        kernel,
        out_type=tuple(types),
        grid=(num_programs,),
        grid_names=(_GRID_AXIS,),
        # A name for a single warpgroup would cost a second barrier at the start of each program.
        num_threads=None if num_warpgroups == 1 else num_warpgroups,
        thread_name=None if num_warpgroups == 1 else _WARPGROUP_AXIS,
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*arrays)
    return jax.tree.unflatten(outputs_tree, results)


class _Layout(NamedTuple):
    """Which lanes of a row a thread of its group holds: base + column of the thread + 0 … V-1, for every base."""

    threads: int  # G
    lanes: int  # V
    bases: tuple[int, ...]
    bits: tuple[int, ...]  # bit of the column that each bit of the thread's place in its group stands for
    partners: bool  # whether RoPE partners lie in one thread, at bases R/2 apart

    @property
    def reach(self) -> int:
        """Lanes from a base to the end of the last thread's vector."""
        return sum(1 << bit for bit in self.bits) + self.lanes


def _layout(config: MosaicForward, head_dim: int, rotary_dim: int, dtype: jnp.dtype) -> _Layout:
    half, offsets = rotary_dim // 2, [0]
    # Partners are whole vectors in every layout.
    widest = math.gcd(_ACCESS_BYTES // dtype.itemsize, head_dim, half)
    # Tiles of `places`, at `offsets` of the row; the threads and their vectors share out the places.
    match config.layout:
        case "chunks":
            places = chunk_lanes(head_dim, rotary_dim)
            offsets = list(range(0, head_dim, places))
        case "halves":
            places, offsets = head_dim // 2, [0, half]
        case "row":
            places = next_power_of_2(head_dim)
    threads = _WARP // config.rows_per_warp
    lanes = max(1, min(widest, places // threads))
    threads = min(threads, places // lanes)

    def column(place: int) -> int:
        # Halves leave out the bit that tells partners apart.
        return place + (place & -half) if config.layout == "halves" else place

    bits = tuple(column(lanes << i).bit_length() - 1 for i in range(threads.bit_length() - 1))
    bases = (offset + column(place) for offset in offsets for place in range(0, places, threads * lanes))
    return _Layout(threads, lanes, tuple(sorted(b for b in bases if b < head_dim)), bits, config.layout != "row")


def _forward_thread(
    program: Value,
    inputs: Inputs,
    outputs: Outputs,
    *,
    rows_per_program: int,
    programs: tuple[int, int],
    max_position: int,
    spec: Spec,
    options: Options,
    config: MosaicForward,
    layout: _Layout,
) -> None:
    """One thread: its lanes of one row (token, head) of q, or of k, and of what is copied beside it, a gate or v.

    All of them and the table are loaded before the first store. A row or vector past the end repeats the last one, with
    equal bits.
    """
    num_tokens, head_dim = spec.num_tokens, spec.head_dim
    table = _Table(inputs.cos_sin_cache, inputs.positions, max_position, num_tokens, options)
    thread = mgpu.thread_idx()
    place = _and(thread, layout.threads - 1)
    vectors, rotations = _vectors_and_rotations(layout, place, head_dim, options.rotary_dim)
    copied_vectors = _copied_vectors(layout, place, head_dim, outputs.q.dtype)

    def norm_and_rope(block, heads, weight, out, copied_out):
        num_rows = num_tokens * heads.num_heads
        row = _add(_mul(block, rows_per_program), _div(thread, layout.threads))
        if num_rows % rows_per_program:
            row = _min(row, num_rows - 1)
        positions = table.positions_of(_div(row, heads.num_heads))
        table_rows = [table.row(position) for position in positions]
        source, target = heads.row(row), out.row(row, head_dim)
        xs = [_widen(v.load(source), out.dtype) for v in vectors]
        if copied_out is not None:
            copied = [v.load(source + heads.beside) for v in copied_vectors]
        angles = [table.load(table_rows, rotation.frequency, layout.lanes) for rotation in rotations]
        if config.weights == "first":
            weights = [v.load(weight) for v in vectors]
        if copied_out is not None:
            for v, words in zip(copied_vectors, copied, strict=True):
                v.store(copied_out.row(row, head_dim), words)
        if config.weights == "after_gate":
            # A store that might alias them comes first: neither it nor the loads before it can sink.
            weights = [v.load(weight) for v in vectors]

        total = _tree_sum(xs, vectors, layout, place, head_dim)
        if config.weights == "after_sum":
            # The sum's sign bit is 0 (PTX's NaN has none either), which the compiler can't know: the loads stay behind.
            sign = _shr(arith.bitcast(ir.IntegerType.get_signless(32), total), 31)
            weights = [v.load(weight + sign) for v in vectors]
        inv_rms = _inv_rms(total, head_dim, options.eps)
        words, ys = [], []
        for lanes, weight_words in zip(xs, weights, strict=True):
            ws = _effective_weights(weight_words, weight.dtype, options.norm_beta)
            y = [arith.mulf(arith.mulf(lane, inv_rms), w) for lane, w in zip(lanes, ws, strict=True)]
            words.append(_narrow(y, out.dtype))
            ys.append(_widen(words[-1], out.dtype))
        for rotation, loaded in zip(rotations, angles, strict=True):
            cos, sin = table.angles(positions, loaded, rotation.frequency)
            for index, lanes in rotation.apply(ys, cos, sin, rotation_fuses_y2(options, out.dtype)).items():
                words[index] = _select(rotation.where, _narrow(lanes, out.dtype), words[index])
        own = len(layout.bases)  # what follows are partners that were only loaded
        for v, word in zip(vectors[:own], words[:own], strict=True):
            v.store(target, word)

    q, k = _heads_of(inputs.q, inputs.k, spec, options)
    q_programs, k_programs = programs
    if config.k_first:
        is_k, k_before = _below(program, k_programs), program
    else:
        is_k, k_before = _interleaved(program, q_programs, k_programs)
    with mgpu.when(is_k):
        norm_and_rope(k_before, k, inputs.k_weight, outputs.k, outputs.v)
    with mgpu.when(_equal(is_k, 0)):
        block = arith.subi(program, _min(k_before, k_programs))
        norm_and_rope(block, q, inputs.q_weight, outputs.q, outputs.gate)


def _interleaved(index: Value, q_count: int, k_count: int) -> tuple[Value, Value]:
    """Whether a program or warp takes k rows, and how many before it do, up to `k_count`.

    Every period-th does, so that k rows are spread evenly among q rows.
    """
    period = (q_count + k_count) // k_count
    group = _div(index, period)
    return arith.andi(_equal(_rem(index, period), period - 1), _below(group, k_count)), group


class _Heads(NamedTuple):
    """Where the rows (token, head) of q, of k, or of a gradient lie in an array, counted in elements."""

    array: "_Pointer"
    num_heads: int
    stride: int  # from a head to the next
    beside: int  # from a row to what is copied beside it, where something is
    first: int = 0  # where the first row lies
    gap: int = 0  # between the last head of a token and the first of the next

    def row(self, row: Value) -> "_Pointer":
        start = self.array + self.offset(row)
        return start + self.first if self.first else start

    def offset(self, row: Value) -> Value:
        """Of a row from the first one."""
        offset = _mul(_resized(row, 64), self.stride)
        if not self.gap:
            return offset
        return _add(offset, _mul(_resized(_div(row, self.num_heads), 64), self.gap))


def _heads_of(q: "_Pointer", k: "_Pointer | None", spec: Spec, options: Options) -> tuple[_Heads, _Heads]:
    """q with the gate beside it, and k with v, or their gradients."""
    d, num_q_heads, num_kv_heads = spec.head_dim, spec.num_q_heads, spec.num_kv_heads
    q_stride = d if options.gate is None else 2 * d
    if k is not None:
        return _Heads(q, num_q_heads, q_stride, d), _Heads(k, num_kv_heads, d, 0)
    q_width, kv_width = num_q_heads * q_stride, num_kv_heads * d
    return (
        _Heads(q, num_q_heads, q_stride, d, gap=2 * kv_width),
        _Heads(q, num_kv_heads, d, kv_width, first=q_width, gap=q_width + kv_width),
    )


class _Vector(NamedTuple):
    """Consecutive lanes of a row that a thread reads or writes at once."""

    column: Value
    base: int
    lanes: int
    exists: Value | None = None  # False where the vector repeats another thread's; None: nowhere

    def load(self, row: "_Pointer") -> list[Value]:
        return (row + self.column + self.base).load(self.lanes)

    def store(self, row: "_Pointer", words: list[Value]) -> None:
        (row + self.column + self.base).store(words)


class _Rotation(NamedTuple):
    """A pair of vectors that RoPE rotates into each other."""

    own: int
    other: int
    is_first: Value | None  # whether own is the pair's first and other was only loaded; None: both are the thread's
    where: Value | None  # None: everywhere
    frequency: Value

    def apply(
        self, ys: list[list[Value]], cos: list[Value], sin: list[Value], fuses_y2: bool
    ) -> dict[int, list[Value]]:
        own, other = ys[self.own], ys[self.other]
        if self.is_first is None:
            first, second = _rotate(own, other, cos, sin, fuses_y2)
            return {self.own: first, self.other: second}
        halves = _select(self.is_first, own, other), _select(self.is_first, other, own)
        first, second = _rotate(*halves, cos, sin, fuses_y2)
        return {self.own: _select(self.is_first, first, second)}


def _vectors_and_rotations(
    layout: _Layout, place: Value, head_dim: int, rotary_dim: int
) -> tuple[list[_Vector], list[_Rotation]]:
    """A thread's vectors, those of the layout's bases first, and their rotations."""
    half, rotations = rotary_dim // 2, []
    column = _scatter(place, layout.bits)
    vectors = [_vector(column, base, layout.lanes, layout.reach, head_dim) for base in layout.bases]
    for index, base in enumerate(layout.bases):
        if layout.partners and base < half:
            where = None if layout.reach <= rotary_dim else _below(column, rotary_dim)
            frequency = _add(column if layout.reach <= half else _and(column, half - 1), base)
            rotations.append(_Rotation(index, layout.bases.index(base + half), None, where, frequency))
        elif not layout.partners and base < rotary_dim:
            lane = _add(vectors[index].column, base)
            is_first = _below(lane, half)
            where = None if base + layout.reach <= rotary_dim else _below(lane, rotary_dim)
            # Lanes without a partner read themselves and frequency 0.
            (partner,) = _select(where, _select(is_first, [_add(lane, half)], [_add(lane, -half)]), [lane])
            (frequency,) = _select(where, _select(is_first, [lane], [_add(lane, -half)]), [_constant(0, 32)])
            rotations.append(_Rotation(index, len(vectors), is_first, where, frequency))
            vectors.append(_Vector(partner, 0, layout.lanes))
    return vectors, rotations


def _copied_vectors(layout: _Layout, place: Value, head_dim: int, dtype: jnp.dtype) -> list[_Vector]:
    """Vectors as wide as an access can be, whatever the layout."""
    lanes = math.gcd(_ACCESS_BYTES // dtype.itemsize, head_dim)
    reach, column = layout.threads * lanes, _mul(place, lanes)
    return [_vector(column, base, lanes, reach, head_dim) for base in range(0, head_dim, reach)]


def _vector(column: Value, base: int, lanes: int, reach: int, head_dim: int) -> _Vector:
    """The vector of a thread at base + column; past the end of the row, the row's last."""
    if base + reach <= head_dim:
        return _Vector(column, base, lanes)
    return _Vector(_min(column, head_dim - lanes - base), base, lanes, _below(column, head_dim - base))


def _scatter(place: Value, bits: tuple[int, ...]) -> Value:
    """The column whose bits[i] is bit i of `place`."""
    column = _constant(0, 32)
    for shift in sorted({bit - i for i, bit in enumerate(bits)}):
        mask = sum(1 << i for i, bit in enumerate(bits) if bit - i == shift)
        column = _add(column, _mul(_and(place, mask), 1 << shift))
    return column


def _tree_sum(xs: list[list[Value]], vectors: list[_Vector], layout: _Layout, place: Value, head_dim: int) -> Value:
    """The sum of squares over the row, in the order of `tree_order`, in every thread of the row's group.

    Squares are never -0.0, so lanes that D lacks, which would add 0.0, are left out.
    """
    own, order = len(layout.bases), tree_order(next_power_of_2(head_dim))
    lanes: dict[int, Value] = {}
    for v, x in zip(vectors[:own], xs[:own], strict=True):
        lanes |= {v.base + i: _select(v.exists, [value], [_f32(0.0)])[0] for i, value in enumerate(x)}
    if order[0] == 0:
        sums, order = _sums_of_pairs(lanes, layout, place), order[1:]
    else:
        sums = {lane: arith.mulf(x, x) for lane, x in lanes.items()}
    for bit in order:
        step = 1 << bit
        if bit in layout.bits:
            distance = 1 << layout.bits.index(bit)
            sums = {lane: arith.addf(s, mgpu.shfl_bfly(s, distance)) for lane, s in sums.items()}
        else:
            sums = {
                lane: arith.addf(s, sums[lane + step]) if lane + step in sums else s
                for lane, s in sums.items()
                if not lane & step
            }
    return sums[0]


def _sums_of_pairs(lanes: dict[int, Value], layout: _Layout, place: Value) -> dict[int, Value]:
    """x0² + x1² of neighbouring lanes: one product, and the other fused onto it, as in the serving kernel.

    Products of 16-bit lanes are exact above 2^-133, so the form shows in float32 alone, and in squares below that.
    """
    if 0 not in layout.bits:
        return {lane: _sum_of_pair(x, lanes.get(lane + 1)) for lane, x in lanes.items() if not lane & 1}
    distance = 1 << layout.bits.index(0)
    is_second = _equal(_and(place, distance), distance)
    sums = {}
    for lane, x in lanes.items():
        other = mgpu.shfl_bfly(x, distance)
        sums[lane] = _sum_of_pair(arith.select(is_second, other, x), arith.select(is_second, x, other))
    return sums


def _sum_of_pair(first: Value, second: Value | None) -> Value:
    return arith.mulf(first, first) if second is None else mlir_math.fma(first, first, arith.mulf(second, second))


def _effective_weights(words: list[Value], dtype: jnp.dtype, norm_beta: float) -> list[Value]:
    """The float32 lanes of `words` plus norm_beta.

    Adding 0.0 stays, to two lanes an instruction: it makes a weight of -0.0 positive, as in the serving kernel.
    """
    if norm_beta or words[0].type.width < 8 * 2 * dtype.itemsize or dtype == jnp.float32:
        return [arith.addf(lane, _f32(norm_beta)) for lane in _widen(words, dtype)]
    name = {"bfloat16": "bf16x2", "float16": "f16x2"}[dtype.name]
    code = f"{{ .reg .b32 zero; mov.b32 zero, 0; add.rn.{name} $0, $1, zero; }}"
    return _widen([_ptx(code, "=r,r", word.type, word) for word in words], dtype)


@dataclasses.dataclass(frozen=True)
class _Table:
    """cos_sin_cache (max_position, R) as one thread reads it, for a token's one or three positions."""

    cache: "_Pointer"
    positions: "_Pointer | None"  # None: the row of a token is its own
    max_position: int
    num_tokens: int
    options: Options

    def positions_of(self, token: Value) -> list[Value]:
        """A token's positions, one for each row of `positions`; without positions, the token itself."""
        if self.positions is None:
            return [token]
        first = self.positions + _resized(token, 64)
        num_axes = 1 if self.options.mrope_section is None else 3
        return [(first + axis * self.num_tokens).load_integer() for axis in range(num_axes)]

    def row(self, position: Value) -> "_Pointer":
        """A position's row of the table; row 0 stands for a position outside.

        Compared in the given integer type, so that 2^32 + 3 is not 3; no address outside the table is formed.
        """
        row = position
        if self.positions is not None:
            inside = _below(position, self._limit(position))  # unsigned: a negative position is a large one
            (row,) = _select(inside, [_resized(position, 32)], [_constant(0, 32)])
        return self.cache.row(row, self.options.rotary_dim)

    def load(self, rows: list["_Pointer"], frequency: Value, lanes: int) -> list[tuple[list[Value], list[Value]]]:
        """The words of cos and sin of consecutive frequencies, for each of the token's positions."""
        half = self.options.rotary_dim // 2
        return [((row + frequency).load(lanes), (row + frequency + half).load(lanes)) for row in rows]

    def angles(self, positions: list[Value], loaded, frequency: Value) -> tuple[list[Value], list[Value]]:
        """float32 cos and sin of consecutive frequencies; NaN in cos, which spoils both halves, past the table."""
        axes = []
        for position, (cos, sin) in zip(positions, loaded, strict=True):
            if self.positions is not None:
                at_least = arith.CmpIPredicate.sge if _is_signed(self.positions.dtype) else arith.CmpIPredicate.uge
                is_past = arith.cmpi(at_least, position, mgpu.c(self._limit(position), position.type))
                cos = _select(is_past, [_nan(word, self.cache.dtype) for word in cos], cos)
            axes.append((_widen(cos, self.cache.dtype), _widen(sin, self.cache.dtype)))
        (cos, sin), *others = axes
        for axis, (other_cos, other_sin) in enumerate(others, start=1):
            for lane, reads in enumerate(_mrope_reads(frequency, axis, len(cos), self.options)):
                other = [other_cos[lane], other_sin[lane]]
                cos[lane], sin[lane] = _select(reads, other, [cos[lane], sin[lane]])
        return cos, sin

    def _limit(self, position: Value) -> int:
        return min(self.max_position, 2 ** (position.type.width - 1) - 1)


def _mrope_reads(frequency: Value, axis: int, lanes: int, options: Options) -> Iterator[Value]:
    """Whether each of up to `lanes` consecutive frequencies reads positions row `axis`; those left out never do."""
    section = options.mrope_section or (0, 0, 0)
    if options.mrope_layout == "sectioned":
        first, size = sum(section[:axis]), section[axis]  # a frequency below the first is a large unsigned difference
        return (_below(_add(frequency, lane - first), size) for lane in range(min(lanes, first + size)))
    # Interleaved: frequency j reads row `axis` if j % 3 == axis and j < 3 * section[axis].
    remainder, limit = _rem(frequency, 3), 3 * section[axis]
    return (
        _and(_equal(remainder, (axis - lane) % 3), _below(frequency, limit - lane)) for lane in range(min(lanes, limit))
    )


def _inv_rms(sum_of_squares: Value, head_dim: int, eps: float) -> Value:
    """The instructions of the serving kernel: one fused multiply-add with the approximate reciprocal of D."""
    code = "{ .reg .f32 t; rcp.approx.ftz.f32 t, $2; fma.rn.f32 t, $1, t, $3; rsqrt.approx.ftz.f32 $0, t; }"
    return _ptx(code, "=f,f,f,f", sum_of_squares.type, sum_of_squares, _f32(head_dim), _f32(eps))


def _rotate(first, second, cos, sin, fuses_y2: bool) -> tuple[list[Value], list[Value]]:
    """One product of each sum is rounded and the other fused, as in the serving kernel."""
    lanes = list(zip(first, second, cos, sin, strict=True))
    return (
        [mlir_math.fma(a, c, arith.negf(arith.mulf(b, s))) for a, b, c, s in lanes],
        [
            mlir_math.fma(b, c, arith.mulf(a, s)) if fuses_y2 else mlir_math.fma(a, s, arith.mulf(b, c))
            for a, b, c, s in lanes
        ],
    )


# Lanes travel between registers and memory as words: 32 bits with one or two lanes, or 16 bits with a single lane.


def _widen(words: list[Value], dtype: jnp.dtype) -> list[Value]:
    """The float32 lanes of `words`."""
    f16, f32 = ir.F16Type.get(), ir.F32Type.get()
    lanes = []
    for word in words:
        is_pair = word.type.width == 8 * 2 * dtype.itemsize
        if dtype == jnp.float32:
            lanes.append(arith.bitcast(f32, word))
        elif dtype == jnp.bfloat16:
            halves = [_shl(_resized(word, 32), 16), *([_and(word, -(1 << 16))] if is_pair else [])]
            lanes += [arith.bitcast(f32, half) for half in halves]
        else:
            halves = [_resized(word, 16), *([_resized(_shr(word, 16), 16)] if is_pair else [])]
            lanes += [arith.extf(f32, arith.bitcast(f16, half)) for half in halves]
    return lanes


def _narrow(lanes: list[Value], dtype: jnp.dtype) -> list[Value]:
    """The words of float32 `lanes`, rounded to nearest even, two lanes an instruction."""
    i16, i32 = (ir.IntegerType.get_signless(width) for width in (16, 32))
    if dtype == jnp.float32:
        return [arith.bitcast(i32, lane) for lane in lanes]
    name = {"bfloat16": "bf16", "float16": "f16"}[dtype.name]
    if len(lanes) == 1:
        return [_ptx(f"cvt.rn.{name}.f32 $0, $1;", "=h,f", i16, *lanes)]
    pairs = zip(lanes[::2], lanes[1::2], strict=True)
    return [_ptx(f"cvt.rn.{name}x2.f32 $0, $2, $1;", "=r,f,f", i32, low, high) for low, high in pairs]


@dataclasses.dataclass(frozen=True)
class _Pointer:
    """An element of a global array. Offsets are counted in elements, in 64 bits where a row number enters."""

    address: Value
    dtype: jnp.dtype

    @classmethod
    def to(cls, ref: Value, dtype: jnp.dtype) -> "_Pointer":
        # The address space makes ld.global and st.global of what would be generic accesses.
        return cls(llvm.addrspacecast(llvm.PointerType.get(1), mgpu.memref_ptr(ref)), dtype)

    def __add__(self, elements: int | Value) -> "_Pointer":
        index = _constant(elements, 64) if isinstance(elements, int) else elements
        element = ir.IntegerType.get_signless(8 * self.dtype.itemsize)
        return _Pointer(mgpu.getelementptr(self.address, [index], element), self.dtype)

    def row(self, index: Value, lanes: int) -> "_Pointer":
        return self + _mul(_resized(index, 64), lanes)

    def load(self, lanes: int) -> list[Value]:
        """The words of consecutive lanes, up to 16 bytes an access."""
        words = []
        for address, kind, count in self._accesses(lanes):
            value = llvm.load(kind, address)
            words += [_extract(value, i) for i in range(count)] if count > 1 else [value]
        return words

    def store(self, words: list[Value]) -> None:
        lanes = len(words) * words[0].type.width // (8 * self.dtype.itemsize)
        for address, kind, count in self._accesses(lanes):
            piece, words = words[:count], words[count:]
            llvm.store(vector.from_elements(kind, piece) if count > 1 else piece[0], address)

    def _accesses(self, lanes: int):
        """(address, type, words) of the accesses that make up consecutive lanes."""
        num_bytes = lanes * self.dtype.itemsize
        word = ir.IntegerType.get_signless(8 * min(4, num_bytes))
        num_words = num_bytes * 8 // word.width
        count = min(num_words, 8 * _ACCESS_BYTES // word.width)
        kind = word if count == 1 else ir.VectorType.get((count,), word)
        return [(mgpu.getelementptr(self.address, [first], word), kind, count) for first in range(0, num_words, count)]

    def load_integer(self) -> Value:
        """The integer, of 32 or 64 bits."""
        value = llvm.load(ir.IntegerType.get_signless(8 * self.dtype.itemsize), self.address)
        if value.type.width >= 32:
            return value
        extend = arith.extsi if _is_signed(self.dtype) else arith.extui
        return extend(ir.IntegerType.get_signless(32), value)


def _is_signed(dtype: jnp.dtype) -> bool:
    return jnp.issubdtype(dtype, jnp.signedinteger)


def _constant(value: int, width: int) -> Value:
    return mgpu.c(value, ir.IntegerType.get_signless(width))


def _f32(value: float) -> Value:
    return mgpu.c(float(value), ir.F32Type.get())


def _nan(word: Value, dtype: jnp.dtype) -> Value:
    """A word of NaN."""
    lane = {"float16": 0x7E00, "bfloat16": 0x7FC0, "float32": 0x7FC00000}[dtype.name]
    return mgpu.c(lane if dtype.itemsize * 8 == word.type.width else lane * 0x10001, word.type)


def _resized(value: Value, width: int) -> Value:
    """An unsigned integer in `width` bits."""
    if value.type.width == width:
        return value
    resize = arith.extui if value.type.width < width else arith.trunci
    return resize(ir.IntegerType.get_signless(width), value)


def _integer_operation(operation):
    def apply(a: Value, b: Value | int) -> Value:
        return operation(a, b if isinstance(b, ir.Value) else mgpu.c(b, a.type))

    return apply


_add, _mul, _div, _rem, _min, _and, _shl, _shr, _below, _equal = map(
    _integer_operation,
    (
        arith.addi,
        arith.muli,
        arith.divui,
        arith.remui,
        arith.minui,
        arith.andi,
        arith.shli,
        arith.shrui,
        functools.partial(arith.cmpi, arith.CmpIPredicate.ult),
        functools.partial(arith.cmpi, arith.CmpIPredicate.eq),
    ),
)


def _select(where: Value | None, a: list[Value], b: list[Value]) -> list[Value]:
    """Elements of `a` where `where` holds, of `b` elsewhere; None holds everywhere."""
    if where is None:
        return a
    return [arith.select(where, x, y) for x, y in zip(a, b, strict=True)]


def _extract(value: Value, index: int) -> Value:
    return vector.extract(value, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([index]))


def _ptx(code: str, constraints: str, kind: ir.Type, *args: Value) -> Value:
    return llvm.inline_asm(kind, list(args), code, constraints)
