"""q, k and gate of transformers' Qwen3.5 attention, an oracle that nobody here wrote."""

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_qk
from tests.tolerances import ROUNDOFF

torch = pytest.importorskip("torch")
modeling = pytest.importorskip("transformers.models.qwen3_5.modeling_qwen3_5")

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, ROTARY_DIM, NUM_TOKENS, MAX_POSITION = 4, 2, 64, 16, 11, 512
SECTION = (3, 3, 2)


def seeded_layer(dtype):
    """A Qwen3.5 attention layer whose o_proj hands its input on, and the rotary embedding of its model."""
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

    config = Qwen3_5TextConfig(
        hidden_size=48,
        num_attention_heads=NUM_Q_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=4,
        max_position_embeddings=MAX_POSITION,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": ROTARY_DIM / HEAD_DIM,
            "mrope_section": list(SECTION),
            "mrope_interleaved": True,
        },
    )
    torch.manual_seed(0)
    layer = modeling.Qwen3_5Attention(config, layer_idx=3)
    for norm in (layer.q_norm, layer.k_norm):
        torch.nn.init.normal_(norm.weight, std=0.3)
    layer.o_proj = torch.nn.Identity()
    return layer.to(dtype), modeling.Qwen3_5TextRotaryEmbedding(config)


def theirs(layer, rotary, hidden, positions):
    """(q, k, sigmoid(gate)) as the layer hands them to attention and to o_proj."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = {}

    def attention(module, query, key, value, mask, **kwargs):
        seen["q"], seen["k"] = query[0].transpose(0, 1), key[0].transpose(0, 1)
        return torch.ones_like(query).transpose(1, 2), None  # so that the output is sigmoid(gate)

    ALL_ATTENTION_FUNCTIONS.register("capture", attention)
    layer.config._attn_implementation = "capture"
    position_ids = torch.as_tensor(positions)
    position_ids = position_ids[:, None, :] if position_ids.ndim == 2 else position_ids[None, :].expand(3, 1, -1)
    with torch.no_grad():
        output, _ = layer(hidden[None], rotary(hidden[None], position_ids), None)
    return [x.float().numpy().reshape(NUM_TOKENS, -1) for x in (seen["q"], seen["k"], output[0])]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("multimodal", [False, True])
def test_agrees_with_qwen3_5(dtype, multimodal):
    layer, rotary = seeded_layer(getattr(torch, dtype))
    rng = np.random.default_rng(0)
    hidden = torch.as_tensor(rng.normal(size=(NUM_TOKENS, 48)), dtype=getattr(torch, dtype))
    positions = rng.permutation(MAX_POSITION)[: 3 * NUM_TOKENS].reshape(3, NUM_TOKENS)
    positions = positions if multimodal else positions[0]
    want = theirs(layer, rotary, hidden, positions)

    every = torch.arange(MAX_POSITION)[None, None].expand(3, 1, -1)
    table = [x[0, :, : ROTARY_DIM // 2].float().numpy() for x in rotary(hidden[None], every)]

    def to_jax(x):
        return jnp.asarray(x.detach().float().numpy()).astype(dtype)

    q_out, k_out, gate_out = pallas_qk.fused_qk_rmsnorm_rope_gate(
        to_jax(layer.q_proj(hidden)),
        to_jax(layer.k_proj(hidden)),
        to_jax(layer.q_norm.weight),
        to_jax(layer.k_norm.weight),
        jnp.asarray(np.concatenate(table, axis=1)).astype(dtype),
        jnp.asarray(positions, jnp.int32),
        layer.config.rms_norm_eps,
        NUM_Q_HEADS,
        NUM_KV_HEADS,
        HEAD_DIM,
        ROTARY_DIM,
        mrope_section=SECTION if multimodal else None,
        norm_beta=1.0,
    )
    # float32: the orders of two sums and two forms of rsqrt. bfloat16: the norm rounds to equal values but for rare
    # neighbours, then they round both products and the sum, we the sum alone: at most 3 roundings of half a step of
    # the pair each, and a step of the norm itself.
    for got, heads, exact in ((q_out, NUM_Q_HEADS, want[0]), (k_out, NUM_KV_HEADS, want[1])):
        got = np.asarray(got, np.float32).reshape(NUM_TOKENS, heads, HEAD_DIM)
        exact = exact.reshape(got.shape)
        half = ROTARY_DIM // 2
        pair = np.hypot(exact[..., :half], exact[..., half:ROTARY_DIM])
        size = np.concatenate([pair, pair, abs(exact[..., ROTARY_DIM:])], axis=-1)
        assert (abs(got - exact) <= (16 if dtype == "float32" else 6) * ROUNDOFF[dtype] * size).all()
        if dtype == "bfloat16":  # lanes that are not rotated are equal but for rare neighbours
            assert (got[..., ROTARY_DIM:] != exact[..., ROTARY_DIM:]).mean() < 0.005
    sigmoid = torch.sigmoid(torch.as_tensor(np.array(gate_out, np.float32)).to(hidden.dtype))
    np.testing.assert_array_equal(sigmoid.float().numpy(), want[2])
