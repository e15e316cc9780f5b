"""A form of a call is a value: what `rows_of` says of a kind of rows, every implementation does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_qk import _rows
from tests import forms
from tests.cases import Case, Inputs, numpy_inputs
from tests.compare import assert_same, compare_bits
from tests.run import kernel

CASE = Case(5, 3, 2, head_dim=64, rotary_dim=16, max_position=40, gate=None)


def results(implementation: str, inputs: Inputs) -> dict[str, jax.Array]:
    """What both directions give, by programs of their own: others are cached by options, which rows are not part of."""
    options, operands = forms.options(CASE), forms.split_heads(CASE, forms.inputs_of(CASE, inputs))
    cotangents = forms.split_heads(CASE, forms.as_outputs(CASE, forms.cotangents_of(CASE)))
    outputs = kernel("forward", implementation, options, False)(operands)
    gradients = kernel("backward", implementation, options, False)(operands, cotangents)
    names = ("q_out", "k_out", "dq", "dk", "dq_weight", "dk_weight")
    return dict(zip(names, map(jnp.asarray, jax.tree.leaves((outputs, gradients))), strict=True))


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu", "triton"])
def test_rows_without_a_rotation_are_not_rotated(implementation, monkeypatch):
    """k has the bits that cos = 1 and sin = 0 give, and q those of the table."""
    inputs = numpy_inputs(CASE)
    unturned = np.repeat([1, 0], 8)[None].repeat(40, axis=0).astype(inputs.cos_sin_cache.dtype)
    rotated = results(implementation, inputs)
    as_it_is = results(implementation, dataclasses.replace(inputs, cos_sin_cache=unturned))
    rows_of = _rows.rows_of

    def with_k_as_it_is(*args):
        rows = rows_of(*args)
        return rows | {"k": rows["k"]._replace(rotation=None)}

    monkeypatch.setattr(_rows, "rows_of", with_k_as_it_is)
    for name, got in results(implementation, inputs).items():
        of_k = name in ("k_out", "dk", "dk_weight")
        assert_same({name: got}, {name: (as_it_is if of_k else rotated)[name]})
        assert compare_bits(name, rotated[name], as_it_is[name]).differing
