"""A KV cache over a mesh: heads by the compiler, everything else in shard_map, and never a gathered cache."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from pallas_qk import _partition, _rows
from tests import cached
from tests.cached import CachedCase
from tests.cases import Case
from tests.compare import assert_same
from tests.devices import MODES, collectives, mesh, mesh_of, put
from tests.lowering import GPU_IMPLEMENTATIONS, lowered_text

pytestmark = pytest.mark.usefixtures("on_the_host")

CASE = Case(8, 8, 4, head_dim=64, rotary_dim=16, max_position=40, dtype="float32")
NHD, BOTH = CachedCase(CASE), CachedCase(CASE, "b s (h c) d")
FP8 = CachedCase(CASE, kv_dtype="float8_e4m3fn", scale_per_head=(True, False))
HEADS, OF_CACHE, WHOLE = (None, "model"), (None, None, "model"), ()
AXES = {"data": 2, "model": 4}
OF_BOTH_KINDS = ("auto", "explicit, set_mesh")
REFUSED = "kv_cache must be whole on each device but for its heads, got axis '{}' over {} devices. "
REFUSED += "Call inside jax.shard_map, with each device's own part of the cache and its own slots."


def step(case: CachedCase, *leaves, implementation: str | None = None):
    *others, slots = leaves[: -case.num_arrays]
    kv_cache = leaves[-case.num_arrays :]
    qkv, others = (others[0], others[1:]) if case.case.packed else (tuple(others[:3]), others[3:])
    return cached.op(case, implementation)(qkv, *others, kv_cache if case.num_arrays == 2 else kv_cache[0], slots)


def leaves_of(case: CachedCase) -> list[jax.Array]:
    """qkv, weights, table, positions and slots; then the cache."""
    qkv, *others, kv_cache, slots = cached.arguments(case)
    return jax.tree.leaves((qkv, others, slots, kv_cache))


def specs_of(case: CachedCase, q, k, of_cache, tokens=WHOLE) -> list[tuple]:
    rows = [q] if case.case.packed else [q, k, k]
    return [*rows, WHOLE, WHOLE, WHOLE, tokens, tokens, *[of_cache] * case.num_arrays]


@functools.cache
def wanted(case: CachedCase):
    return jax.jit(functools.partial(step, case))(*leaves_of(case))


def run(case: CachedCase, mode: str, specs):
    """The results and the collectives over the mesh."""
    with mesh_of(AXES, mode) as on:
        args = put(on, leaves_of(case), specs)
        donated = tuple(range(len(args) - case.num_arrays, len(args)))
        compiled = jax.jit(functools.partial(step, case), donate_argnums=donated).lower(*args).compile()
        return compiled(*args), compiled.as_text()


FORMS = {
    "as k": (HEADS, NHD),
    "over another axis": ((None, "data"), BOTH),
    "whole": (WHOLE, NHD),
    "8 bits": (HEADS, FP8),
}


@pytest.mark.parametrize(
    "form, mode", [(form, mode) for form in FORMS for mode in (MODES if form == "as k" else OF_BOTH_KINDS)]
)
def test_heads(form, mode):
    """Of q over any axes, of k, v and the cache over one; no collective, and the cache stays sharded."""
    q, case = FORMS[form]
    got, text = run(case, mode, specs_of(case, q, HEADS, OF_CACHE))
    assert_same(got, wanted(case))
    assert not collectives(text) and "input_output_alias" in text.partition("\n")[0]
    for cache in jax.tree.leaves(got.kv_cache):
        assert cache.sharding.shard_shape(cache.shape)[2] == cache.shape[2] // 4


@pytest.mark.parametrize("mode", OF_BOTH_KINDS)
@pytest.mark.parametrize(
    "q, k, of_cache, tokens",
    [
        (WHOLE, WHOLE, OF_CACHE, WHOLE),
        (("data",), ("data",), OF_CACHE, ("data",)),
        (("model",), ("model",), OF_CACHE, ("model",)),
        (("data", "model"), ("data", "model"), WHOLE, ("data",)),
        (WHOLE, (None, "data"), OF_CACHE, WHOLE),
        (HEADS, HEADS, (None, None, "data"), WHOLE),
        (HEADS, HEADS, WHOLE, WHOLE),
    ],
    ids=str,
)
def test_rows_go_where_the_cache_is(q, k, of_cache, tokens, mode):
    """Tokens, and heads over other axes than the cache's, are moved. The cache is not."""
    got, text = run(NHD, mode, specs_of(NHD, q, k, of_cache, tokens))
    assert_same(got, wanted(NHD))
    sizes = {x.size // parts for x in cached.caches(NHD) for parts in (1, 2, 4)}
    for found in collectives(text):
        shapes = re.findall(r"\[([\d,]+)\]", found)
        assert not any(math.prod(map(int, shape.split(","))) in sizes for shape in shapes), found
    parts = AXES[of_cache[-1]] if of_cache else 1
    assert {cache.sharding.shard_shape(cache.shape)[2] for cache in got.kv_cache} == {4 // parts}


def assert_refused(case: CachedCase, mode: str, specs, message: str) -> None:
    """Where the compiler alone knows shardings the error is JAX's and holds ours."""
    error = ValueError if "explicit" in mode else jax.errors.JaxRuntimeError
    with pytest.raises(error) as caught:
        run(case, mode, specs)
    assert message in str(caught.value) if error is not ValueError else message == str(caught.value)


@pytest.mark.parametrize("mode", OF_BOTH_KINDS)
@pytest.mark.parametrize(
    "axis, of_cache, tokens",
    [
        ("b", ("data",), WHOLE),
        ("s", (None, "model"), WHOLE),
        ("s", (None, "model"), ("model",)),
        ("d", (None, None, None, "data"), WHOLE),
    ],
)
def test_a_cache_cut_otherwise_is_refused(axis, of_cache, tokens, mode):
    """Also where tokens are sharded over the axis that cuts it."""
    case = CachedCase(CASE, num_blocks=6)
    specs = specs_of(case, tokens, tokens, of_cache, tokens=tokens)
    assert_refused(case, mode, specs, REFUSED.format(axis, 2 if "data" in of_cache else 4))


@pytest.mark.parametrize("mode", OF_BOTH_KINDS)
def test_heads_beside_packed_qkv_are_refused(mode):
    case = CachedCase(Case(8, 8, 4, head_dim=64, rotary_dim=16, max_position=40, dtype="float32", packed=True))
    message = "kv_cache must be whole on each device where q, k and v are packed, got heads over 4 devices. "
    message += "Call inside jax.shard_map with each device's heads packed, or pass q, k and v as three arrays to the "
    message += "function that takes them."
    assert_refused(case, mode, specs_of(case, WHOLE, WHOLE, OF_CACHE), message)


@pytest.mark.parametrize("mode", OF_BOTH_KINDS)
def test_caches_cut_unlike_are_refused(mode):
    message = "the caches of k and v must be cut alike, got (1, 1, 2, 1) and (1, 1, 4, 1) shards of their axes. "
    message += "Shard both alike."
    *specs, _, _ = specs_of(NHD, WHOLE, WHOLE, OF_CACHE)
    assert_refused(NHD, mode, [*specs, (None, None, "data"), OF_CACHE], message)


@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3fn"])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_in_shard_map(packed, kv_dtype):
    """Each device has its own tokens, blocks and slots; packed qkv too."""
    case = CachedCase(dataclasses.replace(CASE, packed=packed), kv_dtype=kv_dtype, num_blocks=8)
    leaves = leaves_of(case)
    *others, slots, k_cache, v_cache = leaves
    slots = jnp.array([3, -1, 15, 0, 16, 7, 2, 5])  # of each device's two blocks, for two tokens each
    leaves = [*others, slots, k_cache, v_cache]
    with mesh_of({"x": 4}, "auto, set_mesh") as on:
        specs = specs_of(case, ("x",), ("x",), ("x",), tokens=("x",))
        function = jax.shard_map(
            functools.partial(step, case), in_specs=tuple(P(*spec) for spec in specs), out_specs=P("x")
        )
        args = put(on, leaves, specs)
        compiled = jax.jit(function).lower(*args).compile()
        got = compiled(*args)
    assert not collectives(compiled.as_text())
    of_all = jnp.where((slots >= 0) & (slots < 8), slots + 8 * (jnp.arange(8) // 2), -1)
    assert_same(got, jax.jit(functools.partial(step, case))(*others, of_all, k_cache, v_cache))


@pytest.mark.parametrize("mode", OF_BOTH_KINDS)
def test_scales_are_cut_with_the_heads_or_whole(mode):
    """However the scales of the heads lie: each device divides by those of its own heads."""
    scales = jnp.asarray(FP8.scales[0])

    def step_with_scales(*leaves):
        *leaves, k_scale = leaves
        (q, k, v, *others, slots), kv_cache = leaves[:-2], leaves[-2:]
        return cached.op(FP8, k_scale=k_scale)((q, k, v), *others, tuple(kv_cache), slots)

    leaves = leaves_of(FP8)
    want = jax.jit(step_with_scales)(*leaves, scales)
    for of_scales in (WHOLE, ("model",), ("data",)):
        with mesh_of(AXES, mode) as on:
            args = put(on, [*leaves, scales], [*specs_of(FP8, HEADS, HEADS, OF_CACHE), of_scales])
            compiled = jax.jit(step_with_scales).lower(*args).compile()
            assert_same(compiled(*args), want)
        assert of_scales == ("data",) or not collectives(compiled.as_text())


def test_a_scale_that_varies_alone():
    """Every device has the same rows and a scale of its own: k's cache varies with it, and v's does not."""
    leaves, scales = leaves_of(FP8), jnp.array([1.0, 0.5, 3.0, 0.1])

    def written(k_scale, *leaves):
        (q, k, v, *others, slots), kv_cache = leaves[:-2], leaves[-2:]
        return cached.op(FP8, k_scale=k_scale)((q, k, v), *others, kv_cache, slots).kv_cache

    def in_shard_map(k_scale, *leaves):
        k_cache, v_cache = written(k_scale, *leaves)
        assert [jax.typeof(x).manual_axis_type.varying for x in (k_cache, v_cache)] == [{"x"}, set()]
        return k_cache, v_cache

    specs = P("x"), *(P() for _ in leaves)
    function = jax.shard_map(in_shard_map, mesh=mesh(x=4), in_specs=specs, out_specs=(P("x"), P()))
    k_cache, v_cache = jax.jit(function)(scales, *leaves)
    want = [jax.jit(written)(scale, *leaves) for scale in scales]
    assert_same((k_cache, v_cache), (jnp.concatenate([k for k, _ in want]), want[0][1]))


def assert_one_kernel_that_aliases(text: str, name: str, num_arrays: int) -> None:
    target = {"mosaic_gpu": "mosaic_gpu", "triton": "__gpu$xla.gpu.triton"}[
        name
    ]  # JAX 0.10 loses Mosaic's own name here
    assert [line.split("@")[1].startswith(target) for line in text.splitlines() if "custom_call @" in line] == [True]
    assert text.count("output_operand_alias<") == num_arrays


@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [NHD, BOTH], ids=lambda case: case.cache_axes)
def test_gpu_kernels_in_shard_map(case, name):
    specs = specs_of(case, ("x",), ("x",), ("x",), tokens=("x",))
    case = dataclasses.replace(case, num_blocks=8)
    with mesh_of({"x": 2}, "auto, set_mesh") as on:
        function = jax.shard_map(
            functools.partial(step, case, implementation=name),
            mesh=on,
            in_specs=tuple(P(*spec) for spec in specs),
            out_specs=P("x"),
        )
        assert_one_kernel_that_aliases(lowered_text(function, *leaves_of(case)), name, case.num_arrays)


@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [NHD, BOTH], ids=lambda case: case.cache_axes)
def test_gpu_kernels_in_what_the_compiler_partitions(case, name):
    """What its partitioner is told that each device computes, lowered for CUDA; its custom call shows nothing."""
    on = mesh(data=2, model=4)
    qkv, *others, kv_cache, slots = cached.arguments(case)
    *weights, table, positions = others
    k_cache, v_cache = kv_cache if case.num_arrays == 2 else (kv_cache, None)
    inputs = _rows.Inputs(*qkv[:2], *weights, table, positions[None], qkv[2], k_cache, v_cache, slots)
    specs = _rows.Inputs(HEADS, HEADS, *[WHOLE] * 4, HEADS, OF_CACHE, OF_CACHE, WHOLE)
    specs = specs._replace(**{name: None for name, x in inputs._asdict().items() if x is None})
    operands = put(on, jax.tree.leaves(inputs), [spec for spec in specs if spec is not None])
    tree = jax.tree.structure((inputs,))
    call = _rows.Call(case.options, name)
    _, one_device, results, of_operands = _partition.partition("forward", call, tree, on, operands, None)
    shapes = [
        jax.ShapeDtypeStruct(sharding.shard_shape(x.shape), x.dtype)
        for x, sharding in zip(operands, of_operands, strict=True)
    ]
    assert_one_kernel_that_aliases(lowered_text(one_device, *shapes), name, case.num_arrays)
    assert [x.spec for x in results[-case.num_arrays :]] == [x.spec for x in of_operands if len(x.spec) == 4]
