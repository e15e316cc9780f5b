"""The suite `projection`: what is timed, and that nothing wrong gets a row."""

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("torch", reason="benchmarks time torch beside JAX")

from benchmarks import projection
from benchmarks.operations import OPERATIONS
from benchmarks.suites import SUITES
from tests.cases import Case, make_inputs

SMALL = Case(6, 2, 1, max_position=32)
NAMES = ["xla_product", "xla_then_op", "xla_then_op_in_place"]


def check(providers=("xla", "mosaic_gpu", "xla_plain", "oracle")):
    with jax.default_device(jax.devices("cpu")[0]):
        return OPERATIONS["projection"].check(SMALL, make_inputs(SMALL), dict.fromkeys(providers))


def test_what_is_timed_on_a_cpu(capsys):
    calls, kept = check()
    assert kept and list(calls) == NAMES
    q, k, v = 6 * 2 * 256, 6 * 256, 6 * 256
    elements = {name: call.checked["elements"] for name, call in calls.items()}
    assert elements == dict(zip(NAMES, (2 * q + k + v, 2 * q + k + v, q + k + v), strict=True))
    printed = capsys.readouterr().out
    for name in ("mosaic_gpu_then_op", "mosaic_gpu"):
        assert f"{name} skipped: implementation='mosaic_gpu' must run on an NVIDIA GPU" in printed


@pytest.mark.parametrize("op", ["projection_cache", "projection_cache_fp8"])
def test_what_is_timed_with_a_cache(op, capsys):
    with jax.default_device(jax.devices("cpu")[0]):
        calls, kept = OPERATIONS[op].check(SMALL, make_inputs(SMALL), dict.fromkeys(("xla", "mosaic_gpu", "oracle")))
    assert kept and list(calls) == NAMES
    q, caches = 6 * 2 * 256, 2 * 16 * 256  # one page of 16 places
    elements = [call.checked["elements"] for call in calls.values()]
    assert elements == [2 * q + 2 * 6 * 256, 2 * q + caches, q + caches]
    assert "mosaic_gpu skipped: implementation='mosaic_gpu' must run on an NVIDIA GPU" in capsys.readouterr().out


def test_a_wrong_cache_gets_no_row(monkeypatch, capsys):
    right = projection.then_cached_op

    def wrong(name, form):
        def run(caches, *arrays):
            q, gate, (k, v) = right(name, form)(caches, *arrays)
            return q, gate, (k, v.at[0, 5].add(jnp.asarray(1, v.dtype)))

        return run if form.case.gate == "in_place" else right(name, form)

    monkeypatch.setattr(projection, "then_cached_op", wrong)
    with jax.default_device(jax.devices("cpu")[0]):
        calls, kept = OPERATIONS["projection_cache"].check(SMALL, make_inputs(SMALL), {"xla": None})
    assert not kept and list(calls) == ["xla_product", "xla_then_op"]
    assert "xla_then_op_in_place " in (printed := capsys.readouterr().out) and "BROKEN" in printed


def test_a_wrong_result_gets_no_row(monkeypatch, capsys):
    right = projection.then_op

    def wrong(name, case):
        def run(*arrays):
            q, k, v, *gate = right(name, case)(*arrays)
            return q, k, v.at[3].add(jnp.asarray(1, v.dtype)), *gate

        return run

    monkeypatch.setattr(projection, "then_op", wrong)
    calls, kept = check(["xla"])
    assert not kept and list(calls) == ["xla_product"]
    assert "xla_then_op " in (printed := capsys.readouterr().out) and "BROKEN" in printed


def test_the_suite_has_the_widths_that_models_have():
    for name in ("projection", "projection_cache"):
        suite = SUITES[name]
        assert set(suite.ops) <= set(OPERATIONS)
        assert [projection.width_of(Case(1, *heads)) for heads in suite.heads] == [2048, 4096]
    elements, in_cache = 10 * 2048 + 10 * 9216 + 2048 * 9216, 10 * 2 * 2 * 256
    for op, num_bytes in {"projection": 2, "projection_cache": 2, "projection_cache_fp8": 1}.items():
        expected = 2 * (elements - in_cache) + num_bytes * in_cache
        assert OPERATIONS[op].minimum_bytes(Case(10, 16, 2)) == expected
