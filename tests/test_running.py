"""How the tests run: the shares of a GPU's memory, the tests that need one alone, `make test`'s sessions, plugins."""

import os
import pathlib
import shutil
import subprocess
import sys
import types

import pytest

from tests import conftest, gpu_memory

ROOT = pathlib.Path(__file__).parents[1]
H100, H200, RTX_4090 = 81_559 * 2**20, 143_771 * 2**20, 24_564 * 2**20  # what nvidia-smi says


# --- the GPU's memory ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("total, most", [(H100, 12), (H200, 22), (RTX_4090, 3), (2**30, 1)])
def test_as_many_processes_as_find_memory(total, most):
    assert gpu_memory.most_processes(total) == most


@pytest.mark.parametrize("total, processes", [(H100, 1), (H100, 11), (H100, 12), (H200, 16), (H200, 22), (RTX_4090, 3)])
def test_the_shares_of_all_processes_fit_and_hold_the_tests(total, processes):
    jax, torch, started = (total * share for share in gpu_memory.shares(total, processes))
    together = processes * (jax + torch + gpu_memory.CONTEXT + gpu_memory.STARTED)
    assert together <= 0.97 * total * (1 + 1e-9)
    # test_parity: the random numbers of 16384 tokens, 16 bytes an element; in torch three outputs of 4096 tokens.
    assert jax > 2.6e9 and torch > 3 * 4096 * 34 * 512 * 2
    assert started == 1.5e9


def test_a_process_alone_on_80_gb_holds_the_largest_test():
    jax, torch, _ = (H100 * share for share in gpu_memory.shares(H100, 1))
    assert jax > 1.1 * 7 * 2**33  # test_large's backward
    assert torch > 2**32 + 2**30  # test_torch_ref's offsets past 2^31


def test_more_processes_than_fit_get_less_and_something():
    few, many = gpu_memory.shares(H100, 12), gpu_memory.shares(H100, 60)
    assert 0 < many.jax < few.jax and 0 < many.torch < few.torch and 0 < many.started <= many.jax


SETTINGS = FRACTION, OLD_FRACTION, PREALLOCATE = (
    "XLA_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
)


@pytest.mark.parametrize(
    "given, want",
    [
        ({}, {FRACTION: "0.2500", PREALLOCATE: "true"}),
        ({FRACTION: "0.5"}, {PREALLOCATE: "true"}),
        ({OLD_FRACTION: "0.5"}, {PREALLOCATE: "true"}),
        ({PREALLOCATE: "false"}, {FRACTION: "0.2500"}),
        ({PREALLOCATE: "false", OLD_FRACTION: ".5"}, {}),
    ],
)
def test_what_a_user_sets_stays(given, want):
    assert gpu_memory.environment(0.25, preallocate=True, given=given) == want


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_users_bound_of_torch_is_seen(name):
    assert gpu_memory.bounds_torch({name: "per_process_memory_fraction:0.3,expandable_segments:True"})
    assert not gpu_memory.bounds_torch({name: "expandable_segments:True"})


def program(folder: pathlib.Path, name: str, text: str) -> str:
    """The path of a shell script."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_the_smallest_gpu_counts(tmp_path, monkeypatch):
    gpu_bytes = gpu_memory.gpu_bytes.__wrapped__
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_bytes() == 0  # no nvidia-smi
    program(tmp_path, "nvidia-smi", "echo 143771; echo 81559")
    assert gpu_bytes() == H100
    for platforms, want in (("cpu", 0), ("cuda,cpu", H100), ("gpu", H100)):
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        assert gpu_bytes() == want
    monkeypatch.delenv("JAX_PLATFORMS")
    program(tmp_path, "nvidia-smi", "echo 'NVIDIA-SMI has failed: no driver'; exit 9")
    assert gpu_bytes() == 0


# --- what the conftest makes of it --------------------------------------------------------------------------------


@pytest.fixture
def process(monkeypatch):
    """Plays one of 12 processes on a GPU of 80 GB; what JAX and torch are told goes into the list."""
    for name in (*SETTINGS, "PYTEST_XDIST_AUTO_NUM_WORKERS"):
        monkeypatch.setenv(name, "")  # so that what a test makes of it is undone
        monkeypatch.delenv(name)
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "12")
    told = []
    cuda = types.SimpleNamespace(is_available=lambda: True, set_per_process_memory_fraction=told.append)
    monkeypatch.setattr(gpu_memory, "gpu_bytes", lambda: H100)
    monkeypatch.setattr(conftest.jax, "devices", lambda: told.append(settings()))
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(cuda=cuda))
    return told


def settings() -> dict[str, str]:
    """Those of JAX in this process's environment."""
    return {name: os.environ[name] for name in SETTINGS if name in os.environ}


def config(dist="no", **attributes):
    return types.SimpleNamespace(getoption=lambda name, default: dist, **attributes)


