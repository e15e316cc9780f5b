"""What stands around the timed runs: peers, blocks, floors, compiling, several GPUs, profiles, decoding, pictures."""

import dataclasses
import functools
import importlib.util
import json
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

import pallas_qk
from benchmarks import (
    block,
    compare,
    compilation,
    decode,
    host,
    operations,
    plot,
    profile,
    record,
    scaling,
    table,
    xplane,
)
from benchmarks.__main__ import main
from benchmarks.floor import minimum_bytes
from benchmarks.operations import OPERATIONS
from benchmarks.providers import JAX_OPS, PROVIDERS
from benchmarks.xplane import Kernel, MeasurementError
from tests import forms
from tests.cases import Case, make_inputs
from tests.gradients import outputs_and_gradients
from tests.run import quick_jit

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None,
    reason="needs torch and triton",
)
needs_matplotlib = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs matplotlib")

SMALL = Case(2, 2, 1, 32, 16, "float16")


@pytest.fixture
def as_users_run_it():
    """JAX's own promotions, not the strict ones of the other tests: xla_plain is a user's code."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def recorded(tmp_path) -> record.Run:
    return record.Run("20260101T000000Z-abc", "NVIDIA H200", {"jax": "1", "triton": "2"}, tmp_path / "h200.jsonl")


def rows_of(recorded: record.Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in recorded.output.read_text().splitlines()]


# --- peers --------------------------------------------------------------------------------------------------------

PEER = """
import torch
from vllm.triton_utils import tl, triton

@triton.jit
def kernel(x_ptr):
    tl.store(x_ptr, 1)

def fused_qk_rmsnorm_rope_gate(*arrays, **static):
    from torch_ref import reference
    return reference.fused_qk_rmsnorm_rope_gate(*arrays, **static)
"""


@needs_triton
@pytest.mark.parametrize("form", ["{}", "vllm={}"])
def test_a_peer_is_loaded_without_vllm_and_runs(tmp_path, form):
    from benchmarks import peers, providers
    from torch_ref import reference

    path = tmp_path / "fused_qk_norm_rope.py"
    path.write_text(PEER)
    peer = peers.load(form.format(path))
    assert peer.name == ("vllm" if "=" in form else "fused_qk_norm_rope")
    assert peer.stood_in == ("vllm.triton_utils",)
    assert not any(name.partition(".")[0] == "vllm" for name in sys.modules)
    with jax.default_device(jax.devices("cpu")[0]):
        inputs = make_inputs(SMALL)
        got = peer.build(SMALL, inputs)()
        want = reference.fused_qk_rmsnorm_rope_gate(*providers.torch_inputs(inputs), **SMALL.static_arguments)
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


@needs_triton
@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "a peer is FILE or NAME=FILE"),
        ("from vllm.config import get_config", "got ['vllm.config']"),
        ("import absent_package.part", "got ['absent_package.part']"),
        ("x = 1", "must define fused_qk_rmsnorm_rope_gate or triton_reshape_and_cache_flash, got neither"),
    ],
)
def test_a_peer_that_cannot_be_loaded_is_named(tmp_path, source, message):
    from benchmarks import peers

    path = tmp_path / "kernel.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(ValueError, match=re.escape(message)):
        peers.load(str(path))


@needs_triton
def test_a_peer_refuses_what_it_would_get_wrong(tmp_path):
    from benchmarks import peers

    path = tmp_path / "kernel.py"
    path.write_text(PEER)
    build = peers.load(str(path)).build
    with pytest.raises(NotImplementedError, match="got float32"):
        build(Case(2, dtype="float32"), make_inputs(Case(2, dtype="float32")))

    for changes, message in (
        ({"rotation": "pairs"}, "got rotation='pairs'"),
        ({"round_norm": False}, "got round_norm="),
    ):
        case = Case(2, **changes)
        with pytest.raises(NotImplementedError, match=message):
            build(case, make_inputs(case))

    class Inputs:
        q_gate = jax.ShapeDtypeStruct((2**18, 2**13), jnp.bfloat16)

    with pytest.raises(NotImplementedError, match="got 2,147,483,648 elements"):
        build(Case(2**18), Inputs())


# --- blocks -------------------------------------------------------------------------------------------------------


def play_library(monkeypatch, spoil=lambda gate: gate) -> None:
    """In the library's place plain jnp with one result changed."""

    def library(case):
        def op(*arrays):
            *outputs, gate = JAX_OPS["xla_plain"](case)(*arrays)
            return *outputs, spoil(gate)

        return op

    monkeypatch.setitem(JAX_OPS, "xla", library)


@needs_triton
@pytest.mark.parametrize("kind", ["block", "block_packed", "block_backward", "block_packed_backward"])
def test_a_block_is_timed_only_if_it_is_right(monkeypatch, as_users_run_it, capsys, kind):
    providers = dict.fromkeys(["xla", "xla_plain"])
    with jax.default_device(jax.devices("cpu")[0]):
        inputs = make_inputs(SMALL)
        # Here "xla" is plain jnp too, which keeps to distances, not to bits.
        monkeypatch.setattr(block, "agreement", lambda name, *rest, **kw: AGREEMENT("xla_plain", *rest, **kw))
        play_library(monkeypatch)
        calls, kept = OPERATIONS[kind].check(SMALL, inputs, providers)
        assert kept and list(calls) == ["xla", "xla_in_place", "xla_never", "xla_plain"]
        assert (
            len(calls["xla"].call())
            == {
                "block": 3,
                "block_packed": 4,
                "block_backward": 5,  # of attended, q_gate, k and two weights
                "block_packed_backward": 4,
            }[kind]
        )
        play_library(monkeypatch, spoil=lambda gate: gate + 1)
        calls, kept = OPERATIONS[kind].check(SMALL, inputs, providers)
    assert not kept and list(calls) == ["xla_plain"]
    assert "BROKEN" in capsys.readouterr().out


AGREEMENT = block.agreement


