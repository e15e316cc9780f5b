"""The suite `model`: layers of a model in each form, compared with each other before they are timed."""

import functools
import importlib.util
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if any(importlib.util.find_spec(name) is None for name in ("torch", "triton")):
    pytest.skip("needs torch and triton", allow_module_level=True)

from benchmarks import model, record
from benchmarks.__main__ import main
from benchmarks.providers import JAX_OPS
from benchmarks.timing import Samples
from tests.cases import Case
from tests.run import quick_jit

GATED = model.Model("gated", 1, 32, Case(32, 2, 1, 32, 8, gate="in_place"), length=16)
PLAIN = model.Model("plain", 1, 32, Case(32, 2, 1, 16, 16, gate=None), length=16)


@pytest.fixture(autouse=True)
def as_users_run_it(monkeypatch, on_the_host):
    """JAX's own promotions, and a compiler that hurries."""
    monkeypatch.setattr(model, "compiled", lambda function, *args: quick_jit(function).lower(*args).compile())
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def recorded(tmp_path) -> record.Run:
    return record.Run("20260101T000000Z-abc", "NVIDIA H200", {"jax": "1"}, tmp_path / "h200.jsonl")


@pytest.fixture
def timed(monkeypatch):
    """In the place of the profiler: how the programs were timed."""
    seen = []

    def measure(case, calls, **settings):
        seen.append((case, list(calls), settings))
        return {name: Samples((1e4 - 1e3 * i,), ("k",) * (9 - i)) for i, name in enumerate(calls)}

    monkeypatch.setattr(model, "measure", measure)
    return seen


def test_rows_have_the_time_and_the_memory_of_each_form_as_shares_of_plain_jnp(recorded, timed, capsys):
    assert model.run([PLAIN], recorded) == 0
    rows = [json.loads(line) for line in recorded.output.read_text().splitlines()]
    assert [(row["op"], row["form"]) for row in rows] == [(step, form) for step in model.STEPS for form in model.FORMS]
    settings = {"repeats": 3, "rounds": 3}
    assert timed == [(PLAIN.case, ["plain", "three", "barriers", "packed"], settings)] * 2
    assert [row["share_of_plain"] for row in rows] == [1.0, 0.9, 0.8, 0.7] * 2
    assert [row["implementation"] for row in rows] == ["xla_plain", "xla", "xla", "xla"] * 2
    assert all(row["temp_bytes"] > 0 and row["attention"] == "xla" and row["layers"] == 1 for row in rows)
    assert [row["checked"]["against"] for row in rows] == ["none: the reference", *["plain jnp"] * 3] * 2
    assert rows[1]["checked"]["elements"] == 32 * 32 < rows[5]["checked"]["elements"]
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "training step" in line and "packed" in line)
    assert line.split()[:10] == ["1", "of", "plain", "32", "training", "step", "packed", "7.00", "0.700", "6"]


def test_a_form_that_computes_something_else_is_not_timed(monkeypatch, recorded, timed, capsys):
    """Here the op reads one row of its table for all tokens."""
    op_of = JAX_OPS["xla"]
    monkeypatch.setitem(
        JAX_OPS, "xla", lambda case: lambda *arrays: op_of(case)(*arrays[:-1], jnp.zeros_like(arrays[-1]))
    )
    monkeypatch.setattr(model, "FORMS", {name: model.FORMS[name] for name in ("plain", "packed")})
    monkeypatch.setattr(model, "STEPS", ["forward"])
    assert model.run([GATED], recorded) == 1
    assert timed[0][1] == ["plain"]
    assert re.search(r": packed .* differ, by .*: BROKEN, promised within 6.2e-02 relative", capsys.readouterr().out)


def test_a_layer_is_attention_and_an_mlp():
    """In float32 and float64's NumPy, for one head, with plain jnp in the op's place and without a rotation."""
    small = model.Model("one head", 1, 16, Case(8, 1, 1, 16, 4, "float32", gate="in_place"), length=4)
    (weights,) = model.random_weights(small)
    hidden = np.random.default_rng(0).standard_normal((8, 16), np.float32)
    table = jnp.concatenate([jnp.ones((1, 2)), jnp.zeros((1, 2))], axis=1)
    positions = jnp.zeros(8, jnp.int32)
    with jax.default_matmul_precision("highest"):
        layer = functools.partial(model.forward, small, model.FORMS["plain"], "xla")
        got = quick_jit(layer)([weights], hidden, table, positions)
    w = {name: np.asarray(x, np.float64) for name, x in weights.items()}

    def norm(x, weight):
        return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6) * weight

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    x = norm(hidden, w["input_norm"])
    q, gate = np.split(x @ w["q"], 2, axis=-1)
    q, k, v = norm(q, w["q_norm"]), norm(x @ w["k"], w["k_norm"]), x @ w["v"]
    attended = np.zeros_like(v)
    for i in range(8):
        seen = slice(i // 4 * 4, i + 1)  # of its own sequence
        p = np.exp(k[seen] @ q[i] / 4)
        attended[i] = (p / p.sum()) @ v[seen]
    after = hidden + (attended * sigmoid(gate)) @ w["out"]
    x = norm(after, w["mlp_norm"])
    up = x @ w["mlp_gate"]
    want = after + (up * sigmoid(up) * (x @ w["mlp_up"])) @ w["mlp_down"]
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_what_the_gpu_cannot_hold_is_skipped(monkeypatch, recorded, capsys):
    def full(*_):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nmore")

    monkeypatch.setattr(model, "programs", full)
    assert model.run([PLAIN], recorded) == 0
    assert "plain forward skipped: the GPU's memory did not hold it: RESOURCE_EXHAUSTED" in capsys.readouterr().out

    def broken(*_):
        raise RuntimeError("something else")

    monkeypatch.setattr(model, "programs", broken)
    with pytest.raises(RuntimeError, match="something else"):
        model.run([PLAIN], recorded)


def test_the_command_runs_the_models(monkeypatch, tmp_path):
    from benchmarks import __main__

    seen = []
    monkeypatch.setattr(__main__, "missing", lambda command: None)
    monkeypatch.setattr(model, "run", lambda models, recorded, *settings: seen.append((models, settings)) or 0)
    arguments = ["run", "--suite", "model", "--rounds", "2", "--output", str(tmp_path / "a.jsonl"), "--commit", "abc"]
    assert main(arguments) == 0
    assert seen == [(model.MODELS, (None, 2))]
    shapes = {x.name: (x.num_layers, x.hidden, x.case.num_tokens, x.case.num_q_heads) for x in model.MODELS}
    assert shapes == {
        "Qwen3.5": (4, 2048, 16384, 16),
        "Qwen3-8B": (4, 4096, 16384, 32),
        "Qwen3-1.7B": (4, 2048, 16384, 16),
        "Qwen3-0.6B": (8, 1024, 32768, 16),
    }
