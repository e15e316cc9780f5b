"""The op over devices and under vmap, once for every implementation: two primitives, forward and backward.

Arrays are flat in heads, (*lead, heads*D), with any leading axes; positions are (1 or 3, *lead). Leading axes become T
on each device alone: a reshape before that gathers a sharded axis that lies behind an unsharded one.
"""

import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import batching, mlir
from jax.sharding import AbstractMesh, ManualAxisType, Mesh, NamedSharding, PartitionSpec

from pallas_qk import _checks, _implementations, _reference
from pallas_qk._config import Options


class Call(NamedTuple):
    """What one call fixes besides its arrays."""

    head_dim: int
    options: Options
    implementation: str | None


# Operands by place, in both directions; backward has the outputs' cotangents too.
Q_GATE, K, Q_WEIGHT, K_WEIGHT, CACHE, POSITIONS, DQ_OUT, DK_OUT, DGATE_OUT = range(9)
CONSTANTS = (Q_WEIGHT, K_WEIGHT, CACHE)  # without leading axes

# For each result the operand that has its axes and their sharding, and the operands that it depends on.
LIKE = {"forward": (Q_GATE, K, Q_GATE), "backward": (Q_GATE, K, Q_WEIGHT, K_WEIGHT)}
READS = {
    "forward": ((Q_GATE, Q_WEIGHT, CACHE, POSITIONS), (K, K_WEIGHT, CACHE, POSITIONS), (Q_GATE,)),
    "backward": (
        (Q_GATE, Q_WEIGHT, CACHE, POSITIONS, DQ_OUT, DGATE_OUT),
        (K, K_WEIGHT, CACHE, POSITIONS, DK_OUT),
        (Q_GATE, CACHE, POSITIONS, DQ_OUT),
        (K, CACHE, POSITIONS, DK_OUT),
    ),
}


def forward(call: Call, *args: jax.Array) -> list[jax.Array]:
    """q_gate (*lead, Hq*2*D), k (*lead, Hkv*D), weights (D,), cos_sin_cache, positions (1 or 3, *lead).

    Returns q_out (*lead, Hq*D), k_out (*lead, Hkv*D) and gate_out (*lead, Hq*D).
    """
    return forward_p.bind(*args, call=call, body=_trace("forward", call, args))


def backward(call: Call, *args: jax.Array) -> list[jax.Array]:
    """The arguments of `forward` and the cotangents of its results.

    Returns dq_gate, dk and, summed over all leading axes in float32, dq_weight (D,) and dk_weight (D,).
    """
    return backward_p.bind(*args, call=call, body=_trace("backward", call, args))


