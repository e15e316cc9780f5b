"""The suite `kv_cache`: from one packed projection to q, gate and a KV cache that holds the tokens' k and v.

Every call takes a projection, caches of pages of 16 places, and a slot for each token. Beside the op that writes the
caches itself stand the two launches of the oracle, the op followed by a scatter, and the op that writes no cache. The
writer of another project is run after the oracle's op, in the place of its writer. Caches hold the dtype of the
projection, or 8 bits and one scale of k and one of v.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

import pallas_qk
from benchmarks.agreement import Agreement, agreement, cached_agreement, written_agreement
from benchmarks.checked import Checks, check, with_oracle
from benchmarks.providers import JAX_OPS, Builder, Call, Op, Writer, cached_oracle, jitted, to_jax, to_torch
from pallas_qk._rows import Outputs
from tests import cached, forms
from tests.cached import CachedCase
from tests.cases import Case, Inputs
from tests.compare import compare_bits

ALONE = "_alone"  # the end of a name: the op returns k and v, and writes no cache
THEN_SET = "_then_set"  # and XLA scatters them into the caches
BLOCK_SIZE = 16


def form_of(case: Case, gate: str = "copied", kv_dtype: str | None = None) -> CachedCase:
    """Packed, with twice as many places as tokens."""
    return CachedCase(
        dataclasses.replace(case, packed=True, gate=gate),
        kv_dtype=kv_dtype,
        num_blocks=-(-2 * case.num_tokens // BLOCK_SIZE),
        block_size=BLOCK_SIZE,
        scale_per_head=(False, False),
        # XLA may scatter 8-bit floats by converting the whole cache there and back, where a NaN may lose its sign.
        finite=kv_dtype is not None,
    )


def slots_of(form: CachedCase) -> np.ndarray:
    """One for each token, anywhere in the cache."""
    return np.random.default_rng(0).permutation(form.capacity)[: form.case.num_tokens].astype(np.int32)


class InPlace:
    """A call whose program takes over its caches: the next call gets them as this one returned them.

    A donated array serves once, and without donation XLA would copy the caches.
    """

    def __init__(self, function: Callable, caches: tuple[jax.Array, ...], *arrays):
        """`function` maps caches and arrays to q, gate or None, and the caches."""
        self._program, self._caches, self._arrays = jax.jit(function, donate_argnums=0), caches, arrays

    def __call__(self) -> Outputs:
        q, gate, self._caches = self._program(self._caches, *self._arrays)
        k_cache, v_cache = self._caches
        return Outputs(q, gate=gate, k_cache=k_cache, v_cache=v_cache)


def in_place(function: Callable, form: CachedCase, arrays, before, slots) -> InPlace:
    """A call with caches of its own, which hold what was there before."""
    scales = tuple(map(jnp.asarray, form.scales))
    return InPlace(function, tuple(map(jnp.array, before)), *arrays, jnp.asarray(slots), scales)


def alone(name: str, form: CachedCase) -> Op:
    """The op without caches. A gate left in place is no result: its slice would be made."""
    op = JAX_OPS[name](form.case)

    def run(*arrays) -> Outputs:
        q, k, v, gate = op(*arrays)
        return Outputs(q, k, v, gate if form.case.gate == "copied" else None)

    return run


def then_set(name: str, form: CachedCase) -> Callable:
    """That op, and a scatter into the flat caches. (Slots below 0 would have to be moved past the end before it.)"""
    op = alone(name, form)

    def run(caches, *arrays):
        *others, slots, scales = arrays
        outputs = op(*others)

        def written(cache, rows, scale):
            rows = rows.reshape(-1, *cache.shape[2:])
            if scale is not None:
                rows = quantised(rows, scale, cache.dtype)
            return cache.reshape(-1, *cache.shape[2:]).at[slots].set(rows, mode="drop").reshape(cache.shape)

        rows = (outputs.k, outputs.v), scales or (None, None)
        return outputs.q, outputs.gate, tuple(map(written, caches, *rows))

    return run


def quantised(x: jax.Array, scale: jax.Array, dtype) -> jax.Array:
    """As a user would write it."""
    largest = float(jnp.finfo(dtype).max)
    return (x.astype(jnp.float32) / scale).clip(-largest, largest).astype(dtype)


def fused(name: str, form: CachedCase) -> Callable:
    def run(caches, *arrays):
        *others, slots, scales = arrays
        op = cached.op(form, name, **dict(zip(("k_scale", "v_scale"), scales, strict=False)))
        outputs = op(*others, caches, slots)
        return outputs.q, outputs.gate if form.case.gate == "copied" else None, outputs.kv_cache

    return run


def builds_of(form: CachedCase, names: Mapping[str, Builder], arrays, before, slots) -> dict[str, Callable[[], Call]]:
    """The calls by the names of their rows."""

    def build(function: Callable) -> Callable[[], Call]:
        return functools.partial(in_place, function, form, arrays, before, slots)

    builds: dict[str, Callable[[], Call]] = {}
    for name, builder in names.items():
        if isinstance(builder, Writer):
            builds[name] = functools.partial(oracle_of, form, arrays, before, slots, builder.write)
        if name in JAX_OPS:
            builds[f"{name}{ALONE}"] = functools.partial(jitted, alone(name, form), *arrays)
            builds[f"{name}{THEN_SET}"] = build(then_set(name, form))
        if name in pallas_qk.IMPLEMENTATIONS:
            builds[name] = build(fused(name, form))
    return builds


def oracle_of(form: CachedCase, arrays, before, slots, write: Callable[..., None] | None = None) -> Call:
    """The two launches; q_gate, k and v are slices of the projection, which torch reads where they lie.

    `write` takes the place of the oracle's writer.
    """
    case = form.case
    qkv, *others = map(to_torch, jax.block_until_ready(arrays))
    kv_width = case.num_kv_heads * case.head_dim
    q_gate, k, v = qkv.split([2 * case.num_q_heads * case.head_dim, kv_width, kv_width], dim=-1)
    caches = [to_torch(x).clone() for x in before]
    return cached_oracle(form, (q_gate, k, *others), v, caches, to_torch(slots), write)


def outputs_of(arrays) -> Outputs:
    """Those of `oracle_of`."""
    q, k, gate, k_cache, v_cache = arrays
    return Outputs(q, k, gate=gate, k_cache=k_cache, v_cache=v_cache)


def check_cache(
    case: Case, inputs: Inputs, providers: Mapping[str, Builder], *, gate: str = "copied", kv_dtype: str | None = None
) -> Checks:
    """The calls whose q, gate and caches agree with the oracle's, all that no slot names among them."""
    form = form_of(case, gate, kv_dtype)
    arrays, before, slots = forms.arguments(form.case, inputs), cached.caches(form), slots_of(form)
    oracle = oracle_of(form, arrays, before, slots)
    want, v = outputs_of(to_jax(oracle())), forms.values(case)
    q, k, gate_out = want.q, want.k, want.gate

    def compare(name: str, got) -> Agreement:
        if isinstance(providers.get(name), Writer):
            return written_agreement(form, outputs_of(got), want, slots)
        if not name.endswith(ALONE):
            own, counted = name.removesuffix(THEN_SET), name.endswith(THEN_SET)
            return cached_agreement(own, form, got, want, slots, platform="gpu", count_codes=counted)
        gates = gate_out if got.gate is None else got.gate, gate_out
        compared = agreement(name.removesuffix(ALONE), case, (got.q, got.k, gates[0]), (q, k, gates[1]), platform="gpu")
        return dataclasses.replace(compared, kept=compared.kept and compare_bits("v", got.v, v).differing == 0)

    calls, kept = check(case, builds_of(form, providers, arrays, before, slots), compare)
    reference = "none: the reference" if gate == "copied" else "none: the reference, with its copy of the gate"
    return (with_oracle(calls, oracle, reference) if "oracle" in providers else calls), kept
