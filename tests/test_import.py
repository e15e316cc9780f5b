"""Importing the package stays light. That it changes nothing: test_surroundings."""

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
