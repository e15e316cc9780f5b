"""The torch functions: the eager reference by the definition, the Triton kernel by the reference.

Without a GPU Triton's interpreter runs the kernel. `test_tree` and `test_parity` hold the compiled kernel's bits.
"""

import collections
import itertools
import re
import subprocess
import sys

import numpy as np
import pytest

from pallas_qk.dlpack import from_torch, to_torch
from tests import tolerances
from tests.cases import ORDER_CASES, SMALL_CASES, Case, make_inputs
from tests.compare import assert_same, assert_within, compare_outputs
from tests.definition import assert_defined, axes, define, mrope_axis

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import interpreter

from torch_ref import reference, triton_oracle

FUNCTIONS = {
    "reference": reference.fused_qk_rmsnorm_rope_gate,
    "oracle": triton_oracle.fused_qk_rmsnorm_rope_gate,
}
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}


# Counts that end inside the table, each elsewhere; with (11, 11, 10) both ends lie past the last frequency read.
UNEVEN = Case(5, 1, 2, head_dim=80, rotary_dim=64, dtype="float16", mrope_section=(18, 5, 9))


@pytest.fixture(params=FUNCTIONS)
def function(request):
    return FUNCTIONS[request.param]


def torch_inputs(case, seed=0):
    return [x if x is None else to_torch(x) for x in make_inputs(case, seed)]


def call(function, case, tensors, **options):
    return function(*tensors, **case.static_arguments, **options)


def assert_same_bits(got, want):
    assert_same(*([from_torch(x) for x in outputs] for outputs in (got, want)))


def assert_near(case, got, want, *, platform, rotation="halves", round_norm=True):
    """`got` and `want` differ by what another order of the sum, another rsqrt and the final rounding explain."""
    got, want = ([from_torch(x) for x in in_halves(case, outputs, rotation)] for outputs in (got, want))
    bound = max_rest = tolerances.float32_bound(case, tree=False)
    if case.dtype != "float32":
        bound, max_rest = tolerances.max_pair_ulps(case, platform, round_trip=False), 1.0
        if not round_norm:  # the final rounding alone, which the interpreter does as it likes to bfloat16
            bound = 1.5 if (case.dtype, platform) == ("bfloat16", "cpu") else 1.0
    for name, a, b in zip(("q_out", "k_out"), got, want, strict=False):
        rotated, rest = tolerances.worst_distances(a, b, case.head_dim, case.rotary_dim, case.rotation)
        assert rotated <= bound and rest <= max_rest, (name, float(rotated), float(rest), bound)
    if case.dtype == "float16":
        compared = compare_outputs(got, want)
        assert compared.differing <= tolerances.max_differing(case, compared.elements, "cpu"), str(compared)
    assert_same(got[2:], want[2:])  # the gate


def in_halves(case, outputs, rotation):
    """The lanes of q_out and k_out in the places that they have in halves, where `tolerances` looks for pairs."""
    if rotation == "halves":
        return outputs
    order = [*range(0, case.rotary_dim, 2), *range(1, case.rotary_dim, 2), *range(case.rotary_dim, case.head_dim)]
    return [*(x.unflatten(1, (-1, case.head_dim))[..., order].flatten(1) for x in outputs[:2]), outputs[2]]


@pytest.mark.parametrize("case", [*SMALL_CASES, *ORDER_CASES, UNEVEN], ids=lambda case: case.id)
def test_reference_equals_the_definition(case):
    got = call(reference.fused_qk_rmsnorm_rope_gate, case, torch_inputs(case, seed=3))
    assert_defined([from_torch(x) for x in got], case, make_inputs(case, seed=3))


@pytest.mark.parametrize("mrope_section", [None, (3, 3, 2)])
def test_reference_in_float64_is_the_definition_without_roundings(mrope_section):
    case = Case(5, 3, 2, head_dim=40, rotary_dim=16, dtype="float32", mrope_section=mrope_section, norm_beta=0.5)
    *arrays, positions = torch_inputs(case)
    got = call(reference.fused_qk_rmsnorm_rope_gate, case, [*(x.double() for x in arrays), positions])
    want = define(case, make_inputs(case))
    for tensor, exact in zip(got, (want.q_out, want.k_out, want.gate_out), strict=True):
        assert tensor.dtype == torch.float64
        np.testing.assert_allclose(tensor.cpu().numpy(), exact, rtol=1e-13, atol=1e-13)


ORACLE_CASES = [
    Case(37, 3, 2, head_dim=64, rotary_dim=16, dtype="float16"),
    Case(1, 2, 1, dtype="float16"),
    Case(5, 2, 1, head_dim=80, rotary_dim=40, dtype="float16", norm_beta=1.0),
    Case(4, 1, 3, head_dim=96, rotary_dim=96, dtype="float16", cache_dtype="float32", weight_dtype="float32"),
    Case(6, 2, 1, head_dim=128, rotary_dim=6, dtype="float16", weight_scale=1e-5),
    Case(4, 2, 2, head_dim=16, rotary_dim=2, dtype="float16"),
    Case(3, 1, 1, head_dim=34, rotary_dim=34, dtype="float16", eps=1e-3),
    Case(9, 3, 1, head_dim=128, rotary_dim=64, dtype="float16", mrope_section=(11, 11, 10)),
    Case(5, 2, 2, head_dim=128, rotary_dim=128, dtype="float16", mrope_section=(24, 20, 20), cache_dtype="float32"),
    UNEVEN,
    Case(7, 2, 1),
    Case(3, 2, 1, head_dim=80, rotary_dim=80, mrope_section=(16, 12, 12), weight_dtype="float32"),
    Case(4, 2, 1, head_dim=96, rotary_dim=24, dtype="float32"),
    Case(3, 2, 1, head_dim=64, rotary_dim=64, dtype="float32", mrope_section=(11, 11, 10), norm_beta=1.0),
]


