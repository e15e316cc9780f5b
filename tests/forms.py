"""The forms of one case: which public function takes it, and the case's numbers in the arrays of that form."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import pallas_qk
from pallas_qk import _rows
from pallas_qk._options import Options
from tests.cases import Case, Inputs, make_cotangents, make_inputs, random_normal

COPY_GATE = {"copied": True, "in_place": False, "handed_on": "never"}  # by `Case.gate`
# Of `op(case)`, as far as the case has them: fields of `_rows.Inputs`, what has a gradient first.
ARGUMENTS = ("q", "k", "v", "q_weight", "k_weight", "cos_sin_cache", "positions")


def plain(case: Case) -> Case:
    """The case in the form of the contract: gates copied, separate arrays, positions."""
    return dataclasses.replace(
        case, gate="copied", packed=False, separate_v=False, q_alone=False, weights=True, gathered=False, v_norm=False
    )


def op(case: Case, implementation: str | None = None, **static: Any) -> Callable:
    """The public function of the case, of arrays alone."""
    static = case.static_arguments | {"mrope_layout": case.mrope_layout, "implementation": implementation} | static
    if case.gate:
        static["copy_gate"] = COPY_GATE[case.gate]
    if case.q_alone:
        static["num_kv_heads"] = 0
    if case.v_norm and has_v(case):
        static["v_norm"] = True
    function = getattr(pallas_qk, f"fused_qk{'v' * has_v(case)}_rmsnorm_rope{'_gate' if case.gate else ''}")
    names = [name for name in ARGUMENTS if getattr(given(case), name)]

    def run(*arrays):
        by_name = dict.fromkeys(ARGUMENTS) | dict(zip(names, arrays, strict=True))
        q, k, v, *others = by_name.values()
        first = [q] if case.packed else [(q, k, v)] if case.separate_v else [q, k]
        return tuple(x for x in function(*first, *others, **static) if x is not None)

    return run


def has_v(case: Case) -> bool:
    return case.packed or case.separate_v


def given(case: Case) -> _rows.Inputs:
    """Whether the case has each array, None where it hasn't."""
    weight = case.weights or None
    table = case.rotary_dim > 0 or None
    return _rows.Inputs(
        q=True,
        k=None if case.packed or case.q_alone else True,
        q_weight=weight,
        k_weight=None if case.q_alone else weight,
        cos_sin_cache=table,
        positions=None if case.gathered else table,
        v=case.separate_v or None,
    )


def options(case: Case) -> Options:
    return Options(
        rotary_dim=case.rotary_dim,
        eps=case.eps,
        norm_beta=case.norm_beta,
        mrope_section=case.mrope_section,
        mrope_layout=case.mrope_layout,
        rotation=case.rotation if case.rotary_dim else None,
        round_norm=case.round_norm or case.dtype == "float32",
        norm_order=case.norm_order if case.rotary_dim else "norm_first",
        head_dim=None if case.weights else case.head_dim,
        v_norm=case.v_norm,
        gate=case.gate,
        packed=(case.num_q_heads, case.num_kv_heads) if case.packed else None,
        q_alone=case.q_alone,
        separate_v=case.separate_v,
    )


def values(case: Case, seed: int = 1000) -> jax.Array:
    """v (T, Hkv*D), as it is given."""
    return random_normal((case.num_tokens, case.num_kv_heads * case.head_dim), case.dtype, seed)


def v_cotangents(case: Case, seed: int = 0) -> jax.Array:
    return values(case, seed + 7)


def inputs_of(case: Case, inputs: Inputs, v: jax.Array | None = None) -> _rows.Inputs:
    """The case's inputs in its form, (T, heads*D); gathered rows of the table need positions inside it."""
    x = _rows.Inputs(*inputs)._replace(v=values(case) if v is None and has_v(case) else v)
    if case.gate is None:
        x = x._replace(q=split_gates(case, x.q)[0])
    if case.packed:
        x = x._replace(q=jnp.concatenate([x.q, x.k, x.v], axis=-1))
    if case.gathered:
        x = x._replace(cos_sin_cache=x.cos_sin_cache[x.positions])
    return _rows.Inputs(*(array if is_given else None for array, is_given in zip(x, given(case), strict=True)))


def arguments(case: Case, inputs: Inputs, v: jax.Array | None = None) -> list[jax.Array]:
    """The arrays that `op(case)` takes."""
    x = inputs_of(case, inputs, v)
    return [array for name in ARGUMENTS if (array := getattr(x, name)) is not None]


