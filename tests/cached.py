"""Calls that write a KV cache: their inputs, and what they must give where the op without a cache is known."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

import pallas_qk
from pallas_qk import _cache_axes, _rows
from pallas_qk._options import Options
from tests import forms, fp8
from tests.cases import Case, Inputs, make_inputs

AXES = (
    "b s h d",
    "b h s d",
    "b h s (c d)",
    "b s h (c d)",
    "b s (h c) d",
    "b s (c h) d",
    "h b s d",
    "s h b d",
    "b c s h d",
    "c b s h d",
    "l b s h d",
    "l h b s (c d)",
)


@dataclasses.dataclass(frozen=True)
class CachedCase:
    """`case` with a cache. None as `cache_dtype` means the dtype of the activations."""

    case: Case
    cache_axes: str = "b s h d"
    kv_dtype: str | None = None
    num_blocks: int = 5
    block_size: int = 4
    num_layers: int = 3
    layer: int = 1  # where `cache_axes` has layers
    return_kv: bool = False
    slots_dtype: str = "int32"
    scale: float = 0.37  # of k in a cache of 8 bits; see `scales`
    scale_per_head: tuple[bool, bool] = (False, True)  # of k, of v
    finite: bool = False  # what the cache holds before; else any bits, NaN payloads among them

    @property
    def id(self) -> str:
        """A short name for test ids: the fields that differ from the default follow the case's."""
        shown = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)[1:]
            if getattr(self, field.name) != field.default
        ]
        return "-".join([self.case.id, *shown]).replace(" ", "")

    @property
    def sizes(self) -> dict[str, int]:
        """Of each axis of the cache, by its name in the order of the array's memory."""
        case = self.case
        every = {"l": self.num_layers, "b": self.num_blocks, "s": self.block_size}
        every |= {"h": case.num_kv_heads, "d": case.head_dim, "c": 2}
        return {name: every[name] for group in _cache_axes.groups(self.cache_axes) for name in group}

    @property
    def capacity(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def cache_dtype(self) -> np.dtype:
        return jnp.dtype(self.kv_dtype or self.case.dtype)

    @property
    def num_arrays(self) -> int:
        return 1 if _cache_axes.holds_both(self.cache_axes) else 2

    @property
    def options(self) -> Options:
        scale_per_head = None
        if self.scales:
            scale_per_head = self.scales[0].size > 1, self.scales[1].size > 1
        return dataclasses.replace(
            forms.options(self.case),
            separate_v=not self.case.packed,
            cache_axes=self.cache_axes,
            return_kv=self.return_kv,
            scale_per_head=scale_per_head,
        )

    @property
    def scales(self) -> list[np.ndarray]:
        """k_scale and v_scale, () or (Hkv,), no two numbers alike; none where the cache has more than 8 bits."""
        if str(self.cache_dtype) not in fp8.NAMES:
            return []
        every = self.scale / np.arange(1, 1 + 2 * self.case.num_kv_heads, dtype=np.float32)
        of_both = every.astype(np.float32).reshape(2, -1)
        return [x if per_head else x[0] for x, per_head in zip(of_both, self.scale_per_head, strict=True)]

    @property
    def layer_is_inside(self) -> bool:
        """Whether anything may be written: a layer may lie outside."""
        return "l" not in self.sizes or 0 <= self.layer < self.num_layers


class Data(NamedTuple):
    """The arrays of one call."""

    inputs: Inputs  # in the contract's form
    v: np.ndarray  # (T, Hkv*D)
    before: list[np.ndarray]  # what lies in the cache
    slots: np.ndarray  # (T,)


def data_of(cached: CachedCase, seed: int = 0) -> Data:
    return Data(make_inputs(cached.case, seed), values(cached, seed), caches(cached, seed), slots_of(cached, seed))


def caches(cached: CachedCase, seed: int = 0) -> list[np.ndarray]:
    """What lies in the cache before."""
    groups, sizes, dtype = _cache_axes.groups(cached.cache_axes), cached.sizes, cached.cache_dtype
    shape, rng = tuple(math.prod(sizes[name] for name in group) for group in groups), np.random.default_rng(seed)
    if cached.finite:
        return [rng.standard_normal(shape, np.float32).astype(dtype) for _ in range(cached.num_arrays)]
    num_bytes = math.prod(shape) * dtype.itemsize
    return [rng.integers(0, 256, num_bytes, np.uint8).view(dtype).reshape(shape) for _ in range(cached.num_arrays)]


def slots_of(cached: CachedCase, seed: int = 0) -> np.ndarray:
    """A slot for each token, none twice; from the second on some tokens have none, in every way."""
    info = np.iinfo(cached.slots_dtype)
    slots = np.random.default_rng(seed).permutation(cached.capacity)[: cached.case.num_tokens].astype(np.int64)
    slots = np.concatenate([slots, np.full(cached.case.num_tokens - slots.size, cached.capacity)]).astype(object)
    bad = [cached.capacity, info.max, *([-1, info.min] if info.min < 0 else [])]
    slots[1 : 1 + len(bad)] = bad[: max(0, slots.size - 1)]
    return slots.astype(cached.slots_dtype)


def values(cached: CachedCase, seed: int = 0) -> np.ndarray:
    """v (T, Hkv*D)."""
    case = cached.case
    shape = case.num_tokens, case.num_kv_heads * case.head_dim
    return np.random.default_rng(seed + 7).standard_normal(shape, np.float32).astype(jnp.dtype(case.dtype))


def inputs_of(cached: CachedCase, seed: int = 0, data: Data | None = None) -> _rows.Inputs:
    """In the shapes of the implementations."""
    case, data = cached.case, data or data_of(cached, seed)
    x = forms.split_heads(case, forms.inputs_of(case, data.inputs, jnp.asarray(data.v)))
    if not case.packed:
        x = x._replace(v=jnp.asarray(data.v).reshape(case.num_tokens, case.num_kv_heads, case.head_dim))
    arrays = dict(zip(_rows.CACHES, map(jnp.asarray, data.before), strict=False))
    layer = jnp.full(1, cached.layer, jnp.int32) if "l" in cached.sizes else None
    arrays |= zip(("k_scale", "v_scale"), (jnp.asarray(scale).reshape(-1) for scale in cached.scales), strict=False)
    return x._replace(**arrays, slots=jnp.asarray(data.slots), layer=layer)


def write(cached: CachedCase, k, data: Data) -> list[np.ndarray]:
    """The cache with the tokens' rows k (T, Hkv, D) and v: a loop over tokens."""
    case, sizes = cached.case, cached.sizes
    rows = [np.asarray(k), data.v.reshape(case.num_tokens, case.num_kv_heads, case.head_dim)]
    after = [cache.copy() for cache in data.before]
    by_name = [cache.reshape(*sizes.values()) for cache in after]  # views
    for token, slot in enumerate(data.slots.tolist()):
        if 0 <= slot < cached.capacity and cached.layer_is_inside:
            for which, of_kind in enumerate(rows):
                at = {"l": cached.layer, "b": slot // cached.block_size, "s": slot % cached.block_size, "c": which}
                index = tuple(at.get(name, slice(None)) for name in sizes)
                scale = cached.scales[which] if cached.scales else None
                by_name[which % cached.num_arrays][index] = _cast(of_kind[token], scale, cached.cache_dtype)
    return after


def _cast(x: np.ndarray, scale: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
    """Rows (Hkv, D)."""
    if scale is not None:
        return fp8.codes(x, scale.reshape(-1, 1), dtype).view(dtype)
    return x if x.dtype == dtype else x.astype(np.float32).astype(dtype)


def expected(
    cached: CachedCase, plain: _rows.Outputs, seed: int = 0, data: Data | None = None, write: Callable = write
) -> _rows.Outputs:
    """What the call gives where the op without a cache gives `plain`, all (T, heads, D), v too if it is normalised."""
    case, data = cached.case, data or data_of(cached, seed)
    if case.v_norm:
        data = data._replace(v=np.asarray(plain.v).reshape(data.v.shape))
    after = write(cached, plain.k, data)
    outputs = _rows.Outputs(plain.q, gate=plain.gate, **dict(zip(_rows.CACHES, after, strict=False)))
    v = data.v.reshape(case.num_tokens, case.num_kv_heads, case.head_dim)
    return outputs._replace(k=np.asarray(plain.k), v=v) if cached.return_kv else outputs


def kv_views(cached: CachedCase, arrays: Sequence[Any], permute: Callable = np.transpose) -> list[Any]:
    """The parts of k and of v of a cache's arrays, each (b, s, h, d), with layers (l, b, s, h, d).

    They are views where `permute` gives some: that of NumPy, of JAX or of torch.
    """
    sizes = cached.sizes
    names = list(sizes)
    order = [names.index(name) for name in "clbshd" if name in sizes]
    parts = [permute(array.reshape(*sizes.values()), order) for array in arrays]
    return [parts[0][0], parts[0][1]] if "c" in sizes else parts


def arrays_of(outputs: _rows.Outputs) -> list[Any]:
    """Those of the cache."""
    return [x for x in (outputs.k_cache, outputs.v_cache) if x is not None]


def by_slot(cached: CachedCase, arrays: Sequence[Any], xp: Any = jnp) -> list[Any]:
    """The rows of k and of v in a cache, each (layers * slots, Hkv, D), of JAX or NumPy."""
    case = cached.case
    parts = kv_views(cached, list(map(xp.asarray, arrays)), xp.transpose)
    return [x.reshape(-1, case.num_kv_heads, case.head_dim) for x in parts]


def written(cached: CachedCase, slots: np.ndarray) -> np.ndarray:
    """Which rows of `by_slot` are written, in the order of their tokens."""
    of_layer = cached.layer * cached.capacity if "l" in cached.sizes else 0
    return slots[has_place(cached, slots)].astype(np.int64) + of_layer


def has_place(cached: CachedCase, slots: np.ndarray) -> np.ndarray:
    """Whether each token is written."""
    return (slots >= 0) & (slots < cached.capacity) & cached.layer_is_inside


def arguments(cached: CachedCase, seed: int = 0, data: Data | None = None) -> list[Any]:
    """Those arrays of the public function that are no options, in its order; heads are flat."""
    case, data = cached.case, data or data_of(cached, seed)
    x = forms.inputs_of(case, data.inputs, jnp.asarray(data.v))
    before = tuple(map(jnp.asarray, data.before))
    qkv = x.q if case.packed else (x.q, x.k, jnp.asarray(data.v))
    kv_cache = before if cached.num_arrays == 2 else before[0]
    return [qkv, x.q_weight, x.k_weight, x.cos_sin_cache, x.positions, kv_cache, jnp.asarray(data.slots)]


def op(cached: CachedCase, implementation: str | None = None, **static: Any):
    """The public function of the case, of `arguments` alone, and of a layer where the cache has several."""
    case = cached.case
    scales = dict(zip(("k_scale", "v_scale"), cached.scales, strict=False))
    defaults = case.static_arguments | {"mrope_layout": case.mrope_layout, "implementation": implementation} | scales
    static = defaults | static | {"cache_axes": cached.cache_axes, "return_kv": cached.return_kv}
    if case.gate == "in_place":
        static["copy_gate"] = False
    if case.v_norm:
        static["v_norm"] = True
    function = getattr(pallas_qk, f"fused_qkv_rmsnorm_rope{'_gate' if case.gate else ''}_cache")

    def run(*arrays, layer=None):
        if "l" in cached.sizes:
            return function(*arrays, **static, layer=cached.layer if layer is None else layer)
        return function(*arrays, **static)

    return run


def outputs_of(cached: CachedCase, got: pallas_qk.CacheOutputs) -> _rows.Outputs:
    """What the public function returns, heads on an axis of their own."""
    case = cached.case
    written = got.kv_cache if cached.num_arrays == 2 else (got.kv_cache,)
    rows = {name: x for name in ("q", "gate", "k", "v") if (x := getattr(got, name)) is not None}
    rows = {name: x.reshape(case.num_tokens, -1, case.head_dim) for name, x in rows.items()}
    return _rows.Outputs(**rows, **dict(zip(_rows.CACHES, written, strict=False)))
