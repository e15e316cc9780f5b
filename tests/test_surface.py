"""Every form of the call through the public functions: the numbers of the plain contract, however arrays come.

The forms: the gate copied, left in place or absent; q, k and v packed in one array; a row of the table for each token
instead of positions; any leading axes, with heads on an axis of their own or not; sectioned mRoPE.
`test_kernel_forms.py` has the kernels by their interpreters.
"""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_qk
from tests import forms
from tests.cases import Case, make_cotangents, make_inputs
from tests.compare import assert_same
from tests.definition import assert_defined, define
from tests.derivatives import TRANSFORMS, relative, scalar
from tests.devices import MODES, assert_only_weight_sums, collectives, compiled, mesh, mesh_of, put
from tests.gradients import assert_agree, define_gradients, gradients
from tests.gradients import assert_defined as assert_gradients_defined
from tests.lowering import GPU_IMPLEMENTATIONS, kernels, lowered_text
from tests.run import has_gpu, primitives, quick_jit, run

PLAIN = Case(5, 3, 2, head_dim=16, rotary_dim=8, max_position=32)
FORMS = {
    "in place": {"gate": "in_place"},
    "no gate": {"gate": None},
    "packed": {"packed": True},
    "packed, in place": {"packed": True, "gate": "in_place"},
    "packed, no gate": {"packed": True, "gate": None},
    "q, k and v": {"separate_v": True},
    "q, k and v, no gate": {"separate_v": True, "gate": None},
    **{
        f"rows, {name}": {"gathered": True, **changes}
        for name, changes in {
            "copied": {},
            "in place": {"gate": "in_place"},
            "no gate": {"gate": None},
            "packed": {"packed": True},
            "packed, in place": {"packed": True, "gate": "in_place"},
            "packed, no gate": {"packed": True, "gate": None},
        }.items()
    },
}


@pytest.fixture(params=pallas_qk.IMPLEMENTATIONS if has_gpu() else ["xla"])
def implementation(request) -> str:
    return request.param


@pytest.fixture(params=FORMS)
def form(request) -> dict:
    return FORMS[request.param]


def of_form(form: dict, plain: Case = PLAIN) -> Case:
    return dataclasses.replace(plain, **form)


def inputs_of(case: Case, seed: int = 0):
    """The contract's, each token at a position of its own, so that a row of the table is one token's."""
    inputs = make_inputs(case, seed)
    positions = jax.random.permutation(jax.random.key(seed), case.max_position)[: case.num_tokens]
    return inputs if case.mrope_section else dataclasses.replace(inputs, positions=positions)


def vjp(function, args, cotangents):
    """Gradients of all that can have one."""
    floats = sum(jnp.issubdtype(x.dtype, jnp.floating) for x in args)
    return gradients(function, floats, len(args))(*args, *cotangents)


@functools.cache
def contract(plain: Case, implementation: str):
    """Inputs, outputs and gradients, (T, heads*D), of the plain form."""
    inputs, function = inputs_of(plain), forms.op(plain, implementation)
    found = quick_jit(functools.partial(vjp, function))(list(inputs), make_cotangents(plain))
    return inputs, jax.jit(function)(*inputs), found


def gradients_of(case: Case, inputs, gradients):
    """The gradients of the form from those of the plain form."""
    *first, table = gradients
    first = forms.gradients_of(case, first)
    return [*first, table[inputs.positions] if case.gathered else table]


MROPE = {"mrope_section": (2, 1, 1), "dtype": "float16", "norm_beta": 1.0}


@pytest.mark.parametrize(
    "changes",
    [*FORMS.values(), *(MROPE | form for form in FORMS.values() if "gathered" not in form)],
    ids=[*FORMS, *(f"mrope, {name}" for name, form in FORMS.items() if "gathered" not in form)],
)
def test_a_form_has_the_numbers_of_the_contract(implementation, changes):
    case = of_form(changes)
    inputs, outputs, gradients = contract(forms.plain(case), implementation)
    args = forms.arguments(case, inputs)
    assert_same(forms.op(case, implementation)(*args), forms.outputs_of(case, outputs))
    got = quick_jit(functools.partial(vjp, forms.op(case, implementation)))(args, forms.cotangents_of(case))
    for a, x in zip(got, args, strict=False):
        assert a.shape == x.shape and a.dtype == x.dtype
    assert_agree(got, gradients_of(case, inputs, gradients))


