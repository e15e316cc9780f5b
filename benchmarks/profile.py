"""`profile`: a trace that XProf and Perfetto open, and what it holds in a table."""

import functools
import pathlib
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence

import jax

from benchmarks import table, xplane
from benchmarks.progress import progress, say
from benchmarks.providers import JAX_OPS, PROVIDERS, Call, Op
from benchmarks.timing import wait
from benchmarks.xplane import Kernel
from tests.cases import Case, make_inputs

WARMUP_CALLS = 3
_OP_NAME = re.compile(r'%?([\w.\-]+) = .*metadata=\{[^}]*op_name="([^"]*)"')


def scopes(compiled_text: str) -> dict[tuple[str, str], str]:
    """(program, instruction) -> its named scopes, without those that `jax.jit` adds, from a compiled program's text."""
    program = re.match(r"HloModule ([\w.\-]+)", compiled_text)
    assert program is not None, compiled_text[:80]
    return {
        (program[1], instruction): "/".join(part for part in name.split("/") if not part.startswith("jit("))
        for instruction, name in _OP_NAME.findall(compiled_text)
    }


def summary(kernels: Iterable[Kernel], scope_of: Mapping[tuple[str, str], str]) -> list[list[str]]:
    """A heading and a row for each program, scope and kernel, the most time first."""
    groups: dict[tuple[str, str, str], list[float]] = {}
    for kernel in kernels:
        scope = scope_of.get((kernel.program, kernel.instruction), "-")
        program = kernel.program.removeprefix("jit_") or "-"
        groups.setdefault((program, scope, kernel.name), []).append(kernel.duration_ns / 1e3)
    rows = [["count", "total us", "median us", "min us", "max us", "program", "scope", "kernel"]]
    for group, times in sorted(groups.items(), key=lambda item: -sum(item[1])):
        numbers = (sum(times), statistics.median(times), min(times), max(times))
        rows.append([str(len(times)), *(f"{t:.2f}" for t in numbers), *(text[-60:] for text in group)])
    return rows


def programs(case: Case, names: Sequence[str]) -> tuple[dict[str, Call], list[str]]:
    """Label -> call of each implementation, and the texts of those that are compiled programs.

    Each is a program of its own name, so that the trace tells them apart.
    """
    inputs = make_inputs(case)
    calls: dict[str, Call] = {}
    texts = []
    for name in names:
        label = f"{name}_T{case.num_tokens}"
        if name not in JAX_OPS:
            calls[label] = PROVIDERS[name](case, inputs)
            continue
        program = _program(label, JAX_OPS[name](case))
        try:
            texts.append(program.lower(*inputs).compile().as_text() or "")
        except NotImplementedError as error:
            say(f"{case.id}: {name} skipped: {error}")
            continue
        calls[label] = functools.partial(program, *inputs)
    return calls, texts


def _program(name: str, op: Op):
    def program(*arrays):
        return op(*arrays)

    program.__name__ = name
    return jax.jit(program)


def profile(cases: Sequence[Case], names: Sequence[str], repeats: int, output: pathlib.Path) -> int:
    """Traces `repeats` calls of each implementation under an annotation of its name; prints what the trace holds; 0.

    Args:
      cases: what is computed; each implementation runs each of them.
      names: keys of PROVIDERS.
      repeats: traced calls of each, after WARMUP_CALLS that are not.
      output: a folder of its own for the trace.
    """
    calls: dict[str, Call] = {}
    scope_of: dict[tuple[str, str], str] = {}
    for case in progress(cases, "compile", lambda case: case.id):
        found, texts = programs(case, names)
        calls |= found
        for text in texts:
            scope_of |= scopes(text)
    for call in calls.values():
        for _ in range(WARMUP_CALLS):
            wait(call())

    def run() -> None:
        for label, call in progress(list(calls.items()), "profile", lambda item: item[0]):
            with jax.profiler.TraceAnnotation(label):
                for _ in range(repeats):
                    wait(call())

    trace = xplane.profile(run, host=True, folder=output)
    total_us = sum(kernel.duration_ns for kernel in trace.kernels) / 1e3
    say(table.aligned(summary(trace.kernels, scope_of), left=3))
    alone = sum(not kernel.in_graph for kernel in trace.kernels)
    say(
        f"\n{len(trace.kernels)} kernels, {total_us:.1f} us; {alone} of them launched alone, the others by "
        f"{trace.graph_launches} launches of CUDA graphs."
    )
    folder = xplane.file_in(output).parent
    say(
        f"Perfetto (https://ui.perfetto.dev): open {folder / 'perfetto_trace.json.gz'}\n"
        f"XProf (pip install xprof): xprof --logdir {output}, then Trace Viewer"
    )
    return 0
