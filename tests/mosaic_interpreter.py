"""Executes on a CPU, in NumPy, the code that the Mosaic GPU kernels are lowered to for CUDA.

Pallas's interpret mode can't run `inline_mgpu` bodies, and would not see what they emit. Here every thread of every
program takes part in every operation: a value is an array (programs, threads), or a list of them for a vector.
Checked on the way: every access lies inside its array and is aligned to its width, only results are written, all of
each result is but where it updates an array in place, and what is written twice is written with the same bits.

Arithmetic is that of PTX (IEEE, NaN results canonical) but for the approximate reciprocal and root, which are exact.
"""

import dataclasses
import math
import re
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from jax._src.lib import mosaic_gpu_dialect
from jax.interpreters import mlir
from jaxlib.mlir import ir, passmanager
from jaxlib.mlir.dialects import stablehlo as hlo

from tests import fp8
from tests.lowering import HOPPER_SMS, lowered

WARP = 32


def execute(function, *args, programs: slice = slice(None), num_sms: int = HOPPER_SMS, partly: bool = False):
    """The results of `function(*args)`, which must be Mosaic GPU kernels in a row, with reshapes and barriers between.

    Arguments and results are arrays, in any containers.
    `programs` of the first kernel's grid may be picked; the others leave their part of its results zero.
    With `partly` a kernel may leave elements of its results, which are NaN then.
    """
    program = emitted(function, *args, num_sms=num_sms)
    arrays = {_Argument(i): np.asarray(arg) for i, arg in enumerate(jax.tree.leaves(args))}
    for index, kernel in enumerate(program.kernels):
        picked = programs if index == 0 else slice(None)
        inputs = [_Memory(arrays[key].reshape(shape)) for key, shape in kernel.inputs]
        results = [_Memory(None, out) for out in kernel.outputs]
        for result, operand in kernel.updated.items():
            results[result].bytes[:] = inputs[operand].bytes
            inputs[operand] = results[result]
        with mlir.make_ir_context() as context:
            _Launch(inputs + results, picked).run(_module(context, kernel.code))
        new = [result for place, result in enumerate(results) if place not in kernel.updated]
        if partly:
            for result in new:
                result.bytes[~result.written] = 0xFF
                result.written[:] = True
        assert picked != slice(None) or all(result.written.all() for result in new), "a result is not written in full"
        for place, (result, out) in enumerate(zip(results, kernel.outputs, strict=True)):
            arrays[_Output(index, place)] = result.bytes.view(out.dtype).reshape(out.shape)
    return program.tree.unflatten([arrays[key].reshape(shape) for key, shape in program.results])


class _Argument(NamedTuple):
    """An array that the function is given."""

    index: int


class _Output(NamedTuple):
    """An array that one of the kernels writes."""

    kernel: int
    index: int


class Kernel(NamedTuple):
    """One kernel, its inputs with the shape it sees them in, and what it writes."""

    code: bytes  # of the MLIR module
    inputs: list[tuple[_Argument | _Output, tuple[int, ...]]]
    outputs: list[jax.ShapeDtypeStruct]
    updated: dict[int, int]  # outputs that are inputs updated in place, by their places

    def __str__(self) -> str:
        with mlir.make_ir_context() as context:
            return str(_module(context, self.code))


class Program(NamedTuple):
    """The kernels that a function is lowered to for CUDA, in their order, and the function's results."""

    kernels: list[Kernel]
    results: list[tuple[_Argument | _Output, tuple[int, ...]]]
    tree: jax.tree_util.PyTreeDef  # of the results

    def __str__(self) -> str:
        return "\n".join(map(str, self.kernels))


