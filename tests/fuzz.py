"""Random calls of the op for a given time: `make fuzz SECONDS=480`, on a machine with a GPU.

python -m tests.fuzz --seconds 480
python -m tests.fuzz 'Case(…)' --seed 3

On a GPU several worker processes share it, and every implementation is compared with the Triton oracle: in bits where
they are promised, else within tests/tolerances.py. Elsewhere the kernels' interpreters and plain XLA are compared with
the definition, on tiny shapes. Gradients are compared with plain XLA's, as tests/gradients.py allows. A negative
position must read row 0 of the table. One past the table must give NaN in the lanes that read it, and nowhere else, and
gradients must read row 0 there. A call that writes a KV cache must give the bits of the call that writes none, which is
compared so, with its k and v written by the oracle's writer, elsewhere by a loop over tokens.
"""

import argparse
import ast
import contextlib
import dataclasses
import functools
import itertools
import json
import os
import queue
import subprocess
import sys
import threading
import time
import traceback
import warnings
from typing import NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np

from pallas_qk import _implementations
from pallas_qk._options import Spec, Target
from pallas_qk._rows import Gradients, Outputs
from tests import cached, forms, fp8, gpu_memory, gradients, strategies
from tests.cached import CachedCase, Data
from tests.cases import Case, Inputs
from tests.compare import assert_same, assert_within
from tests.definition import define
from tests.lowering import HOPPER_SMS
from tests.run import cached_kernel, has_gpu, run, run_backward

IMPLEMENTATIONS = ("xla", "mosaic_gpu", "triton")
SEEDS_A_CASE = 3  # compilation takes nearly all of the time
CASES_A_DRAW = 25
GRADIENT_ELEMENTS = 1 << 19  # compared on the host
GRACE = 60.0  # seconds that a last case may take
MOST_SHOWN = 12  # failures, with their reasons


class MismatchError(AssertionError):
    """What an implementation did wrong."""


@contextlib.contextmanager
def _mismatch(name: str):
    """What an assertion says, as a failure of `name`."""
    try:
        yield
    except AssertionError as error:
        raise MismatchError(f"{name}: {error}") from None


def check_forward(case: Case, seed: int, implementations=IMPLEMENTATIONS) -> int:
    """Compares q, k, v and gates; the number of elements."""
    inputs = strategies.make_inputs(case, seed, special=has_gpu())
    past = strategies.lanes_past(case, inputs)
    plain, safe = strategies.resolved(case, inputs)
    want = wanted(plain, safe)
    num_elements = 0
    for name in implementations:
        if not runs(name, case):
            continue
        got = dict(zip(forms.output_names(case), run(name, case, inputs), strict=True))
        num_elements += sum(x.size for x in got.values())
        for rows in {"q", "k"} & got.keys():
            got[rows] = _blanked(f"{name}: {rows}_out", got[rows], past)
        if "v" in got:
            check_v(name, case, got.pop("v"))
        if has_gpu():
            _assert_agrees(name, plain, got, want, past)
        else:
            _assert_defined(name, got, want, past)
            if "gate" in got:
                _assert_bits(f"{name}: gate_out", got["gate"], forms.split_gates(case, safe.q_gate)[1])
    return num_elements


def wanted(plain: Case, inputs: Inputs):
    """What the oracle gives, elsewhere the definition."""
    if not has_gpu():
        return define(plain, inputs)
    from benchmarks.providers import oracle, to_jax

    return to_jax(oracle(plain, inputs)())


def runs(name: str, case: Case) -> bool:
    """Whether the implementation takes the case on a Hopper."""
    sizes = case.num_tokens, case.num_q_heads, case.num_kv_heads, case.head_dim, case.rotary_dim
    rotation, norm_order = (case.rotation, case.norm_order) if case.rotary_dim else (None, "norm_first")
    spec = Spec(*sizes, case.dtype, rotation=rotation, norm_order=norm_order)
    return _implementations.unsupported(name, spec, Target((9, 0), HOPPER_SMS)) is None


def check_v(name: str, case: Case, got: jax.Array) -> None:
    v = forms.values(case)
    if not case.v_norm:
        _assert_bits(f"{name}: v_out", got, v)
        return
    of_v, inputs = forms.of_v(case), forms.inputs_of_v(case, v)
    want, past = wanted(of_v, inputs), np.zeros((case.num_tokens, case.head_dim), bool)
    if has_gpu():
        _assert_agrees(name, of_v, {"q": want[0], "k": got}, want, past)
    else:
        _assert_defined(name, {"k": got}, want, past)


