"""The op over the whole mesh and under vmap, for every implementation: three primitives.

They are the forward, the backward, and the backward of the product with a gate that was handed on. Arrays are flat in
heads, (*lead, heads*D), with any leading axes; positions are (1 or 3, *lead). The primitives take the leaves of
(Inputs,), (Inputs, Outputs) or (Inputs, Product), so an array that a call does not have is no operand.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Primitive, jaxpr_as_fun
from jax.interpreters import mlir
from jax.sharding import ManualAxisType, NamedSharding, PartitionSpec
from jax.tree_util import PyTreeDef

from pallas_qk import _implementations, _mesh_checks, _reference
from pallas_qk._batching import batch, has_batched_leading_axes, register_batching
from pallas_qk._options import Options
from pallas_qk._partition import in_plain_xla, program
from pallas_qk._primitive import compiler_partitioned, lower_untyped, primitive
from pallas_qk._rows import (
    CACHES,
    Call,
    Gradients,
    Inputs,
    Outputs,
    Product,
    as_gradients,
    as_outputs,
    axes,
    differentiated,
    kinds_in_outputs,
    on_heads,
    read_by_gradients,
    read_by_outputs,
    weights_in,
)


def forward(call: Call, inputs: Inputs) -> Outputs:
    """The op, with the gate wherever q has one."""
    leaves, tree = jax.tree.flatten((inputs,))
    # `lower_partitioned` runs the body. It is a parameter because JAX searches parameters for equations that need
    # device assignments, as custom_partitioning does.
    outputs = forward_p.bind(*leaves, call=call, tree=tree, body=program("forward", call, (inputs,)))
    return as_outputs(call.options, outputs)


def backward(call: Call, inputs: Inputs, cotangents: Outputs) -> Gradients:
    """The weights' gradients are summed over all leading axes."""
    operands = inputs, cotangents
    leaves, tree = jax.tree.flatten(operands)
    gradients = backward_p.bind(*leaves, call=call, tree=tree, body=program("backward", call, operands))
    return as_gradients(call.options, gradients)


def gate_backward(call: Call, inputs: Inputs, operands: Product) -> Product:
    """The cotangents of the gate, where it lies, and of attended, from that of their product."""
    both = inputs, operands
    leaves, tree = jax.tree.flatten(both)
    return Product(*gate_backward_p.bind(*leaves, call=call, tree=tree, body=program("gate_backward", call, both)))


def result_types(results: Outputs | Gradients | Product, options: Options, operands: tuple[Any, ...]) -> list[Any]:
    """Types of results that have a shape and dtype: sharded as what they are like, varying as what they depend on."""
    inputs, types = operands[0], []
    like: tuple[Any, ...]
    reads: tuple[Any, ...]
    if isinstance(results, Outputs):
        sources = [
            getattr(inputs, array if array in CACHES else kinds[0].source.array)
            for array, kinds in kinds_in_outputs(options).items()
        ]
        like, reads = as_outputs(options, sources), read_by_outputs(options, *operands)
    elif isinstance(results, Product):
        attended = operands[1].attended
        like, reads = Product(inputs.q, attended, attended), Product(*[jax.tree.leaves(operands)] * 3)
    else:
        like, reads = differentiated(inputs), read_by_gradients(options, *operands)
    mesh = jax.sharding.get_abstract_mesh()
    for result, x, read in zip(results, like, reads, strict=True):
        if result is not None:
            varying = frozenset().union(*(y.manual_axis_type.varying for y in read if y is not None))
            update = {"shape": result.shape, "dtype": result.dtype, "manual_axis_type": ManualAxisType(varying=varying)}
            if varying and x.sharding.mesh.empty:  # a constant of the program, which knows of no mesh
                update["sharding"] = NamedSharding(mesh, PartitionSpec(*[None] * len(result.shape)))
            types.append(x.update(weak_type=False, **update))
    return types


def _op_primitive(name: str, direction: str, as_results: Callable[..., Any]) -> Primitive:
    p = primitive(name)

    @p.def_abstract_eval
    def abstract_eval(*args: Any, call: Call, tree: PyTreeDef, body: ClosedJaxpr) -> list[Any]:
        return result_types(as_results(call.options, body.out_avals), call.options, jax.tree.unflatten(tree, args))

    def lower_partitioned(ctx: mlir.LoweringRuleContext, *args: Any, body: ClosedJaxpr, **_: Any) -> Any:
        context = ctx.module_context
        if isinstance(context.axis_context, mlir.ShardingContext):
            _mesh_checks.check_partitioner(
                context.axis_context.num_devices, exported=context.lowering_parameters.for_export
            )
        return lower_untyped(ctx, jaxpr_as_fun(body), *args)

    def lower_plain(ctx: mlir.LoweringRuleContext, *args: Any, call: Call, tree: PyTreeDef, **_: Any) -> Any:
        """Where plain XLA alone can run: without the partitioner's call, which such platforms may lack (TPU)."""
        _implementations.refuse_platforms(call.implementation, ctx.platforms or ctx.module_context.platforms)
        plain = functools.partial(in_plain_xla, direction, call, tree)
        function = compiler_partitioned(plain, [x.sharding for x in ctx.avals_out])
        return mlir.lower_fun(function, multiple_results=True)(ctx, *args)

    for platform in ("cpu", "cuda"):
        mlir.register_lowering(p, lower_partitioned, platform=platform)
    mlir.register_lowering(p, lower_plain)
    return p


