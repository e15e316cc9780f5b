"""A cache is updated where it lies: no copy of it in compiled programs of plain XLA, an alias in lowered kernels."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from tests import cached
from tests.cached import CachedCase
from tests.cases import Case
from tests.compare import assert_same
from tests.devices import collectives, mesh_of, put
from tests.lowering import GPU_IMPLEMENTATIONS, on_gpu

CASE = Case(8, 4, 2, head_dim=64, rotary_dim=16, max_position=40)
# Larger than every other array, so that a copy is known by its size.
PAGED = CachedCase(CASE, num_blocks=60, block_size=8, finite=True)
STACKED = dataclasses.replace(PAGED, cache_axes="l b s h d", num_blocks=20)
IN_PLACE = ["float32", "float16"] if jax.__version_info__ < (0, 11) else ["float32", "float16", "bfloat16"]


def with_dtype(case: CachedCase, dtype: str) -> CachedCase:
    return dataclasses.replace(case, case=dataclasses.replace(case.case, dtype=dtype))


def assert_in_place(function, args, donated: int, num_devices: int = 1) -> str:
    """The donated caches are results, and nothing of a device's part of one is moved beside the write itself.

    Returns the compiled program's text.
    """
    compiled = jax.jit(function, donate_argnums=donated).lower(*args).compile()
    text, caches = compiled.as_text(), jax.tree.leaves(args[donated])
    assert "input_output_alias" in text.partition("\n")[0]
    sizes = {x.size // num_devices for x in caches}
    moves = r"(copy|copy-start|convert|bitcast-convert|transpose|all-gather|all-gather-start|all-reduce|reshape)"
    for shape, name in re.findall(rf" = \(?\w+\[([\d,]+)\]\S* {moves}\(", text):
        assert math.prod(map(int, shape.split(","))) not in sizes, (name, shape)
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert temporary < min(x.nbytes for x in caches) / num_devices, temporary
    return text


def split(arguments):
    *others, kv_cache, slots = arguments
    return (*others, slots), kv_cache


def donated(case: CachedCase, implementation: str):
    """A step, its arguments, and which of them are the caches."""
    others, kv_cache = split(cached.arguments(case))

    def step(others, kv_cache):
        return cached.op(case, implementation)(*others[:-1], kv_cache, others[-1])

    return step, (others, kv_cache), 1


def carried(case: CachedCase, implementation: str, loop: str):
    others, kv_cache = split(cached.arguments(case))

    def write(kv_cache, layer):
        return cached.op(case, implementation)(*others[:-1], kv_cache, others[-1], layer=layer)

    def scan(kv_cache):
        def body(kv_cache, layer):
            outputs = write(kv_cache, layer)
            return outputs.kv_cache, outputs.q

        return lax.scan(body, kv_cache, jnp.arange(case.num_layers))

    def while_loop(kv_cache):
        def body(carry):
            layer, kv_cache = carry
            return layer + 1, write(kv_cache, layer).kv_cache

        return lax.while_loop(lambda carry: carry[0] < case.num_layers, body, (0, kv_cache))[1]

    def inner_jit(kv_cache):
        return jax.jit(write)(kv_cache, 1)

    return {"scan": scan, "while_loop": while_loop, "inner jit": inner_jit}[loop], (kv_cache,), 0


def by_heads(case: CachedCase, implementation: str, on):
    (qkv, *others), kv_cache = split(cached.arguments(case))

    def step(qkv, kv_cache):
        return cached.op(case, implementation)(qkv, *others[:-1], kv_cache, others[-1])

    args = tuple(put(on, qkv, [(None, "x")] * 3)), tuple(put(on, kv_cache, [(None, None, "x")] * 2))
    return step, args, 1


def by_blocks(case: CachedCase, implementation: str, on):
    """In shard_map, with each device's own tokens, blocks and slots."""
    (qkv, *weights_and_table, positions, slots), kv_cache = split(cached.arguments(case))

    def device_step(qkv, positions, kv_cache, slots):
        return cached.op(case, implementation)(qkv, *weights_and_table, positions, kv_cache, slots)

    def over(x):
        return jax.tree.map(lambda leaf: put(on, [leaf], [("x",)])[0], x)

    step = jax.shard_map(device_step, mesh=on, in_specs=P("x"), out_specs=P("x"))
    return step, tuple(map(over, (qkv, positions, kv_cache, slots))), 2


LOOPS = ("scan", "while_loop", "inner jit")


@pytest.mark.parametrize(
    "axes, num_kv_heads, dtype",
    [
        *((axes, 2, "float32") for axes in cached.AXES),
        *((axes, 1, "float16") for axes in ("b s h d", "b h s (c d)", "b s (h c) d")),
        *(("b s h d", 2, dtype) for dtype in IN_PLACE[1:]),
    ],
)
def test_donated(on_the_host, axes, num_kv_heads, dtype):
    case = with_dtype(dataclasses.replace(PAGED, cache_axes=axes), dtype)
    case = dataclasses.replace(case, case=dataclasses.replace(case.case, num_kv_heads=num_kv_heads))
    assert_in_place(*donated(case, "xla"))


@pytest.mark.parametrize("dtype", IN_PLACE)
@pytest.mark.parametrize("loop", LOOPS)
def test_carried(on_the_host, loop, dtype):
    assert_in_place(*carried(with_dtype(STACKED, dtype), "xla", loop))


@pytest.mark.parametrize("dtype", IN_PLACE)
@pytest.mark.parametrize("by", [by_heads, by_blocks])
def test_over_a_mesh(on_the_host, by, dtype):
    with mesh_of({"x": 2}, "auto, set_mesh") as on:
        assert_in_place(*by(with_dtype(PAGED, dtype), "xla", on), num_devices=2)


