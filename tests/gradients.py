"""The gradients of the op by their formulas in float64 NumPy, with the error that an implementation may make.

`tests/test_gradients.py` shows that the formulas are the derivatives of the op as it is defined.
"""

from typing import NamedTuple

import jax
import numpy as np

from tests.cases import Case, Inputs
from tests.compare import assert_within
from tests.definition import axes, lanes_in_halves
from tests.tolerances import ROUNDOFF, SMALLEST

NAMES = ("q_gate", "k", "q_weight", "k_weight", "cos_sin_cache")


def outputs_and_gradients(function, of: int = 5, arguments: int = 6):
    """What `function` returns and the gradients of its first arguments, from its arguments and then the cotangents."""

    def run(*args):
        first, rest, cotangents = args[:of], args[of:arguments], args[arguments:]
        outputs, transpose = jax.vjp(lambda *first: tuple(function(*first, *rest)), *first)
        return outputs, transpose(cotangents)

    return run


def gradients(function, of: int = 5, arguments: int = 6):
    """The gradients of the first arguments, as a function of all of them and the cotangents."""
    both = outputs_and_gradients(function, of, arguments)
    return lambda *args: both(*args)[1]


class Gradient(NamedTuple):
    """A float64 gradient, the bound on a correct implementation's error, and the dtype of its result."""

    exact: np.ndarray
    bound: np.ndarray
    dtype: np.dtype


def float64_inputs(inputs: Inputs) -> list[np.ndarray]:
    """q_gate, k, weights and table."""
    return [np.asarray(x).astype(np.float64) for x in list(inputs)[:5]]


