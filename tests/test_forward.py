"""The op against its float64 definition, and the properties that hold whatever the arithmetic."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_qk
from pallas_qk._checks import check_norm_beta
from pallas_qk._triton.config import TritonForward
from tests import tolerances
from tests.cases import ORDER_CASES, SMALL_CASES, Case, Inputs, make_inputs
from tests.compare import assert_same, compare_outputs
from tests.definition import assert_defined
from tests.forms import op
from tests.run import has_gpu, run
from tests.tolerances import ROUNDOFF, SMALLEST_NORMAL


@pytest.mark.parametrize("case", [*SMALL_CASES, *ORDER_CASES], ids=lambda case: case.id)
def test_equals_the_definition(implementation, case):
    inputs = make_inputs(case, seed=1)
    assert_defined(run(implementation, case, inputs), case, inputs)


PARTLY = Case(5, 3, 2, head_dim=64, rotary_dim=16)
WHOLLY = Case(5, 4, 1, 128, 128, mrope_section=(24, 20, 20), dtype="float16", cache_dtype="float32")


@pytest.mark.parametrize(
    "layout, case, rows",  # any two together
    [
        ("chunks", PARTLY, 4),
        ("chunks", WHOLLY, 1),
        ("halves", PARTLY, 1),
        ("halves", WHOLLY, 4),
        ("row", PARTLY, 4),
        ("row", WHOLLY, 1),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else str(value),
)
def test_every_layout_gives_the_same_bits(layout, case, rows):
    inputs = make_inputs(case)
    got = run("triton", case, inputs, config=TritonForward(layout, rows_per_program=rows))
    assert_defined(got, case, inputs)
    compared = compare_outputs(got, run("triton", case, inputs))
    # A CPU's compiler takes the root and fuses the rotation otherwise in each layout: a unit before either rounding.
    assert compared.differing <= (0 if has_gpu() else tolerances.max_flips(case, compared.elements, units=2))


@pytest.mark.parametrize("mrope_section", [None, (4, 4, 2)])
def test_pairs_are_halves_of_permuted_lanes(implementation, mrope_section):
    """Lanes 2j and 2j + 1 of inputs and weights put R/2 apart permute the outputs, but for the order of the sum."""
    halves = Case(5, 3, 2, head_dim=80, rotary_dim=20, dtype="float32", mrope_section=mrope_section)
    pairs = dataclasses.replace(halves, rotation="pairs")
    inputs, lanes = make_inputs(pairs), np.array([*range(0, 20, 2), *range(1, 20, 2), *range(20, 80)])

    def permuted(x):
        return x.reshape(*x.shape[:-1], -1, 80)[..., lanes].reshape(x.shape)

    arrays = {name: permuted(getattr(inputs, name)) for name in ("q_gate", "k", "q_weight", "k_weight")}
    got = [permuted(x) for x in run(implementation, pairs, inputs)]
    want = run(implementation, halves, dataclasses.replace(inputs, **arrays))
    for a, b in zip(got[:2], want[:2], strict=True):
        assert max(tolerances.worst_distances(a, b, 80, 20, "halves")) <= tolerances.float32_bound(halves)
    assert_same(got[2:], want[2:])


def test_chunks_of_few_lanes():
    case = Case(3, 2, 1, head_dim=80, rotary_dim=40)
    inputs = make_inputs(case)
    assert_defined(run("triton", case, inputs, config=TritonForward("chunks")), case, inputs)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_no_tokens(implementation, dtype):
    case = Case(0, dtype=dtype)
    outputs = run(implementation, case, make_inputs(case))
    assert [(x.shape, str(x.dtype)) for x in outputs] == [((0, 4096), dtype), ((0, 512), dtype), ((0, 4096), dtype)]


@pytest.mark.parametrize("mrope_section", [None, (11, 11, 10)])
def test_a_token_alone_gives_the_bits_it_gives_in_a_batch(implementation, mrope_section):
    case = Case(13, 5, 2, mrope_section=mrope_section)
    inputs = make_inputs(case)
    together = run(implementation, case, inputs)
    for token in (0, 6, 12):
        rows = slice(token, token + 1)
        one = dataclasses.replace(
            inputs, q_gate=inputs.q_gate[rows], k=inputs.k[rows], positions=inputs.positions[..., rows]
        )
        alone = run(implementation, dataclasses.replace(case, num_tokens=1), one)
        assert_same(alone, [x[rows] for x in together])


def test_a_head_alone_gives_the_bits_it_gives_among_others(implementation):
    case = Case(3, 6, 3)
    inputs = make_inputs(case)
    together = run(implementation, case, inputs)
    head = inputs.q_gate.reshape(3, 6, 512)[:, 4], inputs.k.reshape(3, 3, 256)[:, 2]
    one = dataclasses.replace(inputs, q_gate=head[0], k=head[1])
    alone = run(implementation, Case(3, 1, 1), one)
    want = [x.reshape(3, heads, 256)[:, h] for x, heads, h in zip(together, (6, 3, 6), (4, 2, 4), strict=True)]
    assert_same(alone, want)


def test_permuting_tokens_permutes_the_outputs(implementation):
    case = Case(37, 3, 1)
    inputs = make_inputs(case)
    order = np.random.default_rng(0).permutation(37)
    moved = dataclasses.replace(
        inputs, q_gate=inputs.q_gate[order], k=inputs.k[order], positions=inputs.positions[order]
    )
    got, want = run(implementation, case, moved), run(implementation, case, inputs)
    assert_same(got, [x[order] for x in want])


def test_no_rotation_leaves_the_norm_alone(implementation):
    case = Case(4, 2, 1, dtype="float32")
    inputs = make_inputs(case)
    table = jnp.concatenate([jnp.ones((4096, 32)), jnp.zeros((4096, 32))], axis=1)
    _, k_out, _ = run(implementation, case, dataclasses.replace(inputs, cos_sin_cache=table))
    k = np.asarray(inputs.k, np.float64).reshape(4, 1, 256)
    want = k / np.sqrt((k * k).mean(-1, keepdims=True) + case.eps) * np.asarray(inputs.k_weight, np.float64)
    np.testing.assert_allclose(np.asarray(k_out).reshape(want.shape), want, rtol=16 * ROUNDOFF["float32"])


def test_gate_bits_are_kept(implementation):
    case = Case(3, 2, 1, dtype="bfloat16")
    inputs = make_inputs(case)
    bits = np.random.default_rng(0).integers(0, 2**16, size=(3, 2, 512), dtype=np.uint16)
    bits[:, :, :256] = np.asarray(inputs.q_gate).view(np.uint16).reshape(3, 2, 512)[:, :, :256]
    bits[0, 0, 256:260] = [0x7F81, 0xFFC1, 0x7F80, 0x0001]  # signalling and quiet NaN, infinity, subnormal
    q_gate = jnp.asarray(bits.reshape(3, -1).view(inputs.q_gate.dtype))
    gate_out = run(implementation, case, dataclasses.replace(inputs, q_gate=q_gate))[2]
    got, want = np.asarray(gate_out).view(np.uint16), bits[:, :, 256:].reshape(3, -1)
    if implementation != "xla" and not has_gpu():
        # Interpret mode passes bfloat16 through float32 and back, which keeps of a NaN only that it is one.
        is_nan = (want & 0x7FFF) > 0x7F80
        assert ((got[is_nan] & 0x7FFF) > 0x7F80).all()
        got, want = got[~is_nan], want[~is_nan]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_element_stays_within_its_head(implementation, bad):
    case = Case(4, 3, 2)
    inputs = make_inputs(case)
    want = run(implementation, case, inputs)
    got = run(implementation, case, dataclasses.replace(inputs, q_gate=inputs.q_gate.at[2, 512 + 7].set(bad)))
    spoiled = np.isnan(np.asarray(got[0], np.float32)).reshape(4, 3, 256)
    assert spoiled[2, 1].any() and not np.delete(spoiled.reshape(12, 256), 7, axis=0).any()
    keep = ~np.isin(np.arange(12), [7])
    for got_rows, want_rows in ((got[0], want[0]), (got[2], want[2])):
        got_rows, want_rows = (x.reshape(12, 256)[keep] for x in (got_rows, want_rows))
        assert_same(got_rows, want_rows)
    assert_same(got[1], want[1])


def test_zero_rows_give_zeros(implementation):
    case = Case(2, 2, 1)
    inputs = make_inputs(case)
    outputs = run(implementation, case, dataclasses.replace(inputs, q_gate=jnp.zeros_like(inputs.q_gate)))
    assert not np.asarray(outputs[0], np.float32).any() and np.asarray(outputs[1], np.float32).all()


def test_half_precision_subnormals_survive_the_round_trip(implementation):
    case = Case(6, 4, 2, weight_scale=1e-6, dtype="float16")
    inputs = make_inputs(case)
    q_out, _, _ = run(implementation, case, inputs)
    subnormal = np.abs(np.asarray(q_out, np.float32))
    assert ((subnormal > 0) & (subnormal < SMALLEST_NORMAL["float16"])).mean() > 0.9
    assert_defined(run(implementation, case, inputs), case, inputs)


def test_norm_beta_equals_weights_shifted_in_float32(implementation):
    case = Case(5, 2, 1, norm_beta=1.0, weight_dtype="float32")
    inputs = make_inputs(case)
    shifted = dataclasses.replace(inputs, q_weight=inputs.q_weight + 1, k_weight=inputs.k_weight + 1)
    got = run(implementation, case, inputs)
    want = run(implementation, dataclasses.replace(case, norm_beta=0.0), shifted)
    assert_same(got, want)


def test_a_weight_of_negative_zero_counts_as_zero(implementation):
    case = Case(2, 2, 1)
    inputs = make_inputs(case)
    zeros = dataclasses.replace(inputs, k_weight=jnp.zeros_like(inputs.k_weight))
    negative = dataclasses.replace(inputs, k_weight=-zeros.k_weight)
    got, want = run(implementation, case, negative), run(implementation, case, zeros)
    assert_same(got, want)


def test_a_norm_beta_of_negative_zero_is_zero():
    """A kernel adds it to weights, and -0.0 + -0.0 would stay -0.0."""
    assert math.copysign(1, check_norm_beta(-0.0)) == 1


@pytest.mark.parametrize("section", [(11, 11, 10), (16, 8, 8), (32, 0, 0)])
def test_mrope_reads_three_different_rows(implementation, section):
    """Each row of positions matters exactly in the frequencies that it owns."""
    case = Case(6, 2, 1, mrope_section=section)
    inputs = make_inputs(case)
    want = np.asarray(run(implementation, case, inputs)[0], np.float32).reshape(6, 2, 256)
    for axis in range(3):
        moved = inputs.positions.at[axis].set((inputs.positions[axis] + 1) % case.max_position)
        got = run(implementation, case, dataclasses.replace(inputs, positions=moved))[0]
        changed = (np.asarray(got, np.float32).reshape(6, 2, 256) != want).any(axis=(0, 1))
        frequencies = changed[:32] | changed[32:64]
        owned = [j % 3 == axis and j < 3 * section[axis] if axis else None for j in range(32)]
        if axis == 0:
            owned = [not any(j % 3 == a and j < 3 * section[a] for a in (1, 2)) for j in range(32)]
        assert not changed[64:].any()
        # The slowest frequencies (theta 1e7) move by less than a bfloat16 step between neighbouring positions.
        assert not frequencies[~np.array(owned)].any()
        assert frequencies[:12][np.array(owned)[:12]].all()


def test_eager_and_jitted_calls_give_the_same_bits():
    case = Case(37, 5, 2)
    inputs = make_inputs(case)

    assert_same(op(case)(*inputs), jax.jit(op(case))(*inputs))


def test_the_result_does_not_depend_on_what_surrounds_the_call():
    """XLA may fuse the op with its neighbours; the bits stay."""
    case = Case(9, 3, 1, dtype="float16")
    inputs = make_inputs(case)

    @jax.jit
    def surrounded(q_gate, *rest):
        outputs = op(case)(q_gate * 2, *rest)
        return outputs, [x * 2 for x in outputs]

    got, _ = surrounded(*inputs)
    doubled = dataclasses.replace(inputs, q_gate=inputs.q_gate * 2)
    assert_same(got, op(case)(*doubled))


def test_donated_buffers_and_ahead_of_time_compilation():
    case = Case(16)
    inputs = make_inputs(case)
    want = op(case)(*inputs)
    compiled = jax.jit(op(case), donate_argnums=1).lower(*inputs).compile()
    k = jnp.array(inputs.k, copy=True)
    got = compiled(inputs.q_gate, k, *list(inputs)[2:])
    assert_same(got, want)
    assert k.is_deleted()


def test_numpy_arguments_and_a_list_for_the_section():
    case = Case(3, 2, 1, mrope_section=(11, 11, 10))
    inputs = make_inputs(case)
    arguments = case.static_arguments | {"mrope_section": [11, 11, 10], "eps": np.float32(case.eps)}
    got = pallas_qk.fused_qk_rmsnorm_rope_gate(*Inputs(*(np.asarray(x) for x in inputs)), **arguments)
    want = pallas_qk.fused_qk_rmsnorm_rope_gate(*inputs, **case.static_arguments | {"eps": float(np.float32(1e-6))})
    assert_same(got, want)
