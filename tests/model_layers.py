"""transformers' attention layers that normalise q and k, small and seeded, and the q and k that they attend with."""

import contextlib
import dataclasses
import functools
import importlib
import unittest.mock
from collections.abc import Callable

import torch

LENGTH, MAX_POSITION, HEAD_DIM = 7, 64, 16
PREFIX = 2  # tokens of a vision transformer in front of its patches
CONTEXT = 3  # tokens whose keys the others attend to, such as an image's
SIZES = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "num_hidden_layers": 6,
    "max_position_embeddings": MAX_POSITION,
    "rms_norm_eps": 1e-5,  # and so all in one compiled program, where nothing else differs
    "norm_eps": 1e-5,
}
ATTENTION = "hands_over_q_and_k"  # as transformers' table of attention functions has it


def by_place(attention, config, index: int):
    return attention(config, index)


def by_position(rotary, hidden, positions, **layer_type):
    return rotary(hidden, positions, **layer_type)


def with_mask(layer, hidden, embedding, **more):
    return layer(hidden, position_embeddings=embedding, attention_mask=None, **more)


def without_rotation(layer, hidden, embedding):
    return layer(hidden, position_embeddings=None, attention_mask=None)


def q_and_k(q, k, v):
    return q, k


def as_given(*attended):
    return attended


@dataclasses.dataclass(frozen=True)
class Layer:
    """One kind of layer of a family; the names of classes are without the family's prefix."""

    prefix: str
    attention: str = "Attention"
    config: str = "Config"
    rotary: str | None = "RotaryEmbedding"
    sizes: dict = dataclasses.field(default_factory=dict)  # of the configuration, next to SIZES
    index: int = 0
    layer_type: str | None = None  # where the cosines depend on it
    build: Callable = by_place
    axes: int = 1  # of positions, in front of the batch; 0: each token has two
    embed: Callable = by_position
    forward: Callable = with_mask
    projections: dict[str, str] = dataclasses.field(default_factory=lambda: QK)  # by the page's word for their outputs
    given_to: dict[str, str] = dataclasses.field(default_factory=dict)  # modules, by the page's word for their inputs
    attended: Callable = q_and_k  # what the calls must give, of what attention gets, or of what `forward` returns
    k_positions: Callable = lambda positions: positions  # of k's tokens, where they aren't q's
    norms: tuple[str, ...] = ("q_norm", "k_norm")
    batch: tuple[int, ...] = (2,)
    donor: tuple[str, str] | None = None  # the family and prefix of the configuration and the rotary embedding


@dataclasses.dataclass(frozen=True)
class Run:
    """What one forward pass took and gave."""

    layer: torch.nn.Module
    config: object  # that the layer reads
    inputs: dict[str, torch.Tensor]  # of the calls, by word
    weights: list[torch.Tensor | None]  # of the norms
    eps: float
    positions: torch.Tensor  # of q's tokens, or of all
    k_positions: torch.Tensor
    embedding: object  # cosines and sines of the tokens, as transformers has them
    every: object  # and of each position
    attended: tuple[torch.Tensor, ...]  # what the calls must give: (..., tokens, heads, head_dim)
    output: torch.Tensor | None  # of attention by ones


class Seen(Exception):  # noqa: N818
    """Ends a forward pass at its attention."""


def class_of(family: str, kind: str, name: str) -> Callable:
    return getattr(importlib.import_module(f"transformers.models.{family}.{kind}_{family}"), name)


