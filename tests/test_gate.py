"""copy_gate="never" and `apply_gate`: values and gradients, whatever lies beside the gate's cotangent, and programs."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_qk
from pallas_qk import _implementations, _reference, _rows
from pallas_qk._mosaic_gpu import backward as mosaic_backward
from pallas_qk._mosaic_gpu.gate import gate_backward
from pallas_qk._target import cuda_target
from tests import forms, lowering
from tests.cases import Case, make_inputs, random_normal
from tests.compare import assert_same, assert_within
from tests.derivatives import in_float64
from tests.devices import assert_only_weight_sums, compiled, mesh, mesh_of
from tests.gradients import assert_agree
from tests.lowering import FIRST, GPU_IMPLEMENTATIONS
from tests.run import kernel, primitives, quick_jit
from tests.tolerances import ROUNDOFF, SMALLEST

CASE = Case(6, 4, 2, head_dim=16, rotary_dim=8, max_position=32, gate="handed_on")
FORMS = {
    "q_gate and k": {},
    "packed": {"packed": True},
    "three arrays": {"separate_v": True},
    "q alone": {"q_alone": True},
    "without weights": {"weights": False},
    "packed, v normalised": {"packed": True, "v_norm": True},
}
HARD_GATES = (0.0, -0.0, 1e-3, 5.0, -5.0, 11.0, -11.0, 17.0, -17.0, 60.0, -60.0, 88.5, -88.5, 200.0, -200.0)


def form_of(case, gate):
    return dataclasses.replace(case, gate=gate)


def in_heads(case, x):
    return x.reshape(*x.shape[:-1], -1, x.shape[-1] // case.num_q_heads)


def arrays_of(case, heads=False):
    """attended, and what the op takes; with `heads` q, k, v and attended have an axis of heads."""
    attended = random_normal((case.num_tokens, case.num_q_heads * case.head_dim), case.dtype, seed=2)
    arrays = [attended, *forms.arguments(case, make_inputs(case))]
    if heads:
        numbers = [case.num_q_heads, case.num_q_heads, *[case.num_kv_heads] * (1 + forms.has_v(case))]
        arrays[: len(numbers)] = [x.reshape(len(x), n, -1) for x, n in zip(arrays, numbers, strict=False)]
    return arrays


def block(case, implementation=None, **static):
    """q, k (and v), and attended * sigmoid(gate), from attended and the op's arrays."""
    op = forms.op(case, implementation, **static)

    def run(attended, *arrays):
        *rows, gate = op(*arrays)
        if case.gate == "handed_on":
            return *rows, pallas_qk.apply_gate(attended, gate)
        opened = jax.nn.sigmoid(gate.astype(jnp.float32)).astype(gate.dtype)
        return *rows, attended * opened

    return run


def cotangents_of(case, heads=False):
    cotangents = [
        random_normal(x.shape, x.dtype, 50 + i)
        for i, x in enumerate(jax.eval_shape(block(case), *arrays_of(case, heads)))
    ]
    return tuple(cotangents)


def pulled_back(function, of):
    """The gradients of the first arguments, from all of them and the cotangents."""

    def run(cotangents, *args):
        first, rest = args[:of], args[of:]
        return jax.vjp(lambda *first: function(*first, *rest), *first)[1](cotangents)

    return run


def num_differentiable(case):
    return 1 + sum(map(bool, forms.given(case)[:4])) + case.separate_v


def gate_lanes(case, q):
    """(T, Hq*D) of an array like q."""
    t, h, d = case.num_tokens, case.num_q_heads, case.head_dim
    q = np.array(q).reshape(t, -1)
    return q[:, : h * 2 * d].reshape(t, h, 2, d)[:, :, 1].reshape(t, h * d)


def others(case, q):
    """An array like q with zeros in the place of the gates."""
    q = np.array(q)
    flat = q.reshape(case.num_tokens, -1)
    heads = flat[:, : case.num_q_heads * 2 * case.head_dim]
    heads.reshape(case.num_tokens, case.num_q_heads, 2, case.head_dim)[:, :, 1] = 0
    return q


def beside(case, like, gate, fill):
    """An array like q with these gates, (T, Hq*D), and `fill` elsewhere."""
    t, h, d = case.num_tokens, case.num_q_heads, case.head_dim
    array = np.full((t, np.prod(like.shape[1:], dtype=int)), fill, like.dtype)
    array[:, : h * 2 * d].reshape(t, h, 2, d)[:, :, 1] = np.asarray(gate).reshape(t, h, d)
    return array.reshape(like.shape)


def define(attended, gate, dout):
    """The product and the cotangents of attended and of the gate in float64."""
    a, g, d = (np.asarray(x).astype(np.float64) for x in (attended, gate, dout))
    below = np.exp(-np.abs(g))
    sigmoid, slope = np.where(g < 0, below, 1) / (1 + below), below / (1 + below) ** 2
    return a * sigmoid, d * sigmoid, d * a * slope


