"""The suite `block`: from the projection's output to gated attention output, with attention taken out.

A block takes q_gate and k, or one packed projection of them and v, and an array that stands for attention's result. It
returns q, k (and v) for attention, and that array times sigmoid(gate). What a copied gate and slices of a packed
projection cost shows here, forward and backward. `gate_in_place` is the op alone without its copy of the gate, beside
the oracle's whole op.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import pallas_qk
from benchmarks import xla_plain
from benchmarks.agreement import Agreement, Promise, agreement
from benchmarks.checked import Checked, check
from benchmarks.providers import PROVIDERS, Builder, Call, to_jax
from tests.cases import Case, Inputs
from tests.compare import compare_bits

Arrays = tuple[jax.Array, ...]
Op = Callable[..., Arrays]

IN_PLACE = "_in_place"  # the end of a name: copy_gate=False


class Kind(NamedTuple):
    """What `run.OPS` needs of an operation; `backward` ones hold float32 gradients for the comparison."""

    check: Callable[[Case, Inputs, Mapping[str, Builder]], tuple[dict[str, Checked], bool]]
    minimum_bytes: Callable[[Case], int]
    backward: bool


# --- what is timed ------------------------------------------------------------------------------------------------


def library_op(implementation: str, *, copy_gate: bool, packed: bool) -> Op:
    """The public function by one implementation: (q, k, gate), or packed (q, k, v, gate)."""
    function = getattr(pallas_qk, "fused_qkv_rmsnorm_rope_gate" if packed else "fused_qk_rmsnorm_rope_gate")
    return functools.partial(function, copy_gate=copy_gate, implementation=implementation)


def plain_op(*arrays: jax.Array, packed: bool, **static: Any) -> Arrays:
    """The same in plain jnp, the packed projection cut by slices."""
    op: Op = xla_plain.fused_qk_rmsnorm_rope_gate
    if not packed:
        return op(*arrays, **static)
    qkv, *rest = arrays
    q_width = 2 * static["num_q_heads"] * static["head_dim"]
    kv_width = static["num_kv_heads"] * static["head_dim"]
    q_gate, k, v = jnp.split(qkv, [q_width, q_width + kv_width], axis=-1)
    q, k, gate = op(q_gate, k, *rest, **static)
    return q, k, v, gate


def ops(implementations: Sequence[str], *, packed: bool) -> dict[str, Op]:
    """The blocks by name: each implementation with its gate copied and left in place, and plain jnp."""
    library = {
        f"{name}{'' if copy_gate else IN_PLACE}": library_op(name, copy_gate=copy_gate, packed=packed)
        for name in implementations
        for copy_gate in (True, False)
    }
    return {**library, "xla_plain": functools.partial(plain_op, packed=packed)}


def block(op: Op, activations: Arrays, attended: jax.Array, others: Arrays, static: dict[str, Any]) -> Arrays:
    """q, k (and v), and attended * sigmoid(gate)."""
    *outputs, gate = op(*activations, *others, **static)
    return *outputs, attended * jax.nn.sigmoid(gate)


# --- its arrays ---------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("case", "seed"))
def attended_and_v(case: Case, seed: int = 2) -> tuple[jax.Array, jax.Array]:
    """Random (T, Hq*D) and (T, Hkv*D)."""
    keys = jax.random.split(jax.random.key(seed))
    widths = (case.num_q_heads * case.head_dim, case.num_kv_heads * case.head_dim)
    attended, v = (
        jax.random.normal(key, (case.num_tokens, width), jnp.float32).astype(case.dtype)
        for key, width in zip(keys, widths, strict=True)
    )
    return attended, v


@functools.partial(jax.jit, static_argnames=("case", "packed", "seed"))
def cotangents(case: Case, packed: bool, seed: int = 3) -> Arrays:
    """Random cotangents of the block's results."""
    heads = (case.num_q_heads, *(case.num_kv_heads,) * (2 if packed else 1), case.num_q_heads)
    keys = jax.random.split(jax.random.key(seed), len(heads))
    return tuple(
        jax.random.normal(key, (case.num_tokens, h * case.head_dim), jnp.float32).astype(case.dtype)
        for key, h in zip(keys, heads, strict=True)
    )


