"""`decode`: one step of gated attention layers, and whether XLA launches it as one CUDA graph.

XLA collects neighbouring operations that it can record into a command buffer, a CUDA graph that one launch replays. By
default it takes five or more. A kernel on Pallas's Triton backend is compiled by XLA itself (custom call
`__gpu$xla.gpu.triton`) and recorded like a fusion. A Mosaic GPU kernel is a custom call (`mosaic_gpu_v2`) whose handler
says that it may be recorded. Three programs of each implementation show what that is worth:

  default   as `jax.jit` compiles
  graph     command buffers of any size
  kernels   none

Whether the op was recorded is read from the operations ("thunks") that XLA dumps, and once more from a profile: there
XLA turns command buffers off unless it is told otherwise, as it is here.
"""

import dataclasses
import functools
import itertools
import math
import operator
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp

import pallas_qk
from benchmarks import record, table, xplane
from benchmarks.progress import progress, say
from benchmarks.providers import JAX_OPS
from examples import gated_attention
from pallas_qk import kv_cache
from pallas_qk._options import Implementation
from tests.cases import Case, cos_sin_table

TOKENS = (1, 4, 16, 64)  # sequences: each step is a token of each

PROGRAMS: dict[str, dict[str, Any]] = {
    "default": {},
    "graph": {"xla_gpu_graph_min_graph_size": 1},
    "kernels": {"xla_gpu_enable_command_buffer": ""},
}
WARMUP_STEPS = 20
PROFILED_STEPS = 10


class Form(NamedTuple):
    """How a step writes its caches and reads them."""

    write: str  # "set": by `.at[sequence, place].set`, after the op; "op": by the op; "example": by the example's layer
    attention: Literal["xla", "cudnn"]  # the implementation of `jax.nn.dot_product_attention`
    cache_dtype: str | None = None  # None: the activations'
    num_layers: int = 1
    scanned: bool = False  # layers are a scan, whose carry holds their caches stacked; else each has arrays of its own


FORMS = {
    "set-xla": Form("set", "xla"),
    "set-cudnn": Form("set", "cudnn"),
    "op-xla": Form("op", "xla"),
    "op-cudnn": Form("op", "cudnn"),
    "fp8-xla": Form("op", "xla", "float8_e4m3fn"),
    "fp8-cudnn": Form("op", "cudnn", "float8_e4m3fn"),
    "example-xla": Form("example", "xla"),
    "example-cudnn": Form("example", "cudnn"),
}
FORMS |= {
    f"{name}-{how}": FORMS[name]._replace(num_layers=4, scanned=how == "scanned")
    for name in ("op-xla", "op-cudnn")
    for how in ("unrolled", "scanned")
}
DEFAULT_FORMS = ("set-xla", "op-xla", "set-cudnn", "op-cudnn", "example-cudnn", "fp8-cudnn")
SCALE = 0.05  # of k and of v in a cache of 8 bits


