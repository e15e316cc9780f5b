"""Does the suite notice when the code is wrong? `make mutants` breaks it in one place at a time and runs the tests.

python -m tests.mutations [--only TEXT] [--gpu] [--jobs N]

Each mutation is applied to a temporary copy of the tree, never in place. It is caught where the tests named for it
fail, after they have passed on an unchanged copy. Exits with 1 if one survives or doesn't fit the code.
"""

import argparse
import collections
import concurrent.futures
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
_LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "results", "dist")


class Mutation(NamedTuple):
    """`old`, which `file` holds exactly once, becomes `new`; some of `tests` must fail."""

    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    needs_gpu: str = ""  # why no test can see it without one


def tests_of(file: str, *names: str) -> tuple[str, ...]:
    return tuple(f"tests/test_{file}.py::{name}" for name in names) if names else (f"tests/test_{file}.py",)


REFERENCE, TRITON, TRITON_VJP = "pallas_qk/_reference.py", "pallas_qk/_triton.py", "pallas_qk/_triton_vjp.py"
MOSAIC, MOSAIC_VJP, CONFIG = "pallas_qk/_mosaic_gpu.py", "pallas_qk/_mosaic_gpu_vjp.py", "pallas_qk/_config.py"
SHARDING, VJP, CHECKS, KERNEL = (f"pallas_qk/_{name}.py" for name in ("sharding", "vjp", "checks", "kernel"))

FORMS_OF_XLA = tests_of("properties", "test_forward_keeps_to_its_definition[xla-6]")
FORMS_OF_MOSAIC = tests_of("properties", "test_forward_keeps_to_its_definition[mosaic_gpu-25]")
GRADIENTS_OF_XLA = tests_of("properties", "test_backward_of_plain_xla_keeps_to_its_definition")
GRADIENTS_OF_MOSAIC = tests_of("properties", "test_backward_agrees_with_plain_xla[mosaic_gpu-8]")
GRADIENTS_OF_TRITON = tests_of("triton_vjp", "test_every_layout_and_number_of_rows")
OUTSIDE_OF_MOSAIC = "test_a_position_past_the_table_gives_nan_in_its_lanes_and_a_negative_one_row_0"
RECIPE = tests_of("mosaic_gpu", "test_every_rounding_is_the_recipe_s")
# The places of a sum or product show in float32, the round trip in 16 bits.
BITS_OF_TRITON = tests_of(
    "parity",
    "test_agrees_on_a_gpu[triton-T4096-H16.2-D256-R64-float32]",
    "test_agrees_on_a_gpu[triton-T127-H24.4-D128-R128-bfloat16]",
    "test_agrees_on_a_gpu[triton-T1025-H5.2-D96-R96-float32-norm_beta=1.0]",
)
PTX = "inline assembly, which only a GPU runs"

