"""What both backward kernels claim: gradients by their definition in float64, and in which bits.

Mosaic GPU's code is executed by its interpreter, on a GPU too; Triton's where there is no GPU. What concerns one of
them is in `test_mosaic_gpu_vjp` and `test_triton_vjp`.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_qk import _implementations
from tests import forms, strategies
from tests.cases import LAYOUT_CASES, SMALL_CASES, Case, Inputs, make_cotangents, make_inputs
from tests.compare import assert_same
from tests.gradients import assert_defined, define_gradients
from tests.lowering import GPU_IMPLEMENTATIONS, lowered
from tests.run import has_gpu, run_backward

# Each layout, dtype and option once; together they take half a minute in interpret mode.
TRITON_CASES = (
    Case(5, 4, 2),
    Case(5, 3, 1, dtype="float16"),
    Case(5, 3, 1, dtype="float32", rotary_dim=256),
    Case(7, 3, 1, head_dim=80, rotary_dim=40, dtype="float16"),
    Case(3, 2, 5, head_dim=96, rotary_dim=96, cache_dtype="float32", norm_beta=1.0),
    Case(3, 12, 1, head_dim=128, rotary_dim=64, weight_dtype="float32"),
    Case(3, 1, 2, head_dim=32, rotary_dim=2, dtype="float16"),
    Case(2, 1, 3, head_dim=512, rotary_dim=256, weight_dtype="float32", cache_dtype="float32"),
    Case(3, 4, 2, mrope_section=(11, 11, 10)),
    Case(7, 3, 1, mrope_section=(18, 5, 9), cache_dtype="float32"),
    Case(3, 3, 2, head_dim=80, rotary_dim=36, dtype="float32", mrope_section=(6, 6, 6)),
    Case(3, scale=1e4),
    Case(3, scale=1e-20, dtype="float32"),
    Case(3, 3, 2, head_dim=80, rotary_dim=36, dtype="float32", mrope_section=(6, 6, 6), rotation="pairs"),
    Case(5, 3, 1, head_dim=64, rotary_dim=6, rotation="pairs", round_norm=False),
)
MROPE = (11, 11, 10)


def in_one_dtype_each(cases) -> list[Case]:
    """Of those that differ in the dtype alone one, by turns; `test_mosaic_gpu` takes all of them."""
    groups: dict[Case, list[Case]] = {}
    for case in cases:
        groups.setdefault(dataclasses.replace(case, dtype=""), []).append(case)
    return [group[place % len(group)] for place, group in enumerate(groups.values())]


def gradients(implementation: str, case: Case, inputs: Inputs, cotangents, **config) -> list[jax.Array]:
    """On two multiprocessors even small cases have several rows a warp."""
    num_sms = 2 if implementation == "mosaic_gpu" else None
    return run_backward(implementation, case, inputs, cotangents, num_sms=num_sms, **config)


def named(value) -> str:
    return value.id if isinstance(value, Case) else str(value)


@pytest.mark.parametrize(
    "implementation, case",
    [
        *(("mosaic_gpu", case) for case in (*SMALL_CASES, *in_one_dtype_each(LAYOUT_CASES))),
        *(("triton", case) for case in TRITON_CASES),
    ],
    ids=named,
)
def test_equal_their_float64_definition(implementation, case):
    inputs = strategies.inside(case, strategies.make_inputs(case, seed=1))
    cotangents = make_cotangents(case, seed=1)
    got = gradients(implementation, case, inputs, cotangents)
    assert_defined(got, define_gradients(case, inputs, cotangents, round_dweights=False)[:4])


@pytest.mark.parametrize(
    "implementation, case",
    [
        *(("mosaic_gpu", Case(*x, mrope_section=MROPE)) for x in ((1, 1, 1), (1, 5, 1), (2, 1, 7), (37, 2, 3))),
        ("triton", Case(13, 5, 2)),
    ],
    ids=named,
)
def test_a_token_alone_gives_the_bits_it_gives_in_a_batch(implementation, case):
    """In the gradients of q_gate and k; the weights' are sums over tokens."""
    inputs, cotangents = make_inputs(case), make_cotangents(case)
    together = gradients(implementation, case, inputs, cotangents)
    for token in {0, case.num_tokens // 2, case.num_tokens - 1}:
        rows = slice(token, token + 1)
        one = dataclasses.replace(
            inputs, q_gate=inputs.q_gate[rows], k=inputs.k[rows], positions=inputs.positions[..., rows]
        )
        alone = gradients(implementation, dataclasses.replace(case, num_tokens=1), one, [x[rows] for x in cotangents])
        assert_same(alone[:2], [x[rows] for x in together[:2]])


@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_no_tokens_need_no_kernel(implementation, dtype):
    case = Case(0, dtype=dtype)
    backward = functools.partial(_implementations.module(implementation).backward, options=forms.options(case))
    program = lowered(backward, *forms.types(case))
    assert "custom_call" not in program.as_text()
    assert [x.shape for x in jax.tree.leaves(program.out_info)] == [(0, 16, 512), (0, 2, 256), (256,), (256,)]
    got = gradients(implementation, case, make_inputs(case), make_cotangents(case))
    assert [x.dtype for x in got] == [dtype, dtype, jnp.float32, jnp.float32]
    assert not any(np.asarray(x).any() for x in got)


@pytest.mark.parametrize(
    "implementation, dtype, section, x64",
    [
        *(("mosaic_gpu", dtype, MROPE, True) for dtype in ("int32", "int64", "uint32", "int8")),
        *(("mosaic_gpu", dtype, MROPE, False) for dtype in ("int32", "uint32", "int8")),
        *(("triton", dtype, None, dtype == "int64") for dtype in ("int32", "int64", "uint32")),
        ("triton", "int32", MROPE, False),
    ],
    ids=str,
)
def test_a_position_outside_the_table_reads_row_0(implementation, dtype, section, x64):
    """With three rows of positions its own lanes do; the others read what the other two rows say."""
    case = Case(28, 2, 1, mrope_section=section, max_position=100)
    info = np.iinfo(dtype)
    candidates = (-1, 100, 2**31 - 1, -(2**31), 2**31 + 3, 2**32 + 3, 3 - 2**32, info.min, info.max)
    outside = [p for p in candidates if info.min <= p <= info.max and not 0 <= p < case.max_position]
    with jax.enable_x64(x64):
        inputs, cotangents = make_inputs(case), make_cotangents(case)
        positions, inside = (np.array(inputs.positions).astype(dtype) for _ in range(2))
        for token, (position, axis) in enumerate(itertools.product(outside, range(3 if section else 1))):
            place = (axis, token) if section else token
            positions[place], inside[place] = position, 0
        got, want = (
            gradients(implementation, case, dataclasses.replace(inputs, positions=jnp.asarray(x)), cotangents)
            for x in (positions, inside)
        )
    assert_same(got, want)


@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
def test_cotangents_of_gates_keep_their_bits_and_rows_their_nans(implementation):
    case = Case(4, 2, 1)
    inputs, (dq_out, dk_out, _) = make_inputs(case), make_cotangents(case)
    bits = np.random.default_rng(0).integers(0, 2**16, size=(4, 2, 256), dtype=np.uint16)
    # Signalling and quiet NaNs, infinities, a subnormal, -0.0.
    bits[1, 1, :8] = [0x7F81, 0xFFC5, 0xFFC1, 0x7FFF, 0x7F80, 0xFF80, 0x0001, 0x8000]
    dgate_out = jnp.asarray(bits.reshape(4, -1).view(jnp.bfloat16))
    dq_out = dq_out.at[2, 17].set(jnp.nan)
    dq_gate = gradients(implementation, case, inputs, (dq_out, dk_out, dgate_out))[0]
    dq, gate = np.split(np.asarray(dq_gate).reshape(4, 2, 512), 2, axis=-1)
    got = np.ascontiguousarray(gate).view(np.uint16)
    if implementation == "triton" and not has_gpu():
        # Interpret mode passes bfloat16 through float32 and back, which keeps of a NaN only that it is one.
        is_nan = (bits & 0x7FFF) > 0x7F80
        assert ((got[is_nan] & 0x7FFF) > 0x7F80).all()
        got, bits = got[~is_nan], bits[~is_nan]
    np.testing.assert_array_equal(got, bits)
    nan = np.isnan(dq.astype(np.float32))
    assert nan[2, 0].all() and nan.any(axis=-1).sum() == 1


@pytest.mark.gpu
@pytest.mark.parametrize(
    "implementation, case",
    [
        ("mosaic_gpu", Case(1)),
        ("mosaic_gpu", Case(37, 6, 1, mrope_section=MROPE)),
        ("mosaic_gpu", Case(300, 3, 5, head_dim=80, rotary_dim=40, dtype="float16", norm_beta=1.0)),
        ("mosaic_gpu", Case(4096)),
        ("mosaic_gpu", Case(1000, 4, 2, head_dim=128, rotary_dim=128, dtype="float32")),
        ("triton", Case(4096)),
        ("triton", Case(4095, 15, 1, dtype="float16", mrope_section=MROPE)),
        ("triton", Case(4096, 16, 4, head_dim=80, rotary_dim=40, cache_dtype="float32")),
        pytest.param("triton", Case(16384, 32, 2), marks=pytest.mark.alone),
    ],
    ids=named,
)
def test_reruns_give_equal_bits_on_a_gpu(gpu, implementation, case):
    inputs, cotangents = make_inputs(case), make_cotangents(case)
    first = run_backward(implementation, case, inputs, cotangents)
    if implementation == "mosaic_gpu":  # whose tests above do without the GPU
        assert_defined(first, define_gradients(case, inputs, cotangents, round_dweights=False)[:4])
    for _ in range(10):
        assert_same(run_backward(implementation, case, inputs, cotangents), first)
