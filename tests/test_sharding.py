"""Eight devices of the host: the bits of one device, and which collectives the compiled programs hold."""

import dataclasses
import functools
import re

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_qk import _partition
from pallas_qk._options import Options
from pallas_qk._rows import Call, Inputs, Outputs
from tests import forms
from tests.cases import Case, make_cotangents, make_inputs
from tests.compare import assert_same
from tests.devices import MODES, assert_only_weight_sums, collectives, compiled, mesh, mesh_of, put
from tests.forms import op
from tests.gradients import assert_agree, gradients
from tests.lowering import FIRST, GPU_IMPLEMENTATIONS, kernels, lowered_text
from tests.run import quick_jit

pytestmark = pytest.mark.usefixtures("on_the_host")

weighted = functools.partial(gradients, of=4)  # the gradients of what weights' are summed with: no table's

CASE = Case(16, 8, 2, head_dim=16, rotary_dim=8, max_position=64)


def batch_of(case, size):
    """Arguments and cotangents with a leading axis over activations, and the vmapped op."""
    each = [list(make_inputs(case, seed)) for seed in range(size)]
    q_gate, k, positions = (jnp.stack([inputs[i] for inputs in each]) for i in (0, 1, 5))
    cotangents = [jnp.stack(x) for x in zip(*(make_cotangents(case, seed) for seed in range(size)), strict=True)]
    return [q_gate, k, *each[0][2:5], positions], cotangents, jax.vmap(op(case), (0, 0, None, None, None, 0))


def check(function, args, cotangents, specs, want, want_gradients, on, most=2):
    """Forward and backward, with activations and outputs laid out by `specs` (tokens and heads of q, of k)."""
    q, k, positions = specs
    args = put(on, args, (q, k, (), (), (), positions))
    cotangents = put(on, cotangents, (q, k, q))
    got, found = compiled(function, args)
    assert found == []
    assert_same(got, want)
    for x, spec in zip(got, (q, k, q), strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(on, P(*spec)), x.ndim), x.sharding
    got, found = compiled(weighted(function), [*args, *cotangents], quick_jit)
    assert_only_weight_sums(found, CASE.head_dim, most)
    assert_agree(got, want_gradients)
    for x, spec in zip(got, (q, k, (), ()), strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(on, P(*spec)), x.ndim), x.sharding


@functools.cache
def on_one_device(case=CASE):
    inputs, cotangents = list(make_inputs(case)), make_cotangents(case)
    outputs = jax.jit(op(case))(*inputs)
    return inputs, cotangents, outputs, quick_jit(weighted(op(case)))(*inputs, *cotangents)


@functools.cache
def batch_on_one_device(case=CASE, size=4):
    inputs, cotangents, mapped = batch_of(case, size)
    return inputs, cotangents, jax.jit(mapped)(*inputs), quick_jit(weighted(mapped))(*inputs, *cotangents), mapped


FLAT = {  # mesh, then the axes of tokens, of q's heads and of k's
    "(8,1)": ({"data": 8, "model": 1}, "data", "model", "model"),
    "(4,2)": ({"data": 4, "model": 2}, "data", "model", "model"),
    "(4,2), k replicated": ({"data": 4, "model": 2}, "data", "model", None),
    "(1,8), k replicated": ({"data": 1, "model": 8}, "data", "model", None),
    "tokens over both": ({"data": 4, "model": 2}, ("data", "model"), None, None),
    "heads over both, k replicated": ({"data": 4, "model": 2}, None, ("model", "data"), None),
    "heads over a part, three axes": ({"a": 2, "b": 2, "c": 2}, ("c",), ("a", "b"), "a"),
}
TWO_MODES = ("auto", "explicit, set_mesh")  # which differ most; each case takes seconds to compile


def thinned(layouts):
    """(layout, mode): every layout in two modes, and one in each."""
    return [(x, mode) for place, x in enumerate(layouts) for mode in (MODES if place == 1 else TWO_MODES)]


@pytest.mark.parametrize("layout, mode", thinned(FLAT))
def test_tokens_and_heads(layout, mode):
    axes, tokens, q_heads, k_heads = FLAT[layout]
    inputs, cotangents, outputs, grads = on_one_device()
    with mesh_of(axes, mode) as on:
        specs = (tokens, q_heads), (tokens, k_heads), (tokens,)
        check(op(CASE), inputs, cotangents, specs, outputs, grads, on)


BATCHED = {
    "batch on data, sequence on another axis": ("data", "seq", None),
    "unbatched axis unsharded, tokens sharded": (None, "seq", None),
    "tokens on data, heads on the other": (None, "data", "seq"),
    "batch on data, heads on the other": ("data", None, "seq"),
}


