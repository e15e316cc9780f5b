"""The suite `compile`: what a new shape costs before it first runs, for each implementation."""

import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax

from benchmarks import gradients, record, table
from benchmarks.progress import progress, say
from benchmarks.providers import JAX_OPS, Op
from benchmarks.suites import INTERLEAVED
from tests import forms
from tests.cases import Case, make_inputs

OPS = ("forward", "backward")
REPEATS = 3
ENOUGH_MS = 5000.0  # of compiling one shape: then it isn't repeated
_FIRST_TOKENS = 7  # of the call that imports an implementation's modules and is not counted


class Stages(NamedTuple):
    """Milliseconds of Python's tracing, of lowering to StableHLO, and of XLA."""

    trace_ms: float
    lower_ms: float
    compile_ms: float


def function(implementation: str, case: Case, op: str) -> Op:
    """The op, or the gradients of its four differentiable arrays, as a new function that no cache knows."""
    forward = JAX_OPS[implementation](case)
    return forward if op == "forward" else gradients.gradients(forward)


def abstract_arguments(case: Case, op: str) -> Sequence:
    """Shapes and dtypes of the arguments."""
    cotangents = [jax.eval_shape(lambda: gradients.cotangents(case))] if op == "backward" else []
    return *cotangents, *jax.eval_shape(lambda: forms.arguments(case, make_inputs(case)))


def stages(implementation: str, case: Case, op: str) -> Stages:
    """One compilation, timed.

    Raises:
      NotImplementedError: the implementation can't run the case.
    """
    arguments = abstract_arguments(case, op)
    started = time.perf_counter()
    traced = jax.jit(function(implementation, case, op)).trace(*arguments)
    was_traced = time.perf_counter()
    lowered = traced.lower()
    was_lowered = time.perf_counter()
    lowered.compile()
    done = time.perf_counter()
    return Stages(*(1e3 * t for t in (was_traced - started, was_lowered - was_traced, done - was_lowered)))


def run(cases: Sequence[Case], implementations: Sequence[str], recorded: record.Run) -> int:
    """Appends a row for each case, operation and implementation, and prints them; 0.

    Every repeat is another number of tokens, so that nothing of it was compiled before.
    """
    names = [name for name in implementations if name in JAX_OPS]
    rows = [["D", "R", "", "op", "implementation", "trace ms", "lower ms", "compile ms"]]
    work = [(case, op, name) for case in cases for op in OPS for name in names]
    imported = set()
    for case, op, name in progress(work, "compile", lambda item: f"{item[1]} {item[2]} {item[0].id}"):
        try:
            if (name, op) not in imported:
                stages(name, Case(_FIRST_TOKENS), op)
                imported.add((name, op))
            found: list[Stages] = []
            while len(found) < REPEATS and sum(map(sum, found)) < ENOUGH_MS:
                shape = dataclasses.replace(case, num_tokens=case.num_tokens + 1 + len(found))
                found.append(stages(name, shape, op))
        except NotImplementedError as error:
            say(f"{op} {case.id}: {name} skipped: {error}")
            continue
        medians = [statistics.median(values) for values in zip(*found, strict=True)]
        fields = record.case_fields(case, name, op) | {"repeats": len(found)}
        fields |= {field: round(value, 1) for field, value in zip(Stages._fields, medians, strict=True)}
        recorded.append("compile", fields)
        mrope = "mRoPE" if case.mrope_section == INTERLEAVED else ""
        rows.append([str(case.head_dim), str(case.rotary_dim), mrope, op, name, *(f"{ms:.0f}" for ms in medians)])
    print(f"\nCompiling a new shape, medians of up to {REPEATS}; {recorded.gpu}, run {recorded.run}")
    print(table.aligned(rows))
    print(f"\nRows appended to {recorded.output}.")
    return 0
