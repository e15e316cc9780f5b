"""Tables and rows of cosines and sines under the caller's meshes of eight devices of the host."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_qk
from pallas_qk import rope
from tests.devices import collectives, mesh, put

pytestmark = pytest.mark.usefixtures("on_the_host")

INV_FREQ = np.array([1.0, 0.3, 0.02, 1e-3])
AXIS_TYPES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
CONTEXTS = {
    "set_mesh": jax.set_mesh,
    "abstract": lambda on: jax.sharding.use_abstract_mesh(on.abstract_mesh),
    "with": lambda on: on,
}


@pytest.fixture(params=AXIS_TYPES.values(), ids=AXIS_TYPES)
def on(request):
    return mesh(request.param, data=8)


def table() -> jax.Array:
    return rope.cos_sin_cache(INV_FREQ, 1.25, max_position=40)


def assert_same_array(got, want):
    assert got.sharding == want.sharding and got.committed == want.committed
    np.testing.assert_array_equal(got, want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # `with mesh:`
@pytest.mark.parametrize("context", CONTEXTS)
def test_the_table_is_that_outside_of_the_mesh(context, on):
    want, traced = table(), []
    assert want.sharding.device_set == {jax.devices("cpu")[0]}

    def while_tracing(x):
        traced.append(table())
        return x + traced[-1][0, 0]

    with CONTEXTS[context](on):
        assert_same_array(table(), want)
        jax.jit(while_tracing).trace(jax.ShapeDtypeStruct((8,), jnp.float32))
    jax.jit(jax.shard_map(while_tracing, mesh=on, in_specs=P("data"), out_specs=P("data"))).trace(
        *put(on, [np.zeros(8, np.float32)], [("data",)])
    )
    assert len(traced) == 2
    for got in traced:
        assert_same_array(got, want)


def test_the_table_lies_on_the_default_device(on):
    device = jax.devices("cpu")[3]
    with jax.set_mesh(on), jax.default_device(device):
        assert table().sharding.device_set == {device}


def test_the_op_takes_the_table_of_a_mesh(on):
    """Made outside of a jit or inside, for tokens that are sharded."""
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=shape).astype(np.float32) for shape in ((16, 4 * 16), (16, 2 * 16), (16,), (16,))]
    positions = np.arange(16, dtype=np.int32)

    def op(q, k, q_weight, k_weight, positions, cos_sin_cache):
        sizes = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16, "rotary_dim": 8}
        return pallas_qk.fused_qk_rmsnorm_rope(q, k, q_weight, k_weight, cos_sin_cache, positions, 1e-6, **sizes)

    want = jax.jit(op)(*arrays, positions, table())
    with jax.set_mesh(on):
        sharded = put(on, [*arrays, positions], [("data",), ("data",), (), (), ("data",)])
        for got in (jax.jit(op)(*sharded, table()), jax.jit(lambda *args: op(*args, table()))(*sharded)):
            for x, y in zip(got, want, strict=True):
                np.testing.assert_array_equal(x, y)


FORMS = {
    "plain": ("float32", {}),
    "interleaved": ("float32", {"mrope_section": (2, 1, 1)}),
    "sectioned": ("int32", {"mrope_section": (2, 1, 1), "mrope_layout": "sectioned"}),
}


@pytest.mark.parametrize("form, is_set", [("plain", False), ("interleaved", True), ("sectioned", False)])
def test_rows_of_sharded_positions(form, is_set, on):
    """The bits of one device, laid out as the positions are, without a collective."""
    dtype, options = FORMS[form]

    def rows(positions):
        return rope.cos_sin_rows(positions, INV_FREQ, 1.25, **options)

    positions = np.random.default_rng(0).uniform(-9, 2**31, (16,) if form == "plain" else (3, 16)).astype(dtype)
    spec = P("data") if form == "plain" else P(None, "data")
    want = jax.jit(rows)(positions)
    (sharded,) = put(on, [positions], [spec])
    with jax.set_mesh(on) if is_set else contextlib.nullcontext():
        in_shard_map = jax.shard_map(rows, mesh=on, in_specs=spec, out_specs=P("data"))
        for function in (rows, in_shard_map):
            program = jax.jit(function).lower(sharded).compile()
            assert collectives(program.as_text()) == []
            got = program(sharded)
            np.testing.assert_array_equal(got, want)
            assert got.sharding.is_equivalent_to(NamedSharding(on, P("data")), 2)
        np.testing.assert_array_equal(rows(sharded), want)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # `with mesh:`
@pytest.mark.parametrize("context", ["set_mesh", "with"])
def test_rows_of_host_positions_under_a_mesh(context, on):
    """NumPy's arrays and lists, and among them what float32 and int32 can't hold."""
    positions = np.array([[-1, 0.25, 2.0**31 + 0.5, 5], [7, 2.0**32 - 0.25, 3, 1e6 + 2**-20], [1, 2, 3, 4]])
    for given, section in (([0, 3, 2**32 - 1, 2**32], None), (positions, (2, 1, 1))):

        def rows(given=given, section=section):
            return rope.cos_sin_rows(given, INV_FREQ, 1.25, mrope_section=section)

        want = rows()
        with CONTEXTS[context](on):
            np.testing.assert_array_equal(rows(), want)
            np.testing.assert_array_equal(jax.jit(rows)(), want)
