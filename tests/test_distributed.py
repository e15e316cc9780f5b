"""Two processes of jax.distributed with four devices of the host each: the bits of one device, and which collectives.

test_sharding has more layouts, in one process.
"""

import os
import pathlib
import socket
import subprocess
import sys
import time

from tests.distributed import DEVICES_EACH, LAYOUTS

NUM_PROCESSES = 2
SECONDS = 120  # a few on an idle machine


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
                command = [sys.executable, "-m", "tests.distributed", str(port), str(i), str(NUM_PROCESSES)]
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
