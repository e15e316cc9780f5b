"""The op on hidden states and a packed weight: product and op, and one kernel for both.

No interpreter runs the kernel, which multiplies by wgmma. On a GPU its results are compared in bits where the product
is exact in float32, whatever the order of its sums. Without one its programs are read, its epilogue is interpreted, and
what is around it runs with the definition in its place.
"""

import contextlib
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import PartitionSpec as P

import pallas_qk
from pallas_qk import _call, _passed, _projection_op
from pallas_qk._mosaic_gpu import epilogue, projection
from pallas_qk._mosaic_gpu.launch import launch
from pallas_qk._mosaic_gpu.thread import Table
from pallas_qk._options import Options, Spec, Target
from pallas_qk._rows import Call, Inputs
from tests import forms
from tests.cases import Case, make_inputs, random_normal
from tests.compare import assert_same
from tests.devices import compiled, mesh, mesh_of, put
from tests.lowering import HOPPER_SMS, kernels, lowered, lowered_text
from tests.mosaic_interpreter import execute
from tests.run import kernel, quick_jit

CASE = Case(6, 4, 2, max_position=32)
WIDTH = 64
FORWARD = "pallas_qk_mosaic_gpu_projection_forward"
BACKWARD = ["pallas_qk_mosaic_gpu_backward", "pallas_qk_mosaic_gpu_sum"]
BY_KERNEL = "mosaic_gpu"


@pytest.fixture(autouse=True)
def place(request):
    """On a GPU those tests alone that are marked so: the others compare sums of products in bits."""
    on_a_gpu = request.node.get_closest_marker("gpu")
    with contextlib.nullcontext() if on_a_gpu else jax.default_device(jax.devices("cpu")[0]):
        yield


def num_columns(case: Case) -> int:
    return 2 * (case.num_q_heads + case.num_kv_heads) * case.head_dim


def arguments(case: Case = CASE, width: int = WIDTH) -> list:
    """hidden, weight, both norms' weights, the table and, unless the case has a row for each token, positions."""
    _, _, *others = make_inputs(case)
    hidden = random_normal((case.num_tokens, width), case.dtype, 7)
    weight = random_normal((width, num_columns(case)), jnp.float32, 8) * width**-0.5
    if case.gathered:
        *others, table, positions = others
        others = [*others, table[positions]]
    return [hidden, weight.astype(case.dtype), *others]


def static(case: Case) -> dict:
    return {
        "eps": case.eps,
        "num_q_heads": case.num_q_heads,
        "norm_beta": case.norm_beta,
        "mrope_section": case.mrope_section,
        "mrope_layout": case.mrope_layout,
    }


def op(case: Case = CASE, implementation: str | None = None):
    """Of `arguments`: the function under test."""

    def function(*arrays):
        arrays = (*arrays, None) if case.gathered else arrays
        return pallas_qk.fused_qkv_projection_rmsnorm_rope_gate(*arrays, **static(case), implementation=implementation)

    return function


def two_steps(case: Case = CASE, implementation: str | None = None):
    """What defines it."""

    def function(hidden, weight, *arrays):
        arrays = (*arrays, None) if case.gathered else arrays
        qkv = jnp.dot(hidden, weight)
        return pallas_qk.fused_qkv_rmsnorm_rope_gate(qkv, *arrays, **static(case), implementation=implementation)

    return function


def loss(function):
    """Of all that has a gradient, and positions."""

    def of(*arrays):
        return sum(jnp.sum(jnp.sin(x.astype(jnp.float32) + i)) for i, x in enumerate(function(*arrays)))

    return of


# --- product and op -----------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "float16": {"dtype": "float16", "norm_beta": 1.0},
    "float32": {"dtype": "float32", "head_dim": 128, "rotary_dim": 128},
    "mrope": {"mrope_section": (11, 11, 10), "cache_dtype": "float32"},
    "sectioned": {"mrope_section": (16, 8, 8), "mrope_layout": "sectioned"},
    "rows": {"gathered": True, "weight_dtype": "float32"},
    "no tokens": {"num_tokens": 0},
}


