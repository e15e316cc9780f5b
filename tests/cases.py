"""The cases that tests and benchmarks share, and the inputs and cotangents of one case.

T num_tokens, Hq num_q_heads, Hkv num_kv_heads, D head_dim, R rotary_dim.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration of the op. None as a dtype means the dtype of the activations."""

    num_tokens: int
    num_q_heads: int = 16
    num_kv_heads: int = 2
    head_dim: int = 256
    rotary_dim: int = 64  # 0: nothing is rotated, without table and positions
    dtype: str = "bfloat16"
    weight_dtype: str | None = None
    cache_dtype: str | None = None
    positions_dtype: str = "int32"
    mrope_section: tuple[int, int, int] | None = None
    norm_beta: float = 0.0
    eps: float = 1e-6
    max_position: int = 4096
    scale: float = 1.0
    weight_scale: float = 1.0
    # The form of the call, see tests/forms.py; the inputs of `make_inputs` and the definition are those of the first.
    gate: str | None = "copied"  # "in_place": copy_gate=False; "handed_on": "never"; None: q without gates
    packed: bool = False  # q, k and v in one array
    separate_v: bool = False  # v given beside q and k
    q_alone: bool = False  # without k
    weights: bool = True  # else none is given, and the inputs have ones in their place
    gathered: bool = False  # a row of the table for each token instead of positions
    mrope_layout: Literal["interleaved", "sectioned"] = "interleaved"
    rotation: Literal["halves", "pairs"] = "halves"
    round_norm: bool = True
    norm_order: Literal["norm_first", "rotation_first"] = "norm_first"
    v_norm: bool = False  # of v, where there is one
    attention_factor: float = 1.0  # of cos and sin in the table, as YaRN has it
    negated_sines: bool = False  # in the table: a rotation the other way round

    @property
    def id(self) -> str:
        """A short name for test ids and tables: the fields that differ from the default follow the shape."""
        shape = f"T{self.num_tokens}-H{self.num_q_heads}.{self.num_kv_heads}-D{self.head_dim}-R{self.rotary_dim}"
        shown = {"num_tokens", "num_q_heads", "num_kv_heads", "head_dim", "rotary_dim", "dtype"}
        rest = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name not in shown and getattr(self, field.name) != field.default
        ]
        return "-".join([shape, self.dtype, *rest]).replace(" ", "")

    @property
    def static_arguments(self) -> dict[str, object]:
        """The arguments of the op that are not arrays, by name; options where they aren't the default."""
        return {
            "eps": self.eps,
            "num_q_heads": self.num_q_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "rotary_dim": self.rotary_dim,
            "mrope_section": self.mrope_section,
            "norm_beta": self.norm_beta,
        } | {
            field.name: value
            for field in dataclasses.fields(self)
            if field.name in ("rotation", "round_norm", "norm_order")
            and (value := getattr(self, field.name)) != field.default
        }

    @property
    def num_outputs(self) -> int:
        """Elements of q_out, k_out and gate_out together."""
        return self.num_tokens * (2 * self.num_q_heads + self.num_kv_heads) * self.head_dim


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The array arguments of the op, in its order."""

    q_gate: jax.Array
    k: jax.Array
    q_weight: jax.Array
    k_weight: jax.Array
    cos_sin_cache: jax.Array | None  # None where nothing is rotated
    positions: jax.Array | None

    def __iter__(self):
        return iter(getattr(self, field.name) for field in dataclasses.fields(self))

    def map(self, function: Callable) -> "Inputs":
        """`function` of each array that there is."""
        return Inputs(*(x if x is None else function(x) for x in self))


def cos_sin_table(max_position: int, rotary_dim: int, dtype, theta: float = 1e7) -> jax.Array:
    """(max_position, R) rows of [cos | sin], computed in float64 and rounded once."""
    return jnp.asarray(_table(_angles(max_position, rotary_dim, theta), dtype))


def _angles(max_position: int, rotary_dim: int, theta: float = 1e7) -> np.ndarray:
    frequencies = theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)
    return np.arange(max_position, dtype=np.float64)[:, None] * frequencies


def _table(angles: np.ndarray, dtype, cos_factor: float = 1.0, sin_factor: float = 1.0) -> np.ndarray:
    table = np.concatenate([cos_factor * np.cos(angles), sin_factor * np.sin(angles)], axis=1)
    return table.astype(np.float32).astype(jnp.dtype(dtype))


def table_of(case: Case, angles: np.ndarray | None = None) -> np.ndarray | None:
    """The case's table; `angles` (max_position, R/2) stand in for those of `cos_sin_table`."""
    if not case.rotary_dim:
        return None
    if angles is None:
        angles = _angles(case.max_position, case.rotary_dim)
    sin_factor = -case.attention_factor if case.negated_sines else case.attention_factor
    return _table(angles, case.cache_dtype or case.dtype, case.attention_factor, sin_factor)


# Up to so many elements random arrays come from NumPy: JAX compiles the draw for every shape, which takes longer.
DRAWN_BY_NUMPY = 1 << 22


