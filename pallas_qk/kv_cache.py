"""The slots of tokens in a KV cache, and what it holds. Slots are the integers that `slot_mapping` takes::

    slots = kv_cache.slots_of_pages(block_tables, places, block_size=16)  # a pool of blocks, some for each sequence
    slots = kv_cache.slots_of_rows(places, cache_length=4096)  # a dense cache with a row for each sequence

A slot is block * block_size + place in the block. In a dense cache each sequence is one block, of cache_length places.

A token's place is its index among the tokens of its sequence, from 0. It is not its position for RoPE, which mRoPE
makes smaller after an image. Padding has place -1 and gets slot -1, where nothing is written. Where the cache holds
`lengths` tokens of each sequence and n more come, of which `counts` are no padding, their places are::

    step = jnp.arange(n)
    places = jnp.where(step < counts[:, None], lengths[:, None] + step, -1)  # (batch, n)

`read` gives k and v of a cache to attention that takes no codes of 8 bits. All functions are plain jnp and work under
`jax.jit`, `jax.vmap` and any mesh.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from pallas_qk import _array_checks, _cache_axes, _cache_checks, _checks

_LARGEST = 2**31 - 1  # of a static size, so that every dtype of the results holds it


def slots_of_pages(
    block_tables: jax.Array | np.ndarray,
    places: jax.Array | np.ndarray,
    block_size: int,
    *,
    sequences: jax.Array | np.ndarray | None = None,
) -> jax.Array:
    """The slots of tokens in a pool of blocks, where a table names the blocks of each sequence.

    Args:
      block_tables: (..., pages), any integer dtype: the block that holds each page of a sequence. Place p of the
        sequence is on page p // block_size. A negative block says that the page isn't there.
      places: the leading axes of `block_tables`, then any others, such as (batch, n) for n tokens of each sequence and
        (batch,) for one; any integer dtype.
      block_size: the number of places in a block.
      sequences: for tokens in an order of their own, such as those of a packed batch: the row of `block_tables`, here
        (batch, pages), that each token reads. Its axes are those of `places`, or leading ones of them; any integer
        dtype.

    Returns:
      Slots of the shape and sharding of `places`. They are int32, or int64 where jax_enable_x64 is on and an argument
      has 64 bits. A slot is -1 where the place is negative or past the row's end, the block is negative, the sequence
      is no row of the table, or the dtype doesn't hold the slot. A block past the pool's end gives a slot past it,
      where nothing is written either.

    Raises:
      ValueError: a shape or value breaks a rule above.
      TypeError: a dtype or type does.

    Semantics from:
      The block tables and slot mapping of vLLM, which has -1 for padding alone.

    Example:
      >>> block_tables = np.array([[7, 2], [4, -1]])
      >>> print(slots_of_pages(block_tables, np.array([[15, 16, 17], [0, 1, 16]]), block_size=16))
      [[127  32  33]
       [ 64  65  -1]]
      >>> print(slots_of_pages(block_tables, np.array([5, 20, -1]), block_size=16, sequences=np.array([1, 0, 0])))
      [69 36 -1]
    """
    size = _check_size("block_size", block_size)
    block_tables, places, sequences = _as_integers(block_tables=block_tables, places=places, sequences=sequences)
    if not block_tables.ndim or not block_tables.shape[-1]:
        got = block_tables.shape
        raise ValueError(f"block_tables must have shape (..., pages) with a page, got {got}. Give it a column of -1.")
    lead = block_tables.shape[:-1]
    if sequences is not None:
        _check_sequences(sequences, places)
        if len(lead) != 1 or not lead[0]:
            raise ValueError(
                f"block_tables must have shape (batch, pages) with a row, got {block_tables.shape}. "
                "Leave sequences out, or stack the rows that they name on one axis."
            )
    elif places.shape[: len(lead)] != lead:
        raise ValueError(
            f"places must have the leading axes of block_tables, {lead}, got shape {places.shape}. "
            "A row of block_tables has the pages of one sequence. Name the row of each token with sequences where "
            "tokens have an order of their own."
        )
    slots: jax.Array = _run(_slots_of_pages, size, places, sequences, block_tables)
    return slots


def slots_of_rows(
    places: jax.Array | np.ndarray, cache_length: int, *, sequences: jax.Array | np.ndarray | None = None
) -> jax.Array:
    """The slots of tokens in a dense cache, which has a row of cache_length places for each sequence.

    Args:
      places: (batch, ...), such as (batch, n) for n tokens of each sequence and (batch,) for one; any integer dtype.
        Those of n tokens of one sequence have shape (1, n): (n,) are the places of n sequences.
      cache_length: the number of places in a row.
      sequences: the row of the cache that each token is written to, for tokens in an order of their own, such as those
        of a packed batch, and for sequences that lie in some rows of a larger cache. Its axes are those of `places`,
        which may then be any, or leading ones of them; any integer dtype.

    Returns:
      Slots of the shape and sharding of `places`. They are int32, or int64 where jax_enable_x64 is on and an argument
      has 64 bits. A slot is -1 where the place is negative, or cache_length or more, where the sequence is negative, or
      where the dtype doesn't hold the slot. A sequence past the cache's last row gives a slot past its end, where
      nothing is written either.

    Raises:
      ValueError: a shape or value breaks a rule above.
      TypeError: a dtype or type does.

    Example:
      >>> lengths = jnp.array([3, 0, 7])
      >>> print(slots_of_rows(lengths[:, None] + jnp.arange(2), cache_length=8))
      [[ 3  4]
       [ 8  9]
       [23 -1]]
      >>> print(slots_of_rows(np.array([3, 4, 0]), cache_length=8, sequences=np.array([0, 0, 5])))
      [ 3  4 40]
    """
    size = _check_size("cache_length", cache_length)
    places, sequences = _as_integers(places=places, sequences=sequences)
    if sequences is not None:
        _check_sequences(sequences, places)
    elif not places.ndim:
        raise ValueError(
            f"places must have shape (batch, ...), got {places.shape}. Pass sequences to name the row of one token."
        )
    slots: jax.Array = _run(_slots_of_rows, size, places, sequences)
    return slots


@functools.partial(jax.jit, static_argnames=("function", "size"))
def _run(function: Callable[..., jax.Array], size: int, places: jax.Array, *others: jax.Array | None) -> jax.Array:
    """`function` as one program, on a mesh sharded as `places` is."""
    from pallas_qk import _primitive  # late: it imports jax.extend, and so Pallas

    first, *rest = (jax.typeof(x).sharding for x in (places, *others) if x is not None)
    # An array that came from NumPy is on no mesh.
    mesh = next((sharding.mesh for sharding in (first, *rest) if not sharding.mesh.empty), first.mesh)
    sharding = NamedSharding(mesh, first.spec)
    return _primitive.compiler_partitioned(functools.partial(function, size), sharding)(places, *others)


def _slots_of_pages(size: int, places: jax.Array, sequences: jax.Array | None, block_tables: jax.Array) -> jax.Array:
    # Indices past an axis read -1. Negative ones would count from its end.
    page = jnp.where(places < 0, block_tables.shape[-1], places // size)
    if sequences is None:
        block_of = _block_of
        for _ in block_tables.shape[:-1]:  # not by an index, which would move tables between the devices of this axis
            block_of = jax.vmap(block_of)
        block = block_of(block_tables, page)
    else:
        row = jnp.where(sequences < 0, block_tables.shape[0], sequences)
        block = _block_of(block_tables, _spread(row, page.shape), page)
    return _slots(size, block, places % size)


def read(
    kv_cache: tuple[jax.Array, jax.Array] | jax.Array,
    dtype: DTypeLike,
    *,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    cache_axes: str = "b s h d",
) -> tuple[jax.Array, jax.Array]:
    """k and v as a cache holds them, in an order of axes that attention takes.

    Args:
      kv_cache: as the functions that write a KV cache take it and return it.
      dtype: of the results, float16, bfloat16 or float32.
      k_scale, v_scale: those that the cache was written with: float32, (), (1,) or (Hkv,), or a number. They must be
        given for a cache of 8 bits, and for no other. They hold for every layer of a stack: with scales of each layer
        read one at a time, or by `jax.vmap`.
      cache_axes: as there.

    Returns:
      k and v, each (blocks, block_size, Hkv, D), with the axis of layers first where there is one. They are
      float32(cache) * scale, rounded to `dtype`. Under `jax.jit` XLA fuses that into what reads it where it can. A
      library call, such as cuDNN's attention, reads a copy instead.

    Raises:
      ValueError: a shape or value breaks a rule above.
      TypeError: a dtype or type does.

    Example:
      >>> codes = jnp.full((2, 8, 1, 64), 3, jnp.float8_e4m3fn)
      >>> k, v = read((codes, codes), jnp.bfloat16, k_scale=0.5, v_scale=jnp.ones(1))
      >>> print(k.shape, k[0, 0, 0, 0], v[0, 0, 0, 0])
      (2, 8, 1, 64) 1.5 3
    """
    cache_axes = _cache_checks.check_cache_axes(cache_axes)
    dtype = jnp.dtype(_checks.check_dtype("dtype", dtype))
    k_cache, v_cache = _cache_checks.arrays_of(kv_cache, cache_axes)
    _cache_checks.check_caches(k_cache, v_cache, cache_axes, None, None)
    num_kv_heads, head_dim = _cache_axes.heads_of(cache_axes, k_cache.shape)
    _cache_checks.check_caches(k_cache, v_cache, cache_axes, num_kv_heads, head_dim)  # an axis of k and v is even
    k_scale, v_scale = map(_array_checks.unboxed, (k_scale, v_scale))
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        _cache_checks.check_scale(name, scale, k_cache.dtype, num_kv_heads)
    k_scale, v_scale = map(_cache_checks.as_scale, (k_scale, v_scale))
    k, v = _read(k_cache, v_cache, k_scale, v_scale, dtype=dtype, cache_axes=cache_axes, head_dim=head_dim)
    return k, v


@functools.partial(jax.jit, static_argnames=("dtype", "cache_axes", "head_dim"))
def _read(
    k_cache: jax.Array,
    v_cache: jax.Array | None,
    k_scale: jax.Array | None,
    v_scale: jax.Array | None,
    *,
    dtype: np.dtype,
    cache_axes: str,
    head_dim: int,
) -> tuple[jax.Array, jax.Array]:
    sizes = _cache_axes.sizes_of(cache_axes, k_cache.shape, head_dim)
    parts = [x.reshape(*sizes.values()) for x in (k_cache, v_cache) if x is not None]
    if "c" in sizes:
        parts = [jax.lax.index_in_dim(parts[0], which, list(sizes).index("c"), keepdims=False) for which in (0, 1)]
    names = [name for name in sizes if name != "c"]
    order = [names.index(name) for name in "lbshd" if name in names]
    k, v = (x.transpose(order) for x in parts)
    return _multiplied(k, k_scale).astype(dtype), _multiplied(v, v_scale).astype(dtype)


def _multiplied(x: jax.Array, scale: jax.Array | None) -> jax.Array:
    """Codes (..., Hkv, D) times their scale: one element, or one for each head."""
    if scale is None:
        return x
    scale = scale.reshape(*(1,) * (x.ndim - 2), -1, 1).astype(jnp.float32)
    sharding = jax.typeof(x).sharding
    if sharding.mesh.explicit_axes:  # where the two must agree
        heads = sharding.spec[-2] if scale.size > 1 else None
        scale = jax.sharding.reshard(scale, sharding.update(spec=PartitionSpec(*[None] * (x.ndim - 2), heads, None)))
    return x.astype(jnp.float32) * scale


def _block_of(block_tables: jax.Array, *index: jax.Array) -> jax.Array:
    return block_tables.at[index].get(mode="fill", fill_value=-1)


def _slots_of_rows(size: int, places: jax.Array, sequences: jax.Array | None) -> jax.Array:
    if sequences is None:
        row = jax.lax.broadcasted_iota(places.dtype, places.shape, 0)
    else:
        row = _spread(sequences, places.shape)
    exists = (places >= 0) & (places < size)
    return _slots(size, jnp.where(exists, row, -1), places)


def _spread(sequences: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """One for each token, of one for each index of the leading axes."""
    return jax.lax.broadcast_in_dim(sequences, shape, range(sequences.ndim))


def _slots(size: int, block: jax.Array, place: jax.Array) -> jax.Array:
    """-1 for a negative block, whose place may be anything, and where the slot would wrap."""
    last_block = (jnp.iinfo(place.dtype).max - place) // size
    return jnp.where((block >= 0) & (block <= last_block), block * size + place, -1)


def _as_integers(**arrays: Any) -> list[Any]:
    """The arrays in the dtype of the slots, where -1 stands for what it doesn't hold; None for no `sequences`."""
    given = {name: _array_checks.unboxed(x) for name, x in arrays.items() if x is not None or name != "sequences"}
    for name, array in given.items():
        _array_checks.check_array(name, array)
        _array_checks.check_integers(name, array.dtype)
    wide = any(array.dtype.itemsize == 8 for array in given.values())
    dtype = jax.dtypes.canonicalize_dtype(np.int64 if wide else np.int32)
    return [_narrowed(given[name], dtype) if name in given else None for name in arrays]


