"""The steps whose rounding decides bits, on Pallas Triton: in PTX, or in plain jnp for the interpreter."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from pallas_qk import _fp8, _reference
from pallas_qk._options import next_power_of_2, tree_order
from pallas_qk._triton.tiles import pair_of


class Arithmetic(NamedTuple):
    """The steps whose rounding decides bits."""

    effective_weight: Callable  # (weight, norm_beta) -> float32
    mean_plus_eps: Callable  # (sum (B, 1), D, eps) -> mean + eps
    rotate: Callable  # (y1, y2, cos, sin) -> (o1, o2), with `round_norm` of y1 and y2 rounded to the activation dtype
    narrow: Callable  # float32 -> activation dtype
    codes: Callable  # (activation dtype, float32 scale, float8 dtype) -> its codes of x / scale
    fma: Callable  # a * b + c
    dot2: Callable  # a * b + c * d, or with negate a * b - c * d
    select: Callable  # (mask, a, b) -> a where the mask is set, else b


def plain_arithmetic(dtype, *, round_norm: bool = True) -> Arithmetic:
    def dot2(a, b, c, d, *, negate: bool = False):
        return a * b - c * d if negate else a * b + c * d

    def rotate(y1, y2, cos, sin):
        if round_norm:
            y1, y2 = _reference.round_trip(y1, dtype), _reference.round_trip(y2, dtype)
        return dot2(y1, cos, y2, sin, negate=True), dot2(y1, sin, y2, cos)

    def codes(x, scale, float8):
        return lax.bitcast_convert_type(_fp8.codes(x, scale, float8), float8)

    return Arithmetic(
        effective_weight=_reference.effective_weight,
        mean_plus_eps=lambda s, head_dim, eps: s / head_dim + eps,
        rotate=rotate,
        narrow=lambda y: _reference.round_trip(y, dtype).astype(dtype),  # XLA may drop a cast before a wider one
        codes=codes,
        fma=lambda a, b, c: a * b + c,
        dot2=dot2,
        select=jnp.where,
    )


def ptx_arithmetic(dtype, fuses_y2: bool = False, *, round_norm: bool = True) -> Arithmetic:
    """The instructions that Triton emits for the serving kernel, which Pallas's lowering does not fuse by itself."""

    def effective_weight(weight, norm_beta):
        # Also 0.0 is added: it makes a weight of -0.0 positive, as in the serving kernel.
        return weight.astype(jnp.float32) + norm_beta

    def mean_plus_eps(s, head_dim, eps):
        # One fused multiply-add with the approximate reciprocal of D: 7 to 100 of 6 M elements where D is no power of
        # two.
        head_dim, eps = (jnp.full(s.shape, value, jnp.float32) for value in (head_dim, eps))
        code = "{ .reg .f32 r; rcp.approx.ftz.f32 r, $2; fma.rn.f32 $0, $1, r, $3; }"
        return _ptx(code, "=f,f,f,f", s.dtype, s, head_dim, eps)

    def fma(a, b, c):
        shape = jnp.broadcast_shapes(a.shape, b.shape, c.shape)
        args = [jnp.broadcast_to(x, shape) for x in (a, b, c)]
        return _ptx("fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", jnp.float32, *args)

    def dot2(a, b, c, d, *, negate: bool = False):
        # a * b + c * d or a * b - c * d, the second product rounded, the first fused: with a float32 table other forms
        # differ in 64 to 662 of 33 M. The sign is PTX's, since Pallas lowers -x to 0 - x, which makes 0.0 of 0.0.
        sign = "neg.f32 t, t; " if negate else ""
        code = f"{{ .reg .f32 t; mul.rn.f32 t, $3, $4; {sign}fma.rn.f32 $0, $1, $2, t; }}"
        return _ptx(code, "=f,f,f,f,f", a.dtype, a, b, c, d)

    def rotate(y1, y2, cos, sin):
        if round_norm:
            y1, y2 = round_trip(y1), round_trip(y2)
        o2 = dot2(y2, cos, y1, sin) if fuses_y2 else dot2(y1, sin, y2, cos)
        return dot2(y1, cos, y2, sin, negate=True), o2

    def round_trip(y):
        if dtype == jnp.float32:
            return y
        return _ptx(f"{{ .reg .b32 t; {convert} t, $3, $2; {widen} }}", "=r,=r,r,r", y.dtype, y, pack=2)

    def narrow(y):
        return y if dtype == jnp.float32 else _ptx(f"{convert} $0, $2, $1;", "=r,r,r", dtype, y, pack=2)

    def codes(x, scale, float8):
        by = _divisor_of(jnp.broadcast_to(scale, (*x.shape[:-1], 1)))
        args = x.astype(jnp.float32), *(jnp.broadcast_to(of_row, x.shape) for of_row in by)
        divide = " ".join(
            _fp8.ptx_quotient(f"${1 + i}", _fp8.Divisor(f"${5 + i}", f"${9 + i}", f"${13 + i}"), f"x{i}")
            for i in range(4)
        )
        name = _fp8.PTX_PAIRS[str(float8)]
        convert = " ".join(f"cvt.rn.satfinite.{name}.f32 c{i}, x{2 * i + 1}, x{2 * i};" for i in range(2))
        code = f"{{ .reg .f32 n, q, e, x<4>; .reg .b16 c<2>; {divide} {convert} mov.b32 $0, {{c0, c1}}; }}"
        return _ptx(code, "=r" + 16 * ",f", float8, *args, pack=4)

    def select(mask, a, b):
        # 32 bits an instruction, and no predicate for each lane.
        bits = jnp.where(mask, -1, 0).astype({2: jnp.int16, 4: jnp.int32}[a.dtype.itemsize])
        return _ptx("lop3.b32 $0, $1, $2, $3, 0xca;", "=r,r,r,r", a.dtype, bits, a, b, pack=4 // a.dtype.itemsize)

    # Two lanes a conversion: a single F2F is a quarter-rate unit (146.6 against 140.2 us, T = 16384, 16/2 heads).
    convert, widen = {
        "bfloat16": ("cvt.rn.bf16x2.f32", "shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000;"),
        "float16": (
            "cvt.rn.f16x2.f32",
            ".reg .b16 low, high; mov.b32 {low, high}, t; cvt.f32.f16 $0, low; cvt.f32.f16 $1, high;",
        ),
        "float32": ("", ""),
    }[str(dtype)]
    return Arithmetic(effective_weight, mean_plus_eps, rotate, narrow, codes, fma, dot2, select)


def _divisor_of(scale: jax.Array) -> _fp8.Divisor:
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    magnitude, minus_sign = bits & 0x7FFFFFFF, ~bits & -(1 << 31)
    power = (254 - jnp.minimum(magnitude >> 23, 253)) << 23  # 2^(127 - exponent), normal whatever the exponent
    is_special = (magnitude == 0) | (magnitude >= 0x7F800000)
    minus_reciprocal = _ptx("{ .reg .f32 s; neg.f32 s, $1; rcp.approx.f32 $0, s; }", "=f,f", jnp.float32, scale)
    minus_power, power = (lax.bitcast_convert_type(x, jnp.float32) for x in (power | minus_sign, power))
    divisor = _ptx("{ .reg .f32 s; abs.f32 s, $1; mul.rn.f32 $0, s, $2; }", "=f,f,f", jnp.float32, scale, power)
    divisor = jnp.where(is_special, 1.0, divisor)
    minus_factor = jnp.where(is_special, minus_reciprocal, minus_power)
    return _fp8.Divisor(minus_factor, divisor, _ptx(_fp8.PTX_MINUS_RECIPROCAL, "=f,f", jnp.float32, divisor))


def _ptx(code: str, constraints: str, dtype, *args: jax.Array, pack: int = 1) -> jax.Array:
    """Inline assembly over tiles of one shape; `pack` elements a statement."""
    result = jax.ShapeDtypeStruct(args[0].shape, dtype)
    return plt.elementwise_inline_asm(
        code, args=list(args), constraints=constraints, pack=pack, result_shape_dtypes=[result]
    )[0]


def sum_of_squares(xs: dict[int, jax.Array], bits: list[int], head_dim: int, fma: Callable) -> jax.Array:
    """(B, 1): the sum of squares over the lanes of tiles, by the lane at their first place, as `tree_order` says.

    A neighbouring pair is one product and a fused multiply-add onto it, as in the serving kernel. Products of 16-bit
    lanes are exact above 2^-133, so the form shows in float32 alone, and in squares below that.

    Squares are never -0.0, so lanes that D lacks, which would add 0.0, are left out.
    """
    num_rows, bits, order = next(iter(xs.values())).shape[0], list(bits), tree_order(next_power_of_2(head_dim))
    xs = {offset: x.reshape(num_rows, *(2,) * len(bits)) for offset, x in xs.items()}
    if order[0] != 0:
        tiles = {offset: x * x for offset, x in xs.items()}
    else:
        order = order[1:]
        if 0 in bits:
            assert bits.pop() == 0
            pairs: dict[int, tuple[jax.Array, jax.Array | None]] = {offset: pair_of(x) for offset, x in xs.items()}
        else:
            pairs = {offset: (x, xs.get(offset + 1)) for offset, x in xs.items() if not offset & 1}
        tiles = {offset: a * a if b is None else fma(a, a, b * b) for offset, (a, b) in pairs.items()}
    for bit in order:
        if bit in bits:
            axis = bits.index(bit)
            del bits[axis]
            tiles = {offset: jnp.sum(tile, axis=1 + axis) for offset, tile in tiles.items()}
        else:
            step = 1 << bit
            tiles = {
                offset: tile + tiles[offset + step] if offset + step in tiles else tile
                for offset, tile in tiles.items()
                if not offset & step
            }
    return tiles[0][:, None]