def run(family: str, layer: Layer, dtype: torch.dtype, *, to_the_end: bool) -> Run:
    """One pass over random tokens. `to_the_end`: attention gives ones, and its output isn't projected."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    donor, prefix = layer.donor or (family, layer.prefix)
    config = class_of(donor, "configuration", prefix + layer.config)(**SIZES | layer.sizes)
    torch.manual_seed(0)
    module = layer.build(class_of(family, "modeling", layer.prefix + layer.attention), config, layer.index)
    module = module.to(dtype).eval()
    with torch.no_grad():
        for weight in module.parameters():
            weight.normal_(std=0.125 if weight.ndim > 1 else 0.3)
        norms = [getattr(module, name) for name in layer.norms]
        for norm in norms:
            if hasattr(norm, "weight"):
                norm.weight.add_(float(type(norm)(4).weight[0]))  # around ones, or zeros where 1 is added
    inputs: dict = {}
    for word, name in layer.projections.items():

        def projects(_, __, out, word=word):
            inputs[word if word not in inputs else f"encoder_{word}"] = out

        getattr(module, name).register_forward_hook(projects)
    for word, name in layer.given_to.items():
        getattr(module, name).register_forward_pre_hook(lambda _, given, word=word: inputs.update({word: given[0]}))
    received: list[torch.Tensor] = []

    def attention(module, query, key, value, *arguments, **named):
        heads_behind = (x.transpose(1, 2) for x in (query, key, value))
        received.extend(x.reshape(*layer.batch, -1, *x.shape[-2:]) for x in heads_behind)
        if not to_the_end:
            raise Seen
        return torch.ones_like(query).transpose(1, 2), None

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
    config_of_layer = getattr(module, "config", config)
    config_of_layer._attn_implementation = ATTENTION
    shape = (*layer.batch, LENGTH)
    hidden = torch.randn(*shape, config.hidden_size).to(dtype)
    every = torch.arange(MAX_POSITION)
    if layer.axes:
        positions = torch.randint(MAX_POSITION, (layer.axes, *shape) if layer.axes > 1 else shape)
        every = every[None].expand(layer.axes, 1, -1) if layer.axes > 1 else every[None]
    else:
        positions, every = torch.randint(MAX_POSITION, (*shape, 2)), torch.stack([every, every], -1)
    embedding = table = None
    if layer.rotary:
        rotary = class_of(donor, "modeling", prefix + layer.rotary)(getattr(config, "atom_encoder", config))
        named = {"layer_type": layer.layer_type} if layer.layer_type else {}
        embedding, table = (layer.embed(rotary, hidden, at, **named) for at in (positions, every))
    output: tuple = (None,)
    if to_the_end:
        module.o_proj = torch.nn.Identity()
    with torch.no_grad(), contextlib.suppress(Seen):
        output = layer.forward(module, hidden, embedding)
    attended = layer.attended(*(received or output))
    if layer.given_to:
        inputs |= {word: inputs[word].reshape(x.shape) for word, x in zip(layer.given_to, attended, strict=True)}
    return Run(
        module,
        config_of_layer,
        inputs,
        [getattr(norm, "weight", None) for norm in norms],
        getattr(norms[0], "variance_epsilon", None) or norms[0].eps,
        positions,
        layer.k_positions(positions),
        embedding,
        table,
        attended,
        output[0],
    )


def text(prefix: str, **more) -> Layer:
    names = {"attention": "TextAttention", "config": "TextConfig", "rotary": "TextRotaryEmbedding"}
    return Layer(prefix, **names | more)


def over_images(layer, hidden, embedding):
    return layer(hidden, position_embeddings=embedding, cu_seqlens=torch.tensor([0, len(hidden)]))


def vision(prefix: str, **more) -> Layer:
    """Of the patches of all images in one sequence."""
    names = {"attention": "VisionAttention", "config": "VisionConfig", "rotary": "VisionRotaryEmbedding"}
    build = {
        "build": lambda attention, config, index: attention(config),
        "projections": {"qkv": "qkv"},
        "attended": as_given,
    }
    axial = {"rope_parameters": {"rope_type": "axial", "rope_theta": 1e4}}
    sizes = {"sizes": axial | more.pop("sizes", {})}
    return Layer(prefix, **names | build | {"forward": over_images, "axes": 0, "batch": ()} | sizes | more)


def mrope(factor: float, *section: int) -> dict:
    """Sizes of a configuration whose frequencies read three rows of positions."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(section), "mrope_interleaved": True}
    return {"rope_parameters": rope | {"partial_rotary_factor": factor}}


def both(name: str, layer: Callable, **more) -> dict[str, Layer]:
    """The layers of a family that rotates in those with a sliding window and nowhere else."""
    return {f"{name} sliding": layer(sizes=HYBRID, **more), f"{name} full": layer(sizes=HYBRID, index=1, **more)}


def with_shared(layer, hidden, embedding):
    return with_mask(layer, hidden, embedding, shared_kv_states={})


