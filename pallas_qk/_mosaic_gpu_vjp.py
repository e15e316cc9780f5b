"""The op's backward pass as Pallas GPU kernels on the Mosaic GPU backend.

T num_tokens, Hq num_q_heads, Hkv num_kv_heads, D head_dim, R rotary_dim, G threads of a row, V lanes of a vector.

One main kernel reads every activation and cotangent once. Its warps are persistent: each walks over rows (token, head)
of q or of k, holds a row in the registers of G threads, and adds to the weight's gradient lane by lane in the thread
that holds the lane. What a warp has in the end is one float32 partial row, which its program sums with those of its
other warps; a small second kernel sums the programs' rows. Every order is fixed.

No shared memory: a kernel that uses any of it, 256 bytes even, is launched with a carve-out that leaves 28 KB of L1
(see `_triton_vjp`, where that was measured). So warps meet in global memory.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import utils as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm, scf
from jaxlib.mlir.dialects import math as mlir_math

from pallas_qk._config import MosaicBackward, Options, Spec, mosaic_backward, mosaic_backward_group, next_power_of_2
from pallas_qk._mosaic_gpu import (
    _ACCESS_BYTES,
    _WARP,
    _WARPGROUP,
    Value,
    _add,
    _and,
    _below,
    _constant,
    _copied_vectors,
    _div,
    _effective_weights,
    _equal,
    _f32,
    _Heads,
    _heads_of,
    _interleaved,
    _inv_rms,
    _launch,
    _Layout,
    _min,
    _mrope_reads,
    _mul,
    _narrow,
    _Pointer,
    _ptx,
    _rem,
    _resized,
    _select,
    _Table,
    _Vector,
    _vector,
    _widen,
)
from pallas_qk._operands import Gradients, Inputs, Outputs, gradient_types, spec_of
from pallas_qk._target import num_sms

BACKWARD_NAME = "pallas_qk_mosaic_gpu_backward"
SUM_NAME = "pallas_qk_mosaic_gpu_sum"

_SUM_ROWS = 16  # that one warp of the second kernel reads side by side


def backward(
    inputs: Inputs, cotangents: Outputs, *, options: Options, config: MosaicBackward | None = None
) -> Gradients:
    """The contract of `_reference.backward`."""
    spec, types, dtype = spec_of(inputs, options), gradient_types(inputs, options), inputs.q.dtype
    if spec.num_tokens == 0:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), types)
    if config is None:
        num_axes = 1 if options.mrope_section is None else 3
        cache_itemsize = inputs.cos_sin_cache.dtype.itemsize
        config = mosaic_backward(spec, num_sms(), num_axes=num_axes, cache_itemsize=cache_itemsize)
    thread = functools.partial(
        _backward_thread,
        max_position=inputs.cos_sin_cache.shape[0],
        spec=spec,
        options=options,
        config=config,
        layout=_backward_layout(config, spec.head_dim, options.rotary_dim, dtype),
    )
    num_programs = pl.cdiv(config.q_warps + config.k_warps, _num_warps(config.num_warpgroups))
    of_warps, of_programs = (
        jax.ShapeDtypeStruct((rows, spec.head_dim), jnp.float32)
        for rows in (config.q_warps + config.k_warps, num_programs)
    )
    written_types = types if num_programs == 1 else types._replace(q_weight=of_programs, k_weight=of_programs)
    gradients, _ = _launch(
        BACKWARD_NAME,
        thread,
        (inputs, cotangents),
        (written_types, of_warps),
        num_programs=num_programs,
        num_warpgroups=config.num_warpgroups,
    )
    if num_programs == 1:
        return gradients
    dq_weight, dk_weight = _sum_rows([gradients.q_weight, gradients.k_weight], [types.q_weight, types.k_weight])
    return gradients._replace(q_weight=dq_weight, k_weight=dk_weight)


def _warp(program: Value, num_warpgroups: int) -> Value:
    """The number of the warp, broadcast within it, which tells the compiler that its threads never part ways.

    Without that knowledge ptxas writes every loop with shuffles twice and takes 87 registers instead of 80.
    """
    return _add(_mul(program, _num_warps(num_warpgroups)), mgpu.warp_idx())


def _num_warps(num_warpgroups: int) -> int:
    """Warps of a program."""
    return num_warpgroups * _WARPGROUP // _WARP


def _backward_layout(config: MosaicBackward, head_dim: int, rotary_dim: int, dtype: jnp.dtype) -> _Layout:
    """Each thread's vectors lie G*V lanes apart. V is the same in every configuration, and with it the sums' order."""
    threads, lanes = mosaic_backward_group(head_dim, rotary_dim, dtype.itemsize, config.rows_per_warp)
    bits = tuple((lanes << i).bit_length() - 1 for i in range(threads.bit_length() - 1))
    return _Layout(threads, lanes, tuple(range(0, head_dim, threads * lanes)), bits, partners=False)


def _backward_thread(
    program: Value,
    read: tuple[Inputs, Outputs],
    written: tuple[Gradients, _Pointer],
    *,
    max_position: int,
    spec: Spec,
    options: Options,
    config: MosaicBackward,
    layout: _Layout,
) -> None:
    """One thread: its lanes of each row that its warp walks over. The weights' gradients are one row a program."""
    inputs, cotangents = read
    gradients, partials = written
    num_tokens, head_dim, dtype = spec.num_tokens, spec.head_dim, gradients.q.dtype
    table = _Table(inputs.cos_sin_cache, inputs.positions, max_position, num_tokens, options)
    lane_id = _and(mgpu.thread_idx(), _WARP - 1)
    place = _and(lane_id, layout.threads - 1)
    column = _mul(place, layout.lanes)
    vectors = [_vector(column, base, layout.lanes, layout.reach, head_dim) for base in layout.bases]
    copied_vectors = _copied_vectors(layout, place, head_dim, dtype)
    rotations = _rotations(vectors, layout, lane_id, dtype, table)
    rows_per_step = _WARP // layout.threads
    num_sums = len(vectors) * layout.lanes

    def walk(first, num_warps, source, weight, dy, dcopied, target):
        num_rows = num_tokens * source.num_heads
        tiles = pl.cdiv(num_rows, rows_per_step)

        def row_of(tile):
            if rows_per_step == 1:
                return tile
            return _add(_mul(tile, rows_per_step), _div(lane_id, layout.threads))

        def positions_of(row):
            return table.positions_of(_div(_min(row, num_rows - 1), source.num_heads))

        weights = [w for v in vectors for w in _effective_weights(v.load(weight), weight.dtype, options.norm_beta)]

        def step(tile, carried):
            sums, ahead = carried[:num_sums], carried[num_sums:]
            row, exists = row_of(tile), None
            if num_rows % rows_per_step:
                exists = _below(row, num_rows)
                row = _min(row, num_rows - 1)

            table_rows = [table.row(position) for position in ahead]
            xs = [_at(source, row, v).load(v.lanes) for v in vectors]
            ds = [_at(dy, row, v).load(v.lanes) for v in vectors]
            if dcopied is not None:
                copied = [_at(dcopied, row, v).load(v.lanes) for v in copied_vectors]
            angles = [table.load(table_rows, rotation.frequency, layout.lanes) for rotation in rotations]
            ahead = positions_of(row_of(_add(tile, num_warps)))  # the next row's table loads then wait for nothing
            if dcopied is not None:
                for v, words in zip(copied_vectors, copied, strict=True):
                    (_at(target, row, v) + target.beside).store(words)
            _keep_above(row)

            lanes = [lane for words in xs for lane in _widen(words, dtype)]
            dys = [_widen(words, dtype) for words in ds]
            for index, (rotation, loaded) in enumerate(zip(rotations, angles, strict=True)):
                cos, sin = rotation.angles(table, loaded)
                partner = _widen(rotation.partner(ds), dtype)
                rotated = [
                    mlir_math.fma(p, s, arith.mulf(d, c))
                    for d, p, c, s in zip(dys[index], partner, cos, sin, strict=True)
                ]
                dys[index] = _select(rotation.where, rotated, dys[index])

            inv_rms = _inv_rms(_row_sum(lanes, lanes, vectors, layout), head_dim, options.eps)
            scaled = [arith.mulf(d, inv_rms) for dy_lanes in dys for d in dy_lanes]
            added = [mlir_math.fma(d, lane, s) for d, lane, s in zip(scaled, lanes, sums, strict=True)]
            weighted = [arith.mulf(d, w) for d, w in zip(scaled, weights, strict=True)]
            # dx = g - x * r^2/D * sum(g * x), where r = 1/rms and g = dy * r * w.
            dot = arith.mulf(_row_sum(weighted, lanes, vectors, layout), inv_rms)
            factor = arith.mulf(dot, arith.mulf(inv_rms, _f32(-1 / head_dim)))
            dxs = [mlir_math.fma(lane, factor, g) for lane, g in zip(lanes, weighted, strict=True)]
            for v, piece in zip(vectors, _pieces(dxs, layout.lanes), strict=True):
                _at(target, row, v).store(_narrow(piece, dtype))
            return [*_select(exists, added, sums), *ahead]

        zeros = [_f32(0.0)] * num_sums
        ahead = positions_of(row_of(first))
        sums = _loop(first, _constant(tiles, 32), num_warps, [*zeros, *ahead], step)[:num_sums]
        distance = layout.threads
        while distance < _WARP:
            sums = [arith.addf(s, mgpu.shfl_bfly(s, distance)) for s in sums]
            distance *= 2
        for v, piece in zip(vectors, _pieces(sums, layout.lanes), strict=True):
            v.store(partials.row(warp, head_dim), _narrow(piece, partials.dtype))

    def dense(array, heads):
        return None if array is None else _Heads(array, heads.num_heads, head_dim, beside=0)

    q, k = _heads_of(inputs.q, inputs.k, spec, options)
    dq, dk = _heads_of(gradients.q, gradients.k, spec, options)
    dq_out, dk_out, dv_out, dgate_out = (dense(x, h) for x, h in zip(cotangents, (q, k, k, q), strict=True))
    warp, q_warps, k_warps = _warp(program, config.num_warpgroups), config.q_warps, config.k_warps
    is_k, k_before = _interleaved(warp, q_warps, k_warps)
    with mgpu.when(is_k):
        walk(k_before, k_warps, k, inputs.k_weight, dk_out, dv_out, dk)
    with mgpu.when(arith.andi(_equal(is_k, 0), _below(warp, q_warps + k_warps))):
        walk(arith.subi(warp, _min(k_before, k_warps)), q_warps, q, inputs.q_weight, dq_out, dgate_out, dq)

    # What other warps of the program wrote to global memory is there after the barrier.
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [], "bar.sync 0;", "~{memory}", has_side_effects=True)
    num_warps = _num_warps(config.num_warpgroups)
    warps = [_add(_mul(program, num_warps), i) for i in range(num_warps)]
    for start in range(0, 2 * head_dim, config.num_warpgroups * _WARPGROUP):
        # One column of q's rows or of k's. Every row is loaded before the first addition.
        index = _add(mgpu.thread_idx(), start)
        of_k = _equal(_below(index, head_dim), 0)
        with mgpu.when(_below(index, 2 * head_dim)):
            (column,) = _select(of_k, [_add(index, -head_dim)], [index])
            terms = []
            for other in warps:
                row = partials.row(_min(other, q_warps + k_warps - 1), head_dim)
                (value,) = _widen((row + column).load(1), partials.dtype)
                takes_k, _ = _interleaved(other, q_warps, k_warps)
                counts = arith.andi(_equal(takes_k, of_k), _below(other, q_warps + k_warps))
                terms += _select(counts, [value], [_f32(0.0)])
            total = functools.reduce(arith.addf, terms)
            for which, array in ((0, gradients.q_weight), (1, gradients.k_weight)):
                with mgpu.when(_equal(of_k, which)):
                    (array.row(program, head_dim) + column).store(_narrow([total], array.dtype))


