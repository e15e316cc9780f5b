"""Importing the package stays light and touches nothing."""

import functools
import subprocess
import sys

import pytest


@functools.cache
def loaded_after(code: str) -> set[str]:
    """Modules that a fresh interpreter holds after running `code`."""
    script = f"{code}\nimport sys\nprint('\\n'.join(sys.modules))"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


@pytest.mark.parametrize(
    "name", ["torch", "triton", "jax.extend", "jax.experimental.pallas", "jax.experimental.mosaic"]
)
def test_import_leaves_out_what_is_used_later(name):
    assert name not in loaded_after("import pallas_qk")


def test_the_probe_sees_what_is_imported():
    assert "jax.experimental.pallas" in loaded_after("import pallas_qk._triton")


def test_import_initialises_no_backend_and_changes_no_setting():
    code = (
        "import warnings, jax\n"
        "before = dict(jax.config.values), list(warnings.filters)\n"
        "import pallas_qk\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "assert (dict(jax.config.values), list(warnings.filters)) == before\n"
    )
    loaded_after(code)
