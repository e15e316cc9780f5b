"""The op in plain XLA: its definition, the implementation for CPU and TPU, and the fallback.

Arrays as in `_rows`; any leading axes may stand for T.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_qk._cache_write import write
from pallas_qk._indices import comparable
from pallas_qk._options import Options, Spec, Target, next_power_of_2, tree_order
from pallas_qk._rows import (
    Gradients,
    Inputs,
    Outputs,
    Product,
    Rows,
    Source,
    as_outputs,
    gradient_types,
    head_dim_of,
    kinds_of,
    rows_of,
    sources_of,
    weight_of,
)


def unsupported(spec: Spec, target: Target) -> str | None:
    """Plain XLA runs every case on every platform."""
    del spec, target
    return None


def forward(inputs: Inputs, *, options: Options) -> Outputs:
    """Rows without a target stay where they are, see `parts`. Rows of a cache are written by their tokens' slots."""
    rows, kinds = parts(inputs, options), kinds_of(options)
    cos, sin = _cos_and_sin(inputs, options, past=jnp.nan)
    for name, kind in kinds.items():
        if kind.normed:
            rows[name] = norm_and_rope(rows[name], weight_of(inputs, kind), kind.rotation, cos, sin, options)
    outputs: dict[str, jax.Array] = {}
    in_cache: dict[str, list[tuple[jax.Array, jax.Array | None]]] = {}
    for name, kind in kinds.items():
        for place in kind.targets:
            if place.slots is None:
                outputs[place.array] = rows[name]
            else:
                scale = None if place.scale is None else getattr(inputs, place.scale.array)
                in_cache.setdefault(place.array, []).append((rows[name], scale))
    for array, written in in_cache.items():
        outputs[array] = write(getattr(inputs, array), written, inputs.slots, inputs.layer, options.cache_axes)
    return Outputs(**outputs)


def parts(inputs: Inputs, options: Options) -> dict[str, jax.Array]:
    """Each kind of rows (T, heads, D), as they lie in the inputs."""
    head_dim = head_dim_of(inputs, options)
    num_heads = dict(zip(("q", "k"), options.packed or (1, 1), strict=True))
    kinds = rows_of(options, num_heads["q"], num_heads["k"], head_dim)
    sections: dict[tuple[str, int], jax.Array] = {}  # by array and start: all the heads of what lies side by side
    for kind in kinds.values():
        x, start = getattr(inputs, kind.source.array), _start(kind)
        if options.packed and (kind.source.array, start) not in sections:
            heads, width = num_heads[kind.heads], kind.source.head
            x = x[..., start : start + heads * width].reshape(*x.shape[:-1], heads, width)
        sections.setdefault((kind.source.array, start), x)
    rows = {}
    for name, kind in kinds.items():
        x, lane = sections[kind.source.array, _start(kind)], kind.source.first % kind.source.head
        rows[name] = x if kind.source.head == head_dim else x[..., lane : lane + head_dim]
    return rows


def _start(kind: Rows) -> int:
    """Where the first head lies that the rows share with others."""
    return kind.source.first - kind.source.first % kind.source.head


def dense(inputs: Inputs, cotangents: Outputs, options: Options) -> Outputs:
    """The cotangents of rows alone, without what else lies in arrays that are handed on."""
    handed_on = {name: kind.source.array for name, kind in kinds_of(options).items() if kind.handed_on}
    rows = {
        name: parts(inputs._replace(**{array: getattr(cotangents, name)}), options)[name]
        for name, array in handed_on.items()
    }
    return cotangents._replace(**rows)


def _joined(rows: dict[str, jax.Array], options: Options) -> dict[str, jax.Array]:
    """The arrays of which `rows` are the parts."""
    kinds = kinds_of(options)
    return {array: _array_of(source, rows, kinds) for array, source in sources_of(kinds).items()}


def _array_of(source: Source, rows: dict[str, jax.Array], kinds: dict[str, Rows]) -> jax.Array:
    sections: dict[int, list[jax.Array]] = {}
    for name in source.kinds:
        sections.setdefault(_start(kinds[name]), []).append(rows[name])
    joined = [xs[0] if len(xs) == 1 else jnp.concatenate(xs, axis=-1) for xs in sections.values()]
    if source.heads is None:
        flat = [x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1]) for x in joined]
        joined = [jnp.concatenate(flat, axis=-1)]
    (array,) = joined
    return array


