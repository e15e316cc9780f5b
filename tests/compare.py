"""Bit comparison of arrays: counts what differs and says where, for tests, benchmarks and the demo."""

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


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize])


@jax.jit
def _count(a: jax.Array, b: jax.Array) -> jax.Array:
    # Two stages keep each int32 count far below its limit at 2^32 elements.
    differs = _bits(a) != _bits(b)
    return jnp.sum(differs, axis=tuple(range(1, differs.ndim)), dtype=jnp.int32)


def _differing_by_row(got: jax.Array, want: jax.Array) -> np.ndarray:
    if got.size > COMPARED_BY_NUMPY:
        return np.asarray(_count(got, want), np.int64)
    a, b = np.asarray(got), np.asarray(want)
    differs = a.view(f"u{a.itemsize}") != b.view(f"u{b.itemsize}")
    return differs.reshape(a.shape[0], -1).sum(axis=1)


def compare_bits(name: str, got: jax.Array, want: jax.Array) -> Comparison:
    """Compares two arrays of one shape and dtype as integers; NaNs are equal only with equal payloads."""
    assert got.shape == want.shape and got.dtype == want.dtype, (name, got.shape, got.dtype, want.shape, want.dtype)
    if got.size == 0:
        return Comparison(0, 0)
    rows = _differing_by_row(got, want)
    differing = int(rows.sum())
    if not differing:
        return Comparison(got.size, 0)
    row = int(np.argmax(rows > 0))
    got_row, want_row = np.asarray(got[row]), np.asarray(want[row])
    column = int(np.argmax((np.asarray(_bits(got[row])) != np.asarray(_bits(want[row]))).reshape(-1)))
    first = f"{name}[{row}, {column}] is {got_row.reshape(-1)[column]}, want {want_row.reshape(-1)[column]}"
    return Comparison(got.size, differing, first)


def compare_outputs(got, want) -> Comparison:
    """(q_out, k_out, gate_out) of two implementations, compared in bits."""
    names = ("q_out", "k_out", "gate_out")
    return sum((compare_bits(name, a, b) for name, a, b in zip(names, got, want, strict=True)), start=Comparison(0, 0))
