"""The op on hidden states and a packed weight: its definition, and one kernel for both as a primitive.

Arrays may have any leading axes; positions are (1 or 3, *lead).
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import mlir
from jax.sharding import ManualAxisType
from jax.tree_util import PyTreeDef

from pallas_qk import _derivatives, _implementations, _op
from pallas_qk._batching import batch, register_batching
from pallas_qk._primitive import lower_untyped, primitive
from pallas_qk._rows import Call, Inputs, Outputs, as_outputs, axes, flat_output_types, on_rows
from pallas_qk._target import as_on_a_gpu


def product_and_op(call: Call, hidden: jax.Array, weight: jax.Array, inputs: Inputs) -> Outputs:
    """The definition. `inputs` has everything that the op reads but the product."""
    return _derivatives.forward(call, inputs._replace(q=jnp.dot(hidden, weight)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def by_kernel(call: Call, hidden: jax.Array, weight: jax.Array, inputs: Inputs) -> Outputs:
    leaves, tree = jax.tree.flatten((hidden, weight, inputs))
    return as_outputs(call.options, projection_p.bind(*leaves, call=call, tree=tree))


@functools.partial(by_kernel.defjvp, symbolic_zeros=True)
def _by_kernel_jvp(call: Call, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Outputs, Outputs]:
    """That of the definition. Its product is kept by no forward: `jax.checkpoint` computes it where it is needed."""
    leaves, tree = jax.tree.flatten(primals)
    directions = jax.tree.leaves(tangents)
    moving = [i for i, tangent in enumerate(directions) if not isinstance(tangent, SymbolicZero)]

    @jax.checkpoint
    def of_moving(*moved: jax.Array) -> Outputs:
        by_place = dict(zip(moving, moved, strict=True))
        return product_and_op(call, *jax.tree.unflatten(tree, [by_place.get(i, x) for i, x in enumerate(leaves)]))

    _, moved = jax.jvp(of_moving, [leaves[i] for i in moving], [directions[i] for i in moving])
    return by_kernel(call, *primals), moved


# Its operands are the leaves of (hidden, weight, inputs).
projection_p = primitive("fused_qkv_projection_rmsnorm_rope_gate")


@projection_p.def_abstract_eval
def _abstract_eval(*args: jax.core.ShapedArray, call: Call, tree: PyTreeDef) -> list[jax.core.ShapedArray]:
    hidden, weight, inputs = jax.tree.unflatten(tree, args)
    varying = hidden.manual_axis_type.varying | weight.manual_axis_type.varying
    shape = *hidden.shape[:-1], weight.shape[1]
    product = hidden.update(shape=shape, weak_type=False, manual_axis_type=ManualAxisType(varying=varying))
    inputs = inputs._replace(q=product)
    return _op.result_types(flat_output_types(inputs, call.options), call.options, (inputs,))


def _on_cuda(ctx: mlir.LoweringRuleContext, *leaves: Any, call: Call, tree: PyTreeDef) -> Any:
    context = ctx.module_context.axis_context
    if isinstance(context, mlir.ShardingContext) and context.num_devices > 1:
        raise NotImplementedError(
            f"implementation={call.implementation!r} must run inside jax.shard_map over several devices, got "
            f"{context.num_devices} devices outside one. Call it there, with each device's tokens, or its heads and "
            "their columns of weight, or leave implementation out."
        )

    def on_one_device(*leaves: jax.Array) -> list[jax.Array]:
        hidden, weight, inputs = jax.tree.unflatten(tree, leaves)
        lead = hidden.shape[:-1]
        num_tokens = math.prod(lead)
        if inputs.positions is None:
            rows = inputs.cos_sin_cache
            inputs = inputs._replace(cos_sin_cache=rows.reshape(num_tokens, rows.shape[-1]))
        else:
            inputs = inputs._replace(positions=inputs.positions.reshape(len(inputs.positions), num_tokens))
        if inputs.slots is not None:
            inputs = inputs._replace(slots=inputs.slots.reshape(num_tokens))
        project = _implementations.module("mosaic_gpu").project
        outputs = project(hidden.reshape(num_tokens, hidden.shape[-1]), weight, inputs, options=call.options)
        return jax.tree.leaves(on_rows(lambda x: x.reshape(*lead, x.shape[-1]), outputs))

    with as_on_a_gpu():
        return lower_untyped(ctx, on_one_device, *leaves)


def _elsewhere(ctx: mlir.LoweringRuleContext, *leaves: Any, call: Call, tree: PyTreeDef) -> Any:
    del leaves, tree
    _implementations.refuse_platforms(call.implementation, ctx.platforms or ctx.module_context.platforms)
    raise AssertionError("a platform that isn't refused has the rule above")


def _batch(
    axis: Any, args: Sequence[jax.Array], dims: Sequence[int | None], *, call: Call, tree: PyTreeDef
) -> tuple[list[jax.Array], list[int]]:
    *_, inputs = jax.tree.unflatten(tree, args)
    of_hidden, of_weight, of_inputs = jax.tree.unflatten(tree, [dim is not None for dim in dims])
    mapped = {"hidden": of_hidden, "weight": of_weight} | of_inputs._asdict()
    _op.refuse_mapped_cache(call.options, mapped)
    names = jax.tree.leaves(("... width", "width packed", *axes(call.options, inputs)))
    outputs = batch(functools.partial(projection_p.bind, call=call, tree=tree), names, axis, args, dims)
    return outputs, [0] * len(outputs)


mlir.register_lowering(projection_p, _on_cuda, platform="cuda")
mlir.register_lowering(projection_p, _elsewhere)
register_batching(projection_p, _batch)
