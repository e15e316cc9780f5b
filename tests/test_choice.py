"""Which implementation runs, proven from the lowered text, and that a name never falls back."""

import dataclasses
import functools
import importlib
import inspect
import itertools
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import pytest

import pallas_qk
from pallas_qk import _implementations, _target
from pallas_qk._mosaic_gpu.config import MosaicForward, mosaic_forward
from pallas_qk._options import Spec, Target
from pallas_qk._triton.config import triton_backward, triton_forward
from tests import cached, fp8
from tests.cached import CachedCase
from tests.cases import SMALL_CASES, Case, make_inputs
from tests.compare import assert_same
from tests.forms import op
from tests.lowering import FIRST, GPU_IMPLEMENTATIONS, HOPPER, kernels, lowered_text, on_gpu
from tests.run import has_gpu


def lowered(case: Case, platforms: tuple[str, ...], implementation: str | None = None, kind: str = HOPPER) -> str:
    arguments = jax.eval_shape(lambda: list(make_inputs(case)))
    return lowered_text(op(case, implementation), *arguments, kind=kind, platforms=platforms)


def count_kernels(text: str) -> dict[str, int]:
    """Calls of our forward kernels, by implementation."""
    found = kernels(text)
    return {name: found.count(f"pallas_qk_{name}_forward") for name in GPU_IMPLEMENTATIONS}


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.id)
@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_every_case_lowers_for_cuda_without_a_gpu(name, case):
    assert count_kernels(lowered(case, ("cuda",), name)) == {n: int(n == name) for n in GPU_IMPLEMENTATIONS}


def test_none_takes_the_gpu_kernel_on_cuda_and_xla_elsewhere():
    case = Case(16)
    expected = {name: int(name == FIRST) for name in GPU_IMPLEMENTATIONS}
    assert count_kernels(lowered(case, ("cuda",))) == expected
    for platform in ("cpu", "tpu"):
        assert count_kernels(lowered(case, (platform,))) == dict.fromkeys(GPU_IMPLEMENTATIONS, 0)
    assert count_kernels(lowered(case, ("cuda", "cpu"))) == expected


def test_xla_by_name_holds_no_kernel():
    assert count_kernels(lowered(Case(16), ("cuda",), "xla")) == dict.fromkeys(GPU_IMPLEMENTATIONS, 0)


def test_no_tokens_need_no_kernel():
    for name in GPU_IMPLEMENTATIONS:
        assert count_kernels(lowered(Case(0), ("cuda",), name)) == dict.fromkeys(GPU_IMPLEMENTATIONS, 0)


def test_an_old_gpu_gets_xla():
    assert count_kernels(lowered(Case(16), ("cuda",), kind="Tesla V100-SXM2-16GB")) == {"mosaic_gpu": 0, "triton": 0}
    assert count_kernels(lowered(Case(16), ("cuda",), kind="NVIDIA A100-SXM4-80GB")) == {"mosaic_gpu": 0, "triton": 1}


def test_a_cache_of_8_bits_needs_a_gpu_that_converts_to_them():
    """Named, Triton is refused on an older one, where None takes plain XLA; a cache of 16 bits is written there."""
    older, newer = "NVIDIA A100-SXM4-80GB", "NVIDIA L4"
    case = CachedCase(Case(16))
    found = {}
    for kind, kv_dtype in itertools.product((older, newer), (None, *fp8.NAMES)):
        call = dataclasses.replace(case, kv_dtype=kv_dtype)
        arguments = jax.eval_shape(lambda call=call: cached.arguments(call))
        found[kind, kv_dtype] = count_kernels(lowered_text(cached.op(call), *arguments, kind=kind))["triton"]
        if found[kind, kv_dtype]:
            assert count_kernels(lowered_text(cached.op(call, "triton"), *arguments, kind=kind))["triton"] == 1
            continue
        message = (
            "implementation='triton' can't run this: it needs compute capability 8.9 or later for a cache of "
            f"{kv_dtype}, got 8.0. Leave implementation out, or pass 'xla'."
        )
        with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
            lowered_text(cached.op(call, "triton"), *arguments, kind=kind)
    assert {which for which, count in found.items() if not count} == {(older, name) for name in fp8.NAMES}


