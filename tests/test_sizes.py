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
        "q_gate must have shape (..., 384) or (..., 3, 128), got (6, 500). "
        "Its sizes: num_q_heads, 2 * head_dim, as one axis or two; fused_qk_rmsnorm_rope takes q without gates.",
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
        "q_weight must have shape (32,), got (64,). Its sizes: head_dim.",
    ),
    "another rotary_dim": (
        {"rotary_dim": 16},
        ValueError,
        "cos_sin_cache must have shape (max_position, 16), got (4096, 32). "
        "Its sizes: rotary_dim, each row [cos | sin].",
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
