"""The Mosaic GPU kernel: what it is lowered to, executed on a CPU, and its own configurations on a GPU."""

import dataclasses
import functools
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_qk import _mosaic_gpu, _reference, _rows
from pallas_qk._mosaic_gpu.config import MosaicForward
from pallas_qk._mosaic_gpu.forward import FORWARD_NAME
from pallas_qk._options import Spec, Target, next_power_of_2, tree_order
from tests import forms, run
from tests.cases import LAYOUT_CASES, ORDER_CASES, SMALL_CASES, Case, Inputs, numpy_inputs
from tests.compare import assert_same
from tests.definition import assert_defined, lanes_in_halves, mrope_axis
from tests.lowering import lowered
from tests.mosaic_interpreter import emitted, execute

CONFIGS = [
    MosaicForward(layout, rows_per_warp, weights, k_first)
    for layout, rows_per_warp, weights, k_first in [
        ("chunks", 1, "first", False),
        ("chunks", 2, "after_sum", True),
        ("chunks", 4, "after_gate", False),
        ("halves", 1, "first", True),
        ("halves", 1, "after_sum", False),
        ("halves", 2, "after_gate", True),
        ("halves", 4, "first", False),
        ("row", 1, "after_sum", True),
        ("row", 2, "first", False),
    ]
]


def forward_of(case: Case, config: MosaicForward | None = None):
    """`forward`, of arrays, as a list."""

    def forward(*arrays):
        inputs = _rows.Inputs(*arrays)
        return jax.tree.leaves(_mosaic_gpu.forward(inputs, options=forms.options(case), config=config))

    return forward


def canonical(case: Case, inputs: Inputs) -> list[np.ndarray]:
    """The arguments in the shapes that `forward` takes."""
    q_gate, k, *rest, positions = inputs
    return [
        q_gate.reshape(case.num_tokens, case.num_q_heads, 2 * case.head_dim),
        k.reshape(case.num_tokens, case.num_kv_heads, case.head_dim),
        *rest,
        None if positions is None else np.atleast_2d(positions),
    ]


def executed(case: Case, inputs: Inputs, config: MosaicForward | None = None) -> list[np.ndarray]:
    return execute(forward_of(case, config), *canonical(case, inputs))


def test_the_interface_is_the_reference_s():
    def parameters(function):
        return {name: (p.kind, p.annotation) for name, p in inspect.signature(function).parameters.items()}

    ours, reference = (parameters(module.forward) for module in (_mosaic_gpu, _reference))
    assert ours == reference | {"config": (inspect.Parameter.KEYWORD_ONLY, MosaicForward | None)}
    assert parameters(_mosaic_gpu.unsupported) == parameters(_reference.unsupported)


def test_unsupported_says_why():
    spec = Spec(16, 16, 2, 256, 64, "bfloat16")
    assert _mosaic_gpu.unsupported(spec, Target((9, 0), 132)) is None
    assert _mosaic_gpu.unsupported(spec, Target((12, 0), 132)) is None
    reason = _mosaic_gpu.unsupported(spec, Target((8, 9), 132))
    assert "9.0" in reason and "got 8.9" in reason
    huge = dataclasses.replace(spec, num_tokens=2**27)
    reason = _mosaic_gpu.unsupported(huge, Target((9, 0), 132))
    assert "32 bits" in reason and f"got {2**31}" in reason


@pytest.mark.parametrize("case", [*SMALL_CASES, *ORDER_CASES, *LAYOUT_CASES], ids=lambda case: case.id)
def test_equals_the_definition(case):
    inputs = numpy_inputs(case, seed=1)
    got = executed(case, inputs)
    heads = case.num_q_heads, case.num_kv_heads, case.num_q_heads
    assert [x.shape for x in got] == [(case.num_tokens, h, case.head_dim) for h in heads]
    assert_defined([x.reshape(case.num_tokens, -1) for x in got], case, inputs)


def fma(a, b, c):
    return (a.astype(np.longdouble) * b + c).astype(np.float32)


