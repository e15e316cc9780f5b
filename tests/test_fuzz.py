"""The fuzzer: that it runs, that what it prints can be run again, and that it sees what is wrong."""

import dataclasses
import itertools
import queue
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_qk import _cache_axes
from tests import cached, fp8, fuzz, strategies
from tests.cached import CachedCase
from tests.cases import Case
from tests.run import has_gpu

CASE = Case(
    3, 2, 1, head_dim=16, rotary_dim=8, max_position=32, positions_dtype="int64", mrope_section=(2, 1, 1), packed=True
)


# Tokens without a slot among those with one, and a layer that isn't the first.
CACHED = CachedCase(
    Case(7, 2, 1, head_dim=16, rotary_dim=8, max_position=32, dtype="float16"),
    "l b s (h c) d",
    num_blocks=3,
    return_kv=True,
    slots_dtype="int64",
    layer=2,
)
CODES = dataclasses.replace(CACHED, kv_dtype="float8_e4m3fn", scale=1e-3, scale_per_head=(True, False))


def test_a_reproducer_is_the_case():
    for case in (CASE, Case(1), CACHED, CODES, CachedCase(CASE), *fuzz.draw(strategies.WIDE, 0, 20)):
        command = fuzz.reproducer(case, 7)
        program, text, rest = command.split("'")
        assert program == "python -m tests.fuzz " and rest == " --seed 7" and "\n" not in command
        assert fuzz.parse_case(text) == case


def test_a_seed_draws_the_same_cases_and_another_seed_others():
    first, again, others = (fuzz.draw(strategies.WIDE, seed, 20) for seed in (1, 1, 2))
    assert first == again != others
    assert len(set(first)) > 10


