"""Norms without weights, and of v: in every form and implementation, with their gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_qk
from pallas_qk import _rows
from pallas_qk._options import Options
from tests.cases import cos_sin_table, random_normals
from tests.compare import assert_same, assert_within
from tests.devices import mesh_of, put
from tests.lowering import GPU_IMPLEMENTATIONS
from tests.run import cached_kernel, has_gpu, primitives
from tests.tolerances import ROUNDOFF, SMALLEST

IMPLEMENTATIONS = ("xla", *GPU_IMPLEMENTATIONS)
EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Size:
    num_tokens: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    dtype: str = "bfloat16"
    rotation: str = "halves"

    @property
    def static(self) -> dict:
        heads = {"num_q_heads": self.num_q_heads, "num_kv_heads": self.num_kv_heads}
        option = {} if self.rotation == "halves" else {"rotation": self.rotation}
        return {"eps": EPS, **heads, "head_dim": self.head_dim, "rotary_dim": self.rotary_dim, **option}

    def options(self, **changes) -> Options:
        packed = self.num_q_heads, self.num_kv_heads
        rotation = {"rotary_dim": self.rotary_dim, "rotation": self.rotation if self.rotary_dim else None}
        return Options(**{"eps": EPS, "gate": None, "packed": packed, **rotation, **changes})

    @property
    def table(self) -> list:
        """Table and positions, or nothing."""
        if not self.rotary_dim:
            return [None, None]
        positions = np.random.default_rng(2).integers(0, 64, self.num_tokens, np.int32)
        return [cos_sin_table(64, self.rotary_dim, self.dtype), jnp.asarray(positions)]

    def rows(self, *heads: int, seed: int = 0) -> list[jax.Array]:
        return random_normals([(self.num_tokens, n * self.head_dim) for n in heads], self.dtype, seed)

    def weights(self) -> list[jax.Array]:
        rng = np.random.default_rng(3)
        return [jnp.asarray(1 + 0.2 * rng.standard_normal(self.head_dim), jnp.float32) for _ in "qk"]

    @property
    def heads(self) -> tuple[int, int, int]:
        return self.num_q_heads, self.num_kv_heads, self.num_kv_heads


SIZES = (
    Size(5, 16, 2, 256, 64),
    Size(7, 3, 2, 80, 40, "float16"),
    Size(65, 2, 1, 128, 128, "float16", "pairs"),
    Size(4, 2, 3, 512, 512, "float32"),
    Size(9, 5, 2, 96, 6, "bfloat16", "pairs"),
    Size(3, 2, 1, 256, 0),
)
NORMS = {"no weights": (False, False), "v": (True, True), "v, no weights": (False, True)}  # has weights, v_norm


def packed_call(implementation: str, size: Size, qkv, weights, *, v_norm: bool) -> list:
    """q, k and v of a packed array, by the kernel's interpreter where there is no GPU."""
    if implementation == "xla" or has_gpu():
        static = size.static | {"v_norm": v_norm, "implementation": implementation}
        return list(pallas_qk.fused_qkv_rmsnorm_rope(qkv, *weights, *size.table, **static))
    table, positions = size.table
    inputs = _rows.Inputs(qkv, None, *weights, table, None if positions is None else positions[None])
    options = size.options(v_norm=v_norm, head_dim=None if weights[0] is not None else size.head_dim)
    outputs = cached_kernel("forward", implementation, options, False)(inputs)
    return [jnp.asarray(x).reshape(size.num_tokens, -1) for x in (outputs.q, outputs.k, outputs.v)]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_weight_is_a_weight_of_ones(implementation, size, norm):
    """In bits: a product with one is exact. A norm of v is a norm of k that isn't rotated."""
    has_weights, v_norm = NORMS[norm]
    q, k, v = size.rows(*size.heads)
    weights = size.weights() if has_weights else [None, None]
    got = packed_call(implementation, size, jnp.concatenate([q, k, v], axis=-1), weights, v_norm=v_norm)
    ones = [jnp.ones(size.head_dim) if w is None else w for w in weights]
    want = packed_call(implementation, size, jnp.concatenate([q, k, v], axis=-1), ones, v_norm=False)
    assert_same(got[:2], want[:2])
    if v_norm:
        flat = dataclasses.replace(size, rotary_dim=0)
        ones = [jnp.ones(size.head_dim)] * 2
        want[2] = packed_call(implementation, flat, jnp.concatenate([q, v, k], axis=-1), ones, v_norm=False)[1]
    if implementation != "triton" or size.dtype != "float32" or has_gpu():  # interpreted, its sums have XLA's order
        assert_same(got[2], want[2])
    rows = np.asarray(v).astype(np.float64).reshape(size.num_tokens, -1, size.head_dim)
    exact = rows / np.sqrt(np.mean(rows * rows, axis=-1, keepdims=True) + EPS) if v_norm else rows
    exact, roundoff = exact.reshape(v.shape), ROUNDOFF[size.dtype]
    assert_within("v", got[2], exact, (roundoff + 17 * ROUNDOFF["float32"]) * np.abs(exact) + SMALLEST[size.dtype])


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients(implementation, size, norm):
    """Of rows they are those with weights of ones; of weights that aren't there, none; of v those of a norm."""
    has_weights, v_norm = NORMS[norm]
    qkv = jnp.concatenate(size.rows(*size.heads), axis=-1)
    weights = size.weights() if has_weights else [None, None]
    table, positions = size.table
    inputs = _rows.Inputs(qkv, None, *weights, table, None if positions is None else positions[None])
    dq, dk, dv = (
        x.reshape(size.num_tokens, n, -1) for x, n in zip(size.rows(*size.heads, seed=1), size.heads, strict=True)
    )
    cotangents = _rows.Outputs(q=dq, k=dk, v=dv)
    options = size.options(v_norm=v_norm, head_dim=None if has_weights else size.head_dim)
    got = cached_kernel("backward", implementation, options, False)(inputs, cotangents)
    assert (got.q_weight is None) == (got.k_weight is None) == (not has_weights)
    ones = [jnp.ones(size.head_dim) if w is None else w for w in weights]
    plain = inputs._replace(q_weight=ones[0], k_weight=ones[1])
    want = cached_kernel("backward", implementation, size.options(), False)(plain, cotangents)
    qk = (size.num_q_heads + size.num_kv_heads) * size.head_dim
    got_q, want_q = (np.asarray(x.q).astype(np.float64) for x in (got, want))
    unit = 2 * ROUNDOFF[size.dtype]
    assert_within("q and k", got_q[:, :qk], want_q[:, :qk], unit * np.abs(want_q[:, :qk]) + 1e-6)
    if has_weights:
        for a, b in ((got.q_weight, want.q_weight), (got.k_weight, want.k_weight)):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    v = np.asarray(qkv[:, qk:]).astype(np.float64).reshape(dv.shape)
    exact = np.asarray(dv).astype(np.float64)
    if v_norm:
        r = 1 / np.sqrt(np.mean(v * v, axis=-1, keepdims=True) + EPS)
        exact = exact * r - v * r**3 * np.mean(exact * v, axis=-1, keepdims=True)
    exact = exact.reshape(size.num_tokens, -1)
    assert_within("v", got.q[:, qk:], exact, unit * np.abs(exact) + 2.0**-18 * np.abs(exact).max())


