"""Trains one gated attention layer to remember: each token's target is the token DISTANCE places before it.

python -m examples.train_step [--steps 300]

Rotary embeddings let attention find a place by its distance, so the loss falls from log(VOCABULARY) to nearly nothing.
"""

import argparse
import math

import jax
import jax.numpy as jnp
from tqdm import tqdm

import pallas_qk
from pallas_qk import rope

VOCABULARY, DISTANCE = 32, 3
BATCH, LENGTH, WIDTH = 16, 32, 128
Q_HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM = 4, 2, 32, 16


def initial_parameters(key: jax.Array) -> dict[str, jax.Array]:
    shapes = {
        "embedding": (VOCABULARY, WIDTH),
        "q_gate": (WIDTH, Q_HEADS * 2 * HEAD_DIM),
        "k": (WIDTH, KV_HEADS * HEAD_DIM),
        "v": (WIDTH, KV_HEADS * HEAD_DIM),
        "out": (Q_HEADS * HEAD_DIM, WIDTH),
        "logits": (WIDTH, VOCABULARY),
    }
    keys = jax.random.split(key, len(shapes))
    parameters = {
        name: jax.random.normal(key, shape) / math.sqrt(shape[0])
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    # Weights around zero, to which the op adds norm_beta = 1, as Qwen3.5 stores them.
    return parameters | {"q_norm": jnp.zeros(HEAD_DIM), "k_norm": jnp.zeros(HEAD_DIM)}


def cos_sin_table() -> jax.Array:
    """(LENGTH, ROTARY_DIM), each row [cos | sin]."""
    rope_parameters = {"rope_theta": 100.0, "partial_rotary_factor": ROTARY_DIM / HEAD_DIM}
    return rope.cos_sin_cache(*rope.inv_frequencies(rope_parameters, head_dim=HEAD_DIM), max_position=LENGTH)


def gated_attention(parameters: dict[str, jax.Array], hidden: jax.Array, table: jax.Array) -> jax.Array:
    """(BATCH, LENGTH, WIDTH) to the same shape."""
    # Three products of one array would be merged and cut up again by XLA on a GPU, into copies (docs/porting.md).
    once = jax.lax.optimization_barrier(hidden)
    twice = jax.lax.optimization_barrier(once)
    # One launch for the whole batch, whose sequences share their positions, and one for its gradient.
    q, k, gate = pallas_qk.fused_qk_rmsnorm_rope_gate(
        hidden @ parameters["q_gate"],
        once @ parameters["k"],
        parameters["q_norm"],
        parameters["k_norm"],
        table,
        jnp.arange(LENGTH),
        eps=1e-6,
        norm_beta=1.0,
    )
    attended = jax.nn.dot_product_attention(
        q.reshape(BATCH, LENGTH, Q_HEADS, HEAD_DIM),
        k.reshape(BATCH, LENGTH, KV_HEADS, HEAD_DIM),
        (twice @ parameters["v"]).reshape(BATCH, LENGTH, KV_HEADS, HEAD_DIM),
        is_causal=True,
    )
    return (attended.reshape(gate.shape) * jax.nn.sigmoid(gate)) @ parameters["out"]


def loss(parameters: dict[str, jax.Array], tokens: jax.Array, table: jax.Array) -> jax.Array:
    hidden = parameters["embedding"][tokens]
    hidden = hidden + gated_attention(parameters, hidden, table)
    log_probabilities = jax.nn.log_softmax(hidden @ parameters["logits"])[:, DISTANCE:]
    targets = tokens[:, :-DISTANCE]
    return -jnp.mean(jnp.take_along_axis(log_probabilities, targets[..., None], axis=-1))


def adam(parameters, moments, gradients, step):
    """Parameters and moments after the step, counted from 1; the moments before it are zeros."""
    first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], gradients)
    second = jax.tree.map(lambda m, g: 0.99 * m + 0.01 * g * g, moments[1], gradients)
    rate = 3e-3 * jnp.sqrt(1 - 0.99**step) / (1 - 0.9**step)
    parameters = jax.tree.map(lambda p, m, v: p - rate * m / (jnp.sqrt(v) + 1e-8), parameters, first, second)
    return parameters, (first, second)


@jax.jit
def train_step(parameters, moments, step, key, table):
    """One step of Adam on fresh random tokens."""
    tokens = jax.random.randint(key, (BATCH, LENGTH), 0, VOCABULARY)
    value, gradients = jax.value_and_grad(loss)(parameters, tokens, table)
    return *adam(parameters, moments, gradients, step), value


def train(num_steps: int) -> list[float]:
    """The loss of each step."""
    parameters = initial_parameters(jax.random.key(0))
    moments = (jax.tree.map(jnp.zeros_like, parameters),) * 2
    table, losses = cos_sin_table(), []
    with tqdm(range(1, num_steps + 1), desc="training", unit="step") as progress:
        for step in progress:
            key = jax.random.key(step)
            parameters, moments, value = train_step(parameters, moments, jnp.float32(step), key, table)
            losses.append(float(value))
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    losses = train(parser.parse_args().steps)
    print(f"loss {losses[0]:.3f} at first (log {VOCABULARY} = {math.log(VOCABULARY):.3f}), {losses[-1]:.3f} at last")


if __name__ == "__main__":
    main()