def test_no_tokens(form):
    case = of_form(form, dataclasses.replace(PLAIN, num_tokens=0))
    inputs = make_inputs(case)
    args = forms.arguments(case, inputs)
    outputs = forms.op(case)(*args)
    assert [x.shape[0] for x in outputs] == [0] * len(outputs)
    for gradient, x in zip(vjp(forms.op(case), args, outputs), args, strict=False):
        assert gradient.shape == x.shape and not np.asarray(gradient).any()


def test_float32_rows_beside_16_bit_activations():
    case = dataclasses.replace(PLAIN, cache_dtype="float32", gathered=True)
    inputs, outputs, gradients = contract(forms.plain(case), "xla")
    args = forms.arguments(case, inputs)
    assert_same(forms.op(case, "xla")(*args), outputs)
    got = quick_jit(functools.partial(vjp, forms.op(case, "xla")))(args, forms.cotangents_of(case))
    assert got[4].dtype == jnp.float32
    assert_agree(got, gradients_of(case, inputs, gradients))


# mRoPE


SECTIONED = Case(
    6, 2, 1, head_dim=32, rotary_dim=16, max_position=64, mrope_section=(3, 1, 4), mrope_layout="sectioned"
)


@pytest.mark.parametrize("section", [(3, 1, 4), (8, 0, 0), (0, 3, 5)])
def test_sectioned_mrope(implementation, section):
    case = dataclasses.replace(SECTIONED, mrope_section=section)
    inputs = make_inputs(case)
    assert_defined(run(implementation, case, inputs), case, inputs)
    cotangents = make_cotangents(case)
    got = quick_jit(functools.partial(vjp, forms.op(case, implementation)))(list(inputs), cotangents)
    assert_gradients_defined(got, define_gradients(case, inputs, cotangents))


def test_the_two_mrope_layouts_differ():
    inputs = make_inputs(SECTIONED)
    interleaved = dataclasses.replace(SECTIONED, mrope_layout="interleaved")
    exact, other = define(SECTIONED, inputs), define(interleaved, inputs)
    assert (abs(exact.q_out - other.q_out) > 2 * exact.q_bound).any()


# Leading axes and heads of their own


