"""vmap over any argument, alone and with derivatives: the bits of one call after another, in one launch."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.cases import Case, Inputs, make_cotangents, make_inputs
from tests.compare import assert_same
from tests.forms import op
from tests.gradients import gradients
from tests.lowering import GPU_IMPLEMENTATIONS, kernels, lowered_text
from tests.run import primitives, quick_jit

CASE = Case(3, 2, 1, head_dim=8, rotary_dim=4, max_position=16)
MROPE = Case(3, 2, 1, head_dim=8, rotary_dim=6, max_position=16, mrope_section=(1, 1, 1), dtype="float32")
PAIRS = Case(3, 2, 1, head_dim=8, rotary_dim=4, max_position=16, rotation="pairs", round_norm=False)
NAMES = tuple(Inputs.__dataclass_fields__)
CONSTANTS = {"q_weight", "k_weight", "cos_sin_cache"}
SIZE = 3


@functools.cache
def one_call(case):
    """`gradients` of plain XLA, compiled once."""
    return quick_jit(gradients(op(case, "xla")))


def stacked(case, batched, axis=0):
    """The arguments with those that `batched` names stacked over SIZE seeds, and the arguments of each call."""
    calls = [make_inputs(case, seed) for seed in range(SIZE)]
    for name in set(NAMES) - set(batched):
        for call in calls[1:]:
            object.__setattr__(call, name, getattr(calls[0], name))
    for seed, call in enumerate(calls):
        if "cos_sin_cache" in batched:  # make_inputs gives every seed the same table
            object.__setattr__(call, "cos_sin_cache", jnp.asarray(np.roll(call.cos_sin_cache, seed, axis=0)))
    args = [
        jnp.asarray(np.stack([getattr(call, name) for call in calls], axis))
        if name in batched
        else getattr(calls[0], name)
        for name in NAMES
    ]
    return args, [list(call) for call in calls], [axis if name in batched else None for name in NAMES]


def assert_each(got, want):
    """`want` is a list of each call's outputs."""
    assert_same(got, [np.stack(outputs) for outputs in zip(*want, strict=True)])


# Activations alone in every way, constants alone in every way, and all without each; each combination compiles anew.
SUBSETS = [
    batched
    for n in range(1, 7)
    for batched in itertools.combinations(NAMES, n)
    if n >= 5 or CONSTANTS.issuperset(batched) or CONSTANTS.isdisjoint(batched)
]


def test_any_two_are_batched_together_apart_and_not_at_all():
    for pair in itertools.combinations(NAMES, 2):
        there = {tuple(name in batched for name in pair) for batched in SUBSETS}
        assert there == set(itertools.product((False, True), repeat=2))


@pytest.mark.parametrize("batched", SUBSETS, ids="+".join)
def test_every_combination(batched):
    args, calls, axes = stacked(CASE, batched)
    function = jax.vmap(op(CASE, "xla"), axes)
    got = function(*args)
    assert_each(got, [op(CASE, "xla")(*call) for call in calls])
    # Batched activations are one call of the op, without a loop; only batched weights or tables make one for each.
    names = primitives(function, *args)
    assert names.count("fused_qk_rmsnorm_rope_gate") == 1
    assert ("scan" in names) == bool(CONSTANTS & set(batched))


@pytest.mark.parametrize("batched", [("q_gate", "k", "positions"), ("k",), ("positions",), NAMES], ids="+".join)
@pytest.mark.parametrize("case", [CASE, MROPE, PAIRS], ids=lambda case: case.id)
def test_batch_axis_last_and_outputs_in_the_middle(case, batched):
    args, calls, axes = stacked(case, batched, axis=-1)
    got = jax.vmap(op(case), axes, out_axes=1)(*args)
    assert_each([jnp.moveaxis(x, 1, 0) for x in got], [op(case)(*call) for call in calls])


def test_vmap_of_vmap():
    args, calls, axes = stacked(MROPE, ("q_gate", "k", "positions"))
    twice = [args[0][None], args[1][None], *args[2:5], args[5][None]]
    twice = [jnp.concatenate([x, x[:, ::-1]]) if axis == 0 else x for x, axis in zip(twice, axes, strict=True)]
    got = jax.vmap(jax.vmap(op(MROPE), axes), axes)(*twice)
    want = [op(MROPE)(*call) for call in calls]
    assert_each([x[0] for x in got], want)
    assert_each([x[1, ::-1] for x in got], want)
    names = primitives(jax.vmap(jax.vmap(op(MROPE), axes), axes), *twice)
    assert names.count("fused_qk_rmsnorm_rope_gate") == 1 and "scan" not in names


