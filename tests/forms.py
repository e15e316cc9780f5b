"""The forms of one case: which public function takes it, and the case's numbers in the arrays of that form."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import pallas_qk
from pallas_qk import _rows
from pallas_qk._options import Options
from tests.cases import Case, Inputs, make_cotangents, make_inputs, random_normal


def plain(case: Case) -> Case:
    """The case in the form of the contract: gates copied, separate arrays, positions."""
    return dataclasses.replace(case, gate="copied", packed=False, gathered=False)


def op(case: Case, implementation: str | None = None, **static: Any) -> Callable:
    """The public function of the case, of arrays alone."""
    static = case.static_arguments | {"mrope_layout": case.mrope_layout, "implementation": implementation} | static
    if case.gate == "in_place":
        static["copy_gate"] = False
    function = getattr(pallas_qk, f"fused_qk{'v' * case.packed}_rmsnorm_rope{'_gate' if case.gate else ''}")
    if case.gathered:  # the arrays that differ come first, then the weights and the table
        return lambda *args: function(*args, None, **static)
    return functools.partial(function, **static)


def options(case: Case) -> Options:
    return Options(
        rotary_dim=case.rotary_dim,
        eps=case.eps,
        norm_beta=case.norm_beta,
        mrope_section=case.mrope_section,
        mrope_layout=case.mrope_layout,
        rotation=case.rotation,
        round_norm=case.round_norm or case.dtype == "float32",
        gate=case.gate,
        packed=(case.num_q_heads, case.num_kv_heads) if case.packed else None,
    )


def values(case: Case, seed: int = 1000) -> jax.Array:
    """v (T, Hkv*D) of a packed array."""
    return random_normal((case.num_tokens, case.num_kv_heads * case.head_dim), case.dtype, seed)


def v_cotangents(case: Case, seed: int = 0) -> jax.Array:
    return values(case, seed + 7)


def inputs_of(case: Case, inputs: Inputs, v: jax.Array | None = None) -> _rows.Inputs:
    """The case's inputs in its form, (T, heads*D); gathered rows of the table need positions inside it."""
    x = _rows.Inputs(*inputs)
    if case.gate is None:
        x = x._replace(q=split_gates(case, x.q)[0])
    if case.packed:
        x = x._replace(q=jnp.concatenate([x.q, x.k, values(case) if v is None else v], axis=-1), k=None)
    if case.gathered:
        x = x._replace(cos_sin_cache=x.cos_sin_cache[x.positions], positions=None)
    return x


def arguments(case: Case, inputs: Inputs, v: jax.Array | None = None) -> list[jax.Array]:
    """The arrays that `op(case)` takes."""
    return jax.tree.leaves(inputs_of(case, inputs, v))


def split_gates(case: Case, q_gate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q and gate (T, Hq*D)."""
    q, gate = jnp.split(q_gate.reshape(case.num_tokens, case.num_q_heads, 2 * case.head_dim), 2, axis=-1)
    flat = (case.num_tokens, case.num_q_heads * case.head_dim)
    return q.reshape(flat), gate.reshape(flat)


def outputs_of(case: Case, outputs, v: jax.Array | None = None) -> list[jax.Array]:
    """What `op(case)` returns where `op(plain(case))` returns `outputs`."""
    q, k, gate = outputs
    v_out = [values(case) if v is None else v] if case.packed else []
    return [q, k, *v_out, *([] if case.gate is None else [gate])]


def output_names(case: Case) -> list[str]:
    """Of what `op(case)` returns, in its order: fields of `_rows.Outputs`."""
    return ["q", "k", *(["v"] if case.packed else []), *([] if case.gate is None else ["gate"])]


def as_outputs(case: Case, arrays) -> _rows.Outputs:
    """What `op(case)` returns, or cotangents of it, by name."""
    return _rows.Outputs(**dict(zip(output_names(case), arrays, strict=True)))


def cotangents_of(case: Case, seed: int = 0) -> list[jax.Array]:
    """Of what `op(case)` returns."""
    return outputs_of(case, make_cotangents(case, seed), v_cotangents(case, seed))


def gradients_of(case: Case, gradients, seed: int = 0) -> list[jax.Array]:
    """The gradients of q, k and the weights in the form of `case`, from those of its plain form.

    The cotangents are those of `seed`.
    """
    q, k, *weights = gradients
    if case.gate is None:
        q = split_gates(case, q)[0]
    if case.packed:
        return [jnp.concatenate([q, k, v_cotangents(case, seed)], axis=-1), *weights]
    return [q, k, *weights]


def split_heads(case: Case, x: _rows.Inputs | _rows.Outputs):
    """The shapes of the implementations: (T, heads, 2*D or D) for (T, heads*D), and positions (1 or 3, T)."""
    t, d = case.num_tokens, case.head_dim
    if isinstance(x, _rows.Outputs):
        return x._replace(**{n: a.reshape(t, a.shape[-1] // d, d) for n, a in x._asdict().items() if a is not None})
    if not case.packed:
        width = d if case.gate is None else 2 * d
        x = x._replace(q=x.q.reshape(t, case.num_q_heads, width), k=x.k.reshape(t, case.num_kv_heads, d))
    return x if x.positions is None else x._replace(positions=jnp.atleast_2d(x.positions))


def types(case: Case) -> tuple[_rows.Inputs, _rows.Outputs]:
    """Of the inputs and the cotangents in the shapes of the implementations."""

    def make():
        inputs = inputs_of(case, make_inputs(case))
        q, k = (
            jnp.zeros((case.num_tokens, h, case.head_dim), case.dtype) for h in (case.num_q_heads, case.num_kv_heads)
        )
        v, gate = k if case.packed else None, None if case.gate is None else q
        return split_heads(case, inputs), _rows.Outputs(q, k, v, gate)

    return jax.eval_shape(make)
