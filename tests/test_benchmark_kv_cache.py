"""The benchmarks of the op that writes a KV cache: what is compared before it is timed, its floor, `verify`."""

import dataclasses
import importlib.util
import itertools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import agreement, kv_cache, suites, verify
from benchmarks.__main__ import main
from benchmarks.agreement import written_agreement
from benchmarks.floor import cached_bytes
from benchmarks.operations import OPERATIONS
from benchmarks.timing import Samples
from pallas_qk._rows import Outputs
from tests import cached, fp8, strategies, tolerances
from tests.cached import AXES, CachedCase
from tests.cases import Case, make_inputs
from tests.compare import assert_same
from tests.lowering import GPU_IMPLEMENTATIONS

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or importlib.util.find_spec("torch") is None,
    reason="needs torch and triton",
)

SMALL = Case(2, 2, 1, 32, 16, "float16")
OPS = suites.SUITES["kv_cache"].ops
FP8 = "float8_e4m3fn"


@pytest.fixture
def as_users_run_it():
    """JAX's own promotions, not the strict ones of the other tests: xla_plain is a user's code."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def by_distance(monkeypatch):
    """On a CPU the oracle is interpreted, and no name promises its bits."""
    for name in ("agreement", "cached_agreement"):
        right = getattr(kv_cache, name)
        monkeypatch.setattr(kv_cache, name, lambda _, *rest, right=right, **kw: right("xla_plain", *rest, **kw))


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_calls_that_write_a_cache_are_compared_and_write_it_in_place(by_distance, as_users_run_it, op):
    case = dataclasses.replace(SMALL, num_tokens=20)
    with jax.default_device(jax.devices("cpu")[0]):
        calls, kept = OPERATIONS[op].check(case, make_inputs(case), dict.fromkeys(["oracle", "xla", "xla_plain"]))
        endings = ["_alone", "_then_set"]
        assert kept and list(calls) == [
            "oracle",
            "xla_alone",
            "xla_then_set",
            "xla",
            *(f"xla_plain{x}" for x in endings),
        ]
        for name in ("xla_then_set", "xla", "xla_plain_then_set"):
            outputs = [calls[name].call() for _ in range(2)]  # the second call takes the caches of the first
            assert all(x.is_deleted() for x in (outputs[0].k_cache, outputs[0].v_cache))
            assert not outputs[0].q.is_deleted()
            before = [x.unsafe_buffer_pointer() for x in (outputs[1].k_cache, outputs[1].v_cache)]
            del outputs
            after = calls[name].call()
            assert [x.unsafe_buffer_pointer() for x in (after.k_cache, after.v_cache)] == before
            assert (after.gate is None) == op.endswith("in_place") and after.k is after.v is None
            assert {x.dtype.name for x in (after.k_cache, after.v_cache)} == {FP8 if "fp8" in op else "float16"}
        assert [len(calls[name].call()) for name in ("oracle",)] == [5]
    # Both caches, 48 places of 32 lanes each, beside q and the gate; those of k that are written count as k.
    assert calls["xla"].checked["elements"] == 2 * 20 * 2 * 32 + 20 * 32 + 2 * 48 * 32
    assert calls["xla"].checked["against"] == "oracle"
    reference = "none: the reference" + ", with its copy of the gate" * op.endswith("in_place")
    assert calls["oracle"].checked == {"against": reference, "elements": 0, "differing": 0}
    counted = {name for name, call in calls.items() if "codes of written rows are counted" in str(call.checked)}
    assert counted == ({"xla_then_set", "xla_plain_then_set"} if "fp8" in op else set())


@needs_triton
@pytest.mark.parametrize(
    "op, spoiled",
    [
        *itertools.product(["kv_cache"], ["q", "gate", "k_cache", "v_cache", "untouched"]),
        *itertools.product(["kv_cache_fp8"], ["q", "v_cache", "untouched"]),
    ],
)
def test_a_wrong_cache_gets_no_row(monkeypatch, by_distance, as_users_run_it, capsys, op, spoiled):
    case = dataclasses.replace(SMALL, num_tokens=5)
    slots = kv_cache.slots_of(kv_cache.form_of(case))
    free = next(slot for slot in range(16) if slot not in slots)
    right = kv_cache.fused

    def wrong(name, form):
        def run(caches, *arrays):
            q, gate, (k_cache, v_cache) = right(name, form)(caches, *arrays)
            outputs = {"q": q, "gate": gate, "k_cache": k_cache, "v_cache": v_cache}
            at = {"untouched": (0, free), "k_cache": (0, int(slots[2])), "v_cache": (0, int(slots[2]))}
            name_of = "v_cache" if spoiled == "untouched" else spoiled
            outputs[name_of] = outputs[name_of].at[at.get(spoiled, (1,))].add(1)
            q, gate, *caches = outputs.values()
            return q, gate, tuple(caches)

        return run

    monkeypatch.setattr(kv_cache, "fused", wrong)
    with jax.default_device(jax.devices("cpu")[0]):
        calls, kept = OPERATIONS[op].check(case, make_inputs(case), {"xla": None})
    assert not kept and list(calls) == ["xla_alone", "xla_then_set"]
    printed = capsys.readouterr().out
    assert f"{case.id}: xla " in printed and "BROKEN" in printed


@needs_triton
def test_the_command_run_records_the_suite(monkeypatch, by_distance, as_users_run_it, tmp_path):
    """With a peer."""
    from benchmarks import __main__, run

    def measured(case, calls, **settings):
        for call in calls.values():
            for _ in range(3 if call else 0):
                call()
        return {name: Samples((2.0,), ("k",)) for name in calls}

    monkeypatch.setattr(__main__, "missing", lambda command: None)
    monkeypatch.setattr(run, "measure", measured)
    monkeypatch.setattr(run, "copy_calls", lambda total_bytes: {"copy_512x4": None})
    monkeypatch.setattr(run, "gpu_memory", lambda: 10**9)
    output, source = tmp_path / "results.jsonl", tmp_path / "writer.py"
    source.write_text(WRITER)
    shape = "--tokens 2 --heads 2/1 --head-dim 32 --rotary-dim 16 --dtype float16 --implementations oracle triton xla"
    with jax.default_device(jax.devices("cpu")[0]):
        arguments = [*shape.split(), "--peers", f"vllm={source}", "--output", str(output), "--commit", "abc"]
        assert main(["run", "--suite", "kv_cache", *arguments]) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["suite"], row["op"], row["implementation"], row["bytes"]) for row in rows] == [
        ("kv_cache", op, name, OPERATIONS[op].minimum_bytes(SMALL))
        for op in OPS
        for name in ("copy", "oracle", "xla_alone", "xla_then_set", "xla", "vllm")
    ]


def test_the_slots_of_the_suite_are_one_for_each_token_in_half_of_the_places():
    for num_tokens in (1, 16, 100, 4096):
        form = kv_cache.form_of(Case(num_tokens))
        slots = kv_cache.slots_of(form)
        assert slots.shape == (num_tokens,) and len(set(slots.tolist())) == num_tokens
        assert slots.min() >= 0 and slots.max() < form.capacity and 2 * num_tokens <= form.capacity
        assert (form.block_size, form.cache_axes, form.case.packed) == (16, "b s h d", True)


# --- writers of other projects ------------------------------------------------------------------------------------

WRITER = """
import torch

