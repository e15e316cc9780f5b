"""Kernels that update an array in place, where the array is a slice of another one or goes into one.

XLA of JAX 0.11.2 fuses a GPU kernel with a slice in front of it and an update behind it, and loses that operand and
result are one array: without barriers most of these forms are wrong on a GPU. Where there is none plain XLA runs them,
and the barriers are looked for in programs for CUDA.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from tests import cached, forms, test_gate, test_projection_cache
from tests.cached import CachedCase
from tests.cases import Case, make_inputs
from tests.compare import assert_same
from tests.lowering import lowered_text
from tests.run import has_gpu

LAYERS = 3
CASE = Case(24, 4, 2, max_position=64, packed=True)
FORM = CachedCase(CASE, num_blocks=4, block_size=16)
HERE = ("mosaic_gpu", "triton") if has_gpu() else ("xla",)


def layers_of(calls, implementation):
    """What each layer does with (x, caches), and x of all layers, from a file that has `arguments` and `op` of a form.

    By `cached` x is a packed projection, by `test_projection_cache` hidden states.
    """
    x, *others, _, slots = calls.arguments(FORM)

    def step(x, caches):
        outputs = calls.op(FORM, implementation)(x, *others, caches, slots)
        return outputs.q, outputs.kv_cache

    return step, jnp.stack([jnp.roll(x, layer, 0) for layer in range(LAYERS)])


def caches_of_layers():
    of_each = [[jnp.asarray(x) for x in cached.caches(FORM, seed=layer)] for layer in range(LAYERS)]
    return tuple(map(jnp.stack, zip(*of_each, strict=True)))


def at(caches, layer):
    return jax.tree.map(lambda x: x[layer], caches)


def one_by_one(step, xs, caches):
    """What each form gives: layers in programs of their own."""
    each = [jax.jit(step)(xs[layer], at(caches, layer)) for layer in range(LAYERS)]
    return jax.tree.map(lambda *x: jnp.stack(x), *each)


def scanned(step, xs, caches):
    return lax.scan(lambda _, x: (None, step(*x)), None, (xs, caches))[1]


def unrolled(step, xs, caches):
    each = [step(xs[layer], at(caches, layer)) for layer in range(LAYERS)]
    return jax.tree.map(lambda *x: jnp.stack(x), *each)


def set_back(step, xs, caches):
    qs = []
    for layer in range(LAYERS):
        q, written = step(xs[layer], at(caches, layer))
        caches = jax.tree.map(lambda x, new, layer=layer: x.at[layer].set(new), caches, written)
        qs.append(q)
    return jnp.stack(qs), caches


def set_back_in_a_loop(step, xs, caches):
    def body(caches, layer):
        q, written = step(xs[layer], at(caches, layer))
        return jax.tree.map(lambda x, new: x.at[layer].set(new), caches, written), q

    caches, qs = lax.scan(body, caches, jnp.arange(LAYERS))
    return qs, caches


def from_one_array(step, xs, caches):
    both = jnp.stack(caches, axis=1)
    return lax.scan(lambda _, x: (None, step(x[0], (x[1][0], x[1][1]))), None, (xs, both))[1]


FORMS = (scanned, unrolled, set_back, set_back_in_a_loop, from_one_array)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize("implementation", HERE)
@pytest.mark.parametrize("donated", [False, True])
def test_caches_of_layers(form, implementation, donated):
    assert_right(form, *layers_of(cached, implementation), donated)


@pytest.mark.parametrize("implementation", HERE)
def test_one_array_for_k_and_for_v(implementation):
    """An eager call may be given it: each result is an array of its own."""
    step, xs = layers_of(cached, implementation)
    cache, _ = at(caches_of_layers(), 0)
    assert_same(step(xs[0], (cache, cache)), step(xs[0], (cache, jnp.array(cache))))


@pytest.mark.gpu
@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_caches_of_layers_by_the_projection(form):
    assert_right(form, *layers_of(test_projection_cache, "mosaic_gpu"), donated=True)


def assert_right(form, step, xs, donated):
    caches = caches_of_layers()
    before = jax.tree.map(np.array, caches)
    want = one_by_one(step, xs, caches)
    program = jax.jit(functools.partial(form, step), donate_argnums=1 if donated else ())
    assert_same(program(xs, jax.tree.map(jnp.array, caches) if donated else caches), want)
    assert_same(caches, before)


# --- tokens ---------------------------------------------------------------------------------------------------------
# A fused slice may begin anywhere, at addresses that are multiples of a row's bytes and no more.

CUT = 3, 67
CUT_FORMS = {
    "16/2": Case(CUT[1], 4, 2, max_position=64),
    "packed": Case(CUT[1], 4, 2, max_position=64, packed=True),
    "rows of 80": Case(CUT[1], 3, 1, head_dim=80, rotary_dim=40, max_position=64),
    "rows of 65": Case(CUT[1], 3, 1, head_dim=65, rotary_dim=2, max_position=64, dtype="float16"),
    "a row of the table for each": Case(CUT[1], 4, 2, rotary_dim=6, max_position=64, gathered=True),
    "positions of a byte": Case(CUT[1], 4, 2, max_position=64, positions_dtype="uint8"),
}


@pytest.mark.parametrize("case", CUT_FORMS.values(), ids=CUT_FORMS)
@pytest.mark.parametrize("implementation", HERE)
def test_tokens_cut_out_of_more(case, implementation):
    arrays = forms.arguments(case, make_inputs(case))
    op = forms.op(dataclasses.replace(case, num_tokens=CUT[1] - CUT[0]), implementation)

    def cut(x):
        return x[CUT[0] :] if x.shape[0] == case.num_tokens else x

    got = jax.jit(lambda *arrays: op(*map(cut, arrays)))(*arrays)
    assert_same(got, jax.jit(op)(*jax.device_put([np.array(cut(x)) for x in arrays])))


@pytest.mark.parametrize("head_dim", [64, 192])
@pytest.mark.parametrize("implementation", HERE)
def test_weights_of_layers(head_dim, implementation):
    """Those of a scan's layers begin at multiples of 128 bytes here, and so do their gradients."""
    case = Case(8, 4, 2, head_dim=head_dim, rotary_dim=64, max_position=64)
    q_gate, k, *weights, table, positions = forms.arguments(case, make_inputs(case))
    weights = [jnp.stack([x * (1 + layer) for layer in range(LAYERS)]) for x in weights]
    op = forms.op(case, implementation)

    def loss(weights):
        return sum(jnp.sum(x.astype(jnp.float32)) for x in op(q_gate, k, *weights, table, positions))

    gradient = jax.value_and_grad(loss)
    got = jax.jit(lambda weights: lax.scan(lambda _, x: (None, gradient(x)), None, weights)[1])(weights)
    want = [jax.jit(gradient)([x[layer] for x in weights]) for layer in range(LAYERS)]
    assert_same(got[1], jax.tree.map(lambda *x: jnp.stack(x), *(gradients for _, gradients in want)))