def check_defined(case, attended, gate, dout, product, of_attended, of_gate):
    """Each cotangent is rounded once; the product, and the sigmoid in it, once each."""
    exact = define(attended, gate, dout)
    roundoff, smallest = ROUNDOFF[case.dtype], SMALLEST[case.dtype]
    # The exponent's error grows with the gate. Besides: 4 of exp, 5 of each of two reciprocals of its sum, products.
    steps = (20 + 4 * np.abs(np.asarray(gate).astype(np.float64))) * ROUNDOFF["float32"]
    tiny = SMALLEST["float32"] * np.maximum(1, np.abs(np.asarray(dout).astype(np.float64)))
    tiny = tiny * np.maximum(1, np.abs(np.asarray(attended).astype(np.float64)))
    for name, got, want, roundings in zip(
        ("product", "attended", "gate"), (product, of_attended, of_gate), exact, (2, 1, 1), strict=True
    ):
        if got is not None:
            assert got.dtype == case.dtype
            rounding = roundings * (
                roundoff * np.abs(want) + smallest * np.maximum(1, np.abs(np.asarray(attended).astype(np.float64)))
            )
            assert_within(
                name, np.asarray(got).reshape(want.shape), want, 1.01 * (rounding + steps * np.abs(want)) + 2 * tiny
            )


def hard(case, array):
    """An array like q whose first gates are hard ones."""
    gates = gate_lanes(case, array)
    gates[0, : len(HARD_GATES)] = np.asarray(HARD_GATES, np.float32).astype(gates.dtype)
    array = np.array(array)
    array.reshape(case.num_tokens, -1)[:, : case.num_q_heads * 2 * case.head_dim].reshape(
        case.num_tokens, case.num_q_heads, 2, case.head_dim
    )[:, :, 1] = gates.reshape(case.num_tokens, case.num_q_heads, case.head_dim)
    return array


# Values and gradients


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("form", ["q_gate and k", "packed", "three arrays"])
def test_values_and_gradients_equal_their_float64_definition(form, heads, dtype):
    """Of the product, attended and the gate. All else has the bits of the form with the gate in place."""
    if form == "packed" and heads:
        pytest.skip("a packed array has no axis of heads")
    case = dataclasses.replace(CASE, dtype=dtype, **FORMS[form])
    attended, *arrays = arrays_of(case, heads)
    arrays[0] = jnp.asarray(hard(case, arrays[0]))
    cotangents, of = cotangents_of(case, heads), num_differentiable(case)
    results, gradients = {}, {}
    for gate in ("handed_on", "in_place"):
        function = block(form_of(case, gate))
        results[gate] = jax.jit(function)(attended, *arrays)
        gradients[gate] = jax.jit(pulled_back(function, of))(cotangents, attended, *arrays)
    assert_same(results["handed_on"][:-1], results["in_place"][:-1])
    assert_same(gradients["handed_on"][2:], gradients["in_place"][2:])
    product, (of_attended, of_q, *_) = results["handed_on"][-1], gradients["handed_on"]
    assert product.shape == of_attended.shape == attended.shape and of_q.shape == arrays[0].shape
    assert_same(others(case, of_q), others(case, gradients["in_place"][1]))
    flat = [x.reshape(case.num_tokens, -1) for x in (attended, cotangents[-1])]
    gates = gate_lanes(case, arrays[0])
    check_defined(case, flat[0], gates, flat[1], product, of_attended, gate_lanes(case, of_q))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_sigmoid_is_rounded_before_the_product(dtype):
    """XLA leaves out no conversion."""
    case = dataclasses.replace(CASE, num_tokens=64, dtype=dtype)
    attended, *arrays = arrays_of(case)
    gate = jnp.asarray(gate_lanes(case, arrays[0]))
    got = jax.jit(lambda *x: pallas_qk.apply_gate(x[0], forms.op(case)(*x[1:])[-1]))(attended, *arrays)
    opened = np.asarray(jax.jit(lambda x: jax.nn.sigmoid(x.astype(jnp.float32)))(gate)).astype(dtype)
    want = np.asarray(attended).astype(np.float32) * opened.astype(np.float32)
    assert_same(got, want.astype(dtype))


def test_both_shapes_of_attended():
    """Whatever the form of the call."""
    for heads in (False, True):
        attended, *arrays = arrays_of(CASE, heads)
        gate = forms.op(CASE)(*arrays)[-1]
        want = pallas_qk.apply_gate(attended, gate)
        for shape in ((6, 64), (6, 4, 16)):
            got = pallas_qk.apply_gate(attended.reshape(shape), gate)
            assert got.shape == shape
            assert_same(got.reshape(want.shape), want)


@pytest.mark.parametrize("implementation", ["xla", *GPU_IMPLEMENTATIONS])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "three arrays"])  # v passes by the op
@pytest.mark.parametrize("fill", [np.nan, 3.0])
def test_the_backward_of_each_implementation(implementation, form, fill):
    """Has the bits of that with the gate's cotangent by itself, whatever lies beside it where it is handed on."""
    case = dataclasses.replace(CASE, **FORMS[form])
    options = {gate: forms.options(form_of(case, gate)) for gate in ("handed_on", "in_place")}
    inputs = forms.split_heads(case, forms.inputs_of(case, make_inputs(case)))
    cotangents = forms.split_heads(case, forms.as_outputs(case, forms.cotangents_of(case)))
    num_sms = 2 if implementation == "mosaic_gpu" else None

    def run(gate, cotangents):
        return kernel("backward", implementation, options[gate], False, num_sms)(inputs, cotangents)

    want = run("in_place", cotangents)
    array = beside(case, inputs.q, cotangents.gate, fill)
    assert_same(run("handed_on", cotangents._replace(gate=jnp.asarray(array))), want)


