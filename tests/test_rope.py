"""Tables of cosines and sines against exact angles, the kinds of scaling against their definitions, mRoPE positions."""

import doctest
import math
import re
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_qk
from pallas_qk import rope
from pallas_qk._reference import mrope_mask
from tests.tolerances import ROUNDOFF, SMALLEST_NORMAL

TURN = 2 * Fraction("3.14159265358979323846264338327950288419716939937510582097494459")
LARGE_POSITIONS = [*range(5), 4095, 65535, 65536, 131_071, 262_143, 524_287, 999_998, 999_999]


def exact_rows(positions, inv_freq) -> np.ndarray:
    """[cos | sin] in float64 of angles multiplied and reduced in rational numbers."""
    exact = [Fraction(p if isinstance(p, int) else float(p)) for p in np.asarray(positions).tolist()]
    reduced = [[float(p * Fraction(f) % TURN) for f in inv_freq.tolist()] for p in exact]
    return np.concatenate([np.cos(reduced), np.sin(reduced)], axis=1)


def geometric(theta, rotary_dim) -> np.ndarray:
    return np.array([theta ** (-2 * i / rotary_dim) for i in range(rotary_dim // 2)])


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e7])
def test_frequencies_are_float64_powers_of_theta(theta):
    inv_freq, attention_factor = rope.inv_frequencies(
        {"rope_theta": theta, "partial_rotary_factor": 0.25}, head_dim=256
    )
    assert inv_freq.dtype == np.float64 and inv_freq.shape == (32,) and attention_factor == 1.0
    for i, f in enumerate(inv_freq.tolist()):  # f^32 theta^i = 1, in rational numbers
        assert abs(float(Fraction(f) ** 32 * Fraction(theta) ** i - 1)) < 32 * 2**-50


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("attention_factor", [1.0, 1.1902380714238083])
def test_table_is_exact_at_large_positions(dtype, attention_factor):
    inv_freq, _ = rope.inv_frequencies({"rope_theta": 1e7}, head_dim=16)
    table = rope.cos_sin_cache(inv_freq, attention_factor, max_position=10**6, dtype=dtype)
    assert table.shape == (10**6, 16) and table.dtype == dtype
    got = np.asarray(table[np.array(LARGE_POSITIONS)], np.float64)
    want = exact_rows(LARGE_POSITIONS, inv_freq) * attention_factor
    power = np.maximum(2.0 ** np.floor(np.log2(abs(want) + 1e-300)), SMALLEST_NORMAL[dtype])
    half_ulp = power * ROUNDOFF[dtype]
    assert (abs(got - want) <= half_ulp + 1e-9).all()


def test_float32_angles_fail_that():
    """What the host's float64 is for: 0.03 rad and more is lost in a float32 product."""
    inv_freq, _ = rope.inv_frequencies({"rope_theta": 1e7}, head_dim=64)
    positions = np.arange(990_000, 1_000_000)
    angles = positions.astype(np.float32)[:, None] * inv_freq.astype(np.float32)
    assert 0.03 < abs(angles - positions[:, None] * inv_freq).max() < 0.07


@pytest.mark.parametrize(
    "dtype, value, want",
    [
        ("bfloat16", 1 + 2**-8 + 2**-40, 1 + 2**-7),  # float32 first would make a tie of it, then 1
        ("bfloat16", 1 + 3 * 2**-8 - 2**-40, 1 + 2**-7),
        ("bfloat16", 1 + 2**-8, 1.0),
        ("bfloat16", 1 + 3 * 2**-8, 1 + 2**-6),
        ("float16", 1 + 2**-11 + 2**-40, 1 + 2**-10),
        ("float16", 1 + 2**-11, 1.0),
    ],
)
def test_an_element_is_rounded_once(dtype, value, want):
    table = np.asarray(rope.cos_sin_cache(np.array([0.0, math.pi]), value, max_position=2, dtype=dtype), np.float64)
    np.testing.assert_array_equal(table[:, :2], [[want, want], [want, -want]])


@pytest.mark.parametrize("jit", [False, True])
def test_rows_are_exact_at_every_position(jit):
    inv_freq, _ = rope.inv_frequencies({"rope_theta": 1e7}, head_dim=16)
    drawn = np.random.default_rng(0).integers(0, 2**32, 500)
    positions = np.concatenate([LARGE_POSITIONS, drawn, [2**31 - 1, 2**31, 2**32 - 1]]).astype(np.uint32)

    def rows(positions):
        return rope.cos_sin_rows(positions, inv_freq, 1.5)

    got = (jax.jit(rows) if jit else rows)(jnp.asarray(positions))
    assert got.dtype == jnp.float32
    assert abs(np.asarray(got, np.float64) / 1.5 - exact_rows(positions, inv_freq)).max() < 2e-7


def test_rows_agree_with_the_table():
    inv_freq, factor = rope.inv_frequencies({"rope_theta": 1e6}, head_dim=8)
    table = np.asarray(rope.cos_sin_cache(inv_freq, factor, max_position=70000))
    positions = np.arange(0, 70000, 7).reshape(5, 2, 1000)
    got = rope.cos_sin_rows(positions, inv_freq, factor)
    assert got.shape == (5, 2, 1000, 8)
    np.testing.assert_allclose(np.asarray(got), table[positions], rtol=0, atol=2e-7)
    assert rope.cos_sin_rows(positions, inv_freq, dtype=jnp.bfloat16).dtype == jnp.bfloat16
    assert rope.cos_sin_rows(3, inv_freq).shape == (8,)


def fractions(dtype, limit=2**32) -> np.ndarray:
    """Positions of a floating dtype from everywhere in its range, as NumPy's."""
    rng = np.random.default_rng(0)
    named = [0, -0.0, 0.5, 2, 8.5, 15, 1 - 2**-53, 2**-32, 2**-40, 1e-300, 4095.75, 2**31 + 0.5, 2**32 - 2**-21]
    drawn = [rng.uniform(0, top, 100) for top in (1, 1e3, 1e6, 2**32)]
    with np.errstate(over="ignore"):  # float16 ends at 65504
        positions = np.concatenate([named, *drawn]).astype(jnp.dtype(dtype))
    return np.resize(positions[positions.astype(np.float64) < limit], 400)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_rows_of_fractions_are_exact(dtype, jit):
    inv_freq, _ = rope.inv_frequencies({"rope_theta": 1e7}, head_dim=16)
    positions = fractions(dtype)

    def rows(positions):
        return rope.cos_sin_rows(positions, inv_freq, 1.5)

    with jax.enable_x64(dtype == "float64"):
        got = (jax.jit(rows) if jit else rows)(jnp.asarray(positions))
    assert got.dtype == jnp.float32
    assert abs(np.asarray(got, np.float64) / 1.5 - exact_rows(positions, inv_freq)).max() < 2e-7
    on_the_host = jax.jit(lambda: rows(positions))() if jit else rows(positions)  # no x64 here
    np.testing.assert_array_equal(on_the_host, got)
    np.testing.assert_array_equal(rows(positions.astype(np.float64).tolist()), got)


@pytest.mark.parametrize("dtype", ["uint32", "float32", "float64"])
def test_angles_are_off_by_less_than_6e_9(dtype):
    """Before float32, whose own rounding of cosines and sines hides that."""
    inv_freq = np.array([6.28, 1.0, 0.3, 1e-3, 3e-7])
    positions = fractions("float64").astype(dtype)
    positions = positions[positions < 2**32] if dtype == "float32" else positions
    *parts, exists = rope._split(positions)
    parts = [jnp.asarray(x)[:, None] for x in parts if x is not None]
    got = np.asarray(rope._turns(inv_freq, *parts)) * (float(TURN) / 2**32)
    want = [[float(Fraction(p) * Fraction(f) % TURN) for f in inv_freq.tolist()] for p in positions.tolist()]
    off = abs(got - want)
    assert exists.all() and np.minimum(off, float(TURN) - off).max() < 6e-9


@pytest.mark.parametrize("frequency", [7.0, 100.0, -0.3, -9.0])
def test_frequencies_of_any_size_and_sign(frequency):
    """A fraction makes whole turns where a frequency is above one turn per position."""
    positions = fractions("float32", 1e4)
    got = rope.cos_sin_rows(positions, np.array([frequency]))
    assert abs(np.asarray(got, np.float64) - exact_rows(positions, np.array([frequency]))).max() < 2e-7


def special_rows(positions, factor=1.25):
    inv_freq, _ = rope.inv_frequencies({"rope_theta": 1e4}, head_dim=8)
    return np.asarray(rope.cos_sin_rows(positions, inv_freq, factor))


@pytest.mark.parametrize(
    "positions",
    [
        np.array([5, 2**32 + 3, 2**32, 2**63 - 1]),
        np.array([5, 2**32 + 3, 2**32, 2**64 - 1], np.uint64),
        np.array([5, np.nan, np.inf, -np.inf, 2.0**32, 1e300]),
        np.array([5, np.nan, np.inf, -np.inf, 2.0**32, 1e30], np.float32),
        np.array([5, np.nan, np.inf, -np.inf, 2.0**32, 1e30], jnp.bfloat16),
        np.array([5, np.nan, np.inf, -np.inf], np.float16),
    ],
    ids=lambda positions: positions.dtype.name,
)
def test_rows_outside_the_range_are_nan(positions):
    with jax.enable_x64(positions.dtype.itemsize == 8):
        on_a_device = special_rows(jnp.asarray(positions))
    for got in (special_rows(positions), special_rows(positions.astype(object).tolist()), on_a_device):
        np.testing.assert_array_equal(np.isnan(got), np.repeat([[False], *[[True]] * (len(positions) - 1)], 8, axis=1))


PADDING = dict.fromkeys(("int32", "int64", "float32", "float64", "bfloat16"), -(2**31))
PADDING |= {"int4": -8, "int8": -128, "int16": -(2**15), "float16": -65504, "float8_e5m2": -57344}


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("dtype", PADDING)
def test_negative_positions_mark_padding(dtype, jit):
    """The row of position 0, with not a NaN on the way: `jax.debug_nans` looks at each step."""
    positions = np.array([-1, PADDING[dtype], 0, 3]).astype(jnp.dtype(dtype))
    if positions.dtype.kind != "i" and dtype != "int4":
        positions[0] = -0.25
    with jax.enable_x64(dtype.endswith("64")), jax.debug_nans(True):
        on_a_device = (jax.jit(special_rows_traced) if jit else special_rows_traced)(jnp.asarray(positions))
        for got in (special_rows_traced(positions), on_a_device):
            np.testing.assert_array_equal(got[:3], np.repeat([[1.25] * 4 + [0.0] * 4], 3, axis=0))
            assert (np.asarray(got[3]) != np.asarray(got[0])).all()


def special_rows_traced(positions):
    inv_freq, _ = rope.inv_frequencies({"rope_theta": 1e4}, head_dim=8)
    return rope.cos_sin_rows(positions, inv_freq, 1.25)


def test_positions_are_constants_to_a_derivative():
    positions = jnp.array([-1.5, 0.0, 2.25, 1e9])
    gradient = jax.grad(lambda positions: special_rows_traced(positions).sum())(positions)
    np.testing.assert_array_equal(gradient, np.zeros(4))
    scores = jax.grad(lambda x: (x * special_rows_traced(jnp.array([-3, 7]))).sum())(jnp.ones((2, 8)))
    np.testing.assert_array_equal(scores[0], [1.25] * 4 + [0.0] * 4)
    assert np.isfinite(scores).all()


SECTIONS = {  # of 11 frequencies
    "one": (11,),
    "two": (6, 5),
    "three": (4, 4, 3),
    "uneven": (2, 8, 1),
    "empty": (0, 0, 11),
    "four": (3, 3, 3, 2),
}


def read_rows(section, layout) -> list[int]:
    """The row of positions that each frequency reads, by the words of the docstring."""
    if layout == "sectioned":
        return [row for row, count in enumerate(section) for _ in range(count)]
    n = len(section)
    return [j % n if j % n and j < n * section[j % n] else 0 for j in range(sum(section))]


@pytest.mark.parametrize("layout", ["interleaved", "sectioned"])
@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_mrope_merges_rows_bit_for_bit(section, layout):
    inv_freq, reads, n = np.geomspace(1, 1e-4, 11), np.array(read_rows(section, layout)), len(section)
    if n == 3:
        for row in (1, 2):
            in_the_kernels = mrope_mask(jnp.arange(11, dtype=jnp.int32), row, section, layout)
            np.testing.assert_array_equal(reads == row, in_the_kernels)

    def merged(positions):
        return rope.cos_sin_rows(positions, inv_freq, 1.25, mrope_section=section, mrope_layout=layout)

    def of_one_row(positions):
        return rope.cos_sin_rows(positions, inv_freq, 1.25)

    rng = np.random.default_rng(0)
    drawn = [rng.integers(-9, 2**31, (n, 2, 15), np.int32), rng.uniform(-9, 2**33, (n, 2, 15)).astype(np.float32)]
    for positions in drawn:
        for wrap in (lambda function: function, jax.jit):
            each = list(map(wrap(of_one_row), positions))
            want = each[0]
            for row in range(1, n):
                want = jnp.where(np.tile(reads == row, 2).reshape(1, 1, 22), each[row], want)
            got = wrap(merged)(positions)
            assert got.shape == (2, 15, 22) and np.isfinite(got).any()
            np.testing.assert_array_equal(got, want)


def test_mrope_computes_each_angle_once():
    def rows(positions):
        return rope.cos_sin_rows(positions, np.geomspace(1, 1e-3, 8), mrope_section=(3, 3, 2))

    (program,) = jax.make_jaxpr(rows)(jnp.zeros((3, 5), jnp.int32)).jaxpr.eqns
    steps = program.params["jaxpr"].jaxpr.eqns
    shapes = [step.outvars[0].aval.shape for step in steps if step.primitive.name in ("cos", "sin")]
    assert shapes == [(5, 8), (5, 8)]


def test_linear():
    inv_freq, factor = rope.inv_frequencies({"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, head_dim=64)
    np.testing.assert_allclose(inv_freq, geometric(1e6, 64) / 8, rtol=1e-14)
    assert factor == 1.0


@pytest.mark.parametrize("length, theta", [(1, 1e4), (2048, 1e4), (4096, 1e4 * 3 ** (64 / 62))])
def test_dynamic_stretches_theta_beyond_the_trained_length(length, theta):
    inv_freq, factor = rope.inv_frequencies(
        {"type": "dynamic", "factor": 2.0},
        head_dim=64,
        rope_theta=1e4,
        max_position_embeddings=2048,
        sequence_length=length,
    )
    np.testing.assert_allclose(inv_freq, geometric(theta, 64), rtol=1e-13)
    assert factor == 1.0


def test_dynamic_with_alpha_ignores_the_length():
    parameters = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 1e4}
    inv_freq, _ = rope.inv_frequencies(parameters, head_dim=64)
    np.testing.assert_allclose(inv_freq, geometric(1e4 * 1000 ** (64 / 62), 64), rtol=1e-13)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}


def test_yarn_keeps_fast_frequencies_and_divides_slow_ones():
    inv_freq, factor = rope.inv_frequencies(YARN, head_dim=128)
    plain = geometric(1e6, 128)
    turns = 32768 * plain / (2 * math.pi)
    np.testing.assert_allclose(inv_freq[turns > 40], plain[turns > 40], rtol=1e-14)
    np.testing.assert_allclose(inv_freq[turns < 0.8], plain[turns < 0.8] / 4, rtol=1e-14)
    assert (np.diff(plain / inv_freq) >= -1e-12).all() and 0 < (turns > 40).sum() < (turns > 0.8).sum() < 64
    assert factor == pytest.approx(0.1 * math.log(4) + 1, rel=1e-15)


@pytest.mark.parametrize(
    "more, first, last",
    [
        ({"original_max_position_embeddings": 64}, 0, 3),  # 32 turns over so few positions: before the first frequency
        ({"rope_theta": 70.0, "beta_fast": 1000.0}, 6, 31),  # one turn: past rotary_dim - 1, where the formula ends
    ],
)
def test_yarn_s_ramp_starts_and_ends_within_the_lanes(more, first, last):
    parameters = YARN | more
    inv_freq, _ = rope.inv_frequencies(parameters, head_dim=32)
    slowed = np.clip((np.arange(16) - first) / (last - first), 0, 1)
    np.testing.assert_allclose(inv_freq, geometric(parameters["rope_theta"], 32) * (1 - slowed * 3 / 4), rtol=1e-14)


@pytest.mark.parametrize(
    "more, want",
    [
        ({"attention_factor": 0.5}, 0.5),
        ({"mscale": 1.0, "mscale_all_dim": 1.0}, 1.0),
        ({"mscale": 0.707, "mscale_all_dim": 1.0}, (0.0707 * math.log(4) + 1) / (0.1 * math.log(4) + 1)),
        ({"mscale": 2.0, "mscale_all_dim": 0}, 0.1 * math.log(4) + 1),
        ({"factor": 1.0}, 1.0),
        ({"factor": None}, 0.1 * math.log(2) + 1),  # 65536 / 32768
    ],
)
def test_attention_factor_of_yarn(more, want):
    _, factor = rope.inv_frequencies(YARN | more, head_dim=128, max_position_embeddings=65536)
    assert factor == pytest.approx(want, rel=1e-15)


def test_llama3_keeps_fast_frequencies_and_divides_slow_ones():
    parameters = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    inv_freq, factor = rope.inv_frequencies(
        parameters, head_dim=128, rope_theta=5e5, original_max_position_embeddings=8192
    )
    plain = geometric(5e5, 128)
    turns = 8192 * plain / (2 * math.pi)
    blend = np.clip((turns - 1) / 3, 0, 1)
    np.testing.assert_allclose(inv_freq, plain * (blend + (1 - blend) / 8), rtol=1e-13)
    assert factor == 1.0 and (blend > 0).any() and (blend < 1).any()


LONGROPE = {"type": "longrope", "short_factor": [1.0, 1.5, 2.0, 3.0], "long_factor": [2.0, 4.0, 8.0, 16.0]}


@pytest.mark.parametrize("length, which", [(4096, "short_factor"), (4097, "long_factor")])
@pytest.mark.parametrize("rope_type", ["longrope", "su"])
def test_longrope_chooses_by_the_length(length, which, rope_type):
    inv_freq, factor = rope.inv_frequencies(
        LONGROPE | {"type": rope_type},
        head_dim=8,
        rope_theta=1e4,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        sequence_length=length,
    )
    np.testing.assert_allclose(inv_freq, geometric(1e4, 8) / LONGROPE[which], rtol=1e-14)
    assert factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)), rel=1e-15)


