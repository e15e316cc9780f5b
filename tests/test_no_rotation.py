"""Calls without a table, where nothing is rotated: the norm and the split alone, in every form and implementation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_qk
from pallas_qk import _rows
from pallas_qk._options import Options
from tests.cases import random_normals
from tests.compare import assert_same, assert_within
from tests.devices import mesh_of, put
from tests.lowering import GPU_IMPLEMENTATIONS
from tests.run import cached_kernel, primitives, quick_jit, run_arrays
from tests.tolerances import ROUNDOFF, SMALLEST

IMPLEMENTATIONS = ("xla", *GPU_IMPLEMENTATIONS)


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a call, whose weights have another dtype than its activations."""

    num_tokens: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"

    @property
    def static(self) -> dict:
        heads = {"num_q_heads": self.num_q_heads, "num_kv_heads": self.num_kv_heads}
        return {"eps": 1e-6, **heads, "head_dim": self.head_dim, "norm_beta": 1.0}

    def arrays(self, *widths: int, seed: int = 0) -> list[jax.Array]:
        """Rows of some numbers of heads, and the weights."""
        shapes = [(self.num_tokens, width * self.head_dim) for width in widths] + [(self.head_dim,)] * 2
        *rows, q_weight, k_weight = random_normals(shapes, "float32", seed)
        return [*(x.astype(self.dtype) for x in rows), q_weight, k_weight]


SIZES = (
    Size(5, 16, 2, 256),
    Size(7, 3, 2, 80, "float16"),
    Size(129, 3, 1, 128, "float16"),
    Size(3, 2, 1, 65),
    Size(4, 2, 3, 512, "float32"),
    Size(9, 5, 2, 6),
    Size(65, 12, 1, 8, "float32"),
)


def normed(size: Size, x: jax.Array, weight: jax.Array) -> np.ndarray:
    """In float64."""
    rows = np.asarray(x).astype(np.float64).reshape(size.num_tokens, -1, size.head_dim)
    rms = np.sqrt(np.mean(rows * rows, axis=-1, keepdims=True) + 1e-6)
    return (rows / rms * (np.asarray(weight).astype(np.float64) + 1)).reshape(x.shape)


def assert_normed(size: Size, got: jax.Array, x: jax.Array, weight: jax.Array) -> None:
    """Rounded once, after 16 roundoffs of float32 at most."""
    want = normed(size, x, weight)
    roundoff = ROUNDOFF[size.dtype]
    assert got.dtype == size.dtype
    bound = (roundoff + (1 + roundoff) * 16 * ROUNDOFF["float32"]) * np.abs(want) + SMALLEST[size.dtype]
    assert_within("rows", got, want, bound)


@quick_jit
def pulled_back(x, weight, cotangent):
    """The gradients of rows (T, heads, D) and of their weight."""

    def of_rows(x, weight):
        rms = jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
        return x / rms * (weight + 1).reshape(1, 1, -1)

    return jax.vjp(of_rows, x, weight)[1](cotangent)


OPTIONS = Options(rotary_dim=0, eps=1e-6, norm_beta=1.0, rotation=None)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_are_normalised_and_rounded_once(implementation, size):
    q_gate, k, *weights = size.arrays(2 * size.num_q_heads, size.num_kv_heads)
    got = run_arrays(implementation, [q_gate, k, *weights, None, None], size.static, OPTIONS)
    q, gate = jnp.split(q_gate.reshape(size.num_tokens, size.num_q_heads, -1), 2, axis=-1)
    assert_normed(size, got[0], q.reshape(got[0].shape), weights[0])
    assert_normed(size, got[1], k, weights[1])
    assert_same(got[2], gate.reshape(got[2].shape))
    if implementation != "xla":  # the sum has one order everywhere
        want = run_arrays("xla", [q_gate, k, *weights, None, None], size.static, OPTIONS)
        differing = sum(int((np.asarray(a) != np.asarray(b)).sum()) for a, b in zip(got, want, strict=True))
        assert differing <= (0.002 if size.dtype != "float32" else 1) * sum(x.size for x in want)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradients_are_those_of_the_norm(implementation, size):
    q_gate, k, *weights = size.arrays(2 * size.num_q_heads, size.num_kv_heads)
    heads = [x.reshape(size.num_tokens, n, -1) for x, n in ((q_gate, size.num_q_heads), (k, size.num_kv_heads))]
    inputs = _rows.Inputs(*heads, *weights, None, None)
    dq, dk, dgate = (
        x.reshape(size.num_tokens, n, size.head_dim)
        for x, n in zip(
            size.arrays(size.num_q_heads, size.num_kv_heads, size.num_q_heads, seed=1),
            (size.num_q_heads, size.num_kv_heads, size.num_q_heads),
            strict=False,
        )
    )
    got = cached_kernel("backward", implementation, OPTIONS, False)(inputs, _rows.Outputs(q=dq, k=dk, gate=dgate))
    (q, k), got = map(np.asarray, heads), jax.tree.map(np.asarray, got)
    with jax.enable_x64(True):
        for x, weight, cotangent, rows, of_weight in (
            (q[..., : size.head_dim], weights[0], dq, got.q[..., : size.head_dim], got.q_weight),
            (k, weights[1], dk, got.k, got.k_weight),
        ):
            want = pulled_back(*(np.asarray(a).astype(np.float64) for a in (x, weight, cotangent)))
            for name, a, b in zip(("rows", "weight"), (rows, of_weight), want, strict=True):
                unit, b = 2 * ROUNDOFF[str(a.dtype)], np.asarray(b)
                assert_within(name, a, b, unit * np.abs(b) + 2.0**-16 * np.max(np.abs(b)))
    assert_same(got.q[..., size.head_dim :], dgate)


