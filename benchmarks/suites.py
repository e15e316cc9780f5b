"""The cases of each command."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from tests import fp8
from tests.cached import AXES, CachedCase
from tests.cases import Case

HEADS = ((16, 2), (32, 2))
INTERLEAVED = (11, 11, 10)  # Qwen3.5's mrope_section for R = 64

# Query and key heads of gated attention: Qwen3.5 0.8B and 2B; 4B and 9B; 27B; 35B-A3B, as Qwen3-Next-80B-A3B; 122B and
# 397B; the flash variant.
MODEL_HEADS = ((8, 2), (16, 4), (24, 4), (16, 2), (32, 2), (24, 2))


def size_heads() -> tuple[tuple[int, int], ...]:
    """The heads of every model and of one device's share of it, over 2, 4 and 8 devices; key heads are repeated."""
    shares = [(q // ways, max(1, kv // ways)) for q, kv in MODEL_HEADS for ways in (1, 2, 4, 8)]
    return tuple(sorted(set(shares), reverse=True))


class Suite(NamedTuple):
    """What is timed by default: operations (the keys of `operations.OPERATIONS`), tokens, heads and dimensions."""

    ops: tuple[str, ...]
    tokens: tuple[int, ...]
    heads: tuple[tuple[int, int], ...] = HEADS
    head_dim: int = 256
    rotary_dim: int = 64


SUITES = {
    "forward": Suite(("forward",), (1, 16, 64, 256, 1024, 4096, 16384, 65536)),
    "decode": Suite(("forward",), (1, 2, 4, 8, 16, 32, 64, 128, 256)),
    "prefill": Suite(("forward",), (512, 1024, 2048, 4096, 16384, 65536, 262144, 1048576)),
    "backward": Suite(("backward",), (64, 256, 1024, 4096, 16384, 65536)),
    "sizes": Suite(("forward",), (1, 256, 16384), size_heads()),
    "options": Suite(
        (
            "forward",
            "forward_pairs",
            "forward_unrounded_norm",
            "forward_rotation_first",
            "forward_no_table",
            "forward_float32_table",
            "forward_no_weights",
            "forward_v_norm",
        ),
        (64, 1024, 16384),
        ((16, 2),),
    ),
    "block": Suite(
        ("gate_in_place", "block", "block_backward", "block_packed", "block_packed_backward"), (64, 1024, 16384)
    ),
    "projection": Suite(("projection",), (64, 256, 1024, 4096, 16384)),
    "projection_cache": Suite(("projection_cache", "projection_cache_fp8"), (64, 256, 1024, 4096, 16384)),
    # The heads of Qwen3-4B and 8B; of 0.6B and 1.7B; of 32B.
    "qwen3": Suite(
        ("forward_no_gate", "backward_no_gate"),
        (1, 16, 64, 256, 1024, 4096, 16384, 65536),
        ((32, 8), (16, 8), (64, 8)),
        head_dim=128,
        rotary_dim=128,
    ),
    "kv_cache": Suite(
        ("kv_cache", "kv_cache_gate_in_place", "kv_cache_fp8", "kv_cache_fp8_gate_in_place"),
        (1, 16, 64, 256, 1024, 4096, 16384, 65536),
    ),
}


class Task(NamedTuple):
    """One line of a suite: a case and what is done with it."""

    suite: str
    op: str
    case: Case


def timed(
    names: Sequence[str] = ("forward",),
    tokens: Sequence[int] | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
    head_dim: int | None = None,
    rotary_dim: int | None = None,
    dtype: str = "bfloat16",
) -> list[Task]:
    """The tasks of some suites: every operation and head count, small batches first. None is the suite's own."""
    return [
        Task(name, op, Case(num_tokens, *of_heads, head_dim or suite.head_dim, rotary_dim or suite.rotary_dim, dtype))
        for name in names
        for suite in [SUITES[name]]
        for op, of_heads, num_tokens in itertools.product(suite.ops, heads or suite.heads, tokens or suite.tokens)
    ]


# The forms of a call that `tune` takes.
TUNED_FORMS: dict[str, dict[str, Any]] = {
    "gate": {},
    "gate_in_place": {"gate": "in_place"},
    "no_gate": {"gate": None},
    "packed": {"packed": True},
    "packed_gate_in_place": {"packed": True, "gate": "in_place"},
    "packed_no_gate": {"packed": True, "gate": None},
}


def tuned(
    form: str,
    tokens: Sequence[int] | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
    head_dim: int | None = None,
    rotary_dim: int | None = None,
    dtype: str = "bfloat16",
) -> list[Case]:
    """The cases of `tune`."""
    return [
        Case(num_tokens, *of_heads, head_dim or 256, rotary_dim or 64, dtype, **TUNED_FORMS[form])
        for of_heads, num_tokens in itertools.product(heads or HEADS[:1], tokens or (64, 1024, 16384))
    ]


def compiled() -> list[Case]:
    """The cases of the suite `compile`: Qwen3.5, plain QK-norm, and rotary dimensions that leave odd tiles."""
    return [
        Case(1024),
        Case(1024, head_dim=128, rotary_dim=128),
        Case(1024, mrope_section=INTERLEAVED),
        Case(1024, head_dim=80, rotary_dim=40),
        Case(1024, rotary_dim=6),
        Case(1024, rotary_dim=2),
    ]


def parity_gpu() -> list[Case]:
    """The cases of `verify` on a GPU: D, R, heads, T, dtypes, mRoPE and norm_beta, options, 3.5e9 elements in all.

    Four large cases hold most of the elements; the small ones are there for their shapes. R = 6, 20, 24 and 40 leave
    tiles of 1, 2 and 4 lanes.
    """
    f16, bf16, f32 = "float16", "bfloat16", "float32"
    small = [
        Case(1),
        Case(1, 1, 1, 64, 64, f16),
        Case(2, 3, 1, 64, 32),
        Case(37, 5, 2, 64, 16, f16),
        Case(37, 1, 3, 80, 80),
        Case(127, 3, 1, 80, 40, f16, cache_dtype=f32),
        Case(129, 12, 2, 80, 20),
        Case(128, 12, 2, 96, 96, f16),
        Case(129, 24, 4, 96, 48, cache_dtype=f32),
        Case(37, 5, 2, 96, 24, f16, weight_dtype=f32),
        Case(127, 24, 4, 128, 128),
        Case(129, 1, 3, 128, 64, f16, mrope_section=INTERLEAVED, norm_beta=1.0),
        Case(128, 5, 2, 128, 32, weight_dtype=f32, cache_dtype=f32),
        Case(2, 12, 2, 192, 192, f16),
        Case(129, 3, 1, 192, 96, weight_dtype=f32),
        Case(37, 24, 4, 192, 48, f16, norm_beta=1.0),
        Case(128, 1, 1, 256, 6),
        Case(2, 16, 2, 256, 64, mrope_section=INTERLEAVED),
        Case(37, 16, 2, 256, 64, f16, scale=1e4),
        Case(127, 8, 2, 256, 64, f16, weight_scale=1e-5),
        Case(65, 12, 1, 8, 4, f16),
        Case(4095, 5, 2, 64, 2, f16, cache_dtype=f32, mrope_section=(0, 1, 0)),
        Case(129, 3, 1, 512, 128, norm_beta=1.0),
        Case(129, 5, 2, 128, 64, f16, weight_dtype=bf16, cache_dtype=bf16),
        Case(127, 3, 1, 96, 48, weight_dtype=f16, cache_dtype=f16, mrope_section=(8, 8, 8)),
    ]
    large = [
        Case(4096, 16, 2, 256, 64, f16, mrope_section=(16, 8, 8), cache_dtype=f32),
        Case(4096, 24, 4, 256, 128, mrope_section=(24, 20, 20), norm_beta=1.0, weight_dtype=f32),
        Case(4096, 12, 2, 256, 256, f16, cache_dtype=f32),
        Case(4096, 16, 2, 512, 512),
        Case(4096, 5, 2, 512, 256, f16),
        Case(4096, 24, 4, 80, 80, cache_dtype=f32),
        Case(4096, 12, 2, 80, 40, f16),
        Case(4096, 3, 1, 64, 32),
        Case(4096, 24, 4, 192, 96, f16, mrope_section=(16, 16, 16)),
        Case(65536, 32, 2),
        Case(65536, 16, 2, dtype=f16, mrope_section=INTERLEAVED, norm_beta=1.0),
        Case(65536, 16, 2, cache_dtype=f32, weight_dtype=f32),
        Case(65536, 16, 4, 128, 128, f16, cache_dtype=f32),
        Case(4096, 32, 8, 128, 128, gate=None),
        Case(4096, 8, 2, 512, 512, f16, gate=None, rotation="pairs"),
    ]
    float32 = [
        Case(129, 5, 2, 80, 40, f32),
        Case(37, 3, 1, 65, 6, f32),  # a pair of lanes lies in two threads
        Case(129, 4, 2, 32, 16, f32),
        Case(1025, 5, 2, 96, 96, f32, norm_beta=1.0),
        Case(2048, 4, 2, 512, 128, f32),
        Case(4096, 8, 2, 128, 64, f32),
        Case(4096, 16, 2, 256, 64, f32),
        Case(4096, 16, 2, 256, 64, f32, mrope_section=INTERLEAVED, norm_beta=1.0),
        Case(4096, 16, 2, 256, 64, f32, weight_dtype=bf16, cache_dtype=bf16),
        Case(1025, 5, 2, 128, 128, f32, weight_dtype=f16, cache_dtype=f16, mrope_section=(24, 20, 20)),
        Case(1025, 3, 1, 80, 40, f32, weight_dtype=bf16, cache_dtype=f16),
    ]
    options = [
        Case(1, 3, 1, 64, 32, rotation="pairs"),
        Case(129, 5, 2, 80, 40, f16, rotation="pairs"),
        Case(127, 3, 1, 96, 6, rotation="pairs", norm_beta=1.0),
        Case(128, 12, 2, 128, 128, f16, cache_dtype=f32, rotation="pairs", gate="in_place"),
        Case(1025, 5, 2, 512, 128, rotation="pairs", mrope_section=(24, 20, 20), weight_dtype=f32),
        Case(4096, 16, 2, rotation="pairs"),
        Case(4096, 16, 2, dtype=f16, rotation="pairs", mrope_section=INTERLEAVED, negated_sines=True),
        Case(129, 5, 2, 80, 80, f32, rotation="pairs", mrope_section=(14, 13, 13), cache_dtype=bf16),
        Case(1025, 5, 2, 96, 6, f32, rotation="pairs"),
        Case(1025, 8, 2, 128, 128, f32, rotation="pairs", cache_dtype=f16, gate="in_place"),
        Case(2048, 4, 2, 512, 128, f32, rotation="pairs"),
        Case(2, 3, 1, 64, 32, f16, round_norm=False),
        Case(129, 5, 2, 80, 40, round_norm=False),
        Case(127, 3, 1, 96, 6, f16, round_norm=False, cache_dtype=f32),
        Case(128, 12, 2, 128, 128, round_norm=False, gate="in_place"),
        Case(1025, 5, 2, 512, 128, f16, round_norm=False, mrope_section=(24, 20, 20)),
        Case(4096, 16, 2, round_norm=False, mrope_section=INTERLEAVED, norm_beta=1.0),
        Case(4096, 16, 2, dtype=f16, round_norm=False, cache_dtype=f32, attention_factor=1.1386294361119891),
        Case(1025, 8, 2, dtype=f32, round_norm=False),
        Case(129, 5, 2, 96, 6, rotation="pairs", round_norm=False),
        Case(4096, 12, 2, 128, 128, f16, rotation="pairs", round_norm=False, mrope_section=(24, 20, 20)),
        Case(2048, 16, 2, rotation="pairs", round_norm=False, cache_dtype=f32),
        Case(1025, 3, 1, 80, 40, f32, rotation="pairs", round_norm=False, mrope_section=(8, 6, 6)),
        Case(129, 5, 2, 80, 0, f16, weight_dtype=f32),
        Case(127, 3, 1, 65, 0, f32, norm_beta=1.0),
        Case(2048, 4, 2, 512, 0),
        Case(4096, 16, 2, rotary_dim=0, gate="in_place"),
        Case(129, 5, 2, 64, 32, f16, norm_order="rotation_first", attention_factor=1.1386294361119891),
        Case(127, 3, 1, 96, 6, rotation="pairs", norm_order="rotation_first"),
        Case(1025, 8, 2, 128, 128, f32, norm_order="rotation_first", round_norm=False),
        Case(2048, 4, 2, 512, 512, norm_order="rotation_first", cache_dtype=f32),
        Case(4096, 16, 2, dtype=f16, norm_order="rotation_first", round_norm=False, mrope_section=INTERLEAVED),
        Case(4096, 16, 2, norm_order="rotation_first", weight_dtype=f32, norm_beta=1.0),
        Case(4096, 12, 2, 80, 40, norm_order="rotation_first"),
        Case(4096, 8, 2, 8, 4, norm_order="rotation_first", round_norm=False),
        Case(1025, 8, 2, 24, 24, f16, norm_order="rotation_first", round_norm=False),
        Case(1025, 5, 2, 32, 16, f32, norm_order="rotation_first"),
        Case(129, 5, 2, 128, 64, f16, weights=False, mrope_section=INTERLEAVED),
        Case(4096, 16, 2, weights=False),
        Case(1025, 3, 1, 80, 40, f32, weights=False, gate="in_place"),
        Case(127, 3, 2, 128, 64, q_alone=True),
        Case(4096, 16, 2, dtype=f16, q_alone=True, weights=False),
        Case(1025, 5, 2, 512, 512, f32, q_alone=True, rotation="pairs"),
    ]
    return small + large + float32 + options


def parity_cached_gpu() -> list[CachedCase]:
    """The calls of `verify` on a GPU that write a KV cache; in each, tokens without a slot of every kind.

    Every layout from separate arrays and from a packed one, and every gate, in the activations' dtype and in 8 bits.
    Where the cache has another dtype, plain XLA promises bits too. Where it promises none of k and the cache has 8
    bits, k is a result, which says where codes may differ.
    """
    f16, bf16, f32 = "float16", "bfloat16", "float32"
    e4m3, e5m2 = fp8.NAMES
    gates, scales = itertools.cycle(("copied", "in_place", None)), itertools.cycle((0.37, 1.0, -3.0, 0.004, 448.0))
    per_head = itertools.cycle(((False, False), (True, False), (False, True)))
    layouts = [
        CachedCase(
            Case(129, 5, 2, 128, 64, dtype, gate=next(gates), packed=packed),
            axes,
            num_blocks=24,
            block_size=7,
            return_kv=not packed,
        )
        for axes in AXES
        for packed, dtype in ((False, f16), (True, bf16))
    ]
    layouts += [
        dataclasses.replace(call, kv_dtype=e4m3, scale=next(scales), scale_per_head=next(per_head)) for call in layouts
    ]
    dtypes = [
        CachedCase(Case(257, 16, 2, dtype=dtype, packed=True), axes, in_cache, num_blocks=20, block_size=16)
        for axes in ("b s h d", "b h s (c d)")
        for dtype, in_cache in ((f16, bf16), (f16, f32), (bf16, f16), (bf16, f32), (bf16, e5m2))
    ]
    codes = [
        CachedCase(Case(64, 3, 1, 80, 40, f16, gathered=True), "b s h (c d)", e4m3, return_kv=True),
        CachedCase(
            Case(64, 5, 2, 96, 48, norm_beta=1.0), "b s (h c) d", e5m2, return_kv=True, scale_per_head=(True, True)
        ),
        CachedCase(
            Case(129, 16, 4, 128, 128, f16, cache_dtype=f32), kv_dtype=e5m2, return_kv=True, scale_per_head=(True, True)
        ),
        CachedCase(Case(1024, 16, 2, dtype=f32, packed=True), kv_dtype=e4m3, return_kv=True),
        CachedCase(Case(64, 5, 2, 96, 48, f32), "b h s d", e5m2, return_kv=True),
        CachedCase(Case(64, 3, 1, 65, 6, f32), "h b s d", e4m3, return_kv=True),  # no two codes share a store
        CachedCase(Case(65536, 16, 2, packed=True), kv_dtype=e4m3, num_blocks=4200, block_size=16, scale=0.02),
        CachedCase(
            Case(16384, 16, 2, packed=True, gate="in_place"), kv_dtype=e4m3, num_blocks=1100, block_size=16, scale=0.02
        ),
    ]
    slots = [
        CachedCase(Case(100, 3, 1, 64, 32), num_blocks=60, block_size=2, slots_dtype=dtype)
        for dtype in ("int8", "uint8", "int16", "uint16", "uint32", "int64", "uint64")
    ]
    others = [
        CachedCase(Case(1), num_blocks=1, block_size=16),
        CachedCase(Case(64, 3, 1, 80, 40, f16, gathered=True), "b s h (c d)", num_blocks=80, block_size=1),
        CachedCase(Case(64, 5, 2, 96, 48, f32, norm_beta=1.0), "b s (h c) d", num_blocks=5, block_size=16),
        CachedCase(Case(200, 16, 2, mrope_section=INTERLEAVED, packed=True), "l b s h d", num_blocks=9, block_size=32),
        CachedCase(Case(64), "l b s h d", num_blocks=5, block_size=16, layer=3),
        CachedCase(Case(64), "l b h s (c d)", num_blocks=5, block_size=16, layer=-1),
        CachedCase(Case(4096, 32, 2, packed=True, gate="in_place"), num_blocks=300, block_size=16),
        CachedCase(Case(65536, 16, 2, packed=True), num_blocks=4200, block_size=16),
        CachedCase(Case(65536, 16, 4, 128, 128, f16), "b h s (c d)", num_blocks=4200, block_size=16),
    ]
    options = [
        CachedCase(Case(129, 16, 2, rotation="pairs", packed=True), "b h s (c d)", num_blocks=20, block_size=16),
        CachedCase(Case(129, 5, 2, 128, 128, f16, rotation="pairs"), kv_dtype=e4m3, return_kv=True),
        CachedCase(Case(64, 5, 2, 96, 6, f32, rotation="pairs", gate=None), "b s (h c) d"),
        CachedCase(Case(129, 16, 2, round_norm=False, packed=True, gate="in_place"), return_kv=True),
        CachedCase(Case(64, 5, 2, 80, 40, f16, round_norm=False, packed=True), kv_dtype=e4m3, return_kv=True),
        CachedCase(
            Case(200, 16, 2, mrope_section=INTERLEAVED, rotation="pairs", round_norm=False, packed=True),
            "l b s h d",
            e5m2,
            num_blocks=9,
            block_size=32,
            return_kv=True,
        ),
        CachedCase(Case(129, 16, 2, packed=True, v_norm=True), "b h s (c d)", num_blocks=20, return_kv=True),
        CachedCase(Case(200, 5, 2, 128, 128, f16, v_norm=True, weights=False), return_kv=True, num_blocks=60),
        CachedCase(Case(129, 4, 1, 512, 512, v_norm=True, gate=None), "b s (h c) d", e4m3, return_kv=True),
        CachedCase(Case(129, 5, 2, 128, 0, f16, packed=True, v_norm=True), kv_dtype=bf16, return_kv=True),
        CachedCase(Case(129, 16, 2, norm_order="rotation_first", packed=True), "b h s (c d)", num_blocks=20),
        CachedCase(
            Case(64, 5, 2, 64, 32, f16, norm_order="rotation_first", round_norm=False), kv_dtype=e5m2, return_kv=True
        ),
    ]
    return layouts + codes + dtypes + options + slots + others


def parity_cached_cpu() -> list[CachedCase]:
    """The calls of `verify` on a CPU that write a KV cache, in every layout; some in 8 bits."""
    packed = [Case(9, 3, 1, 64, 32, "float16", packed=packed) for packed in (False, True)]
    layouts = [CachedCase(case, axes) for case, axes in zip(itertools.cycle(packed), AXES, strict=False)]
    codes = itertools.product(packed, ("b s h d", "l h b s (c d)"), fp8.NAMES)
    options = [
        CachedCase(dataclasses.replace(packed[1], rotation="pairs", round_norm=False)),
        CachedCase(dataclasses.replace(packed[0], rotation="pairs"), "b h s (c d)", fp8.NAMES[0], return_kv=True),
        CachedCase(dataclasses.replace(packed[1], rotary_dim=0, v_norm=True), return_kv=True),
        CachedCase(dataclasses.replace(packed[0], norm_order="rotation_first", weights=False), return_kv=True),
    ]
    return layouts + [CachedCase(case, axes, in_cache, return_kv=True) for case, axes, in_cache in codes] + options


def parity_cpu() -> list[Case]:
    """The cases of `verify` on a CPU, where the oracle runs in Triton's interpreter."""
    cases = [
        Case(2, 3, 1, 64, 64),
        Case(2, 1, 3, 128, 64, mrope_section=INTERLEAVED, norm_beta=1.0),
        Case(3, 5, 2, 80, 20, weight_dtype="float32", cache_dtype="float32"),
        Case(4, 16, 2, 256, 64),
    ]
    return [dataclasses.replace(case, dtype=dtype) for case in cases for dtype in ("float16", "bfloat16")] + [
        Case(2, 3, 1, 96, 48, "float32"),
        Case(2, 3, 1, 64, 32, "float32", weight_dtype="bfloat16", cache_dtype="float16"),
        Case(2, 3, 1, 64, 32, "float16", weight_dtype="bfloat16", cache_dtype="bfloat16"),
        Case(9, 3, 1, 64, 32, "float16", rotation="pairs"),
        Case(2, 3, 1, 80, 20, rotation="pairs", cache_dtype="float32"),
        Case(2, 3, 1, 96, 6, "float32", rotation="pairs", norm_beta=1.0),
        Case(9, 3, 1, 128, 128, "float16", round_norm=False, mrope_section=(24, 20, 20)),
        Case(2, 3, 1, 64, 32, round_norm=False),
        Case(9, 3, 1, 64, 6, "float16", rotation="pairs", round_norm=False),
        Case(3, 3, 1, 64, 0, "float16", norm_beta=1.0),
        Case(9, 3, 1, 64, 32, "float16", norm_order="rotation_first"),
        Case(5, 3, 1, 96, 6, "float32", rotation="pairs", norm_order="rotation_first"),
        Case(5, 3, 1, 64, 32, "float16", weights=False),
        Case(5, 3, 1, 64, 32, "float16", q_alone=True),
    ]


def verified(platform: str) -> list[Case | CachedCase]:
    """What `verify` compares."""
    return [*parity_cpu(), *parity_cached_cpu()] if platform == "cpu" else [*parity_gpu(), *parity_cached_gpu()]


def shown(platform: str) -> list[tuple[str, Case]]:
    """The models and cases of `demo`: decode and prefill of Qwen3.5 sizes.

    On a CPU in float16 too: Triton's interpreter rounds to it as a GPU does, and to bfloat16 in its own way.
    """
    models = (("Qwen3.5-0.8B", 8, 2), ("Qwen3.5-35B-A3B", 16, 2), ("Qwen3.5-397B-A17B", 32, 2))
    tokens, dtypes = ((1, 256, 16384), ("bfloat16",)) if platform == "gpu" else ((1, 8), ("float16", "bfloat16"))
    return [
        (model, Case(num_tokens, num_q_heads, num_kv_heads, dtype=dtype))
        for dtype in dtypes
        for model, num_q_heads, num_kv_heads in models
        for num_tokens in tokens
    ]