from vllm.model_executor.layers.quantization.utils.quant_utils import FP8_DTYPE, get_fp8_min_max
from vllm.platforms import current_platform
from vllm.triton_utils import tl, triton
from vllm.v1.kv_cache_interface import KVQuantMode, is_quantized_kv_cache

LARGEST = get_fp8_min_max()[1]

def other(mode: KVQuantMode):
    from vllm.absent import part

def has_fp8():
    return current_platform.has_device_capability(89)

def triton_reshape_and_cache_flash(
    key, value, key_cache, value_cache, slot_mapping, kv_cache_dtype, k_scale, v_scale
):
    assert not (current_platform.is_rocm() or current_platform.is_xpu())
    for x, cache, scale in ((key, key_cache, k_scale), (value, value_cache, v_scale)):
        if is_quantized_kv_cache(kv_cache_dtype):
            assert cache.dtype == FP8_DTYPE == current_platform.fp8_dtype()
            x = (x.float() / scale).clamp(-LARGEST, LARGEST).to(FP8_DTYPE).view(torch.uint8)
            cache = cache.view(torch.uint8)
        cache.flatten(0, 1)[slot_mapping.long()] = x
"""


@pytest.fixture
def writer(tmp_path):
    from benchmarks import peers

    path = tmp_path / "writer.py"
    path.write_text(WRITER)
    return peers.load(str(path))


@needs_triton
def test_a_writer_is_loaded_without_vllm_and_is_for_this_suite_alone(writer, capsys):
    assert len(writer.stood_in) == 4 and not any(name.partition(".")[0] == "vllm" for name in sys.modules)
    with jax.default_device(jax.devices("cpu")[0]):
        calls, kept = OPERATIONS["forward"].check(SMALL, make_inputs(SMALL), {"writer": writer.build})
    assert calls == {} and kept
    assert "writer skipped: it writes KV caches alone, which --suite kv_cache times" in capsys.readouterr().out


@needs_triton
@pytest.mark.parametrize(("capability", "expected"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_the_platform_of_a_writer_is_the_gpu(monkeypatch, writer, capability, expected):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert sys.modules["benchmarks_peer_writer"].has_fp8() == expected


@needs_triton
@pytest.mark.parametrize("spoiled", [None, "a row", "untouched"])
@pytest.mark.parametrize("op", OPS)
def test_a_writer_s_caches_are_compared_with_the_oracle_s(writer, as_users_run_it, capsys, op, spoiled):
    """A wrong one gets no row."""
    import torch

    from benchmarks.providers import Writer

    case = dataclasses.replace(SMALL, num_tokens=5)
    slots = kv_cache.slots_of(kv_cache.form_of(case))
    at = {"a row": int(slots[2]), "untouched": next(slot for slot in range(16) if slot not in slots)}

    def write(k, v, k_cache, v_cache, slots, *scales):
        writer.build.write(k, v, k_cache, v_cache, slots, *scales)
        if spoiled:
            v_cache.view(torch.uint8)[0, at[spoiled], 0, 3] += 1

    with jax.default_device(jax.devices("cpu")[0]):
        calls, kept = OPERATIONS[op].check(case, make_inputs(case), {"oracle": None, "vllm": Writer(write)})
    counted = "fp8" in op and spoiled == "a row"
    assert kept == (counted or spoiled is None) and list(calls) == ["oracle", "vllm"][: 1 + kept]
    if kept:
        elements = (2 * 5 * 2 + 5 + 2 * 16) * 32  # q and gate, k, and both caches
        assert calls["vllm"].checked == {
            "against": "oracle",
            "promise": "equal bits" + "; codes of written rows are counted" * ("fp8" in op),
            "elements": elements,
            "differing": int(counted),
        }
    else:
        assert "vllm 1 of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "differing", "kept"),
    [
        ({}, 0, True),
        ({"k_cache": "row", "v_cache": "row"}, 2, True),
        ({"k_cache": "untouched", "v_cache": "row"}, 2, False),
        ({"gate": "row"}, 1, False),
        ({"k": "row"}, 1, False),
    ],
)
def test_codes_in_8_bits_are_counted_and_nothing_else_may_differ(changes, differing, kept):
    form = CachedCase(dataclasses.replace(SMALL, num_tokens=5), kv_dtype="float8_e4m3fn")
    slots = np.arange(5, 10)
    caches = dict(zip(("k_cache", "v_cache"), cached.caches(form), strict=True))
    rows = {name: np.zeros((5, heads * 32), np.float16) for name, heads in (("q", 2), ("k", 1), ("gate", 2))}
    want = Outputs(**rows, **caches)
    places = {"row": (1, 2), "untouched": (0, 3)}  # slots 6 and 3, of blocks of four
    got = want
    for name, where in changes.items():
        changed = getattr(want, name).copy()
        at = (*places[where], 0, 7) if name in caches else (1, 7)
        changed.view(f"u{changed.itemsize}")[at] ^= 1
        got = got._replace(**{name: changed})
    found = written_agreement(form, got, want, slots)
    assert (found.differing, found.kept) == (differing, kept)
    assert found.elements == (2 * 5 * 2 + 5) * 32 + 2 * form.capacity * 32
    assert found.checked["promise"] == "equal bits; codes of written rows are counted"


@needs_triton
def test_a_writer_into_8_bits_takes_one_scale_of_each(writer):
    import torch

    from benchmarks.providers import cached_oracle, to_jax, to_torch, torch_inputs

    form = CachedCase(dataclasses.replace(SMALL, num_tokens=3), kv_dtype="float8_e4m3fn", scale_per_head=(False, False))
    with jax.default_device(jax.devices("cpu")[0]):
        data, results = cached.data_of(form), []
        tensors, v, slots = torch_inputs(data.inputs), torch.from_numpy(data.v), torch.tensor([2, 11, 7])
        for write in (None, writer.build.write):
            caches = [to_torch(x).clone() for x in data.before]
            *_, k_cache, v_cache = cached_oracle(form, tensors, v, caches, slots, write)()
            results.append(to_jax([k_cache, v_cache]))
    assert_same(*results)
    for after, before in zip(results[0], data.before, strict=True):
        changed = np.flatnonzero((np.asarray(after).view(np.uint8) != before.view(np.uint8)).any((2, 3)))
        assert changed.tolist() == [2, 7, 11]


@needs_triton
def test_8_bits_are_exchanged_as_they_are():
    import torch

    from benchmarks.providers import from_torch, to_torch

    codes = np.arange(256, dtype=np.uint8)
    for name in fp8.NAMES:
        with jax.default_device(jax.devices("cpu")[0]):
            tensor = to_torch(codes.view(name))
            assert tensor.dtype == getattr(torch, name) and tensor.view(torch.uint8).tolist() == codes.tolist()
            array = from_torch(tensor)
        assert array.dtype == name and np.asarray(array).view(np.uint8).tolist() == codes.tolist()


@needs_triton
def test_a_writer_refuses_what_it_would_get_wrong(writer):
    import torch

    rows, slots, one = torch.zeros(2, 2, 8), torch.arange(2), torch.ones(1)
    codes = torch.zeros(1, 4, 2, 8, dtype=torch.uint8)
    e4m3, e5m2 = codes.view(torch.float8_e4m3fn), codes.view(torch.float8_e5m2)
    with pytest.raises(NotImplementedError, match="float8_e4m3fn, got float8_e5m2"):
        writer.build.write(rows, rows, e5m2, e5m2, slots, one, one)
    with pytest.raises(NotImplementedError, match="one scale for all heads, got 1 and 2"):
        writer.build.write(rows, rows, e4m3, e4m3, slots, one, torch.ones(2))


@pytest.mark.parametrize("kv_dtype", fp8.NAMES)
def test_a_user_s_codes(on_the_host, kv_dtype):
    """They saturate. Divided by a power of two they are the definition's."""
    x = np.random.default_rng(0).standard_normal((64, 32), np.float32).astype(np.float16) * np.float16(100)
    for scale in np.array([0.25, 0.0625, 4.0], np.float32):
        got = np.asarray(kv_cache.quantised(jnp.asarray(x), scale, jnp.dtype(kv_dtype))).view(np.uint8)
        np.testing.assert_array_equal(got, fp8.codes(x, scale, kv_dtype))


