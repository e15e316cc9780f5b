"""How far two correct computations of the op may lie apart where equal bits are not promised: derived, in one place.

Three facts carry every bound, p being the significand bits of the activations' dtype (float16 11, bfloat16 8):

1. A float32 value displaced by one unit in its last place rounds to another 16-bit value with the chance
   2^(p - 24): 2^-13 for float16, 2^-16 for bfloat16. It then lands on the neighbour, one ulp away.
2. RoPE is a rotation of the pair (x1, x2), so |x1|, |x2| <= sqrt(2) * m where m is the larger of |o1|, |o2|: a
   normalised value displaced by one ulp moves the rotated ones by at most 2*sqrt(2) ulp(m) together, and by many
   ulps of a rotated value that cancels to nearly 0. Rotated lanes are therefore measured in ulps of their pair.
3. In float32 every step is a relative error of a few u = 2^-24, and the square root halves those before it.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from tests.cases import Case

# The largest relative error of rounding to a dtype, and the smallest normal number, below which it is larger.
ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}
SMALLEST_NORMAL = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126}
# What rounding may add below it: half a unit of the subnormal numbers, here a whole one. There a float32 result may be
# flushed to zero. So might a bfloat16 one, which is computed in float32, but no case has values as small as that.
SMALLEST = {"float16": 2.0**-24, "bfloat16": 2.0**-133, "float32": SMALLEST_NORMAL["float32"]}


def max_differing_fraction(case: Case, platform: str = "gpu") -> float:
    """The largest share of q_out, k_out and gate_out elements in which "xla" may differ from the oracle.

    0.0 where equal bits are promised: on a GPU, 16-bit activations and table, head_dim a power of two, and rounding
    between norm and rotation. The gate never differs, so the share of normalised elements is taken out first.
    """
    significand_bits = jnp.finfo(case.dtype).nmant + 1
    if significand_bits == 24:
        return 1.0
    normalised = (case.num_q_heads + case.num_kv_heads) / (2 * case.num_q_heads + case.num_kv_heads)
    displaced = 2.0 ** (significand_bits - 24)
    rotated = 2 * case.rotary_dim / case.head_dim
    if platform == "gpu":
        # Unfused against fused rotation where products are inexact, of a float32 table or of y in float32: 0.97 of
        # `displaced` simulated over the rotated lanes.
        # mean + eps with a division against one fma with 1/D: 0.16 to 0.37 of it for D = 80, 96, 192.
        # Rotated first, x has 16 bits, so that a float32 table alone makes products inexact. A rotated lane displaced
        # by an ulp moves the row's other lanes too: 1/D of them, so twice as many differ in the end. Squares of what
        # isn't rounded are inexact.
        rotation = 0 if _has_exact_products(case) else rotated
        squares_are_exact = case.norm_order == "norm_first" or case.round_norm or not case.rotary_dim
        mean = 0 if case.head_dim & (case.head_dim - 1) == 0 and squares_are_exact else 1
        return normalised * displaced * (rotation + mean)
    if jnp.dtype(case.dtype) == jnp.bfloat16:
        return 1.0  # Triton's interpreter does not round float32 to the nearest bfloat16
    # Triton's interpreter: numpy's order of the sum and its 1/sqrt displace a row by about one unit.
    # About 1 in 10^4 (32 of 768,000 seen).
    return normalised * displaced * (1.5 if case.round_norm else 1.5 + rotated)


def _has_exact_products(case: Case) -> bool:
    """Of the rotation, in float32: both factors have 16 bits."""
    has_16_bits = case.round_norm or case.norm_order == "rotation_first"
    return has_16_bits and jnp.dtype(case.cache_dtype or case.dtype).itemsize == 2


def max_differing(case: Case, num_elements: int, platform: str = "gpu") -> int:
    """The count for `max_differing_fraction`: the flips are rare events, so four deviations and four more."""
    expected = max_differing_fraction(case, platform) * num_elements
    return min(num_elements, _with_deviations(expected)) if expected else 0


def max_flips(case: Case, num_elements: int, units: float) -> int:
    """The count of 16-bit elements that may differ where the float32 values before rounding lie `units` apart."""
    return _with_deviations(units * 2.0 ** (jnp.finfo(case.dtype).nmant + 1 - 24) * num_elements)


def _with_deviations(expected: float) -> int:
    return math.floor(expected + 4 * math.sqrt(expected) + 4)


def max_pair_ulps(case: Case, platform: str = "gpu", *, round_trip: bool = True) -> float:
    """The largest distance of a rotated 16-bit element from the oracle's, in ulps of its RoPE pair.

    Lanes that aren't rotated stay within one ulp. `round_trip=False` is for code in which XLA drops the rounding
    between norm and rotation. Where the case has none, no normalised value is displaced by an ulp.
    """
    first_is_equal = platform == "gpu" and case.head_dim & (case.head_dim - 1) == 0 and round_trip
    if case.norm_order == "rotation_first":
        first_is_equal = platform == "gpu" and _has_exact_products(case)
    normalised_equal = first_is_equal or not case.round_norm
    truncated = platform != "gpu" and jnp.dtype(case.dtype) == jnp.bfloat16
    final_rounding = 1.5 if truncated else 1.0  # half an ulp each; a truncation is a whole one
    return final_rounding + (0.0 if normalised_equal else 2 * math.sqrt(2))


def float32_bound(case: Case, *, tree: bool = True) -> float:
    """The largest difference of float32 outputs, relative to the size of the RoPE pair (or of the lane itself).

    One side: a sum of squares of positive terms (one rounding an addition on the longest path, one for each square),
    the mean and eps (3), halved by the square root; rsqrt approximate to 2 ulp (4); two products (2); the rotation
    (3). Both sides may use theirs. `tree=False` is for sums in any order.
    """
    lanes = 1 << (case.head_dim - 1).bit_length()
    additions = lanes.bit_length() - 1 if tree else case.head_dim - 1
    return 2 * ((additions + 1 + 3) / 2 + 4 + 2 + 3) * ROUNDOFF["float32"]


def _ordered(x: jax.Array) -> jax.Array:
    """Integers in the order of the floats, neighbours one apart, -0.0 and 0.0 equal."""
    integer = {2: jnp.int16, 4: jnp.int32}[x.dtype.itemsize]
    bits = lax.bitcast_convert_type(x, integer).astype(jnp.int32)
    sign_bit = jnp.int32(jnp.iinfo(integer).min)
    return jnp.where(bits < 0, sign_bit - bits, bits)


@jax.jit
def ulp_distance(a: jax.Array, b: jax.Array) -> jax.Array:
    """How many representable steps lie between a and b, elementwise, uint32. Two NaNs: 0; one NaN: 2^32 - 1."""
    low, high = jnp.minimum(_ordered(a), _ordered(b)), jnp.maximum(_ordered(a), _ordered(b))
    distance = lax.bitcast_convert_type(high - low, jnp.uint32)
    distance = jnp.where(jnp.isnan(a) != jnp.isnan(b), jnp.uint32(0xFFFFFFFF), distance)
    return jnp.where(jnp.isnan(a) & jnp.isnan(b), jnp.uint32(0), distance)


def _ulp(x: jax.Array) -> jax.Array:
    """The distance from |x| to the next larger value, float32; x is float16 or bfloat16."""
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.uint16)
    above = lax.bitcast_convert_type(bits + jnp.uint16(1), x.dtype)
    return jnp.maximum(above.astype(jnp.float32) - jnp.abs(x).astype(jnp.float32), SMALLEST["float32"])


@functools.partial(jax.jit, static_argnames=("head_dim", "rotary_dim", "rotation"))
def worst_distances(
    got: jax.Array, want: jax.Array, head_dim: int, rotary_dim: int, rotation: str
) -> tuple[jax.Array, jax.Array]:
    """The largest distance of the rotated lanes and of the others, of outputs (T, heads*D).

    16-bit: in ulps of the wanted pair, or of the wanted lane. float32: relative to the pair's length, or to the lane.
    Infinite where one side alone has a NaN or the infinities differ.
    """
    got, want = (x.reshape(-1, head_dim) for x in (got, want))
    half, rotated, rest = rotary_dim // 2, jnp.abs(want[:, :rotary_dim]), jnp.abs(want[:, rotary_dim:])
    # A partner's place: neighbours, or R/2 apart.
    shape, axis = ((half, 2), 2) if rotation == "pairs" else ((2, half), 1)
    partner = jnp.flip(rotated.reshape(len(rotated), *shape), axis).reshape(rotated.shape)
    if want.dtype == jnp.float32:
        tiny = SMALLEST["float32"]
        pair, lane = jnp.maximum(jnp.hypot(rotated, partner), tiny), jnp.maximum(rest, tiny)
    else:
        pair, lane = _ulp(jnp.maximum(rotated, partner)), _ulp(rest)
    same = (got == want) | (jnp.isnan(got) & jnp.isnan(want))
    error = jnp.abs(got.astype(jnp.float32) - want.astype(jnp.float32))
    distance = jnp.where(same, 0.0, error / jnp.concatenate([pair, lane], axis=1))
    # XLA's maximum over an array may pass over a NaN on a CPU.
    distance = jnp.where(jnp.isnan(distance), jnp.inf, distance)
    return jnp.max(distance[:, :rotary_dim], initial=0.0), jnp.max(distance[:, rotary_dim:], initial=0.0)
