"""The code that every form of a call emits, as hashes: the proof that a refactor changed no kernel.

python -m tests.emitted [--only TEXT]          what this tree emits
python -m tests.emitted REVISION [--only TEXT] which kernels differ from those of a commit, under the same JAX

It lowers the public functions without a GPU, for Hopper and for other GPUs, forward and backward, by both kernels, and
plain XLA for other platforms. Nothing is compiled. Only the public API is used and no other file of the tests, so that
one copy of this file runs with the package of any commit. A form whose function a commit lacks is absent there.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import re
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax._src.lib import mosaic_gpu_dialect
from jax.interpreters import mlir
from jax.sharding import AbstractDevice, AbstractMesh
from jaxlib.mlir import ir
from jaxlib.triton import dialect as triton_dialect

import pallas_qk

GPUS = {  # kind and number of multiprocessors; the kernels that run there
    "NVIDIA H200": (132, ("mosaic_gpu", "triton")),
    "NVIDIA A100-SXM4-80GB": (108, ("triton",)),
    "NVIDIA B200": (148, ("mosaic_gpu", "triton")),
    # Since JAX 0.11 its Triton backend knows no such device that is not there.
    "NVIDIA GeForce RTX 5090": (170, ("mosaic_gpu", "triton") if jax.__version_info__ < (0, 11) else ("mosaic_gpu",)),
}
WITHOUT_FP8 = ("NVIDIA A100-SXM4-80GB",)  # no kernel writes codes of 8 bits there
PLATFORMS = ("cpu", "tpu")  # plain XLA


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes and dtypes of a call. `sections` are those of mRoPE, where positions are given."""

    num_tokens: int
    num_q_heads: int = 16
    num_kv_heads: int = 2
    head_dim: int = 256
    rotary_dim: int = 64
    dtype: str = "bfloat16"
    weight_dtype: str = "bfloat16"
    cache_dtype: str = "bfloat16"
    positions_dtype: str = "int32"
    sections: tuple[int, int, int] | None = None
    mrope_layout: str = "interleaved"
    norm_beta: float = 0.0
    rotation: str = "halves"
    round_norm: bool = True

    @property
    def options(self) -> dict[str, object]:
        """Those that not every commit has, where they aren't the default."""
        named = {"rotation": self.rotation, "round_norm": self.round_norm}
        return {name: value for name, value in named.items() if value != getattr(type(self), name)}


SHAPES = (  # what takes each branch of the rules of launches, and each dtype
    Shape(64),
    Shape(1),
    Shape(2048),
    Shape(65536, sections=(11, 11, 10), norm_beta=1.0),
    Shape(300, 3, 1, 80, 40, "float16", "float32", "float16", "int64"),
    Shape(1024, 32, 8, 128, 128, cache_dtype="float32", sections=(16, 24, 24), mrope_layout="sectioned"),
    Shape(37, 5, 2, 512, 6, "float32", "float16", "float32", "uint8", (1, 1, 1)),
    Shape(1024, rotation="pairs"),
    Shape(37, 5, 2, 80, 40, "float32", "float16", "float32", sections=(7, 7, 6), rotation="pairs"),
    Shape(2048, 32, 8, 128, 128, "float16", "float16", "float16", round_norm=False),
)
WITH_OPTIONS = SHAPES[7:]


@dataclasses.dataclass(frozen=True)
class Cache:
    """A KV cache that is written; 8 blocks of 16 places, 3 layers."""

    axes: str = "b s h d"
    dtype: str | None = None  # None: that of the activations
    slots_dtype: str = "int32"
    return_kv: bool = False
    scale_per_head: tuple[bool, bool] | None = None  # of k and v, for a dtype of 8 bits


@dataclasses.dataclass(frozen=True)
class Form:
    """How a model holds its arrays."""

    gate: str | None  # "copied", "in_place", "handed_on" and multiplied with q, or None without gates
    packed: bool
    gathered: bool  # a row of the table for each token
    split: bool = False  # heads on an axis of their own
    cache: Cache | None = None

    @property
    def function(self) -> str:
        """The public function that takes it. Those that write a cache take q, k and v apart as well."""
        packed, gate = self.packed or self.cache is not None, "_gate" if self.gate else ""
        return f"fused_qk{'v' * packed}_rmsnorm_rope{gate}{'_cache' if self.cache else ''}"


