"""`tune`: what the rules that choose launch configurations lose on this GPU, against all configurations of a space.

The result is a table for an issue. Nothing is kept: what a call takes is decided by the rules of `config.py` alone.
"""

import dataclasses
import functools
import importlib
import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax

from benchmarks import record
from benchmarks.agreement import relative_error
from benchmarks.compare import TIMER_STEP_US
from benchmarks.floor import minimum_bytes
from benchmarks.progress import progress, say
from benchmarks.providers import Call, repeated_inputs
from benchmarks.timing import Samples, measure
from pallas_qk import _implementations
from pallas_qk._mosaic_gpu.config import MosaicBackward, MosaicForward, mosaic_backward_group, shares
from pallas_qk._options import Spec, chunk_lanes, has_halves
from pallas_qk._rows import Gradients, Inputs, Outputs, spec_of
from pallas_qk._target import cuda_target
from pallas_qk._triton.config import TritonBackward, TritonForward
from tests import forms
from tests.cases import Case
from tests.compare import Comparison, compare_bits

Config = MosaicForward | MosaicBackward | TritonForward | TritonBackward

IMPLEMENTATIONS = ("mosaic_gpu", "triton")

# The values that are tried of each field. A field that isn't named stays as the rule has it. PER_SM are the warps, or
# programs of one warp, on a streaming multiprocessor, which q rows and k rows share by their numbers of heads.
PER_SM = "per_sm"
SPACE: dict[type, dict[str, tuple[Any, ...]]] = {
    MosaicForward: {
        "layout": ("chunks", "halves", "row"),
        "rows_per_warp": (1, 2, 4, 8),
        "weights": ("first", "after_gate", "after_sum"),
        "k_first": (False, True),
        "heads_per_thread": (1, 2, 4, 8),
        "heads_apart": (False, True),
    },
    MosaicBackward: {
        "rows_per_warp": (1, 2, 4),
        "num_warpgroups": (1, 2, 4, 6),
        PER_SM: (4, 8, 12, 16, 20, 24, 28),
    },
    TritonForward: {
        "layout": ("chunks", "halves", "row"),
        "rows_per_program": (1, 2, 4, 8, 16),
        "num_warps": (1, 2, 4, 8),
    },
    TritonBackward: {PER_SM: (4, 8, 12, 16, 20, 24, 28, 32)},  # layout and rows_per_step decide bits
}
_SHARED = {MosaicBackward: ("q_warps", "k_warps"), TritonBackward: ("q_programs", "k_programs")}

MOST_CHUNKS = 16  # more compile for many seconds each
FINALISTS = 4  # of the first sweep, measured once more with the rule's: the best of many noisy times is too good
SWEEP_ROUNDS, FINAL_ROUNDS = 2, 5
WEIGHTS_BOUND = 2.0**-16  # relative: other warps add the rows' terms in another order


class Space(NamedTuple):
    """The rule's configuration and the others, and how many can't be built, by reason."""

    rule: Config
    others: list[Config]
    left_out: Counter[str]


class Result(NamedTuple):
    """What a call takes by the rule and at best, microseconds."""

    case: Case
    implementation: str
    direction: str
    rule: Config
    best: Config
    copy: Samples
    by_rule: Samples
    at_best: Samples
    tried: int
    left_out: Counter[str]  # configurations that weren't timed, by reason


def space(rule: Config, spec: Spec, sms: int) -> Space:
    """The rule's configuration, and every other of its kind once."""
    swept = SPACE[type(rule)]
    others: dict[Config, None] = {}
    left_out: Counter[str] = Counter()
    for values in itertools.product(*swept.values()):
        fields = dict(zip(swept, values, strict=True))
        per_sm = fields.pop(PER_SM, None)
        if fields.get("heads_per_thread") == 1 and fields["heads_apart"]:
            continue  # a thread's only head lies alone, apart or not
        config = dataclasses.replace(rule, **fields)
        if per_sm is not None:
            config = shared(config, per_sm * sms, spec)
        if config == rule or config in others:
            continue
        if reason := impossible(config, rule, spec):
            left_out[reason] += 1
        else:
            others[config] = None
    return Space(rule, list(others), left_out)