MUTATIONS = (
    # The order of the sum of squares.
    Mutation(
        "tree order: the warps from the lowest bit",
        CONFIG,
        "return [0, *range(5, 0, -1), *range(bits - 1, 5, -1)]",
        "return [0, *range(5, 0, -1), *range(6, bits)]",
        tests_of("tree", "test_reference_sum_is_the_tree"),
    ),
    Mutation(
        "tree order: pairs also where a thread holds one lane",
        CONFIG,
        "if bits <= 5:\n        return list(range(bits - 1, -1, -1))",
        "if bits <= 5:\n        return [0, *range(bits - 1, 0, -1)]",
        tests_of("tree", "test_reference_sum_is_the_tree"),
    ),
    Mutation(
        "xla: the bits of a lane in ascending order",
        REFERENCE,
        "for bit in tree_order(num_lanes):",
        "for bit in range(len(bits_left)):",
        tests_of("tree", "test_reference_sum_is_the_tree"),
    ),
    Mutation(
        "xla: a plain sum",
        REFERENCE,
        "mean_square = tree_sum(x32 * x32) / head_dim",
        "mean_square = jnp.sum(x32 * x32, axis=-1) / head_dim",
        tests_of("rounding", "test_the_norm_of_plain_xla_sums_by_the_tree"),
    ),
    Mutation(
        "triton: the bits of a lane in ascending order",
        TRITON,
        "for bit in order:",
        "for bit in sorted(order):",
        tests_of("tree", "test_each_layout_of_the_triton_kernel_sums_the_tree"),
    ),
    Mutation(
        "triton: a layout that claims the wrong bits",
        TRITON,
        "bits = [bit for bit in range(head_dim.bit_length() - 2, -1, -1) if 1 << bit != half]",
        "bits = [bit for bit in range(head_dim.bit_length() - 2, -1, -1) if 1 << bit != rotary_dim]",
        tests_of("tree", "test_each_layout_of_the_triton_kernel_sums_the_tree"),
    ),
    Mutation(
        "mosaic: the bits of a lane in ascending order",
        MOSAIC,
        "for bit in order:",
        "for bit in sorted(order):",
        RECIPE,
    ),
    Mutation(
        "mosaic: the other square of a pair fused",
        MOSAIC,
        "mlir_math.fma(first, first, arith.mulf(second, second))",
        "mlir_math.fma(second, second, arith.mulf(first, first))",
        RECIPE,
    ),
    Mutation(
        "mosaic: two threads that share a pair fuse one square each",
        MOSAIC,
        "_sum_of_pair(arith.select(is_second, other, x), arith.select(is_second, x, other))",
        "_sum_of_pair(x, other)",
        RECIPE,
    ),
    Mutation(
        "triton: the places of a pair swapped",
        TRITON,
        "== place, words, 0) for place in (0, 1))",
        "== place, words, 0) for place in (1, 0))",
        BITS_OF_TRITON,
        PTX,
    ),
    Mutation(
        "triton: a pair loses one of its places",
        TRITON,
        "== place, words, 0) for place in (0, 1))",
        "== place, words, 0) for place in (0, 0))",
        tests_of("tree", "test_each_layout_of_the_triton_kernel_sums_the_tree"),
    ),
    # The 16-bit round trip after the norm.
    Mutation(
        "xla: no bfloat16 round trip",
        REFERENCE,
        "return lax.reduce_precision(y, exponent_bits=8, mantissa_bits=7)",
        "return y",
        tests_of("rounding"),
    ),
    Mutation(
        "xla: a float16 round trip that flushes subnormals",
        REFERENCE,
        "return lax.optimization_barrier(y.astype(dtype)).astype(jnp.float32)",
        "return lax.reduce_precision(y, exponent_bits=5, mantissa_bits=10)",
        tests_of("rounding"),
    ),
    Mutation(
        "xla: no float16 round trip",
        REFERENCE,
        "return lax.optimization_barrier(y.astype(dtype)).astype(jnp.float32)",
        "return y",
        tests_of("rounding"),
    ),
    Mutation(
        "xla: rotation of values that were not rounded",
        REFERENCE,
        "return _rotate(round_trip(y, x.dtype), cos, sin).astype(x.dtype)",
        "return _rotate(y, cos, sin).astype(x.dtype)",
        tests_of("rounding"),
    ),
    Mutation(
        "triton: rotation of values that were not rounded",
        TRITON,
        "y1, y2 = _reference.round_trip(y1, dtype), _reference.round_trip(y2, dtype)",
        "y1, y2 = y1 * 1.0, y2 * 1.0",
        tests_of("rounding"),
    ),
    Mutation(
        "mosaic: rotation of values that were not rounded",
        MOSAIC,
        "ys.append(_widen(words[-1], out.dtype))",
        "ys.append(y)",
        RECIPE,
    ),
    Mutation(
        "triton: no round trip in PTX",
        TRITON,
        "y1, y2 = round_trip(y1), round_trip(y2)",
        "y1, y2 = y1 * 1.0, y2 * 1.0",
        BITS_OF_TRITON,
        PTX,
    ),
    # The rotation, its partners and its fused form.
    Mutation(
        "triton: the wrong partner chunk",
        TRITON,
        "rotated = [arithmetic.rotate(ys[j], ys[j + pairs], cos, sin)",
        "rotated = [arithmetic.rotate(ys[j], ys[2 * pairs - 1 - j], cos, sin)",
        tests_of("forward", "test_chunks_of_few_lanes"),
    ),
    Mutation(
        "mosaic: the wrong partner",
        MOSAIC,
        "rotations.append(_Rotation(index, layout.bases.index(base + half), None, where, frequency))",
        "rotations.append(_Rotation(index, layout.bases.index(half), None, where, frequency))",
        tests_of("mosaic_gpu", "test_every_configuration_gives_the_same_bits"),
    ),
    Mutation(
        "xla: rotation the other way round",
        REFERENCE,
        "return jnp.concatenate([y1 * cos - y2 * sin, y1 * sin + y2 * cos, rest], axis=-1)",
        "return jnp.concatenate([y1 * cos + y2 * sin, y2 * cos - y1 * sin, rest], axis=-1)",
        FORMS_OF_XLA,
    ),
    Mutation(
        "mosaic: the fused form without mRoPE",
        MOSAIC,
        "mlir_math.fma(b, c, arith.mulf(a, s)) if fuses_y2 else",
        "mlir_math.fma(b, c, arith.mulf(a, s)) if True else",
        RECIPE,
    ),
    Mutation(
        "mosaic: the fused form with mRoPE",
        MOSAIC,
        "mlir_math.fma(b, c, arith.mulf(a, s)) if fuses_y2 else",
        "mlir_math.fma(b, c, arith.mulf(a, s)) if False else",
        RECIPE,
    ),
    Mutation(
        "triton: the other product fused",
        TRITON,
        "mul.rn.f32 t, $3, $4; {sign}fma.rn.f32 $0, $1, $2, t;",
        "mul.rn.f32 t, $1, $2; {sign}fma.rn.f32 $0, $3, $4, t;",
        BITS_OF_TRITON,
        PTX,
    ),
    Mutation(
        "triton: the fused form with mRoPE",
        TRITON,
        "o2 = dot2(y2, cos, y1, sin) if fuses_y2 else dot2(y1, sin, y2, cos)",
        "o2 = dot2(y1, sin, y2, cos)",
        BITS_OF_TRITON,
        PTX,
    ),
    Mutation(
        "triton: mean and eps in two roundings",
        TRITON,
        "rcp.approx.ftz.f32 r, $2; fma.rn.f32 $0, $1, r, $3; }",
        "div.rn.f32 r, $1, $2; add.rn.f32 $0, r, $3; }",
        BITS_OF_TRITON,
        PTX,
    ),
    Mutation(
        "triton: packed lanes swapped",
        TRITON,
        'return y if dtype == jnp.float32 else _ptx(f"{convert} $0, $2, $1;", "=r,r,r", dtype, y, pack=2)',
        'return y if dtype == jnp.float32 else _ptx(f"{convert} $0, $1, $2;", "=r,r,r", dtype, y, pack=2)',
        BITS_OF_TRITON,
        PTX,
    ),
    Mutation(
        "mosaic: mean and eps in two roundings",
        MOSAIC,
        "rcp.approx.ftz.f32 t, $2; fma.rn.f32 t, $1, t, $3; rsqrt",
        "rcp.approx.ftz.f32 t, $2; fma.rn.f32 t, $1, t, $1; rsqrt",
        RECIPE,
    ),
    # Which row of positions, and the guard.
    Mutation(
        "xla: width reads by the limit of height",
        REFERENCE,
        "== axis) & (frequency < 3 * mrope_section[axis])",
        "== axis) & (frequency < 3 * mrope_section[1])",
        tests_of("forward", "test_equals_the_definition[xla-T7-H3.1-D256-R64-bfloat16-mrope_section=(18,5,9)]"),
    ),
    Mutation(
        "xla: sections that start one too late",
        REFERENCE,
        "start = sum(mrope_section[:axis])",
        "start = sum(mrope_section[: axis + 1])",
        tests_of("properties", "test_forward_keeps_to_its_definition"),
    ),
    Mutation(
        "mosaic: width reads by the limit of height",
        MOSAIC,
        "remainder, limit = _rem(frequency, 3), 3 * section[axis]",
        "remainder, limit = _rem(frequency, 3), 3 * section[1]",
        tests_of("mosaic_gpu", "test_equals_the_definition[T7-H3.1-D256-R64-bfloat16-mrope_section=(18,5,9)]"),
    ),
    Mutation(
        "mosaic: sections that start at 0",
        MOSAIC,
        "first, size = sum(section[:axis]), section[axis]",
        "first, size = 0, section[axis]",
        FORMS_OF_MOSAIC,
    ),
    Mutation(
        "guard: one row too many",
        REFERENCE,
        "is_past = positions >= limit",
        "is_past = positions > limit",
        tests_of("positions", "test_positions_outside[xla-int32]"),
    ),
    Mutation(
        "guard: negative positions read the table's end",
        REFERENCE,
        "jnp.where((positions < 0) | is_past, 0, positions)",
        "jnp.where(is_past, 0, positions)",
        tests_of("positions", "test_positions_outside[xla-int32]"),
    ),
    Mutation(
        "derivatives read NaN past the table",
        REFERENCE,
        "cos, sin = _cos_and_sin(inputs, options, past=None)\n    dq,",
        "cos, sin = _cos_and_sin(inputs, options, past=jnp.nan)\n    dq,",
        tests_of("gradients", "test_a_masked_token_outside_the_table_adds_nothing[xla-grad-False]"),
    ),
    Mutation(
        "tangents read NaN past the table",
        REFERENCE,
        "cos, sin = _cos_and_sin(inputs, options, past=None)\n    return",
        "cos, sin = _cos_and_sin(inputs, options, past=jnp.nan)\n    return",
        tests_of("gradients", "test_derivatives_read_row_0_outside_the_table[xla-just past]"),
    ),
    Mutation(
        "the table's gradient sees positions past it",
        REFERENCE,
        "lax.stop_gradient(table) if past is None else past",
        "table if past is None else past",
        tests_of("gradients", "test_derivatives_read_row_0_outside_the_table[xla-just past]"),
    ),
    Mutation(
        "guard: compared after narrowing",
        REFERENCE,
        "if positions.dtype.itemsize < 4:",
        "if positions.dtype.itemsize != 4:",
        tests_of("positions", "test_positions_outside[xla-int64]"),
    ),
    Mutation(
        "guard: narrow types not widened",
        REFERENCE,
        "if positions.dtype.itemsize < 4:",
        "if positions.dtype.itemsize < 1:",
        tests_of("positions", "test_a_table_whose_size_is_the_types_limit_plus_one"),
    ),
    Mutation(
        "guard: NumPy's 64 bits narrowed unseen",
        CHECKS,
        "return np.maximum(at_most, -1).astype(np.int32)",
        "return positions.astype(np.int32)",
        tests_of("positions", "test_numpy_positions_of_64_bits_are_not_narrowed_unseen"),
    ),
    Mutation(
        "mosaic guard: compared after narrowing",
        MOSAIC,
        "inside = _below(position, self._limit(position))",
        "inside = _below(_resized(position, 32), min(self._limit(position), 2**31 - 1))",
        tests_of("mosaic_gpu", f"{OUTSIDE_OF_MOSAIC}[100-int64]"),
    ),
    Mutation(
        "mosaic guard: an unsigned position with a sign",
        MOSAIC,
        "arith.CmpIPredicate.sge if _is_signed(self.positions.dtype) else arith.CmpIPredicate.uge",
        "arith.CmpIPredicate.sge",
        tests_of("mosaic_gpu", f"{OUTSIDE_OF_MOSAIC}[100-uint32]"),
    ),
    Mutation(
        "mosaic guard: a negative position is past the table",
        MOSAIC,
        "arith.CmpIPredicate.sge if _is_signed(self.positions.dtype) else arith.CmpIPredicate.uge",
        "arith.CmpIPredicate.uge",
        tests_of("mosaic_gpu", f"{OUTSIDE_OF_MOSAIC}[100-int32]"),
    ),
    Mutation(
        "mosaic guard: a signed position without its sign",
        MOSAIC,
        "extend = arith.extsi if _is_signed(self.dtype) else arith.extui",
        "extend = arith.extui",
        tests_of("mosaic_gpu", f"{OUTSIDE_OF_MOSAIC}[100-int8]"),
    ),
    Mutation(
        "xla: zeros instead of NaN",
        REFERENCE,
        "_cos_and_sin(inputs, options, past=jnp.nan)",
        "_cos_and_sin(inputs, options, past=0.0)",
        tests_of("positions", "test_positions_outside[xla-int32]"),
    ),
    Mutation(
        "triton: row 0 instead of NaN",
        TRITON,
        "(cos if is_past is None else jnp.where(is_past, jnp.nan, cos), sin)",
        "(cos, sin)",
        tests_of("positions", "test_positions_outside[triton-int32]"),
    ),
    Mutation(
        "mosaic: row 0 instead of NaN",
        MOSAIC,
        "cos = _select(is_past, [_nan(word, self.cache.dtype) for word in cos], cos)",
        "cos = _select(is_past, cos, cos)",
        tests_of("mosaic_gpu", f"{OUTSIDE_OF_MOSAIC}[100-int32]"),
    ),
    # Masks, offsets and strides.
    Mutation(
        "mosaic: rows past the last",
        MOSAIC,
        "if num_rows % rows_per_program:\n            row = _min(row, num_rows - 1)",
        "if num_rows % rows_per_program:\n            row = _min(row, num_rows)",
        tests_of("mosaic_gpu", "test_a_token_alone_gives_the_bits_it_gives_in_a_batch"),
    ),
    Mutation(
        "triton: lanes past the end of a row count in the sum",
        TRITON,
        "return _Layout([lane, partner], [lane < head_dim, rotated], [0], bits, [frequency], rotated, rotate)",
        "return _Layout([lane, partner], [None, rotated], [0], bits, [frequency], rotated, rotate)",
        tests_of("tree", "test_each_layout_of_the_triton_kernel_sums_the_tree")
        + tests_of("forward", "test_equals_the_definition[triton-T7-H3.1-D80-R40-float16]"),
    ),
    Mutation(
        "triton: no mask on the rows",
        TRITON,
        "mask = None if num_tokens * num_heads % num_rows_per_program == 0 else first + row < num_tokens * num_heads",
        "mask = None",
        tests_of("masks", "test_rows_that_fill_no_program_are_masked"),
    ),
    Mutation(
        "xla: gate and q exchanged",
        REFERENCE,
        "q, gate = q[..., :head_dim], q[..., head_dim:]",
        "gate, q = q[..., :head_dim], q[..., head_dim:]",
        FORMS_OF_XLA,
    ),
    Mutation(
        "triton: the gate read at q's place",
        TRITON,
        "gate=_Heads(q_ref, part=(1,)))",
        "gate=_Heads(q_ref, part=(0,)))",
        tests_of("forward", "test_gate_bits_are_kept[triton]"),
    ),
    Mutation(
        "triton: a packed gate read at q's place",
        TRITON,
        "gate = None if options.gate is None else _Heads(q_ref, 1, step)",
        "gate = None if options.gate is None else _Heads(q_ref, 0, step)",
        tests_of("kernel_forms", "test_a_form_has_the_bits_of_the_plain_one[triton-copied-packed-table]"),
    ),
    Mutation(
        "triton: packed v read at k's place",
        TRITON,
        "_Heads(q_ref, first_k + spec.num_kv_heads)",
        "_Heads(q_ref, first_k)",
        tests_of("kernel_forms", "test_a_form_has_the_bits_of_the_plain_one[triton-copied-packed-table]"),
    ),
    Mutation(
        "mosaic: the gate read at q's place",
        MOSAIC,
        "return _Heads(q, num_q_heads, q_stride, d), _Heads(k, num_kv_heads, d, 0)",
        "return _Heads(q, num_q_heads, q_stride, 0), _Heads(k, num_kv_heads, d, 0)",
        tests_of("mosaic_gpu", "test_gates_keep_nan_payloads_and_rows_their_nans"),
    ),
    Mutation(
        "mosaic: tokens of a packed array too close",
        MOSAIC,
        "_Heads(q, num_q_heads, q_stride, d, gap=2 * kv_width),",
        "_Heads(q, num_q_heads, q_stride, d, gap=kv_width),",
        FORMS_OF_MOSAIC,
    ),
    Mutation(
        "mosaic: offsets in 32 bits",
        MOSAIC,
        "offset = _mul(_resized(row, 64), self.stride)",
        "offset = _resized(_mul(row, self.stride), 64)",
        tests_of("mosaic_gpu_vjp", "test_offsets_past_2_32_elements"),
    ),
    Mutation(
        "mosaic: offsets of outputs in 32 bits",
        MOSAIC,
        "return self + _mul(_resized(index, 64), lanes)",
        "return self + _resized(_mul(index, lanes), 64)",
        tests_of("large", "test_outputs_of_the_mosaic_kernel_by_its_interpreter"),
    ),
    # Weights, eps and beta.
    Mutation(
        "xla: k with q's weight",
        REFERENCE,
        "k_out = norm_and_rope(x.k, inputs.k_weight, cos, sin, options)",
        "k_out = norm_and_rope(x.k, inputs.q_weight, cos, sin, options)",
        FORMS_OF_XLA,
    ),
    Mutation(
        "triton: k with q's weight",
        TRITON,
        "norm_and_rope(group, spec.num_kv_heads, heads.k, inputs.k_weight, outputs.k, heads.v, outputs.v)",
        "norm_and_rope(group, spec.num_kv_heads, heads.k, inputs.q_weight, outputs.k, heads.v, outputs.v)",
        tests_of("forward", "test_equals_the_definition[triton-T2-H16.2-D256-R64-float16]"),
    ),
    Mutation(
        "mosaic: k with q's weight",
        MOSAIC,
        "norm_and_rope(k_before, k, inputs.k_weight, outputs.k, outputs.v)",
        "norm_and_rope(k_before, k, inputs.q_weight, outputs.k, outputs.v)",
        FORMS_OF_MOSAIC,
    ),
    Mutation(
        "xla: no eps",
        REFERENCE,
        "y = x32 * lax.rsqrt(mean_square + options.eps)[..., None] * weight",
        "y = x32 * lax.rsqrt(mean_square)[..., None] * weight",
        tests_of("forward", "test_zero_rows_give_zeros[xla]"),
    ),
    Mutation(
        "triton: no eps",
        TRITON,
        "mean_plus_eps=lambda s, head_dim, eps: s / head_dim + eps,",
        "mean_plus_eps=lambda s, head_dim, eps: s / head_dim,",
        tests_of("forward", "test_zero_rows_give_zeros[triton]"),
    ),
    Mutation(
        "mosaic: no eps",
        MOSAIC,
        "sum_of_squares.type, sum_of_squares, _f32(head_dim), _f32(eps))",
        "sum_of_squares.type, sum_of_squares, _f32(head_dim), _f32(0.0))",
        RECIPE,
    ),
    Mutation(
        "xla: no beta",
        REFERENCE,
        "return weight + norm_beta if norm_beta else jnp.where(weight == 0, 0.0, weight)",
        "return jnp.where(weight == 0, 0.0, weight)",
        FORMS_OF_XLA,
    ),
    Mutation(
        "xla: a weight of -0.0 keeps its sign",
        REFERENCE,
        "return weight + norm_beta if norm_beta else jnp.where(weight == 0, 0.0, weight)",
        "return weight + norm_beta",
        tests_of("forward", "test_a_weight_of_negative_zero_counts_as_zero[xla]"),
    ),
    Mutation(
        "mosaic: no beta",
        MOSAIC,
        "return [arith.addf(lane, _f32(norm_beta)) for lane in _widen(words, dtype)]",
        "return [arith.addf(lane, _f32(0.0)) for lane in _widen(words, dtype)]",
        RECIPE,
    ),
    Mutation(
        "mosaic: a weight of -0.0 keeps its sign",
        MOSAIC,
        "return _widen([_ptx(code,",
        "return _widen(words, dtype) or _widen([_ptx(code,",
        tests_of("mosaic_gpu", "test_weights_of_minus_zero_give_zero"),
    ),
    Mutation(
        "mosaic: more rows than threads in a warp",
        CONFIG,
        "min(32, 2 * rows_per_warp), weights",
        "2 * rows_per_warp, weights",
        tests_of("mosaic_gpu", "test_equals_the_definition[T65-H12.1-D8-R4-bfloat16]"),
    ),
    Mutation(
        "triton: words summed in 64 bits under x64",
        TRITON,
        "jnp.sum(words, axis=-1, dtype=jnp.int32)",
        "jnp.sum(words, axis=-1)",
        tests_of("positions", "test_positions_outside[triton-int64]"),
    ),
    Mutation(
        "the fused form of a single frequency with mRoPE",
        CONFIG,
        "(options.mrope_section is not None and options.rotary_dim > 2)",
        "options.mrope_section is not None",
        RECIPE,
    ),
    Mutation(
        "the fused form in float32",
        CONFIG,
        'options.rotary_dim > 2) or str(dtype) == "float32"',
        "options.rotary_dim > 2)",
        RECIPE,
    ),
    # The backward.
    Mutation(
        "xla backward: rotated forwards",
        REFERENCE,
        "_rotate(dout[..., :rotary_dim], cos, -sin)",
        "_rotate(dout[..., :rotary_dim], cos, sin)",
        GRADIENTS_OF_XLA,
    ),
    Mutation(
        "xla backward: the gate's cotangent before q's gradient",
        REFERENCE,
        "dq = jnp.concatenate([dq, cotangents.gate], axis=-1)",
        "dq = jnp.concatenate([cotangents.gate, dq], axis=-1)",
        GRADIENTS_OF_XLA,
    ),
    Mutation(
        "xla backward: 1/rms once too few",
        REFERENCE,
        "dx = inv_rms * (g - x32 * (inv_rms * inv_rms * jnp.mean(g * x32, axis=-1)[..., None]))",
        "dx = inv_rms * (g - x32 * (inv_rms * jnp.mean(g * x32, axis=-1)[..., None]))",
        GRADIENTS_OF_XLA,
    ),
    Mutation(
        "xla backward: no beta",
        REFERENCE,
        "g = dy * _over_rows(weight.astype(jnp.float32) + options.norm_beta, x)",
        "g = dy * _over_rows(weight.astype(jnp.float32), x)",
        tests_of("gradients", "test_every_mode_and_order"),
    ),
    Mutation(
        "triton backward: k's cotangent for v's",
        TRITON_VJP,
        "normalised, copied = (read.k, cotangents.k, written.k), (cotangents.v, written.v)",
        "normalised, copied = (read.k, cotangents.k, written.k), (cotangents.v and cotangents.k, written.v)",
        tests_of("kernel_forms", "test_a_form_has_the_bits_of_the_plain_one[triton-copied-packed-table]"),
    ),
    Mutation(
        "triton backward: the projection's sign",
        TRITON_VJP,
        "(inv_rms * (-1.0 / head_dim))",
        "(inv_rms * (1.0 / head_dim))",
        GRADIENTS_OF_TRITON,
    ),
    Mutation(
        "triton backward: the last step left out",
        TRITON_VJP,
        "own_steps = _div(num_steps - program + (programs - 1), programs)",
        "own_steps = _div(num_steps - program + (programs - 1), programs) - 1",
        GRADIENTS_OF_TRITON,
    ),
    Mutation(
        "triton backward: rows past the last divide by zero",
        TRITON_VJP,
        "one, zero = jnp.ones((), dq_ref.dtype), jnp.zeros((), dq_ref.dtype)",
        "one, zero = jnp.zeros((), dq_ref.dtype), jnp.zeros((), dq_ref.dtype)",
        tests_of("triton_vjp", "test_rows_past_the_last_add_nothing_even_without_eps"),
    ),
    Mutation(
        "triton backward: partial sums past the first tile left out",
        TRITON_VJP,
        "total = total + jnp.sum(partials, axis=0, keepdims=True)",
        "total = jnp.sum(partials, axis=0, keepdims=True)",
        tests_of("triton_vjp", "test_the_sum_of_many_partials"),
    ),
    Mutation(
        "triton backward: several warps, which sum through shared memory",
        TRITON_VJP,
        "compiler_params=plt.CompilerParams(num_warps=1, num_stages=1),",
        "compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),",
        tests_of(
            "triton_vjp", "test_every_case_is_lowered_for_cuda_to_two_kernels_without_a_gpu[T1-H16.2-D256-R64-bfloat16]"
        ),
    ),
    Mutation(
        "mosaic backward: the projection's sign",
        MOSAIC_VJP,
        "arith.mulf(inv_rms, _f32(-1 / head_dim))",
        "arith.mulf(inv_rms, _f32(1 / head_dim))",
        GRADIENTS_OF_MOSAIC,
    ),
    Mutation(
        "mosaic backward: a partner with its own sign",
        MOSAIC_VJP,
        "return [arith.xori(word, self.signs) for word in words]",
        "return words",
        GRADIENTS_OF_MOSAIC,
    ),
    Mutation(
        "mosaic backward: rows past the last count in the weights' gradients",
        MOSAIC_VJP,
        "return [*_select(exists, added, sums), *ahead]",
        "return [*added, *ahead]",
        GRADIENTS_OF_MOSAIC,
    ),
    Mutation(
        "mosaic backward: partial rows of warps that are not there",
        MOSAIC_VJP,
        "counts = arith.andi(_equal(takes_k, of_k), _below(other, q_warps + k_warps))",
        "counts = _equal(takes_k, of_k)",
        GRADIENTS_OF_MOSAIC,
    ),
    Mutation(
        "derivative: no psum over the axes that an input does not vary along",
        VJP,
        "return (lax.psum(gradient, tuple(axes)) if axes else gradient).astype(aval.dtype)",
        "return gradient.astype(aval.dtype)",
        tests_of("sharding", "test_gradients_inside_shard_map"),
    ),
    # Sharding and vmap.
    Mutation(
        "sharding: no psum of the weights' gradients",
        SHARDING,
        "(lax.psum(x, over) if over else x)",
        "x",
        tests_of("sharding", "test_tokens_and_heads[(4,2)-auto]"),
    ),
    Mutation(
        "sharding: the weights' gradients rounded before their sum",
        SHARDING,
        "exact = call._replace(options=dataclasses.replace(call.options, round_dweights=False))",
        "exact = call",
        tests_of("sharding", "test_tokens_and_heads[(4,2)-auto]"),
    ),
    Mutation(
        "sharding: psum over tokens alone",
        SHARDING,
        "sums = tokens + q_heads, tokens + k_heads",
        "sums = tokens, tokens",
        tests_of("sharding", "test_tokens_and_heads[(4,2)-auto]"),
    ),
    Mutation(
        "sharding: the factor of q_gate the other way round",
        SHARDING,
        'CompoundFactor("q", "half")',
        'CompoundFactor("half", "q")',
        tests_of("sharding", "test_tokens_and_heads[(4,2)-auto]"),
    ),
    Mutation(
        "sharding: k laid out as q is",
        SHARDING,
        '"q_gate": [q_heads], "k": [k_heads]}',
        '"q_gate": [q_heads], "k": [q_heads]}',
        tests_of("sharding", "test_tokens_and_heads[(4,2), k replicated-auto]"),
    ),
    Mutation(
        "sharding: padded tokens count in the weights' gradients",
        SHARDING,
        "mesh_axes if size % _num_parts(mesh, mesh_axes) == 0 else ()",
        "mesh_axes",
        tests_of("sharding", "test_tokens_that_do_not_divide"),
    ),
    Mutation(
        "sharding: a head cut across devices",
        CHECKS,
        "if num_heads % num_shards:",
        "if num_heads < num_shards:",
        tests_of("sharding", "test_a_head_cut_across_devices_is_refused"),
    ),
    Mutation(
        "vmap: results mapped where no argument is",
        SHARDING,
        "if any(dim is not None for dim in dims):",
        "if True:",
        tests_of("gradients", "test_every_mode_and_order[xla-T5-H3.2-D16-R8-float32-max_position=32-jacfwd]"),
    ),
    Mutation(
        "vmap: the batch in front of mRoPE's rows",
        SHARDING,
        'front = names.split().index("...")',
        "front = 0",
        tests_of("vmap", "test_vmap_of_vmap"),
    ),
    Mutation(
        "a sharded weight shards the other one",
        SHARDING,
        'shared.get(name) or [f"whole{next(numbers)}"]',
        "shared.get(name) or [name]",
        tests_of("sharding", "test_a_sharded_weight_is_gathered_alone"),
    ),
    Mutation(
        "vmap: unbatched arrays not broadcast",
        SHARDING,
        "batching.broadcast(x, axis.size, front, axis.explicit_mesh_axis)",
        "batching.broadcast(x, 1, front, axis.explicit_mesh_axis)",
        tests_of("vmap", "test_every_combination"),
    ),
    Mutation(
        "vmap: batched weights added to the leading axes",
        SHARDING,
        'return all(dim is None or "..." in x.split() for x, dim in zip(names, dims, strict=True))',
        'return any(dim is not None and "..." in x.split() for x, dim in zip(names, dims, strict=True))',
        tests_of("vmap", "test_every_combination"),
    ),
    Mutation(
        "the partitioner's call on platforms without it",
        SHARDING,
        'for platform in ("cpu", "cuda"):',
        'for platform in ("cpu", "cuda", "tpu"):',
        tests_of("sharding", "test_platforms_that_partition_plain_xla_themselves[auto-False-tpu]"),
    ),
    Mutation(
        "explicit axes left out of plain XLA's results",
        SHARDING,
        "function = compiler_partitioned(plain, [x.sharding for x in ctx.avals_out])",
        "function = plain",
        tests_of("sharding", "test_platforms_that_partition_plain_xla_themselves[explicit-False-tpu]"),
    ),
    Mutation(
        "reduced types inside shard_map pass",
        CHECKS,
        "if spec.reduced | spec.unreduced | manual.reduced | manual.unreduced:",
        "if spec.reduced | spec.unreduced:",
        tests_of("sharding", "test_reduced_and_unreduced_arrays_in_shard_map_are_refused"),
    ),
    # The choice, and what is refused.
    Mutation(
        "mosaic: the weights after the sum where every lane is rotated",
        CONFIG,
        "after_sum = num_rows >= 65536 and r < d",
        "after_sum = num_rows >= 65536",
        tests_of("choice", "test_rule_of_the_mosaic_gpu_kernel"),
    ),
    Mutation(
        "choice: a name falls back in silence",
        KERNEL,
        "elsewhere_xla=implementation is None",
        "elsewhere_xla=True",
        tests_of("choice", "test_a_gpu_name_on_another_platform_says_so"),
    ),
    Mutation(
        "choice: Triton on a GPU that is too old",
        TRITON,
        "if target.compute_capability < (8, 0):",
        "if target.compute_capability < (7, 0):",
        tests_of("choice", "test_an_old_gpu_gets_xla"),
    ),
    Mutation(
        "checks: sections that don't sum to R/2",
        CHECKS,
        "or min(section) < 0 or sum(section) != rotary_dim // 2:",
        "or min(section) < 0:",
        tests_of("errors", "test_bad_call"),
    ),
)


