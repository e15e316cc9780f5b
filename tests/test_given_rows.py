"""q alone, and q, k and v as three arrays: against the calls that have all rows, or one packed array."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_qk
from tests import forms
from tests.cases import Case, make_inputs
from tests.compare import assert_same
from tests.devices import mesh_of, put
from tests.gradients import assert_agree, gradients
from tests.lowering import GPU_IMPLEMENTATIONS, kernels, lowered_text
from tests.run import has_gpu, primitives, run, run_backward

IMPLEMENTATIONS = ("xla", *GPU_IMPLEMENTATIONS)
ALONE = (
    Case(5, 4, 3, 64, 16, q_alone=True),
    Case(7, 3, 2, 80, 40, "float16", q_alone=True, weights=False, gate="in_place"),
    Case(3, 2, 1, 128, 0, "float32", q_alone=True, gate=None),
    Case(65, 2, 2, 256, 64, q_alone=True, rotation="pairs", round_norm=False),
)
THREE = (
    Case(5, 4, 3, 64, 16, separate_v=True, v_norm=True),
    Case(9, 2, 1, 96, 6, "float16", separate_v=True, v_norm=True, gate=None, weights=False),
    Case(3, 2, 2, 128, 128, "float32", separate_v=True, v_norm=True, gate="in_place"),
)


def by_name(case: Case, arrays) -> dict:
    return dict(zip(forms.output_names(case), arrays, strict=True))


def plain_of(case: Case) -> Case:
    """With all rows, and weights if the case has them."""
    return Case(
        **{field: getattr(case, field) for field in case.__dataclass_fields__ if field not in ("q_alone", "separate_v")}
    )


@pytest.mark.parametrize("case", ALONE, ids=lambda case: case.id)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_q_alone_is_q_of_the_whole(implementation, case):
    inputs, whole = make_inputs(case), plain_of(case)
    got, want = (by_name(x, run(implementation, x, inputs)) for x in (case, whole))
    assert_same([got["q"]], [want["q"]])
    assert got.keys() == want.keys() - {"k"}
    found = run_backward(implementation, case, inputs, forms.cotangents_of(case))
    all_found = run_backward(implementation, whole, inputs, forms.cotangents_of(whole))
    assert_same(found[:1], all_found[:1])
    if case.weights:
        assert_agree(found[1:], all_found[2:3])  # its sum may have another order
    assert len(found) == 1 + case.weights


@pytest.mark.parametrize("case", THREE, ids=lambda case: case.id)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_three_arrays_are_a_packed_one(implementation, case):
    inputs, packed = make_inputs(case), Case(**vars(case) | {"separate_v": False, "packed": True})
    # XLA fuses products into sums as it likes, of float32: on a GPU its own, elsewhere those of Triton's kernel.
    fused_freely = "xla" if has_gpu() else "triton"
    compare = assert_agree if (implementation, case.dtype) == (fused_freely, "float32") else assert_same
    compare(list(run(implementation, case, inputs)), list(run(implementation, packed, inputs)))
    q, k, v, *weights = run_backward(implementation, case, inputs, forms.cotangents_of(case))
    one, *of_packed = run_backward(implementation, packed, inputs, forms.cotangents_of(packed))
    compare([jnp.concatenate([q, k, v], axis=-1)], [one])
    assert_agree(weights, of_packed)


@pytest.mark.parametrize("gate", ["copied", "in_place", None])
def test_v_that_is_not_normalised_is_the_array_itself(gate):
    """No work: no kernel knows it."""
    case = Case(5, 4, 3, 64, 16, separate_v=True, gate=gate)
    args = forms.arguments(case, make_inputs(case))
    assert_same([by_name(case, forms.op(case)(*args))["v"]], [args[2]])
    without = Case(**vars(case) | {"separate_v": False})

    def kernels_of(case: Case) -> list[str]:
        op = forms.op(case, "mosaic_gpu")
        return kernels(lowered_text(jax.jit(lambda *args: op(*args)), *forms.arguments(case, make_inputs(case))))

    assert kernels_of(case) == kernels_of(without)


def test_v_that_passes_by_is_one_of_the_call_s_arrays():
    """As q and k it must be there, and a result has no weak type."""
    case = Case(5, 4, 3, 64, 16, "float32", separate_v=True)
    q, k, v, *others = forms.arguments(case, make_inputs(case))
    weak = jnp.full(v.shape, 2.0)
    assert weak.weak_type and not by_name(case, forms.op(case)(q, k, weak, *others))["v"].weak_type
    gone = v + 0
    gone.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        forms.op(case)(q, k, gone, *others)


@pytest.mark.parametrize("v_norm", [False, True])
def test_one_array_as_k_and_v(v_norm):
    """Its gradients add, from one backward."""
    case = Case(5, 4, 2, 64, 32, "float32", separate_v=True, v_norm=v_norm, gate=None)
    q, k, _, *others = forms.arguments(case, make_inputs(case))

    def loss(q, k, v):
        return sum((x**3).sum() for x in forms.op(case)(q, k, v, *others))

    gradient = jax.grad(lambda q, k: loss(q, k, k), argnums=(0, 1))
    assert primitives(gradient, q, k).count("fused_qk_rmsnorm_rope_gate_backward") == 1
    dq, dk, dv = jax.grad(loss, argnums=(0, 1, 2))(q, k, k)
    assert_agree(gradient(q, k), [dq, dk + dv])
    heads = q.reshape(5, 4, 64), k.reshape(5, 2, 64)
    outputs = forms.op(case)(heads[0], heads[1], heads[1], *others)
    assert [x.shape for x in outputs] == [(5, 4, 64), (5, 2, 64), (5, 2, 64)]


@pytest.mark.parametrize("case", [ALONE[0], THREE[0]], ids=lambda case: case.id)
def test_further_derivatives_and_vmap(case):
    case = Case(**vars(case) | {"dtype": "float32"})
    args = forms.arguments(case, make_inputs(case))
    *floats, positions = args

    def loss(*floats):
        return sum((x**3).sum() for x in forms.op(case)(*floats, positions))

    gradient = jax.grad(loss, argnums=range(len(floats)))
    _, tangents = jax.jvp(gradient, tuple(floats), tuple(floats))
    step = 1e-3
    ahead, behind = (gradient(*(x * (1 + s) for x in floats)) for s in (step, -step))
    for t, a, b in zip(tangents, ahead, behind, strict=True):
        np.testing.assert_allclose(t, (a - b) / (2 * step), rtol=2e-2, atol=2e-2 * float(jnp.abs(t).max()))

    def twice(x):
        return jnp.stack([x, 2 * x])

    mapped = jax.vmap(gradient, (0,) * len(floats))(*map(twice, floats))
    for a, b, c in zip(mapped, gradient(*floats), gradient(*(2 * x for x in floats)), strict=True):
        np.testing.assert_allclose(a, jnp.stack([b, c]), rtol=1e-4, atol=1e-5 * float(jnp.abs(c).max()))
    rows = len([name for name in forms.ARGUMENTS[:3] if getattr(forms.given(case), name)])
    of_rows = jax.vmap(gradient, (0,) * rows + (None,) * (len(floats) - rows))
    mapped = of_rows(*map(twice, floats[:rows]), *floats[rows:])
    for a, b in zip(mapped, gradient(*floats), strict=True):
        np.testing.assert_allclose(a[0], b, rtol=1e-4, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("mode", ["auto", "explicit, set_mesh"])
@pytest.mark.parametrize("case", [ALONE[0], THREE[0]], ids=lambda case: case.id)
def test_sharded(on_the_host, mode, case):
    case = Case(**vars(case) | {"num_tokens": 8, "num_kv_heads": 2, "dtype": "float32"})
    args, cotangents = forms.arguments(case, make_inputs(case)), forms.cotangents_of(case)
    floats = len(args) - 1

    def both(*args):
        outputs = forms.op(case)(*args[: len(args) - len(cotangents)])
        return outputs, gradients(forms.op(case), floats, floats + 1)(*args)

    want = jax.jit(both)(*args, *cotangents)
    rows = [("x", "y")] * (floats - (3 if forms.given(case).k_weight else 2))
    specs = [*rows, *[()] * (floats - len(rows)), ("x",)]
    with mesh_of({"x": 2, "y": 2}, mode) as on:
        placed = put(on, args, specs) + put(on, cotangents, [("x", "y")] * len(cotangents))
        got = jax.jit(both)(*placed)
    assert_same(list(got[0]), list(want[0]))
    for a, b in zip(got[1], want[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [ALONE[0], ALONE[3], THREE[0]], ids=lambda case: case.id)
def test_one_kernel_each_way(implementation, case):
    args, cotangents = forms.arguments(case, make_inputs(case)), forms.cotangents_of(case)
    op, of = forms.op(case, implementation), len(args) - 1
    assert len(kernels(lowered_text(jax.jit(lambda *args: op(*args)), *args))) == 1
    backward = lowered_text(jax.jit(lambda *args: gradients(op, of, of + 1)(*args)[:3]), *args, *cotangents)
    assert len([name for name in kernels(backward) if name.endswith("backward")]) == 1


def test_the_choice_for_q_alone():
    assert pallas_qk.default_implementation(4, 16, 0, 256, 64, "bfloat16", platform="cpu").name == "xla"


def test_what_is_no_triple_is_refused():
    case = THREE[0]
    q, k, v, *others = forms.arguments(case, make_inputs(case))
    message = "qkv must be one array or the three of (q_gate, k, v), got 2 of them. Pass one or three."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        pallas_qk.fused_qkv_rmsnorm_rope_gate((q, k), *others, **case.static_arguments)
    message = "v must have the dtype of q_gate, bfloat16, got float32. Cast one to the other."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        forms.op(case)(q, k, v.astype(jnp.float32), *others)
    with pytest.raises(ValueError, match=r"^v must have shape \(5, 192\), got \(5, 128\)"):
        forms.op(case)(q, k, v[:, :128], *others)
    with pytest.raises(TypeError, match=r"^k must be a JAX or NumPy array, got None"):
        pallas_qk.fused_qkv_rmsnorm_rope_gate((q, None, v), *others, **case.static_arguments)
