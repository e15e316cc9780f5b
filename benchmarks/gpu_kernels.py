"""The benchmark's own Triton kernels, launched through torch: the copy ceiling, the section marker, the L2 flush."""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

# (int32 elements a program, warps): one, two and four 16-byte accesses a thread. Which is fastest depends on the size.
COPY_TILES = ((512, 4), (1024, 4), (2048, 4), (4096, 8))

_FLUSH_TILE = 4096


@triton.jit
def benchmark_copy(source_ptr, target_ptr, num_elements, tile_size: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * tile_size  # 64 bits: one launch beyond 2^31 elements
    offsets = start + tl.arange(0, tile_size)
    mask = offsets < num_elements
    tl.store(target_ptr + offsets, tl.load(source_ptr + offsets, mask=mask), mask=mask)


@triton.jit
def benchmark_section_marker(target_ptr):
    tl.store(target_ptr, 1)


@triton.jit
def benchmark_flush_l2(target_ptr, tile_size: tl.constexpr):
    offsets = tl.program_id(0) * tile_size + tl.arange(0, tile_size)
    tl.store(target_ptr + offsets, tl.zeros((tile_size,), tl.int32))


def _launch(num_warps: int) -> dict[str, int]:
    # There is no float here, but Triton 3.9 warns where fusion is left unsaid.
    return {"num_warps": num_warps, "enable_fp_fusion": False}


def copied_words(total_bytes: int) -> int:
    """Four-byte words that a copy moves of `total_bytes`: a multiple of 16, so that every access is 16 bytes wide."""
    return total_bytes // 2 // 4 // 16 * 16


def copy_calls(total_bytes: int) -> dict[str, Callable[[], torch.Tensor]]:
    """For each tile size a call that moves `total_bytes`, half of them read and half written; each one checked."""
    # Random words: constant data would draw less power than the op's.
    num_elements = copied_words(total_bytes)
    source = torch.randint(-(2**31), 2**31 - 1, (num_elements,), dtype=torch.int32, device="cuda")
    target = torch.empty_like(source)

    def copy(tile: int, num_warps: int) -> torch.Tensor:
        grid = (triton.cdiv(num_elements, tile),)
        benchmark_copy[grid](source, target, num_elements, tile_size=tile, **_launch(num_warps))
        return target

    calls: dict[str, Callable[[], torch.Tensor]] = {}
    for tile, num_warps in COPY_TILES:
        target.zero_()
        if not torch.equal(copy(tile, num_warps), source):
            raise RuntimeError(f"the copy kernel must copy {num_elements} words, got other ones with a tile of {tile}")
        calls[f"copy_{tile}x{num_warps}"] = functools.partial(copy, tile, num_warps)
    return calls


class Markers:
    """Launches the kernels that separate the calls on the device's timeline; each waits until the device is idle."""

    def __init__(self, flush_bytes: int = 0):
        self._mark_target = torch.zeros(1, dtype=torch.int32, device="cuda")
        self._flush_target = torch.empty(flush_bytes // 4, dtype=torch.int32, device="cuda")

    def mark(self) -> None:
        benchmark_section_marker[(1,)](self._mark_target, **_launch(1))
        torch.cuda.synchronize()

    def flush_l2(self) -> None:
        """Writes the flush buffer, so that nothing else is left in L2."""
        grid = (self._flush_target.numel() // _FLUSH_TILE,)
        benchmark_flush_l2[grid](self._flush_target, tile_size=_FLUSH_TILE, **_launch(4))
        torch.cuda.synchronize()
