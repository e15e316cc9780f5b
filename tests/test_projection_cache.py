"""The op on hidden states and a packed weight that writes a KV cache: product and cached op, and one kernel for all.

As in `test_projection`, no interpreter runs the whole kernel. Without a GPU its programs are read, and the code that
writes rows by slots is interpreted.
"""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import pallas_qk
from pallas_qk._mosaic_gpu import epilogue
from pallas_qk._mosaic_gpu.emit import constant
from pallas_qk._mosaic_gpu.launch import launch
from pallas_qk._rows import Inputs, rows_for, spec_of
from tests import cached, forms, test_projection
from tests.cached import AXES, CachedCase
from tests.cases import Case, make_inputs
from tests.compare import assert_same
from tests.devices import mesh, put
from tests.fp8 import NAMES as FP8
from tests.lowering import lowered, lowered_text
from tests.mosaic_interpreter import execute
from tests.test_cache_in_place import assert_in_place
from tests.test_projection import BY_KERNEL, WIDTH

CASE = Case(9, 4, 2, max_position=32, packed=True)
FORM = CachedCase(CASE, num_blocks=4, block_size=4)


@pytest.fixture(autouse=True)
def place(request):
    """On a GPU those tests alone that are marked so, as in `test_projection`."""
    on_a_gpu = request.node.get_closest_marker("gpu")
    with contextlib.nullcontext() if on_a_gpu else jax.default_device(jax.devices("cpu")[0]):
        yield


def arguments(form: CachedCase, width: int = WIDTH, *, exact: bool = False) -> list:
    """Those of the function, in its order up to slot_mapping; the cache is the last but one.

    Exact ones have products that every order of sums rounds alike.
    """
    make = test_projection.exact_arguments if exact else test_projection.arguments
    before = tuple(map(jnp.asarray, cached.caches(form)))
    return [*make(form.case, width), before if len(before) == 2 else before[0], jnp.asarray(cached.slots_of(form))]


def options_of(form: CachedCase) -> dict:
    scales = dict(zip(("k_scale", "v_scale"), form.scales, strict=False))
    of_layer = {"layer": form.layer} if "l" in form.sizes else {}
    return scales | of_layer | {"cache_axes": form.cache_axes, "return_kv": form.return_kv}


def op(form: CachedCase, implementation: str | None = None):
    """Of `arguments`: the function under test."""
    static = test_projection.static(form.case) | options_of(form) | {"implementation": implementation}

    def function(*arrays, **changes):
        return pallas_qk.fused_qkv_projection_rmsnorm_rope_gate_cache(*arrays, **static | changes)

    return function


def two_steps(form: CachedCase, implementation: str | None = None):
    """What defines it."""

    def function(hidden, weight, *arrays):
        static = test_projection.static(form.case) | options_of(form) | {"implementation": implementation}
        return pallas_qk.fused_qkv_rmsnorm_rope_gate_cache(jnp.dot(hidden, weight), *arrays, **static)

    return function


def assert_same_outputs(got, want) -> None:
    assert [x is None for x in got] == [x is None for x in want]
    assert_same(jax.tree.leaves(got), jax.tree.leaves(want))


FORMS = {
    "a pair": {},
    "wider": {"kv_dtype": "float32", "return_kv": True},
    "codes": {"kv_dtype": FP8[0], "cache_axes": "b s (h c) d"},
    "other codes, by heads": {"kv_dtype": FP8[1], "scale_per_head": (True, True), "return_kv": True},
    "side by side": {"cache_axes": "b h s (c d)", "slots_dtype": "int16"},
    "layers": {"cache_axes": "l b s h d", "kv_dtype": "float16"},
    "a layer that isn't there": {"cache_axes": "l h b s (c d)", "layer": 7},
}


@pytest.fixture(params=FORMS)
def form(request) -> CachedCase:
    return dataclasses.replace(FORM, **FORMS[request.param])


def on_a_traced_layer(form: CachedCase, implementation: str | None):
    """A layer that lies outside is an error where it is a number."""
    if "l" not in form.sizes:
        return op(form, implementation)
    return lambda *arrays: op(form, implementation)(*arrays, layer=jnp.int32(form.layer))


