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
    mrope_layout: str = "interleaved"  # or "sectioned"
    gate: str | None = "copied"  # by the kernel; "in_place": left in q, for XLA to slice; None: q has no gates
    round_dweights: bool = False  # gradients of the weights: rounded to the weights' dtypes, or in float32
    packed: tuple[int, int] | None = None  # (num_q_heads, num_kv_heads) where q, k and v are one array


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


def too_many_rows(spec: Spec, margin: int) -> str | None:
    """Why a kernel that counts rows (token, head) in 32 bits, some of them past the end, can't run `spec`."""
    rows, limit = spec.num_tokens * max(spec.num_q_heads, spec.num_kv_heads), 2**31 - margin
    return f"it counts rows (token, head) in 32 bits, up to {limit}, got {rows}" if rows > limit else None


def has_halves(head_dim: int, rotary_dim: int) -> bool:
    """Whether the layout "halves" fits: powers of two, so that partners differ in one bit of the lane."""
    return is_power_of_2(head_dim) and is_power_of_2(rotary_dim)


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


def rotation_fuses_y2(options: Options, dtype) -> bool:
    """Whether o2 = y2 * cos + y1 * sin rounds y1 * sin and fuses the other product; else it is the other way round.

    So the compiler of the serving kernel decides (Triton 3.6 and 3.9). It shows with a float32 table: in 216 of 35.7 M
    elements with mRoPE, and in every seventh rotated element of float32 activations. Of a single frequency the compiler
    knows that it reads the first row of positions.
    """
    return (options.mrope_section is not None and options.rotary_dim > 2) or str(dtype) == "float32"


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


def triton_forward(spec: Spec, *, gate_copied: bool = True) -> TritonForward:
    """The configuration for `spec`.

    H200, bf16, D = 256, R = 64. Four rows and two warps a program served every size best (T = 16384, 16/2 heads: 1, 2,
    8, 16 and 32 rows cost 139 to 145 us against 137). Chunks lead where a launch is bound by latency and instructions
    (3.49 against 3.65 us at T = 256 with 32/2 heads), halves with their 16-byte accesses where memory is (136.3 against
    138.1 us at T = 16384 with 16/2; at T = 1024 chunks take 6.24 against 6.34 with 16/2 and 18.18 against 18.02 with
    32/2) and where a single wave runs half empty (1.18 against 1.25 us at T = 1). More than 12 chunks compile for
    seconds (16 for 1.8, up to 26 with chunks of one lane), so such rows take halves where R/2 and D/R are powers of two
    and the row layout elsewhere. Without a gate to copy chunks lead at T = 16384 too (16/2, the gate in place: 76.3
    against 80.7 us).
    """
    d, r = spec.head_dim, spec.rotary_dim
    halves = has_halves(d, r)
    chunks = d // chunk_lanes(d, r) <= 12
    num_rows = spec.num_tokens * spec.num_q_heads
    if halves and (num_rows < 128 or (num_rows >= 32768 and gate_copied) or not chunks):
        return TritonForward("halves")
    return TritonForward("chunks" if chunks else "row")


@dataclasses.dataclass(frozen=True)
class TritonBackward:
    """Launch configuration of the backward kernel on Pallas Triton.

    `q_programs` programs of one warp walk over the q rows and `k_programs` over the k rows, each by steps of
    `rows_per_step`, a power of two; each leaves half as many rows of partial weight gradients, or one. For `layout` see
    TritonForward.
    """

    layout: Layout
    rows_per_step: int
    q_programs: int
    k_programs: int


