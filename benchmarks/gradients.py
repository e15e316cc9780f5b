"""Gradients as they are timed, and the float32 gradients that they are compared with."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from benchmarks.agreement import Agreement, Promise, relative_error
from benchmarks.providers import Op
from pallas_qk._rows import kinds_of
from tests import forms
from tests.cases import Case
from tests.compare import Comparison, compare_bits


@functools.partial(jax.jit, static_argnames=("case", "seed"))
def cotangents(case: Case, seed: int = 1) -> tuple[jax.Array, ...]:
    """Random cotangents of what the op returns in the form of `case`: of q, k, v if packed, and gate."""
    num_heads = {"q": case.num_q_heads, "k": case.num_kv_heads}
    widths = [num_heads[kind.heads] * case.head_dim for kind in kinds_of(forms.options(case)).values()]
    keys = jax.random.split(jax.random.key(seed), len(widths))
    return tuple(
        jax.random.normal(key, (case.num_tokens, width), jnp.float32).astype(case.dtype)
        for key, width in zip(keys, widths, strict=True)
    )


def gradients(function: Op) -> Op:
    """Maps cotangents and the arrays of `function` to gradients of all but the last two arrays, table and positions."""

    def run(cotangents, *arrays):
        *differentiated, table, positions = arrays
        # The results aren't used, so XLA drops what the residuals don't need: the whole forward, for ours.
        _, pullback = jax.vjp(lambda *first: function(*first, table, positions), *differentiated)
        return pullback(cotangents)

    return run


def expected(function: Op, cotangents: Sequence[jax.Array], arrays: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
    """The gradients in float32 throughout, from the same inputs: what every 16-bit gradient rounds."""

    @jax.jit
    def run(*operands):
        def widen(x):
            return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x

        return gradients(function)(*jax.tree.map(widen, operands))

    return run(cotangents, *arrays)


_NOTHING = Comparison(0, 0)


def agreement(
    got: Sequence[jax.Array], want: Sequence[jax.Array], bound: float, copied: Comparison = _NOTHING
) -> Agreement:
    """Whether each gradient is the float32 one but for a relative `bound` in the norm of the whole array.

    `copied` compares elements that are copies: their bits must be equal, every other element is rounded.
    """
    errors = [relative_error(g, w) for g, w in zip(got, want, strict=True)]
    elements, worst = sum(x.size for x in got), max(errors)
    promise = Promise(elements, bound, bound, "relative")
    kept = all(error <= bound for error in errors) and copied.differing == 0  # `worst` may hide a NaN
    differing = elements - copied.elements
    return Agreement(elements, differing, promise, worst, worst, kept, copied.first, "float32 gradients")


def op_agreement(case: Case, got: Sequence[jax.Array], want: Sequence[jax.Array]) -> Agreement:
    """Whether the op's gradients are the float32 ones, rounded: the error of rounding alone, and a gate's bits."""
    copied = _NOTHING
    if case.gate is not None:
        copied = compare_bits("dq_gate's gate", forms.split_gates(case, got[0])[1], cotangents(case)[-1])
    # Rounding to nearest leaves at most half a step of each element; plain autodiff of 16-bit code rounds in between,
    # its cotangents too.
    bound = 4 * float(jnp.finfo(case.dtype).eps)
    return agreement(got, want, bound, copied)
