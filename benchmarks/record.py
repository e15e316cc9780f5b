"""The record: one JSON line for each implementation of a case, appended and never rewritten."""

import datetime
import importlib.metadata
import json
import pathlib
import platform
import re
import secrets
import subprocess

import jax
import jax.numpy as jnp

from benchmarks.timing import Samples
from tests.cases import Case, minimum_bytes

ROOT = pathlib.Path(__file__).resolve().parent.parent


def new_run_id() -> str:
    """One for each start of the benchmark: sorts by time, and two machines never share one."""
    return f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def gpu_slug(gpu: str) -> str:
    """The file name of a GPU's record: "NVIDIA H200" -> "h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia")).strip("-")


def default_path(gpu: str) -> pathlib.Path:
    return ROOT / "benchmarks" / "results" / f"{gpu_slug(gpu)}.jsonl"


def op_name(case: Case, op: str = "forward") -> str:
    """The field `op`: "forward" and "backward" are the plain contract: 1-D positions, table and weights like q."""
    dtype = jnp.dtype(case.dtype)
    parts = [op]
    if case.gate != "copied":
        parts.append("gate_in_place" if case.gate else "no_gate")
    if case.packed:
        parts.append("packed")
    if case.gathered:
        parts.append("table_row_a_token")
    if case.mrope_section is not None:
        parts.append("mrope" if case.mrope_layout == "interleaved" else "mrope_sectioned")
    if jnp.dtype(case.cache_dtype or dtype) != dtype:
        parts.append(f"{case.cache_dtype}_table")
    if jnp.dtype(case.weight_dtype or dtype) != dtype:
        parts.append(f"{case.weight_dtype}_weights")
    return "_".join(parts)


def make_row(
    case: Case,
    implementation: str,
    samples: Samples,
    copy: Samples,
    *,
    op: str = "forward",
    run: str,
    gpu: str,
    cache: str,
    checked: dict[str, object],
    versions: dict[str, str],
) -> dict[str, object]:
    """The fields of one line, in their order; times are device times of one call, copy those of the same run."""
    total_bytes = minimum_bytes(case, op)
    return {
        "run": run,
        "gpu": gpu,
        "op": op_name(case, op),
        "implementation": implementation,
        "num_tokens": case.num_tokens,
        "num_q_heads": case.num_q_heads,
        "num_kv_heads": case.num_kv_heads,
        "head_dim": case.head_dim,
        "rotary_dim": case.rotary_dim,
        "dtype": case.dtype,
        "cache": cache,
        "p20_us": round(samples.percentile(20), 3),
        "p50_us": round(samples.p50_us, 3),
        "p80_us": round(samples.percentile(80), 3),
        "bytes": total_bytes,
        "gb_per_s": round(total_bytes / samples.p50_us / 1e3, 1),
        "copy_gb_per_s": round(total_bytes / copy.p50_us / 1e3, 1),
        "fraction_of_copy": round(copy.p50_us / samples.p50_us, 4),
        "checked": checked,
        "versions": versions,
    }


def append(path: pathlib.Path, row: dict[str, object]) -> None:
    """Adds one line at the end of the file, written out before it returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def versions(commit: str | None = None) -> dict[str, str]:
    """What made the numbers: libraries, driver, commit of this repository and the date (UTC)."""
    found = {name: _version(name) for name in ("jax", "jaxlib", "torch", "triton")}
    return {
        **found,
        "python": platform.python_version(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"),
        "commit": commit or _commit(),
        "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%dT%H:%M:%SZ}",
    }


def gpu_name() -> str:
    return jax.devices()[0].device_kind


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    commit = _output("git", "rev-parse", "HEAD")
    changed = commit != "unknown" and _output("git", "status", "--porcelain", "--", "*.py")
    return f"{commit}-dirty" if changed else commit


def _output(*command: str) -> str:
    """What a command prints, "unknown" where it can't run: a machine may have no git or nvidia-smi."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
