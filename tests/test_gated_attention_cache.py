"""The example's KV cache at its ends: lengths that don't fit are refused where they are known, and NaN where not."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import gated_attention
from examples.gated_attention import KVCache

BATCH, LENGTH, HIDDEN_SIZE = 3, 5, 32


@pytest.fixture(autouse=True)
def as_users_run_it():
    """Standard promotion, without which jax.nn.dot_product_attention doesn't run, and no TF32 on a GPU."""
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        yield


@functools.cache
@jax.ensure_compile_time_eval()  # the first call may come from inside a jit, whose tracers must not be kept
def model():
    config, table = gated_attention.read_config(gated_attention.TEXT_CONFIG, max_position=16, dtype=jnp.float32)
    keys = jax.random.split(jax.random.key(0), 2)
    hidden = jax.random.normal(keys[1], (BATCH, 8, HIDDEN_SIZE))
    return gated_attention.random_parameters(keys[0], HIDDEN_SIZE, config, jnp.float32), hidden, table, config


def prefill(lengths, cache_length=6):
    parameters, hidden, table, config = model()
    positions = jnp.tile(jnp.arange(LENGTH), (BATCH, 1))
    return gated_attention.prefill(
        parameters, hidden[:, :LENGTH], lengths, positions, table, config, cache_length=cache_length
    )


def decode(cache, hidden=None):
    parameters, every, table, config = model()
    hidden = every[:, -1:] if hidden is None else hidden
    return gated_attention.decode(parameters, hidden, cache.lengths[:, None], table, config, cache)


jitted_prefill, jitted_decode = jax.jit(prefill), jax.jit(decode)


def filled(lengths) -> KVCache:
    """A cache of 6 places."""
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(BATCH, 6, 2, 64)), jnp.float32) for _ in "kv")
    return KVCache(k, v, jnp.array(lengths, jnp.int32))


def inside_jit(function, known):
    """With an argument that is no argument of the jit."""
    return jax.jit(lambda: function(known))()


LENGTHS = (
    "lengths must be from 1 to the 5 tokens of hidden, got {}. Pass the number of each prompt's tokens without padding."
)
ROOM = (
    "the lengths of cache must be from 0 to 5, which leaves room for one more token, got {}. "
    "Prefill with a larger cache_length, or stop before."
)
SMALL = "cache_length must be at least the 5 tokens of hidden, got 4. Pass the longest sequence, prompt and answer."
TOKENS = "hidden must have one token per sequence, got 2. Prefill prompts, then decode by token."
CALLS = {
    "prompt-too-long": (lambda: prefill(jnp.array([3, 6, 5])), LENGTHS.format([3, 6, 5])),
    "prompt-empty": (lambda: prefill(np.array([3, 0, 5])), LENGTHS.format([3, 0, 5])),
    "prompt-negative": (lambda: prefill(jnp.array([-1, 1, 5])), LENGTHS.format([-1, 1, 5])),
    "prompt-known-inside-jit": (lambda: inside_jit(prefill, jnp.array([3, 6, 5])), LENGTHS.format([3, 6, 5])),
    "full-inside-jit": (lambda: inside_jit(decode, filled([3, 6, 5])), ROOM.format([3, 6, 5])),
    "cache-too-small": (lambda: prefill(jnp.array([3, 1, 5]), 4), SMALL),
    "cache-too-small-inside-jit": (lambda: jax.jit(lambda n: prefill(n, 4))(jnp.array([3, 1, 5])), SMALL),
    "full": (lambda: decode(filled([3, 6, 5])), ROOM.format([3, 6, 5])),
    "overfull": (lambda: decode(filled([3, 9, 5])), ROOM.format([3, 9, 5])),
    "negative": (lambda: decode(filled([3, -1, 5])), ROOM.format([3, -1, 5])),
    "two-tokens": (lambda: decode(filled([3, 1, 4]), model()[1][:, :2]), TOKENS),
}


@pytest.mark.parametrize("case", CALLS)
def test_what_does_not_fit_is_refused(case):
    call, message = CALLS[case]
    with pytest.raises(ValueError, match=r"must .*, got ") as caught:
        call()
    assert str(caught.value) == message


def test_a_refused_cache_is_not_given_up():
    cache = filled([3, 6, 5])
    with pytest.raises(ValueError, match="leaves room"):
        decode(cache)
    assert not any(x.is_deleted() for x in jax.tree.leaves(cache))


