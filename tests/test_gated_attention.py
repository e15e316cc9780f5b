"""The example's gated attention layer against transformers' Qwen3.5 attention."""

import copy
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples import gated_attention
from pallas_qk import rope
from tests.compare import assert_same

torch = pytest.importorskip("torch", reason="the judge is transformers' layer")
modeling = pytest.importorskip(
    "transformers.models.qwen3_5.modeling_qwen3_5", reason="the judge is transformers' layer"
)


HIDDEN_SIZE, NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, ROTARY_DIM, MAX_POSITION = 48, 4, 2, 32, 16, 64
PROMPTS, ANSWER = (9, 14, 1), 3  # tokens of each sequence that are prefilled, and of every sequence that are decoded
WEIGHTS = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")


@pytest.fixture(autouse=True)
def as_users_run_it():
    """Standard promotion, without which jax.nn.dot_product_attention doesn't run, and no TF32 on a GPU."""
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("highest"):
        yield


@functools.cache
def text_config():
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig

    return Qwen3_5TextConfig(
        hidden_size=HIDDEN_SIZE,
        num_attention_heads=NUM_Q_HEADS,
        num_key_value_heads=NUM_KV_HEADS,
        head_dim=HEAD_DIM,
        num_hidden_layers=4,
        max_position_embeddings=MAX_POSITION,
        attn_implementation="eager",
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 1e4,
            "partial_rotary_factor": ROTARY_DIM / HEAD_DIM,
            "mrope_section": [3, 3, 2],
            "mrope_interleaved": True,
        },
    )


def seeded_layer(dtype: str):
    """Weights of bfloat16 values in every dtype, so that the layers of both dtypes are of the same weights."""
    torch.manual_seed(0)
    layer = modeling.Qwen3_5Attention(text_config(), layer_idx=3)
    for name, weight in layer.named_parameters():
        torch.nn.init.normal_(weight, std=0.3 if "norm" in name else 2 * weight.shape[-1] ** -0.5)
    return layer.bfloat16().to(getattr(torch, dtype)).eval()


def to_torch(x, dtype: str):
    return torch.as_tensor(np.array(x, np.float32)).to(getattr(torch, dtype))


def values(x) -> np.ndarray:
    """As float32, of torch or JAX."""
    return x.detach().float().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float32)


def inputs(multimodal: bool):
    """hidden (B, S, E), positions (3, B, S) and a cotangent (B, S, E); bfloat16 values in float32."""
    batch, length = len(PROMPTS), max(PROMPTS) + ANSWER
    segments = ([length], [2, (1, 3, 4), length - 14], [1, (2, 2, 2), length - 9])
    each = [rope.mrope_positions(x if multimodal else [length], start=5 * i)[0] for i, x in enumerate(segments)]
    keys = jax.random.split(jax.random.key(0), 2)
    hidden, cotangent = (jax.random.normal(key, (batch, length, HIDDEN_SIZE), jnp.bfloat16) for key in keys)
    return hidden.astype(jnp.float32), np.stack(each, axis=1), cotangent.astype(jnp.float32)


def rotary(positions, dtype: str):
    rotary_embedding = modeling.Qwen3_5TextRotaryEmbedding(text_config())
    return rotary_embedding(torch.zeros((), dtype=getattr(torch, dtype)), torch.as_tensor(positions))


# The judge


def their_layer(dtype: str, hidden, positions, cotangent) -> dict[str, np.ndarray]:
    """Outputs, and gradients of the input and of every weight."""
    layer, hidden = seeded_layer(dtype), to_torch(hidden, dtype).requires_grad_()
    length = hidden.shape[1]
    mask = torch.full((length, length), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)[None, None]
    output, _ = layer(hidden, rotary(positions, dtype), mask)
    output.backward(to_torch(cotangent, dtype))
    weights = {name: getattr(layer, name).weight.grad for name in WEIGHTS}
    return {name: values(x) for name, x in {"output": output, "hidden": hidden.grad, **weights}.items()}


@torch.no_grad()
def their_tokens(dtype: str, hidden, positions, sequence: int) -> np.ndarray:
    """Outputs (prompt + ANSWER, E) of one sequence alone: its prompt at once, then token by token with their cache."""
    from transformers import DynamicCache

    layer, cache, prompt = seeded_layer(dtype), DynamicCache(), PROMPTS[sequence]
    hidden = to_torch(hidden[sequence, None, : prompt + ANSWER], dtype)
    outputs = []
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, prompt + ANSWER))]:
        mask = torch.full((stop - start, stop), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1 + start)
        at = rotary(positions[:, sequence, None, start:stop], dtype)
        outputs.append(layer(hidden[:, start:stop], at, mask[None, None], past_key_values=cache)[0][0])
    return values(torch.cat(outputs))


