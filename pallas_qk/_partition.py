"""What one device runs: the op as a program without mesh axes, and how the compiler partitions it over a mesh.

Arrays are flat in heads, (*lead, heads*D), with any leading axes; positions are (1 or 3, *lead). Leading axes become T
on each device alone: a reshape before that gathers a sharded axis that lies behind an unsharded one.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.extend.core import ClosedJaxpr
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.tree_util import PyTreeDef

from pallas_qk import _cache_axes, _dispatch, _mesh_checks, _reference
from pallas_qk._options import Options
from pallas_qk._primitive import without_mesh
from pallas_qk._rows import (
    CACHES,
    Call,
    Inputs,
    Outputs,
    Product,
    as_gradients,
    axes,
    differentiated,
    gradient_types,
    head_dim_of,
    kinds_in_outputs,
    kinds_of,
    on_heads,
    sources_of,
    split_axis,
    weights_in,
    with_handed_on,
)


def on_one_device(direction: str, call: Call, tree: PyTreeDef, *leaves: jax.Array) -> list[jax.Array]:
    """The op on one device's arrays, by the implementation that is chosen there."""
    run: Callable[..., Any] = getattr(_dispatch, direction)
    return _run_on_heads(functools.partial(run, implementation=call.implementation), call, tree, leaves, flatten=True)


def in_plain_xla(direction: str, call: Call, tree: PyTreeDef, *leaves: jax.Array) -> list[jax.Array]:
    """The op on arrays of any sharding, which the compiler partitions as it does any other program."""
    run: Callable[..., Any] = getattr(_reference, direction)
    return _run_on_heads(run, call, tree, leaves, flatten=False)


def _run_on_heads(
    run: Callable[..., Any], call: Call, tree: PyTreeDef, leaves: Sequence[jax.Array], *, flatten: bool
) -> list[jax.Array]:
    def with_rows_in_place(inputs: Inputs, *others: Any, options: Options) -> Any:
        """Rows that no kernel writes are a slice, which XLA fuses into what reads it."""
        results = run(inputs, *others, options=options)
        if isinstance(results, Outputs):
            in_place = [name for name, kind in kinds_of(options).items() if not kind.targets]
            rows = _reference.parts(inputs, options) if in_place else {}
            results = results._replace(**{name: rows[name] for name in in_place})
            results = with_handed_on(results, inputs, options)
        return results

    operands = jax.tree.unflatten(tree, leaves)
    return jax.tree.leaves(on_heads(with_rows_in_place, call.options, *operands, flatten=flatten))


def program(direction: str, call: Call, operands: tuple[Any, ...]) -> ClosedJaxpr:
    """The op as a jaxpr of arrays without mesh axes: of one device inside shard_map, elsewhere of all of them."""
    leaves, tree = jax.tree.flatten(operands)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        _mesh_checks.check_manual_axes(mesh)
        function: Callable[..., Any] = functools.partial(on_one_device, direction, call, tree)
    else:
        function = _partitioned(direction, call, tree, operands[0].q.ndim - 1)
    with without_mesh():
        return jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in leaves))


@functools.cache
def _partitioned(direction: str, call: Call, tree: PyTreeDef, num_lead: int) -> Callable[..., Any]:
    partitioned = custom_partitioning(lambda *leaves: on_one_device(direction, call, tree, *leaves))
    partitioned.def_partition(
        functools.partial(partition, direction, call, tree),
        sharding_rule=_sharding_rule(direction, call.options, tree, num_lead),
        # Decoded here: JAX has no name for a part of a mesh axis, such as 2 kv heads over an axis of 8 devices.
        decode_shardings=False,
    )
    return partitioned


def _all_axes(direction: str, options: Options, operands: Sequence[Any]) -> tuple[list[str], list[str]]:
    """The axes of the operands and of the results."""
    results: Any = differentiated(operands[0])
    if direction == "forward":
        results = Outputs(**dict.fromkeys(kinds_in_outputs(options), True))
    elif direction == "gate_backward":
        results = Product(q=True, attended=True)
    *of_operands, of_results = axes(options, *operands, results)
    return jax.tree.leaves(of_operands), jax.tree.leaves(of_results)


