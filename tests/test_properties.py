"""The op over cases that hypothesis draws: against its definition, and what holds whatever the arithmetic.

The same cases in every run; `python -m tests.fuzz` draws others for as long as it is told.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st

from tests import forms, fuzz, gradients, strategies
from tests.cases import Case, Inputs, make_cotangents
from tests.compare import assert_same
from tests.run import has_gpu, run, run_backward

# Compilation takes the time: plain XLA a second a case, Triton's interpret mode three, Mosaic GPU's interpreter none.
NUM_CASES = [("xla", 6), ("mosaic_gpu", 25), ("triton", 2)]
NUM_CASES_A_PROPERTY = [("xla", 2), ("mosaic_gpu", 6), ("triton", 1)]


def bounded(count: int) -> settings:
    """The same examples in every run, none of them shrunk: a failure says how to run its case alone."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),  # on a busy machine drawing may take long
    )


def for_cases(count: int):
    """Calls a function of a case and a seed with `count` examples, the same ones for each function alike."""

    def decorate(function):
        def reported(case, seed):
            try:
                with strategies.x64(case):
                    function(case, seed)
            except Exception as error:
                error.add_note(fuzz.reproducer(case, seed))
                raise

        return bounded(count)(given(strategies.cases(strategies.TINY), strategies.SEEDS)(reported))

    return decorate


@pytest.mark.parametrize("implementation, count", NUM_CASES)
def test_forward_keeps_to_its_definition(implementation, count):
    """In every form, dtype and option; NaN where a position is past the table and nowhere else."""

    @for_cases(count)
    def holds(case, seed):
        assert fuzz.check_forward(case, seed, (implementation,))

    holds()


@pytest.mark.parametrize("implementation, count", [("mosaic_gpu", 8), ("triton", 2)])
def test_backward_agrees_with_plain_xla(implementation, count):
    @for_cases(count)
    def holds(case, seed):
        assert fuzz.check_backward(case, seed, (implementation,))

    holds()


def test_backward_of_plain_xla_keeps_to_its_definition():
    """Of norms with weights, of q and k, before a rotation."""

    @for_cases(6)
    def holds(case, seed):
        assume(case.rotary_dim)
        case = dataclasses.replace(
            fuzz.gradient_case(case),
            weights=True,
            q_alone=False,
            separate_v=False,
            v_norm=False,
            norm_order="norm_first",
        )
        inputs = strategies.make_inputs(case, seed)
        plain, safe = strategies.resolved(case, inputs)
        want = gradients.define_gradients(plain, safe, make_cotangents(plain, seed), round_dweights=False)[:4]
        found = fuzz.split_gradients(case, run_backward("xla", case, inputs, forms.cotangents_of(case, seed)))
        q_gate = found["q"]
        if case.gate is not None:
            pairs = [x.reshape(case.num_tokens, case.num_q_heads, 1, -1) for x in (found["q"], found["gate"])]
            q_gate = jnp.concatenate(pairs, axis=2).reshape(case.num_tokens, -1)
        else:
            exact, bound = (forms.split_gates(case, x)[0] for x in want[0][:2])
            want[0] = want[0]._replace(exact=exact, bound=bound)
        gradients.assert_defined([q_gate, found["k"], found["q_weight"], found["k_weight"]], want)

    holds()


def outputs(implementation: str, case: Case, inputs: Inputs) -> dict[str, jax.Array]:
    return dict(zip(forms.output_names(case), run(implementation, case, inputs), strict=True))


def with_one_nan(x) -> np.ndarray:
    x = np.array(x)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        x[np.isnan(x)] = np.nan
    return x


def assert_same_numbers(got, want) -> None:
    """Equal bits, but for which NaN it is where a position is past the table."""
    assert_same(*(jax.tree.map(with_one_nan, x) for x in (got, want)))


def of_tokens(inputs: Inputs, tokens) -> Inputs:
    positions = None if inputs.positions is None else inputs.positions[..., tokens]
    return dataclasses.replace(inputs, q_gate=inputs.q_gate[tokens], k=inputs.k[tokens], positions=positions)


def heads_of(x: jax.Array, case: Case) -> jax.Array:
    return x.reshape(case.num_tokens, -1, case.head_dim)


def a_token_alone(implementation, case, inputs, rng):
    """It gives the bits that it gives in a batch."""
    token = np.array([rng.integers(case.num_tokens)])
    want = {name: x[token] for name, x in outputs(implementation, case, inputs).items() if name != "v"}
    alone = outputs(implementation, dataclasses.replace(case, num_tokens=1), of_tokens(inputs, token))
    assert_same_numbers({name: alone[name] for name in want}, want)


def a_head_alone(implementation, case, inputs, rng):
    """It gives the bits that it gives among others."""
    q_head, k_head = rng.integers(case.num_q_heads), rng.integers(case.num_kv_heads)
    own = {"q": q_head, "k": k_head, "gate": q_head}
    together = outputs(implementation, case, inputs)
    want = {name: heads_of(together[name], case)[:, head] for name, head in own.items() if name in together}
    q_gate = inputs.q_gate.reshape(case.num_tokens, case.num_q_heads, -1)[:, q_head]
    one = dataclasses.replace(inputs, q_gate=q_gate, k=heads_of(inputs.k, case)[:, k_head])
    alone = outputs(implementation, dataclasses.replace(case, num_q_heads=1, num_kv_heads=1), one)
    assert_same_numbers({name: alone[name] for name in want}, want)


