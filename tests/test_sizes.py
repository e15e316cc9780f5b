"""Sizes that are left out, and positions and rows that broadcast: the call with everything spelt out, in bits."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_qk
from tests import cached, forms
from tests.cached import CachedCase
from tests.cases import Case, make_inputs
from tests.compare import assert_same
from tests.devices import mesh_of, put

SIZES = ("num_q_heads", "num_kv_heads", "head_dim", "rotary_dim")
CASES = (
    Case(6, 4, 2, 64, 32),
    Case(6, 1, 1, 64, 64, "float16"),
    Case(5, 3, 1, 16, 8, mrope_section=(2, 1, 1)),
    Case(5, 3, 2, 32, 0),
    Case(4, 3, 2, 32, 16, q_alone=True),
    Case(6, 4, 2, 64, 32, gate=None, separate_v=True),
    Case(1, 1, 2, 64, 32, gathered=True),
)


def left_out(case: Case, *names: str):
    """The public function without these sizes."""
    return forms.op(case, **dict.fromkeys(names))


def in_heads(case: Case, args: list) -> list:
    """The arrays of `forms.op`, those of rows with an axis of heads."""
    heads = {"q": case.num_q_heads, "k": case.num_kv_heads, "v": case.num_kv_heads}
    names = [name for name in forms.ARGUMENTS if getattr(forms.given(case), name)]
    return [x.reshape(len(x), heads[name], -1) if name in heads else x for name, x in zip(names, args, strict=True)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_any_size_may_be_left_out(case):
    args = forms.arguments(case, make_inputs(case))
    want = forms.op(case)(*args)
    for count in (1, 4):
        for names in itertools.combinations(SIZES, count):
            if (case.num_q_heads, case.num_kv_heads) == (1, 1) and {"num_q_heads", "num_kv_heads"} <= set(names):
                with pytest.raises(ValueError, match=r"^positions must have shape \(\)"):  # tokens read as heads
                    left_out(case, *names)(*args)
            else:
                assert_same(list(left_out(case, *names)(*args)), list(want))
            got = left_out(case, *names)(*in_heads(case, args))
            assert_same([x.reshape(y.shape) for x, y in zip(got, want, strict=True)], list(want))
            assert all(x.ndim == 3 for x in got)


@pytest.mark.parametrize("gate", ["copied", None])
@pytest.mark.parametrize("names", [("num_q_heads",), ("num_kv_heads",), ("num_kv_heads", "head_dim", "rotary_dim")])
def test_packed_arrays_need_one_number_of_heads(gate, names):
    case = Case(6, 4, 3, 64, 32, gate=gate, packed=True)
    args = forms.arguments(case, make_inputs(case))
    assert_same(list(left_out(case, *names)(*args)), list(forms.op(case)(*args)))
    call = CachedCase(case)
    found, wanted = (cached.op(call, **dict.fromkeys(x))(*cached.arguments(call)) for x in (names, ()))
    assert_same(jax.tree.leaves(found), jax.tree.leaves(wanted))
    message = "num_q_heads or num_kv_heads must be given with packed qkv, got neither. Pass one: the other follows."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        left_out(case, "num_q_heads", "num_kv_heads")(*args)


def test_positions_with_an_axis_too_many_are_seen_where_tokens_are_as_many_as_heads():
    case = Case(4, 4, 4, 64, 32, gate=None)
    q, k, *others, positions = in_heads(case, forms.arguments(case, make_inputs(case)))
    for wrong in (positions[None], jnp.zeros((4, 4), jnp.int32)):
        with pytest.raises(ValueError, match=r"^positions must have shape \(4,\)"):
            left_out(case, *SIZES)(q, k, *others, wrong)


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("lead", [(), (3,)], ids=["broadcast", "given"])
def test_a_single_flat_head_beside_slots(length, lead):
    """Slots say which axes are the tokens', also where a sequence has one."""
    case = Case(3 * length, 1, 1, 64, 32, gate=None)
    inputs, cache = make_inputs(case), jnp.zeros((3, length, 1, 64), case.dtype)
    q, k = (x.reshape(3, length, 64) for x in (forms.split_gates(case, inputs.q_gate)[0], inputs.k))
    positions = jnp.broadcast_to(jnp.arange(length), (*lead, length))
    outputs = pallas_qk.fused_qkv_rmsnorm_rope_cache(
        (q, k, k),
        inputs.q_weight,
        inputs.k_weight,
        inputs.cos_sin_cache,
        positions,
        (cache, cache),
        jnp.arange(3 * length).reshape(3, length),
        **case.static_arguments,
    )
    want = forms.op(case)(q, k, *list(inputs)[2:5], jnp.broadcast_to(jnp.arange(length), (3, length)))
    assert_same([outputs.q, outputs.kv_cache[0].reshape(want[1].shape)], list(want))


