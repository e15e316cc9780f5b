"""The backward kernels on Triton: gradients against float64, their bits, and what they are lowered to."""

import dataclasses
import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_qk import _operands, _triton_vjp
from pallas_qk._config import Spec, TritonBackward, triton_backward
from pallas_qk._triton_vjp import BACKWARD_NAME, WEIGHT_SUM_NAME
from tests import forms
from tests.cases import SMALL_CASES, Case, Inputs, make_inputs
from tests.compare import compare_bits
from tests.definition import mrope_axis
from tests.run import has_gpu, quick_jit

NAMES = ("dq_gate", "dk", "dq_weight", "dk_weight")

# Each layout, dtype and option once; together they take half a minute in interpret mode.
CASES = (
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
)


def make_small(case: Case, seed: int = 0) -> tuple[Inputs, list[jax.Array]]:
    """Inputs like those of `make_inputs`, and dq_out, dk_out and dgate_out, from NumPy: nothing to compile a case."""
    rng = np.random.default_rng(seed)
    num_tokens, d = case.num_tokens, case.head_dim
    weight_dtype, cache_dtype = case.weight_dtype or case.dtype, case.cache_dtype or case.dtype

    def normal(*shape: int, scale: float = 1.0, dtype: str = case.dtype) -> jax.Array:
        return jnp.asarray((scale * rng.standard_normal(shape, np.float32)).astype(jnp.dtype(dtype)))

    angles = rng.uniform(0, 6, (case.max_position, case.rotary_dim // 2))
    cache = np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32).astype(jnp.dtype(cache_dtype))
    rows = (num_tokens,) if case.mrope_section is None else (3, num_tokens)
    inputs = Inputs(
        normal(num_tokens, case.num_q_heads * 2 * d, scale=case.scale),
        normal(num_tokens, case.num_kv_heads * d, scale=case.scale),
        normal(d, dtype=weight_dtype),
        normal(d, dtype=weight_dtype),
        jnp.asarray(cache),
        jnp.asarray(rng.integers(0, case.max_position, rows).astype(case.positions_dtype)),
    )
    return inputs, [normal(num_tokens, h, d) for h in (case.num_q_heads, case.num_kv_heads, case.num_q_heads)]


def make_cotangents(case: Case, seed: int = 0) -> list[jax.Array]:
    """dq_out, dk_out and dgate_out, (T, heads, D), on the device."""
    keys = jax.random.split(jax.random.key(seed + 100), 3)
    heads = case.num_q_heads, case.num_kv_heads, case.num_q_heads
    shapes = [(case.num_tokens, h, case.head_dim) for h in heads]
    return [jax.random.normal(key, shape, jnp.dtype(case.dtype)) for key, shape in zip(keys, shapes, strict=True)]


def arguments(case: Case, inputs: Inputs) -> list[jax.Array]:
    """The forward's arguments as the kernels take them."""
    q_gate, k, q_weight, k_weight, cache, positions = inputs
    q_gate = q_gate.reshape(case.num_tokens, case.num_q_heads, 2 * case.head_dim)
    k = k.reshape(case.num_tokens, case.num_kv_heads, case.head_dim)
    return [q_gate, k, q_weight, k_weight, cache, jnp.atleast_2d(positions)]


def backward_of(case: Case, **settings):
    """`backward`, of the inputs and the cotangents of q, k and gate, as a tuple."""

    def backward(*arrays):
        dq_out, dk_out, dgate_out = arrays[6:]
        inputs, cotangents = _operands.Inputs(*arrays[:6]), _operands.Outputs(dq_out, dk_out, gate=dgate_out)
        return tuple(_triton_vjp.backward(inputs, cotangents, options=forms.options(case), **settings))

    return backward


@functools.cache
def kernels(case: Case, config: TritonBackward | None):
    return quick_jit(backward_of(case, config=config, interpret=not has_gpu()))


def run(case: Case, inputs: Inputs, cotangents, config: TritonBackward | None = None) -> tuple[jax.Array, ...]:
    """dq_gate, dk, dq_weight and dk_weight; by the interpreter where there is no GPU."""
    outputs = kernels(case, config)(*arguments(case, inputs), *cotangents)
    shapes = [x.shape for x in arguments(case, inputs)[:4]]
    dtypes = [inputs.q_gate.dtype, inputs.k.dtype, jnp.float32, jnp.float32]
    assert [(x.shape, x.dtype) for x in outputs] == list(zip(shapes, dtypes, strict=True))
    return outputs


def default_config(case: Case, num_sms: int = 132) -> TritonBackward:
    spec = Spec(
        case.num_tokens, case.num_q_heads, case.num_kv_heads, case.head_dim, case.rotary_dim, str(jnp.dtype(case.dtype))
    )
    wide = "float32" in (case.dtype, case.weight_dtype, case.cache_dtype)
    return triton_backward(spec, num_sms, mrope=case.mrope_section is not None, wide=wide)


@dataclasses.dataclass(frozen=True)
class Gradient:
    """A float64 gradient and the largest error of a correct implementation."""

    exact: np.ndarray
    bound: np.ndarray


def cos_and_sin(case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """float64, (T, 1, R/2). Positions must lie inside the table."""
    half = case.rotary_dim // 2
    axes = [mrope_axis(j, case.mrope_section) if case.mrope_section else 0 for j in range(half)]
    rows = np.atleast_2d(np.asarray(inputs.positions)).astype(np.int64)[axes].T
    cache = np.asarray(inputs.cos_sin_cache).astype(np.float64)
    return cache[rows, np.arange(half)][:, None], cache[rows, half + np.arange(half)][:, None]


def norm_and_rope_gradients(case: Case, x, weight, cos, sin, dout) -> tuple[Gradient, Gradient]:
    """Of x (T, H, D) and weight (D,), all of them float64."""
    d, half, weight = case.head_dim, case.rotary_dim // 2, weight + case.norm_beta
    first, second, rest = dout[..., :half], dout[..., half : 2 * half], dout[..., 2 * half :]
    inv_rms = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + case.eps)
    dy = np.concatenate([first * cos + second * sin, second * cos - first * sin, rest], axis=-1) * inv_rms
    dweight = np.sum(dy * x, axis=(0, 1))
    dx = dy * weight - x * inv_rms**2 * np.mean(dy * weight * x, axis=-1, keepdims=True)

    # In float32 roundoffs: a sum over a row adds at most D times in a row, in whatever order. 1 / rms: that, mean and
    # eps 3, all halved by the root, and 4 for its approximation. dy: that and 3, of the size of its terms. dweight: dy,
    # a product and one addition a row. dx: g = dy * weight has dy's and 2, the other term g's, the sum's, twice that of
    # 1 / rms and 6. Then the rounding to the activations' dtype; 1 % for products of errors.
    u, inv_rms_error = 2.0**-24, (d + 3) / 2 + 4
    dy_error, roundoff = inv_rms_error + 3, {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}[case.dtype]
    subnormal = 2.0**-24 if case.dtype == "float16" else 2.0**-126  # float32 results may be flushed
    size1, size2 = abs(first * cos) + abs(second * sin), abs(second * cos) + abs(first * sin)
    size = np.concatenate([size1, size2, abs(rest)], axis=-1) * inv_rms
    dweight_bound = 1.01 * u * (dy_error + 1 + x[..., 0].size) * np.sum(size * abs(x), axis=(0, 1)) + 2.0**-126
    size = size * abs(weight)
    along_x = abs(x) * inv_rms**2 * np.mean(size * abs(x), axis=-1, keepdims=True)
    dx_bound = 1.01 * u * ((dy_error + 2) * size + (dy_error + 2 + d + 2 * inv_rms_error + 6) * along_x)
    dx_bound = dx_bound + roundoff * (abs(dx) + dx_bound) + subnormal
    return Gradient(dx, dx_bound), Gradient(dweight, dweight_bound)


def define(case: Case, inputs: Inputs, cotangents) -> list[Gradient]:
    """The four gradients. Positions must lie inside the table."""
    q_gate, k, q_weight, k_weight = (np.asarray(x).astype(np.float64) for x in arguments(case, inputs)[:4])
    dq_out, dk_out, dgate_out = (np.asarray(x).astype(np.float64) for x in cotangents)
    angles = cos_and_sin(case, inputs)
    dq, dq_weight = norm_and_rope_gradients(case, q_gate[..., : case.head_dim], q_weight, *angles, dq_out)
    dk, dk_weight = norm_and_rope_gradients(case, k, k_weight, *angles, dk_out)
    exact = np.concatenate([dq.exact, dgate_out], axis=-1)
    bound = np.concatenate([dq.bound, np.zeros_like(dgate_out)], axis=-1)
    return [Gradient(exact, bound), dk, dq_weight, dk_weight]


def assert_defined(got, case: Case, inputs: Inputs, cotangents):
    for name, array, want in zip(NAMES, got, define(case, inputs, cotangents), strict=True):
        error = np.abs(np.asarray(array).astype(np.float64) - want.exact)
        worst = np.unravel_index(np.argmax(error - want.bound), error.shape)
        assert (error <= want.bound).all(), f"{name}{worst}: error {error[worst]}, bound {want.bound[worst]}"


def assert_same_bits(got, want):
    assert len(got) == len(want)
    for name, a, b in zip(NAMES, got, want, strict=False):
        rows = (-1, a.shape[-1])
        assert compare_bits(name, a.reshape(rows), b.reshape(rows)).differing == 0


@pytest.mark.parametrize("case", [Case(3, 2, 1), Case(2, 1, 2, 80, 40, mrope_section=(8, 6, 6), norm_beta=1.0)])
def test_the_formulas_are_the_derivatives_of_the_op(case):
    """By JAX, in float64, of the op as it is defined."""
    inputs, cotangents = make_small(case)
    half = case.rotary_dim // 2
    x, weight = (np.asarray(a).astype(np.float64) for a in (arguments(case, inputs)[1], inputs.k_weight))
    dout = np.asarray(cotangents[1]).astype(np.float64)
    cos, sin = cos_and_sin(case, inputs)

    def norm_and_rope(x, weight):
        y = x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + case.eps) * (weight + case.norm_beta)
        y1, y2 = y[..., :half], y[..., half : 2 * half]
        return jnp.concatenate([y1 * cos - y2 * sin, y1 * sin + y2 * cos, y[..., 2 * half :]], axis=-1)

    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        vjp = quick_jit(lambda x, weight, dout: jax.vjp(norm_and_rope, x, weight)[1](dout))
        gradients = vjp(*map(jnp.asarray, (x, weight, dout)))
    for got, want in zip(gradients, norm_and_rope_gradients(case, x, weight, cos, sin, dout), strict=True):
        assert got.dtype == np.float64
        np.testing.assert_allclose(np.asarray(got), want.exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_gradients_equal_their_float64_definition(case):
    inputs, cotangents = make_small(case, seed=1)
    assert_defined(run(case, inputs, cotangents), case, inputs, cotangents)


@pytest.mark.parametrize(
    "case, layout, rows",
    [
        (Case(5, 3, 2), "row", 1),
        (Case(5, 3, 2), "halves", 1),
        (Case(5, 3, 2, head_dim=64, rotary_dim=32), "halves", 4),
        (Case(5, 3, 2, head_dim=64, rotary_dim=32, mrope_section=(6, 5, 5)), "row", 8),
    ],
    ids=lambda value: value.id if isinstance(value, Case) else str(value),
)
def test_every_layout_and_number_of_rows(case, layout, rows):
    inputs, cotangents = make_small(case)
    config = TritonBackward(layout, rows, q_programs=3, k_programs=2)
    assert_defined(run(case, inputs, cotangents, config), case, inputs, cotangents)


@pytest.mark.parametrize("q_programs, k_programs", [(1, 1), (2, 7), (40, 9)])
def test_the_number_of_programs_leaves_dq_gate_and_dk_alone(q_programs, k_programs):
    """From one program for all rows to more than there are steps, with fewer and with more for k than for q."""
    case = Case(9, 3, 2, head_dim=128, rotary_dim=32)
    inputs, cotangents = make_small(case)
    want = run(case, inputs, cotangents)
    config = dataclasses.replace(default_config(case), q_programs=q_programs, k_programs=k_programs)
    got = run(case, inputs, cotangents, config)
    assert_same_bits(got[:2], want[:2])
    assert_defined(got, case, inputs, cotangents)


def test_a_token_alone_gives_the_bits_it_gives_in_a_batch():
    case = Case(13, 5, 2)
    inputs, cotangents = make_small(case)
    together = run(case, inputs, cotangents)
    one_token = dataclasses.replace(case, num_tokens=1)
    for token in (0, 6, 12):
        rows = slice(token, token + 1)
        one = dataclasses.replace(
            inputs, q_gate=inputs.q_gate[rows], k=inputs.k[rows], positions=inputs.positions[rows]
        )
        alone = run(one_token, one, [x[rows] for x in cotangents])
        assert_same_bits(alone[:2], [x[rows] for x in together[:2]])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_no_tokens(dtype):
    case = Case(0, dtype=dtype)
    outputs = run(case, *make_small(case))
    assert outputs[0].shape == (0, 16, 512)
    assert not np.asarray(outputs[2]).any() and not np.asarray(outputs[3]).any()


def test_the_gates_cotangent_keeps_its_bits():
    case = Case(3, 2, 1)
    inputs, cotangents = make_small(case)
    bits = np.random.default_rng(0).integers(0, 2**16, size=(3, 2, 256), dtype=np.uint16)
    bits[0, 0, :5] = [0x7F81, 0xFFC1, 0x7F80, 0x0001, 0x8000]  # signalling and quiet NaN, infinity, subnormal, -0.0
    dgate_out = lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16)
    dq_gate = run(case, inputs, [*cotangents[:2], dgate_out])[0]
    got = np.asarray(lax.bitcast_convert_type(dq_gate[..., 256:], jnp.uint16))
    if not has_gpu():
        # Interpret mode passes bfloat16 through float32 and back, which keeps of a NaN only that it is one.
        is_nan = (bits & 0x7FFF) > 0x7F80
        assert ((got[is_nan] & 0x7FFF) > 0x7F80).all()
        got, bits = got[~is_nan], bits[~is_nan]
    np.testing.assert_array_equal(got, bits)


