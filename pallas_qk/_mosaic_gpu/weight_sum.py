"""The second kernel of the backward: the sum of the programs' partial gradients of the weights."""

import math

import jax
from jax.experimental import pallas as pl
from jaxlib.mlir.dialects import arith

from pallas_qk._mosaic_gpu.emit import (
    ACCESS_BYTES,
    WARP,
    WARPGROUP,
    butterfly,
    f32,
    narrow,
    select,
    thread_index,
    warp_index,
    when,
    widen,
)
from pallas_qk._mosaic_gpu.launch import launch

SUM_NAME = "pallas_qk_mosaic_gpu_sum"

_ROWS = 16  # that one warp reads side by side


def sum_rows(partials: list[jax.Array], types: list[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    """The sum (D,) over the rows of each array (rows, D), in a fixed order, as `types`."""
    num_rows, head_dim = partials[0].shape
    lanes = math.gcd(ACCESS_BYTES // 4, head_dim)
    threads = WARP // _ROWS  # side by side in a row
    warps = pl.cdiv(head_dim, threads * lanes)  # of an array
    warps_per_program = WARPGROUP // WARP

    def thread(program, sources, targets):
        warp = program * warps_per_program + warp_index()
        lane_id = thread_index() & WARP - 1
        for source, target in zip(sources, targets, strict=True):
            with when(warp < warps):
                column = (warp * threads + lane_id % threads) * lanes
                column = column.minimum(head_dim - lanes)
                total = [f32(0.0)] * lanes
                for first in range(0, num_rows, _ROWS):
                    row = lane_id // threads + first
                    words = (source.row(row.minimum(num_rows - 1), head_dim) + column).load(lanes)
                    term = select(row < num_rows, widen(words, source.dtype), [f32(0.0)] * lanes)
                    total = [arith.addf(a, b) for a, b in zip(total, term, strict=True)]
                distance = threads
                while distance < WARP:
                    total = [arith.addf(a, butterfly(a, distance)) for a in total]
                    distance *= 2
                (target + column).store(narrow(total, target.dtype))
            # The warps of this array wrap around, above the number of any other's.
            warp = warp + -warps

    num_programs = pl.cdiv(warps * len(partials), warps_per_program)
    return launch(SUM_NAME, thread, partials, types, num_programs=num_programs, num_warpgroups=1)