def _blanked(name: str, x: jax.Array, past: np.ndarray) -> jax.Array:
    """x with zeros in the lanes that read a position past the table, all of which must be NaN."""
    x, not_nan = _blank(x, past)
    if int(not_nan):
        raise MismatchError(f"{name}: {int(not_nan)} elements that read a position past the table are not NaN")
    return x


def _blank(x: jax.Array, past: np.ndarray):
    """x with zeros in place, and how many of the elements there were not NaN."""
    return (_blank_on_gpu if has_gpu() else _blank_by(np))(x, past)


def _blank_by(xp):
    def blank(x, past):
        rows = xp.asarray(x).reshape(x.shape[0], -1, past.shape[1])
        where = xp.broadcast_to(past[:, None], rows.shape)
        zeros = xp.zeros((), rows.dtype)
        return xp.where(where, zeros, rows).reshape(x.shape), xp.sum(where & ~xp.isnan(rows), dtype=xp.int32)

    return blank


_blank_on_gpu = jax.jit(_blank_by(jnp))


def _assert_bits(name: str, got: jax.Array, want: jax.Array) -> None:
    with _mismatch(name):
        assert_same(got, want)


def _assert_agrees(name: str, case: Case, got: dict[str, jax.Array], want, past: np.ndarray) -> None:
    """With the oracle, in what was promised."""
    from benchmarks.agreement import agreement

    wanted = [_blank(x, past)[0] for x in want[:2]]
    found = [got["q"], got.get("k", wanted[1])]
    if name == "xla":  # which NaN comes out is the compiler's affair
        wanted, found = ([jnp.where(jnp.isnan(x), jnp.nan, x).astype(x.dtype) for x in xs] for xs in (wanted, found))
    result = agreement(name, case, [*found, got.get("gate", want[2])], [*wanted, want[2]], platform="gpu")
    if not result.kept:
        raise MismatchError(f"{name}: {result}")