# Ours


def our_arguments(dtype: str):
    config, cos_sin_cache = gated_attention.read_config(
        text_config().to_dict(), max_position=MAX_POSITION, dtype=jnp.dtype(dtype)
    )
    return gated_attention.from_state_dict(seeded_layer(dtype).state_dict(), config), cos_sin_cache, config


def our_positions(positions, multimodal: bool):
    return jnp.asarray(positions if multimodal else positions[0])


def our_layer(dtype: str, hidden, positions, cotangent) -> dict[str, np.ndarray]:
    parameters, cos_sin_cache, config = our_arguments(dtype)

    @jax.jit
    def run(parameters, hidden, cotangent):
        layer = functools.partial(
            gated_attention.forward, positions=positions, cos_sin_cache=cos_sin_cache, config=config
        )
        output, transpose = jax.vjp(layer, parameters, hidden)
        return output, *transpose(cotangent)

    output, weights, hidden = run(parameters, hidden.astype(dtype), cotangent.astype(dtype))
    columns = np.cumsum([2 * NUM_Q_HEADS * HEAD_DIM, NUM_KV_HEADS * HEAD_DIM])
    projections = (*np.split(values(weights.qkv).T, columns), values(weights.out).T)
    named = dict(zip(WEIGHTS, (*projections, weights.q_norm, weights.k_norm), strict=True))
    return {name: values(x) for name, x in {"output": output, "hidden": hidden, **named}.items()}


def our_tokens(dtype: str, hidden, positions) -> list[np.ndarray]:
    """Outputs (prompt + ANSWER, E) of each sequence, all of them in one batch."""
    parameters, cos_sin_cache, config = our_arguments(dtype)
    hidden, prompts, sequences = hidden.astype(dtype), np.array(PROMPTS), np.arange(len(PROMPTS))
    outputs, cache = gated_attention.prefill(
        parameters,
        hidden[:, : max(PROMPTS)],
        jnp.asarray(prompts, jnp.int32),
        positions[..., : max(PROMPTS)],
        cos_sin_cache,
        config,
        cache_length=max(PROMPTS) + ANSWER,
    )
    each = [[values(outputs[i, :n])] for i, n in enumerate(PROMPTS)]
    for at in prompts + np.arange(ANSWER)[:, None]:
        token_positions = positions[..., sequences, at][..., None]
        token, cache = gated_attention.decode(
            parameters, hidden[sequences, at][:, None], token_positions, cos_sin_cache, config, cache
        )
        for outputs, row in zip(each, values(token), strict=True):
            outputs.append(row)
    assert cache.lengths.tolist() == [n + ANSWER for n in PROMPTS]
    return [np.concatenate(x) for x in each]


def check_float32(got: np.ndarray, want: np.ndarray, what: str):
    assert got.shape == want.shape
    assert abs(got - want).max() <= 2e-5 * abs(want).max(), what


def check_bfloat16(got: np.ndarray, want: np.ndarray, exact: np.ndarray, what: str):
    """Both are the same function of the same bfloat16 numbers, whose value the judge gives in float32 (`exact`).

    We round where the judge rounds and nowhere else; it also rounds both products of the rotation, the logits, the
    scaled logits and their cotangents. Roundings are independent, so the squares of their errors add up, ours to no
    more than the judge's. The root mean square of N errors is within 1/sqrt(2N) of what it estimates, a ratio of two
    within 1/sqrt(N): four of those. Of the largest of N errors no more is known than that two such samples seldom
    differ by a factor of two.
    """
    assert got.shape == want.shape == exact.shape
    ours, theirs = got - exact, want - exact
    ratio = np.sqrt((ours**2).mean() / (theirs**2).mean())
    assert ratio <= 1 + 4 / np.sqrt(got.size), what
    assert abs(ours).max() <= 2 * abs(theirs).max(), what


@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_and_gradients(dtype, multimodal):
    hidden, positions, cotangent = inputs(multimodal)
    exact = their_layer("float32", hidden, positions, cotangent)
    got = our_layer(dtype, hidden, our_positions(positions, multimodal), cotangent)
    if dtype == "float32":
        for name, want in exact.items():
            check_float32(got[name], want, name)
    else:
        for name, want in their_layer(dtype, hidden, positions, cotangent).items():
            check_bfloat16(got[name], want, exact[name], name)