def test_the_public_gradient_runs_the_backward_once():
    size = SIZES[0]
    arrays = size.arrays(2 * size.num_q_heads, size.num_kv_heads)

    def loss(*arrays):
        outputs = pallas_qk.fused_qk_rmsnorm_rope_gate(*arrays, None, None, **size.static)
        return sum(x.astype(jnp.float32).sum() for x in outputs)

    gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
    assert primitives(gradient, *arrays).count("fused_qk_rmsnorm_rope_gate_backward") == 1
    assert [x.dtype for x in gradient(*arrays)] == [x.dtype for x in arrays]
    q, k, *weights = arrays
    tangents = jax.jvp(
        lambda q: pallas_qk.fused_qk_rmsnorm_rope_gate(q, k, *weights, None, None, **size.static), (q,), (q,)
    )
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(tangents))


@pytest.mark.parametrize("size", SIZES[:3], ids=str)
def test_every_form_gives_one_result(size):
    """Packed or not, with or without gates, heads on an axis, mapped, and with a KV cache."""
    q_gate, k, v, *weights = size.arrays(2 * size.num_q_heads, size.num_kv_heads, size.num_kv_heads)
    t, d, static = size.num_tokens, size.head_dim, size.static
    nowhere = None, None
    want = pallas_qk.fused_qk_rmsnorm_rope_gate(q_gate, k, *weights, *nowhere, **static)
    q, gate = (x.reshape(t, -1) for x in jnp.split(q_gate.reshape(t, size.num_q_heads, 2 * d), 2, axis=-1))
    in_heads = [x.reshape(t, -1, w) for x, w in ((q_gate, 2 * d), (k, d))]
    got = pallas_qk.fused_qk_rmsnorm_rope_gate(*in_heads, *weights, *nowhere, **static, copy_gate=False)
    assert_same([x.reshape(t, -1) for x in got], want)
    assert_same(pallas_qk.fused_qk_rmsnorm_rope(q, k, *weights, *nowhere, **static), want[:2])
    packed = jnp.concatenate([q_gate, k, v], axis=-1)
    assert_same(pallas_qk.fused_qkv_rmsnorm_rope_gate(packed, *weights, *nowhere, **static), (*want[:2], v, gate))
    packed = jnp.concatenate([q, k, v], axis=-1)
    assert_same(pallas_qk.fused_qkv_rmsnorm_rope(packed, *weights, *nowhere, **static), (*want[:2], v))
    op = functools.partial(pallas_qk.fused_qk_rmsnorm_rope, **static)
    mapped = jax.vmap(lambda q, k: op(q[None], k[None], *weights, *nowhere))(q, k)
    assert_same([x[:, 0] for x in mapped], want[:2])
    cache = tuple(jnp.zeros((t, 1, size.num_kv_heads, d), size.dtype) for _ in "kv")
    outputs = pallas_qk.fused_qkv_rmsnorm_rope_cache(packed, *weights, *nowhere, cache, jnp.arange(t), **static)
    assert_same((outputs.q, *(x.reshape(t, -1) for x in outputs.kv_cache)), (*want[:2], v))