@pytest.mark.parametrize(
    "position, dtype", [(-1, "int32"), (100, "int32"), (2**31 + 3, "uint32"), (2**32 + 3, "int64")]
)
def test_a_position_outside_the_table_reads_row_0(position, dtype):
    case = Case(5, 3, 1, max_position=100)
    inputs, cotangents = make_small(case)
    with jax.enable_x64(dtype == "int64"):
        positions, inside = (np.asarray(inputs.positions).astype(dtype) for _ in range(2))
        positions[2], inside[2] = np.array(position, dtype), 0
        got, want = (
            run(case, dataclasses.replace(inputs, positions=jnp.asarray(x)), cotangents) for x in (positions, inside)
        )
    assert_same_bits(got, want)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_an_mrope_position_outside_the_table_reads_row_0_alone(axis):
    """Its own lanes do; the others read what the other two rows of positions say."""
    case = Case(3, 2, 1, mrope_section=(11, 11, 10), max_position=100)
    inputs, cotangents = make_small(case)
    got, want = (
        run(case, dataclasses.replace(inputs, positions=inputs.positions.at[axis, 1].set(position)), cotangents)
        for position in (100, 0)
    )
    assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_past_the_last_add_nothing_even_without_eps(dtype):
    """Three rows by steps of two or more: with eps 0 a row of zeros would have an infinite 1 / rms."""
    case = Case(3, 1, 1, head_dim=80, rotary_dim=20, eps=0.0, dtype=dtype)
    inputs, cotangents = make_small(case)
    config = dataclasses.replace(default_config(case), rows_per_step=4)
    assert_defined(run(case, inputs, cotangents, config), case, inputs, cotangents)


