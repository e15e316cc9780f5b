"""Slots of tokens in a KV cache, by a loop in Python's integers."""

import doctest
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_qk import kv_cache
from tests.devices import MODES, compiled, mesh_of, put

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
LARGEST = {"int32": 2**31 - 1, "int64": 2**63 - 1}
# Narrowed, wrapped or counted from an axis's end, some of these name a place or a sequence that exists.
OUTSIDE = (-1, -2, -16, -(2**31), 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, -(2**32) + 5, 2**63 - 1, 2**64 - 1)


def slot(block: int, place: int, size: int, result: str = "int32") -> int:
    found = block * size + place
    return found if block >= 0 and found <= LARGEST[result] else -1


def slots_of_pages(table, places, size, sequences, result="int32"):
    """`sequences` has the shape of `places`."""
    got = np.full(np.shape(places), -1, result)
    for token in np.ndindex(got.shape):
        row, place = int(sequences[token]), int(places[token])
        if 0 <= row < len(table) and 0 <= place < len(table[0]) * size:
            got[token] = slot(int(table[row][place // size]), place % size, size, result)
    return got


def slots_of_rows(places, size, sequences, result="int32"):
    got = np.full(np.shape(places), -1, result)
    for token in np.ndindex(got.shape):
        if 0 <= int(places[token]) < size:
            got[token] = slot(int(sequences[token]), int(places[token]), size, result)
    return got


def rows_of(shape):
    """Each token's index on the first axis."""
    return np.broadcast_to(np.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)), shape)


def assert_slots(got, want):
    assert isinstance(got, jax.Array) and got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


def with_values_outside(dtype: str, values, shape) -> np.ndarray:
    """Drawn from `values` and OUTSIDE, as far as the dtype has them."""
    limits = np.iinfo(dtype)
    held = [value for value in (*values, *OUTSIDE) if limits.min <= value <= limits.max]
    return np.array(np.random.default_rng(0).choice(np.array(held, object), shape), dtype)


@pytest.fixture(params=["numpy", "jit"])
def run(request):
    """Runs a function of arrays that are NumPy's, or traced where JAX has their dtype."""

    def run(function, *arrays):
        if request.param == "numpy":
            return function(*arrays)
        traced = {i: jnp.asarray(x) for i, x in enumerate(arrays) if jax.dtypes.canonicalize_dtype(x.dtype) == x.dtype}
        return jax.jit(lambda traced: function(*(traced.get(i, x) for i, x in enumerate(arrays))))(traced)

    return run


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_every_integer_dtype_and_what_lies_outside(run, dtype, x64):
    result = "int64" if x64 and dtype.endswith("64") else "int32"
    places = with_values_outside(dtype, range(0, 40, 3), (6, 20))
    sequences = with_values_outside(dtype, range(6), (6, 20))
    table = with_values_outside(dtype, range(1, 60, 7), (6, 5))
    with jax.enable_x64(x64):
        assert_slots(
            run(lambda x: kv_cache.slots_of_rows(x, 33), places), slots_of_rows(places, 33, rows_of((6, 20)), result)
        )
        got = run(lambda x, y: kv_cache.slots_of_rows(x, 33, sequences=y), places, sequences)
        assert_slots(got, slots_of_rows(places, 33, sequences, result))
        got = run(lambda t, x: kv_cache.slots_of_pages(t, x, 7), table, places)
        assert_slots(got, slots_of_pages(table, places, 7, rows_of((6, 20)), result))
        got = run(lambda t, x, y: kv_cache.slots_of_pages(t, x, 7, sequences=y), table, places, sequences)
        assert_slots(got, slots_of_pages(table, places, 7, sequences, result))


@pytest.mark.parametrize("given", ["block_tables", "places", "sequences"])
def test_one_argument_of_64_bits_gives_64_bits(given):
    arrays = {name: np.zeros(1, "int64" if name == given else "int32") for name in ("places", "sequences")}
    table = np.full((1, 1), 2**29, "int64" if given == "block_tables" else "int32")
    with jax.enable_x64(True):
        assert_slots(kv_cache.slots_of_pages(table, block_size=16, **arrays), np.array([2**33]))
    assert_slots(kv_cache.slots_of_pages(table, block_size=16, **arrays), np.array([-1], np.int32))


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("size", [1, 16, 24, 2**16, 2**31 - 1])
def test_a_slot_that_the_dtype_does_not_hold_is_none(run, size, dtype):
    """The last block that fits, in full or in part, and the first that doesn't; products that wrap to small numbers."""
    most = LARGEST[dtype]
    last = most // size
    wrapped = 2 * (most + 1) // size
    blocks = [block for block in (0, 1, last - 1, last, last + 1, wrapped, wrapped + 1, most) if block <= most]
    blocks = np.array(blocks, dtype)
    places = np.unique([0, size // 2, most % size, min(most % size + 1, size - 1), size - 1]).astype(dtype)
    places, sequences = (x.ravel() for x in np.meshgrid(places, np.arange(len(blocks), dtype=dtype)))
    with jax.enable_x64(dtype == "int64"):
        got = run(lambda t, x, y: kv_cache.slots_of_pages(t, x, size, sequences=y), blocks[:, None], places, sequences)
        assert_slots(got, slots_of_pages(blocks[:, None], places, size, sequences, dtype))
        got = run(lambda x, y: kv_cache.slots_of_rows(x, size, sequences=y), places, blocks[sequences])
        assert_slots(got, slots_of_rows(places, size, blocks[sequences], dtype))
        assert (np.asarray(got) == most).any()


@pytest.mark.parametrize(
    "lead, rest",
    [((3,), ()), ((3,), (4,)), ((3,), (4, 2)), ((2, 3), ()), ((2, 3), (4,)), ((), ()), ((), (5,)), ((0,), (4,))],
)
def test_axes_of_pages(run, lead, rest):
    rng = np.random.default_rng(1)
    table = rng.integers(0, 50, (*lead, 4), np.int32)
    places = np.asarray(rng.integers(-1, 36, (*lead, *rest)), np.int32)
    rows = np.arange(np.prod(lead, dtype=int)).reshape((*lead, *[1] * len(rest)))
    want = slots_of_pages(table.reshape(-1, 4), places, 8, np.broadcast_to(rows, places.shape))
    assert_slots(run(lambda t, x: kv_cache.slots_of_pages(t, x, 8), table, places), want)


@pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 4, 2), (0, 4), (3, 0)])
def test_axes_of_rows(run, shape):
    places = np.random.default_rng(1).integers(-1, 10, shape, np.int32)
    assert_slots(run(lambda x: kv_cache.slots_of_rows(x, 9), places), slots_of_rows(places, 9, rows_of(shape)))


