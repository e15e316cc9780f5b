"""Rows of k and v written into a KV cache: by every implementation, in every layout, and what is left as it was."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pallas_qk import _cache_axes, _cache_write, _rows
from tests import cached, forms
from tests.cached import AXES, CachedCase
from tests.cases import Case, numpy_inputs
from tests.compare import assert_same
from tests.lowering import GPU_IMPLEMENTATIONS
from tests.run import has_gpu, kernel

IMPLEMENTATIONS = ("xla", *GPU_IMPLEMENTATIONS)
CASE = Case(9, 4, 3, head_dim=64, rotary_dim=16, max_position=40)
PACKED = dataclasses.replace(CASE, packed=True)
PAIRS = dataclasses.replace(PACKED, rotation="pairs", round_norm=False)
IN_PLACE = dataclasses.replace(CASE, gate="in_place")
FORMS = (
    *(CachedCase(CASE, axes) for axes in AXES),
    CachedCase(PACKED, return_kv=True),
    CachedCase(PACKED, "b h s (c d)"),
    CachedCase(PACKED, "b s (c h) d"),
    CachedCase(dataclasses.replace(PACKED, gate=None), "b s (h c) d"),
    CachedCase(dataclasses.replace(PACKED, gate="in_place", gathered=True), "l b s h d"),
    CachedCase(IN_PLACE, "b s (h c) d", return_kv=True),
    CachedCase(dataclasses.replace(CASE, gate=None, mrope_section=(3, 3, 2), norm_beta=1.0)),
    CachedCase(dataclasses.replace(CASE, dtype="float16"), kv_dtype="float32"),
    CachedCase(CASE, kv_dtype="float32"),
    CachedCase(dataclasses.replace(CASE, dtype="bfloat16"), kv_dtype="float16"),
    CachedCase(dataclasses.replace(CASE, dtype="float32"), "b s h (c d)", kv_dtype="bfloat16", return_kv=True),
    CachedCase(dataclasses.replace(CASE, dtype="float32", head_dim=80, rotary_dim=40), "b h s d"),
    *(CachedCase(CASE, axes, "float8_e4m3fn") for axes in ("b s h d", "b h s (c d)", "b s (h c) d", "l b s h d")),
    CachedCase(dataclasses.replace(PACKED, dtype="bfloat16"), kv_dtype="float8_e5m2", scale_per_head=(True, False)),
    CachedCase(dataclasses.replace(PACKED, gate=None), "b s (h c) d", "float8_e4m3fn", return_kv=True),
    CachedCase(IN_PLACE, "l b h s (c d)", "float8_e5m2", return_kv=True, scale=-3.0, scale_per_head=(True, True)),
    CachedCase(dataclasses.replace(CASE, dtype="float32"), "b s h (c d)", "float8_e4m3fn", scale=1e-3),
    CachedCase(dataclasses.replace(CASE, num_kv_heads=1, head_dim=6, rotary_dim=2), kv_dtype="float8_e4m3fn"),
    CachedCase(dataclasses.replace(CASE, head_dim=65, rotary_dim=2), kv_dtype="float8_e5m2"),
    CachedCase(dataclasses.replace(CASE, num_kv_heads=1, head_dim=6, rotary_dim=2), "b s h (c d)", block_size=1),
    CachedCase(dataclasses.replace(CASE, num_tokens=1), num_blocks=1, block_size=3),
    CachedCase(dataclasses.replace(CASE, num_tokens=0), return_kv=True),
    *(CachedCase(CASE, slots_dtype=dtype) for dtype in ("int8", "uint8", "int16", "uint32", "int64", "uint64")),
    *(CachedCase(CASE, "l b s h d", layer=layer) for layer in (-1, 3, -(2**31), 2**31 - 1)),
    CachedCase(PAIRS, "b h s (c d)"),
    CachedCase(PAIRS, kv_dtype="float8_e4m3fn", return_kv=True),
)


def run(implementation: str, case: CachedCase) -> _rows.Outputs:
    function = kernel("forward", implementation, case.options, case.case.num_tokens == 0)
    return function(cached.inputs_of(case))


@functools.cache
def _without_cache(implementation: str, plain: Case) -> _rows.Outputs:
    inputs = forms.split_heads(plain, forms.inputs_of(plain, numpy_inputs(plain)))
    return kernel("forward", implementation, forms.options(plain), plain.num_tokens == 0)(inputs)


def without_cache(implementation: str, case: CachedCase) -> _rows.Outputs:
    """Run once for all that differ in the cache alone."""
    return _without_cache(implementation, dataclasses.replace(case.case, packed=False))


def of(implementation: str, case: CachedCase) -> CachedCase:
    """On a CPU, Triton's interpreter and XLA under it change the payload of a NaN that they move."""
    moves_nan = implementation == "triton" and not has_gpu()
    return dataclasses.replace(case, finite=True) if moves_nan else case


@pytest.mark.parametrize("case", FORMS, ids=lambda case: case.id)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_are_those_of_the_op_and_the_rest_keeps_its_bits(implementation, case):
    with jax.enable_x64(case.slots_dtype in ("int64", "uint64")):
        case = of(implementation, case)
        want = cached.expected(case, without_cache(implementation, case))
        assert_same(run(implementation, case), want)


