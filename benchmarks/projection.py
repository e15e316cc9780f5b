"""The suites `projection` and `projection_cache`: from hidden states to q, k, v and gate, or to q, gate and a KV cache.

The width of the hidden states is that of Qwen3.5 with as many query heads. Times are of all kernels of a call: of the
product by XLA alone, of the product and the op with its gate copied or left in place, and of the kernel for both. A
cache is updated in place, as in the suite `kv_cache`.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import pallas_qk
from benchmarks import kv_cache
from benchmarks.agreement import Agreement, Promise, relative_error
from benchmarks.checked import Checks, check
from benchmarks.providers import JAX_OPS, Builder, Call, Op, jitted
from tests import cached
from tests.cached import CachedCase
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


def projection_bytes(case: Case, kv_dtype: str | None = None) -> int:
    """Of hidden states, weight and results. A product of this size takes longer than they do."""
    elements = case.num_tokens * (width_of(case) + columns_of(case)) + width_of(case) * columns_of(case)
    in_cache = case.num_tokens * 2 * case.num_kv_heads * case.head_dim
    itemsize = jnp.dtype(case.dtype).itemsize
    return elements * itemsize + in_cache * (jnp.dtype(kv_dtype or case.dtype).itemsize - itemsize)


def arrays_of(case: Case, inputs: Inputs) -> tuple[jax.Array, ...]:
    """Hidden states, weight, and what else the op reads."""
    hidden = random_normal((case.num_tokens, width_of(case)), case.dtype, seed=5)
    weight = random_normal((width_of(case), columns_of(case)), case.dtype, seed=6)
    scale = jnp.asarray(width_of(case) ** -0.5, weight.dtype)
    assert inputs.q_weight is not None and inputs.k_weight is not None
    assert inputs.cos_sin_cache is not None and inputs.positions is not None
    return hidden, weight * scale, inputs.q_weight, inputs.k_weight, inputs.cos_sin_cache, inputs.positions


def alone(hidden, weight, *others):
    """The product."""
    del others
    return (jnp.dot(hidden, weight),)


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


def functions_of(
    copied: Any, in_place: Any, names: Mapping[str, Builder], then_op: Callable, in_one: Callable
) -> dict[str, Op]:
    """What is timed next to the product, by the names of its rows; of a case in two forms of its gate."""
    functions: dict[str, Op] = {}
    for name in names:
        if name in pallas_qk.IMPLEMENTATIONS:
            functions[f"{name}{THEN_OP}"] = then_op(name, copied)
            functions[f"{name}{THEN_OP}{IN_PLACE}"] = then_op(name, in_place)
    if "mosaic_gpu" in names:
        functions["mosaic_gpu"] = in_one("mosaic_gpu", copied)
    return functions


def builds_of(case: Case, names: Mapping[str, Builder], arrays: tuple[jax.Array, ...]) -> dict[str, Callable[[], Call]]:
    """The calls by the names of their rows."""
    in_place = dataclasses.replace(case, gate="in_place")
    functions = {PRODUCT: alone} | functions_of(case, in_place, names, then_op, in_one)
    return {name: functools.partial(jitted, function, *arrays) for name, function in functions.items()}


def check_projection(case: Case, inputs: Inputs, providers: Mapping[str, Builder]) -> Checks:
    """The calls that agree with the op in plain XLA of the product by XLA, but for roundings of the product."""
    arrays = arrays_of(case, inputs)
    (product,) = jax.jit(alone)(*arrays)
    want = jax.jit(JAX_OPS["xla"](dataclasses.replace(case, packed=True)))(product, *arrays[2:])

    def compare(name: str, got) -> Agreement:
        return near(name, got, [product] if name == PRODUCT else want[: len(got)])

    return check(case, builds_of(case, providers, arrays), compare)


def near(name: str, got, wanted) -> Agreement:
    """Equal but for a few roundings of each array to its dtype."""
    bounds = [4 * float(jnp.finfo(x.dtype).eps) for x in wanted]
    errors = [relative_error(x, y) for x, y in zip(got, wanted, strict=True)]
    compared = [compare_bits(name, x, y) for x, y in zip(got, wanted, strict=True)]
    return Agreement(
        sum(x.elements for x in compared),
        sum(x.differing for x in compared),
        Promise(sum(x.elements for x in compared), max(bounds), max(bounds), "relative"),
        max(errors),
        max(errors),
        all(error <= bound for error, bound in zip(errors, bounds, strict=True)),
        next((x.first for x in compared if x.first), ""),
        against="the product and the op in XLA",
    )


# With a cache, as in `kv_cache`: functions of the caches and then of the other arrays.


def then_cached_op(name: str, form: CachedCase) -> Callable:
    op = kv_cache.fused(name, form)
    return lambda caches, hidden, weight, *others: op(caches, jnp.dot(hidden, weight), *others)


def in_one_with_cache(name: str, form: CachedCase) -> Callable:
    arguments: dict[str, Any] = {"eps": form.case.eps, "num_q_heads": form.case.num_q_heads}
    arguments |= {"cache_axes": form.cache_axes, "implementation": name}
    op: Callable[..., Any] = functools.partial(pallas_qk.fused_qkv_projection_rmsnorm_rope_gate_cache, **arguments)

    def run(caches, *arrays):
        *others, slots, scales = arrays
        outputs = op(*others, caches, slots, **dict(zip(("k_scale", "v_scale"), scales, strict=False)))
        return outputs.q, outputs.gate, outputs.kv_cache

    return run


def check_projection_cache(
    case: Case, inputs: Inputs, providers: Mapping[str, Builder], *, kv_dtype: str | None = None
) -> Checks:
    """As `check_projection`, of calls that write k and v into a cache: all of it is compared."""
    form, in_place = (
        dataclasses.replace(kv_cache.form_of(case, gate, kv_dtype), finite=True) for gate in ("copied", "in_place")
    )
    arrays, before, slots = arrays_of(case, inputs), cached.caches(form), kv_cache.slots_of(form)

    def build(function: Callable) -> Callable[[], Call]:
        return functools.partial(kv_cache.in_place, function, form, arrays, before, slots)

    functions = functions_of(form, in_place, providers, then_cached_op, in_one_with_cache)
    builds: dict[str, Callable[[], Call]] = {PRODUCT: functools.partial(jitted, alone, *arrays)}
    builds |= {name: build(function) for name, function in functions.items()}
    (product,), want = builds[PRODUCT]()(), build(then_cached_op("xla", form))()()

    def compare(name: str, got) -> Agreement:
        if name == PRODUCT:
            return near(name, got, [product])
        given = [(x, y) for x, y in zip(got, want, strict=True) if x is not None]
        return near(name, [x for x, _ in given], [y for _, y in given])

    return check(case, builds, compare)
