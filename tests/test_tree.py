"""The order of the sum of squares, which decides the last bit of every row."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_qk import _reference, _triton
from pallas_qk._config import tree_order


def numpy_tree(squares: np.ndarray) -> np.ndarray:
    """float32 sums over the last axis as the serving kernel's reduction: written as the GPU does it, by threads."""
    head_dim = squares.shape[-1]
    lanes = 1 << (head_dim - 1).bit_length()
    values = np.zeros((*squares.shape[:-1], lanes), np.float32)
    values[..., :head_dim] = squares
    if lanes >= 64:
        values = values[..., 0::2] + values[..., 1::2]  # a thread's two lanes
    num_threads = min(32, values.shape[-1])
    values = values.reshape(*values.shape[:-1], -1, num_threads)  # (..., warps, threads)
    step = num_threads // 2
    while step:
        values = values[..., :step] + values[..., step : 2 * step]
        step //= 2
    values = values[..., 0]
    while values.shape[-1] > 1:
        values = values[..., : values.shape[-1] // 2] + values[..., values.shape[-1] // 2 :]
    return values[..., 0]


def exact_rows(num_rows: int, head_dim: int) -> np.ndarray:
    """float32 values that bfloat16 holds, so that squares are exact and only the order of the sum shows."""
    values = np.random.default_rng(0).normal(size=(num_rows, head_dim)).astype(np.float32)
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


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
    ],
)
def test_each_layout_of_the_triton_kernel_sums_the_tree(layout, head_dim, rotary_dim):
    """The columns that a layout names and the lane bits that it claims for them, summed eagerly, one add at a time."""
    rows = exact_rows(500, head_dim)
    tiles = _triton._LAYOUTS[layout](500, head_dim, rotary_dim)
    xs = {}
    for offset, columns, exists in zip(tiles.offsets, tiles.columns, tiles.exists, strict=False):
        columns = np.asarray(columns)[0]
        lanes = np.where(columns < head_dim, rows[:, np.minimum(columns, head_dim - 1)], 0)
        assert exists is None or (np.asarray(exists)[0] == (columns < head_dim)).all()
        xs[offset] = jnp.asarray(lanes)
    got = np.asarray(_triton._tree_sum(xs, tiles.bits, head_dim, lambda a, b, c: a * b + c))[:, 0]
    np.testing.assert_array_equal(got.view(np.uint32), numpy_tree(rows**2).view(np.uint32))
