"""`profile`: a trace that XProf and Perfetto open, and what it holds in a table.

In a profile a plane is a device or the host, and a line one of its streams or threads.
"""

import dataclasses
import functools
import pathlib
import re
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.profiler import ProfileData

from benchmarks import table
from benchmarks.progress import progress, say
from benchmarks.providers import PROVIDERS, Call
from benchmarks.timing import MeasurementError, wait, xplane_path
from tests.cases import Case, make_inputs

WARMUP_CALLS = 3
_OP_NAME = re.compile(r'%?([\w.\-]+) = .*metadata=\{[^}]*op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, copy or memset; on a CPU one operation of a compiled program."""

    name: str
    start_ns: float
    duration_ns: float
    program: str = ""  # of JAX, and its instruction that launched this
    instruction: str = ""
    in_graph: bool = False


@dataclasses.dataclass(frozen=True)
class Trace:
    """What a profile holds: kernels in order of their start, and how often the host launched a CUDA graph.

    A kernel outside a graph is a launch of its own; the host's events name those by the kernel.
    """

    kernels: tuple[Kernel, ...]
    graph_launches: int


def record_trace(run: Callable[[], None], directory: pathlib.Path) -> Trace:
    """Runs under the JAX profiler and leaves its files under `directory`, which must hold no other trace."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(directory, create_perfetto_trace=True, profiler_options=options):
        run()
    return read(xplane_path(str(directory)))


def read(path: str) -> Trace:
    """The kernels of every GPU in an .xplane.pb file; without a GPU the operations of the host's compiled programs."""
    on_gpu: list[Kernel] = []
    on_host: list[Kernel] = []
    graph_launches = 0
    for plane in ProfileData.from_file(path).planes:
        for line in plane.lines:
            stream = plane.name.startswith("/device:GPU") and line.name.startswith("Stream")
            for event in line.events:
                if event.name.startswith("cuGraphLaunch"):
                    graph_launches += 1
                elif stream:
                    on_gpu.append(_kernel(event, _stats(event)))
                elif not plane.name.startswith("/device:") and (stats := _stats(event)).get("hlo_op"):
                    on_host.append(_kernel(event, stats))
    kernels = on_gpu or on_host
    if not kernels:
        raise MeasurementError(f"the profile must hold kernels, got none in {path}. JAX must find CUPTI.")
    return Trace(tuple(sorted(kernels, key=lambda kernel: kernel.start_ns)), graph_launches)


def _stats(event) -> dict[str, Any]:
    with warnings.catch_warnings():
        # The type of `stats` is built on first use, and Python 3.12 finds it without a module's name.
        warnings.simplefilter("ignore", DeprecationWarning)
        return dict(event.stats)


def _kernel(event, stats: Mapping[str, Any]) -> Kernel:
    in_graph = bool(stats.get("cuda_graph_id") or stats.get("cuda_graph_exec_id"))
    program, instruction = (str(stats.get(name, "")) for name in ("hlo_module", "hlo_op"))
    return Kernel(event.name, event.start_ns, event.duration_ns, program, instruction, in_graph)


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
        call = PROVIDERS[name](case, inputs)
        if name != "oracle":

            def program(*arrays, op=call.func):  # type: ignore[attr-defined]
                return op(*arrays)

            program.__name__ = label
            jitted = jax.jit(program)
            try:
                texts.append(jitted.lower(*inputs).compile().as_text() or "")
            except NotImplementedError as error:
                say(f"{case.id}: {name} skipped: {error}")
                continue
            call = functools.partial(jitted, *inputs)
        calls[label] = call
    return calls, texts


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

    trace = record_trace(run, output)
    total_us = sum(kernel.duration_ns for kernel in trace.kernels) / 1e3
    say(table.aligned(summary(trace.kernels, scope_of), left=3))
    alone = sum(not kernel.in_graph for kernel in trace.kernels)
    say(
        f"\n{len(trace.kernels)} kernels, {total_us:.1f} us; {alone} of them launched alone, the others by "
        f"{trace.graph_launches} launches of CUDA graphs."
    )
    folder = pathlib.Path(xplane_path(str(output))).parent
    say(
        f"Perfetto (https://ui.perfetto.dev): open {folder / 'perfetto_trace.json.gz'}\n"
        f"XProf (pip install xprof): xprof --logdir {output}, then Trace Viewer"
    )
    return 0
