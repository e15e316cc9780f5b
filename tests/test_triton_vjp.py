"""The backward kernels on Triton: their configurations, and what they are lowered to.

`test_kernel_gradients` has what they share with Mosaic GPU's.
"""

import dataclasses
import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_qk import _triton
from pallas_qk._options import Spec
from pallas_qk._triton.backward import BACKWARD_NAME, WEIGHT_SUM_NAME, sum_weights
from pallas_qk._triton.config import TritonBackward, triton_backward
from tests import forms, strategies
from tests.cases import SMALL_CASES, Case, make_cotangents, make_inputs
from tests.compare import assert_same
from tests.gradients import assert_defined, define_gradients
from tests.lowering import kernels, lowered, lowered_text
from tests.run import has_gpu, run_backward
from tests.tolerances import ROUNDOFF


def default_config(case: Case, num_sms: int = 132) -> TritonBackward:
    sizes = case.num_tokens, case.num_q_heads, case.num_kv_heads, case.head_dim, case.rotary_dim
    spec = Spec(*sizes, str(jnp.dtype(case.dtype)), rotation=case.rotation)
    wide = "float32" in (case.dtype, case.weight_dtype, case.cache_dtype)
    return triton_backward(spec, num_sms, mrope=case.mrope_section is not None, wide=wide)


def check(case: Case, config: TritonBackward | None = None) -> list[jax.Array]:
    """The gradients, flat, which must keep to their definition; by the interpreter where there is no GPU."""
    inputs, cotangents = strategies.inside(case, strategies.make_inputs(case)), make_cotangents(case)
    got = run_backward("triton", case, inputs, cotangents, config=config)
    assert_defined(got, define_gradients(case, inputs, cotangents, round_dweights=False)[:4])
    return got