def _alone(name: str, rows: jax.Array, options: Options) -> jax.Array:
    """The array that holds one kind of rows, with zeros in the place of all others."""
    *lead, num_heads, head_dim = rows.shape
    heads = dict(zip(("q", "k"), options.packed or (num_heads, 0), strict=True))
    kinds = kinds_of(options)
    source = sources_of(kinds)[kinds[name].source.array]
    zeros = {other: jnp.zeros((*lead, heads[kinds[other].heads], head_dim), rows.dtype) for other in source.kinds}
    return _array_of(source, zeros | {name: rows}, kinds)


def norm_and_rope(
    x: jax.Array,
    weight: jax.Array | None,
    rotation: str | None,
    cos: jax.Array | None,
    sin: jax.Array | None,
    options: Options,
) -> jax.Array:
    """RMSNorm of each row of x (T, H, D) and `Rows.rotation` of its first R lanes by cos and sin (T, R/2)."""
    head_dim = x.shape[-1]
    x32 = x.astype(jnp.float32)
    is_rotated_first = rotation is not None and options.norm_order == "rotation_first"
    if is_rotated_first:
        x32 = _rotate(x32, rotation, cos, sin)
        x32 = round_trip(x32, x.dtype) if options.round_norm else x32
    mean_square = tree_sum(x32 * x32) / head_dim
    weight = None if weight is None else _over_rows(effective_weight(weight, options.norm_beta), x)
    y = x32 * lax.rsqrt(mean_square + options.eps)[..., None]
    if weight is not None:
        y = y * weight
    if is_rotated_first:
        return y.astype(x.dtype)
    if options.round_norm:
        y = round_trip(y, x.dtype)
    return _rotate(y, rotation, cos, sin).astype(x.dtype)


def _rotate(y: jax.Array, rotation: str | None, cos: jax.Array | None, sin: jax.Array | None) -> jax.Array:
    if rotation is None:
        return y
    assert cos is not None and sin is not None
    half = cos.shape[-1]
    if rotation == "pairs":
        pairs = y[..., : 2 * half].reshape(*y.shape[:-1], half, 2)
        y1, y2 = pairs[..., 0], pairs[..., 1]
    else:
        y1, y2 = y[..., :half], y[..., half : 2 * half]
    rest = y[..., 2 * half :]
    cos, sin = cos[..., None, :], sin[..., None, :]
    rotated = [y1 * cos - y2 * sin, y1 * sin + y2 * cos]
    if rotation == "pairs":
        rotated = [jnp.stack(rotated, axis=-1).reshape(*y.shape[:-1], 2 * half)]
    return jnp.concatenate([*rotated, rest], axis=-1)


def _over_rows(weight: jax.Array, x: jax.Array) -> jax.Array:
    return weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def backward(inputs: Inputs, cotangents: Outputs, *, options: Options) -> Gradients:
    """Rounding counts as the identity. The table's gradient is left to `unrounded`."""
    x, kinds, cotangents = parts(inputs, options), kinds_of(options), dense(inputs, cotangents, options)
    cos, sin = _cos_and_sin(inputs, options, past=None)
    gradients, dweights = {name: getattr(cotangents, name) for name in kinds}, {}
    for name, kind in kinds.items():
        if kind.normed:
            gradients[name], dweight = norm_and_rope_backward(
                x[name], weight_of(inputs, kind), kind.rotation, cos, sin, gradients[name], options
            )
            if kind.weight is not None:
                dweights[kind.weight] = dweight
    types = gradient_types(inputs, options)
    dweights = {name: x.astype(getattr(types, name).dtype) for name, x in dweights.items()}
    return Gradients(**dict.fromkeys(Gradients._fields) | _joined(gradients, options) | dweights)


