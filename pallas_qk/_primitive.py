"""Primitives that run under jit alone, and code without the caller's mesh. Knows nothing of the op."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractMesh

_Function = TypeVar("_Function", bound=Callable[..., Any])


def primitive(name: str) -> Primitive:
    """A primitive with several results."""
    p = Primitive(name)
    p.multiple_results = True

    @p.def_impl
    def impl(*args: Any, **params: Any) -> Any:
        # Eager only where JAX goes through jitted code step by step: under disable_jit, and in search of a NaN.
        with jax.disable_jit(False), jax.debug_nans(False), jax.debug_infs(False):
            return jax.jit(functools.partial(p.bind, **params))(*args)

    return p


def without_mesh() -> contextlib.AbstractContextManager[object]:
    """The context of one device's code. It keeps the device that an abstract mesh names."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def lower_untyped(ctx: mlir.LoweringRuleContext, function: Callable[..., Any], *args: Any) -> Any:
    """Lowers `function` without mesh axes in the types of its arrays."""
    types: Sequence[Any] = ctx.avals_in
    avals = [jax.core.ShapedArray(x.shape, x.dtype) for x in types]
    with without_mesh():
        return mlir.lower_fun(function, multiple_results=True)(ctx.replace(avals_in=avals), *args)


def compiler_partitioned(function: _Function, shardings: Any) -> _Function:
    """`function`, in plain XLA, with explicit mesh axes left to the compiler; its results have these shardings."""
    if not any(sharding.mesh.explicit_axes for sharding in jax.tree.leaves(shardings)):
        return function
    partitioned: _Function = jax.sharding.auto_axes(function, out_sharding=shardings)
    return partitioned
