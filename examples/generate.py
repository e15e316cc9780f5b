"""A small decoder of gated attention layers: it is trained, and then generates with KV caches in one jitted function.

python -m examples.generate

`load` reads a checkpoint of Qwen3 as transformers writes it. Its layers have no gates; `Config` says so, and the code
is shared. Qwen3.5 and Qwen3-Next have layers of linear attention between their gated ones. Those are left out here, so
their checkpoints aren't read; examples/gated_attention.py reads a gated layer of one.

In training each layer runs under `jax.checkpoint`. The op's forward runs again in the backward, but for policies that
save all of its results, such as save_only_these_names("q", "k", "v", "gate"): docs/generate.md has a table.

B batch, S tokens, L cache length, E hidden size, F width of the MLP, V vocabulary, Hq and Hkv query and kv heads,
D head_dim, R rotary_dim.
"""

import functools
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from tqdm import tqdm

import pallas_qk
from examples.gated_attention import Attention, attend, read_config
from examples.train_step import adam
from pallas_qk import kv_cache, rope


class Config(NamedTuple):
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    eps: float
    gated: bool  # each query has a gate, packed behind it, as in Qwen3.5; Qwen3 has none
    norm_beta: float  # added to the weights of every norm: 1 in Qwen3.5, 0 in Qwen3


class Layer(NamedTuple):
    attention_norm: jax.Array  # (E,)
    qkv: jax.Array  # (E, (2*Hq + 2*Hkv)*D), or (E, (Hq + 2*Hkv)*D) without gates
    q_norm: jax.Array  # (D,)
    k_norm: jax.Array  # (D,)
    out: jax.Array  # (Hq*D, E)
    mlp_norm: jax.Array  # (E,)
    mlp_gate: jax.Array  # (E, F)
    mlp_up: jax.Array  # (E, F)
    mlp_down: jax.Array  # (F, E)


class Parameters(NamedTuple):
    embedding: jax.Array  # (V, E)
    layers: tuple[Layer, ...]
    norm: jax.Array  # (E,)
    head: jax.Array | None  # (E, V); None where the embedding gives the logits too


class Cache(NamedTuple):
    """What one layer keeps of the tokens so far."""

    k: jax.Array  # (B, L, Hkv, D)
    v: jax.Array  # (B, L, Hkv, D)
    k_scale: jax.Array | None = None  # () or (Hkv,), of a cache of 8 bits
    v_scale: jax.Array | None = None


# The model


def decoder(
    parameters: Parameters,
    tokens: jax.Array,
    places: jax.Array,
    table: jax.Array,
    config: Config,
    caches: Sequence[Cache] | None = None,
    lengths: jax.Array | None = None,
    *,
    attention: Attention = None,
    policy: Callable | None = None,
) -> tuple[jax.Array, tuple[Cache, ...]]:
    """Tokens (B, S) at places (B, S) of their sequences to (B, S, E), before the last norm, and the caches with them.

    Without `lengths` each token sees those up to its own in `tokens`. With them it sees the first `lengths` (B,) in the
    caches. A token at place -1 is padding and is written nowhere. `policy` is that of `jax.checkpoint`, which rules
    what is kept for the backward where there are no caches.
    """
    hidden = parameters.embedding[tokens]
    settings = {"places": places, "table": table, "config": config, "attention": attention}
    if caches is None:
        checkpointed = jax.checkpoint(functools.partial(decoder_layer, **settings), policy=policy)
        for layer in parameters.layers:
            hidden, _ = checkpointed(layer, hidden)
        return hidden, ()
    slots = kv_cache.slots_of_rows(places, caches[0].k.shape[1])
    written = []
    # A scan over stacked caches would compile one layer for all, but attention would read a slice: a copy of the cache.
    for layer, cache in zip(parameters.layers, caches, strict=True):
        hidden, cache = decoder_layer(layer, hidden, cache, slots, lengths, **settings)
        written.append(cache)
    return hidden, tuple(written)