def shared(config: Config, total: int, spec: Spec) -> Config:
    """`total` warps or programs shared by q rows and k rows."""
    if isinstance(config, MosaicBackward):
        rows = 32 // mosaic_backward_group(spec, 4 if spec.dtype == "float32" else 2, config.rows_per_warp)[0]
    else:
        assert isinstance(config, TritonBackward)
        rows = config.rows_per_step
    counts: dict[str, Any] = dict(zip(_SHARED[type(config)], shares(spec, total, rows), strict=True))
    return dataclasses.replace(config, **counts)


def impossible(config: Config, rule: Config, spec: Spec) -> str | None:
    """Why a configuration can't be built, or takes too long to; None if it can be tried."""
    layout = getattr(config, "layout", None)
    if layout == getattr(rule, "layout", None):
        return None
    if spec.rotation != "halves":
        return f"rotation={spec.rotation!r} has one layout"
    if layout == "halves" and not has_halves(spec.head_dim, spec.rotary_dim):
        return "halves need a head_dim and a rotary_dim that are powers of two"
    if layout == "chunks" and spec.head_dim // chunk_lanes(spec.head_dim, spec.rotary_dim) > MOST_CHUNKS:
        return f"more than {MOST_CHUNKS} chunks compile for too long"
    return None


class Kernel(NamedTuple):
    """One direction of one implementation for a case: its arrays, the rule's choice, and a call by configuration."""

    rule: Config
    spec: Spec
    call: Callable[[Config], Call]


def kernel(case: Case, implementation: str, direction: str) -> Kernel:
    options = forms.options(case)
    inputs: Inputs = forms.split_heads(case, forms.inputs_of(case, repeated_inputs(case)))
    arrays: tuple[Any, ...] = (inputs,)
    if direction == "backward":
        arrays += (forms.split_heads(case, forms.as_outputs(case, forms.cotangents_of(case))),)
    rule = module(implementation, direction).configuration(inputs, options)
    function = getattr(_implementations.module(implementation), direction)

    def call(config: Config) -> Call:
        return functools.partial(jax.jit(functools.partial(function, options=options, config=config)), *arrays)

    return Kernel(rule, spec_of(inputs, options), call)


def module(implementation: str, direction: str) -> ModuleType:
    """The file of a kernel."""
    return importlib.import_module(f"pallas_qk._{implementation}.{direction}")


def same(got: Outputs | Gradients, want: Outputs | Gradients) -> bool:
    """Whether results have the same bits, or, of the weights' gradients, sums of the same terms."""
    compared = Comparison(0, 0)
    for name, x in want._asdict().items():
        if x is None:
            continue
        if name.endswith("_weight"):
            if not relative_error(getattr(got, name), x) <= WEIGHTS_BOUND:
                return False
        else:
            compared += compare_bits(name, getattr(got, name), x)
    return compared.differing == 0


def buildable(of: Kernel, configs: Sequence[Config], label: str) -> tuple[dict[Config, Call], Counter[str], int]:
    """The calls whose results are those of the rule's, the rule's first; why others aren't built; how many differ."""
    calls = {of.rule: of.call(of.rule)}
    want = jax.block_until_ready(calls[of.rule]())
    refused: Counter[str] = Counter()
    num_differing = 0
    for config in progress(configs, label, str):
        call = of.call(config)
        try:
            got = jax.block_until_ready(call())
        except Exception as error:  # whatever Python, XLA or ptxas has against it
            refused[f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:100]}"] += 1
            continue
        if same(got, want):
            calls[config] = call
        else:
            say(f"{label}: {config} gives other results than {of.rule}: left out.")
            num_differing += 1
    return calls, refused, num_differing


