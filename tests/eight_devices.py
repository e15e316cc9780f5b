"""What `test_devices.py` runs in a process of its own, on eight host devices: one case by name, as JSON."""

import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_qk
from tests.cases import Case, make_inputs

COLLECTIVE = r"\s(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
CASE = Case(16, 8, 8, head_dim=32, rotary_dim=16, dtype="bfloat16")
SPECS = (P("data", "tensor"), P("data", "tensor"), P(), P(), P(), P("data"))
OP = functools.partial(pallas_qk.fused_qk_rmsnorm_rope_gate, **CASE.static_arguments)


def loss(*args):
    return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in OP(*args))


def same_bits(got, want) -> bool:
    return all(np.array_equal(*(np.asarray(x).view(np.uint16) for x in pair)) for pair in zip(got, want, strict=True))


def compiled(function, mesh, args, specs=SPECS):
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(args, specs, strict=True)]
    program = jax.jit(function).lower(*placed).compile()
    return program(*placed), re.findall(COLLECTIVE, program.as_text())


def forward(shape: tuple[int, int], axis_type: AxisType) -> dict:
    args = list(make_inputs(CASE))
    want = OP(*args)
    mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(axis_type,) * 2)
    with jax.set_mesh(mesh):
        got, collectives = compiled(OP, mesh, args)
    return {"bits": same_bits(got, want), "collectives": collectives, "spec": str(got[0].sharding.spec)}


def backward(shape: tuple[int, int]) -> dict:
    args = list(make_inputs(CASE))
    gradient = jax.grad(loss, argnums=(0, 1, 2, 3))
    want = gradient(*args)
    mesh = jax.make_mesh(shape, ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        got, collectives = compiled(gradient, mesh, args)
    return {"errors": [relative_error(a, b) for a, b in zip(got, want, strict=True)], "collectives": collectives}


def relative_error(got, want) -> float:
    got, want = (np.asarray(x, np.float64) for x in (got, want))
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def mapped() -> dict:
    args = list(make_inputs(CASE))
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    local = functools.partial(OP, num_q_heads=4, num_kv_heads=4)
    out = P("data", "tensor")
    function = jax.shard_map(local, mesh=mesh, in_specs=SPECS, out_specs=(out,) * 3)
    got, collectives = compiled(function, mesh, args)
    return {"bits": same_bits(got, OP(*args)), "collectives": collectives}


def replicated_k() -> dict:
    """2 kv heads over 8 devices: k replicated over the heads' axis."""
    case = Case(16, 8, 2, head_dim=32, rotary_dim=16)
    args = list(make_inputs(case))
    op = functools.partial(pallas_qk.fused_qk_rmsnorm_rope_gate, **case.static_arguments)
    mesh = jax.make_mesh((1, 8), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = (SPECS[0], P("data"), *SPECS[2:])
    got, collectives = compiled(op, mesh, args, specs)
    return {"bits": same_bits(got, op(*args)), "collectives": collectives}


def cut_head() -> dict:
    """2 kv heads over 8 devices, k sharded: refused."""
    case = Case(16, 8, 2, head_dim=32, rotary_dim=16)
    op = functools.partial(pallas_qk.fused_qk_rmsnorm_rope_gate, **case.static_arguments)
    mesh = jax.make_mesh((1, 8), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    try:
        placed = [jax.device_put(x, NamedSharding(mesh, s)) for x, s in zip(make_inputs(case), SPECS, strict=True)]
        op(*placed)
    except ValueError as error:
        return {"error": str(error)}
    return {"error": "none"}


RUNS = {
    **{f"forward-{a}x{b}-auto": functools.partial(forward, (a, b), AxisType.Auto) for a, b in ((8, 1), (4, 2), (1, 8))},
    "forward-4x2-explicit": functools.partial(forward, (4, 2), AxisType.Explicit),
    **{f"backward-{a}x{b}": functools.partial(backward, (a, b)) for a, b in ((8, 1), (4, 2), (1, 8))},
    "shard_map": mapped,
    "replicated_k": replicated_k,
    "cut_head": cut_head,
}

if __name__ == "__main__":
    print(json.dumps({name: RUNS[name]() for name in sys.argv[1:] or RUNS}))
