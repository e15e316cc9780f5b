"""One call of the op, from what a public function is given: check, choose, run."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_qk import _array_checks, _cache_checks, _checks, _implementations, _mesh_checks, _passed
from pallas_qk._array_checks import Function
from pallas_qk._gate import of_call
from pallas_qk._implementations import IMPLEMENTATIONS
from pallas_qk._options import Options, Spec
from pallas_qk._rows import Call, Inputs, Outputs, head_dim_of, on_rows
from pallas_qk._sizes import Sizes, filled


def call(function: Function, inputs: Inputs, *values: Any, **more: Any) -> Outputs:
    """What each public function returns, by name. `values` and `more` are the other arguments of `checked`."""
    _mesh_checks.check_process()
    inputs = Inputs(*map(_array_checks.unboxed, inputs))
    signature = _passed.signature_of(function, inputs, values, (*more, *more.values()))
    outputs: Outputs = _passed.run(
        signature,
        lambda: checked(function, inputs, *values, **more),
        lambda static: _run(with_arrays(inputs), name=function.name, **static),
    )
    return outputs


def checked(
    function: Function,
    inputs: Inputs,
    gate: str | None,
    eps: float,
    sizes: Sizes,
    mrope_section: Sequence[int] | None,
    norm_beta: float,
    mrope_layout: str,
    rotation: str,
    round_norm: bool,
    norm_order: str,
    implementation: str | None,
    *,
    v_norm: bool = False,
    cache_axes: str = "",
    return_kv: bool = True,
) -> dict[str, Any]:
    """The static arguments of `_run`. It reads no element of an array, and nothing else that `_passed` leaves out."""
    given = dict(zip(("num_q_heads", "num_kv_heads", "head_dim", "rotary_dim"), sizes, strict=True))
    numbers = {"eps": eps, **given, "mrope_section": mrope_section, "norm_beta": norm_beta}
    _checks.check_known(numbers | {"round_norm": round_norm, "v_norm": v_norm})
    rotated = inputs.cos_sin_cache is not None
    q_alone = inputs.k is None and not (function.packed or function.separate_v)
    every = filled(function, inputs, sizes, q_alone=q_alone)
    num_q_heads, num_kv_heads, head_dim, rotary_dim = _checks.check_sizes(*every, rotated=rotated, q_alone=q_alone)
    rotation_by_name, by_order = _checks.check_rotation(rotation), _checks.check_norm_order(norm_order)
    norm_beta = _checks.check_norm_beta(norm_beta)
    _checks.check_weights(inputs.q_weight is not None, inputs.k_weight is not None, norm_beta, q_alone=q_alone)
    if not rotated:
        _checks.check_no_table(inputs.positions is not None, mrope_section is not None)
    options = Options(
        rotary_dim=rotary_dim,
        eps=_checks.check_eps(eps),
        norm_beta=norm_beta,
        mrope_section=_checks.check_mrope_section(mrope_section, rotary_dim),
        mrope_layout=_checks.check_mrope_layout(mrope_layout),
        rotation=rotation_by_name if rotated else None,
        round_norm=_checks.check_round_norm(round_norm),
        norm_order=by_order if rotated else "norm_first",
        head_dim=head_dim if inputs.q_weight is None else None,
        v_norm=_checks.check_v_norm(v_norm),
        gate=gate,
        packed=(num_q_heads, num_kv_heads) if function.packed else None,
        q_alone=q_alone,
        separate_v=function.separate_v,
        cache_axes=cache_axes,
        return_kv=return_kv,
    )
    _checks.check_implementation(implementation, IMPLEMENTATIONS)
    array_sizes = _array_checks.sizes_of(options, num_q_heads, num_kv_heads, head_dim)
    split = _array_checks.check_arrays(function, inputs, array_sizes)
    if str(inputs.q.dtype) == "float32":
        options = dataclasses.replace(options, round_norm=True)  # which float32 is
    lead = inputs.q.shape[: -2 if split else -1]
    if cache_axes:
        _cache_checks.check_caches(inputs.k_cache, inputs.v_cache, cache_axes, num_kv_heads, head_dim)
        _cache_checks.check_slots(function, inputs.slots, lead)
        _cache_checks.check_layer(inputs.layer, inputs.k_cache, cache_axes)
        for name in _SCALES:
            _cache_checks.check_scale(name, getattr(inputs, name), inputs.k_cache.dtype, num_kv_heads)
        if inputs.k_scale is not None:
            options = dataclasses.replace(
                options, scale_per_head=(np.size(inputs.k_scale) > 1, np.size(inputs.v_scale) > 1)
            )
    _mesh_checks.check_known_shardings(function, inputs, array_sizes, split=split)
    if cache_axes:
        _mesh_checks.check_known_shardings_of_caches(options, inputs, num_kv_heads)
    num_tokens = math.prod(lead)
    open_size = None if isinstance(num_tokens, int) else num_tokens
    cache_dtype = str(inputs.k_cache.dtype) if cache_axes else None
    dims = num_tokens, num_q_heads, num_kv_heads, head_dim, rotary_dim
    spec = Spec(
        *dims,
        str(inputs.q.dtype),
        open_size,
        cache_dtype=cache_dtype,
        rotation=options.rotation,
        norm_order=options.norm_order,
    )
    _implementations.check_supported(spec, implementation)
    if not (cache_axes or options.v_norm):
        options = dataclasses.replace(options, separate_v=False)  # v passes by
    return {"call": Call(options, implementation), "split": split}


_INTEGERS = ("positions", "slots", "layer")
_SCALES = ("k_scale", "v_scale")
_AS_ARRAYS = dict.fromkeys(_INTEGERS, _array_checks.as_integers) | dict.fromkeys(_SCALES, _cache_checks.as_scale)
_LEFT_AS_THEY_ARE = (type(None), jax.Array)


def with_arrays(inputs: Inputs) -> Inputs:
    """With arrays for numbers, and integers that JAX narrows to no others."""
    made = {
        name: as_array(x)
        for name, as_array in _AS_ARRAYS.items()
        if not isinstance(x := getattr(inputs, name), _LEFT_AS_THEY_ARE)
    }
    return inputs._replace(**made) if made else inputs


@functools.partial(jax.jit, static_argnames=("name", "call", "split"))
def _run(inputs: Inputs, *, name: str, call: Call, split: bool) -> Outputs:
    """Jitted here, so that an eager call gives the bits of a call inside `jax.jit`.

    A v that no kernel takes is a result as it is.
    """
    from pallas_qk import _derivatives  # late: to define primitives it imports jax.extend, and so Pallas (17 ms)

    inputs = in_full(inputs, inputs.q.shape[: -2 if split else -1], call.options)
    passing: dict[str, Any] = {}
    if inputs.v is not None and not call.options.separate_v:
        passing = {"v": lax.convert_element_type(inputs.v, inputs.v.dtype)}  # without a weak type
        inputs = inputs._replace(v=None)
    with jax.named_scope(name):
        rows = {name: x for name in ("q", "k", "v") if (x := getattr(inputs, name)) is not None} if split else {}
        inputs = inputs._replace(**{name: _flat(x) for name, x in rows.items()})
        outputs = _derivatives.forward(call, inputs)
        if call.options.gate == "handed_on":
            passing["gate"] = of_call(outputs.gate, call, inputs)
            outputs = outputs._replace(gate=None)
        if not split:
            return outputs._replace(**passing)
        head_dim = head_dim_of(inputs, call.options)
        outputs = on_rows(lambda x: x.reshape(*x.shape[:-1], x.shape[-1] // head_dim, head_dim), outputs)
        return outputs._replace(**passing)


def in_full(inputs: Inputs, lead: tuple[int, ...], options: Options) -> Inputs:
    """With positions, or the rows of each token, of all leading axes, and with integers that lie in whole bytes.

    A layer and scales have one axis.
    """
    for integers in _INTEGERS:
        x = getattr(inputs, integers)
        if x is not None and jnp.iinfo(x.dtype).bits < 8:
            inputs = inputs._replace(**{integers: x.astype(jnp.int32)})  # several lie in one byte
    if inputs.positions is not None:
        positions = inputs.positions if options.mrope_section else inputs.positions[None]
        missing = 1 + len(lead) - positions.ndim  # axes of `lead`, behind that of mRoPE
        positions = lax.expand_dims(positions, range(1, 1 + missing))
        inputs = inputs._replace(positions=jnp.broadcast_to(positions, (positions.shape[0], *lead)))
    elif inputs.cos_sin_cache is not None:
        of_each = jnp.broadcast_to(inputs.cos_sin_cache, (*lead, options.rotary_dim))
        inputs = inputs._replace(cos_sin_cache=of_each)
    if inputs.layer is not None:
        inputs = inputs._replace(layer=inputs.layer.reshape(-1))
    for scale in _SCALES:
        if (x := getattr(inputs, scale)) is not None:  # a Python number that went through a jit may have another dtype
            inputs = inputs._replace(**{scale: x.reshape(-1).astype(jnp.float32)})
    return inputs


def _flat(x: jax.Array) -> jax.Array:
    *lead, num_heads, width = x.shape
    return x.reshape(*lead, num_heads * width)
