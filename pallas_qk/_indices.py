"""Integers that a user gives as indices: positions, slots and layers."""

import jax
import jax.numpy as jnp


def comparable(x: jax.Array, size: int) -> tuple[jax.Array, int]:
    """The indices, and the limit below which those that aren't negative lie inside an axis of `size`.

    They are compared in the given integer type, so that 2^32 + 3 is not 3.
    """
    if x.dtype.itemsize < 4:
        x = x.astype(jnp.int32)  # the size may not fit the narrow types
    # A size that an export leaves open has no smaller of two.
    return x, min(size, jnp.iinfo(x.dtype).max) if isinstance(size, int) else size
