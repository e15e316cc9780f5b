"""What the package makes of where it runs: no GPU, an old one, a JAX without a backend, no torch; and what it leaves.

Each process is a fresh interpreter. test_choice has a JAX without one of the backends and the refusals by name.
"""

import os
import re
import subprocess
import sys
import textwrap

import jax
import pytest

import pallas_qk
from pallas_qk import dlpack
from tests.lowering import FIRST, on_gpu


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


CALL = """
import jax
import numpy as np
import pallas_qk

def call(implementation=None, **options):
    q_gate, k, weight = np.ones((3, 64), np.float32), np.ones((3, 16), np.float32), np.ones(16, np.float32)
    return pallas_qk.fused_qk_rmsnorm_rope_gate(
        q_gate, k, weight, weight, np.ones((8, 8), np.float32), np.arange(3, dtype=np.int32),
        1e-6, 2, 1, 16, 8, implementation=implementation, **options)
"""


NO_PLUGIN = """
import importlib.metadata, importlib.util, sys

class NoPlugin:  # of whatever is installed here
    def find_spec(self, name, path=None, target=None):
        if name.startswith(("jax_plugins", "jax_cuda")):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, NoPlugin())
found = importlib.metadata.entry_points
importlib.metadata.entry_points = lambda **kw: () if kw.get("group") == "jax_plugins" else found(**kw)
"""


def test_without_a_gpu_plugin_the_op_runs_and_names_say_what_they_need():
    """JAX's own packages alone, as `pip install jax` leaves them."""
    printed = run_python(
        NO_PLUGIN
        + CALL
        + """
print(call()[0].shape, pallas_qk.default_implementation(3, 2, 1, 16, 8, "float32").name)
print(pallas_qk.default_implementation(3, 2, 1, 16, 8, "float32").not_taken["mosaic_gpu"])
try:
    call("triton")
except NotImplementedError as error:
    print(error)
""",
        JAX_PLATFORMS="",
    )
    shape, reason, refusal = printed.splitlines()[:3]
    assert shape == "(3, 32) xla" and reason == "it needs an NVIDIA GPU, got platform cpu"
    assert refusal.startswith("implementation='triton' must run on an NVIDIA GPU, got platform cpu.")


def test_where_jax_cannot_start_we_ask_for_no_device():
    """Told to use a GPU that it hasn't: what needs no device works, and what does fails as any call of JAX's."""
    printed = run_python(
        NO_PLUGIN
        + CALL
        + """
sizes = 3, 2, 1, 16, 8, "float32"
print(pallas_qk.default_implementation(*sizes, platform="cuda").name)
for name in (None, *pallas_qk.IMPLEMENTATIONS):
    print(jax.eval_shape(lambda: call(name))[0].shape)
try:
    pallas_qk.default_implementation(*sizes)
except RuntimeError as error:
    print(error)

def error_of(function):
    try:
        function()
    except Exception as error:
        return type(error), str(error)

print(error_of(call) == error_of(lambda: jax.numpy.ones(3)) != None)
""",
        JAX_PLATFORMS="cuda",
    )
    name, *shapes, message, same = printed.splitlines()
    assert name == FIRST and shapes == ["(3, 32)"] * 4 and same == "True"
    assert re.fullmatch(
        r"JAX must start to tell the default device's platform, got (AssertionError|RuntimeError)\(.*\)\. "
        r"Pass platform, or set JAX_PLATFORMS to what this machine has\.",
        message,
    )


OLD_GPUS = {
    "Tesla T4": (
        "xla",
        {
            "mosaic_gpu": "it needs compute capability 9.0 or later (Mosaic GPU), got 7.5",
            "triton": "it needs compute capability 8.0 or later (packed 16-bit conversions), got 7.5",
        },
    ),
    "NVIDIA A100-SXM4-80GB": (
        "triton",
        {"mosaic_gpu": "it needs compute capability 9.0 or later (Mosaic GPU), got 8.0", "xla": None},
    ),
}