def activations_and_others(case: Case, inputs: Inputs, packed: bool) -> tuple[Arrays, Arrays]:
    """(q_gate, k) or (qkv,), and the weights, table and positions."""
    q_gate, k, *others = inputs
    if not packed:
        return (q_gate, k), tuple(others)
    return (jnp.concatenate([q_gate, k, attended_and_v(case)[1]], axis=-1),), tuple(others)


# --- forward ------------------------------------------------------------------------------------------------------


def forward_call(op: Op, case: Case, inputs: Inputs, packed: bool) -> Call:
    activations, others = activations_and_others(case, inputs, packed)
    run = jax.jit(functools.partial(block, op, static=case.static_arguments))
    return functools.partial(run, activations, attended_and_v(case)[0], others)


def check_block(
    case: Case, inputs: Inputs, providers: Mapping[str, Builder], *, packed: bool
) -> tuple[dict[str, Checked], bool]:
    """The blocks whose q and k agree with the oracle as promised, and whose gated output does up to rounding."""
    q_want, k_want, gate_want = to_jax(PROVIDERS["oracle"](case, inputs)())
    attended, v = attended_and_v(case)
    gated_want = gated32(attended, gate_want)

    def compare(name: str, got) -> Agreement:
        q, k, *vs, gated = got
        implementation = name.removesuffix(IN_PLACE)
        compared = agreement(implementation, case, (q, k, gate_want), (q_want, k_want, gate_want), platform="gpu")
        same_v = all(compare_bits("v", x, v).differing == 0 for x in vs)
        kept = compared.kept and same_v and relative_error(gated, gated_want) <= 4 * float(jnp.finfo(case.dtype).eps)
        return dataclasses.replace(compared, kept=kept, against="oracle, times sigmoid")

    return check(case, inputs, _builders(case, providers, packed, forward_call), compare)


def check_gate_in_place(
    case: Case, inputs: Inputs, providers: Mapping[str, Builder]
) -> tuple[dict[str, Checked], bool]:
    """The op without its gate's copy; the oracle's whole op is timed beside it."""
    oracle = PROVIDERS["oracle"](case, inputs)
    want = to_jax(oracle())

    def build(name: str, case: Case, inputs: Inputs) -> Call:
        op = library_op(name, copy_gate=False, packed=False)
        run = jax.jit(lambda *arrays: op(*arrays, **case.static_arguments)[:2])  # the slice isn't made
        return functools.partial(run, *inputs)

    def compare(name: str, got) -> Agreement:
        return agreement(name, case, (*got, want[2]), want, platform="gpu")

    builders = {name: functools.partial(build, name) for name in _implementations(providers)}
    calls, kept = check(case, inputs, builders, compare)
    if "oracle" in providers:
        checked = {"against": "none: the reference, with its copy of the gate", "elements": 0, "differing": 0}
        calls = {"oracle": Checked(oracle, checked), **calls}
    return calls, kept


@jax.jit
def gated32(attended: jax.Array, gate: jax.Array) -> jax.Array:
    return attended.astype(jnp.float32) * jax.nn.sigmoid(gate.astype(jnp.float32))


@jax.jit
def _relative_error(got: jax.Array, want: jax.Array) -> jax.Array:
    got, want = (x.astype(jnp.float32).reshape(-1) for x in (got, want))
    return jnp.linalg.norm(got - want) / jnp.linalg.norm(want)


def relative_error(got: jax.Array, want: jax.Array) -> float:
    """|got - want| / |want| in the norm of the whole array."""
    return float(_relative_error(got, want))


# --- backward -----------------------------------------------------------------------------------------------------

_WEIGHTS = 2  # the first of `others`


