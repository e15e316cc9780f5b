"""The op's backward pass as a Pallas GPU kernel on the Mosaic GPU backend.

T num_tokens, Hq num_q_heads, Hkv num_kv_heads, D head_dim, R rotary_dim, G threads of a row, V lanes of a vector.

One main kernel reads every activation and cotangent once. Its warps are persistent: each walks over rows (token, head)
of q or of k, holds a row in the registers of G threads, and adds to the weight's gradient lane by lane in the thread
that holds the lane. What a warp has in the end is one float32 partial row, which its program sums with those of its
other warps; a small second kernel sums the programs' rows. Every order is fixed.

No shared memory: a kernel that uses any of it, 256 bytes even, is launched with a carve-out that leaves 28 KB of L1
(see `pallas_qk/_triton/backward.py`, where that was measured). So warps meet in global memory.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm
from jaxlib.mlir.dialects import math as mlir_math

from pallas_qk._mosaic_gpu.config import MosaicBackward, mosaic_backward, mosaic_backward_group
from pallas_qk._mosaic_gpu.emit import (
    WARP,
    WARPGROUP,
    Int,
    Pointer,
    Value,
    bits_of,
    butterfly,
    constant,
    f32,
    from_thread,
    keep_above,
    loop,
    narrow,
    ptx,
    repeated,
    select,
    thread_index,
    warp_index,
    when,
    widen,
    word_bits,
)
from pallas_qk._mosaic_gpu.launch import launch
from pallas_qk._mosaic_gpu.thread import (
    Layout,
    RowsIn,
    Table,
    Vector,
    copied_vectors,
    effective_weights,
    frequencies_of_pairs,
    inv_rms,
    mrope_reads,
    pieces,
    spread_k,
    vector,
)
from pallas_qk._mosaic_gpu.weight_sum import sum_rows
from pallas_qk._options import Options, Spec, next_power_of_2
from pallas_qk._rows import (
    Gradients,
    Inputs,
    Outputs,
    Place,
    Rows,
    gradient_types,
    moved,
    rows_for,
    sharing,
    spec_of,
    weight_of,
    weights_in,
)
from pallas_qk._target import cuda_target

BACKWARD_NAME = "pallas_qk_mosaic_gpu_backward"


def backward(
    inputs: Inputs, cotangents: Outputs, *, options: Options, config: MosaicBackward | None = None
) -> Gradients:
    """The contract of `_reference.backward`. A cotangent that has its rows where they belong is updated in place."""
    spec, types, dtype = spec_of(inputs, options), gradient_types(inputs, options), inputs.q.dtype
    if spec.num_tokens == 0:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), types)
    config = config or configuration(inputs, options)
    rows = rows_for(spec, options)
    thread = functools.partial(
        _backward_thread,
        rows=moved(rows),
        max_position=0 if inputs.cos_sin_cache is None else inputs.cos_sin_cache.shape[0],
        spec=spec,
        options=options,
        config=config,
        layout=_backward_layout(config, spec, dtype),
    )
    num_programs = pl.cdiv(config.q_warps + config.k_warps, _warps_per_program(config))
    of_warps, of_programs = (
        jax.ShapeDtypeStruct((rows, spec.head_dim), jnp.float32)
        for rows in (config.q_warps + config.k_warps, num_programs)
    )
    weights, written = weights_in(types), types
    if num_programs > 1:
        written = types._replace(**dict.fromkeys(weights, of_programs))
    in_place = {name: kind.source.array for name, kind in rows.items() if kind.handed_on}
    written = written._replace(**{array: getattr(cotangents, name) for name, array in in_place.items()})
    gradients, _ = launch(
        BACKWARD_NAME,
        thread,
        (inputs, cotangents._replace(**dict.fromkeys(in_place))),
        (written, of_warps if weights else None),
        num_programs=num_programs,
        num_warpgroups=config.num_warpgroups,
    )
    if not weights or num_programs == 1:
        return gradients
    summed = sum_rows(list(weights_in(gradients).values()), list(weights.values()))
    return gradients._replace(**dict(zip(weights, summed, strict=True)))


def configuration(inputs: Inputs, options: Options) -> MosaicBackward:
    """What the rule has for a call."""
    spec, cache_itemsize = spec_of(inputs, options), 0
    if inputs.cos_sin_cache is not None:
        cache_itemsize = inputs.cos_sin_cache.dtype.itemsize
    q_copied = bool(sharing(moved(rows_for(spec, options)), "q")[1])
    return mosaic_backward(
        spec, cuda_target(), q_copied=q_copied, num_axes=options.num_axes, cache_itemsize=cache_itemsize
    )


def _warps_per_program(config: MosaicBackward) -> int:
    return config.num_warpgroups * WARPGROUP // WARP


def _backward_layout(config: MosaicBackward, spec: Spec, dtype: jnp.dtype) -> Layout:
    """Each thread's vectors lie G*V lanes apart. V is the same in every configuration, and with it the sums' order."""
    threads, lanes = mosaic_backward_group(spec, dtype.itemsize, config.rows_per_warp)
    bits = tuple((lanes << i).bit_length() - 1 for i in range(threads.bit_length() - 1))
    return Layout(threads, lanes, tuple(range(0, spec.head_dim, threads * lanes)), bits, partners=False)


def _backward_thread(
    program: Int,
    read: tuple[Inputs, Outputs],
    written: tuple[Gradients, Pointer | None],
    *,
    rows: dict[str, Rows],
    max_position: int,
    spec: Spec,
    options: Options,
    config: MosaicBackward,
    layout: Layout,
) -> None:
    """One thread: its lanes of each row that its warp walks over. The weights' gradients are one row per program."""
    inputs, cotangents = read
    gradients, partials = written
    num_tokens, head_dim, dtype = spec.num_tokens, spec.head_dim, gradients.q.dtype
    table = Table(inputs.cos_sin_cache, inputs.positions, max_position, num_tokens, options)
    lane_id = thread_index() & WARP - 1
    member = lane_id & layout.threads - 1
    column = member * layout.lanes
    vectors = [vector(column, base, layout.lanes, layout.reach, head_dim) for base in layout.bases]
    wide_vectors = copied_vectors(layout, member, head_dim, dtype)
    rotations: Sequence[InverseRotation | InversePairs]
    if options.rotation == "pairs":
        rotations = _rotations_of_pairs(vectors, layout, dtype, table)
    else:
        rotations = _rotations(vectors, layout, lane_id, dtype, table)
    rows_per_step = WARP // layout.threads
    num_sums = 0 if partials is None else len(vectors) * layout.lanes

    def walk(first: Int, num_warps: int, heads: str, num_heads: int):
        normed, copied = sharing(rows, heads)
        num_rows = num_tokens * num_heads
        tiles = pl.cdiv(num_rows, rows_per_step)

        def rows_in(arrays: Inputs | Gradients, kind: Rows) -> RowsIn:
            return RowsIn(getattr(arrays, kind.source.array), kind.source, num_heads)

        # What the forward reads at a kind's source, its gradient is written to: source and target are exchanged.
        sources, targets = (
            {name: rows_in(arrays, kind) for name, kind in normed.items()} for arrays in (inputs, gradients)
        )
        lead, target = next(iter(normed.values())).source, next(iter(targets.values()))

        def cotangent(name: str) -> RowsIn:
            return RowsIn(getattr(cotangents, name), Place(name, head_dim, num_heads * head_dim), num_heads)

        def row_of(tile: Int) -> Int:
            return tile if rows_per_step == 1 else tile * rows_per_step + lane_id // layout.threads

        def positions_of(row: Int) -> list[Int]:
            return table.positions_of(row.minimum(num_rows - 1) // num_heads)

        weights = {
            name: [w for v in vectors for w in effective_weights(v.load(weight), weight.dtype, options.norm_beta)]
            for name, kind in normed.items()
            if (weight := weight_of(inputs, kind)) is not None
        }

        def step(tile: Int, carried: list[Value]) -> list[Value]:
            sums, ahead = carried[:num_sums], [Int(position) for position in carried[num_sums:]]
            row, exists = row_of(tile), None
            if num_rows % rows_per_step:
                exists = row < num_rows
                row = row.minimum(num_rows - 1)

            table_rows = [table.row(position) for position in ahead]
            xs_of = {name: [_at(source, row, v).load(v.lanes) for v in vectors] for name, source in sources.items()}
            ds_of = {name: [_at(cotangent(name), row, v).load(v.lanes) for v in vectors] for name in normed}
            copies = {name: [_at(cotangent(name), row, v).load(v.lanes) for v in wide_vectors] for name in copied}
            turns = rotations if any(kind.rotation is not None for kind in normed.values()) else []
            angles = [table.load(table_rows, rotation.frequency, rotation.frequencies) for rotation in turns]
            ahead = positions_of(row_of(tile + num_warps))  # the next row's table loads then wait for nothing
            for name, copy in copies.items():
                place = copied[name].source
                assert place._replace(first=lead.first) == lead  # so one offset serves both
                beside = place.first - lead.first
                for v, words in zip(wide_vectors, copy, strict=True):
                    (_at(target, row, v) + beside).store(words)
            keep_above(row)

            added = sums
            for name, kind in normed.items():
                ds, lanes = ds_of[name], [lane for words in xs_of[name] for lane in widen(words, dtype)]
                dys = [widen(words, dtype) for words in ds]
                own_turns = list(zip(turns, angles, strict=True)) if kind.rotation else []
                is_rotated_first = options.norm_order == "rotation_first"
                if is_rotated_first:  # z, the rotated x, takes the place of x
                    zs = pieces(lanes, layout.lanes)
                    for index, (rotation, loaded) in enumerate(own_turns):
                        cos, sin = rotation.angles(table, loaded)
                        partner = [arith.negf(p) for p in widen(rotation.partner(xs_of[name]), dtype)]
                        zs[index] = _turned(rotation.where, zs[index], partner, cos, sin)
                    lanes = [lane for piece in zs for lane in piece]
                else:
                    for index, (rotation, loaded) in enumerate(own_turns):
                        cos, sin = rotation.angles(table, loaded)
                        partner = widen(rotation.partner(ds), dtype)
                        dys[index] = _turned(rotation.where, dys[index], partner, cos, sin)

                r = inv_rms(_row_sum(lanes, lanes, vectors, layout), head_dim, options.eps)
                scaled = [arith.mulf(d, r) for dy_lanes in dys for d in dy_lanes]
                weighted = scaled
                if name in weights:
                    added = [mlir_math.fma(d, lane, s) for d, lane, s in zip(scaled, lanes, sums, strict=True)]
                    weighted = [arith.mulf(d, w) for d, w in zip(scaled, weights[name], strict=True)]
                # dx = g - x * r^2/D * sum(g * x), where r = 1/rms and g = dy * r * w.
                dot = arith.mulf(_row_sum(weighted, lanes, vectors, layout), r)
                factor = arith.mulf(dot, arith.mulf(r, f32(-1 / head_dim)))
                dxs = [mlir_math.fma(lane, factor, g) for lane, g in zip(lanes, weighted, strict=True)]
                of_vectors = pieces(dxs, layout.lanes)
                if is_rotated_first:
                    dzs = [[bits_of(lane) for lane in piece] for piece in of_vectors]
                    for index, (rotation, loaded) in enumerate(own_turns):
                        cos, sin = rotation.angles(table, loaded)
                        partner = [word.as_float() for word in rotation.partner(dzs, wide=True)]
                        of_vectors[index] = _turned(rotation.where, of_vectors[index], partner, cos, sin)
                for v, piece in zip(vectors, of_vectors, strict=True):
                    _at(targets[name], row, v).store(narrow(piece, dtype))
            return [*select(exists, added, sums), *(position.value for position in ahead)]

        zeros = [f32(0.0)] * num_sums
        ahead = [position.value for position in positions_of(row_of(first))]
        sums = loop(first, constant(tiles), num_warps, [*zeros, *ahead], step)[:num_sums]
        distance = layout.threads
        while distance < WARP:
            sums = [arith.addf(s, butterfly(s, distance)) for s in sums]
            distance *= 2
        if partials is not None:
            for v, piece in zip(vectors, pieces(sums, layout.lanes), strict=True):
                v.store(partials.row(warp, head_dim), narrow(piece, partials.dtype))

    q_warps, k_warps, warps_per_program = config.q_warps, config.k_warps, _warps_per_program(config)
    warp = program * warps_per_program + warp_index()
    is_k, k_before = spread_k(warp, q_warps, k_warps)
    if k_warps:
        with when(is_k):
            walk(k_before, k_warps, "k", spec.num_kv_heads)
    with when(is_k.equals(0) & (warp < q_warps + k_warps)):
        walk(warp - k_before.minimum(k_warps), q_warps, "q", spec.num_q_heads)

    if partials is None:
        return
    # What other warps of the program wrote to global memory is there after the barrier.
    llvm.inline_asm(ir.Type.parse("!llvm.void"), [], "bar.sync 0;", "~{memory}", has_side_effects=True)
    warps = [program * warps_per_program + i for i in range(warps_per_program)]
    sums = list(weights_in(gradients).values())  # of q, and of k where there is one
    for start in range(0, len(sums) * head_dim, config.num_warpgroups * WARPGROUP):
        # One column of q's rows or of k's. Every row is loaded before the first addition.
        index = thread_index() + start
        of_k = (index < head_dim).equals(0)
        with when(index < len(sums) * head_dim):
            (column,) = select(of_k, [index + -head_dim], [index])
            terms = []
            for other in warps:
                row = partials.row(other.minimum(q_warps + k_warps - 1), head_dim)
                (value,) = widen((row + column).load(1), partials.dtype)
                takes_k, _ = spread_k(other, q_warps, k_warps)
                counts = takes_k.equals(of_k) & (other < q_warps + k_warps)
                terms += select(counts, [value], [f32(0.0)])
            total = functools.reduce(arith.addf, terms)
            for which, array in enumerate(sums):
                with when(of_k.equals(which)):
                    (array.row(program, head_dim) + column).store(narrow([total], array.dtype))


class InverseRotation(NamedTuple):
    """The inverse rotation of one of a thread's vectors, whose RoPE partner a thread of its group holds."""

    where: Int | None  # None: everywhere
    frequency: Int  # the first of the vector's
    frequencies: int
    is_first: Int  # whether the vector lies in the first half
    signs: Int  # bits to flip in a word of the partner: in the second half the signs
    sources: dict[int, Int]  # vectors that hold partners, and where they do
    holder: Int | None  # the thread of the warp that holds the partner; None: this one
    masks: list[list[Int]]  # bits of each word of angles that mRoPE reads at its second and third position

    def partner(self, ds: list[list[Int]], *, wide: bool = False) -> list[Int]:
        """The partner's words, negated in the second half. `wide` ones are float32 each."""
        signs = select(self.is_first, [constant(0)], [constant(1 << 31)])[0] if wide else self.signs
        words: list[Int] = []
        for index, where in self.sources.items():
            held = ds[index] if self.holder is None else [from_thread(word, self.holder) for word in ds[index]]
            words = select(where, held, words) if words else held
        return [word ^ signs for word in words]

    def angles(self, table: Table, loaded) -> tuple[list[Value], list[Value]]:
        """float32 cos and sin of each lane, merged by mRoPE."""
        return _merged_angles(self.masks, table, loaded)


class InversePairs(NamedTuple):
    """The inverse rotation of one of a thread's vectors, in which neighbouring lanes are partners."""

    where: Int | None  # None: everywhere
    frequency: Int  # the first of the vector's
    frequencies: int
    own: int
    is_16_bit: bool
    masks: list[list[Int]]  # as those of `InverseRotation`

    def partner(self, ds: list[list[Int]], *, wide: bool = False) -> list[Int]:
        """The partners' words, negated in the second lane of each pair. `wide` ones are float32 each."""
        words = ds[self.own]
        if self.is_16_bit and not wide:
            return [((word << 16) | (word >> 16)) ^ (1 << 31) for word in words]
        return [word for first, second in pieces(words, 2) for word in (second, first ^ (1 << 31))]

    def angles(self, table: Table, loaded) -> tuple[list[Value], list[Value]]:
        """float32 cos and sin of each lane, merged by mRoPE."""
        cos, sin = _merged_angles(self.masks, table, loaded)
        return [c for c in cos for _ in "12"], [s for s in sin for _ in "12"]


def _merged_angles(masks_of_axes: list[list[Int]], table: Table, loaded) -> tuple[list[Value], list[Value]]:
    dtype = table.cache.dtype
    (cos, sin), *others = loaded
    # Merged before they are widened: 16 instructions per position where selecting lanes takes 50.
    for masks, (other_cos, other_sin) in zip(masks_of_axes, others, strict=True):
        cos, sin = _merged(masks, other_cos, cos), _merged(masks, other_sin, sin)
    return widen(cos, dtype), widen(sin, dtype)


def _rotations_of_pairs(vectors: list[Vector], layout: Layout, dtype: jnp.dtype, table: Table) -> list[InversePairs]:
    frequencies = layout.lanes // 2
    return [
        InversePairs(
            where, frequency, frequencies, index, dtype.itemsize == 2, _mrope_masks(frequency, frequencies, table)
        )
        for index, (where, frequency) in enumerate(frequencies_of_pairs(vectors, layout, table.options.rotary_dim))
    ]


def _rotations(vectors: list[Vector], layout: Layout, lane_id: Int, dtype: jnp.dtype, table: Table):
    """The rotations of the first vectors, in turn."""
    rotary_dim, rotations = table.options.rotary_dim, []
    half, reach = rotary_dim // 2, layout.reach
    signs = repeated(1 << (8 * dtype.itemsize - 1), layout.lanes, dtype)
    for v in vectors:
        if v.base >= rotary_dim:
            break
        first = v.column + v.base
        where = None if v.base + reach <= rotary_dim else first < rotary_dim
        in_first_half = first < half
        # Lanes without a partner read themselves and frequency 0.
        (partner,) = select(where, select(in_first_half, [first + half], [first + -half]), [first])
        (frequency,) = select(where, select(in_first_half, [first], [first + -half]), [constant(0)])
        (flipped,) = select(in_first_half, [constant(0, signs.width)], [signs])
        rotated = range(v.base, min(v.base + reach, rotary_dim), layout.lanes)
        partners = [f + half if f < half else f - half for f in rotated]
        sources = {index: (partner // reach).equals(index) for index in sorted({p // reach for p in partners})}
        holder = None
        if any((p - f) % reach for p, f in zip(partners, rotated, strict=True)):
            holder = (lane_id & WARP - layout.threads) + partner % reach // layout.lanes
        masks = _mrope_masks(frequency, layout.lanes, table)
        turn = InverseRotation(where, frequency, layout.lanes, in_first_half, flipped, sources, holder, masks)
        rotations.append(turn)
    return rotations


def _turned(
    where: Int | None, own: list[Value], partner: list[Value], cos: list[Value], sin: list[Value]
) -> list[Value]:
    """own * cos + partner * sin where the rotation counts."""
    turned = [mlir_math.fma(p, s, arith.mulf(x, c)) for x, p, c, s in zip(own, partner, cos, sin, strict=True)]
    return select(where, turned, own)


def _mrope_masks(frequency: Int, lanes: int, table: Table) -> list[list[Int]]:
    """For mRoPE's second and third position: the bits of each word of consecutive frequencies that are read there."""
    dtype, masks = table.cache.dtype, []
    width = word_bits(lanes, dtype)
    per_word = width // (8 * dtype.itemsize)
    for axis in (1, 2) if table.options.mrope_section else ():
        each_reads = mrope_reads(frequency, axis, lanes, table.options)
        words = [constant(0, width)] * (lanes // per_word)
        for lane, reads in enumerate(each_reads):
            ones = ((1 << 8 * dtype.itemsize) - 1) << (lane % per_word * 8 * dtype.itemsize)
            (own,) = select(reads, [constant(ones, width)], [constant(0, width)])
            words[lane // per_word] = words[lane // per_word] | own
        masks.append(words)
    return masks


def _merged(masks: list[Int], a: list[Int], b: list[Int]) -> list[Int]:
    """The bits of `a` where the masks have ones, of `b` elsewhere."""
    return [y ^ ((x ^ y) & mask) for mask, x, y in zip(masks, a, b, strict=True)]


def _row_sum(xs: list[Value], ys: list[Value], vectors: list[Vector], layout: Layout) -> Value:
    """The sum of x * y over the row, in every thread of its group, in an order that only V decides."""
    sums = {}
    for v, x, y in zip(vectors, pieces(xs, layout.lanes), pieces(ys, layout.lanes), strict=True):
        total = f32(0.0)  # a sum that starts with 0.0 is not -0.0, so vectors that a row lacks change nothing
        for a, b in zip(x, y, strict=True):
            total = mlir_math.fma(a, b, total)
        (sums[v.base],) = select(v.exists, [total], [f32(0.0)])
    step = next_power_of_2(layout.bases[-1] + 1) // 2
    while step >= layout.reach:
        sums = {b: arith.addf(s, sums[b + step]) if b + step in sums else s for b, s in sums.items() if not b & step}
        step //= 2
    total, distance = sums[0], layout.threads // 2
    while distance:
        total = arith.addf(total, butterfly(total, distance))
        distance //= 2
    return total


def _at(rows: RowsIn, row: Int, v: Vector) -> Pointer:
    """Where a vector of a row lies, by an offset that LLVM can't see through.

    It would keep a pointer into each array in registers across the loop.
    """
    offset = rows.offset(row) + v.column.resized(64)
    opaque = Int(ptx("mov.b64 $0, $1;", "=l,l", offset.value.type, offset.value))
    return rows.array + opaque + (rows.place.first + v.base)
