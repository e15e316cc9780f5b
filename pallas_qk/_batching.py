"""vmap of a primitive whose arrays have leading axes. Knows nothing of the op."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import batching
from jax.sharding import PartitionSpec


def batch(
    bind: Callable[..., list[jax.Array]],
    names: Sequence[str],
    axis: Any,
    args: Sequence[jax.Array],
    dims: Sequence[int | None],
) -> list[jax.Array]:
    """Batched activations become a leading axis of one call; batched weights or tables make a call for each.

    `names` are the axes of each argument, "..." the leading ones. `axis` is JAX's AxisData: the mapped axis's size and
    mesh axis.
    """
    if not has_batched_leading_axes(names, dims):
        batched = [jnp.moveaxis(x, dim, 0) for x, dim in zip(args, dims, strict=True) if dim is not None]

        def one(xs: Iterable[jax.Array]) -> list[jax.Array]:
            xs = iter(xs)
            return bind(*(x if dim is None else next(xs) for x, dim in zip(args, dims, strict=True)))

        # A loop over a sharded axis needs all of it on each device: the compiler gathers it, of explicit axes we do.
        results = lax.map(one, [_with_first_axis_over(None, x) for x in batched])
        return [_with_first_axis_over(axis.explicit_mesh_axis, x) for x in results]

    def to_front(names: str, x: jax.Array, dim: int | None) -> jax.Array:
        if "..." not in names.split():
            return x
        front = names.split().index("...")
        if dim is not None:
            return jnp.moveaxis(x, dim, front)
        copies: jax.Array = batching.broadcast(x, axis.size, front, axis.explicit_mesh_axis)
        return copies

    return bind(*map(to_front, names, args, dims))


def _with_first_axis_over(mesh_axis: Any, x: jax.Array) -> jax.Array:
    """x with its first axis sharded over this explicit axis of its mesh, or, with None, over no explicit axis."""
    sharding = jax.typeof(x).sharding
    first, *others = sharding.spec
    return x if first == mesh_axis else jax.sharding.reshard(x, sharding.update(spec=PartitionSpec(mesh_axis, *others)))


def has_batched_leading_axes(names: Sequence[str], dims: Sequence[int | None]) -> bool:
    """Whether all that is batched has leading axes, to which the batch can be added."""
    return all(dim is None or "..." in x.split() for x, dim in zip(names, dims, strict=True))


def register_batching(p: Primitive, rule: Callable[..., Any]) -> None:
    """Maps a primitive by `rule` where any of its arguments is mapped; JAX asks even where none is."""

    def batched(axis: Any, args: Sequence[jax.Array], dims: Sequence[int | None], **params: Any) -> Any:
        if any(dim is not None for dim in dims):
            return rule(axis, args, dims, **params)
        outputs = p.bind(*args, **params)
        return outputs, [None] * len(outputs)

    batching.fancy_primitive_batchers[p] = batched