# --- product and op -----------------------------------------------------------------------------------------------


def test_it_is_the_product_and_the_cached_op(form):
    arrays = arguments(form)
    if form.layer_is_inside:
        assert_same_outputs(op(form)(*arrays), jax.jit(two_steps(form))(*arrays))
    traced = jax.jit(on_a_traced_layer(form, None))(*arrays)
    *rows, _, _ = arrays
    want = jax.jit(test_projection.two_steps(form.case))(*rows)
    data = cached.data_of(form)._replace(v=np.asarray(want[2]))
    after = cached.write(form, want[1].reshape(CASE.num_tokens, CASE.num_kv_heads, -1), data)
    assert_same(jax.tree.leaves(traced.kv_cache), after)
    assert_same([traced.q, traced.gate], [want[0], want[3]])
    assert (traced.k is None) == (not form.return_kv)


def test_plain_xla_by_name():
    arrays = arguments(FORM)
    assert_same_outputs(op(FORM, "xla")(*arrays), jax.jit(two_steps(FORM, "xla"))(*arrays))


def test_options_reach_the_op():
    case = dataclasses.replace(CASE, mrope_section=(16, 8, 8), mrope_layout="sectioned", norm_beta=1.0, eps=1e-3)
    form = dataclasses.replace(FORM, case=case)
    arrays = arguments(form)
    assert_same_outputs(op(form)(*arrays), jax.jit(two_steps(form))(*arrays))


def test_leading_axes():
    hidden, weight, *others, positions, kv_cache, slots = arguments(FORM)
    want = op(FORM)(hidden, weight, *others, positions, kv_cache, slots)
    lead = hidden.reshape(3, 3, WIDTH), weight, *others, positions.reshape(3, 3), kv_cache, slots.reshape(3, 3)
    got = op(FORM)(*lead)
    assert got.q.shape[:2] == got.gate.shape[:2] == (3, 3)
    assert_same(jax.tree.leaves(got.kv_cache), jax.tree.leaves(want.kv_cache))
    assert_same([got.q.reshape(want.q.shape)], [want.q])


@pytest.mark.parametrize("dtype", ["float32", FP8[0]])
def test_a_donated_cache_is_updated_in_place(dtype):
    """By the function that XLA compiles on a CPU; a cache of 8 bits is converted there."""
    case = dataclasses.replace(CASE, dtype="float32")
    form = CachedCase(case, kv_dtype=dtype, num_blocks=400, block_size=16, finite=True)
    args = arguments(form)
    step = lambda kv_cache: op(form, "xla")(*args[:-2], kv_cache, args[-1])  # noqa: E731
    if dtype == "float32":
        assert_in_place(step, (args[-2],), 0)
    text = jax.jit(step, donate_argnums=0).lower(args[-2]).compile().as_text()
    assert "input_output_alias" in text.partition("\n")[0]


# --- errors -------------------------------------------------------------------------------------------------------

