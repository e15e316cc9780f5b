"""The launch configurations of the Triton kernels, and the rules that choose them by shapes and dtype."""

import dataclasses

from pallas_qk._options import Spec, chunk_lanes, has_halves, next_power_of_2


@dataclasses.dataclass(frozen=True)
class TritonForward:
    """Launch configuration of the forward kernel on Pallas Triton.

    `layout` says how a row of D lanes is cut into tiles. "chunks": D/C tiles of C lanes, RoPE partners at the same
    place of two chunks. "halves": two tiles of D/2 lanes, RoPE partners at the same place of the two. "row": one
    tile of next_power_of_2(D) lanes, the partners loaded once more. "pairs", for the rotation of this name: such a
    tile, with partners side by side. "whole": such a tile of rows that are not rotated.
    """

    layout: str  # of `tiles.LAYOUTS`
    rows_per_program: int = 4
    num_warps: int = 2
    num_stages: int = 1


def triton_forward(spec: Spec, *, q_copied: bool = True) -> TritonForward:
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
    if spec.rotation != "halves":
        return TritonForward(spec.rotation or "whole")
    d, r = spec.head_dim, spec.rotary_dim
    halves = has_halves(d, r)
    chunks = d // chunk_lanes(d, r) <= 12
    num_rows = spec.num_tokens * spec.num_q_heads
    if halves and (num_rows < 128 or (num_rows >= 32768 and q_copied) or not chunks):
        return TritonForward("halves")
    return TritonForward("chunks" if chunks else "row")


@dataclasses.dataclass(frozen=True)
class TritonBackward:
    """Launch configuration of the backward kernel on Pallas Triton.

    `q_programs` programs of one warp walk over the q rows and `k_programs` over the k rows, each by steps of
    `rows_per_step`, a power of two; each leaves half as many rows of partial weight gradients, or one. For `layout` see
    TritonForward.
    """

    layout: str  # of `tiles.LAYOUTS`, but for "chunks"
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
    halves = spec.rotation == "halves" and has_halves(d, r)
    halves = halves and (r // 2 >= vector or spec.norm_order == "rotation_first")  # which needs partners in one thread
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
    layout = ("halves" if halves else "row") if spec.rotation == "halves" else spec.rotation or "whole"
    return TritonBackward(layout, rows, q_programs, k_programs)
