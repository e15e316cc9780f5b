"""Gradients of the op by autodiff of its definition in float64, with the error that an implementation may make."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tests.cases import Case, Inputs, random_normal
from tests.definition import axes
from tests.run import quick_jit

NAMES = ("q_gate", "k", "q_weight", "k_weight", "cos_sin_cache")

# Unit roundoff and smallest normal number (smaller results may be flushed) or subnormal of each dtype.
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-126, "float32": 2.0**-126}


class Gradient(NamedTuple):
    """A float64 gradient and the bound on a correct implementation's error."""

    exact: np.ndarray
    bound: np.ndarray


def make_cotangents(case: Case, seed: int = 0) -> tuple[jax.Array, ...]:
    """Random cotangents of q_out, k_out and gate_out."""
    heads = (case.num_q_heads, case.num_kv_heads, case.num_q_heads)
    shapes = [(case.num_tokens, h * case.head_dim) for h in heads]
    return tuple(random_normal(shape, case.dtype, 3 * seed + 100 + i) for i, shape in enumerate(shapes))


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
            out = jnp.concatenate([y1 * cos - y2 * sin, y1 * sin + y2 * cos, rest], axis=-1)
            return out.reshape(case.num_tokens, -1)

        q_gate = q_gate.reshape(case.num_tokens, case.num_q_heads, 2 * d)
        k = k.reshape(case.num_tokens, case.num_kv_heads, d)
        gate = q_gate[..., d:].reshape(case.num_tokens, -1)
        return norm_and_rope(q_gate[..., :d], q_weight), norm_and_rope(k, k_weight), gate

    return op


def float64_inputs(inputs: Inputs) -> list[np.ndarray]:
    """q_gate, k, weights and table."""
    return [np.asarray(x).astype(np.float64) for x in list(inputs)[:5]]


def in_float64(function):
    """`function` of arrays, run by JAX in float64 and by no setting of the tests."""

    @functools.wraps(function)
    def run(*args):
        with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
            return jax.tree.map(np.asarray, quick_jit(function)(*jax.tree.map(jnp.asarray, args)))

    return run


def define_gradients(case: Case, inputs: Inputs, cotangents) -> list[Gradient]:
    """The gradients of q_gate, k, both weights and the table. Positions must lie inside the table."""
    cotangents = tuple(np.asarray(ct).astype(np.float64) for ct in cotangents)
    args = float64_inputs(inputs)
    op = float64_op(case, inputs.positions)
    exact = in_float64(lambda args, cotangents: jax.vjp(op, *args)[1](cotangents))(args, cotangents)
    bounds = _bounds(case, args, np.asarray(inputs.positions), cotangents)
    return [
        Gradient(x, bound + ROUNDOFF[str(dtype)] * (abs(x) + bound) + SMALLEST[str(dtype)])
        for x, bound, dtype in zip(exact, bounds, (x.dtype for x in list(inputs)[:5]), strict=True)
    ]


def _bounds(case: Case, args, positions, cotangents) -> list[np.ndarray]:
    """Bounds before the last rounding, in float32 roundoffs u of the sizes of terms, whatever cancels.

    A sum adds at most its number of terms in a row. 1 / rms: a sum over the row, mean and eps 3, halved by the root,
    and 4 for its approximation. dy: 3, the two products and their sum.
    """
    u, d, half = 2.0**-24, case.head_dim, case.rotary_dim // 2
    q_gate, k, q_weight, k_weight, cache = args
    rows = np.atleast_2d(positions).astype(np.int64)[axes(case)].T
    cos, sin = abs(cache[rows, np.arange(half)])[:, None], abs(cache[rows, half + np.arange(half)])[:, None]
    inv_rms_error = (d + 3) / 2 + 4
    table_size = np.zeros_like(cache)

    def of_rows(x, weight, dout):
        x, dout, weight = abs(x), abs(dout.reshape(x.shape)), abs(weight + case.norm_beta)
        inv_rms = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + case.eps)
        do1, do2, rest = dout[..., :half], dout[..., half : 2 * half], dout[..., 2 * half :]
        size = np.concatenate([do1 * cos + do2 * sin, do2 * cos + do1 * sin, rest], axis=-1) * inv_rms
        # dweight: dy, 1 / rms, 2 products and the sum over rows.
        dweight = (3 + inv_rms_error + 2 + x[..., 0].size) * u * np.sum(size * x, axis=(0, 1))
        # g = dy * w / rms: those and 2. dx = g - x / rms² * mean(g * x): g and a sum again, 1 / rms twice, 6 more.
        g_error, size = 3 + inv_rms_error + 2, size * weight
        along_x = x * inv_rms**2 * np.mean(size * x, axis=-1, keepdims=True)
        dx = (g_error * size + (g_error + d + 2 * inv_rms_error + 6) * along_x) * u
        y = x * inv_rms * weight
        y1, y2 = y[..., :half], y[..., half : 2 * half]
        np.add.at(table_size, (rows, np.arange(half)), np.sum(do1 * y1 + do2 * y2, axis=1))
        np.add.at(table_size, (rows, half + np.arange(half)), np.sum(do1 * y2 + do2 * y1, axis=1))
        return dx, dweight

    q_and_gate = q_gate.reshape(case.num_tokens, case.num_q_heads, 2, d)
    dq, dq_weight = of_rows(q_and_gate[:, :, 0], q_weight, cotangents[0])
    dk, dk_weight = of_rows(k.reshape(case.num_tokens, case.num_kv_heads, d), k_weight, cotangents[1])
    # The table's terms: y 1 / rms and 3, the product, and the sum over every row of q and k.
    num_rows = case.num_tokens * (case.num_q_heads + case.num_kv_heads)
    table = (inv_rms_error + 3 + 1 + 2 * num_rows) * u * table_size
    dq_gate = np.stack([dq, np.zeros_like(dq)], axis=2).reshape(q_gate.shape)
    # Products of two errors: under a hundredth.
    return [1.01 * bound for bound in (dq_gate, dk.reshape(k.shape), dq_weight, dk_weight, table)]


def assert_defined(got, want: list[Gradient], dtypes) -> None:
    for name, x, gradient, dtype in zip(NAMES, got, want, dtypes, strict=False):
        assert x.shape == gradient.exact.shape and x.dtype == dtype, (name, x.shape, x.dtype)
        error = np.abs(np.asarray(x).astype(np.float64) - gradient.exact)
        worst = np.unravel_index(np.argmax(error - gradient.bound), error.shape)
        assert (error <= gradient.bound).all(), f"{name}{worst}: error {error[worst]}, bound {gradient.bound[worst]}"


def assert_agree(got, want) -> None:
    """Two computations in float32 of the same gradients, rounded each.

    Their float32 values lie within 2^-18 of the largest element: some tens of roundoffs of sums whose terms cancel.
    A difference however small can then become one unit of the dtype, twice its roundoff.
    """
    for name, a, b in zip(NAMES, got, want, strict=False):
        assert a.shape == b.shape and a.dtype == b.dtype, (name, a.shape, b.shape, a.dtype, b.dtype)
        unit = 2 * ROUNDOFF[str(a.dtype)]
        a, b = np.asarray(a).astype(np.float64), np.asarray(b).astype(np.float64)
        excess = np.abs(a - b) - unit * np.abs(b) - 2.0**-18 * np.max(np.abs(b))
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        assert excess[worst] <= 0, f"{name}{worst} is {a[worst]}, want {b[worst]}"
