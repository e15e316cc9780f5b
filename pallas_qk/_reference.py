"""The op in plain XLA: its definition, the implementation for CPU and TPU, and the fallback.

Arrays as in `_operands`; any leading axes may stand for T.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_qk._config import Options, Spec, Target, next_power_of_2, tree_order
from pallas_qk._operands import Gradients, Inputs, Outputs, gradient_types


def unsupported(spec: Spec, target: Target) -> str | None:
    """Plain XLA runs every case on every platform."""
    del spec, target
    return None


def forward(inputs: Inputs, *, options: Options) -> Outputs:
    """A gate that stays in place is left out, see `parts`."""
    x = parts(inputs, options)
    cos, sin = _cos_and_sin(inputs, options, past=jnp.nan)
    q_out = norm_and_rope(x.q, inputs.q_weight, cos, sin, options)
    k_out = norm_and_rope(x.k, inputs.k_weight, cos, sin, options)
    return Outputs(q_out, k_out, x.v, x.gate if options.gate == "copied" else None)


def parts(inputs: Inputs, options: Options) -> Outputs:
    """q, k, v and gate as they lie in the inputs."""
    q, k, v, gate = inputs.q, inputs.k, None, None
    head_dim = inputs.q_weight.shape[0]
    if options.packed is not None:
        num_q_heads, num_kv_heads = options.packed
        width = head_dim if options.gate is None else 2 * head_dim
        q_end, k_end = num_q_heads * width, num_q_heads * width + num_kv_heads * head_dim
        packed, lead = inputs.q, inputs.q.shape[:-1]
        q = packed[..., :q_end].reshape(*lead, num_q_heads, width)
        k = packed[..., q_end:k_end].reshape(*lead, num_kv_heads, head_dim)
        v = packed[..., k_end:].reshape(*lead, num_kv_heads, head_dim)
    if options.gate is not None:
        q, gate = q[..., :head_dim], q[..., head_dim:]
    return Outputs(q, k, v, gate)


def norm_and_rope(x: jax.Array, weight: jax.Array, cos: jax.Array, sin: jax.Array, options: Options) -> jax.Array:
    """RMSNorm of each row of x (T, H, D) and rotation of its first R lanes by cos and sin (T, R/2)."""
    head_dim = x.shape[-1]
    x32 = x.astype(jnp.float32)
    mean_square = tree_sum(x32 * x32) / head_dim
    weight = _over_rows(effective_weight(weight, options.norm_beta), x)
    y = x32 * lax.rsqrt(mean_square + options.eps)[..., None] * weight
    return _rotate(round_trip(y, x.dtype), cos, sin).astype(x.dtype)


def _rotate(y: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    half = cos.shape[-1]
    y1, y2, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([y1 * cos - y2 * sin, y1 * sin + y2 * cos, rest], axis=-1)


def _over_rows(weight: jax.Array, x: jax.Array) -> jax.Array:
    return weight.reshape((1,) * (x.ndim - 1) + weight.shape)


def backward(inputs: Inputs, cotangents: Outputs, *, options: Options) -> Gradients:
    """Rounding counts as the identity. The table's gradient is left to `unrounded`."""
    x = parts(inputs, options)
    cos, sin = _cos_and_sin(inputs, options, past=None)
    dq, dq_weight = norm_and_rope_backward(x.q, inputs.q_weight, cos, sin, cotangents.q, options)
    dk, dk_weight = norm_and_rope_backward(x.k, inputs.k_weight, cos, sin, cotangents.k, options)
    types = gradient_types(inputs, options)
    dq_weight, dk_weight = dq_weight.astype(types.q_weight.dtype), dk_weight.astype(types.k_weight.dtype)
    if cotangents.gate is not None:
        dq = jnp.concatenate([dq, cotangents.gate], axis=-1)
    if cotangents.v is None:
        return Gradients(dq, dk, dq_weight, dk_weight)
    sections = [part.reshape(*part.shape[:-2], part.shape[-2] * part.shape[-1]) for part in (dq, dk, cotangents.v)]
    return Gradients(jnp.concatenate(sections, axis=-1), None, dq_weight, dk_weight)


def norm_and_rope_backward(
    x: jax.Array, weight: jax.Array, cos: jax.Array, sin: jax.Array, dout: jax.Array, options: Options
) -> tuple[jax.Array, jax.Array]:
    """dx, and dweight (D,) in float32, of `norm_and_rope`.

    On a GPU XLA makes several kernels of it. The rotated lanes lie in memory between them, or each would rotate anew,
    and neither sum over a row needs the other, so that both are one pass. The whole backward takes 398 us that way, 435
    with the sums apart, 692 rotating anew and 727 with neither, and autodiff of the op in plain jnp 459 (H200, bf16,
    D = 256, R = 64, 16/2 heads, T = 16384). Where all lanes are rotated autodiff, which rounds them, is the faster:
    500 us against 586 (D = R = 128, 32/8 heads). The price is range: with 1/rms outside, a row's sum of dy * w * x must
    itself stay within float32.
    """
    rotary_dim = 2 * cos.shape[-1]
    x32, dout = x.astype(jnp.float32), dout.astype(jnp.float32)
    rotated = lax.optimization_barrier(_rotate(dout[..., :rotary_dim], cos, -sin))
    dy = jnp.concatenate([rotated, dout[..., rotary_dim:]], axis=-1)
    inv_rms = _inv_rms(x32, options.eps)
    dweight = jnp.sum(dy * x32 * inv_rms, axis=tuple(range(x.ndim - 1)))
    # dx = (g - x * r^2/D * sum(g * x)) * r, where r = 1/rms and g = dy * w.
    g = dy * _over_rows(weight.astype(jnp.float32) + options.norm_beta, x)
    dx = inv_rms * (g - x32 * (inv_rms * inv_rms * jnp.mean(g * x32, axis=-1)[..., None]))
    return dx.astype(x.dtype), dweight


def unrounded(inputs: Inputs, *, options: Options) -> Outputs:
    """The op on float32 arrays, without any rounding to 16 bits: the function whose derivatives are the op's."""

    def norm_and_rope(x, weight):
        weight = _over_rows(weight + options.norm_beta, x)
        return _rotate(x * _inv_rms(x, options.eps) * weight, cos, sin)

    x = parts(inputs, options)
    cos, sin = _cos_and_sin(inputs, options, past=None)
    return x._replace(q=norm_and_rope(x.q, inputs.q_weight), k=norm_and_rope(x.k, inputs.k_weight))


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
        return lax.optimization_barrier(y.astype(dtype)).astype(jnp.float32)
    return y


def _cos_and_sin(inputs: Inputs, options: Options, *, past: float | None) -> tuple[jax.Array, jax.Array]:
    """float32 cos and sin (T, R/2) of each token's frequencies.

    A position past the table reads `past`. None stands for the table's first row as a constant: so derivatives read it,
    which are finite then, and the table's gradient gets nothing from it.
    """
    half, positions = options.rotary_dim // 2, inputs.positions
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

    Compared in the given integer type, so that 2^32 + 3 is not 3; no row outside the table is ever formed.
    """
    if positions.dtype.itemsize < 4:
        positions = positions.astype(jnp.int32)  # max_position may not fit the narrow types
    # A size that an export leaves open has no smaller of two.
    limit = min(max_position, jnp.iinfo(positions.dtype).max) if isinstance(max_position, int) else max_position
    is_past = positions >= limit
    return jnp.where((positions < 0) | is_past, 0, positions).astype(jnp.int32), is_past
