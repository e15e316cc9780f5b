"""The implementations by name, and the choice among them by shapes, GPU generation and platform."""

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import backend
from jax.extend.core import Primitive
from jax.interpreters import mlir
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_qk import _reference
from pallas_qk._config import Options, Spec, Target

IMPLEMENTATIONS = ("mosaic_gpu", "triton", "xla")

_GPU_MODULES = {"mosaic_gpu": "pallas_qk._mosaic_gpu", "triton": "pallas_qk._triton"}
_GPU_BACKWARD_MODULES = {"mosaic_gpu": "pallas_qk._mosaic_gpu_vjp", "triton": "pallas_qk._triton_vjp"}
_MOSAIC_CAME_OF_AGE = jax.__version_info__ >= (0, 11)
# What None tries on an NVIDIA GPU, in this order. JAX deprecates its Triton backend since 0.11.
_PREFERENCE = ("mosaic_gpu", "triton", "xla") if _MOSAIC_CAME_OF_AGE else ("triton", "mosaic_gpu", "xla")
_REQUIRES = {
    # Mosaic GPU of JAX 0.10 imports absl, which JAX does not install.
    "mosaic_gpu": ("jax.experimental.pallas.mosaic_gpu", *(() if _MOSAIC_CAME_OF_AGE else ("absl",))),
    "triton": ("jax.experimental.pallas.triton",),
    "xla": (),
}

_HOPPER = (9, 0)
# For lowering without the GPU at hand: an abstract device carries a kind and no compute capability.
_CAPABILITY_OF_KIND = {
    "V100": (7, 0),
    "T4": (7, 5),
    "A100": (8, 0),
    "A30": (8, 0),
    "A10": (8, 6),
    "A40": (8, 6),
    "L4": (8, 9),
    "L40": (8, 9),
    "L40S": (8, 9),
    "H100": (9, 0),
    "H200": (9, 0),
    "GH200": (9, 0),
    "B200": (10, 0),
    "GB200": (10, 0),
    "B300": (10, 3),
    "GB300": (10, 3),
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
    platform = jax.default_backend()
    if platform == "gpu":
        return "cuda" if "cuda" in backend.backends() else "rocm"
    return platform


def _abstract_gpu() -> AbstractDevice | None:
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device if device is not None and device.platform in ("cuda", "gpu") else None


def cuda_target() -> Target:
    """The NVIDIA GPU to make code for: the abstract mesh's, else the oldest local one, else Hopper."""
    device = _abstract_gpu()
    if device is not None:
        for word in device.device_kind.replace("-", " ").split():
            if word in _CAPABILITY_OF_KIND:
                return Target(_CAPABILITY_OF_KIND[word])
        return Target(_HOPPER)
    client = backend.backends().get("cuda")
    if client is None:
        return Target(_HOPPER)
    # The oldest: code for it runs on each of them, whichever device the call goes to.
    major, minor = min(tuple(map(int, d.compute_capability.split("."))) for d in client.local_devices())
    return Target((major, minor))


def check_supported(spec: Spec, implementation: str | None) -> None:
    """Refuses a name that can't run `spec` on the NVIDIA GPU that code is made for."""
    if implementation and (reason := unsupported(implementation, spec, cuda_target())) is not None:
        raise NotImplementedError(
            f"implementation={implementation!r} can't run this: {reason}. Leave implementation out, or pass 'xla'."
        )


def forward(*args: jax.Array, options: Options, implementation: str | None) -> tuple[jax.Array, ...]:
    """The contract of `_reference.forward` by the implementation asked for, or by the fastest that runs.

    The platform is chosen at lowering: a model traced on a CPU host and lowered for CUDA holds the GPU kernel.
    """
    return _run("forward", args, options, implementation)


def backward(*args: jax.Array, options: Options, implementation: str | None) -> tuple[jax.Array, ...]:
    """The contract of `_reference.backward`, likewise."""
    return _run("backward", args, options, implementation)


def _run(direction: str, args, options: Options, implementation: str | None):
    q_gate, k, *_ = args
    num_tokens, num_q_heads, _ = q_gate.shape
    _, num_kv_heads, head_dim = k.shape
    spec = Spec(num_tokens, num_q_heads, num_kv_heads, head_dim, options.rotary_dim, str(q_gate.dtype))
    check_supported(spec, implementation)
    name = implementation or _first_supported(spec, cuda_target())
    if name == "xla":
        return _function(name, direction)(*args, options=options)
    params = {"direction": direction, "options": options, "implementation": name}
    return tuple(_kernel_p.bind(*args, **params, elsewhere_xla=implementation is None))


# One primitive with a lowering a platform. lax.platform_dependent would do but for a lowering for several platforms at
# once, where Pallas lowers its call for each of them and refuses the CPU.
_kernel_p = Primitive("pallas_qk_kernel")
_kernel_p.multiple_results = True


@_kernel_p.def_abstract_eval
def _abstract_eval(q_gate, k, q_weight, k_weight, *_, direction, **params):
    del params
    q_out = q_gate.update(shape=(*q_gate.shape[:-1], k.shape[-1]))
    outputs = {
        "forward": (q_out, k, q_out),
        "backward": (q_gate, k, q_weight.update(dtype=jnp.float32), k_weight.update(dtype=jnp.float32)),
    }[direction]
    return tuple(x.update(weak_type=False) for x in outputs)


def _on_cuda(ctx, *args, direction, options, implementation, elsewhere_xla):
    del elsewhere_xla
    kernel = functools.partial(_function(implementation, direction), options=options)
    with _a_gpu():
        return mlir.lower_fun(kernel, multiple_results=True)(ctx, *args)


def _a_gpu():
    """Where Pallas lowers for CUDA without a GPU: the abstract device that the caller names, or else a Hopper."""
    if _abstract_gpu() is not None or "cuda" in backend.backends():
        return contextlib.nullcontext()
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=132, platform="cuda")
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


def _elsewhere(ctx, *args, direction, options, implementation, elsewhere_xla):
    if elsewhere_xla:
        xla = functools.partial(_function("xla", direction), options=options)
        return mlir.lower_fun(xla, multiple_results=True)(ctx, *args)
    platforms = [p for p in ctx.platforms or ctx.module_context.platforms if p != "cuda"]
    raise NotImplementedError(
        f"implementation={implementation!r} must run on an NVIDIA GPU, got platform {', '.join(platforms)}. "
        "Leave implementation out, or pass 'xla'."
    )


mlir.register_lowering(_kernel_p, _on_cuda, platform="cuda")
mlir.register_lowering(_kernel_p, _elsewhere)