@needs_triton
def test_the_op_without_its_gate_is_compared_and_timed_beside_the_whole_oracle(monkeypatch, as_users_run_it):
    providers = dict.fromkeys(["oracle", "xla", "xla_plain"])
    monkeypatch.setattr(operations, "agreement", lambda name, *rest, **kw: AGREEMENT("xla_plain", *rest, **kw))
    with jax.default_device(jax.devices("cpu")[0]):
        inputs = make_inputs(SMALL)
        play_library(monkeypatch, spoil=jnp.negative)  # the gate isn't made, so what it would hold is no matter
        calls, kept = OPERATIONS["gate_in_place"].check(SMALL, inputs, providers)
        assert kept and list(calls) == ["oracle", "xla"]
        assert [len(calls[name].call()) for name in calls] == [3, 2]


@needs_triton
@pytest.mark.parametrize("op", ["forward_no_gate", "backward_no_gate"])
def test_the_op_without_gates_is_timed_only_if_it_is_right(monkeypatch, as_users_run_it, capsys, op):
    providers = dict.fromkeys(["oracle", "vllm", "xla", "xla_plain"])
    monkeypatch.setattr(operations, "agreement", lambda name, *rest, **kw: AGREEMENT("xla_plain", *rest, **kw))

    def played(case, change=lambda k: k):
        def run(*arrays):
            q, k = JAX_OPS["xla_plain"](case)(*arrays)
            return q, change(k)

        return run

    with jax.default_device(jax.devices("cpu")[0]):
        inputs = make_inputs(SMALL)
        monkeypatch.setitem(JAX_OPS, "xla", played)
        calls, kept = OPERATIONS[op].check(SMALL, inputs, providers)
        assert kept and list(calls) == ["xla", "xla_plain"]
        heads = [SMALL.num_q_heads * SMALL.head_dim, SMALL.num_kv_heads * SMALL.head_dim]
        assert [x.shape[-1] for x in calls["xla"].call()[:2]] == heads
        monkeypatch.setitem(JAX_OPS, "xla", functools.partial(played, change=jnp.negative))
        calls, kept = OPERATIONS[op].check(SMALL, inputs, providers)
    assert not kept and list(calls) == ["xla_plain"]
    assert "BROKEN" in capsys.readouterr().out


@needs_triton
@pytest.mark.parametrize(
    "op, skipped",
    [
        ("forward_pairs", []),
        ("forward_float32_table", []),
        *((f"forward_{name}", ["xla_plain"]) for name in ("rotation_first", "no_table", "no_weights", "v_norm")),
    ],
)
def test_the_op_with_an_option_is_timed_only_if_it_is_right(monkeypatch, as_users_run_it, capsys, op, skipped):
    """In float16, in which the interpreted oracle rounds as a GPU does."""
    providers = dict.fromkeys(["oracle", "xla", "xla_plain"])
    providers = {name: PROVIDERS[name] for name in providers}
    monkeypatch.setattr(operations, "agreement", lambda *args, platform: AGREEMENT(*args, platform="cpu"))
    timed = [
        name for name in ("oracle", "xla", "xla_plain") if name not in skipped and (op, name) != (V_NORM, "oracle")
    ]
    with jax.default_device(jax.devices("cpu")[0]):
        inputs = make_inputs(SMALL)
        calls, kept = OPERATIONS[op].check(SMALL, inputs, providers)
        assert kept and list(calls) == timed
        assert ("xla_plain skipped: plain jnp normalises q and k with weights" in capsys.readouterr().out) is bool(
            skipped
        )
        original = JAX_OPS["xla"]

        def spoiled(case):
            """The last but one: k, or v where it is normalised."""

            def run(*arrays):
                *first, x, gate = original(case)(*arrays)
                return *first, -x, gate

            return run

        monkeypatch.setitem(JAX_OPS, "xla", spoiled)
        calls, kept = OPERATIONS[op].check(SMALL, inputs, providers)
    assert not kept and "xla" not in calls and "BROKEN" in capsys.readouterr().out


V_NORM = "forward_v_norm"


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("gate", ["copied", None])
def test_every_form_of_the_plain_op_has_the_values_of_the_first(as_users_run_it, packed, gate):
    inputs, form = make_inputs(SMALL), dataclasses.replace(SMALL, packed=packed, gate=gate)
    want = PROVIDERS["xla_plain"](SMALL, inputs)()
    got = PROVIDERS["xla_plain"](form, inputs)()
    assert all(np.array_equal(a, b) for a, b in zip(got, forms.outputs_of(form, want), strict=True))


# --- the floor ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        (Case(1), 34_944),  # 64 q, gate, q_out and gate_out rows, 4 k rows of 512 bytes; 128 bytes of table
        (Case(16384, 32, 2), 16384 * (132 * 512 + 128)),
        (Case(3, 5, 2, 80, 40, "float16", cache_dtype="float32"), 3 * (24 * 160 + 160)),
        (Case(2, 1, 1, 64, 64, "float32"), 2 * (6 * 256 + 256)),
        (Case(16384, gate="in_place"), 16384 * (36 * 512 + 128)),
        (Case(16384, gate=None), 16384 * (36 * 512 + 128)),
        (Case(16384, packed=True), 16384 * ((68 + 4) * 512 + 128)),
        (Case(16384, packed=True, gate="in_place"), 16384 * ((36 + 4) * 512 + 128)),
        (Case(16384, gathered=True), 16384 * (68 * 512 + 128)),
    ],
)
def test_minimum_bytes(case, expected):
    assert minimum_bytes(case) == expected


def test_backward_bytes_count_q_k_and_three_cotangents_in_and_two_gradients_out():
    case = Case(7, 3, 2, head_dim=64, rotary_dim=16)
    assert minimum_bytes(case, "backward") == 7 * (3 * (1 + 1 + 1 + 2) + 2 * (1 + 1 + 1)) * 64 * 2
    floors = {
        form: minimum_bytes(dataclasses.replace(case, **dict(form)), "backward") // (7 * 64 * 2)
        for form in ((("gate", "in_place"),), (("gate", None),), (("packed", True),))
    }
    # The gate's cotangent is moved wherever the gate lay; v's beside those of q and k.
    assert list(floors.values()) == [3 * 5 + 2 * 3, 3 * 3 + 2 * 3, 3 * 5 + 2 * 5]


