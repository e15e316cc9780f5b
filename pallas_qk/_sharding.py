"""The op over devices and under vmap, once for every implementation: two primitives, forward and backward.

Arrays are flat in heads, (*lead, heads*D), with any leading axes; positions are (1 or 3, *lead). Leading axes become T
on each device alone: a reshape before that gathers a sharded axis that lies behind an unsharded one.
"""

import functools
import math
from collections.abc import Callable, Iterable, Sequence
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


# Operands by place, in both directions; backward has the cotangents too.
Q_GATE, K, Q_WEIGHT, K_WEIGHT, CACHE, POSITIONS, DQ_OUT, DK_OUT, DGATE_OUT = range(9)
CONSTANTS = (Q_WEIGHT, K_WEIGHT, CACHE)  # without leading axes

# For each result the operand that has its axes, and the operands that it depends on.
_LIKE = {"forward": (Q_GATE, K, Q_GATE), "backward": (Q_GATE, K, Q_WEIGHT, K_WEIGHT)}
_READS = {
    "forward": ({Q_GATE, Q_WEIGHT, CACHE, POSITIONS}, {K, K_WEIGHT, CACHE, POSITIONS}, {Q_GATE}),
    "backward": (
        {Q_GATE, Q_WEIGHT, CACHE, POSITIONS, DQ_OUT, DGATE_OUT},
        {K, K_WEIGHT, CACHE, POSITIONS, DK_OUT},
        {Q_GATE, CACHE, POSITIONS, DQ_OUT},
        {K, CACHE, POSITIONS, DK_OUT},
    ),
}


def forward(call: Call, *args: jax.Array) -> list[jax.Array]:
    """q_gate (*lead, Hq*2*D), k (*lead, Hkv*D), weights (D,), cos_sin_cache, positions (1 or 3, *lead).

    Returns q_out (*lead, Hq*D), k_out (*lead, Hkv*D) and gate_out (*lead, Hq*D).
    """
    return forward_p.bind(*args, call=call, body=_body("forward", call, args))


def backward(call: Call, *args: jax.Array) -> list[jax.Array]:
    """The arguments of `forward` and the cotangents of its results.

    Returns dq_gate, dk and, summed over all leading axes in float32, dq_weight (D,) and dk_weight (D,).
    """
    return backward_p.bind(*args, call=call, body=_body("backward", call, args))


def on_heads(function: Callable, call: Call, *args: jax.Array, flatten: bool = False) -> list[jax.Array]:
    """The results, flat in heads, of a function of arrays (*lead, heads, 2*D or D); with `flatten`, of (T, …)."""
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