@pytest.fixture(params=OPTIONS)
def case(request) -> Case:
    return dataclasses.replace(CASE, **OPTIONS[request.param])


def test_it_is_the_product_and_the_op(case):
    arrays = arguments(case)
    want = jax.jit(two_steps(case))(*arrays)
    assert_same(op(case)(*arrays), want)
    assert_same(jax.jit(op(case))(*arrays), want)


def test_plain_xla_by_name():
    arrays = arguments()
    assert_same(op(implementation="xla")(*arrays), jax.jit(two_steps(implementation="xla"))(*arrays))


def test_leading_axes():
    arrays = arguments()
    hidden, weight, *others, positions = arrays
    want = op()(*arrays)
    got = op()(hidden.reshape(2, 3, WIDTH), weight, *others, positions.reshape(2, 3))
    assert_same([x.reshape(6, -1) for x in got], list(want))
    token = op()(hidden[0], weight, *others, positions[0])
    assert_same(list(token), [x[0] for x in want])
    shared = op()(jnp.stack([hidden, hidden]), weight, *others, positions)
    assert_same([x[1] for x in shared], list(want))


def test_an_equal_call_is_not_checked_again(monkeypatch):
    names, original = [], _call.checked

    def counted(function, *args, **more):
        names.append(function.name)
        return original(function, *args, **more)

    monkeypatch.setattr(_call, "checked", counted)
    monkeypatch.setattr(_passed, "_kept", {})
    arrays = arguments()
    op()(*arrays)
    op()(*arrays)
    op(implementation="xla")(*arrays)
    assert names == ["fused_qkv_projection_rmsnorm_rope_gate"] * 2


def test_boxes_and_numpys_integers():
    class Box:
        def __init__(self, array):
            self.array = array

        def __jax_array__(self):
            return self.array

    hidden, weight, *others, positions = arguments()
    of_64_bits = np.asarray(positions).astype(np.int64)
    of_64_bits[0], of_64_bits[1] = 2**32 + 3, -(2**40)
    got = op()(Box(hidden), Box(weight), *others, of_64_bits)
    assert_same(list(got), list(op()(hidden, weight, *others, positions.at[:2].set(jnp.array([99, -1])))))
    assert np.isnan(np.asarray(got[0][0], np.float32)).any()


@pytest.mark.parametrize("implementation", [None, "xla"])
def test_gradients_are_those_of_the_product_and_the_op(implementation):
    *arrays, positions = arguments(dataclasses.replace(CASE, dtype="float32"))

    def gradients(function):
        return quick_jit(jax.grad(lambda *x: loss(function)(*x, positions), argnums=(0, 1, 2, 3, 4)))(*arrays)

    assert_same(gradients(op(implementation=implementation)), gradients(two_steps(implementation=implementation)))


@pytest.mark.parametrize("mode", ["auto", "explicit, set_mesh"])
def test_tokens_over_devices(mode):
    arrays = arguments(dataclasses.replace(CASE, num_tokens=8))
    with mesh_of({"data": 4}, mode) as on:
        sharded = put(on, arrays, [("data",), (), (), (), (), ("data",)])
        got, collectives = compiled(op(implementation="xla"), sharded)
    assert_same(jax.device_get(list(got)), jax.device_get(list(jax.jit(op(implementation="xla"))(*arrays))))
    assert collectives == []


# --- errors -------------------------------------------------------------------------------------------------------


