"""Fixtures and the environment of every test."""

import os
import sys

# Eight devices of the host for the tests of sharding, on a machine with GPUs too; read when JAX starts its CPU backend.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import jax
import pytest

from pallas_qk import IMPLEMENTATIONS
from tests import gpu_memory
from tests.run import has_gpu

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Of `-n auto` no more than a GPU has memory for."""
    workers = yield
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ or not (total := gpu_memory.gpu_bytes()):
        return workers
    return min(workers, gpu_memory.most_processes(total))


def pytest_configure(config):
    """JAX takes its share of the GPU's memory now; the environment then holds the bound of what tests start."""
    runs_tests = hasattr(config, "workerinput") or config.getoption("dist", "no") == "no"
    if not runs_tests or not (total := gpu_memory.gpu_bytes()):
        return
    shares, given = gpu_memory.shares(total, gpu_memory.processes()), dict(os.environ)
    os.environ.update(gpu_memory.environment(shares.jax, preallocate=True, given=given))
    jax.devices()
    os.environ.update(gpu_memory.environment(shares.started, preallocate=False, given=given))


def pytest_collection_finish():
    """Torch, where a test imports it, keeps to its share."""
    torch, total = sys.modules.get("torch"), gpu_memory.gpu_bytes()
    if total and torch and torch.cuda.is_available() and not gpu_memory.bounds_torch(os.environ):
        torch.cuda.set_per_process_memory_fraction(gpu_memory.shares(total, gpu_memory.processes()).torch)


def pytest_runtest_setup(item):
    processes = gpu_memory.processes()
    if item.get_closest_marker("alone") and processes > 1 and has_gpu():
        pytest.skip(f"needs the GPU for itself, got {processes} processes: python -m pytest -m alone runs it")


@pytest.fixture
def gpu():
    """Skips where JAX sees no NVIDIA GPU."""
    if not has_gpu():
        pytest.skip(f"needs an NVIDIA GPU, got JAX's default backend {jax.default_backend()!r}")


@pytest.fixture
def on_the_host():
    """Arrays go to a device of the host, also on a machine with GPUs."""
    with jax.default_device(jax.devices("cpu")[0]):
        yield


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request) -> str:
    """Each implementation by name."""
    return request.param
