"""Rows that are rotated before they are normalised: in every implementation and form, with their gradients."""

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
from tests.lowering import GPU_IMPLEMENTATIONS, on_gpu
from tests.run import cached_kernel, primitives, run_arrays
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
    round_norm: bool = True
    mrope_section: tuple[int, int, int] | None = None

    @property
    def static(self) -> dict:
        own = dataclasses.asdict(self)
        return {name: own[name] for name in own if name not in ("num_tokens", "dtype")} | {
            "eps": EPS,
            "norm_beta": 1.0,
            "norm_order": "rotation_first",
        }

    @property
    def options(self) -> Options:
        kept = {name: x for name, x in self.static.items() if name not in ("num_q_heads", "num_kv_heads", "head_dim")}
        return Options(**kept | {"round_norm": self.round_norm or self.dtype == "float32"})

    def rows(self, *heads: int, seed: int = 0) -> list[jax.Array]:
        return random_normals([(self.num_tokens, n, self.head_dim) for n in heads], self.dtype, seed)

    def others(self) -> list[jax.Array]:
        """Weights, a table with an attention factor, and positions."""
        rng = np.random.default_rng(3)
        weights = [jnp.asarray(0.2 * rng.standard_normal(self.head_dim), jnp.float32) for _ in "qk"]
        table = np.float32(1.25) * np.asarray(cos_sin_table(64, self.rotary_dim, "float32"))
        shape = (self.num_tokens,) if self.mrope_section is None else (3, self.num_tokens)
        positions = jnp.asarray(rng.integers(0, 64, shape, np.int32))
        return [*weights, jnp.asarray(table.astype(jnp.dtype(self.dtype))), positions]

    def arguments(self) -> list[jax.Array]:
        """Of the function with gates, flat."""
        q, gate, k = self.rows(self.num_q_heads, self.num_q_heads, self.num_kv_heads)
        q_gate = jnp.concatenate([q, gate], axis=-1)
        return [x.reshape(self.num_tokens, -1) for x in (q_gate, k)] + self.others()


SIZES = (
    Size(5, 3, 2, 256, 64),
    Size(7, 2, 1, 80, 40, "float16"),
    Size(65, 2, 1, 128, 128, "float32", "pairs"),
    Size(6, 3, 2, 96, 6, "float16", "pairs"),
    Size(5, 2, 1, 64, 6, "float32"),
    Size(5, 2, 1, 64, 4, "float16", round_norm=False),
    Size(4, 2, 1, 512, 512, round_norm=False),
    Size(9, 2, 1, 128, 128, "float16", "pairs", round_norm=False),
    Size(5, 4, 2, 128, 64, "float16", mrope_section=(16, 8, 8)),
    Size(5, 2, 1, 96, 48, mrope_section=(8, 8, 8), rotation="pairs"),
)
# Of Triton's backward the partners of a pair must lie in one thread.
RUNS = [
    (name, size)
    for name in IMPLEMENTATIONS
    for size in SIZES
    if name != "triton" or size.rotation == "pairs" or (size.head_dim not in (80,) and size.rotary_dim not in (6,))
]


def angles(size: Size, table, positions) -> tuple[np.ndarray, np.ndarray]:
    """float64 (T, 1, R/2)."""
    half = size.rotary_dim // 2
    section = size.mrope_section or (half, 0, 0)
    axis = [a if (a := j % 3) and j < 3 * section[a] else 0 for j in range(half)]
    rows = np.atleast_2d(np.asarray(positions))[axis].T
    wide = np.asarray(table).astype(np.float64)
    return wide[rows, np.arange(half)][:, None], wide[rows, half + np.arange(half)][:, None]


def rotate(size: Size, x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
    half, pairs = size.rotary_dim // 2, size.rotation == "pairs"
    a, b = (x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]) if pairs else (x[..., :half], x[..., half : 2 * half])
    rotated = np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1 if pairs else -2)
    return np.concatenate([rotated.reshape(*x.shape[:-1], 2 * half), x[..., 2 * half :]], axis=-1)


