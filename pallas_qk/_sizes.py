"""The sizes of a call: those that are given, and what its arrays say of the others."""

from typing import Any, NamedTuple

import jax
import numpy as np

from pallas_qk._array_checks import Function, check_array, check_shape, wrong_last_axes
from pallas_qk._checks import check_count, check_dtype_name
from pallas_qk._rows import WEIGHTS, Inputs

Sizes = tuple[int | None, int | None, int | None, int | None]  # num_q_heads, num_kv_heads, head_dim, rotary_dim


def filled(function: Function, inputs: Inputs, sizes: Sizes, *, q_alone: bool) -> tuple[int, int, int, int]:
    """The four sizes. What was given is kept, so that the checks of shapes tell what doesn't fit it."""
    num_q_heads, num_kv_heads, head_dim, rotary_dim = sizes
    origin = ", the length of the weights" if head_dim is None else ""
    if head_dim is None:
        head_dim = _length_of_weights(inputs)
    if rotary_dim is None:
        rotary_dim = 0 if inputs.cos_sin_cache is None else _width_of_table(inputs.cos_sin_cache, head_dim, origin)
    if q_alone and num_kv_heads is None:
        num_kv_heads = 0
    if num_q_heads is not None and num_kv_heads is not None:
        return num_q_heads, num_kv_heads, head_dim, rotary_dim
    # q alone has no heads of k to count.
    given = {"num_q_heads": num_q_heads, "num_kv_heads": None if q_alone else num_kv_heads, "head_dim": head_dim}
    for name, value in given.items():
        if value is not None:
            check_count(name, value)
    # Of a head of q, and in the other form, without gates or with them.
    of_q, of_other = (2 * head_dim, head_dim) if function.gated else (head_dim, 2 * head_dim)
    if function.packed:
        heads = _heads_of_packed(function, inputs.q, num_q_heads, num_kv_heads, of_q, of_other, head_dim)
    else:
        heads = _heads_of_axes(function, inputs, num_q_heads, num_kv_heads, of_q, of_other, head_dim, origin)
    return *heads, head_dim, rotary_dim


def _shape(name: str, array: jax.Array | np.ndarray) -> tuple[int, ...]:
    """Of an array with an axis at least."""
    check_array(name, array)
    if not array.shape:
        raise ValueError(f"{name} must have axes, got shape (). Pass the array whose last axis holds its elements.")
    return array.shape


def _length_of_weights(inputs: Inputs) -> int:
    for name in WEIGHTS:
        if (weight := getattr(inputs, name)) is not None:
            shape = _shape(name, weight)
            hint = "the elements of a head; weights stand behind q and k, and in front of the table"
            check_shape(name, weight, ("head_dim",), hint)
            return shape[0]
    raise ValueError("head_dim must be given without weights, got None. Pass the number of elements of a head.")


def _width_of_table(table: jax.Array | np.ndarray, head_dim: int, origin: str) -> int:
    """`origin` says where `head_dim` is from."""
    check_count("head_dim", head_dim)
    shape = _shape("cos_sin_cache", table)
    check_dtype_name("cos_sin_cache", str(table.dtype))  # before the shape: it tells positions from a table
    if shape[-1] % 2 or not 0 < shape[-1] <= head_dim:
        raise ValueError(
            f"cos_sin_cache must have rows of a positive even length <= head_dim = {head_dim}{origin}, got shape "
            f"{shape}. Make it for heads of this size: pallas_qk.rope.inv_frequencies takes head_dim={head_dim}."
        )
    return shape[-1]


def _heads_of_packed(
    function: Function,
    qkv: jax.Array | np.ndarray,
    num_q_heads: int | None,
    num_kv_heads: int | None,
    of_q: int,
    of_other: int,
    of_k: int,
) -> tuple[int, int]:
    """Of one number of heads the other one."""
    width = _shape(function.array, qkv)[-1]
    if num_q_heads is None and num_kv_heads is None:
        raise ValueError(
            f"num_q_heads or num_kv_heads must be given with packed {function.array}, got neither. "
            "Pass one: the other follows."
        )

    def found(of_q: int) -> tuple[int, int] | None:
        """Where heads of this size fill the array."""
        if num_q_heads is not None:
            heads, rest = divmod(width - num_q_heads * of_q, 2 * of_k)
            both = num_q_heads, heads
        else:
            assert num_kv_heads is not None
            heads, rest = divmod(width - 2 * num_kv_heads * of_k, of_q)
            both = heads, num_kv_heads
        return None if rest or heads < 1 else both

    if heads := found(of_q):
        return heads
    q = f"num_q_heads * {of_q}" if num_q_heads is None else num_q_heads * of_q
    kv = f"num_kv_heads * {2 * of_k}" if num_kv_heads is None else 2 * num_kv_heads * of_k
    wanted = f"{q} + {kv}"
    remedy = function.sizes(is_other=found(of_other) is not None)
    raise wrong_last_axes(function.array, qkv, [(wanted,)], remedy)


