"""The tool that tells what a refactor changed of the kernels."""

import contextlib
import dataclasses
import subprocess
import sys

import jax
import pytest

import pallas_qk
from tests import emitted

CALLS = {call.name: call for call in emitted.calls()}
CACHED = [form for form in emitted.FORMS if form.cache]
CODES = [form for form in CACHED if emitted.has_scales(form)]
PLAIN = emitted.Call("NVIDIA H200", "triton", "forward", emitted.FORMS[0], emitted.SHAPES[0])


def test_calls_have_names_of_their_own_and_reach_every_form():
    assert len(CALLS) == len(list(emitted.calls()))
    for gpu, (_, implementations) in emitted.GPUS.items():
        found = {(c.implementation, c.direction, c.form) for c in CALLS.values() if c.where == gpu}
        absent = len(CACHED) + (len(CODES) if gpu in emitted.WITHOUT_FP8 else 0)
        assert len(found) == len(implementations) * (2 * len(emitted.FORMS) - absent)
    assert {c.form for c in CALLS.values() if c.where == "tpu"} == set(emitted.FORMS)


def test_a_form_whose_function_is_not_there_is_absent(monkeypatch):
    monkeypatch.delattr(pallas_qk, "fused_qkv_rmsnorm_rope_gate_cache")
    lacked = {form for form in CACHED if form.gate}
    assert {call.form for call in emitted.calls()} == set(emitted.FORMS) - lacked and 0 < len(lacked) < len(CACHED)


def test_forms_of_8_bits_are_absent_where_the_function_has_no_scales(monkeypatch):
    for name in ("fused_qkv_rmsnorm_rope_gate_cache", "fused_qkv_rmsnorm_rope_cache"):
        monkeypatch.setattr(pallas_qk, name, lambda qkv, *others, layer=None: None)
    assert {call.form for call in emitted.calls()} == set(emitted.FORMS) - set(CODES) and CODES


def test_shapes_are_absent_where_the_function_has_no_such_option(monkeypatch):
    everywhere = {call.shape for call in CALLS.values()}
    assert everywhere == set(emitted.SHAPES) and all(shape.options for shape in emitted.WITH_OPTIONS)
    form = emitted.MAIN_FORMS[0]
    monkeypatch.setattr(pallas_qk, form.function, lambda *arrays, rotation="halves": None)
    taken = {call.shape for call in emitted.calls() if call.form == form}
    assert everywhere - taken == {shape for shape in everywhere if not shape.round_norm}


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton", None])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_the_code_depends_on_the_options(implementation, direction):
    """But the backward's not on how y was rounded."""
    where = PLAIN.where if implementation else "tpu"
    call = dataclasses.replace(PLAIN, where=where, implementation=implementation, direction=direction)
    changes = ({}, {"rotation": "pairs"}, {"round_norm": False})
    plain, pairs, unrounded = (
        emitted.emitted(dataclasses.replace(call, shape=dataclasses.replace(call.shape, **change)))
        for change in changes
    )
    assert plain[0] != pairs[0] and (plain[0] == unrounded[0]) == (direction == "backward")


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton", None])
def test_norms_of_float32_are_rounded_whatever_is_said(implementation):
    where = PLAIN.where if implementation else "tpu"
    shapes = (emitted.Shape(64, dtype="float32", round_norm=round_norm) for round_norm in (True, False))
    calls = (dataclasses.replace(PLAIN, where=where, implementation=implementation, shape=shape) for shape in shapes)
    assert len({tuple(emitted.emitted(call)) for call in calls}) == 1


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
def test_the_code_of_8_bits_corrects_quotients_and_saturates(implementation):
    """Each kind of scale and of code has kernels of its own."""
    texts = [emitted.emitted(dataclasses.replace(PLAIN, implementation=implementation, form=form)) for form in CODES]
    assert len({text for (text,) in texts}) == len(CODES)
    for form, (text,) in zip(CODES, texts, strict=True):
        assert "rcp.approx.ftz.f64" in text and "min.NaN.xorsign.abs.f32" in text and "div." not in text
        assert f"cvt.rn.satfinite.{'e5m2' if 'e5m2' in form.cache.dtype else 'e4m3'}x2.f32" in text


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize("form", CACHED, ids=str)
def test_the_code_of_a_call_that_writes_a_cache_depends_on_its_layout(implementation, form):
    call = dataclasses.replace(PLAIN, implementation=implementation, form=form)
    other = dataclasses.replace(form, cache=dataclasses.replace(form.cache, axes="b c h s d"))
    (code,), (other_code,) = map(emitted.emitted, (call, dataclasses.replace(call, form=other)))
    assert code != other_code


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
    before = {"a #0": "1", "b #0": "2", "c #0": "3"}
    after = {"a #0": "1", "b #0": "4", "b #1": "5", "a form of today #0": "6"}
    assert emitted.compare(before, after) == ["changed: b #0", "gone: c #0", "new: b #1"]
    assert emitted.compare(before, before) == []


def test_what_a_revision_lacks_is_counted(monkeypatch, capsys):
    before, after = {"a #0": "1"}, {"a #0": "1", "b #0": "2", "b #1": "3"}
    monkeypatch.setattr(emitted, "hashes_of", lambda *_: contextlib.nullcontext(lambda: before))
    monkeypatch.setattr(emitted, "hashes", lambda only: after)
    assert emitted.main(["old"]) == 0
    assert f"0 of 1 kernels differ from old (JAX {jax.__version__}), which lacks 2 more; 0 s" in capsys.readouterr().out


def test_an_unknown_revision_is_named():
    command = [sys.executable, "-m", "tests.emitted", "no-such-commit", "--only", "nothing"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "revision must be a commit here, got no-such-commit" in done.stderr
