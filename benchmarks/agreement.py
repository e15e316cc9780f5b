"""Does an implementation agree with the oracle as it promises? Asked before a time is recorded, by verify and demo."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from pallas_qk._rows import Outputs
from tests import forms, tolerances
from tests.cached import CachedCase, arrays_of, by_slot, has_place, written
from tests.cases import Case
from tests.compare import Comparison, bits_of, compare_bits, compare_outputs


@dataclasses.dataclass(frozen=True)
class Promise:
    """How many elements may differ and how far: ulps for 16-bit activations, a relative bound for float32."""

    max_differing: int
    max_distance: float = 0.0
    max_rotated_distance: float = 0.0  # measured against the RoPE pair
    unit: str = "ulp"
    codes: str = ""  # of written rows in 8 bits: what is promised where they may differ

    def __str__(self) -> str:
        return f"{self._of_rows()}; {self.codes}" if self.codes else self._of_rows()

    def _of_rows(self) -> str:
        if self.max_differing == 0:
            return "equal bits"
        if self.unit == "relative":
            return f"within {self.max_distance:.1e} relative"
        distances = f"{self.max_distance:.0f} ulp, rotated within {self.max_rotated_distance:.1f} of the pair"
        return f"at most {self.max_differing:,}, within {distances}"


@dataclasses.dataclass(frozen=True)
class Agreement:
    """What was compared with the oracle, what was promised, and whether the promise is kept."""

    elements: int
    differing: int
    promise: Promise
    distance: float  # the largest seen, of the lanes that aren't rotated
    rotated_distance: float
    kept: bool
    first: str  # the first element that differs
    against: str = "oracle"

    @property
    def checked(self) -> dict[str, object]:
        """The `checked` field of a record."""
        return {
            "against": self.against,
            "promise": str(self.promise),
            "elements": self.elements,
            "differing": self.differing,
        }

    def __str__(self) -> str:
        text = f"{self.differing:,} of {self.elements:,} differ"
        if self.differing and self.promise.unit == "relative":
            text += f", by {max(self.distance, self.rotated_distance):.1e}"
        elif self.differing:
            text += f", by {self.distance:.1f} and {self.rotated_distance:.1f} ulp"
        return text if self.kept else f"{text}: BROKEN, promised {self.promise}; first: {self.first}"


def promise(implementation: str, case: Case, num_elements: int, platform: str) -> Promise:
    """What an implementation promises on a platform ("gpu" or "cpu", where the oracle is interpreted).

    On a GPU every name promises equal bits but for two. "xla" does where `max_differing` is 0 and elsewhere keeps to a
    count and a distance, "xla_plain" keeps to the distance that a lost round trip allows. In float32 these two keep to
    a relative bound, and so does every name up to 32 lanes a head that are normalised first: there the serving kernel
    adds the first pair as a fused multiply-add in each of the two threads that share it, and they disagree.
    """
    threads_agree = case.head_dim > 32 or (case.rotary_dim > 0 and case.norm_order == "rotation_first")
    same_tree = platform == "gpu" and implementation not in ("xla", "xla_plain") and threads_agree
    if jnp.dtype(case.dtype) == jnp.float32 and not same_tree:
        bound = tolerances.float32_bound(case, tree=platform == "gpu" and implementation != "xla_plain")
        return Promise(num_elements, bound, bound, "relative")
    if implementation == "xla_plain":
        return Promise(num_elements, 1.0, tolerances.max_pair_ulps(case, platform, round_trip=False))
    if implementation == "xla":
        count = tolerances.max_differing(case, num_elements, platform)
        return Promise(count, 1.0, tolerances.max_pair_ulps(case, platform))
    return Promise(0)


def in_form(case: Case, got, want) -> list:
    """q_out, k_out and gate_out of a call in the form of `case`; what the form doesn't have is the wanted one."""
    by_name = dict(zip(forms.output_names(case), got, strict=True))
    return [by_name.get(*x) for x in zip(("q", "k", "gate"), want, strict=True)]


def agreement(implementation: str, case: Case, got, want, *, platform: str) -> Agreement:
    """Compares (q_out, k_out, gate_out) with the oracle's; the gate's bits must be equal in any case."""
    compared = compare_outputs(got, want)
    promised = promise(implementation, case, compared.elements, platform)
    rest = rotated = 0.0
    if compared.differing:
        for a, b in zip(got[:2], want[:2], strict=True):
            worst = tolerances.worst_distances(a, b, case.head_dim, case.rotary_dim, case.rotation)
            rotated, rest = max(rotated, float(worst[0])), max(rest, float(worst[1]))
    kept = (
        compared.differing <= promised.max_differing
        and rest <= promised.max_distance
        and rotated <= promised.max_rotated_distance
        and compare_bits("gate_out", got[2], want[2]).differing == 0
    )
    return Agreement(compared.elements, compared.differing, promised, rest, rotated, kept, compared.first)


COUNTED = "codes of written rows are counted"


