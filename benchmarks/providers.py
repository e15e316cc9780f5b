"""What is timed and compared, by name.

JAX_OPS are functions of JAX arrays, which can be differentiated and be part of a larger program. PROVIDERS are they and
what runs on torch tensors: name -> builder(case, inputs), which returns a zero-argument call of the op. Both are plain
dicts: a script adds an entry, or passes calls of its own to `benchmarks.timing.measure`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import pallas_qk
from benchmarks import xla_plain
from benchmarks.timing import wait
from pallas_qk import dlpack
from tests import forms, fp8
from tests.cached import CachedCase, kv_views
from tests.cases import Case, Inputs, make_inputs

Op = Callable[..., Any]  # of the arrays of a case in its form, `tests.forms.arguments`
Call = Callable[[], Any]
Builder = Callable[[Case, Inputs], Call]


@dataclasses.dataclass(frozen=True)
class Writer:
    """A provider that only writes KV caches: the suite `kv_cache` runs it after the oracle's op."""

    write: Callable[..., None]  # with the parameters of `triton_oracle.write_kv_cache`

    def __call__(self, case: Case, inputs: Inputs) -> Call:
        raise NotImplementedError("it writes KV caches alone, which --suite kv_cache times")


def _plain(case: Case) -> Op:
    """What a user would write, with a gate, if any, that XLA places, from separate arrays or a packed one.

    Raises:
      NotImplementedError: the case isn't a norm with weights followed by a rotation.
    """
    if case.norm_order != "norm_first" or not case.rotary_dim or not case.weights or case.v_norm:
        raise NotImplementedError(f"plain jnp normalises q and k with weights, then rotates them, got {case.id}")
    static: dict[str, Any] = case.static_arguments
    op = getattr(xla_plain, f"fused_qk{'v' * case.packed}_rmsnorm_rope{'_gate' if case.gate else ''}")
    return functools.partial(op, **static)


JAX_OPS: dict[str, Callable[[Case], Op]] = {
    **{name: functools.partial(forms.op, implementation=name) for name in pallas_qk.IMPLEMENTATIONS},
    "xla_plain": _plain,
}


def oracle(case: Case, inputs: Inputs) -> Call:
    """The Triton kernel of the serving stacks' design, on torch tensors over the same memory."""
    from torch_ref import triton_oracle

    static: dict[str, Any] = case.static_arguments
    return functools.partial(triton_oracle.fused_qk_rmsnorm_rope_gate, *torch_inputs(inputs), **static)


def oracle_writer(
    cached: CachedCase, caches: Sequence[Any], slots: Any, write: Callable[..., None] | None = None
) -> Callable[[Any, Any], None]:
    """Writes k and v (T, Hkv, D) into torch tensors in the form of the cache, in place, divided by the case's scales.

    `write` takes the place of the oracle's.
    """
    import torch

    from torch_ref import triton_oracle

    write = write or triton_oracle.write_kv_cache
    scales = [torch.tensor(scale, device=slots.device) for scale in cached.scales]
    k_cache, v_cache = kv_views(cached, caches, torch.permute)
    if "l" in cached.sizes:
        if not cached.layer_is_inside:
            return lambda k, v: None
        k_cache, v_cache = k_cache[cached.layer], v_cache[cached.layer]
    return lambda k, v: write(k, v, k_cache, v_cache, slots, *scales)


def cached_oracle(
    cached: CachedCase,
    tensors: Sequence[Any],
    v: Any,
    caches: Sequence[Any],
    slots: Any,
    write: Callable[..., None] | None = None,
) -> Call:
    """The oracle's two launches, of torch tensors: the op, then its writer. Gives q, k, gate and the caches.

    `write` as for `oracle_writer`.
    """
    from torch_ref import triton_oracle

    case = cached.case
    rows = (case.num_tokens, case.num_kv_heads, case.head_dim)
    write_rows, v_rows = oracle_writer(cached, caches, slots, write), v.unflatten(-1, rows[1:])
    static: dict[str, Any] = case.static_arguments

    def call():
        q, k, gate = triton_oracle.fused_qk_rmsnorm_rope_gate(*tensors, **static)
        write_rows(k.view(rows), v_rows)
        return q, k, gate, *caches

    return call


def jitted(function: Op, *arrays: Any) -> Call:
    return functools.partial(jax.jit(function), *arrays)


def _jitted_op(name: str, case: Case, inputs: Inputs) -> Call:
    return jitted(JAX_OPS[name](case), *forms.arguments(case, inputs))


PROVIDERS: dict[str, Builder] = {"oracle": oracle, **{name: functools.partial(_jitted_op, name) for name in JAX_OPS}}


def torch_inputs(inputs: Inputs) -> list[Any]:
    """The same memory as torch tensors, None for an array that there isn't."""
    return [x if x is None else to_torch(x) for x in jax.block_until_ready(list(inputs))]


def to_torch(array: Any) -> Any:
    """An array of JAX or NumPy as a torch tensor over the same memory; one of 8-bit floats is copied.

    They go as bytes: the exchange knows no 8-bit floats.
    """
    import torch

    array = jnp.asarray(array)
    if array.dtype.name not in fp8.NAMES:
        return dlpack.to_torch(array)
    return dlpack.to_torch(jax.lax.bitcast_convert_type(array, jnp.uint8)).view(getattr(torch, array.dtype.name))


def from_torch(tensor: Any) -> jax.Array:
    """The way back."""
    import torch

    name = str(tensor.dtype).removeprefix("torch.")
    if name not in fp8.NAMES:
        return dlpack.from_torch(tensor)
    return jax.lax.bitcast_convert_type(dlpack.from_torch(tensor.view(torch.uint8)), jnp.dtype(name))


def to_jax(outputs) -> list[jax.Array]:
    """The outputs of the oracle as JAX arrays, finished."""
    wait(outputs)
    return [from_torch(tensor) for tensor in outputs]


_REPEATED_TOKENS = 65536


def repeated_inputs(case: Case) -> Inputs:
    """Random inputs; beyond 65,536 tokens those of 65,536, again and again.

    The random numbers of a million tokens would pass through some 140 GB of intermediate arrays.
    """
    repeats, rest = divmod(case.num_tokens, _REPEATED_TOKENS)
    if repeats <= 1 or rest:
        return make_inputs(case)
    part = make_inputs(dataclasses.replace(case, num_tokens=_REPEATED_TOKENS))
    tile = jax.jit(lambda x: jnp.tile(x, (1,) * (x.ndim - 1) + (repeats,)))
    rows = jax.jit(lambda x: jnp.tile(x, (repeats, 1)))
    return dataclasses.replace(part, q_gate=rows(part.q_gate), k=rows(part.k), positions=tile(part.positions))
