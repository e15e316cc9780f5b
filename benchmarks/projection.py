"""The suite `projection`: from hidden states to q, k, v and gate, by one kernel and by a product and the op.

The width of the hidden states is that of Qwen3.5 with as many query heads. Times are of all kernels of a call: of the
product by XLA alone, of the product and the op with its gate copied or left in place, and of the kernel for both.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import pallas_qk
from benchmarks.agreement import Agreement, Promise, relative_error
from benchmarks.checked import Checks, check
from benchmarks.providers import JAX_OPS, Builder, Call, Op, jitted
from tests.cases import Case, Inputs, random_normal
from tests.compare import compare_bits

PRODUCT = "xla_product"  # alone, which is no op: what the others add to
THEN_OP = "_then_op"  # the end of a name: the op of this name, after the product
IN_PLACE = "_in_place"  # and its gate is left in the product


def width_of(case: Case) -> int:
    """2048 with 16 query heads, 4096 with 32."""
    return 128 * case.num_q_heads


def columns_of(case: Case) -> int:
    return 2 * (case.num_q_heads + case.num_kv_heads) * case.head_dim


def projection_bytes(case: Case) -> int:
    """Of hidden states, weight and results. A product of this size takes longer than they do."""
    elements = case.num_tokens * (width_of(case) + columns_of(case)) + width_of(case) * columns_of(case)
    return elements * jnp.dtype(case.dtype).itemsize


def arrays_of(case: Case, inputs: Inputs) -> tuple[jax.Array, ...]:
    """Hidden states, weight, and what else the op reads."""
    hidden = random_normal((case.num_tokens, width_of(case)), case.dtype, seed=5)
    weight = random_normal((width_of(case), columns_of(case)), case.dtype, seed=6)
    scale = jnp.asarray(width_of(case) ** -0.5, weight.dtype)
    assert inputs.q_weight is not None and inputs.k_weight is not None
    assert inputs.cos_sin_cache is not None and inputs.positions is not None
    return hidden, weight * scale, inputs.q_weight, inputs.k_weight, inputs.cos_sin_cache, inputs.positions


def then_op(name: str, case: Case) -> Op:
    """The product by XLA, then the op. A gate left in place is no result: its slice would be made."""
    op = JAX_OPS[name](dataclasses.replace(case, packed=True))

    def run(hidden, weight, *arrays):
        outputs = op(jnp.dot(hidden, weight), *arrays)
        return outputs if case.gate == "copied" else outputs[:3]

    return run


def in_one(name: str, case: Case) -> Op:
    """One kernel."""
    arguments: dict[str, Any] = {"eps": case.eps, "num_q_heads": case.num_q_heads, "implementation": name}
    return functools.partial(pallas_qk.fused_qkv_projection_rmsnorm_rope_gate, **arguments)


def builds_of(case: Case, names: Mapping[str, Builder], arrays: tuple[jax.Array, ...]) -> dict[str, Callable[[], Call]]:
    """The calls by the names of their rows."""
    in_place = dataclasses.replace(case, gate="in_place")
    functions = {PRODUCT: lambda hidden, weight, *others: (jnp.dot(hidden, weight),)}
    for name in names:
        if name in pallas_qk.IMPLEMENTATIONS:
            functions[f"{name}{THEN_OP}"] = then_op(name, case)
            functions[f"{name}{THEN_OP}{IN_PLACE}"] = then_op(name, in_place)
    if "mosaic_gpu" in names:
        functions["mosaic_gpu"] = in_one("mosaic_gpu", case)
    return {name: functools.partial(jitted, function, *arrays) for name, function in functions.items()}


def check_projection(case: Case, inputs: Inputs, providers: Mapping[str, Builder]) -> Checks:
    """The calls that agree with the op in plain XLA of the product by XLA, but for roundings of the product."""
    arrays = arrays_of(case, inputs)
    product = jax.jit(jnp.dot)(*arrays[:2])
    want = jax.jit(JAX_OPS["xla"](dataclasses.replace(case, packed=True)))(product, *arrays[2:])
    bound = 4 * float(jnp.finfo(case.dtype).eps)

    def compare(name: str, got) -> Agreement:
        wanted = [product] if name == PRODUCT else want[: len(got)]
        errors = [relative_error(x, y) for x, y in zip(got, wanted, strict=True)]
        compared = [compare_bits(name, x, y) for x, y in zip(got, wanted, strict=True)]
        return Agreement(
            sum(x.elements for x in compared),
            sum(x.differing for x in compared),
            Promise(sum(x.elements for x in compared), bound, bound, "relative"),
            max(errors),
            max(errors),
            max(errors) <= bound,
            next((x.first for x in compared if x.first), ""),
            against="the product and the op in XLA",
        )

    return check(case, builds_of(case, providers, arrays), compare)