@pytest.mark.parametrize(
    "case",
    [
        CASE,
        Case(37, 5, 2, packed=True),
        Case(7, 3, 1, 80, 40, "float16"),
        Case(5, 3, 2, 96, 6, "float32", packed=True),
        Case(3, 2, 1, 3, 2, "bfloat16"),
        Case(130, 1, 1, 64, 32, "float32"),
    ],
    ids=lambda case: case.id,
)
def test_the_kernel_equals_its_float64_definition(case):
    """And writes the gate's lanes of its first result alone."""
    from tests.mosaic_interpreter import execute

    inputs = forms.split_heads(case, forms.inputs_of(form_of(case, "handed_on"), make_inputs(case)))
    inputs = _rows.Inputs(hard(case, inputs.q) if case.num_q_heads * case.head_dim > 15 else inputs.q, *[None] * 5)
    options = _options_of_gate(form_of(case, "handed_on"))
    shape = (case.num_tokens, case.num_q_heads, case.head_dim)
    attended, dout = (random_normal(shape, case.dtype, seed) for seed in (2, 3))
    operands = _rows.Product(attended=attended, product=dout)
    found = execute(functools.partial(gate_backward, options=options), inputs, operands, num_sms=2, partly=True)
    flat = [np.asarray(x).reshape(case.num_tokens, -1) for x in (attended, dout)]
    gates = gate_lanes(case, inputs.q)
    check_defined(case, flat[0], gates, flat[1], None, found.attended, gate_lanes(case, found.q))
    written = np.isfinite(np.asarray(found.q).astype(np.float32))
    assert_same(written, np.isfinite(beside(case, inputs.q, np.zeros_like(gates), np.nan).astype(np.float32)))


def _options_of_gate(case):
    gate = forms.op(case)(*arrays_of(case)[1:])[-1]
    return gate._call.options


def test_no_gate_is_too_large():
    """Not infinity either, and NaN stays where it is."""
    attended, dout = jnp.full((1, 6), 2.0), jnp.full((1, 6), 3.0)
    gates = jnp.array([[jnp.inf, -jnp.inf, 1e30, -1e30, jnp.nan, 0.0]])
    q_gate = jnp.concatenate([jnp.ones((1, 6)), gates], axis=-1)
    ones = jnp.ones(6)

    def function(attended, q_gate):
        *_, gate = pallas_qk.fused_qk_rmsnorm_rope_gate(
            q_gate, None, ones, None, None, None, 1e-6, num_q_heads=1, copy_gate="never"
        )
        return pallas_qk.apply_gate(attended, gate)

    product, pull = jax.vjp(function, attended, q_gate)
    np.testing.assert_array_equal(product, [[2, 0, 2, 0, np.nan, 1]])
    of_attended, of_q = pull(dout)
    np.testing.assert_array_equal(of_attended, [[3, 0, 3, 0, np.nan, 1.5]])
    np.testing.assert_array_equal(of_q[:, 6:], [[0, 0, 0, 0, np.nan, 1.5]])
    np.testing.assert_array_equal(of_q[:, :6], 0)


def test_no_tokens():
    case = dataclasses.replace(CASE, num_tokens=0)
    arrays = arrays_of(case)
    got = pulled_back(block(case), 5)(cotangents_of(case), *arrays)
    assert [x.shape for x in got] == [x.shape for x in arrays[:5]]
    text = lowering.lowered_text(pulled_back(block(case, "mosaic_gpu"), 5), cotangents_of(case), *arrays)
    assert lowering.kernels(text) == []


# What lies beside the gate's cotangent


@pytest.fixture
def nan_beside(monkeypatch):
    """NaN where a kernel leaves what memory held."""

    def poisoned(inputs, operands, *, options):
        found = plain(inputs, operands, options=options)
        counts = _reference._alone("gate", jnp.ones_like(operands.attended), options) == 1
        return found._replace(q=jnp.where(counts, found.q, jnp.nan))

    plain = _reference.gate_backward
    monkeypatch.setattr(_reference, "gate_backward", poisoned)
    jax.clear_caches()
    yield
    jax.clear_caches()


LAYERS, WIDTH = 3, 24


def layer(gate, uses=1, packed=False):
    case = dataclasses.replace(CASE, dtype="float32", packed=packed)
    op, inputs = forms.op(form_of(case, gate)), make_inputs(case)
    constants = inputs.q_weight, inputs.k_weight, inputs.cos_sin_cache, inputs.positions

    def run(hidden, weights):
        arrays = [hidden @ weights["qkv"]] if packed else [hidden @ weights["q"], hidden @ weights["k"]]
        q, k, *_, gate = op(*arrays, *constants)
        attended = [q * jnp.concatenate([k, k], axis=-1) * (i + 1) for i in range(uses)]
        if case.gate == "handed_on" and isinstance(gate, pallas_qk.Gate):
            products = [pallas_qk.apply_gate(x, gate) for x in attended]
        else:
            products = [x * jax.nn.sigmoid(gate) for x in attended]
        return hidden + sum(products) @ weights["out"], None

    return run


def weights_of_layers():
    q, k = CASE.num_q_heads * CASE.head_dim, CASE.num_kv_heads * CASE.head_dim
    shapes = {"q": (WIDTH, 2 * q), "k": (WIDTH, k), "qkv": (WIDTH, 2 * q + 2 * k), "out": (q, WIDTH)}
    return {name: random_normal((LAYERS, *shape), "float32", i) / 8 for i, (name, shape) in enumerate(shapes.items())}


