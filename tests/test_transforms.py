"""What `jax.jit` can wrap: layers in a scan, rematerialisation, ahead-of-time compilation, x64, the cache on disk."""

import dataclasses
import functools
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.cases import Case, make_cotangents, make_inputs
from tests.compare import assert_same
from tests.devices import mesh
from tests.forms import op
from tests.gradients import assert_agree, gradients
from tests.lowering import GPU_IMPLEMENTATIONS, kernels, lowered_text
from tests.run import primitives, quick_jit

CASE = Case(6, 4, 2, head_dim=16, rotary_dim=8, max_position=32)
PAIRS = dataclasses.replace(CASE, rotation="pairs", round_norm=False)
LAYERS = 3


@pytest.fixture(autouse=True)
def whole_float32_products():
    """The models' own; a GPU would otherwise take them in TF32."""
    with jax.default_matmul_precision("highest"):
        yield


def model(weights, hidden, table, positions, implementation=None, wrap=lambda layer: layer, loop=None):
    """LAYERS layers that project, call the op and mix what it returns, and a loss."""

    @wrap
    def layer(hidden, weights):
        q_gate, k = hidden @ weights["q"], hidden @ weights["k"]
        q, k, gate = op(CASE, implementation)(q_gate, k, weights["q_norm"], weights["k_norm"], table, positions)
        q, k, gate = checkpoint_name(q, "q"), checkpoint_name(k, "k"), checkpoint_name(gate, "gate")
        mixed = q * jax.nn.sigmoid(gate) * jnp.concatenate([k, k], axis=-1)
        return hidden + mixed @ weights["out"], None

    hidden, _ = (loop or jax.lax.scan)(layer, hidden, weights)
    return jnp.sum(jnp.sin(hidden.astype(jnp.float32)))


def unrolled(layer, hidden, weights):
    for i in range(LAYERS):
        hidden, _ = layer(hidden, jax.tree.map(lambda x, i=i: x[i], weights))
    return hidden, None


@functools.cache
def model_arguments(dtype="float32"):
    rng = np.random.default_rng(0)
    q, k, d = CASE.num_q_heads * CASE.head_dim, CASE.num_kv_heads * CASE.head_dim, CASE.head_dim
    shapes = {"q": (32, 2 * q), "k": (32, k), "out": (q, 32), "q_norm": (d,), "k_norm": (d,)}
    weights = {
        name: jnp.asarray(rng.normal(size=(LAYERS, *shape)) / 4 + ("norm" in name), dtype)
        for name, shape in shapes.items()
    }
    inputs = make_inputs(CASE)
    hidden = jnp.asarray(rng.normal(size=(CASE.num_tokens, 32)), dtype)
    return weights, hidden, inputs.cos_sin_cache.astype(dtype), inputs.positions


def close(got, want):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@functools.cache
def unrolled_gradients():
    return quick_jit(jax.grad(functools.partial(model, loop=unrolled), (0, 1, 2)))(*model_arguments())


def test_scan_over_layers():
    close(quick_jit(jax.grad(model, (0, 1, 2)))(*model_arguments()), unrolled_gradients())


POLICIES = jax.checkpoint_policies
REMAT = {  # the policy, and how many of our forward kernels a layer then has in all
    "everything again": (None, 2),
    "nothing saveable": (POLICIES.nothing_saveable, 2),
    "save q, k and gate": (POLICIES.save_only_these_names("q", "k", "gate"), 1),
    "save q alone": (POLICIES.save_only_these_names("q"), 2),
    "everything saveable": (POLICIES.everything_saveable, 1),
}


@pytest.mark.parametrize("name", REMAT)
def test_checkpoint(name):
    policy, forwards = REMAT[name]
    rematerialised = functools.partial(model, wrap=functools.partial(jax.checkpoint, policy=policy))
    close(quick_jit(jax.grad(rematerialised, (0, 1, 2)))(*model_arguments()), unrolled_gradients())
    for implementation in GPU_IMPLEMENTATIONS:
        loss = jax.grad(functools.partial(rematerialised, implementation=implementation))
        calls = kernels(lowered_text(loss, *model_arguments()))
        assert calls.count(f"pallas_qk_{implementation}_forward") == forwards
        assert calls.count(f"pallas_qk_{implementation}_backward") == 1


def test_linearize_of_scan_with_checkpoint():
    weights, hidden, table, positions = model_arguments()

    def function(weights, hidden, table):
        return model(weights, hidden, table, positions, wrap=jax.checkpoint)

    arguments = weights, hidden, table
    tangents = jax.tree.map(lambda x: jnp.cos(x * 3), arguments)
    _, along = jax.linearize(function, *arguments)
    want = sum(jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (unrolled_gradients(), tangents)), strict=True))
    np.testing.assert_allclose(along(*tangents), want, rtol=1e-4)
    np.testing.assert_allclose(jax.jvp(function, arguments, tangents)[1], want, rtol=1e-4)


