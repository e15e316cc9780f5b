"""The backward as it is timed: gradients of q_gate, k and both weights, by each implementation and by autodiff."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

import pallas_qk
from benchmarks import xla_plain
from benchmarks.agreement import Agreement, Promise
from benchmarks.providers import Builder, Call
from pallas_qk import _reference
from pallas_qk._operands import Outputs
from tests import forms
from tests.cases import Case, Inputs
from tests.compare import Comparison, compare_bits

_DIFFERENTIATED = 4  # q_gate, k, q_weight, k_weight


@functools.partial(jax.jit, static_argnames=("case",))
def cotangents(case: Case, seed: int = 1) -> list[jax.Array]:
    """Random cotangents of q_out, k_out and gate_out."""
    heads = (case.num_q_heads, case.num_kv_heads, case.num_q_heads)
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = [(case.num_tokens, h * case.head_dim) for h in heads]
    return [
        jax.random.normal(key, shape, jnp.float32).astype(case.dtype) for key, shape in zip(keys, shapes, strict=True)
    ]


def _builder(op: Callable) -> Builder:
    def build(case: Case, inputs: Inputs) -> Call:
        @jax.jit
        def gradients(arguments, others, cotangents):
            def forward(*arguments):
                return op(*arguments, *others, **case.static_arguments)

            # The outputs aren't used, so XLA drops what the residuals don't need: the whole forward, for ours.
            return jax.vjp(forward, *arguments)[1](tuple(cotangents))

        arrays = list(inputs)
        return functools.partial(gradients, arrays[:_DIFFERENTIATED], arrays[_DIFFERENTIATED:], cotangents(case))

    return build


PROVIDERS: dict[str, Builder] = {
    **{
        name: _builder(functools.partial(pallas_qk.fused_qk_rmsnorm_rope_gate, implementation=name))
        for name in pallas_qk.IMPLEMENTATIONS
    },
    "xla_plain": _builder(xla_plain.fused_qk_rmsnorm_rope_gate),
}


def expected(case: Case, inputs: Inputs) -> list[jax.Array]:
    """The gradients in float32 from the same inputs: what every 16-bit gradient rounds."""

    @jax.jit
    def backward(inputs, cotangents):
        inputs, cotangents = (
            jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
            for tree in (inputs, cotangents)
        )
        results = _reference.backward(
            forms.split_heads(case, inputs), forms.split_heads(case, cotangents), options=forms.options(case)
        )
        return [x.reshape(like.shape) for x, like in zip(results, inputs, strict=False)]

    dq_out, dk_out, dgate_out = cotangents(case)
    return backward(forms.inputs_of(case, inputs), Outputs(dq_out, dk_out, gate=dgate_out))


@functools.partial(jax.jit, static_argnames=("case",))
def _relative_errors(case: Case, got: Sequence[jax.Array], want: Sequence[jax.Array]) -> list[jax.Array]:
    """|got - want| / |want| of q_gate's, k's and the weights' gradients, in the norm of the whole array."""
    return [
        jnp.linalg.norm((g.astype(jnp.float32) - w).reshape(-1)) / jnp.linalg.norm(w.reshape(-1))
        for g, w in zip(got, want, strict=True)
    ]


def agreement(case: Case, got: Sequence[jax.Array], want: Sequence[jax.Array]) -> Agreement:
    """Whether the gradients are the float32 ones, rounded: the error of rounding alone, and the gate's bits."""
    # Rounding to nearest leaves at most half a step of each element; plain autodiff of 16-bit code rounds in between,
    # its cotangents too.
    bound = 4 * float(jnp.finfo(case.dtype).eps)
    errors = [float(e) for e in _relative_errors(case, got, want)]
    shape = (case.num_tokens, case.num_q_heads, 2, case.head_dim)
    gate = got[0].reshape(shape)[:, :, 1].reshape(case.num_tokens, -1)
    gate_compared: Comparison = compare_bits("dq_gate's gate", gate, cotangents(case)[2])
    kept = all(error <= bound for error in errors) and gate_compared.differing == 0
    elements = sum(x.size for x in got)
    promised = Promise(elements, bound, bound, "relative")
    differing = elements - gate.size  # every other element is rounded
    against, worst = "float32 gradients", max(errors)
    return Agreement(elements, differing, promised, worst, worst, kept, str(gate_compared), against)
