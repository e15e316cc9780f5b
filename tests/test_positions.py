"""The rule of positions: negative ones read row 0 of the table, one past it gives NaN in the lanes that read it."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_qk
from tests import strategies
from tests.cases import Case, make_inputs
from tests.compare import assert_same
from tests.definition import mrope_axis
from tests.forms import op
from tests.lowering import GPU_IMPLEMENTATIONS, lowered_text
from tests.run import run

CASE = Case(8, 3, 2, max_position=100)
NEGATIVE = {
    "int8": [-1, -128],
    "int16": [-1, -(2**15)],
    "int32": [-1, -(2**31)],
    "int64": [-1, -(2**32) + 1, -(2**63)],
}
PAST = {
    "int8": [100, 127],
    "uint8": [100, 255],
    "int16": [2**15 - 1],
    "uint16": [2**16 - 1],
    "int32": [100, 2**31 - 1],
    "uint32": [100, 2**31 + 3, 2**32 - 1],
    "int64": [100, 2**32 + 3, 2**63 - 1],
    "uint64": [2**32 + 3, 2**64 - 1],
}


def assert_guarded(implementation, case, inputs):
    """NaN in the rotated lanes of the tokens past the table; every other bit as with 0 for what lies outside it."""
    got, want = run(implementation, case, inputs), run(implementation, case, strategies.inside(case, inputs))
    expected = strategies.lanes_past(case, inputs)[:, None]
    for index, heads in ((0, case.num_q_heads), (1, case.num_kv_heads)):
        got_rows, want_rows = (np.asarray(x[index]).reshape(case.num_tokens, heads, case.head_dim) for x in (got, want))
        where = np.broadcast_to(expected, got_rows.shape)
        np.testing.assert_array_equal(np.isnan(got_rows.astype(np.float32)), where)
        zeros = np.zeros((), got_rows.dtype)
        masked = [jnp.asarray(np.where(where, zeros, x)) for x in (got_rows, want_rows)]
        assert_same(*masked)
    assert_same(got[2], want[2])


@pytest.mark.parametrize("dtype", PAST)
def test_positions_outside(implementation, dtype):
    outside = np.array(NEGATIVE.get(dtype, []) + PAST[dtype], dtype)
    positions = np.arange(CASE.num_tokens).astype(dtype)
    positions[1 : 1 + outside.size] = outside
    with jax.enable_x64(dtype.endswith("64")):
        inputs = dataclasses.replace(make_inputs(CASE), positions=jnp.asarray(positions))
        assert inputs.positions.dtype == dtype
        is_past = strategies.lanes_past(CASE, inputs)[:, 0]
        np.testing.assert_array_equal(is_past, [int(p) >= 100 for p in positions])
        assert_guarded(implementation, CASE, inputs)


@pytest.mark.parametrize("dtype", ["int8", "uint16", "uint32", "int64"])
def test_first_and_last_position_are_inside(implementation, dtype):
    with jax.enable_x64(dtype.endswith("64")):
        positions = jnp.asarray(np.array([0, 99, 99, 0, 50, 1, 98, 99], dtype))
        inputs = dataclasses.replace(make_inputs(CASE), positions=positions)
        got = run(implementation, CASE, inputs)
        want = run(implementation, CASE, dataclasses.replace(inputs, positions=positions.astype(jnp.int32)))
        assert not np.isnan(np.asarray(got[0], np.float32)).any()
        assert_same(got, want)


@pytest.mark.parametrize("dtype", ["int2", "int4", "uint4"])
def test_positions_of_less_than_a_byte(dtype):
    """No kernel reads them: the public function widens them first."""
    limits = jnp.iinfo(dtype)
    narrow = jnp.array([0, 1, limits.max, limits.min, 0, 1, limits.max, limits.min]).astype(dtype)
    arrays = dataclasses.asdict(make_inputs(CASE))

    def run(positions):
        return pallas_qk.fused_qk_rmsnorm_rope_gate(**arrays | {"positions": positions}, **CASE.static_arguments)

    got, want = run(narrow), run(jnp.maximum(narrow.astype(jnp.int32), 0))
    assert_same(got, want)


@pytest.mark.parametrize("dtype", ["int2", "int4", "uint4"])
@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_a_kernel_is_given_whole_words_for_positions_of_less_than_a_byte(name, dtype):
    """A kernel that read them would read one per byte, where several lie."""
    inputs = dataclasses.replace(make_inputs(CASE), positions=jnp.zeros(8, dtype))
    (operands,) = re.findall(r"custom_call @[^\n]* : \((.*)\) -> ", lowered_text(op(CASE, name), *inputs))
    assert operands.split(", ")[-1] == "tensor<1x8xi32>"


def test_a_table_larger_than_the_positions_type(implementation):
    """int8 positions and a table of 200 rows: the limit does not fit the type."""
    case = dataclasses.replace(CASE, max_position=200)
    inputs = dataclasses.replace(make_inputs(case), positions=jnp.asarray([0, 127, -1, 5, 6, 7, 8, -128], jnp.int8))
    assert not strategies.lanes_past(case, inputs).any()
    assert_guarded(implementation, case, inputs)


def test_a_table_whose_size_is_the_types_limit_plus_one(implementation):
    case = dataclasses.replace(CASE, max_position=256)
    inputs = dataclasses.replace(make_inputs(case), positions=jnp.asarray([0, 255, 254, 5, 6, 7, 8, 128], jnp.uint8))
    assert not strategies.lanes_past(case, inputs).any()
    assert_guarded(implementation, case, inputs)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_mrope_positions_outside_reach_their_own_lanes(implementation, axis):
    """One position past the table, and one negative, in one row of positions."""
    case = dataclasses.replace(CASE, mrope_section=(11, 11, 10))
    inputs = make_inputs(case)
    inputs = dataclasses.replace(inputs, positions=inputs.positions.at[axis, 3].set(100).at[axis, 5].set(-1))
    reads = np.array([mrope_axis(j, case.mrope_section) == axis for j in range(32)])
    expected = np.zeros((8, 256), bool)
    expected[3] = np.concatenate([reads, reads, np.zeros(192, bool)])
    np.testing.assert_array_equal(strategies.lanes_past(case, inputs), expected)
    assert_guarded(implementation, case, inputs)


def test_numpy_positions_of_64_bits_are_not_narrowed_unseen():
    """Without x64 JAX narrows NumPy's 64 bits: 2^32 + 3 must not become 3, nor -2^32 + 1 become 1."""
    inputs = make_inputs(CASE)
    for positions, inside in (
        (np.array([0, 2**32 + 3, 5, -(2**32) + 1, 99, 100, -(2**63), 2**63 - 1]), [0, 100, 5, 0, 99, 100, 0, 100]),
        (np.array([0, 2**32 + 3, 5, 7, 99, 100, 1, 2**64 - 1], np.uint64), [0, 100, 5, 7, 99, 100, 1, 100]),
    ):
        got = run("xla", CASE, dataclasses.replace(inputs, positions=positions))
        want = run("xla", CASE, dataclasses.replace(inputs, positions=jnp.array(inside, jnp.int32)))
        assert_same(got, want)
        assert np.isnan(np.asarray(got[0], np.float32)).any(axis=1).sum() == inside.count(100)


def test_debug_nans_trips_by_design():
    inputs = make_inputs(CASE)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        run("xla", CASE, dataclasses.replace(inputs, positions=inputs.positions.at[0].set(100)))
