"""The checks of a call's values that are no arrays: sizes, numbers, names, and how an error describes a value."""

import math
import numbers
import operator
from collections.abc import Mapping, Sequence
from typing import Any, cast, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_qk._options import MropeLayout, NormOrder, RotationName

DTYPES = ("float16", "bfloat16", "float32")  # of activations, weights and tables, each for itself
MAKE_TABLE = "pallas_qk.rope.cos_sin_cache makes it, with rows [cos | sin]; positions stand behind it."
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_LARGEST = float(np.finfo(np.float32).max)  # the op computes in float32


def check_sizes(
    num_q_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int, *, rotated: bool = True, q_alone: bool = False
) -> tuple[int, ...]:
    """The four sizes as Python ints. Where nothing is `rotated`, rotary_dim is 0, and num_kv_heads where q is alone."""
    sizes = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    for name, value in (sizes | {"rotary_dim": rotary_dim}).items():
        _check_size(name, value)
    if q_alone:
        if num_kv_heads != 0:
            raise ValueError(
                f"num_kv_heads must be 0 where k is None, got {num_kv_heads}. Pass 0 for q alone, or pass k."
            )
        del sizes["num_kv_heads"]
    for name, value in sizes.items():
        check_count(name, value)
    if not rotated:
        if rotary_dim != 0:
            raise ValueError(
                f"rotary_dim must be 0 or left out where cos_sin_cache is None, got {rotary_dim}. "
                "Leave it out where nothing is rotated, or pass the table."
            )
    elif rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            "rotary_dim must be a positive even integer <= head_dim, "  # the original's words
            f"got rotary_dim={rotary_dim}, head_dim={head_dim}. "
            "For a config with a partial_rotary_factor, pass int(partial_rotary_factor * head_dim)."
        )
    return tuple(map(operator.index, (num_q_heads, num_kv_heads, head_dim, rotary_dim)))


def check_known(values: Mapping[str, Any]) -> None:
    """That no jit has traced one of these numbers and choices, which decide what is compiled; names all that are."""
    parts = {name: value if isinstance(value, list | tuple) else [value] for name, value in values.items()}
    traced = {name: x for name, part in parts.items() for x in part if _is_traced(x) and not x.shape}
    if traced:
        *names, last = traced
        all_of_them, them = (f"{', '.join(names)} and {last}", "them") if names else (last, "it")
        raise TypeError(
            f"{all_of_them} must be known when tracing, got {', '.join(map(describe, traced.values()))}. "
            f"Name {them} in static_argnames of your jax.jit, or hold {them} in a lambda."
        )


def check_static_integer(name: str, value: int, remedy: str = "Pass a Python int.") -> None:
    if not is_integer(value):
        check_known({name: value})
        raise TypeError(f"{name} must be an integer known when tracing, got {describe(value)}. {remedy}")


def _check_size(name: str, value: int) -> None:
    remedy = "Pass a Python int; the order is num_q_heads, num_kv_heads, head_dim, rotary_dim."
    check_static_integer(name, value, _remedy_of_number(value, remedy))


def _remedy_of_number(value: object, remedy: str) -> str:
    """What to do about a number that stands behind the arrays of a call: `remedy`, where it isn't one of them."""
    if math.prod(getattr(value, "shape", ())) != 1:
        return "An array too many stands before it. Where a function takes q, k and v, they are one tuple."
    return remedy


def check_count(name: str, value: int) -> None:
    """Of heads, or of elements of a head."""
    _check_size(name, value)
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}. Pass the number that this device's arrays hold.")


def check_num_tokens(num_tokens: int) -> int:
    if not is_integer(num_tokens):
        raise TypeError(f"num_tokens must be an integer, got {describe(num_tokens)}. Pass a Python int.")
    if num_tokens < 0:
        raise ValueError(f"num_tokens must be at least 0, got {num_tokens}. Pass the size of the tokens' axis.")
    return operator.index(num_tokens)