def decoder_layer(layer: Layer, hidden, cache=None, slots=None, lengths=None, *, places, table, config, attention):
    """hidden (B, S, E) to (B, S, E), and the cache; the other arguments are those of `decoder`."""
    normed = rms_norm(hidden, layer.attention_norm, config)
    arrays = normed @ layer.qkv, layer.q_norm, layer.k_norm, table, places  # places are positions: this is text
    q, k, v, gate, cache = prepare(arrays, cache, slots, lengths, config)
    q, k, v = (x.reshape(*x.shape[:2], -1, config.head_dim) for x in (q, k, v))
    attended = attend(q, k, v, lengths, attention).reshape(*hidden.shape[:2], -1)
    if gate is not None:
        attended = attended * jax.nn.sigmoid(gate.astype(jnp.float32)).astype(gate.dtype)
    hidden = hidden + attended @ layer.out
    normed = rms_norm(hidden, layer.mlp_norm, config)
    return hidden + (jax.nn.silu(normed @ layer.mlp_gate) * (normed @ layer.mlp_up)) @ layer.mlp_down, cache


def prepare(arrays: tuple[jax.Array, ...], cache: Cache | None, slots, lengths, config: Config):
    """The query, the keys and values that attention reads, the raw gate or None, and the cache or None."""
    options = {name: value for name, value in config._asdict().items() if name != "gated"}
    if config.gated:
        options["copy_gate"] = False
    if cache is None:
        op = pallas_qk.fused_qkv_rmsnorm_rope_gate if config.gated else pallas_qk.fused_qkv_rmsnorm_rope
        outputs = dict(zip(("q", "k", "v", "gate"), op(*arrays, **options), strict=False))
        outputs = {name: checkpoint_name(x, name) for name, x in outputs.items()}
        return outputs["q"], outputs["k"], outputs["v"], outputs.get("gate"), None
    op = pallas_qk.fused_qkv_rmsnorm_rope_gate_cache if config.gated else pallas_qk.fused_qkv_rmsnorm_rope_cache
    scales = {"k_scale": cache.k_scale, "v_scale": cache.v_scale}
    outputs = op(*arrays, (cache.k, cache.v), slots, **options, **scales, return_kv=lengths is None)
    k, v, cache = outputs.k, outputs.v, cache._replace(k=outputs.kv_cache[0], v=outputs.kv_cache[1])
    if lengths is not None:
        k, v = kv_cache.read((cache.k, cache.v), outputs.q.dtype, **scales)
    return outputs.q, k, v, outputs.gate, cache


def rms_norm(x: jax.Array, weight: jax.Array, config: Config) -> jax.Array:
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + config.eps)
    return (normed * jnp.broadcast_to(weight.astype(jnp.float32) + config.norm_beta, x.shape)).astype(x.dtype)


def logits_of(parameters: Parameters, hidden: jax.Array, config: Config) -> jax.Array:
    """Logits in float32 from what `decoder` gives."""
    head = parameters.embedding.T if parameters.head is None else parameters.head
    return jnp.matmul(rms_norm(hidden, parameters.norm, config), head, preferred_element_type=jnp.float32)


def forward(parameters: Parameters, tokens: jax.Array, table: jax.Array, config: Config, **options) -> jax.Array:
    """Logits (B, S, V) of tokens (B, S), without a cache; `options` are those of `decoder`."""
    places = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 1)
    hidden, _ = decoder(parameters, tokens, places, table, config, **options)
    return logits_of(parameters, hidden, config)


# Generation


class State(NamedTuple):
    caches: tuple[Cache, ...]
    tokens: jax.Array  # (B, L): prompt, answer, zeros
    lengths: jax.Array  # (B,) int32: of prompt and answer; the caches hold all of them but the last
    active: jax.Array  # (B,) bool: False from the stop token on
    step: jax.Array  # () int32: tokens of the longest answer
    key: jax.Array