def recipe(case: Case, inputs: Inputs, order=tree_order) -> list[np.ndarray]:
    """q_out and k_out with every rounding stated; the root and the reciprocal of D are exact."""
    q_gate, k, q_weight, k_weight, cache, positions = canonical(case, inputs)
    d, half, section, in_halves = case.head_dim, case.rotary_dim // 2, case.mrope_section, lanes_in_halves(case)
    axes = [mrope_axis(j, section) if section else 0 for j in range(half)]
    cos, sin = (
        np.stack([cache[positions[axis], first + j] for j, axis in enumerate(axes)], -1).astype(np.float32)[:, None]
        for first in (0, half)
    )
    outputs = []
    for x, weight in ((q_gate[..., :d], q_weight), (k, k_weight)):
        dtype, x = x.dtype, x.astype(np.float32)
        bits_left, lanes = list(order(next_power_of_2(d))), {lane: x[..., lane] ** 2 for lane in range(d)}
        if bits_left[0] == 0:  # a neighbouring pair is fused
            bits_left = bits_left[1:]
            lanes = {i: fma(x[..., i], x[..., i], lanes[i + 1]) if i + 1 < d else lanes[i] for i in range(0, d, 2)}
        for step in (1 << bit for bit in bits_left):
            lanes = {i: a + lanes[i + step] if i + step in lanes else a for i, a in lanes.items() if not i & step}
        mean = fma(lanes[0], np.float32(1) / np.float32(d), np.float32(case.eps))
        inv_rms = (1 / np.sqrt(mean.astype(np.float64))).astype(np.float32)
        y = x * inv_rms[..., None] * (weight.astype(np.float32) + np.float32(case.norm_beta))
        y = (y.astype(dtype).astype(np.float32) if case.round_norm else y)[..., in_halves]
        y1, y2, rest = y[..., :half], y[..., half : 2 * half], y[..., 2 * half :]
        with_oracle = case.rotation == "halves" and (case.round_norm or dtype == np.float32)
        fuses_y2 = with_oracle and ((section and half > 1) or dtype == np.float32)
        o2 = fma(y2, cos, y1 * sin) if fuses_y2 else fma(y1, sin, y2 * cos)
        o = [fma(y1, cos, -(y2 * sin)), o2, rest]
        outputs.append(np.concatenate(o, axis=-1).astype(dtype)[..., np.argsort(in_halves)])
    return outputs


RECIPE_CASES = [
    Case(33, 4, 2),
    Case(33, 4, 2, dtype="float32"),
    Case(33, 4, 2, dtype="float16", cache_dtype="float32", norm_beta=1.0),
    Case(9, 3, 1, head_dim=80, rotary_dim=80, cache_dtype="float32", weight_dtype="float32"),
    Case(9, 3, 1, head_dim=96, rotary_dim=40, dtype="float32"),
    Case(9, 3, 1, head_dim=32, rotary_dim=32, dtype="float32"),
    Case(9, 3, 1, head_dim=65, rotary_dim=6, dtype="float32"),  # a pair of lanes lies in two threads
    Case(9, 3, 1, head_dim=80, rotary_dim=2, dtype="float32"),  # a thread has both, in vectors of one lane
    Case(5, 3, 1, head_dim=512, rotary_dim=128, dtype="float32"),
    Case(9, 4, 2, dtype="float32", mrope_section=(16, 8, 8)),
    Case(9, 3, 1, head_dim=80, rotary_dim=40, dtype="float16", cache_dtype="float32", mrope_section=(7, 7, 6)),
    # Which product the rotation fuses shows in some 2^-13 of the rotated float16 elements.
    Case(300, 4, 2, rotary_dim=256, dtype="float16", cache_dtype="float32"),
    Case(9000, 2, 1, rotary_dim=2, head_dim=16, dtype="float16", cache_dtype="float32", mrope_section=(0, 1, 0)),
    Case(6, weight_scale=1e-5, dtype="float16"),  # subnormal normalised values
    Case(6, scale=1e-20),
    # Options: never the other fused product.
    Case(33, 4, 2, rotation="pairs"),
    Case(33, 4, 2, dtype="float32", rotation="pairs"),
    Case(9, 3, 1, head_dim=96, rotary_dim=6, dtype="float32", mrope_section=(1, 1, 1), rotation="pairs"),
    Case(300, 4, 2, rotary_dim=256, dtype="float16", cache_dtype="float32", rotation="pairs"),
    Case(300, 4, 2, rotary_dim=256, dtype="float16", mrope_section=(43, 43, 42), round_norm=False),
    Case(33, 4, 2, dtype="float32", round_norm=False),  # as with it
    Case(300, 4, 2, head_dim=80, rotary_dim=80, dtype="float16", rotation="pairs", round_norm=False),
]