def tuned(case: Case, implementation: str, direction: str) -> tuple[Result, int]:
    """The best configuration on this GPU, and how many gave other results than the rule's."""
    from benchmarks.gpu_kernels import copy_calls

    label = f"{implementation} {direction} {case.id}"
    of = kernel(case, implementation, direction)
    tried = space(of.rule, of.spec, cuda_target().num_sms)
    calls, refused, num_differing = buildable(of, tried.others, label)
    first = measure(case, {str(config): call for config, call in calls.items()}, rounds=SWEEP_ROUNDS)
    fastest = sorted(calls, key=lambda config: first[str(config)].p50_us)
    finalists = {of.rule: None, **dict.fromkeys(fastest[:FINALISTS])}
    copies = copy_calls(minimum_bytes(case, direction))
    last = measure(case, {str(config): calls[config] for config in finalists} | copies, rounds=FINAL_ROUNDS)
    best = min(finalists, key=lambda config: last[str(config)].p50_us)
    copy = min((last[name] for name in copies), key=lambda samples: samples.p50_us)
    times = copy, last[str(of.rule)], last[str(best)]
    left_out = tried.left_out + refused
    return Result(case, implementation, direction, of.rule, best, *times, len(calls), left_out), num_differing


def noise(samples: Samples) -> float:
    """The distance between the quartiles and a step of the clock, of the median."""
    return (samples.percentile(75) - samples.percentile(25) + TIMER_STEP_US) / samples.p50_us


def report(results: Sequence[Result], gpu: str, versions: Mapping[str, str]) -> str:
    """Markdown: the GPU and versions, a line for each result, and what wasn't tried."""
    lines = [
        f"{gpu}, {', '.join(f'{name} {version}' for name, version in versions.items())}",
        "",
        "Device times in microseconds. The loss is what the rule's configuration takes longer than the best one.",
        "",
        "| call | heads | D, R | T | implementation | copy | rule | best | loss | noise | configuration of the best |",
        "|---" * 11 + "|",
    ]
    for x in results:
        case = x.case
        cells = [
            f"{record.op_name(case, x.direction)}, {case.dtype}",
            f"{case.num_q_heads}/{case.num_kv_heads}",
            f"{case.head_dim}, {case.rotary_dim}",
            str(case.num_tokens),
            x.implementation,
            *(f"{samples.p50_us:.2f}" for samples in (x.copy, x.by_rule, x.at_best)),
            f"{100 * (x.by_rule.p50_us / x.at_best.p50_us - 1):.1f} %",
            f"{100 * max(noise(x.by_rule), noise(x.at_best)):.1f} %",
            "the rule's" if x.best == x.rule else f"`{x.best}`",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for x in results:
        kept = [field.name for field in dataclasses.fields(x.rule) if field.name not in swept_fields(x.rule)]
        text = f"{x.implementation}, {x.direction}, T = {x.case.num_tokens}: {x.tried} configurations timed"
        if kept:
            text += f", as the rule has them: {', '.join(kept)}"
        text += "".join(f"; {count} not built: {reason}" for reason, count in x.left_out.items())
        lines.append(f"- {text}. Rule: `{x.rule}`")
    return "\n".join(lines)


def swept_fields(rule: Config) -> set[str]:
    """The fields that `space` changes."""
    names = set(SPACE[type(rule)])
    return names | set(_SHARED[type(rule)]) if PER_SM in names else names


def tune(
    cases: Sequence[Case],
    implementations: Sequence[str],
    directions: Sequence[str],
    gpu: str,
    versions: Mapping[str, str],
) -> int:
    """Sweeps and prints the report; 0, or 1 where a configuration gave other results than the rule's."""
    results, num_differing = [], 0
    for case, direction, name in itertools.product(cases, directions, implementations):
        spec = kernel_spec(case)
        if reason := _implementations.unsupported(name, spec, cuda_target()):
            say(f"{case.id}: {name} skipped: {reason}")
            continue
        result, differing = tuned(case, name, direction)
        results.append(result)
        num_differing += differing
    print(report(results, gpu, versions))
    return int(num_differing > 0)


def kernel_spec(case: Case) -> Spec:
    return spec_of(forms.types(case)[0], forms.options(case))
