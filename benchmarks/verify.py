"""`verify`: every implementation against the oracle over a sweep of cases, in bits or within its promise."""

import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from benchmarks.agreement import Agreement, agreement, cached_agreement, in_form
from benchmarks.progress import progress, say
from benchmarks.providers import PROVIDERS, cached_oracle, from_torch, oracle, to_jax, to_torch, torch_inputs
from pallas_qk._rows import Outputs
from tests import cached, forms, strategies
from tests.cached import CachedCase
from tests.cases import Case, make_inputs

Compare = Callable[[str], Agreement]  # of an implementation


def verify(cases: Sequence[Case | CachedCase], implementations: Sequence[str], platform: str) -> int:
    """Prints a line for each case and the totals; 0, or 1 if a promise is broken."""
    started = time.perf_counter()
    results: dict[str, list[Agreement]] = {name: [] for name in implementations}
    for case in progress(cases, "verify", lambda case: case.id):
        with strategies.x64(case):
            compare = compare_cached(case, platform) if isinstance(case, CachedCase) else compare_op(case, platform)
            for name in implementations:
                result = compared(compare, name)
                say(f"{case.id}: {name} {result}")
                if isinstance(result, Agreement):
                    results[name].append(result)
        del compare  # with its arrays, before the next case allocates its own
    print(f"\n{len(cases)} cases on {jax.devices()[0].device_kind} in {time.perf_counter() - started:.0f} s")
    for name, found in results.items():
        elements, differing = sum(r.elements for r in found), sum(r.differing for r in found)
        broken = sum(not r.kept for r in found)
        bits = [r for r in found if r.promise.max_differing == 0]
        print(
            f"{name}: {elements:,} elements compared, {differing:,} differing; "
            f"promised in bits {sum(r.elements for r in bits):,}, {sum(r.differing for r in bits):,} differing; "
            f"promises broken in {broken} cases"
        )
    return int(any(not r.kept for found in results.values() for r in found))


def compared(compare: Compare, name: str) -> Agreement | str:
    """One implementation's agreement, or in words why it can't run the case."""
    try:
        return compare(name)
    except NotImplementedError as error:
        return f"skipped: {error}"


def compare_op(case: Case, platform: str) -> Compare:
    inputs = make_inputs(case)
    want = to_jax(oracle(case, inputs)())

    def compare(name: str) -> Agreement:
        got = jax.block_until_ready(PROVIDERS[name](case, inputs)())
        return agreement(name, case, in_form(case, got, want), want, platform=platform)

    return compare


def compare_cached(form: CachedCase, platform: str) -> Compare:
    """Of calls that write a KV cache, in a program that donates it."""
    case, data = form.case, cached.data_of(form)
    # Clones: the oracle writes into the caches, and JAX takes its arrays for immutable.
    v, *caches, slots = (to_torch(x).clone() for x in (data.v, *data.before, data.slots))
    if case.v_norm:
        _, v, _ = oracle(forms.of_v(case), forms.inputs_of_v(case, jnp.asarray(data.v)))()
    q, k, gate, *written = to_jax(cached_oracle(form, torch_inputs(data.inputs), v, caches, slots)())
    want = Outputs(q, k, from_torch(v), gate, *written)

    def compare(name: str) -> Agreement:
        op = jax.jit(cached.op(form, name), donate_argnums=5)
        *arrays, kv_cache, slots = cached.arguments(form, data=data)
        layer = {"layer": jnp.int32(form.layer)} if "l" in form.sizes else {}
        got = cached.outputs_of(form, op(*arrays, jax.tree.map(jnp.array, kv_cache), slots, **layer))
        flat = {x: a.reshape(case.num_tokens, -1) for x, a in got._asdict().items() if a is not None and a.ndim == 3}
        return cached_agreement(name, form, got._replace(**flat), want, data.slots, platform=platform)

    return compare