def test_bytes_of_blocks():
    case = Case(10, 4, 2, 64, 32)
    row, table_row = 10 * 64 * 2, 10 * 32 * 2
    found = {name: operation.minimum_bytes(case) for name, operation in OPERATIONS.items()}
    assert found == {
        "forward": (4 * 4 + 2 * 2) * row + table_row,
        **dict.fromkeys(
            ("forward_pairs", "forward_unrounded_norm", "forward_rotation_first", "forward_no_weights"),
            (4 * 4 + 2 * 2) * row + table_row,
        ),
        "forward_no_table": (4 * 4 + 2 * 2) * row,
        "forward_float32_table": (4 * 4 + 2 * 2) * row + 2 * table_row,
        "forward_v_norm": (4 * 4 + 4 * 2) * row + table_row,
        "backward": (5 * 4 + 3 * 2) * row,
        "forward_no_gate": (2 * 4 + 2 * 2) * row + table_row,
        "backward_no_gate": (3 * 4 + 3 * 2) * row,
        "gate_in_place": (2 * 4 + 2 * 2) * row + table_row,
        "block": (5 * 4 + 2 * 2) * row + table_row,
        "block_packed": (5 * 4 + 4 * 2) * row + table_row,
        "block_backward": (8 * 4 + 3 * 2) * row,
        "block_packed_backward": (8 * 4 + 5 * 2) * row,
        "kv_cache": (4 * 4 + 4 * 2) * row + table_row,
        "kv_cache_gate_in_place": (2 * 4 + 4 * 2) * row + table_row,
        "kv_cache_fp8": (4 * 4 + 3 * 2) * row + table_row,
        "kv_cache_fp8_gate_in_place": (2 * 4 + 3 * 2) * row + table_row,
        # The weight, hidden states 512 wide, q, gate, k and v.
        **dict.fromkeys(("projection", "projection_cache"), 512 * 768 * 2 + (8 + 2 * 4 + 2 * 2) * row),
        "projection_cache_fp8": 512 * 768 * 2 + (8 + 2 * 4 + 2) * row,
    }
    # With its gate copied the op moves two more rows of each query head.
    assert minimum_bytes(case) - found["gate_in_place"] == 2 * 4 * row


# As many rows of the table as tokens, so that the whole of it is what the tokens read.
FLOOR = Case(6, 3, 2, 128, 64, max_position=6)
FORMS = [
    *({"packed": packed, "gate": gate} for packed in (False, True) for gate in ("copied", "in_place", None)),
    *({"packed": packed, "gathered": True} for packed in (False, True)),
    *({"mrope_section": (11, 11, 10), "mrope_layout": layout} for layout in ("interleaved", "sectioned")),
    {"cache_dtype": "float32", "weight_dtype": "float32"},
]


def num_bytes(arrays) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays))


def of_call(function, num_others: int, *arrays):
    """What a function returns, and the gradients of its arrays but the last ones."""
    both = outputs_and_gradients(function, of=len(arrays) - num_others, arguments=len(arrays))
    return jax.eval_shape(both, *arrays, *jax.eval_shape(function, *arrays))


@pytest.mark.parametrize("changes", FORMS, ids=str)
def test_the_floor_of_the_op_is_the_size_of_its_arrays(changes):
    case = dataclasses.replace(FLOOR, **changes)
    inputs = forms.inputs_of(case, make_inputs(case))
    arrays = jax.tree.leaves(inputs)
    rows = jax.tree.leaves((inputs.q, inputs.k))
    outputs, gradients = of_call(forms.op(case, "xla"), len(arrays) - len(rows), *arrays)
    gate = num_bytes(outputs[-1]) if case.gate else 0
    v = num_bytes(outputs[2]) if case.packed else 0
    # A gate left in place is neither read nor written; the cotangents of gate and v are copied without either.
    in_place = 2 * gate if case.gate == "in_place" else 0
    assert minimum_bytes(case) == num_bytes((rows, inputs.cos_sin_cache, outputs)) - in_place
    assert minimum_bytes(case, "backward") == num_bytes((rows, outputs, gradients)) - gate - v


@pytest.mark.parametrize("packed", [False, True])
def test_the_floor_of_a_block_is_the_size_of_its_arrays(packed):
    case = dataclasses.replace(FLOOR, packed=packed, gate="in_place")
    attended, *arrays = block.arrays_of(case, make_inputs(case))
    *rows, _, _, table, _ = arrays
    outputs, gradients = of_call(block.block(forms.op(case, "xla")), 4, attended, *arrays)
    form = "block_packed" if packed else "block"
    v = num_bytes(outputs[2]) if packed else 0
    assert OPERATIONS[form].minimum_bytes(FLOOR) == num_bytes((attended, rows, table, outputs))
    moved = num_bytes((attended, rows, outputs, gradients))
    assert OPERATIONS[f"{form}_backward"].minimum_bytes(FLOOR) == moved - v


def test_the_floors_of_recorded_rows_are_those_of_today():
    rows = [row for row in record.read(sorted(record.RESULTS.glob("*.jsonl"))) if "bytes" in row]
    rows = [row for row in rows if not row["op"].endswith("_scaling")]  # of all GPUs
    assert len(rows) > 1000
    sizes = ("num_tokens", "num_q_heads", "num_kv_heads", "head_dim", "rotary_dim", "dtype")
    for row in rows:
        assert OPERATIONS[row["op"]].minimum_bytes(Case(*(row[name] for name in sizes))) == row["bytes"], row


# --- compiling ----------------------------------------------------------------------------------------------------


def test_compile_times_are_recorded_for_each_stage(recorded, capsys, as_users_run_it, monkeypatch):
    monkeypatch.setattr(compilation, "REPEATS", 1)
    case = Case(3, 2, 1, 64, 6)
    with jax.default_device(jax.devices("cpu")[0]):
        assert compilation.run([case], ["oracle", "triton", "xla"], recorded) == 0
    rows = rows_of(recorded)
    assert [(row["suite"], row["op"], row["implementation"]) for row in rows] == [
        ("compile", "forward", "xla"),
        ("compile", "backward", "xla"),
    ]
    assert all(row[stage] > 0 for row in rows for stage in ("trace_ms", "lower_ms", "compile_ms"))
    assert "triton skipped: implementation='triton' must run on an NVIDIA GPU" in capsys.readouterr().out


