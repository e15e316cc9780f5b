"""The checks of a KV cache: the names of its axes, its arrays, slots and layer."""

import math
import numbers
import operator
from typing import Any

import jax
import numpy as np

from pallas_qk import _cache_axes, _fp8
from pallas_qk._array_checks import Function, check_array, check_integers, check_shape, unboxed
from pallas_qk._checks import DTYPES, check_bool, describe


def check_cache_axes(cache_axes: str) -> str:
    """The names without the aliases of whole layouts."""
    if not isinstance(cache_axes, str) or not _cache_axes.groups(cache_axes):
        raise ValueError(
            "cache_axes must name the axes b, s, h and d, d last, each once; c too where one array holds k and v, "
            f"which (h c), (c h) or (c d) may join; and l, if at all, first, got {cache_axes!r}. "
            "Pass 'NHD' or 'HND', or names with spaces: 'b s h d' for (num_blocks, block_size, num_kv_heads, head_dim)."
        )
    return _cache_axes.ALIASES.get(cache_axes, cache_axes)


def check_return_kv(return_kv: bool) -> bool:
    return check_bool("return_kv", return_kv, "Pass True for k and v as results beside the cache.")


def arrays_of(kv_cache: object, cache_axes: str) -> tuple[Any, Any]:
    """k's array and v's, or the array of both and None."""
    if _cache_axes.holds_both(cache_axes):
        return unboxed(kv_cache), None
    if not isinstance(kv_cache, list | tuple) or len(kv_cache) != 2:
        got = f"{len(kv_cache)} of them" if isinstance(kv_cache, list | tuple) else describe(kv_cache)
        raise TypeError(
            f"kv_cache must be the two arrays of k and of v, got {got}. "
            "Pass q, k and v as one tuple, and a pair of caches behind positions, or name the axis c of an array that "
            "holds both in cache_axes."
        )
    k_cache, v_cache = map(unboxed, kv_cache)
    return k_cache, v_cache


def check_caches(k_cache: Any, v_cache: Any, cache_axes: str, num_kv_heads: int | None, head_dim: int | None) -> None:
    """Those of `arrays_of`. Without a number of heads and lanes, they may have any."""
    caches = {"kv_cache": k_cache}
    if not _cache_axes.holds_both(cache_axes):
        caches = {"kv_cache[0]": k_cache, "kv_cache[1]": v_cache}
    for name, cache in caches.items():
        check_array(name, cache)
        if str(cache.dtype) not in (*DTYPES, *_fp8.NAMES):
            raise TypeError(
                f"{name} must be {', '.join((*DTYPES, _fp8.NAMES[0]))} or {_fp8.NAMES[1]}, got {cache.dtype}. "
                "Make the cache of one of these."
            )
        hint = (
            f"{cache_axes!r} as cache_axes names them, each at least 1; for another order pass its name, such as 'HND'"
        )
        check_shape(name, cache, _cache_axes.known_shape(cache_axes, num_kv_heads, head_dim), hint)
        if 0 in cache.shape:
            raise ValueError(f"{name} must have at least one place, got shape {cache.shape}. Make it larger.")
    if len(caches) == 2:
        k, v = ((x.shape, str(x.dtype)) for x in caches.values())
        if k != v:
            raise ValueError(
                f"the caches of k and v must have one shape and dtype, got {k[0]} of {k[1]} and {v[0]} of {v[1]}. "
                "Make them alike."
            )


def check_scale(name: str, scale: Any, cache_dtype: np.dtype, num_kv_heads: int) -> None:
    """Of one element or of one for each kv head; None for a cache that has none."""
    if not _fp8.is_fp8(cache_dtype):
        if scale is not None:
            raise ValueError(
                f"{name} must be left out with a cache of {cache_dtype}, got {describe(scale)}. "
                f"It holds rows as they are; a cache of {' or '.join(_fp8.NAMES)} has scales."
            )
        return
    if scale is None:
        raise ValueError(
            f"{name} must be given with a cache of {cache_dtype}, got None. "
            "Pass the float32 number that its rows are divided by, and multiplied by when they are read."
        )
    if isinstance(scale, numbers.Real | np.floating) and not isinstance(scale, bool):
        return
    check_array(name, scale)
    is_number = isinstance(scale, jax.Array) and scale.weak_type  # of Python's, that went through a jit
    if str(scale.dtype) != "float32" and not is_number:
        raise TypeError(f"{name} must be float32, got {scale.dtype}. Cast it with astype.")
    if scale.shape not in ((), (1,), (num_kv_heads,)):
        shapes = " or ".join(map(str, dict.fromkeys(((), (1,), (num_kv_heads,)))))
        raise ValueError(f"{name} must have shape {shapes}, got {tuple(scale.shape)}. Its sizes: one, or num_kv_heads.")


def as_scale(scale: Any) -> Any:
    """A scale that has passed `check_scale`, as an array; of float32, but for a number that went through a jit."""
    return scale if scale is None or isinstance(scale, jax.Array | np.ndarray) else _nearest_float32(scale).reshape(())


def _nearest_float32(number: Any) -> np.float32:
    """Infinite where float32 holds no such number."""
    try:
        wide = float(number)
    except OverflowError:
        wide = math.inf if number > 0 else -math.inf
    with np.errstate(over="ignore"):
        return np.float32(wide)


def check_slots_given(slots: object) -> None:
    """Before all else, which would blame what follows a slot_mapping that was left out."""
    if slots is None or isinstance(slots, numbers.Number):
        raise TypeError(
            f"slot_mapping must be an array, got {describe(slots)}. It stands between kv_cache and eps: make it with "
            "pallas_qk.kv_cache.slots_of_rows or slots_of_pages."
        )


def check_slots(function: Function, slots: Any, lead: tuple[int, ...]) -> None:
    check_array("slot_mapping", slots)
    check_integers("slot_mapping", slots.dtype)
    hint = f"the leading axes of {function.array}, so one slot for each token; places of one sequence are (1, n)"
    check_shape("slot_mapping", slots, lead, hint)


def check_layer(layer: object, cache: jax.Array, cache_axes: str) -> None:
    stacked = cache_axes.startswith("l")
    if (layer is not None) != stacked:
        rule = "layer must be given exactly where cache_axes has an axis l"
        raise ValueError(
            f"{rule}, got layer={'None' if layer is None else describe(layer)} with {cache_axes!r}. "
            f"{'Pass the layer to write.' if stacked else 'Leave it out, or name the axis of layers.'}"
        )
    if layer is None:
        return
    if isinstance(layer, numbers.Integral) and not isinstance(layer, bool):
        number, num_layers = operator.index(layer), cache.shape[0]
        if not 0 <= number < num_layers:
            raise ValueError(
                f"layer must be from 0 to {num_layers - 1}, got {number}. Negative numbers don't count from the end."
            )
        return
    if not isinstance(layer, jax.Array | np.ndarray):
        raise TypeError(f"layer must be an integer or an array without axes, got {describe(layer)}. Pass an integer.")
    check_array("layer", layer)
    check_integers("layer", layer.dtype)
    check_shape("layer", layer, (), "none; it is one integer")