BAD_CALLS = {
    "slots": (
        ValueError,
        "slot_mapping must have shape (9,), got (8,). Its sizes: the leading axes of hidden @ weight, so one slot for "
        "each token; places of one sequence are (1, n).",
        {"slot_mapping": jnp.zeros(8, jnp.int32)},
    ),
    "no slots": (
        TypeError,
        "slot_mapping must be an array, got None. It stands between kv_cache and eps: make it with "
        "pallas_qk.kv_cache.slots_of_rows or slots_of_pages.",
        {"slot_mapping": None},
    ),
    "heads of the cache": (
        ValueError,
        "kv_cache[0] must have shape (num_blocks, block_size, 2, 256), got (4, 4, 3, 256). Its sizes: 'b s h d' as "
        "cache_axes names them, each at least 1; for another order pass its name, such as 'HND'.",
        {"kv_cache": (jnp.zeros((4, 4, 3, 256), jnp.bfloat16),) * 2},
    ),
    "axes": (
        ValueError,
        "layer must be given exactly where cache_axes has an axis l, got layer=None with 'l b s h d'. "
        "Pass the layer to write.",
        {"cache_axes": "l b s h d", "kv_cache": (jnp.zeros((2, 4, 4, 2, 256), jnp.bfloat16),) * 2},
    ),
    "scale": (
        ValueError,
        "k_scale must be given with a cache of float8_e4m3fn, got None. Pass the float32 number that its rows are "
        "divided by, and multiplied by when they are read.",
        {"kv_cache": (jnp.zeros((4, 4, 2, 256), FP8[0]),) * 2},
    ),
    "columns": (
        ValueError,
        "hidden @ weight must have shape (..., 2048 + num_kv_heads * 512), got (9, 2048). Its sizes: num_q_heads * 2 * "
        "head_dim + 2 * num_kv_heads * head_dim, [q and gate of each head | k | v]; fused_qkv_rmsnorm_rope_cache takes "
        "a product whose q has no gates.",
        {"weight": jnp.zeros((64, 2048), jnp.bfloat16)},
    ),
    "triton": (
        NotImplementedError,
        "implementation='triton' can't run this: only 'mosaic_gpu' has a kernel for product and op, got 'triton'. "
        "Leave implementation out, or pass 'xla'.",
        {"implementation": "triton"},
    ),
    "width": (
        NotImplementedError,
        "implementation='mosaic_gpu' can't run this: it takes hidden states whose width is a multiple of 64, got 32. "
        "Leave implementation out, or pass 'xla'.",
        {
            "hidden": jnp.zeros((9, 32), jnp.bfloat16),
            "weight": jnp.zeros((32, 3072), jnp.bfloat16),
            "implementation": BY_KERNEL,
        },
    ),
}
NAMES = (*test_projection.NAMES, "kv_cache", "slot_mapping")


