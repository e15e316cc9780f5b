"""Meshes of eight devices of the host, and the collectives that a compiled program holds."""

import contextlib
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


MODES = {
    "auto": (AxisType.Auto, False),
    "auto, set_mesh": (AxisType.Auto, True),
    "explicit": (AxisType.Explicit, False),
    "explicit, set_mesh": (AxisType.Explicit, True),
}


@contextlib.contextmanager
def mesh_of(axes: dict[str, int], mode: str):
    axis_type, is_set = MODES[mode]
    on = mesh(axis_type, **axes)
    with jax.set_mesh(on) if is_set else contextlib.nullcontext():
        yield on


def put(mesh: Mesh, arrays, specs) -> list[jax.Array]:
    return [jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec))) for x, spec in zip(arrays, specs, strict=True)]


def collectives(text: str) -> list[str]:
    """Each collective of a compiled program, synchronous or the start of an asynchronous one: its name and its type."""
    return [f"{found['name']} {found['type']}" for line in text.splitlines() if (found := _COLLECTIVE.search(line))]


def compiled(function, args, jit=jax.jit):
    """The results, and the collectives of the program that gave them."""
    program = jit(function).lower(*args).compile()
    return program(*args), collectives(program.as_text())


def assert_only_weight_sums(found: list[str], head_dim: int, most: int = 2) -> None:
    """Sums of the two weights' gradients in float32, together or each over its own devices."""
    assert 1 <= len(found) <= most, found
    for collective in found:
        name, types = collective.split(" ", 1)
        shapes = re.findall(r"\w+\[[\d,]*\]", types)
        assert name.removesuffix("-start") == "all-reduce" and set(shapes) == {f"f32[{head_dim}]"}, found
