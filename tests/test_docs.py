"""The examples that users read are run: the README's and those of the public docstrings."""

import doctest
import pathlib
import re

import jax
import pytest

import pallas_qk
from pallas_qk import _api


@pytest.fixture(autouse=True)
def as_users_run_it():
    """JAX's own defaults, not the strict ones of the other tests."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


README = pathlib.Path(__file__).parent.parent / "README.md"


def test_the_readmes_example_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict = {}
    exec(code, names)
    shapes = [names[name].shape for name in ("q", "k", "gate")]
    assert ", ".join(map(str, shapes)) in code


def test_the_porting_guides_code_runs():
    """Its blocks build on each other and hold their own assertions."""
    blocks = re.findall(r"```python\n(.*?)```", (README.parent / "docs" / "porting.md").read_text(), re.DOTALL)
    assert len(blocks) == 8
    names: dict = {}
    with jax.default_matmul_precision("highest"):
        for block in blocks:
            exec(block, names)


FUNCTIONS = (
    "fused_qk_rmsnorm_rope_gate",
    "fused_qk_rmsnorm_rope",
    "fused_qkv_rmsnorm_rope_gate",
    "fused_qkv_rmsnorm_rope",
    "default_implementation",
)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstring_examples(name):
    tests = doctest.DocTestFinder(recurse=False).find(getattr(_api, name), name)
    results = [doctest.DocTestRunner().run(test) for test in tests]
    assert sum(result.attempted for result in results) > 0
    assert sum(result.failed for result in results) == 0


def test_every_public_name_has_a_docstring():
    names = [name for name in vars(pallas_qk) if not name.startswith("_")]
    assert set(names) >= {*FUNCTIONS, "IMPLEMENTATIONS", "dlpack"}
    for name in names:
        assert name == "IMPLEMENTATIONS" or getattr(pallas_qk, name).__doc__
