"""What is timed and compared: name -> builder(case, inputs), which returns a zero-argument call of the op.

A plain dict: a script adds an entry, or passes calls of its own to `benchmarks.timing.measure`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import pallas_qk
from benchmarks import xla_plain
from benchmarks.timing import wait
from pallas_qk import dlpack
from tests.cases import Case, Inputs, make_inputs

Call = Callable[[], Any]
Builder = Callable[[Case, Inputs], Call]


_REPEATED_TOKENS = 65536


def repeated_inputs(case: Case) -> Inputs:
    """Random inputs; beyond 65,536 tokens those of 65,536, again and again.

    The random numbers of a million tokens would pass through some 140 GB of intermediate arrays.
    """
    repeats, rest = divmod(case.num_tokens, _REPEATED_TOKENS)
    if repeats <= 1 or rest:
        return make_inputs(case)
    part = make_inputs(dataclasses.replace(case, num_tokens=_REPEATED_TOKENS))
    tile = jax.jit(lambda x: jnp.tile(x, (1,) * (x.ndim - 1) + (repeats,)))
    rows = jax.jit(lambda x: jnp.tile(x, (repeats, 1)))
    return dataclasses.replace(part, q_gate=rows(part.q_gate), k=rows(part.k), positions=tile(part.positions))


def torch_inputs(inputs: Inputs) -> list[Any]:
    """The same memory as torch tensors."""
    return [dlpack.to_torch(array) for array in jax.block_until_ready(list(inputs))]


def oracle(case: Case, inputs: Inputs) -> Call:
    """The Triton kernel of the serving stacks' design, on torch tensors over the same memory."""
    from torch_ref import triton_oracle

    static: dict[str, Any] = case.static_arguments
    return functools.partial(triton_oracle.fused_qk_rmsnorm_rope_gate, *torch_inputs(inputs), **static)


def to_jax(outputs) -> list[jax.Array]:
    """The outputs of the oracle as JAX arrays over the same memory, finished."""
    wait(outputs)
    return [dlpack.from_torch(tensor) for tensor in outputs]


def pallas_qk_builder(implementation: str) -> Builder:
    """The public op by one of its implementations, under jit."""

    def build(case: Case, inputs: Inputs) -> Call:
        static: dict[str, Any] = case.static_arguments
        op = functools.partial(pallas_qk.fused_qk_rmsnorm_rope_gate, **static, implementation=implementation)
        return functools.partial(jax.jit(op), *inputs)

    return build


def plain(case: Case, inputs: Inputs) -> Call:
    """What a user would write, under jit."""
    static: dict[str, Any] = case.static_arguments
    op = functools.partial(xla_plain.fused_qk_rmsnorm_rope_gate, **static)
    return functools.partial(jax.jit(op), *inputs)


PROVIDERS: dict[str, Builder] = {
    "oracle": oracle,
    **{name: pallas_qk_builder(name) for name in pallas_qk.IMPLEMENTATIONS},
    "xla_plain": plain,
}


def copies(total_bytes: int) -> Mapping[str, Call]:
    """Elementwise copies that move `total_bytes`, half of them read and half written, in several tile sizes.

    The fastest of them is the ceiling. Kernels, not memcpy nodes: a memcpy is up to 1.5 times slower at 1 GB.
    """
    from benchmarks import gpu_kernels

    return gpu_kernels.copy_calls(total_bytes)