def _cached(cache: Cache, gate: str | None = "copied", *, packed: bool = True) -> Form:
    return Form(gate, packed, gathered=False, cache=cache)


# With every shape.
MAIN_FORMS = (
    *itertools.starmap(Form, itertools.product(("copied", "in_place", None), (False, True), (False, True))),
    _cached(Cache()),
    _cached(Cache("b s (h c) d"), "in_place", packed=False),
    _cached(Cache(dtype="float8_e4m3fn", scale_per_head=(False, False))),
)
FORMS = (
    *MAIN_FORMS,
    Form("copied", packed=False, gathered=False, split=True),
    Form("handed_on", packed=False, gathered=False),
    Form("handed_on", packed=True, gathered=False),
    _cached(Cache("b h s (c d)", "float32", return_kv=True), packed=False),
    _cached(Cache("l h b s d", slots_dtype="uint8"), None),
    _cached(Cache("c b s h d", slots_dtype="int64", return_kv=True), None, packed=False),
    _cached(Cache("b h s (c d)", "float8_e5m2", return_kv=True, scale_per_head=(True, False)), packed=False),
    _cached(Cache("l b s (h c) d", "float8_e4m3fn", scale_per_head=(False, True)), "in_place"),
    _cached(Cache("c h b s d", "float8_e4m3fn", scale_per_head=(True, True)), None),
)


@dataclasses.dataclass(frozen=True)
class Call:
    """One program."""

    where: str  # a GPU or a platform
    implementation: str | None
    direction: str
    form: Form
    shape: Shape

    @property
    def name(self) -> str:
        values = self.where, self.implementation or "xla", self.direction
        values += (*dataclasses.astuple(self.form), *dataclasses.astuple(self.shape))
        return " ".join(str(value).replace(" ", "") for value in values)


def calls() -> Iterator[Call]:
    """Every form and shape for Hopper; every form for other GPUs and platforms. What writes a cache has no backward."""
    kinds = [
        (direction, form)
        for direction in ("forward", "backward")
        for form in FORMS
        if is_there(form) and (direction == "forward" or form.cache is None)
    ]
    for (gpu, (_, names)), (direction, form) in itertools.product(GPUS.items(), kinds):
        if has_scales(form) and gpu in WITHOUT_FP8:
            continue
        shapes = SHAPES if gpu == "NVIDIA H200" and form in MAIN_FORMS else SHAPES[:1]
        for name, shape in itertools.product(names, shapes):
            if takes(form, shape):
                yield Call(gpu, name, direction, form, shape)
    for platform, (direction, form) in itertools.product(PLATFORMS, kinds):
        yield Call(platform, None, direction, form, SHAPES[0] if form.gathered else SHAPES[5])
        if form == MAIN_FORMS[0]:
            yield from (Call(platform, None, direction, form, shape) for shape in WITH_OPTIONS if takes(form, shape))


def has_scales(form: Form) -> bool:
    return form.cache is not None and form.cache.scale_per_head is not None


def is_there(form: Form) -> bool:
    """Whether the package has the function, and that its scales, and what takes a gate that is handed on."""
    if form.gate == "handed_on" and not hasattr(pallas_qk, "apply_gate"):
        return False
    return hasattr(pallas_qk, form.function) and (not has_scales(form) or "k_scale" in _parameters(form))


def takes(form: Form, shape: Shape) -> bool:
    """Whether the function, which is there, has the shape's options."""
    return _parameters(form) >= shape.options.keys()


def _parameters(form: Form) -> set[str]:
    return set(inspect.signature(getattr(pallas_qk, form.function)).parameters)


