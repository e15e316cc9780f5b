"""The suite `model`: what the op is worth in the layers of a model, forward and in a training step.

A layer is RMSNorm, the projections, the op or plain jnp, causal attention, the output's product and a SwiGLU MLP, with
a residual around attention and one around the MLP. The forms of a layer differ in the projections and in what comes
between them and attention. Times are device times: the sum of the kernels of a step, see `timing.py`.

T tokens, E hidden size, Hq and Hkv query and kv heads, D head_dim.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import pallas_qk
from benchmarks import gradients, record, table
from benchmarks.agreement import Agreement
from benchmarks.checked import Checked, check, finished
from benchmarks.progress import progress, say
from benchmarks.providers import JAX_OPS, Call
from benchmarks.run import out_of_memory
from benchmarks.timing import Samples, measure
from examples.gated_attention import default_attention
from tests.cases import Case, cos_sin_table

REPEATS, ROUNDS = 3, 3  # of a step, which takes 14 to 140 ms on an H100


class Model(NamedTuple):
    """Some layers of a model; `case` has the tokens and the shapes of the op in each, and whether it has gates."""

    name: str
    num_layers: int
    hidden: int  # E; the MLP is three times as wide
    case: Case
    length: int = 4096  # tokens of a sequence


_QWEN3 = Case(16384, 16, 8, 128, 128, gate=None)
MODELS = (
    Model("Qwen3.5", 4, 2048, Case(16384, 16, 2, 256, 64, gate="in_place")),
    Model("Qwen3-8B", 4, 4096, dataclasses.replace(_QWEN3, num_q_heads=32)),
    Model("Qwen3-1.7B", 4, 2048, _QWEN3),
    Model("Qwen3-0.6B", 8, 1024, dataclasses.replace(_QWEN3, num_tokens=32768)),
)


class Form(NamedTuple):
    """How q, k and v are projected, and whether the op prepares them or plain jnp."""

    plain: bool = False
    packed: bool = False  # one product instead of three
    barriers: bool = False  # around the input of the second and third product, so that XLA doesn't merge the three


FORMS = {"plain": Form(plain=True), "three": Form(), "barriers": Form(barriers=True), "packed": Form(packed=True)}
STEPS = ("forward", "training_step")

Weights = dict[str, jax.Array]


@functools.lru_cache(maxsize=1)  # both steps of a model have them
def random_weights(model: Model, seed: int = 0) -> Sequence[Weights]:
    """Those of each layer: products' (in, out) with standard deviation 1 / sqrt(in), norms' around 1."""
    case, e = model.case, model.hidden
    q_width, kv_width = case.num_q_heads * case.head_dim, case.num_kv_heads * case.head_dim
    products = {
        "q": (e, q_width * (1 if case.gate is None else 2)),
        "k": (e, kv_width),
        "v": (e, kv_width),
        "out": (q_width, e),
        "mlp_gate": (e, 3 * e),
        "mlp_up": (e, 3 * e),
        "mlp_down": (3 * e, e),
    }
    norms = {"input_norm": e, "mlp_norm": e, "q_norm": case.head_dim, "k_norm": case.head_dim}

    @jax.jit
    def of_layer(key: jax.Array) -> Weights:
        keys = iter(jax.random.split(key, len(products) + len(norms)))
        normal = functools.partial(jax.random.normal, dtype=jnp.float32)
        weights = {name: normal(next(keys), shape) / math.sqrt(shape[0]) for name, shape in products.items()}
        weights |= {name: 1 + 0.2 * normal(next(keys), (size,)) for name, size in norms.items()}
        return {name: x.astype(case.dtype) for name, x in weights.items()}

    return [of_layer(key) for key in jax.random.split(jax.random.key(seed), model.num_layers)]


def in_form(form: Form, layers: Sequence[Weights]) -> list[Weights]:
    """Weights, or their gradients, as the layers of a form take them, from those of three projections."""
    if not form.packed:
        return list(layers)
    return [
        {name: x for name, x in weights.items() if name not in ("q", "k", "v")}
        | {"qkv": jnp.concatenate([weights[name] for name in ("q", "k", "v")], axis=1)}
        for weights in layers
    ]


def rms_norm(x: jax.Array, weight: jax.Array) -> jax.Array:
    """x (T, E), weight (E,)."""
    x32 = x.astype(jnp.float32)
    inv_rms = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)
    return (x32 * inv_rms * weight.astype(jnp.float32)[None]).astype(x.dtype)


def through_layer(
    model: Model,
    form: Form,
    implementation: str,
    weights: Weights,
    hidden: jax.Array,
    cos_sin_cache: jax.Array,
    positions: jax.Array,
) -> jax.Array:
    """hidden (T, E) to the same shape."""
    case = dataclasses.replace(model.case, packed=form.packed)
    op = JAX_OPS["xla_plain" if form.plain else implementation](case)
    others = weights["q_norm"], weights["k_norm"], cos_sin_cache, positions
    x = rms_norm(hidden, weights["input_norm"])
    if form.packed:
        q, k, v, *gates = op(x @ weights["qkv"], *others)
    else:
        once = jax.lax.optimization_barrier(x) if form.barriers else x
        twice = jax.lax.optimization_barrier(once) if form.barriers else x
        q, k, *gates = op(x @ weights["q"], once @ weights["k"], *others)
        v = twice @ weights["v"]
    in_heads = (x.reshape(-1, model.length, x.shape[-1] // case.head_dim, case.head_dim) for x in (q, k, v))
    implementation_of_attention: Any = default_attention(case.dtype)
    attended = jax.nn.dot_product_attention(*in_heads, is_causal=True, implementation=implementation_of_attention)
    attended = attended.reshape(q.shape)
    for gate in gates:
        attended = attended * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(gate.dtype)
    hidden = hidden + attended @ weights["out"]
    x = rms_norm(hidden, weights["mlp_norm"])
    return hidden + (jax.nn.silu(x @ weights["mlp_gate"]) * (x @ weights["mlp_up"])) @ weights["mlp_down"]


def forward(model: Model, form: Form, implementation: str, layers: Sequence[Weights], hidden: jax.Array, *table):
    for weights in layers:
        hidden = through_layer(model, form, implementation, weights, hidden, *table)
    return hidden


def training_step(model: Model, form: Form, implementation: str, layers: Sequence[Weights], hidden: jax.Array, *table):
    """A scalar, and its gradients for the weights and the layers' input."""

    def loss(layers, hidden):
        last = forward(model, form, implementation, layers, hidden, *table).astype(jnp.float32)
        return jnp.sum(last * last) / model.case.num_tokens

    return jax.value_and_grad(loss, argnums=(0, 1))(layers, hidden)


