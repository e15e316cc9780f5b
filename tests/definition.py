"""The op by its definition in float64 NumPy, row by row of the formula, with the error that rounding may add.

Knows nothing of the implementations: no tiles, no tree, no masks. `tests/gradients.py` has its gradients.
"""

import dataclasses

import numpy as np

from tests.cases import Case, Inputs
from tests.compare import assert_same, assert_within
from tests.tolerances import ROUNDOFF, SMALLEST


@dataclasses.dataclass(frozen=True)
class Defined:
    """float64 outputs, (T, heads*D), and for q_out and k_out the bound on a correct implementation's error."""

    q_out: np.ndarray
    k_out: np.ndarray
    gate_out: np.ndarray
    q_bound: np.ndarray
    k_bound: np.ndarray


def mrope_axis(frequency: int, mrope_section: tuple[int, int, int], mrope_layout: str = "interleaved") -> int:
    """The row of positions that a frequency reads: interleaved time, height, width, time, … or one block each."""
    if mrope_layout == "sectioned":
        return [axis for axis, count in enumerate(mrope_section) for _ in range(count)][frequency]
    axis = frequency % 3
    return axis if axis and frequency < 3 * mrope_section[axis] else 0


def axes(case: Case) -> list[int]:
    """The row of positions that each frequency reads."""
    half = case.rotary_dim // 2
    if case.mrope_section is None:
        return [0] * half
    return [mrope_axis(frequency, case.mrope_section, case.mrope_layout) for frequency in range(half)]


def lanes_in_halves(case: Case) -> np.ndarray:
    """The lane that each place holds where partners are put R/2 apart."""
    rotated = np.arange(case.rotary_dim)
    if case.rotation == "pairs":
        rotated = rotated.reshape(-1, 2).T.ravel()
    return np.concatenate([rotated, np.arange(case.rotary_dim, case.head_dim)])


def define(case: Case, inputs: Inputs) -> Defined:
    """Positions must lie inside the table."""
    q_gate, k, q_weight, k_weight, cache, _ = inputs.map(lambda x: np.asarray(x).astype(np.float64))
    half = case.rotary_dim // 2
    cos, sin = np.empty((case.num_tokens, half)), np.empty((case.num_tokens, half))
    for frequency, axis in enumerate(axes(case)):
        rows = np.atleast_2d(np.asarray(inputs.positions)).astype(np.int64)[axis]
        cos[:, frequency], sin[:, frequency] = cache[rows, frequency], cache[rows, half + frequency]

    q_and_gate = q_gate.reshape(case.num_tokens, case.num_q_heads, 2, case.head_dim)
    k = k.reshape(case.num_tokens, case.num_kv_heads, case.head_dim)
    q_out, q_bound = _norm_and_rope(case, q_and_gate[:, :, 0], q_weight, cos[:, None], sin[:, None])
    k_out, k_bound = _norm_and_rope(case, k, k_weight, cos[:, None], sin[:, None])
    flat = [x.reshape(case.num_tokens, -1) for x in (q_out, k_out, q_and_gate[:, :, 1], q_bound, k_bound)]
    return Defined(*flat)


def _norm_and_rope(case: Case, x, weight, cos, sin):
    lanes = lanes_in_halves(case)
    x, weight = x[..., lanes], weight[lanes] + case.norm_beta  # in halves: the norm doesn't ask where its lanes lie
    # What lies between norm and rotation is rounded to the activations' dtype (relative error u), then out is; the
    # float32 arithmetic adds at most 16 float32 roundoffs of the terms' size: the tree's 9 additions halved by the
    # root, rsqrt 4, products and rotation. rsqrt's float32 argument keeps eps only to its own roundoff, part of the 16.
    roundoff, steps = ROUNDOFF[case.dtype], 16 * ROUNDOFF["float32"]
    round_trip = roundoff if case.dtype != "float32" and case.round_norm else 0.0
    if case.norm_order == "rotation_first" and case.rotary_dim:
        z, size = _rotate(case, x, cos, sin)
        factor = weight / np.sqrt(np.mean(z * z, axis=-1, keepdims=True) + case.eps)
        # The mean of squares is of what was rounded: an eighth of the largest error covers it.
        rounding = round_trip * (abs(z) + np.max(abs(z)) / 8) + 2 * SMALLEST[case.dtype] * (round_trip > 0)
        out, before_out = z * factor, (rounding + 1.25 * steps * size) * abs(factor)
    else:
        y = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + case.eps) * weight
        out, size = _rotate(case, y, cos, sin)
        before_out = (round_trip + steps) * size
    bound = (1 + roundoff) * before_out + roundoff * abs(out) + 3 * SMALLEST[case.dtype]
    places = np.argsort(lanes)
    return out[..., places], bound[..., places]


def _rotate(case: Case, x, cos, sin) -> tuple[np.ndarray, np.ndarray]:
    """x, whose partners lie R/2 apart, rotated, and the size of the terms."""
    half, rotary_dim = case.rotary_dim // 2, case.rotary_dim
    x1, x2, rest = x[..., :half], x[..., half:rotary_dim], x[..., rotary_dim:]
    rotated = np.concatenate([x1 * cos - x2 * sin, x1 * sin + x2 * cos, rest], axis=-1)
    sizes = abs(x1 * cos) + abs(x2 * sin), abs(x1 * sin) + abs(x2 * cos), abs(rest)
    return rotated, np.concatenate(sizes, axis=-1)


def assert_defined(got, case: Case, inputs: Inputs) -> None:
    """q_out, k_out and gate_out, (T, heads*D): the former within their bounds, the gate in bits."""
    q_out, k_out, gate_out = got
    assert q_out.dtype == k_out.dtype == case.dtype, (q_out.dtype, k_out.dtype)
    want = define(case, inputs)
    assert_within("q_out", q_out, want.q_out, want.q_bound)
    assert_within("k_out", k_out, want.k_out, want.k_bound)
    gate = inputs.q_gate.reshape(case.num_tokens, case.num_q_heads, 2, case.head_dim)[:, :, 1]
    assert_same({"gate_out": gate_out}, {"gate_out": gate.reshape(gate_out.shape)})