def function_and_arguments(call: Call):
    form, shape = call.form, call.shape
    q_heads, kv_heads, d = shape.num_q_heads, shape.num_kv_heads, shape.head_dim
    sections = None if form.gathered else shape.sections
    static: dict[str, object] = {
        "eps": 1e-6,
        "num_q_heads": q_heads,
        "num_kv_heads": kv_heads,
        "head_dim": d,
        "rotary_dim": shape.rotary_dim,
        "mrope_section": sections,
        "mrope_layout": shape.mrope_layout,
        "norm_beta": shape.norm_beta,
        "implementation": call.implementation,
    } | shape.options
    if form.gate in ("in_place", "handed_on"):
        static["copy_gate"] = False if form.gate == "in_place" else "never"
    op = getattr(pallas_qk, form.function)

    def array(*sizes: int, dtype: str = shape.dtype) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, jnp.dtype(dtype))

    t, width = shape.num_tokens, 2 * d if form.gate else d
    if form.packed:
        activations = [array(t, q_heads * width + 2 * kv_heads * d)]
    elif form.split:
        activations = [array(t, q_heads, width), array(t, kv_heads, d)]
    else:
        activations = [array(t, q_heads * width), array(t, kv_heads * d)]
    weights = [array(d, dtype=shape.weight_dtype)] * 2
    rows = t if form.gathered else 4096
    table = array(rows, shape.rotary_dim, dtype=shape.cache_dtype)
    positions = [] if form.gathered else [array(*((3, t) if sections else (t,)), dtype=shape.positions_dtype)]
    if form.cache is not None:
        static |= {"cache_axes": form.cache.axes, "return_kv": form.cache.return_kv}
        qkv = activations[0] if form.packed else (*activations, array(t, kv_heads * d))
        kv_cache, slots = of_cache(form.cache, shape), array(t, dtype=form.cache.slots_dtype)
        layer = {"layer": array(dtype="int32")} if "l" in form.cache.axes else {}
        per_head = dict(zip(("k_scale", "v_scale"), form.cache.scale_per_head or (), strict=False))
        scales = {name: array(*[kv_heads] * own, dtype="float32") for name, own in per_head.items()}

        def write(named, *arrays):
            return op(*arrays, **static, **named)

        return write, [layer | scales, qkv, *weights, table, *positions, kv_cache, slots]

    def forward(*arrays):
        arrays = arrays if positions else (*arrays, None)
        outputs = op(*arrays, **static)
        return (*outputs[:-1], pallas_qk.apply_gate(outputs[0], outputs[-1])) if form.gate == "handed_on" else outputs

    differentiable = len(activations) + 2

    def backward(cotangents, *arrays):
        def of_differentiable(*first):
            return forward(*first, *arrays[differentiable:])

        return jax.vjp(of_differentiable, *arrays[:differentiable])[1](cotangents)

    arrays = [*activations, *weights, table, *positions]
    if call.direction == "forward":
        return forward, arrays
    return backward, [jax.eval_shape(forward, *arrays), *arrays]


def of_cache(cache: Cache, shape: Shape):
    """The arrays of k and of v, or the one of both."""
    sizes = {"l": 3, "b": 8, "s": 16, "h": shape.num_kv_heads, "d": shape.head_dim, "c": 2}
    axes = re.findall(r"\(([^)]*)\)|(\w)", cache.axes)
    dims = tuple(math.prod(sizes[name] for name in "".join(axis).replace(" ", "")) for axis in axes)
    array = jax.ShapeDtypeStruct(dims, jnp.dtype(cache.dtype or shape.dtype))
    return array if "c" in cache.axes else (array, array)


