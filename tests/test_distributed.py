"""Two processes of jax.distributed with four devices of the host each: the bits of one device, and which collectives.

test_sharding has more layouts, in one process.
"""

import os
import pathlib
import socket
import subprocess
import sys
import time

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.cases import make_inputs
from tests.gradients import assert_agree, make_cotangents
from tests.run import quick_jit
from tests.test_sharding import CASE, assert_only_weight_sums, compiled, gradients, op

NUM_PROCESSES, DEVICES_EACH = 2, 4
SECONDS = 120  # a few on an idle machine

PROCESS = """
import os, sys, traceback
import jax

port, process_id, num_processes = map(int, sys.argv[1:])
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes, process_id, initialization_timeout=60)
from tests import test_distributed

try:
    test_distributed.check()
except BaseException:
    traceback.print_exc()
    os._exit(1)  # at once: jax.distributed would wait for the other process, which waits for this one
"""

LAYOUTS = {  # mesh, whose first axis runs over the processes, then the axes of tokens and of heads
    "tokens": ({"data": 8}, "data", None),
    "heads over the processes, tokens in each": ({"model": 2, "data": 4}, "data", "model"),
}


def check() -> None:
    """What each process does."""
    assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 4, 8)
    inputs, cotangents = list(make_inputs(CASE)), make_cotangents(CASE)
    outputs = jax.jit(op(CASE))(*inputs)
    grads = quick_jit(gradients(op(CASE)))(*inputs, *cotangents)
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
        got, found = compiled(gradients(op(CASE)), [*args, *put(on, cotangents, [activation] * 3)], quick_jit)
        assert_only_weight_sums(found)
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


def test_two_processes(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES_EACH}",
        "no_grpc_proxy": "127.0.0.1",  # where http_proxy is set
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [tmp_path / f"process {i}" for i in range(NUM_PROCESSES)]
    started = []
    try:
        for i, log in enumerate(logs):
            with log.open("w") as output:
                command = [sys.executable, "-c", PROCESS, str(port), str(i), str(NUM_PROCESSES)]
                root = pathlib.Path(__file__).parents[1]
                started.append(subprocess.Popen(command, cwd=root, env=environment, stdout=output, stderr=output))
        deadline = time.monotonic() + SECONDS
        # One that failed leaves the other waiting for it.
        while None in (codes := [process.poll() for process in started]) and not any(codes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
    finally:
        for process in started:
            process.kill()
            process.wait()
    printed = "\n".join(f"--- {log.name}\n{log.read_text()[-3000:]}" for log in logs)
    assert codes == [0, 0], f"both must end with 0 within {SECONDS} s, got {codes}\n{printed}"
    for log in logs:
        assert [line for line in log.read_text().splitlines() if line in LAYOUTS] == list(LAYOUTS), printed