@pytest.mark.parametrize("case", [CASE, PAIRS], ids=lambda case: case.id)
def test_ahead_of_time(case):
    inputs, cotangents = make_inputs(case), make_cotangents(case)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs]
    program = jax.jit(op(case)).lower(*shapes).compile()
    assert_same(program(*inputs), op(case)(*inputs))
    shapes += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in cotangents]
    got = jax.jit(gradients(op(case))).lower(*shapes).compile()(*inputs, *cotangents)
    assert_agree(got, quick_jit(gradients(op(case)))(*inputs, *cotangents))


def test_ahead_of_time_over_devices():
    on = mesh(data=2, model=2)
    with jax.default_device(jax.devices("cpu")[0]):
        inputs = make_inputs(CASE)
        want = op(CASE)(*inputs)
    specs = (P("data", "model"), P("data", "model"), P(), P(), P(), P("data"))
    layouts = [NamedSharding(on, spec) for spec in specs]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(inputs, layouts, strict=True)]
    program = jax.jit(op(CASE)).lower(*shapes).compile()
    got = program(*(jax.device_put(x, s) for x, s in zip(inputs, layouts, strict=True)))
    assert_same([np.asarray(x) for x in got], [np.asarray(x) for x in want])


def test_donated_activations_and_cotangents():
    inputs, cotangents = make_inputs(CASE), make_cotangents(CASE)
    want = jax.jit(gradients(op(CASE)))(*inputs, *cotangents)
    donated = jax.jit(gradients(op(CASE)), donate_argnums=(0, 1))
    inputs = make_inputs(CASE)
    got = donated(*inputs, *cotangents)
    assert inputs.q_gate.is_deleted() and inputs.k.is_deleted()
    assert_same(got, want)


@functools.cache
def by_default(dtype):
    """A case, its inputs and cotangents, outputs and gradients, without x64 and under strict promotion."""
    case = Case(5, 2, 1, head_dim=16, rotary_dim=8, dtype=dtype, max_position=32, mrope_section=(2, 1, 1))
    inputs, cotangents = list(make_inputs(case)), make_cotangents(case)
    return case, inputs, cotangents, op(case)(*inputs), jax.jit(gradients(op(case)))(*inputs, *cotangents)


# Each pair of values, but for that of the default settings, which all are compared with.
@pytest.mark.parametrize(
    "dtype, x64, promotion",
    [
        ("bfloat16", True, "strict"),
        ("bfloat16", False, "standard"),
        ("float32", True, "standard"),
        ("float32", True, "strict"),
    ],
)
def test_x64_and_promotion(dtype, x64, promotion):
    """The same bits, and no array of float64 on the way, whatever the setting."""
    case, inputs, cotangents, outputs, grads = by_default(dtype)
    inputs = list(inputs)
    with jax.enable_x64(x64), jax.numpy_dtype_promotion(promotion):
        if x64:
            inputs[5] = inputs[5].astype(jnp.int64)
        assert_same(op(case)(*inputs), outputs)
        assert_same(jax.jit(gradients(op(case)))(*inputs, *cotangents), grads)

        def along(*args):
            return jax.jvp(lambda *floats: op(case)(*floats, args[5]), args[:5], args[:5])[1]

        assert [x.dtype for x in along(*inputs)] == [jnp.dtype(dtype)] * 3
        for function, args in ((op(case), inputs), (gradients(op(case)), [*inputs, *cotangents]), (along, inputs)):
            assert not re.search(r"f64\[\d", str(jax.make_jaxpr(function)(*args)))


def test_disable_jit_differentiates():
    inputs, cotangents = make_inputs(CASE), make_cotangents(CASE)
    want = quick_jit(gradients(op(CASE)))(*inputs, *cotangents)
    with jax.disable_jit():
        assert_agree(gradients(op(CASE))(*inputs, *cotangents), want)


def test_the_jaxpr_shows_one_call():
    assert primitives(op(CASE), *make_inputs(CASE)).count("fused_qk_rmsnorm_rope_gate") == 1


CACHED = """
import jax
from jax.sharding import NamedSharding, PartitionSpec as P
from tests.cases import Case, make_cotangents, make_inputs
from tests.devices import mesh
from tests.forms import op
from tests.gradients import gradients

case = {case}
on = mesh(data=2, model=2)
specs = [P("data", "model"), P("data", "model"), P(), P(), P(), P("data"), *[P("data", "model")] * 3]
args = [jax.device_put(x, NamedSharding(on, s)) for x, s in zip([*make_inputs(case), *make_cotangents(case)], specs)]
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
for without_the_pointer in (True, False):
    jax.config.update("jax_remove_custom_partitioning_ptr_from_cache_key", without_the_pointer)
    events.clear()
    jax.jit(gradients(op(case))).lower(*args).compile()
    print(sum(event == "/jax/compilation_cache/cache_hits" for event in events))
"""


def test_persistent_cache_in_a_new_process(tmp_path):
    """A sharded program is found again where the callback's pointer is left out of the key, and only there."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PLATFORMS": "cpu",
    }
    found = []
    for _ in range(2):
        run = subprocess.run(
            [sys.executable, "-c", CACHED.format(case=CASE)],
            env=environment,
            cwd=pathlib.Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-2000:]
        found.append(run.stdout.split())
    assert found == [["0", "0"], ["1", "0"]]
