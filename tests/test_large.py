"""Arrays of more than 2^32 elements, on a GPU with memory for them: every element has the bits of a small call.

In every array that has a row of heads a token, element offsets pass 2^31, 2^32 or both; all of them are compared. The
inputs repeat a block of a prime number of tokens, so that an offset that has lost its upper bits lands on other values.
`test_parity` and `test_triton_vjp` have the first offsets past 2^31 through the public op.
"""

import dataclasses
import functools
import gc
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_qk import _mosaic_gpu
from pallas_qk._mosaic_gpu.config import MosaicForward
from pallas_qk._rows import Inputs
from tests import forms, run, strategies
from tests.cases import Case
from tests.compare import assert_same
from tests.lowering import GPU_IMPLEMENTATIONS
from tests.mosaic_interpreter import execute

BLOCK = 4099  # tokens, a prime


@pytest.fixture
def memory(gpu):
    """Skips where JAX has fewer bytes than asked for; frees what is there before and after."""
    gc.collect()

    def needs(num_bytes):
        limit = jax.local_devices()[0].memory_stats()["bytes_limit"]
        if limit < num_bytes:
            pytest.skip(f"needs {num_bytes / 1e9:.0f} GB of GPU memory, got {limit / 1e9:.0f} GB for JAX")

    yield needs
    gc.collect()


def bits(x):
    return jax.lax.bitcast_convert_type(x, jnp.uint16)


@functools.partial(jax.jit, static_argnames=("repeats", "axis"))
def repeated(x, repeats: int, axis: int):
    return jnp.tile(x, tuple(repeats if i == axis else 1 for i in range(x.ndim)))


@jax.jit
def differences(big, block):
    """The number of differing elements of each repetition of the block."""
    blocks = bits(big).reshape(-1, *block.shape)
    return jnp.sum(blocks != bits(block)[None], axis=tuple(range(1, blocks.ndim)), dtype=jnp.int32)


def assert_repeats(name: str, big: jax.Array, block: jax.Array) -> None:
    differing = np.asarray(differences(big, block))
    assert not differing.any(), f"{name}: block {int(np.argmax(differing > 0))} of {differing.size} differs"


def kernel(direction: str, implementation: str, case: Case):
    return run.kernel(direction, implementation, forms.options(case), is_empty=False)


def small(case: Case):
    """A block's inputs and cotangents, in the shapes of the implementations."""
    inputs = strategies.make_inputs(case)
    inputs = dataclasses.replace(inputs, positions=jnp.clip(inputs.positions, 0, case.max_position - 1))
    cotangents = forms.as_outputs(case, forms.cotangents_of(case))
    return forms.split_heads(case, forms.inputs_of(case, inputs)), forms.split_heads(case, cotangents)


def large(x, repeats: int):
    """The tree with each array of tokens repeated, once if it stands there twice; positions have their tokens last."""
    if isinstance(x, Inputs):
        q, k = (None if a is None else repeated(a, repeats, 0) for a in (x.q, x.k))
        return x._replace(q=q, k=k, positions=repeated(x.positions, repeats, 1))
    arrays = {id(a): a for a in jax.tree.leaves(x)}
    arrays = {name: repeated(a, repeats, 0) for name, a in arrays.items()}
    return jax.tree.map(lambda a: arrays[id(a)], x)


FORMS = {
    # q_gate 2^33, k, each output and each cotangent 2^32 elements and some.
    "separate": Case(BLOCK, 32, 32),
    # qkv and its gradient 2^33, each output and cotangent 2^31 and some.
    "packed": Case(BLOCK, 32, 32, packed=True),
}


def sized(name: str, limit: int):
    """The block, the call whose smallest array has more than `limit` elements, and how often that repeats the block."""
    case = FORMS[name]
    repeats = math.ceil((limit / (case.num_kv_heads * case.head_dim) + 2) / case.num_tokens)
    return case, dataclasses.replace(case, num_tokens=repeats * case.num_tokens), repeats