def test_longrope_with_a_factor_of_each_kind():
    parameters = LONGROPE | {"rope_theta": 1e4, "original_max_position_embeddings": 4096, "attention_factor": 1.25}
    by_length = parameters | {"short_mscale": 1.1, "long_mscale": 1.2}
    assert rope.inv_frequencies(parameters, head_dim=8, sequence_length=10)[1] == 1.25
    assert rope.inv_frequencies(by_length, head_dim=8, sequence_length=10)[1] == 1.1
    assert rope.inv_frequencies(by_length, head_dim=8, sequence_length=5000)[1] == 1.2


def test_proportional_leaves_the_rest_of_the_head_unrotated():
    parameters = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6}
    inv_freq, _ = rope.inv_frequencies(parameters, head_dim=64)
    np.testing.assert_allclose(inv_freq, np.where(np.arange(32) < 8, geometric(1e6, 64), 0), rtol=1e-14)
    table = np.asarray(rope.cos_sin_cache(inv_freq, max_position=9))
    assert (table[:, 8:32] == 1).all() and (table[:, 40:] == 0).all()


@pytest.mark.parametrize(
    "parameters, beside",
    [
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5, "rope_type": "default"}, {}),
        ({"rope_theta": 10000, "type": "default"}, {"partial_rotary_factor": 0.5}),
        ({"type": "mrope", "mrope_section": [2, 1, 1]}, {"rope_theta": 10000, "partial_rotary_factor": 0.5}),
        ({"partial_rotary_factor": 0.5, "rope_theta": None}, {"rope_theta": 1e4}),
        (None, {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, {"rope_theta": 10000, "sequence_length": 7}),
        ({"a": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "b": None}, {"layer_type": "a"}),
        ({"a": {"type": "default"}, "b": {}}, {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "layer_type": "b"}),
        ({"rope_theta": 1e4, "partial_rotary_factor": 0.5, "extra": {"a": 1}, "more": {"rope_theta": 2}}, {}),
        ({"extra": {"a": 1}, "more": None}, {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ({"rope_theta": None, "extra": {}}, {"rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        ({"a": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "note": "text"}, {"layer_type": "a"}),
    ],
)
def test_spellings_of_the_same(parameters, beside):
    before = repr(parameters)
    inv_freq, factor = rope.inv_frequencies(parameters, head_dim=16, **beside)
    np.testing.assert_allclose(inv_freq, geometric(1e4, 8), rtol=1e-14)
    assert factor == 1.0
    assert repr(parameters) == before, "the configuration's dict was changed"


ONE = np.array([1.0])
THETA = {"rope_theta": 1e4}
NESTED = {"full_attention": THETA, "sliding_attention": THETA}
LLAMA3 = {"type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4, **THETA}


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: rope.inv_frequencies({}, head_dim=8), ValueError, "rope_theta must be in rope_parameters or given "),
        (lambda: rope.inv_frequencies([], head_dim=8), TypeError, "rope_parameters must be a dict or None, got []"),
        (lambda: rope.inv_frequencies({"rope_theta": "1e4"}, head_dim=8), TypeError, "rope_theta must be a finite"),
        (lambda: rope.inv_frequencies({"rope_theta": -1}, head_dim=8), ValueError, "number > 0, got -1."),
        (lambda: rope.inv_frequencies({"rope_theta": math.nan}, head_dim=8), ValueError, "number > 0, got nan."),
        (
            lambda: rope.inv_frequencies(THETA, head_dim=8, rope_theta=1e6),
            ValueError,
            "rope_theta must have one value, got 10000.0 in rope_parameters and 1000000.0 beside it.",
        ),
        (lambda: rope.inv_frequencies(THETA | {"type": "axial"}, head_dim=8), ValueError, "'su', got 'axial'."),
        (lambda: rope.inv_frequencies(THETA | {"type": ["yarn"]}, head_dim=8), ValueError, "'su', got ['yarn']."),
        (
            lambda: rope.inv_frequencies(THETA, head_dim=7),
            ValueError,
            "even integer <= head_dim, got 7 from head_dim=7",
        ),
        (
            lambda: rope.inv_frequencies(THETA, head_dim=8.0),
            TypeError,
            "head_dim must be an integer known when tracing",
        ),
        (
            lambda: rope.inv_frequencies(THETA, head_dim=8, partial_rotary_factor=2),
            ValueError,
            "got 16 from head_dim=8",
        ),
        (lambda: rope.inv_frequencies(THETA, head_dim=8, sequence_length=0), ValueError, "at least 1, got 0."),
        (
            lambda: rope.inv_frequencies(NESTED, head_dim=8),
            ValueError,
            "layer_type must be one of ['full_attention', 'sliding_attention'], got None.",
        ),
        (lambda: rope.inv_frequencies(NESTED, head_dim=8, layer_type="full"), ValueError, "got 'full'."),
        (lambda: rope.inv_frequencies(THETA, head_dim=8, layer_type="full"), ValueError, "without layer types, got"),
        (
            lambda: rope.inv_frequencies(THETA | {"type": "linear"}, head_dim=8),
            ValueError,
            "factor must be in rope_parameters or given beside it, got neither.",
        ),
        (
            lambda: rope.inv_frequencies(
                THETA | {"type": "dynamic", "factor": 2}, head_dim=8, max_position_embeddings=2048
            ),
            ValueError,
            "rope_type 'dynamic' needs sequence_length, got None.",
        ),
        (
            lambda: rope.inv_frequencies(THETA | {"type": "dynamic", "factor": 2}, head_dim=2),
            ValueError,
            "rope_type 'dynamic' needs a rotary_dim of at least 4, got 2.",
        ),
        (
            lambda: rope.inv_frequencies(LONGROPE | THETA, head_dim=8, max_position_embeddings=4096),
            ValueError,
            "rope_type 'longrope' needs sequence_length, got None.",
        ),
        (
            lambda: rope.inv_frequencies(
                LONGROPE | THETA, head_dim=16, max_position_embeddings=4096, sequence_length=9
            ),
            ValueError,
            "short_factor must be a list of rotary_dim // 2 = 8 numbers > 0, got 4.",
        ),
        (
            lambda: rope.inv_frequencies(
                LONGROPE | THETA | {"short_factor": [1, 0, 1, 1]},
                head_dim=8,
                max_position_embeddings=4096,
                sequence_length=9,
            ),
            ValueError,
            "short_factor[1] must be a finite number > 0, got 0.",
        ),
        (
            lambda: rope.inv_frequencies(
                LONGROPE | THETA | {"short_factor": 2.0}, head_dim=8, max_position_embeddings=9, sequence_length=9
            ),
            TypeError,
            "short_factor must be a list of rotary_dim // 2 = 4 numbers > 0, got 2.0.",
        ),
        (
            lambda: rope.inv_frequencies(LLAMA3, head_dim=8, max_position_embeddings=4096),
            ValueError,
            "high_freq_factor must be greater than low_freq_factor, got 4.0 and 4.0.",
        ),
        (lambda: rope.inv_frequencies(YARN | {"rope_theta": 1}, head_dim=8), ValueError, "'yarn', got 1.0."),
        (lambda: rope.cos_sin_cache(ONE, max_position=0), ValueError, "max_position must be at least 1, got 0."),
        (lambda: rope.cos_sin_cache(ONE, max_position=2.0), TypeError, "max_position must be an integer"),
        (
            lambda: rope.cos_sin_cache([1.0], max_position=1),
            TypeError,
            "NumPy array of floats, got [1.0] of type list.",
        ),
        (lambda: rope.cos_sin_cache(jnp.ones(4), max_position=1), TypeError, "inv_freq must be a NumPy array"),
        (lambda: rope.cos_sin_cache(ONE[None], max_position=1), ValueError, "of shape (1, 1)."),
        (lambda: rope.cos_sin_cache(ONE / 0.0, max_position=1), ValueError, "be finite, got array([inf])"),
        (lambda: rope.cos_sin_cache(ONE, None, max_position=1), ValueError, "attention_factor must be"),
        (lambda: rope.cos_sin_cache(ONE, max_position=1, dtype="float64"), TypeError, "or float32, got 'float64'."),
        (lambda: rope.cos_sin_cache(ONE, max_position=1, dtype="half-ish"), TypeError, "or float32, got 'half-ish'."),
        (lambda: rope.mrope_positions([-1]), ValueError, "grid (t, h, w) of integers >= 1, got -1."),
        (lambda: rope.mrope_positions([(1, 0, 2)]), ValueError, "integers >= 1, got (1, 0, 2)."),
        (lambda: rope.mrope_positions([(2, 2)]), TypeError, "integers >= 1, got (2, 2)."),
        (lambda: rope.mrope_positions(["text"]), TypeError, "integers >= 1, got 'text'."),
        (lambda: rope.mrope_positions([(1, 2.0, 2)]), TypeError, "integers >= 1, got (1, 2.0, 2)."),
        (lambda: rope.mrope_positions([3], start=-1), ValueError, "start must be at least 0, got -1."),
        (lambda: rope.mrope_positions([3], start=2**31 - 3), ValueError, "positions must fit int32, got 2147483648"),
    ],
)
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
def test_errors_say_the_rule_and_what_they_got(call, error, message):
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert re.search(r", got .*\. [A-Z`].*\.$", str(caught.value), re.DOTALL)


LAYER_TYPE = "Pass the name of the entry to read, if rope_parameters holds one dict per layer type."
WHOLE = (
    "rope_parameters must be the dict of a configuration's RoPE, got a dict with {}, as a whole configuration has it. "
    "Pass {}."
)
NUMPY_OR_JAX = "positions must have an integer or floating dtype, got {}. Cast them with astype."
SECTION = (
    "mrope_section must be integers >= 0 that sum to len(inv_freq) = 4, got {}. "
    "Pass how many frequencies read each row of positions, such as (11, 11, 10) for 32 frequencies."
)
ROWS = (
    "positions must have shape ({}, ...), a row for each count of mrope_section, got {}. "
    "Stack the rows on the first axis, or leave mrope_section out for a single row."
)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (
            lambda: rope.inv_frequencies({"a": THETA, "b": None, "note": "text"}, head_dim=8),
            ValueError,
            f"layer_type must be one of ['a'], got None. {LAYER_TYPE}",
        ),
        (
            lambda: rope.inv_frequencies({"a": THETA, "b": None}, head_dim=8, layer_type="b"),
            ValueError,
            f"layer_type must be one of ['a'], got 'b'. {LAYER_TYPE}",
        ),
        (
            lambda: rope.inv_frequencies(THETA | {"a": {"b": 1}}, head_dim=8, layer_type="full"),
            ValueError,
            f"layer_type must be None for rope_parameters without layer types, got 'full'. {LAYER_TYPE}",
        ),
        (
            lambda: rope.inv_frequencies({"hidden_size": 64, "rope_parameters": THETA}, head_dim=8),
            ValueError,
            WHOLE.format("rope_parameters", 'config["rope_parameters"]'),
        ),
        (
            lambda: rope.inv_frequencies(THETA | {"rope_scaling": {"type": "linear", "factor": 2.0}}, head_dim=8),
            ValueError,
            WHOLE.format("rope_scaling", 'config["rope_scaling"] and rope_theta=config["rope_theta"]'),
        ),
        (lambda: rope.cos_sin_rows([True], ONE), TypeError, NUMPY_OR_JAX.format("bool")),
        (lambda: rope.cos_sin_rows(jnp.ones(3, jnp.complex64), ONE), TypeError, NUMPY_OR_JAX.format("complex64")),
        (lambda: rope.cos_sin_rows(["1"], ONE), TypeError, NUMPY_OR_JAX.format("<U1")),
        (lambda: mrope(np.zeros((3, 2)), (2, 1)), ValueError, SECTION.format([2, 1])),
        (lambda: mrope(np.zeros((3, 2)), (3, 2, -1)), ValueError, SECTION.format([3, 2, -1])),
        (lambda: mrope(np.zeros((3, 2)), ()), ValueError, SECTION.format([])),
        (lambda: mrope(np.zeros((3, 2)), (2, 1, 1.0)), TypeError, SECTION.format("(2, 1, 1.0)")),
        (lambda: mrope(np.zeros((3, 2)), (3, True, 0)), TypeError, SECTION.format("(3, True, 0)")),
        (lambda: mrope(np.zeros((3, 2)), 4), TypeError, SECTION.format("4")),
        (lambda: mrope(np.zeros((2, 3)), (2, 1, 1)), ValueError, ROWS.format(3, (2, 3))),
        (lambda: mrope(np.zeros(()), (2, 2)), ValueError, ROWS.format(2, ())),
        (
            lambda: rope.cos_sin_rows(3, ONE, mrope_layout="mixed"),
            ValueError,
            "mrope_layout must be 'interleaved' or 'sectioned', got 'mixed'. "
            "Pass 'interleaved' for Qwen3-VL and Qwen3.5, 'sectioned' for Qwen2-VL and Qwen2.5-VL.",
        ),
    ],
)
def test_whole_errors(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value) == message


