"""Runs one implementation by name on whatever device is there."""

import functools

import jax
import jax.numpy as jnp
from jax.extend.core import jaxprs_in_params

import pallas_qk
from pallas_qk import _implementations
from pallas_qk._config import Options
from tests.cases import Case, Inputs


def has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def run(implementation: str, case: Case, inputs: Inputs, **config) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(q_out, k_out, gate_out): the public function, or the kernel executed by its interpreter without a GPU.

    `config` goes to the kernel's own `forward` and takes that path on a GPU too.
    """
    if implementation == "xla" or (has_gpu() and not config):
        return pallas_qk.fused_qk_rmsnorm_rope_gate(*inputs, **case.static_arguments, implementation=implementation)
    q_gate, k, q_weight, k_weight, cos_sin_cache, positions = inputs
    num_tokens = case.num_tokens
    outputs = _kernel(implementation, case, **config)(
        q_gate.reshape(num_tokens, case.num_q_heads, 2 * case.head_dim),
        k.reshape(num_tokens, case.num_kv_heads, case.head_dim),
        q_weight,
        k_weight,
        cos_sin_cache,
        positions if positions.ndim == 2 else positions[None],
    )
    q_out, k_out, gate_out = (jnp.asarray(x).reshape(num_tokens, x.shape[1] * x.shape[2]) for x in outputs)
    return q_out, k_out, gate_out


@functools.cache
def _kernel(implementation: str, case: Case, **config):
    options = Options(case.rotary_dim, case.eps, case.norm_beta, case.mrope_section)
    forward = functools.partial(_implementations.module(implementation).forward, options=options, **config)
    if has_gpu():
        return jax.jit(forward)
    if implementation == "triton":
        return jax.jit(functools.partial(forward, interpret=True))
    from tests.mosaic_interpreter import execute

    return jax.jit(forward) if case.num_tokens == 0 else functools.partial(execute, forward)


def primitives(function, *args) -> list[str]:
    """The names of the primitives that `function` is traced to, those of inner programs included."""

    def names(jaxpr):
        for eqn in jaxpr.eqns:
            yield eqn.primitive.name
            for inner in jaxprs_in_params(eqn.params):
                yield from names(inner)

    return list(names(jax.make_jaxpr(function)(*args).jaxpr))
