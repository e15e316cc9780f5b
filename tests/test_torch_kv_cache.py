"""The torch writers of a KV cache: the eager reference by a loop over bits, the Triton kernel by the reference.

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
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torch_ref import reference, triton_oracle

FUNCTIONS = {"reference": reference.write_kv_cache, "oracle": triton_oracle.write_kv_cache}
BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32}
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
    limits = np.iinfo(str(BITS[dtype]).removeprefix("torch."))
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
    return tensor.view(BITS[tensor.dtype]).cpu().numpy()


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


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set: nothing is compiled")
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_compiled_kernel_rounds_to_bfloat16_to_nearest_even(dtype):
    kernel = triton_oracle._write_kv_cache
    constants = {name: 1 for name in kernel.arg_names if name.endswith("lane_stride")}
    constants |= {"slot_stride": 1, "head_dim": 64, "row_block": 64}
    types = {"k_ref": f"*{dtype}", "v_ref": f"*{dtype}", "slots_ref": "*i64"}
    types |= {"k_cache_ref": "*bf16", "v_cache_ref": "*bf16"}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(n),): v for n, v in constants.items()})
    options = {"num_warps": 1, "enable_fp_fusion": False}
    ptx = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert set(re.findall(r"cvt\.(\S+?)\.bf16", ptx)) == {"rn"}


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
CACHE_DTYPE = (
    "{} must be float16, bfloat16 or float32, got torch.{}. Allocate it in one of these: fewer bits would need scales."
)
DTYPE = "{} must be {}, got torch.{}. Cast it with to()."
INTEGERS = "int8 or int16 or int32 or int64 or uint8 or uint16 or uint32 or uint64"


def zeros(*shape, dtype="bfloat16", device="cpu"):
    return torch.zeros(shape, dtype=getattr(torch, dtype), device=device)


BAD_CALLS = [
    (TypeError, CACHE_DTYPE.format("k_cache", "float8_e4m3fn"), {"k_cache": zeros(3, 4, 2, 8, dtype="float8_e4m3fn")}),
    (TypeError, CACHE_DTYPE.format("v_cache", "uint8"), {"v_cache": zeros(3, 4, 2, 8, dtype="uint8")}),
    (TypeError, CACHE_DTYPE.format("k_cache", "float64"), {"k_cache": zeros(3, 4, 2, 8, dtype="float64")}),
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


def test_the_oracle_names_the_devices_that_it_runs_on():
    message = "the kernel runs on cpu and cuda tensors, got meta. Move them with to('cpu')."
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}$"):
        triton_oracle.write_kv_cache(**good_call("meta"))
