"""The torch writers of a KV cache: the eager reference by a loop over bits, the Triton kernel by the reference.

The codes of 8-bit caches, which the reference doesn't write, are compared with the definition in `tests.fp8`.

Without a GPU Triton's interpreter runs the kernel.
"""

import itertools
import re

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("triton")

import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tests import fp8
from torch_ref import reference, triton_oracle

FUNCTIONS = {"reference": reference.write_kv_cache, "oracle": triton_oracle.write_kv_cache}
FP8 = tuple(getattr(torch, name) for name in fp8.NAMES)
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
BITS_OF_CACHES = BITS | dict.fromkeys(FP8, torch.uint8)
BLOCKS, PLACES, HEADS, LANES = 3, 4, 2, 24
# Negative and past the capacity of 12: near, where a stray write is seen, and far, where 32 bits would make a slot.
NEAR = (5, -1, 0, 12, 11, -2, 7, 13)
SLOTS = (*NEAR, 2**31, -(2**31), 2**32 + 3, -(2**63), 2**63 - 1)

# By the axes as they lie in memory: block, place, head, lane; c is k and v.
LAYOUTS = {
    "b s h d": lambda new, b, s, h, d: [new(b, s, h, d) for _ in "kv"],
    "b h s d": lambda new, b, s, h, d: [new(b, h, s, d).transpose(1, 2) for _ in "kv"],
    "h b s d": lambda new, b, s, h, d: [new(h, b, s, d).permute(1, 2, 0, 3) for _ in "kv"],
    "s h b d": lambda new, b, s, h, d: [new(s, h, b, d).permute(2, 0, 1, 3) for _ in "kv"],
    "b h d s": lambda new, b, s, h, d: [new(b, h, d, s).permute(0, 3, 1, 2) for _ in "kv"],
    "b h s (c d)": lambda new, b, s, h, d: new(b, h, s, 2 * d).transpose(1, 2).split(d, dim=-1),
    "b s (h c) d": lambda new, b, s, h, d: new(b, s, 2 * h, d).unflatten(2, (h, 2)).unbind(3),
}


@pytest.fixture(params=FUNCTIONS)
def write(request):
    return FUNCTIONS[request.param]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cuda":
        request.getfixturevalue("gpu")
    return request.param


def noise(dtype, *shape, seed=0, device="cpu"):
    """Every pattern of bits: NaNs of many payloads, infinities, subnormals, zeros of both signs."""
    limits = np.iinfo(str(BITS_OF_CACHES[dtype]).removeprefix("torch."))
    drawn = np.random.default_rng(seed).integers(limits.min, limits.max, shape, limits.dtype, endpoint=True)
    return torch.from_numpy(drawn).view(dtype).to(device)


def make_caches(layout, dtype, device="cpu", *, num_heads=HEADS, num_lanes=LANES):
    """The memory of a cache with as much before and after it, then (blocks, places, heads, lanes) of k and v in it."""
    stored = []

    def new(*shape):
        stored.append(noise(dtype, 3, *shape, seed=7 + len(stored), device=device))
        return stored[-1][1]

    k_cache, v_cache = LAYOUTS[layout](new, BLOCKS, PLACES, num_heads, num_lanes)
    assert k_cache.shape == v_cache.shape == (BLOCKS, PLACES, num_heads, num_lanes)
    return stored, k_cache, v_cache


def bits(tensor):
    return tensor.view(BITS_OF_CACHES[tensor.dtype]).cpu().numpy()


def assert_same_bits(got, want):
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


def rows(dtype, num_tokens, *, device="cpu", num_heads=HEADS, num_lanes=LANES):
    """k and v."""
    return [noise(dtype, num_tokens, num_heads, num_lanes, seed=seed, device=device) for seed in (1, 2)]