@pytest.mark.parametrize("case", RECIPE_CASES, ids=lambda case: case.id)
def test_every_rounding_is_the_recipe_s(case):
    inputs = numpy_inputs(case, seed=2)
    assert_same(executed(case, inputs)[:2], recipe(case, inputs))


def test_another_order_of_the_sum_shows():
    case = RECIPE_CASES[1]
    inputs = numpy_inputs(case, seed=2)
    ascending = recipe(case, inputs, order=lambda lanes: range(lanes.bit_length() - 1))
    assert (ascending[0] != executed(case, inputs)[0]).any()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, dataclasses.astuple(config))))
@pytest.mark.parametrize(
    "case",
    [
        Case(7, 3, 1),
        Case(5, 4, 2, head_dim=128, rotary_dim=128, dtype="float32", mrope_section=(24, 20, 20)),
        Case(3, 1, 1, head_dim=64, rotary_dim=16, dtype="float16", cache_dtype="float32"),
        Case(7, 3, 1, head_dim=80, rotary_dim=40, mrope_section=(7, 7, 6), rotation="pairs", round_norm=False),
    ],
    ids=lambda case: case.id,
)
def test_every_configuration_gives_the_same_bits(case, config):
    if case.rotation == "pairs":
        config = dataclasses.replace(config, layout="row")
    inputs = numpy_inputs(case)
    assert_same(executed(case, inputs, config), executed(case, inputs))


@pytest.mark.parametrize("num_tokens, num_q_heads, num_kv_heads", [(1, 1, 1), (1, 5, 1), (2, 1, 7), (37, 2, 3)])
def test_a_token_alone_gives_the_bits_it_gives_in_a_batch(num_tokens, num_q_heads, num_kv_heads):
    case = Case(num_tokens, num_q_heads, num_kv_heads, mrope_section=(11, 11, 10))
    inputs = numpy_inputs(case)
    together = executed(case, inputs)
    for token in {0, num_tokens - 1}:
        rows = slice(token, token + 1)
        one = dataclasses.replace(
            inputs, q_gate=inputs.q_gate[rows], k=inputs.k[rows], positions=inputs.positions[:, rows]
        )
        alone = executed(dataclasses.replace(case, num_tokens=1), one)
        assert_same(alone, [x[rows] for x in together])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_code_needs_nothing_that_capability_12_lacks(direction, packed):
    """No wgmma, TMA, cluster or tensor memory, no barrier in shared memory, and no byte of that memory."""
    case = Case(64, mrope_section=(11, 11, 10), packed=packed)
    num_arguments = 1 if direction == "forward" else 2
    function = functools.partial(getattr(_mosaic_gpu, direction), options=forms.options(case))
    for kernel in emitted(function, *forms.types(case)[:num_arguments]).kernels:
        text = str(kernel)
        # Every kernel starts with this fence, which 12.x has.
        body = text[text.index("gpu.launch") :].replace("fence.mbarrier_init.release.cluster;", "")
        assert re.findall(r"wgmma|tcgen05|cp\.async|cluster|mbarrier\.(?!init)|nvgpu\.", body) == []
        (size,) = re.findall(r"dynamic_shared_memory_size (%\w+)", body)
        assert re.search(rf"{size} = arith\.constant 0 : i32", text)


