"""How compute-sanitizer's output is read; what it says of the kernels takes a GPU and `make sanitize`."""

import pytest

from benchmarks import projection
from tests import cached, fp8, lowering, sanitize
from tests.cases import Case
from tests.run import has_gpu
from tests.sanitize import read_reports

PRINTED = """\
========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 16 bytes
=========     at pallas_qk_triton_forward+0x3f0
=========     by thread (3,0,0) in block (7,0,0)
=========     Access at 0x7f1200000400 is out of bounds
=========         Host Frame: cuLaunchKernel [0x2f2a1f]
=========
every kernel ran
========= Warning: Race reported between Read access at loop_add_fusion+0x10
=========     and Write access at loop_add_fusion+0x20 [8 hazards]
=========
========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)
========= ERROR SUMMARY: 2 errors
"""


def test_reports_are_told_apart():
    write, race = read_reports(PRINTED)
    assert write.title == "Invalid __global__ write of size 16 bytes"
    assert "pallas_qk_triton_forward" in write.text and "pallas_qk_" not in race.text
    assert race.text.splitlines()[1].startswith("and Write access")


def test_a_clean_run_has_none():
    assert read_reports("========= COMPUTE-SANITIZER\nevery kernel ran\n========= ERROR SUMMARY: 0 errors\n") == []


@pytest.mark.skipif(has_gpu(), reason="plain XLA stands for the kernels")
def test_every_call_is_run(monkeypatch, capsys):
    monkeypatch.setattr(lowering, "GPU_IMPLEMENTATIONS", ("xla",))
    monkeypatch.setattr(sanitize, "CASES", (Case(1, 1, 1, head_dim=16, rotary_dim=8),))
    calls = (sanitize.CACHED_CASES[2], next(call for call in sanitize.CACHED_CASES if not call.layer_is_inside))
    monkeypatch.setattr(sanitize, "CACHED_CASES", calls)
    run = []
    op = cached.op
    monkeypatch.setattr(cached, "op", lambda call, name: run.append((call, name)) or op(call, name))
    in_one = []
    monkeypatch.setattr(projection, "in_one", lambda name, case: lambda *arrays: in_one.append((case, arrays[0].shape)))
    with_cache, op_with_cache = [], projection.in_one_with_cache
    run_with_cache = lambda name, form: with_cache.append((form, name)) or op_with_cache("xla", form)  # noqa: E731
    monkeypatch.setattr(projection, "in_one_with_cache", run_with_cache)
    sanitize.run_kernels("initcheck")
    assert in_one == with_cache == []
    sanitize.run_kernels("memcheck")
    assert run == [(call, "xla") for call in calls] * 2
    assert in_one == [(case, (case.num_tokens, width)) for case, width in sanitize.PROJECTIONS]
    assert with_cache == [(form, "mosaic_gpu") for form, _ in sanitize.PROJECTIONS_WITH_CACHE]
    assert capsys.readouterr().out == "every kernel ran\n" * 2


def test_calls_that_write_a_cache_have_slots_and_layers_outside():
    below, past = (
        [call for call in sanitize.CACHED_CASES if is_bad(call, cached.slots_of(call))]
        for is_bad in (lambda call, slots: (slots < 0).any(), lambda call, slots: (slots >= call.capacity).any())
    )
    assert len(below) > 5 and len(past) > 5
    assert {call.layer_is_inside for call in sanitize.CACHED_CASES} == {True, False}
    assert {call.case.gate for call in sanitize.CACHED_CASES} == {"copied", "in_place", None}
    codes = [call for call in sanitize.CACHED_CASES if call.scales]
    assert {call.kv_dtype for call in codes} == set(fp8.NAMES)
    assert {call.case.dtype for call in codes} == {"bfloat16", "float16", "float32"}
    assert len({call.scale_per_head for call in codes}) == 3
