"""Meshes of eight devices of the host, and the collectives that a compiled program holds."""

import re

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_COLLECTIVE = re.compile(
    r" = (?P<type>.*?) (?P<name>(?:all-(?:gather|reduce|to-all)|collective-(?:permute|broadcast)|reduce-scatter"
    r"|ragged-all-to-all)(?:-start)?)\((?P<operands>[^)]*)\)"
)


def mesh(axis_type: AxisType = AxisType.Auto, **axes: int) -> Mesh:
    """Of the host's devices, whatever else the machine has."""
    devices = jax.devices("cpu")
    size = int(np.prod(list(axes.values())))
    assert len(devices) >= size, f"XLA_FLAGS came too late: {len(devices)} devices of the host"
    return Mesh(np.array(devices[:size]).reshape(*axes.values()), tuple(axes), axis_types=(axis_type,) * len(axes))


def put(mesh: Mesh, arrays, specs) -> list[jax.Array]:
    return [jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))) for x, spec in zip(arrays, specs, strict=True)]


def collectives(text: str) -> list[str]:
    """Each collective of a compiled program, synchronous or the start of an asynchronous one: its name and its type."""
    return [f"{found['name']} {found['type']}" for line in text.splitlines() if (found := _COLLECTIVE.search(line))]
