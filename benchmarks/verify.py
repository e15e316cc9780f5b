"""`verify`: every implementation against the oracle over a sweep of cases, in bits or within its promise."""

import time
from collections.abc import Sequence

import jax

from benchmarks.agreement import Agreement, agreement
from benchmarks.progress import progress, say
from benchmarks.providers import PROVIDERS, oracle, to_jax
from tests.cases import Case, Inputs, make_inputs


def verify(cases: Sequence[Case], implementations: Sequence[str], platform: str) -> int:
    """Prints a line for each case and the totals; 0, or 1 if a promise is broken."""
    started = time.perf_counter()
    results: dict[str, list[Agreement]] = {name: [] for name in implementations}
    for case in progress(cases, "verify", lambda case: case.id):
        inputs = make_inputs(case)
        want = to_jax(oracle(case, inputs)())
        for name in implementations:
            result = compare(name, case, inputs, want, platform)
            say(f"{case.id}: {name} {result}")
            if isinstance(result, Agreement):
                results[name].append(result)
        del inputs, want  # before the next case allocates its own
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


def compare(name: str, case: Case, inputs: Inputs, want, platform: str) -> Agreement | str:
    """One implementation's agreement, or in words why it can't run the case."""
    try:
        got = jax.block_until_ready(PROVIDERS[name](case, inputs)())
    except NotImplementedError as error:
        return f"skipped: {error}"
    return agreement(name, case, got, want, platform=platform)
