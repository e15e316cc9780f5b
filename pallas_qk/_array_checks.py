"""The checks of the arrays of a call: what they are, their dtypes and shapes, by the rows that lie in them."""

import functools
import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_qk._checks import MAKE_TABLE, check_dtype_name, describe
from pallas_qk._options import Options
from pallas_qk._rows import Inputs, Source, rows_of, sources_of

_ARRAYS = (jax.Array, np.ndarray)


def unboxed(x: Any) -> Any:
    """The array in a box that gives it by `__jax_array__`, as modules hold their parameters."""
    while x is not None and not isinstance(x, _ARRAYS) and hasattr(x, "__jax_array__"):
        x = x.__jax_array__()
    return x


def check_array(name: str, array: object) -> None:
    """Refuses what is no array, and an array that is more than its values: masked, reduced over a mesh, on the host."""
    if not isinstance(array, jax.Array | np.ndarray) or isinstance(array, np.ma.MaskedArray):
        remedy = _conversion(array)
        if name == "cos_sin_cache" and isinstance(array, list | tuple | numbers.Real):
            remedy = MAKE_TABLE
        raise TypeError(f"{name} must be a JAX or NumPy array, got {describe(array)}. {remedy}")
    if not getattr(array.dtype, "isnative", True):  # JAX's own dtypes, such as that of keys, have no byte order
        got = array.dtype.str
        raise TypeError(f"{name} must have this machine's byte order, got {got}. Convert it with astype.")
    if not isinstance(array, jax.Array):
        return
    type_ = jax.typeof(array)
    spec, manual = type_.sharding.spec, type_.manual_axis_type
    if spec.reduced | spec.unreduced | manual.reduced | manual.unreduced:
        raise ValueError(
            f"{name} must be neither reduced nor unreduced over mesh axes, got {type_.str_short()}. "
            "Pass it through jax.sharding.reshard before, or in shard_map through jax.lax.pcast or, unreduced, psum."
        )
    if type_.memory_space == jax.memory.Space.Host:
        raise ValueError(
            f"{name} must lie in device memory, got {type_.str_short()}. "
            "Move it with jax.device_put(array, jax.memory.Space.Device)."
        )


def _conversion(value: object) -> str:
    if value is None:
        return "Pass one."
    if isinstance(value, np.ma.MaskedArray):
        return "Pass its filled()."
    if isinstance(value, jax.Ref):
        return "Read it with [...]."
    convert = "pallas_qk.dlpack.from_torch" if type(value).__module__.startswith("torch") else "jnp.asarray"
    return f"Convert it with {convert}."


class Function(NamedTuple):
    """A public function, given one packed array, or q, k and, where it has one, v; and what errors say of it."""

    name: str
    packed: bool = False

    @property
    def gated(self) -> bool:
        return "_gate" in self.name

    @property
    def separate_v(self) -> bool:
        return "_qkv_" in self.name and not self.packed

    @property
    def array(self) -> str:
        """The first."""
        return "qkv" if self.packed else "q_gate" if self.gated else "q"

    def sizes(self, *, is_other: bool) -> str:
        """Of the first array's last axes; and what takes it where it `is_other`, of the form without or with gates."""
        rows, remedy = "2 * head_dim" if self.gated else "head_dim", f"; {self.other}" if is_other else ""
        if not self.packed:
            return f"num_q_heads, {rows}, as one axis or two{remedy}"
        q = "q and gate of each head" if self.gated else "q"
        return f"num_q_heads * {rows} + 2 * num_kv_heads * head_dim, [{q} | k | v]{remedy}"

    @property
    def other(self) -> str:
        """The function for the other form."""
        if self.gated:
            return f"{self.name.replace('_gate', '')} takes q without gates"
        return f"{self.name.replace('_rope', '_rope_gate')} takes q with gates"

    @property
    def instead(self) -> str:
        """Of a packed array that can't be sharded."""
        return f"{'q_gate' if self.gated else 'q'}, k and v as a tuple"


def as_called(name: str, qkv: Any) -> tuple[Function, tuple[Any, ...]]:
    """The function of this name for what it is given, and q, k and v: a packed array is in the place of q, alone."""
    if not isinstance(qkv, list | tuple):
        return Function(name, packed=True), (qkv, None, None)
    function = Function(name)
    if len(qkv) != 3:
        names = "(q_gate, k, v)" if function.gated else "(q, k, v)"
        raise TypeError(f"qkv must be one array or the three of {names}, got {len(qkv)} of them. Pass one or three.")
    return function, tuple(qkv)


class Sizes(NamedTuple):
    """What the sizes and options of a call say of its arrays."""

    sources: dict[str, Source]  # by array
    weights: tuple[str, ...]
    head_dim: int
    rotary_dim: int
    mrope: bool
    others: tuple[tuple[int, ...], ...]  # last axes that the first array has in the form with gates, or without


