"""The checks of what the ops are given: before any array work, from shapes, dtypes and static values alone."""

import functools
import math
import numbers
import operator
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from pallas_qk._operands import Inputs

DTYPES = ("float16", "bfloat16", "float32")  # of activations, weights and tables, each for itself
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
MROPE_LAYOUTS = ("interleaved", "sectioned")
_LARGEST = float(np.finfo(np.float32).max)  # the op computes in float32


@functools.cache
def _first_process() -> int:
    """The process in which the op was called first: not set at import, which may come before a fork."""
    return os.getpid()


def check_process() -> None:
    """Refuses a fork of a process in which JAX runs: its threads and GPU contexts stay behind; a call would hang."""
    if _first_process() != os.getpid():
        raise RuntimeError(
            f"the op must not run in a fork of a process that has called it, got process {os.getpid()} forked from "
            f"{_first_process()}. Start workers with multiprocessing.get_context('spawn')."
        )


def check_sizes(num_q_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int) -> tuple[int, ...]:
    """The four sizes as Python ints."""
    sizes = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    for name, value in (sizes | {"rotary_dim": rotary_dim}).items():
        if not _is_integer(value):
            raise TypeError(f"{name} must be an integer known when tracing, got {_describe(value)}. Pass a Python int.")
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}. Pass the number that this device's arrays hold.")
    if rotary_dim % 2 or not 0 < rotary_dim <= head_dim:
        raise ValueError(
            "rotary_dim must be a positive even integer <= head_dim, "  # the original's words
            f"got rotary_dim={rotary_dim}, head_dim={head_dim}. "
            "For a config with a partial_rotary_factor, pass int(partial_rotary_factor * head_dim)."
        )
    return tuple(map(operator.index, (num_q_heads, num_kv_heads, head_dim, rotary_dim)))


def check_num_tokens(num_tokens: int) -> int:
    if not _is_integer(num_tokens):
        raise TypeError(f"num_tokens must be an integer, got {_describe(num_tokens)}. Pass a Python int.")
    if num_tokens < 0:
        raise ValueError(f"num_tokens must be at least 0, got {num_tokens}. Pass the size of the tokens' axis.")
    return operator.index(num_tokens)


def check_dtype(name: str, dtype) -> str:
    """The name of a dtype of activations, weights or tables."""
    try:
        found = str(jnp.dtype(dtype))
    except TypeError:
        found = _describe(dtype)
    _check_dtype_name(name, found)
    return found


def _check_dtype_name(name: str, found: str) -> None:
    if found not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16 or float32, got {found}. Cast it with astype.")


def check_platform(platform: str | None) -> None:
    if platform is not None and not _is_one_of(PLATFORMS, platform):
        names = ", ".join(repr(name) for name in PLATFORMS)
        raise ValueError(
            f"platform must be None or one of {names}, got {platform!r}. None means the default device's platform."
        )


def check_eps(eps: float) -> float:
    """`eps` as a Python float."""
    _check_real("eps", eps)
    if not 0 <= eps <= _LARGEST:
        raise ValueError(
            f"eps must be a finite float32 of at least 0, got {eps}. Model configs call it rms_norm_eps and the like."
        )
    return float(eps)


def check_norm_beta(norm_beta: float) -> float:
    """`norm_beta` as a Python float."""
    _check_real("norm_beta", norm_beta)
    if not abs(norm_beta) <= _LARGEST:
        raise ValueError(
            f"norm_beta must be a finite float32, got {norm_beta}. "
            "Pass 1.0 for weights stored minus one (Gemma, Qwen3.5), else 0.0."
        )
    return float(norm_beta) + 0.0  # without a -0.0, whose sum with a weight of -0.0 would be another