class Result(NamedTuple):
    mutation: Mutation
    verdict: str  # "caught", "SURVIVED", "DOES NOT FIT", "BROKEN" or "skipped"
    seconds: float
    detail: str = ""


def mutated(mutation: Mutation, text: str) -> str:
    """The file's text with the mutation."""
    if (count := text.count(mutation.old)) != 1:
        raise ValueError(f"{mutation.file} must hold the old text of {mutation.what!r} once, got it {count} times.")
    return text.replace(mutation.old, mutation.new)


def copy_of_the_tree(directory: str) -> pathlib.Path:
    tree = pathlib.Path(directory) / "tree"
    shutil.copytree(ROOT, tree, ignore=_LEFT_OUT)
    return tree


def run_tests(tree: pathlib.Path, tests: Iterable[str], *flags: str) -> tuple[int, str]:
    """pytest's exit code and what it prints."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--no-header", "-p", "no:cacheprovider", *flags, *tests]
    environment = os.environ | {
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # several may share a GPU
    }
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


@functools.cache
def has_gpu() -> bool:
    """Asked of a process of its own, which gives its memory back."""
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() == "gpu"


def try_mutation(mutation: Mutation) -> Result:
    start = time.monotonic()

    def result(verdict: str, detail: str = "") -> Result:
        return Result(mutation, verdict, time.monotonic() - start, detail)

    if mutation.needs_gpu and not has_gpu():
        return result("skipped", mutation.needs_gpu)
    with tempfile.TemporaryDirectory() as directory:
        tree = copy_of_the_tree(directory)
        file = tree / mutation.file
        try:
            file.write_text(mutated(mutation, file.read_text()))
        except ValueError as error:
            return result("DOES NOT FIT", str(error))
        code, output = run_tests(tree, mutation.tests, "-x")
    # 1: tests failed. Anything else is no test that ran: a name that is gone, code that can't be imported.
    return result({0: "SURVIVED", 1: "caught"}.get(code, "BROKEN"), "" if code == 1 else output[-1500:])


def fail_unchanged(mutations: Iterable[Mutation]) -> list[str]:
    """Those of the mutations' tests that fail on a copy without any mutation."""
    tests = {test: None for m in mutations if has_gpu() or not m.needs_gpu for test in m.tests}
    if not tests:
        return []  # named none, pytest would run all
    with tempfile.TemporaryDirectory() as directory:
        code, output = run_tests(copy_of_the_tree(directory), tests)
    failed = re.findall(r"^(?:FAILED|ERROR) (tests/\S+\.py(?:::[^\n]*?)?)(?: - |$)", output, re.MULTILINE)
    if code and not failed:
        sys.exit(f"the tests must run on the unchanged code, got\n{output[-1500:]}")
    return failed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="mutations whose name holds this text")
    parser.add_argument("--gpu", action="store_true", help="those alone that can't be seen without a GPU")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 2))
    arguments = parser.parse_args()
    mutations = [m for m in MUTATIONS if arguments.only in m.what and (m.needs_gpu or not arguments.gpu)]
    failed = fail_unchanged(mutations)

    def attempt(mutation: Mutation) -> Result:
        own = [test for test in failed if test.startswith(mutation.tests)]
        return Result(mutation, "BROKEN", 0.0, f"fails unchanged: {own[0]}") if own else try_mutation(mutation)

    results = []
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        for result in pool.map(attempt, mutations):
            results.append(result)
            print(f"{result.verdict:>12}  {result.seconds:5.0f} s  {result.mutation.what}", flush=True)
            if result.detail:
                print("              " + result.detail.strip().replace("\n", "\n              "), flush=True)
    counts = collections.Counter(result.verdict for result in results)
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    sys.exit(bool(counts.keys() - {"caught", "skipped"}))


if __name__ == "__main__":
    main()
