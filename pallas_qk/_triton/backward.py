"""The op's backward pass as Pallas GPU kernels on the Triton backend.

T num_tokens, Hq num_q_heads, Hkv num_kv_heads, D head_dim, R rotary_dim, L next_power_of_2(D), B rows of a tile.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_qk import _reference
from pallas_qk._options import Options, Spec, next_power_of_2
from pallas_qk._rows import (
    Gradients,
    Inputs,
    Outputs,
    Rows,
    differentiated,
    gradient_types,
    rows_for,
    sharing,
    spec_of,
    weight_of,
    weights_in,
)
from pallas_qk._target import cuda_target
from pallas_qk._triton.arithmetic import Arithmetic, plain_arithmetic, ptx_arithmetic
from pallas_qk._triton.config import TritonBackward, triton_backward
from pallas_qk._triton.tiles import (
    LAYOUTS,
    array_shape,
    both,
    div,
    iota,
    load,
    output,
    rows_in,
    rows_of_program,
    spread_k,
    store,
)

BACKWARD_NAME = "pallas_qk_triton_backward"
WEIGHT_SUM_NAME = "pallas_qk_triton_weight_sum"

_SUM_COLUMNS = 8  # of one program: 32 bytes, the unit of L2
_SUM_ROWS = 4096  # of one tile of partials
_SUM_ROWS_OF_A_WARP = 256  # 64 values a thread


def backward(
    inputs: Inputs,
    cotangents: Outputs,
    *,
    options: Options,
    config: TritonBackward | None = None,
    interpret: bool = False,
) -> Gradients:
    """The contract of `_reference.backward`. `interpret` runs the kernels in plain XLA, without inline assembly."""
    spec, types, dtype = spec_of(inputs, options), gradient_types(inputs, options), inputs.q.dtype
    if spec.num_tokens == 0:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), types)
    config = config or configuration(inputs, options)
    rows, cotangents = rows_for(spec, options), _reference.dense(inputs, cotangents, options)
    kernel = functools.partial(
        _backward_kernel,
        rows=rows,
        spec=spec,
        options=options,
        config=config,
        arithmetic=plain_arithmetic(dtype) if interpret else ptx_arithmetic(dtype),
    )
    num_programs, partial_rows = config.q_programs + config.k_programs, _partial_rows(config)
    q_in_heads = inputs.q.reshape(array_shape(rows, "q", spec))
    # One warp a program. What crosses warps goes through shared memory, and a kernel that uses any, 256 bytes even, is
    # launched with a carve-out that leaves 28 KB of L1 (H200, T = 16384, 16/2 heads: 196.9 against 182.6 us).
    has_weights = inputs.q_weight is not None
    inputs_in_heads = inputs._replace(q=q_in_heads)
    of_rows = differentiated(inputs_in_heads)._replace(q_weight=None, k_weight=None)
    gradients, partials = pl.pallas_call(
        kernel,
        grid=(num_programs,),
        out_shape=(
            jax.tree.map(lambda x: output(x.shape, dtype), of_rows),
            output((num_programs * partial_rows, spec.head_dim), jnp.float32) if has_weights else None,
        ),
        compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),
        interpret=interpret,
        name=BACKWARD_NAME,
    )(inputs_in_heads, cotangents)
    gradients = gradients._replace(q=gradients.q.reshape(inputs.q.shape))
    if not has_weights:
        return gradients
    summed = sum_weights(partials, config.q_programs * partial_rows, weights_in(types), interpret)
    return gradients._replace(**summed)


def sum_weights(partials: jax.Array, q_rows: int, types, interpret: bool) -> dict[str, jax.Array]:
    """The column sums (D,) of the first `q_rows` rows of partials, for q, and of the others, for k, as `types`."""
    num_rows, head_dim = partials.shape
    tile_rows = min(next_power_of_2(max(q_rows, num_rows - q_rows)), _SUM_ROWS)
    sums = pl.pallas_call(
        functools.partial(_weight_sum_kernel, q_rows=q_rows),
        grid=(len(types) * pl.cdiv(head_dim, _SUM_COLUMNS),),
        out_shape=tuple(output(x.shape, x.dtype) for x in types.values()),
        compiler_params=plt.CompilerParams(num_warps=max(1, tile_rows // _SUM_ROWS_OF_A_WARP), num_stages=1),
        interpret=interpret,
        name=WEIGHT_SUM_NAME,
    )(partials)
    return dict(zip(types, sums, strict=True))


def _backward_kernel(
    inputs: Inputs,
    cotangents: Outputs,
    gradients: Gradients,
    partials_ref,
    *,
    rows: dict[str, Rows],
    spec: Spec,
    options: Options,
    config: TritonBackward,
    arithmetic: Arithmetic,
):
    """One program: every so many-th block of B rows of q, or of k, and its partial weight gradients.

    In a row with r = 1 / rms and dy the cotangent rotated back: dweight gets dy * r * x, and with g = dy * r * weight
    dx = g - x * r^2 / D * sum(g * x).
    """
    num_tokens, head_dim, num_rows = spec.num_tokens, spec.head_dim, config.rows_per_step
    layout = LAYOUTS[config.layout](num_rows, head_dim, options.rotary_dim)
    columns, exists = layout.columns[: len(layout.offsets)], layout.exists[: len(layout.offsets)]
    forward = arithmetic._replace(rotate=functools.partial(_rotate, arithmetic))
    arithmetic = arithmetic._replace(rotate=functools.partial(_rotate_back, arithmetic))
    # Rows past the last are ones with cotangents of zero: a row of zeros has no finite 1 / rms where eps is 0.
    one, zero = jnp.ones((), inputs.q.dtype), jnp.zeros((), inputs.q.dtype)
    no_x = [one if e is None else jnp.where(e, one, zero) for e in exists]

    def walk(program, programs, slot, heads: str, num_heads: int):
        normed, copied = sharing(rows, heads)
        # What the forward reads at a kind's source, its gradient is written to: source and target are exchanged.
        sources = {
            name: rows_in(getattr(inputs, kind.source.array), rows, kind.source, spec) for name, kind in normed.items()
        }
        targets = {
            name: rows_in(getattr(gradients, kind.source.array), rows, kind.source, spec)
            for name, kind in normed.items()
        }

        def rows_at(step, lanes):
            return rows_of_program(program + step * programs, num_rows, num_tokens, num_heads, lanes)

        def load_positions(step):
            """The positions of a step's tokens, one for each axis; without positions, the tokens; of no table, none."""
            if not layout.frequencies:
                return []
            token = jnp.minimum(rows_at(step, 1)[0], num_tokens - 1)  # past the last row there is none
            if inputs.positions is None:
                return [token]
            return [load(inputs.positions, (axis, token)) for axis in range(inputs.positions.shape[0])]

        def body(step, carry):
            dweights, positions = carry
            # Every load is issued before the first store.
            copies = {}
            for name in copied:
                # One tile over the whole row, 16 bytes per thread in every layout.
                wide_columns = iota((num_rows, next_power_of_2(head_dim)), 1)
                token, head, in_rows = rows_at(step, wide_columns.shape[1])
                in_copied = both(in_rows, None if wide_columns.shape[1] == head_dim else wide_columns < head_dim)
                wide_place = token, head, wide_columns
                copies[name] = load(getattr(cotangents, name), wide_place, in_copied)
            token, head, in_rows = rows_at(step, columns[0].shape[1])
            in_tiles = [both(in_rows, e) for e in exists]
            xs_of = {
                name: [
                    load(source.ref, source.at(token, head, c), m, n)
                    for c, m, n in zip(columns, in_tiles, no_x, strict=True)
                ]
                for name, source in sources.items()
            }
            douts_of = {
                name: [
                    load(getattr(cotangents, name), (token, head, c), both(in_rows, e))
                    for c, e in zip(layout.columns, layout.exists, strict=True)
                ]
                for name in normed
            }
            angles = [
                _cos_and_sin(inputs, positions, f, layout.rotated, options, arithmetic) for f in layout.frequencies
            ]
            # One step ahead: the next table row then waits for nothing (2 us).
            positions = load_positions(step + 1)
            for name, copy in copies.items():
                place = copied[name].source
                beside = rows_in(getattr(gradients, place.array), rows, place, spec)
                store(beside.ref, beside.at(*wide_place), copy, in_copied)
            # From L1. Loaded after a store that might alias them, they keep ptxas from sinking it, and with it the
            # loads before it, below the sums.
            weights_of = {
                name: [load(weight, (c,), e).astype(jnp.float32) for c, e in zip(columns, exists, strict=True)]
                for name, kind in normed.items()
                if (weight := weight_of(inputs, kind)) is not None
            }
            if options.norm_beta:
                weights_of = {name: [w + options.norm_beta for w in ws] for name, ws in weights_of.items()}

            xs_of = {name: [x.astype(jnp.float32) for x in xs] for name, xs in xs_of.items()}
            angles = [(cos.astype(jnp.float32), sin.astype(jnp.float32)) for cos, sin in angles]
            for name, kind in normed.items():
                xs = xs_of[name]
                dys = [dout.astype(jnp.float32) for dout in douts_of[name]]
                is_rotated_first = kind.rotation is not None and options.norm_order == "rotation_first"
                if is_rotated_first:  # z, the rotated x, takes the place of x
                    xs = layout.rotate(xs, angles, forward)
                elif kind.rotation is not None:
                    dys = layout.rotate(dys, angles, arithmetic)
                dys = dys[: len(columns)]
                mean_plus_eps = arithmetic.mean_plus_eps(_row_sum(xs, xs, arithmetic), head_dim, options.eps)
                inv_rms = lax.rsqrt(mean_plus_eps)
                gs = dys = [dy * inv_rms for dy in dys]
                if name in weights_of:
                    dweights = [arithmetic.fma(dy, x, dw) for dy, x, dw in zip(dys, xs, dweights, strict=True)]
                    gs = [dy * weight for dy, weight in zip(dys, weights_of[name], strict=True)]
                # Not inv_rms * inv_rms, which is the first to leave the range of float32.
                along_x = (_row_sum(gs, xs, arithmetic) * inv_rms) * (inv_rms * (-1.0 / head_dim))
                dxs = [arithmetic.fma(x, along_x, g) for x, g in zip(xs, gs, strict=True)]
                if is_rotated_first:
                    dxs = layout.rotate(dxs, angles, arithmetic)
                target = targets[name]
                for c, mask, dx in zip(columns, in_tiles, dxs, strict=True):
                    store(target.ref, target.at(token, head, c), arithmetic.narrow(dx), mask)
            return dweights, positions

        num_steps = pl.cdiv(num_tokens * num_heads, num_rows)
        own_steps = div(num_steps - program + (programs - 1), programs)
        sums = [] if partials_ref is None else [jnp.zeros(c.shape, jnp.float32) for c in columns]
        init = sums, load_positions(0)
        dweights, _ = lax.fori_loop(0, own_steps, body, init)
        if partials_ref is None:
            return
        partial = LAYOUTS[config.layout](_partial_rows(config), head_dim, options.rotary_dim)
        for c, e, dweight in zip(partial.columns, partial.exists, dweights, strict=False):
            row = slot * _partial_rows(config) + iota(c.shape, 0)
            store(partials_ref, (row, c), _add_pairs_of_rows(dweight), e)

    program, q_programs, k_programs = pl.program_id(0), config.q_programs, config.k_programs
    if not k_programs:
        walk(program, q_programs, program, "q", spec.num_q_heads)
        return
    is_k, group = spread_k(program, q_programs, k_programs)

    @pl.when(is_k)
    def _():
        walk(group, k_programs, q_programs + group, "k", spec.num_kv_heads)

    @pl.when(jnp.logical_not(is_k))
    def _():
        slot = program - jnp.minimum(group, k_programs)
        walk(slot, q_programs, slot, "q", spec.num_q_heads)


