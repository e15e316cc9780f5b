"""One call of the op on hidden states and a packed weight: check, then product and op, or one kernel for both."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_qk import _array_checks, _call, _checks, _implementations, _mesh_checks, _passed
from pallas_qk._array_checks import Function
from pallas_qk._options import Spec
from pallas_qk._rows import Call, Inputs, Outputs
from pallas_qk._sizes import Sizes
from pallas_qk._target import cuda_target

KERNEL = "mosaic_gpu"  # the implementation that has one for both
NAME = "fused_qkv_projection_rmsnorm_rope_gate"


class _OfProduct(Function):
    """The op's packed function, as errors name what it is given here."""

    __slots__ = ()

    @property
    def array(self) -> str:
        return "hidden @ weight"

    @property
    def other(self) -> str:
        without_gates = self.name.replace("_projection", "").replace("_gate", "")
        return f"{without_gates} takes a product whose q has no gates"

    @property
    def instead(self) -> str:
        return "a weight whose columns are whole there"


# eps, sizes, mrope_section, norm_beta, mrope_layout
Values = tuple[float, Sizes, Sequence[int] | None, float, str]


def call(
    hidden: Any,
    weight: Any,
    inputs: Inputs,
    eps: float,
    sizes: Sizes,
    mrope_section: Sequence[int] | None,
    norm_beta: float,
    mrope_layout: str,
    implementation: str | None,
    *,
    cache_axes: str = "",
    return_kv: bool = True,
) -> Outputs:
    """What the public functions return, by name. `inputs` has what the op reads besides the product."""
    _mesh_checks.check_process()
    hidden, weight = _array_checks.unboxed(hidden), _array_checks.unboxed(weight)
    inputs = Inputs(*map(_array_checks.unboxed, inputs))
    function = _OfProduct(f"{NAME}_cache" if cache_axes else NAME, packed=True)
    values, cache = (eps, sizes, mrope_section, norm_beta, mrope_layout), (cache_axes, return_kv)
    signature = _passed.signature_of(function, (hidden, weight), inputs, values, (implementation, *cache))
    outputs: Outputs = _passed.run(
        signature,
        lambda: _checked(function, hidden, weight, inputs, values, implementation, *cache),
        lambda call: _run(hidden, weight, _call.with_arrays(inputs), name=function.name, call=call),
    )
    return outputs


def _checked(
    function: Function,
    hidden: Any,
    weight: Any,
    inputs: Inputs,
    values: Values,
    implementation: str | None,
    cache_axes: str,
    return_kv: bool,
) -> Call:
    _checks.check_implementation(implementation, _implementations.IMPLEMENTATIONS)
    for name, array in {"hidden": hidden, "weight": weight}.items():
        _array_checks.check_array(name, array)
        _checks.check_dtype_name(name, str(array.dtype))
    if hidden.dtype != weight.dtype:
        raise TypeError(
            f"weight must have the dtype of hidden, {hidden.dtype}, got {weight.dtype}. Cast one to the other."
        )
    if not hidden.ndim:
        raise ValueError("hidden must have axes, got shape (). Pass the array whose last axis the weight maps.")
    columns = "num_q_heads * 2 * head_dim + 2 * num_kv_heads * head_dim"
    hint = f"the last axis of hidden, then {columns}"
    _array_checks.check_shape("weight", weight, (hidden.shape[-1], columns), hint)
    if implementation == "triton":
        _implementations.refuse(implementation, "only 'mosaic_gpu' has a kernel for product and op, got 'triton'")
    found: list[Any] = []
    rotation, round_norm, norm_order = "halves", True, "norm_first"

    def of_product(hidden: jax.Array, weight: jax.Array) -> None:
        arrays, options = inputs._replace(q=jnp.dot(hidden, weight)), (rotation, round_norm, norm_order, implementation)
        cache: dict[str, Any] = {"cache_axes": cache_axes, "return_kv": return_kv}
        try:
            found.append(_call.checked(function, arrays, "copied", *values, *options, **cache)["call"])
        except (NotImplementedError, TypeError, ValueError) as error:  # raised outside: here JAX adds to its text
            found.append(error.with_traceback(None))  # whose frames hold the traced product

    jax.eval_shape(of_product, hidden, weight)
    (call,) = found
    if not isinstance(call, Call):
        raise call
    if implementation == KERNEL:
        _check_kernel(call, hidden, weight, inputs)
    return call


def _check_kernel(call: Call, hidden: Any, weight: Any, inputs: Inputs) -> None:
    """Refuses what the kernel can't do, before any code is made."""
    reason: str | None = "it takes norms with weights, got None"
    shapes = (getattr(x, "shape", ()) for x in jax.tree.leaves((hidden, weight, inputs)))  # a layer may be a number
    still_open = next((size for shape in shapes for size in shape if not isinstance(size, int)), None)
    if still_open is not None:
        reason = f"it needs sizes that are known when tracing, got {still_open}"
    elif inputs.q_weight is not None:
        assert call.options.packed is not None
        sizes = 1, *call.options.packed, inputs.q_weight.shape[0], call.options.rotary_dim
        spec, module = Spec(*sizes, str(hidden.dtype)), _implementations.module(KERNEL)
        reason = module.unsupported_projection(spec, hidden.shape[-1], cuda_target())
    _implementations.refuse(KERNEL, reason)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        _mesh_checks.check_manual_axes(mesh)


@functools.partial(jax.jit, static_argnames=("name", "call"))
def _run(hidden: jax.Array, weight: jax.Array, inputs: Inputs, *, name: str, call: Call) -> Outputs:
    from pallas_qk import _projection_op  # late: as in `_call`

    inputs = _call.in_full(inputs, hidden.shape[:-1], call.options)
    function = _projection_op.by_kernel if call.implementation == KERNEL else _projection_op.product_and_op
    with jax.named_scope(name):
        return function(call, hidden, weight, inputs)
