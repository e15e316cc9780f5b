"""The backward kernels on Mosaic GPU: what they are lowered to and their configurations, executed on a CPU.

`test_kernel_gradients` has what they share with Triton's.
"""

import dataclasses
import functools
import inspect
import itertools
import re

import jax
import numpy as np
import pytest

from pallas_qk import _mosaic_gpu, _reference, _rows, _target
from pallas_qk._mosaic_gpu.backward import BACKWARD_NAME, configuration
from pallas_qk._mosaic_gpu.config import MosaicBackward, mosaic_backward, one_wave
from pallas_qk._mosaic_gpu.weight_sum import SUM_NAME
from pallas_qk._options import Spec, Target
from tests import forms
from tests.cases import Case, make_cotangents, make_inputs
from tests.compare import assert_same
from tests.gradients import assert_defined, define_gradients
from tests.lowering import on_gpu
from tests.mosaic_interpreter import emitted, execute
from tests.run import run_backward

CONFIGS = [
    MosaicBackward(rows_per_warp, num_warpgroups, q_warps, k_warps)
    for rows_per_warp, num_warpgroups, q_warps, k_warps in [
        (1, 1, 1, 1),
        (1, 1, 5, 3),
        (1, 2, 9, 1),
        (2, 1, 2, 6),
        (4, 3, 7, 2),
    ]
]
# On two multiprocessors even small cases have several rows a warp.
H200 = Target((9, 0), 132, 4800)
executed = functools.partial(run_backward, "mosaic_gpu", num_sms=2)


def backward_of(case: Case, config: MosaicBackward | None = None):
    return functools.partial(_mosaic_gpu.backward, options=forms.options(case), config=config)


def operands(case: Case) -> tuple[_rows.Inputs, _rows.Outputs]:
    """Inputs and cotangents, in the shapes of the implementations."""
    cotangents = forms.as_outputs(case, make_cotangents(case))
    return forms.split_heads(case, forms.inputs_of(case, make_inputs(case))), forms.split_heads(case, cotangents)


def assert_gradients(got, case: Case, inputs, cotangents):
    assert_defined(got, define_gradients(case, inputs, cotangents, round_dweights=False)[:4])


def test_the_interface_is_the_reference_s():
    def parameters(function):
        return {name: (p.kind, p.annotation) for name, p in inspect.signature(function).parameters.items()}

    config = {"config": (inspect.Parameter.KEYWORD_ONLY, MosaicBackward | None)}
    assert parameters(_mosaic_gpu.backward) == parameters(_reference.backward) | config


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, dataclasses.astuple(config))))
@pytest.mark.parametrize(
    "case",
    [
        Case(7, 3, 1),
        Case(5, 4, 2, head_dim=128, rotary_dim=128, dtype="float32", mrope_section=(24, 20, 20)),
        Case(3, 1, 1, head_dim=64, rotary_dim=16, dtype="float16", cache_dtype="float32"),
        Case(3, 1, 2, head_dim=80, rotary_dim=48, weight_dtype="float32"),
        Case(2, 3, 1, head_dim=512, rotary_dim=320),
        Case(7, 3, 1, head_dim=80, rotary_dim=40, mrope_section=(7, 7, 6), rotation="pairs"),
    ],
    ids=lambda case: case.id,
)
def test_every_configuration_gives_the_same_bits(case, config):
    args = case, make_inputs(case), make_cotangents(case)
    got = executed(*args, config=config)
    assert_same(got[:2], executed(*args)[:2])
    assert_gradients(got, *args)


@pytest.mark.parametrize(
    "config, kernels",
    [
        (MosaicBackward(1, 5, 16, 2), 1),
        (MosaicBackward(1, 1, 16, 2), 2),
        (MosaicBackward(1, 2, 1, 19), 2),
        (MosaicBackward(1, 1, 70, 8), 2),
    ],
    ids=["one program", "five programs", "three programs, q in one", "twenty programs, more than are read at once"],
)
def test_a_second_kernel_sums_what_several_programs_have(config, kernels):
    case = Case(10, 16, 2)
    assert len(emitted(backward_of(case, config), *forms.types(case)).kernels) == kernels
    args = case, make_inputs(case), make_cotangents(case)
    assert_gradients(executed(*args, config=config), *args)


def test_a_row_of_zeros_has_the_gradients_of_its_limit():
    case = Case(3, 2, 1)
    inputs, cotangents = make_inputs(case), make_cotangents(case)
    # A row of q and one of k.
    inputs = dataclasses.replace(inputs, q_gate=inputs.q_gate.at[1, :256].set(0), k=inputs.k.at[2].set(0))
    assert_gradients(executed(case, inputs, cotangents), case, inputs, cotangents)