def in_shape(x, lead, heads, split):
    """(T, heads*D) as the leading axes and heads that a user has."""
    return x.reshape(*lead, *((heads, x.shape[-1] // heads) if split else x.shape[-1:]))


def shaped(case: Case, arrays, lead, split):
    """The arguments of the form in other shapes."""
    x = forms.inputs_of(case, arrays)
    x = x._replace(q=in_shape(x.q, lead, case.num_q_heads, split))
    if x.k is not None:
        x = x._replace(k=in_shape(x.k, lead, case.num_kv_heads, split))
    if x.positions is None:
        return jax.tree.leaves(x._replace(cos_sin_cache=x.cos_sin_cache.reshape(*lead, case.rotary_dim)))
    return jax.tree.leaves(x._replace(positions=x.positions.reshape(*x.positions.shape[:-1], *lead)))


@pytest.mark.parametrize(
    "lead, split, changes",
    [
        ((2, 3), False, {}),
        ((2, 3), False, {"gathered": True, "packed": True, "gate": "in_place"}),
        ((2, 3), False, {"packed": True, "gate": None}),
        ((2, 3), True, {"mrope_section": (2, 1, 1)}),
        ((1, 2, 3), True, {"gate": "in_place"}),
        ((6,), True, {"gathered": True, "gate": None}),
        ((), False, {"mrope_section": (2, 1, 1)}),
        ((), False, {"packed": True}),
        ((), True, {"gathered": True}),
    ],
    ids=str,
)
def test_leading_axes_and_heads(implementation, lead, split, changes):
    case = of_form(changes, dataclasses.replace(PLAIN, num_tokens=int(np.prod(lead))))
    inputs, outputs, gradients = contract(forms.plain(case), implementation)
    heads = {case.num_q_heads * case.head_dim: case.num_q_heads, case.num_kv_heads * case.head_dim: case.num_kv_heads}
    outputs, cotangents = (
        [in_shape(x, lead, heads[x.shape[-1]], split) for x in arrays]
        for arrays in (forms.outputs_of(case, outputs), forms.cotangents_of(case))
    )
    args = shaped(case, inputs, lead, split)
    got = forms.op(case, implementation)(*args)
    assert [x.shape for x in got] == [x.shape for x in outputs]
    assert_same(got, outputs)
    got = quick_jit(functools.partial(vjp, forms.op(case, implementation)))(args, cotangents)
    assert [x.shape for x in got] == [x.shape for x in args[: len(got)]]
    want = gradients_of(case, inputs, gradients)
    assert_agree([a.reshape(b.shape) for a, b in zip(got, want, strict=True)], want)


@pytest.mark.parametrize("gathered", [False, True])
def test_a_single_head_is_read_by_the_number_of_positions_axes(gathered):
    """(4, 1, 2*D) holds one head for 4 tokens, or a flat head for each of (4, 1) tokens; k says which was meant."""
    case = dataclasses.replace(PLAIN, num_tokens=4, num_q_heads=1, gathered=gathered)
    inputs, outputs, *_ = contract(forms.plain(case), "xla")
    for lead, split in (((4,), True), ((4, 1), False)):
        args = shaped(case, inputs, lead, split)
        assert args[0].shape == (4, 1, 32)
        got = forms.op(case, "xla")(*args)
        assert got[1].shape == ((4, 2, 16) if split else (4, 1, 32))
        assert_same([x.reshape(4, -1) for x in got], outputs)


# Derivatives


@pytest.mark.parametrize(
    "name, transform",
    [  # each by a derivative of the first order and one of the second
        ("in place", "jvp"),
        ("in place", "grad of grad"),
        ("packed, in place", "linear_transpose"),
        ("packed, in place", "jvp of grad"),
        ("packed, no gate", "jvp"),
        ("packed, no gate", "grad of grad"),
        ("rows, no gate", "linear_transpose"),
        ("rows, no gate", "jvp of grad"),
        ("rows, packed", "jvp"),
        ("rows, packed", "grad of grad"),
    ],
)
def test_every_mode_and_order(name, transform):
    """In float32, as functions of the contract's arrays and v, against the same derivatives of the plain form."""
    plain = dataclasses.replace(PLAIN, num_tokens=3, dtype="float32")
    case, inputs = of_form(FORMS[name], plain), inputs_of(plain)

    def arranged(*args):
        *floats, v = args
        moved = dataclasses.replace(inputs, **dict(zip(inputs.__dataclass_fields__, floats, strict=False)))
        return tuple(forms.op(case, "xla")(*forms.arguments(case, moved, v)))

    def contracted(*args):
        *floats, v = args
        return tuple(forms.outputs_of(case, forms.op(plain, "xla")(*floats, inputs.positions), v))

    args = (*list(inputs)[:5], forms.values(case))
    got, want = (quick_jit(TRANSFORMS[transform](f))(*args) for f in (arranged, contracted))
    assert relative(got, want) < 2.0**-16


def test_one_forward_and_one_backward(form):
    case = of_form(form)
    function, args = forms.op(case), forms.arguments(case, inputs_of(PLAIN))
    argnums = tuple(range(len(args) - (not case.gathered)))
    names = primitives(jax.grad(scalar(function), argnums), *args)
    ours = sorted(name for name in names if name.startswith("fused_qk"))
    assert ours == ["fused_qk_rmsnorm_rope_gate", "fused_qk_rmsnorm_rope_gate_backward"]


# Above 10^7 elements the weights' sums of Mosaic GPU take another stage.
COST = dataclasses.replace(PLAIN, num_tokens=64, head_dim=64, rotary_dim=16)


@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_nothing_is_moved_beside_the_kernel(name, form):
    """The lowered program for CUDA: a call between barriers, reshapes, and the slice of a gate that stays in place."""
    case = of_form(form, COST)
    args = jax.eval_shape(lambda: forms.arguments(case, make_inputs(case)))
    outputs = jax.eval_shape(forms.op(case, "xla"), *args)
    weights = slice(1, 3) if case.packed else slice(2, 4)

    def backward(args, cotangents):
        gradients = vjp(forms.op(case, name), args, cotangents)
        return gradients[: weights.stop]  # the table's is XLA's

    def operations(function, *args):
        text = lowered_text(function, *args)
        others = set(re.findall(r"stablehlo\.(\w+)", text)) - {"custom_call", "reshape", "optimization_barrier"}
        return others, kernels(text)

    found, calls = operations(forms.op(case, name), *args)
    # A row of positions gets an axis; the gate is cut out of q.
    assert found <= {"broadcast_in_dim", "constant"} | ({"slice"} if case.gate == "in_place" else set()), found
    assert ("slice" in found) == (case.gate == "in_place")
    assert calls.count(f"pallas_qk_{name}_forward") == 1
    found, calls = operations(backward, args, tuple(outputs))
    assert found <= {"broadcast_in_dim", "constant", "convert"}, found  # the weights' gradients are rounded
    assert calls.count(f"pallas_qk_{name}_backward") == 1


# vmap


def batched(case: Case, moved, axis=0):
    """Arguments of three calls on an axis where `moved` names them, the axes, and the arguments of each call."""
    calls = [forms.inputs_of(case, inputs_of(forms.plain(case), seed)) for seed in range(3)]
    calls = [calls[0]._replace(**{name: getattr(call, name) for name in moved}) for call in calls]
    names = [name for name, x in calls[0]._asdict().items() if x is not None]
    columns = [[getattr(call, name) for call in calls] for name in names]
    args = [jnp.stack(x, axis) if name in moved else x[0] for name, x in zip(names, columns, strict=True)]
    return args, [axis if name in moved else None for name in names], [jax.tree.leaves(call) for call in calls]


FLOAT32 = dataclasses.replace(PLAIN, dtype="float32")


@pytest.mark.parametrize(
    "name, axis",
    [("in place", 0), ("no gate", -1), ("packed, no gate", -1), ("rows, copied", 0), ("rows, packed, in place", -1)],
)
def test_vmap_over_activations_is_one_call(name, axis):
    case = of_form(FORMS[name], FLOAT32)
    activations = ["q", *([] if case.packed else ["k"]), "cos_sin_cache" if case.gathered else "positions"]
    args, axes, calls = batched(case, activations, axis)
    function = forms.op(case, "xla")
    mapped = jax.vmap(function, axes)
    got, want = mapped(*args), [jnp.stack(x) for x in zip(*(function(*call) for call in calls), strict=True)]
    assert_same([x.reshape(15, -1) for x in got], [x.reshape(15, -1) for x in want])
    names = primitives(mapped, *args)
    assert names.count("fused_qk_rmsnorm_rope_gate") == 1 and "scan" not in names

    cotangents = forms.cotangents_of(case)
    got = quick_jit(functools.partial(vjp, mapped))(args, [jnp.stack([x] * 3) for x in cotangents])
    each = [quick_jit(functools.partial(vjp, function))(call, cotangents) for call in calls]
    for x, axis, columns in zip(got, axes, zip(*each, strict=True), strict=False):
        want = jnp.stack(columns).sum(0) if axis is None else jnp.stack(columns, axis)
        np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("moved", ["q", "cos_sin_cache", "k_weight"])
@pytest.mark.parametrize("name", ["rows, copied", "rows, packed, in place"])
def test_vmap_of_gradients_with_rows(name, moved):
    """A row for each token is batched like an activation: no loop, and each example has its own gradients."""
    case = of_form(FORMS[name], FLOAT32)
    args, axes, calls = batched(case, [moved])

    def of_call(*args):
        return vjp(forms.op(case, "xla"), args, forms.cotangents_of(case))

    mapped = jax.vmap(of_call, axes)
    assert ("scan" in primitives(mapped, *args)) == (moved == "k_weight")
    got, want = quick_jit(mapped)(*args), [quick_jit(of_call)(*call) for call in calls]
    for x, columns in zip(got, zip(*want, strict=True), strict=True):
        np.testing.assert_allclose(x, jnp.stack(columns), rtol=1e-5, atol=1e-5)


# Over eight devices of the host


WIDE = Case(16, 8, 2, head_dim=16, rotary_dim=8, max_position=64)


def check(case, args, cotangents, specs, on, want, want_gradients, function=None, placed=True):
    """Forward without a collective, backward with the sums of the weights' gradients alone.

    `specs` are those of the arguments and of the results.
    """
    function = function or forms.op(case)
    arg_specs, result_specs = specs
    if placed:
        args, cotangents = put(on, args, arg_specs), put(on, cotangents, result_specs)
    got, found = compiled(function, args)
    assert found == []
    assert_same([np.asarray(x) for x in got], [np.asarray(x) for x in want])
    for x, spec in zip(got, result_specs, strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(on, P(*spec)), x.ndim), x.sharding
    num_weighted = len(arg_specs) - 2 if not case.gathered else len(arg_specs) - 1  # all but the table
    got, found = compiled(gradients(function, num_weighted, len(arg_specs)), [*args, *cotangents], quick_jit)
    assert_only_weight_sums(found, case.head_dim)
    assert_agree(got, want_gradients[:num_weighted])
    for x, spec in zip(got, arg_specs, strict=False):
        assert x.sharding.is_equivalent_to(NamedSharding(on, P(*spec)), x.ndim), x.sharding


@functools.cache
def on_one_device(case: Case):
    inputs, outputs, gradients = contract(forms.plain(case), "xla")
    return (
        forms.arguments(case, inputs),
        forms.cotangents_of(case),
        forms.outputs_of(case, outputs),
        gradients_of(case, inputs, gradients),
    )


def specs_of(case: Case, tokens, q_heads, k_heads):
    """Of the arguments and of the results."""
    q, k = (*tokens, q_heads), (*tokens, k_heads)
    table = ((*tokens, None),) if case.gathered else ((), (tokens[0],) if len(tokens) == 1 else tokens)
    results = [q, k, *([k] if case.packed else []), *([] if case.gate is None else [q])]
    return [q, *([] if case.packed else [k]), (), (), *table], results


@pytest.mark.parametrize("mode", ["auto", "explicit, set_mesh"])
@pytest.mark.parametrize("name", ["in place", "rows, no gate", "packed, in place", "packed, no gate", "rows, packed"])
def test_sharded(on_the_host, name, mode):
    case = of_form(FORMS[name], WIDE)
    args, cotangents, outputs, gradients = on_one_device(case)
    with mesh_of({"data": 4, "model": 2}, mode) as on:
        layout = (("data", "model"),), None, None
        if not case.packed:
            layout = ("data",), "model", "model"
        check(case, args, cotangents, specs_of(case, *layout), on, outputs, gradients)


@pytest.mark.parametrize(
    "name, mode",
    [*(("in place", mode) for mode in MODES), ("rows, copied", "auto"), ("rows, copied", "explicit, set_mesh")],
)
def test_sharded_with_heads_and_two_leading_axes(on_the_host, name, mode):
    """(batch, sequence, heads, D), each of the first three over an axis of its own."""
    case, lead = of_form(FORMS[name], WIDE), (4, 4)
    inputs, outputs, gradients = contract(WIDE, "xla")
    args = shaped(case, inputs, lead, split=True)
    heads = case.num_q_heads, case.num_kv_heads, case.num_q_heads
    outputs, cotangents = (
        [in_shape(x, lead, h, split=True) for x, h in zip(arrays, heads, strict=True)]
        for arrays in (outputs, make_cotangents(WIDE))
    )
    gradients = [g.reshape(x.shape) for g, x in zip(gradients[:4], args, strict=False)]
    with mesh_of({"a": 2, "b": 2, "c": 2}, mode) as on:
        rows = ("a", "b", None) if case.gathered else ()
        activation = ("a", "b", "c", None)
        arg_specs = [activation, activation, (), (), rows, *([] if case.gathered else [("a", "b")])]
        check(case, args, cotangents, (arg_specs, [activation] * 3), on, outputs, gradients)


def test_the_gradient_of_rows_is_sharded_as_they_are(on_the_host):
    """Each device has its tokens' rows; heads on other devices are summed."""
    case = of_form({"gathered": True}, WIDE)
    args, cotangents, _, gradients = on_one_device(case)
    for mode in MODES:
        with mesh_of({"data": 4, "model": 2}, mode) as on:
            arg_specs, result_specs = specs_of(case, ("data",), "model", "model")
            args, cotangents = put(on, args, arg_specs), put(on, cotangents, result_specs)
            got, _ = compiled(lambda *args: vjp(forms.op(case), args[:5], args[5:])[4], [*args, *cotangents], quick_jit)
        assert got.sharding.is_equivalent_to(NamedSharding(on, P("data")), 2), got.sharding
        assert_agree([got], gradients[4:])


def shard_mapped(case, on):
    """Each device with its own heads: those of a packed array are packed for it."""
    static = {"num_q_heads": case.num_q_heads // 2, "num_kv_heads": case.num_kv_heads // 2}
    arg_specs, result_specs = specs_of(case, ("data",), "model", "model")
    local = forms.op(case, **static)
    args, results = (tuple(P(*spec) for spec in specs) for specs in (arg_specs, result_specs))
    return arg_specs, result_specs, jax.shard_map(local, mesh=on, in_specs=args, out_specs=results)


def repacked(case: Case, x):
    """A packed array as two devices hold it, each [q and gate | k | v] of its heads."""
    d, first_k = case.head_dim, (1 if case.gate is None else 2) * case.num_q_heads
    ends = [first_k * d, (first_k + case.num_kv_heads) * d]
    parts = [part.reshape(x.shape[0], 2, -1) for part in jnp.split(x, ends, axis=-1)]
    assert parts[1].shape[-1] == case.num_kv_heads * d // 2
    return jnp.concatenate(parts, axis=-1).reshape(x.shape)


@pytest.mark.parametrize("name", ["rows, in place", "packed", "packed, no gate", "rows, packed, in place"])
def test_shard_map(on_the_host, name):
    """With the check of varying axes, and the table's gradient too."""
    case = of_form(FORMS[name], WIDE)
    args, cotangents, outputs, gradients = on_one_device(case)
    if case.packed:
        args, gradients = ([repacked(case, x[0]), *x[1:]] for x in (args, gradients))
    on = mesh(data=4, model=2)
    *specs, function = shard_mapped(case, on)
    check(case, args, cotangents, specs, on, outputs, gradients, function)
    got = quick_jit(functools.partial(vjp, function))(args, cotangents)
    assert_agree(got, gradients)


def test_rows_that_vary_alone(on_the_host):
    """Every device has the same activations and rows of its own: gradients are summed over devices."""
    case = of_form({"gathered": True}, dataclasses.replace(WIDE, dtype="float32", num_tokens=2))
    calls = [forms.arguments(case, inputs_of(forms.plain(case), seed)) for seed in range(8)]
    rows = jnp.concatenate([call[4] for call in calls])
    weight = jax.random.normal(jax.random.key(1), (16, 128))

    def loss(function):
        return lambda args: jnp.sum(jnp.sin(function(*args, rows)[0] * weight))

    mapped = jax.shard_map(forms.op(case), mesh=mesh(data=8), in_specs=(*[P()] * 4, P("data")), out_specs=P("data"))

    def looped(*args):
        results = zip(*(forms.op(case)(*args[:4], call[4]) for call in calls), strict=True)
        return [jnp.concatenate(x) for x in results]

    got, want = (quick_jit(jax.grad(loss(function)))(calls[0][:4]) for function in (mapped, looped))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_what_comes_out_of_a_packed_array_may_be_sharded_by_heads(on_the_host):
    """Each device makes all heads of its tokens and keeps its own: no collective."""
    case = of_form({"packed": True}, WIDE)
    args, _, outputs, _ = on_one_device(case)
    on = mesh(data=4, model=2)
    args = put(on, args, specs_of(case, ("data",), None, None)[0])
    program = jax.jit(forms.op(case), out_shardings=NamedSharding(on, P("data", "model"))).lower(*args).compile()
    assert collectives(program.as_text()) == []
    assert_same([np.asarray(x) for x in program(*args)], [np.asarray(x) for x in outputs])


def test_the_gradient_of_a_packed_array_may_be_sharded_otherwise(on_the_host):
    """Each device makes all of its tokens' and keeps its part: what is done with it does not shard the packed array."""
    case = of_form({"packed": True}, WIDE)
    args, cotangents, *_ = on_one_device(case)

    def gradient(qkv, *rest):
        return gradients(forms.op(case), of=1, arguments=5)(2 * qkv, *rest)[0]

    want = jax.jit(gradient)(*args, *cotangents)
    on = mesh(data=4, model=2)
    arg_specs, result_specs = specs_of(case, ("data",), None, None)
    args, cotangents = put(on, args, arg_specs), put(on, cotangents, result_specs)
    sharded = jax.jit(gradient, out_shardings=NamedSharding(on, P("data", "model")))
    got, found = compiled(sharded, [*args, *cotangents])
    assert found == []
    assert_agree([got], [want])


PACKED_AXIS = (
    "qkv must hold its last axis whole on each device, got it over 2 devices: its parts don't end where shards do. "
    "Shard its leading axes, pass {}, k and v as a tuple, or call inside jax.shard_map with each device's heads packed "
    "for it."
)


@pytest.mark.parametrize("gate", ["copied", None])
@pytest.mark.parametrize("mode", MODES)
def test_a_sharded_packed_axis(on_the_host, mode, gate):
    """Refused where it is known; where the compiler chooses, gathered."""
    case = of_form({"packed": True, "gate": gate}, WIDE)
    message = PACKED_AXIS.format("q_gate" if gate else "q")
    args, cotangents, outputs, gradients = on_one_device(case)
    with mesh_of({"data": 4, "model": 2}, mode) as on:
        args = put(on, args, [("data", "model"), (), (), (), ("data",)])
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            forms.op(case)(*args)
        if mode.startswith("explicit"):
            with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
                jax.jit(forms.op(case))(*args)
            return
        got, found = compiled(forms.op(case), args)
        assert found
        assert_same([np.asarray(x) for x in got], [np.asarray(x) for x in outputs])
        cotangents = put(on, cotangents, [("data", "model")] * len(outputs))
        got, _ = compiled(lambda *args: vjp(forms.op(case), args[:5], args[5:]), [*args, *cotangents], quick_jit)
        assert_agree(got, gradients)


def test_lanes_of_a_head_across_devices_are_refused(on_the_host):
    case = WIDE
    args = shaped(case, inputs_of(case), (16,), split=True)
    message = (
        "k must hold whole heads on each device, got head_dim over 2 devices. "
        "Shard the axis of heads instead, or leave it replicated there."
    )
    with mesh_of({"data": 4, "model": 2}, "explicit, set_mesh") as on:
        heads = ("data", "model", None)
        args = put(on, args, [heads, ("data", None, "model"), (), (), (), ("data",)])
        for function in (forms.op(case), jax.jit(forms.op(case))):
            with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
                function(*args)


def test_the_forms_are_all_there():
    forms_there = itertools.product(("copied", "in_place", None), (False, True), (False, True))
    cases = [PLAIN, *map(of_form, FORMS.values())]
    assert {(case.gate, case.packed, case.gathered) for case in cases} == set(forms_there)