SHAPES = [(), (5,), (5, 4), (5, 4, 2), (0,)]


@pytest.mark.parametrize("shape, of_places", [(shape, n) for shape in SHAPES for n in range(len(shape) + 1)])
def test_sequences_have_leading_axes_of_places(run, shape, of_places):
    rng = np.random.default_rng(2)
    places, table = np.asarray(rng.integers(-1, 36, shape), np.int32), rng.integers(-1, 50, (3, 4), np.int32)
    sequences = np.asarray(rng.integers(-1, 4, shape[:of_places]), np.int32)
    each = np.broadcast_to(sequences.reshape((*shape[:of_places], *[1] * (len(shape) - of_places))), shape)
    got = run(lambda t, x, y: kv_cache.slots_of_pages(t, x, 8, sequences=y), table, places, sequences)
    assert_slots(got, slots_of_pages(table, places, 8, each))
    got = run(lambda x, y: kv_cache.slots_of_rows(x, 30, sequences=y), places, sequences)
    assert_slots(got, slots_of_rows(places, 30, each))


def test_the_next_tokens_after_those_in_the_cache():
    """The recipe of the module's docstring."""
    lengths, counts, n = jnp.array([3, 0, 7]), jnp.array([2, 0, 3]), 3
    step = jnp.arange(n)
    with jax.numpy_rank_promotion("allow"):
        places = jnp.where(step < counts[:, None], lengths[:, None] + step, -1)
    np.testing.assert_array_equal(places, [[3, 4, -1], [-1, -1, -1], [7, 8, 9]])
    np.testing.assert_array_equal(kv_cache.slots_of_rows(places, 9), [[3, 4, -1], [-1, -1, -1], [25, 26, -1]])


