"""The op in plain XLA: its definition, the implementation for CPU and TPU, and the fallback.

T num_tokens, Hq num_q_heads, Hkv num_kv_heads, D head_dim, R rotary_dim.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_qk._config import Options, Spec, Target, next_power_of_2, tree_order


def unsupported(spec: Spec, target: Target) -> str | None:
    """Plain XLA runs every case on every platform."""
    del spec, target
    return None


def forward(
    q_gate: jax.Array,
    k: jax.Array,
    q_weight: jax.Array,
    k_weight: jax.Array,
    cos_sin_cache: jax.Array,
    positions: jax.Array,
    *,
    options: Options,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """q_gate (T, Hq, 2*D), k (T, Hkv, D), weights (D,), cos_sin_cache (max_pos, R), positions (1 or 3, T).

    Returns q_out (T, Hq, D), k_out (T, Hkv, D) and gate_out (T, Hq, D).
    """
    head_dim = k.shape[-1]
    cos, sin = cos_and_sin(cos_sin_cache, positions, options)
    q_out = norm_and_rope(q_gate[..., :head_dim], q_weight, cos, sin, options)
    k_out = norm_and_rope(k, k_weight, cos, sin, options)
    return q_out, k_out, q_gate[..., head_dim:]


def norm_and_rope(x: jax.Array, weight: jax.Array, cos: jax.Array, sin: jax.Array, options: Options) -> jax.Array:
    """RMSNorm of each row of x (T, H, D) and rotation of its first R lanes by cos and sin (T, R/2)."""
    half = options.rotary_dim // 2
    head_dim = x.shape[-1]
    x32 = x.astype(jnp.float32)
    mean_square = tree_sum(x32 * x32) / head_dim
    weight = effective_weight(weight, options.norm_beta)[None, None, :]
    y = x32 * lax.rsqrt(mean_square + options.eps)[..., None] * weight
    y = round_trip(y, x.dtype)
    y1, y2, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
    cos, sin = cos[:, None, :], sin[:, None, :]
    return jnp.concatenate([y1 * cos - y2 * sin, y1 * sin + y2 * cos, rest], axis=-1).astype(x.dtype)


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


def cos_and_sin(cos_sin_cache: jax.Array, positions: jax.Array, options: Options) -> tuple[jax.Array, jax.Array]:
    """float32 cos and sin (T, R/2) of each token's frequencies; NaN where a position lies outside the table."""
    half = options.rotary_dim // 2
    row, inside = table_rows(positions, cos_sin_cache.shape[0])
    table = jnp.where(inside[..., None], cos_sin_cache[row].astype(jnp.float32), jnp.nan)  # (1 or 3, T, R)
    angles = table[0]
    if options.mrope_section is not None:
        frequency = lax.rem(lax.iota(jnp.int32, 2 * half), jnp.int32(half))[None, :]
        for axis in (1, 2):
            angles = jnp.where(mrope_mask(frequency, axis, options.mrope_section), table[axis], angles)
    return angles[:, :half], angles[:, half:]


def mrope_mask(frequency: jax.Array, axis: int, mrope_section: tuple[int, int, int]) -> jax.Array:
    """Where an int32 frequency of R/2 reads positions row `axis` (1 height, 2 width): interleaved mRoPE."""
    return (lax.rem(frequency, jnp.full_like(frequency, 3)) == axis) & (frequency < 3 * mrope_section[axis])


def table_rows(positions: jax.Array, max_position: int) -> tuple[jax.Array, jax.Array]:
    """int32 rows of the table and whether each position lies inside it; 0 stands for a position outside.

    Compared in the given integer type, so that 2^32 + 3 is not 3; no row outside the table is ever formed.
    """
    if positions.dtype.itemsize < 4:
        positions = positions.astype(jnp.int32)  # max_position may not fit the narrow types
    limit = min(max_position, jnp.iinfo(positions.dtype).max)
    inside = (positions >= 0) & (positions < limit)
    return jnp.where(inside, positions, 0).astype(jnp.int32), inside
