"""Every bad call gives one error of ours: its type and its whole text, before any device work."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_qk
from tests.cases import Case, make_inputs
from tests.compare import assert_same

CASE = Case(4, 3, 2, head_dim=64, rotary_dim=16)
MROPE = (3, 3, 2)


def keys(*shape: int):
    """Made when a test runs."""
    return lambda: jax.random.split(jax.random.key(0), shape)


def bad(exception, message, **changes):
    return pytest.param(exception, message, changes, id=f"{next(iter(changes))}-{len(message)}")


ORDER = "Pass a Python int; the order is num_q_heads, num_kv_heads, head_dim, rotary_dim."
MAKE_TABLE = "pallas_qk.rope.cos_sin_cache makes it, with rows [cos | sin]; positions stand behind it."
SIZES = "Pass the number that this device's arrays hold."
TO_INT32 = "Cast them with astype(jnp.int32)."
FRACTIONS = (
    "positions must be integers, got {}. Cast whole numbers with astype(jnp.int32); of fractions pass the rows of "
    "pallas_qk.rope.cos_sin_rows as cos_sin_cache, and positions=None; cos and sin are one array, [cos | sin]."
)
FLOATING = "must be float16, bfloat16 or float32, got {}. Cast it with astype."
SECTION = (
    "mrope_section must be three integers >= 0 that sum to rotary_dim // 2 = 8, got {}. "
    "Pass the counts of time, height and width frequencies, such as (11, 11, 10) for rotary_dim=64."
)
ROTARY = (
    "rotary_dim must be a positive even integer <= head_dim, got rotary_dim={}, head_dim=64. "
    "For a config with a partial_rotary_factor, pass int(partial_rotary_factor * head_dim)."
)

Q_GATE = (
    "q_gate must have shape (..., 384) or (..., 3, 128), got {}. "
    "Its sizes: num_q_heads, 2 * head_dim, as one axis or two{}."
)
WITHOUT_GATES = "; fused_qk_rmsnorm_rope takes q without gates"
WEIGHT = (
    "{} must have shape (64,), got {}. Its sizes: head_dim; where that is left out, the length of the first weight."
)
K = "k must have shape {}, got {}. Its sizes: the leading axes of q_gate, then {}."
IN_HEADS = "num_kv_heads, head_dim; tokens come before heads"
POSITIONS = (
    "positions must have shape {}, or one that broadcasts to it, got {}. "
    "Its sizes: the leading axes of q_gate; three rows of positions need mrope_section."
)
THREE_ROWS = (
    "positions must have shape {}, or one that broadcasts to it, got {}. Its sizes: one row each for time, height and "
    "width, then the leading axes of q_gate; leave mrope_section out for a single row."
)
ROWS = (
    "cos_sin_cache must have shape {}, or one that broadcasts to it, got {}. Its sizes: the leading axes of q_gate, "
    "then rotary_dim; without positions the table has the row of each token."
)


def with_axes(message: str, array: str) -> str:
    return f"{message[:-1]}; {array} has an axis for each."


BAD_CALLS = [
    bad(ValueError, f"num_q_heads must be at least 1, got 0. {SIZES}", num_q_heads=0),
    bad(ValueError, f"num_kv_heads must be at least 1, got -1. {SIZES}", num_kv_heads=-1),
    bad(ValueError, f"head_dim must be at least 1, got 0. {SIZES}", head_dim=0),
    bad(
        TypeError,
        f"num_q_heads must be an integer known when tracing, got 3.0 of type float. {ORDER}",
        num_q_heads=3.0,
    ),
    bad(
        TypeError,
        "num_q_heads must be an integer known when tracing, got a numpy.ndarray of shape (4,) and dtype int32. An "
        "array too many stands before it. Where a function takes q, k and v, they are one tuple.",
        num_q_heads=np.zeros(4, np.int32),
    ),
    bad(
        TypeError,
        "eps must be a real number known when tracing, got a numpy.ndarray of shape (4,) and dtype int32. An array too "
        "many stands before it. Where a function takes q, k and v, they are one tuple.",
        eps=np.zeros(4, np.int32),
    ),
    bad(
        TypeError,
        "eps must be a real number known when tracing, got a numpy.ndarray of shape (1,) and dtype float64. Pass a "
        "Python float.",
        eps=np.array([1e-6]),
    ),
    bad(
        TypeError,
        "eps must be a real number known when tracing, got a dict with the keys [1, 'a']. Pass a Python float.",
        eps={1: 1e-6, "a": 3},
    ),
    bad(
        TypeError,
        f"num_kv_heads must be an integer known when tracing, got True of type bool. {ORDER}",
        num_kv_heads=True,
    ),
    bad(ValueError, ROTARY.format(0), rotary_dim=0),
    bad(ValueError, ROTARY.format(-2), rotary_dim=-2),
    bad(ValueError, ROTARY.format(7), rotary_dim=7),
    bad(ValueError, ROTARY.format(66), rotary_dim=66),
    bad(
        ValueError,
        "eps must be a finite float32 of at least 0, got -1e-06. Model configs call it rms_norm_eps and the like.",
        eps=-1e-6,
    ),
    bad(
        ValueError,
        "eps must be a finite float32 of at least 0, got nan. Model configs call it rms_norm_eps and the like.",
        eps=float("nan"),
    ),
    bad(
        ValueError,
        "eps must be a small float, got the integer 3. Pass it in front of num_q_heads, such as 1e-6.",
        eps=3,
    ),
    bad(
        ValueError,
        "eps must be a finite float32 of at least 0, got 1e+300. Model configs call it rms_norm_eps and the like.",
        eps=1e300,
    ),
    bad(
        ValueError,
        f"norm_beta must be a finite float32, got {10**40}. "
        "Pass 1.0 for weights stored minus one (Gemma, Qwen3.5), else 0.0.",
        norm_beta=10**40,
    ),
    bad(
        TypeError,
        "eps must be a real number known when tracing, got '1e-6' of type str. Pass a Python float.",
        eps="1e-6",
    ),
    bad(
        ValueError,
        "norm_beta must be a finite float32, got inf. "
        "Pass 1.0 for weights stored minus one (Gemma, Qwen3.5), else 0.0.",
        norm_beta=float("inf"),
    ),
    bad(TypeError, SECTION.format("32 of type int"), mrope_section=32, positions=(3, 4)),
    bad(TypeError, SECTION.format("(3.0, 3, 2) of type tuple"), mrope_section=(3.0, 3, 2), positions=(3, 4)),
    bad(ValueError, SECTION.format("(4, 4)"), mrope_section=(4, 4), positions=(3, 4)),
    bad(ValueError, SECTION.format("(4, 4, 4)"), mrope_section=(4, 4, 4), positions=(3, 4)),
    bad(ValueError, SECTION.format("(9, -1, 0)"), mrope_section=(9, -1, 0), positions=(3, 4)),
    bad(
        ValueError,
        "implementation must be None or one of {names}, got 'cuda'. None picks the first that runs.",
        implementation="cuda",
    ),
    bad(
        ValueError,
        "implementation must be None or one of {names}, got array([0, 1]). None picks the first that runs.",
        implementation=np.arange(2),
    ),
    bad(
        TypeError,
        "positions must have this machine's byte order, got >i4. Convert it with astype.",
        positions=np.zeros(4, ">i4"),
    ),
    bad(
        TypeError,
        "q_gate must be a JAX or NumPy array, got [[0.0]] of type list. Convert it with jnp.asarray.",
        q_gate=[[0.0]],
    ),
    # What holds arrays is described without their elements.
    bad(
        TypeError,
        "cos_sin_cache must be a JAX or NumPy array, got a tuple of length 2 that starts with a numpy.ndarray of shape "
        f"(8,) and dtype float64. {MAKE_TABLE}",
        cos_sin_cache=lambda: (np.zeros(8), 1.0),
    ),
    bad(
        TypeError,
        "k must be a JAX or NumPy array, got a list of length 1 that starts with a list of length 2 that starts with "
        "0.0 of type float. Convert it with jnp.asarray.",
        k=lambda: [[0.0, np.zeros(8)]],
    ),
    bad(
        TypeError,
        "q_weight must be a JAX or NumPy array, got a dict with the keys ['kernel']. Convert it with jnp.asarray.",
        q_weight=lambda: {"kernel": np.zeros(8)},
    ),
    bad(
        TypeError,
        "q_gate " + FLOATING.format("float64"),
        q_gate=np.zeros((4, 384)),
    ),
    bad(TypeError, "q_gate " + FLOATING.format("int8"), q_gate=((4, 384), "int8")),
    bad(
        TypeError,
        "k must have the dtype of q_gate, bfloat16, got float16. Cast one to the other.",
        k=((4, 128), "float16"),
    ),
    bad(
        TypeError,
        "q_weight " + FLOATING.format("float8_e4m3fn"),
        q_weight=((64,), "float8_e4m3fn"),
    ),
    bad(TypeError, "k_weight " + FLOATING.format("int32"), k_weight=((64,), "int32")),
    bad(TypeError, f"cos_sin_cache {FLOATING.format('float64')} {MAKE_TABLE}", cos_sin_cache=np.zeros((8, 16))),
    bad(
        TypeError,
        f"cos_sin_cache must be a JAX or NumPy array, got 10000000.0 of type float. {MAKE_TABLE}",
        cos_sin_cache=1e7,
    ),
    bad(
        TypeError,
        f"cos_sin_cache must be float16, bfloat16 or float32, got int32. {MAKE_TABLE}",
        cos_sin_cache=((4,), "int32"),
        positions=((8, 16), "float32"),
    ),
    bad(TypeError, FRACTIONS.format("float32"), positions=((4,), "float32")),
    bad(TypeError, FRACTIONS.format("bfloat16"), positions=((4,), "bfloat16")),
    bad(TypeError, "positions must be integers, got bool. Pass numbers, not a mask.", positions=((4,), "bool")),
    bad(TypeError, f"positions must be integers, got timedelta64[s]. {TO_INT32}", positions=np.zeros(4, "m8[s]")),
    # What is more, or less, than an array of numbers.
    bad(TypeError, "q_weight " + FLOATING.format("key<fry>"), q_weight=keys(64)),
    bad(TypeError, f"cos_sin_cache {FLOATING.format('key<fry>')} {MAKE_TABLE}", cos_sin_cache=keys(8, 16)),
    bad(TypeError, "k must have the dtype of q_gate, bfloat16, got key<fry>. Cast one to the other.", k=keys(4, 128)),
    bad(TypeError, f"positions must be integers, got key<fry>. {TO_INT32}", positions=keys(4)),
    bad(
        TypeError,
        "positions must be a JAX or NumPy array, got a numpy.ma.MaskedArray of shape (4,) and dtype int64. "
        "Pass its filled().",
        positions=np.ma.masked_array(np.arange(4), [0, 1, 0, 0]),
    ),
    bad(ValueError, Q_GATE.format("(4, 192)", WITHOUT_GATES), q_gate=(4, 192)),
    bad(ValueError, Q_GATE.format("(4, 3, 64)", WITHOUT_GATES), q_gate=(4, 3, 64)),
    bad(ValueError, Q_GATE.format("(384, 4)", ""), q_gate=(384, 4)),
    bad(ValueError, Q_GATE.format("()", ""), q_gate=()),
    bad(ValueError, K.format("(4, 128)", "(5, 128)", "num_kv_heads * head_dim"), k=(5, 128)),
    bad(ValueError, K.format("(4, 128)", "(4, 64)", "num_kv_heads * head_dim"), k=(4, 64)),
    bad(ValueError, K.format("(4, 128)", "(4, 2, 64)", "num_kv_heads * head_dim"), k=(4, 2, 64)),
    bad(ValueError, K.format("(4, 2, 64)", "(4, 128)", IN_HEADS), q_gate=(4, 3, 128)),
    bad(ValueError, K.format("(2, 2, 128)", "(4, 128)", "num_kv_heads * head_dim"), q_gate=(2, 2, 384)),
    bad(ValueError, WEIGHT.format("q_weight", "(32,)"), q_weight=(32,)),
    bad(ValueError, WEIGHT.format("k_weight", "(1, 64)"), k_weight=(1, 64)),
    bad(
        ValueError,
        "cos_sin_cache must have shape (max_position, 16), got (8, 8). Its sizes: rotary_dim, which may be left out; "
        "each row is [cos | sin].",
        cos_sin_cache=(8, 8),
    ),
    bad(
        ValueError,
        "cos_sin_cache must have at least one row, got shape (0, 16). Build it for max_position >= 1.",
        cos_sin_cache=(0, 16),
    ),
    bad(ValueError, POSITIONS.format("(4,)", "(3,)"), positions=(3,)),
    bad(ValueError, POSITIONS.format("(4,)", "(3, 4)"), positions=(3, 4)),
    bad(ValueError, POSITIONS.format("(2, 2)", "(4,)"), q_gate=(2, 2, 384), k=(2, 2, 128)),
    bad(ValueError, THREE_ROWS.format("(3, 4)", "(4,)"), mrope_section=MROPE),
    bad(ValueError, THREE_ROWS.format("(3, 4)", "(2, 4)"), mrope_section=MROPE, positions=(2, 4)),
    bad(
        ValueError,
        THREE_ROWS.format("(3, 2, 2)", "(2, 2)"),
        mrope_section=MROPE,
        q_gate=(2, 2, 384),
        k=(2, 2, 128),
        positions=(2, 2),
    ),
    bad(ValueError, ROWS.format("(4, 16)", f"({CASE.max_position}, 16)"), positions=None),
    bad(ValueError, ROWS.format("(4, 16)", "(4, 8)"), positions=None, cos_sin_cache=(4, 8)),
    bad(ValueError, ROWS.format("(4, 16)", "(3, 4, 16)"), positions=None, cos_sin_cache=(3, 4, 16)),
    bad(
        ValueError,
        "positions must be given with mrope_section, got None. "
        "Pass them, or pass mrope_section to pallas_qk.rope.cos_sin_rows and its rows here without it.",
        positions=None,
        mrope_section=MROPE,
    ),
    bad(
        ValueError,
        "mrope_layout must be 'interleaved' or 'sectioned', got 'blocks'. "
        "Pass 'interleaved' for Qwen3-VL and Qwen3.5, 'sectioned' for Qwen2-VL and Qwen2.5-VL.",
        mrope_layout="blocks",
    ),
    *(
        bad(
            ValueError,
            f"rotation must be 'halves' or 'pairs', got {rotation!r}. "
            "Pass 'halves' for elements j and j + rotary_dim // 2 (NeoX), 'pairs' for 2j and 2j + 1 (GPT-J).",
            rotation=rotation,
        )
        for rotation in ("interleaved", True, None, np.arange(2))
    ),
    *(
        bad(
            TypeError,
            f"round_norm must be a bool known when tracing, got {described}. "
            "Pass False to keep float32 between norm and rotation.",
            round_norm=round_norm,
        )
        for round_norm, described in ((1, "1 of type int"), ("no", "'no' of type str"), (None, "None"))
    ),
    bad(
        TypeError,
        "copy_gate must be True, False or 'never', known when tracing, got 0 of type int. "
        "Pass False to leave the gate where it lies, for XLA to fuse into what reads it.",
        copy_gate=0,
    ),
    bad(
        ValueError,
        "copy_gate must be True, False or 'never', known when tracing, got 'Never' of type str. "
        "Pass False to leave the gate where it lies, for XLA to fuse into what reads it.",
        copy_gate="Never",
    ),
    bad(
        ValueError,
        "num_kv_heads must be 0 where k is None, got 2. Pass 0 for q alone, or pass k.",
        k=None,
    ),
    bad(
        ValueError,
        "k_weight must be None where k is, got one. Leave it out for q alone, or pass k.",
        k=None,
        num_kv_heads=0,
    ),
    bad(
        ValueError,
        "num_kv_heads must be at least 1, got 0. Pass the number that this device's arrays hold.",
        num_kv_heads=0,
    ),
    # A single head beside several of k, which tell whether heads are an axis.
    bad(
        ValueError,
        POSITIONS.format("(4,)", "(4, 1)").replace("q_gate;", "q_gate, so tokens come before heads;"),
        num_q_heads=1,
        q_gate=(4, 1, 128),
        k=(4, 2, 64),
        positions=(4, 1),
    ),
    # NumPy aligns the last axes.
    bad(
        ValueError,
        with_axes(POSITIONS.format("(4, 1)", "(4,)"), "positions[:, None]"),
        num_q_heads=1,
        q_gate=(4, 1, 128),
        k=(4, 1, 128),
    ),
    bad(
        ValueError,
        with_axes(POSITIONS.format("(2, 1, 1)", "(2,)"), "positions[:, None, None]"),
        q_gate=(2, 1, 1, 384),
        k=(2, 1, 1, 128),
        positions=(2,),
    ),
    bad(ValueError, POSITIONS.format("(2, 3, 1)", "(2,)"), q_gate=(2, 3, 1, 384), k=(2, 3, 1, 128), positions=(2,)),
    bad(
        ValueError,
        with_axes(THREE_ROWS.format("(3, 2, 1)", "(3, 2)"), "positions[:, :, None]"),
        q_gate=(2, 1, 384),
        k=(2, 1, 128),
        positions=(3, 2),
        mrope_section=MROPE,
    ),
    bad(
        ValueError,
        with_axes(ROWS.format("(2, 1, 16)", "(2, 16)"), "cos_sin_cache[:, None]"),
        q_gate=(2, 1, 384),
        k=(2, 1, 128),
        positions=None,
        cos_sin_cache=(2, 16),
    ),
]


def arguments(changes):
    inputs = make_inputs(CASE)
    arrays = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    for name, value in changes.items():
        if name in arrays and isinstance(value, tuple):
            shape, dtype = value if value and isinstance(value[0], tuple) else (value, arrays[name].dtype)
            changes = changes | {name: jnp.zeros(shape, dtype)}
        elif callable(value):
            changes = changes | {name: value()}
    return arrays | CASE.static_arguments | {"implementation": None} | changes


@pytest.mark.parametrize("exception, message, changes", BAD_CALLS)
def test_bad_call(exception, message, changes):
    names = ", ".join(map(repr, pallas_qk.IMPLEMENTATIONS))
    message = message.replace("{names}", names)
    with pytest.raises(exception, match=f"^{re.escape(message)}$"):
        pallas_qk.fused_qk_rmsnorm_rope_gate(**arguments(changes))


OTHER_FUNCTIONS = {
    "fused_qk_rmsnorm_rope": ("q", 192),
    "fused_qkv_rmsnorm_rope_gate": ("qkv", 384 + 256),
    "fused_qkv_rmsnorm_rope": ("qkv", 192 + 256),
}
QKV = (
    "qkv must have shape (..., 640), got {}. Its sizes: num_q_heads * 2 * head_dim + 2 * num_kv_heads * head_dim, "
    "[q and gate of each head | k | v]{}."
)
QKV_WITHOUT_GATES = (
    "qkv must have shape (..., 448), got {}. Its sizes: num_q_heads * head_dim + 2 * num_kv_heads * head_dim, "
    "[q | k | v]; fused_qkv_rmsnorm_rope_gate takes q with gates."
)


@pytest.mark.parametrize(
    "function, exception, message, changes",
    [
        (
            "fused_qk_rmsnorm_rope",
            ValueError,
            "q must have shape (..., 192) or (..., 3, 64), got (4, 384). "
            "Its sizes: num_q_heads, head_dim, as one axis or two; fused_qk_rmsnorm_rope_gate takes q with gates.",
            {"q": (4, 384)},
        ),
        (
            "fused_qk_rmsnorm_rope",
            ValueError,
            "k must have shape (2, 2, 2, 64), got (4, 128). "
            "Its sizes: the leading axes of q, then num_kv_heads, head_dim; tokens come before heads.",
            {"q": (2, 2, 3, 64)},
        ),
        (
            "fused_qk_rmsnorm_rope",
            TypeError,
            "k must have the dtype of q, bfloat16, got float16. Cast one to the other.",
            {"k": ((4, 128), "float16")},
        ),
        ("fused_qkv_rmsnorm_rope_gate", ValueError, QKV.format("(4, 384)", ""), {"qkv": (4, 384)}),
        ("fused_qkv_rmsnorm_rope_gate", ValueError, QKV.format("(4, 10, 64)", ""), {"qkv": (4, 10, 64)}),
        ("fused_qkv_rmsnorm_rope_gate", TypeError, "qkv " + FLOATING.format("int8"), {"qkv": ((4, 640), "int8")}),
        (
            "fused_qkv_rmsnorm_rope_gate",
            ValueError,
            "positions must have shape (2, 2), or one that broadcasts to it, got (4,). "
            "Its sizes: the leading axes of qkv; three rows of positions need mrope_section.",
            {"qkv": (2, 2, 640)},
        ),
        ("fused_qkv_rmsnorm_rope", ValueError, QKV_WITHOUT_GATES.format("(4, 640)"), {"qkv": (4, 640)}),
        ("fused_qkv_rmsnorm_rope", TypeError, "qkv " + FLOATING.format("int8"), {"qkv": ((4, 448), "int8")}),
        (
            "fused_qkv_rmsnorm_rope_gate",
            TypeError,
            "copy_gate must be True, False or 'never', known when tracing, got None. "
            "Pass False to leave the gate where it lies, for XLA to fuse into what reads it.",
            {"copy_gate": None},
        ),
    ],
)
def test_bad_call_of_another_function(function, exception, message, changes):
    name, width = OTHER_FUNCTIONS[function]
    given = arguments({})
    del given["q_gate"]
    if name == "qkv":
        del given["k"]
    given[name] = jnp.zeros((4, width), CASE.dtype)
    getattr(pallas_qk, function)(**given)
    for key, value in changes.items():
        if isinstance(value, tuple):
            shape, dtype = value if isinstance(value[0], tuple) else (value, CASE.dtype)
            changes = changes | {key: jnp.zeros(shape, dtype)}
    with pytest.raises(exception, match=f"^{re.escape(message)}$"):
        getattr(pallas_qk, function)(**given | changes)


@pytest.mark.parametrize(
    "options, names, got",
    [
        ({"copy_gate": True}, "copy_gate", "bool[]"),
        ({"round_norm": True}, "round_norm", "bool[]"),
        ({"eps": 1e-6}, "eps", "float32[]"),
        ({"rotary_dim": 16}, "rotary_dim", "int32[]"),
        ({"num_kv_heads": 2, "eps": 1e-6}, "eps and num_kv_heads", "float32[], a traced value int32[]"),
        (
            {"num_q_heads": 3, "norm_beta": 1.0, "mrope_section": MROPE},
            "num_q_heads, mrope_section and norm_beta",
            "int32[], a traced value int32[], a traced value float32[]",
        ),
    ],
)
def test_traced_options_are_refused_together(options, names, got):
    call = jax.jit(lambda options: pallas_qk.fused_qk_rmsnorm_rope_gate(**arguments(options)))
    them = "it" if len(options) == 1 else "them"
    message = (
        f"{names} must be known when tracing, got a traced value {got}. "
        f"Name {them} in static_argnames of your jax.jit, or hold {them} in a lambda."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):  # a jit adds a note of its own
        call(options)


@pytest.mark.parametrize("name", ["q_gate", "k", "q_weight", "k_weight", "cos_sin_cache", "positions"])
def test_an_array_in_host_memory_is_refused(name):
    """Whatever it is, traced or not: a kernel would be given an address of the host."""
    given = arguments({})
    where = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    on_host = jax.device_put(given[name], where)

    def call(x):
        return pallas_qk.fused_qk_rmsnorm_rope_gate(**given | {name: x})

    message = (
        f"{name} must lie in device memory, got {jax.typeof(on_host).str_short()}. "
        "Move it with jax.device_put(array, jax.memory.Space.Device)."
    )
    for function in (call, jax.jit(call)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            function(on_host)
    moved = jax.jit(lambda x: call(jax.device_put(x, jax.memory.Space.Device)))(on_host)
    assert_same(moved, call(given[name]))


def test_a_ref_is_refused():
    ref = jax.new_ref(jnp.zeros((4, 128), jnp.bfloat16))
    kind = f"{type(ref).__module__}.{type(ref).__qualname__}"
    message = f"k must be a JAX or NumPy array, got a {kind} of shape (4, 128) and dtype bfloat16. Read it with [...]."
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        pallas_qk.fused_qk_rmsnorm_rope_gate(**arguments({"k": ref}))


class Box:
    """How modules hold a parameter: no pytree, no array, but one that says which array it stands for."""

    def __init__(self, x):
        self.x = x

    def __jax_array__(self):
        return self.x


@pytest.mark.parametrize("name", ["q_gate", "k", "q_weight", "k_weight", "cos_sin_cache", "positions"])
def test_arrays_in_boxes(name):
    given = arguments({})

    def call(x):
        return pallas_qk.fused_qk_rmsnorm_rope_gate(**given | {name: Box(x)})

    want = pallas_qk.fused_qk_rmsnorm_rope_gate(**given)
    for got in (call(given[name]), call(Box(given[name])), call(np.asarray(given[name])), jax.jit(call)(given[name])):
        assert_same(got, want)
    if name != "positions":
        gradient = jax.grad(lambda x: sum(jnp.sum(y.astype(jnp.float32)) for y in call(x)))(given[name])
        assert gradient.shape == given[name].shape and np.asarray(gradient, np.float32).any()


def test_torch_tensors_are_pointed_to_the_exchange():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match=r"got a torch.Tensor of shape \(4, 384\).*pallas_qk.dlpack.from_torch"):
        pallas_qk.fused_qk_rmsnorm_rope_gate(**arguments({"q_gate": torch.zeros(4, 384)}))


def test_the_same_errors_come_out_of_a_jit():
    with pytest.raises(ValueError, match=r"^k must have shape \(4, 128\), got \(4, 64\)"):
        jax.jit(lambda k: pallas_qk.fused_qk_rmsnorm_rope_gate(**arguments({"k": k})))(jnp.zeros((4, 64), jnp.bfloat16))


DEFAULT_SIZES = {
    "num_tokens": 4,
    "num_q_heads": 16,
    "num_kv_heads": 2,
    "head_dim": 256,
    "rotary_dim": 64,
    "dtype": "bfloat16",
}


NAMED = "must be float16, bfloat16 or float32, got {}. Pass one of these."


@pytest.mark.parametrize(
    "exception, message, changes",
    [
        (ValueError, "num_tokens must be at least 0, got -1. Pass the size of the tokens' axis.", {"num_tokens": -1}),
        (TypeError, "num_tokens must be an integer, got 1.5 of type float. Pass a Python int.", {"num_tokens": 1.5}),
        (TypeError, "dtype " + NAMED.format("float64"), {"dtype": "float64"}),
        (
            TypeError,
            "dtype " + NAMED.format("'half-ish' of type str"),
            {"dtype": "half-ish"},
        ),
        (
            TypeError,
            "cache_dtype must be float16, bfloat16, float32, float8_e4m3fn or float8_e5m2, got int8. "
            "Pass one of these.",
            {"cache_dtype": "int8"},
        ),
        (
            ValueError,
            "platform must be None or one of 'cpu', 'cuda', 'rocm', 'tpu', got 'gpu'. "
            "None means the default device's platform.",
            {"platform": "gpu"},
        ),
        (ValueError, f"num_q_heads must be at least 1, got 0. {SIZES}", {"num_q_heads": 0}),
        (
            ValueError,
            "rotation must be 'halves' or 'pairs', got 'neox'. "
            "Pass 'halves' for elements j and j + rotary_dim // 2 (NeoX), 'pairs' for 2j and 2j + 1 (GPT-J).",
            {"rotation": "neox"},
        ),
    ],
)
def test_bad_question_about_the_default(exception, message, changes):
    with pytest.raises(exception, match=f"^{re.escape(message)}$"):
        pallas_qk.default_implementation(**DEFAULT_SIZES | changes)