@pytest.mark.parametrize(
    "case, layout, rows",
    [
        (Case(5, 3, 2), "row", 1),
        (Case(5, 3, 2), "halves", 1),
        (Case(5, 3, 2, head_dim=64, rotary_dim=32), "halves", 4),
        (Case(5, 3, 2, head_dim=64, rotary_dim=32, mrope_section=(6, 5, 5)), "row", 8),
        (Case(5, 3, 2, head_dim=80, rotary_dim=6, rotation="pairs"), "pairs", 4),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else str(value),
)
def test_every_layout_and_number_of_rows(case, layout, rows):
    check(case, TritonBackward(layout, rows, q_programs=3, k_programs=2))


@pytest.mark.parametrize("q_programs, k_programs", [(1, 1), (2, 7), (40, 9)])
def test_the_number_of_programs_leaves_dq_gate_and_dk_alone(q_programs, k_programs):
    """From one program for all rows to more than there are steps, with fewer and with more for k than for q."""
    case = Case(9, 3, 2, head_dim=128, rotary_dim=32)
    config = dataclasses.replace(default_config(case), q_programs=q_programs, k_programs=k_programs)
    assert_same(check(case, config)[:2], check(case)[:2])


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_past_the_last_add_nothing_even_without_eps(dtype):
    """Three rows by steps of two or more: with eps 0 a row of zeros would have an infinite 1 / rms."""
    case = Case(3, 1, 1, head_dim=80, rotary_dim=20, eps=0.0, dtype=dtype)
    check(case, dataclasses.replace(default_config(case), rows_per_step=4))


def test_the_sum_of_many_partials():
    """More rows of partials than one tile holds."""
    rng = np.random.default_rng(0)
    partials = rng.standard_normal((9001 + 11, 20), np.float32)
    types = dict.fromkeys(("q_weight", "k_weight"), jax.ShapeDtypeStruct((20,), jnp.float32))
    kernel = functools.partial(sum_weights, q_rows=9001, types=types, interpret=not has_gpu())
    sums = jax.jit(kernel)(partials)
    for got, rows in ((sums["q_weight"], partials[:9001]), (sums["k_weight"], partials[9001:])):
        exact = rows.astype(np.float64)
        assert (abs(np.asarray(got) - exact.sum(0)) <= len(rows) * ROUNDOFF["float32"] * abs(exact).sum(0)).all()


def backward_of(case: Case):
    return functools.partial(_triton.backward, options=forms.options(case))


@pytest.mark.parametrize("case", [*SMALL_CASES, Case(65536, 32, 2)], ids=lambda case: case.id)
def test_every_case_is_lowered_for_cuda_to_two_kernels_without_a_gpu(case):
    text = lowered_text(backward_of(case), *forms.types(case))
    assert kernels(text) == [BACKWARD_NAME, WEIGHT_SUM_NAME] and text.count("custom_call") == 2
    assert re.search(r"num_warps = (\d+)", text).group(1) == "1"  # several would sum through shared memory


def shared_memory(case: Case, directory) -> dict[str, int]:
    """Bytes of shared memory of each kernel as Triton compiles it, a relative of the Triton inside JAX."""
    import triton
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect
    from triton.backends.compiler import GPUTarget

    module = lowered(backward_of(case), *forms.types(case)).compiler_ir("stablehlo")
    calls = []

    def collect(operation):
        for child in (child for region in operation.regions for block in region for child in block):
            if child.operation.name == "stablehlo.custom_call":
                calls.append(child.operation.attributes["mhlo.backend_config"])
            collect(child.operation)

    collect(module.operation)
    context = ir.Context()
    dialect.register_dialect(context)
    context.load_all_available_dialects()
    sizes = {}
    for config in calls:
        text = ir.Module.parse(config["ir"].value_bytes, context).operation.get_asm(enable_debug_info=False)
        path = directory / f"{len(sizes)}.ttir"
        path.write_text(text)
        num_warps = ir.IntegerAttr(config["num_warps"]).value
        with warnings.catch_warnings(action="ignore"):  # on a default of its own that Triton means to change
            kernel = triton.compile(str(path), GPUTarget("cuda", 90, 32), {"num_warps": num_warps, "num_stages": 1})
        sizes[kernel.metadata.name] = kernel.metadata.shared
    return sizes


@pytest.mark.parametrize(
    "case",
    [
        Case(16384),
        Case(5, 3, 1, head_dim=128, rotary_dim=64),
        Case(5, 3, 1, head_dim=64, rotary_dim=32, cache_dtype="float32", mrope_section=(6, 5, 5)),
        Case(5, 3, 1, head_dim=80, rotary_dim=40, weight_dtype="float32"),
        Case(16, packed=True, gathered=True),
        Case(16384, rotation="pairs"),
        Case(5, 3, 1, head_dim=80, rotary_dim=40, dtype="float32", mrope_section=(7, 7, 6), rotation="pairs"),
    ],
    ids=lambda case: case.id,
)
def test_the_main_kernel_uses_no_shared_memory(case, tmp_path, monkeypatch):
    pytest.importorskip("triton", reason="compiles the kernels with Triton outside JAX")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    sizes = shared_memory(case, tmp_path)
    assert list(sizes) == [BACKWARD_NAME, WEIGHT_SUM_NAME]
    assert sizes[BACKWARD_NAME] == 0
    if case.num_tokens > 1000:
        assert sizes[WEIGHT_SUM_NAME] > 0  # many warps add up there: it would be seen


@pytest.mark.parametrize(
    "case, layout, rows",
    [
        (Case(1), "halves", 1),
        (Case(65536, 32, 2), "halves", 1),
        (Case(1, head_dim=128, rotary_dim=64), "halves", 2),
        (Case(1, head_dim=512), "halves", 1),
        (Case(1, dtype="float32"), "halves", 1),
        (Case(1, mrope_section=(11, 11, 10)), "halves", 1),
        (Case(1, head_dim=80, rotary_dim=40), "row", 1),
        (Case(1, head_dim=256, rotary_dim=2), "row", 1),
        (Case(1, head_dim=1024), "halves", 1),
        (Case(1, rotation="pairs"), "pairs", 1),
        (Case(1, head_dim=64, rotary_dim=32, rotation="pairs"), "pairs", 2),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else str(value),
)
def test_layout_and_rows_follow_from_the_heads_alone(case, layout, rows):
    for num_tokens in (case.num_tokens, 77, 16384):
        config = default_config(dataclasses.replace(case, num_tokens=num_tokens))
        assert (config.layout, config.rows_per_step) == (layout, rows)


@pytest.mark.parametrize("num_tokens", [1, 2, 64, 197, 1024, 4096, 16384, 65536])
@pytest.mark.parametrize("heads", [(16, 2), (32, 2), (1, 1), (2, 5)])
@pytest.mark.parametrize("num_sms", [1, 108, 132])
def test_programs_are_resident_at_once_and_have_work(num_tokens, heads, num_sms):
    config = default_config(Case(num_tokens, *heads), num_sms)
    programs = config.q_programs, config.k_programs
    steps = [-(-num_tokens * h // config.rows_per_step) for h in heads]
    assert sum(programs) <= 24 * num_sms
    assert all(1 <= p <= s for p, s in zip(programs, steps, strict=True))
    if num_sms > 1:
        # The last to finish takes at most a step or two more than if rows could be shared out at will.
        longest = max(-(-s // p) for s, p in zip(steps, programs, strict=True))
        assert longest < sum(steps) / (24 * num_sms) + 2


def test_programs_follow_the_gpu_that_code_is_made_for():
    case = Case(16384)
    for num_sms in (108, 132):
        config = default_config(case, num_sms)
        text = lowered_text(backward_of(case), *forms.types(case), num_sms=num_sms)
        grid = re.search(r"grid_x = (\d+)", text).group(1)
        assert int(grid) == config.q_programs + config.k_programs


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(16384),
        Case(5, 3, 1, head_dim=64, rotary_dim=32, mrope_section=(6, 5, 5)),
        Case(5, 3, 1, head_dim=128, rotary_dim=64, weight_dtype="float32", cache_dtype="float32"),
        Case(5, 3, 1, head_dim=80, rotary_dim=40, dtype="float32"),
        Case(16384, rotation="pairs"),
    ],
    ids=lambda case: case.id,
)
def test_jax_gives_the_main_kernel_one_warp_and_no_shared_memory(gpu, case, tmp_path):
    jax.jit(backward_of(case)).lower(*forms.types(case)).compile(compiler_options={"xla_dump_to": str(tmp_path)})
    (launches,) = tmp_path.glob("*.thunk_sequence.txt")
    launch = re.search(rf"{BACKWARD_NAME} .*threads: \[(\d+), 1, 1\] +shared_memory: (\d+) bytes", launches.read_text())
    assert launch is not None and launch.groups() == ("32", "0")


@pytest.mark.gpu
@pytest.mark.alone
def test_offsets_past_2_to_the_31(gpu):
    """q_gate has 2^31 elements and one token more: the last token's bits are those it has alone."""
    case, one = Case(2**17 + 1, 32, 2), Case(1, 32, 2)
    inputs, cotangents = make_inputs(case), make_cotangents(case)
    got = [x[-1:] for x in run_backward("triton", case, inputs, cotangents)[:2]]
    last = dataclasses.replace(inputs, q_gate=inputs.q_gate[-1:], k=inputs.k[-1:], positions=inputs.positions[-1:])
    assert_same(got, run_backward("triton", one, last, [x[-1:] for x in cotangents])[:2])