def test_offsets_past_2_32_elements():
    case = Case(262_160, 32, 1)
    assert case.num_tokens * 32 * 512 > 2**32
    last = dataclasses.replace(case, num_tokens=2)
    small = operands(last)

    def longer(x):
        # Untouched pages of zeros cost no memory.
        long = np.zeros((case.num_tokens, *x.shape[1:]), x.dtype)
        long[-2:] = x
        return long

    inputs, cotangents = jax.tree.map(lambda x: longer(x) if x.ndim == 3 else x, small)
    inputs = inputs._replace(positions=longer(inputs.positions.T).T)
    # The last warps end with the last rows.
    config = MosaicBackward(1, 1, q_warps=case.num_tokens, k_warps=case.num_tokens)
    of_rows = execute(lambda *args: backward_of(case, config)(*args)[:2], inputs, cotangents, programs=slice(-40, None))
    assert_same([x[-2:] for x in of_rows], list(execute(backward_of(last), *small, num_sms=2)[:2]))


@pytest.mark.parametrize("case", [Case(16384), Case(4, 2, 1, dtype="float32"), Case(4, 2, 1, 80, 80)])
def test_what_is_emitted(case):
    main, *sums = map(str, emitted(backward_of(case), *forms.types(case)).kernels)
    assert f"@{BACKWARD_NAME}" in main
    assert len(sums) == (1 if case.num_tokens > 64 else 0)
    assert all(f"@{SUM_NAME}" in code for code in sums)
    for code in (main, *sums):
        kernel = code[code.index("gpu.launch") :]
        # Global accesses only, no shared memory: a kernel that uses any loses most of its L1 cache to the carve-out.
        accesses = re.findall(r"llvm\.(?:load|store) .*", kernel)
        assert accesses and all("!llvm.ptr<1>" in access for access in accesses)
        assert re.search(r"dynamic_shared_memory_size %c0_i32\b", kernel)
        assert any("vector<4xi32>" in access for access in accesses)
    loops = re.findall(r"scf\.for .*?scf\.yield", main, re.DOTALL)
    assert len(loops) == 2
    for loop in loops:
        # Every load is issued before the first store.
        order = re.findall(r"llvm\.(load|store) ", loop)
        assert order == sorted(order) and len(set(order)) == 2


def test_the_multiprocessors_are_those_of_the_gpu_lowered_for():
    assert _target.cuda_target().num_sms == 132 or jax.default_backend() == "gpu"
    with on_gpu(num_sms=78):
        assert _target.cuda_target().num_sms == 78
    few, many = (
        emitted(backward_of(case), *forms.types(case), num_sms=78).kernels[0] for case in (Case(1), Case(16384))
    )
    grids = [re.search(r"gpu\.launch .*? in \(%\w+ = %c(\d+)", str(kernel)) for kernel in (few, many)]
    assert [int(grid.group(1)) for grid in grids] == [1, 78]


@pytest.mark.parametrize(
    "num_tokens, heads", [(1, (1, 1)), (1, (16, 2)), (9, (1, 99)), (1024, (16, 2)), (65536, (32, 2))]
)
@pytest.mark.parametrize(
    "head_dim, rotary_dim, dtype", [(256, 64, "bfloat16"), (512, 512, "float32"), (3, 2, "float16")]
)
def test_the_rule_is_one_resident_wave(num_tokens, heads, head_dim, rotary_dim, dtype):
    spec = Spec(num_tokens, *heads, head_dim, rotary_dim, dtype)
    targets = [Target((9, 0), num_sms, bandwidth) for num_sms in (1, 132, 148) for bandwidth in (None, 300, 3350)]
    for target, num_axes, cache_itemsize in itertools.product(targets, (1, 3), (2, 4)):
        config = mosaic_backward(spec, target, num_axes=num_axes, cache_itemsize=cache_itemsize)
        assert 1 <= config.num_warpgroups <= 8
        assert 1 <= config.q_warps <= num_tokens * heads[0] and 1 <= config.k_warps <= num_tokens * heads[1]
        assert config.q_warps + config.k_warps <= max(20, 4 * config.num_warpgroups) * target.num_sms


def test_the_rule_fills_the_gpu():
    spec = Spec(16384, 16, 2, 256, 64, "bfloat16")
    config = mosaic_backward(spec, H200, num_axes=1, cache_itemsize=2)
    assert config.num_warpgroups == 6 and config.q_warps + config.k_warps > 0.97 * 24 * 132


@pytest.mark.parametrize(
    "target, num_warpgroups",
    [
        (H200, 6),
        (Target((9, 0), 132, 3350), 5),  # H100
        (Target((9, 0), 114, 2000), 3),  # H100 PCIe
        (Target((9, 0), 132, 3900), 5),  # H100 NVL
        (Target((9, 0), 132, 4000), 5),  # GH200: five warpgroups exactly
        (Target((9, 0), 78, 4000), 6),  # H20
        (Target((10, 0), 148, 8000), 6),  # B200
        (Target((12, 0), 170), 6),
    ],
    ids=str,
)
def test_warps_follow_the_bandwidth_of_a_multiprocessor(target, num_warpgroups):
    """Where memory binds, as many rows are in flight as keep it busy. Arrays in L2 don't wait for it."""
    for num_tokens in (1, 64, 256, 1024, 4096, 16384):
        spec = Spec(num_tokens, 16, 2, 256, 64, "bfloat16")
        config = mosaic_backward(spec, target, num_axes=1, cache_itemsize=2)
        if num_tokens >= 4096:
            assert config.num_warpgroups == num_warpgroups
            assert 0.94 < (config.q_warps + config.k_warps) / (4 * num_warpgroups * target.num_sms) <= 1
        else:
            unknown = dataclasses.replace(target, bandwidth=None)
            assert config == mosaic_backward(spec, unknown, num_axes=1, cache_itemsize=2)


