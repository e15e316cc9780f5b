"""Each implementation against the Triton oracle, exchanged by DLPack: bits where they are promised, else the bound.

For tensors on a GPU the oracle is compiled; for those on a CPU Triton's interpreter runs it, whose sum, rsqrt and
bfloat16 rounding are its own. `python -m benchmarks verify` compares more elements.
"""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests import strategies
from tests.cases import ORDER_CASES, SMALL_CASES, Case, make_inputs
from tests.compare import assert_same
from tests.fuzz import runs
from tests.run import run

pytest.importorskip("torch")
pytest.importorskip("triton")

from benchmarks import suites
from benchmarks.agreement import agreement, in_form
from benchmarks.providers import oracle, to_jax
from benchmarks.verify import compare_cached

# Peers' own test sizes: float32 weights and table, int64 positions.
PEER_CASES = [
    Case(23, heads, kv_heads, head_dim, rotary_dim, weight_dtype="float32", cache_dtype="float32")
    for heads, kv_heads, head_dim, rotary_dim in [
        (16, 2, 256, 64),
        (16, 2, 256, 256),
        (32, 8, 128, 128),
        (28, 4, 128, 32),
    ]
]


def on_a_gpu(case: Case):
    """The case; random numbers of a large one pass through 16 bytes an element, which ask for a GPU of its own."""
    return pytest.param(case, marks=pytest.mark.alone) if case.num_outputs > 2**28 else case


def assert_agrees(implementation: str, case: Case, inputs, platform: str = "gpu") -> None:
    if not runs(implementation, case):
        pytest.skip(f"{implementation} leaves such sizes to the others")
    want = to_jax(oracle(case, inputs)())
    got = in_form(case, run(implementation, case, inputs), want)
    result = agreement(implementation, case, got, want, platform=platform)
    assert result.kept, str(result)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [on_a_gpu(c) for c in (*SMALL_CASES, *ORDER_CASES, *PEER_CASES, *suites.parity_gpu())],
    ids=lambda case: case.id,
)
def test_agrees_on_a_gpu(gpu, implementation, case):
    assert_agrees(implementation, case, make_inputs(case, seed=2))


@pytest.mark.parametrize("case", suites.parity_cpu(), ids=lambda case: case.id)
def test_agrees_with_the_interpreted_oracle(case):
    with jax.default_device(jax.devices("cpu")[0]):
        assert_agrees("xla", case, make_inputs(case, seed=2), platform="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [call for call in suites.parity_cached_gpu() if call.case.num_outputs < 2**27], ids=lambda case: case.id
)
def test_a_written_cache_agrees_on_a_gpu(gpu, implementation, case):
    """With the oracle's two launches: q, the gate, the caches, and what no slot names."""
    with strategies.x64(case):
        result = compare_cached(case, "gpu")(implementation)
    assert result.kept, str(result)


@pytest.mark.gpu
def test_int64_positions(gpu, implementation):
    with jax.enable_x64(True):
        case = dataclasses.replace(PEER_CASES[0], positions_dtype="int64")
        assert_agrees(implementation, case, make_inputs(case))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("value", ["zero", "nan", "inf", "negative zero weights"])
@pytest.mark.parametrize("num_tokens", [33, 16384])
def test_special_rows(gpu, implementation, dtype, value, num_tokens):
    case = Case(num_tokens, 3, 1, dtype=dtype)
    inputs = make_inputs(case)
    if value == "negative zero weights":
        inputs = dataclasses.replace(inputs, q_weight=jnp.full_like(inputs.q_weight, -0.0))
    elif value == "zero":
        inputs = dataclasses.replace(inputs, k=inputs.k.at[4].set(0))
    else:
        inputs = dataclasses.replace(inputs, q_gate=inputs.q_gate.at[7, 3].set(float(value)))
    want = to_jax(oracle(case, inputs)())
    got = run(implementation, case, inputs)
    if implementation == "xla" and value in ("nan", "inf"):  # which NaN comes out is the compiler's affair
        got, want = ([jnp.nan_to_num(x, nan=1.0) for x in outputs] for outputs in (got, want))
    assert_same(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [4096, 16384])
def test_reruns_give_the_same_bits(gpu, implementation, num_tokens):
    case = Case(num_tokens)
    inputs = make_inputs(case)
    first = run(implementation, case, inputs)
    for _ in range(10):
        assert_same(run(implementation, case, inputs), first)


@pytest.mark.gpu
@pytest.mark.alone
def test_offsets_past_2_to_the_31(gpu, implementation):
    """q_gate holds 2.4e9 elements; a few tokens of both ends give the bits that they give alone."""
    case = Case(147456, 32, 1)
    inputs = make_inputs(case)
    got = run(implementation, case, inputs)
    for rows in (slice(0, 64), slice(-64, None)):
        part = dataclasses.replace(
            inputs, q_gate=inputs.q_gate[rows], k=inputs.k[rows], positions=inputs.positions[rows]
        )
        want = run(implementation, dataclasses.replace(case, num_tokens=64), part)
        assert_same([x[rows] for x in got], want)


@pytest.mark.gpu
@pytest.mark.alone
def test_table_offsets_past_2_to_the_31(gpu, implementation):
    max_position = 2**25 + 1000
    case = Case(64, 2, 1, max_position=4096)
    inputs = make_inputs(case)
    table = jnp.zeros((max_position, 64), jnp.bfloat16).at[-4096:].set(inputs.cos_sin_cache)
    far = dataclasses.replace(inputs, cos_sin_cache=table, positions=inputs.positions + (max_position - 4096))
    got = run(implementation, dataclasses.replace(case, max_position=max_position), far)
    assert_same(got, run(implementation, case, inputs))