def _check_real(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(
            f"{name} must be a real number known when tracing, got {_describe(value)}. "
            "Pass a Python float, and mark it static (static_argnames) in a jit of your own."
        )


def check_mrope_section(mrope_section, rotary_dim: int) -> tuple[int, int, int] | None:
    """None, or the section as a tuple of three ints."""
    if mrope_section is None:
        return None
    rule = f"mrope_section must be three integers >= 0 that sum to rotary_dim // 2 = {rotary_dim // 2}"
    remedy = "Pass the counts of time, height and width frequencies, such as (11, 11, 10) for rotary_dim=64."
    if not isinstance(mrope_section, list | tuple) or not all(_is_integer(n) for n in mrope_section):
        raise TypeError(f"{rule}, got {_describe(mrope_section)}. {remedy}")
    section = tuple(operator.index(n) for n in mrope_section)
    if len(section) != 3 or min(section) < 0 or sum(section) != rotary_dim // 2:
        raise ValueError(f"{rule}, got {section}. {remedy}")
    return section


def check_mrope_layout(mrope_layout: str) -> str:
    if not _is_one_of(MROPE_LAYOUTS, mrope_layout):
        names = " or ".join(map(repr, MROPE_LAYOUTS))
        raise ValueError(
            f"mrope_layout must be {names}, got {mrope_layout!r}. "
            "Pass 'interleaved' for Qwen3-VL and Qwen3.5, 'sectioned' for Qwen2-VL and Qwen2.5-VL."
        )
    return mrope_layout


def check_copy_gate(copy_gate: bool) -> bool:
    if not isinstance(copy_gate, bool):
        raise TypeError(
            f"copy_gate must be a bool known when tracing, got {_describe(copy_gate)}. "
            "Pass False to leave the gate where it lies, for XLA to fuse into what reads it."
        )
    return copy_gate


def check_implementation(implementation: str | None, known: tuple[str, ...]) -> None:
    if implementation is not None and not _is_one_of(known, implementation):
        names = ", ".join(repr(name) for name in known)
        raise ValueError(
            f"implementation must be None or one of {names}, got {implementation!r}. None picks the first that runs."
        )


def unboxed(x):
    """The array in a box that gives it by `__jax_array__`, as modules hold their parameters."""
    while not isinstance(x, jax.Array | np.ndarray) and hasattr(x, "__jax_array__"):
        x = x.__jax_array__()
    return x


def _check_array(name: str, array) -> None:
    """Refuses what is no array, and an array that is more than its values: masked, reduced over a mesh, on the host."""
    if not isinstance(array, jax.Array | np.ndarray) or isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name} must be a JAX or NumPy array, got {_describe(array)}. {_conversion(array)}")
    if not getattr(array.dtype, "isnative", True):  # JAX's own dtypes, such as that of keys, have no byte order
        got = array.dtype.str
        raise TypeError(f"{name} must have this machine's byte order, got {got}. Convert it with astype.")
    if not isinstance(array, jax.Array):
        return
    type_ = jax.typeof(array)
    spec, manual = type_.sharding.spec, type_.manual_axis_type
    if spec.reduced | spec.unreduced | manual.reduced | manual.unreduced:
        raise ValueError(
            f"{name} must be neither reduced nor unreduced over mesh axes, got {type_.str_short()}. "
            "Pass it through jax.sharding.reshard before, or in shard_map through jax.lax.pcast or, unreduced, psum."
        )
    if type_.memory_space == jax.memory.Space.Host:
        raise ValueError(
            f"{name} must lie in device memory, got {type_.str_short()}. "
            "Move it with jax.device_put(array, jax.memory.Space.Device)."
        )


def _conversion(value) -> str:
    if isinstance(value, np.ma.MaskedArray):
        return "Pass its filled()."
    if isinstance(value, jax.Ref):
        return "Read it with [...]."
    convert = "pallas_qk.dlpack.from_torch" if type(value).__module__.startswith("torch") else "jnp.asarray"
    return f"Convert it with {convert}."


