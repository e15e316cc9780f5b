"""jax.export: for the CPU, for CUDA without a GPU, over devices, and with a number of tokens left open."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_qk
from tests import forms, lowering
from tests.cases import Case, make_cotangents, make_inputs
from tests.compare import assert_same
from tests.devices import mesh, put
from tests.gradients import assert_agree, gradients
from tests.lowering import FIRST, GPU_IMPLEMENTATIONS

pytestmark = pytest.mark.usefixtures("on_the_host")

CASE = Case(8, 4, 2, head_dim=16, rotary_dim=8, max_position=32)
PAIRS = dataclasses.replace(CASE, rotation="pairs", round_norm=False)
SPECS = (P("data", "model"), P("data", "model"), P(), P(), P(), P("data"))

# What jax.export must be told to let pass, by implementation: JAX promises that Mosaic GPU's custom call stays
# readable, and nothing about the Triton backend's.
DISABLED_CHECKS = {
    "triton": [export.DisabledSafetyCheck.custom_call("__gpu$xla.gpu.triton")],
    "mosaic_gpu": [],
}


op = functools.partial(forms.op, CASE)


def round_trip(exported, **options):
    """Through bytes, as to another machine."""
    pytest.importorskip("flatbuffers", reason="jax.export writes with it and JAX does not depend on it")
    return export.deserialize(exported.serialize(**options))


def kernels(exported) -> list[str]:
    """Without the backward's sums."""
    return [name for name in lowering.kernels(str(exported.mlir_module())) if not name.endswith("_sum")]


@pytest.mark.parametrize("case", [CASE, PAIRS], ids=lambda case: case.id)
def test_for_the_cpu(case):
    function, inputs, cotangents = forms.op(case), make_inputs(case), make_cotangents(case)
    exported = round_trip(export.export(jax.jit(function), platforms=["cpu"])(*inputs))
    assert_same(exported.call(*inputs), function(*inputs))
    exported = round_trip(export.export(jax.jit(gradients(function)), platforms=["cpu"])(*inputs, *cotangents))
    assert_agree(exported.call(*inputs, *cotangents), gradients(function)(*inputs, *cotangents))


@pytest.mark.parametrize("case", [CASE, PAIRS], ids=lambda case: case.id)
@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_for_cuda_without_a_gpu(name, case):
    function, inputs, cotangents = forms.op(case, name), make_inputs(case), make_cotangents(case)
    for_cuda = functools.partial(export.export, platforms=["cuda"], disabled_checks=DISABLED_CHECKS[name])
    exported = round_trip(for_cuda(jax.jit(function))(*inputs))
    assert exported.platforms == ("cuda",) and kernels(exported) == [f"pallas_qk_{name}_forward"]
    exported = round_trip(for_cuda(jax.jit(gradients(function)))(*inputs, *cotangents))
    assert kernels(exported) == [f"pallas_qk_{name}_backward"]


def test_the_disabled_check_is_needed():
    """The list above is as short as it can be."""
    for name, checks in DISABLED_CHECKS.items():
        if checks:
            with pytest.raises(ValueError, match="no compatibility guarantees"):
                export.export(jax.jit(op(name)), platforms=["cuda"])(*make_inputs(CASE))


def test_differentiated_after_export():
    inputs, cotangents = make_inputs(CASE), make_cotangents(CASE)
    exported = round_trip(export.export(jax.jit(op()), platforms=["cpu"])(*inputs), vjp_order=1)
    got = gradients(exported.call)(*inputs, *cotangents)
    assert_agree(got, gradients(op())(*inputs, *cotangents))


def test_for_the_cpu_and_cuda_together():
    inputs = make_inputs(CASE)
    exported = export.export(jax.jit(op()), platforms=["cpu", "cuda"], disabled_checks=DISABLED_CHECKS[FIRST])(*inputs)
    assert kernels(exported) == [f"pallas_qk_{FIRST}_forward"]
    assert_same(round_trip(exported).call(*inputs), op()(*inputs))


def shard_mapped(on, implementation=None):
    local = op(implementation, num_q_heads=2, num_kv_heads=1)
    return jax.shard_map(local, mesh=on, in_specs=SPECS, out_specs=P("data", "model"))


def test_over_devices():
    inputs, cotangents = list(make_inputs(CASE)), make_cotangents(CASE)
    on = mesh(data=4, model=2)
    args = put(on, inputs, SPECS)
    exported = round_trip(export.export(jax.jit(shard_mapped(on)), platforms=["cpu"])(*args))
    assert exported.nr_devices == 8
    got = [np.asarray(x) for x in exported.call(*args)]
    assert_same(got, [np.asarray(x) for x in op()(*inputs)])
    cotangents = put(on, cotangents, [("data", "model")] * 3)
    exported = export.export(jax.jit(gradients(shard_mapped(on))), platforms=["cpu"])(*args, *cotangents)
    assert_agree(round_trip(exported).call(*args, *cotangents), gradients(op())(*inputs, *make_cotangents(CASE)))


