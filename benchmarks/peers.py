"""Kernels of other projects, loaded from a Triton source file that is given by path and timed beside ours.

The file must define `fused_qk_rmsnorm_rope_gate` or `triton_reshape_and_cache_flash` with the parameters of vLLM's. The
second is a writer of KV caches, for the suite `kv_cache`. vLLM itself need not be installed: what such a file imports
from it on an NVIDIA GPU is stood in for, `vllm.triton_utils` by the installed triton.
"""

import ast
import functools
import importlib.util
import pathlib
import sys
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks.providers import Builder, Call, Writer, torch_inputs
from tests.cases import Case, Inputs

OP, WRITER = "fused_qk_rmsnorm_rope_gate", "triton_reshape_and_cache_flash"


class Peer(NamedTuple):
    """A provider for `run`, and the modules that were stood in for when its file was loaded."""

    name: str
    build: Builder | Writer
    stood_in: tuple[str, ...]


def load(text: str) -> Peer:
    """A peer from "NAME=FILE" or "FILE" (then named by the file's stem).

    Raises:
      ValueError: the file isn't there, imports more of vLLM than can be stood in for, or defines neither function.
    """
    name, separator, path_text = text.partition("=")
    path = pathlib.Path(path_text if separator else text)
    name = name if separator else path.stem
    if not name or not path.is_file():
        raise ValueError(f"a peer is FILE or NAME=FILE with a Triton source file, got {text!r}.")
    wanted = sorted(set(_imports(ast.parse(path.read_text(encoding="utf-8"), str(path)))))
    absent = [module for module in wanted if importlib.util.find_spec(module.partition(".")[0]) is None]
    stand_ins = _stand_ins()
    if unknown := [module for module in absent if module not in stand_ins]:
        known = ", ".join(sorted(stand_ins))
        raise ValueError(f"{path} may import nothing that isn't installed but {known}, got {unknown}.")
    module = _import(name, path, stand_ins if absent else {})
    if op := getattr(module, OP, None):
        return Peer(name, functools.partial(_build, op), tuple(absent))
    if writer := getattr(module, WRITER, None):
        return Peer(name, Writer(functools.partial(_write, writer)), tuple(absent))
    raise ValueError(
        f"{path} must define {OP} or {WRITER}, got neither. "
        "See vLLM's fused_qk_norm_rope.py and triton_reshape_and_cache_flash.py."
    )


def _imports(tree: ast.AST) -> Iterator[str]:
    """The full names of the modules that are imported with a file: not by a function of it, once it is called."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _imports(node)


def _stand_ins() -> dict[str, dict[str, Any]]:
    """What a file gets of vLLM, by module: the little that the two functions use, as it is on an NVIDIA GPU."""
    import torch
    import triton
    import triton.language as tl

    platform = types.SimpleNamespace(
        is_rocm=lambda: False,
        is_xpu=lambda: False,
        has_device_capability=lambda number: torch.cuda.get_device_capability() >= divmod(number, 10),
        fp8_dtype=lambda: torch.float8_e4m3fn,
    )
    return {
        "vllm": {},
        "vllm.triton_utils": {"triton": triton, "tl": tl},
        "vllm.platforms": {"current_platform": platform},
        "vllm.v1.kv_cache_interface": {
            "KVQuantMode": object,  # named in signatures alone
            "is_quantized_kv_cache": lambda cache_dtype: cache_dtype.startswith("fp8"),
        },
        "vllm.model_executor.layers.quantization.utils.quant_utils": {
            "FP8_DTYPE": torch.float8_e4m3fn,
            "get_fp8_min_max": lambda: (-448.0, 448.0),
        },
    }


def _import(name: str, path: pathlib.Path, stand_ins: dict[str, dict[str, Any]]) -> types.ModuleType:
    """The file as a module under a name of its own; the stand-ins are there while it is imported, and no longer."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_peer_{name}", path)
    assert spec is not None and spec.loader is not None, path
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    for full_name, contents in stand_ins.items():
        sys.modules[full_name] = types.ModuleType(full_name)
        vars(sys.modules[full_name]).update(contents)
    try:
        spec.loader.exec_module(module)
    finally:
        for full_name in stand_ins:
            del sys.modules[full_name]
    return module


def _build(function: Any, case: Case, inputs: Inputs) -> Call:
    if case.dtype == "float32":
        raise NotImplementedError("it takes float16 and bfloat16 activations, got float32")
    if case.rotation != "halves":
        raise NotImplementedError(f"it rotates halves, got rotation={case.rotation!r}")
    if not case.round_norm:
        raise NotImplementedError("it rounds between norm and rotation, got round_norm=False")
    if inputs.q_gate.size >= 2**31:  # it would read outside the array, and the process would lose its GPU
        raise NotImplementedError(f"its offsets are 32 bits wide, got {inputs.q_gate.size:,} elements of q_gate")
    static: dict[str, Any] = case.static_arguments
    return functools.partial(function, *torch_inputs(inputs), **static)


def _write(function: Any, k: Any, v: Any, k_cache: Any, v_cache: Any, slots: Any, *scales: Any) -> None:
    """With the parameters of the oracle's writer."""
    import torch

    if k_cache.dtype == torch.float8_e5m2:
        raise NotImplementedError("its 8-bit caches are float8_e4m3fn, got float8_e5m2")
    if any(scale.numel() > 1 for scale in scales):
        raise NotImplementedError(f"it takes one scale for all heads, got {scales[0].numel()} and {scales[1].numel()}")
    cache_dtype = "fp8" if scales else "auto"
    function(k, v, k_cache, v_cache, slots, cache_dtype, *(scales or (None, None)))
