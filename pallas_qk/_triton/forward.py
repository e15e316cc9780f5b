"""The op as a Pallas GPU kernel on the Triton backend.

T num_tokens, Hq num_q_heads, Hkv num_kv_heads, D head_dim, R rotary_dim, B rows of a program.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_qk import _cache_axes, _reference
from pallas_qk._cache_write import places_of
from pallas_qk._options import Options, Spec, next_power_of_2, rotation_fuses_y2
from pallas_qk._rows import (
    CACHES,
    Inputs,
    Outputs,
    Rows,
    Scale,
    empty,
    output_types,
    rows_for,
    sharing,
    spec_of,
    stored,
    weight_of,
    with_caches,
)
from pallas_qk._triton.arithmetic import Arithmetic, plain_arithmetic, ptx_arithmetic, sum_of_squares
from pallas_qk._triton.config import TritonForward, triton_forward
from pallas_qk._triton.tiles import (
    LAYOUTS,
    array_shape,
    both,
    iota,
    load,
    output,
    rows_in,
    rows_of_program,
    spread_k,
    store,
)

FORWARD_NAME = "pallas_qk_triton_forward"


def forward(
    inputs: Inputs, *, options: Options, config: TritonForward | None = None, interpret: bool = False
) -> Outputs:
    """The contract of `_reference.forward`. `interpret` runs the kernel in plain XLA, without inline assembly."""
    spec, types = spec_of(inputs, options), output_types(inputs, options)
    if spec.num_tokens == 0:
        return empty(with_caches(inputs, types)[1])
    rows = rows_for(spec, options)
    config = config or configuration(inputs, options)
    inputs, written = with_caches(inputs, types)
    q_programs = pl.cdiv(spec.num_tokens * spec.num_q_heads, config.rows_per_program)
    k_programs = pl.cdiv(spec.num_tokens * spec.num_kv_heads, config.rows_per_program)
    dtype = inputs.q.dtype
    kernel = functools.partial(
        _forward_kernel,
        rows=rows,
        q_programs=q_programs,
        k_programs=k_programs,
        spec=spec,
        options=options,
        config=config,
        arithmetic=(
            plain_arithmetic(dtype, round_norm=options.round_norm)
            if interpret
            else ptx_arithmetic(dtype, rotation_fuses_y2(options, dtype), round_norm=options.round_norm)
        ),
    )
    inputs = inputs._replace(q=inputs.q.reshape(array_shape(rows, "q", spec)))
    caches = {name: _by_name(x, options, spec) for name in CACHES if (x := getattr(written, name)) is not None}
    types = types._replace(**caches)
    first, first_written = len(jax.tree.leaves(inputs)), len(jax.tree.leaves(types)) - len(caches)
    (outputs,) = pl.pallas_call(
        kernel,
        grid=(q_programs + k_programs,),
        out_shape=(jax.tree.map(lambda x: output(x.shape, x.dtype), types),),
        input_output_aliases={first + i: first_written + i for i in range(len(caches))},
        compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
        interpret=interpret,
        name=FORWARD_NAME,
    )(inputs, caches)
    return outputs._replace(**{name: getattr(outputs, name).reshape(getattr(written, name).shape) for name in caches})


def configuration(inputs: Inputs, options: Options) -> TritonForward:
    """What the rule has for a call."""
    spec = spec_of(inputs, options)
    return triton_forward(spec, q_copied=bool(sharing(stored(rows_for(spec, options)), "q")[1]))


def _by_name(cache: jax.Array, options: Options, spec: Spec) -> jax.Array:
    """The cache with an axis for each name."""
    return cache.reshape(*_cache_axes.sizes_of(options.cache_axes, cache.shape, spec.head_dim).values())


def _forward_kernel(
    inputs: Inputs,
    caches: dict,
    outputs: Outputs,
    *,
    rows: dict[str, Rows],
    q_programs: int,
    k_programs: int,
    spec: Spec,
    options: Options,
    config: TritonForward,
    arithmetic: Arithmetic,
):
    """One program: B consecutive rows (token, head) of every kind that shares the heads of q, or those of k.

    RoPE partners lie at the same place of two tiles, so in one thread: no shuffle for the rotation, no shared memory,
    no barrier. Every load is issued before the first store. H200, bf16, T = 16384, 16/2 heads: 135.6 us where
    a copy takes 133.2.
    """
    num_rows, head_dim = config.rows_per_program, spec.head_dim
    del caches  # they are updated among the outputs
    layout = LAYOUTS[config.layout](num_rows, head_dim, options.rotary_dim)
    # What is copied is one tile over the whole row, 16 bytes per thread in every layout.
    wide = next_power_of_2(head_dim)
    axes_of_cache = "".join(_cache_axes.groups(options.cache_axes))

    def treat(block, heads: str, num_heads: int):
        normed, copied = sharing(stored(rows), heads)

        def rows_at(lanes):
            return rows_of_program(block, num_rows, spec.num_tokens, num_heads, lanes)

        def source(kind: Rows):
            return rows_in(getattr(inputs, kind.source.array), rows, kind.source, spec)

        places = next((p.slots for kind in (normed | copied).values() for p in kind.targets if p.slots), None)
        if places is not None:
            token, _, in_rows = rows_at(1)
            slot = load(inputs.slots, (token,), in_rows if jnp.ndim(token) else None)
            layer = None if inputs.layer is None else load(inputs.layer, (0,))
            has_place, in_cache = places_of(slot, layer, places)

        def divisor(scale: Scale):
            """Of each row (B, 1), or of all."""
            scales = getattr(inputs, scale.array)
            if not scale.per_head:
                return load(scales, (0,))
            _, head, in_rows = rows_at(1)
            return load(scales, (head,), in_rows)

        def write(kind: Rows, token, head, columns, values, mask):
            """Values of the activations' dtype, cast to that of each target."""
            for place in kind.targets:
                ref = getattr(outputs, place.array)
                if place.slots is None:
                    store(ref, (token, head, columns), values, mask)
                    continue
                index = in_cache | {"h": head, "c": jnp.int32(place.first > 0), "d": columns}
                if place.scale is not None:
                    cast = arithmetic.codes(values, divisor(place.scale), ref.dtype)
                elif values.dtype != ref.dtype:
                    cast = values.astype(jnp.float32).astype(ref.dtype)
                else:
                    cast = values
                over_tile = [
                    jnp.broadcast_to(x, columns.shape) for x in (has_place, *(index[n] for n in axes_of_cache))
                ]
                store(ref, tuple(over_tile[1:]), cast, both(mask, over_tile[0]))

        # First, so that their bytes are on the way while the rest waits for addresses.
        copies = {}
        for name, kind in copied.items():
            wide_columns = iota((num_rows, wide), 1)
            token, head, in_rows = rows_at(wide)
            in_copied = both(in_rows, None if wide == head_dim else wide_columns < head_dim)
            copies[name] = load(source(kind).ref, source(kind).at(token, head, wide_columns), in_copied)
        in_tiles: dict[str, list] = {name: [] for name in normed}
        xs: dict[str, list] = {name: [] for name in normed}
        for name, kind in normed.items():
            for columns, exists in zip(layout.columns, layout.exists, strict=True):
                token, head, in_rows = rows_at(columns.shape[1])
                in_tiles[name].append(both(in_rows, exists))
                xs[name].append(load(source(kind).ref, source(kind).at(token, head, columns), in_tiles[name][-1]))
        token, _, in_rows = rows_at(1)
        angles = []
        if layout.frequencies:
            table_rows = _table_rows(inputs.positions, token, in_rows, inputs.cos_sin_cache.shape[0], options)
            angles = [
                _cos_and_sin(inputs.cos_sin_cache, table_rows, f, layout.rotated, options) for f in layout.frequencies
            ]
        for name, copy in copies.items():
            token, head, _ = rows_at(wide)
            write(copied[name], token, head, wide_columns, copy, in_copied)
        # Weights come from L1. Loaded after a store that might alias them, they keep ptxas from sinking that store, and
        # with it the loads before it, below the reduction.
        weights = {
            name: [load(weight, (c,), e) for c, e in zip(layout.columns, layout.exists, strict=True)]
            for name, kind in normed.items()
            if (weight := weight_of(inputs, kind)) is not None
        }
        for name, kind in normed.items():
            x32 = [x.astype(jnp.float32) for x in xs[name]]
            is_rotated_first = kind.rotation is not None and options.norm_order == "rotation_first"
            if is_rotated_first:
                x32 = layout.rotate(x32, [_widened(*loaded) for loaded in angles], arithmetic)
                if options.round_norm:
                    x32 = [arithmetic.narrow(x).astype(jnp.float32) for x in x32]
            total = sum_of_squares(dict(zip(layout.offsets, x32, strict=False)), layout.bits, head_dim, arithmetic.fma)
            inv_rms = lax.rsqrt(arithmetic.mean_plus_eps(total, head_dim, options.eps))
            ws = [arithmetic.effective_weight(w, options.norm_beta) for w in weights.get(name, [])]
            ws = ws[: len(x32)]
            ys = [x * inv_rms * w for x, w in zip(x32, ws, strict=True)] if ws else [x * inv_rms for x in x32]
            if kind.rotation is not None and not is_rotated_first:
                ys = layout.rotate(ys, [_widened(*loaded) for loaded in angles], arithmetic)
            for columns, y, in_tile in zip(layout.columns, ys, in_tiles[name], strict=False):
                token, head, _ = rows_at(columns.shape[1])
                write(kind, token, head, columns, arithmetic.narrow(y), in_tile)

    program = pl.program_id(0)
    if not k_programs:
        treat(program, "q", spec.num_q_heads)
        return
    is_k, group = spread_k(program, q_programs, k_programs)

    @pl.when(is_k)
    def _():
        treat(group, "k", spec.num_kv_heads)

    @pl.when(jnp.logical_not(is_k))
    def _():
        treat(program - jnp.minimum(group, k_programs), "q", spec.num_q_heads)


def _widened(cos, sin, is_past):
    """float32 cos and sin; NaN in cos past the table, which spoils both halves of the pair."""
    cos, sin = cos.astype(jnp.float32), sin.astype(jnp.float32)
    return cos if is_past is None else jnp.where(is_past, jnp.nan, cos), sin


def _table_rows(positions_ref, token, in_rows, max_position: int, options: Options):
    """The table row of each token, and whether its position is past the table: one pair per row of positions.

    Without positions the table has a row for each token and nothing is past it (None).
    """
    if positions_ref is None:
        return [(token if in_rows is None else jnp.minimum(token, max_position - 1), None)]
    axes = (0,) if options.mrope_section is None else (0, 1, 2)
    mask = in_rows if jnp.ndim(token) else None
    return [_reference.table_rows(load(positions_ref, (axis, token), mask), max_position) for axis in axes]


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
    return load(cache_ref, (row, frequency), rotated), load(cache_ref, (row, half + frequency), rotated), is_past
