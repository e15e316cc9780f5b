"""The gate that the op hands on, and the public function that takes it."""

import dataclasses
import functools

import jax

from pallas_qk import _mesh_checks
from pallas_qk._array_checks import check_array, unboxed
from pallas_qk._checks import check_dtype_name, describe
from pallas_qk._options import Options
from pallas_qk._rows import Call, Inputs, head_dim_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Gate:
    """The gate of a call with copy_gate="never", which `apply_gate` takes and nothing else does.

    A pytree that holds the array with the gate twice, and says where the gate lies there and which implementation was
    named. `apply_gate` reads one of the two, and derivatives pass through the other. As a cotangent that one holds the
    gate's, and whatever memory held in the other elements: what adds or stacks it, or scales it by a constant, does no
    harm, and what looks for NaN may find some.
    """

    # (*lead, elements), flat in heads. As the op was given it: for a backward both keep this one array.
    _given: jax.Array
    # As the op returned it. The cotangent of `_given` may go where all elements count, such as past the op into q's in
    # a derivative of the second order; this one's goes to the op's backward alone, which reads no more than the gate's.
    _returned: jax.Array
    _call: Call = dataclasses.field(metadata={"static": True})

    def __repr__(self) -> str:
        of = self._given.aval.str_short() if isinstance(self._given, jax.Array) else repr(self._given)
        return f"Gate({of})"


def of_call(returned: jax.Array, call: Call, inputs: Inputs) -> Gate:
    """The gate in an array (*lead, elements) of a call, without what doesn't concern it."""
    given = call.options
    options = Options(
        rotary_dim=0,
        eps=0.0,
        rotation=None,
        head_dim=head_dim_of(inputs, given),
        gate=given.gate,
        packed=given.packed,
        q_alone=given.packed is None,
    )
    return Gate(inputs.q, returned, Call(options, call.implementation))


def apply_gate(attended: jax.Array, gate: Gate) -> jax.Array:
    """attended * sigmoid(gate), for the gate of a call with copy_gate="never".

    Args:
      attended: (..., Hq*D) or (..., Hq, D), attention's result for the op's q_out; its dtype.
      gate: what the op returned in the place of gate_out.

    Returns:
      The product, in the shape and dtype of `attended`. The sigmoid is computed in float32 and rounded to that dtype,
      then the product is, as in transformers' Qwen3.5 layer. It is plain XLA on every platform.

    Raises:
      TypeError: `gate` is no `Gate`, or holds no array of floats, or `attended` is no array of its dtype.
      ValueError: `attended` has another shape or heads cut across devices, or the array in `gate` was cut.
      NotImplementedError: a gradient can't be had, as that of the op.
      RuntimeError: as the op.

    Derivatives:
      Of both arguments, in every mode and of any order, without the roundings. Reverse mode is one kernel where the op
      runs as "mosaic_gpu", plain XLA elsewhere. It computes both cotangents in float32, rounds each once, and writes
      the gate's where the op's backward then adds those of q, in place: nothing copies it.

    Mapping and sharding: as the op.

    Example:
      >>> import jax.numpy as jnp
      >>> import pallas_qk
      >>> q_gate, k, ones = jnp.ones((5, 16, 2 * 128)), jnp.ones((5, 2, 128)), jnp.ones(128)
      >>> q, k, gate = pallas_qk.fused_qk_rmsnorm_rope_gate(
      ...     q_gate, k, ones, ones, jnp.ones((1024, 64)), jnp.arange(5), 1e-6, copy_gate="never")
      >>> attended = q  # for example
      >>> pallas_qk.apply_gate(attended, gate).shape
      (5, 16, 128)
    """
    _mesh_checks.check_process()
    if not isinstance(gate, Gate):
        raise TypeError(
            f"gate must be the pallas_qk.Gate of a call with copy_gate='never', got {describe(gate)}. "
            "Pass that, or multiply attended by jax.nn.sigmoid(gate)."
        )
    attended = unboxed(attended)
    check_array("attended", attended)
    array, options = gate._given, gate._call.options
    check_array("the array in gate", array)
    check_dtype_name("the array in gate", str(array.dtype))
    if attended.dtype != array.dtype:
        raise TypeError(
            f"attended must have the dtype of the gate, {array.dtype}, got {attended.dtype}. Cast it with astype."
        )
    head_dim = options.head_dim
    assert head_dim is not None
    *lead, width = array.shape or (0,)
    num_heads, of_kv = options.packed or (width // (2 * head_dim), 0)
    if not width or width != 2 * (num_heads + of_kv) * head_dim:
        wanted = 2 * sum(options.packed) * head_dim if options.packed else f"heads of 2 * {head_dim}"
        raise ValueError(
            f"the array in gate must have a last axis of {wanted} elements, got shape {tuple(array.shape)}. "
            "Pass the Gate as the op returned it, or cut its leading axes alone."
        )
    forms = (*lead, num_heads * head_dim), (*lead, num_heads, head_dim)
    if attended.shape not in forms:
        raise ValueError(
            f"attended must have shape {forms[0]} or {forms[1]}, got {tuple(attended.shape)}. "
            "Its sizes: those of the op's q_out; heads are one axis with the elements of each, or two."
        )
    split = attended.shape == forms[1]
    _mesh_checks.check_known_sharding_of_heads("attended", attended, num_heads, split=split)
    product: jax.Array = _run(attended, array, gate._returned, call=gate._call)
    return product


@functools.partial(jax.jit, static_argnames="call")
def _run(attended: jax.Array, given: jax.Array, returned: jax.Array, *, call: Call) -> jax.Array:
    """Jitted here, so that an eager call gives the bits of a call inside `jax.jit`."""
    from pallas_qk import _product  # late, as in `_call`

    with jax.named_scope("apply_gate"):
        return _product.product(call, given, returned, attended)
