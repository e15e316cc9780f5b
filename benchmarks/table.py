"""Readable tables: rows of text, aligned."""

from collections.abc import Mapping, Sequence

from benchmarks.timing import Samples
from tests.cases import Case


def aligned(rows: Sequence[Sequence[str]], separator: str = "  ") -> str:
    """The first row is the heading. Columns are as wide as their widest cell, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        separator.join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
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
