"""Kernels and their times from the JAX profiler: what records a profile and reads its .xplane.pb file.

In a profile a plane is a device or the host, and a line one of its streams or threads.
"""

import dataclasses
import pathlib
import tempfile
import warnings
from collections.abc import Callable

import jax
from jax.profiler import ProfileData


class MeasurementError(RuntimeError):
    """The profile does not hold what was run."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One kernel, copy or memset of a GPU; on a CPU one operation of a compiled program."""

    name: str
    start_ns: float
    duration_ns: float
    device: str = ""  # the name of its plane
    program: str = ""  # of JAX, and its instruction that launched this
    instruction: str = ""
    in_graph: bool = False


@dataclasses.dataclass(frozen=True)
class Profile:
    """What a profile holds: kernels in order of their start, and how often the host launched a CUDA graph.

    A kernel outside a graph is a launch of its own; the host's events name those by the kernel.
    """

    kernels: tuple[Kernel, ...]
    graph_launches: int = 0

    def by_device(self) -> dict[str, list[Kernel]]:
        """The kernels of each device that ran any, in order of their start."""
        devices: dict[str, list[Kernel]] = {}
        for kernel in self.kernels:
            devices.setdefault(kernel.device, []).append(kernel)
        return devices


def profile(run: Callable[[], None], *, host: bool = False, folder: pathlib.Path | None = None) -> Profile:
    """What ran under the JAX profiler.

    Args:
      run: launches the work and waits for it.
      host: whether the host's events are recorded and read too, see `read`.
      folder: where the profile's files stay, with a trace for Perfetto; it must hold no other profile. None: nothing
        stays.

    Raises:
      MeasurementError: see `read`.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    if not host:
        options.host_tracer_level = 0
        options.enable_hlo_proto = False
    with tempfile.TemporaryDirectory(prefix="pallas_qk_trace_") as temporary:
        directory = folder or pathlib.Path(temporary)
        with jax.profiler.trace(directory, create_perfetto_trace=folder is not None, profiler_options=options):
            run()
        return read(file_in(directory), host=host)


def file_in(folder: pathlib.Path) -> pathlib.Path:
    """The one .xplane.pb file that the profiler wrote under a folder."""
    paths = list(folder.rglob("*.xplane.pb"))
    if len(paths) != 1:
        raise MeasurementError(f"the profiler must write one .xplane.pb file, got {len(paths)}")
    return paths[0]


def read(path: pathlib.Path, *, host: bool = False) -> Profile:
    """The kernels on the streams of every GPU in an .xplane.pb file.

    Args:
      path: the file.
      host: whether the operations of the host's compiled programs are read where no GPU ran a kernel.

    Raises:
      MeasurementError: the file holds none.
    """
    on_gpus: list[Kernel] = []
    on_host: list[Kernel] = []
    seen: list[str] = []
    graph_launches = 0
    with warnings.catch_warnings():
        # The type of an event's `stats` is built on first use, and Python 3.12 finds it without a module's name.
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in ProfileData.from_file(str(path)).planes:
            for line in plane.lines:
                seen.append(f"{plane.name} / {line.name}")
                stream = plane.name.startswith("/device:GPU") and line.name.startswith("Stream")
                for event in line.events:
                    if event.name.startswith("cuGraphLaunch"):
                        graph_launches += 1
                    elif stream:
                        on_gpus.append(_kernel(plane.name, event))
                    elif host and not plane.name.startswith("/device:"):
                        operation = _kernel(plane.name, event)
                        if operation.instruction:
                            on_host.append(operation)
    kernels = on_gpus or on_host
    if not kernels:
        raise MeasurementError(
            "the profile must hold kernels on a line 'Stream…' of a plane '/device:GPU…', got the lines "
            f"{seen or 'none'}. JAX must find CUPTI, "
            "and no other client of it may run (torch.profiler, ncu, compute-sanitizer)."
        )
    return Profile(tuple(sorted(kernels, key=lambda kernel: kernel.start_ns)), graph_launches)


def _kernel(device: str, event) -> Kernel:
    stats = dict(event.stats)
    program, instruction = (str(stats.get(name, "")) for name in ("hlo_module", "hlo_op"))
    in_graph = bool(stats.get("cuda_graph_id") or stats.get("cuda_graph_exec_id"))
    return Kernel(event.name, event.start_ns, event.duration_ns, device, program, instruction, in_graph)
