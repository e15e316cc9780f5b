"""First derivatives of the public op against float64, under jit, vmap, scan and remat."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_qk
from tests.cases import Case, Inputs, make_inputs
from tests.compare import compare_bits
from tests.run import has_gpu

CASES = [
    Case(5, 3, 1, head_dim=64, rotary_dim=16, dtype="float32"),
    Case(4, 2, 2, head_dim=32, rotary_dim=32, dtype="bfloat16", norm_beta=1.0),
    Case(6, 2, 1, head_dim=48, rotary_dim=12, dtype="float16", cache_dtype="float32", weight_dtype="float32"),
    Case(3, 4, 2, head_dim=64, rotary_dim=16, dtype="float32", mrope_section=(4, 2, 2)),
]
IMPLEMENTATIONS = pallas_qk.IMPLEMENTATIONS if has_gpu() else (None,)
NUM_DIFFERENTIATED = 5  # all but positions


def op(case: Case, implementation=None):
    return functools.partial(
        pallas_qk.fused_qk_rmsnorm_rope_gate, **case.static_arguments, implementation=implementation
    )


def float64_op(case: Case, q_gate, k, q_weight, k_weight, cache, positions):
    """The formula of the docstring in whatever dtype it gets, without roundings."""
    d, half = case.head_dim, case.rotary_dim // 2
    rows = cache[positions]  # (T, R) or (3, T, R)
    if case.mrope_section is not None:
        axis = [j % 3 if j < 3 * case.mrope_section[j % 3] else 0 for j in range(half)] * 2
        rows = jnp.stack([rows[a, :, lane] for lane, a in enumerate(axis)], axis=-1)
    cos, sin = rows[:, None, :half], rows[:, None, half:]

    def norm_and_rope(x, weight):
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + case.eps)
        y = x * (weight + case.norm_beta)[None, None]
        y1, y2 = y[..., :half], y[..., half : 2 * half]
        return jnp.concatenate([y1 * cos - y2 * sin, y1 * sin + y2 * cos, y[..., 2 * half :]], axis=-1)

    q_gate = q_gate.reshape(case.num_tokens, case.num_q_heads, 2, d)
    k = k.reshape(case.num_tokens, case.num_kv_heads, d)
    outputs = norm_and_rope(q_gate[:, :, 0], q_weight), norm_and_rope(k, k_weight), q_gate[:, :, 1]
    return tuple(x.reshape(case.num_tokens, x.shape[1] * d) for x in outputs)


def random_like(arrays, seed: int = 3):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(x.shape), x.dtype) for x in arrays]


def exact(case: Case, inputs: Inputs, cotangents):
    """float64 gradients of the five differentiable inputs."""
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x).astype(np.float64)) for x in list(inputs)[:NUM_DIFFERENTIATED]]
        positions = jnp.asarray(np.asarray(inputs.positions))
        _, transpose = jax.vjp(lambda *args: float64_op(case, *args, positions), *wide)
        return [
            np.asarray(g) for g in transpose(tuple(jnp.asarray(np.asarray(c).astype(np.float64)) for c in cotangents))
        ]


def assert_close(case: Case, got, want):
    """Each gradient within a few roundings of its dtype, in the norm of the array: rounding counts as the identity."""
    for g, w in zip(got, want, strict=True):
        error = np.linalg.norm(np.asarray(g).astype(np.float64) - w) / np.linalg.norm(w)
        # float32 code sums up to 6 * 4 rows and rounds once per step; the 16-bit round trip of y does not enter.
        assert error <= max(2 * float(jnp.finfo(g.dtype).eps), 40 * 2.0**-24), error


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gradients_equal_float64_autodiff(case, implementation):
    inputs = make_inputs(case)
    arrays = list(inputs)
    f = op(case, implementation)
    outputs, transpose = jax.vjp(lambda *args: f(*args, inputs.positions), *arrays[:NUM_DIFFERENTIATED])
    cotangents = random_like(outputs)
    got = transpose(tuple(cotangents))
    assert [(g.shape, g.dtype) for g in got] == [(x.shape, x.dtype) for x in arrays[:NUM_DIFFERENTIATED]]
    assert_close(case, got, exact(case, inputs, cotangents))


def test_forward_mode_is_the_transpose_of_reverse_mode():
    case = CASES[0]
    inputs = make_inputs(case)
    primals = list(inputs)[:NUM_DIFFERENTIATED]
    f = functools.partial(lambda *args: op(case)(*args, inputs.positions))
    tangents = random_like(primals, 1)
    outputs, moved = jax.jvp(f, primals, tangents)
    linear = jax.linearize(f, *primals)[1](*tangents)
    cotangents = random_like(outputs, 2)
    gradients = jax.vjp(f, *primals)[1](tuple(cotangents))
    left = sum(float(jnp.vdot(a, b)) for a, b in zip(moved, cotangents, strict=True))
    right = sum(float(jnp.vdot(a, b)) for a, b in zip(tangents, gradients, strict=True))
    np.testing.assert_allclose(left, right, rtol=1e-4)
    for a, b in zip(linear, moved, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def loss(case, implementation, *args):
    return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in op(case, implementation)(*args))


def test_gradients_inside_jit_scan_and_remat_are_the_eager_ones():
    case = CASES[0]
    inputs = make_inputs(case)
    f = functools.partial(loss, case, None)
    want = jax.grad(f)(*inputs)
    for wrapped in (jax.jit(jax.grad(f)), jax.grad(jax.checkpoint(f)), jax.jit(jax.grad(jax.checkpoint(f)))):
        assert compare_bits("dq_gate", wrapped(*inputs), want).differing == 0

    def scanned(q_gate):
        return jax.lax.scan(lambda total, x: (total + f(x, *list(inputs)[1:]), None), 0.0, q_gate[None])[0]

    np.testing.assert_allclose(jax.grad(scanned)(inputs.q_gate), want, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("batched", [(0,), (0, 1), (0, 1, 5), (2,), (4,), (5,), (0, 1, 2, 3, 4, 5)])
def test_vmap_gives_what_a_loop_gives(batched):
    case = CASES[0]
    examples = [make_inputs(case, seed) for seed in range(3)]
    columns = [list(column) for column in zip(*examples, strict=True)]
    args = [jnp.stack(column) if place in batched else column[0] for place, column in enumerate(columns)]
    axes = [0 if place in batched else None for place in range(6)]
    got = jax.vmap(op(case), in_axes=axes)(*args)
    gradients = jax.vmap(jax.grad(functools.partial(loss, case, None), argnums=(0, 1)), in_axes=axes)(*args)
    for example in range(3):
        one = [arg[example] if axis == 0 else arg for arg, axis in zip(args, axes, strict=True)]
        for a, b in zip(got, op(case)(*one), strict=True):
            assert compare_bits("output", a[example], b).differing == 0
        for a, b in zip(gradients, jax.grad(functools.partial(loss, case, None), argnums=(0, 1))(*one), strict=True):
            np.testing.assert_allclose(a[example], b, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_gradients_have_equal_bits_on_every_rerun(gpu, implementation):
    case = Case(4096)
    inputs = make_inputs(case)
    gradient = jax.jit(jax.grad(functools.partial(loss, case, implementation), argnums=(0, 1, 2, 3)))
    first = gradient(*inputs)
    for _ in range(10):
        for a, b in zip(gradient(*inputs), first, strict=True):
            if a.ndim == 1:
                a, b = a[None], b[None]
            assert compare_bits("gradient", a, b).differing == 0
