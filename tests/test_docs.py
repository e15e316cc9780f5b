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
    "options.md": 10,
    "porting.md": 21,
    "sharding.md": 4,
    "training.md": 5,
}


@pytest.mark.parametrize("page, num_blocks", GUIDES.items())
def test_a_guides_code_runs(page, num_blocks):
    run_guide(page, num_blocks)


def test_the_serving_guides_code_runs(on_the_host):
    """It counts the memory of programs for a CPU."""
    run_guide("serving.md", 10)


NUMBERS = DOCS / "numbers.md"


def rows_of_table(page: pathlib.Path, heading: str) -> list[list[str]]:
    """The cells of the rows below a table's heading."""
    lines = page.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading)) + 2
    end = next((i for i in range(start, len(lines)) if not lines[i].startswith("|")), len(lines))
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines[start:end]]


def record_of(run: str) -> list[dict]:
    """The record's rows of one run."""
    record = (ROOT / "benchmarks" / "results" / "h200.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, record) if row["run"].startswith(run)]


def rows_of_run(run: str) -> dict[tuple, dict]:
    """The rows with a time by operation, implementation, heads and tokens."""
    heads = "{num_q_heads}/{num_kv_heads}"
    rows = [row for row in record_of(run) if "p50_us" in row]
    return {(x["op"], x["implementation"], heads.format(**x), str(x["num_tokens"])): x for x in rows}


def assert_rounded(cells: list[str], values: list[float]):
    for cell, value in zip(cells, values, strict=True):
        last_digit = 10.0 ** -len(cell.partition(".")[2])
        assert abs(float(cell) - value) < 0.501 * last_digit, (cells, values)


@pytest.mark.parametrize(
    "page, heading, run, op, columns",
    [
        (README, "| q/kv heads | tokens | Triton", "20261130T071852Z-72913f", "forward", ("oracle", "xla_plain")),
        (NUMBERS, "| heads | tokens | Triton", "20261130T071852Z-72913f", "forward", ("oracle", "xla_plain")),
        (NUMBERS, "| heads | tokens | autodiff", "20261130T081818Z", "backward", ("xla_plain", "xla")),
        (NUMBERS, "| heads of 128 | tokens | plain", "20261130T081933Z", "forward_no_gate", ("xla_plain", "xla")),
        (NUMBERS, "| heads of 128 | tokens | autodiff", "20261130T081933Z", "backward_no_gate", ("xla_plain", "xla")),
    ],
    ids=["README", "forward", "backward", "forward_no_gate", "backward_no_gate"],
)
def test_times_of_the_op_are_those_of_the_record(page, heading, run, op, columns):
    rows = rows_of_run(run)
    for heads, tokens, *cells in rows_of_table(page, heading):
        found = [rows[op, name, heads, tokens] for name in (*columns, "mosaic_gpu")]
        assert_rounded(cells, [*(row["p50_us"] for row in found), found[-1]["fraction_of_copy"]])


def test_times_of_blocks_are_those_of_the_record():
    rows = rows_of_run("20261129T235411Z")
    names = ("xla_plain", "mosaic_gpu", "mosaic_gpu_in_place")
    for heads, direction, *cells in rows_of_table(NUMBERS, "| heads | direction"):
        suffix = "" if direction == "forward" else "_backward"
        found = [rows[f"block{suffix}", name, heads, "16384"] for name in names]
        found.append(rows[f"block_packed{suffix}", "mosaic_gpu_in_place", heads, "16384"])
        assert_rounded(cells[:4], [row["p50_us"] for row in found])
        assert_rounded(cells[4].split(", "), [row["fraction_of_copy"] for row in found[2:]])


KINDS_OF_CACHES = ("kv_cache", "kv_cache_gate_in_place", "kv_cache_fp8", "kv_cache_fp8_gate_in_place")


def test_times_of_caches_are_those_of_the_record():
    rows = rows_of_run("20261130T072107Z")
    columns = [("kv_cache", name) for name in ("oracle", "mosaic_gpu_then_set")]
    columns += [(kind, "mosaic_gpu") for kind in KINDS_OF_CACHES[:3]]
    for tokens, *cells in rows_of_table(NUMBERS, "| tokens | Triton kernel, then"):
        assert_rounded(cells, [rows[*key, "16/2", tokens]["p50_us"] for key in columns])


OPTIONS = {
    "none": "forward",
    '`rotation="pairs"`': "forward_pairs",
    "`round_norm=False`": "forward_unrounded_norm",
    '`norm_order="rotation_first"`': "forward_rotation_first",
    "no table": "forward_no_table",
    "a float32 table": "forward_float32_table",
    "no weights": "forward_no_weights",
    "`v_norm=True`": "forward_v_norm",
}


def test_times_of_options_are_those_of_the_record():
    rows = rows_of_run("20261130T123620Z")
    listed = rows_of_table(NUMBERS, "| option | 64 tokens")
    assert [option for option, *_ in listed] == list(OPTIONS)
    for option, *cells in listed:
        found = [rows[OPTIONS[option], "mosaic_gpu", "16/2", tokens] for tokens in ("64", "1024", "16384")]
        assert_rounded(cells, [*(row["p50_us"] for row in found), found[-1]["fraction_of_copy"]])


def test_times_of_wider_heads_are_those_of_the_record():
    runs = {"512": rows_of_run("20261130T072039Z"), "256": rows_of_run("20261130T072014Z")}
    for name, *cells in rows_of_table(NUMBERS, "| heads | forward"):
        heads, _, head_dim = name.split()
        ops = (f"{direction}_no_gate" for direction in ("forward", "backward"))
        found = [runs[head_dim][op, "mosaic_gpu", heads, "16384"] for op in ops]
        assert_rounded(cells, [row[field] for row in found for field in ("p50_us", "fraction_of_copy")])


def test_times_of_gates_handed_on_are_those_of_the_record():
    rows = rows_of_run("20261129T235411Z")
    for tokens, direction, *cells in rows_of_table(NUMBERS, "| tokens | direction | `copy_gate=False`"):
        op = "block" if direction == "forward" else "block_backward"
        in_place, never = (rows[op, f"mosaic_gpu_{form}", "16/2", tokens] for form in ("in_place", "never"))
        assert_rounded(cells, [in_place["p50_us"], never["p50_us"], never["fraction_of_copy"]])


def test_times_of_the_projection_are_those_of_the_record():
    rows = rows_of_run("20261129T185901Z")
    names = ("xla_product", "mosaic_gpu_then_op", "mosaic_gpu_then_op_in_place", "mosaic_gpu")
    for heads, _, tokens, *cells in rows_of_table(DOCS / "options.md", "| heads | width | tokens | product"):
        assert_rounded(cells, [rows["projection", name, heads, tokens]["p50_us"] for name in names])


def test_times_of_the_projection_with_a_cache_are_those_of_the_record():
    rows = rows_of_run("20261129T235149Z")
    names = ("mosaic_gpu_then_op", "mosaic_gpu_then_op_in_place", "mosaic_gpu")
    for heads, tokens, *cells in rows_of_table(DOCS / "options.md", "| heads | tokens | product and cached op"):
        found = [rows[op, name, heads, tokens] for op in ("projection_cache", "projection_cache_fp8") for name in names]
        assert_rounded(cells, [row["p50_us"] for row in found])


def test_what_8_bits_cost_and_save_is_in_the_record():
    rows = rows_of_run("20261130T072107Z")

    def times(tokens: int) -> list[float]:
        return [rows[kind, "mosaic_gpu", "16/2", str(tokens)]["p50_us"] for kind in KINDS_OF_CACHES]

    said = "costs (.+) to (.+) us more .+ up to 256 tokens. From 16,384 tokens on it saves (.+) % .+ or (.+) % with"
    ((least, most, *shares),) = re.findall(said, NUMBERS.read_text().replace("\n", " "))
    few = [times(tokens) for tokens in (1, 16, 64, 256)]
    costs = [cost for copied, in_place, *fp8 in few for cost in (fp8[0] - copied, fp8[1] - in_place)]
    assert_rounded([least, most], [min(costs), max(costs)])
    for copied, in_place, *fp8 in map(times, (16384, 65536)):
        assert_rounded(shares, [100 * (1 - fp8[0] / copied), 100 * (1 - fp8[1] / in_place)])


FORMS = ("plain", "three", "barriers", "packed")
STEPS = {"forward": "forward", "training": "training_step"}


def test_times_of_layers_are_those_of_the_record():
    rows = {(f"{x['layers']} of {x['model']}", x["op"], x["form"]): x for x in record_of("20261129T131958Z")}
    listed = rows_of_table(NUMBERS, "| layers | step")
    assert len(listed) * len(FORMS) == len(rows)
    for layers, step, plain_ms, *shares, kernels in listed:
        found = [rows[layers, STEPS[step], form] for form in FORMS]
        assert_rounded([plain_ms], [found[0]["p50_us"] / 1000])
        assert_rounded(shares, [row["share_of_plain"] for row in found[1:]])
        assert kernels == ", ".join(str(row["kernels"]) for row in found)


@pytest.mark.parametrize("page", [README, NUMBERS], ids=["README", "numbers"])
def test_what_a_model_gains_is_in_the_record(page):
    saved = [100 * (1 - x["share_of_plain"]) for x in record_of("20261129T131958Z") if x["form"] != "plain"]
    said = r"([\d.]+) to ([\d.]+) % less time than with plain jnp"
    ((least, most),) = re.findall(said, page.read_text().replace("\n", " "))
    assert_rounded([least, most], [min(saved), max(saved)])


def test_host_times_are_those_of_the_record():
    rows = {(x["op"], x["implementation"], x.get("platform", "")): x for x in record_of("20261130T072544Z")}
    calls = {
        "`fused_qk_rmsnorm_rope_gate`": "forward_host",
        "`fused_qkv_rmsnorm_rope_gate`": "forward_packed_host",
        "`fused_qkv_rmsnorm_rope_gate_cache`": "forward_cache_host",
    }
    for function, *cells in rows_of_table(NUMBERS, "| function | eager"):
        row = rows[calls[function], "mosaic_gpu", ""]
        assert_rounded(cells, [row["eager_us"], row["jit_us"]])
    for direction, platform, *cells in rows_of_table(NUMBERS, "| direction | lowered for"):
        found = [rows[f"{direction}_layers", name, platform.lower()] for name in ("op", "attention")]
        assert_rounded(cells, [(row["trace_ms"] + row["lower_ms"]) / row["layers"] for row in found])


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
    "fused_qkv_projection_rmsnorm_rope_gate",
    "fused_qkv_projection_rmsnorm_rope_gate_cache",
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
    page = (DOCS / "api.rst").read_text()
    for directive, name in re.findall(r"^\.\. (\w+):: ([^\s(]+)(?:\(\))?$", page, re.MULTILINE):
        if directive == "automodule":
            module = name
        listed.append(name if directive == "automodule" else f"{module}.{name}")
    assert sorted(listed) == sorted(public_names(pallas_qk))
