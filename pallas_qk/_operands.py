"""The arrays of one call, by name: what every implementation takes and returns.

T num_tokens, Hq num_q_heads, Hkv num_kv_heads, D head_dim, R rotary_dim. The fields are of any type, since trees of
the same form say something of each array: its type, the names of its axes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_qk._config import Options, Spec


class Inputs(NamedTuple):
    """What the op reads; None where a call has no such array. `Options` says which form `q` has."""

    q: Any  # (T, Hq, 2*D), each head [q | gate]; without gates (T, Hq, D); packed (T, Hq*(2 or 1)*D + 2*Hkv*D)
    k: Any  # (T, Hkv, D); None where it lies in a packed q, [q heads | k heads | v heads]
    q_weight: Any  # (D,)
    k_weight: Any  # (D,)
    cos_sin_cache: Any  # (max_pos, R); without positions (T, R), the row of each token
    positions: Any  # (1 or 3, T)


class Outputs(NamedTuple):
    """What the op returns, and the cotangents of that; None where a call has no such array."""

    q: Any  # (T, Hq, D)
    k: Any  # (T, Hkv, D)
    v: Any = None  # (T, Hkv, D), of a packed q
    gate: Any = None  # (T, Hq, D)


class Gradients(NamedTuple):
    """What the backward returns."""

    q: Any  # as Inputs.q
    k: Any  # as Inputs.k
    q_weight: Any  # (D,), see `Options.round_dweights`
    k_weight: Any  # (D,)


class Call(NamedTuple):
    """What one call fixes besides its arrays."""

    options: Options
    implementation: str | None


def spec_of(inputs: Inputs, options: Options) -> Spec:
    """The sizes of a call of arrays in the shapes above."""
    num_q_heads, num_kv_heads = options.packed or (inputs.q.shape[1], inputs.k.shape[1])
    head_dim = inputs.q_weight.shape[0]
    return Spec(inputs.q.shape[0], num_q_heads, num_kv_heads, head_dim, options.rotary_dim, str(inputs.q.dtype))


def output_types(inputs: Inputs, options: Options) -> Outputs:
    """The types of what a kernel's forward returns: no gate where it is left in q."""
    spec = spec_of(inputs, options)

    def heads(num_heads: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((spec.num_tokens, num_heads, spec.head_dim), inputs.q.dtype)

    q, k = heads(spec.num_q_heads), heads(spec.num_kv_heads)
    return Outputs(q, k, k if options.packed else None, q if options.gate == "copied" else None)


def gradient_types(inputs: Inputs, options: Options) -> Gradients:
    """The types of what a kernel's backward returns."""
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), Gradients(*inputs[:4]))
    if options.round_dweights:
        return types
    weight = jax.ShapeDtypeStruct(inputs.q_weight.shape, jnp.float32)
    return types._replace(q_weight=weight, k_weight=weight)
