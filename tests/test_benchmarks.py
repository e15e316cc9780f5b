"""The benchmark: attribution of kernels to providers, statistics, the record, the promises it checks, its commands."""

import dataclasses
import functools
import importlib.util
import json
import re
import subprocess
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.profiler import ProfileData

from benchmarks import demo, gradients, machine, operations, providers, record, suites, table, verify, xplane
from benchmarks.__main__ import main, parser
from benchmarks.agreement import agreement
from benchmarks.floor import minimum_bytes
from benchmarks.providers import PROVIDERS
from benchmarks.suites import Task
from benchmarks.timing import FLUSH_NAME, MARKER_NAME, Samples, attribute, default_repeats, measure
from benchmarks.xplane import Kernel, MeasurementError, Profile
from tests import tolerances
from tests.cases import Case, make_inputs
from tests.definition import define

CASE = Case(37, 16, 2)

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None,
    reason="needs torch and triton",
)


# --- the timeline -------------------------------------------------------------------------------------------------


def timeline(*names: str, durations: dict[str, float] | None = None) -> list[Kernel]:
    """Kernels one after another, 1 us each unless said."""
    durations = durations or {}
    return [Kernel(name, 2000.0 * i, durations.get(name, 1000.0)) for i, name in enumerate(names)]


def section(*kernels: str, calls: int) -> list[str]:
    return [MARKER_NAME, *kernels * calls]


def test_attribution_cuts_sections_at_markers_and_sums_the_kernels_of_a_call():
    ours, plain = section("ours", calls=3), section("reduce", "fusion", calls=3)
    events = timeline(MARKER_NAME, *ours, *plain, *plain, *ours, MARKER_NAME, "later", durations={"fusion": 500.0})
    samples = attribute(events, ["triton", "xla", "xla", "triton"], warmup=1, repeats=2)
    assert samples == {
        "triton": Samples((1.0,) * 4, ("ours",)),
        "xla": Samples((1.5,) * 4, ("reduce", "fusion")),
    }


def test_attribution_does_not_count_warmup_calls():
    events = [*timeline(MARKER_NAME), Kernel("ours", 10, 9000), Kernel("ours", 20, 1000)]
    events += [Kernel("ours", 30, 3000), Kernel(MARKER_NAME, 40, 1)]
    assert attribute(events, ["triton"], warmup=1, repeats=2)["triton"].times_us == (1.0, 3.0)


def test_attribution_does_not_count_flushes():
    events = timeline(MARKER_NAME, FLUSH_NAME, "ours", FLUSH_NAME, "ours", MARKER_NAME, durations={FLUSH_NAME: 1e6})
    assert attribute(events, ["triton"], warmup=1, repeats=1)["triton"].times_us == (1.0,)


def test_two_providers_with_the_same_kernel_stay_apart():
    events = timeline(*section("ours", calls=2), *section("ours", calls=2), MARKER_NAME)
    samples = attribute(events, ["a", "b"], warmup=0, repeats=2)
    assert [len(samples[name].times_us) for name in ("a", "b")] == [2, 2]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        pytest.param([MARKER_NAME, "k", "k", "k", MARKER_NAME], "each of 2 calls, got {'k': 3}", id="one kernel extra"),
        pytest.param([MARKER_NAME, "k", MARKER_NAME], "each of 2 calls, got {'k': 1}", id="one kernel lost"),
        pytest.param([MARKER_NAME, MARKER_NAME], "each of 2 calls, got {}", id="empty section"),
        pytest.param([MARKER_NAME, "k", "memset", MARKER_NAME], "got {'k': 1, 'memset': 1}", id="one call differs"),
        pytest.param(
            [MARKER_NAME, "a", "a", "b", "b", MARKER_NAME],
            "in each call, got ['a', 'a'] and ['b', 'b']",
            id="not periodic",
        ),
        pytest.param([MARKER_NAME, "k", "k"], f"must hold 2 kernels {MARKER_NAME}, got 1 among", id="marker lost"),
    ],
)
def test_attribution_refuses_what_does_not_fit_the_plan(names, message):
    with pytest.raises(MeasurementError, match=re.escape(message)):
        attribute(timeline(*names), ["triton"], warmup=1, repeats=1)


def test_attribution_refuses_a_provider_that_changes_between_rounds():
    events = timeline(*section("a", calls=2), *section("b", calls=2), MARKER_NAME)
    with pytest.raises(MeasurementError, match=re.escape("in all rounds, got ('a',) and ('b',)")):
        attribute(events, ["triton", "triton"], warmup=1, repeats=1)


def test_a_marker_lost_in_the_middle_is_noticed_in_spite_of_the_leading_ones():
    names = [MARKER_NAME, MARKER_NAME, *section("a", calls=2), *["b"] * 2, MARKER_NAME]
    with pytest.raises(MeasurementError, match="each of 2 calls"):
        attribute(timeline(*names), ["a", "b"], warmup=1, repeats=1)


PROFILE = """
planes { id: 1 name: "%s"
  lines { id: 7 name: "%s" timestamp_ns: 1000
    events { metadata_id: 2 offset_ps: 5000000 duration_ps: 1184000 }
    events { metadata_id: 1 offset_ps: 1000000 duration_ps: 900000 } }
  lines { id: 13 name: "Stream #13(Kernel,MemcpyD2D)" timestamp_ns: 1000
    events { metadata_id: 3 offset_ps: 3000000 duration_ps: 2500000 } }
  lines { id: 99 name: "XLA Ops" timestamp_ns: 1000
    events { metadata_id: 3 offset_ps: 3000000 duration_ps: 2500000 } }
  event_metadata { key: 1 value { id: 1 name: "first" } }
  event_metadata { key: 2 value { id: 2 name: "last" } }
  event_metadata { key: 3 value { id: 3 name: "between" } } }
planes { id: 2 name: "/host:CPU" lines { id: 1 name: "Stream of a host" } }
"""