def _sharding_rule(direction: str, options: Options, tree: PyTreeDef, num_lead: int) -> SdyShardingRule:
    """Leading axes and heads may be sharded, a packed axis may not: its parts don't end where shards do.

    Lanes count with the heads, so that `partition` sees where one is cut. Every other axis gets a factor of its own.
    Shardy would propagate a `need_replication_factor` between arrays.

    A cache shares no factor with k and v: where they were cut otherwise, Shardy would gather it.
    """
    lead = [f"lead{i}" for i in range(num_lead)]
    numbers = itertools.count()
    rows_per_head: dict[str, int] = {}

    def dims(axis: str) -> list[Any]:
        heads, count = split_axis(axis)
        if axis == "...":
            return lead
        if axis.startswith(CACHES):
            return [axis]  # a cache is cut as it was
        if heads not in ("q", "k"):
            return [f"whole{next(numbers)}"]
        if count == 1:
            return [heads]
        rows_per_head[f"{heads}_rows"] = count
        return [CompoundFactor(heads, f"{heads}_rows")]

    def mapping(names: str) -> ArrayMapping:
        return ArrayMapping(*(dim for name in names.split() for dim in dims(name)))

    names = _all_axes(direction, options, jax.tree.unflatten(tree, range(tree.num_leaves)))
    operands, results = (tuple(map(mapping, arrays)) for arrays in names)
    factor_sizes: dict[str, Any] = rows_per_head
    return SdyShardingRule(operands, results, **factor_sizes)


def partition(
    direction: str, call: Call, tree: PyTreeDef, mesh: Mesh, operands: Sequence[Any], results: Any
) -> tuple[Mesh, Callable[..., list[jax.Array]], list[NamedSharding], tuple[NamedSharding, ...]]:
    """What each device computes and how arrays are laid out for it, as `custom_partitioning` asks.

    q says how leading axes are sharded: Shardy leaves it to us where another array is sharded otherwise.
    """
    del results
    trees = jax.tree.unflatten(tree, operands)
    inputs = trees[0]
    mesh = _refined(mesh, list(_starts(inputs.q)))
    *lead, _ = _mesh_axes(mesh, inputs.q)
    # XLA pads an axis that doesn't divide, with rows that would count in the weights' gradients.
    lead = [
        mesh_axes if size % _num_parts(mesh, mesh_axes) == 0 else ()
        for mesh_axes, size in zip(lead, inputs.q.shape, strict=False)
    ]
    if call.options.cache_axes:
        lead = [() for _ in lead]  # each device writes the rows of all tokens
    tokens = sum(lead, ())
    heads = _heads_over(call.options, mesh, inputs, tokens)

    def sharding(names: str) -> NamedSharding:
        parts = [lead if name == "..." else [heads.get(split_axis(name)[0], ())] for name in names.split()]
        return NamedSharding(mesh, PartitionSpec(*itertools.chain.from_iterable(parts)))

    def one_device(*leaves: jax.Array) -> list[jax.Array]:
        sums = {"q_weight": tokens + heads["q"], "k_weight": tokens + heads["k"]}
        with without_mesh():
            if direction != "backward" or not any(sums.values()):
                return on_one_device(direction, call, tree, *leaves)
            exact = call._replace(options=dataclasses.replace(call.options, round_dweights=False))
            gradients = as_gradients(call.options, on_one_device(direction, exact, tree, *leaves))
            types = gradient_types(jax.tree.unflatten(tree, leaves)[0], call.options)
            summed = {}
            for name, x in weights_in(gradients).items():
                over = sums[name]
                summed[name] = (lax.psum(x, over) if over else x).astype(getattr(types, name).dtype)
            return jax.tree.leaves(gradients._replace(**summed))

    operand_axes, result_axes = _all_axes(direction, call.options, trees)
    return mesh, one_device, list(map(sharding, result_axes)), tuple(map(sharding, operand_axes))