def test_columns_over_devices_are_refused():
    """Where that is known when tracing."""
    with mesh_of({"model": 2}, "explicit, set_mesh") as on:
        sharded = put(on, arguments(), [(), (None, "model"), (), (), (), ()])
        message = (
            "hidden @ weight must hold its last axis whole on each device, got it over 2 devices: its parts don't end "
            "where shards do. Shard its leading axes, pass a weight whose columns are whole there, or call inside"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            op()(*sharded)


COLUMNS = "num_q_heads * 2 * head_dim + 2 * num_kv_heads * head_dim"
BAD_CALLS = {
    "no array": (
        TypeError,
        "hidden must be a JAX or NumPy array, got [[0.0]] of type list. Convert it with jnp.asarray.",
        {"hidden": [[0.0]]},
    ),
    "no axes": (
        ValueError,
        "hidden must have axes, got shape (). Pass the array whose last axis the weight maps.",
        {"hidden": jnp.zeros((), jnp.bfloat16)},
    ),
    "dtype": (
        TypeError,
        "hidden must be float16, bfloat16 or float32, got int32. Cast it with astype.",
        {"hidden": jnp.zeros((6, 64), jnp.int32)},
    ),
    "another dtype": (
        TypeError,
        "weight must have the dtype of hidden, bfloat16, got float32. Cast one to the other.",
        {"weight": jnp.zeros((64, 3072), jnp.float32)},
    ),
    "width": (
        ValueError,
        f"weight must have shape (64, {COLUMNS}), got (32, 3072). Its sizes: the last axis of hidden, then {COLUMNS}.",
        {"weight": jnp.zeros((32, 3072), jnp.bfloat16)},
    ),
    "columns": (
        ValueError,
        "hidden @ weight must have shape (..., 2048 + num_kv_heads * 512), got (6, 2048). Its sizes: num_q_heads * 2 * "
        "head_dim + 2 * num_kv_heads * head_dim, [q and gate of each head | k | v]; fused_qkv_rmsnorm_rope takes a "
        "product whose q has no gates.",
        {"weight": jnp.zeros((64, 2048), jnp.bfloat16)},
    ),
    "positions": (
        ValueError,
        "positions must have shape (6,), or one that broadcasts to it, got (5,). Its sizes: the leading axes of "
        "hidden @ weight; three rows of positions need mrope_section.",
        {"positions": jnp.zeros(5, jnp.int32)},
    ),
    "eps": (
        ValueError,
        "eps must be a finite float32 of at least 0, got -1. Model configs call it rms_norm_eps and the like.",
        {"eps": -1},
    ),
    "name": (
        ValueError,
        "implementation must be None or one of 'mosaic_gpu', 'triton', 'xla', got 'cuda'. "
        "None picks the first that runs.",
        {"implementation": "cuda"},
    ),
    "triton": (
        NotImplementedError,
        "implementation='triton' can't run this: only 'mosaic_gpu' has a kernel for product and op, got 'triton'. "
        "Leave implementation out, or pass 'xla'.",
        {"implementation": "triton"},
    ),
}
NAMES = ("hidden", "weight", "q_weight", "k_weight", "cos_sin_cache", "positions")


@pytest.mark.parametrize("exception, message, changes", BAD_CALLS.values(), ids=BAD_CALLS)
def test_a_bad_call(exception, message, changes):
    call = dict(zip(NAMES, arguments(), strict=True)) | {"eps": 1e-6, "num_q_heads": 4} | changes
    with pytest.raises(exception, match=f"^{re.escape(message)}$"):
        pallas_qk.fused_qkv_projection_rmsnorm_rope_gate(**call)


REFUSED = "implementation='mosaic_gpu' can't run this: {}. Leave implementation out, or pass 'xla'."
TOO_MUCH = {
    "float32": ({"dtype": "float32"}, 64, "it multiplies float16 or bfloat16, got float32"),
    "heads": (
        {"head_dim": 128, "rotary_dim": 128},
        64,
        "it takes heads of 256 elements of which 64 are rotated, got head_dim=128, rotary_dim=128",
    ),
    "rotation": (
        {"rotary_dim": 256},
        64,
        "it takes heads of 256 elements of which 64 are rotated, got head_dim=256, rotary_dim=256",
    ),
    "width": ({}, 96, "it takes hidden states whose width is a multiple of 64, got 96"),
}


@pytest.mark.parametrize("changes, width, reason", TOO_MUCH.values(), ids=TOO_MUCH)
def test_what_the_kernel_can_not_do(changes, width, reason):
    case = dataclasses.replace(CASE, **changes)
    with pytest.raises(NotImplementedError, match=f"^{re.escape(REFUSED.format(reason))}$"):
        op(case, BY_KERNEL)(*arguments(case, width))


def test_norms_without_weights_are_refused():
    hidden, weight, _, _, *others = arguments()
    message = REFUSED.format("it takes norms with weights, got None")
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}$"):
        pallas_qk.fused_qkv_projection_rmsnorm_rope_gate(
            hidden, weight, None, None, *others, 1e-6, 4, head_dim=256, implementation=BY_KERNEL
        )