def read_profile(path, text: str) -> Profile:
    path.write_bytes(ProfileData.text_proto_to_serialized_xspace(text))
    return xplane.read(path)


def test_kernel_events_of_all_streams_come_in_order_of_their_start(tmp_path):
    profile = read_profile(tmp_path / "a.xplane.pb", PROFILE % ("/device:GPU:0", "Stream #7(Kernel)"))
    assert [(kernel.name, kernel.duration_ns) for kernel in profile.kernels] == [
        ("first", 900.0),
        ("between", 2500.0),
        ("last", 1184.0),
    ]


def test_events_of_several_gpus_stay_apart(tmp_path):
    text = PROFILE % ("/device:GPU:0", "Stream #7(Kernel)")
    # The planes as the profiler writes them for a GPU that ran one kernel and one that ran none.
    text += """
planes { id: 3 name: "/device:GPU:1" lines { id: 7 name: "Stream #7(Kernel)" timestamp_ns: 1000
    events { metadata_id: 1 offset_ps: 1000000 duration_ps: 800000 } }
  event_metadata { key: 1 value { id: 1 name: "first" } } }
planes { id: 4 name: "/device:GPU:2" lines { id: 7 name: "Stream #7(Kernel)" } }
"""
    profile = read_profile(tmp_path / "a.xplane.pb", text)
    assert {name: [kernel.duration_ns for kernel in kernels] for name, kernels in profile.by_device().items()} == {
        "/device:GPU:0": [900.0, 2500.0, 1184.0],
        "/device:GPU:1": [800.0],
    }
    assert len(profile.kernels) == 4


def test_a_profile_without_a_gpu_says_what_it_holds(tmp_path):
    with pytest.raises(MeasurementError, match=re.escape("/device:TPU:0 / Steps")):
        read_profile(tmp_path / "a.xplane.pb", PROFILE % ("/device:TPU:0", "Steps"))


def test_a_trace_without_kernels_is_an_error():
    with pytest.raises(MeasurementError, match="JAX must find CUPTI"):
        xplane.profile(lambda: None)


def test_a_folder_holds_one_profile(tmp_path):
    for number, message in enumerate(("got 0", None, "got 2")):
        if message:
            with pytest.raises(MeasurementError, match=f"must write one .xplane.pb file, {message}"):
                xplane.file_in(tmp_path)
        path = tmp_path / f"{number}.xplane.pb"
        path.write_bytes(b"")
        if number == 0:
            assert xplane.file_in(tmp_path) == path


def test_the_kernels_that_cut_the_timeline_have_the_names_looked_for():
    pytest.importorskip("triton", reason="needs triton")
    from benchmarks import gpu_kernels

    assert gpu_kernels.benchmark_section_marker.fn.__name__ == MARKER_NAME
    assert gpu_kernels.benchmark_flush_l2.fn.__name__ == FLUSH_NAME


def test_percentiles():
    samples = Samples(tuple(float(i) for i in range(11)), ("k",))
    assert [samples.percentile(q) for q in (20, 50, 80)] == [2.0, 5.0, 8.0]
    assert samples.p50_us == 5.0


def test_long_calls_are_repeated_less():
    assert [default_repeats(Case(t)) for t in (1, 4096, 65536)] == [40, 15, 8]


# --- the record ---------------------------------------------------------------------------------------------------

FIELDS = {
    "run": str,
    "gpu": str,
    "suite": str,
    "op": str,
    "implementation": str,
    "num_tokens": int,
    "num_q_heads": int,
    "num_kv_heads": int,
    "head_dim": int,
    "rotary_dim": int,
    "dtype": str,
    "cache": str,
    "p25_us": float,
    "p50_us": float,
    "p75_us": float,
    "kernels": int,
    "bytes": int,
    "gb_per_s": float,
    "copy_gb_per_s": float,
    "fraction_of_copy": float,
    "checked": dict,
    "versions": dict,
}


def recorded(tmp_path, run: str = "r") -> record.Run:
    return record.Run(run, "NVIDIA H200", machine.versions("abc"), tmp_path / "results" / "h200.jsonl")