def _gradients(op: Op, static: dict[str, Any], activations, attended, others, cotangents) -> list[jax.Array]:
    weights, rest = others[:_WEIGHTS], others[_WEIGHTS:]

    def forward(activations, attended, weights):
        return block(op, activations, attended, (*weights, *rest), static)

    # The results aren't used, so XLA drops what the residuals don't need.
    return jax.tree.leaves(jax.vjp(forward, activations, attended, weights)[1](cotangents))


def backward_call(op: Op, case: Case, inputs: Inputs, packed: bool) -> Call:
    activations, others = activations_and_others(case, inputs, packed)
    run = jax.jit(functools.partial(_gradients, op, case.static_arguments))
    return functools.partial(run, activations, attended_and_v(case)[0], others, cotangents(case, packed))


def expected_gradients(case: Case, inputs: Inputs, packed: bool) -> list[jax.Array]:
    """Gradients of the block in float32 throughout, from the same inputs."""

    def widen(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)

    @jax.jit
    def run(*arguments):
        return _gradients(functools.partial(plain_op, packed=packed), case.static_arguments, *widen(arguments))

    activations, others = activations_and_others(case, inputs, packed)
    return run(activations, attended_and_v(case)[0], others, cotangents(case, packed))


def check_backward(
    case: Case, inputs: Inputs, providers: Mapping[str, Builder], *, packed: bool
) -> tuple[dict[str, Checked], bool]:
    """The blocks whose gradients are the float32 ones up to the rounding of 16-bit arrays."""
    want = expected_gradients(case, inputs, packed)
    # As for the op alone, and the gated product's own roundings on top.
    bound = 8 * float(jnp.finfo(case.dtype).eps)

    def compare(name: str, got) -> Agreement:
        worst = max(relative_error(g, w) for g, w in zip(got, want, strict=True))
        elements = sum(x.size for x in got)
        promise = Promise(elements, bound, bound, "relative")
        return Agreement(elements, elements, promise, worst, worst, worst <= bound, "", "float32 gradients")

    return check(case, inputs, _builders(case, providers, packed, backward_call), compare)


# --- what any block must move ---------------------------------------------------------------------------------------


def _bytes(case: Case, q_rows: int, k_rows: int, table_rows: int) -> int:
    """Rows of D elements for each query and key head, and table rows, of each token."""
    itemsize = jnp.dtype(case.dtype).itemsize
    table = table_rows * case.rotary_dim * jnp.dtype(case.cache_dtype or case.dtype).itemsize
    heads = q_rows * case.num_q_heads + k_rows * case.num_kv_heads
    return case.num_tokens * (heads * case.head_dim * itemsize + table)


KINDS = {
    "gate_in_place": Kind(check_gate_in_place, lambda case: _bytes(case, 2, 2, 1), False),
    # q and q out, gate, attended, gated; k and k out; packed: v and v out too
    "block": Kind(functools.partial(check_block, packed=False), lambda case: _bytes(case, 5, 2, 1), False),
    "block_packed": Kind(functools.partial(check_block, packed=True), lambda case: _bytes(case, 5, 4, 1), False),
    # q, gate, attended and two cotangents in, those of q, gate and attended out; k, its cotangent, the result's
    "block_backward": Kind(functools.partial(check_backward, packed=False), lambda case: _bytes(case, 8, 3, 0), True),
    "block_packed_backward": Kind(
        functools.partial(check_backward, packed=True), lambda case: _bytes(case, 8, 5, 0), True
    ),
}


def _implementations(providers: Mapping[str, Builder]) -> list[str]:
    return [name for name in providers if name in pallas_qk.IMPLEMENTATIONS]


def _builders(
    case: Case, providers: Mapping[str, Builder], packed: bool, call: Callable[[Op, Case, Inputs, bool], Call]
) -> dict[str, Builder]:
    def build(op: Op, case: Case, inputs: Inputs) -> Call:
        return call(op, case, inputs, packed)

    found = ops(_implementations(providers), packed=packed)
    if "xla_plain" not in providers:
        del found["xla_plain"]
    return {name: functools.partial(build, op) for name, op in found.items()}
