"""`compare`: what got slower from one run to another, against the noise of both."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks import record, table
from benchmarks.record import Row

TIMER_STEP_US = 0.032  # of the device's clock on an H100 and an H200


class Change(NamedTuple):
    """One case of one implementation in two runs, microseconds."""

    before: Row
    after: Row
    expected_us: float  # the time before, at the copy speed of the run after
    noise_us: float

    @property
    def ratio(self) -> float:
        return self.after["p50_us"] / self.expected_us

    @property
    def verdict(self) -> str:
        """What the difference is beyond noise: "slower", "faster", or nothing."""
        difference = self.after["p50_us"] - self.expected_us
        if abs(difference) <= self.noise_us:
            return ""
        return "slower" if difference > 0 else "faster"


def changes(before: Sequence[Row], after: Sequence[Row]) -> list[Change]:
    """The timed rows that both sides hold of one GPU; the copy ceiling, which measures the machines, apart.

    Two runs see other clocks and neighbours. What is expected of the second is therefore the first one's time, scaled
    by the copy ceilings of the case. The noise is the larger distance between quartiles of the four medians that enter,
    and one step of the timer.
    """
    first, second = ({record.key(row): row for row in record.timed(rows)} for rows in (before, after))
    found = []
    for key, row in second.items():
        if key not in first or row["implementation"] == "copy":
            continue
        copy_key = (*key[:-1], "copy")
        scale = 1.0
        spreads = [(r["p50_us"], spread_us(r)) for r in (first[key], row)]
        if copy_key in first and copy_key in second:
            copies = (first[copy_key], second[copy_key])
            scale = copies[1]["p50_us"] / copies[0]["p50_us"]
            spreads += [(r["p50_us"], spread_us(r)) for r in copies]
        relative = max(spread / median for median, spread in spreads)
        expected = first[key]["p50_us"] * scale
        found.append(Change(first[key], row, expected, relative * expected + TIMER_STEP_US))
    return found


def spread_us(row: Row) -> float:
    """The distance between the quartiles; the first rows of a record have the 20th and 80th percentile instead."""
    low, high = ("p25_us", "p75_us") if "p25_us" in row else ("p20_us", "p80_us")
    return row[high] - row[low]


def rows_of(name: str, paths: Sequence[pathlib.Path]) -> list[Row]:
    """The rows of a file, or of the run whose id begins so in the records at `paths`.

    Raises:
      ValueError: there is no such file or run, or several runs begin so.
    """
    path = pathlib.Path(name)
    return record.read([path]) if path.is_file() else record.of_run(record.read(paths), name)


def compare(before: Sequence[Row], after: Sequence[Row]) -> int:
    """Prints what changed beyond noise; 0, 1 if something got slower, 2 if there is nothing to compare.

    Raises:
      ValueError: the sides have no GPU in common.
    """
    gpus = [{row["gpu"] for row in rows} for rows in (before, after)]
    if all(gpus) and not gpus[0] & gpus[1]:
        first, second = (" and ".join(sorted(names)) for names in gpus)
        raise ValueError(f"both sides must be of one GPU, got {first} before and {second} after. Time both on one.")
    found = changes(before, after)
    if not found:
        print("Both sides must hold times of the same cases and implementations, got none in common.")
        return 2
    rows = [["GPU", "op", "dtype", "D", "R", "cache", "heads", "T", "implementation", "before", "expected", "after"]]
    rows[0] += ["noise", "ratio", ""]
    shown = sorted((change for change in found if change.verdict), key=lambda change: -change.ratio)
    for change in shown:
        row = change.after
        times = (change.before["p50_us"], change.expected_us, row["p50_us"], change.noise_us)
        rows.append(
            [str(row[field]) for field in ("gpu", "op", "dtype", "head_dim", "rotary_dim", "cache")]
            + [f"{row['num_q_heads']}/{row['num_kv_heads']}", str(row["num_tokens"]), row["implementation"]]
            + [*(f"{t:.2f}" for t in times), f"{change.ratio:.3f}", change.verdict]
        )
    if shown:
        print(table.aligned(rows))
    slower = sum(change.verdict == "slower" for change in shown)
    keys = [{record.key(row) for row in record.timed(rows)} for rows in (before, after)]
    alone = len(keys[0] ^ keys[1])
    print(
        f"{len(found)} times compared, in microseconds: {slower} slower, {len(shown) - slower} faster, the others "
        f"within noise; {alone} are on one side only. Expected: the time before, at the copy speed after."
    )
    return int(slower > 0)