def unrolled(layer, hidden, weights):
    for i in range(LAYERS):
        hidden, _ = layer(hidden, jax.tree.map(lambda x, i=i: x[i], weights))
    return hidden, None


LOOPS = {
    "unrolled": (unrolled, lambda layer: layer),
    "remat": (unrolled, jax.checkpoint),
    "scan": (jax.lax.scan, lambda layer: layer),
    "scan of remat": (jax.lax.scan, jax.checkpoint),
}


def gradients_of_layers(loop, layer):
    run, wrap = LOOPS[loop]

    def loss(hidden, weights):
        return jnp.sum(jnp.sin(run(wrap(layer), hidden, weights)[0]))

    return jax.grad(loss, (0, 1)), (random_normal((CASE.num_tokens, WIDTH), "float32", 9), weights_of_layers())


@pytest.mark.parametrize("uses, packed", [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize("loop", LOOPS)
def test_layers(loop, uses, packed, nan_beside):
    """Have the gradients of the gate in place, and no NaN of what memory held."""
    with jax.default_matmul_precision("highest"):
        got, want = (
            jax.jit(function)(*arguments)
            for gate in ("handed_on", "in_place")
            for function, arguments in [gradients_of_layers(loop, layer(gate, uses, packed))]
        )
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())


@pytest.mark.parametrize("form", ["q_gate and k", "packed"])
def test_what_lies_beside_moves_nothing(form):
    """In the op's derivatives of the first and second order."""
    case = dataclasses.replace(CASE, dtype="float32", **FORMS[form])
    _, q, *arrays = arrays_of(case)

    def gate_of(q):
        return forms.op(case)(q, *arrays)[-1]

    def moved(q):
        return jax.jvp(gate_of, (q,), (jnp.sin(q),))[1]

    gate = random_normal((case.num_tokens, case.num_q_heads * case.head_dim), case.dtype, 4)
    for function, factor in ((gate_of, 1), (moved, jnp.cos(q))):
        like, pull = jax.vjp(function, q)
        got, want = (
            pull(jax.tree.unflatten(jax.tree.structure(like), [jnp.zeros_like(q), beside(case, q, gate, fill)]))[0]
            for fill in (jnp.nan, 0)
        )
        assert_same(got, want)
        np.testing.assert_allclose(got, factor * beside(case, q, gate, 0), rtol=1e-6)


def test_eager_and_frozen_gates(nan_beside):
    """A gate that nothing reads, or whose gradient is stopped, adds none."""
    case = dataclasses.replace(CASE, dtype="float32")
    attended, *arrays = arrays_of(case)
    op = forms.op(case)

    def loss(q_gate, read):
        q, _, gate = op(q_gate, *arrays[1:])
        product = pallas_qk.apply_gate(attended, jax.lax.stop_gradient(gate)) if read else attended
        return jnp.sum(jnp.sin(q)) + jnp.sum(product)

    want = jax.grad(lambda q_gate: jnp.sum(jnp.sin(forms.op(form_of(case, "in_place"))(q_gate, *arrays[1:])[0])))(
        arrays[0]
    )
    for read in (False, True):
        assert_agree([jax.grad(loss)(arrays[0], read)], [want])


@pytest.mark.parametrize("loop", ["unrolled", "scan"])
def test_the_array_of_the_gate_is_kept_once(loop):
    """For the backward: the gate's and the op's are one, and what the gate in place keeps besides is not kept."""
    _, (hidden, weights) = gradients_of_layers(loop, layer("handed_on"))
    run, wrap = LOOPS[loop]

    def kept(gate):
        def forward(hidden, weights):
            return run(wrap(layer(gate)), hidden, weights)[0]

        pull = jax.eval_shape(lambda *x: jax.vjp(forward, *x)[1], hidden, weights)
        shapes = [x.shape[x.ndim - 2 :] for x in jax.tree.leaves(pull) if x.size]
        count = LAYERS if loop == "unrolled" else 1
        of_q, of_one = 2 * CASE.num_q_heads * CASE.head_dim, CASE.num_q_heads * CASE.head_dim
        return [shapes.count((CASE.num_tokens, width)) / count for width in (of_q, of_one)]

    (q, attended), (q_before, attended_before) = kept("handed_on"), kept("in_place")
    assert q == q_before == 1 and attended < attended_before


@pytest.mark.parametrize("names, runs", [(("q", "k"), 1), (("q",), 2)])
def test_forwards_that_rematerialisation_runs(names, runs):
    """One where q and k are saved: the gate is no result of the kernel."""
    attended, *arrays = arrays_of(CASE)
    op = forms.op(CASE, "mosaic_gpu")

    def block(q_gate):
        q, k, gate = op(jnp.sin(q_gate), *arrays[1:])
        q, k = checkpoint_name(q, "q"), checkpoint_name(k, "k")
        return jnp.sum(
            (pallas_qk.apply_gate(q * jnp.concatenate([k, k], axis=-1), gate) * attended).astype(jnp.float32)
        )

    policy = jax.checkpoint_policies.save_only_these_names(*names)
    text = lowering.lowered_text(jax.grad(jax.checkpoint(block, policy=policy)), arrays[0])
    assert lowering.kernels(text).count("pallas_qk_mosaic_gpu_forward") == runs


# Other transformations


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("transform", ["jvp", "jvp of jvp", "hessian", "grad of jvp", "jvp of grad", "grad of grad"])
def test_every_mode_and_order(transform, heads, nan_beside):
    """Against plain jnp in float64."""
    case = dataclasses.replace(
        CASE, num_tokens=2, num_q_heads=1, num_kv_heads=1, dtype="float32", head_dim=4, rotary_dim=0
    )
    attended, q_gate, k, *weights = arrays_of(case, heads)
    op = forms.op(case)

    def ours(attended, q_gate):
        q, _, gate = op(q_gate, k, *weights)
        return q * pallas_qk.apply_gate(attended, gate)

    def plain(attended, q_gate):
        x, gate = jnp.split(q_gate.reshape(2, 1, 8), 2, axis=-1)
        q = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + case.eps) * weights[0].astype(x.dtype)[None, None]
        return (q * jax.nn.sigmoid(gate)).reshape(attended.shape) * attended

    def transformed(f):
        def moved(*args):
            return jax.jvp(f, args, tuple(jnp.cos(3 * x) for x in args))[1]

        def loss(*args):
            return jnp.sum(jnp.sin(f(*args)))

        def moved_loss(*args):
            return jnp.sum(jnp.sin(moved(*args)))

        def length_of_gradient(*args):
            return sum(jnp.sum(jnp.sin(x)) for x in jax.grad(loss, (0, 1))(*args))

        return {
            "jvp": moved,
            "jvp of jvp": lambda *args: jax.jvp(moved, args, args)[1],
            "hessian": jax.hessian(loss, (0, 1)),
            "grad of jvp": jax.grad(moved_loss, (0, 1)),
            "jvp of grad": lambda *args: jax.jvp(jax.grad(loss, (0, 1)), args, args)[1],
            "grad of grad": jax.grad(length_of_gradient, (0, 1)),
        }[transform]

    got = jax.jit(transformed(ours))(attended, q_gate)
    want = in_float64(transformed(plain))(np.float64(attended), np.float64(q_gate))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4 * np.abs(b).max())


