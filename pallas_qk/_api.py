"""The public functions: check, choose, call."""

import functools
from collections.abc import Sequence

import jax

from pallas_qk import _checks, _implementations, _vjp
from pallas_qk._config import Options, Spec
from pallas_qk._implementations import IMPLEMENTATIONS, Choice
from pallas_qk._sharding import Call


def fused_qk_rmsnorm_rope_gate(
    q_gate: jax.Array,
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
    *,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalises and rotates q and k per head and splits off the gate, in one pass over memory.

    Per head, x is a row of D elements, w its weight and p its token's position::

        y = round(x * rsqrt(mean(x²) + eps) * (w + norm_beta))        RMSNorm in float32, rounded to x's dtype
        out[:R/2]  = y[:R/2] * cos[p] - y[R/2:R] * sin[p]             NeoX rotation of the first R elements
        out[R/2:R] = y[:R/2] * sin[p] + y[R/2:R] * cos[p]
        out[R:]    = y[R:]

    T tokens, Hq num_q_heads, Hkv num_kv_heads, D head_dim, R rotary_dim.

    Args:
      q_gate: (T, Hq*2*D), each head [q | gate]; float16, bfloat16 or float32. T may be 0.
      k: (T, Hkv*D); the dtype of `q_gate`.
      q_weight: (D,); the dtype of `q_gate` or float32.
      k_weight: (D,); the dtype of `q_gate` or float32.
      cos_sin_cache: (max_pos, R), each row [cos | sin]; the dtype of `q_gate` or float32.
      positions: (T,) or, exactly when `mrope_section` is given, (3, T): rows of time, height and width positions.
        Any integer dtype, any order.
      eps: added to the mean of squares; a Python number.
      num_q_heads: query heads in `q_gate`.
      num_kv_heads: key heads in `k`.
      head_dim: elements of a head.
      rotary_dim: elements of a head that are rotated, from the first; even and at most `head_dim`.
      mrope_section: three counts that sum to R/2. Frequency j reads row a (1 or 2) of `positions` where j % 3 == a
        and j < 3 * mrope_section[a], and row 0 elsewhere (interleaved mRoPE).
      norm_beta: added to both weights in float32, 1.0 for Gemma-style weights; a Python number.
      implementation: None takes the first that runs (see `default_implementation`). "mosaic_gpu": the Pallas kernel on
        the Mosaic GPU backend, NVIDIA GPUs from Hopper on. "triton": the Pallas kernel on the Triton backend, NVIDIA
        GPUs from Ampere on. "xla": plain XLA, any platform. A name never falls back.

    Returns:
      q_out (T, Hq*D), k_out (T, Hkv*D) and gate_out (T, Hq*D), in the dtype of `q_gate`; the gate is raw.

    Raises:
      ValueError: a shape or a value breaks a rule above, or a head is cut across devices.
      TypeError: a dtype or a type does, or `eps` or `norm_beta` is traced.
      NotImplementedError: the implementation asked for by name can't run this, or a shard_map or an export over devices
        leaves the op to the compiler; the message says why.

    Numerics:
      The norm is computed in float32, with the sum of squares in one fixed order, and rounded to the dtype of
      `q_gate` before the rotation, which is computed in float32 and rounded once more. A token's result depends
      neither on the other tokens nor on whether the call is inside `jax.jit`. For float16 and bfloat16, "mosaic_gpu"
      and "triton" give the bits of the Triton kernel that serving stacks run; "xla" on a GPU does for 16-bit tables
      where D is a power of two, and otherwise differs by a unit or two in the last place in some 40 elements of 10^6.
      A position outside [0, max_pos) gives NaN in the elements that read it and nowhere else; no address outside
      the table is formed.

    Derivatives:
      Of q_gate, k, both weights and the table, in reverse and forward mode and of any order; rounding counts as the
      identity. Reverse mode keeps the inputs and nothing else, and is one kernel. The weights' gradients are summed in
      float32, in a fixed order, and rounded once. The table's is XLA's scatter-add, on a GPU in no fixed order, and
      costs nothing where it isn't used. Forward mode and derivatives beyond the first are plain XLA.

    Mapping and sharding:
      `jax.vmap` over activations is one launch, over weights or a table one for each. Tokens and heads may be sharded
      over any axes of a mesh, automatic, explicit or of `jax.shard_map` (which takes the numbers of heads on one
      device); weights and table are replicated. The forward takes no collective and the backward only the sum of the
      weights' gradients. A device holds whole heads: fewer kv heads than devices are left replicated over that axis.

    Semantics from: `fused_qk_rmsnorm_rope_gate` of vLLM 0.33.0 (model_executor/layers/fused_qk_norm_rope.py), which
      trusts positions and takes no float32 activations.

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
    num_q_heads, num_kv_heads, head_dim, rotary_dim = _checks.check_sizes(
        num_q_heads, num_kv_heads, head_dim, rotary_dim
    )
    options = Options(
        rotary_dim=rotary_dim,
        eps=_checks.check_eps(eps),
        norm_beta=_checks.check_norm_beta(norm_beta),
        mrope_section=_checks.check_mrope_section(mrope_section, rotary_dim),
    )
    _checks.check_implementation(implementation, IMPLEMENTATIONS)
    _checks.check_arrays(
        q_gate,
        k,
        q_weight,
        k_weight,
        cos_sin_cache,
        positions,
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        mrope=options.mrope_section is not None,
    )
    _checks.check_known_sharding("q_gate", q_gate, num_q_heads)
    _checks.check_known_sharding("k", k, num_kv_heads)
    spec = Spec(q_gate.shape[0], num_q_heads, num_kv_heads, head_dim, rotary_dim, str(q_gate.dtype))
    _implementations.check_supported(spec, implementation)
    return _fused_qk_rmsnorm_rope_gate(
        q_gate,
        k,
        q_weight,
        k_weight,
        cos_sin_cache,
        _checks.canonical_positions(positions, cos_sin_cache.shape[0]),
        call=Call(head_dim, options, implementation),
    )


@functools.partial(jax.jit, static_argnames=("call",))
def _fused_qk_rmsnorm_rope_gate(q_gate, k, q_weight, k_weight, cos_sin_cache, positions, *, call):
    """Jitted here, so that an eager call gives the bits of a call inside `jax.jit`."""
    rows = positions if positions.ndim == 2 else positions[None]
    with jax.named_scope("fused_qk_rmsnorm_rope_gate"):
        return tuple(_vjp.forward(call, q_gate, k, q_weight, k_weight, cos_sin_cache, rows))


def default_implementation(
    num_tokens: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    dtype,
    *,
    platform: str | None = None,
) -> Choice:
    """The implementation that `implementation=None` resolves to for these shapes.

    Args:
      num_tokens: T, at least 0.
      num_q_heads: query heads.
      num_kv_heads: key heads.
      head_dim: elements of a head.
      rotary_dim: elements of a head that are rotated.
      dtype: of the activations.
      platform: "cpu", "cuda", "rocm" or "tpu"; None means the default device's.

    Returns:
      `(name, not_taken)`: the name, and for each other name the reason why it was not taken.

    Raises:
      ValueError: a size or the platform breaks a rule of `fused_qk_rmsnorm_rope_gate`.
      TypeError: the dtype is not one of float16, bfloat16 and float32.

    Example:
      >>> import pallas_qk
      >>> pallas_qk.default_implementation(4096, 16, 2, 256, 64, "bfloat16", platform="cpu").name
      'xla'
    """
    num_q_heads, num_kv_heads, head_dim, rotary_dim = _checks.check_sizes(
        num_q_heads, num_kv_heads, head_dim, rotary_dim
    )
    num_tokens = _checks.check_num_tokens(num_tokens)
    dtype = _checks.check_activation_dtype("dtype", dtype)
    _checks.check_platform(platform)
    return _implementations.choose(Spec(num_tokens, num_q_heads, num_kv_heads, head_dim, rotary_dim, dtype), platform)
