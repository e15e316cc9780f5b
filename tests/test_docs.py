"""What users read is true: examples run, times are those of the record, files are there, the API page is complete."""

import doctest
import json
import pathlib
import re
import types

import jax
import pytest

import pallas_qk
from tests.pages import DOCS, README, ROOT, python_blocks


@pytest.fixture(autouse=True)
def as_users_run_it():
    """JAX's own defaults, not the strict ones of the other tests."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def test_the_readmes_example_runs():
    (code,) = python_blocks(README)
    names: dict = {}
    exec(code, names)
    shapes = [names[name].shape for name in ("q", "k", "gate")]
    assert ", ".join(map(str, shapes)) in code


def run_guide(page: str, num_blocks: int) -> None:
    """Its blocks build on each other and hold their own assertions."""
    blocks = python_blocks(DOCS / page)
    assert len(blocks) == num_blocks
    names: dict = {}
    before = jax.config.jax_default_matmul_precision
    try:
        for block in blocks:
            exec(block, names)
    finally:
        jax.config.update("jax_default_matmul_precision", before)


GUIDES = {
    "kv_cache.md": 13,
    "numerics.md": 1,
    "options.md": 7,
    "porting.md": 20,
    "sharding.md": 4,
    "training.md": 4,
}


@pytest.mark.parametrize("page, num_blocks", GUIDES.items())
def test_a_guides_code_runs(page, num_blocks):
    run_guide(page, num_blocks)


def test_the_serving_guides_code_runs(on_the_host):
    """It counts the memory of programs for a CPU."""
    run_guide("serving.md", 9)


NUMBERS = DOCS / "numbers.md"


def rows_of_table(page: pathlib.Path, heading: str) -> list[list[str]]:
    """The cells of the rows below a table's heading."""
    lines = page.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading)) + 2
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines[start:end]]


def rows_of_run(run: str) -> dict[tuple, dict]:
    """The record's rows by operation, implementation, heads and tokens."""
    record = (ROOT / "benchmarks" / "results" / "h200.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, record) if row["run"].startswith(run)]
    heads = "{num_q_heads}/{num_kv_heads}"
    return {(x["op"], x["implementation"], heads.format(**x), str(x["num_tokens"])): x for x in rows if "p50_us" in x}


def assert_rounded(cells: list[str], values: list[float]):
    for cell, value in zip(cells, values, strict=True):
        last_digit = 10.0 ** -len(cell.partition(".")[2])
        assert abs(float(cell) - value) < 0.501 * last_digit, (cells, values)


@pytest.mark.parametrize(
    "page, heading, op, columns",
    [
        (README, "| q/kv heads | tokens | Triton", "forward", ("oracle", "xla_plain", "mosaic_gpu")),
        (NUMBERS, "| heads | tokens | Triton", "forward", ("oracle", "xla_plain", "mosaic_gpu")),
        (NUMBERS, "| heads | tokens | autodiff", "backward", ("xla_plain", "xla", "mosaic_gpu")),
    ],
    ids=["README", "forward", "backward"],
)
def test_times_of_the_op_are_those_of_the_record(page, heading, op, columns):
    rows = rows_of_run("20261124T171902Z")
    for heads, tokens, *cells in rows_of_table(page, heading):
        found = [rows[op, name, heads, tokens] for name in columns]
        assert_rounded(cells, [*(row["p50_us"] for row in found), found[-1]["fraction_of_copy"]])


def test_times_of_blocks_are_those_of_the_record():
    rows = rows_of_run("20261124T133006Z")
    names = ("xla_plain", "mosaic_gpu", "mosaic_gpu_in_place")
    for heads, direction, *cells in rows_of_table(NUMBERS, "| heads | direction"):
        suffix = "" if direction == "forward" else "_backward"
        found = [rows[f"block{suffix}", name, heads, "16384"] for name in names]
        found.append(rows[f"block_packed{suffix}", "mosaic_gpu_in_place", heads, "16384"])
        assert_rounded(cells[:4], [row["p50_us"] for row in found])
        assert_rounded(cells[4].split(", "), [row["fraction_of_copy"] for row in found[2:]])


def test_times_of_caches_are_those_of_the_record():
    rows, other_rows = rows_of_run("20261129T091731Z"), rows_of_run("20261129T085639Z")
    copied = [("kv_cache", name) for name in ("oracle", "mosaic_gpu_then_set", "mosaic_gpu")]
    for tokens, *cells in rows_of_table(NUMBERS, "| tokens | Triton kernel, then"):
        found = [rows[*key, "16/2", tokens] for key in (*copied, ("kv_cache_gate_in_place", "mosaic_gpu"))]
        of_8_bits = other_rows if int(tokens) >= 1024 else rows
        found.append(of_8_bits["kv_cache_fp8", "mosaic_gpu", "16/2", tokens])
        assert_rounded(cells, [row["p50_us"] for row in found])


def test_files_that_pages_name_are_there():
    folders = "tests|examples|benchmarks|docs|torch_ref|pallas_qk"
    for page in (README, ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")):
        named = re.findall(rf"`((?:{folders})/[\w./-]+\.\w+)`", page.read_text())
        missing = [name for name in named if not (ROOT / name).exists()]
        assert not missing, f"{page.name} must name files that are there, got {missing}"


def test_the_citation_is_of_the_newest_release():
    named = re.findall(r"^(?:version|date-released): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    releases = re.findall(r"^## (\d\S*) - (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert named == [pallas_qk.__version__, releases[0][1]] and releases[0][0] == pallas_qk.__version__


FUNCTIONS = (
    "fused_qk_rmsnorm_rope_gate",
    "fused_qk_rmsnorm_rope",
    "fused_qkv_rmsnorm_rope_gate",
    "fused_qkv_rmsnorm_rope",
    "fused_qkv_rmsnorm_rope_gate_cache",
    "fused_qkv_rmsnorm_rope_cache",
    "default_implementation",
)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_examples(name):
    tests = doctest.DocTestFinder(recurse=False).find(getattr(pallas_qk, name), name)
    results = [doctest.DocTestRunner().run(test) for test in tests]
    assert sum(result.attempted for result in results) > 0
    assert sum(result.failed for result in results) == 0


def test_every_public_name_has_a_docstring():
    names = [name for name in vars(pallas_qk) if not name.startswith("_")]
    assert set(names) >= {*FUNCTIONS, "IMPLEMENTATIONS", "dlpack"}
    for name in names:
        assert name == "IMPLEMENTATIONS" or getattr(pallas_qk, name).__doc__


def public_names(module: types.ModuleType):
    """A module's full name and those of its functions, classes, constants and public submodules."""
    yield module.__name__
    for name, value in vars(module).items():
        if name.startswith("_") or name == "TYPE_CHECKING":
            continue
        if isinstance(value, types.ModuleType):
            if value.__name__.startswith("pallas_qk."):
                yield from public_names(value)
        elif name.isupper() or str(getattr(value, "__module__", "")).startswith("pallas_qk."):
            yield f"{module.__name__}.{name}"


def test_the_api_page_lists_every_public_name():
    listed, module = [], ""
    for directive, name in re.findall(r"^\.\. (\w+):: (\S+)$", (DOCS / "api.rst").read_text(), re.MULTILINE):
        if directive == "automodule":
            module = name
        listed.append(name if directive == "automodule" else f"{module}.{name}")
    assert sorted(listed) == sorted(public_names(pallas_qk))