def check_dtype(name: str, dtype: DTypeLike | None, more: tuple[str, ...] = ()) -> str:
    """The name of a dtype of activations, weights or tables, or one of `more`."""
    try:
        found = describe(None) if dtype is None else str(jnp.dtype(dtype))  # NumPy takes None for float64
    except TypeError:
        found = describe(dtype)
    if found not in (*DTYPES, *more):
        *names, last = (*DTYPES, *more)
        raise TypeError(f"{name} must be {', '.join(names)} or {last}, got {found}. Pass one of these.")
    return found


def check_dtype_name(name: str, found: str) -> None:
    if found not in DTYPES:
        remedy = "Cast it with astype."
        if name == "cos_sin_cache":
            remedy = MAKE_TABLE if "int" in found else f"{remedy} {MAKE_TABLE}"
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {found}. {remedy}")


def check_platform(platform: str | None) -> None:
    if platform is not None and not _is_one_of(PLATFORMS, platform):
        names = ", ".join(repr(name) for name in PLATFORMS)
        raise ValueError(
            f"platform must be None or one of {names}, got {platform!r}. None means the default device's platform."
        )


def check_eps(eps: float) -> float:
    """`eps` as a Python float."""
    _check_real("eps", eps, _remedy_of_number(eps, "Pass a Python float."))
    if is_integer(eps) and eps >= 1:
        raise ValueError(
            f"eps must be a small float, got the integer {eps}. Pass it in front of num_q_heads, such as 1e-6."
        )
    if not 0 <= eps <= _LARGEST:
        raise ValueError(
            f"eps must be a finite float32 of at least 0, got {eps}. Model configs call it rms_norm_eps and the like."
        )
    return float(eps)


def check_norm_beta(norm_beta: float) -> float:
    """`norm_beta` as a Python float."""
    _check_real("norm_beta", norm_beta, "Pass a Python float.")
    if not abs(norm_beta) <= _LARGEST:
        raise ValueError(
            f"norm_beta must be a finite float32, got {norm_beta}. "
            "Pass 1.0 for weights stored minus one (Gemma, Qwen3.5), else 0.0."
        )
    return float(norm_beta) + 0.0  # without a -0.0, whose sum with a weight of -0.0 would be another


def _check_real(name: str, value: object, remedy: str) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        check_known({name: value})
        raise TypeError(f"{name} must be a real number known when tracing, got {describe(value)}. {remedy}")


def check_mrope_section(mrope_section: Sequence[int] | None, rotary_dim: int) -> tuple[int, int, int] | None:
    """None, or the section as a tuple of three ints."""
    if mrope_section is None:
        return None
    rule = f"mrope_section must be three integers >= 0 that sum to rotary_dim // 2 = {rotary_dim // 2}"
    remedy = "Pass the counts of time, height and width frequencies, such as (11, 11, 10) for rotary_dim=64."
    if not isinstance(mrope_section, list | tuple) or not all(is_integer(n) for n in mrope_section):
        raise TypeError(f"{rule}, got {describe(mrope_section)}. {remedy}")
    section = tuple(operator.index(n) for n in mrope_section)
    if len(section) != 3 or min(section) < 0 or sum(section) != rotary_dim // 2:
        raise ValueError(f"{rule}, got {section}. {remedy}")
    return section


def check_mrope_layout(mrope_layout: str) -> MropeLayout:
    remedy = "Pass 'interleaved' for Qwen3-VL and Qwen3.5, 'sectioned' for Qwen2-VL and Qwen2.5-VL."
    _check_name("mrope_layout", mrope_layout, get_args(MropeLayout), remedy)
    return cast(MropeLayout, mrope_layout)


def check_rotation(rotation: str) -> RotationName:
    remedy = "Pass 'halves' for elements j and j + rotary_dim // 2 (NeoX), 'pairs' for 2j and 2j + 1 (GPT-J)."
    _check_name("rotation", rotation, get_args(RotationName), remedy)
    return cast(RotationName, rotation)


def check_norm_order(norm_order: str) -> NormOrder:
    remedy = "Pass 'rotation_first' for models that rotate before the norm, such as HunYuan."
    _check_name("norm_order", norm_order, get_args(NormOrder), remedy)
    return cast(NormOrder, norm_order)