@pytest.mark.parametrize("kind", OLD_GPUS)
def test_an_old_gpu_gets_what_runs_there_and_the_reasons(kind):
    name, reasons = OLD_GPUS[kind]
    with on_gpu(kind):
        choice = pallas_qk.default_implementation(16, 16, 2, 256, 64, "bfloat16", platform="cuda")
    assert choice.name == name
    assert choice.not_taken == {n: r or f"'{name}' runs this and comes first" for n, r in reasons.items()}


def test_a_jax_without_any_gpu_backend_in_a_process_of_its_own():
    """Their modules can't be found, as after JAX has removed them: plain XLA serves, and the names say why not."""
    printed = run_python(
        """
        import importlib.util

        find_spec = importlib.util.find_spec
        gone = ("jax.experimental.pallas.triton", "jax.experimental.pallas.mosaic_gpu")
        importlib.util.find_spec = lambda name, *rest: None if name in gone else find_spec(name, *rest)
        """
        + textwrap.indent(
            CALL
            + """
choice = pallas_qk.default_implementation(3, 2, 1, 16, 8, "float32", platform="cuda")
print(choice.name)
for name in ("mosaic_gpu", "triton"):
    print(choice.not_taken[name])
    try:
        call(name)
    except NotImplementedError as error:
        print(error)
print(call()[0].shape)
""",
            " " * 8,
        ),
    )
    lines = printed.splitlines()
    assert lines[0] == "xla" and lines[-1] == "(3, 32)"
    for reason, refusal, name in zip(lines[1::2], lines[2::2], ("mosaic_gpu", "triton"), strict=False):
        missing = f"it needs the module jax.experimental.pallas.{name}, got a Python environment without it"
        assert reason == missing
        assert refusal == f"implementation={name!r} can't run this: {missing}. Leave implementation out, or pass 'xla'."


def test_the_order_of_choice_follows_the_version_of_jax():
    """JAX deprecates its Triton backend since 0.11: no warning reaches a user who asks for nothing."""
    with on_gpu():
        choice = pallas_qk.default_implementation(16, 16, 2, 256, 64, "bfloat16", platform="cuda")
    assert choice.name == FIRST == ("mosaic_gpu" if jax.__version_info__ >= (0, 11) else "triton")


@pytest.mark.parametrize("function", ["from_torch", "to_torch"])
def test_without_torch_the_exchange_says_what_to_install(monkeypatch, function):
    monkeypatch.setitem(sys.modules, "torch", None)
    message = (
        f"dlpack.{function} must find PyTorch, got a Python environment without it. "
        "Install torch, or the extra pallas-qk[torch]."
    )
    with pytest.raises(ModuleNotFoundError, match=f"^{re.escape(message)}$"):
        getattr(dlpack, function)(jax.numpy.zeros(3))


def test_a_bad_call_is_refused_before_any_device_work():
    """Of NumPy arrays, before JAX has started a backend."""
    printed = run_python(
        CALL.replace("(3, 16)", "(3, 17)")
        + """
from jax._src import xla_bridge

try:
    call()
except ValueError as error:
    print(error)
print(xla_bridge.backends_are_initialized())
"""
    )
    message, initialised = printed.splitlines()
    assert re.match(r"k must have shape .*got \(3, 17\)", message) and initialised == "False"


def test_a_worker_forked_before_jax_starts_runs():
    """Importing the package starts no thread and no backend, so a fork of the process is as good as a new one."""
    printed = run_python(
        CALL
        + """
import os
import threading

assert threading.active_count() == 1
child = os.fork()
if child == 0:
    print(call()[0].shape, flush=True)
    os._exit(0)
_, status = os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(status), call()[0].shape)
""",
        JAX_PLATFORMS="cpu",
    )
    assert printed.splitlines() == ["(3, 32)", "0 (3, 32)"]


