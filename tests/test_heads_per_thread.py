"""The Mosaic GPU forward with several heads of one token per thread: the bits of one head, in every form of a call."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_qk import _mosaic_gpu, _rows
from pallas_qk._mosaic_gpu.config import MosaicForward
from pallas_qk._options import Options
from tests import cached, forms
from tests.cached import CachedCase
from tests.cases import Case, numpy_inputs
from tests.compare import assert_same
from tests.mosaic_interpreter import emitted
from tests.run import kernel

# Groups of two heads of five tokens leave some threads of the last program without one.
PLAIN = Case(5, 4, 2, head_dim=64, rotary_dim=64, gate=None, max_position=40)
CASES = (
    PLAIN,
    *(dataclasses.replace(PLAIN, gate=gate, rotary_dim=16) for gate in ("copied", "in_place")),
    dataclasses.replace(PLAIN, packed=True),
    dataclasses.replace(PLAIN, packed=True, gate="copied", gathered=True),
    dataclasses.replace(PLAIN, packed=True, gate="in_place", rotary_dim=16, dtype="float16"),
    dataclasses.replace(PLAIN, mrope_section=(12, 10, 10), norm_beta=1.0, cache_dtype="float32"),
    dataclasses.replace(PLAIN, mrope_section=(0, 20, 12), mrope_layout="sectioned", dtype="float32"),
    dataclasses.replace(PLAIN, rotation="pairs"),
    dataclasses.replace(PLAIN, rotation="pairs", round_norm=False, rotary_dim=16, gate="copied"),
    dataclasses.replace(PLAIN, head_dim=80, rotary_dim=40),
    dataclasses.replace(PLAIN, rotary_dim=0, gate="copied"),
    dataclasses.replace(PLAIN, norm_order="rotation_first"),
    dataclasses.replace(
        PLAIN, norm_order="rotation_first", round_norm=False, rotation="pairs", mrope_section=(12, 10, 10)
    ),
    dataclasses.replace(PLAIN, weights=False, gate="copied"),
    dataclasses.replace(PLAIN, weights=False, separate_v=True, v_norm=True),
    dataclasses.replace(PLAIN, packed=True, v_norm=True),
    dataclasses.replace(PLAIN, separate_v=True, gate="copied", rotary_dim=16),
    dataclasses.replace(PLAIN, q_alone=True, num_kv_heads=0, gate="in_place"),
    dataclasses.replace(PLAIN, num_tokens=1),
    dataclasses.replace(PLAIN, num_q_heads=3, gate="copied"),  # odd heads of q, then of k
    dataclasses.replace(PLAIN, num_kv_heads=3, packed=True),
    dataclasses.replace(PLAIN, num_q_heads=6, num_kv_heads=1),
)
IN_CACHE = (
    CachedCase(PLAIN, "b h s d"),
    CachedCase(dataclasses.replace(PLAIN, packed=True), "b s (h c) d", return_kv=True),
    CachedCase(dataclasses.replace(PLAIN, gate="copied"), "l b h s (c d)", kv_dtype="float32"),
    *(
        CachedCase(dataclasses.replace(PLAIN, num_kv_heads=4), axes, "float8_e4m3fn", scale_per_head=scale_per_head)
        for axes, scale_per_head in (("b s h d", (True, True)), ("b h s (c d)", (False, True)))
    ),
)


def configs(case: Case):
    """Those of one head per thread."""
    layout = "row" if case.rotation == "pairs" or case.head_dim == 80 or not case.rotary_dim else "halves"
    for weights, k_first in (("first", True), ("after_gate", False), ("after_sum", False)):
        yield MosaicForward(layout, 4, weights, k_first)
    if layout == "halves":
        yield MosaicForward("chunks", 2, "first")
        yield MosaicForward("row", 2, "after_gate", cast_first=False)


def assert_equal_bits(
    inputs: _rows.Inputs,
    options: Options,
    config: MosaicForward,
    want,
    heads=((2, 1, True), (2, 2, False), (4, 1, False), (4, 3, True)),
) -> None:
    for number, ahead, apart in heads:
        several = dataclasses.replace(config, heads_per_thread=number, heads_ahead=ahead, heads_apart=apart)
        assert_same(kernel("forward", "mosaic_gpu", options, False, config=several)(inputs), want)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_form_has_the_bits_of_one_head(case):
    inputs = forms.split_heads(case, forms.inputs_of(case, numpy_inputs(case)))
    want = kernel("forward", "mosaic_gpu", forms.options(case), False)(inputs)
    for config in configs(case):
        assert_equal_bits(inputs, forms.options(case), config, want)


@pytest.mark.parametrize("case", IN_CACHE, ids=lambda case: case.id)
def test_rows_of_a_cache_have_the_bits_of_one_head(case):
    inputs = cached.inputs_of(case)
    want = kernel("forward", "mosaic_gpu", case.options, False)(inputs)
    for config in configs(case.case):
        assert_equal_bits(inputs, case.options, config, want, heads=((2, 1, True), (2, 2, False)))


def test_positions_outside_reach_every_head():
    inputs = forms.split_heads(PLAIN, forms.inputs_of(PLAIN, numpy_inputs(PLAIN)))
    inputs = inputs._replace(positions=np.array([[40, -1, 3, 2**31 - 1, 39]], np.int32))
    want = kernel("forward", "mosaic_gpu", forms.options(PLAIN), False)(inputs)
    assert np.isnan(np.asarray(want.q).astype(np.float32)).any(axis=-1).tolist() == [
        [outside] * 4 for outside in (True, False, False, True, False)
    ]
    assert_equal_bits(inputs, forms.options(PLAIN), MosaicForward("halves", 4, "first"), want)


@functools.cache
def code(case: Case | CachedCase, heads_per_thread: int, weights: str = "first", **of_heads: Any) -> str:
    """Of the kernel."""
    config = MosaicForward("halves", 2, weights, heads_per_thread=heads_per_thread, **of_heads)
    if isinstance(case, CachedCase):
        inputs, options = jax.eval_shape(lambda: cached.inputs_of(case)), case.options
    else:
        inputs, options = forms.types(case)[0], forms.options(case)
    text = str(emitted(functools.partial(_mosaic_gpu.forward, options=options, config=config), inputs).kernels[0])
    return text[text.index("gpu.launch") :]


def accesses(text: str) -> tuple[int, int]:
    """Loads and stores of global memory."""
    return len(re.findall(r"llvm\.load .*ptr<1>", text)), len(re.findall(r"llvm\.store .*ptr<1>", text))


@pytest.mark.parametrize("weights", ["first", "after_gate", "after_sum"])
@pytest.mark.parametrize(
    "case",
    [CASES[0], CASES[1], CASES[3], CASES[6], IN_CACHE[0], CachedCase(CASES[3], "l b s h d")],
    ids=lambda case: case.id,
)
def test_what_heads_share_is_loaded_once(case, weights):
    """Only what is stored is loaded again: position, table, weights, slot and layer are not."""
    (loads, stores), of_two = (accesses(code(case, heads, weights)) for heads in (1, 2))
    assert of_two == (loads + stores, 2 * stores)


@pytest.mark.parametrize("weights", ["first", "after_sum"])
def test_what_heads_share_is_computed_once(weights):
    case = CASES[6]  # norm_beta is added to the weights, and the rows of three positions are merged
    one, two = (code(case, heads, weights) for heads in (1, 2))
    assert one.count("arith.cmpi") == two.count("arith.cmpi")  # of positions and of frequencies
    weights_of_a_thread = 2 * case.head_dim // 16  # q's and k's
    sums = one.count("arith.addf") - weights_of_a_thread
    assert two.count("arith.addf") == weights_of_a_thread + 2 * sums


@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=lambda case: case.id)
def test_each_head_is_loaded_before_the_arithmetic_of_one_before_it(case):
    """As many ahead as are asked for. A gate is stored when it is there, before the next head is loaded."""
    case = dataclasses.replace(case, num_kv_heads=4)
    vectors, first = (2, 1) if case.gate is None else (3, 0)  # loads of a head, and heads whose loads come with it
    for ahead in (1, 2, 3, 4, 5):
        text = code(case, 4, heads_ahead=ahead)
        of_q = text[text.rindex("scf.if") :]  # q's rows come last
        order = re.findall(r"llvm\.(load|store) .*ptr<1>", of_q)
        loads = [order[:place].count("load") for place, access in enumerate(order) if access == "store"]
        shared = loads[-1] - 4 * vectors  # position, table and weights
        assert sorted(set(loads)) == [shared + vectors * n for n in range(min(ahead + first, 4), 5)]


@pytest.mark.parametrize("apart, step", [(False, 1), (True, 3)])
def test_how_far_apart_the_heads_of_a_thread_lie(apart, step):
    case = dataclasses.replace(PLAIN, num_q_heads=6, num_kv_heads=1, head_dim=128)
    text = code(case, 2, heads_apart=apart)
    of_q = text[text.rindex("scf.if") :]
    constants = {int(value) for value in re.findall(r"arith.constant (\d+) : i64", of_q)}
    assert constants & {128, 2 * 128, 3 * 128} == {128, step * 128}  # of a row, and to the second head


@pytest.mark.parametrize("num_q_heads, num_kv_heads, groups", [(4, 2, (2, 1)), (6, 3, (3, 3)), (3, 1, (3, 1))])
def test_programs_are_as_many_as_groups_need(num_q_heads, num_kv_heads, groups):
    case = dataclasses.replace(PLAIN, num_tokens=800, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads)
    (count,) = re.search(r"blocks\(.*?\) in \(%\w+ = %c(\d+)", code(case, 2)).groups()
    assert int(count) == sum(800 * of_token // 8 for of_token in groups)  # 16 threads a group, 128 a program


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [2, 4])
@pytest.mark.parametrize("num_tokens", [1, 37, 1024])
def test_every_number_of_heads_gives_the_same_bits_on_a_gpu(gpu, num_tokens, heads):
    case = dataclasses.replace(PLAIN, num_tokens=num_tokens, num_q_heads=8, num_kv_heads=2, packed=True)
    inputs = forms.split_heads(case, forms.inputs_of(case, numpy_inputs(case)))
    inputs = jax.tree.map(jnp.asarray, inputs)
    configs = [
        None,
        *(
            MosaicForward("halves", 4, weights, heads_per_thread=heads, heads_apart=apart)
            for weights, apart in (("first", True), ("after_sum", False))
        ),
    ]
    want, *got = (
        jax.jit(functools.partial(_mosaic_gpu.forward, options=forms.options(case), config=config))(inputs)
        for config in configs
    )
    for outputs in got:
        assert_same(outputs, want)