def with_reused(layer, hidden, embedding):
    """Of a layer that attends with another one's k and v."""
    k = torch.ones(len(hidden), 2, LENGTH, layer.head_dim)
    # Transformers 5.17 names the other layer by its index, later ones by its type.
    by_name = dict.fromkeys((layer.layer_type, getattr(layer, "kv_shared_layer_index", None)), (k, k))
    return with_mask(layer, hidden, embedding, shared_kv_states=by_name)


def across(name: str) -> Callable:
    """Of a layer whose keys are those of the context alone, which is the argument of this name."""
    return lambda layer, hidden, embedding: layer(hidden[:, CONTEXT:], **{name: hidden[:, :CONTEXT]})


def behind_context(layer, hidden, embedding):
    """Of a layer whose keys are those of the context and of its own tokens."""
    own, context = hidden[:, CONTEXT:], hidden[:, :CONTEXT]
    return with_mask(layer, own, embedding, context_hidden_states=context)


def merged(layer, hidden, embedding):
    """Of a layer that attends to its own tokens and to an encoder's, which are the context."""
    own, encoder = hidden[:, CONTEXT:], hidden[:, :CONTEXT]
    rows = [x[:, CONTEXT:] for x in embedding]
    return layer(own, position_embeddings=rows, merged_attention_mask=None, encoder_hidden_states=encoder)


def own_and_encoders(q, k, v):
    return q, k[:, :-CONTEXT], k[:, -CONTEXT:]


def of_deepseek(layer, hidden, embedding):
    return with_mask(layer, hidden, {layer.rope_layer_type: embedding}, position_ids=None)


def with_compressor(layer, hidden, embedding):
    """Of a layer of DeepSeek V4 that makes one key of each window of tokens."""
    latents = torch.randn(len(hidden), LENGTH, DEEPSEEK["q_lora_rank"]).to(hidden.dtype)
    return layer(hidden, latents, torch.arange(LENGTH).expand(len(hidden), -1), None, 0)


def keys_of_windows(keys, *mask):
    return (keys.transpose(1, 2),)


def with_indexer(layer, hidden, embedding):
    """What a compressor gives; here the keys that the scores read."""
    scored: list = []
    layer.scorer.register_forward_pre_hook(lambda _, given: scored.append(given[1]))
    with_compressor(layer, hidden, embedding)
    return (scored[0][:, :, None],)