def check_arrays(
    q_name: str,
    inputs: Inputs,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    gates: bool,
    mrope: bool,
) -> bool:
    """Whether heads have an axis of their own. `q_name` is "q_gate", "q" or "qkv", which holds k too."""
    packed, width = q_name == "qkv", 2 * head_dim if gates else head_dim
    arrays = {q_name: inputs.q} | {name: x for name, x in inputs._asdict().items() if name != "q"}
    if packed:
        del arrays["k"]
    if inputs.positions is None:
        del arrays["positions"]
        if mrope:
            raise ValueError(
                "positions must be given with mrope_section, got None. "
                "Pass them, or pass mrope_section to pallas_qk.rope.cos_sin_rows and its rows here without it."
            )
    for name, array in arrays.items():
        _check_array(name, array)

    dtype = inputs.q.dtype
    _check_dtype_name(q_name, str(dtype))
    if not packed and inputs.k.dtype != dtype:
        raise TypeError(f"k must have the dtype of {q_name}, {dtype}, got {inputs.k.dtype}. Cast one to the other.")
    for name in ("q_weight", "k_weight", "cos_sin_cache"):
        _check_dtype_name(name, str(arrays[name].dtype))
    if inputs.positions is not None:
        _check_positions_dtype(inputs.positions.dtype)

    if packed:
        size = num_q_heads * width + 2 * num_kv_heads * head_dim
        sizes, parts, other = (
            ("2 * head_dim", "q and gate of each head", "fused_qkv_rmsnorm_rope takes qkv without gates")
            if gates
            else ("head_dim", "q", "fused_qkv_rmsnorm_rope_gate takes qkv with gates")
        )
        sizes = f"num_q_heads * {sizes} + 2 * num_kv_heads * head_dim, [{parts} | k | v]; {other}"
        _check_trailing("qkv", inputs.q, [(size,)], sizes)
        lead, split = inputs.q.shape[:-1], False
    else:
        lead, split = _check_q(q_name, inputs, num_q_heads, width, mrope)
        k_shape, k_sizes = (
            ((num_kv_heads, head_dim), "num_kv_heads, head_dim")
            if split
            else (
                (num_kv_heads * head_dim,),
                "num_kv_heads * head_dim",
            )
        )
        _check_shape("k", inputs.k, (*lead, *k_shape), f"the leading axes of {q_name}, then {k_sizes}")
    _check_shape("q_weight", inputs.q_weight, (head_dim,), "head_dim")
    _check_shape("k_weight", inputs.k_weight, (head_dim,), "head_dim")
    leading = f"the leading axes of {q_name}"
    if inputs.positions is None:
        hint = f"{leading}, then rotary_dim; without positions the table has the row of each token"
        _check_shape("cos_sin_cache", inputs.cos_sin_cache, (*lead, rotary_dim), hint)
        return split
    hint = "rotary_dim, each row [cos | sin]"
    _check_shape("cos_sin_cache", inputs.cos_sin_cache, ("max_position", rotary_dim), hint)
    if inputs.cos_sin_cache.shape[0] < 1:
        got = inputs.cos_sin_cache.shape
        raise ValueError(f"cos_sin_cache must have at least one row, got shape {got}. Build it for max_position >= 1.")
    if mrope:
        hint = f"one row each for time, height and width, then {leading}; leave mrope_section out for a single row"
        _check_shape("positions", inputs.positions, (3, *lead), hint)
    else:
        _check_shape("positions", inputs.positions, lead, f"{leading}; three rows of positions need mrope_section")
    return split


def _check_positions_dtype(dtype) -> None:
    if jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"positions must be integers, got {dtype}. Cast whole numbers with astype(jnp.int32); of fractions pass "
            "the rows of pallas_qk.rope.cos_sin_rows as cos_sin_cache, and positions=None."
        )
    if not jnp.issubdtype(dtype, jnp.integer) or dtype.kind == "m":  # NumPy counts times among the integers
        raise TypeError(f"positions must be integers, got {dtype}. Cast them with astype(jnp.int32).")


def _check_q(name: str, inputs: Inputs, num_heads: int, width: int, mrope: bool) -> tuple[tuple[int, ...], bool]:
    """The leading axes, and whether heads have an axis of their own.

    A single head fits both readings of (..., 1, width); the number of axes of the positions, or of a gathered table,
    then tells the leading ones.
    """
    q, flat, split = inputs.q, (num_heads * width,), (num_heads, width)
    sizes, other = {
        "q_gate": ("num_q_heads, 2 * head_dim", "fused_qk_rmsnorm_rope takes q without gates"),
        "q": ("num_q_heads, head_dim", "fused_qk_rmsnorm_rope_gate takes q with gates"),
    }[name]
    _check_trailing(name, q, [flat, split], f"{sizes}, as one axis or two; {other}")
    fits_flat, fits_split = q.shape[-1:] == flat, q.shape[-2:] == split
    if fits_flat and fits_split:
        table = inputs.positions is None
        num_lead = inputs.cos_sin_cache.ndim - 1 if table else inputs.positions.ndim - mrope
        fits_split = num_lead == q.ndim - 2
    return q.shape[: -2 if fits_split else -1], fits_split


def _check_trailing(name: str, array, trailing: list[tuple[int, ...]], remedy: str) -> None:
    if not any(array.shape[-len(shape) :] == shape for shape in trailing):
        shapes = " or ".join(f"(..., {', '.join(map(str, shape))})" for shape in trailing)
        raise ValueError(f"{name} must have shape {shapes}, got {tuple(array.shape)}. Its sizes: {remedy}.")


def _check_shape(name: str, array, shape: tuple[int | str, ...], remedy: str) -> None:
    matches = array.ndim == len(shape) and all(
        isinstance(want, str) or got == want for got, want in zip(array.shape, shape, strict=True)
    )
    if not matches:
        inner = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{name} must have shape ({inner}), got {tuple(array.shape)}. Its sizes: {remedy}.")