def split_gates(case: Case, q_gate: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q and gate (T, Hq*D)."""
    q, gate = jnp.split(q_gate.reshape(case.num_tokens, case.num_q_heads, 2 * case.head_dim), 2, axis=-1)
    flat = (case.num_tokens, case.num_q_heads * case.head_dim)
    return q.reshape(flat), gate.reshape(flat)


def outputs_of(case: Case, outputs, v: jax.Array | None = None) -> list[jax.Array]:
    """What `op(case)` returns where `op(plain(case))` returns `outputs`, and v is returned as it is or as `v`."""
    q, k, gate = outputs
    every = {"q": q, "k": k, "gate": gate}
    if "v" in (names := output_names(case)):
        assert v is not None or not case.v_norm
        every["v"] = values(case) if v is None else v
    return [every[name] for name in names]


def output_names(case: Case) -> list[str]:
    """Of what `op(case)` returns, in its order: fields of `_rows.Outputs`."""
    has = {"q": True, "k": not case.q_alone, "v": has_v(case), "gate": case.gate is not None}
    return [name for name, is_there in has.items() if is_there]


def as_outputs(case: Case, arrays) -> _rows.Outputs:
    """What `op(case)` returns, or cotangents of it, by name."""
    return _rows.Outputs(**dict(zip(output_names(case), arrays, strict=True)))


def cotangents_of(case: Case, seed: int = 0) -> list[jax.Array]:
    """Of what `op(case)` returns."""
    return outputs_of(case, make_cotangents(case, seed), v_cotangents(case, seed))


def gradients_of(case: Case, gradients, seed: int = 0) -> list[jax.Array]:
    """The gradients of q, k and the weights in the form of `case`, from those of its plain form.

    The cotangents are those of `seed`, and v isn't normalised.
    """
    q, k, *weights = gradients
    assert not case.v_norm
    if case.gate is None:
        q = split_gates(case, q)[0]
    if case.packed:
        rows = [jnp.concatenate([q, k, v_cotangents(case, seed)], axis=-1)]
    else:
        rows = [q, *([] if case.q_alone else [k]), *([v_cotangents(case, seed)] if case.separate_v else [])]
    return rows + (weights[:1] if case.q_alone else weights) * case.weights


def of_v(case: Case) -> Case:
    """A call whose rows of k are normalised as v is."""
    return dataclasses.replace(
        plain(case), num_q_heads=1, rotary_dim=0, mrope_section=None, norm_beta=0.0, norm_order="norm_first"
    )


def inputs_of_v(case: Case, v: jax.Array) -> Inputs:
    """Those of `of_v`."""
    ones = jnp.ones(case.head_dim, v.dtype)
    return Inputs(jnp.zeros((case.num_tokens, 2 * case.head_dim), v.dtype), v, ones, ones, None, None)


def split_heads(case: Case, x: _rows.Inputs | _rows.Outputs):
    """The shapes of the implementations: (T, heads, 2*D or D) for (T, heads*D), and positions (1 or 3, T)."""
    t, d = case.num_tokens, case.head_dim
    if isinstance(x, _rows.Outputs):
        return x._replace(**{n: a.reshape(t, a.shape[-1] // d, d) for n, a in x._asdict().items() if a is not None})
    if not case.packed:
        width = d if case.gate is None else 2 * d
        x = x._replace(q=x.q.reshape(t, case.num_q_heads, width))
    of_kv = {name: a.reshape(t, case.num_kv_heads, d) for name in "kv" if (a := getattr(x, name)) is not None}
    x = x._replace(**of_kv)
    return x if x.positions is None else x._replace(positions=jnp.atleast_2d(x.positions))


def types(case: Case) -> tuple[_rows.Inputs, _rows.Outputs]:
    """Of the inputs and the cotangents in the shapes of the implementations."""

    def make():
        inputs = inputs_of(case, make_inputs(case))
        q, k = (
            jnp.zeros((case.num_tokens, h, case.head_dim), case.dtype) for h in (case.num_q_heads, case.num_kv_heads)
        )
        every = {"q": q, "k": k, "v": k, "gate": q}
        return split_heads(case, inputs), _rows.Outputs(**{name: every[name] for name in output_names(case)})

    return jax.eval_shape(make)
