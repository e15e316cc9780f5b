"""The checks of where a call runs: the process, the mesh, and how arrays are sharded over it."""

import functools
import math
import os

import jax
import numpy as np
from jax.sharding import NamedSharding

from pallas_qk._array_checks import FUNCTIONS, Sizes
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
    """Refuses heads that are cut across devices. `name` is "q_gate", "q" or "k"."""
    if num_heads % num_shards:
        heads = "num_kv_heads" if name == "k" else "num_q_heads"
        raise ValueError(
            f"{name} must hold whole heads on each device, got {heads}={num_heads} over {num_shards} devices. "
            f"Shard its last axis over a number of devices that divides {num_heads}, or leave it replicated there."
        )


def check_known_shardings(function: str, inputs: Inputs, sizes: Sizes, *, split: bool) -> None:
    """Refuses heads, and a packed axis, cut across devices where a sharding is known: of arrays, in explicit meshes.

    `split` says that heads have an axis of their own.
    """
    for array, source in sizes.sources.items():
        name = FUNCTIONS[function].array if array == "q" else array
        num_shards = _num_shards_of_last_axis(getattr(inputs, array))
        if source.heads is None:
            _check_packed(function, num_shards)
        elif not split:
            check_whole_heads(name, source.token // source.head, num_shards)
        elif num_shards > 1:
            raise ValueError(
                f"{name} must hold whole heads on each device, got head_dim over {num_shards} devices. "
                "Shard the axis of heads instead, or leave it replicated there."
            )


def _check_packed(function: str, num_shards: int) -> None:
    if num_shards > 1:
        raise ValueError(
            f"qkv must hold its last axis whole on each device, got it over {num_shards} devices: its parts don't end "
            f"where shards do. Shard its leading axes, pass {FUNCTIONS[function].instead}, or call inside "
            "jax.shard_map with each device's heads packed for it."
        )


def _num_shards_of_last_axis(x: jax.Array | np.ndarray) -> int:
    sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding) and len(sharding.spec) == x.ndim and (axes := sharding.spec[-1]):
        axes = (axes,) if isinstance(axes, str) else axes
        return math.prod(sharding.mesh.shape[axis] for axis in axes)
    return 1


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
