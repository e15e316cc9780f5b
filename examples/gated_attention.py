"""Qwen3.5's gated attention layer: training, prefill and one-token decode, with weights from transformers.

python -m examples.gated_attention

Query, gate, key and value come from one packed projection, which the op takes as it is and writes out as attention
wants it. With a cache the op's kernel writes key and value there too. The gate stays where it lies: the product with
attention's output reads it there, and writes its gradient there. XLA would merge three projections of one array into
one product, whose slices are copies. Barriers keep three projections apart: see docs/porting.md and
examples/train_step.py.

B batch, S sequence, E hidden size, Hq and Hkv query and kv heads, D head_dim, R rotary_dim, L cache length.
"""

import functools
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import pallas_qk
from pallas_qk import kv_cache, rope


class Config(NamedTuple):
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    mrope_section: tuple[int, int, int] | None  # None where the model has plain positions alone
    eps: float


class Parameters(NamedTuple):
    qkv: jax.Array  # (E, (2*Hq + 2*Hkv)*D), columns [q and gate of each query head | k heads | v heads]
    q_norm: jax.Array  # (D,), one less than what the normalised query is multiplied with
    k_norm: jax.Array  # (D,)
    out: jax.Array  # (Hq*D, E)


class KVCache(NamedTuple):
    k: jax.Array  # (B, L, Hkv, D), the order of axes that cuDNN's attention takes; any dtype that the op writes
    v: jax.Array  # (B, L, Hkv, D)
    lengths: jax.Array  # (B,) int32: how many tokens each sequence has
    k_scale: jax.Array | None = None  # () or (Hkv,), of a cache in float8
    v_scale: jax.Array | None = None


# The layer


def op_options(config: Config, positions: jax.Array) -> dict[str, Any]:
    """What the op is told besides its arrays."""
    return {
        "eps": config.eps,
        "num_q_heads": config.num_q_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rotary_dim": config.rotary_dim,
        "mrope_section": config.mrope_section if positions.ndim == 3 else None,
        "norm_beta": 1.0,
        "copy_gate": "never",
    }


def project(
    parameters: Parameters, hidden: jax.Array, positions: jax.Array, cos_sin_cache: jax.Array, config: Config
) -> tuple[jax.Array, jax.Array, jax.Array, pallas_qk.Gate]:
    """hidden (B, S, E) to query (B, S, Hq, D), key and value (B, S, Hkv, D), and the gate where it lies."""
    q, k, v, gate = pallas_qk.fused_qkv_rmsnorm_rope_gate(
        hidden @ parameters.qkv,
        parameters.q_norm,
        parameters.k_norm,
        cos_sin_cache,
        positions,
        **op_options(config, positions),
    )
    batch, length, _ = hidden.shape
    return *(x.reshape(batch, length, -1, config.head_dim) for x in (q, k, v)), gate


def project_into(
    cache: KVCache,
    places: jax.Array,
    parameters: Parameters,
    hidden: jax.Array,
    positions: jax.Array,
    cos_sin_cache: jax.Array,
    config: Config,
    *,
    return_kv: bool = False,
) -> tuple[pallas_qk.CacheOutputs, KVCache]:
    """`project`, and the cache with each token at its place (B, S); place -1 is nowhere."""
    batch, length, _ = hidden.shape
    outputs = pallas_qk.fused_qkv_rmsnorm_rope_gate_cache(
        hidden @ parameters.qkv,
        parameters.q_norm,
        parameters.k_norm,
        cos_sin_cache,
        positions,
        (cache.k, cache.v),
        kv_cache.slots_of_rows(places, cache.k.shape[1]),
        **op_options(config, positions),
        k_scale=cache.k_scale,
        v_scale=cache.v_scale,
        return_kv=return_kv,
    )
    heads = {
        name: x.reshape(batch, length, -1, config.head_dim)
        for name in ("q", "k", "v")
        if (x := getattr(outputs, name)) is not None
    }
    k_cache, v_cache = outputs.kv_cache
    return outputs._replace(**heads), cache._replace(k=k_cache, v=v_cache)


