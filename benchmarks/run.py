"""`run`: compares, times and records every case of a suite."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import torch

from benchmarks import backward, record, table
from benchmarks.agreement import Agreement, agreement
from benchmarks.gpu_kernels import copied_words
from benchmarks.progress import progress, say
from benchmarks.providers import PROVIDERS, Builder, Call, copies, to_jax
from benchmarks.timing import Samples, measure
from tests.cases import Case, Inputs, make_inputs, minimum_bytes


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a case is timed. `repeats` None: its size decides."""

    repeats: int | None = None
    rounds: int = 5
    cache: str = "hot"
    op: str = "forward"


class Checked(NamedTuple):
    """A call that may be timed, and what was compared before: the `checked` field of its row."""

    call: Call
    checked: dict[str, object]


def run(
    cases: Sequence[Case], names: Sequence[str], settings: Settings, output: pathlib.Path | None, commit: str | None
) -> int:
    """Appends the rows and prints the tables; 0, or 1 if a promise was broken somewhere."""
    if settings.op == "backward":
        names = [name for name in names if name in backward.PROVIDERS]  # the oracle has none
    gpu, run_id, versions = record.gpu_name(), record.new_run_id(), record.versions(commit)
    output = output or record.default_path(gpu)
    measured: dict[Case, dict[str, Samples]] = {}
    all_kept = True
    for case in progress(cases, "run", lambda case: case.id):
        calls, kept = CHECKS[settings.op](case, make_inputs(case), names)
        all_kept &= kept
        measured[case] = samples = time(case, {name: checked.call for name, checked in calls.items()}, settings)
        # The copies were compared with their source, in words of four bytes, when they were built.
        copied = {"against": "its source", "elements": copied_words(minimum_bytes(case, settings.op)), "differing": 0}
        for name, sample in samples.items():
            row = record.make_row(
                case,
                name,
                sample,
                samples["copy"],
                op=settings.op,
                run=run_id,
                gpu=gpu,
                cache=settings.cache,
                checked=copied if name == "copy" else calls[name].checked,
                versions=versions,
            )
            record.append(output, row)
        del calls  # and with them the inputs, before the next case allocates its own
        torch.cuda.empty_cache()
    print_tables(measured, names, f"{settings.op}, {settings.cache} cache, {gpu}, run {run_id}")
    print(f"Rows appended to {output}.")
    return int(not all_kept)


def check_forward(case: Case, inputs: Inputs, names: Sequence[str]) -> tuple[dict[str, Checked], bool]:
    """The calls that agree with the oracle as promised, and whether none broke its promise."""
    oracle = PROVIDERS["oracle"](case, inputs)
    want = to_jax(oracle())
    builders = {name: PROVIDERS[name] for name in names if name != "oracle"}

    def compare(name: str, got) -> Agreement:
        return agreement(name, case, got, want, platform="gpu")

    calls, kept = check(case, inputs, builders, compare)
    if "oracle" in names:
        checked = {"against": "none: the reference", "elements": 0, "differing": 0}
        calls = {"oracle": Checked(oracle, checked), **calls}
    return calls, kept


def check_backward(case: Case, inputs: Inputs, names: Sequence[str]) -> tuple[dict[str, Checked], bool]:
    """The calls whose gradients are the float32 ones, rounded; the oracle has none."""
    want = backward.expected(case, inputs)
    builders = {name: backward.PROVIDERS[name] for name in names}
    return check(case, inputs, builders, lambda name, got: backward.agreement(case, got, want))


CHECKS = {"forward": check_forward, "backward": check_backward}


def check(
    case: Case, inputs: Inputs, builders: Mapping[str, Builder], compare: Callable[[str, Any], Agreement]
) -> tuple[dict[str, Checked], bool]:
    """The calls that keep their promise, and whether all do. One that can't run the case is named and left out."""
    calls, kept = {}, True
    for name, build in builders.items():
        call = build(case, inputs)
        try:
            result = compare(name, jax.block_until_ready(call()))
        except NotImplementedError as error:
            say(f"{case.id}: {name} skipped: {error}")
            continue
        if result.kept:
            calls[name] = Checked(call, result.checked)
        else:
            say(f"{case.id}: {name} {result}")
            kept = False
    return calls, kept


def time(case: Case, calls: Mapping[str, Call], settings: Settings) -> dict[str, Samples]:
    """The samples of each call and of "copy", the fastest tile size of the copy ceiling."""
    ceiling = copies(case, settings.op)
    samples = measure(
        case, {**calls, **ceiling}, repeats=settings.repeats, rounds=settings.rounds, cache=settings.cache
    )
    copy = min((samples.pop(name) for name in ceiling), key=lambda sample: sample.p50_us)
    return {"copy": copy, **samples}


def print_tables(measured: Mapping[Case, Mapping[str, Samples]], names: Sequence[str], title: str) -> None:
    """One table for each head count."""
    groups: dict[tuple[int, int], dict[Case, Mapping[str, Samples]]] = {}
    for case, samples in measured.items():
        groups.setdefault((case.num_q_heads, case.num_kv_heads), {})[case] = samples
    for (num_q_heads, num_kv_heads), group in groups.items():
        case = next(iter(group))
        print(
            f"\n{num_q_heads}/{num_kv_heads} heads, D = {case.head_dim}, R = {case.rotary_dim}, {case.dtype}; {title}"
        )
        print(table.times(group, names))
    print()
