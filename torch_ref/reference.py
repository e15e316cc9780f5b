"""The operation and the write to a KV cache in eager PyTorch, as a model writes them: to read, and to differentiate."""

from collections.abc import Sequence

import torch

from torch_ref._checks import INTEGER_DTYPES, check, check_cache_write

ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
POSITION_DTYPES = INTEGER_DTYPES


def fused_qk_rmsnorm_rope_gate(
    q_gate: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin_cache: torch.Tensor | None,
    positions: torch.Tensor | None,
    eps: float,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    mrope_section: list[int] | tuple[int, int, int] | None = None,
    norm_beta: float = 0.0,
    *,
    rotation: str = "halves",
    round_norm: bool = True,
    norm_order: str = "norm_first",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalises and rotates q and k per head and splits off the gate.

    T tokens, Hq query heads, Hkv key heads, D head_dim, R rotary_dim. Each head x of D lanes becomes

        y = round(x / sqrt(mean(x^2) + eps) * (weight + norm_beta))
        out[j]       = y[j] * cos[j] - y[j + R/2] * sin[j]
        out[j + R/2] = y[j + R/2] * cos[j] + y[j] * sin[j]        for j < R/2
        out[R:]      = y[R:]

    With `rotation="pairs"` lanes 2j and 2j + 1 take the places of j and j + R/2. Nothing rotates where R is 0.

    Args:
      q_gate: (T, Hq*2*D), each head [q | gate]; float16, bfloat16, float32 or float64.
      k: (T, Hkv*D), dtype of `q_gate`.
      q_weight, k_weight: (D,), each float16, bfloat16 or float32, or float64 where `q_gate` is.
      cos_sin_cache: (max_position, R), each row [cos | sin] for either `rotation`; a dtype of the weights. None rotates
        nothing.
      positions: (T,), or (3, T) with `mrope_section`; any integer dtype. It is None exactly where `cos_sin_cache` is.
      eps: added to the mean of squares.
      num_q_heads, num_kv_heads, head_dim, rotary_dim: Hq, Hkv, D and R; R is even and at most D. It is 0 exactly where
        `cos_sin_cache` and `positions` are None.
      mrope_section: counts of time, height and width frequencies, interleaved: frequency j reads row a of
        `positions`, a in (1, 2), if j % 3 == a and j < 3 * mrope_section[a], else row 0.
      norm_beta: added to the weights; 1 for weights stored around zero.
      rotation: "halves" rotates lanes j and j + R/2 by frequency j, "pairs" lanes 2j and 2j + 1, as GPT-J does.
      round_norm: False leaves out `round`, and only the output is rounded.
      norm_order: "rotation_first" rotates x, rounds unless `round_norm` is False, and normalises what is rotated.

    Returns:
      q_out (T, Hq*D), k_out (T, Hkv*D) and gate_out (T, Hq*D) in the dtype of `q_gate`, each in memory of its own.

    Raises:
      ValueError: a shape, rotary_dim, mrope_section or rotation breaks a rule above, or the tensors lie on different
        devices.
      TypeError: a dtype does.

    Numerics: float32 inside, float64 for float64. `round` is the trip to the dtype of `q_gate` and back, nothing for
    float32 and float64; autograd takes it for the identity and rounds the gradient that passes it, too. A negative
    position reads row 0 of the table. One past the table gives NaN in the lanes (both halves) whose frequency reads it,
    and nowhere else. The gate keeps its bits.

    Semantics from `fused_qk_rmsnorm_rope_gate` of vLLM 0.33.0, which leaves positions outside the table undefined.
    """
    tensors = (q_gate, k, q_weight, k_weight, cos_sin_cache, positions)
    sizes = (num_q_heads, num_kv_heads, head_dim, rotary_dim, mrope_section)
    check(*tensors, *sizes, rotation, norm_order, activation_dtypes=ACTIVATION_DTYPES, position_dtypes=POSITION_DTYPES)

    num_tokens = q_gate.shape[0]
    compute_dtype = torch.float64 if q_gate.dtype == torch.float64 else torch.float32
    q, gate = q_gate.reshape(num_tokens, num_q_heads, 2, head_dim).unbind(dim=2)
    k_rows, angles = k.reshape(num_tokens, num_kv_heads, head_dim), None
    if cos_sin_cache is not None and positions is not None:
        angles = _gather_cos_sin(cos_sin_cache.to(compute_dtype), positions, mrope_section)

    def treated(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if angles is None:
            return _rms_norm(x, weight, eps, norm_beta, round_norm)
        if norm_order == "norm_first":
            return _rotate(_rms_norm(x, weight, eps, norm_beta, round_norm), *angles, rotation)
        rotated = _rotate(x.to(compute_dtype), *angles, rotation)
        return _rms_norm(rotated.to(x.dtype) if round_norm else rotated, weight, eps, norm_beta, False)

    q_out, k_out = treated(q, q_weight), treated(k_rows, k_weight)
    return (
        q_out.to(q_gate.dtype).flatten(1),
        k_out.to(k.dtype).flatten(1),
        gate.flatten(1).clone(memory_format=torch.contiguous_format),
    )


@torch.no_grad()
def write_kv_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> None:
    """Writes rows of k and v into a KV cache, in place.

    T tokens, Hkv key heads, D head_dim. No tensor needs to be contiguous: another layout is a permuted view.

    Args:
      k, v: (T, Hkv, D); float16, bfloat16 or float32.
      k_cache, v_cache: (num_blocks, block_size, Hkv, D); float16, bfloat16 or float32, whatever k and v have.
      slot_mapping: (T,), any integer dtype: token t goes to block slot // block_size, place slot % block_size. Nothing
        is written for a slot that is negative, or at or past num_blocks * block_size.

    Raises:
      ValueError: a shape breaks a rule above, or the tensors lie on different devices.
      TypeError: a dtype does.

    Two tokens with one slot: which one stays is not said, and its elements may come from both. Autograd doesn't see it.

    Numerics: an element keeps its bits where the cache has its dtype, else it is rounded to nearest even.

    Semantics from `reshape_and_cache_flash` of vLLM 0.33.0, for caches that aren't quantized. The upper bound of slots
    and checked shapes are added; there `slot_mapping` may be shorter than k and v, whose other rows are padding.
    """
    check_cache_write(k, v, k_cache, v_cache, slot_mapping)
    num_blocks, block_size = k_cache.shape[:2]
    slots = slot_mapping.to(torch.int64)  # 2^63 and more become negative
    written = (slots >= 0) & (slots < num_blocks * block_size)
    slots = slots[written]
    at = slots // block_size, slots % block_size
    k_cache[at] = k[written].to(k_cache.dtype)
    v_cache[at] = v[written].to(v_cache.dtype)


def _rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, norm_beta: float, round_norm: bool) -> torch.Tensor:
    """(T, heads, D) in float32 or float64. With `round_norm` the dtype of `x` can represent its values."""
    compute_dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = x.to(compute_dtype)
    inv_rms = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps)
    y = wide * inv_rms * (weight.to(compute_dtype) + norm_beta)
    return y.to(x.dtype).to(compute_dtype) if round_norm else y


def _gather_cos_sin(
    table: torch.Tensor, positions: torch.Tensor, mrope_section: Sequence[int] | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two (T, 1, R/2) tensors, one value a token and frequency."""
    rotary_dim = table.shape[1]
    rows = positions.to(torch.int64)
    past = rows >= table.shape[0]
    if positions.dtype == torch.uint64:
        past |= rows < 0  # 2^63 and more
    values = table[rows.clamp(min=0).where(~past, 0)].masked_fill(past[..., None], float("nan"))
    if mrope_section is not None:
        frequency = torch.arange(rotary_dim // 2, device=table.device)
        axis = torch.zeros_like(frequency)
        for a in (1, 2):
            axis[(frequency % 3 == a) & (frequency < 3 * mrope_section[a])] = a
        lane = torch.arange(rotary_dim, device=table.device)
        values = values[axis.repeat(2), :, lane].T  # (3, T, R) -> (R, T) -> (T, R)
    cos, sin = values[:, None].chunk(2, dim=-1)
    return cos, sin


def _rotate(y: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotation: str) -> torch.Tensor:
    half = cos.shape[-1]
    rotary, rest = y.split([2 * half, y.shape[-1] - 2 * half], dim=-1)
    shape, axis = ((half, 2), -1) if rotation == "pairs" else ((2, half), -2)
    y1, y2 = rotary.unflatten(-1, shape).unbind(axis)
    rotated = torch.stack([y1 * cos - y2 * sin, y2 * cos + y1 * sin], dim=axis)
    return torch.cat([rotated.flatten(-2), rest], dim=-1)