def mrope(positions, section):
    return rope.cos_sin_rows(positions, np.geomspace(1, 1e-3, 4), mrope_section=section)


def test_frequencies_are_not_traced():
    with pytest.raises(TypeError, match="inv_freq must be a NumPy array"):
        jax.jit(lambda inv_freq: rope.cos_sin_rows(jnp.arange(3), inv_freq))(np.ones(4))


def test_mrope_positions_of_text_are_its_indices():
    positions, next_position = rope.mrope_positions([3, 0, np.int64(4)])
    np.testing.assert_array_equal(positions, np.broadcast_to(np.arange(7), (3, 7)))
    assert positions.dtype == np.int32 and next_position == 7 and type(next_position) is int
    positions, next_position = rope.mrope_positions([])
    assert positions.shape == (3, 0) and next_position == 0
    assert rope.mrope_positions([], start=9)[1] == 9


def test_mrope_positions_of_images():
    """A tall one and a wide one."""
    positions, next_position = rope.mrope_positions([1, np.array([1, 3, 2]), 2, (1, 1, 3), 1])
    np.testing.assert_array_equal(
        positions,
        [
            [0, 1, 1, 1, 1, 1, 1, 4, 5, 6, 6, 6, 9],
            [0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 6, 6, 9],
            [0, 1, 2, 1, 2, 1, 2, 4, 5, 6, 7, 8, 9],
        ],
    )
    assert next_position == 10