def cached_agreement(
    implementation: str,
    cached: CachedCase,
    got: Outputs,
    want: Outputs,
    slots: np.ndarray,
    *,
    platform: str,
    count_codes: bool = False,
) -> Agreement:
    """Compares a call that writes a KV cache with the oracle's two launches; rows are (T, heads*D).

    q and each k, in the cache and returned, keep to the promise. v, gates and what no slot names have equal bits.
    `agreement_of_codes` has what is promised of k in 8 bits. With `count_codes` the codes of k and v may differ: the
    compiler's own division and conversion made them.
    """
    case, at = cached.case, written(cached, slots)
    (k, v), (k_want, v_want) = (_by_slot(cached, x) for x in (got, want))
    of_tokens = [x[at].reshape(at.size, case.num_kv_heads * case.head_dim) for x in (k, k_want)]
    in_8_bits = cached.cache_dtype.itemsize == 1
    of_k = [want.k[:0]] * 2 if in_8_bits else of_tokens
    gates = want.gate if got.gate is None else got.gate, want.gate
    found = [agreement(implementation, case, *zip((got.q, want.q), of_k, gates, strict=True), platform=platform)]
    rest = compare_bits("k_cache", k.at[at].set(0), k_want.at[at].set(0))
    if in_8_bits and count_codes:
        codes = compare_bits("k_cache", *of_tokens) + compare_bits("v_cache", v[at], v_want[at])
        found.append(_agreement_of(codes, Promise(codes.elements, codes=COUNTED), kept=True))
        rest += compare_bits("v_cache", v.at[at].set(0), v_want.at[at].set(0))
    else:
        rest += compare_bits("v_cache", v, v_want)
        if in_8_bits:
            tokens = np.flatnonzero(has_place(cached, slots))
            rows = None if got.k is None else (got.k[tokens], want.k[tokens])
            found.append(agreement_of_codes(implementation, case, of_tokens, rows, platform=platform))
    if cached.return_kv:
        only_k = [(x.q[:0], x.k, want.gate[:0]) for x in (got, want)]
        found.append(agreement(implementation, case, *only_k, platform=platform))
        rest += compare_bits("v_out", got.v, want.v)
    return Agreement(
        elements=rest.elements + sum(x.elements for x in found),
        differing=rest.differing + sum(x.differing for x in found),
        promise=dataclasses.replace(found[0].promise, codes=found[1].promise.codes if in_8_bits else ""),
        distance=max(x.distance for x in found),
        rotated_distance=max(x.rotated_distance for x in found),
        kept=rest.differing == 0 and all(x.kept for x in found),
        first=next(filter(None, [*(x.first for x in found), rest.first]), ""),
    )


def agreement_of_codes(implementation: str, case: Case, codes, rows, *, platform: str) -> Agreement:
    """Compares codes of k in 8 bits with the oracle's. `rows` are those of k before, of both, or None.

    Where the implementation promises bits of k, it promises those of the codes. Elsewhere a code differs only where k
    does. Without `rows` as many codes may differ as elements of k.
    """
    compared = compare_bits("k_cache", *codes)
    promised = promise(implementation, case, compared.elements, platform)
    if promised.max_differing == 0 or rows is None:
        text = f"at most {promised.max_differing:,} codes of k differ" if promised.max_differing else ""
        return _agreement_of(
            compared, dataclasses.replace(promised, codes=text), kept=compared.differing <= promised.max_differing
        )
    is_same = bits_of(rows[0]) == bits_of(rows[1])
    of_same_rows = compare_bits("k_cache", *(jnp.where(is_same, x, 0) for x in codes))
    promised = dataclasses.replace(promised, codes="codes of k differ only where k does")
    return _agreement_of(compared, promised, kept=of_same_rows.differing == 0)


def _agreement_of(compared: Comparison, promised: Promise, *, kept: bool) -> Agreement:
    return Agreement(compared.elements, compared.differing, promised, 0.0, 0.0, kept, compared.first)


def _by_slot(cached: CachedCase, outputs: Outputs) -> list[jax.Array]:
    """The rows of k and of v in a cache; codes are bytes here, because XLA converts 8-bit floats that it moves."""
    arrays = map(jnp.asarray, arrays_of(outputs))
    return by_slot(cached, [bits_of(x) if x.dtype.itemsize == 1 else x for x in arrays])


def written_agreement(cached: CachedCase, got: Outputs, want: Outputs, slots: np.ndarray) -> Agreement:
    """Compares the oracle's op and another writer with the oracle's two launches, in bits.

    Codes of written rows in 8 bits may differ: Triton's `/`, which such a writer may divide by, isn't IEEE's division.
    """
    at = written(cached, slots)
    by_outputs = (_by_slot(cached, x) for x in (got, want))
    caches = list(zip(("k_cache", "v_cache"), *by_outputs, strict=True))
    others = [(name, getattr(got, name), getattr(want, name)) for name in ("q", "k", "gate")]
    of_rows = sum((compare_bits(name, a[at], b[at]) for name, a, b in caches), start=Comparison(0, 0))
    every = sum((compare_bits(*x) for x in (*others, *caches)), start=Comparison(0, 0))
    codes = cached.cache_dtype.itemsize == 1
    return Agreement(
        elements=every.elements,
        differing=every.differing,
        promise=Promise(0, codes=COUNTED if codes else ""),
        distance=0.0,
        rotated_distance=0.0,
        kept=every.differing == (of_rows.differing if codes else 0),
        first=every.first,
    )


@jax.jit
def _relative_error(got: jax.Array, want: jax.Array) -> jax.Array:
    got, want = (x.astype(jnp.float32).reshape(-1) for x in (got, want))
    return jnp.linalg.norm(got - want) / jnp.linalg.norm(want)


def relative_error(got: jax.Array, want: jax.Array) -> float:
    """|got - want| / |want| in the norm of the whole array."""
    return float(_relative_error(got, want))
