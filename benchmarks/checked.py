"""Calls that may be timed: those that agreed with what they were compared with."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from benchmarks.agreement import Agreement
from benchmarks.progress import say
from benchmarks.providers import Call, to_jax
from tests.cases import Case


class Checked(NamedTuple):
    """A call that may be timed, and what was compared before: the `checked` field of its row."""

    call: Call
    checked: dict[str, object]


Checks = tuple[dict[str, Checked], bool]  # the calls that keep their promise, and whether all do


def check(case: Case, builds: Mapping[str, Callable[[], Call]], compare: Callable[[str, Any], Agreement]) -> Checks:
    """Builds, runs and compares calls. One that can't run the case is named and left out."""
    calls, kept = {}, True
    for name, build in builds.items():
        try:
            call = build()
            result = compare(name, finished(call))  # nothing else holds the outputs
        except NotImplementedError as error:
            say(f"{case.id}: {name} skipped: {error}")
            continue
        if result.kept:
            calls[name] = Checked(call, result.checked)
        else:
            say(f"{case.id}: {name} {result}")
            kept = False
    return calls, kept


def with_oracle(calls: Mapping[str, Checked], oracle: Call, against: str) -> dict[str, Checked]:
    """The oracle first, which was compared with nothing: `against` says so."""
    return {"oracle": Checked(oracle, {"against": against, "elements": 0, "differing": 0}), **calls}


def finished(call: Call) -> Any:
    """The outputs of a call as JAX arrays, whichever framework computed them."""
    outputs = call()
    on_jax = all(isinstance(x, jax.Array) for x in jax.tree.leaves(outputs))
    return jax.block_until_ready(outputs) if on_jax else to_jax(outputs)
