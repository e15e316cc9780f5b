"""The comparisons that the other tests trust: that they see one bit, one NaN and one element past its bound."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests import compare
from tests.compare import assert_same, assert_within


def failure(function, *args) -> str:
    with pytest.raises(AssertionError) as caught:
        function(*args)
    return str(caught.value)


@pytest.mark.parametrize("by_numpy", [True, False])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_every_bit_counts(monkeypatch, by_numpy, dtype):
    if not by_numpy:
        monkeypatch.setattr(compare, "COMPARED_BY_NUMPY", 0)
    zeros = jnp.zeros((2, 3, 4), dtype)
    other = zeros.at[1, 2, 1].set(-0.0).at[1, 2, 3].set(1)
    first = "is -0.0, want 0.0"
    assert failure(assert_same, [other], [zeros]) == f"2 of 24 elements differ; first: result[0][1, 2, 1] {first}"
    trees = ({"a": x[0, 0, 0], "b": x[1, 2, :3]} for x in (other, zeros))
    assert failure(assert_same, *trees) == f"1 of 4 elements differ; first: result['b'][1] {first}"
    assert failure(assert_same, other[1, 2, 1], zeros[0, 0, 0]) == f"1 of 1 elements differ; first: result[0] {first}"
    assert_same(other, jnp.array(other))


def test_the_payload_of_a_nan_counts():
    bits = np.array([0x7FC1, 0x7FC0], np.uint16).view(jnp.bfloat16)
    assert failure(assert_same, bits[:1], bits[1:]) == "1 of 1 elements differ; first: result[0] is nan, want nan"
    assert_same(bits[:1], bits[:1])


def test_arrays_that_are_missing_or_of_another_kind_are_seen():
    x = np.zeros((2, 3), np.float32)
    assert failure(assert_same, [x], [x, x]) == "1 arrays, want 2"
    for other in (x[:1], x.reshape(3, 2), x.astype(np.float16)):
        assert "result[0]" in failure(assert_same, [other], [x])


def test_a_bound_holds_for_each_element_and_no_nan():
    exact, bound = np.zeros((2, 3)), np.full((2, 3), 0.5)
    assert_within("x", np.full((2, 3), -0.5, np.float32), exact, bound)
    past = np.zeros((2, 3), np.float32)
    past[1, 2], past[0, 1] = 1.5, -0.75
    assert failure(assert_within, "x", past, exact, bound) == "x[1, 2]: error 1.5, bound 0.5"
    past[0, 0] = np.nan
    assert failure(assert_within, "x", past, exact, bound) == "x[0, 0]: error nan, bound 0.5"
    assert "(1, 3)" in failure(assert_within, "x", past[:1], exact, bound)