def combine(parameters: Parameters, attended: jax.Array, gate: pallas_qk.Gate) -> jax.Array:
    """Attention's output (B, S, Hq, D) and the gate to (B, S, E)."""
    gated = pallas_qk.apply_gate(attended, gate)
    return gated.reshape(*gated.shape[:-2], -1) @ parameters.out


Attention = str | Callable | None  # "xla", "cudnn", a function of what `attend` takes, or what `default_attention` says


def default_attention(dtype, length: int = 0) -> str:
    """cuDNN's where it takes heads of 256: on Hopper and later, in 16 bits. JAX traces it on such a machine alone.

    Its gradients need sequences of even length. Where none are taken, leave `length` out.
    """
    device = jax.config.jax_default_device or jax.local_devices()[0]
    capability = getattr(device, "compute_capability", "0") if getattr(device, "platform", device) == "gpu" else "0"
    is_hopper = re.fullmatch(r"\d+\.\d+", capability) is not None and float(capability) >= 9.0
    return "cudnn" if is_hopper and jnp.dtype(dtype).itemsize == 2 and length % 2 == 0 else "xla"


def attend(q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None, attention: Attention) -> jax.Array:
    """Query (B, S, Hq, D), key and value (B, L, Hkv, D) to (B, S, Hq, D).

    Each query sees the first `lengths` (B,) keys of its sequence; without them, those up to its own place.
    """
    if callable(attention):
        return attention(q, k, v, lengths)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        is_causal=lengths is None,
        key_value_seq_lengths=lengths,
        implementation=attention or default_attention(q.dtype),
    )


def forward(
    parameters: Parameters,
    hidden: jax.Array,
    positions: jax.Array,
    cos_sin_cache: jax.Array,
    config: Config,
    *,
    attention: Attention = None,
) -> jax.Array:
    """The layer without a cache, as in training.

    Args:
      parameters: in the dtype of `hidden`.
      hidden: (B, S, E).
      positions: (B, S) of text or (3, B, S) of text with images, rows of time, height and width.
      cos_sin_cache: (max_pos, R), see `read_config`.
      config: sizes, known when tracing.
      attention: see `attend`.

    Returns:
      (B, S, E).
    """
    q, k, v, gate = project(parameters, hidden, positions, cos_sin_cache, config)
    return combine(parameters, attend(q, k, v, None, attention or default_attention(q.dtype, q.shape[1])), gate)


def prefill(
    parameters: Parameters,
    hidden: jax.Array,
    lengths: jax.Array,
    positions: jax.Array,
    cos_sin_cache: jax.Array,
    config: Config,
    *,
    cache_length: int,
    cache_dtype=None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    attention: Attention = None,
) -> tuple[jax.Array, KVCache]:
    """`forward` of prompts padded on the right, and the cache that decoding goes on from.

    Args:
      hidden: (B, S, E). What lies beyond a prompt's length is padding, which no token of the prompt sees.
      lengths: (B,) int32, from 1 to S. Inside a jit of yours their values aren't known: a sequence whose length is
        outside that range then has NaN outputs and a full cache, so that `decode` gives NaN for it too.
      cache_length: L, the longest sequence, prompt and answer; at least S.
      cache_dtype: of the cache; None is the dtype of `hidden`, which attention reads without a copy. float8_e4m3fn and
        float8_e5m2 need scales.
      k_scale, v_scale: float32, () or (Hkv,): what key and value are divided by in a cache of 8 bits. The prompt's own
        tokens see each other undivided.
      attention: see `attend`.

    Returns:
      (B, S, E), of no meaning for padding, and the cache.

    Raises:
      ValueError: cache_length, or a length whose value is known, breaks a rule above.
    """
    if cache_length < hidden.shape[1]:
        raise ValueError(
            f"cache_length must be at least the {hidden.shape[1]} tokens of hidden, got {cache_length}. "
            "Pass the longest sequence, prompt and answer."
        )
    rule = f"lengths must be from 1 to the {hidden.shape[1]} tokens of hidden"
    _check_known(lengths, 1, hidden.shape[1], rule, "Pass the number of each prompt's tokens without padding.")
    shape = (hidden.shape[0], cache_length, config.num_kv_heads, config.head_dim)
    dtype = jnp.dtype(cache_dtype or hidden.dtype).name
    scales = k_scale, v_scale
    return _prefill(parameters, hidden, lengths, positions, cos_sin_cache, scales, config, shape, dtype, attention)


