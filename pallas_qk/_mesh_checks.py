"""The checks of where a call runs: the process, the mesh, and how arrays are sharded over it."""

import functools
import math
import os
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import NamedSharding

from pallas_qk import _cache_axes
from pallas_qk._array_checks import Function, Sizes
from pallas_qk._options import Options
from pallas_qk._rows import Inputs


@functools.cache
def _first_process() -> int:
    """The process in which the op was called first: not set at import, which may come before a fork."""
    return os.getpid()


def check_process() -> None:
    """Refuses a fork of a process in which JAX runs: its threads and GPU contexts stay behind; a call would hang."""
    if _first_process() != os.getpid():
        raise RuntimeError(
            f"the op must not run in a fork of a process that has called it, got process {os.getpid()} forked from "
            f"{_first_process()}. Start workers with multiprocessing.get_context('spawn')."
        )


def check_whole_heads(name: str, num_heads: int, num_shards: int) -> None:
    """Refuses heads that are cut across devices. `name` is "q_gate", "q", "k", "attended" or "kv_cache"."""
    if num_heads % num_shards:
        heads = "num_kv_heads" if name in ("k", "kv_cache") else "num_q_heads"
        axis = "axis of heads" if name == "kv_cache" else "last axis"
        raise ValueError(
            f"{name} must hold whole heads on each device, got {heads}={num_heads} over {num_shards} devices. "
            f"Shard its {axis} over a number of devices that divides {num_heads}, or leave it replicated there."
        )


def check_known_shardings(function: Function, inputs: Inputs, sizes: Sizes, *, split: bool) -> None:
    """Refuses heads, and a packed axis, cut across devices where a sharding is known: of arrays, in explicit meshes.

    `split` says that heads have an axis of their own.
    """
    for array, source in sizes.sources.items():
        name, x = function.array if array == "q" else array, getattr(inputs, array)
        if source.heads is None:
            _check_packed(function, _num_shards(x)[-1])
        else:
            check_known_sharding_of_heads(name, x, source.token // source.head, split=split)


def check_known_sharding_of_heads(name: str, x: jax.Array | np.ndarray, num_heads: int, *, split: bool) -> None:
    num_shards = _num_shards(x)[-1]
    if not split:
        check_whole_heads(name, num_heads, num_shards)
    elif num_shards > 1:
        raise ValueError(
            f"{name} must hold whole heads on each device, got head_dim over {num_shards} devices. "
            "Shard the axis of heads instead, or leave it replicated there."
        )


def _check_packed(function: Function, num_shards: int) -> None:
    if num_shards > 1:
        raise ValueError(
            f"{function.array} must hold its last axis whole on each device, got it over {num_shards} devices: its "
            f"parts don't end where shards do. Shard its leading axes, pass {function.instead}, or call inside "
            "jax.shard_map with each device's heads packed for it."
        )


def check_known_shardings_of_caches(options: Options, inputs: Inputs, num_kv_heads: int) -> None:
    """Refuses what `check_cache` does where shardings are known."""
    caches = (cache for cache in (inputs.k_cache, inputs.v_cache) if cache is not None)
    check_cache(options, num_kv_heads, [_num_shards(cache) for cache in caches])


def check_cache(options: Options, num_kv_heads: int, num_shards: Sequence[Sequence[int]]) -> None:
    """Refuses caches that are cut but for whole heads; `num_shards` are those of each axis of each cache."""
    heads, names = _cache_axes.axis_of_heads(options.cache_axes), _cache_axes.groups(options.cache_axes)
    for of_cache in num_shards:
        for axis, (name, shards) in enumerate(zip(names, of_cache, strict=True)):
            if shards == 1:
                continue
            if axis != heads:
                raise ValueError(
                    "kv_cache must be whole on each device but for its heads, "
                    f"got axis {name!r} over {shards} devices. "
                    "Call inside jax.shard_map, with each device's own part of the cache and its own slots."
                )
            if options.packed is not None:
                raise ValueError(
                    f"kv_cache must be whole on each device where q, k and v are packed, got heads over {shards} "
                    "devices. Call inside jax.shard_map with each device's heads packed, or pass q, k and v as three "
                    "arrays to the function that takes them."
                )
            check_whole_heads("kv_cache", num_kv_heads, shards)
    if len({tuple(of_cache) for of_cache in num_shards}) > 1:
        got = " and ".join(str(tuple(of_cache)) for of_cache in num_shards)
        raise ValueError(f"the caches of k and v must be cut alike, got {got} shards of their axes. Shard both alike.")


def _num_shards(x: jax.Array | np.ndarray) -> list[int]:
    """Along each axis, as far as it is known."""
    sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    num_shards = [1] * x.ndim
    if isinstance(sharding, NamedSharding):
        for axis, part in enumerate(sharding.spec):
            mesh_axes = (part,) if isinstance(part, str) else tuple(part or ())
            num_shards[axis] = math.prod(sharding.mesh.shape[name] for name in mesh_axes)
    return num_shards


def check_manual_axes(mesh: jax.sharding.AbstractMesh) -> None:
    """Refuses a shard_map that leaves axes to the compiler, which gives us no part of such a mesh to partition."""
    left = tuple(axis for axis in mesh.axis_names if axis not in mesh.manual_axes and mesh.shape[axis] > 1)
    if left:
        raise NotImplementedError(
            f"inside shard_map every axis of the mesh must be manual, got axes {left} that are not. "
            "Leave its axis_names out, or call the op in a second shard_map over these axes."
        )


def check_partitioner(num_devices: int, *, exported: bool) -> None:
    """Refuses several devices where the compiler can't ask us how to partition the op."""
    if num_devices > 1 and exported:
        raise NotImplementedError(
            f"jax.export for several devices needs the op inside jax.shard_map, got {num_devices} devices outside one. "
            "Put it there: elsewhere the compiler asks Python how to partition it, which an exported program can't."
        )
    if num_devices > 1 and not jax.config.jax_use_shardy_partitioner:  # type: ignore[attr-defined]
        raise NotImplementedError(
            f"the op over several devices needs the Shardy partitioner, got {num_devices} devices and "
            "jax_use_shardy_partitioner=False. Leave it on, as JAX does, or put the op inside jax.shard_map."
        )