@pytest.mark.parametrize("length", [6, 7, 2**31 - 1, -1, -6])
def test_a_full_sequence_inside_jit_is_nan_and_its_neighbours_keep_their_bits(length):
    want, want_cache = jitted_decode(filled([3, 1, 5]))
    got, cache = jitted_decode(filled([3, length, 5]))
    assert np.isnan(got[1]).all() and np.isfinite(want).all()
    np.testing.assert_array_equal(cache.lengths, [4, 6, 6])
    before = filled([3, length, 5])
    for x, y, old in zip(cache[:2], want_cache[:2], before[:2], strict=True):
        np.testing.assert_array_equal(x[1], old[1])
        np.testing.assert_array_equal(x[::2], y[::2])
    np.testing.assert_array_equal(got[::2], want[::2])
    assert np.isnan(jitted_decode(cache)[0][1:]).all(), "what was full isn't any more"


@pytest.mark.parametrize("length", [6, 9, 0, -2])
def test_a_bad_prompt_inside_jit_is_nan_from_then_on(length):
    want, want_cache = jitted_prefill(jnp.array([3, 2, 5]))
    got, cache = jitted_prefill(jnp.array([3, length, 5]))
    assert np.isnan(got[1]).all() and np.isfinite(want).all()
    np.testing.assert_array_equal(got[::2], want[::2])
    token, _ = jitted_decode(cache)
    want_token, _ = jitted_decode(want_cache)
    assert np.isnan(token[1]).all() and np.isfinite(want_token).all()
    np.testing.assert_array_equal(token[::2], want_token[::2])


def test_a_loop_inside_jit_ends_in_nan_where_one_outside_raises():
    outputs, cache = prefill(jnp.array([5, 3, 4]), cache_length=7)
    inside = jax.jit(lambda cache: jax.lax.scan(lambda cache, _: decode(cache)[::-1], cache, length=4)[1])(cache)
    assert np.isfinite(outputs).all()
    for token in range(2):
        outside, cache = decode(cache)
        np.testing.assert_allclose(inside[token], outside, atol=1e-5)
    np.testing.assert_array_equal(np.isnan(inside[2:]).all(axis=(2, 3)), [[True, False, False], [True, False, True]])
    with pytest.raises(ValueError, match=r"got \[7, 5, 6\]"):
        decode(cache)


def test_the_module_refuses_too():
    pytest.importorskip("flax", reason="the example is a Flax NNX module")
    from examples import gated_attention_nnx

    parameters, hidden, table, config = model()
    layer = gated_attention_nnx.GatedAttention(parameters, config)
    positions = jnp.tile(jnp.arange(LENGTH), (BATCH, 1))
    with pytest.raises(ValueError, match=r"got \[3, 6, 5\]"):
        layer.prefill(hidden[:, :LENGTH], jnp.array([3, 6, 5]), positions, table, cache_length=6)
    with pytest.raises(ValueError, match=r"got \[3, 6, 5\]"):
        layer.decode(hidden[:, -1:], positions[:, :1], table, filled([3, 6, 5]))


@pytest.mark.parametrize("length", [2, 6])
def test_a_finished_sequence_keeps_its_cache_and_needs_no_room(length):
    want, want_cache = decode(filled([3, 2, 5]))
    got, cache = decode_active(filled([3, length, 5]), jnp.array([True, False, True]))
    old = filled([3, length, 5])
    np.testing.assert_array_equal(got[::2], want[::2])
    np.testing.assert_array_equal(cache.lengths, [4, length, 6])
    for x, y, before in zip(cache[:2], want_cache[:2], old[:2], strict=True):
        np.testing.assert_array_equal(x[1], before[1])
        np.testing.assert_array_equal(x[::2], y[::2])
    assert np.isfinite(got).all()


def decode_active(cache, active):
    parameters, every, table, config = model()
    return gated_attention.decode(
        parameters, every[:, -1:], cache.lengths[:, None], table, config, cache, active=active
    )


