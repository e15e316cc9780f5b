"""`run`: compares, times and records every case of the suites of device times."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import torch

from benchmarks import record, table
from benchmarks.gpu_kernels import copied_words, copy_calls
from benchmarks.operations import OPERATIONS
from benchmarks.progress import progress, say
from benchmarks.providers import Builder, Call, repeated_inputs
from benchmarks.suites import Task
from benchmarks.timing import Samples, measure
from tests.cases import Case


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a case is timed. `repeats` None: its size decides."""

    repeats: int | None = None
    rounds: int = 5
    caches: tuple[str, ...] = ("hot",)


def run(
    tasks: Sequence[Task],
    providers: Mapping[str, Builder],
    settings: Settings,
    recorded: record.Run,
) -> int:
    """Appends the rows and prints the tables; 0, or 1 if a promise was broken somewhere."""
    measured: dict[tuple[str, str], dict[Case, dict[str, Samples]]] = {}
    all_kept = True
    for task in progress(tasks, "run", lambda task: f"{task.op} {task.case.id}"):
        label = f"{task.op} {task.case.id}"
        if reason := too_large(task):
            say(f"{label} skipped: {reason}")
            continue
        try:
            for cache, samples, kept in time_task(task, providers, settings, recorded):
                all_kept &= kept
                measured.setdefault((task.op, cache), {})[task.case] = samples
        except Exception as error:
            if not out_of_memory(error):
                raise
            say(f"{label} skipped: the GPU's memory did not hold it: {str(error).splitlines()[0]}")
        torch.cuda.empty_cache()
    for (op, cache), cases in measured.items():
        print_tables(cases, f"{op}, {cache} cache, {recorded.gpu}, run {recorded.run}")
    print(f"Rows appended to {recorded.output}.")
    return int(not all_kept)


def time_task(
    task: Task, providers: Mapping[str, Builder], settings: Settings, recorded: record.Run
) -> Iterator[tuple[str, dict[str, Samples], bool]]:
    """For each cache (name, samples, whether all promises were kept), its rows appended before."""
    operation, case = OPERATIONS[task.op], task.case
    total_bytes = operation.minimum_bytes(case)
    calls, kept = operation.check(case, repeated_inputs(case), providers)
    # The copies were compared with their source, in words of four bytes, when they were built.
    copied = {"against": "its source", "elements": copied_words(total_bytes), "differing": 0}
    checked = {"copy": copied, **{name: call.checked for name, call in calls.items()}}
    for cache in settings.caches:
        samples = time(case, {name: call.call for name, call in calls.items()}, total_bytes, settings, cache)
        rows = [
            record.case_fields(case, name, task.op)
            | {"cache": cache}
            | record.time_fields(sample, samples["copy"], total_bytes)
            | {"checked": checked[name]}
            for name, sample in samples.items()
        ]
        recorded.append(task.suite, *rows)
        yield cache, samples, kept


def too_large(task: Task) -> str | None:
    """Why the case can't be held by the GPU; None if it can."""
    operation, held = OPERATIONS[task.op], gpu_memory()
    needed = operation.memory * operation.minimum_bytes(task.case)
    return f"it needs some {needed / 1e9:.0f} GB of GPU memory, got {held / 1e9:.0f}" if needed > 0.95 * held else None


def gpu_memory() -> int:
    """Bytes of the GPU, in use or not."""
    return torch.cuda.mem_get_info()[1]


def out_of_memory(error: Exception) -> bool:
    """Whether JAX or torch found no memory: how much XLA needs beside the arrays is not known before."""
    return isinstance(error, torch.OutOfMemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def time(case: Case, calls: Mapping[str, Call], total_bytes: int, settings: Settings, cache: str) -> dict[str, Samples]:
    """The samples of each call and of "copy", the fastest tile size of the copy ceiling."""
    ceiling = copy_calls(total_bytes)
    samples = measure(case, {**calls, **ceiling}, repeats=settings.repeats, rounds=settings.rounds, cache=cache)
    copy = min((samples.pop(name) for name in ceiling), key=lambda sample: sample.p50_us)
    return {"copy": copy, **samples}


def print_tables(measured: Mapping[Case, Mapping[str, Samples]], title: str) -> None:
    """One table for each head count."""
    groups: dict[tuple[int, int], dict[Case, Mapping[str, Samples]]] = {}
    for case, samples in measured.items():
        groups.setdefault((case.num_q_heads, case.num_kv_heads), {})[case] = samples
    for (num_q_heads, num_kv_heads), group in groups.items():
        case = next(iter(group))
        names = list(dict.fromkeys(name for samples in group.values() for name in samples if name != "copy"))
        print(
            f"\n{num_q_heads}/{num_kv_heads} heads, D = {case.head_dim}, R = {case.rotary_dim}, {case.dtype}; {title}"
        )
        print(table.times(group, names))
    print()
