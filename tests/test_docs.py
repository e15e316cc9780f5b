"""The examples that users read are run: the README's and those of the public docstrings. The API page is complete."""

import doctest
import re
import types

import jax
import pytest

import pallas_qk
from tests.pages import DOCS, README, python_blocks


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


@pytest.mark.parametrize("page, num_blocks", [("kv_cache.md", 13), ("porting.md", 20)])
def test_a_guides_code_runs(page, num_blocks):
    run_guide(page, num_blocks)


def test_the_serving_guides_code_runs(on_the_host):
    """It counts the memory of programs for a CPU."""
    run_guide("serving.md", 9)


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
