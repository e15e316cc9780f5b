"""Runs one implementation by name on whatever device is there."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

from pallas_qk import _implementations
from pallas_qk._config import Options
from pallas_qk._operands import Gradients, Outputs
from tests import forms
from tests.cases import Case, Inputs


def has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def quick_jit(function):
    """jax.jit that compiles for a CPU in a third of the time, to slower code.

    For interpreted kernels, references, and results that are compared by a bound. What claims bits of plain XLA takes
    jax.jit: they must be those of optimised code.
    """
    options = {"xla_backend_optimization_level": 0}
    if jax.__version_info__ < (0, 11):  # later ones have these emitters alone
        options["xla_cpu_use_fusion_emitters"] = False
    return jax.jit(function, compiler_options=None if has_gpu() else options)


def run(implementation: str, case: Case, inputs: Inputs, **config) -> tuple[jax.Array, ...]:
    """(q_out, k_out, gate_out), or what the case's form has of q_out, k_out, v_out and gate_out; all (T, heads*D).

    The public function, or the kernel executed by its interpreter without a GPU. `config` goes to the kernel's own
    `forward` and takes that path on a GPU too.
    """
    if implementation == "xla" or (has_gpu() and not config):
        return forms.op(case, implementation)(*forms.arguments(case, inputs))
    operands = forms.split_heads(case, forms.inputs_of(case, inputs))
    outputs = _kernel("forward", implementation, forms.options(case), case.num_tokens == 0, **config)(operands)
    if case.gate == "in_place":
        assert outputs.gate is None
        outputs = outputs._replace(gate=forms.split_gates(case, inputs.q_gate)[1])
    return tuple(_flat(x) for x in jax.tree.leaves(outputs))


def run_backward(
    implementation: str, case: Case, inputs: Inputs, cotangents, *, round_dweights: bool = False, **config
) -> list[jax.Array]:
    """The gradients of q and k (or of one packed array), flat, and of the weights, by `backward` itself.

    `cotangents` are those of what `run` returns.
    """
    operands = forms.split_heads(case, forms.inputs_of(case, inputs))
    names = ["q", "k", *(["v"] if case.packed else []), *([] if case.gate is None else ["gate"])]
    cotangents = forms.split_heads(case, Outputs(**dict(zip(names, cotangents, strict=True))))
    options = dataclasses.replace(forms.options(case), round_dweights=round_dweights)
    gradients: Gradients = _kernel("backward", implementation, options, case.num_tokens == 0, **config)(
        operands, cotangents
    )
    return [*map(_flat, jax.tree.leaves(gradients[:2])), *map(jnp.asarray, gradients[2:])]


def _flat(x) -> jax.Array:
    """(T, heads*D) of (T, heads, D)."""
    return jnp.asarray(x).reshape(x.shape[0], math.prod(x.shape[1:]))


@functools.cache
def _kernel(direction: str, implementation: str, options: Options, is_empty: bool, **config):
    """`forward` or `backward` of an implementation, compiled, or run by its interpreter."""
    module = _implementations.module if direction == "forward" else _implementations.backward_module
    function = functools.partial(getattr(module(implementation), direction), options=options, **config)
    if has_gpu() or implementation == "xla":
        return jax.jit(function)
    if implementation == "triton":
        return quick_jit(functools.partial(function, interpret=True))
    from tests.mosaic_interpreter import execute

    return jax.jit(function) if is_empty else functools.partial(execute, function)


def primitives(function, *args) -> list[str]:
    """The names of the primitives that `function` is traced to, those of inner programs included."""

    def names(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name
            for inner in jaxprs_in_params(eqn.params):
                yield from names(inner)

    return list(names(jax.make_jaxpr(function)(*args).jaxpr))
