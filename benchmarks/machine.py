"""The machine that runs the benchmark: its GPU, what slows that, and the versions of what makes the numbers."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from collections.abc import Mapping

import jax

ROOT = pathlib.Path(__file__).resolve().parent.parent

# What nvidia-smi is asked, and the field of a record that holds it.
_CLOCKS = {
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "max_sm_mhz",
    "clocks_event_reasons.active": "reasons",
    "temperature.gpu": "celsius",
}
# The bits of `reasons` (nvmlClocksEventReasons) that say that something is wrong with a card or its surroundings.
# Not among them are 0x1 (idle), 0x2 (a clock that somebody set) and 0x4 (the power limit, which products reach).
SLOWDOWNS = {
    0x8: "hardware slowdown",
    0x20: "thermal slowdown by the driver",
    0x40: "thermal slowdown by the hardware",
    0x80: "power brake",
}


def gpu_name() -> str:
    return jax.devices()[0].device_kind


def clocks() -> dict[str, int | str]:
    """The SM clock and its maximum (MHz), the reasons that hold it down (a hexadecimal mask) and the temperature.

    What nvidia-smi doesn't say is left out; without nvidia-smi that is everything.
    """
    text = _nvidia_smi(",".join(_CLOCKS))
    values = text.split(", ")
    if len(values) != len(_CLOCKS):
        return {}
    found: dict[str, int | str] = {}
    for name, value in zip(_CLOCKS.values(), values, strict=True):
        try:
            number = int(value, 0)
        except ValueError:  # "[N/A]"
            continue
        found[name] = hex(number) if name == "reasons" else number
    return found


def slowdown(clocks: Mapping[str, int | str]) -> str | None:
    """A warning where `clocks` say that the card is slowed; None where they don't."""
    reasons = int(str(clocks.get("reasons", "0")), 0)
    found = [text for bit, text in SLOWDOWNS.items() if reasons & bit]
    if not found:
        return None
    speed = (
        f"{clocks.get('sm_mhz', '?')} of {clocks.get('max_sm_mhz', '?')} MHz at {clocks.get('celsius', '?')} degrees"
    )
    return (
        f"The GPU is slowed ({', '.join(found)}; clocks_event_reasons.active {hex(reasons)}): {speed}. "
        "Its times and shares are not those of a GPU at full speed."
    )


def versions(commit: str | None = None) -> dict[str, str]:
    """What made the numbers: libraries, driver, commit of this repository and the date (UTC)."""
    found = {name: _version(name) for name in ("jax", "jaxlib", "torch", "triton")}
    return {
        **found,
        "python": platform.python_version(),
        "driver": _nvidia_smi("driver_version") or "unknown",
        "commit": commit or _commit(),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}",
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    commit = _output("git", "rev-parse", "HEAD")
    if not commit:
        return "unknown"
    return f"{commit}-dirty" if _output("git", "status", "--porcelain", "--", "*.py") else commit


def _nvidia_smi(query: str) -> str:
    """Of the first GPU that JAX may see; nvidia-smi itself counts all of them."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0].strip() or "0"
    return _output("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", f"--id={first}")


def _output(*command: str) -> str:
    """What a command prints, nothing where it can't run: a machine may have no git or nvidia-smi."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
