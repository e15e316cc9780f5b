"""The floor: bytes that any implementation must move, inputs read once and outputs written once.

It belongs to the case and its form, never to an implementation. It leaves out weights, positions, slots and scales, and
in the backward the rows of the table: with gates, the heads of Qwen3.5's models and 64 tokens or more under 1 % of the
bytes.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np

from pallas_qk._options import Options
from pallas_qk._rows import kinds_of, stored
from tests import forms
from tests.cached import CachedCase
from tests.cases import Case


def minimum_bytes(case: Case, direction: str = "forward") -> int:
    """Bytes of the op in the form of `case`, "forward" or "backward".

    A gate left in place costs the forward nothing, but its cotangent is moved into the gradient of q; v of a packed
    array is moved in both directions.
    """
    options = forms.options(case)
    if direction == "forward":
        return _forward_bytes(case, options, case.dtype)
    # The cotangent in and the gradient out; what is normalised is read again.
    heads = {"q": case.num_q_heads, "k": case.num_kv_heads}
    moved = sum(heads[kind.heads] * (2 if kind.weight is None else 3) for kind in kinds_of(options).values())
    return moved * _bytes_of_a_row(case)


def cached_bytes(cached: CachedCase) -> int:
    """Bytes of the op that writes a KV cache, with a slot for each token.

    A row of k or v is read once and written once, into the cache and in its dtype; a second time where it is returned.
    """
    return _forward_bytes(cached.case, cached.options, cached.cache_dtype)


def _forward_bytes(case: Case, options: Options, cache_dtype: str | np.dtype) -> int:
    heads = {"q": case.num_q_heads, "k": case.num_kv_heads}
    own, in_cache = jnp.dtype(case.dtype).itemsize, jnp.dtype(cache_dtype).itemsize
    lane_bytes = 0  # of all heads of a token: a lane of each row that is stored is read, and written at each target
    for kind in stored(kinds_of(options)).values():
        written = sum(own if place.slots is None else in_cache for place in kind.targets)
        lane_bytes += heads[kind.heads] * (own + written)
    table = case.rotary_dim * jnp.dtype(case.cache_dtype or case.dtype).itemsize
    return case.num_tokens * (case.head_dim * lane_bytes + table)


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
