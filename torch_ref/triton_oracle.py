"""The operation as one Triton kernel, with the arithmetic of vLLM 0.33.0's, and the kernel that writes a KV cache.

They give the bits that GPU kernels here must give. On CUDA tensors they are compiled. On CPU tensors Triton's
interpreter runs the same functions in NumPy: slow, for tests.
"""

import contextlib
import functools
import threading
import types

import torch
import triton
import triton.language as tl

from torch_ref._checks import CACHE_DTYPES, FP8_DTYPES, check, check_cache_write, check_scales

ACTIVATION_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
POSITION_DTYPES = (torch.int32, torch.int64)

_TRITON_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}

_sum = tl.sum  # a name of this module, so that the interpreter can be given another function under it


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
    """Normalises and rotates q and k per head and splits off the gate, in one kernel.

    `torch_ref.reference` has the formula. T tokens, Hq query heads, Hkv key heads, D head_dim, R rotary_dim.

    Args:
      q_gate: (T, Hq*2*D), each head [q | gate]; float16, bfloat16 or float32. Tokens may lie any distance apart.
      k: (T, Hkv*D), dtype of `q_gate`. Tokens may lie any distance apart.
      q_weight, k_weight: (D,), each float16, bfloat16 or float32.
      cos_sin_cache: (max_position, R), each row [cos | sin] for either `rotation`; float16, bfloat16 or float32. None
        rotates nothing.
      positions: (T,), or (3, T) with `mrope_section`; int32 or int64, each in [0, max_position). It is None exactly
        where `cos_sin_cache` is.
      eps: added to the mean of squares.
      num_q_heads, num_kv_heads, head_dim, rotary_dim: Hq, Hkv, D and R; R is even and at most D. It is 0 exactly where
        `cos_sin_cache` and `positions` are None.
      mrope_section: counts of time, height and width frequencies, interleaved: frequency j reads row a of
        `positions`, a in (1, 2), if j % 3 == a and j < 3 * mrope_section[a], else row 0.
      norm_beta: added to the weights; 1 for weights stored around zero.
      rotation: "halves" rotates lanes j and j + R/2 by frequency j, "pairs" lanes 2j and 2j + 1, as GPT-J does.
      round_norm: False keeps float32 between norm and rotation, and only the output is rounded.
      norm_order: "rotation_first" rotates x and then normalises what is rotated.

    Returns:
      q_out (T, Hq*D), k_out (T, Hkv*D) and gate_out (T, Hq*D) in the dtype of `q_gate`, dense.

    Raises:
      ValueError: a shape, rotary_dim, mrope_section or rotation breaks a rule above, or the tensors lie on different
        devices.
      TypeError: a dtype does.
      NotImplementedError: the tensors lie neither on a CPU nor on a CUDA device.

    Positions are trusted, as in the serving kernel: one outside the table reads memory outside it. Nothing is
    synchronised and no value is read: the launch goes to the current stream of the tensors' device. Autograd doesn't
    see the kernel: take gradients from `torch_ref.reference`.

    Numerics: float32 inside, rounded to the dtype of `q_gate` between norm and rotation unless `round_norm` is False.
    Compiled and with 16-bit activations, the default `rotation` and `round_norm` are equal in bits to vLLM 0.33.0's
    kernel. Other values rotate a pair (y1, y2) to fma(y1, cos, -(y2 * sin)) and fma(y1, sin, y2 * cos). `round_norm`
    changes no bit of float32 activations. Interpreted, the order of the sum, the inverse square root and the rounding
    to bfloat16 are NumPy's and the interpreter's own. Triton 3.6's interpreter rounds an fma twice. The gate keeps its
    bits.

    Semantics from `fused_qk_rmsnorm_rope_gate` of vLLM 0.33.0. float32 activations, `rotation`, `round_norm`, calls
    without a rotation and checked shapes are added.
    """
    tensors = (q_gate, k, q_weight, k_weight, cos_sin_cache, positions)
    sizes = (num_q_heads, num_kv_heads, head_dim, rotary_dim, mrope_section)
    check(*tensors, *sizes, rotation, norm_order, activation_dtypes=ACTIVATION_DTYPES, position_dtypes=POSITION_DTYPES)
    for name, tensor in (
        ("q_gate", q_gate),
        ("k", k),
        ("q_weight", q_weight),
        ("k_weight", k_weight),
        ("cos_sin_cache", cos_sin_cache),
    ):
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            strides = tensor.stride()
            raise ValueError(
                f"{name} must be contiguous in its last dimension, got strides {strides}. Call contiguous()."
            )
    device = q_gate.device
    _check_device(device)
    num_tokens = q_gate.shape[0]
    q_out = torch.empty((num_tokens, num_q_heads * head_dim), dtype=q_gate.dtype, device=device)
    k_out = torch.empty((num_tokens, num_kv_heads * head_dim), dtype=q_gate.dtype, device=device)
    gate_out = torch.empty_like(q_out)
    if num_tokens == 0:
        return q_out, k_out, gate_out

    if q_weight.dtype != k_weight.dtype:  # the kernel picks one of the two pointers, so they need one type
        q_weight, k_weight = q_weight.float(), k_weight.float()
    lanes = triton.next_power_of_2(head_dim)
    round_norm = round_norm or q_gate.dtype == torch.float32  # which nothing rounds: its bits are the default's
    is_rotated_first = norm_order == "rotation_first" and rotary_dim > 0
    with _launcher(_qk_rope_rmsnorm_gate if is_rotated_first else _qk_rmsnorm_rope_gate, device) as kernel:
        kernel[num_tokens, num_q_heads + num_kv_heads](
            q_gate,
            k,
            _aligned(q_weight),
            _aligned(k_weight),
            cos_sin_cache,
            positions,
            q_out,
            k_out,
            gate_out,
            q_gate.stride(0),
            k.stride(0),
            0 if cos_sin_cache is None else cos_sin_cache.stride(0),
            *((0, 0) if positions is None else (positions.stride(-1), positions.stride(0))),
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            half_rotary=rotary_dim // 2,
            eps=eps,
            norm_beta=norm_beta,
            dtype=_TRITON_DTYPES[q_gate.dtype] if round_norm else tl.float32,  # of what rotates
            row_block=lanes,
            half_block=triton.next_power_of_2(rotary_dim // 2),
            mrope_section=mrope_section and tuple(mrope_section),
            pairs=rotation == "pairs",
            explicit_fma=rotation == "pairs" or not round_norm,
            # Only where a token's offset needs 64 bits: they are 13 instructions more in each program, of 158.
            wide_offsets=(num_tokens - 1) * max(rows.stride(0) for rows in (q_gate, k, q_out, k_out)) >= 2**31,
            # What decides bits: the order of the row's sum follows num_warps, and products are fused into sums.
            # Triton fuses by default up to 3.9 only.
            num_warps=max(1, lanes // 64),
            num_stages=2,
            enable_fp_fusion=True,
        )
    return q_out, k_out, gate_out


def write_kv_cache(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> None:
    """Writes rows of k and v into a KV cache, in place, in one kernel.

    T tokens, Hkv key heads, D head_dim. No tensor needs to be contiguous: another layout is a permuted view.

    Args:
      k, v: (T, Hkv, D); float16, bfloat16 or float32.
      k_cache, v_cache: (num_blocks, block_size, Hkv, D), both of one dtype: float16, bfloat16, float32, float8_e4m3fn
        or float8_e5m2, whatever k and v have.
      slot_mapping: (T,), any integer dtype: token t goes to block slot // block_size, place slot % block_size. Nothing
        is written for a slot that is negative, or at or past num_blocks * block_size.
      k_scale, v_scale: for 8-bit caches what k and v are divided by, each (), (1,) or (Hkv,); float32. For other caches
        None.

    Raises:
      ValueError: a shape breaks a rule above, the tensors lie on different devices, an 8-bit cache has no scales or
        another one has.
      TypeError: a dtype does.
      NotImplementedError: the tensors lie neither on a CPU nor on a CUDA device, or 8-bit caches lie on a GPU below
        compute capability 8.9.

    Two tokens with one slot: which one stays is not said, and its elements may come from both. Nothing is synchronised
    and no value is read: the launch goes to the current stream of the tensors' device. Autograd doesn't see it.

    Numerics: an element keeps its bits where the cache has its dtype, else it is rounded to nearest even. Interpreted,
    the rounding to bfloat16 and what becomes of its subnormals are the interpreter's own. An 8-bit cache gets the code
    of float32(x) / scale: the division is IEEE's, then the quotient is rounded to nearest even, and what lies past the
    largest finite value, infinities among it, becomes that value. NaN becomes 0x7f, without a sign. A scale's value is
    not looked at: zero, NaN and negative ones act as arithmetic has it. These codes are the same interpreted.

    Semantics from `reshape_and_cache_flash` of vLLM 0.33.0, of its CUDA kernel. The upper bound of slots and checked
    shapes are added; there `slot_mapping` may be shorter than k and v, whose other rows are padding.
    """
    check_cache_write(k, v, k_cache, v_cache, slot_mapping, cache_dtypes=(*CACHE_DTYPES, *FP8_DTYPES))
    check_scales(k, k_cache, k_scale, v_scale)
    device = k.device
    _check_device(device)
    if k_cache.dtype in FP8_DTYPES and device.type == "cuda":
        _check_capability(device)
    num_tokens, num_kv_heads, head_dim = k.shape
    num_blocks, block_size = k_cache.shape[:2]
    if k.numel() == 0:
        return
    scales = [scale if scale is None else scale.expand(num_kv_heads) for scale in (k_scale, v_scale)]
    with _launcher(_write_kv_cache, device) as kernel:
        kernel[num_tokens, num_kv_heads](
            k,
            v,
            k_cache,
            v_cache,
            slot_mapping,
            *scales,
            *k.stride(),
            *v.stride(),
            *k_cache.stride(),
            *v_cache.stride(),
            slot_mapping.stride(0),
            *(0 if scale is None else scale.stride(0) for scale in scales),
            num_slots=num_blocks * block_size,
            block_size=block_size,
            head_dim=head_dim,
            row_block=triton.next_power_of_2(head_dim),
            num_warps=1,
            enable_fp_fusion=False,  # there is nothing to fuse; Triton 3.9 warns where it isn't told
        )


@triton.jit
def _normalise(x, weight, inv_rms, norm_beta: tl.constexpr, dtype: tl.constexpr):
    return (x * inv_rms * (weight.to(tl.float32) + norm_beta)).to(dtype).to(tl.float32)


@triton.jit
def _qk_rmsnorm_rope_gate(
    q_gate_ref,
    k_ref,
    q_weight_ref,
    k_weight_ref,
    cos_sin_ref,
    positions_ref,
    q_out_ref,
    k_out_ref,
    gate_out_ref,
    q_gate_stride,
    k_stride,
    cos_sin_stride,
    position_stride,
    position_axis_stride,
    num_q_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    half_rotary: tl.constexpr,
    eps: tl.constexpr,
    norm_beta: tl.constexpr,
    dtype: tl.constexpr,
    row_block: tl.constexpr,
    half_block: tl.constexpr,
    mrope_section: tl.constexpr,
    pairs: tl.constexpr,
    explicit_fma: tl.constexpr,
    wide_offsets: tl.constexpr,
):
    # One program: one head of one token. It reads the head's row, its weights and one table row, and writes the
    # normalised and rotated row; a query head's program also copies the gate that follows the row.
    token = tl.program_id(0)
    if wide_offsets:
        token = token.to(tl.int64)
    head = tl.program_id(1)
    if head < num_q_heads:
        row_ref = q_gate_ref + token * q_gate_stride + head * (2 * head_dim)
        out_ref = q_out_ref + token * (num_q_heads * head_dim) + head * head_dim
        weight_ref = q_weight_ref
    else:
        row_ref = k_ref + token * k_stride + (head - num_q_heads) * head_dim
        out_ref = k_out_ref + token * (num_kv_heads * head_dim) + (head - num_q_heads) * head_dim
        weight_ref = k_weight_ref

    lane = tl.arange(0, row_block)
    in_row = lane < head_dim
    x = tl.load(row_ref + lane, mask=in_row, other=0.0).to(tl.float32)
    inv_rms = tl.rsqrt(_sum(x * x, axis=0) / head_dim + eps)
    weight = tl.load(weight_ref + lane, mask=in_row, other=0.0)
    y = _normalise(x, weight, inv_rms, norm_beta, dtype)
    if 2 * half_rotary < head_dim:
        tl.store(out_ref + lane, y, mask=in_row & (lane >= 2 * half_rotary))

    # The lanes that rotate are loaded again, from L1: lanes of one register tile can't be paired up.
    if half_rotary > 0:
        frequency = tl.arange(0, half_block)
        in_half = frequency < half_rotary
        lane1 = 2 * frequency if pairs else frequency
        partner: tl.constexpr = 1 if pairs else half_rotary  # it lies so far beyond lane1
        x1 = tl.load(row_ref + lane1, mask=in_half, other=0.0).to(tl.float32)
        x2 = tl.load(row_ref + partner + lane1, mask=in_half, other=0.0).to(tl.float32)
        weight1 = tl.load(weight_ref + lane1, mask=in_half, other=0.0)
        weight2 = tl.load(weight_ref + partner + lane1, mask=in_half, other=0.0)
        y1 = _normalise(x1, weight1, inv_rms, norm_beta, dtype)
        y2 = _normalise(x2, weight2, inv_rms, norm_beta, dtype)

        position_ref = positions_ref + token * position_stride
        position = tl.load(position_ref).to(tl.int64)
        if mrope_section is not None:
            height = tl.load(position_ref + position_axis_stride).to(tl.int64)
            width = tl.load(position_ref + position_axis_stride + position_axis_stride).to(tl.int64)
            reads_height = (frequency % 3 == 1) & (frequency < 3 * mrope_section[1])
            reads_width = (frequency % 3 == 2) & (frequency < 3 * mrope_section[2])
            position = tl.where(reads_height, height, tl.where(reads_width, width, position))
        cos_ref = cos_sin_ref + position * cos_sin_stride + frequency
        cos = tl.load(cos_ref, mask=in_half, other=0.0).to(tl.float32)
        sin = tl.load(cos_ref + half_rotary, mask=in_half, other=0.0).to(tl.float32)
        if explicit_fma:
            # The second product is rounded, the first is not. Times -1 changes the sign of a zero, too; for a minus
            # Triton 3.6 subtracts from 0, which doesn't.
            rotated1 = tl.fma(y1, cos, y2 * sin * -1.0)
            rotated2 = tl.fma(y1, sin, y2 * cos)
        else:
            # The compiler fuses one product of each line into the sum; which one follows from their order.
            rotated1 = y1 * cos - y2 * sin
            rotated2 = y2 * cos + y1 * sin
        tl.store(out_ref + lane1, rotated1, mask=in_half)
        tl.store(out_ref + partner + lane1, rotated2, mask=in_half)

    if head < num_q_heads:
        gate = tl.load(row_ref + head_dim + lane, mask=in_row, other=0.0)
        tl.store(gate_out_ref + token * (num_q_heads * head_dim) + head * head_dim + lane, gate, mask=in_row)


@triton.jit
def _qk_rope_rmsnorm_gate(
    q_gate_ref,
    k_ref,
    q_weight_ref,
    k_weight_ref,
    cos_sin_ref,
    positions_ref,
    q_out_ref,
    k_out_ref,
    gate_out_ref,
    q_gate_stride,
    k_stride,
    cos_sin_stride,
    position_stride,
    position_axis_stride,
    num_q_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    head_dim: tl.constexpr,
    half_rotary: tl.constexpr,
    eps: tl.constexpr,
    norm_beta: tl.constexpr,
    dtype: tl.constexpr,
    row_block: tl.constexpr,
    half_block: tl.constexpr,
    mrope_section: tl.constexpr,
    pairs: tl.constexpr,
    explicit_fma: tl.constexpr,
    wide_offsets: tl.constexpr,
):
    # The rotation first: each lane is rotated with its partner, which is loaded a second time, and the row that this
    # gives is normalised. Otherwise as the kernel above.
    token = tl.program_id(0)
    if wide_offsets:
        token = token.to(tl.int64)
    head = tl.program_id(1)
    if head < num_q_heads:
        row_ref = q_gate_ref + token * q_gate_stride + head * (2 * head_dim)
        out_ref = q_out_ref + token * (num_q_heads * head_dim) + head * head_dim
        weight_ref = q_weight_ref
    else:
        row_ref = k_ref + token * k_stride + (head - num_q_heads) * head_dim
        out_ref = k_out_ref + token * (num_kv_heads * head_dim) + (head - num_q_heads) * head_dim
        weight_ref = k_weight_ref

    lane = tl.arange(0, row_block)
    in_row = lane < head_dim
    is_rotated = lane < 2 * half_rotary
    if pairs:
        is_first = lane % 2 == 0
        partner = tl.where(is_first, lane + 1, lane - 1)
        frequency = lane // 2
    else:
        is_first = lane < half_rotary
        partner = tl.where(is_first, lane + half_rotary, lane - half_rotary)
        frequency = tl.where(is_first, lane, lane - half_rotary)
    x = tl.load(row_ref + lane, mask=in_row, other=0.0).to(tl.float32)
    other = tl.load(row_ref + partner, mask=is_rotated, other=0.0).to(tl.float32)

    position_ref = positions_ref + token * position_stride
    position = tl.load(position_ref).to(tl.int64)
    if mrope_section is not None:
        height = tl.load(position_ref + position_axis_stride).to(tl.int64)
        width = tl.load(position_ref + position_axis_stride + position_axis_stride).to(tl.int64)
        reads_height = (frequency % 3 == 1) & (frequency < 3 * mrope_section[1])
        reads_width = (frequency % 3 == 2) & (frequency < 3 * mrope_section[2])
        position = tl.where(reads_height, height, tl.where(reads_width, width, position))
    cos_ref = cos_sin_ref + position * cos_sin_stride + frequency
    cos = tl.load(cos_ref, mask=is_rotated, other=0.0).to(tl.float32)
    sin = tl.load(cos_ref + half_rotary, mask=is_rotated, other=0.0).to(tl.float32)
    # x1 * cos and x1 * sin are fused into the sums, as above.
    first = tl.fma(x, cos, other * sin * -1.0)
    second = tl.fma(other, sin, x * cos)
    z = tl.where(is_rotated, tl.where(is_first, first, second), x).to(dtype).to(tl.float32)

    # Up to 32 lanes a thread holds one. The compiler would fuse its square, but not its partner's, into the first sum
    # of the two, and each would get another sum. It leaves a product alone that is a fused one already.
    squares = z * z if row_block > 32 else tl.fma(z, z, 0.0)
    inv_rms = tl.rsqrt(_sum(squares, axis=0) / head_dim + eps)
    weight = tl.load(weight_ref + lane, mask=in_row, other=0.0)
    tl.store(out_ref + lane, z * inv_rms * (weight.to(tl.float32) + norm_beta), mask=in_row)

    if head < num_q_heads:
        gate = tl.load(row_ref + head_dim + lane, mask=in_row, other=0.0)
        tl.store(gate_out_ref + token * (num_q_heads * head_dim) + head * head_dim + lane, gate, mask=in_row)


@triton.jit
def _quantized(x, scale, dtype: tl.constexpr):
    # From capability 8.9 on the cast is cvt.rn.satfinite, which saturates (read in the PTX of Triton 3.9).
    return tl.div_rn(x.to(tl.float32), scale).to(dtype)


def _quantized_in_torch(x, scale, dtype):
    # The interpreter would round ties up, let large numbers wrap around and lose subnormal bfloat16.
    from triton.runtime.interpreter import TensorHandle

    rows = torch.from_numpy(x.handle.data)
    if x.dtype == tl.bfloat16:  # as uint16
        rows = rows.view(torch.bfloat16)
    quotient = rows.float() / torch.from_numpy(scale.handle.data)
    torch_dtype = torch.float8_e4m3fn if dtype == tl.float8e4nv else torch.float8_e5m2
    largest = torch.finfo(torch_dtype).max
    codes = quotient.clamp(-largest, largest).to(torch_dtype).view(torch.uint8)
    codes = torch.where(quotient.isnan(), 0x7F, codes)
    return tl.tensor(TensorHandle(codes.numpy(), dtype), x.type.with_element_ty(dtype))


@triton.jit
def _write_kv_cache(
    k_ref,
    v_ref,
    k_cache_ref,
    v_cache_ref,
    slots_ref,
    k_scale_ref,
    v_scale_ref,
    k_stride,
    k_head_stride,
    k_lane_stride,
    v_stride,
    v_head_stride,
    v_lane_stride,
    k_block_stride,
    k_place_stride,
    k_cache_head_stride,
    k_cache_lane_stride,
    v_block_stride,
    v_place_stride,
    v_cache_head_stride,
    v_cache_lane_stride,
    slot_stride,
    k_scale_stride,
    v_scale_stride,
    num_slots,
    block_size,
    head_dim: tl.constexpr,
    row_block: tl.constexpr,
):
    # One program: one kv head of one token.
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ref + token * slot_stride).to(tl.int64)  # 2^63 and more become negative
    if (slot >= 0) & (slot < num_slots):
        block = slot // block_size
        place = slot % block_size
        lane = tl.arange(0, row_block).to(tl.int64)
        in_row = lane < head_dim
        k = tl.load(k_ref + token * k_stride + head * k_head_stride + lane * k_lane_stride, mask=in_row)
        v = tl.load(v_ref + token * v_stride + head * v_head_stride + lane * v_lane_stride, mask=in_row)
        k_row_ref = k_cache_ref + block * k_block_stride + place * k_place_stride + head * k_cache_head_stride
        v_row_ref = v_cache_ref + block * v_block_stride + place * v_place_stride + head * v_cache_head_stride
        if k_scale_ref is not None:
            k = _quantized(k, tl.load(k_scale_ref + head * k_scale_stride), k_cache_ref.dtype.element_ty)
            v = _quantized(v, tl.load(v_scale_ref + head * v_scale_stride), v_cache_ref.dtype.element_ty)
        tl.store(k_row_ref + lane * k_cache_lane_stride, k, mask=in_row)
        tl.store(v_row_ref + lane * v_cache_lane_stride, v, mask=in_row)


def _check_device(device: torch.device) -> None:
    if device.type not in ("cpu", "cuda"):
        raise NotImplementedError(f"the kernel runs on cpu and cuda tensors, got {device}. Move them with to('cpu').")


def _check_capability(device: torch.device) -> None:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        raise NotImplementedError(
            f"8-bit caches need a GPU of compute capability 8.9 or more, got {major}.{minor}. "
            "Move the tensors with to('cpu')."
        )


@contextlib.contextmanager
def _launcher(kernel, device: torch.device):
    """The kernel to launch for tensors of a device, interpreted on a CPU."""
    with _interpreter_lock if device.type == "cpu" else torch.cuda.device(device):
        yield _interpreted(kernel) if device.type == "cpu" else kernel


def _aligned(weight: torch.Tensor) -> torch.Tensor:
    # Triton lays a row out for the widest access to any row of the program. Weights at a 16-byte boundary give each
    # thread two neighbouring lanes whatever the strides and alignment of the activations, and with that one order of
    # the sum (seen in the compiled layouts of Triton 3.6 and 3.9).
    return weight if weight.data_ptr() % 16 == 0 else weight.clone()


_interpreter_lock = threading.Lock()  # the interpreter replaces functions of triton.language while it runs


@functools.cache
def _interpreted(kernel):
    # TRITON_INTERPRET would switch the whole process; this interprets one kernel, where a call asks for it. The copy
    # has globals of its own, because the interpreter adds to them, and in them plain Python for each jitted function.
    from triton.runtime.interpreter import InterpretedFunction

    function = kernel.fn
    names = {
        name: value.fn if isinstance(value, triton.JITFunction | InterpretedFunction) else value
        for name, value in function.__globals__.items()
    }
    names["_quantized"] = _quantized_in_torch
    copy = types.FunctionType(function.__code__, names, function.__name__)
    copy.__annotations__ = function.__annotations__
    return InterpretedFunction(copy)