@pytest.mark.parametrize("inner", [lambda op, q: jax.jvp(op, (q,), (q,))[0], lambda op, q: jax.vjp(op, q)[0]])
def test_a_gate_of_an_inner_derivative(inner, nan_beside):
    """What an inner derivative returns next to its own result is a gate as any other."""
    case = dataclasses.replace(CASE, dtype="float32")
    attended, q_gate, *arrays = arrays_of(case)

    def loss(q_gate, *, plainly):
        def op(q_gate):
            return forms.op(case)(q_gate, *arrays)

        q, _, gate = op(q_gate) if plainly else inner(op, q_gate)
        return jnp.sum(jnp.sin(q * pallas_qk.apply_gate(attended, gate)))

    got, want = (jax.jit(jax.grad(functools.partial(loss, plainly=x)))(q_gate) for x in (False, True))
    assert np.isfinite(got).all()
    assert_agree([got], [want])


# attended, q_gate, k, the weights, the table and positions
BATCHED = {"all": (0, 0, 0, None, None, None, 0)} | {
    name: tuple(0 if i == place else None for i in range(7))
    for place, name in {0: "attended", 1: "q_gate", 2: "k", 3: "q_weight", 6: "positions"}.items()
}


def three_calls(first, axes):
    """The arrays of each of three calls, and of all in one, whose axes are these."""
    each = [[x if axis is None else jnp.roll(x, i, 0) for x, axis in zip(first, axes, strict=True)] for i in range(3)]
    return each, [x if axis is None else jnp.stack(xs) for x, axis, *xs in zip(first, axes, *each, strict=True)]


@pytest.mark.parametrize("batched", BATCHED)
def test_vmap(batched):
    """Of the block and of its gradients: each call by itself, as one call of the product's backward."""
    axes, function = BATCHED[batched], block(CASE)
    each, stacked = three_calls(arrays_of(CASE), axes)
    assert_same(
        jax.vmap(function, axes)(*stacked), jax.tree.map(lambda *xs: jnp.stack(xs), *(function(*x) for x in each))
    )
    cotangents = cotangents_of(CASE)
    pull = pulled_back(function, 3)
    got = jax.jit(jax.vmap(pull, (None, *axes)))(cotangents, *stacked)
    assert_same(got, jax.tree.map(lambda *xs: jnp.stack(xs), *(jax.jit(pull)(cotangents, *x) for x in each)))
    names = primitives(jax.vmap(pull, (None, *axes)), cotangents, *stacked)
    assert names.count("apply_gate_backward") == 1 and ("scan" in names) == (batched == "q_weight")


@pytest.mark.parametrize("batched", BATCHED)
def test_derivatives_of_vmap(batched, nan_beside):
    """Also where nothing that the product takes is mapped."""
    case = dataclasses.replace(CASE, dtype="float32")
    axes, function = BATCHED[batched], block(case)
    each, stacked = three_calls(arrays_of(case), axes)

    def of_product(*args):
        return jnp.sum(jnp.sin(function(*args)[-1]))

    def summed(*moved):
        return jnp.sum(jax.vmap(of_product, axes)(*moved, *stacked[3:]))

    tangents = tuple(jnp.cos(x) for x in stacked[:3])
    for outer in (lambda f: f, jax.jit):
        got, got_gradients = outer(jax.value_and_grad(summed, (0, 1, 2)))(*stacked[:3])
        values = [jax.value_and_grad(of_product, (0, 1, 2))(*x) for x in each]
        np.testing.assert_allclose(got, sum(value for value, _ in values), rtol=1e-5)
        for place, (axis, gradient) in enumerate(zip(axes, got_gradients, strict=False)):
            of_each = [gradients[place] for _, gradients in values]
            want = sum(of_each) if axis is None else jnp.stack(of_each)
            np.testing.assert_allclose(gradient, want, rtol=1e-5, atol=1e-5 * np.abs(want).max())
        moved = outer(lambda *x: jax.jvp(summed, x, tangents))(*stacked[:3])[1]
        want = sum(jnp.vdot(a, b) for a, b in zip(got_gradients, tangents, strict=True))
        np.testing.assert_allclose(moved, want, rtol=1e-4)


