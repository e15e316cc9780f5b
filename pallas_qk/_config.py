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


def rows_of_a_warp(head_dim: int, dtype: str) -> int:
    """Rows of next_power_of_2(D) lanes that one warp covers with 16 bytes a thread; 1 for longer rows."""
    itemsize = 4 if dtype == "float32" else 2
    return max(1, 32 * 16 // (next_power_of_2(head_dim) * itemsize))


@dataclasses.dataclass(frozen=True)
class TritonBackward:
    """Launch configuration of the backward kernel on Pallas Triton.

    `q_programs` programs of one warp walk over the q rows and `k_programs` over the k rows, each by steps of
    `tiles_per_step` tiles of `rows_of_a_warp` rows. Each leaves one tile of partial weight gradients.
    """

    tiles_per_step: int
    q_programs: int
    k_programs: int


def triton_backward(spec: Spec, mrope: bool, num_sms: int) -> TritonBackward:
    """The configuration for `spec` on a GPU of `num_sms` streaming multiprocessors.

    All programs are resident at once, as many as their registers allow, and no more than take the fewest steps.
    """
    tiles_per_step, programs_per_sm = 1, 24 if mrope else 32
    k_cost = 0.7  # of a row of k, in rows of q
    rows = rows_of_a_warp(spec.head_dim, spec.dtype) * tiles_per_step
    q_steps, k_steps = (-(-spec.num_tokens * heads // rows) for heads in (spec.num_q_heads, spec.num_kv_heads))
    resident = programs_per_sm * num_sms
    steps = max(1, math.ceil((q_steps + k_cost * k_steps) / resident))
    while True:
        q_programs, k_programs = -(-q_steps // steps), -(-k_steps // math.floor(steps / k_cost))
        if q_programs + k_programs <= resident:
            return TritonBackward(tiles_per_step, q_programs, k_programs)
        steps += 1


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

    H200, bf16, D = 256, R = 64, 16/2 heads unless said. Eight lanes a thread are one row a warp; 16 take 62 registers
    where 48 would do, since Mosaic GPU compiles with `.minnctapersm 1`, under which ptxas spends them.
    Loading the weights after the gate's store keeps ptxas from sinking that store and the loads before it: 32 registers
    instead of 40, so that an SM holds 2048 threads, and 2.46 against 2.69 us at T = 256 with chunks. After the sum it
    is better still where memory binds (538.1 against 540.0 us at T = 65536; with the weights first 542.5), and first
    is best for a single token (1.09 against 1.12 us). Chunks with two rows a warp lead in between (2.46 against 2.59 us
    at T = 256, 3.42 against 3.97 at T = 512; 1.38 against 1.47 at T = 16 with 32/2 heads), where a launch is one wave.
    """
    d, r, num_rows = spec.head_dim, spec.rotary_dim, spec.num_tokens * spec.num_q_heads
    rows_per_warp = min(32, max(1, 32 * 8 // next_power_of_2(d)))
    if 512 <= num_rows < 32768 and d // chunk_lanes(d, r) <= 16:
        return MosaicForward("chunks", 2 * rows_per_warp, weights="after_gate")
    layout = "halves" if is_power_of_2(d) and is_power_of_2(r) else "row"
    weights = "first" if num_rows < 64 else "after_gate" if num_rows < 32768 else "after_sum"
    return MosaicForward(layout, rows_per_warp, weights=weights)


@dataclasses.dataclass(frozen=True)
class MosaicBackward:
    """Launch configuration of the backward kernel on Pallas Mosaic GPU.

    Each of `q_warps` and `k_warps` warps walks over its share of q rows or of k rows, `rows_per_warp` at a time or more
    where rows are short, and writes one row of partial weight gradients. A program has `num_warpgroups` of four warps.
    """

    rows_per_warp: int
    num_warpgroups: int
    q_warps: int
    k_warps: int
    waves: int = 1
    positions_ahead: bool = True
    prefetch: str = ""
    fence: str = "never"


def mosaic_backward(spec: Spec, num_sms: int, *, mrope: bool, cache_itemsize: int) -> MosaicBackward:
    """The configuration for `spec` on a GPU of `num_sms` streaming multiprocessors."""
    rows_per_warp = min(32, max(1, 32 * 8 // next_power_of_2(spec.head_dim)))
    return mosaic_backward_of(spec, num_sms, rows_per_warp, 8 if not mrope else 7)


def mosaic_backward_of(
    spec: Spec,
    num_sms: int,
    rows_per_warp: int,
    num_warpgroups: int,
    programs_per_sm: int = 1,
    k_cost: float = 0.7,
    **knobs,
) -> MosaicBackward:
    q_tiles, k_tiles = (-(-spec.num_tokens * h // rows_per_warp) for h in (spec.num_q_heads, spec.num_kv_heads))
    resident = 4 * num_warpgroups * programs_per_sm * num_sms
    k_load = k_cost * spec.num_kv_heads
    k_warps = max(1, round(resident * k_load / (spec.num_q_heads + k_load)))
    waves = knobs.get("waves", 1)
    # No more warps than the longest share needs.
    q_warps, k_warps = (
        waves * -(-tiles // (waves * -(-tiles // (warps * waves))))
        for tiles, warps in ((q_tiles, resident - k_warps), (k_tiles, k_warps))
    )
    if programs_per_sm == 1:
        num_warpgroups = min(num_warpgroups, -(-(q_warps + k_warps) // (4 * waves * num_sms)))
    return MosaicBackward(rows_per_warp, num_warpgroups, q_warps, k_warps, **knobs)
