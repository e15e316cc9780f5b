"""Device times of calls: the kernels of a profile, attributed to the providers that launched them.

All providers run interleaved in one process under one trace. Each section (a few uncounted calls, then the counted
ones of one provider) begins with a marker kernel on an idle device, so the device's own timeline says which kernels
belong to whom: no name of a provider's kernel is assumed. Whatever does not fit the plan is an error, never a guess.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from benchmarks import xplane
from benchmarks.floor import minimum_bytes
from benchmarks.xplane import Kernel, MeasurementError
from tests.cases import Case

MARKER_NAME = "benchmark_section_marker"  # as gpu_kernels.py names them
FLUSH_NAME = "benchmark_flush_l2"
WARMUP_CALLS = 2  # of each section: the first ones find another provider's outputs in L2
FLUSH_BYTES = 256 * 2**20  # five times the L2 of an H200
_LEAD_MARKERS = 2  # the profiler may miss the first kernels after it attaches
_ATTEMPTS = 3


@dataclasses.dataclass(frozen=True)
class Samples:
    """Device time of each counted call in microseconds, all rounds, and the kernels that one call launches."""

    times_us: tuple[float, ...]
    kernels: tuple[str, ...]

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.times_us, q))

    @property
    def p50_us(self) -> float:
        return self.percentile(50)


def default_repeats(case: Case) -> int:
    """Counted calls a round: 40 where a call takes microseconds, 8 where it takes a millisecond."""
    return int(min(40, max(8, 2**31 // max(1, minimum_bytes(case)))))


def measure(
    case: Case,
    providers: Mapping[str, Callable[[], object]],
    *,
    repeats: int | None = None,
    rounds: int = 5,
    cache: str = "hot",
) -> dict[str, Samples]:
    """Times providers beside each other on the GPU.

    Args:
      case: what the calls compute; it sets the default of `repeats` and is named in errors.
      providers: name -> zero-argument callable that launches one call of JAX or torch and returns its outputs.
      repeats: counted calls of each provider in each round.
      rounds: how often all providers run, each time in another order.
      cache: "hot" repeats calls on the same buffers; "cold" overwrites L2 before each call.

    Returns:
      For each provider rounds * repeats device times: the sum over the kernels of one call.

    Raises:
      MeasurementError: kernels are missing, or their number is no multiple of the calls.
    """
    from benchmarks.gpu_kernels import Markers

    repeats = default_repeats(case) if repeats is None else repeats
    for call in providers.values():
        for _ in range(2):  # the first call compiles
            wait(call())
    markers = Markers(FLUSH_BYTES if cache == "cold" else 0)
    markers.mark()
    if cache == "cold":
        markers.flush_l2()
    names = list(providers)
    sections = [name for r in range(rounds) for name in names[r % len(names) :] + names[: r % len(names)]]

    def run() -> None:
        for _ in range(_LEAD_MARKERS):
            markers.mark()
        for name in sections:
            markers.mark()
            for _ in range(WARMUP_CALLS + repeats):
                if cache == "cold":
                    markers.flush_l2()
                # The outputs die before the next call. While they live, JAX alternates between two output buffers
                # and small cases fall out of L2 (8.5 us instead of 6.5 at T = 1024, H200); torch reuses one.
                wait(providers[name]())
        markers.mark()

    for attempt in range(_ATTEMPTS):  # the profiler may drop events: measure anew rather than fill in
        try:
            return attribute(xplane.profile(run).kernels, sections, WARMUP_CALLS, repeats)
        except MeasurementError as error:
            if attempt == _ATTEMPTS - 1:
                raise MeasurementError(f"{case.id}: {error}") from error
    raise AssertionError("unreachable")


def wait(outputs: object) -> None:
    """Returns when the device has finished, whichever framework launched the work."""
    import torch

    jax.block_until_ready(outputs)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def attribute(events: Sequence[Kernel], sections: Sequence[str], warmup: int, repeats: int) -> dict[str, Samples]:
    """Cuts the timeline at the marker kernels and sums each call's kernels.

    Args:
      events: in order of their start. More markers than sections + 1 may lead; the last one ends the last section.
      sections: the provider of each section, in the order run.
      warmup: calls at the head of each section that are not counted.
      repeats: counted calls of each section.

    Raises:
      MeasurementError: a section holds no kernels or no multiple of warmup + repeats, its calls differ from each
        other, or a provider's sections differ.
    """
    from_marker: list[list[Kernel]] = []
    for event in events:
        if event.name.startswith(MARKER_NAME):
            from_marker.append([])
        elif from_marker and not event.name.startswith(FLUSH_NAME):
            from_marker[-1].append(event)
    if len(from_marker) < len(sections) + 1:
        raise MeasurementError(
            f"the profile must hold {len(sections) + 1} kernels {MARKER_NAME}, got {len(from_marker)} among "
            f"{dict(Counter(event.name for event in events).most_common(12))}"
        )
    times: dict[str, list[float]] = {}
    kernels: dict[str, tuple[str, ...]] = {}
    for name, section in zip(sections, from_marker[-len(sections) - 1 : -1], strict=True):
        calls = split_calls(name, section, warmup + repeats)
        launched = tuple(event.name for event in calls[-1])
        if sorted(kernels.setdefault(name, launched)) != sorted(launched):
            raise MeasurementError(
                f"{name} must launch the same kernels in all rounds, got {kernels[name]} and {launched}"
            )
        times.setdefault(name, []).extend(sum(event.duration_ns for event in call) / 1e3 for call in calls[warmup:])
    return {name: Samples(tuple(times[name]), kernels[name]) for name in times}


def split_calls(name: str, section: Sequence[Kernel], num_calls: int) -> list[Sequence[Kernel]]:
    """Cuts one section into its calls: as many kernels in each, the same ones."""
    per_call, left = divmod(len(section), num_calls)
    counts = Counter(event.name for event in section)
    if per_call == 0 or left or any(count % num_calls for count in counts.values()):
        raise MeasurementError(f"{name} must launch the same kernels in each of {num_calls} calls, got {dict(counts)}")
    calls = [section[i * per_call : (i + 1) * per_call] for i in range(num_calls)]
    first = sorted(event.name for event in calls[0])
    for call in calls:
        if sorted(event.name for event in call) != first:
            raise MeasurementError(
                f"{name} must launch the same kernels in each call, got {first} and {[event.name for event in call]}"
            )
    return calls