def _assert_defined(name: str, got: dict[str, jax.Array], want, past: np.ndarray) -> None:
    for rows, exact, bound in (("q", want.q_out, want.q_bound), ("k", want.k_out, want.k_bound)):
        if rows not in got:
            continue
        where = np.tile(past, exact.shape[1] // past.shape[1])
        with _mismatch(name):
            assert_within(f"{rows}_out", got[rows], np.where(where, 0.0, exact), bound)


def check_cached(call: CachedCase, seed: int, implementations=IMPLEMENTATIONS) -> int:
    """Compares a call that writes a KV cache with the one that writes none, and that one; the number of elements."""
    # Normalised v is a result of the call without a cache where v is given beside q and k.
    case = dataclasses.replace(call.case, separate_v=call.case.v_norm and not call.case.packed)
    num_elements = check_forward(case, seed, implementations)
    for name in implementations:
        if not runs(name, case):
            continue
        if name == "triton" and not has_gpu() and call.case.dtype == "float32":
            continue  # in each of the two programs XLA's CPU compiler fuses products into sums as it likes
        data = data_of(name, call, seed)
        plain = dict(zip(forms.output_names(case), run(name, case, data.inputs, v=jnp.asarray(data.v)), strict=True))
        plain = forms.split_heads(case, Outputs(**plain))
        want = cached.expected(call, plain, data=data, write=_write_by_oracle if has_gpu() else cached.write)
        got = run_cached(name, call, data)
        for rows in ("q", "k", "v", "gate"):
            if (x := getattr(got, rows)) is not None:
                any_nan = name == "xla" and (rows in ("q", "k") or (rows == "v" and case.v_norm))
                _assert_bits(f"{name}: {rows}_out", *_canonical(any_nan, x, getattr(want, rows)))
                num_elements += x.size
        at, is_cast = cached.written(call, data.slots), call.cache_dtype != jnp.dtype(call.case.dtype)
        codes = call.cache_dtype.name in fp8.NAMES  # of which NaN has one alone
        # On the host: on a GPU every index and transpose is compiled for its shape.
        for kind, x, wanted in zip(
            "kv", *(cached.by_slot(call, cached.arrays_of(y), np) for y in (got, want)), strict=True
        ):
            num_elements += x.size
            any_nan = not codes and (is_cast or (name == "xla" and (kind == "k" or case.v_norm)))
            _assert_bits(f"{name}: {kind} in the cache", *_canonical(any_nan, x[at], wanted[at]))
            _assert_bits(f"{name}: what no slot names in {kind}'s cache", *(_with(y, at, 0) for y in (x, wanted)))
    return num_elements


def data_of(name: str, call: CachedCase, seed: int) -> Data:
    if name != "triton" or has_gpu():
        return strategies.make_data(call, seed, special=has_gpu())
    # Pallas's interpreter, and XLA under it, change the payload of a NaN that they move. A masked store writes what was
    # there: rows of no token, or of one without a slot, point at place 0, and would undo another row's store.
    data = strategies.make_data(dataclasses.replace(call, finite=True), seed)
    data.slots[data.slots == 0] = next(iter(strategies.no_slots(call.slots_dtype, call.capacity)), 0)
    return data


def run_cached(name: str, call: CachedCase, data: Data) -> Outputs:
    """The public function, or the kernel executed by its interpreter without a GPU; all (T, heads, D)."""
    if name != "xla" and not has_gpu():
        operands = cached.inputs_of(call, data=data)
        return cached_kernel("forward", name, call.options, call.case.num_tokens == 0)(operands)
    layer = {"layer": jnp.int32(call.layer)} if "l" in call.sizes else {}
    return cached.outputs_of(call, cached.op(call, name)(*cached.arguments(call, data=data), **layer))


def _canonical(any_nan: bool, *arrays) -> list:
    """The arrays, with one NaN where which one comes out is the compiler's affair: a cast's, and plain XLA's."""
    return [_with(x, np.isnan(x), np.nan) for x in map(np.asarray, arrays)] if any_nan else list(arrays)


def _with(x: np.ndarray, where: np.ndarray, value: float) -> np.ndarray:
    x = x.copy()
    x[where] = value
    return x


def _write_by_oracle(call: CachedCase, k: jax.Array, data: Data) -> list[jax.Array]:
    from benchmarks.providers import oracle_writer, to_jax, to_torch

    k, v, slots, *caches = (to_torch(x).clone() for x in (k, data.v, data.slots, *data.before))
    oracle_writer(call, caches, slots)(k, v.view(k.shape))
    return to_jax(caches)


def check_backward(case: Case, seed: int, implementations=IMPLEMENTATIONS) -> int:
    """Compares the gradients of both kernels with plain XLA's at positions inside the table; the number of elements."""
    case = gradient_case(case)
    implementations = [name for name in implementations if runs(name, case)]
    inputs = strategies.make_inputs(case, seed)
    cotangents = forms.cotangents_of(case, seed)
    rounded = {"round_dweights": bool((seed + case.num_tokens) % 2)}  # the weights' gradients, to the weights' dtype
    inside = strategies.inside(case, inputs)
    want = split_gradients(case, run_backward("xla", case, inside, cotangents, **rounded))
    num_elements = 0
    for name in implementations:
        got = split_gradients(case, run_backward(name, case, inputs, cotangents, **rounded))
        num_elements += sum(x.size for x in got.values())
        for copied in {"gate", *({"v"} if not case.v_norm else ())} & got.keys():
            _assert_bits(f"{name}: d{copied}", got.pop(copied), want[copied])
        for rows, x in got.items():
            with _mismatch(f"{name}: d{rows}"):
                gradients.assert_agree([x], [want[rows]])
    return num_elements


def gradient_case(case: Case) -> Case:
    """Few enough tokens, and no float16 gradients below its normal numbers, whose units are absolute."""
    most_tokens = max(1, GRADIENT_ELEMENTS // ((2 * case.num_q_heads + case.num_kv_heads) * case.head_dim))
    case = dataclasses.replace(case, num_tokens=min(case.num_tokens, most_tokens))
    return dataclasses.replace(case, scale=1.0, weight_scale=1.0) if case.dtype == "float16" else case


def split_gradients(case: Case, found) -> dict[str, jax.Array]:
    """By what they are gradients of, from a list in the case's form; all but the weights' are (T, heads*D)."""
    given = forms.given(case)
    names = [name for name in Gradients._fields if getattr(given, name)]
    named = dict(zip(names, found, strict=True))
    q = named["q"]
    if case.packed:
        q_end, kv_width = q.shape[1] - 2 * case.num_kv_heads * case.head_dim, case.num_kv_heads * case.head_dim
        named |= {"q": q[:, :q_end], "k": q[:, q_end : q_end + kv_width], "v": q[:, q_end + kv_width :]}
    if case.gate is None:
        return named
    return named | dict(zip(("q", "gate"), forms.split_gates(case, named["q"]), strict=True))


def check(call: Case | CachedCase, seed: int, implementations=IMPLEMENTATIONS, *, backward: bool = True) -> int:
    """Forward and, where there is one, backward of one call; the number of elements compared."""
    with strategies.x64(call):
        if isinstance(call, CachedCase):
            return check_cached(call, seed, implementations)
        num_elements = check_forward(call, seed, implementations)
        return num_elements + (check_backward(call, seed, implementations) if backward else 0)


def draw(sizes: strategies.Sizes, seed: int, count: int) -> list[Case | CachedCase]:
    """Calls by hypothesis; the same for the same seed."""
    drawn: list[Case | CachedCase] = []

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        phases=[hypothesis.Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),  # a machine with other workers is slow
    )
    @hypothesis.given(strategies.calls(sizes))
    def collect(case):
        drawn.append(case)

    collect()
    return drawn


def reproducer(call: Case | CachedCase, seed: int) -> str:
    return f"python -m tests.fuzz '{_text(call)}' --seed {seed}"


def _text(call: Case | CachedCase) -> str:
    changed = [
        f"{field.name}={_text(value) if isinstance(value, Case) else repr(value)}"
        for field in dataclasses.fields(call)
        if (value := getattr(call, field.name)) != field.default
    ]
    return f"{type(call).__name__}({', '.join(changed)})".replace("'", '"')


def parse_case(text: str) -> Case | CachedCase:
    """Of what `reproducer` prints."""
    call = _parse(ast.parse(text, mode="eval").body)
    if not isinstance(call, Case | CachedCase):
        raise argparse.ArgumentTypeError(
            f"a case must be written Case(…) or CachedCase(…), got {text!r}. Copy it from a failure."
        )
    return call


def _parse(node: ast.expr):
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("Case", "CachedCase"):
        keywords = {keyword.arg: _parse(keyword.value) for keyword in node.keywords}
        return {"Case": Case, "CachedCase": CachedCase}[node.func.id](*map(_parse, node.args), **keywords)
    return ast.literal_eval(node)


# A worker prints one JSON object a line: {"start": reproducer}, {"elements": n, "done": whether it was the
# whole case} or {"failed": reproducer, "reason": text}.


def work(seed: int, seconds: float, implementations: list[str]) -> None:
    """Checks one case after another until the time is over."""
    end = time.monotonic() + seconds
    sizes = strategies.WIDE if has_gpu() else strategies.TINY
    for round_number in itertools.count():
        for case in draw(sizes, seed * 1_000_003 + round_number, CASES_A_DRAW):
            elements = 0
            for data_seed in range(SEEDS_A_CASE):
                if time.monotonic() > end:
                    _say(elements=elements, done=False)
                    return
                _say(start=reproducer(case, data_seed))
                try:
                    elements += check(case, data_seed, implementations, backward=data_seed == 0)
                except Exception as error:
                    reason = str(error) if isinstance(error, MismatchError) else traceback.format_exc(limit=-4)
                    _say(failed=reproducer(case, data_seed), reason=reason[-2000:])
                    break
            _say(elements=elements, done=True)
        # What is compiled is not needed again.
        cached_kernel.cache_clear()
        jax.clear_caches()


def _say(**message) -> None:
    print(json.dumps(message), flush=True)


class Worker(NamedTuple):
    process: subprocess.Popen
    seed: int  # tells two of them apart


def start_worker(
    seed: int, seconds: float, num_workers: int, implementations: list[str], messages: queue.Queue
) -> Worker:
    fraction = gpu_memory.fraction_name(os.environ)
    environment = os.environ | {
        # Equal shares of the GPU's memory, or of what is allowed of it, taken as needed; a case takes less than 1 GiB.
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        fraction: f"{float(os.environ.get(fraction, 0.6)) / num_workers:.4f}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.fuzz", "--work", "--seed", str(seed), "--seconds", f"{seconds:.1f}"]
    process = subprocess.Popen(
        [*command, "--implementations", *implementations],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    worker = Worker(process, seed)

    def read():
        errors: list[str] = []
        with process.stdout, process.stderr:
            drain = threading.Thread(target=lambda: errors.extend(process.stderr.readlines()[-15:]), daemon=True)
            drain.start()
            for line in process.stdout:
                if line.startswith('{"'):
                    messages.put((worker, json.loads(line)))
            drain.join()
        messages.put((worker, {"exit": process.wait(), "stderr": "".join(errors)}))

    threading.Thread(target=read, daemon=True).start()
    return worker


@dataclasses.dataclass
class Tally:
    """What all workers have done."""

    cases: int = 0
    elements: int = 0
    failures: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # reproducer and reason

    def __str__(self) -> str:
        return f"{self.cases:,} cases, {self.elements:,} elements compared, {len(self.failures)} failures"


class _Lines:
    """What is used of tqdm's bar, as lines, where it is not installed."""

    def __init__(self, total: int, mininterval: float, **_):
        self.total, self.n, self.interval, self.postfix, self.shown = total, 0, mininterval, "", 0.0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.write(f"{self.n}/{self.total} s: {self.postfix}")

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        del refresh
        self.postfix = text

    def update(self, seconds: int) -> None:
        self.n += seconds
        if time.monotonic() > self.shown + self.interval:
            self.shown = time.monotonic()
            self.write(f"{self.n}/{self.total} s: {self.postfix}")

    def write(self, text: str, file=sys.stderr) -> None:
        print(text, file=file, flush=True)


def _bar(seconds: float):
    # Without a terminal a line each ten seconds.
    interval = 0.5 if sys.stderr.isatty() else 10.0
    try:
        from tqdm import tqdm
    except ImportError:
        return _Lines(round(seconds), interval)
    return tqdm(total=round(seconds), unit="s", mininterval=interval, maxinterval=interval, file=sys.stderr)


def fuzz(seconds: float, num_workers: int, seed: int, implementations: list[str]) -> Tally:
    tally: Tally = Tally()
    messages: queue.Queue = queue.Queue()
    began = time.monotonic()
    seeds = itertools.count(seed * 1000)
    start = functools.partial(start_worker, num_workers=num_workers, implementations=implementations, messages=messages)
    workers = {start(next(seeds), seconds) for _ in range(num_workers)}
    started: dict[Worker, str] = {}
    with _bar(seconds) as bar:
        while workers:
            passed = time.monotonic() - began
            bar.set_postfix_str(str(tally), refresh=False)
            bar.update(min(round(passed), bar.total) - bar.n)
            if passed > seconds + GRACE:
                for worker in workers:
                    worker.process.kill()
                    tally.failures.append((started.get(worker, "before the first case"), "did not return in time"))
                break
            try:
                worker, message = messages.get(timeout=0.5)
            except queue.Empty:
                continue
            if "start" in message:
                started[worker] = message["start"]
            elif "elements" in message:
                tally.cases += message["done"]
                tally.elements += message["elements"]
            elif "failed" in message:
                tally.failures.append((message["failed"], message["reason"]))
                bar.write(f"FAILED {message['failed']}", file=sys.stderr)
            else:
                workers.discard(worker)
                if message["exit"]:
                    reason = f"the worker ended with {message['exit']}: {message['stderr']}"
                    tally.failures.append((started.get(worker, "before the first case"), reason))
                    # An address error takes the process down: the others go on, and so does one in its place.
                    if worker in started and passed < seconds - 20:
                        workers.add(start(next(seeds), seconds - passed))
    return tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case", nargs="?", type=parse_case, help="a single case, as a failure prints it")
    parser.add_argument("--seed", type=int, default=0, help="of the inputs, or of the random cases")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes (%(default)s)")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the oracle's memory is torch's
    if arguments.work:
        _share_torch()
        work(arguments.seed, arguments.seconds, arguments.implementations)
        return
    if arguments.case is not None:
        print(f"{check(arguments.case, arguments.seed, arguments.implementations):,} elements agree")
        return
    tally = fuzz(arguments.seconds, arguments.workers, arguments.seed, arguments.implementations)
    print(tally)
    for line, reason in tally.failures[:MOST_SHOWN]:
        print(f"\n{line}\n  {reason.strip()[-600:]}")
    if len(tally.failures) > MOST_SHOWN:
        print(f"\nand {len(tally.failures) - MOST_SHOWN} more")
    sys.exit(bool(tally.failures) or not tally.elements)


def _share_torch() -> None:
    """A worker's memory for the oracle's outputs: a third of JAX's."""
    if has_gpu():
        import torch

        torch.cuda.set_per_process_memory_fraction(float(os.environ[gpu_memory.fraction_name(os.environ)]) / 3)


if __name__ == "__main__":
    main()