def test_arguments_of_several_dtypes(run):
    rng = np.random.default_rng(3)
    table, places = rng.integers(0, 50, (3, 4), np.uint16), rng.integers(-1, 36, (7,), np.int8)
    sequences = rng.integers(0, 3, (7,), np.uint32)
    got = run(lambda t, x, y: kv_cache.slots_of_pages(t, x, 8, sequences=y), table, places, sequences)
    assert_slots(got, slots_of_pages(table, places, 8, sequences))


def test_arrays_in_boxes():
    class Box:
        def __init__(self, value):
            self.value = value

        def __jax_array__(self):
            return self.value

    places = jnp.array([1, 2])
    assert_slots(kv_cache.slots_of_rows(Box(places), 8), np.array([1, 10], np.int32))


def test_a_numpy_integer_as_a_size():
    assert_slots(kv_cache.slots_of_rows(np.array([1, 2]), np.int64(8)), np.array([1, 10], np.int32))


def test_vmap():
    rng = np.random.default_rng(4)
    table, places = rng.integers(-1, 50, (3, 4), np.int32), rng.integers(-1, 36, (3, 5), np.int32)
    want = slots_of_pages(table, places, 8, rows_of((3, 5)))
    assert_slots(jax.vmap(lambda t, x: kv_cache.slots_of_pages(t, x, 8))(table, places), want)
    assert_slots(jax.vmap(lambda x: kv_cache.slots_of_pages(table, x, 8), 1, 1)(places), want)
    rows = jnp.arange(3)
    got = jax.vmap(lambda x, row: kv_cache.slots_of_pages(table, x, 8, sequences=row))(places, rows)
    assert_slots(got, want)
    got = jax.vmap(lambda x, row: kv_cache.slots_of_rows(x, 8, sequences=row))(places, rows)
    assert_slots(got, slots_of_rows(places, 8, rows_of((3, 5))))


TABLE = np.random.default_rng(5).integers(-1, 50, (8, 4)).astype(np.int32)
PLACES = np.random.default_rng(6).integers(-1, 36, (8, 6)).astype(np.int32)
SEQUENCES = np.random.default_rng(7).integers(-1, 9, 8).astype(np.int32)
SHARDED = {
    "pages": (lambda table, places, _: kv_cache.slots_of_pages(table, places, 8), rows_of((8, 6))),
    "pages, sequences": (
        lambda table, places, sequences: kv_cache.slots_of_pages(table, places, 8, sequences=sequences),
        np.broadcast_to(SEQUENCES[:, None], (8, 6)),
    ),
    "rows": (lambda table, places, _: kv_cache.slots_of_rows(places, 8), rows_of((8, 6))),
    "rows, sequences": (
        lambda table, places, sequences: kv_cache.slots_of_rows(places, 8, sequences=sequences),
        np.broadcast_to(SEQUENCES[:, None], (8, 6)),
    ),
}


def want_of(form):
    rows = SHARDED[form][1]
    return slots_of_rows(PLACES, 8, rows) if form.startswith("rows") else slots_of_pages(TABLE, PLACES, 8, rows)


@pytest.mark.usefixtures("on_the_host")
@pytest.mark.parametrize("form", SHARDED)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spec", [("data", "model"), (None, "model")], ids=str)
def test_sharded(form, spec, mode):
    """The slots are sharded as the places. With a table of those sequences, or a whole one, nothing is exchanged."""
    table_spec = () if "sequences" in form else spec[:1]
    with mesh_of({"data": 4, "model": 2}, mode) as on:
        args = put(on, [TABLE, PLACES, SEQUENCES], [table_spec, spec, spec[:1]])
        got, found = compiled(SHARDED[form][0], args)
    assert_slots(got, want_of(form))
    assert got.sharding.is_equivalent_to(args[1].sharding, 2)
    assert not found


