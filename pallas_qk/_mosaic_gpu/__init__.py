"""The op as Pallas GPU kernels on the Mosaic GPU backend."""

from pallas_qk._mosaic_gpu.backward import backward as backward
from pallas_qk._mosaic_gpu.forward import forward as forward
from pallas_qk._mosaic_gpu.gate import gate_backward as gate_backward
from pallas_qk._mosaic_gpu.projection import project as project
from pallas_qk._mosaic_gpu.projection import unsupported_projection as unsupported_projection
from pallas_qk._options import Spec, Target, too_many_rows


def unsupported(spec: Spec, target: Target) -> str | None:
    """Why this implementation can't run `spec` on `target`; None if it can.

    These kernels need no wgmma, TMA, cluster or shared memory. So they run on capability 12.x, which has less of these.
    What Mosaic GPU puts around a kernel needs 9.0.
    """
    if target.compute_capability < (9, 0):
        major, minor = target.compute_capability
        return f"it needs compute capability 9.0 or later (Mosaic GPU), got {major}.{minor}"
    if spec.rotation == "pairs" and spec.head_dim % 2:
        return f"it rotates pairs in heads of an even number of elements, got head_dim={spec.head_dim}"
    return too_many_rows(spec, margin=2**16)
