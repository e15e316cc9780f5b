"""The op as Pallas GPU kernels on the Triton backend, which JAX has deprecated: this folder goes with it."""

from pallas_qk._fp8 import is_fp8
from pallas_qk._options import Spec, Target, has_halves, too_many_rows
from pallas_qk._reference import gate_backward as gate_backward  # XLA makes one kernel of it
from pallas_qk._triton.backward import backward as backward
from pallas_qk._triton.forward import forward as forward


def unsupported(spec: Spec, target: Target) -> str | None:
    """Why this implementation can't run `spec` on `target`; None if it can."""
    if target.compute_capability < (8, 0):
        major, minor = target.compute_capability
        return f"it needs compute capability 8.0 or later (packed 16-bit conversions), got {major}.{minor}"
    partners_meet = spec.rotation != "halves" or has_halves(spec.head_dim, spec.rotary_dim)
    if spec.norm_order == "rotation_first" and not partners_meet:  # its backward rotates what a thread has computed
        sizes = f"head_dim={spec.head_dim} and rotary_dim={spec.rotary_dim}"
        return f"with the rotation first it needs a head_dim and a rotary_dim that are powers of two, got {sizes}"
    if is_fp8(spec.cache_dtype) and target.compute_capability < (8, 9):
        major, minor = target.compute_capability
        return f"it needs compute capability 8.9 or later for a cache of {spec.cache_dtype}, got {major}.{minor}"
    return too_many_rows(spec, margin=2**20)  # the backward looks a step ahead: up to some 10^5 rows
