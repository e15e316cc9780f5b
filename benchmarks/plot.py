"""`plot`: time against tokens and share of the copy ceiling, or how fast a decode step reads caches, from a record."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks import record
from benchmarks.record import Row

MINIMUM_POINTS = 3  # of a head count: fewer make no curve


class Style(NamedTuple):
    """How one implementation, or form of a decode step, is drawn in every picture."""

    label: str
    color: str
    marker: str
    line: str = "-"


# Colours of Okabe and Ito, which colour-blind readers tell apart; markers too, for print.
STYLES = {
    "mosaic_gpu": Style("pallas-qk, Mosaic GPU", "#0072B2", "o"),
    "triton": Style("pallas-qk, Triton", "#009E73", "s"),
    "xla": Style("pallas-qk, XLA", "#56B4E9", "^"),
    "xla_plain": Style("plain jnp under jit", "#E69F00", "v"),
    "oracle": Style("Triton kernel of the serving design", "#D55E00", "D"),
    "copy": Style("copy of the same bytes", "#555555", "", "--"),
}
FORMS = {
    "set-xla": Style(".at[].set, attention by XLA", "#E69F00", "v"),
    "fp8-cudnn": Style("op, float8_e4m3fn, attention by cuDNN", "#56B4E9", "^"),
    "set-cudnn": Style(".at[].set, attention by cuDNN", "#D55E00", "D"),
    "example-cudnn": Style("the example's layer, attention by cuDNN", "#009E73", "s"),
    "op-cudnn": Style("op, attention by cuDNN", "#0072B2", "o", "--"),
}
STYLES |= FORMS
# What the ends of names mean.
VARIANTS = {
    "_in_place": ("gate in place", ":"),
    "_never": ("gate handed on", "-."),
    "_alone": ("k and v returned, no cache", "-."),
    "_then_set": ("then .at[slots].set", ":"),
    "_then_op": ("after the product", "-."),
    "_then_op_in_place": ("after the product, gate in place", ":"),
}
_OTHERS = ("#CC79A7", "#000000", "#F0E442")  # peers, in the order met


def style(name: str, others: Sequence[str]) -> Style:
    """That of an implementation; `others` are the names without one of their own."""
    if name in STYLES:
        return STYLES[name]
    for ending, (text, line) in VARIANTS.items():
        if (known := STYLES.get(name.removesuffix(ending))) and name.endswith(ending):
            return Style(f"{known.label}, {text}", known.color, known.marker, line)
    return Style(name, _OTHERS[others.index(name) % len(_OTHERS)], "P")


def is_known(name: str) -> bool:
    """Whether a name has a style of its own."""
    return any(name.removesuffix(ending) in STYLES for ending in ("", *VARIANTS))


class Kind(NamedTuple):
    """How rows of one kind are drawn.

    `pictures`, `lines` and `curves` are the fields whose values tell pictures, lines of panels and curves apart.
    Pictures also differ by GPU, operation, dtype and dimensions.
    """

    pictures: Mapping[str, str]  # each field, and how the title says its value
    lines: tuple[str, ...]
    heading: str  # of a line of panels
    curves: str
    tokens: str  # the label of the horizontal axis
    time: str  # the field that the left panel shows
    rate: Callable[[Row], float]  # what the right panel shows
    rate_label: str
    most: float | None  # the upper end of the right panel


OPERATIONS = Kind(
    pictures={"cache": "{} L2"},
    lines=("num_q_heads", "num_kv_heads"),
    heading="{} query and {} key heads",
    curves="implementation",
    tokens="tokens",
    time="p50_us",
    rate=lambda row: row["fraction_of_copy"],
    rate_label="fraction of the copy ceiling",
    most=1.05,
)
STEPS = Kind(
    pictures={"implementation": "{}", "program": "program {}"},
    lines=("num_q_heads", "num_kv_heads", "context"),
    heading="{} query and {} kv heads, caches of {:,} places",
    curves="form",
    tokens="sequences",
    time="device_us",
    rate=lambda row: row["attended_bytes"] / row["device_us"] / 1e3,
    rate_label="GB/s of caches",
    most=None,
)


class Picture(NamedTuple):
    """The rows of one picture, by line of panels and curve, in the order of their tokens."""

    name: str
    title: str
    curves: Mapping[tuple[int, ...], Mapping[str, Sequence[Row]]]
    kind: Kind


def pictures(rows: Sequence[Row], run: str | None = None) -> list[Picture]:
    """One for each GPU, operation, dtype, head and rotary dimension and cache, of `run` or the latest run that fits.

    Decode steps have one for each implementation and program, and its curves are forms.
    """
    rows = record.of_run(rows, run) if run else rows
    steps = [row for row in rows if row["op"] == "decode_step_profile" and row.get("form") in FORMS]
    return _pictures([row for row in rows if "cache" in row and "p50_us" in row], OPERATIONS) + _pictures(steps, STEPS)


def _pictures(rows: Sequence[Row], kind: Kind) -> list[Picture]:
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        settings = (row[field] for field in ("gpu", "op", "dtype", "head_dim", "rotary_dim", *kind.pictures))
        groups.setdefault(tuple(settings), []).append(row)
    found = []
    for (gpu, op, dtype, head_dim, rotary_dim, *others), group in groups.items():
        op = op.removesuffix("_profile")
        by_run = {run: _curves(group, run, kind) for run in {row["run"] for row in group}}
        latest = max((run for run, curves in by_run.items() if curves), default=None)
        if latest is None:
            continue
        name = "-".join([record.gpu_slug(gpu), op, dtype, f"d{head_dim}", f"r{rotary_dim}", *others])
        versions = next(row["versions"] for row in group if row["run"] == latest)
        said = ", ".join(text.format(value) for text, value in zip(kind.pictures.values(), others, strict=True))
        title = (
            f"{gpu}: {op.replace('_', ' ')}, {dtype}, head_dim {head_dim}, rotary_dim {rotary_dim}, {said}\n"
            f"run {latest}, jax {versions['jax']}, triton {versions['triton']}, driver {versions['driver']}"
        )
        found.append(Picture(name, title, by_run[latest], kind))
    return found


def _curves(rows: Sequence[Row], run: str, kind: Kind) -> dict[tuple[int, ...], dict[str, list[Row]]]:
    """The rows of a run by line and curve, the latest of one measured twice; lines with too few points are left out."""
    points: dict[tuple[int, ...], dict[str, dict[int, Row]]] = {}
    for row in (row for row in rows if row["run"] == run):
        line = tuple(row[field] for field in kind.lines)
        points.setdefault(line, {}).setdefault(row[kind.curves], {})[row["num_tokens"]] = row
    return {
        line: {name: [by_tokens[tokens] for tokens in sorted(by_tokens)] for name, by_tokens in by_name.items()}
        for line, by_name in sorted(points.items())
        if max(map(len, by_name.values())) >= MINIMUM_POINTS
    }


def plot(rows: Sequence[Row], run: str | None, output: pathlib.Path) -> int:
    """Writes each picture as PNG and SVG and prints their paths; 0, or 2 if the rows make none."""
    found = pictures(rows, run)
    if not found:
        print(f"A picture needs {MINIMUM_POINTS} numbers of tokens for a head count, got fewer in every run.")
        return 2
    output.mkdir(parents=True, exist_ok=True)
    for picture in found:
        for path in draw(picture, output):
            print(path)
    return 0


def draw(picture: Picture, output: pathlib.Path) -> list[pathlib.Path]:
    """One line of two panels for each head count, or head count and length of caches."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    kind = picture.kind
    names = list(dict.fromkeys(name for by_name in picture.curves.values() for name in by_name))
    order = [*(name for name in STYLES if name in names), *(name for name in names if name not in STYLES)]
    others = [name for name in order if not is_known(name)]
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": picture.name, "font.size": 11}):
        height = 3.9 * len(picture.curves) + 1.5
        figure, axes = pyplot.subplots(
            len(picture.curves), 2, figsize=(12, height), squeeze=False, sharex=True, layout="constrained"
        )
        lines = {}
        for (left, right), (line, by_name) in zip(axes, picture.curves.items(), strict=True):
            for name in (name for name in order if name in by_name):
                drawn = style(name, others)
                tokens = [row["num_tokens"] for row in by_name[name]]
                look: dict[str, Any] = {
                    "color": drawn.color,
                    "marker": drawn.marker or None,
                    "linestyle": drawn.line,
                    "markersize": 5,
                    "linewidth": 1.6,
                }
                (lines[name],) = left.loglog(tokens, [row[kind.time] for row in by_name[name]], **look)
                right.semilogx(tokens, [kind.rate(row) for row in by_name[name]], **look)
            heading = kind.heading.format(*line)
            left.set(title=heading, ylabel="time (µs)")
            left.yaxis.set_major_formatter("{x:g}")
            left.yaxis.set_minor_formatter(ticker.LogFormatter())
            right.set(title=heading, ylabel=kind.rate_label, ylim=(0, kind.most))
            for axis in (left, right):
                _mark_tokens(axis, by_name)
        for axis in axes[-1]:
            axis.set_xlabel(kind.tokens)
        figure.suptitle(picture.title, fontsize=12)
        labels = [style(name, others).label for name in lines]
        figure.legend(lines.values(), labels, loc="outside lower center", ncols=3, frameon=False)
        paths = [output / f"{picture.name}.{suffix}" for suffix in ("png", "svg")]
        for path in paths:
            metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}  # equal rows, equal files
            figure.savefig(path, dpi=110, metadata=metadata)
        pyplot.close(figure)
    return paths


def _mark_tokens(axis, by_name: Mapping[str, Sequence[Row]]) -> None:
    """Ticks at powers of four that cover the measured ones, written as readers count tokens."""
    tokens = [row["num_tokens"] for points in by_name.values() for row in points]
    ticks = [4**i for i in range(12) if min(tokens) <= 4**i <= max(tokens)]
    axis.set_xticks(ticks, [_tokens_text(tick) for tick in ticks], minor=False)
    axis.set_xticks([], minor=True)
    axis.grid(True, which="major", color="#dddddd", linewidth=0.7)
    axis.spines[["top", "right"]].set_visible(False)


def _tokens_text(tokens: int) -> str:
    if tokens < 1024:
        return str(tokens)
    return f"{tokens // 1024}k" if tokens < 1024**2 else f"{tokens // 1024**2}M"