@pytest.mark.parametrize("multimodal", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_and_decode(dtype, multimodal):
    """A batch of prompts of several lengths, each against the judge's run of it alone with a cache of its own."""
    hidden, positions, _ = inputs(multimodal)
    each = our_tokens(dtype, hidden, our_positions(positions, multimodal))
    for sequence, got in enumerate(each):
        exact = their_tokens("float32", hidden, positions, sequence)
        if dtype == "float32":
            check_float32(got, exact, f"sequence {sequence}")
        else:
            want = their_tokens(dtype, hidden, positions, sequence)
            check_bfloat16(got, want, exact, f"sequence {sequence}")


def test_plain_positions_of_qwen3_next():
    """Its layer, from the sizes and the table of its own configuration."""
    next_modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    from transformers import Qwen3NextConfig

    sizes = {name: getattr(text_config(), name) for name in (*SIZES, "hidden_size", "max_position_embeddings")}
    settings = sizes | {"num_hidden_layers": 4, "attn_implementation": "eager", "rope_theta": 1e4}
    their_config = Qwen3NextConfig(**settings, partial_rotary_factor=0.5, rope_scaling=None)
    torch.manual_seed(0)
    layer = next_modeling.Qwen3NextAttention(their_config, layer_idx=3).eval()
    hidden, positions, _ = inputs(False)
    length = hidden.shape[1]
    mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
    at = next_modeling.Qwen3NextRotaryEmbedding(their_config)(torch.zeros(()), torch.as_tensor(positions[0]))
    with torch.no_grad():
        want, _ = layer(to_torch(hidden, "float32"), at, mask)

    config, table = gated_attention.read_config(their_config.to_dict(), max_position=MAX_POSITION, dtype=jnp.float32)
    assert config.mrope_section is None and config.rotary_dim == 16
    parameters = gated_attention.from_state_dict(layer.state_dict(), config)
    got = jax.jit(gated_attention.forward, static_argnames="config")(parameters, hidden, positions[0], table, config)
    check_float32(values(got), values(want), "output")


# Configurations

SIZES = ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")
MODELS = {  # the configuration's class, and what mRoPE is where the configuration doesn't say it
    "qwen3_5_text": ("qwen3_5.configuration_qwen3_5.Qwen3_5TextConfig", (11, 11, 10)),
    "qwen3_5_moe_text": ("qwen3_5_moe.configuration_qwen3_5_moe.Qwen3_5MoeTextConfig", (11, 11, 10)),
    "qwen3_next": ("qwen3_next.configuration_qwen3_next.Qwen3NextConfig", None),
}
PUBLISHED = {  # what config.json says of RoPE, in the spellings of checkpoints
    "new": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}},
    "beside": {"rope_theta": 10000000, "rope_scaling": None, "partial_rotary_factor": 0.25},
    "in both places": {"rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25}, "rope_theta": 5.0},
    "half-beside": {"rope_parameters": {"rope_theta": 1e7}, "partial_rotary_factor": 0.25},
    "left-out": {},
    "theta-alone": {"rope_theta": 5e6},
    "old-type": {"rope_theta": 1e7, "rope_scaling": {"type": "default", "partial_rotary_factor": 0.25}},
    "yarn": {
        "rope_theta": 1e7,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192},
    },
    "both": {
        "rope_parameters": {"rope_theta": 5.0},
        "rope_scaling": {"type": "linear", "factor": 2.0, "rope_theta": 1e6},
    },
    "nulls": {"rope_scaling": None, "rope_parameters": {"rope_theta": 1e7, "partial_rotary_factor": 0.25}},
    "dynamic": {"rope_theta": 1e7, "rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16},
}


def published(model: str, spelling: str) -> dict:
    """As in a config.json, without what the class has as its defaults."""
    return {"model_type": model, "num_attention_heads": 16, "num_key_value_heads": 2} | PUBLISHED[spelling]


def config_of(model: str, settings: dict):
    module, _, name = MODELS[model][0].rpartition(".")
    settings = {name: copy.deepcopy(value) for name, value in settings.items() if name != "model_type"}
    return getattr(importlib.import_module(f"transformers.models.{module}"), name)(**settings)