def _body(direction: str, call: Call, args: Sequence[jax.Array]):
    """The op as a jaxpr of arrays without mesh axes.

    A parameter of the primitive: JAX looks there for what must know its devices, as `custom_partitioning` must.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        _checks.check_manual_axes(mesh)
        function: Callable = functools.partial(_local, direction, call)
    else:
        function = _partitioned(direction, call, args[K].ndim - 1)
    with _without_mesh():
        return jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args))


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


def result_types(direction: str, results, operands, places: Iterable[int]):
    """Types of results that have a shape and dtype: sharded as what they are like, varying as what they depend on."""
    at = list(zip(places, operands, strict=True))
    types = []
    for result, like, reads in zip(results, _LIKE[direction], _READS[direction], strict=True):
        varying = frozenset().union(*(x.manual_axis_type.varying for place, x in at if place in reads))
        update = {"shape": result.shape, "dtype": result.dtype, "manual_axis_type": ManualAxisType(varying=varying)}
        types.append(operands[like].update(weak_type=False, **update))
    return types


def lower_untyped(ctx, function: Callable, *args):
    """Lowers `function` without mesh axes in the types of its arrays."""
    avals = [jax.core.ShapedArray(x.shape, x.dtype) for x in ctx.avals_in]
    with _without_mesh():
        return mlir.lower_fun(function, multiple_results=True)(ctx.replace(avals_in=avals), *args)


def compiler_partitioned(function: Callable, like: Sequence[jax.Array]) -> Callable:
    """`function`, in plain XLA, with explicit mesh axes left to the compiler; its results are sharded as `like`."""
    shardings = tuple(jax.typeof(x).sharding for x in like)
    if not any(sharding.mesh.explicit_axes for sharding in shardings):
        return function
    return jax.sharding.auto_axes(function, out_sharding=shardings)


def _op_primitive(name: str, direction: str) -> Primitive:
    p = primitive(name)

    @p.def_abstract_eval
    def abstract_eval(*args, body, **_):
        return result_types(direction, body.out_avals, args, range(len(args)))

    def lower(ctx, *args, body, **_):
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
        # Decoded here: JAX has no name for a part of a mesh axis, such as 2 kv heads over an axis of 8 devices.
        decode_shardings=False,
    )
    return partitioned


def _sharding_rule(direction: str, num_lead: int) -> SdyShardingRule:
    """Leading axes and heads may be sharded. Lanes count with the heads, so that `_partition` sees where one is cut."""
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
    """What each device computes and how arrays are laid out for it, as `custom_partitioning` asks.

    q_gate says how leading axes are sharded: Shardy leaves it to us where k or positions are sharded otherwise.
    """
    del results
    q_gate, k = operands[Q_GATE], operands[K]
    mesh = _refined(mesh, list(_starts(q_gate)))
    *lead, q_heads = _mesh_axes(mesh, q_gate)
    *_, k_heads = _mesh_axes(mesh, k)
    # XLA pads an axis that doesn't divide, with rows that would count in the weights' gradients.
    lead = [axes if size % _num_parts(mesh, axes) == 0 else () for axes, size in zip(lead, k.shape, strict=False)]
    tokens = sum(lead, ())
    k_heads = tuple(axis for axis in k_heads if axis not in tokens)
    _checks.check_whole_heads("q_gate", q_gate.shape[-1] // (2 * call.head_dim), _num_parts(mesh, q_heads))
    _checks.check_whole_heads("k", k.shape[-1] // call.head_dim, _num_parts(mesh, k_heads))

    def one_device(*args):
        with _without_mesh():
            outputs = _local(direction, call, *args)
            sums = {2: tokens + q_heads, 3: tokens + k_heads} if direction == "backward" else {}
            return [lax.psum(x, sums[place]) if sums.get(place) else x for place, x in enumerate(outputs)]

    q, k, positions, constant = ((*lead, q_heads), (*lead, k_heads), (None, *lead), ())
    specs = (q, k, constant, constant, constant, positions, q, k, q)
    shardings = [NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs]
    return mesh, one_device, [shardings[like] for like in _LIKE[direction]], tuple(shardings[: len(operands)])


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


def batch(bind: Callable, args, dims, constants: Iterable[int]):
    """Batched activations become a leading axis of one call; batched weights or tables make a call for each."""
    if any(dims[place] is not None for place in constants):
        batched = [jnp.moveaxis(x, dim, 0) for x, dim in zip(args, dims, strict=True) if dim is not None]

        def one(xs):
            xs = iter(xs)
            return bind(*(x if dim is None else next(xs) for x, dim in zip(args, dims, strict=True)))

        return lax.map(one, batched)

    (size,) = {x.shape[dim] for x, dim in zip(args, dims, strict=True) if dim is not None}

    def to_front(place, x, dim):
        if place in constants:
            return x
        front = 1 if place == POSITIONS else 0
        if dim is not None:
            return jnp.moveaxis(x, dim, front)
        return jnp.broadcast_to(jnp.expand_dims(x, front), (*x.shape[:front], size, *x.shape[front:]))

    return bind(*map(to_front, range(len(args)), args, dims))


def _forward_batch(args, dims, *, call, **_):
    outputs = batch(functools.partial(forward, call), args, dims, CONSTANTS)
    return outputs, [0] * len(outputs)


def _backward_batch(args, dims, *, call, **_):
    outputs = list(batch(functools.partial(backward, call), args, dims, CONSTANTS))
    if all(dims[place] is None for place in CONSTANTS):
        # The kernel sums over all tokens. Sums for each example are plain XLA, which drops them where nobody asks.
        each = jax.vmap(lambda *args: tuple(on_heads(_reference.backward, call, *args)[2:]), dims)
        outputs[2:] = compiler_partitioned(each, outputs[2:])(*args)
    return outputs, [0] * len(outputs)


batching.primitive_batchers[forward_p] = _forward_batch
batching.primitive_batchers[backward_p] = _backward_batch