def test_pairs_of_odd_heads_are_refused_by_mosaic_gpu_alone():
    """A pair would lie in two threads. None takes Triton; the name is refused with the reason that is told."""
    reason = "it rotates pairs in heads of an even number of elements, got head_dim=65"
    sizes = 16, 16, 2, 65, 6, "bfloat16"
    with on_gpu():
        pairs = pallas_qk.default_implementation(*sizes, rotation="pairs", platform="cuda")
        halves = pallas_qk.default_implementation(*sizes, platform="cuda")
        even = pallas_qk.default_implementation(16, 16, 2, 64, 6, "bfloat16", rotation="pairs", platform="cuda")
    assert (pairs.name, pairs.not_taken["mosaic_gpu"]) == ("triton", reason)
    assert halves.name == even.name == FIRST
    case = Case(16, head_dim=65, rotary_dim=6, rotation="pairs")
    assert count_kernels(lowered(case, ("cuda",))) == {"mosaic_gpu": 0, "triton": 1}
    message = f"implementation='mosaic_gpu' can't run this: {reason}. Leave implementation out, or pass 'xla'."
    arguments = jax.eval_shape(lambda: list(make_inputs(case)))
    with on_gpu(), pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
        jax.eval_shape(op(case, "mosaic_gpu"), *arguments)  # already when it is traced


@pytest.mark.parametrize("kind", ["NVIDIA B200", "NVIDIA GeForce RTX 5090", "NVIDIA GB10"])
def test_a_new_gpu_gets_what_a_hopper_gets(kind):
    expected = {name: int(name == FIRST) for name in GPU_IMPLEMENTATIONS}
    assert count_kernels(lowered(Case(16), ("cuda",), kind=kind)) == expected


@pytest.mark.parametrize("missing, left", [("mosaic_gpu", "triton"), ("triton", "mosaic_gpu")])
def test_a_jax_without_one_of_the_backends(monkeypatch, missing, left):
    """Nothing of the missing backend is imported; the other one serves, and the name is refused with the reason."""
    monkeypatch.setitem(_implementations._REQUIRES, missing, ("jax.experimental.pallas.gone",))
    monkeypatch.setitem(_implementations._GPU_FOLDERS, missing, "pallas_qk.gone")
    _implementations._missing_module.cache_clear()
    jax.clear_caches()  # traces that hold the missing one
    try:
        assert count_kernels(lowered(Case(16), ("cuda",))) == {left: 1, missing: 0}
        with pytest.raises(
            NotImplementedError, match=f"^implementation='{missing}' can't run this: it needs the module"
        ):
            lowered(Case(16), ("cuda",), missing)
        with on_gpu():
            choice = pallas_qk.default_implementation(16, 16, 2, 256, 64, "bfloat16", platform="cuda")
        assert choice.name == left
        assert choice.not_taken[missing].startswith("it needs the module jax.experimental.pallas.gone, got")
    finally:
        _implementations._missing_module.cache_clear()
        jax.clear_caches()  # and those that do without it


def test_a_name_is_refused_with_its_reason_where_it_cannot_run():
    message = (
        "implementation='triton' can't run this: it needs compute capability 8.0 or later (packed 16-bit "
        "conversions), got 7.0. Leave implementation out, or pass 'xla'."
    )
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
        lowered(Case(16), ("cuda",), "triton", kind="Tesla V100-SXM2-16GB")


@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_a_gpu_name_on_another_platform_says_so(name):
    message = (
        f"implementation={name!r} must run on an NVIDIA GPU, got platform cpu. Leave implementation out, or pass 'xla'."
    )
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
        lowered(Case(16), ("cpu",), name)
    if not has_gpu():
        case = Case(2)
        with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
            pallas_qk.fused_qk_rmsnorm_rope_gate(*make_inputs(case), **case.static_arguments, implementation=name)


