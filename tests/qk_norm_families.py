"""Which families of transformers normalise q or k, read from its sources; run as a module it lists them.

A family is a folder of transformers/models. A norm counts by the name it is kept under, such as q_norm, k_layernorm,
query_layernorm, qk_norm or q_b_norm. Norms of the latent vectors in front of a projection don't count.
"""

import ast
import dataclasses
import importlib.util
import pathlib
import re

KEPT_AS = re.compile(r"(q|k|qk|kv|query|key)_(.*_)?(layer_?)?(norm|clip)|(.*_)?norm_(q|k|query|key)")
KEPT_IN = re.compile(rf"\bself\.({KEPT_AS.pattern}) *[:=]")  # what a file without any needn't be parsed for
IN_FRONT_OF_A_PROJECTION = re.compile(r"_a_|_input_")


@dataclasses.dataclass(frozen=True)
class Norm:
    """One assignment to an attribute."""

    owner: str  # the class that keeps it
    attribute: str
    kind: str  # "RMSNorm", "LayerNorm" or "other"
    arguments: str  # of the call that makes it, as they are written


def kind_of(name: str, classes: dict[str, ast.ClassDef]) -> str:
    """What a class computes, read from its body or from that of the class it is made from."""
    if name not in classes:
        return next((kind for kind in ("RMSNorm", "LayerNorm") if name.endswith(kind)), "other")
    body = ast.unparse(classes[name])
    if "nn.LayerNorm(" in body or re.search(r"\.var\(|- mean", body):
        return "LayerNorm"
    if re.search(r"(pow\(2\)|square\(\))\.mean\(", body):
        return "RMSNorm"
    bases = [kind_of(ast.unparse(base), classes) for base in classes[name].bases]
    return next((kind for kind in bases if kind != "other"), "other")


def norms_of(source: str) -> list[Norm]:
    """Of q and k, in the source of one modeling file."""
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    found = []
    for owner, tree in classes.items():
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute)):
                continue
            attribute = node.targets[0].attr
            if not KEPT_AS.fullmatch(attribute) or IN_FRONT_OF_A_PROJECTION.search(attribute):
                continue
            for call in ast.walk(node.value):
                if isinstance(call, ast.Call) and re.search("Norm|Clip", name := ast.unparse(call.func)):
                    arguments = ast.unparse(call).removeprefix(name)[1:-1]
                    found.append(Norm(owner, attribute, kind_of(name, classes), arguments))
    return found


def families() -> dict[str, list[Norm]]:
    """The norms of q and k of each family of the installed transformers that has any."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None and spec.origin is not None, "transformers is not installed"
    found: dict[str, list[Norm]] = {}
    for path in sorted(pathlib.Path(spec.origin).parent.glob("models/*/modeling_*.py")):
        source = path.read_text()
        if KEPT_IN.search(source):
            found.setdefault(path.parent.name, []).extend(norms_of(source))
    return {family: norms for family, norms in found.items() if norms}


if __name__ == "__main__":
    for family, norms in families().items():
        print(family)
        for norm in norms:
            print(f"    {norm.owner}.{norm.attribute}: {norm.kind}({norm.arguments})")