def test_the_public_functions_differentiate():
    size = SIZES[0]
    q, k, v = size.rows(*size.heads)
    qkv = jnp.concatenate([q, k, v], axis=-1)

    def loss(qkv, table):
        outputs = pallas_qk.fused_qkv_rmsnorm_rope(qkv, None, None, table, size.table[1], **size.static, v_norm=True)
        return sum((x.astype(jnp.float32) ** 2).sum() for x in outputs)

    gradient = jax.grad(loss, argnums=(0, 1))
    assert primitives(gradient, qkv, size.table[0]).count("fused_qk_rmsnorm_rope_gate_backward") == 1
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in gradient(qkv, size.table[0]))
    hessian_row = jax.jvp(jax.grad(loss), (qkv, size.table[0]), (qkv, size.table[0]))[1]
    assert np.isfinite(np.asarray(hessian_row, np.float32)).all()
    mapped = jax.vmap(jax.grad(loss), (0, None))(jnp.stack([qkv, 2 * qkv]), size.table[0])
    np.testing.assert_allclose(
        mapped[0].astype(jnp.float32), gradient(qkv, size.table[0])[0].astype(jnp.float32), rtol=0.05, atol=0.05
    )


@pytest.mark.parametrize("size", SIZES[:2], ids=str)
@pytest.mark.parametrize("norm", NORMS)
def test_every_form_gives_one_result(norm, size):
    has_weights, v_norm = NORMS[norm]
    q, k, v = size.rows(*size.heads)
    (gate,), weights = size.rows(size.num_q_heads, seed=4), size.weights() if has_weights else [None, None]
    t, d = size.num_tokens, size.head_dim
    q_gate = jnp.concatenate([x.reshape(t, -1, 1, d) for x in (q, gate)], axis=2).reshape(t, -1)
    arrays = *weights, *size.table
    want = pallas_qk.fused_qkv_rmsnorm_rope(jnp.concatenate([q, k, v], axis=-1), *arrays, **size.static, v_norm=v_norm)
    gated = pallas_qk.fused_qkv_rmsnorm_rope_gate(
        jnp.concatenate([q_gate, k, v], axis=-1), *arrays, **size.static, v_norm=v_norm, copy_gate=False
    )
    assert_same(gated, (*want, gate))
    assert_same(pallas_qk.fused_qk_rmsnorm_rope(q, k, *arrays, **size.static), want[:2])
    assert_same(pallas_qk.fused_qk_rmsnorm_rope_gate(q_gate, k, *arrays, **size.static), (*want[:2], gate))
    cache = tuple(jnp.zeros((t, 1, size.num_kv_heads, d), size.dtype) for _ in "kv")
    for qkv in ((q, k, v), jnp.concatenate([q, k, v], axis=-1)):
        outputs = pallas_qk.fused_qkv_rmsnorm_rope_cache(
            qkv, *arrays, cache, jnp.arange(t), **size.static, v_norm=v_norm, return_kv=True
        )
        assert_same((outputs.q, outputs.k, outputs.v), want)
        assert_same([x.reshape(t, -1) for x in outputs.kv_cache], want[1:])
    cache = tuple(jnp.zeros((t, 1, size.num_kv_heads, d), "float8_e4m3fn") for _ in "kv")
    outputs = pallas_qk.fused_qkv_rmsnorm_rope_cache(
        (q, k, v), *arrays, cache, jnp.arange(t), **size.static, v_norm=v_norm, k_scale=1.0, v_scale=1.0
    )
    stored = np.asarray(outputs.kv_cache[1].astype(jnp.float32)).reshape(t, -1)
    np.testing.assert_allclose(stored, want[2].astype(jnp.float32), rtol=1 / 16, atol=2**-9)