def test_mrope_positions_go_on_where_the_cache_ends():
    turns = [[5, (1, 4, 6), 7], [3, (1, 2, 2)], [(1, 9, 1), 2]]
    whole, end = rope.mrope_positions([segment for turn in turns for segment in turn])
    parts, at = [], 0
    for turn in turns:
        positions, at = rope.mrope_positions(turn, start=at)
        parts.append(positions)
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)
    assert at == end


def test_mrope_positions_stay_below_the_number_of_tokens():
    """Why a table as long as the longest sequence is enough, with time in frames."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        grids = [tuple(rng.integers(1, 6, 3).tolist()) for _ in range(4)]
        positions, next_position = rope.mrope_positions([2, *grids, 3])
        assert positions.shape[1] == 5 + sum(math.prod(grid) for grid in grids)
        assert positions.min() == 0 and positions.max() == next_position - 1 < positions.shape[1]


def test_the_op_takes_table_and_positions():
    """Attention scores of rotated q and k depend on the distance alone, at a large offset as at none."""
    inv_freq, factor = rope.inv_frequencies({"rope_theta": 1e6, "partial_rotary_factor": 0.5}, head_dim=32)
    table = rope.cos_sin_cache(inv_freq, factor, max_position=200_000)
    q = np.random.default_rng(0).normal(size=(1, 64)).astype(np.float32)
    k = np.random.default_rng(1).normal(size=(1, 32)).astype(np.float32)
    weight = np.ones(32, np.float32)

    def score(q_position, k_position):
        at = [jnp.full((1,), position) for position in (q_position, k_position)]
        sizes = {"num_q_heads": 1, "num_kv_heads": 1, "head_dim": 32, "rotary_dim": 2 * len(inv_freq)}
        q_out = pallas_qk.fused_qk_rmsnorm_rope_gate(q, k, weight, weight, table, at[0], 1e-6, **sizes)[0]
        k_out = pallas_qk.fused_qk_rmsnorm_rope_gate(q, k, weight, weight, table, at[1], 1e-6, **sizes)[1]
        return float(jnp.sum(q_out * k_out))

    assert score(199_999, 199_989) == pytest.approx(score(10, 0), abs=1e-5)
    assert abs(score(11, 0) - score(10, 0)) > 1e-2


def test_docstring_examples():
    results = doctest.testmod(rope)
    assert results.attempted >= 5 and results.failed == 0
