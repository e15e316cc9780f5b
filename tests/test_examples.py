"""The examples, shortly."""

import math
import re
import sys

import jax
import pytest

from tests.pages import shown, without_numbers


def test_training_step_learns(monkeypatch, capsys):
    pytest.importorskip("tqdm", reason="the example's progress bar")
    from examples import train_step

    monkeypatch.setattr(sys, "argv", ["train_step", "--steps", "120"])
    train_step.main()
    lines = capsys.readouterr().out.splitlines()
    assert without_numbers(lines) == without_numbers(shown("train_step"))
    first, last = (float(re.search(rf"([0-9.]+) at {place}", lines[0])[1]) for place in ("first", "last"))
    assert abs(first - math.log(train_step.VOCABULARY)) < 0.2 and last < 0.1


def test_sharded_gives_the_bits_of_one_device(capsys):
    from examples import sharded

    sharded.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and (len(jax.devices()) != 8 or without_numbers(lines) == without_numbers(shown("sharded")))
    assert lines[1].endswith("collectives []") and lines[3].endswith("collectives []")
    assert lines[4:] == ["the compiler partitions: the bits of one device", "in shard_map: the bits of one device"]


def test_gated_attention_decodes_what_the_whole_sequences_give(capsys):
    from examples import gated_attention

    # JAX's own attention needs the standard promotion; TF32 on a GPU would be coarser than the bound.
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        gated_attention.main()
    lines = capsys.readouterr().out.splitlines()
    assert without_numbers(lines) == without_numbers(shown("gated_attention"))
    assert all(float(line.split("within ")[1].split()[0]) < 1e-5 for line in lines)


def test_the_module_of_gated_attention(capsys):
    """It learns, and its methods are the functions that the layer's own tests check."""
    pytest.importorskip("flax", reason="the example is a Flax NNX module")
    import jax.numpy as jnp

    from examples import gated_attention, gated_attention_nnx

    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        gated_attention_nnx.main()
        first, last = (float(word) for word in capsys.readouterr().out.replace(",", "").split() if "." in word)
        assert last < first / 4

        config, table = gated_attention.read_config(gated_attention.TEXT_CONFIG, max_position=8, dtype=jnp.float32)
        parameters = gated_attention.random_parameters(jax.random.key(0), 32, config, jnp.float32)
        layer = gated_attention_nnx.GatedAttention(parameters, config)
        hidden, positions = jax.random.normal(jax.random.key(1), (2, 5, 32)), jnp.tile(jnp.arange(5), (2, 1))
        whole = layer(hidden, positions, table)
        lengths = jnp.full((2,), 4, jnp.int32)
        outputs, cache = layer.prefill(hidden[:, :4], lengths, positions[:, :4], table, cache_length=5)
        token, _ = layer.decode(hidden[:, 4:], positions[:, 4:], table, cache)
        assert jnp.abs(jnp.concatenate([outputs, token], axis=1) - whole).max() < 1e-5
