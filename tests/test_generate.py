"""The example that generates: greedy answers are those of a forward pass without caches, and of transformers."""

import collections
import functools
import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("tqdm", reason="the example's progress bars")

import pallas_qk
from benchmarks import decode
from examples import generate as example
from examples.gated_attention import default_attention
from examples.generate import CONFIG
from tests import gpu_program
from tests.pages import shown, without_numbers
from tests.run import primitives, quick_jit

SIZES = {"vocabulary": 48, "width": 64, "mlp_width": 96}
PROMPTS, WIDTH, LENGTH = (5, 11, 1, 8), 11, 211
NUM_NEW = LENGTH - WIDTH
CONFIGS = {"gated": CONFIG, "ungated": CONFIG._replace(gated=False, norm_beta=0.0, rotary_dim=32)}


@pytest.fixture(autouse=True)
def as_users_run_it():
    """Standard promotion, without which jax.nn.dot_product_attention doesn't run, and no TF32 on a GPU."""
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        yield


@functools.cache
def model(kind: str = "gated", num_layers: int = 2):
    config = CONFIGS[kind]
    parameters = example.initial_parameters(0, config, **SIZES, num_layers=num_layers)
    return parameters, example.cos_sin_table(config, LENGTH), config


@functools.cache
def prompts() -> jax.Array:
    """Behind each prompt lie other tokens, which its answer would show if it read them.

    With this key the likeliest token leads by 0.001 everywhere, which no order of float32 sums makes up for.
    """
    return jax.random.randint(jax.random.key(4), (len(PROMPTS), WIDTH), 0, SIZES["vocabulary"])


def caches(kind: str = "gated", batch: int = len(PROMPTS), num_layers: int = 2, **options) -> tuple[example.Cache, ...]:
    parameters, _, config = model(kind, num_layers)
    return example.empty_caches(parameters, config, batch=batch, length=LENGTH, **options)


@functools.cache
def program(kind: str, top_k: int):
    return quick_jit(functools.partial(example.generate, config=CONFIGS[kind], top_k=top_k))


def generate(kind="gated", rows=slice(None), lengths=PROMPTS, top_k=1, stop=-1, cache=None, **options) -> example.State:
    parameters, table, _ = model(kind)
    some, lengths = prompts()[rows], jnp.array(lengths, jnp.int32)[rows]
    return program(kind, top_k)(
        parameters, some, lengths, caches(kind, len(some), **cache or {}), table, stop=stop, **options
    )


def compiled_as_by_users(stop: int) -> example.State:
    parameters, table, config = model()
    arrays = parameters, prompts(), jnp.array(PROMPTS, jnp.int32), caches(), table
    return example.generate(*arrays, config, stop=stop)


@functools.cache
def greedy() -> example.State:
    return compiled_as_by_users(-1)


def answers(state: example.State) -> list[list[int]]:
    each = zip(np.asarray(state.tokens), PROMPTS, np.asarray(state.lengths), strict=True)
    return [tokens[start:stop].tolist() for tokens, start, stop in each]


@functools.cache
def forward(kind: str):
    return quick_jit(functools.partial(example.forward, config=CONFIGS[kind]))


def whole(kind: str, tokens: jax.Array) -> np.ndarray:
    """Logits (B, L, V) without caches."""
    parameters, table, _ = model(kind)
    return np.asarray(forward(kind)(parameters, tokens, table))


# Without sampling


@pytest.mark.parametrize("kind", CONFIGS)
def test_200_tokens_are_those_of_a_forward_pass_without_caches(kind):
    state = greedy() if kind == "gated" else generate(kind)
    np.testing.assert_array_equal(state.lengths, np.array(PROMPTS) + NUM_NEW)
    likeliest = whole(kind, state.tokens).argmax(axis=-1)
    for row, (start, answer) in enumerate(zip(PROMPTS, answers(state), strict=True)):
        assert answer == likeliest[row, start - 1 : start + NUM_NEW - 1].tolist()
        assert len(set(answer)) > 6  # one that repeats itself would hide a wrong cache
        np.testing.assert_array_equal(state.tokens[row, :start], prompts()[row, :start])
        assert not state.tokens[row, start + NUM_NEW :].any()


def test_a_sequence_alone_has_the_tokens_that_it_has_in_a_batch():
    for row in range(len(PROMPTS)):
        np.testing.assert_array_equal(generate(rows=slice(row, row + 1)).tokens[0], greedy().tokens[row])


