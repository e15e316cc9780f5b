"""The order of the sum of squares, which decides the last bit of every row."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_qk import _reference
from pallas_qk._options import tree_order
from pallas_qk._triton.arithmetic import sum_of_squares
from pallas_qk._triton.tiles import LAYOUTS
from tests.tree import exact_rows, numpy_tree


@pytest.mark.parametrize("lanes", [2, 8, 32, 64, 128, 256, 512, 1024])
def test_the_order_names_each_bit_once(lanes):
    assert sorted(tree_order(lanes)) == list(range(lanes.bit_length() - 1))


def test_the_order_for_a_row_of_256():
    assert tree_order(256) == [0, 5, 4, 3, 2, 1, 7, 6]


@pytest.mark.parametrize("head_dim", [2, 24, 32, 64, 80, 96, 128, 192, 256, 512])
def test_reference_sum_is_the_tree(head_dim):
    squares = exact_rows(2000, head_dim) ** 2
    got = np.asarray(_reference.tree_sum(jnp.asarray(squares)))
    np.testing.assert_array_equal(got.view(np.uint32), numpy_tree(squares).view(np.uint32))


def test_a_plain_sum_is_not_the_tree():
    """The check above can fail: one row in four or so comes out otherwise."""
    squares = exact_rows(2000, 256) ** 2
    equal = np.asarray(jnp.sum(jnp.asarray(squares), axis=-1)) == numpy_tree(squares)
    assert 0.5 < equal.mean() < 0.9


@pytest.mark.parametrize(
    "layout, head_dim, rotary_dim",
    [
        ("chunks", 256, 64),
        ("chunks", 64, 64),
        ("chunks", 80, 80),
        ("chunks", 192, 96),
        ("halves", 256, 64),
        ("halves", 128, 128),
        ("halves", 64, 2),
        ("halves", 512, 128),
        ("row", 80, 40),
        ("row", 128, 6),
        ("pairs", 256, 64),
        ("pairs", 80, 40),
    ],
)
def test_each_layout_of_the_triton_kernel_sums_the_tree(layout, head_dim, rotary_dim):
    """The columns that a layout names and the lane bits that it claims for them, summed eagerly, one add at a time."""
    rows = exact_rows(500, head_dim)
    tiles = LAYOUTS[layout](500, head_dim, rotary_dim)
    xs = {}
    for offset, columns, exists in zip(tiles.offsets, tiles.columns, tiles.exists, strict=False):
        columns = np.asarray(columns)[0]
        lanes = np.where(columns < head_dim, rows[:, np.minimum(columns, head_dim - 1)], 0)
        assert exists is None or (np.asarray(exists)[0] == (columns < head_dim)).all()
        xs[offset] = jnp.asarray(lanes)
    got = np.asarray(sum_of_squares(xs, tiles.bits, head_dim, lambda a, b, c: a * b + c))[:, 0]
    np.testing.assert_array_equal(got.view(np.uint32), numpy_tree(rows**2).view(np.uint32))