def test_several_heads_of_k_tell_a_single_flat_head():
    case = Case(5, 1, 2, 64, 32)
    q_gate, k, *others, _ = forms.arguments(case, make_inputs(case))
    want = forms.op(case)(q_gate, k, *others, jnp.full(5, 7, jnp.int32))
    got = forms.op(case)(q_gate[:, None], k[:, None], *others, jnp.full(1, 7, jnp.int32))
    assert_same([x[:, 0] for x in got], list(want))


BATCH = 3


@pytest.mark.parametrize("case", [CASES[0], CASES[2], CASES[6]], ids=lambda case: case.id)
@pytest.mark.parametrize("lead", [(), (1,)], ids=["sequence", "1, sequence"])
def test_positions_and_rows_broadcast(case, lead):
    """Over a batch, forwards and in the gradient of the rows; in jit and out of it."""
    case = Case(**vars(case) | {"num_tokens": 4, "num_q_heads": 2, "dtype": "float32"})
    names = [name for name in forms.ARGUMENTS if getattr(forms.given(case), name)]
    args = dict(zip(names, forms.arguments(case, make_inputs(case)), strict=True))
    batch = args | {name: jnp.stack([args[name], 2 * args[name], -args[name]]) for name in {"q", "k"} & args.keys()}
    shared = "cos_sin_cache" if case.gathered else "positions"
    axis = 1 if case.mrope_section else 0
    x = args[shared]
    short, full = (x.reshape(*x.shape[:axis], *n, *x.shape[axis:]) for n in (lead, (1,)))
    full = jnp.broadcast_to(full, (*x.shape[:axis], BATCH, *x.shape[axis:]))
    op = forms.op(case)
    want = op(*(batch | {shared: full}).values())
    for function in (op, jax.jit(lambda *args: op(*args)), left_out(case, *SIZES)):
        assert_same(list(function(*(batch | {shared: short}).values())), list(want))
    if case.gathered:

        def loss(rows):
            return sum((y**2).sum() for y in op(*(batch | {shared: rows}).values()))

        summed = jax.grad(loss)(full).sum(axis=0).reshape(short.shape)
        np.testing.assert_allclose(jax.grad(loss)(short), summed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["auto", "explicit, set_mesh"])
def test_broadcast_over_a_sharded_batch(on_the_host, mode):
    case = CASES[0]
    q, k, *weights, table, positions = forms.arguments(case, make_inputs(case))
    q, k = (jnp.stack([x, 2 * x]) for x in (q, k))
    want = forms.op(case)(q, k, *weights, table, positions)
    with mesh_of({"x": 2}, mode) as on:
        args = put(on, [q, k, *weights, table, positions], [("x",), ("x",), (), (), (), ()])
        op = left_out(case, *SIZES)
        assert_same(list(jax.jit(lambda *args: op(*args))(*args)), list(want))


