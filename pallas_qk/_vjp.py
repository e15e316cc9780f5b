"""Derivatives of the op, once for every implementation.

The derivative is a linear primitive: forward mode runs it in plain XLA, reverse mode transposes it into the backward
kernel. Derivatives beyond the first are plain XLA. Residuals are the inputs.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.interpreters import ad, batching, mlir

from pallas_qk import _reference, _sharding
from pallas_qk._sharding import CACHE, CONSTANTS, POSITIONS, Call, backward_p, forward_p

forward = _sharding.forward  # the differentiable op

# Its operands: the inputs, and then the tangents of those inputs that `moving` names by place.
tangent_p = _sharding.primitive("fused_qk_rmsnorm_rope_gate_tangent")

_NUM_INPUTS = POSITIONS + 1


def _forward_jvp(inputs, tangents, *, call: Call, **_):
    moving = _nonzero(tangents)
    outputs = forward(call, *inputs)
    return outputs, tangent_p.bind(*inputs, *moving.values(), call=call, moving=tuple(moving))


def _nonzero(tangents) -> dict[int, jax.Array]:
    return {place: t for place, t in enumerate(tangents) if place != POSITIONS and type(t) is not ad.Zero}


def _tangent(*args: jax.Array, call: Call, moving: tuple[int, ...]) -> list[jax.Array]:
    """Tangents of the outputs: what `tangent_p` computes."""
    inputs, tangents = args[:_NUM_INPUTS], args[_NUM_INPUTS:]
    inputs32 = [*(x.astype(jnp.float32) for x in inputs[:POSITIONS]), inputs[POSITIONS]]
    tangents32 = {place: x.astype(jnp.float32) for place, x in zip(moving, tangents, strict=True)}
    outputs = _derivative(functools.partial(_sharding.on_heads, _reference.unrounded, call), inputs32, tangents32)
    return [x.astype(inputs[0].dtype) for x in outputs]


def _derivative(function: Callable, args: Sequence[jax.Array], tangents: dict[int, jax.Array]):
    """The derivative of `function` along the tangents of some of its arguments, by place."""

    def of_moving(*moved):
        merged = list(args)
        for place, x in zip(tangents, moved, strict=True):
            merged[place] = x
        return tuple(function(*merged))

    return jax.jvp(of_moving, [args[place] for place in tangents], list(tangents.values()))[1]


def _tangent_transpose(cotangents, *args, call: Call, moving: tuple[int, ...]):
    inputs, tangents = args[:_NUM_INPUTS], args[_NUM_INPUTS:]
    cotangents = [ad.instantiate_zeros(ct) for ct in cotangents]
    gradients = _sharding.backward(call, *inputs, *cotangents)
    if CACHE in moving:
        gradients.append(_table_gradient(call, inputs, cotangents))
    return [None] * _NUM_INPUTS + [
        _sum_to(gradients[place], tangent.aval) if ad.is_undefined_primal(tangent) else None
        for place, tangent in zip(moving, tangents, strict=True)
    ]


def _table_gradient(call: Call, inputs, cotangents) -> jax.Array:
    """(max_pos, R) in float32: XLA's scatter-add, in no fixed order on a GPU."""

    def gradient(table, cotangents, positions, *inputs32):
        def of_table(table):
            return _sharding.on_heads(_reference.unrounded, call, *inputs32, table, positions)

        return jax.vjp(of_table, table)[1](cotangents)

    *inputs32, table = (x.astype(jnp.float32) for x in inputs[:POSITIONS])
    cotangents = [ct.astype(jnp.float32) for ct in cotangents]
    return _sharding.compiler_partitioned(gradient, [table])(table, cotangents, inputs[POSITIONS], *inputs32)[0]


def _sum_to(gradient: jax.Array, aval) -> jax.Array:
    """The gradient summed over the manual axes along which the input did not vary, then rounded to its dtype."""
    axes = jax.typeof(gradient).manual_axis_type.varying - aval.manual_axis_type.varying
    return (lax.psum(gradient, tuple(axes)) if axes else gradient).astype(aval.dtype)


def _tangent_jvp(args, tangents, **params):
    outputs = tangent_p.bind(*args, **params)
    return outputs, _further_derivative(functools.partial(_tangent, **params), args, tangents, outputs)


def _backward_jvp(args, tangents, *, call: Call, **_):
    outputs = _sharding.backward(call, *args)
    function = functools.partial(_sharding.on_heads, _reference.backward, call)
    return outputs, _further_derivative(function, args, tangents, outputs)


def _further_derivative(function: Callable, args, tangents, outputs):
    tangents = _nonzero(tangents)

    def derivative(args, moved):
        return _derivative(function, args, dict(zip(tangents, moved, strict=True)))

    return _sharding.compiler_partitioned(derivative, outputs)(args, list(tangents.values()))


def _tangent_batch(args, dims, *, moving: tuple[int, ...], **params):
    constants = [i for i, place in enumerate((*range(_NUM_INPUTS), *moving)) if place in CONSTANTS]
    outputs = _sharding.batch(functools.partial(tangent_p.bind, moving=moving, **params), args, dims, constants)
    return outputs, [0] * len(outputs)


@tangent_p.def_abstract_eval
def _tangent_abstract_eval(q_gate, k, *args, moving: tuple[int, ...], **_):
    q_out = q_gate.update(shape=(*q_gate.shape[:-1], q_gate.shape[-1] // 2))
    places = (*range(_NUM_INPUTS), *moving)
    return _sharding.result_types("forward", (q_out, k, q_out), (q_gate, k, *args), places)


def _tangent_lowering(ctx, *args, **params):
    return _sharding.lower_untyped(ctx, functools.partial(_tangent, **params), *args)


ad.primitive_jvps[forward_p] = _forward_jvp
ad.primitive_jvps[tangent_p] = _tangent_jvp
ad.primitive_jvps[backward_p] = _backward_jvp
ad.primitive_transposes[tangent_p] = _tangent_transpose
batching.primitive_batchers[tangent_p] = _tangent_batch
mlir.register_lowering(tangent_p, _tangent_lowering)
