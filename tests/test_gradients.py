"""Derivatives of the public op: against float64 and torch, in every mode, and what they cost."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_qk
from pallas_qk import _implementations
from tests.cases import SMALL_CASES, Case, make_cotangents, make_inputs
from tests.compare import assert_same
from tests.derivatives import DIFFERENTIABLE, TRANSFORMS, float64_op, in_float64, relative, scalar
from tests.forms import op
from tests.gradients import assert_defined, define_gradients, float64_inputs, gradients
from tests.run import has_gpu, primitives, quick_jit
from tests.tolerances import ROUNDOFF

TINY = Case(5, 3, 2, head_dim=16, rotary_dim=8, dtype="float32", max_position=32)


@pytest.fixture(params=pallas_qk.IMPLEMENTATIONS if has_gpu() else ["xla"])
def implementation(request) -> str:
    """What runs here through the public op; on a CPU the kernels have their own tests."""
    return request.param


def of_floats(case, inputs, implementation=None):
    """The op as a function of its differentiable arguments, and those."""
    *args, positions = inputs
    return (lambda *args: op(case, implementation)(*args, positions)), tuple(args)


@pytest.mark.parametrize(
    "case",
    [
        *SMALL_CASES,
        Case(2, 1, 2, head_dim=96, rotary_dim=40, mrope_section=(8, 6, 6), norm_beta=1.0),
        Case(2, 1, 2, head_dim=80, rotary_dim=40, mrope_section=(8, 6, 6), norm_beta=1.0),
    ],
    ids=lambda case: case.id,
)
def test_the_formulas_are_the_derivatives_of_the_op(case):
    """As it is defined, by JAX, in float64; on the host, as the formulas are."""
    inputs, cotangents = make_inputs(case, seed=1), make_cotangents(case)
    function = gradients(float64_op(case, inputs.positions), arguments=5)
    with jax.default_device(jax.devices("cpu")[0]):
        args = [*float64_inputs(inputs), *(np.asarray(x).astype(np.float64) for x in cotangents)]
        want = in_float64(function)(*args)
    for gradient, autodiff in zip(define_gradients(case, inputs, cotangents), want, strict=True):
        assert gradient.exact.dtype == autodiff.dtype == np.float64
        np.testing.assert_allclose(gradient.exact, autodiff, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.id)
def test_equal_float64_autodiff(implementation, case):
    inputs, cotangents = make_inputs(case, seed=1), make_cotangents(case)
    got = quick_jit(gradients(op(case, implementation)))(*inputs, *cotangents)
    assert_defined(got, define_gradients(case, inputs, cotangents))
    shape = (case.num_tokens, case.num_q_heads, 2, case.head_dim)
    gate = got[0].reshape(shape)[:, :, 1].reshape(cotangents[2].shape)
    assert_same(gate, cotangents[2])


@pytest.mark.parametrize(
    "case",
    [
        Case(5, 3, 2, head_dim=32, rotary_dim=8),
        Case(4, 2, 3, head_dim=24, rotary_dim=24, dtype="float16", mrope_section=(5, 4, 3), norm_beta=1.0),
        Case(6, 1, 1, head_dim=64, rotary_dim=16, dtype="float32"),
    ],
    ids=lambda case: case.id,
)
def test_equal_torch_autograd(case):
    torch = pytest.importorskip("torch", reason="the torch reference")
    from torch_ref import reference

    inputs, cotangents = make_inputs(case), make_cotangents(case)
    args = [torch.tensor(x, requires_grad=True) for x in float64_inputs(inputs)]
    outputs = reference.fused_qk_rmsnorm_rope_gate(
        *args, torch.tensor(np.asarray(inputs.positions)), **case.static_arguments
    )
    torch.autograd.backward(outputs, [torch.tensor(np.asarray(ct).astype(np.float64)) for ct in cotangents])
    want = define_gradients(case, inputs, cotangents)
    want = [gradient._replace(exact=x.grad.numpy()) for gradient, x in zip(want, args, strict=True)]
    assert_defined(quick_jit(gradients(op(case)))(*inputs, *cotangents), want)


@pytest.mark.parametrize("weight", [0.0, -0.0])
def test_a_weight_of_zero_has_a_gradient(weight):
    case = dataclasses.replace(TINY, num_tokens=3)
    inputs = make_inputs(case)
    zeros = jnp.full((case.head_dim,), weight)
    inputs = dataclasses.replace(inputs, q_weight=zeros, k_weight=zeros)
    cotangents = make_cotangents(case)
    want = define_gradients(case, inputs, cotangents)
    assert np.abs(want[2].exact).min() > 1e-3
    assert_defined(quick_jit(gradients(op(case)))(*inputs, *cotangents), want)
    function, args = of_floats(case, inputs)
    tangents = [jnp.ones_like(x) if i in (2, 3) else jnp.zeros_like(x) for i, x in enumerate(args)]
    _, moved = jax.jvp(function, args, tuple(tangents))
    assert np.abs(np.asarray(moved[0])).max() > 0.1


MROPE = dataclasses.replace(TINY, mrope_section=(2, 1, 1), norm_beta=1.0)
PAIRS = dataclasses.replace(TINY, rotation="pairs", round_norm=False)


@pytest.mark.parametrize(
    "case, name",
    [
        *((TINY, name) for name in TRANSFORMS),
        # The others are made of these.
        *(
            (case, name)
            for case in (MROPE, PAIRS)
            for name in ("jvp", "linear_transpose", "grad of grad", "jvp of grad")
        ),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else value,
)
def test_every_mode_and_order(implementation, case, name):
    """float32 against the same derivatives of the definition in float64.

    2^-14: first derivatives come within 2^-22 of the largest element, each further one multiplies it by sums of D.
    """
    inputs = make_inputs(case)
    function, args = of_floats(case, inputs, implementation)
    got = quick_jit(TRANSFORMS[name](function))(*args)
    want = in_float64(TRANSFORMS[name](float64_op(case, inputs.positions)))(*float64_inputs(inputs))
    assert relative(got, want) < 2.0**-14


@pytest.mark.parametrize("changes", [{}, {"rotation": "pairs", "round_norm": False}], ids=str)
def test_forward_mode_in_16_bits(changes):
    case = dataclasses.replace(TINY, dtype="bfloat16", **changes)
    inputs = make_inputs(case)
    function, args = of_floats(case, inputs)
    outputs, got = jax.jvp(function, args, args)
    assert [x.dtype for x in got] == [x.dtype for x in outputs] == [jnp.bfloat16] * 3
    exact = float64_inputs(inputs)
    want = in_float64(lambda *args: jax.jvp(float64_op(case, inputs.positions), args, args)[1])(*exact)
    assert relative(got, want) < ROUNDOFF["bfloat16"]


def test_positions_have_no_gradient():
    inputs = make_inputs(TINY)
    got = jax.grad(lambda *args: jnp.sum(op(TINY)(*args)[0]), argnums=5, allow_int=True)(*inputs)
    assert got.dtype == jax.dtypes.float0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weight_gradients_are_summed_in_float32_and_rounded_once(dtype):
    case = Case(37, 4, 2, head_dim=32, rotary_dim=8, dtype=dtype)
    inputs, cotangents = make_inputs(case), make_cotangents(case)
    wide = dataclasses.replace(
        inputs, q_weight=inputs.q_weight.astype(jnp.float32), k_weight=inputs.k_weight.astype(jnp.float32)
    )
    got, want = (jax.jit(gradients(op(case)))(*x, *cotangents)[2:4] for x in (inputs, wide))
    assert [x.dtype for x in want] == [jnp.float32] * 2
    assert_same(got, [x.astype(dtype) for x in want])


def test_ten_runs_give_the_same_bits(implementation):
    case = Case(1024 if has_gpu() else 64, 4, 2, mrope_section=(11, 11, 10))
    args = *make_inputs(case), *make_cotangents(case)
    run = jax.jit(gradients(op(case, implementation)))
    first = run(*args)[:4]
    for _ in range(9):
        assert_same(run(*args)[:4], first)


def test_no_tokens_give_zeros(implementation):
    case = dataclasses.replace(TINY, num_tokens=0)
    inputs = make_inputs(case)
    got = quick_jit(gradients(op(case, implementation)))(*inputs, *make_cotangents(case))
    for x, like in zip(got, inputs, strict=False):
        assert x.shape == like.shape and x.dtype == like.dtype and not np.asarray(x).any()


OUTSIDE = {"padding": -1, "just past": TINY.max_position, "far past": 2**30}


def masked(function, where):
    """The outputs of the tokens marked, and zeros for the others: what a loss makes of padding."""
    return lambda *args: [jnp.where(jnp.asarray(where)[:, None], x, 0) for x in function(*args)]


@pytest.mark.parametrize(
    "name, mrope", [*((name, False) for name in ("grad", *TRANSFORMS)), ("grad", True), ("jvp of grad", True)]
)
def test_a_masked_token_outside_the_table_adds_nothing(implementation, name, mrope):
    """Derivatives of every mode and order are those of the token at position 0, bit for bit."""
    case = dataclasses.replace(TINY, mrope_section=(2, 1, 1) if mrope else None)
    derivative = TRANSFORMS.get(name) or (lambda f: jax.grad(scalar(f), DIFFERENTIABLE))
    inputs = make_inputs(case)
    # Rows of the table that no two tokens share: a GPU adds up the others in no fixed order.
    distinct = jnp.broadcast_to(jnp.arange(1, 1 + case.num_tokens), inputs.positions.shape)
    inputs = dataclasses.replace(inputs, positions=distinct)

    @quick_jit
    def run(positions, args):
        function, _ = of_floats(case, dataclasses.replace(inputs, positions=positions), implementation)
        return derivative(masked(function, np.arange(case.num_tokens) != 2))(*args)

    def at(position):
        positions = inputs.positions.at[..., 2].set(position)
        return jax.tree.leaves(run(positions, list(inputs)[:5]))

    want = [np.asarray(x) for x in at(0)]
    assert all(np.isfinite(x).all() for x in want)
    for position in OUTSIDE.values():
        for a, b in zip(at(position), want, strict=True):
            np.testing.assert_array_equal(np.asarray(a), b)


@pytest.mark.parametrize("position", OUTSIDE.values(), ids=OUTSIDE)
def test_derivatives_read_row_0_outside_the_table(implementation, position):
    """With tangents and cotangents at the token itself. The table's derivative sees no position past it."""
    inputs, cotangents = make_inputs(TINY), make_cotangents(TINY)
    outside, first = (dataclasses.replace(inputs, positions=inputs.positions.at[2].set(x)) for x in (position, 0))
    run = jax.jit(gradients(op(TINY, implementation)))
    got, want = (run(*x, *cotangents) for x in (outside, first))
    assert_same(got[:4], want[:4])
    without = run(*first, *(x.at[2].set(0) for x in cotangents))
    assert np.abs(want[4] - without[4])[0].max() > 0.1
    np.testing.assert_allclose(got[4], want[4] if position < 0 else without[4], rtol=1e-6, atol=1e-6)

    def tangents_of(inputs, moving):
        function, args = of_floats(TINY, inputs, implementation)
        along = [jnp.cos(3 * x + 1) if i in moving else jnp.zeros_like(x) for i, x in enumerate(args)]
        return [np.asarray(x) for x in quick_jit(lambda *args: jax.jvp(function, args, tuple(along))[1])(*args)]

    for a, b in zip(tangents_of(outside, (0, 1, 2, 3)), tangents_of(first, (0, 1, 2, 3)), strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(tangents_of(outside, (4,))[:2], tangents_of(first, (4,))[:2], strict=True):
        np.testing.assert_array_equal(a[2], b[2] if position < 0 else np.zeros_like(b[2]))


def backward_text(argnums, case=TINY):
    inputs = make_inputs(case)
    function, args = of_floats(case, inputs, "xla")
    return jax.jit(jax.grad(scalar(function), argnums)).lower(*args).compile().as_text()


def test_the_table_gradient_costs_nothing_when_unused():
    assert "scatter" in backward_text(DIFFERENTIABLE)
    assert "scatter" not in backward_text((0, 1, 2, 3))


@pytest.mark.parametrize("argnums", [(0,), (1, 2), (0, 1, 2, 3), (4,), DIFFERENTIABLE], ids=str)
def test_one_forward_and_one_backward(argnums):
    function, args = of_floats(TINY, make_inputs(TINY))
    names = primitives(jax.grad(scalar(function), argnums), *args)
    ours = sorted(name for name in names if name.startswith("fused_qk"))
    assert ours == ["fused_qk_rmsnorm_rope_gate", "fused_qk_rmsnorm_rope_gate_backward"]


def test_residuals_are_the_inputs():
    """What `jax.vjp` keeps: nothing that the layer doesn't hold anyway."""
    inputs = make_inputs(TINY)
    function, args = of_floats(TINY, inputs)
    _, pullback = jax.vjp(function, *args)
    kept = [x for x in jax.tree.leaves(pullback) if isinstance(x, jax.Array)]
    assert kept
    held = {x.unsafe_buffer_pointer() for x in inputs}
    sizes = sorted(x.size for x in kept if x.unsafe_buffer_pointer() not in held)
    assert all(size == TINY.num_tokens for size in sizes)  # positions with an axis for their rows


def test_modules_share_one_backward():
    modules = [_implementations.module(name) for name in pallas_qk.IMPLEMENTATIONS]
    want = list(inspect.signature(modules[-1].backward).parameters)
    for module in modules:
        assert list(inspect.signature(module.backward).parameters)[: len(want)] == want


def test_tangents_of_many_rows_are_those_of_few():
    """From 4096 rows on the CPU's compiler of JAX 0.12 fuses reductions otherwise."""
    case = Case(1024, 4, 1, 64, 16, dtype="float32", max_position=64)
    q_gate, *rest, positions = make_inputs(case)

    @jax.jit
    def tangents(q_gate, k, positions, moving):
        return jax.jvp(lambda q_gate: op(case, "xla")(q_gate, k, *rest[1:], positions)[0], (q_gate,), (moving,))[1]

    args = (q_gate, rest[0], positions, jnp.cos(q_gate))
    want = jnp.concatenate([tangents(*(x[i : i + 512] for x in args)) for i in range(0, case.num_tokens, 512)])
    np.testing.assert_allclose(tangents(*args), want, rtol=0, atol=2e-6 * float(jnp.abs(want).max()))
