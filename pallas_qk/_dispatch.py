"""The op on one device's arrays by the implementation that is chosen, as a primitive with a lowering per platform.

Arrays are (T, heads, elements), or (T, elements) where q, k and v are packed.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.tree_util import PyTreeDef

from pallas_qk import _implementations, _reference
from pallas_qk._options import Options
from pallas_qk._rows import Gradients, Inputs, Outputs, Product, gradient_types, output_types, product_types, spec_of
from pallas_qk._target import as_on_a_gpu, cuda_target


def forward(inputs: Inputs, *, options: Options, implementation: str | None) -> Outputs:
    """The contract of `_reference.forward`, by the implementation asked for or by the first that runs.

    The platform is chosen at lowering: a model traced on a CPU host and lowered for CUDA holds the GPU kernel.
    """
    outputs: Outputs = _bind("forward", (inputs,), output_types(inputs, options), options, implementation)
    return outputs


def backward(inputs: Inputs, cotangents: Outputs, *, options: Options, implementation: str | None) -> Gradients:
    """The contract of `_reference.backward`, by the implementation asked for or by the first that runs."""
    types = gradient_types(inputs, options)
    gradients: Gradients = _bind("backward", (inputs, cotangents), types, options, implementation)
    return gradients


def gate_backward(inputs: Inputs, operands: Product, *, options: Options, implementation: str | None) -> Product:
    """The contract of `_reference.gate_backward`, by the implementation asked for or by the first that runs."""
    types = product_types(inputs, operands)
    cotangents: Product = _bind("gate_backward", (inputs, operands), types, options, implementation)
    return cotangents


def _bind(direction: str, operands: tuple[Any, ...], results: Any, options: Options, implementation: str | None) -> Any:
    spec, target = spec_of(operands[0], options), cuda_target()
    name = implementation or _implementations.first_supported(spec, target)
    if name == "xla":
        return getattr(_reference, direction)(*operands, options=options)
    leaves, tree = jax.tree.flatten(operands)
    types, result_tree = jax.tree.flatten(results)
    params = {"direction": direction, "tree": tree, "types": tuple(types), "options": options}
    # Raised at lowering: under a mesh this is also traced with global shapes, which no device runs.
    params |= {"implementation": name, "reason": _implementations.unsupported(name, spec, target)}
    outputs = _kernel_p.bind(*leaves, **params, elsewhere_xla=implementation is None)
    return jax.tree.unflatten(result_tree, outputs)


# One primitive with a lowering per platform. lax.platform_dependent would do but for a lowering for several platforms
# at once, where Pallas lowers its call for each of them and refuses the CPU.
_kernel_p = Primitive("pallas_qk_kernel")
_kernel_p.multiple_results = True


@_kernel_p.def_abstract_eval
def _abstract_eval(*args: Any, types: Sequence[Any], **params: Any) -> list[jax.core.ShapedArray]:
    del args, params
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in types]


def _lower(
    ctx: mlir.LoweringRuleContext, leaves: Sequence[Any], name: str, direction: str, tree: PyTreeDef, options: Options
) -> Any:
    def function(*leaves: jax.Array) -> list[jax.Array]:
        run = getattr(_implementations.module(name), direction)
        return jax.tree.leaves(run(*jax.tree.unflatten(tree, leaves), options=options))

    return mlir.lower_fun(function, multiple_results=True)(ctx, *leaves)


def _on_cuda(
    ctx: mlir.LoweringRuleContext,
    *leaves: Any,
    direction: str,
    tree: PyTreeDef,
    options: Options,
    implementation: str,
    reason: str | None,
    **_: Any,
) -> Any:
    _implementations.refuse(implementation, reason)
    with as_on_a_gpu():
        return _lower(ctx, leaves, implementation, direction, tree, options)


def _elsewhere(
    ctx: mlir.LoweringRuleContext,
    *leaves: Any,
    direction: str,
    tree: PyTreeDef,
    options: Options,
    implementation: str,
    elsewhere_xla: bool,
    **_: Any,
) -> Any:
    if not elsewhere_xla:
        _implementations.refuse_platforms(implementation, ctx.platforms or ctx.module_context.platforms)
    return _lower(ctx, leaves, "xla", direction, tree, options)


mlir.register_lowering(_kernel_p, _on_cuda, platform="cuda")
mlir.register_lowering(_kernel_p, _elsewhere)