class _InverseRotation(NamedTuple):
    """The inverse rotation of one of a thread's vectors, whose RoPE partner a thread of the same group holds."""

    where: Value | None  # None: everywhere
    frequency: Value
    signs: Value  # bits to flip in a word of the partner: in the second half the signs
    sources: dict[int, Value]  # vectors that hold partners, and where they do
    holder: Value | None  # the thread of the warp that holds the partner; None: this one
    masks: list[list[Value]]  # bits of each word of angles that mRoPE reads at its second and third position

    def partner(self, ds: list[list[Value]]) -> list[Value]:
        """The partner's words, negated in the second half."""
        words: list[Value] = []
        for index, where in self.sources.items():
            held = ds[index] if self.holder is None else [_from_lane(word, self.holder) for word in ds[index]]
            words = _select(where, held, words) if words else held
        return [arith.xori(word, self.signs) for word in words]

    def angles(self, table: _Table, loaded) -> tuple[list[Value], list[Value]]:
        """float32 cos and sin, merged by mRoPE."""
        dtype = table.cache.dtype
        (cos, sin), *others = loaded
        # Merged before they are widened: 16 instructions a position where selecting lanes takes 50.
        for masks, (other_cos, other_sin) in zip(self.masks, others, strict=True):
            cos, sin = _merged(masks, other_cos, cos), _merged(masks, other_sin, sin)
        return _widen(cos, dtype), _widen(sin, dtype)