@pytest.mark.parametrize("op", ["forward", "backward"])
@pytest.mark.parametrize("mrope_section", [None, (11, 11, 10)])
def test_what_is_compiled_takes_the_inputs_of_the_case(op, mrope_section):
    case = Case(3, 2, 1, 64, 64, "float16", cache_dtype="float32", mrope_section=mrope_section)
    arrays = compilation.abstract_arguments(case, op)[0 if op == "forward" else 1 :]
    assert [(x.shape, x.dtype) for x in arrays] == [(x.shape, x.dtype) for x in make_inputs(case)]


# --- the processor's time -----------------------------------------------------------------------------------------


def test_host_times_are_recorded_for_calls_and_for_layers(recorded, capsys, as_users_run_it, monkeypatch):
    for name, value in {"CALLS": 2, "WARMUP_CALLS": 1, "ROUNDS": 1, "REPEATS": 1, "TOKENS": 8}.items():
        monkeypatch.setattr(host, name, value)
    with jax.default_device(jax.devices("cpu")[0]):
        assert host.run(recorded, 2, 1, num_layers=2) == 0
    rows = rows_of(recorded)
    calls, layers = rows[:3], rows[3:]
    assert [row["op"] for row in calls] == ["forward_host", "forward_packed_host", "forward_cache_host"]
    assert all(row["eager_us"] > 0 and row["jit_us"] > 0 for row in calls)
    assert [(row["op"], row["implementation"], row["platform"]) for row in layers] == [
        (f"{direction}_layers", of, platform)
        for direction in ("forward", "backward")
        for of in ("op", "attention")
        for platform in ("cpu", "cuda")
    ]
    assert all(row["layers"] == 2 and row["trace_ms"] > 0 and row["lower_ms"] > 0 for row in layers)
    assert "ms per layer" in capsys.readouterr().out


def test_layers_are_lowered_for_a_platform_that_is_not_there(monkeypatch):
    """And every layer of them, with nothing left in a cache from the last time."""
    seen = []
    original = jax.stages.Traced.lower

    def lower(traced, **options):
        lowered = original(traced, **options)
        seen.append(
            (options["lowering_platforms"], lowered.as_text().count("call @_run"), "custom_call" in lowered.as_text())
        )
        return lowered

    monkeypatch.setattr(jax.stages.Traced, "lower", lower)
    for platform in ("cpu", "cuda"):
        function, arrays = host.MODELS["forward", "op"](Case(8, 2, 1))
        host.stages(function, arrays, 3, platform)
    assert [seen[0][:2], seen[1]] == [(("cpu",), 3), (("cuda",), 3, True)]


# --- several GPUs -------------------------------------------------------------------------------------------------


def events(*durations_ns: float) -> list[Kernel]:
    return [Kernel("k", 10.0 * i, duration) for i, duration in enumerate(durations_ns)]


def test_scaling_counts_the_slowest_gpu_of_each_call(monkeypatch):
    monkeypatch.setattr(scaling, "WARMUP_CALLS", 1)
    monkeypatch.setattr(scaling, "REPEATS", 2)
    devices = {"/device:GPU:0": events(9e3, 1e3, 4e3), "/device:GPU:1": events(9e3, 2e3, 3e3)}
    assert scaling.slowest_us(devices, 2).tolist() == [2.0, 4.0]
    with pytest.raises(MeasurementError, match="3 GPUs must run kernels"):
        scaling.slowest_us(devices, 3)
    with pytest.raises(MeasurementError, match="in each of 3 calls"):
        scaling.slowest_us({"/device:GPU:0": events(1e3, 1e3)}, 1)


def test_scaling_measures_each_gpu_under_the_profiler(monkeypatch):
    calls = []

    def played(run):
        before = len(calls)
        run()
        return xplane.Profile(tuple(Kernel("k", t, 1.0, f"/device:GPU:{t % 2}") for t in range(len(calls) - before)))

    monkeypatch.setattr(xplane, "profile", played)
    measured = scaling.measure(lambda: calls.append("call"))
    assert len(calls) == 2 + scaling.WARMUP_CALLS + scaling.REPEATS
    assert {name: len(kernels) for name, kernels in measured.items()} == {"/device:GPU:0": 22, "/device:GPU:1": 22}


def test_scaling_shards_tokens_and_records_the_speedup(monkeypatch, recorded, capsys):
    monkeypatch.setattr(jax, "devices", lambda real=jax.devices: real("cpu")[:2])
    calls = scaling.WARMUP_CALLS + scaling.REPEATS
    seen = []

    def measured(call):
        q_out = call()[0]
        seen.append((q_out.shape[0], len(q_out.sharding.device_set)))
        # Two devices take 0.52 of the time where the work is divided, 1.04 where each has as much as one had.
        duration = 1e3 * (seen[-1][0] / 8) * (1.0 if seen[-1][1] == 1 else 0.52)
        return {str(device): events(*[duration] * calls) for device in q_out.sharding.device_set}

    assert scaling.run(["oracle", "xla"], recorded, [(2, 1)], tokens=8, measured=measured) == 0
    assert seen == [(8, 1), (16, 2), (8, 1), (8, 2)]
    rows = rows_of(recorded)
    assert [(row["op"], row["gpus"], row["num_tokens"], row["speedup"]) for row in rows] == [
        ("forward_weak_scaling", 1, 8, 1.0),
        ("forward_weak_scaling", 2, 16, 1.923),
        ("forward_strong_scaling", 1, 8, 1.0),
        ("forward_strong_scaling", 2, 8, 1.923),
    ]
    assert "1.92" in capsys.readouterr().out


def test_scaling_says_that_one_gpu_is_too_few(monkeypatch, recorded, capsys):
    monkeypatch.setattr(jax, "devices", lambda real=jax.devices: real("cpu")[:1])
    assert scaling.run(["xla"], recorded, [(2, 1)]) == 0
    assert "it needs two GPUs or more, got 1" in capsys.readouterr().out
    assert not recorded.output.exists()


def test_numbers_of_gpus_are_powers_of_two():
    assert [scaling.counts(n) for n in (1, 2, 3, 8)] == [[1], [1, 2], [1, 2], [1, 2, 4, 8]]


# --- profiles -----------------------------------------------------------------------------------------------------

