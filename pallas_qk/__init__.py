"""The fused QK-RMSNorm, partial RoPE and gate split of gated attention for JAX, as Pallas GPU kernels."""

from pallas_qk import dlpack, kv_cache, rope
from pallas_qk._api import (
    default_implementation,
    fused_qk_rmsnorm_rope,
    fused_qk_rmsnorm_rope_gate,
    fused_qkv_rmsnorm_rope,
    fused_qkv_rmsnorm_rope_gate,
)
from pallas_qk._cache_api import CacheOutputs, fused_qkv_rmsnorm_rope_cache, fused_qkv_rmsnorm_rope_gate_cache
from pallas_qk._gate import Gate, apply_gate
from pallas_qk._implementations import IMPLEMENTATIONS
from pallas_qk._projection_api import (
    fused_qkv_projection_rmsnorm_rope_gate,
    fused_qkv_projection_rmsnorm_rope_gate_cache,
)

__version__ = "0.2.0"

# Without it help(pallas_qk) would show none of them: they are defined in other files.
__all__ = [
    "IMPLEMENTATIONS",
    "CacheOutputs",
    "Gate",
    "apply_gate",
    "default_implementation",
    "dlpack",
    "fused_qk_rmsnorm_rope",
    "fused_qk_rmsnorm_rope_gate",
    "fused_qkv_projection_rmsnorm_rope_gate",
    "fused_qkv_projection_rmsnorm_rope_gate_cache",
    "fused_qkv_rmsnorm_rope",
    "fused_qkv_rmsnorm_rope_cache",
    "fused_qkv_rmsnorm_rope_gate",
    "fused_qkv_rmsnorm_rope_gate_cache",
    "kv_cache",
    "rope",
]