@pytest.mark.parametrize("spelling", PUBLISHED)
@pytest.mark.parametrize("model", MODELS)
def test_a_config_json_is_read_as_transformers_reads_it(model, spelling):
    """Sizes and table of the file as it is, of the class made from it, and of transformers' own frequencies."""
    raw = published(model, spelling)
    before = copy.deepcopy(raw)
    theirs = config_of(model, raw)
    read = [gated_attention.read_config(x, max_position=40, dtype=jnp.float32) for x in (raw, theirs.to_dict())]
    assert raw == before
    assert read[0][0] == read[1][0]
    np.testing.assert_array_equal(read[0][1], read[1][1])

    config, table = read[0]
    assert config == gated_attention.Config(16, 2, theirs.head_dim, 64, MODELS[model][1], theirs.rms_norm_eps)
    name = {"qwen3_next": "Qwen3NextRotaryEmbedding", "qwen3_5_text": "Qwen3_5TextRotaryEmbedding"}
    their_module = type(theirs).__module__.replace("configuration", "modeling")
    embedding = getattr(importlib.import_module(their_module), name.get(model, "Qwen3_5MoeTextRotaryEmbedding"))(theirs)
    if MODELS[model][1]:
        assert tuple(embedding.mrope_section) == config.mrope_section
    positions = torch.arange(40)[None]
    if MODELS[model][1]:  # three rows of them, which versions before 5.23 want
        positions = positions.expand(3, 1, 40)
    cos, sin = (x[0, :, :32].numpy() for x in embedding(torch.zeros(1), positions))
    np.testing.assert_allclose(table, np.concatenate([cos, sin], axis=1), atol=1e-5)


@pytest.mark.parametrize("section", [[24, 4, 4], None])
@pytest.mark.parametrize("place", ["rope_parameters", "rope_scaling"])
def test_a_section_that_is_given_is_taken(place, section):
    parameters = {"rope_theta": 1e7, "mrope_section": section, "mrope_interleaved": True, "type": "mrope"}
    for model, (_, default) in MODELS.items():
        raw = published(model, "left-out") | {place: parameters}
        config, _ = gated_attention.read_config(raw, max_position=8, dtype=jnp.float32)
        assert config.mrope_section == (tuple(section) if section else default)


@pytest.mark.parametrize("missing", ["num_attention_heads", "num_key_value_heads"])
def test_a_size_that_has_no_default_is_asked_for(missing):
    raw = published("qwen3_next", "new")
    del raw[missing]
    with pytest.raises(ValueError, match="text_config must have") as caught:
        gated_attention.read_config(raw, max_position=8, dtype=jnp.float32)
    assert str(caught.value) == (
        f"text_config must have {missing}, got {sorted(raw)}. "
        "Pass config.json's text_config, or all of config.json where it has none."
    )


# Loading


@pytest.mark.parametrize("prefix", ["model", "model.language_model"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_checkpoint_gives_the_parameters_of_the_state_dict(tmp_path, dtype, prefix):
    """Two files, and beside layer 3 names that must not be taken for it."""
    save_file = pytest.importorskip("safetensors.torch", reason="writes the checkpoint").save_file
    parameters, _, config = our_arguments(dtype)
    attention = seeded_layer(dtype).state_dict()
    others = ("mtp.layers.3.self_attn", f"{prefix}.layers.13.self_attn", "model.visual.layers.3.self_attn")
    decoys = {f"{other}.{name}": torch.zeros_like(x) for other in others for name, x in attention.items()}
    layer = {f"{prefix}.layers.3.self_attn.{name}": x for name, x in attention.items()}
    first, second = dict(list(layer.items())[:2]), dict(list(layer.items())[2:])
    save_file(first | decoys, tmp_path / "model-00001-of-00002.safetensors")
    save_file(
        second | {f"{prefix}.layers.3.input_layernorm.weight": torch.zeros(HIDDEN_SIZE)},
        tmp_path / "model-00002-of-00002.safetensors",
    )
    assert_same(gated_attention.from_safetensors(tmp_path, 3, config), parameters)
    assert parameters.qkv.dtype == jnp.dtype(dtype)

    save_file(layer, tmp_path / "all.safetensors")
    assert_same(gated_attention.from_safetensors(tmp_path / "all.safetensors", 3, config), parameters)
    with pytest.raises(ValueError, match=r"got \[\]\. Pass those of one full-attention layer"):
        gated_attention.from_safetensors(tmp_path, 2, config)


def test_parameters_are_copies_of_the_torch_tensors():
    state_dict = seeded_layer("float32").state_dict()
    config = our_arguments("float32")[-1]
    parameters = gated_attention.from_state_dict(state_dict, config)
    for tensor in state_dict.values():
        tensor.zero_()
    assert_same(parameters, our_arguments("float32")[0])


def test_weights_of_another_size_are_refused():
    state_dict = seeded_layer("float32").state_dict()
    config = our_arguments("float32")[-1]._replace(num_kv_heads=4)
    with pytest.raises(ValueError, match=r"must have \[256, 128, 128\] rows .* got \[256, 64, 64\]"):
        gated_attention.from_state_dict(state_dict, config)