@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (12, 0)])
def test_other_gpus_are_refused(capability):
    reason = projection.unsupported_projection(Spec(1, 4, 2, 256, 64, "bfloat16"), 64, Target(capability, 132))
    assert reason == f"it needs compute capability 9.0 (wgmma), got {capability[0]}.{capability[1]}"


def test_other_platforms_are_refused():
    arrays = jax.eval_shape(arguments)
    for platforms, named in {("cpu",): "cpu", ("tpu",): "tpu", ("cuda", "cpu"): "cpu"}.items():
        message = f"implementation='mosaic_gpu' must run on an NVIDIA GPU, got platform {named}. "
        with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
            lowered(op(implementation=BY_KERNEL), *arrays, platforms=platforms)


# --- the kernel's programs ----------------------------------------------------------------------------------------


def num_products(text: str) -> int:
    return text.count("stablehlo.dot_general")


KERNEL_CASES = {
    "plain": CASE,
    "one token": Case(1, 16, 2),
    "8/1 heads": Case(300, 8, 1, dtype="float16", norm_beta=1.0),
    "32/2 heads": Case(4100, 32, 2),
    "no kv heads to spare": Case(129, 1, 1),
    "float32 beside it": Case(64, 16, 2, weight_dtype="float32", cache_dtype="float32"),
    "mrope": Case(64, 16, 2, mrope_section=(11, 11, 10)),
    "rows": Case(64, 16, 2, gathered=True),
    "positions of a byte": Case(64, 16, 2, positions_dtype="uint8"),
    "many": Case(65536, 16, 2),
}


@pytest.mark.parametrize("case", KERNEL_CASES.values(), ids=KERNEL_CASES)
def test_a_program_for_cuda_is_one_kernel(case):
    text = lowered_text(op(case, BY_KERNEL), *jax.eval_shape(functools.partial(arguments, case)))
    assert kernels(text) == [FORWARD] and num_products(text) == 0


@pytest.mark.parametrize("width", [64, 128, 192, 320, 4096])
def test_every_width_of_whole_steps_lowers(width):
    case = dataclasses.replace(CASE, num_tokens=300)
    text = lowered_text(op(case, BY_KERNEL), *jax.eval_shape(functools.partial(arguments, case, width)))
    assert kernels(text) == [FORWARD]


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_positions_of_64_bits(dtype):
    with jax.enable_x64(True):
        arrays = jax.eval_shape(functools.partial(arguments, dataclasses.replace(CASE, positions_dtype=dtype)))
        assert kernels(lowered_text(op(implementation=BY_KERNEL), *arrays)) == [FORWARD]


def test_weights_of_two_dtypes():
    hidden, weight, q_weight, *others = arguments()
    arrays = hidden, weight, q_weight.astype(jnp.float32), *others
    assert kernels(lowered_text(op(implementation=BY_KERNEL), *arrays)) == [FORWARD]


def test_no_tokens_need_no_kernel():
    arrays = arguments(dataclasses.replace(CASE, num_tokens=0))
    assert kernels(lowered_text(op(implementation=BY_KERNEL), *arrays)) == []


def test_none_never_takes_it():
    text = lowered_text(op(Case(16384)), *jax.eval_shape(functools.partial(arguments, Case(16384))))
    assert FORWARD not in kernels(text) and num_products(text) == 1


def test_an_export_for_cuda():
    exported = export.export(jax.jit(op(implementation=BY_KERNEL)), platforms=["cuda"])(*arguments())
    assert kernels(str(exported.mlir_module())) == [FORWARD]


def test_an_open_number_of_tokens_is_refused():
    (tokens,) = export.symbolic_shape("tokens")
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments()]
    hidden, *others, positions = arrays
    arrays = hidden.update(shape=(tokens, WIDTH)), *others, positions.update(shape=(tokens,))
    message = REFUSED.format("it needs sizes that are known when tracing, got tokens")
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
        export.export(jax.jit(op(implementation=BY_KERNEL)), platforms=["cuda"])(*arrays)
    exported = export.export(jax.jit(op(implementation="xla")), platforms=["cpu"])(*arrays)
    assert_same(list(exported.call(*arguments())), list(op(implementation="xla")(*arguments())))