def test_every_drawn_case_is_bounded_and_allowed():
    for call in fuzz.draw(strategies.WIDE, 5, 200):
        case = call.case if isinstance(call, CachedCase) else call
        elements = case.num_tokens * (2 * case.num_q_heads + case.num_kv_heads) * case.head_dim
        assert elements <= strategies.WIDE.most_elements
        assert case.mrope_section is None or (sum(case.mrope_section) == case.rotary_dim // 2 and not case.gathered)


def test_drawn_calls_have_every_rotation_rounding_and_table():
    calls = fuzz.draw(strategies.WIDE, 5, 600)
    cases = [call.case if isinstance(call, CachedCase) else call for call in calls]
    kinds = itertools.product(("halves", "pairs"), (True, False), (False, True))
    assert {(case.rotation, case.round_norm, case.dtype == "float32") for case in cases} == set(kinds)
    for some in (
        [case.rotation == "pairs" for case in cases],
        [not case.round_norm for case in cases],
        [case.norm_order == "rotation_first" for case in cases],
        [not case.rotary_dim for case in cases],
        [not case.weights for case in cases],
        [case.v_norm for case in cases],
    ):
        assert 100 < sum(some) < 400
    assert sum(case.q_alone for case in cases) > 20 and sum(case.separate_v for case in cases) > 20
    assert {case.negated_sines for case in cases} == {False, True}
    assert {case.attention_factor == 1 for case in cases} == {False, True}


def test_tables_are_scaled_and_their_sines_negated():
    case = dataclasses.replace(CASE, cache_dtype="float32", positions_dtype="int32")
    changed = dataclasses.replace(case, attention_factor=0.75, negated_sines=True)
    tables = (np.asarray(strategies.make_inputs(x, 1).cos_sin_cache) for x in (case, changed))
    (cos, sin), changed = (np.split(table, 2, axis=1) for table in tables)
    np.testing.assert_allclose(changed, [0.75 * cos, -0.75 * sin], rtol=1e-6)
    np.testing.assert_allclose(cos**2 + sin**2, 1, rtol=1e-6)


@pytest.mark.parametrize("rotation", ["halves", "pairs"])
def test_lanes_past_the_table_follow_the_rotation(rotation):
    case = dataclasses.replace(CASE, num_tokens=1, positions_dtype="int32", packed=False, rotation=rotation)
    inputs = strategies.make_inputs(case)
    height = jnp.asarray([[0], [case.max_position], [0]], jnp.int32)  # of frequency 1 alone
    (past,) = strategies.lanes_past(case, dataclasses.replace(inputs, positions=height))
    assert np.flatnonzero(past).tolist() == ([2, 3] if rotation == "pairs" else [1, 5])


def test_drawn_calls_that_write_a_cache_are_bounded_and_reach_every_kind():
    calls = [call for call in fuzz.draw(strategies.WIDE, 5, 600) if isinstance(call, CachedCase)]
    assert 150 < len(calls) < 450
    for call in calls:
        assert _cache_axes.groups(call.cache_axes)
        # A block of the largest size, or no more than the outputs may hold.
        row = 2 * call.num_layers * call.case.num_kv_heads * call.case.head_dim
        assert call.num_blocks == 1 or call.capacity * row <= strategies.WIDE.most_elements
    assert {group for call in calls for group in _cache_axes.groups(call.cache_axes)} >= {"l", "c", "hc", "ch", "cd"}
    assert {call.layer_is_inside for call in calls} == {call.return_kv for call in calls} == {True, False}
    assert {call.slots_dtype for call in calls} == set(strategies.POSITION_DTYPES)
    assert {call.kv_dtype for call in calls} == {None, *strategies.DTYPES, *fp8.NAMES}
    codes = [call for call in calls if call.kv_dtype in fp8.NAMES]
    assert {call.scale for call in codes} == set(strategies.KV_SCALES)
    assert {call.scale_per_head for call in codes} == set(itertools.product((False, True), repeat=2))
    assert {(call.case.gate, call.case.packed) for call in calls} == {
        (gate, packed) for gate in ("copied", "in_place", None) for packed in (False, True)
    }


@pytest.mark.parametrize("dtype", strategies.POSITION_DTYPES)
def test_slots_are_bad_in_every_way_and_none_is_named_twice(dtype):
    call, capacity = dataclasses.replace(CACHED, slots_dtype=dtype), CACHED.capacity
    bad = set()
    for seed in range(200):
        slots = strategies.make_data(call, seed).slots
        assert slots.dtype == dtype
        places = [slot for slot in slots.tolist() if 0 <= slot < capacity]
        assert len(set(places)) == len(places)
        bad |= set(slots.tolist()) - set(places)
    assert bad == set(strategies.no_slots(dtype, capacity))
    info = jnp.iinfo(dtype)
    assert {capacity, int(info.max)} <= bad and ((-1 in bad) and int(info.min) in bad) == (info.min < 0)
    # Without a bad slot that it holds, a narrow type names every place.
    full = dataclasses.replace(
        call, slots_dtype="uint8", num_blocks=64, case=dataclasses.replace(call.case, num_tokens=256)
    )
    assert sorted(strategies.make_data(full, 0).slots.tolist()) == list(range(256))


def test_one_case_by_its_reproducer():
    """What a failure prints, in a process of its own."""
    _, text, rest = fuzz.reproducer(dataclasses.replace(CASE, dtype="float16"), 3).split("'")
    command = [sys.executable, "-m", "tests.fuzz", text, *rest.split(), "--implementations", "xla", "mosaic_gpu"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith(" elements agree\n")


def test_workers_run_and_are_counted():
    """The command line for some seconds: something is compared, nothing fails."""
    seconds = "60" if has_gpu() else "10"  # a GPU takes its time to start, and the oracle to compile
    command = [sys.executable, "-m", "tests.fuzz", "--seconds", seconds, "--workers", "1", "--implementations", "xla"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert " elements compared, 0 failures" in done.stdout


def spoiled(run, index, value):
    """`run` with one element of an output (or gradient) changed."""

    def spoil(*args, **kwargs):
        results = list(run(*args, **kwargs))
        x = jnp.asarray(results[index])
        results[index] = x.at[(-1,) * x.ndim].set(value(x[(-1,) * x.ndim]))
        return results

    return spoil


@pytest.fixture
def by_its_definition(monkeypatch):
    """As without a GPU: no special values, and no oracle whose messages count instead."""
    monkeypatch.setattr(fuzz, "has_gpu", lambda: False)


@pytest.mark.parametrize("output, message", [(0, "q_out"), (1, "k_out"), (2, "v_out"), (3, "gate_out")])
def test_a_wrong_output_is_seen(monkeypatch, by_its_definition, output, message):
    case = dataclasses.replace(CASE, positions_dtype="int32", gathered=True, mrope_section=None)
    monkeypatch.setattr(fuzz, "run", spoiled(fuzz.run, output, lambda x: x + 1))
    with pytest.raises(fuzz.MismatchError, match=f"^xla: {message}"):
        fuzz.check_forward(case, 0, ("xla",))


@pytest.mark.parametrize("call", [CACHED, CODES], ids=lambda call: call.id)
@pytest.mark.parametrize("implementation", fuzz.IMPLEMENTATIONS)
def test_a_call_that_writes_a_cache_is_compared(by_its_definition, implementation, call):
    for seed in (0, 1):
        assert fuzz.check(call, seed, (implementation,)) > 2 * call.num_layers * call.capacity * 16


def of_another_slot(slots, x, value):
    """The cache with an element changed where no token of `slots` writes."""
    free = next(slot for slot in range(CACHED.capacity) if slot not in slots)
    return x.at[CACHED.layer, free // CACHED.block_size, free % CACHED.block_size, 1, 3].set(value)


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda got, slots: got._replace(q=got.q.at[0, 0, 15].add(1)), "q_out"),
        (lambda got, slots: got._replace(v=got.v.at[0, 0, 0].add(1)), "v_out"),
        (lambda got, slots: got._replace(k_cache=jnp.zeros_like(got.k_cache)), "k in the cache"),
        (lambda got, slots: got._replace(k_cache=got.k_cache.at[..., 1::2, :].set(2)), "v in the cache"),
        (
            lambda got, slots: got._replace(k_cache=of_another_slot(slots, got.k_cache, 2)),
            "what no slot names in v's cache",
        ),
    ],
)
def test_a_wrong_cache_is_seen(monkeypatch, by_its_definition, spoil, message):
    seed = next(n for n in range(20) if strategies.make_data(CACHED, n).slots.max() >= CACHED.capacity)
    right = fuzz.run_cached
    monkeypatch.setattr(
        fuzz, "run_cached", lambda name, call, data: spoil(right(name, call, data), data.slots.tolist())
    )
    with pytest.raises(fuzz.MismatchError, match=f"^xla: {message}"):
        fuzz.check(CACHED, seed, ("xla",))


@pytest.mark.parametrize("gradient, message", [(0, "dv: "), (1, "dq_weight: "), (2, "dk_weight: ")])
def test_a_wrong_gradient_is_seen(monkeypatch, gradient, message):
    case = dataclasses.replace(CASE, positions_dtype="int32", gathered=True, mrope_section=None)
    right = fuzz.run_backward

    def run_backward(name, *args, **kwargs):
        return (spoiled(right, gradient, lambda x: x + 1) if name == "wrong" else right)("xla", *args, **kwargs)

    monkeypatch.setattr(fuzz, "run_backward", run_backward)
    monkeypatch.setattr(fuzz, "runs", lambda *_: True)
    with pytest.raises(fuzz.MismatchError, match=f"^wrong: {message}"):
        fuzz.check_backward(case, 0, ("wrong",))


def test_a_bad_position_without_nan_is_seen(monkeypatch, by_its_definition):
    case = dataclasses.replace(CASE, num_tokens=7, positions_dtype="int32", packed=False)
    seed = next(n for n in range(20) if strategies.lanes_past(case, strategies.make_inputs(case, n)).any())
    monkeypatch.setattr(fuzz, "run", lambda *args: [jnp.nan_to_num(x) for x in fuzz_run(*args)])
    with pytest.raises(fuzz.MismatchError, match="past the table are not NaN"):
        fuzz.check_forward(case, seed, ("xla",))


fuzz_run = fuzz.run


def test_failures_and_dead_workers_are_counted(monkeypatch):
    """Whatever a worker says, or doesn't: what it prints here comes from a script in its place."""
    script = """
import json, os, sys
print("not a message")
print(json.dumps({"start": "A"}), json.dumps({"failed": "A", "reason": "B"}), sep=chr(10), flush=True)
print(json.dumps({"elements": 5, "done": True}), json.dumps({"start": "C"}), sep=chr(10), flush=True)
print("Segmentation fault", file=sys.stderr)
os._exit(9)
"""
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **kw: popen([sys.executable, "-c", script], **kw))
    tally = fuzz.fuzz(5.0, 1, 0, ["xla"])
    assert str(tally) == "1 cases, 5 elements compared, 2 failures"
    assert tally.failures[0] == ("A", "B")
    assert tally.failures[1][0] == "C"
    assert tally.failures[1][1] == "the worker ended with 9: Segmentation fault\n"


