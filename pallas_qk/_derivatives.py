"""Derivatives of the op, once for every implementation.

The derivative is a linear primitive: forward mode runs it in plain XLA, reverse mode transposes it into the backward
kernel. Derivatives beyond the first are plain XLA. Residuals are the inputs.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, Primitive
from jax.interpreters import ad, mlir
from jax.tree_util import PyTreeDef

from pallas_qk import _op, _reference
from pallas_qk._batching import batch, register_batching
from pallas_qk._op import backward_p, forward_p
from pallas_qk._primitive import compiler_partitioned, lower_untyped, primitive
from pallas_qk._rows import Call, Inputs, Outputs, as_outputs, axes, flat_output_types, on_heads

forward = _op.forward  # the differentiable op

# Its operands are the leaves of (inputs, tangents); None stands for the tangent of an input that doesn't move.
tangent_p = primitive("fused_qk_rmsnorm_rope_gate_tangent")


def _tangent_of(call: Call, inputs: Inputs, tangents: Inputs) -> Outputs:
    leaves, tree = jax.tree.flatten((inputs, tangents))
    return as_outputs(call.options, tangent_p.bind(*leaves, call=call, tree=tree))


def _tangent(call: Call, inputs: Inputs, tangents: Inputs) -> Outputs:
    """Tangents of the outputs: what `tangent_p` computes."""
    function = functools.partial(on_heads, _reference.unrounded, call.options)
    unrounded = _derivative(function, (_in_float32(inputs),), (_in_float32(tangents),))
    outputs: Outputs = jax.tree.map(lambda x: x.astype(inputs.q.dtype), unrounded)
    return outputs


def _in_float32(x: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, x)


def _moving(tree: PyTreeDef, tangents: Sequence[Any]) -> Any:
    """The tangents as `tree`, None for what doesn't move: zeros, and integers."""
    still = [type(t) is ad.Zero or t.dtype == jax.dtypes.float0 for t in tangents]
    return jax.tree.unflatten(tree, [None if zero else t for zero, t in zip(still, tangents, strict=True)])


def _derivative(function: Callable[..., Any], operands: Any, tangents: Any) -> Any:
    """The derivative of `function` along tangents, None for what doesn't move."""

    def of_moving(moving: Any) -> Any:
        return function(*_with(operands, moving))

    moving = _where(lambda x, tangent: None if tangent is None else x, operands, tangents)
    return jax.jvp(of_moving, (moving,), (tangents,))[1]


def _with(operands: Any, others: Any) -> Any:
    """`operands` with those of `others` that are there."""
    return _where(lambda x, other: x if other is None else other, operands, others)


def _where(function: Callable[..., Any], first: Any, second: Any) -> Any:
    return jax.tree.map(function, first, second, is_leaf=lambda x: x is None)


def _forward_jvp(
    primals: Sequence[Any], tangents: Sequence[Any], *, call: Call, tree: PyTreeDef, body: ClosedJaxpr
) -> tuple[Any, Any]:
    del body
    (inputs,), (moving,) = jax.tree.unflatten(tree, primals), _moving(tree, tangents)
    if call.options.cache_axes:
        moved = _op.public_names(name for name, tangent in moving._asdict().items() if tangent is not None)
        raise NotImplementedError(
            f"what writes a KV cache must not be differentiated, got tangents of {moved}. Call the function without a "
            "cache and write its k and v with .at[].set, or stop them with jax.lax.stop_gradient."
        )
    return jax.tree.leaves(forward(call, inputs)), jax.tree.leaves(_tangent_of(call, inputs, moving))


def _tangent_transpose(cotangents: Sequence[Any], *args: Any, call: Call, tree: PyTreeDef) -> list[Any]:
    inputs, tangents = jax.tree.unflatten(tree, args)
    cotangents = as_outputs(call.options, [ad.instantiate_zeros(ct) for ct in cotangents])
    # A sum over manual axes may follow: then the kernel must not round.
    rounded = not jax.sharding.get_abstract_mesh().manual_axes
    rounding = call._replace(options=dataclasses.replace(call.options, round_dweights=rounded))
    gradients = _op.backward(rounding, inputs, cotangents)._asdict()
    if ad.is_undefined_primal(tangents.cos_sin_cache):
        gradients["cos_sin_cache"] = _table_gradient(call, inputs, cotangents)
    return [None] * len(jax.tree.leaves(inputs)) + of_moving(gradients, tangents)


