"""Padding trains: a two-layer model of padded sequences has the loss, logits and gradients of the unpadded ones.

Padding has position -1, which reads row 0 of the table, and takes part in attention as a key mask or segments say.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_qk
from pallas_qk import rope
from tests.cases import random_normal
from tests.run import has_gpu, quick_jit

VOCABULARY, WIDTH, LAYERS = 11, 48, 2
SIZES: dict[str, Any] = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 32, "rotary_dim": 16}
SECTION = (3, 3, 2)
LENGTHS, PADDED = (9, 4, 1), 12


@pytest.fixture(params=pallas_qk.IMPLEMENTATIONS if has_gpu() else ["xla"])
def implementation(request) -> str:
    """What runs here through the public op."""
    return request.param


class Batch(NamedTuple):
    tokens: np.ndarray  # (B, S)
    positions: np.ndarray  # (B, S) or (3, B, S); -1 for padding
    attends: np.ndarray  # (B, S, S): which keys a query sees
    is_real: np.ndarray  # (B, S)


def make_parameters() -> dict[str, jax.Array]:
    d, q, kv = SIZES["head_dim"], SIZES["num_q_heads"], SIZES["num_kv_heads"]
    shapes = {"embedding": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        shapes |= {f"q{layer}": (WIDTH, 2 * q * d), f"k{layer}": (WIDTH, kv * d), f"v{layer}": (WIDTH, kv * d)}
        shapes |= {f"q_norm{layer}": (d,), f"k_norm{layer}": (d,), f"out{layer}": (q * d, WIDTH)}
    return {
        name: random_normal(shape, jnp.float32, seed) / (shape[0] ** 0.5 if len(shape) == 2 else 8)
        for seed, (name, shape) in enumerate(shapes.items())
    }


def make_table() -> jax.Array:
    frequencies, _ = rope.inv_frequencies({"rope_theta": 1e4}, head_dim=SIZES["rotary_dim"])
    return rope.cos_sin_cache(frequencies, max_position=PADDED)


def make_batch(form: str, *, side: str, mask: str, padding: int) -> Batch:
    """The sequences in one padded batch, with their own positions of text or of three different rows."""
    rng = np.random.default_rng(0)
    tokens = np.zeros((len(LENGTHS), PADDED), np.int32)
    is_real = np.zeros(tokens.shape, bool)
    positions = np.full((3, *tokens.shape), padding, np.int32)
    for row, length in enumerate(LENGTHS):
        at = slice(0, length) if side == "right" else slice(PADDED - length, PADDED)
        tokens[row, at], is_real[row, at] = rng.integers(0, VOCABULARY, length), True
        text = np.arange(length)
        positions[:, row, at] = text, text // 2, text // 3
    if mask == "keys":  # whatever queries there are, padding is no key
        attends = np.broadcast_to(is_real[:, None], (*tokens.shape, PADDED))
    else:  # padding is a segment of its own
        attends = is_real[:, None] == is_real[:, :, None]
    attends = attends & np.tri(PADDED, dtype=bool)
    return Batch(tokens, positions[0] if form == "text" else positions, attends, is_real)


def unpadded(batch: Batch) -> list[Batch]:
    """Each sequence alone."""
    each = []
    for row, real in enumerate(batch.is_real):
        length = real.sum()
        positions = batch.positions[..., row : row + 1, real]
        causal = np.tri(length, dtype=bool)[None]
        each.append(Batch(batch.tokens[None, row, real], positions, causal, np.ones((1, length), bool)))
    return each


def op(implementation, **static):
    return functools.partial(
        pallas_qk.fused_qk_rmsnorm_rope_gate, **SIZES, **static, norm_beta=1.0, implementation=implementation
    )


def logits_of(parameters, batch: Batch, table, implementation) -> jax.Array:
    mrope = {"mrope_section": SECTION} if batch.positions.ndim == 3 else {}
    hidden = parameters["embedding"][batch.tokens]
    for layer in range(LAYERS):
        p = {name: parameters[f"{name}{layer}"] for name in ("q", "k", "v", "q_norm", "k_norm", "out")}
        args = hidden @ p["q"], hidden @ p["k"], p["q_norm"], p["k_norm"], table, batch.positions, 1e-6
        q, k, gate = op(implementation, **mrope)(*args)
        q, k, v = (x.reshape(*hidden.shape[:2], -1, SIZES["head_dim"]) for x in (q, k, hidden @ p["v"]))
        attended = jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(batch.attends)[:, None])
        hidden = hidden + (attended.reshape(gate.shape) * jax.nn.sigmoid(gate)) @ p["out"]
    return hidden @ parameters["embedding"].T


def losses_of(parameters, batch: Batch, table, implementation) -> tuple[jax.Array, jax.Array]:
    """The sum over real tokens, each of which predicts the next one's number, and the logits."""
    logits = logits_of(parameters, batch, table, implementation)
    wanted = jax.nn.one_hot((batch.tokens + 1) % VOCABULARY, VOCABULARY)
    each = -jnp.sum(jax.nn.log_softmax(logits) * wanted, axis=-1)
    return jnp.sum(jnp.where(batch.is_real, each, 0)), logits


