"""The suite `block`: from the projection's output to gated attention output, with attention taken out.

A block takes an array that stands for attention's result, and q_gate and k or one packed projection of them and v. It
returns q, k (and v) for attention, and that array times sigmoid(gate). What a copied gate and slices of a packed
projection cost shows here, forward and backward.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp

import pallas_qk
from benchmarks import gradients
from benchmarks.agreement import Agreement, agreement, relative_error
from benchmarks.checked import Checks, check
from benchmarks.providers import JAX_OPS, PROVIDERS, Builder, Op, jitted, to_jax
from tests import forms
from tests.cases import Case, Inputs, random_normal
from tests.compare import compare_bits

# The ends of names, by form of the gate: copy_gate=True, False and "never".
ENDINGS = {"copied": "", "in_place": "_in_place", "handed_on": "_never"}


def block(op: Op) -> Op:
    """q, k (and v), and attended * sigmoid(gate), from attended and the op's arrays."""

    def run(attended, *arrays):
        *outputs, gate = op(*arrays)
        if isinstance(gate, pallas_qk.Gate):
            return *outputs, pallas_qk.apply_gate(attended, gate)
        return *outputs, attended * jax.nn.sigmoid(gate)

    return run


def blocks(case: Case, names: Iterable[str]) -> dict[str, Op]:
    """The blocks by the names of their rows: each implementation with each form of the gate, and plain jnp."""
    forms_of = {name: ENDINGS if name in pallas_qk.IMPLEMENTATIONS else {"copied": ""} for name in names}
    return {
        f"{name}{ending}": block(JAX_OPS[name](dataclasses.replace(case, gate=gate)))
        for name, endings in forms_of.items()
        if name in JAX_OPS
        for gate, ending in endings.items()
    }


def arrays_of(case: Case, inputs: Inputs) -> tuple[jax.Array, ...]:
    """What a block takes, attended first: random (T, Hq*D)."""
    attended = random_normal((case.num_tokens, case.num_q_heads * case.head_dim), case.dtype, seed=2)
    return attended, *forms.arguments(case, inputs)


def check_forward(case: Case, inputs: Inputs, providers: Mapping[str, Builder], *, packed: bool = False) -> Checks:
    """The blocks whose q and k agree with the oracle as promised, and whose gated output does up to rounding."""
    form = dataclasses.replace(case, packed=packed)
    arrays = arrays_of(form, inputs)
    q_want, k_want, gate_want = to_jax(PROVIDERS["oracle"](case, inputs)())
    gated_want = _gated32(arrays[0], gate_want)
    v = forms.values(case)

    def compare(name: str, got) -> Agreement:
        q, k, *vs, gated = got
        implementation = name.removesuffix(ENDINGS["in_place"]).removesuffix(ENDINGS["handed_on"])
        compared = agreement(implementation, case, (q, k, gate_want), (q_want, k_want, gate_want), platform="gpu")
        same_v = all(compare_bits("v", x, v).differing == 0 for x in vs)
        kept = compared.kept and same_v and relative_error(gated, gated_want) <= 4 * float(jnp.finfo(case.dtype).eps)
        return dataclasses.replace(compared, kept=kept, against="oracle, times sigmoid")

    builds = {name: functools.partial(jitted, run, *arrays) for name, run in blocks(form, providers).items()}
    return check(case, builds, compare)


def check_backward(case: Case, inputs: Inputs, providers: Mapping[str, Builder], *, packed: bool = False) -> Checks:
    """The blocks whose gradients are the float32 ones up to the rounding of 16-bit arrays."""
    form = dataclasses.replace(case, packed=packed)
    arrays, cotangents = arrays_of(form, inputs), gradients.cotangents(form, seed=3)
    want = gradients.expected(block(JAX_OPS["xla_plain"](form)), cotangents, arrays)
    bound = 8 * float(jnp.finfo(case.dtype).eps)  # as for the op alone, and the product's own roundings
    builds = {
        name: functools.partial(jitted, gradients.gradients(run), cotangents, *arrays)
        for name, run in blocks(form, providers).items()
    }
    return check(case, builds, lambda name, got: gradients.agreement(got, want, bound))


@jax.jit
def _gated32(attended: jax.Array, gate: jax.Array) -> jax.Array:
    return attended.astype(jnp.float32) * jax.nn.sigmoid(gate.astype(jnp.float32))
