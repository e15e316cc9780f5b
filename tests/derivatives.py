"""Derivatives of every mode and order: of a function, and of the op's definition in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.cases import Case
from tests.definition import axes
from tests.run import quick_jit

DIFFERENTIABLE = (0, 1, 2, 3, 4)  # everything but positions


def float64_op(case: Case, positions):
    """The op's definition as a function of q_gate, k, weights and table: no rounding, for JAX to differentiate."""
    half, d = case.rotary_dim // 2, case.head_dim
    rows = np.atleast_2d(np.asarray(positions)).astype(np.int64)[axes(case)].T  # (T, R/2)

    def op(q_gate, k, q_weight, k_weight, cache):
        cos, sin = cache[rows, np.arange(half)][:, None], cache[rows, half + np.arange(half)][:, None]

        def norm_and_rope(x, weight):
            rms = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + case.eps)
            y = x / rms * (weight + case.norm_beta)[None, None]
            y1, y2, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
            if case.rotation == "pairs":
                y1, y2 = y[..., 0 : 2 * half : 2], y[..., 1 : 2 * half : 2]
            rotated = jnp.stack([y1 * cos - y2 * sin, y1 * sin + y2 * cos], -1 if case.rotation == "pairs" else -2)
            out = jnp.concatenate([rotated.reshape(*y.shape[:-1], 2 * half), rest], axis=-1)
            return out.reshape(case.num_tokens, -1)

        q_gate = q_gate.reshape(case.num_tokens, case.num_q_heads, 2 * d)
        k = k.reshape(case.num_tokens, case.num_kv_heads, d)
        gate = q_gate[..., d:].reshape(case.num_tokens, -1)
        return norm_and_rope(q_gate[..., :d], q_weight), norm_and_rope(k, k_weight), gate

    return op


def in_float64(function):
    """`function` of arrays, run by JAX in float64 and by no setting of the tests."""

    @functools.wraps(function)
    def run(*args):
        with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
            return jax.tree.map(np.asarray, quick_jit(function)(*jax.tree.map(jnp.asarray, args)))

    return run


def relative(got, want):
    """The largest error of each array, relative to its largest element."""
    errors = []
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a).astype(np.float64), np.asarray(b)
        assert a.shape == b.shape, (a.shape, b.shape)
        errors.append(np.max(np.abs(a - b)) / max(np.max(np.abs(b)), 1e-3))
    return max(errors)


def scalar(function):
    """A function whose derivatives of every order are full."""
    return lambda *args: sum(jnp.sum(jnp.sin(out * (i + 1))) for i, out in enumerate(function(*args)))


def second_gradient(function):
    first = jax.grad(scalar(function), DIFFERENTIABLE)
    return jax.grad(lambda *args: sum(jnp.sum(jnp.sin(g)) for g in first(*args)), DIFFERENTIABLE)


def along(args):
    """Tangents for each argument."""
    return tuple(jnp.cos(3 * x + 1) for x in args)


TRANSFORMS = {
    "jvp": lambda f: lambda *args: jax.jvp(f, args, along(args))[1],
    "linearize": lambda f: lambda *args: jax.linearize(f, *args)[1](*along(args)),
    "jvp of jvp": lambda f: lambda *args: jax.jvp(lambda *a: jax.jvp(f, a, along(a))[1], args, along(args))[1],
    "grad of grad": second_gradient,
    "jvp of grad": lambda f: lambda *args: jax.jvp(jax.grad(scalar(f), DIFFERENTIABLE), args, along(args))[1],
    "grad of jvp": lambda f: jax.grad(scalar(lambda *args: jax.jvp(f, args, along(args))[1]), DIFFERENTIABLE),
    "jacfwd": lambda f: jax.jacfwd(f, (2, 4)),
    "jacrev": lambda f: jax.jacrev(f, (2, 4)),
    "hessian": lambda f: jax.hessian(scalar(f), (2, 3)),
    "linear_transpose": lambda f: lambda *args: jax.linear_transpose(jax.linearize(f, *args)[1], *args)(f(*args)),
}