@pytest.mark.parametrize("case", ORACLE_CASES, ids=lambda case: case.id)
def test_oracle_equals_the_reference(case):
    tensors = [x.cpu() for x in torch_inputs(case, seed=4)]
    got, want = (call(function, case, tensors) for function in FUNCTIONS.values())
    assert_near(case, got, want, platform="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*ORACLE_CASES, *SMALL_CASES, *ORDER_CASES], ids=lambda case: case.id)
def test_compiled_oracle_equals_the_reference(gpu, case):
    tensors = torch_inputs(case, seed=4)
    got, want = (call(function, case, tensors) for function in FUNCTIONS.values())
    assert got[0].is_cuda
    assert_near(case, got, want, platform="gpu")


def state(case, inputs, rotation, round_norm):
    """q_out and k_out in float64, and the bound on the error of each: head by head and frequency by frequency.

    The bound is `definition`'s; there is a round trip only where `round_norm` asks for one.
    """
    q_gate, k, q_weight, k_weight, table = (np.asarray(x).astype(np.float64) for x in list(inputs)[:5])
    positions = np.broadcast_to(np.asarray(inputs.positions), (3, case.num_tokens))
    half = case.rotary_dim // 2
    roundoff = tolerances.ROUNDOFF[case.dtype]
    before_out = (roundoff if round_norm and case.dtype != "float32" else 0.0) + 16 * tolerances.ROUNDOFF["float32"]
    stated = []
    q = q_gate.reshape(case.num_tokens, case.num_q_heads, 2, case.head_dim)[:, :, 0]
    for x, weight in ((q, q_weight), (k.reshape(case.num_tokens, case.num_kv_heads, case.head_dim), k_weight)):
        y = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + case.eps) * (weight + case.norm_beta)
        out, size = y.copy(), abs(y)
        for frequency, axis in enumerate(axes(case)):
            one, other = (2 * frequency, 2 * frequency + 1) if rotation == "pairs" else (frequency, frequency + half)
            row = table[positions[axis]]
            cos, sin = row[:, frequency, None], row[:, half + frequency, None]
            turned = (y[..., one] + 1j * y[..., other]) * (cos + 1j * sin)
            out[..., one], out[..., other] = turned.real, turned.imag
            size[..., one] = abs(y[..., one] * cos) + abs(y[..., other] * sin)
            size[..., other] = abs(y[..., one] * sin) + abs(y[..., other] * cos)
        bound = (1 + roundoff) * before_out * size + roundoff * abs(out) + 3 * tolerances.SMALLEST[case.dtype]
        stated.append([array.reshape(case.num_tokens, -1) for array in (out, bound)])
    return stated


# Each with and without mRoPE; no rotation is the last.
OPTION_SIZES = [
    {"head_dim": head_dim, "rotary_dim": rotary_dim, "mrope_section": mrope_section}
    for head_dim, rotary_dim, section in ((80, 40, (8, 7, 5)), (64, 64, (11, 11, 10)), (96, 6, (1, 1, 1)))
    for mrope_section in (None, section)
] + [{"head_dim": 80, "rotary_dim": 0}]
ROTATIONS = pytest.mark.parametrize("rotation", ["halves", "pairs"])
ROUND_NORM = pytest.mark.parametrize("round_norm", [True, False])
EVERY_SIZE = pytest.mark.parametrize("sizes", OPTION_SIZES, ids=lambda sizes: "-".join(map(str, sizes.values())))


def option_tensors(case, seed=0):
    tensors = torch_inputs(case, seed)
    return tensors if case.rotary_dim else [*tensors[:4], None, None]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@ROTATIONS
@ROUND_NORM
@EVERY_SIZE
def test_reference_of_every_option_is_the_statement(dtype, rotation, round_norm, sizes):
    case = Case(3, 3, 2, dtype=dtype, norm_beta=0.5, weight_dtype="float32", cache_dtype="float32", **sizes)
    tensors = option_tensors(case, seed=5)
    got = call(reference.fused_qk_rmsnorm_rope_gate, case, tensors, rotation=rotation, round_norm=round_norm)
    for name, tensor, (exact, bound) in zip(
        ("q_out", "k_out"), got, state(case, make_inputs(case, seed=5), rotation, round_norm), strict=False
    ):
        assert tensor.dtype == tensors[0].dtype
        assert_within(name, from_torch(tensor), exact, bound)
    assert_same_bits(got[2:], [tensors[0].unflatten(1, (3, 2, case.head_dim))[:, :, 1].flatten(1)])


@ROTATIONS
@ROUND_NORM
@EVERY_SIZE
def test_reference_of_every_option_in_float64(rotation, round_norm, sizes):
    case = Case(3, 2, 1, dtype="float32", **sizes)
    tensors = [x.double() if x is not None and x.is_floating_point() else x for x in option_tensors(case)]
    got = call(reference.fused_qk_rmsnorm_rope_gate, case, tensors, rotation=rotation, round_norm=round_norm)
    for tensor, (exact, _) in zip(got, state(case, make_inputs(case), rotation, round_norm), strict=False):
        np.testing.assert_allclose(tensor.cpu().numpy(), exact, rtol=1e-13, atol=1e-13)


def options_near(case, tensors, platform, **options):
    got, want = (call(function, case, tensors, **options) for function in FUNCTIONS.values())
    assert_near(case, got, want, platform=platform, **options)
    return got


