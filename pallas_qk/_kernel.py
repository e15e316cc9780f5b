"""The op on one device's arrays by the implementation that is chosen, as a primitive with a lowering a platform."""

import contextlib
import dataclasses

import jax
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_qk import _implementations
from pallas_qk._config import Options
from pallas_qk._operands import Gradients, Inputs, Outputs, gradient_types, output_types, spec_of
from pallas_qk._target import abstract_gpu, cuda_target, local_gpus


def forward(inputs: Inputs, *, options: Options, implementation: str | None) -> Outputs:
    """The contract of `_reference.forward` by the implementation asked for, or by the first that runs.

    The platform is chosen at lowering: a model traced on a CPU host and lowered for CUDA holds the GPU kernel.
    """
    return _run("forward", (inputs,), output_types(inputs, options), options, implementation)


def backward(inputs: Inputs, cotangents: Outputs, *, options: Options, implementation: str | None) -> Gradients:
    """The contract of `_reference.backward`, likewise."""
    return _run("backward", (inputs, cotangents), gradient_types(inputs, options), options, implementation)


def _run(direction: str, operands, results, options: Options, implementation: str | None):
    spec, target = spec_of(operands[0], options), cuda_target()
    # Of a table too: whatever is left open takes the place of the number of tokens.
    still_open = [size for x in jax.tree.leaves(operands) for size in x.shape if not isinstance(size, int)]
    spec = dataclasses.replace(spec, num_tokens=still_open[0]) if still_open else spec
    name = implementation or _implementations.first_supported(spec, target)
    if name == "xla":
        return _implementations.function(name, direction)(*operands, options=options)
    leaves, tree = jax.tree.flatten(operands)
    types, result_tree = jax.tree.flatten(results)
    params = {"direction": direction, "tree": tree, "types": tuple(types), "options": options}
    # Said where code is made: of a call over devices this sees the whole arrays too, which are no device's.
    params |= {"implementation": name, "reason": _implementations.unsupported(name, spec, target)}
    outputs = _kernel_p.bind(*leaves, **params, elsewhere_xla=implementation is None)
    return jax.tree.unflatten(result_tree, outputs)


# One primitive with a lowering a platform. lax.platform_dependent would do but for a lowering for several platforms at
# once, where Pallas lowers its call for each of them and refuses the CPU.
_kernel_p = Primitive("pallas_qk_kernel")
_kernel_p.multiple_results = True


@_kernel_p.def_abstract_eval
def _abstract_eval(*args, types, **params):
    del args, params
    return [jax.core.ShapedArray(x.shape, x.dtype) for x in types]


def _lower(ctx, leaves, name: str, direction: str, tree, options: Options):
    def function(*leaves):
        return jax.tree.leaves(
            _implementations.function(name, direction)(*jax.tree.unflatten(tree, leaves), options=options)
        )

    return mlir.lower_fun(function, multiple_results=True)(ctx, *leaves)


def _on_cuda(ctx, *leaves, direction, tree, options, implementation, reason, **_):
    _implementations.refuse(implementation, reason)
    with _a_gpu():
        return _lower(ctx, leaves, implementation, direction, tree, options)


@contextlib.contextmanager
def _a_gpu():
    """Where Pallas lowers for CUDA: with the GPU that the caller names, else a local one, else a Hopper.

    Pallas asks the abstract mesh, which may name a CPU, and the default device, which may be one.
    """
    if abstract_gpu() is not None:
        yield
        return
    gpu = next(iter(local_gpus()), None)
    kind, num_cores = ("NVIDIA H100", 132) if gpu is None else (gpu.device_kind, gpu.core_count)
    device = AbstractDevice(device_kind=kind, num_cores=num_cores, platform="cuda")
    default_device = contextlib.nullcontext() if gpu is None else jax.default_device(gpu)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)), default_device:
        yield


def _elsewhere(ctx, *leaves, direction, tree, options, implementation, elsewhere_xla, **_):
    if not elsewhere_xla:
        _implementations.refuse_platforms(implementation, ctx.platforms or ctx.module_context.platforms)
    return _lower(ctx, leaves, "xla", direction, tree, options)


mlir.register_lowering(_kernel_p, _on_cuda, platform="cuda")
mlir.register_lowering(_kernel_p, _elsewhere)
