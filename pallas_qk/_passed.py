"""The calls that have passed their checks, which take 80 to 190 us of Python. One like them is not checked again.

A signature holds all that a check may read: the kind, type and sharding of each array and never its elements, every
other value with its type, and the mesh, which names the GPU that code is made for. What holds more than that, such as a
traced array, has no signature and is checked at each call.
"""

import functools
from collections.abc import Callable, Hashable, Iterable
from typing import Any

import jax
import numpy as np

_PLAIN = frozenset({type(None), bool, int, float, str})
_MOST = 4096  # a few MB; a call has one for each layer that it names by a Python integer
_kept: dict[Hashable, Any] = {}


class _UnknownError(Exception):
    """Of a value whose signature can't be told."""


def signature_of(function: Hashable, *values: Any) -> Hashable | None:
    """Equal for calls that pass the same checks with the same result; None where that can't be told."""
    try:
        return function, jax.sharding.get_abstract_mesh(), _signature(values)
    except _UnknownError:
        return None


def _signature(values: Iterable[Any]) -> tuple[Any, ...]:
    """One loop, for speed: the kind of each value, then what a check may read of it."""
    parts: list[Any] = []
    for x in values:
        kind: Any = type(x)
        parts.append(kind)  # 1, 1.0 and True are equal
        if kind in _PLAIN:
            parts.append(x)
        elif _is_concrete(kind):
            parts += x.aval, x.sharding  # what `jax.typeof` is made of
        elif isinstance(x, tuple | list):
            parts.append(_signature(x))
        elif kind is np.ndarray:
            parts += x.shape, x.dtype
        elif isinstance(x, np.number):
            parts.append(x)
        else:
            raise _UnknownError
    return tuple(parts)


@functools.lru_cache
def _is_concrete(kind: type) -> bool:
    """Whether it is a kind of JAX's arrays. Traced ones are instances of jax.Array and of none of its kinds."""
    return issubclass(kind, jax.Array)


def run(signature: Hashable | None, check: Callable[[], Any], call: Callable[[Any], Any]) -> Any:
    """`call` of what `check` finds, which is kept once the call has run, and found anew where nothing is kept."""
    found = None if signature is None else _kept.get(signature)
    if found is not None:
        return call(found)
    found = check()
    result = call(found)
    if signature is not None:
        if len(_kept) >= _MOST:
            _kept.clear()
        _kept[signature] = found
    return result
