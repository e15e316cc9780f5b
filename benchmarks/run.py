"""`run`: compares, times and records every case of the suites of device times."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from benchmarks import backward, block, record, table
from benchmarks.agreement import Agreement, agreement
from benchmarks.checked import Checked, check
from benchmarks.gpu_kernels import copied_words
from benchmarks.progress import progress, say
from benchmarks.providers import PROVIDERS, Builder, Call, copies, repeated_inputs, to_jax
from benchmarks.suites import Task
from benchmarks.timing import Samples, measure
from tests.cases import Case, Inputs, minimum_bytes


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a case is timed. `repeats` None: its size decides."""

    repeats: int | None = None
    rounds: int = 5
    caches: tuple[str, ...] = ("hot",)


class Op(NamedTuple):
    """Something that can be timed.

    check(case, inputs, providers) gives the calls that agree with what they are compared with, and whether all do;
    minimum_bytes(case) what any implementation must move; memory is how many times that the GPU must hold at once.
    """

    check: Callable[[Case, Inputs, Mapping[str, Builder]], tuple[dict[str, Checked], bool]]
    minimum_bytes: Callable[[Case], int]
    memory: float


def check_forward(case: Case, inputs: Inputs, providers: Mapping[str, Builder]) -> tuple[dict[str, Checked], bool]:
    """The calls that agree with the oracle as promised, and whether none broke its promise."""
    oracle = PROVIDERS["oracle"](case, inputs)
    want = to_jax(oracle())
    builders = {name: build for name, build in providers.items() if name != "oracle"}

    def compare(name: str, got) -> Agreement:
        return agreement(name, case, got, want, platform="gpu")

    calls, kept = check(case, inputs, builders, compare)
    if "oracle" in providers:
        checked = {"against": "none: the reference", "elements": 0, "differing": 0}
        calls = {"oracle": Checked(oracle, checked), **calls}
    return calls, kept


def check_backward(case: Case, inputs: Inputs, providers: Mapping[str, Builder]) -> tuple[dict[str, Checked], bool]:
    """The calls whose gradients are the float32 ones, rounded; what has no backward is left out."""
    want = backward.expected(case, inputs)
    builders = {name: backward.PROVIDERS[name] for name in providers if name in backward.PROVIDERS}
    return check(case, inputs, builders, lambda name, got: backward.agreement(case, got, want))


# Inputs, two results and the copy's two buffers lie in memory at once; float32 gradients take twice as much.
OPS = {
    "forward": Op(check_forward, minimum_bytes, 2.5),
    "backward": Op(check_backward, lambda case: minimum_bytes(case, "backward"), 5.0),
    **{name: Op(kind.check, kind.minimum_bytes, 5.0 if kind.backward else 3.0) for name, kind in block.KINDS.items()},
}


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
    op, case = OPS[task.op], task.case
    total_bytes = op.minimum_bytes(case)
    calls, kept = op.check(case, repeated_inputs(case), providers)
    # The copies were compared with their source, in words of four bytes, when they were built.
    copied = {"against": "its source", "elements": copied_words(total_bytes), "differing": 0}
    checked = {"copy": copied, **{name: call.checked for name, call in calls.items()}}
    for cache in settings.caches:
        samples = time(case, {name: call.call for name, call in calls.items()}, total_bytes, settings, cache)
        for name, sample in samples.items():
            fields = record.case_fields(case, name, task.op) | {"cache": cache}
            fields |= record.time_fields(sample, samples["copy"], total_bytes) | {"checked": checked[name]}
            recorded.append(task.suite, fields)
        yield cache, samples, kept


def too_large(task: Task) -> str | None:
    """Why the case can't be held by the GPU; None if it can."""
    needed, held = OPS[task.op].memory * OPS[task.op].minimum_bytes(task.case), gpu_memory()
    return f"it needs some {needed / 1e9:.0f} GB of GPU memory, got {held / 1e9:.0f}" if needed > 0.95 * held else None


def gpu_memory() -> int:
    """Bytes of the GPU, in use or not."""
    return torch.cuda.mem_get_info()[1]


def out_of_memory(error: Exception) -> bool:
    """Whether JAX or torch found no memory: how much XLA needs beside the arrays is not known before."""
    return isinstance(error, torch.OutOfMemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def time(case: Case, calls: Mapping[str, Call], total_bytes: int, settings: Settings, cache: str) -> dict[str, Samples]:
    """The samples of each call and of "copy", the fastest tile size of the copy ceiling."""
    ceiling = copies(total_bytes)
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