def empty_caches(
    parameters: Parameters,
    config: Config,
    *,
    batch: int,
    length: int,
    dtype=None,
    scales: Sequence[tuple[jax.Array, jax.Array]] | None = None,
) -> tuple[Cache, ...]:
    """A cache for each layer, in the dtype of the parameters or in another; `scales` are those of `scales_of`."""
    shape = batch, length, config.num_kv_heads, config.head_dim
    dtype = dtype or parameters.embedding.dtype
    of_layers = scales or [()] * len(parameters.layers)
    # Copies of the scales, for caches are given up to the functions that write them.
    return tuple(Cache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *map(jnp.array, x)) for x in of_layers)


def scales_of(caches: Sequence[Cache], dtype) -> tuple[tuple[jax.Array, jax.Array], ...]:
    """Scales (Hkv,) of each layer's k and v for caches of 8 bits, from what wider ones hold after `start`.

    The largest element of each head becomes the largest number of `dtype`. An element that is larger later is cut off.
    """
    most = float(jnp.finfo(dtype).max)
    return tuple(
        tuple(jnp.max(jnp.abs(x.astype(jnp.float32)), axis=(0, 1, 3)) / most for x in (cache.k, cache.v))
        for cache in caches
    )


@functools.partial(jax.jit, static_argnames=("config", "top_k", "attention"), donate_argnames="caches")
def generate(
    parameters: Parameters,
    prompts: jax.Array,
    lengths: jax.Array,
    caches: tuple[Cache, ...],
    table: jax.Array,
    config: Config,
    *,
    top_k: int = 1,
    temperature: float | jax.Array = 1.0,
    stop: int | jax.Array = -1,
    key: jax.Array | None = None,
    attention: Attention = None,
) -> State:
    """Answers to prompts, in one program: `start`, then `advance` until every answer has ended or has L - S tokens.

    Args:
      parameters: in the dtype of the activations.
      prompts: (B, S) int32, padded on the right.
      lengths: (B,) int32, those of the prompts, from 1 to S. A sequence of any other length gets no answer.
      caches: see `empty_caches`; they are given up, so that they are written in place.
      table: (max_position, R), with at least L rows.
      config: sizes, known when tracing.
      top_k: the next token is drawn from so many of the likeliest, 1 being greedy; known when tracing.
      temperature: what their logits are divided by before.
      stop: the token that ends an answer, and is its last. -1 is none.
      key: of the draws; needed for a top_k above 1.
      attention: see `examples.gated_attention.attend`.

    Returns:
      A `State`. Its `tokens` (B, L) hold each answer right after its prompt, `lengths` (B,) count both.

    Raises:
      ValueError: an argument breaks a rule above.
    """
    options = {"top_k": top_k, "temperature": temperature, "stop": stop, "attention": attention}
    state = start(parameters, prompts, lengths, caches, table, config, key=key, **options)
    return advance(parameters, state, table, config, until=state.tokens.shape[1] - prompts.shape[1], **options)


@functools.partial(jax.jit, static_argnames=("config", "top_k", "attention"), donate_argnames="caches")
def start(
    parameters: Parameters,
    prompts: jax.Array,
    lengths: jax.Array,
    caches: tuple[Cache, ...],
    table: jax.Array,
    config: Config,
    *,
    top_k: int = 1,
    temperature: float | jax.Array = 1.0,
    stop: int | jax.Array = -1,
    key: jax.Array | None = None,
    attention: Attention = None,
) -> State:
    """Reads prompts and chooses the first token of each answer; the arguments are those of `generate`.

    Tokens of a prompt see each other as they are, also where the cache has 8 bits.
    """
    (_, width), length = prompts.shape, caches[0].k.shape[1]
    _check(width, length, len(table), top_k, key)
    step = jax.lax.broadcasted_iota(jnp.int32, prompts.shape, 1)
    is_prompt = step < lengths[:, None]
    places = jnp.where(is_prompt, step, -1)
    hidden, caches = decoder(parameters, prompts, places, table, config, caches, attention=attention)
    last = jnp.take_along_axis(hidden, lengths[:, None, None] - 1, axis=1)
    tokens = jnp.pad(jnp.where(is_prompt, prompts, 0), ((0, 0), (0, length - width)))
    active = (lengths >= 1) & (lengths <= width)
    state = State(caches, tokens, lengths, active, jnp.int32(0), jax.random.key(0) if key is None else key)
    return _with_next(state, logits_of(parameters, last, config)[:, 0], top_k, temperature, stop)