def read(path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def append_row(run: record.Run, checked: dict[str, Any]) -> dict[str, Any]:
    """A row as `run` writes it, read back."""
    samples, copy = Samples((2.0, 4.0, 6.0), ("k",)), Samples((3.0,), ("copy",))
    fields = record.case_fields(CASE, "triton", "forward") | {"cache": "hot"}
    fields |= record.time_fields(samples, copy, minimum_bytes(CASE)) | {"checked": checked}
    run.append("decode", fields)
    return read(run.output)[-1]


def test_a_row_has_every_field_in_order_and_of_its_type(tmp_path):
    row = append_row(recorded(tmp_path), {"elements": 1})
    assert without_clocks(row) == list(FIELDS)
    assert {name: type(row[name]) for name in FIELDS} == FIELDS
    assert list(row["versions"]) == ["jax", "jaxlib", "torch", "triton", "python", "driver", "commit", "date"]
    assert row["versions"]["commit"] == "abc" and row["versions"]["jax"] == jax.__version__
    assert (row["suite"], row["run"], row["gpu"]) == ("decode", "r", "NVIDIA H200")


def without_clocks(row: dict[str, Any]) -> list[str]:
    """The names of a row's fields but for `clocks`, which a machine without nvidia-smi leaves out."""
    return [name for name in row if name != "clocks"]


def play_nvidia_smi(monkeypatch, answer: str | None) -> list[tuple[str, ...]]:
    """Stands in for nvidia-smi, absent where `answer` is None; what it was called with."""
    calls = []

    def run(command, **settings):
        if command[0] != "nvidia-smi":
            return subprocess_run(command, **settings)
        calls.append(command)
        if answer is None:
            raise FileNotFoundError(command[0])
        return subprocess.CompletedProcess(command, 0, f"{answer}\n", "")

    subprocess_run = subprocess.run
    monkeypatch.setattr(subprocess, "run", run)
    return calls


@pytest.mark.parametrize(
    ("answer", "found", "reasons"),
    [
        (
            "1980, 1980, 0x0000000000000000, 41",
            {"sm_mhz": 1980, "max_sm_mhz": 1980, "reasons": "0x0", "celsius": 41},
            None,
        ),
        (
            "345, 1980, 0x0000000000000001, 30",
            {"sm_mhz": 345, "max_sm_mhz": 1980, "reasons": "0x1", "celsius": 30},
            None,
        ),
        ("1500, 1980, 0x6, 70", {"sm_mhz": 1500, "max_sm_mhz": 1980, "reasons": "0x6", "celsius": 70}, None),
        (
            "915, 1980, 0x0000000000000024, 88",
            {"sm_mhz": 915, "max_sm_mhz": 1980, "reasons": "0x24", "celsius": 88},
            "(thermal slowdown by the driver; clocks_event_reasons.active 0x24): 915 of 1980 MHz at 88 degrees",
        ),
        (
            "[N/A], 1980, 0xc8, [N/A]",
            {"max_sm_mhz": 1980, "reasons": "0xc8"},
            "(hardware slowdown, thermal slowdown by the hardware, power brake; clocks_event_reasons.active 0xc8): "
            "? of 1980 MHz at ? degrees",
        ),
        ("No devices were found", {}, None),
        (None, {}, None),
    ],
)
def test_clocks_are_read_and_a_slowed_gpu_is_named(monkeypatch, answer, found, reasons):
    play_nvidia_smi(monkeypatch, answer)
    assert machine.clocks() == found
    warning = machine.slowdown(found)
    assert (warning is None) is (reasons is None)
    if reasons:
        assert warning.startswith(f"The GPU is slowed {reasons}.")


@pytest.mark.parametrize(("visible", "gpu"), [(None, "0"), ("", "0"), ("3,1", "3"), ("GPU-8a", "GPU-8a")])
def test_the_clocks_are_those_of_the_first_gpu_that_jax_sees(monkeypatch, visible, gpu):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    calls = play_nvidia_smi(monkeypatch, "1, 2, 0x0, 3")
    machine.clocks()
    query = "--query-gpu=clocks.sm,clocks.max.sm,clocks_event_reasons.active,temperature.gpu"
    assert calls == [("nvidia-smi", query, "--format=csv,noheader,nounits", f"--id={gpu}")]


def test_rows_have_the_clocks_at_the_start_of_their_run_and_where_they_were_measured(monkeypatch, tmp_path):
    play_nvidia_smi(monkeypatch, "1980, 1980, 0x0, 41")
    recording = record.new_run(tmp_path / "a.jsonl", "abc")
    calls = play_nvidia_smi(monkeypatch, "915, 1980, 0x20, 88")
    recording.append("decode", {"op": "forward"}, {"op": "backward"})
    assert len(calls) == 1
    assert [(row["op"], row["clocks"]) for row in read(recording.output)] == [
        (
            op,
            {
                "start": {"sm_mhz": 1980, "max_sm_mhz": 1980, "reasons": "0x0", "celsius": 41},
                "end": {"sm_mhz": 915, "max_sm_mhz": 1980, "reasons": "0x20", "celsius": 88},
            },
        )
        for op in ("forward", "backward")
    ]
    play_nvidia_smi(monkeypatch, None)
    recording = record.new_run(tmp_path / "b.jsonl", "abc")
    recording.append("decode", {"op": "forward"})
    assert list(read(recording.output)[0]) == ["run", "gpu", "suite", "op", "versions"]
    assert recording.versions["driver"] == "unknown"


def test_rates_and_fraction_come_from_the_medians(tmp_path):
    row = append_row(recorded(tmp_path), {})
    total = minimum_bytes(CASE)
    assert (row["p25_us"], row["p50_us"], row["p75_us"], row["kernels"]) == (3.0, 4.0, 5.0, 1)
    assert (row["gb_per_s"], row["copy_gb_per_s"]) == (round(total / 4e3, 1), round(total / 3e3, 1))
    assert row["fraction_of_copy"] == 0.75


def test_rows_are_only_appended(tmp_path):
    run = recorded(tmp_path)
    before = ""
    for elements in (1, 2):
        row = append_row(run, {"elements": elements})
        text = run.output.read_text()
        assert text.startswith(before) and row["checked"] == {"elements": elements}
        before = text
    assert record.read([run.output, run.output]) == 2 * read(run.output)


def test_a_broken_line_of_a_record_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"run": "r"}\nrun\n')
    with pytest.raises(ValueError, match=re.escape(f"got {path}:2:")):
        record.read([path])


def test_a_run_is_found_by_the_beginning_of_its_id():
    rows = [{"run": "20260101-a"}, {"run": "20260102-b"}, {"run": "20260101-a"}]
    assert record.of_run(rows, "20260101") == [rows[0], rows[2]]
    with pytest.raises(ValueError, match=r"got 2\. The record holds 20260101-a, 20260102-b"):
        record.of_run(rows, "2026")
    with pytest.raises(ValueError, match=r"got 0\. The record holds 20260101-a, 20260102-b"):
        record.of_run(rows, "2027")


