"""Rows of k and v written into a KV cache, in plain XLA."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_qk import _cache_axes, _fp8
from pallas_qk._cache_axes import Slots
from pallas_qk._indices import comparable


def write(
    cache: jax.Array,
    rows: list[tuple[jax.Array, jax.Array | None]],
    slots: jax.Array,
    layer: jax.Array | None,
    cache_axes: str,
) -> jax.Array:
    """The cache with the rows (..., Hkv, D) of k, of v, or of both at the slots (...) of their tokens.

    Each of them has its scale (1,) or (Hkv,), or None. A token whose slot, or whose layer, lies outside the cache is
    left out.
    """
    groups, head_dim = _cache_axes.groups(cache_axes), rows[0][0].shape[-1]
    _, slots_of_cache = _cache_axes.strides_of(cache_axes, cache.shape, head_dim)
    own, scales = zip(*rows, strict=True)
    if own[0].dtype != cache.dtype:
        own = lax.optimization_barrier(own)  # XLA may drop the rounding in front of a cast to a wider type
    updates = _joined([_cast(x, scale, cache.dtype) for x, scale in zip(own, scales, strict=True)], groups, slots.ndim)

    inside, indices = places_of(slots, None if layer is None else layer.reshape(()), slots_of_cache)
    num_blocks = slots_of_cache.capacity // slots_of_cache.block_size
    indices["b"] = jnp.where(inside, indices["b"], num_blocks)  # out of bounds, which a scatter leaves out
    # By block and place: a scatter into a reshaped cache leaves a copy where there is one kv head.
    indexed = tuple(axis for axis, group in enumerate(groups) if group in indices)
    dimension_numbers = lax.ScatterDimensionNumbers(
        update_window_dims=tuple(range(slots.ndim, updates.ndim)),
        inserted_window_dims=indexed,
        scatter_dims_to_operand_dims=indexed,
    )
    bits = _bits(cache.dtype)
    written = lax.scatter(
        _as(cache, bits),
        jnp.stack([indices[groups[axis]] for axis in indexed], axis=-1),
        _as(updates, bits),
        dimension_numbers,
        mode=lax.GatherScatterMode.FILL_OR_DROP,
    )
    return _as(written, cache.dtype)


def _cast(x: jax.Array, scale: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """To the cache's dtype, or to the codes of 8 bits."""
    return x.astype(dtype) if scale is None else _fp8.codes(x, scale[:, None], dtype)


def _bits(dtype: jnp.dtype) -> jnp.dtype:
    """What is scattered: unsigned integers where XLA would convert all of the cache there and back."""
    if _fp8.is_fp8(dtype):
        return jnp.dtype("uint8")
    converts = dtype == jnp.bfloat16 and jax.__version_info__ < (0, 11)
    return jnp.dtype("uint16") if converts else dtype


def _as(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return x if x.dtype == dtype else lax.bitcast_convert_type(x, dtype)


def places_of(slots: jax.Array, layer: jax.Array | None, cache: Slots) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Whether each token has a place in the cache, and its block, place and layer, 0 where it has none."""
    inside = _is_below(slots, cache.capacity)
    if layer is not None:
        inside = inside & _is_below(layer, cache.num_layers)
    slots = jnp.where(inside, slots, 0).astype(jnp.int32)
    block_size = jnp.full_like(slots, cache.block_size)
    indices = {"b": lax.div(slots, block_size), "s": lax.rem(slots, block_size)}
    if layer is not None:
        indices["l"] = jnp.where(inside, layer, 0).astype(jnp.int32)
    return inside, indices


def _is_below(x: jax.Array, size: int) -> jax.Array:
    x, limit = comparable(x, size)
    return (x >= 0) & (x < limit)


def _joined(rows: list[jax.Array], groups: tuple[str, ...], num_lead: int) -> jax.Array:
    """The rows (..., axes of the cache but blocks, places and layers)."""
    window = "".join(groups).translate(dict.fromkeys(map(ord, "lbs")))
    if len(rows) == 1:
        return rows[0]  # a cache of one of them has the axes "hd"
    joined = jnp.stack(rows, axis=num_lead + window.index("c"))
    sizes = dict(zip(window, joined.shape[num_lead:], strict=True))
    shape = [math.prod(sizes[name] for name in group) for group in groups if group[0] in sizes]
    return joined.reshape(*joined.shape[:num_lead], *shape)
