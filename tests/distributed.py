"""What each process of `tests/test_distributed.py` does.

python -m tests.distributed PORT PROCESS_ID NUM_PROCESSES
"""

import os
import sys
import traceback

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.cases import Case, make_cotangents, make_inputs
from tests.devices import assert_only_weight_sums, compiled
from tests.forms import op
from tests.gradients import assert_agree, gradients
from tests.run import quick_jit

DEVICES_EACH = 4
CASE = Case(16, 8, 2, head_dim=16, rotary_dim=8, max_position=64)
LAYOUTS = {  # mesh, whose first axis runs over the processes, then the axes of tokens and of heads
    "tokens": ({"data": 8}, "data", None),
    "heads over the processes, tokens in each": ({"model": 2, "data": 4}, "data", "model"),
}


def check() -> None:
    assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 4, 8)
    inputs, cotangents, weighted = list(make_inputs(CASE)), make_cotangents(CASE), gradients(op(CASE), of=4)
    outputs = jax.jit(op(CASE))(*inputs)
    grads = quick_jit(weighted)(*inputs, *cotangents)
    for name, (axes, tokens, heads) in LAYOUTS.items():
        print(name, flush=True)
        on = Mesh(np.array(jax.devices()).reshape(*axes.values()), tuple(axes))
        activation = P(tokens, heads)
        args = put(on, inputs, (activation, activation, P(), P(), P(), P(tokens)))
        got, found = compiled(op(CASE), args)
        assert found == []
        for x, want in zip(got, outputs, strict=True):
            assert x.sharding.is_equivalent_to(NamedSharding(on, activation), x.ndim), x.sharding
            assert len(x.addressable_shards) == DEVICES_EACH
            for shard in x.addressable_shards:
                assert np.asarray(shard.data).tobytes() == np.asarray(want)[shard.index].tobytes(), shard.index
        got, found = compiled(weighted, [*args, *put(on, cotangents, [activation] * 3)], quick_jit)
        assert_only_weight_sums(found, CASE.head_dim)
        assert_agree([with_own_shards(x, want) for x, want in zip(got, grads, strict=True)], grads)


def put(on: Mesh, arrays, specs) -> list[jax.Array]:
    """Arrays of all processes; each brings what lies on its own devices."""
    return [
        jax.make_array_from_callback(x.shape, NamedSharding(on, spec), np.asarray(x).__getitem__)
        for x, spec in zip(arrays, specs, strict=True)
    ]


def with_own_shards(x: jax.Array, elsewhere: jax.Array) -> np.ndarray:
    """The array in this process's parts, and `elsewhere` in those that it can't read."""
    whole = np.array(elsewhere)
    for shard in x.addressable_shards:
        whole[shard.index] = shard.data
    return whole


def main() -> None:
    port, process_id, num_processes = map(int, sys.argv[1:])
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes, process_id, initialization_timeout=60)
    try:
        check()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at once: jax.distributed would wait for the other process, which waits for this one


if __name__ == "__main__":
    main()