@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
def test_a_norm_of_v_in_a_cache_by_the_kernel(implementation):
    """The kernels' own code for rows of k and of v that are both normalised."""
    size = dataclasses.replace(SIZES[0], dtype="float32")
    q, k, v = (x.reshape(size.num_tokens, n, -1) for x, n in zip(size.rows(*size.heads), size.heads, strict=True))
    table, positions = size.table
    cache = jnp.zeros((size.num_tokens, 1, size.num_kv_heads, size.head_dim))
    slots = jnp.array([3, -1, 0, 4, 1], jnp.int32)
    inputs = _rows.Inputs(q, k, *size.weights(), table, positions[None], v, cache, cache, slots)
    options = size.options(packed=None, separate_v=True, cache_axes="b s h d", return_kv=True, v_norm=True)
    got, want = (cached_kernel("forward", name, options, False)(inputs) for name in (implementation, "xla"))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("mode", ["auto", "explicit, set_mesh"])
def test_sharded(on_the_host, mode):
    size = Size(8, 4, 2, 64, 32, "float32")
    q, k = size.rows(*size.heads[:2])

    def op(q, k, *table):
        return pallas_qk.fused_qk_rmsnorm_rope(q, k, None, None, *table, **size.static)

    def gradient(*args):
        return jax.grad(lambda *args: sum((x * x).sum() for x in op(*args)), argnums=(0, 1, 2))(*args)

    args = q, k, *size.table
    want = op(*args), gradient(*args)
    with mesh_of({"x": 2, "y": 2}, mode) as on:
        args = put(on, args, [("x", "y"), ("x", "y"), (), ("x",)])
        assert_same(jax.jit(op)(*args), want[0])
        for a, b in zip(jax.jit(gradient)(*args), want[1], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


BAD: dict[str, tuple[dict, type[Exception], str]] = {
    "one weight": (
        {"k_weight": None},
        ValueError,
        "q_weight and k_weight must both be given or both be None, got q_weight alone.",
    ),
    "beta": (
        {"q_weight": None, "k_weight": None, "norm_beta": 1.0},
        ValueError,
        "norm_beta must be 0 without weights, got 1.0.",
    ),
    "beta of another type": (
        {"q_weight": None, "k_weight": None, "norm_beta": "1"},
        TypeError,
        "norm_beta must be a real number known when tracing, got '1' of type str.",
    ),
    "v_norm": ({"v_norm": 1}, TypeError, "v_norm must be a bool known when tracing, got 1 of type int."),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_refused(name):
    changes, error, message = BAD[name]
    size = SIZES[0]
    (qkv,), (q_weight, k_weight), (table, positions) = size.rows(sum(size.heads)), size.weights(), size.table
    arrays = {"qkv": qkv, "q_weight": q_weight, "k_weight": k_weight, "cos_sin_cache": table, "positions": positions}
    with pytest.raises(error, match="must") as caught:
        pallas_qk.fused_qkv_rmsnorm_rope(**arrays | size.static | changes)
    assert str(caught.value).startswith(message)
