"""Static descriptions of a call, and the rules that decide bits. Pure functions: nothing here looks at a device."""

import dataclasses
import math
from typing import Any, Literal

RotationName = Literal["halves", "pairs"]
NormOrder = Literal["norm_first", "rotation_first"]
MropeLayout = Literal["interleaved", "sectioned"]
Implementation = Literal["mosaic_gpu", "triton", "xla"]


@dataclasses.dataclass(frozen=True)
class Options:
    """What one call fixes besides shapes and dtypes."""

    rotary_dim: int
    eps: float
    norm_beta: float = 0.0
    mrope_section: tuple[int, int, int] | None = None
    mrope_layout: MropeLayout = "interleaved"
    rotation: RotationName | None = "halves"  # see `_rows.Rows`
    round_norm: bool = True  # to the activations' dtype, between norm and rotation
    norm_order: NormOrder = "norm_first"  # of rows that are rotated
    head_dim: int | None = None  # where there are no weights; else their length says it
    v_norm: bool = False  # whether v is normalised, without a weight
    # "copied": by the kernel; "in_place": left in q, for XLA to slice; "handed_on": the result is q, see `Gate`;
    # None: q has no gates.
    gate: str | None = "copied"
    packed: tuple[int, int] | None = None  # (num_q_heads, num_kv_heads) where q, k and v are one array
    q_alone: bool = False  # there is neither k nor v
    separate_v: bool = False  # v is an array of its own
    cache_axes: str = ""  # of the KV cache that k and v are written into; empty: there is none
    return_kv: bool = True  # whether k and v are results of their own
    # Of a cache of 8 bits, whether each kv head has a scale of its own, for k and for v; None: rows are cast.
    scale_per_head: tuple[bool, bool] | None = None
    round_dweights: bool = False  # gradients of the weights: rounded to the weights' dtypes, or in float32

    @property
    def num_axes(self) -> int:
        """Rows of positions."""
        return 1 if self.mrope_section is None else 3


@dataclasses.dataclass(frozen=True)
class Spec:
    """The sizes and activation dtype by which an implementation is chosen and configured."""

    num_tokens: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    dtype: str
    open_size: Any = None  # a size that an export leaves open
    cache_shape: tuple[int, ...] | None = None  # of the array that holds k
    cache_dtype: str | None = None
    rotation: RotationName | None = "halves"
    norm_order: NormOrder = "norm_first"


@dataclasses.dataclass(frozen=True)
class Target:
    """The NVIDIA GPU that code is made for."""

    compute_capability: tuple[int, int]
    num_sms: int  # streaming multiprocessors
    bandwidth: int | None = None  # of its memory, in GB/s; None: not known


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def is_power_of_2(n: int) -> bool:
    return n & (n - 1) == 0


def too_many_rows(spec: Spec, margin: int) -> str | None:
    """Why a kernel that counts rows (token, head) in 32 bits, some of them past the end, can't run `spec`."""
    rows, limit = spec.num_tokens * max(spec.num_q_heads, spec.num_kv_heads), 2**31 - margin
    return f"it counts rows (token, head) in 32 bits, up to {limit}, got {rows}" if rows > limit else None


def has_halves(head_dim: int, rotary_dim: int) -> bool:
    """Whether a row can be cut into halves: powers of two, so that partners differ in one bit of the lane."""
    return is_power_of_2(head_dim) and is_power_of_2(rotary_dim)


def chunk_lanes(head_dim: int, rotary_dim: int) -> int:
    """Lanes of a chunk: the largest power of two that divides R/2 and D, so that RoPE partners are whole chunks."""
    return math.gcd(rotary_dim // 2, head_dim, 1 << 30)


def tree_order(num_lanes: int) -> list[int]:
    """Bits of the lane index in the order in which the sum of squares adds them, for a power of two of lanes.

    It is the order of the serving kernel's `tl.sum` over one row, with num_lanes/64 warps and two lanes per thread:
    the neighbouring pair, a butterfly 16 … 1 over the 32 threads of a warp, then the warps from the top bit down.
    Up to 32 lanes a thread holds one lane and there are no pairs.
    """
    bits = num_lanes.bit_length() - 1
    if bits <= 5:
        return list(range(bits - 1, -1, -1))
    return [0, *range(5, 0, -1), *range(bits - 1, 5, -1)]


def rotation_fuses_y2(options: Options, dtype: Any) -> bool:
    """Whether o2 = y2 * cos + y1 * sin rounds y1 * sin and fuses the other product; else it is the other way round.

    So the compiler of the serving kernel decides (Triton 3.6 and 3.9). It shows with a float32 table: in 216 of 35.7 M
    elements with mRoPE, and in every seventh rotated element of float32 activations, whatever the table's dtype. With a
    single frequency the compiler knows that the first row of positions is read.

    No serving kernel has other rotations, or none that rounds once: the oracle says there what is fused.
    """
    if options.rotation != "halves" or not options.round_norm or options.norm_order != "norm_first":
        return False
    return (options.mrope_section is not None and options.rotary_dim > 2) or str(dtype) == "float32"