@dataclasses.dataclass(frozen=True)
class Layer:
    """The sizes of the layer: Qwen3.5's, whose hidden width is 128 for each query head in the 16/2 and 32/2 models."""

    num_q_heads: int = 16
    num_kv_heads: int = 2
    head_dim: int = 256
    rotary_dim: int = 64
    context: int = 1024  # tokens of each sequence in the cache
    dtype: str = "bfloat16"
    width_per_q_head: int = 128

    @property
    def width(self) -> int:
        return self.width_per_q_head * self.num_q_heads

    def case(self, num_tokens: int) -> Case:
        return Case(num_tokens, self.num_q_heads, self.num_kv_heads, self.head_dim, self.rotary_dim, self.dtype)

    def attended_bytes(self, form: Form, num_sequences: int) -> int:
        """What attention must read: half of each cache, as `initial` fills it."""
        rows = 2 * form.num_layers * num_sequences * (self.context // 2) * self.num_kv_heads
        return rows * self.head_dim * jnp.dtype(form.cache_dtype or self.dtype).itemsize


class State(NamedTuple):
    """What a step takes from the one before, in the memory of the one before."""

    hidden: jax.Array  # (B, width)
    caches: Any  # a pair (B, context, Hkv, D) for each layer, or one pair with layers in front
    positions: jax.Array  # (B,)


class Parameters(NamedTuple):
    table: jax.Array
    layers: Any  # the weights of each, or one dict of them with layers in front: a slice of these would be a copy


def initial(layer: Layer, form: Form, num_sequences: int, seed: int = 0) -> tuple[Parameters, State]:
    """Random weights, and a state whose caches are half full."""
    q_width, kv_width = layer.num_q_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    shapes = {"qkv": (layer.width, 2 * q_width + 2 * kv_width), "out": (q_width, layer.width)}
    cache = (num_sequences, layer.context, layer.num_kv_heads, layer.head_dim)
    keys = iter(jax.random.split(jax.random.key(seed), 5))

    def normal(shape, dtype, fan_in: int) -> jax.Array:
        return (jax.random.normal(next(keys), shape, jnp.float32) / math.sqrt(fan_in)).astype(dtype)

    lead = (form.num_layers,)
    weights = {name: normal((*lead, *shape), layer.dtype, shape[0]) for name, shape in shapes.items()}
    weights |= {name: jnp.zeros((*lead, layer.head_dim), layer.dtype) for name in ("q_norm", "k_norm")}
    values = (normal((*lead, *cache), layer.dtype, 1) for _ in "kv")
    if form.cache_dtype is not None:
        values = ((x.astype(jnp.float32) / SCALE).astype(form.cache_dtype) for x in values)
    stacked: Any = weights, tuple(values)
    if not form.scanned:
        stacked = zip(*(jax.tree.map(operator.itemgetter(i), stacked) for i in range(form.num_layers)), strict=True)
    of_layers, caches = stacked
    positions = jnp.full((num_sequences,), layer.context // 2, jnp.int32)
    state = State(normal((num_sequences, layer.width), layer.dtype, 1), caches, positions)
    return Parameters(cos_sin_table(layer.context, layer.rotary_dim, layer.dtype), of_layers), state


def step(implementation: str, layer: Layer, form: Form, parameters: Parameters, state: State) -> State:
    """One token of every sequence through the layers, each beside a residual; positions go round in the caches."""
    one = functools.partial(_through_layer, implementation, layer, form, parameters.table, state.positions)
    hidden: jax.Array = state.hidden
    caches: Any
    if form.scanned:

        def body(carry, over):
            number, weights = over
            hidden, caches = carry
            return one(weights, hidden, caches, number), None

        numbers = jnp.arange(form.num_layers)
        (hidden, caches), _ = jax.lax.scan(body, (hidden, state.caches), (numbers, parameters.layers))
    else:
        caches = ()
        for weights, before in zip(parameters.layers, state.caches, strict=True):
            hidden, after = one(weights, hidden, before, None)
            caches += (after,)
    return State(hidden, caches, (state.positions + 1) % layer.context)


def _through_layer(
    implementation: str,
    layer: Layer,
    form: Form,
    cos_sin_cache: jax.Array,
    positions: jax.Array,
    weights: dict[str, jax.Array],
    hidden: jax.Array,
    caches: Any,
    number: jax.Array | None,
) -> tuple[jax.Array, Any]:
    """The layer's result and its caches; with the `number` of a layer, `caches` hold every layer's."""
    num_sequences = hidden.shape[0]
    case = dataclasses.replace(layer.case(num_sequences), norm_beta=1.0, packed=True, gate="in_place")
    with jax.named_scope("input_norm"):
        hidden32 = hidden.astype(jnp.float32)
        inv_rms = jax.lax.rsqrt(jnp.mean(hidden32 * hidden32, axis=-1, keepdims=True) + 1e-6)
        x = (hidden32 * inv_rms).astype(layer.dtype)
    if form.write == "example":
        return _through_example(layer, form, cos_sin_cache, positions, weights, hidden, x, caches)
    with jax.named_scope("projection"):
        qkv = x @ weights["qkv"]
    static: dict[str, Any] = case.static_arguments
    arrays = qkv, weights["q_norm"], weights["k_norm"], cos_sin_cache, positions
    scale = None if form.cache_dtype is None else jnp.float32(SCALE)
    if form.write == "set":
        q, k, v, gate = JAX_OPS[implementation](case)(*arrays)
        with jax.named_scope("cache"):
            heads = (num_sequences, layer.num_kv_heads, layer.head_dim)
            place = (jnp.arange(num_sequences), positions)
            caches = tuple(cache.at[place].set(x.reshape(heads)) for cache, x in zip(caches, (k, v), strict=True))
    else:
        outputs = pallas_qk.fused_qkv_rmsnorm_rope_gate_cache(
            *arrays,
            caches,
            kv_cache.slots_of_rows(positions, layer.context),
            **static,
            cache_axes="b s h d" if number is None else "l b s h d",
            layer=number,
            k_scale=scale,
            v_scale=scale,
            copy_gate=False,
            implementation=cast(Implementation, implementation),
        )
        q, gate, caches = outputs.q, outputs.gate, outputs.kv_cache
    with jax.named_scope("attention"):
        keys, values = caches if number is None else (jnp.take(cache, number, axis=0) for cache in caches)
        if scale is not None:
            keys, values = kv_cache.read((keys, values), layer.dtype, k_scale=scale, v_scale=scale)
        attended = jax.nn.dot_product_attention(
            q.reshape(num_sequences, 1, layer.num_q_heads, layer.head_dim),
            keys,
            values,
            key_value_seq_lengths=positions + 1,
            implementation=form.attention,
        )
    with jax.named_scope("gate_and_output"):
        gated = attended.reshape(gate.shape) * jax.nn.sigmoid(gate)
        return hidden + gated @ weights["out"], caches


def _through_example(layer, form, cos_sin_cache, positions, weights, hidden, x, caches) -> tuple[jax.Array, Any]:
    """`_through_layer` by the layer of examples/gated_attention.py, which chooses the implementation itself."""
    sizes = layer.num_q_heads, layer.num_kv_heads, layer.head_dim, layer.rotary_dim
    config = gated_attention.Config(*sizes, mrope_section=None, eps=1e-6)
    parameters = gated_attention.Parameters(weights["qkv"], weights["q_norm"], weights["k_norm"], weights["out"])
    k, v = caches
    cache = gated_attention.KVCache(k, v, positions)
    of_tokens = x[:, None], positions[:, None]
    outputs, cache = gated_attention.decode(
        parameters, *of_tokens, cos_sin_cache, config, cache, attention=form.attention
    )
    return hidden + outputs[:, 0], (cache.k, cache.v)


# --- what was recorded --------------------------------------------------------------------------------------------


class Recorded(NamedTuple):
    """The operations of a compiled program, and how many of them, and of the op's own, a command buffer holds."""

    thunks: int
    in_graphs: int
    graphs: int
    op_in_graph: str  # "recorded", "not recorded", or why it can't be said


_THUNK = re.compile(r"^(\s*)\d+:\s*(k\w+)\s*(.*)$")
_GRAPH = "kCommandBuffer"
_KERNEL_NAMES = {"triton": "pallas_qk_triton"}


def parse_thunks(text: str, implementation: str) -> Recorded:
    """Reads XLA's dump: a line an operation, those inside a command buffer indented below it."""
    thunks: list[tuple[int, str, str]] = [
        (len(match[1]), match[2], match[3]) for line in text.splitlines() if (match := _THUNK.match(line))
    ]
    inside = graphs = 0
    total = 0
    ours: list[bool] = []
    graph_indent: int | None = None
    for indent, kind, description in thunks:
        if graph_indent is not None and indent <= graph_indent:
            graph_indent = None
        if kind == _GRAPH:
            graph_indent, graphs = indent, graphs + 1
            continue
        total, inside = total + 1, inside + (graph_indent is not None)
        if _is_ours(implementation, kind, description):
            ours.append(graph_indent is not None)
    if implementation not in ("mosaic_gpu", "triton"):
        op = "fused by XLA"
    elif not ours:
        op = "not found"
    else:
        op = "recorded" if all(ours) else "not recorded"
    return Recorded(total, inside, graphs, op)


def _is_ours(implementation: str, kind: str, description: str) -> bool:
    if implementation == "mosaic_gpu":  # the only custom call of the program; the dump may leave out its name
        return kind == "kCustomCall"
    return kind == "kKernel" and _KERNEL_NAMES.get(implementation, "\0") in description


def recorded_in(directory: str, implementation: str) -> Recorded | None:
    """What XLA's dump says, of the passes after which command buffers exist; None without one, as on a CPU."""
    for name in ("*thunk_sequence_after_thunk_passes*.txt", "*thunk_sequence*.txt"):
        texts = [path.read_text() for path in pathlib.Path(directory).glob(name)]
        if texts:  # the largest is the step's: XLA compiles small programs of its own to choose its kernels
            return parse_thunks(max(texts, key=len), implementation)
    return None


# --- what it costs ------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Microseconds of a step, medians: until the call returns, until its result is there, and in a row of steps."""

    dispatch_us: float
    latency_us: float
    period_us: float


Step = Callable[[Parameters, State], State]


def compiled(implementation: str, layer: Layer, form: Form, options: dict[str, Any], parameters, state: State):
    """(compiled program, what its command buffers hold); each step writes into the state before it."""
    function = functools.partial(step, implementation, layer, form)
    with tempfile.TemporaryDirectory(prefix="pallas_qk_xla_") as directory:
        jitted = jax.jit(function, donate_argnums=1, compiler_options={**options, "xla_dump_to": directory})
        program = jitted.lower(parameters, state).compile()
        return program, recorded_in(directory, implementation)


def cost(program: Step, parameters: Parameters, state: State, steps: int) -> tuple[Cost, State]:
    """Times a program on the host's clock; the state is used up, and the last one returned."""
    for _ in range(WARMUP_STEPS):
        state = jax.block_until_ready(program(parameters, state))
    dispatch, latency = [], []
    for _ in range(steps):
        started = time.perf_counter()
        state = program(parameters, state)
        returned = time.perf_counter()
        jax.block_until_ready(state)
        dispatch.append(returned - started)
        latency.append(time.perf_counter() - started)
    periods = []
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(steps):
            state = program(parameters, state)
        jax.block_until_ready(state)
        periods.append((time.perf_counter() - started) / steps)
    medians = (statistics.median(times) * 1e6 for times in (dispatch, latency, periods))
    return Cost(*medians), state


class Profiled(NamedTuple):
    """Of one step: the device's time, its kernels, those of a CUDA graph, and the launches of graphs by the host."""

    device_us: float
    kernels: float
    kernels_in_graphs: float
    graph_launches: float


def profiled(program: Step, parameters: Parameters, state: State) -> Profiled:
    """PROFILED_STEPS steps under the profiler; the state is used up."""

    def run() -> None:
        nonlocal state
        for _ in range(PROFILED_STEPS):
            state = jax.block_until_ready(program(parameters, state))

    state = jax.block_until_ready(program(parameters, state))
    trace = xplane.profile(run, host=True)
    counts = (
        sum(kernel.duration_ns for kernel in trace.kernels) / 1e3,
        len(trace.kernels),
        sum(kernel.in_graph for kernel in trace.kernels),
        trace.graph_launches,
    )
    return Profiled(*(count / PROFILED_STEPS for count in counts))


class Ready(NamedTuple):
    """A compiled step that was timed, and the state that it left."""

    layer: Layer
    form: str  # of FORMS
    num_tokens: int
    implementation: str
    name: str  # of PROGRAMS
    program: Step
    parameters: Parameters
    state: State
    cost: Cost

    @property
    def label(self) -> list[str]:
        heads = f"{self.layer.num_q_heads}/{self.layer.num_kv_heads}"
        return [heads, str(self.layer.context), str(self.num_tokens), self.form, self.implementation]

    def fields(self, op: str) -> record.Row:
        case = self.layer.case(self.num_tokens)
        return record.case_fields(case, self.implementation, op) | {
            "program": self.name,
            "context": self.layer.context,
            "form": self.form,
            "attended_bytes": self.layer.attended_bytes(FORMS[self.form], self.num_tokens),
        }


def run(
    layers: Sequence[Layer],
    forms: Sequence[str],
    tokens: Sequence[int],
    implementations: Sequence[str],
    steps: int,
    recorded: record.Run,
    programs: Sequence[str] = tuple(PROGRAMS),
) -> int:
    """Appends a row for each layer, form, number of sequences, implementation and program, and prints them; 0.

    The profiles come last: XLA holds command buffers under CUPTI for unsafe, and a crash would cost these alone.
    """
    ready: list[Ready] = []
    columns = ["heads", "context", "T", "form", "implementation", "program"]
    rows = [[*columns, "dispatch us", "latency us", "period us", "thunks", "in graphs", "graphs", "the op"]]
    work = list(itertools.product(layers, tokens, forms, implementations))
    for layer, num_tokens, form, name in progress(work, "decode", lambda item: f"T={item[1]} {item[2]} {item[3]}"):
        try:
            found = timed(layer, form, num_tokens, name, steps, programs)
        except NotImplementedError as error:
            say(f"{layer.case(num_tokens).id}: {form}, {name} skipped: {error}")
            continue
        except Exception as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            say(f"{layer.case(num_tokens).id}: {form}, {name} skipped: the GPU's memory did not hold it")
            continue
        for step_program, thunks in found:
            fields = step_program.fields("decode_step") | _rounded(step_program.cost)
            recorded.append("decode_step", fields | (thunks._asdict() if thunks else {}))
            counts = [str(count) for count in thunks] if thunks else ["-"] * 4
            costs = [f"{number:.1f}" for number in step_program.cost]
            rows.append([*step_program.label, step_program.name, *costs, *counts])
            ready.append(step_program)
    print(f"\nOne decode step of gated attention layers; {recorded.gpu}, run {recorded.run}")
    print(f"{table.aligned(rows)}\n{_TIMED_NOTES}", flush=True)

    rows = [[*columns, "device us", "overhead us", "GB/s of caches", "kernels", "in graphs", "launches"]]
    for step_program in progress(ready, "profile", lambda item: " ".join([*item.label, item.name])):
        profile = profiled(step_program.program, step_program.parameters, step_program.state)
        recorded.append("decode_step", step_program.fields("decode_step_profile") | _rounded(profile))
        attended = step_program.layer.attended_bytes(FORMS[step_program.form], step_program.num_tokens)
        numbers = (
            profile.device_us,
            step_program.cost.period_us - profile.device_us,
            attended / profile.device_us / 1e3,
        )
        rows.append([*step_program.label, step_program.name, *(f"{x:.1f}" for x in numbers)])
        rows[-1] += [f"{count:g}" for count in profile[1:]]
    print(f"\nThe same under the profiler\n{table.aligned(rows)}\n{_PROFILED_NOTES}")
    print(f"\nRows appended to {recorded.output}.")
    return 0


_TIMED_NOTES = """dispatch: until the call returns; latency: until its result is there; period: of steps in a row.
thunks: operations of the program; in graphs: those of them that command buffers hold; the op: whether its kernel is one
of these, from XLA's dump."""
_PROFILED_NOTES = """Of one step. device: the sum of its kernels; overhead: the period above less that; GB/s of caches:
what attention must read of them, over the device's time; in graphs: kernels that CUDA graphs hold; launches: of these
graphs."""


def _rounded(numbers: Cost | Profiled) -> dict[str, float]:
    return {field: round(value, 2) for field, value in numbers._asdict().items()}


def timed(
    layer: Layer, form: str, num_tokens: int, implementation: str, steps: int, programs: Sequence[str]
) -> list[tuple[Ready, Recorded | None]]:
    """Each of the `programs`, timed, and what its command buffers hold."""
    if FORMS[form].write == "op" and implementation not in pallas_qk.IMPLEMENTATIONS:
        raise NotImplementedError(f"an op that writes caches is of {pallas_qk.IMPLEMENTATIONS}, got {implementation!r}")
    if FORMS[form].write == "example":
        sizes = layer.num_q_heads, layer.num_kv_heads, layer.head_dim, layer.rotary_dim
        chosen = pallas_qk.default_implementation(num_tokens, *sizes, layer.dtype).name
        if implementation != chosen:
            raise NotImplementedError(f"the example takes {chosen!r} here, got {implementation!r}")
    found = []
    for name in programs:
        parameters, state = initial(layer, FORMS[form], num_tokens)
        options = {**PROGRAMS[name], "xla_enable_command_buffers_during_profiling": True}
        program, thunks = compiled(implementation, layer, FORMS[form], options, parameters, state)
        costs, state = cost(program, parameters, state, steps)
        ready = Ready(layer, form, num_tokens, implementation, name, program, parameters, state, costs)
        found.append((ready, thunks))
    return found
