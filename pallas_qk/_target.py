"""The NVIDIA GPU to make code for: the abstract mesh's device, else the local ones, else a Hopper."""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import jax
from jax.sharding import AbstractDevice, AbstractMesh

from pallas_qk._options import Target


class _Kind(NamedTuple):
    """What is known of a kind of GPU without one at hand; an abstract device carries its kind and no more."""

    compute_capability: tuple[int, int]
    bandwidth: int | None = None  # of its memory in GB/s, as its data sheet says, where a rule asks for it


_UNKNOWN = _Kind((8, 0))  # an Ampere, whose code every later GPU runs
# By words of `device_kind`, in any case. Of those that fit the first counts: an H100 PCIe is an H100 too.
_KINDS = {
    "V100": _Kind((7, 0)),
    "T4": _Kind((7, 5)),
    "A100": _Kind((8, 0)),
    "A800": _Kind((8, 0)),
    "A30": _Kind((8, 0)),
    "A10": _Kind((8, 6)),
    "A10G": _Kind((8, 6)),
    "A40": _Kind((8, 6)),
    "L4": _Kind((8, 9)),
    "L40": _Kind((8, 9)),
    "L40S": _Kind((8, 9)),
    "Ada": _Kind((8, 9)),  # RTX 6000 Ada Generation
    "H100 PCIe": _Kind((9, 0), 2000),
    "H100 NVL": _Kind((9, 0), 3900),
    "H100": _Kind((9, 0), 3350),
    "H800 PCIe": _Kind((9, 0), 2000),
    "H800 NVL": _Kind((9, 0), 3900),
    "H800": _Kind((9, 0), 3350),
    "H200": _Kind((9, 0), 4800),
    "H20 3e": _Kind((9, 0), 4800),
    "H20": _Kind((9, 0), 4000),
    "GH200 480GB": _Kind((9, 0), 4000),  # 480 GB next to its processor and 96 GB of HBM3
    "GH200": _Kind((9, 0), 4900),  # 144 GB of HBM3e
    "B200": _Kind((10, 0), 8000),
    "GB200": _Kind((10, 0), 8000),
    "B300": _Kind((10, 3), 8000),
    "GB300": _Kind((10, 3), 8000),
    "Thor": _Kind((11, 0)),
    "Blackwell": _Kind((12, 0)),  # RTX PRO 6000 Blackwell; a B200 doesn't call itself so
    "5090": _Kind((12, 0)),
    "5080": _Kind((12, 0)),
    "5070": _Kind((12, 0)),
    "5060": _Kind((12, 0)),
    "GB10": _Kind((12, 1)),
}
_HOPPER, _HOPPER_SMS = "NVIDIA H100", 132


def _known_of(device_kind: str) -> _Kind:
    words = set(device_kind.upper().replace("-", " ").split())
    return next((known for name, known in _KINDS.items() if words.issuperset(name.upper().split())), _UNKNOWN)


def _abstract_gpu() -> AbstractDevice | None:
    """The GPU that the abstract mesh names."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device if device is not None and device.platform in ("cuda", "gpu") else None


def cuda_target() -> Target:
    """The abstract mesh's device; else of several local GPUs the least of each.

    Code for the oldest runs on each of them, whichever the call goes to, and as many programs as the smallest holds are
    resident on each.
    """
    device, gpus = _abstract_gpu(), local_gpus()
    num_sms = min((gpu.core_count for gpu in gpus), default=_HOPPER_SMS)
    if device is not None:
        known = _known_of(device.device_kind)
        # A mesh of local GPUs names their kind too, which the table need not have.
        local = (_capability(gpu) for gpu in gpus if gpu.device_kind == device.device_kind)
        return Target(next(local, known.compute_capability), device.num_cores or num_sms, known.bandwidth)
    known_of_each = [_known_of(gpu.device_kind) for gpu in gpus] or [_known_of(_HOPPER)]
    bandwidths = [known.bandwidth for known in known_of_each if known.bandwidth is not None]
    return Target(
        min(map(_capability, gpus), default=_known_of(_HOPPER).compute_capability),
        num_sms,
        min(bandwidths) if len(bandwidths) == len(known_of_each) else None,
    )


def _capability(gpu: jax.Device) -> tuple[int, int]:
    major, minor = map(int, gpu.compute_capability.split("."))
    return major, minor


def local_gpus() -> list[jax.Device]:
    """The NVIDIA GPUs of this process; none where JAX can't start, which it says itself to what needs a device."""
    from jax.extend import backend  # late: it takes as long to import as the rest of the package

    try:
        client = backend.backends().get("cuda")
    except (AssertionError, RuntimeError):  # JAX_PLATFORMS=cuda without a GPU or without its plugin
        return []
    return [] if client is None else client.local_devices()


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Where Pallas lowers for CUDA: with the GPU that the caller names, else a local one, else a Hopper.

    Pallas asks the abstract mesh, which may name a CPU, and the default device, which may be one.
    """
    if _abstract_gpu() is not None:
        yield
        return
    gpu = next(iter(local_gpus()), None)
    kind, num_cores = (_HOPPER, _HOPPER_SMS) if gpu is None else (gpu.device_kind, gpu.core_count)
    device = AbstractDevice(device_kind=kind, num_cores=num_cores, platform="cuda")
    default_device = contextlib.nullcontext() if gpu is None else jax.default_device(gpu)
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)), default_device:
        yield