class Program(NamedTuple):
    """A compiled step of one form with its arrays, and the bytes that it holds next to arguments and results."""

    call: Call
    temp_bytes: int


def programs(model: Model, step: str, implementation: str) -> dict[str, Program]:
    """The step in each form, of the same numbers."""
    case, layers = model.case, random_weights(model)
    hidden = jax.jit(lambda key: jax.random.normal(key, (case.num_tokens, model.hidden)).astype(case.dtype))(
        jax.random.key(1)
    )
    positions = jnp.tile(jnp.arange(model.length, dtype=jnp.int32), case.num_tokens // model.length)
    shared = hidden, cos_sin_table(model.length, case.rotary_dim, case.dtype), positions
    function = {"forward": forward, "training_step": training_step}[step]
    found = {}
    for name, form in FORMS.items():
        arguments = in_form(form, layers), *shared
        program = compiled(functools.partial(function, model, form, implementation), *arguments)
        found[name] = Program(functools.partial(program, *arguments), program.memory_analysis().temp_size_in_bytes)
    return found


def compiled(function: Callable, *arguments: Any) -> Any:
    return jax.jit(function).lower(*arguments).compile()


def compared(step: str, results: Any, form: Form) -> list[jax.Array]:
    """What two forms are compared by: the last layer's result, or the gradients."""
    if step == "forward":
        return [results]
    _, (layers, hidden) = results
    return jax.tree.leaves((in_form(FORMS["packed"], layers) if not form.packed else layers, hidden))


def check_forms(model: Model, step: str, found: Mapping[str, Program]) -> tuple[dict[str, Checked], bool]:
    """The programs whose results are those of plain jnp but for roundings, and whether all are.

    Roundings to 16 bits add up over the layers. The norm of a difference may be 8 of their steps, relative to the norm
    of the array. On a CPU it was 1.1 after 4 layers of width 256, and 1.3 in the gradients of 8 of width 128.
    """
    bound = 8 * float(jnp.finfo(model.case.dtype).eps)
    plain = found["plain"].call
    want = compared(step, finished(plain), FORMS["plain"])

    def compare(name: str, got: Any) -> Agreement:
        agreement = gradients.agreement(compared(step, got, FORMS[name]), want, bound)
        return dataclasses.replace(agreement, against="plain jnp")

    builds = {name: lambda call=program.call: call for name, program in found.items() if name != "plain"}
    calls, kept = check(model.case, builds, compare)
    reference = Checked(plain, {"against": "none: the reference", "elements": 0, "differing": 0})
    return {"plain": reference, **calls}, kept


def run(models: Sequence[Model], recorded: record.Run, repeats: int | None = None, rounds: int | None = None) -> int:
    """Appends a row for each model, step and form, and prints them; 0, or 1 if a form differs from plain jnp."""
    all_kept = True
    rows = [["layers", "tokens", "step", "form", "ms", "of plain", "kernels", "temp GB", "of plain"]]
    work = [(model, step) for model in models for step in STEPS]
    for model, step in progress(work, "model", lambda item: f"{item[0].name} {item[1]}"):
        case = model.case
        sizes = case.num_tokens, case.num_q_heads, case.num_kv_heads, case.head_dim, case.rotary_dim
        implementation = pallas_qk.default_implementation(*sizes, case.dtype).name
        try:
            found = programs(model, step, implementation)
            calls, kept = check_forms(model, step, found)
            timed = {name: call.call for name, call in calls.items()}
            samples = measure(case, timed, repeats=repeats or REPEATS, rounds=rounds or ROUNDS)
        except Exception as error:
            if not out_of_memory(error):
                raise
            say(f"{model.name} {step} skipped: the GPU's memory did not hold it: {str(error).splitlines()[0]}")
            continue
        all_kept &= kept
        of_step = []
        for name, sample in samples.items():
            memory = found[name].temp_bytes, found["plain"].temp_bytes
            shares = sample.p50_us / samples["plain"].p50_us, memory[0] / max(1, memory[1])
            of_step.append(
                fields(model, step, name, implementation, sample)
                | {"share_of_plain": round(shares[0], 4)}
                | {"temp_bytes": memory[0], "checked": calls[name].checked}
            )
            label = f"{model.num_layers} of {model.name}", str(case.num_tokens), step.replace("_", " "), name
            times = f"{sample.p50_us / 1e3:.2f}", f"{shares[0]:.3f}", str(len(sample.kernels))
            rows.append([*label, *times, f"{memory[0] / 1e9:.2f}", f"{shares[1]:.3f}"])
        recorded.append("model", *of_step)
    attention = default_attention("bfloat16")
    print(f"\nLayers of models, attention by {attention}, device times, medians; {recorded.gpu}, run {recorded.run}")
    print(table.aligned(rows))
    print(f"\nRows appended to {recorded.output}.")
    return int(not all_kept)


def fields(model: Model, step: str, form: str, implementation: str, samples: Samples) -> record.Row:
    """What was run, and its device times."""
    case = dataclasses.replace(model.case, gate="copied")  # op is then the step alone
    return record.case_fields(case, "xla_plain" if FORMS[form].plain else implementation, step) | {
        "model": model.name,
        "layers": model.num_layers,
        "hidden": model.hidden,
        "sequence_length": model.length,
        "attention": default_attention(case.dtype),
        "form": form,
        "p25_us": round(samples.percentile(25), 1),
        "p50_us": round(samples.p50_us, 1),
        "p75_us": round(samples.percentile(75), 1),
        "kernels": len(samples.kernels),
    }
