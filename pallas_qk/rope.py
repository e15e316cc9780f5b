"""Tables of cosines and sines from what Hugging Face configurations say about RoPE, and positions for mRoPE::

    inv_freq, attention_factor = rope.inv_frequencies(config["rope_parameters"], head_dim=256)
    cache = rope.cos_sin_cache(inv_freq, attention_factor, max_position=262144, dtype=jnp.bfloat16)

transformers multiplies positions and frequencies in float32, where an angle near 10^6 has steps of 0.06: over the
positions below 10^6 its angles of Qwen3.5 (rope_theta 1e7, rotary_dim 64) are off by up to 0.035, and by up to 0.009
below 262144. Here frequencies and angles are float64 and each table element is rounded once: at every position below
10^6 an angle is off by less than 1e-9, which no dtype of the table shows.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike, DTypeLike

from pallas_qk import _checks, _rope_kinds

# What every kind reads. A dict that has none of these says nothing of RoPE.
_COMMON_KEYS = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})

# 2 pi to 50 digits: at 64 bits of a turn float64's value would be off in its last bits.
_TURN = Fraction("6.2831853071795864769252867665590057683943387987502")

# Rows whose angles, cosines and sines are held in float64 at a time: 32 MiB each for rotary_dim 128.
_BLOCK_ROWS = 65536


def inv_frequencies(
    rope_parameters: Mapping[str, Any] | None,
    *,
    head_dim: int,
    sequence_length: int | None = None,
    layer_type: str | None = None,
    rope_theta: float | None = None,
    partial_rotary_factor: float | None = None,
    max_position_embeddings: int | None = None,
    original_max_position_embeddings: int | None = None,
) -> tuple[np.ndarray, float]:
    """Inverse frequencies, and the factor on cosine and sine, of a configuration's RoPE.

    Args:
      rope_parameters: the configuration's `rope_parameters`, or `rope_scaling` of older ones, as it is. None means
        `{}`. The kind is its `rope_type` or `type`: default (also mrope), linear, dynamic, yarn, llama3, longrope
        (also su) or proportional; keys that the kind doesn't read are ignored.
      head_dim: D, the configuration's head_dim; qk_rope_head_dim in DeepSeek's attention.
      sequence_length: the longest sequence that the table is for, prompt and answer. dynamic and longrope need it and
        choose other frequencies by it, the others ignore it. transformers takes the largest position seen so far, so
        its keys from before a change keep their old rotation.
      layer_type: which entry to read where `rope_parameters` holds one dict per layer type, such as Gemma 3's
        "full_attention" and "sliding_attention". It holds those where a dict inside it has rope_type, type, rope_theta
        or partial_rotary_factor and it has none of these itself. Any other dict inside it is a key that isn't read.
      rope_theta: the value that older configurations hold next to the dict. It is taken where the dict has none, and
        refused where the dict has another. Gemma 3's older form takes two calls: `rope_scaling` with rope_theta, and
        None with rope_theta=rope_local_base_freq.
      partial_rotary_factor: as rope_theta.
      max_position_embeddings: as rope_theta.
      original_max_position_embeddings: as rope_theta.

    Returns:
      float64 of shape (R/2,) in radians per position, where R = int(head_dim * partial_rotary_factor) is the op's
      rotary_dim (R = head_dim for proportional), and the factor, 1.0 except for yarn and longrope.

    Raises:
      ValueError: a value is missing, out of range, or given twice with two values; the kind or layer type is unknown.
      TypeError: a value has the wrong type.

    Semantics from:
      transformers 5.23.0, `modeling_rope_utils.ROPE_INIT_FUNCTIONS`; the models' own default; alpha of HunYuan's
      dynamic; short_mscale and long_mscale of PhiMoE's longrope. The formulas are evaluated in float64 instead of
      float32.

    Example:
      >>> inv_freq, attention_factor = inv_frequencies({"rope_theta": 1e4, "partial_rotary_factor": 0.25}, head_dim=32)
      >>> print(inv_freq, attention_factor)
      [1.    0.1   0.01  0.001] 1.0
    """
    parameters = _pick_layer_type(rope_parameters, layer_type)
    beside = {
        "rope_theta": rope_theta,
        "partial_rotary_factor": partial_rotary_factor,
        "max_position_embeddings": max_position_embeddings,
        "original_max_position_embeddings": original_max_position_embeddings,
    }
    for name, value in beside.items():
        held = parameters.get(name)
        if held is not None and value is not None and held != value:
            raise ValueError(
                f"{name} must have one value, got {held} in rope_parameters and {value} beside it. "
                "Leave the argument out for the first, or change the dict."
            )
        parameters[name] = value if held is None else held

    rope_type = parameters.get("rope_type") or parameters.get("type") or "default"
    kind = _rope_kinds.KINDS.get(_rope_kinds.ALIASES.get(rope_type, rope_type)) if isinstance(rope_type, str) else None
    if kind is None:
        names = ", ".join(repr(name) for name in (*_rope_kinds.KINDS, *_rope_kinds.ALIASES))
        raise ValueError(f"rope_type must be one of {names}, got {rope_type!r}. Compute its frequencies yourself.")
    _check_integer("head_dim", head_dim, 2)
    rotary_dim = int(head_dim * _rope_kinds.number(parameters, "partial_rotary_factor", 1.0))
    if kind is _rope_kinds.KINDS["proportional"]:
        parameters["rotary_dim"], rotary_dim = rotary_dim, head_dim
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            "the rotary_dim int(head_dim * partial_rotary_factor) must be a positive even integer <= head_dim, got "
            f"{rotary_dim} from head_dim={head_dim}. Check both against the configuration."
        )
    if sequence_length is not None:
        _check_integer("sequence_length", sequence_length, 1)
    return kind(parameters, rotary_dim, sequence_length)


def cos_sin_cache(
    inv_freq: np.ndarray, attention_factor: float = 1.0, *, max_position: int, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """The table of cosines and sines that the ops take.

    Args:
      inv_freq: (R/2,) radians per position, from `inv_frequencies`; NumPy, so that it can be float64.
      attention_factor: multiplied into cosine and sine.
      max_position: the number of rows: positions 0 to max_position - 1. The longest sequence is enough for text, for
        images and for videos whose frames are grids of their own (Qwen3-VL, Qwen3.5): no position reaches the number
        of tokens. A video with time in seconds can go beyond it. Its t frames of h*w tokens take
        max(h, w, 1 + (t - 1) * interval) positions, where interval is tokens_per_second * second_per_grid_ts in
        Qwen2.5-VL and position_id_per_seconds * second_per_grids in Qwen3-Omni. Their sum over the videos, plus the
        number of the other tokens, is enough. Qwen3-Omni has fractions there, which `cos_sin_rows` takes.
      dtype: float32, or the activations' dtype.

    Returns:
      (max_position, R), each row [cos | sin], on JAX's default device whatever mesh is set. Inside `jax.jit` it is a
      constant of the program: make it outside and pass it in.

    Raises:
      ValueError: a shape or value breaks a rule above.
      TypeError: a dtype does.

    Numerics:
      Angles, cosines and their product with the factor in float64 on the host, rounded to `dtype` once.

    Example:
      >>> print(np.asarray(cos_sin_cache(np.array([1.0, 0.5]), max_position=2)).round(3))
      [[1.    1.    0.    0.   ]
       [0.54  0.878 0.841 0.479]]
    """
    frequencies, factor = _check_frequencies(inv_freq, attention_factor)
    _check_integer("max_position", max_position, 1)
    out_dtype = _check_dtype(dtype)
    table = np.empty((max_position, 2 * len(frequencies)), out_dtype)
    for start in range(0, max_position, _BLOCK_ROWS):
        angles = np.arange(start, min(start + _BLOCK_ROWS, max_position))[:, None] * frequencies
        rows = np.concatenate([np.cos(angles), np.sin(angles)], axis=1) * factor
        table[start : start + len(rows)] = _round_once(rows, out_dtype)
    # jnp.asarray would lay it on the caller's mesh, and without that context the array would be traced.
    with jax.ensure_compile_time_eval():
        on_device: jax.Array = jax.device_put(table)
        return on_device


def cos_sin_rows(
    positions: ArrayLike,
    inv_freq: np.ndarray,
    attention_factor: float = 1.0,
    *,
    mrope_section: Sequence[int] | None = None,
    mrope_layout: str = "interleaved",
    dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """The rows that `cos_sin_cache` has at some positions, computed under `jax.jit` without a table.

    Args:
      positions: (...) or, exactly when `mrope_section` is given, (n, ...). Any integer or floating dtype, traced or
        not, below 2^32. A negative position marks padding: its row is that of position 0.
      inv_freq: as `cos_sin_cache` takes it; not traced.
      attention_factor: multiplied into cosine and sine.
      mrope_section: n counts that sum to R/2, of the frequencies that read each row of `positions`.
      mrope_layout: "interleaved": frequency j reads row a >= 1 where j % n == a and j < n * mrope_section[a], and row 0
        elsewhere (Qwen3-VL, Qwen3.5; NeoMME, n = 2). "sectioned": the first mrope_section[0] frequencies read row 0,
        the next mrope_section[1] read row 1, and so on (Qwen2-VL; vLLM's HunYuan-VL, n = 4). For n = 3 both are those
        of the ops.
      dtype: float32, or the activations' dtype.

    Returns:
      (..., R), each row [cos | sin]; NaN where a position that is read is 2^32 or more, infinite or NaN.

    Raises:
      ValueError: a shape or value breaks a rule above.
      TypeError: a dtype or type does.

    Numerics:
      A position counts in steps of 2^-32, rounded towards 0. The angle is a product of integers in 2^-64 turns, of
      which whole turns fall away exactly; its leading 32 bits go on, off by less than 6e-9 radians for integers of any
      frequency and for fractions below one turn per position. Then float32: at every position an element is within
      2e-7 of the exact one, times the factor (9e-8 measured on a CPU), so not always equal to the table's in the last
      bit. To a derivative positions are constants.

    Example:
      >>> print(np.asarray(cos_sin_rows([1, 10**9], np.array([1.0, 0.5]))).round(3))
      [[ 0.54   0.878  0.841  0.479]
       [ 0.838 -0.959  0.546 -0.285]]
      >>> print(np.asarray(cos_sin_rows([[8.5], [2], [3]], np.array([1.0, 0.5]), mrope_section=(1, 1, 0))).round(3))
      [[-0.602  0.54   0.798  0.841]]
    """
    frequencies, factor = _check_frequencies(inv_freq, attention_factor)
    out_dtype = _check_dtype(dtype)
    if not isinstance(positions, jax.Array):
        positions = np.asarray(positions)  # not JAX's, which would narrow 64-bit positions
    if not (jnp.issubdtype(positions.dtype, jnp.integer) or jnp.issubdtype(positions.dtype, jnp.floating)):
        got = positions.dtype
        raise TypeError(f"positions must have an integer or floating dtype, got {got}. Cast them with astype.")
    reads = _check_mrope(mrope_section, mrope_layout, len(frequencies), positions.shape)

    rows: jax.Array = _rows(
        _split(positions) if isinstance(positions, np.ndarray) else positions,
        tuple(map(float, frequencies)),
        factor,
        None if reads is None else tuple(map(int, reads)),
        out_dtype,
    )
    return rows


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))  # over a mesh XLA compiles each eager operation anew
def _rows(
    positions: jax.Array | tuple[Any, Any, Any],
    frequencies: tuple[float, ...],
    factor: float,
    reads: tuple[int, ...] | None,
    out_dtype: np.dtype,
) -> jax.Array:
    """`cos_sin_rows` of positions, or of what `_split` makes of them."""
    whole, fraction, exists = positions if isinstance(positions, tuple) else _split(positions)
    turn = _turns(frequencies, *(_of_each_frequency(x, reads) for x in (whole, fraction) if x is not None))
    quarter = (turn + 2**29) >> 30  # the nearest quarter turn, 0 to 4; the sum wraps: 4 is 0
    angle = (turn - (quarter << 30)).astype(jnp.int32).astype(jnp.float32) * np.float32(2 * math.pi / 2**32)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    odd = quarter % 2 == 1
    cos, sin = jnp.where(odd, sin, cos), jnp.where(odd, cos, sin)
    cos = jnp.where((quarter == 1) | (quarter == 2), -cos, cos)
    sin = jnp.where(quarter >= 2, -sin, sin)
    exists = _of_each_frequency(exists, reads)
    cos, sin = (jnp.where(exists, x * np.float32(factor), np.float32(np.nan)) for x in (cos, sin))
    return jnp.concatenate([cos, sin], axis=-1).astype(out_dtype)


def mrope_positions(
    segments: Sequence[int | tuple[int, int, int] | list[int] | np.ndarray], *, start: int = 0
) -> tuple[np.ndarray, int]:
    """Positions of one sequence of text, images and video frames, for mRoPE.

    Args:
      segments: the sequence in order. An int is a run of that many text tokens; (t, h, w) is a grid of t*h*w vision
        tokens after the spatial merge: a processor's `image_grid_thw` with h and w divided by spatial_merge_size.
        Qwen3-VL and Qwen3.5 write a timestamp before each frame, so a video of t frames is t segments (1, h, w)
        with the text between them.
      start: the first position; the `next_position` of what the KV cache holds already.

    Returns:
      - `positions`, int32 of shape (3, T), rows time, height and width. Text has three equal rows; a grid counts its
        frames, rows and columns from the position where it starts, and what follows it continues max(h, w) later.
      - `next_position`, one more than the largest, where all three rows go on for the first generated token.
        transformers' rope delta is next_position - T.

    A padded batch: pad each sequence and stack, `np.stack([np.pad(p, ((0, 0), (0, S - p.shape[1]))) for p in ...], 1)`
    is (3, B, S) padded on the right, and (S - p.shape[1], 0) pads on the left. 0 is what transformers gives padding.

    Raises:
      ValueError: a length, a size or `start` is out of range.
      TypeError: a segment is neither an int nor three ints.

    Semantics from:
      transformers 5.23.0, `get_rope_index` of Qwen3-VL and Qwen3.5. Qwen2.5-VL's time in seconds isn't covered.

    Example:
      >>> positions, next_position = mrope_positions([2, (1, 2, 3), 1])
      >>> print(positions, next_position)
      [[0 1 2 2 2 2 2 2 5]
       [0 1 2 2 2 3 3 3 5]
       [0 1 2 3 4 2 3 4 5]] 6
    """
    _check_integer("start", start, 0)
    parts = [np.zeros((3, 0), np.int64)]
    at = start = operator.index(start)
    for segment in map(_check_segment, segments):
        if isinstance(segment, int):
            parts.append(np.broadcast_to(np.arange(at, at + segment), (3, segment)))
            at += segment
        else:
            parts.append(at + np.indices(segment).reshape(3, -1))
            at += max(segment[1:])
    positions = np.concatenate(parts, axis=1)
    next_position = int(positions.max(initial=start - 1)) + 1
    if next_position > 2**31 - 1:
        raise ValueError(f"positions must fit int32, got {next_position} as the next one. Start at a lower position.")
    return positions.astype(np.int32), next_position


def _split(positions: jax.Array | np.ndarray) -> tuple[Any, Any, Any]:
    """Whole parts, fractions in 2^-32 or None for integers, both uint32, and whether a position is finite and < 2^32.

    A negative position counts as 0. NumPy's arrays are split on the host: JAX may not have their 64 bits.
    """
    xp = np if isinstance(positions, np.ndarray) else jnp
    floating = jnp.issubdtype(positions.dtype, jnp.floating)
    if positions.dtype.itemsize < 4:
        positions = positions.astype(np.float32 if floating else np.int32)  # float16 ends below 2^32
    if not floating:
        positions = xp.maximum(positions, 0)
        whole = positions.astype(np.uint32)
        return whole, None, whole.astype(positions.dtype) == positions
    exists = (positions > -np.inf) & (positions < 2.0**32)
    positions = xp.where(exists & (positions > 0), positions, 0.0)
    whole = xp.floor(positions)
    return whole.astype(np.uint32), ((positions - whole) * 2.0**32).astype(np.uint32), exists


def _of_each_frequency(x: jax.Array | np.ndarray, reads: tuple[int, ...] | None) -> jax.Array:
    """x (...) as (..., 1), or of x (n, ...) the row that each frequency reads, (..., R/2)."""
    x = jnp.asarray(x)
    if reads is None:
        return x[..., None]
    row_of_each = np.reshape(reads, (1,) * (x.ndim - 1) + (-1,))
    picked = x[0][..., None]
    for row in range(1, x.shape[0]):
        picked = jnp.where(row_of_each == row, x[row][..., None], picked)
    return picked


def _turns(frequencies: Sequence[float], whole: jax.Array, fraction: jax.Array | None = None) -> jax.Array:
    """What frequency times position has beyond whole turns, uint32 (..., R/2) in 2^-32 turns."""
    steps = [round(Fraction(float(f)) / _TURN * 2**64) for f in frequencies]  # per position, in 2^-64 turns
    coarse = [(step + 2**31) >> 32 for step in steps]  # in 2^-32 turns

    def constant(numbers: list[int]) -> np.ndarray:
        return np.array([x & 0xFFFFFFFF for x in numbers], np.uint32).reshape((1,) * (whole.ndim - 1) + (-1,))

    turn = whole * constant([step >> 32 for step in steps]) + _upper_half(whole, constant(steps))
    if fraction is not None:
        turn = turn + _upper_half(fraction, constant(coarse)) + fraction * constant([x >> 32 for x in coarse])
    return turn


def _upper_half(x: jax.Array, y: np.ndarray) -> jax.Array:
    """Bits 32 to 63 of x * y, uint32, of four products of 16 by 16 bits."""
    x_high, x_low, y_high, y_low = x >> 16, x & 0xFFFF, y >> np.uint32(16), y & np.uint32(0xFFFF)
    middle = x_high * y_low + (x_low * y_low >> 16)
    rest = x_low * y_high + (middle & 0xFFFF)
    return x_high * y_high + (middle >> 16) + (rest >> 16)


def _pick_layer_type(rope_parameters: Mapping[str, Any] | None, layer_type: str | None) -> dict[str, Any]:
    """A copy of the dict, or of its entry for the layer type where it holds one dict each."""
    if rope_parameters is None:
        rope_parameters = {}
    if not isinstance(rope_parameters, Mapping):
        raise TypeError(
            f"rope_parameters must be a dict or None, got {rope_parameters!r:.80}. "
            "Pass the configuration's rope_parameters or rope_scaling."
        )
    for name, more in (("rope_parameters", ""), ("rope_scaling", ' and rope_theta=config["rope_theta"]')):
        if isinstance(rope_parameters.get(name), Mapping):
            raise ValueError(
                f"rope_parameters must be the dict of a configuration's RoPE, got a dict with {name}, as a whole "
                f'configuration has it. Pass config["{name}"]{more}.'
            )
    entries = {name: value for name, value in rope_parameters.items() if isinstance(value, Mapping)}
    says_rope = any(not _COMMON_KEYS.isdisjoint(entry) for entry in entries.values())
    has_layer_types = says_rope and _COMMON_KEYS.isdisjoint(rope_parameters)
    if layer_type is None and not has_layer_types:
        return dict(rope_parameters)
    if layer_type not in list(entries):
        names = f"one of {list(entries)}" if has_layer_types else "None for rope_parameters without layer types"
        raise ValueError(
            f"layer_type must be {names}, got {layer_type!r}. "
            "Pass the name of the entry to read, if rope_parameters holds one dict per layer type."
        )
    return dict(entries[layer_type])


def _check_integer(name: str, value: Any, least: int) -> None:
    _checks.check_static_integer(name, value)
    if operator.index(value) < least:
        raise ValueError(f"{name} must be at least {least}, got {value}. Pass a larger one.")


def _check_segment(segment: Any) -> int | tuple[int, ...]:
    """A number of text tokens or a grid, in Python ints."""
    rule = "a segment must be a number of text tokens >= 0 or a grid (t, h, w) of integers >= 1"
    remedy = "Of image_grid_thw, divide h and w by spatial_merge_size with //."
    is_grid = isinstance(segment, list | tuple) or (isinstance(segment, np.ndarray) and segment.ndim == 1)
    sizes = tuple(segment) if is_grid else (segment,)
    if len(sizes) != (3 if is_grid else 1) or not all(map(_checks.is_integer, sizes)):
        raise TypeError(f"{rule}, got {segment!r:.80}. {remedy}")
    if min(sizes) < is_grid:
        raise ValueError(f"{rule}, got {segment}. {remedy}")
    sizes = tuple(map(operator.index, sizes))
    return sizes if is_grid else sizes[0]


def _check_frequencies(inv_freq: np.ndarray, attention_factor: float) -> tuple[np.ndarray, float]:
    remedy = "Pass both results of inv_frequencies."
    if not isinstance(inv_freq, np.ndarray) or inv_freq.dtype.kind != "f":
        raise TypeError(f"inv_freq must be a NumPy array of floats, got {_checks.describe(inv_freq)}. {remedy}")
    if inv_freq.ndim != 1 or not inv_freq.size or not np.isfinite(inv_freq).all():
        raise ValueError(
            f"inv_freq must have shape (rotary_dim // 2,) and be finite, got {inv_freq!r:.80} of shape "
            f"{inv_freq.shape}. {remedy}"
        )
    return inv_freq.astype(np.float64), _rope_kinds.number({"attention_factor": attention_factor}, "attention_factor")


def _check_mrope(
    mrope_section: Sequence[int] | None, mrope_layout: str, num_frequencies: int, shape: tuple[int, ...]
) -> np.ndarray | None:
    """None, or the row of positions that each frequency reads, (R/2,)."""
    _checks.check_mrope_layout(mrope_layout)
    if mrope_section is None:
        return None
    rule = f"mrope_section must be integers >= 0 that sum to len(inv_freq) = {num_frequencies}"
    remedy = "Pass how many frequencies read each row of positions, such as (11, 11, 10) for 32 frequencies."
    if not isinstance(mrope_section, list | tuple) or not all(map(_checks.is_integer, mrope_section)):
        raise TypeError(f"{rule}, got {mrope_section!r:.80}. {remedy}")
    section = [operator.index(count) for count in mrope_section]
    if min(section, default=0) < 0 or sum(section) != num_frequencies:
        raise ValueError(f"{rule}, got {section}. {remedy}")
    if shape[:1] != (len(section),):
        raise ValueError(
            f"positions must have shape ({len(section)}, ...), a row for each count of mrope_section, got {shape}. "
            "Stack the rows on the first axis, or leave mrope_section out for a single row."
        )
    if mrope_layout == "sectioned":
        return np.repeat(np.arange(len(section)), section)
    frequency = np.arange(num_frequencies)
    row = frequency % len(section)
    return np.where(frequency < len(section) * np.array(section)[row], row, 0)


def _check_dtype(dtype: DTypeLike) -> np.dtype:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in ("float16", "bfloat16", "float32"):
        raise TypeError(f"dtype must be float16, bfloat16 or float32, got {dtype!r}. The ops take no other tables.")
    return found


def _round_once(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """float64 to the nearest of `dtype`, where NumPy's cast to bfloat16 goes by float32 and rounds twice."""
    if dtype != jnp.bfloat16:
        return values.astype(dtype)
    nearest = values.astype(np.float32)
    below = np.where(abs(nearest) > abs(values), np.nextafter(nearest, np.float32(0)), nearest)
    sticky = (below != values).astype(np.uint32)  # float32 has bits to spare: the last one says "and a bit more"
    bits: np.ndarray = below.view(np.uint32) | sticky
    return bits.view(np.float32).astype(dtype)
