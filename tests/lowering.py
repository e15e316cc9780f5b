"""Programs lowered for an NVIDIA GPU on a machine that has none, and the kernels that their texts hold."""

import contextlib
import re

import jax
from jax.sharding import AbstractDevice, AbstractMesh

GPU_IMPLEMENTATIONS = ("mosaic_gpu", "triton")
FIRST = "mosaic_gpu" if jax.__version_info__ >= (0, 11) else "triton"  # what None takes on a GPU that has both
HOPPER, HOPPER_SMS = "NVIDIA H200", 132


@contextlib.contextmanager
def on_gpu(kind: str = HOPPER, num_sms: int = HOPPER_SMS):
    """What Pallas needs to lower for this GPU."""
    device = AbstractDevice(device_kind=kind, num_cores=num_sms, platform="cuda")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


def lowered(function, *args, kind: str = HOPPER, num_sms: int = HOPPER_SMS, platforms: tuple[str, ...] = ("cuda",)):
    with on_gpu(kind, num_sms):
        return jax.jit(function).trace(*args).lower(lowering_platforms=platforms)


def lowered_text(function, *args, **where) -> str:
    return lowered(function, *args, **where).as_text()


def kernels(text: str) -> list[str]:
    """The names of our kernels that a lowered program calls, in the order of its text."""
    return re.findall(r"custom_call @[^\n]*?(pallas_qk_\w+?_(?:forward|backward|weight_sum|sum))", text)