def run(implementation: str, size: Size, arrays) -> list:
    return run_arrays(implementation, arrays, size.static, size.options)


@pytest.mark.parametrize("implementation, size", RUNS, ids=str)
def test_the_norm_is_of_what_is_rotated(implementation, size):
    q_gate, k, q_weight, k_weight, table, positions = size.arguments()
    got = run(implementation, size, [q_gate, k, q_weight, k_weight, table, positions])
    cos, sin = angles(size, table, positions)
    q_and_gate = np.asarray(q_gate).reshape(size.num_tokens, size.num_q_heads, 2, size.head_dim)
    of_k = np.asarray(k).reshape(size.num_tokens, size.num_kv_heads, size.head_dim)
    roundoff = ROUNDOFF[size.dtype]
    between = roundoff if size.round_norm and size.dtype != "float32" else 0.0
    for out, x, weight in ((got[0], q_and_gate[:, :, 0], q_weight), (got[1], of_k, k_weight)):
        x = x.astype(np.float64)
        z, length = rotate(size, x, cos, sin), rotate(size, abs(x), abs(cos), -abs(sin))
        length = np.maximum(length, abs(rotate(size, abs(x), abs(cos), abs(sin))))
        factor = (np.asarray(weight).astype(np.float64) + 1) / np.sqrt(np.mean(z * z, axis=-1, keepdims=True) + EPS)
        # z is rounded, y is; 20 roundoffs of float32 lie in between. The mean of squares averages what is rounded.
        bound = (between * (abs(z) + np.max(abs(z)) / 8) + 20 * ROUNDOFF["float32"] * length) * abs(factor)
        bound = (1 + roundoff) * bound + roundoff * abs(z * factor) + 3 * SMALLEST[size.dtype]
        assert_within("rows", out, (z * factor).reshape(out.shape), bound.reshape(out.shape))
    assert_same(got[2], jnp.asarray(q_and_gate[:, :, 1].reshape(got[2].shape)))


@pytest.mark.parametrize("implementation, size", RUNS, ids=str)
def test_gradients(implementation, size):
    q_gate, k, q_weight, k_weight, table, positions = size.arguments()
    t, heads = size.num_tokens, (size.num_q_heads, size.num_kv_heads, size.num_q_heads)
    dq, dk, dgate = size.rows(*heads, seed=5)
    rows = q_gate.reshape(t, size.num_q_heads, -1), k.reshape(t, size.num_kv_heads, -1)
    inputs = _rows.Inputs(*rows, q_weight, k_weight, table, jnp.atleast_2d(positions))
    got = cached_kernel("backward", implementation, size.options, False)(inputs, _rows.Outputs(dq, dk, gate=dgate))
    cos, sin = angles(size, table, positions)
    d, unit = size.head_dim, 2 * ROUNDOFF[size.dtype]
    assert_same(jnp.asarray(got.q)[..., d:], dgate)
    for x, weight, dout, dx, dweight in (
        (rows[0][..., :d], q_weight, dq, np.asarray(got.q)[..., :d], got.q_weight),
        (rows[1], k_weight, dk, got.k, got.k_weight),
    ):
        x, dout = (np.asarray(a).astype(np.float64) for a in (x, dout))
        z = rotate(size, x, cos, sin)
        r = 1 / np.sqrt(np.mean(z * z, axis=-1, keepdims=True) + EPS)
        g = dout * (np.asarray(weight).astype(np.float64) + 1)
        exact = rotate(size, r * (g - z * r * r * np.mean(g * z, axis=-1, keepdims=True)), cos, -sin)
        assert_within("rows", jnp.asarray(dx), exact, unit * abs(exact) + 2.0**-18 * abs(exact).max())
        of_weight = (dout * z * r).sum(axis=(0, 1))
        np.testing.assert_allclose(dweight, of_weight, rtol=1e-4, atol=1e-4 * abs(of_weight).max())