def test_an_open_table_is_refused():
    (rows,) = export.symbolic_shape("rows")
    hidden, weight, *weights, table, positions = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments()]
    arrays = hidden, weight, *weights, table.update(shape=(rows, table.shape[1])), positions
    message = REFUSED.format("it needs sizes that are known when tracing, got rows")
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
        export.export(jax.jit(op(implementation=BY_KERNEL)), platforms=["cuda"])(*arrays)


def test_an_error_keeps_no_traced_product():
    hidden, weight, *others = arguments()
    with jax.checking_leaks(), pytest.raises(ValueError, match=re.escape("hidden @ weight must have shape")):
        op()(hidden, weight[:, 1:], *others)


def test_the_products_of_a_gradient():
    """Of hidden and weight one product each, and the one that the op's backward reads, which no forward keeps."""
    *arrays, positions = arguments()

    def gradient(argnums):
        return jax.value_and_grad(lambda *x: loss(op(implementation=BY_KERNEL))(*x, positions), argnums)

    for argnums, products in {(0, 1, 2, 3, 4): 3, (0,): 2, (2,): 1}.items():
        text = lowered_text(gradient(argnums), *arrays)
        assert kernels(text) == [FORWARD, *BACKWARD] and num_products(text) == products
    assert "stablehlo.scatter" not in lowered_text(gradient((0, 1)), *arrays)


def test_the_forward_keeps_its_arguments_alone():
    arrays = arguments()
    kept = jax.eval_shape(lambda *x: jax.vjp(lambda *y: op(implementation=BY_KERNEL)(*y, x[-1]), *x[:-1])[1], *arrays)
    shapes = {x.shape for x in jax.tree.leaves(kept)}
    assert shapes <= {x.shape for x in arrays} | {(1, CASE.num_tokens), ()}


# --- the kernel's arithmetic --------------------------------------------------------------------------------------

EPILOGUES = {
    "plain": {},
    "float16, mrope": {"dtype": "float16", "mrope_section": (11, 11, 10), "norm_beta": 1.0},
    "float32 beside it": {"weight_dtype": "float32", "cache_dtype": "float32"},
    "sectioned": {"mrope_section": (16, 8, 8), "mrope_layout": "sectioned", "cache_dtype": "float16"},
    "positions of a byte": {"positions_dtype": "int8"},
}


def places_of(array, first):
    """Where a thread's words [j][h] of rows of 256 lie in an array, from row `first` on."""
    columns = [(epilogue.quad() * 2).resized(64) + 8 * j for j in range(32)]
    rows = [array.row(first + epilogue.row_of_thread(row), 256) for row in range(2)]
    return [[row + column for row in rows] for column in columns]


def words_of(array, first):
    return [[place.load(2) for place in of_rows] for of_rows in places_of(array, first)]