FRACTIONS = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"


@pytest.mark.parametrize(
    "given, told",
    [
        ({}, {FRACTIONS[0]: "0.3000"}),
        ({FRACTIONS[0]: "0.02"}, {FRACTIONS[0]: "0.0100"}),
        ({FRACTIONS[1]: "0.02"}, {FRACTIONS[1]: "0.0100"}),
    ],
)
def test_two_workers_share_what_is_allowed_of_a_gpus_memory(monkeypatch, given, told):
    """JAX refuses both variables together."""
    for name in FRACTIONS:
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    script = "import json, os; print(json.dumps({n: x for n, x in os.environ.items() if n.endswith('MEM_FRACTION')}))"
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda command, **kw: popen([sys.executable, "-c", script], **kw))
    messages = queue.Queue()
    fuzz.start_worker(0, 1.0, 2, ["xla"], messages)
    assert messages.get(timeout=60)[1] == told


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy's, of the interpreter
@pytest.mark.parametrize("packed", [False, True])
def test_the_comparison_with_the_oracle(monkeypatch, packed):
    """What a GPU's run does, with the interpreted oracle: rows of zeros, NaNs, infinities and gates of any bits."""
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    monkeypatch.setattr(fuzz, "has_gpu", lambda: True)
    case = dataclasses.replace(CASE, dtype="float32", num_tokens=7, packed=packed, mrope_layout="sectioned")
    with strategies.x64(case):
        assert fuzz.check_forward(case, 0, ("xla",))
    monkeypatch.setattr(fuzz, "run", spoiled(fuzz.run, 1, lambda x: x + 1))
    with strategies.x64(case), pytest.raises(fuzz.MismatchError, match="BROKEN"):
        fuzz.check_forward(case, 0, ("xla",))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("axes", ["b s h d", "l c s h b d"])
