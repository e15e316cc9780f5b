"""Static descriptions of a call, and the rules that pick a launch configuration from them.

Every rule is a pure function of shapes and dtype; nothing here looks at a device.
"""

import dataclasses
import math

Layout = str  # "chunks", "halves" or "row": see TritonForward


@dataclasses.dataclass(frozen=True)
class Options:
    """What one call fixes besides shapes and dtypes."""

    rotary_dim: int
    eps: float
    norm_beta: float = 0.0
    mrope_section: tuple[int, int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Spec:
    """The sizes and activation dtype by which an implementation is chosen and configured."""

    num_tokens: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    dtype: str


@dataclasses.dataclass(frozen=True)
class Target:
    """The NVIDIA GPU that code is made for."""

    compute_capability: tuple[int, int]


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def is_power_of_2(n: int) -> bool:
    return n & (n - 1) == 0


def chunk_lanes(head_dim: int, rotary_dim: int) -> int:
    """Lanes of a chunk: the largest power of two that divides R/2 and D, so that RoPE partners are whole chunks."""
    return math.gcd(rotary_dim // 2, head_dim, 1 << 30)


def tree_order(num_lanes: int) -> list[int]:
    """Bits of the lane index in the order in which the sum of squares adds them, for a power of two of lanes.

    It is the order of the serving kernel's `tl.sum` over one row, with num_lanes/64 warps and two lanes a thread:
    the neighbouring pair, a butterfly 16 … 1 over the 32 threads of a warp, then the warps from the top bit down.
    Up to 32 lanes a thread holds one lane and there are no pairs.
    """
    bits = num_lanes.bit_length() - 1
    if bits <= 5:
        return list(range(bits - 1, -1, -1))
    return [0, *range(5, 0, -1), *range(bits - 1, 5, -1)]


@dataclasses.dataclass(frozen=True)
class TritonForward:
    """Launch configuration of the forward kernel on Pallas Triton.

    `layout` says how a row of D lanes is cut into tiles. "chunks": D/C tiles of C lanes, RoPE partners at the same
    place of two chunks. "halves": two tiles of D/2 lanes, RoPE partners at the same place of the two. "row": one
    tile of next_power_of_2(D) lanes, the partners loaded once more.
    """

    layout: Layout
    rows_per_program: int = 4
    num_warps: int = 2
    num_stages: int = 1


def triton_forward(spec: Spec) -> TritonForward:
    """The configuration for `spec`.

    H200, bf16, D = 256, R = 64. Four rows and two warps a program served every size best (T = 16384, 16/2 heads: 1, 2,
    8, 16 and 32 rows cost 139 to 145 us against 137). Chunks lead where a launch is bound by latency and instructions
    (3.49 against 3.65 us at T = 256 with 32/2 heads), halves with their 16-byte accesses where memory is (136.3 against
    138.1 us at T = 16384 with 16/2; at T = 1024 chunks take 6.24 against 6.34 with 16/2 and 18.18 against 18.02 with
    32/2) and where a single wave runs half empty (1.18 against 1.25 us at T = 1). More than 16 chunks compile for
    seconds (up to 26 with chunks of one lane), so such rows take halves where R/2 and D/R are powers of two and the row
    layout elsewhere.
    """
    d, r = spec.head_dim, spec.rotary_dim
    halves = is_power_of_2(r // 2) and d % r == 0 and is_power_of_2(d // r)
    chunks = d // chunk_lanes(d, r) <= 16
    num_rows = spec.num_tokens * spec.num_q_heads
    if halves and (num_rows < 128 or num_rows >= 32768 or not chunks):
        return TritonForward("halves")
    return TritonForward("chunks" if chunks else "row")


@dataclasses.dataclass(frozen=True)
class MosaicForward:
    """Launch configuration of the forward kernel on Pallas Mosaic GPU.

    `layout` says which lanes of a row one thread holds. "chunks": the same few lanes of each of the D/C chunks of C
    lanes. "halves": vectors in pairs R/2 lanes apart. "row": consecutive vectors, the partners loaded once more.
    A row has 32/rows_per_warp threads, or fewer where it is too short. `weights` says when they are loaded: "first",
    beside x, "after_gate", which is stored before, or "after_sum", of the squares, for fewer registers.
    """

    layout: Layout
    rows_per_warp: int
    num_warpgroups: int = 1
    weights: str = "first"


def mosaic_forward(spec: Spec) -> MosaicForward:
    """The configuration for `spec`.

    H200, bf16, D = 256, R = 64. Eight lanes a thread are one row a warp; 16 take 62 registers where 48 would do, since
    Mosaic GPU compiles with `.minnctapersm 1`, under which ptxas spends them. With the weights loaded after the sum
    eight lanes take 32, so that an SM holds 2048 threads, and lead where memory binds (135.5 us against 137.4 with 40
    registers and 137.7 with chunks, T = 16384, 16/2 heads); where latency binds, the weights come first (1.09 against
    1.28 us at T = 1), and in between chunks with two rows a warp lead (2.62 against 2.78 us at T = 256, 6.27 against
    6.83 at T = 1024 with 16/2; from T = 1024 with 32/2 heads they no longer do).
    """
    d, r, num_rows = spec.head_dim, spec.rotary_dim, spec.num_tokens * spec.num_q_heads
    rows_per_warp = min(32, max(1, 32 * 8 // next_power_of_2(d)))
    if 512 <= num_rows < 32768 and d // chunk_lanes(d, r) <= 16:
        return MosaicForward("chunks", 2 * rows_per_warp)
    layout = "halves" if is_power_of_2(d) and is_power_of_2(r) else "row"
    return MosaicForward(layout, rows_per_warp, weights="first" if num_rows < 512 else "after_sum")
