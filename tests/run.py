"""Runs one implementation by name on whatever device is there."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

import pallas_qk
from pallas_qk import _implementations, _rows
from pallas_qk._options import Options
from tests import forms
from tests.cases import Case, Inputs
from tests.lowering import HOPPER_SMS


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


def run(
    implementation: str, case: Case, inputs: Inputs, *, v: jax.Array | None = None, **config
) -> tuple[jax.Array, ...]:
    """(q_out, k_out, gate_out), or what the case's form has of q_out, k_out, v_out and gate_out; all (T, heads*D).

    The public function, or the kernel executed by its interpreter without a GPU. `config` goes to the kernel's own
    `forward` and takes that path on a GPU too. `v` takes the place of `forms.values`.
    """
    if implementation == "xla" or (has_gpu() and not config):
        return forms.op(case, implementation)(*forms.arguments(case, inputs, v))
    operands = forms.split_heads(case, forms.inputs_of(case, inputs, v))
    outputs = cached_kernel("forward", implementation, forms.options(case), case.num_tokens == 0, **config)(operands)
    if case.gate == "in_place":
        assert outputs.gate is None
        outputs = outputs._replace(gate=forms.split_gates(case, inputs.q_gate)[1])
    return tuple(_flat(x) for x in jax.tree.leaves(outputs))


def run_arrays(implementation: str, arrays, static: dict, options: Options) -> list[jax.Array]:
    """(q_out, k_out, gate_out), flat: `run` for the arrays and static arguments of `fused_qk_rmsnorm_rope_gate`.

    The interpreter takes `options` instead of `static`.
    """
    if implementation == "xla" or has_gpu():
        return list(pallas_qk.fused_qk_rmsnorm_rope_gate(*arrays, **static, implementation=implementation))
    q_gate, k, *others, positions = arrays
    heads = [x.reshape(len(x), static[n], -1) for x, n in ((q_gate, "num_q_heads"), (k, "num_kv_heads"))]
    inputs = _rows.Inputs(*heads, *others, None if positions is None else jnp.atleast_2d(positions))
    outputs = cached_kernel("forward", implementation, options, False)(inputs)
    return [_flat(x) for x in (outputs.q, outputs.k, outputs.gate)]


def run_backward(
    implementation: str,
    case: Case,
    inputs: Inputs,
    cotangents,
    *,
    round_dweights: bool = False,
    num_sms: int | None = None,
    **config,
) -> list[jax.Array]:
    """The gradients of q and k (or of one packed array), flat, and of the weights, by `backward` itself.

    `cotangents` are those of what `run` returns. With `num_sms` the interpreter runs, on a GPU too, the code for one of
    so many multiprocessors.
    """
    operands = forms.split_heads(case, forms.inputs_of(case, inputs))
    cotangents = forms.split_heads(case, forms.as_outputs(case, cotangents))
    options = dataclasses.replace(forms.options(case), round_dweights=round_dweights)
    function = cached_kernel("backward", implementation, options, case.num_tokens == 0, num_sms, **config)
    gradients: _rows.Gradients = function(operands, cotangents)
    wanted = {name: (x.shape, x.dtype) for name in gradients._fields if (x := getattr(operands, name)) is not None}
    if not round_dweights:
        wanted |= {name: (wanted[name][0], jnp.float32) for name in _rows.WEIGHTS if name in wanted}
    found = {name: (x.shape, x.dtype) for name, x in gradients._asdict().items() if x is not None}
    assert found == wanted, (found, wanted)
    return [jnp.asarray(x) if x.ndim == 1 else _flat(x) for x in jax.tree.leaves(gradients)]


def _flat(x) -> jax.Array:
    """(T, heads*D) of (T, heads, D)."""
    return jnp.asarray(x).reshape(x.shape[0], math.prod(x.shape[1:]))


def kernel(direction: str, implementation: str, options: Options, is_empty: bool, num_sms: int | None = None, **config):
    """`forward` or `backward` of an implementation, compiled, or run by its interpreter."""
    function = functools.partial(getattr(_implementations.module(implementation), direction), options=options, **config)
    if implementation == "xla" or (has_gpu() and num_sms is None):
        return jax.jit(function)
    if implementation == "triton":
        return quick_jit(functools.partial(function, interpret=True))
    from tests.mosaic_interpreter import execute

    return jax.jit(function) if is_empty else functools.partial(execute, function, num_sms=num_sms or HOPPER_SMS)


cached_kernel = functools.cache(kernel)


def primitives(function, *args) -> list[str]:
    """The names of the primitives that `function` is traced to, those of inner programs included."""

    def names(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name
            for inner in jaxprs_in_params(eqn.params):
                yield from names(inner)

    return list(names(jax.make_jaxpr(function)(*args).jaxpr))
