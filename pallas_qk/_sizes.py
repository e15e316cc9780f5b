"""The sizes of a call: those that are given, and what its arrays say of the others."""

from pallas_qk._array_checks import Function, check_array
from pallas_qk._checks import check_count
from pallas_qk._rows import WEIGHTS, Inputs

Sizes = tuple[int | None, int | None, int | None, int | None]  # num_q_heads, num_kv_heads, head_dim, rotary_dim


def filled(
    function: Function, inputs: Inputs, sizes: Sizes, *, q_alone: bool, mrope: bool
) -> tuple[int, int, int, int]:
    """The four sizes. What was given is kept, so that the checks of shapes tell what doesn't fit it."""
    num_q_heads, num_kv_heads, head_dim, rotary_dim = sizes
    if rotary_dim is None:
        rotary_dim = 0 if inputs.cos_sin_cache is None else _shape("cos_sin_cache", inputs.cos_sin_cache)[-1]
    if head_dim is None:
        head_dim = _length_of_weights(inputs)
    if q_alone and num_kv_heads is None:
        num_kv_heads = 0
    if num_q_heads is not None and num_kv_heads is not None:
        return num_q_heads, num_kv_heads, head_dim, rotary_dim
    given = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads or None, "head_dim": head_dim}
    for name, value in given.items():
        if value is not None:
            check_count(name, value)
    of_q = 2 * head_dim if function.gated else head_dim
    if function.packed:
        width = _shape(function.array, inputs.q)[-1]
        heads = _heads_of_packed(width, num_q_heads, num_kv_heads, of_q, head_dim)
    else:
        heads = _heads_of_axes(function, inputs, num_q_heads, num_kv_heads, of_q, head_dim, mrope)
    return *heads, head_dim, rotary_dim


def _shape(name: str, array) -> tuple[int, ...]:
    """Of an array with an axis at least."""
    check_array(name, array)
    if not array.shape:
        raise ValueError(f"{name} must have axes, got shape (). Pass the array whose last axis holds its elements.")
    return array.shape


def _length_of_weights(inputs: Inputs) -> int:
    for name in WEIGHTS:
        if (weight := getattr(inputs, name)) is not None:
            return _shape(name, weight)[-1]
    raise ValueError("head_dim must be given without weights, got None. Pass the number of elements of a head.")


def _heads_of_packed(
    width: int, num_q_heads: int | None, num_kv_heads: int | None, of_q: int, of_k: int
) -> tuple[int, int]:
    """Of one number of heads the other one; each is at least 1."""
    if num_q_heads is not None:
        return num_q_heads, max(1, (width - num_q_heads * of_q) // (2 * of_k))
    if num_kv_heads is None:
        raise ValueError(
            "num_q_heads or num_kv_heads must be given with packed qkv, got neither. Pass one: the other follows."
        )
    return max(1, (width - 2 * num_kv_heads * of_k) // of_q), num_kv_heads


def _heads_of_axes(
    function: Function,
    inputs: Inputs,
    num_q_heads: int | None,
    num_kv_heads: int | None,
    of_q: int,
    of_k: int,
    mrope: bool,
) -> tuple[int, int]:
    """From an axis of heads, or from a last axis that holds all of them; each is at least 1."""
    shape = _shape(function.array, inputs.q)
    num_lead = None
    if inputs.positions is not None:
        check_array("positions", inputs.positions)
        num_lead = inputs.positions.ndim - mrope
    elif inputs.cos_sin_cache is not None:
        num_lead = len(_shape("cos_sin_cache", inputs.cos_sin_cache)) - 1
    has_axis = len(shape) > 1 and shape[-1] == of_q and num_lead != len(shape) - 1
    has_axis = has_axis and num_q_heads in (None, shape[-2])

    def heads(shape: tuple[int, ...], width: int) -> int:
        return shape[-2] if has_axis and len(shape) > 1 else max(1, shape[-1] // width)

    if num_q_heads is None:
        num_q_heads = heads(shape, of_q)
    if num_kv_heads is None:
        num_kv_heads = heads(_shape("k", inputs.k), of_k)
    return num_q_heads, num_kv_heads