def test_the_sum_of_many_partials():
    """More rows of partials than one tile holds."""
    rng = np.random.default_rng(0)
    partials = rng.standard_normal((9001 + 11, 20), np.float32)
    types = (jax.ShapeDtypeStruct((20,), jnp.float32),) * 2
    kernel = functools.partial(_triton_vjp._sum_weights, q_rows=9001, types=types, interpret=not has_gpu())
    for got, rows in zip(jax.jit(kernel)(partials), (partials[:9001], partials[9001:]), strict=True):
        exact = rows.astype(np.float64)
        assert (abs(np.asarray(got) - exact.sum(0)) <= len(rows) * 2.0**-24 * abs(exact).sum(0)).all()


def lower(case: Case, num_sms: int = 132):
    gpu = AbstractDevice(device_kind="NVIDIA H200", num_cores=num_sms, platform="cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=gpu)):
        call = jax.jit(functools.partial(_triton_vjp.backward, options=forms.options(case)))
        return call.trace(*forms.types(case)).lower(lowering_platforms=("cuda",))


def lowered(case: Case, num_sms: int = 132) -> str:
    return lower(case, num_sms).as_text()


@pytest.mark.parametrize("case", [*SMALL_CASES, Case(65536, 32, 2)], ids=lambda case: case.id)
def test_every_case_is_lowered_for_cuda_to_two_kernels_without_a_gpu(case):
    calls = re.findall(r"custom_call[^\n]*", lowered(case))
    assert [(BACKWARD_NAME in call, WEIGHT_SUM_NAME in call) for call in calls] == [(True, False), (False, True)]
    assert re.search(r"num_warps = (\d+)", calls[0]).group(1) == "1"  # several would sum through shared memory


def shared_memory(case: Case, directory) -> dict[str, int]:
    """Bytes of shared memory of each kernel as Triton compiles it, a relative of the Triton inside JAX."""
    import triton
    from jaxlib.mlir import ir
    from jaxlib.triton import dialect
    from triton.backends.compiler import GPUTarget

    module = lower(case).compiler_ir("stablehlo")
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


def test_no_tokens_need_no_kernel():
    assert "custom_call" not in lowered(Case(0))


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
        grid = re.search(r"grid_x = (\d+)", lowered(case, num_sms)).group(1)
        assert int(grid) == config.q_programs + config.k_programs


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(4096),
        Case(4095, 15, 1, dtype="float16", mrope_section=(11, 11, 10)),
        Case(4096, 16, 4, head_dim=80, rotary_dim=40, cache_dtype="float32"),
        pytest.param(Case(16384, 32, 2), marks=pytest.mark.alone),
    ],
    ids=lambda case: case.id,
)
def test_reruns_give_equal_bits(gpu, case):
    inputs, cotangents = make_inputs(case), make_cotangents(case)
    first = run(case, inputs, cotangents)
    for _ in range(10):
        assert_same_bits(run(case, inputs, cotangents), first)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case",
    [
        Case(16384),
        Case(5, 3, 1, head_dim=64, rotary_dim=32, mrope_section=(6, 5, 5)),
        Case(5, 3, 1, head_dim=128, rotary_dim=64, weight_dtype="float32", cache_dtype="float32"),
        Case(5, 3, 1, head_dim=80, rotary_dim=40, dtype="float32"),
    ],
    ids=lambda case: case.id,
)
def test_jax_gives_the_main_kernel_one_warp_and_no_shared_memory(gpu, case, tmp_path):
    shapes = jax.eval_shape(lambda: [*arguments(case, make_inputs(case)), *make_cotangents(case)])
    jax.jit(backward_of(case)).lower(*shapes).compile(compiler_options={"xla_dump_to": str(tmp_path)})
    (launches,) = tmp_path.glob("*.thunk_sequence.txt")
    launch = re.search(rf"{BACKWARD_NAME} .*threads: \[(\d+), 1, 1\] +shared_memory: (\d+) bytes", launches.read_text())
    assert launch is not None and launch.groups() == ("32", "0")


@pytest.mark.gpu
@pytest.mark.alone
def test_offsets_past_2_to_the_31(gpu):
    """q_gate has 2^31 elements and one token more: the last token's bits are those it has alone."""
    case, one = Case(2**17 + 1, 32, 2), Case(1, 32, 2)
    inputs, cotangents = make_inputs(case), make_cotangents(case)
    got = [x[-1:] for x in run(case, inputs, cotangents)[:2]]
    last = dataclasses.replace(inputs, q_gate=inputs.q_gate[-1:], k=inputs.k[-1:], positions=inputs.positions[-1:])
    assert_same_bits(got, run(one, last, [x[-1:] for x in cotangents])[:2])