@functools.partial(jax.jit, static_argnames=("config", "shape", "dtype", "attention"))
def _prefill(parameters, hidden, lengths, positions, cos_sin_cache, scales, config, shape, dtype, attention):
    (_, num_tokens, _), cache_length = hidden.shape, shape[1]
    fits = _are_within(lengths, 1, num_tokens)
    step = jnp.arange(num_tokens)[None]
    places = jnp.where(fits[:, None] & (step < lengths[:, None]), step, -1)
    cache = KVCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.where(fits, lengths, cache_length), *scales)
    outputs, cache = project_into(cache, places, parameters, hidden, positions, cos_sin_cache, config, return_kv=True)
    attended = attend(outputs.q, outputs.k, outputs.v, None, attention)
    return _or_nan(fits, combine(parameters, attended, outputs.gate)), cache


def decode(
    parameters: Parameters,
    hidden: jax.Array,
    positions: jax.Array,
    cos_sin_cache: jax.Array,
    config: Config,
    cache: KVCache,
    *,
    active: jax.Array | None = None,
    attention: Attention = None,
) -> tuple[jax.Array, KVCache]:
    """One more token of each sequence.

    Args:
      hidden: (B, 1, E).
      positions: (B, 1) or (3, B, 1): after images a token's position is less than its place in the cache.
      cache: with room for one token; it is given up, so that it is written in place. Outside of a jit of yours its
        lengths are read first, which waits for the step before. Inside one their values aren't known: a sequence
        without room then has NaN outputs, and its cache stays as it is and counts as full.
      active: (B,) bool; a sequence that is none keeps its cache and its length, and its outputs have no meaning. Such
        sequences need no room.
      attention: see `attend`.

    Returns:
      (B, 1, E) and the cache.

    Raises:
      ValueError: `hidden` has more than one token per sequence, or a length whose value is known leaves no room.
    """
    if hidden.shape[1] != 1:
        raise ValueError(
            f"hidden must have one token per sequence, got {hidden.shape[1]}. Prefill prompts, then decode by token."
        )
    rule = f"the lengths of cache must be from 0 to {cache.k.shape[1] - 1}, which leaves room for one more token"
    if active is not None and (active.dtype != bool or active.shape != cache.lengths.shape):
        raise ValueError(
            f"active must be bools of shape {cache.lengths.shape}, got {active.dtype} of {active.shape}. "
            "Pass whether each sequence takes the token."
        )
    known = cache.lengths if active is None else jnp.where(active, cache.lengths, 0)
    _check_known(known, 0, cache.k.shape[1] - 1, rule, "Prefill with a larger cache_length, or stop before.")
    held, scales = cache._replace(k_scale=None, v_scale=None), (cache.k_scale, cache.v_scale)
    return _decode(parameters, hidden, positions, cos_sin_cache, config, held, scales, active, attention)


@functools.partial(jax.jit, static_argnames=("config", "attention"), donate_argnames="cache")
def _decode(parameters, hidden, positions, cos_sin_cache, config, cache, scales, active, attention):
    """Scales aren't given up: several layers may share them, and k and v."""
    cache, cache_length = KVCache(*cache[:3], *scales), cache.k.shape[1]
    has_room = _are_within(cache.lengths, 0, cache_length - 1)
    lengths = jnp.where(has_room, cache.lengths + 1, cache_length)
    if active is not None:
        lengths = jnp.where(active, lengths, cache.lengths)
        has_room = has_room | ~active
    places = jnp.where(lengths > cache.lengths, cache.lengths, -1)[:, None]
    outputs, cache = project_into(
        cache._replace(lengths=lengths), places, parameters, hidden, positions, cos_sin_cache, config
    )
    k, v = cache.k, cache.v
    if k.dtype != hidden.dtype:  # attention takes one dtype, and no codes of 8 bits
        k, v = kv_cache.read((k, v), hidden.dtype, k_scale=cache.k_scale, v_scale=cache.v_scale)
    attended = attend(outputs.q, k, v, lengths, attention)
    return _or_nan(has_room, combine(parameters, attended, outputs.gate)), cache