@pytest.mark.parametrize(
    ("changes", "op"),
    [
        ({}, "forward"),
        ({"norm_beta": 1.0}, "forward"),
        ({"cache_dtype": "bfloat16", "weight_dtype": "bfloat16"}, "forward"),
        ({"mrope_section": (11, 11, 10)}, "forward_mrope"),
        ({"cache_dtype": "float32"}, "forward_float32_table"),
        ({"mrope_section": (11, 11, 10), "weight_dtype": "float32"}, "forward_mrope_float32_weights"),
        ({"mrope_section": (11, 11, 10), "mrope_layout": "sectioned"}, "forward_mrope_sectioned"),
        ({"gate": "in_place"}, "forward_gate_in_place"),
        ({"gate": None}, "forward_no_gate"),
        ({"packed": True, "gathered": True}, "forward_packed_table_row_a_token"),
        ({"rotation": "pairs"}, "forward_pairs"),
        ({"round_norm": False}, "forward_unrounded_norm"),
        ({"norm_order": "rotation_first"}, "forward_rotation_first"),
        ({"rotary_dim": 0, "norm_order": "rotation_first"}, "forward_no_table"),
        ({"weights": False, "packed": True, "v_norm": True}, "forward_packed_no_weights_v_norm"),
        ({"rotation": "pairs", "round_norm": False, "mrope_section": (1, 0, 0)}, "forward_pairs_unrounded_norm_mrope"),
    ],
)
def test_only_the_plain_contract_is_recorded_as_forward(changes, op):
    assert record.op_name(dataclasses.replace(CASE, **changes)) == op


def test_run_ids_differ_and_files_are_named_by_gpu():
    assert record.new_run_id() != record.new_run_id()
    assert record.gpu_slug("NVIDIA H200") == "h200"
    assert record.gpu_slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"
    assert record.default_path("NVIDIA H200").parts[-3:] == ("benchmarks", "results", "h200.jsonl")


# --- the baseline and the promises --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("mrope_section", [None, (11, 11, 10)])
def test_xla_plain_is_the_op(dtype, mrope_section):
    case = Case(37, 3, 2, 128, 64, dtype, mrope_section=mrope_section, norm_beta=1.0)
    inputs = make_inputs(case)
    defined = define(case, inputs)
    q_out, k_out, gate_out = PROVIDERS["xla_plain"](case, inputs)()
    assert np.all(np.abs(np.asarray(q_out, np.float64) - defined.q_out) <= defined.q_bound)
    assert np.all(np.abs(np.asarray(k_out, np.float64) - defined.k_out) <= defined.k_bound)
    assert np.array_equal(np.asarray(gate_out, np.float64), defined.gate_out)


# --- measuring, on a device that is played ------------------------------------------------------------------------


class Device:
    """Stands for the GPU and its profiler: what was launched, in order."""

    def __init__(self):
        self.events: list[Kernel] = []
        self.tracing = False

    def launch(self, name: str, duration_us: float = 1.0) -> None:
        if self.tracing:
            self.events.append(Kernel(name, 1e4 * len(self.events), 1e3 * duration_us))

    def profile(self, run) -> Profile:
        self.events, self.tracing = [], True
        run()
        self.tracing = False
        return Profile(tuple(self.events))


class Output:
    """What a played call returns; JAX would give a second one another buffer while the first lives."""

    alive = 0

    def __init__(self):
        assert Output.alive == 0, "the previous outputs must be gone before the next call"
        Output.alive += 1

    def __del__(self):
        Output.alive -= 1


@pytest.fixture
def device(monkeypatch):
    for package in ("torch", "triton"):
        pytest.importorskip(package, reason=f"needs {package}")
    from benchmarks import gpu_kernels

    device = Device()

    class Markers:
        def __init__(self, flush_bytes=0):
            self.flush_bytes = flush_bytes

        def mark(self):
            device.launch(MARKER_NAME)

        def flush_l2(self):
            assert self.flush_bytes > 0
            device.launch(FLUSH_NAME, 100.0)

    monkeypatch.setattr(gpu_kernels, "Markers", Markers)
    monkeypatch.setattr(xplane, "profile", device.profile)
    return device


@pytest.mark.parametrize("cache", ["hot", "cold"])
def test_measure_times_each_provider_in_every_round_and_drops_outputs(device, cache):
    def provider(*kernels):
        def call():
            for name, duration_us in kernels:
                device.launch(name, duration_us)
            return Output()

        return call

    providers = {"one": provider(("k", 2.0)), "two": provider(("a", 3.0), ("b", 4.0))}
    samples = measure(CASE, providers, repeats=3, rounds=4, cache=cache)
    assert samples == {"one": Samples((2.0,) * 12, ("k",)), "two": Samples((7.0,) * 12, ("a", "b"))}
    order = [event.name for event in device.events if event.name in ("k", "a")]
    assert order[:5] == ["k"] * 5 and order[10:15] == ["a"] * 5  # the second round begins with the other provider
    flushes = sum(event.name == FLUSH_NAME for event in device.events)
    assert flushes == (0 if cache == "hot" else 2 * 4 * 5)


def test_measure_measures_anew_when_the_profiler_loses_an_event_and_gives_up_in_the_end(device, monkeypatch):
    losses = iter([1, 0, 1, 1, 1])

    def lossy_profile(run):
        *kernels, last_marker = device.profile(run).kernels
        return Profile((*kernels[: len(kernels) - next(losses)], last_marker))

    def call():
        device.launch("k")

    monkeypatch.setattr(xplane, "profile", lossy_profile)
    assert len(measure(CASE, {"one": call}, repeats=2, rounds=2)["one"].times_us) == 4
    message = f"{CASE.id}: one must launch the same kernels in each of 4 calls"
    with pytest.raises(MeasurementError, match=re.escape(message)):
        measure(CASE, {"one": call}, repeats=2, rounds=2)