def _table_gradient(call: Call, inputs: Inputs, cotangents: Outputs) -> jax.Array:
    """In float32: a scatter-add by XLA, in no fixed order on a GPU; of a gathered table a sum over heads."""

    def gradient(inputs: Inputs, cotangents: Outputs) -> jax.Array:
        def of_table(table: jax.Array) -> Any:
            return on_heads(_reference.unrounded, call.options, inputs._replace(cos_sin_cache=table))

        summed: jax.Array = jax.vjp(of_table, inputs.cos_sin_cache)[1](cotangents)[0]
        return summed

    inputs, cotangents = _in_float32(inputs), _in_float32(cotangents)
    return compiler_partitioned(gradient, jax.typeof(inputs.cos_sin_cache).sharding)(inputs, cotangents)


def of_moving(gradients: Mapping[str, Any], tangents: Any) -> list[Any]:
    """The gradients for the tangents that there are, in their types; None for one that isn't asked for."""
    moving = [(name, tangent) for name, tangent in tangents._asdict().items() if tangent is not None]
    return [
        _sum_to(gradients[name], tangent.aval) if ad.is_undefined_primal(tangent) else None for name, tangent in moving
    ]


def _sum_to(gradient: jax.Array, aval: Any) -> jax.Array:
    """The gradient summed over the manual axes along which the input did not vary, then rounded to its dtype."""
    summed = jax.typeof(gradient).manual_axis_type.varying - aval.manual_axis_type.varying
    return (lax.psum(gradient, tuple(summed)) if summed else gradient).astype(aval.dtype)


def register_further_derivatives(
    tangent_p: Primitive,
    tangent: Callable[..., Any],
    backward_p: Primitive,
    backward: Callable[..., Any],
    formula: Callable[..., Any],
) -> None:
    """In plain XLA: of `tangent_p` those of `tangent`, of `backward_p`, which `backward` binds, those of `formula`."""

    def tangent_jvp(primals: Sequence[Any], tangents: Sequence[Any], *, call: Call, tree: PyTreeDef) -> tuple[Any, Any]:
        outputs = tangent_p.bind(*primals, call=call, tree=tree)
        return outputs, _further_derivative(functools.partial(tangent, call), tree, primals, tangents, outputs)

    def backward_jvp(
        primals: Sequence[Any], tangents: Sequence[Any], *, call: Call, tree: PyTreeDef, body: ClosedJaxpr
    ) -> tuple[Any, Any]:
        del body
        outputs = jax.tree.leaves(backward(call, *jax.tree.unflatten(tree, primals)))
        function = functools.partial(on_heads, formula, call.options)
        return outputs, _further_derivative(function, tree, primals, tangents, outputs)

    ad.primitive_jvps[tangent_p] = tangent_jvp
    ad.primitive_jvps[backward_p] = backward_jvp


def _further_derivative(
    function: Callable[..., Any],
    tree: PyTreeDef,
    primals: Sequence[Any],
    tangents: Sequence[Any],
    outputs: Sequence[jax.Array],
) -> Any:
    def derivative(operands: Any, moving: Any) -> list[jax.Array]:
        return jax.tree.leaves(_derivative(function, operands, moving))

    operands = jax.tree.unflatten(tree, primals)
    shardings = [jax.typeof(x).sharding for x in outputs]
    return compiler_partitioned(derivative, shardings)(operands, _moving(tree, tangents))


def _tangent_batch(
    axis: Any, args: Sequence[jax.Array], dims: Sequence[int | None], *, call: Call, tree: PyTreeDef
) -> tuple[list[jax.Array], list[int]]:
    names = jax.tree.leaves(axes(call.options, *jax.tree.unflatten(tree, args)))
    outputs = batch(functools.partial(tangent_p.bind, call=call, tree=tree), names, axis, args, dims)
    return outputs, [0] * len(outputs)


@tangent_p.def_abstract_eval
def _tangent_abstract_eval(*args: Any, call: Call, tree: PyTreeDef) -> list[Any]:
    inputs, tangents = jax.tree.unflatten(tree, args)
    outputs = flat_output_types(inputs, call.options)
    return _op.result_types(outputs, call.options, (inputs, tangents))


def _tangent_lowering(ctx: mlir.LoweringRuleContext, *args: Any, call: Call, tree: PyTreeDef) -> Any:
    def function(*args: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(_tangent(call, *jax.tree.unflatten(tree, args)))

    return lower_untyped(ctx, function, *args)


ad.primitive_jvps[forward_p] = _forward_jvp
register_further_derivatives(tangent_p, _tangent, backward_p, _op.backward, _reference.backward)
ad.primitive_transposes[tangent_p] = _tangent_transpose
register_batching(tangent_p, _tangent_batch)
mlir.register_lowering(tangent_p, _tangent_lowering)