def _heads_over(options: Options, mesh: Mesh, inputs: Inputs, tokens: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """The mesh axes over which the heads of q and of k are sharded, none of which shards tokens."""
    head_dim = head_dim_of(inputs, options)
    over: dict[str, tuple[str, ...]] = {"q": (), "k": ()}
    for array, source in sources_of(kinds_of(options)).items():
        if source.heads is not None:
            x, rows_per_head = getattr(inputs, array), len(source.kinds)
            over[source.heads] = tuple(axis for axis in _mesh_axes(mesh, x)[-1] if axis not in tokens)
            name, num_shards = "q_gate" if rows_per_head > 1 else array, _num_parts(mesh, over[source.heads])
            _mesh_checks.check_whole_heads(name, x.shape[-1] // (rows_per_head * head_dim), num_shards)
    if options.cache_axes:
        over["k"] = _heads_of_cache_over(options, mesh, inputs)
        over |= {f"{array}_{group}": over["k"] for array in CACHES for group in ("h", "hc")}
        over["scale_h"] = over["k"]
    return over


def _heads_of_cache_over(options: Options, mesh: Mesh, inputs: Inputs) -> tuple[str, ...]:
    """The mesh axes over which the heads of the cache are sharded, and with them k and v. A cache is never gathered."""
    caches = [cache for cache in (inputs.k_cache, inputs.v_cache) if cache is not None]
    sharded = [_mesh_axes(mesh, cache) for cache in caches]
    num_kv_heads = _cache_axes.sizes_of(options.cache_axes, caches[0].shape, head_dim_of(inputs, options))["h"]
    num_shards = [[_num_parts(mesh, axis) for axis in of_cache] for of_cache in sharded]
    _mesh_checks.check_cache(options, num_kv_heads, num_shards)
    heads = _cache_axes.axis_of_heads(options.cache_axes)
    return () if heads is None else sharded[0][heads]


def _refined(mesh: Mesh, devices: Sequence[jax.Device]) -> Mesh:
    """The mesh, or a flat one where there is none, with axes of prime sizes: each part of an axis has a name."""
    sizes = mesh.axis_sizes if mesh.size == len(devices) else (len(devices),)
    primes = [prime for size in sizes for prime in _prime_factors(size)]
    return Mesh(np.array(devices).reshape(primes), [f"axis{i}" for i in range(len(primes))])


def _prime_factors(n: int) -> list[int]:
    smallest = next((p for p in range(2, n + 1) if n % p == 0), None)
    return [smallest, *_prime_factors(n // smallest)] if smallest else []


def _starts(x: Any) -> dict[jax.Device, tuple[int, ...]]:
    """Where each device's part of x starts, as if each axis had as many elements as there are devices.

    The devices are in the order in which collectives number them.
    """
    indices = x.sharding.devices_indices_map((x.sharding.num_devices,) * x.ndim)
    return {device: tuple(s.start or 0 for s in index) for device, index in indices.items()}


def _mesh_axes(mesh: Mesh, x: Any) -> list[tuple[str, ...]]:
    """The mesh axes over which each axis of x is sharded, major to minor; none where no order of them fits."""
    starts = np.array(list(_starts(x).values())).reshape(*mesh.devices.shape, x.ndim)
    found = []
    for start in np.moveaxis(starts, -1, 0):
        strides = [start.take(1, axis).flat[0] for axis in range(start.ndim)]
        fits = (start == np.tensordot(strides, np.indices(start.shape), 1)).all()
        order = sorted((axis for axis, stride in enumerate(strides) if stride), key=lambda axis: -strides[axis])
        found.append(tuple(mesh.axis_names[axis] for axis in order) if fits else ())
    return found


def _num_parts(mesh: Mesh, mesh_axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in mesh_axes)
