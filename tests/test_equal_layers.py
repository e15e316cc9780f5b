"""Equal layers of a model, unrolled, are traced and lowered once: a layer more costs a call of what is there."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_qk import _dispatch
from tests import cached, forms, lowering
from tests.cached import CachedCase
from tests.cases import Case, make_inputs
from tests.lowering import FIRST, GPU_IMPLEMENTATIONS

CASE = Case(4, 4, 2, head_dim=64, rotary_dim=16, max_position=40)
LAYERS = CachedCase(CASE, cache_axes="l b s h d")


def kernels(function, *args) -> list[str]:
    """Without a mesh, even one that names a GPU: JAX tells arguments from the results of a layer by it."""
    return lowering.kernels(jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text())


@pytest.fixture
def traced(monkeypatch):
    """A name for each time that the op on one device is traced."""
    names = []

    def count(name):
        original = getattr(_dispatch, name)

        def counted(*args, **options):
            names.append(name)
            return original(*args, **options)

        monkeypatch.setattr(_dispatch, name, counted)

    count("forward")
    count("backward")
    jax.clear_caches()
    return names


def model(case: Case, name: str, num_layers: int):
    """Layers of the op, each with what the one before has made and with weights of its own."""
    op = forms.op(case, name)

    def run(q_gate, k, weights, table, positions):
        for q_weight, k_weight in weights:
            q, k, gate = op(q_gate, k, q_weight, k_weight, table, positions)
            q_gate = jnp.stack([q, gate], axis=-1).reshape(q_gate.shape)
        return q_gate, k

    x = make_inputs(case)
    return run, [x.q_gate, x.k, [(x.q_weight, x.k_weight)] * num_layers, x.cos_sin_cache, x.positions]


@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_forward(traced, name):
    one, five = (kernels(run, *args) for run, args in (model(CASE, name, 1), model(CASE, name, 5)))
    assert len(one) == 1 and five == one
    assert traced == ["forward"]


@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_backward(traced, name):
    run, args = model(CASE, name, 5)

    def loss(*args):
        return sum(x.astype(jnp.float32).sum() for x in run(*args))

    found = kernels(jax.grad(loss, (0, 1, 2)), *args)
    assert len(set(found)) == len(found) and {x.rpartition("_")[2] for x in found} >= {"forward", "backward"}
    assert traced == ["forward", "backward"]


def test_layers_of_a_stacked_cache_by_python_s_integers(traced):
    def run(cache, *arrays):
        for layer in range(3):
            qkv, weights, slots = arrays[0], arrays[1:5], arrays[5]
            cache = cached.op(LAYERS, FIRST)(qkv, *weights, cache, slots, layer=layer).kv_cache
        return cache

    *arrays, cache, slots = cached.arguments(LAYERS)
    assert len(kernels(run, cache, *arrays, slots)) == 1
    assert traced == ["forward"]


def test_layers_that_differ_are_traced_each(traced):
    other = dataclasses.replace(CASE, eps=1e-5)

    def run(*arrays):
        return [forms.op(case, FIRST)(*arrays) for case in (CASE, other, CASE)]

    assert len(kernels(run, *make_inputs(CASE))) == 2
    assert traced == ["forward"] * 2