def test_attention_of_ones_own():
    """A function gets what the cache holds, and the lengths with the new token."""
    seen = []

    def attention(q, k, v, lengths):
        seen.append((q.shape, k.shape, lengths if lengths is None else lengths.shape))
        return jax.nn.dot_product_attention(q, k, v, is_causal=lengths is None, key_value_seq_lengths=lengths)

    parameters, hidden, table, config = model()
    positions = jnp.tile(jnp.arange(LENGTH), (BATCH, 1))
    arrays = parameters, hidden[:, :LENGTH], jnp.array([3, 2, 5]), positions, table, config
    outputs, cache = gated_attention.prefill(*arrays, cache_length=6, attention=attention)
    want, want_cache = gated_attention.prefill(*arrays, cache_length=6, attention="xla")
    np.testing.assert_array_equal(outputs, want)
    arrays = parameters, hidden[:, -1:], cache.lengths[:, None], table, config
    got, _ = gated_attention.decode(*arrays, cache, attention=attention)
    np.testing.assert_array_equal(got, gated_attention.decode(*arrays, want_cache)[0])
    heads = config.num_q_heads, config.head_dim
    assert seen[0] == ((BATCH, LENGTH, *heads), (BATCH, LENGTH, config.num_kv_heads, config.head_dim), None)
    assert seen[1] == ((BATCH, 1, *heads), (BATCH, 6, config.num_kv_heads, config.head_dim), (BATCH,))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_a_cache_of_8_bits(dtype):
    """Decoding stays near that of the wide cache; prefill, whose tokens see each other undivided, is equal to it."""
    parameters, hidden, table, config = model()
    positions = jnp.tile(jnp.arange(LENGTH), (BATCH, 1))
    arrays = parameters, hidden[:, :LENGTH], jnp.array([3, 2, 5]), positions, table, config
    scales = {"k_scale": jnp.float32(0.02), "v_scale": jnp.full(config.num_kv_heads, 0.02)}
    want, wide = gated_attention.prefill(*arrays, cache_length=8)
    got, cache = gated_attention.prefill(*arrays, cache_length=8, cache_dtype=dtype, **scales)
    np.testing.assert_array_equal(got, want)
    assert cache.k.dtype == dtype and cache.k.shape == wide.k.shape
    for step in range(3):
        arrays = parameters, hidden[:, step : step + 1], cache.lengths[:, None], table, config
        want, wide = gated_attention.decode(*arrays, wide)
        got, cache = gated_attention.decode(*arrays, cache)
        error = float(jnp.abs(got - want).max() / jnp.abs(want).max())
        assert 0 < error < 2.0 ** (-3 if dtype == "float8_e4m3fn" else -2)


def test_the_default_attention(monkeypatch):
    class Gpu(NamedTuple):
        platform: str
        compute_capability: str

    def of(capability: str, *arguments) -> str:
        monkeypatch.setattr(jax, "local_devices", lambda: [Gpu("gpu", capability)])
        return gated_attention.default_attention(*arguments)

    assert [of(capability, "bfloat16", 2) for capability in ("9.0", "10.0", "8.9")] == ["cudnn", "cudnn", "xla"]
    assert [of("9.0", *x) for x in (["float32"], ["float16"], ["float16", 17])] == ["xla", "cudnn", "xla"]
    for host in ("cpu", jax.devices("cpu")[0]):
        with jax.default_device(host):
            assert of("9.0", "bfloat16") == "xla"


def test_scales_may_be_shared():
    """By k and v, and by layers: they are not given up with the cache."""
    scale = jnp.float32(0.05)
    zeros = [jnp.zeros((BATCH, 6, 2, 64), "float8_e4m3fn") for _ in range(4)]
    caches = [KVCache(k, v, jnp.array([3, 2, 5], jnp.int32), scale, scale) for k, v in (zeros[:2], zeros[2:])]
    first, second = (decode(cache) for cache in caches)
    np.testing.assert_array_equal(first[0], second[0])
    assert not scale.is_deleted() and caches[0].k.is_deleted()


@pytest.mark.parametrize("cache_dtype", ["float16", "bfloat16"])
def test_a_cache_of_another_dtype(cache_dtype):
    parameters, hidden, table, config = model()
    arrays = (
        parameters,
        hidden[:, :LENGTH],
        jnp.array([3, 2, 5]),
        jnp.tile(jnp.arange(LENGTH), (BATCH, 1)),
        table,
        config,
    )
    _, wide = gated_attention.prefill(*arrays, cache_length=6)
    _, cache = gated_attention.prefill(*arrays, cache_length=6, cache_dtype=cache_dtype)
    np.testing.assert_allclose(decode(cache)[0], decode(wide)[0], atol=0.05)


@pytest.mark.parametrize("active", [jnp.ones(3, jnp.int32), jnp.ones((3, 1), bool)])
def test_active_of_another_kind_is_refused(active):
    with pytest.raises(ValueError, match=r"active must be bools of shape \(3,\), got "):
        decode_active(filled([3, 2, 5]), active)
