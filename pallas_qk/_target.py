"""The NVIDIA GPU to make code for: the abstract mesh's device, else the local ones, else a Hopper."""

import contextlib

import jax
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_qk._options import Target

_AMPERE, _HOPPER, _HOPPER_SMS = (8, 0), (9, 0), 132  # kinds that the table lacks count as Ampere, whose code they run
# For lowering without the GPU at hand: an abstract device carries a kind and no compute capability.
_CAPABILITY_OF_KIND = {
    "V100": (7, 0),
    "T4": (7, 5),
    "A100": (8, 0),
    "A800": (8, 0),
    "A30": (8, 0),
    "A10": (8, 6),
    "A10G": (8, 6),
    "A40": (8, 6),
    "L4": (8, 9),
    "L40": (8, 9),
    "L40S": (8, 9),
    "Ada": (8, 9),  # RTX 6000 Ada Generation
    "H100": (9, 0),
    "H200": (9, 0),
    "H800": (9, 0),
    "H20": (9, 0),
    "GH200": (9, 0),
    "B200": (10, 0),
    "GB200": (10, 0),
    "B300": (10, 3),
    "GB300": (10, 3),
    "Thor": (11, 0),
    "Blackwell": (12, 0),  # RTX PRO 6000 Blackwell; a B200 doesn't call itself so
    "5090": (12, 0),
    "5080": (12, 0),
    "5070": (12, 0),
    "5060": (12, 0),
    "GB10": (12, 1),
}


def _abstract_gpu() -> AbstractDevice | None:
    """The GPU that the abstract mesh names."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device if device is not None and device.platform in ("cuda", "gpu") else None


def cuda_target() -> Target:
    """Of several local GPUs the oldest: code for it runs on each of them, whichever device the call goes to."""
    device = _abstract_gpu()
    if device is not None:
        # A mesh of local GPUs names their kind too, which the table need not have.
        for local in local_gpus():
            if local.device_kind == device.device_kind:
                return Target(_capability(local))
        words = device.device_kind.replace("-", " ").split()
        return Target(next((_CAPABILITY_OF_KIND[word] for word in words if word in _CAPABILITY_OF_KIND), _AMPERE))
    return Target(min(map(_capability, local_gpus()), default=_HOPPER))


def _capability(gpu: jax.Device) -> tuple[int, int]:
    major, minor = map(int, gpu.compute_capability.split("."))
    return major, minor


def num_sms() -> int:
    """Streaming multiprocessors; of several local GPUs the fewest."""
    device = _abstract_gpu()
    if device is not None and device.num_cores:
        return device.num_cores
    return min((d.core_count for d in local_gpus()), default=_HOPPER_SMS)


def local_gpus() -> list[jax.Device]:
    """The NVIDIA GPUs of this process; none where JAX can't start, which it says itself to what needs a device."""
    from jax.extend import backend  # late: it takes as long to import as the rest of the package

    try:
        client = backend.backends().get("cuda")
    except (AssertionError, RuntimeError):  # JAX_PLATFORMS=cuda without a GPU or without its plugin
        return []
    return [] if client is None else client.local_devices()


@contextlib.contextmanager
def as_on_a_gpu():
    """Where Pallas lowers for CUDA: with the GPU that the caller names, else a local one, else a Hopper.

    Pallas asks the abstract mesh, which may name a CPU, and the default device, which may be one.
    """
    if _abstract_gpu() is not None:
        yield
        return
    gpu = next(iter(local_gpus()), None)
    kind, num_cores = ("NVIDIA H100", _HOPPER_SMS) if gpu is None else (gpu.device_kind, gpu.core_count)
    device = AbstractDevice(device_kind=kind, num_cores=num_cores, platform="cuda")
    default_device = contextlib.nullcontext() if gpu is None else jax.default_device(gpu)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)), default_device:
        yield
