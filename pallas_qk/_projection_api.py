"""The public functions that take hidden states and the weight of their projection."""

from collections.abc import Sequence
from typing import Any

import jax

from pallas_qk import _projection
from pallas_qk._cache_api import CacheOutputs, with_cache
from pallas_qk._options import Implementation, MropeLayout
from pallas_qk._rows import Inputs, Outputs


def fused_qkv_projection_rmsnorm_rope_gate(
    hidden: jax.Array,
    weight: jax.Array,
    q_weight: jax.Array | None,
    k_weight: jax.Array | None,
    cos_sin_cache: jax.Array | None,
    positions: jax.Array | None,
    eps: float,
    num_q_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    rotary_dim: int | None = None,
    mrope_section: Sequence[int] | None = None,
    norm_beta: float = 0.0,
    *,
    mrope_layout: MropeLayout = "interleaved",
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`fused_qkv_rmsnorm_rope_gate` of `hidden @ weight`, on request in one kernel.

    On a Hopper GPU `implementation="mosaic_gpu"` normalises, rotates and splits heads in the epilogue of the product,
    which then is never in memory. From 4096 tokens on and with 16/2 heads it takes 0.87 to 0.89 of the time of product
    and op on an H200, or 0.93 to 0.95 where the op leaves the gate in place. With 32/2 heads it takes 0.95 to 0.98, or
    0.99 to 1.02. With fewer tokens it is slower: 1.15 at 1024. Nothing takes it for you.

    E is the width of the hidden states. The other letters are those of `fused_qk_rmsnorm_rope_gate`.

    Args:
      hidden: (..., E); float16, bfloat16 or float32.
      weight: (E, Hq*2*D + 2*Hkv*D), in the dtype of `hidden`. The columns are [q | gate] of each query head, then k and
        then v of each key head; one number of heads must be given.
      implementation: None: the product by XLA, then the op as None chooses it. "xla": both in plain XLA, any platform.
        "mosaic_gpu": one kernel, on a Hopper GPU (H100, H200), for float16 and bfloat16, head_dim 256 of which 64
        elements are rotated, norms with weights, and E a multiple of 64. A number of tokens that isn't a multiple of 8
        costs it copies of hidden states and results. "triton" has no such kernel. A name never falls back.

    The other arguments are those of `fused_qkv_rmsnorm_rope_gate`.

    Returns:
      q_out (..., Hq*D), k_out (..., Hkv*D), v_out (..., Hkv*D) and gate_out (..., Hq*D), each an array of its own.

    Raises:
      ValueError, TypeError, RuntimeError: as `fused_qkv_rmsnorm_rope_gate`, also for the new arguments.
      NotImplementedError: the kernel asked for by name can't run this, or would run over several devices outside
        `jax.shard_map`.

    Numerics:
      The product is what `hidden @ weight` gives, rounded to the dtype of `hidden`; the rest is that of
      `fused_qk_rmsnorm_rope_gate`, in the same bits of an equal product. The kernel sums products in float32 in the
      order of its columns. cuBLAS, which XLA calls, may take another order, so elements of the product may differ by a
      rounding, and what follows with them. Reruns give equal bits. A token's result doesn't depend on the others.

    Derivatives:
      Those of product and op, in reverse and forward mode and of any order. The kernel keeps its arguments alone: where
      a backward needs the product, XLA computes it again. After the op's backward kernel two more products give the
      gradients of `hidden` and `weight`.

    Mapping and sharding:
      None and "xla" are mapped and sharded like the product and the op. `jax.vmap` of the kernel over hidden states or
      positions is one launch, over weights or a table one per element. Over several devices the kernel runs inside
      `jax.shard_map`: on each device's tokens, or with each device's heads and their columns of `weight`.

    Example:
      >>> import jax.numpy as jnp
      >>> import pallas_qk
      >>> hidden, weight, ones = jnp.ones((5, 64)), jnp.ones((64, (16 * 2 + 2 * 2) * 256)), jnp.ones(256)
      >>> outputs = pallas_qk.fused_qkv_projection_rmsnorm_rope_gate(
      ...     hidden, weight, ones, ones, jnp.ones((1024, 64)), jnp.arange(5), 1e-6, num_q_heads=16)
      >>> [x.shape for x in outputs]
      [(5, 4096), (5, 512), (5, 512), (5, 4096)]
    """
    outputs = _projection.call(
        hidden,
        weight,
        Inputs(None, None, q_weight, k_weight, cos_sin_cache, positions),
        eps,
        (num_q_heads, num_kv_heads, head_dim, rotary_dim),
        mrope_section,
        norm_beta,
        mrope_layout,
        implementation,
    )
    return outputs.q, outputs.k, outputs.v, outputs.gate


def fused_qkv_projection_rmsnorm_rope_gate_cache(
    hidden: jax.Array,
    weight: jax.Array,
    q_weight: jax.Array | None,
    k_weight: jax.Array | None,
    cos_sin_cache: jax.Array | None,
    positions: jax.Array | None,
    kv_cache: tuple[jax.Array, jax.Array] | jax.Array,
    slot_mapping: jax.Array,
    eps: float,
    num_q_heads: int | None = None,
    num_kv_heads: int | None = None,
    head_dim: int | None = None,
    rotary_dim: int | None = None,
    mrope_section: Sequence[int] | None = None,
    norm_beta: float = 0.0,
    *,
    cache_axes: str = "b s h d",
    layer: int | jax.Array | None = None,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    return_kv: bool = False,
    mrope_layout: MropeLayout = "interleaved",
    implementation: Implementation | None = None,
) -> CacheOutputs:
    """`fused_qkv_rmsnorm_rope_gate_cache` of `hidden @ weight`, on request in one kernel.

    On a Hopper GPU `implementation="mosaic_gpu"` does all of it in the epilogue of the product: k and v go from there
    into the cache, codes of 8 bits too. It serves the prefill of many tokens. From 4096 tokens on and with 16/2 heads
    it takes 0.88 to 0.89 of the time of product and op on an H200, or 0.94 to 0.96 where the op leaves the gate in
    place. With few tokens it is slower, as `fused_qkv_projection_rmsnorm_rope_gate` is.

    Args:
      kv_cache, slot_mapping, cache_axes, layer, k_scale, v_scale, return_kv: those of
        `fused_qkv_rmsnorm_rope_gate_cache`. The kernel takes every cache that function takes.

    The other arguments are those of `fused_qkv_projection_rmsnorm_rope_gate`.

    Returns:
      A `CacheOutputs`, as `fused_qkv_rmsnorm_rope_gate_cache` returns it. The cache is updated in place where that
      function would do so.

    Raises:
      ValueError, TypeError, RuntimeError: as `fused_qkv_rmsnorm_rope_gate_cache`, also for the new arguments.
      NotImplementedError: as there, and as `fused_qkv_projection_rmsnorm_rope_gate`.

    Numerics:
      The product is that of `fused_qkv_projection_rmsnorm_rope_gate`, and the rest that of
      `fused_qkv_rmsnorm_rope_gate_cache`.

    Sharding:
      None and "xla" are sharded like the product and the op. Over several devices the kernel runs inside
      `jax.shard_map`, on each device's cache.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> import pallas_qk
      >>> hidden, weight, ones = jnp.ones((5, 64)), jnp.ones((64, (16 * 2 + 2 * 2) * 256)), jnp.ones(256)
      >>> cache = jnp.zeros((8, 16, 2, 256)), jnp.zeros((8, 16, 2, 256))  # 8 blocks of 16 places
      >>> @functools.partial(jax.jit, donate_argnames="cache")
      ... def prefill(hidden, cache, positions, slots):
      ...     return pallas_qk.fused_qkv_projection_rmsnorm_rope_gate_cache(
      ...         hidden, weight, ones, ones, jnp.ones((1024, 64)), positions, cache, slots, 1e-6, num_q_heads=16)
      >>> outputs = prefill(hidden, cache, jnp.arange(5), jnp.array([32, 33, 34, -1, 35]))
      >>> outputs.q.shape, outputs.gate.shape, outputs.kv_cache[0].shape, outputs.k
      ((5, 4096), (5, 4096), (8, 16, 2, 256), None)
    """

    def run(inputs: Inputs, **cache: Any) -> Outputs:
        sizes = num_q_heads, num_kv_heads, head_dim, rotary_dim
        values = eps, sizes, mrope_section, norm_beta, mrope_layout, implementation
        return _projection.call(hidden, weight, inputs, *values, **cache)

    inputs = Inputs(None, None, q_weight, k_weight, cos_sin_cache, positions)
    return with_cache(run, inputs, kv_cache, slot_mapping, cache_axes, layer, k_scale, v_scale, return_kv)
