"""KV caches of 8 bits hold the codes that serving stacks store, of every number and any scale."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_qk import kv_cache
from pallas_qk._mosaic_gpu.config import MosaicForward
from tests import cached, fp8
from tests.cached import CachedCase
from tests.cases import Case
from tests.compare import assert_same
from tests.devices import mesh_of, put
from tests.lowering import GPU_IMPLEMENTATIONS
from tests.run import has_gpu, kernel

IMPLEMENTATIONS = ("xla", *GPU_IMPLEMENTATIONS)
LEAST = np.float32(2.0**-126)  # of float32's normal numbers
SCALES = np.array(
    [
        *(1.0, 0.5, 4.0, 2.0**-20, 1.7, 1 / 3, 0.1, 448.0, 1e-3, 0.0173, -2.5, 3e38, LEAST),
        *(LEAST / 2, 3e-39, 1e-45, 0.0, -0.0, np.inf, -np.inf, np.nan),
    ],
    np.float32,
)
CASE = Case(9, 4, 3, head_dim=64, rotary_dim=16, max_position=40)


def every_pattern(dtype: str) -> np.ndarray:
    """All numbers of 16 bits; of float32 what decides: ties and their neighbours, the ends of ranges, and any bits."""
    if dtype != "float32":
        return np.arange(1 << 16, dtype=np.uint16).view(jnp.dtype(dtype))
    values = np.concatenate([fp8.finite_values(name) for name in fp8.NAMES])
    ties = (values[:, None] * [1, 1 + 2**-4, 1 + 2**-3]).ravel().astype(np.float32).view(np.uint32)
    near = (ties[:, None] + np.arange(-2, 3).astype(np.uint32)).ravel()
    rng = np.random.default_rng(0)
    some = np.concatenate([near, near | 1 << 31, rng.integers(0, 1 << 32, (1 << 15) - 2 * near.size, np.uint32)])
    return some.view(np.float32)


def flushed(x: np.ndarray) -> np.ndarray:
    """As XLA's CPU reads float32: subnormal numbers are zero."""
    x = x.astype(np.float32)
    return np.where(np.abs(x) < LEAST, np.copysign(np.float32(0), x), x)


LATE = MosaicForward("halves", 1, "after_gate", cast_first=False)