# --- the floor ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("op", "case", "rows", "table"),
    [
        # In and out: q and gate of 16 heads, k and v of 2; 512 bytes each.
        ("kv_cache", Case(16384), 2 * (16 + 16 + 2 + 2), 128),
        ("kv_cache_gate_in_place", Case(16384), 2 * (16 + 2 + 2), 128),
        ("kv_cache", Case(1, 32, 2), 2 * (32 + 32 + 2 + 2), 128),
        # A row of an 8-bit cache is half as long.
        ("kv_cache_fp8", Case(16384), 2 * (16 + 16) + 1.5 * (2 + 2), 128),
        ("kv_cache_fp8_gate_in_place", Case(16384), 2 * 16 + 1.5 * (2 + 2), 128),
    ],
)
def test_bytes_of_the_suite_of_caches(op, case, rows, table):
    assert OPERATIONS[op].minimum_bytes(case) == case.num_tokens * (rows * 512 + table)


@pytest.mark.parametrize(
    ("changes", "kv_bytes"),
    [
        ({}, 2 + 2),
        ({"kv_dtype": "float32"}, 2 + 4),
        ({"kv_dtype": "float8_e5m2"}, 2 + 1),
        ({"return_kv": True}, 2 + 2 + 2),
        ({"return_kv": True, "kv_dtype": "float32", "cache_axes": "b s h (c d)"}, 2 + 2 + 4),
        ({"cache_axes": "l b s (h c) d", "num_blocks": 50}, 2 + 2),
    ],
)
@pytest.mark.parametrize("gate", ["copied", "in_place", None])
@pytest.mark.parametrize("packed", [False, True])
def test_a_row_of_a_cache_is_read_once_and_written_once_in_the_cache_s_dtype(packed, gate, changes, kv_bytes):
    call = CachedCase(Case(9, 4, 2, 64, 32, gate=gate, packed=packed), **changes)
    q_bytes = 4 * (8 if gate == "copied" else 4)
    assert cached_bytes(call) == 9 * (64 * (q_bytes + 2 * 2 * kv_bytes) + 32 * 2)