def test_the_public_gradient_is_the_kernel_s():
    """One backward, whose table gradient too is that of autodiff of the definition in float32."""
    size = Size(5, 3, 2, 64, 32, "float32")
    q_gate, k, q_weight, k_weight, table, positions = size.arguments()

    def op(*args):
        return pallas_qk.fused_qk_rmsnorm_rope_gate(*args, positions, **size.static)[:2]

    def plain(q_gate, k, q_weight, k_weight, table):
        cos, sin = jnp.split(table[positions][:, None], 2, axis=-1)

        def of_rows(x, weight):
            x = x.reshape(5, -1, 64)
            a, b, rest = x[..., :16], x[..., 16:32], x[..., 32:]
            z = jnp.concatenate([a * cos - b * sin, a * sin + b * cos, rest], axis=-1)
            y = z * jax.lax.rsqrt(jnp.mean(z * z, axis=-1, keepdims=True) + EPS)
            return (y * (weight + 1).reshape(1, 1, -1)).reshape(5, -1)

        return of_rows(q_gate.reshape(5, 3, 2, 64)[:, :, 0], q_weight), of_rows(k, k_weight)

    args = q_gate, k, q_weight, k_weight, table

    def loss(function):
        return lambda *args: sum((x**3).sum() for x in function(*args))

    gradient = jax.grad(loss(op), argnums=range(5))
    assert primitives(gradient, *args).count("fused_qk_rmsnorm_rope_gate_backward") == 1
    for got, want in zip(gradient(*args), jax.grad(loss(plain), argnums=range(5))(*args), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
    tangents = jax.jvp(op, args, args)[1], jax.jvp(plain, args, args)[1]
    for got, want in zip(*tangents, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
def test_a_row_that_is_rotated_first_is_rounded(implementation):
    """As plain XLA rounds it; the same row that isn't rounded there has other elements in every fiftieth place."""
    size = SIZES[0]
    got = run(implementation, size, size.arguments())[0]
    rounded, unrounded = (
        run("xla", dataclasses.replace(size, round_norm=each), size.arguments())[0] for each in (True, False)
    )
    assert (np.asarray(got) != np.asarray(rounded)).mean() < 0.002
    assert (np.asarray(got) != np.asarray(unrounded)).mean() > 0.02


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_position_past_the_table_spoils_its_token_alone(implementation):
    size = SIZES[0]
    *arrays, positions = size.arguments()
    want = run(implementation, size, [*arrays, positions])
    got = run(implementation, size, [*arrays, positions.at[2].set(64)])
    for a, b in zip(got[:2], want[:2], strict=True):
        assert np.isnan(np.asarray(a[2], np.float32)).all()
        assert_same(jnp.delete(a, 2, axis=0), jnp.delete(b, 2, axis=0))
    assert_same(got[2], want[2])
    padded = run(implementation, size, [*arrays, positions.at[2].set(-1)])
    assert_same(padded, run(implementation, size, [*arrays, positions.at[2].set(0)]))


@pytest.mark.parametrize("size", [SIZES[0], SIZES[3], SIZES[7]], ids=str)
def test_every_form_gives_one_result(size):
    q_gate, k, *others = size.arguments()
    (v,), t, d, static = size.rows(size.num_kv_heads, seed=9), size.num_tokens, size.head_dim, size.static
    want = pallas_qk.fused_qk_rmsnorm_rope_gate(q_gate, k, *others, **static)
    v = v.reshape(t, -1)
    packed = jnp.concatenate([q_gate, k, v], axis=-1)
    got = pallas_qk.fused_qkv_rmsnorm_rope_gate(packed, *others, **static, copy_gate=False)
    assert_same(got, (*want[:2], v, want[2]))
    q = q_gate.reshape(t, -1, 2, d)[:, :, 0].reshape(t, -1)
    assert_same(pallas_qk.fused_qk_rmsnorm_rope(q, k, *others, **static), want[:2])
    *weights, table, positions = others

    def of_a_token(q, k, position):
        return pallas_qk.fused_qk_rmsnorm_rope(q[None], k[None], *weights, table, position[None], **static)

    assert_same([x[:, 0] for x in jax.vmap(of_a_token)(q, k, positions)], want[:2])
    cache = tuple(jnp.zeros((t, 1, size.num_kv_heads, d), size.dtype) for _ in "kv")
    outputs = pallas_qk.fused_qkv_rmsnorm_rope_gate_cache(packed, *others, cache, jnp.arange(t), **static)
    assert_same((outputs.q, outputs.gate), (want[0], want[2]))
    assert_same([x.reshape(t, -1) for x in outputs.kv_cache], [want[1], v])


@pytest.mark.parametrize("mode", ["auto", "explicit, set_mesh"])
def test_sharded(on_the_host, mode):
    size = Size(8, 4, 2, 64, 32, "float32")
    q_gate, k, *others = size.arguments()

    def op(*args):
        return pallas_qk.fused_qk_rmsnorm_rope_gate(*args, **size.static)

    want = op(q_gate, k, *others)
    with mesh_of({"x": 2, "y": 2}, mode) as on:
        args = put(on, [q_gate, k, *others], [("x", "y"), ("x", "y"), (), (), (), ("x",)])
        assert_same(jax.jit(op)(*args), want)


def test_float32_and_no_table_take_it():
    """round_norm changes nothing for float32, and without a rotation there is one order."""
    size = dataclasses.replace(SIZES[0], dtype="float32")
    args = size.arguments()
    want = pallas_qk.fused_qk_rmsnorm_rope_gate(*args, **size.static)
    assert_same(pallas_qk.fused_qk_rmsnorm_rope_gate(*args, **size.static | {"round_norm": False}), want)
    static = {name: x for name, x in size.static.items() if name != "rotary_dim"}
    got = pallas_qk.fused_qk_rmsnorm_rope_gate(*args[:4], None, None, **static)
    assert_same(
        got, pallas_qk.fused_qk_rmsnorm_rope_gate(*args[:4], None, None, **static | {"norm_order": "norm_first"})
    )


def test_the_choice():
    with on_gpu():
        choice = pallas_qk.default_implementation(
            4, 2, 1, 80, 40, "float16", norm_order="rotation_first", platform="cuda"
        )
        assert choice.name in ("mosaic_gpu", "xla")
        assert (
            "with the rotation first it needs a head_dim and a rotary_dim that are powers" in choice.not_taken["triton"]
        )
    with pytest.raises(ValueError, match="norm_order must be 'norm_first' or 'rotation_first', got 'last'"):
        pallas_qk.fused_qk_rmsnorm_rope_gate(*SIZES[0].arguments(), **SIZES[0].static | {"norm_order": "last"})


def of_the_oracle(size: Size, device: str):
    pytest.importorskip("torch", reason="runs the oracle")
    from benchmarks.providers import from_torch, to_torch
    from torch_ref import triton_oracle

    args = jax.block_until_ready(size.arguments())
    tensors = [to_torch(x) for x in args]
    assert {x.device.type for x in tensors} == {device}
    return [from_torch(x) for x in triton_oracle.fused_qk_rmsnorm_rope_gate(*tensors, **size.static)]


def test_the_interpreted_oracle_agrees(on_the_host):
    size = SIZES[3]
    pytest.importorskip("triton", reason="runs the oracle")
    for a, b in zip(of_the_oracle(size, "cpu"), run("xla", size, size.arguments()), strict=True):
        differing = np.asarray(a) != np.asarray(b)
        assert differing.mean() < 0.01
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "implementation, size",
    [(name, size) for name, size in RUNS if name != "xla"]
    + [(name, Size(4096, 16, 2, 256, 64)) for name in GPU_IMPLEMENTATIONS],
    ids=str,
)
def test_bits_are_the_oracle_s(gpu, implementation, size):
    assert_same(run(implementation, size, size.arguments()), of_the_oracle(size, "cuda"))