def test_a_gate_of_vmap():
    """Holds the batch in front of the tokens, and so do two of them that are stacked."""
    attended, *arrays = arrays_of(CASE)
    stack = jnp.stack([arrays[0], 2 * arrays[0]])
    gate = jax.vmap(lambda q_gate: forms.op(CASE)(q_gate, *arrays[1:])[-1])(stack)
    got = pallas_qk.apply_gate(jnp.stack([attended] * 2), gate)
    gates = [forms.op(CASE)(x, *arrays[1:])[-1] for x in stack]
    assert_same(got, jnp.stack([pallas_qk.apply_gate(attended, x) for x in gates]))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *gates)
    assert_same(pallas_qk.apply_gate(jnp.stack([attended] * 2), stacked), got)
    assert repr(stacked) == "Gate(bfloat16[2,6,128])"


SHARDED = {  # a mesh, then the axes of tokens and of heads
    "tokens": ({"data": 8}, "data", None),
    "heads": ({"model": 4}, None, "model"),
    "both": ({"data": 2, "model": 2}, "data", "model"),
}
ON_MESHES = dataclasses.replace(CASE, num_tokens=16, num_kv_heads=4, dtype="float32")


def specs_of(tokens, heads, split):
    """Of attended, q_gate, k, the weights, the table and the positions."""
    rows = P(tokens, heads, None) if split else P(tokens, heads)
    return (*[rows] * 3, P(), P(), P(), P(tokens))


@pytest.mark.usefixtures("on_the_host")
@pytest.mark.parametrize("layout", SHARDED)
@pytest.mark.parametrize("mode", ["auto", "explicit, set_mesh"])
@pytest.mark.parametrize("split", [False, True])
def test_meshes(layout, mode, split):
    """The bits of one device, without a collective but the sum of the weights' gradients."""
    axes, tokens, heads = SHARDED[layout]
    function, arrays, cotangents = block(ON_MESHES), arrays_of(ON_MESHES, split), cotangents_of(ON_MESHES, split)
    want = jax.jit(function)(*arrays), quick_jit(pulled_back(function, 5))(cotangents, *arrays)
    with mesh_of(axes, mode) as on:
        specs = specs_of(tokens, heads, split)
        arrays, cotangents = (
            [jax.device_put(x, NamedSharding(on, spec)) for x, spec in zip(xs, of, strict=True)]
            for xs, of in ((arrays, specs), (cotangents, [specs[0]] * 3))
        )
        got, found = compiled(function, arrays)
        assert found == []
        assert_same(got, want[0])
        got, found = compiled(pulled_back(function, 5), [tuple(cotangents), *arrays], quick_jit)
        assert_only_weight_sums(found, ON_MESHES.head_dim)
        assert_agree(got, want[1])
        for x, spec in zip(got, specs, strict=False):
            assert x.sharding.is_equivalent_to(NamedSharding(on, spec), x.ndim), x.sharding


@pytest.mark.usefixtures("on_the_host")
@pytest.mark.parametrize("mode", ["auto", "explicit, set_mesh"])
def test_attended_sharded_otherwise(mode):
    """Than the gate: on explicit axes each cotangent is as what it belongs to."""
    function, arrays, cotangents = block(ON_MESHES), arrays_of(ON_MESHES), cotangents_of(ON_MESHES)
    want = quick_jit(pulled_back(function, 5))(cotangents, *arrays)
    with mesh_of({"data": 2, "model": 2}, mode) as on:
        specs = (P("model"), *specs_of("data", None, split=False)[1:])
        arrays = [jax.device_put(x, NamedSharding(on, spec)) for x, spec in zip(arrays, specs, strict=True)]
        of_rows = [P("data"), P("data"), P("model")]
        cotangents = tuple(
            jax.device_put(x, NamedSharding(on, spec)) for x, spec in zip(cotangents, of_rows, strict=True)
        )
        got = quick_jit(pulled_back(function, 5))(cotangents, *arrays)
        assert_agree(got, want)
        for x, spec in zip(got, specs, strict=False):  # which is the compiler's choice in the other mode
            assert mode == "auto" or x.sharding.is_equivalent_to(NamedSharding(on, spec), x.ndim), x.sharding


@pytest.mark.usefixtures("on_the_host")
@pytest.mark.parametrize("mode", ["auto", "explicit, set_mesh"])
@pytest.mark.parametrize(
    "heads, got, remedy",
    [
        (True, "head_dim over 8 devices", "Shard the axis of heads instead, or leave it replicated there."),
        (
            False,
            "num_q_heads=4 over 8 devices",
            "Shard its last axis over a number of devices that divides 4, or leave it replicated there.",
        ),
    ],
)
def test_heads_of_attended_that_are_cut_are_refused(heads, got, remedy, mode):
    """Where the sharding is known, as by the op."""
    attended, *arrays = arrays_of(CASE, heads)
    gate = forms.op(CASE)(*arrays)[-1]
    message = f"attended must hold whole heads on each device, got {got}. {remedy}"
    with mesh_of({"model": 8}, mode) as on:
        cut = jax.device_put(attended, NamedSharding(on, P(*[None] * (attended.ndim - 1), "model")))
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            pallas_qk.apply_gate(cut, gate)


