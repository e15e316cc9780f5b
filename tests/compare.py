"""Comparison of arrays, in bits or by a bound: says how much differs and where, for tests, benchmarks and the demo."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@dataclasses.dataclass(frozen=True)
class Comparison:
    """How many elements were compared, how many differ in bits, and the first that does."""

    elements: int
    differing: int
    first: str = ""

    def __add__(self, other: "Comparison") -> "Comparison":
        return Comparison(self.elements + other.elements, self.differing + other.differing, self.first or other.first)

    def __str__(self) -> str:
        text = f"{self.differing} of {self.elements} elements differ"
        return f"{text}; first: {self.first}" if self.first else text


# Up to so many elements NumPy compares: JAX compiles the comparison for every shape, which takes longer.
COMPARED_BY_NUMPY = 1 << 22


def bits_of(x: jax.Array) -> jax.Array:
    """Unsigned integers."""
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


@jax.jit
def _count(a: jax.Array, b: jax.Array) -> jax.Array:
    # Two stages keep each int32 count far below its limit at 2^32 elements.
    differs = bits_of(a) != bits_of(b)
    return jnp.sum(differs, axis=tuple(range(1, differs.ndim)), dtype=jnp.int32)


def _differs(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.view(f"u{a.itemsize}") != b.view(f"u{b.itemsize}")


def _differing_by_row(got: jax.Array, want: jax.Array) -> np.ndarray:
    if got.size > COMPARED_BY_NUMPY:
        return np.asarray(_count(got, want), np.int64)
    differs = _differs(np.asarray(got), np.asarray(want))
    return differs.sum(axis=tuple(range(1, differs.ndim)))


def compare_bits(name: str, got: jax.Array, want: jax.Array) -> Comparison:
    """Compares two arrays of one shape and dtype as integers; NaNs are equal only with equal payloads."""
    assert got.shape == want.shape and got.dtype == want.dtype, (name, got.shape, got.dtype, want.shape, want.dtype)
    if got.size == 0:
        return Comparison(0, 0)
    if got.ndim == 0:
        got, want = got.reshape(1), want.reshape(1)
    rows = _differing_by_row(got, want)
    differing = int(rows.sum())
    if not differing:
        return Comparison(got.size, 0)
    row = int(np.argmax(rows > 0))
    got_row, want_row = np.asarray(got[row]), np.asarray(want[row])
    inside = tuple(int(index[0]) for index in np.nonzero(np.atleast_1d(_differs(got_row, want_row))))[: got_row.ndim]
    place = ", ".join(map(str, (row, *inside)))
    return Comparison(got.size, differing, f"{name}[{place}] is {got_row[inside]}, want {want_row[inside]}")


def compare_outputs(got, want) -> Comparison:
    """(q_out, k_out, gate_out) of two implementations, compared in bits."""
    names = ("q_out", "k_out", "gate_out")
    return sum((compare_bits(name, a, b) for name, a, b in zip(names, got, want, strict=True)), start=Comparison(0, 0))


def assert_same(got, want) -> None:
    """Equal shapes, dtypes and bits of each array of two trees; the message counts what differs in all of them."""
    named, wanted = jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want)
    assert len(named) == len(wanted), f"{len(named)} arrays, want {len(wanted)}"
    names = [f"result{jax.tree_util.keystr(path)}" for path, _ in named]
    found = (compare_bits(name, a, b) for name, (_, a), b in zip(names, named, wanted, strict=True))
    comparison = sum(found, start=Comparison(0, 0))
    assert comparison.differing == 0, str(comparison)


def assert_within(name: str, got, exact: np.ndarray, bound: np.ndarray) -> None:
    """Each element at most its bound from the float64 value; the message names the worst. NaN is within no bound."""
    assert got.shape == exact.shape, (name, got.shape, exact.shape)
    error = np.abs(np.asarray(got).astype(np.float64) - exact)
    if not (error <= bound).all():
        worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error) - bound), error.shape)
        place = ", ".join(map(str, worst))
        raise AssertionError(f"{name}[{place}]: error {error[worst]}, bound {bound[worst]}")