@pytest.mark.parametrize("case", [FORMS[0], FORMS[4], FORMS[10], *FORMS[12:18], *FORMS[-2:]], ids=lambda case: case.id)
def test_the_public_functions(case):
    """Inside jit and eagerly, with layers given and traced."""
    function, arrays = cached.op(case), cached.arguments(case)
    want = cached.expected(case, without_cache("xla", case))
    if case.case.gate == "in_place":
        gate = forms.split_gates(case.case, numpy_inputs(case.case).q_gate)[1]
        want = want._replace(gate=gate.reshape(case.case.num_tokens, -1, case.case.head_dim))
    assert_same(cached.outputs_of(case, function(*arrays)), want)
    assert_same(cached.outputs_of(case, jax.jit(function)(*arrays)), want)
    if "l" in case.sizes:
        traced = jax.jit(lambda layer, *arrays: function(*arrays, layer=layer))
        assert_same(cached.outputs_of(case, traced(jnp.int32(case.layer), *arrays)), want)


def test_heads_and_leading_axes():
    case = CachedCase(dataclasses.replace(CASE, num_tokens=6), return_kv=True)
    (q_gate, k, v), *weights, positions, kv_cache, slots = cached.arguments(case)
    want = cached.op(case)((q_gate, k, v), *weights, positions, kv_cache, slots)
    got = cached.op(case)(
        (q_gate.reshape(2, 3, 4, 128), k.reshape(2, 3, 3, 64), v.reshape(2, 3, 3, 64)),
        *weights,
        positions.reshape(2, 3),
        list(kv_cache),
        slots.reshape(2, 3),
    )
    assert got.q.shape == got.gate.shape == (2, 3, 4, 64) and got.k.shape == got.v.shape == (2, 3, 3, 64)
    assert_same(jax.tree.map(jnp.ravel, got), jax.tree.map(jnp.ravel, want))


def test_numpy_slots_of_64_bits_are_not_narrowed_unseen():
    case = CachedCase(dataclasses.replace(CASE, num_tokens=5), finite=True)
    *arrays, _ = cached.arguments(case)
    got = cached.op(case)(*arrays, np.array([2**32 + 3, 2**31, -(2**32), 2**63 - 1, 7]))
    want = cached.op(case)(*arrays, jnp.array([-1, -1, -1, -1, 7]))
    assert_same(got, want)
    unsigned = cached.op(case)(*arrays, np.array([2**32 + 3, 2**31, 2**64 - 1, 2**63, 7], np.uint64))
    assert_same(unsigned, want)


@pytest.mark.parametrize("dtype", ["int2", "int4", "uint4"])
def test_slots_of_less_than_a_byte(dtype):
    case = CachedCase(dataclasses.replace(CASE, num_tokens=4), finite=True)
    *arrays, _ = cached.arguments(case)
    slots = np.array([1, 0, 1, 0] if dtype != "int2" else [-1, 0, -2, 1])
    slots = slots if dtype == "int2" else np.array([1, 5, 7, 3])
    got = cached.op(case)(*arrays, jnp.asarray(slots).astype(dtype))
    assert_same(got, cached.op(case)(*arrays, jnp.asarray(slots)))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint32", "int64", "uint64"])
def test_places_of_slots(dtype):
    """No index that leaves the cache is formed, of tokens without a place either."""
    info = np.iinfo(dtype)
    candidates = [0, 5, 19, 20, -1, -20, info.min, info.max, 2**32 + 3]
    slots = np.array([slot for slot in candidates if info.min <= slot <= info.max], dtype)
    with jax.enable_x64(True):
        places = _cache_axes.Slots(block_size=4, block=0, place=0, capacity=20, num_layers=3)
        for layer in (None, 2, 3, -1):
            of_layer = None if layer is None else jnp.int32(layer)
            inside, indices = _cache_write.places_of(jnp.asarray(slots), of_layer, places)
            want = [0 <= slot < 20 and layer in (None, 2) for slot in slots.tolist()]
            found = [slot if is_inside else 0 for slot, is_inside in zip(slots.tolist(), want, strict=True)]
            assert inside.tolist() == want
            assert indices["b"].tolist() == [slot // 4 for slot in found]
            assert indices["s"].tolist() == [slot % 4 for slot in found]
            assert layer is None or np.broadcast_to(indices["l"], slots.shape).tolist() == [2 * x for x in want]


@pytest.mark.parametrize("num_blocks, block_size", [("b", 4), ("b", "s")])
def test_an_export_leaves_the_cache_s_sizes_open(num_blocks, block_size):
    case = CachedCase(dataclasses.replace(CASE, packed=True), finite=True)
    *arrays, kv_cache, slots = cached.arguments(case)
    names = [name for name in ("t", num_blocks, block_size) if isinstance(name, str)]
    sizes = dict(zip(names, export.symbolic_shape(", ".join(names)), strict=True))
    in_cache = jax.ShapeDtypeStruct(
        (sizes.get(num_blocks, num_blocks), sizes.get(block_size, block_size), *kv_cache[0].shape[2:]), "bfloat16"
    )

    def of_tokens(x):
        return jax.ShapeDtypeStruct((sizes["t"], *x.shape[1:]), x.dtype)

    qkv, q_weight, k_weight, table, positions = arrays
    types = of_tokens(qkv), q_weight, k_weight, table, of_tokens(positions), (in_cache,) * 2, of_tokens(slots)
    function = jax.jit(cached.op(case))
    exported = export.export(function, platforms=["cpu"])(*types)
    with jax.default_device(jax.devices("cpu")[0]):
        assert_same(exported.call(*arrays, kv_cache, slots), function(*arrays, kv_cache, slots))