def _narrowed(array: jax.Array | np.ndarray, dtype: np.dtype) -> jax.Array | np.ndarray:
    """NumPy's is narrowed on the host: JAX may not have its 64 bits."""
    most = np.iinfo(dtype).max
    if jnp.iinfo(array.dtype).max <= most:
        return array.astype(dtype)
    xp = np if isinstance(array, np.ndarray) else jnp
    narrowed: jax.Array | np.ndarray = xp.where((array >= 0) & (array <= most), array.astype(dtype), -1)
    return narrowed


def _check_size(name: str, size: int) -> int:
    remedy = "Places stand in front of it." if getattr(size, "shape", ()) else "Pass a Python int."
    _checks.check_static_integer(name, size, remedy)
    if not 1 <= size <= _LARGEST:
        raise ValueError(f"{name} must be from 1 to {_LARGEST}, got {size}. Pass the size of that axis of the cache.")
    return operator.index(size)


def _check_sequences(sequences: jax.Array | np.ndarray, places: jax.Array | np.ndarray) -> None:
    if places.shape[: sequences.ndim] != sequences.shape:
        raise ValueError(
            f"sequences must have leading axes of places, {places.shape}, got shape {sequences.shape}. "
            "Pass one for each token, or for each index of the leading axes that share one."
        )
