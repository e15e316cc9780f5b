"""A call like one that has run is not checked again, and no error is hidden by one: what was kept, and by what."""

import dataclasses
import gc
import re
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_qk
from pallas_qk import _call, _passed
from tests import cached, forms, lowering, test_cache_errors, test_errors
from tests.cached import CachedCase
from tests.cases import Case, make_inputs
from tests.compare import assert_same
from tests.devices import mesh

CASE = Case(4, 4, 2, head_dim=64, rotary_dim=16, max_position=40)
CACHED = CachedCase(CASE, finite=True)
LAYERS = dataclasses.replace(CACHED, cache_axes="l b s h d")
EIGHT_BITS = dataclasses.replace(CACHED, kv_dtype="float8_e4m3fn")
FORMS = {
    "q_gate and k": CASE,
    "gate in place": dataclasses.replace(CASE, gate="in_place"),
    "q and k": dataclasses.replace(CASE, gate=None),
    "qkv with gates": dataclasses.replace(CASE, packed=True),
    "qkv": dataclasses.replace(CASE, packed=True, gate=None),
    "rows of the table": dataclasses.replace(CASE, gathered=True),
    "mRoPE": dataclasses.replace(CASE, mrope_section=(3, 3, 2)),
}
CACHED_FORMS = {
    "three arrays": CACHED,
    "one array": dataclasses.replace(CACHED, cache_axes="b s (h c) d", case=dataclasses.replace(CASE, packed=True)),
    "without gates": dataclasses.replace(CACHED, case=dataclasses.replace(CASE, gate=None)),
    "a layer": LAYERS,
    "8 bits": EIGHT_BITS,
}


@pytest.fixture
def checked(monkeypatch):
    """A name for each call that is checked; what was kept before is forgotten."""
    names, original = [], _call.checked

    def counted(function, *args, **kwargs):
        names.append(function.name)
        return original(function, *args, **kwargs)

    monkeypatch.setattr(_call, "checked", counted)
    monkeypatch.setattr(_passed, "_kept", {})
    return names


def call(case: Case = CASE, **changes):
    return pallas_qk.fused_qk_rmsnorm_rope_gate(
        **dataclasses.asdict(make_inputs(case)) | case.static_arguments | changes
    )


# --- what is not checked again ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_an_equal_call_is_not_checked_again(checked, form):
    case, op = FORMS[form], forms.op(FORMS[form])
    for seed in range(3):
        op(*forms.arguments(case, make_inputs(case, seed)))
    assert len(checked) == 1
    longer = dataclasses.replace(case, num_tokens=5)
    op(*forms.arguments(longer, make_inputs(longer)))
    assert len(checked) == 2


@pytest.mark.parametrize("form", CACHED_FORMS)
def test_an_equal_call_that_writes_a_cache_is_not_checked_again(checked, form):
    case = CACHED_FORMS[form]
    for seed in range(3):
        cached.op(case)(*cached.arguments(case, seed))
    assert len(checked) == 1


class Box:
    def __init__(self, array):
        self.array = array

    def __jax_array__(self):
        return self.array


def test_a_box_counts_as_its_array_and_numpy_as_another(checked):
    inputs = make_inputs(CASE)
    want = call()
    assert_same(call(q_weight=Box(inputs.q_weight)), want)
    assert len(checked) == 1
    for _ in range(2):
        assert_same(call(positions=np.asarray(inputs.positions)), want)
    assert len(checked) == 2


def test_every_layer_and_every_scale_has_its_own(checked):
    arrays = cached.arguments(LAYERS)
    for _ in range(2):
        written = [cached.op(LAYERS)(*arrays, layer=layer).kv_cache[0] for layer in range(3)]
    assert len(checked) == 3
    for layer, cache in enumerate(written):
        changed = [not np.array_equal(*pair) for pair in zip(cache, arrays[5][0], strict=True)]
        assert changed == [layer == other for other in range(3)]