def shown_samples() -> dict[str, Samples]:
    return {"copy": Samples((1.0,), ("c",)), "oracle": Samples((4.0,), ("o",)), "triton": Samples((2.0,), ("t",))}


def test_the_table_shows_time_share_of_copy_and_ratio_to_the_oracle():
    text = table.times({Case(1): shown_samples(), Case(65536): shown_samples()}, ["oracle", "triton", "xla"])
    lines = [line.split() for line in text.splitlines()]
    assert lines[1] == ["1", "1.00", "4.00", "0.250", "2.00", "0.500", "0.500", "-", "-", "-"]
    assert len({len(line) for line in text.splitlines()}) == 1


# --- what is promised ---------------------------------------------------------------------------------------------


def outputs(case: Case):
    """(q_out, k_out, gate_out) of random values in the range of real ones."""
    heads = (case.num_q_heads, case.num_kv_heads, case.num_q_heads)
    return [
        jax.random.normal(jax.random.key(seed), (case.num_tokens, num_heads * case.head_dim)).astype(case.dtype)
        for seed, num_heads in enumerate(heads)
    ]


def stepped(x: jax.Array, row: int | slice, column: int, steps: int) -> jax.Array:
    """x with the elements of a column moved away from 0 by some representable steps."""
    integer = {2: jnp.int16, 4: jnp.int32}[x.dtype.itemsize]
    bits = jax.lax.bitcast_convert_type(x, integer).at[row, column].add(steps)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


REST, ROTATED = 200, 3  # columns of head 0, D = 256, R = 64


@pytest.mark.parametrize(
    ("implementation", "case", "output", "column", "steps", "kept"),
    [
        ("triton", CASE, 0, REST, 0, True),
        ("triton", CASE, 0, REST, 1, False),
        ("mosaic_gpu", CASE, 1, ROTATED, 1, False),
        ("xla", CASE, 0, ROTATED, 1, False),
        ("xla", dataclasses.replace(CASE, cache_dtype="float32"), 0, ROTATED, 1, True),
        ("xla", dataclasses.replace(CASE, cache_dtype="float32"), 0, ROTATED, 20, False),
        ("xla", dataclasses.replace(CASE, cache_dtype="float32"), 2, REST, 1, False),
        ("xla_plain", CASE, 1, REST, 1, True),
        ("xla_plain", CASE, 1, REST, 2, False),
        ("xla_plain", CASE, 2, REST, 1, False),
        ("triton", dataclasses.replace(CASE, dtype="float32"), 0, REST, 1, False),
        ("triton", dataclasses.replace(CASE, dtype="float32", head_dim=32, rotary_dim=16), 0, 17, 8, True),
        ("xla", dataclasses.replace(CASE, dtype="float32"), 0, REST, 8, True),
        ("xla", dataclasses.replace(CASE, dtype="float32"), 0, REST, 100, False),
        ("xla", dataclasses.replace(CASE, dtype="float32"), 2, REST, 1, False),
    ],
)
def test_agreement_keeps_to_the_promise(implementation, case, output, column, steps, kept):
    want = outputs(case)
    got = [stepped(x, 5, column, steps) if i == output else x for i, x in enumerate(want)]
    result = agreement(implementation, case, got, want, platform="gpu")
    assert (result.kept, result.differing, result.elements) == (kept, int(steps > 0), case.num_outputs)
    assert ("BROKEN" in str(result)) is not kept


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("column", [ROTATED, REST])
def test_a_nan_of_one_side_breaks_every_promise(dtype, column):
    case = Case(37, cache_dtype="float32", dtype=dtype)
    want = outputs(case)
    got = [want[0].at[1, column].set(jnp.nan), *want[1:]]
    for a, b in ((got, want), (want, got)):
        assert not agreement("xla", case, a, b, platform="gpu").kept


def test_too_many_differing_elements_break_the_promise_though_each_is_near():
    case = Case(37, cache_dtype="float32")
    want = outputs(case)
    allowed = tolerances.max_differing(case, case.num_outputs)
    assert 0 < allowed < 37
    for count, kept in ((allowed, True), (allowed + 1, False)):
        got = [stepped(want[0], slice(count), REST, 1), *want[1:]]
        assert agreement("xla", case, got, want, platform="gpu").kept is kept


def test_xla_promises_bits_on_a_gpu_for_a_16_bit_table_and_a_power_of_two():
    cases = {case: tolerances.max_differing_fraction(case) for case in suites.parity_gpu() if case.dtype != "float32"}
    for case, fraction in cases.items():
        bits = case.cache_dtype != "float32" and case.head_dim in (8, 64, 128, 256, 512) and case.round_norm
        assert (fraction == 0.0) is bits, case
        assert fraction < 5e-4


def test_norms_that_are_not_rounded_differ_in_rotated_lanes_and_by_one_ulp():
    """On a CPU as well, where they come on top of what the interpreter does."""
    case = Case(64, dtype="float16")
    unrounded = dataclasses.replace(case, round_norm=False)
    both = [(x, platform) for platform in ("gpu", "cpu") for x in (case, unrounded)]
    gpu, gpu_more, cpu, cpu_more = (tolerances.max_differing_fraction(*x) for x in both)
    assert gpu == 0 < gpu_more == pytest.approx(cpu_more - cpu)
    assert [tolerances.max_pair_ulps(*x) for x in both] == [1, 1, pytest.approx(1 + 8**0.5), 1]


