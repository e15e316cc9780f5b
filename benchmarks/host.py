"""The command `host`: the processor's time, of a call before its kernel runs and of layers before XLA compiles them."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

import pallas_qk
from benchmarks import gradients, record, table
from benchmarks.progress import progress
from tests import cached, forms
from tests.cached import CachedCase
from tests.cases import Case, make_inputs

CALLS, WARMUP_CALLS, ROUNDS = 1000, 50, 5
LAYERS, TOKENS = 48, 1024
PLATFORMS = ("cpu", "cuda")  # to lower for; neither needs to be there
REPEATS = 3

Function = Callable[..., Any]


def calls(case: Case) -> dict[str, tuple[Function, Sequence]]:
    """A call of each kind: the public function with its options bound, and its arrays."""
    packed, writes = dataclasses.replace(case, packed=True), CachedCase(case)
    found: dict[str, tuple[Function, Sequence]] = {
        x.id: (forms.op(x), forms.arguments(x, make_inputs(x))) for x in (case, packed)
    }
    plain, in_one = found.values()
    return {
        "forward": plain,
        "forward_packed": in_one,
        "forward_cache": (cached.op(writes), [jax.device_put(x) for x in cached.arguments(writes)]),
    }


def mean_us(function: Function, arrays: Sequence) -> float:
    """Until a call returns, which is not until its kernel has run."""
    for _ in range(WARMUP_CALLS):
        results = function(*arrays)
    jax.block_until_ready(results)
    started = time.perf_counter()
    for _ in range(CALLS):
        results = function(*arrays)
    done = time.perf_counter()
    jax.block_until_ready(results)
    return 1e6 * (done - started) / CALLS


class Dispatch(NamedTuple):
    """Microseconds of a call, medians of rounds: op by op, as a user tries it, and as one jitted program."""

    eager_us: float
    jit_us: float


def dispatch(function: Function, arrays: Sequence) -> Dispatch:
    jitted = jax.jit(function)
    rounds = [(mean_us(function, arrays), mean_us(jitted, arrays)) for _ in range(ROUNDS)]
    return Dispatch(*(statistics.median(times) for times in zip(*rounds, strict=True)))


def _op(case: Case) -> tuple[Function, Sequence]:
    return forms.op(case), jax.eval_shape(lambda: forms.arguments(case, make_inputs(case)))


def _op_backward(case: Case) -> tuple[Function, Sequence]:
    cotangents = jax.eval_shape(lambda: gradients.cotangents(case))
    return gradients.gradients(forms.op(case)), [cotangents, *_op(case)[1]]


def _attention(case: Case) -> tuple[Function, Sequence]:
    """What to compare with: another op of a layer that is traced and lowered in Python, of the same q, k and v."""
    q, k = (
        jax.ShapeDtypeStruct((1, case.num_tokens, heads, case.head_dim), case.dtype)
        for heads in (case.num_q_heads, case.num_kv_heads)
    )
    return jax.nn.dot_product_attention, [q, k, k]


def _attention_backward(case: Case) -> tuple[Function, Sequence]:
    function, arrays = _attention(case)
    return lambda cotangent, *arrays: jax.vjp(function, *arrays)[1](cotangent), [arrays[0], *arrays]


MODELS = {
    ("forward", "op"): _op,
    ("forward", "attention"): _attention,
    ("backward", "op"): _op_backward,
    ("backward", "attention"): _attention_backward,
}


class Stages(NamedTuple):
    """Milliseconds of Python for a whole model."""

    trace_ms: float
    lower_ms: float


def stages(function: Function, arrays: Sequence, num_layers: int, platform: str) -> Stages:
    """Of equal layers one after another, each with arrays of its own, nothing of which any cache knows."""

    def model(layers):
        return [function(*layer) for layer in layers]

    jax.clear_caches()
    started = time.perf_counter()
    traced = jax.jit(model).trace([arrays] * num_layers)
    was_traced = time.perf_counter()
    traced.lower(lowering_platforms=(platform,))
    done = time.perf_counter()
    return Stages(1e3 * (was_traced - started), 1e3 * (done - was_traced))


def run(recorded: record.Run, num_q_heads: int = 16, num_kv_heads: int = 2, *, num_layers: int = LAYERS) -> int:
    """Appends a row for each kind of call and each model, and prints them; 0."""
    case, long = (Case(tokens, num_q_heads, num_kv_heads) for tokens in (1, TOKENS))
    sizes = case.num_q_heads, case.num_kv_heads, case.head_dim, case.rotary_dim, case.dtype
    name = pallas_qk.default_implementation(case.num_tokens, *sizes).name
    rows = [["call", "eager us", "jit us", "ratio"]]
    for kind, (function, arrays) in calls(case).items():
        found = dispatch(function, arrays)
        fields = record.case_fields(case, name, "forward") | {"op": f"{kind}_host"}
        recorded.append("host", fields | {field: round(us, 1) for field, us in found._asdict().items()})
        rows.append([kind, *(f"{us:.1f}" for us in found), f"{found.eager_us / found.jit_us:.2f}"])
    print(f"\nHost time per call, T = 1, {name}: medians of {ROUNDS} means of {CALLS}; {recorded.gpu}")
    print(table.aligned(rows))

    rows = [["layers", "", "for", "trace ms", "lower ms", "ms per layer"]]
    work = [(direction, of, platform) for direction, of in MODELS for platform in PLATFORMS]
    for direction, of, platform in progress(work, "host", " ".join):
        function, arrays = MODELS[direction, of](long)
        stages(function, arrays, 1, platform)  # imports
        repeats = [stages(function, arrays, num_layers, platform) for _ in range(REPEATS)]
        median = Stages(*(statistics.median(times) for times in zip(*repeats, strict=True)))
        fields = record.case_fields(long, of, direction) | {"op": f"{direction}_layers", "layers": num_layers}
        fields |= {field: round(ms, 1) for field, ms in median._asdict().items()}
        recorded.append("host", fields | {"platform": platform})
        times = [*(f"{ms:.1f}" for ms in median), f"{sum(median) / num_layers:.2f}"]
        rows.append([f"{num_layers} {direction}", of, platform, *times])
    print(f"\nTracing and lowering unrolled layers of {TOKENS} tokens, medians of {REPEATS}; run {recorded.run}")
    print(table.aligned(rows))
    print(f"\nRows appended to {recorded.output}.")
    return 0