@functools.partial(jax.jit, static_argnames=("config", "top_k", "attention"), donate_argnames="state")
def advance(
    parameters: Parameters,
    state: State,
    table: jax.Array,
    config: Config,
    *,
    until: int | jax.Array,
    top_k: int = 1,
    temperature: float | jax.Array = 1.0,
    stop: int | jax.Array = -1,
    attention: Attention = None,
) -> State:
    """Goes on until answers have `until` tokens, of at most L - S, or have ended; the state is given up."""

    def is_on(state: State) -> jax.Array:
        return (state.step < until) & state.active.any()

    def next_token(state: State) -> State:
        last = state.lengths[:, None] - 1
        token = jnp.take_along_axis(state.tokens, last, axis=1)
        places = jnp.where(state.active[:, None], last, -1)  # a sequence that has ended stays in the batch
        hidden, caches = decoder(
            parameters, token, places, table, config, state.caches, state.lengths, attention=attention
        )
        return _with_next(
            state._replace(caches=caches), logits_of(parameters, hidden, config)[:, 0], top_k, temperature, stop
        )

    return jax.lax.while_loop(is_on, next_token, state)


def _with_next(state: State, logits: jax.Array, top_k: int, temperature, stop) -> State:
    """With one more token of each active sequence, from logits (B, V)."""
    best, candidates = jax.lax.top_k(logits, top_k)
    drawn = jax.random.categorical(jax.random.fold_in(state.key, state.step), best / temperature)
    token = jnp.take_along_axis(candidates, drawn[:, None], axis=1)[:, 0]
    place = jnp.where(state.active, state.lengths, state.tokens.shape[1])
    return state._replace(
        tokens=state.tokens.at[jnp.arange(len(place)), place].set(token, mode="drop"),
        lengths=state.lengths + state.active.astype(jnp.int32),
        active=state.active & (token != stop),
        step=state.step + 1,
    )


def _check(width: int, length: int, num_rows: int, top_k: int, key: jax.Array | None) -> None:
    if length <= width:
        raise ValueError(
            f"caches must have more places than the {width} tokens of prompts, got {length}. "
            "Make them for the longest sequence, prompt and answer."
        )
    if num_rows < length:
        raise ValueError(
            f"table must have a row for each of {length} places, got {num_rows}. Make it with max_position={length}."
        )
    if top_k > 1 and key is None:
        raise ValueError(f"key must be given for a top_k of {top_k}, got None. Pass jax.random.key(0).")


# Training


def loss(
    parameters: Parameters, tokens: jax.Array, table: jax.Array, config: Config, *, policy: Callable | None = None
) -> jax.Array:
    """The mean over all tokens but the first two, which nothing before them foretells."""
    log_probabilities = jax.nn.log_softmax(forward(parameters, tokens, table, config, policy=policy))
    return -jnp.mean(jnp.take_along_axis(log_probabilities[:, 1:-1], tokens[:, 2:, None], axis=-1))


@functools.partial(jax.jit, static_argnames=("config", "policy"))
def train_step(parameters, moments, step, tokens, table, config, policy=None):
    value, gradients = jax.value_and_grad(loss)(parameters, tokens, table, config, policy=policy)
    return *adam(parameters, moments, gradients, step), value


