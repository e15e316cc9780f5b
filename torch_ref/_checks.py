"""What reference and oracle refuse: tensors that don't fit each other, which a kernel would read or write past."""

from collections.abc import Iterable, Sequence

import torch

ROTATIONS = ("halves", "pairs")
NORM_ORDERS = ("norm_first", "rotation_first")
CACHE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
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
    cos_sin_cache: torch.Tensor | None,
    positions: torch.Tensor | None,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    mrope_section: Sequence[int] | None,
    rotation: str,
    norm_order: str,
    *,
    activation_dtypes: tuple[torch.dtype, ...],
    position_dtypes: tuple[torch.dtype, ...],
) -> None:
    """Where nothing rotates, `cos_sin_cache`, `positions` and `mrope_section` are None and `rotary_dim` is 0."""
    if norm_order not in NORM_ORDERS:
        raise ValueError(
            f"norm_order must be {' or '.join(map(repr, NORM_ORDERS))}, got {norm_order!r}. "
            "Pass 'rotation_first' where the norm follows the rotation, as in HunYuan."
        )
    if rotation not in ROTATIONS:
        raise ValueError(
            f"rotation must be {' or '.join(map(repr, ROTATIONS))}, got {rotation!r}. "
            "Pass 'pairs' where lanes 2i and 2i + 1 rotate together, as in GPT-J."
        )
    if (cos_sin_cache is None) != (positions is None):
        missing, given = ("positions", "cos_sin_cache") if positions is None else ("cos_sin_cache", "positions")
        raise ValueError(
            f"{missing} must be a tensor beside {given}, got None. Pass both, or neither and rotary_dim=0."
        )
    if cos_sin_cache is None:
        _check_no_rotation(head_dim, rotary_dim, mrope_section)
    elif rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            f"rotary_dim must be even and between 2 and head_dim = {head_dim}, got {rotary_dim}. "
            "Pass int(partial_rotary_factor * head_dim)."
        )
    elif mrope_section is not None:
        section = tuple(mrope_section)
        if len(section) != 3 or min(section) < 0 or sum(section) != rotary_dim // 2:
            raise ValueError(
                f"mrope_section must be three counts that sum to rotary_dim // 2 = {rotary_dim // 2}, got {section}. "
                "Pass those of time, height and width."
            )
    tokens = tuple(q_gate.shape[:1])
    widened = tuple(dtype for dtype in activation_dtypes if dtype.itemsize <= max(4, q_gate.itemsize))
    tensors = [
        ("q_gate", q_gate, (*tokens, num_q_heads * 2 * head_dim), activation_dtypes),
        ("k", k, (*tokens, num_kv_heads * head_dim), (q_gate.dtype,)),
        ("q_weight", q_weight, (head_dim,), widened),
        ("k_weight", k_weight, (head_dim,), widened),
    ]
    if cos_sin_cache is not None and positions is not None:
        tensors += [
            ("cos_sin_cache", cos_sin_cache, (max(1, *cos_sin_cache.shape[:1]), rotary_dim), widened),
            ("positions", positions, tokens if mrope_section is None else (3, *tokens), position_dtypes),
        ]
    _check_tensors(*tensors)


def _check_no_rotation(head_dim: int, rotary_dim: int, mrope_section: Sequence[int] | None) -> None:
    if rotary_dim != 0:
        raise ValueError(
            f"rotary_dim must be 0 without cos_sin_cache and positions, got {rotary_dim}. "
            "Pass both, or 0 for no rotation."
        )
    if mrope_section is not None:
        raise ValueError(
            f"mrope_section must be None without cos_sin_cache and positions, got {mrope_section}. "
            "Leave it out: no position is read."
        )
    if head_dim < 1:
        raise ValueError(f"head_dim must be at least 1, got {head_dim}. Pass the number of lanes of a head.")


def check_cache_write(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *,
    cache_dtypes: tuple[torch.dtype, ...] = CACHE_DTYPES,
) -> None:
    """Any strides fit."""
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        if cache.dtype not in cache_dtypes:
            *others, last = _names(cache_dtypes)
            why = "" if set(FP8_DTYPES) <= set(cache_dtypes) else ": fewer bits would need scales"
            raise TypeError(
                f"{name} must be {', '.join(others)} or {last}, got {cache.dtype}. Allocate it in one of these{why}."
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
        ("k_cache", k_cache, (*blocks, *row), cache_dtypes),
        ("v_cache", v_cache, (*blocks, *row), (k_cache.dtype,)),
        ("slot_mapping", slot_mapping, tuple(k.shape[:1]), INTEGER_DTYPES),
    )


def check_scales(
    k: torch.Tensor, k_cache: torch.Tensor, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None
) -> None:
    """8-bit caches have both, other caches none."""
    (cache,), num_heads = _names((k_cache.dtype,)), k.shape[1]
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if k_cache.dtype not in FP8_DTYPES:
            if scale is not None:
                raise ValueError(
                    f"{name} must be None for caches of {cache}, got {type(scale).__name__}. "
                    "Leave it out: rows are cast as they are, and a scale would be ignored."
                )
            continue
        if not isinstance(scale, torch.Tensor):
            raise (ValueError if scale is None else TypeError)(
                f"{name} must be a float32 tensor for caches of {cache}, got {scale}. "
                "Pass what the codes will be multiplied by."
            )
        shape = tuple(scale.shape)
        if shape not in ((), (1,), (num_heads,)):
            raise ValueError(
                f"{name} must have shape (), (1,) or (num_kv_heads,) = ({num_heads},), got {shape}. "
                "Pass one scale, or one for each kv head."
            )
        _check_tensors(("k", k, tuple(k.shape), (k.dtype,)), (name, scale, shape, (torch.float32,)))


def _names(dtypes: Iterable[torch.dtype]) -> list[str]:
    return [str(dtype).removeprefix("torch.") for dtype in dtypes]


def _check_tensors(*tensors: tuple[str, torch.Tensor, tuple[int, ...], tuple[torch.dtype, ...]]) -> None:
    """Each is a name, a tensor, its shape and what its dtype may be. All lie where the first does."""
    first, device = tensors[0][0], tensors[0][1].device
    for name, tensor, shape, dtypes in tensors:
        if tensor.dtype not in dtypes:
            raise TypeError(f"{name} must be {' or '.join(_names(dtypes))}, got {tensor.dtype}. Cast it with to().")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}. Check the sizes given.")
        if tensor.device != device:
            raise ValueError(f"{name} must be on {device}, like {first}, got {tensor.device}. Move it there.")