@contextlib.contextmanager
def lowering(call: Call):
    """As if on the GPU of the call; 64-bit positions and slots need x64."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", DeprecationWarning)  # JAX's of its Triton backend
        integers = call.shape.positions_dtype, call.form.cache.slots_dtype if call.form.cache else ""
        stack.enter_context(jax.enable_x64(any(dtype.endswith("64") for dtype in integers)))
        if call.where in GPUS:
            device = AbstractDevice(device_kind=call.where, num_cores=GPUS[call.where][0], platform="cuda")
            stack.enter_context(jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)))
        yield


def emitted(call: Call) -> list[str]:
    """The code of each kernel of a program, in order; of plain XLA the program."""
    with lowering(call):
        function, arguments = function_and_arguments(call)
        platform = "cuda" if call.where in GPUS else call.where
        lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
    if platform != "cuda":
        return [_without_names(lowered.as_text())]
    module = lowered.compiler_ir()
    kernels = [_code(operation) for operation in _custom_calls(module.operation)]
    assert kernels, f"no kernel in {call.name}"
    return kernels


def _without_names(text: str) -> str:
    """The text with its functions numbered: what they are called computes nothing."""
    numbers: dict[str, str] = {}
    return re.sub(r"@[\w.\-]+", lambda found: numbers.setdefault(found[0], f"@f{len(numbers)}"), text)


def _custom_calls(operation: ir.Operation) -> Iterator[ir.Operation]:
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                if inner.operation.name == "stablehlo.custom_call":
                    yield inner.operation
                yield from _custom_calls(inner.operation)


def _code(call: ir.Operation) -> str:
    """What a custom call runs, without its places in source files."""
    config = {entry.name: entry.attr for entry in call.attributes["mhlo.backend_config"]}
    code = config.pop("module", None) or config.pop("ir")
    config.pop("kernel_hash", None)  # of the code with its places
    with mlir.make_ir_context() as context:
        context.allow_unregistered_dialects = True
        mosaic_gpu_dialect.register_dialect(context)
        triton_dialect.register_dialect(context)
        module = str(ir.Module.parse(code.value_bytes))
    module = re.sub(r'mosaic_gpu.dump_basename = "[^"]*"', "", module)  # counts the kernels of this process (JAX 0.11)
    return "\n".join([*(f"{name} = {value}" for name, value in sorted(config.items())), module])


def hashes(only: str) -> dict[str, str]:
    """Of each kernel by the name of its call and its place in the program."""
    return {
        f"{call.name} #{place}": hashlib.sha256(text.encode()).hexdigest()
        for call in calls()
        if only in call.name
        for place, text in enumerate(emitted(call))
    }


@contextlib.contextmanager
def hashes_of(revision: str, only: str):
    """A function that waits for those of a commit's package, which this file computes in a second process."""
    root = pathlib.Path(__file__).parents[1]
    archive = subprocess.run(["git", "archive", revision, "pallas_qk"], cwd=root, capture_output=True, check=False)
    if archive.returncode:
        raise SystemExit(f"revision must be a commit here, got {revision}: {archive.stderr.decode().strip()}")
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
            files.extractall(folder, filter="data")
        command = [sys.executable, __file__, "--json", "--only", only]
        environment = os.environ | {"PYTHONPATH": folder}
        with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True) as process:

            def finish() -> dict[str, str]:
                printed, _ = process.communicate()
                if process.returncode:
                    raise SystemExit(f"{revision} must lower every call, got status {process.returncode}: see above")
                return json.loads(printed)

            yield finish


def compare(before: dict[str, str], after: dict[str, str]) -> list[str]:
    """A line for each kernel that is not the same on both sides, of the calls that `before` has."""
    kinds = {(True, False): "gone", (False, True): "new", (True, True): "changed"}
    known = set(map(_call_of, before))
    names = dict.fromkeys([*before, *(name for name in after if _call_of(name) in known)])
    return [f"{kinds[name in before, name in after]}: {name}" for name in names if before.get(name) != after.get(name)]


def _call_of(name: str) -> str:
    return name.rpartition(" #")[0]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.emitted", description=__doc__.partition("\n")[0])
    parser.add_argument("revision", nargs="?", help="a commit to compare with")
    parser.add_argument("--only", default="", metavar="TEXT", help="calls whose names hold it")
    parser.add_argument("--json", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.json:
        print(json.dumps(hashes(options.only)))
        return 0
    start = time.monotonic()
    if options.revision is None:
        here = hashes(options.only)
        for name, digest in here.items():
            print(digest[:16], name)
        print(f"{len(here)} kernels of JAX {jax.__version__} in {time.monotonic() - start:.0f} s")
        return 0
    with hashes_of(options.revision, options.only) as finish:
        here, there = hashes(options.only), finish()
    differences = compare(there, here)
    for line in differences:
        print(line)
    known = set(map(_call_of, there))
    lacked = sum(_call_of(name) not in known for name in here)
    against = f"{options.revision} (JAX {jax.__version__})" + (f", which lacks {lacked} more" if lacked else "")
    print(f"{len(differences)} of {len(here) - lacked} kernels differ from {against}; {time.monotonic() - start:.0f} s")
    return bool(differences)


if __name__ == "__main__":
    sys.exit(main())
