"""Every form of the call in the GPU kernels: the plain form's bits, plain XLA's values, what is emitted."""

import collections
import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_qk import _implementations, _rows
from pallas_qk._mosaic_gpu.config import MosaicBackward
from pallas_qk._triton.config import TritonBackward, TritonForward
from tests import cases, forms, mosaic_interpreter
from tests.cases import Case, Inputs
from tests.compare import assert_same
from tests.gradients import assert_agree
from tests.lowering import GPU_IMPLEMENTATIONS, lowered_text
from tests.run import run, run_backward

# A program of four rows has the q heads of one token; the k rows don't fill the last program.
PLAIN = Case(5, 4, 3, head_dim=64, rotary_dim=16, max_position=40)
FORMS = [
    dataclasses.replace(PLAIN, gate=gate, packed=packed, gathered=gathered)
    for gate, packed, gathered in itertools.product(("copied", "in_place", None), (False, True), (False, True))
]
IN_PLACE_PACKED = FORMS[7]
WITHOUT_K = [
    dataclasses.replace(PLAIN, q_alone=True),
    dataclasses.replace(PLAIN, q_alone=True, gate=None, gathered=True),
]
# Triton's interpreter takes seconds a form: each kind of gate, apart and packed.
EXECUTED = [("mosaic_gpu", case) for case in [*FORMS[1:], *WITHOUT_K]]
EXECUTED += [("triton", case) for case in [*(FORMS[i] for i in (1, 2, 4, 7, 9, 10)), *WITHOUT_K[1:]]]


def form_id(value) -> str:
    if not isinstance(value, Case):
        return str(value)
    rows = "packed" if value.packed else "alone" if value.q_alone else "apart"
    return f"{value.gate}-{rows}-{'rows' if value.gathered else 'table'}"


@functools.cache
def in_plain_form(implementation: str, case: Case):
    inputs = cases.numpy_inputs(case)
    outputs = run(implementation, case, inputs)
    return inputs, outputs, gradients(implementation, case, inputs)


def gradients(implementation: str, case: Case, inputs: Inputs, **config):
    return run_backward(implementation, case, inputs, forms.cotangents_of(case), **config)


@pytest.mark.parametrize("num_tokens", [0, 1, 9])
@pytest.mark.parametrize("implementation", ["xla", "triton", "mosaic_gpu"])
def test_weight_gradients_rounded_by_the_kernel(implementation, num_tokens):
    """To each weight's own dtype, once, in the kernel: the float32 sums, rounded."""
    case = Case(num_tokens, 4, 2, head_dim=64, rotary_dim=16)
    inputs = cases.numpy_inputs(case)
    inputs = dataclasses.replace(inputs, k_weight=inputs.k_weight.astype(jnp.float32))
    exact, rounded = (gradients(implementation, case, inputs, round_dweights=r) for r in (False, True))
    assert [x.dtype for x in exact[2:]] == [jnp.float32, jnp.float32]
    assert_same(rounded, [*exact[:2], exact[2].astype(jnp.bfloat16), exact[3]])


@pytest.mark.parametrize("implementation, case", EXECUTED, ids=form_id)
def test_a_form_has_the_bits_of_the_plain_one(implementation, case):
    inputs, outputs, plain_gradients = in_plain_form(implementation, PLAIN)
    assert_same(run(implementation, case, inputs), forms.outputs_of(case, outputs))
    assert_same(gradients(implementation, case, inputs), forms.gradients_of(case, plain_gradients))


@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
def test_a_form_agrees_with_plain_xla(implementation):
    case = IN_PLACE_PACKED
    inputs = in_plain_form(implementation, PLAIN)[0]
    assert_agree(run(implementation, case, inputs), run("xla", case, inputs))
    assert_agree(gradients(implementation, case, inputs), gradients("xla", case, inputs))


def test_other_triton_layouts_of_a_packed_array():
    case = FORMS[3]
    inputs, outputs, plain_gradients = in_plain_form("triton", PLAIN)
    assert_same(run("triton", case, inputs, config=TritonForward("chunks")), forms.outputs_of(case, outputs))
    got = gradients("triton", case, inputs, config=TritonBackward("row", 4, q_programs=2, k_programs=1))
    assert_same(got[:1], forms.gradients_of(case, plain_gradients)[:1])


@pytest.mark.parametrize(
    "implementation, section",
    [("mosaic_gpu", (3, 3, 2)), ("mosaic_gpu", (0, 8, 0)), ("mosaic_gpu", (1, 0, 7)), ("triton", (1, 0, 7))],
)
def test_sectioned_mrope_reads_each_section_s_row(implementation, section):
    """Bits as with the frequencies of each token put together before: products of 16-bit values are exact."""
    case = dataclasses.replace(PLAIN, mrope_section=section, mrope_layout="sectioned")
    inputs = cases.numpy_inputs(case)
    axes = np.repeat(np.arange(3), section)
    cos, sin = (inputs.cos_sin_cache[inputs.positions[axes].T, first + np.arange(8)] for first in (0, 8))
    row_of_each = np.concatenate([cos, sin], axis=-1), np.arange(case.num_tokens)
    rows = dataclasses.replace(inputs, cos_sin_cache=row_of_each[0], positions=row_of_each[1])
    assert_same(run(implementation, case, inputs), run(implementation, FORMS[1], rows))
    assert_same(gradients(implementation, case, inputs), gradients(implementation, FORMS[1], rows))