@pytest.mark.parametrize("layout, mode", thinned(BATCHED))
def test_vmap(layout, mode):
    batch, tokens, heads = BATCHED[layout]
    inputs, cotangents, outputs, grads, mapped = batch_on_one_device()
    with mesh_of({"data": 4, "seq": 2}, mode) as on:
        specs = (batch, tokens, heads), (batch, tokens, None), (batch, tokens)
        check(mapped, inputs, cotangents, specs, outputs, grads, on)


@pytest.mark.parametrize(
    "changes", [{"dtype": "float32", "norm_beta": 1.0}, {"rotation": "pairs", "round_norm": False}], ids=str
)
def test_mrope_and_options(changes):
    case = dataclasses.replace(CASE, mrope_section=(2, 1, 1), weight_dtype="float32", num_kv_heads=4, **changes)
    inputs, cotangents, outputs, _ = on_one_device(case)
    on = mesh(data=4, model=2)
    args = put(on, inputs, (("data", "model"), ("data", "model"), (), (), (), (None, "data")))
    got, found = compiled(op(case), args)
    assert found == []
    assert_same(got, outputs)
    got, found = compiled(weighted(op(case)), [*args, *put(on, cotangents, [("data", "model")] * 3)], quick_jit)
    assert_only_weight_sums(found, CASE.head_dim)
    want = quick_jit(weighted(op(case)))(*inputs, *cotangents)
    assert_agree(got, want)


@pytest.mark.parametrize("tokens", ["model", None, ("data", "model")], ids=str)
def test_positions_sharded_otherwise_still_give_the_right_result(tokens):
    """Shardy leaves such conflicts to the op: it moves positions, never activations."""
    inputs, cotangents, outputs, grads = on_one_device()
    on = mesh(data=4, model=2)
    layout = (("data", "model"), ("data", "model"), (), (), (), (tokens,))
    args = put(on, inputs, layout)
    got, _ = compiled(op(CASE), args)
    assert_same(got, outputs)
    got, _ = compiled(weighted(op(CASE)), [*args, *put(on, cotangents, [("data", "model")] * 3)], quick_jit)
    assert_agree(got, grads)


@pytest.mark.parametrize(
    "q, k",
    [((None, "model"), ("model", None)), (("model", None), (None, "model"))],
    ids=["q over heads", "q over tokens"],
)
def test_q_and_k_that_share_an_axis_otherwise(q, k):
    case = dataclasses.replace(CASE, num_kv_heads=8)
    inputs, cotangents, outputs, grads = on_one_device(case)
    on = mesh(model=8)
    args = put(on, inputs, (q, k, (), (), (), ()))
    got, _ = compiled(op(case), args)
    assert_same(got, outputs)
    got, _ = compiled(weighted(op(case)), [*args, *put(on, cotangents, (q, k, q))], quick_jit)
    assert_agree(got, grads)


def test_tokens_that_do_not_divide():
    """XLA pads an uneven axis; the rows that pad it must not count in the weights' gradients, here cos(0) = 1."""
    case = dataclasses.replace(CASE, num_tokens=10, dtype="float32")
    inputs = list(make_inputs(case))

    def loss(q_gate, k, *rest, constrain=lambda x: x):
        q_gate, k = jnp.cos(constrain(q_gate)), jnp.cos(constrain(k))
        return sum(jnp.sum(out + jnp.sin(out)) for out in op(case)(q_gate, k, *rest))

    sharded = NamedSharding(mesh(data=8), P("data"))
    constrain = functools.partial(lax.with_sharding_constraint, shardings=sharded)
    argnums = (0, 1, 2, 3)
    got, _ = compiled(jax.grad(functools.partial(loss, constrain=constrain), argnums), inputs, quick_jit)
    assert_agree(got, quick_jit(jax.grad(loss, argnums))(*inputs))


def test_a_sharded_weight_is_gathered_alone():
    """What holds for its lanes says nothing of the other weight's, nor of the gradients'."""
    inputs, cotangents, outputs, grads = on_one_device()
    on = mesh(data=8)
    activation = ("data",)
    args = put(on, inputs, (activation, activation, ("data",), (), (), activation))

    def made(q_gate, k, q_weight, k_weight, *rest):
        return op(CASE)(q_gate, k, q_weight, k_weight @ jnp.eye(16, dtype=k_weight.dtype), *rest)

    got, found = compiled(made, args)
    assert len(found) == 1 and found[0].startswith("all-gather")
    assert_same(got, outputs)
    args = put(on, inputs, (activation, activation, (), (), (), activation))
    one_sharded = jax.jit(lambda *args: weighted(made)(*args)[2:], out_shardings=(NamedSharding(on, P("data")), None))
    got, found = compiled(one_sharded, [*args, *put(on, cotangents, [activation] * 3)])
    assert_only_weight_sums(found, CASE.head_dim)
    assert_agree(got, grads[2:])