@functools.cache  # each eager call comes here
def sizes_of(options: Options, num_q_heads: int, num_kv_heads: int, head_dim: int) -> Sizes:
    rows = rows_of(options, num_q_heads, num_kv_heads, head_dim)
    weights = tuple(kind.weight for kind in rows.values() if kind.weight is not None)
    sources, is_mrope = sources_of(rows), options.mrope_section is not None
    change = head_dim if options.gate is None else -head_dim
    of_q = sources["q"]
    others: tuple[tuple[int, ...], ...] = ((of_q.token + num_q_heads * change,),)
    if of_q.heads is not None:
        others += ((num_q_heads, of_q.head + change),)
    return Sizes(sources, weights, head_dim, options.rotary_dim, is_mrope, others)


def check_arrays(function: Function, inputs: Inputs, sizes: Sizes) -> bool:
    """Whether heads have an axis of their own. `function` is the public one that was called."""
    first = function.array
    sources, weights, head_dim, rotary_dim, mrope, others = sizes
    arrays = {first: inputs.q} | {name: getattr(inputs, name) for name in sources if name != "q"}
    activations = tuple(arrays)
    for name in weights:
        arrays[name] = getattr(inputs, name)
    if inputs.cos_sin_cache is not None:
        arrays["cos_sin_cache"] = inputs.cos_sin_cache
    if inputs.positions is not None:
        arrays["positions"] = inputs.positions
    elif mrope:
        raise ValueError(
            "positions must be given with mrope_section, got None. "
            "Pass them, or pass mrope_section to pallas_qk.rope.cos_sin_rows and its rows here without it."
        )
    for name, array in arrays.items():
        check_array(name, array)

    check_dtype_name(first, str(inputs.q.dtype))
    for name in activations:
        if arrays[name].dtype != inputs.q.dtype:
            wanted, got = inputs.q.dtype, arrays[name].dtype
            raise TypeError(f"{name} must have the dtype of {first}, {wanted}, got {got}. Cast one to the other.")
    for name in (*weights, "cos_sin_cache"):
        if name in arrays:
            check_dtype_name(name, str(arrays[name].dtype))
    if inputs.positions is not None:
        _check_positions_dtype(inputs.positions.dtype)

    for name in weights:  # before q and k, of which another head_dim would say that they have other heads
        check_shape(name, arrays[name], (head_dim,), "head_dim; where that is left out, the length of the first weight")
    remedy = function.sizes(is_other=_ends_in(inputs.q, others))
    lead, split = _check_first(first, inputs, sources, mrope, remedy)
    for name in activations[1:]:
        source = sources[name]
        shape = (source.token // source.head, source.head) if split else (source.token,)
        hint = "num_kv_heads, head_dim; tokens come before heads" if split else "num_kv_heads * head_dim"
        check_shape(name, arrays[name], (*lead, *shape), f"the leading axes of {first}, then {hint}")
    if inputs.cos_sin_cache is None:
        return split
    leading = f"the leading axes of {first}"
    if inputs.positions is None:
        hint = f"{leading}, then rotary_dim; without positions the table has the row of each token"
        _check_broadcasts("cos_sin_cache", inputs.cos_sin_cache, lead, hint, back=(rotary_dim,))
        return split
    hint = "rotary_dim, which may be left out; each row is [cos | sin]"
    check_shape("cos_sin_cache", inputs.cos_sin_cache, ("max_position", rotary_dim), hint)
    if inputs.cos_sin_cache.shape[0] < 1:
        got = inputs.cos_sin_cache.shape
        raise ValueError(f"cos_sin_cache must have at least one row, got shape {got}. Build it for max_position >= 1.")
    if mrope:
        hint = f"one row each for time, height and width, then {leading}; leave mrope_section out for a single row"
        _check_broadcasts("positions", inputs.positions, lead, hint, front=(3,))
    else:
        hint = (
            f"{leading}{', so tokens come before heads' if split else ''}; three rows of positions need mrope_section"
        )
        _check_broadcasts("positions", inputs.positions, lead, hint)
    return split


def _check_positions_dtype(dtype: np.dtype) -> None:
    if jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"positions must be integers, got {dtype}. Cast whole numbers with astype(jnp.int32); of fractions pass "
            "the rows of pallas_qk.rope.cos_sin_rows as cos_sin_cache, and positions=None; cos and sin are one array, "
            "[cos | sin]."
        )
    check_integers("positions", dtype)