def _heads_of_axes(
    function: Function,
    inputs: Inputs,
    num_q_heads: int | None,
    num_kv_heads: int | None,
    of_q: int,
    of_other: int,
    of_k: int,
    origin: str,
) -> tuple[int, int]:
    """From an axis of heads, or from a last axis that holds all of them. `origin` says where `of_k` is from.

    Where both readings fit, it is an axis of heads. Positions don't count: those that broadcast, or have an axis too
    many, fit either reading.
    """
    arrays = [_Heads(function.array, inputs.q, "num_q_heads", num_q_heads, of_q)]
    if inputs.k is not None:
        arrays.append(_Heads("k", inputs.k, "num_kv_heads", num_kv_heads, of_k))
    shapes = [_shape(x.name, x.array) for x in arrays]
    if len({len(shape) for shape in shapes}) > 1:
        raise ValueError(
            f"{function.array} and k must both have an axis of heads, or neither, got shapes {shapes[0]} and "
            f"{shapes[1]}. Reshape one of them."
        )
    by_axis = all(x.count(by_axis=True) for x in arrays)
    if not by_axis and len({shape[:-1] for shape in shapes}) > 1:
        by_axis = len({shape[:-2] for shape in shapes}) == 1  # then the last of the leading axes holds heads
        # Of two axes the first rather holds tokens, and so it does where q is not once or twice as wide as k.
        are_heads = by_axis and len(shapes[0]) > 2 and shapes[0][-1] in (shapes[1][-1], 2 * shapes[1][-1])
        if not are_heads and all(x.count(by_axis=False) for x in arrays):
            raise ValueError(
                f"{function.array} and k must have equal leading axes in front of heads of {of_q} and {of_k} elements, "
                f"got shapes {shapes[0]} and {shapes[1]}. Check the tokens and head_dim = {of_k}{origin}."
            )
    counts = [x.count(by_axis) for x in arrays]
    for x, count in zip(arrays, counts, strict=True):
        if not count:
            remedy = "num_kv_heads, head_dim, as one axis or two"
            if x.name != "k":
                exchanged = function.gated and by_axis and _fit_exchanged(arrays)
                is_other = not exchanged and bool(x._replace(width=of_other).count(by_axis))
                remedy = function.sizes(is_other=is_other) + (f"; {x.name} stands in front of k" if exchanged else "")
            raise x.wrong(by_axis, f"{remedy}; head_dim = {of_k}{origin}")
    return counts[0], counts[1] if inputs.k is not None else 0


def _fit_exchanged(arrays: list["_Heads"]) -> bool:
    """Whether each array has the heads of the other one, with axes of heads of which no number is given."""
    exchanged = [x._replace(array=y.array) for x, y in zip(arrays, reversed(arrays), strict=True)]
    return len(arrays) > 1 and all(x.given is None and x.count(by_axis=True) for x in exchanged)


class _Heads(NamedTuple):
    """An array of heads, and what is known of them."""

    name: str
    array: Any
    number: str  # the name of their number
    given: int | None
    width: int  # of one

    def count(self, by_axis: bool) -> int:
        """How many there are, read as an axis of heads or as one axis for all; 0 where it doesn't fit."""
        heads, last = (0, *self.array.shape)[-2:]
        found = heads * (last == self.width) if by_axis else last // self.width * (last % self.width == 0)
        return found if self.given in (None, found) else 0

    def wrong(self, by_axis: bool, remedy: str) -> ValueError:
        heads = self.number if self.given is None else self.given
        flat = f"{heads} * {self.width}" if self.given is None else self.given * self.width
        forms = [(heads, self.width)] if by_axis else [(flat,), (heads, self.width)]
        return wrong_last_axes(self.name, self.array, forms, remedy)
