"""docs/models.md: its calls give what transformers' own attention layers attend with, and no family is missing.

q and k are compared, and v where the call returns it.

The calls are read from the page's first table and run on what a layer's projections give.
"""

import functools
import importlib.metadata
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_qk
from tests.cases import Case
from tests.pages import DOCS
from tests.qk_norm_families import families, norms_of
from tests.tolerances import float32_bound, worst_distances

torch = pytest.importorskip("torch", reason="the judge is transformers' layer")
pytest.importorskip("transformers", reason="the judge is transformers' layer")

from tests.model_layers import LAYERS, LENGTH, Run, run  # noqa: E402

PAGE = (DOCS / "models.md").read_text()
# One table per heading; the cells of each row.
TABLES = {
    heading: [[cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", part, re.M)[2:]]
    for heading, part in re.findall(r"^## (.*)\n([^#]*)", PAGE, re.M)
}
# Which layers, and the calls.
CALLS = {f"{row[0].strip('`')} {row[1]}".strip(): re.findall("`(.*?)`", row[2]) for row in TABLES["Expressed"]}


def listed(*headings: str) -> set[str]:
    return {name for heading in headings for row in TABLES[heading] for name in re.findall(r"`(\w+)`", row[0])}


def test_every_family_is_listed():
    """A family that this names is new in transformers, or has a norm that it hadn't."""
    tested_version = re.search(r"transformers (\d+\.\d+)", PAGE).group(1)
    installed = importlib.metadata.version("transformers")
    found, on_the_page = set(families()), listed("Expressed", "Not yet", "Not this op")
    assert sorted(found - on_the_page) == []
    if installed.startswith(tested_version):
        assert sorted(on_the_page - found) == []


def test_the_page_counts_its_families():
    counts = re.search(r"(\d+) of the (\d+) families", PAGE).groups()
    of_heads = listed("Expressed", "Not yet")
    assert counts == (str(len(listed("Expressed"))), str(len(of_heads)))


def test_every_call_has_a_layer():
    assert sorted(CALLS) == sorted(LAYERS)


SOURCE = """
class FooRMSNorm(nn.Module):
    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

class FooNorm(FooRMSNorm):
    pass

class FooAttention(nn.Module):
    def __init__(self, config):
        self.q_a_layernorm = FooRMSNorm(config.q_lora_rank)
        self.input_layernorm = FooRMSNorm(config.hidden_size)
        self.query_norm = FooNorm(config.head_dim, eps=1e-6) if config.use_qk_norm else nn.Identity()
        self.k_layer_norm = nn.LayerNorm(config.head_dim)
        self.norm_k = nn.Identity()
"""


def test_names_and_kinds_of_norms():
    found = [(norm.attribute, norm.kind, norm.arguments) for norm in norms_of(SOURCE)]
    assert found == [
        ("query_norm", "RMSNorm", "config.head_dim, eps=1e-06"),
        ("k_layer_norm", "LayerNorm", "config.head_dim"),
    ]


def to_jax(x: torch.Tensor) -> jax.Array:
    return jnp.asarray(x.detach().float().numpy()).astype(str(x.dtype).removeprefix("torch."))


def cos_and_sin(embedding) -> tuple[torch.Tensor, torch.Tensor]:
    """Each frequency once, from what a rotary embedding gives: every one twice or once, or complex numbers."""
    if torch.is_tensor(embedding):
        return embedding.real, embedding.imag
    half = embedding[0].shape[-1] // 2
    twice = torch.equal(*embedding[0].split(half, dim=-1))
    cos, sin = (x[..., :half] if twice else x for x in embedding)
    return cos, sin


def joined(cos: torch.Tensor, sin: torch.Tensor, *, front: int = 0, above: int = 0) -> torch.Tensor:
    """[cos | sin] behind frequencies, and below tokens, that aren't rotated."""
    pad = functools.partial(torch.nn.functional.pad, pad=(front, 0, above, 0))
    return torch.cat([pad(cos, value=1), pad(sin, value=0)], dim=-1)


def words_of(seen: Run) -> dict:
    """What the words of the page's calls stand for."""
    num_tokens, _, head_dim = seen.attended[0].shape[-3:]
    words: dict = {word: to_jax(x) for word, x in seen.inputs.items()}
    words |= {"q_gate": words.get("q"), "ones": jnp.ones(head_dim)}
    if seen.weights[-1] is not None:
        words["k_weight"] = to_jax(seen.weights[-1])
    if "v" in words:
        words["qkv"] = (words["q"], words["k"], words["v"])
    positions = {"positions": seen.positions[..., -num_tokens:], "k_positions": seen.k_positions}
    words |= {name: jnp.asarray(x.numpy(), jnp.int32) for name, x in positions.items()}
    words["factor"] = getattr(seen.config, "qk_scale_factor", None)
    if isinstance(scaling := getattr(seen.layer, "scaling", None), torch.Tensor):
        words["scaled"] = to_jax(seen.weights[0]) * jax.nn.softplus(to_jax(scaling)) * (1.442695041 / head_dim**0.5)
    if seen.embedding is None:
        return words
    cos, sin = cos_and_sin(seen.embedding)
    rows = joined(cos, sin, above=LENGTH - cos.shape[-2])
    cos, sin = (x.reshape(-1, x.shape[-1]) for x in cos_and_sin(seen.every))
    tables = {
        "rows": rows[..., -num_tokens:, :].expand(*seen.attended[0].shape[:-2], -1),
        "table": joined(cos, sin),
        "negated": joined(cos, -sin),
        "padded": joined(cos, sin, front=head_dim // 2 - cos.shape[-1]),
    }
    section = (getattr(seen.config, "rope_parameters", None) or {}).get("mrope_section")
    return words | {name: to_jax(x) for name, x in tables.items()} | {"partial": rows.shape[-1], "section": section}


def evaluate(calls: list[str], seen: Run) -> list[tuple[jax.Array, dict]]:
    """The outputs of a row's calls, with the arguments that the page leaves out, and the options of each output."""
    words, stored = words_of(seen), [None if weight is None else to_jax(weight) for weight in seen.weights]
    num_heads = [x.shape[-2] for x in seen.attended]
    found: list[tuple[jax.Array, dict]] = []

    def whole(name: str):
        def call(*arrays, q_weight=stored[0], k_weight=stored[-1], **given):
            *activations, table, positions = arrays
            alone = activations[1:] == [None]
            sizes = {"num_q_heads": num_heads[len(found)], "num_kv_heads": 0 if alone else num_heads[len(found) + 1]}
            options = {"eps": seen.eps, "head_dim": seen.attended[0].shape[-1], **sizes, **given}
            if table is not None:
                options.setdefault("rotary_dim", options["head_dim"])
            weights = q_weight, None if alone else k_weight
            outputs = getattr(pallas_qk, name)(*activations, *weights, table, positions, **options)
            found.extend((output, options) for output in outputs if output is not None)

        return call

    functions = {name: whole(name) for name in vars(pallas_qk) if name.startswith("fused_")}
    for call in calls:
        eval(call, words | functions)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
def test_q_and_k_are_those_of_transformers(name, dtype):
    family, calls = name.split()[0], CALLS[name]
    pytest.importorskip(f"transformers.models.{family}")
    gated = "_gate(" in calls[0]
    seen = run(family, LAYERS[name], getattr(torch, dtype), to_the_end=gated)
    outputs = evaluate(calls, seen)
    # bfloat16, in steps of the pair: at most 3 roundings of half a step in their rotation and one in ours, and one or
    # two steps where their norm, which may round before the weight too, lies apart. More than 3 steps were not seen.
    # A factor that they multiply q by afterwards is one more rounding.
    head_dim = seen.attended[0].shape[-1]
    bounds = {"bfloat16": 3 + ("scaled" in calls[0]), "float32": float32_bound(Case(1, head_dim=head_dim), tree=False)}
    for (got, options), want in zip(outputs[:2] if gated else outputs, seen.attended, strict=True):
        assert got.dtype == dtype
        rows = [x.reshape(-1, head_dim) for x in (got, to_jax(want))]
        rotated = options.get("rotary_dim", 0), options.get("rotation", "halves")
        assert max(worst_distances(*rows, head_dim, *rotated)) <= bounds[dtype]
    if gated:
        gate = torch.as_tensor(np.array(outputs[2][0], np.float32)).to(seen.output.dtype)
        np.testing.assert_array_equal(torch.sigmoid(gate).float().numpy(), seen.output.float().numpy())


def test_a_permutation_brings_the_lanes_of_gemma4s_vision_layers_into_place():
    modeling = pytest.importorskip("transformers.models.gemma4.modeling_gemma4")
    torch.manual_seed(0)
    heads, head_dim, part = 4, 16, 4
    norm = modeling.Gemma4RMSNorm(head_dim)
    torch.nn.init.normal_(norm.weight)
    x, angles = torch.randn(1, LENGTH, heads, head_dim), 6 * torch.rand(1, LENGTH, 2, part)
    twice = torch.cat([angles, angles], dim=-1).flatten(-2)
    want = modeling.apply_multidimensional_rope(norm(x), twice.cos(), twice.sin(), torch.zeros(1, LENGTH, 2))

    lanes = torch.arange(head_dim).reshape(2, 2, part).movedim(1, 0).flatten()
    rows = joined(angles.flatten(-2).cos(), angles.flatten(-2).sin())
    arrays = [to_jax(each[..., lanes]) for each in (x, x, norm.weight, norm.weight)]
    q_out, _ = pallas_qk.fused_qk_rmsnorm_rope(*arrays, to_jax(rows), None, norm.eps, heads, heads, head_dim, head_dim)
    pair = [y.reshape(-1, head_dim) for y in (q_out, to_jax(want[..., lanes]))]
    assert worst_distances(*pair, head_dim, head_dim, "halves")[0] <= float32_bound(
        Case(1, head_dim=head_dim), tree=False
    )