@pytest.mark.usefixtures("on_the_host")
@pytest.mark.parametrize("check_vma", [False, True])
def test_shard_map(check_vma):
    arrays, cotangents = arrays_of(ON_MESHES), cotangents_of(ON_MESHES)
    want = quick_jit(pulled_back(block(ON_MESHES), 5))(cotangents, *arrays)
    specs = specs_of("data", "model", split=False)
    mapped = jax.shard_map(
        block(ON_MESHES, num_q_heads=2, num_kv_heads=2),
        mesh=mesh(data=2, model=2),
        in_specs=specs,
        out_specs=(specs[0],) * 3,
        check_vma=check_vma,
    )
    got, found = compiled(pulled_back(mapped, 5), [cotangents, *arrays], quick_jit)
    assert_agree(got, want)
    assert all(x.startswith("all-reduce") for x in found)
    kept = jax.jit(mapped)(*arrays)
    assert_same(kept, jax.jit(block(ON_MESHES))(*arrays))


def test_a_mesh_of_gpus_holds_the_kernel():
    """Where the compiler partitions: the call of the partitioner alone, which JAX lowers on each device."""
    text = lowering.lowered_text(pulled_back(block(CASE, "mosaic_gpu"), 5), cotangents_of(CASE), *arrays_of(CASE))
    assert "pallas_qk_mosaic_gpu_gate_backward" in lowering.kernels(text)


def test_export():
    pytest.importorskip("flatbuffers", reason="jax.export writes with it and JAX does not depend on it")
    pull, arguments = pulled_back(block(CASE), 5), (cotangents_of(CASE), *arrays_of(CASE))
    exported = export.export(jax.jit(pull))(*arguments)
    assert_agree(export.deserialize(exported.serialize()).call(*arguments), jax.jit(pull)(*arguments))
    both = export.export(jax.jit(pulled_back(block(CASE, "mosaic_gpu"), 5)), platforms=["cuda"])(*arguments)
    assert "gate_backward" in str(both.mlir_module())


# Programs for a GPU


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", [*GPU_IMPLEMENTATIONS, "xla", None])
def test_the_programs_kernels(name, packed):
    """Mosaic GPU's has two backward kernels, of which the second updates what the first has written."""
    case = dataclasses.replace(CASE, packed=packed)
    text = lowering.lowered_text(
        pulled_back(block(case, name), num_differentiable(case)), cotangents_of(case), *arrays_of(case)
    )
    taken = name or FIRST
    mosaic = taken == "mosaic_gpu"
    assert ("pallas_qk_mosaic_gpu_gate_backward" in lowering.kernels(text)) == mosaic
    assert text.count("output_operand_alias<") == mosaic
    num_calls = len(re.findall(r"custom_call @(?:mosaic_gpu|__gpu\$xla)", text))
    assert num_calls == {"mosaic_gpu": 2, "triton": 2, "xla": 0}[taken]  # few rows need no sum on Mosaic GPU


def test_the_gates_kernel_writes_where_the_ops_backward_updates():
    inputs = forms.split_heads(CASE, forms.inputs_of(CASE, make_inputs(CASE)))
    cotangents = forms.split_heads(CASE, forms.as_outputs(CASE, forms.cotangents_of(CASE)))._replace(gate=inputs.q)
    from tests.mosaic_interpreter import emitted

    first, *_ = emitted(functools.partial(mosaic_backward, options=forms.options(CASE)), inputs, cotangents).kernels
    ((result, operand),) = first.updated.items()
    key, shape = first.inputs[operand]
    leaves = jax.tree.leaves((inputs, cotangents))
    assert leaves[key.index] is cotangents.gate and shape == first.outputs[result].shape == inputs.q.shape
    sources = [key.index for place, (key, _) in enumerate(first.inputs) if place != operand]
    assert all(leaves[index] is not cotangents.gate or leaves[index] is inputs.q for index in sources)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [37, 4096])
