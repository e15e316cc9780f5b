"""Accesses of the Triton kernels past the last row: masked, which interpret mode would not miss.

The Mosaic GPU kernels repeat the last row instead; tests/mosaic_interpreter.py checks every address. On a GPU
`make sanitize` sees both.
"""

import functools

import jax
import pytest
from jax.extend.core import jaxprs_in_params

from pallas_qk import _triton
from tests import forms
from tests.cases import Case

FUNCTIONS = {"forward": _triton.forward, "backward": _triton.backward}


def accesses(direction: str, case: Case) -> list[tuple[str, bool]]:
    """Each load and store of an array with a row of heads a token: which it is, and whether it has a mask."""
    arguments = forms.types(case)[: 1 if direction == "forward" else 2]
    function = functools.partial(FUNCTIONS[direction], options=forms.options(case), interpret=True)

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in ("masked_load", "masked_swap"):
                ref, _, *rest = jax.tree.unflatten(eqn.params["args_tree"], eqn.invars)
                mask = rest[0] if eqn.primitive.name == "masked_load" else rest[1]  # behind the value
                if ref.aval.shape[0] == case.num_tokens:
                    yield eqn.primitive.name, mask is not None
            for inner in jaxprs_in_params(eqn.params):
                yield from walk(inner)

    return list(walk(jax.make_jaxpr(function)(*arguments).jaxpr))


@pytest.mark.parametrize("direction", FUNCTIONS)
@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_fill_no_program_are_masked(direction, packed):
    found = accesses(direction, Case(7, 3, 1, head_dim=64, rotary_dim=16, packed=packed))
    assert {name for name, _ in found} == {"masked_load", "masked_swap"}
    assert all(masked for _, masked in found)


@pytest.mark.parametrize("direction", FUNCTIONS)
def test_rows_that_fill_their_programs_are_not(direction):
    """Every place of the two tiles exists then, and a mask would cost instructions."""
    found = accesses(direction, Case(8, 4, 4, head_dim=64, rotary_dim=16))
    assert found and not any(masked for _, masked in found)


@pytest.mark.parametrize("direction", FUNCTIONS)
def test_lanes_that_a_row_lacks_are_masked(direction):
    found = accesses(direction, Case(8, 4, 4, head_dim=80, rotary_dim=36))
    assert found and all(masked for _, masked in found)