def emitted(function, *args, num_sms: int = HOPPER_SMS) -> Program:
    """What is made of `function` for a Hopper of so many multiprocessors."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), args)
    program = lowered(function, *shapes, num_sms=num_sms)
    (main,) = program.compiler_ir().body.operations
    *operations, end = main.regions[0].blocks[0].operations
    calls: list[ir.Operation] = []
    kernels = []

    def source(value: ir.Value) -> tuple[_Argument | _Output, tuple[int, ...]]:
        shape = tuple(ir.RankedTensorType(value.type).shape)
        while not isinstance(value.owner, ir.Block) and value.owner.name in _MOVES_NOTHING:
            value = value.owner.operands[ir.OpResult(value).result_number]
        if isinstance(value.owner, ir.Block):
            return _Argument(ir.BlockArgument(value).arg_number), shape
        return _Output(calls.index(value.owner), ir.OpResult(value).result_number), shape

    for call in (op.operation for op in operations):
        if call.name in _MOVES_NOTHING:
            continue
        assert call.name == "stablehlo.custom_call", call
        assert call.attributes["call_target_name"].value.startswith("mosaic_gpu"), call
        code = call.attributes["mhlo.backend_config"]["module"].value_bytes
        outputs = [_shape_dtype(result.type) for result in call.results]
        kernels.append(Kernel(code, [source(operand) for operand in call.operands], outputs, _aliases(call)))
        calls.append(call)
    return Program(kernels, [source(result) for result in end.operands], jax.tree.structure(program.out_info))


def _aliases(call: ir.Operation) -> dict[int, int]:
    if "output_operand_aliases" not in call.attributes:
        return {}
    aliases = map(hlo.OutputOperandAlias, call.attributes["output_operand_aliases"])
    # A single result has no place of its own.
    return {(*alias.output_tuple_indices, 0)[0]: alias.operand_index for alias in aliases}


_MOVES_NOTHING = ("stablehlo.reshape", "stablehlo.broadcast_in_dim", "stablehlo.optimization_barrier")


def _shape_dtype(kind: ir.Type) -> jax.ShapeDtypeStruct:
    tensor = ir.RankedTensorType(kind)
    dtypes = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32}
    dtypes |= {"f8E4M3FN": ml_dtypes.float8_e4m3fn, "f8E5M2": ml_dtypes.float8_e5m2}
    return jax.ShapeDtypeStruct(tensor.shape, dtypes[str(tensor.element_type)])


def _module(context: ir.Context, code: bytes) -> ir.Module:
    context.allow_unregistered_dialects = True
    mosaic_gpu_dialect.register_dialect(context)
    module = ir.Module.parse(code)
    passmanager.PassManager.parse("builtin.module(mosaic_gpu-serde{serialize=false})").run(module.operation)
    return module


@dataclasses.dataclass(frozen=True)
class _Pointer:
    """A byte of an array. The array "buffers" holds the pointers to the others."""

    array: int | str
    offset: np.ndarray | int

    def __add__(self, num_bytes):
        return _Pointer(self.array, self.offset + np.asarray(num_bytes).astype(np.int64))


class _Memory:
    """One array in global memory: an input, or a result to come."""

    def __init__(self, array: np.ndarray | None, result: jax.ShapeDtypeStruct | None = None):
        self.is_result = array is None
        if array is None:
            self.bytes = np.zeros(math.prod(result.shape) * result.dtype.itemsize, np.uint8)
            self.written = np.zeros(self.bytes.shape, bool)
            # Bytes and the programs that wrote them: all, and in order those of before the last barrier.
            self.stores: list[np.ndarray] = []
            self.visible = np.zeros((2, 0), np.int64)
        else:
            self.bytes = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def indices(self, offset, active, num_bytes: int) -> np.ndarray:
        """Of each byte of an access by the active threads, (accesses, bytes)."""
        offset = offset[active]
        assert ((offset >= 0) & (offset + num_bytes <= self.bytes.size)).all(), "an access outside its array"
        assert (offset % num_bytes == 0).all(), f"an access of {num_bytes} bytes that is not aligned to them"
        return offset[:, None] + np.arange(num_bytes)

    def load(self, offset, active, width: int, count: int) -> np.ndarray:
        offset, active = np.broadcast_arrays(offset, active)
        words = np.zeros((count, *offset.shape), _unsigned(width))
        indices = self.indices(offset, active, width // 8 * count)
        if self.is_result:
            written, programs = self.visible
            places = np.minimum(np.searchsorted(written, indices), written.size - 1)
            own = (written[places] == indices) & (programs[places] == np.nonzero(active)[0][:, None])
            assert own.all(), "a result is read that the program had not written before a barrier"
        words[:, active] = self.bytes[indices].view(words.dtype).T
        return words

    def store(self, offset, active, words: list[np.ndarray]) -> None:
        assert self.is_result, "an input is written"
        offset, active, *words = np.broadcast_arrays(offset, active, *words)
        new = np.stack([word[active] for word in words], axis=-1).view(np.uint8)
        indices = self.indices(offset, active, new.shape[1])
        repeats = self.written[indices]
        assert (self.bytes[indices] == new)[repeats].all(), "written twice with different bits"
        self.bytes[indices] = new
        assert (self.bytes[indices] == new).all(), "written twice with different bits"
        self.written[indices] = True
        programs = np.broadcast_to(np.nonzero(active)[0][:, None], indices.shape)
        self.stores.append(np.stack([indices.reshape(-1), programs.reshape(-1)]))

    def barrier(self) -> None:
        if self.is_result:
            stores = np.concatenate([self.visible, *self.stores], axis=1)
            self.visible = stores[:, np.argsort(stores[0], kind="stable")]


def _unsigned(width: int):
    return {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}[width]


def _dtype(kind: ir.Type):
    if isinstance(kind, ir.IntegerType):
        return _unsigned(ir.IntegerType(kind).width)
    return {"f16": np.float16, "f32": np.float32, "index": np.uint64}[str(kind)]


def _signed(x: np.ndarray) -> np.ndarray:
    return x.view(np.dtype(f"i{x.dtype.itemsize}"))


def _canonical(x: np.ndarray) -> np.ndarray:
    """PTX has one NaN for the results of float32 arithmetic."""
    return np.where(np.isnan(x), np.uint32(0x7FFFFFFF).view(np.float32), x)


def _fma(a, b, c):
    # The product is exact in 80 bits; the sum is rounded there first, which shows once in 2^39.
    return _canonical((a.astype(np.longdouble) * b + c).astype(np.float32))


def _flushed(x):
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def _upper_half(x):
    """Of float64, without the lower 32 bits."""
    return (x.view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def _rounded(x, dtype) -> np.ndarray:
    """Bits of float32 x in a 16-bit dtype, to nearest even."""
    return np.where(np.isnan(x), np.uint16(0x7FFF), x.astype(dtype).view(np.uint16))


def _packed(dtype):
    return lambda high, low: _rounded(high, dtype).astype(np.uint32) << np.uint32(16) | _rounded(low, dtype)


def _moved(low, *high):
    """A word of 32 bits, or of two halves."""
    return low | high[0].astype(np.uint32) << np.uint32(16) if high else low


def _pair_of_codes(name):
    def pair(high, low):
        high, low = (fp8.codes(x, np.float32(1), name).astype(np.uint16) for x in (high, low))
        return high << np.uint16(8) | low

    return pair


def _added_pairs(dtype):
    def add(a, b):
        sums = (a.view(dtype).astype(np.float32) + b.view(dtype).astype(np.float32)).astype(np.float32)
        return _rounded(sums, dtype).view(np.uint32)

    return lambda a, b: add(*(np.ascontiguousarray(x)[..., None] for x in np.broadcast_arrays(a, b)))[..., 0]


_PTX = {
    "ex2.approx.ftz.f32": lambda x: _canonical(_flushed(np.exp2(x))),
    "rcp.approx.ftz.f32": lambda x: _canonical(_flushed(1 / _flushed(x))),
    "rsqrt.approx.ftz.f32": lambda x: _canonical((1 / np.sqrt(_flushed(x).astype(np.float64))).astype(np.float32)),
    "fma.rn.f32": _fma,
    "mov.b32": _moved,
    "mov.b64": lambda x: x,
    "add.rn.bf16x2": _added_pairs(ml_dtypes.bfloat16),
    "add.rn.f16x2": _added_pairs(np.float16),
    "cvt.rn.bf16x2.f32": _packed(ml_dtypes.bfloat16),
    "cvt.rn.f16x2.f32": _packed(np.float16),
    "cvt.rn.bf16.f32": lambda x: _rounded(x, ml_dtypes.bfloat16),
    "cvt.rn.f16.f32": lambda x: _rounded(x, np.float16),
    "rcp.approx.ftz.f64": lambda x: _upper_half(1 / _upper_half(x)),
    "neg.f64": lambda x: -x,
    "fma.rn.f64": lambda a, b, c: (a.astype(np.longdouble) * b + c).astype(np.float64),
    "neg.f32": lambda x: -x,
    "mul.rn.f64": lambda a, b: a * b,
    "testp.notanumber.f64": np.isnan,
    "selp.f64": lambda a, b, p: np.where(p, a, b),
    "mov.f64": lambda x: x,
    "rcp.approx.f32": lambda x: _canonical(1 / x),
    "mul.rn.f32": lambda a, b: _canonical(a * b),
    "min.NaN.xorsign.abs.f32": lambda a, b: _canonical(np.copysign(np.minimum(np.abs(a), np.abs(b)), a) * np.sign(b)),
    "mov.f32": lambda x: x,
    "cvt.f64.f32": lambda x: x.astype(np.float64),
    "cvt.rn.f32.f64": lambda x: _canonical(x.astype(np.float32)),
    "cvt.rn.satfinite.e4m3x2.f32": _pair_of_codes("float8_e4m3fn"),
    "cvt.rn.satfinite.e5m2x2.f32": _pair_of_codes("float8_e5m2"),
}


def _literal(text: str) -> np.ndarray | np.uint32:
    """PTX writes a float as 0f or 0d and its bits."""
    if text.startswith("0d"):
        return np.uint64(int(text[2:], 16)).view(np.float64)
    return np.uint32(int(text[2:], 16)).view(np.float32) if text.startswith("0f") else np.uint32(text)


def _ptx(code: str, args: list[np.ndarray]) -> np.ndarray:
    registers = {f"${i}": arg for i, arg in enumerate(args, start=1)}
    for statement in code.strip("{} ").split(";"):
        name, _, operands = statement.strip().partition(" ")
        if name in ("", ".reg"):
            continue
        target, *sources = (operand.strip("{}") for operand in re.split(r",\s*", operands.strip()))
        values = (registers[source] if source in registers else _literal(source) for source in sources)
        registers[target] = _PTX[name](*values)
    return registers["$0"]


_COMPARISONS = [
    lambda a, b: a == b,
    lambda a, b: a != b,
    lambda a, b: _signed(a) < _signed(b),
    lambda a, b: _signed(a) <= _signed(b),
    lambda a, b: _signed(a) > _signed(b),
    lambda a, b: _signed(a) >= _signed(b),
    lambda a, b: a < b,
    lambda a, b: a <= b,
    lambda a, b: a > b,
    lambda a, b: a >= b,
]

_ELEMENTWISE = {
    "arith.addi": np.add,
    "arith.subi": np.subtract,
    "arith.muli": np.multiply,
    "arith.divui": np.floor_divide,
    "arith.remui": np.remainder,
    "arith.minui": np.minimum,
    "arith.andi": np.bitwise_and,
    "arith.ori": np.bitwise_or,
    "arith.xori": np.bitwise_xor,
    "arith.shli": np.left_shift,
    "arith.shrui": np.right_shift,
    "arith.select": np.where,
    "arith.addf": lambda a, b: _canonical(a + b),
    "arith.mulf": lambda a, b: _canonical(a * b),
    "arith.negf": np.negative,
    "math.fma": _fma,
    "llvm.add": lambda a, b: a + b,
    "llvm.mul": np.multiply,
}


class _Launch:
    """The state of one kernel launch."""

    def __init__(self, memories: list[_Memory], programs: slice):
        self.memories, self.picked = memories, programs
        self.values: dict[ir.Value, object] = {}
        self.active = np.ones((1, 1), bool)

    def run(self, module: ir.Module) -> None:
        (main,) = (
            op for op in module.body.operations if op.operation.name == "func.func" and len(op.regions[0].blocks)
        )
        (block,) = main.regions[0].blocks
        self.values[block.arguments[1]] = _Pointer("buffers", 0)
        with np.errstate(all="ignore"):
            self._block(block)

    def _block(self, block: ir.Block) -> None:
        for op in block.operations:
            op = op.operation
            if op.name == "gpu.launch":
                self._launch(op)
            elif op.name == "scf.if" and not op.results:
                self._if(op)
            elif op.name == "scf.for":
                self._for(op)
            elif op.name == "llvm.store":
                self._store(op)
            elif op.name == "llvm.inline_asm" and "pmevent" in op.attributes["asm_string"].value:
                pass
            elif op.name == "llvm.inline_asm" and op.attributes["asm_string"].value.startswith("bar.sync"):
                for memory in self.memories:  # the threads of all programs run in step
                    memory.barrier()
            else:
                # What this kernel has no use for (barriers, elections, shared memory) stays without a value.
                operands = [self.values.get(operand) for operand in op.operands]
                if not any(operand is None for operand in operands) and len(op.results):
                    value = self._value(op, operands)
                    if value is not None:
                        self.values[op.results[0]] = value

    def _launch(self, op) -> None:
        sizes = [int(self.values[o]) for o in op.operands if str(o.type) == "index"]
        (programs, *grid_rest), (threads, *block_rest) = sizes[:3], sizes[3:6]
        assert grid_rest == block_rest == [1, 1]
        self.programs = np.arange(programs, dtype=np.uint64)[self.picked, None]
        self.threads = np.arange(threads, dtype=np.uint64)[None, :]
        (block,) = op.regions[0].blocks
        self._block(block)

    def _if(self, op) -> None:
        condition = np.asarray(self.values[op.operands[0]])
        outer = self.active
        for region, taken in zip(op.regions, (condition, ~condition), strict=True):
            self.active = outer & taken
            for block in region.blocks:
                self._block(block)
        self.active = outer

    def _for(self, op) -> None:
        index, stop, step, *carried = (self.values[operand] for operand in op.operands)
        (block,) = op.regions[0].blocks
        *_, end = block.operations
        outer = self.active
        while (active := outer & (_signed(index) < _signed(stop))).any():
            self.active = active
            for argument, value in zip(block.arguments, (index, *carried), strict=True):
                self.values[argument] = value
            self._block(block)
            new = (self.values[operand] for operand in end.operands)
            carried = [np.where(active, a, b) for a, b in zip(new, carried, strict=True)]
            index = index + step
        self.active = outer
        for result, value in zip(op.results, carried, strict=True):
            self.values[result] = value

    def _shuffle(self, op, operands) -> np.ndarray:
        """The value that another thread of the warp holds."""
        _, value, other, _ = operands
        shape = (self.programs.size, self.threads.size)
        warps = np.broadcast_to(self.active, shape).reshape(-1, WARP)
        assert (warps == warps[:, :1]).all(), "threads of a warp part ways before a shuffle"
        lane = np.arange(WARP, dtype=np.uint32)
        other = np.broadcast_to(other, shape).reshape(-1, WARP)
        assert (other < WARP).all()
        source = lane ^ other if "bfly" in str(op.attributes["kind"]) else other
        return np.take_along_axis(np.broadcast_to(value, shape).reshape(-1, WARP), source.astype(int), 1).reshape(shape)

    def _store(self, op) -> None:
        value, pointer = (self.values[operand] for operand in op.operands)
        values = value if isinstance(value, list) else [value]
        self.memories[pointer.array].store(pointer.offset, self.active, values)

    def _value(self, op, operands):
        """The result of an operation; None if this kernel can't have a use for it."""
        kind = op.results[0].type
        match op.name:
            case "arith.constant" | "llvm.mlir.constant":
                value = op.attributes["value"].value
                if isinstance(value, int) and not isinstance(value, bool):
                    value %= 2 ** np.iinfo(_dtype(kind)).bits
                return _dtype(kind)(value)
            case "gpu.thread_id" | "gpu.block_id" | "gpu.block_dim":
                ids = {"gpu.thread_id": self.threads, "gpu.block_id": self.programs}
                is_x = "x" in re.findall(r"\b[xyz]\b", str(op.attributes["dimension"]))
                if op.name == "gpu.block_dim":
                    return np.uint64(self.threads.size if is_x else 1)
                return ids[op.name] if is_x else np.uint64(0)
            case "arith.index_cast" | "arith.extui" | "arith.trunci" | "arith.extf":
                return np.asarray(operands[0]).astype(_dtype(kind))
            case "arith.extsi":
                return _signed(operands[0]).astype(_dtype(kind))
            case "arith.bitcast":
                return operands[0].view(_dtype(kind))
            case "arith.cmpi":
                return _COMPARISONS[op.attributes["predicate"].value](*operands)
            case "nvvm.shfl.sync" if any(kind in str(op.attributes["kind"]) for kind in ("bfly", "idx")):
                return self._shuffle(op, operands)
            case "vector.from_elements":
                return list(operands)
            case "vector.extract":
                (position,) = op.attributes["static_position"]
                return operands[0][position]
            case "llvm.inline_asm" if operands:
                return _ptx(op.attributes["asm_string"].value, operands)
            case "llvm.mlir.undef":
                return {}
            case "llvm.insertvalue":
                value, struct = operands if isinstance(operands[1], dict) else reversed(operands)
                return struct | {tuple(op.attributes["position"]): value}
            case "llvm.extractvalue":
                return operands[0][tuple(op.attributes["position"])]
            case "builtin.unrealized_conversion_cast" | "llvm.ptrtoint" | "llvm.inttoptr" | "llvm.addrspacecast":
                return operands[0]
            case "llvm.getelementptr":
                (index,) = op.attributes["rawConstantIndices"]
                if len(operands) == 2:
                    index = _signed(operands[1]).astype(np.int64)
                element = ir.TypeAttr(op.attributes["elem_type"]).value
                size = 1 if str(element) == "!llvm.ptr" else ir.IntegerType(element).width // 8
                return operands[0] + index * size
            case "llvm.load":
                pointer = operands[0]
                if pointer.array == "buffers":
                    return _Pointer(int(pointer.offset), 0)
                is_vector = isinstance(kind, ir.VectorType)
                word = ir.VectorType(kind).element_type if is_vector else kind
                count = ir.VectorType(kind).shape[0] if is_vector else 1
                words = self.memories[pointer.array].load(
                    pointer.offset, self.active, ir.IntegerType(word).width, count
                )
                return list(words) if is_vector else words[0]
            case name if name in _ELEMENTWISE:
                return _ELEMENTWISE[name](*operands)
        return None