@pytest.mark.parametrize("form", ["q_gate and k", "packed"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_on_a_gpu(gpu, form, dtype, num_tokens):
    """The definition, the bits of the gate in place in all rows, and no copy of an array with an axis of tokens."""
    case = dataclasses.replace(Case(num_tokens, dtype=dtype, gate="handed_on"), **FORMS[form])
    if reason := _implementations.unsupported("mosaic_gpu", _rows.spec_of(*_spec_arguments(case)), cuda_target()):
        pytest.skip(reason)
    attended, *arrays = arrays_of(case)
    arrays[0] = jnp.asarray(hard(case, arrays[0]))
    cotangents, of = cotangents_of(case), num_differentiable(case)
    jax.block_until_ready(jnp.full((2**28,), jnp.nan, jnp.float32)).delete()  # what memory holds then
    function = jax.jit(pulled_back(block(case, "mosaic_gpu"), of)).lower(cotangents, attended, *arrays).compile()
    of_attended, of_q, *rest = function(cotangents, attended, *arrays)
    want = jax.jit(pulled_back(block(form_of(case, "in_place"), "mosaic_gpu"), of))(cotangents, attended, *arrays)
    *rows, q_weight, k_weight = rest
    assert_same(rows, want[2:-2])
    assert_agree([q_weight, k_weight], want[-2:])  # sums in another order, where the launch is another one
    assert_same(others(case, of_q), others(case, want[1]))
    gates = gate_lanes(case, arrays[0])
    product = jax.jit(block(case, "mosaic_gpu"))(attended, *arrays)[-1]
    check_defined(case, attended, gates, cotangents[-1], product, of_attended, gate_lanes(case, of_q))
    copied = re.findall(rf"= \w+\[{num_tokens},[\d,]+\]\S* copy\(", function.as_text())
    assert copied == [], copied


def _spec_arguments(case):
    inputs, _ = forms.types(form_of(case, "in_place"))
    return inputs, forms.options(case)


# The type and the errors


def test_a_gate_is_a_pytree_that_holds_the_array_twice():
    attended, *arrays = arrays_of(CASE)
    gate = forms.op(CASE)(*arrays)[-1]
    assert isinstance(gate, pallas_qk.Gate) and repr(gate) == "Gate(bfloat16[6,128])"
    assert_same(jax.tree.leaves(gate), [arrays[0]] * 2)
    again = jax.jit(lambda gate: gate)(gate)
    assert jax.tree.structure(again) == jax.tree.structure(gate)
    picked = jax.lax.cond(jnp.bool_(True), lambda g: g, lambda g: g, gate)
    assert_same(pallas_qk.apply_gate(attended, picked), pallas_qk.apply_gate(attended, gate))
    public = {name for name in dir(gate) if not name.startswith("_")}
    assert public == set()


@pytest.mark.parametrize(
    "operation",
    [lambda g: g * 2, lambda g: 2.0 + g, lambda g: jnp.ones(3) * g, jax.nn.sigmoid, jnp.asarray, lambda g: g[0]],
)
def test_a_gate_refuses_arithmetic(operation):
    gate = forms.op(CASE)(*arrays_of(CASE)[1:])[-1]
    with pytest.raises(TypeError):
        operation(gate)


FITTING = np.zeros((6, 64), jnp.bfloat16)


def bad(exception, message, attended=FITTING, gate=None):
    return pytest.param(exception, message, attended, gate, id=message[:60])


@pytest.mark.parametrize(
    "exception, message, attended, gate",
    [
        bad(
            TypeError,
            "gate must be the pallas_qk.Gate of a call with copy_gate='never', "
            f"got a {type(jnp.zeros(())).__module__}.ArrayImpl of shape (6, 64) and dtype bfloat16. "
            "Pass that, or multiply attended by jax.nn.sigmoid(gate).",
            gate=jnp.zeros((6, 64), jnp.bfloat16),
        ),
        bad(
            TypeError,
            "attended must have the dtype of the gate, bfloat16, got float32. Cast it with astype.",
            jnp.zeros((6, 64)),
        ),
        bad(
            TypeError,
            "attended must be a JAX or NumPy array, got [1.0] of type list. Convert it with jnp.asarray.",
            [1.0],
        ),
        bad(
            ValueError,
            "attended must have shape (6, 64) or (6, 4, 16), got (6, 32). "
            "Its sizes: those of the op's q_out; heads are one axis with the elements of each, or two.",
            jnp.zeros((6, 32), jnp.bfloat16),
        ),
    ],
)
def test_errors(exception, message, attended, gate):
    given = forms.op(CASE)(*arrays_of(CASE)[1:])[-1] if gate is None else gate
    with pytest.raises(exception, match=f"^{re.escape(message)}$"):
        pallas_qk.apply_gate(attended, given)


def test_functions_that_write_a_cache():
    """Hand the gate on too."""
    case = dataclasses.replace(CASE, packed=True)
    attended, qkv, *arrays = arrays_of(case)
    cache = tuple(jnp.zeros((2, 4, 2, 16), qkv.dtype) for _ in range(2))
    outputs = pallas_qk.fused_qkv_rmsnorm_rope_gate_cache(
        qkv, *arrays, cache, jnp.arange(6), case.eps, num_q_heads=4, copy_gate="never"
    )
    *_, want = block(case)(attended, qkv, *arrays)
    assert_same(pallas_qk.apply_gate(attended, outputs.gate), want)


CUT = {
    "no array": (lambda x: None, TypeError, "the array in gate must be a JAX or NumPy array, got None"),
    "a type": (jax.typeof, TypeError, "the array in gate must be a JAX or NumPy array, got "),
    "integers": (
        lambda x: x.astype(jnp.int32),
        TypeError,
        "the array in gate must be float16, bfloat16 or float32, got ",
    ),
    "one element": (lambda x: x[0, 0], ValueError, "the array in gate must have a last axis of "),
    "cut": (lambda x: x[:, :-2], ValueError, "the array in gate must have a last axis of "),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("how", CUT)
def test_a_gate_whose_array_was_changed_is_refused(how, packed):
    change, error, message = CUT[how]
    case = dataclasses.replace(CASE, packed=packed)
    attended, *arrays = arrays_of(case)
    gate = forms.op(case)(*arrays)[-1]
    changed = jax.tree.unflatten(jax.tree.structure(gate), map(change, jax.tree.leaves(gate)))
    with pytest.raises(error, match=message):
        pallas_qk.apply_gate(attended, changed)