PROFILE = """
planes { id: 1 name: "/device:GPU:0"
  lines { id: 7 name: "Stream #7(Kernel)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 1000000 duration_ps: 2000000
      stats { metadata_id: 1 str_value: "custom-call.1" } stats { metadata_id: 2 str_value: "jit_ours_T8" }
      stats { metadata_id: 3 uint64_value: 5 } }
    events { metadata_id: 1 offset_ps: 9000000 duration_ps: 4000000
      stats { metadata_id: 1 str_value: "custom-call.1" } stats { metadata_id: 2 str_value: "jit_ours_T8" } }
    events { metadata_id: 2 offset_ps: 5000000 duration_ps: 1000000 } }
  event_metadata { key: 1 value { id: 1 name: "pallas_qk_triton_forward" } }
  event_metadata { key: 2 value { id: 2 name: "torch_kernel" } }
  stat_metadata { key: 1 value { id: 1 name: "hlo_op" } }
  stat_metadata { key: 2 value { id: 2 name: "hlo_module" } }
  stat_metadata { key: 3 value { id: 3 name: "cuda_graph_id" } } }
planes { id: 2 name: "/host:CPU"
  lines { id: 1 name: "python" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 0 duration_ps: 1000 } events { metadata_id: 2 offset_ps: 0 duration_ps: 1000 }
    events { metadata_id: 3 offset_ps: 0 duration_ps: 1000 } events { metadata_id: 4 offset_ps: 0 duration_ps: 1000 } }
  event_metadata { key: 1 value { id: 1 name: "cuGraphLaunch (CudaGraph:5)" } }
  event_metadata { key: 2 value { id: 2 name: "cuLaunchKernelEx" } }
  event_metadata { key: 3 value { id: 3 name: "cuLaunchKernel" } }
  event_metadata { key: 4 value { id: 4 name: "cuMemAlloc" } } }
"""
PROGRAM = """HloModule jit_ours_T8, is_scheduled=true

ENTRY %main {
  %custom-call.1 = bf16[8]{0} custom-call(%p), metadata={op_name="jit(ours_T8)/jit(f)/scope/inner" stack_frame_id=3}
  ROOT %copy.2 = bf16[8]{0} copy(%custom-call.1), metadata={source_line=1 op_name="jit(ours_T8)/last"}
}
"""


def test_a_trace_of_a_gpu_is_read_with_scopes_graphs_and_launches(tmp_path):
    path = tmp_path / "a.xplane.pb"
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(PROFILE))
    trace = xplane.read(path, host=True)
    assert [(kernel.name, kernel.in_graph) for kernel in trace.kernels] == [
        ("pallas_qk_triton_forward", True),
        ("torch_kernel", False),
        ("pallas_qk_triton_forward", False),
    ]
    assert trace.graph_launches == 1
    scope_of = profile.scopes(PROGRAM)
    assert scope_of == {("jit_ours_T8", "custom-call.1"): "scope/inner", ("jit_ours_T8", "copy.2"): "last"}
    assert profile.summary(trace.kernels, scope_of)[1:] == [
        ["2", "6.00", "3.00", "2.00", "4.00", "ours_T8", "scope/inner", "pallas_qk_triton_forward"],
        ["1", "1.00", "1.00", "1.00", "1.00", "-", "-", "torch_kernel"],
    ]


def test_a_trace_without_kernels_is_an_error(tmp_path):
    path = tmp_path / "a.xplane.pb"
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace('planes { id: 1 name: "/host:CPU" }'))
    with pytest.raises(MeasurementError, match="JAX must find CUPTI"):
        xplane.read(path, host=True)


@needs_triton
def test_profile_writes_a_trace_and_prints_our_scope(tmp_path, capsys, as_users_run_it):
    output = tmp_path / "trace"
    with jax.default_device(jax.devices("cpu")[0]):
        assert profile.profile([Case(3, 2, 1, 64, 32)], ["xla", "triton"], 2, output) == 0
    printed = capsys.readouterr().out
    ours = [line.split() for line in printed.splitlines() if "fused_qk_rmsnorm_rope_gate/" in line]
    assert ours and all(line[0] == "2" and line[5] == "xla_T3" for line in ours)
    assert "triton skipped" in printed
    (perfetto,) = output.rglob("perfetto_trace.json.gz")
    assert str(perfetto) in printed and list(perfetto.parent.glob("*.xplane.pb"))


@needs_triton
def test_the_oracle_is_profiled_as_it_is():
    with jax.default_device(jax.devices("cpu")[0]):
        calls, texts = profile.programs(SMALL, ["oracle"])
    assert list(calls) == ["oracle_T2"] and texts == []


