"""The position guard: a position outside the table gives NaN in the lanes that read it, and nowhere else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_qk
from tests.cases import Case, make_inputs
from tests.compare import compare_bits, compare_outputs
from tests.definition import mrope_axis
from tests.run import run

CASE = Case(8, 3, 2, max_position=100)
OUTSIDE = {
    "int8": [-1, -128, 100, 127],
    "uint8": [100, 255],
    "int16": [-1, 2**15 - 1, -(2**15)],
    "uint16": [2**16 - 1],
    "int32": [-1, 100, 2**31 - 1, -(2**31)],
    "uint32": [100, 2**31 + 3, 2**32 - 1],
    "int64": [-1, 100, 2**32 + 3, -(2**32) + 1, 2**63 - 1, -(2**63)],
    "uint64": [2**32 + 3, 2**64 - 1],
}


def assert_guarded(implementation, case, inputs, is_outside):
    """NaN in the rotated lanes of the tokens (T,) marked outside; every other bit as if they were inside."""
    got = run(implementation, case, inputs)
    inside = dataclasses.replace(inputs, positions=jnp.where(jnp.asarray(is_outside), 0, inputs.positions))
    want = run(implementation, case, inside)
    for index, heads in ((0, case.num_q_heads), (1, case.num_kv_heads)):
        got_rows, want_rows = (np.asarray(x[index]).reshape(case.num_tokens, heads, case.head_dim) for x in (got, want))
        rotated = np.arange(case.head_dim) < case.rotary_dim
        expected = np.broadcast_to(is_outside[:, None, None] & rotated, got_rows.shape)
        np.testing.assert_array_equal(np.isnan(got_rows.astype(np.float32)), expected)
        keep = jnp.asarray(~expected)
        zeros = jnp.zeros((), got[index].dtype)
        masked = [jnp.where(keep, jnp.asarray(x), zeros) for x in (got_rows, want_rows)]
        assert compare_bits("rows", *masked).differing == 0
    assert compare_bits("gate_out", got[2], want[2]).differing == 0


@pytest.mark.parametrize("dtype", OUTSIDE)
def test_positions_outside_give_nan(implementation, dtype):
    with jax.enable_x64(dtype.endswith("64")):
        bad = np.array(OUTSIDE[dtype], dtype)
        positions = np.arange(CASE.num_tokens).astype(dtype)
        positions[1 : 1 + bad.size] = bad
        is_outside = np.zeros(CASE.num_tokens, bool)
        is_outside[1 : 1 + bad.size] = True
        inputs = dataclasses.replace(make_inputs(CASE), positions=jnp.asarray(positions))
        assert inputs.positions.dtype == dtype
        assert_guarded(implementation, CASE, inputs, is_outside)


@pytest.mark.parametrize("dtype", ["int8", "uint16", "uint32", "int64"])
def test_first_and_last_position_are_inside(implementation, dtype):
    with jax.enable_x64(dtype.endswith("64")):
        positions = jnp.asarray(np.array([0, 99, 99, 0, 50, 1, 98, 99], dtype))
        inputs = dataclasses.replace(make_inputs(CASE), positions=positions)
        got = run(implementation, CASE, inputs)
        want = run(implementation, CASE, dataclasses.replace(inputs, positions=positions.astype(jnp.int32)))
        assert not np.isnan(np.asarray(got[0], np.float32)).any()
        assert compare_outputs(got, want).differing == 0


@pytest.mark.parametrize("dtype", ["int2", "int4", "uint4"])
def test_positions_of_less_than_a_byte(dtype):
    """No kernel reads them: the public function widens them first."""
    limits = jnp.iinfo(dtype)
    narrow = jnp.array([0, 1, limits.max, limits.min, 0, 1, limits.max, limits.min]).astype(dtype)
    arrays = dataclasses.asdict(make_inputs(CASE))

    def run(positions):
        return pallas_qk.fused_qk_rmsnorm_rope_gate(**arrays | {"positions": positions}, **CASE.static_arguments)

    got, want = run(narrow), run(narrow.astype(jnp.int32))
    assert compare_outputs(got, want).differing == 0
    assert np.isnan(np.asarray(got[0][3], np.float32)).any() == (limits.min < 0)


def test_a_table_larger_than_the_positions_type(implementation):
    """int8 positions and a table of 200 rows: the limit does not fit the type."""
    case = dataclasses.replace(CASE, max_position=200)
    inputs = dataclasses.replace(make_inputs(case), positions=jnp.asarray([0, 127, -1, 5, 6, 7, 8, -128], jnp.int8))
    assert_guarded(implementation, case, inputs, np.isin(np.arange(8), [2, 7]))


def test_a_table_whose_size_is_the_types_limit_plus_one(implementation):
    case = dataclasses.replace(CASE, max_position=256)
    inputs = dataclasses.replace(make_inputs(case), positions=jnp.asarray([0, 255, 254, 5, 6, 7, 8, 128], jnp.uint8))
    assert_guarded(implementation, case, inputs, np.zeros(8, bool))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_one_bad_mrope_row_spoils_its_own_lanes(implementation, axis):
    case = dataclasses.replace(CASE, mrope_section=(11, 11, 10))
    inputs = make_inputs(case)
    positions = inputs.positions.at[axis, 3].set(-1)
    got = np.asarray(run(implementation, case, dataclasses.replace(inputs, positions=positions))[0], np.float32)
    want = np.asarray(run(implementation, case, inputs)[0], np.float32)
    reads = np.array([mrope_axis(j, case.mrope_section) == axis for j in range(32)])
    expected = np.zeros((8, 3, 256), bool)
    expected[3] = np.concatenate([reads, reads, np.zeros(192, bool)])
    np.testing.assert_array_equal(np.isnan(got).reshape(expected.shape), expected)
    np.testing.assert_array_equal(got.reshape(expected.shape)[~expected], want.reshape(expected.shape)[~expected])


def test_numpy_positions_of_64_bits_are_not_narrowed_unseen():
    """Without x64 JAX narrows NumPy's int64; 2^32 + 3 must not become 3."""
    inputs = make_inputs(CASE)
    positions = np.array([0, 2**32 + 3, 5, -(2**32) + 1, 99, 100, 7, 8], np.int64)
    is_outside = np.isin(np.arange(8), [1, 3, 5])
    got = run("xla", CASE, dataclasses.replace(inputs, positions=positions))[0]
    is_nan = np.isnan(np.asarray(got, np.float32)).reshape(8, -1).any(axis=1)
    np.testing.assert_array_equal(is_nan, is_outside)


def test_debug_nans_trips_by_design():
    inputs = make_inputs(CASE)
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        run("xla", CASE, dataclasses.replace(inputs, positions=inputs.positions.at[0].set(-1)))