def test_no_tokens_need_no_kernel():
    case = Case(0, dtype="float16")
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in canonical(case, numpy_inputs(case))]
    program = lowered(forward_of(case), *args)
    assert "custom_call" not in program.as_text()
    assert [out.shape for out in program.out_info] == [(0, 16, 256), (0, 2, 256), (0, 16, 256)]


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize("max_position", [100, 40_000])
def test_a_position_past_the_table_gives_nan_in_its_lanes_and_a_negative_one_row_0(dtype, max_position):
    case = Case(8, 2, 1, mrope_section=(11, 11, 10), max_position=max_position)
    with jax.enable_x64(True):
        inputs = numpy_inputs(case)
        info = np.iinfo(dtype)
        good = (inputs.positions.astype(np.int64) % min(max_position, info.max + 1)).astype(dtype)
        positions = good.copy()
        candidates = (-1, max_position, 2**31 - 1, -(2**31), 2**31 + 3, 2**32 + 3, 3 - 2**32, info.min, info.max)
        outside = [p for p in candidates if info.min <= p <= info.max and not 0 <= p < max_position]
        past = []
        for index, position in enumerate(outside):
            axis, token = index % 3, index % 7 + 1
            positions[axis, token], good[axis, token] = position, 0
            past += [(axis, token)] if position > 0 else []
        got = execute(forward_of(case), *canonical(case, inputs)[:5], positions)
        want = execute(forward_of(case), *canonical(case, inputs)[:5], good)
    frequency = np.arange(32)
    axis_of = np.where(frequency % 3 == 0, 0, np.where(frequency < 3 * 11, frequency % 3, 0))
    axis_of[(axis_of == 2) & (frequency >= 3 * 10)] = 0
    spoiled = np.zeros((8, 1, 256), bool)
    for axis, token in past:
        spoiled[token, :, :64] |= np.tile(axis_of == axis, 2)
    for a, b in zip(got[:2], want[:2], strict=True):
        assert (np.isnan(a.astype(np.float32)) == spoiled).all()
        assert_same(*(np.where(spoiled, x.dtype.type(0), x) for x in (a, b)))
    assert_same(got[2:], want[2:])


def test_gates_keep_nan_payloads_and_rows_their_nans():
    case = Case(4, 2, 1)
    inputs = numpy_inputs(case)
    q_gate, *rest = canonical(case, inputs)
    q_gate = q_gate.copy()
    q_gate.view(np.uint16)[1, 1, 256:260] = 0x7F81, 0xFFC5, 0xFF80, 0x7FFF
    q_gate[2, 0, 17] = np.nan
    q_gate[3, 1, 200] = np.inf
    got = execute(forward_of(case, MosaicForward("halves", 1, weights="after_sum")), q_gate, *rest)
    assert_same(got[2:], [q_gate[..., 256:]])
    nan = np.isnan(got[0].astype(np.float32))
    assert nan[2, 0].all() and nan[3, 1, 200] and nan.any(axis=-1).sum() == 2


@pytest.mark.parametrize("norm_beta", [0.0, -1.0])
def test_weights_of_minus_zero_give_zero(norm_beta):
    case = Case(3, 1, 1, norm_beta=norm_beta)
    inputs = numpy_inputs(case)
    weight = np.full_like(inputs.q_weight, -0.0 if norm_beta == 0 else 1.0)
    inputs = dataclasses.replace(inputs, q_weight=weight, q_gate=np.abs(inputs.q_gate))
    q_out = executed(case, inputs)[0]
    assert (q_out == 0).all() and not np.signbit(q_out[..., 64:].astype(np.float32)).any()