def loss_logits_and_gradients(batch: Batch, implementation):
    parameters, table = make_parameters(), make_table()
    with jax.default_matmul_precision("highest"):
        function = functools.partial(losses_of, batch=batch, table=table, implementation=implementation)
        (loss, logits), gradients = quick_jit(jax.value_and_grad(function, has_aux=True))(parameters)
    return float(loss), np.asarray(logits)[batch.is_real], {name: np.asarray(x) for name, x in gradients.items()}


@functools.cache
def wanted(form: str):
    """Loss, logits and gradients of the sequences one by one, in plain XLA."""
    each = unpadded(make_batch(form, side="right", mask="keys", padding=-1))
    losses, logits, gradients = zip(*(loss_logits_and_gradients(batch, "xla") for batch in each), strict=True)
    return sum(losses), np.concatenate(logits), {name: sum(g[name] for g in gradients) for name in gradients[0]}


@pytest.mark.parametrize(
    "side, mask, form",
    [
        ("right", "keys", "text"),
        ("left", "keys", "mrope"),
        ("right", "segments", "mrope"),
        ("left", "segments", "text"),
    ],
)
def test_padding_at_minus_one_trains(implementation, side, mask, form):
    want_loss, want_logits, want_gradients = wanted(form)
    batch = make_batch(form, side=side, mask=mask, padding=-1)
    loss, logits, gradients = loss_logits_and_gradients(batch, implementation)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-5)
    np.testing.assert_allclose(logits, want_logits, rtol=1e-4, atol=1e-4 * np.abs(want_logits).max())
    for name, want in want_gradients.items():
        np.testing.assert_allclose(gradients[name], want, rtol=1e-4, atol=1e-4 * np.abs(want).max(), err_msg=name)


def test_gradients_of_one_layer_are_finite_past_the_table(implementation):
    """Its outputs are NaN there, and a select masks them."""
    batch = make_batch("text", side="right", mask="keys", padding=-1)
    table, parameters = make_table(), make_parameters()
    weights = {name: parameters[name] for name in ("q0", "k0", "q_norm0", "k_norm0")}

    @quick_jit
    def gradients(weights, positions):
        def loss(weights):
            hidden = parameters["embedding"][batch.tokens]
            outputs = op(implementation)(
                hidden @ weights["q0"],
                hidden @ weights["k0"],
                weights["q_norm0"],
                weights["k_norm0"],
                table,
                positions,
                1e-6,
            )
            return sum(jnp.sum(jnp.where(batch.is_real[..., None], x, 0) ** 2) for x in outputs)

        return jax.grad(loss)(weights)

    want = gradients(weights, batch.positions)
    got = gradients(weights, np.where(batch.is_real, batch.positions, 2**30))
    for name in weights:
        assert np.isfinite(want[name]).all() and np.abs(want[name]).max() > 0
        np.testing.assert_array_equal(got[name], want[name])