@pytest.mark.parametrize("mode", ["auto", "explicit, set_mesh"])
def test_tokens_and_heads_are_sharded(on_the_host, mode):
    size = Size(8, 4, 2, 64, "float32")
    q, k, *weights = size.arrays(size.num_q_heads, size.num_kv_heads)

    def op(*arrays):
        return pallas_qk.fused_qk_rmsnorm_rope(*arrays, None, None, **size.static)

    want = op(q, k, *weights)
    with mesh_of({"x": 2, "y": 2}, mode) as on:
        args = put(on, [q, k, *weights], [("x", "y"), ("x", "y"), (), ()])
        assert_same(jax.jit(op)(*args), want)


@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
def test_no_table_is_an_operand(implementation):
    """The kernel has two arrays of rows and two weights; q, k and the gate come back."""
    from tests.lowering import on_gpu

    size = SIZES[0]
    arrays = size.arrays(2 * size.num_q_heads, size.num_kv_heads)
    with on_gpu():
        traced = jax.jit(
            lambda *a: pallas_qk.fused_qk_rmsnorm_rope_gate(
                *a, None, None, **size.static, implementation=implementation
            )
        ).trace(*arrays)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    (call,) = [line for line in text.splitlines() if "custom_call @" in line and "Sharding" not in line]
    assert call.partition("(")[2].partition(")")[0].count("%") == 4


ERRORS = {
    "rotary_dim": ({"rotary_dim": 64}, "rotary_dim must be 0 or left out where cos_sin_cache is None, got 64."),
    "positions": (
        {"positions": jnp.arange(5)},
        "positions and mrope_section must be left out where cos_sin_cache is None, got positions.",
    ),
    "mrope_section": (
        {"mrope_section": (11, 11, 10)},
        "positions and mrope_section must be left out where cos_sin_cache is None, got mrope_section.",
    ),
    "rotary_dim of none": (
        {"cos_sin_cache": jnp.zeros((9, 64), jnp.bfloat16), "positions": jnp.arange(5), "rotary_dim": 0},
        "rotary_dim must be a positive even integer <= head_dim, got rotary_dim=0, head_dim=256.",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_fit_is_refused(name):
    changes, message = ERRORS[name]
    size = SIZES[0]
    q, k, *weights = size.arrays(2 * size.num_q_heads, size.num_kv_heads)
    arrays = {"q_gate": q, "k": k, "q_weight": weights[0], "k_weight": weights[1]}
    with pytest.raises(ValueError, match="must be") as caught:
        pallas_qk.fused_qk_rmsnorm_rope_gate(
            **{**arrays, "cos_sin_cache": None, "positions": None, **size.static, **changes}
        )
    assert str(caught.value).startswith(message)


def test_one_head_is_an_axis_of_heads():
    """(tokens, 1, 2 * D) could also be one head of `tokens` sequences of one token, flat: nothing else tells."""
    size = Size(5, 1, 1, 64, "float32")
    q, k, *weights = size.arrays(2, 1)
    outputs = pallas_qk.fused_qk_rmsnorm_rope_gate(q[:, None], k[:, None], *weights, None, None, **size.static)
    assert [x.shape for x in outputs] == [(5, 1, 64)] * 3


def test_the_choice_without_a_rotation():
    choice = pallas_qk.default_implementation(4, 16, 2, 256, 0, "bfloat16", platform="cpu")
    assert choice == pallas_qk.default_implementation(4, 16, 2, 256, np.int64(0), "bfloat16", platform="cpu")
    assert choice.name == "xla"


@pytest.mark.gpu
@pytest.mark.parametrize("size", [*SIZES, Size(4096, 16, 2, 256)], ids=str)
@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
def test_bits_are_the_oracle_s(gpu, implementation, size):
    from benchmarks.providers import to_jax, to_torch
    from torch_ref import triton_oracle

    arrays = size.arrays(2 * size.num_q_heads, size.num_kv_heads)
    tensors = map(to_torch, jax.block_until_ready(arrays))
    want = to_jax(triton_oracle.fused_qk_rmsnorm_rope_gate(*tensors, None, None, rotary_dim=0, **size.static))
    got = run_arrays(implementation, [*arrays, None, None], size.static, OPTIONS)
    if size.dtype == "float32" and size.head_dim <= 32:  # see `benchmarks.agreement.promise`
        for a, b in zip(got, want, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)
    else:
        assert_same(got, want)
