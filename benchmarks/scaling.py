"""The suite `scaling`: the op over several GPUs, tokens sharded over them.

Weak: each GPU holds as many tokens whatever their number, so the time should stay. Strong: the tokens are divided, so
it should fall with the number of GPUs. Weights and table are replicated, and no collective is needed.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_qk
from benchmarks import record, table, xplane
from benchmarks.floor import minimum_bytes
from benchmarks.progress import progress, say
from benchmarks.providers import JAX_OPS, Call, jitted, repeated_inputs
from benchmarks.timing import split_calls
from benchmarks.xplane import Kernel, MeasurementError
from tests.cases import Case

TOKENS = 65536  # of each GPU (weak), of all together (strong)
WARMUP_CALLS, REPEATS = 4, 40


def counts(num_devices: int) -> list[int]:
    """1, 2, 4, …: the numbers of GPUs that are compared."""
    return [1 << i for i in range(num_devices.bit_length())]


def call(implementation: str, case: Case, devices: Sequence[jax.Device]) -> Call:
    """The op on a mesh of some devices, its tokens sharded by the compiler."""
    mesh = Mesh(np.array(devices), ("tokens",))
    layouts = [P("tokens"), P("tokens"), P(), P(), P(), P("tokens")]
    arrays = [
        jax.device_put(x, NamedSharding(mesh, layout)) for x, layout in zip(repeated_inputs(case), layouts, strict=True)
    ]
    return jitted(JAX_OPS[implementation](case), *arrays)


def measure(call: Call) -> dict[str, list[Kernel]]:
    """The kernels of WARMUP_CALLS + REPEATS calls on each GPU that ran any."""
    for _ in range(2):
        jax.block_until_ready(call())

    def run() -> None:
        for _ in range(WARMUP_CALLS + REPEATS):
            jax.block_until_ready(call())

    return xplane.profile(run).by_device()


def slowest_us(devices: dict[str, list[Kernel]], expected: int) -> np.ndarray:
    """For each counted call the device time on the GPU that took longest, microseconds.

    Raises:
      MeasurementError: not as many GPUs ran kernels as should, or their kernels don't divide into calls.
    """
    if len(devices) != expected:
        raise MeasurementError(f"{expected} GPUs must run kernels, got {sorted(devices)}")
    times = [
        [sum(event.duration_ns for event in call) / 1e3 for call in split_calls(name, events, WARMUP_CALLS + REPEATS)]
        for name, events in devices.items()
    ]
    return np.max(times, axis=0)[WARMUP_CALLS:]


def run(
    implementations: Sequence[str],
    recorded: record.Run,
    heads: Sequence[tuple[int, int]],
    *,
    tokens: int = TOKENS,
    measured: Callable[[Call], dict[str, list[Kernel]]] = measure,
) -> int:
    """Appends a row for each kind, number of GPUs and implementation, and prints them; 0, also where one GPU is all."""
    devices = jax.devices()
    if len(devices) < 2:
        say(f"scaling skipped: it needs two GPUs or more, got {len(devices)}.")
        return 0
    names = [name for name in implementations if name in pallas_qk.IMPLEMENTATIONS]
    work = [
        (kind, Case(tokens * (n if kind == "weak" else 1), *head_counts), name, n)
        for kind in ("weak", "strong")
        for head_counts in heads
        for name in names
        for n in counts(len(devices))
    ]
    rows = [["", "heads", "implementation", "GPUs", "tokens", "us", "GB/s", "speedup"]]
    alone: dict[tuple, float] = {}
    for kind, case, name, n in progress(work, "scaling", lambda item: f"{item[0]} {item[2]} on {item[3]}"):
        times = slowest_us(measured(call(name, case, devices[:n])), n)
        p25, p50, p75 = (float(np.percentile(times, q)) for q in (25, 50, 75))
        group = (kind, case.num_q_heads, case.num_kv_heads, name)
        # Work done in a given time, against one GPU: n where it scales.
        speedup = alone.setdefault(group, p50) / p50 * (n if kind == "weak" else 1)
        total_bytes = minimum_bytes(case)
        fields = record.case_fields(case, name, f"forward_{kind}_scaling") | {
            "gpus": n,
            "p25_us": round(p25, 3),
            "p50_us": round(p50, 3),
            "p75_us": round(p75, 3),
            "bytes": total_bytes,
            "gb_per_s": round(total_bytes / p50 / 1e3, 1),
            "speedup": round(speedup, 3),
        }
        recorded.append("scaling", fields)
        heads_text = f"{case.num_q_heads}/{case.num_kv_heads}"
        rate = f"{total_bytes / p50 / 1e3:.0f}"
        rows.append([kind, heads_text, name, str(n), str(case.num_tokens), f"{p50:.2f}", rate, f"{speedup:.2f}"])
    print(f"\nTokens over GPUs: the slowest GPU's device time, medians; {recorded.gpu}, run {recorded.run}")
    print(table.aligned(rows))
    print(f"\nRows appended to {recorded.output}.")
    return 0
