"""The implementations by name, and the choice among them by shapes, GPU generation and platform."""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple, get_args

import jax

from pallas_qk import _reference
from pallas_qk._options import Implementation, Spec, Target
from pallas_qk._target import cuda_target

IMPLEMENTATIONS = get_args(Implementation)

_GPU_FOLDERS = {"mosaic_gpu": "pallas_qk._mosaic_gpu", "triton": "pallas_qk._triton"}
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
    """An implementation: `forward`, `backward`, `gate_backward`, `unsupported`.

    A GPU's is imported on first use, in 70 to 300 ms.
    """
    return _reference if name == "xla" else importlib.import_module(_GPU_FOLDERS[name])


@functools.cache
def _missing_module(name: str) -> str | None:
    return next((required for required in _REQUIRES[name] if importlib.util.find_spec(required) is None), None)


def unsupported(name: str, spec: Spec, target: Target) -> str | None:
    """Why an implementation can't run `spec` on an NVIDIA GPU; None if it can."""
    if name != "xla" and spec.open_size is not None:
        return f"it needs sizes that are known when tracing, got {spec.open_size}"
    if (missing := _missing_module(name)) is not None:
        return f"it needs the module {missing}, got a Python environment without it"
    reason: str | None = module(name).unsupported(spec, target)
    return reason


def choose(spec: Spec, platform: str | None = None) -> Choice:
    """The choice on a platform ("cuda", "cpu", …); None means the default device's."""
    platform = platform or _default_platform()
    if platform != "cuda":
        return Choice("xla", dict.fromkeys(_GPU_FOLDERS, f"it needs an NVIDIA GPU, got platform {platform}"))
    target = cuda_target()
    taken = first_supported(spec, target)
    reasons = {name: unsupported(name, spec, target) for name in IMPLEMENTATIONS if name != taken}
    return Choice(taken, {name: reason or f"{taken!r} runs this and comes first" for name, reason in reasons.items()})


def first_supported(spec: Spec, target: Target) -> str:
    return next(name for name in _PREFERENCE if unsupported(name, spec, target) is None)  # "xla" runs everything


def _default_platform() -> str:
    try:
        device = jax.config.jax_default_device  # type: ignore[attr-defined]  # a device, or a platform's name
        platform = getattr(device, "platform", device) or jax.default_backend()
    except (AssertionError, RuntimeError) as error:  # the former says nothing
        raise RuntimeError(
            f"JAX must start to tell the default device's platform, got {error!r}. "
            "Pass platform, or set JAX_PLATFORMS to what this machine has."
        ) from error
    if platform == "gpu":
        from jax.extend import backend

        return "cuda" if "cuda" in backend.backends() else "rocm"
    return platform


def check_supported(spec: Spec, implementation: str | None) -> None:
    """Refuses a name that can't run `spec` on the NVIDIA GPU that code is made for, however few tokens it gets."""
    if spec.open_size is None:
        spec = dataclasses.replace(spec, num_tokens=min(1, spec.num_tokens))
    if implementation:
        refuse(implementation, unsupported(implementation, spec, cuda_target()))


def refuse_platforms(implementation: str | None, platforms: Sequence[str]) -> None:
    """Refuses the name of a GPU kernel where code is made for other platforms."""
    others = [platform for platform in platforms if platform != "cuda"]
    if implementation in _GPU_FOLDERS and others:
        raise NotImplementedError(
            f"implementation={implementation!r} must run on an NVIDIA GPU, got platform {', '.join(others)}. "
            "Leave implementation out, or pass 'xla'."
        )


def refuse(implementation: str, reason: str | None) -> None:
    if reason is not None:
        raise NotImplementedError(
            f"implementation={implementation!r} can't run this: {reason}. Leave implementation out, or pass 'xla'."
        )
