"""The op over devices and under vmap, once for every implementation: two primitives, forward and backward.

Arrays are flat in heads, (*lead, heads*D), with any leading axes; positions are (1 or 3, *lead). Leading axes become T
on each device alone: a reshape before that gathers a sharded axis that lies behind an unsharded one. The primitives
take the leaves of (Inputs,) or (Inputs, Outputs), so an array that a call does not have is no operand.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir
from jax.sharding import AbstractMesh, ManualAxisType, Mesh, NamedSharding, PartitionSpec

from pallas_qk import _checks, _implementations, _kernel, _reference
from pallas_qk._config import Options
from pallas_qk._operands import Call, Gradients, Inputs, Outputs, gradient_types


def forward(call: Call, inputs: Inputs) -> Outputs:
    """The op, with the gate wherever q has one."""
    leaves, tree = jax.tree.flatten((inputs,))
    outputs = forward_p.bind(*leaves, call=call, tree=tree, body=_body("forward", call, (inputs,)))
    return as_outputs(call.options, outputs)


def backward(call: Call, inputs: Inputs, cotangents: Outputs) -> Gradients:
    """The weights' gradients are summed over all leading axes."""
    operands = inputs, cotangents
    leaves, tree = jax.tree.flatten(operands)
    gradients = backward_p.bind(*leaves, call=call, tree=tree, body=_body("backward", call, operands))
    return _as_gradients(call.options, gradients)


def as_outputs(options: Options, leaves: Sequence) -> Outputs:
    names = ["q", "k", *(["v"] if options.packed else []), *(["gate"] if options.gate else [])]
    return Outputs(**dict(zip(names, leaves, strict=True)))


def output_shapes(options: Options, inputs: Inputs) -> Outputs:
    (head_dim,), (*lead, width) = inputs.q_weight.shape, inputs.q.shape
    if options.packed:
        q, k = (heads * head_dim for heads in options.packed)
    else:
        q, k = width // 2 if options.gate else width, inputs.k.shape[-1]
    shapes = Outputs(q, k, k if options.packed else None, q if options.gate else None)
    return Outputs(*(x and jax.ShapeDtypeStruct((*lead, x), inputs.q.dtype) for x in shapes))


def _as_gradients(options: Options, leaves: Sequence) -> Gradients:
    q, *k, q_weight, k_weight = leaves
    return Gradients(q, None if options.packed else k[0], q_weight, k_weight)


# Axes, by name. "..." are the leading ones; "q" and "k" are heads times D, "q_gate" heads times 2*D.


def axes(options: Options, *trees: Any) -> tuple[Any, ...]:
    """The axes of each array of the trees, the first of which is Inputs; another Inputs holds tangents."""
    q = "... packed" if options.packed else "... q_gate" if options.gate else "... q"
    cache = "... rotary" if trees[0].positions is None else "position rotary"
    of = {
        Inputs: Inputs(q, "... k", "lane", "lane", cache, "row ..."),
        Outputs: Outputs("... q", "... k", "... k", "... q"),
        Gradients: Gradients(q, "... k", "lane", "lane"),
    }

    def of_tree(tree):
        present = zip(tree, of[type(tree)], strict=True)
        return type(tree)(*(None if array is None else names for array, names in present))

    return tuple(map(of_tree, trees))


