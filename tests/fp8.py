"""What an 8-bit KV cache holds of a number and a scale: the definition, by a table of every value."""

import ml_dtypes  # noqa: F401  NumPy knows the names of 8-bit floats from it
import numpy as np

NAMES = ("float8_e4m3fn", "float8_e5m2")
NAN = 0x7F


def codes(x: np.ndarray, scale: np.ndarray, dtype) -> np.ndarray:
    """The code of each x / scale: the nearest value's, of two the even one, and the largest value's past it.

    Args:
      x: float16, bfloat16 or float32.
      scale: float32, of a shape that broadcasts against that of `x`.
      dtype: one of `NAMES`, or the type itself.

    Returns:
      uint8 of the common shape. NaN is 0x7f, whatever its sign.
    """
    with np.errstate(all="ignore"):
        # 53 bits are enough: rounded to float32 after that, a quotient of two float32 is as if rounded once.
        quotient = (np.asarray(x).astype(np.float64) / np.asarray(scale).astype(np.float64)).astype(np.float32)
    values = finite_values(dtype)
    between = (values[:-1] + values[1:]) / 2
    magnitude = np.abs(quotient).astype(np.float64)
    lower, upper = (np.searchsorted(between, magnitude, side) for side in ("left", "right"))  # they differ at a tie
    code = np.where(lower % 2 == 0, lower, upper) + 0x80 * np.signbit(quotient)
    return np.where(np.isnan(quotient), NAN, code).astype(np.uint8)


def finite_values(dtype) -> np.ndarray:
    """Of the codes 0, 1, ... without a sign, in float64: they ascend."""
    values = np.arange(128, dtype=np.uint8).view(np.dtype(dtype)).astype(np.float64)
    return values[np.isfinite(values)]