@pytest.mark.usefixtures("on_the_host")
@pytest.mark.parametrize("form", SHARDED)
@pytest.mark.parametrize("mode", MODES)
def test_numpy_arrays_beside_sharded_ones(form, mode):
    with mesh_of({"data": 4, "model": 2}, mode) as on:
        table, places = put(on, [TABLE, PLACES], [("data",), ("data",)])
        for args in ((TABLE, places, SEQUENCES), (table, PLACES, SEQUENCES), (TABLE, PLACES, SEQUENCES)):
            assert_slots(SHARDED[form][0](*args), want_of(form))


@pytest.mark.usefixtures("on_the_host")
@pytest.mark.parametrize("mode", MODES)
def test_in_shard_map(mode):
    """Each device has its own rows of the table."""
    with mesh_of({"data": 8}, mode) as on:
        args = put(on, [TABLE, PLACES, SEQUENCES], [("data",), ("data",), ()])
        specs = (P("data"), P("data"), P())
        function = jax.shard_map(SHARDED["pages"][0], mesh=on, in_specs=specs, out_specs=P("data"))
        assert_slots(jax.jit(function)(*args), want_of("pages"))


def test_docstring_examples():
    with jax.numpy_rank_promotion("allow"):
        results = doctest.testmod(kv_cache)
    assert results.attempted and not results.failed


SIZE = "{} must be from 1 to 2147483647, got {}. Pass the size of that axis of the cache."
STATIC = "{} must be an integer known when tracing, got {}. Pass a Python int."
DTYPE = "{} must be integers, got {}. Cast them with astype(jnp.int32)."
MASK = "{} must be integers, got bool. Pass numbers, not a mask."
PAGE = "block_tables must have shape (..., pages) with a page, got {}. Give it a column of -1."
TABLE_OF_ROWS = (
    "block_tables must have shape (batch, pages) with a row, got {}. "
    "Leave sequences out, or stack the rows that they name on one axis."
)
LEAD = (
    "places must have the leading axes of block_tables, {}, got shape {}. "
    "A row of block_tables has the pages of one sequence. Name the row of each token with sequences where tokens have "
    "an order of their own."
)
LEADING = (
    "sequences must have leading axes of places, {}, got shape {}. "
    "Pass one for each token, or for each index of the leading axes that share one."
)


def zeros(*shape, dtype="int32"):
    return np.zeros(shape, dtype)


