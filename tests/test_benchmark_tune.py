"""`tune`: the launch configurations that are tried, what of them is timed, and the report."""

import collections
import dataclasses
import functools
import importlib.util
import itertools
import math

import jax
import jax.numpy as jnp
import pytest

if any(importlib.util.find_spec(name) is None for name in ("torch", "triton")):
    pytest.skip("needs torch and triton", allow_module_level=True)

from benchmarks import gpu_kernels, suites, tune
from benchmarks.__main__ import main, parser
from benchmarks.timing import Samples
from pallas_qk import _implementations
from pallas_qk._mosaic_gpu.config import MosaicBackward, MosaicForward
from pallas_qk._rows import Gradients, Outputs, spec_of
from pallas_qk._triton.config import TritonBackward, TritonForward
from tests import forms
from tests.cases import Case
from tests.lowering import HOPPER_SMS, kernels, lowered_text, on_gpu
from tests.mosaic_interpreter import execute

KINDS = {
    ("mosaic_gpu", "forward"): MosaicForward,
    ("mosaic_gpu", "backward"): MosaicBackward,
    ("triton", "forward"): TritonForward,
    ("triton", "backward"): TritonBackward,
}


def rule_of(case: Case, implementation: str, direction: str):
    """The rule's configuration for an H200, and the sizes that it is chosen by."""
    inputs, options = forms.types(case)[0], forms.options(case)
    with on_gpu():
        rule = tune.module(implementation, direction).configuration(inputs, options)
    return rule, spec_of(inputs, options)


@pytest.mark.parametrize("implementation, direction", KINDS)
@pytest.mark.parametrize("form", ["gate", "packed_gate_in_place", "no_gate"])
def test_the_space_holds_the_rules_choice(implementation, direction, form):
    for num_tokens, dimensions in itertools.product((1, 64, 1024, 16384), ((256, 64), (128, 128), (64, 32), (512, 64))):
        dtype = "float32" if dimensions == (128, 128) else "bfloat16"
        case = Case(num_tokens, 16, 2, *dimensions, dtype, **suites.TUNED_FORMS[form])
        rule, spec = rule_of(case, implementation, direction)
        assert type(rule) is KINDS[implementation, direction]
        tried = tune.space(rule, spec, HOPPER_SMS)
        assert tried.rule == rule and rule not in tried.others and len(set(tried.others)) == len(tried.others)
        assert tried.others or num_tokens < 1024  # few rows leave each program one
        # Warps and warpgroups are as many as the rows take.
        for name in set(tune.SPACE[type(rule)]) - {tune.PER_SM, "num_warpgroups"}:
            assert getattr(rule, name) in tune.SPACE[type(rule)][name], (case, rule)


