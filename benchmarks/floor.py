"""The floor: bytes that any implementation must move, inputs read once and outputs written once.

It belongs to the case and its form, never to an implementation. It leaves out weights and positions, and in the
backward the rows of the table: with gates, the heads of Qwen3.5's models and 64 tokens or more under 1 % of the bytes.
"""

import dataclasses

import jax.numpy as jnp

from pallas_qk._rows import kinds_of, stored
from tests import forms
from tests.cases import Case


def minimum_bytes(case: Case, direction: str = "forward") -> int:
    """Bytes of the op in the form of `case`, "forward" or "backward".

    A gate left in place costs the forward nothing, but its cotangent is moved into the gradient of q; v of a packed
    array is moved in both directions.
    """
    kinds = kinds_of(forms.options(case))
    heads = {"q": case.num_q_heads, "k": case.num_kv_heads}
    if direction == "backward":
        # The cotangent in and the gradient out; what is normalised is read again.
        moved = sum(heads[kind.heads] * (2 if kind.weight is None else 3) for kind in kinds.values())
        return moved * _bytes_of_a_row(case)
    moved = sum(heads[kind.heads] * 2 for kind in stored(kinds).values())
    table = case.num_tokens * case.rotary_dim * jnp.dtype(case.cache_dtype or case.dtype).itemsize
    return moved * _bytes_of_a_row(case) + table


def block_bytes(case: Case, direction: str = "forward", *, packed: bool = False) -> int:
    """Bytes of the op and of attended * sigmoid(gate), which needs no gate written by the op.

    For the product the forward reads gates and attended and writes its rows. The backward reads gates, attended and the
    product's cotangent, and writes the gradients of gates and attended.
    """
    of_the_product = case.num_q_heads * (5 if direction == "backward" else 3)
    form = dataclasses.replace(case, gate=None, packed=packed)
    return minimum_bytes(form, direction) + of_the_product * _bytes_of_a_row(case)


def _bytes_of_a_row(case: Case) -> int:
    """The rows of one head, one for each token."""
    return case.num_tokens * case.head_dim * jnp.dtype(case.dtype).itemsize