def test_default_implementation_names_its_reasons():
    sizes = (4096, 16, 2, 256, 64, jnp.bfloat16)
    on_cpu = pallas_qk.default_implementation(*sizes, platform="cpu")
    assert on_cpu.name == "xla"
    assert on_cpu.not_taken["triton"] == "it needs an NVIDIA GPU, got platform cpu"
    with on_gpu():
        on_cuda = pallas_qk.default_implementation(*sizes, platform="cuda")
    assert on_cuda.name == FIRST
    assert on_cuda.not_taken["xla"] == f"{on_cuda.name!r} runs this and comes first"
    for choice in (on_cpu, on_cuda, pallas_qk.default_implementation(*sizes)):
        assert {choice.name, *choice.not_taken} == set(pallas_qk.IMPLEMENTATIONS)


def test_default_implementation_is_what_runs():
    case = Case(16)
    name = pallas_qk.default_implementation(16, 16, 2, 256, 64, "bfloat16").name
    platform = "cuda" if has_gpu() else "cpu"
    assert count_kernels(lowered(case, (platform,))) == {n: int(n == name) for n in GPU_IMPLEMENTATIONS}


@pytest.mark.parametrize(
    "kind, capability",
    [
        ("NVIDIA H100 80GB HBM3", (9, 0)),
        ("NVIDIA A100-SXM4-40GB", (8, 0)),
        ("NVIDIA L40S", (8, 9)),
        ("NVIDIA B200", (10, 0)),
        ("NVIDIA GeForce RTX 5090", (12, 0)),
        ("NVIDIA GeForce RTX 5070 Ti", (12, 0)),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", (12, 0)),
        ("NVIDIA GB10", (12, 1)),
        ("NVIDIA RTX 6000 Ada Generation", (8, 9)),
        ("Tesla V100-SXM2-16GB", (7, 0)),
        ("NVIDIA RTX A6000", (8, 0)),
        ("NVIDIA of tomorrow", (8, 0)),
    ],
)
def test_compute_capability_of_an_abstract_device(kind, capability):
    with on_gpu(kind):
        assert _implementations.cuda_target().compute_capability == capability


@pytest.mark.parametrize(
    "kind, bandwidth",
    [
        ("NVIDIA H100 80GB HBM3", 3350),
        ("NVIDIA H100 PCIe", 2000),
        ("NVIDIA H100 NVL", 3900),
        ("NVIDIA-H100-PCIe", 2000),
        ("NVIDIA-H100-PCIE-80GB", 2000),
        ("NVIDIA H800", 3350),
        ("NVIDIA H800 PCIe", 2000),
        ("NVIDIA H200", 4800),
        ("NVIDIA H200 NVL", 4800),
        ("NVIDIA H20", 4000),
        ("NVIDIA H20-3e", 4800),
        ("NVIDIA GH200 480GB", 4000),
        ("NVIDIA GH200 144G HBM3e", 4900),
        ("NVIDIA B200", 8000),
        ("NVIDIA GB300", 8000),
        ("NVIDIA A100-SXM4-80GB", None),
        ("NVIDIA GeForce RTX 5090", None),
        ("NVIDIA of tomorrow", None),
    ],
)
def test_bandwidth_of_a_kind(monkeypatch, kind, bandwidth):
    """An abstract device's and a local one's."""
    with on_gpu(kind, 78):
        target = _target.cuda_target()
        assert (target.bandwidth, target.num_sms) == (bandwidth, 78)
    monkeypatch.setattr(_target, "local_gpus", lambda: [Gpu(kind, "9.0")])
    assert _target.cuda_target() == Target((9, 0), 132, bandwidth)