def test_two_kv_heads_shared_by_eight_devices():
    """As attention asks for them, each kv head with its four query heads: two parts of an axis of eight devices."""
    inputs, *_ = on_one_device()
    on = mesh(model=8)
    args = put(on, inputs, ((None, "model"), (), (), (), (), ()))

    def scores(q_gate, k, *rest):
        k = k @ jnp.eye(k.shape[-1], dtype=k.dtype)  # no input: the compiler chooses how it lies
        q, k, _ = op(CASE)(q_gate, k, *rest)
        q, k = q.reshape(16, 2, 4, 16), k.reshape(16, 2, 1, 16)
        return jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32), axis=-1).reshape(16, 8)

    sharded = jax.jit(scores, out_shardings=NamedSharding(on, P(None, "model")))
    program = sharded.lower(*args).compile()
    assert collectives(program.as_text()) == []
    np.testing.assert_allclose(program(*args), jax.jit(scores)(*inputs), rtol=1e-5, atol=1e-5)


WHOLE_HEADS = {
    "k": (CASE, (None, None), (None, "model"), "k must hold whole heads on each device, got num_kv_heads=2 over 8"),
    "q_gate": (
        dataclasses.replace(CASE, num_q_heads=12),
        (None, "model"),
        (),
        "q_gate must hold whole heads on each device, got num_q_heads=12 over 8",
    ),
}


@pytest.mark.parametrize("name", WHOLE_HEADS)
@pytest.mark.parametrize("mode", MODES)
def test_a_head_cut_across_devices_is_refused(name, mode):
    """With both numbers and the remedy: at once where the sharding is known, else when the compiler has chosen it."""
    case, q, k, message = WHOLE_HEADS[name]
    heads = {"k": 2, "q_gate": 12}[name]
    message += (
        f" devices. Shard its last axis over a number of devices that divides {heads}, or leave it replicated there."
    )
    with mesh_of({"model": 8}, mode) as on:
        args = put(on, make_inputs(case), (q, k, (), (), (), ()))
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            op(case)(*args)  # arrays know their sharding
        error = ValueError if mode.startswith("explicit") else jax.errors.JaxRuntimeError
        with pytest.raises(error, match=re.escape(message)):
            jax.jit(op(case))(*args)


def refused(name, type_):
    message = (
        f"{name} must be neither reduced nor unreduced over mesh axes, got {type_}. "
        "Pass it through jax.sharding.reshard before, or in shard_map through jax.lax.pcast or, unreduced, psum."
    )
    return pytest.raises(ValueError, match=f"^{re.escape(message)}")


def test_reduced_and_unreduced_arrays_are_refused():
    """As jnp refuses such products: the first would fail in its gradient, the second lacks a sum."""
    names = ("q_gate", "k", "q_weight", "k_weight", "cos_sin_cache")
    with jax.set_mesh(mesh(AxisType.Explicit, data=8)):
        inputs = [jax.sharding.reshard(x, P()) for x in make_inputs(CASE)]
        for index, (name, x) in enumerate(zip(names, inputs, strict=False)):
            reduced = jax.jit(lambda x: jax.sharding.reshard(x, P(reduced={"data"})))(x)
            given = [*inputs[:index], reduced, *inputs[index + 1 :]]
            for function in (op(CASE), jax.jit(op(CASE))):
                with refused(name, f"{x.dtype}[{','.join(map(str, x.shape))}]{{R:data}}"):
                    function(*given)
        ones = jax.sharding.reshard(jnp.ones((16, 8), CASE.dtype), P(None, "data"))
        rows = jax.sharding.reshard(jnp.ones((8, 256), CASE.dtype), P("data"))
        unreduced = jax.jit(lambda a, b: jnp.dot(a, b, out_sharding=P(unreduced={"data"})))(ones, rows)
        with refused("q_gate", "bfloat16[16,256]{U:data}"):
            op(CASE)(unreduced, *inputs[1:])