def assert_one_kernel_in_place(function, args, donated: int, num_devices: int = 1) -> None:
    """One call of ours, no copy, and the caches stay in their memory; the others of `args` are kept."""
    text = assert_in_place(function, args, donated, num_devices)
    assert len(re.findall(r"custom-call\(.*(?:mosaic_gpu|triton)", text)) == 1
    before = [x.unsafe_buffer_pointer() for cache in args[donated] for x in device_arrays(cache)]
    results = jax.jit(function, donate_argnums=donated)(*args)
    caches = [x for x in jax.tree.leaves(results) if x.size == args[donated][0].size]
    assert [x.unsafe_buffer_pointer() for cache in caches for x in device_arrays(cache)] == before


def device_arrays(x: jax.Array) -> list[jax.Array]:
    return [shard.data for shard in x.addressable_shards]


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("how", ["donated", *LOOPS])
@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
def test_a_kernel_on_a_gpu(gpu, kv_dtype, how, implementation):
    paged, stacked = (dataclasses.replace(case, kv_dtype=kv_dtype) for case in (PAGED, STACKED))
    if how == "donated":
        assert_one_kernel_in_place(*donated(paged, implementation))
    else:
        assert_one_kernel_in_place(*carried(stacked, implementation, how))


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["donated", *LOOPS])
@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
def test_plain_xla_on_a_gpu(gpu, kv_dtype, how):
    """Of every dtype, those too of which a CPU takes a temporary array."""
    paged, stacked = (dataclasses.replace(case, kv_dtype=kv_dtype) for case in (PAGED, STACKED))
    assert_in_place(*(donated(paged, "xla") if how == "donated" else carried(stacked, "xla", how)))


@pytest.mark.parametrize("how", ["donated", "scan"])
def test_8_bits_on_a_cpu_take_one_temporary_array(on_the_host, how):
    """Not two, which a copy beside it would make."""
    paged, stacked = (dataclasses.replace(case, kv_dtype="float8_e4m3fn") for case in (PAGED, STACKED))
    function, args, caches = donated(paged, "xla") if how == "donated" else carried(stacked, "xla", how)
    compiled = jax.jit(function, donate_argnums=caches).lower(*args).compile()
    assert "input_output_alias" in compiled.as_text().partition("\n")[0]
    both = sum(x.nbytes for x in jax.tree.leaves(args[caches]))
    assert compiled.memory_analysis().temp_size_in_bytes < 1.2 * both


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("by", [by_heads, by_blocks])
def test_a_kernel_on_two_gpus(gpu, by, implementation):
    devices = jax.local_devices()
    if len(devices) < 2:
        pytest.skip(f"needs two GPUs, got {len(devices)}")
    on = Mesh(np.array(devices[:2]), ("x",))
    with jax.set_mesh(on):
        step, args, caches = by(PAGED, implementation, on)
        assert not collectives(jax.jit(step).lower(*args).compile().as_text())
        got = jax.tree.map(np.asarray, jax.jit(step)(*args))
        assert_one_kernel_in_place(step, args, caches, num_devices=2)
    if by is by_heads:
        step, args, _ = donated(PAGED, implementation)
        assert_same(got, jax.tree.map(np.asarray, jax.jit(step)(*args)))


def test_a_copy_would_be_seen(on_the_host):
    case = with_dtype(PAGED, "float32")
    step, args, caches = donated(case, "xla")

    def keeps_the_old(others, kv_cache):
        return step(others, kv_cache).kv_cache, kv_cache[0]

    with pytest.raises(AssertionError):
        assert_in_place(keeps_the_old, args, caches)


@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("axes", ["b s h d", "b s (h c) d", "l b h s d"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
def test_a_kernel_is_one_call_that_aliases_the_cache(kv_dtype, packed, axes, implementation):
    case = CachedCase(dataclasses.replace(CASE, packed=packed), axes, kv_dtype)
    others, kv_cache = split(cached.arguments(case))

    def step(others, kv_cache):
        return cached.op(case, implementation)(*others[:-1], kv_cache, others[-1])

    with on_gpu():
        program = jax.jit(step, donate_argnums=1).trace(others, kv_cache).lower(lowering_platforms=("cuda",))
    text = program.as_text()
    (call,) = [line for line in text.splitlines() if "custom_call @" in line]
    aliases = r"output_operand_alias<output_tuple_indices = \[\d*\], operand_index = (\d+)"
    operands = re.search(r"@\S+?\(([^)]*)\)", call)[1].split(", ")
    aliased = [operands[int(index)] for index in re.findall(aliases, call)]
    donated = re.findall(r"(%arg\d+): tensor<\S+> {tf.aliasing_output", text)
    assert len(donated) == len(aliased) == case.num_arrays
    if "func.call" not in text and " call @" not in text:  # an inner function numbers its arguments anew
        while reshaped := [x for x in aliased if not x.startswith("%arg")]:
            aliased.remove(reshaped[0])
            operation = r"stablehlo.(?:reshape|optimization_barrier) (%\w+)"
            aliased.append(re.search(rf"{reshaped[0]} = {operation}", text)[1])
        assert sorted(aliased) == sorted(donated)


def test_the_old_cache_is_kept_without_donation():
    case = with_dtype(PAGED, "float32")
    others, kv_cache = split(cached.arguments(case))
    before = jax.tree.map(np.array, kv_cache)
    cached.op(case)(*others[:-1], kv_cache, others[-1])
    assert_same(kv_cache, before)