@pytest.mark.parametrize("name", [*GPU_IMPLEMENTATIONS, None])
@pytest.mark.parametrize("abstract", [False, True], ids=["mesh", "abstract mesh"])
def test_over_cuda_devices_that_are_not_there(name, abstract):
    inputs = list(make_inputs(CASE))
    on = AbstractMesh((4, 2), ("data", "model"), (AxisType.Auto,) * 2) if abstract else mesh(data=4, model=2)
    layouts = [NamedSharding(on, spec) for spec in SPECS]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s) for x, s in zip(inputs, layouts, strict=True)]
    checks = DISABLED_CHECKS[name or FIRST]
    program = jax.jit(shard_mapped(on, name), in_shardings=layouts)
    exported = export.export(program, platforms=["cuda"], disabled_checks=checks)(*shapes)
    assert exported.nr_devices == 8 and kernels(exported) == [f"pallas_qk_{name or FIRST}_forward"]


def test_over_devices_outside_shard_map_is_refused():
    on = mesh(data=4, model=2)
    args = put(on, list(make_inputs(CASE)), SPECS)
    message = (
        "jax.export for several devices needs the op inside jax.shard_map, got 8 devices outside one. "
        "Put it there: elsewhere the compiler asks Python how to partition it, which an exported program can't."
    )
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
        export.export(jax.jit(op()), platforms=["cpu"])(*args)


def open_inputs():
    """Shapes with any number of tokens."""
    (tokens,) = export.symbolic_shape("tokens")
    inputs = make_inputs(CASE)
    return [
        jax.ShapeDtypeStruct((tokens, *x.shape[1:]) if x.shape[0] == CASE.num_tokens else x.shape, x.dtype)
        for x in inputs
    ]


@pytest.mark.parametrize("name", ["xla", None])
def test_any_number_of_tokens(name):
    inputs = make_inputs(CASE)
    exported = round_trip(export.export(jax.jit(op(name)), platforms=["cpu", "cuda"])(*open_inputs()))
    assert kernels(exported) == []
    assert_same(exported.call(*inputs), op()(*inputs))
    shorter = [x[:3] if x.shape[0] == CASE.num_tokens else x for x in inputs]
    assert_same(exported.call(*shorter), [x[:3] for x in op()(*inputs)])

    def squares(*args):
        def loss(*floats):
            return sum(jnp.sum(jnp.square(out.astype(jnp.float32))) for out in op(name)(*floats, args[5]))

        return jax.grad(loss, (0, 1, 2, 3, 4))(*args[:5])

    exported = export.export(jax.jit(squares), platforms=["cpu"])(*open_inputs())
    assert_agree(round_trip(exported).call(*inputs), jax.jit(squares)(*inputs))


@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_gpu_kernels_refuse_an_open_number_of_tokens(name):
    message = (
        f"implementation={name!r} can't run this: it needs sizes that are known when tracing, got tokens. "
        "Leave implementation out, or pass 'xla'."
    )
    with pytest.raises(NotImplementedError, match=f"^{re.escape(message)}"):
        export.export(jax.jit(op(name)), platforms=["cuda"])(*open_inputs())


def test_an_array_too_many_of_an_open_size_is_told():
    """The check compares no open size by its order, which JAX can't tell."""
    *args, positions = open_inputs()
    message = "eps must be a real number known when tracing, got a traced value int32[tokens]. An array too many "
    with pytest.raises(TypeError, match=f"^{re.escape(message)}"):
        export.export(jax.jit(pallas_qk.fused_qk_rmsnorm_rope_gate), platforms=["cpu"])(*args, positions, positions)


@pytest.mark.parametrize("name", [*GPU_IMPLEMENTATIONS, None])
def test_a_table_of_any_length(name):
    """A kernel compares positions with the number of rows, so with None plain XLA takes the call."""
    inputs = make_inputs(CASE)
    (rows,) = export.symbolic_shape("rows")
    table = jax.ShapeDtypeStruct((rows, CASE.rotary_dim), inputs.cos_sin_cache.dtype)
    args = [table if x is inputs.cos_sin_cache else x for x in inputs]
    if name is not None:
        with pytest.raises(NotImplementedError, match="it needs sizes that are known when tracing, got rows"):
            export.export(jax.jit(op(name)), platforms=["cuda"])(*args)
        return
    exported = round_trip(export.export(jax.jit(op()), platforms=["cpu", "cuda"])(*args))
    assert kernels(exported) == []
    want = op()(*inputs)
    assert_same(exported.call(*inputs), want)

    positions = np.asarray(inputs.positions).astype(np.int64)  # a constant of the program, which JAX would narrow
    fixed = export.export(jax.jit(lambda *arrays: op()(*arrays, positions)), platforms=["cpu", "cuda"])(*args[:5])
    assert_same(fixed.call(*list(inputs)[:5]), want)