def permuted_tokens(implementation, case, inputs, rng):
    """They permute the outputs."""
    order = rng.permutation(case.num_tokens)
    want = {name: x[order] for name, x in outputs(implementation, case, inputs).items() if name != "v"}
    moved = outputs(implementation, case, of_tokens(inputs, order))
    assert_same_numbers({name: moved[name] for name in want}, want)


def cos_1_and_sin_0(implementation, case, inputs, rng):
    """They leave the norm alone: lanes that are rotated by nothing are those that are not rotated."""
    if not case.rotary_dim:
        return
    inputs = strategies.inside(case, inputs)

    def unrotated(case):
        table = np.ones((case.max_position, case.rotary_dim))
        table[:, case.rotary_dim // 2 :] = 0
        table = jnp.asarray(table.astype(inputs.cos_sin_cache.dtype))
        return outputs(implementation, case, dataclasses.replace(inputs, cos_sin_cache=table))

    section = None if case.mrope_section is None else (1, 0, 0)
    got, want = unrotated(case), unrotated(dataclasses.replace(case, rotary_dim=2, mrope_section=section))
    for name in {"q", "k"} & got.keys():  # as values: 0 * x may have made 0.0 of -0.0
        np.testing.assert_array_equal(np.asarray(got[name], np.float32), np.asarray(want[name], np.float32))


def bits_of_gates(implementation, case, inputs, rng):
    """They are those of the input, NaN payloads too."""
    if case.gate is None:
        return
    dtype = inputs.q_gate.dtype
    q_gate = np.array(inputs.q_gate).reshape(case.num_tokens, case.num_q_heads, 2, case.head_dim)
    gates = rng.integers(0, 256, (*q_gate.shape[:2], case.head_dim * dtype.itemsize), np.uint8).view(dtype)
    q_gate[:, :, 1] = gates
    inputs = dataclasses.replace(inputs, q_gate=jnp.asarray(q_gate.reshape(case.num_tokens, -1)))
    got = outputs(implementation, case, inputs)["gate"]
    want = jnp.asarray(gates.reshape(got.shape))
    if implementation == "triton" and not has_gpu():
        # Interpret mode passes bfloat16 through float32 and back, which keeps of a NaN only that it is one.
        assert_same_numbers(got, want)
    else:
        assert_same(got, want)


@pytest.mark.parametrize("implementation, count", NUM_CASES_A_PROPERTY)
@pytest.mark.parametrize(
    "assert_property",
    [a_token_alone, a_head_alone, permuted_tokens, cos_1_and_sin_0, bits_of_gates],
    ids=lambda function: function.__name__,
)
def test_property(assert_property, implementation, count):
    @for_cases(count)
    def holds(case, seed):
        assert_property(implementation, case, strategies.make_inputs(case, seed), np.random.default_rng(seed))

    holds()


@st.composite
def leading_axes(draw, case: Case) -> tuple[int, ...]:
    """Any axes whose sizes multiply to T."""
    sizes, rest = [], case.num_tokens
    for factor in (f for f in range(2, case.num_tokens + 1) for _ in range(3)):
        if rest % factor == 0 and draw(st.booleans()):
            sizes.append(factor)
            rest //= factor
    return tuple(draw(st.permutations([*sizes, rest, *([1] if draw(st.booleans()) else [])])))


def test_leading_axes_and_an_axis_of_heads_are_a_reshape():
    """Outputs take the inputs' form, with the bits of (T, heads*D)."""

    @bounded(4)
    @given(strategies.cases(dataclasses.replace(strategies.TINY, tokens=(12, 4, 6))), st.data(), strategies.SEEDS)
    def holds(case, data, seed):
        lead, split = data.draw(leading_axes(case)), data.draw(st.booleans()) and not case.packed
        with strategies.x64(case):
            inputs = forms.inputs_of(case, strategies.make_inputs(case, seed))
            arguments = {name: x for name in forms.ARGUMENTS if (x := getattr(inputs, name)) is not None}
            flat = forms.op(case)(*arguments.values())

            def shaped(x, width, heads):
                return x.reshape(*lead, *((heads, width) if split else (heads * width,)))

            q_width = case.head_dim if case.gate is None else 2 * case.head_dim
            if case.packed:
                arguments["q"] = inputs.q.reshape(*lead, -1)
            else:
                arguments["q"] = shaped(inputs.q, q_width, case.num_q_heads)
                of_kv = {"k", "v"} & arguments.keys()
                arguments |= {name: shaped(arguments[name], case.head_dim, case.num_kv_heads) for name in of_kv}
            if case.gathered:
                arguments["cos_sin_cache"] = inputs.cos_sin_cache.reshape(*lead, case.rotary_dim)
            elif case.rotary_dim:
                arguments["positions"] = inputs.positions.reshape(*inputs.positions.shape[:-1], *lead)
            got = forms.op(case)(*arguments.values())
            for a, b in zip(got, flat, strict=True):
                heads = b.shape[-1] // case.head_dim
                assert a.shape == shaped(b, case.head_dim, heads).shape
                assert math.prod(lead) == case.num_tokens
                assert_same_numbers(a.reshape(b.shape), b)

    holds()