@pytest.mark.parametrize("ending", ["", "_alone", "_then_set"])
@pytest.mark.parametrize("gate", ["copied", "in_place"])
@pytest.mark.parametrize("kv_dtype", [None, FP8])
def test_a_gate_left_in_place_is_no_result(kv_dtype, gate, ending):
    """Its slice would be made."""
    form = kv_cache.form_of(SMALL, gate, kv_dtype)
    *arrays, before, slots = cached.arguments(form)
    call = kv_cache.builds_of(form, {"xla": None}, arrays, before, slots)[f"xla{ending}"]()
    assert (call().gate is None) == (gate == "in_place")


# --- verify -------------------------------------------------------------------------------------------------------


def small(call: CachedCase) -> CachedCase:
    case = dataclasses.replace(call.case, num_tokens=min(6, call.case.num_tokens), num_q_heads=2)
    return dataclasses.replace(call, case=case, num_blocks=min(3, call.num_blocks))


VERIFIED = suites.parity_cached_gpu()


def has_options(case: Case) -> bool:
    return (case.rotation, case.round_norm) != ("halves", True)


def test_verify_compares_every_layout_by_both_ways_in_and_slots_of_every_kind():
    assert {(call.cache_axes, call.case.packed) for call in VERIFIED} >= {(axes, p) for axes in AXES for p in (0, 1)}
    codes = [call for call in VERIFIED if call.scales]
    assert {call.kv_dtype for call in codes} == set(fp8.NAMES)
    assert {call.cache_axes for call in codes if call.kv_dtype == "float8_e4m3fn"} >= set(AXES)
    assert {(call.case.dtype, call.scale_per_head) for call in codes} >= {
        (dtype, per_head)
        for dtype in ("bfloat16", "float16")
        for per_head in itertools.product((False, True), repeat=2)
    }
    assert max(call.case.num_tokens for call in codes) == 65536
    assert {call.slots_dtype for call in VERIFIED} == set(strategies.POSITION_DTYPES)
    assert {call.case.gate for call in VERIFIED} == {"copied", "in_place", None}
    assert {call.layer_is_inside for call in VERIFIED} == {call.return_kv for call in VERIFIED} == {True, False}
    for call in VERIFIED:
        if call.scales and tolerances.max_differing_fraction(call.case):
            assert call.return_kv  # which says where codes of k may differ
        slots = cached.slots_of(call)
        assert 0 <= slots[0] < call.capacity
        if call.case.num_tokens > 1:
            assert (slots >= call.capacity).any() and (slots.min() < 0) == (jnp.iinfo(call.slots_dtype).min < 0)