forward_p = _op_primitive("fused_qk_rmsnorm_rope_gate", "forward", as_outputs)
backward_p = _op_primitive("fused_qk_rmsnorm_rope_gate_backward", "backward", as_gradients)
gate_backward_p = _op_primitive("apply_gate_backward", "gate_backward", lambda options, leaves: Product(*leaves))


def _names(args: Sequence[jax.Array], call: Call, tree: PyTreeDef) -> list[str]:
    """Of the axes of each operand."""
    names: list[str] = jax.tree.leaves(axes(call.options, *jax.tree.unflatten(tree, args)))
    return names


def _batched(
    function: Callable[..., Any],
    names: list[str],
    axis: Any,
    args: Sequence[jax.Array],
    dims: Sequence[int | None],
    call: Call,
    tree: PyTreeDef,
) -> tuple[list[jax.Array], list[int]]:
    """One call of `function` with the mapped axis among the leading ones."""

    def bind(*args: jax.Array) -> list[jax.Array]:
        return jax.tree.leaves(function(call, *jax.tree.unflatten(tree, args)))

    outputs = list(batch(bind, names, axis, args, dims))
    return outputs, [0] * len(outputs)


def public_names(names: Iterable[str]) -> str:
    """What the functions that write a cache call inputs of these names."""
    given = dict.fromkeys(("q", "k", "v"), "qkv") | dict.fromkeys(CACHES, "kv_cache") | {"slots": "slot_mapping"}
    return ", ".join(dict.fromkeys(given.get(name, name) for name in names))


def refuse_mapped_cache(options: Options, mapped: Mapping[str, bool | None]) -> None:
    """What writes a cache has no rule for `jax.vmap`; `mapped` says of each operand whether it is mapped."""
    if not options.cache_axes:
        return
    names = public_names(name for name, is_mapped in mapped.items() if is_mapped)
    raise NotImplementedError(
        f"what writes a KV cache must not be mapped by jax.vmap, got {names} mapped. Make the mapped axis "
        "one of the tokens' leading axes, and add to the slots where each element's part of the cache starts."
    )


def _forward_batch(
    axis: Any,
    args: Sequence[jax.Array],
    dims: Sequence[int | None],
    *,
    call: Call,
    tree: PyTreeDef,
    body: ClosedJaxpr,
) -> tuple[list[jax.Array], list[int]]:
    del body
    (mapped,) = jax.tree.unflatten(tree, [dim is not None for dim in dims])
    refuse_mapped_cache(call.options, mapped._asdict())
    return _batched(forward, _names(args, call, tree), axis, args, dims, call, tree)


def _backward_batch(
    axis: Any,
    args: Sequence[jax.Array],
    dims: Sequence[int | None],
    *,
    call: Call,
    tree: PyTreeDef,
    body: ClosedJaxpr,
) -> tuple[list[jax.Array], list[int]]:
    del body

    names = _names(args, call, tree)
    outputs, out_dims = _batched(backward, names, axis, args, dims, call, tree)
    gradients = as_gradients(call.options, outputs)
    num_weights = len(weights_in(gradients))
    if num_weights and has_batched_leading_axes(names, dims):
        # The kernel sums over all tokens. Sums for each example are plain XLA, which drops them where nobody asks.
        def weights(*args: jax.Array) -> dict[str, Any]:
            return weights_in(on_heads(_reference.backward, call.options, *jax.tree.unflatten(tree, args)))

        activations = jax.typeof(gradients.q).sharding  # the batch is their first axis
        sharding = activations.update(spec=PartitionSpec(activations.spec[0], None))
        summed = compiler_partitioned(jax.vmap(weights, dims), dict.fromkeys(weights_in(gradients), sharding))(*args)
        outputs = jax.tree.leaves(gradients._replace(**summed))
    return outputs, out_dims


def _gate_backward_batch(
    axis: Any,
    args: Sequence[jax.Array],
    dims: Sequence[int | None],
    *,
    call: Call,
    tree: PyTreeDef,
    body: ClosedJaxpr,
) -> tuple[list[jax.Array], list[int]]:
    del body
    return _batched(gate_backward, _names(args, call, tree), axis, args, dims, call, tree)


register_batching(forward_p, _forward_batch)
register_batching(backward_p, _backward_batch)
register_batching(gate_backward_p, _gate_backward_batch)