def norm_and_rope_backward(
    x: jax.Array,
    weight: jax.Array | None,
    rotation: str | None,
    cos: jax.Array | None,
    sin: jax.Array | None,
    dout: jax.Array,
    options: Options,
) -> tuple[jax.Array, jax.Array]:
    """dx, and dweight (D,) in float32, of `norm_and_rope`.

    On a GPU XLA makes several kernels of it. The rotated lanes lie in memory between them, or each would rotate anew,
    and neither sum over a row needs the other, so that both are one pass. The whole backward takes 398 us that way, 435
    with the sums apart, 692 rotating anew and 727 with neither, and autodiff of the op in plain jnp 459 (H200, bf16, D
    = 256, R = 64, 16/2 heads, T = 16384). Where all lanes are rotated it is even with autodiff of plain jnp, which
    rounds them between its kernels: 442 us against 440 (D = R = 128, 32/8 heads), 274 against 266 (D = R = 256, 8/4).
    Rounding them here too would take 354 and 215 us, and cost every gradient a second rounding. The price is range:
    with 1/rms outside, a row's sum of dy * w * x must itself stay within float32.
    """
    x32, dy = x.astype(jnp.float32), dout.astype(jnp.float32)

    def rotated_back(dy: jax.Array) -> jax.Array:
        if rotation is None:
            return dy
        assert cos is not None and sin is not None
        rotary_dim = 2 * cos.shape[-1]
        rotated = lax.optimization_barrier(_rotate(dy[..., :rotary_dim], rotation, cos, -sin))
        return jnp.concatenate([rotated, dy[..., rotary_dim:]], axis=-1)

    is_rotated_first = options.norm_order == "rotation_first"
    if is_rotated_first:
        x32 = _rotate(x32, rotation, cos, sin)
    else:
        dy = rotated_back(dy)
    inv_rms = _inv_rms(x32, options.eps)
    dweight = jnp.sum(dy * x32 * inv_rms, axis=tuple(range(x.ndim - 1)))
    # dx = (g - x * r^2/D * sum(g * x)) * r, where r = 1/rms and g = dy * w.
    g = dy if weight is None else dy * _over_rows(weight.astype(jnp.float32) + options.norm_beta, x)
    dx = inv_rms * (g - x32 * (inv_rms * inv_rms * jnp.mean(g * x32, axis=-1)[..., None]))
    dx = rotated_back(dx) if is_rotated_first else dx
    return dx.astype(x.dtype), dweight


def unrounded(inputs: Inputs, *, options: Options) -> Outputs:
    """The op on float32 arrays, without any rounding to 16 bits: the function whose derivatives are the op's."""

    def norm_and_rope(x: jax.Array, kind: Rows) -> jax.Array:
        is_rotated_first = options.norm_order == "rotation_first"
        if is_rotated_first:
            x = _rotate(x, kind.rotation, cos, sin)
        y, weight = x * _inv_rms(x, options.eps), weight_of(inputs, kind)
        if weight is not None:
            y = y * _over_rows(weight + options.norm_beta, x)
        return y if is_rotated_first else _rotate(y, kind.rotation, cos, sin)

    rows = parts(inputs, options)
    cos, sin = _cos_and_sin(inputs, options, past=None)
    for name, kind in kinds_of(options).items():
        if kind.normed:
            rows[name] = norm_and_rope(rows[name], kind)
        if kind.handed_on:
            rows[name] = _alone(name, rows[name], options)
    return as_outputs(options, list(rows.values()))


def gated(inputs: Inputs, operands: Product, *, options: Options) -> Product:
    """attended * sigmoid(gate): the sigmoid is computed in float32 and rounded, then the product is."""
    gate, attended = parts(inputs, options)["gate"], operands.attended
    # XLA keeps this rounding, since it widens a product later than it drops pairs of converts: 98.5 us, and with
    # `round_trip` 108.8 for equal bits (H200, T = 16384, 16 heads of 256).
    opened = jax.nn.sigmoid(gate.astype(jnp.float32)).astype(attended.dtype)
    return Product(product=attended * opened)


def gate_backward(inputs: Inputs, operands: Product, *, options: Options) -> Product:
    """The cotangents of the gate, where it lies, and of attended, from that of the product; rounded once.

    Beside the gate's a kernel writes nothing, and this zeros.
    """
    attended, dout = (x.astype(jnp.float32) for x in (operands.attended, operands.product))
    opened, slope = _sigmoid_and_slope(parts(inputs, options)["gate"])
    gate = (dout * attended * slope).astype(inputs.q.dtype)
    return Product(_alone("gate", gate, options), (dout * opened).astype(inputs.q.dtype))


def gate_tangent(inputs: Inputs, operands: Product, tangents: Product, *, options: Options) -> Product:
    """The tangent of the product, rounded once, from those of `Inputs.q` and of attended; None: it doesn't move."""
    opened, slope = _sigmoid_and_slope(parts(inputs, options)["gate"])
    terms = []
    if tangents.attended is not None:
        terms.append(tangents.attended.astype(jnp.float32) * opened)
    if tangents.q is not None:
        moving = parts(inputs._replace(q=tangents.q), options)["gate"].astype(jnp.float32)
        terms.append(operands.attended.astype(jnp.float32) * moving * slope)
    return Product(product=sum(terms[1:], terms[0]).astype(inputs.q.dtype))


