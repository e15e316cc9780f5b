"""The launch configurations of the Mosaic GPU kernels, and the rules that choose them by shapes and dtype."""

import dataclasses
import math

from pallas_qk._fp8 import is_fp8
from pallas_qk._options import Spec, Target, chunk_lanes, has_halves, next_power_of_2


@dataclasses.dataclass(frozen=True)
class MosaicForward:
    """Launch configuration of the forward kernel on Pallas Mosaic GPU.

    `layout` says which lanes of a row one thread holds. "chunks": the same few lanes of each of the D/C chunks of C
    lanes, so that all threads share the rotation. "halves": vectors in pairs R/2 lanes apart. "row": consecutive
    vectors, the partners loaded once more. Rows that are rotated by pairs have no halves, and rows that are not rotated
    have no other layout than "row".
    A row has 32/rows_per_warp threads, or fewer where it is too short. `weights` says when they are loaded: "first",
    with x; "after_gate", once the gate (or v) is stored; "after_sum", once the squares are summed. With nothing to
    copy, "after_gate" means "first" and takes 31 registers (sm_90a, D = 256, "halves").
    `k_first` says that programs of k rows come before all others instead of evenly among them.
    `cast_first` says that rows for a cache of another dtype are cast whether or not their token has a slot, codes of 8
    bits in float32: ptxas then casts v while it waits for the sum of k. Else they are cast where they are stored, codes
    in float64, which takes fewer registers.
    `heads_per_thread` says how many heads of one token a thread has its lanes of; where it doesn't divide the heads of
    q, or those of k, their largest common divisor. The token's position, row of the table, slot and weights are loaded
    once for all of them. Head `heads_ahead` is loaded before the arithmetic of head 0, the next one before that of head
    1, and so on: memory stays busy, and registers hold few heads. With `heads_apart` the heads of a thread lie as far
    apart as they can, so that threads side by side read rows side by side. Else the heads of a thread lie side by side.
    """

    layout: str  # "chunks", "halves" or "row"
    rows_per_warp: int
    weights: str = "first"
    k_first: bool = False
    cast_first: bool = True
    heads_per_thread: int = 1
    heads_ahead: int = 1
    heads_apart: bool = False

    def heads_of(self, num_heads: int) -> int:
        """Heads of one token that a thread has, of an axis of so many."""
        return math.gcd(self.heads_per_thread, num_heads)


def has_chunks_of_pairs(head_dim: int, rotary_dim: int, rows_per_warp: int) -> bool:
    """Whether a row that is rotated by pairs has a few chunks of a pair at least for each thread."""
    width = chunk_lanes(head_dim, 2 * rotary_dim)
    return rows_per_warp <= 16 and head_dim // width <= 16 and width >= 2 * (32 // rows_per_warp)


