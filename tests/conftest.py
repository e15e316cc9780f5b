"""Fixtures and the environment of every test."""

import jax
import pytest

from pallas_qk import IMPLEMENTATIONS
from tests.run import has_gpu

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def gpu():
    """Skips where JAX sees no NVIDIA GPU."""
    if not has_gpu():
        pytest.skip(f"needs an NVIDIA GPU, got JAX's default backend {jax.default_backend()!r}")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request) -> str:
    """Each implementation by name."""
    return request.param