@pytest.mark.parametrize("device", ["cpu", jax.devices("cpu")[0]], ids=["by name", "a device"])
def test_the_default_device_is_asked_first(monkeypatch, device):
    """On a machine with a GPU it may be a CPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "cuda")
    assert pallas_qk.default_implementation(1, 16, 2, 256, 64, "bfloat16").name != "xla"
    with jax.default_device(device):
        assert pallas_qk.default_implementation(1, 16, 2, 256, 64, "bfloat16").name == "xla"


def test_without_a_gpu_code_is_made_for_an_h100(monkeypatch):
    monkeypatch.setattr(_target, "local_gpus", list)
    target = Target((9, 0), 132, 3350)
    assert _target.cuda_target() == target
    with _target.as_on_a_gpu():
        assert _target.cuda_target() == target


class Gpu(NamedTuple):
    """As much of a local GPU as is asked of it."""

    device_kind: str
    compute_capability: str
    core_count: int = 132


def test_a_local_gpu_that_the_mesh_names_is_asked_itself(monkeypatch):
    """A mesh of local devices names their kind, here one that no table knows."""
    monkeypatch.setattr(_target, "local_gpus", lambda: [Gpu("NVIDIA of yesterday", "8.6")])
    with on_gpu("NVIDIA of yesterday"):
        assert _target.cuda_target() == Target((8, 6), 132)
    with on_gpu("NVIDIA of tomorrow"):
        assert _target.cuda_target() == Target((8, 0), 132)


def test_of_several_local_gpus_the_least_counts(monkeypatch):
    """Code for the oldest runs on each, and as many programs as the smallest holds at once are resident on each."""
    gpus = [Gpu("B200", "10.0", 148), Gpu("H200", "9.0", 132), Gpu("RTX 5080", "12.0", 84), Gpu("H20", "9.0", 88)]
    monkeypatch.setattr(_target, "local_gpus", lambda: gpus)
    assert _target.cuda_target() == Target((9, 0), 84)
    del gpus[2]  # whose bandwidth is not known
    assert _target.cuda_target() == Target((9, 0), 88, 4000)


@pytest.mark.parametrize("heads", [(16, 2), (2, 16)], ids=str)
@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_rows_are_counted_in_32_bits(name, heads):
    limit = 2**31 - {"mosaic_gpu": 2**16, "triton": 2**20}[name]
    spec = Spec(limit // 16, *heads, 4, 4, "bfloat16")
    assert _implementations.unsupported(name, spec, Target((9, 0), 132)) is None
    more = dataclasses.replace(spec, num_tokens=limit // 16 + 1)
    reason = f"it counts rows (token, head) in 32 bits, up to {limit}, got {limit + 16}"
    assert _implementations.unsupported(name, more, Target((9, 0), 132)) == reason


def test_modules_share_one_interface():
    modules = [_implementations.module(name) for name in pallas_qk.IMPLEMENTATIONS]
    first = list(inspect.signature(modules[-1].forward).parameters)
    for module in modules:
        assert list(inspect.signature(module.forward).parameters)[: len(first)] == first
        assert list(inspect.signature(module.unsupported).parameters) == ["spec", "target"]


@pytest.mark.parametrize(
    "num_tokens, head_dim, rotary_dim, layout",
    [
        (1, 256, 64, "halves"),
        (8, 256, 64, "chunks"),
        (1024, 256, 64, "chunks"),
        (2048, 256, 64, "halves"),
        (1, 96, 96, "chunks"),
        (2048, 96, 96, "chunks"),
        (1, 256, 2, "halves"),
        (65536, 80, 40, "row"),
        (1, 128, 6, "row"),
    ],
)
def test_layout_rule_of_the_triton_kernel(num_tokens, head_dim, rotary_dim, layout):
    assert triton_forward(Spec(num_tokens, 16, 2, head_dim, rotary_dim, "bfloat16")).layout == layout


@pytest.mark.parametrize("num_tokens", [1, 16, 128, 1024, 4096, 16384])
@pytest.mark.parametrize("head_dim, rotary_dim", [(256, 64), (128, 128), (256, 16), (96, 6), (8, 4), (65, 6)])
def test_layouts_of_pairs(num_tokens, head_dim, rotary_dim):
    spec = Spec(num_tokens, 16, 2, head_dim, rotary_dim, "bfloat16", rotation="pairs")
    one_wave = num_tokens in (128, 1024) and (head_dim, rotary_dim) in ((256, 64), (128, 128))
    for q_copied in (True, False):
        assert triton_forward(spec, q_copied=q_copied).layout == "pairs"
        for by_slot in (True, False):
            layout = mosaic_forward(spec, q_copied=q_copied, by_slot=by_slot).layout
            assert layout == ("chunks" if one_wave else "row")
    assert triton_backward(spec, 132).layout == "pairs"


@pytest.mark.parametrize(
    "num_tokens, num_q_heads, q_copied, cache_dtype, heads",
    [
        (16384, 16, False, "float8_e4m3fn", (8, 2)),
        (32768, 12, False, "float8_e4m3fn", (4, 1)),
        (16383, 16, False, "float8_e5m2", (1, 1)),
        (16384, 16, True, "float8_e4m3fn", (1, 1)),
        (16384, 16, False, "bfloat16", (8, 2)),
        (16383, 16, False, "bfloat16", (1, 1)),
    ],
)
def test_a_gate_in_place_has_several_heads_a_thread_where_memory_binds(
    num_tokens, num_q_heads, q_copied, cache_dtype, heads
):
    spec = Spec(num_tokens, num_q_heads, 2, 256, 64, "bfloat16", cache_dtype=cache_dtype)
    config = mosaic_forward(spec, q_copied=q_copied, by_slot=True)
    assert (config.heads_per_thread, config.heads_ahead) == heads


def test_the_triton_kernel_takes_chunks_where_no_gate_is_copied():
    spec = Spec(16384, 16, 2, 256, 64, "bfloat16")
    assert triton_forward(spec).layout == "halves"
    assert triton_forward(spec, q_copied=False).layout == "chunks"


@pytest.mark.parametrize(
    "spec, q_copied, config",
    [
        ((1, 16, 2, 256, 64), True, MosaicForward("halves", 1, "first")),
        ((16, 16, 2, 256, 64), True, MosaicForward("halves", 1, "after_gate", k_first=True)),
        ((64, 16, 2, 256, 64), True, MosaicForward("chunks", 2, "after_gate", k_first=True)),
        ((768, 16, 2, 256, 64), True, MosaicForward("chunks", 2, "after_gate", k_first=True)),
        ((1024, 16, 2, 256, 64), True, MosaicForward("halves", 1, "after_gate", k_first=True)),
        ((4096, 16, 2, 256, 64), True, MosaicForward("halves", 1, "after_sum")),
        ((16383, 16, 2, 256, 64), False, MosaicForward("chunks", 2, "after_gate")),
        ((16384, 16, 2, 256, 64), False, MosaicForward("halves", 1, "after_gate", heads_per_thread=8, heads_ahead=2)),
        ((16384, 32, 8, 128, 128), True, MosaicForward("halves", 2, "after_gate")),
        ((16384, 32, 8, 128, 64), True, MosaicForward("halves", 2, "after_sum")),
        ((64, 12, 2, 80, 80), True, MosaicForward("chunks", 4, "after_gate", k_first=True)),
        ((1024, 16, 2, 96, 6), True, MosaicForward("row", 2, "after_gate", k_first=True)),
        ((64, 16, 2, 256, 2), True, MosaicForward("halves", 1, "after_gate", k_first=True)),
        ((1, 32, 8, 128, 128), False, MosaicForward("halves", 2, "first")),
        ((31, 32, 8, 128, 128), False, MosaicForward("halves", 2, "first", k_first=True)),
        ((32, 32, 8, 128, 128), False, MosaicForward("halves", 2, "first", k_first=True, heads_per_thread=2)),
        ((128, 32, 8, 128, 128), True, MosaicForward("chunks", 4, "after_gate", k_first=True)),
        ((4095, 32, 8, 128, 128), False, MosaicForward("halves", 2, "first", k_first=True, heads_per_thread=4)),
        (
            (4096, 32, 8, 128, 128),
            False,
            MosaicForward("halves", 2, "first", True, heads_per_thread=4, heads_apart=True),
        ),
        ((1023, 32, 8, 128, 64), False, MosaicForward("chunks", 4, "after_gate", k_first=True)),
        ((1024, 32, 8, 128, 64), False, MosaicForward("halves", 2, "first", k_first=True, heads_per_thread=8)),
        ((2048, 32, 8, 128, 64), False, MosaicForward("halves", 2, "first", heads_per_thread=4)),
        ((4096, 32, 8, 128, 64), False, MosaicForward("halves", 2, "first", heads_per_thread=4, heads_apart=True)),
        (
            (8192, 8, 1, 256, 256),
            False,
            MosaicForward("halves", 1, "first", True, heads_per_thread=4, heads_apart=True),
        ),
        ((1023, 16, 2, 512, 512), False, MosaicForward("halves", 1, "first", k_first=True)),
        ((1024, 16, 2, 512, 512), False, MosaicForward("halves", 1, "first", k_first=True, heads_per_thread=4)),
        ((8192, 16, 2, 512, 512), False, MosaicForward("halves", 1, "first", heads_per_thread=8, heads_apart=True)),
        ((1024, 16, 2, 512, 128), False, MosaicForward("chunks", 1, "after_sum", k_first=True)),
        ((1024, 9, 3, 128, 128), False, MosaicForward("chunks", 4, "after_gate", k_first=True)),
        ((1024, 32, 8, 64, 64), False, MosaicForward("chunks", 8, "after_gate", k_first=True)),
        ((1024, 32, 8, 192, 192), False, MosaicForward("chunks", 2, "after_gate", k_first=True)),
    ],
)
def test_rule_of_the_mosaic_gpu_kernel(spec, q_copied, config):
    assert mosaic_forward(Spec(*spec, "bfloat16"), q_copied=q_copied) == config


@pytest.mark.parametrize("q_copied", [True, False])
@pytest.mark.parametrize("num_tokens", [1, 16, 64])
def test_few_rows_by_slot_are_loaded_before_the_slot_counts(num_tokens, q_copied):
    few, many = (Spec(n, 16, 2, 256, 64, "bfloat16") for n in (num_tokens, 256))
    config = MosaicForward("halves", 1, "first", k_first=True)
    assert mosaic_forward(few, q_copied=q_copied, by_slot=True) == config
    of_many = mosaic_forward(many, q_copied=q_copied)
    assert mosaic_forward(many, q_copied=q_copied, by_slot=True) == of_many != config


def test_several_heads_a_thread():
    """By the elements of q, and eight in a single wave of programs: too many leave too few threads."""

    def heads(*sizes, dtype="bfloat16", **how):
        config = mosaic_forward(Spec(*sizes, dtype), q_copied=False, **how)
        return config.heads_per_thread

    tokens = (31, 32, 511, 512, 1023, 1024, 1900, 1901)
    assert [heads(n, 32, 8, 128, 128) for n in tokens] == [1, 2, 2, 4, 4, 8, 8, 4]
    assert [heads(n, 64, 8, 128, 128) for n in (511, 512, 1056, 1057)] == [4, 8, 8, 4]
    assert [heads(n, 16, 2, 256, 256) for n in (1024, 1584, 1585)] == [8, 8, 4]
    assert [heads(n, 32, 8, 128, 128, num_axes=3) for n in (127, 128, 1023, 1024, 16384)] == [1, 4, 4, 8, 8]
    assert [heads(n, 8, 4, 256, 256) for n in (63, 64, 1023, 1024, 2048, 4096)] == [1, 2, 2, 4, 8, 4]
    assert [heads(n, 16, 2, 512, 512) for n in (1023, 1024, 8191, 8192)] == [1, 4, 4, 8]
    assert heads(16384, 32, 8, 128, 128, dtype="float32") == 1
    assert heads(16384, 32, 8, 128, 128, by_slot=True) == 4


@pytest.mark.parametrize("num_q_heads, heads", [(16, 8), (24, 8), (12, 1), (15, 1)])
def test_a_gate_in_place_has_eight_heads_a_thread_or_one(num_q_heads, heads):
    spec = Spec(2**22 // num_q_heads + 1, num_q_heads, 1, 256, 64, "bfloat16")
    config = mosaic_forward(spec, q_copied=False)
    assert (config.layout, config.heads_per_thread) == ("halves" if heads == 8 else "chunks", heads)


def test_float32_has_one_head_a_thread():
    """And the layout of one."""
    for sizes, how in (((128, 128), {"rotation": "pairs"}), ((128, 64), {}), ((256, 64), {})):
        spec = Spec(16384, 32, 8, *sizes, "float32", **how)
        config = mosaic_forward(spec, q_copied=False)
        assert config.heads_per_thread == 1 and config.weights == "after_gate"
    config = mosaic_forward(Spec(16384, 32, 8, 128, 128, "float32"), q_copied=False)
    assert config.heads_per_thread == 1 and not config.heads_apart


def test_where_k_rows_come_first():
    some, many = (Spec(n, 32, 8, 128, 128, "bfloat16") for n in (1023, 1024))
    config = functools.partial(mosaic_forward, q_copied=False)
    assert [config(spec, k_copied=True).k_first for spec in (some, many)] == [True, False]
    assert config(many).k_first
    few, many = (Spec(n, 16, 2, 512, 512, "bfloat16") for n in (8191, 8192))
    assert [config(spec).k_first for spec in (few, many)] == [True, False]


def test_pairs_have_several_heads_a_thread_where_turns_are_many():
    some, many = (Spec(n, 32, 8, 128, 128, "bfloat16", rotation="pairs") for n in (1023, 1024))
    assert mosaic_forward(some, q_copied=False).heads_per_thread == 1
    assert mosaic_forward(many, q_copied=False) == MosaicForward("row", 2, "first", k_first=True, heads_per_thread=8)


@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
def test_the_rule_of_a_call_knows_its_cache(monkeypatch, implementation):
    """Caches are moved among the outputs before the kernel is made."""
    forward = importlib.import_module(f"pallas_qk._{implementation}.forward")
    rule = "mosaic_forward" if implementation == "mosaic_gpu" else "triton_forward"
    right, seen = getattr(forward, rule), []
    monkeypatch.setattr(forward, rule, lambda spec, *args, **how: seen.append(spec) or right(spec, *args, **how))
    call = CachedCase(Case(64, 4, 2, 64, 32, packed=True), kv_dtype="float8_e4m3fn")
    lowered_text(cached.op(call, implementation), *jax.eval_shape(lambda: cached.arguments(call)))
    assert {spec.cache_dtype for spec in seen} == {"float8_e4m3fn"} and all(spec.cache_shape for spec in seen)


def test_chunks_last_longer_where_the_rotation_comes_first():
    def config(num_tokens: int) -> MosaicForward:
        spec = Spec(num_tokens, 16, 2, 256, 64, "bfloat16", norm_order="rotation_first")
        return mosaic_forward(spec, q_copied=True)

    assert [config(n).layout for n in (64, 1024, 2047, 2048)] == ["chunks", "chunks", "chunks", "halves"]
    assert config(1024) == MosaicForward("chunks", 2, "first", k_first=True)


def test_rows_for_another_dtype_are_cast_first_but_where_memory_binds():
    def config(num_tokens: int, **how) -> MosaicForward:
        return mosaic_forward(Spec(num_tokens, 16, 2, 256, 64, "bfloat16"), by_slot=True, **how)

    assert [config(n).cast_first for n in (1, 256, 1023, 1024, 16384)] == [True, True, True, False, False]
    assert config(16383, q_copied=False).cast_first  # in chunks
    assert not config(16384, q_copied=False).cast_first


def test_disable_jit_runs_the_same_op():
    case = Case(3, 2, 1)
    inputs = make_inputs(case)
    want = pallas_qk.fused_qk_rmsnorm_rope_gate(*inputs, **case.static_arguments)
    with jax.disable_jit():
        got = pallas_qk.fused_qk_rmsnorm_rope_gate(*inputs, **case.static_arguments)
    assert_same(got, want)