@pytest.mark.parametrize("exception, message, changes", BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_call(exception, message, changes):
    call = dict(zip(NAMES, arguments(FORM), strict=True)) | {"eps": 1e-6, "num_q_heads": 4} | changes
    with pytest.raises(exception, match=f"^{re.escape(message)}$"):
        pallas_qk.fused_qkv_projection_rmsnorm_rope_gate_cache(**call)


@pytest.mark.parametrize("implementation", ["xla", BY_KERNEL])
def test_it_has_no_derivatives(implementation):
    hidden, *others = arguments(FORM)
    message = (
        "what writes a KV cache must not be differentiated, got tangents of qkv. Call the function without a cache "
    )
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        jax.eval_shape(lambda x: jax.jvp(lambda h: op(FORM, implementation)(h, *others).q, (x,), (x,)), hidden)


@pytest.mark.parametrize("implementation, name", [("xla", "qkv"), (BY_KERNEL, "hidden")])
def test_it_is_not_mapped(implementation, name):
    hidden, weight, *others = arguments(FORM)
    mapped = jax.vmap(lambda h, w: op(FORM, implementation)(h, w, *others), (0, None))
    message = f"what writes a KV cache must not be mapped by jax.vmap, got {name} mapped. Make the mapped axis one of "
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
        jax.eval_shape(mapped, jnp.stack([hidden] * 2), weight)


def test_heads_over_devices_are_refused():
    *arrays, kv_cache, slots = arguments(FORM)
    spread = tuple(put(mesh(model=2), kv_cache, [(None, None, "model")] * 2))
    message = (
        "kv_cache must be whole on each device where q, k and v are packed, got heads over 2 devices. "
        "Call inside jax.shard_map with each device's heads packed, or pass q, k and v as three arrays to the function "
        "that takes them."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        op(FORM)(*arrays, spread, slots)


def test_several_devices_need_shard_map():
    """There each device has tokens, blocks and slots of its own."""
    case = dataclasses.replace(CASE, num_tokens=8)
    form = dataclasses.replace(FORM, case=case)
    *arrays, kv_cache, slots = arguments(form)
    on, specs = mesh(data=4), (P("data"), P(), P(), P(), P(), P("data"), P("data"), P("data"))
    spread = put(on, [*arrays, *kv_cache, slots], [*specs[:6], P("data"), P("data"), P("data")])
    args = (*spread[:6], tuple(spread[6:8]), spread[8])
    traced = jax.jit(lambda *x: op(form, BY_KERNEL)(*x[:6], kv_cache, slots)).trace(*args)
    message = "must run inside jax.shard_map over several devices, got 4 devices"
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        traced.lower(lowering_platforms=("cuda",))
    mapped = jax.shard_map(op(form, BY_KERNEL), mesh=on, in_specs=specs, out_specs=P("data"))
    text = jax.jit(mapped).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") + text.count("custom_call @pallas_qk") == 1


# --- the kernel's programs ----------------------------------------------------------------------------------------


def kernel_calls(text: str) -> list[str]:
    """The lines of a lowered program that call kernels. JAX 0.10 names those that update an array `mosaic_gpu_v2`."""
    return [line for line in text.splitlines() if re.search(r"custom_call @(mosaic_gpu|pallas_qk)", line)]


def test_a_program_for_cuda_is_one_kernel_that_updates_the_cache(form):
    arrays = arguments(form)
    text = lowered_text(on_a_traced_layer(form, BY_KERNEL), *arrays)
    (call,) = kernel_calls(text)
    assert "stablehlo.dot_general" not in text
    num_caches, num_rows = form.num_arrays, 4 if form.return_kv else 2
    assert call.count("#stablehlo.output_operand_alias<") == num_caches
    assert len(re.findall(r"tensor<\d+x\d+xbf16>", call.rpartition("->")[2])) == num_rows


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("dtype", [None, FP8[1]])
def test_every_layout_of_a_cache_lowers(axes, dtype):
    form = dataclasses.replace(FORM, cache_axes=axes, kv_dtype=dtype)
    assert len(kernel_calls(lowered_text(op(form, BY_KERNEL), *arguments(form)))) == 1


@pytest.mark.skipif(jax.__version_info__ >= (0, 11), reason="there Pallas itself keeps tracers")
def test_tracing_keeps_no_tracers():
    """Of this function, the one without a cache, and the op's gradient."""
    arrays = arguments(FORM)
    with jax.checking_leaks():
        lowered_text(op(FORM, BY_KERNEL), *arrays)
        lowered_text(test_projection.op(implementation=BY_KERNEL), *test_projection.arguments())
        lowered_text(
            jax.grad(lambda *x: jnp.sum(forms.op(CASE, BY_KERNEL)(*x)[0])), *forms.arguments(CASE, make_inputs(CASE))
        )


def test_no_tokens_leave_the_cache():
    form = dataclasses.replace(FORM, case=dataclasses.replace(CASE, num_tokens=0))
    text = lowered_text(op(form, BY_KERNEL), *arguments(form))
    assert kernel_calls(text) == []


def test_a_scan_carries_the_cache():
    """Over layers, each of which writes its own."""
    form = dataclasses.replace(FORM, cache_axes="l b s h d")
    *arrays, kv_cache, slots = arguments(form)

    def step(kv_cache, layer):
        outputs = op(form, BY_KERNEL)(*arrays, kv_cache, slots, layer=layer)
        return outputs.kv_cache, outputs.q

    text = lowered(lambda x: jax.lax.scan(step, x, jnp.arange(3)), kv_cache).as_text()
    assert len(kernel_calls(text)) == 1 and "stablehlo.while" in text


# --- rows by slots ------------------------------------------------------------------------------------------------


def in_cache(rows, caches, others: Inputs, *, form: CachedCase, kind: str):
    """The cache with the rows (T, D) of one head, the last: the kernel's code in a launch of its own."""
    case, options = form.case, form.options
    place = rows_for(spec_of(cached.inputs_of(form), options), options)[kind].targets[-1]
    dtype = rows.dtype

    def thread(program, inputs, outputs):
        rows, others = inputs
        first, head = program * 64, constant(case.num_kv_heads - 1)
        words, arrays = test_projection.words_of(rows, first), others._replace(**outputs)
        epilogue.write_by_slot(words, first, head, case.num_tokens, case.num_kv_heads, place, arrays, dtype)

    return launch("by_slot", thread, (rows, others), caches, num_programs=len(rows) // 64, num_warpgroups=1)


@pytest.mark.parametrize("kind", ["k", "v"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_go_where_their_slots_say(form, kind, dtype):
    case = dataclasses.replace(CASE, num_tokens=70, dtype=dtype)
    form = dataclasses.replace(form, case=case, num_blocks=20)
    data, inputs = cached.data_of(form), cached.inputs_of(form)
    of_kind = data.v.reshape(70, 2, 256)
    rows = np.full((128, 256), np.nan, of_kind.dtype)  # rows past the last
    rows[:70] = of_kind[:, -1]
    name = "k_cache" if kind == "k" or inputs.v_cache is None else "v_cache"
    others = inputs._replace(**dict.fromkeys(Inputs._fields[:9]))  # slots, layer and scales alone
    run = functools.partial(in_cache, form=form, kind=kind)
    (got,) = execute(run, jnp.asarray(rows), {name: getattr(inputs, name)}, others).values()
    # Of all heads and both kinds by a loop over tokens; then what isn't this head of this kind as it was.
    after = cached.by_slot(form, cached.write(form, of_kind, data), np)["kv".index(kind)]
    before = [x.copy() for x in cached.by_slot(form, data.before, np)]
    before["kv".index(kind)][:, -1] = after[:, -1]
    caches = [np.asarray(x) for x in data.before]
    caches[0 if name == "k_cache" else 1] = np.asarray(got)
    assert_same(list(cached.by_slot(form, caches, np)), before)


# --- on a GPU -----------------------------------------------------------------------------------------------------

BIG = CachedCase(dataclasses.replace(CASE, num_tokens=300), num_blocks=20, block_size=16)
ON_A_GPU = [
    *((dataclasses.replace(BIG, **changes), 320) for changes in FORMS.values()),
    *((dataclasses.replace(BIG, cache_axes=axes, kv_dtype=dtype), 64) for axes in AXES for dtype in (None, FP8[0])),
    (dataclasses.replace(BIG, case=Case(4100, 16, 2, packed=True), num_blocks=500), 2048),
    (dataclasses.replace(BIG, case=Case(4096, 32, 2, packed=True), num_blocks=500, kv_dtype=FP8[0]), 4096),
    (dataclasses.replace(BIG, case=Case(1, 16, 2, packed=True)), 2048),
    (dataclasses.replace(BIG, case=Case(1000, 3, 1, dtype="float16", norm_beta=1.0, packed=True), num_blocks=99), 256),
    (dataclasses.replace(BIG, case=Case(300, 8, 2, mrope_section=(11, 11, 10), packed=True)), 192),
]


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("form, width", ON_A_GPU, ids=lambda x: getattr(x, "id", str(x)))
def test_bits_of_the_kernel_are_those_of_the_cached_op(form, width):
    """Twice, with a cache that the call takes over."""
    *arrays, kv_cache, slots = arguments(form, width, exact=True)

    def run(function):
        step = jax.jit(lambda kv_cache: function(*arrays, kv_cache, slots), donate_argnums=0)
        first = step(jax.tree.map(jnp.array, kv_cache))
        return first._replace(kv_cache=jax.tree.map(jnp.array, first.kv_cache)), step(first.kv_cache)

    traced = on_a_traced_layer(form, BY_KERNEL)
    layer = {} if "l" not in form.sizes else {"layer": jnp.int32(form.layer)}
    static = test_projection.static(form.case) | options_of(form) | {"implementation": BY_KERNEL} | layer

    def steps(hidden, weight, *others):
        return pallas_qk.fused_qkv_rmsnorm_rope_gate_cache(jnp.dot(hidden, weight), *others, **static)

    assert_same(jax.tree.leaves(run(traced)), jax.tree.leaves(run(steps)))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_a_compiled_step_has_one_kernel_and_no_copy_of_the_cache():
    form = dataclasses.replace(BIG, num_blocks=4000)
    *arrays, kv_cache, slots = arguments(form, 256)
    step = jax.jit(lambda kv_cache: op(form, BY_KERNEL)(*arrays, kv_cache, slots), donate_argnums=0)
    memory = step.lower(kv_cache).compile().memory_analysis()
    assert memory.temp_size_in_bytes < kv_cache[0].nbytes
    assert memory.alias_size_in_bytes == sum(x.nbytes for x in kv_cache)