def test_a_worker_forked_from_a_process_that_runs_jax_is_told_to_be_spawned():
    printed = run_python(
        CALL
        + """
import os
import signal
import warnings

q, _, gate = call(copy_gate="never")
warnings.simplefilter("ignore")  # JAX's own, at the fork
if (child := os.fork()) == 0:
    signal.alarm(20)  # ends it where it hangs
    for function in (call, lambda: pallas_qk.apply_gate(q, gate)):
        try:
            function()
        except RuntimeError as error:
            print(error, flush=True)
    os._exit(0)
os.waitpid(child, 0)
print(os.getpid(), child)
""",
        JAX_PLATFORMS="cpu",
    )
    *messages, processes = printed.splitlines()
    parent, child = processes.split()
    assert messages == 2 * [
        f"the op must not run in a fork of a process that has called it, got process {child} forked from {parent}. "
        "Start workers with multiprocessing.get_context('spawn')."
    ]


def test_a_spawned_worker_runs():
    """The start method that JAX asks for once it runs in the parent."""
    printed = run_python(
        """
        import concurrent.futures, multiprocessing
        import pallas_qk

        print(pallas_qk.default_implementation(3, 2, 1, 16, 8, "float32").name)
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            choice = pool.submit(pallas_qk.default_implementation, 3, 2, 1, 16, 8, "float32").result()
            print(choice.name)
        """,
        JAX_PLATFORMS="cpu",
    )
    assert printed.split() == ["xla", "xla"]


IMPORT_TIMES = """
import time

start = time.process_time()
import jax
between = time.process_time()
import pallas_qk
print(between - start, time.process_time() - between)
"""


@pytest.mark.alone  # a loaded machine takes longer for JAX than for Pallas
def test_import_takes_little_beside_jax():
    """Under 50 ms where JAX takes 350: the processor's time, as a share of JAX's own, however loaded the machine is."""
    shares = shares_of_import(IMPORT_TIMES)
    assert any(share < 50 / 350 for share in shares)


@pytest.mark.alone
def test_that_share_would_show_a_backend():
    """An import of a Pallas backend is above it, so the test above can fail."""
    shares = shares_of_import(
        IMPORT_TIMES.replace("import pallas_qk", "import pallas_qk\nimport pallas_qk._mosaic_gpu")
    )
    assert any(share > 50 / 350 for share in shares)


def shares_of_import(code):
    """What importing takes of what JAX takes. One of a few: JAX's first import on a machine takes longer."""
    for _ in range(5):
        jax_time, own_time = map(float, run_python(code).split())
        yield own_time / jax_time


def test_import_changes_no_global_state():
    run_python(
        """
        import builtins, gc, locale, logging, os, random, signal, sys, threading, warnings
        import jax
        import numpy as np

        known = {name: x for name, x in logging.root.manager.loggerDict.items() if isinstance(x, logging.Logger)}

        def state():
            loggers = {name: (x.level, list(x.handlers), x.propagate) for name, x in known.items()}
            return {
                "environment": dict(os.environ),
                "settings of jax": dict(jax.config.values),
                "warnings": list(warnings.filters),
                "loggers": (loggers, logging.root.level, list(logging.root.handlers)),
                "signals": [signal.getsignal(s) for s in signal.valid_signals()],
                "threads": threading.active_count(),
                "random numbers": (random.getstate(), np.random.get_state()[1].tolist()),
                "errors of NumPy": np.geterr(),
                "printing of NumPy": np.get_printoptions(),
                "import": (list(sys.path), list(sys.meta_path), list(sys.path_hooks)),
                "hooks": (sys.excepthook, sys.displayhook, threading.excepthook, sys.unraisablehook),
                "builtins": set(vars(builtins)),
                "limits": (sys.getrecursionlimit(), sys.getswitchinterval(), gc.get_threshold(), gc.isenabled()),
                "directory": (os.getcwd(), locale.setlocale(locale.LC_ALL)),
                "pytrees": jax.tree.structure((1, [2], {"a": 3})),
            }

        before = state()
        import pallas_qk
        after = state()
        changed = [name for name in before if before[name] != after[name]]
        assert not changed, changed
        from jax._src import xla_bridge
        assert not xla_bridge.backends_are_initialized()
        """
    )
