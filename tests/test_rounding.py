"""The round trip to 16 bits between norm and rotation, which every implementation must make and XLA would drop."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_qk import _reference
from tests.cases import Case, Inputs
from tests.run import run
from tests.strategies import make_inputs
from tests.tree import exact_rows, numpy_tree


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_round_trip_is_numpys_rounding_under_jit(dtype):
    """Subnormals of the dtype among them, and float32 results that lie between two of its numbers."""
    rng = np.random.default_rng(0)
    y = (rng.standard_normal(4096) * 2.0 ** rng.integers(-22, 8, 4096)).astype(np.float32)
    # Something before and after it for XLA to fuse.
    got = jax.jit(lambda y: _reference.round_trip(y * 2, jnp.dtype(dtype)) * 3)(jnp.asarray(y))
    np.testing.assert_array_equal(np.asarray(got), (y * 2).astype(jnp.dtype(dtype)).astype(np.float32) * 3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_rotation_reads_rounded_values(implementation, dtype):
    """With cos = sin = 1 the outputs are difference and sum of what cos = 1 and sin = 0 show, rounded once."""
    case = Case(5, 2, 1, head_dim=32, rotary_dim=32, dtype=dtype, cache_dtype="float32", max_position=8)
    inputs = make_inputs(case)
    inputs = dataclasses.replace(inputs, positions=jnp.zeros_like(inputs.positions))

    def rotated(cos, sin):
        half = [np.full((8, 16), value, np.float32) for value in (cos, sin)]
        table = jnp.asarray(np.concatenate(half, axis=1))
        k_out = run(implementation, case, dataclasses.replace(inputs, cos_sin_cache=table))[1]
        first, second = np.split(np.asarray(k_out).astype(np.float32), 2, axis=1)
        return first, second

    y1, y2 = rotated(1.0, 0.0)
    o1, o2 = rotated(1.0, 1.0)
    np.testing.assert_array_equal(o1, (y1 - y2).astype(jnp.dtype(dtype)).astype(np.float32))
    np.testing.assert_array_equal(o2, (y1 + y2).astype(jnp.dtype(dtype)).astype(np.float32))


@pytest.mark.parametrize("head_dim", [256, 64])
def test_the_norm_of_plain_xla_sums_by_the_tree(head_dim):
    """Rows whose squares are exact in float32, weights of 1 and no rotation: only the order of the sum shows.

    The kernels' sums: test_tree and the recipe of test_mosaic_gpu.
    """
    case = Case(2000, 1, 1, head_dim=head_dim, rotary_dim=2, dtype="float32", max_position=1)
    rows = exact_rows(case.num_tokens, head_dim)
    ones, no_rotation = jnp.ones(head_dim), jnp.asarray([[1.0, 0.0]])
    positions = jnp.zeros(case.num_tokens, jnp.int32)
    inputs = Inputs(jnp.zeros((2000, 2 * head_dim)), jnp.asarray(rows), ones, ones, no_rotation, positions)
    k_out = np.asarray(run("xla", case, inputs)[1])

    def equal_rows(sums):
        inv_rms = jax.jit(lambda sums: jax.lax.rsqrt(sums / head_dim + case.eps))(sums)
        return (k_out == rows * np.asarray(inv_rms)[:, None]).all(axis=1).mean()

    assert equal_rows(numpy_tree(rows**2)) == 1
    one_by_one = np.add.accumulate(rows**2, axis=-1, dtype=np.float32)[:, -1]
    assert equal_rows(one_by_one) < 0.9