def random_normal(shape: tuple[int, ...], dtype, seed: int) -> jax.Array:
    """float32 normals rounded to `dtype`, on the default device."""
    if math.prod(shape) > DRAWN_BY_NUMPY:
        return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)
    return random_normals([shape], dtype, seed)[0]


def random_normals(shapes, dtype, seed: int = 0) -> list[jax.Array]:
    """float32 normals of one generator, one array after another, rounded to `dtype`."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))) for shape in shapes]


def numpy_inputs(case: Case, seed: int = 0) -> Inputs:
    """`make_inputs` of a small case as NumPy arrays, which keep 64-bit positions whatever JAX is set to."""
    rng = np.random.default_rng(seed)
    heads = 2 * case.num_q_heads, case.num_kv_heads
    q_gate, k = (rng.standard_normal((case.num_tokens, h * case.head_dim), np.float32) for h in heads)
    weights = rng.standard_normal((2, case.head_dim), np.float32)
    positions = rng.integers(0, case.max_position, _positions_shape(case), np.int32)
    return _scaled(case, q_gate, k, weights, table_of(case), positions)


@functools.partial(jax.jit, static_argnames=("case",))
def _random_arrays(key: jax.Array, case: Case):
    keys = jax.random.split(key, 5)
    heads = 2 * case.num_q_heads, case.num_kv_heads
    q_gate, k = (
        jax.random.normal(key, (case.num_tokens, h * case.head_dim), jnp.float32)
        for key, h in zip(keys[:2], heads, strict=True)
    )
    weights = jax.random.normal(keys[2], (2, case.head_dim), jnp.float32)
    positions = jax.random.randint(keys[3], _positions_shape(case), 0, case.max_position, jnp.int32)
    return list(_scaled(case, q_gate, k, weights, None, positions))


def _scaled(case: Case, q_gate, k, weights, cache, positions) -> Inputs:
    """The inputs from standard normals and positions, of NumPy or of JAX."""
    dtype, weight_dtype = jnp.dtype(case.dtype), jnp.dtype(case.weight_dtype or case.dtype)
    q_gate, k = ((case.scale * x).astype(dtype) for x in (q_gate, k))
    weights = case.weight_scale * (1 + 0.2 * weights) - case.norm_beta if case.weights else 0 * weights + 1
    q_weight, k_weight = weights.astype(weight_dtype)
    positions = positions.astype(case.positions_dtype) if case.rotary_dim else None
    return Inputs(q_gate, k, q_weight, k_weight, cache, positions)


def _positions_shape(case: Case) -> tuple[int, ...]:
    return (case.num_tokens,) if case.mrope_section is None else (3, case.num_tokens)


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Random inputs of one case on the default device; the same values for the same seed.

    Positions are random, in random order and repeated; with mRoPE the three rows differ.
    """
    if case.num_outputs <= DRAWN_BY_NUMPY:
        return numpy_inputs(case, seed).map(jnp.asarray)
    q_gate, k, q_weight, k_weight, _, positions = _random_arrays(jax.random.key(seed), case)
    return Inputs(q_gate, k, q_weight, k_weight, table_of(case), positions).map(jnp.asarray)


def make_cotangents(case: Case, seed: int = 0) -> tuple[jax.Array, ...]:
    """Random cotangents of q_out, k_out and gate_out, (T, heads*D), on the default device."""
    heads = (case.num_q_heads, case.num_kv_heads, case.num_q_heads)
    shapes = [(case.num_tokens, h * case.head_dim) for h in heads]
    return tuple(random_normal(shape, case.dtype, 3 * seed + 100 + i) for i, shape in enumerate(shapes))