@pytest.mark.parametrize("plays", [config(), config(dist="load", workerinput={})])
def test_jax_starts_with_its_share_and_what_tests_start_gets_a_small_one(process, plays):
    conftest.pytest_configure(plays)
    conftest.pytest_collection_finish()
    at_start, of_torch = process
    assert at_start == {FRACTION: "0.0510", PREALLOCATE: "true"}
    assert settings() == {FRACTION: "0.0175", PREALLOCATE: "false"}
    assert of_torch == pytest.approx(0.97 * 0.08 / 12)


def test_what_tests_start_gets_a_users_bound_too(process, monkeypatch):
    monkeypatch.setenv(OLD_FRACTION, "0.01")
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "per_process_memory_fraction:0.01")
    conftest.pytest_configure(config())
    conftest.pytest_collection_finish()
    assert process == [{OLD_FRACTION: "0.01", PREALLOCATE: "true"}]
    assert settings() == {OLD_FRACTION: "0.01", PREALLOCATE: "false"}


def test_the_process_that_hands_out_tests_takes_nothing(process):
    conftest.pytest_configure(config(dist="load"))
    assert (process, settings()) == ([], {})


def test_auto_asks_for_no_more_processes_than_fit(process, monkeypatch):
    def answer(workers):
        hook = conftest.pytest_xdist_auto_num_workers()
        next(hook)
        with pytest.raises(StopIteration) as stopped:
            hook.send(workers)
        return stopped.value.value

    assert [answer(workers) for workers in (8, 16)] == [8, 12]
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "16")
    assert answer(16) == 16


def test_alone_is_skipped_beside_other_processes_on_a_gpu(process, monkeypatch):
    item = types.SimpleNamespace(get_closest_marker={"alone": True}.get)
    monkeypatch.setattr(conftest, "has_gpu", lambda: False)
    conftest.pytest_runtest_setup(item)
    monkeypatch.setattr(conftest, "has_gpu", lambda: True)
    with pytest.raises(pytest.skip.Exception) as skipped:
        conftest.pytest_runtest_setup(item)
    assert str(skipped.value) == "needs the GPU for itself, got 12 processes: python -m pytest -m alone runs it"
    conftest.pytest_runtest_setup(types.SimpleNamespace(get_closest_marker={}.get))
    monkeypatch.setenv("PYTEST_XDIST_WORKER_COUNT", "1")
    conftest.pytest_runtest_setup(item)


# --- a run as a whole ---------------------------------------------------------------------------------------------


def own_environment(tmp_path: pathlib.Path, **changes: str) -> dict[str, str]:
    """That of a user's shell: without what this run's make, pytest-xdist and coverage have set."""
    theirs = ("MAKE", "MFLAGS", "PYTEST_", "COVERAGE_", "COV_CORE_", "CUDA", "VENV", "EXTRAS")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(theirs)}
    return kept | {"COVERAGE_FILE": str(tmp_path / "coverage")} | changes


@pytest.mark.parametrize(
    "cuda, first, second, status",
    [
        ("", 0, None, 0),
        ("", 1, None, 2),
        ("cuda13", 0, 0, 0),
        ("cuda13", 1, 0, 2),
        ("cuda13", 0, 1, 2),
        ("cuda13", 0, 5, 0),  # the flags name none that needs the GPU alone
        ("cuda13", 5, 0, 0),
        ("cuda13", 5, 5, 2),
    ],
)
@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target, flags", [("test", ""), ("coverage", "--cov --cov-append --cov-report=term ")])
def test_make_runs_both_sessions_on_a_gpu_and_fails_with_either(tmp_path, target, flags, cuda, first, second, status):
    """2 is make's own status."""
    log = tmp_path / "log"
    text = f'echo "$@" >> {log}; case "$*" in *"-m alone"*) exit {second};; *) exit {first};; esac'
    python = program(tmp_path, "python", text)
    command = ["make", target, "NO_INSTALL=1", f"PYTHON={python}", f"CUDA={cuda}", "PYTEST_FLAGS=-n auto -x"]
    command.append(f"COVERAGE_FILE={tmp_path / 'coverage'}")
    done = subprocess.run(command, cwd=ROOT, env=own_environment(tmp_path), capture_output=True, check=False)
    assert done.returncode == status, done.stderr
    run = f"-m pytest -n auto -x {flags}".strip()
    sessions = [run] if second is None else [f"{run} -m not alone", f"{run} -m alone -n 0"]
    assert log.read_text().splitlines() == sessions


NOISY = """
import warnings

def pytest_configure(config):
    warnings.warn("no test may run")
"""


@pytest.mark.parametrize("flags", ["", "-n 2", "--cov --cov-report="])
def test_a_plugin_that_happens_to_be_installed_is_not_loaded(tmp_path, flags):
    installed = tmp_path / "installed"
    metadata = installed / "noisy-1.0.dist-info"
    metadata.mkdir(parents=True)
    (installed / "noisy.py").write_text(NOISY)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: noisy\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[pytest11]\nnoisy = noisy\n")
    test = tmp_path / "test_one.py"
    test.write_text("import sys\n\ndef test_one():\n    assert 'noisy' not in sys.modules\n")
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", str(test)]
    done = subprocess.run(
        [*command, *flags.split()],
        cwd=ROOT,
        env=own_environment(tmp_path, PYTHONPATH=str(installed)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
