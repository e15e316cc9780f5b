"""The tool that tells what a refactor changed of the kernels."""

import dataclasses
import subprocess
import sys

import pytest

from tests import emitted

CALLS = {call.name: call for call in emitted.calls()}
PLAIN = emitted.Call("NVIDIA H200", "triton", "forward", emitted.FORMS[0], emitted.SHAPES[0])


def test_calls_have_names_of_their_own_and_reach_every_form():
    assert len(CALLS) == len(list(emitted.calls()))
    for gpu, (_, implementations) in emitted.GPUS.items():
        found = {(c.implementation, c.direction, c.form) for c in CALLS.values() if c.where == gpu}
        assert len(found) == len(implementations) * 2 * len(emitted.FORMS)
    assert {c.form for c in CALLS.values() if c.where == "tpu"} == set(emitted.FORMS)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_code_is_that_of_the_call_and_of_no_place_in_a_file(implementation, direction):
    call = dataclasses.replace(PLAIN, implementation=implementation, direction=direction)
    first, again = emitted.emitted(call), emitted.emitted(call)
    other = emitted.emitted(dataclasses.replace(call, shape=dataclasses.replace(call.shape, norm_beta=1.0)))
    assert first == again and first[0] != other[0]
    assert all("loc(" not in text and ".py" not in text for text in first)


def test_the_program_of_plain_xla_counts_without_its_names():
    call = dataclasses.replace(PLAIN, where="tpu", implementation=None)
    (text,) = emitted.emitted(call)
    assert "fused_qk" not in text and "stablehlo.rsqrt" in text


def test_what_differs_is_named():
    before, after = {"a": "1", "b": "2", "c": "3"}, {"a": "1", "b": "4", "d": "5"}
    assert emitted.compare(before, after) == ["changed: b", "gone: c", "new: d"]
    assert emitted.compare(before, before) == []


def test_an_unknown_revision_is_named():
    command = [sys.executable, "-m", "tests.emitted", "no-such-commit", "--only", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "revision must be a commit here, got no-such-commit" in done.stderr