# One feature or awkward size a case: small enough for interpret mode, together every branch of every layout.
SMALL_CASES = (
    Case(1),
    Case(2, dtype="float16"),
    Case(37, 8, 2),
    Case(5, dtype="float32"),
    Case(129, 1, 1),
    Case(7, 3, 1, head_dim=80, rotary_dim=40, dtype="float16"),
    Case(6, 5, 2, head_dim=80, rotary_dim=80),
    Case(9, 6, 3, head_dim=96, rotary_dim=96, dtype="float16", cache_dtype="float32"),
    Case(4, 12, 1, head_dim=128, rotary_dim=128, weight_dtype="float32"),
    Case(3, 2, 5, head_dim=128, rotary_dim=64, norm_beta=1.0),
    Case(3, 1, 2, head_dim=32, rotary_dim=2, dtype="float16"),
    Case(3, 2, 1, head_dim=64, rotary_dim=6),
    Case(2, 3, 2, head_dim=192, rotary_dim=48, dtype="float32"),
    Case(2, 1, 3, head_dim=512, rotary_dim=256, cache_dtype="float32", weight_dtype="float32"),
    Case(11, 24, 4, mrope_section=(11, 11, 10)),
    Case(7, 3, 1, mrope_section=(18, 5, 9)),  # both limits fall inside the table
    Case(5, 4, 2, head_dim=128, rotary_dim=64, mrope_section=(16, 8, 8), dtype="float16", norm_beta=1.0),
    Case(3, 4, 4, head_dim=128, rotary_dim=128, mrope_section=(24, 20, 20), cache_dtype="float32"),
    Case(23, 16, 2, rotary_dim=256, weight_dtype="float32", cache_dtype="float32"),
    Case(3, 2, 1, head_dim=64, rotary_dim=32, dtype="float32", weight_dtype="bfloat16", cache_dtype="float16"),
    Case(4, 3, 2, head_dim=64, rotary_dim=6, dtype="float16", weight_dtype="bfloat16", cache_dtype="bfloat16"),
    Case(5, 2, 1, head_dim=24, rotary_dim=6, dtype="float32", weight_dtype="float16", cache_dtype="bfloat16"),
    Case(3, 4, 2, mrope_section=(11, 11, 10), weight_dtype="float16", cache_dtype="float16"),
    Case(6, scale=1e4),
    Case(6, scale=1e-20, dtype="float32"),
    Case(6, weight_scale=1e-5, dtype="float16"),
    Case(5, 3, 2, rotation="pairs"),
    Case(7, 3, 1, head_dim=80, rotary_dim=40, dtype="float16", rotation="pairs"),
    Case(6, 5, 2, head_dim=96, rotary_dim=6, norm_beta=1.0, rotation="pairs"),
    Case(4, 2, 1, head_dim=128, rotary_dim=128, dtype="float32", cache_dtype="float16", rotation="pairs"),
    Case(3, 4, 2, mrope_section=(11, 11, 10), cache_dtype="float32", rotation="pairs"),
    Case(9, 3, 2, round_norm=False),
    Case(4, 2, 1, head_dim=80, rotary_dim=80, dtype="float16", round_norm=False),
    Case(3, 2, 1, head_dim=64, rotary_dim=32, dtype="float32", round_norm=False),
    Case(5, 4, 2, head_dim=128, rotary_dim=64, mrope_section=(16, 8, 8), round_norm=False, rotation="pairs"),
    Case(4, 2, 1, head_dim=64, rotary_dim=32, dtype="float16", attention_factor=1.1386294361119891, negated_sines=True),
)

# Without a rotation, and with the rotation first.
ORDER_CASES = (
    Case(5, 3, 2, rotary_dim=0, norm_beta=1.0),
    Case(7, 3, 2, head_dim=80, rotary_dim=0, dtype="float16", weight_dtype="float32"),
    Case(4, 2, 3, head_dim=512, rotary_dim=0, dtype="float32", weight_dtype="float16"),
    Case(5, 3, 2, norm_order="rotation_first", norm_beta=1.0, attention_factor=1.25),
    Case(6, 3, 2, head_dim=96, rotary_dim=6, dtype="float16", rotation="pairs", norm_order="rotation_first"),
    Case(4, 2, 1, 512, 512, round_norm=False, norm_order="rotation_first", weight_dtype="float32"),
    Case(5, 4, 2, 128, 64, "float16", mrope_section=(16, 8, 8), norm_order="rotation_first"),
    Case(3, 2, 1, 64, 4, "float32", norm_order="rotation_first", cache_dtype="bfloat16"),
)

# Each kind of vector that a thread of the Mosaic GPU kernels may hold, and sections that end inside one.
LAYOUT_CASES = (
    *(
        Case(5, 3, 2, head_dim=head_dim, rotary_dim=rotary_dim, dtype=dtype, eps=1e-3 if head_dim < 32 else 1e-6)
        for head_dim in (2, 3, 6, 16, 32, 64, 80, 96, 128, 192, 256, 512)
        for rotary_dim in sorted({2, 6, 40, head_dim // 4, head_dim // 2, head_dim})
        for dtype in ("bfloat16", "float16", "float32")
        if 2 <= rotary_dim <= head_dim and rotary_dim % 2 == 0 and (head_dim in (80, 256) or dtype != "float16")
    ),
    *(
        Case(7, 3, 2, head_dim, rotary_dim, dtype, eps=1e-3 if head_dim < 32 else 1e-6, rotation="pairs")
        for head_dim in (2, 6, 16, 64, 80, 96, 128, 256, 512)
        for rotary_dim in sorted({2, head_dim // 4, head_dim})
        for dtype in ("bfloat16", "float32")
        if rotary_dim >= 2 and rotary_dim % 2 == 0
    ),
    Case(65, 12, 1, head_dim=8, rotary_dim=4),  # rows enough for chunks, and a row for every thread
    *(  # rows enough for chunks of pairs
        Case(65, 8, 2, head_dim, rotary_dim, dtype, rotation="pairs", round_norm=dtype == "bfloat16")
        for head_dim, rotary_dim in ((256, 64), (128, 128))
        for dtype in ("bfloat16", "float16", "float32")
    ),
    Case(5, 3, 2, mrope_section=(18, 7, 7)),
    Case(5, 3, 2, head_dim=96, rotary_dim=96, mrope_section=(37, 3, 8), dtype="float16"),
    Case(5, 3, 2, head_dim=96, rotary_dim=96, mrope_section=(37, 3, 8), dtype="float16", rotation="pairs"),
)