@pytest.mark.parametrize(
    "spec, rows_per_warp, num_warpgroups",
    [
        ((16384, 32, 8, 128, 128, "bfloat16"), 4, 5),
        ((16384, 8, 4, 256, 256, "float16"), 2, 5),
        ((16384, 16, 2, 256, 64, "bfloat16"), 1, 6),
        ((4096, 16, 2, 256, 64, "bfloat16"), 1, 6),
        ((1024, 16, 2, 256, 64, "bfloat16"), 2, 4),
        ((256, 16, 2, 256, 64, "bfloat16"), 2, 3),
        ((1024, 32, 2, 256, 64, "bfloat16"), 2, 4),
        ((1024, 16, 2, 256, 64, "float32"), 1, 6),
        ((16384, 16, 2, 512, 512, "bfloat16"), 1, 5),
        ((16384, 32, 8, 64, 64, "bfloat16"), 4, 6),
    ],
)
def test_a_thread_has_more_lanes(spec, rows_per_warp, num_warpgroups):
    """Where all of them are rotated, or where the arrays lie in L2."""
    config = mosaic_backward(Spec(*spec), H200, num_axes=1, cache_itemsize=2)
    assert (config.rows_per_warp, config.num_warpgroups) == (rows_per_warp, num_warpgroups)
    of_three = mosaic_backward(Spec(*spec), H200, num_axes=3, cache_itemsize=2)
    assert of_three.rows_per_warp == 256 // min(256, spec[3])


@pytest.mark.parametrize(
    "spec, rows_per_warp, num_warpgroups",
    [
        ((16384, 16, 2, 256, 64, "bfloat16"), 2, 5),
        ((4096, 16, 2, 256, 64, "float16"), 2, 5),
        ((1024, 16, 2, 256, 64, "bfloat16"), 2, 4),
        ((16384, 16, 2, 256, 64, "float32"), 1, 6),
        ((16384, 32, 8, 128, 64, "bfloat16"), 2, 6),
        ((16384, 8, 4, 256, 256, "bfloat16"), 2, 5),
    ],
)
def test_more_lanes_where_nothing_is_copied(spec, rows_per_warp, num_warpgroups):
    """Next to q: without gates, or where the gate's cotangent is where it belongs."""
    config = mosaic_backward(Spec(*spec), H200, q_copied=False, num_axes=1, cache_itemsize=2)
    assert (config.rows_per_warp, config.num_warpgroups) == (rows_per_warp, num_warpgroups)
    num_tokens, *heads, head_dim, rotary_dim, dtype = spec
    itemsize = 4 if dtype == "float32" else 2
    for gate, q_copied in ((None, False), ("handed_on", False), ("in_place", True), ("copied", True)):
        case = Case(num_tokens, *heads, head_dim, rotary_dim, dtype, gate=gate)
        with on_gpu():
            found = configuration(forms.types(case)[0], forms.options(case))
        want = mosaic_backward(Spec(*spec), H200, q_copied=q_copied, num_axes=1, cache_itemsize=itemsize)
        assert found == want


def test_a_wave_of_any_size_has_work_for_each_warp():
    """What a sweep of configurations starts from: one program of so many warpgroups on each multiprocessor."""
    spec = Spec(4096, 32, 8, 128, 128, "bfloat16")
    for rows_per_warp, num_warpgroups in itertools.product((1, 2, 4), (2, 4, 6)):
        config = one_wave(spec, 132, rows_per_warp=rows_per_warp, num_warpgroups=num_warpgroups)
        warps = config.q_warps + config.k_warps
        assert (config.rows_per_warp, config.num_warpgroups) == (rows_per_warp, num_warpgroups)
        assert 0.9 * 4 * num_warpgroups * 132 < warps <= 4 * num_warpgroups * 132


def test_lowers_for_export():
    case = Case(3, 2, 1)
    exported = jax.export.export(jax.jit(backward_of(case)), platforms=["cuda"])(*forms.types(case))
    assert exported.mlir_module().count("mosaic_gpu") >= 2


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(1),
        Case(37, 6, 1, mrope_section=(11, 11, 10)),
        Case(300, 3, 5, head_dim=80, rotary_dim=40, dtype="float16", norm_beta=1.0),
        Case(4096),
        Case(1000, 4, 2, head_dim=128, rotary_dim=128, dtype="float32"),
    ],
    ids=lambda case: case.id,
)
def test_every_configuration_gives_the_same_bits_on_a_gpu(gpu, case):
    args = case, make_inputs(case), make_cotangents(case)
    want = run_backward("mosaic_gpu", *args)
    for config in CONFIGS:
        got = run_backward("mosaic_gpu", *args, config=config)
        assert_same(got[:2], want[:2])
        assert_gradients(got, *args)
