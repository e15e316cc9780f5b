"""Kernels of other projects, loaded from a Triton source file that is given by path and timed beside ours.

The file must define `fused_qk_rmsnorm_rope_gate` with the parameters of vLLM's. vLLM itself need not be installed: of
all that such a file imports from it, `vllm.triton_utils` alone is stood in for, by the installed triton.
"""

import ast
import functools
import importlib.util
import pathlib
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.providers import Builder, Call, torch_inputs
from tests.cases import Case, Inputs

FUNCTION = "fused_qk_rmsnorm_rope_gate"
_STAND_INS = ("vllm", "vllm.triton_utils")


class Peer(NamedTuple):
    """A provider for `run`, and the modules that were stood in for when its file was loaded."""

    name: str
    build: Builder
    stood_in: tuple[str, ...]


def load(text: str) -> Peer:
    """A peer from "NAME=FILE" or "FILE" (then named by the file's stem).

    Raises:
      ValueError: the file isn't there, imports more of vLLM than can be stood in for, or defines no such function.
    """
    name, separator, path_text = text.partition("=")
    path = pathlib.Path(path_text if separator else text)
    name = name if separator else path.stem
    if not name or not path.is_file():
        raise ValueError(f"a peer is FILE or NAME=FILE with a Triton source file, got {text!r}.")
    wanted = sorted(set(_imports(ast.parse(path.read_text(encoding="utf-8"), str(path)))))
    absent = [module for module in wanted if importlib.util.find_spec(module.partition(".")[0]) is None]
    if unknown := [module for module in absent if module not in _STAND_INS]:
        raise ValueError(f"{path} may import nothing that isn't installed but vllm.triton_utils, got {unknown}.")
    module = _import(name, path, stand_in=bool(absent))
    function = getattr(module, FUNCTION, None)
    if function is None:
        raise ValueError(f"{path} must define {FUNCTION}, got none. See vLLM's fused_qk_norm_rope.py.")
    return Peer(name, functools.partial(_build, function), tuple(absent))


def _imports(tree: ast.Module) -> Iterator[str]:
    """The full names of the modules that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def _import(name: str, path: pathlib.Path, *, stand_in: bool) -> types.ModuleType:
    """The file as a module under a name of its own; the stand-ins are there while it is imported, and no longer."""
    import triton
    import triton.language as tl

    spec = importlib.util.spec_from_file_location(f"benchmarks_peer_{name}", path)
    assert spec is not None and spec.loader is not None, path
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    stand_ins = {}
    if stand_in:
        package, utilities = (types.ModuleType(full_name) for full_name in _STAND_INS)
        vars(utilities).update(triton=triton, tl=tl)
        stand_ins = {"vllm": package, "vllm.triton_utils": utilities}
    sys.modules.update(stand_ins)
    try:
        spec.loader.exec_module(module)
    finally:
        for full_name in stand_ins:
            del sys.modules[full_name]
    return module


def _build(function: Any, case: Case, inputs: Inputs) -> Call:
    if case.dtype == "float32":
        raise NotImplementedError("it takes float16 and bfloat16 activations, got float32")
    if inputs.q_gate.size >= 2**31:  # it would read outside the array, and the process would lose its GPU
        raise NotImplementedError(f"its offsets are 32 bits wide, got {inputs.q_gate.size:,} elements of q_gate")
    static: dict[str, Any] = case.static_arguments
    return functools.partial(function, *torch_inputs(inputs), **static)