def _rotations(vectors: list[_Vector], layout: _Layout, lane_id: Value, dtype: jnp.dtype, table: _Table):
    """The rotations of the first vectors, in turn."""
    rotary_dim, rotations = table.options.rotary_dim, []
    half, reach = rotary_dim // 2, layout.reach
    signs = _repeated(1 << (8 * dtype.itemsize - 1), layout.lanes, dtype)
    for vector in vectors:
        if vector.base >= rotary_dim:
            break
        first = _add(vector.column, vector.base)
        where = None if vector.base + reach <= rotary_dim else _below(first, rotary_dim)
        in_first_half = _below(first, half)
        # Lanes without a partner read themselves and frequency 0.
        (partner,) = _select(where, _select(in_first_half, [_add(first, half)], [_add(first, -half)]), [first])
        (frequency,) = _select(where, _select(in_first_half, [first], [_add(first, -half)]), [_constant(0, 32)])
        (flipped,) = _select(in_first_half, [_constant(0, signs.type.width)], [signs])
        rotated = range(vector.base, min(vector.base + reach, rotary_dim), layout.lanes)
        partners = [f + half if f < half else f - half for f in rotated]
        sources = {index: _equal(_div(partner, reach), index) for index in sorted({p // reach for p in partners})}
        holder = None
        if any((p - f) % reach for p, f in zip(partners, rotated, strict=True)):
            holder = _add(_and(lane_id, _WARP - layout.threads), _div(_rem(partner, reach), layout.lanes))
        masks = _mrope_masks(frequency, layout.lanes, table)
        rotations.append(_InverseRotation(where, frequency, flipped, sources, holder, masks))
    return rotations


def _mrope_masks(frequency: Value, lanes: int, table: _Table) -> list[list[Value]]:
    """For mRoPE's second and third position: the bits of each word of consecutive frequencies that are read there."""
    dtype, masks = table.cache.dtype, []
    width = _word_bits(lanes, dtype)
    per_word = width // (8 * dtype.itemsize)
    for axis in (1, 2) if table.options.mrope_section else ():
        each_reads = _mrope_reads(frequency, axis, lanes, table.options)
        words = [_constant(0, width)] * (lanes // per_word)
        for lane, reads in enumerate(each_reads):
            ones = ((1 << 8 * dtype.itemsize) - 1) << (lane % per_word * 8 * dtype.itemsize)
            (own,) = _select(reads, [_constant(ones, width)], [_constant(0, width)])
            words[lane // per_word] = arith.ori(words[lane // per_word], own)
        masks.append(words)
    return masks


def _merged(masks: list[Value], a: list[Value], b: list[Value]) -> list[Value]:
    """The bits of `a` where the masks have ones, of `b` elsewhere."""
    return [arith.xori(y, _and(arith.xori(x, y), mask)) for mask, x, y in zip(masks, a, b, strict=True)]


def _row_sum(xs: list[Value], ys: list[Value], vectors: list[_Vector], layout: _Layout) -> Value:
    """The sum of x * y over the row, in every thread of its group, in an order that only V decides."""
    sums = {}
    for v, x, y in zip(vectors, _pieces(xs, layout.lanes), _pieces(ys, layout.lanes), strict=True):
        total = _f32(0.0)  # a sum that starts with 0.0 is not -0.0, so vectors that a row lacks change nothing
        for a, b in zip(x, y, strict=True):
            total = mlir_math.fma(a, b, total)
        (sums[v.base],) = _select(v.exists, [total], [_f32(0.0)])
    step = next_power_of_2(layout.bases[-1] + 1) // 2
    while step >= layout.reach:
        sums = {b: arith.addf(s, sums[b + step]) if b + step in sums else s for b, s in sums.items() if not b & step}
        step //= 2
    total, distance = sums[0], layout.threads // 2
    while distance:
        total = arith.addf(total, mgpu.shfl_bfly(total, distance))
        distance //= 2
    return total


def _sum_rows(partials: list[jax.Array], types: list[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    """The sum (D,) over the rows of each array (rows, D), in a fixed order, as `types`."""
    num_rows, head_dim = partials[0].shape
    lanes = math.gcd(_ACCESS_BYTES // 4, head_dim)
    threads = _WARP // _SUM_ROWS  # side by side in a row
    warps = pl.cdiv(head_dim, threads * lanes)  # of an array

    def thread(program, sources, targets):
        warp, lane_id = _warp(program, 1), _and(mgpu.thread_idx(), _WARP - 1)
        for source, target in zip(sources, targets, strict=True):
            with mgpu.when(_below(warp, warps)):
                column = _mul(_add(_mul(warp, threads), _rem(lane_id, threads)), lanes)
                column = _min(column, head_dim - lanes)
                total = [_f32(0.0)] * lanes
                for first in range(0, num_rows, _SUM_ROWS):
                    row = _add(_div(lane_id, threads), first)
                    words = (source.row(_min(row, num_rows - 1), head_dim) + column).load(lanes)
                    term = _select(_below(row, num_rows), _widen(words, source.dtype), [_f32(0.0)] * lanes)
                    total = [arith.addf(a, b) for a, b in zip(total, term, strict=True)]
                distance = threads
                while distance < _WARP:
                    total = [arith.addf(a, mgpu.shfl_bfly(a, distance)) for a in total]
                    distance *= 2
                (target + column).store(_narrow(total, target.dtype))
            # The warps of this array wrap around, above the number of any other's.
            warp = _add(warp, -warps)

    num_programs = pl.cdiv(warps * len(partials), _WARPGROUP // _WARP)
    return _launch(SUM_NAME, thread, partials, types, num_programs=num_programs, num_warpgroups=1)


def _at(heads: _Heads, row: Value, vector: _Vector) -> _Pointer:
    """Where a vector of a row lies, by an offset that LLVM can't see through.

    It would keep a pointer into each array in registers across the loop.
    """
    offset = _add(heads.offset(row), _resized(vector.column, 64))
    return heads.array + _ptx("mov.b64 $0, $1;", "=l,l", offset.type, offset) + (heads.first + vector.base)


def _keep_above(row: Value) -> None:
    """Keeps loads and stores in front of what follows; ptxas would sink some of them among the sums.

    It moves nothing across a pmevent, even one that a false predicate never lets happen (without it 192.8 us against
    188.8, T = 16384, 16/2 heads, two rows a warp; a bar.warp.sync it sinks).
    """
    code = "{ .reg .pred p; setp.eq.u32 p, $0, -1; @p pmevent 1; }"
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [row], code, "r", has_side_effects=True)


def _loop(begin: Value, stop: Value, step: int, carried: list[Value], body) -> list[Value]:
    """What `body(index, carried)` leaves of `carried` after the last index."""
    for_op: Value = scf.ForOp  # the bindings' stubs know only its generated part
    loop = for_op(begin, stop, _constant(step, 32), carried)
    with ir.InsertionPoint(loop.body):
        scf.yield_(body(loop.induction_variable, list(loop.inner_iter_args)))
    return list(loop.results)


def _from_lane(word: Value, lane_id: Value) -> Value:
    """The word that a thread of the warp holds."""
    every, clamp = _constant(-1, 32), _constant(_WARP - 1, 32)
    return _resized(nvvm.shfl_sync(every, _resized(word, 32), lane_id, clamp, nvvm.ShflKind.idx), word.type.width)


def _pieces(lanes: list[Value], size: int) -> list[list[Value]]:
    return [lanes[first : first + size] for first in range(0, len(lanes), size)]


def _word_bits(lanes: int, dtype: jnp.dtype) -> int:
    """Bits of each word of consecutive lanes."""
    return 8 * min(4, lanes * dtype.itemsize)


def _repeated(bits: int, lanes: int, dtype: jnp.dtype) -> Value:
    """The word with `bits` in each of its lanes."""
    width = _word_bits(lanes, dtype)
    return _constant(sum(bits << shift for shift in range(0, width, 8 * dtype.itemsize)), width)