def _sigmoid_and_slope(gate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """In float32. 1 - sigmoid would lose what is left of it where the gate is large."""
    gate = gate.astype(jnp.float32)
    below = jnp.exp(-jnp.abs(gate))
    above = 1 / (1 + below)
    return jnp.where(gate < 0, below * above, above), below * above * above


def _inv_rms(x: jax.Array, eps: float) -> jax.Array:
    # A mean that keeps its axis gives wrong tangents on a CPU from 4096 rows on (JAX 0.12.0, its fusion of reductions).
    return lax.rsqrt(jnp.mean(x * x, axis=-1) + eps)[..., None]


def tree_sum(x: jax.Array) -> jax.Array:
    """Sum of float32 x (..., D) over D as the fixed tree of `tree_order`; lanes that D lacks add 0.

    Explicit adds: XLA reorders a reduction (about 67 of 16.7 M results then differ from the serving kernel's, by up
    to 33 ulp) and never reorders these.
    """
    head_dim = x.shape[-1]
    num_lanes = next_power_of_2(head_dim)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, num_lanes - head_dim)])
    bits_left = list(range(num_lanes.bit_length() - 1))
    for bit in tree_order(num_lanes):
        below = 1 << bits_left.index(bit)
        bits_left.remove(bit)
        above = (1 << len(bits_left)) // below
        x = x.reshape(*x.shape[:-1], above, 2, below)
        x = (x[..., 0, :] + x[..., 1, :]).reshape(*x.shape[:-3], above * below)
    return x[..., 0]


def effective_weight(weight: jax.Array, norm_beta: float) -> jax.Array:
    """float32(weight) + norm_beta. Adding 0.0 makes -0.0 positive; XLA would drop that addition."""
    weight = weight.astype(jnp.float32)
    return weight + norm_beta if norm_beta else jnp.where(weight == 0, 0.0, weight)


def round_trip(y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rounds float32 y to `dtype` and back, kept by XLA, which drops a plain pair of converts (31 % of k differed).

    float16 goes through a barrier: reduce_precision(5, 10) flushes its subnormals to zero.
    """
    if dtype == jnp.bfloat16:
        return lax.reduce_precision(y, exponent_bits=8, mantissa_bits=7)
    if dtype == jnp.float16:
        rounded: jax.Array = lax.optimization_barrier(y.astype(dtype))
        return rounded.astype(jnp.float32)
    return y


def _cos_and_sin(inputs: Inputs, options: Options, *, past: float | None) -> tuple[jax.Array | None, jax.Array | None]:
    """float32 cos and sin (T, R/2) of each token's frequencies; None where nothing is rotated.

    A position past the table reads `past`. None stands for the table's first row as a constant: so derivatives read it,
    which are finite then, and the table's gradient gets nothing from it.
    """
    half, positions = options.rotary_dim // 2, inputs.positions
    if inputs.cos_sin_cache is None:
        return None, None
    if positions is None:
        angles = inputs.cos_sin_cache.astype(jnp.float32)
        return angles[..., :half], angles[..., half:]
    row, is_past = table_rows(positions, inputs.cos_sin_cache.shape[0])
    table = inputs.cos_sin_cache[row].astype(jnp.float32)  # (1 or 3, T, R)
    table = jnp.where(is_past[..., None], lax.stop_gradient(table) if past is None else past, table)
    angles = table[0]
    if options.mrope_section is not None:
        frequency = _over_rows(lax.rem(lax.iota(jnp.int32, 2 * half), jnp.int32(half)), angles)
        for axis in (1, 2):
            reads = mrope_mask(frequency, axis, options.mrope_section, options.mrope_layout)
            angles = jnp.where(reads, table[axis], angles)
    return angles[..., :half], angles[..., half:]


def mrope_mask(frequency: jax.Array, axis: int, mrope_section: tuple[int, int, int], layout: str) -> jax.Array:
    """Where an int32 frequency of R/2 reads positions row `axis` (1 height, 2 width)."""
    if layout == "sectioned":
        start = sum(mrope_section[:axis])
        return (frequency >= start) & (frequency < start + mrope_section[axis])
    return (lax.rem(frequency, jnp.full_like(frequency, 3)) == axis) & (frequency < 3 * mrope_section[axis])


def table_rows(positions: jax.Array, max_position: int) -> tuple[jax.Array, jax.Array]:
    """int32 rows of the table, and whether each position is past it. Negative positions and those past it read row 0.

    No row outside the table is ever formed.
    """
    positions, limit = comparable(positions, max_position)
    is_past = positions >= limit
    return jnp.where((positions < 0) | is_past, 0, positions).astype(jnp.int32), is_past
