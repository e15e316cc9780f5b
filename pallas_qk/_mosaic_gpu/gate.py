"""The cotangents of attended * sigmoid(gate), the gate's where its gradient belongs, as a kernel on Mosaic GPU.

T num_tokens, Hq num_q_heads, D head_dim.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxlib.mlir.dialects import arith

from pallas_qk._mosaic_gpu.emit import (
    ACCESS_BYTES,
    WARPGROUP,
    Int,
    Value,
    bits_of,
    f32,
    narrow,
    ptx,
    select,
    thread_index,
    widen,
)
from pallas_qk._mosaic_gpu.launch import launch
from pallas_qk._mosaic_gpu.thread import RowsIn
from pallas_qk._options import Options
from pallas_qk._rows import Inputs, Product, product_types, rows_for, spec_of

GATE_NAME = "pallas_qk_mosaic_gpu_gate_backward"


def gate_backward(inputs: Inputs, operands: Product, *, options: Options) -> Product:
    """The contract of `_reference.gate_backward`. What lies beside the gate's rows is not written.

    A thread has one vector of 16 bytes of each array: 157.0 us at T = 16384 (a copy takes 157.0; H200, bf16, D = 256,
    16 heads), two 158.6 and four 159.1, programs of two warpgroups 157.9.
    """
    spec, dtype = spec_of(inputs, options), inputs.q.dtype
    types = product_types(inputs, operands)
    if spec.num_tokens == 0:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), types)
    place, num_heads = rows_for(spec, options)["gate"].source, spec.num_q_heads
    lanes = math.gcd(ACCESS_BYTES // dtype.itemsize, spec.head_dim)
    per_row = spec.head_dim // lanes
    total = spec.num_tokens * num_heads * per_row
    num_programs = pl.cdiv(total, WARPGROUP)
    width = 32 if num_programs * WARPGROUP < 2**32 else 64

    def thread(program: Int, read: tuple[Inputs, Product], written: Product):
        inputs, operands = read
        gates, targets = (RowsIn(array, place, num_heads) for array in (inputs.q, written.q))
        index = program.resized(width) * WARPGROUP + thread_index().resized(width)
        if total % WARPGROUP:
            index = index.minimum(total - 1)  # with equal bits, so that stores need no mask
        row, column = index // per_row, (index % per_row * lanes).resized(64)
        dense = index.resized(64) * lanes
        loads = (gates.row(row) + column, operands.attended + dense, operands.product + dense)
        words = [pointer.load(lanes) for pointer in loads]
        each = [_cotangents(*values) for values in zip(*(widen(x, dtype) for x in words), strict=True)]
        of_gate, of_attended = zip(*each, strict=True)
        (written.attended + dense).store(narrow(list(of_attended), dtype))
        (targets.row(row) + column).store(narrow(list(of_gate), dtype))

    return launch(GATE_NAME, thread, (inputs, operands), types, num_programs=num_programs, num_warpgroups=1)


def _cotangents(gate: Value, attended: Value, dout: Value) -> tuple[Value, Value]:
    """Of a lane of the gate, and of attended: those of `_reference.gate_backward`."""
    bits = bits_of(gate)
    magnitude = (bits & 0x7FFFFFFF).as_float()
    scaled = arith.mulf(magnitude, f32(-math.log2(math.e)))
    below = ptx("ex2.approx.ftz.f32 $0, $1;", "=f,f", gate.type, scaled)
    above = ptx("rcp.approx.ftz.f32 $0, $1;", "=f,f", gate.type, arith.addf(below, f32(1.0)))
    product = arith.mulf(below, above)
    (opened,) = select(bits < 1 << 31, [above], [product])
    return arith.mulf(arith.mulf(dout, attended), arith.mulf(product, above)), arith.mulf(dout, opened)
