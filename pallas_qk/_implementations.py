"""The implementations by name, and the choice among them by shapes, GPU generation and platform."""

import contextlib
import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
from jax.extend import backend
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_qk import _reference
from pallas_qk._config import Options, Spec, Target
from pallas_qk._operands import Gradients, Inputs, Outputs, gradient_types, output_types, spec_of
from pallas_qk._target import abstract_gpu, cuda_target, local_gpus

IMPLEMENTATIONS = ("mosaic_gpu", "triton", "xla")

_GPU_MODULES = {"mosaic_gpu": "pallas_qk._mosaic_gpu", "triton": "pallas_qk._triton"}
_GPU_BACKWARD_MODULES = {"mosaic_gpu": "pallas_qk._mosaic_gpu_vjp", "triton": "pallas_qk._triton_vjp"}
_SINCE_JAX_0_11 = jax.__version_info__ >= (0, 11)
# What None tries on an NVIDIA GPU, in this order. JAX deprecates its Triton backend since 0.11.
_PREFERENCE = ("mosaic_gpu", "triton", "xla") if _SINCE_JAX_0_11 else ("triton", "mosaic_gpu", "xla")
_REQUIRES = {
    # Mosaic GPU of JAX 0.10 imports absl, which JAX does not install.
    "mosaic_gpu": ("jax.experimental.pallas.mosaic_gpu", *(() if _SINCE_JAX_0_11 else ("absl",))),
    "triton": ("jax.experimental.pallas.triton",),
    "xla": (),
}


class Choice(NamedTuple):
    """The implementation that None resolves to, and for each other name why it was not taken."""

    name: str
    not_taken: dict[str, str]


def module(name: str) -> ModuleType:
    """The module of an implementation; a GPU backend is imported on first use (70 to 300 ms beyond JAX)."""
    return _reference if name == "xla" else importlib.import_module(_GPU_MODULES[name])


def backward_module(name: str) -> ModuleType:
    """The module that holds an implementation's `backward`."""
    return _reference if name == "xla" else importlib.import_module(_GPU_BACKWARD_MODULES[name])


def _function(name: str, direction: str) -> Callable:
    return module(name).forward if direction == "forward" else backward_module(name).backward


@functools.cache
def _missing_module(name: str) -> str | None:
    return next((required for required in _REQUIRES[name] if importlib.util.find_spec(required) is None), None)


def unsupported(name: str, spec: Spec, target: Target) -> str | None:
    """Why an implementation can't run `spec` on an NVIDIA GPU; None if it can."""
    if name != "xla" and not isinstance(spec.num_tokens, int):
        return f"its grid needs a number of tokens known when tracing, got {spec.num_tokens}"
    if (missing := _missing_module(name)) is not None:
        return f"it needs the module {missing}, got a Python environment without it"
    return module(name).unsupported(spec, target)


def choose(spec: Spec, platform: str | None = None) -> Choice:
    """The choice on a platform ("cuda", "cpu", …); None means the default device's."""
    platform = platform or _default_platform()
    if platform != "cuda":
        return Choice("xla", dict.fromkeys(_GPU_MODULES, f"it needs an NVIDIA GPU, got platform {platform}"))
    target = cuda_target()
    taken = _first_supported(spec, target)
    reasons = {name: unsupported(name, spec, target) for name in IMPLEMENTATIONS if name != taken}
    return Choice(taken, {name: reason or f"{taken!r} runs this and comes first" for name, reason in reasons.items()})


def _first_supported(spec: Spec, target: Target) -> str:
    return next(name for name in _PREFERENCE if unsupported(name, spec, target) is None)  # "xla" runs everything


def _default_platform() -> str:
    try:
        platform = jax.default_backend()
    except (AssertionError, RuntimeError) as error:  # the former says nothing
        raise RuntimeError(
            f"JAX must start to tell the default device's platform, got {error!r}. "
            "Pass platform, or set JAX_PLATFORMS to what this machine has."
        ) from error
    if platform == "gpu":
        return "cuda" if "cuda" in backend.backends() else "rocm"
    return platform


def check_supported(spec: Spec, implementation: str | None) -> None:
    """Refuses a name that can't run `spec` on the NVIDIA GPU that code is made for, however few tokens it gets."""
    if isinstance(spec.num_tokens, int):
        spec = dataclasses.replace(spec, num_tokens=min(1, spec.num_tokens))
    if implementation:
        _refuse(implementation, unsupported(implementation, spec, cuda_target()))


def _refuse(implementation: str, reason: str | None) -> None:
    if reason is not None:
        raise NotImplementedError(
            f"implementation={implementation!r} can't run this: {reason}. Leave implementation out, or pass 'xla'."
        )


def forward(inputs: Inputs, *, options: Options, implementation: str | None) -> Outputs:
    """The contract of `_reference.forward` by the implementation asked for, or by the fastest that runs.

    The platform is chosen at lowering: a model traced on a CPU host and lowered for CUDA holds the GPU kernel.
    """
    return _run("forward", (inputs,), output_types(inputs, options), options, implementation)


def backward(inputs: Inputs, cotangents: Outputs, *, options: Options, implementation: str | None) -> Gradients:
    """The contract of `_reference.backward`, likewise."""
    return _run("backward", (inputs, cotangents), gradient_types(inputs, options), options, implementation)


def _run(direction: str, operands, results, options: Options, implementation: str | None):
    spec, target = spec_of(operands[0], options), cuda_target()
    name = implementation or _first_supported(spec, target)
    if name == "xla":
        return _function(name, direction)(*operands, options=options)
    leaves, tree = jax.tree.flatten(operands)
    types, result_tree = jax.tree.flatten(results)
    params = {"direction": direction, "tree": tree, "types": tuple(types), "options": options}
    # Said where code is made: of a call over devices this sees the whole arrays too, which are no device's.
    params |= {"implementation": name, "reason": unsupported(name, spec, target)}
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
        return jax.tree.leaves(_function(name, direction)(*jax.tree.unflatten(tree, leaves), options=options))

    return mlir.lower_fun(function, multiple_results=True)(ctx, *leaves)


def _on_cuda(ctx, *leaves, direction, tree, options, implementation, reason, **_):
    _refuse(implementation, reason)
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
    if elsewhere_xla:
        return _lower(ctx, leaves, "xla", direction, tree, options)
    platforms = [p for p in ctx.platforms or ctx.module_context.platforms if p != "cuda"]
    raise NotImplementedError(
        f"implementation={implementation!r} must run on an NVIDIA GPU, got platform {', '.join(platforms)}. "
        "Leave implementation out, or pass 'xla'."
    )


mlir.register_lowering(_kernel_p, _on_cuda, platform="cuda")
mlir.register_lowering(_kernel_p, _elsewhere)
