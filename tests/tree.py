"""The order of the sum of squares as the serving kernel's reduction takes it, in NumPy, and rows that show it."""

import numpy as np


def numpy_tree(squares: np.ndarray) -> np.ndarray:
    """float32 sums over the last axis as the serving kernel's reduction: written as the GPU does it, by threads."""
    head_dim = squares.shape[-1]
    lanes = 1 << (head_dim - 1).bit_length()
    values = np.zeros((*squares.shape[:-1], lanes), np.float32)
    values[..., :head_dim] = squares
    if lanes >= 64:
        values = values[..., 0::2] + values[..., 1::2]  # a thread's two lanes
    num_threads = min(32, values.shape[-1])
    values = values.reshape(*values.shape[:-1], -1, num_threads)  # (..., warps, threads)
    step = num_threads // 2
    while step:
        values = values[..., :step] + values[..., step : 2 * step]
        step //= 2
    values = values[..., 0]
    while values.shape[-1] > 1:
        values = values[..., : values.shape[-1] // 2] + values[..., values.shape[-1] // 2 :]
    return values[..., 0]


def exact_rows(num_rows: int, head_dim: int) -> np.ndarray:
    """float32 values that bfloat16 holds, so that squares are exact and only the order of the sum shows."""
    values = np.random.default_rng(0).normal(size=(num_rows, head_dim)).astype(np.float32)
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
