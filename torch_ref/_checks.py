"""The rules for the arguments of both torch functions, checked from shapes, dtypes and static values alone."""

import numbers
import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch

_LARGEST = torch.finfo(torch.float32).max


class Static(NamedTuple):
    """The arguments that are not tensors, as plain Python numbers."""

    eps: float
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    mrope_section: tuple[int, int, int] | None
    norm_beta: float


def check_static(
    eps: float,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    mrope_section: list[int] | tuple[int, int, int] | None,
    norm_beta: float,
) -> Static:
    heads = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    for name, value in (heads | {"rotary_dim": rotary_dim}).items():
        if not _is_integer(value):
            raise TypeError(f"{name} must be an integer, got {_describe(value)}. Pass a Python int.")
    for name, value in heads.items():
        if value < 1:
            raise ValueError(
                f"{name} must be at least 1, got {value}. Pass the number that this device's tensors hold."
            )
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            "rotary_dim must be a positive even integer <= head_dim, "  # the words of vLLM's function
            f"got rotary_dim={rotary_dim}, head_dim={head_dim}. "
            "For a config with a partial_rotary_factor, pass int(partial_rotary_factor * head_dim)."
        )
    _check_real("eps", eps)
    if not 0 <= eps <= _LARGEST:
        raise ValueError(
            f"eps must be a finite float32 of at least 0, got {eps}. Model configs call it rms_norm_eps and the like."
        )
    _check_real("norm_beta", norm_beta)
    if not abs(norm_beta) <= _LARGEST:
        raise ValueError(
            f"norm_beta must be a finite float32, got {norm_beta}. "
            "Pass 1.0 for weights stored minus one (Gemma, Qwen3.5), else 0.0."
        )
    return Static(
        eps=float(eps),
        num_q_heads=operator.index(num_q_heads),
        num_kv_heads=operator.index(num_kv_heads),
        head_dim=operator.index(head_dim),
        rotary_dim=operator.index(rotary_dim),
        mrope_section=_check_mrope_section(mrope_section, rotary_dim),
        norm_beta=float(norm_beta),
    )


def check_tensors(
    q_gate: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    static: Static,
    *,
    activation_dtypes: tuple[torch.dtype, ...],
    position_dtypes: tuple[torch.dtype, ...],
) -> None:
    tensors = {
        "q_gate": q_gate,
        "k": k,
        "q_weight": q_weight,
        "k_weight": k_weight,
        "cos_sin_cache": cos_sin_cache,
        "positions": positions,
    }
    for name, tensor in tensors.items():
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch tensor, got {_describe(tensor)}. Convert it with torch.as_tensor.")

    if q_gate.dtype not in activation_dtypes:
        raise TypeError(f"q_gate must be {_names(activation_dtypes)}, got {_name(q_gate.dtype)}. Cast it with to().")
    if k.dtype != q_gate.dtype:
        wanted, got = _name(q_gate.dtype), _name(k.dtype)
        raise TypeError(f"k must have the dtype of q_gate, {wanted}, got {got}. Cast one to the other.")
    widened = [dtype for dtype in activation_dtypes if dtype.itemsize <= max(4, q_gate.itemsize)]
    for name in ("q_weight", "k_weight", "cos_sin_cache"):
        if tensors[name].dtype not in widened:
            raise TypeError(f"{name} must be {_names(widened)}, got {_name(tensors[name].dtype)}. Cast it with to().")
    if positions.dtype not in position_dtypes:
        got = _name(positions.dtype)
        raise TypeError(f"positions must be {_names(position_dtypes)}, got {got}. Cast them with to(torch.int64).")

    head_dim, rotary_dim = static.head_dim, static.rotary_dim
    _check_shape("q_gate", q_gate, ("num_tokens", static.num_q_heads * 2 * head_dim), "num_q_heads * 2 * head_dim")
    num_tokens = q_gate.shape[0]
    _check_shape("k", k, (num_tokens, static.num_kv_heads * head_dim), "num_kv_heads * head_dim")
    _check_shape("q_weight", q_weight, (head_dim,), "head_dim")
    _check_shape("k_weight", k_weight, (head_dim,), "head_dim")
    _check_shape("cos_sin_cache", cos_sin_cache, ("max_position", rotary_dim), "rotary_dim, each row [cos | sin]")
    if cos_sin_cache.shape[0] < 1:
        raise ValueError(
            f"cos_sin_cache must have at least one row, got shape {tuple(cos_sin_cache.shape)}. "
            "Build it for max_position >= 1."
        )
    if static.mrope_section is None:
        _check_shape("positions", positions, (num_tokens,), "(3, num_tokens) positions need mrope_section")
    else:
        hint = "one row each for time, height and width; leave mrope_section out for 1-D positions"
        _check_shape("positions", positions, (3, num_tokens), hint)

    for name, tensor in tensors.items():
        if tensor.device != q_gate.device:
            devices = f"{q_gate.device}, got {tensor.device}"
            raise ValueError(f"{name} must be on the device of q_gate, {devices}. Move it with to(q_gate.device).")


def _check_shape(name: str, tensor: torch.Tensor, shape: tuple[int | str, ...], hint: str) -> None:
    matches = tensor.ndim == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(tensor.shape, shape, strict=True)
    )
    if not matches:
        inner = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name} must have shape ({inner}), got {tuple(tensor.shape)}. Its sizes: {hint}.")


def _check_real(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {_describe(value)}. Pass a Python float.")


def _check_mrope_section(mrope_section, rotary_dim: int) -> tuple[int, int, int] | None:
    if mrope_section is None:
        return None
    rule = f"mrope_section must be three integers >= 0 that sum to rotary_dim // 2 = {rotary_dim // 2}"
    remedy = "Pass the counts of time, height and width frequencies, such as (11, 11, 10) for rotary_dim=64."
    if not isinstance(mrope_section, list | tuple) or not all(_is_integer(n) for n in mrope_section):
        raise TypeError(f"{rule}, got {_describe(mrope_section)}. {remedy}")
    section = tuple(operator.index(n) for n in mrope_section)
    if len(section) != 3 or min(section) < 0 or sum(section) != rotary_dim // 2:
        raise ValueError(f"{rule}, got {section}. {remedy}")
    time, height, width = section
    return time, height, width


def _is_integer(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    *first, last = map(_name, dtypes)
    return f"{', '.join(first)} or {last}"


def _describe(value) -> str:
    """What an error says of a value that it can't take; never reads a device."""
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a {kind} of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"{value!r:.80} of type {kind}"