@pytest.mark.parametrize(
    "implementation, dtype, in_cache",
    [
        (name, dtype, in_cache)
        for name in (*IMPLEMENTATIONS, "mosaic_gpu late")
        for dtype, in_cache in itertools.product(["float16", "bfloat16", "float32"], fp8.NAMES)
        # The interpreter is slow, and computes codes by the function of plain XLA.
        if name != "triton" or has_gpu() or (dtype == "bfloat16") == (in_cache == "float8_e5m2")
    ],
)
def test_every_number_and_every_scale(implementation, dtype, in_cache):
    """v holds every number in each head, and each head has a scale of its own: three a call, for the interpreters."""
    implementation, *late = implementation.split()
    config = {"config": LATE} if late else {}
    numbers = every_pattern(dtype).reshape(-1, 1, 512)
    num_tokens, num_kv_heads = len(numbers), 3
    case = CachedCase(
        Case(num_tokens, 1, num_kv_heads, head_dim=512, rotary_dim=16, dtype=dtype, max_position=40),
        kv_dtype=in_cache,
        num_blocks=num_tokens // 16,
        block_size=16,
        finite=True,
        return_kv=True,
        scale_per_head=(True, True),
    )
    v = np.broadcast_to(numbers, (num_tokens, num_kv_heads, 512))
    data = cached.data_of(case)._replace(v=v.reshape(num_tokens, -1), slots=np.arange(num_tokens, dtype=np.int32))
    function = kernel("forward", implementation, case.options, False, **config)
    inputs = cached.inputs_of(case, data=data)
    keeps = has_gpu() or implementation == "mosaic_gpu"  # whose interpreter is NumPy
    groups = SCALES.reshape(-1, num_kv_heads)
    if implementation == "triton" and not has_gpu():
        groups = groups[[2, 5]]
    for scales in groups:
        outputs = function(inputs._replace(k_scale=jnp.asarray(scales), v_scale=jnp.asarray(scales)))
        divisors = (scales if keeps else flushed(scales))[:, None]
        for rows, in_place in ((np.asarray(outputs.k), outputs.k_cache), (v, outputs.v_cache)):
            want = fp8.codes(rows if keeps else flushed(rows), divisors, in_cache)
            np.testing.assert_array_equal(np.asarray(in_place).view(np.uint8).reshape(want.shape), want)


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "mosaic_gpu late"])
def test_quotients_that_are_ties(implementation):
    """19 * 49 divided by 49 is a tie, which goes up to 20. By a product with 1 / 49 it would be less, and 18."""
    ties = np.tile(np.arange(17, 32, 2), 8)
    case = CachedCase(
        Case(1, 1, 1, head_dim=64, rotary_dim=16, dtype="float16", max_position=40),
        kv_dtype="float8_e4m3fn",
        finite=True,
        scale_per_head=(False, False),
    )
    implementation, *late = implementation.split()
    config = {"config": dataclasses.replace(LATE, rows_per_warp=4)} if late else {}
    function, data = kernel("forward", implementation, case.options, False, **config), cached.data_of(case)
    for divisor in (41, 47, 49, 55, 61):
        x = (ties * divisor).astype(np.float16).reshape(1, -1)
        inputs = cached.inputs_of(case, data=data._replace(v=x, slots=np.ones(1, np.int32)))
        got = function(inputs._replace(v_scale=jnp.full(1, divisor, jnp.float32))).v_cache
        np.testing.assert_array_equal(np.asarray(got)[0, 1, 0].astype(int), (ties + 1) // 4 * 4)


@pytest.mark.parametrize("cast_first", [True, False])
def test_the_kernel_casts_before_a_step_or_within_it(cast_first):
    """Codes of both kinds of rows, by the scales of their heads."""
    case = CachedCase(CASE, kv_dtype="float8_e4m3fn", return_kv=True, scale_per_head=(True, True), finite=True)
    inputs = cached.inputs_of(case, data=cached.data_of(case))
    want = kernel("forward", "mosaic_gpu", case.options, False)(inputs)
    config = MosaicForward("halves", 4, "after_gate", cast_first=cast_first)
    assert_same(kernel("forward", "mosaic_gpu", case.options, False, config=config)(inputs), want)


def test_the_definition():
    """Codes of what every format's table says, and of what vLLM's writer stores for numbers past it."""
    for name, largest in (("float8_e4m3fn", 0x7E), ("float8_e5m2", 0x7B)):
        values = np.arange(256, dtype=np.uint8).view(jnp.dtype(name)).astype(np.float32)
        finite = np.isfinite(values)
        np.testing.assert_array_equal(fp8.codes(values[finite], np.float32(1), name), np.arange(256)[finite])
        ends = fp8.codes(np.array([np.inf, -np.inf, 1e9, -1e9, np.nan, -np.nan], np.float32), np.float32(1), name)
        assert ends.tolist() == [largest, largest | 0x80, largest, largest | 0x80, 0x7F, 0x7F]
    halves = np.array([17, 19, 2.0**-10, 3 * 2.0**-10], np.float32)  # ties of e4m3: 16 or 18, 18 or 20, subnormal
    got = fp8.codes(halves, np.float32(1), "float8_e4m3fn").view(jnp.dtype("float8_e4m3fn")).astype(np.float32)
    np.testing.assert_array_equal(got, [16, 20, 0, 2.0**-8])


@pytest.mark.parametrize("in_cache", fp8.NAMES)
def test_scales_of_every_form(in_cache):
    """A number, an array without axes or with one, traced or not: the codes of one scale for each head."""
    case = CachedCase(CASE, kv_dtype=in_cache, scale_per_head=(False, False), finite=True)
    arrays, (k_scale, v_scale) = cached.arguments(case), case.scales
    op = cached.op(case)
    want = op(*arrays)

    @jax.jit
    def traced(*scales):
        return cached.op(case, k_scale=scales[0], v_scale=scales[1])(*arrays)

    forms = [
        (k_scale, v_scale),
        (jnp.asarray(k_scale), np.asarray(v_scale).reshape(1)),
        (jnp.full(3, k_scale), jnp.full(1, v_scale)),
        (np.full(3, k_scale), np.full(3, v_scale)),
    ]
    for scales in forms:
        assert_same(cached.op(case, k_scale=scales[0], v_scale=scales[1])(*arrays), want)
        assert_same(traced(*scales), want)
    assert_same(cached.op(case, k_scale=float(k_scale), v_scale=float(v_scale))(*arrays), want)
    two = traced(jnp.float32(2), jnp.float32(2))
    assert_same(cached.op(case, k_scale=2, v_scale=2.0)(*arrays), two)
    with jax.enable_x64(True):  # numbers of Python's that went through the jit have 64 bits there
        assert_same(traced(2, 2.0), two)
    infinite = traced(jnp.float32(jnp.inf), -jnp.float32(jnp.inf))
    assert_same(cached.op(case, k_scale=10**400, v_scale=-1e300)(*arrays), infinite)


def test_float32_rows_are_rounded_once():
    """1 + 2^-4 + 2^-20 lies above a tie of e4m3; through bfloat16 it would be the tie, and go down to even."""
    case = CachedCase(dataclasses.replace(CASE, dtype="float32"), kv_dtype="float8_e4m3fn", finite=True, scale=1.0)
    (q, k, v), *others = cached.arguments(case)
    op = cached.op(case, k_scale=1.0, v_scale=1.0)
    got = op((q, k, jnp.full_like(v, 1 + 2**-4 + 2**-20)), *others)
    written = cached.by_slot(case, got.kv_cache)[1][cached.written(case, np.asarray(others[-1]))]
    np.testing.assert_array_equal(np.asarray(written, np.float32), 1.125)


@functools.cache
def rows_and_codes():
    case = CachedCase(CASE, kv_dtype="float8_e4m3fn", return_kv=True, scale_per_head=(True, True), finite=True)
    return case, cached.op(case)(*cached.arguments(case))


def test_rows_that_are_returned_are_not_quantised():
    case, got = rows_and_codes()
    plain = dataclasses.replace(case, kv_dtype=None)
    want = cached.op(plain)(*cached.arguments(plain))
    assert_same((got.q, got.gate, got.k, got.v), (want.q, want.gate, want.k, want.v))


@pytest.mark.parametrize(
    "in_cache, axes",
    [
        *itertools.product(["float8_e4m3fn"], [*cached.AXES, "HND"]),
        *itertools.product(["float8_e5m2", "float16"], ["b s h d", "b h s (c d)", "l b s h d"]),
    ],
)
def test_a_cache_that_is_read(in_cache, axes):
    """Codes times scale, in float32, then rounded; blocks, places and heads in the order of attention."""
    case = CachedCase(CASE, axes, kv_dtype=in_cache, finite=True, scale_per_head=(True, False))
    arrays = cached.caches(case)
    scales = case.scales or (None, None)
    held = tuple(map(jnp.asarray, arrays)) if case.num_arrays == 2 else jnp.asarray(arrays[0])

    def read(held, *scales):
        return kv_cache.read(held, jnp.bfloat16, k_scale=scales[0], v_scale=scales[1], cache_axes=axes)

    def wanted(part, scale):
        values = part.astype(np.float32)
        return (values if scale is None else values * scale.reshape(-1, 1)).astype(jnp.bfloat16)

    want = [wanted(part, scale) for part, scale in zip(cached.kv_views(case, arrays), scales, strict=True)]
    assert_same(read(held, *scales), want)
    assert_same(jax.jit(read)(held, *scales), want)


def test_what_was_written_is_read():
    case, got = rows_and_codes()
    k, v = kv_cache.read(got.kv_cache, jnp.float32, k_scale=case.scales[0], v_scale=case.scales[1])
    slots = np.asarray(cached.arguments(case)[-1])
    rows = slots[(slots >= 0) & (slots < case.capacity)]
    inside = np.isin(slots, rows)
    for held, row, scale in ((k, got.k, case.scales[0]), (v, got.v, case.scales[1])):
        want = np.asarray(row, np.float32).reshape(-1, 3, 64)[inside]
        held = np.asarray(held).reshape(-1, 3, 64)[rows]
        np.testing.assert_array_less(np.abs(held - want), np.abs(want) / 16 + 2**-9 * scale[:, None])


SHAPE = "kv_cache must have shape {}, got {}."
UNREADABLE = {
    "one of two": ((2, 4, 3, 8), "b s h d", {}, "kv_cache must be the two arrays of k and of v, got a "),
    "odd": ((2, 4, 3, 7), "b s h (c d)", {}, SHAPE.format("(num_blocks, block_size, 3, 6)", (2, 4, 3, 7))),
    "axes": (
        (2, 4, 8),
        "b s h (c d)",
        {},
        SHAPE.format("(num_blocks, block_size, num_kv_heads, 2 * head_dim)", (2, 4, 8)),
    ),
    "three kinds": (
        (2, 3, 4, 3, 8),
        "b c s h d",
        {},
        SHAPE.format("(num_blocks, 2, block_size, num_kv_heads, head_dim)", (2, 3, 4, 3, 8)),
    ),
    "dtype": ((2, 4, 3, 8), "b s h (c d)", {"dtype": "int8"}, "dtype must be float16, bfloat16 or float32, got int8."),
    "no dtype": ((2, 4, 3, 8), "b s h (c d)", {"dtype": None}, "dtype must be float16, bfloat16 or float32, got None"),
    "scale": (
        (2, 4, 3, 8),
        "b s h (c d)",
        {"k_scale": 1.0},
        "k_scale must be left out with a cache of float16, got 1.0 of type float.",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_can_not_be_read(case):
    shape, axes, changes, message = UNREADABLE[case]
    with pytest.raises((TypeError, ValueError)) as caught:
        kv_cache.read(jnp.zeros(shape, jnp.float16), **{"dtype": jnp.float32, "cache_axes": axes} | changes)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("mode", ["auto", "explicit, set_mesh"])
@pytest.mark.parametrize("of_cache, of_scale", [((None, None, "x"), ()), ((None, None, "x"), ("y",)), (("y",), ())])
def test_a_cache_that_is_read_stays_sharded(on_the_host, of_cache, of_scale, mode):
    case = CachedCase(dataclasses.replace(CASE, num_kv_heads=4), kv_dtype="float8_e4m3fn", num_blocks=4, finite=True)
    held, scale = list(map(jnp.asarray, cached.caches(case))), jnp.asarray(case.scales[1])

    def read(k, v, scale):
        return kv_cache.read((k, v), jnp.float32, k_scale=0.5, v_scale=scale)

    want = read(*held, scale)
    with mesh_of({"x": 2, "y": 2}, mode) as on:
        args = put(on, [*held, scale], [of_cache, of_cache, of_scale])
        for got in (read(*args), jax.jit(read)(*args)):
            assert_same(got, want)
            assert {x.sharding.shard_shape(x.shape) for x in got} == {args[0].sharding.shard_shape(args[0].shape)}


def test_scales_of_each_layer_are_mapped():
    stack = jnp.arange(2 * 3 * 4 * 2 * 64, dtype=jnp.float32).reshape(2, 3, 4, 2, 64).astype("float8_e5m2")
    scales = jnp.array([[0.5, 2.0], [3.0, 0.25]])
    k, _ = jax.vmap(lambda x, s: kv_cache.read((x, x), jnp.float32, k_scale=s, v_scale=1.0))(stack, scales)
    np.testing.assert_array_equal(k, stack.astype(jnp.float32) * scales[:, None, None, :, None])