def check_integers(name: str, dtype: np.dtype) -> None:
    if not jnp.issubdtype(dtype, jnp.integer) or dtype.kind == "m":  # NumPy counts times among the integers
        remedy = (
            "Pass numbers, not a mask." if jnp.issubdtype(dtype, jnp.bool_) else "Cast them with astype(jnp.int32)."
        )
        raise TypeError(f"{name} must be integers, got {dtype}. {remedy}")


def _check_first(
    name: str, inputs: Inputs, sources: dict[str, Source], mrope: bool, remedy: str
) -> tuple[tuple[int, ...], bool]:
    """The leading axes, and whether heads have an axis of their own.

    A single head fits both readings of (..., 1, width). Slots, which have the leading axes, then tell, or else several
    heads of k, or the number of axes of the positions or of a gathered table. Without any it is an axis of heads.
    """
    source = sources["q"]
    q, flat = inputs.q, (source.token,)
    if source.heads is None:
        _check_trailing(name, q, [flat], remedy)
        return q.shape[:-1], False
    split = source.token // source.head, source.head
    _check_trailing(name, q, [flat, split], remedy)
    fits_split = q.shape[-2:] == split
    if fits_split and q.shape[-1:] == flat:
        of_k = sources.get("k")
        if inputs.slots is not None:
            fits_split = np.ndim(inputs.slots) != q.ndim - 1
        elif of_k is not None and of_k.token > of_k.head:
            fits_split = inputs.k.shape[-1:] == (of_k.head,)
        elif inputs.cos_sin_cache is not None:
            table = inputs.positions is None
            num_lead = inputs.cos_sin_cache.ndim - 1 if table else inputs.positions.ndim - mrope
            fits_split = num_lead != q.ndim - 1
    return q.shape[: -2 if fits_split else -1], fits_split


def _check_trailing(name: str, array: jax.Array | np.ndarray, trailing: list[tuple[int, ...]], remedy: str) -> None:
    if not _ends_in(array, trailing):
        raise wrong_last_axes(name, array, trailing, remedy)


def _ends_in(array: jax.Array | np.ndarray, trailing: Sequence[tuple[int, ...]]) -> bool:
    return any(array.shape[-len(shape) :] == shape for shape in trailing)


def wrong_last_axes(
    name: str, array: jax.Array | np.ndarray, trailing: Sequence[tuple[int | str, ...]], remedy: str
) -> ValueError:
    """Of an array that ends in none of these sizes; a str stands for a size that nothing tells."""
    shapes = " or ".join(f"(..., {', '.join(map(str, shape))})" for shape in trailing)
    return ValueError(f"{name} must have shape {shapes}, got {tuple(array.shape)}. Its sizes: {remedy}.")


def check_shape(name: str, array: jax.Array | np.ndarray, shape: tuple[int | str, ...], remedy: str) -> None:
    matches = array.ndim == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(array.shape, shape, strict=True)
    )
    if not matches:
        raise ValueError(f"{name} must have shape {_written(shape)}, got {tuple(array.shape)}. Its sizes: {remedy}.")


def _written(shape: tuple[int | str, ...]) -> str:
    """As Python writes a tuple; a str is the name of a size."""
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def _check_broadcasts(
    name: str,
    array: jax.Array | np.ndarray,
    lead: tuple[int, ...],
    remedy: str,
    *,
    front: tuple[int, ...] = (),
    back: tuple[int, ...] = (),
) -> None:
    """That what lies between `front` and `back` in the shape broadcasts to `lead`."""
    got = tuple(array.shape)
    start, end = len(front), len(got) - len(back)
    own = got[start:end]
    fits = start <= end and got[:start] == front and got[end:] == back and len(own) <= len(lead)
    if not fits or any(a not in (1, b) for a, b in zip(reversed(own), reversed(lead), strict=False)):
        rule = f"{name} must have shape {_written((*front, *lead, *back))}, or one that broadcasts to it"
        if fits and own == lead[: len(own)] and math.prod(lead[len(own) :]) == 1:  # NumPy aligns the last axes
            index = [":"] * (start + len(own)) + ["None"] * (len(lead) - len(own))
            remedy += f"; {name}[{', '.join(index)}] has an axis for each"
        raise ValueError(f"{rule}, got {got}. Its sizes: {remedy}.")


def as_integers(x: np.ndarray | int) -> np.ndarray:
    """As an array. Keeps 64-bit integers negative, or past every size, where JAX would narrow them to 32 bits."""
    if not isinstance(x, np.ndarray):
        return np.asarray(operator.index(x), np.int32)  # a layer, which an axis holds
    if x.dtype.itemsize == 8 and not jax.config.read("jax_enable_x64"):
        at_most = np.minimum(x, 2**31 - 1).astype(np.int64)  # of unsigned ones, too
        within: np.ndarray = np.maximum(at_most, -1)
        return within.astype(np.int32)
    return x