def epilogue_of(product, weight, table, positions, *, case: Case):
    """Rows of one head, normalised and rotated by threads that hold them as the kernel's do: its code in a launch."""
    num_tokens, dtype, max_position = case.num_tokens, jnp.dtype(case.dtype), len(table)
    options = forms.options(case)

    def thread(program, inputs, out):
        product, weight, table, positions = inputs
        first, table = program * 64, Table(table, positions, max_position, num_tokens, options)
        angles = epilogue.words_of_angles(table, first)
        words = epilogue.normed(words_of(product, first), *angles, weight, table, first, dtype)
        for places, of_rows in zip(places_of(out, first), words, strict=True):
            for place, of_row in zip(places, of_rows, strict=True):
                place.store(of_row)

    out = jax.ShapeDtypeStruct(product.shape, dtype)
    arrays = product, weight, table, positions
    return launch("epilogue", thread, arrays, out, num_programs=len(product) // 64, num_warpgroups=1)


@pytest.mark.parametrize("changes", EPILOGUES.values(), ids=EPILOGUES)
def test_the_epilogue_has_the_bits_of_the_op(changes):
    case = dataclasses.replace(Case(70, 1, 1, max_position=100), **changes)
    inputs = make_inputs(case)
    positions = np.array(inputs.positions)
    positions[..., 1::7], positions[..., 2::5], positions[..., 69] = -1, 127, 100
    product = random_normal((128, 256), jnp.float32, 3).at[70:].set(jnp.nan)  # rows past the last
    rows = product[:70].astype(case.dtype)
    q_gate = jnp.concatenate([rows, rows], axis=1)
    inputs = dataclasses.replace(inputs, q_gate=q_gate, k=rows, positions=jnp.asarray(positions))
    of_rows = functools.partial(epilogue_of, case=case)
    # Both by the interpreter: a GPU's approximations are its own.
    by_op = kernel("forward", BY_KERNEL, forms.options(case), is_empty=False, num_sms=HOPPER_SMS)
    outputs = by_op(forms.split_heads(case, forms.inputs_of(case, inputs)))
    for weight, rows in ((inputs.q_weight, outputs.q), (inputs.k_weight, outputs.k)):
        want = rows.reshape(70, 256)
        got = execute(of_rows, product, weight, inputs.cos_sin_cache, jnp.atleast_2d(inputs.positions))
        assert_same(jnp.asarray(got[:70]), want)
        assert np.isnan(np.asarray(want, np.float32)).any()


# --- what is around the kernel ------------------------------------------------------------------------------------


class Definition:
    """Stands in for the kernel's primitive."""

    def __init__(self):
        self.calls = 0

    def bind(self, *leaves, call, tree):
        self.calls += 1
        hidden, weight, inputs = jax.tree.unflatten(tree, leaves)
        return jax.tree.leaves(_projection_op.product_and_op(in_xla(call), hidden, weight, inputs))


def in_xla(call: Call) -> Call:
    return call._replace(implementation="xla")


def call_of(case: Case) -> Call:
    heads = case.num_q_heads, case.num_kv_heads
    return Call(Options(case.rotary_dim, case.eps, packed=heads), "xla")


@pytest.fixture
def of_definition(monkeypatch):
    """The differentiable function of the kernel, and how often the kernel is called."""
    stand_in = Definition()
    monkeypatch.setattr(_projection_op, "projection_p", stand_in)
    case = dataclasses.replace(CASE, dtype="float32")
    *arrays, positions = arguments(case)

    def function(hidden, weight, q_weight, k_weight, table):
        inputs = Inputs(None, None, q_weight, k_weight, table, positions[None])
        return tuple(jax.tree.leaves(_projection_op.by_kernel(call_of(case), hidden, weight, inputs)))

    def definition(*arrays):
        return two_steps(case, "xla")(*arrays, positions)

    return function, definition, arrays, stand_in


def test_gradients_of_the_kernel_are_those_of_the_definition(of_definition):
    function, definition, arrays, stand_in = of_definition
    every = tuple(range(5))
    got = quick_jit(jax.grad(loss(function), every))(*arrays)
    assert stand_in.calls == 1
    assert_same(got, quick_jit(jax.grad(loss(definition), every))(*arrays))


def test_tangents_and_second_derivatives_of_the_kernel(of_definition):
    function, definition, arrays, _ = of_definition

    def tangents(f):
        return quick_jit(lambda *x: jax.jvp(f, x, x))(*arrays)

    assert_same(tangents(function), tangents(definition))

    def second(f):
        gradient = jax.grad(loss(f), argnums=2)
        return quick_jit(lambda *x: jax.jvp(lambda w: gradient(*x[:2], w, *x[3:]), (x[2],), (x[2],))[1])(*arrays)

    np.testing.assert_allclose(second(function), second(definition), rtol=1e-4, atol=1e-4)


def test_mapped_tokens_are_one_launch_and_weights_one_each():
    hidden, weight, *others, positions = arguments()
    function = op(implementation=BY_KERNEL)
    batch = jnp.stack([hidden] * 3)
    for axes, arrays in (
        ((0, None, None, None, None, None), (batch, weight, *others, positions)),
        ((0, None, None, None, None, 0), (batch, weight, *others, jnp.stack([positions] * 3))),
        ((None, None, None, None, None, 0), (hidden, weight, *others, jnp.stack([positions] * 3))),
    ):
        text = lowered_text(jax.vmap(function, axes), *arrays)
        assert kernels(text) == [FORWARD] and "stablehlo.while" not in text
        assert f"tensor<{3 * CASE.num_tokens + (-3 * CASE.num_tokens) % 8}x{WIDTH}xbf16>" in text
    arrays = hidden, jnp.stack([weight] * 3), *others, positions
    text = lowered_text(jax.vmap(function, (None, 0, None, None, None, None)), *arrays)
    assert kernels(text) == [FORWARD] and "stablehlo.while" in text


def test_several_devices_need_shard_map():
    arrays = arguments(dataclasses.replace(CASE, num_tokens=8))
    on = mesh(data=4)
    specs = P("data"), P(), P(), P(), P(), P("data")
    sharded = put(on, arrays, specs)
    message = (
        "implementation='mosaic_gpu' must run inside jax.shard_map over several devices, got 4 devices outside one. "
        "Call it there, with each device's tokens, or its heads and their columns of weight, or leave implementation "
        "out."
    )
    function = op(implementation=BY_KERNEL)
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}$"):
        jax.jit(function).trace(*sharded).lower(lowering_platforms=("cuda",))
    mapped = jax.shard_map(function, mesh=on, in_specs=specs, out_specs=P("data"))
    assert kernels(jax.jit(mapped).trace(*sharded).lower(lowering_platforms=("cuda",)).as_text()) == [FORWARD]


