"""The record: JSON lines, appended and never rewritten, and what selects among them."""

import dataclasses
import datetime
import json
import pathlib
import re
import secrets
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from benchmarks import machine
from benchmarks.timing import Samples
from tests.cases import Case

RESULTS = machine.ROOT / "benchmarks" / "results"

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """One start of the benchmark: what all of its rows share, and the file that they are appended to."""

    run: str
    gpu: str
    versions: Mapping[str, str]
    output: pathlib.Path
    clocks: Mapping[str, int | str] = dataclasses.field(default_factory=dict)  # at the start, see `machine.clocks`

    def append(self, suite: str, *rows: Row) -> None:
        """Adds rows of a suite, measured together and just now; they are written out before it returns."""
        clocks = {name: x for name, x in (("start", self.clocks), ("end", machine.clocks())) if x}
        common = {"clocks": clocks} if clocks else {}
        for row in rows:
            own = {"run": self.run, "gpu": self.gpu, "suite": suite, **row}
            append(self.output, own | common | {"versions": self.versions})


def new_run(output: pathlib.Path | None, commit: str | None) -> Run:
    """`output` None: the GPU's own file under benchmarks/results. `commit` None: what git says here."""
    gpu = machine.gpu_name()
    return Run(new_run_id(), gpu, machine.versions(commit), output or default_path(gpu), machine.clocks())


def new_run_id() -> str:
    """One for each start of the benchmark: sorts by time, and two machines never share one."""
    return f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


def gpu_slug(gpu: str) -> str:
    """The file name of a GPU's record: "NVIDIA H200" -> "h200"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower().removeprefix("nvidia")).strip("-")


def default_path(gpu: str) -> pathlib.Path:
    return RESULTS / f"{gpu_slug(gpu)}.jsonl"


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
    if case.rotation != "halves":
        parts.append(case.rotation)
    if not case.round_norm:
        parts.append("unrounded_norm")
    if not case.rotary_dim:
        parts.append("no_table")
    elif case.norm_order != "norm_first":
        parts.append(case.norm_order)
    if not case.weights:
        parts.append("no_weights")
    if case.v_norm:
        parts.append("v_norm")
    if case.mrope_section is not None:
        parts.append("mrope" if case.mrope_layout == "interleaved" else "mrope_sectioned")
    if jnp.dtype(case.cache_dtype or dtype) != dtype:
        parts.append(f"{case.cache_dtype}_table")
    if jnp.dtype(case.weight_dtype or dtype) != dtype:
        parts.append(f"{case.weight_dtype}_weights")
    return "_".join(parts)


def case_fields(case: Case, implementation: str, op: str) -> Row:
    """What was run: the fields that every row begins with."""
    return {
        "op": op_name(case, op),
        "implementation": implementation,
        "num_tokens": case.num_tokens,
        "num_q_heads": case.num_q_heads,
        "num_kv_heads": case.num_kv_heads,
        "head_dim": case.head_dim,
        "rotary_dim": case.rotary_dim,
        "dtype": case.dtype,
    }


def time_fields(samples: Samples, copy: Samples, total_bytes: int) -> Row:
    """Device times of one call and what they are worth; `copy` is the ceiling of the same run."""
    return {
        "p25_us": round(samples.percentile(25), 3),
        "p50_us": round(samples.p50_us, 3),
        "p75_us": round(samples.percentile(75), 3),
        "kernels": len(samples.kernels),
        "bytes": total_bytes,
        "gb_per_s": round(total_bytes / samples.p50_us / 1e3, 1),
        "copy_gb_per_s": round(total_bytes / copy.p50_us / 1e3, 1),
        "fraction_of_copy": round(copy.p50_us / samples.p50_us, 4),
    }


def append(path: pathlib.Path, row: Row) -> None:
    """Adds one line at the end of the file, written out before it returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def read(paths: Iterable[pathlib.Path]) -> list[Row]:
    """All rows of some files, in their order.

    Raises:
      ValueError: a line is no JSON object, with its place.
    """
    rows = []
    for path in paths:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"a record holds one JSON object a line, got {path}:{number}: {error}.") from error
            rows.append(row)
    return rows


def of_run(rows: Iterable[Row], run: str) -> list[Row]:
    """The rows of one run; the beginning of its id is enough where it is unique.

    Raises:
      ValueError: no run or several begin so.
    """
    rows = list(rows)
    runs = sorted({row["run"] for row in rows if row["run"].startswith(run)})
    if len(runs) != 1:
        known = ", ".join(runs or sorted({row["run"] for row in rows})[-5:])
        raise ValueError(f"one run must begin with {run!r}, got {len(runs)}. The record holds {known or 'none'}.")
    return [row for row in rows if row["run"] == runs[0]]


def key(row: Row) -> tuple[Any, ...]:
    """What a timed row measured, and on which GPU: rows of two runs with the same key compare."""
    return (
        row["gpu"],
        row["op"],
        *config(row),
        row["num_q_heads"],
        row["num_kv_heads"],
        row["num_tokens"],
        row["implementation"],
    )


def config(row: Row) -> tuple[Any, ...]:
    """What the rows of one picture or table share beside `op`: dtype, head_dim, rotary_dim, cache."""
    return (row["dtype"], row["head_dim"], row["rotary_dim"], row["cache"])


def timed(rows: Iterable[Row]) -> list[Row]:
    """The rows of device times, the latest where one was measured twice."""
    return list({key(row): row for row in rows if "p50_us" in row and "cache" in row}.values())