# --- a gate that is handed on -------------------------------------------------------------------------------------
# The op's backward adds q's gradient to the array with the gate's, in place.

GATED = Case(24, 4, 2, max_position=64, gate="handed_on")


def loss(attended, q_gate, others, implementation):
    outputs = test_gate.block(GATED, implementation)(attended, q_gate, *others)
    return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in outputs)


def stacked_gradients(of_layer, attended, q_gates):
    return lax.scan(lambda _, q_gate: (None, jax.grad(of_layer)(q_gate, attended)), None, q_gates)[1]


def gradient_of_a_scan(of_layer, attended, q_gates):
    def total(q_gates):
        return lax.scan(lambda sum_, q_gate: (sum_ + of_layer(q_gate, attended), None), 0.0, q_gates)[0]

    return jax.grad(total)(q_gates)


def gradient_of_slices(of_layer, attended, q_gates):
    return jax.grad(lambda q_gates: sum(of_layer(q_gates[layer], attended) for layer in range(LAYERS)))(q_gates)


@pytest.mark.parametrize("form", [stacked_gradients, gradient_of_a_scan, gradient_of_slices])
@pytest.mark.parametrize("implementation", HERE)
def test_gradients_of_gates(form, implementation):
    attended, q_gate, *others = test_gate.arrays_of(GATED)
    q_gates = jnp.stack([jnp.roll(q_gate, layer, 0) for layer in range(LAYERS)])

    def of_layer(q_gate, attended):
        return loss(attended, q_gate, others, implementation)

    want = jnp.stack([jax.jit(jax.grad(of_layer))(x, attended) for x in q_gates])
    assert_same(jax.jit(functools.partial(form, of_layer))(attended, q_gates), want)


# --- barriers -----------------------------------------------------------------------------------------------------


def operands_and_results(text: str) -> tuple[list[str], list[str]]:
    """Those of the kernels of a lowered program, as its text calls them."""
    operands, results = [], []
    for result, count, given in re.findall(r"(%\w+)(:\d+)? = stablehlo.custom_call @\S+?\(([^)]*)\)", text):
        operands += given.split(", ")
        results += [f"{result}#{place}" for place in range(int(count[1:]))] if count else [result]
    return operands, results


def write(x, caches):
    return layers_of(cached, "mosaic_gpu")[0](x, caches)


def project_and_write(x, caches):
    return layers_of(test_projection_cache, "mosaic_gpu")[0](x, caches)


def differentiate(attended, q_gate):
    _, _, *others = test_gate.arrays_of(GATED)
    return jax.grad(lambda x: loss(attended, x, others, "mosaic_gpu"))(q_gate)


@pytest.mark.parametrize("function", [write, project_and_write, differentiate], ids=lambda x: x.__name__)
def test_kernels_lie_between_barriers(function):
    if function is differentiate:
        args = tuple(test_gate.arrays_of(GATED)[:2])
    else:
        (_, xs), caches = layers_of(cached if function is write else test_projection_cache, None), caches_of_layers()
        args = xs[0], at(caches, 0)
    text = lowered_text(function, *args)
    operands, results = operands_and_results(text)
    assert len(operands) >= 8 and len(results) >= 4
    for operand in operands:
        assert re.search(rf"{operand} = stablehlo.optimization_barrier ", text), operand
    for result in results:
        assert re.search(rf"stablehlo.optimization_barrier {result}( |$)", text, re.MULTILINE), result