@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
def test_no_tokens_of_a_packed_array(implementation):
    case = dataclasses.replace(IN_PLACE_PACKED, num_tokens=0)
    inputs, cotangents = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), forms.types(case))
    outputs = function(implementation, "forward", case)(inputs)
    assert jax.tree.map(jnp.shape, outputs) == _rows.Outputs((0, 4, 64), (0, 3, 64), (0, 3, 64))
    got = function(implementation, "backward", case)(inputs, cotangents)
    assert got.q.shape == (0, (2 * 4 + 2 * 3) * 64) and got.k is None
    assert not got.q_weight.any() and not got.k_weight.any()


# What is emitted.


def function(implementation: str, direction: str, case: Case):
    return functools.partial(getattr(_implementations.module(implementation), direction), options=forms.options(case))


def emitted(direction: str, case: Case) -> str:
    """The code of the Mosaic GPU kernel."""
    args = forms.types(case)[: 1 if direction == "forward" else 2]
    return str(mosaic_interpreter.emitted(function("mosaic_gpu", direction, case), *args).kernels[0])


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("case", FORMS, ids=form_id)
def test_triton_lowers_every_form_for_cuda_to_kernels_and_reshapes(direction, case):
    """As Mosaic GPU does, or its interpreter would refuse."""
    case = dataclasses.replace(case, num_tokens=4096, num_q_heads=16)
    args = forms.types(case)[: 1 if direction == "forward" else 2]
    text = lowered_text(function("triton", direction, case), *args)
    assert set(re.findall(r"stablehlo\.(\w+)", text)) <= {"custom_call", "reshape"}
    assert text.count("custom_call") == {"forward": 1, "backward": 2}[direction]


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_row_for_each_token_needs_no_guard(direction):
    """Nor does the backward with positions, which reads row 0 of the table for those outside."""
    nans = re.compile(rf"\b({0x7FC0}|{0x7FC07FC0})\b")  # for cos, of one bfloat16 or two
    plain, gathered = (emitted(direction, dataclasses.replace(PLAIN, gathered=g)) for g in (False, True))
    assert bool(nans.search(plain)) == (direction == "forward") and not nans.search(gathered)
    assert gathered.count("llvm.load") < plain.count("llvm.load")


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("gate", ["copied", None])
def test_a_packed_array_is_accessed_as_widely_as_separate_ones(direction, gate):
    """By Mosaic GPU; that each access is aligned to its width, its interpreter checks."""

    def accesses(case):
        return collections.Counter(re.findall(r"llvm\.(load|store) .*(vector<\dxi32>)", emitted(direction, case)))

    apart, packed = (accesses(Case(16384, gate=gate, packed=packed)) for packed in (False, True))
    v = packed - apart
    assert packed == apart + v
    assert set(v) == {("load", "vector<4xi32>"), ("store", "vector<4xi32>")}
    # 256 lanes of bfloat16 by 32 threads, or by 16 where there is no gate to copy.
    assert set(v.values()) == {2 if gate is None else 1}


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_a_packed_array_past_2_31_elements(direction):
    """The last tokens have the bits that they have alone."""
    case = Case(65_600, 60, 4, packed=True, gathered=True, max_position=2)
    last = dataclasses.replace(case, num_tokens=2)
    args = [forms.split_heads(last, forms.inputs_of(last, cases.numpy_inputs(last)))]
    assert case.num_tokens * args[0].q.shape[1] > 2**31
    config = {}
    if direction == "backward":
        args.append(forms.split_heads(last, forms.as_outputs(last, forms.cotangents_of(last))))
        # The last warps end with the last rows.
        config["config"] = MosaicBackward(1, 1, q_warps=case.num_tokens, k_warps=case.num_tokens)

    def longer(x):
        # Untouched pages of zeros cost no memory.
        long = np.zeros((case.num_tokens, *x.shape[1:]), x.dtype)
        long[-2:] = x
        return long

    def of_tokens(case, **config):
        # Not the sums over tokens.
        kernel = function("mosaic_gpu", direction, case)
        return lambda *args: [x for x in jax.tree.leaves(kernel(*args, **config)) if x.ndim > 1]

    long_args = jax.tree.map(lambda x: longer(x) if x.shape[0] == 2 else x, args)
    got = mosaic_interpreter.execute(of_tokens(case, **config), *long_args, programs=slice(-60, None))
    want = mosaic_interpreter.execute(of_tokens(last), *args)
    assert_same([x[-2:] for x in got], want)


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("implementation", GPU_IMPLEMENTATIONS)
def test_a_packed_array_past_2_31_elements_on_a_gpu(gpu, implementation):
    case = Case(65_600, 60, 4, packed=True, gathered=True)
    last = dataclasses.replace(case, num_tokens=2)
    inputs = cases.make_inputs(case)
    ends = {name: getattr(inputs, name)[-2:] for name in ("q_gate", "k", "positions")}
    inputs_of_last = dataclasses.replace(inputs, **ends)
    q, k, v, gate = run(implementation, case, inputs)
    assert_same([v], [forms.values(case)])
    q_of_last, k_of_last, _, gate_of_last = run(implementation, last, inputs_of_last)
    assert_same([q[-2:], k[-2:], gate[-2:]], [q_of_last, k_of_last, gate_of_last])
    # Outputs serve as cotangents.
    got = run_backward(implementation, case, inputs, [q, k, v, gate])[0]
    want = run_backward(implementation, last, inputs_of_last, [q_of_last, k_of_last, v[-2:], gate_of_last])[0]
    assert_same([got[-2:]], [want])