def test_reduced_and_unreduced_arrays_in_shard_map_are_refused():
    inputs, _, outputs, _ = on_one_device()
    casts = {"R": ["reduced"], "U": ["varying", "unreduced"], "V": ["varying"]}

    def function(*inputs, kinds):
        q_weight = functools.reduce(lambda x, to: lax.pcast(x, "data", to=to), kinds, inputs[2])
        return op(CASE)(*inputs[:2], q_weight, *inputs[3:])

    tokens = P("data")
    for letter, kinds in casts.items():
        mapped = jax.shard_map(
            functools.partial(function, kinds=kinds),
            mesh=mesh(data=8),
            in_specs=(tokens, tokens, P(), P(), P(), tokens),
            out_specs=tokens,
        )
        if letter == "V":
            assert_same(jax.jit(mapped)(*inputs), outputs)
        else:
            with refused("q_weight", f"bfloat16[16]{{{letter}:data}}"):
                jax.jit(mapped)(*inputs)


SHARD_MAP = {
    "tokens and heads": ("data", "model", "model"),
    "k replicated": ("data", "model", None),
    "heads alone, k replicated": (None, "model", None),
    "tokens over both": (("data", "model"), None, None),
}


def shard_mapped(layout, on, implementation=None, check_vma=True):
    tokens, q_heads, k_heads = SHARD_MAP[layout]
    static = {"num_q_heads": 8 // (2 if q_heads else 1), "num_kv_heads": 2 // (2 if k_heads else 1)}
    specs = P(tokens, q_heads), P(tokens, k_heads), P(tokens)
    return specs, jax.shard_map(
        op(CASE, implementation, **static),
        mesh=on,
        in_specs=(*specs[:2], P(), P(), P(), specs[2]),
        out_specs=(*specs[:2], specs[0]),
        check_vma=check_vma,
    )


@pytest.mark.parametrize("layout", SHARD_MAP)
def test_shard_map(layout):
    """With the check of varying axes: replicated weights beside sharded activations."""
    inputs, cotangents, outputs, grads = on_one_device()
    on = mesh(data=4, model=2)
    _, function = shard_mapped(layout, on)
    got, found = compiled(function, inputs)
    assert found == []
    assert_same(got, outputs)
    got, found = compiled(weighted(function), [*inputs, *cotangents], quick_jit)
    assert_only_weight_sums(found, CASE.head_dim)
    assert_agree(got, grads)
    assert_same(function(*inputs), outputs)  # eagerly


@pytest.mark.parametrize("layout", SHARD_MAP)
def test_gradients_inside_shard_map(layout):
    """Summed over exactly the axes that the activations vary along, so that they may leave as replicated."""
    inputs, cotangents, _, grads = on_one_device()
    on = mesh(data=4, model=2)
    (q, k, tokens), _ = shard_mapped(layout, on)
    static = {"num_q_heads": 8 // (2 if q[1] else 1), "num_kv_heads": 2 // (2 if k[1] else 1)}
    inside = jax.shard_map(
        weighted(op(CASE, **static)),
        mesh=on,
        in_specs=(q, k, P(), P(), P(), tokens, q, k, q),
        out_specs=(q, k, P(), P()),
    )
    got, found = compiled(inside, [*inputs, *cotangents], quick_jit)
    assert_only_weight_sums(found, CASE.head_dim)
    assert_agree(got, grads)


FLOAT32 = dataclasses.replace(CASE, dtype="float32")


def further_derivatives(function):
    """The table's gradient, forward mode and the gradient of a gradient, as a function of the op's arguments."""

    def loss(positions, *floats):
        return sum(jnp.sum(jnp.sin(out)) for out in function(*floats, positions))

    def run(*args):
        floats, positions = args[:5], args[5]
        table = jax.grad(loss, 5)(positions, *floats)
        _, moved = jax.jvp(lambda *floats: function(*floats, positions), floats, tuple(map(jnp.cos, floats)))
        first = jax.grad(loss, (1, 2, 3, 4))
        second = jax.grad(lambda *floats: sum(jnp.sum(jnp.sin(g)) for g in first(positions, *floats)), (0, 1, 2, 3, 4))
        return table, *moved, *second(*floats)

    return run


@pytest.mark.parametrize("mode", [*TWO_MODES, "shard_map"])
def test_further_derivatives(mode):
    inputs = list(make_inputs(FLOAT32))
    want = quick_jit(further_derivatives(op(FLOAT32)))(*inputs)
    with mesh_of({"data": 4, "model": 2}, mode if mode in MODES else "auto") as on:
        args = put(on, inputs, (("data", "model"), ("data", "model"), (), (), (), ("data",)))
        function = op(FLOAT32) if mode in MODES else shard_mapped("tokens and heads", on)[1]
        got = quick_jit(further_derivatives(function))(*args)
    for a, b in zip(got, want, strict=True):  # sums in another order, twice
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


@pytest.mark.parametrize("mode", TWO_MODES)
def test_gradients_of_each_example(mode):
    """A weight's are sharded like the batch: sums over the tokens of each example on its own devices, no gather."""
    inputs, cotangents, *_ = batch_on_one_device()

    def each(*args):
        axes = (0, 0, None, None, None, 0, 0, 0, 0)
        return jax.vmap(weighted(op(CASE)), axes)(*args)

    want = quick_jit(each)(*inputs, *cotangents)
    with mesh_of({"data": 4, "seq": 2}, mode) as on:
        layout = ("data", "seq", None)
        args = put(on, inputs, (layout, layout, (), (), (), ("data", "seq")))
        got, found = compiled(each, [*args, *put(on, cotangents, [layout] * 3)], quick_jit)
    assert [re.sub(r"\{[\d,]*\}", "", x) for x in found] == ["all-reduce (f32[1,16], f32[1,16])"]
    for x, spec in zip(got, (layout, layout, ("data",), ("data",)), strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(on, P(*spec)), x.ndim), x.sharding
    assert_agree(got, want)


PARTLY_MAPPED = {  # what is mapped, and whether the cotangents are
    "q": ((0, None, None, None, None, None), None),
    "positions": ((None, None, None, None, None, 0), None),
    "cotangents": ((None,) * 6, 0),
}


@pytest.mark.parametrize("mapped", PARTLY_MAPPED)
def test_what_is_not_mapped_follows_a_sharded_batch(mapped):
    """With explicit axes results are sharded like the batch, whichever array brings it; weights may lie on no mesh."""
    batch, batch_cotangents, *_ = batch_on_one_device()
    one, one_cotangents, *_ = on_one_device()
    axes, of_cotangents = PARTLY_MAPPED[mapped]
    args = [x if axis is None else y for x, y, axis in zip(one, batch, axes, strict=True)]
    args += one_cotangents if of_cotangents is None else batch_cotangents

    def both(*args):
        return *op(CASE)(*args[:6]), *weighted(op(CASE))(*args)

    each = jax.vmap(both, (*axes, *[of_cotangents] * 3))
    want = jax.jit(each)(*args)
    with mesh_of({"data": 4, "seq": 2}, "explicit, set_mesh") as on:
        specs = [() if axis is None else ("data",) for axis in (*axes, *[of_cotangents] * 3)]
        args = put(on, args, specs)
        args[2:4] = map(np.asarray, args[2:4])
        got, found = compiled(each, args)
    assert found == []
    for x in got[3:] if mapped == "cotangents" else got:
        assert x.sharding.is_equivalent_to(NamedSharding(on, P("data")), x.ndim), x.sharding
    assert_agree(got, want)


@pytest.mark.parametrize("mapped", ["weights", "table", "everything"])
def test_mapped_weights_or_a_mapped_table_over_a_sharded_batch(mapped):
    """A call for each example needs the whole batch on each device; the results are sharded like the batch again."""
    (one, cotangents, *_), (batch, *_) = on_one_device(), batch_on_one_device()
    several = [jnp.stack([x + size / 8 for size in range(4)]) for x in one[2:5]]
    batched = {"weights": (2, 3), "table": (4,), "everything": range(6)}[mapped]
    axes = [0 if i in batched else None for i in range(6)]
    args = [x if axis is None else y for x, y, axis in zip(one, [*batch[:2], *several, batch[5]], axes, strict=True)]

    def both(*args):
        return *op(CASE)(*args), *weighted(op(CASE))(*args, *cotangents)

    each = jax.vmap(both, axes)
    want = jax.jit(each)(*args)
    with mesh_of({"data": 4, "seq": 2}, "explicit, set_mesh") as on:
        got = jax.jit(each)(*put(on, args, [() if axis is None else ("data",) for axis in axes]))
    for x in got:
        assert x.sharding.is_equivalent_to(NamedSharding(on, P("data")), x.ndim), x.sharding
    assert_same(got[:3], want[:3])
    assert_agree(got[3:], want[3:])


def test_further_derivatives_of_each_example():
    inputs, *_ = batch_of(FLOAT32, 4)
    each = jax.vmap(further_derivatives(op(FLOAT32)), (0, 0, None, None, None, 0))
    want = jax.jit(each)(*inputs)
    with mesh_of({"data": 4, "seq": 2}, "explicit, set_mesh") as on:
        args = put(on, inputs, [("data",), ("data",), (), (), (), ("data",)])
        got, found = compiled(each, args)
    assert found == []
    for a, b in zip(got, want, strict=True):
        assert a.sharding.is_equivalent_to(NamedSharding(on, P("data")), a.ndim), a.sharding
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_shard_map_without_the_check():
    inputs, cotangents, outputs, grads = on_one_device()
    _, function = shard_mapped("tokens and heads", mesh(data=4, model=2), check_vma=False)
    got, found = compiled(function, inputs)
    assert found == []
    assert_same(got, outputs)
    got, _ = compiled(weighted(function), [*inputs, *cotangents], quick_jit)
    assert_agree(got[:2], grads[:2])
    for a, b in zip(got[2:], grads[2:], strict=True):  # shard_map sums what each device has rounded to bfloat16
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=2.0**-6 * np.abs(b).max())


def test_shard_map_in_shard_map():
    inputs, _, outputs, _ = on_one_device()
    on = mesh(data=4, model=2)
    inner = jax.shard_map(
        op(CASE, num_q_heads=4, num_kv_heads=1),
        in_specs=(P(None, "model"), P(None, "model"), P(), P(), P(), P()),
        out_specs=P(None, "model"),
        axis_names={"model"},
    )
    outer = jax.shard_map(
        inner,
        mesh=on,
        in_specs=(P("data"), P("data"), P(), P(), P(), P("data")),
        out_specs=P("data"),
        axis_names={"data"},
    )
    got, found = compiled(outer, inputs)
    assert found == []
    assert_same(got, outputs)


def test_shard_map_over_a_part_of_the_axes_is_refused():
    message = (
        "inside shard_map every axis of the mesh must be manual, got axes ('model',) that are not. "
        "Leave its axis_names out, or call the op in a second shard_map over these axes."
    )
    tokens = P("data")
    partly = jax.shard_map(
        op(CASE),
        mesh=mesh(data=4, model=2),
        in_specs=(tokens, tokens, P(), P(), P(), tokens),
        out_specs=tokens,
        axis_names={"data"},
    )
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
        jax.jit(partly)(*make_inputs(CASE))
    whole = jax.shard_map(  # an axis of one device may stay
        op(CASE),
        mesh=mesh(data=8, model=1),
        in_specs=(tokens, tokens, P(), P(), P(), tokens),
        out_specs=tokens,
        axis_names={"data"},
    )
    assert_same(jax.jit(whole)(*make_inputs(CASE)), on_one_device()[2])


def collective_operations(text: str) -> list[str]:
    """Of a lowered program."""
    names = "all_gather|all_reduce|all_to_all|collective_permute|collective_broadcast|reduce_scatter"
    return re.findall(rf"stablehlo\.({names})\b", text)


@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_gpu_kernels_in_shard_map(name):
    inputs, cotangents, *_ = on_one_device()
    _, function = shard_mapped("k replicated", mesh(data=4, model=2), name)
    text = lowered_text(function, *inputs)
    assert kernels(text).count(f"pallas_qk_{name}_forward") == 1 and collective_operations(text) == []
    text = lowered_text(weighted(function), *inputs, *cotangents)
    assert kernels(text).count(f"pallas_qk_{name}_backward") == 1
    assert collective_operations(text) == ["all_reduce"] * 2


@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("direction, sums", [("forward", []), ("backward", ["all_reduce"] * 2)])
def test_gpu_kernels_in_what_the_compiler_partitions(name, direction, sums):
    """What its partitioner is told that each device computes, lowered for CUDA; its custom call shows nothing."""
    on = mesh(data=4, model=2)
    inputs, cotangents, *_ = on_one_device()
    args = [*inputs[:5], inputs[5][None], *(cotangents if direction == "backward" else ())]
    activation = ("data", "model")
    args = put(on, args, [activation, activation, (), (), (), (None, "data"), *[activation] * 3][: len(args)])
    call = Call(Options(CASE.rotary_dim, CASE.eps), name)
    trees = (Inputs(*args[:6]), *([Outputs(args[6], args[7], gate=args[8])] if direction == "backward" else []))
    tree = jax.tree.structure(trees)
    refined, one_device, results, operands = _partition.partition(direction, call, tree, on, args, None)
    assert operands[0].shard_shape(args[0].shape) == (4, 4 * 2 * 16)
    manual = jax.shard_map(
        one_device,
        mesh=refined,
        in_specs=tuple(x.spec for x in operands),
        out_specs=[x.spec for x in results],
        check_vma=False,
    )
    text = lowered_text(manual, *args)
    assert kernels(text).count(f"pallas_qk_{name}_{direction}") == 1
    assert collective_operations(text) == sums


PLATFORMS = ("tpu", "rocm")  # on which only plain XLA can run; TPUs have no call of the partitioner


def exported(function, args, platform):
    """As a program for `platform`, to be run here: nothing of its text belongs to one."""
    checks = [jax.export.DisabledSafetyCheck.platform()]
    return jax.export.export(jax.jit(function), platforms=(platform,), disabled_checks=checks)(*args)


@pytest.mark.parametrize(
    "mode, packed, platform",  # any two together
    [
        ("auto", False, "tpu"),
        ("explicit", False, "tpu"),
        ("explicit, set_mesh", True, "tpu"),
        ("auto", True, "rocm"),
        ("explicit", True, "rocm"),
        ("explicit, set_mesh", False, "rocm"),
    ],
)
def test_platforms_that_partition_plain_xla_themselves(platform, packed, mode):
    """No custom call, the values and the collectives of other platforms."""
    case = dataclasses.replace(CASE, packed=packed)
    args, cotangents = forms.arguments(case, make_inputs(case)), forms.cotangents_of(case)
    num_floats = 3 if packed else 4
    derivative = gradients(op(case), of=num_floats, arguments=num_floats + 2)
    want, want_gradients = jax.jit(op(case))(*args), quick_jit(derivative)(*args, *cotangents)
    with mesh_of({"data": 4, "model": 2}, mode) as on:
        heads = None if packed else "model"
        activations = ("data", heads)
        specs = [*[activations] * (num_floats - 2), (), (), (), ("data",)]
        args = put(on, args, specs)
        program = exported(op(case), args, platform)
        assert "custom_call" not in program.mlir_module()
        got, found = compiled(program.call, args)
        assert found == []
        assert_same(got, want)
        args += put(on, cotangents, [activations] * len(cotangents))
        program = exported(derivative, args, platform)
        assert "custom_call" not in program.mlir_module()
        got, found = compiled(program.call, args, quick_jit)
        assert_only_weight_sums(found, CASE.head_dim)
        assert_agree(got, want_gradients)


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_a_gpu_kernel_by_name_is_refused_for_other_platforms(name, platform):
    args = put(mesh(data=8), make_inputs(CASE), (("data",), ("data",), (), (), (), ("data",)))
    message = (
        f"implementation='{name}' must run on an NVIDIA GPU, got platform {platform}. "
        "Leave implementation out, or pass 'xla'."
    )
    function = op(CASE, name)
    for traced in (
        jax.jit(function).trace(*args),
        jax.jit(weighted(function)).trace(*args, *make_cotangents(CASE)),
    ):
        with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
            traced.lower(lowering_platforms=(platform,))


@pytest.fixture
def without_shardy():
    before = jax.config.jax_use_shardy_partitioner
    jax.config.update("jax_use_shardy_partitioner", False)
    yield
    jax.config.update("jax_use_shardy_partitioner", before)


@pytest.mark.parametrize("replicated", [False, True])
def test_several_devices_without_shardy_are_refused(without_shardy, replicated):
    """Here, before XLA is entered, which would end the process in some versions."""
    message = (
        "the op over several devices needs the Shardy partitioner, got 8 devices and jax_use_shardy_partitioner=False. "
        "Leave it on, as JAX does, or put the op inside jax.shard_map."
    )
    on, tokens = mesh(data=8), () if replicated else ("data",)
    args = put(on, make_inputs(CASE), (tokens, tokens, (), (), (), tokens))
    cotangents = put(on, make_cotangents(CASE), [tokens] * 3)
    for function, given in ((op(CASE), args), (weighted(op(CASE)), [*args, *cotangents])):
        for call in (function, jax.jit(function)):
            with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
                call(*given)


def test_what_needs_no_partitioner_runs_without_shardy(without_shardy):
    """One device, jax.shard_map, and platforms that partition plain XLA themselves."""
    inputs, _, outputs, _ = on_one_device()
    assert_same(jax.jit(op(CASE))(*inputs), outputs)
    _, function = shard_mapped("tokens and heads", mesh(data=4, model=2))
    assert_same(jax.jit(function)(*inputs), outputs)
    args = put(mesh(data=8), inputs, (("data",), ("data",), (), (), (), ("data",)))
    assert "custom_call" not in jax.jit(op(CASE)).trace(*args).lower(lowering_platforms=("tpu",)).as_text()


MANY = Case(2**28, 8, 1, head_dim=4, rotary_dim=4)  # 2^31 rows of q, over 8 devices 2^28 each
TOO_MANY = "can't run this: it counts rows (token, head) in 32 bits, up to"


def shapes_of(case, layouts):
    shapes = jax.eval_shape(lambda: list(make_inputs(case)))
    return [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(shapes, layouts, strict=True)]


@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_rows_are_those_of_one_device(name):
    """A name is refused for more rows than its kernel counts where one device would get them, and nowhere else."""
    on = mesh(data=8)
    layouts = [NamedSharding(on, P(*spec)) for spec in (("data",), ("data",), (), (), (), ("data",))]
    lowered_text(op(MANY, name), *shapes_of(MANY, layouts))  # what the compiler partitions
    with pytest.raises(NotImplementedError, match=f"^implementation='{name}' {re.escape(TOO_MANY)}"):
        lowered_text(op(MANY, name), *shapes_of(MANY, [None] * 6))

    def over_devices(case):
        specs = [layout.spec for layout in layouts]
        function = jax.shard_map(op(case, name), mesh=on, in_specs=tuple(specs), out_specs=P("data"))
        return lowered_text(function, *shapes_of(case, layouts))

    assert kernels(over_devices(MANY)).count(f"pallas_qk_{name}_forward") == 1
    with pytest.raises(NotImplementedError, match=f"^implementation='{name}' {re.escape(TOO_MANY)}"):
        over_devices(dataclasses.replace(MANY, num_tokens=2**31))


@pytest.mark.parametrize("name", [*GPU_IMPLEMENTATIONS, None])
@pytest.mark.parametrize("num_tokens", [2**28, 2**31])
def test_rows_of_one_device_of_those_that_the_compiler_partitions(name, num_tokens):
    """Its choice too: None takes the kernel where each device's part is small enough for it."""
    on, case = mesh(data=8), dataclasses.replace(MANY, num_tokens=num_tokens)
    args = shapes_of(case, [NamedSharding(on, P(*spec)) for spec in (("data",), ("data",), (), (), (), ("data",))])
    args[5] = jax.ShapeDtypeStruct((1, num_tokens), jnp.int32, sharding=NamedSharding(on, P(None, "data")))
    call, tree = Call(Options(case.rotary_dim, case.eps), name), jax.tree.structure((Inputs(*args),))
    refined, one_device, results, operands = _partition.partition("forward", call, tree, on, args, None)
    in_specs, out_specs = tuple(x.spec for x in operands), [x.spec for x in results]
    manual = jax.shard_map(one_device, mesh=refined, in_specs=in_specs, out_specs=out_specs, check_vma=False)
    if name and num_tokens == 2**31:
        with pytest.raises(NotImplementedError, match=f"^implementation='{name}' {re.escape(TOO_MANY)}"):
            lowered_text(manual, *args)
    else:
        found = kernels(lowered_text(manual, *args)).count(f"pallas_qk_{name or FIRST}_forward")
        assert found == (num_tokens == 2**28)


def test_the_list_of_collectives_sees_what_is_there():
    on = mesh(data=8)
    x = jax.device_put(jnp.ones((8, 8)), NamedSharding(on, P("data")))
    programs = {
        "all-gather": P(),
        "all-to-all": P(None, "data"),
    }
    for name, spec in programs.items():
        _, found = compiled(jax.jit(lambda x: x * 2, out_shardings=NamedSharding(on, spec)), [x])
        assert [line.split()[0] for line in found] == [name], found
    _, found = compiled(jnp.sum, [x])
    assert [line.split()[0] for line in found] == ["all-reduce"]
    shift = jax.shard_map(
        lambda x: lax.ppermute(x, "data", [(i, (i + 1) % 8) for i in range(8)]),
        mesh=on,
        in_specs=P("data"),
        out_specs=P("data"),
    )
    _, found = compiled(shift, [x])
    assert [line.split()[0] for line in found] == ["collective-permute"]
    asynchronous = (
        "  %ar = (f32[16]{0}, f32[16]{0}) all-reduce-start(f32[16]{0} %a, f32[16]{0} %b), to_apply=%add\n"
        "  %done = (f32[16]{0}, f32[16]{0}) all-reduce-done((f32[16]{0}, f32[16]{0}) %ar)\n"
        "  %rs = f32[2]{0} reduce-scatter(f32[16]{0} %a), dimensions={0}\n"
    )
    assert [line.split()[0] for line in collectives(asynchronous)] == ["all-reduce-start", "reduce-scatter"]


def test_gradients_inside_shard_map_with_weights_that_are_constants(on_the_host):
    """They know of no mesh, and their gradients vary over it."""
    case = Case(8, 4, 2, 64, 32, "float32")
    inputs = make_inputs(case)
    constants = [np.asarray(x) for x in list(inputs)[2:5]]

    def gradient(q_gate, k, positions):
        def loss(q_gate):
            outputs = op(case)(q_gate, k, *constants, positions)
            return sum((x**2).sum() for x in outputs)

        return jax.grad(loss)(q_gate)

    want = gradient(inputs.q_gate, inputs.k, inputs.positions)
    sharded = jax.jit(jax.shard_map(gradient, mesh=mesh(x=2), in_specs=P("x"), out_specs=P("x")))
    np.testing.assert_allclose(sharded(inputs.q_gate, inputs.k, inputs.positions), want, rtol=1e-6, atol=1e-6)