def define_gradients(case: Case, inputs: Inputs, cotangents, *, round_dweights: bool = True) -> list[Gradient]:
    """The gradients of q_gate, k, both weights and the table. Positions must lie inside the table.

    The weights' are sums in float32, rounded to the weights' dtypes or not. Bounds before the last rounding count
    float32 roundoffs u of the sizes of terms, whatever cancels. A sum of n terms adds at most n - 1 times in a row.
    1 / rms: a sum over the row, mean and eps 3, halved by the root, and 4 for its approximation. dy: 3, the two
    products and their sum.
    """
    u, d, half = ROUNDOFF["float32"], case.head_dim, case.rotary_dim // 2
    q_gate, k, q_weight, k_weight, cache = float64_inputs(inputs)
    dq_out, dk_out, dgate = (np.asarray(ct).astype(np.float64) for ct in cotangents)
    rows = np.atleast_2d(np.asarray(inputs.positions)).astype(np.int64)[axes(case)].T
    cos, sin = cache[rows, np.arange(half)][:, None], cache[rows, half + np.arange(half)][:, None]
    inv_rms_error = (d + 3) / 2 + 4
    dtable, table_size = np.zeros_like(cache), np.zeros_like(cache)
    lanes = lanes_in_halves(case)
    places = np.argsort(lanes)

    def of_rows(x, weight, dout):
        """dx and its bound, dweight and its bound; the table's terms are added to its own."""
        # In halves: the norm doesn't ask where its lanes lie.
        x, dout, weight = x[..., lanes], dout.reshape(x.shape)[..., lanes], weight[lanes] + case.norm_beta
        do1, do2, rest = dout[..., :half], dout[..., half : 2 * half], dout[..., 2 * half :]
        inv_rms = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + case.eps)
        dy = np.concatenate([do1 * cos + do2 * sin, do2 * cos - do1 * sin, rest], axis=-1) * inv_rms
        size1, size2 = abs(do1 * cos) + abs(do2 * sin), abs(do2 * cos) + abs(do1 * sin)
        size = np.concatenate([size1, size2, abs(rest)], axis=-1) * inv_rms
        # dweight: dy, 1 / rms, 2 products and the sum over rows.
        dweight = np.sum(dy * x, axis=(0, 1))
        dweight_bound = (3 + inv_rms_error + 2 + x[..., 0].size - 1) * u * np.sum(size * abs(x), axis=(0, 1))
        # g = dy * w / rms: those and 2. dx = g - x / rms² * mean(g * x): g and a sum again, 1 / rms twice, 6 more.
        g, g_size, g_error = dy * weight, size * abs(weight), 3 + inv_rms_error + 2
        dx = g - x * inv_rms**2 * np.mean(g * x, axis=-1, keepdims=True)
        along_x = abs(x) * inv_rms**2 * np.mean(g_size * abs(x), axis=-1, keepdims=True)
        dx_bound = (g_error * g_size + (g_error + d + 2 * inv_rms_error + 6) * along_x) * u
        y = x * inv_rms * weight
        terms = do1 * y[..., :half], do2 * y[..., half : 2 * half], do2 * y[..., :half], do1 * y[..., half : 2 * half]
        for place, a, b in ((0, terms[0], terms[1]), (half, terms[2], -terms[3])):
            np.add.at(dtable, (rows, place + np.arange(half)), np.sum(a + b, axis=1))
            np.add.at(table_size, (rows, place + np.arange(half)), np.sum(abs(a) + abs(b), axis=1))
        return dx[..., places], dx_bound[..., places], dweight[places], dweight_bound[places]

    # Products of two errors: under a hundredth.
    def rounded(exact, bound, dtype) -> Gradient:
        rounding = ROUNDOFF[str(dtype)] * (abs(exact) + bound) + SMALLEST[str(dtype)]
        return Gradient(exact, 1.01 * bound + rounding, dtype)

    def summed(exact, bound, dtype) -> Gradient:
        if round_dweights and dtype != np.float32:
            return rounded(exact, bound, dtype)
        return Gradient(exact, 1.01 * bound + SMALLEST["float32"], np.dtype(np.float32))

    q_and_gate = q_gate.reshape(case.num_tokens, case.num_q_heads, 2, d)
    dq, dq_bound, *dq_weight = of_rows(q_and_gate[:, :, 0], q_weight, dq_out)
    dk, dk_bound, *dk_weight = of_rows(k.reshape(case.num_tokens, case.num_kv_heads, d), k_weight, dk_out)
    dq = rounded(dq, dq_bound, inputs.q_gate.dtype)
    gate_and_bound = dgate.reshape(dq.exact.shape), np.zeros_like(dq.exact)  # a copy
    dq_gate = (np.stack(pair, axis=2).reshape(q_gate.shape) for pair in zip(dq[:2], gate_and_bound, strict=True))
    # The table's terms: y 1 / rms and 3, the product, and the sum over every row of q and k.
    num_rows = case.num_tokens * (case.num_q_heads + case.num_kv_heads)
    table_bound = (inv_rms_error + 3 + 1 + 2 * num_rows) * u * table_size
    return [
        Gradient(*dq_gate, dq.dtype),
        rounded(dk.reshape(k.shape), dk_bound.reshape(k.shape), inputs.k.dtype),
        summed(*dq_weight, inputs.q_weight.dtype),
        summed(*dk_weight, inputs.k_weight.dtype),
        rounded(dtable, table_bound, inputs.cos_sin_cache.dtype),
    ]


def assert_defined(got, want: list[Gradient]) -> None:
    for name, x, gradient in zip(NAMES[: len(want)], got, want, strict=True):
        assert x.dtype == gradient.dtype, (name, x.dtype, gradient.dtype)
        assert_within(name, x, gradient.exact, gradient.bound)


def assert_agree(got, want) -> None:
    """Two computations in float32 of the same gradients, rounded each.

    Their float32 values lie within 2^-18 of the largest element: some tens of roundoffs of sums whose terms cancel.
    A difference however small can then become one unit of the dtype, twice its roundoff.
    """
    for place, (a, b) in enumerate(zip(got, want, strict=True)):
        assert a.dtype == b.dtype, (place, a.dtype, b.dtype)
        unit, exact = 2 * ROUNDOFF[str(a.dtype)], np.asarray(b).astype(np.float64)
        assert_within(f"result[{place}]", a, exact, unit * np.abs(exact) + 2.0**-18 * np.max(np.abs(exact)))