@needs_triton
@pytest.mark.parametrize(
    "call",
    [
        *(small(call) for call in (*VERIFIED[3:10:3], *VERIFIED[-14:-6], *VERIFIED[-5:-3])),
        *(small(call) for call in VERIFIED if call.scales and call.cache_axes in AXES[::11]),
        *(small(call) for call in VERIFIED if has_options(call.case) and not call.scales),
    ],
    ids=lambda x: x.id,
)
def test_verify_compares_with_the_interpreted_oracle(on_the_host, call):
    """The slots' types and the layers of a GPU's run."""
    with strategies.x64(call):
        result = verify.compared(verify.compare_cached(call, "cpu"), "xla")
    assert result.kept, str(result)
    sizes, case = call.sizes, call.case
    rows = case.num_tokens * (2 * case.num_q_heads + 2 * call.return_kv * case.num_kv_heads)
    rows += 2 * sizes.get("l", 1) * call.capacity * case.num_kv_heads
    written = len(cached.written(call, cached.slots_of(call)))  # counted as k, and blank in the rest of its cache
    assert result.elements == (rows + written * case.num_kv_heads) * case.head_dim


@pytest.mark.parametrize(
    ("changed", "k_is_there", "count", "kept"),
    [
        ([], True, 3, True),
        ([1], True, 3, True),  # where k differs
        ([1, 4], True, 3, False),
        ([1, 4, 5], False, 3, True),
        ([1, 4, 5, 6], False, 3, False),
        ([1], True, 0, False),
        ([1], False, 0, False),
    ],
)
def test_a_code_of_k_differs_only_where_k_does(monkeypatch, changed, k_is_there, count, kept):
    """Without k, as many do as elements of k may."""
    monkeypatch.setattr(agreement, "promise", lambda *_: agreement.Promise(count, 1.0, 1.0))
    rows = jnp.zeros((2, 4), jnp.float16)
    codes = jnp.arange(8, dtype=jnp.uint8).reshape(2, 4)
    got = codes.ravel().at[jnp.array(changed, int)].add(1).reshape(2, 4)
    ks = (rows.at[0, 1].set(-0.0), rows) if k_is_there else None
    found = agreement.agreement_of_codes("xla", SMALL, (got, codes), ks, platform="gpu")
    assert (found.elements, found.differing, found.kept) == (8, len(changed), kept)
    expected = "only where k does" if k_is_there else "at most 3 codes of k differ"
    assert (expected in str(found.promise)) == (count > 0)


