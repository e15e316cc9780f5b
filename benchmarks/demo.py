"""`demo`: a few Qwen3.5 shapes, whether they agree with the oracle, and how long they take."""

import statistics
import time
from collections.abc import Callable

import jax

import pallas_qk
from benchmarks import suites, table
from benchmarks.agreement import Agreement, agreement
from benchmarks.floor import minimum_bytes
from benchmarks.progress import progress
from benchmarks.providers import PROVIDERS, oracle, to_jax
from benchmarks.timing import measure
from tests.cases import make_inputs


def demo(platform: str) -> int:
    """Prints the table and one sentence on the agreement; 0 if every promise is kept, else 1."""
    device = jax.devices()[0].device_kind
    rows = [("model", "dtype", "T", "heads", "device", "implementation", "compared", "differing", "time us", "GB/s")]
    results: dict[str, list[Agreement]] = {}
    for model, case in progress(suites.shown(platform), "demo", lambda item: item[1].id):
        name = pallas_qk.default_implementation(
            *(case.num_tokens, case.num_q_heads, case.num_kv_heads, case.head_dim, case.rotary_dim, case.dtype),
            platform="cpu" if platform == "cpu" else None,
        ).name
        inputs = make_inputs(case)
        call = PROVIDERS[name](case, inputs)
        result = agreement(name, case, call(), to_jax(oracle(case, inputs)()), platform=platform)
        results.setdefault(case.dtype, []).append(result)
        time_us = measure(case, {name: call})[name].p50_us if platform == "gpu" else wall_time_us(call)
        rows.append(
            (
                model,
                case.dtype,
                str(case.num_tokens),
                f"{case.num_q_heads}/{case.num_kv_heads}",
                device,
                name,
                f"{result.elements:,}",
                f"{result.differing:,}",
                f"{time_us:.2f}",
                f"{minimum_bytes(case) / time_us / 1e3:.1f}",
            )
        )
    print(f"D = 256, R = 64. {_METHOD[platform]}\n{table.aligned(rows)}\n")
    broken = [result for found in results.values() for result in found if not result.kept]
    if broken:
        print(f"It does NOT agree with the Triton oracle as promised, in {len(broken)} shapes:", *broken, sep="\n  ")
        return 1
    counts = " and ".join(
        f"{sum(r.differing for r in found):,} of {sum(r.elements for r in found):,} elements differ in {dtype}"
        for dtype, found in results.items()
    )
    print(f"It agrees with the Triton oracle as promised: {counts}{_CLOSING[platform]}")
    return 0


_METHOD = {
    "gpu": "Time: of the kernel, by the JAX profiler. Oracle: the Triton kernel, on the same GPU.",
    "cpu": "Time: wall time of a call. Oracle: the Triton kernel in Triton's interpreter, on the CPU.",
}
_CLOSING = {
    "gpu": ".",
    "cpu": ".\nWhat differs here is a rounding of the interpreter, which keeps to float16 but not to bfloat16: at most "
    "1 ulp of a\nnormalised element. On an NVIDIA GPU the kernels promise equal bits.",
}


def wall_time_us(call: Callable[[], object], repeats: int = 20) -> float:
    """Median time of a call on a CPU, warm."""
    jax.block_until_ready(call())
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - started)
    return statistics.median(times) * 1e6