def on_heads(function: Callable, call: Call, *operands, flatten: bool = False):
    """The results, flat in heads, of a function of arrays (*lead, heads, 2*D or D); with `flatten`, of (T, …)."""
    inputs, options = operands[0], call.options
    (head_dim,), lead = inputs.q_weight.shape, inputs.q.shape[:-1]
    tokens = (math.prod(lead),) if flatten else lead
    widths = {"q": head_dim, "k": head_dim, "q_gate": 2 * head_dim}

    def split(names: str, x):
        *first, last = names.split()
        if first == ["..."]:
            heads = (x.shape[-1] // widths[last], widths[last]) if last in widths else x.shape[-1:]
            return x.reshape(*tokens, *heads)
        return x.reshape(x.shape[0], *tokens) if last == "..." else x

    results = function(*jax.tree.map(split, axes(options, *operands), operands), options=options)

    def merge(names: str, x):
        return x.reshape(*lead, math.prod(x.shape[len(tokens) :])) if names.startswith("...") else x

    return jax.tree.map(merge, axes(options, inputs, results)[1], results)


def _local(direction: str, call: Call, tree, *leaves: jax.Array) -> list[jax.Array]:
    """The op on one device's arrays."""
    run: Callable = _kernel.forward if direction == "forward" else _kernel.backward
    run = functools.partial(run, implementation=call.implementation)
    return jax.tree.leaves(on_heads(_with_gate(run), call, *jax.tree.unflatten(tree, leaves), flatten=True))


def _anywhere(direction: str, call: Call, tree, *leaves: jax.Array) -> list[jax.Array]:
    """The op in plain XLA, on arrays of any sharding."""
    run: Callable = _reference.forward if direction == "forward" else _reference.backward
    return jax.tree.leaves(on_heads(_with_gate(run), call, *jax.tree.unflatten(tree, leaves)))


def _with_gate(run: Callable) -> Callable:
    """Adds the gate that a forward leaves in place: a slice, which XLA fuses into what reads it."""

    def with_gate(inputs: Inputs, *cotangents: Outputs, options: Options):
        results = run(inputs, *cotangents, options=options)
        if isinstance(results, Outputs) and options.gate == "in_place":
            return results._replace(gate=_reference.parts(inputs, options).gate)
        return results

    return with_gate


def _body(direction: str, call: Call, operands):
    """The op as a jaxpr of arrays without mesh axes.

    A parameter of the primitive: JAX looks there for what must know its devices, as `custom_partitioning` must.
    """
    leaves, tree = jax.tree.flatten(operands)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        _checks.check_manual_axes(mesh)
        function: Callable = functools.partial(_local, direction, call, tree)
    else:
        function = _partitioned(direction, call, tree, operands[0].q.ndim - 1)
    with _without_mesh():
        return jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves))


def _without_mesh():
    """The context of one device's code. It keeps the device that an abstract mesh names."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


# Primitives


def primitive(name: str) -> Primitive:
    p = Primitive(name)
    p.multiple_results = True

    @p.def_impl
    def impl(*args, **params):
        # Eager only where JAX goes through jitted code step by step: under disable_jit, and in search of a NaN.
        with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
            return jax.jit(functools.partial(p.bind, **params))(*args)

    return p


def result_types(results: Outputs | Gradients, options: Options, operands):
    """Types of results that have a shape and dtype: sharded as what they are like, varying as what they depend on."""
    inputs = operands[0]
    k = inputs.q if options.packed else inputs.k
    if isinstance(results, Outputs):
        like, reads = (inputs.q, k, k, inputs.q), _read_by_outputs(options, *operands)
    else:
        like, reads = inputs[:4], _read_by_gradients(options, *operands)
    types = []
    for result, x, read in zip(results, like, reads, strict=True):
        if result is not None:
            varying = frozenset().union(*(y.manual_axis_type.varying for y in read if y is not None))
            update = {"shape": result.shape, "dtype": result.dtype, "manual_axis_type": ManualAxisType(varying=varying)}
            types.append(x.update(weak_type=False, **update))
    return types


def _read_by_outputs(options: Options, *trees: Inputs) -> tuple:
    """What each output depends on: inputs, and the tangents of inputs."""
    x = Inputs(*zip(*trees, strict=True))
    angles = x.cos_sin_cache + x.positions
    k = x.q if options.packed else x.k
    return x.q + x.q_weight + angles, k + x.k_weight + angles, k, x.q


def _read_by_gradients(options: Options, x: Inputs, ct: Outputs) -> tuple:
    """What each gradient depends on."""
    angles = x.cos_sin_cache, x.positions
    dq_weight = x.q, ct.q, *angles
    dk_weight = x.q if options.packed else x.k, ct.k, *angles
    dq, dk = (*dq_weight, x.q_weight, ct.gate), (*dk_weight, x.k_weight)
    return (*dq, *dk, ct.v) if options.packed else dq, dk, dq_weight, dk_weight


def lower_untyped(ctx, function: Callable, *args):
    """Lowers `function` without mesh axes in the types of its arrays."""
    avals = [jax.core.ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
    with _without_mesh():
        return mlir.lower_fun(function, multiple_results=True)(ctx.replace(avals_in=avals), *args)


def compiler_partitioned(function: Callable, shardings) -> Callable:
    """`function`, in plain XLA, with explicit mesh axes left to the compiler; its results have these shardings."""
    if not any(sharding.mesh.explicit_axes for sharding in jax.tree.leaves(shardings)):
        return function
    return jax.sharding.auto_axes(function, out_sharding=shardings)


def _op_primitive(name: str, direction: str, as_results: Callable) -> Primitive:
    p = primitive(name)

    @p.def_abstract_eval
    def abstract_eval(*args, call, tree, body):
        return result_types(as_results(call.options, body.out_avals), call.options, jax.tree.unflatten(tree, args))

    def lower_partitioned(ctx, *args, body, **_):
        context = ctx.module_context
        if isinstance(context.axis_context, mlir.ShardingContext):
            _checks.check_partitioner(context.axis_context.num_devices, exported=context.lowering_parameters.for_export)
        return lower_untyped(ctx, jaxpr_as_fun(body), *args)

    def lower_plain(ctx, *args, call, tree, **_):
        """Where plain XLA alone can run: without the partitioner's call, which such platforms may lack (TPU)."""
        _implementations.refuse_platforms(call.implementation, ctx.platforms or ctx.module_context.platforms)
        plain = functools.partial(_anywhere, direction, call, tree)
        function = compiler_partitioned(plain, [x.sharding for x in ctx.avals_out])
        return mlir.lower_fun(function, multiple_results=True)(ctx, *args)

    for platform in ("cpu", "cuda"):
        mlir.register_lowering(p, lower_partitioned, platform=platform)
    mlir.register_lowering(p, lower_plain)
    return p