def test_the_number_of_configurations():
    """One layout that can't be built leaves a third less; the rule's is none of the others. One head lies alone."""
    all_forward, all_triton = (math.prod(map(len, tune.SPACE[x].values())) for x in (MosaicForward, TritonForward))
    all_forward = all_forward * 7 // 8
    rule, spec = rule_of(Case(16384), "mosaic_gpu", "forward")
    tried = tune.space(rule, spec, HOPPER_SMS)
    assert len(tried.others) == all_forward - 1 and not tried.left_out
    rule, spec = rule_of(Case(16384, head_dim=96, rotary_dim=48), "mosaic_gpu", "forward")
    tried = tune.space(rule, spec, HOPPER_SMS)
    assert len(tried.others) == all_forward * 2 // 3 - 1
    assert tried.left_out == {"halves need a head_dim and a rotary_dim that are powers of two": all_forward // 3}
    rule, spec = rule_of(Case(16384, rotation="pairs"), "triton", "forward")
    tried = tune.space(rule, spec, HOPPER_SMS)
    assert {config.layout for config in tried.others} == set() and tried.left_out == {
        "rotation='pairs' has one layout": all_triton
    }


@pytest.mark.parametrize("implementation", tune.IMPLEMENTATIONS)
def test_shares_of_the_backward_are_the_rules_at_its_own_number_and_never_more_than_rows(implementation):
    rule, spec = rule_of(Case(16384), implementation, "backward")
    names = ("q_warps", "k_warps") if implementation == "mosaic_gpu" else ("q_programs", "k_programs")
    other = dataclasses.replace(rule, **dict.fromkeys(names, 1))
    counts = [getattr(tune.shared(other, 24 * HOPPER_SMS, spec), name) for name in names]
    assert counts == pytest.approx([getattr(rule, name) for name in names], rel=0.02)
    for num_tokens, heads in itertools.product((1, 3, 64), ((16, 2), (1, 1), (2, 5))):
        rule, spec = rule_of(Case(num_tokens, *heads), implementation, "backward")
        for config in tune.space(rule, spec, HOPPER_SMS).others:
            assert all(1 <= getattr(config, x) <= num_tokens * h for x, h in zip(names, heads, strict=True)), config


@pytest.mark.parametrize("implementation, direction", KINDS)
def test_each_value_of_each_field_is_lowered(implementation, direction):
    """For a Hopper, with the other fields as the rule has them."""
    case = Case(64, 4, 2, 128, 64)
    rule, spec = rule_of(case, implementation, direction)
    arrays = forms.types(case)[: 1 if direction == "forward" else 2]
    function = getattr(_implementations.module(implementation), direction)
    for config in tune.space(rule, spec, HOPPER_SMS).others:
        changed = [
            field.name for field in dataclasses.fields(rule) if getattr(config, field.name) != getattr(rule, field.name)
        ]
        if len(changed) > 1 and not changed[0].startswith("q_"):
            continue
        call = functools.partial(function, options=forms.options(case), config=config)
        assert kernels(lowered_text(call, *arrays))[0] == f"pallas_qk_{implementation}_{direction}", config


@pytest.mark.parametrize(
    "direction, configs",
    [
        ("forward", [MosaicForward("row", 2, "after_sum", True), MosaicForward("chunks", 4, "first")]),
        ("backward", [MosaicBackward(2, 1, 3, 1), MosaicBackward(4, 2, 1, 1)]),
    ],
)
def test_configurations_are_compared_with_the_rules_in_bits(direction, configs, capsys):
    """The calls that are timed on a GPU, run by the interpreter of Mosaic GPU's code."""
    case = Case(5, 2, 1, 64, 32, packed=True, gate="in_place")
    of = tune.kernel(case, "mosaic_gpu", direction)
    spoiled = configs[0]

    def interpreted(config, spoil=False):
        call = of.call(config)

        def run():
            found = execute(call.func.__wrapped__, *call.args)
            return found._replace(q=-found.q) if spoil and config == spoiled else found

        return run

    calls, refused, num_differing = tune.buildable(of._replace(call=interpreted), configs, "x")
    assert list(calls) == [of.rule, *configs] and (refused, num_differing) == ({}, 0)
    interpreted_wrongly = of._replace(call=functools.partial(interpreted, spoil=True))
    calls, refused, num_differing = tune.buildable(interpreted_wrongly, configs[:1], "x")
    assert list(calls) == [of.rule] and (refused, num_differing) == ({}, 1)
    assert f"x: {spoiled} gives other results than {of.rule}: left out." in capsys.readouterr().out


# --- what is timed ------------------------------------------------------------------------------------------------

RULE = MosaicForward("halves", 1)
CASE = Case(4, 1, 1, 64, 32)
SPEC = spec_of(forms.types(CASE)[0], forms.options(CASE))


def play(monkeypatch, first: dict[str, float], last: dict[str, float], wrong=(), broken=()) -> list[list[str]]:
    """A kernel and a profiler that are played: times by `layout`, and which calls were timed together."""
    timed = []

    def call(config):
        def run():
            if config.layout in broken:
                raise ValueError("ptxas has something against it\nmore")
            return Outputs(jnp.full((4, 1, 64), 1.0 + (config.layout in wrong)), None, None, None)

        return run

    def measure(case, calls, rounds):
        timed.append(list(calls))
        times = (first, last)[len(timed) % 2 == 0]
        return {name: Samples((next((x for y, x in times.items() if repr(y) in name), 1.0),), ("k",)) for name in calls}

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune, "FINALISTS", 2)
    monkeypatch.setattr(tune, "SPACE", {MosaicForward: {"layout": ("chunks", "halves", "row", "other")}})
    monkeypatch.setattr(tune, "kernel", lambda *_: tune.Kernel(RULE, SPEC, call))
    monkeypatch.setattr(gpu_kernels, "copy_calls", lambda total_bytes: {"copy_512x4": None})
    return timed


def test_the_fastest_are_timed_again_with_the_rule(monkeypatch):
    first, last = {"chunks": 2.0, "row": 3.0, "other": 4.0, "halves": 5.0}, {"chunks": 4.0, "row": 3.0, "halves": 3.5}
    timed = play(monkeypatch, first, last)
    result, differing = tune.tuned(CASE, "mosaic_gpu", "forward")
    names = {x: str(MosaicForward(x, 1)) for x in ("chunks", "halves", "row", "other")}
    assert timed == [
        [names[x] for x in ("halves", "chunks", "row", "other")],
        [*(names[x] for x in ("halves", "chunks", "row")), "copy_512x4"],
    ]
    assert (result.best.layout, result.at_best.p50_us, result.by_rule.p50_us, result.copy.p50_us) == (
        "row",
        3.0,
        3.5,
        1.0,
    )
    assert (result.tried, result.left_out, differing) == (4, {}, 0)


def test_what_cannot_be_built_and_what_gives_other_bits_is_not_timed(monkeypatch, capsys):
    timed = play(monkeypatch, {}, {}, wrong=["row"], broken=["other"])
    monkeypatch.setattr(_implementations, "unsupported", lambda *_: None)
    assert tune.tune([CASE], ["mosaic_gpu"], ["forward"], "NVIDIA H200", {"jax": "1"}) == 1
    assert [("'row'" in str(names), "'other'" in str(names)) for names in timed] == [(False, False)] * 2
    printed = capsys.readouterr().out
    assert "mosaic_gpu forward T4-H1.1-D64-R32-bfloat16: MosaicForward(layout='row'" in printed
    assert "gives other results than MosaicForward(layout='halves'" in printed
    assert (
        "2 configurations timed" in printed and "; 1 not built: ValueError: ptxas has something against it." in printed
    )


