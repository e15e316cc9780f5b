"""The operations that `run` times: for each the calls that are right, the bytes that it must move, and its memory."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pallas_qk
from benchmarks import block, gradients, kv_cache, projection
from benchmarks.agreement import Agreement, agreement
from benchmarks.checked import Checks, check, with_oracle
from benchmarks.floor import block_bytes, cached_bytes, minimum_bytes
from benchmarks.providers import JAX_OPS, PROVIDERS, Builder, Call, jitted, repeated_inputs, to_jax
from tests import forms
from tests.cases import Case, Inputs


class Operation(NamedTuple):
    """Something that can be timed.

    check(case, inputs, providers) gives the calls that agree with what they are compared with, and whether all do;
    minimum_bytes(case) what any implementation must move; memory is how many times that the GPU must hold at once.
    """

    check: Callable[[Case, Inputs, Mapping[str, Builder]], Checks]
    minimum_bytes: Callable[[Case], int]
    memory: float


def check_forward(case: Case, inputs: Inputs, providers: Mapping[str, Builder]) -> Checks:
    """The calls that agree with the oracle as promised."""
    builds = {name: functools.partial(build, case, inputs) for name, build in providers.items() if name != "oracle"}
    return _check_op(case, inputs, providers, builds, "none: the reference")


def check_with(case: Case, inputs: Inputs, providers: Mapping[str, Builder], **options: Any) -> Checks:
    """`check_forward` of the case with other options, which may have other inputs."""
    form = dataclasses.replace(case, **options)
    return check_forward(form, repeated_inputs(form), providers)


def check_v_norm(case: Case, inputs: Inputs, providers: Mapping[str, Builder]) -> Checks:
    """The op that normalises a packed v, which the oracle does as k of a second call; so the oracle isn't timed."""
    form, oracle = dataclasses.replace(case, packed=True, v_norm=True), PROVIDERS["oracle"]
    of_v, v_inputs = forms.of_v(form), forms.inputs_of_v(form, forms.values(form))
    want, (no_q, v_want, no_gate) = to_jax(oracle(case, inputs)()), to_jax(oracle(of_v, v_inputs)())
    arrays = forms.arguments(form, inputs)

    def build(name: str) -> Call:
        return jitted(JAX_OPS[name](form), *arrays)

    def compare(name: str, got) -> Agreement:
        q, k, v, gate = got
        found = agreement(name, case, (q, k, gate), want, platform="gpu")
        of_rows = agreement(name, of_v, (no_q, v, no_gate), (no_q, v_want, no_gate), platform="gpu")
        return dataclasses.replace(
            found,
            elements=found.elements + v.size,
            differing=found.differing + of_rows.differing,
            kept=found.kept and of_rows.kept,
            first=found.first or of_rows.first,
        )

    return check(case, {name: functools.partial(build, name) for name in providers if name in JAX_OPS}, compare)


def check_no_gate(case: Case, inputs: Inputs, providers: Mapping[str, Builder]) -> Checks:
    """The op without gates, whose q and k are compared with the oracle's, which has gates and isn't timed."""
    form, named = dataclasses.replace(case, gate=None), {name: x for name, x in providers.items() if name in JAX_OPS}
    arrays = forms.arguments(form, inputs)
    builds = {name: functools.partial(jitted, JAX_OPS[name](form), *arrays) for name in named}
    return _check_op(case, inputs, named, builds)


def check_gate_in_place(case: Case, inputs: Inputs, providers: Mapping[str, Builder]) -> Checks:
    """The op without its gate's copy, timed together with the oracle's whole op."""
    form = dataclasses.replace(case, gate="in_place")

    def build(name: str) -> Call:
        op = JAX_OPS[name](form)
        return jitted(lambda *arrays: op(*arrays)[:2], *forms.arguments(form, inputs))  # the slice isn't made

    builds = {name: functools.partial(build, name) for name in providers if name in pallas_qk.IMPLEMENTATIONS}
    return _check_op(case, inputs, providers, builds, "none: the reference, with its copy of the gate")


