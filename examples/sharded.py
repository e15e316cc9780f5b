"""The op over several devices: the GPUs that are there, or eight devices of the host.

python -m examples.sharded

Tokens lie on one axis of the mesh, heads on the other. Two kv heads don't divide among four devices, so k is left
replicated over the heads' axis: each device then holds both. Weights and table are replicated.
"""

import os

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import pallas_qk
from pallas_qk import rope

TOKENS, Q_HEADS, KV_HEADS, HEAD_DIM, ROTARY_DIM, MAX_POSITION = 1024, 8, 2, 128, 64, 4096


def make_mesh() -> Mesh:
    """(data, model): as many devices as there are up to eight, up to four of them for the heads."""
    devices = jax.devices()[:8] if jax.default_backend() == "gpu" else jax.devices("cpu")[:8]
    count = 1 << (len(devices).bit_length() - 1)
    model = min(4, count)
    return Mesh(np.array(devices[:count]).reshape(-1, model), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def make_inputs() -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), 5)
    rope_parameters = {"rope_theta": 1e7, "partial_rotary_factor": ROTARY_DIM / HEAD_DIM}
    frequencies = rope.inv_frequencies(rope_parameters, head_dim=HEAD_DIM)
    return [
        jax.random.normal(keys[0], (TOKENS, Q_HEADS * 2 * HEAD_DIM), jnp.bfloat16),
        jax.random.normal(keys[1], (TOKENS, KV_HEADS * HEAD_DIM), jnp.bfloat16),
        jax.random.normal(keys[2], (HEAD_DIM,), jnp.bfloat16),
        jax.random.normal(keys[3], (HEAD_DIM,), jnp.bfloat16),
        rope.cos_sin_cache(*frequencies, max_position=MAX_POSITION, dtype=jnp.bfloat16),
        jax.random.randint(keys[4], (TOKENS,), 0, MAX_POSITION),
    ]


def op(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The sizes follow from the arrays. In `jax.shard_map` those are the arrays of one device."""
    return pallas_qk.fused_qk_rmsnorm_rope_gate(*arrays, 1e-6)


def loss(*arrays: jax.Array) -> jax.Array:
    return sum(jnp.sum(jnp.sin(out.astype(jnp.float32))) for out in op(*arrays))


def report(name: str, function: Callable, arrays: list[jax.Array]):
    """Compiles and runs `function`, and prints how its results lie and which collectives it took."""
    program = jax.jit(function).lower(*arrays).compile()
    results = jax.block_until_ready(program(*arrays))
    collectives = re.findall(r"\b(all-\w+|collective-\w+|reduce-scatter)(?:-start)?\(", program.as_text())
    print(f"{name}: laid out {[str(x.sharding.spec) for x in results]}, collectives {collectives}")
    return results


def main() -> None:
    mesh = make_mesh()
    print(f"{mesh.size} devices of kind {mesh.devices.flat[0].device_kind}, {dict(mesh.shape)}")
    layouts = [P("data", "model"), P("data"), P(), P(), P(), P("data")]  # q_gate, k, weights, table, positions
    inputs = make_inputs()
    sharded = [jax.device_put(x, NamedSharding(mesh, spec)) for x, spec in zip(inputs, layouts, strict=True)]

    alone = jax.jit(op)(*inputs)
    by_compiler = report("the compiler partitions", op, sharded)
    report("its gradients", jax.grad(loss, argnums=(0, 1, 2, 3)), sharded)

    outputs = (P("data", "model"), P("data"), P("data", "model"))
    mapped = jax.shard_map(op, mesh=mesh, in_specs=tuple(layouts), out_specs=outputs)
    by_hand = report("in shard_map", mapped, sharded)

    for name, results in (("the compiler partitions", by_compiler), ("in shard_map", by_hand)):
        same = all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(alone, results, strict=True))
        print(f"{name}: {'the bits of one device' if same else 'OTHER BITS THAN ONE DEVICE'}")


if __name__ == "__main__":
    main()
