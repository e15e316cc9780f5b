"""The public functions without a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import jax
from jax.typing import DTypeLike

from pallas_qk import _checks, _fp8, _implementations
from pallas_qk._array_checks import Function, as_called
from pallas_qk._call import call
from pallas_qk._implementations import Choice
from pallas_qk._options import Implementation, MropeLayout, NormOrder, RotationName, Spec
from pallas_qk._rows import Inputs


def fused_qk_rmsnorm_rope_gate(
    q_gate: jax.Array,
    k: jax.Array | None,
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
    copy_gate: bool | Literal["never"] = True,
    mrope_layout: MropeLayout = "interleaved",
    rotation: RotationName = "halves",
    round_norm: bool = True,
    norm_order: NormOrder = "norm_first",
    implementation: Implementation | None = None,
) -> tuple[jax.Array, Any, Any]:
    """Normalises and rotates q and k per head and splits off the gate, in one pass over memory.

    Per head, x is a row of D elements, w its weight and p its token's position. RMSNorm in float32, rounded to x's
    dtype, then the rotation of the first R elements, NeoX's unless `rotation` says otherwise::

        y = round(x * rsqrt(mean(x²) + eps) * (w + norm_beta))
        out[:R/2]  = y[:R/2] * cos[p] - y[R/2:R] * sin[p]
        out[R/2:R] = y[:R/2] * sin[p] + y[R/2:R] * cos[p]
        out[R:]    = y[R:]

    Hq num_q_heads, Hkv num_kv_heads, D head_dim, R rotary_dim; ... are any leading axes, such as (T,) or (batch,
    sequence), equal for all arrays but those that broadcast. Heads may be a separate axis; the results then have it
    too. Boxes that give their array by `__jax_array__`, such as `flax.nnx.Param`, are taken for every array.

    Args:
      q_gate: (..., Hq*2*D) or (..., Hq, 2*D), each head [q | gate]; float16, bfloat16 or float32. Leading
        axes may have size 0.
      k: (..., Hkv*D) or (..., Hkv, D), in the form of `q_gate`; its dtype. None for q alone, as in layers that read
        the keys of another layer.
      q_weight: (D,); float16, bfloat16 or float32, whatever `q_gate` has. None for a norm without weights, which reads
        none.
      k_weight: (D,); float16, bfloat16 or float32. None exactly where `q_weight` or `k` is.
      cos_sin_cache: (max_pos, R), each row [cos | sin]; float16, bfloat16 or float32. Without positions (..., R), the
        row of each token, whose leading axes broadcast. None where nothing is rotated: the norm and the split alone,
        rounded once.
      positions: (...) or, exactly when `mrope_section` is given, (3, ...): rows of time, height and width positions.
        The leading axes broadcast as in NumPy: (sequence,) serves q_gate (batch, sequence, ...). Any integer dtype, any
        order. A negative position marks padding: it reads row 0 of the table. A position past the table gives NaN, see
        Numerics. None where `cos_sin_cache` has the row of each token, or is None. With one head, (tokens, 1, 2*D) is
        ambiguous; the rank of positions, or of those rows, decides. Without either, the form of `k` does.
      eps: added to the mean of squares; a Python number.
      num_q_heads: query heads in `q_gate`. What is left out of the four sizes follows from the arrays, and what is
        given is checked. Without it a last axis of one head lies behind an axis of heads, and a flat q of the other
        function, with gates or without, isn't noticed.
      num_kv_heads: key heads in `k`; 0 exactly where `k` is None.
      head_dim: elements of a head, the length of the weights. It must be given where they are None.
      rotary_dim: elements of a head that are rotated, from the first; even and at most `head_dim`. The width of the
        table, and 0 exactly where there is none.
      mrope_section: three counts that sum to R/2, of the frequencies that read each row of `positions`.
      norm_beta: added to both weights in float32, 1.0 for Gemma-style weights; a Python number.
      copy_gate: if False, the kernel doesn't copy the gate: gate_out is an XLA slice of `q_gate`, which fuses into its
        consumer, such as `attended * jax.nn.sigmoid(gate_out)`. Its gradient comes from the one backward kernel. If
        "never", that gradient isn't copied either: the third result is a `Gate`, which only `apply_gate` takes.
      mrope_layout: "interleaved": frequency j reads row a (1 or 2) where j % 3 == a and j < 3 * mrope_section[a], and
        row 0 elsewhere (Qwen3-VL, Qwen3.5). "sectioned": the first mrope_section[0] frequencies read row 0, the next
        mrope_section[1] row 1, the others row 2 (Qwen2-VL).
      rotation: "halves": frequency j rotates elements j and j + R/2 (NeoX). "pairs": it rotates elements 2j and 2j + 1
        (GPT-J). The table is [cos | sin] for both.
      round_norm: if False, what lies between norm and rotation stays in float32, and every element is rounded once.
        float32 activations take it and nothing changes.
      norm_order: "norm_first", or "rotation_first": x is rotated in float32, rounded unless `round_norm` is False, and
        then normalised by the mean of squares of the rotated row (HunYuan, TimesFM). A position past the table that a
        frequency reads then makes all elements of the token's heads of q and k NaN.
      implementation: None takes the first that runs (see `default_implementation`). "mosaic_gpu": the Pallas kernel on
        the Mosaic GPU backend, NVIDIA GPUs from Hopper on. "triton": the Pallas kernel on the Triton backend, NVIDIA
        GPUs from Ampere on. "xla": plain XLA, any platform. A name never falls back.

    Returns:
      q_out (..., Hq*D) or (..., Hq, D), k_out in the shape of `k` or None, and gate_out in the shape of q_out, in the
      dtype of `q_gate`; the gate is raw. With copy_gate="never" a `Gate` takes its place.

    Raises:
      ValueError: a shape or a value breaks a rule above, or a head is cut across devices. Where the compiler alone
        knows that, in `jax.jit` with automatic axes, JAX raises a JaxRuntimeError which holds the message.
      TypeError: a dtype or a type does, or a Python number is traced.
      NotImplementedError: the implementation asked for by name can't run this; a shard_map or an export over devices
        leaves the op to the compiler; or Shardy is switched off over several devices. The message says why.
      RuntimeError: the process is a fork of one that has called the op.

    Numerics:
      The norm is computed in float32, with the sum of squares in one fixed order, and rounded to the dtype of `q_gate`.
      The rotation is computed in float32 and rounded once more. `norm_order` exchanges the two, and with `round_norm`
      False the first doesn't round. Weights and table are widened to float32, which is
      exact. A token's result depends neither on the other tokens nor on whether the call is inside `jax.jit`.
      "mosaic_gpu" and "triton" give the bits of the Triton kernel that serving stacks run, for float32 where D is above
      32. "xla" on a GPU does so for 16-bit activations and tables where D is a power of two. With other 16-bit
      activations it differs by a unit or two in the last place, in at most 4 elements of 10^4 (the most seen is 41 of
      10^6, float16 with a float32 table). float32 results lie within 2e-6 of the length of
      their RoPE pair, or of the element where it isn't rotated, everywhere up to D = 2048.
      A negative position reads row 0 of the table, with mRoPE in the frequencies that read it. A position past the
      table gives NaN in the elements that read it and nowhere else (but see `norm_order`). Positions are compared in
      their own dtype, and no address outside the table is formed. NumPy's 64-bit positions keep this without x64 only
      where they are given to this function: JAX narrows the arguments of a jit or vmap around it.

    Derivatives:
      q_gate, k, both weights and the table have derivatives in reverse and forward mode and of any order; rounding
      counts as the identity. Derivatives read row 0 of the table for every position outside it, and the table's
      gradient gets nothing from positions past it. So a token with finite activations and zero cotangents adds zero to
      every gradient.
      Reverse mode keeps the inputs and nothing else. It is one kernel, and a small one that sums the weights' gradients
      in float32, in a fixed order, and rounds them once. The table's gradient is XLA's scatter-add, which on a GPU has
      no fixed order; for rows of each token it is a sum over heads. Unused, it is not computed. Forward mode and
      derivatives beyond the first are plain XLA.

    Mapping and sharding:
      `jax.vmap` over activations, or over rows of the table for each token, is one launch. Over weights or a shared
      table it is one launch per element, on every device for the whole batch: a sharded batch is gathered for it.
      Leading axes and heads may be sharded over any axes of a mesh, automatic, explicit or of `jax.shard_map` (which
      takes the numbers of heads on one device); weights and table are replicated. The forward takes no collective, and
      the backward only the sum of the weights' gradients. A device holds whole heads: with fewer kv heads than devices,
      leave k replicated over that axis. On CPUs and NVIDIA GPUs the compiler's sharding needs the Shardy partitioner,
      which JAX uses by default.

    Semantics from:
      The function of this name in vLLM 0.33.0 (model_executor/layers/fused_qk_norm_rope.py), which trusts positions and
      takes no float32 activations.

    Example:
      >>> import jax.numpy as jnp
      >>> import pallas_qk
      >>> ones, angles = jnp.ones(256), jnp.arange(1024.0)[:, None] * 1e7 ** (-jnp.arange(32) / 32)
      >>> cache = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
      >>> q_out, k_out, gate_out = pallas_qk.fused_qk_rmsnorm_rope_gate(
      ...     jnp.ones((5, 16 * 2 * 256)), jnp.ones((5, 2 * 256)), ones, ones, cache, jnp.arange(5),
      ...     1e-6, num_q_heads=16, num_kv_heads=2, head_dim=256, rotary_dim=64)
      >>> q_out.shape, k_out.shape, gate_out.shape
      ((5, 4096), (5, 512), (5, 4096))
    """
    outputs = call(
        Function("fused_qk_rmsnorm_rope_gate"),
        Inputs(q_gate, k, q_weight, k_weight, cos_sin_cache, positions),
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
    )
    return outputs.q, outputs.k, outputs.gate


def fused_qk_rmsnorm_rope(
    q: jax.Array,
    k: jax.Array | None,
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
    rotation: RotationName = "halves",
    round_norm: bool = True,
    norm_order: NormOrder = "norm_first",
    implementation: Implementation | None = None,
) -> tuple[jax.Array, Any]:
    """`fused_qk_rmsnorm_rope_gate` for q without gates, as in Qwen3, Gemma 3 and other models that normalise q and k.

    Args:
      q: (..., Hq*D) or (..., Hq, D).

    The other arguments, errors, numerics, derivatives and sharding are those of `fused_qk_rmsnorm_rope_gate`.

    Returns:
      q_out and k_out, in the shapes and the dtype of `q` and `k`; k_out is None where `k` is.

    Example:
      >>> import jax.numpy as jnp
      >>> import pallas_qk
      >>> q, k, ones = jnp.ones((2, 5, 16, 128)), jnp.ones((2, 5, 8, 128)), jnp.ones(128)
      >>> cos_sin = jnp.ones((2, 5, 128))  # of each token: no positions
      >>> q_out, k_out = pallas_qk.fused_qk_rmsnorm_rope(
      ...     q, k, ones, ones, cos_sin, None, 1e-6, num_q_heads=16, num_kv_heads=8, head_dim=128, rotary_dim=128)
      >>> q_out.shape, k_out.shape
      ((2, 5, 16, 128), (2, 5, 8, 128))
    """
    outputs = call(
        Function("fused_qk_rmsnorm_rope"),
        Inputs(q, k, q_weight, k_weight, cos_sin_cache, positions),
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
    )
    return outputs.q, outputs.k


def fused_qkv_rmsnorm_rope_gate(
    qkv: jax.Array | tuple[jax.Array, jax.Array, jax.Array],
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
    copy_gate: bool | Literal["never"] = True,
    mrope_layout: MropeLayout = "interleaved",
    rotation: RotationName = "halves",
    round_norm: bool = True,
    norm_order: NormOrder = "norm_first",
    v_norm: bool = False,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, Any]:
    """`fused_qk_rmsnorm_rope_gate` for q, gate, k and v from one projection, which it takes apart without a copy.

    Args:
      qkv: (..., Hq*2*D + 2*Hkv*D): [q | gate] of each query head, then k and then v of each key head; one number of
        heads must be given. Or a tuple of three arrays of one dtype: q_gate (..., Hq*2*D), k and v (..., Hkv*D); or,
        each with an axis of heads, q_gate (..., Hq, 2*D), k and v (..., Hkv, D). One array may be k and v, as in Gemma
        4; its gradients add.
      v_norm: whether each head of v is normalised, without a weight and without norm_beta, as in Gemma 4.

    The other arguments, errors, numerics and derivatives are those of `fused_qk_rmsnorm_rope_gate`; the gradient of
    a packed `qkv` is one array, written by the one backward kernel.

    Returns:
      q_out (..., Hq*D), k_out (..., Hkv*D), v_out (..., Hkv*D), which is v as it is unless `v_norm`, and gate_out
      (..., Hq*D), or a `Gate`; with an axis of heads where three arrays have one.

    Sharding:
      Of three arrays, that of `fused_qk_rmsnorm_rope_gate`. Of a packed one, leading axes only: the parts of its last
      axis don't end where shards do. Where a sharding of that axis is known while tracing it is refused, elsewhere the
      compiler gathers it. In `jax.shard_map` a device may hold the heads that are packed for it.

    Example:
      >>> import jax.numpy as jnp
      >>> import pallas_qk
      >>> qkv, ones = jnp.ones((5, (16 * 2 + 2 * 2) * 256)), jnp.ones(256)
      >>> outputs = pallas_qk.fused_qkv_rmsnorm_rope_gate(
      ...     qkv, ones, ones, jnp.ones((1024, 64)), jnp.arange(5),
      ...     1e-6, num_q_heads=16, num_kv_heads=2, head_dim=256, rotary_dim=64)
      >>> [x.shape for x in outputs]
      [(5, 4096), (5, 512), (5, 512), (5, 4096)]
    """
    function, (q, k, v) = as_called("fused_qkv_rmsnorm_rope_gate", qkv)
    outputs = call(
        function,
        Inputs(q, k, q_weight, k_weight, cos_sin_cache, positions, v),
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
    return outputs.q, outputs.k, outputs.v, outputs.gate


def fused_qkv_rmsnorm_rope(
    qkv: jax.Array | tuple[jax.Array, jax.Array, jax.Array],
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
    rotation: RotationName = "halves",
    round_norm: bool = True,
    norm_order: NormOrder = "norm_first",
    v_norm: bool = False,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`fused_qkv_rmsnorm_rope_gate` for q without gates, as Qwen3 and Gemma 3 have it.

    Args:
      qkv: (..., Hq*D + 2*Hkv*D): q of each query head, then k and then v of each key head; one number of heads must be
        given. Or a tuple of three arrays of one dtype: q (..., Hq*D), k and v (..., Hkv*D); or, each with an axis of
        heads, q (..., Hq, D), k and v (..., Hkv, D).

    The other arguments, errors, numerics and derivatives are those of `fused_qk_rmsnorm_rope_gate`. v_norm and sharding
    are those of `fused_qkv_rmsnorm_rope_gate`.

    Returns:
      q_out (..., Hq*D), k_out (..., Hkv*D) and v_out (..., Hkv*D), which is v as it is unless `v_norm`; with an axis of
      heads where three arrays have one.

    Example:
      >>> import jax.numpy as jnp
      >>> import pallas_qk
      >>> qkv, ones = jnp.ones((5, (16 + 2 * 8) * 128)), jnp.ones(128)
      >>> q_out, k_out, v_out = pallas_qk.fused_qkv_rmsnorm_rope(
      ...     qkv, ones, ones, jnp.ones((1024, 128)), jnp.arange(5),
      ...     1e-6, num_q_heads=16, num_kv_heads=8, head_dim=128, rotary_dim=128)
      >>> q_out.shape, k_out.shape, v_out.shape
      ((5, 2048), (5, 1024), (5, 1024))
    """
    function, (q, k, v) = as_called("fused_qkv_rmsnorm_rope", qkv)
    outputs = call(
        function,
        Inputs(q, k, q_weight, k_weight, cos_sin_cache, positions, v),
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
    return outputs.q, outputs.k, outputs.v


def default_implementation(
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    dtype: DTypeLike,
    *,
    cache_dtype: DTypeLike | None = None,
    rotation: RotationName = "halves",
    norm_order: NormOrder = "norm_first",
    platform: str | None = None,
) -> Choice:
    """The implementation that `implementation=None` resolves to for these shapes, in each of the functions.

    Args:
      num_tokens: the product of the leading axes, on one device; at least 0.
      num_q_heads: query heads.
      num_kv_heads: key heads; 0 for q alone.
      head_dim: elements of a head.
      rotary_dim: elements of a head that are rotated; 0 where nothing is.
      dtype: of the activations.
      cache_dtype: of the KV cache that the call writes; None where it writes none.
      rotation: as the functions take it.
      norm_order: as the functions take it.
      platform: "cpu", "cuda", "rocm" or "tpu"; None means the default device's.

    Returns:
      A named tuple of `name` and `not_taken`, which has for each other name the reason why it was not taken.

    Raises:
      ValueError: a size or the platform breaks a rule of `fused_qk_rmsnorm_rope_gate`.
      TypeError: a size is no integer, or a dtype is none that activations, or caches, may have.
      RuntimeError: JAX finds none of the devices that JAX_PLATFORMS names, and the platform is left to it.

    Example:
      >>> import pallas_qk
      >>> pallas_qk.default_implementation(4096, 16, 2, 256, 64, "bfloat16", platform="cpu").name
      'xla'
    """
    num_q_heads, num_kv_heads, head_dim, rotary_dim = _checks.check_sizes(
        num_q_heads, num_kv_heads, head_dim, rotary_dim, rotated=rotary_dim != 0, q_alone=num_kv_heads == 0
    )
    num_tokens = _checks.check_num_tokens(num_tokens)
    dtype = _checks.check_dtype("dtype", dtype)
    by_name, by_order = _checks.check_rotation(rotation), _checks.check_norm_order(norm_order)
    if cache_dtype is not None:
        cache_dtype = _checks.check_dtype("cache_dtype", cache_dtype, _fp8.NAMES)
    _checks.check_platform(platform)
    sizes = num_tokens, num_q_heads, num_kv_heads, head_dim, rotary_dim
    return _implementations.choose(
        Spec(*sizes, dtype, cache_dtype=cache_dtype, rotation=by_name if rotary_dim else None, norm_order=by_order),
        platform,
    )