def bytes_of(case: Case, heads: int) -> int:
    """Of `heads` arrays (T, 32*D)."""
    return 2 * case.num_tokens * case.num_q_heads * case.head_dim * heads


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("name, limit", [("separate", 2**32), ("packed", 2**31)])
def test_forward(memory, implementation, name, limit):
    case, many, repeats = sized(name, limit)
    memory(1.2 * bytes_of(many, heads=8 if case.packed else 6))
    operands, _ = small(case)
    want = kernel("forward", implementation, case)(operands)
    got = kernel("forward", implementation, many)(large(operands, repeats))
    for output, (a, b) in zip(want._fields, zip(got, want, strict=True), strict=True):
        if b is not None:
            assert_repeats(output, a, b)


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
@pytest.mark.parametrize("name, limit", [("separate", 2**32), ("packed", 2**31)])
def test_backward(memory, implementation, name, limit):
    """Of q_gate and k, or of qkv; every cotangent has more than `limit` elements."""
    case, many, repeats = sized(name, limit)
    memory(1.1 * bytes_of(many, heads=12 if case.packed else 7))
    operands, cotangents = small(case)
    if not case.packed:  # one array is all three cotangents: 60 GB in all, where three would make it 77
        cotangents = jax.tree.map(lambda _: cotangents.q, cotangents)
    want = kernel("backward", implementation, case)(operands, cotangents)
    got = kernel("backward", implementation, many)(large(operands, repeats), large(cotangents, repeats))
    for gradient in ("q", "k"):
        if getattr(want, gradient) is not None:
            assert_repeats(gradient, getattr(got, gradient), getattr(want, gradient))


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
def test_table(memory, implementation):
    """A table of more than 2^32 elements, forward and backward: rows at its end are those of a small table."""
    few, rotary_dim = 4096, 64
    max_position = 2**32 // rotary_dim + 2 * few
    memory(2 * max_position * rotary_dim * 2.2)
    case = Case(257, 2, 1, max_position=few)
    operands, cotangents = small(case)

    @jax.jit
    def extended(table):
        return jnp.zeros((max_position, rotary_dim), table.dtype).at[-few:].set(table)

    far = operands._replace(
        cos_sin_cache=extended(operands.cos_sin_cache), positions=operands.positions + (max_position - few)
    )
    far_case = dataclasses.replace(case, max_position=max_position)
    want, got = (kernel("forward", implementation, c)(x) for c, x in ((case, operands), (far_case, far)))
    for output in ("q", "k", "gate"):
        assert_repeats(output, getattr(got, output), getattr(want, output))
    want, got = (kernel("backward", implementation, c)(x, cotangents) for c, x in ((case, operands), (far_case, far)))
    for gradient in ("q", "k"):
        assert_repeats(gradient, getattr(got, gradient), getattr(want, gradient))
    assert_same([got.q_weight, got.k_weight], [want.q_weight, want.k_weight])


@pytest.mark.gpu
def test_the_comparison_sees_one_element(memory):
    block = jnp.zeros((BLOCK, 1, 8), jnp.bfloat16)
    big = repeated(block, 5, 0)
    assert_repeats("x", big, block)
    with pytest.raises(AssertionError, match="block 3 of 5"):
        assert_repeats("x", big.at[3 * BLOCK + 7, 0, 2].set(1), block)


def test_outputs_of_the_mosaic_kernel_by_its_interpreter():
    """The last rows of an output of 2^32 elements and some, without a GPU; test_mosaic_gpu_vjp has such gradients."""
    few = Case(2, 32, 1, gate=None)
    num_tokens = 2**32 // (few.num_q_heads * few.head_dim) + 12  # fills programs: the last of q and of k come last
    config = MosaicForward("halves", 1)

    def forward(inputs):
        return tuple(_mosaic_gpu.forward(inputs, options=forms.options(few), config=config)[:2])

    tail, _ = small(few)
    tail = jax.tree.map(np.asarray, tail)
    # Untouched pages of zeros cost no memory.
    q, k = (np.zeros((num_tokens, *x.shape[1:]), x.dtype) for x in (tail.q, tail.k))
    positions = np.zeros((1, num_tokens), np.int32)
    q[-2:], k[-2:], positions[:, -2:] = tail.q, tail.k, tail.positions
    got = execute(forward, tail._replace(q=q, k=k, positions=positions), programs=slice(-40, None))
    want = execute(forward, tail)
    assert_same([x[-2:] for x in got], list(want))