def _check_op(
    case: Case,
    inputs: Inputs,
    providers: Mapping[str, Builder],
    builds: Mapping[str, Callable[[], Call]],
    reference: str = "",
) -> Checks:
    """The calls whose results agree with as many of the oracle's; the oracle leads where it is among `providers`.

    `reference` says then what the oracle was compared with.
    """
    oracle = PROVIDERS["oracle"](case, inputs)
    want = to_jax(oracle())

    def compare(name: str, got) -> Agreement:
        return agreement(name, case, (*got, *want[len(got) :]), want, platform="gpu")

    calls, kept = check(case, builds, compare)
    return (with_oracle(calls, oracle, reference) if "oracle" in providers else calls), kept


def check_backward(case: Case, inputs: Inputs, providers: Mapping[str, Builder]) -> Checks:
    """The calls whose gradients are the float32 ones, rounded; what has no backward is left out."""
    arrays, cotangents = forms.arguments(case, inputs), gradients.cotangents(case)
    want = gradients.expected(forms.op(case, "xla"), cotangents, arrays)
    builds = {
        name: functools.partial(jitted, gradients.gradients(JAX_OPS[name](case)), cotangents, *arrays)
        for name in providers
        if name in JAX_OPS
    }
    return check(case, builds, lambda name, got: gradients.op_agreement(case, got, want))


def _with(**options: Any) -> Operation:
    """The forward with other options."""
    check = functools.partial(check_with, **options)
    return Operation(check, lambda case: minimum_bytes(dataclasses.replace(case, **options)), 2.5)


def _cached(memory: float, gate: str = "copied", kv_dtype: str | None = None) -> Operation:
    """The op that writes a KV cache."""
    check = functools.partial(kv_cache.check_cache, gate=gate, kv_dtype=kv_dtype)
    return Operation(check, lambda case: cached_bytes(kv_cache.form_of(case, gate, kv_dtype)), memory)


def _projection_cache(kv_dtype: str | None = None) -> Operation:
    """Each call has caches of its own."""
    check = functools.partial(projection.check_projection_cache, kv_dtype=kv_dtype)
    return Operation(check, functools.partial(projection.projection_bytes, kv_dtype=kv_dtype), 7.0)


# Inputs, two results and the copy's two buffers lie in memory at once; float32 gradients take twice as much.
OPERATIONS = {
    "forward": Operation(check_forward, minimum_bytes, 2.5),
    "forward_pairs": _with(rotation="pairs"),
    "forward_unrounded_norm": _with(round_norm=False),
    "forward_rotation_first": _with(norm_order="rotation_first"),
    "forward_no_table": _with(rotary_dim=0),
    "forward_float32_table": _with(cache_dtype="float32"),
    "forward_no_weights": _with(weights=False),
    "forward_v_norm": Operation(check_v_norm, lambda case: minimum_bytes(dataclasses.replace(case, packed=True)), 3.5),
    "backward": Operation(check_backward, functools.partial(minimum_bytes, direction="backward"), 5.0),
    "forward_no_gate": Operation(check_no_gate, lambda case: minimum_bytes(dataclasses.replace(case, gate=None)), 4.0),
    "backward_no_gate": Operation(
        lambda case, *rest: check_backward(dataclasses.replace(case, gate=None), *rest),
        lambda case: minimum_bytes(dataclasses.replace(case, gate=None), "backward"),
        6.0,
    ),
    "gate_in_place": Operation(
        check_gate_in_place, lambda case: minimum_bytes(dataclasses.replace(case, gate="in_place")), 3.0
    ),
    "block": Operation(block.check_forward, block_bytes, 3.0),
    "block_packed": Operation(
        functools.partial(block.check_forward, packed=True), functools.partial(block_bytes, packed=True), 3.0
    ),
    "block_backward": Operation(block.check_backward, functools.partial(block_bytes, direction="backward"), 5.0),
    "block_packed_backward": Operation(
        functools.partial(block.check_backward, packed=True),
        functools.partial(block_bytes, packed=True, direction="backward"),
        5.0,
    ),
    "projection": Operation(projection.check_projection, projection.projection_bytes, 5.0),
    "projection_cache": _projection_cache(),
    "projection_cache_fp8": _projection_cache("float8_e4m3fn"),
    # Each call has caches of its own.
    "kv_cache": _cached(5.0),
    "kv_cache_gate_in_place": _cached(9.0, gate="in_place"),
    "kv_cache_fp8": _cached(5.0, kv_dtype="float8_e4m3fn"),
    "kv_cache_fp8_gate_in_place": _cached(9.0, gate="in_place", kv_dtype="float8_e4m3fn"),
}