@needs_triton
def test_profile_takes_no_folder_that_holds_something(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    (tmp_path / "old").write_text("")
    assert main(["profile", "--output", str(tmp_path)]) == 2
    assert "must be new or empty" in capsys.readouterr().err


# --- decode steps -------------------------------------------------------------------------------------------------

THUNKS = {
    "triton": """
001: kKernel        [source       | next=002 (1)] kernel=fusion_1, profile_annotation=fusion.1, cluster_dim=nullopt
000: kCommandBuffer [prev=001 (1) | next=006 (1)]
  002: kGemm        [source | sink] (no description)
  003: kKernel      [source | sink] kernel=pallas_qk_triton_forward, profile_annotation=custom-call.1
004: kCustomCall    [source | sink] (no description)
""",
    "mosaic_gpu": """
000: kCommandBuffer [source | next=004 (1)]
  002: kKernel      [source | sink] kernel=fusion_2
  003: kKernel      [source | sink] kernel=fusion_3
004: kCustomCall    [source | sink] (no description)
""",
}


def test_thunks_tell_what_a_command_buffer_holds():
    assert decode.parse_thunks(THUNKS["triton"], "triton") == (4, 2, 1, "recorded")
    assert decode.parse_thunks(THUNKS["mosaic_gpu"], "mosaic_gpu") == (3, 2, 1, "not recorded")
    assert decode.parse_thunks(THUNKS["mosaic_gpu"], "triton").op_in_graph == "not found"
    assert decode.parse_thunks(THUNKS["mosaic_gpu"], "xla") == (3, 2, 1, "fused by XLA")


def test_the_dump_after_the_passes_counts_and_none_is_said(tmp_path):
    assert decode.recorded_in(str(tmp_path), "triton") is None
    (tmp_path / "module_0001.jit_step.thunk_sequence.txt").write_text("001: kKernel [a] kernel=fusion\n")
    assert decode.recorded_in(str(tmp_path), "triton") == (1, 0, 0, "not found")
    (tmp_path / "module_0001.jit_step.thunk_sequence_after_thunk_passes.txt").write_text(THUNKS["triton"])
    assert decode.recorded_in(str(tmp_path), "triton").op_in_graph == "recorded"


LAYER = decode.Layer(2, 1, 64, 32, context=8, dtype="float32", width_per_q_head=16)


@pytest.mark.parametrize(
    "name, form", [("xla", "set-xla"), ("xla_plain", "set-xla"), ("xla", "op-xla"), ("xla", "example-xla")]
)
@jax.default_matmul_precision("highest")  # the products below too, which a GPU takes in TF32
def test_a_decode_step_appends_to_the_cache_and_attends_to_what_lies_there(name, form, as_users_run_it):
    parameters, state = decode.initial(LAYER, decode.FORMS[form], 3)
    state = state._replace(positions=jnp.array([0, 3, 7], jnp.int32))
    ((keys, values),) = state.caches

    step_of_form = quick_jit(functools.partial(decode.step, name, LAYER, decode.FORMS[form]))

    def step(values=values):
        after = step_of_form(parameters, state._replace(caches=((keys, values),)))
        return after, *after.caches[0]

    after, _, written = step()
    assert after.positions.tolist() == [1, 4, 0]
    changed = np.argwhere(np.any(np.asarray(written != values), axis=(2, 3)))
    assert changed.tolist() == [[0, 0], [1, 3], [2, 7]]
    # The first sequence sees its own token alone, so attention gives its v.
    (weights,) = parameters.layers
    x = state.hidden / jnp.sqrt(jnp.mean(state.hidden**2, axis=-1, keepdims=True))
    q_gate, _, v = jnp.split(x @ weights["qkv"], [256, 320], axis=-1)
    gate, v = q_gate.reshape(3, 2, 2, 64)[:, :, 1], v.reshape(3, 1, 64)
    want = state.hidden + (v * jax.nn.sigmoid(gate)).reshape(3, -1) @ weights["out"]
    np.testing.assert_allclose(after.hidden[0], want[0], rtol=2e-4, atol=1e-5)
    # The others see what lies before them, and nothing behind.
    again, keys_again, _ = step(values.at[1, 4:].set(jnp.inf))
    assert np.isfinite(again.hidden[0]).all() and np.isfinite(keys_again).all()
    moved, *_ = step(values.at[1, 2].add(1))
    assert not np.array_equal(moved.hidden[1], after.hidden[1]) and np.array_equal(moved.hidden[2], after.hidden[2])


@jax.default_matmul_precision("highest")
def test_every_form_of_a_decode_step_computes_one_thing(as_users_run_it):
    """Layers unrolled and scanned, caches written by the op or after it; those of 8 bits nearly."""

    def hidden(form: str, jit=quick_jit):
        form = decode.FORMS[form]
        parameters, state = decode.initial(LAYER, form, 3)
        step = jit(functools.partial(decode.step, "xla", LAYER, form))
        for _ in range(2):
            state = step(parameters, state)
        return state.hidden

    want = hidden("set-xla", jax.jit)
    np.testing.assert_array_equal(hidden("op-xla", jax.jit), want)
    np.testing.assert_allclose(hidden("example-xla"), want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(hidden("op-xla-scanned"), hidden("op-xla-unrolled"), rtol=1e-4, atol=1e-4)
    off = np.abs(np.asarray(hidden("fp8-xla") - want)).max()
    assert 0 < off < 0.5


def test_the_bytes_that_attention_must_read():
    layer = dataclasses.replace(LAYER, context=1024, dtype="bfloat16")
    of = {name: layer.attended_bytes(form, 3) for name, form in decode.FORMS.items()}
    assert of["op-cudnn"] == 3 * 512 * 2 * 64 * 2  # sequences, tokens, k and v, lanes, bytes
    assert of["fp8-cudnn"] == of["op-cudnn"] / 2 and of["op-cudnn-scanned"] == 4 * of["op-cudnn"]


def test_decode_records_each_program_and_its_profile(recorded, capsys, as_users_run_it, monkeypatch):
    monkeypatch.setattr(decode, "WARMUP_STEPS", 1)
    with jax.default_device(jax.devices("cpu")[0]):
        names = ["xla", "triton", "xla_plain"]
        assert decode.run([LAYER], ["op-xla"], [2], names, 2, recorded) == 0
        assert decode.run([LAYER], ["example-xla"], [2], names, 2, recorded, ["graph"]) == 0
    *rows, example, profile = rows_of(recorded)
    assert (example["form"], example["op"], example["program"]) == ("example-xla", "decode_step", "graph")
    assert (example["implementation"], profile["op"]) == ("xla", "decode_step_profile")
    assert [(row["op"], row["program"]) for row in rows] == [
        (op, name) for op in ("decode_step", "decode_step_profile") for name in ("default", "graph", "kernels")
    ]
    assert all(0 < row["dispatch_us"] <= row["latency_us"] and row["period_us"] > 0 for row in rows[:3])
    assert all(row["kernels"] > 1 and row["graph_launches"] == 0 and row["device_us"] > 0 for row in rows[3:])
    printed = capsys.readouterr().out
    assert "triton skipped" in printed and "xla_plain skipped" in printed and "under the profiler" in printed
    assert {row["form"] for row in rows} == {"op-xla"} and {row["attended_bytes"] for row in rows} == {2 * 4 * 2 * 256}


def test_names_that_decode_does_not_know_are_refused(capsys):
    assert main(["decode", "--forms", "op-flash"]) == 2
    assert "a form is one of set-xla, set-cudnn, " in capsys.readouterr().err
    assert main(["decode", "--programs", "graphs"]) == 2
    assert "a program is one of default, graph, kernels, got graphs" in capsys.readouterr().err


# --- reading a record ---------------------------------------------------------------------------------------------


def timed_row(implementation: str, tokens: int, p50_us: float, copy_us: float = 1.0, **changed) -> dict[str, Any]:
    row = {
        "run": "20260101T000000Z-abc",
        "gpu": "NVIDIA H200",
        "op": "forward",
        "implementation": implementation,
        "num_tokens": tokens,
        "num_q_heads": 16,
        "num_kv_heads": 2,
        "head_dim": 256,
        "rotary_dim": 64,
        "dtype": "bfloat16",
        "cache": "hot",
        "p25_us": p50_us * 0.99,
        "p50_us": p50_us,
        "p75_us": p50_us * 1.01,
        "fraction_of_copy": copy_us / p50_us,
        "versions": {"jax": "1", "triton": "2", "driver": "3"},
    }
    return row | changed


TOKENS = (1, 16, 256, 4096)


def a_run(run: str = "20260101T000000Z-abc", factor: float = 1.0, copy_factor: float = 1.0, **changed):
    rows = [timed_row("copy", t, 10.0 * t * copy_factor, run=run, **changed) for t in TOKENS]
    return rows + [
        timed_row(name, t, 20.0 * t * factor, 10.0 * t, run=run, **changed)
        for name in ("triton", "vllm")
        for t in TOKENS
    ]


@pytest.mark.parametrize(
    ("factor", "copy_factor", "slower", "faster"),
    [
        (1.0, 1.0, 0, 0),
        (1.015, 1.0, 0, 0),  # within the quartiles, 2 % apart
        (1.03, 1.0, 8, 0),
        (0.97, 1.0, 0, 8),
        (1.03, 1.03, 0, 0),  # the machine is slower, not the code
        (1.0, 1.03, 0, 8),
    ],
)
def test_compare_finds_what_changed_beyond_noise(capsys, factor, copy_factor, slower, faster):
    status = compare.compare(a_run(), a_run("20260102T000000Z-def", factor, copy_factor))
    assert status == int(slower > 0)
    printed = capsys.readouterr().out
    assert f"8 times compared, in microseconds: {slower} slower, {faster} faster" in printed
    assert printed.count(" slower\n") == slower


def test_compare_counts_what_lies_on_one_side(capsys):
    after = [row for row in a_run() if row["implementation"] != "vllm"]
    assert compare.compare(a_run(), after) == 0
    assert "4 are on one side only" in capsys.readouterr().out
    assert compare.compare(a_run(), a_run(dtype="float16")) == 2
    assert "got none in common" in capsys.readouterr().out


def test_compare_refuses_two_gpus(tmp_path, capsys):
    other = a_run("20260102T000000Z-def", gpu="NVIDIA H100")
    message = "both sides must be of one GPU, got NVIDIA H200 before and NVIDIA H100 after. Time both on one."
    with pytest.raises(ValueError, match=re.escape(message)):
        compare.compare(a_run(), other)
    path = tmp_path / "a.jsonl"
    for row in a_run() + other:
        record.append(path, row)
    assert main(["compare", "20260101", "20260102", "--record", str(path)]) == 2
    assert capsys.readouterr().err == f"compare: {message}\n"


def test_compare_of_files_compares_each_gpu_with_itself(capsys):
    """Slower on one, where the other GPU's rows come last."""
    other = a_run("20260102T000000Z-def", 2.0, gpu="NVIDIA H100")
    assert compare.compare(a_run() + other, a_run(factor=1.1)) == 1
    printed = capsys.readouterr().out
    assert "8 times compared, in microseconds: 8 slower, 0 faster" in printed and "12 are on one side only" in printed


def test_compare_takes_old_rows_with_other_percentiles():
    old = timed_row("triton", 1, 10.0)
    old = {name: value for name, value in old.items() if name not in ("p25_us", "p75_us")}
    assert compare.spread_us(old | {"p20_us": 9.0, "p80_us": 10.5}) == 1.5


def test_compare_takes_runs_and_files(tmp_path, capsys):
    path, other = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for row in a_run() + a_run("20260102T000000Z-def", 1.2):
        record.append(path, row)
    for row in a_run("20260103T000000Z-fed"):
        record.append(other, row)
    assert main(["compare", "20260101", "20260102", "--record", str(path)]) == 1
    assert main(["compare", "20260101", str(other), "--record", str(path)]) == 0
    capsys.readouterr()
    assert main(["compare", "2026", "20260102", "--record", str(path)]) == 2
    assert "one run must begin with '2026', got 2" in capsys.readouterr().err


def test_the_markdown_table_holds_each_implementation_and_the_best_share_of_the_copy():
    rows = [
        timed_row("copy", 1, 0.8),
        timed_row("oracle", 1, 1.7, 0.8),
        timed_row("mosaic_gpu", 1, 1.0, 0.8),
        timed_row("triton", 1, 1.25, 0.8),
        timed_row("copy", 16384, 133.2),
        timed_row("oracle", 16384, 290.7, 133.2),
        {"run": "r", "suite": "compile", "op": "forward", "trace_ms": 3.0},
    ]
    assert table.tables(rows).splitlines() == [
        "NVIDIA H200: forward, bfloat16, head_dim 256, rotary_dim 64, hot L2, microseconds",
        "",
        "| heads | tokens | copy | oracle | mosaic_gpu | triton | of copy |",
        "|---|---|---|---|---|---|---|",
        "| 16/2 | 1 | 0.80 | 1.70 | 1.00 | 1.25 | 0.80 |",
        "| 16/2 | 16384 | 133 | 291 | - | - | - |",
    ]


def test_tables_and_pictures_keep_gpus_apart():
    rows = a_run() + a_run(factor=2.0, gpu="NVIDIA H100")
    printed = table.tables(rows)
    h200, h100 = printed.split("NVIDIA H100: ")
    assert h200.startswith("NVIDIA H200: ") and printed.count("| heads |") == 2
    assert "| 16/2 | 4096 | 40960 | 81920 | 81920 |" in h200 and "| 16/2 | 4096 | 40960 | 163840 | 163840 |" in h100
    found = {picture.name: picture.curves[16, 2]["vllm"][0]["p50_us"] for picture in plot.pictures(rows)}
    assert found == {f"{gpu}-{PICTURES[0]}": time_us for gpu, time_us in (("h200", 20.0), ("h100", 40.0))}


def test_a_picture_takes_the_latest_run_of_its_operation():
    rows = a_run() + a_run("20260102T000000Z-def") + a_run(op="backward") + a_run(cache="cold")
    rows += [timed_row("triton", t, 1.0, num_q_heads=8) for t in TOKENS[:2]]  # too few for a curve
    rows += [timed_row("triton", t, 1.0, run="20260103T000000Z-ghi") for t in TOKENS[:2]]  # a later run without any
    found = {picture.name: picture for picture in plot.pictures(rows)}
    assert list(found) == [f"h200-{name}" for name in PICTURES]
    forward = found["h200-forward-bfloat16-d256-r64-hot"]
    assert list(forward.curves) == [(16, 2)] and "20260102T000000Z-def" in forward.title
    assert [row["num_tokens"] for row in forward.curves[16, 2]["vllm"]] == list(TOKENS)
    chosen = {picture.name: picture for picture in plot.pictures(rows, "20260101")}
    assert "20260101T000000Z-abc" in chosen["h200-forward-bfloat16-d256-r64-hot"].title


PICTURES = (
    "forward-bfloat16-d256-r64-hot",
    "backward-bfloat16-d256-r64-hot",
    "forward-bfloat16-d256-r64-cold",
)


@needs_matplotlib
def test_plot_writes_png_and_svg_with_every_label_and_the_same_bytes_again(tmp_path, capsys):
    record_path = tmp_path / "h200.jsonl"
    for row in a_run() + [timed_row("triton_in_place", t, 5.0 * t, 10.0 * t) for t in TOKENS]:
        record.append(record_path, row)
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        assert main(["plot", "--record", str(record_path), "--output", str(folder)]) == 0
    name = f"h200-{PICTURES[0]}"
    assert capsys.readouterr().out.splitlines()[:2] == [str(folders[0] / f"{name}.{end}") for end in ("png", "svg")]
    svg = (folders[0] / f"{name}.svg").read_text()
    for text in ("pallas-qk, Triton, gate in place", "vllm", "copy of the same bytes", "tokens", "time (µs)", ">4k<"):
        assert text in svg
    assert (folders[0] / f"{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert svg == (folders[1] / f"{name}.svg").read_text()


def step_row(form: str, sequences: int, device_us: float, **changed) -> dict[str, Any]:
    row = timed_row("mosaic_gpu", sequences, 1.0) | {
        "op": "decode_step_profile",
        "program": "graph",
        "context": 1024,
        "form": form,
        "attended_bytes": 10**6 * sequences,
        "device_us": device_us,
    }
    return {name: value for name, value in row.items() if name not in ("cache", "p50_us")} | changed


def test_a_picture_of_decode_steps_has_their_forms_by_length_of_the_caches():
    rows = [step_row(form, t, 50.0 + t) for t in TOKENS for form in ("set-xla", "op-cudnn", "op-cudnn-scanned")]
    rows += [step_row("op-cudnn", 16, 80.0), step_row("op-cudnn", 16, 90.0, context=8192)]  # the latter makes no curve
    rows += [step_row("op-cudnn", t, 1.0, program="kernels", context=8192) for t in TOKENS]
    rows += [{"run": "20260101T000000Z-abc", "op": "decode_step_profile"}]  # the first ones had no forms
    graph, kernels = plot.pictures(rows)
    assert [picture.name.removeprefix("h200-decode_step-bfloat16-d256-r64-") for picture in (graph, kernels)] == [
        "mosaic_gpu-graph",
        "mosaic_gpu-kernels",
    ]
    assert {line: list(curves) for line, curves in graph.curves.items()} == {(16, 2, 1024): ["set-xla", "op-cudnn"]}
    assert [row["device_us"] for row in graph.curves[16, 2, 1024]["op-cudnn"]] == [51.0, 80.0, 306.0, 4146.0]
    assert graph.kind.rate(step_row("op-cudnn", 64, 100.0)) == 640  # GB/s
    assert list(kernels.curves) == [(16, 2, 8192)]


@needs_matplotlib
def test_plot_draws_decode_steps(tmp_path, capsys):
    record_path = tmp_path / "h200.jsonl"
    for row in [step_row(form, t, 50.0 + t) for t in TOKENS for form in plot.FORMS]:
        record.append(record_path, row)
    assert main(["plot", "--record", str(record_path), "--output", str(tmp_path)]) == 0
    _, svg = capsys.readouterr().out.splitlines()
    text = (tmp_path / svg).read_text()
    for part in ("decode step, bfloat16", "caches of 1,024 places", "sequences", "time (µs)", "GB/s of caches"):
        assert part in text
    assert all(f">{drawn.label}<" in text for drawn in plot.FORMS.values())


def test_plot_says_when_there_is_nothing_to_draw(tmp_path, capsys):
    path = tmp_path / "h200.jsonl"
    record.append(path, timed_row("triton", 1, 1.0))
    assert main(["plot", "--record", str(path), "--output", str(tmp_path)]) == 2
    assert "needs 3 numbers of tokens" in capsys.readouterr().out


def test_every_implementation_has_a_style_of_its_own():
    others = ["vllm", "sglang"]
    names = [*pallas_qk.IMPLEMENTATIONS, "xla_plain", "oracle", "copy", "triton_in_place", *others]
    names += ["triton_alone", "xla_plain_then_set", "mosaic_gpu_then_set"]
    for together in (names, plot.FORMS):
        looks = {(plot.style(name, others).color, plot.style(name, others).line) for name in together}
        assert len(looks) == len(together)
    assert set(plot.FORMS) <= set(decode.FORMS)
    assert [name for name in names if not plot.is_known(name)] == others
    assert plot.style("triton_then_set", others).label == "pallas-qk, Triton, then .at[slots].set"


def test_the_best_share_is_that_of_a_kernel_that_does_all_of_it():
    rows = [timed_row("copy", 1, 1.0), timed_row("mosaic_gpu_alone", 1, 1.0, 1.0), timed_row("triton", 1, 2.0, 1.0)]
    assert table.markdown(rows).splitlines()[-1] == "| 16/2 | 1 | 1.00 | 1.00 | 2.00 | 0.50 |"
