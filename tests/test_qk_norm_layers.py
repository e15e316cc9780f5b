"""q and k of transformers' attention without gates: Qwen3, and Gemma 3 with its two kinds of layers."""

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_qk
from pallas_qk import rope
from tests.tolerances import ROUNDOFF

torch = pytest.importorskip("torch", reason="the judge is transformers' layer")
pytest.importorskip("transformers", reason="the judge is transformers' layer")

BATCH, LENGTH, HIDDEN_SIZE, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, MAX_POSITION = 2, 7, 48, 4, 2, 32, 32


def seeded(model: str, layer_type: str | None, dtype):
    """An attention layer and what gives its cosines and sines at some positions."""
    sizes = {
        "hidden_size": HIDDEN_SIZE,
        "num_attention_heads": NUM_Q_HEADS,
        "num_key_value_heads": NUM_KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": MAX_POSITION,
        "num_hidden_layers": 6,
    }
    torch.manual_seed(0)
    if model == "qwen3":
        from transformers.models.qwen3 import modeling_qwen3 as modeling

        config = modeling.Qwen3Config(**sizes)
        layer, rotary, named = modeling.Qwen3Attention(config, 0), modeling.Qwen3RotaryEmbedding(config), {}
    else:
        from transformers.models.gemma3 import modeling_gemma3 as modeling

        rope_parameters = {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        }
        config = modeling.Gemma3TextConfig(**sizes, rope_parameters=rope_parameters)
        layer = modeling.Gemma3Attention(config, config.layer_types.index(layer_type))
        rotary, named = modeling.Gemma3RotaryEmbedding(config), {"layer_type": layer_type}
    for norm in (layer.q_norm, layer.k_norm):
        torch.nn.init.normal_(norm.weight, mean=1.0 if model == "qwen3" else 0.0, std=0.3)
    return layer.to(dtype).eval(), lambda positions: rotary(torch.zeros((), dtype=dtype), positions, **named)


def theirs(layer, rotary, hidden, positions) -> list[np.ndarray]:
    """q (B, S, Hq, D) and k (B, S, Hkv, D) as the layer hands them to attention."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = []

    def attention(module, query, key, value, mask, **kwargs):
        seen.extend(x.transpose(1, 2) for x in (query, key))
        return query.transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register("capture_q_and_k", attention)
    layer.config._attn_implementation = "capture_q_and_k"
    with torch.no_grad():
        layer(hidden, position_embeddings=rotary(torch.as_tensor(positions)), attention_mask=None)
    return [x.float().numpy() for x in seen]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "model, layer_type", [("qwen3", None), ("gemma3", "sliding_attention"), ("gemma3", "full_attention")]
)
def test_q_and_k_of_a_layer_without_gates(model, layer_type, dtype):
    layer, rotary = seeded(model, layer_type, getattr(torch, dtype))
    rng = np.random.default_rng(0)
    hidden = torch.as_tensor(rng.normal(size=(BATCH, LENGTH, HIDDEN_SIZE)), dtype=getattr(torch, dtype))
    positions = rng.integers(0, MAX_POSITION, (BATCH, LENGTH))
    want = theirs(layer, rotary, hidden, positions)

    inv_freq, factor = rope.inv_frequencies(layer.config.rope_parameters, head_dim=HEAD_DIM, layer_type=layer_type)
    cos_sin_cache = rope.cos_sin_cache(inv_freq, factor, max_position=MAX_POSITION, dtype=dtype)

    def to_jax(x, *shape):
        return jnp.asarray(x.detach().float().numpy()).astype(dtype).reshape(*shape or x.shape)

    got = pallas_qk.fused_qk_rmsnorm_rope(
        to_jax(layer.q_proj(hidden), BATCH, LENGTH, NUM_Q_HEADS, HEAD_DIM),
        to_jax(layer.k_proj(hidden), BATCH, LENGTH, NUM_KV_HEADS, HEAD_DIM),
        to_jax(layer.q_norm.weight),
        to_jax(layer.k_norm.weight),
        cos_sin_cache,
        jnp.asarray(positions, jnp.int32),
        layer.config.rms_norm_eps,
        num_q_heads=NUM_Q_HEADS,
        num_kv_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        rotary_dim=HEAD_DIM,
        norm_beta=0.0 if model == "qwen3" else 1.0,
    )
    # float32: the orders of two sums, two forms of rsqrt, and transformers' angles, which are off by a rounding of the
    # frequency and one of the product: 2 * 2^-24 of at most MAX_POSITION radians, times the length of the pair.
    # bfloat16, in steps of the pair: at most 3 roundings of half a step in their rotation and one in ours; a step where
    # their norm lies apart, another for Qwen3, which rounds before the weight too; a step where a table element does.
    allowed = {"float32": 16 + 2 * MAX_POSITION, "bfloat16": 5}[dtype]
    half = HEAD_DIM // 2
    for x, exact in zip(got, want, strict=True):
        assert x.shape == exact.shape
        pair = np.hypot(exact[..., :half], exact[..., half:])
        error = abs(np.asarray(x, np.float32) - exact)
        assert (error <= allowed * ROUNDOFF[dtype] * np.concatenate([pair, pair], axis=-1)).all()