@pytest.mark.parametrize("call, dtype", [(CACHED, "float32"), (CODES, "float16")])
def test_the_comparison_with_the_oracle_s_writer(monkeypatch, call, dtype, axes):
    """What a GPU's run does, with the interpreted oracle and v of any bits; codes of a dtype that a CPU reads whole."""
    pytest.importorskip("torch")
    pytest.importorskip("triton")
    monkeypatch.setattr(fuzz, "has_gpu", lambda: True)
    call = dataclasses.replace(call, case=dataclasses.replace(call.case, dtype=dtype), cache_axes=axes)
    assert fuzz.check(call, 3, ("xla",))
    assert fuzz.check(dataclasses.replace(call, layer=-1), 3, ("xla",))
    monkeypatch.setattr(cached, "outputs_of", spoiled_v(cached.outputs_of))
    with pytest.raises(fuzz.MismatchError, match=r"^xla: v in the cache"):
        fuzz.check(call, 3, ("xla",))


def spoiled_v(outputs_of):
    """The caches of k and of v exchanged, or of one array's k and v."""

    def spoil(call, got):
        outputs = outputs_of(call, got)
        if outputs.v_cache is None:
            return outputs._replace(k_cache=outputs.k_cache.at[:, 1].set(0))
        return outputs._replace(v_cache=jnp.zeros_like(outputs.v_cache))

    return spoil


@pytest.mark.gpu
def test_some_cases_on_a_gpu(gpu):
    for case in fuzz.draw(strategies.WIDE, 11, 3):
        assert fuzz.check(case, 0)