def mosaic_forward(
    spec: Spec, *, q_copied: bool = True, k_copied: bool = False, by_slot: bool = False, num_axes: int = 1
) -> MosaicForward:
    """The configuration for `spec`, with 1 or 3 rows of positions.

    `q_copied` and `k_copied` say that something is copied next to q, the gate, or next to k, v. `by_slot` says that k
    and v go where slots name.

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

    By slot: a token without a slot is stepped over, and what follows the step waits for the slot. Few rows hide no such
    wait, so everything is loaded before it (1.22 us where the op without a cache takes 1.22 and weights after v 1.40 at
    T = 16; with the gate in place 1.12 against 1.20 for k rows among the others at T = 1, where the op without a cache
    takes 1.07). Chunks lose their lead with it (1.52 against 1.66 us at T = 64). Not timed: T = 128.

    Codes of 8 bits, and in the same run a cache of 16 bits: cast first they take 1.28 us where that takes 1.12 at
    T = 1, 2.56 where it takes 2.46 at 256, and 147.5 where it takes 145.0 at 16384; else 1.60, 2.82, and 142.5 where it
    takes 144.5. So halves cast first below 16384 rows.

    The rotation first: chunks lead a while longer (6.27 against 6.56 us at T = 1024, where the norm first takes 6.34 in
    halves), and with the weights first (6.37 after the gate). They are even at T = 64. Not timed: T = 2048.

    Pairs: chunks of R lanes lead where a launch is one wave or little more (6.02 against 6.43 us at T = 1024, where
    halves that are rotated take 6.22) and are even at T = 64. Not timed: T = 256 and 2048.

    Several heads of one token a thread: `_heads_per_thread` says how many, where nothing is copied next to q. With
    gates and R = 64 two are even at T = 1024 and lose elsewhere (138.3 against 135.6 us at 16384), and so do more.
    Without gates, D = R = 128, 32/8 heads, k rows first lose where v is copied with them and a launch is more than a
    wave (by slot 102.4 against 100.3 us at T = 16384, 5.66 against 5.15 at 1024). D = 128, R = 64, no gate, 32/8 heads:
    halves with several heads take 4.38 us at T = 1024 and chunks with one 4.74, and 82.5 and 84.6 at 16384 (copy 80.4).

    The gate in place, T = 16384, us of halves with eight heads, two of them ahead, of chunks with four and of chunks
    with one. With a cache of 16 bits 83.65, 84.05, 84.38, with 32/2 heads 147.9, 148.4, 150.3, with 24/4 heads 132.2,
    133.9, 133.5. With codes of 8 bits 78.8, 78.9, 81.1, with 32/2 heads 140.5, 143.0, 144.9, with 24/4 heads 122.5,
    126.7, 125.7. Without a cache they are even (75.0, 75.0, 74.7, and 292.7, 293.5, 293.4 at T = 65536). At T = 4096
    halves lose (20.3 and 19.9 with one head in chunks). Codes of 8 bits and other numbers of heads, chunks with four
    and with one: 12/2 heads 124.1 and 127.9 at T = 32768, 4/1 heads 91.3 and 93.8 at 65536, 20/4 heads 110.8 and 109.4
    at 16384.

    Heads apart gain where turns are many. D = R = 128, no gate, 32/8 heads: 81.7 us against 82.3 at T = 16384 (copy
    80.1), 22.0 against 22.1 at 4096, 9.47 against 9.41 at 2048; in other runs 321.5 against 325.7 at 65536 (copy 317.0)
    and 4.74 against 4.64 at 1024. R = 64: 81.0 against 81.7 at T = 16384. Pairs: 81.3 against 81.8 there. D = 512, 16/2
    heads: 149.5 against 149.9 there. D = R = 256, 8/4 heads, and mRoPE: even. In chunks they lose (gate in place, four
    heads, T = 65536: 294.5 against 293.5). Not timed: halves with eight heads and a cache.

    D = 512, no gate, 16/2 heads: a warp has one row, since 32 lanes a thread leave too few threads. R = 512: halves and
    weights first, with eight heads a thread and k rows among the others 151.6 us at T = 16384, with four 153.5, with
    one 160.9 (copy 144.7). R = 128: chunks, weights after the sum 147.4 us (copy 141.5) and 8.29 at T = 1024, halves
    156.2 and 8.83, two rows in chunks 160.6 and 9.18. Not timed: gates copied.
    """
    d, r, num_rows = spec.head_dim, spec.rotary_dim, spec.num_tokens * spec.num_q_heads
    rows_per_warp = min(32, max(1, 32 * 8 // next_power_of_2(d)))
    twice = min(32, 2 * rows_per_warp)
    partners_apart = spec.rotation == "halves"
    layout = "halves" if partners_apart and has_halves(d, r) else "row"
    cast_first = not by_slot or num_rows < 16384
    if by_slot and num_rows <= 1024:
        return MosaicForward(layout, rows_per_warp, weights="first", k_first=True)
    even, heads = spec.num_q_heads % 2 == 0, _heads_per_thread(spec, rows_per_warp, num_axes)
    apart = heads > 1 and num_rows * d >= 2**24
    halves = layout == "halves" and num_rows >= 64
    pairs = spec.rotation == "pairs" and num_rows >= 32768 and heads > 1
    if r == d and 128 <= d <= 512 and not q_copied and even and (halves or pairs):
        k_last = num_rows >= 131072 if d > 256 else k_copied and num_rows >= 32768
        return MosaicForward(layout, rows_per_warp, "first", not k_last, cast_first, heads, heads_apart=apart)
    k_first = 64 <= num_rows < 65536
    if (d, r, layout) == (128, 64, "halves") and not q_copied and even and heads > 1 and num_rows >= 32768:
        k_first = k_first and not k_copied
        return MosaicForward(layout, rows_per_warp, "first", k_first, cast_first, heads, heads_apart=apart)
    chunks = partners_apart and d // chunk_lanes(d, r) <= 16
    if spec.rotation == "pairs" and 512 <= num_rows < 32768 and has_chunks_of_pairs(d, r, 2 * rows_per_warp):
        return MosaicForward("chunks", 2 * rows_per_warp, weights="after_gate", k_first=True)
    if chunks and 16384 <= num_rows < 32768 and q_copied and spec.norm_order == "rotation_first":
        return MosaicForward("chunks", twice, weights="first", k_first=True)
    if chunks and num_rows >= 512 and d > 256 and not q_copied:
        return MosaicForward("chunks", rows_per_warp, weights="after_sum", k_first=True)
    if chunks and not q_copied and num_rows >= 262144:
        if layout == "halves" and d == 256 and spec.num_q_heads % 8 == 0 and spec.dtype != "float32":
            return MosaicForward(layout, rows_per_warp, "after_gate", False, cast_first, 8, heads_ahead=2)
        if is_fp8(spec.cache_dtype):
            return MosaicForward("chunks", twice, "after_gate", heads_per_thread=4)
    if chunks and num_rows >= 512 and (num_rows < 16384 or not q_copied):
        return MosaicForward("chunks", twice, weights="after_gate", k_first=k_first)
    after_sum = num_rows >= 65536 and r < d
    weights = "first" if num_rows < 64 else "after_sum" if after_sum else "after_gate"
    return MosaicForward(layout, rows_per_warp, weights=weights, k_first=k_first, cast_first=cast_first)


_ONE_WAVE = 9 * 132  # programs with eight heads a thread that an H100 or H200 runs at once


def _heads_per_thread(spec: Spec, rows_per_warp: int, num_axes: int) -> int:
    """Heads of one token for a thread where nothing is copied next to q.

    They save loads of a table row, which is as long as a row of q where all lanes are rotated, and while one is
    computed the next one's load is on its way. Too many leave too few threads.

    H200, bf16, R = D, no gate, us for 1, 2, 4 and 8 heads, or as many of these as were timed. D = 128, 32/8 heads:
    1.50, 1.50, 1.66 at T = 64; 2.34, 2.24, 2.34, 2.88 at 256; 3.62, 3.14, 3.04, 3.39 at 512; 5.95, 5.06, 4.83, 4.54 at
    1024 (copy 3.78); 9.44, 9.41, 10.2 for 2, 4, 8 at 2048; 22.4, 22.2, 23.5 at 4096 (21.0); 91.0, 85.5, 83.3, 84.7 at
    16384 (81.1); 334.9, 324.2, 330.2 for 2, 4, 8 at 65536 (318.6). D = 256, 8/4 heads: 1.38, 1.28, 1.63 at T = 64;
    1.92, 1.82, 2.05 at 256; 4.13, 3.84, 3.49, 3.81 at 1024; 14.3, 13.5, 12.9 at 4096; 52.9 and 50.7 for 2 and 4 at
    16384 (copy 50.7). D = 512, 16/2 heads: 3.17 with one and 3.39 with four at T = 256; 8.99, 8.32, 9.15 for 1, 4, 8 at
    1024; 41.2, 39.9, 40.9 at 4096. mRoPE, D = 128: 5.65 and 4.83 for 4 and 8 at T = 1024, 98.7, 87.6, 85.7 for 2, 4, 8
    at 16384. float32 takes one at 16384 (D = 128 162.2, 164.5, 166.7; D = 256 100.0, 101.7, 102.8). On an H100, 32/8
    heads, two gain 5.70 to 5.22 us at T = 1024 and 13.34 to 12.67 at 2048.

    Eight lead in a single wave of programs. D = 128, 64/8 heads, T = 1024, 1152 programs: 7.97 us with four heads and
    7.36 with eight. 16/8 heads, T = 2048, 768 programs: 5.41 and 5.18. 32/8 heads, T = 2048, 1280 programs: 9.41 and
    10.5. D = 256, 16/2 heads, T = 2048, 1536 programs: 8.19 and 8.54. Programs of a normalised v, which come on top,
    aren't counted. Not timed: such a v.
    """
    elements = spec.num_tokens * spec.num_q_heads * spec.head_dim
    if spec.dtype == "float32":
        return 1
    if spec.head_dim > 256:
        return 1 if elements < 2**23 else 4 if elements < 2**26 else 8
    if num_axes > 1:
        return 1 if elements < 2**19 else 4 if elements < 2**22 else 8
    groups_per_program = 4 * rows_per_warp
    groups = (spec.num_tokens * (n // math.gcd(8, n)) for n in (spec.num_q_heads, spec.num_kv_heads))
    if elements >= 2**22 and sum(-(-count // groups_per_program) for count in groups) <= _ONE_WAVE:
        return 8
    return 1 if elements < 2**17 else 2 if elements < 2**21 else 4


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


def widest_vector(num_bytes: int, head_dim: int, rotary_dim: int, rotation: str | None, itemsize: int) -> int:
    """The lanes of a vector of up to `num_bytes`. RoPE partners are whole vectors, or lie in one, of "pairs"."""
    return math.gcd(num_bytes // itemsize, head_dim, rotary_dim if rotation == "pairs" else rotary_dim // 2)


def mosaic_backward_group(spec: Spec, itemsize: int, rows_per_warp: int) -> tuple[int, int]:
    """Threads of a row and lanes of a vector, up to 16 bytes."""
    head_dim = spec.head_dim
    lanes = widest_vector(16, head_dim, spec.rotary_dim, spec.rotation, itemsize)
    return min(32 // rows_per_warp, max(1, next_power_of_2(head_dim) // lanes)), lanes


def one_wave(spec: Spec, num_sms: int, *, rows_per_warp: int, num_warpgroups: int) -> MosaicBackward:
    """One program of `num_warpgroups` on each of `num_sms` streaming multiprocessors, or fewer where rows run out."""
    itemsize = 4 if spec.dtype == "float32" else 2
    rows_per_tile = 32 // mosaic_backward_group(spec, itemsize, rows_per_warp)[0]
    q_warps, k_warps = shares(spec, 4 * num_warpgroups * num_sms, rows_per_tile)
    return MosaicBackward(rows_per_warp, num_warpgroups, q_warps, k_warps)


def shares(spec: Spec, num_warps: int, rows_per_tile: int) -> tuple[int, int]:
    """Warps for tiles of q rows and for those of k rows, by their numbers; no more than the longest share needs."""
    q_tiles, k_tiles = (-(-spec.num_tokens * h // rows_per_tile) for h in (spec.num_q_heads, spec.num_kv_heads))
    k_warps = round(num_warps * spec.num_kv_heads / (spec.num_q_heads + spec.num_kv_heads))
    k_warps = min(num_warps - 1, max(min(1, k_tiles), k_warps))
    q_warps, k_warps = (
        -(-tiles // -(-tiles // warps)) if tiles else 0
        for tiles, warps in ((q_tiles, num_warps - k_warps), (k_tiles, k_warps))
    )
    return q_warps, k_warps


_MOST_WARPGROUPS = 6  # on an SM; what an H200's share of its bandwidth, 4800 GB/s for 132 SMs, asks for
_L2_BYTES = 50 * 2**20  # of an H100 and of an H200


def _warpgroups_in_flight(target: Target) -> int:
    """On one SM, those that keep memory busy: by its share of the bandwidth; where that is not known, as on an H200."""
    if target.bandwidth is None:
        return _MOST_WARPGROUPS
    return -(-_MOST_WARPGROUPS * target.bandwidth * 132 // (4800 * target.num_sms))


def mosaic_backward(
    spec: Spec, target: Target, *, q_copied: bool = True, num_axes: int, cache_itemsize: int
) -> MosaicBackward:
    """The configuration for `spec` on `target`, with 1 or 3 rows of positions.

    `q_copied` says that something is copied next to the gradient of q, the gate's.

    One program an SM, as large as the registers allow: that is exactly one resident wave whatever ptxas does, which has
    to fit the program's threads into the 65536 registers of an SM. Where arrays outgrow L2, it is no larger than memory
    asks for: bandwidth times latency is what keeps it busy, and more bytes in flight only wait for each other.

    H200, bf16, D = 256, R = 64, 16/2 heads, T = 16384 (copy 168.6 us): 24 warps an SM take 177.3 us, 20 184.2, 28 187.5
    and 24 in six programs 0.5 more. A row of k takes as long as a row of q, though it moves three vectors where that
    moves five: counting it as 1.25 costs 1.3 us, and as 0.7, at 32 warps, 14.7. Two rows a warp (9.6 us more), an L2
    prefetch (22) and several waves (9.4, and 5.8 at T = 1024) lost. A single program needs no second kernel: 2.30 us
    against 2.94 at T = 1. At T = 64 programs of two warpgroups take 4.10, of one 4.45.

    Two tokens' worth of lanes a thread, so twice the rows a warp, hide more of each load's wait. They pay where all
    lanes are rotated, and five warpgroups then fit: D = R = 128, 32/8 heads, 122.8 us against 140.3 at T = 16384 (copy
    117.2), 34.0 against 38.5 at 4096, 7.90 against 8.90 at 1024; D = R = 256, 8/4 heads, 76.4 against 88.1 at 16384
    (copy 71.3). With R = 64 they pay where the arrays fit into L2, in four warpgroups (11.5 against 12.5 us at
    T = 1024, 5.44 against 5.86 at 256; 32/2 heads 25.0 against 26.2 at 1024), and lose at 16384 (185.6 against 177.2).
    Where nothing is copied next to q they pay there too: 111.9 us in five warpgroups, 117.7 in four and 133.3 in three,
    with one row a warp 116.9 in eight and 130.7 in six (copy 106.5). Not timed: three rows of positions, float32, other
    sizes of heads; with nothing copied T = 4096, other sizes than D = 256 and R = 64, and an H100.

    An H100 has as many SMs and 0.70 of the bandwidth. There 24, 20 and 16 warps an SM take 68.8, 66.6 and 68.0 us at
    T = 4096, 265, 258.8 and 256.5 at 16384, 1028, 1008 and 1018 at 65536, and 500, 492 and 489 at 16384 with 32/2
    heads. 20 are 24 times 0.70 in whole warpgroups, and the best or within 1 %. Not timed: any other GPU. By bandwidth
    and SMs an H100 PCIe gets 12 warps and an H100 NVL 20. An H20 and a B200 would get more than 24, and stay at 24.
    """
    itemsize = 4 if spec.dtype == "float32" else 2
    num_rows = spec.num_tokens * (spec.num_q_heads + spec.num_kv_heads)
    num_bytes = 3 * num_rows * spec.head_dim * itemsize  # of x, its cotangent and its gradient, nearly
    in_l2 = num_bytes <= 64 * 2**20
    rows_per_warp = min(32, max(1, 32 * 8 // next_power_of_2(spec.head_dim)))
    all_rotated = spec.rotary_dim == spec.head_dim
    pays = all_rotated or in_l2 or (spec.head_dim == 256 and not q_copied)
    wide_threads = itemsize == 2 and num_axes == 1 and spec.head_dim in (128, 256) and pays
    if wide_threads:
        rows_per_warp *= 2
    threads, lanes = mosaic_backward_group(spec, itemsize, rows_per_warp)
    vectors, rotated = (-(-size // (threads * lanes)) for size in (spec.head_dim, spec.rotary_dim))
    words, cache_words = (-(-lanes * size // 4) for size in (itemsize, cache_itemsize))
    # What a thread holds at once: sums and weights; x, dy and the gate's cotangent; cos and sin at each axis and the
    # masks that merge them. 16 registers more are enough without spills (sm_90a, CUDA 12.9 and 13.0).
    held = 2 * vectors * lanes + 3 * vectors * words + (3 * num_axes - 1) * rotated * cache_words
    most = _MOST_WARPGROUPS if all_rotated or not wide_threads else 4 if in_l2 else 5
    num_warpgroups = max(1, min(most, 512 // (held + 16)))
    if num_bytes > _L2_BYTES:
        num_warpgroups = min(num_warpgroups, _warpgroups_in_flight(target))

    config = one_wave(spec, target.num_sms, rows_per_warp=rows_per_warp, num_warpgroups=num_warpgroups)
    warps = config.q_warps + config.k_warps
    if warps <= 4 * num_warpgroups:
        num_warpgroups = -(-warps // 4)  # one program, whose sums are the gradients: no second kernel
    elif warps <= 4 * (num_warpgroups - 2) * target.num_sms:
        # Few warps spread best in small programs. ptxas then takes more registers, which leave room for two fewer.
        num_warpgroups = min(2, num_warpgroups)
    else:
        num_warpgroups = min(num_warpgroups, -(-warps // (4 * target.num_sms)))
    return dataclasses.replace(config, num_warpgroups=num_warpgroups)
