"""The public functions that write k and v into a KV cache."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax

from pallas_qk import _cache_checks, _checks
from pallas_qk._array_checks import as_called
from pallas_qk._call import call
from pallas_qk._gate import Gate
from pallas_qk._options import Implementation, MropeLayout, NormOrder, RotationName
from pallas_qk._rows import Inputs, Outputs


class CacheOutputs(NamedTuple):
    """The results of a function that writes a KV cache: a named tuple, and so a pytree."""

    q: jax.Array  #: normalised and rotated; (..., Hq*D), or (..., Hq, D) where q was given with an axis of heads
    gate: jax.Array | Gate | None  #: unchanged, in the shape of `q`, or a `Gate`; None for q without gates
    kv_cache: tuple[jax.Array, jax.Array] | jax.Array  #: with the tokens' rows, in the form in which it was given
    k: jax.Array | None  #: normalised and rotated; (..., Hkv*D) or (..., Hkv, D); None unless `return_kv`
    v: jax.Array | None  #: unchanged unless `v_norm`, in the shape of `k`; None unless `return_kv`


def fused_qkv_rmsnorm_rope_gate_cache(
    qkv: jax.Array | tuple[jax.Array, jax.Array, jax.Array],
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
    copy_gate: bool | Literal["never"] = True,
    mrope_layout: MropeLayout = "interleaved",
    rotation: RotationName = "halves",
    round_norm: bool = True,
    norm_order: NormOrder = "norm_first",
    v_norm: bool = False,
    implementation: Implementation | None = None,
) -> CacheOutputs:
    """Does what `fused_qkv_rmsnorm_rope_gate` does, and writes k and v into a KV cache in the same launch.

    The cache is updated in place inside a `jax.jit` that donates it, also in the carry of a loop there. XLA copies all
    of it where the call is eager, where the cache is not donated, or where its old value is read later.

    Args:
      qkv: one packed array (..., Hq*2*D + 2*Hkv*D), as `fused_qkv_rmsnorm_rope_gate` takes it, with one number of
        heads. Or a tuple of three arrays of one dtype: q_gate (..., Hq*2*D), k and v (..., Hkv*D); or, each with an
        axis of heads, q_gate (..., Hq, 2*D), k and v (..., Hkv, D).
      kv_cache: a pair of arrays, k's and v's, with one shape and dtype. Or one array of both, where `cache_axes` has a
        c. float16, bfloat16 or float32: rows of another dtype are cast to it, rounded to nearest even. Or
        float8_e4m3fn or float8_e5m2, with scales. The axes of heads and lanes have the sizes Hkv and D, every other
        axis any size of at least 1.
      slot_mapping: (...), the slot of each token: block * block_size + place in the block. Any integer dtype. A token
        whose slot is negative, or past the last block, is not written; its q and gate are computed as for any other.
        `pallas_qk.kv_cache` makes slots from block tables and for dense caches.
      cache_axes: the names of the cache's axes in their order. b is the block (a page, or a sequence), s the place in
        it, h the kv head and d the lane, which comes last. c, where one array holds both, is k (0) or v (1). l, where
        layers are stacked, is the layer and comes first. "(h c)", "(c h)" and "(c d)" are one axis of the array, whose
        second name runs faster. "NHD" stands for "b s h d" and "HND" for "b h s d".
      layer: the layer to write, where `cache_axes` has an l: an int, or an integer array without axes, which may be
        traced. An int outside the layers is an error. With an array outside, nothing is written.
      k_scale, v_scale: what rows of k and of v are divided by on their way into a cache of 8 bits, and what a reader
        multiplies them by: float32, (), (1,) or (Hkv,), or a number; each may be traced. They must be given for such a
        cache, and for no other. `pallas_qk.kv_cache.read` reads such a cache.
      return_kv: whether k and v are results too, in the dtype of `qkv`.
      v_norm: whether each head of v is normalised, without a weight, before it is written or returned.

    The other arguments are those of `fused_qk_rmsnorm_rope_gate`.

    Returns:
      A `CacheOutputs` with q, gate and the cache, which holds the tokens' rows. With `return_kv` also k, normalised and
      rotated, and v, unchanged unless `v_norm`. Places that no slot names keep their bits. Where two tokens name one
      slot, either may stay: k, v and even single elements of them may come from different tokens.

    Raises:
      ValueError, TypeError, RuntimeError: as `fused_qk_rmsnorm_rope_gate`, also for the new arguments. Also where,
        outside `jax.shard_map`, a cache is sharded over anything but heads.
      NotImplementedError: as there. Also for derivatives, and for `jax.vmap` over any argument.

    Numerics:
      Those of `fused_qk_rmsnorm_rope_gate`. Where a token's rows are written changes no bit of them. Slots and `layer`
      are compared in their own dtype, and no address outside a cache is formed. "xla" on a CPU takes a temporary array
      of the cache's size for a cache of 8 bits, and under JAX 0.10 for a bfloat16 one.

      A cache of 8 bits holds the float8 nearest to float32(x) / scale, ties to even, where x is already rounded to the
      dtype of `qkv`, float32 rows being rounded once. The division is IEEE's. What is larger than every finite float8,
      infinities among it, is stored as the largest, 448 or 57344, and NaN as code 0x7f. No value of a scale is an
      error: a row divided by 0 is stored as the largest values, NaN where it is 0 itself. Every implementation stores
      the same codes on CPUs and NVIDIA GPUs, but for float32 numbers below 2^-126, which XLA's CPU reads as 0. On
      other platforms nothing is promised of the codes.

    Sharding:
      The compiler may shard heads: those of the cache and, given as three arrays, those of q, k and v. Tokens and
      blocks are whole on each device. Everything else goes into `jax.shard_map`, where each device has its own cache
      and slots. A cache is never gathered: what would need that is an error.

    Semantics from:
      `fused_qk_rmsnorm_rope_gate` and, for the cache and its codes, the CUDA kernel `reshape_and_cache_flash` of vLLM
      0.33.0, which doesn't check whether a slot is past the capacity.

    Example:
      >>> import functools, jax, jax.numpy as jnp
      >>> import pallas_qk
      >>> qkv, ones = jnp.ones((5, (16 * 2 + 2 * 2) * 256)), jnp.ones(256)
      >>> cache = jnp.zeros((8, 16, 2, 256)), jnp.zeros((8, 16, 2, 256))  # 8 blocks of 16 places
      >>> @functools.partial(jax.jit, donate_argnames="cache")
      ... def step(qkv, cache, positions, slots):
      ...     return pallas_qk.fused_qkv_rmsnorm_rope_gate_cache(
      ...         qkv, ones, ones, jnp.ones((1024, 64)), positions, cache, slots,
      ...         1e-6, num_q_heads=16, num_kv_heads=2, head_dim=256, rotary_dim=64)
      >>> outputs = step(qkv, cache, jnp.arange(5), jnp.array([32, 33, 34, -1, 35]))
      >>> outputs.q.shape, outputs.gate.shape, outputs.kv_cache[0].shape, outputs.k
      ((5, 4096), (5, 4096), (8, 16, 2, 256), None)
    """
    return _call(
        "fused_qkv_rmsnorm_rope_gate_cache",
        qkv,
        (q_weight, k_weight, cos_sin_cache, positions),
        (kv_cache, slot_mapping, cache_axes, layer, k_scale, v_scale, return_kv),
        _checks.check_copy_gate(copy_gate),
        eps,
        (num_q_heads, num_kv_heads, head_dim, rotary_dim),
        mrope_section,
        norm_beta,
        mrope_layout,
        rotation,
        round_norm,
        norm_order,
        implementation,
        v_norm=v_norm,
    )


def fused_qkv_rmsnorm_rope_cache(
    qkv: jax.Array | tuple[jax.Array, jax.Array, jax.Array],
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
    rotation: RotationName = "halves",
    round_norm: bool = True,
    norm_order: NormOrder = "norm_first",
    v_norm: bool = False,
    implementation: Implementation | None = None,
) -> CacheOutputs:
    """`fused_qkv_rmsnorm_rope_gate_cache` for q without gates, as Qwen3 and Gemma 3 have it.

    Args:
      qkv: one packed array (..., Hq*D + 2*Hkv*D), as `fused_qkv_rmsnorm_rope` takes it, with one number of heads. Or a
        tuple of three arrays of one dtype: q (..., Hq*D), k and v (..., Hkv*D); or, each with an axis of heads, q (...,
        Hq, D), k and v (..., Hkv, D).

    The other arguments, errors, numerics and sharding are those of `fused_qkv_rmsnorm_rope_gate_cache`.

    Returns:
      A `CacheOutputs` whose `gate` is None.

    Example:
      >>> import jax.numpy as jnp
      >>> import pallas_qk
      >>> q, k, v, ones = jnp.ones((4, 1, 16, 128)), jnp.ones((4, 1, 8, 128)), jnp.ones((4, 1, 8, 128)), jnp.ones(128)
      >>> cache = jnp.zeros((4, 32, 8, 256))  # 32 places for each of 4 sequences, k and v side by side
      >>> lengths = jnp.array([[7], [0], [31], [32]])  # the last sequence has no room
      >>> slots = pallas_qk.kv_cache.slots_of_rows(lengths, cache_length=32)
      >>> outputs = pallas_qk.fused_qkv_rmsnorm_rope_cache(
      ...     (q, k, v), ones, ones, jnp.ones((1024, 128)), lengths, cache, slots, 1e-6, num_q_heads=16,
      ...     num_kv_heads=8, head_dim=128, rotary_dim=128, cache_axes="b s h (c d)")
      >>> outputs.q.shape, outputs.kv_cache.shape
      ((4, 1, 16, 128), (4, 32, 8, 256))
    """
    return _call(
        "fused_qkv_rmsnorm_rope_cache",
        qkv,
        (q_weight, k_weight, cos_sin_cache, positions),
        (kv_cache, slot_mapping, cache_axes, layer, k_scale, v_scale, return_kv),
        None,
        eps,
        (num_q_heads, num_kv_heads, head_dim, rotary_dim),
        mrope_section,
        norm_beta,
        mrope_layout,
        rotation,
        round_norm,
        norm_order,
        implementation,
        v_norm=v_norm,
    )


def _call(
    name: str, qkv: Any, arrays: tuple[Any, ...], cache: tuple[Any, ...], gate: str | None, *values: Any, v_norm: bool
) -> CacheOutputs:
    """`values` are the arguments of `call` that follow `gate`."""
    function, (q, k, v) = as_called(name, qkv)

    def run(inputs: Inputs, **cache: Any) -> Outputs:
        return call(function, inputs, gate, *values, v_norm=v_norm, **cache)

    return with_cache(run, Inputs(q, k, *arrays)._replace(v=v), *cache)


def with_cache(
    run: Callable[..., Outputs],
    inputs: Inputs,
    kv_cache: Any,
    slot_mapping: Any,
    cache_axes: str,
    layer: Any,
    k_scale: Any,
    v_scale: Any,
    return_kv: bool,
) -> CacheOutputs:
    """What `run(inputs, cache_axes=…, return_kv=…)` returns for inputs with the cache, under public names."""
    _cache_checks.check_slots_given(slot_mapping)
    cache_axes, return_kv = _cache_checks.check_cache_axes(cache_axes), _cache_checks.check_return_kv(return_kv)
    k_cache, v_cache = _cache_checks.arrays_of(kv_cache, cache_axes)
    written = {"k_cache": k_cache, "v_cache": v_cache, "slots": slot_mapping}
    inputs = inputs._replace(**written, layer=layer, k_scale=k_scale, v_scale=v_scale)
    outputs = run(inputs, cache_axes=cache_axes, return_kv=return_kv)
    caches = outputs.k_cache if v_cache is None else (outputs.k_cache, outputs.v_cache)
    return CacheOutputs(outputs.q, outputs.gate, caches, outputs.k, outputs.v)
