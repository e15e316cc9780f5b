"""Equal bits whenever and wherever a call runs: from several threads at once, and beside other work on a GPU.

Reruns: test_parity and test_gradients. A token alone, permuted tokens: test_properties. Sharded: test_sharding.
"""

import concurrent.futures
import dataclasses
import functools
import os
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest

import pallas_qk
from tests.cases import Case, make_cotangents, make_inputs
from tests.compare import assert_same
from tests.forms import op
from tests.gradients import outputs_and_gradients
from tests.lowering import GPU_IMPLEMENTATIONS
from tests.run import has_gpu

NUM_THREADS = 6
CASE = Case(9, 3, 2, head_dim=16, rotary_dim=8, max_position=64, mrope_section=(2, 1, 1))
OTHER = dataclasses.replace(CASE, num_tokens=4, dtype="float32")


@pytest.fixture(params=pallas_qk.IMPLEMENTATIONS if has_gpu() else ["xla"])
def implementation(request) -> str:
    """What runs here through the public op."""
    return request.param


def both(case, implementation):
    """Outputs and the gradients of q_gate, k and the weights, jitted."""
    return jax.jit(outputs_and_gradients(op(case, implementation), of=4))


def in_threads(functions):
    """The results of functions that start together, a thread each."""
    barrier = threading.Barrier(len(functions))

    def run(function):
        barrier.wait(timeout=60)
        return function()

    with concurrent.futures.ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))


@pytest.mark.alone  # on a GPU all results together take 9 GB
def test_one_jitted_function_called_from_several_threads(implementation):
    case = Case(4096) if has_gpu() else CASE
    args = *make_inputs(case), *make_cotangents(case)
    function = both(case, implementation)
    want = function(*args)

    def repeated():
        return [function(*args) for _ in range(10)]

    for results in in_threads([repeated] * NUM_THREADS):
        for got in results:
            assert_same(got, want)


def test_threads_that_trace_and_compile_at_once(implementation):
    """First calls with equal and with different shapes; what Python keeps between calls is shared by them."""
    calls = [(case, *make_inputs(case), *make_cotangents(case)) for case in (CASE, OTHER)]
    want = [both(case, implementation)(*arrays) for case, *arrays in calls]
    jax.clear_caches()

    def first_call(case, *arrays):
        return both(case, implementation)(*arrays)

    got = in_threads([functools.partial(first_call, *call) for call in 2 * calls])
    for outputs, right in zip(got, 2 * want, strict=True):
        assert_same(outputs, right)


def test_the_first_calls_choose_and_import_at_once():
    """The choice of an implementation, which imports its module, in several threads of a process."""
    names = in_threads(
        [
            lambda: pallas_qk.default_implementation(16, 16, 2, 256, 64, "bfloat16", platform="cuda").name
            for _ in range(NUM_THREADS)
        ]
    )
    assert len(set(names)) == 1


def test_a_token_alone_has_its_gradients_among_others(implementation):
    """Of q_gate and k; the weights' are sums over tokens."""
    case = dataclasses.replace(CASE, num_tokens=5)
    inputs, cotangents = make_inputs(case), make_cotangents(case)
    outputs, gradients = both(case, implementation)(*inputs, *cotangents)
    for token in (0, 3):
        rows = slice(token, token + 1)
        one = dataclasses.replace(
            inputs, q_gate=inputs.q_gate[rows], k=inputs.k[rows], positions=inputs.positions[:, rows]
        )
        of_one = both(dataclasses.replace(case, num_tokens=1), implementation)
        own_outputs, own_gradients = of_one(*one, *(x[rows] for x in cotangents))
        assert_same(own_outputs, [x[rows] for x in outputs])
        if implementation != "xla":  # which may sum a row in another order on a smaller array
            assert_same(own_gradients[:2], [x[rows] for x in gradients[:2]])


@pytest.mark.gpu
@pytest.mark.alone
@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_beside_work_on_other_streams(gpu, name):
    """Calls queued one behind another while torch keeps streams of its own busy on the same GPU."""
    torch = pytest.importorskip("torch")
    from pallas_qk import dlpack

    case = Case(8192)
    inputs, cotangents = make_inputs(case), make_cotangents(case)
    function = both(case, name)
    want = jax.block_until_ready(function(*inputs, *cotangents))
    streams = [torch.cuda.Stream() for _ in range(4)]
    busy = [torch.randn(2048, 2048, device="cuda") for _ in streams]
    for _ in range(10):
        for stream, x in zip(streams, busy, strict=True):
            with torch.cuda.stream(stream):
                for _ in range(8):
                    x.copy_(torch.tanh(x @ x))
        results = [function(*inputs, *cotangents) for _ in range(3)]
        # One more whose inputs cross from a stream of torch's that is still busy.
        with torch.cuda.stream(streams[0]):
            crossed = [dlpack.from_torch(dlpack.to_torch(x).clone()) for x in inputs]
        results.append(function(*crossed, *cotangents))
        for got in results:
            assert_same(got, want)
        del results, crossed
    torch.cuda.synchronize()


REPLAYED = """
import sys
import jax, numpy as np
from tests.cases import Case, make_cotangents, make_inputs
from tests.forms import op
from tests.gradients import outputs_and_gradients

case = Case(64)
function = jax.jit(outputs_and_gradients(op(case, sys.argv[1]), of=4))
calls = [(*make_inputs(case, seed), *make_cotangents(case, seed)) for seed in (0, 1)]
for repeat in range(3):  # the first call of a command buffer records it, the others replay it
    for args in calls:
        for x in jax.tree.leaves(function(*args)):
            sys.stdout.buffer.write(np.asarray(x).tobytes())
"""


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_inside_a_command_buffer(gpu, name):
    """Recorded with one call's buffers and replayed with others': no result of an earlier call comes back."""
    printed = []
    for commands in ("", "FUSION,CUBLAS,CUDNN,CUSTOM_CALL"):
        flags = f"--xla_gpu_enable_command_buffer={commands} --xla_gpu_graph_min_graph_size=1"
        done = subprocess.run(
            [sys.executable, "-c", REPLAYED, name],
            env=os.environ | {"XLA_FLAGS": flags, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-2000:].decode()
        printed.append(done.stdout)
    plain, recorded = printed
    assert plain and plain == recorded
    third = len(plain) // 3
    assert plain[:third] == plain[third : 2 * third] == plain[2 * third :]


@pytest.mark.gpu
@pytest.mark.parametrize("name", GPU_IMPLEMENTATIONS)
def test_each_local_gpu_gives_the_same_bits(gpu, name):
    devices = jax.local_devices()
    if len(devices) < 2:
        pytest.skip(f"needs several GPUs, got {len(devices)}")
    case = Case(333, 5, 2)
    inputs = list(make_inputs(case))
    first, *others = [jax.jit(op(case, name))(*jax.device_put(inputs, device)) for device in devices]
    for outputs in others:
        assert_same(*jax.tree.map(np.asarray, (outputs, first)))