@pytest.mark.parametrize("dtype, unit, distance", [(jnp.float32, 2.0**-23, 2.0**-23), (jnp.bfloat16, 2.0**-7, 1.0)])
@pytest.mark.parametrize("rotation, partner", [("halves", 7), ("pairs", 2)])
def test_distances_of_rotated_lanes_are_measured_in_the_pair(dtype, unit, distance, rotation, partner):
    """Lane 3 cancels to 0, and its partner is smaller than every other lane."""
    want = jnp.full((1, 16), 4.0, dtype).at[0, 3].set(0.0).at[0, partner].set(1.0)
    found = tolerances.worst_distances(want.at[0, 3].set(unit), want, 16, 8, rotation)
    assert [float(x) for x in found] == [distance, 0.0]


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_ulp_distance_counts_representable_steps(dtype):
    one = jnp.ones((), dtype)
    above, tiny = jnp.nextafter(one, jnp.asarray(2, dtype)), jnp.finfo(dtype).smallest_subnormal
    a = jnp.stack(
        [one, above, jnp.asarray(0.0, dtype), -tiny, -one, jnp.asarray(jnp.nan, dtype), jnp.asarray(jnp.nan, dtype)]
    )
    b = jnp.stack([one, one, jnp.asarray(-0.0, dtype), tiny, -above, jnp.asarray(jnp.nan, dtype), one])
    assert tolerances.ulp_distance(a, b).tolist() == [0, 1, 0, 2, 1, 0, 2**32 - 1]
    assert tolerances.ulp_distance(b, a).tolist() == tolerances.ulp_distance(a, b).tolist()


# --- the commands -------------------------------------------------------------------------------------------------


def test_arguments_of_run():
    options = parser(["oracle", "triton"]).parse_args(["run"])
    tasks = suites.timed(options.suite, options.tokens, options.heads)
    assert tasks == suites.timed() and len(tasks) == 16
    assert (options.implementations, options.cache, options.repeats) == (["oracle", "triton"], ["hot"], None)
    arguments = "run --suite decode backward --tokens 1 64 --heads 16/4 --dtype float16 --cache hot cold"
    options = parser(["triton"]).parse_args(arguments.split())
    assert options.cache == ["hot", "cold"]
    assert suites.timed(options.suite, options.tokens, options.heads, dtype=options.dtype) == [
        Task(suite, op, Case(t, 16, 4, dtype="float16"))
        for suite, op in (("decode", "forward"), ("backward", "backward"))
        for t in (1, 64)
    ]


def test_suites_cover_what_they_say():
    tokens = {name: {task.case.num_tokens for task in suites.timed([name])} for name in ("decode", "prefill")}
    assert (min(tokens["decode"]), max(tokens["decode"])) == (1, 256)
    assert (min(tokens["prefill"]), max(tokens["prefill"])) == (512, 2**20)
    heads = {(task.case.num_q_heads, task.case.num_kv_heads) for task in suites.timed(["sizes"])}
    assert set(suites.MODEL_HEADS) <= heads and {q for q, _ in heads} == {1, 2, 3, 4, 6, 8, 12, 16, 24, 32}
    assert {case.rotary_dim for case in suites.compiled()} >= {64, 40, 6, 2}
    qwen3 = suites.timed(["qwen3"])
    assert {(task.case.num_q_heads, task.case.num_kv_heads) for task in qwen3} == {(16, 8), (32, 8), (64, 8)}
    assert {(task.case.head_dim, task.case.rotary_dim) for task in qwen3} == {(128, 128)}
    (changed,) = suites.timed(["qwen3"], [1], [(2, 1)], head_dim=64)[:1]
    assert changed.case == Case(1, 2, 1, 64, 128)
    assert [(task.op, task.case.num_tokens) for task in suites.timed(["options"])] == [
        (op, num_tokens) for op in suites.SUITES["options"].ops for num_tokens in (64, 1024, 16384)
    ]
    assert len(suites.SUITES["options"].ops) == 8 and set(suites.SUITES["options"].ops) <= set(operations.OPERATIONS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run --heads 16", "heads are query/key counts such as 16/2, got 16"),
        ("run --heads 16/0", "got 16/0"),
        ("run --tokens 0", "must be a positive integer, got 0"),
        ("run --implementations cuda", "invalid choice: 'cuda'"),
        ("run --suite serving", "invalid choice: 'serving'"),
        ("profile", "required: --output"),
        ("", "required: command"),
    ],
)
def test_bad_arguments_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parser(["triton"]).parse_args(arguments.split())
    assert message in capsys.readouterr().err


def test_commands_name_what_is_missing_and_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo"]) == 1
    assert "got no torch and no triton. Run pip install 'pallas-qk[torch]'" in capsys.readouterr().err


@needs_triton
def test_verify_compares_with_the_interpreted_oracle_and_fails_when_a_promise_is_broken(monkeypatch, capsys):
    cases = [Case(2, 3, 1, 64, 32, "float16"), Case(1, 1, 3, 64, 64, "bfloat16", mrope_section=(11, 11, 10))]
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        assert verify.verify(cases, ("xla",), "cpu") == 0
        printed = capsys.readouterr().out
        assert all(case.id in printed for case in cases)
        total = sum(case.num_outputs for case in cases)
        assert f"xla: {total:,} elements compared" in printed and "promises broken in 0 cases" in printed

        def wrong(case, inputs):
            return lambda: jax.tree.map(jnp.negative, PROVIDERS["xla_plain"](case, inputs)())

        monkeypatch.setitem(PROVIDERS, "xla", wrong)
        assert verify.verify(cases, ("xla",), "cpu") == 1
        assert "promises broken in 2 cases" in capsys.readouterr().out


@needs_triton
def test_demo_shows_each_shape_and_says_whether_it_agrees(monkeypatch, capsys):
    case = Case(1, 2, 1, 64, 32, "float16")
    monkeypatch.setattr(suites, "shown", lambda platform: [("a model", case)])
    with jax.default_device(jax.devices("cpu")[0]):
        assert demo.demo("cpu") == 0
        printed = capsys.readouterr().out
        assert "a model" in printed and f"of {case.num_outputs} elements differ in float16" in printed
        monkeypatch.setitem(PROVIDERS, "xla", lambda *_: lambda: outputs(case))
        assert demo.demo("cpu") == 1
        assert "does NOT agree" in capsys.readouterr().out


