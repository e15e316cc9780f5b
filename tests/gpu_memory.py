"""How the processes of a test run share the memory of one GPU.

A process that runs tests takes JAX's part at its start, in one piece, so that no other process can take it. Torch's
part grows up to a bound. JAX in what tests start, such as a fresh interpreter, has a small bound of its own.
`tests/conftest.py` applies the rules. Settings that the environment already holds stay as they are.
"""

import functools
import os
import subprocess
from collections.abc import Mapping
from typing import NamedTuple

# Bytes.
CONTEXT = 1.0e9  # a CUDA context, with the code and the workspaces that both frameworks load into it
STARTED = 1.0e9  # for what a process starts; few tests start one, and fewer one that computes more than a token
STARTED_JAX = 1.5e9  # the bound of one that does: a case of the fuzzer takes less than 1 GiB
LEAST = 6.5e9  # for one of several processes: JAX gets 4 GB of it, and no test beside others takes 3
# Fractions.
USABLE = 0.97  # the driver keeps the rest
TORCH = 0.08  # of a process's memory: the oracle's outputs, where JAX holds the inputs and its own outputs


class Shares(NamedTuple):
    """Fractions of a GPU's memory."""

    jax: float
    torch: float
    started: float  # JAX's in a process that a test starts


def most_processes(total: int) -> int:
    """How many processes may run tests on a GPU of `total` bytes."""
    return max(1, int(USABLE * total / LEAST))


def shares(total: int, processes: int) -> Shares:
    """Of one of `processes` on a GPU of `total` bytes."""
    each = USABLE * total / processes
    torch = TORCH * each
    # The quarter: of a small GPU, or of more processes than `most_processes`, which may not fit.
    jax = max(each - torch - CONTEXT - STARTED, each / 4)
    return Shares(jax / total, torch / total, min(STARTED_JAX, jax) / total)


def fraction_name(given: Mapping[str, str]) -> str:
    """The variable that bounds JAX's memory: the old one where it is set, for JAX refuses both together."""
    old = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    return old if old in given else "XLA_CLIENT_MEM_FRACTION"


def environment(fraction: float, *, preallocate: bool, given: Mapping[str, str]) -> dict[str, str]:
    """What JAX reads when it starts its backends, without the settings that `given` holds."""
    settings = {fraction_name(given): f"{fraction:.4f}", "XLA_PYTHON_CLIENT_PREALLOCATE": str(preallocate).lower()}
    return {name: value for name, value in settings.items() if name not in given}


def bounds_torch(given: Mapping[str, str]) -> bool:
    """Whether an environment bounds torch's memory."""
    return any("per_process_memory_fraction" in given.get(f"PYTORCH_{x}ALLOC_CONF", "") for x in ("", "CUDA_"))


def processes() -> int:
    """How many run the tests of this session."""
    return int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))


@functools.cache
def gpu_bytes() -> int:
    """The memory of the machine's smallest NVIDIA GPU; 0 without one, and where JAX is told to use none."""
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return 0
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    except OSError:
        return 0
    return min((int(line) for line in printed.split() if line.isdecimal()), default=0) * 2**20