def check_whole_heads(name: str, num_heads: int, num_shards: int) -> None:
    """Refuses heads that are cut across devices. `name` is "q_gate", "q" or "k"."""
    if num_heads % num_shards:
        heads = "num_kv_heads" if name == "k" else "num_q_heads"
        raise ValueError(
            f"{name} must hold whole heads on each device, got {heads}={num_heads} over {num_shards} devices. "
            f"Shard its last axis over a number of devices that divides {num_heads}, or leave it replicated there."
        )


def check_known_sharding(name: str, x: jax.Array | np.ndarray, num_heads: int, split: bool) -> None:
    """Refuses heads cut across devices where a sharding is known: of arrays, in explicit meshes.

    `split` says that heads have an axis of their own.
    """
    num_shards = _num_shards_of_last_axis(x)
    if split and num_shards > 1:
        raise ValueError(
            f"{name} must hold whole heads on each device, got head_dim over {num_shards} devices. "
            "Shard the axis of heads instead, or leave it replicated there."
        )
    if not split:
        check_whole_heads(name, num_heads, num_shards)


def check_packed_sharding(qkv: jax.Array | np.ndarray, *, gates: bool) -> None:
    """Refuses a packed axis cut across devices, likewise."""
    if (num_shards := _num_shards_of_last_axis(qkv)) > 1:
        instead = "q_gate and k to fused_qk_rmsnorm_rope_gate" if gates else "q and k to fused_qk_rmsnorm_rope"
        raise ValueError(
            f"qkv must hold its last axis whole on each device, got it over {num_shards} devices: its parts don't end "
            f"where shards do. Shard its leading axes, pass {instead}, or call inside jax.shard_map with each device's "
            "heads packed for it."
        )


def _num_shards_of_last_axis(x: jax.Array | np.ndarray) -> int:
    sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    if isinstance(sharding, NamedSharding) and len(sharding.spec) == x.ndim and (axes := sharding.spec[-1]):
        axes = (axes,) if isinstance(axes, str) else axes
        return math.prod(sharding.mesh.shape[axis] for axis in axes)
    return 1


def check_manual_axes(mesh: jax.sharding.AbstractMesh) -> None:
    """Refuses a shard_map that leaves axes to the compiler, which gives us no part of such a mesh to partition."""
    left = tuple(axis for axis in mesh.axis_names if axis not in mesh.manual_axes and mesh.shape[axis] > 1)
    if left:
        raise NotImplementedError(
            f"inside shard_map every axis of the mesh must be manual, got axes {left} that are not. "
            "Leave its axis_names out, or call the op in a second shard_map over these axes."
        )


def check_partitioner(num_devices: int, *, exported: bool) -> None:
    """Refuses several devices where the compiler can't ask us how to partition the op."""
    if num_devices > 1 and exported:
        raise NotImplementedError(
            f"jax.export for several devices needs the op inside jax.shard_map, got {num_devices} devices outside one. "
            "Put it there: elsewhere the compiler asks Python how to partition it, which an exported program can't."
        )
    if num_devices > 1 and not jax.config.jax_use_shardy_partitioner:  # type: ignore[attr-defined]
        raise NotImplementedError(
            f"the op over several devices needs the Shardy partitioner, got {num_devices} devices and "
            "jax_use_shardy_partitioner=False. Leave it on, as JAX does, or put the op inside jax.shard_map."
        )


def canonical_positions(positions: jax.Array | np.ndarray) -> jax.Array | np.ndarray:
    """Keeps NumPy's 64-bit positions negative, or past every table, where JAX would narrow them to 32 bits."""
    if isinstance(positions, np.ndarray) and positions.dtype.itemsize == 8 and not jax.config.read("jax_enable_x64"):
        at_most = np.minimum(positions, 2**31 - 1).astype(np.int64)  # of unsigned ones, too
        return np.maximum(at_most, -1).astype(np.int32)
    return positions


def _is_one_of(names: tuple[str, ...], value) -> bool:
    return isinstance(value, str) and value in names  # an array is compared element by element


def _is_integer(value) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _describe(value) -> str:
    """What an error says of a value that it can't take; never reads a device."""
    if isinstance(value, jax.core.Tracer):
        return f"a traced value {value.aval.str_short()}"
    kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"a {kind} of shape {tuple(value.shape)} and dtype {value.dtype}"
    return f"{value!r:.80} of type {kind}"
