"""Every bad call of the functions that write a KV cache: the error's type and its whole text."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_qk
from tests import cached
from tests.cached import CachedCase
from tests.cases import Case
from tests.compare import assert_same

CASE = CachedCase(Case(4, 3, 2, head_dim=64, rotary_dim=16, max_position=40), finite=True)
PACKED = dataclasses.replace(CASE, case=dataclasses.replace(CASE.case, packed=True))
LAYERS = dataclasses.replace(CASE, cache_axes="l b s h d")
ARRAYS = ("qkv", "q_weight", "k_weight", "cos_sin_cache", "positions", "kv_cache", "slot_mapping")

AXES = (
    "cache_axes must name the axes b, s, h and d, d last, each once; c too where one array holds k and v, which (h c), "
    "(c h) or (c d) may join; and l, if at all, first, got {!r}. "
    "Pass 'NHD' or 'HND', or names with spaces: 'b s h d' for (num_blocks, block_size, num_kv_heads, head_dim)."
)
PAIR = (
    "kv_cache must be the two arrays of k and of v, got {}. "
    "Pass q, k and v as one tuple, and a pair of caches behind positions, or name the axis c of an array that holds "
    "both in cache_axes."
)
SHAPE = (
    "kv_cache[{}] must have shape (num_blocks, block_size, 2, 64), got {}. "
    "Its sizes: 'b s h d' as cache_axes names them, each at least 1; for another order pass its name, such as 'HND'."
)
HELD = "{} must be float16, bfloat16, float32, float8_e4m3fn or float8_e5m2, got {}. Make the cache of one of these."
NO_SCALE = (
    "{} must be given with a cache of float8_e4m3fn, got None. "
    "Pass the float32 number that its rows are divided by, and multiplied by when they are read."
)
A_SCALE = (
    "{} must be left out with a cache of bfloat16, got {}. It holds rows as they are; "
    "a cache of float8_e4m3fn or float8_e5m2 has scales."
)
LAYER = "layer must be given exactly where cache_axes has an axis l, got layer={} with {!r}. {}"


def zeros(*shape: int, dtype="bfloat16"):
    return jnp.zeros(shape, dtype)


def call(case: CachedCase, **changes):
    arrays = dict(zip(ARRAYS, cached.arguments(case), strict=True))
    static = case.case.static_arguments | {"cache_axes": case.cache_axes} | changes
    if "l" in case.sizes:
        static = {"layer": case.layer} | static
    return pallas_qk.fused_qkv_rmsnorm_rope_gate_cache(**arrays | static)


BAD = {
    "axes twice": (ValueError, AXES.format("b s h h d"), {"cache_axes": "b s h h d"}),
    "axes without s": (ValueError, AXES.format("b h d"), {"cache_axes": "b h d"}),
    "axes of another name": (ValueError, AXES.format("n s h d"), {"cache_axes": "n s h d"}),
    "d in front": (ValueError, AXES.format("d b s h"), {"cache_axes": "d b s h"}),
    "layers inside": (ValueError, AXES.format("b l s h d"), {"cache_axes": "b l s h d"}),
    "a group of others": (ValueError, AXES.format("(b s) h d"), {"cache_axes": "(b s) h d"}),
    "no end of a group": (ValueError, AXES.format("b s (h c d"), {"cache_axes": "b s (h c d"}),
    "axes run together": (ValueError, AXES.format("bshd"), {"cache_axes": "bshd"}),
    "axes of another type": (ValueError, AXES.format(4), {"cache_axes": 4}),
    "one array of two": (TypeError, PAIR.format("1 of them"), {"kv_cache": [zeros(5, 4, 2, 64)]}),
    "three caches": (TypeError, PAIR.format("3 of them"), {"kv_cache": (zeros(5, 4, 2, 64),) * 3}),
    "an array where a pair is named": (
        TypeError,
        PAIR.format("a jaxlib._jax.ArrayImpl of shape (5, 4, 2, 64) and dtype bfloat16"),
        {"kv_cache": zeros(5, 4, 2, 64)},
    ),
    "heads of the cache": (ValueError, SHAPE.format(0, (5, 4, 3, 64)), {"kv_cache": (zeros(5, 4, 3, 64),) * 2}),
    "lanes of the cache": (
        ValueError,
        SHAPE.format(1, (5, 4, 2, 128)),
        {"kv_cache": (zeros(5, 4, 2, 64), zeros(5, 4, 2, 128))},
    ),
    "a missing axis": (ValueError, SHAPE.format(0, (20, 2, 64)), {"kv_cache": (zeros(20, 2, 64),) * 2}),
    "no blocks": (
        ValueError,
        "kv_cache[0] must have at least one place, got shape (0, 4, 2, 64). Make it larger.",
        {"kv_cache": (zeros(0, 4, 2, 64),) * 2},
    ),
    "caches unlike": (
        ValueError,
        "the caches of k and v must have one shape and dtype, got (5, 4, 2, 64) of bfloat16 and (6, 4, 2, 64) of "
        "float16. Make them alike.",
        {"kv_cache": (zeros(5, 4, 2, 64), zeros(6, 4, 2, 64, dtype="float16"))},
    ),
    **{
        f"a cache of {dtype}": (
            TypeError,
            HELD.format("kv_cache[0]", dtype),
            {"kv_cache": (zeros(5, 4, 2, 64, dtype=dtype),) * 2},
        )
        for dtype in ("float8_e4m3", "float8_e5m2fnuz", "int8", "int32")
    },
    "a cache that is no array": (
        TypeError,
        "kv_cache[1] must be a JAX or NumPy array, got None. Pass one.",
        {"kv_cache": (zeros(5, 4, 2, 64), None)},
    ),
    "slots of another shape": (
        ValueError,
        "slot_mapping must have shape (4,), got (4, 1). "
        "Its sizes: the leading axes of q_gate, so one slot for each token; places of one sequence are (1, n).",
        {"slot_mapping": jnp.zeros((4, 1), jnp.int32)},
    ),
    "slots of fractions": (
        TypeError,
        "slot_mapping must be integers, got float32. Cast them with astype(jnp.int32).",
        {"slot_mapping": jnp.zeros(4)},
    ),
    "slots of bools": (
        TypeError,
        "slot_mapping must be integers, got bool. Pass numbers, not a mask.",
        {"slot_mapping": jnp.zeros(4, bool)},
    ),
    "no slots": (
        TypeError,
        "slot_mapping must be an array, got None. It stands between kv_cache and eps: make it with "
        "pallas_qk.kv_cache.slots_of_rows or slots_of_pages.",
        {"slot_mapping": None},
    ),
    "a layer of no layers": (
        ValueError,
        LAYER.format("1 of type int", "b s h d", "Leave it out, or name the axis of layers."),
        {"layer": 1},
    ),
    "return_kv of an integer": (
        TypeError,
        "return_kv must be a bool known when tracing, got 1 of type int. "
        "Pass True for k and v as results beside the cache.",
        {"return_kv": 1},
    ),
    "two of three arrays": (
        TypeError,
        "qkv must be one array or the three of (q_gate, k, v), got 2 of them. Pass one or three.",
        {"qkv": (zeros(4, 384), zeros(4, 128))},
    ),
    "v of another shape": (
        ValueError,
        "v must have shape (4, 128), got (4, 64). Its sizes: the leading axes of q_gate, then num_kv_heads * head_dim.",
        {"qkv": (zeros(4, 384), zeros(4, 128), zeros(4, 64))},
    ),
    "v of another dtype": (
        TypeError,
        "v must have the dtype of q_gate, bfloat16, got float16. Cast one to the other.",
        {"qkv": (zeros(4, 384), zeros(4, 128), zeros(4, 128, dtype="float16"))},
    ),
    "q without gates": (
        ValueError,
        "q_gate must have shape (..., 384) or (..., 3, 128), got (4, 192). Its sizes: num_q_heads, 2 * head_dim, as "
        "one axis or two; fused_qkv_rmsnorm_rope_cache takes q without gates.",
        {"qkv": (zeros(4, 192), zeros(4, 128), zeros(4, 128))},
    ),
    "a scale for 16 bits": (
        ValueError,
        A_SCALE.format("v_scale", "1.0 of type float"),
        {"v_scale": 1.0},
    ),
}
EIGHT_BITS = {"kv_cache": (zeros(5, 4, 2, 64, dtype="float8_e4m3fn"),) * 2, "k_scale": 1.0, "v_scale": 1.0}
SCALE = "{} must have shape () or (1,) or (2,), got {}. Its sizes: one, or num_kv_heads."
ARRAY = "k_scale must be a JAX or NumPy array, got {}. Convert it with jnp.asarray."
BAD |= {
    name: (error, message, EIGHT_BITS | changes)
    for name, (error, message, changes) in {
        "no scale of k": (ValueError, NO_SCALE.format("k_scale"), {"k_scale": None}),
        "no scale of v": (ValueError, NO_SCALE.format("v_scale"), {"v_scale": None}),
        "scales of tokens": (ValueError, SCALE.format("v_scale", (4,)), {"v_scale": jnp.ones(4)}),
        "scales with an axis of lanes": (ValueError, SCALE.format("k_scale", (2, 1)), {"k_scale": jnp.ones((2, 1))}),
        "a scale of 16 bits": (
            TypeError,
            "k_scale must be float32, got bfloat16. Cast it with astype.",
            {"k_scale": jnp.ones((), jnp.bfloat16)},
        ),
        "a scale of integers": (
            TypeError,
            "v_scale must be float32, got int32. Cast it with astype.",
            {"v_scale": jnp.ones(2, jnp.int32)},
        ),
        "a scale that is a bool": (TypeError, ARRAY.format("True of type bool"), {"k_scale": True}),
        "a list of scales": (TypeError, ARRAY.format("[1.0, 2.0] of type list"), {"k_scale": [1.0, 2.0]}),
    }.items()
}
BAD_LAYERS = {
    "no layer": (ValueError, LAYER.format("None", "l b s h d", "Pass the layer to write."), None),
    "past the last": (
        ValueError,
        "layer must be from 0 to 2, got 3. Negative numbers don't count from the end.",
        3,
    ),
    "negative": (ValueError, "layer must be from 0 to 2, got -1. Negative numbers don't count from the end.", -1),
    "a bool": (
        TypeError,
        "layer must be an integer or an array without axes, got True of type bool. Pass an integer.",
        True,
    ),
    "a fraction": (TypeError, "layer must be integers, got float32. Cast them with astype(jnp.int32).", jnp.float32(1)),
    "several": (
        ValueError,
        "layer must have shape (), got (1,). Its sizes: none; it is one integer.",
        jnp.zeros(1, jnp.int32),
    ),
}


def assert_refused(error, message: str, function) -> None:
    with pytest.raises(error) as caught:
        function()
    assert re.sub(r"jaxlib\.\S+", "jaxlib._jax.ArrayImpl", str(caught.value)) == message


@pytest.mark.parametrize("name", BAD)
def test_bad_call(name):
    error, message, changes = BAD[name]
    assert_refused(error, message, lambda: call(CASE, **changes))


@pytest.mark.parametrize("name", BAD_LAYERS)
def test_bad_layer(name):
    error, message, layer = BAD_LAYERS[name]
    assert_refused(error, message, lambda: call(LAYERS, layer=layer))


def test_packed_qkv_of_another_width():
    message = (
        "qkv must have shape (..., 640), got (4, 384). Its sizes: num_q_heads * 2 * head_dim + 2 * num_kv_heads * "
    )
    message += "head_dim, [q and gate of each head | k | v]."
    assert_refused(ValueError, message, lambda: call(PACKED, qkv=zeros(4, 384)))


@pytest.mark.parametrize("layer", [np.int64(1), np.array(1), jnp.int32(1), 1])
def test_an_integer_of_any_kind_is_a_layer(layer):
    assert_same(call(LAYERS, layer=layer), call(LAYERS))


def test_names_of_whole_layouts():
    assert_same(call(CASE, cache_axes="NHD"), call(CASE))
    heads_first = dataclasses.replace(CASE, cache_axes="b h s d")
    assert_same(call(heads_first, cache_axes="HND"), call(heads_first))


def test_caches_in_boxes():
    class Box:
        def __init__(self, array):
            self.array = array

        def __jax_array__(self):
            return self.array

    arrays = dict(zip(ARRAYS, cached.arguments(CASE), strict=True))
    boxed = call(CASE, kv_cache=tuple(map(Box, arrays["kv_cache"])), slot_mapping=Box(arrays["slot_mapping"]))
    assert_same(boxed, call(CASE))
    assert_same(call(CASE, qkv=tuple(map(Box, arrays["qkv"]))), call(CASE))


def scalar(q, k, v):
    outputs = call(CASE, qkv=(q, k, v))
    return outputs.q.astype(jnp.float32).sum() + outputs.kv_cache[0].astype(jnp.float32).sum()


@pytest.mark.parametrize(
    "transform", [jax.grad, jax.jacfwd, lambda f: jax.jit(jax.grad(f))], ids=["grad", "jacfwd", "jit"]
)
def test_derivatives_are_refused(transform):
    message = "what writes a KV cache must not be differentiated, got tangents of qkv. Call the function without a "
    message += "cache and write its k and v with .at[].set, or stop them with jax.lax.stop_gradient."
    qkv = cached.arguments(CASE)[0]
    assert_refused(NotImplementedError, message, lambda: transform(scalar)(*qkv))


def test_a_derivative_of_something_else_passes():
    qkv = cached.arguments(CASE)[0]

    def loss(x):
        return x * scalar(*map(jax.lax.stop_gradient, qkv))

    assert jax.grad(loss)(2.0) == scalar(*qkv)


def test_vmap_is_refused_where_something_is_mapped():
    arrays = cached.arguments(CASE)
    slots = jnp.stack([arrays[-1]] * 2)
    message = (
        "what writes a KV cache must not be mapped by jax.vmap, got slot_mapping mapped. Make the mapped axis one of "
        "the tokens' leading axes, and add to the slots where each element's part of the cache starts."
    )
    assert_refused(NotImplementedError, message, lambda: jax.vmap(lambda s: call(CASE, slot_mapping=s))(slots))
    outputs, doubled = jax.vmap(lambda x: (call(CASE), 2 * x), out_axes=(None, 0))(jnp.arange(3.0))
    assert_same(outputs, call(CASE))
    assert doubled.tolist() == [0, 2, 4]


def test_a_slot_mapping_that_is_left_out_is_named():
    """What follows it in a call by position slides into its place."""
    qkv, ones, table = jnp.zeros((4, 4 * 64 + 2 * 2 * 64)), jnp.ones(64), jnp.zeros((8, 16))
    kv_cache = tuple(jnp.zeros((5, 4, 2, 64)) for _ in range(2))
    with pytest.raises(TypeError, match="slot_mapping must be an array, got 1e-06 of type float"):
        pallas_qk.fused_qkv_rmsnorm_rope_cache(qkv, ones, ones, table, jnp.arange(4), kv_cache, 1e-6, 4, 2, 64, 16)