def _check_known(lengths: jax.Array, least: int, most: int, rule: str, remedy: str) -> None:
    if not isinstance(lengths, jax.core.Tracer):
        known = np.asarray(lengths)
        if not _are_within(known, least, most).all():
            raise ValueError(f"{rule}, got {known.tolist()}. {remedy}")


def _are_within(lengths, least: int, most: int):
    return (lengths >= least) & (lengths <= most)


def _or_nan(keep: jax.Array, outputs: jax.Array) -> jax.Array:
    """(B, S, E), NaN in the sequences that (B,) doesn't keep."""
    return jnp.where(keep[:, None, None], outputs, jnp.nan)


# Weights and configurations of transformers


def read_config(text_config: Mapping[str, Any], *, max_position: int, dtype) -> tuple[Config, jax.Array]:
    """Sizes and the table of cosines and sines, of a checkpoint of Qwen3.5 or Qwen3-Next.

    Args:
      text_config: `text_config` of config.json, or all of it where there is none, as in Qwen3-Next. The dict of RoPE
        may be called rope_parameters or rope_scaling, and its values may stand outside of it; the dict's own count
        where both are there. What is left out is what
        transformers' classes take: head_dim 256, rms_norm_eps 1e-6, partial_rotary_factor 0.25, rope_theta 1e4 and,
        for a model_type of Qwen3.5, mrope_section (11, 11, 10).
      max_position: rows of the table; for dynamic and longrope also the longest sequence.
      dtype: of the table.

    Returns:
      The sizes, with mrope_section None for plain positions alone, and the table (max_position, R).

    Raises:
      ValueError: a number of heads is missing, or `rope.inv_frequencies` refuses what the configuration says.
    """
    for name in ("num_attention_heads", "num_key_value_heads"):
        if text_config.get(name) is None:
            raise ValueError(
                f"text_config must have {name}, got {sorted(text_config)}. "
                "Pass config.json's text_config, or all of config.json where it has none."
            )
    given = {name: value for name, value in text_config.items() if value is not None}
    parameters = given.get("rope_scaling") or given.get("rope_parameters") or {}
    beside = {name: given.get(name) for name in ("max_position_embeddings", "original_max_position_embeddings")}
    for name, default in (("rope_theta", 1e4), ("partial_rotary_factor", 0.25)):
        beside[name] = None if parameters.get(name) is not None else given.get(name, default)
    head_dim = given.get("head_dim", 256)
    inv_freq, attention_factor = rope.inv_frequencies(
        parameters, head_dim=head_dim, sequence_length=max_position, **beside
    )
    is_qwen3_5 = given.get("model_type", "").startswith("qwen3_5")
    section = parameters.get("mrope_section") or ((11, 11, 10) if is_qwen3_5 else None)
    config = Config(
        num_q_heads=given["num_attention_heads"],
        num_kv_heads=given["num_key_value_heads"],
        head_dim=head_dim,
        rotary_dim=2 * len(inv_freq),
        mrope_section=section and tuple(section),
        eps=given.get("rms_norm_eps", 1e-6),
    )
    return config, rope.cos_sin_cache(inv_freq, attention_factor, max_position=max_position, dtype=dtype)


