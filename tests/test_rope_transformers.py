"""Frequencies, tables and mRoPE positions against transformers, which nobody here wrote."""

import copy
import importlib
import importlib.metadata
import inspect
import itertools
import math
import pathlib
import re
import types

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_qk import rope
from tests.tolerances import ROUNDOFF

torch = pytest.importorskip("torch")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")

# Kind by kind: the model, the part of its configuration that concerns RoPE, as checkpoints carry it, and head_dim.
QWEN3_5 = {
    "head_dim": 256,
    "max_position_embeddings": 262144,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [11, 11, 10],
        "rope_type": "default",
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25,
    },
}
LLAMA3_1 = {
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
}
LINEAR = {
    "head_dim": 128,
    "max_position_embeddings": 16384,
    "rope_theta": 100000,
    "rope_scaling": {"factor": 4.0, "type": "linear"},
}
DYNAMIC = {
    "head_dim": 128,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rope_scaling": {"factor": 2.0, "type": "dynamic"},
}
QWEN3_YARN = {
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rope_theta": 1000000,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
}
DEEPSEEK_V3 = {
    "head_dim": 64,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
}
DEEPSEEK_SPLIT = DEEPSEEK_V3 | {"rope_scaling": DEEPSEEK_V3["rope_scaling"] | {"mscale": 0.707, "beta_fast": 24}}
GPT_OSS = {
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_theta": 150000,
    "rope_scaling": {
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "factor": 32.0,
        "original_max_position_embeddings": 4096,
        "rope_type": "yarn",
        "truncate": False,
    },
}
YARN_WITHOUT_FACTOR = QWEN3_YARN | {"rope_scaling": QWEN3_YARN["rope_scaling"] | {"factor": None}}
YARN_OF_ONE_STEP = QWEN3_YARN | {
    "rope_scaling": QWEN3_YARN["rope_scaling"] | {"beta_fast": 1, "truncate": False, "attention_factor": 0.75}
}
PHI3 = {
    "hidden_size": 3072,
    "num_attention_heads": 32,
    "head_dim": 96,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": np.linspace(1, 1.9, 48).tolist(),
        "long_factor": np.geomspace(1.03, 64.9, 48).tolist(),
    },
}
PHI4_MINI = PHI3 | {"num_attention_heads": 24, "head_dim": 128, "partial_rotary_factor": 0.75}
# Ramps that begin before the first frequency and end after the last.
YARN_OF_FEW_TURNS = QWEN3_YARN | {
    "rope_scaling": QWEN3_YARN["rope_scaling"] | {"original_max_position_embeddings": 64, "truncate": False}
}
YARN_OF_MANY_TURNS = QWEN3_YARN | {
    "rope_theta": 20,
    "rope_scaling": QWEN3_YARN["rope_scaling"] | {"original_max_position_embeddings": 2800},
}
# transformers reads this spelling only with the trained length in the dict.
PHI3_SU = PHI3 | {"rope_scaling": PHI3["rope_scaling"] | {"type": "su", "original_max_position_embeddings": 4096}}
GEMMA3 = {
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_hidden_layers": 2,
    "rope_parameters": {
        "full_attention": {"factor": 8.0, "rope_type": "linear", "rope_theta": 1000000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
GEMMA4 = {
    "head_dim": 512,
    "max_position_embeddings": 131072,
    "rope_parameters": {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0, "rope_type": "proportional"},
}
CASES = {
    "qwen3.5": ("qwen3_5.Qwen3_5TextConfig", QWEN3_5, {}),
    "llama3.1": ("llama.LlamaConfig", LLAMA3_1, {}),
    "linear": ("llama.LlamaConfig", LINEAR, {}),
    "dynamic-short": ("llama.LlamaConfig", DYNAMIC, {"sequence_length": 100}),
    "dynamic-long": ("llama.LlamaConfig", DYNAMIC, {"sequence_length": 10000}),
    "qwen3-yarn": ("qwen3.Qwen3Config", QWEN3_YARN, {}),
    "deepseek-v3": ("llama.LlamaConfig", DEEPSEEK_V3, {}),
    "deepseek-two-mscales": ("llama.LlamaConfig", DEEPSEEK_SPLIT, {}),
    "gpt-oss": ("llama.LlamaConfig", GPT_OSS, {}),
    "yarn-no-factor": ("qwen3.Qwen3Config", YARN_WITHOUT_FACTOR, {}),
    "yarn-one-step": ("qwen3.Qwen3Config", YARN_OF_ONE_STEP, {}),
    "yarn-few-turns": ("qwen3.Qwen3Config", YARN_OF_FEW_TURNS, {}),
    "yarn-many-turns": ("qwen3.Qwen3Config", YARN_OF_MANY_TURNS, {}),
    "phi3-short": ("phi3.Phi3Config", PHI3, {"sequence_length": 4096}),
    "phi3-long": ("phi3.Phi3Config", PHI3, {"sequence_length": 4097}),
    "phi3-su": ("phi3.Phi3Config", PHI3_SU, {"sequence_length": 30000}),
    "phi4-mini": ("phi3.Phi3Config", PHI4_MINI, {"sequence_length": 30000}),
    "gemma3-full": ("gemma3.Gemma3TextConfig", GEMMA3, {"layer_type": "full_attention"}),
    "gemma3-sliding": ("gemma3.Gemma3TextConfig", GEMMA3, {"layer_type": "sliding_attention"}),
    "gemma4-full": ("llama.LlamaConfig", GEMMA4, {}),
}
BESIDE = ("rope_theta", "partial_rotary_factor", "max_position_embeddings", "original_max_position_embeddings")
ROTARY = {  # whose forward the tables are compared with
    "qwen3_5": "Qwen3_5TextRotaryEmbedding",
    "llama": "LlamaRotaryEmbedding",
    "qwen3": "Qwen3RotaryEmbedding",
    "phi3": "Phi3RotaryEmbedding",
    "gemma3": "Gemma3RotaryEmbedding",
}


def ours(raw, options):
    raw = copy.deepcopy(raw)
    parameters = raw["rope_parameters"] if "rope_parameters" in raw else raw["rope_scaling"]
    beside = {name: raw.get(name) for name in BESIDE}
    return rope.inv_frequencies(parameters, head_dim=raw["head_dim"], **beside, **options)


def model_of(path):
    """The modeling module and the configuration's class."""
    model, config = path.split(".")
    package = f"transformers.models.{model}"
    modeling = importlib.import_module(f"{package}.modeling_{model}")
    return modeling, getattr(importlib.import_module(f"{package}.configuration_{model}"), config)


class DoubleTorch:
    """torch, but where it says float32 it gets float64."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@pytest.mark.parametrize("case", CASES)
def test_frequencies_are_those_of_transformers_run_in_float64(case, monkeypatch):
    path, raw, options = CASES[case]
    modeling, config_class = model_of(path)
    config = config_class(**copy.deepcopy(raw))
    monkeypatch.setattr(rope_utils, "torch", DoubleTorch())
    monkeypatch.setattr(modeling, "torch", DoubleTorch())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    layer_type = options.get("layer_type")
    rope_type = (config.rope_parameters[layer_type] if layer_type else config.rope_parameters)["rope_type"]
    rotary = getattr(modeling, ROTARY[path.split(".")[0]])
    init = rope_utils.ROPE_INIT_FUNCTIONS.get(rope_type, rotary.compute_default_rope_parameters)
    want, want_factor = init(config, seq_len=options.get("sequence_length"), layer_type=layer_type)
    assert want.dtype == torch.float64

    inv_freq, factor = ours(raw, options)
    # A power of theta in two spellings, and blends of two frequencies.
    np.testing.assert_allclose(inv_freq, want.numpy(), rtol=2e-14, atol=0)
    assert factor == pytest.approx(want_factor, rel=1e-15)


@pytest.mark.parametrize("case", CASES)
def test_tables_are_those_of_transformers(case):
    """Within what its float32 loses, which is much at large positions and little at small ones."""
    path, raw, options = CASES[case]
    modeling, config_class = model_of(path)
    rotary = getattr(modeling, ROTARY[path.split(".")[0]])(config_class(**copy.deepcopy(raw)))
    length = options.get("sequence_length", 30000)  # dynamic and longrope go by the largest position plus 1
    positions = np.unique(np.append(np.random.default_rng(0).integers(0, length, 200), [0, 1, 2, 3, length - 1]))
    position_ids = torch.as_tensor(positions)[None]
    if path.startswith("qwen3_5"):  # older versions don't expand text's positions to mRoPE's three
        position_ids = position_ids.expand(3, 1, -1)
    layer_type = {"layer_type": options["layer_type"]} if "layer_type" in options else {}
    cos, sin = rotary(torch.zeros(1), position_ids, **layer_type)

    inv_freq, factor = ours(raw, options)
    half = len(inv_freq)
    cos, sin = cos[0].double().numpy(), sin[0].double().numpy()
    np.testing.assert_array_equal(cos[:, :half], cos[:, half:])  # transformers' rows hold each half twice
    want = np.concatenate([cos[:, :half], sin[:, :half]], axis=1)
    got = np.asarray(rope.cos_sin_cache(inv_freq, factor, max_position=length), np.float64)[positions]

    # Frequency: an exponent in [0, 1) that is rounded, a power, up to 6 products and quotients, in units of 2^-24;
    # a blend of f and f / factor is off by up to 4/3 factor times an error in its weight. Then the angle's product.
    roundoff = ROUNDOFF["float32"]
    parameters = raw.get("rope_scaling") or raw["rope_parameters"]
    parameters = parameters.get(options.get("layer_type"), parameters)
    theta = parameters.get("rope_theta", raw.get("rope_theta"))
    is_blend = (parameters.get("rope_type") or parameters["type"]) in ("yarn", "llama3")
    frequency = (math.log(theta) + 8) * roundoff * (4 / 3 * (parameters["factor"] or 4) if is_blend else 1)
    angle = positions[:, None] * inv_freq * (frequency + roundoff)
    bound = factor * (np.concatenate([angle, angle], axis=1) + 4 * roundoff)
    assert (abs(got - want) <= bound).all()
    assert abs(got - want)[positions < 4].max() < 2e-5


def test_fixed_alpha_is_that_of_hunyuan():
    modeling = pytest.importorskip("transformers.models.hunyuan_v1_dense.modeling_hunyuan_v1_dense")
    parameters = {"rope_type": "dynamic", "alpha": 1000.0, "factor": 1.0, "rope_theta": 1e4}
    config = types.SimpleNamespace(rope_parameters=dict(parameters), head_dim=128)
    embedding = modeling.HunYuanDenseV1RotaryEmbedding
    if not hasattr(embedding, "compute_ntk_alpha_rope_parameters"):
        pytest.skip("this version of transformers has the formula inside the module")
    want, _ = embedding.compute_ntk_alpha_rope_parameters(config)
    inv_freq, _ = rope.inv_frequencies(parameters, head_dim=128)
    np.testing.assert_allclose(inv_freq, want.numpy(), rtol=(math.log(1e8) + 8) * 2**-24)


MERGE = 2  # spatial_merge_size


def configurations():
    """One of each class of transformers that has RoPE, as it is without arguments."""
    transformers = pytest.importorskip("transformers")
    root = pathlib.Path(transformers.__file__).parent
    for file in sorted(root.glob("models/*/configuration_*.py")):
        if "rope_parameters" not in file.read_text():
            continue
        module = importlib.import_module(".".join(("transformers", *file.relative_to(root).with_suffix("").parts)))
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == module.__name__ and hasattr(cls, "rope_parameters"):
                yield cls()


def test_layer_types_are_told_as_every_configuration_of_transformers_does():
    if not hasattr(rope_utils.RotaryEmbeddingConfigMixin, "nested_rope_parameter_keys"):
        pytest.skip("this version of transformers doesn't say which keys are layer types")
    with_layer_types = without = 0
    for config in configurations():
        parameters = config.rope_parameters or {}
        # Names that no layer has by default count too: every dict in there is one of a layer type.
        layer_types = [name for name, value in parameters.items() if isinstance(value, dict)]
        declared = config.nested_rope_parameter_keys(parameters)
        assert bool(layer_types) == bool(declared), type(config)
        if not declared:
            without += 1
            if parameters.get("rope_type") in ("default", "linear"):
                more = {
                    "partial_rotary_factor": 1.0,
                    "note": {"a": 1},
                    "empty": None,
                }  # the class may mean another size
                rope.inv_frequencies(parameters | more, head_dim=2000)
            continue
        with_layer_types += 1
        with pytest.raises(ValueError, match=re.escape(f"layer_type must be one of {layer_types}, got None. ")):
            rope.inv_frequencies(parameters, head_dim=2000)
        for name in layer_types:
            got = rope.inv_frequencies(parameters, head_dim=2000, layer_type=name)
            want = rope.inv_frequencies(parameters[name], head_dim=2000)
            np.testing.assert_array_equal(got[0], want[0])
        for name in set(declared) - set(layer_types):
            assert parameters[name] is None
            with pytest.raises(ValueError, match="layer_type must be one of"):
                rope.inv_frequencies(parameters, head_dim=2000, layer_type=name)
    assert with_layer_types >= 15 and without >= 100


MERGED = {  # the rotary embedding that merges, its section and the name of that layout here
    "qwen3_5": ("Qwen3_5TextRotaryEmbedding", (11, 11, 10), "interleaved"),
    "qwen3_vl": ("Qwen3VLTextRotaryEmbedding", (24, 20, 20), "interleaved"),
    "qwen2_vl": ("Qwen2VLRotaryEmbedding", (16, 24, 24), "sectioned"),
    "neomme": ("NeoMMERotaryEmbedding", (16, 16), "interleaved"),
}


@pytest.mark.parametrize("model", MERGED)
def test_mrope_rows_are_merged_as_in_transformers(model):
    """Bit for bit, from our rows for each row of positions."""
    name, section, layout = MERGED[model]
    modeling = pytest.importorskip(f"transformers.models.{model}.modeling_{model}")
    self = types.SimpleNamespace(mrope_section=section)
    inv_freq = np.geomspace(1, 1e-5, sum(section))
    positions = np.random.default_rng(0).uniform(0, 1e6, (len(section), 7))
    merge = getattr(modeling, name).recomposition_frequencies
    halves = np.split(np.stack([rope.cos_sin_rows(row, inv_freq) for row in positions]), 2, axis=-1)
    want = [merge(self, torch.tensor(half)).numpy()[:, : sum(section)] for half in halves]
    got = rope.cos_sin_rows(positions, inv_freq, mrope_section=section, mrope_layout=layout)
    np.testing.assert_array_equal(got, np.concatenate(want, axis=1))


def positions_of_seconds(t, h, w, interval) -> float:
    """What a video with time in seconds takes, by the rule that the docstring gives for a table's length."""
    (rule,) = re.findall(r"max\(h, w, .* interval\)", rope.cos_sin_cache.__doc__)
    return eval(rule, {"t": t, "h": h, "w": w, "interval": interval})


VIDEOS = {  # seconds of a grid of frames; the videos of one sequence, (t, h, w) after the merge
    "long": (1.0, [(125, 1, 2)]),
    "short-and-large": (0.5, [(2, 9, 7)]),
    "two": (2.0, [(12, 3, 2), (60, 2, 2)]),
    "slow": (7.5, [(28, 3, 3)]),
}
TEXT = (5, 3, 4)  # tokens before, between and after


@pytest.mark.parametrize("videos", VIDEOS)
def test_positions_of_video_in_seconds_of_qwen2_5_vl(videos):
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    model, (seconds, grids) = modeling.Qwen2_5_VLModel, VIDEOS[videos]
    tokens_per_second = 4
    vision = types.SimpleNamespace(spatial_merge_size=MERGE, tokens_per_second=tokens_per_second)
    self = types.SimpleNamespace(config=types.SimpleNamespace(vision_config=vision))
    self.get_vision_position_ids = types.MethodType(model.get_vision_position_ids, self)
    kinds = [0] * TEXT[0]
    for grid in grids:
        kinds += [2] * math.prod(grid) + [0] * TEXT[1]
    kinds = torch.tensor([kinds])
    thw = torch.tensor([(t, MERGE * h, MERGE * w) for t, h, w in grids])
    positions, _ = model.get_rope_index(
        self, torch.zeros_like(kinds), kinds, video_grid_thw=thw, second_per_grid_ts=[seconds] * len(grids)
    )
    others = int((kinds == 0).sum())
    enough = others + sum(positions_of_seconds(*grid, seconds * tokens_per_second) for grid in grids)
    largest = int(positions.max())
    assert largest < enough
    version = importlib.metadata.version("transformers")
    cuts_seconds = tuple(map(int, version.split(".")[:2])) < (5, 23)  # to whole ones
    if len(grids) == 1 and not (cuts_seconds and seconds % 1):  # the rule is what the video takes, no more
        assert largest == max(enough - TEXT[1], TEXT[0] + max(grids[0][1:]) + TEXT[1]) - 1
    if videos != "short-and-large":
        assert largest >= kinds.shape[1], "the number of tokens is enough, so that this shows nothing"


@pytest.mark.parametrize("videos", VIDEOS)
def test_positions_of_video_in_seconds_of_qwen3_omni(videos):
    modeling = pytest.importorskip("transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe")
    model, (seconds, grids) = modeling.Qwen3OmniMoePreTrainedModelForConditionalGeneration, VIDEOS[videos]
    config = types.SimpleNamespace(
        image_token_id=1,
        video_token_id=2,
        audio_token_id=3,
        vision_start_token_id=4,
        audio_start_token_id=5,
        position_id_per_seconds=13,
    )
    self = types.SimpleNamespace(spatial_merge_size=MERGE, config=config)
    self.get_llm_pos_ids_for_vision = types.MethodType(model.get_llm_pos_ids_for_vision, self)
    ids = [0] * TEXT[0]
    for grid in grids:
        ids += [4] + [2] * math.prod(grid) + [6] + [0] * TEXT[1]  # between a start and an end
    ids = torch.tensor([ids])
    thw = torch.tensor([(t, MERGE * h, MERGE * w) for t, h, w in grids])
    positions, _ = model.get_rope_index(
        self, ids, None, thw, torch.ones_like(ids), second_per_grids=torch.tensor([seconds] * len(grids))
    )
    others = int((ids != 2).sum())
    enough = others + sum(positions_of_seconds(*grid, seconds * config.position_id_per_seconds) for grid in grids)
    assert positions.max() == enough - 1  # text goes on behind the last frame
    fractions = positions.numpy() % 1
    assert fractions.any() == (videos in ("short-and-large", "slow"))
    rows = rope.cos_sin_rows(jnp.asarray(positions.numpy()), np.array([1.0, 0.5, 0.25, 0.1]), mrope_section=(2, 1, 1))
    want = np.cos(positions.numpy()[0].astype(np.float64))
    np.testing.assert_allclose(rows[..., 0], want, atol=2e-7)


IMAGE, FRAME = (1, 4, 6), (1, 3, 5)
LAYOUTS = {
    "text": [9],
    "image": [3, IMAGE, 4],
    "tall-and-wide": [1, (1, 9, 2), 1, (1, 2, 9), 1],
    "image-first": [(1, 2, 2), 5],
    "image-last": [5, (1, 7, 3)],
    "one-token-image": [2, (1, 1, 1), 2],
    "video": [4, FRAME, 6, FRAME, 6, FRAME, 3],
    "image-and-videos": [3, IMAGE, 2, FRAME, 5, FRAME, 2, (1, 2, 2), 2, (1, 1, 4), 7],
    "grid-of-frames": [2, (3, 2, 4), 5],
    "more-frames-than-rows": [2, (6, 2, 2), 1, IMAGE],
}


def token_types(segments):
    """What a processor gives for segments: token types, and grids before the merge of images and of one video."""
    kinds = [0 if isinstance(segment, int) else 2 if segment == FRAME else 1 for segment in segments]
    types = [
        kind for kind, segment in zip(kinds, segments, strict=True) for _ in range(math.prod(np.atleast_1d(segment)))
    ]
    images = [s for kind, s in zip(kinds, segments, strict=True) if kind == 1]
    videos = [(kinds.count(2), *FRAME[1:])] if 2 in kinds else []
    return types, *([(t, MERGE * h, MERGE * w) for t, h, w in grids] for grids in (images, videos))


def rope_index(model, sequences, padding_side="right"):
    """transformers' positions (3, B, S), rope deltas and mask of a padded batch."""
    path = {"qwen3_5": "Qwen3_5Model", "qwen3_vl": "Qwen3VLModel"}
    modeling = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    cls = getattr(modeling, path[model])
    config = types.SimpleNamespace(vision_config=types.SimpleNamespace(spatial_merge_size=MERGE))
    self = types.SimpleNamespace(config=config)
    self.get_vision_position_ids = types.MethodType(cls.get_vision_position_ids, self)
    rows, images, videos = zip(*map(token_types, sequences), strict=True)
    longest = max(map(len, rows))
    padded, mask = np.zeros((2, len(rows), longest), np.int64)
    for b, row in enumerate(rows):
        where = slice(0, len(row)) if padding_side == "right" else slice(longest - len(row), longest)
        padded[b, where], mask[b, where] = row, 1
    grids = [list(itertools.chain.from_iterable(each)) for each in (images, videos)]
    tensors = [torch.as_tensor(grid) if grid else None for grid in grids]
    ids = torch.zeros(padded.shape, dtype=torch.int64)
    positions, deltas = cls.get_rope_index(
        self, ids, torch.as_tensor(padded), tensors[0], tensors[1], attention_mask=torch.as_tensor(mask)
    )
    return positions.numpy(), deltas.numpy()[:, 0]


@pytest.mark.parametrize("model", ["qwen3_5", "qwen3_vl"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_mrope_positions_are_those_of_transformers(layout, model):
    want, delta = rope_index(model, [LAYOUTS[layout]])
    positions, next_position = rope.mrope_positions(LAYOUTS[layout])
    np.testing.assert_array_equal(positions, want[:, 0])
    assert next_position - positions.shape[1] == delta[0]


@pytest.mark.parametrize("padding_side", ["right", "left"])
def test_a_padded_batch_is_that_of_transformers(padding_side):
    layouts = list(LAYOUTS.values())
    want, deltas = rope_index("qwen3_5", layouts, padding_side)
    each = [rope.mrope_positions(layout) for layout in layouts]
    missing = [want.shape[2] - positions.shape[1] for positions, _ in each]
    widths = [(0, n) if padding_side == "right" else (n, 0) for n in missing]
    got = np.stack([np.pad(p, ((0, 0), width)) for (p, _), width in zip(each, widths, strict=True)], 1)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal([end - positions.shape[1] for positions, end in each], deltas)