def triton_backward(spec: Spec, num_sms: int, *, mrope: bool = False, wide: bool = False) -> TritonBackward:
    """The configuration for `spec` on a GPU of `num_sms` streaming multiprocessors.

    `wide` says that the activations, the weights or the table are float32. Layout and rows, which decide bits, follow
    from D, R and dtypes alone, so a token's gradients don't depend on the batch it is in.

    All programs are resident at once, as many as their registers allow and no more than the fewest steps take: on an
    H200 a second wave costs 10 to 60 us of 180. There, bf16, D = 256, R = 64, 16/2 heads, T = 16384 (copy 168.9 us): 24
    programs an SM with one row a step take 181.6 us, 20 190.0, 22 186.4, 28 189.6, 32 195.2, and two rows a step 199.3.
    A row of k takes as long as a row of q, though it moves three vectors where that moves five: 182.5 with 1.25 for it,
    207.3 with 0.7.
    """
    d, r = spec.head_dim, spec.rotary_dim
    vector = 4 if spec.dtype == "float32" else 8  # lanes in 16 bytes
    halves = has_halves(d, r) and r // 2 >= vector
    lanes = next_power_of_2(d) // 2 if halves else next_power_of_2(d)
    rows = max(1, 16 * vector // lanes)
    # Registers (jax 0.11.2, sm_90): up to 96 where something is float32 or a row's tile is whole, 64 with mRoPE.
    programs_per_sm = 20 if wide or not halves else 28 if mrope else 24
    programs_per_sm = max(1, programs_per_sm * 32 * vector // max(32 * vector, rows * lanes))

    resident = programs_per_sm * num_sms
    q_steps, k_steps = (-(-spec.num_tokens * heads // rows) for heads in (spec.num_q_heads, spec.num_kv_heads))
    steps = max(1, -(-(q_steps + k_steps) // resident))
    while (q_programs := -(-q_steps // steps)) + (k_programs := -(-k_steps // steps)) > resident:
        steps += 1
    return TritonBackward("halves" if halves else "row", rows, q_programs, k_programs)


@dataclasses.dataclass(frozen=True)
class MosaicForward:
    """Launch configuration of the forward kernel on Pallas Mosaic GPU.

    `layout` says which lanes of a row one thread holds. "chunks": the same few lanes of each of the D/C chunks of C
    lanes. "halves": vectors in pairs R/2 lanes apart. "row": consecutive vectors, the partners loaded once more.
    A row has 32/rows_per_warp threads, or fewer where it is too short. `weights` says when they are loaded: "first",
    beside x, "after_gate", or v, which is stored before, or "after_sum", of the squares. A row beside which nothing is
    copied takes "after_gate" as "first", with 31 registers (sm_90a, D = 256, "halves").
    `k_first` says that programs of k rows come before all others instead of evenly among them.
    """

    layout: Layout
    rows_per_warp: int
    weights: str = "first"
    k_first: bool = False


def mosaic_forward(spec: Spec, *, gate_copied: bool = True) -> MosaicForward:
    """The configuration for `spec`.

    H200, bf16, D = 256, R = 64, 16/2 heads unless said; times of one sentence are of one run. Halves take one row a
    warp, eight lanes a thread: 16 take 62 registers where 48 would do, since Mosaic GPU compiles with
    `.minnctapersm 1`, under which ptxas spends them.

    Weights: loading them after the gate's store keeps ptxas from sinking that store and the loads before it (halves: 32
    registers instead of 40, so that an SM holds 2048 threads; chunks: 2.46 against 2.69 us at T = 256). First is best
    for a single token (1.09 against 1.12 us), after the sum where memory binds (538.1 against 540.0 us at T = 65536;
    with the weights first 542.5). Where all lanes are rotated that takes 40 registers and loses again (574.6 with them
    after the gate against 584.1 us at T = 65536, D = R = 128, 32/8 heads).

    Layout: chunks with two rows a warp lead where a launch is one wave (1.57 against 1.63 us at T = 64, 2.43 against
    2.59 at 256, 3.36 against 3.74 at 512); at 768 they are even, and behind where the arrays just fill L2 (6.40 against
    6.25 at 1024, 13.43 against 13.15 at 1536). Where no gate is copied they lead at T = 16384 too (the gate in place:
    76.2 us against 80.6 with halves and weights after the gate, 83.0 after the sum; copy 71.7). Not timed: T = 32, and
    more than 16 chunks.

    k rows first, the lightest, leave no program of q for a second turn (1.57 against 1.66 us at T = 64, 1.22 against
    1.25 at 16), and cost where turns are many (540.9 against 538.0 at 65536). Not timed apart from other changes:
    T = 1024, where they may cost too (before, with chunks and k rows among the others, 6.08 us where a copy took 5.94;
    since, 6.62 where it took 5.92).
    """
    d, r, num_rows = spec.head_dim, spec.rotary_dim, spec.num_tokens * spec.num_q_heads
    rows_per_warp = min(32, max(1, 32 * 8 // next_power_of_2(d)))
    k_first = 64 <= num_rows < 65536
    if num_rows >= 512 and (num_rows < 16384 or not gate_copied) and d // chunk_lanes(d, r) <= 16:
        return MosaicForward("chunks", min(32, 2 * rows_per_warp), weights="after_gate", k_first=k_first)
    layout = "halves" if has_halves(d, r) else "row"
    after_sum = num_rows >= 65536 and r < d
    weights = "first" if num_rows < 64 else "after_sum" if after_sum else "after_gate"
    return MosaicForward(layout, rows_per_warp, weights=weights, k_first=k_first)


@dataclasses.dataclass(frozen=True)
class MosaicBackward:
    """Launch configuration of the backward kernel on Pallas Mosaic GPU.

    Each of `q_warps` and `k_warps` warps walks over its share of q rows or of k rows and writes one row of partial
    weight gradients. A row has 32/rows_per_warp threads, or fewer where it is too short; a program has `num_warpgroups`
    of four warps.
    """

    rows_per_warp: int
    num_warpgroups: int
    q_warps: int
    k_warps: int


def mosaic_backward_group(head_dim: int, rotary_dim: int, itemsize: int, rows_per_warp: int) -> tuple[int, int]:
    """Threads of a row and lanes of a vector, up to 16 bytes; RoPE partners are whole vectors."""
    lanes = math.gcd(16 // itemsize, head_dim, rotary_dim // 2)
    return min(32 // rows_per_warp, max(1, next_power_of_2(head_dim) // lanes)), lanes


def mosaic_backward(spec: Spec, num_sms: int, *, num_axes: int, cache_itemsize: int) -> MosaicBackward:
    """The configuration for `spec` on a GPU of `num_sms` streaming multiprocessors, with 1 or 3 rows of positions.

    One program an SM, as large as the registers allow: that is exactly one resident wave whatever ptxas does, which has
    to fit the program's threads into the 65536 registers of an SM.

    H200, bf16, D = 256, R = 64, 16/2 heads, T = 16384 (copy 168.6 us): 24 warps an SM take 177.3 us, 20 184.2, 28 187.5
    and 24 in six programs 0.5 more. A row of k takes as long as a row of q, though it moves three vectors where that
    moves five: counting it as 1.25 costs 1.3 us, and as 0.7, at 32 warps, 14.7. Two rows a warp (9.6 us more), an L2
    prefetch (22) and several waves (9.4, and 5.8 at T = 1024) lost. A single program needs no second kernel: 2.30 us
    against 2.94 at T = 1. At T = 64 programs of two warpgroups take 4.10, of one 4.45.
    """
    itemsize = 4 if spec.dtype == "float32" else 2
    rows_per_warp = min(32, max(1, 32 * 8 // next_power_of_2(spec.head_dim)))
    threads, lanes = mosaic_backward_group(spec.head_dim, spec.rotary_dim, itemsize, rows_per_warp)
    vectors, rotated = (-(-size // (threads * lanes)) for size in (spec.head_dim, spec.rotary_dim))
    words, cache_words = (-(-lanes * size // 4) for size in (itemsize, cache_itemsize))
    # What a thread holds at once: sums and weights; x, dy and the gate's cotangent; cos and sin at each axis and the
    # masks that merge them. 16 registers more are enough without spills (sm_90a, CUDA 12.9 and 13.0).
    held = 2 * vectors * lanes + 3 * vectors * words + (3 * num_axes - 1) * rotated * cache_words
    num_warpgroups = max(1, min(6, 512 // (held + 16)))

    rows_per_tile = 32 // threads
    q_tiles, k_tiles = (-(-spec.num_tokens * h // rows_per_tile) for h in (spec.num_q_heads, spec.num_kv_heads))
    resident = 4 * num_warpgroups * num_sms
    k_warps = min(resident - 1, max(1, round(resident * spec.num_kv_heads / (spec.num_q_heads + spec.num_kv_heads))))
    # No more warps than the longest share needs.
    q_warps, k_warps = (
        -(-tiles // -(-tiles // warps)) for tiles, warps in ((q_tiles, resident - k_warps), (k_tiles, k_warps))
    )
    warps = q_warps + k_warps
    if warps <= 4 * num_warpgroups:
        num_warpgroups = -(-warps // 4)  # one program, whose sums are the gradients: no second kernel
    elif warps <= 4 * (num_warpgroups - 2) * num_sms:
        # Few warps spread best in small programs. ptxas then takes more registers, which leave room for two fewer.
        num_warpgroups = min(2, num_warpgroups)
    else:
        num_warpgroups = min(num_warpgroups, -(-warps // (4 * num_sms)))
    return MosaicBackward(rows_per_warp, num_warpgroups, q_warps, k_warps)
