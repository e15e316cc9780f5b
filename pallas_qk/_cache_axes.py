"""How a KV cache lies in memory, from the names of its axes.

b block (page, or sequence), s place in a block, h kv head, d lane, l layer; c tells k from v where one array holds
both. "(h c)" is one axis of the array that stands for two, of which c runs faster. Slot b * block_size + s is place s
of block b.
"""

import functools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

ALIASES = {"NHD": "b s h d", "HND": "b h s d"}
_SHARED = ("hc", "ch", "cd")  # pairs of axes that may be one axis of the array


class Slots(NamedTuple):
    """The places of a cache, as strides in elements."""

    block_size: int  # slots per block
    block: int  # from a block to the next
    place: int  # from a place of a block to the next
    capacity: int  # slots of a layer
    layer: int = 0  # from a layer to the next
    num_layers: int = 1


@functools.cache
def groups(cache_axes: str) -> tuple[str, ...]:
    """The axes that each axis of the array stands for: ("b", "s", "hc", "d"). Empty where the names fit no cache."""
    found = re.findall(r"\(([^()]*)\)|([^()\s]+|[()])", ALIASES.get(cache_axes, cache_axes))
    parts = tuple("".join(part).replace(" ", "") for part in found)
    names = "".join(parts)
    fits = (
        len(set(names)) == len(names)
        and set("bshd") <= set(names) <= set("bshdlc")
        and all(len(part) == 1 or part in _SHARED for part in parts)
        and names.endswith("d")
        and names.find("l") <= 0
    )
    return parts if fits else ()


@functools.cache
def holds_both(cache_axes: str) -> bool:
    """Whether one array holds k and v."""
    return any("c" in part for part in groups(cache_axes))


def axis_of_heads(cache_axes: str) -> int | None:
    """The axis of the array along which heads follow one another; None where k and v are each of all heads."""
    return next((axis for axis, part in enumerate(groups(cache_axes)) if part in ("h", "hc")), None)


def unit_shape(cache_axes: str) -> tuple[int, ...]:
    """The shape where every size but that of c is 1."""
    return tuple(2 if "c" in part else 1 for part in groups(cache_axes))


def known_shape(cache_axes: str, num_kv_heads: int | None, head_dim: int | None) -> tuple[int | str, ...]:
    """The sizes that a call fixes, and names for the others; a call that reads a cache fixes no heads and lanes."""
    sizes = {"h": num_kv_heads, "d": head_dim, "c": 2}
    names = {"b": "num_blocks", "s": "block_size", "l": "num_layers", "h": "num_kv_heads", "d": "head_dim"}

    def size(part: str) -> int | str:
        unknown = next((names[x] for x in part if sizes.get(x) is None), None)
        if unknown is not None:
            return unknown if len(part) == 1 else f"2 * {unknown}"
        return math.prod(sizes[x] or 0 for x in part)

    return tuple(map(size, groups(cache_axes)))


def heads_of(cache_axes: str, shape: Sequence[int]) -> tuple[int, int]:
    """The number of heads and of lanes of a cache."""
    sizes = {x: size // len(part) for part, size in zip(groups(cache_axes), shape, strict=True) for x in part}
    return sizes["h"], sizes["d"]


def sizes_of(cache_axes: str, shape: Sequence[int], head_dim: int) -> dict[str, int]:
    """The size of each axis by its name, in their order."""
    sizes: dict[str, int] = {}
    for part, size in zip(groups(cache_axes), shape, strict=True):
        inner = {"hc": (size // 2, 2), "ch": (2, size // 2), "cd": (2, head_dim)}.get(part, (size,))
        sizes |= zip(part, inner, strict=True)
    return sizes


def strides_of(cache_axes: str, shape: Sequence[int], head_dim: int) -> tuple[dict[str, int], Slots]:
    """Elements from one to the next along each axis, and the slots."""
    sizes, strides, step = sizes_of(cache_axes, shape, head_dim), {}, 1
    for name in reversed(sizes):
        strides[name] = step
        step *= sizes[name]
    slots = Slots(sizes["s"], strides["b"], strides["s"], sizes["b"] * sizes["s"])
    if "l" in sizes:
        slots = slots._replace(layer=strides["l"], num_layers=sizes["l"])
    return strides, slots
