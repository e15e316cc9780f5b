"""Fixtures and the environment of every test."""

import os

# Eight devices of the host for the tests of sharding, on a machine with GPUs too; read when JAX starts its CPU backend.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

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
