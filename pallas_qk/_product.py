"""attended * sigmoid(gate) with its derivatives, where the gate lies in the op's q.

The forward is plain XLA, which fuses it into what follows. The derivative is a linear primitive: forward mode runs it
in plain XLA, reverse mode transposes it into a kernel that writes the gate's cotangent where it belongs in that of q.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import ad, mlir
from jax.tree_util import PyTreeDef

from pallas_qk import _op, _reference
from pallas_qk._batching import batch, register_batching
from pallas_qk._derivatives import of_moving, register_further_derivatives
from pallas_qk._primitive import compiler_partitioned, lower_untyped, primitive
from pallas_qk._rows import Call, Inputs, Product, on_heads


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def product(call: Call, given: jax.Array, returned: jax.Array, attended: jax.Array) -> jax.Array:
    """In the shape of attended, which is flat in heads or has an axis of them.

    The op's q as the op was given it is read, and as the op returned it moves: see `Gate`.
    """
    # Read, since JAX 0.10.2 to 0.12.0 fails where vmap maps an argument that a custom_jvp in a jit doesn't read: it
    # takes the function's result for unmapped, and the rule's, which is mapped, in its place. XLA drops the select.
    given = jnp.where(False, returned, given)

    def gated(q: jax.Array, attended: jax.Array) -> jax.Array:
        operands = _of_q(q), Product(attended=_flat(q, attended))
        found: Product = on_heads(_reference.gated, call.options, *operands)
        product: jax.Array = found.product.reshape(attended.shape)
        return product

    result: jax.Array = compiler_partitioned(gated, jax.typeof(attended).sharding)(given, attended)
    return result


@functools.partial(product.defjvp, symbolic_zeros=True)
def _product_jvp(call: Call, primals: Sequence[jax.Array], tangents: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    given, _, attended = primals
    moving = [None if isinstance(t, jax.custom_derivatives.SymbolicZero) else t for t in tangents]
    _, of_returned, of_attended = moving
    leaves, tree = jax.tree.flatten((Product(given, attended), Product(of_returned, of_attended)))
    return product(call, *primals), tangent_p.bind(*leaves, call=call, tree=tree)[0]


def _of_q(q: jax.Array) -> Inputs:
    return Inputs(q, None, None, None, None, None)


def _flat(q: jax.Array, attended: jax.Array) -> jax.Array:
    """(*lead, Hq*D), whether or not heads have an axis of their own."""
    return attended.reshape(*q.shape[:-1], math.prod(attended.shape[q.ndim - 1 :]))


# Its operands are the leaves of (primals, tangents); None stands for the tangent of what doesn't move. Its one result
# is in the shape of attended.
tangent_p = primitive("apply_gate_tangent")


def _tangent(call: Call, primals: Product, tangents: Product) -> list[jax.Array]:
    q, attended = primals.q, _flat(primals.q, primals.attended)
    moving = tangents if tangents.attended is None else tangents._replace(attended=_flat(q, tangents.attended))
    found: Product = on_heads(_reference.gate_tangent, call.options, _of_q(q), Product(attended=attended), moving)
    return [found.product.reshape(primals.attended.shape)]


def _tangent_transpose(cotangents: Sequence[Any], *args: Any, call: Call, tree: PyTreeDef) -> list[Any]:
    primals, tangents = jax.tree.unflatten(tree, args)
    dout = ad.instantiate_zeros(cotangents[0])
    operands = Product(attended=_flat(primals.q, primals.attended), product=_flat(primals.q, dout))
    found = _op.gate_backward(call, _of_q(primals.q), operands)
    found = found._replace(attended=found.attended.reshape(dout.shape))
    return [None, None, *of_moving(found._asdict(), tangents)]


def _tangent_batch(
    axis: Any, args: Sequence[jax.Array], dims: Sequence[int | None], *, call: Call, tree: PyTreeDef
) -> tuple[Any, list[int]]:
    return batch(functools.partial(tangent_p.bind, call=call, tree=tree), ["..."] * len(args), axis, args, dims), [0]


@tangent_p.def_abstract_eval
def _tangent_abstract_eval(*args: Any, call: Call, tree: PyTreeDef) -> list[Any]:
    primals, tangents = jax.tree.unflatten(tree, args)
    operands = _of_q(primals.q), primals, tangents
    return _op.result_types(Product(product=primals.attended), call.options, operands)


def _tangent_lowering(ctx: mlir.LoweringRuleContext, *args: Any, call: Call, tree: PyTreeDef) -> Any:
    return lower_untyped(ctx, lambda *args: _tangent(call, *jax.tree.unflatten(tree, args)), *args)


register_further_derivatives(tangent_p, _tangent, _op.gate_backward_p, _op.gate_backward, _reference.gate_backward)
ad.primitive_transposes[tangent_p] = _tangent_transpose
register_batching(tangent_p, _tangent_batch)
mlir.register_lowering(tangent_p, _tangent_lowering)