@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_reference_writes_the_rows_and_no_other_bit(layout, dtype):
    k, v = rows(dtype, len(SLOTS))
    stored, k_cache, v_cache = make_caches(layout, dtype)
    want_stored, *want = make_caches(layout, dtype)
    for token, slot in enumerate(SLOTS):
        if 0 <= slot < BLOCKS * PLACES:
            for cache, x in zip(want, (k, v), strict=True):
                bits(cache)[slot // PLACES, slot % PLACES] = bits(x)[token]
    reference.write_kv_cache(k, v, k_cache, v_cache, torch.tensor(SLOTS))
    assert_same_bits(stored, want_stored)


def assert_oracle_equals_reference(layout, cache_dtype, k, v, slots, device, **sizes):
    results = []
    for write in FUNCTIONS.values():
        stored, k_cache, v_cache = make_caches(layout, cache_dtype, device, **sizes)
        assert write(k, v, k_cache, v_cache, slots) is None
        results.append(stored)
    assert_same_bits(*results)


@pytest.mark.parametrize("slots", [NEAR, SLOTS], ids=["near", "far"])
@pytest.mark.parametrize("dtype", BITS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_oracle_equals_the_reference(device, layout, dtype, slots):
    k, v = rows(dtype, len(slots), device=device)
    assert_oracle_equals_reference(layout, dtype, k, v, torch.tensor(slots, device=device), device)


@pytest.mark.parametrize("num_heads, num_lanes", [(1, 24), (1, 1), (3, 256), (5, 80)])
@pytest.mark.parametrize("layout", ["b s h d", "b h s d"])
def test_heads_and_lanes(device, layout, num_heads, num_lanes):
    sizes = {"num_heads": num_heads, "num_lanes": num_lanes}
    k, v = rows(torch.bfloat16, len(SLOTS), device=device, **sizes)
    assert_oracle_equals_reference(layout, torch.bfloat16, k, v, torch.tensor(SLOTS, device=device), device, **sizes)


@pytest.mark.parametrize("dtype", reference.POSITION_DTYPES, ids=str)
def test_slots_of_every_integer_dtype(write, device, dtype):
    """With what the dtype has of the values outside."""
    limits = torch.iinfo(dtype)
    held = [slot for slot in (*SLOTS, 2**64 - 1, 2**63 + 3) if limits.min <= slot <= limits.max]
    k, v = rows(torch.float16, len(held), device=device)
    stored, k_cache, v_cache = make_caches("b s h d", torch.float16, device)
    want, *want_caches = make_caches("b s h d", torch.float16, device)
    write(k, v, k_cache, v_cache, torch.tensor(held, dtype=dtype).to(device))
    inside = [slot if 0 <= slot < BLOCKS * PLACES else -1 for slot in held]
    reference.write_kv_cache(k, v, *want_caches, torch.tensor(inside, device=device))
    assert_same_bits(stored, want)


def test_rows_and_slots_of_any_strides(write, device):
    """k and v are columns of one projection, or lie with their lanes apart, and every second slot is read."""
    num_tokens = 5
    slots = torch.tensor([7, 99, 0, 99, -3, 99, 11, 99, 2], device=device)[::2]
    packed = noise(torch.bfloat16, num_tokens, 3 + 2 * HEADS * LANES, device=device)
    columns = [packed[:, 3 + n * HEADS * LANES :][:, : HEADS * LANES].unflatten(1, (HEADS, LANES)) for n in range(2)]
    turned = [noise(torch.bfloat16, LANES, HEADS, num_tokens, seed=n, device=device).permute(2, 1, 0) for n in range(2)]
    for k, v in (columns, turned):
        assert not k.is_contiguous() and not slots.is_contiguous()
        results = []
        for x, y, at in ((k, v, slots), (k.contiguous(), v.contiguous(), slots.contiguous())):
            stored, k_cache, v_cache = make_caches("b s h d", torch.bfloat16, device)
            write(x, y, k_cache, v_cache, at)
            results.append(stored)
        assert_same_bits(*results)


def numbers(dtype, cache_dtype, *shape):
    """Normal numbers of both dtypes, and ties of the narrower one."""
    rng = np.random.default_rng(0)
    wide = rng.uniform(1, 2, shape) * 2.0 ** rng.integers(-12, 13, shape) * rng.choice([-1, 1], shape)
    digits = 11 if torch.float16 in (dtype, cache_dtype) else 8  # of the narrower, so that the next one is a tie
    power = 2.0 ** np.floor(np.log2(abs(wide)))
    ties = (np.floor(wide / power * 2 ** (digits - 1)) + 0.5) / 2 ** (digits - 1) * power
    return torch.from_numpy(np.where(rng.random(shape) < 0.5, ties, wide)).to(dtype)


CASTS = [(a, b) for a, b in itertools.product(BITS, BITS) if a != b]


@pytest.mark.parametrize("dtype, cache_dtype", CASTS, ids=str)
def test_the_reference_rounds_to_nearest_even(dtype, cache_dtype):
    k, v = numbers(dtype, cache_dtype, 2, BLOCKS * PLACES, HEADS, LANES)
    _, k_cache, v_cache = make_caches("b s h d", cache_dtype)
    reference.write_kv_cache(k, v, k_cache, v_cache, torch.arange(BLOCKS * PLACES))
    digits = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24}[cache_dtype]
    for cache, x in ((k_cache, k), (v_cache, v)):
        exact = x.double().numpy()
        unit = 2.0 ** (np.floor(np.log2(abs(exact))) - digits + 1)
        np.testing.assert_array_equal(cache.flatten(0, 1).double().numpy(), np.rint(exact / unit) * unit)


@pytest.mark.parametrize("dtype, cache_dtype", CASTS, ids=str)
def test_casts_of_the_oracle(device, dtype, cache_dtype):
    """The interpreter doesn't round to bfloat16, so it gets numbers that need no rounding."""
    k, v = numbers(dtype, cache_dtype, 2, len(SLOTS), HEADS, LANES)
    if device == "cpu" and cache_dtype == torch.bfloat16:
        k, v = (x.to(torch.bfloat16).to(dtype) for x in (k, v))
    slots = torch.tensor(SLOTS, device=device)
    assert_oracle_equals_reference("b h s d", cache_dtype, k.to(device), v.to(device), slots, device)


def compiled(dtype, cache_dtype):
    """The PTX of the kernel for an H100."""
    kernel = triton_oracle._write_kv_cache
    constants = {name: 1 for name in kernel.arg_names if name.endswith("lane_stride")}
    constants |= {"slot_stride": 1, "head_dim": 64, "row_block": 64}
    types = {"k_ref": f"*{dtype}", "v_ref": f"*{dtype}", "slots_ref": "*i64"}
    types |= {"k_cache_ref": f"*{cache_dtype}", "v_cache_ref": f"*{cache_dtype}"}
    scales = ("k_scale_ref", "v_scale_ref")
    if cache_dtype.startswith("fp8"):
        types |= dict.fromkeys(scales, "*fp32")
    else:
        constants |= dict.fromkeys(scales)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()})
    options = {"num_warps": 1, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


needs_compiler = pytest.mark.skipif(
    triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled"
)


@needs_compiler
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_compiled_kernel_rounds_to_bfloat16_to_nearest_even(dtype):
    assert set(re.findall(r"cvt\.(\S+?)\.bf16", compiled(dtype, "bf16"))) == {"rn"}


# --- 8-bit caches -------------------------------------------------------------------------------------------------


@needs_compiler
@pytest.mark.parametrize("cache_dtype, code", [("fp8e4nv", "e4m3"), ("fp8e5", "e5m2")])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_compiled_kernel_divides_as_ieee_says_and_saturates(dtype, cache_dtype, code):
    ptx = compiled(dtype, cache_dtype)
    assert set(re.findall(r"\bdiv\.\S+", ptx)) - {"div.s32", "div.s64", "div.u32"} == {"div.rn.f32"}
    assert set(re.findall(r"cvt\.\S+\.e\dm\d\S+", ptx)) == {f"cvt.rn.satfinite.{code}x2.f32"}
    assert "ftz" not in ptx


SCALES = (1, 0.5, 4, 1.7, 1 / 3, 0.1, 448, 1e-3, 3e-39, 1e38, 0.0, -0.0, -2.5, np.nan, np.inf, 1.1754944e-38)
fp8_caches = pytest.mark.parametrize("cache_dtype", FP8, ids=str)


def assert_codes(k, v, cache_dtype, k_scale, v_scale, device):
    """Rows k and v, in NumPy, one a slot; the scales have any shape that the writer takes."""
    of_torch = [torch.from_numpy(x.view(f"int{8 * x.itemsize}")).view(getattr(torch, x.dtype.name)) for x in (k, v)]
    caches = [noise(cache_dtype, 1, *k.shape, seed=seed, device=device) for seed in (3, 4)]
    scales = [torch.from_numpy(x).to(device) for x in (k_scale, v_scale)]
    slots = torch.arange(len(k), device=device)
    triton_oracle.write_kv_cache(*(x.to(device) for x in of_torch), *caches, slots, *scales)
    name = str(cache_dtype).removeprefix("torch.")
    for cache, x, scale in zip(caches, (k, v), (k_scale, v_scale), strict=True):
        np.testing.assert_array_equal(bits(cache)[0], fp8.codes(x, scale.reshape(-1, 1), name))


@fp8_caches
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_codes_of_every_16_bit_number(device, dtype, cache_dtype):
    """By every scale."""
    every = np.arange(2**16, dtype=np.uint16).view(np.dtype(dtype)).reshape(16, 1, 4096)
    x = np.broadcast_to(every, (16, len(SCALES), 4096)).copy()
    scales = np.array(SCALES, np.float32)
    assert_codes(x, x, cache_dtype, scales, scales[::-1].copy(), device)


@fp8_caches
def test_codes_of_float32(device, cache_dtype):
    """Random bits, and by a scale of 1 the halfway points, their neighbours, and what float32 has at its ends."""
    values = fp8.finite_values(str(cache_dtype).removeprefix("torch."))
    ties = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    past = [2 * values[-1] - values[-2], 1.1754942e-38, 1e-45, 3.4028235e38, np.inf, np.nan, 0]
    points = np.concatenate([ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(np.inf)), past])
    points = np.concatenate([points, -points]).astype(np.float32)
    x = np.random.default_rng(0).integers(0, 2**32, (16, len(SCALES), 1024), np.uint32).view(np.float32)
    x[0, 0, : points.size] = points
    y = np.random.default_rng(1).standard_normal(x.shape, np.float32)
    y[0, -1, : points.size] = points
    scales = np.array(SCALES, np.float32)
    assert_codes(x, y, cache_dtype, scales, scales[::-1].copy(), device)