@pytest.mark.parametrize("packed", [False, True])
def test_offsets_past_2_32_elements(packed):
    case = Case(262_160, 32, 1, packed=packed)
    assert case.num_tokens * 32 * 512 > 2**32
    last = dataclasses.replace(case, num_tokens=2)
    tails = forms.split_heads(last, forms.inputs_of(last, numpy_inputs(last)))

    def ending_with(tail, axis: int = 0) -> np.ndarray:
        """Untouched pages of zeros cost no memory."""
        array = np.zeros((*tail.shape[:axis], case.num_tokens, *tail.shape[axis + 1 :]), tail.dtype)
        np.moveaxis(array, axis, 0)[-2:] = np.moveaxis(np.asarray(tail), axis, 0)
        return array

    inputs = tails._replace(q=ending_with(tails.q), positions=ending_with(tails.positions, axis=1))
    if not packed:
        inputs = inputs._replace(k=ending_with(tails.k))
    forward = functools.partial(_mosaic_gpu.forward, options=forms.options(case), config=MosaicForward("halves", 1))
    got = execute(forward, inputs, programs=slice(-40, None))
    want = run.kernel("forward", "mosaic_gpu", forms.options(last), False)(tails)
    assert_same(jax.tree.map(lambda x: x[-2:], got), want)


@pytest.mark.parametrize(
    "case", [Case(16384), Case(4, 2, 1, dtype="float32"), Case(4, 2, 1, head_dim=80, rotary_dim=80)]
)
def test_what_is_emitted(case):
    args = [
        jax.ShapeDtypeStruct((case.num_tokens, case.num_q_heads, 2 * case.head_dim), case.dtype),
        jax.ShapeDtypeStruct((case.num_tokens, case.num_kv_heads, case.head_dim), case.dtype),
        *[jax.ShapeDtypeStruct((case.head_dim,), case.dtype)] * 2,
        jax.ShapeDtypeStruct((case.max_position, case.rotary_dim), case.dtype),
        jax.ShapeDtypeStruct((1, case.num_tokens), "int32"),
    ]
    code = str(emitted(forward_of(case), *args))
    kernel = code[code.index("gpu.launch") :]
    assert f"@{FORWARD_NAME}" in code
    # Global accesses only, no shared memory: a kernel that uses any loses most of its L1 cache to the carve-out.
    accesses = re.findall(r"llvm\.(?:load|store) .*", kernel)
    assert accesses and all("!llvm.ptr<1>" in access for access in accesses)
    assert re.search(r"dynamic_shared_memory_size %c0_i32\b", kernel)
    assert kernel.count("gpu.barrier") == 1  # Mosaic GPU's own, at the start
    # The gate goes 16 bytes a thread.
    assert any("store" in access and "vector<4xi32>" in access for access in accesses)
    for statement in ("rcp.approx.ftz.f32", "rsqrt.approx.ftz.f32", "math.fma"):
        assert statement in kernel
    assert ("cvt.rn.bf16x2.f32" in kernel) == (case.dtype == "bfloat16")


def test_lowers_under_vmap_and_export():
    case = Case(3, 2, 1)
    args = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in canonical(case, numpy_inputs(case))]
    exported = jax.export.export(jax.jit(forward_of(case)), platforms=["cuda"])(*args)
    assert "mosaic_gpu" in exported.mlir_module()
    batched = [jax.ShapeDtypeStruct((2, *a.shape), a.dtype) for a in args[:2]]
    mapped = lowered(jax.vmap(forward_of(case), in_axes=(0, 0, None, None, None, None)), *batched, *args[2:])
    assert mapped.out_info[0].shape == (2, 3, 2, 256)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: "-".join(map(str, dataclasses.astuple(config))))
@pytest.mark.parametrize("num_tokens", [1, 37, 1024])
def test_every_configuration_gives_the_same_bits_on_a_gpu(gpu, config, num_tokens):
    case = Case(num_tokens, 6, 1, mrope_section=(11, 11, 10))
    args = [jnp.asarray(a) for a in canonical(case, numpy_inputs(case))]
    assert_same(*(jax.jit(forward_of(case, c))(*args) for c in (config, None)))