def initial_parameters(
    seed: int, config: Config, *, vocabulary: int, width: int, mlp_width: int, num_layers: int, tied: bool = False
) -> Parameters:
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape) / shape[0] ** 0.5, jnp.float32)

    def norm(size: int) -> jax.Array:
        return jnp.full(size, 1 - config.norm_beta, jnp.float32)

    heads = (2 if config.gated else 1) * config.num_q_heads + 2 * config.num_kv_heads
    layers = tuple(
        Layer(
            attention_norm=norm(width),
            qkv=normal(width, heads * config.head_dim),
            q_norm=norm(config.head_dim),
            k_norm=norm(config.head_dim),
            out=normal(config.num_q_heads * config.head_dim, width),
            mlp_norm=norm(width),
            mlp_gate=normal(width, mlp_width),
            mlp_up=normal(width, mlp_width),
            mlp_down=normal(mlp_width, width),
        )
        for _ in range(num_layers)
    )
    return Parameters(normal(vocabulary, width), layers, norm(width), None if tied else normal(width, vocabulary))


# A checkpoint of transformers


def load(folder: pathlib.Path, *, max_position: int) -> tuple[Parameters, jax.Array, Config]:
    """Parameters, in the dtype that they were saved in, table and configuration of a checkpoint of Qwen3.

    Args:
      folder: with config.json and files of safetensors.
      max_position: the rows of the table; the longest sequence, prompt and answer.

    Raises:
      NotImplementedError: the model is another, or has another kind of layer.
      ValueError: weights are missing or left over.
    """
    given = json.loads((folder / "config.json").read_text())
    given = {"head_dim": 128, "partial_rotary_factor": 1.0} | {k: x for k, x in given.items() if x is not None}
    needed = {
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
        "layer_types": ["full_attention"] * given["num_hidden_layers"],
    }
    for name, value in needed.items():
        if (got := given.get(name, value)) != value:
            raise NotImplementedError(f"{name} must be {value!r}, got {got!r}. Pass a checkpoint of Qwen3.")
    import safetensors  # late: training and generating do without it

    weights = {}
    for file in folder.glob("*.safetensors"):
        with safetensors.safe_open(file, framework="numpy") as tensors:
            weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118 - it isn't a dict
    if given.get("tie_word_embeddings"):
        weights.pop("lm_head.weight", None)
    parameters = pack(weights, given["num_hidden_layers"], tied=bool(given.get("tie_word_embeddings")))
    read, table = read_config(given, max_position=max_position, dtype=parameters.embedding.dtype)
    sizes = read.num_q_heads, read.num_kv_heads, read.head_dim, read.rotary_dim, read.eps
    return parameters, table, Config(*sizes, gated=False, norm_beta=0.0)


def pack(weights: Mapping[str, np.ndarray], num_layers: int, *, tied: bool) -> Parameters:
    """Parameters on JAX's default device, from weights under transformers' names."""
    of_layer = {
        "attention_norm": ("input_layernorm",),
        "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "q_norm": ("self_attn.q_norm",),
        "k_norm": ("self_attn.k_norm",),
        "out": ("self_attn.o_proj",),
        "mlp_norm": ("post_attention_layernorm",),
        "mlp_gate": ("mlp.gate_proj",),
        "mlp_up": ("mlp.up_proj",),
        "mlp_down": ("mlp.down_proj",),
    }
    expected = {"model.embed_tokens.weight", "model.norm.weight", *([] if tied else ["lm_head.weight"])}
    expected |= {
        f"model.layers.{i}.{x}.weight" for i in range(num_layers) for names in of_layer.values() for x in names
    }
    if expected != set(weights):
        without, others = sorted(expected - set(weights)), sorted(set(weights) - expected)
        raise ValueError(
            f"weights must be those of {num_layers} layers of Qwen3, got without {without} and with others {others}. "
            "Pass all files of one checkpoint."
        )

    def read(*names: str) -> jax.Array:
        return jnp.array(np.concatenate([weights[f"{name}.weight"] for name in names]).T)

    return Parameters(
        embedding=jnp.array(weights["model.embed_tokens.weight"]),
        layers=tuple(
            Layer(**{field: read(*(f"model.layers.{i}.{x}" for x in names)) for field, names in of_layer.items()})
            for i in range(num_layers)
        ),
        norm=read("model.norm"),
        head=None if tied else read("lm_head"),
    )