def test_chunks_give_the_tokens_of_one_program():
    parameters, table, config = model()
    state = example.start(parameters, prompts(), jnp.array(PROMPTS, jnp.int32), caches(), table, config)
    advance = quick_jit(functools.partial(example.advance, config=config))
    assert state.step == 1
    for until in (1, 9, 30, 30, NUM_NEW):
        state = advance(parameters, state, table, until=until)
        assert state.step == until
    for name in ("tokens", "lengths", "active", "step"):
        np.testing.assert_array_equal(getattr(state, name), getattr(greedy(), name))


def test_a_stop_token_ends_its_sequence_alone():
    """One answer has it early, another late or never."""
    want = answers(greedy())
    ends = {token: [x.index(token) + 1 if token in x else len(x) for x in want] for x in want for token in x}
    stop = max(ends, key=lambda token: max(ends[token]) - min(ends[token]))
    state = compiled_as_by_users(stop)
    assert min(ends[stop]) < 20 and max(ends[stop]) > 100
    assert answers(state) == [x[:end] for x, end in zip(want, ends[stop], strict=True)]
    assert not any(row[length:].any() for row, length in zip(state.tokens, state.lengths, strict=True))


def test_the_loop_ends_with_the_last_sequence():
    first = answers(greedy())[0]
    state = generate(rows=slice(0, 1), stop=first[12])
    assert state.step == first.index(first[12]) + 1
    assert not state.active.any()


@pytest.mark.parametrize("length", [0, -3, WIDTH + 1])
def test_a_length_that_no_prompt_has_gets_no_answer(length):
    """Its neighbours keep theirs."""
    state = generate(lengths=(5, length, 1, 8))
    np.testing.assert_array_equal(state.tokens[::2], greedy().tokens[::2])
    assert state.lengths[1] == length and not state.tokens[1, WIDTH:].any()


# With sampling