def test_traced_arrays_are_checked_at_each_trace_and_have_no_signature(checked):
    seen = []
    run = jax.jit(lambda x: (seen.append(_passed.signature_of("op", x)), call(q_gate=x))[1])
    for _ in range(2):
        run(make_inputs(CASE).q_gate)
    assert (len(checked), seen, _passed._kept) == (1, [None], {})


# --- what is kept -------------------------------------------------------------------------------------------------


def test_a_call_that_fails_after_its_checks_is_not_kept(checked, on_the_host):
    """Of an implementation that this platform lacks the lowering tells."""
    for _ in range(2):
        with pytest.raises(NotImplementedError, match="must run on an NVIDIA GPU, got platform cpu"):
            call(implementation="triton")
    assert len(checked) == 2 and not _passed._kept


def test_no_array_is_kept_alive(checked):
    q_gate = make_inputs(CASE).q_gate + 1
    call(q_gate=q_gate)
    alive = weakref.ref(q_gate)
    del q_gate
    gc.collect()
    assert checked and alive() is None


def test_what_is_kept_has_a_bound(checked, monkeypatch):
    monkeypatch.setattr(_passed, "_MOST", 2)
    for eps in (1e-6, 1e-5, 1e-4, 1e-3, 1e-3):
        call(eps=eps)
        assert 1 <= len(_passed._kept) <= 2
    assert len(checked) == 4


def test_what_cannot_be_told_has_no_signature():
    assert _passed.signature_of("op", jnp.ones(3), [1, 2.0, "x"], None, np.zeros(2)) is not None
    for x in (object(), 1j, np.True_, np.ma.masked_array([1]), (1, [object()]), jax.ShapeDtypeStruct((), "int32")):
        assert _passed.signature_of("op", x) is None


def test_the_gpu_that_code_is_made_for_is_in_a_signature():
    """A name is refused for what its GPU lacks."""
    signatures = [_passed.signature_of("op", 1)]
    for kind in ("Tesla T4", lowering.HOPPER, "NVIDIA A100-SXM4-80GB"):
        with lowering.on_gpu(kind):
            assert _passed.signature_of("op", 1) == _passed.signature_of("op", 1)
            signatures.append(_passed.signature_of("op", 1))
    assert len(set(signatures)) == 4


# --- no error is hidden -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exception, message, changes", test_errors.BAD_CALLS)
def test_a_bad_call_after_a_good_one(exception, message, changes):
    for _ in range(2):
        pallas_qk.fused_qk_rmsnorm_rope_gate(**test_errors.arguments({}))
    test_errors.test_bad_call(exception, message, changes)


@pytest.mark.parametrize("name", test_cache_errors.BAD)
def test_a_bad_call_after_a_good_one_that_writes_a_cache(name):
    for _ in range(2):
        test_cache_errors.call(test_cache_errors.CASE)
    test_cache_errors.test_bad_call(name)


@pytest.mark.parametrize("name", test_cache_errors.BAD_LAYERS)
def test_a_bad_layer_after_good_ones(name):
    for layer in (*range(3), 1, jnp.int32(1), np.int32(1)):
        test_cache_errors.call(test_cache_errors.LAYERS, layer=layer)
    test_cache_errors.test_bad_layer(name)


ONE_KV_HEAD = dataclasses.replace(CASE, num_kv_heads=1)
SECTION = dataclasses.replace(CASE, mrope_section=(1, 7, 0))
EQUAL_VALUES = {
    "num_kv_heads": (ONE_KV_HEAD, 1, [True, 1.0]),
    "rotary_dim": (CASE, 16, [16.0, jnp.int32(16)]),
    "eps, 0": (CASE, 0.0, [False]),
    "eps, 1": (CASE, 1.0, [True]),
    "norm_beta, 0": (CASE, 0, [False]),
    "norm_beta, 1": (CASE, 1.0, [True, np.True_]),
    "round_norm": (CASE, True, [1, 1.0, np.True_]),
    "copy_gate": (CASE, True, [1]),
    "mrope_section": (SECTION, (1, 7, 0), [(True, 7, 0), [1.0, 7, 0], (1, 7, False), np.array([1, 7, 0])]),
    "mrope_section, a list": (SECTION, [1, 7, 0], [[True, 7, 0], (1, 7.0, 0)]),
    "positions": (CASE, np.zeros(4, np.int32), [np.zeros(4, np.float32), np.zeros(4, ">i4"), [0] * 4]),
    "positions, masked": (CASE, np.zeros(4, np.int32), [np.ma.masked_array(np.zeros(4, np.int32))]),
}