def test_explicit_axes_need_shard_map():
    arrays = arguments(dataclasses.replace(CASE, num_tokens=8))
    with mesh_of({"data": 4}, "explicit, set_mesh") as on:
        sharded = put(on, arrays, [("data",), (), (), (), (), ("data",)])
        with pytest.raises(NotImplementedError, match="over several devices, got 4 devices outside"):
            jax.jit(op(implementation=BY_KERNEL)).trace(*sharded).lower(lowering_platforms=("cuda",))


def test_gradients_inside_shard_map():
    """Weights are the same on each device, so their gradients are summed over devices."""
    arrays = arguments(dataclasses.replace(CASE, num_tokens=8))
    on, specs = mesh(data=4), (P("data"), P(), P(), P(), P(), P("data"))

    def of_device(*arrays):
        *others, positions = arrays
        gradient = jax.grad(lambda *x: loss(op(implementation=BY_KERNEL))(*x, positions), argnums=(0, 1, 2))
        return gradient(*others)

    mapped = jax.shard_map(of_device, mesh=on, in_specs=specs, out_specs=(P("data"), P(), P()))
    text = jax.jit(mapped).trace(*put(on, arrays, specs)).lower(lowering_platforms=("cuda",)).as_text()
    assert kernels(text) == [FORWARD, BACKWARD[0]] and text.count("stablehlo.all_reduce") == 2


@pytest.mark.parametrize("row_blocks, num_q_heads, num_kv_heads", [(1, 16, 2), (17, 16, 2), (16, 32, 2), (5, 1, 1)])
@pytest.mark.parametrize("num_programs", [2, 38, 66])
def test_programs_take_each_tile_once_and_heads_by_turns(row_blocks, num_q_heads, num_kv_heads, num_programs):
    heads = 2 * (num_q_heads + num_kv_heads)
    numbers = np.arange(row_blocks * heads, dtype=np.int32)
    turns = numbers // num_programs
    rows, columns = jax.vmap(lambda number, turn: projection._tile(number, turn, row_blocks, heads))(numbers, turns)
    assert sorted(zip(rows.tolist(), columns.tolist(), strict=True)) == [
        (row, head) for row in range(row_blocks) for head in range(heads)
    ]
    of_first = np.asarray(columns)[::num_programs]
    assert (of_first % 2 == turns[::num_programs] % 2).all()


# --- on a GPU -----------------------------------------------------------------------------------------------------


