"""What both torch functions refuse: tensors that don't fit each other, which the kernel would read past."""

from collections.abc import Sequence

import torch


def check(
    q_gate: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor,
    positions: torch.Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    mrope_section: Sequence[int] | None,
    *,
    activation_dtypes: tuple[torch.dtype, ...],
    position_dtypes: tuple[torch.dtype, ...],
) -> None:
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            f"rotary_dim must be even and between 2 and head_dim = {head_dim}, got {rotary_dim}. "
            "Pass int(partial_rotary_factor * head_dim)."
        )
    if mrope_section is not None:
        section = tuple(mrope_section)
        if len(section) != 3 or min(section) < 0 or sum(section) != rotary_dim // 2:
            raise ValueError(
                f"mrope_section must be three counts that sum to rotary_dim // 2 = {rotary_dim // 2}, got {section}. "
                "Pass those of time, height and width."
            )
    tokens = tuple(q_gate.shape[:1])
    widened = tuple(dtype for dtype in activation_dtypes if dtype.itemsize <= max(4, q_gate.itemsize))
    for name, tensor, shape, dtypes in (
        ("q_gate", q_gate, (*tokens, num_q_heads * 2 * head_dim), activation_dtypes),
        ("k", k, (*tokens, num_kv_heads * head_dim), (q_gate.dtype,)),
        ("q_weight", q_weight, (head_dim,), widened),
        ("k_weight", k_weight, (head_dim,), widened),
        ("cos_sin_cache", cos_sin_cache, (max(1, *cos_sin_cache.shape[:1]), rotary_dim), widened),
        ("positions", positions, tokens if mrope_section is None else (3, *tokens), position_dtypes),
    ):
        if tensor.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{name} must be {names}, got {tensor.dtype}. Cast it with to().")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}. Check the sizes given.")
        if tensor.device != q_gate.device:
            raise ValueError(f"{name} must be on {q_gate.device}, like q_gate, got {tensor.device}. Move it there.")
