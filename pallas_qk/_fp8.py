"""Rows as codes of 8 bits, in plain XLA, as serving stacks store them in a KV cache.

The code of x is that of the float8 nearest to float32(x) / scale, ties to even. What is larger than every finite float8
gets the code of the largest, infinities too. A NaN has the code that GPUs give it, without its sign.

IEEE's division takes a kernel dozens of instructions, and a call for numbers of unusual size. Its result costs less:

- Plain XLA multiplies by 1 / scale in float64 and rounds to float32. Relatively that product is within 2^-51 of the
  quotient. No quotient of two numbers of 24 bits is closer than 2^-49 to the middle between two float32, unless it is
  subnormal and its code 0. So it rounds as the quotient does.
- The kernels take `Divisor`, once for a row, and correct an approximate quotient twice (Markstein's theorem): 7
  instructions for an element, float32 alone.
- Where memory binds, Mosaic GPU's takes the product in float64 too: 3 instructions and fewer registers, of which the
  conversions to and from float64 are slow.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

PTX_PAIRS = {"float8_e4m3fn": "e4m3x2", "float8_e5m2": "e5m2x2"}  # what PTX calls two of each dtype
NAMES = tuple(PTX_PAIRS)
# The float32 nearest to -1 / $1, for $1 from 2^-22 to 4. PTX's own reciprocal would have a call. In float64 the first
# approximation has 20 bits, and the error of the next is the third power of its own.
PTX_MINUS_RECIPROCAL = (
    "{ .reg .f64 d, r, e, t; cvt.f64.f32 d, $1; rcp.approx.ftz.f64 r, d; neg.f64 d, d; "
    "fma.rn.f64 e, d, r, 0d3FF0000000000000; fma.rn.f64 t, e, e, e; fma.rn.f64 r, r, t, r; neg.f64 r, r; "
    "cvt.rn.f32.f64 $0, r; }"
)
# 1 / $1 in float64 within 2^-52, or the infinity, zero or NaN that it is; refined as above.
PTX_RECIPROCAL = (
    "{ .reg .f64 s, r, e, t, p; .reg .pred special; cvt.f64.f32 s, $1; rcp.approx.ftz.f64 r, s; neg.f64 s, s; "
    "fma.rn.f64 e, s, r, 0d3FF0000000000000; fma.rn.f64 t, e, e, e; fma.rn.f64 p, r, t, r; "
    "testp.notanumber.f64 special, e; selp.f64 p, r, p, special; mov.f64 $0, p; }"
)
_NAN = 0x7F
_MANTISSA, _BIAS = 23, 127  # of float32


class Divisor(NamedTuple):
    """A scale, as the kernels divide by it: x / scale is x * minus_factor / -divisor.

    The factor is a power of two with the scale's sign, and the divisor is from 2^-22 to 4, so that nothing overflows. A
    scale that is zero, infinite or NaN has the divisor 1, and its own reciprocal as the factor.
    """

    minus_factor: Any  # float32, of the kernel's own kind
    divisor: Any
    minus_reciprocal: Any  # of the divisor, rounded to nearest


def ptx_quotient(x: str, by: Divisor, result: str) -> str:
    """The float32 nearest to x / scale, in PTX, where its code isn't 0 or the largest; registers n, q and e are used.

    Numbers past 2^20 are cut off there, for their quotients would overflow on the way. A zero keeps its sign, since
    what is added to it is -0.
    """
    correct = f"fma.rn.f32 e, {by.divisor}, q, n; fma.rn.f32 q, e, {by.minus_reciprocal}, q;"
    return (
        f"mul.rn.f32 n, {x}, {by.minus_factor}; min.NaN.xorsign.abs.f32 n, n, 0f49800000; "
        f"mul.rn.f32 q, n, {by.minus_reciprocal}; {correct} {correct} mov.f32 {result}, q;"
    )


def is_fp8(dtype: np.dtype | str | None) -> bool:
    return str(dtype) in NAMES


def codes(x: jax.Array, scale: jax.Array, dtype: np.dtype) -> jax.Array:
    """Those of x / scale, uint8; the two broadcast, and scale is float32."""
    return _nearest(_quotient(x.astype(jnp.float32), scale), dtype)


def _quotient(x: jax.Array, scale: jax.Array) -> jax.Array:
    """The float32 nearest to x / scale.

    On a GPU XLA divides float32 by `div.full.f32`. A division in float64 that is rounded to float32 is narrowed to that
    again (H200, JAX 0.11.2). The product isn't, for one of its operands isn't a float32.
    """
    with jax.enable_x64(True):
        wide, divisor = (lax.convert_element_type(a, np.float64) for a in (x, scale))
        factor = lax.div(np.float64(1), divisor)
        factor = lax.broadcast_in_dim(factor, x.shape, tuple(range(x.ndim - scale.ndim, x.ndim)))
        return lax.convert_element_type(lax.mul(wide, factor), np.float32)


def _nearest(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """The codes, by integers: XLA's own conversion rounds twice on GPUs and saturates nowhere."""
    info = jnp.finfo(dtype)
    smallest, largest = float(info.smallest_normal), int(np.asarray(info.max).view(np.uint8))
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    magnitude = bits & 0x7FFFFFFF
    # Normal: the exponent's bias exchanged, and half a unit added, or a little less for an even code.
    dropped = _MANTISSA - info.nmant
    odd = (magnitude >> dropped) & 1
    bias = (_BIAS + info.minexp - 1) << _MANTISSA
    normal = (magnitude - bias + (2 ** (dropped - 1) - 1) + odd) >> dropped
    # Subnormal: a sum that has the unit of float8's subnormals in its last place.
    unit = np.float32(smallest * 2.0**dropped)
    of_sum = lax.bitcast_convert_type(lax.bitcast_convert_type(magnitude, jnp.float32) + unit, jnp.uint32)
    subnormal = of_sum - np.uint32(unit.view(np.uint32))
    code = jnp.where(magnitude < np.float32(smallest).view(np.uint32), subnormal, normal)
    code = jnp.minimum(code, largest) | (bits >> 31 << 7)
    return jnp.where(magnitude > 0x7F800000, _NAN, code).astype(jnp.uint8)