def test_draws_follow_from_the_key_and_are_among_the_likeliest():
    draw = functools.partial(generate, top_k=3, temperature=2.0)
    state, again, other = (draw(key=jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(state.tokens, again.tokens)
    assert (np.asarray(state.tokens) != other.tokens).any()
    logits, ranks = whole("gated", state.tokens), collections.Counter()
    for row, (start, answer) in enumerate(zip(PROMPTS, answers(state), strict=True)):
        for place, token in enumerate(answer, start):
            ranks[int((logits[row, place - 1] > logits[row, place - 1, token]).sum())] += 1
    assert set(ranks) == {0, 1, 2}


def test_a_low_temperature_is_greedy():
    state = generate(top_k=3, temperature=1e-6, key=jax.random.key(0))
    np.testing.assert_array_equal(state.tokens, greedy().tokens)


# What is refused

ROOM = (
    "caches must have more places than the 11 tokens of prompts, got 11. "
    "Make them for the longest sequence, prompt and answer."
)
ROWS = "table must have a row for each of 211 places, got 210. Make it with max_position=211."
KEY = "key must be given for a top_k of 2, got None. Pass jax.random.key(0)."


@pytest.mark.parametrize(
    "length, num_rows, top_k, message", [(11, 211, 1, ROOM), (211, 210, 1, ROWS), (211, 211, 2, KEY)]
)
def test_what_does_not_fit_is_refused(length, num_rows, top_k, message):
    parameters, table, config = model()
    given = example.empty_caches(parameters, config, batch=len(PROMPTS), length=length)
    with pytest.raises(ValueError, match="must") as caught:
        example.generate(parameters, prompts(), jnp.array(PROMPTS), given, table[:num_rows], config, top_k=top_k)
    assert str(caught.value) == message


# Narrow caches


@quick_jit
def forced_logits(parameters, tokens, given, table):
    """Logits (NUM_NEW, B, V), where after the prompts the tokens are read one by one."""
    config = CONFIG
    lengths = jnp.array(PROMPTS, jnp.int32)
    state = example.start(parameters, prompts(), lengths, given, table, config)

    def step(held, place):
        token = jnp.take_along_axis(tokens, place[:, None], axis=1)
        hidden, held = example.decoder(parameters, token, place[:, None], table, config, held, place + 1)
        return held, example.logits_of(parameters, hidden, config)[:, 0]

    places = lengths[None] + jnp.arange(NUM_NEW, dtype=jnp.int32)[:, None]
    return jax.lax.scan(step, state.caches, places)[1]


@functools.cache
def wide_logits() -> jax.Array:
    parameters, table, _ = model()
    return forced_logits(parameters, greedy().tokens, caches(), table)


def of_kind(dtype: str) -> dict:
    """What a cache of this dtype is made with: scales from the prompts."""
    if "float8" not in dtype:
        return {"dtype": dtype}
    parameters, table, config = model()
    read = example.start(parameters, prompts(), jnp.array(PROMPTS, jnp.int32), caches(), table, config).caches
    return {"dtype": dtype, "scales": example.scales_of(read, dtype)}


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_a_narrow_cache_stays_near(dtype):
    """Within four roundings of its dtype: measured are 0.005, 0.09 and 0.14 of the largest logit, over 200 tokens."""
    parameters, table, _ = model()
    want, got = wide_logits(), forced_logits(parameters, greedy().tokens, caches(**of_kind(dtype)), table)
    error = float(jnp.abs(got - want).max() / jnp.abs(want).max())
    assert 0 < error < 2 * float(jnp.finfo(dtype).eps)


def test_a_cache_of_8_bits_generates_to_the_end():
    kind = of_kind("float8_e4m3fn")
    state = generate(cache=kind)
    np.testing.assert_array_equal(state.lengths, np.array(PROMPTS) + NUM_NEW)
    assert state.caches[0].k.dtype == "float8_e4m3fn"
    assert [x[0] for x in answers(state)] == [x[0] for x in answers(greedy())]  # prompts see themselves undivided
    assert all(not x.is_deleted() for x in jax.tree.leaves(kind["scales"]))


# transformers


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_generates_what_transformers_does(tmp_path, tied):
    """Ragged prompts: there padded on the left, here on the right. One of the checkpoints has several files."""
    torch = pytest.importorskip("torch", reason="the judge is transformers")
    transformers = pytest.importorskip("transformers", reason="the judge is transformers")
    sizes = {"vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    their_config = transformers.Qwen3Config(
        **sizes, **heads, tie_word_embeddings=tied, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    )
    torch.manual_seed(5)
    theirs = transformers.Qwen3ForCausalLM(their_config).eval()
    for name, weight in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, mean=1.0, std=0.3)
    theirs.save_pretrained(tmp_path, max_shard_size="100KB" if tied else "1GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == tied

    padded = [np.pad(row[:n], (WIDTH - n, 0)) for row, n in zip(np.asarray(prompts()), PROMPTS, strict=True)]
    seen = [[0] * (WIDTH - n) + [1] * n for n in PROMPTS]
    options = {"do_sample": False, "max_new_tokens": 60, "pad_token_id": 0}
    with torch.no_grad():
        want = theirs.generate(torch.tensor(np.array(padded)), attention_mask=torch.tensor(seen), **options)
    want = want[:, WIDTH:].tolist()
    assert all(len(set(x)) > 6 for x in want)

    parameters, table, config = example.load(tmp_path, max_position=WIDTH + 60)
    assert config == example.Config(4, 2, 32, 32, 1e-6, gated=False, norm_beta=0.0)
    assert (parameters.head is None) == tied
    run = quick_jit(functools.partial(example.generate, config=config))
    for stop in (-1, want[0][9]):
        given = example.empty_caches(parameters, config, batch=len(PROMPTS), length=WIDTH + 60)
        state = run(parameters, prompts(), jnp.array(PROMPTS, jnp.int32), given, table, stop=stop)
        assert answers(state) == [x[: x.index(stop) + 1] if stop in x else x for x in want]


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    given = {"model_type": "qwen3", "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    others = {
        "model_type": ("qwen3_5_text", "model_type must be 'qwen3', got 'qwen3_5_text'. Pass a checkpoint of Qwen3."),
        "attention_bias": (True, "attention_bias must be False, got True. Pass a checkpoint of Qwen3."),
        "layer_types": (
            ["full_attention", "sliding_attention"],
            "layer_types must be ['full_attention', 'full_attention'], got ['full_attention', 'sliding_attention']. "
            "Pass a checkpoint of Qwen3.",
        ),
    }
    for name, (value, message) in others.items():
        (tmp_path / "config.json").write_text(json.dumps(given | {name: value}))
        with pytest.raises(NotImplementedError) as caught:
            example.load(tmp_path, max_position=8)
        assert str(caught.value) == message
    (tmp_path / "config.json").write_text(json.dumps(given))
    pytest.importorskip("safetensors", reason="reads the checkpoint")
    with pytest.raises(ValueError, match=r"weights must be those of 2 layers of Qwen3, got without \['lm_head.*"):
        example.load(tmp_path, max_position=8)


# Compiled


def multiply_and_sum(q, k, v, lengths):
    """Attention that reads k and v as they lie, which no product of matrices does on a CPU."""
    if lengths is None:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)
    batch, length, num_heads, head_dim = k.shape
    q = q.reshape(batch, 1, num_heads, -1, head_dim)
    logits = (q * k[:, :, :, None]).sum(axis=-1) / head_dim**0.5  # (B, L, Hkv, G)
    is_seen = jnp.arange(length)[None] < lengths[:, None]
    weights = jax.nn.softmax(jnp.where(is_seen[:, :, None, None], logits, -jnp.inf), axis=1)
    return (weights[..., None] * v[:, :, :, None]).sum(axis=1).reshape(batch, 1, -1, head_dim)


def moves_in_the_loop(attention) -> list[str]:
    """What the loop does to arrays of a cache's size, but for writing rows into them."""
    parameters, table, config = model(num_layers=1)
    given = caches(num_layers=1)
    arguments = parameters, prompts(), jnp.array(PROMPTS, jnp.int32), given, table
    compiled = example.generate.lower(*arguments, config, attention=attention).compile()
    assert compiled.memory_analysis().alias_size_in_bytes == sum(x.nbytes for x in jax.tree.leaves(given))
    found = done_in_the_loop(compiled.as_text(), given[0].k.size)
    assert found.count("scatter") == 2
    return [x for x in found if x != "scatter"]


def body_of_the_loop(text: str) -> str:
    (body,) = re.findall(r" while\(.*body=%?([\w.\-]+)", text)
    return re.search(rf"^%?{re.escape(body)} .*?^}}", text, re.MULTILINE | re.DOTALL)[0]


def done_in_the_loop(text: str, size: int) -> list[str]:
    """The operations whose one result has so many elements; of a fusion those inside it."""
    lines, computations = body_of_the_loop(text), gpu_program.parse(text).computations
    body = computations[re.match(r"%?([\w.\-]+)", lines)[1]]
    found = []
    for name, shape in re.findall(r"%?([\w.\-]+) = \w+\[([\d,]+)\]", lines):
        if math.prod(map(int, shape.split(","))) == size:
            inner = [x.opcode for callee in body[name].callees for x in computations[callee].values()]
            opcodes = {*inner, body[name].opcode} - {"parameter", "fusion", "bitcast", "constant"}
            found.append(" ".join(sorted(opcodes)))
    return sorted(x for x in found if x != "get-tuple-element")


def test_no_cache_is_moved_in_the_loop(on_the_host):
    """On a CPU JAX's own attention multiplies transposed copies of k and of v. Another shows that these are all."""
    assert moves_in_the_loop(multiply_and_sum) == []
    assert moves_in_the_loop("xla") == ["copy transpose"] * 2


# On a GPU

GPU_CONFIG = CONFIG._replace(num_q_heads=16, num_kv_heads=2, head_dim=256, rotary_dim=64)
GPU_LENGTH = 1024


@functools.cache
def gpu_arguments():
    """Four layers in bfloat16, and prompts of 32 sequences."""
    parameters = example.initial_parameters(0, GPU_CONFIG, vocabulary=512, width=256, mlp_width=512, num_layers=4)
    parameters = jax.tree.map(lambda x: x.astype(jnp.bfloat16), parameters)
    lengths = jnp.asarray(np.random.default_rng(0).integers(1, WIDTH + 1, 32), jnp.int32)
    table = example.cos_sin_table(GPU_CONFIG, GPU_LENGTH).astype(jnp.bfloat16)
    return parameters, jax.random.randint(jax.random.key(0), (32, WIDTH), 0, 512), lengths, table


def gpu_caches(**options) -> tuple[example.Cache, ...]:
    return example.empty_caches(gpu_arguments()[0], GPU_CONFIG, batch=32, length=GPU_LENGTH, **options)


@pytest.mark.gpu
def test_a_token_of_four_layers_is_one_cuda_graph_that_moves_no_cache(gpu, tmp_path):
    """A kernel of ours and one of attention for each layer, and nothing of a cache's size beside them."""
    parameters, some, lengths, table = gpu_arguments()
    choice = pallas_qk.default_implementation(32, 16, 2, 256, 64, "bfloat16").name
    if choice == "xla" or default_attention("bfloat16") == "xla":
        pytest.skip(f"needs a GPU of capability 9.0 or later, got one that takes {choice!r}")
    state = example.start(parameters, some, lengths, gpu_caches(), table, GPU_CONFIG)
    lowered = example.advance.lower(parameters, state, table, GPU_CONFIG, until=100)
    compiled = lowered.compile(compiler_options={"xla_dump_to": str(tmp_path)})
    text = compiled.as_text()
    assert done_in_the_loop(text, state.caches[0].k.size) == []
    held = sum(x.nbytes for x in jax.tree.leaves(state))
    assert compiled.memory_analysis().temp_size_in_bytes < held / 8
    calls = re.findall(r"custom-call\(.*", body_of_the_loop(text))
    assert sum(f"pallas_qk_{choice}_forward" in call for call in calls) == 4
    assert sum("cudnn" in call for call in calls) == 4
    recorded = decode.recorded_in(str(tmp_path), choice)
    assert recorded.graphs == 1 and recorded.thunks - recorded.in_graphs <= 3, recorded  # the loop and its condition


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_it_generates_on_a_gpu_with_a_cache_of(gpu, dtype):
    parameters, some, lengths, table = gpu_arguments()
    scales = None
    if "float8" in dtype:
        scales = example.scales_of(
            example.start(parameters, some, lengths, gpu_caches(), table, GPU_CONFIG).caches, dtype
        )
    state = example.generate(parameters, some, lengths, gpu_caches(dtype=dtype, scales=scales), table, GPU_CONFIG)
    assert int(state.step) == GPU_LENGTH - WIDTH and state.caches[0].k.dtype == dtype
    np.testing.assert_array_equal(state.lengths, lengths + GPU_LENGTH - WIDTH)
    assert np.unique(np.asarray(state.tokens)).size > 100  # random weights don't repeat a few tokens


# Training

POLICIES = jax.checkpoint_policies
REMAT = {  # the policy, and how many forward calls of the op and products of matrices a layer's gradient runs again
    "nothing": (None, 1, 6),
    "nothing saveable": (POLICIES.nothing_saveable, 1, 6),
    "products": (POLICIES.dots_saveable, 1, 0),
    "products but attention's": (POLICIES.dots_with_no_batch_dims_saveable, 1, 2),
    "q, k and gate": (POLICIES.save_only_these_names("q", "k", "gate"), 1, 6),
    "q, k, v and gate": (POLICIES.save_only_these_names("q", "k", "v", "gate"), 0, 6),
}


def calls(policy) -> collections.Counter:
    parameters, table, config = model()
    gradient = jax.grad(functools.partial(example.loss, config=config, policy=policy))
    return collections.Counter(primitives(gradient, parameters, jnp.zeros((2, 8), jnp.int32), table))


@pytest.mark.parametrize("name", REMAT)
def test_what_a_policy_runs_again(name):
    policy, forwards, products = REMAT[name]
    once, got = calls(POLICIES.everything_saveable), calls(policy)
    assert once["fused_qk_rmsnorm_rope_gate"] == got["fused_qk_rmsnorm_rope_gate_backward"] == 2
    assert got["fused_qk_rmsnorm_rope_gate"] == 2 * (1 + forwards)
    assert got["dot_general"] == once["dot_general"] + 2 * products


def test_it_learns_and_generates_what_it_has_learnt(capsys):
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert without_numbers(lines) == without_numbers(shown("generate"))
    first, last = map(float, re.fullmatch(r"loss (\S+) at first, (\S+) at last", lines[0]).groups())
    assert abs(first - math.log(example.VOCABULARY)) < 1 and last < 0.1
    assert lines[1].startswith("160 of 160 generated tokens are what a forward pass without caches finds likeliest")
    assert int(lines[2].split()[0]) > 150
    assert re.fullmatch(r"in one program: equal tokens, \d+ tokens per second", lines[3])