def exact_arguments(case: Case, width: int) -> list:
    """Products of small integers are exact in float32, and many too long for 16 bits; positions of all kinds."""
    rng = np.random.default_rng(width + case.num_tokens)
    _, _, *others, _ = make_inputs(dataclasses.replace(case, num_tokens=1))
    hidden = rng.integers(-8, 9, (case.num_tokens, width), np.int8)
    weight = rng.integers(-3, 4, (width, num_columns(case)), np.int8)
    axes = (case.num_tokens,) if case.mrope_section is None else (3, case.num_tokens)
    positions = rng.integers(0, case.max_position, axes, np.int32)
    positions[..., 1::7], positions[..., 2::11], positions[..., 3::13] = -1, case.max_position, 2**31 - 1
    positions[..., 4::17], positions[..., 5::19] = -(2**31), case.max_position - 1
    return [jnp.asarray(x).astype(case.dtype) for x in (hidden, weight)] + [*others, jnp.asarray(positions)]


ON_A_GPU = [
    *((Case(tokens, 16, 2), 2048) for tokens in (1, 63, 64, 127, 128, 129, 300, 4096, 4100)),
    (Case(4096, 32, 2), 4096),
    (Case(300, 8, 1), 192),
    (Case(300, 3, 1), 64),
    (Case(257, 1, 1), 128),
    (Case(1000, 16, 2, dtype="float16", norm_beta=1.0), 2048),
    (Case(1000, 16, 2, weight_dtype="float32", cache_dtype="float32"), 320),
    (Case(1000, 16, 2, mrope_section=(11, 11, 10)), 2048),
    (
        Case(1000, 8, 2, dtype="float16", mrope_section=(11, 11, 10), weight_dtype="float32", cache_dtype="float32"),
        256,
    ),
    (Case(1000, 8, 2, mrope_section=(16, 8, 8), mrope_layout="sectioned"), 256),
]


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("case, width", ON_A_GPU, ids=lambda x: getattr(x, "id", str(x)))
def test_bits_of_the_kernel_are_those_of_the_op(case, width):
    arrays = exact_arguments(case, width)
    got = op(case, BY_KERNEL)(*arrays)
    assert_same(list(got), list(jax.jit(two_steps(case, BY_KERNEL))(*arrays)))
    assert_same(list(op(case, BY_KERNEL)(*arrays)), list(got))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_the_kernel_agrees_with_the_op_on_any_numbers():
    """But for products that another order of the sum rounds otherwise."""
    case = Case(4096, 16, 2)
    arrays = arguments(case, 2048)
    got, want = op(case, BY_KERNEL)(*arrays), jax.jit(two_steps(case, BY_KERNEL))(*arrays)
    for x, y in zip(got, want, strict=True):
        error = np.abs(np.asarray(x, np.float32) - np.asarray(y, np.float32))
        assert error.max() < 0.1 and (error > 0).mean() < 0.01


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_rows_of_each_token_and_positions_of_every_dtype():
    case = Case(300, 8, 1, max_position=100)
    *arrays, table, positions = exact_arguments(case, 192)
    for dtype in ("int8", "uint8", "int16", "uint16", "uint32"):
        narrow = positions.astype(dtype)
        got = op(case, BY_KERNEL)(*arrays, table, narrow)
        assert_same(list(got), list(jax.jit(two_steps(case, BY_KERNEL))(*arrays, table, narrow)))
    case, rows, others = dataclasses.replace(case, gathered=True), table[positions % len(table)], arrays
    assert_same(list(op(case, BY_KERNEL)(*others, rows)), list(jax.jit(two_steps(case, BY_KERNEL))(*others, rows)))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
def test_gradients_on_a_gpu():
    *arrays, positions = exact_arguments(Case(300, 16, 2), 256)

    def gradients(function):
        def summed(*x):
            return sum(jnp.sum(y.astype(jnp.float32)) for y in function(*x, positions))

        return jax.jit(jax.grad(summed, argnums=(0, 1, 2, 3)))(*arrays)

    got, want = gradients(op(Case(300, 16, 2), BY_KERNEL)), gradients(two_steps(Case(300, 16, 2), BY_KERNEL))
    assert_same(got, want)