@needs_triton
def test_run_records_only_what_keeps_its_promise(device, monkeypatch, tmp_path, capsys):
    from benchmarks import run

    case = Case(4, 1, 1, 64, 32)
    right = outputs(case)

    def provider(duration_us, result):
        def call():
            device.launch(f"kernel_{duration_us}", duration_us)
            return result

        return lambda case, inputs: call

    def unable(case, inputs):
        def call():
            raise NotImplementedError("it needs a newer GPU")

        return call

    wrong = [right[0], right[1], -right[2]]
    played = {
        "oracle": provider(8.0, right),
        "triton": provider(4.0, right),
        "xla": provider(9.0, wrong),
        "new": unable,
    }
    monkeypatch.setattr(operations, "PROVIDERS", played)
    play_copies_and_memory(monkeypatch, run, device)
    recording = recorded(tmp_path)
    task = Task("decode", "forward", case)
    assert run.run([task], played, run.Settings(repeats=2, rounds=2), recording) == 1

    rows = {row["implementation"]: row for row in read(recording.output)}
    assert list(rows) == ["copy", "oracle", "triton"]
    assert [(row["p50_us"], row["fraction_of_copy"]) for row in rows.values()] == [(2.0, 1.0), (8.0, 0.25), (4.0, 0.5)]
    printed = capsys.readouterr().out
    assert f"{case.id}: xla 256 of 768 differ" in printed
    assert "BROKEN, promised equal bits; first: gate_out[0, 0]" in printed
    assert f"{case.id}: new skipped: it needs a newer GPU" in printed
    assert printed.splitlines()[-3].split() == ["4", "2.00", "8.00", "0.250", "4.00", "0.500", "0.500"]

    before = len(read(recording.output))
    kept = {name: played[name] for name in ("oracle", "triton")}
    assert run.run([task], kept, run.Settings(repeats=2, rounds=2, caches=("hot", "cold")), recording) == 0
    assert "skipped" not in capsys.readouterr().out
    rows = read(recording.output)[before:]
    assert [(row["implementation"], row["cache"]) for row in rows] == [
        (name, cache) for cache in ("hot", "cold") for name in ("copy", "oracle", "triton")
    ]


def play_copies_and_memory(monkeypatch, run, device: Device, gigabytes: float = 100.0) -> None:
    """Without a GPU: copies that the played device runs, and a size of its memory."""
    copies = {name: functools.partial(device.launch, name, time_us) for name, time_us in COPIES.items()}
    monkeypatch.setattr(operations, "to_jax", list)
    monkeypatch.setattr(run, "copy_calls", lambda total_bytes: copies)
    monkeypatch.setattr(run, "gpu_memory", lambda: int(gigabytes * 1e9))