@needs_triton
@pytest.mark.parametrize(
    "spoil, in_cache",
    [
        *itertools.product(["", "k", "a row of k", "a row of v", "what no slot names"], [None, FP8]),
        *itertools.product(["q", "v", "gate"], [None]),  # whatever the cache's dtype
    ],
)
def test_verify_fails_where_a_cache_is_wrong(monkeypatch, on_the_host, capsys, spoil, in_cache):
    call = CachedCase(Case(6, 2, 1, 64, 32, "float16"), "b s h d", in_cache, return_kv=True)
    slots = cached.slots_of(call)
    block, place = divmod(int(slots[0]), call.block_size)
    free = divmod(next(slot for slot in range(call.capacity) if slot not in slots), call.block_size)
    right = cached.outputs_of

    def outputs_of(call, got):
        outputs = right(call, got)
        places = {
            "a row of k": ("k_cache", (block, place)),
            "a row of v": ("v_cache", (block, place)),
            "what no slot names": ("k_cache", free),
        }
        name, at = places.get(spoil, (spoil, (2,)))
        return outputs._replace(**{name: getattr(outputs, name).at[at].add(1)})

    if spoil:
        monkeypatch.setattr(cached, "outputs_of", outputs_of)
    num_broken = int(bool(spoil))
    assert verify.verify([call], ("xla",), "cpu") == num_broken
    assert f"promises broken in {num_broken} cases" in capsys.readouterr().out


# --- on a GPU -----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_kernels_give_the_oracle_s_bits(gpu):
    calls = [call for call in VERIFIED if call.case.num_tokens < 300]
    assert verify.verify(calls[::5], GPU_IMPLEMENTATIONS, "gpu") == 0


@pytest.mark.gpu
@pytest.mark.alone
def test_the_suite_times_one_kernel_that_writes_the_cache(gpu, tmp_path):
    output = tmp_path / "results.jsonl"
    arguments = ["run", "--suite", "kv_cache", "--tokens", "16", "--heads", "16/2", "--repeats", "3", "--rounds", "2"]
    assert main([*arguments, "--output", str(output), "--commit", "abc"]) == 0
    rows = {(row["op"], row["implementation"]): row for row in map(json.loads, output.read_text().splitlines())}
    for op in OPS:
        assert {name for row_op, name in rows if row_op == op} >= {"copy", "oracle", "xla", "xla_plain_then_set"}
        assert rows[op, "oracle"]["kernels"] == 2
        for name in {*GPU_IMPLEMENTATIONS} & {name for _, name in rows}:
            assert rows[op, name]["kernels"] == rows[op, f"{name}_alone"]["kernels"] == 1
            assert rows[op, name]["checked"]["differing"] == 0
            assert rows[op, f"{name}_then_set"]["kernels"] > 1