def check_bool(name: str, value: bool, remedy: str) -> bool:
    if not isinstance(value, bool):
        check_known({name: value})
        raise TypeError(f"{name} must be a bool known when tracing, got {describe(value)}. {remedy}")
    return value


def check_round_norm(round_norm: bool) -> bool:
    return check_bool("round_norm", round_norm, "Pass False to keep float32 between norm and rotation.")


def check_v_norm(v_norm: bool) -> bool:
    return check_bool("v_norm", v_norm, "Pass True for a v that is normalised without a weight.")


def check_weights(has_q_weight: bool, has_k_weight: bool, norm_beta: float, *, q_alone: bool = False) -> None:
    """That both norms have weights, or neither; of q alone, that there is none for k."""
    if q_alone:
        if has_k_weight:
            raise ValueError("k_weight must be None where k is, got one. Leave it out for q alone, or pass k.")
    elif has_q_weight != has_k_weight:
        got = "q_weight" if has_q_weight else "k_weight"
        raise ValueError(
            f"q_weight and k_weight must both be given or both be None, got {got} alone. "
            "Pass ones for a norm without a weight beside one that has one."
        )
    if not has_q_weight and norm_beta != 0:
        raise ValueError(
            f"norm_beta must be 0 without weights, got {norm_beta}. Leave it out: there is nothing to add it to."
        )


def check_no_table(has_positions: bool, has_mrope_section: bool) -> None:
    if has_positions or has_mrope_section:
        got = "mrope_section" if has_mrope_section else "positions"
        raise ValueError(
            f"positions and mrope_section must be left out where cos_sin_cache is None, got {got}. "
            "Pass None for them where nothing is rotated, or pass the table."
        )


def check_copy_gate(copy_gate: bool | str) -> str:
    """`Options.gate`."""
    if copy_gate is True:
        return "copied"
    if copy_gate is False:
        return "in_place"
    if isinstance(copy_gate, str) and copy_gate == "never":
        return "handed_on"
    check_known({"copy_gate": copy_gate})
    error = ValueError if isinstance(copy_gate, str) else TypeError
    raise error(
        f"copy_gate must be True, False or 'never', known when tracing, got {describe(copy_gate)}. "
        "Pass False to leave the gate where it lies, for XLA to fuse into what reads it."
    )


def check_implementation(implementation: str | None, known: tuple[str, ...]) -> None:
    if implementation is not None and not _is_one_of(known, implementation):
        names = ", ".join(repr(name) for name in known)
        raise ValueError(
            f"implementation must be None or one of {names}, got {implementation!r}. None picks the first that runs."
        )


def _check_name(name: str, value: str, names: tuple[str, ...], remedy: str) -> None:
    if not _is_one_of(names, value):
        raise ValueError(f"{name} must be {' or '.join(map(repr, names))}, got {value!r}. {remedy}")


def _is_one_of(names: tuple[str, ...], value: object) -> bool:
    return isinstance(value, str) and value in names  # an array is compared element by element


def is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_traced(value: object) -> bool:
    return isinstance(value, jax.core.Tracer)


def describe(value: Any) -> str:
    """What an error says of a value that it can't take; never reads a device."""
    if value is None:
        return "None"
    if _is_traced(value):
        return f"a traced value {value.aval.str_short()}"
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a {kind} of shape {tuple(value.shape)} and dtype {value.dtype}"
    if isinstance(value, Mapping):
        return f"a {kind} with the keys {list(value)!r:.80}"
    if _is_long(value):
        return f"a {kind} of length {len(value)} that starts with {describe(value[0])}"
    return f"{value!r:.80} of type {kind}"


def _is_long(value: object) -> bool:
    """Whether it is a sequence whose text would show, and so read, elements of arrays, or more than eight values."""
    if isinstance(value, list | tuple):
        return len(value) > 8 or any(hasattr(x, "dtype") or isinstance(x, Mapping) or _is_long(x) for x in value)
    return False