@needs_triton
def test_run_skips_what_the_gpu_cannot_hold_and_says_why(device, monkeypatch, tmp_path, capsys):
    from benchmarks import run

    def full(case, inputs):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of memory while trying to allocate\nmore")

    monkeypatch.setattr(operations, "PROVIDERS", {"oracle": full})
    play_copies_and_memory(monkeypatch, run, device, gigabytes=1)
    tasks = [Task("prefill", "forward", Case(t, 1, 1, 64, 32)) for t in (2**20, 4)]
    assert run.run(tasks, {"oracle": full}, run.Settings(), recorded(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert f"forward {tasks[0].case.id} skipped: it needs some 2 GB of GPU memory, got 1" in printed
    assert f"forward {tasks[1].case.id} skipped: the GPU's memory did not hold it: RESOURCE_EXHAUSTED" in printed
    assert "more" not in printed  # the first line of the error is enough

    def broken(case, inputs):
        raise RuntimeError("something else")

    monkeypatch.setattr(operations, "PROVIDERS", {"oracle": broken})
    with pytest.raises(RuntimeError, match="something else"):
        run.run(tasks[1:], {"oracle": broken}, run.Settings(), recorded(tmp_path))


@needs_triton
def test_the_command_run_checks_and_records_each_suite(monkeypatch, tmp_path, capsys):
    from benchmarks import __main__, run

    def measured(case, calls, **settings):
        assert case.id == "T2-H3.1-D64-R64-float16" and settings == {"repeats": 3, "rounds": 2, "cache": "hot"}
        return {name: Samples((2.0,), ("k",)) for name in calls}

    monkeypatch.setattr(__main__, "missing", lambda command: None)
    monkeypatch.setattr(run, "measure", measured)
    monkeypatch.setattr(run, "copy_calls", lambda total_bytes: {"copy_512x4": None})
    monkeypatch.setattr(run, "gpu_memory", lambda: 10**9)
    play_nvidia_smi(monkeypatch, "915, 1980, 0x20, 88")
    output = tmp_path / "results.jsonl"
    shape = "--tokens 2 --heads 3/1 --head-dim 64 --rotary-dim 64 --dtype float16 --implementations oracle triton xla"
    arguments = ["run", "--suite", "forward", "backward", *shape.split(), "--repeats", "3", "--rounds", "2"]
    with jax.default_device(jax.devices("cpu")[0]):
        assert main([*arguments, "--output", str(output), "--commit", "abc"]) == 0
    case = Case(2, 3, 1, 64, 64, "float16")
    assert [(row["suite"], row["op"], row["implementation"], row["bytes"]) for row in read(output)] == [
        *(("forward", "forward", name, minimum_bytes(case)) for name in ("copy", "oracle", "xla")),
        *(("backward", "backward", name, minimum_bytes(case, "backward")) for name in ("copy", "xla")),
    ]
    checked = {(row["op"], row["implementation"]): row["checked"] for row in read(output)}
    assert checked["forward", "oracle"] == {"against": "none: the reference", "elements": 0, "differing": 0}
    assert checked["forward", "xla"]["against"] == "oracle"
    assert checked["backward", "xla"] == {
        "against": "float32 gradients",
        "promise": "within 3.9e-03 relative",
        "elements": 2 * (2 * 3 + 1) * 64 + 2 * 64,
        "differing": 2 * (3 + 1) * 64 + 2 * 64,  # those of the gate are copied
    }
    printed = capsys.readouterr().out
    assert "triton skipped: implementation='triton' must run on an NVIDIA GPU" in printed
    assert printed.count("The GPU is slowed (thermal slowdown by the driver;") == 2  # before and after


def test_a_million_tokens_repeat_the_inputs_of_fewer(monkeypatch):
    monkeypatch.setattr(providers, "_REPEATED_TOKENS", 4)
    part = make_inputs(Case(4, 2, 1, 64, 32))
    inputs = providers.repeated_inputs(Case(12, 2, 1, 64, 32))
    assert np.array_equal(inputs.q_gate, np.tile(part.q_gate, (3, 1)))
    assert np.array_equal(inputs.k, np.tile(part.k, (3, 1)))
    assert np.array_equal(inputs.positions, np.tile(part.positions, 3))
    mrope = Case(8, 2, 1, 64, 32, mrope_section=(6, 5, 5))
    part = make_inputs(dataclasses.replace(mrope, num_tokens=4))
    assert np.array_equal(providers.repeated_inputs(mrope).positions, np.tile(part.positions, (1, 2)))
    whole = Case(6, 2, 1, 64, 32)
    assert np.array_equal(providers.repeated_inputs(whole).q_gate, make_inputs(whole).q_gate)


COPIES = {"copy_512x4": 3.0, "copy_1024x4": 2.0}


# --- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("cache", ["hot", "cold"])
def test_the_profiler_times_every_provider(gpu, cache):
    from benchmarks.gpu_kernels import copy_calls

    case, repeats, rounds = Case(64), 5, 3
    inputs = make_inputs(case)
    calls = {name: build(case, inputs) for name, build in PROVIDERS.items() if can_run(build, case, inputs)}
    samples = measure(case, {**calls, **copy_calls(minimum_bytes(case))}, repeats=repeats, rounds=rounds, cache=cache)
    assert {"oracle", "triton", "xla", "xla_plain"} <= set(samples)
    for name, sample in samples.items():
        assert len(sample.times_us) == repeats * rounds, name
        assert all(0.5 < time_us < 500 for time_us in sample.times_us), (name, sample)
    for name in set(samples) - {"xla", "xla_plain"}:
        assert len(sample_kernels := samples[name].kernels) == 1, (name, sample_kernels)


def can_run(build, case, inputs) -> bool:
    try:
        build(case, inputs)()
    except NotImplementedError:
        return False
    return True


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("num_tokens", [4096, 16384])
def test_the_profiler_agrees_with_cuda_events(gpu, num_tokens):
    import torch

    case, launches = Case(num_tokens), 20
    call = PROVIDERS["oracle"](case, make_inputs(case))
    profiled = measure(case, {"oracle": call}, repeats=20, rounds=3)["oracle"].p50_us
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # launched from Python they would wait for the host between them
        for _ in range(launches):
            call()
    graph.replay()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / launches)
    assert profiled == pytest.approx(float(np.median(times)), rel=0.1)


@pytest.mark.gpu
@pytest.mark.alone
def test_run_writes_one_checked_row_for_each_implementation(gpu, tmp_path, capsys):
    output = tmp_path / "results.jsonl"
    arguments = ["run", "--tokens", "16", "--heads", "16/2", "--repeats", "3", "--rounds", "2", "--output", str(output)]
    assert main([*arguments, "--commit", "abc"]) == 0
    rows = {row["implementation"]: row for row in map(json.loads, output.read_text().splitlines())}
    assert {"copy", "oracle", "triton", "xla", "xla_plain"} <= set(rows)
    assert rows["triton"]["checked"] == {
        "against": "oracle",
        "promise": "equal bits",
        "elements": Case(16).num_outputs,
        "differing": 0,
    }
    assert all(without_clocks(row) == list(FIELDS) for row in rows.values())
    assert "16/2 heads" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["xla", "xla_plain"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients_are_checked_before_they_are_timed(monkeypatch, name, dtype):
    case = Case(5, 3, 1, head_dim=64, rotary_dim=16, dtype=dtype)
    compared = []
    monkeypatch.setattr(gradients, "op_agreement", lambda *args: compared.append(args) or op_agreement(*args))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # xla_plain is a user's code
        calls, kept = operations.check_backward(case, make_inputs(case), {"oracle": None, name: None})
    assert kept and list(calls) == [name]
    ((_, got, want),) = compared
    result = op_agreement(case, got, want)
    assert result.kept and result.elements == sum(x.size for x in got)
    for spoiled in ([got[0] * 1.1, *got[1:]], [got[0], got[1], got[2] + 1, got[3]], [-got[0], *got[1:]]):
        assert not op_agreement(case, [x.astype(dtype) for x in spoiled], want).kept


op_agreement = gradients.op_agreement


def test_a_nan_in_any_gradient_breaks_the_promise():
    good, bad = jnp.ones(3), jnp.array([1.0, jnp.nan, 1.0])
    for got in ([bad, good], [good, bad]):  # max() of Python ignores a NaN that comes later
        assert not gradients.agreement(got, [good, good], 0.1).kept
    assert gradients.agreement([good, good], [good, good], 0.1).kept
