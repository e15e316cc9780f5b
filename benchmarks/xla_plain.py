"""The op as a JAX user would write it, under `jax.jit`: the baseline that a fused kernel has to beat.

No pinned order of the sum, and no round trip that XLA must keep. Same contract as the op, without the guard of
positions.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, weight: jax.Array, eps: float, norm_beta: float) -> jax.Array:
    """x (T, H, D), weight (D,): normalised in float32."""
    x32 = x.astype(jnp.float32)
    inv_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32 * inv_rms * (weight.astype(jnp.float32)[None, None] + norm_beta)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, rotation: str = "halves") -> jax.Array:
    """x (T, H, D), cos and sin (T, 1, R/2): rotates the first R elements, in float32."""
    half, x = cos.shape[-1], x.astype(jnp.float32)
    if rotation == "pairs":
        x1, x2 = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
        rotated = jnp.stack([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1)
        return jnp.concatenate([rotated.reshape(*x.shape[:-1], 2 * half), x[..., 2 * half :]], axis=-1)
    x1, x2, rest = jnp.split(x, [half, 2 * half], axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin, rest], axis=-1)


def fused_qk_rmsnorm_rope(
    q: jax.Array,
    k: jax.Array,
    q_weight: jax.Array,
    k_weight: jax.Array,
    cos_sin_cache: jax.Array,
    positions: jax.Array,
    eps: float,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    mrope_section: Sequence[int] | None = None,
    norm_beta: float = 0.0,
    rotation: str = "halves",
    round_norm: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """The arguments and results of `pallas_qk.fused_qk_rmsnorm_rope`; q may have heads on an axis of their own."""
    num_tokens = q.shape[0]
    angles = cos_sin_cache[positions].astype(jnp.float32)
    if mrope_section is not None:
        frequency = (jnp.arange(rotary_dim) % (rotary_dim // 2))[None]
        height = (frequency % 3 == 1) & (frequency < 3 * mrope_section[1])
        width = (frequency % 3 == 2) & (frequency < 3 * mrope_section[2])
        angles = jnp.where(height, angles[1], jnp.where(width, angles[2], angles[0]))
    cos, sin = jnp.split(angles[:, None, :], 2, axis=-1)

    def norm_and_rope(x, weight):
        y = rms_norm(x, weight, eps, norm_beta)
        return rotate(y.astype(x.dtype) if round_norm else y, cos, sin, rotation).astype(x.dtype)

    q = norm_and_rope(q.reshape(num_tokens, num_q_heads, head_dim), q_weight)
    k = norm_and_rope(k.reshape(num_tokens, num_kv_heads, head_dim), k_weight)
    return q.reshape(num_tokens, -1), k.reshape(num_tokens, -1)


def fused_qk_rmsnorm_rope_gate(q_gate: jax.Array, k: jax.Array, *others: Any, **static: Any) -> tuple[jax.Array, ...]:
    """The arguments and results of `pallas_qk.fused_qk_rmsnorm_rope_gate`."""
    num_tokens = q_gate.shape[0]
    heads = q_gate.reshape(num_tokens, static["num_q_heads"], 2 * static["head_dim"])
    q, gate = jnp.split(heads, 2, axis=-1)
    q, k = fused_qk_rmsnorm_rope(q, k, *others, **static)
    return q, k, gate.reshape(num_tokens, -1)


def fused_qkv_rmsnorm_rope(qkv: jax.Array, *others: Any, **static: Any) -> tuple[jax.Array, ...]:
    """Takes and gives what `pallas_qk.fused_qkv_rmsnorm_rope` does; the projection is cut by slices."""
    q, k, v = _split(qkv, static["num_q_heads"] * static["head_dim"], static["num_kv_heads"] * static["head_dim"])
    return *fused_qk_rmsnorm_rope(q, k, *others, **static), v


def fused_qkv_rmsnorm_rope_gate(qkv: jax.Array, *others: Any, **static: Any) -> tuple[jax.Array, ...]:
    """Takes and gives what `pallas_qk.fused_qkv_rmsnorm_rope_gate` does; the projection is cut by slices."""
    widths = 2 * static["num_q_heads"] * static["head_dim"], static["num_kv_heads"] * static["head_dim"]
    q_gate, k, v = _split(qkv, *widths)
    q, k, gate = fused_qk_rmsnorm_rope_gate(q_gate, k, *others, **static)
    return q, k, v, gate


def _split(qkv: jax.Array, q_width: int, kv_width: int) -> list[jax.Array]:
    return jnp.split(qkv, [q_width, q_width + kv_width], axis=-1)