@fp8_caches
@pytest.mark.parametrize("k_shape, v_shape", [*itertools.product([(), (1,), (HEADS,)], repeat=2)])
def test_one_scale_or_one_for_each_head(device, cache_dtype, k_shape, v_shape):
    k, v = np.random.default_rng(0).standard_normal((2, 5, HEADS, LANES), np.float32)
    k_scale = np.resize(np.float32([0.3, 2.0]), k_shape)
    v_scale = np.resize(np.float32([1.7, 0.01]), v_shape)
    assert_codes(k, v, cache_dtype, k_scale, v_scale, device)


@pytest.mark.parametrize("num_heads, num_lanes", [(1, 24), (1, 1), (3, 256), (5, 80)])
@fp8_caches
def test_codes_of_any_heads_and_lanes(device, cache_dtype, num_heads, num_lanes):
    k, v = np.random.default_rng(0).standard_normal((2, 5, num_heads, num_lanes), np.float32).astype(np.float16)
    k_scale, v_scale = np.linspace(0.01, 3, 2 * num_heads, dtype=np.float32).reshape(2, num_heads)
    assert_codes(k, v, cache_dtype, k_scale, v_scale, device)


@fp8_caches
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_lie_where_the_slots_say_and_no_other_byte_changes(device, layout, cache_dtype):
    """The scales lie apart."""
    k, v = rows(torch.float16, len(SLOTS), device=device)
    scales = torch.tensor([[0.5, 0.01], [1.7, 3.0]], device=device)
    stored, k_cache, v_cache = make_caches(layout, cache_dtype, device)
    want_stored, *want = make_caches(layout, cache_dtype)
    triton_oracle.write_kv_cache(k, v, k_cache, v_cache, torch.tensor(SLOTS, device=device), scales[:, 0], scales[:, 1])
    for cache, x, scale in zip(want, (k, v), scales.cpu().numpy().T, strict=True):
        codes = fp8.codes(x.cpu().numpy(), scale[:, None], str(cache_dtype).removeprefix("torch."))
        for token, slot in enumerate(SLOTS):
            if 0 <= slot < BLOCKS * PLACES:
                bits(cache)[slot // PLACES, slot % PLACES] = codes[token]
    assert_same_bits(stored, want_stored)


@fp8_caches
def test_nothing_to_write_into_8_bits(device, cache_dtype):
    scale = torch.ones((), device=device)
    for shape in ((0, HEADS, LANES), (4, 0, LANES), (4, HEADS, 0)):
        k = torch.zeros(shape, device=device)
        cache = noise(cache_dtype, BLOCKS, PLACES, *shape[1:], device=device)
        before = bits(cache).copy()
        triton_oracle.write_kv_cache(k, k, cache, cache, torch.zeros(shape[0], device=device).int(), scale, scale)
        np.testing.assert_array_equal(bits(cache), before)


class LaunchedError(Exception):
    pass


@pytest.mark.parametrize(
    "cache_dtype, capability, refused",
    [
        ("float8_e4m3fn", (8, 0), True),
        ("float8_e5m2", (8, 6), True),
        ("bfloat16", (8, 0), False),
        ("float8_e5m2", (8, 9), False),
        ("float8_e4m3fn", (9, 0), False),
        ("float8_e4m3fn", (12, 0), False),
    ],
)
def test_8_bit_caches_need_a_gpu_that_converts(monkeypatch, cache_dtype, capability, refused):
    """Of tensors without memory: no GPU is asked."""

    def launch(*_):
        raise LaunchedError

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(triton_oracle, "_launcher", launch)
    message = "8-bit caches need a GPU of compute capability 8.9 or more, got {}.{}. Move the tensors with to('cpu')."
    expected = (
        (NotImplementedError, f"^{re.escape(message.format(*capability))}$") if refused else (LaunchedError, "^$")
    )
    with FakeTensorMode():
        call = good_call("cuda")
        call |= {name: zeros(3, 4, 2, 8, dtype=cache_dtype, device="cuda") for name in ("k_cache", "v_cache")}
        if cache_dtype != "bfloat16":
            call |= {name: zeros(1, dtype="float32", device="cuda") for name in ("k_scale", "v_scale")}
        with pytest.raises(expected[0], match=expected[1]):
            triton_oracle.write_kv_cache(**call)


# --- the ends of what may be asked for ----------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, HEADS, LANES), (4, 0, LANES), (4, HEADS, 0)])
def test_nothing_to_write(write, device, shape):
    k = torch.zeros(shape, device=device)
    cache = torch.ones(BLOCKS, PLACES, *shape[1:], device=device)
    write(k, k, cache, cache, torch.zeros(shape[0], dtype=torch.int64, device=device))
    assert (cache == 1).all()


@pytest.mark.parametrize("shape", [(0, PLACES), (BLOCKS, 0)])
def test_a_cache_without_slots(write, device, shape):
    k = torch.zeros(2, HEADS, LANES, device=device)
    cache = torch.ones(*shape, HEADS, LANES, device=device)
    write(k, k, cache, cache, torch.tensor([0, 1], device=device))


def test_rows_that_require_grad_leave_a_cache_that_does_not(write):
    k, v = (x.requires_grad_() for x in rows(torch.float32, 2))
    _, k_cache, v_cache = make_caches("b s h d", torch.float32)
    write(k, v, k_cache, v_cache, torch.tensor([1, 2]))
    assert not k_cache.requires_grad and not v_cache.requires_grad
    assert_same_bits([k_cache[0, 1:3]], [k.detach()])


@pytest.mark.gpu
@pytest.mark.alone
def test_compiled_oracle_reaches_offsets_past_2_to_the_31(gpu):
    """In rows of k, and in a cache by its blocks, places, heads and lanes."""
    k, v = rows(torch.bfloat16, 2, device="cuda")
    slots = torch.tensor([BLOCKS * PLACES - 1, 0], device="cuda")
    memory = torch.zeros(2**31 + 2**20, dtype=torch.bfloat16, device="cuda")
    far = memory.as_strided(k.shape, (2**31, LANES, 1))
    far.copy_(k)
    _, want, other = make_caches("b s h d", torch.bfloat16, "cuda")
    reference.write_kv_cache(k, v, want, other, slots)
    _, got, other = make_caches("b s h d", torch.bfloat16, "cuda")
    triton_oracle.write_kv_cache(far, v, got, other, slots)
    assert_same_bits([got], [want])
    dense = want.stride()
    for axis, size in enumerate(want.shape):
        strides = [2**31 // (size - 1) + 1 if n == axis else stride for n, stride in enumerate(dense)]
        far = memory.as_strided(want.shape, strides)
        far.zero_()
        triton_oracle.write_kv_cache(k, v, far, other, slots)
        assert_same_bits([far[-1, -1], far[0, 0]], [k[0], k[1]])


SHAPE = "{} must have shape {}, got {}. Check the sizes given."
VIEW = "{} must have shape {}, got {}. Pass such a view of it."
CACHE_DTYPES = {
    "reference": (
        "{} must be float16, bfloat16 or float32, got torch.{}. "
        "Allocate it in one of these: fewer bits would need scales."
    ),
    "oracle": (
        "{} must be float16, bfloat16, float32, float8_e4m3fn or float8_e5m2, got torch.{}. "
        "Allocate it in one of these."
    ),
}
DTYPE = "{} must be {}, got torch.{}. Cast it with to()."
INTEGERS = "int8 or int16 or int32 or int64 or uint8 or uint16 or uint32 or uint64"


def zeros(*shape, dtype="bfloat16", device="cpu"):
    return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)


BAD_CALLS = [
    (TypeError, DTYPE.format("v_cache", "bfloat16", "float16"), {"v_cache": zeros(3, 4, 2, 8, dtype="float16")}),
    (
        TypeError,
        DTYPE.format("k", "float16 or bfloat16 or float32", "float64"),
        {"k": zeros(5, 2, 8, dtype="float64"), "v": zeros(5, 2, 8, dtype="float64")},
    ),
    (TypeError, DTYPE.format("v", "bfloat16", "float32"), {"v": zeros(5, 2, 8, dtype="float32")}),
    (TypeError, DTYPE.format("slot_mapping", INTEGERS, "float32"), {"slot_mapping": zeros(5, dtype="float32")}),
    (TypeError, DTYPE.format("slot_mapping", INTEGERS, "bool"), {"slot_mapping": zeros(5, dtype="bool")}),
    (ValueError, VIEW.format("k", "(T, num_kv_heads, head_dim)", "(5, 16)"), {"k": zeros(5, 16)}),
    (
        ValueError,
        VIEW.format("k_cache", "(num_blocks, block_size, num_kv_heads, head_dim)", "(12, 2, 8)"),
        {"k_cache": zeros(12, 2, 8)},
    ),
    (ValueError, SHAPE.format("v", "(5, 2, 8)", "(5, 16)"), {"v": zeros(5, 16)}),
    (ValueError, SHAPE.format("v", "(5, 2, 8)", "(4, 2, 8)"), {"v": zeros(4, 2, 8)}),
    (ValueError, SHAPE.format("k_cache", "(3, 2, 2, 8)", "(3, 2, 4, 8)"), {"k_cache": zeros(3, 2, 4, 8)}),
    (ValueError, SHAPE.format("v_cache", "(3, 4, 2, 8)", "(2, 4, 2, 8)"), {"v_cache": zeros(2, 4, 2, 8)}),
    (ValueError, SHAPE.format("slot_mapping", "(5,)", "(4,)"), {"slot_mapping": zeros(4, dtype="int64")}),
    (ValueError, SHAPE.format("slot_mapping", "(5,)", "(5, 1)"), {"slot_mapping": zeros(5, 1, dtype="int64")}),
    (
        ValueError,
        "v_cache must be on cpu, like k, got meta. Move it there.",
        {"v_cache": zeros(3, 4, 2, 8, device="meta")},
    ),
]


def good_call(device="cpu"):
    return {
        "k": zeros(5, 2, 8, device=device),
        "v": zeros(5, 2, 8, device=device),
        "k_cache": zeros(3, 4, 2, 8, device=device),
        "v_cache": zeros(3, 4, 2, 8, device=device),
        "slot_mapping": torch.arange(5, device=device),
    }


@pytest.mark.parametrize("exception, message, changes", BAD_CALLS, ids=[message[:40] for _, message, _ in BAD_CALLS])
def test_a_bad_call_names_rule_value_and_remedy(write, exception, message, changes):
    write(**good_call())
    with pytest.raises(exception, match=f"^{re.escape(message)}$"):
        write(**good_call() | changes)


@pytest.mark.parametrize(
    "name, cache, dtype",
    [
        *itertools.product(FUNCTIONS, ("k_cache",), ("float64", "float8_e4m3fnuz")),
        *itertools.product(FUNCTIONS, ("v_cache",), ("uint8",)),
        *itertools.product(["reference"], ("k_cache", "v_cache"), fp8.NAMES),
    ],
)
def test_caches_of_other_dtypes(name, cache, dtype):
    message = CACHE_DTYPES[name].format(cache, dtype)
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        FUNCTIONS[name](**good_call() | {cache: zeros(3, 4, 2, 8, dtype=dtype)})


NO_SCALE = "{} must be None for caches of bfloat16, got {}. Leave it out: " + (
    "rows are cast as they are, and a scale would be ignored."
)
SCALE = "{} must be a float32 tensor for caches of float8_e5m2, got {}. Pass what the codes will be multiplied by."
SCALE_SHAPE = "{} must have shape (), (1,) or (num_kv_heads,) = (2,), got {}. Pass one scale, or one for each kv head."
FP8_CALL = {
    **{name: zeros(3, 4, 2, 8, dtype="float8_e5m2") for name in ("k_cache", "v_cache")},
    **{name: torch.ones(2) for name in ("k_scale", "v_scale")},
}
BAD_SCALES = [
    (ValueError, NO_SCALE.format("k_scale", "Tensor"), {"k_scale": torch.ones(1)}),
    (ValueError, NO_SCALE.format("v_scale", "float"), {"v_scale": 1.0}),
    (ValueError, SCALE.format("k_scale", None), FP8_CALL | {"k_scale": None}),
    (ValueError, SCALE.format("v_scale", None), FP8_CALL | {"v_scale": None}),
    (TypeError, SCALE.format("v_scale", 0.5), FP8_CALL | {"v_scale": 0.5}),
    (TypeError, DTYPE.format("k_scale", "float32", "float64"), FP8_CALL | {"k_scale": zeros(2, dtype="float64")}),
    (ValueError, SCALE_SHAPE.format("v_scale", "(3,)"), FP8_CALL | {"v_scale": torch.ones(3)}),
    (ValueError, SCALE_SHAPE.format("k_scale", "(2, 1)"), FP8_CALL | {"k_scale": torch.ones(2, 1)}),
    (
        ValueError,
        "k_scale must be on cpu, like k, got meta. Move it there.",
        FP8_CALL | {"k_scale": torch.ones(2, device="meta")},
    ),
    (
        TypeError,
        DTYPE.format("v_cache", "float8_e5m2", "float8_e4m3fn"),
        FP8_CALL | {"v_cache": zeros(3, 4, 2, 8, dtype="float8_e4m3fn")},
    ),
]


@pytest.mark.parametrize("exception, message, changes", BAD_SCALES, ids=[message[:40] for _, message, _ in BAD_SCALES])
def test_bad_scales(exception, message, changes):
    triton_oracle.write_kv_cache(**good_call() | FP8_CALL)
    with pytest.raises(exception, match=f"^{re.escape(message)}$"):
        triton_oracle.write_kv_cache(**good_call() | changes)


def test_the_oracle_names_the_devices_that_it_runs_on():
    message = "the kernel runs on cpu and cuda tensors, got meta. Move them with to('cpu')."
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}$"):
        triton_oracle.write_kv_cache(**good_call("meta"))
