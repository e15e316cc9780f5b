"""The cases that hypothesis draws, and their inputs: for the property tests and for `tests.fuzz`.

T num_tokens, Hq num_q_heads, Hkv num_kv_heads, D head_dim, R rotary_dim.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from tests import cached, forms, fp8
from tests.cached import CachedCase, Data
from tests.cases import Case, Inputs, table_of
from tests.definition import axes, lanes_in_halves

DTYPES = ("bfloat16", "float16", "float32")
# Of rows on their way into a cache of 8 bits: a power of two, not one, what makes codes 0 or the largest, NaN of zeros.
KV_SCALES = (1.0, 0.37, 1 / 3, 1e-3, 448.0, -2.0, 1e30, 0.0)
POSITION_DTYPES = ("int32", "int64", "int8", "int16", "uint8", "uint16", "uint32", "uint64")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Which sizes are drawn. Each pair of D and R is a few compiled kernels, so that a short list is a quick one."""

    tokens: tuple[int, ...]
    heads: tuple[tuple[int, int], ...]  # (Hq, Hkv)
    dims: tuple[tuple[int, int], ...]  # (D, R)
    max_positions: tuple[int, ...]
    block_sizes: tuple[int, ...]  # of KV caches
    most_elements: int  # of the outputs; more tokens than that are cut


TINY = Sizes(
    tokens=(7, 3, 2, 1),  # hypothesis starts with the first of each
    heads=((3, 2), (2, 1), (1, 3), (1, 1)),
    dims=((16, 8), (16, 16), (12, 6), (6, 2), (40, 8), (64, 16)),
    max_positions=(40, 300),
    block_sizes=(4, 1, 3, 8),
    most_elements=1 << 14,
)
# Sizes that break kernels like these: for T powers of two, their neighbours and primes, for D no powers of two, for R
# all of D and parts of it, whose halves are no powers of two either.
_ROTARY_DIMS = {
    256: (64, 256, 128, 2, 6, 40, 96),
    128: (128, 64, 32),
    64: (64, 16, 6),
    32: (32, 8, 2),
    80: (80, 40, 20),
    96: (96, 48),
    192: (48, 192),
    512: (512, 128, 64),
    40: (40,),
    24: (6,),
    16: (16,),
    8: (4,),
}
WIDE = Sizes(
    tokens=(64, 1, 2, 3, 5, 16, 37, 63, 65, 127, 128, 129, 251, 512, 1021, 1024, 2048, 4095, 4096, 8191, 16384, 65536),
    heads=(
        (16, 2),
        (32, 2),
        (1, 1),
        (2, 1),
        (3, 1),
        (5, 2),
        (6, 3),
        (12, 1),
        (24, 4),
        (32, 8),
        (2, 5),
        (1, 7),
        (15, 1),
    ),
    dims=tuple((head_dim, rotary_dim) for head_dim, each in _ROTARY_DIMS.items() for rotary_dim in each),
    max_positions=(4096, 1, 100, 200, 40_000, 70_000),
    block_sizes=(16, 1, 3, 7, 64, 100, 256),
    most_elements=1 << 24,
)