Q_GATE = (
    "q_gate must have shape (..., num_q_heads * 128) or (..., num_q_heads, 128), got {}. "
    "Its sizes: num_q_heads, 2 * head_dim, as one axis or two; head_dim = 64."
)
TABLE = (
    "cos_sin_cache must have rows of a positive even length <= head_dim = 64, got shape {}. "
    "Make it for heads of this size: pallas_qk.rope.inv_frequencies takes head_dim=64."
)
BAD: dict[str, tuple[dict, type[Exception], str]] = {
    "no weights": (
        {"q_weight": None, "k_weight": None, "head_dim": None},
        ValueError,
        "head_dim must be given without weights, got None. Pass the number of elements of a head.",
    ),
    "no array": (
        {"q_gate": 3, "num_q_heads": None},
        TypeError,
        "q_gate must be a JAX or NumPy array, got 3 of type int. Convert it with jnp.asarray.",
    ),
    "no axes": (
        {"q_gate": jnp.zeros(()), "num_q_heads": None},
        ValueError,
        "q_gate must have axes, got shape (). Pass the array whose last axis holds its elements.",
    ),
    "a width that heads don't fill": (
        {"q_gate": jnp.zeros((6, 500), jnp.bfloat16), "num_q_heads": None},
        ValueError,
        Q_GATE.format("(6, 500)"),
    ),
    "no width": ({"q_gate": jnp.zeros((6, 0), jnp.bfloat16), "num_q_heads": None}, ValueError, Q_GATE.format("(6, 0)")),
    "k of a width that heads don't fill": (
        {"k": jnp.zeros((6, 100), jnp.bfloat16), "num_kv_heads": None},
        ValueError,
        "k must have shape (..., num_kv_heads * 64) or (..., num_kv_heads, 64), got (6, 100). "
        "Its sizes: num_kv_heads, head_dim, as one axis or two; head_dim = 64.",
    ),
    "heads before tokens": (
        {"q_gate": jnp.zeros((2, 4, 6, 128), jnp.bfloat16), "k": jnp.zeros((2, 2, 6, 64), jnp.bfloat16)}
        | dict.fromkeys(SIZES),
        ValueError,
        "k must have shape (2, 4, 6, 64), got (2, 2, 6, 64). "
        "Its sizes: the leading axes of q_gate, then num_kv_heads, head_dim; tokens come before heads.",
    ),
    "a number that is none": (
        {"num_q_heads": 0, "num_kv_heads": None},
        ValueError,
        "num_q_heads must be at least 1, got 0. Pass the number that this device's arrays hold.",
    ),
    "a head_dim that is none": (
        {"head_dim": 0, "num_kv_heads": None},
        ValueError,
        "head_dim must be at least 1, got 0. Pass the number that this device's arrays hold.",
    ),
    "another head_dim": (
        {"head_dim": 32, "num_q_heads": None, "num_kv_heads": None},
        ValueError,
        "q_weight must have shape (32,), got (64,). "
        "Its sizes: head_dim; where that is left out, the length of the first weight.",
    ),
    "another rotary_dim": (
        {"rotary_dim": 16},
        ValueError,
        "cos_sin_cache must have shape (max_position, 16), got (4096, 32). "
        "Its sizes: rotary_dim, which may be left out; each row is [cos | sin].",
    ),
    "heads of q alone in an axis": (
        {"q_gate": jnp.zeros((6, 4, 128)), "num_q_heads": None, "num_kv_heads": None},
        ValueError,
        "q_gate and k must both have an axis of heads, or neither, got shapes (6, 4, 128) and (6, 128). "
        "Reshape one of them.",
    ),
    "another number of heads in an axis": (
        {"q_gate": jnp.zeros((6, 4, 128)), "k": jnp.zeros((6, 2, 64)), "num_q_heads": None, "num_kv_heads": 4},
        ValueError,
        "k must have shape (..., 4, 64), got (6, 2, 64). Its sizes: num_kv_heads, head_dim, as one axis or two; "
        "head_dim = 64.",
    ),
    "an axis of heads without gates": (
        {"q_gate": jnp.zeros((6, 4, 64)), "k": jnp.zeros((6, 2, 64)), "num_q_heads": None, "num_kv_heads": None},
        ValueError,
        "q_gate must have shape (..., num_q_heads, 128), got (6, 4, 64). "
        "Its sizes: num_q_heads, 2 * head_dim, as one axis or two; fused_qk_rmsnorm_rope takes q without gates; "
        "head_dim = 64.",
    ),
    "weights of half a head": (
        {
            "q_gate": jnp.zeros((6, 4, 128)),
            "k": jnp.zeros((6, 2, 64)),
            "q_weight": jnp.zeros(32),
            "k_weight": jnp.zeros(32),
            "num_q_heads": None,
            "num_kv_heads": None,
            "head_dim": None,
        },
        ValueError,
        "q_gate must have shape (..., num_q_heads, 64), got (6, 4, 128). Its sizes: num_q_heads, 2 * head_dim, as one "
        "axis or two; head_dim = 32, the length of the weights.",
    ),
    "k in front of q_gate": (
        {"q_gate": jnp.zeros((6, 2, 64)), "k": jnp.zeros((6, 4, 128)), "num_q_heads": None, "num_kv_heads": None},
        ValueError,
        "q_gate must have shape (..., num_q_heads, 128), got (6, 2, 64). Its sizes: num_q_heads, 2 * head_dim, as one "
        "axis or two; q_gate stands in front of k; head_dim = 64.",
    ),
    "k of one head in front of q": (
        {"q_gate": jnp.zeros((6, 64)), "k": jnp.zeros((6, 256)), "num_q_heads": None, "num_kv_heads": None},
        ValueError,
        "q_gate must have shape (..., num_q_heads * 128) or (..., num_q_heads, 128), got (6, 64). Its sizes: "
        "num_q_heads, 2 * head_dim, as one axis or two; fused_qk_rmsnorm_rope takes q without gates; head_dim = 64.",
    ),
    "a table in front of the weights": (
        {"q_weight": jnp.zeros((32, 16)), "k_weight": jnp.arange(6), "head_dim": None},
        ValueError,
        "q_weight must have shape (head_dim,), got (32, 16). Its sizes: the elements of a head; weights stand behind q "
        "and k, and in front of the table.",
    ),
    "heads of unequal lengths": (
        {"q_gate": jnp.zeros((6, 4, 256)), "k": jnp.zeros((6, 2, 64)), "num_q_heads": None, "num_kv_heads": None},
        ValueError,
        "q_gate and k must have equal leading axes in front of heads of 128 and 64 elements, got shapes (6, 4, 256) "
        "and (6, 2, 64). Check the tokens and head_dim = 64.",
    ),
    "heads of another length": (
        {"q_gate": jnp.zeros((6, 4, 256)), "k": jnp.zeros((6, 2, 128)), "num_q_heads": None, "num_kv_heads": None},
        ValueError,
        "q_gate must have shape (..., num_q_heads, 128), got (6, 4, 256). Its sizes: num_q_heads, 2 * head_dim, as one "
        "axis or two; head_dim = 64.",
    ),
    "another number of tokens": (
        {"k": jnp.zeros((5, 128)), "num_q_heads": None, "num_kv_heads": None},
        ValueError,
        "q_gate and k must have equal leading axes in front of heads of 128 and 64 elements, got shapes (6, 512) and "
        "(5, 128). Check the tokens and head_dim = 64.",
    ),
    "a table for longer heads": (
        {"cos_sin_cache": jnp.zeros((32, 128)), "rotary_dim": None},
        ValueError,
        TABLE.format("(32, 128)"),
    ),
    "a table for longer heads than the weights have": (
        {"cos_sin_cache": jnp.zeros((32, 128)), "rotary_dim": None, "head_dim": None},
        ValueError,
        TABLE.format("(32, 128)").replace("= 64, got", "= 64, the length of the weights, got"),
    ),
    "positions of an odd number in the place of the table": (
        {"cos_sin_cache": jnp.arange(7), "rotary_dim": None},
        TypeError,
        "cos_sin_cache must be float16, bfloat16 or float32, got int32. "
        "pallas_qk.rope.cos_sin_cache makes it, with rows [cos | sin]; positions stand behind it.",
    ),
    "a table of an odd width": (
        {"cos_sin_cache": jnp.zeros((32, 7)), "rotary_dim": None},
        ValueError,
        TABLE.format("(32, 7)"),
    ),
    "a table without a width": (
        {"cos_sin_cache": jnp.zeros((32, 0)), "rotary_dim": None},
        ValueError,
        TABLE.format("(32, 0)"),
    ),
    "a table, and a head_dim that is none": (
        {"head_dim": "64", "rotary_dim": None},
        TypeError,
        "head_dim must be an integer known when tracing, got '64' of type str. Pass a Python int; the order is "
        "num_q_heads, num_kv_heads, head_dim, rotary_dim.",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name):
    changes, error, message = BAD[name]
    case = CASES[0]
    arrays = vars(make_inputs(case))
    with pytest.raises(error, match="must") as caught:
        pallas_qk.fused_qk_rmsnorm_rope_gate(**arrays | case.static_arguments | changes)
    assert str(caught.value) == message


def test_gates_for_the_function_without_are_named():
    arrays = jnp.zeros((6, 4, 128)), jnp.zeros((6, 2, 64)), *(jnp.zeros(64),) * 2, jnp.zeros((8, 32)), jnp.arange(6)
    message = (
        "q must have shape (..., num_q_heads, 64), got (6, 4, 128). Its sizes: num_q_heads, head_dim, as one axis or "
        "two; fused_qk_rmsnorm_rope_gate takes q with gates; head_dim = 64, the length of the weights."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pallas_qk.fused_qk_rmsnorm_rope(*arrays, 1e-6)


PACKED = (
    "qkv must have shape (..., {}), got {}. Its sizes: num_q_heads * 2 * head_dim + 2 * num_kv_heads * head_dim, "
    "[q and gate of each head | k | v]{}."
)


OF_K, OF_Q = ({"num_q_heads": 4}, "512 + num_kv_heads * 128"), ({"num_kv_heads": 2}, "num_q_heads * 128 + 256")


@pytest.mark.parametrize(
    # A part of a head, none, and too few heads of those that were given. Two are as wide as heads without gates.
    "given, wanted, width, is_other",
    [
        (*OF_K, 512 + 192, False),
        (*OF_K, 512, True),
        (*OF_K, 256, False),
        (*OF_Q, 256 + 192, True),
        (*OF_Q, 256, False),
        (*OF_Q, 128, False),
    ],
)
def test_a_packed_width_that_heads_do_not_fill_is_refused(given, wanted, width, is_other):
    """The message has the number of heads that was given, and none that wasn't."""
    arrays = jnp.zeros((6, width), jnp.bfloat16), *(jnp.zeros(64),) * 2, jnp.zeros((8, 32)), jnp.arange(6), 1e-6
    other = "; fused_qkv_rmsnorm_rope takes q without gates" if is_other else ""
    message = PACKED.format(wanted, f"(6, {width})", other)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pallas_qk.fused_qkv_rmsnorm_rope_gate(*arrays, **given)