forward_p = _op_primitive("fused_qk_rmsnorm_rope_gate", "forward", as_outputs)
backward_p = _op_primitive("fused_qk_rmsnorm_rope_gate_backward", "backward", _as_gradients)


# Partitioning


@functools.cache
def _partitioned(direction: str, call: Call, tree, num_lead: int) -> Callable:
    partitioned = custom_partitioning(lambda *leaves: _local(direction, call, tree, *leaves))
    partitioned.def_partition(
        functools.partial(_partition, direction, call, tree),
        sharding_rule=_sharding_rule(direction, call.options, tree, num_lead),
        # Decoded here: JAX has no name for a part of a mesh axis, such as 2 kv heads over an axis of 8 devices.
        decode_shardings=False,
    )
    return partitioned


def _all_axes(direction: str, options: Options, operands) -> tuple[list[str], list[str]]:
    """The axes of the operands and of the results."""
    results: Any = Gradients(*operands[0][:4])
    if direction == "forward":
        results = Outputs(True, True, options.packed, options.gate)
    *of_operands, of_results = axes(options, *operands, results)
    return jax.tree.leaves(of_operands), jax.tree.leaves(of_results)


def _sharding_rule(direction: str, options: Options, tree, num_lead: int) -> SdyShardingRule:
    """Leading axes and heads may be sharded, a packed axis may not: its parts don't end where shards do.

    Lanes count with the heads, so that `_partition` sees where one is cut. Any other axis is one of its array alone:
    what Shardy calls `need_replication_factors` it passes on from array to array as any other.
    """
    lead = [f"lead{i}" for i in range(num_lead)]
    shared: dict[str, list] = {"...": lead, "q": ["q"], "q_gate": [CompoundFactor("q", "half")], "k": ["k"]}
    numbers = itertools.count()

    def mapping(names: str) -> ArrayMapping:
        return ArrayMapping(*(dim for name in names.split() for dim in shared.get(name) or [f"whole{next(numbers)}"]))

    names = _all_axes(direction, options, jax.tree.unflatten(tree, range(tree.num_leaves)))
    operands, results = (tuple(map(mapping, arrays)) for arrays in names)
    half: dict[str, Any] = {"half": 2} if options.gate and not options.packed else {}
    return SdyShardingRule(operands, results, **half)


