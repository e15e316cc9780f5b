"""The layer of examples/gated_attention.py as a Flax NNX module, the form that MaxText and tpu-inference write.

python -m examples.gated_attention_nnx
"""

import jax
import jax.numpy as jnp
from flax import nnx

from examples import gated_attention
from examples.gated_attention import Config, KVCache, Parameters


class GatedAttention(nnx.Module):
    """Qwen3.5's gated attention; `gated_attention.from_state_dict` and `from_safetensors` give its parameters."""

    def __init__(self, parameters: Parameters, config: Config):
        self.config = config
        self.qkv = nnx.Param(parameters.qkv)
        self.q_norm = nnx.Param(parameters.q_norm)
        self.k_norm = nnx.Param(parameters.k_norm)
        self.out = nnx.Param(parameters.out)

    def parameters(self) -> Parameters:
        return Parameters(self.qkv[...], self.q_norm[...], self.k_norm[...], self.out[...])

    def __call__(self, hidden: jax.Array, positions: jax.Array, cos_sin_cache: jax.Array) -> jax.Array:
        """(B, S, E) to (B, S, E)."""
        return gated_attention.forward(self.parameters(), hidden, positions, cos_sin_cache, self.config)

    def prefill(
        self,
        hidden: jax.Array,
        lengths: jax.Array,
        positions: jax.Array,
        cos_sin_cache: jax.Array,
        *,
        cache_length: int,
        **options,
    ) -> tuple[jax.Array, KVCache]:
        """`options` are those of `gated_attention.prefill`: the cache's dtype and scales, and attention."""
        arrays = self.parameters(), hidden, lengths, positions, cos_sin_cache
        return gated_attention.prefill(*arrays, self.config, cache_length=cache_length, **options)

    def decode(
        self, hidden: jax.Array, positions: jax.Array, cos_sin_cache: jax.Array, cache: KVCache, **options
    ) -> tuple[jax.Array, KVCache]:
        """`options` are those of `gated_attention.decode`."""
        return gated_attention.decode(
            self.parameters(), hidden, positions, cos_sin_cache, self.config, cache, **options
        )


def main() -> None:
    """One step of gradient descent on the distance from another layer's outputs."""
    hidden_size, dtype = 256, jnp.float32
    config, cos_sin_cache = gated_attention.read_config(gated_attention.TEXT_CONFIG, max_position=128, dtype=dtype)
    keys = jax.random.split(jax.random.key(0), 3)
    pupil, teacher = (
        GatedAttention(gated_attention.random_parameters(key, hidden_size, config, dtype), config) for key in keys[:2]
    )
    hidden = jax.random.normal(keys[2], (2, 16, hidden_size), dtype)
    positions = jnp.tile(jnp.arange(16), (2, 1))
    wanted = teacher(hidden, positions, cos_sin_cache)

    @nnx.jit
    def step(layer: GatedAttention) -> jax.Array:
        def distance(layer: GatedAttention) -> jax.Array:
            return jnp.mean((layer(hidden, positions, cos_sin_cache) - wanted) ** 2)

        value, gradients = nnx.value_and_grad(distance)(layer)
        nnx.update(layer, jax.tree.map(lambda w, g: w - 10.0 * g, nnx.state(layer, nnx.Param), gradients))
        return value

    values = [float(step(pupil)) for _ in range(10)]
    print(f"mean squared distance {values[0]:.4f} at first, {values[-1]:.4f} after {len(values) - 1} steps")


if __name__ == "__main__":
    main()
