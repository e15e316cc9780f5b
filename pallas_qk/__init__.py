"""The fused QK-RMSNorm, partial RoPE and gate split of gated attention for JAX, as Pallas GPU kernels."""

from pallas_qk import dlpack as dlpack
from pallas_qk import kv_cache as kv_cache
from pallas_qk import rope as rope
from pallas_qk._api import default_implementation as default_implementation
from pallas_qk._api import fused_qk_rmsnorm_rope as fused_qk_rmsnorm_rope
from pallas_qk._api import fused_qk_rmsnorm_rope_gate as fused_qk_rmsnorm_rope_gate
from pallas_qk._api import fused_qkv_rmsnorm_rope as fused_qkv_rmsnorm_rope
from pallas_qk._api import fused_qkv_rmsnorm_rope_gate as fused_qkv_rmsnorm_rope_gate
from pallas_qk._cache_api import CacheOutputs as CacheOutputs
from pallas_qk._cache_api import fused_qkv_rmsnorm_rope_cache as fused_qkv_rmsnorm_rope_cache
from pallas_qk._cache_api import fused_qkv_rmsnorm_rope_gate_cache as fused_qkv_rmsnorm_rope_gate_cache
from pallas_qk._gate import Gate as Gate
from pallas_qk._gate import apply_gate as apply_gate
from pallas_qk._implementations import IMPLEMENTATIONS as IMPLEMENTATIONS
from pallas_qk._projection_api import fused_qkv_projection_rmsnorm_rope_gate as fused_qkv_projection_rmsnorm_rope_gate

__version__ = "0.2.0"