def of_windows(rate: int) -> Callable:
    """Of the first token of each whole window of sequences that start at position 0."""
    return lambda positions: torch.arange(LENGTH // rate).expand(len(positions), -1) * rate


def with_blocks(layer, hidden, embedding):
    """q, and the keys that the last token's scores read: means over blocks of the last sequence."""
    modeling = importlib.import_module(type(layer).__module__)
    rotate, rotated = modeling.apply_rotary_pos_emb, []

    def rotates(*given, **named):
        rotated.append(rotate(*given, **named))
        return rotated[-1]

    with unittest.mock.patch.object(modeling, "apply_rotary_pos_emb", rotates):
        with_causal_mask(layer, hidden, embedding, past_key_values=None)
    return rotated[0], rotated[-1]


def of_blocks(positions):
    """Of the first token of each whole block of the last sequence."""
    size = INDEXER["indexer_compress_ratio"]
    return positions[:, -1, : LENGTH // size * size : size]


def shared_key(q, k, v):
    """The rotated lanes of the key that all heads share, each next to its partner, where transformers has halves."""
    return (k[..., :1, -HEAD_DIM:].unflatten(-1, (2, -1)).mT.flatten(-2),)


def of_inkling(layer, hidden, embedding):
    return layer(hidden, attention_mask=None)


def with_causal_mask(layer, hidden, embedding, **more):
    mask = torch.ones(len(hidden), 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    return layer(hidden, position_embeddings=embedding, attention_mask=mask, **more)


def with_own_rotation(layer, hidden, embedding):
    """Of a layer that computes its cosines and sines itself."""
    del layer.rotary_emb
    layer.rotary_emb = torch.nn.Module()
    layer.rotary_emb.forward = lambda values, positions: embedding
    return layer(hidden)


def of_atoms(rotary, hidden, positions):
    """From places in space and the residue's number."""
    return rotary(positions[:3].movedim(0, -1) / 8, positions[3], hidden.dtype)


def of_patches(rotary, hidden, positions):
    """Of an image of a column of patches, behind the prefix."""
    return rotary(torch.zeros(1, 3, (LENGTH - PREFIX) * 16, 16, dtype=hidden.dtype))


QK = {"q": "q_proj", "k": "k_proj"}
QKV = {"projections": QK | {"v": "v_proj"}, "attended": as_given}
LAYER_TYPES = ["sliding_attention", "full_attention"] * 3
ROPE = {"rope_type": "default", "rope_theta": 1e4}
HYBRID = {"layer_types": LAYER_TYPES, "sliding_window": 4}
SPLIT = HYBRID | {"rope_parameters": dict.fromkeys(LAYER_TYPES, ROPE)}
PARTIAL = HYBRID | {"rope_parameters": dict.fromkeys(LAYER_TYPES, ROPE | {"partial_rotary_factor": 0.5})}
SLIDING, FULL = ({"layer_type": name, "index": index} for index, name in enumerate(LAYER_TYPES[:2]))
GATED = {"sizes": mrope(0.5, 2, 1, 1), "axes": 3}

HUNYUAN = {"norms": ("query_layernorm", "key_layernorm")}

INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": HEAD_DIM,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}

DEEPSEEK = {
    "q_lora_rank": 32,
    "num_key_value_heads": 1,
    "partial_rotary_factor": 0.5,
    "o_groups": 2,
    "layer_types": LAYER_TYPES[:1] * 6,
}
WINDOWS = {
    "sizes": DEEPSEEK
    | {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 3},
        "index_n_heads": 2,
        "index_head_dim": HEAD_DIM,
        "index_topk": 2,
    },
    "build": lambda attention, config, index: attention(config),
    "layer_type": "compress",
    "forward": with_compressor,
    "attended": keys_of_windows,
    "projections": {},
    "given_to": {"k": "kv_norm"},
    "norms": ("kv_norm",),
}

WIDE = HYBRID | {"global_head_dim": 2 * HEAD_DIM, "num_global_key_value_heads": 1}
K_IS_V = FULL | {"sizes": WIDE | {"attention_k_eq_v": True}, "forward": with_shared, "attended": as_given}
REUSING = SLIDING | {
    "sizes": HYBRID | {"num_kv_shared_layers": 2},
    "index": 4,
    "forward": with_reused,
    "attended": lambda q, k, v: (q,),
    "projections": {"q": "q_proj"},
    "norms": ("q_norm",),
}

LAYERS: dict[str, Layer] = {
    **both("afmoe", functools.partial(Layer, "Afmoe")),
    "apertus": Layer("Apertus"),
    "beam sliding": Layer("Beam", sizes=SPLIT, **SLIDING),
    "beam full": Layer("Beam", sizes=SPLIT, forward=without_rotation, **FULL),
    "deepseek_v4": Layer(
        "DeepseekV4",
        sizes=DEEPSEEK,
        layer_type="main",
        forward=of_deepseek,
        projections={"q": "q_b_proj", "k": "kv_proj"},
        norms=("q_b_norm", "kv_norm"),
    ),
    "deepseek_v4 HCA compressor": Layer("DeepseekV4", attention="HCACompressor", k_positions=of_windows(3), **WINDOWS),
    "deepseek_v4 CSA compressor": Layer("DeepseekV4", attention="CSACompressor", k_positions=of_windows(2), **WINDOWS),
    "deepseek_v4 CSA indexer": Layer(
        "DeepseekV4",
        attention="Indexer",
        k_positions=of_windows(2),
        **WINDOWS | {"forward": with_indexer, "attended": as_given},
    ),
    "diffusion_gemma sliding": text("DiffusionGemma", attention="EncoderTextAttention", **SLIDING, **QKV),
    "diffusion_gemma full": text(
        "DiffusionGemma", attention="EncoderTextAttention", sizes=WIDE, attended=as_given, **FULL
    ),
    "doge": Layer("Doge"),
    "dots1": Layer("Dots1"),
    "dots3_note text": text(
        "Dots3Note",
        sizes={
            "layer_types": LAYER_TYPES[:1] * 6,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 4,
            "swa_q_lora_rank": 32,
            "swa_kv_lora_rank": 32,
            "swa_head_dim": 2 * HEAD_DIM,
            "swa_qk_nope_head_dim": HEAD_DIM,
        },
        attended=shared_key,
        projections={},
        given_to={"k": "k_rope_only_layernorm"},
        norms=("k_rope_only_layernorm",),
        **SLIDING,
    ),
    "dots3_note vision": vision("Dots3Note", sizes={"num_hidden_layers": 42, "adapter_in_dim": 64}),
    "embedding_gemma2": text("EmbeddingGemma2", attention="Attention", rotary="RotaryEmbedding", **SLIDING, **QKV),
    "esmfold2 atoms": Layer(
        "EsmFold2",
        attention="AtomAttention",
        sizes={"atom_encoder": {"hidden_size": 64, "num_spatial_rope_pairs_per_axis": 1, "num_uid_rope_pairs": 4}},
        build=lambda attention, config, index: attention(config, config.atom_encoder),
        axes=4,
        embed=of_atoms,
    ),
    **both("exaone4", functools.partial(Layer, "Exaone4")),
    **both("exaone4_5", functools.partial(Layer, "Exaone4_5_", donor=("exaone4", "Exaone4"))),
    **both("exaone_moe", functools.partial(Layer, "ExaoneMoe")),
    **both("flint", functools.partial(Layer, "Flint")),
    "gemma3": Layer("Gemma3", config="TextConfig", sizes=SPLIT, **FULL),
    "gemma3n": text(
        "Gemma3n", rotary="RotaryEmbedding", forward=with_shared, sizes={"num_kv_shared_layers": 0}, **SLIDING, **QKV
    ),
    "gemma3n with another layer's k and v": text("Gemma3n", rotary="RotaryEmbedding", **REUSING),
    "gemma4 text": text("Gemma4", forward=with_shared, **SLIDING, **QKV),
    "gemma4 text, where k is v": text("Gemma4", **K_IS_V),
    "gemma4 text, with another layer's k and v": text("Gemma4", **REUSING),
    "gemma4_unified": text("Gemma4Unified", forward=with_shared, **SLIDING, **QKV),
    "gemma4_unified where k is v": text("Gemma4Unified", **K_IS_V),
    "gemma4_unified with another layer's k and v": text("Gemma4Unified", **REUSING),
    "glm4_moe": Layer("Glm4Moe", sizes={"use_qk_norm": True}),
    "glm5_next vision": vision("Glm5Next", sizes={"num_heads": 4}),
    "glm_ocr vision": vision("GlmOcr", sizes={"num_heads": 4}),
    "hunyuan_v1_dense": Layer("HunYuanDenseV1", **HUNYUAN),
    "hunyuan_v1_moe": Layer("HunYuanMoEV1", **HUNYUAN),
    "hy_v3": Layer("HYV3"),
    "idefics self-attention": Layer(
        "Idefics",
        build=lambda attention, config, index: attention(64, 4, config=config, qk_layer_norms=True, layer_idx=index),
        norms=("q_layer_norm", "k_layer_norm"),
        forward=with_own_rotation,
    ),
    "idefics cross-attention": Layer(
        "Idefics",
        build=lambda attention, config, index: attention(
            64, 4, config=config, is_cross_attention=True, qk_layer_norms=True, layer_idx=index
        ),
        sizes={"vision_config": {"embed_dim": 64}},
        rotary=None,
        norms=("q_layer_norm", "k_layer_norm"),
        forward=across("key_value_states"),
    ),
    "inkling": text(
        "Inkling",
        attention="Attention",
        rotary=None,
        sizes={"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": HEAD_DIM},
        forward=of_inkling,
        projections={"q": "q_proj", "k": "k_sconv"},
    ),
    **both("kolibri1", functools.partial(Layer, "Kolibri1")),
    "laguna": Layer(
        "Laguna", build=lambda attention, config, index: attention(config, index, 4), sizes=PARTIAL, **FULL
    ),
    "lfm2": Layer("Lfm2", norms=("q_layernorm", "k_layernorm")),
    "lfm2_moe": Layer("Lfm2Moe", norms=("q_layernorm", "k_layernorm")),
    "lfm3": Layer("Lfm3", sizes=SPLIT, **FULL),
    "lfm3_vl vision": vision("Lfm3Vl", build=by_place, projections=QK, attended=q_and_k),
    "llama4": text("Llama4", norms=("qk_norm", "qk_norm")),
    "mellum": Layer("Mellum", sizes=SPLIT, **FULL),
    "minimax_m3_vl": Layer(
        "MiniMaxM3VL", config="TextConfig", sizes={"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}
    ),
    "mllama cross-attention": text(
        "Mllama", attention="TextCrossAttention", rotary=None, forward=across("cross_attention_states")
    ),
    "molmo2": Layer("Molmo2", config="TextConfig", sizes={"qk_norm_type": "qwen3"}),
    "muse_glimmer with RoPE": text("MuseGlimmer", norms=("qk_norm", "qk_norm"), sizes={"qk_scale_factor": 1.5}),
    "muse_glimmer without RoPE": text(
        "MuseGlimmer", norms=("qk_norm", "qk_norm"), sizes={"qk_scale_factor": 1.5}, forward=without_rotation
    ),
    "muse_glimmer_assistant": Layer("MuseGlimmerAssistant", forward=behind_context),
    "muse_spark with RoPE": text("MuseSpark", norms=("qk_norm", "qk_norm"), sizes={"qk_scale_factor": 1.5}),
    "muse_spark without RoPE": text(
        "MuseSpark", norms=("qk_norm", "qk_norm"), sizes={"qk_scale_factor": 1.5}, forward=without_rotation
    ),
    "nanochat": Layer("NanoChat"),
    "neomme": Layer("NeoMME", sizes=PARTIAL, axes=2, **FULL),
    "pe_audio": Layer("PeAudioEncoder"),
    "pe_audio_video": Layer("PeAudioVideoEncoder"),
    "pe_video": Layer("PeVideoEncoder"),
    "qwen3": Layer("Qwen3"),
    "qwen3_5": text("Qwen3_5", attention="Attention", **GATED),
    "qwen3_5_moe": text("Qwen3_5Moe", attention="Attention", **GATED),
    "qwen3_moe": Layer("Qwen3Moe"),
    "qwen3_next": Layer("Qwen3Next"),
    "qwen3_omni_moe thinker": Layer(
        "Qwen3OmniMoe",
        attention="ThinkerTextAttention",
        config="TextConfig",
        rotary="ThinkerTextRotaryEmbedding",
        sizes=mrope(1.0, 3, 3, 2),
        axes=3,
    ),
    "qwen3_omni_moe code predictor": Layer(
        "Qwen3OmniMoe", attention="TalkerCodePredictorAttention", config="TalkerCodePredictorConfig"
    ),
    "qwen3_vl": text("Qwen3VL", sizes=mrope(1.0, 3, 3, 2), axes=3),
    "qwen3_vl_moe": text("Qwen3VLMoe", sizes=mrope(1.0, 3, 3, 2), axes=3),
    "qwen4_exp": text("Qwen4Exp", forward=with_causal_mask, **GATED | {"sizes": GATED["sizes"] | INDEXER}),
    "qwen4_exp indexer": text(
        "Qwen4Exp",
        attention="TextQSAIndexer",
        forward=with_blocks,
        attended=as_given,
        projections={},
        given_to={"q": "q_layernorm", "k": "k_layernorm"},
        k_positions=of_blocks,
        norms=("q_layernorm", "k_layernorm"),
        **GATED | {"sizes": GATED["sizes"] | INDEXER},
    ),
    "sapiens2": Layer("Sapiens2", rotary="RopePositionEmbedding", embed=of_patches, sizes={"image_size": 16}),
    "step3p7": Layer("Step3p7", config="TextConfig", sizes=PARTIAL, **FULL),
    "timesfm2_5": Layer("TimesFm2_5"),
    "t5gemma2 encoder": Layer("T5Gemma2", attention="SelfAttention", config="TextConfig", sizes=SPLIT, **FULL),
    "t5gemma2 decoder": Layer(
        "T5Gemma2",
        attention="MergedAttention",
        config="TextConfig",
        sizes=SPLIT,
        forward=merged,
        attended=own_and_encoders,
        **FULL,
    ),
}