def test_weights_gradients_may_be_sums_in_another_order():
    dw = jax.random.normal(jax.random.key(0), (64,))
    want = Gradients(**dict.fromkeys(Gradients._fields) | {"q": jnp.ones((4, 1, 64)), "q_weight": dw})
    assert tune.same(want._replace(q_weight=dw * (1 + 1e-6)), want)
    assert not tune.same(want._replace(q_weight=dw * (1 + 1e-4)), want)
    assert not tune.same(want._replace(q_weight=dw * jnp.nan), want)
    assert not tune.same(want._replace(q=jnp.nextafter(want.q, jnp.float32(2))), want)


def test_the_report_is_a_table_with_gpu_and_versions_in_front():
    rule, best = TritonBackward("halves", 1, 2800, 350), TritonBackward("halves", 1, 2000, 250)
    samples = [Samples((us * 0.99, us, us * 1.01), ("k",)) for us in (168.0, 181.6, 176.0)]
    other = tune.Result(
        CASE, "mosaic_gpu", "forward", RULE, RULE, *[Samples((2.0,), ("k",))] * 3, 72, collections.Counter()
    )
    left_out = collections.Counter({"halves need powers of two": 20, "XlaRuntimeError: no": 1})
    found = tune.Result(Case(16384, packed=True), "triton", "backward", rule, best, *samples, 6, left_out)
    text = tune.report([found, other], "NVIDIA H200", {"jax": "0.11.2", "driver": "580.159"})
    assert text.splitlines() == [
        "NVIDIA H200, jax 0.11.2, driver 580.159",
        "",
        "Device times in microseconds. The loss is what the rule's configuration takes longer than the best one.",
        "",
        "| call | heads | D, R | T | implementation | copy | rule | best | loss | noise | configuration of the best |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
        "| backward_packed, bfloat16 | 16/2 | 256, 64 | 16384 | triton | 168.00 | 181.60 | 176.00 | 3.2 % | 1.0 % | "
        "`TritonBackward(layout='halves', rows_per_step=1, q_programs=2000, k_programs=250)` |",
        "| forward, bfloat16 | 1/1 | 64, 32 | 4 | mosaic_gpu | 2.00 | 2.00 | 2.00 | 0.0 % | 1.6 % | the rule's |",
        "",
        "- triton, backward, T = 16384: 6 configurations timed, as the rule has them: layout, rows_per_step; "
        "20 not built: halves need powers of two; 1 not built: XlaRuntimeError: no. "
        "Rule: `TritonBackward(layout='halves', rows_per_step=1, q_programs=2800, k_programs=350)`",
        "- mosaic_gpu, forward, T = 4: 72 configurations timed, as the rule has them: cast_first, heads_ahead. "
        f"Rule: `{RULE}`",
    ]


# --- the command --------------------------------------------------------------------------------------------------


def test_arguments_of_tune():
    options = parser(["oracle", "mosaic_gpu"]).parse_args(["tune"])
    assert (options.form, options.direction) == ("gate", ["forward", "backward"])
    assert suites.tuned("gate") == [Case(64), Case(1024), Case(16384)]
    (case,) = suites.tuned("packed_no_gate", [7], [(32, 8)], 128, 128, "float16")
    assert case == Case(7, 32, 8, 128, 128, "float16", gate=None, packed=True)


def test_tune_needs_a_gpu_and_passes_on_what_it_is_asked(monkeypatch, capsys):
    from benchmarks import __main__

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert main(["tune"]) == 1
    assert capsys.readouterr().err == "tune needs an NVIDIA GPU, got JAX's default backend 'cpu'.\n"
    seen = []
    monkeypatch.setattr(__main__, "missing", lambda command: None)
    monkeypatch.setattr(tune, "tune", lambda *arguments: seen.append(arguments) or 0)
    arguments = "tune --tokens 8 --heads 4/1 --head-dim 64 --rotary-dim 32 --form gate_in_place --direction backward"
    assert main(arguments.split()) == 0
    ((cases, names, directions, _, versions),) = seen
    assert cases == [Case(8, 4, 1, 64, 32, gate="in_place")]
    assert (names, directions, "jax" in versions) == (["mosaic_gpu", "triton"], ["backward"], True)


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("implementation, direction", KINDS)
def test_a_sweep_on_a_gpu(gpu, monkeypatch, implementation, direction):
    """Two values of each field: every configuration that is built gives the rule's bits."""
    monkeypatch.setattr(tune, "SPACE", {kind: {x: y[:2] for x, y in of.items()} for kind, of in tune.SPACE.items()})
    case = Case(256)
    if reason := _implementations.unsupported(implementation, tune.kernel_spec(case), tune.cuda_target()):
        pytest.skip(reason)
    result, differing = tune.tuned(case, implementation, direction)
    assert differing == 0 and result.tried > 1 and result.at_best.p50_us <= result.by_rule.p50_us
    assert 0.5 < result.copy.p50_us < 500