def pack(weights: Mapping[str, np.ndarray], config: Config) -> Parameters:
    """Parameters on JAX's default device, from weights under transformers' names ("q_proj.weight" and so on)."""
    expected = {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight", "q_norm.weight", "k_norm.weight"}
    if set(weights) != expected:
        raise ValueError(
            f"weights must be {sorted(expected)}, got {sorted(weights)}. "
            "Pass those of one full-attention layer; biases aren't supported."
        )
    rows = [2 * config.num_q_heads * config.head_dim, *[config.num_kv_heads * config.head_dim] * 2]
    projections = [weights[f"{name}_proj.weight"] for name in "qkv"]
    if [x.shape[0] for x in projections] != rows:
        raise ValueError(
            f"q_proj, k_proj and v_proj must have {rows} rows for {config}, got {[x.shape[0] for x in projections]}. "
            "Read the config of the same checkpoint."
        )
    return Parameters(
        qkv=jnp.array(np.concatenate(projections).T),
        q_norm=jnp.array(weights["q_norm.weight"]),
        k_norm=jnp.array(weights["k_norm.weight"]),
        out=jnp.array(weights["o_proj.weight"].T),
    )


def from_state_dict(state_dict: Mapping[str, Any], config: Config) -> Parameters:
    """Parameters from the `state_dict()` of a transformers `Qwen3_5Attention`: copies of its torch tensors."""
    return pack({name: np.asarray(pallas_qk.dlpack.from_torch(x)) for name, x in state_dict.items()}, config)


def from_safetensors(path: pathlib.Path, layer: int, config: Config) -> Parameters:
    """Parameters of one layer from a checkpoint: a .safetensors file, or a folder of them.

    Reads the names `model.layers.N.self_attn.…` of text models and `model.language_model.layers.N.self_attn.…` of
    models with images, and of the files nothing else.
    """
    import safetensors

    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    wanted = re.compile(rf"model\.(?:language_model\.)?layers\.{layer}\.self_attn\.(.+)")
    weights = {}
    for file in files:
        with safetensors.safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - it isn't a dict
                if found := wanted.fullmatch(name):
                    weights[found[1]] = tensors.get_tensor(name)
    return pack(weights, config)


# The example

TEXT_CONFIG = {
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2]},
}


def random_parameters(key: jax.Array, hidden_size: int, config: Config, dtype) -> Parameters:
    keys = jax.random.split(key, 4)
    columns = 2 * (config.num_q_heads + config.num_kv_heads) * config.head_dim
    rows = config.num_q_heads * config.head_dim
    return Parameters(
        qkv=jax.random.normal(keys[0], (hidden_size, columns), dtype) / hidden_size**0.5,
        q_norm=jax.random.normal(keys[1], (config.head_dim,), dtype) / 8,
        k_norm=jax.random.normal(keys[2], (config.head_dim,), dtype) / 8,
        out=jax.random.normal(keys[3], (rows, hidden_size), dtype) / rows**0.5,
    )


def main() -> None:
    """Prompts of several lengths, one with an image; the last ANSWER tokens of each are decoded one by one."""
    answer, hidden_size, dtype = 4, 256, jnp.float32
    config, cos_sin_cache = read_config(TEXT_CONFIG, max_position=128, dtype=dtype)
    key, hidden_key = jax.random.split(jax.random.key(0))
    parameters = random_parameters(key, hidden_size, config, dtype)

    each = [rope.mrope_positions(segments)[0] for segments in ([29], [5, (1, 4, 6), 8], [12])]
    lengths = np.array([x.shape[1] for x in each])
    positions = np.stack([np.pad(x, ((0, 0), (0, lengths.max() - x.shape[1]))) for x in each], axis=1)
    hidden = jax.random.normal(hidden_key, (len(each), lengths.max(), hidden_size), dtype)
    whole = forward(parameters, hidden, jnp.asarray(positions), cos_sin_cache, config)

    prompts = lengths - answer
    outputs, cache = prefill(
        parameters,
        hidden,
        jnp.asarray(prompts, jnp.int32),
        jnp.asarray(positions),
        cos_sin_cache,
        config,
        cache_length=40,
    )
    # NumPy's maximum keeps a NaN. XLA's may drop it on a CPU.
    error = max(np.abs(np.asarray(outputs[i, :n] - whole[i, :n])).max() for i, n in enumerate(prompts))
    print(f"prefill of {prompts.tolist()} tokens: within {error:.1e} of the whole sequences")
    sequences = np.arange(len(each))
    for at in np.arange(answer)[:, None] + prompts:
        token_positions = jnp.asarray(positions[:, sequences, at][..., None])
        token, cache = decode(parameters, hidden[sequences, at][:, None], token_positions, cos_sin_cache, config, cache)
        error = np.abs(np.asarray(token[:, 0] - whole[sequences, at])).max()
        print(f"decoded the tokens at {at.tolist()}: within {error:.1e} of the whole sequences")


if __name__ == "__main__":
    main()