def configuration(inputs: Inputs, options: Options) -> TritonBackward:
    """What the rule has for a call."""
    read = inputs.q, inputs.q_weight, inputs.k_weight, inputs.cos_sin_cache
    wide = any(x is not None and x.dtype == jnp.float32 for x in read)
    return triton_backward(
        spec_of(inputs, options), cuda_target().num_sms, mrope=options.mrope_section is not None, wide=wide
    )


def _partial_rows(config: TritonBackward) -> int:
    """Rows of partial weight gradients that one program writes."""
    return max(1, config.rows_per_step // 2)


def _add_pairs_of_rows(tile: jax.Array) -> jax.Array:
    """Adds neighbouring rows, (B, L) to (B/2, L); a single row stays.

    These two forms compile without shared memory. Adding all rows of short heads, two rows by the second form, or more
    than two by the first would use it.
    """
    num_rows, lanes = tile.shape
    if num_rows > 2:
        return jnp.sum(tile.reshape(num_rows // 2, 2, lanes), axis=1)
    return jnp.sum(tile, axis=0, keepdims=True)


def _rotate(arithmetic: Arithmetic, x1, x2, cos, sin):
    return arithmetic.dot2(x1, cos, x2, sin, negate=True), arithmetic.dot2(x2, cos, x1, sin)


def _rotate_back(arithmetic: Arithmetic, d1, d2, cos, sin):
    """The transposed rotation of a cotangent."""
    return arithmetic.dot2(d1, cos, d2, sin), arithmetic.dot2(d2, cos, d1, sin, negate=True)


def _row_sum(a_tiles, b_tiles, arithmetic: Arithmetic) -> jax.Array:
    """(B, 1): the sums over the rows of a * b."""
    total = a_tiles[0] * b_tiles[0]
    for a, b in zip(a_tiles[1:], b_tiles[1:], strict=True):
        total = arithmetic.fma(a, b, total)
    return jnp.sum(total, axis=1, keepdims=True)


def _cos_and_sin(inputs: Inputs, positions, frequency, rotated, options: Options, arithmetic: Arithmetic):
    """cos and sin over a tile of frequencies, in the table's dtype; those of row 0 for a position outside the table.

    With mRoPE each axis reads its row of the table in whole, 16 bytes a thread, and the lanes choose.
    """
    cache_ref, half = inputs.cos_sin_cache, options.rotary_dim // 2
    angles = []
    for row in positions:
        if inputs.positions is not None:
            row, _ = _reference.table_rows(row, cache_ref.shape[0])
        row = jnp.broadcast_to(row, frequency.shape)
        angles.append((load(cache_ref, (row, frequency), rotated), load(cache_ref, (row, half + frequency), rotated)))
    cos, sin = angles[0]
    if options.mrope_section is not None:
        for axis in (1, 2):
            reads = _reference.mrope_mask(frequency, axis, options.mrope_section, options.mrope_layout)
            cos, sin = (arithmetic.select(reads, a, b) for a, b in zip(angles[axis], (cos, sin), strict=True))
    return cos, sin


def _weight_sum_kernel(partials_ref, of_q_ref, of_k_ref=None, *, q_rows: int):
    """One program: the sum of a few columns of q's partials, or of k's, in a fixed order."""
    all_rows, head_dim = partials_ref.shape
    num_groups = pl.cdiv(head_dim, _SUM_COLUMNS)

    def sum_columns(first_row, num_rows, group, out_ref):
        tile_rows = min(next_power_of_2(num_rows), _SUM_ROWS)
        row, column = (iota((tile_rows, _SUM_COLUMNS), axis) for axis in (0, 1))
        column = group * _SUM_COLUMNS + column
        in_columns = None if head_dim % _SUM_COLUMNS == 0 else column < head_dim
        total = jnp.zeros((1, _SUM_COLUMNS), jnp.float32)
        for start in range(0, num_rows, tile_rows):
            in_rows = None if start + tile_rows <= num_rows else start + row < num_rows
            partials = load(partials_ref, (first_row + start + row, column), both(in_rows, in_columns))
            total = total + jnp.sum(partials, axis=0, keepdims=True)
        column = group * _SUM_COLUMNS + iota(total.shape, 1)
        store(out_ref, (column,), total.astype(out_ref.dtype), None if in_columns is None else column < head_dim)

    program = pl.program_id(0)

    @pl.when(program < num_groups)
    def _():
        sum_columns(0, q_rows, program, of_q_ref)

    if of_k_ref is not None:

        @pl.when(program >= num_groups)
        def _():
            sum_columns(q_rows, all_rows - q_rows, program - num_groups, of_k_ref)