BAD_CALLS = [
    ("pages", ValueError, SIZE.format("block_size", 0), {"block_size": 0}),
    ("pages", ValueError, SIZE.format("block_size", -16), {"block_size": -16}),
    ("pages", ValueError, SIZE.format("block_size", 2**31), {"block_size": 2**31}),
    ("rows", ValueError, SIZE.format("cache_length", 0), {"cache_length": 0}),
    ("pages", TypeError, STATIC.format("block_size", "16.0 of type float"), {"block_size": 16.0}),
    ("pages", TypeError, STATIC.format("block_size", "True of type bool"), {"block_size": True}),
    ("rows", TypeError, STATIC.format("cache_length", "None"), {"cache_length": None}),
    (
        "rows",
        TypeError,
        "cache_length must be an integer known when tracing, got a numpy.ndarray of shape (3,) and dtype int32. Places "
        "stand in front of it.",
        {"cache_length": zeros(3)},
    ),
    ("pages", TypeError, DTYPE.format("places", "float32"), {"places": zeros(3, 4, dtype="float32")}),
    ("pages", TypeError, MASK.format("places"), {"places": zeros(3, 4, dtype="bool")}),
    ("pages", TypeError, DTYPE.format("block_tables", "bfloat16"), {"block_tables": jnp.zeros((3, 2), jnp.bfloat16)}),
    ("pages", TypeError, DTYPE.format("sequences", "timedelta64[s]"), {"sequences": zeros(3, dtype="m8[s]")}),
    ("rows", TypeError, DTYPE.format("places", "float64"), {"places": zeros(3, 4, dtype="float64")}),
    ("rows", TypeError, MASK.format("sequences"), {"sequences": zeros(3, dtype="bool")}),
    (
        "rows",
        TypeError,
        "places must be a JAX or NumPy array, got [1, 2] of type list. Convert it with jnp.asarray.",
        {"places": [1, 2]},
    ),
    (
        "rows",
        TypeError,
        "sequences must be a JAX or NumPy array, got 3 of type int. Convert it with jnp.asarray.",
        {"sequences": 3},
    ),
    (
        "pages",
        TypeError,
        "block_tables must be a JAX or NumPy array, got None. Pass one.",
        {"block_tables": None},
    ),
    (
        "rows",
        TypeError,
        "places must be a JAX or NumPy array, got a numpy.ma.MaskedArray of shape (2,) and dtype int64. "
        "Pass its filled().",
        {"places": np.ma.masked_array([1, 2], [True, False])},
    ),
    ("pages", ValueError, PAGE.format("(3, 0)"), {"block_tables": zeros(3, 0)}),
    ("pages", ValueError, PAGE.format("()"), {"block_tables": zeros()}),
    ("pages", ValueError, PAGE.format("(3, 0)"), {"block_tables": zeros(3, 0), "sequences": zeros(3)}),
    ("pages", ValueError, LEAD.format("(3,)", "(4,)"), {"places": zeros(4)}),
    ("pages", ValueError, LEAD.format("(3,)", "()"), {"places": zeros()}),
    ("pages", ValueError, LEAD.format("(3,)", "(4, 3)"), {"places": zeros(4, 3)}),
    ("pages", ValueError, LEAD.format("(2, 3)", "(3, 4)"), {"block_tables": zeros(2, 3, 2)}),
    ("pages", ValueError, LEADING.format("(3, 4)", "(4,)"), {"sequences": zeros(4)}),
    ("pages", ValueError, LEADING.format("(3, 4)", "(3, 1)"), {"sequences": zeros(3, 1)}),
    ("rows", ValueError, LEADING.format("(3, 4)", "(3, 4, 1)"), {"sequences": zeros(3, 4, 1)}),
    ("pages", ValueError, TABLE_OF_ROWS.format("(2,)"), {"block_tables": zeros(2), "sequences": zeros(3)}),
    ("pages", ValueError, TABLE_OF_ROWS.format("(0, 2)"), {"block_tables": zeros(0, 2), "sequences": zeros(3)}),
    ("pages", ValueError, TABLE_OF_ROWS.format("(1, 3, 2)"), {"block_tables": zeros(1, 3, 2), "sequences": zeros(3)}),
    (
        "rows",
        ValueError,
        "places must have shape (batch, ...), got (). Pass sequences to name the row of one token.",
        {"places": zeros()},
    ),
]
GOOD = {
    "pages": (kv_cache.slots_of_pages, {"block_tables": zeros(3, 2), "places": zeros(3, 4), "block_size": 16}),
    "rows": (kv_cache.slots_of_rows, {"places": zeros(3, 4), "cache_length": 16}),
}


@pytest.mark.parametrize("name, exception, message, changes", BAD_CALLS, ids=[call[2][:50] for call in BAD_CALLS])
def test_a_bad_call_names_rule_value_and_remedy(name, exception, message, changes):
    function, arguments = GOOD[name]
    function(**arguments)
    with pytest.raises(exception, match=f"^{re.escape(message)}$"):
        function(**arguments | changes)


def test_a_traced_size_is_refused():
    message = (
        "cache_length must be known when tracing, got a traced value int32[]. "
        "Name it in static_argnames of your jax.jit, or hold it in a lambda."
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):  # JAX adds a note of its own
        jax.jit(lambda n: kv_cache.slots_of_rows(zeros(3), n))(8)
