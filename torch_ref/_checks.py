"""What reference and oracle refuse: tensors that don't fit each other, which a kernel would read or write past."""

from collections.abc import Sequence

import torch

CACHE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTEGER_DTYPES = (
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)


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
    _check_tensors(
        ("q_gate", q_gate, (*tokens, num_q_heads * 2 * head_dim), activation_dtypes),
        ("k", k, (*tokens, num_kv_heads * head_dim), (q_gate.dtype,)),
        ("q_weight", q_weight, (head_dim,), widened),
        ("k_weight", k_weight, (head_dim,), widened),
        ("cos_sin_cache", cos_sin_cache, (max(1, *cos_sin_cache.shape[:1]), rotary_dim), widened),
        ("positions", positions, tokens if mrope_section is None else (3, *tokens), position_dtypes),
    )


def check_cache_write(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Any strides fit."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype not in CACHE_DTYPES:
            raise TypeError(
                f"{name} must be float16, bfloat16 or float32, got {cache.dtype}. "
                "Allocate it in one of these: fewer bits would need scales."
            )
    for name, tensor, axes, num_axes in (
        ("k", k, "(T, num_kv_heads, head_dim)", 3),
        ("k_cache", k_cache, "(num_blocks, block_size, num_kv_heads, head_dim)", 4),
    ):
        if tensor.ndim != num_axes:
            raise ValueError(f"{name} must have shape {axes}, got {tuple(tensor.shape)}. Pass such a view of it.")
    blocks, row = tuple(k_cache.shape[:2]), tuple(k.shape[1:])
    _check_tensors(
        ("k", k, tuple(k.shape), CACHE_DTYPES),
        ("v", v, tuple(k.shape), (k.dtype,)),
        ("k_cache", k_cache, (*blocks, *row), CACHE_DTYPES),
        ("v_cache", v_cache, (*blocks, *row), (k_cache.dtype,)),
        ("slot_mapping", slot_mapping, tuple(k.shape[:1]), INTEGER_DTYPES),
    )


def _check_tensors(*tensors: tuple[str, torch.Tensor, tuple[int, ...], tuple[torch.dtype, ...]]) -> None:
    """Each is a name, a tensor, its shape and what its dtype may be. All lie where the first does."""
    first, device = tensors[0][0], tensors[0][1].device
    for name, tensor, shape, dtypes in tensors:
        if tensor.dtype not in dtypes:
            names = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{name} must be {names}, got {tensor.dtype}. Cast it with to().")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}. Check the sizes given.")
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device}, like {first}, got {tensor.device}. Move it there.")