# The interpreter takes its time: all options of each size in one dtype each, by turns, so that any two meet.
@pytest.mark.parametrize(
    "dtype, rotation, round_norm, sizes",
    [
        (dtype, *options)
        for dtype, options in zip(
            itertools.cycle(("float16", "bfloat16", "float32")),
            itertools.product(("halves", "pairs"), (True, False), OPTION_SIZES),
            strict=False,
        )
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_oracle_of_every_option_equals_the_reference(dtype, rotation, round_norm, sizes):
    case = Case(3, 3, 2, dtype=dtype, norm_beta=1.0, **sizes)
    tensors = [x if x is None else x.cpu() for x in option_tensors(case, seed=6)]
    options_near(case, tensors, "cpu", rotation=rotation, round_norm=round_norm)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@ROTATIONS
@ROUND_NORM
@EVERY_SIZE
def test_compiled_oracle_of_every_option_equals_the_reference(gpu, dtype, rotation, round_norm, sizes):
    case = Case(33, 3, 2, dtype=dtype, norm_beta=1.0, **sizes)
    got = options_near(case, option_tensors(case, seed=6), "gpu", rotation=rotation, round_norm=round_norm)
    assert got[0].is_cuda


def test_the_default_is_halves_and_a_rounded_norm(function):
    case = Case(4, 2, 1, head_dim=64, rotary_dim=32, dtype="float16")
    tensors = torch_inputs(case)
    default = call(function, case, tensors)
    assert_same_bits(call(function, case, tensors, rotation="halves", round_norm=True), default)
    for options in ({"rotation": "pairs"}, {"round_norm": False}):
        other = call(function, case, tensors, **options)
        assert not any(torch.equal(a, b) for a, b in zip(other[:2], default[:2], strict=True)), options


@ROTATIONS
@EVERY_SIZE
def test_round_norm_changes_no_bit_of_float32(function, rotation, sizes):
    case = Case(9, 3, 2, dtype="float32", **sizes)
    tensors = option_tensors(case)
    want = call(function, case, tensors, rotation=rotation)
    assert_same_bits(call(function, case, tensors, rotation=rotation, round_norm=False), want)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@ROTATIONS
@ROUND_NORM
def test_lanes_that_nothing_rotates_have_the_bits_of_the_rest(function, dtype, rotation, round_norm):
    """Without a rotation, and past `rotary_dim`: there one rounding follows the norm, whatever the options are."""
    case = Case(5, 3, 2, head_dim=80, rotary_dim=40, dtype=dtype)
    *arrays, _, _ = tensors = torch_inputs(case)
    rotated = call(function, case, tensors, rotation=rotation, round_norm=round_norm)
    static = case.static_arguments | {"rotary_dim": 0}
    got = function(*arrays, None, None, **static, rotation=rotation, round_norm=round_norm)
    rest, want = ([x.unflatten(1, (-1, 80))[..., 40:].flatten(1) for x in outputs[:2]] for outputs in (got, rotated))
    assert_same_bits(rest, want)
    assert_same_bits(got[2:], rotated[2:])


def fused_interpreter():
    """Whether the interpreter rounds an fma once, as Triton 3.9's does and 3.6's does not."""
    x, y, z = (
        interpreter.TensorHandle(np.array([number], np.float32), tl.float32)
        for number in (1 + 2**-12, 1 + 2**-12, -(1 + 2**-11))
    )
    return interpreter.interpreter_builder.create_fma(x, y, z).data[0] == 2**-24


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("rotation, round_norm", [("pairs", True), ("pairs", False), ("halves", False)])
def test_the_source_says_which_product_is_rounded(request, device, rotation, round_norm):
    """Rows of 1 and -1 normalise to the weights and these signs, in bits; zeros of both signs are among them."""
    if device == "cuda":
        request.getfixturevalue("gpu")
    elif not fused_interpreter():
        pytest.skip("this Triton's interpreter rounds an fma twice")
    dtype = torch.float32 if rotation == "pairs" else torch.float16  # the default's arithmetic is float32's in halves
    random = np.random.default_rng(0)
    weight, table = (random.standard_normal(shape, np.float32) for shape in ((64,), (200, 64)))
    signs = random.choice(np.array([1, -1], np.float32), 64)
    weight[:12] = weight[32:36] = 0
    table[:8] = random.choice(np.array([0, -0.0, 1, -1], np.float32), (8, 64))
    tensors = [torch.tensor(signs, dtype=dtype).repeat(200, heads) for heads in (2, 1)]
    tensors += [torch.tensor(weight)] * 2 + [torch.tensor(table), torch.arange(200, dtype=torch.int32)]
    case = Case(200, 1, 1, head_dim=64, rotary_dim=64, eps=0.0)
    tensors = [x.to(device) for x in tensors]
    options = {"rotation": rotation, "round_norm": round_norm}
    got = call(triton_oracle.fused_qk_rmsnorm_rope_gate, case, tensors, **options)[1]

    y = signs * weight
    y1, y2 = (y[0::2], y[1::2]) if rotation == "pairs" else (y[:32], y[32:])
    cos, sin = table[:, :32], table[:, 32:]
    # A product of float32 numbers is exact in float64. Its sums here lie near no tie of float32.
    want = [
        (y1.astype(np.float64) * cos + -(y2 * sin).astype(np.float64)).astype(np.float32),
        (y1.astype(np.float64) * sin + (y2 * cos).astype(np.float64)).astype(np.float32),
    ]
    want = np.stack(want, axis=-1).reshape(200, 64) if rotation == "pairs" else np.concatenate(want, axis=1)
    assert_same_bits([got.cpu()], [torch.tensor(want).to(dtype)])


@pytest.mark.parametrize("positions_dtype", ["int32", "int64"])
@pytest.mark.parametrize("mrope_section", [None, (3, 3, 2)])
def test_positions_of_both_integer_types_give_the_same_bits(function, positions_dtype, mrope_section):
    case = Case(6, 2, 1, head_dim=64, rotary_dim=16, dtype="float16", mrope_section=mrope_section)
    *arrays, positions = torch_inputs(case)
    got = call(function, case, [*arrays, positions.to(getattr(torch, positions_dtype))])
    assert_same_bits(got, call(function, case, [*arrays, positions]))


def test_each_row_of_positions_is_read_by_its_own_frequencies(function):
    """Rows of positions exchanged move exactly the lanes of the axes that changed."""
    case = Case(5, 1, 1, head_dim=64, rotary_dim=64, dtype="float16", mrope_section=(11, 11, 10))
    *arrays, positions = torch_inputs(case)
    before = call(function, case, [*arrays, positions])[0]
    axes = torch.tensor([mrope_axis(j, case.mrope_section) for j in range(32)]).repeat(2)
    for changed in range(3):
        moved = positions.clone()
        moved[changed] = (moved[changed] + 1) % case.max_position
        differs = (call(function, case, [*arrays, moved])[0] != before).any(dim=0).cpu()
        assert not differs[axes != changed].any()
        assert differs[axes == changed].float().mean() > 0.5  # slow frequencies may round to the same value


@pytest.mark.parametrize("offset", [0, 1])
def test_strided_tokens_give_the_bits_of_dense_ones(function, offset):
    """q_gate and k as columns of one projection, at addresses that are no multiple of 16 bytes either."""
    case = Case(5, 3, 1, head_dim=40, rotary_dim=16, dtype="float16")
    q_gate, k, *rest = torch_inputs(case)
    packed = torch.cat([q_gate, k, k], dim=1)
    padded = torch.zeros(5, packed.shape[1] + 1, dtype=packed.dtype, device=packed.device)
    columns = padded[:, offset : offset + packed.shape[1]]
    columns.copy_(packed)
    views = columns[:, : q_gate.shape[1]], columns[:, q_gate.shape[1] : q_gate.shape[1] + k.shape[1]]
    assert not any(x.is_contiguous() for x in views)
    assert_same_bits(call(function, case, [*views, *rest]), call(function, case, [q_gate, k, *rest]))


def test_positions_and_table_may_be_strided(function):
    case = Case(5, 2, 1, head_dim=32, rotary_dim=16, dtype="float16", mrope_section=(3, 3, 2))
    *arrays, table, positions = torch_inputs(case)
    strided_table = torch.cat([table, table], dim=1)[:, :16]
    strided_positions = positions.T.contiguous().T
    assert not strided_table.is_contiguous() and not strided_positions.is_contiguous()
    got = call(function, case, [*arrays, strided_table, strided_positions])
    assert_same_bits(got, call(function, case, [*arrays, table, positions]))


@pytest.mark.parametrize("weight_dtypes", [("float16", "float32"), ("float32", "float16")])
def test_the_two_weights_may_differ_in_dtype(function, weight_dtypes):
    case = Case(3, 2, 1, head_dim=64, rotary_dim=16, dtype="float16")
    q_gate, k, q_weight, k_weight, *rest = torch_inputs(case)
    weights = [w.to(getattr(torch, dtype)) for w, dtype in zip((q_weight, k_weight), weight_dtypes, strict=True)]
    got = call(function, case, [q_gate, k, *weights, *rest])
    assert_same_bits(got, call(function, case, [q_gate, k, q_weight, k_weight, *rest]))


def test_weights_may_be_misaligned_and_require_grad(function):
    case = Case(3, 2, 1, head_dim=64, rotary_dim=16, dtype="float16")
    q_gate, k, q_weight, k_weight, *rest = torch_inputs(case)
    shifted = torch.cat([q_weight[:1], q_weight])[1:]
    assert shifted.data_ptr() % 16
    got = call(function, case, [q_gate, k, torch.nn.Parameter(shifted), torch.nn.Parameter(k_weight), *rest])
    assert_same_bits([x.detach() for x in got], call(function, case, [q_gate, k, q_weight, k_weight, *rest]))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("mrope_section", [None, (11, 11, 10)])
def test_no_tokens(function, dtype, mrope_section):
    case = Case(0, dtype=dtype, mrope_section=mrope_section)
    outputs = call(function, case, torch_inputs(case))
    assert [tuple(x.shape) for x in outputs] == [(0, 4096), (0, 512), (0, 4096)]
    assert {x.dtype for x in outputs} == {getattr(torch, dtype)}


@pytest.mark.parametrize("dtype", BITS, ids=str)
def test_gate_keeps_every_bit_in_memory_of_its_own(function, dtype):
    """NaN payloads, infinities, subnormals and signed zeros; one head, whose gate is a plain slice of the input."""
    case = Case(1, 1, 1, head_dim=256, rotary_dim=64, dtype=str(dtype).removeprefix("torch."))
    q_gate, *rest = torch_inputs(case)
    limits = torch.iinfo(BITS[dtype])
    bits = torch.randint(limits.min, limits.max, (256,), dtype=BITS[dtype], generator=torch.Generator().manual_seed(0))
    bits[:8] = torch.tensor([limits.max - n for n in range(8)], dtype=BITS[dtype])  # NaNs of eight payloads
    q_gate = q_gate.clone()
    q_gate[0, 256:] = bits.to(q_gate.device).view(dtype)
    gate_out = call(function, case, [q_gate, *rest])[2]
    assert gate_out.isnan().sum() >= 8
    assert torch.equal(gate_out.view(BITS[dtype])[0].cpu(), bits)
    q_gate.zero_()
    assert torch.equal(gate_out.view(BITS[dtype])[0].cpu(), bits)


OUTSIDE = [
    (torch.int32, -1),
    (torch.int32, 4096),
    (torch.int32, 2**31 - 1),
    (torch.int32, -(2**31)),
    (torch.int64, 2**32 + 3),
    (torch.int64, -(2**32) + 1),
    (torch.uint32, 2**31 + 3),
    (torch.uint64, 2**64 - 1),
]


@pytest.mark.parametrize("dtype, outside", OUTSIDE, ids=str)
def test_a_position_past_the_table_gives_nan_in_its_rotated_lanes_and_a_negative_one_row_0(dtype, outside):
    case = Case(4, 2, 1, head_dim=32, rotary_dim=16, dtype="float16")
    *arrays, positions = [x.cpu() for x in torch_inputs(case)]

    def at(position):
        each = [position if token == 2 else p for token, p in enumerate(positions.tolist())]
        return call(reference.fused_qk_rmsnorm_rope_gate, case, [*arrays, torch.tensor(each, dtype=dtype)])

    got, want = at(outside), at(0)
    for a, b, name in zip(got, want, ("q", "k", "gate"), strict=True):
        nan = torch.zeros(4, a.shape[1] // 32, 32, dtype=torch.bool)
        if name != "gate":
            nan[2, :, :16] = outside > 0
        assert torch.equal(a.isnan(), nan.flatten(1)), name
        assert torch.equal(a[~a.isnan()], b[~a.isnan()]), name


@pytest.mark.parametrize("row", [0, 1, 2])
def test_one_bad_row_of_positions_spoils_only_its_own_lanes(row):
    case = Case(3, 1, 1, head_dim=80, rotary_dim=64, dtype="float16", mrope_section=(11, 11, 10))
    *arrays, positions = [x.cpu() for x in torch_inputs(case)]
    want = call(reference.fused_qk_rmsnorm_rope_gate, case, [*arrays, positions])
    bad = positions.clone()
    bad[row, 1] = 2**30
    got = call(reference.fused_qk_rmsnorm_rope_gate, case, [*arrays, bad])
    lanes = torch.tensor([mrope_axis(j, case.mrope_section) == row for j in range(32)] * 2 + [False] * 16)
    for a, b in zip(got[:2], want[:2], strict=True):
        assert torch.equal(a[1].isnan(), lanes) and not a[[0, 2]].isnan().any()
        assert torch.equal(a[~a.isnan()], b[~a.isnan()])


@pytest.mark.parametrize("dtype", reference.POSITION_DTYPES, ids=str)
def test_reference_takes_every_integer_dtype(dtype):
    case = Case(6, 2, 1, head_dim=32, rotary_dim=16, dtype="float16", max_position=100)
    *arrays, positions = torch_inputs(case)
    got = call(reference.fused_qk_rmsnorm_rope_gate, case, [*arrays, positions.to(dtype)])
    assert_same_bits(got, call(reference.fused_qk_rmsnorm_rope_gate, case, [*arrays, positions]))


@pytest.mark.parametrize("mrope_section", [None, (1, 1, 0)])
@pytest.mark.parametrize("rotary_dim", [4, 6])
@ROTATIONS
def test_reference_gradients_by_finite_differences(mrope_section, rotary_dim, rotation):
    mrope_section = mrope_section and (rotary_dim // 2 - 1, 1, 0)
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()

    positions = torch.tensor([4, 0] if mrope_section is None else [[4, 0], [1, 3], [2, 2]])

    def outputs(q_gate, k, q_weight, k_weight, table):
        return reference.fused_qk_rmsnorm_rope_gate(
            q_gate,
            k,
            q_weight,
            k_weight,
            table,
            positions,
            1e-3,
            2,
            1,
            6,
            rotary_dim,
            mrope_section,
            1.0,
            rotation=rotation,
        )

    arguments = random(2, 2 * 2 * 6), random(2, 6), random(6), random(6), random(5, rotary_dim)
    assert torch.autograd.gradcheck(outputs, arguments)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reference_differentiates_the_round_trip_as_the_identity(dtype):
    """With weights of 1 and no rotation the norm's derivative is a projection: it lengthens no error.

    Two roundings of the gradient remain, at the round trip and at the input, half an ulp each.
    """
    case = Case(16, 2, 1, head_dim=64, rotary_dim=16, dtype=dtype)
    gradients = []
    for compute in (getattr(torch, dtype), torch.float64):
        q_gate, k, *_, positions = [x.cpu() for x in torch_inputs(case)]
        table = torch.cat([torch.ones(4096, 8), torch.zeros(4096, 8)], dim=1)
        q_gate = q_gate.to(compute).requires_grad_()
        tensors = [q_gate, k.to(compute), torch.ones(64), torch.ones(64), table, positions]
        cotangent = torch.randn(16, 128, generator=torch.Generator().manual_seed(1)).to(getattr(torch, dtype))
        call(reference.fused_qk_rmsnorm_rope_gate, case, tensors)[0].backward(cotangent.to(compute))
        gradients.append(q_gate.grad.double())
    low, high = gradients
    assert (low - high).norm() <= 2 * tolerances.ROUNDOFF[dtype] * high.norm()


def test_oracle_output_requires_no_grad():
    case = Case(2, 2, 1, head_dim=32, rotary_dim=16)
    q_gate, *rest = torch_inputs(case)
    outputs = call(triton_oracle.fused_qk_rmsnorm_rope_gate, case, [q_gate.clone().requires_grad_(), *rest])
    assert not any(x.requires_grad for x in outputs)


def test_interpreting_leaves_triton_as_it_was():
    case = Case(1, 1, 1, head_dim=32, rotary_dim=16)
    tensors = [x.cpu() for x in torch_inputs(case)]
    places = tl, tl.core, tl.math, tl.tensor, tl.dtype, triton_oracle
    before = [{name: getattr(place, name, None) for name in dir(place)} for place in places]
    call(triton_oracle.fused_qk_rmsnorm_rope_gate, case, tensors)
    for place, names in zip(places, before, strict=True):
        changed = [name for name, value in names.items() if getattr(place, name, None) != value]
        assert not changed, (place, changed)


COMPILED = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")


def compile_oracle(head_dim, aligned=True, fusion=True, kernel=triton_oracle._qk_rmsnorm_rope_gate, **changes):
    """`aligned`: whether Triton knows the addresses and strides of q_gate and k to be multiples of 16."""
    block = triton.next_power_of_2(head_dim)
    constants = {
        "num_q_heads": 3,
        "num_kv_heads": 1,
        "head_dim": head_dim,
        "half_rotary": 8,
        "eps": 1e-6,
        "norm_beta": 0.0,
        "dtype": tl.bfloat16,
        "row_block": block,
        "half_block": 8,
        "mrope_section": None,
        "pairs": False,
        "explicit_fma": False,
        "wide_offsets": False,
        "position_stride": 1,
        "position_axis_stride": 1,
    } | changes
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = "*i32" if name == "positions_ref" else "*bf16" if name.endswith("_ref") else "i32"
        if aligned or not name.startswith(("q_gate_", "k_ref", "k_stride")):
            attributes[index,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()}, attributes)
    num_warps = max(1, block // 64)
    options = {"num_warps": num_warps, "num_stages": 2, "enable_fp_fusion": fusion}
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    assert compiled.metadata.enable_fp_fusion == fusion and compiled.metadata.num_warps == num_warps
    return compiled.asm


UNROTATED = {"half_rotary": 0, "half_block": 0, "cos_sin_ref": None, "positions_ref": None}
EXPLICIT = {
    "pairs": {"pairs": True, "explicit_fma": True},
    "pairs in float32": {"pairs": True, "explicit_fma": True, "dtype": tl.float32},
    "halves in float32": {"explicit_fma": True, "dtype": tl.float32},
}


@COMPILED
@pytest.mark.parametrize("form", [{}, *EXPLICIT.values(), UNROTATED], ids=["default", *EXPLICIT, "no rotation"])
@pytest.mark.parametrize(
    "head_dim, aligned, lanes",
    [(256, True, 2), (256, False, 2), (40, False, 2), (81, False, 2), (32, False, 1)],
)
def test_compiled_row_layout_does_not_depend_on_the_activations_addresses(head_dim, aligned, lanes, form):
    """The order of the sum follows from the lanes that a thread holds: two neighbours, one up to 32 lanes."""
    ttgir = compile_oracle(head_dim, aligned, **form)["ttgir"]
    layout = re.search(r'"tt\.reduce".*?: \(tensor<\d+xf32, (#\w+)>\) -> f32', ttgir, re.DOTALL).group(1)
    assert f"{layout} = #ttg.blocked<{{sizePerThread = [{lanes}], threadsPerWarp = [32]" in ttgir


@COMPILED
@pytest.mark.parametrize("form", EXPLICIT)
def test_the_compiler_has_no_say_in_an_explicit_rotation(form):
    """After the row's sum come two fmas for each pair, and as many sums, whether products may be fused or not."""

    def after_the_sum(changes, fusion):
        ptx = compile_oracle(256, fusion=fusion, **changes)["ptx"]
        return collections.Counter(re.findall(r"\b(fma|add|sub)(?:\.rn)?\.f32", ptx.partition("rsqrt.")[2]))

    fused, separate = (after_the_sum(EXPLICIT[form], fusion) for fusion in (True, False))
    assert fused == separate and fused["fma"] == 2
    assert after_the_sum({}, True) != after_the_sum({}, False)


@COMPILED
@pytest.mark.parametrize("head_dim", [16, 24, 32])
def test_one_lane_a_thread_has_rounded_squares_where_the_rotation_comes_first(head_dim):
    """No square is fused into the first sum of two threads, which would then disagree."""
    ptx = compile_oracle(head_dim, kernel=triton_oracle._qk_rope_rmsnorm_gate, dtype=tl.float32)["ptx"]
    sums = re.findall(r"\b(fma|add)(?:\.rn)?\.f32", ptx.partition("shfl.")[2].partition("rsqrt.")[0])
    *sums, with_eps = sums  # which Triton 3.6 adds to a quotient
    assert sums == ["add"] * (triton.next_power_of_2(head_dim).bit_length() - 1) and with_eps in ("add", "fma")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [40, 256])
def test_compiled_oracle_gives_the_same_bits_from_any_address(gpu, head_dim):
    case = Case(33, 3, 1, head_dim=head_dim, rotary_dim=16)
    q_gate, k, *rest = torch_inputs(case)
    want = call(triton_oracle.fused_qk_rmsnorm_rope_gate, case, [q_gate, k, *rest])
    shifted = [torch.cat([x[:, :1], x], dim=1)[:, 1:] for x in (q_gate, k)]
    assert all(x.data_ptr() % 16 and x.stride(0) % 2 for x in shifted)
    assert_same_bits(call(triton_oracle.fused_qk_rmsnorm_rope_gate, case, [*shifted, *rest]), want)


@pytest.mark.gpu
@pytest.mark.alone
def test_compiled_oracle_reaches_offsets_past_2_to_the_31(gpu):
    case = Case(2, 2, 1)
    q_gate, *rest = torch_inputs(case)
    memory = torch.zeros(2**31 + q_gate.shape[1], dtype=q_gate.dtype, device=q_gate.device)
    far = memory.as_strided(q_gate.shape, (2**31, 1))
    far.copy_(q_gate)
    got = call(triton_oracle.fused_qk_rmsnorm_rope_gate, case, [far, *rest])
    assert_same_bits(got, call(triton_oracle.fused_qk_rmsnorm_rope_gate, case, [q_gate, *rest]))


CASE = Case(4, 3, 2, head_dim=64, rotary_dim=16)
MROPE = (3, 3, 2)
ROTARY = "rotary_dim must be even and between 2 and head_dim = 64, got {}. Pass int(partial_rotary_factor * head_dim)."
SECTION = (
    "mrope_section must be three counts that sum to rotary_dim // 2 = 8, got {}. Pass those of time, height and width."
)
ROTATION = (
    "rotation must be 'halves' or 'pairs', got {}. Pass 'pairs' where lanes 2i and 2i + 1 rotate together, as in GPT-J."
)
MISSING = "{} must be a tensor beside {}, got None. Pass both, or neither and rotary_dim=0."
NOTHING = {"cos_sin_cache": None, "positions": None, "rotary_dim": 0}
NO_TABLE = "{} without cos_sin_cache and positions, got {}. {}"
SHAPE = "{} must have shape {}, got {}. Check the sizes given."
DTYPE = "{} must be {}, got torch.{}. Cast it with to()."
DEVICE = "{} must be on cpu, like q_gate, got meta. Move it there."


def zeros(*shape, dtype="bfloat16", device="cpu"):
    return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)


BAD_CALLS = [
    (ValueError, ROTARY.format(0), {"rotary_dim": 0}),
    (ValueError, ROTARY.format(-2), {"rotary_dim": -2}),
    (ValueError, ROTARY.format(7), {"rotary_dim": 7}),
    (ValueError, ROTARY.format(66), {"rotary_dim": 66}),
    (ValueError, ROTARY.replace("64", "0").format(16), {"head_dim": 0}),
    (ValueError, SECTION.format("(4, 4)"), {"mrope_section": [4, 4]}),
    (ValueError, SECTION.format("(4, 4, 4)"), {"mrope_section": (4, 4, 4)}),
    (ValueError, SECTION.format("(9, -1, 0)"), {"mrope_section": (9, -1, 0)}),
    (ValueError, ROTATION.format("'interleaved'"), {"rotation": "interleaved"}),
    (ValueError, ROTATION.format("None"), NOTHING | {"rotation": None}),
    (ValueError, MISSING.format("positions", "cos_sin_cache"), {"positions": None}),
    (ValueError, MISSING.format("cos_sin_cache", "positions"), {"cos_sin_cache": None}),
    (ValueError, MISSING.format("cos_sin_cache", "positions"), {"cos_sin_cache": None, "rotary_dim": 0}),
    (
        ValueError,
        NO_TABLE.format("rotary_dim must be 0", 16, "Pass both, or 0 for no rotation."),
        NOTHING | {"rotary_dim": 16},
    ),
    (
        ValueError,
        NO_TABLE.format("mrope_section must be None", "(0, 0, 0)", "Leave it out: no position is read."),
        NOTHING | {"mrope_section": (0, 0, 0)},
    ),
    (
        ValueError,
        "head_dim must be at least 1, got 0. Pass the number of lanes of a head.",
        NOTHING | {"head_dim": 0},
    ),
    (ValueError, SHAPE.format("k_weight", "(64,)", "(32,)"), NOTHING | {"k_weight": zeros(32)}),
    (TypeError, DTYPE.format("k", "bfloat16", "float16"), {"k": zeros(4, 128, dtype="float16")}),
    (
        TypeError,
        DTYPE.format("q_weight", "float16 or bfloat16 or float32", "float64"),
        {"q_weight": zeros(64, dtype="float64")},
    ),
    (
        TypeError,
        DTYPE.format("k_weight", "float16 or bfloat16 or float32", "int32"),
        {"k_weight": zeros(64, dtype="int32")},
    ),
    (
        TypeError,
        DTYPE.format("cos_sin_cache", "float16 or bfloat16 or float32", "float64"),
        {"cos_sin_cache": zeros(8, 16, dtype="float64")},
    ),
    (ValueError, SHAPE.format("q_gate", "(4, 384)", "(4, 192)"), {"q_gate": zeros(4, 192)}),
    (ValueError, SHAPE.format("q_gate", "(2, 384)", "(2, 2, 384)"), {"q_gate": zeros(2, 2, 384)}),
    (ValueError, SHAPE.format("q_gate", "(384,)", "()"), {"q_gate": zeros()}),
    (ValueError, SHAPE.format("q_gate", "(4, 0)", "(4, 384)"), {"num_q_heads": 0}),
    (ValueError, SHAPE.format("k", "(4, -64)", "(4, 128)"), {"num_kv_heads": -1}),
    (ValueError, SHAPE.format("k", "(4, 128)", "(5, 128)"), {"k": zeros(5, 128)}),
    (ValueError, SHAPE.format("k", "(4, 128)", "(4, 64)"), {"k": zeros(4, 64)}),
    (ValueError, SHAPE.format("q_weight", "(64,)", "(32,)"), {"q_weight": zeros(32)}),
    (ValueError, SHAPE.format("k_weight", "(64,)", "(1, 64)"), {"k_weight": zeros(1, 64)}),
    (ValueError, SHAPE.format("cos_sin_cache", "(8, 16)", "(8, 8)"), {"cos_sin_cache": zeros(8, 8)}),
    (ValueError, SHAPE.format("cos_sin_cache", "(1, 16)", "(0, 16)"), {"cos_sin_cache": zeros(0, 16)}),
    (ValueError, SHAPE.format("positions", "(4,)", "(5,)"), {"positions": zeros(5, dtype="int32")}),
    (ValueError, SHAPE.format("positions", "(4,)", "(3, 4)"), {"positions": zeros(3, 4, dtype="int32")}),
    (ValueError, SHAPE.format("positions", "(3, 4)", "(4,)"), {"mrope_section": MROPE}),
    (
        ValueError,
        SHAPE.format("positions", "(3, 4)", "(2, 4)"),
        {"mrope_section": MROPE, "positions": zeros(2, 4, dtype="int32")},
    ),
    (ValueError, DEVICE.format("k"), {"k": zeros(4, 128, device="meta")}),
    (ValueError, DEVICE.format("positions"), {"positions": zeros(4, dtype="int32", device="meta")}),
]


def bad_call(function, changes):
    tensors = {
        "q_gate": zeros(4, 384),
        "k": zeros(4, 128),
        "q_weight": zeros(64),
        "k_weight": zeros(64),
        "cos_sin_cache": zeros(8, 16),
        "positions": zeros(4, dtype="int32"),
    }
    return function(**(tensors | CASE.static_arguments | changes))


@pytest.mark.parametrize("exception, message, changes", BAD_CALLS, ids=[message[:40] for _, message, _ in BAD_CALLS])
def test_a_bad_call_names_rule_value_and_remedy(function, exception, message, changes):
    with pytest.raises(exception, match=f"^{re.escape(message)}$"):
        bad_call(function, changes)


@pytest.mark.parametrize("changes", [{}, NOTHING], ids=["rotated", "not rotated"])
def test_the_good_call_is_good(function, changes):
    bad_call(function, changes)


@pytest.mark.parametrize(
    "name, exception, message, changes",
    [
        (
            "reference",
            TypeError,
            DTYPE.format("q_gate", "float16 or bfloat16 or float32 or float64", "int8"),
            {"q_gate": zeros(4, 384, dtype="int8")},
        ),
        (
            "oracle",
            TypeError,
            DTYPE.format("q_gate", "float16 or bfloat16 or float32", "float64"),
            {"q_gate": zeros(4, 384, dtype="float64")},
        ),
        (
            "reference",
            TypeError,
            DTYPE.format("positions", "int8 or int16 or int32 or int64 or uint8 or uint16 or uint32 or uint64", "bool"),
            {"positions": zeros(4, dtype="bool")},
        ),
        (
            "oracle",
            TypeError,
            DTYPE.format("positions", "int32 or int64", "int16"),
            {"positions": zeros(4, dtype="int16")},
        ),
        (
            "oracle",
            ValueError,
            "k must be contiguous in its last dimension, got strides (1, 4). Call contiguous().",
            {"k": zeros(128, 4).T},
        ),
        (
            "oracle",
            ValueError,
            "q_weight must be contiguous in its last dimension, got strides (2,). Call contiguous().",
            {"q_weight": zeros(128)[::2]},
        ),
    ],
)
def test_a_bad_call_of_one_function(name, exception, message, changes):
    with pytest.raises(exception, match=f"^{re.escape(message)}$"):
        bad_call(FUNCTIONS[name], changes)


def test_the_oracle_names_the_devices_that_it_runs_on():
    tensors = {
        name: zeros(*shape, dtype=dtype, device="meta")
        for name, shape, dtype in [
            ("q_gate", (4, 384), "bfloat16"),
            ("k", (4, 128), "bfloat16"),
            ("q_weight", (64,), "bfloat16"),
            ("k_weight", (64,), "bfloat16"),
            ("cos_sin_cache", (8, 16), "bfloat16"),
            ("positions", (4,), "int32"),
        ]
    }
    message = "the kernel runs on cpu and cuda tensors, got meta. Move them with to('cpu')."
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}$"):
        bad_call(triton_oracle.fused_qk_rmsnorm_rope_gate, tensors)


CALL_BOTH = """
import sys, torch
from torch_ref import reference, triton_oracle
for module in (reference, triton_oracle):
    module.fused_qk_rmsnorm_rope_gate(
        torch.ones(1, 64), torch.ones(1, 32), torch.ones(32), torch.ones(32), torch.ones(4, 8), torch.zeros(1).int(),
        1e-6, 1, 1, 32, 8,
    )
    module.write_kv_cache(*(torch.ones(1, 1, 32),) * 2, *(torch.ones(1, 4, 1, 32),) * 2, torch.zeros(1).int())
{}
sys.exit("jax" in sys.modules)
"""


@pytest.mark.parametrize("extra, seen", [("", 0), ("import pallas_qk", 1)])
def test_jax_is_never_imported(extra, seen):
    """And the probe sees it where it is."""
    assert subprocess.run([sys.executable, "-c", CALL_BOTH.format(extra)], timeout=120).returncode == seen