def on_heads(function: Callable, call: Call, *args: jax.Array, flatten: bool = False) -> list[jax.Array]:
    """Results, flat in heads, of a function of arrays (*lead, heads, 2*D or D), or (T, heads, 2*D or D)."""
    lead = args[K].shape[:-1]
    tokens = (math.prod(lead),) if flatten else lead
    widths = {Q_GATE: 2 * call.head_dim} | dict.fromkeys((K, DQ_OUT, DK_OUT, DGATE_OUT), call.head_dim)
    split = [
        x.reshape(*tokens, x.shape[-1] // widths[place], widths[place]) if place in widths else x
        for place, x in enumerate(args)
    ]
    split[POSITIONS] = args[POSITIONS].reshape(args[POSITIONS].shape[0], *tokens)
    results = function(*split, options=call.options)
    return [x if x.ndim == 1 else x.reshape(*lead, x.shape[-2] * x.shape[-1]) for x in results]


def _local(direction: str, call: Call, *args: jax.Array) -> list[jax.Array]:
    """The op on one device's arrays."""
    run = {"forward": _implementations.forward, "backward": _implementations.backward}[direction]
    return on_heads(functools.partial(run, implementation=call.implementation), call, *args, flatten=True)


def without_mesh():
    """The context in which one device's code is traced. It keeps the device that an abstract mesh names."""
    return jax.sharding.use_abstract_mesh(
        AbstractMesh((), (), abstract_device=jax.sharding.get_abstract_mesh().abstract_device)
    )


def _trace(direction: str, call: Call, args: Sequence[jax.Array]):
    """The op as a jaxpr of untyped arrays: a parameter of the primitive, in which JAX finds that it needs devices."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        _checks.check_manual_axes(mesh)
        function: Callable = functools.partial(_local, direction, call)
    else:
        function = _partitioned(direction, call, args[K].ndim - 1)
    with without_mesh():
        return jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args))


def primitive(name: str) -> Primitive:
    p = Primitive(name)
    p.multiple_results = True

    @p.def_impl
    def impl(*args, **params):
        # Eager only where JAX evaluates jitted code step by step: under disable_jit, and to find a NaN.
        with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
            return jax.jit(functools.partial(p.bind, **params))(*args)

    return p


def typed(aval, like, reads):
    """The type of a result: shape and dtype of `aval`, mesh axes of `like`, varying as the operands it depends on."""
    varying = frozenset().union(*(operand.manual_axis_type.varying for operand in reads))
    return like.update(
        shape=aval.shape, dtype=aval.dtype, weak_type=False, manual_axis_type=ManualAxisType(varying=varying)
    )


def compiler_partitioned(function: Callable, like: Sequence[jax.Array]) -> Callable:
    """`function`, in plain XLA, with explicit mesh axes left to the compiler; its results are sharded as `like`."""
    shardings = tuple(jax.typeof(x).sharding for x in like)
    if not any(sharding.mesh.explicit_axes for sharding in shardings):
        return function
    return jax.sharding.auto_axes(function, out_sharding=shardings)


def lower_untyped(ctx, function: Callable, *args):
    """Lowers `function` without mesh axes in the types of its arrays."""
    with without_mesh():
        avals = [jax.core.ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
        return mlir.lower_fun(function, multiple_results=True)(ctx.replace(avals_in=avals), *args)


def _op_primitive(name: str, direction: str) -> Primitive:
    p = primitive(name)

    @p.def_abstract_eval
    def abstract_eval(*args, call, body):
        del call
        return [
            typed(aval, args[like], [args[place] for place in reads])
            for aval, like, reads in zip(body.out_avals, LIKE[direction], READS[direction], strict=True)
        ]

    def lower(ctx, *args, call, body):
        del call
        context = ctx.module_context
        if context.lowering_parameters.for_export and isinstance(context.axis_context, mlir.ShardingContext):
            _checks.check_export(context.axis_context.num_devices)
        return lower_untyped(ctx, jaxpr_as_fun(body), *args)

    mlir.register_lowering(p, lower)
    return p


forward_p = _op_primitive("fused_qk_rmsnorm_rope_gate", "forward")
backward_p = _op_primitive("fused_qk_rmsnorm_rope_gate_backward", "backward")


# Partitioning


@functools.cache
def _partitioned(direction: str, call: Call, num_lead: int) -> Callable:
    partitioned = custom_partitioning(lambda *args: _local(direction, call, *args))
    partitioned.def_partition(
        functools.partial(_partition, direction, call),
        sharding_rule=_sharding_rule(direction, num_lead),
        # Also parts of a mesh axis, which a NamedSharding can't name: 2 heads over an axis of 8 devices.
        decode_shardings=False,
    )
    return partitioned


def _sharding_rule(direction: str, num_lead: int) -> SdyShardingRule:
    """Leading axes and heads may be sharded. A head's lanes count with the heads, which `_partition` then sees cut."""
    lead = [f"lead{i}" for i in range(num_lead)]
    q_gate = ArrayMapping(*lead, CompoundFactor("q", "half"))
    q, k = ArrayMapping(*lead, "q"), ArrayMapping(*lead, "k")
    weight, cache, positions = ArrayMapping("d"), ArrayMapping("p", "r"), ArrayMapping("row", *lead)
    inputs = (q_gate, k, weight, weight, cache, positions)
    operands, results = {
        "forward": (inputs, (q, k, q)),
        "backward": ((*inputs, q, k, q), (q_gate, k, weight, weight)),
    }[direction]
    return SdyShardingRule(operands, results, need_replication_factors=("half", "d", "p", "r", "row"), half=2)


def _partition(direction: str, call: Call, mesh: Mesh, operands, results):
    """What each device computes and how arrays are laid out for it, for `custom_partitioning`.

    q_gate says how leading axes are sharded. The partitioner leaves conflicts to us: k or positions otherwise sharded.
    """
    del results
    q_gate, k = operands[Q_GATE], operands[K]
    mesh = _refined(mesh, list(_starts(q_gate)))
    *lead, q_heads = _mesh_axes(mesh, q_gate)
    *_, k_heads = _mesh_axes(mesh, k)
    # Rows that pad an uneven axis would count in the weights' gradients.
    lead = [() if size % _num_parts(mesh, axes) else axes for size, axes in zip(k.shape, lead, strict=False)]
    tokens = sum(lead, ())
    k_heads = tuple(axis for axis in k_heads if axis not in tokens)
    _checks.check_whole_heads("q_gate", q_gate.shape[-1] // (2 * call.head_dim), _num_parts(mesh, q_heads))
    _checks.check_whole_heads("k", k.shape[-1] // call.head_dim, _num_parts(mesh, k_heads))

    def one_device(*args):
        with without_mesh():
            outputs = _local(direction, call, *args)
            for place, heads in ((2, q_heads), (3, k_heads)) if direction == "backward" else ():
                if tokens + heads:
                    outputs[place] = lax.psum(outputs[place], tokens + heads)
            return outputs

    q, k, positions, constant = ((*lead, q_heads), (*lead, k_heads), (None, *lead), ())
    specs = (q, k, constant, constant, constant, positions, q, k, q)
    shardings = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]
    return mesh, one_device, [shardings[place] for place in LIKE[direction]], tuple(shardings[: len(operands)])


def _refined(mesh: Mesh, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh, or a flat one, with axes of prime sizes, which name parts of an axis: 2 heads over one of 8 devices."""
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


def batch(bind: Callable, args, dims, constants: Collection[int]):
    """Batched activations become a leading axis of one call; batched weights or tables make a call for each."""
    (size,) = {x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None}
    if any(dims[place] is not None for place in constants):
        batched = [jnp.moveaxis(x, dim, 0) for x, dim in zip(args, dims, strict=True) if dim is not None]

        def call(xs):
            xs = iter(xs)
            return bind(*(x if dim is None else next(xs) for x, dim in zip(args, dims, strict=True)))

        return lax.map(call, batched)

    def to_front(place, x, dim):
        if place in constants:
            return x
        front = 1 if place == POSITIONS else 0
        if dim is not None:
            return jnp.moveaxis(x, dim, front)
        return jnp.broadcast_to(jnp.expand_dims(x, front), (*x.shape[:front], size, *x.shape[front:]))

    return bind(*(to_front(place, x, dim) for place, (x, dim) in enumerate(zip(args, dims, strict=True))))


def _forward_batch(args, dims, *, call, body):
    del body
    outputs = batch(functools.partial(forward, call), args, dims, CONSTANTS)
    return outputs, [0] * len(outputs)


def _backward_batch(args, dims, *, call, body):
    del body
    outputs = list(batch(functools.partial(backward, call), args, dims, CONSTANTS))
    if all(dims[place] is None for place in CONSTANTS):
        # The kernel sums over every token. A sum for each example is plain XLA, which drops it where nobody wants it.
        outputs[2:] = compiler_partitioned(
            jax.vmap(lambda *args: tuple(on_heads(_reference.backward, call, *args)[2:]), dims), outputs[2:]
        )(*args)
    return outputs, [0] * len(outputs)


batching.primitive_batchers[forward_p] = _forward_batch
batching.primitive_batchers[backward_p] = _backward_batch
