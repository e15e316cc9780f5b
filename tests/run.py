"""Runs one implementation by name on whatever device is there."""

import functools

import jax

import pallas_qk
from pallas_qk import _implementations
from pallas_qk._config import Options
from tests.cases import Case, Inputs


def has_gpu() -> bool:
    return jax.default_backend() == "gpu"


def run(implementation: str, case: Case, inputs: Inputs, **config) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(q_out, k_out, gate_out): the public function, or the kernel in interpret mode where there is no GPU.

    `config` goes to the kernel's own `forward` and takes that path on a GPU too.
    """
    if implementation == "xla" or (has_gpu() and not config):
        return pallas_qk.fused_qk_rmsnorm_rope_gate(*inputs, **case.static_arguments, implementation=implementation)
    return _run_kernel(implementation, case, **config)(*inputs)


@functools.cache
def _run_kernel(implementation: str, case: Case, **config):
    forward = _implementations.module(implementation).forward
    options = Options(case.rotary_dim, case.eps, case.norm_beta, case.mrope_section)

    @jax.jit
    def call(q_gate, k, q_weight, k_weight, cos_sin_cache, positions):
        num_tokens = q_gate.shape[0]
        outputs = forward(
            q_gate.reshape(num_tokens, case.num_q_heads, 2 * case.head_dim),
            k.reshape(num_tokens, case.num_kv_heads, case.head_dim),
            q_weight,
            k_weight,
            cos_sin_cache,
            positions if positions.ndim == 2 else positions[None],
            options=options,
            interpret=not has_gpu(),
            **config,
        )
        return tuple(x.reshape(num_tokens, x.shape[1] * x.shape[2]) for x in outputs)

    return call