GRADIENT_SUBSETS = [
    ("q_gate",),
    ("k",),
    ("positions",),
    ("q_gate", "k", "positions"),
    ("q_weight",),
    ("cos_sin_cache",),
    ("q_gate", "k_weight"),
    ("k", "cos_sin_cache", "positions"),
    NAMES,
]


@pytest.mark.parametrize(
    "batched, cotangents_batched",
    [*((batched, True) for batched in [(), *GRADIENT_SUBSETS]), (("k",), False), (("q_weight",), False)],
    ids=str,
)
def test_vmap_of_grad(batched, cotangents_batched):
    """Gradients of each call on its own: a weight's too."""
    args, calls, axes = stacked(MROPE, batched)
    cts = [make_cotangents(MROPE, seed if cotangents_batched else 0) for seed in range(SIZE)]
    stack = [jnp.stack(x) for x in zip(*cts, strict=True)] if cotangents_batched else list(cts[0])
    axes = axes + [0 if cotangents_batched else None] * 3
    function = quick_jit(jax.vmap(gradients(op(MROPE, "xla")), axes))
    got = function(*args, *stack)
    want = [one_call(MROPE)(*call, *ct) for call, ct in zip(calls, cts, strict=True)]
    for x, each in zip(got, zip(*want, strict=True), strict=True):
        np.testing.assert_allclose(x, jnp.stack(each), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batched", GRADIENT_SUBSETS, ids="+".join)
def test_grad_of_vmap(batched):
    """The gradient of an argument that is not batched is the sum over the batch."""
    args, calls, axes = stacked(MROPE, batched)
    cts = [make_cotangents(MROPE, seed) for seed in range(SIZE)]
    each = [one_call(MROPE)(*call, *ct) for call, ct in zip(calls, cts, strict=True)]
    got = quick_jit(gradients(jax.vmap(op(MROPE, "xla"), axes)))(*args, *map(jnp.stack, zip(*cts, strict=True)))
    for i, axis in enumerate(axes[:5]):
        want = jnp.stack([x[i] for x in each])
        np.testing.assert_allclose(got[i], want if axis == 0 else want.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batched", [("q_gate", "k", "positions"), ("q_weight",), NAMES], ids="+".join)
def test_vmap_of_forward_mode(batched):
    args, calls, axes = stacked(MROPE, batched)

    def moved(*args):
        tangents = tuple(jnp.cos(3 * x) for x in args[:5])
        return jax.jvp(lambda *floats: op(MROPE, "xla")(*floats, args[5]), args[:5], tangents)[1]

    got = quick_jit(jax.vmap(moved, axes))(*args)
    one = quick_jit(moved)
    for x, want in zip(got, zip(*(one(*call) for call in calls), strict=True), strict=True):
        np.testing.assert_allclose(x, jnp.stack(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_batched_activations_are_one_launch(name):
    """Forward, and forward with backward whichever of grad and vmap is outside."""
    args, _, axes = stacked(CASE, ("q_gate", "k", "positions"))
    cts = tuple(jnp.stack([x] * SIZE) for x in make_cotangents(CASE))

    def grad_of_vmap(args, cts):
        return gradients(jax.vmap(op(CASE, name), axes))(*args, *cts)[:4]

    def vmap_of_grad(args, cts):
        return jax.vmap(lambda *args: gradients(op(CASE, name))(*args)[:2], (*axes, 0, 0, 0))(*args, *cts)

    def calls(function, *args):
        text = lowered_text(function, *args)
        assert "stablehlo.while" not in text
        return kernels(text)

    assert len(calls(jax.vmap(op(CASE, name), axes), *args)) == 1
    for function in (grad_of_vmap, vmap_of_grad):
        found = calls(function, args, cts)
        assert found.count(f"pallas_qk_{name}_backward") == 1
        assert found.count(f"pallas_qk_{name}_forward") == 0  # nobody asks for the outputs
