"""Readable tables: rows of text, aligned."""

from collections.abc import Mapping, Sequence

import pallas_qk
from benchmarks import record
from benchmarks.record import Row
from benchmarks.timing import Samples
from tests.cases import Case

KERNELS = tuple(name for name in pallas_qk.IMPLEMENTATIONS if name != "xla")


def aligned(rows: Sequence[Sequence[str]], separator: str = "  ", left: int = 0) -> str:
    """The first row is the heading. Columns are as wide as their widest cell, to the right but for the `left` last."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = len(widths) - left
    return "\n".join(
        separator.join(
            cell.rjust(width) if i < right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def times(measured: Mapping[Case, Mapping[str, Samples]], names: Sequence[str]) -> str:
    """One table for cases of one head count: each name with its time, share of the copy and ratio to the oracle."""
    heading = ["T", "copy us"]
    for name in names:
        heading += [f"{name} us", "of copy"] + (["x oracle"] if name != "oracle" and "oracle" in names else [])
    rows = [heading]
    for case, samples in measured.items():
        copy, row = samples["copy"].p50_us, [str(case.num_tokens), f"{samples['copy'].p50_us:.2f}"]
        for name in names:
            if name not in samples:  # it can't run this case
                row += ["-", "-"] + (["-"] if name != "oracle" and "oracle" in names else [])
                continue
            row += [f"{samples[name].p50_us:.2f}", f"{copy / samples[name].p50_us:.3f}"]
            if name != "oracle" and "oracle" in names:
                row.append(f"{samples[name].p50_us / samples['oracle'].p50_us:.3f}")
        rows.append(row)
    return aligned(rows)


def markdown(rows: Sequence[Row]) -> str:
    """The table of a README: one line for each case of one GPU, operation and configuration.

    `rows` are timed rows of one run: microseconds of each implementation in the order met, and the best Pallas
    kernel's share of the copy ceiling.
    """
    names = list(dict.fromkeys(row["implementation"] for row in rows if row["implementation"] != "copy"))
    cases: dict[tuple[int, int, int], dict[str, Row]] = {}
    for row in rows:
        case = (row["num_q_heads"], row["num_kv_heads"], row["num_tokens"])
        cases.setdefault(case, {})[row["implementation"]] = row
    lines = [f"| heads | tokens | copy | {' | '.join(names)} | of copy |", "|---" * (len(names) + 4) + "|"]
    for (num_q_heads, num_kv_heads, num_tokens), found in sorted(cases.items()):
        cells = [_microseconds(found[name]) if name in found else "-" for name in ("copy", *names)]
        ours = [row["fraction_of_copy"] for name, row in found.items() if name.removesuffix("_in_place") in KERNELS]
        best = f"{max(ours):.2f}" if ours else "-"
        lines.append(f"| {num_q_heads}/{num_kv_heads} | {num_tokens} | {' | '.join(cells)} | {best} |")
    return "\n".join(lines)


def _microseconds(row: Row) -> str:
    """Three digits that mean something, or the whole number."""
    time_us = row["p50_us"]
    return f"{time_us:.2f}" if time_us < 100 else f"{time_us:.0f}"


def tables(rows: Sequence[Row]) -> str:
    """The Markdown table of each GPU, operation and configuration that a run timed."""
    groups: dict[tuple, list[Row]] = {}
    for row in record.timed(rows):
        groups.setdefault((row["gpu"], row["op"], *record.config(row)), []).append(row)
    return "\n\n".join(
        f"{gpu}: {op.replace('_', ' ')}, {dtype}, head_dim {head_dim}, rotary_dim {rotary_dim}, {cache} L2, "
        f"microseconds\n\n{markdown(group)}"
        for (gpu, op, dtype, head_dim, rotary_dim, cache), group in groups.items()
    )