@pytest.mark.parametrize("name", EQUAL_VALUES)
def test_an_equal_value_of_another_type_is_refused(name):
    case, good, bad = EQUAL_VALUES[name]
    argument = name.partition(",")[0]
    for _ in range(2):
        call(case, **{argument: good})
    for value in bad:
        with pytest.raises(TypeError, match=f"^{argument} must "):
            call(case, **{argument: value})


def test_nan_is_refused_each_time():
    nan = float("nan")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^eps must be a finite float32"):
            call(eps=nan)


def write(**changes):
    """Into a cache of 8 bits."""
    case = EIGHT_BITS
    scales = {"k_scale": 0.5, "v_scale": 0.5}
    static = case.case.static_arguments | {"cache_axes": case.cache_axes} | scales | changes
    return pallas_qk.fused_qkv_rmsnorm_rope_gate_cache(*cached.arguments(case), **static)


def test_scales_of_other_types_are_refused():
    for good in (1, 1.0, np.float64(1), np.ones((), np.float32), jnp.float32(1), jnp.asarray(1), jnp.asarray(1.0)):
        assert_same(write(k_scale=good), write(k_scale=good))
        assert_same(write(k_scale=good), write(k_scale=1.0))
    for bad in (True, np.ones((), np.float64), np.ones((), np.int32), jnp.int32(1), jnp.float16(1)):
        with pytest.raises(TypeError, match=r"^k_scale must be "):
            write(k_scale=bad)


def test_numbers_that_are_equal_and_not_alike_keep_their_values():
    """What is kept of a call is no scale: 0.0 and -0.0 have one signature."""
    plus, minus = (np.asarray(write(k_scale=zero).kv_cache[0], np.float32) for zero in (0.0, -0.0))
    is_written = plus != minus
    assert is_written.any() and set(np.abs(plus[is_written])) == {448.0}
    np.testing.assert_array_equal(plus[is_written], -minus[is_written])


def test_numpy_positions_of_64_bits_are_read_at_each_call():
    """Their values have no part in a signature, nor has x64."""
    inside, past = np.array([0, 1, 2, 3]), np.array([0, 2**32 + 1, 2, 3])
    for x64 in (False, True, False):
        with jax.enable_x64(x64):
            for positions, want in ((inside, 0), (past, 1), (inside, 0)):
                q, *_ = call(positions=positions)
                assert np.isnan(np.asarray(q, np.float32)).any(axis=1).sum() == want


def test_a_sharding_that_cuts_heads_is_refused_after_one_that_does_not():
    q_gate, on = make_inputs(CASE).q_gate, mesh(tokens=1, heads=8)
    for spec in (P(), P("tokens"), P(None, "tokens"), P()):
        call(q_gate=jax.device_put(q_gate, NamedSharding(on, spec)))
    message = "q_gate must hold whole heads on each device, got num_q_heads=4 over 8 devices."
    for spec in (P(None, "heads"), P("tokens", "heads")):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            call(q_gate=jax.device_put(q_gate, NamedSharding(on, spec)))


def test_an_array_in_host_memory_is_refused_after_one_on_the_device():
    k = make_inputs(CASE).k
    call(k=k)
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    with pytest.raises(ValueError, match=r"^k must lie in device memory"):
        call(k=jax.device_put(k, where))