def _partition(direction: str, call: Call, tree, mesh: Mesh, operands, results):
    """What each device computes and how arrays are laid out for it, as `custom_partitioning` asks.

    q says how leading axes are sharded: Shardy leaves it to us where another array is sharded otherwise.
    """
    del results
    trees = jax.tree.unflatten(tree, operands)
    q, k = trees[0].q, trees[0].k
    mesh = _refined(mesh, list(_starts(q)))
    *lead, q_heads = _mesh_axes(mesh, q)
    # XLA pads an axis that doesn't divide, with rows that would count in the weights' gradients.
    lead = [
        mesh_axes if size % _num_parts(mesh, mesh_axes) == 0 else ()
        for mesh_axes, size in zip(lead, q.shape, strict=False)
    ]
    tokens = sum(lead, ())
    k_heads: tuple[str, ...] = ()
    if call.options.packed:
        q_heads = ()
    else:
        k_heads = tuple(axis for axis in _mesh_axes(mesh, k)[-1] if axis not in tokens)
        (head_dim,) = trees[0].q_weight.shape
        q_name, q_width = ("q_gate", 2 * head_dim) if call.options.gate else ("q", head_dim)
        _checks.check_whole_heads(q_name, q.shape[-1] // q_width, _num_parts(mesh, q_heads))
        _checks.check_whole_heads("k", k.shape[-1] // head_dim, _num_parts(mesh, k_heads))

    def sharding(names: str) -> NamedSharding:
        at: dict[str, list] = {"...": lead, "q": [q_heads], "q_gate": [q_heads], "k": [k_heads]}
        return NamedSharding(mesh, PartitionSpec(*(part for name in names.split() for part in at.get(name, [()]))))

    def one_device(*leaves):
        sums = tokens + q_heads, tokens + k_heads
        with _without_mesh():
            if direction == "forward" or not any(sums):
                return _local(direction, call, tree, *leaves)
            exact = call._replace(options=dataclasses.replace(call.options, round_dweights=False))
            *outputs, dq_weight, dk_weight = _local(direction, exact, tree, *leaves)
            types = gradient_types(jax.tree.unflatten(tree, leaves)[0], call.options)
            for x, over, of_weight in zip((dq_weight, dk_weight), sums, types[2:], strict=True):
                outputs.append((lax.psum(x, over) if over else x).astype(of_weight.dtype))
            return outputs

    operand_axes, result_axes = _all_axes(direction, call.options, trees)
    return mesh, one_device, list(map(sharding, result_axes)), tuple(map(sharding, operand_axes))


def _refined(mesh: Mesh, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh, or a flat one where there is none, with axes of prime sizes: each part of an axis has a name."""
    sizes = mesh.axis_sizes if mesh.size == len(devices) else (len(devices),)
    primes = [prime for size in sizes for prime in _prime_factors(size)]
    return Mesh(np.array(devices).reshape(primes), [f"axis{i}" for i in range(len(primes))])


def _prime_factors(n: int) -> list[int]:
    smallest = next((p for p in range(2, n + 1) if n % p == 0), None)
    return [smallest, *_prime_factors(n // smallest)] if smallest else []


def _starts(x) -> dict[jax.Device, tuple[int, ...]]:
    """Where each device's part of x starts, as if each axis had as many elements as there are devices.

    The devices are in the order in which collectives number them.
    """
    indices = x.sharding.devices_indices_map((x.sharding.num_devices,) * x.ndim)
    return {device: tuple(s.start or 0 for s in index) for device, index in indices.items()}


def _mesh_axes(mesh: Mesh, x) -> list[tuple[str, ...]]:
    """The mesh axes over which each axis of x is sharded, major to minor; none where no order of them fits."""
    starts = np.array(list(_starts(x).values())).reshape(*mesh.devices.shape, x.ndim)
    found = []
    for start in np.moveaxis(starts, -1, 0):
        strides = [start.take(1, axis).flat[0] for axis in range(start.ndim)]
        fits = (start == np.tensordot(strides, np.indices(start.shape), 1)).all()
        order = sorted((axis for axis, stride in enumerate(strides) if stride), key=lambda axis: -strides[axis])
        found.append(tuple(mesh.axis_names[axis] for axis in order) if fits else ())
    return found


def _num_parts(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)


# vmap


def batch(bind: Callable, names: Sequence[str], axis, args, dims):
    """Batched activations become a leading axis of one call; batched weights or tables make a call for each.

    `names` are the axes of each of the arguments; `axis` says how the mapped one is sharded, as JAX tells its rules.
    """
    if not _has_batched_leading_axes(names, dims):
        batched = [jnp.moveaxis(x, dim, 0) for x, dim in zip(args, dims, strict=True) if dim is not None]

        def one(xs):
            xs = iter(xs)
            return bind(*(x if dim is None else next(xs) for x, dim in zip(args, dims, strict=True)))

        # A loop over a sharded axis needs all of it on each device: the compiler gathers it, of explicit axes we do.
        results = lax.map(one, [_with_first_axis_over(None, x) for x in batched])
        return [_with_first_axis_over(axis.explicit_mesh_axis, x) for x in results]

    def to_front(names: str, x, dim):
        if "..." not in names.split():
            return x
        front = names.split().index("...")
        if dim is not None:
            return jnp.moveaxis(x, dim, front)
        return batching.broadcast(x, axis.size, front, axis.explicit_mesh_axis)

    return bind(*map(to_front, names, args, dims))


def _with_first_axis_over(mesh_axis, x: jax.Array) -> jax.Array:
    """x with its first axis sharded over this explicit axis of its mesh, or, with None, over no explicit axis."""
    sharding = jax.typeof(x).sharding
    first, *others = sharding.spec
    return x if first == mesh_axis else jax.sharding.reshard(x, sharding.update(spec=PartitionSpec(mesh_axis, *others)))


def _has_batched_leading_axes(names: Sequence[str], dims) -> bool:
    """Whether all that is batched has leading axes, to which the batch can be added."""
    return all(dim is None or "..." in x.split() for x, dim in zip(names, dims, strict=True))


def register_batching(p: Primitive, rule: Callable) -> None:
    """Maps a primitive by `rule` where any of its arguments is mapped; JAX asks even where none is."""

    def batched(axis, args, dims, **params):
        if any(dim is not None for dim in dims):
            return rule(axis, args, dims, **params)
        outputs = p.bind(*args, **params)
        return outputs, [None] * len(outputs)

    batching.fancy_primitive_batchers[p] = batched


def _forward_batch(axis, args, dims, *, call: Call, tree, body):
    del body

    def bind(*args):
        return jax.tree.leaves(forward(call, *jax.tree.unflatten(tree, args)))

    names = jax.tree.leaves(axes(call.options, *jax.tree.unflatten(tree, args)))
    outputs = batch(bind, names, axis, args, dims)
    return outputs, [0] * len(outputs)


def _backward_batch(axis, args, dims, *, call: Call, tree, body):
    del body

    def bind(*args):
        return jax.tree.leaves(backward(call, *jax.tree.unflatten(tree, args)))

    names = jax.tree.leaves(axes(call.options, *jax.tree.unflatten(tree, args)))
    outputs = list(batch(bind, names, axis, args, dims))
    if _has_batched_leading_axes(names, dims):
        # The kernel sums over all tokens. Sums for each example are plain XLA, which drops them where nobody asks.
        def weights(*args):
            gradients = on_heads(_reference.backward, call, *jax.tree.unflatten(tree, args))
            return gradients.q_weight, gradients.k_weight

        activations = jax.typeof(outputs[0]).sharding  # the batch is their first axis
        sharding = activations.update(spec=PartitionSpec(activations.spec[0], None))
        outputs[-2:] = compiler_partitioned(jax.vmap(weights, dims), (sharding, sharding))(*args)
    return outputs, [0] * len(outputs)


register_batching(forward_p, _forward_batch)
register_batching(backward_p, _backward_batch)