@st.composite
def cases(draw, sizes: Sizes) -> Case:
    """One configuration of the op in one of its forms."""

    def seldom() -> bool:
        return draw(st.sampled_from([False, False, False, True]))

    num_q_heads, num_kv_heads = draw(st.sampled_from(sizes.heads))
    head_dim, rotary_dim = draw(st.sampled_from(sizes.dims))
    rotary_dim = 0 if seldom() else rotary_dim
    most_tokens = max(1, sizes.most_elements // ((2 * num_q_heads + num_kv_heads) * head_dim))
    gathered = rotary_dim > 0 and seldom()
    mrope_section, mrope_layout = None, "interleaved"
    if rotary_dim and not gathered and draw(st.booleans()):
        mrope_section = draw(_sections(rotary_dim // 2))
        mrope_layout = draw(st.sampled_from(["interleaved", "sectioned"]))
    packed = draw(st.sampled_from([False, False, True]))
    separate_v = not packed and seldom()  # as it is, it passes by the kernels
    q_alone = not (packed or separate_v) and seldom()
    weights = not seldom()
    gates = ["copied", "in_place", None] if packed else ["copied", "copied", "in_place", None]
    scale, weight_scale, eps = draw(_scales())
    return Case(
        num_tokens=min(most_tokens, draw(st.sampled_from(sizes.tokens))),
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rotary_dim=rotary_dim,
        dtype=draw(st.sampled_from(DTYPES)),
        weight_dtype=draw(st.sampled_from([None, *DTYPES])),
        cache_dtype=draw(st.sampled_from([None, *DTYPES])),
        positions_dtype="int32" if gathered else draw(st.sampled_from(POSITION_DTYPES)),
        mrope_section=mrope_section,
        norm_beta=draw(st.sampled_from([0.0, 1.0, 0.5])) if weights else 0.0,
        eps=eps,
        max_position=draw(st.sampled_from(sizes.max_positions)),
        scale=scale,
        weight_scale=weight_scale,
        gate=draw(st.sampled_from(gates)),
        packed=packed,
        separate_v=separate_v,
        q_alone=q_alone,
        weights=weights,
        gathered=gathered,
        mrope_layout=mrope_layout,
        rotation=draw(st.sampled_from(["halves", "halves", "pairs"])),
        round_norm=draw(st.sampled_from([True, True, False])),
        norm_order=draw(st.sampled_from(["norm_first", "norm_first", "rotation_first"])),
        v_norm=separate_v or (packed and draw(st.booleans())),
        attention_factor=draw(st.sampled_from([1.0, 1.0, 1.1386294361119891, 0.75])),
        negated_sines=draw(st.sampled_from([False, False, False, True])),
    )


@st.composite
def cached_cases(draw, sizes: Sizes) -> CachedCase:
    """A call that writes a KV cache: any layout and dtype, places for all tokens or some, a layer inside or outside."""
    case = dataclasses.replace(draw(cases(sizes)), separate_v=False, q_alone=False, v_norm=draw(st.booleans()))
    cache_axes, num_layers = draw(_cache_axes()), 3
    # With an integer that holds no slot outside the cache, each token has one.
    slots_dtype = draw(st.sampled_from(POSITION_DTYPES))
    block_size = draw(st.sampled_from(sizes.block_sizes))
    row_of_every_layer = 2 * num_layers * case.num_kv_heads * case.head_dim
    places = draw(st.sampled_from([2.0, 1.0, 0.5])) * case.num_tokens
    num_blocks = max(1, int(min(places, sizes.most_elements // row_of_every_layer)) // block_size)
    if not no_slots(slots_dtype, num_blocks * block_size):
        case = dataclasses.replace(case, num_tokens=min(case.num_tokens, np.iinfo(slots_dtype).max + 1))
    kv_dtype, scales = draw(st.sampled_from([None, None, *DTYPES, *2 * fp8.NAMES])), {}
    if kv_dtype in fp8.NAMES:
        per_head = draw(st.tuples(st.booleans(), st.booleans()))
        scales = {"scale": draw(st.sampled_from(KV_SCALES)), "scale_per_head": per_head}
    return CachedCase(
        case,
        cache_axes,
        kv_dtype=kv_dtype,
        num_blocks=num_blocks,
        block_size=block_size,
        num_layers=num_layers,
        layer=draw(st.sampled_from([1, 0, 2, 3, -1, -3, 2**31 - 1, -(2**31)])) if "l" in cache_axes else 1,
        return_kv=draw(st.booleans()),
        slots_dtype=slots_dtype,
        **scales,
    )


@st.composite
def _cache_axes(draw) -> str:
    """Every order of the axes that is allowed."""
    both = draw(st.sampled_from([None, "c", "hc", "ch", "cd"]))
    axes = ["b", "s", "(h c)" if both == "hc" else "(c h)" if both == "ch" else "h", *(["c"] if both == "c" else [])]
    layers = draw(st.sampled_from([[], [], ["l"]]))
    return " ".join([*layers, *draw(st.permutations(axes)), "(c d)" if both == "cd" else "d"])


def calls(sizes: Sizes) -> st.SearchStrategy[Case | CachedCase]:
    return st.one_of(cases(sizes), cached_cases(sizes))


@st.composite
def _sections(draw, half: int) -> tuple[int, int, int]:
    """Three counts that sum to R/2: equal ones, as the interleaved layout wants them, or any."""
    if draw(st.booleans()):
        height = width = half // 3
    else:
        height = draw(st.integers(0, half))
        width = draw(st.integers(0, half - height))
    return half - height - width, height, width


@st.composite
def _scales(draw) -> tuple[float, float, float]:
    """Of activations and of weights, and eps: with eps 0 nothing else keeps tiny rows from dividing by zero."""
    scale = draw(st.sampled_from([1.0, 1.0, 30.0, 1e3, 1e-3, 1e-20]))
    weight_scale = draw(st.sampled_from([1.0, 1.0, 1.0, 1e-5]))
    eps = draw(st.sampled_from([1e-6, 1e-5, 1e-3] + ([0.0] if scale == 1.0 else [])))
    return scale, weight_scale, eps


SEEDS = st.integers(0, 2**31 - 1)


def make_inputs(case: Case, seed: int = 0, *, special: bool = False) -> Inputs:
    """Random inputs of one case from NumPy, with nothing to compile; the arrays must be made under `x64(case)`.

    Some positions lie outside the table, every kind that their type can hold; with gathered rows none does. `special`
    adds rows of zeros, single NaNs and infinities, and gates of any bits.
    """
    rng = np.random.default_rng(seed)
    num_tokens, d = case.num_tokens, case.head_dim
    dtype, weight_dtype = (jnp.dtype(name or case.dtype) for name in (case.dtype, case.weight_dtype))

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    q_gate = (case.scale * normal(num_tokens, case.num_q_heads, 2, d)).astype(dtype)
    k = (case.scale * normal(num_tokens, case.num_kv_heads, d)).astype(dtype)
    if special:
        gate = q_gate[:, :, 1]
        q_gate[:, :, 1] = rng.integers(0, 256, (*gate.shape[:-1], d * dtype.itemsize), np.uint8).view(dtype)
        for rows in (q_gate[:, :, 0], k):
            for value in (0.0, np.nan, np.inf, -np.inf):
                token, head, lane = (rng.integers(0, size) for size in rows.shape)
                rows[token, head, slice(None) if value == 0.0 else lane] = value
    weights = case.weight_scale * (1 + 0.2 * normal(2, d)) - np.float32(case.norm_beta)
    weights = weights if case.weights else np.ones_like(weights)
    # Angles of any size: a frequency's neighbours in the table, and those of another row, differ from its own.
    angles = rng.uniform(0, 2 * np.pi, (case.max_position, case.rotary_dim // 2))
    q_weight, k_weight = weights.astype(weight_dtype)
    of_heads = q_gate.reshape(num_tokens, -1), k.reshape(num_tokens, -1)
    positions = _positions(case, rng) if case.rotary_dim else None
    arrays: tuple[Any, ...] = *of_heads, q_weight, k_weight, table_of(case, angles), positions
    return Inputs(*arrays).map(jnp.asarray)


def _positions(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Random and repeated, in random order, the first and the last among them; some of them outside."""
    info = np.iinfo(case.positions_dtype)
    shape = (case.num_tokens,) if case.mrope_section is None else (3, case.num_tokens)
    positions = rng.integers(0, min(case.max_position, info.max + 1), shape).astype(case.positions_dtype)
    edges = [0, min(case.max_position - 1, info.max)]
    if not case.gathered:
        outside = (-1, case.max_position, 2**31 - 1, -(2**31), 2**31 + 3, 2**32 + 3, 3 - 2**32, info.min, info.max)
        edges += [x for x in outside if info.min <= x <= info.max]
    # About one token in eight, none in every fourth call.
    chosen = rng.random(shape) < rng.choice([0, 0.1, 0.1, 0.3])
    positions[chosen] = rng.choice(np.array(edges, case.positions_dtype), int(chosen.sum()))
    return positions


def make_data(call: CachedCase, seed: int = 0, *, special: bool = False) -> Data:
    """As `make_inputs`, with a slot or none for each token.

    `special`: v has any bits where the cache has its dtype or holds codes.
    """
    case, rng = call.case, np.random.default_rng([seed, 1])
    inputs, v = make_inputs(case, seed, special=special), cached.values(call, seed)
    if special and (call.cache_dtype == v.dtype or call.scales):
        v = rng.integers(0, 256, v.nbytes, np.uint8).view(v.dtype).reshape(v.shape)
    return Data(inputs, v, cached.caches(call, seed), _slots(call, rng))


def _slots(call: CachedCase, rng: np.random.Generator) -> np.ndarray:
    """None twice. About one token in eight has none, none in every fourth call; nor has one without a place left."""
    num_tokens, outside = call.case.num_tokens, no_slots(call.slots_dtype, call.capacity)
    places = rng.permutation(min(call.capacity, np.iinfo(call.slots_dtype).max + 1))[:num_tokens]
    slots = np.full(num_tokens, 0, object)
    slots[: places.size] = places
    without = np.arange(num_tokens) >= places.size
    if outside:
        without |= rng.random(num_tokens) < rng.choice([0, 0.1, 0.1, 0.3])
        slots[without] = rng.choice(np.array(outside, object), int(without.sum()))
    assert outside or not without.any(), "two tokens would share a place"
    return rng.permutation(slots).astype(call.slots_dtype)


def no_slots(slots_dtype: str, capacity: int) -> list[int]:
    """Slots that are none, of every kind that the type holds."""
    info = np.iinfo(slots_dtype)
    edges = (-1, capacity, capacity + 1, 2**31 - 1, -(2**31), 2**31 + 3, 2**32 + 3, 3 - 2**32, info.min, info.max)
    return [x for x in edges if info.min <= x <= info.max and not 0 <= x < capacity]


def x64(call: Case | CachedCase):
    """Positions and slots of 64 bits need it, and nothing else may."""
    dtypes = [call.positions_dtype] if isinstance(call, Case) else [call.case.positions_dtype, call.slots_dtype]
    return jax.enable_x64(any(dtype.endswith("64") for dtype in dtypes))


def is_past(case: Case, positions: np.ndarray) -> np.ndarray:
    """Where a position, of any integer type, is past the table."""
    return positions >= case.max_position


def inside(case: Case, inputs: Inputs) -> Inputs:
    """The inputs with every position inside the table: 0 for negative ones and for those past it."""
    if inputs.positions is None:
        return inputs
    positions = np.asarray(inputs.positions)
    positions = np.where(is_past(case, positions) | (positions < 0), 0, positions).astype(positions.dtype)
    return dataclasses.replace(inputs, positions=jnp.asarray(positions))


def lanes_past(case: Case, inputs: Inputs) -> np.ndarray:
    """(T, D): the lanes that depend on a position past the table, through their frequency or, rotated first, any."""
    if inputs.positions is None:
        return np.zeros((case.num_tokens, case.head_dim), bool)
    past = is_past(case, np.atleast_2d(np.asarray(inputs.positions)))
    pairs = past[axes(case)].T
    if case.norm_order == "rotation_first":
        return np.repeat(pairs.any(axis=1, keepdims=True), case.head_dim, axis=1)
    rest = np.zeros((case.num_tokens, case.head_dim - case.rotary_dim), bool)
    return np.concatenate([pairs, pairs, rest], axis=1)[:, np.argsort(lanes_in_halves(case))]


def resolved(case: Case, inputs: Inputs) -> tuple[Case, Inputs]:
    """The call in the contract's form, with every position inside the table: what the oracle and the definition take.

    The oracle knows interleaved sections alone. For others the table gets the row of each token, which all of its
    positions read.
    """
    plain = dataclasses.replace(forms.plain(case), mrope_layout="interleaved", positions_dtype="int32")
    if inputs.positions is None:
        return plain, inputs
    positions = np.asarray(inside(case, inputs).positions).astype(np.int32)
    if case.mrope_layout == "interleaved":
        return plain, dataclasses.replace(inputs, positions=jnp.asarray(positions))
    lane = np.arange(case.rotary_dim)
    rows = np.asarray(inputs.cos_sin_cache)[positions[np.tile(axes(case), 2)].T, lane]
    tokens = np.broadcast_to(np.arange(case.num_tokens, dtype=np.int32), positions.shape)
    own = dataclasses.replace(inputs, cos_sin_cache=jnp.asarray(rows), positions=jnp.asarray(tokens))
    return dataclasses.replace(plain, max_position=case.num_tokens), own