# The example

VOCABULARY, LENGTH, STEPS = 32, 48, 100
CONFIG = Config(num_q_heads=4, num_kv_heads=2, head_dim=32, rotary_dim=16, eps=1e-6, gated=True, norm_beta=1.0)
SIZES = {"vocabulary": VOCABULARY, "width": 64, "mlp_width": 128, "num_layers": 2}


@functools.partial(jax.jit, static_argnames="batch")
def counting(key: jax.Array, batch: int) -> jax.Array:
    """(batch, LENGTH): each sequence counts on modulo VOCABULARY, by a stride of its own from 1 to 4."""
    keys = jax.random.split(key)
    first = jax.random.randint(keys[0], (batch, 1), 0, VOCABULARY)
    stride = jax.random.randint(keys[1], (batch, 1), 1, 5)
    return (first + stride * jnp.arange(LENGTH)[None]) % VOCABULARY


def cos_sin_table(config: Config, max_position: int) -> jax.Array:
    inv_freq, attention_factor = rope.inv_frequencies(
        {"rope_theta": 1e4, "partial_rotary_factor": config.rotary_dim / config.head_dim}, head_dim=config.head_dim
    )
    return rope.cos_sin_cache(inv_freq, attention_factor, max_position=max_position)


def train(parameters: Parameters, table: jax.Array, config: Config, num_steps: int) -> tuple[Parameters, list[float]]:
    """The parameters after training, and the loss of each step."""
    moments, losses = (jax.tree.map(jnp.zeros_like, parameters),) * 2, []
    with tqdm(range(1, num_steps + 1), desc="training", unit="step") as progress:
        for step in progress:
            tokens = counting(jax.random.key(step), 16)
            parameters, moments, value = train_step(parameters, moments, jnp.float32(step), tokens, table, config)
            losses.append(float(value))
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return parameters, losses


def main() -> None:
    """Trains, generates chunk by chunk with a progress bar, then all at once with a clock."""
    table = cos_sin_table(CONFIG, LENGTH)
    parameters, losses = train(initial_parameters(0, CONFIG, **SIZES), table, CONFIG, STEPS)
    print(f"loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last")

    lengths, width = jnp.array([3, 8, 5, 2], jnp.int32), 8
    batch, num_new, counted = len(lengths), LENGTH - width, counting(jax.random.key(0), len(lengths))
    prompts = parameters, counted[:, :width], lengths

    def caches() -> tuple[Cache, ...]:
        return empty_caches(parameters, CONFIG, batch=batch, length=LENGTH)

    state = start(*prompts, caches(), table, CONFIG)
    with tqdm(total=num_new, desc="generating", unit="token") as progress:
        for until in range(8, num_new + 1, 8):
            state = advance(parameters, state, table, CONFIG, until=until)
            progress.update(int(state.step) - progress.n)
    tokens, ends = np.asarray(state.tokens), np.asarray(state.lengths)
    logits = jax.jit(forward, static_argnames="config")(parameters, state.tokens, table, CONFIG)
    likeliest = np.asarray(logits).argmax(axis=-1)
    place = np.arange(LENGTH)[None]
    answers = (place >= np.asarray(lengths)[:, None]) & (place < ends[:, None])
    agree = (tokens[:, 1:] == likeliest[:, :-1])[answers[:, 1:]]
    print(f"{agree.sum()} of {agree.size} generated tokens are what a forward pass without caches finds likeliest")
    print(f"{(tokens == counted)[answers].sum()} of {agree.size} count on")

    jax.block_until_ready(generate(*prompts, caches(), table, CONFIG))
    empty = jax.block_until_ready(caches())
    began = time.perf_counter()
    state = jax.block_until_ready(generate(*prompts, empty, table, CONFIG))
    seconds = time.perf_counter() - began
    equal = np.array_equal(state.tokens, tokens)
    print(f"in one program: {'equal' if equal else 'other'} tokens, {agree.size / seconds:.0f} tokens per second")


if __name__ == "__main__":
    main()
